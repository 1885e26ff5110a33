"""Arrays in npz and npy files: their headers are read before memory is taken for them."""

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from genmodels.foreign.plain import open_plain

# Deflate packs at most 1032 to 1, and only one value repeated: images stay far below.
LARGEST_RATIO, LARGE = 300, 1 << 28
LONGEST_HEADER = 1 << 16  # bytes of the description of an array


def half_memory() -> int:
    """Return half the bytes of this machine's memory; an array is copied once while it is read."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def check_npy(file: BinaryIO, size: int) -> tuple[tuple[int, ...], np.dtype]:
    """Return (shape, type) that the header of an npy says; the file is left at the array's bytes.

    Args:
        file: open at the npy's beginning.
        size: bytes of the npy.

    Raises:
        ValueError: no npy, an array of Python objects, or another number of bytes than it says.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"it is an npy of version {version}")
    length = 2 if version == (1, 0) else 4
    start = file.read(length)
    if len(start) < length or int.from_bytes(start, "little") > LONGEST_HEADER:
        raise ValueError("its header is cut off or too long")
    text = start + file.read(int.from_bytes(start, "little"))
    # The two readers differ in how many bytes say the length, and that is as read above.
    reader = np.lib.format
    read = reader.read_array_header_1_0 if length == 2 else reader.read_array_header_2_0
    shape, _, kind = read(io.BytesIO(text))
    if kind.hasobject:
        raise ValueError("it holds Python objects; save numbers")
    if any(side < 0 for side in shape):
        raise ValueError(f"it has shape {shape}")
    promised = math.prod(shape) * kind.itemsize
    there = size - len(text) - 8  # 8: magic and version
    if promised != there:
        raise ValueError(f"it has {max(there, 0)} bytes where its header promises {promised}")
    return shape, kind


class Npz:
    """An open npz; what it holds is known before it is unpacked.

    Args:
        archive: the open zip.

    Attributes:
        arrays: {name: (shape, type)}, as their headers say.
        files: the names, in the order of the file.
    """

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        self._infos = {info.filename.removesuffix(".npy"): info for info in infos}
        if len(self._infos) != len(infos):
            raise ValueError("it holds two arrays of one name")
        self.files = list(self._infos)

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Return (shape, type) of an array; see check_npy."""
        info = self._infos[name]
        with self.archive.open(info) as file:
            return check_npy(file, info.file_size)

    def read(self, name: str, most: int | None = None) -> np.ndarray:
        """Return an array.

        Args:
            name: of files.
            most: bytes that it may have, unpacked; None: half of this machine's memory.

        Raises:
            ValueError: it has more, or its header and what is there disagree.
            Exception: any kind, where the zip is broken.
        """
        info, most = self._infos[name], half_memory() if most is None else most
        size, packed = info.file_size, info.compress_size
        if size > most:
            raise ValueError(f"{name} unpacks to {_shown(size)}, more than {_shown(most)}")
        if size > LARGE and size > LARGEST_RATIO * packed:
            raise ValueError(
                f"{name} unpacks to {_shown(size)} from {_shown(packed)}; save it with numpy.savez"
            )
        self.header(name)
        with self.archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def read_unpacked(self, *names: str) -> dict[str, np.ndarray]:
        """Return {name: array} of a file by numpy.savez, all if none is named; none is packed.

        Raises:
            ValueError: one is, or two share bytes: they take no more memory than the file then.
            Exception: any kind, where the zip is broken.
        """
        for name, info in self._infos.items():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is packed; numpy.savez packs none")
        if sum(info.compress_size for info in self._infos.values()) > self.archive.start_dir:
            raise ValueError("its arrays overlap")
        return {name: self.read(name) for name in names or self.files}


def _shown(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.3g} MB"


@contextlib.contextmanager
def open_npz(path: Path | str) -> Iterator[Npz]:
    """Give the Npz of a file.

    Raises:
        Exception: any kind, where it is no npz, or broken.
    """
    with open_plain(path) as file, zipfile.ZipFile(file) as archive:
        yield Npz(archive)
