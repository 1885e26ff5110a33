"""Cases of test_bad_input.py: broken pictures, zips, arrays and labels."""

import io
import os
import zipfile

import numpy as np
from PIL import Image

from tests.helpers.bad_words import DEBUG, DIGITS, case
from tests.helpers.tiny import TINY


def picture(path, size=(8, 8), mode="RGB", colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def spoilt(spoil, name="b.png"):
    """Return a maker of a folder with a good picture and one whose bytes are spoilt."""

    def make(folder):
        picture(folder / "a.png")
        path = picture(folder / name, (64, 64), colour=(1, 2, 3))
        path.write_bytes(spoil(path.read_bytes()))

    return make


def pictures_case(name, make, *parts, words=()):
    words = ["info", "{dir}", "resolution=8", *words]
    case(f"picture-{name}", "data", words, *parts, make=make)


pictures_case(
    "truncated", spoilt(lambda b: b[:-30]), "image={dir}/b.png: cannot be read (", "remov"
)
pictures_case("jpeg", spoilt(lambda b: b[:300], "b.jpg"), "image={dir}/b.jpg: cannot be read (")
pictures_case("webp", spoilt(lambda b: b[:30], "b.webp"), "image={dir}/b.webp: cannot be read (")
pictures_case("tiff", spoilt(lambda b: b[:200], "b.tif"), "image={dir}/b.tif: cannot be read (")
pictures_case("empty", spoilt(lambda b: b""), "image={dir}/b.png: cannot be read (", "remove it")
pictures_case("html", spoilt(lambda b: b"<html>404"), "b.png: cannot be read (it is no picture")
pictures_case("half-header", spoilt(lambda b: b[:20]), "image={dir}/b.png: cannot be read (")
pictures_case(
    "garbage", spoilt(lambda b: b[:45] + b"\xff" * (len(b) - 45)), "b.png: cannot be read"
)
pictures_case(
    "float",
    lambda folder: Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "a.tif"),
    "image={dir}/a.tif: has more than 16 bits a pixel; convert it to 8 or 16 bits",
)
pictures_case(
    "integer",
    lambda folder: Image.fromarray(np.full((8, 8), 200, np.int32)).save(folder / "a.tif"),
    "image={dir}/a.tif: has more than 16 bits a pixel; convert it to 8 or 16 bits",
)
pictures_case(
    "link", lambda folder: (folder / "a.png").symlink_to("b.png"), "a.png: cannot be read (", "No s"
)
pictures_case("none", lambda folder: (folder / "a.txt").write_text(""), "{dir}: holds no picture (")


def bomb(folder):
    """A PNG of 150 kB that says it is 30000 x 30000."""
    Image.new("1", (12000, 12000)).save(folder / "a.png")


pictures_case("bomb", bomb, "image={dir}/a.png: cannot be read (Image size (144000000 pixels)")


def sizes(folder):
    picture(folder / "a.png")
    picture(folder / "b.png", (9, 8))


case(
    "picture-sizes",
    "data",
    ["info", "{dir}"],
    "data.resolution=0: {dir}/b.png is (8, 9), not (8,",
    make=sizes,
)
case(
    "picture-crop",
    "data",
    ["info", "{dir}", "resolution=8", "crop=none"],
    "data.crop=none: {dir}/b.png is (8, 9), not (8, 8)",
    make=sizes,
)


def one_class_missing(folder):
    picture(folder / "train" / "a" / "1.png")
    picture(folder / "val" / "b" / "2.png")


case(
    "picture-class",
    "data",
    ["info", "{dir}"],
    "data.root={dir}: val/b/2.png is in no class of tr",
    make=one_class_missing,
)


def dataset_json(text):
    def make(folder):
        picture(folder / "a.png")
        picture(folder / "b.png")
        (folder / "dataset.json").write_text(text)

    return make


