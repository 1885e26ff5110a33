"""python -m genmodels.data: info, convert, get."""

import gzip
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genmodels import cli
from genmodels.config import DataConfig
from genmodels.data import commands, load_split
from genmodels.data.sets import BY_HAND, DATASETS

REAL = os.environ.get("GENMODELS_DATA", "")


def run(*argv):
    return cli.run(commands.main, [str(word) for word in argv])


def folder(path, count=6, size=(12, 9)):
    for i in range(count):
        below = path / ("cat", "dog")[i % 2]
        below.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (10 * i, 0, 0)).save(below / f"{i}.png")
    return path


def test_convert_a_folder_and_read_it_back(tmp_path, capsys):
    source, out = folder(tmp_path / "in"), tmp_path / "a.zip"
    assert run("convert", source, f"out={out}", "resolution=8", "crop=adm") == 0
    assert capsys.readouterr().out == f"6 images (3, 8, 8): {out}\n"
    with zipfile.ZipFile(out) as archive:
        described = json.loads(archive.read("dataset.json"))
        assert archive.namelist()[0] == "00000/img00000000.png"
    assert [label for _, label in described["labels"]] == [0, 0, 0, 1, 1, 1]
    pixels, labels = load_split(DataConfig(name="zip", root=str(out), holdout=0.0), "train")
    assert pixels[:, 0, 4, 4].tolist() == [0, 20, 40, 10, 30, 50]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    again = tmp_path / "b.zip"
    assert run("convert", source, f"out={again}", "resolution=8", "crop=adm") == 0
    assert again.read_bytes() == out.read_bytes()


def test_convert_keeps_the_splits_of_a_named_set(tmp_path, capsys):
    assert run("convert", "digits", f"out={tmp_path}/a.zip") == 0
    cfg = DataConfig(name="zip", root=str(tmp_path / "a.zip"), channels=1)
    for split in ("train", "test"):
        found, expected = load_split(cfg, split), load_split(DataConfig(), split)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert run("convert", "digits", f"out={tmp_path}/a.npy", "split=test") == 0
    assert np.load(tmp_path / "a.npy").shape == (360, 8, 8, 1)
    assert np.array_equal(np.load(tmp_path / "a_labels.npy"), expected[1])


def test_convert_without_labels_says_null(tmp_path, capsys):
    np.save(tmp_path / "in.npy", np.zeros((3, 4, 4, 3), np.uint8))
    assert run("convert", tmp_path / "in.npy", f"out={tmp_path}/a.zip", "holdout=0.34") == 0
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
        assert sorted(archive.namelist())[1:] == [
            "test/00000/img00000000.png",
            "train/00000/img00000000.png",
            "train/00000/img00000001.png",
        ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert"], "source=: usage: python -m genmodels.data convert SRC out=X.zip"),
        (["convert", "in", "in"], "source=in in: usage"),
        (["convert", "in"], "out=: name a file that ends in .zip or .npy"),
        (["convert", "in", "out=a.tar"], "out=a.tar: name a file that ends in .zip or .npy"),
        (["convert", "in", "out=no/a.zip"], "out=no/a.zip: its folder does not exist"),
        (["convert", "in", "out=in.zip"], "out=in.zip: exists; delete it"),
        (["convert", "mixed", "out=a.zip"], "data.resolution=0: "),
        (["convert", "in", "out=a.zip", "resolution=8", "crop=square"], "crop=square: choose from"),
        (["convert", "in", "out=a.zip", "resolution=8", "crop=none"], "data.crop=none: "),
        (["convert", "in", "out=a.zip", "resolution=-8"], "resolution=-8: must be >= 0"),
        (["convert", "in", "out=a.zip", "split=val"], "split=val: choose from all, train, test"),
        (["convert", "digits", "out=a.npy"], "out=a.npy: an .npy holds one part; add split="),
        (["convert", "in", "out=a.zip", "split=test", "resolution=8"], "split=test: there is no"),
        (["convert", "nothing", "out=a.zip"], "data.name=nothing: choose from digits"),
        (["convert", "moons", "out=a.zip"], "data.name=moons: points in the plane are no pict"),
        (["convert", "in", "out=a.zip", "size=8"], "unknown key size=8: "),
        (["convert", "bad", "out=a.zip", "resolution=8"], "bad/9.png: cannot be read"),
        (["convert", "bad", "out=a.npy", "resolution=8"], "bad/9.png: cannot be read"),
        (["info"], "source=: usage: python -m genmodels.data info"),
        (["info", "in", "resolution=x"], "resolution=x: must be a whole number"),
        (["info", "diggits"], "data.name=diggits: did you mean digits?"),
        (["get", "imagnet"], "name=imagnet: choose from mnist"),
        (["gte"], "command=gte: choose from info, convert, encode, get"),
        (["--resolution=8"], "--resolution=8: settings are written resolution=..."),
    ],
)
def test_bad_words_are_one_line_and_leave_nothing(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "in")
    folder(tmp_path / "bad", count=3)
    (tmp_path / "bad" / "9.png").write_bytes(b"\x89PNG half")
    folder(tmp_path / "mixed", count=3, size=(8, 8))
    folder(tmp_path / "mixed", count=1)
    (tmp_path / "in.zip").write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    assert run(*words) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "in.zip").read_bytes() == b"mine"


