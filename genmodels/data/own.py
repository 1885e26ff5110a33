"""Own data: pictures in folders and zips, npz and npy, in memory or read as they are needed."""

import json
from dataclasses import dataclass
from functools import partial
from math import prod
from os import environ
from pathlib import Path

import numpy as np
import torch

from genmodels import images
from genmodels.images import arrays


@dataclass(frozen=True)
class OnDisk:
    """uint8 images (N, C, H, W) that are read when asked for; stands in for a tensor of them.

    Args:
        read: picklable; a list of image numbers -> uint8 (B, C, H, W).
        image_shape: (C, H, W) of one of them, without the pad.
        numbers: int64 (N,), which of the images there are these.
        pad: background pixels added on each side.
    """

    read: object
    image_shape: tuple
    numbers: torch.Tensor
    pad: int = 0

    dtype, device = torch.uint8, torch.device("cpu")

    @property
    def shape(self):
        """(N, C, H, W)."""
        channels, height, width = self.image_shape
        return (len(self.numbers), channels, height + 2 * self.pad, width + 2 * self.pad)

    @property
    def nbytes(self):
        """Bytes of all of them in memory."""
        return prod(self.shape)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        """Return uint8 (B, C, H, W) of an index tensor or slice."""
        pixels = self.read(self.numbers[index].tolist())
        return torch.nn.functional.pad(pixels, [self.pad] * 4) if self.pad else pixels

    def is_floating_point(self):
        """Return False, as a tensor of bytes does."""
        return False

    def split(self, size):
        """Yield the images in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def load(self):
        """Return all of them as one tensor.

        Raises:
            ValueError: more than this machine's memory holds.
        """
        memory = arrays.memory_size()
        if self.nbytes > memory:
            raise ValueError(
                f"data.device=auto: {len(self)} images take {self.nbytes / 1e9:.0f} GB and this "
                f"machine has {memory / 1e9:.0f} GB; data.device=disk reads them as they are needed"
            )
        pixels = torch.empty(self.shape, dtype=torch.uint8)
        for start in range(0, len(self), 64):
            pixels[start : start + 64] = self[start : start + 64]
        return pixels


def data_root(cfg):
    """Return the folder (or file) of the data: data.root, else $GENMODELS_DATA, else ./data."""
    return Path(cfg.root or environ.get("GENMODELS_DATA") or "data").expanduser()


def held_out_share(cfg, split, size):
    """Return the image numbers in a split of a set without splits, in order of size."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(size))
    count = round(size * cfg.holdout)
    return (order[: size - count] if split == "train" else order[size - count :]).sort().values


def pictures(cfg, split):
    """Pictures in a folder or zip, cropped and resized.

    Where there are train/ and test/ (or else val/) these are the splits; a lone train/ is split as
    any other folder. A dataset.json says the labels (as in EDM's zips); without it the folders
    right below are the classes, numbered by the training folders in order of name.
    """
    tree = images.Tree(data_root(cfg), "data.root")
    training, held_out = _split_names(tree.names)
    if not training:
        raise ValueError(f"data.root={tree.path}: holds no picture ({', '.join(images.SUFFIXES)})")
    names = training if split == "train" or held_out is None else held_out
    labels = _labels(tree, training, names, cfg.labels)
    numbers = torch.arange(len(names))
    if held_out is None:
        numbers = held_out_share(cfg, split, len(names))
    channels, side = cfg.channels or 3, cfg.resolution
    size = (side, side) if side else images.picture_size(*tree.where(names[0])) if names else (1, 1)
    read = partial(_read_pictures, tree, names, (channels, *size), (side, cfg.crop))
    return OnDisk(read, (channels, *size), numbers), labels[numbers]


def _read_pictures(tree, names, shape, fitting, numbers):
    found = [tree.read(names[number], shape[0]) for number in numbers]
    return fit_all(found, shape, fitting, [f"{tree.path}/{names[number]}" for number in numbers])


def fit_all(pictures, shape, fitting, names):
    """Return pictures (C, H, W) of any size as one tensor (B, *shape); fitting = (side, crop).

    Raises:
        ValueError: they would have to be cropped or resized, and nobody asked for it.
    """
    side, crop = fitting
    pixels = torch.empty(len(pictures), *shape, dtype=torch.uint8)
    for row, (image, name) in enumerate(zip(pictures, names)):
        if image.shape != shape and (not side or crop == "none"):
            asked = "data.crop=none" if side else "data.resolution=0"
            raise ValueError(
                f"{asked}: {name} is {tuple(image.shape[1:])}, not {shape[1:]} as others; give "
                "data.resolution=SIDE (and data.crop=center or adm) to crop and resize"
            )
        pixels[row] = images.fit(image, side, crop)
    return pixels


