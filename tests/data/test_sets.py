"""Sets of pictures as files: MNIST's format, folders, npz; sets by name."""

import gzip
import os
import pickle
import struct
import sys
import tracemalloc
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from genmodels import cli, images, seeding
from genmodels.config import DataConfig
from genmodels.data import ImageDataModule, TrainStream, commands, fill_in, load_split
from genmodels.images import arrays
from genmodels.images import read as files
from tests.helpers.small_sets import png

REAL = os.environ.get("GENMODELS_DATA", "")


def test_digits_are_all_there_and_split_once():
    train, held_out = (load_split(DataConfig(), split) for split in ("train", "test"))
    assert train[0].shape == (1437, 1, 8, 8) and held_out[0].shape == (360, 1, 8, 8)
    digits = load_digits()
    assert sorted(torch.cat([train[1], held_out[1]]).tolist()) == sorted(digits.target)
    total = sum(float(pixels.double().sum()) for pixels, _ in (train, held_out))
    assert total == np.rint(digits.images * 255 / 16).sum()
    assert train[0].max() == 255 and train[0].dtype == torch.uint8


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write(header + array.tobytes())


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_reads_idx_from_a_read_only_folder(tmp_path, suffix):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    for stem in ("train", "t10k"):
        write_idx(raw / f"{stem}-images-idx3-ubyte{suffix}", pixels)
        write_idx(raw / f"{stem}-labels-idx1-ubyte{suffix}", labels)
    raw.chmod(0o500)
    cfg = DataConfig(name="mnist", root=str(tmp_path), pad=2)
    images, read_labels = load_split(cfg, "train")
    assert images.shape == (7, 1, 32, 32)
    assert np.array_equal(images[:, 0, 2:-2, 2:-2].numpy(), pixels)
    assert images[:, 0, :2].max() == 0
    assert read_labels.tolist() == labels.tolist() and read_labels.dtype == torch.int64
    raw.chmod(0o700)


def test_truncated_idx_is_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    write_idx(raw / "train-labels-idx1-ubyte", np.zeros(5, np.uint8))
    path = raw / "train-images-idx3-ubyte"
    write_idx(path, np.zeros((5, 28, 28), np.uint8))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: cannot be read .3919 bytes for"):
        load_split(DataConfig(name="mnist", root=str(tmp_path)), "train")


@pytest.mark.parametrize(
    ("suffix", "spoil"),
    [
        (".gz", lambda whole: whole[:-20]),  # an interrupted download
        (".gz", lambda whole: whole[:10] + b"\xff" * 20),
        (".gz", lambda whole: b"<html>not found</html>"),
        (".gz", lambda whole: b""),
        ("", lambda whole: b""),
        ("", lambda whole: b"<html>not found</html>"),
        ("", lambda whole: whole[:6]),
    ],
)
def test_a_spoilt_idx_is_one_line(tmp_path, suffix, spoil, capsys):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    path = raw / f"train-images-idx3-ubyte{suffix}"
    write_idx(path, np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8))
    path.write_bytes(spoil(path.read_bytes()))
    assert cli.run(commands.main, ["info", "mnist", f"root={tmp_path}"]) == 2
    errors = capsys.readouterr().err
    assert "fetch it again" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((5, 28, 28), np.zeros(4), "labels-idx1-ubyte: holds an array [4] for 5 images"),
        ((5, 28, 28), np.zeros((5, 1)), "labels-idx1-ubyte: holds an array [5, 1] for 5 images"),
        ((5, 28, 28), [0, 9, 10, 1, 1], "labels-idx1-ubyte: holds a label 10 of 10 classes"),
        ((5, 28, 27), np.zeros(5), "images-idx3-ubyte: holds an array [5, 28, 27], not images (N,"),
        ((5, 1, 28, 28), np.zeros(5), "images-idx3-ubyte: holds an array [5, 1, 28, 28], not ima"),
        ((5,), np.zeros(5), "images-idx3-ubyte: holds an array [5], not images (N, 28, 28)"),
        ((0, 28, 28), np.zeros(0), "images-idx3-ubyte: holds an array [0, 28, 28], not images (N"),
    ],
)
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_that_do_not_belong_together(tmp_path, capsys, shape, labels, message, name):
    raw = tmp_path / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw"
    raw.mkdir(parents=True)
    write_idx(raw / "train-images-idx3-ubyte", np.zeros(shape, np.uint8))
    write_idx(raw / "train-labels-idx1-ubyte", np.asarray(labels, np.uint8))
    assert cli.run(commands.main, ["info", name, f"root={tmp_path}"]) == 2
    errors = capsys.readouterr().err
    assert f"error: data={raw}/train-{message}" in errors and errors.count("\n") == 1
    assert errors.endswith("; fetch it again\n")


