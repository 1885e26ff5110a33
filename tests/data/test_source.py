"""The one reader of what a command names: data sets, folders, zips, arrays, pictures."""

import zipfile

import numpy as np
import pytest
import torch

from genmodels import images
from genmodels.config import DataConfig
from genmodels.data import load_split
from genmodels.data.source import read_source, with_split


@pytest.fixture
def folder(digits, tmp_path):
    for name, picture in zip(("b.png", "a.png", "sub/c.png", "grid.png"), digits[0]):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        images.write_png(path, picture)
    return tmp_path / "pictures"


def test_a_data_set_by_name_and_split(digits):
    for source, split in (("digits", 0), ("digits:train", 0), ("digits:test", 1)):
        assert torch.equal(read_source(source).pixels, digits[split])
    found = read_source("digits:test")
    assert torch.equal(found.labels, load_split(DataConfig(), "test")[1])
    assert found.names[:2] == ["0", "1"] and len(found.names) == len(digits[1])
    splits = found.splits()
    assert torch.equal(splits["train"], digits[0]) and torch.equal(splits["held_out"], digits[1])
    with pytest.raises(ValueError, match="split=val: choose from train, test"):
        read_source("digits:val")


def test_a_models_own_set_is_read_as_in_training(digits):
    trained_on = DataConfig(pad=2)
    assert read_source("digits", trained_on=trained_on).pixels.shape[1:] == (1, 12, 12)
    assert read_source("digits", trained_on=trained_on, pad=0).pixels.shape[1:] == (1, 8, 8)
    assert read_source("digits", pad=1).pixels.shape[1:] == (1, 10, 10)
    assert trained_on.pad == 2


def test_pictures_come_with_their_names(folder, digits, tmp_path):
    found = read_source(str(folder))
    assert found.names == ["a.png", "b.png", "sub/c.png"]
    assert torch.equal(found.pixels, digits[0][[1, 0, 2]])
    assert found.labels is None and found.splits() == {}
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as file:
        for name in found.names:
            file.write(folder / name, name)
    zipped = read_source(str(tmp_path / "p.zip"))
    assert zipped.names == found.names and torch.equal(zipped.pixels, found.pixels)
    assert read_source(str(folder), channels=3).pixels.shape == (3, 3, 8, 8)


def test_one_picture_and_arrays(folder, digits, tmp_path):
    one = read_source(str(folder / "a.png"))
    assert one.names == ["a.png"] and torch.equal(one.pixels, digits[0][1:2])
    assert read_source(str(folder / "a.png"), channels=3).pixels.shape == (1, 3, 8, 8)
    array = digits[0][:3].permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "a.npy", array)
    images.write_npz(tmp_path / "a.npz", images=array)
    for name in ("a.npy", "a.npz"):
        found = read_source(str(tmp_path / name))
        assert found.names == ["0", "1", "2"] and torch.equal(found.pixels, digits[0][:3])


def test_a_name_is_the_set_and_a_path_the_folder(folder, digits, monkeypatch):
    folder.rename(folder.parent / "digits")
    monkeypatch.chdir(folder.parent)
    assert torch.equal(read_source("digits").pixels, digits[0])
    assert len(read_source("./digits").pixels) == 3
    with pytest.raises(ValueError, match="images=digit: no such folder"):
        read_source("digit")


def test_a_split_is_added_to_the_name_of_a_set_alone():
    assert with_split("digits", "test") == "digits:test"
    assert with_split("digits:train", "test") == "digits:train"
    assert with_split("some/folder", "test") == "some/folder"
