"""TIFF files: each page is a picture, of any depth and either order of bytes.

tifffile reads the pages. Pillow reads those that tifffile cannot unpack without the package
imagecodecs (LZW, JPEG, fax) and those that are neither grey nor RGB (palettes, CMYK, YCbCr, Lab).
"""

import logging
import zlib
from dataclasses import dataclass
from lzma import LZMADecompressor
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF
GREY_INVERTED, GREY, RGB = 0, 1, 2  # PhotometricInterpretation
UNNAMED, PREMULTIPLIED = 0, 1  # ExtraSamples: anything, alpha that the colours are multiplied by
NOT_A_PICTURE = 1 | 4  # NewSubfileType: a smaller copy of another page, or a mask
LARGEST_PAGE = 1 << 30  # bytes
MOST_PARTS = 1 << 20  # strips or tiles of a page
MOST_UNPACKED = 1 << 26  # bytes
DEFLATE, LZMA = (8, 32946), 34925  # Compression

ORIENTATION = 0x0112  # of EXIF and TIFF: how the stored rows and columns lie in the upright picture
UPRIGHT = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


class Refused(ValueError):
    """A picture that is whole but not taken; its text says what to do."""


@dataclass(frozen=True)
class Page:
    """A page that is a picture.

    Attributes:
        index: among all pages of the file.
        page: tifffile's.
        size: (H, W), upright.
    """

    index: int
    page: Any
    size: tuple[int, int]


def is_tiff(file: BinaryIO) -> bool:
    """Return whether a file, open at its beginning, is a TIFF; it is left there."""
    start = file.read(4)
    file.seek(0)
    return start in MAGIC


def count_pages(file: BinaryIO) -> int:
    """Return how many pictures a TIFF holds.

    Raises:
        Exception: any kind, where the file is broken.
    """
    with opened(file) as tiff:
        return 1 if len(tiff.pages) == 1 else len(single_pages(tiff))


def page_size(file: BinaryIO, number: int = 0) -> tuple[int, int]:
    """Return (H, W) of a page, upright; see read_page."""
    with opened(file) as tiff:
        return single_pages(tiff)[number].size


def read_page(file: BinaryIO, number: int = 0) -> np.ndarray:
    """Return a page upright, (H, W, C), C = 1 or 3; alpha is dropped.

    uint8, or of more bits what is stored, in this machine's order of bytes.

    Args:
        file: open TIFF.
        number: which of the pages that are pictures.

    Raises:
        Refused: a form that is not read.
        Exception: any kind, where the file is broken.
    """
    with opened(file) as tiff:
        found = single_pages(tiff)[number]
        return page_values(tiff, file, found.page, found.index)


def page_values(tiff: Any, file: BinaryIO, page: Any, index: int) -> np.ndarray:
    """Return a page upright, see read_page.

    Args:
        tiff, page: tifffile's.
        file: what tiff reads.
        index: of the page in the file.
    """
    first = page.keyframe  # later pages of a series are known by what the first one says
    if not readable(first):
        return _by_pillow(file, index)
    check_whole(tiff, page)
    try:
        array = page.asarray()
    except (ValueError, ImportError) as error:  # the latter of what a newer Python unpacks
        if isinstance(error, ValueError) and "imagecodecs" not in str(error):
            raise
        grey = first.samplesperpixel == 1
        most = 4 if grey else 1
        if tiff.byteorder == ">" and first.dtype.kind != "u":
            most = 1  # Pillow swaps the bytes of packed ones of Motorola's order twice
        elif tiff.byteorder == ">":
            most = min(most, 2)
        if first.dtype.itemsize > most or first.dtype == np.float16:
            raise Refused(
                f"{first.bitspersample}-bit {'' if grey else 'colour '}packed as "
                f"{first.compression.name} needs another package; pip install "
                "'genmodels[stacks]', or save it unpacked"
            ) from None
        array = _by_pillow(file, index)
        return array.astype(first.dtype) if first.dtype.kind in "iu" else array
    return upright(array, first)


def upright(array: np.ndarray, page: Any) -> np.ndarray:
    """Return the pixels of a page, as tifffile has them, as read_page does."""
    array = _channels_last(array, page)
    if page.photometric == GREY_INVERTED and array.dtype.kind == "u":
        array = np.iinfo(array.dtype).max - array
    return np.ascontiguousarray(UPRIGHT.get(orientation(page), lambda a: a)(array))


def readable(page: Any) -> bool:
    """Return whether tifffile reads a page; Pillow has to, where colours need a conversion."""
    if page.photometric not in (GREY_INVERTED, GREY, RGB) or page.bitspersample % 8:
        return False
    return page.bitspersample != 8 or PREMULTIPLIED not in page.extrasamples


def opened(file: BinaryIO) -> Any:
    """Return tifffile's TiffFile of an open file, from its beginning."""
    import tifffile

    # It tells of odd metadata; what counts here is whether the pixels can be had.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    file.seek(0)
    return tifffile.TiffFile(file, _multifile=False)  # which opens no other file


