"""Faults that are put into files and between writes, and what came of them.

    python -m tests.helpers.faults out=benchmarks/results/faults.json

trains a tiny EDM on the digits, spoils copies of its run, goes on with each, and counts: a fault is
noticed (refused, or said and mended), harmless (the end is the same, bit for bit) or silent.
"""

import contextlib
import datetime
import errno
import io
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from tests.helpers.paths import ROOT
from tests.helpers.runs import assert_same, rows, state
from tests.helpers.tiny import TINY, last_words

SEED = 0


def flip(path, bit):
    """Turn one bit of a file, a number from 0 to 8 times its bytes."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.unlink()  # a checkpoint of a step and the last one are the same file
    path.write_bytes(data)


def cut(path, size):
    """Leave a file the first bytes alone."""
    data = path.read_bytes()[:size]
    path.unlink()
    path.write_bytes(data)


def _bytes_of_records(path):
    """Return the spans of what a zip's records hold, without what zip says of them."""
    data, spans = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            begin = record.header_offset
            names = data[begin + 26 : begin + 28], data[begin + 28 : begin + 30]
            start = begin + 30 + sum(int.from_bytes(size, "little") for size in names)
            spans.append(range(start, start + record.compress_size))
    return len(data), spans


def bits_of_records(path, number, seed):
    """Return random bits of what the records of a zip hold."""
    _, spans = _bytes_of_records(path)
    inside = [position for span in spans for position in span]
    chance = random.Random(seed)
    return [8 * position + chance.randrange(8) for position in chance.sample(inside, number)]


def bits_of_the_rest(path, number, seed):
    """Return random bits of a zip's names, sizes, dates and gaps."""
    size, spans = _bytes_of_records(path)
    outside = sorted({*range(size)}.difference(*spans))
    chance = random.Random(seed)
    return [8 * position + chance.randrange(8) for position in chance.sample(outside, number)]


class Killed(BaseException):
    """Stands for kill -9: nothing in the package catches it."""


@contextlib.contextmanager
def failing_replace(number, error):
    """Raise this in place of the n-th renaming of a finished file; the block gets the names."""
    replace, names = Path.replace, []

    def fail(path, target):
        names.append(target)
        if len(names) == number:
            raise error
        return replace(path, target)

    Path.replace = fail
    try:
        yield names
    finally:
        Path.replace = replace


def train(words):
    """Return (exit code, what was said) of a training in this process."""
    from genmodels.commands.train import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(word) for word in words])
    return code, said.getvalue()


def same(run, whole):
    """Return whether two runs ended alike, bit for bit, tables too."""
    try:
        assert_same(state(run), state(whole))
    except AssertionError:
        return False
    return rows(run) == rows(whole)


def spoil(run, fault):
    """Put a fault (kind, number) into the last checkpoint of a run."""
    kind, number = fault
    last = run / "checkpoints" / "last.ckpt"
    newest = max((run / "checkpoints").glob("step-*.ckpt"))
    if kind == "missing":
        last.unlink()
        return
    (cut if kind == "cut" else flip)(last, number)
    newest.unlink()
    os.link(last, newest)  # as they were: one file


def count_faults(folder):
    """Return {kind: {"injected", "noticed", "harmless", "silent"}}; works in an empty folder."""
    words = [ROOT / "configs/edm_digits.yaml", ROOT / "configs/debug.yaml", *TINY, "sample.every=0"]
    words += ["eval.loss_every=2", "trainer.max_steps=6"]

    def new(name, *more):
        code, said = train(last_words([*words, f"out_dir={folder}/{name}", *more]))
        (run,) = (folder / name).glob("*/*")
        return run, code, said

    whole, early = new("whole")[0], new("early", "trainer.max_steps=4")[0]
    last = early / "checkpoints" / "last.ckpt"
    size, chance = last.stat().st_size, random.Random(SEED)
    faults = [("flip in a record", bit) for bit in bits_of_records(last, 24, SEED)]
    faults += [("flip elsewhere", bit) for bit in bits_of_the_rest(last, 24, SEED)]
    faults += [("cut", chance.randrange(size)) for _ in range(12)] + [("missing", 0)]
    counts = {}

    def note(kind, noticed, right):
        names = ("injected", "noticed", "harmless", "silent", "lost")
        row = counts.setdefault(kind, dict.fromkeys(names, 0))
        row["injected"] += 1
        row["noticed" if noticed else "harmless" if right else "silent"] += 1
        row["lost"] += not right

    for fault in faults:
        run = folder / "spoilt"
        shutil.copytree(early, run)
        spoil(run, fault)
        code, said = train([f"resume={run}", "trainer.max_steps=6"])
        note(fault[0], bool(code or said), code == 0 and same(run, whole))
        shutil.rmtree(run)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for kind, error in (("kill at a write", Killed()), ("full disk at a write", full)):
        for number in range(2, 12):
            name, stopped = f"{kind[:4]}{number}", False
            with contextlib.suppress(Killed), failing_replace(number, error) as names:
                _, code, said = new(name)
                stopped = bool(code and said)
            assert len(names) >= number, "there are not so many writes"
            (run,) = (folder / name).glob("*/*")
            code, _ = train([f"resume={run}", "trainer.max_steps=6"])
            note(kind, stopped, code == 0 and same(run, whole))
    return counts


def main(argv):
    """Write the counts as JSON."""
    (word,) = argv
    out = word.removeprefix("out=")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        counts = count_faults(Path(folder))
    record = {
        "command": f"python -m tests.helpers.faults {word}",
        "seed": SEED,
        "counts": counts,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    Path(out).write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
