"""Trainings of several processes: two of gloo on this machine stand for eight GPUs."""

import json
import math
import os
import signal
import time

import numpy as np
import pytest
import torch

import train
from genmodels import images
from genmodels.checkpoint import AtomicCheckpointIO, build, read_checkpoint
from genmodels.config import load_config, to_plain
from genmodels.data import ImageDataModule
from genmodels.distributed import rank
from genmodels.methods import METHODS
from genmodels.methods.edm import EDM
from genmodels.networks import NETWORKS
from genmodels.training import callbacks, judge
from genmodels.training.pool import load_reference
from tests.helpers.paths import ROOT
from tests.helpers.processes import once, together
from tests.helpers.tiny import TINY, last_words

KINDS = ("edm", "edm2", "ddo", "gbm", "cdrl", "drl", "noise2score", "gedi", "energy")
KINDS += ("interpolant", "dae", "meco")
CONFIGS = sorted(
    path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem.split("_")[0] in KINDS
)
FAST = ("edm_cifar10", "ddo_cifar10")

# A network of the same kind with the same options, only narrower and shallower.
SMALL = {
    "unet": ("channels={16 each}", "norm_groups=8", "head_dim=8", "layers=1"),
    "edm_unet": ("channels=32", "multipliers={1 each}", "blocks=1"),
    "edm2_unet": ("channels=32", "multipliers={1 each}", "blocks=1"),
    "ebm": ("channels=8", "blocks=1"),
    "potential": ("channels=32", "multipliers={1 each}", "blocks=1"),
    "mlp": ("width=16",),
    "mlp_map": ("width=16",),
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
    "energy_matching": ("chain_steps=2", "main_start=1"),
    "ddo": ("rounds=1", "pool=8", "shard=4", "steps=1", "alphas=1,4", "betas=0.1"),
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
        words += ["eval.every=0", "eval.num=8", "eval.features=pixels", "eval.metrics=fd"]
    if cfg.data.name in SETS:
        grey = "mnist" in cfg.data.name
        side = {"mnist": 28, "fashion_mnist": 28}.get(cfg.data.name, cfg.data.resolution or 32)
        side //= 1 + (cfg.method.name == "ddo")  # scored as pixels, each with a row of covariances
        if cfg.data.source:
            words.append("data.source=imagefolder")
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


def note_judged(folder, monkeypatch):
    """Score images two at a time; return a function of a process: the first seeds that it made."""
    original = judge.Judge.generate

    def generate(self, model, seeds, *args, **options):
        with open(folder / f"made-{rank()}", "a") as file:
            file.write(f"{seeds[0]}\n")
        return original(self, model, seeds, *args, **options)

    monkeypatch.setattr(judge, "BATCH", 2)
    monkeypatch.setattr(judge.Judge, "generate", generate)
    return lambda number: set(map(int, (folder / f"made-{number}").read_text().split()))


def argv(name, out, *words):
    return last_words([str(ROOT / f"configs/{name}.yaml"), f"out_dir={out}", *words])


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
)
def test_every_config_trains_on_two_processes(name, pictures, tmp_path, monkeypatch):
    """DDP refuses a parameter without a gradient at the second step, for one."""
    words = [*shrunk(name, pictures), "trainer.devices=2"]
    if name.startswith("ddo"):
        words.append(f"init={base(read(name, *words), tmp_path / 'base.ckpt')}")
        made_by = note_judged(tmp_path, monkeypatch)
    ended = together(argv(name, tmp_path / "runs", *words), tmp_path)
    assert [process.code for process in ended] == [0, 0], ended[0].text + ended[1].text
    (run,) = (tmp_path / "runs").glob("*/*")
    assert ended[0].text.splitlines()[-1] == f"run: {run}" and "run:" not in ended[1].text
    last = run / "checkpoints/last.ckpt"
    if name.startswith("ddo"):
        state = json.loads((run / "round-01/state.json").read_text())
        assert state["winner"] and last.is_file() and not (run / "round-01/scored").exists()
        # The judge's images are made by both, and the score is that of one process.
        cfg = read(name, *words)
        model = load_reference(cfg, cfg.init, torch.device("cpu"))
        alone = judge.Judge(cfg, ImageDataModule(cfg.data), torch.device("cpu"))
        assert state["start"]["fd"] == alone.score(model)["fd"]
        first = alone.choice["seeds"]
        assert made_by(0) >= {first, first + 4} and made_by(1) >= {first + 2, first + 6}
    else:
        assert read_checkpoint(last)["global_step"] == 2