def _split_names(names):
    """Return (names of the training pictures, of the held-out ones or None)."""
    tops = {name.split("/")[0] for name in names if "/" in name}
    inside = {
        top: [name for name in names if name.startswith(f"{top}/")]
        for top in ("train", "test", "val")
        if top in tops
    }
    if "train" in inside:
        held_out = inside.get("test") or inside.get("val")
        # Beside other folders of pictures, train is a class: cars, planes, trains.
        if held_out or len(inside["train"]) == len(names):
            return inside["train"], held_out
    return names, None


def _labels(tree, training, names, needed):
    """Return the class of each picture, int64 (N,), -1 where there are none."""
    if "dataset.json" in tree.entries:
        return _edm_labels(tree, names)
    prefix = "train/" if all(name.startswith("train/") for name in training) else ""
    below = [name.removeprefix(prefix).split("/") for name in training]
    classes = sorted({parts[0] for parts in below}) if all(len(p) > 1 for p in below) else []
    numbers = {name: number for number, name in enumerate(classes)}
    labels = []
    for name in names:
        parts = name.split("/")[1 if prefix else 0 :]
        if classes and parts[0] not in numbers and (needed or len(parts) > 1):
            raise ValueError(
                f"data.root={tree.path}: {name} is in no class of train/, whose folders number the "
                "classes; take it out or add such a folder to train/"
            )
        labels.append(numbers.get(parts[0], -1))
    return torch.tensor(labels, dtype=torch.int64)


def _edm_labels(tree, names):
    """Return the labels in dataset.json: {"labels": null, [[NAME, LABEL], ...] or {NAME: LABEL}}.

    LABEL is a whole number or a one-hot vector.
    """
    where = f"data.root={tree.path}: dataset.json"
    try:
        labels = json.loads(tree.bytes("dataset.json"))["labels"]
        pairs = len(labels or ())
        labels = dict(labels or {})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{where} is not {{"labels": [[NAME, LABEL], ...]}} ({error})') from None
    if not labels:
        return torch.full((len(names),), -1)
    missing = [name for name in names if name not in labels]
    strange = sorted(set(labels) - tree.entries, key=str)
    if pairs != len(labels):
        raise ValueError(f"{where} names a picture twice; leave one of the two out")
    if missing or strange:
        what = f"has no label for {missing[0]}" if missing else f"names {strange[0]}, not there"
        count = len(missing or strange) - 1
        raise ValueError(f"{where} {what} (and {count} more); make the two agree")
    try:
        array = np.asarray([labels[name] for name in names])
    except ValueError:
        raise ValueError(f"{where} mixes numbers and vectors; give whole numbers") from None
    return arrays.class_numbers(array, len(names), where)


def npz(cfg, split):
    """Arrays uint8 NHWC in an npz, with or without a test part."""
    path = data_root(cfg)
    if not path.is_file():
        raise ValueError(f"data.root={path}: no such file; npz wants the path of the .npz itself")
    names = arrays.npz_names(path)
    own_test = "test_images" in names
    if own_test and not {"train_images", "images"} & {*names}:
        raise ValueError(f"data.root={path}: has test_images alone; add train_images")
    # Without a test part both splits are shares of the same images.
    pixels, labels = arrays.npz_images(path, split if own_test else "train")
    labels = torch.full((len(pixels),), -1) if labels is None else labels
    share = slice(None) if own_test else held_out_share(cfg, split, len(pixels))
    return pixels[share], labels[share]


def npy(cfg, split):
    """A uint8 array NHWC in X.npy, memory-mapped, with its labels in X_labels.npy."""
    path = data_root(cfg)
    if not path.is_file():
        raise ValueError(f"data.root={path}: no such file; npy wants the path of the .npy itself")
    array, labels = arrays.npy_images(path)
    labels = torch.full((len(array),), -1) if labels is None else labels
    share = held_out_share(cfg, split, len(array))
    shape = (array.shape[3], *array.shape[1:3])
    return OnDisk(partial(_read_npy, path), shape, share), labels[share]


def _read_npy(path, numbers):
    rows = arrays.npy_pixels(path)[numbers]
    return torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous()