def test_labels_beside_an_npy_are_its_own(tmp_path, capsys):
    """Labels of another set are neither replaced nor taken; a failure leaves none behind."""
    source, mine = folder(tmp_path / "in"), tmp_path / "a_labels.npy"
    mine.write_bytes(b"mine")
    assert run("convert", source, f"out={tmp_path}/a.npy") == 2
    assert "a_labels.npy exists; delete it or choose another name" in capsys.readouterr().err
    assert mine.read_bytes() == b"mine" and not (tmp_path / "a.npy").exists()
    (source / "dog" / "5.png").write_bytes(b"\x89PNG half")
    before = sorted(tmp_path.rglob("*"))
    assert run("convert", source, f"out={tmp_path}/b.npy") == 2
    assert "dog/5.png: cannot be read" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_rename_takes_the_labels_back(tmp_path, capsys, monkeypatch):
    replace = os.replace

    def fail(source, target):
        if str(target).endswith("a.npy"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    assert run("convert", folder(tmp_path / "in"), f"out={tmp_path}/a.npy") == 2
    assert "a.npy: No space left on device; free some" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_get_names_everything(capsys, tmp_path):
    assert run("get") == 0
    shown = capsys.readouterr().out
    for name, row in (DATASETS | BY_HAND).items():
        assert not row.url or (name in shown and row.url in shown)
    assert run("get", "ffhq") == 0
    assert "CC BY-NC-SA" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not REAL, reason="GENMODELS_DATA is not set: no real MNIST here")
def test_get_checks_the_sums_of_what_is_there(tmp_path, capsys):
    assert run("get", "fashion_mnist", f"root={REAL}") == 0
    assert capsys.readouterr().out.count("sha256") == 4
    copy = tmp_path / "FashionMNIST" / "raw"
    copy.mkdir(parents=True)
    for path in (Path(REAL) / "FashionMNIST" / "raw").glob("*.gz"):
        copy.joinpath(path.name).symlink_to(path)
    other = next(copy.glob("t10k-labels*"))
    blob = gzip.compress(gzip.decompress(other.read_bytes()), 1)
    other.unlink()
    other.write_bytes(blob)
    assert run("get", "fashion_mnist", f"root={tmp_path}") == 2
    assert f"{other.name} has another sha256" in capsys.readouterr().err


def test_get_offline_says_what_to_put_where(tmp_path, capsys, monkeypatch):
    import torchvision

    def offline(*args, **kwargs):
        raise RuntimeError("<urlopen error>")

    monkeypatch.setattr(torchvision.datasets, "SVHN", offline)
    assert run("get", "svhn", f"root={tmp_path}") == 2
    errors = capsys.readouterr().err
    assert f"test_32x32.mat from http://ufldl.stanford.edu/housenumbers/ into {tmp_path}" in errors


def test_md5s_named_are_torchvisions():
    """The sha256 list belongs to the files whose md5 torchvision publishes: same file names."""
    from torchvision import datasets

    for name, kind in (("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")):
        published = dict(getattr(datasets, kind).resources)
        assert set(DATASETS[name].sha256) == set(published)
        assert {len(digest) for digest in DATASETS[name].sha256.values()} == {64}
