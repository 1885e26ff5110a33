"""Pictures in files: PNG, JPEG, WebP, TIFF and BMP, in folders and zips; npz and npy arrays.

Nothing in a file is executed, and nothing is unpacked to disk.
"""

import contextlib
import functools
import gzip
import io
import math
import os
import re
import warnings
import zipfile
import zlib
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LARGEST_ENTRY = 1 << 30  # bytes of one unpacked entry of a zip
LARGEST_CLASS = 1 << 20  # a larger number is an identity or a mistake, not a class


def read_image(file, channels=None, name=None):
    """Return one picture as uint8 (C, H, W), levels 0..255.

    Palettes become their colours. Alpha is dropped, not composited, as in the published protocols:
    a transparent pixel shows the colour stored under it. 16-bit grey v (0..65535) becomes
    round(v / 257); of 16-bit colour Pillow keeps the high byte. Of an animation it is the first
    frame. A camera's rotation flag (EXIF) is not applied, as in the published protocols.

    Args:
        file: path or open binary file.
        channels: 1 or 3 converts; None keeps grey as 1 channel and makes anything else 3.
        name: what errors call the file.

    Raises:
        ValueError: not a picture, truncated, of more than 16 bits, or of over 89 million pixels
            (Pillow's guard against decompression bombs).
    """
    name = name or file
    try:
        with _no_bombs(), Image.open(file) as picture:
            if picture.mode.startswith(("I", "F")):
                array = np.array(picture)
            else:
                grey = channels == 1 or (channels is None and picture.mode in ("1", "L", "LA"))
                array = np.array(picture.convert("L" if grey else "RGB"))
    except Exception as error:  # at a broken file Pillow raises nearly anything
        raise ValueError(_unreadable(name, error)) from None
    if array.dtype != np.uint8:
        array = _to_8_bits(array, name)
        array = np.stack([array] * 3, -1) if channels == 3 else array
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def picture_size(file, name=None):
    """Return (H, W) of a picture from its header; see read_image."""
    try:
        with _no_bombs(), Image.open(file) as picture:
            return picture.height, picture.width
    except Exception as error:  # as in read_image
        raise ValueError(_unreadable(name or file, error)) from None


def _unreadable(name, error):
    if isinstance(error, UnidentifiedImageError):
        error = "it is no picture, or one that Pillow does not know"
    return f"image={name}: cannot be read ({error}); remove it"


@contextlib.contextmanager
def _no_bombs():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # odd metadata; the pixels are what counts
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        yield


def _to_8_bits(levels, name):
    """Return grey levels of 16 bits as 8; Pillow's own conversion clips them at 255."""
    if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"image={name}: has more than 16 bits a pixel; convert it to 8 or 16 bits")
    return np.rint(levels / 257).astype(np.uint8)


class Tree:
    """The pictures below a folder or in a zip, by their paths within it.

    Hidden entries and macOS's __MACOSX are left out; of a zip that holds one folder and nothing
    beside it, that folder is the root.

    Args:
        path: the folder or .zip.
        key: what errors call it.

    Attributes:
        names: paths of the pictures with forward slashes, sorted part by part.

    Raises:
        ValueError: neither folder nor zip, broken, or with an entry that is unsafe to unpack.
    """

    def __init__(self, path, key="images"):
        self.path, self.key, self.prefix = Path(path), key, ""
        if self.path.is_dir():
            found = self.path.rglob("*")
            entries = [file.relative_to(self.path).as_posix() for file in found if file.is_file()]
        elif self.path.suffix.lower() == ".zip" and self.path.is_file():
            entries = self._zip_entries()
        else:
            raise ValueError(f"{key}={path}: no such folder or .zip")
        self.entries = {name for name in entries if not _is_hidden(name)}
        pictures = [name for name in self.entries if name.lower().endswith(SUFFIXES)]
        self.names = sorted(pictures, key=lambda name: name.split("/"))

    def _zip_entries(self):
        with self._spelled_out():
            infos = [info for info in self._archive().infolist() if not info.is_dir()]
        for info in infos:
            name = info.filename
            if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or ":" in name:
                raise ValueError(
                    f"{self.key}={self.path}: entry {name} points outside the zip; make it anew"
                )
            if info.file_size > LARGEST_ENTRY:
                raise ValueError(
                    f"{self.key}={self.path}: entry {name} unpacks to {info.file_size >> 20} MB, "
                    f"more than {LARGEST_ENTRY >> 20}; take it out"
                )
        names = [info.filename for info in infos if not _is_hidden(info.filename)]
        tops = {name.split("/")[0] if "/" in name else "" for name in names}
        if len(tops) == 1 and tops != {""} and tops != {"train"}:
            self.prefix = f"{tops.pop()}/"
        return [name.removeprefix(self.prefix) for name in names]

    def _archive(self):
        status = self.path.stat()
        return _archive(self.path, os.getpid(), status.st_mtime_ns, status.st_size)

    @contextlib.contextmanager
    def _spelled_out(self):
        """Turn the many kinds of error of a broken zip into one line."""
        try:
            yield
        except Exception as error:  # broken, encrypted, oddly packed: each raises its own kind
            raise ValueError(
                f"{self.key}={self.path}: cannot be read ({error}); fetch or make it again"
            ) from None

    def bytes(self, name):
        """Return what the entry holds."""
        if not self.path.is_dir():
            with self._spelled_out():
                return self._archive().read(self.prefix + name)
        return (self.path / name).read_bytes()

    def read(self, name, channels=None):
        """Return one picture as uint8 (C, H, W); see read_image."""
        file, name = self.where(name)
        return read_image(file, channels, name)

    def where(self, name):
        """Return (what Pillow opens, what errors call it)."""
        if self.path.is_dir():
            return self.path / name, None
        return io.BytesIO(self.bytes(name)), f"{self.path}/{name}"