for name, text, *parts in [
    ("json", "{", 'dataset.json is not {"labels": '),
    ("list", "[1, 2]", 'dataset.json is not {"labels": '),
    ("number", '{"labels": 3}', 'dataset.json is not {"labels": '),
    ("flat", '{"labels": [1, 2]}', 'dataset.json is not {"labels": '),
    ("missing", '{"labels": [["a.png", 1]]}', "has no label for b.png (and 0 more); make the two"),
    ("strange", '{"labels": {"a.png": 1, "b.png": 1, "c.png": 1}}', "names c.png, not there"),
    (
        "negative",
        '{"labels": {"a.png": -7, "b.png": 1}}',
        "holds -7..1; classes are numbered from 0",
    ),
    ("huge", '{"labels": {"a.png": 4000000000, "b.png": 1}}', "classes are numbered from 0"),
    ("soft", '{"labels": {"a.png": [0.5, 0.5], "b.png": [1, 0]}}', "not one-hot (image 0)"),
    ("words", '{"labels": {"a.png": "cat", "b.png": "dog"}}', "give one whole number for each"),
    ("ragged", '{"labels": {"a.png": [1, 0], "b.png": [1]}}', "mixes numbers and vectors"),
    ("mixed", '{"labels": [[1, 2], ["b", 3]]}', "has no label for a.png (and 1 more)"),
    ("twice", '{"labels": [["a.png", 1], ["b.png", 1], ["a.png", 0]]}', "names a picture twice"),
    ("null", '{"labels": {"a.png": null, "b.png": 1}}', "give one whole number for each"),
]:
    case(
        f"labels-{name}",
        "data",
        ["info", "{dir}"],
        "data.root={dir}: dataset.json",
        *parts,
        make=dataset_json(text),
    )


def zipped(entries, **options):
    def make(folder):
        with zipfile.ZipFile(folder / "a.zip", "w", **options) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)

    return make


def png_bytes():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def zip_case(name, make, *parts):
    case(f"zip-{name}", "data", ["info", "{dir}/a.zip"], *parts, make=make)


