"""Command lines: key=value words, one-line errors, exit codes, tables."""

import contextlib
import dataclasses
import difflib
import errno
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch

from genmodels.config import Config
from genmodels.config_io import parse_value

ROOT = Path(__file__).resolve().parent.parent
OURS = [ROOT / "genmodels", ROOT / "kernels", ROOT / "benchmarks"]
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py", ROOT / "evaluate.py"]


def split_words(argv):
    """Return (positionals, {key: text}, flags): words with =, words without, words with --.

    Of a key given twice the later value holds. A word is key=value if what stands before the first
    = could be a key (letters, digits, _ and .).
    """
    positionals, words, flags = [], {}, []
    for word in argv:
        key, equals, text = word.partition("=")
        if word.startswith("-"):
            flags.append(word)
        elif equals and key.replace("_", "").replace(".", "").isalnum():
            words[key] = text
        else:
            positionals.append(word)
    return positionals, words, flags


def joined_flags(argv, key):
    """Return the words with `--key value` and `--key=value` written as key=value."""
    words = list(argv)
    if f"--{key}" in words[:-1]:
        place = words.index(f"--{key}")
        words[place : place + 2] = [f"{key}={words[place + 1]}"]
    return [word.removeprefix("--") if word.startswith(f"--{key}=") else word for word in words]


def check_flags(flags, allowed):
    """Raise ValueError for a --word that is not allowed."""
    for flag in flags:
        if flag not in allowed:
            hint = f"{flag.lstrip('-').split('=')[0]}=..."
            raise ValueError(f"{flag}: settings are written {hint}; flags are {', '.join(allowed)}")


def check_choice(key, value, choices):
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{key}={value}: choose from {', '.join(choices)}")


def check_device(key, value, choices):
    """Raise ValueError unless the value is one of the choices and torch has such a device here."""
    check_choice(key, value, choices)
    if value in ("cuda", "mps") and not getattr(torch, value).is_available():
        raise ValueError(f"{key}={value}: torch finds no such device here; write {choices[0]}")


def one_model(positionals):
    """Return the one positional word, the MODEL.

    Raises:
        ValueError: none, or more than one.
    """
    if len(positionals) != 1:
        given = " ".join(positionals) or "nothing"
        raise ValueError(f"model={given}: name one run folder, .ckpt or exported folder")
    return positionals[0]


def seed_list(options):
    """Return the seeds of the options num, seed and seeds.

    Raises:
        ValueError: num or batch < 1, a negative seed, or a malformed range.
    """
    for key, least in (("num", 1), ("seed", 0), ("batch", 1)):
        if options[key] < least:
            raise ValueError(f"{key}={options[key]}: must be >= {least}")
    if options["seeds"]:
        return parse_seeds(options["seeds"])
    return list(range(options["seed"], options["seed"] + options["num"]))


def typed_words(words, schema, also=()):
    """Return the words as values of the schema's types, defaults filled in.

    Args:
        words: {key: text}.
        schema: {key: (type, default, doc)}.
        also: further keys to name in an error.

    Raises:
        ValueError: an unknown key, or a text that is not of the type.
    """
    values = {key: default for key, (_, default, _) in schema.items()}
    for key, text in words.items():
        if key not in schema:
            known = [*schema, *also]
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown key {key}={text}: {hint}choose from {', '.join(known)}")
        values[key] = parse_value(key, text, schema[key][0])
    return values


def help_text(doc, schema):
    """Return a script's docstring followed by its keys with defaults and meaning."""
    lines = [doc.strip(), "", "keys:"]
    for key, (_, default, meaning) in schema.items():
        shown = ",".join(map(str, default)) if isinstance(default, list) else default
        lines.append(f"  {f'{key}={shown}':28} {meaning}")
    return "\n".join(lines)


