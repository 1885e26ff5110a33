"""TIFF: pages, orders of bytes, depths and packings; tifffile and Pillow write, both judge."""

import io
import zipfile

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from genmodels import cli, images
from genmodels.config import DataConfig
from genmodels.data import commands, load_split
from genmodels.data.source import read_source
from genmodels.images import tiff
from tests.helpers.restoring_words import random_levels

GREY, COLOUR = random_levels(9, 7), random_levels(9, 7, 3)
DEEP, DEEP_COLOUR = random_levels(9, 7, dtype=np.uint16), random_levels(9, 7, 3, dtype=np.uint16)


def tiff_of(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def in_8_bits(levels):
    """As the table in docs/data.md has it, in whole numbers: v / 257, rounded."""
    return levels if levels.dtype == np.uint8 else ((levels.astype(int) + 128) // 257)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("levels", [GREY, COLOUR, DEEP, DEEP_COLOUR], ids=lambda a: str(a.shape))
@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "zlib"}, {"compression": "zlib", "predictor": True}, {"bigtiff": True}],
    ids=str,
)
def test_both_readers_take_both_orders_of_bytes(order, levels, options):
    """Motorola's order is what ImageJ saves."""
    kind = "rgb" if levels.ndim == 3 else "minisblack"
    data = tiff_of(levels, byteorder=order, photometric=kind, **options)
    found = images.read_values(data, "a.tif")
    assert found.dtype == levels.dtype and np.array_equal(found.squeeze(), levels)
    made = images.read_image(io.BytesIO(data)).permute(1, 2, 0).numpy().squeeze()
    assert made.dtype == np.uint8 and np.array_equal(made, in_8_bits(levels))
    three = images.read_image(io.BytesIO(data), 3).permute(1, 2, 0).numpy()
    assert np.array_equal(three, np.broadcast_to(made.reshape(9, 7, -1), (9, 7, 3)))


def test_16_bit_colour_is_read_alike_from_png_and_tiff():
    png = images.picture_bytes(DEEP_COLOUR, "png")
    made = images.read_image(io.BytesIO(png), 3)
    assert np.array_equal(made.permute(1, 2, 0).numpy(), in_8_bits(DEEP_COLOUR))
    assert torch.equal(images.read_image(io.BytesIO(tiff_of(DEEP_COLOUR, photometric="rgb"))), made)
    grey = images.read_image(io.BytesIO(png), 1)
    assert np.array_equal(
        grey[0].numpy(), Image.fromarray(in_8_bits(DEEP_COLOUR).astype(np.uint8)).convert("L")
    )


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (16, 16), "photometric": "rgb"},
        {"planarconfig": "separate", "photometric": "rgb"},
        {"rowsperstrip": 2, "photometric": "rgb"},
    ],
    ids=["tiles", "planes", "strips"],
)
def test_how_the_pixels_lie_does_not_matter(options):
    levels = np.moveaxis(COLOUR, -1, 0) if "planarconfig" in options else COLOUR
    assert np.array_equal(images.read_values(tiff_of(levels, **options), "a.tif"), COLOUR)


def test_white_may_be_zero():
    for levels, white in ((GREY, 255), (DEEP, 65535)):
        found = images.read_values(tiff_of(levels, photometric="miniswhite"), "a.tif")
        assert np.array_equal(found[..., 0], white - levels)


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"]
PACKINGS = [None, "tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate"]
NO_TIFF = {("1", "jpeg"), ("P", "jpeg")}  # JPEG in a TIFF has neither single bits nor a palette


@pytest.mark.parametrize(
    ("mode", "packing"), [(m, p) for p in PACKINGS for m in MODES if (m, p) not in NO_TIFF]
)
def test_pillows_files_are_read_as_pillow_reads_them(mode, packing):
    buffer = io.BytesIO()
    picture = Image.fromarray(random_levels(16, 16, 3)).convert(mode)
    picture.save(buffer, "TIFF", compression=packing)
    with Image.open(buffer) as picture:
        grey = mode in ("1", "L", "LA")
        expected = np.array(picture.convert("L" if grey else "RGB"))
    found = images.read_image(buffer).permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected.reshape(found.shape))
    assert np.array_equal(images.read_values(buffer.getvalue(), "a.tif"), found)


