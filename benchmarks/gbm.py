"""Multiplicative diffusion beside EDM on pixels, with the same network, steps and labels.

    python -m benchmarks.gbm digits|mnist|fashion_mnist [out=benchmarks/results] [work=runs/gbm]
        [num=...] [likelihood=50] [features=NAME] [key=value ...]

Trains both from configs/gbm_NAME.yaml (the control keeps everything but the method block), samples
GBM by its exact samplers and by the paper's, scores all against the test split, and writes
OUT/gbm_NAME.json, .md and .png. For the digits the control is the demo's, read from
benchmarks/results/demo.json: same network, steps and seed. Each stage leaves its result in
WORK/NAME and is not repeated; another command needs another WORK. Further key=value words go to
both trainings.

    python -m benchmarks.gbm priors [out=benchmarks/results]

measures what each prior leaves out, KL(p_T || prior), on the three training sets, and writes
OUT/gbm_priors.json and .md. A smoke run:

    python -m benchmarks.gbm digits out=runs/smoke work=runs/smoke num=360 likelihood=4 \
        trainer.max_steps=20
"""

import json
import sys
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf

import genmodels
from benchmarks import record
from benchmarks.demo import BLOCK, markdown_table, score_rows
from benchmarks.record import last_words
from genmodels import cli, generation, images
from genmodels.atomic import write_bytes
from genmodels.commands.train import train
from genmodels.config import DataConfig
from genmodels.config.words import check_flags, parse_value, split_words
from genmodels.data import load_split
from genmodels.evaluation.likelihood import bits_per_dim
from genmodels.evaluation.scorer import Scorer
from genmodels.networks.prior import GaussianPrior, fit_to_images

CONFIGS = {"digits": "gbm_digits", "mnist": "gbm_mnist", "fashion_mnist": "gbm_fashion"}

FOLDERS = ("out", "work")  # they change no number
FEATURES = {"digits": "digits", "mnist": "mnist", "fashion_mnist": "fashion"}

# row -> (which model, options of sample()); the paper's sampler takes its 1,000 levels of step
# 6.165e-4 eight at a time, which keeps its time and the decay of its noise.
PAPER = {
    "sampler": "paper",
    "sigma_max": 0.8,
    "delta": 8 * 6.165e-4,
    "anneal": 0.995**8,
    "steps": 125,
}
ROWS = {
    "GBM, ODE (Heun, 35 evaluations)": ("gbm", {"sampler": "ode", "steps": 18}),
    "GBM, DLS (64 evaluations)": ("gbm", {"sampler": "dls", "steps": 64}),
    "GBM, the paper's sampler (125 evaluations)": ("gbm", PAPER),
    "EDM on pixels (Heun, 35 evaluations)": ("edm", {"sampler": "heun", "steps": 18}),
}

REPORT = """# Multiplicative diffusion (GBM) on {name}

`{command}`: {steps} steps of {batch} images for each method, seed {seed}, the same network
({parameters:.2f} M parameters), class-conditional; {machine} (a shared machine: seconds are rough);
{versions}.
Training: {seconds}.

{protocol}

{table}

{likelihood}

VE diffusion in log space has no row: it is the same process, and its sampler is GBM's to the bit
(tests/sampling/test_gbm.py). {prior}
"""


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(compare, argv)


