"""Black and white of files of more than 8 bits: found, told, put back, kept with a model."""

import copy

import numpy as np
import pytest
import tifffile
import torch

import sample
from genmodels.config import DataConfig, NoiseConfig
from genmodels.data.patches import NoisyDataModule
from genmodels.images import scale as scales
from genmodels.images.scale import Quantiles, Scale, Wanted
from tests.helpers.boxes import Box
from tests.helpers.restoring_words import run

RNG = np.random.default_rng(0)


def twelve_bits(height=40, width=50):
    """A dark picture of a camera: offset 100, values to about 700, one bright spot."""
    y, x = np.mgrid[:height, :width]
    picture = 100 + 8 * x + 6 * y + RNG.normal(0, 12, (height, width))
    picture[17, 40] = 4000
    return picture.round().clip(0, 4095).astype(np.uint16)


def quantiles_of(*arrays):
    quantiles = Quantiles(arrays[0].dtype)
    for array in arrays:
        quantiles.add(array)
    return quantiles


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32])
def test_quantiles_are_numpys(dtype):
    parts = [RNG.normal(90, 30, size).clip(0, 255).astype(dtype) for size in (1000, (30, 31), 7)]
    parts[1] = -parts[1] if np.dtype(dtype).kind != "u" else parts[1]
    whole = np.concatenate([part.ravel() for part in parts])
    for low, high in ((0.001, 0.999), (0.2, 0.7), (0.0, 1.0)):
        expected = np.quantile(whole, [low, high], method="inverted_cdf")
        assert quantiles_of(*parts).between(low, high) == tuple(expected)


def test_many_floats_are_sampled_evenly(monkeypatch):
    monkeypatch.setattr(scales, "SAMPLED", 1000)
    ramp = np.arange(20_000.0)
    found = quantiles_of(*np.split(ramp, [3, 4999, 5000, 17_001]))
    assert len(found.kept) <= 1000 and found.step == 32
    assert np.array_equal(found.kept, ramp[::32])
    assert (found.least, found.most, found.seen) == (0, 19_999, 20_000)


def test_few_spots_on_black_have_a_scale():
    spots = np.zeros((100, 100), np.uint16)
    spots[4, 4] = 900
    assert quantiles_of(spots).between() == (0, 900)
    (flat,) = Wanted().scales(spots.dtype, [quantiles_of(spots * 0 + 7)])
    assert flat == Scale(0, 65535)


def test_a_dark_picture_is_stretched_and_put_back(box, tmp_path, capsys):
    model, picture = box(radius=0), twelve_bits()
    tifffile.imwrite(tmp_path / "a.tif", picture)
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian") == 0
    low, high = np.quantile(picture, [0.001, 0.999], method="inverted_cdf").astype(float)
    seen = model.seen[0][0, 0].double().numpy()
    assert np.abs(seen - (2 * (picture - low) / (high - low) - 1)).max() < 1e-6
    assert seen.max() > 5  # the spots lie beyond white, and come back
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "a.tif"), picture)
    # Box's level is the deviation of what it sees; words count on 0..65535 as 0..255.
    assert model.told == [pytest.approx(picture.std() * 255 / (high - low), rel=1e-5)]
    line, scale = capsys.readouterr().out.splitlines()
    assert f"law gaussian, level {picture.std() * 255 / 65535:.3g}: " in line
    assert scale == f"scale: black {low:g}, white {high:g}, put back on writing"


def test_scaling_a_file_scales_what_comes_out(box, tmp_path):
    """3 v + 100 becomes 3 x + 100: the network sees the same."""
    box(radius=1)
    picture = twelve_bits()
    floats = picture.astype(np.float32) / 4095  # on no scale that is known
    for name, values in (("a", picture), ("b", 3 * picture + 100), ("c", floats)):
        tifffile.imwrite(tmp_path / f"{name}.tif", values)
        assert run(tmp_path / f"{name}.tif", tmp_path / "out", "law=gaussian") == 0
    a, b, c = (tifffile.imread(tmp_path / "out" / f"{name}.tif") for name in "abc")
    assert np.abs(b - (3.0 * a + 100)).max() <= 2  # a was rounded
    assert np.abs(c * 4095 - a).max() < 0.51