@pytest.mark.parametrize("shape", [(5, 28, 28), (1 << 20, 1 << 15, 1)])
def test_an_idx_that_unpacks_to_more_than_it_says(tmp_path, shape):
    """40 MB of zeros in 40 kB: no more is unpacked than the header promises, and not too much."""
    path = tmp_path / "a.gz"
    header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in shape)
    path.write_bytes(gzip.compress(header + bytes(40 << 20)))
    tracemalloc.start()
    with pytest.raises(ValueError, match="3920 bytes and more for shape|is more than 1024 MB"):
        arrays.read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.skipif(not REAL, reason="GENMODELS_DATA is not set: no real Fashion-MNIST here")
def test_real_fashion_mnist():
    cfg = DataConfig(name="fashion_mnist", root=REAL)
    train, test = load_split(cfg, "train"), load_split(cfg, "test")
    assert train[0].shape == (60000, 1, 28, 28) and test[0].shape == (10000, 1, 28, 28)
    assert torch.bincount(train[1]).tolist() == [6000] * 10
    x = train[0].double() / 255
    # The mean and standard deviation everyone normalises Fashion-MNIST with.
    assert abs(x.mean() - 0.2860) < 1e-4 and abs(x.std() - 0.3530) < 1e-4


def picture(path, size, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_imagefolder_crops_resizes_and_labels_by_folder(tmp_path):
    for name, colour in (("cats", (255, 0, 0)), ("dogs", (0, 0, 255))):
        for i in range(10):
            picture(tmp_path / name / f"{i}.png", (12 + i, 9), colour)
    cfg = DataConfig(name="imagefolder", root=str(tmp_path), resolution=8, holdout=0.2, labels=True)
    images, labels = load_split(cfg, "train")
    held_out, _ = load_split(cfg, "test")
    assert images.shape == (16, 3, 8, 8) and held_out.shape == (4, 3, 8, 8)
    for image, label in zip(images, labels):
        assert image[:, 3, 3].tolist() == ([255, 0, 0] if label == 0 else [0, 0, 255])
    fill_in(cfg)
    assert cfg.shape == [3, 8, 8] and cfg.classes == 2
    grey = DataConfig(name="imagefolder", root=str(tmp_path), resolution=8, channels=1)
    assert load_split(grey, "train")[0].shape[1:] == (1, 8, 8)


def test_imagefolder_takes_its_own_splits(tmp_path):
    picture(tmp_path / "train" / "a.png", (8, 8), (9, 9, 9))
    picture(tmp_path / "test" / "b.png", (8, 8), (7, 7, 7))
    cfg = DataConfig(name="imagefolder", root=str(tmp_path), resolution=8)
    assert load_split(cfg, "train")[0].unique().tolist() == [9]
    assert load_split(cfg, "test")[0].unique().tolist() == [7]
    cfg.labels = True
    with pytest.raises(ValueError, match="data.labels=true: imagefolder at .* has no class labels"):
        fill_in(cfg)


def test_imagefolder_numbers_held_out_classes_by_the_training_folders(tmp_path):
    for i, name in enumerate(("bird", "cat", "dog")):
        picture(tmp_path / "train" / name / "a.png", (8, 8), (i, i, i))
    for i, name in ((1, "cat"), (2, "dog")):
        picture(tmp_path / "val" / name / "b.png", (8, 8), (i, i, i))
    cfg = DataConfig(name="imagefolder", root=str(tmp_path), resolution=8, labels=True)
    for split, expected in (("train", [0, 1, 2]), ("test", [1, 2])):
        pixels, labels = load_split(cfg, split)
        assert labels.tolist() == expected == pixels[:, 0, 0, 0].tolist()
    picture(tmp_path / "val" / "eel" / "c.png", (8, 8), (3, 3, 3))
    with pytest.raises(ValueError, match="data.root=.*: val/eel/c.png is in no class of train/"):
        load_split(cfg, "test")
    picture(tmp_path / "test" / "d.png", (8, 8), (4, 4, 4))  # test goes before val
    with pytest.raises(ValueError, match="data.root=.*: test/d.png is in no class of train/"):
        load_split(cfg, "test")
    cfg.labels = False
    assert load_split(cfg, "test")[1].tolist() == [-1]


def test_imagefolder_holds_out_of_a_lone_train_folder(tmp_path):
    for i in range(10):
        picture(tmp_path / "train" / "cat" / f"{i}.png", (8, 8), (i, i, i))
    cfg = DataConfig(name="imagefolder", root=str(tmp_path), resolution=8, holdout=0.2)
    parts = [load_split(cfg, split)[0][:, 0, 0, 0].tolist() for split in ("train", "test")]
    assert [len(part) for part in parts] == [8, 2] and sorted(sum(parts, [])) == list(range(10))
    cfg.holdout = 0.0
    assert load_split(cfg, "test")[0].shape == (0, 3, 8, 8)
    picture(tmp_path / "car" / "a.png", (8, 8), (99, 99, 99))
    with pytest.raises(ValueError, match=r"mixes splits \(train/\) and classes \(car/\); move the"):
        load_split(cfg, "train")
    for path in (tmp_path / "train" / "cat").iterdir():
        path.rename(tmp_path / "train" / path.name)
    (tmp_path / "train" / "cat").rmdir()  # now train is a class
    cfg.holdout = 0.0
    assert load_split(cfg, "train")[1].sort().values.tolist() == [0] + [1] * 10


def test_imagefolder_decodes_a_picture_once(tmp_path, monkeypatch):
    for i in range(10):
        picture(tmp_path / f"{i}.png", (8, 8), (i, i, i))
    read, seen = files.read_image, []
    monkeypatch.setattr(files, "read_image", lambda *a: (seen.append(a[0]), read(*a))[1])
    ImageDataModule(DataConfig(name="imagefolder", root=str(tmp_path), resolution=8, holdout=0.3))
    assert len(seen) == len(set(seen)) == 10


def test_a_class_held_out_altogether_is_refused(tmp_path):
    pixels = np.zeros((4, 5, 6, 3), np.uint8)
    arrays = {"train_images": pixels, "train_labels": [0, 1, 0, 1], "test_images": pixels[:1]}
    np.savez(tmp_path / "set.npz", **arrays, test_labels=[2])
    cfg = DataConfig(name="npz", root=str(tmp_path / "set.npz"), labels=True)
    with pytest.raises(ValueError, match="class 2 is among the held-out images only"):
        ImageDataModule(cfg)
    ImageDataModule(DataConfig(name="npz", root=cfg.root))  # nobody asks for the labels


def test_npz_with_and_without_splits(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 5, 6, 3), dtype=np.uint8)
    path = tmp_path / "set.npz"
    np.savez(path, train_images=pixels[:15], train_labels=np.arange(15), test_images=pixels[15:])
    images, labels = load_split(DataConfig(name="npz", root=str(path)), "train")
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels[:15])
    assert labels.tolist() == list(range(15))
    held_out, labels = load_split(DataConfig(name="npz", root=str(path)), "test")
    assert len(held_out) == 5 and labels.tolist() == [-1] * 5
    np.savez(path, pixels)
    cfg = DataConfig(name="npz", root=str(path), holdout=0.25)
    parts = [load_split(cfg, split)[0] for split in ("train", "test")]
    assert [len(part) for part in parts] == [15, 5]
    assert torch.cat(parts).double().sum() == pixels.sum()  # nothing twice, nothing lost


