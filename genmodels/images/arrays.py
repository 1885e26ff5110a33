"""Images and labels as arrays: npz, npy and idx files, and what stands in for arrays too large.

Nothing in a file is executed.
"""

import contextlib
import gzip
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from genmodels.foreign import Npz, check_npy, open_npz, open_plain

LARGEST_IDX = 1 << 30  # bytes of an idx file, unpacked
LARGEST_CLASS = 1 << 20  # a larger number is an identity or a mistake, not a class

# Names of images and of their labels in an npz, whatever their case: ours, Keras', scikit-learn's.
PARTS = {
    "train": (("train_images", "train_labels"), ("x_train", "y_train")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test")),
}
WHOLE = (("images", "labels"), ("x", "y"))
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")  # which reference files hold beside images
NAMES = {name for pairs in (*PARTS.values(), WHOLE) for pair in pairs for name in pair}

MUST_BE = "must be uint8 (N, H, W, 1 or 3), values 0..255"

# What the numbers of an array mean, and how they become levels 0..255.
SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "0..255": lambda values: values,
    "0..1": lambda values: values * 255,
    "-1..1": lambda values: (values + 1) * 127.5,
    "0..65535": lambda values: values / 257,
}


class Unfit(ValueError):
    """An array that is whole but not images or labels; the text names the file."""


@dataclass(frozen=True)
class OnDisk:
    """Images (N, C, H, W) that are read when asked for; stands in for a tensor of them.

    Args:
        read: picklable; a list of image numbers -> (B, C, H, W).
        image_shape: (C, H, W) of one of them, without the pad.
        numbers: int64 (N,), which of the images there are these.
        pad: background pixels added on each side.
        raw: picklable; an image number -> what its file holds, where each is a file.
        dtype: uint8, or float32 of latents.
    """

    read: Callable[[list[int]], torch.Tensor]
    image_shape: tuple[int, int, int]
    numbers: torch.Tensor
    pad: int = 0
    raw: Callable[[int], bytes] | None = None
    dtype: torch.dtype = torch.uint8

    device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        channels, height, width = self.image_shape
        return (len(self.numbers), channels, height + 2 * self.pad, width + 2 * self.pad)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: torch.Tensor | slice) -> torch.Tensor:
        """Return (B, C, H, W) of an index tensor or slice."""
        pixels = self.read(self.numbers[index].tolist())
        return torch.nn.functional.pad(pixels, [self.pad] * 4) if self.pad else pixels

    def is_floating_point(self) -> bool:
        """Return whether they are floats, as a tensor does."""
        return self.dtype.is_floating_point

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """Yield the images in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def load(self) -> torch.Tensor:
        """Return all of them as one tensor.

        Raises:
            ValueError: more than this machine's memory holds.
        """
        memory = memory_size()
        if self.nbytes > memory:
            raise ValueError(
                f"data.device=auto: {len(self)} images take {self.nbytes / 1e9:.0f} GB and this "
                f"machine has {memory / 1e9:.0f} GB; data.device=disk reads them as they are needed"
            )
        pixels = torch.empty(self.shape, dtype=self.dtype)
        for start in range(0, len(self), 64):
            pixels[start : start + 64] = self[start : start + 64]
        return pixels


def npz_images(
    path: Path | str, split: str | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (images uint8 (N, C, H, W), labels int64 (N,) or None) of an npz file.

    Looks for `{split}_images` and `{split}_labels`, or Keras' `x_{split}` and `y_{split}`, if a
    split is named, then for `images` and `labels`, or `x` and `y`, then takes the first array.

    A warning names images and labels that are not read.

    Raises:
        ValueError: not an npz, or not images as read_levels takes them with a whole number for
            each.
    """
    with _npz(path) as file:
        known = {name.lower(): name for name in file.files}
        pairs = [*PARTS[split], *WHOLE] if split else [*WHOLE, *PARTS["train"]]
        # numpy's own name, among the moments of ADM's reference files, then whatever is first.
        pairs += [(name, "labels") for name in ("arr_0", *map(str.lower, file.files[:1]))]
        pair = next((pair for pair in pairs if pair[0] in known), None)
        if pair is None:
            raise OSError("no array in it")
        name = known[pair[0]]
        label_name = known.get(pair[1])
        shape, kind = file.header(name)
        if len(shape) not in (3, 4) or kind.kind not in "uif":
            raise Unfit(f"npz={path}: {name} is {kind} {shape}; {MUST_BE}")
        if label_name:
            # A number for each image, or a one-hot row: no more than any such label can take.
            label_shape, _ = file.header(label_name)
            if len(label_shape) not in (1, 2) or label_shape[0] != shape[0]:
                raise Unfit(
                    f"npz={path}: {label_name} has shape {label_shape} for {shape[0]} images; "
                    "give one whole number for each"
                )
        most = memory_size() // 2  # they are copied once
        images = file.read(name, most)
        labels = file.read(label_name, most) if label_name else None
        unread = [] if split and pair[0] in NAMES else _not_read(known, pair)
    if unread:
        beside = "" if labels is None else f" with {label_name}"
        warnings.warn(f"npz={path}: {name} is read{beside}, {', '.join(unread)} not", stacklevel=2)
    images = read_levels(images, f"npz={path}: {name}")
    if labels is not None:
        labels = class_numbers(labels, len(images), f"npz={path}: {label_name}")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def _not_read(known: dict[str, str], pair: tuple[str, str]) -> list[str]:
    """Return the arrays that a user may believe read: images and labels, or any where we guess.

    Args:
        known: the names in the file by their small letters.
        pair: what is read.
    """
    others = [key for key in known if key not in pair and key not in MOMENTS]
    return [known[key] for key in others if key in NAMES or pair[0] not in NAMES]


