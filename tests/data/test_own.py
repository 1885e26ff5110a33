"""Formats of own data, and reading them as they are needed."""

import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genmodels import images
from genmodels.atomic import write_bytes
from genmodels.config import DataConfig
from genmodels.data import load_split, own
from genmodels.images import arrays
from tests.helpers.small_sets import make_zip, on_disk_cases, png

REAL = os.environ.get("GENMODELS_DATA", "")


def edm_zip(path, labels, count=3):
    names = [f"0000{i % 2}/img{i:08d}.png" for i in range(count)]
    entries = {name: png(10 * i) for i, name in enumerate(names)}
    labels = labels and [[n, label] for n, label in zip(names, labels)]
    return make_zip(path, entries | {"dataset.json": json.dumps({"labels": labels})})


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([2, 0, 1], [2, 0, 1]),
        ([[0, 0, 1], [1, 0, 0], [0, 1, 0]], [2, 0, 1]),
        ([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], [1, 0, 1]),
        (None, [-1, -1, -1]),
    ],
)
def test_labels_of_edms_zip(tmp_path, labels, expected):
    """Files are sorted by path: 00000/img0, 00000/img2, 00001/img1."""
    pixels, read = load_split(edm_zip(tmp_path / "a.zip", labels), "train")
    assert pixels[:, 0, 0, 0].tolist() == [0, 20, 10]
    assert read.tolist() == [expected[i] for i in (0, 2, 1)]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0.2, 0.8], [1, 0], [0, 1]], "dataset.json holds a vector that is not one-hot .image 0."),
        ([[1, 1], [1, 0], [0, 1]], "not one-hot"),
        ([0.5, 1.0, 2.0], "dataset.json holds float64; give one whole number"),
        ([0, [1, 0], 1], "dataset.json mixes numbers and vectors"),
        (["cat", "dog", "cat"], "dataset.json holds <U3"),
        ([-2, 0, 1], "dataset.json holds -2..1; classes are numbered from 0"),
        ([True, False, True], "dataset.json holds bool"),
        ([0, 1], "dataset.json has no label for 00000/img00000002.png"),
    ],
)
def test_labels_that_name_no_class_are_refused(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        load_split(edm_zip(tmp_path / "a.zip", labels), "train")


def test_a_folder_may_hold_a_dataset_json_too(tmp_path):
    for i in range(2):
        write_bytes(tmp_path / f"{i}.png", png(i))
    (tmp_path / "dataset.json").write_text('{"labels": {"0.png": 1, "1.png": 0}}')
    cfg = DataConfig(name="imagefolder", root=str(tmp_path), holdout=0.0)
    assert load_split(cfg, "train")[1].tolist() == [1, 0]
    (tmp_path / "dataset.json").write_text('{"labels": {"0.png": 1, "2.png": 0}}')
    with pytest.raises(ValueError, match="no label for 1.png .and 0 more."):
        load_split(cfg, "train")
    (tmp_path / "dataset.json").write_text('{"labels": {"0.png": 1, "1.png": 0, "2.png": 0}}')
    with pytest.raises(ValueError, match="names 2.png, not there"):
        load_split(cfg, "train")


def test_a_zip_of_a_folder_reads_as_the_folder(tmp_path):
    """A zip with one folder around everything; subfolders are classes, train/ and val/ splits."""
    entries = {
        "set/train/a/1.png": png(1),
        "set/train/b/2.png": png(2),
        "set/val/b/3.png": png(3),
        "__MACOSX/set/._1.png": b"fork",
        "set/.DS_Store": b"x",
    }
    cfg = make_zip(tmp_path / "a.zip", entries)
    train, held_out = load_split(cfg, "train"), load_split(cfg, "test")
    assert train[0][:, 0, 0, 0].tolist() == [1, 2] and train[1].tolist() == [0, 1]
    assert held_out[0][:, 0, 0, 0].tolist() == [3] and held_out[1].tolist() == [1]


def test_any_layout_and_mixed_formats(tmp_path):
    """The same grey square in every format and mode that is promised, in folders of any depth."""
    colour = (100, 100, 100)
    pictures = {
        "a.png": Image.new("RGB", (8, 8), colour),
        "deep/er/b.jpg": Image.new("RGB", (8, 8), colour),
        "deep/c.JPEG": Image.new("L", (8, 8), 100),
        "d.webp": Image.new("RGB", (8, 8), colour),
        "e.tiff": Image.new("RGB", (8, 8), colour),
        "f.bmp": Image.new("RGB", (8, 8), colour),
        "sixteen.png": Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)),
        "sixteen.tif": Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)),
        "alpha.png": Image.new("RGBA", (8, 8), (*colour, 7)),
        "grey_alpha.png": Image.new("LA", (8, 8), (100, 7)),
        "palette.png": Image.new("RGB", (8, 8), colour).quantize(4),
        "cmyk.jpg": Image.new("RGB", (8, 8), colour).convert("CMYK"),
    }
    for name, picture in pictures.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    cfg = DataConfig(name="imagefolder", root=str(tmp_path), holdout=0.0)
    pixels, labels = load_split(cfg, "train")
    assert pixels.shape == (len(pictures), 3, 8, 8) and labels.unique().tolist() == [-1]
    assert (pixels.int() - 100).abs().max() <= 2  # JPEG and WebP are lossy
    exact = [i for i, name in enumerate(images.Tree(tmp_path).names) if "jp" not in name.lower()]
    assert (pixels[exact].int() - 100).abs().max() <= 1
    cfg.channels = 1
    assert (load_split(cfg, "train")[0].int() - 100).abs().max() <= 2


