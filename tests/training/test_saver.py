import csv
import os

import pytest
import torch

from genmodels.training import saver as saving


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_csv_grows_columns_and_cuts_to_a_step(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = saving.CSVMetrics(path)
    logger.log_metrics({"train/loss": 1.0, "epoch": 0}, 0)
    logger.log_metrics({"train/loss": torch.tensor(0.5)}, 1)
    logger.log_metrics({"eval/fd": 3.0}, 1)
    assert read(path) == [
        {"step": "1", "train/loss": "1", "eval/fd": ""},
        {"step": "2", "train/loss": "0.5", "eval/fd": "3"},
    ]
    again = saving.CSVMetrics(path, first_step=1)
    again.log_metrics({"train/loss": 0.25}, 1)
    assert [row["train/loss"] for row in read(path)] == ["1", "0.25"]


def test_a_steps_line_is_written_before_its_checkpoint(train_tiny, monkeypatch):
    """A kill right after a checkpoint would else lose the line: a resumed run begins after it."""
    seen, save = {}, saving.Saver.save

    def look(saver, trainer):
        with open(saver.run.metrics, newline="") as file:
            seen[trainer.global_step] = {row["step"]: row for row in csv.DictReader(file)}
        save(saver, trainer)

    monkeypatch.setattr(saving.Saver, "save", look)
    words = (
        "trainer.max_steps=4",
        "checkpoint.every=2",
        "trainer.log_every=1",
        "eval.loss_every=2",
    )
    run = train_tiny(*words)
    with open(run / "metrics.csv", newline="") as file:
        whole = {row["step"]: row for row in csv.DictReader(file)}
    for step in (2, 4):
        early = {k: v for k, v in seen[step][str(step)].items() if v}
        late = {k: v for k, v in whole[str(step)].items() if v and not k.startswith("val/")}
        assert "train/loss" in early and early == late


def test_a_table_with_other_line_ends_is_the_same_and_a_pipe_is_refused(tmp_path):
    plain, other, pipe = (tmp_path / name for name in ("a.csv", "b.csv", "c.csv"))
    plain.write_bytes(b"step,loss\n1,0.5\n2,0.25\n3,0.1")
    other.write_bytes(plain.read_bytes().replace(b"\n", b"\r\n"))
    assert saving.read_table(other) == saving.read_table(plain) and set(
        saving.read_table(other)
    ) == {1, 2}
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="is no plain file"):
        saving.read_table(pipe)
