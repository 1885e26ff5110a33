"""evaluate.py denoise=: PSNR and SSIM of restored pictures, and BM3D beside them."""

import json
import math
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.special import digamma, polygamma

import evaluate
from genmodels import images
from genmodels.metrics import restoration
from genmodels.noise import LAWS
from genmodels.noise.poisson_gaussian import anscombe_inverse
from tests.helpers.tiny import last_words

DENOISE = Path(os.environ.get("GENMODELS_DATA", "none")) / "denoise"
needs_data = pytest.mark.skipif(
    not (DENOISE / "Set12").is_dir(), reason="needs $GENMODELS_DATA/denoise (Set12, BSD68)"
)


@pytest.fixture
def folder(tmp_path):
    """Five clean pictures of several sizes, the last of 16 bits, and a file that is none."""
    where, rng = tmp_path / "clean", np.random.default_rng(1)
    where.mkdir()
    for k, (height, width) in enumerate([(20, 30), (16, 16), (11, 40), (24, 13), (18, 18)]):
        levels = (rng.random((height, width, 1)) * 60 + 90).astype(np.uint8)
        levels = levels.astype(np.uint16) * 257 if k == 4 else levels
        (where / f"{k}.png").write_bytes(images.picture_bytes(levels, "png"))
    (where / "README.md").write_text("no picture")
    return where


def report(folder, tmp_path, *words):
    argv = ["model", f"denoise={folder}", f"out={tmp_path}/r.json", *words]
    assert evaluate.main(argv) == 0
    return json.loads((tmp_path / "r.json").read_text())


def by_the_rule(folder, law, level, seed):
    """Yield (x, y) of each picture, from numpy and Pillow alone."""
    from PIL import Image

    for k, path in enumerate(sorted(folder.glob("*.png"))):
        pixels = np.array(Image.open(path)).astype(np.float64)
        x = pixels / (65535 if pixels.max() > 255 else 255)
        rng = np.random.default_rng([seed, k])
        if law == "gaussian":
            yield x, x + level / 255 * rng.standard_normal(x.shape)
        else:
            yield x, rng.poisson(x / level) * level


@pytest.mark.parametrize(("law", "level"), [("gaussian", 25), ("poisson", 0.05)])
def test_scores_follow_the_rule(box, folder, tmp_path, capsys, law, level):
    box(radius=1)
    found = report(
        folder, tmp_path, f"law={law}", f"level={level}", "seed=3", "tile=16", "overlap=2"
    )
    wanted = []
    for row, (x, y) in zip(found["rows"], by_the_rule(folder, law, level, 3), strict=True):
        wide = np.pad(y, 1, mode="edge")
        mean = (
            sum(wide[i : i + x.shape[0], j : j + x.shape[1]] for i in range(3) for j in range(3))
            / 9
        )
        own = -10 * math.log10(((mean.clip(0, 1) - x) ** 2).mean())
        noisy = -10 * math.log10(((y - x) ** 2).mean())
        assert row["psnr_noisy"] == pytest.approx(noisy, abs=1e-9)
        assert row["psnr"] == pytest.approx(own, abs=1e-5)
        wanted.append((own, noisy))
    own, noisy = np.mean(wanted, axis=0)
    values = {key: score["value"] for key, score in found["metrics"].items()}
    assert set(values) == {"psnr", "psnr_noisy", "ssim"}
    assert values["psnr"] == pytest.approx(own, abs=1e-5) and values["psnr"] > values["psnr_noisy"]
    assert values["psnr_noisy"] == pytest.approx(noisy, abs=1e-9)
    assert values["ssim"] == pytest.approx(np.mean([row["ssim"] for row in found["rows"]]))
    assert [row["image"] for row in found["rows"]] == [f"{k}.png" for k in range(5)]
    assert (found["law"], found["level"], found["seed"], found["num"]) == (law, level, 3, 5)
    assert found["options"]["tile"] == 16 and found["versions"]["torch"] == torch.__version__
    pixels = (20 * 30 + 16 * 16 + 11 * 40 + 24 * 13 + 18 * 18) / 1e6
    speed = found["restoring"]
    assert speed["megapixels"] == pytest.approx(pixels)
    assert 0 < speed["seconds"] < found["seconds"] + 0.01  # which is rounded
    assert speed["megapixels_per_second"] == pytest.approx(pixels / speed["seconds"])
    shown = capsys.readouterr().out
    assert f"{own - noisy:.2f}" in shown and "4.png" in shown and "mean" in shown