# ------------------------------------------------------------------------------------------------
# Nodes, and other devices after a resume

DIGITS = [
    *TINY,
    "data.batch_size=8",
    "trainer.accelerator=cpu",
    "trainer.loggers=csv",
    "trainer.log_every=1",
    "checkpoint.every=2",
    "sample.every=0",
    "eval.loss_every=0",
    "optim.eps=1e-2",  # else Adam makes a step of the rounding of a gradient near zero
]


def weights(run):
    saved = read_checkpoint(run / "checkpoints/last.ckpt")
    return saved.get("current_model_state", saved["state_dict"])


def one_process(out, *words, name="edm_digits"):
    assert train.main(argv(name, out, *DIGITS, *words)) == 0
    (run,) = out.glob("*/*")
    return run


@pytest.mark.slow
def test_two_nodes_of_two_processes_train_what_one_process_does(tmp_path):
    words = ("trainer.max_steps=3",)
    one = weights(one_process(tmp_path / "one", *words))
    words += ("trainer.devices=2", "trainer.num_nodes=2", "sample.every=3", "sample.num=4")
    words = argv("edm_digits", tmp_path / "four", *DIGITS, *words, "method.steps=1")
    ended = together(words, tmp_path, devices=2, nodes=2)
    assert [process.code for process in ended] == [0] * 4, ended
    (run,) = (tmp_path / "four").glob("*/*")  # one folder, written by the first alone
    assert [bool(process.text) for process in ended] == [True, False, False, False]
    for key, value in weights(run).items():
        torch.testing.assert_close(value, one[key], rtol=0, atol=1e-6)
    assert len(list((run / "samples").iterdir())) == 1


@pytest.mark.slow
def test_cdrl_begun_by_matching_is_the_same_on_two_processes(tmp_path):
    """Four steps that differentiate the energy twice, four with chains."""
    words = [word for word in DIGITS if word not in TINY] + ["network.width=16", "method.steps=2"]
    words += ["method.matching=0.5", "trainer.max_steps=8", "trainer.progress=false"]
    assert train.main(argv("cdrl_digits", tmp_path / "one", *words)) == 0
    both = argv("cdrl_digits", tmp_path / "two", *words, "trainer.devices=2")
    ended = together(both, tmp_path)
    assert [process.code for process in ended] == [0, 0], ended
    (one,), (two,) = ((tmp_path / name).glob("*/*") for name in ("one", "two"))
    for key, value in weights(two).items():
        torch.testing.assert_close(value, weights(one)[key], rtol=0, atol=1e-6)


def test_processes_that_the_config_does_not_count_are_refused(tmp_path):
    """Before a folder is made; each of them would train alone."""
    ended = together(argv("edm_digits", tmp_path / "runs", *DIGITS), tmp_path)
    assert [process.code for process in ended] == [2, 2]
    for process in ended:
        assert process.text.count("\n") == 1 and "trainer.devices=2" in process.text
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_resume_in_other_micro_batches_goes_on_as_one_that_never_stopped(tmp_path, capsys):
    """In whole batches, then in two parts from an odd step on, then in four."""
    whole = one_process(tmp_path / "whole", "trainer.max_steps=7")
    run = one_process(tmp_path / "parts", "trainer.max_steps=3")
    capsys.readouterr()
    assert train.main([f"resume={run}", "trainer.max_steps=5", "trainer.accumulate=2"]) == 0
    note = "note: trainer.accumulate=2 (was 1): goes on with the same images and noise; rounding"
    assert note in capsys.readouterr().err
    assert train.main([f"resume={run}", "trainer.max_steps=7", "trainer.accumulate=4"]) == 0
    assert read_checkpoint(run)["global_step"] == 7
    for key, value in weights(run).items():
        torch.testing.assert_close(value, weights(whole)[key], rtol=0, atol=2e-6)


@pytest.mark.slow
def test_a_resume_on_two_processes_and_back(tmp_path):
    whole = one_process(tmp_path / "whole", "trainer.max_steps=6")
    run = one_process(tmp_path / "runs", "trainer.max_steps=2")
    words = (f"resume={run}", "trainer.max_steps=4", "trainer.devices=2")
    ended = together(words, tmp_path)
    assert [process.code for process in ended] == [0, 0], ended
    assert "trainer.devices=2 (was 1)" in ended[0].text and "note" not in ended[1].text
    assert train.main([f"resume={run}", "trainer.max_steps=6", "trainer.devices=1"]) == 0
    for key, value in weights(run).items():
        torch.testing.assert_close(value, weights(whole)[key], rtol=0, atol=2e-6)


