"""evaluate.py: what it scores and reports, and what it refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import evaluate
import genmodels
from genmodels import images
from genmodels.data import source
from genmodels.images import OnDisk
from genmodels.methods.edm import EDM
from genmodels.metrics.frechet import Moments, frechet_distance
from genmodels.networks.precond import Precond
from tests.helpers.paths import ROOT
from tests.helpers.tiny import last_words


def scores(argv, tmp_path):
    assert evaluate.main(last_words([*argv, f"out={tmp_path}/r.json"])) == 0
    return json.loads((tmp_path / "r.json").read_text())


def test_model_against_held_out_digits(tiny_run, tmp_path, digits):
    words = [
        str(tiny_run),
        "data=digits:test",
        "metrics=nn1,fd,memorised",
        "features=digits",
        "steps=3",
        "num=40",
        "resamples=5",
    ]
    report = scores(words, tmp_path)
    assert set(report["metrics"]) == {"nn1", "fd", "memorised"}
    assert all(set(score) == {"value", "stderr"} for score in report["metrics"].values())
    assert report["num"] == 40 and report["reference_num"] == 360 and report["seed"] == 0
    assert report["features"]["name"] == "digits" and len(report["features"]["sha256"]) == 64
    assert report["versions"]["torch"] == torch.__version__
    assert report["device"] == "cpu" or torch.cuda.is_available()
    assert report["options"] == {
        "data": "digits:test",
        "metrics": ["nn1", "fd", "memorised"],
        "features": "digits",
        "steps": 3,
        "num": 40,
        "resamples": 5,
    }
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


def test_images_against_reference_in_every_form(tmp_path, digits, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, picture in enumerate(digits[0][:50]):
        images.write_png(folder / f"{i:03d}.png", picture)
    images.write_npz(tmp_path / "a.npz", images=digits[0][:50].permute(0, 2, 3, 1).numpy())
    words = ["reference=digits:test", "metrics=nn1,fd", "features=digits", "resamples=0"]
    first = scores([f"images={folder}", *words], tmp_path)
    monkeypatch.setattr(source, "_HELD", 3199)  # one byte less: read as they are needed
    assert isinstance(source.read_source(str(folder)).pixels, OnDisk)
    streamed = scores([f"images={folder}", *words], tmp_path)
    assert streamed["metrics"] == first["metrics"]
    second = scores([f"images={tmp_path}/a.npz", *words], tmp_path)
    assert first["metrics"] == second["metrics"]
    swapped = scores(
        [
            "images=digits:test",
            f"reference={folder}",
            "metrics=fd",
            "features=digits",
            "resamples=0",
        ],
        tmp_path,
    )
    assert swapped["metrics"]["fd"]["value"] == pytest.approx(first["metrics"]["fd"]["value"])


def test_the_batch_changes_no_number(tiny_run, tmp_path):
    words = [
        str(tiny_run),
        "data=digits:test",
        "metrics=fd",
        "features=digits",
        "steps=2",
        "num=20",
        "resamples=0",
    ]
    assert scores([*words, "batch=7"], tmp_path)["metrics"] == scores(words, tmp_path)["metrics"]


def test_words_that_would_be_ignored_are_refused(capsys):
    for words, message in (
        (["stats", "data=digits", "num=100", "out=s.npz"], "num=100: stats does not take it"),
        (["stats", "data=digits", "images=a", "out=s.npz"], "data=digits: images= takes its place"),
        (["selftest", "data=digits"], "data=digits: selftest does not take it"),
        (["run", "likelihood=yes", "reference=a"], "reference=a: likelihood= does not take it"),
        (["run", "ood=noise", "labels=3"], "labels=3: ood= does not take it"),
        (["run", "cluster=digits", "num=9"], "num=9: cluster= does not take it"),
        (["run", "cluster=a", "ood=noise", "metrics=nmi", "plot=p.png"], "plot=p.png: ood= does"),
        (["selftest", "run"], "run: selftest takes key=value words only"),
    ):
        assert evaluate.main(words) == 2, words
        assert message in capsys.readouterr().err


def test_notes_of_the_features_are_told_and_reported(tmp_path, capsys):
    """Warnings laid at the script's door are this program's own."""
    words = ["images=digits:test", "reference=digits:train", "features=digits", "mode=fast"]
    report = scores(words, tmp_path)
    assert "mode=fast: rows differ from exact ones" in report["warnings"][0]
    assert report["features"]["mode"] == "fast"
    shown, errors = capsys.readouterr()
    assert "features digits, mode fast" in " ".join(shown.split())
    assert "note: mode=fast" in errors and "UserWarning" not in errors


def test_the_table_shows_the_digits_of_a_small_score(capsys):
    from genmodels.commands.evaluate import print_scores

    print_scores("", {"kid": {"value": 0.00052134, "stderr": 4.1e-5}})
    assert "0.00052134" in (shown := capsys.readouterr().out) and "4.1e-05" in shown


def test_statistics_take_the_place_of_the_reference(tmp_path, capsys):
    stats = tmp_path / "s.npz"
    words = ["stats", "data=digits:train", "features=digits", f"out={stats}"]
    assert evaluate.main(words) == 0
    pictures = ["images=digits:test", "features=digits", "metrics=fd,fd_inf"]
    from_file = scores([*pictures, f"reference={stats}"], tmp_path)
    from_images = scores([*pictures, "reference=digits:train"], tmp_path)
    for name in ("fd", "fd_inf"):
        for key, value in from_images["metrics"][name].items():
            assert from_file["metrics"][name][key] == pytest.approx(value, rel=1e-9)
    assert from_file["reference_num"] == 1437 and from_file["warnings"] == []
    found = from_file["metrics"]
    assert found["fd_inf"]["low"] < found["fd_inf"]["value"] < found["fd_inf"]["high"]
    assert found["fd_inf"]["value"] < found["fd"]["value"] - found["fd"]["stderr"]
    # Another program's file: mu and sigma alone.
    with np.load(stats) as file:
        np.savez(tmp_path / "edm.npz", mu=file["mu"], sigma=file["sigma"])
    foreign = scores([*pictures, f"reference={tmp_path}/edm.npz"], tmp_path)
    assert foreign["metrics"] == from_file["metrics"] and foreign["reference_num"] is None
    assert "names no features" in foreign["warnings"][0]
    assert "note: reference=" in capsys.readouterr().err


def test_one_pass_gives_every_score(tmp_path):
    words = ["images=digits:test", "reference=digits:train", "features=digits", "resamples=2"]
    metrics = "metrics=fd,fd_inf,kid,prc,density,nn1,nn1_fake,nn1_real,memorised"
    report = scores([*words, metrics, f"plot={tmp_path}/p.png"], tmp_path)
    found = report["metrics"]
    assert list(found) == [
        "fd",
        "fd_inf",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
        "nn1",
        "nn1_fake",
        "nn1_real",
        "memorised",
    ]
    assert all(np.isfinite(s["value"]) and s["stderr"] >= 0 for s in found.values())
    assert abs(found["kid"]["value"]) < 3 * found["kid"]["stderr"]
    assert 0.85 < found["precision"]["value"] < 1 and 0.9 < found["density"]["value"] < 1.1
    # Precision is a mean over the 360 images: its error is the binomial one.
    p = found["precision"]["value"]
    assert found["precision"]["stderr"] == pytest.approx((p * (1 - p) / 360) ** 0.5, rel=0.01)
    assert set(report["stages"]) == {"reference", "train", "held_out", "images", "scores"}
    assert images.read_image(tmp_path / "p.png").shape[-1] > 800  # two panels


def test_few_images_are_warned_of_and_have_no_error_bar(tmp_path, digits, capsys):
    few = tmp_path / "few.npz"
    images.write_npz(few, images=digits[0][:20].permute(0, 2, 3, 1).numpy())
    words = [f"images={few}", "reference=digits:test", "features=digits"]
    report = scores([*words, "metrics=fd"], tmp_path)
    assert set(report["metrics"]["fd"]) == {"value"}
    assert "20 images in 32 dimensions" in report["warnings"][0]
    assert "note: a Frechet distance from 20 images" in capsys.readouterr().err
    assert evaluate.main([*words, "metrics=fd_inf"]) == 2
    assert (
        "metrics=fd_inf: needs more than 98 images for features of dimension 32"
        in capsys.readouterr().err
    )


def test_a_killed_evaluation_goes_on(tiny_run, tmp_path, capsys, monkeypatch):
    from genmodels.metrics.features import Features

    words = [
        str(tiny_run),
        "data=digits:test",
        "metrics=fd,kid",
        "features=digits",
        "steps=2",
        "num=150",
        "resamples=0",
        "batch=10",
        "feature_batch=10",
    ]
    whole = scores(words, tmp_path)
    (tmp_path / "r.json").unlink()
    calls, original = [], Features.all

    def killed(self, pictures):
        calls.append(1)
        if len(calls) == 36 + 8:  # the reference is done, and half of the images
            raise KeyboardInterrupt
        return original(self, pictures)

    monkeypatch.setattr(Features, "all", killed)
    assert evaluate.main([*words, f"out={tmp_path}/r.json"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["r.json.blocks"]  # no half report
    folder = f"save_images={tmp_path}/png"  # where those of the finished blocks would be missing
    for other in ("seed=1", "steps=3", "metrics=fd", "features=pixels", folder):
        calls.clear()
        assert evaluate.main(last_words([*words, other, f"out={tmp_path}/r.json"])) == 2
        assert "left by another evaluation; delete" in capsys.readouterr().err
    calls.clear()
    again = scores([*words, "batch=15"], tmp_path)  # which changes no image
    assert len(calls) < 10 and again["metrics"] == whole["metrics"]
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_compiled_it_warms_up_first_in_batches_of_one_size(tiny_run, tmp_path, capsys, monkeypatch):
    words = [str(tiny_run), "data=digits:test", "metrics=fd", "features=digits", "steps=1"]
    words += ["num=20", "batch=8", "resamples=0"]
    plain, sizes, compiled, original = scores(words, tmp_path), [], [], EDM.sample

    def sample(self, seeds, *args, **options):
        sizes.append((list(compiled), len(seeds)))
        return original(self, seeds, *args, **options)

    monkeypatch.setattr(EDM, "sample", sample)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    report = scores([*words, "compile=true"], tmp_path)
    assert sizes == [([Precond], 8)] * 4  # one to warm up, then 20 images
    assert report["metrics"] == plain["metrics"]
    assert report["stages"]["warm_up"] >= 0 and report["options"]["compile"] is True
    assert "compile: warmed up in " in capsys.readouterr().out
    for words, line in (
        ([f"images={tmp_path}", "reference=digits:test", "compile=true"], "images= are there"),
        (
            [str(tiny_run), "metrics=fd", "ood=noise", "channels_last=true"],
            "a command of their own",
        ),
    ):
        assert evaluate.main(words) == 2
        errors = capsys.readouterr().err
        assert line in errors and errors.count("\n") == 1


def test_two_processes_agree_with_one(tiny_run, tmp_path):
    words = [
        str(tiny_run),
        "data=digits:test",
        "metrics=fd,fd_inf,kid,memorised",
        "steps=2",
        "features=digits",
        "num=150",
        "resamples=2",
        "batch=10",
    ]
    bits = [str(tiny_run), "likelihood=true", "num=9", "steps=2", "batch=2"]
    one = [scores(argv, tmp_path) for argv in (words, bits)]
    driver = tmp_path / "driver.py"  # both in one start of the processes
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import evaluate\n"
        f"evaluate.main([*{words!r}, 'out={tmp_path}/a.json', 'save_images={tmp_path}/a.npz'])\n"
        f"sys.exit(evaluate.main([*{bits!r}, 'out={tmp_path}/b.json']))\n"
    )
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", driver],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    two = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    for name, score in one[0]["metrics"].items():
        for key, value in score.items():
            assert two[0]["metrics"][name][key] == pytest.approx(value, rel=1e-10, abs=1e-14)
    rows = [[row["bpd"] for row in report["rows"]] for report in (one[1], two[1])]
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)
    made = images.read_images(tmp_path / "a.npz")
    expected = images.to_uint8(genmodels.load(tiny_run).sample(range(150), steps=2))
    assert torch.equal(made, expected)


def test_images_are_saved_on_the_way(tiny_run, tmp_path):
    words = [str(tiny_run), "data=digits:test", "features=digits", "steps=2", "num=40"]
    folder = tmp_path / "pictures"
    report = scores([*words, f"save_images={folder}"], tmp_path)
    assert len(list(folder.iterdir())) == 40
    again = scores([f"images={folder}", "reference=digits:test", "features=digits"], tmp_path)
    assert again["metrics"] == report["metrics"]


def test_selftest_passes_and_fails(capsys, tmp_path):
    assert evaluate.main(["selftest"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("pass") >= 12 and "FAIL" not in shown

    class Drifting(torch.nn.Module):
        """Rows that depend on their place in the batch."""

        def forward(self, pictures):
            rows = pictures.flatten(1).float()[:, 20:30] / 255
            return rows + torch.arange(len(rows)).unsqueeze(1) * 0.01

    torch.jit.script(Drifting()).save(str(tmp_path / "drifting.pt"))
    assert (
        evaluate.main(["selftest", f"features={tmp_path}/drifting.pt", "weights_are_code=true"])
        == 1
    )
    shown = capsys.readouterr().out
    assert shown.count("FAIL") >= 2 and "another batch of the net" in shown


# ------------------------------------------------------------------------------------------------
# The user's mistakes: one line, exit code 2, nothing written


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
        (["feature_batch=-3"], "feature_batch=-3: must be in [0, 1e+06]"),
        (["seed=-1"], "seed=-1: must be in [0, 2^63)"),
        (["pad=-7"], "pad=-7: must be in [-1, 4096]"),
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
    words = [str(tiny_run), "steps=1", "num=4", "resamples=0", *words]
    assert evaluate.main(last_words(words)) == 2
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


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((4, 8, 8, 3), "channels=1 reads images in files so"),
        ((4, 9, 9, 1), "pad= background around it, or resolution=8 for images in files"),
    ],
)
def test_a_reference_of_another_shape_is_told_with_what_brings_it_there(
    shape, remedy, tiny_run, tmp_path, capsys
):
    other = tmp_path / "other.npz"
    images.write_npz(other, images=np.zeros(shape, np.uint8))
    assert evaluate.main([str(tiny_run), "steps=1", "num=4", f"reference={other}"]) == 2
    errors = capsys.readouterr().err
    assert f"reference={other}: has images of shape" in errors and remedy in errors


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
        (
            [*real, f"features={tmp_path}/spoiled.pt", "weights_are_code=true"],
            "finite, got NaN or infinite values",
        ),
        ([f"images={one}", "reference=digits:test"], "num=1: scores need at least 4 images"),
        (["images=digits:test", f"reference={one}"], "360 images, 1 in the reference"),
        ([*real, "features=digits", f"weights={tmp_path}/bad.safetensors"], "sha256"),
        ([*real, "metrics=fid"], "metrics=fid: is kept for features=inception"),
        ([*real, "metrics=is"], "metrics=is: features=pixels gives no class scores"),
        ([*real, "metrics=kid_subsets"], "needs at least 1000 images on each side, got 360"),
        ([*real, "features=inception"], "weights= is missing: features=inception needs a file"),
        ([*real, "num=500"], "num=500: images=digits:test holds 360 images; give no more"),
        (["stats", "data=digits"], "out=: stats writes a file; name it, out=STATS.npz"),
        (["stats", "out=s.npz"], "data=: name a data set"),
    ):
        words = words if words[0] == "stats" else [*words, f"out={tmp_path}/r.json", "resamples=0"]
        assert evaluate.main(words) == 2, words
        errors = capsys.readouterr().err
        assert message in errors and not list(tmp_path.glob("r.json*")), errors


def test_empty_words_of_another_kind_ask_for_nothing(tiny_run, tmp_path, capsys):
    """As a script writes them: denoise=$NOISY with nothing in it."""
    words = [str(tiny_run), "steps=1", "num=8", "resamples=0", f"out={tmp_path}/r.json"]
    empty = ["denoise=", "law=", "against=", "likelihood=", "ood=", "cluster="]
    assert evaluate.main([*words, *empty]) == 0
    options = json.loads((tmp_path / "r.json").read_text())["options"]
    assert options["denoise"] == options["likelihood"] == "" and options["num"] == 8
    capsys.readouterr()
    for more, line in (
        (["tile="], "tile=: must be a whole number"),  # of its type all the same
        (["likelihood=true", "features="], "features=: likelihood= does not take it"),
        (["denoise=x", "law=gaussian", "metrics="], "metrics=: denoise= does not take it"),
        (["ood=constant", "features="], "features=: ood= does not take it"),
    ):
        assert evaluate.main([str(tiny_run), "num=8", *more]) == 2, more
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1, error


def test_false_is_no_likelihood(tiny_run, tmp_path):
    words = [str(tiny_run), "steps=1", "num=8", "resamples=0", f"out={tmp_path}/r.json"]
    assert evaluate.main([*words, "likelihood=false"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["options"]["likelihood"] == "" and set(report["metrics"]) == {"fd"}


def test_root_and_pad_say_nothing_of_files(tmp_path, capsys):
    images.write_npz(tmp_path / "a.npz", images=np.zeros((9, 8, 8, 1), np.uint8))
    files = [f"images={tmp_path}/a.npz", f"reference={tmp_path}/a.npz"]
    for words in (files, ["stats", files[0], f"out={tmp_path}/s.npz"]):
        for word in ("root=there", "pad=2"):
            assert evaluate.main([*words, word]) == 2
            assert f"{word}: is for data sets by name" in capsys.readouterr().err
    assert not (tmp_path / "s.npz").exists()
