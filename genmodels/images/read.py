"""Images from a path: a picture, a folder or zip of them, an npz or npy.

Pictures are PNG, JPEG, WebP, GIF, BMP, PPM and TIFF, whose pages are pictures each. Nothing in a
file is executed, and nothing is unpacked to disk. TIFF is in images/tiff.py, arrays in arrays.py.
"""

import contextlib
import functools
import io
import math
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from genmodels.foreign import open_plain, read_plain
from genmodels.images import deep_png, tiff
from genmodels.images.arrays import OnDisk, npy_images, npz_images
from genmodels.images.pixels import fit, with_channels
from genmodels.images.tiff import ORIENTATION, UPRIGHT

# What is a picture by its name, and which decoders of Pillow may look at one ("JPEG" is also MPO).
# Others are left out, among them those that start programs (PostScript).
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff"),
)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
SHEETS = ("grid.png", "before_after.png", "exemplars.png")  # what sample.py draws beside pictures
LARGEST_ENTRY = 1 << 30  # bytes of one unpacked entry of a zip
PAGE = re.compile(r"(.+\.tiff?)\[(\d+)\]", re.IGNORECASE)


def read_image(
    file: Path | str | BinaryIO,
    channels: int | None = None,
    name: Path | str | None = None,
    page: int = 0,
) -> torch.Tensor:
    """Return one picture as uint8 (C, H, W).

    Palettes become their colours. Alpha is dropped, not composited, as in the published protocols:
    a transparent pixel shows the colour stored under it. 16 bits, v in 0..65535, become
    round(v / 257). Of an animation it is the first frame. A camera's rotation flag (EXIF) is not
    applied, as in the published protocols; that of a TIFF is.

    Args:
        file: path or open binary file.
        channels: 1 or 3 converts; None keeps grey as 1 channel and makes anything else 3.
        name: what errors call the file.
        page: which page of a TIFF.

    Raises:
        ValueError: not a picture, truncated, of more than 16 bits, or of over 89 million pixels
            (Pillow's guard against decompression bombs).
    """
    with reading(file, name) as handle:
        if tiff.is_tiff(handle):
            array = tiff.read_page(handle, page)
        else:
            with Image.open(handle, formats=FORMATS) as picture:
                if channels == 1 and not _is_deep(picture):
                    array = np.array(picture.convert("L"))[..., None]
                else:
                    array = _pillow_values(picture, handle)
        array = array if array.dtype == np.uint8 else _to_8_bits(array)
        if channels == 1 and array.shape[-1] == 3:
            array = np.array(Image.fromarray(array).convert("L"))[..., None]
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    return tensor.expand(3, -1, -1).contiguous() if channels == 3 and len(tensor) == 1 else tensor


def read_values(data: bytes, name: Path | str) -> np.ndarray:
    """Return a picture's values (H, W, C), C = 1 or 3: uint8, uint16, or float32 of a TIFF.

    As read_image, but 16 bits stay 16 bits, and a picture that its EXIF data call turned or
    mirrored is put upright.

    Args:
        data: the bytes of the file.
        name: what errors call it.

    Raises:
        ValueError: as read_image; a TIFF of several pages.
    """
    with reading(io.BytesIO(data), name) as handle:
        if tiff.is_tiff(handle):
            pages = tiff.count_pages(handle)
            if pages > 1:
                raise tiff.Refused(
                    f"holds {pages} pages; save each as a file, or all as an .npy (N, H, W, C)"
                )
            array = tiff.read_page(handle)
            array = array.astype(np.float32) if array.dtype.kind == "f" else array
        else:
            with Image.open(handle, formats=FORMATS) as picture:
                if _is_deep_ppm(picture):
                    raise tiff.Refused("is a PPM of 16-bit colour; save it as PNG or TIFF")
                array = _pillow_values(picture, handle)
                array = UPRIGHT.get(picture.getexif().get(ORIENTATION), lambda a: a)(array)
        if array.dtype not in (np.uint8, np.uint16, np.float32):
            _to_8_bits(array)  # which refuses it
    return array


