"""Formats of own data, and reading them as they are needed."""

import io
import json
import os
import pickle
import sys
import tracemalloc
import types
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genmodels import arrays, files, images, own_data
from genmodels.config import DataConfig
from genmodels.data import ImageDataModule, TrainStream, fill_in, load_split

REAL = os.environ.get("GENMODELS_DATA", "")


def png(level, size=(8, 8), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, level if mode == "L" else (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def make_zip(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return DataConfig(name="zip", root=str(path), holdout=0.0)


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
        images.write_bytes(tmp_path / f"{i}.png", png(i))
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
    entries = {"set/train/a/1.png": png(1), "set/train/b/2.png": png(2), "set/val/b/3.png": png(3),
               "__MACOSX/set/._1.png": b"fork", "set/.DS_Store": b"x"}  # fmt: skip
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
    exact = [i for i, name in enumerate(files.Tree(tmp_path).names) if "jp" not in name.lower()]
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
        files.Tree(path, "data.root").read("a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_an_npz_larger_than_memory_is_refused_unread(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((100, 8, 8, 3), np.uint8))
    assert len(arrays.npz_images(tmp_path / "a.npz")[0]) == 100
    monkeypatch.setattr(arrays, "memory_size", lambda: 10_000)
    with pytest.raises(ValueError, match="npz=.*images unpacks to 0 GB, more than this machine"):
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
    assert all(np.array_equal(train[i : i + 1][0].permute(1, 2, 0), pixels[labels[i]])
               for i in range(15))  # fmt: skip
    (tmp_path / "a_labels.npy").write_bytes(b"spoilt")  # read once, not with every batch
    assert len(train[:2]) == 2
    (tmp_path / "a_labels.npy").unlink()
    np.save(tmp_path / "a.npy", pixels[..., 0])
    assert load_split(cfg, "train")[0].shape == (15, 1, 5, 6)
    assert images.read_images(tmp_path / "a.npy").shape == (20, 1, 5, 6)


def on_disk_cases(tmp_path):
    """The same 60 images with labels, as npy, zip and folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(60) % 3
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "a_labels.npy", labels)
    entries = {}
    for i, image in enumerate(pixels):
        entries[f"{i:02d}.png"] = images.png_bytes(torch.from_numpy(image).permute(2, 0, 1))
    pairs = [[name, int(label)] for name, label in zip(entries, labels)]
    make_zip(tmp_path / "a.zip", entries | {"dataset.json": json.dumps({"labels": pairs})})
    (tmp_path / "a").mkdir()
    for name, content in entries.items():
        (tmp_path / "a" / name).write_bytes(content)
    (tmp_path / "a" / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return {"npy": tmp_path / "a.npy", "zip": tmp_path / "a.zip", "imagefolder": tmp_path / "a"}


@pytest.mark.parametrize("name", ["npy", "zip", "imagefolder"])
def test_images_from_disk_make_the_same_batches(tmp_path, name):
    """In memory, read in place, by two workers, by two ranks, and after a resume at step 4."""
    root = str(on_disk_cases(tmp_path)[name])
    words = {"name": name, "root": root, "pad": 1, "holdout": 0.1}
    memory = load_split(DataConfig(**words), "train")
    disk = load_split(DataConfig(**words, device="disk"), "train")
    assert isinstance(disk[0], own_data.OnDisk) and disk[0].shape == tuple(memory[0].shape)
    assert disk[0].nbytes == memory[0].nbytes
    assert torch.equal(torch.cat(list(disk[0].split(4))), memory[0])

    def batches(pixels, labels, step=0, count=12, **options):
        arguments = {"seed": 3, "batch_size": 8, "first_step": lambda: step} | options
        return list(islice(TrainStream(pixels, labels, **arguments), count))

    def same(found, expected):
        assert len(found) == len(expected) > 0
        for a, b in zip(found, expected):
            assert all(torch.equal(a[key], b[key]) for key in ("image", "label", "n"))

    whole = batches(*memory, accumulate=2)
    same(batches(*disk, accumulate=2), whole)
    same(batches(*disk, accumulate=2, workers=2), whole)
    same(batches(*disk, accumulate=2, workers=2, step=4, count=4), whole[8:])
    ranks = [batches(*disk, accumulate=2, workers=1, rank=r, world=2) for r in range(2)]
    pairs = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(*ranks)]
    same(pairs, whole)


def test_images_on_disk_travel_to_any_worker(tmp_path):
    """Workers that do not begin as copies of the process (spawn, forkserver) get them pickled."""
    for name, root in on_disk_cases(tmp_path).items():
        pixels, _ = load_split(DataConfig(name=name, root=str(root), device="disk"), "train")
        assert torch.equal(pickle.loads(pickle.dumps(pixels))[:3], pixels[:3])


def test_a_broken_picture_in_a_worker_is_one_line(tmp_path):
    cases = on_disk_cases(tmp_path)
    broken = cases["imagefolder"] / "07.png"
    broken.write_bytes(broken.read_bytes()[:60])
    cfg = DataConfig(name="imagefolder", root=str(cases["imagefolder"]), device="disk", holdout=0.0)
    stream = TrainStream(*load_split(cfg, "train"), 0, 60, lambda: 0, workers=1)
    with pytest.raises(ValueError, match=r"^image=.*07.png: cannot be read \(.*\); remove it$"):
        next(iter(stream))


def test_more_images_than_memory_are_refused():
    huge = own_data.OnDisk(None, (3, 1000, 1000), torch.arange(10_000_000))
    with pytest.raises(ValueError, match="data.device=auto: 10000000 images take 30000 GB .*disk"):
        huge.load()


def test_disk_is_for_files_only():
    with pytest.raises(ValueError, match="data.device=disk: digits is read whole; convert it"):
        load_split(DataConfig(device="disk"), "train")


def test_balanced_classes():
    """Ten images of class 0, one of class 1, five of class 2: each class has every third place."""
    labels = torch.tensor([0] * 10 + [1] + [2] * 5)
    pixels = torch.arange(16, dtype=torch.uint8).reshape(16, 1, 1, 1)

    def stream(step=0, **options):
        return iter(TrainStream(pixels, labels, 7, 12, lambda: step, balanced=True, **options))

    batches = list(islice(stream(), 30))
    drawn = torch.cat([batch["label"] for batch in batches]).reshape(-1, 3)
    assert torch.equal(drawn.sort(1).values, torch.arange(3).expand(120, 3))
    assert len({tuple(row) for row in drawn.tolist()}) == 6  # in every order
    numbers = torch.cat([batch["image"].flatten() for batch in batches])
    zeros = numbers[numbers < 10].reshape(12, 10)  # every pass over class 0 holds all of it
    assert torch.equal(zeros.sort(1).values, torch.arange(10, dtype=torch.uint8).expand(12, 10))
    assert not torch.equal(zeros[0], zeros[1])
    later = list(islice(stream(step=20), 10))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(later, batches[20:]))
    parts = list(islice(stream(rank=1, world=3), 5))
    assert all(torch.equal(a["image"], b["image"][4:8]) for a, b in zip(parts, batches))
    with pytest.raises(ValueError, match="data.balanced=true: there are images without a class"):
        TrainStream(pixels, labels - 1, 0, 4, lambda: 0, balanced=True)


def test_balanced_data_without_labels_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 2, 2, 1), np.uint8))
    cfg = DataConfig(name="npy", root=str(tmp_path / "a.npy"), balanced=True)
    with pytest.raises(ValueError, match="data.balanced=true: npy has images without a class"):
        ImageDataModule(cfg)


def write_cifar(root, name, keys, count=6):
    """A small copy of torchvision's files; returns the names for its md5 check."""
    import hashlib

    folder = root / name
    folder.mkdir()
    rng, sums = np.random.default_rng(0), []
    for file in keys:
        data = rng.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        content = {"data": data, "fine_labels": list(range(count)), "fine_label_names": ["a"],
                   "labels": list(range(count)), "label_names": ["a"]}  # fmt: skip
        blob = pickle.dumps(content)
        (folder / file).write_bytes(blob)
        sums.append([file, hashlib.md5(blob).hexdigest()])
    return sums


def test_cifar100_by_torchvision(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    train, test, meta = write_cifar(tmp_path, "cifar-100-python", ["train", "test", "meta"])
    monkeypatch.setattr(CIFAR100, "train_list", [train])
    monkeypatch.setattr(CIFAR100, "test_list", [test])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"filename": "meta", "md5": meta[1]})
    cfg = DataConfig(name="cifar100", root=str(tmp_path))
    pixels, labels = load_split(cfg, "test")
    stored = pickle.loads((tmp_path / "cifar-100-python" / "test").read_bytes())["data"]
    assert np.array_equal(pixels.numpy(), stored.reshape(-1, 3, 32, 32))
    assert labels.tolist() == list(range(6)) and fill_in(cfg).classes == 100
    (tmp_path / "cifar-100-python" / "test").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cifar100 is not there, or not whole; put"):
        load_split(cfg, "test")


def test_svhn_by_torchvision(tmp_path, monkeypatch):
    import hashlib

    from scipy.io import savemat
    from torchvision.datasets import SVHN

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    path = tmp_path / "train_32x32.mat"
    savemat(path, {"X": pixels, "y": np.array([[1], [10], [3], [2]])})
    entry = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", {"train": entry})
    read, labels = load_split(DataConfig(name="svhn", root=str(tmp_path)), "train")
    assert np.array_equal(read.numpy(), pixels.transpose(3, 2, 0, 1))
    assert labels.tolist() == [1, 0, 3, 2]  # SVHN writes 10 for the digit 0


def test_a_failed_download_names_the_place(tmp_path, monkeypatch):
    import torchvision

    def offline(*args, download=False, **kwargs):
        raise RuntimeError("<urlopen error no network>" if download else "not found")

    for name in ("CIFAR10", "MNIST"):
        monkeypatch.setattr(torchvision.datasets, name, offline)
        cfg = DataConfig(name=name.lower(), root=str(tmp_path), download=True)
        with pytest.raises(ValueError, match="could not be fetched .*no network.*put .* from http"):
            load_split(cfg, "train")
    assert not list(tmp_path.iterdir())


def test_hf_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="data.name=hf: .*pip install datasets"):
        load_split(DataConfig(name="hf", root="x"), "train")


def real_datasets():
    return pytest.importorskip("datasets", reason="Hugging Face's `datasets` is not installed")


def test_hf_from_a_folder(tmp_path):
    """The library itself writes the folder; bytes must come back as they went in."""
    datasets = real_datasets()
    features = datasets.Features(
        {"id": datasets.Value("int64"), "img": datasets.Image(),
         "label": datasets.ClassLabel(names=["a", "b"])}
    )  # fmt: skip
    rows = {"id": list(range(10)), "label": [i % 2 for i in range(10)],
            "img": [{"bytes": png(i), "path": None} for i in range(10)]}  # fmt: skip
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.save_to_disk(str(tmp_path / "one"))
    cfg = DataConfig(name="hf", root=str(tmp_path / "one"), holdout=0.2)
    parts = [load_split(cfg, split) for split in ("train", "test")]
    levels = torch.cat([part[0][:, 0, 0, 0] for part in parts])
    assert levels.sort().values.tolist() == list(range(10))
    assert all((pixels[:, 0, 0, 0] % 2 == labels).all() for pixels, labels in parts)
    split = datasets.DatasetDict({"train": whole, "validation": whole.select([3, 4])})
    split.save_to_disk(str(tmp_path / "two"))
    cfg = DataConfig(name="hf", root=str(tmp_path / "two"), device="disk", resolution=4)
    held_out, labels = load_split(cfg, "test")
    assert held_out[:].shape == (2, 3, 4, 4) and held_out[:][:, 0, 0, 0].tolist() == [3, 4]
    stream = TrainStream(*load_split(cfg, "train"), 0, 4, lambda: 0, workers=1)
    again = TrainStream(*load_split(cfg, "train"), 0, 4, lambda: 0)
    assert torch.equal(next(iter(stream))["image"], next(iter(again))["image"])


def test_hf_that_would_run_scripts_is_refused(monkeypatch):
    module = types.ModuleType("datasets")
    module.__version__ = "3.6.0"
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(ValueError, match="data.name=hf: datasets 3.6.0 .*scripts.*pip install -U"):
        load_split(DataConfig(name="hf", root="mnist"), "train")


def test_hf_with_a_stand_in(tmp_path, monkeypatch):
    """What is asked of the library, without it."""
    module = types.ModuleType("datasets")
    module.__version__ = "4.0.0"
    module.DownloadConfig = lambda local_files_only: {"local": local_files_only}

    def load_dataset(name, download_config):
        raise ConnectionError(f"{name} {download_config}")

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(ValueError, match="data.root=: say which"):
        load_split(DataConfig(name="hf"), "train")
    for download in (False, True):
        cfg = DataConfig(name="hf", root="mnist", download=download)
        with pytest.raises(ValueError, match=f"cannot load it .mnist .'local': {not download}"):
            load_split(cfg, "train")


@pytest.mark.parametrize("name", ["npy", "zip"])
def test_training_from_disk_makes_the_same_weights(tmp_path, train_tiny, name):
    """Through Lightning: two workers, resumed half way, against images in memory."""
    import train
    from genmodels.checkpoint import read_checkpoint

    words = (f"data.name={name}", f"data.root={on_disk_cases(tmp_path)[name]}", "data.flip=true",
             "data.holdout=0.4", "trainer.accumulate=2", "eval.loss_every=3")  # fmt: skip
    memory = train_tiny(*words, "trainer.max_steps=6")
    disk = train_tiny(*words, "data.device=disk", "trainer.max_steps=3")
    resumed = [f"resume={disk}", "trainer.max_steps=6", "data.workers=1"]
    assert train.main(resumed) == 0
    found, expected = (read_checkpoint(run / "checkpoints/last.ckpt") for run in (disk, memory))
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(found[key][k], v) for k, v in expected[key].items())
    rows = [[{k: v for k, v in row.items() if "second" not in k} for row in read_csv(run)]
            for run in (disk, memory)]  # fmt: skip
    assert rows[0] == rows[1] and rows[0][-1]["val/loss"]


def read_csv(run):
    import csv

    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


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
