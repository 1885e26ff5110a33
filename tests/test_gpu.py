"""What only a GPU can show: devices, bf16, compile, and agreement with the CPU."""

import csv

import pytest
import torch
from torch import nn

import genmodels
import train
from genmodels import generation
from genmodels.checkpoint import read_checkpoint
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize(
    "words",
    [[], ["trainer.precision=bf16-mixed", "trainer.channels_last=true", "trainer.compile=true"]],
    ids=["fp32", "fast"],
)
def test_training_with_grids_metrics_and_resume(words, tmp_path):
    argv = [
        str(ROOT / "configs/edm_digits.yaml"),
        str(ROOT / "configs/debug.yaml"),
        *TINY,
        f"out_dir={tmp_path}",
        "trainer.accelerator=cuda",
        "sample.every=1",
        "eval.every=2",
        "eval.num=8",
        "eval.features=digits",
        "eval.loss_every=2",
        "method.steps=2",
        "data.flip=true",
        "trainer.max_steps=3",
        *words,
    ]
    assert train.main(argv) == 0
    (run,) = tmp_path.glob("*/*")
    assert train.main([f"resume={run}", "trainer.max_steps=5"]) == 0
    assert len(list((run / "samples").iterdir())) == 5
    with open(run / "metrics.csv", newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 5 and all(0 < loss < 3 for loss in losses)
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 5
    assert genmodels.load(run, device="cuda").sample(range(2)).shape == (2, 1, 8, 8)


def test_samples_agree_with_the_cpu_within_one_level():
    model = genmodels.build(str(ROOT / "configs/edm_digits.yaml"), *TINY).eval()
    torch.manual_seed(0)
    nn.init.normal_(model.net.net.unet.conv_out.weight, std=0.05)
    cpu = generation.generate_all(model, range(64), progress=False)
    gpu = generation.generate_all(model.cuda(), range(64), progress=False)
    difference = (cpu.int() - gpu.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-3