@pytest.mark.slow
def test_a_buffer_is_dealt_anew_or_the_resume_is_refused(tmp_path, capsys):
    """GEDI's chains belong to processes: all entries go on, in other hands."""
    small = [*shrunk("gedi_circles", tmp_path), "optim.decay=none"]
    assert train.main(argv("gedi_circles", tmp_path / "runs", *small, "trainer.max_steps=2")) == 0
    (run,) = (tmp_path / "runs").glob("*/*")
    before = read_checkpoint(run)["replay"]["entries"]
    config = (run / "config.yaml").read_text()
    words = [f"resume={run}", "trainer.max_steps=4", "trainer.accumulate=1"]
    ended = together([*words, "trainer.devices=4"], tmp_path / "four", devices=4)
    assert [process.code for process in ended] == [0] * 4, ended
    assert "which chains of the buffer go on" in ended[0].text
    after = read_checkpoint(run)["replay"]["entries"]
    assert after.shape == before.shape and (after != before).any()
    (run / "config.yaml").write_text(config.replace("batch_size: 4", "batch_size: 3"))
    assert train.main([*words[:2], "trainer.devices=3"]) == 2
    line = capsys.readouterr().err
    assert "method.buffer=8: cannot be dealt to trainer.devices=3" in line
    assert "devices: 1" in (run / "config.yaml").read_text()


def test_a_log_file_gets_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    """At the first step, when EVERY seconds have passed, and at the end."""
    clock = iter(range(0, 10**6, 4))  # a step seems to take some multiple of four seconds
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(callbacks.Progress, "EVERY", 60.0)
    one_process(tmp_path, "trainer.max_steps=12", "trainer.progress=true")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 1/12, loss ") and lines[-1].startswith("step 12/12, loss ")
    assert 3 <= len(lines) < 12


# ------------------------------------------------------------------------------------------------
# Ends: all processes within a minute, with the command that goes on


def long_run(out):
    words = ["trainer.max_steps=100000", "trainer.devices=2", "checkpoint.every=1"]
    return argv("edm_digits", out, *DIGITS, *words)


def once_it_trains(out, act, step=3):
    """Return a `during` that acts on the processes as soon as a step is saved, the third."""
    return once(lambda: list(out.glob(f"*/*/checkpoints/step-{step:08d}.ckpt")), act)