def _pillow_values(picture: Image.Image, file: BinaryIO) -> np.ndarray:
    """Return the values of an open picture, (H, W, C), C = 1 or 3: uint8 or uint16."""
    if not _is_deep(picture):
        array = np.array(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"))
    elif picture.mode.startswith("I"):
        array = np.array(picture).astype(np.uint16)  # older Pillows call 16 bits I too
    elif picture.mode == "F":
        array = _to_8_bits(np.array(picture))  # which refuses it
    else:
        from torchvision.io import ImageReadMode, decode_png

        place = file.tell()
        file.seek(0)
        # A wrong byte ends the process in libpng: it sees what has been looked through.
        whole = deep_png.checked(file.read(), Image.MAX_IMAGE_PIXELS or math.inf)
        tensor = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
        file.seek(place)  # where Pillow goes on
        array = decode_png(tensor, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    array = array.reshape(*array.shape[:2], -1)
    return array[..., : 3 if array.shape[-1] > 2 else 1]  # alpha is dropped


def _is_deep(picture: Image.Image) -> bool:
    """Return whether a picture has more than 8 bits; in colour Pillow keeps the high byte alone."""
    if picture.mode.startswith(("I", "F")):
        return True
    return picture.format == "PNG" and ";16" in str(picture.tile)  # only its plan of the file tells


def _is_deep_ppm(picture: Image.Image) -> bool:
    """Return whether a picture is a PPM of 16-bit colour, which Pillow scales to 8."""
    args = picture.tile[0].args if picture.format == "PPM" and picture.mode == "RGB" else ()
    return isinstance(args, tuple) and len(args) == 2 and args[1] > 255


def picture_shape(
    file: Path | str | BinaryIO, name: Path | str | None = None, page: int = 0
) -> tuple[int, int, int]:
    """Return (C, H, W) that read_image gives a picture, from its header; C = 1 or 3.

    Of a TIFF the page is read.
    """
    with reading(file, name) as handle:
        if tiff.is_tiff(handle):
            height, width, channels = tiff.read_page(handle, page).shape
            return channels, height, width
        with Image.open(handle, formats=FORMATS) as picture:
            grey = picture.mode in ("1", "L", "LA") or picture.mode.startswith(("I", "F"))
            return 1 if grey else 3, picture.height, picture.width


def picture_size(
    file: Path | str | BinaryIO, name: Path | str | None = None, page: int = 0
) -> tuple[int, int]:
    """Return (H, W) of a picture from its header; see read_image."""
    with reading(file, name) as handle:
        if tiff.is_tiff(handle):
            return tiff.page_size(handle, page)
        with Image.open(handle, formats=FORMATS) as picture:
            return picture.height, picture.width


@contextlib.contextmanager
def reading(file: Path | str | BinaryIO, name: Path | str | None) -> Iterator[BinaryIO]:
    """Give the open file; turn what goes wrong with it into one line that names it."""
    name = name or file
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            # Odd metadata; the pixels are what counts.
            warnings.filterwarnings("ignore", module="PIL")
            warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
            named = isinstance(file, (str, Path))
            yield stack.enter_context(open_plain(file)) if named else file
    except tiff.Refused as error:
        raise ValueError(f"image={name}: {error}") from None
    except ImportError:
        raise
    except Exception as error:  # at a broken file Pillow and the others raise nearly anything
        if isinstance(error, UnidentifiedImageError):
            error = ValueError("it is no picture, or of a format that is not read")
        reason = str(error) or type(error).__name__
        raise ValueError(f"image={name}: cannot be read ({reason}); remove it") from None


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Return values of 16 bits as 8; Pillow's own conversion clips grey ones at 255."""
    if values.dtype.itemsize <= 2 and values.dtype.kind == "i":
        raise tiff.Refused(f"holds {values.dtype}, signed levels; convert it to uint8 or uint16")
    if values.dtype != np.uint16:
        raise tiff.Refused(
            f"has more than 16 bits a pixel; convert it to 8 or 16 bits (it holds {values.dtype})"
        )
    return np.rint(values / 257).astype(np.uint8)


class Tree:
    """The pictures below a folder or in a zip, by their paths within it.

    Hidden entries and macOS's __MACOSX are left out; of a zip that holds one folder and nothing
    beside it, that folder is the root.

    Args:
        path: the folder or .zip.
        key: what errors call it.
        leave_out: names, without folder and ending, of pictures that are not among `names`.

    Attributes:
        entries: paths of all files with forward slashes.

    Raises:
        ValueError: neither folder nor zip, broken, or with an entry that is unsafe to unpack.
    """

    def __init__(self, path: Path | str, key: str = "images", leave_out: Sequence[str] = ()):
        self.path = Path(path)
        self.key = key
        self.leave_out = leave_out
        self.prefix = ""
        self.separator = "/"  # of the names in a zip
        if self.path.is_dir():
            entries = _files_below(self.path)
        elif self.path.suffix.lower() == ".zip" and self.path.is_file():
            entries = self._zip_entries()
        else:
            raise ValueError(f"{key}={path}: no such folder or .zip")
        self.entries = {name for name in entries if not _is_hidden(name)}

    @functools.cached_property
    def names(self) -> list[str]:
        """The names of the pictures, sorted part by part; of a TIFF with pages a.tif[0], a.tif[1].

        A warning counts the files that are none, and the pages.
        """
        files = [name for name in self.entries if name.lower().endswith(SUFFIXES)]
        names, stacks = [], 0
        unread = self.entries.difference(files)
        if self.leave_out:
            files = self.without_left_out(files)
        for name in sorted(files, key=lambda name: name.split("/")):
            pages = self._count_pages(name) if name.lower().endswith((".tif", ".tiff")) else 1
            names += [name] if pages == 1 else [f"{name}[{page}]" for page in range(pages)]
            stacks += pages > 1
        unread -= {name for name in unread if PurePath(name).name == "dataset.json"}
        pages = len(names) - len(files) + stacks
        moving = sum(name.lower().endswith(".gif") for name in files)
        for count, note in (
            (len(unread), f"{_files(len(unread))} not read, being no pictures ({_kinds(unread)})"),
            (stacks, f"{_files(stacks)} TIFF of several pages; each of the {pages} is a picture"),
            (moving, f"{_files(moving)} .gif; of an animation the first frame is read"),
        ):
            if count and names:
                warnings.warn(f"{self.key}={self.path}: {note}", stacklevel=1)
        return names

    def without_left_out(self, files: Iterable[str]) -> list[str]:
        """Return the names that leave_out does not name.

        Raises:
            ValueError: it names one that is not among them.
        """
        stems = {PurePath(name).stem for name in files}
        unknown = [stem for stem in self.leave_out if stem not in stems]
        if unknown:
            key = self.key.removesuffix("root") + "leave_out"
            raise ValueError(f"{key}={unknown[0]}: no picture of {self.path} is called so")
        return [name for name in files if PurePath(name).stem not in self.leave_out]

    def _count_pages(self, name: str) -> int:
        if not self.path.is_dir():
            with reading(*self._file(name)) as file:
                return tiff.count_pages(file) if tiff.is_tiff(file) else 1
        path = self.path / name
        status = path.stat() if path.is_file() else None
        return _count_pages(path, *((status.st_mtime_ns, status.st_size) if status else ()))

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
        """Return what the entry holds; of a page of a TIFF, the whole file."""
        name = split_page(name)[0]
        if not self.path.is_dir():
            with self._in_one_line():
                inside = (self.prefix + name).replace("/", self.separator)
                info = self._archive().getinfo(inside)
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise OSError("it is packed with another method than deflate")
                # Not read(): it unpacks first and then looks whether the size was as promised.
                with self._archive().open(info) as file:
                    return file.read(info.file_size)
        return read_plain(self.path / name)

    def open(self, name: str) -> BinaryIO:
        """Return the entry opened for reading bytes; one of a zip is held in memory."""
        return (
            open_plain(self.path / name)
            if self.path.is_dir()
            else io.BytesIO(self.read_bytes(name))
        )

    def read(self, name: str, channels: int | None = None) -> torch.Tensor:
        """Return one picture as uint8 (C, H, W); see read_image."""
        entry, page = split_page(name)
        file, shown = self._file(entry)
        return read_image(file, channels, shown, page)

    def size(self, name: str) -> tuple[int, int]:
        """Return (H, W) of one picture from its header."""
        entry, page = split_page(name)
        return picture_size(*self._file(entry), page)

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return (C, H, W) of one picture from its header; see picture_shape."""
        entry, page = split_page(name)
        return picture_shape(*self._file(entry), page)

    def _file(self, entry: str) -> tuple[Path | io.BytesIO, str | None]:
        """Return (what is opened, what errors call it)."""
        if self.path.is_dir():
            return self.path / entry, None
        return io.BytesIO(self.read_bytes(entry)), f"{self.path}/{entry}"


def split_page(name: str) -> tuple[str, int]:
    """Return (file, page) of a picture's name: ("a.tif", 3) of "a.tif[3]", else page 0."""
    page = PAGE.fullmatch(name)
    return (page[1], int(page[2])) if page else (name, 0)


def _files(count: int) -> str:
    return "1 file is" if count == 1 else f"{count} files are"


def _kinds(names: Iterable[str]) -> str:
    """Return how many files have which ending: "2 .txt, 1 without ending"."""
    counts = Counter(PurePath(name).suffix.lower() or "without ending" for name in names)
    return ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))


