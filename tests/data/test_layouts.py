"""Folders and zips as other tools leave them: splits, labels in parts, links, names."""

import json
import os
import zipfile

import pytest
import torch

from genmodels import cli
from genmodels.config import DataConfig
from genmodels.data import ImageDataModule, commands, load_split
from genmodels.data.parts import SPLIT_NAMES, split_of
from genmodels.images import Tree
from tests.helpers.small_sets import make_zip, png


def write(root, *names, first=0):
    """Write a picture under each of the names; its grey value is its number."""
    for number, name in enumerate(names, first):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    return DataConfig(name="imagefolder", root=str(root), holdout=0.0, labels=True)


def values(cfg, split="train"):
    pixels, labels = load_split(cfg, split)
    return pixels[:, 0, 0, 0].tolist(), labels.tolist()


def info(*words):
    return cli.run(commands.main, ["info", *map(str, words)])


# ------------------------------------------------------------------------------------------------
# Splits


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize(
    "held_out", ["valid", "validation", "Val", "dev", "Test", "testing", "eval"]
)
def test_splits_by_every_name_in_any_case(tmp_path, train, held_out):
    cfg = write(
        tmp_path,
        f"{train}/cat/a.png",
        f"{train}/dog/b.png",
        f"{held_out}/dog/c.png",
        f"{held_out}/cat/d.png",
    )
    assert values(cfg) == ([0, 1], [0, 1])
    assert values(cfg, "test") == ([3, 2], [0, 1])


def test_the_names_of_splits_are_those_of_hugging_face():
    split = pytest.importorskip("datasets.data_files")
    known = {str(key): tuple(names) for key, names in split.SPLIT_KEYWORDS.items()}
    assert {key: set(names) for key, names in SPLIT_NAMES.items()} == {
        key: set(names) for key, names in known.items()
    }


def test_names_of_splits():
    assert {split_of(name) for name in ("TRAIN", "Training")} == {"train"}
    assert {split_of(name) for name in ("valid", "Val", "dev", "validation")} == {"validation"}
    assert {split_of(name) for name in ("Test", "testing", "EVAL", "evaluation")} == {"test"}
    assert {split_of(name) for name in ("trains", "cat", "tester", "")} == {""}


def test_a_folder_around_the_splits(tmp_path):
    """An unpacked download often has one folder more."""
    cfg = write(tmp_path, "set/train/cat/a.png", "set/train/dog/b.png", "set/valid/dog/c.png")
    assert values(cfg) == ([0, 1], [0, 1]) and values(cfg, "test") == ([2], [1])


@pytest.mark.parametrize("name", ["train", "val", "Test"])
def test_a_lone_split_is_the_set(tmp_path, name):
    cfg = write(tmp_path, f"{name}/cat/a.png", f"{name}/dog/b.png")
    assert values(cfg) == ([0, 1], [0, 1]) and values(cfg, "test") == ([], [])


def test_trains_beside_cars(tmp_path):
    cfg = write(tmp_path, "cars/a.png", "train/b.png", "planes/c.png")
    assert values(cfg) == ([0, 2, 1], [0, 1, 2])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("train/a/1.png", "test/a/2.png", "cat/3.png"),
            r"mixes splits \(train/, test/|test/, train/\) and classes \(cat/\)",
        ),
        (("train/cat/1.png", "cat/3.png"), r"mixes splits \(train/\) and classes \(cat/\)"),
        (("test/1.png", "val/2.png"), "holds test/, val/ and no train/; name the folder"),
        (("train/1.png", "Train/2.png", "val/3.png"), "Train/ and train/ are one split; join"),
        (("train/1.png", "val/2.png", "valid/3.png"), "val/ and valid/ are one split; join"),
    ],
)
def test_what_is_no_layout_is_refused(tmp_path, names, message):
    cfg = write(tmp_path, *names)
    cfg.labels = False
    with pytest.raises(ValueError, match=f"^data.root=.*: {message}"):
        load_split(cfg, "train")


