"""Files and folders that appear whole."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file

from genmodels import atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a"
    atomic.write_bytes(path, b"old")
    for flush in (True, False):
        with pytest.raises(RuntimeError), atomic.whole_file(path, flush=flush) as file:
            file.write(b"half")
            assert path.read_bytes() == b"old"
            raise RuntimeError
        assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]
    with atomic.whole_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a"]


def test_json_has_null_for_what_is_not_finite(tmp_path):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    scores = {"psnr": math.inf, "rows": [1.5, {"x": math.nan}, (2, "inf")]}
    atomic.write_json(tmp_path / "a", scores)
    found = json.loads((tmp_path / "a").read_text(), parse_constant=refuse)
    assert found == {"psnr": None, "rows": [1.5, {"x": None}, [2, "inf"]]}


def test_a_folder_appears_when_the_block_ends(tmp_path):
    out = tmp_path / "above" / "out"
    with pytest.raises(RuntimeError), atomic.new_folder(out) as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert names(tmp_path / "above") == []
    with atomic.new_folder(out) as folder:
        (folder / "file").write_text("whole")
        assert not out.exists()
    assert names(out) == ["file"] and names(tmp_path / "above") == ["out"]
    with pytest.raises(OSError, match="out"), atomic.new_folder(out) as folder:
        (folder / "file").write_text("other")
    assert (out / "file").read_text() == "whole" and names(tmp_path / "above") == ["out"]


@pytest.mark.parametrize("links", [True, False])
def test_a_link_takes_the_place_of_an_older_one(tmp_path, monkeypatch, links):
    for name in "ab":
        (tmp_path / name).write_text(name)
    (tmp_path / ".last.partial").write_text("of a killed process")

    def refuse(*_):
        raise OSError("no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for name in "ab":
        atomic.link(tmp_path / name, tmp_path / "last")
        assert (tmp_path / "last").read_text() == name
        assert (tmp_path / "last").samefile(tmp_path / name) == links
    assert names(tmp_path) == ["a", "b", "last"]


def test_processes_that_write_the_same_thing_take_names_of_their_own(tmp_path):
    with atomic.whole_path(tmp_path / "a", several=True) as partial:
        assert partial.name == f".a.{os.getpid()}.partial"
        partial.write_text("a")
    assert names(tmp_path) == ["a"]


def test_errors_name_the_file_that_was_meant(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        atomic.write_bytes(tmp_path / "none" / "a", b"")
    assert caught.value.filename == str(tmp_path / "none" / "a")


def test_what_killed_writes_left_is_removed(tmp_path):
    (tmp_path / ".a.partial").write_text("half")
    (tmp_path / ".b.123.partial").mkdir()
    (tmp_path / "c").write_text("whole")
    atomic.remove_partial(tmp_path)
    assert names(tmp_path) == ["c"]


@pytest.fixture
def umask():
    """Return a function that sets the umask until the test ends."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_read_by_whom_the_umask_lets(tmp_path, umask, mask, mode):
    """Whatever library writes them: safetensors makes files for their owner alone."""
    umask(mask)
    save_file({"x": torch.zeros(1)}, tmp_path / "by itself")
    assert (tmp_path / "by itself").stat().st_mode & 0o777 == 0o600  # or new_folder need not mend
    with atomic.new_folder(tmp_path / "folder") as folder:
        save_file({"x": torch.zeros(1)}, folder / "weights")
        (folder / "below").mkdir()
        save_file({"x": torch.zeros(1)}, folder / "below" / "weights")
        (folder / "script").write_text("")
        (folder / "script").chmod(0o755)
        (folder / "elsewhere").symlink_to(tmp_path / "by itself")
    atomic.write_bytes(tmp_path / "bytes", b"")
    for several in (True, False):
        with atomic.whole_path(tmp_path / f"path {several}", several=several) as partial:
            partial.write_bytes(b"")
    atomic.link(tmp_path / "bytes", tmp_path / "link")
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert found.pop("folder") == 0o777 & ~mask and found.pop("by itself") == 0o600
    assert set(found.values()) == {mode}, found
    weights = sorted((tmp_path / "folder").rglob("weights"))
    assert [path.stat().st_mode & 0o777 for path in weights] == [mode, mode]
    assert (tmp_path / "folder" / "script").stat().st_mode & 0o777 == 0o755
