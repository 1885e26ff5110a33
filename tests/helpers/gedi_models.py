"""Small GEDI models and runs, for the tests of GEDI."""

import torch

import genmodels
import train
from genmodels.checkpoint import read_checkpoint
from tests.helpers.paths import ROOT
from tests.helpers.tiny import last_words

POINTS = {
    "data": {"name": "moons", "batch_size": 32},
    "network": {"name": "perceptron"},
    "method": {"name": "gedi"},
}
SMALL = (
    "network.width=16",
    "method.buffer=64",
    "method.chain_steps=2",
    "method.step=0.005",
    "method.noise_scale=0",
    "method.w_inv=1",
    "method.w_prior_mean=1",
)


def build(*words):
    return genmodels.build([POINTS], *SMALL, *words)


def batch_of(x, label=None):
    label = torch.full((len(x),), -1) if label is None else label
    return {"image": x, "label": label, "n": torch.arange(len(x))}


def points():
    """32 points in [-1, 1]^2."""
    return 2 * torch.rand(32, 2, 1, 1, generator=torch.Generator().manual_seed(0)) - 1


def run_of(tmp_path, *words):
    out = tmp_path / str(len(list(tmp_path.iterdir())))
    argv = [
        str(ROOT / "configs/gedi_moons.yaml"),
        str(ROOT / "configs/debug.yaml"),
        *SMALL,
        f"out_dir={out}",
        "sample.every=0",
        "trainer.progress=false",
        "data.points=200",
        "data.batch_size=32",
        "method.inv_start=0",
        "method.inv_ramp=0",
        "optim.decay=none",
        *words,
    ]
    assert train.main(last_words(argv)) == 0
    (folder,) = out.glob("*/*")
    return folder


def state_of(run):
    saved = read_checkpoint(run / "checkpoints" / "last.ckpt")
    weights = {f"weights.{k}": v for k, v in saved["state_dict"].items()}
    raw = {f"raw.{k}": v for k, v in saved.get("current_model_state", {}).items()}
    return weights | raw | saved["replay"]
