"""The shipped model of Gaussian noise restores other noise, other levels, arrays of any unit."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import evaluate as evaluate_command
import genmodels
import sample as sample_command
from genmodels import restoration
from genmodels.images import picture_bytes, read_values
from genmodels.noise import LAWS
from genmodels.noise.poisson_gaussian import PoissonGaussian, sample
from genmodels.restoration import AskedNoise, auto_law, find_noise, restore_values
from tests.helpers.boxes import Box
from tests.helpers.paths import ROOT
from tests.helpers.scenes import cloth, psnr, scene

SET12 = Path(os.environ.get("GENMODELS_DATA", "nowhere")) / "denoise/Set12"
X = 0.9 * scene(0) + 0.05
CAMERA = AskedNoise("poisson-gaussian", gain=2.0, offset=100.0, read=3.0)


@pytest.fixture(scope="module")
def model():
    return genmodels.load(ROOT / "pretrained/noise2score_grey")


def photographs():
    """Three clean photographs on [0, 1] where the data are here, else scenes."""
    paths = sorted(SET12.glob("*.png"))[:3]
    pixels = [read_values(p.read_bytes(), p)[64:192, 64:192, 0] / 255 for p in paths]
    return pixels or [0.9 * scene(k) + 0.05 for k in range(3)]


def restored(model, y, law, level):
    image = torch.from_numpy(2 * y - 1).float()[None, None]
    return (model.restore(image, law, level, clip=False)[0][0, 0].double().numpy() + 1) / 2


def camera_picture(peak=400, seed=0, side=128):
    """Return (what a camera of gain 2, offset 100 and read noise 3 saw, its mean), in ADU."""
    light = peak * scene(seed, side)
    y = sample(light, 2, 100, 3, np.random.default_rng(seed))
    return np.round(y).clip(0, 65535).astype(np.uint16), light + 100


# ---- levels beyond the trained range ------------------------------------------------------------
@pytest.mark.parametrize("level", [0.3, 0.5, 1.0, 2.0])
def test_weak_noise_is_never_made_worse(model, level):
    for seed, x in enumerate(photographs()):
        y = LAWS["gaussian"].sample(x, level, np.random.default_rng([0, seed]))
        assert psnr(restored(model, y, "gaussian", level), x) > psnr(y, x)


def test_strong_noise_is_restored_as_what_it_is(model):
    gains = []
    assert "restored as 1, 25 % of the change taken" in model.treatment("gaussian", 0.5)
    for seed, x in enumerate(photographs()):
        y = LAWS["gaussian"].sample(x, 75, np.random.default_rng([0, seed]))
        nearest = float(1.1 * model.levels.max())
        gain = psnr(restored(model, y, "gaussian", 75.0), x)
        gains.append(gain - psnr(restored(model, y, "gaussian", nearest), x))
    assert np.mean(gains) > 2.5, gains
    assert "above the 1 to 54 that the model knows" in model.treatment("gaussian", 75)
    assert "0.533 times the contrast as 39.9" in model.treatment("gaussian", 75)


def test_inside_its_levels_nothing_changes(model):
    y = LAWS["gaussian"].sample(X, 25, np.random.default_rng(0))
    image = torch.from_numpy(2 * y - 1).float()[None, None]
    plain = model.estimate((image + 1) / 2, torch.tensor([25.0])) * 2 - 1
    assert torch.equal(model.restore(image, "gaussian", 25)[0], plain.clamp(-1, 1))
    assert torch.equal(model.restore(image, "gaussian", 25, clip=False)[0], plain)
    assert model.treatment("gaussian", 25) == "" == model.treatment("gaussian", 58)


@pytest.mark.parametrize("kind", ["float", "bytes", "constant", "cartoon"])
def test_a_clean_picture_comes_back_as_it_is(model, kind):
    values = 255 * X
    if kind == "bytes":
        values = np.round(values).astype(np.uint8)
    elif kind == "constant":
        values = np.full((64, 64), 77, np.uint8)
    elif kind == "cartoon":
        values = (np.round(4 * X) * 60).astype(np.uint8)
    noise = find_noise(model, [values], AskedNoise("gaussian"))
    found = restore_values(model, values, noise)
    assert psnr(found, values, 255) > 60, noise
    assert noise.notes  # and it is said


def test_clean_texture_is_left_alone_and_noise_on_it_is_not(model):
    x = cloth()
    noise = find_noise(model, [x], AskedNoise("gaussian"))
    assert noise.level > 4 and np.array_equal(restore_values(model, x, noise), x)
    assert len(noise.notes) == 1 and "looks like texture" in noise.notes[0]
    y = x + 8 * np.random.default_rng(0).standard_normal(x.shape)
    noise = find_noise(model, [y], AskedNoise("gaussian"))
    assert noise.share == 1 and psnr(restore_values(model, y, noise), x) > psnr(y, x) + 0.5


# ---- other noise through the same model ---------------------------------------------------------
@pytest.mark.parametrize(
    ("law", "level", "least"), [("poisson", 0.02, 8), ("gamma", 20.0, 8), ("rayleigh", 1.0, 10)]
)
def test_other_noise_is_made_gaussian(model, law, level, least):
    """Against a Gaussian filter too, of the width that is best for this very picture."""
    y = LAWS[law].sample(X, level, np.random.default_rng(0))
    found = psnr(restored(model, y, law, level), X)
    if law != "rayleigh":  # whose x is no mean of y
        filtered = max(psnr(gaussian_filter(y, s), X) for s in (0.5, 0.75, 1, 1.5, 2))
        assert found > filtered + 0.5
    assert found > psnr(y, X) + least


def test_a_camera_is_restored_told_and_untold(model):
    y, clean = camera_picture()
    black, white = np.quantile(y, [0.001, 0.999])
    told = find_noise(model, [y], CAMERA, black, white)
    found = find_noise(model, [y], AskedNoise("auto"), black, white, limits=(0, 65535), step=1)
    assert told.level == PoissonGaussian.of_camera(2, 100, 3) and not told.notes
    assert found.law == "poisson-gaussian"
    assert found.level.deviation(200) == pytest.approx(told.level.deviation(200), rel=0.06)
    assert found.notes[0].startswith("gain ") and "(+- " in found.notes[0]
    filtered = max(psnr(gaussian_filter(y / 1.0, s), clean, 400) for s in (0.5, 0.75, 1, 1.5, 2))
    for noise in (told, found):
        done = restore_values(model, y, noise, black, white, clip=False)
        assert psnr(done, clean, 400) > filtered + 1.5
        assert abs((done - clean).mean()) < 0.5  # without bias


def test_a_dark_camera_is_not_taken_for_speckle(model):
    """Six photons a pixel: over the darkest pixel the variance grows like a square."""
    light = 30 * scene(1, 256)
    y = np.round(sample(light, 5, 100, 5, np.random.default_rng(1)))
    for black, white in (np.quantile(y, [0.001, 0.999]), (0, 65535)):
        found = auto_law(model, [y], AskedNoise("auto"), black, white, limits=(0, 65535), step=1)
        assert found == "poisson-gaussian"


@pytest.mark.parametrize(("law", "level"), [("gaussian", 20), ("poisson", 0.02), ("gamma", 30)])
def test_other_laws_are_not_taken_for_a_camera(model, law, level):
    y = 255 * LAWS[law].sample(0.9 * scene(1, 256) + 0.05, level, np.random.default_rng(0))
    assert auto_law(model, [y], AskedNoise("auto")) == law


def test_evaluating_adds_noise_of_one_level(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(picture_bytes(np.zeros((20, 20, 1), np.uint8), "png"))
    words = [str(ROOT / "pretrained/noise2score_grey"), f"denoise={tmp_path}/a.png", "level=2"]
    assert evaluate_command.main([*words, "law=poisson-gaussian"]) == 2
    assert "law=poisson-gaussian: choose from gaussian, poisson, gamma" in capsys.readouterr().err


def test_units_of_the_file_change_nothing(model):
    """3 y + 50 with gain 6, offset 350 and read noise 9 gives three times the result and 50."""
    y, _ = camera_picture(side=64)
    y = y.astype(np.float64)
    other = AskedNoise("poisson-gaussian", gain=6.0, offset=350.0, read=9.0)
    done = []
    for values, asked, ends in ((y, CAMERA, (100, 500)), (3 * y + 50, other, (350, 1550))):
        noise = find_noise(model, [values], asked, *ends)
        done.append(restore_values(model, values, noise, *ends, clip=False))
    np.testing.assert_allclose(done[1], 3 * done[0] + 50, rtol=1e-5)


def test_planes_of_a_stack_share_what_is_found(model):
    planes = [camera_picture(seed=k)[0] for k in range(4)]
    pooled = find_noise(model, planes, AskedNoise("poisson-gaussian"), 100, 500, step=1)
    assert pooled.level.gain == pytest.approx(2, rel=0.12)
    flat = [LAWS["gaussian"].sample(X, s, np.random.default_rng(0)) * 255 for s in (10, 20, 30)]
    assert find_noise(model, flat, AskedNoise("gaussian")).level == pytest.approx(20, rel=0.05)
    blank = [np.full((64, 64), 9.0), flat[1]]
    assert find_noise(model, blank, AskedNoise("gaussian")).level == pytest.approx(20, rel=0.05)


def test_a_picture_that_shows_no_gain_is_restored_as_gaussian(model):
    y = 100 + 20 * np.random.default_rng(0).standard_normal((128, 128))
    noise = find_noise(model, [y], AskedNoise("poisson-gaussian"), 40, 160)
    assert noise.law == "gaussian" and noise.level == pytest.approx(20 * 255 / 120, rel=0.05)
    assert noise.notes[0].startswith("noise is not seen to grow with brightness")


@pytest.mark.parametrize("offset", [None, 100.0])
def test_the_read_noise_is_always_told_of(model, offset):
    y, _ = camera_picture()
    asked = AskedNoise("poisson-gaussian", offset=offset)
    (line, *_) = find_noise(model, [y], asked, 100, 500, step=1).notes
    if offset is None:
        assert "read noise not known without offset=" in line
        return
    ((found, error),) = re.findall(r"read noise ([\d.]+) \(\+- ([\d.]+)\) found", line)
    assert abs(float(found) - 3) < 3 * float(error) < 9
    for read in (0.0, 3.0):  # which are used, and so are told of as such
        (line, *_) = find_noise(model, [y], replace(asked, read=read), 100, 500, step=1).notes
        assert f"read noise {read:g} told" in line
    told = replace(asked, gain=2.0)
    (line, *_) = find_noise(model, [y - 2.9 * np.sign(y - 100)], told, 100, 500).notes
    assert line.startswith("gain 2 told, black ")


def test_no_read_noise_that_is_seen_is_said(model):
    light = 400 * scene(0, 192)
    y = sample(light, 2, 106, 0, np.random.default_rng(0))
    asked = AskedNoise("poisson-gaussian", offset=100.0)
    (line, *_) = find_noise(model, [y], asked, 100, 500).notes
    assert "read noise 0 assumed, none is seen" in line


def test_what_is_told_of_a_camera_and_not_used_is_said(model):
    y = 100 + 20 * np.random.default_rng(0).standard_normal((128, 128))
    asked = AskedNoise("poisson-gaussian", offset=90.0)
    (line, *_) = find_noise(model, [y], asked, 40, 160).notes
    assert line.endswith("restored as gaussian, without offset=90")


def white_balanced(gains, side=96):
    """Return (pixels (H, W, 3) of which each colour has a gain of its own, their mean)."""
    clean = 400 * scene(0, side)[..., None] * np.array([1.0, 0.8, 0.6])
    rng = np.random.default_rng(0)
    y = np.stack([sample(clean[..., k], gain, 100, 3, rng) for k, gain in enumerate(gains)], -1)
    return np.round(y).astype(np.uint16), clean + 100


def test_each_colour_of_a_white_balanced_picture_has_its_gain(model, monkeypatch, capsys):
    y, clean = white_balanced((1.5, 2.5, 4.0))
    done = model.denoise(y, law="poisson-gaussian")
    said = capsys.readouterr().err
    (found,) = re.findall(
        r"the gains differ, red ([\d.]+), green ([\d.]+), blue ([\d.]+): each", said
    )
    assert [float(gain) for gain in found] == pytest.approx([1.5, 2.5, 4.0], rel=0.25)
    assert "red: gain 1." in said and "blue: gain " in said
    monkeypatch.setattr(restoration.noise, "_gains_apart", lambda *told: "")
    shared = model.denoise(y, law="poisson-gaussian", verbose=False)
    assert psnr(done, clean, 400) > psnr(shared, clean, 400) + 1


def test_one_gain_of_all_colours_is_found_from_all(model):
    y, _ = white_balanced((2.5, 2.5, 2.5))
    noise = find_noise(model, [y], AskedNoise("poisson-gaussian"), 90, 500, step=1)
    assert not noise.channels and noise.level.gain == pytest.approx(2.5, rel=0.15)


def test_a_colour_model_says_that_gains_differ():
    colour = Box(channels=3)
    y, _ = white_balanced((1.5, 2.5, 4.0))
    noise = find_noise(colour, [y], AskedNoise("poisson-gaussian", correlated="ignore"), 90, 500)
    (line,) = (note for note in noise.notes if "gains differ" in note)
    assert line.endswith("one is used for all: save the colours as grey pictures")


def test_noise_that_cannot_be_measured_is_not_called_none(model, capsys):
    y = (128 + 25 * np.random.default_rng(0).standard_normal((16, 16))).astype(np.uint8)
    np.testing.assert_array_equal(model.denoise(y), y)
    assert (
        "too few patches without structure to measure its noise by; left as it is: tell level="
        in (capsys.readouterr().err)
    )
    noise = find_noise(model, [y], AskedNoise("poisson-gaussian"))
    assert noise.notes[-1].endswith(restoration.noise.CAMERA_REMEDY)
    other = restoration.Noise("gaussian", 20.0)
    summary = restoration.files.noise_summary([noise, other])
    assert summary == "law gaussian, level 20; noise of 1 not measured"
    with pytest.raises(ValueError, match="got 8 x 16; tell gain=, offset= and read= of law=pois"):
        find_noise(model, [y[:8]], AskedNoise("poisson-gaussian"))


def test_a_level_beyond_the_law_is_told_of(model):
    y = 2000 * np.random.default_rng(0).standard_normal((64, 64))
    noise = find_noise(model, [y], AskedNoise("gaussian"), 0, 1000)
    assert noise.level == 255 and noise.notes[0].startswith("level 5")
    assert (
        "found, where gaussian noise has 0.1 to 255; restored with 255: look at" in noise.notes[0]
    )


# ---- noise that neighbours share ----------------------------------------------------------------
def test_shared_noise_is_said_and_its_level_raised(model):
    x = 0.8 * scene(3, 256) + 0.1
    u = gaussian_filter(np.random.default_rng(0).standard_normal(x.shape), 0.5)
    y = 255 * x + 25 * u / u.std()
    gains = {}
    for word in ("raise", "shuffle", "ignore"):
        noise = find_noise(model, [y], AskedNoise("gaussian", correlated=word))
        gains[word] = psnr(restore_values(model, y, noise), 255 * x, 255)
        said = any("neighbours is correlated" in note for note in noise.notes)
        assert said == (word == "raise") and noise.shuffled == (word == "shuffle")
    assert gains["raise"] > gains["ignore"] + 1 < gains["shuffle"]
    told = find_noise(model, [y], AskedNoise("gaussian", level=25.0))
    assert told.level == 25 and not told.notes


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (33, 40), (31, 17, 3)])
def test_shuffled_pictures_of_any_size_are_put_together(model, shape):
    values = np.random.default_rng(0).uniform(90, 110, shape)
    noise = restoration.Noise("gaussian", 10.0, shuffled=True)
    found = restore_values(model, values, noise)
    for i in range(2):
        for j in range(2):
            if (part := values[i::2, j::2]).size:
                wanted = restore_values(model, part, restoration.Noise("gaussian", 10.0))
                np.testing.assert_array_equal(found[i::2, j::2], wanted)


# ---- several passes -----------------------------------------------------------------------------
def test_several_passes_are_better_than_one(model):
    x = photographs()[0]
    y = LAWS["gaussian"].sample(x, 25, np.random.default_rng(0))
    image = torch.from_numpy(2 * y - 1).float()[None]
    scores = []
    for kind in (False, 4, 8):
        done = restoration.restore(model, image, "gaussian", 25.0, ensemble=kind)
        scores.append(psnr((done[0].numpy() + 1) / 2, x))
    assert scores[1] > scores[0] + 0.04 and scores[2] > scores[0] + 0.04, scores


# ---- the command --------------------------------------------------------------------------------
def test_a_camera_file_through_the_command(tmp_path, capsys):
    y, clean = camera_picture()
    (tmp_path / "a.tif").write_bytes(picture_bytes(y[..., None], "tiff"))
    words = [str(ROOT / "pretrained/noise2score_grey"), f"denoise={tmp_path}/a.tif", "law=auto"]
    assert sample_command.main([*words, f"out={tmp_path}/out"]) == 0
    done = read_values((tmp_path / "out/a.tif").read_bytes(), "a.tif")[..., 0]
    assert done.dtype == np.uint16
    assert psnr(done.astype(float), clean, 400) > psnr(y.astype(float), clean, 400) + 7.5
    shown = capsys.readouterr()
    assert "law poisson-gaussian, gain 2." in shown.out and "black 9" in shown.out
    assert shown.err.startswith("a.tif: gain 2.")


# ---- arrays -------------------------------------------------------------------------------------
def test_denoise_takes_arrays_in_their_unit(model, capsys):
    y, clean = camera_picture()
    done = model.denoise(y, law="poisson-gaussian", gain=2, offset=100, read=3, tile=96)
    assert done.dtype == np.float32 and done.shape == y.shape
    assert psnr(done, clean, 400) > psnr(y.astype(float), clean, 400) + 8
    assert capsys.readouterr().err == ""
    stack = np.stack([y, y])[..., None]
    found = model.denoise(stack, law="auto")
    np.testing.assert_array_equal(found[0], found[1])
    assert found.shape == stack.shape and capsys.readouterr().err.count("gain ") == 2
    model.denoise(stack, law="auto", verbose=False)
    assert capsys.readouterr().err == ""
    eight = np.round(255 * LAWS["gaussian"].sample(X, 25, np.random.default_rng(0))).clip(0, 255)
    eight = eight.astype(np.uint8)
    plain = restoration.restore(
        model, torch.from_numpy(eight / 127.5 - 1).float()[None], "gaussian", 25.0
    )
    found = model.denoise(eight, level=25)
    np.testing.assert_allclose(found, (plain[0].numpy() + 1) * 127.5, atol=1e-4)
    assert not np.array_equal(model.denoise(eight, level=25, ensemble=4), found)


@pytest.mark.parametrize(
    ("dtype", "scale", "shift"),
    [
        (np.float32, 4000, -40),
        (np.int16, 1500, -1000),
        (">u2", 4000, 100),
        (np.int32, 10**6, -(10**5)),
    ],
)
def test_numbers_of_any_range_are_not_cut_off(model, dtype, scale, shift):
    """Told and untold; a level counts on 0..255 for floats, on the type's range for numbers."""
    y = scale * LAWS["gaussian"].sample(X, 25, np.random.default_rng(0)) + shift
    y = (y.clip(0) if dtype == ">u2" else y).astype(dtype)
    top = 255 if y.dtype.kind == "f" else np.iinfo(y.dtype).max
    level = 25 * scale / top
    before = psnr((y.astype(float) - shift) / scale, X)
    for options in ({}, {"level": level}, {"level": 25, "black": shift, "white": shift + scale}):
        if y.dtype.kind == "f" and options == {"level": level}:
            continue  # refused: below
        found = model.denoise(y, verbose=False, **options)
        assert psnr((found - shift) / scale, X) > before + 8, options