@pytest.mark.parametrize(
    ("words", "ends", "unit"),
    [
        ([], (None, None), 65535),
        (["scale=file"], (0, 65535), 65535),
        (["scale=quantiles"], (None, None), 65535),
        (["black=90", "white=1090"], (90, 1090), 1000),
        (["black=90", "white=1090", "scale=file"], (90, 1090), 1000),
        (["white=4095", "scale=file"], (0, 4095), 65535),
        (["black=90"], (90, None), 65535),
        (["black=90", "scale=file"], (90, 65535), 65535),
        (["black=90", "scale=quantiles"], (90, None), 65535),
        (["white=4095.5", "scale=quantiles"], (None, 4095.5), 65535),
    ],
)
def test_what_is_told_is_taken(box, tmp_path, words, ends, unit):
    """A level counts on black and white where both are told, else on the type's."""
    model, picture = box(radius=0), twelve_bits()
    tifffile.imwrite(tmp_path / "a.tif", picture)
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian", "level=2", *words) == 0
    found = np.quantile(picture, [0.001, 0.999], method="inverted_cdf").astype(float)
    low, high = (float(f if end is None else end) for end, f in zip(ends, found))
    seen = model.seen[0][0, 0].double().numpy()
    assert np.abs(seen - (2 * (picture - low) / (high - low) - 1)).max() < 1e-6
    assert model.told == [pytest.approx(2 * unit / (high - low))]
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "a.tif"), picture)


def test_a_level_that_is_printed_can_be_told(tmp_path, capsys):
    """Also where it is below a tenth of the type's 255: it counts once the file is stretched."""
    from tests.helpers.paths import ROOT

    tifffile.imwrite(tmp_path / "a.tif", twelve_bits(64, 64))
    words = [str(ROOT / "pretrained/noise2score_grey"), f"denoise={tmp_path}/a.tif", "device=cpu"]
    assert sample.main([*words, f"out={tmp_path}/found"]) == 0
    level = float(capsys.readouterr().out.split("level ")[1].split(":")[0])
    assert level == pytest.approx(12 * 255 / 65535, rel=0.2) and level < 0.1
    again = [f"level={level}", f"out={tmp_path}/told"]
    assert sample.main([*words, *again]) == 0
    found, told = (tifffile.imread(tmp_path / kind / "a.tif") for kind in ("found", "told"))
    assert np.abs(found.astype(int) - told).max() <= 2
    for level, line in (("0", "level=0: must be above 0"), ("90", "level=90: is ")):
        assert sample.main([*words, f"level={level}", f"out={tmp_path}/o"]) == 2
        assert line in capsys.readouterr().err


