import json

import numpy as np
import pytest
import torch
from conftest import ROOT

import evaluate
import genmodels
from benchmarks import demo
from genmodels import images, scoring
from genmodels.config import DataConfig
from genmodels.data import load_split
from genmodels.metrics.frechet import Moments, frechet_distance


@pytest.fixture(scope="module")
def digits():
    return tuple(load_split(DataConfig(), split)[0] for split in ("train", "test"))


def scores(argv, tmp_path):
    assert evaluate.main([*argv, f"out={tmp_path}/r.json"]) == 0
    return json.loads((tmp_path / "r.json").read_text())


def test_model_against_held_out_digits(tiny_run, tmp_path, digits):
    words = [str(tiny_run), "data=digits:test", "metrics=nn1,fd,memorised", "features=digits",
             "steps=3", "num=40", "resamples=5"]  # fmt: skip
    report = scores(words, tmp_path)
    assert set(report["metrics"]) == {"nn1", "fd", "memorised"}
    assert all(set(score) == {"value", "stderr"} for score in report["metrics"].values())
    assert report["num"] == 40 and report["reference_num"] == 360 and report["seed"] == 0
    assert report["features"]["name"] == "digits" and len(report["features"]["sha256"]) == 64
    assert report["versions"]["torch"] == torch.__version__
    assert report["device"] == "cpu" or torch.cuda.is_available()
    assert report["options"] == {
        "data": "digits:test", "metrics": ["nn1", "fd", "memorised"], "features": "digits",
        "steps": 3, "num": 40, "resamples": 5,
    }  # fmt: skip
    # The same number from the pieces, with numpy's moments in place of ours.
    from genmodels.metrics.features import extract, load_features

    generated = images.to_uint8(genmodels.load(tiny_run).sample(range(40), steps=3))
    features = load_features("digits")
    sides = [extract(features, pictures).double().numpy() for pictures in (generated, digits[1])]
    moments = [
        Moments.from_stats(torch.tensor(x.mean(0)), torch.tensor(np.cov(x.T)), len(x))
        for x in sides
    ]
    expected = float(frechet_distance(*moments))
    assert report["metrics"]["fd"]["value"] == pytest.approx(expected, rel=1e-8)


def test_images_against_reference_in_every_form(tmp_path, digits):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, picture in enumerate(digits[0][:50]):
        images.write_png(folder / f"{i:03d}.png", picture)
    images.write_npz(tmp_path / "a.npz", images=digits[0][:50].permute(0, 2, 3, 1).numpy())
    words = ["reference=digits:test", "metrics=nn1,fd", "features=digits", "resamples=0"]
    first = scores([f"images={folder}", *words], tmp_path)
    second = scores([f"images={tmp_path}/a.npz", *words], tmp_path)
    assert first["metrics"] == second["metrics"]
    swapped = scores(
        ["images=digits:test", f"reference={folder}", "metrics=fd", "features=digits",
         "resamples=0"], tmp_path
    )  # fmt: skip
    assert swapped["metrics"]["fd"]["value"] == pytest.approx(first["metrics"]["fd"]["value"])


def test_the_batch_changes_no_number(tiny_run, tmp_path):
    words = [str(tiny_run), "data=digits:test", "metrics=fd", "features=digits", "steps=2",
             "num=20", "resamples=0"]  # fmt: skip
    assert scores([*words, "batch=7"], tmp_path)["metrics"] == scores(words, tmp_path)["metrics"]


def test_real_digits_score_as_real_and_a_gaussian_does_not(digits):
    """The demo's controls: training digits at the floor, the pixels' Gaussian far from it."""
    scorer = scoring.Scorer(["nn1", "fd"], "digits", reference=digits[1], equal=True)
    real = scorer(digits[0])
    fake = scorer(demo.gaussian_twin(digits[0], 720))
    assert abs(real["nn1"]["value"] - 0.5) < 0.05 and fake["nn1"]["value"] > 0.85
    assert fake["fd"]["value"] > 5 * real["fd"]["value"]