@functools.lru_cache(maxsize=8)
def _archive(path, process, *version):
    """Return the open zip; each process has its own, for a file position cannot be shared."""
    return zipfile.ZipFile(path)


def _is_hidden(name):
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def read_images(path):
    """Return all images of a folder, zip, npz or npy as one tensor, uint8 (N, C, H, W).

    Hidden files and the `grid.png` of sample.py are skipped. An npz holds `images` (or
    its first array) as uint8 NHWC or NHW, an npy such an array.

    Raises:
        ValueError: nothing there, mixed sizes, or a broken picture.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.is_file():
        return npz_images(path)[0]
    if path.suffix == ".npy" and path.is_file():
        return torch.from_numpy(np.array(npy_images(path)[0])).permute(0, 3, 1, 2).contiguous()
    tree, names, shape = sample_tree(path)
    return read_samples(tree, names, shape, range(len(names)))


def sample_tree(path):
    """Return (Tree, names, (C, H, W) of the first) of a folder or zip, without any grid.png.

    Raises:
        ValueError: nothing there, or a broken picture.
    """
    path = Path(path)
    if not path.is_dir() and not (path.suffix.lower() == ".zip" and path.is_file()):
        raise ValueError(f"images={path}: no such folder, .zip or .npz (or .npy)")
    tree = Tree(path)
    names = [name for name in tree.names if PurePath(name).name != "grid.png"]
    if not names:
        raise ValueError(f"images={path}: holds no picture ({', '.join(SUFFIXES)})")
    return tree, names, tuple(tree.read(names[0]).shape)


def read_samples(tree, names, shape, numbers):
    """Return the pictures of these numbers, which must have that shape, uint8 (B, C, H, W).

    Raises:
        ValueError: mixed sizes, or a broken picture.
    """
    pixels = torch.empty(len(numbers), *shape, dtype=torch.uint8)
    for row, number in enumerate(numbers):
        picture = tree.read(names[number])
        if picture.shape != shape:
            raise ValueError(
                f"images={tree.path}: mixed sizes, {names[number]} is {tuple(picture.shape)} but "
                f"{names[0]} is {shape}; resize them or, if grey and colour are mixed, convert them"
            )
        pixels[row] = picture
    return pixels


def npz_images(path, split=None):
    """Return (images uint8 (N, C, H, W), labels int64 (N,) or None) of an npz file.

    Looks for `{split}_images` and `{split}_labels` if a split is named, then for `images` and
    `labels`, then takes the first array.

    Raises:
        ValueError: not an npz, or not uint8 NHWC / NHW images with a whole number for each.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [f"{split}_images", "images", *file.files[:1]]
            name = next(name for name in names if name in file.files)
            images = file[name]
            label_name = f"{split}_labels" if name == f"{split}_images" else "labels"
            labels = file[label_name] if label_name in file.files else None
    except Exception as error:  # numpy raises nearly anything
        reason = "no array in it" if isinstance(error, StopIteration) else error
        raise ValueError(f"npz={path}: cannot be read ({reason}); make it again") from None
    images = _check_pixels(images, f"npz={path}: {name}")
    if labels is not None:
        labels = class_numbers(labels, len(images), f"npz={path}: {label_name}")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def npy_images(path):
    """Return (memory-mapped uint8 array (N, H, W, C), labels int64 (N,) or None) of X.npy.

    Labels are in X_labels.npy beside it.

    Raises:
        ValueError: not an npy, or not uint8 NHWC / NHW images with a whole number for each.
    """
    path, labels = Path(path), None
    images = _check_pixels(_read_npy(path, "r"), f"npy={path}: it")
    beside = path.with_name(f"{path.stem}_labels.npy")
    if beside.is_file():
        labels = class_numbers(_read_npy(beside), len(images), f"npy={beside}: it")
    return images, labels


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
            data = file.read()
        if data[:3] != b"\0\0\x08":
            raise OSError("it does not begin as an idx file of bytes")
        start = 4 + 4 * data[3]
        shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
        size = len(data) - start
        if size != math.prod(shape):
            raise OSError(f"{size} bytes for shape {shape}")
    except (EOFError, OSError, IndexError, zlib.error) as error:
        raise ValueError(f"data={path}: cannot be read ({error}); fetch it again") from None
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())
