"""How fast EDM's CIFAR-10 network trains and samples: as published, or with what this project adds.

    python -m benchmarks.edm_speed out=FOLDER how=published|fast [batch=256] [steps=60] [num=1000]
                                   [overlay=CONFIG] [key=value ...]

published: float32 without TF32, as in configs/edm_cifar10.yaml. fast: bf16, channels_last and
torch.compile. The pictures are random numbers of CIFAR-10's shape, so no data are needed; a step
costs the same. Writes FOLDER/edm_HOW.json: images/s of the training command (the median of its
later lines; written at once) and of 18 steps of Heun's method.
"""

import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import genmodels
from benchmarks import record
from benchmarks.record import last_words
from genmodels import cli, generation
from genmodels.commands.train import train
from genmodels.config import check
from genmodels.config.words import check_flags, parse_value, split_words
from genmodels.run import Run

FAST = ("trainer.precision=bf16-mixed", "trainer.channels_last=true", "trainer.compile=true")


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(measure, argv)


def measure(argv):
    """Train, sample, write; see the module's docstring."""
    _, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags:
        print(__doc__.strip())
        return
    how = words.pop("how", "published")
    check(how in ("published", "fast"), "how", how, "must be published or fast")
    check(words.get("out"), "out", "", "name a folder")
    out = Path(words.pop("out"))
    defaults = {"batch": 256, "steps": 60, "num": 1000}
    batch, steps, num = (
        parse_value(key, words.pop(key, str(value)), int) for key, value in defaults.items()
    )
    overlay = [words.pop("overlay")] if "overlay" in words else []
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (2048, 32, 32, 3), dtype=np.uint8)
        np.save(f"{folder}/random.npy", pixels)
        told = ["configs/edm_cifar10.yaml", *overlay, "data.name=npy", "data.holdout=0"]
        told += [f"data.root={folder}/random.npy", f"data.batch_size={batch}"]
        told += [f"trainer.max_steps={steps}", f"trainer.log_every={max(1, steps // 12)}"]
        told += ["trainer.loggers=csv", "sample.every=0", "checkpoint.every=1000000"]
        told += [f"out_dir={folder}/runs", *(FAST if how == "fast" else ())]
        run = train(last_words([*told, *(f"{key}={text}" for key, text in words.items())]))
        with open(Run(run).metrics, newline="") as file:
            rates = [float(row["train/images_per_second"]) for row in csv.DictReader(file)]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = genmodels.load(run, device=device)
    if how == "fast":
        model.net.to(memory_format=torch.channels_last)
        if model.cfg.trainer.compile:
            model.net.compile()
    precision = "bf16" if how == "fast" else "fp32"
    options = {"batch": min(num, 250), "precision": precision, "steps": 18, "progress": False}
    facts = {
        "seed": model.cfg.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": batch,
        "train_images_per_second": statistics.median(rates[len(rates) // 3 :]),
        "train_rates": rates,
        "sample_batch": options["batch"],
    }
    path, command = (
        out / f"edm_{how}.json",
        record.command_line("edm_speed", argv, without=("out",)),
    )
    record.write(path, command, **facts)
    generation.generate_all(model, range(options["batch"]), **options)  # compiles
    started = time.monotonic()
    generation.generate_all(model, range(num), **options)
    facts |= {"nfe": model.nfe, "sample_images_per_second": num / (time.monotonic() - started)}
    if device == "cuda":
        facts["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    record.write(path, command, **facts)


if __name__ == "__main__":
    sys.exit(main())
