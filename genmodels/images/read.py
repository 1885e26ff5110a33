"""Images from a path: a picture, a folder or zip of them, an npz or npy.

Pictures are PNG, JPEG, WebP, TIFF and BMP. Nothing in a file is executed, and nothing is unpacked
to disk. The formats of arrays are in images/arrays.py.
"""

import contextlib
import functools
import io
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from types import ModuleType
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from genmodels.images.arrays import OnDisk, npy_images, npz_images

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LARGEST_ENTRY = 1 << 30  # bytes of one unpacked entry of a zip
ORIENTATION = 0x0112  # of EXIF: how the stored rows and columns lie in the upright picture
UPRIGHT = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


def read_image(
    file: Path | str | BinaryIO, channels: int | None = None, name: Path | str | None = None
) -> torch.Tensor:
    """Return one picture as uint8 (C, H, W).

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
                # Older Pillows call a PNG of 16 bits I too.
                wide = picture.mode == "I" and picture.format != "PNG"
                array = array.astype(np.float32) if wide else array
            else:
                grey = channels == 1 or (channels is None and picture.mode in ("1", "L", "LA"))
                array = np.array(picture.convert("L" if grey else "RGB"))
    except Exception as error:  # at a broken file Pillow raises nearly anything
        raise ValueError(_unreadable(name, error)) from None
    if array.dtype != np.uint8:
        array = _to_8_bits(array, name)
        array = np.stack([array] * 3, -1) if channels == 3 else array
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def read_values(data: bytes, name: Path | str) -> np.ndarray:
    """Return a picture's values (H, W, C), C = 1 or 3: uint8, uint16, or float32 of a TIFF.

    As read_image, but 16 bits stay 16 bits, in colour too, and a picture that its EXIF data call
    turned or mirrored is put upright.

    Args:
        data: the bytes of the file.
        name: what errors call it.

    Raises:
        ValueError: as read_image; a TIFF of several pages; one of 16 bits in colour where tifffile
            is not installed.
    """
    try:
        with _no_bombs(), Image.open(io.BytesIO(data)) as picture:
            mode, kind = picture.mode, picture.format
            pages = getattr(picture, "n_frames", 1) if kind == "TIFF" else 1
            # Pillow keeps the high byte of 16-bit colour; only its plan of the file tells.
            deep = mode in ("LA", "RGB", "RGBA") and ";16" in str(picture.tile)
            if deep:
                array = _deep_colour(data, kind, name)
            elif mode.startswith(("I", "F")):
                array = np.array(picture)
                # Older Pillows call a PNG of 16 bits I too.
                array = array.astype(np.uint16) if mode == "I" and kind == "PNG" else array
            else:
                array = np.array(picture.convert("L" if mode in ("1", "L", "LA") else "RGB"))
            array = UPRIGHT.get(picture.getexif().get(ORIENTATION), lambda a: a)(array)
    except ImportError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # at a broken file Pillow and the others raise nearly anything
        raise ValueError(_unreadable(name, error)) from None
    if pages > 1:
        raise ValueError(
            f"{name}: holds {pages} pages; save each as a file, or all as an .npy (N, H, W, C)"
        )
    if array.dtype not in (np.uint8, np.uint16, np.float32):
        array = array.astype(np.float64)  # which _to_8_bits refuses
        _to_8_bits(array, name)
    array = array.reshape(*array.shape[:2], -1)
    return array[..., : 3 if array.shape[-1] > 2 else 1]  # alpha is dropped


def _deep_colour(data: bytes, kind: str, name: Path | str) -> np.ndarray:
    """Return a picture of 16 bits with more than one channel, (H, W, 2 to 4) uint16."""
    if kind == "PNG":
        from torchvision.io import ImageReadMode, decode_png

        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_png(tensor, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    return import_tifffile(name).imread(io.BytesIO(data))


def import_tifffile(name: Path | str) -> ModuleType:
    """Return the package tifffile; ImportError, with a line for the user, where it is missing."""
    try:
        import tifffile
    except ImportError:
        raise ImportError(
            f"image={name}: is a TIFF of 16-bit colour; pip install tifffile, or save it as PNG"
        ) from None
    return tifffile


def picture_size(file: Path | str | BinaryIO, name: Path | str | None = None) -> tuple[int, int]:
    """Return (H, W) of a picture from its header; see read_image."""
    try:
        with _no_bombs(), Image.open(file) as picture:
            return picture.height, picture.width
    except Exception as error:  # as in read_image
        raise ValueError(_unreadable(name or file, error)) from None


def _unreadable(name: object, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        error = "it is no picture, or one that Pillow does not know"
    return f"image={name}: cannot be read ({error}); remove it"


@contextlib.contextmanager
def _no_bombs() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # odd metadata; the pixels are what counts
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        yield


def _to_8_bits(values: np.ndarray, name: object) -> np.ndarray:
    """Return grey values of 16 bits as 8; Pillow's own conversion clips them at 255."""
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"image={name}: has more than 16 bits a pixel; convert it to 8 or 16 bits")
    return np.rint(values / 257).astype(np.uint8)


