"""Stacks of planes: read and restored one by one, and written as they were; tifffile judges."""

import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tifffile

from genmodels.images import pictures, stacks
from genmodels.images.stacks import Stack
from tests.helpers.paths import ROOT
from tests.helpers.restoring_words import random_levels, run

RNG = np.random.default_rng(0)
PLANES = RNG.normal(1000, 60, (2, 3, 2, 18, 21)).round().astype(np.uint16)  # TZCYX
COLOURS = RNG.integers(20, 230, (4, 18, 21, 3), dtype=np.uint8)
OME = {
    "axes": "TZCYX",
    "PhysicalSizeX": 0.29,
    "PhysicalSizeXUnit": "µm",
    "PhysicalSizeZ": 1.5,
    "TimeIncrement": 0.1,
    "Channel": {"Name": ["DAPI", "GFP"]},
}
IMAGEJ = {
    "axes": "TZCYX",
    "spacing": 3.9,
    "unit": "um",
    "finterval": 0.25,
    "mode": "composite",
    "Labels": [f"plane {k}" for k in range(12)],
    "Ranges": (10.0, 3000.0, 20.0, 2000.0),
    "Info": "objective: 40x",
}
GREY = {"photometric": "minisblack"}
BARE = GREY | {"metadata": None}
KINDS = {
    "imagej": (PLANES, {"imagej": True, "metadata": IMAGEJ, "resolution": (2.5, 3.5)}),
    "ome": (PLANES, {"ome": True, "metadata": OME, **GREY}),
    "ome_packed": (PLANES, {"ome": True, "metadata": OME, "compression": "zlib", **GREY}),
    "ome_big": (PLANES, {"ome": True, "metadata": OME, "bigtiff": True, "byteorder": ">", **GREY}),
    "pages": (PLANES[0, :, 0], BARE | {"resolution": (300, 200), "resolutionunit": 2}),
    "said": (PLANES[0, :, 0], BARE | {"description": "by hand", "software": "Camera 3"}),
    "shaped": (PLANES, GREY),
    "axes": (PLANES, GREY | {"metadata": {"axes": "TZCYX", "note": "kept"}}),
    "motorola": (PLANES[0], GREY | {"byteorder": ">"}),
    "big": (PLANES[0], GREY | {"bigtiff": True, "byteorder": ">"}),
    "packed": (PLANES[0], GREY | {"compression": "zlib", "predictor": True}),
    "strips": (PLANES[0], GREY | {"rowsperstrip": 4}),
    "inverted": (PLANES[0], {"photometric": "miniswhite"}),
    "colour": (COLOURS, {"photometric": "rgb"}),
    "colour_planes": (np.moveaxis(COLOURS, -1, 1), {"photometric": "rgb", "planarconfig": 2}),
    "deep_colour": (COLOURS.astype(np.uint16) * 9, {"photometric": "rgb", "byteorder": ">"}),
    "int16": (PLANES[0].astype(np.int16) - 1000, GREY),
    "int32": (PLANES[0].astype(np.int32) * 50 - 9000, GREY | {"byteorder": ">"}),
    "uint32": (PLANES[0].astype(np.uint32) * 50, GREY | {"compression": "zlib"}),
    "float16": (PLANES[0].astype(np.float16) - 1000, GREY),
    "float32": (PLANES[0].astype(np.float32) / 7, GREY | {"byteorder": ">"}),
    "float64": (PLANES[0] / 7, GREY | {"bigtiff": True}),
    "single": (PLANES[0, 0, 0], GREY | {"resolution": (7, 7)}),
    "single_ome": (PLANES[0, 0, 0], {"ome": True, "metadata": {"PhysicalSizeX": 2.0}, **GREY}),
}


def of_kind(kind, path):
    array, options = KINDS[kind]
    path.parent.mkdir(exist_ok=True)
    tifffile.imwrite(path, array, **options)
    return array


