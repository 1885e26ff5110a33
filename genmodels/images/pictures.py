"""Pictures of any size to restore: 8 and 16 bits and floats, read and written without loss.

    PNG, TIFF   8 and 16 bits, grey or colour; alpha is dropped; TIFF also floats, grey, on the
                scale 0..255
    npy         (H, W), (H, W, C) or (N, H, W, C), C = 1 or 3, floats on the scale 0..255, uint8 or
                uint16 (0..65535); written as float32 on the same scale
    others      JPEG, WebP, BMP: written as PNG

Floats may leave 0..255: nothing is clipped on the way in.
"""

import io
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath

import numpy as np
import torch

from genmodels.images import pixels
from genmodels.images.read import SUFFIXES, Tree, read_levels

KEPT = (".png", ".tif", ".tiff", ".npy")  # written as they came; others, JPEG say, as PNG
SHEET = "before_after.png"
NOT_READ = (SHEET, "grid.png")


@dataclass(frozen=True)
class Picture:
    """What a file holds: `levels` (N, H, W, C), 0..top; `shape` is the array's in the file."""

    name: str
    levels: np.ndarray
    shape: tuple

    @property
    def top(self):
        """The level of white."""
        return 65535 if self.levels.dtype == np.uint16 else 255

    def images(self):
        """Return it on the [-1, 1] scale, float32 (N, C, H, W), not clipped."""
        scaled = torch.from_numpy(self.levels.astype(np.float64) / (self.top / 2) - 1)
        return scaled.permute(0, 3, 1, 2).float()

    def as_file(self, restored):
        """Return images in [-1, 1], (N, C, H, W), as the bytes of a file of this kind."""
        levels = (restored.double().permute(0, 2, 3, 1).numpy() + 1) * (self.top / 2)
        suffix = PurePath(self.name).suffix.lower()
        if suffix == ".npy":
            buffer = io.BytesIO()
            np.save(buffer, levels.reshape(self.shape).astype(np.float32))
            return buffer.getvalue()
        whole = self.levels.dtype.kind == "u"
        levels = np.floor(levels + 0.5) if whole else levels
        kind = "tiff" if suffix in (".tif", ".tiff") else "png"
        return pixels.level_bytes(levels[0].astype(self.levels.dtype), kind)


def find(path, key="denoise"):
    """Return {output name: callable that reads the Picture}, in the order of the input's names.

    Args:
        path: a picture, an .npy, or a folder or .zip of them; other files are not looked at.
        key: what errors call it.

    Raises:
        ValueError: no such thing, nothing in it, or two files with one output.
    """
    known = (*SUFFIXES, ".npy")
    if path.is_file() and path.suffix.lower() in known:
        found = {path.name: path.read_bytes}
    elif path.is_dir() or (path.is_file() and path.suffix.lower() == ".zip"):
        tree = Tree(path, key)
        names = [name for name in tree.entries if name.lower().endswith(known)]
        names = [name for name in names if PurePath(name).name not in NOT_READ]
        names.sort(key=lambda name: name.split("/"))
        found = {name: partial(tree.bytes, name) for name in names}
    else:
        raise ValueError(f"{key}={path}: no such picture, .npy, folder or .zip")
    if not found:
        raise ValueError(f"{key}={path}: holds no picture ({', '.join(known)})")
    readers, given = {}, {}
    for name, data in found.items():
        out = PurePath(name)
        out = str(out if out.suffix.lower() in KEPT else out.with_suffix(".png"))
        if out in given:
            raise ValueError(
                f"{key}={path}: {given[out]} and {name} would both become {out}; rename one"
            )
        readers[out], given[out] = partial(read, name, data, key=key), name
    return readers


def read(name, data, key="denoise", own=False):
    """Return the Picture of this name whose bytes the callable `data` returns.

    Of `own` floats, just written, the scale is known.

    Raises:
        ValueError: broken, of another form or scale, or with pixels that are no numbers.
    """
    data = data()
    if name.lower().endswith(".npy"):
        return _read_array(name, data, key, own)
    levels = read_levels(data, name)
    if not np.isfinite(levels).all():
        raise ValueError(f"{key}={name}: holds NaN or infinite pixels; mend or remove it")
    if not own:
        check_scale(levels, name, key)
    return Picture(name, levels[None], levels.shape)


def check_scale(levels, name, key="denoise"):
    """Raise ValueError for floats on the scale 0..1: they would be nearly black."""
    if levels.dtype.kind == "f" and levels.size and 0 < levels.max() <= 2:
        raise ValueError(
            f"{key}={name}: its brightest pixel is {levels.max():.3g}; floats are on "
            "the scale 0..255: multiply those of 0..1 by 255"
        )


def _read_array(name, data, key, own):
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises nearly anything
        raise ValueError(f"{key}={name}: cannot be read ({error}); make it again") from None
    fits = isinstance(array, np.ndarray) and (
        array.ndim == 2 or (array.ndim in (3, 4) and array.shape[-1] in (1, 3))
    )
    if not fits or not (array.dtype.kind == "f" or array.dtype in (np.uint8, np.uint16)):
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "no array"
        raise ValueError(
            f"{key}={name}: is {what}; must be (H, W), (H, W, 1 or 3) or (N, H, W, 1 or 3) of "
            "floats on the scale 0..255, uint8 or uint16"
        )
    if not array.size:
        raise ValueError(f"{key}={name}: has shape {array.shape}: holds no picture")
    if not np.isfinite(array).all():
        raise ValueError(f"{key}={name}: holds NaN or infinite pixels; mend or remove it")
    if not own:
        check_scale(array, name, key)
    levels = array if array.ndim == 4 else array[None]
    return Picture(name, levels[..., None] if array.ndim == 2 else levels, array.shape)


def before_after(pairs, side=256):
    """Return a sheet, uint8 (3, H, W): a row noisy | restored for each pair of Pictures.

    Of large ones it is the central square of `side`; of an array the first picture.
    """
    cells = [_cell(picture, side) for pair in pairs for picture in pair]
    height, width = (max(cell.shape[axis] for cell in cells) for axis in (1, 2))
    sheet = torch.full((len(cells), 3, height, width), 128, dtype=torch.uint8)
    for row, cell in zip(sheet, cells):
        row[:, : cell.shape[1], : cell.shape[2]] = cell
    return pixels.grid(sheet, columns=2)


def _cell(picture, side):
    image = picture.images()[0]
    top, left = (max(0, (size - side) // 2) for size in image.shape[1:])
    part = image[:, top : top + side, left : left + side]
    return pixels.to_uint8(part).expand(3, -1, -1)
