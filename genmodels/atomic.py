"""What appears whole: written under a temporary name beside its own, then renamed.

A kill leaves the old thing or the new one, and at worst a temporary name, which the next write of
the same thing takes again.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "link",
    "make_folder",
    "new_folder",
    "remove_partial",
    "whole_file",
    "whole_path",
    "write_bytes",
    "write_json",
]


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file, all or nothing; see whole_file."""
    with whole_file(path) as file:
        file.write(data)


def write_json(path: Path | str, data: Any) -> None:
    """Write JSON that any reader takes, all or nothing: what is not finite is null (RFC 8259)."""
    text = json.dumps(_with_nulls(data), indent=1, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def _with_nulls(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _with_nulls(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_with_nulls(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextlib.contextmanager
def whole_file(path: Path | str, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that appears whole when the block ends.

    Args:
        path: the file.
        flush: have it on the disk before it is renamed, so that a crash of the machine leaves old
            or new as well; false: only a kill of the process does.

    Raises:
        OSError: see whole_path.
    """
    with whole_path(path) as partial, open(partial, "wb") as file:
        yield file
        if flush:
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def whole_path(path: Path | str, *, several: bool = False) -> Iterator[Path]:
    """Give a temporary name; what the block puts there becomes `path`, or goes if the block fails.

    Args:
        path: a file, or a folder that does not exist.
        several: more than one process may do this at the same time: each takes a name of its own.

    Raises:
        OSError: with the name of `path` also where the system gives none (a full disk).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}{f'.{os.getpid()}' if several else ''}.partial")
    try:
        _remove(partial)
        try:
            yield partial
            partial.replace(path)
        finally:
            _remove(partial)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends; folders above it are made.

    Its files can be read by whoever the user's umask lets read what the user makes.

    Raises:
        OSError: `path` exists and is not an empty folder.
    """
    with whole_path(path, several=True) as partial:
        make_folder(partial)
        allowed = partial.stat().st_mode & 0o666
        yield partial
        # A library that itself writes under a temporary name (safetensors) makes files that are
        # their owner's alone.
        for file in partial.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(file.stat().st_mode | allowed)


def make_folder(path: Path | str, *, exist_ok: bool = False) -> None:
    """Make a folder and those above it; where one of them cannot be made, none is left."""
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except OSError:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def link(path: Path | str, target: Path | str) -> None:
    """Make target the same file as path (a copy where there are no hard links), all or nothing."""
    with whole_path(target) as partial:
        try:
            os.link(path, partial)
        except OSError:
            shutil.copy(path, partial)


def remove_partial(folder: Path) -> None:
    """Delete what killed writes have left in a folder."""
    for partial in folder.glob(".*.partial"):
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
