"""Files of older versions load, give the same images and go on training; old words are still known.

What lies in tests/fixtures/old was made by the code of commit 16f413c, in v0_1_0 beside it by that
of 0.1.0; neither is ever made anew: where a test here fails, the code has to learn to read it. The
README.md there tells what is what.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.helpers import old_words
from tests.helpers.old_words import LATER, METHODS, MORE, OLD, SAMPLED, STEPS, command, done

LAYOUT = json.loads((OLD / "layout.json").read_text())
WORDS = json.loads((OLD / "help_words.json").read_text())
CONFIGS = json.loads((OLD / "configs.json").read_text())

# Values of the configs that were changed on purpose: {(config, key): the value today}.
# What EDM's data and weights were made with is Pillow's Lanczos filter.
CHANGED = {
    ("edm_imagenet64.yaml", "data.crop"): "lanczos",
    ("edm_ffhq64.yaml", "data.crop"): "lanczos",
    ("ddo_imagenet64.yaml", "data.crop"): "lanczos",
    ("ddo_imagenet64.yaml", "name"): "ddo_imagenet64_adm",
    # DDO as published: rounds twice as long, with them warm-up and EMA; the grids of the search.
    ("ddo_cifar10.yaml", "trainer.max_steps"): 2930,
    ("ddo_cifar10.yaml", "optim.rampup"): 1500000,
    ("ddo_cifar10.yaml", "ema.half_life"): 250000.0,
    ("ddo_cifar10.yaml", "method.alphas"): [0.5, 1.0, 2.0, 4.0, 6.0],
    ("ddo_cifar10.yaml", "method.betas"): [0.01, 0.02, 0.05, 0.1],
    ("ddo_cifar10.yaml", "method.beta_unit"): "sum",
    ("ddo_imagenet64.yaml", "trainer.max_steps"): 12500,
    ("ddo_imagenet64.yaml", "optim.decay"): "sqrt",
    ("ddo_imagenet64.yaml", "ema.half_life"): 500_000.0,
    ("ddo_imagenet64.yaml", "ema.rampup"): 0.05,
    ("ddo_imagenet64.yaml", "method.alphas"): [0.5, 1.0, 2.0, 4.0, 6.0],
    ("ddo_imagenet64.yaml", "method.betas"): [0.01, 0.02, 0.05, 0.1],
    ("ddo_imagenet64.yaml", "method.beta_unit"): "sum",
    # CDRL and DRL as their released codes: fp32, torch_ema's ramp, DRL without a last denoising.
    ("cdrl_cifar10.yaml", "trainer.precision"): "32-true",
    ("cdrl_cifar10.yaml", "ema.rampup"): 0.077,
    ("cdrl_imagenet32.yaml", "trainer.precision"): "32-true",
    ("cdrl_imagenet32.yaml", "ema.rampup"): 0.077,
    ("drl_cifar10.yaml", "network.kind"): "drl_released",
    ("drl_cifar10.yaml", "method.tweedie_scale"): 0.0,
    # GEDI's samples are the buffer's old chains, where there is a buffer.
    **{
        (f"gedi_{name}.yaml", "method.start"): "auto"
        for name in ("mnist", "mnist_cpu", "svhn", "cifar10", "cifar100")
    },
    ("gedi_mnist_cpu.yaml", "trainer.max_steps"): 3000,  # lr to the end, and an average
    ("gedi_mnist_cpu.yaml", "optim.decay"): "none",
    ("gedi_mnist_cpu.yaml", "ema.half_life"): 25600.0,
    # The same proportions for small sets, in no more steps.
    ("ddo_digits.yaml", "trainer.max_steps"): 200,
    ("ddo_digits.yaml", "optim.lr"): 1.5e-3,
    ("ddo_digits.yaml", "optim.rampup"): 25600,
    ("ddo_digits.yaml", "ema.half_life"): 4300.0,
    ("ddo_digits.yaml", "method.betas"): [30.0, 60.0],
    ("ddo_fashion.yaml", "trainer.max_steps"): 200,
    ("ddo_fashion.yaml", "optim.lr"): 3e-4,
    ("ddo_fashion.yaml", "optim.rampup"): 12800,
    ("ddo_fashion.yaml", "ema.half_life"): 2100.0,
    ("ddo_fashion.yaml", "method.betas"): [30.0, 60.0],
    # Every config draws pictures while it trains: early, and then at 2 % of the time.
    ("cdrl_digits.yaml", "sample.every"): 500,
    ("cdrl_toy.yaml", "sample.every"): 650,
    ("cdrl_toy.yaml", "sample.num"): 200,
    ("ddo_cifar10.yaml", "sample.every"): 1465,
    ("ddo_digits.yaml", "sample.every"): 200,
    ("ddo_digits.yaml", "sample.num"): 40,
    ("ddo_fashion.yaml", "sample.every"): 200,
    ("ddo_fashion.yaml", "sample.num"): 40,
    ("ddo_imagenet64.yaml", "sample.every"): 2500,
    ("edm_digits.yaml", "sample.every"): 500,
    ("gbm_digits.yaml", "sample.every"): 750,
    ("gbm_digits.yaml", "sample.num"): 40,
    ("gbm_fashion.yaml", "sample.every"): 600,
    ("gbm_fashion.yaml", "sample.num"): 10,
    ("gbm_mnist.yaml", "sample.every"): 600,
    ("gbm_mnist.yaml", "sample.num"): 10,
    ("gedi_addition.yaml", "sample.every"): 800,
    ("gedi_addition.yaml", "sample.num"): 20,
    ("gedi_circles.yaml", "sample.every"): 3500,
    ("gedi_circles.yaml", "sample.num"): 200,
    ("gedi_mnist_cpu.yaml", "sample.every"): 500,
    ("gedi_moons.yaml", "sample.every"): 3500,
    ("gedi_moons.yaml", "sample.num"): 200,
    ("noise2score_bsd400.yaml", "sample.every"): 860,
    ("noise2score_cbsd400.yaml", "sample.every"): 860,
    ("noise2score_published.yaml", "sample.every"): 1000,
}
# Configs that have another name today.
RENAMED = {"ddo_imagenet64.yaml": "ddo_imagenet64_adm.yaml"}

# How near a resumed run has to come to that of the old code: steps of Adam amplify rounding.
NEAR = {"rtol": 1e-2, "atol": 1e-2}


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the old files, the working directory; paths in them are relative to it."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    last = folder / "ddo/run/checkpoints/last.ckpt"
    last.parent.mkdir(exist_ok=True)
    shutil.copy(folder / "ddo/run/round-01/winner.ckpt", last)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("GENMODELS_DATA", raising=False)
    return folder


def expected(method):
    return dict(np.load(OLD / method / "expected.npz"))


def close(found, wanted, rtol=1e-4, atol=1e-4):
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------------
# Runs and exports


@pytest.mark.parametrize("method", METHODS)
def test_run_and_export_load_and_agree(old, method):
    run, export = (old_words.load(old / method / kind) for kind in ("run", "export"))
    assert run.cfg.method.name == export.cfg.method.name == method
    first, second = run.state_dict(), export.state_dict()
    assert first.keys() == second.keys() and len(first) > 5
    for key in first:
        assert torch.equal(first[key], second[key]), key
    file = old_words.load(old / method / "run/checkpoints/last.ckpt").state_dict()
    assert all(torch.equal(first[key], file[key]) for key in first)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_images(old, method):
    wanted = expected(method)
    for kind in ("run", "export"):
        model = old_words.load(old / method / kind)
        made = old_words.outputs(model, method, old, buffer=kind == "run")
        others = {"raw", "losses", "resumed", "resumed_buffer"} | (
            {"buffer"} if kind == "export" else set()
        )
        assert made.keys() == wanted.keys() - others
        for name, value in made.items():
            close(value, wanted[name])
    raw = old_words.load(old / method / "run", ema=False)
    close(old_words.outputs(raw, method, old)["images"], wanted["raw"])
    assert np.abs(wanted["images"] - wanted["raw"]).max() > 1e-3  # or nothing was told apart


@pytest.mark.parametrize("name", LATER)
def test_later_methods_load_and_draw_the_same(name):
    folder = OLD.parent / "v0_1_0" / name
    wanted = dict(np.load(folder / "expected.npz"))
    for kind in ("run", "export"):
        close(old_words.load(folder / kind).sample(range(4), **LATER[name]), wanted["images"])
    raw = old_words.load(folder / "run", ema=False)
    close(raw.sample(range(4), **LATER[name]), wanted["raw"])
    if name != "edm2":  # whose average of two steps is the second one
        assert np.abs(wanted["images"] - wanted["raw"]).max() > 1e-3  # or nothing was told apart


@pytest.mark.slow
@pytest.mark.parametrize("name", LATER)
def test_later_methods_go_on(name, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(OLD.parent / "v0_1_0" / name, tmp_path, dirs_exist_ok=True)
    done("train.py", f"resume={run}", f"trainer.max_steps={MORE}")
    wanted = dict(np.load(tmp_path / "expected.npz"))
    close(old_words.losses(run), wanted["losses"], **NEAR)
    close(old_words.drawn(run, name)["images"], wanted["resumed"], **NEAR)


def test_the_same_images_of_the_other_network(old):
    model = old_words.load(old / "edm_unet/export")
    close(old_words.outputs(model, "edm", old)["images"], expected("edm_unet")["images"])


@pytest.mark.parametrize("method", SAMPLED)
def test_sampling_by_command(old, method):
    options = {
        key: ",".join(map(str, value)) if key == "labels" else value
        for key, value in SAMPLED[method].items()
    }
    words = [f"{key}={value}" for key, value in options.items()]
    done("sample.py", old / method / "run", "num=4", *words, "format=npz", "out=made", "device=cpu")
    with np.load(old / "made/images.npz") as file:
        pixels, seeds, labels = file["images"], file["seeds"], file["labels"]
    wanted = expected(method)["images"].clip(-1, 1).transpose(0, 2, 3, 1)
    assert pixels.dtype == np.uint8 and np.abs(pixels / 127.5 - 1 - wanted).max() < 1.01 / 127.5
    assert seeds.tolist() == [0, 1, 2, 3]
    assert labels.tolist() == SAMPLED[method].get("labels", [-1] * 4)


def test_restoring_by_command(old):
    done(
        "sample.py",
        old / "noise2score/run",
        "denoise=noisy.npy",
        "law=gaussian",
        "level=25",
        "out=made",
        "device=cpu",
    )
    # Floats are not clipped any more.
    found = (np.load(old / "made/noisy.npy") / 127.5 - 1).clip(-1, 1)
    close(found, expected("noise2score")["images"][0, 0], atol=5e-4)


@pytest.mark.filterwarnings("ignore:a Frechet distance from 32 images")
@pytest.mark.parametrize("method", METHODS)
def test_an_unfinished_run_goes_on(old, method):
    run, wanted = old / method / "run", expected(method)
    before = (run / "metrics.csv").read_text().splitlines()
    words = () if method == "ddo" else (f"trainer.max_steps={MORE}",)
    done("train.py", f"resume={run}", *words)
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    after = (run / "metrics.csv").read_text().splitlines()
    assert set(before[0].split(",")) <= set(after[0].split(","))
    if before[0] == after[0]:
        assert set(before) <= set(after)
    close(old_words.losses(run), wanted["losses"], **NEAR)
    assert set(LAYOUT["files"][f"{method} run, resumed"]) <= set(old_words.tree(run))
    if method == "ddo":  # two rounds of two candidates, each scored at steps 0, 2, 4 and 6
        states = [json.loads((run / f"round-0{k}/state.json").read_text()) for k in (1, 2)]
        assert all(state["winner"] for state in states) and len(after) == 1 + 2 * 2 * 4
        return
    assert last["global_step"] == MORE and len(after) == 1 + MORE > len(before) == 1 + STEPS
    model = old_words.load(run)
    made = old_words.outputs(model, method, old, buffer=True)
    close(made["images"], wanted["resumed"], rtol=0, atol=0.02)
    if method == "gedi":
        close(made["buffer"], wanted["resumed_buffer"], rtol=0, atol=0.02)


def test_training_starts_from_an_old_model(old, capsys):
    words = ("optim.lr=1e-9", "trainer.max_steps=1", "name=again")
    for kind in ("run", "export"):
        done("train.py", "edm/run/config.yaml", f"init=edm/{kind}", f"out_dir={kind}", *words)
        (run,) = (old / kind / "again").iterdir()
        made = old_words.outputs(old_words.load(run), "edm", old)
        close(made["images"], expected("edm")["images"])


def test_old_statistics_are_read(old):
    (old / "made").mkdir()
    report = old_words.evaluated(old, old / "made", kinds=("images",))["images"]
    assert report["metrics"]["fd"]["value"] == pytest.approx(LAYOUT["scores"]["fd"], rel=1e-3)


# ------------------------------------------------------------------------------------------------
# What commands leave


@pytest.mark.parametrize("kind", ["png", "npz", "cluster", "inpaint", "denoise", "export"])
def test_files_of_sampling_and_export(sampled_files, kind):
    assert set(LAYOUT["files"][kind]) <= set(sampled_files[kind])


@pytest.fixture(scope="module")
def sampled_files(tmp_path_factory):
    return old_words.sampled(OLD, tmp_path_factory.mktemp("sampled"))


@pytest.mark.parametrize("kind", LAYOUT["json"])
def test_keys_of_evaluations(tmp_path, kind):
    found = old_words.keys_of(old_words.evaluated(OLD, tmp_path, kinds=(kind,)))[kind]
    for part, names in LAYOUT["json"][kind].items():
        assert set(names) <= set(found[part]), part


# ------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize("name", WORDS["help"])
def test_help_still_lists(name):
    text = old_words.help_of(name)
    assert [word for word in WORDS["help"][name] if not old_words.says(text, word)] == []


@pytest.mark.parametrize("what", WORDS["choices"])
def test_choices_are_still_offered(old, what):
    offered = old_words.choices(*old_words.refusals(old)[what])
    assert [word for word in WORDS["choices"][what] if word not in offered] == []


def test_modules_are_commands_of_their_own():
    code, said = command("genmodels.data", "info", "digits")
    assert code == 0 and "1797" not in said and "1437" in said
    assert command("genmodels.checkpoint", "nowhere", "out=made")[0] == 2


@pytest.mark.parametrize("names", CONFIGS)
def test_configs_resolve_to_what_they_were(names, monkeypatch):
    monkeypatch.delenv("GENMODELS_DATA", raising=False)
    found, wanted = flat(old_words.resolved(RENAMED.get(names, names))), flat(CONFIGS[names])
    assert wanted.keys() - found.keys() == set()
    wanted |= {key: value for (config, key), value in CHANGED.items() if config == names}
    assert {key: found[key] for key in wanted if found[key] != wanted[key]} == {}


def flat(plain, prefix=""):
    rows = {}
    for key, value in plain.items():
        nested = isinstance(value, dict)
        rows |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return rows
