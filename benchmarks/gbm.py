"""Multiplicative diffusion beside EDM on pixels, with the same network, steps and labels.

    python -m benchmarks.gbm digits|mnist|fashion_mnist [out=benchmarks/results] [work=runs/gbm]
        [num=500] [likelihood=200] [features=NAME] [key=value ...]

Trains both from configs/gbm_NAME.yaml (the control keeps everything but the method block), samples
GBM by its exact samplers and by the paper's, scores all against the test split, and writes
OUT/gbm_NAME.json, .md and .png. Each stage leaves its result in WORK/NAME and is not repeated.
Further key=value words go to both trainings. A smoke run:
    python -m benchmarks.gbm digits out=runs/smoke work=runs/smoke num=360 likelihood=4 \
        trainer.max_steps=20
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf

import genmodels
import train
from benchmarks.demo import BLOCK, machine, markdown_table, score_rows
from genmodels import benchmark, cli, images
from genmodels.config import DataConfig, parse_value
from genmodels.data import load_split

CONFIGS = {"digits": "gbm_digits", "mnist": "gbm_mnist", "fashion_mnist": "gbm_fashion"}

# row -> (which model, options of sample()); the paper's sampler takes its 1,000 levels of step
# 6.165e-4 eight at a time, which keeps its time and the decay of its noise.
PAPER = {"sampler": "paper", "sigma_max": 0.8, "grid": "uniform", "delta": 8 * 6.165e-4,
         "anneal": 0.995**8, "steps": 125}  # fmt: skip
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
Training {train_seconds[gbm]:.0f} s (GBM), {train_seconds[edm]:.0f} s (EDM).

{protocol}

{table}

{likelihood}

VE diffusion in log space has no row: it is the same process, and its sampler is GBM's to the bit
(tests/test_gbm.py). {prior}
"""


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(compare, argv)


def compare(argv):
    """Train, sample, score, report; see the module's docstring."""
    positionals, words, flags = cli.split_words(argv)
    cli.check_flags(flags, ("--help",))
    if flags or len(positionals) != 1 or positionals[0] not in CONFIGS:
        raise ValueError(f"data={' '.join(positionals)}: name one of {', '.join(CONFIGS)}")
    name = positionals[0]
    out = Path(words.pop("out", "benchmarks/results"))
    work = Path(words.pop("work", "runs/gbm")) / name
    num = parse_value("num", words.pop("num", "1440" if name == "digits" else "500"), int)
    bits = parse_value("likelihood", words.pop("likelihood", "200"), int)
    features = words.pop("features", "digits" if name == "digits" else "pixels")
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    changed = [f"{key}={text}" for key, text in words.items()]
    facts = {"command": " ".join(["python -m benchmarks.gbm", *argv]), "name": name, "num": num}
    models, facts["train_seconds"] = {}, {}
    for method in ("gbm", "edm"):
        done = once(work / f"{method}.json", lambda method=method: train_one(
            method, name, work, changed))  # fmt: skip
        models[method] = genmodels.load(done["run"])
        facts["train_seconds"][method] = done["seconds"]
        facts["prior"] = done["words"] or facts.get("prior", "")
    pictures, facts["sample_seconds"] = {}, {}
    for i, (row, (method, options)) in enumerate(ROWS.items()):
        done = once(work / f"row{i}.json", lambda i=i, method=method, options=options: sample_one(
            models[method], work / f"row{i}.npz", num, options))  # fmt: skip
        pictures[row] = images.read_images(done["file"])
        facts["sample_seconds"][row] = done["seconds"]
    facts["likelihood"] = {
        method: once(work / f"{method}_bits.json", lambda m=model: likelihood(m, bits))
        for method, model in models.items()
    }
    cfg = models["gbm"].cfg
    facts |= {
        "steps": cfg.trainer.max_steps, "batch": cfg.data.batch_size, "seed": cfg.seed,
        "parameters": sum(p.numel() for p in models["gbm"].parameters()) / 1e6,
        "machine": machine(), "versions": benchmark.versions(),
    }  # fmt: skip
    scores, facts["protocol"] = score(name, pictures, features)
    write(out, name, scores, facts, pictures)


def once(path, make):
    """Return the dict in a JSON file, made and written first if it is not there."""
    if not path.exists():
        images.write_bytes(path, json.dumps(make()).encode())
    return json.loads(path.read_text())


