"""Arrays as people have them: what they mean is certain, or they are refused in a line."""

import io

import numpy as np
import pytest
import torch

from genmodels import cli, images
from genmodels.config import DataConfig
from genmodels.data import commands, load_split
from genmodels.data.source import read_source
from genmodels.images import arrays, pictures
from tests.helpers.restoring_words import random_levels, run, save

LEVELS = random_levels(20, 5, 6, 3)
LABELS = np.arange(20) % 4
NCHW = torch.from_numpy(LEVELS).permute(0, 3, 1, 2)


def set_of(path, **settings):
    kind = path.suffix.lower()[1:]
    return DataConfig(name=kind, root=str(path), **({"holdout": 0.0} | settings))


def write(path, array):
    """Write the images as .npz or .npy."""
    if path.suffix.lower() == ".npz":
        with open(path, "wb") as file:
            np.savez(file, images=array)
    else:
        with open(path, "wb") as file:
            np.save(file, array)
    return path


FORMS = {
    "bytes": LEVELS,
    "channels first": LEVELS.transpose(0, 3, 1, 2),
    "Fortran's order": np.asfortranarray(LEVELS),
    "whole numbers": LEVELS.astype(np.int64),
    "big-endian numbers": LEVELS.astype(">i4"),
    "floats 0..255": LEVELS.astype(np.float32),
    "floats 0..1": (LEVELS / 255).astype(np.float32),
    "big-endian 0..1": (LEVELS / 255).astype(">f8"),
    "half floats 0..1": (LEVELS / 255).astype(np.float16),
    "floats -1..1": LEVELS / 127.5 - 1,
    "channels first -1..1": (LEVELS / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2),
    "16 bits": LEVELS.astype(np.uint16) * 257,
    "big-endian 16 bits": LEVELS.astype(">u2") * 257,
}


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".NPZ", ".Npy"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_whose_meaning_is_certain(tmp_path, form, suffix):
    path = write(tmp_path / f"a{suffix}", FORMS[form])
    assert torch.equal(load_split(set_of(path), "train")[0], NCHW)
    assert torch.equal(torch.as_tensor(read_source(str(path)).pixels[:]), NCHW)
    if suffix == ".npy":
        on_disk = load_split(set_of(path, device="disk"), "train")[0]
        assert torch.equal(on_disk[torch.tensor([7, 3])], NCHW[[7, 3]])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (LEVELS / 255 * 0.9, "is float64 from 0 to 0.9, and not all are levels"),
        (LEVELS / 64.0 - 2, "is float64 from -2 to 1.984, and not all are levels"),
        (LEVELS * 1.5, "is float64 from 0 to 382.5, and not all are levels"),
        (LEVELS.astype(np.int16) + 1, "is int16 from 1 to 256, and not all are levels"),
        (LEVELS.astype(np.uint16), "is uint16 up to 255, so bytes or very dark"),
        (np.full((4, 8, 8, 3), np.inf), "is float64 with NaN or infinite values"),
        (LEVELS > 9, r"is bool \(20, 5, 6, 3\)"),
        (LEVELS[..., [0, 1, 2, 0]], r"is uint8 \(20, 5, 6, 4\)"),
        (LEVELS.reshape(20, -1), r"is uint8 \(20, 90\)"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_others_are_refused_with_cause_and_file(tmp_path, array, message, suffix):
    path = write(tmp_path / f"a{suffix}", array)
    what = "npz=.*a.npz: images " if suffix == ".npz" else "npy=.*a.npy: it "
    pattern = rf"{what}{message}.*; must be uint8 \(N, H, W, 1 or 3\), values 0..255$"
    for read in (lambda: load_split(set_of(path), "train"), lambda: read_source(str(path))):
        with pytest.raises(ValueError, match=pattern):
            read()


def test_a_batch_of_pictures_three_pixels_high_is_what_it_was():
    """(N, 3, W, 3) is NHWC, as ever."""
    array = LEVELS[:, :3]
    assert np.array_equal(arrays.read_levels(array, "it"), array)


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("X_train", "Y_train", "X_test", "Y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
@pytest.mark.parametrize("column", [False, True])
def test_keras_names_and_its_column_of_labels(tmp_path, names, column):
    labels = LABELS[:, None] if column else LABELS
    parts = (LEVELS[:14], labels[:14], LEVELS[14:], labels[14:])
    with open(tmp_path / "cifar.NPZ", "wb") as file:
        np.savez(file, **dict(zip(names, parts)))
    for split, part in (("train", slice(0, 14)), ("test", slice(14, 20))):
        pixels, found = load_split(set_of(tmp_path / "cifar.NPZ"), split)
        assert torch.equal(pixels, NCHW[part]) and found.tolist() == LABELS[part].tolist()


def test_convert_writes_all_of_keras_file(tmp_path, capsys):
    path = tmp_path / "mnist.npz"
    np.savez(path, x_train=LEVELS[:14], y_train=LABELS[:14], x_test=LEVELS[14:], y_test=LABELS[14:])
    assert cli.run(commands.main, ["convert", str(path), f"out={tmp_path / 'a.zip'}"]) == 0
    assert "20 images (3, 5, 6)" in capsys.readouterr().out
    cfg = DataConfig(name="zip", root=str(tmp_path / "a.zip"))
    for split, part in (("train", slice(0, 14)), ("test", slice(14, 20))):
        pixels, labels = load_split(cfg, split)
        assert torch.equal(pixels, NCHW[part]) and labels.tolist() == LABELS[part].tolist()


def test_scikit_learns_names(tmp_path):
    np.savez(tmp_path / "a.npz", x=LEVELS, y=LABELS)
    pixels, labels = load_split(set_of(tmp_path / "a.npz"), "train")
    assert torch.equal(pixels, NCHW) and labels.tolist() == LABELS.tolist()


def test_arrays_that_are_not_read_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=LEVELS, y_train=LABELS, x_test=LEVELS[:2])
    with pytest.warns(UserWarning, match="a.npz: x_train is read with y_train, x_test not$"):
        read_source(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", LEVELS, LABELS)
    with pytest.warns(UserWarning, match="b.npz: arr_0 is read, arr_1 not$"):
        load_split(set_of(tmp_path / "b.npz"), "train")


def test_arrays_that_are_no_images_need_no_word(tmp_path, recwarn):
    """What sample.py format=npz writes."""
    np.savez(tmp_path / "a.npz", images=LEVELS, labels=LABELS, seeds=np.arange(20))
    load_split(set_of(tmp_path / "a.npz"), "train")
    read_source(str(tmp_path / "a.npz"))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[3], [0], [2]], [3, 0, 2]),
        ([[1], [0], [1]], [1, 0, 1]),
        ([[-1], [5], [0]], [-1, 5, 0]),
        ([[1], [1], [1]], [0, 0, 0]),  # one-hot of one class
        ([[0, 1], [1, 0], [0, 1]], [1, 0, 1]),
        (np.array([2, 0, 1], ">i8"), [2, 0, 1]),
    ],
)
def test_labels(labels, expected):
    assert arrays.class_numbers(labels, 3, "it").tolist() == expected


