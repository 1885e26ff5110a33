"""sample.py solve=: files, scores, seeds, known pixels; one line where it cannot be."""

import gc
import json

import numpy as np
import pytest
import torch

import genmodels
import sample
from genmodels import checkpoint, images
from genmodels.commands.solve import File
from genmodels.images import pictures
from genmodels.images.read import read_values
from genmodels.sampling.operators import Mask, named_operator
from tests.helpers.paths import ROOT
from tests.helpers.processes import together
from tests.helpers.restoring_words import random_levels, save
from tests.helpers.tiny import last_words

SMALL = ["network.channels=[8,8]", "network.norm_groups=4", "network.layers=1"]
SMALL += ["network.attention=[]", "network.head_dim=8"]


@pytest.fixture(scope="module")
def model():
    """A denoiser whose last layer is not zero, so that noise matters."""
    config = str(ROOT / "configs/edm_digits.yaml")
    made = genmodels.build(config, *SMALL, "data.labels=false").eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(made.net.net.unet.conv_out.weight, std=0.05)
    return made


@pytest.fixture(autouse=True)
def _loaded(monkeypatch, model):
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: model)


def run(source, out, *words):
    argv = ["model", f"solve={source}", f"out={out}", "noise=0", "steps=2", "samples=2", *words]
    return sample.main(last_words(argv))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A grey picture of 8 bits, one of 16, and three of an npy, of the model's size."""
    folder = tmp_path_factory.mktemp("measured")
    save(folder / "a.png", random_levels(8, 8))
    save(folder / "deep" / "b.tif", random_levels(8, 8, dtype=np.uint16))
    save(folder / "c.npy", random_levels(3, 8, 8, 1).astype(np.float32) + np.float32(1 / 3))
    return folder


def test_each_file_comes_back_as_it_was_with_known_pixels_bit_for_bit(measured, tmp_path):
    assert run(measured, tmp_path / "x", "operator=inpaint:top") == 0
    made = files(tmp_path / "x")
    names = ("a.png", "c.npy", "deep/b.tif")
    parts = [f"{part}/{name}" for part in ("0", "1", "mean", "spread") for name in names]
    assert sorted(made) == sorted([*parts, "scores.json", "solve.png"])
    for name in names:
        read = np.load if name.endswith("npy") else lambda p: read_values(p.read_bytes(), p.name)
        given = read(measured / name)
        rows = (slice(None), slice(4, None)) if name == "c.npy" else slice(4, None)
        for part in ("0", "1", "mean"):
            got = read(tmp_path / "x" / part / name)
            assert got.shape == given.shape and got.dtype == given.dtype
            assert np.array_equal(got[rows], given[rows]) and not np.array_equal(got, given)
        assert not read(tmp_path / "x" / "spread" / name)[rows].any()
    # By batches of one it is the same, picture for picture; another seed makes others.
    assert run(measured, tmp_path / "y", "operator=inpaint:top", "batch=1") == 0
    for name in parts[:-3]:
        a, b = (tmp_path / folder / name for folder in "xy")
        if name.endswith(".png"):
            assert np.abs(images.read_image(a).int() - images.read_image(b).int()).max() <= 1
    other = ["operator=inpaint:top", "seed=7"]
    assert run(measured / "a.png", tmp_path / "z", *other) == 0
    assert (tmp_path / "z/0/a.png").read_bytes() != made["0/a.png"]
    assert (tmp_path / "x/0/a.png").read_bytes() != made["1/a.png"]


def test_it_is_what_the_model_solves(model, tmp_path):
    """y of half the side, sample j of picture k by seed 5 + 2 j + k."""
    levels = random_levels(2, 4, 4)
    for k in range(2):
        save(tmp_path / "in" / f"{k}.png", levels[k])
    words = ["operator=downsample:2", "noise=0.1", "solver=diffpir", "mix=0.5", "seed=5"]
    assert run(tmp_path / "in", tmp_path / "out", *words) == 0
    y = torch.from_numpy(levels).float()[:, None] / 127.5 - 1
    small = named_operator("downsample:2", (1, 8, 8))
    options = {"noise": 0.1, "solver": "diffpir", "steps": 2, "mix": 0.5}
    for j in range(2):
        x = model.solve(y, small, seeds=[5 + 2 * j, 6 + 2 * j], **options)
        for k in range(2):
            got = images.read_image(tmp_path / "out" / str(j) / f"{k}.png").int()
            expected = ((x[k] + 1) * 127.5).clamp(0, 255)
            assert (got - expected).abs().max() <= 0.51


