"""Sets by name: files as torchvision and Hugging Face keep them."""

import pickle
import sys
import types

import numpy as np
import pytest
import torch

from genmodels.config import DataConfig
from genmodels.data import TrainStream, fill_in, load_split
from tests.helpers.small_sets import png


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
