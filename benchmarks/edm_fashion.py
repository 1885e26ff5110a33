"""One full command for a GPU: train EDM on Fashion-MNIST, measure it, export it.

    python -m benchmarks.edm_fashion [out=benchmarks/results] [trainer.max_time=8m] [key=value ...]

Needs GENMODELS_DATA with FashionMNIST/raw. Writes OUT/edm_fashion.json (images/s in training and
sampling, share of the measured matrix-product peak, scores), OUT/edm_fashion.png and the exported
half-precision EMA weights OUT/export/ (which becomes pretrained/edm_fashion). A smoke run on a CPU:
    python -m benchmarks.edm_fashion out=runs/smoke overlay=configs/debug.yaml num=8
"""

import csv
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import genmodels
from benchmarks import record
from benchmarks.record import last_words
from genmodels import checkpoint, cli, generation, images
from genmodels.commands.train import train
from genmodels.config.words import check_flags, parse_value, split_words
from genmodels.data import load_split
from genmodels.evaluation.scorer import Scorer
from genmodels.run import Run


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(measure, argv)


def measure(argv):
    """Train, measure, score, export; see the module's docstring."""
    _, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags:
        print(__doc__.strip())
        return
    out = Path(words.pop("out", "benchmarks/results"))
    num = parse_value("num", words.pop("num", "10000"), int)
    if (out / "export").exists():
        raise ValueError(f"out={out}: holds an export already; move it or choose another folder")
    overlay = [words.pop("overlay")] if "overlay" in words else []
    out.mkdir(parents=True, exist_ok=True)
    started, changed = time.monotonic(), [f"{key}={text}" for key, text in words.items()]
    run = train(last_words(["configs/edm_fashion.yaml", *overlay, *changed]))
    train_seconds = time.monotonic() - started
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = genmodels.load(run, device=device)
    peak, flops = matmul_peak(device), forward_flops(model)
    with open(Run(run).metrics, newline="") as file:
        rates = [r["train/images_per_second"] for r in csv.DictReader(file)]
    rate = statistics.median([float(text) for text in rates if text][1:] or [0.0])
    started = time.monotonic()
    generated = generation.generate_all(model, range(num), batch=500, precision="bf16")
    sample_seconds = time.monotonic() - started
    real = load_split(model.cfg.data, "test")[0]
    scorer = Scorer(["fd", "nn1"], "pixels", reference=real, equal=True, device=device)
    images.write_png(out / "edm_fashion.png", images.grid(generated[:100], 10))
    result = record.write(
        out / "edm_fashion.json",
        record.command_line("edm_fashion", argv),
        seed=model.cfg.seed,
        steps=checkpoint.read_checkpoint(run)["global_step"],
        batch=model.cfg.data.batch_size,
        train_seconds=round(train_seconds, 1),
        train_images_per_second=rate,
        forward_gflop_per_image=flops / 1e9,
        bf16_matmul_peak_tflops=peak / 1e12,
        train_share_of_peak=rate * 3 * flops / peak,
        sample_images_per_second=num / sample_seconds,
        sample_share_of_peak=num / sample_seconds * model.nfe * flops / peak,
        scores_on_pixels_against_test=scorer(generated),
        num=num,
    )
    print(json.dumps(result, indent=1))
    checkpoint.export(run, out / "export", half=True)


def matmul_peak(device):
    """Return the best measured rate of a bf16 matrix product, FLOP/s."""
    size = 8192 if device == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(20):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def forward_flops(model):
    """Return the FLOPs of one network evaluation of one image (2 for each multiply-add)."""
    x = torch.randn(1, *model.shape, device=model.device)
    label = torch.zeros(1, dtype=torch.int64, device=model.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.net(x, torch.ones(1, device=model.device), label)
    return counter.get_total_flops()


if __name__ == "__main__":
    sys.exit(main())
