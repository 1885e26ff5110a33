"""What a run goes on from: damaged and missing checkpoints, spoilt tables, missed losses."""

import re
import shutil
import warnings

import pytest

import genmodels
import sample
import train
from genmodels.config import load_config, to_plain
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS
from genmodels.run import Run
from genmodels.training.resume import check_same, resumed_config, warn_of_dealing
from genmodels.training.saver import CSVMetrics
from genmodels.training.start import flat
from tests.helpers.faults import cut, flip
from tests.helpers.paths import ROOT
from tests.helpers.runs import assert_same, rows, state

WORDS = ("trainer.max_steps=4", "checkpoint.every=2", "eval.loss_every=2", "trainer.log_every=1")


@pytest.fixture(scope="module")
def whole(train_tiny):
    """A run of four steps with the checkpoints of steps 2 and 4."""
    return train_tiny(*WORDS)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it to be spoilt; last.ckpt and the newest step are one file, as they were."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    last, newest = run / "checkpoints/last.ckpt", run / "checkpoints/step-00000004.ckpt"
    newest.unlink()
    newest.hardlink_to(last)
    return run


def damage(run):
    last = run / "checkpoints" / "last.ckpt"
    return {
        "missing": last.unlink,
        "cut": lambda: cut(last, 50_000),
        "flipped": lambda: flip(last, 8 * 60_000),
        "empty": lambda: cut(last, 0),
    }


@pytest.mark.parametrize(
    "how",
    ["flipped", *(pytest.param(h, marks=pytest.mark.slow) for h in ("missing", "cut", "empty"))],
)
def test_a_damaged_last_checkpoint_gives_way_to_the_newest_step(whole, copy, capsys, how):
    (copy / "checkpoints/step-00000004.ckpt").unlink()
    damage(copy)[how]()
    assert sample.main([str(copy), "num=1", "steps=1", f"out={copy}/out"]) == 0
    errors = capsys.readouterr().err
    assert errors.startswith(f"note: model={copy}/checkpoints/last.ckpt: ")
    assert errors.endswith("; step-00000002.ckpt is taken in its place\n"), errors
    assert train.main([f"resume={copy}"]) == 0
    assert "step-00000002.ckpt is taken in its place" in capsys.readouterr().err
    assert_same(state(copy), state(whole))
    assert rows(copy) == rows(whole)