@pytest.mark.parametrize("name", ["train_images", "images", "first"])
def test_an_npz_without_a_test_part_is_shared_out_once(tmp_path, name):
    """No image is both trained on and held out, whatever the array is called."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    labels = {"train_images": "train_labels"}.get(name, "labels")
    np.savez(tmp_path / "a.npz", **{name: pixels, labels: np.arange(20)})
    cfg = DataConfig(name="npz", root=str(tmp_path / "a.npz"), holdout=0.25)
    parts = [load_split(cfg, split) for split in ("train", "test")]
    assert [len(part[0]) for part in parts] == [15, 5]
    assert sorted(torch.cat([part[1] for part in parts]).tolist()) == list(range(20))
    for part, numbers in parts:
        assert np.array_equal(part.permute(0, 2, 3, 1).numpy(), pixels[numbers])


def test_partbeside_test_images_are_all_for_training(tmp_path):
    pixels = np.zeros((20, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, test_images=pixels[:3])
    cfg = DataConfig(name="npz", root=str(tmp_path / "a.npz"), holdout=0.25)
    assert [len(load_split(cfg, split)[0]) for split in ("train", "test")] == [20, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mnist"}, "data.root=.*/empty: train-images-idx3-ubyte"),
        ({"name": "cifar10"}, "put cifar-10-batches-py .* from https://.*/empty, or run .* get"),
        ({"name": "cifar100"}, "put cifar-100-python .* from https://.*/empty, or run .* get"),
        ({"name": "svhn"}, "put train_32x32.mat .* from http://.*/empty, or run .* get svhn"),
        ({"name": "zip"}, "data.root=.*/empty: holds no picture"),
        ({"name": "npy"}, "data.root=.*/empty: no such file"),
        ({"name": "imagefolder", "resolution": 8}, "data.root=.*/empty: holds no picture"),
        ({"name": "npz"}, "data.root=.*/empty: no such file"),
        ({"name": "digit"}, "data.name=digit: choose from digits"),
    ],
)
def test_missing_data_says_what_to_put_where(tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        load_split(DataConfig(root=str(tmp_path / "empty"), **options), "train")


def test_broken_files_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    cfg = DataConfig(name="imagefolder", root=str(tmp_path), resolution=8)
    with pytest.raises(ValueError, match="a.png: cannot be read"):
        load_split(cfg, "train")
    np.savez(tmp_path / "a.npz", images=np.full((3, 8, 8, 3), 0.3))
    with pytest.raises(ValueError, match="float64.*must be uint8"):
        load_split(DataConfig(name="npz", root=str(tmp_path / "a.npz")), "train")
    np.savez(tmp_path / "b.npz", images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.zeros(2))
    with pytest.raises(ValueError, match="labels has shape .2,. for 3 images"):
        load_split(DataConfig(name="npz", root=str(tmp_path / "b.npz")), "train")
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04 half a zip")
    with pytest.raises(ValueError, match="c.npz: cannot be read"):
        load_split(DataConfig(name="npz", root=str(tmp_path / "c.npz")), "train")


def held_out(cfg, rank, world):
    module = ImageDataModule(cfg)
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return list(module.val_dataloader())


@pytest.mark.parametrize("world", [1, 2, 7])
def test_held_out_batches_cover_the_split_and_ranks_agree_on_their_number(world):
    cfg = DataConfig(batch_size=70)
    shares = [held_out(cfg, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    n = torch.cat([batch["n"] for share in shares for batch in share]) - seeding.HELD_OUT
    assert n.sort().values.tolist() == list(range(360))


def test_flips_are_a_function_of_n():
    cfg = DataConfig(flip=True)
    module = ImageDataModule(cfg, seed=1)
    module.trainer = SimpleNamespace(training=True)
    pixels, n = module.train[0][:200], torch.arange(200)
    flipped = module.on_after_batch_transfer({"image": pixels, "n": n}, 0)["image"]
    alone = module.on_after_batch_transfer({"image": pixels[50:60], "n": n[50:60]}, 0)["image"]
    assert torch.equal(flipped[50:60], alone)
    plain = pixels.float() / 127.5 - 1
    changed = (flipped != plain).flatten(1).any(1)
    assert torch.equal(flipped[changed], plain[changed].flip(-1))
    assert 70 < changed.sum() < 130  # 100 expected, sd 7
    module.trainer = SimpleNamespace(training=False)
    assert torch.equal(module.on_after_batch_transfer({"image": pixels, "n": n}, 0)["image"], plain)


def test_moments_of_the_histogram_are_those_of_the_pixels():
    pixels = torch.randint(0, 200, (2500, 3, 4, 4), dtype=torch.uint8)
    x = images.from_uint8(pixels).double()
    mean, std = images.mean_and_std(pixels)
    assert float(mean) == pytest.approx(float(x.mean()), rel=1e-12)
    assert float(std) == pytest.approx(float(x.std()), rel=1e-12)


def test_info_names_the_nearest_data_set(capsys):
    assert cli.run(commands.main, ["info", "minst"]) == 2
    errors = capsys.readouterr().err
    assert "data.name=minst: did you mean mnist? choose from digits" in errors
    assert errors.count("\n") == 1


def test_info_command(capsys):
    assert cli.run(commands.main, ["info", "digits"]) == 0
    shown = capsys.readouterr().out
    assert "1437" in shown and "360" in shown and "0.75" in shown
    assert cli.run(commands.main, ["info"]) == 2
    assert cli.run(commands.main, ["info", "no/such/folder", "resolution=8"]) == 2


# ------------------------------------------------------------------------------------------------
# Sets by name: files as torchvision and Hugging Face keep them


def write_cifar(root, name, keys, count=6):
    """A small copy of torchvision's files; returns the names for its md5 check."""
    import hashlib

    folder = root / name
    folder.mkdir()
    rng, sums = np.random.default_rng(0), []
    for file in keys:
        data = rng.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        content = {
            "data": data,
            "fine_labels": list(range(count)),
            "fine_label_names": ["a"],
            "labels": list(range(count)),
            "label_names": ["a"],
        }
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
        {
            "id": datasets.Value("int64"),
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=["a", "b"]),
        }
    )
    rows = {
        "id": list(range(10)),
        "label": [i % 2 for i in range(10)],
        "img": [{"bytes": png(i), "path": None} for i in range(10)],
    }
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
    held_out, _labels = load_split(cfg, "test")
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


def test_hf_with_a_stand_in(monkeypatch):
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