def facts(path):
    """All that tifffile tells of a file but where things lie in it."""
    with tifffile.TiffFile(path) as file:
        series, first = file.series[0], file.pages[0]
        tags = {key: first.tags[key].value for key in ("XResolution", "YResolution")}
        return tags | {
            "shape": (series.axes, series.shape, series.dtype, series.kind, len(series)),
            "file": (file.byteorder, file.is_bigtiff, len(file.pages)),
            "colour": (first.photometric, first.planarconfig, first.samplesperpixel),
            "packing": (first.compression, first.predictor),
            "unit": first.resolutionunit,
            "imagej": file.imagej_metadata,
            "ome": file.ome_metadata,
            "description": first.description,
            "software": first.software,
        }


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_comes_back_as_it_came(box, tmp_path, kind):
    """Of a model that changes nothing: pixels, axes, type, order, packing, resolution, metadata."""
    box(radius=0)
    array = of_kind(kind, tmp_path / "in" / "a.tif")
    assert run(tmp_path / "in", tmp_path / "out", "law=gaussian") == 0
    found = tifffile.imread(tmp_path / "out" / "a.tif")
    assert found.dtype == array.dtype and found.shape == array.shape
    if array.dtype.kind == "f":
        assert np.abs(found - array).max() <= 1e-6 * np.ptp(array) + 2 * np.spacing(array).max()
    else:
        assert np.array_equal(found, array)
    assert facts(tmp_path / "out" / "a.tif") == facts(tmp_path / "in" / "a.tif")


def test_every_plane_is_restored_by_itself(box, tmp_path):
    """The mean over 3 x 3 pixels of each plane: no channel, depth or time is mixed with another."""
    box(radius=1)
    of_kind("ome", tmp_path / "a.tif")
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian") == 0
    wide = np.pad(PLANES.astype(float), [(0, 0)] * 3 + [(1, 1)] * 2, mode="edge")
    parts = [wide[..., i : i + 18, j : j + 21] for i in range(3) for j in range(3)]
    found = tifffile.imread(tmp_path / "out" / "a.tif")
    assert np.abs(found - np.mean(parts, axis=0)).max() < 0.51


def test_planes_are_read_one_by_one(box, tmp_path, monkeypatch):
    """In each pass one after the other; what is restored is written before the next is read."""
    model, events = box(radius=0), []
    plane, as_stored, restore = Stack.plane, Stack._as_stored, model.restore

    def noted(kind, call):
        def noting(*args, **options):
            events.append(kind)
            return call(*args, **options)

        return noting

    monkeypatch.setattr(Stack, "plane", noted("read", plane))
    monkeypatch.setattr(Stack, "_as_stored", noted("write", as_stored))
    model.restore = noted("restore", restore)
    tifffile.imwrite(tmp_path / "a.tif", PLANES[0, :, 0], **GREY)
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian", "level=.01") == 0
    first = events.index("restore") - 1
    assert events[:first] == ["read"] * 6  # all for black and white, all for a look at the noise
    assert events[first : first + 9] == ["read", "restore", "write"] * 3
    assert events[first + 9 :] == ["read"] * 2  # the sheet


def test_a_channel_has_one_scale_and_one_noise(box, tmp_path, capsys):
    model = box(radius=0)
    bright = PLANES * np.array([1, 20], np.uint16)[:, None, None]
    bright[1, 2] //= 2  # the last planes have half of the noise
    tifffile.imwrite(tmp_path / "a.tif", bright, ome=True, metadata={"axes": "TZCYX"}, **GREY)
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian") == 0
    ends = [
        np.quantile(bright[:, :, c], [0.001, 0.999], method="inverted_cdf").astype(float)
        for c in (0, 1)
    ]
    seen = [image[0, 0].double().numpy() for image in model.seen]
    levels = []
    for k, plane in enumerate(bright.reshape(12, 18, 21)):
        low, high = ends[k % 2]
        assert np.abs(seen[k] - (2 * (plane - low) / (high - low) - 1)).max() < 1e-5
        levels.append(plane.std() * 255 / (high - low))
    medians = [np.median(levels[c::2]) for c in (0, 1)]
    assert model.told == pytest.approx(medians * 6, rel=1e-4)
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian", "level=plane") == 0
    assert model.told[12:] == pytest.approx(levels, rel=1e-4)
    words = ["law=gaussian", "level=9", "black=1,2", "white=5000,100000"]
    capsys.readouterr()
    assert run(tmp_path / "a.tif", tmp_path / "out", *words) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("scale: black 1 to 2, white 5000 to 1e+05, put back on writing\n")
    assert shown.startswith("12 pictures restored, law gaussian, level 9: ")