def train_one(method, name, work, changed):
    """Train GBM, or EDM with everything but the method block the same."""
    config, started = Path("configs") / f"{CONFIGS[name]}.yaml", time.monotonic()
    if method == "edm":
        plain = OmegaConf.to_container(OmegaConf.load(config))
        std = images.mean_and_std(load_split(DataConfig(name=name), "train")[0])[1]
        plain["method"] = {"name": "edm", "sigma_data": round(float(std), 3)}
        config = work / f"edm_{name}.yaml"
        OmegaConf.save(OmegaConf.create(plain), config)
    run = train.train([str(config), f"out_dir={work}", *changed])
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
    labels = benchmark.labels_for(seeds, "balanced", model.classes)
    made, _ = benchmark.generate_all(model, seeds, labels, **options)
    images.write_npz(path, images=made.permute(0, 2, 3, 1).numpy())
    seconds = round(time.monotonic() - started, 1)
    return {"file": str(path), "seconds": seconds, "evaluations": model.nfe}


def likelihood(model, num):
    """Return {kind: {"value", "stderr"}} in bits/dim over the first test images, dequantised."""
    if not getattr(model, "LIKELIHOODS", ()):
        return {}
    pixels, labels = (part[:num] for part in load_split(model.cfg.data, "test"))
    generator, size = torch.Generator().manual_seed(0), math.prod(model.shape)
    noise = torch.rand(pixels.shape, generator=generator, dtype=torch.float64)
    x, started = (pixels + noise - 0.5) / 127.5 - 1, time.monotonic()
    result = {}
    for kind in model.LIKELIHOODS:
        parts = [
            model.log_prob(part, own, kind=kind, seeds=range(64 * i, 64 * i + len(part)))
            for i, (part, own) in enumerate(zip(x.split(64), labels.split(64)))
        ]
        rows = -torch.cat(parts) / (size * math.log(2)) + math.log2(127.5)
        error = float(rows.std() / num**0.5)
        result[kind] = {"value": float(rows.mean()), "stderr": error, "num": num}
    return result | {"seconds": round(time.monotonic() - started, 1)}


def score(name, pictures, features):
    """Return ({row: {column: score}}, the protocol in words)."""
    real, held_out = (load_split(DataConfig(name=name), split)[0] for split in ("train", "test"))
    rows = dict(pictures)
    count = len(next(iter(pictures.values())))
    if name == "digits":
        rows["real training digits"] = real[: BLOCK * (len(real) // BLOCK)]
        return score_rows(rows, real, held_out), (
            f"Scores compare {BLOCK} images with the {BLOCK} held-out digits: means over "
            f"{count // BLOCK} blocks +- standard errors from random halves."
        )
    pick = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:count]
    rows["real training images"] = real[pick]
    columns = {}
    for column, metric, space, reference in (
        (f"FD ({features})", "fd", features, held_out),
        ("FD (pixels)", "fd", "pixels", held_out),
        ("nn1", "nn1", "pixels", held_out[:count]),
    ):
        scorer = benchmark.Scorer([metric], space, reference=reference, resamples=20)
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
    """Write the JSON, the report and a picture (a row of columns: GBM by ODE, paper's, EDM)."""
    lines = [
        f"- {method.upper()}: " + ", ".join(
            f"{kind} {s['value']:.3f} +- {s['stderr']:.3f} ({s['num']} images)"
            for kind, s in kinds.items() if kind != "seconds")
        for method, kinds in facts["likelihood"].items() if kinds
    ]  # fmt: skip
    bits = "Bits/dim of dequantised test images:\n\n" + "\n".join(lines)
    shown = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    words = facts | {"versions": shown, "likelihood": bits, "table": markdown_table(scores)}
    images.write_bytes(out / f"gbm_{name}.md", REPORT.format(**words).encode())
    text = json.dumps({"rows": scores} | facts, indent=1)
    images.write_bytes(out / f"gbm_{name}.json", text.encode())
    made = list(pictures.values())
    sheets = [images.grid(made[i][:80], 10) for i in (0, 2, 3)]
    gap = torch.full((*sheets[0].shape[:2], 3), 255, dtype=torch.uint8)
    sheet = torch.cat([sheets[0], gap, sheets[1], gap, sheets[2]], dim=2)
    images.write_png(out / f"gbm_{name}.png", images.enlarge(sheet, 4 if name == "digits" else 1))
    columns = ["", *next(iter(scores.values()))]
    cells = [[row, *(f"{s['value']:.3f} +- {s['stderr']:.3f}" for s in row_scores.values())]
             for row, row_scores in scores.items()]  # fmt: skip
    cli.print_table(f"GBM on {name}", columns, cells)
    print(f"written: {out}/gbm_{name}.json, .md, .png")


if __name__ == "__main__":
    sys.exit(main())
