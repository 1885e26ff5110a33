"""Pictures in files, 8 and 16 bits and floats, read and written by sample.py denoise=."""

import io
import zipfile

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from genmodels import images
from genmodels.images import pictures
from genmodels.images.read import ORIENTATION
from tests.helpers.restoring_words import random_levels, run, save

IN_AND_OUT = {
    "grey.png": random_levels(9, 7),
    "colour.png": random_levels(9, 7, 3),
    "deep.png": random_levels(9, 7, dtype=np.uint16),
    "deep_colour.png": random_levels(9, 7, 3, dtype=np.uint16),
    "grey.tif": random_levels(9, 7),
    "colour.tiff": random_levels(9, 7, 3),
    "deep.tif": random_levels(9, 7, dtype=np.uint16),
    "float.tif": random_levels(9, 7).astype(np.float32),
    "flat.png": random_levels(1, 12),
    "thin.png": random_levels(12, 1),
    "dot.png": random_levels(1, 1),
    "sub/below.png": random_levels(5, 6),
    "plane.npy": random_levels(9, 7).astype(np.float64),
    "colour.npy": random_levels(9, 7, 3).astype(np.float32),
    "one.npy": random_levels(9, 7, 1).astype(np.float16),
    "many.npy": random_levels(3, 9, 7, 1).astype(np.float32),
    "bytes.npy": random_levels(9, 7),
    "words.npy": random_levels(9, 7, 3, dtype=np.uint16),
}


@pytest.mark.parametrize("packed", [False, True])
def test_each_picture_comes_back_as_it_came(box, tmp_path, capsys, packed):
    """A model that changes nothing: the same levels, depth, channels, shape and name."""
    box(radius=0)
    source = tmp_path / "noisy"
    for name, levels in IN_AND_OUT.items():
        save(source / name, levels)
    (source / "README.md").write_text("junk is not looked at")
    (source / "grid.png").write_bytes(b"nor is a sheet")
    if packed:
        with zipfile.ZipFile(tmp_path / "noisy.zip", "w") as file:
            for name in (*IN_AND_OUT, "README.md"):
                file.write(source / name, name)
        source = tmp_path / "noisy.zip"
    assert run(source, tmp_path / "out", "law=gaussian", "level=25", "scale=file") == 0
    shown = capsys.readouterr()
    count = len(IN_AND_OUT) + 2  # many.npy holds three
    assert shown.out == f"{count} pictures restored, law gaussian, level 25: {tmp_path}/out\n"
    assert shown.err == ""  # no bar where it is not watched
    for name, levels in IN_AND_OUT.items():
        out = tmp_path / "out" / name
        if name.endswith(".npy"):
            array = np.load(out)
            assert array.dtype == np.float32 and array.shape == levels.shape, name
            assert np.abs(array - levels).max() <= 2e-7 * max(255, levels.max()), name
        elif name == "float.tif":
            with Image.open(out) as picture:
                assert picture.mode == "F" and np.abs(np.array(picture) - levels).max() < 1e-4
        else:
            found = images.read_values(out.read_bytes(), name)
            assert found.dtype == levels.dtype and np.array_equal(
                found, levels.reshape(found.shape)
            ), name
    there = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert there == {*IN_AND_OUT, "before_after.png"}