def npz_splits(path: Path | str) -> set[str]:
    """Return which of "train" and "test" an npz has images for; `images` are for training.

    Raises:
        ValueError: not an npz.
    """
    with _npz(path) as file:
        known = {name.lower() for name in file.files}
    pairs = {"train": (*PARTS["train"], *WHOLE), "test": PARTS["test"]}
    return {split for split, names in pairs.items() if any(pair[0] in known for pair in names)}


@contextlib.contextmanager
def _npz(path: Path | str) -> Iterator[Npz]:
    try:
        with open_npz(path) as file:
            yield file
    except Unfit:
        raise
    except Exception as error:  # numpy raises nearly anything
        raise ValueError(f"npz={path}: cannot be read ({error}); make it again") from None


def memory_size() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def npy_images(path: Path | str) -> tuple[OnDisk, torch.Tensor | None]:
    """Return (images as OnDisk, by a memory map, labels int64 (N,) or None) of X.npy.

    Labels are in X_labels.npy beside it. An array that is not of bytes is read once from end to
    end, to see what scale it is on.

    Raises:
        ValueError: not an npy, or not images as read_levels takes them with a whole number for
            each.
    """
    path = Path(path)
    array, scale = _map_npy(path), None
    if array.dtype != np.uint8:
        scale = find_scale(array, f"npy={path}: it")
    count, height, width, channels = array.shape
    labels = None
    beside = path.with_name(f"{path.stem}_labels.npy")
    if beside.is_file():
        labels = class_numbers(load_npy(beside), count, f"npy={beside}: it")
    shape = (channels, height, width)
    return OnDisk(partial(_read_npy_rows, path, scale), shape, torch.arange(count)), labels


def _read_npy_rows(path: Path, scale: str | None, numbers: list[int]) -> torch.Tensor:
    array = _map_npy(path)
    if numbers and max(numbers) >= len(array):
        raise ValueError(
            f"npy={path}: holds {len(array)} images now, fewer than when it was opened; put the "
            "old file back"
        )
    rows = array[numbers]
    rows = rows if scale is None else _to_bytes(rows, scale)
    return torch.from_numpy(np.ascontiguousarray(rows)).permute(0, 3, 1, 2).contiguous()


def _map_npy(path: Path) -> np.ndarray:
    """Return the memory-mapped images, (N, H, W, C)."""
    return _channels_last(load_npy(path, "r"), f"npy={path}: it")


def load_npy(path: Path, mode: Literal["r"] | None = None) -> np.ndarray:
    """Return the array of an npy, with mode="r" by a memory map.

    Raises:
        ValueError: no npy, broken, or cut off.
    """
    try:
        with open_plain(path) as file:
            check_npy(file, path.stat().st_size)
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except Exception as error:  # numpy raises nearly anything
        raise ValueError(f"npy={path}: cannot be read ({error}); make it again") from None


