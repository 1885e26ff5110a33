"""What a run has come to: its weights, its table; and whether two are the same, bit for bit."""

import csv

import torch

from genmodels.checkpoint import read_checkpoint


def state(run):
    """Return the raw weights, EMA, optimizer, schedule and counters of a run's last checkpoint."""
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    return {
        "step": checkpoint["global_step"],
        "ema": checkpoint["state_dict"],
        "raw": checkpoint.get("current_model_state"),
        "averaging": checkpoint.get("averaging_state"),
        "optimizer": [optimizer["state"] for optimizer in checkpoint["optimizer_states"]],
        "schedule": checkpoint["lr_schedulers"],
    }


def rows(run):
    """Return the lines of a run's metrics.csv without the seconds in them."""
    with open(run / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def assert_same(a, b, path=""):
    """Compare nested dicts, lists and tensors bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{path}: differs"
    else:
        assert a == b, f"{path}: {a} != {b}"
