"""Which files are pictures, and what is said of the others."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from genmodels import images
from genmodels.config import DataConfig
from genmodels.data import load_split
from genmodels.images import read
from tests.helpers.restoring_words import random_levels

SQUARE = Image.new("RGB", (8, 8), (100, 100, 100))
KINDS = {
    **{f"{suffix[1:]}{suffix}": "JPEG" for suffix in (".jpg", ".JPEG", ".jpe", ".jfif", ".JFIF")},
    **{"png.Png": "PNG", "webp.webp": "WEBP", "gif.gif": "GIF", "bmp.bmp": "BMP"},
    **{"ppm.ppm": "PPM", "pnm.pnm": "PPM", "tif.TIF": "TIFF"},
}
OTHERS = ["notes.txt", "list.TXT", "photo.avif", "no_suffix", "sub/page.pdf"]
SAID = "5 files are not read, being no pictures \\(1 .avif, 1 .pdf, 2 .txt, 1 without ending\\)"


@pytest.fixture
def mixed(tmp_path):
    folder = tmp_path / "mixed"
    (folder / "sub").mkdir(parents=True)
    for name, kind in KINDS.items():
        SQUARE.save(folder / name, kind)
    SQUARE.convert("L").save(folder / "pgm.pgm", "PPM")
    SQUARE.convert("1").point(lambda v: 0).save(folder / "sub" / "pbm.pbm", "PPM")
    for name in OTHERS:
        (folder / name).write_text("no picture")
    (folder / ".hidden").write_text("")
    with zipfile.ZipFile(tmp_path / "mixed.zip", "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder))
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_every_kind_is_read_and_the_rest_is_counted(mixed, packed):
    path = mixed.with_suffix(".zip") if packed else mixed
    cfg = DataConfig(name="zip" if packed else "imagefolder", root=str(path), holdout=0.0)
    with pytest.warns(UserWarning) as warned:
        pixels, _ = load_split(cfg, "train")
    assert len(pixels) == len(KINDS) + 2
    levels = pixels.flatten(1).float().mean(1).round().tolist()
    assert sorted(levels) == [0] + [100] * (len(KINDS) + 1)
    texts = [str(warning.message) for warning in warned]
    assert any(text.endswith(SAID.replace("\\", "")) for text in texts)
    assert any(
        text.endswith("1 file is .gif; of an animation the first frame is read") for text in texts
    )
    with pytest.warns(UserWarning, match=SAID):
        assert len(images.open_images(path)[1]) == len(KINDS) + 2


def test_a_folder_of_pictures_alone_needs_no_word(tmp_path, recwarn):
    SQUARE.save(tmp_path / "a.png")
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert images.Tree(tmp_path).names == ["a.png"]
    assert not recwarn.list


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (10, 200, 90)]
    for kind in ("GIF", "WEBP", "PNG"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], lossless=True)
        assert images.read_image(buffer, 3).unique().tolist() == [10], kind


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "IM"])
def test_other_decoders_never_run(tmp_path, kind, monkeypatch):
    """PostScript starts a program; what a file is called does not choose its decoder."""
    path = tmp_path / "a.png"
    SQUARE.save(path, kind)
    with pytest.raises(
        ValueError, match="image=.*a.png: cannot be read .it is no picture, or of a"
    ):
        images.read_image(path)


def test_each_decoder_is_of_a_known_kind():
    Image.init()
    assert set(read.FORMATS) <= set(Image.OPEN)
    for suffix in read.SUFFIXES:
        assert Image.registered_extensions()[suffix] in {*read.FORMATS, "MPO"}, suffix


@pytest.mark.parametrize("white", [65535, 4095])
def test_pgm_of_16_bits(white):
    levels = np.minimum(random_levels(5, 4, dtype=np.uint16), white)
    data = b"P5 4 5 %d\n" % white + levels.astype(">u2").tobytes()
    expected = np.rint(levels * (65535 / white) / 257)
    assert np.array_equal(images.read_image(io.BytesIO(data))[0].numpy(), expected)
    assert images.read_values(data, "a.pgm").dtype == np.uint16


def test_a_ppm_of_16_bit_colour_is_not_restored_with_8():
    data = b"P6 2 1 65535\n" + np.arange(6, dtype=">u2").tobytes()
    assert images.read_image(io.BytesIO(data)).shape == (3, 1, 2)
    with pytest.raises(ValueError, match="image=a.ppm: is a PPM of 16-bit colour; save it as PNG"):
        images.read_values(data, "a.ppm")


def test_a_float_pfm_under_another_name_is_refused():
    data = b"Pf\n2 1\n-1.0\n" + np.ones(2, "<f4").tobytes()
    for channels in (None, 1, 3):
        with pytest.raises(ValueError, match="image=a.pgm: has more than 16 bits a pixel"):
            images.read_image(io.BytesIO(data), channels, "a.pgm")


def test_grey_and_colour_conversions_stay_pillows():
    picture = Image.fromarray(random_levels(9, 7, 3))
    for made in (picture, picture.quantize(16), picture.convert("RGBA")):
        buffer = io.BytesIO()
        made.save(buffer, "PNG")
        assert np.array_equal(images.read_image(buffer, 1)[0].numpy(), made.convert("L"))
        found = images.read_image(buffer)
        assert torch.equal(found.permute(1, 2, 0), torch.from_numpy(np.array(made.convert("RGB"))))