def test_clean_pictures_are_measured_and_scored(model, tmp_path, capsys):
    levels = random_levels(8, 8)
    save(tmp_path / "a.png", levels)
    words = ["operator=blur:0.5", "noise=0.2", "clean=true", "samples=3", "seed=4"]
    assert run(tmp_path / "a.png", tmp_path / "out", *words) == 0
    report = json.loads((tmp_path / "out/scores.json").read_text())
    assert "PSNR of mean" in capsys.readouterr().out
    x = torch.from_numpy(levels).double()[None, None] / 127.5 - 1
    blur = named_operator("blur:0.5", (1, 8, 8))
    y = blur(x.float()).double() + 0.2 * np.random.default_rng([4, 0]).standard_normal((1, 8, 8))
    made = model.solve(y.float(), blur, noise=0.2, steps=2, seeds=[4, 5, 6]).double()

    def psnr(estimate):
        error = ((estimate - x).clamp(-9, 9) / 2).square().mean()
        return -10 * float(error.log10())

    row, scores = report["rows"][0], report["metrics"]
    assert row["psnr"] == pytest.approx(psnr(made.mean(0).clamp(-1, 1)), abs=0.01)
    singles = [psnr(each.clamp(-1, 1)) for each in made]
    assert row["psnr_sample"] == pytest.approx(np.mean(singles), abs=0.01)
    assert row["psnr_pinv"] == pytest.approx(psnr(blur.pull(y, 0.0).clamp(-1, 1)), abs=0.01)
    left = float((blur(made) - y).square().mean().sqrt())
    assert row["consistency"] == pytest.approx(left, rel=1e-3)
    assert row["spread"] == pytest.approx(float(made.var(0).mean().sqrt()) / 2, rel=1e-3)
    assert "ssim" not in row and scores["psnr"]["value"] == row["psnr"]
    assert report["noise"] == 0.2 and report["solver"] == "pigdm" and report["num"] == 1
    assert report["settings"] == {"steps": 2} and report["nfe"] == 2


def test_a_mask_of_a_file(measured, tmp_path):
    mask = (np.arange(64).reshape(8, 8) % 3 > 0).astype(np.uint8) * 255
    save(tmp_path / "mask.png", mask)
    words = [f"operator=mask:{tmp_path}/mask.png", "samples=1"]
    assert run(measured / "a.png", tmp_path / "out", *words) == 0
    got, given = (images.read_image(f) for f in (tmp_path / "out/0/a.png", measured / "a.png"))
    assert torch.equal(got[0][mask > 0], given[0][mask > 0])
    assert isinstance(named_operator("mask:x", (1, 8, 8), torch.ones(1, 8, 8) > 0), Mask)


def test_scores_name_the_label_and_an_infinite_one_is_null(tmp_path, monkeypatch, capsys):
    labelled = genmodels.build(str(ROOT / "configs/edm_digits.yaml"), *SMALL).eval()
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: labelled)
    save(tmp_path / "mask.png", np.full((8, 8), 255, np.uint8))  # all is known
    for name in "ab":
        save(tmp_path / f"in/{name}.png", random_levels(8, 8))
    words = [f"operator=mask:{tmp_path}/mask.png", "clean=true", "labels=7,3"]
    assert run(tmp_path / "in", tmp_path / "out", *words) == 0
    report = json.loads((tmp_path / "out/scores.json").read_text())
    assert [row["label"] for row in report["rows"]] == [7, 3]
    assert [row["psnr"] for row in report["rows"]] == [None, None]
    assert report["metrics"]["psnr"] == {"value": None} and "label" not in report["metrics"]
    assert "inf" in capsys.readouterr().out


def test_files_are_in_memory_only_in_their_turn(model, measured, tmp_path, monkeypatch):
    original, alive = model.solve, []

    def solve(*args, **options):
        alive.append(sum(type(each) is File for each in gc.get_objects()))
        return original(*args, **options)

    monkeypatch.setattr(model, "solve", solve)
    assert run(measured, tmp_path / "out", "operator=inpaint", "batch=1", "samples=1") == 0
    assert len(alive) == 5 and max(alive) <= 2, alive  # c.npy holds three pictures


def test_what_is_read_is_never_written_over(measured, tmp_path, capsys):
    assert run(measured, tmp_path / "out", "operator=inpaint", "samples=1") == 0
    before = files(tmp_path)
    for source, mask in (("out/mean", ""), ("out/0/a.png", ""), ("in.png", "out/0/a.png")):
        save(tmp_path / "in.png", random_levels(8, 8))
        before["in.png"] = (tmp_path / "in.png").read_bytes()
        operator = f"operator=mask:{tmp_path / mask}" if mask else "operator=inpaint"
        assert run(tmp_path / source, tmp_path / "out", operator, "samples=1") == 2
        line = f"out: holds {tmp_path / (mask or source)}, which is read; name another"
        assert line in capsys.readouterr().err
        assert files(tmp_path) == before