class Tree:
    """The pictures below a folder or in a zip, by their paths within it.

    Hidden entries and macOS's __MACOSX are left out; of a zip that holds one folder and nothing
    beside it, that folder is the root.

    Args:
        path: the folder or .zip.
        key: what errors call it.

    Attributes:
        entries: paths of all files with forward slashes.
        names: those of the pictures, sorted part by part.

    Raises:
        ValueError: neither folder nor zip, broken, or with an entry that is unsafe to unpack.
    """

    def __init__(self, path: Path | str, key: str = "images"):
        self.path = Path(path)
        self.key = key
        self.prefix = ""
        self.separator = "/"  # of the names in a zip
        if self.path.is_dir():
            entries = _files_below(self.path)
        elif self.path.suffix.lower() == ".zip" and self.path.is_file():
            entries = self._zip_entries()
        else:
            raise ValueError(f"{key}={path}: no such folder or .zip")
        self.entries = {name for name in entries if not _is_hidden(name)}
        pictures = [name for name in self.entries if name.lower().endswith(SUFFIXES)]
        self.names = sorted(pictures, key=lambda name: name.split("/"))

    def _zip_entries(self) -> list[str]:
        with self._in_one_line():
            infos = [info for info in self._archive().infolist() if not info.is_dir()]
        for info in infos:
            name = info.filename
            outside = re.match(r"[/\\]|[A-Za-z]:[/\\]", name) or ".." in re.split(r"[/\\]", name)
            if outside:
                raise ValueError(
                    f"{self.key}={self.path}: entry {name} points outside the zip; make it anew"
                )
            if info.file_size > LARGEST_ENTRY:
                raise ValueError(
                    f"{self.key}={self.path}: entry {name} unpacks to {info.file_size >> 20} MB, "
                    f"more than {LARGEST_ENTRY >> 20}; take it out"
                )
        names = [info.filename for info in infos]
        if any("\\" in name for name in names) and not any("/" in name for name in names):
            self.separator = "\\"  # as some programs on Windows write, against the format
            names = [name.replace("\\", "/") for name in names]
        names = [name for name in names if not _is_hidden(name)]
        tops = {name.split("/")[0] if "/" in name else "" for name in names}
        if len(tops) == 1 and tops != {""} and tops != {"train"}:
            self.prefix = f"{tops.pop()}/"
        return [name.removeprefix(self.prefix) for name in names]

    def _archive(self) -> zipfile.ZipFile:
        status = self.path.stat()
        return _archive(self.path, os.getpid(), status.st_mtime_ns, status.st_size)

    @contextlib.contextmanager
    def _in_one_line(self) -> Iterator[None]:
        """Turn the many kinds of error of a broken zip into one line."""
        try:
            yield
        except Exception as error:  # broken, encrypted, oddly packed: each raises its own kind
            raise ValueError(
                f"{self.key}={self.path}: cannot be read ({error}); fetch or make it again"
            ) from None

    def read_bytes(self, name: str) -> bytes:
        """Return what the entry holds."""
        if not self.path.is_dir():
            with self._in_one_line():
                inside = (self.prefix + name).replace("/", self.separator)
                info = self._archive().getinfo(inside)
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise OSError("it is packed with another method than deflate")
                # Not read(): it unpacks first and then looks whether the size was as promised.
                with self._archive().open(info) as file:
                    return file.read(info.file_size)
        return (self.path / name).read_bytes()

    def read(self, name: str, channels: int | None = None) -> torch.Tensor:
        """Return one picture as uint8 (C, H, W); see read_image."""
        file, shown = self._file(name)
        return read_image(file, channels, shown)

    def size(self, name: str) -> tuple[int, int]:
        """Return (H, W) of one picture from its header."""
        return picture_size(*self._file(name))

    def _file(self, name: str) -> tuple[Path | io.BytesIO, str | None]:
        """Return (what Pillow opens, what errors call it)."""
        if self.path.is_dir():
            return self.path / name, None
        return io.BytesIO(self.read_bytes(name)), f"{self.path}/{name}"