def read_levels(images: np.ndarray, what: str) -> np.ndarray:
    """Return images as uint8 (N, H, W, C), C = 1 or 3.

    Args:
        images: (N, H, W), (N, H, W, C) or (N, C, H, W) of bytes; of 16 bits (uint16), which become
            round(v / 257); of whole numbers 0..255; or of floats that are such bytes, or bytes
            divided by 255, or by 127.5 less 1.
        what: begins the line of an error.

    Raises:
        ValueError: anything else: its meaning would be a guess.
    """
    images = _channels_last(images, what)
    if images.dtype == np.uint8:
        return images
    scale = find_scale(images, what)
    levels = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), 256):
        levels[start : start + 256] = _to_bytes(images[start : start + 256], scale)
    return levels


def _to_bytes(values: np.ndarray, scale: str) -> np.ndarray:
    return np.rint(SCALES[scale](values.astype(np.float64))).astype(np.uint8)


def _channels_last(images: np.ndarray, what: str) -> np.ndarray:
    """Return a view of the images as (N, H, W, C); (N, C, H, W) where it cannot be the former."""
    if not isinstance(images, np.ndarray):
        raise ValueError(f"{what} is no array; save it with numpy.save")
    shape = images.shape
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4 and shape[-1] not in (1, 3) and shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.dtype.kind not in "uif" or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"{what} is {images.dtype} {shape}; {MUST_BE}")
    if not images.size:
        raise ValueError(f"{what} has shape {shape}: holds no picture")
    return images


def find_scale(images: np.ndarray, what: str) -> str:
    """Return the key of SCALES of numbers that are not bytes, whose meaning has to be certain.

    Floats are taken only where all of them are levels: k, k / 255 or k / 127.5 - 1.

    Raises:
        ValueError: it is not; `what` begins the line.
    """
    lowest, highest = np.inf, -np.inf
    whole = {"0..255": True, "0..1": True, "-1..1": True}
    near = 0.1 if images.dtype.itemsize == 2 else 0.01  # what rounding to half floats costs
    for start in range(0, len(images), 256):
        values = images[start : start + 256].astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"{what} is {images.dtype} with NaN or infinite values; {MUST_BE}")
        lowest = min(lowest, values.min())
        highest = max(highest, values.max())
        for scale in whole:
            levels = SCALES[scale](values)
            whole[scale] &= bool(np.abs(levels - np.rint(levels)).max() <= near)
    if (images.dtype.kind, images.dtype.itemsize) == ("u", 2):
        if highest > 255:
            return "0..65535"
        raise ValueError(
            f"{what} is {images.dtype} up to {highest:.0f}, so bytes or very dark; {MUST_BE}"
        )
    scale = "-1..1" if lowest < 0 else "0..1" if highest <= 1 else "0..255"
    if images.dtype.kind != "f":
        scale = "0..255"
    least, most = {"-1..1": (-1.001, 1.001)}.get(scale, (0, 255))
    if whole[scale] and least <= lowest and highest <= most:
        return scale
    raise ValueError(
        f"{what} is {images.dtype} from {lowest:.4g} to {highest:.4g}, and not all are levels, "
        f"nor levels divided by 255 or by 127.5 less 1; {MUST_BE}"
    )


def class_numbers(labels: np.ndarray, count: int, what: str) -> torch.Tensor:
    """Return labels as int64 (count,): whole numbers >= -1 (none), or rows that are one-hot.

    Whole numbers may stand in a column, (count, 1).

    A vector that is no one-hot (soft labels, attributes) names no class and is refused.

    Raises:
        ValueError: another number of labels, or other values; `what` begins the line.
    """
    labels = np.asarray(labels)
    # Keras has a column of numbers; a column of ones is one-hot, of a single class.
    if labels.ndim == 2 and labels.shape[1] == 1 and not (labels == 1).all():
        labels = labels[:, 0]
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


def read_idx(path: Path) -> torch.Tensor:
    """Return the uint8 array of an idx file (MNIST's format), gzipped if it ends in .gz.

    Raises:
        ValueError: not an idx file of bytes, or truncated.
    """
    try:
        with open_plain(path) as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
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
