"""Stacks of planes in a TIFF, read and written one by one: pages, ImageJ, OME, BigTIFF.

A plane is a picture, grey or colour; around it are axes: T time, Z depth, C channels, and I or Q
where the file does not say. What is written back has the axes, type, order of bytes, packing,
resolution and description of what was read, ImageJ's and OME's metadata among the last.
"""

import io
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np

from genmodels.atomic import make_folder, whole_file
from genmodels.images import tiff
from genmodels.images.planes import Grid
from genmodels.images.read import reading
from genmodels.images.scale import as_type, whole_range

CLASSIC = 2**32 - 2**25  # bytes of pixels; more are written as BigTIFF, as tifffile does
MAPPED = 1 << 26  # bytes of pixels from which on a stack is mapped: each takes an open file
LOSSLESS = {5: "lzw", 8: "zlib", 32946: "deflate", 32773: "packbits", 34925: "lzma", 50000: "zstd"}
COUNTED = ("ImageJ", "images", "channels", "slices", "frames", "hyperstack", "loop", "min", "max")
IMAGEJ = ("", "T", "Z", "C", "TZ", "TC", "ZC", "TZC")


def _in_ascii(value: Any) -> Any:
    """Return a text as ImageJ writes it, \\u00B5m for micrometres; anything else as it is."""
    if not isinstance(value, str):
        return value
    return "".join(c if c.isascii() else f"\\u{ord(c):04X}" for c in value)


def _first_image(xml: str) -> dict[str, Any]:
    """Return what OME's metadata say of the first image: sizes of a pixel, channels, its name."""
    image = next(item for item in ElementTree.fromstring(xml).iter() if item.tag.endswith("}Image"))
    pixels = next(item for item in image if item.tag.endswith("}Pixels"))
    found: dict[str, Any] = {"Name": image.get("Name")} if image.get("Name") else {}
    for key in ("PhysicalSizeX", "PhysicalSizeY", "PhysicalSizeZ", "TimeIncrement"):
        if key in pixels.attrib:
            found[key] = float(pixels.attrib[key])
        if f"{key}Unit" in pixels.attrib:
            found[f"{key}Unit"] = pixels.attrib[f"{key}Unit"]
    names = [item.get("Name") for item in pixels if item.tag.endswith("}Channel")]
    return found | ({"Channel": {"Name": names}} if names and all(names) else {})


def has_planes(file: BinaryIO, name: str) -> bool:
    """Return whether a file is a TIFF whose pixels Stack reads; others are Pillow's.

    It is left open at its beginning.
    """
    with reading(file, name):
        if not tiff.is_tiff(file):
            return False
        pages = tiff.opened(file)
        tiff.checked_pages(pages)
        file.seek(0)
        return tiff.readable(pages.pages[0])


