"""Model cards: read back by the hub's own library; and who can read the files of an export."""

import csv
import json
import math
import os
import shutil
import time

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from PIL import Image

import evaluate
import genmodels
from genmodels import checkpoint, cli
from genmodels.checkpoint import cards
from genmodels.checkpoint.diffusers import export_diffusers
from genmodels.checkpoint.exports import main as export_main
from genmodels.evaluation.report import write_report
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY

DIGITS = str(ROOT / "configs" / "edm_digits.yaml")


@pytest.fixture(scope="module")
def model():
    return genmodels.build(DIGITS, *TINY).eval()


def read(folder):
    """Return (header, text) of a folder's card, which the hub's library reads alike twice."""
    card = ModelCard.load(folder / "README.md")
    header = metadata_load(folder / "README.md")
    assert card.data.to_dict() == header
    return card, card.text


def test_the_header_is_as_the_hub_reads_it(tiny_run, tmp_path):
    folder = checkpoint.export(tiny_run, tmp_path / "digits", license="cc-by-4.0", samples=4)
    card, text = read(folder)
    assert card.data.to_dict() == {
        "library_name": "genmodels",
        "license": "cc-by-4.0",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["image-generation", "edm"],
    }
    assert "Licence of the model: cc-by-4.0." in text and 'genmodels.load("digits")' in text
    assert "![images of the seeds 0, 1, ...](samples.png)" in text
    made = np.array(Image.open(folder / "samples.png").convert("L"))
    cell = made.shape[0] // (2 * 9 + 1)  # four of 8x8 with a line between, enlarged
    first = genmodels.load(folder).sample([0])
    expected = ((first[0, 0] * 127.5 + 128).clamp(0, 255)).byte().numpy()
    assert np.array_equal(made[cell : 9 * cell : cell, cell : 9 * cell : cell], expected)


@pytest.mark.parametrize(
    ("scored", "trained", "type_of"),
    [
        ("digits:test", "digits", "digits"),
        ("mnist:test", "mnist", "ylecun/mnist"),
        ("cifar10:test", "mnist", "uoft-cs/cifar10"),
        ("BSD68", "cbsd400", "bsd68"),  # a folder of its own
        ("", "digits", "digits"),
    ],
)
def test_a_score_names_the_set_that_it_was_made_on(scored, trained, type_of):
    on_hub = "ylecun/mnist" if trained == "mnist" else ""
    assert cards._type_of(scored, on_hub, trained) == type_of


def test_without_a_licence_it_says_so_plainly(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "none")
    card, text = read(folder)
    assert "license" not in card.data.to_dict()
    assert "Licence of the model: none is stated; ask whoever made this model" in text
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_denoisers_and_points_have_tags_of_their_own():
    model = genmodels.load("noise2score_grey")
    card = cards.model_card(model, "noise2score_grey", None)
    assert "pipeline_tag: image-to-image" in card and "image-restoration" in card
    assert cards.sample_grid(model, 4) is None
    names = {"noisy": 0.2 * torch.randn(2, 1, 64, 64)}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert names["restored"].shape == (2, 1, 64, 64)
    toy = genmodels.build(str(ROOT / "configs" / "edm_digits.yaml"), *TINY)
    toy.shape = (2, 1, 1)
    assert "pipeline_tag" not in cards.model_card(toy, "toy", None)
    assert cards.sample_grid(toy, 4) is None


def test_steps_that_nobody_counted_are_not_claimed(model, tmp_path):
    _, text = read(model.save_pretrained(tmp_path / "fresh"))
    assert "an unknown number of steps of" in text and str(model.cfg.trainer.max_steps) not in text


def test_a_checkpoint_in_the_current_folder_is_exported(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_run / "checkpoints/last.ckpt", "own.ckpt")
    assert (genmodels.checkpoint.export("own.ckpt", "out") / "README.md").is_file()