def test_noise_is_neither_clipped_nor_rounded(box, folder, tmp_path):
    model = box(radius=0)
    report(folder, tmp_path, "law=gaussian", "level=120", "num=2")
    assert len(model.seen) == 2 and all(x.abs().max() > 1.2 for x in model.seen)


def test_the_estimate_is_clipped_whatever_the_model_returns(box, folder, tmp_path):
    model = box()
    model.restore = lambda x, law, level: (torch.full_like(x, 3.0), None)  # beyond white
    found = report(folder, tmp_path, "law=gaussian", "level=25", "num=1")
    ((x, _),) = list(by_the_rule(folder, "gaussian", 25, 0))[:1]
    wanted = -10 * math.log10(((1 - x) ** 2).mean())
    assert found["metrics"]["psnr"]["value"] == pytest.approx(wanted, abs=1e-9)


def test_blind_hides_the_level_and_tells_the_error(box, folder, tmp_path, capsys):
    model = box(radius=0)
    found = report(folder, tmp_path, "law=gaussian", "level=40", "blind=true")
    levels = [row["level"] for row in found["rows"]]
    assert model.told == levels and len(model.asked) == 5 and 40.0 not in levels
    errors = [abs(level - 40) / 40 for level in levels]
    assert found["metrics"]["level_error"]["value"] == pytest.approx(np.mean(errors))
    assert found["metrics"]["level"]["value"] == pytest.approx(np.mean(levels))
    assert "level" in capsys.readouterr().out
    model.told.clear()
    assert "level" not in report(folder, tmp_path, "law=gaussian", "level=40")["metrics"]
    assert set(model.told) == {40.0}
    model.told.clear()
    model.most = middle = sorted(levels)[2]  # the model is told no level that it does not know
    beyond = report(folder, tmp_path, "law=gaussian", "level=40", "blind=true")
    assert model.told == [min(level, middle) for level in levels]
    assert beyond["metrics"]["level_error"] == found["metrics"]["level_error"]
    words = ["model", f"denoise={folder}", "law=gaussian", "level=200"]
    assert evaluate.main(words) == 2 and "this model knows up to" in capsys.readouterr().err


def test_the_ensemble_is_reported_apart(box, folder, tmp_path):
    model = box(radius=1, shift=1)
    plain = report(folder, tmp_path, "law=gaussian", "level=25")
    assert len(model.told) == 5
    both = report(folder, tmp_path, "law=gaussian", "level=25", "ensemble=true")
    assert len(model.told) == 5 + 5 * 9
    assert both["metrics"]["psnr"] == plain["metrics"]["psnr"]
    assert both["metrics"]["psnr_ensemble"]["value"] != plain["metrics"]["psnr"]["value"]
    assert {"ssim_ensemble", "psnr_ensemble"} <= set(both["rows"][0])
    assert "megapixels_per_second_ensemble" in both["restoring"]


