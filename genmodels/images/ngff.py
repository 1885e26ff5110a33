"""Stacks of planes in Zarr, read and written one by one: OME-NGFF, or an array by itself.

Of OME-NGFF (OME-Zarr) the first picture is taken at its full size. What is written has its axes,
type, format, packing and metadata, in chunks of one plane. It needs the package zarr, 3 or later.
"""

import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genmodels.atomic import make_folder, whole_path
from genmodels.foreign import read_plain
from genmodels.images.planes import Grid
from genmodels.images.scale import as_type, whole_range

METADATA = ("zarr.json", ".zgroup", ".zarray")
# Some codecs that can be named in a file run what lies in it (pickle): these do not.
CODECS = {"blosc", "bytes", "bz2", "crc32", "crc32c", "delta", "endian", "gzip", "lz4", "lzma"}
CODECS |= {"sharding_indexed", "shuffle", "transpose", "zlib", "zstd"}
LARGEST_CHUNK = 1 << 30  # bytes
OLDEST = "TCZYX"  # the axes of OME-NGFF before it named them


def is_zarr(path: Path) -> bool:
    """Return whether a folder is a Zarr group or array."""
    return path.is_dir() and any((path / name).is_file() for name in METADATA)


class NgffStack:
    """The planes of a Zarr folder, each read when it is asked for.

    Args:
        name: of the folder, within the one around it.
        path: where it is.
        axes: what the dimensions are, in place of what the folder says: TZCYX.
        key: what errors call it.

    Attributes:
        dtype: of the values.
        notes: lines to say about what is not read.

    Raises:
        ValueError: broken, of a form that is not read, or zarr is not installed.
    """

    is_stack = True

    def __init__(self, name: str, path: Path, axes: str = "", key: str = "denoise") -> None:
        self.name = name
        self.notes: list[str] = []
        self._key, self._renamed = key, bool(axes)
        try:
            import zarr
        except ImportError:
            raise self._bad("needs the package zarr; pip install 'genmodels[zarr]'") from None
        try:
            _check_folder(path)
            opened = zarr.open(str(path), mode="r")
            self._group = None if isinstance(opened, zarr.Array) else opened
            self._array: Any = opened if self._group is None else self._first_picture()
            self._name_axes(axes)
        except Exception as error:  # zarr raises many kinds
            raise self._bad(f"cannot be read ({error}); make it again") from None

    def _bad(self, reason: str) -> ValueError:
        return ValueError(f"{self._key}={self.name}: {' '.join(reason.split())}")

    def _first_picture(self) -> Any:
        """Return the array of the first picture at its full size."""
        assert self._group is not None
        attributes = self._group.attrs.asdict()
        self._ome = attributes.get("ome", attributes)
        if not self._ome.get("multiscales"):
            arrays = sorted(name for name, _ in self._group.arrays())
            inside = f", but arrays: name one, {self.name}/{arrays[0]} say" if arrays else ""
            raise ValueError(f"it is no array and holds no OME-NGFF picture (multiscales){inside}")
        first = self._ome["multiscales"][0]
        self._path = first["datasets"][0]["path"]
        if not self._path or ".." in Path(self._path).parts or Path(self._path).is_absolute():
            raise ValueError(f"its picture lies at {self._path}")
        if len(self._ome["multiscales"]) > 1:
            self.notes.append("holds several images; the first is restored, and alone is written")
        if len(first["datasets"]) > 1:
            self.notes.append("holds smaller copies of its pictures, which are left out")
        known = {Path(each["path"]).parts[0] for each in first["datasets"]}
        if others := sorted(set(self._group.keys()) - known):
            self.notes.append(f"holds {', '.join(others)} beside the picture, which is left out")
        return self._group[self._path]

    def _name_axes(self, axes: str) -> None:
        """Find out what the dimensions are, and that they can be read."""
        array = self._array
        self.dtype = np.dtype(array.dtype).newbyteorder("=")
        if self.dtype.kind not in "iuf" or (self.dtype.kind != "f" and self.dtype.itemsize > 4):
            raise ValueError(f"it holds {self.dtype}, not whole numbers of 32 bits or floats")
        letters = axes or self._said_axes() or {2: "YX", 3: "IYX"}.get(array.ndim, "")
        fits = len(set(letters)) == len(letters) == array.ndim and letters.isalpha()
        if not fits or not letters.isupper() or not letters.endswith("YX") or "S" in letters:
            said = f"axes={axes} must name as many" if axes else "name them by axes="
            raise ValueError(
                f"it has {array.ndim} dimensions, {letters or 'without names'}; {said}, each by a "
                "capital letter of its own, YX at the end"
            )
        if not math.prod(array.shape):
            raise ValueError(f"it has the shape {array.shape}")
        self._grid = Grid(letters[:-2], tuple(array.shape[:-2]))
        height, width = self.size
        if height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"its planes of {height} x {width} pixels are too large")
        if math.prod(array.chunks) * self.dtype.itemsize > LARGEST_CHUNK:
            raise ValueError(f"its chunks of {array.chunks} are too large")

    def _said_axes(self) -> str:
        """Return what the metadata call the dimensions, "" if they do not."""
        if self._group is not None:
            names = self._ome["multiscales"][0].get("axes")
            if names is None:
                return OLDEST if self._array.ndim == len(OLDEST) else ""
            names = [name["name"] if isinstance(name, dict) else name for name in names]
        else:
            names = getattr(self._array.metadata, "dimension_names", None)
            names = names or self._array.attrs.get("_ARRAY_DIMENSIONS") or []
        letters = "".join(str(name or "?")[0].upper() for name in names)
        return letters if letters.isalpha() else ""

    def __len__(self) -> int:
        return len(self._grid)

    @property
    def white(self) -> float:
        """The value of white by its type."""
        return whole_range(self.dtype).white

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self._array.shape[-2], self._array.shape[-1]

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return self._grid.channels

    def channel(self, number: int) -> int:
        """Return which channel a plane is of."""
        return self._grid.channel(number)

    def position(self, number: int) -> tuple[int, ...]:
        """Return where a plane lies along the axes but that of the channels."""
        return self._grid.position(number)

    def label(self, number: int) -> str:
        """Return what tells a plane from the others; see Grid.label."""
        return self._grid.label(number)

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def mapped(self, number: int) -> None:
        """Return None: chunks are packed."""

    def plane(self, number: int) -> np.ndarray:
        """Return the values of a plane, (H, W, 1).

        Raises:
            ValueError: broken, or with pixels that are no numbers.
        """
        label = f"{self._key}={self.name}{self.label(number)}"
        try:
            values = np.asarray(self._array[self._grid.index(number)])
        except Exception as error:  # each codec has its own kind
            raise ValueError(f"{label}: cannot be read ({error}); make it again") from None
        if not np.isfinite(values).all():
            raise ValueError(f"{label}: holds NaN or infinite pixels; mend or remove it")
        return values.astype(self.dtype, copy=False)[..., None]

    def write(self, path: Path, planes: Iterable[np.ndarray]) -> None:
        """Write other values in place of its own to a folder of its kind, all or nothing.

        Folders are made when there is something to write. One plane is held at a time.

        Args:
            path: of the folder; another Zarr folder there is replaced, in two steps at the end.
            planes: (H, W, 1), in the order of its own; whole numbers are rounded and clipped.
        """
        planes = iter(planes)
        first = next(planes)
        make_folder(path.parent, exist_ok=True)
        with whole_path(path) as partial:
            made = self._like_it(partial)
            for number, values in enumerate(itertools.chain([first], planes)):
                made[self._grid.index(number)] = as_type(values[..., 0], self.dtype)
            if is_zarr(path):
                shutil.rmtree(path)

    def _like_it(self, path: Path) -> Any:
        """Return a new array in a new folder that says what this one says of itself."""
        import zarr

        array = self._array
        version = array.metadata.zarr_format
        attributes, names = array.attrs.asdict(), None
        if version == 3:
            names = array.metadata.dimension_names
            if self._renamed or not names:
                names = [axis.lower() for axis in f"{self._grid.axes}YX"]
        elif self._renamed:
            attributes["_ARRAY_DIMENSIONS"] = [axis.lower() for axis in f"{self._grid.axes}YX"]
        inner = array.chunks[-2:]
        options: dict[str, Any] = {
            "shape": array.shape,
            "chunks": (*[1] * len(self._grid.counts), *inner),
            "dtype": array.dtype,
            "compressors": array.compressors or None,
            "filters": array.filters or None,
            "fill_value": array.fill_value,
            "attributes": attributes,
            "dimension_names": names,
        }
        if version == 3:
            options["serializer"] = array.serializer
            options["chunk_key_encoding"] = array.metadata.chunk_key_encoding
        else:
            separator = array.metadata.dimension_separator
            options["chunk_key_encoding"] = {"name": "v2", "separator": separator}
        if self._group is None:
            return zarr.create_array(str(path), zarr_format=version, **options)
        group = zarr.open_group(str(path), mode="w", zarr_format=version)
        first = self._ome["multiscales"][0]
        alone = {**first, "datasets": first["datasets"][:1]}
        said = {**self._ome, "multiscales": [alone]}
        outer = self._group.attrs.asdict()
        group.attrs.update({**outer, "ome": said} if "ome" in outer else said)
        return group.create_array(self._path, **options)


def _check_folder(path: Path) -> None:
    """Raise ValueError for what is no plain file, or a codec that may run code."""
    for folder, inner, names in os.walk(path):
        for name in (*inner, *names):
            file = Path(folder, name)
            if file.is_symlink() or not (file.is_file() or file.is_dir()):
                raise ValueError(f"{file.relative_to(path)} is no plain file")
            if name in ("zarr.json", ".zarray", ".zmetadata"):
                _check_codecs(json.loads(read_plain(file)))


def _check_codecs(metadata: Any) -> None:
    """Raise ValueError for a codec beyond CODECS anywhere in the metadata of arrays."""
    if isinstance(metadata, list):
        for each in metadata:
            _check_codecs(each)
    if not isinstance(metadata, dict):
        return
    for key, value in metadata.items():
        if key in ("codecs", "index_codecs", "filters", "compressor"):
            for codec in value if isinstance(value, list) else [value]:
                name = codec.get("id", codec.get("name")) if isinstance(codec, dict) else codec
                if name is not None and str(name).removeprefix("numcodecs.") not in CODECS:
                    raise ValueError(f"it is packed by {name}, which is not read")
        if key != "attributes":
            _check_codecs(value)
