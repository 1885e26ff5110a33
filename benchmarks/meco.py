"""MECO on the digits: what is no digit, how far its flow is bent, and how much of it counts.

    python -m benchmarks.meco [seeds=0-2] [out=benchmarks/results] [work=runs/meco]
        [key=value of the training ...]

trains configs/meco_digits.yaml, and scores the held-out digits, with the noise that it trains with:
AUROC against interpolations of digits and against noise, log p in nats of the energy and of its
noise density q alone, and the share of q's draws that count. Writes OUT/meco_digits.json after each
seed; stopped, it goes on where it was.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

import genmodels
from benchmarks import record
from benchmarks.record import last_words
from genmodels import cli, images
from genmodels.commands.evaluate import evaluate
from genmodels.commands.train import train
from genmodels.config.words import check_flags, parse_seeds, split_words
from genmodels.data import load_split

CONFIG = "configs/meco_digits.yaml"
QUIET = ["trainer.loggers=csv", "trainer.progress=false", "sample.every=0"]
SETS = "interpolation,noise"
DRAWS = 20_000  # of q, for Z


def measure(argv):
    """Train and score; see the module's docstring."""
    names, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags or names:
        print(__doc__.strip())
        return
    command = record.command_line("meco", argv, ("out", "work", "seeds"))
    path = Path(words.pop("out", "benchmarks/results")) / "meco_digits.json"
    work, seeds = Path(words.pop("work", "runs/meco")), parse_seeds(words.pop("seeds", "0-2"))
    given = [f"{key}={text}" for key, text in words.items()]
    torch.set_num_threads(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = record.rows(path, command)
    for seed in seeds:
        if all(row["seed"] != seed for row in rows):
            rows.append(one_row(seed, work / str(seed), given))
            record.write(path, command, config=CONFIG, table=table(rows), rows=rows)
    print(json.dumps(table(rows), indent=1))


def one_row(seed, folder, given):
    """Return what one training gave."""
    words = [CONFIG, *QUIET, *given, f"seed={seed}", f"out_dir={folder}"]
    trained = record.once(folder / "training.json", lambda: timed(words))
    run = folder / trained.pop("run")
    out = folder / "ood.json"
    evaluate([str(run), f"ood={SETS}", f"out={out}"])
    ood = json.loads(out.read_text())["metrics"]
    model = genmodels.load(run)
    held_out, _ = load_split(model.cfg.data, "test")
    x = images.from_uint8(held_out)
    generator = torch.Generator().manual_seed(seed)
    x = x + model.cfg.method.smoothing * torch.randn(x.shape, generator=generator)
    log_p = model.log_prob(x, seeds=range(len(x)), draws=DRAWS)
    normaliser = model.normaliser(DRAWS)
    log_q = model.ood_scores(x)["noise"]
    return {
        "seed": seed,
        "words": words[:-1],
        **trained,
        "auroc": {k: v["value"] for k, v in ood.items() if k.startswith("auroc_")},
        "log_p": float(log_p.mean()),
        "log_q": float(log_q.mean()),
        "log_z": normaliser.log_z,
        "log_z_stderr": normaliser.stderr,
        "ess": normaliser.ess,
    }


def timed(words):
    """Return {run, CPU seconds} of a training."""
    started = time.process_time()
    run = train(last_words(words))
    folder = words[-1].partition("=")[2]
    seconds = round(time.process_time() - started, 1)
    return {"run": str(Path(run).relative_to(folder)), "train_cpu_seconds": seconds}


def table(rows):
    """Return {what: mean over seeds and its standard error}."""
    flat = [
        {**row["auroc"], **{key: row[key] for key in ("log_p", "log_q", "ess")}} for row in rows
    ]
    out = {}
    for key in flat[0]:
        values = [row[key] for row in flat]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        out[key] = {"mean": statistics.mean(values), "stderr": error}
    return out


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
