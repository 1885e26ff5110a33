import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from tests.helpers.paths import ROOT
from tests.helpers.processes import once, together
from tests.helpers.runs import assert_same, rows, state
from tests.helpers.tiny import TINY, last_words

WORDS = (
    "trainer.accumulate=2",
    "checkpoint.every=4",
    "network.dropout=0.1",
    "optim.rampup=40",
    "eval.loss_every=3",
    "data.flip=true",
)


@pytest.fixture(scope="module")
def straight(train_tiny):
    """A run of ten steps without a stop."""
    return train_tiny(*WORDS, "trainer.max_steps=10")


def resume(run, *words):
    assert train.main([f"resume={run}", *words]) == 0


def test_resume_after_a_normal_end_off_the_saving_schedule(train_tiny, straight):
    run = train_tiny(*WORDS, "trainer.max_steps=7")  # 7 is no multiple of checkpoint.every=4
    assert state(run)["step"] == 7
    resume(run, "trainer.max_steps=10")
    assert_same(state(run), state(straight))


def test_resume_from_a_moved_folder(train_tiny, straight, tmp_path):
    run = train_tiny(*WORDS, "trainer.max_steps=6")
    moved = tmp_path / "elsewhere"
    shutil.move(run, moved)
    resume(moved, "trainer.max_steps=10")
    assert_same(state(moved), state(straight))
    assert not run.exists()


def test_metrics_csv_goes_on_where_the_checkpoint_was(train_tiny, straight):
    run = train_tiny(*WORDS, "trainer.max_steps=6")
    lines = (run / "metrics.csv").read_text() + "9,9,9,9\n"  # written after the last checkpoint
    (run / "metrics.csv").write_text(lines)
    resume(run, "trainer.max_steps=10")
    assert rows(run) == rows(straight)
    assert [row["step"] for row in rows(run)] == [str(i) for i in range(1, 11)]
    assert [row["step"] for row in rows(run) if row["val/loss"]] == ["3", "6", "9"]


def words_of_a_run(out, *words):
    argv = [str(ROOT / "configs/edm_digits.yaml"), str(ROOT / "configs/debug.yaml"), *TINY]
    return last_words([*argv, f"out_dir={out}", "sample.every=0", *words])


def start(out, *words):
    argv = [sys.executable, "train.py", *words_of_a_run(out, *words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(out, step, process):
    """Return the run folder once it holds the checkpoint of this step."""
    for _ in range(1200):
        found = list(out.glob(f"*/*/checkpoints/step-{step:08d}.ckpt"))
        if found:
            return found[0].parent.parent
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("no checkpoint in a minute")


def test_resume_after_kill_9(train_tiny, tmp_path):
    process = start(tmp_path, *WORDS, "trainer.max_steps=100000", "checkpoint.every=1")
    run = wait_for_step(tmp_path, random.Random().randint(2, 6), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run / "checkpoints" / ".step-00000099.ckpt.partial").write_bytes(b"half a checkpoint")
    target = state(run)["step"] + 3
    resume(run, f"trainer.max_steps={target}")
    assert_same(state(run), state(train_tiny(*WORDS, f"trainer.max_steps={target}")))
    assert len(list((run / "checkpoints").iterdir())) == 3  # last and the two newest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(train_tiny, tmp_path, number):
    argv = words_of_a_run(tmp_path / "runs", *WORDS, "trainer.max_steps=100000")
    saved = tmp_path / "runs"
    during = once(
        lambda: list(saved.glob("*/*/checkpoints/step-00000004.ckpt")),
        lambda processes: os.kill(processes[0], number),
    )
    (ended,) = together(argv, tmp_path, devices=1, during=during)
    (run,), output = saved.glob("*/*"), ended.text
    assert ended.code == 128 + number, output
    assert f"python train.py resume={run}" in output
    stopped = state(run)["step"]
    assert f"stopped by {number.name} after step {stopped}" in output
    resume(run, f"trainer.max_steps={stopped + 2}")
    assert_same(state(run), state(train_tiny(*WORDS, f"trainer.max_steps={stopped + 2}")))


def test_max_time_saves(train_tiny):
    run = train_tiny("trainer.max_steps=100000", "trainer.max_time=1s", "checkpoint.every=1000000")
    assert 0 < state(run)["step"] < 100000


def test_one_and_two_processes_train_the_same_weights(train_tiny, tmp_path):
    # The two sum their gradients in another order, and Adam turns the rounding of a gradient near
    # zero into a step of up to lr (1e-5 apart after five steps at its usual eps); a larger eps
    # keeps rounding what it is. A wrong image, noise or scale is off by 1e-2 either way.
    words = (
        "data.batch_size=16",
        "trainer.accumulate=2",
        "trainer.max_steps=5",
        "optim.eps=1e-2",
        "eval.every=5",
        "eval.num=40",
        "eval.features=digits",
        "method.steps=2",
    )
    single = train_tiny(*words)
    one = state(single)
    process = start(tmp_path, *words, "trainer.devices=2", "trainer.strategy=ddp")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (run,) = tmp_path.glob("*/*")
    two = state(run)
    for name, tensor in one["raw"].items():
        torch.testing.assert_close(two["raw"][name], tensor, rtol=0, atol=1e-6)
    for name, tensor in one["ema"].items():
        torch.testing.assert_close(two["ema"][name], tensor, rtol=0, atol=1e-6)
    assert output.count("run: ") == 1
    # Each rank scored its half of the images with weights that differ by rounding.
    fd = [
        float(list(csv.DictReader(open(r / "metrics.csv")))[-1]["eval/fd_40"])
        for r in (single, run)
    ]
    assert fd[0] == pytest.approx(fd[1], rel=1e-3)


def test_keeps_only_the_newest_checkpoints(train_tiny):
    run = train_tiny("trainer.max_steps=5", "checkpoint.every=1", "checkpoint.keep=2")
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step-00000004.ckpt", "step-00000005.ckpt"]