def test_a_grey_model_scores_colour_pictures(box, tmp_path, capsys):
    levels = np.random.default_rng(0).integers(90, 150, (20, 24, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(images.picture_bytes(levels, "png"))
    model = box(radius=1)
    found = report(tmp_path / "a.png", tmp_path, "law=gaussian", "level=25")
    assert model.seen[-1].shape == (3, 1, 20, 24)
    x = levels / 255
    y = x + 25 / 255 * np.random.default_rng([0, 0]).standard_normal(x.shape)  # (H, W, C)
    noisy = -10 * math.log10(((y - x) ** 2).mean())
    assert found["metrics"]["psnr_noisy"]["value"] == pytest.approx(noisy, abs=1e-9)
    box(channels=3)
    (tmp_path / "b.png").write_bytes(images.picture_bytes(levels[..., :1], "png"))
    words = ["model", f"denoise={tmp_path}/b.png", "law=gaussian", "level=25"]
    assert evaluate.main(words) == 2
    assert "is grey, this model restores 3 channels" in capsys.readouterr().err


# ---- the scores themselves ----------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(11, 11, 1), (40, 31, 1), (25, 30, 3)])
def test_ssim_is_that_of_wang(shape):
    """Window by window with scipy's Gaussian of 11 taps, and no sample covariance."""
    rng = np.random.default_rng(0)
    x = rng.random(shape)
    y = (x + 0.2 * rng.standard_normal(shape)).clip(0, 1)

    def blurred(z):
        return gaussian_filter(z, 1.5, truncate=3.5, axes=(0, 1))[5:-5, 5:-5]

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    both = blurred(x * y) - mean_x * mean_y
    wanted = (2 * mean_x * mean_y + 0.01**2) * (2 * both + 0.03**2)
    wanted /= (mean_x**2 + mean_y**2 + 0.01**2) * (var_x + var_y + 0.03**2)
    assert restoration.ssim(y, x) == pytest.approx(wanted.mean(), abs=1e-7)
    assert restoration.ssim(x, x) == pytest.approx(1, abs=1e-12)


def test_psnr_of_a_known_error():
    x = np.zeros((4, 4, 1))
    assert restoration.psnr(x + 0.1, x) == pytest.approx(20) and restoration.psnr(x, x) == math.inf


def test_the_inverse_of_anscombe_gives_the_mean_counts_back():
    """Against E[2 sqrt(n + 3/8)], n Poisson, summed over n; and 0 where no count can be."""
    for mean in (0.05, 0.1, 0.5, 1, 2, 4, 10, 30, 100):
        n = np.arange(400)
        p = np.exp(n * math.log(mean) - mean - np.cumsum(np.log(np.maximum(n, 1))))
        z = (p * 2 * np.sqrt(n + 3 / 8)).sum()
        # A closed form, not the inverse itself: 0.018 counts off at most, the plain one 0.25.
        assert float(anscombe_inverse(torch.tensor(z))) == pytest.approx(mean, abs=0.02)
        assert mean < 0.5 or abs(z**2 / 4 - 3 / 8 - mean) > 0.1
    dark = torch.tensor([-1.0, 0.0, 0.3, 2 * math.sqrt(3 / 8)])
    assert (anscombe_inverse(dark) == 0).all()


def test_bm3d_is_handed_noise_of_one_level(monkeypatch):
    """A stand-in that records what it gets and answers with the mean of all pixels."""
    given = []

    def stand_in(z, std):
        given.append((z, std))
        return np.full_like(z, z.mean())

    package = types.SimpleNamespace(bm3d=stand_in, bm3d_rgb=stand_in)
    monkeypatch.setitem(sys.modules, "bm3d", package)
    x = np.full((200, 200, 1), 0.4)
    for law, level in (("gaussian", 25), ("poisson", 0.05), ("gamma", 50)):
        y = LAWS[law].sample(x, level, np.random.default_rng(0))
        found = restoration.bm3d(y, law, level)
        z, std = given[-1]
        assert z.std() == pytest.approx(std, rel=0.02), law
        assert z.shape == (200, 200) and found.shape == x.shape
        assert found.mean() == pytest.approx(0.4, abs=3e-3), law  # without bias
        if law != "gaussian":
            assert z.min() == 0 and z.max() == pytest.approx(1)
    assert float(polygamma(1, 50)) ** 0.5 == pytest.approx(
        std * (np.log(y).max() - np.log(y).min())
    )
    middle = np.exp(np.log(y).mean() - digamma(50) + math.log(50))
    assert found.mean() == pytest.approx(middle, rel=1e-9)
    restoration.bm3d(np.zeros((12, 12, 3)), "gamma", 50)  # black has no logarithm, nor a range
    assert given[-1][0].shape == (12, 12, 3) and np.isfinite(given[-1][0]).all()


def test_bm3d_stands_beside_the_model(box, folder, tmp_path, capsys, monkeypatch):
    package = types.SimpleNamespace(bm3d=lambda z, std: z * 0 + 0.5)
    monkeypatch.setitem(sys.modules, "bm3d", package)
    box()
    for words in (["--against", "bm3d"], ["--against=bm3d"], ["against=bm3d"]):
        found = report(folder, tmp_path, "law=gaussian", "level=25", *words)
        assert found["metrics"]["psnr_bm3d"]["value"] > 15
        assert {"ssim_bm3d", "seconds_bm3d", "psnr_bm3d"} <= set(found["rows"][0])
        assert "BM3D" in capsys.readouterr().out


# ---- bad input ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["law=rice"], "law=rice: choose from gaussian, poisson, lognormal"),
        (["law="], "law=: choose from gaussian, poisson"),
        (["law=auto"], "law=auto: name the law of the noise to add"),
        (["level=auto"], "level=auto: say the level of the noise to add; blind=true hides it"),
        (["level=0"], "level=0: must be 0.1 to 255 (standard deviation sigma on 0..255)"),
        (["level=x"], "level=x: must be 0.1 to 255"),
        (["against=dncnn"], "against=dncnn: choose from bm3d"),
        (["against=bm3d"], "against=bm3d: the package is not here; pip install bm3d"),
        (["data=digits"], "data=digits: denoise= does not take it"),
        (["metrics=fid"], "metrics=fid: denoise= does not take it"),
        (["steps=3"], "unknown key steps=3"),
        (["denoise={dir}/none"], "none: no such picture, .npy, folder or .zip"),
        (["denoise={dir}/tiny.png"], "tiny.png: is 1 x 20, SSIM needs sides of 11 pixels"),
        (["denoise={dir}/loud.npy"], "loud.npy: has pixels beyond 0..255; clean pictures have"),
        (["denoise={dir}/many.npy"], "many.npy: holds 2 pictures; make it one"),
        (["denoise=", "data=digits:test"], "law=gaussian: needs denoise=; leave it out"),
        (["out={dir}/no/r.json"], "its folder does not exist"),
    ],
)
def test_bad_input_is_one_line(box, folder, tmp_path, capsys, monkeypatch, words, message):
    box(laws=("gaussian", "poisson", "lognormal"))
    monkeypatch.setitem(sys.modules, "bm3d", None)
    (tmp_path / "tiny.png").write_bytes(images.picture_bytes(np.zeros((1, 20, 1), np.uint8), "png"))
    np.save(tmp_path / "loud.npy", np.full((12, 12), 300.0))
    np.save(tmp_path / "many.npy", np.zeros((2, 12, 12, 1)))
    words = [word.replace("{dir}", str(tmp_path)) for word in words]
    given = ["model", f"denoise={folder}", "law=gaussian", "level=25", f"out={tmp_path}/r.json"]
    assert evaluate.main(last_words([*given, *words])) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 and not (tmp_path / "r.json").exists()