def test_floats_are_for_restoring_alone():
    for kind in (np.float16, np.float32, np.float64):
        data = tiff_of(GREY.astype(kind), byteorder=">")
        found = images.read_values(data, "a.tif")
        assert found.dtype == np.float32 and np.array_equal(found[..., 0], GREY)
        with pytest.raises(ValueError, match="image=a.tif: has more than 16 bits a pixel; convert"):
            images.read_image(io.BytesIO(data), name="a.tif")


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (GREY.astype(np.int16), {}, "holds int16, signed levels; convert it to uint8 or uint16"),
        (GREY.astype(np.uint32), {}, "has more than 16 bits a pixel; .*it holds uint32"),
        (
            random_levels(9, 7, 2, dtype=np.uint16),
            {"photometric": "minisblack", "planarconfig": "contig"},
            "has 2 channels that are no colours; save each as a page or a file",
        ),
        (
            random_levels(4, 9, 7, 1, 1),
            {"photometric": "minisblack", "volumetric": True},
            "has the axes ZYX; save each plane as a page or a file",
        ),
    ],
)
def test_what_no_picture_is_is_refused(array, options, message):
    data = tiff_of(array, **options)
    for read in (images.read_image, lambda file, *, name: images.read_values(file.read(), name)):
        with pytest.raises(ValueError, match=f"image=a.tif: {message}"):
            read(io.BytesIO(data), name="a.tif")


def test_a_stack_behind_one_header_is_refused_not_cut(tmp_path):
    """ImageJ writes more than 4 GB so: one header, the planes behind each other."""
    stack = random_levels(5, 9, 7, dtype=np.uint16)
    description = "ImageJ=1.53t\nimages=5\nslices=5\n"
    tifffile.imwrite(tmp_path / "a.tif", stack[0], description=description, metadata=None)
    with open(tmp_path / "a.tif", "ab") as file:
        file.write(stack[1:].tobytes())
    with pytest.raises(ValueError, match="holds 5 planes under the header of one; save them as"):
        images.read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("cut", [20, 200, 0.5, -30])
@pytest.mark.parametrize("packing", [None, "zlib"])
def test_a_cut_file_is_named(cut, packing):
    data = tiff_of(random_levels(64, 64, dtype=np.uint16), compression=packing)
    data = data[: int(cut * len(data)) if isinstance(cut, float) else cut]
    with pytest.raises(ValueError, match=r"image=a.tif: cannot be read \(.*\); remove it"):
        images.read_image(io.BytesIO(data), name="a.tif")


def test_strips_that_are_missing_are_not_black():
    """tifffile fills them with zeros."""
    data = bytearray(tiff_of(np.full((64, 64), 200, np.uint8), rowsperstrip=32))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tag = file.pages[0].tags["StripByteCounts"]
    data[tag.valueoffset : tag.valueoffset + 4] = bytes(4)
    with pytest.raises(ValueError, match="image=a.tif: cannot be read .it is cut off, or a part"):
        images.read_image(io.BytesIO(data), name="a.tif")


def test_a_bomb_is_refused_unread():
    data = bytearray(tiff_of(np.zeros((8, 8), np.uint8)))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for name in ("ImageWidth", "ImageLength"):
            start = file.pages[0].tags[name].valueoffset
            data[start : start + 4] = (60_000).to_bytes(4, "little")
    with pytest.raises(ValueError, match="cannot be read .Image size .3600000000 pixels. exceeds"):
        images.read_image(io.BytesIO(data), name="a.tif")


@pytest.fixture
def stacks(tmp_path):
    """A folder of a stack of three pages, a single TIFF and a PNG; returns (folder, levels)."""
    levels = random_levels(5, 9, 7)
    folder = tmp_path / "set"
    folder.mkdir()
    tifffile.imwrite(folder / "b.tif", levels[1:4], photometric="minisblack", byteorder=">")
    Image.fromarray(levels[0]).save(folder / "a.png")
    Image.fromarray(levels[4]).save(folder / "c.TIFF")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    return folder, levels


@pytest.mark.parametrize("packed", [False, True])
def test_each_page_is_a_picture_everywhere(stacks, packed, capsys):
    folder, levels = stacks
    path = folder.with_suffix(".zip") if packed else folder
    note = f"{path}: 1 file is TIFF of several pages; each of the 3 is a picture"
    with pytest.warns(UserWarning, match=note):  # evaluation
        source = read_source(str(path))
    assert source.names == ["a.png", "b.tif[0]", "b.tif[1]", "b.tif[2]", "c.TIFF"]
    assert np.array_equal(source.pixels[:, 0].numpy(), levels)
    kind = "zip" if packed else "imagefolder"
    cfg = DataConfig(name=kind, root=str(path), channels=1, holdout=0.0)
    with pytest.warns(UserWarning, match=note):  # training
        pixels, _ = load_split(cfg, "train")
    assert np.array_equal(pixels[:, 0].numpy(), levels)
    cfg.device = "disk"
    with pytest.warns(UserWarning, match=note):
        assert np.array_equal(load_split(cfg, "train")[0][:][:, 0].numpy(), levels)
    assert cli.run(commands.main, ["info", str(path), "holdout=0"]) == 0
    captured = capsys.readouterr()
    assert "(3, 9, 7)" in captured.out
    assert captured.err == f"note: data.root={note}\n"