@pytest.mark.slow
def test_a_newer_step_than_a_lost_last_checkpoint(whole, copy, capsys):
    """The step of the same number: nothing to be done, and nothing lost."""
    (copy / "checkpoints" / "last.ckpt").unlink()
    assert train.main([f"resume={copy}", "trainer.max_steps=6"]) == 0
    assert "step-00000004.ckpt is taken in its place" in capsys.readouterr().err
    names = sorted(path.name for path in (copy / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step-00000004.ckpt", "step-00000006.ckpt"]
    assert [row["step"] for row in rows(copy)] == list("123456")


@pytest.mark.slow
def test_what_is_saved_stays_though_later_steps_lie_there(copy, whole):
    """From an earlier checkpoint put in the place of the last one: the new ones are kept."""
    folder = copy / "checkpoints"
    shutil.copy(folder / "step-00000004.ckpt", folder / "step-00000008.ckpt")
    shutil.copy(folder / "step-00000004.ckpt", folder / "step-00000009.ckpt")
    shutil.copy(folder / "step-00000002.ckpt", folder / "early")
    (folder / "early").replace(folder / "last.ckpt")
    (folder / "step-00000004.ckpt").unlink()
    assert train.main([f"resume={copy}", "checkpoint.keep=1"]) == 0
    names = sorted(path.name for path in folder.iterdir())
    steps = ["step-00000004.ckpt", "step-00000008.ckpt", "step-00000009.ckpt"]
    assert names == ["last.ckpt", *steps]
    assert_same(state(copy), state(whole))


def test_lost_checkpoints_are_no_new_beginning(copy, capsys):
    before = (copy / "metrics.csv").read_bytes(), (copy / "config.yaml").read_bytes()
    for path in (copy / "checkpoints").iterdir():
        path.unlink()
    assert train.main([f"resume={copy}", "trainer.max_steps=9"]) == 2
    errors = capsys.readouterr().err
    assert f"resume={copy}: metrics.csv reaches step 4, but no checkpoint is there" in errors
    assert errors.count("\n") == 1
    assert ((copy / "metrics.csv").read_bytes(), (copy / "config.yaml").read_bytes()) == before


def test_no_checkpoint_can_be_read(copy, capsys):
    for path in (copy / "checkpoints").iterdir():
        cut(path, 1000)
    assert train.main([f"resume={copy}"]) == 2
    errors = capsys.readouterr().err
    assert "last.ckpt: not a checkpoint of genmodels" in errors and errors.count("\n") == 1
    with pytest.raises(ValueError, match=r"last\.ckpt: not a checkpoint of genmodels"):
        genmodels.load(copy)


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_begins_anew_and_says_so(copy, whole, capsys):
    """The line of a step is written before its checkpoint."""
    for path in (copy / "checkpoints").iterdir():
        path.unlink()
    lines = (copy / "metrics.csv").read_text().splitlines(keepends=True)
    (copy / "metrics.csv").write_text("".join(lines[:3]))  # to step 2
    assert train.main([f"resume={copy}"]) == 0
    assert f"note: {copy}: no checkpoint yet, training begins anew" in capsys.readouterr().err
    assert_same(state(copy), state(whole))


SPOILT = {  # how metrics.csv is spoilt, what is said of it
    "last cell cut": (lambda t: t.rstrip()[:-3], "the lines after step 3 are missing or cut"),
    "last line cut": (lambda t: t[: t.rindex("\n4,") + 3], "the lines after step 3 are missing"),
    "a step cut": (lambda t: t + "1", ""),
    "no newline": (lambda t: t[:-1], "the lines after step 3 are missing or cut"),
    "cut between lines": (lambda t: t[: t.index("\n3,") + 1], "the lines after step 2 are missing"),
    "missing": (None, "the lines after step 0 are missing"),
    "empty": (lambda t: "", "is empty; mend it, or delete it to go on"),
    "no header": (lambda t: t.partition("\n")[2], "has no header; mend it"),
    "cut header": (lambda t: t[:10], "has no header; mend it"),
    "a step twice": (lambda t: t + t.splitlines()[2] + "\n", "line 6 is not that of a later step"),
    "short line": (lambda t: t.replace("\n2,", "\n2\n3,"), "line 3 has 1 of 15 cells"),
    "a word": (lambda t: t.replace("\n2,", "\n2,word"), "line 3 is not that of a later step"),
    "a blank line": (lambda t: t.replace("\n2,", "\n\n2,"), "line 3 is not that of a later step"),
    "long field": (lambda t: t.replace("\n2,", "\n2," + "1" * 200_000), "cannot be read (field"),
    "NUL": (lambda t: t.replace("\n2,", "\n2,\0"), "line 3 is not that of a later step"),
    "not UTF-8": (lambda t: t.encode() + b"\xff\xfe\n", "cannot be read ('utf-8' codec"),
    "a step in tenths": (lambda t: t.replace("\n2,", "\n2.5,"), "line 3 is not that of a later"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_table_is_one_line(copy, how):
    spoil, says = SPOILT[how]
    path, text = copy / "metrics.csv", (copy / "metrics.csv").read_text()
    if spoil is None:
        path.unlink()
    else:
        spoilt = spoil(text)
        path.write_bytes(spoilt.encode() if isinstance(spoilt, str) else spoilt)
    run = Run(copy)
    cfg = resumed_config(run, {"trainer.max_steps": "5"})
    refused = bool(says) and not says.startswith("the lines")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if refused:
            with pytest.raises(ValueError, match=f"^metrics.csv={path}: .*{re.escape(says)}"):
                check_same(cfg, run)
        else:
            assert check_same(cfg, run) == (4, run.last)
    notes = [str(warning.message) for warning in caught]
    assert len(notes) == bool(says and not refused) and all(says in note for note in notes)
    if not refused:
        kept = CSVMetrics(path, 4)
        kept.save()
        lines = path.read_text().splitlines() if kept.rows else []
        assert set(lines) <= set(text.splitlines())  # no cut number came in


def test_a_spoilt_table_is_said_by_the_command(copy, capsys):
    path = copy / "metrics.csv"
    text = path.read_text()
    path.write_text(text.replace("\n2,", "\n2,word"))
    assert train.main([f"resume={copy}", "trainer.max_steps=5"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: metrics.csv={path}: line 3") and errors.count("\n") == 1
    path.write_text(text[:-3])
    assert train.main([f"resume={copy}", "trainer.max_steps=4"]) == 0
    errors = capsys.readouterr().err
    assert errors.startswith(f"note: {path}: the lines after step 3") and errors.count("\n") == 1


@pytest.mark.slow
def test_a_cosine_may_end_sooner_and_not_later(train_tiny, tmp_path, capsys):
    run = tmp_path / "run"
    words = ("optim.decay=cosine", "checkpoint.every=2", "trainer.max_steps=6")
    shutil.copytree(train_tiny(*words), run)
    (run / "checkpoints/last.ckpt").unlink()
    (run / "checkpoints/step-00000006.ckpt").unlink()  # as if it had been stopped at step 4
    assert train.main([f"resume={run}", "trainer.max_steps=5"]) == 0
    said = "optim.decay=cosine was laid out for 6 steps; lr drops at step 4 to end sooner"
    assert f"note: trainer.max_steps=5: {said}\n" in capsys.readouterr().err
    assert state(run)["schedule"][0]["_last_lr"] == [0.0]  # 0.5 (1 + cos pi)
    assert train.main([f"resume={run}", "trainer.max_steps=6"]) == 2
    assert "laid out for 5 steps, and lr would rise again" in capsys.readouterr().err


@pytest.mark.slow
def test_a_missed_held_out_loss_is_measured_on_resume(whole, train_tiny, copy):
    """As after a kill between a checkpoint and its step's held-out loss; bit for bit."""
    run = train_tiny(*WORDS[1:], "trainer.max_steps=6")
    text = (copy / "metrics.csv").read_text()
    lines = [line.split(",") for line in text.splitlines()]
    columns = [i for i, name in enumerate(lines[0]) if name.startswith("val/")]
    assert columns and all(lines[4][i] for i in columns)
    for i in columns:
        lines[4][i] = ""
    (copy / "metrics.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    assert train.main([f"resume={copy}", "trainer.max_steps=6"]) == 0
    assert rows(copy) == rows(run)
    assert_same(state(copy), state(run))


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("edm_digits", "noise; rounding will differ"),
        ("energy_digits", "noise; pairs of method.coupling=ot, which images have chains"),
        ("interpolant_digits", "noise; pairs of method.coupling=ot, rounding"),
        ("gedi_mnist_cpu", "noise; which chains of the buffer go on, their noise"),
    ],
)
def test_what_depends_on_the_number_of_processes_is_said(name, differs):
    one, two = (
        load_config([ROOT / f"configs/{name}.yaml"], words, methods=METHODS, networks=NETWORKS)
        for words in ([], ["trainer.devices=2"])
    )
    with pytest.warns(UserWarning, match=r"^trainer.devices=2 \(was 1\): ") as said:
        warn_of_dealing(flat(to_plain(one)), two)
    assert differs in str(said[0].message)