def test_axes_can_be_said(box, tmp_path):
    """Pages of which nothing is said are channels then: each with a scale of its own."""
    model = box(radius=0)
    pages = np.stack([PLANES[0, 0, 0], PLANES[0, 0, 0] * 9])
    tifffile.imwrite(tmp_path / "a.tif", pages, **BARE)
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian", "axes=CYX") == 0
    assert np.abs(model.seen[0] - model.seen[1]).max() < 1e-5
    assert model.told[0] == pytest.approx(model.told[1], rel=1e-5)
    with tifffile.TiffFile(tmp_path / "out" / "a.tif") as file:
        assert file.series[0].axes == "CYX" and np.array_equal(file.asarray(), pages)


def test_planes_have_names(tmp_path):
    for kind, count, last in (
        ("ome", 12, "[t1,z2,c1]"),
        ("pages", 3, "[2]"),
        ("colour", 4, "[3]"),
        ("single", 1, ""),
    ):
        of_kind(kind, tmp_path / "a.tif")
        found = Stack("a.tif", open(tmp_path / "a.tif", "rb"))
        assert len(found) == count and found.label(count - 1) == last
        assert found.channels == (2 if kind == "ome" else 1)
        assert len({found.label(k) for k in range(count)}) == count
        found.close()


def test_planes_stay_where_ome_has_them(box, tmp_path):
    """Their order in the file may differ from that of the axes; the metadata say which is which."""
    box(radius=0)
    tifffile.imwrite(tmp_path / "a.tif", PLANES, ome=True, metadata=OME, **GREY)
    xml = tifffile.TiffFile(tmp_path / "a.tif").ome_metadata
    begin, end = xml.index("<TiffData"), xml.index("/>", xml.index("<TiffData")) + 2
    blocks = "".join(
        f'<TiffData FirstT="{t}" FirstZ="{z}" FirstC="{c}" IFD="{11 - (6 * t + 2 * z + c)}"/>'
        for t in range(2)
        for z in range(3)
        for c in range(2)
    )
    xml = xml[:begin] + blocks + xml[end:]
    planes = PLANES.reshape(12, 18, 21)[::-1]
    tifffile.imwrite(
        tmp_path / "a.tif", planes, description=xml.encode(), metadata=None, photometric=1
    )
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), PLANES)  # as it is meant
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian") == 0
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "a.tif"), PLANES)
    assert facts(tmp_path / "out" / "a.tif") == facts(tmp_path / "a.tif")


@pytest.mark.parametrize("order", "<>")
def test_a_stack_behind_one_header(box, tmp_path, order):
    """ImageJ writes more than 4 GB so; what is written has a header for each plane."""
    box(radius=0)
    stack = PLANES[0, :, 0]
    said = "ImageJ=1.53t\nimages=3\nslices=3\nspacing=2.5\n"
    options = {"description": said, "metadata": None, "byteorder": order}
    tifffile.imwrite(tmp_path / "a.tif", stack[0], **options)
    with open(tmp_path / "a.tif", "ab") as file:
        file.write(stack[1:].astype(f"{order}u2").tobytes())
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian") == 0
    with tifffile.TiffFile(tmp_path / "out" / "a.tif") as file:
        assert np.array_equal(file.asarray(), stack) and file.series[0].axes == "ZYX"
        assert file.imagej_metadata["spacing"] == 2.5 and file.byteorder == order
    with open(tmp_path / "a.tif", "r+b") as file:
        file.truncate((tmp_path / "a.tif").stat().st_size - 5)
    assert run(tmp_path / "a.tif", tmp_path / "p", "law=gaussian") == 2