def test_linked_folders_and_pictures_count(tmp_path):
    """A class is often a link to another disk; a link to nothing is an error, not a gap."""
    for name in ("elsewhere/1.png", "set/cat/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(7))
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "cat" / "loop").symlink_to(tmp_path / "set")
    cfg = DataConfig(name="imagefolder", root=str(tmp_path / "set"), holdout=0.0)
    pixels, labels = load_split(cfg, "train")
    assert len(pixels) == 2 and labels.tolist() == [0, 1]
    (tmp_path / "set" / "dog" / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="image=.*dog/2.png: cannot be read"):
        load_split(cfg, "train")


def test_no_more_of_a_zip_is_unpacked_than_it_promises(tmp_path):
    """40 MB of zeros that the directory calls 1,000 bytes."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(40 << 20))
    blob = bytearray(path.read_bytes())
    size = blob.index(b"PK\x01\x02") + 24
    blob[size : size + 4] = (1000).to_bytes(4, "little")
    path.write_bytes(blob)
    tracemalloc.start()
    with pytest.raises(ValueError, match="data.root=.*a.zip: cannot be read .Bad CRC-32"):
        images.Tree(path, "data.root").read("a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_an_npz_larger_than_memory_is_refused_unread(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((100, 8, 8, 3), np.uint8))
    assert len(arrays.npz_images(tmp_path / "a.npz")[0]) == 100
    monkeypatch.setattr(arrays, "memory_size", lambda: 10_000)
    with pytest.raises(ValueError, match="npz=.*images unpacks to .* MB, more than"):
        arrays.npz_images(tmp_path / "a.npz")


def test_resolution_0_takes_pictures_of_one_size_as_they_are(tmp_path):
    cfg = make_zip(tmp_path / "a.zip", {"a.png": png(1, (6, 4)), "b.png": png(2, (6, 4))})
    assert load_split(cfg, "train")[0].shape == (2, 3, 4, 6)
    cfg = make_zip(tmp_path / "b.zip", {"a.png": png(1, (6, 4)), "b.png": png(2, (4, 6))})
    with pytest.raises(ValueError, match=r"data.resolution=0: .*b.zip/b.png is \(6, 4\), not \(4"):
        load_split(cfg, "train")
    cfg.resolution, cfg.crop = 4, "none"
    with pytest.raises(ValueError, match=r"data.crop=none: .*a.png is \(4, 6\), not \(4, 4\)"):
        load_split(cfg, "train")


def test_adm_crop_against_pillow_and_plain_means():
    """Halving is the mean of 2x2 blocks; a size that is reached by halving is left alone then."""
    image = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    halved = torch.nn.functional.avg_pool2d(image.double(), 2)[:, :, 4:20]
    off = images.fit(image, 16, "adm") - halved
    assert off.min() >= 0 and off.max() <= 1  # Pillow rounds halves up, of rows, then of columns
    assert torch.equal(images.fit(image[:, :, 8:40], 32, "adm"), image[:, :, 8:40])
    grey = images.fit(image[:1], 20, "adm")
    resized = Image.fromarray(image[0].numpy()).resize((30, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(grey[0].numpy(), np.array(resized)[:, 5:25])


@pytest.mark.skipif(not REAL, reason="GENMODELS_DATA is not set: no real photographs here")
@pytest.mark.parametrize("side", [32, 64])
def test_adm_crop_makes_the_published_images(side):
    """Originals of many sizes against the arrays made from them by another program."""
    folder = Path(REAL) / "imagenet_sample"
    with np.load(folder / f"imagenet_sample_{side}.npz") as file:
        expected = dict(zip(file["names"].tolist(), file["images"]))
    found = sorted((folder / "jpeg").iterdir())
    worst = 0
    for path in found:
        made = images.fit(images.read_image(path, 3), side, "adm").permute(1, 2, 0).numpy()
        worst = max(worst, np.abs(made.astype(int) - expected[path.stem].astype(int)).max())
    assert len(found) > 30 and worst <= 1, worst


def test_npy_is_mapped_with_labels_beside_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 5, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    cfg = DataConfig(name="npy", root=str(tmp_path / "a.npy"), holdout=0.25, device="disk")
    parts = [load_split(cfg, split) for split in ("train", "test")]
    assert [len(part[0]) for part in parts] == [15, 5] and parts[0][1].unique().tolist() == [-1]
    found = torch.cat([part[0][:] for part in parts]).permute(0, 2, 3, 1).numpy()
    assert sorted(image.tobytes() for image in found) == sorted(image.tobytes() for image in pixels)
    np.save(tmp_path / "a_labels.npy", np.arange(20))
    train, labels = load_split(cfg, "train")
    assert all(
        np.array_equal(train[i : i + 1][0].permute(1, 2, 0), pixels[labels[i]]) for i in range(15)
    )
    (tmp_path / "a_labels.npy").write_bytes(b"spoilt")  # read once, not with every batch
    assert len(train[:2]) == 2
    (tmp_path / "a_labels.npy").unlink()
    np.save(tmp_path / "a.npy", pixels[..., 0])
    assert load_split(cfg, "train")[0].shape == (15, 1, 5, 6)
    assert images.read_images(tmp_path / "a.npy").shape == (20, 1, 5, 6)


def test_more_images_than_memory_are_refused():
    huge = own.OnDisk(None, (3, 1000, 1000), torch.arange(10_000_000))
    with pytest.raises(ValueError, match="data.device=auto: 10000000 images take 30000 GB .*disk"):
        huge.load()


def test_disk_is_for_files_only():
    with pytest.raises(ValueError, match="data.device=disk: digits is read whole; convert it"):
        load_split(DataConfig(device="disk"), "train")


@pytest.mark.parametrize("name", ["npy", "zip", "imagefolder", "npz", "moons"])
def test_memorised_for_every_kind_of_set(tmp_path, name):
    """Copies of training images are all known as copies, held-out ones are not."""
    from genmodels.metrics.manifold import memorised

    cases = on_disk_cases(tmp_path)
    np.savez(tmp_path / "a.npz", images=np.load(cases["npy"]))
    root = str(cases.get(name, tmp_path / "a.npz"))
    cfg = DataConfig(name=name, root=root, holdout=0.5, points=120)
    parts = [images.as_bytes(load_split(cfg, split)[0]) for split in ("train", "test")]
    train, held_out = (part.flatten(1).float() for part in parts)
    assert len(held_out) >= 20
    assert memorised(train, train, held_out) == 1
    assert memorised(held_out, train, held_out) <= 0.2
