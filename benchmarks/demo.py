"""The demo: train EDM on real handwritten digits, sample it, and measure it beside two controls.

    make demo        or        python -m benchmarks.demo [out=runs/demo] [trainer.max_steps=...]

configs/edm_digits.yaml with fewer steps at a higher rate, WORDS, so that it takes about four
minutes on two CPU cores; chosen by the scores of seed 1. Writes OUT/samples.png (generated beside
real), OUT/report.md and OUT/metrics.json.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import genmodels
from benchmarks import record
from benchmarks.record import last_words
from genmodels import checkpoint, cli, generation, images
from genmodels.atomic import write_bytes
from genmodels.commands.train import train
from genmodels.config.words import check_flags, split_words
from genmodels.data import load_split
from genmodels.evaluation.scorer import Scorer
from genmodels.metrics.features.grey_nets import DIGITS_SHA256

CONFIG = "configs/edm_digits.yaml"
WORDS = ["trainer.max_steps=1080", "optim.lr=2e-3", "ema.half_life=15000"]
BLOCK = 360  # the held-out digits; every score compares sets of this size
BLOCKS = 4  # generated blocks behind each mean

REPORT = """# EDM on handwritten digits

`{command}`: {steps} steps of {batch} images, seed {seed}, {parameters:.2f} M parameters;
{machine}; {versions}.
Training {train_seconds:.0f} s, sampling {count} images {sample_seconds:.0f} s.

Every score compares {block} images with the {block} held-out digits: the mean over {blocks} blocks
and, after +-, the standard error from random halves of both sides.

{table}

- nn1: accuracy of telling generated from held-out by the nearest neighbour; 0.5 = cannot be told.
  It is the mean of the two columns after it, the shares of generated and of real images that are
  known as such; both must be near 0.5, for a generator can be known by either alone.
- FD (digits): Frechet distance in the features of a small digit classifier ({sha}...).
- FD (pixels): a smoke test only; it hardly sees what the Gaussian lacks.
- memorised: share nearer to a training digit than 95 % of held-out ones are. A perfect generator
  has 0.05, a copier 1 (the training digits themselves), and 0 is no praise (the Gaussian).

![generated (left) beside real digits](samples.png)
"""


def demo(argv):
    """Run the demo; see the module's docstring."""
    started = time.monotonic()
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags:
        print(__doc__.strip())
        return
    if positionals:
        raise ValueError(f"{positionals[0]}: the demo takes key=value words only")
    out = Path(words.pop("out", "runs/demo"))
    out.mkdir(parents=True, exist_ok=True)
    changed = [f"{key}={text}" for key, text in words.items()]
    run = train(last_words([CONFIG, *WORDS, f"out_dir={out}", *changed]))
    train_seconds = time.monotonic() - started
    model = genmodels.load(run)
    generated = generation.generate_all(model, range(BLOCK * BLOCKS))
    sample_seconds = time.monotonic() - started - train_seconds
    real, held_out = (load_split(model.cfg.data, split)[0] for split in ("train", "test"))
    rows = {
        "EDM (ours)": generated,
        "real training digits": real[: BLOCK * (len(real) // BLOCK)],
        "Gaussian of the pixels": gaussian_twin(real, BLOCK * BLOCKS),
    }
    scores = score_rows(rows, real, held_out)
    write_pictures(out / "samples.png", generated, held_out)
    facts = record.write(
        out / "metrics.json",
        record.command_line("demo", argv),
        steps=checkpoint.read_checkpoint(run)["global_step"],
        batch=model.cfg.data.batch_size,
        seed=model.cfg.seed,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        train_seconds=train_seconds,
        sample_seconds=sample_seconds,
        count=len(generated),
        block=BLOCK,
        blocks=BLOCKS,
        rows=scores,
    )
    shown = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    more = {"table": markdown_table(scores), "versions": shown, "sha": DIGITS_SHA256[:8]}
    write_bytes(out / "report.md", REPORT.format(**facts | more).encode())
    columns = ["", *next(iter(scores.values()))]
    cells = [[name, *(_cell(score) for score in row.values())] for name, row in scores.items()]
    cli.print_table(f"{BLOCK} images against {BLOCK} held-out digits", columns, cells)
    print(f"written: {out}/samples.png, report.md, metrics.json; the model is {run}")
    print(f"next: python sample.py {run} num=64 out=samples")


def gaussian_twin(real, count):
    """Return uint8 images drawn from the Gaussian with the real images' mean and covariance."""
    rows = real.flatten(1).double().numpy()
    draws = np.random.default_rng(0).multivariate_normal(rows.mean(0), np.cov(rows.T), count)
    pixels = np.clip(np.rint(draws), 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels).reshape(count, *real.shape[1:])


def score_rows(rows, real, held_out):
    """Return {row: {column: {"value", "stderr"}}}."""
    columns = {}
    for column, metric, features in (
        ("nn1", "nn1", "pixels"),
        ("of fakes", "nn1_fake", "pixels"),
        ("of real", "nn1_real", "pixels"),
        ("FD (digits)", "fd", "digits"),
        ("FD (pixels)", "fd", "pixels"),
        ("memorised", "memorised", "pixels"),
    ):
        columns[column] = (
            metric,
            Scorer(
                [metric],
                features,
                reference=held_out,
                train=real,
                held_out=held_out,
                equal=True,
                resamples=40,
            ),
        )
    todo = [(name, column) for name in rows for column in columns]
    scores = {name: {} for name in rows}
    for name, column in tqdm(todo, desc="scoring"):
        metric, scorer = columns[column]
        scores[name][column] = scorer(rows[name])[metric]
    return scores


def write_pictures(path, generated, real):
    """Write a 10 x 10 sheet of generated images beside one of real ones, enlarged."""
    sheets = [images.grid(pictures[:100], 10) for pictures in (generated, real)]
    gap = torch.full((*sheets[0].shape[:2], 3), 255, dtype=torch.uint8)
    images.write_png(path, images.enlarge(torch.cat([sheets[0], gap, sheets[1]], dim=2), 5))


def markdown_table(scores):
    """Return the scores as a markdown table."""
    columns = list(next(iter(scores.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in scores.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row[c]) for c in columns) + " |")
    return "\n".join(lines)


def _cell(score):
    return f"{score['value']:.3f} +- {score['stderr']:.3f}"


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(demo, argv)


if __name__ == "__main__":
    sys.exit(main())
