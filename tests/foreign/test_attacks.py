"""Every reader of foreign files against the corpus in tests/helpers/attacks.py: one line each."""

import resource
import time

import pytest

from tests.helpers.attacks import ATTACKS, READERS

LIMIT = 400 << 20  # bytes a reader may take beyond what the tests hold
SECRET = "s3cret-w0rd"


@pytest.fixture
def little_memory():
    """Let this process take no more than LIMIT beyond what it has."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def marked(name):
    return pytest.param(name, marks=pytest.mark.slow) if ATTACKS[name].slow else name


@pytest.mark.parametrize("name", [marked(name) for name in ATTACKS])
def test_attack_is_one_line(name, tmp_path, monkeypatch, little_memory):
    monkeypatch.setenv("GENMODELS_SECRET", SECRET)
    row = ATTACKS[name]
    path = row.make(tmp_path)
    started = time.monotonic()
    with pytest.raises((ValueError, OSError)) as caught:
        READERS[row.reader](path)
    line = str(caught.value)
    assert time.monotonic() - started < 20
    assert type(caught.value) in (ValueError, OSError) or isinstance(caught.value, ValueError)
    for part in row.parts:
        assert part in line, line
    assert SECRET not in line
    assert "allocate" not in line and "memory" not in line, line
    assert len(line) < 2000


def test_every_reader_is_attacked():
    assert {row.reader for row in ATTACKS.values()} == set(READERS)
