"""Images and labels as arrays: npz, npy and idx files. Nothing in a file is executed."""

import contextlib
import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch

LARGEST_IDX = 1 << 30  # bytes of an idx file, unpacked
LARGEST_CLASS = 1 << 20  # a larger number is an identity or a mistake, not a class


def npz_images(path, split=None):
    """Return (images uint8 (N, C, H, W), labels int64 (N,) or None) of an npz file.

    Looks for `{split}_images` and `{split}_labels` if a split is named, then for `images` and
    `labels`, then takes the first array.

    Raises:
        ValueError: not an npz, or not uint8 NHWC / NHW images with a whole number for each.
    """
    with _npz(path) as file:
        names = [f"{split}_images", "images", *file.files[:1]]
        name = next((name for name in names if name in file.files), None)
        if name is None:
            raise OSError("no array in it")
        size = sum(i.file_size for i in file.zip.infolist() if i.filename == f"{name}.npy")
        if size > memory_size():
            raise OSError(f"{name} unpacks to {size / 1e9:.0f} GB, more than this machine has")
        images = file[name]
        label_name = f"{split}_labels" if name == f"{split}_images" else "labels"
        labels = file[label_name] if label_name in file.files else None
    images = _check_pixels(images, f"npz={path}: {name}")
    if labels is not None:
        labels = class_numbers(labels, len(images), f"npz={path}: {label_name}")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def npz_names(path):
    """Return the names of the arrays in an npz file.

    Raises:
        ValueError: not an npz.
    """
    with _npz(path) as file:
        return file.files


@contextlib.contextmanager
def _npz(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except Exception as error:  # numpy raises nearly anything
        raise ValueError(f"npz={path}: cannot be read ({error}); make it again") from None


def memory_size():
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def npy_images(path):
    """Return (memory-mapped uint8 array (N, H, W, C), labels int64 (N,) or None) of X.npy.

    Labels are in X_labels.npy beside it.

    Raises:
        ValueError: not an npy, or not uint8 NHWC / NHW images with a whole number for each.
    """
    path, labels = Path(path), None
    images = npy_pixels(path)
    beside = path.with_name(f"{path.stem}_labels.npy")
    if beside.is_file():
        labels = class_numbers(_read_npy(beside), len(images), f"npy={beside}: it")
    return images, labels


def npy_pixels(path):
    """Return the images of npy_images alone."""
    return _check_pixels(_read_npy(path, "r"), f"npy={path}: it")


def _read_npy(path, mode=None):
    try:
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except Exception as error:  # numpy raises nearly anything
        raise ValueError(f"npy={path}: cannot be read ({error}); make it again") from None


def _check_pixels(images, what):
    """Return the images as (N, H, W, C)."""
    if not isinstance(images, np.ndarray):
        raise ValueError(f"{what} is no array; save it with numpy.save")
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"{what} is {images.dtype} {images.shape}; must be uint8 (N, H, W, 1 or 3), levels "
            "0..255"
        )
    if not images.size:
        raise ValueError(f"{what} has shape {images.shape}: holds no picture")
    return images


def class_numbers(labels, count, what):
    """Return labels as int64 (count,): whole numbers >= -1 (none), or rows that are one-hot.

    A vector that is no one-hot (soft labels, attributes) names no class and is refused.

    Raises:
        ValueError: another number of labels, or other values; `what` begins the line.
    """
    labels = np.asarray(labels)
    if labels.ndim not in (1, 2) or len(labels) != count:
        raise ValueError(
            f"{what} has shape {labels.shape} for {count} images; give one whole number for each"
        )
    if labels.dtype.kind not in "iuf" or (labels.dtype.kind == "f" and labels.ndim == 1):
        raise ValueError(f"{what} holds {labels.dtype}; give one whole number for each image")
    if labels.ndim == 2:
        good = np.isin(labels, (0, 1)).all(1) & (labels.sum(1) == 1)
        if not good.all():
            raise ValueError(
                f"{what} holds a vector that is not one-hot (image {int(np.argmin(good))}); only "
                "classes can be learnt: give whole numbers"
            )
        labels = labels.argmax(1)
    if labels.min() < -1 or labels.max() >= LARGEST_CLASS:
        raise ValueError(
            f"{what} holds {labels.min()}..{labels.max()}; classes are numbered from 0, -1 is none"
        )
    return torch.from_numpy(labels.astype(np.int64))


def read_idx(path):
    """Return the uint8 array of an idx file (MNIST's format), gzipped if it ends in .gz.

    Raises:
        ValueError: not an idx file of bytes, or truncated.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            start = file.read(4)
            if start[:3] != b"\0\0\x08":
                raise OSError("it does not begin as an idx file of bytes")
            sizes = file.read(4 * start[3])
            if len(sizes) < 4 * start[3]:
                raise OSError("it ends in its header")
            shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4)]
            size = math.prod(shape)
            if size > LARGEST_IDX:
                raise OSError(f"shape {shape} is more than {LARGEST_IDX >> 20} MB")
            data = file.read(size + 1)  # no further: a .gz may hold any amount
        if len(data) != size:
            raise OSError(
                f"{min(len(data), size)} bytes{' and more' * (len(data) > size)} for shape {shape}"
            )
    except (EOFError, OSError, IndexError, zlib.error) as error:
        raise ValueError(f"data={path}: cannot be read ({error}); fetch it again") from None
    return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(shape).copy())