def test_pictures_of_no_split_are_counted(tmp_path, capsys):
    write(tmp_path, "train/1.png", "test/2.png", "val/3.png", "cover.png")
    assert info(tmp_path) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "2 pictures lie outside train/ and test/ (cover.png, ...); they are not read" in (
        captured.err
    )


# ------------------------------------------------------------------------------------------------
# dataset.json


def described(root, part, labels, first=0):
    names = [f"00000/img{number:08d}.png" for number in range(len(labels))]
    write(root / part, *names, first=first)
    text = json.dumps({"labels": [list(pair) for pair in zip(names, labels)]})
    (root / part / "dataset.json").write_text(text)


def test_two_sets_of_edm_side_by_side(tmp_path):
    """train/ and test/, each with chunk folders and a dataset.json of its own."""
    described(tmp_path, "train", [0, 1, 3, 3])
    described(tmp_path, "test", [3, 0], first=4)
    cfg = DataConfig(name="imagefolder", root=str(tmp_path), labels=True)
    assert values(cfg) == ([0, 1, 2, 3], [0, 1, 3, 3])
    assert values(cfg, "test") == ([4, 5], [3, 0])
    cfg.root = str(tmp_path / "train")
    cfg.holdout = 0.0
    assert values(cfg) == ([0, 1, 2, 3], [0, 1, 3, 3])


def test_labels_of_one_part_alone_are_told(tmp_path, capsys):
    described(tmp_path, "train", [0, 1])
    write(tmp_path, "test/00000/a.png")
    cfg = DataConfig(name="imagefolder", root=str(tmp_path), labels=True)
    with pytest.raises(ValueError, match="train/dataset.json is not read: it holds labels of a"):
        load_split(cfg, "test")
    assert info(tmp_path) == 0
    assert "note: data.root=" in capsys.readouterr().err


def test_sets_without_splits_are_not_guessed(tmp_path):
    """Whether class 0 of one is class 0 of the other nobody knows."""
    described(tmp_path, "one", [0, 1])
    described(tmp_path, "two", [0, 1])
    cfg = DataConfig(name="imagefolder", root=str(tmp_path), labels=True)
    with pytest.raises(ValueError, match="one/dataset.json is not read: .* name that folder"):
        load_split(cfg, "train")


def test_the_line_of_a_part_names_its_file(tmp_path):
    described(tmp_path, "train", [0, 1])
    described(tmp_path, "test", [0, 1])
    (tmp_path / "test" / "00000" / "new.png").write_bytes(png(1))
    cfg = DataConfig(name="imagefolder", root=str(tmp_path), labels=True)
    message = "test/dataset.json has no label for test/00000/new.png .and 0 more."
    with pytest.raises(ValueError, match=message):
        load_split(cfg, "test")


# ------------------------------------------------------------------------------------------------
# Links, strays, zips


def test_each_real_folder_is_read_once(tmp_path, capsys):
    """a/to_b and b/to_a lead to each other: 8 pictures were 328."""
    root = tmp_path / "set"
    cfg = write(root, *(f"{folder}/{i}.png" for folder in "ab" for i in range(4)))
    (root / "a" / "to_b").symlink_to("../b")
    (root / "b" / "to_a").symlink_to("../a")
    assert values(cfg) == (list(range(8)), [0] * 4 + [1] * 4)
    write(tmp_path / "elsewhere", "deep/9.png", first=9)
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "d").symlink_to(tmp_path / "elsewhere" / "deep")  # which lies in what c leads to
    assert Tree(root).names[8:] == ["d/9.png"]
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path)  # around the set
    assert len(Tree(root).names) == 9
    assert info(root) == 0
    assert "a/to_b (and 3 more) links to a folder that is read already" in capsys.readouterr().err


def test_a_link_to_a_hidden_folder_is_followed(tmp_path):
    cfg = write(tmp_path, ".cache/real/1.png", "cat/2.png")
    (tmp_path / "dog").symlink_to(".cache/real")
    assert values(cfg) == ([1, 0], [0, 1])