def compare(argv):
    """Train, sample, score, report; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags or len(positionals) != 1 or positionals[0] not in (*CONFIGS, "priors"):
        names = ", ".join(CONFIGS)
        raise ValueError(f"data={' '.join(positionals)}: name one of {names}, or priors")
    name = positionals[0]
    out = Path(words.pop("out", "benchmarks/results"))
    if name == "priors":
        return priors(out)
    work = Path(words.pop("work", "runs/gbm")) / name
    num = parse_value("num", words.pop("num", "1440" if name == "digits" else "300"), int)
    bits = parse_value("likelihood", words.pop("likelihood", "50"), int)
    features = words.pop("features", FEATURES[name])
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    changed = [f"{key}={text}" for key, text in words.items()]
    command = record.command_line("gbm", argv, FOLDERS)
    told = record.once(work / "command.json", lambda: command)
    record.check_same(told, command, "work", work)
    facts = {"command": command, "name": name, "num": num}
    models, facts["train_seconds"] = {}, {}
    for method in ("gbm",) if name == "digits" else ("gbm", "edm"):
        done = record.once(
            work / f"{method}.json", lambda method=method: train_one(method, name, work, changed)
        )
        models[method] = genmodels.load(done["run"])
        facts["train_seconds"][method] = done["seconds"]
        facts["prior"] = done["words"] or facts.get("prior", "")
    pictures, facts["sample_seconds"] = {}, {}
    rows = {row: value for row, value in ROWS.items() if value[0] in models}
    for i, (row, (method, options)) in enumerate(rows.items()):
        few = name == "digits" and options is PAPER  # the dear one: a single block
        count = min(num, BLOCK) if few else num
        task = (models[method], work / f"row{i}.npz", count, options)
        done = record.once(work / f"row{i}.json", lambda task=task: sample_one(*task))
        pictures[row] = images.read_images(done["file"])
        facts["sample_seconds"][row] = done["seconds"]
    facts["likelihood"] = {
        method: record.once(
            work / f"{method}_bits.json", lambda model=model: likelihood(model, bits)
        )
        for method, model in models.items()
    }
    cfg = models["gbm"].cfg
    facts |= {
        "steps": cfg.trainer.max_steps,
        "batch": cfg.data.batch_size,
        "seed": cfg.seed,
        "parameters": sum(p.numel() for p in models["gbm"].parameters()) / 1e6,
    }
    scores, facts["protocol"] = score(name, pictures, features)
    write(out, name, scores, facts, pictures)


def priors(out):
    """Measure KL(p_T || prior) in nats for each data set, kind of prior and sigma_max."""
    started, rows = time.monotonic(), {}
    for name in CONFIGS:
        pixels = load_split(DataConfig(name=name), "train")[0]
        for kind in ("lognormal", "lowrank", "full"):
            prior, row = GaussianPrior(kind, pixels.shape[1:]), {}
            for sigma in (0.8, 2.0, 5.0):
                found = fit_to_images(prior, pixels, 1.0, sigma**2)
                row[f"sampled, {sigma}"] = {"value": found["kl"], "stderr": found["kl_stderr"]}
                row[f"Gaussian, {sigma}"] = {"value": found["kl_gaussian"], "stderr": 0.0}
            rows[f"{name}, {kind}"] = row
    command, seconds = "python -m benchmarks.gbm priors", round(time.monotonic() - started, 1)
    facts = record.write(out / "gbm_priors.json", command, seed=0, seconds=seconds, rows=rows)
    table = markdown_table(rows)
    text = (
        "# KL(p_T || prior) in nats, offset 1, by sigma_max\n\n"
        "`{command}`; {machine}; {seconds} s.\nsampled: p_T is the noised training images (256 "
        "draws, seed 0); Gaussian: p_T is taken as one.\n\n"
    ).format(**facts)
    write_bytes(out / "gbm_priors.md", (text + table + "\n").encode())
    print(table)


def train_one(method, name, work, changed):
    """Train GBM, or EDM with everything but the method block the same."""
    config, started = Path("configs") / f"{CONFIGS[name]}.yaml", time.monotonic()
    if method == "edm":
        plain = OmegaConf.to_container(OmegaConf.load(config))
        std = images.mean_and_std(load_split(DataConfig(name=name), "train")[0])[1]
        plain["method"] = {"name": "edm", "sigma_data": round(float(std), 3)}
        config = work / f"edm_{name}.yaml"
        OmegaConf.save(OmegaConf.create(plain), config)
    run = train(last_words([str(config), f"out_dir={work}", *changed]))
    seconds = time.monotonic() - started
    model = genmodels.load(run)
    words = model.prepare(_Images(name)) if method == "gbm" else ""
    return {"run": str(run), "seconds": round(seconds, 1), "words": words}


class _Images:
    """The training images of a data set, as GBM.prepare wants them."""

    def __init__(self, name):
        self.train = load_split(DataConfig(name=name), "train")


def sample_one(model, path, num, options):
    """Write the images of seeds 0..num-1, balanced over the classes."""
    started, seeds = time.monotonic(), range(num)
    labels = generation.labels_for(seeds, "balanced", model.classes)
    made = generation.generate_all(model, seeds, labels, **options)
    images.write_npz(path, images=made.permute(0, 2, 3, 1).numpy())
    seconds = round(time.monotonic() - started, 1)
    return {"file": str(path), "seconds": seconds, "evaluations": model.nfe}


def likelihood(model, num):
    """Return {kind: {"value", "stderr", "num"}}: bits/dim of the first test images."""
    pixels, labels = (part[:num] for part in load_split(model.cfg.data, "test"))
    result, started = {}, time.monotonic()
    for kind in model.LIKELIHOODS:
        bits = bits_per_dim(model, pixels, labels, kind=kind, steps=32)
        error = float(bits.std() / num**0.5)
        result[kind] = {"value": float(bits.mean()), "stderr": error, "num": num}
    return result | {"seconds": round(time.monotonic() - started, 1)}


def score(name, pictures, features):
    """Return ({row: {column: score}}, the protocol in words)."""
    real, held_out = (load_split(DataConfig(name=name), split)[0] for split in ("train", "test"))
    rows = dict(pictures)
    count = len(next(iter(pictures.values())))
    if name == "digits":
        demo = json.loads(Path("benchmarks/results/demo.json").read_text())["rows"]
        kept = {
            "EDM on pixels, from demo.json": demo["EDM (ours)"],
            "real training digits, from demo.json": demo["real training digits"],
        }
        return score_rows(rows, real, held_out) | kept, (
            f"Scores compare {BLOCK} images with the {BLOCK} held-out digits: means over "
            f"{count // BLOCK} blocks (one of the paper's sampler, the slowest) +- standard "
            "errors from random halves (columns: demo.md)."
        )
    pick = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:count]
    rows["real training images"] = real[pick]
    columns = {}
    for column, metric, space, reference in (
        (f"FD ({features})", "fd", features, held_out),
        ("nn1", "nn1", "pixels", held_out[:count]),
    ):
        scorer = Scorer([metric], space, reference=reference, resamples=20)
        columns[column] = metric, scorer
    scores = {
        row: {column: scorer(made)[metric] for column, (metric, scorer) in columns.items()}
        for row, made in rows.items()
    }
    return scores, (
        f"FD compares {count} images with the {len(held_out)} of the test split (few images raise "
        f"it: see the row of real ones), nn1 {count} with {count}; +- standard errors from random "
        "halves."
    )


def write(out, name, scores, facts, pictures):
    """Write the JSON, the report and a picture: GBM by its ODE, by the paper's sampler, EDM."""
    facts = record.write(out / f"gbm_{name}.json", rows=scores, **facts)
    lines = [
        f"- {method.upper()}: "
        + ", ".join(
            f"{kind} {s['value']:.3f} +- {s['stderr']:.3f} ({s['num']} images)"
            for kind, s in kinds.items()
            if kind != "seconds"
        )
        for method, kinds in facts["likelihood"].items()
        if kinds
    ]
    bits = "Bits/dim of dequantised test images:\n\n" + "\n".join(lines)
    shown = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    seconds = ", ".join(f"{m.upper()} {s:.0f} s" for m, s in facts["train_seconds"].items())
    words = facts | {
        "versions": shown,
        "seconds": seconds,
        "likelihood": bits,
        "table": markdown_table(scores),
    }
    write_bytes(out / f"gbm_{name}.md", REPORT.format(**words).encode())
    made = list(pictures.values())
    sheets = [images.grid(made[i][:80], 10) for i in (0, 2, 3) if i < len(made)]
    gap = torch.full((*sheets[0].shape[:2], 3), 255, dtype=torch.uint8)
    sheet = torch.cat([part for s in sheets for part in (s, gap)][:-1], dim=2)
    images.write_png(out / f"gbm_{name}.png", images.enlarge(sheet, 4 if name == "digits" else 1))
    columns = ["", *next(iter(scores.values()))]
    cells = [
        [row, *(f"{s['value']:.3f} +- {s['stderr']:.3f}" for s in row_scores.values())]
        for row, row_scores in scores.items()
    ]
    cli.print_table(f"GBM on {name}", columns, cells)
    print(f"written: {out}/gbm_{name}.json, .md, .png")


if __name__ == "__main__":
    sys.exit(main())