def test_a_model_that_restores_nothing_is_refused(tiny_run, folder, capsys):
    words = [str(tiny_run), f"denoise={folder}", "law=gaussian", "level=25"]
    assert evaluate.main(words) == 2
    assert "needs a MODEL that restores pictures" in capsys.readouterr().err


def test_bm3d_does_not_know_every_law(box, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm3d", types.SimpleNamespace())
    box(laws=("lognormal",))
    words = ["model", f"denoise={folder}", "law=lognormal", "level=0.1", "against=bm3d"]
    assert evaluate.main(words) == 2
    assert "law=lognormal: choose from gaussian, poisson, gamma" in capsys.readouterr().err


# ---- real pictures ------------------------------------------------------------------------------
@needs_data
@pytest.mark.parametrize(
    ("name", "law", "level", "unclipped", "clipped"),
    [
        ("Set12", "gaussian", 25, 20.17, 20.34),
        ("Set12", "gaussian", 50, 14.15, 14.76),
        ("Set12", "poisson", 0.01, 23.11, 23.18),
        ("Set12", "poisson", 0.05, 16.12, 16.57),
        ("Set12", "gamma", 100, 25.46, 25.56),
        ("Set12", "gamma", 50, 22.45, 22.67),
        pytest.param("BSD68", "poisson", 0.01, 23.78, 24.05, marks=pytest.mark.slow),
        pytest.param("CBSD68", "gaussian", 25, 20.17, 20.53, marks=pytest.mark.slow),
    ],
)
def test_noisy_pictures_have_the_known_psnr(name, law, level, unclipped, clipped):
    """Measured with another program under the same seed rule."""
    found = []
    for k, path in enumerate(sorted((DENOISE / name).glob("*.png"))):
        x = images.read_values(path.read_bytes(), path) / 255
        y = LAWS[law].sample(x, level, np.random.default_rng([0, k]))
        found.append((restoration.psnr(y, x), restoration.psnr(y.clip(0, 1), x)))
    assert np.round(np.mean(found, axis=0), 2) == pytest.approx((unclipped, clipped), abs=1e-9)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "level", "wanted"),
    [
        ("gaussian", 25, 29.46),
        ("poisson", 0.01, 31.45),
        ("poisson", 0.05, 27.79),
        ("gamma", 100, 33.03),
        ("gamma", 50, 31.26),
    ],
)
def test_bm3d_scores_as_known(law, level, wanted):
    """The first picture of Set12, measured before with the same package and seed rule."""
    pytest.importorskip("bm3d")
    path = sorted((DENOISE / "Set12").glob("*.png"))[0]
    x = images.read_values(path.read_bytes(), path) / 255
    y = LAWS[law].sample(x, level, np.random.default_rng([0, 0]))
    found = restoration.bm3d(y, law, level)
    assert restoration.psnr(found, x) == pytest.approx(wanted, abs=0.011)
