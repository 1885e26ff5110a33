"""Looks at a model in training: refused before step 1, or survived if they fail later."""

import csv
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import train
from genmodels import generation, images
from genmodels.checkpoint import read_checkpoint
from genmodels.evaluation import passes
from genmodels.methods.edm import EDM
from tests.helpers.paths import ROOT
from tests.helpers.processes import together
from tests.helpers.runs import assert_same
from tests.helpers.tiny import TINY, last_words

WORDS = [
    str(ROOT / "configs/edm_digits.yaml"),
    str(ROOT / "configs/debug.yaml"),
    *TINY,
    "sample.every=0",
    "method.steps=1",
    "eval.num=8",
]


def argv(out, *words):
    return last_words([*WORDS, f"out_dir={out}", *words])


def last(run):
    return read_checkpoint(run / "checkpoints" / "last.ckpt")["current_model_state"]


def lines(run):
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "words, line",
    [
        (["eval.features=mnist"], "features=mnist takes images of shape (C,H,W) = (1, 28, 28)"),
        (["eval.num=3"], "eval.num=3: scores need at least 4 images on each side"),
        (["eval.metrics=kid_subsets"], "eval.metrics=kid_subsets: needs at least 1000 images"),
        (["eval.metrics=fd_inf"], "eval.metrics=fd_inf: needs more than 162 images for features"),
        (["eval.metrics=is"], "eval.metrics=is: eval.features=pixels gives no class scores"),
        (["eval.metrics=fid"], "eval.metrics=fid: is kept for eval.features=inception"),
    ],
    ids=["shape", "count", "least", "limit", "logits", "published"],
)
def test_scores_that_cannot_be_had_are_refused_before_step_1(tmp_path, capsys, words, line):
    assert train.main(argv(tmp_path / "runs", "eval.every=4", *words)) == 2
    said = capsys.readouterr()
    assert line in said.err and said.err.count("\n") == 1, said.err
    assert not (tmp_path / "runs").exists()


def test_scores_of_data_that_do_not_fit(tmp_path, capsys):
    """Moments too large for memory, and `memorised` without held-out images."""
    np.save(tmp_path / "x.npy", np.zeros((40, 8, 8, 1), np.uint8))
    words = ["data.name=npy", f"data.root={tmp_path}/x.npy", "data.holdout=0.1", "eval.every=1"]
    assert train.main(argv(tmp_path / "runs", *words, "eval.metrics=memorised")) == 2
    line = "eval.metrics=memorised: needs at least 20 held-out images, got 4"
    assert line in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_MEMORY", 8 * 36 * 64 - 1)
        assert train.main(argv(tmp_path / "runs", *words, "eval.metrics=fd")) == 2
    assert "features=pixels: the moments of 36 images in 64 dimensions" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_resumed_run_is_checked_before_it_is_touched(tiny_run, capsys):
    before = {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()}
    words = [f"resume={tiny_run}", "trainer.max_steps=8", "eval.every=1", "eval.features=mnist"]
    assert train.main(words) == 2
    assert "features=mnist takes images of shape" in capsys.readouterr().err
    now = {path: path.read_bytes() for path in tiny_run.rglob("*") if path.is_file()}
    assert now == before


def test_ddo_is_refused_before_its_first_round(tmp_path, tiny_run, capsys):
    words = [str(ROOT / "configs/ddo_digits.yaml"), str(ROOT / "configs/debug.yaml"), *TINY]
    words += [f"init={tiny_run}", "eval.features=mnist", f"out_dir={tmp_path}/runs"]
    assert train.main(last_words([*words, "optim.decay=none", "eval.num=8"])) == 2
    said = capsys.readouterr().err
    assert "features=mnist takes images of shape" in said and said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.png")