def test_8_bits_are_left_alone_unless_words_say_else(box, tmp_path, capsys):
    model, picture = box(radius=0), RNG.integers(40, 90, (20, 20)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", picture)
    assert run(tmp_path / "a.tif", tmp_path / "o", "law=gaussian", "level=9") == 0
    assert "scale" not in capsys.readouterr().out
    assert np.abs(model.seen[0][0, 0].numpy() - (picture / 127.5 - 1)).max() < 1e-6
    assert run(tmp_path / "a.tif", tmp_path / "o", "law=gaussian", "scale=quantiles") == 0
    assert float(model.seen[1].min()) == -1 and float(model.seen[1].max()) == 1


def test_other_noise_is_not_moved(box, tmp_path, capsys):
    """Poisson noise grows from black on: it is where it is by the type, or as told."""
    model, picture = box(radius=0), twelve_bits()
    tifffile.imwrite(tmp_path / "a.tif", picture)
    assert run(tmp_path / "a.tif", tmp_path / "o", "law=poisson") == 0
    assert np.abs(model.seen[0][0, 0].numpy() - (picture / 32767.5 - 1)).max() < 1e-6
    assert run(tmp_path / "a.tif", tmp_path / "o", "law=poisson", "black=90", "level=0.1") == 0
    assert np.abs(model.seen[1][0, 0].numpy() - ((picture - 90.0) / 32722.5 - 1)).max() < 1e-6
    assert model.told[1] == 0.1
    assert run(tmp_path / "a.tif", tmp_path / "p", "law=poisson", "scale=quantiles") == 2
    message = "scale=quantiles: poisson noise depends on where black is; tell black= and white="
    assert message in capsys.readouterr().err and not (tmp_path / "p").exists()


def test_a_model_of_gaussian_noise_moves_white_alone_for_other_noise(box, tmp_path):
    """It makes Poisson noise Gaussian, which goes on from black on: 0, or as told."""
    model, picture = box(radius=0), twelve_bits()
    model.cfg = copy.deepcopy(Box.cfg)
    model.cfg.data.noise.law = "gaussian"
    tifffile.imwrite(tmp_path / "a.tif", picture)
    words = ["law=poisson", "level=0.001", "scale=quantiles"]
    assert run(tmp_path / "a.tif", tmp_path / "o", *words) == 0
    assert run(tmp_path / "a.tif", tmp_path / "o", *words, "black=90") == 0
    high = float(np.quantile(picture, 0.999, method="inverted_cdf"))
    for seen, told, black in zip(model.seen, model.told, (0.0, 90.0)):
        expected = 2 * (picture - black) / (high - black) - 1
        assert np.abs(seen[0, 0].double().numpy() - expected).max() < 1e-6
        assert told == pytest.approx(0.001 * (65535 - black) / (high - black))  # zeta is an amount
    assert np.array_equal(tifffile.imread(tmp_path / "o" / "a.tif"), picture)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scale=percentiles"], "scale=percentiles: choose from auto, quantiles, file"),
        (["black=dark"], "black=dark: must be a number"),
        (["white=nan"], "white=nan: must be finite"),
        (["black=5", "white=5"], "white=5: must be above black=5"),
        (["black=1,2", "white=9"], "black=1,2: the file has 1 channel; give one number, or one"),
        (["black=5000"], "black=5000: hardly a pixel is brighter; tell black and white both"),
        (["white=-3"], "white=-3: hardly a pixel is darker; tell black and white both"),
        (["white=-3", "scale=file"], "black=0, white=-3: white must be above black; tell both"),
        (["black=70000", "scale=file"], "black=70000, white=65535: white must be above black"),
    ],
)
def test_bad_words_are_one_line(box, tmp_path, capsys, words, message):
    box()
    tifffile.imwrite(tmp_path / "a.tif", twelve_bits())
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian", *words) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 and not (tmp_path / "out").exists()


# ---- training on given pictures ------------------------------------------------------------------
def data_of(folder, fingerprint="", **noise):
    noise = {"law": "gaussian", "level": 0.0, "copies": "given"} | noise
    cfg = DataConfig(
        name="imagefolder",
        root=str(folder),
        channels=1,
        patch=16,
        holdout=0.0,
        batch_size=8,
        noise=NoiseConfig(**noise),
        fingerprint=fingerprint,
    )
    return NoisyDataModule(cfg)


@pytest.fixture
def dark(tmp_path):
    folder = tmp_path / "dark"
    folder.mkdir()
    pictures = [twelve_bits(), 2 * twelve_bits()]
    for name, picture in zip("ab", pictures):
        tifffile.imwrite(folder / f"{name}.tif", picture)
    return folder, pictures


