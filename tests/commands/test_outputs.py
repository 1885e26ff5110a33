"""No command writes over what it reads, over a run's own files, or over what is not its own."""

import os
import shutil

import numpy as np
import pytest
import torch

import evaluate
import sample
from genmodels import cli, images
from genmodels.checkpoint.exports import main as export
from genmodels.data import commands
from genmodels.run import check_output


@pytest.fixture(scope="module")
def place(tiny_run, tmp_path_factory):
    """A folder with a run, a picture, folders of pictures, arrays and a file of somebody's."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_run, folder / "run")
    assert cli.run(export, [str(tiny_run), f"out={folder}/export"]) == 0
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), np.uint8))
    (folder / "pictures").mkdir()
    for number, image in enumerate(pixels):
        images.write_png(folder / "pictures" / f"{number:06d}.png", image)
    for name in ("a", "b"):
        np.savez(folder / f"{name}.npz", images=pixels.permute(0, 2, 3, 1).numpy())
    os.link(folder / "a.npz", folder / "linked.npz")
    (folder / "pointer.npz").symlink_to("a.npz")
    (folder / "way").symlink_to(folder / "run" / "checkpoints")
    (folder / "run" / "ema").mkdir()
    for name in ("pipe.json", "pipe.npz"):
        os.mkfifo(folder / name)
    (folder / "mine.json").write_text('{"my": "notes"}')
    images.write_png(folder / "mine.png", pixels[0])
    return folder


SCORES = ["evaluate", "{run}", "reference={a}", "num=20", "steps=1", "metrics=fd,prc"]
FILES = ["evaluate", "images={a}", "reference={b}", "metrics=fd"]
REFUSED = {
    "stats over its images": (["evaluate", "stats", "images={a}", "out={a}"], "what the command"),
    "a hard link": (["evaluate", "stats", "images={a}", "out={here}/linked.npz"], "what the"),
    "a link": (["evaluate", "stats", "images={a}", "out={here}/pointer.npz"], "what the command"),
    "stats over other arrays": (
        ["evaluate", "stats", "images={a}", "out={b}"],
        "no earlier output",
    ),
    "images over the reference": ([*SCORES, "save_images={a}"], "what the command reads"),
    "images over other arrays": ([*SCORES, "save_images={b}"], "no earlier output"),
    "images over a folder": (
        ["evaluate", "{run}", "reference={pictures}", "num=40", "save_images={pictures}"],
        "what the command reads",
    ),
    "scores over a config": ([*SCORES, "out={run}/config.yaml"], "own files of the run"),
    "scores over a checkpoint": ([*SCORES, "out={run}/checkpoints/last.ckpt"], "own files of the"),
    "scores over a config in capitals": ([*SCORES, "out={run}/CONFIG.yaml"], "own files of the"),
    "scores among averages": ([*SCORES, "out={run}/ema/x.json"], "own files of the run"),
    "scores through a link": ([*SCORES, "out={here}/way/x.json"], "own files of the run"),
    "features among checkpoints": (
        [*FILES, "keep={run}/checkpoints/x.npz"],
        "own files of the run",
    ),
    "scores over a pipe": ([*FILES, "out={here}/pipe.json"], "no earlier output"),
    "images over a pipe": ([*SCORES, "save_images={here}/pipe.npz"], "no earlier output"),
    "scores among pictures": ([*SCORES, "out={run}/samples/x.json"], "own files of the run"),
    "scores over an export": (
        ["evaluate", "{export}", *SCORES[2:], "out={export}/model.safetensors"],
        "no earlier output",
    ),
    "scores over notes": ([*FILES, "out={here}/mine.json"], "no earlier output"),
    "scores over a device": ([*FILES, "out=/dev/null"], "no earlier output"),
    "a plot over a picture": ([*FILES, "plot={here}/mine.png"], "no earlier output"),
    "a plot over the scores": ([*FILES, "out={here}/x", "plot={here}/x"], "is plot= too"),
    "samples over a run": (["sample", "{run}", "num=1", "out={run}"], "what the command reads"),
    "samples among grids": (["sample", "{run}", "num=1", "out={run}/samples"], "own files of the"),
    "samples in an export": (["sample", "{export}", "num=1", "out={export}"], "what the command"),
    "samples over the known": (
        ["sample", "{run}", "inpaint={pictures}/000001.png", "mask={pictures}/000002.png"],
        "holds 00000",
    ),
    "an export among checkpoints": (["export", "{run}", "out={run}/checkpoints/x"], "own files of"),
    "convert among checkpoints": (
        ["data", "convert", "{a}", "out={run}/checkpoints/x.zip"],
        "own files of the run",
    ),
}
COMMANDS = {
    "evaluate": evaluate.main,
    "sample": sample.main,
    "export": lambda words: cli.run(export, words),
    "data": lambda words: cli.run(commands.main, words),
}


def run(place, words):
    names = {"here": place, "a": place / "a.npz", "b": place / "b.npz", "run": place / "run"}
    names |= {"pictures": place / "pictures", "export": place / "export"}
    command, *words = [word.format(**names) for word in words]
    return COMMANDS[command](words)


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line_and_nothing_is_written(place, capsys, what):
    words, says = REFUSED[what]
    if what == "samples over the known":
        words = [*words, "out={pictures}", "seeds=0-39"]
    before = files(place)
    assert run(place, words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(
        ("error: out=", "error: save_images=", "error: plot=", "error: keep=")
    ), errors
    assert says in errors and errors.count("\n") == 1, errors
    assert files(place) == before


def test_an_earlier_output_is_written_anew(place, tmp_path):
    """Each command twice; what lies beside a run's own files is allowed."""
    out = ["out={run}/scores.json", f"save_images={tmp_path}/made.npz", f"plot={tmp_path}/d.png"]
    for _ in range(2):
        assert run(place, [*SCORES, *out]) == 0
        assert run(place, ["evaluate", "stats", "images={a}", f"out={tmp_path}/s.npz"]) == 0
        assert run(place, ["sample", "{run}", "num=2", "steps=1", "out={run}/made"]) == 0
        words = ["num=2", "steps=1", "format=npz", f"out={tmp_path}"]
        assert run(place, ["sample", "{run}", *words]) == 0


def test_words_that_are_no_paths(tmp_path):
    check_output("out", tmp_path / "x", ["0-99", "a\0b", "digits:test", "1,2,3", ""])
    with pytest.raises(ValueError, match="what the command reads"):
        check_output("out", tmp_path / "x", [f"digits,{tmp_path}/x"])