def test_a_stray_picture_beside_class_folders_is_named(tmp_path, capsys):
    cfg = write(tmp_path, "a/1.png", "a/2.png", "b/3.png", "preview.png")
    with pytest.raises(ValueError, match=r"preview.png \(and 0 more\) lies beside folders, not in"):
        ImageDataModule(cfg)
    cfg.labels = False  # then it is a picture as any other
    assert len(ImageDataModule(cfg).train[0]) == 4
    capsys.readouterr()
    assert info(tmp_path) == 0
    assert "preview.png (and 0 more) lies beside folders" in capsys.readouterr().err


def test_a_zip_from_windows(tmp_path):
    """Backslashes between folders, against the format."""
    names = [f"{folder}\\{i}.png" for folder in ("cat", "dog") for i in range(2)]
    cfg = make_zip(tmp_path / "a.zip", {name: png(i) for i, name in enumerate(names)})
    assert values(cfg) == ([0, 1, 2, 3], [0, 0, 1, 1])
    around = {f"set\\train\\{name}": png(i) for i, name in enumerate(names)}
    cfg = make_zip(tmp_path / "b.zip", around | {"set\\test\\dog\\9.png": png(9)})
    assert values(cfg) == ([0, 1, 2, 3], [0, 0, 1, 1]) and values(cfg, "test") == ([9], [1])
    cfg = make_zip(tmp_path / "c.zip", {"a/x\\y.png": png(1)})  # a name, where / is used
    assert Tree(cfg.root).names == ["x\\y.png"]


def test_a_zip_with_times_in_its_names(tmp_path):
    names = ["2024-01-01T12:30:00.png", "2024-01-01T12:31:00.png"]
    cfg = make_zip(tmp_path / "a.zip", {name: png(i) for i, name in enumerate(names)})
    assert values(cfg)[0] == [0, 1]
    make_zip(tmp_path / "a.zip", {"C:/evil.png": png(0)})
    with pytest.raises(ValueError, match="C:/evil.png points outside the zip"):
        load_split(cfg, "train")


def test_a_zip_from_a_mac(tmp_path):
    entries = {f"set/{c}/{i}.png": png(i) for c in ("cat", "dog") for i in range(5)}
    rubbish = {"__MACOSX/set/cat/._0.png": b"x", "set/.DS_Store": b"x", "set/cat/Thumbs.db": b"x"}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in (entries | rubbish).items():
            archive.writestr(name, content)
    cfg = DataConfig(name="zip", root=str(tmp_path / "a.zip"), holdout=0.0, labels=True)
    assert values(cfg)[1] == [0] * 5 + [1] * 5


def test_any_name_of_a_file(tmp_path):
    names = ["ä.png", "日本.png", "a=b.png", "-dash.png", "new\nline.png"]
    cfg = write(tmp_path, *names)
    assert sorted(values(cfg)[0]) == list(range(5))
    (tmp_path / "-dash.png").rename(tmp_path / os.fsdecode(b"\xe9.png"))  # Latin-1
    assert sorted(values(cfg)[0]) == list(range(5))


def test_images_and_their_order_are_as_before_where_nothing_was_wrong(tmp_path):
    """A folder of classes, shared out: the numbers of the permutation of seed 0."""
    import numpy as np

    cfg = write(tmp_path, *(f"{'ab'[i % 2]}/{i}.png" for i in range(20)))
    cfg.holdout = 0.25
    # By name: "0", "10", "12", ...
    order = sorted(range(20), key=lambda i: ("ab"[i % 2], f"{i}.png"))
    kept = np.sort(np.random.default_rng(0).permutation(20)[:15])
    assert values(cfg)[0] == [order[k] for k in kept]
    assert torch.equal(load_split(cfg, "train")[1], torch.tensor([order[k] % 2 for k in kept]))