def test_stacks_in_a_zip(box, tmp_path):
    box(radius=0)
    array = of_kind("imagej", tmp_path / "a.tif")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.write(tmp_path / "a.tif", "sub/a.tif")
        file.write(tmp_path / "a.tif", "b.tif")
    assert run(tmp_path / "a.zip", tmp_path / "out", "law=gaussian") == 0
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "sub" / "a.tif"), array)
    assert facts(tmp_path / "out" / "b.tif") == facts(tmp_path / "a.tif")


def test_a_camera_held_askew(box, tmp_path):
    """The planes are put upright, as single pictures are."""
    box(radius=0)
    turned = [(274, 3, 1, 6, False)]  # Orientation 6: the first row is the right side
    tifffile.imwrite(tmp_path / "a.tif", PLANES[0, :, 0], extratags=turned, **BARE)
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian") == 0
    expected = np.rot90(PLANES[0, :, 0], -1, axes=(1, 2))
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "a.tif"), expected)


def test_what_is_not_read_is_said(box, tmp_path, capsys):
    box(radius=0)
    with tifffile.TiffWriter(tmp_path / "two.tif") as file:
        file.write(PLANES[0, :, 0], metadata=None, photometric=1)
        file.write(PLANES[0, 0, 0, :9], metadata=None, photometric=1)
    with tifffile.TiffWriter(tmp_path / "small.tif", ome=True) as file:
        file.write(PLANES[0, :, 0], subifds=1, metadata={"axes": "ZYX"}, photometric=1)
        file.write(PLANES[0, :, 0, ::2, ::2], subfiletype=1, photometric=1)
    for name, note in (
        ("two.tif", "holds 2 images; the first is restored, and alone is written"),
        ("small.tif", "holds smaller copies of its pictures, which are left out"),
    ):
        assert run(tmp_path / name, tmp_path / "out", "law=gaussian") == 0
        assert f"{name}: {note}\n" in capsys.readouterr().err
        found = tifffile.imread(tmp_path / "out" / name)
        assert np.array_equal(found, PLANES[0, :, 0])


def test_of_several_images_of_ome_the_first_is_restored(box, tmp_path, capsys):
    box(radius=0)
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=True) as file:
        file.write(PLANES[0], photometric=1, metadata=OME | {"axes": "ZCYX", "Name": "left"})
        file.write(PLANES[1, 0, 0], photometric=1, metadata={"axes": "YX", "Name": "right"})
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian") == 0
    assert "a.tif: holds 2 images; the first is restored, and alone" in capsys.readouterr().err
    with tifffile.TiffFile(tmp_path / "out" / "a.tif") as file:
        assert len(file.series) == 1 and file.series[0].axes == "ZCYX"
        assert np.array_equal(file.asarray(), PLANES[0])
        for part in ('Name="left"', 'PhysicalSizeX="0.29"', 'PhysicalSizeXUnit="µm"'):
            assert part in file.ome_metadata
        assert 'Name="DAPI"' in file.ome_metadata and "right" not in file.ome_metadata


