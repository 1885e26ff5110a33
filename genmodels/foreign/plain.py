"""Opening plain files only: a pipe would be waited for, a device may never end."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def _refused(path: Path | str) -> OSError:
    return OSError(errno.EINVAL, "is no plain file but a pipe, a device or a folder", str(path))


def check_plain(path: Path | str) -> None:
    """Raise unless a path, its links followed, is a plain file; for readers that open it.

    Raises:
        OSError: a pipe, a socket, a device or a folder; nothing there, or not accessible.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise _refused(path)


def open_plain(path: Path | str) -> BinaryIO:
    """Return the file opened for reading bytes.

    Raises:
        OSError: see check_plain.
    """
    check_plain(path)  # opening alone does things to some devices

    def opener(name: str, flags: int) -> int:
        # Without waiting, should a pipe have taken the file's place just now.
        descriptor = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _refused(path)
        return descriptor

    return open(path, "rb", opener=opener)


def read_plain(path: Path | str) -> bytes:
    """Return the bytes of a file; see open_plain."""
    with open_plain(path) as file:
        return file.read()
