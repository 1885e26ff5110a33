"""Images and labels as arrays: npz, npy and idx files, and what stands in for arrays too large.

Nothing in a file is executed.
"""

import contextlib
import gzip
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

LARGEST_IDX = 1 << 30  # bytes of an idx file, unpacked
LARGEST_CLASS = 1 << 20  # a larger number is an identity or a mistake, not a class


@dataclass(frozen=True)
class OnDisk:
    """uint8 images (N, C, H, W) that are read when asked for; stands in for a tensor of them.

    Args:
        read: picklable; a list of image numbers -> uint8 (B, C, H, W).
        image_shape: (C, H, W) of one of them, without the pad.
        numbers: int64 (N,), which of the images there are these.
        pad: background pixels added on each side.
        raw: picklable; an image number -> what its file holds, where each is a file.
    """

    read: Callable[[list[int]], torch.Tensor]
    image_shape: tuple[int, int, int]
    numbers: torch.Tensor
    pad: int = 0
    raw: Callable[[int], bytes] | None = None

    dtype = torch.uint8
    device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        channels, height, width = self.image_shape
        return (len(self.numbers), channels, height + 2 * self.pad, width + 2 * self.pad)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them in memory."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: torch.Tensor | slice) -> torch.Tensor:
        """Return uint8 (B, C, H, W) of an index tensor or slice."""
        pixels = self.read(self.numbers[index].tolist())
        return torch.nn.functional.pad(pixels, [self.pad] * 4) if self.pad else pixels

    def is_floating_point(self) -> bool:
        """Return False, as a tensor of bytes does."""
        return False

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
        pixels = torch.empty(self.shape, dtype=torch.uint8)
        for start in range(0, len(self), 64):
            pixels[start : start + 64] = self[start : start + 64]
        return pixels


def npz_images(
    path: Path | str, split: str | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
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


def npz_names(path: Path | str) -> list[str]:
    """Return the names of the arrays in an npz file.

    Raises:
        ValueError: not an npz.
    """
    with _npz(path) as file:
        return file.files


@contextlib.contextmanager
def _npz(path: Path | str) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except Exception as error:  # numpy raises nearly anything
        raise ValueError(f"npz={path}: cannot be read ({error}); make it again") from None


def memory_size() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def npy_images(path: Path | str) -> tuple[OnDisk, torch.Tensor | None]:
    """Return (images as OnDisk, by a memory map, labels int64 (N,) or None) of X.npy.

    Labels are in X_labels.npy beside it.

    Raises:
        ValueError: not an npy, or not uint8 NHWC / NHW images with a whole number for each.
    """
    path = Path(path)
    count, height, width, channels = _map_npy(path).shape
    labels = None
    beside = path.with_name(f"{path.stem}_labels.npy")
    if beside.is_file():
        labels = class_numbers(_load_npy(beside), count, f"npy={beside}: it")
    shape = (channels, height, width)
    return OnDisk(partial(_read_npy_rows, path), shape, torch.arange(count)), labels


def _read_npy_rows(path: Path, numbers: list[int]) -> torch.Tensor:
    return torch.from_numpy(_map_npy(path)[numbers]).permute(0, 3, 1, 2).contiguous()


def _map_npy(path: Path) -> np.ndarray:
    """Return the memory-mapped images, uint8 (N, H, W, C)."""
    return _check_pixels(_load_npy(path, "r"), f"npy={path}: it")


def _load_npy(path: Path, mode: str | None = None) -> np.ndarray:
    try:
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except Exception as error:  # numpy raises nearly anything
        raise ValueError(f"npy={path}: cannot be read ({error}); make it again") from None


def _check_pixels(images: np.ndarray, what: str) -> np.ndarray:
    """Return the images as (N, H, W, C)."""
    if not isinstance(images, np.ndarray):
        raise ValueError(f"{what} is no array; save it with numpy.save")
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"{what} is {images.dtype} {images.shape}; must be uint8 (N, H, W, 1 or 3), values "
            "0..255"
        )
    if not images.size:
        raise ValueError(f"{what} has shape {images.shape}: holds no picture")
    return images


def class_numbers(labels: np.ndarray, count: int, what: str) -> torch.Tensor:
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


def read_idx(path: Path) -> torch.Tensor:
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
