"""Two trainings in one folder, readers that go away, terminals that close, steps made already."""

import os
import signal
import subprocess
import sys
import time

import pytest

import evaluate
import train
from genmodels import cli
from genmodels.atomic import make_folder
from genmodels.run import Run
from tests.helpers.paths import ROOT
from tests.helpers.runs import assert_same, state
from tests.helpers.tiny import TINY, last_words

DEBUG = [str(ROOT / "configs/edm_digits.yaml"), str(ROOT / "configs/debug.yaml"), *TINY]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(*words, **streams):
    return subprocess.Popen(
        [sys.executable, "train.py", *last_words(words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams,
    )


def wait_for(out, pattern, process):
    for _ in range(1200):
        found = sorted(out.glob(pattern))
        if found:
            return found[0]
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError(f"no {pattern} in a minute")


def test_a_second_training_is_one_line(train_tiny, capsys):
    run = train_tiny("trainer.max_steps=2")
    before = files(run)
    with Run(run).lock():
        assert train.main([f"resume={run}", "trainer.max_steps=4"]) == 2
    errors = capsys.readouterr().err
    assert errors == (
        f"error: resume={run}: another process is at work there ({os.getpid()}); wait for it or "
        "stop it\n"
    )
    assert files(run) == before
    assert train.main([f"resume={run}", "trainer.max_steps=4"]) == 0  # the lock was let go


def test_a_lock_is_not_held_on_by_a_child(tmp_path):
    """A process that reads images may outlive its killed parent for some seconds."""
    run = Run(tmp_path)
    reading, writing = os.pipe()
    with run.lock():
        child = os.fork()
        if not child:
            os.write(writing, b"1")
            time.sleep(30)
            os._exit(0)
        os.read(reading, 1)
    try:
        with run.lock():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("make", [lambda p, mine: p.symlink_to(mine), lambda p, _: os.mkfifo(p)])
def test_a_lock_that_is_none_is_not_written(tmp_path, make):
    """In a run from elsewhere it may lead to any file of the user, or to a pipe."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / ".lock", mine)
    with pytest.raises(OSError, match="lock"), Run(tmp_path / "run").lock():
        pass
    assert mine.read_text() == "mine"


def test_fewer_steps_than_were_made_are_refused(train_tiny, capsys):
    run = train_tiny("trainer.max_steps=4")
    before = files(run)
    assert train.main([f"resume={run}", "trainer.max_steps=2"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: trainer.max_steps=2: {run} has made 4 steps already")
    assert files(run) == before
    assert train.main([f"resume={run}"]) == 0
    assert "all 4 steps are done; trainer.max_steps= asks for more" in capsys.readouterr().out


class Gone:
    """A pipe whose reader has gone, or a full disk."""

    def __init__(self, number):
        self.number = number

    def write(self, text=""):
        raise OSError(self.number, os.strerror(self.number))

    flush = write

    def fileno(self):
        raise OSError


@pytest.mark.parametrize(("number", "code"), [(32, 0), (5, 0), (28, 1)])
def test_work_goes_on_without_a_reader(monkeypatch, capsys, number, code):
    """Broken pipe, closed terminal: nothing is amiss; of a full disk it is said."""
    done = []

    def main(argv):
        print("a line", flush=True)
        done.append(argv)

    monkeypatch.setattr(sys, "stdout", Gone(number))
    assert cli.run(main, ["word"]) == code
    assert done == [["word"]]
    assert ("No space left" in capsys.readouterr().err) == bool(code)


def test_evaluate_writes_before_it_prints(tiny_run, tmp_path, monkeypatch):
    def gone(*args):
        raise RuntimeError

    monkeypatch.setattr(cli, "print_table", gone)
    out = tmp_path / "scores.json"
    words = [str(tiny_run), "num=20", "metrics=fd", "steps=1", "features=digits", f"out={out}"]
    assert evaluate.main(words) == 1
    assert out.is_file()


def test_folders_that_cannot_be_made_leave_nothing(tmp_path, capsys):
    for words in (
        [f"out_dir={tmp_path}/a/{'x' * 300}"],
        [f"out_dir={tmp_path}/b", "name=" + "y" * 300],
    ):
        assert train.main([*DEBUG, *words]) == 2
        errors = capsys.readouterr().err
        assert "too long" in errors and errors.count("\n") == 1
    with pytest.raises(OSError, match="too long"):
        make_folder(tmp_path / "c" / "d" / ("z" * 300))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no such machine")

    monkeypatch.setattr("genmodels.training.fit.L.Trainer", fail)
    assert train.main([*DEBUG, f"out_dir={tmp_path}/runs"]) == 1
    assert "no such machine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_reader_of_a_training_goes_away(tmp_path, train_tiny):
    """train.py ... | head -1: as long as it takes, and saved."""
    words = [
        "sample.every=0",
        "trainer.max_steps=6",
        "trainer.progress=true",
        "trainer.log_every=1",
    ]
    process = start(*DEBUG, *words, f"out_dir={tmp_path}")
    assert "M parameters" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0, process.stderr.read()
    process.stderr.close()
    (run,) = tmp_path.glob("*/*")
    assert_same(state(run), state(train_tiny("trainer.max_steps=6")))


@pytest.mark.slow
def test_a_terminal_closes(tmp_path, train_tiny):
    """SIGHUP, then nothing can be written: saved, and exit code 129."""
    words = ["sample.every=0", "trainer.max_steps=100000", "checkpoint.every=2"]
    process = start(*DEBUG, *words, f"out_dir={tmp_path}")
    run = wait_for(tmp_path, "*/*/checkpoints/last.ckpt", process).parents[1]
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    step = state(run)["step"]
    assert_same(state(run), state(train_tiny(f"trainer.max_steps={step}")))


@pytest.mark.slow
def test_nohup_is_respected(tmp_path):
    words = ["sample.every=0", "trainer.max_steps=100000", "checkpoint.every=2"]
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process = start(*DEBUG, *words, f"out_dir={tmp_path}", preexec_fn=ignore)
    wait_for(tmp_path, "*/*/checkpoints/last.ckpt", process)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped by SIGTERM" in output


@pytest.mark.slow
def test_two_trainings_of_one_run(tmp_path, train_tiny):
    """The second ends with one line, the first goes on; after kill -9 nothing blocks."""
    words = ["sample.every=0", "trainer.max_steps=100000", "checkpoint.every=2"]
    first = start(*DEBUG, *words, f"out_dir={tmp_path}")
    run = wait_for(tmp_path, "*/*/checkpoints/last.ckpt", first).parents[1]
    second = start(f"resume={run}")
    errors = second.communicate(timeout=120)[1]
    assert second.returncode == 2
    assert errors.startswith(f"error: resume={run}: another process is at work there ({first.pid})")
    assert errors.count("\n") == 1 and first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    step = state(run)["step"] + 2
    assert train.main([f"resume={run}", f"trainer.max_steps={step}"]) == 0
    assert_same(state(run), state(train_tiny(f"trainer.max_steps={step}")))