def test_a_zarr_of_one_plane_is_refused_too(tmp_path, monkeypatch, capsys):
    """What is written is a file, and a .zarr is a folder."""
    plane = pictures.Picture("c.zarr", random_levels(1, 8, 8, 1), (8, 8))
    monkeypatch.setattr(pictures, "find_pictures", lambda *_, **__: {"c.zarr": lambda: plane})
    assert run(tmp_path / "c.zarr", tmp_path / "out", "operator=inpaint") == 2
    assert "is a stack of planes; save each alone (c.zarr)" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_the_same(measured, tmp_path):
    model = ROOT / "pretrained/edm_digits"
    words = [str(model), f"solve={measured}", "operator=blur:1", "noise=0.1", "steps=2"]
    parts = {}
    for count in (1, 2):
        out = tmp_path / str(count)
        ended = together([*words, f"out={out}"], tmp_path, script="sample", devices=count)
        assert [process.code for process in ended] == [0] * count, ended
        parts[count] = files(out)
    rows = [json.loads(made.pop("scores.json"))["rows"] for made in parts.values()]
    assert [row["index"] for row in rows[1]] == [0, 1, 2, 3, 4] == [r["index"] for r in rows[0]]
    assert parts[1].keys() == parts[2].keys()
    for name in ("0/a.png", "mean/deep/b.tif", "spread/c.npy"):
        assert name in parts[1]
    for a, b in zip(*rows):
        assert a["consistency"] == pytest.approx(b["consistency"], rel=1e-4)


BAD = {
    "no operator": (["operator="], "operator=: say what measured them"),
    "unknown": (["operator=zoom"], "operator=zoom: choose from inpaint, downsample"),
    "no noise": (["noise="], "noise=: must be a number"),
    "negative": (["noise=-1"], "noise=-1: must be >= 0"),
    "solver": (["solver=langevin"], "solver=langevin: EDM has pigdm, diffpir, dps"),
    "another's": (["zeta=1"], "zeta=1.0: solver=pigdm does not take it; leave it out"),
    "typo": (["stpes=3"], "unknown key stpes=3: did you mean steps?"),
    "a method's": (["rho=7"], "unknown key rho=7: "),
    "generating": (["num=3"], "num=3: solve= does not take it; leave it out"),
    "denoising": (["law=gaussian"], "law=gaussian: solve= does not take it"),
    "labels": (["labels=3"], "labels=3: this model is unconditional"),
    "size": (
        ["operator=downsample:2"],
        ": is of (1, 8, 8), operator=downsample:2 measures (1, 4, 4) (a.png)",
    ),
    "nothing there": (["solve=nowhere.png"], "solve=nowhere.png: no such picture"),
    "no mask": (["operator=mask:nowhere.png"], "nowhere.png"),
    "grey": (["operator=grey"], "operator=grey: is for colour; the model has 1 channels"),
    "all hidden": (
        ["operator=inpaint:0.9999999"],
        "operator=inpaint:0.9999999: hides all pixels; leave some",
    ),
    "samples": (["samples=0"], "samples=0: must be >= 1"),
    "inside": (["out={measured}/x"], "lies in the folder of the pictures"),
    "source": (["solve={measured}/a.png", "out={measured}"], "holds a.png, which is read"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_mistake_is_one_line_and_nothing_is_written(what, measured, tmp_path, capsys):
    words, line = BAD[what]
    words = [word.format(measured=measured) for word in words]
    before = files(measured)
    assert run(measured, tmp_path / "out", "operator=inpaint", *words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and line in errors, errors
    assert files(measured) == before and not (tmp_path / "out").exists()


def test_words_of_solving_are_refused_elsewhere(model, tmp_path, capsys):
    for words, line in (
        (["operator=blur"], "operator=blur: needs solve=; leave it out"),
        (["zeta=1"], "unknown key zeta=1"),
    ):
        assert sample.main(["model", "num=1", f"out={tmp_path}", *words]) == 2
        assert line in capsys.readouterr().err
    (tmp_path / "9.png").write_bytes(b"")
    save(tmp_path / "in.png", random_levels(8, 8))
    assert run(tmp_path / "in.png", tmp_path / "o", "operator=inpaint", "steps=1") == 0
    (tmp_path / "o/mean/other.png").write_bytes(b"")
    assert run(tmp_path / "in.png", tmp_path / "o", "operator=inpaint") == 2
    assert "o: holds 1 other pictures (mean/other.png, ...)" in capsys.readouterr().err
