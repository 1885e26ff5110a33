"""Files and folders that appear whole."""

import os

import pytest

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