def test_a_stack_may_be_named_itself(stacks):
    folder, levels = stacks
    source = read_source(str(folder / "b.tif"))
    assert source.names == [f"b.tif[{page}]" for page in range(3)]
    assert np.array_equal(source.pixels[:, 0].numpy(), levels[1:4])


def test_pages_of_two_sizes_are_no_set(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(GREY)
        file.write(GREY[:5])
    with pytest.raises(ValueError, match="mixed sizes, page 1 is .1, 5, 7. but page 0 is .1, 9, 7"):
        images.read_images(tmp_path / "a.tif")
    cfg = DataConfig(name="imagefolder", root=str(tmp_path), holdout=0.0)
    with pytest.warns(UserWarning, match="each of the 2"):
        with pytest.raises(ValueError, match=r"a.tif\[1\] is \(5, 7\), not \(9, 7\) as others"):
            load_split(cfg, "train")


def test_smaller_copies_of_a_page_are_no_pictures(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(GREY)
        file.write(GREY[::2, ::2], subfiletype=1)
    assert images.read_images(tmp_path / "a.tif").shape == (1, 1, 9, 7)


def test_the_pages_of_a_file_have_its_class(stacks):
    folder, _ = stacks
    (folder / "dataset.json").write_text('{"labels": {"a.png": 2, "b.tif": 1, "c.TIFF": 0}}')
    cfg = DataConfig(name="imagefolder", root=str(folder), holdout=0.0)
    with pytest.warns(UserWarning, match="each of the 3 is a picture"):
        assert load_split(cfg, "train")[1].tolist() == [2, 1, 1, 1, 0]


def test_16_bit_colour_that_needs_a_package(monkeypatch):
    """Without imagecodecs; Pillow alone would keep the high byte and say nothing."""
    data = tiff_of(DEEP_COLOUR, photometric="rgb")
    refusal = ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    def asarray(self, *args, **kwargs):
        raise refusal

    monkeypatch.setattr(tifffile.TiffPage, "asarray", asarray)
    with pytest.raises(ValueError, match="image=a.tif: 16-bit colour packed as NONE needs another"):
        images.read_image(io.BytesIO(data), name="a.tif")
    # Grey of 16 bits is Pillow's then.
    assert np.array_equal(images.read_values(tiff_of(DEEP), "a.tif")[..., 0], DEEP)


@pytest.mark.parametrize(
    ("dtype", "order", "taken"),
    [
        (np.int16, "<", True),
        (np.int16, ">", False),
        (np.uint32, "<", True),
        (np.uint32, ">", False),
        (np.float32, "<", True),
        (np.float32, ">", False),
        (np.float64, "<", False),
        (np.uint16, ">", True),
    ],
)
def test_pillow_is_asked_for_what_it_reads_right(monkeypatch, dtype, order, taken):
    """It swaps the bytes of packed floats and signed levels twice, and says nothing."""
    levels = DEEP // 4
    data = tiff_of(levels.astype(dtype), byteorder=order, compression="zlib")
    refusal = ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    def asarray(self, *args, **kwargs):
        raise refusal

    monkeypatch.setattr(tifffile.TiffPage, "asarray", asarray)
    if taken:
        found = tiff.read_page(io.BytesIO(data))
        assert found.dtype == dtype and np.array_equal(found[..., 0], levels)
    else:
        with pytest.raises(tiff.Refused, match="-bit packed as ADOBE_DEFLATE needs another packa"):
            tiff.read_page(io.BytesIO(data))


def test_a_page_that_points_to_itself_ends():
    """Of a file of 200 bytes; tifffile goes round for ever."""
    data = bytearray(tiff_of(GREY, metadata=None))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        link = page.offset + 2 + 12 * len(page.tags)
        data += bytes(2) + link.to_bytes(4, "little")  # a page without tags, the next is there too
    place = len(data) - 6
    data[link : link + 4] = place.to_bytes(4, "little")
    data[place + 2 :] = place.to_bytes(4, "little")
    with pytest.raises(ValueError, match="image=a.tif: cannot be read .it holds no page, an empty"):
        images.read_image(io.BytesIO(data), name="a.tif")