def test_the_code_of_a_card_runs(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, text = read(model.save_pretrained("digits"))
    names = {}
    exec(text.split("```python\n")[1].split("```")[0].replace("16", "2"), names)
    assert names["images"].shape == (2, 1, 8, 8)


def test_a_model_that_makes_no_numbers_is_exported_without_a_grid(model, tmp_path, monkeypatch):
    nothing = torch.full((2, 1, 8, 8), torch.nan)
    monkeypatch.setattr(model, "sample", lambda *_, **__: nothing)
    with pytest.warns(UserWarning, match="samples=2: the card has no grid"):
        folder = model.save_pretrained(tmp_path / "broken", samples=2)
    assert "samples.png" not in (folder / "README.md").read_text()


def test_scores_of_a_training_are_the_latest_up_to_the_step(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.csv").write_text(
        "step,train/loss,eval/fd(digits)_100,eval/nn1_100\n"
        "5,1.0,,\n10,,3.5,0.75\n12,0.5,,\n20,,2.5,nan\n30,,1.5,0.5\n"
    )
    for path in (run, run / "checkpoints" / "step-00000025.ckpt"):
        assert cards.scores_of_run(path, 25, "digits") == [
            cards.Score("fd(digits)", 2.5, "digits:train", 100, note="in training, after step 20")
        ]
    assert len(cards.scores_of_run(run, 19, "digits")) == 2
    assert cards.scores_of_run(run, 9, "digits") == []
    assert cards.scores_of_run(tmp_path / "no" / "run.ckpt", 9, "digits") == []


def test_scores_of_an_evaluation_are_in_the_model_index(model, tmp_path):
    path = tmp_path / "scores.json"
    scores = {"fd": {"value": 2.25, "stderr": 0.125}, "nn1": {"value": 0.5}}
    scores["psnr"] = {"value": math.inf}  # of perfect pictures; the index takes numbers only
    words = {"data": f"{tmp_path}/secret/faces:test", "num": 500, "features": {"name": "pixels"}}
    write_report(path, scores, time.monotonic(), **words)
    folder = model.save_pretrained(tmp_path / "scored", scores=path)
    card, text = read(folder)
    assert card.data.model_name == "scored"
    found = [
        (r.task_type, r.dataset_name, r.dataset_split, r.metric_type, r.metric_name, r.metric_value)
        for r in card.data.eval_results
    ]
    same = ("unconditional-image-generation", "faces:test", "test")
    assert found == [
        (*same, "fd", "fd(pixels) of 500 images", 2.25),
        (*same, "nn1", "nn1(pixels) of 500 images", 0.5),
    ]
    assert (
        "| fd(pixels) of 500 images | 2.25 +- 0.12 | faces:test |" in text and "secret" not in text
    )


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "cannot be read"),
        ("{}", "is no JSON that evaluate.py wrote"),
        ("[1]", "is no JSON that evaluate.py wrote"),
        ('{"metrics": {"fd": 3}}', "is no JSON that evaluate.py wrote"),
        ("not json", "is no JSON that evaluate.py wrote"),
        ('{"sets": [], "metrics": {}}', "is of several sets"),
    ],
)
def test_other_files_are_no_scores(content, line, tiny_run, tmp_path, capsys):
    path, out = tmp_path / "scores.json", tmp_path / "out"
    if content is not None:
        path.write_text(content)
    assert cli.run(export_main, [str(tiny_run), f"out={out}", f"scores={path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: scores={path}: {line}") and error.count("\n") == 1
    assert not out.exists()


def test_known_data_sets_are_named_as_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = genmodels.build(DIGITS, *TINY).cfg.data
    assert cards._data_on_hub(cfg) == ""
    cfg.name = "cifar10"
    assert cards._data_on_hub(cfg) == "uoft-cs/cifar10"
    cfg.name, cfg.root = "hf", "someone/faces"
    assert cards._data_on_hub(cfg) == "someone/faces"
    (tmp_path / "someone" / "faces").mkdir(parents=True)  # a folder of one's own machine
    assert cards._data_on_hub(cfg) == ""


def test_a_grid_that_would_take_long_is_left_out_and_said(model, monkeypatch):
    class Slow:
        time = 0.0

        def monotonic(self):
            self.time += 10
            return self.time

    with pytest.warns(UserWarning, match="one image takes 10 s here.*samples=16 makes it all the"):
        monkeypatch.setattr(cards, "time", Slow())
        assert cards.sample_grid(model, -1) is None
    monkeypatch.undo()
    monkeypatch.setattr(cards, "_COUNT", 2)
    assert cards.sample_grid(model.train(), -1).startswith(b"\x89PNG") and model.training
    model.eval()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_exports_are_read_by_whom_the_umask_lets(model, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        ours = model.save_pretrained(tmp_path / "ours", samples=1)
        theirs = export_diffusers(ours, tmp_path / "theirs", license="mit")
    finally:
        os.umask(before)
    files = [path for folder in (ours, theirs) for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 8
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}
    assert metadata_load(theirs / "README.md") == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "license": "mit",
    }
    assert "Licence of the model: mit." in (theirs / "README.md").read_text()
    assert json.loads((theirs / "model_index.json").read_text())


@pytest.mark.slow
def test_scores_of_real_trainings_and_evaluations(train_tiny, tmp_path):
    """The names of columns and keys are what the programs write today."""
    words = ("eval.every=2", "eval.num=16", "eval.metrics=[nn1,fd]", "eval.features=digits")
    run = train_tiny(*words)
    card, text = read(checkpoint.export(run, tmp_path / "one"))
    with open(run / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("eval/nn1_16")]
    assert len(rows) == 2 and "in training, after step 4" in text
    found = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert found["nn1 of 16 images"] == float(rows[-1]["eval/nn1_16"]) and len(found) == 2
    out = tmp_path / "scores.json"
    words = ["data=digits:test", "num=16", "metrics=nn1,fd", "features=digits", f"out={out}"]
    assert evaluate.main([str(run), "device=cpu", *words]) == 0
    card, _ = read(checkpoint.export(run, tmp_path / "two", scores=out))
    scores = json.loads(out.read_text())["metrics"]
    assert {r.metric_value for r in card.data.eval_results} == {
        score["value"] for score in scores.values()
    }
    assert {r.dataset_name for r in card.data.eval_results} == {"digits:test"}