@pytest.mark.parametrize("labels", [[[0.5], [1.0], [2.0]], [[[1]], [[2]], [[3]]], [[1, 2, 3]]])
def test_labels_that_stay_refused(labels):
    with pytest.raises(ValueError, match="it (holds|has shape)"):
        arrays.class_numbers(labels, 3, "it")


@pytest.mark.parametrize("kind", [">u2", "<u2", ">f4", ">f8"])
def test_either_order_of_bytes_is_restored(box, tmp_path, kind):
    box(radius=0)
    array = random_levels(9, 7, dtype=np.uint16 if "u" in kind else np.uint8).astype(kind)
    save(tmp_path / "a.npy", array)
    found = pictures.read_picture("a.npy", (tmp_path / "a.npy").read_bytes)
    assert found.values.dtype.isnative and np.array_equal(found.values.squeeze(), array)
    assert run(tmp_path / "a.npy", tmp_path / "out", "law=gaussian", "level=25") == 0
    restored = np.load(tmp_path / "out" / "a.npy")
    assert np.abs(restored - array.astype(float)).max() <= 3e-7 * max(255, float(array.max()))


def test_a_capital_suffix_of_a_zip_and_of_statistics(tmp_path):
    from genmodels.metrics.stats import is_stats

    buffer = io.BytesIO()
    np.savez(buffer, mu=np.zeros(2), sigma=np.eye(2))
    (tmp_path / "S.NPZ").write_bytes(buffer.getvalue())
    assert is_stats(tmp_path / "S.NPZ")
    assert images.read_images(write(tmp_path / "A.NPY", LEVELS)).shape == (20, 3, 5, 6)