@functools.lru_cache(maxsize=1 << 20)
def _count_pages(path: Path, *version: int) -> int:  # noqa: ARG001
    """Return how many pictures a TIFF holds; kept, for both splits of a set ask."""
    with reading(path, None) as file:
        return tiff.count_pages(file) if tiff.is_tiff(file) else 1


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
    path: Path | str,
    channels: int | None = None,
    *,
    side: int = 0,
    crop: str = "center",
    key: str = "images",
) -> tuple[torch.Tensor | OnDisk, list[str]]:
    """Return (images uint8 (N, C, H, W) of one size, a name for each) of a path.

    Pictures in a folder or .zip and the array of an .npy come as OnDisk: each is read when asked
    for. Hidden files and the sheets that sample.py draws are skipped. Where grey pictures lie among
    colour ones they become colour. An npz holds `images` (or its first array) as uint8 NHWC or NHW,
    an npy such an array.

    Args:
        path: a picture, a folder or .zip of them, an .npz or .npy.
        channels: 1 or 3 converts.
        side, crop: to what size, see fit; side 0 leaves them as they are.
        key: what errors call it.

    Raises:
        ValueError: nothing there, a broken file, or mixed sizes.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    alike = functools.partial(_alike, channels=channels, side=side, crop=crop)
    if suffix in (".npz", ".npy") and path.is_file():
        pixels = (npz_images if suffix == ".npz" else npy_images)(path)[0]
        return alike(pixels), [str(number) for number in range(len(pixels))]
    if suffix in SUFFIXES and path.is_file():
        pages = _count_pages(path, path.stat().st_mtime_ns, path.stat().st_size)
        if pages == 1:
            return alike(read_image(path, channels)[None]), [path.name]
        names = [f"{path.name}[{k}]" for k in range(pages)]
        return alike(_read_pages(path, channels, pages, key)), names
    if not path.is_dir() and not (suffix == ".zip" and path.is_file()):
        raise ValueError(f"{key}={path}: no such folder, .zip or .npz (or .npy)")
    tree = Tree(path, key)
    names = [name for name in tree.names if PurePath(name).name not in SHEETS]
    if not names:
        raise ValueError(f"{key}={path}: holds no picture ({', '.join(SUFFIXES)})")
    if len(names) < len(tree.names):
        sheets = sorted({PurePath(name).name for name in set(tree.names).difference(names)})
        warnings.warn(
            f"{key}={path}: {_files(len(tree.names) - len(names))} left out, being a sheet "
            f"of sample.py ({', '.join(sheets)})",
            stacklevel=2,
        )
    shape = _common_shape(tree, names, channels, side)
    read = functools.partial(_read_alike, tree, names, shape, side, crop)
    return OnDisk(read, shape, torch.arange(len(names))), names


def _common_shape(
    tree: Tree, names: list[str], channels: int | None, side: int
) -> tuple[int, int, int]:
    """Return the (C, H, W) that the pictures get; a warning counts grey ones that become colour.

    Raises:
        ValueError: mixed sizes, and no side to bring them to.
    """
    if channels and side:
        return channels, side, side
    shapes = [tree.shape(name) for name in names]
    sizes = Counter(shape[1:] for shape in shapes)
    size, most = sizes.most_common(1)[0]
    if len(sizes) > 1 and not side:
        other = next(k for k, shape in enumerate(shapes) if shape[1:] != size)
        usual = next(k for k, shape in enumerate(shapes) if shape[1:] == size)
        raise ValueError(
            f"{tree.key}={tree.path}: mixed sizes, {names[other]} is {shapes[other]} but "
            f"{names[usual]} is {shapes[usual]} ({len(names) - most} of {len(names)} differ from "
            "the commonest); bring them to one, in evaluate.py with resolution=SIDE (and crop=)"
        )
    grey = sum(shape[0] == 1 for shape in shapes)
    if channels is None and 0 < grey < len(names):
        first = names[next(k for k, shape in enumerate(shapes) if shape[0] == 1)]
        warnings.warn(
            f"{tree.key}={tree.path}: {grey} of {len(names)} pictures are grey ({first}, ...) and "
            "become colour as the others",
            stacklevel=3,
        )
    channels = channels or (1 if grey == len(names) else 3)
    return (channels, side, side) if side else (channels, *size)


def _alike(
    pixels: torch.Tensor | OnDisk, channels: int | None, side: int, crop: str
) -> torch.Tensor | OnDisk:
    """Return images (N, C, H, W) of an array with other channels and of another size, if asked."""
    _, own, *size = pixels.shape
    shape = (channels or own, *([side, side] if side else size))
    if shape == tuple(pixels.shape[1:]):
        return pixels
    if isinstance(pixels, OnDisk):
        read = functools.partial(_fit_all, pixels, shape, side, crop)
        return OnDisk(read, shape, torch.arange(len(pixels)))
    return _fit_all(pixels, shape, side, crop, list(range(len(pixels))))


def _fit_all(
    pixels: torch.Tensor | OnDisk,
    shape: tuple[int, ...],
    side: int,
    crop: str,
    numbers: list[int],
) -> torch.Tensor:
    """Return the images of these numbers, of this shape (C, H, W)."""
    found = torch.empty(len(numbers), *shape, dtype=torch.uint8)
    for row, number in enumerate(numbers):
        found[row] = fit(with_channels(pixels[number : number + 1][0], shape[0]), side, crop)
    return found


def _read_pages(path: Path, channels: int | None, pages: int, key: str) -> torch.Tensor:
    """Return the pages of a TIFF, which must have one size, uint8 (N, C, H, W)."""
    pictures = [read_image(path, channels, f"{path}[{k}]", k) for k in range(pages)]
    for number, picture in enumerate(pictures):
        if picture.shape != pictures[0].shape:
            raise ValueError(
                f"{key}={path}: mixed sizes, page {number} is {tuple(picture.shape)} but page 0 "
                f"is {tuple(pictures[0].shape)}; save them as files of one size"
            )
    return torch.stack(pictures)


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
    side: int,
    crop: str,
    numbers: list[int],
) -> torch.Tensor:
    """Return the pictures of these numbers, which get that shape, uint8 (B, C, H, W)."""
    pixels = torch.empty(len(numbers), *shape, dtype=torch.uint8)
    for row, number in enumerate(numbers):
        picture = fit(tree.read(names[number], shape[0]), side, crop)
        if picture.shape != shape:
            raise ValueError(
                f"{tree.key}={tree.path}: mixed sizes, {names[number]} is {tuple(picture.shape)}, "
                f"not {shape} as others; resize it"
            )
        pixels[row] = picture
    return pixels
