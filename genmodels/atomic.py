"""Files that appear whole: written under a temporary name, flushed to disk, renamed."""

import contextlib
import os
from pathlib import Path


def write_bytes(path, data):
    """Write a file, all or nothing."""
    with whole_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path):
    """Open a binary file under a temporary name in the same folder: a kill leaves old or new.

    The temporary name is that of the file, so that the next attempt takes a killed one's place.

    Raises:
        OSError: with the file's name also where the system gives none (a full disk).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)
