"""The benchmark of cameras' pictures: what it writes, and that it goes on where it was."""

import json

import numpy as np
import pytest

from benchmarks import microscopes


def test_scenes_have_no_grain_and_differ():
    first, second = microscopes.scene(0, 64), microscopes.scene(1, 64)
    assert first.max() == 1 and first.min() > 0 and not np.array_equal(first, second)
    assert np.array_equal(first, microscopes.scene(0, 64))
    assert np.abs(np.diff(first, 2)).max() < 0.5


@pytest.mark.parametrize(
    ("word", "message"),
    [("sides=3", "sides=3: choose from model, only"), ("num=x", "num=x: must be a whole number")],
)
def test_bad_words_are_one_line(word, message, capsys):
    assert microscopes.main([word]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_rows_of_every_camera(tmp_path, capsys):
    words = ["only=scenes", "num=1", "side=128", "bm3d=false", f"out={tmp_path}"]
    assert microscopes.main(words) == 0
    rows = json.loads((tmp_path / "microscopes.json").read_text())["rows"]
    assert [tuple(row["camera"]) for row in rows] == list(microscopes.CAMERAS)
    for row in rows:
        assert row["found"] > row["noisy"] + 3 and row["told"] > row["noisy"] + 3
    shown = capsys.readouterr().out
    assert microscopes.main(words) == 0 and capsys.readouterr().out == shown  # nothing anew
