"""Command lines: key=value words, one-line errors, exit codes, tables."""

import contextlib
import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Beside an installed package `kernels` is Hugging Face's, and `benchmarks` anyone's.
CLONE = ("kernels", "benchmarks") if (ROOT / "setup.py").is_file() else ()
OURS = [ROOT / name for name in ("genmodels", *CLONE)]
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py", ROOT / "evaluate.py"]


# How texts call the commands: as in a clone. torchrun and `configs/` belong to the call.
CALL = re.compile(
    r"(torchrun(?: --\S+ \d+)* )?(?<![\w/.-])(?:python )?(\w+\.py)((?: configs/\w+\.yaml)*)"
    r"|python -m (genmodels\.\w+)\b(?!\.)"
)
_names: Mapping[str, str] = {}  # how the user calls them, while a command runs; see run()


class Stopped(Exception):
    """A signal ended the work early, all saved and said; the exit code is 128 + signal."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def run(
    main: Callable[[list[str]], Any],
    argv: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
) -> int:
    """Return the exit code of main(argv): 0 done, 2 the user's mistake, 1 anything else.

    A run that was stopped by a signal returns 128 + its number, as shells do; where main itself
    returns a whole number, that is the code.

    A ValueError or OSError raised by this package's own code is addressed to the user and becomes
    one line on stderr; one raised elsewhere is a defect and keeps its traceback. A reader of the
    output that goes away ends nothing (`train.py ... | head`).

    Args:
        main: the command.
        argv: its words; None: those of this process.
        names: how the user calls the commands, {"train.py": "genmodels train", "genmodels.data":
            ...}; what is printed calls them so. None: as in a clone.
    """
    out, errors = (_Lasting(stream) if stream else stream for stream in (sys.stdout, sys.stderr))
    with (
        _called(names or {}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        code = _run(main, sys.argv[1:] if argv is None else list(argv))
        for stream in (out, errors):
            if stream:
                stream.flush()
        if out and out.error and out.error.errno not in (errno.EPIPE, errno.EIO):
            print(f"error: the output cannot be written: {out.error.strerror}", file=sys.stderr)
            return code or 1
    return code


def _run(main: Callable[[list[str]], Any], argv: list[str]) -> int:
    try:
        with warnings_as_notes(all=False):
            code = main(argv)
    except Stopped as stopped:
        return 128 + stopped.signal
    except (ValueError, OSError) as error:
        if not _raised_here(error):
            _print_traceback()
            return 1
        print(f"error: {escaped(' '.join(_line_of(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    except Exception:
        _print_traceback()
        return 1
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def _called(names: Mapping[str, str]) -> Iterator[None]:
    global _names
    before, _names = _names, names
    try:
        yield
    finally:
        _names = before


def as_called(text: str) -> str:
    """Return a text that calls commands as in a clone with the calls that the user makes."""

    def call(match: re.Match[str]) -> str:
        launcher, script, configs, module = match.groups()
        if (name := _names.get(script or module)) is None:
            return match[0]
        if launcher:  # it starts a file, or a module
            name = f"{launcher}-m {name.removeprefix('python -m ')}"
        return name + re.sub(r"configs/(\w+)\.yaml", r"\1", configs or "")

    return CALL.sub(call, text) if _names else text


class _Lasting:
    """A stream for text that takes everything: once it cannot be written, the rest is dropped.

    Commands are written as the user calls them.

    Args:
        stream: sys.stdout or sys.stderr.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        try:
            self.stream.write(as_called(text))
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self.stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        # What the stream still holds goes nowhere too, also when Python ends.
        self.error = error
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


# What a user can do about a file that cannot be written or read.
REMEDIES = {
    errno.ENOSPC: "free some space there, or write to another disk",
    errno.EDQUOT: "free some space there, or write to another disk",
    errno.EROFS: "write to another folder",
    errno.EACCES: "make it accessible, or name another",
    errno.EPERM: "make it accessible, or name another",
}


def _print_traceback() -> None:
    print("\n".join(map(escaped, traceback.format_exc().splitlines())), file=sys.stderr)


def escaped(text: str) -> str:
    """Return a line with everything that is no printable character written as \\x1b and the like.

    Names in files come from anyone; shown as they are they could move the cursor, colour the
    terminal or turn the direction of writing.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def _line_of(error: Exception) -> str:
    """Return the text of an error; of a file's error the name, the reason and a remedy."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        remedy = REMEDIES.get(error.errno or 0, "")
        return f"{error.filename}: {error.strerror}{'; ' if remedy else ''}{remedy}"
    return str(error)


@contextlib.contextmanager
def fits_memory(line: str) -> Iterator[None]:
    """Raise ValueError(line) in place of torch's many ways to say that memory does not suffice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # On a CPU and on MPS it is a RuntimeError that only its text tells from others.
        texts = ("DefaultCPUAllocator", "out of memory", "Unable to allocate")
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in texts):
            raise
        raise ValueError(line) from None


@contextlib.contextmanager
def name_in_errors(name: str) -> Iterator[None]:
    """Add a name, say a file's, to the line of a user's error; a defect passes as it is."""
    try:
        yield
    except ValueError as error:
        if not _raised_here(error):
            raise
        raise ValueError(f"{error} ({name})") from None


def _raised_here(error: BaseException) -> bool:
    """Return whether the innermost frame lies in this repository (or the error names a file)."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return _is_ours(frame.f_code.co_filename) or (
        isinstance(error, OSError) and error.filename is not None
    )


def _is_ours(filename: str) -> bool:
    """Return whether a source file belongs to this repository."""
    file = Path(filename).resolve()
    return any(file.is_relative_to(folder) for folder in OURS) or file in SCRIPTS


@contextlib.contextmanager
def warnings_as_notes(late: bool = False, *, all: bool = True) -> Iterator[list[str]]:
    """Print what this package warns of as one line each; the block gets the list of them.

    Args:
        late: print them after the block, and none if it raises: an error is the only line then.
        all: show also what Python's own filters would hide, of other packages too.
    """
    notes: list[str] = []
    show_elsewhere = warnings.showwarning

    def say(note: str) -> None:
        from genmodels.distributed import is_first

        if is_first():
            print(f"note: {escaped(note)}", file=sys.stderr)

    def show(message, category, filename, *rest):
        if not _is_ours(filename):
            return show_elsewhere(message, category, filename, *rest)
        if str(message) not in notes:
            notes.append(str(message))
            if not late:
                say(notes[-1])

    with warnings.catch_warnings():
        if all:
            warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield notes
    for note in notes if late else ():
        say(note)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; every cell is shown with str()."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # As Text: a :train: in a name is no emoji, and a [b] no markup.
    table = Table(title=Text(escaped(title)), title_justify="left", min_width=min(len(title), 100))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(Text(escaped(str(cell))) for cell in row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
