"""The JSON file of a benchmark: what was run, on what, with which versions, and what came out."""

import json

from genmodels.atomic import write_bytes
from genmodels.config import check
from genmodels.evaluation.report import machine, versions


def command_line(name, argv, without=()):
    """Return "python -m benchmarks.NAME WORDS", less the words of keys that change no number."""
    words = (word for word in argv if word.partition("=")[0] not in without)
    return " ".join([f"python -m benchmarks.{name}", *words])


def write(path, command, **facts):
    """Write the facts beside command, machine and versions, all or nothing; return all of it."""
    record = {"command": command, "machine": machine(), "versions": versions()} | facts
    write_bytes(path, (json.dumps(record, indent=1) + "\n").encode())
    return record


def rows(path, command):
    """Return the rows already there; ValueError if another command, so other settings, made them.

    An interrupted command goes on behind them.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    check_same(found["command"], command, "out", path)
    return found["rows"]


def check_same(told, command, key, path):
    """Raise ValueError if what is at the path was made by another command."""
    check(told == command, key, path, f"has the results of `{told}`; name another")


def once(path, make):
    """Return what is in a JSON file, made and written first if it is not there."""
    if not path.is_file():
        write_bytes(path, json.dumps(make(), indent=1).encode())
    return json.loads(path.read_text())


def last_words(words):
    """Return the words of a command line, of each key only the last: a command refuses two values.

    A benchmark's own words come first, those of its command line after them.
    """
    words = [str(word) for word in words]
    keys = [word.partition("=")[0] for word in words]
    return [w for i, w in enumerate(words) if "=" not in w or keys[i] not in keys[i + 1 :]]