def single_pages(tiff: Any) -> list[Page]:
    """Return checked_pages() of a file each of whose planes has a header."""
    planes = (tiff.imagej_metadata or {}).get("images", 1) if tiff.is_imagej else 1
    if len(tiff.pages) == 1 and planes > 1:
        raise Refused(f"holds {planes} planes under the header of one; save them as single files")
    return checked_pages(tiff)


def checked_pages(tiff: Any) -> list[Page]:
    """Return the pages that are pictures, all of them where none says so."""
    # By number: where a page points to itself, tifffile's own iterator never ends.
    pages = [(index, tiff.pages[index]) for index in range(len(tiff.pages))]
    if not pages or not all(page.imagelength and page.imagewidth for _, page in pages):
        raise ValueError("it holds no page, an empty one, or is cut off")
    pages = [pair for pair in pages if not pair[1].subfiletype & NOT_A_PICTURE] or pages
    found = []
    for index, page in pages:
        turned = orientation(page) > 4
        size = (page.imagelength, page.imagewidth)
        found.append(Page(index, page, size[::-1] if turned else size))
    return found


def orientation(page: Any) -> int:
    """Return how the rows and columns of a page lie in the upright picture, 1: as they are."""
    tag = page.tags.get(ORIENTATION)
    return tag.value if tag is not None and isinstance(tag.value, int) else 1


def check_whole(tiff: Any, page: Any) -> None:
    """Raise ValueError for a page that is too large, or not all there: tifffile pads with zeros."""
    first = page.keyframe  # what a later page of a series does not say itself
    if first.imagelength * first.imagewidth > (Image.MAX_IMAGE_PIXELS or np.inf):
        raise Image.DecompressionBombError(
            f"Image size ({first.imagelength * first.imagewidth} pixels) exceeds limit of "
            f"{Image.MAX_IMAGE_PIXELS} pixels"
        )
    tile = first.tilewidth * first.tilelength * first.samplesperpixel if first.is_tiled else 0
    size = max(first.nbytes, tile * first.bitspersample // 8)
    if size > LARGEST_PAGE:
        raise ValueError(f"it unpacks to {size >> 20} MB, more than {LARGEST_PAGE >> 20}")
    counts = page.databytecounts
    if len(counts) > MOST_PARTS:
        raise ValueError(f"it says that it has {len(counts)} strips or tiles")
    ends = [start + count for start, count in zip(page.dataoffsets, counts)]
    if not ends or 0 in counts or max(ends) > tiff.filehandle.size:
        raise ValueError("it is cut off, or a part of it is missing")
    _check_unpacked(tiff.filehandle, page, size)
    if first.compression == 1 and sum(counts) < first.nbytes:
        raise ValueError(f"it holds {sum(counts)} bytes where its header promises {first.nbytes}")


def _check_unpacked(file: Any, page: Any, size: int) -> None:
    """Raise ValueError for a strip or tile that unpacks to more than the whole page promises.

    tifffile unpacks deflate and LZMA to the end. What cannot reach MOST_UNPACKED is not looked at.
    """
    if page.keyframe.compression not in (*DEFLATE, LZMA):
        return
    for start, count in zip(page.dataoffsets, page.databytecounts):
        if page.keyframe.compression in DEFLATE and 1032 * count <= max(size, MOST_UNPACKED):
            continue  # 1032: the most that deflate makes of a byte
        file.seek(start)
        packed = file.read(count)
        unpack: Any = (
            zlib.decompressobj() if page.keyframe.compression in DEFLATE else LZMADecompressor()
        )
        if len(unpack.decompress(packed, size + 1)) > size:
            raise ValueError(f"a part of it unpacks to more than the {size} bytes of the page")


def _channels_last(array: np.ndarray, page: Any) -> np.ndarray:
    """Return (H, W, C), C = 1 or 3, without alpha and in this machine's order of bytes."""
    axes = page.axes
    if sorted(axes) not in (["X", "Y"], ["S", "X", "Y"]):
        raise Refused(f"has the axes {axes}; save each plane as a page or a file")
    if array.ndim != len(axes) or not array.size:
        raise ValueError(f"its pixels have shape {array.shape}")
    array = array[..., None] if "S" not in axes else np.moveaxis(array, axes.index("S"), -1)
    colours = 3 if page.photometric == RGB else 1
    # Beside grey an unnamed channel is data; beside RGB it is alpha, as programs write it.
    unnamed = colours == 1 and UNNAMED in page.extrasamples
    if unnamed or array.shape[-1] - len(page.extrasamples) != colours:
        raise Refused(
            f"has {array.shape[-1]} channels that are no colours; save each as a page or a file"
        )
    array = array[..., :colours]
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _by_pillow(file: BinaryIO, index: int) -> np.ndarray:
    """Return a page as Pillow reads it, upright: (H, W, 1) or (H, W, 3) of 8 bits or 16 grey."""
    file.seek(0)
    with Image.open(file, formats=["TIFF"]) as picture:
        picture.seek(index)
        if picture.mode.startswith(("I", "F")):
            array = np.array(picture)
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
        else:
            array = np.array(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"))
    return array.reshape(*array.shape[:2], -1)
