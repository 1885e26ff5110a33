"""Own data: pictures in folders and zips, npz and npy, in memory or read as they are needed."""

import json
import warnings
from dataclasses import replace
from functools import partial
from os import environ
from pathlib import Path

import numpy as np
import torch

from genmodels import images
from genmodels.config import DataConfig
from genmodels.data.parts import Part, tree_parts
from genmodels.images import OnDisk, Tree, arrays

Split = tuple[torch.Tensor | OnDisk, torch.Tensor]  # uint8 (N, C, H, W), labels int64 (N,)


def data_root(cfg: DataConfig) -> Path:
    """Return the folder (or file) of the data: data.root, else $GENMODELS_DATA, else ./data."""
    return Path(cfg.root or environ.get("GENMODELS_DATA") or "data").expanduser()


def held_out_share(cfg: DataConfig, split: str, size: int) -> torch.Tensor:
    """Return the image numbers in a split of a set without splits, in order of size."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(size))
    count = round(size * cfg.holdout)
    return (order[: size - count] if split == "train" else order[size - count :]).sort().values


def read_tree(tree: Tree, cfg: DataConfig, split: str) -> Split:
    """Return the pictures of a split in a folder or zip, cropped and resized, as OnDisk.

    Where there are folders for training and for testing (or else validation) these are the splits,
    see tree_parts; a lone one is split as any other folder. A dataset.json says the labels (as in
    EDM's zips), for the whole or in each part; without it the folders right below are the classes,
    numbered by the training folders in order of name.
    """
    training, held_out = tree_parts(tree)
    if not training.names:
        hint = "; latents as EDM2 stores them are data.name=latents" if _has_arrays(tree) else ""
        known = ", ".join(images.SUFFIXES)
        raise ValueError(f"data.root={tree.path}: holds no picture ({known}){hint}")
    part = training if split == "train" or held_out is None else held_out
    names = part.names
    labels = _labels(tree, training, part, cfg.labels)
    numbers = torch.arange(len(names))
    if held_out is None:
        numbers = held_out_share(cfg, split, len(names))
    side = cfg.resolution
    size = (side, side) if side else tree.size(names[0]) if names else (1, 1)
    shape = (cfg.channels or 3, *size)
    read = partial(_read_pictures, tree, names, shape, side, cfg.crop)
    return OnDisk(read, shape, numbers, raw=partial(_read_file, tree, names)), labels[numbers]


def _has_arrays(tree: Tree) -> bool:
    return any(name.endswith(".npy") for name in tree.entries)


def _read_file(tree: Tree, names: list[str], number: int) -> bytes:
    return tree.read_bytes(names[number])


def _read_pictures(
    tree: Tree,
    names: list[str],
    shape: tuple[int, int, int],
    side: int,
    crop: str,
    numbers: list[int],
) -> torch.Tensor:
    pictures = [tree.read(names[number], shape[0]) for number in numbers]
    shown = [f"{tree.path}/{names[number]}" for number in numbers]
    return fit_pictures(pictures, shape, side, crop, shown)


def fit_pictures(
    pictures: list[torch.Tensor],
    shape: tuple[int, int, int],
    side: int,
    crop: str,
    names: list[str],
) -> torch.Tensor:
    """Return pictures (C, H, W) of any size as one tensor, uint8 (B, *shape).

    Args:
        pictures: uint8 (C, H, W) each.
        shape: (C, H, W) that all get.
        side, crop: how, see images.fit; side 0 leaves them as they are.
        names: what errors call them.

    Raises:
        ValueError: they would have to be cropped or resized, and nobody asked for it.
    """
    pixels = torch.empty(len(pictures), *shape, dtype=torch.uint8)
    for row, (image, name) in enumerate(zip(pictures, names)):
        if image.shape != shape and (not side or crop == "none"):
            asked = "data.crop=none" if side else "data.resolution=0"
            raise ValueError(
                f"{asked}: {name} is {tuple(image.shape[1:])}, not {shape[1:]} as others; give "
                "data.resolution=SIDE (and data.crop=center, lanczos or adm) to crop and resize"
            )
        pixels[row] = images.fit(image, side, crop)
    return pixels


def _labels(tree: Tree, training: Part, part: Part, needed: bool) -> torch.Tensor:
    """Return the class of each picture of a part, int64 (N,), -1 where there are none.

    Args:
        tree: what the pictures lie in.
        training: the training pictures, whose folders number the classes.
        part: the pictures of the split.
        needed: whether a picture outside any folder is an error.

    Raises:
        ValueError: a dataset.json in a subfolder where labels are needed, or of one part alone;
            pictures beside the class folders where labels are needed.
    """
    if "dataset.json" in tree.entries:
        return edm_labels(tree, part.names, "")
    if all(f"{p.folder}dataset.json" in tree.entries for p in (training, part)):
        return edm_labels(tree, part.names, part.folder)
    elsewhere = sorted(name for name in tree.entries if name.endswith("/dataset.json"))
    if elsewhere:
        line = (
            f"data.root={tree.path}: {elsewhere[0]} is not read: it holds labels of a part; put "
            "all into one dataset.json above, or name that folder"
        )
        if needed:
            raise ValueError(line)
        warnings.warn(line, stacklevel=2)
        return torch.full((len(part.names),), -1)
    strays = [name for name in training.names if "/" not in training.within(name)]
    if 0 < len(strays) < len(training.names):
        line = f"{strays[0]} (and {len(strays) - 1} more) lies beside folders, not in a class"
        if needed:
            raise ValueError(f"data.root={tree.path}: {line}; move it into one, or out of there")
        if 2 * len(strays) < len(training.names):
            warnings.warn(f"data.root={tree.path}: {line}: no class labels", stacklevel=2)
    classes = _folders_of(training)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = []
    for name in part.names:
        parts = part.within(name).split("/")
        if classes and parts[0] not in numbers and (needed or len(parts) > 1):
            raise ValueError(
                f"data.root={tree.path}: {name} is in no class of {training.folder}, whose folders "
                f"number the classes; take it out or add such a folder to {training.folder}"
            )
        labels.append(numbers.get(parts[0], -1))
    return torch.tensor(labels, dtype=torch.int64)


def _folders_of(training: Part) -> list[str]:
    """Return the folders that number the classes: those right below, if all pictures lie in any."""
    below = [training.within(name).split("/") for name in training.names]
    return [] if any(len(parts) == 1 for parts in below) else sorted({p[0] for p in below})


def class_folders(tree: Tree) -> list[str]:
    """Return the folders that number the classes of read_tree; [] where a dataset.json does."""
    training, _ = tree_parts(tree)
    has_json = any(name.rpartition("/")[2] == "dataset.json" for name in tree.entries)
    return [] if has_json else _folders_of(training)


def edm_labels(tree: Tree, names: list[str], folder: str) -> torch.Tensor:
    """Return the labels in dataset.json: {"labels": null, [[NAME, LABEL], ...] or {NAME: LABEL}}.

    LABEL is a whole number or a one-hot vector; NAME is a path within the folder that holds the
    file, "" the root.
    """
    file = f"{folder}dataset.json"
    source = f"data.root={tree.path}: {file}"
    try:
        labels = json.loads(tree.read_bytes(file))["labels"]
        pairs = len(labels or ())
        labels = {f"{folder}{name}": label for name, label in dict(labels or {}).items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{source} is not {{"labels": [[NAME, LABEL], ...]}} ({error})') from None
    if not labels:
        return torch.full((len(names),), -1)
    names = [images.split_page(name)[0] for name in names]  # the pages of a file have its label
    missing = [name for name in names if name not in labels]
    strange = sorted(set(labels) - tree.entries, key=str)
    if pairs != len(labels):
        raise ValueError(f"{source} names a picture twice; leave one of the two out")
    if missing or strange:
        first = f"has no label for {missing[0]}" if missing else f"names {strange[0]}, not there"
        count = len(missing or strange) - 1
        raise ValueError(f"{source} {first} (and {count} more); make the two agree")
    try:
        array = np.asarray([labels[name] for name in names])
    except ValueError:
        raise ValueError(f"{source} mixes numbers and vectors; give whole numbers") from None
    return arrays.class_numbers(array, len(names), source)


def read_npz(cfg: DataConfig, split: str) -> Split:
    """Return the images of a split in an npz, with or without a test part; see npz_images."""
    path = data_root(cfg)
    if not path.is_file():
        raise ValueError(f"data.root={path}: no such file; npz wants the path of the .npz itself")
    parts = arrays.npz_splits(path)
    has_test = "test" in parts
    if parts == {"test"}:
        raise ValueError(f"data.root={path}: has test_images alone; add train_images")
    # Without a test part both splits are shares of the same images.
    pixels, labels = arrays.npz_images(path, split if has_test else "train")
    labels = torch.full((len(pixels),), -1) if labels is None else labels
    share = slice(None) if has_test else held_out_share(cfg, split, len(pixels))
    return pixels[share], labels[share]


def read_npy(cfg: DataConfig, split: str) -> Split:
    """Return the images of a split of X.npy as OnDisk, labels X_labels.npy; see npy_images."""
    path = data_root(cfg)
    if not path.is_file():
        raise ValueError(f"data.root={path}: no such file; npy wants the path of the .npy itself")
    pixels, labels = arrays.npy_images(path)
    labels = torch.full((len(pixels),), -1) if labels is None else labels
    share = held_out_share(cfg, split, len(pixels))
    return replace(pixels, numbers=share), labels[share]