def test_ome_of_other_files_is_kept_and_not_followed(box, tmp_path, capsys):
    """One file of several that share their metadata: its own pages are restored."""
    box(radius=0)
    tifffile.imwrite(tmp_path / "a.tif", PLANES, ome=True, metadata=OME, **GREY)
    xml = tifffile.TiffFile(tmp_path / "a.tif").ome_metadata
    begin, end = xml.index("<TiffData"), xml.index("/>", xml.index("<TiffData")) + 2
    there = '<TiffData IFD="0"><UUID FileName="b.tif">urn:uuid:7</UUID></TiffData>'
    xml = (xml[:begin] + there + xml[end:]).encode()
    options = {"description": xml, "metadata": None, "photometric": 1}
    tifffile.imwrite(tmp_path / "a.tif", PLANES[0, 0], **options)
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian") == 0
    note = "a.tif: has OME metadata of other files or pages, which are kept but not followed\n"
    assert note in capsys.readouterr().err
    assert np.array_equal(tifffile.TiffFile(tmp_path / "out" / "a.tif").asarray(), PLANES[0, 0])
    assert tifffile.TiffFile(tmp_path / "out" / "a.tif").pages[0].description == xml.decode()


def test_lzw(box, tmp_path, monkeypatch, capsys):
    """With imagecodecs it stays LZW; without, Pillow reads it and it is written as deflate."""
    box(radius=0)
    from PIL import Image

    first, *more = (Image.fromarray(plane) for plane in PLANES[0, :, 0])
    first.save(tmp_path / "a.tif", save_all=True, append_images=more, compression="tiff_lzw")
    if not has_codecs():
        assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian") == 0
        note = "a.tif: is packed as LZW, and written as zlib; pip install 'genmodels[stacks]' keeps"
        assert note in capsys.readouterr().err
        with tifffile.TiffFile(tmp_path / "out" / "a.tif") as file:
            assert file.pages[0].compression == 8
    else:
        assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian") == 0
        assert capsys.readouterr().err == ""
        assert facts(tmp_path / "out" / "a.tif")["packing"] == (5, 1)
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "a.tif"), PLANES[0, :, 0])


def has_codecs():
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.skipif(has_codecs(), reason="imagecodecs is installed, which reads it")
def test_what_needs_a_package_is_said(box, tmp_path, capsys):
    """A stack of 64-bit floats packed with their own predictor."""
    box()
    tifffile.imwrite(tmp_path / "a.tif", PLANES[0] / 7, compression="zlib", **GREY)
    data = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for page in file.pages:
            tag = page.tags["Compression"]
            data[tag.valueoffset : tag.valueoffset + 2] = (50000).to_bytes(2, "little")
    (tmp_path / "a.tif").write_bytes(data)
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian") == 2
    message = "64-bit packed as ZSTD needs another package; pip install 'genmodels[stacks]', or"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("array", "options", "words", "message"),
    [
        (PLANES.astype(np.int64), GREY, [], "holds int64; convert it to 32 bits or floats"),
        (PLANES[0].astype(complex), GREY, [], "holds complex128; convert it to 32 bits or"),
        (PLANES, GREY, ["axes=TZYX"], "has 5 dimensions, QQQYX; axes=TZYX must name as many"),
        (PLANES, GREY, ["axes=TZTYX"], "axes=TZTYX must name as many, each by a capital letter"),
        (PLANES, GREY, ["axes=TZYXC"], "axes=TZYXC must name as many, each by a capital"),
        (PLANES, GREY, ["axes=tzcyx"], "axes=tzcyx must name as many, each by a capital letter"),
        (PLANES, {"imagej": True}, ["axes=CTZYX"], "whose axes are in the order TZC; not axes="),
        (np.where(PLANES > 1100, np.nan, PLANES), GREY, [], "]: holds NaN or infinite pixels; m"),
        (PLANES[0, 0, :, None].repeat(16, 1), GREY | {"volumetric": True}, [], "has the axes"),
        (
            PLANES[0, 0],
            GREY | {"planarconfig": "separate"},
            [],
            "has 2 channels that are no colours; save each as a page or a file",
        ),
    ],
    ids=range(10),
)
def test_what_cannot_be_is_one_line(box, tmp_path, capsys, array, options, words, message):
    box()
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian", *words) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1, errors
    assert "a.tif" in errors and not (tmp_path / "out").exists()