def test_a_level_told_of_floats_that_are_not_on_0_to_255_is_refused(model):
    y = (4000 * X).astype(np.float32)
    with pytest.raises(
        ValueError, match=r"floats are on the scale 0\.\.255, on which levels count"
    ):
        model.denoise(y, level=25)
    assert np.isfinite(model.denoise(y, law="gamma", level=50, verbose=False)).all()


@pytest.mark.parametrize("value", [1000.0, -3.0, 0.5])
def test_constant_floats_come_back_as_they_are(model, value):
    for dtype in (np.float32, np.int16):
        array = np.full((64, 64), value, dtype)
        np.testing.assert_array_equal(model.denoise(array, verbose=False), array)


def test_hot_pixels_stay_where_they_are(model):
    """They are kept from the network, which would spread them."""
    y, clean = camera_picture(60, side=160)
    alone = model.denoise(
        y, law="poisson-gaussian", gain=2, offset=100, read=3, white=160, black=90
    )
    hot = y.copy()
    hot[80, 80] = 65535
    found = model.denoise(
        hot, law="poisson-gaussian", gain=2, offset=100, read=3, white=160, black=90
    )
    ring = np.hypot(*np.mgrid[-80:80, -80:80]) > 4
    assert found[80, 80] > 60000
    assert psnr(found[ring], clean[ring], 60) > psnr(alone[ring], clean[ring], 60) - 0.5