def test_16_bits_are_read_by_others_as_we_write_them(tmp_path):
    """torchvision's libpng and Pillow are the judges."""
    from torchvision.io import ImageReadMode, decode_image

    for levels in (IN_AND_OUT["deep.png"][..., None], IN_AND_OUT["deep_colour.png"]):
        data = torch.frombuffer(bytearray(images.picture_bytes(levels, "png")), dtype=torch.uint8)
        found = decode_image(data, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
        assert found.dtype == np.uint16 and np.array_equal(found, levels)
    with Image.open(io.BytesIO(images.picture_bytes(levels, "png"))) as picture:
        assert np.array_equal(np.array(picture), levels >> 8)
    with Image.open(io.BytesIO(images.picture_bytes(levels[..., :1], "png"))) as picture:
        assert np.array_equal(np.array(picture), levels[..., 0])


def test_16_bit_colour_tiff(box, tmp_path):
    levels = IN_AND_OUT["deep_colour.png"]
    alpha = np.concatenate([levels, levels[..., :1]], -1)
    tifffile.imwrite(tmp_path / "a.tif", levels, photometric="rgb", compression="zlib")
    tifffile.imwrite(tmp_path / "b.tif", alpha, photometric="rgb", extrasamples=["unassalpha"])
    box(radius=0)
    for name in ("a.tif", "b.tif"):
        assert run(tmp_path / name, tmp_path / "out", "law=gaussian", "level=25") == 0
        assert np.array_equal(tifffile.imread(tmp_path / "out" / name), levels)


def test_a_dark_array_may_become_darker_than_the_hint_about_scales(box, tmp_path):
    box(radius=3)
    noisy = np.random.default_rng(0).normal(0.5, 1.5, (40, 40)).astype(np.float32)
    save(tmp_path / "in" / "dark.npy", noisy)
    assert run(tmp_path / "in", tmp_path / "out", "law=gaussian", "level=2") == 0
    restored = np.load(tmp_path / "out" / "dark.npy")
    assert 0 < restored.max() <= 2 < noisy.max()


def test_other_kinds_of_picture_become_png(box, tmp_path):
    box(radius=0)
    source = tmp_path / "noisy"
    source.mkdir()
    colours = Image.fromarray(IN_AND_OUT["colour.png"])
    colours.save(source / "a.jpg")
    colours.save(source / "b.bmp")
    colours.quantize(4).save(source / "c.png")
    colours.convert("1").save(source / "d.png")
    Image.fromarray(np.dstack([IN_AND_OUT["colour.png"], IN_AND_OUT["grey.png"]])).save(
        source / "e.png"
    )
    assert run(source, tmp_path / "out", "law=gaussian", "level=25") == 0
    for name, channels in (("a.jpg", 3), ("b.bmp", 3), ("c.png", 3), ("d.png", 1), ("e.png", 3)):
        found = images.read_image(tmp_path / "out" / f"{name[0]}.png")
        assert len(found) == channels
        assert torch.equal(found, images.read_image(source / name, channels)), name


def test_nothing_is_clipped_on_the_way_in(box, tmp_path):
    model = box(radius=0)
    array = np.array([[-40.0, 0, 127.5], [255, 300, 1]])
    np.save(tmp_path / "a.npy", array)
    assert run(tmp_path / "a.npy", tmp_path / "out", "law=gaussian", "level=25", "scale=file") == 0
    seen = model.seen[-1].double().numpy()
    assert np.abs((seen[0, 0] + 1) * 127.5 - array).max() < 1e-4
    found = np.load(tmp_path / "out" / "a.npy")  # nor of floats on the way out
    assert np.abs(found - array).max() < 1e-4


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
def test_a_camera_held_askew(kind):
    """As Pillow's own exif_transpose has it."""
    levels = random_levels(24, 16, 3) // 8 + np.arange(16, dtype=np.uint8)[:, None] * 8
    for orientation in range(1, 9):
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[ORIENTATION] = orientation
        Image.fromarray(levels).save(buffer, kind, exif=exif)
        upright = np.array(ImageOps.exif_transpose(Image.open(buffer)))
        found = images.read_values(buffer.getvalue(), f"photo.{kind}")
        assert np.array_equal(found, upright), orientation
        assert found.shape[:2] == ((24, 16) if orientation < 5 else (16, 24))


def test_pictures_keep_the_order_of_their_names(tmp_path):
    for name in ("b/1.png", "a/2.png", "a.png", "c.npy"):
        save(tmp_path / name, random_levels(3, 3))
    assert list(pictures.find_pictures(tmp_path)) == ["a/2.png", "a.png", "b/1.png", "c.npy"]