@functools.lru_cache(maxsize=8)
def _archive(path: Path, process: int, *version: int) -> zipfile.ZipFile:  # noqa: ARG001
    """Return the open zip; each process has its own, for a file position cannot be shared."""
    return zipfile.ZipFile(path)


def _files_below(folder: Path) -> list[str]:
    """Return the paths, within the folder, of all files below it; linked folders count.

    Each real folder is read once: under its own name if it lies below this one, else under the
    first link to it. Hidden folders are not entered.
    """
    entries = []
    root = folder.resolve()
    inside = {Path(parent).resolve() for parent, _ in _walk(folder, links=False)}
    read = set(inside)
    left_out = []

    def enter(path: Path) -> bool:
        real = path.resolve()
        if real in inside and not path.is_symlink():
            return True
        # A link to a folder around this one would read this one again.
        if real in read or root.is_relative_to(real):
            left_out.append(path)
            return False
        read.add(real)
        return True

    for parent, names in _walk(folder, links=True, enter=enter):
        within = Path(parent).relative_to(folder)
        for name in names:
            path = Path(parent, name)
            if path.is_file() or path.is_symlink():  # a broken link is an error, not a gap
                entries.append((within / name).as_posix())
    if left_out:
        warnings.warn(
            f"{folder}: {left_out[0].relative_to(folder)} (and {len(left_out) - 1} more) links to "
            "a folder that is read already; left out",
            stacklevel=2,
        )
    return entries


def _walk(
    folder: Path, links: bool, enter: Callable[[Path], bool] = lambda path: True
) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder, names of files in it) of all that is not hidden, in order of name."""

    def stop(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=links):
        shown = sorted(name for name in folders if not _is_hidden(name))
        folders[:] = [name for name in shown if enter(Path(parent, name))]
        yield parent, names


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def open_images(
    path: Path | str, channels: int | None = None
) -> tuple[torch.Tensor | OnDisk, list[str]]:
    """Return (images uint8 (N, C, H, W) of one size, a name for each) of a path.

    Pictures in a folder or .zip and the array of an .npy come as OnDisk: each is read when asked
    for. Hidden files and the `grid.png` of sample.py are skipped. An npz holds `images` (or its
    first array) as uint8 NHWC or NHW, an npy such an array.

    Args:
        path: a picture, a folder or .zip of them, an .npz or .npy.
        channels: 1 or 3 converts pictures; arrays are taken as they are.

    Raises:
        ValueError: nothing there, or a broken file; mixed sizes when they are read.
    """
    path = Path(path)
    if path.suffix in (".npz", ".npy") and path.is_file():
        pixels = (npz_images if path.suffix == ".npz" else npy_images)(path)[0]
        return pixels, [str(number) for number in range(len(pixels))]
    if path.suffix.lower() in SUFFIXES and path.is_file():
        return read_image(path, channels)[None], [path.name]
    if not path.is_dir() and not (path.suffix.lower() == ".zip" and path.is_file()):
        raise ValueError(f"images={path}: no such folder, .zip or .npz (or .npy)")
    tree = Tree(path)
    names = [name for name in tree.names if PurePath(name).name != "grid.png"]
    if not names:
        raise ValueError(f"images={path}: holds no picture ({', '.join(SUFFIXES)})")
    shape = tuple(tree.read(names[0], channels).shape)
    read = functools.partial(_read_alike, tree, names, shape, channels)
    return OnDisk(read, shape, torch.arange(len(names))), names


def read_images(path: Path | str, channels: int | None = None) -> torch.Tensor:
    """Return all images of a path as one tensor, uint8 (N, C, H, W); see open_images.

    Raises:
        ValueError: nothing there, mixed sizes, or a broken picture.
    """
    pixels, _ = open_images(path, channels)
    return pixels.load() if isinstance(pixels, OnDisk) else pixels


def _read_alike(
    tree: Tree,
    names: list[str],
    shape: tuple[int, int, int],
    channels: int | None,
    numbers: list[int],
) -> torch.Tensor:
    """Return the pictures of these numbers, which must have that shape, uint8 (B, C, H, W)."""
    pixels = torch.empty(len(numbers), *shape, dtype=torch.uint8)
    for row, number in enumerate(numbers):
        picture = tree.read(names[number], channels)
        if picture.shape != shape:
            raise ValueError(
                f"images={tree.path}: mixed sizes, {names[number]} is {tuple(picture.shape)} but "
                f"{names[0]} is {shape}; resize them or, if grey and colour are mixed, convert them"
            )
        pixels[row] = picture
    return pixels
