"""The user's mistakes in evaluate.py: one line, exit code 2, nothing written."""

import numpy as np
import pytest
import torch

import evaluate
from genmodels import images


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
        (["plot=p.png", "metrics=kid"], "plot=p.png: nothing to draw; add metrics=fd or prc"),
        (["metrics="], "metrics=: name some of fd, "),
        (["feature_batch=-3"], "feature_batch=-3: must be >= 0"),
        (["seed=-1"], "seed=-1: must be >= 0"),
        (["pad=-7"], "pad=-7: must be >= -1"),
        (["batch=0"], "batch=0: must be >= 1"),
        (["sha256=abcdabcd"], "sha256=abcdabcd: features=pixels has no weights"),
        (["equal=true", "metrics=nn1"], "equal=true: changes metrics=fd only"),
        (["data=digits", "reference=digits"], "data=digits: reference= takes its place"),
        (["pad=1"], "data=digits: has images of shape (1, 10, 10), the model makes (1, 8, 8)"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words, message, tiny_run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if words != ["num=1"]:  # all else is refused before the work
        monkeypatch.setattr("genmodels.evaluation.scorer.Scorer", None)
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


def test_too_few_for_a_limit_is_told_before_the_work(tiny_run, tmp_path, capsys, monkeypatch):
    """The dimension of pixels is known once the reference has been read; then fd goes on."""
    monkeypatch.setattr("genmodels.generation.generate", None)
    words = [str(tiny_run), "steps=1", "num=150", f"out={tmp_path}/r.json"]
    assert evaluate.main([*words, "metrics=fd_inf"]) == 2
    assert "needs more than 162 images for features of dimension 64" in capsys.readouterr().err
    monkeypatch.undo()
    assert evaluate.main([*words, "metrics=fd"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_pixels_of_two_shapes_are_told_before_the_work(tmp_path, capsys):
    images.write_npz(tmp_path / "a.npz", images=np.zeros((9, 16, 16, 1), np.uint8))
    words = [f"images={tmp_path}/a.npz", "reference=digits:test", f"out={tmp_path}/r.json"]
    assert evaluate.main(words) == 2
    assert "(1, 16, 16), the reference (1, 8, 8): features=pixels" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_features_that_fail_are_one_line_and_exit_2(tmp_path, capsys, digits):
    class Spoiled(torch.nn.Module):
        def forward(self, pictures):
            rows = pictures.flatten(1).float()
            return torch.where(rows.sum(1, keepdim=True) > 6_000, torch.nan, rows)

    torch.jit.script(Spoiled()).save(str(tmp_path / "spoiled.pt"))
    one = tmp_path / "one.npz"
    images.write_npz(one, images=digits[0][:1].permute(0, 2, 3, 1).numpy())
    (tmp_path / "bad.safetensors").write_bytes(b"not the weights")
    real = ["images=digits:test", "reference=digits:train"]
    for words, message in (
        ([*real, f"features={tmp_path}/spoiled.pt"], "finite, got NaN or infinite values"),
        ([f"images={one}", "reference=digits:test"], "num=1: scores need at least 4 images"),
        (["images=digits:test", f"reference={one}"], "360 images, 1 in the reference"),
        ([*real, "features=digits", f"weights={tmp_path}/bad.safetensors"], "sha256"),
        ([*real, "metrics=fid"], "metrics=fid: is kept for features=inception"),
        ([*real, "metrics=is"], "metrics=is: features=pixels gives no class scores"),
        ([*real, "metrics=kid_subsets"], "needs at least 1000 images on each side, got 360"),
        ([*real, "features=inception"], "weights= is missing: features=inception needs a file"),
        ([*real, "num=50"], "num=50: images= scores all its images; leave it out"),
        (["stats", "data=digits"], "out=: stats writes a file; name it, out=STATS.npz"),
        (["stats", "out=s.npz"], "data=: name a data set"),
    ):
        words = words if words[0] == "stats" else [*words, f"out={tmp_path}/r.json", "resamples=0"]
        assert evaluate.main(words) == 2, words
        errors = capsys.readouterr().err
        assert message in errors and not list(tmp_path.glob("r.json*")), errors
