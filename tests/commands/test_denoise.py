"""sample.py denoise=: noisy images in, restored ones out; pictures of any size.

Files in and out: images/test_pictures. evaluate.py denoise=: evaluation/test_restoration.
"""

import os
import sys
import types

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import genmodels
import sample
from genmodels import checkpoint, distributed, images, restoration
from genmodels.config import check
from genmodels.data import ImageDataModule
from genmodels.generation import NonFinite
from genmodels.images import pictures, to_uint8
from tests.helpers.boxes import Box
from tests.helpers.paths import ROOT
from tests.helpers.restoring_words import random_levels, run, save
from tests.helpers.tiny import TINY, last_words


@pytest.fixture(scope="module")
def trained():
    """A GBM fitted to the digits, whose last layer is not zero."""
    model = genmodels.build(str(ROOT / "configs/gbm_digits.yaml"), *TINY, "method.sigma_max=1.5")
    model.prepare(ImageDataModule(model.cfg.data))
    torch.manual_seed(0)
    nn.init.normal_(model.net.net.unet.conv_out.weight, std=0.05)
    return model.eval()


def test_denoise_command(trained, tmp_path):
    """Files in, files out in their order; the level given or estimated."""
    run = checkpoint.write_export(trained, tmp_path / "model", "card")
    pixels = ImageDataModule(trained.cfg.data).held_out[0][:5]
    for i, picture in enumerate(pixels):
        (tmp_path / "noisy").mkdir(exist_ok=True)
        images.write_png(tmp_path / "noisy" / f"{i}.png", picture)
    words = [str(run), f"denoise={tmp_path}/noisy", "law=lognormal"]
    assert sample.main([*words, "level=0.2", f"out={tmp_path}/a"]) == 0
    expected = trained.restore(images.from_uint8(pixels), "lognormal", 0.2)[0]
    assert torch.equal(images.read_images(tmp_path / "a"), to_uint8(expected))
    assert sample.main([*words, "level=auto", "batch=2", f"out={tmp_path}/b"]) == 0
    assert len(list((tmp_path / "b").glob("[0-9]*.png"))) == 5
    floats = (pixels.permute(0, 2, 3, 1).numpy() * 1.5).astype(np.float32)  # beyond 255
    np.save(tmp_path / "noisy.npy", floats)
    assert (
        sample.main(
            last_words([*words, f"denoise={tmp_path}/noisy.npy", "level=0.2", f"out={tmp_path}/c"])
        )
        == 0
    )
    noisy = torch.from_numpy(floats).permute(0, 3, 1, 2) / 127.5 - 1
    expected = trained.restore(noisy, "lognormal", 0.2)[0]
    assert torch.equal(images.read_images(tmp_path / "c"), to_uint8(expected))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["law=poisson", "level=1"], "law=poisson: choose from lognormal"),
        (["law=lognormal", "level=9"], "level=9.0: this model knows 0.005 to 1.5"),
        (["law=lognormal", "level=much"], "level=much: must be a number, or auto"),
        (["law=lognormal", "level=plane"], "level=plane: must be a number, or auto"),
        (["law=lognormal", "white=9"], "white=9: GBM does not take it; leave it out"),
        (["law=lognormal", "axes=TYX"], "axes=TYX: GBM does not take it; leave it out"),
        (["level=0.1"], "law=: choose from lognormal"),
        (["law=lognormal", "level=0.1", "format=npz"], "format=npz: choose from png"),
        (["law=lognormal", "level=0.1", "steps=3"], "unknown key steps=3"),
        (["law=lognormal", "level=0.1", "denoise=nowhere"], "no such folder, .zip or .npz"),
    ],
)
def test_denoise_command_refuses(trained, tmp_path, capsys, words, message):
    run = checkpoint.write_export(trained, tmp_path / "model", "card")
    images.write_png(tmp_path / "1.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
    words = [str(run), f"denoise={tmp_path}/1.png", f"out={tmp_path}/o", *words]
    assert sample.main(last_words(words)) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 and not (tmp_path / "o").exists()


def test_a_model_that_restores_nothing_says_so(tmp_path, capsys):
    images.write_png(tmp_path / "1.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
    assert sample.main(["edm_digits", f"denoise={tmp_path}/1.png", f"out={tmp_path}/o"]) == 2
    errors = capsys.readouterr().err
    assert "1.png: EDM restores no pictures; noise2score does" in errors


@pytest.mark.parametrize("value", [np.inf, np.nan, -300.0])
def test_a_bad_image_is_refused_before_any_is_written(trained, tmp_path, capsys, value):
    """The scale is 0..255 and the offset 1: -255 has no logarithm, nor has what is not finite."""
    run = checkpoint.write_export(trained, tmp_path / "model", "card")
    noisy = np.full((3, 8, 8, 1), 100, np.float32)
    noisy[2, 4, 4] = value
    np.save(tmp_path / "noisy.npy", noisy)
    words = [f"denoise={tmp_path}/noisy.npy", "law=lognormal", "level=0.2", "batch=1"]
    assert sample.main([str(run), *words, f"out={tmp_path}/o"]) == 2
    assert "keeps pixels finite, above -offset = -1.0" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    np.save(tmp_path / "noisy.npy", noisy[:0])
    assert sample.main([str(run), *words, f"out={tmp_path}/o"]) == 2
    assert "0 images of shape (1, 8, 8), must be one or more" in capsys.readouterr().err


def test_a_conditional_model_asks_for_labels(tmp_path, capsys):
    """Without one it would be given the embedding of no class, which no training has touched."""
    model = genmodels.build(str(ROOT / "configs/gbm_digits.yaml"), *TINY, "data.labels=true").eval()
    run = checkpoint.write_export(model, tmp_path / "model", "card")
    images.write_png(tmp_path / "1.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
    words = [str(run), f"denoise={tmp_path}/1.png", "law=lognormal", "level=0.1"]
    assert sample.main([*words, f"out={tmp_path}/o"]) == 2
    assert "labels=: this model was trained with a class" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert sample.main([*words, "labels=3", f"out={tmp_path}/o"]) == 0


# ------------------------------------------------------------------------------------------------
# Pictures of any size: tiles, law and level, refusals


# ---- tiles --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tile", "overlap"), [(16, 3), (13, 6), (7, 2), (64, 8), (96, 32)])
@pytest.mark.parametrize("size", [1, 6, 7, 16, 17, 63, 97, 200])
def test_tiles_own_each_pixel_once_and_see_around_it(size, tile, overlap):
    end = 0
    for (start, stop), (first, last) in restoration.cuts(size, tile, overlap):
        assert first == end and 0 <= start <= first < last <= stop <= size
        assert start in (0, first - overlap) and (stop == size or stop >= last + overlap)
        assert stop - start <= tile and (tile % 32 or overlap % 32 or start % 32 == 0)
        end = last
    assert end == size


@pytest.mark.parametrize(("height", "width"), [(70, 45), (40, 41), (1, 90), (16, 16)])
def test_tiled_is_whole_where_the_network_looks_no_further_than_the_overlap(height, width):
    image = torch.randn(1, height, width, generator=torch.Generator().manual_seed(0))
    for radius in (2, 4):
        model = Box(radius=radius)
        whole = restoration.restore(model, image, "gaussian", 25)
        assert torch.equal(whole, model.restore(image[None], "gaussian", 25)[0][0])
        tiled = restoration.restore(model, image, "gaussian", 25, tile=24, overlap=4)
        assert torch.equal(tiled, whole)
    far = Box(radius=5)
    if max(height, width) > 24:
        whole = restoration.restore(far, image, "gaussian", 25)
        tiled = restoration.restore(far, image, "gaussian", 25, tile=24, overlap=4)
        assert not torch.equal(tiled, whole)


def test_the_ensemble_is_the_mean_of_eight_orientations():
    model = Box(radius=1, shift=2)  # which moves the picture: no orientation is like another
    x = torch.randn(2, 1, 6, 9, generator=torch.Generator().manual_seed(0))
    total = np.zeros((2, 1, 6, 9))
    for turns in range(4):
        for mirror in (False, True):
            view = np.rot90(np.flip(x.numpy(), 2) if mirror else x.numpy(), turns, (2, 3))
            done = model.restore(torch.from_numpy(view.copy()), "gaussian", 25)[0].numpy()
            done = np.rot90(done, -turns, (2, 3))
            total += np.flip(done, 2) if mirror else done
    found = restoration.ensembled(lambda part: model.restore(part, "gaussian", 25)[0], x)
    assert np.abs(found.numpy() - total / 8).max() < 1e-6
    assert not torch.allclose(found, model.restore(x, "gaussian", 25)[0], atol=0.1)
    one = restoration.restore(model, x[0], "gaussian", 25, ensemble=True)
    assert torch.equal(one, restoration.ensembled(lambda p: model.restore(p, "", 25)[0], x[:1])[0])


def test_four_and_eight_passes_see_shifted_pictures_and_put_them_back():
    """A filter that knows no places gives the same inside, whatever is moved; the edges differ."""
    x = torch.rand(1, 20, 26, generator=torch.Generator().manual_seed(0)) - 0.5
    model = Box(radius=1)
    plain = restoration.restore(model, x, "gaussian", 25)
    for kind, count in ((4, 4), (8, 8), ("true", 8)):
        model.seen.clear()
        found = restoration.restore(model, x, "gaussian", 25, ensemble=kind)
        assert len(model.seen) == count
        assert torch.allclose(found[:, 1:-1, 1:-1], plain[:, 1:-1, 1:-1], atol=1e-6)
    sizes = {tuple(seen.shape[2:]) for seen in model.seen}
    assert sizes == {(20, 26), (26, 20)}  # of true none is moved
    moved = Box(radius=0, shift=1)  # to the right, also what was moved down before
    restoration.restore(moved, x, "gaussian", 25, ensemble=4)
    assert [tuple(s.shape[2:]) for s in moved.seen] == [(20, 26), (21, 27), (22, 29), (23, 28)]
    assert torch.equal(moved.seen[2][0, :, 2:, 3:], x)
    assert restoration.restore(model, x[:, :1, :1], "gaussian", 25, ensemble=4).shape == (1, 1, 1)


def test_a_grey_model_restores_a_colour_picture_channel_by_channel():
    image = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0))
    model = Box(radius=2)
    found = restoration.restore(model, image, "gaussian", 25, tile=16, overlap=2)
    for channel in range(3):
        one = restoration.restore(model, image[channel : channel + 1], "gaussian", 25)
        assert torch.equal(found[channel : channel + 1], one)
    colour = Box(channels=3)
    restoration.restore(colour, image, "gaussian", 25)
    assert colour.seen[-1].shape == (1, 3, 20, 30)
    with pytest.raises(ValueError, match=r"is grey, this model restores 3 channels; take a model"):
        restoration.planes(colour, image[:1])


def test_pixels_that_are_no_numbers_stop_the_work():
    model = Box()
    model.restore = lambda x, law, level: (torch.full_like(x, torch.nan), None)
    with pytest.raises(NonFinite, match="law=gaussian, level=25"):
        restoration.restore(model, torch.zeros(1, 4, 4), "gaussian", 25)


def test_the_sheet_shows_noisy_beside_restored(box, tmp_path):
    box(radius=1)
    for k in range(5):
        save(tmp_path / "in" / f"{k}.png", np.full((10 + k, 300), 20 * k, np.uint8))
    assert run(tmp_path / "in", tmp_path / "out", "law=gaussian", "level=25") == 0
    sheet = images.read_image(tmp_path / "out" / "before_after.png")
    step = 13 + 1 + pictures.LINE
    assert sheet.shape == (3, 4 * step + 1, 2 * 257 + 1)  # of the first four
    for k in range(4):  # flat ones are shown as they are
        rows = sheet[:, 1 + step * k : 11 + k + step * k]
        assert (rows[:, :, 1:257] == 20 * k).all() and (rows[:, :, 258:514] == 20 * k).all()
    assert run(tmp_path / "in", tmp_path / "out", "law=gaussian", "level=25") == 0  # once more


def test_both_halves_of_the_sheet_are_shown_by_one_map(box, tmp_path):
    """Of 12 bits in 16: black and white are quantiles of what is restored, and stand below."""
    box(radius=2)
    rng = np.random.default_rng(0)
    noisy = (400 + 5.0 * np.arange(120) + rng.normal(0, 40, (60, 120))).round().astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", noisy)
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian") == 0
    restored = tifffile.imread(tmp_path / "out" / "a.tif")
    low, high = np.quantile(restored, [0.001, 0.999], method="inverted_cdf").astype(float)
    sheet = images.read_image(tmp_path / "out" / "before_after.png")
    assert sheet.shape == (3, 60 + 2 + pictures.LINE, 2 * 121 + 1)
    for values, left in ((noisy, 1), (restored, 122)):
        expected = ((values - low) / (high - low) * 255 + 0.5).clip(0, 255)
        found = sheet[0, 1:61, left : left + 120].numpy()
        assert np.abs(found - expected).max() < 1.01
    line = Image.new("L", (200, pictures.LINE), 128)
    text = f"black {low:.5g}, white {high:.5g}"
    font = ImageFont.load_default_imagefont()
    ImageDraw.Draw(line).text((0, 0), text, 255, font)
    assert np.array_equal(sheet[1, 61 : 61 + pictures.LINE, 1:200], np.array(line)[:, :199])


def test_processes_take_their_shares(box, tmp_path, monkeypatch):
    model = box()
    for k in range(5):
        save(tmp_path / "in" / f"{k}.png", random_levels(6, 6 + k))
    options = restoration.DenoiseOptions(denoise=f"{tmp_path}/in", law="gaussian", level="25")
    waited = []
    monkeypatch.setattr(distributed, "barrier", lambda: waited.append(1))
    monkeypatch.setattr(distributed, "gather_to_all", lambda found: [found])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        restoration.denoise(model, options, tmp_path / "out")
        there = sorted(p.name for p in (tmp_path / "out").iterdir())
        if rank == 1:
            assert there == ["1.png", "3.png"]
    assert there == [*(f"{k}.png" for k in range(5)), "before_after.png"] and len(waited) == 2


# ---- law and level ------------------------------------------------------------------------------
def test_the_level_is_found_once_for_each_picture(box, tmp_path, capsys):
    model = box()
    save(tmp_path / "in" / "a.png", random_levels(60, 50))
    save(tmp_path / "in" / "b.png", random_levels(60, 50, 3) // np.array([1, 4, 2], np.uint8))
    words = ["law=gaussian", "level=auto", "tile=40", "overlap=4"]
    assert run(tmp_path / "in", tmp_path / "out", *words) == 0
    assert (
        model.asked == [(1, 60, 50)] * 4
    )  # whole, not its tiles; of a colour picture each channel
    assert len(model.told) == 8 and len(set(model.told)) == 2  # tiles of a picture share it
    wanted = [np.array(Image.open(tmp_path / "in" / f"{name}.png")) / 1.0 for name in "ab"]
    wanted = [wanted[0].std(), wanted[1][..., 2].std()]  # the middle one of three
    assert model.told[::4] == pytest.approx(wanted, rel=1e-5)
    low, high = sorted(wanted)
    line = f"2 pictures restored, law gaussian, level {low:.3g} to {high:.3g}: "
    assert capsys.readouterr().out.startswith(line)


def test_a_level_that_the_model_does_not_know_names_the_picture(box, tmp_path, capsys):
    box(laws=("lognormal",))
    levels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    save(tmp_path / "in" / "a.png", levels)  # as a level of lognormal: too large
    assert run(tmp_path / "in", tmp_path / "out") == 2
    errors = capsys.readouterr().err
    assert "level=7" in errors and errors.endswith("logarithm of the factor) (a.png)\n")


def test_a_level_found_beyond_the_training_is_brought_to_the_nearest(box, tmp_path, capsys):
    model = box()
    model.most = 20
    save(tmp_path / "in" / "a.png", np.full((32, 32), 51, np.uint8))
    save(tmp_path / "in" / "b.png", random_levels(32, 32))
    assert run(tmp_path / "in", tmp_path / "out", "law=gaussian", "level=21") == 2
    assert "level=21: this model knows up to 20" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # a level that is told is not changed
    assert run(tmp_path / "in", tmp_path / "out", "law=gaussian") == 0
    assert model.told == [20]  # a.png is left as it is
    weak, beyond = capsys.readouterr().err.splitlines()
    assert weak.startswith("a.png: so weak a noise may as well be fine texture: 0 % of it")
    assert beyond.startswith("b.png: level 7") and beyond.endswith("model knows, 20")


def test_a_picture_without_noise_stops_the_work_before_the_first_is_written(
    box, tmp_path, capsys, monkeypatch
):
    model = box()

    def noise_level(image, law):
        check(image.std() > 1e-3, "level", "auto", "the picture has no noise to measure")
        return 20.0

    monkeypatch.setattr(model, "noise_level", noise_level)
    save(tmp_path / "in" / "a.png", random_levels(32, 32))
    save(tmp_path / "in" / "b.png", np.full((32, 32), 51, np.uint8))
    assert run(tmp_path / "in", tmp_path / "out", "law=gaussian") == 2
    assert "no noise to measure (b.png)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_law_may_be_left_out_or_found(box, tmp_path, capsys, monkeypatch):
    picked = []

    def pick_law(y):
        picked.append(y)
        return "poisson" if len(picked) % 2 else "gaussian"

    levels = types.SimpleNamespace(pick_law=pick_law)
    monkeypatch.setitem(sys.modules, "genmodels.noise.levels", levels)
    model = box()
    save(tmp_path / "in" / "a.png", np.full((32, 33), 51, np.uint8))
    noisy = random_levels(32, 33)
    save(tmp_path / "in" / "b.png", noisy)
    assert run(tmp_path / "in", tmp_path / "o", "law=auto") == 0
    assert capsys.readouterr().out.startswith(
        f"2 pictures restored, law gaussian, level {noisy.std():.3g}; law poisson, level 0.05: "
    )
    assert model.laws == ["poisson", "gaussian"] and picked[0].dtype == torch.float64
    assert torch.allclose(picked[0], torch.tensor(0.2).double()) and picked[0].shape == (1, 32, 33)
    model = box(laws=("gaussian",))
    assert run(tmp_path / "in", tmp_path / "o", "level=20") == 0 and model.told == [20.0, 20.0]
    assert run(tmp_path / "in", tmp_path / "new", "law=auto") == 2
    assert "law=auto: finds poisson noise, this model knows gaussian" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_bf16_and_the_ensemble_reach_the_network(box, tmp_path):
    model = box(shift=1)
    save(tmp_path / "a.png", random_levels(12, 12))
    assert run(tmp_path / "a.png", tmp_path / "o", "law=gaussian", "level=9", "ensemble=yes") == 0
    assert len(model.told) == 8 and model.autocast == [False] * 8
    assert run(tmp_path / "a.png", tmp_path / "o", "law=gaussian", "level=9", "precision=bf16") == 0
    assert model.autocast[8:] == [True]


# ---- bad input ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["law=rice", "level=1"], "law=rice: choose from gaussian, poisson, auto"),
        (["level=25"], "law=: choose from gaussian, poisson, auto"),
        (["law=gaussian", "level=900"], "level=900.0: must be 0.1 to 255"),
        (["law=gaussian", "level=much"], "level=much: must be a number, or auto"),
        (["law=gaussian", "level=nan"], "level=nan: this model knows up to inf"),
        (
            ["law=auto"],
            "law=auto: needs a picture of 32 x 32 pixels at least; name the law (a.png)",
        ),
        (["law=auto", "level=25"], "level=25: law=auto does not know its unit; name the law"),
        (["law=gaussian", "tile=64"], "tile=64: must be larger than twice the overlap, 64"),
        (["law=gaussian", "overlap=-1"], "overlap=-1: must be >= 0"),
        (["law=gaussian", "tile=big"], "tile=big: must be a whole number"),
        (["law=gaussian", "ensemble=3"], "ensemble=3: choose from false, no, 0, true, yes, 1, 4"),
        (["law=gaussian", "gain=2"], "gain=2: is of law=poisson-gaussian; name it, or leave"),
        (["law=gaussian", "read=0"], "read=0: is of law=poisson-gaussian; name it, or leave"),
        (["law=gaussian", "gain=0"], "gain=0: must be > 0"),
        (["law=gaussian", "correlated=no"], "correlated=no: choose from raise, shuffle, ignore"),
        (["law=gaussian", "labels=3"], "labels=3: this model is unconditional"),
        (["law=gaussian", "format=npz"], "format=npz: choose from png"),
        (["law=gaussian", "steps=3"], "unknown key steps=3"),
        (["law=gaussian", "num=3"], "num=3: denoise= does not take it; leave it out"),
        (["law=gaussian", "mask=m.png"], "mask=m.png: denoise= does not take it; leave it out"),
        (["denoise=", "tile=64"], "tile=64: needs denoise="),
        (["law=gaussian", "denoise={dir}/none"], "none: no such picture, .npy, folder or .zip"),
        (["law=gaussian", "denoise={dir}/a.txt"], "a.txt: no such picture, .npy, folder or .zip"),
        (["law=gaussian", "denoise={dir}/empty"], "empty: holds no picture (.png, .jpg,"),
        (["law=gaussian", "denoise={dir}/cut"], "b.png: cannot be read"),
        (["law=gaussian", "denoise={dir}/twice"], "a.jpg and a.png would both become a.png"),
        (["law=gaussian", "denoise={dir}/nan.npy"], "nan.npy: holds NaN or infinite pixels; mend"),
        (["law=gaussian", "denoise={dir}/inf.tif"], "inf.tif: holds NaN or infinite pixels; mend"),
        (["law=gaussian", "denoise={dir}/int.npy"], "int.npy: is int64 (4, 4); must be (H, W)"),
        (["law=gaussian", "denoise={dir}/five.npy"], "five.npy: is float64 (4, 4, 5); must be"),
        (["law=gaussian", "denoise={dir}/no.npy"], "no.npy: has shape (0, 4): holds no picture"),
        (
            ["law=gaussian", "denoise={dir}/pickle.npy"],
            "pickle.npy: cannot be read (it holds Python",
        ),
        (["law=gaussian", "denoise={dir}/wide.tif"], "wide.tif: holds int64; convert it to 32"),
        (
            ["law=gaussian", "scale=file", "denoise={dir}/unit.tif"],
            "unit.tif: its brightest pixel is 1.2; fl",
        ),
        (
            ["law=gaussian", "level=25", "denoise={dir}/unit.npy"],
            "unit.npy: its brightest pixel is 1.2; fl",
        ),
        (["law=gaussian", "denoise={dir}/two.tif"], "two.tif[1]: cannot be read (it is cut off"),
        (["law=gaussian", "estimator=corrected"], "estimator=corrected: choose from law"),
        (["law=gaussian", "out={dir}/a.txt"], "a.txt: is a file; name a folder"),
        (["law=gaussian", "out={dir}"], "is the folder of the noisy picture; name another"),
        (["law=gaussian", "denoise={dir}/cut", "out={dir}/cut/o"], "lies in the folder of the"),
        (["law=gaussian", "denoise={dir}/good", "out={dir}/cut"], "holds 2 other pictures (a.png,"),
        (["law=gaussian", "denoise={dir}/before_after.png"], "before_after.png will be the sheet"),
        (
            ["law=gaussian", "denoise={dir}/file.zarr"],
            "file.zarr: is a file, and Zarr is a folder; unpack it",
        ),
        (
            ["law=gaussian", "denoise={dir}/chunks.zarr/"],
            "chunks.zarr: is no Zarr folder, for it has none of zarr",
        ),
        (
            ["law=gaussian", "denoise={dir}/mixed"],
            "mixed/b.zarr: is no Zarr folder, for it has none of zarr.json",
        ),
        (
            ["law=gaussian", "out={dir}/new.zarr"],
            "new.zarr: names a Zarr folder; name the folder around it",
        ),
        (
            ["law=gaussian", "out={dir}/there"],
            "there: holds a folder a.png, which is no picture; move it away",
        ),
        (
            ["law=gaussian", "denoise={dir}/some.zarr", "out={dir}/taken"],
            "taken: holds a folder some.zarr, which",
        ),
        (
            ["law=gaussian", "denoise={dir}/some.zarr", "out={dir}/full"],
            "full: holds a file some.zarr, not a Zarr",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(box, tmp_path, capsys, words, message):
    box()
    good = random_levels(8, 8)
    for name in (
        "a.png",
        "before_after.png",
        "cut/a.png",
        "cut/b.png",
        "twice/a.png",
        "good/c.png",
    ):
        save(tmp_path / name, good)
    (tmp_path / "cut" / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    Image.fromarray(good).save(tmp_path / "twice" / "a.jpg")
    save(tmp_path / "mixed" / "a.png", good)
    for name in ("chunks.zarr/0", "mixed/b.zarr/0", "some.zarr/.zgroup", "full/some.zarr"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "file.zarr").write_text("packed")
    for name in ("there/a.png", "taken/some.zarr"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("no picture")
    arrays = {
        "nan": np.full((4, 4), np.nan),
        "int": np.ones((4, 4), int),
        "five": np.ones((4, 4, 5)),
        "no": np.ones((0, 4)),
        "pickle": np.array([{}]),
        "unit": np.full((4, 4), 1.2),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    Image.fromarray(np.full((4, 4), np.inf, np.float32)).save(tmp_path / "inf.tif")
    tifffile.imwrite(tmp_path / "wide.tif", np.full((4, 4), 300))
    unit = np.full((4, 4), 1.2, np.float32)
    Image.fromarray(unit).save(tmp_path / "unit.tif")
    page = Image.fromarray(good)
    page.save(tmp_path / "two.tif", save_all=True, append_images=[page])
    os.truncate(tmp_path / "two.tif", (tmp_path / "two.tif").stat().st_size - 9)
    before = sorted(tmp_path.rglob("*"))
    words = [word.replace("{dir}", str(tmp_path)) for word in words]
    assert run(tmp_path / "a.png", tmp_path / "out", *words) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert sorted(tmp_path.rglob("*")) == before


def test_a_single_picture_may_join_others(box, tmp_path):
    box()
    for name in ("a.png", "b.png"):
        save(tmp_path / name, random_levels(8, 8))
        assert run(tmp_path / name, tmp_path / "out", "law=gaussian", "level=25") == 0
    there = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert there == ["a.png", "b.png", "before_after.png"]


def test_a_picture_of_tiles_too_large_for_the_memory(box, tmp_path, capsys):
    model = box()

    def restore(x, law, level):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.restore = restore
    save(tmp_path / "a.png", random_levels(8, 8))
    assert run(tmp_path / "a.png", tmp_path / "out", "law=gaussian", "level=25") == 2
    assert "tile=512: does not fit into memory; try tile=256" in capsys.readouterr().err


def test_a_method_of_one_shape_has_no_ensemble(box, tmp_path, capsys):
    model = box()
    model.ANY_SIZE = False
    save(tmp_path / "a.png", random_levels(8, 8))
    assert run(tmp_path / "a.png", tmp_path / "out", "law=gaussian", "ensemble=true") == 2
    assert "ensemble=true: Box does not take it; leave it out" in capsys.readouterr().err
    for word in ("gain=2", "offset=0", "read=1", "correlated=shuffle"):
        assert run(tmp_path / "a.png", tmp_path / "out", "law=gaussian", word) == 2
        assert f"{word.partition('=')[0]}=" in capsys.readouterr().err


def test_grey_and_colour_pictures_get_each_their_model(tmp_path):
    """Of a pair NAME_grey, NAME_colour; without the second the grey one takes the channels."""
    rng = np.random.default_rng(0)
    sizes = {"grey": (24, 20), "colour": (24, 20, 3)}
    models = {}
    for kind, channels in (("grey", 1), ("colour", 3)):
        words = ["data.patch=16", "network.channels=[4]", "network.blocks=[1]"]
        config = str(ROOT / "configs/noise2score_bsd400.yaml")
        models[kind] = genmodels.build(config, *words, f"data.channels={channels}").eval()
        nn.init.normal_(models[kind].net.exit.weight, std=0.05)
        checkpoint.write_export(models[kind], tmp_path / f"pair_{kind}", "card")
        (tmp_path / "in").mkdir(exist_ok=True)
        values = rng.integers(0, 256, sizes[kind], dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "in" / f"{kind}.png")

    def restored(out):
        words = [f"denoise={tmp_path}/in", "level=25", f"out={tmp_path}/{out}"]
        assert sample.main([str(tmp_path / "pair"), *words]) == 0
        return {
            kind: images.read_image(tmp_path / out / f"{kind}.png", 1 if kind == "grey" else 3)
            for kind in sizes
        }

    noisy = {
        kind: images.from_uint8(images.read_image(tmp_path / "in" / f"{kind}.png", 1 + 2 * k))
        for k, kind in enumerate(sizes)
    }
    wanted = {
        kind: to_uint8(restoration.restore(models[kind], noisy[kind], "gaussian", 25.0))
        for kind in sizes
    }
    found = restored("both")
    assert all((found[kind].int() - wanted[kind].int()).abs().max() <= 1 for kind in sizes)
    (tmp_path / "pair_colour").rename(tmp_path / "elsewhere")
    found = restored("one")
    alone = to_uint8(restoration.restore(models["grey"], noisy["colour"], "gaussian", 25.0))
    assert (found["colour"].int() - alone.int()).abs().max() <= 1
    assert (alone.int() - wanted["colour"].int()).abs().max() > 1