def cut_zip(folder):
    zipped({"a.png": png_bytes()})(folder)
    blob = (folder / "a.zip").read_bytes()
    (folder / "a.zip").write_bytes(blob[: len(blob) // 2])


def encrypted(folder):
    zipped({"a.png": png_bytes()})(folder)
    blob = bytearray((folder / "a.zip").read_bytes())
    blob[6] |= 1  # the flag of the local header, then that of the directory
    blob[blob.index(b"PK\x01\x02") + 8] |= 1
    (folder / "a.zip").write_bytes(blob)


def wrong_crc(folder):
    zipped({"a.png": png_bytes()})(folder)
    blob = bytearray((folder / "a.zip").read_bytes())
    blob[60] ^= 0xFF
    (folder / "a.zip").write_bytes(blob)


def zip_bomb(folder):
    """An entry that says it unpacks to 3 GB (the header is enough to refuse it)."""
    zipped({"a.png": b"\0" * 10_000, "b.png": png_bytes()}, compression=zipfile.ZIP_DEFLATED)(
        folder
    )
    blob = bytearray((folder / "a.zip").read_bytes())
    start = blob.index(b"PK\x01\x02")
    blob[start + 24 : start + 28] = (3_000_000_000).to_bytes(4, "little")
    (folder / "a.zip").write_bytes(blob)


zip_case("truncated", cut_zip, "data.root={dir}/a.zip: cannot be read (", "fetch or make it again")
zip_case("empty", lambda folder: (folder / "a.zip").write_bytes(b""), "a.zip: cannot be read (")
zip_case("text", lambda folder: (folder / "a.zip").write_text("hello"), "a.zip: cannot be read (")
zip_case("no-picture", zipped({"a.txt": "x"}), "data.root={dir}/a.zip: holds no picture")
zip_case("slip", zipped({"../../evil.png": b"x"}), "entry ../../evil.png points outside the zip")
zip_case("absolute", zipped({"/etc/evil.png": b"x"}), "entry /etc/evil.png points outside the zip")
zip_case("drive", zipped({"C:\\evil.png": b"x"}), "points outside the zip; make it anew")
zip_case("encrypted", encrypted, "data.root={dir}/a.zip: cannot be read (", "encrypted")
zip_case("crc", wrong_crc, "data.root={dir}/a.zip: cannot be read (", "Bad CRC-32")
zip_case(
    "lzma", zipped({"a.png": png_bytes()}, compression=zipfile.ZIP_LZMA), "another method than defl"
)
zip_case("bomb", zip_bomb, "entry a.png unpacks to 2861 MB, more than 1024; take it out")
zip_case(
    "broken-picture", zipped({"a.png": b"\x89PNG"}), "image={dir}/a.zip/a.png: cannot be read ("
)
zip_case(
    "json", zipped({"a.png": png_bytes(), "dataset.json": b"\xff\xfe{"}), "dataset.json is not"
)


def array_case(name, array, *parts, labels=None):
    def make(folder):
        np.save(folder / "a.npy", array)
        if labels is not None:
            np.save(folder / "a_labels.npy", labels)

    case(f"npy-{name}", "data", ["info", "{dir}/a.npy"], *parts, make=make)


GOOD = np.zeros((4, 8, 8, 3), np.uint8)
array_case("nan", np.full((4, 8, 8, 3), np.nan), "it is float64 with NaN", "must be uint8")
array_case(
    "planes", np.zeros((4, 5, 8, 8), np.uint8), "is uint8 (4, 5, 8, 8); must be uint8 (N, H, W"
)
array_case("channels", np.zeros((4, 8, 8, 4), np.uint8), "must be uint8 (N, H, W, 1 or 3)")
array_case("flat", np.zeros((4, 64), np.uint8), "is uint8 (4, 64); must be uint8 (N, H, W")
array_case("none", np.zeros((0, 8, 8, 3), np.uint8), "has shape (0, 8, 8, 3): holds no picture")
array_case("labels", GOOD, "npy={dir}/a_labels.npy: it has shape (3,) for 4", labels=np.arange(3))
array_case("float-labels", GOOD, "holds float64; give one whole number", labels=np.ones(4))
array_case("minus-labels", GOOD, "holds -5..-2; classes are numbered", labels=np.arange(4) - 5)
case(
    "npy-pickle",
    "data",
    ["info", "{dir}/a.npy"],
    "npy={dir}/a.npy: cannot be read (",
    "make it again",
    make=lambda folder: np.save(folder / "a.npy", np.array([{}], object), allow_pickle=True),
)
case(
    "npy-truncated",
    "data",
    ["info", "{dir}/a.npy"],
    "npy={dir}/a.npy: cannot be read (",
    make=lambda folder: (np.save(folder / "a.npy", GOOD), os.truncate(folder / "a.npy", 200)),
)
case(
    "npy-empty",
    "data",
    ["info", "{dir}/a.npy"],
    "npy={dir}/a.npy: cannot be read (",
    make=lambda folder: (folder / "a.npy").write_bytes(b""),
)


def npz_case(name, make, *parts):
    case(f"npz-{name}", "data", ["info", "{dir}/a.npz"], *parts, make=make)


def npz_of(**arrays):
    return lambda folder: np.savez(folder / "a.npz", **arrays)


npz_case(
    "text", lambda f: (f / "a.npz").write_text("x"), "npz={dir}/a.npz: cannot be read (", "again"
)
npz_case("none", npz_of(), "npz={dir}/a.npz: cannot be read (no array in it)")
npz_case("test", npz_of(test_images=np.zeros((4, 8, 8, 3), np.uint8)), "test_images alone; add")
npz_case(
    "float",
    npz_of(images=np.full((4, 8, 8, 3), 0.3)),
    "npz={dir}/a.npz: images is float64 from 0.3 to 0.3, and not all are levels, nor levels divid",
    "must be uint8 (N, H, W, 1 or 3), values 0..255",
)
npz_case("object", npz_of(images=np.array([{}], object)), "npz={dir}/a.npz: cannot be read (")
npz_case(
    "labels", npz_of(images=GOOD, labels=[1, 2]), "labels has shape (2,) for 4 images; give one"
)
npz_case(
    "words", npz_of(images=GOOD, labels=list("abcd")), "labels holds <U1; give one whole number"
)
npz_case(
    "cut",
    lambda f: (np.savez(f / "a.npz", images=GOOD), os.truncate(f / "a.npz", 300)),
    "npz={dir}/a.npz: cannot be read (",
)
case(
    "npz-class",
    "train",
    [
        DIGITS,
        DEBUG,
        *(word for word in TINY if word != "data.labels=false"),
        "data.name=npz",
        "data.root={dir}/a.npz",
        "data.labels=true",
        "out_dir={dir}/runs",
    ],
    "data.labels=true: npz at {dir}/a.npz has no class labels",
    make=npz_of(images=GOOD),
)
case(
    "all-held-out",
    "train",
    [
        DIGITS,
        DEBUG,
        *TINY,
        "data.name=npz",
        "data.root={dir}/a.npz",
        "data.holdout=0.9",
        "out_dir={dir}/runs",
    ],
    "data.holdout=0.9: leaves no image to train on",
    make=npz_of(images=GOOD),
)
case(
    "balanced",
    "train",
    [
        DIGITS,
        DEBUG,
        *TINY,
        "data.name=npz",
        "data.root={dir}/a.npz",
        "data.balanced=true",
        "out_dir={dir}/runs",
    ],
    "data.balanced=true: npz has images without a class label",
    make=npz_of(images=GOOD),
)
case(
    "split-shapes",
    "train",
    [DIGITS, DEBUG, *TINY, "data.name=npz", "data.root={dir}/a.npz", "out_dir={dir}/runs"],
    "data.root={dir}/a.npz: training images are (3, 8, 8), held-out ones (3, 6, 6); make them",
    make=npz_of(train_images=GOOD, test_images=GOOD[:, :6, :6]),
)