def test_a_look_that_fails_ends_no_training(train_tiny, monkeypatch, capsys):
    """A full disk for pictures, and images that are no numbers: each said once, and survived."""
    words = ("trainer.max_steps=4", "network.dropout=0.2", "method.steps=1")
    plain = train_tiny(*words)
    monkeypatch.setattr(images, "write_png", full)
    original = EDM.sample

    def poisoned(self, seeds, *rest, **options):
        made = original(self, seeds, *rest, **options)
        return made * (float("nan") if len(seeds) == 8 and self.shape else 1)

    monkeypatch.setattr(EDM, "sample", poisoned)
    capsys.readouterr()
    looked = train_tiny(*words, "sample.every=1", "eval.every=1", "eval.num=8")
    said = capsys.readouterr().err
    assert said.count("sample.every=1: no grid of step 1 ([Errno 28] No space left on device") == 1
    assert said.count("eval.every=1: no scores of step 1 (seeds ") == 1
    assert (
        said.count("\n") == 2 and "the model made non-finite images); the training goes on" in said
    )
    before, after = last(plain), last(looked)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert "eval/fd_8" not in lines(looked)[0] and not list((looked / "samples").iterdir())


def test_scores_come_back_when_the_trouble_is_over(train_tiny, monkeypatch, capsys):
    original, calls = generation.generate, []

    def full_memory_once(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(*args, **options)

    monkeypatch.setattr(generation, "generate", full_memory_once)
    words = ("trainer.max_steps=3", "eval.every=1", "eval.num=8", "method.steps=1")
    capsys.readouterr()
    run = train_tiny(*words)
    assert "no scores of step 1 (CUDA out of memory" in capsys.readouterr().err
    assert [bool(row["eval/fd_8"]) for row in lines(run)] == [False, True, True]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_all_processes_survive_the_trouble_of_one(tmp_path, monkeypatch, rank):
    """A grid and scores fail on one process alone; nobody waits for it for ever."""
    original = EDM.sample

    def poisoned(self, seeds, *rest, **options):
        if int(os.environ["RANK"]) == rank:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return original(self, seeds, *rest, **options)

    monkeypatch.setattr(EDM, "sample", poisoned)
    words = ["trainer.devices=2", "trainer.max_steps=3", "sample.every=1", "eval.every=2"]
    ended = together(argv(tmp_path / "runs", *words), tmp_path, seconds=120)
    assert [process.code for process in ended] == [0, 0], ended
    text = ended[0].text
    assert text.count("no grid of step 1 (") == text.count("no scores of step 2 (") == 1, text
    whose = f"process {rank}: ValueError: " if rank else ""
    assert f"({whose}batch=64: does not fit into memory)" in text
    assert "note" not in ended[1].text
    (run,) = (tmp_path / "runs").glob("*/*")
    assert read_checkpoint(run)["global_step"] == 3
    assert "2 processes" in (run / "report.html").read_text()


def test_refused_scores_end_all_processes(tmp_path):
    words = ["trainer.devices=2", "eval.every=2", "eval.features=mnist"]
    ended = together(argv(tmp_path / "runs", *words), tmp_path, seconds=120)
    assert [process.code for process in ended] == [2, 2], ended
    assert not (tmp_path / "runs").exists()


def test_every_config_draws_pictures_now_and_then():
    """The first at step 100, the last at the end or near it."""
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        if path.name != "debug.yaml":
            cfg = yaml.safe_load(path.read_text())
            every, steps = cfg["sample"]["every"], cfg["trainer"]["max_steps"]
            assert 100 < every <= steps, path
            assert steps % every == 0 or steps > 100_000, path


SMALL = {
    "edm2_digits": ["network.channels=32", "method.steps=1"],
    "gbm_digits": ["network.channels=[16,16]", "network.head_dim=16", "network.norm_groups=8"],
    "cdrl_digits": ["network.width=16", "method.steps=2"],
    "energy_digits": ["network.width=16", "method.steps=3", "method.chain_steps=2"],
    "gedi_circles": ["network.width=16", "method.steps=2", "method.buffer=8"],
    "gedi_moons": ["network.width=16", "method.start=buffer", "method.buffer=8"],
    "noise2score_bsd400": ["network.channels=[8,8]", "network.blocks=[1,1]", "data.patch=16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_pictures_change_no_training_of_any_method(name, tmp_path):
    """Weights, optimizer and buffers after six steps, with and without a grid after each."""
    (tmp_path / "pictures").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 1, 40, 40), dtype=np.uint8)
    for k, picture in enumerate(torch.from_numpy(pixels)):
        images.write_png(tmp_path / "pictures" / f"{k}.png", picture)
    words = [str(ROOT / f"configs/{name}.yaml"), str(ROOT / "configs/debug.yaml"), *SMALL[name]]
    words += ["trainer.max_steps=6", "trainer.progress=false"]
    if name.startswith("noise2score"):
        words += ["data.name=imagefolder", f"data.root={tmp_path}/pictures"]
    saved = []
    for every in (0, 1):
        out = tmp_path / f"every-{every}"
        assert train.main(last_words([*words, f"sample.every={every}", f"out_dir={out}"])) == 0
        (run,) = out.glob("*/*")
        assert len(list((run / "samples").iterdir())) == 6 * every
        found = read_checkpoint(run)
        del found["hyper_parameters"], found["callbacks"]
        saved.append(found)
    assert_same(*saved)


@pytest.fixture
def told_scores(monkeypatch):
    """Scores on the way that are made up: {step: fd}."""

    def tell(values):
        def score(self, source, seed=0, **options):
            return {next(iter(self.metrics)): {"value": values[calls.pop(0)]}}

        calls = list(values)
        monkeypatch.setattr("genmodels.evaluation.scorer.Scorer.__call__", score)

    return tell


BEST = ["eval.every=2", "eval.metrics=fd", "checkpoint.every=5", "checkpoint.keep=1"]


def test_the_checkpoint_with_the_best_score_stays(tmp_path, capsys, told_scores):
    told_scores({2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5})
    words = [*BEST, "checkpoint.best=eval/fd", "trainer.max_steps=9"]
    assert train.main(argv(tmp_path, *words)) == 0
    out = capsys.readouterr().out
    run = out.rstrip().rpartition("run: ")[2]
    best = f"{run}/checkpoints/best.ckpt"
    assert read_checkpoint(best)["global_step"] == 4 and f"fd 3 at step 4: {best}" in out
    names = sorted(path.name for path in Path(run, "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", "step-00000009.ckpt"]
    # Nothing else of the training changes.
    told_scores({2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5})
    assert train.main(argv(tmp_path / "plain", *BEST, "trainer.max_steps=9")) == 0
    plain = capsys.readouterr().out.rstrip().rpartition("run: ")[2]
    ours, theirs = (read_checkpoint(f"{r}/checkpoints/last.ckpt") for r in (run, plain))
    assert_same(ours["current_model_state"], theirs["current_model_state"])


def test_a_resumed_run_knows_the_best_score_so_far(tmp_path, capsys, told_scores):
    told_scores({2: 5.0, 4: 3.0})
    words = [*BEST, "checkpoint.best=eval/fd", "checkpoint.every=2"]
    assert train.main(argv(tmp_path, *words, "trainer.max_steps=4")) == 0
    run = capsys.readouterr().out.rstrip().rpartition("run: ")[2]
    best = f"{run}/checkpoints/best.ckpt"
    Path(best).unlink()  # as of a kill between the checkpoint and its second name
    told_scores({6: 4.0, 8: 2.0, 10: 2.5})
    assert train.main([f"resume={run}", "trainer.max_steps=6"]) == 0
    assert read_checkpoint(best)["global_step"] == 4
    assert train.main([f"resume={run}", "trainer.max_steps=10"]) == 0
    assert read_checkpoint(best)["global_step"] == 8
    assert "best: fd 2 at step 8" in capsys.readouterr().out
    told_scores({12: 9.0})  # by another score the search begins anew
    words = ["trainer.max_steps=12", "checkpoint.best=eval/kid", "eval.metrics=kid"]
    assert train.main([f"resume={run}", *words]) == 0
    assert read_checkpoint(best)["global_step"] == 12


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["checkpoint.best=eval/fd"], "checkpoint.best=eval/fd: needs scores on the way"),
        (["checkpoint.best=eval/kid", *BEST[:2]], "checkpoint.best=eval/kid: is not measured"),
        (["checkpoint.best=val/loss", *BEST[:2]], "checkpoint.best=val/loss: choose from eval/fd"),
    ],
)
def test_a_best_that_no_score_can_choose_is_refused(tmp_path, capsys, words, line):
    assert train.main(argv(tmp_path / "runs", *words)) == 2
    assert line in capsys.readouterr().err and not (tmp_path / "runs").exists()
