"""Pictures of any size to restore: 8 and 16 bits and floats, read and written without loss.

    PNG         8 and 16 bits, grey or colour; alpha is dropped
    TIFF        the same, 32 bits and floats, signed ones too; stacks of planes, see stacks.py
    npy         (H, W), (H, W, C) or (N, H, W, C), C = 1 or 3, floats on the scale 0..255, uint8 or
                uint16 (0..65535); written as float32 on the same scale
    zarr        stacks of planes in a folder, see ngff.py; with the package zarr
    others      JPEG, WebP, GIF, BMP, PPM: written as PNG

Floats may leave 0..255: nothing is clipped on the way in.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from genmodels.atomic import make_folder, write_bytes
from genmodels.foreign import check_npy, open_plain
from genmodels.images import pixels
from genmodels.images.ngff import METADATA, NgffStack, is_zarr
from genmodels.images.read import SUFFIXES, Tree, read_values
from genmodels.images.scale import Quantiles, Scale, as_type, whole_range
from genmodels.images.stacks import Stack, has_planes

KEPT = (".png", ".tif", ".tiff", ".npy", ".zarr")  # written as they came; others, JPEG say, as PNG
SHEET = "before_after.png"
NOT_READ = (SHEET, "grid.png")
LINE = 12  # pixels that a line of text is high


@dataclass(frozen=True)
class Picture:
    """What a file holds: planes, each an image, of one channel.

    Attributes:
        name: of the file, within its folder or zip.
        values: (N, H, W, C), 0 black; floats may lie beyond black and white.
        shape: the array's in the file.
    """

    name: str
    values: np.ndarray
    shape: tuple[int, ...]

    channels = 1
    notes = ()
    is_stack = False  # its planes are pictures of their own

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dtype(self) -> np.dtype:
        """The type of its values."""
        return self.values.dtype

    @property
    def white(self) -> float:
        """The value of white by its type."""
        return whole_range(self.dtype).white

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.values.shape[1], self.values.shape[2]

    def channel(self, number: int) -> int:
        """Return which channel a plane is of."""
        return 0

    def label(self, number: int) -> str:
        """Return what tells a plane from the others: "[3]", or "" of a single one."""
        return f"[{number}]" if len(self) > 1 else ""

    def close(self) -> None:
        """Do nothing: all of it is in memory."""

    def plane(self, number: int) -> np.ndarray:
        """Return the values of a plane, (H, W, C)."""
        return self.values[number]

    def mapped(self, number: int) -> None:
        """Return None: it lies in no file."""

    def position(self, number: int) -> tuple[int, ...]:
        """Return (number,)."""
        return (number,)

    def write(self, path: Path, planes: Iterable[np.ndarray]) -> None:
        """Write other values in place of its own to a file of its kind, all or nothing.

        Folders are made when there is something to write.

        Args:
            path: of the file.
            planes: (H, W, C), in the order of its own; whole numbers are rounded and clipped.
        """
        values = np.stack(list(planes))
        make_folder(path.parent, exist_ok=True)
        suffix = PurePath(self.name).suffix.lower()
        if suffix == ".npy":
            buffer = io.BytesIO()
            np.save(buffer, values.reshape(self.shape).astype(np.float32))
            write_bytes(path, buffer.getvalue())
            return
        kind = "tiff" if suffix in (".tif", ".tiff") else "png"
        write_bytes(path, pixels.picture_bytes(as_type(values[0], self.dtype), kind))


Planes = Picture | Stack | NgffStack


def find_pictures(
    path: Path, key: str = "denoise", any_scale: bool = False, axes: str = ""
) -> dict[str, Callable[[], Planes]]:
    """Return {output name: callable that opens the file}, in the order of the input's names.

    Args:
        path: a picture, an .npy, a .zarr, or a folder or .zip of them (in a .zip no .zarr); other
            files are not looked at.
        key: what errors call it.
        any_scale: floats need not be on 0..255.
        axes: what the dimensions of stacks are, in place of what the files say.

    Raises:
        ValueError: no such thing, nothing in it, or two files with one output.
    """
    known = (*SUFFIXES, ".npy")
    contents: dict[str, Callable[[], BinaryIO]]
    folders: dict[str, Path] = {}
    if is_zarr(path):
        contents, folders = {}, {f"{path.name.removesuffix('.zarr')}.zarr": path}
    elif path.is_file() and path.suffix.lower() in known:
        contents = {path.name: partial(open_plain, path)}
    elif path.is_dir() or (path.is_file() and path.suffix.lower() == ".zip"):
        tree = Tree(path, key)
        names = [name for name in tree.entries if name.lower().endswith(known)]
        names = [name for name in names if PurePath(name).name not in NOT_READ]
        if path.is_dir():
            folders, names = _zarr_folders(tree, path, names, key)
        names.sort(key=lambda name: name.split("/"))
        contents = {name: partial(tree.open, name) for name in names}
    elif path.exists() and (path.suffix.lower() == ".zarr" or path.name in METADATA):
        raise _no_zarr(path, key)
    else:
        raise ValueError(f"{key}={path}: no such picture, .npy, folder or .zip")
    if not contents and not folders and path.suffix.lower() == ".zarr":
        raise _no_zarr(path, key)
    if not contents and not folders:
        raise ValueError(f"{key}={path}: holds no picture ({', '.join(known)})")
    readers = {}
    inputs = {}
    for name, opened in contents.items():
        out = PurePath(name)
        out = str(out if out.suffix.lower() in KEPT else out.with_suffix(".png"))
        if out in inputs:
            raise ValueError(
                f"{key}={path}: {inputs[out]} and {name} would both become {out}; rename one"
            )
        readers[out] = partial(open_picture, name, opened, key, any_scale, axes)
        inputs[out] = name
    for name in sorted(folders):
        readers[name] = partial(open_folder, name, folders[name], key, any_scale, axes)
    return readers


def _zarr_folders(
    tree: Tree, path: Path, names: list[str], key: str
) -> tuple[dict[str, Path], list[str]]:
    """Return ({name: Zarr folder within a folder}, the names of pictures that lie in none).

    Raises:
        ValueError: a folder that is called .zarr, is none and holds no picture.
    """
    parents = {str(each) for name in tree.entries for each in PurePath(name).parents}
    called = {name for name in parents if name.lower().endswith(".zarr")}
    folders = {name: path / name for name in called if is_zarr(path / name)}
    names = [n for n in names if not folders.keys() & set(map(str, PurePath(n).parents))]
    holding = {str(each) for name in (*names, *folders) for each in PurePath(name).parents}
    # Nor is one that lies within a Zarr folder looked at.
    inner = {n for n in called if folders.keys() & set(map(str, PurePath(n).parents))}
    if strange := sorted(called - folders.keys() - holding - inner):
        raise _no_zarr(path / strange[0], key)
    return folders, names


def _no_zarr(path: Path, key: str) -> ValueError:
    """Return what is said of a path that looks like a Zarr folder and is none."""
    if path.is_dir():
        said = f"is no Zarr folder, for it has none of {', '.join(METADATA)}; save it again"
    elif is_zarr(path.parent):
        said = f"is a part of a Zarr folder; name {path.parent}"
    else:
        said = "is a file, and Zarr is a folder; unpack it or save it again"
    return ValueError(f"{key}={path}: {said}")


def open_folder(
    name: str, path: Path, key: str = "denoise", any_scale: bool = False, axes: str = ""
) -> NgffStack:
    """Return the planes of a Zarr folder; see open_picture for the arguments."""
    found = NgffStack(name, path, axes, key)
    if not any_scale:
        most = max(float(found.plane(k).max()) for k in range(len(found)))
        check_scale(found.dtype, most, name, key)
    return found


def open_path(name: str, path: Path) -> Planes:
    """Return the planes of a file or Zarr folder, floats on any scale; see open_picture."""
    if is_zarr(path):
        return open_folder(name, path, any_scale=True)
    return open_picture(name, partial(open_plain, path), any_scale=True)


def open_picture(
    name: str,
    opened: Callable[[], BinaryIO],
    key: str = "denoise",
    any_scale: bool = False,
    axes: str = "",
) -> Planes:
    """Return the planes of a file, those of a TIFF as a Stack that is to be closed.

    Args:
        name: of the file; its ending says the format.
        opened: returns the file, opened for reading bytes.
        key: what errors call it.
        any_scale: floats need not be on 0..255.
        axes: what the dimensions of a stack are.

    Raises:
        ValueError: broken, of another form or scale, or with pixels that are no numbers.
    """
    file = opened()
    with contextlib.ExitStack() as stack:
        stack.callback(file.close)
        if not name.lower().endswith(".npy") and has_planes(file, name):
            found = Stack(name, file, axes, key)
            if not any_scale:
                most = max(float(found.plane(k).max()) for k in range(len(found)))
                check_scale(found.dtype, most, name, key)
            stack.pop_all()
            return found
        if axes:
            raise ValueError(
                f"axes={axes}: {name} is no TIFF with dimensions to name; leave it out"
            )
        return read_picture(name, file.read, key, any_scale)


def read_picture(
    name: str, data: Callable[[], bytes], key: str = "denoise", any_scale: bool = False
) -> Picture:
    """Return the Picture of this name.

    Args:
        name: of the file; its ending says the format.
        data: returns the file's bytes.
        key: what errors call it.
        any_scale: floats need not be on 0..255.

    Raises:
        ValueError: broken, of another form or scale, or with pixels that are no numbers.
    """
    if name.lower().endswith(".npy"):
        values = _array_values(name, data(), key)
        shape = values.shape
        values = values[..., None] if values.ndim == 2 else values
        values = values if values.ndim == 4 else values[None]
    else:
        values = read_values(data(), name)[None]
        shape = values.shape[1:]
    if not np.isfinite(values).all():
        raise ValueError(f"{key}={name}: holds NaN or infinite pixels; mend or remove it")
    if not any_scale:
        check_scale(values.dtype, values.max(initial=0), name, key)
    return Picture(name, values, shape)


def check_scale(
    dtype: np.dtype, most: float, name: Path | str, key: str = "denoise", least: float = 0.0
) -> None:
    """Raise ValueError for floats that are plainly not on the scale 0..255.

    Args:
        dtype: of the pixels.
        most, least: the brightest and the darkest; noise may go beyond the scale, by its width.
        name, key: what errors call the file.
    """
    beyond = 2 * 255 < most < math.inf or -math.inf < least < -255
    if dtype.kind == "f" and beyond:
        raise ValueError(
            f"{key}={name}: its pixels are {least:.5g} to {most:.5g}; floats are on the scale "
            "0..255, on which levels count: tell black= and white=, or leave the level to be found"
        )
    if dtype.kind == "f" and 0 < most <= 2:
        raise ValueError(
            f"{key}={name}: its brightest pixel is {most:.3g}; floats are on "
            "the scale 0..255: multiply those of 0..1 by 255"
        )


def _array_values(name: str, data: bytes, key: str) -> np.ndarray:
    """Return the array of an .npy, (H, W), (H, W, C) or (N, H, W, C)."""
    try:
        check_npy(io.BytesIO(data), len(data))
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises nearly anything
        raise ValueError(f"{key}={name}: cannot be read ({error}); make it again") from None
    fits = isinstance(array, np.ndarray) and (
        array.ndim == 2 or (array.ndim in (3, 4) and array.shape[-1] in (1, 3))
    )
    if not fits or not (
        array.dtype.kind == "f" or array.dtype.newbyteorder("=") in (np.uint8, np.uint16)
    ):
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "no array"
        raise ValueError(
            f"{key}={name}: is {what}; must be (H, W), (H, W, 1 or 3) or (N, H, W, 1 or 3) of "
            "floats on the scale 0..255, uint8 or uint16"
        )
    if not array.size:
        raise ValueError(f"{key}={name}: has shape {array.shape}: holds no picture")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def before_after(pairs: Iterable[tuple[Planes, Planes]], side: int = 256) -> torch.Tensor:
    """Return a sheet, uint8 (3, H, W): a row noisy | restored for each pair of files.

    Of large ones it is the central square of `side`; of several planes the first. Both halves are
    shown by one map, black and white the .1 and the 99.9 % quantile of the restored plane; the two
    are written below.

    Args:
        pairs: files before and after; they are closed.
        side: of the squares, in pixels.
    """
    rows, texts = [], []
    for before, after in pairs:
        with contextlib.closing(before), contextlib.closing(after):
            noisy, restored = before.plane(0), after.plane(0)
        quantiles = Quantiles(after.dtype)
        quantiles.add(restored)
        low, high = quantiles.between()
        shown = Scale(low, high) if low < high else whole_range(after.dtype)  # without contrast
        rows.append([_cell(shown.tensor(values), side) for values in (noisy, restored)])
        texts.append(f"black {shown.black:.5g}, white {shown.white:.5g}")
    height, width = (max(row[0].shape[axis] for row in rows) for axis in (1, 2))
    lines = [_line_of(text) for text in texts]
    wide = max(2 * width + 3, *(line.shape[1] + 2 for line in lines))
    step = height + LINE + 1
    sheet = torch.full((3, step * len(rows) + 1, wide), 128, dtype=torch.uint8)
    for k, (row, line) in enumerate(zip(rows, lines)):
        for j, cell in enumerate(row):
            top, left = k * step + 1, j * (width + 1) + 1
            sheet[:, top : top + cell.shape[1], left : left + cell.shape[2]] = cell
        below = k * step + 1 + height
        sheet[:, below : below + LINE, 1 : 1 + line.shape[1]] = line
    return sheet


def _cell(image: torch.Tensor, side: int) -> torch.Tensor:
    """Return an image's centre as uint8 (3, H, W), H and W at most `side`."""
    top, left = (max(0, (size - side) // 2) for size in image.shape[1:])
    part = image[:, top : top + side, left : left + side]
    return pixels.to_uint8(part).expand(3, -1, -1)


def _line_of(text: str) -> torch.Tensor:
    """Return a line of text, uint8 (LINE, W), white on the grey of a sheet."""
    font = ImageFont.load_default_imagefont()
    line = Image.new("L", (int(font.getlength(text)) + 1, LINE), 128)
    ImageDraw.Draw(line).text((0, 0), text, 255, font)
    return torch.from_numpy(np.array(line))