def goes_on(out, folder):
    """Whether two processes resume the run there, two steps on."""
    (run,) = out.glob("*/*")
    step = read_checkpoint(run)["global_step"]
    ended = together([f"resume={run}", f"trainer.max_steps={step + 2}"], folder)
    return [p.code for p in ended] == [0, 0] and read_checkpoint(run)["global_step"] == step + 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_process_saves_and_ends_all(tmp_path, rank):
    out = tmp_path / "runs"
    during = once_it_trains(out, lambda processes: os.kill(processes[rank], signal.SIGTERM))
    ended = together(long_run(out), tmp_path, during=during, seconds=180)
    assert [process.code for process in ended] == [128 + signal.SIGTERM, 0]
    (run,) = out.glob("*/*")
    assert f"python train.py resume={run}" in ended[0].text
    assert goes_on(out, tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_with_the_command_that_goes_on(tmp_path, rank):
    out, killed = tmp_path / "runs", []

    def kill(processes):
        os.kill(processes[rank], signal.SIGKILL)
        killed.append(time.monotonic())

    ended = together(long_run(out), tmp_path, during=once_it_trains(out, kill), seconds=180)
    assert time.monotonic() - killed[0] < 60
    assert ended[rank].code == -9 and ended[1 - rank].code == 1
    (run,) = out.glob("*/*")
    text = ended[1 - rank].text
    assert "another process of this training has ended" in text, text
    assert f"go on with python train.py resume={run}" in text or rank == 0
    assert goes_on(out, tmp_path / "again")


@pytest.mark.slow
def test_a_diverging_run_ends_on_all_processes(tmp_path, monkeypatch):
    """The gradient of one process's half of the batch is not finite."""
    original = EDM.loss

    def loss(self, batch):
        value, logs = original(self, batch)
        return value * (math.nan if self.global_step >= 3 and self.global_rank else 1), logs

    monkeypatch.setattr(EDM, "loss", loss)
    words = [*long_run(tmp_path / "runs"), "trainer.max_nonfinite=2"]
    ended = together(words, tmp_path, seconds=180)
    assert [process.code for process in ended] == [1, 1]
    assert all("start again from the last good checkpoint" in p.text for p in ended)
    monkeypatch.undo()
    assert goes_on(tmp_path / "runs", tmp_path / "again")


# One config of each method but EDM, which the tests above take.
DISTURBED = {
    "cdrl": "cdrl_digits",
    "gbm": "gbm_digits",
    "gedi": "gedi_moons",
    "noise2score": "noise2score_bsd400",
    "energy_matching": "energy_digits",
    "interpolant": "interpolant_toy",
    "meco": "meco_toy",
}


def slowed(monkeypatch, method, nan_from=math.inf):
    """Let each step take a tenth of a second; from a step on process 1 has a loss that is none."""
    original = METHODS[method].loss

    def loss(self, batch):
        time.sleep(0.1)
        value, logs = original(self, batch)
        bad = self.global_rank and self.global_step >= nan_from
        return value * math.nan if bad else value, logs

    monkeypatch.setattr(METHODS[method], "loss", loss)


@pytest.mark.slow
@pytest.mark.parametrize("method", DISTURBED)
def test_disturbed_it_resumes_to_what_it_would_have_been(method, pictures, tmp_path, monkeypatch):
    """A SIGTERM, then a kill: all end within a minute and the command printed goes on."""
    name = DISTURBED[method]
    words = [*shrunk(name, pictures), "trainer.max_steps=20", "trainer.devices=2"]

    def train_in(folder, act=None):
        during = act and once_it_trains(folder / "runs", act)
        return together(argv(name, folder / "runs", *words), folder, during=during, seconds=60)

    ended = train_in(tmp_path / "whole")
    assert [process.code for process in ended] == [0, 0], ended[0].text + ended[1].text
    (whole,) = (tmp_path / "whole/runs").glob("*/*")

    slowed(monkeypatch, method)
    folder = tmp_path / "cut"
    ended = train_in(folder, act=lambda p: os.kill(p[1], signal.SIGTERM))
    (run,) = (folder / "runs").glob("*/*")
    assert [process.code for process in ended] == [128 + signal.SIGTERM, 0], ended
    assert f"python train.py resume={run}" in ended[0].text
    stopped = read_checkpoint(run)["global_step"]
    assert 3 <= stopped < 17

    def kill(processes):
        os.kill(processes[1], signal.SIGKILL)

    further = once_it_trains(folder / "runs", kill, stopped + 2)
    ended = together([f"resume={run}"], folder, during=further, seconds=60)
    assert [process.code for process in ended] == [1, -9], ended
    assert f"go on with python train.py resume={run}" in ended[0].text
    monkeypatch.undo()
    assert read_checkpoint(run)["global_step"] < 20
    ended = together([f"resume={run}"], folder, seconds=60)
    assert [process.code for process in ended] == [0, 0], ended
    for key, value in weights(run).items():
        assert torch.equal(value, weights(whole)[key]), key
    if method == "gedi":  # its chains too
        entries = [read_checkpoint(folder)["replay"]["entries"] for folder in (run, whole)]
        assert torch.equal(*entries)


@pytest.mark.slow
@pytest.mark.parametrize("method", DISTURBED)
def test_a_diverging_process_ends_the_run_of_every_method(method, pictures, tmp_path, monkeypatch):
    slowed(monkeypatch, method, nan_from=3)
    words = [*shrunk(DISTURBED[method], pictures), "trainer.max_steps=20", "trainer.devices=2"]
    words = argv(DISTURBED[method], tmp_path / "runs", *words, "trainer.max_nonfinite=2")
    ended = together(words, tmp_path, seconds=60)
    assert [process.code for process in ended] == [1, 1], ended
    (run,) = (tmp_path / "runs").glob("*/*")
    for process in ended:
        assert "start again from the last good checkpoint" in process.text, process.text
        assert f"={run}" in process.text
    monkeypatch.undo()
    command = ended[0].text.split("checkpoint: python train.py ")[1].split("\n")[0].split()
    if not command[0].startswith("resume="):
        command.append(f"out_dir={tmp_path}/again")
    ended = together(command, tmp_path, seconds=60)
    assert [process.code for process in ended] == [0, 0], ended