def test_both_sides_of_nn1_see_noise_that_nn1_itself_passes(digits):
    """Digits under heavy noise: every real one is known, no fake one is, and the mean says 0.55."""
    noise = 100 * torch.randn(360, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = (digits[0][:360] + noise).round().clip(0, 255).to(torch.uint8)
    names = ["nn1", "nn1_fake", "nn1_real"]
    scorer = scoring.Scorer(names, "pixels", reference=digits[1])
    mean, fake, real = (scorer(noisy)[name]["value"] for name in names)
    assert mean == pytest.approx((fake + real) / 2) and mean < 0.58
    assert fake < 0.15 and real > 0.95


def test_the_order_of_files_does_not_bias_nn1(digits):
    """Fewer images than the reference, and the reference sorted by class as folders are."""
    labels = load_split(DataConfig(), "train")[1]
    by_class = digits[0][labels.argsort(stable=True)]
    for reference in (digits[0], by_class):
        scorer = scoring.Scorer(["nn1"], "digits", reference=reference)
        assert abs(scorer(digits[1][:300])["nn1"]["value"] - 0.5) < 0.07


def test_memorised_knows_a_copy(digits):
    scorer = scoring.Scorer(
        ["memorised"], "pixels", reference=digits[1], train=digits[0], held_out=digits[1]
    )
    assert scorer(digits[0][:100])["memorised"]["value"] == 1
    assert scorer(digits[1])["memorised"]["value"] == pytest.approx(0.05)


def test_equal_takes_the_mean_over_blocks(digits):
    small = digits[1][:100]
    scorer = scoring.Scorer(["fd"], "digits", reference=small, equal=True)
    together = scorer(digits[0][:300])["fd"]["value"]
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    apart = [scorer(digits[0][order[i : i + 100]])["fd"]["value"] for i in (0, 100, 200)]
    assert together == pytest.approx(np.mean(apart))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["metrics=fdd"], "metrics=fdd: choose from fd"),
        (["features=inceptoin"], "features"),
        (["data=digits:val"], "split=val: choose from train, test"),
        (["data=digit"], "digit: no such folder, .zip or .npz"),
        (["num=1"], "num=1: scores need at least 4"),
        (["out=no/such/folder/r.json"], "out=no/such/folder/r.json: its folder does not exist"),
        (["metric=fd"], "unknown key metric=fd: did you mean metrics?"),
        (["resamples=x"], "resamples=x: must be a whole number"),
        (["resamples=1"], "resamples=1: must be >= 2, or 0 for no error bars"),
        (["resamples=-3"], "resamples=-3: must be >= 2"),
        (["out=."], "out=.: is a folder; name a file in it"),
        (["plot=."], "plot=.: is a folder"),
        (["device=cuda"], "device=cuda: torch finds no such device here; write auto"),
        (["noise=cuda"], "noise=cuda: torch finds no such device here; write cpu"),
        (["noise=tpu"], "noise=tpu: choose from cpu, cuda, mps"),
        (["pad=1"], "data=digits: has images of shape (1, 10, 10), the model makes (1, 8, 8)"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words, message, tiny_run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if words != ["num=1"]:  # all else is refused before the work
        monkeypatch.setattr(evaluate.scoring, "Scorer", None)
    assert evaluate.main([str(tiny_run), "steps=1", "num=4", "resamples=0", *words]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_bad_images_are_one_line_and_exit_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    images.write_png(mixed / "a.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
    images.write_png(mixed / "b.png", torch.zeros(1, 9, 8, dtype=torch.uint8))
    large = tmp_path / "large.npz"
    images.write_npz(large, images=np.zeros((9, 16, 16, 1), np.uint8))
    half = tmp_path / "half.zip"
    half.write_bytes(b"PK\x03\x04 half a zip")
    for name, message in (
        (half, "half.zip: cannot be read"),
        (tmp_path / "empty", "holds no picture"),
        (mixed, "mixed sizes"),
        (tmp_path / "none", "no such folder"),
        (large, "features=digits takes images of shape"),
    ):
        words = [f"images={name}", "reference=digits:test", "features=digits", "resamples=0"]
        assert evaluate.main(words) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1, errors
    assert evaluate.main(["metrics=fd"]) == 2
    assert "give a MODEL and data=, or images= and reference=" in capsys.readouterr().err


def test_demo_writes_its_pictures_and_report(tmp_path, monkeypatch, capsys):
    """The real demo with two steps of training and fewer images."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "BLOCKS", 1)
    words = [f"out={tmp_path}", "trainer.max_steps=2", "data.batch_size=8", "method.steps=2",
             "network.channels=[16,16]", "network.norm_groups=8", "network.head_dim=8"]  # fmt: skip
    assert demo.main(words) == 0
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert set(report["rows"]) == {"EDM (ours)", "real training digits", "Gaussian of the pixels"}
    text = (tmp_path / "report.md").read_text()
    for row, row_scores in report["rows"].items():
        assert row in text and len(row_scores) == 6
    assert images.read_image(tmp_path / "samples.png").shape[-2:] == (91 * 5, 185 * 5)
    assert "EDM (ours)" in capsys.readouterr().out
