"""A table of bad input: each case is one line with key, value and remedy, exit code 2, no file.

The cases are in bad_words.py, bad_data.py and bad_models.py of tests/helpers. In process; a dozen
again as real processes (slow).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import sample
import train
from genmodels import cli
from genmodels.checkpoint.exports import main as export_main
from genmodels.data import commands
from tests.helpers import bad_data, bad_models
from tests.helpers.bad_words import CASES
from tests.helpers.paths import ROOT

COMMANDS = {
    "train": train.main,
    "sample": sample.main,
    "evaluate": evaluate.main,
    "data": lambda argv: cli.run(commands.main, argv),
    "export": lambda argv: cli.run(export_main, argv),
}
SCRIPTS = {
    "train": [ROOT / "train.py"],
    "sample": [ROOT / "sample.py"],
    "evaluate": [ROOT / "evaluate.py"],
    "data": ["-m", "genmodels.data"],
    "export": ["-m", "genmodels.checkpoint"],
}

assert bad_data and bad_models  # which add their cases


@pytest.fixture(scope="module")
def run(tiny_run):
    return tiny_run


def prepare(name, folder, run):
    """Return (command, words, parts) of a case, its files made."""
    command, words, parts, make = CASES[name]
    if make is not None:
        make(*([folder, run] if make.__code__.co_argcount == 2 else [folder]))

    def fill(text):
        return text.replace("{dir}", str(folder)).replace("{run}", str(run))

    return command, [fill(word) for word in words], [fill(part) for part in parts]


def check(code, errors, parts, before, folder):
    assert code == 2, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    for part in parts:
        assert part in errors, errors
    assert files(folder) == before, "something was written"


def files(folder):
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", list(CASES))
def test_bad_input(name, run, tmp_path, capsys, monkeypatch, recwarn):
    monkeypatch.delenv("GENMODELS_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)  # Hugging Face's, whether here or not
    folder = tmp_path / "case"
    folder.mkdir()
    monkeypatch.chdir(folder)
    command, words, parts = prepare(name, folder, run)
    before = files(folder)
    capsys.readouterr()
    code = COMMANDS[command](words)
    check(code, capsys.readouterr().err, parts, before, folder)
    # pytest keeps warnings off stderr; in a process of its own each is more lines there.
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    assert not Path("/tmp/genmodels-evil").exists()


REAL = [
    "optim.lr=inf",
    "train-resume",
    "sample-missing",
    "evaluate-images",
    "export-exists",
    "picture-truncated",
    "labels-missing",
    "zip-slip",
    "npy-nan",
    "ckpt-pickle",
    "export-newer",
    "resume-truncated",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_bad_input_in_a_process_of_its_own(name, run, tmp_path):
    command, words, parts = prepare(name, tmp_path, run)
    before = files(tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GENMODELS_DATA": "", "PYTHONPATH": ROOT}
    done = subprocess.run(
        [sys.executable, *SCRIPTS[command], *words],
        cwd=tmp_path,
        env=environment,
        timeout=300,
        capture_output=True,
        text=True,
    )
    check(done.returncode, done.stderr, parts, before, tmp_path)


def test_the_table_is_long_enough():
    assert len(CASES) >= 100 and set(REAL) <= set(CASES)
