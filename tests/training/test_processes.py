"""Trainings of several processes: two of gloo on this machine stand for eight GPUs."""

import numpy as np
import pytest
import torch

from genmodels import images
from genmodels.checkpoint import AtomicCheckpointIO, build, read_checkpoint
from genmodels.config import load_config, to_plain
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS
from tests.helpers.paths import ROOT
from tests.helpers.processes import together
from tests.helpers.tiny import last_words

KINDS = ("edm", "ddo", "gbm", "cdrl", "drl", "noise2score", "gedi")
CONFIGS = sorted(
    path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem.split("_")[0] in KINDS
)
FAST = ("edm_cifar10", "ddo_cifar10")

# A network of the same kind with the same options, only narrower and shallower.
SMALL = {
    "unet": ("channels={16 each}", "norm_groups=8", "head_dim=8", "layers=1"),
    "edm_unet": ("channels=32", "multipliers={1 each}", "blocks=1"),
    "ebm": ("channels=8", "blocks=1"),
    "mlp": ("width=16",),
    "resnet8": ("width=16",),
    "perceptron": ("width=16",),
    "denoiser": ("channels={8 each}", "blocks={1 each}"),
    "n2s_unet": (),
}
# What a method does within a step, fewer times.
SHORT = {
    "cdrl": ("steps=2", "initializer_blocks=1", "initializer_channels=64"),
    "gbm": ("rank=4",),
    "gedi": ("chain_steps=2", "buffer=8"),
    "ddo": ("rounds=1", "pool=8", "shard=4", "steps=1"),
}
SETS = ("cifar10", "cifar100", "svhn", "fashion_mnist", "mnist", "imagefolder")


def read(name, *words):
    return load_config([ROOT / f"configs/{name}.yaml"], words, methods=METHODS, networks=NETWORKS)


def shrunk(name, pictures):
    """Return the words that shrink a config: its network's kind and its options stay."""
    cfg = read(name)
    words = ["data.batch_size=4", "trainer.max_steps=2", "trainer.accelerator=cpu"]
    words += ["trainer.precision=32-true", "trainer.compile=false", "trainer.progress=false"]
    words += ["trainer.loggers=csv", "trainer.log_every=1", "checkpoint.every=1"]
    words += ["sample.every=0", "eval.loss_every=0"]
    for key in SMALL[cfg.network.name]:
        key, _, value = key.partition("=")
        if value.startswith("{"):
            value = [int(value[1:].split()[0])] * len(getattr(cfg.network, key))
        words.append(f"network.{key}={str(value).replace(' ', '')}")
    if getattr(cfg.network, "kind", "") == "adm":
        words.append("network.channels=64")  # has heads of 64
    words += [f"method.{word}" for word in SHORT.get(cfg.method.name, ())]
    if cfg.method.name == "cdrl" and cfg.method.initializer != "unet":
        words = [word for word in words if "initializer_" not in word]
    if cfg.method.name == "ddo":
        words += ["eval.every=0", "eval.num=4", "eval.features=pixels", "eval.metrics=nn1"]
    if cfg.data.name in SETS:
        grey = "mnist" in cfg.data.name
        side = {"mnist": 28, "fashion_mnist": 28}.get(cfg.data.name, cfg.data.resolution or 32)
        side //= 1 + (cfg.method.name == "ddo")  # scored as pixels, each with a row of covariances
        words += ["data.name=imagefolder", f"data.root={pictures}", f"data.resolution={side}"]
        words += [f"data.channels={1 if grey else 3}", "data.holdout=0.2"]
    elif cfg.data.noise.law:
        words += [f"data.root={pictures}", "data.name=imagefolder", "data.patch=32"]
    return words


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 20 coloured pictures of two classes, 64 pixels wide."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for k in range(20):
        pixels = torch.from_numpy(generator.integers(0, 256, (3, 64, 64), dtype=np.uint8))
        path = folder / "ab"[k % 2] / f"{k:02d}.png"
        path.parent.mkdir(exist_ok=True)
        images.write_png(path, pixels)
    return folder


def base(cfg, path):
    """Write an untrained EDM with the config's network, for DDO to begin with; return its path."""
    plain = to_plain(cfg)
    plain["method"] = {"name": "edm", "sigma_data": cfg.method.sigma_data}
    if cfg.data.name == "imagefolder":
        side = cfg.data.resolution
        plain["data"] |= {"shape": [cfg.data.channels, side, side], "classes": 2}
    model = build(load_config([plain], methods=METHODS, networks=NETWORKS))
    saved = {"state_dict": model.state_dict(), "hyper_parameters": {"config": to_plain(model.cfg)}}
    AtomicCheckpointIO().save_checkpoint(saved | {"global_step": 0}, path)
    return path


def argv(name, out, *words):
    return last_words([str(ROOT / f"configs/{name}.yaml"), f"out_dir={out}", *words])


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
)
def test_every_config_trains_on_two_processes(name, pictures, tmp_path):
    """DDP refuses a parameter without a gradient at the second step, for one."""
    words = [*shrunk(name, pictures), "trainer.devices=2"]
    if name.startswith("ddo"):
        words.append(f"init={base(read(name, *words), tmp_path / 'base.ckpt')}")
    ended = together(argv(name, tmp_path / "runs", *words), tmp_path)
    assert [process.code for process in ended] == [0, 0], ended[0].text + ended[1].text
    (run,) = (tmp_path / "runs").glob("*/*")
    assert ended[0].text.splitlines()[-1] == f"run: {run}" and "run:" not in ended[1].text
    last = run / "checkpoints/last.ckpt"
    if name.startswith("ddo"):
        assert (run / "round-01/state.json").is_file() and last.is_file()
    else:
        assert read_checkpoint(last)["global_step"] == 2