def test_axes_are_for_stacks(box, tmp_path, capsys):
    box()
    (tmp_path / "a.png").write_bytes(pictures.pixels.picture_bytes(COLOURS[0], "png"))
    assert run(tmp_path / "a.png", tmp_path / "out", "law=gaussian", "axes=TYX") == 2
    assert "axes=TYX: a.png is no TIFF with dimensions to name" in capsys.readouterr().err


def test_a_plane_that_is_broken_stops_the_work_before_anything_is_written(box, tmp_path, capsys):
    box()
    tifffile.imwrite(tmp_path / "a.tif", PLANES, ome=True, metadata=OME, compression="zlib", **GREY)
    data = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        place = file.pages[7].dataoffsets[0]
        data[place : place + 20] = bytes(20)
    (tmp_path / "a.tif").write_bytes(data)
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian") == 2
    assert "image=a.tif[t1,z0,c1]: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stack_of_gigabytes_is_written_as_bigtiff(box, tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "CLASSIC", 1000)
    box(radius=0)
    array = of_kind("pages", tmp_path / "a.tif")
    assert run(tmp_path / "a.tif", tmp_path / "out", "law=gaussian") == 0
    with tifffile.TiffFile(tmp_path / "out" / "a.tif") as file:
        assert file.is_bigtiff and np.array_equal(file.asarray(), array)


@pytest.mark.slow
def test_fifty_planes_of_512_are_restored_within_two_gigabytes(tmp_path):
    """By the shipped model, in a process of its own: the most memory that it ever held."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:512, :512]
    smooth = 300 + 200 * np.sin(x / 20) * np.cos(y / 30)
    planes = (2 * rng.poisson(smooth / 2, (50, 512, 512)) + 100).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", planes, imagej=True, metadata={"axes": "TYX"})
    program = (
        "import resource, sys, sample; code = sample.main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    words = ["pretrained/noise2score_grey", f"denoise={tmp_path}/a.tif", f"out={tmp_path}/out"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "device=cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kilobytes = int(done.stderr.split()[-1])
    assert kilobytes < 2_000_000, kilobytes
    with tifffile.TiffFile(tmp_path / "out" / "a.tif") as file:
        found = file.asarray().astype(float)
        assert file.series[0].axes == "TYX" and found.shape == planes.shape
    before, after = (np.mean((a - smooth - 100) ** 2) for a in (planes.astype(float), found))
    assert after < before / 10


def test_imagejs_micrometres_in_any_letters_come_back(box, tmp_path):
    """ImageJ writes \\u00B5m, other programs the letter itself, which tifffile does not write."""
    box(radius=0)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PLANES[0, :, 0], imagej=True, metadata={"axes": "ZYX", "unit": "um"})
    path.write_bytes(path.read_bytes().replace(b"unit=um", b"unit=\xb5m"))
    assert run(path, tmp_path / "out", "law=gaussian", "level=.01") == 0
    with tifffile.TiffFile(tmp_path / "out" / "a.tif") as file:
        assert file.imagej_metadata["unit"] == "\\u00B5m" and file.series[0].axes == "ZYX"


def test_alpha_is_left_out_of_ome_and_said(box, tmp_path, capsys):
    box(radius=0)
    levels = random_levels(2, 32, 32, 4)
    options = {"photometric": "rgb", "extrasamples": ["unassalpha"], "metadata": {"axes": "ZYXS"}}
    tifffile.imwrite(tmp_path / "a.ome.tif", levels, ome=True, **options)
    assert run(tmp_path / "a.ome.tif", tmp_path / "out", "law=gaussian", "level=9") == 0
    assert "a.ome.tif: has alpha, which is left out" in capsys.readouterr().err
    with tifffile.TiffFile(tmp_path / "out" / "a.ome.tif") as file:
        assert (file.series[0].kind, file.series[0].axes) == ("ome", "ZYXS")
        assert np.array_equal(file.asarray(), levels[..., :3])