def test_given_pictures_have_one_scale_that_is_kept(dark):
    folder, pictures = dark
    data = data_of(folder)
    values = np.concatenate([p.ravel() for p in pictures])
    low, high = np.quantile(values, [0.001, 0.999], method="inverted_cdf").astype(float)
    noise = data.cfg.noise
    assert (noise.scale, noise.black, noise.white) == ("quantiles", [low], [high])
    for view, picture in zip(data.views["image"], pictures):
        assert np.abs(view[0].numpy() - (2 * (picture - low) / (high - low) - 1)).max() < 1e-6
    deviation = 255 / (high - low)  # of one level of the camera
    assert data.levels == pytest.approx([12 * deviation, 24 * deviation], rel=0.2)
    again = data_of(folder, data.cfg.fingerprint, **vars(noise))  # as a run that goes on has it
    assert torch.equal(again.views["image"][1], data.views["image"][1])
    assert again.levels == data.levels and vars(again.cfg.noise) == vars(noise)
    plain = data_of(folder, level=0.2)
    assert plain.levels == [0.2, 0.2] and plain.cfg.noise.scale == "file"
    told = data_of(folder, level=0.2, scale="quantiles")  # in the type's unit, as when restoring
    assert told.levels == pytest.approx([0.2 * 65535 / (high - low)] * 2)


def test_a_run_that_began_before_there_was_a_scale_keeps_its_pictures(dark):
    folder, pictures = dark
    old = data_of(folder, scale="file")
    assert np.abs(old.views["image"][0][0].numpy() - (pictures[0] / 32767.5 - 1)).max() < 1e-6
    resumed = data_of(folder, old.cfg.fingerprint)
    assert resumed.cfg.noise.scale == "auto" and resumed.cfg.noise.black == []
    assert torch.equal(resumed.views["image"][0], old.views["image"][0])


def test_a_model_of_given_pictures_brings_its_scale(dark, box, tmp_path, capsys):
    folder, pictures = dark
    model = box(radius=0)
    model.cfg = copy.deepcopy(Box.cfg)
    model.cfg.data.noise = noise = data_of(folder).cfg.noise
    tifffile.imwrite(tmp_path / "c.tif", pictures[0])
    assert run(tmp_path / "c.tif", tmp_path / "o", "law=gaussian", "level=1") == 0
    low, high = noise.black[0], noise.white[0]
    expected = 2 * (pictures[0] - low) / (high - low) - 1
    assert np.abs(model.seen[0][0, 0].numpy() - expected).max() < 1e-6
    assert f"black {low:g}, white {high:g}" in capsys.readouterr().out
    assert run(tmp_path / "c.tif", tmp_path / "o", "law=gaussian", "scale=quantiles") == 0
    own = np.quantile(pictures[0], 0.999, method="inverted_cdf")
    assert f"white {own:g}, put back" in capsys.readouterr().out  # words go first
    noise.scale, noise.black, noise.white = "auto", [], []  # an older export
    assert run(tmp_path / "c.tif", tmp_path / "o", "law=gaussian", "level=1") == 0
    assert np.abs(model.seen[2][0, 0].numpy() - (pictures[0] / 32767.5 - 1)).max() < 1e-6
    assert "scale" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"law": "poisson", "scale": "quantiles"}, "data.noise.scale=quantiles: poisson noise"),
        ({"black": [9000.0]}, "data.noise.black=9000: hardly a pixel is brighter; tell black"),
        ({"black": [9.0], "white": [3.0]}, "data.noise.white=3: must be above data.noise.black=9"),
        ({"copies": "fixed", "level": 5.0, "white": [3.0]}, r"white=\[3.0\]: needs copies=given"),
        ({"white": [3.0, 4.0]}, "data.noise.white=3,4: the file has 1 channel; give one"),
    ],
)
def test_what_training_cannot_have_is_one_line(dark, noise, message):
    with pytest.raises(ValueError, match=message):
        data_of(dark[0], **noise)


def test_pictures_of_several_types_have_each_their_own(dark, tmp_path):
    folder, _ = dark
    tifffile.imwrite(folder / "c.tif", RNG.integers(0, 256, (40, 40), dtype=np.uint8))
    with pytest.warns(UserWarning, match="holds pictures of uint16 and uint8: each is on the r"):
        data = data_of(folder)
    assert data.cfg.noise.scale == "file" and data.cfg.noise.black == []
    with pytest.raises(ValueError, match="holds pictures of uint16 and uint8; tell data.noise.bl"):
        data_of(folder, scale="quantiles")