def test_an_offset_above_the_light_is_refused(model):
    y, _ = camera_picture()
    with pytest.raises(ValueError, match="offset=9000: is brighter than nearly all of the picture"):
        model.denoise(y, law="poisson-gaussian", gain=2, offset=9000, read=1)


def test_noise_that_grows_from_black_wants_pixels_above_it(model):
    y = (-1100 + 200 * X).astype(np.int16)
    with pytest.raises(
        ValueError, match="law=poisson: its noise grows from black=0 on, and hardly"
    ):
        model.denoise(y, law="poisson")


def test_auto_does_not_depend_on_the_scale_of_numbers(model, capsys):
    y = LAWS["gamma"].sample(0.9 * scene(1, 256) + 0.05, 20, np.random.default_rng(0))
    laws = set()
    for scaled in (y, 255 * y, (1000 * y).round().clip(0, 65535).astype(np.uint16)):
        picture = restoration.files._picture_of(np.asarray(scaled))
        asked = restoration.options.DenoiseOptions(law="auto")
        (job,) = restoration.jobs.jobs_of(model, picture, AskedNoise("auto"), asked)
        laws.add(job.noise.law)
    assert laws == {"gamma"}


def test_shared_noise_is_looked_for_in_planes_that_have_some(model, capsys):
    noise = gaussian_filter(np.random.default_rng(0).standard_normal((4, 128, 128)), (0, 0.8, 0.8))
    y = (1000 * (X + 25 / 255 * noise / noise.std())).astype(np.float32)
    padded = np.concatenate([np.full((1, 128, 128), 300, np.float32), y])
    for stack in (y, padded):
        found = find_noise(model, list(stack), AskedNoise("gaussian"), 0.0, 1000.0)
        assert any("the noise of neighbours is correlated" in note for note in found.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"law": "rice"}, "law=rice: choose from gaussian, poisson-gaussian"),
        ({"law": "poisson-gaussian", "level": 3}, "level=3: law=poisson-gaussian takes gain=, off"),
        ({"law": "poisson-gaussian", "read": 3}, "read=3: needs offset= too"),
        ({"gain": 3}, "gain=3: is of law=poisson-gaussian; name it"),
        ({"level": 0}, "level=0: must be above 0, at most 255"),
        ({"level": "abc"}, "level='abc': must be a number, or auto"),
        ({"level": [25]}, r"level=\[25\]: must be a number, or auto"),
        ({"level": True}, "level=True: must be a number, or auto"),
        ({"law": "poisson-gaussian", "gain": "2"}, "gain=2: must be a number"),
        ({"tiles": 3}, "option=tiles: choose from law, level, gain"),
        ({"ensemble": 5}, "ensemble=5: choose from false"),
        ({"black": 9, "white": 3}, "white=3: must be above black=9"),
    ],
)
def test_denoise_says_what_it_cannot_do(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.denoise(np.zeros((64, 64), np.uint8), **options)


def test_denoise_refuses_other_arrays(model):
    for array in (np.zeros((2, 8, 8, 2)), np.zeros(5), np.zeros((8, 8), int), np.zeros((0, 4))):
        with pytest.raises(ValueError, match=r"picture=.* must be \(H, W\), \(H, W, 1 or 3\) or"):
            model.denoise(array)
    with pytest.raises(ValueError, match="picture=nan: its pixels must be finite numbers"):
        model.denoise(np.full((8, 8), np.nan))