class Stack:
    """The planes of a TIFF, each read when it is asked for.

    Args:
        name: of the file, within its folder or zip.
        file: open; it stays so as long as the stack is used.
        axes: what the dimensions are, in place of what the file says: TZCYX, S last for colour.
        key: what errors call the file.

    Attributes:
        axes: of the planes, slowest first: "TZC"; "" of a single one.
        counts: how many there are along each.
        dtype: of the values.
        size: (H, W), upright.
        notes: lines to say about what is not read, or is not written as it was.

    Raises:
        ValueError: broken, or of a form that is not read.
    """

    is_stack = True

    def __init__(self, name: str, file: BinaryIO, axes: str = "", key: str = "denoise") -> None:
        self.name = name
        self.notes: list[str] = []
        self._file, self._key, self._renamed = file, key, bool(axes)
        self._bytes: np.memmap | None = None
        with reading(file, name):
            self._tiff = tiff.opened(file)
            self._size = tiff.checked_pages(self._tiff)[0].size
            self._series = self._tiff.series[0]
            self._first = self._series.keyframe
            self._name_axes(axes)
            self._find_planes()
            self._packed = self._packing()
        if self._first.extrasamples and self._first.photometric == tiff.RGB:
            self.notes.append("has alpha, which is left out")

    def _name_axes(self, axes: str) -> None:
        """Find out what the dimensions are."""
        series, first = self._series, self._first
        found = series.axes
        self.axes = found.removesuffix(first.axes)
        self.counts = series.shape[: len(self.axes)]
        whole = math.prod(self.counts) * math.prod(first.shape) == series.size
        if self.axes == found or not whole:
            raise tiff.Refused(f"has the axes {found}; save each plane as a page or a file")
        self.dtype = np.dtype(series.dtype)
        if self.dtype.kind not in "iuf" or (self.dtype.kind != "f" and self.dtype.itemsize > 4):
            raise tiff.Refused(f"holds {self.dtype}; convert it to 32 bits or floats")
        if not axes:
            return
        self.axes, last = axes[: len(self.axes)], axes[len(self.axes) :]
        fits = last == first.axes and len(set(axes)) == len(axes) and axes.isalpha()
        if not fits or not axes.isupper() or set(self.axes) & set("XYS"):
            raise tiff.Refused(
                f"has {len(found)} dimensions, {found}; axes={axes} must name as many, each by a "
                f"capital letter of its own, {first.axes} at the end"
            )
        if series.kind == "imagej" and self.axes not in IMAGEJ:
            raise tiff.Refused(f"is ImageJ's, whose axes are in the order TZC; not axes={axes}")

    def _find_planes(self) -> None:
        """Find out where the planes lie."""
        self._grid = Grid(self.axes, self.counts)
        series, first, images = self._series, self._first, len(self._tiff.series)
        if images > 1:
            self.notes.append(f"holds {images} images; the first is restored, and alone is written")
        if self._tiff.is_ome and series.kind != "ome":
            self.notes.append(
                "has OME metadata of other files or pages, which are kept but not followed"
            )
        if series.is_pyramidal:
            self.notes.append("holds smaller copies of its pictures, which are left out")
        promised = (self._tiff.imagej_metadata or {}).get("images", 1)
        if promised > len(self):
            raise ValueError(f"it holds {len(self)} planes where its header promises {promised}")
        # ImageJ writes more than 4 GB with one header, the planes behind each other.
        self._behind = len(series) == 1 and len(self) > 1
        if self._behind and (series.dataoffset is None or first.compression != 1):
            raise tiff.Refused(f"holds {len(self)} planes on a page; save each as a page")
        if self._behind:
            end = series.dataoffset + len(self) * first.nbytes
            if end > self._tiff.filehandle.size:
                raise ValueError("it is cut off")
        elif len(series) != len(self):
            raise tiff.Refused(f"has {len(series)} pages for {len(self)} planes; save it anew")
        # Planes come in the order of the file, which OME may have otherwise than its axes.
        self._order = list(range(len(self)))
        if series.kind == "ome":
            pages = list(series)
            if None in pages:
                raise tiff.Refused("has planes that are missing or lie in other files")
            if images == 1:  # else the metadata are made anew
                self._order.sort(key=lambda k: pages[k].index)

    def __len__(self) -> int:
        return math.prod(self.counts)

    def close(self) -> None:
        """Close the file."""
        self._tiff.close()
        self._file.close()

    @property
    def white(self) -> float:
        """The value of white by its type."""
        return whole_range(self.dtype).white

    @property
    def size(self) -> tuple[int, int]:
        """(H, W), upright."""
        return self._size

    @property
    def channels(self) -> int:
        """How many channels there are; the colours of a picture are one."""
        return self._grid.channels

    def channel(self, number: int) -> int:
        """Return which channel a plane is of."""
        return self._grid.channel(self._order[number])

    def position(self, number: int) -> tuple[int, ...]:
        """Return where a plane lies along the axes but that of the channels."""
        return self._grid.position(self._order[number])

    def label(self, number: int) -> str:
        """Return what tells a plane from the others; see Grid.label."""
        return self._grid.label(self._order[number])

    def plane(self, number: int) -> np.ndarray:
        """Return the values of a plane, (H, W, C), upright.

        Raises:
            ValueError: broken, or with pixels that are no numbers.
        """
        with reading(self._file, f"{self.name}{self.label(number)}"):
            first = self._first
            if self._behind:
                tiff.check_whole(self._tiff, first)
                self._file.seek(self._series.dataoffset + number * first.nbytes)
                stored = self.dtype.newbyteorder(self._tiff.byteorder)
                pixels = np.frombuffer(self._file.read(first.nbytes), stored)
                values = tiff.upright(pixels.reshape(first.shape), first)
            else:
                page = self._series[self._order[number]]
                values = tiff.page_values(self._tiff, self._file, page, page.index)
        if not np.isfinite(values).all():
            label = f"{self.name}{self.label(number)}"
            raise ValueError(
                f"{self._key}={label}: holds NaN or infinite pixels; mend or remove it"
            )
        return values

    def mapped(self, number: int) -> np.ndarray | None:
        """Return the values of a plane where they lie in the file, (H, W, 1), or None.

        None: of small stacks, and of planes that are packed, in colour, turned or in a zip. The
        file must stay as it is.
        """
        first = self._first
        if len(self) * first.nbytes < MAPPED:
            return None
        page = None if self._behind else self._series[self._order[number]]
        offsets = [self._series.dataoffset + number * first.nbytes] if page is None else []
        if page is not None:
            counts, offsets = page.databytecounts, list(page.dataoffsets)
            joined = all(a + n == b for a, n, b in zip(offsets, counts, offsets[1:]))
            if not joined or sum(counts) != first.nbytes:
                return None
        as_stored = first.photometric == tiff.GREY and first.axes == "YX" and not first.is_tiled
        if not as_stored or first.compression != 1 or first.predictor != 1:
            return None
        if first.fillorder != 1 or tiff.orientation(first) != 1:
            return None
        if self._bytes is None:
            try:
                self._bytes = np.memmap(self._file, np.uint8, "r")
            except OSError:  # it is no file of its own
                return None
        part = self._bytes[offsets[0] : offsets[0] + first.nbytes]
        return part.view(self.dtype.newbyteorder(self._tiff.byteorder)).reshape(*self._size, 1)

    def write(self, path: Path, planes: Iterable[np.ndarray]) -> None:
        """Write other values in place of its own to a file of its kind, all or nothing.

        Folders are made when there is something to write. One plane is held at a time.

        Args:
            path: of the file.
            planes: (H, W, C), in the order of its own; whole numbers are rounded and clipped.
        """
        import tifffile

        kind, options = self._description()
        stored = (self._as_stored(values) for values in planes)
        sample = next(stored)
        make_folder(path.parent, exist_ok=True)
        large = math.prod(self.counts) * sample.nbytes > CLASSIC and kind != "imagej"
        with (
            whole_file(path) as file,
            tifffile.TiffWriter(
                file,
                bigtiff=self._tiff.is_bigtiff or large,
                byteorder=self._tiff.byteorder,
                imagej=kind == "imagej",
                ome=kind == "ome" and "description" not in options,
            ) as out,
        ):
            out.write(
                itertools.chain([sample], stored),
                shape=(*self.counts, *sample.shape),
                dtype=sample.dtype,
                photometric=self._first.photometric,
                planarconfig=self._first.planarconfig if sample.ndim == 3 else None,
                maxworkers=1,
                **self._packed,
                **self._resolution(),
                **options,
            )

    def _as_stored(self, values: np.ndarray) -> np.ndarray:
        """Return the values of a plane as they lie in the file."""
        values = as_type(values, self.dtype)
        if self._first.photometric == tiff.GREY_INVERTED and self.dtype.kind == "u":
            values = np.iinfo(self.dtype).max - values
        if self._first.photometric != tiff.RGB:
            values = values[..., 0]
        elif self._first.axes.startswith("S"):
            values = np.moveaxis(values, -1, 0)
        return np.ascontiguousarray(values, self.dtype.newbyteorder(self._tiff.byteorder))

    def _description(self) -> tuple[str, dict[str, Any]]:
        """Return (kind, options of tifffile's writer) that say what the file says of itself."""
        kind, first = self._series.kind, self._first
        axes = f"{self.axes}{first.axes}"
        options: dict[str, Any] = {"software": first.software or False}
        if first.datetime:
            options["datetime"] = first.datetime
        if kind == "imagej":
            known = {
                key: _in_ascii(value)
                for key, value in (self._tiff.imagej_metadata or {}).items()
                if key not in COUNTED
            }
            if set(self.axes) <= set("TZC"):
                known["axes"] = axes
            return kind, {"metadata": known, "software": None}
        if kind == "ome" and (len(self._tiff.series) > 1 or first.extrasamples):
            known = _first_image(self._tiff.ome_metadata)
            return kind, options | {"metadata": known | {"axes": axes}}
        if kind == "ome":
            return kind, options | {
                "metadata": None,
                "description": self._tiff.ome_metadata.encode(),
            }
        as_it_was = kind in ("shaped", "uniform", "generic", "")
        # tifffile's own description tells the shape, with alpha.
        whole = not first.extrasamples or kind == "generic"
        if as_it_was and not self._renamed and whole:
            text = first.description
            return kind, options | {"metadata": None, "description": text.encode() or None}
        return kind, options | {"metadata": {"axes": axes} if as_it_was or self.axes else None}

    def _resolution(self) -> dict[str, Any]:
        tags = self._first.tags
        ends = [tags[key].value for key in ("XResolution", "YResolution") if key in tags]
        if len(ends) < 2 or any(bottom == 0 for _, bottom in ends):
            return {}
        return {"resolution": tuple(ends), "resolutionunit": self._first.resolutionunit}

    def _packing(self) -> dict[str, Any]:
        """Return tifffile's compression and predictor: the file's if they can be written."""
        import tifffile

        first = self._first
        if first.compression == 1:
            return {}
        options = {"compression": LOSSLESS.get(first.compression)}
        if first.predictor != 1:
            options["predictor"] = first.predictor
        try:
            tifffile.imwrite(io.BytesIO(), np.zeros((2, 2), self.dtype), **options)
        except Exception:  # each codec has its own kind of error for what it lacks
            options = {"compression": None}
        if options["compression"]:
            return options
        remedy = "; pip install 'genmodels[stacks]' keeps it"
        remedy = remedy if first.compression in LOSSLESS else ""
        self.notes.append(f"is packed as {first.compression.name}, and written as zlib{remedy}")
        return {"compression": "zlib"}