def describe(methods, networks):
    """Return the schema as text: every key with its default and meaning (for --help)."""
    lines = []

    def section(title, cls, prefix):
        lines.append(f"\n{title}: {cls.__doc__.splitlines()[0]}")
        for item in dataclasses.fields(cls):
            if "doc" in item.metadata:
                default = item.default_factory() if callable(item.default_factory) else item.default
                shown = ",".join(map(str, default)) if isinstance(default, list) else default
                shown = str(shown).lower() if isinstance(shown, bool) else shown
                lines.append(f"  {f'{prefix}{item.name}={shown}':34} {item.metadata['doc']}")
        for item in dataclasses.fields(cls):
            if dataclasses.is_dataclass(item.type):
                section(f"{prefix}{item.name}", item.type, f"{prefix}{item.name}.")

    section("general", Config, "")
    for slot, choices in (("method", methods), ("network", networks)):
        for name, cls in choices.items():
            section(f"{slot}.name={name}", cls.Config, f"{slot}.")
    return "\n".join(lines)


def parse_seeds(text, key="seeds"):
    """Return the list of seeds in "0-63,100".

    Raises:
        ValueError: an empty or backward range, or a word that is no range.
    """
    seeds = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ValueError(f"{key}={text}: {part!r} is no seed; write 0-63 or 0-63,100")
        if dash and int(high) < int(low):
            raise ValueError(f"{key}={text}: {part!r} runs backwards; write {high}-{low}")
        seeds += range(int(low), int(high if dash else low) + 1)
    return seeds


class Stopped(Exception):
    """A signal ended the work early, all saved and said; the exit code is 128 + signal."""

    def __init__(self, signal):
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def run(main, argv=None):
    """Return the exit code of main(argv): 0 done, 2 the user's mistake, 1 anything else.

    A run that was stopped by a signal returns 128 + its number, as shells do; where main itself
    returns a whole number, that is the code.

    A ValueError or OSError raised by this package's own code is addressed to the user and becomes
    one line on stderr; one raised elsewhere is a defect and keeps its traceback.
    """
    try:
        code = main(sys.argv[1:] if argv is None else list(argv))
    except Stopped as stopped:
        return 128 + stopped.signal
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if not _raised_here(error):
            traceback.print_exc()
            return 1
        print(f"error: {' '.join(_spelled_out(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return code if isinstance(code, int) else 0


# What a user can do about a file that cannot be written or read.
REMEDIES = {
    errno.ENOSPC: "free some space there, or write to another disk",
    errno.EDQUOT: "free some space there, or write to another disk",
    errno.EROFS: "write to another folder",
    errno.EACCES: "make it accessible, or name another",
    errno.EPERM: "make it accessible, or name another",
}


def _spelled_out(error):
    """Return the text of an error; of a file's error the name, the reason and a remedy."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        remedy = REMEDIES.get(error.errno, "")
        return f"{error.filename}: {error.strerror}{'; ' if remedy else ''}{remedy}"
    return str(error)


@contextlib.contextmanager
def fits_memory(line):
    """Raise ValueError(line) in place of torch's many ways to say that memory does not suffice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # On a CPU and on MPS it is a RuntimeError that only its text tells from others.
        said = ("DefaultCPUAllocator", "out of memory", "Unable to allocate")
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in said):
            raise
        raise ValueError(line) from None


@contextlib.contextmanager
def told_of(name):
    """Add a name, say a file's, to the line of a user's error; a defect passes as it is."""
    try:
        yield
    except ValueError as error:
        if not _raised_here(error):
            raise
        raise ValueError(f"{error} ({name})") from None


def _raised_here(error):
    """Return whether the innermost frame lies in this repository (or the error names a file)."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    ours = _is_ours(frame.tb_frame.f_code.co_filename)
    return ours or (isinstance(error, OSError) and error.filename is not None)


def _is_ours(filename):
    """Return whether a source file belongs to this repository."""
    file = Path(filename).resolve()
    return any(file.is_relative_to(folder) for folder in OURS) or file in SCRIPTS


@contextlib.contextmanager
def told_warnings():
    """Print what this package warns of as one line each; the block gets the list of them."""
    told, show = [], warnings.showwarning

    def tell(message, category, filename, *rest):
        if not _is_ours(filename):
            return show(message, category, filename, *rest)
        if str(message) not in told:
            told.append(str(message))
            print(f"note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = tell
        yield told


def print_table(title, columns, rows):
    """Print a table; every cell is shown with str()."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # As Text: a :train: in a name is no emoji, and a [b] no markup.
    table = Table(title=Text(title), title_justify="left", min_width=min(len(title), 100))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
