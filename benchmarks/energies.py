"""Energies beside diffusion models at equal CPU seconds: samples, memory of the training set, OOD.

    python -m benchmarks.energies digits|fashion_mnist [seconds=S] [seeds=0-2] [methods=A,B,...]
        [out=benchmarks/results] [work=runs/energies] [pictures=docs] [key=value of every config]

For each method and seed: the cost of a step is measured in a short training, then one of as many
steps as fit into `seconds` of CPU time (of the process, one thread); the row says what it took.
GEDI ends after the 3000 steps of its config, for its images get worse from there.
Samples are scored once, in blocks of the held-out images. Stopped, the command goes on where it
was: finished rows and trainings stay, and methods= and seeds= choose what is done now, one by one
or on several cores at a time, each with its own. Writes OUT/energies_NAME.json after each row; of
all rows there are, a figure of quality against seconds and a gallery in PICTURES.

    python -m benchmarks.energies cdrl [seconds=180] [seeds=10-12] [methods=...] [...]

does so with ways to make CDRL cheaper (docs/cdrl.md), to choose one: trained on 1257 of the 1437
training digits, scored on the others.

Settings of energy matching on the digits (smoothing, time, batch) and GEDI's l2 there were chosen
on 180 digits held out of the training ones, with other seeds; those of the other methods are their
configs'. A training that diverges is a row that says so.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

import genmodels
from benchmarks import record
from benchmarks.record import last_words
from genmodels import checkpoint, cli, generation, images
from genmodels.commands.evaluate import evaluate
from genmodels.commands.train import train
from genmodels.config.words import check_choice, check_flags, parse_seeds, split_words
from genmodels.data import load_split
from genmodels.data.source import read_source
from genmodels.evaluation.likelihood import likelihood_scores
from genmodels.evaluation.scorer import Scorer

SMALL_UNET = (
    "network.channels=[16,32,64]",
    "network.layers=1",
    "network.attention=[]",
    "network.norm_groups=8",
    "network.head_dim=16",
)
SMALL_EDM = (
    "data.pad=0",
    "data.batch_size=64",
    "trainer.max_time=",
    "trainer.precision=32-true",
    "trainer.compile=false",
    "trainer.channels_last=false",
    "optim.rampup=6400",
    "optim.decay=cosine",
    "ema.half_life=10000",
    *SMALL_UNET,
)
DRL = (
    "method.angles=drl",
    "method.initializer=none",
    "method.shared_noise=false",
    "method.tweedie_scale=0",
    "method.level_code=index",
)
FASHION = ("data.name=fashion_mnist", "data.labels=true")
# Words of each method's training; of the energies those that one CPU can train.
METHODS = {
    "digits": {
        "EDM": ["configs/edm_digits.yaml"],
        "GBM": ["configs/gbm_digits.yaml"],
        "CDRL": ["configs/cdrl_digits.yaml"],
        "DRL": ["configs/cdrl_digits.yaml", *DRL],
        "energy matching": ["configs/energy_digits.yaml"],
        "GEDI": [
            "configs/gedi_mnist_cpu.yaml",
            "data.name=digits",
            "method.view_affine=0.2",
            "method.l2=0.1",  # at MNIST's 0.01 the energies run apart and the chains draw noise
            "trainer.max_steps=3000",
        ],
    },
    "fashion_mnist": {
        "EDM": ["configs/edm_fashion.yaml", *SMALL_EDM],
        "GBM": ["configs/gbm_fashion.yaml"],
        "CDRL": ["configs/cdrl_digits.yaml", *FASHION, "network.width=512"],
        "DRL": ["configs/cdrl_digits.yaml", *FASHION, "network.width=512", *DRL],
        "energy matching": ["configs/energy_fashion.yaml"],
        "GEDI": [
            "configs/gedi_mnist_cpu.yaml",
            "data.name=fashion_mnist",
            "trainer.max_steps=3000",
        ],
    },
    "cdrl": {
        "CDRL": ["configs/cdrl_digits.yaml"],
        "5 steps": ["configs/cdrl_digits.yaml", "method.steps=5"],
        "initializer on pairs": ["configs/cdrl_digits.yaml", "method.initializer_pairs=0.33"],
        "matching first": ["configs/cdrl_digits.yaml", "method.matching=0.5"],
        "matching first and 5 steps": [
            "configs/cdrl_digits.yaml",
            "method.matching=0.5",
            "method.steps=5",
        ],
    },
}
FEATURES = {"digits": "digits", "fashion_mnist": "fashion", "cdrl": "digits"}
SAMPLES = {"digits": 1440, "fashion_mnist": 1000, "cdrl": 720}
BLOCK = {"digits": 360, "fashion_mnist": 1000, "cdrl": 180}
SECONDS = {"digits": 370, "fashion_mnist": 240, "cdrl": 180}
SEEDS = {"digits": "0-2", "fashion_mnist": "0-2", "cdrl": "10-12"}
BITS = 100  # images that bits/dim are of
HELD_OUT = 180  # of the 1437 training digits, to choose by
QUIET = ["trainer.loggers=csv", "trainer.progress=false", "sample.every=0", "eval.loss_every=0"]
# They change no row; seconds= does, and stands in the command by itself.
SELECTING = ("out", "work", "pictures", "seeds", "methods", "seconds")
PROBE = (20, 80)  # steps of the two short trainings whose difference is the cost of a step


def measure(argv):
    """Train, score and draw; see the module's docstring."""
    names, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags or len(names) != 1 or names[0] not in METHODS:
        print(__doc__.strip())
        return
    (name,), command = names, record.command_line("energies", argv, SELECTING)
    seconds = float(words.pop("seconds", str(SECONDS[name])))
    command += f" seconds={seconds:g}"
    seeds = parse_seeds(words.pop("seeds", SEEDS[name]))
    methods = words.pop("methods", ",".join(METHODS[name])).split(",")
    for method in methods:
        check_choice("methods", method, METHODS[name])
    path = Path(words.pop("out", "benchmarks/results")) / f"energies_{name}.json"
    work = Path(words.pop("work", "runs/energies")) / name
    pictures = Path(words.pop("pictures", "docs"))
    given = [f"{key}={text}" for key, text in words.items()]
    if name == "cdrl":
        given += chosen_on(work)
    torch.set_num_threads(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    order, rows = list(METHODS[name]), record.rows(path, command)
    for seed in seeds:
        for method in methods:
            if any((row["method"], row["seed"]) == (method, seed) for row in rows):
                continue
            folder = work / f"{method.replace(' ', '_')}-{seed}"
            row = one_row(name, method, seed, seconds, folder, given)
            # Read again: the same command may run on another core, with other methods or seeds.
            rows = [*record.rows(path, command), row]
            rows.sort(key=lambda row: (order.index(row["method"]), row["seed"]))
            record.write(path, command, seconds=seconds, table=table(rows), rows=rows)
    first = [row for row in rows if row["seed"] == rows[0]["seed"]]  # of one seed: it takes long
    for done in first if name != "cdrl" else ():
        if "diverged" in done or "bits" in done["scores"]:
            continue
        bits, rows = bits_of(done, work), record.rows(path, command)
        row = next(r for r in rows if (r["method"], r["seed"]) == (done["method"], done["seed"]))
        row["scores"]["bits"] = bits
        record.write(path, command, seconds=seconds, table=table(rows), rows=rows)
    print(json.dumps(table(rows), indent=1))
    draw(name, rows, work, pictures)


def one_row(name, method, seed, seconds, folder, given):
    """Return what one training gave: its steps, seconds and scores, or how it diverged."""
    words = [*METHODS[name][method], *QUIET, *given, f"seed={seed}"]
    training = record.once(folder / "training.json", lambda: train_for(words, seconds, folder))
    told = [word for word in words if not word.startswith("data.root")]
    if "diverged" in training:
        return {"method": method, "seed": seed, "words": told, **training}
    run = folder / training["run"]
    model, scores = genmodels.load(run), {}
    started = time.process_time()
    generated = generation.generate_all(model, range(SAMPLES[name]), batch=BLOCK[name])
    sampling = (time.process_time() - started) / len(generated)
    images.write_png(folder / "samples.png", images.grid(generated[:40], 10))
    (real, _), (held_out, _) = (load_split(model.cfg.data, s) for s in ("train", "test"))
    held_out = held_out[: BLOCK[name]]
    for metrics, features in (
        (("nn1", "nn1_fake", "nn1_real"), "pixels"),
        (("fd",), FEATURES[name]),
    ):
        for metric in metrics:
            scorer = Scorer([metric], features, reference=held_out, equal=True, resamples=50)
            scores[metric] = next(iter(scorer(generated).values()))
    near = Scorer(["memorised"], "pixels", reference=held_out, train=real, held_out=held_out)
    scores["memorised"] = next(iter(near(generated).values()))
    if model.OOD_SCORES:
        other = "mnist" if name == "fashion_mnist" else None
        sets = ",".join(filter(None, ("interpolation", "noise", other)))
        out = folder / "ood.json"
        evaluate([str(run), f"ood={sets}", f"out={out}"])
        scores["ood"] = json.loads(out.read_text())["metrics"]
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "method": method,
        "seed": seed,
        "words": told,
        "parameters": parameters,
        **{key: value for key, value in training.items() if key != "run"},
        "sample_cpu_seconds_per_image": round(sampling, 5),
        "scores": scores,
    }


def bits_of(row, work):
    """Return {kind: bits/dim of the first held-out images} of a row's training, {} of GEDI.

    Exact up to an ODE's steps of EDM and GBM; of energies bounds from above and from below by
    annealed importance sampling.
    """
    folder = work / f"{row['method'].replace(' ', '_')}-{row['seed']}"
    training = json.loads((folder / "training.json").read_text())
    model = genmodels.load(folder / training["run"])
    if not model.LIKELIHOODS:
        return {}
    pixels, labels = (part[:BITS] for part in load_split(model.cfg.data, "test"))
    return likelihood_scores(model, pixels, labels if model.classes else None)[0]


def chosen_on(work):
    """Return the words that train on some of the training digits, the others held out."""
    path = work / "training_digits.npz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        source = read_source("digits:train")
        pixels = source.pixels.permute(0, 2, 3, 1).numpy()
        images.write_npz(path, images=pixels, labels=np.array(source.labels))
    share = HELD_OUT / len(np.load(path)["images"])
    return ["data.name=npz", f"data.root={path}", f"data.holdout={share}"]


def train_for(words, seconds, folder):
    """Return {run, steps, CPU seconds} of the training that takes this long, or {diverged}."""
    took = {}
    for steps in PROBE:
        started = time.process_time()
        train(last_words([*words, f"trainer.max_steps={steps}", f"out_dir={folder}/probe"]))
        took[steps] = time.process_time() - started
    cost = (took[PROBE[1]] - took[PROBE[0]]) / (PROBE[1] - PROBE[0])
    most = [int(word.partition("=")[2]) for word in words if word.startswith("trainer.max_steps=")]
    steps = max(1, min([round(seconds / cost), *most]))
    started = time.process_time()
    try:
        run = train(last_words([*words, f"trainer.max_steps={steps}", f"out_dir={folder}"]))
    except RuntimeError as error:
        if "method.divergence" not in str(error):
            raise
        return {"steps": steps, "diverged": str(error).partition(";")[0]}
    spent = time.process_time() - started
    reached = checkpoint.read_checkpoint(run)["global_step"]
    run = str(Path(run).relative_to(folder))
    return {"run": run, "steps": reached, "train_cpu_seconds": round(spent, 1)}


def table(rows):
    """Return {method: {score: mean over seeds and its standard error}}."""
    out = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        all_own = [row for row in rows if row["method"] == method]
        own = [row for row in all_own if "diverged" not in row]
        out[method] = {"seeds": len(own), "diverged": len(all_own) - len(own)}
        if not own:
            continue
        for key in ("nn1", "nn1_fake", "nn1_real", "fd", "memorised"):
            values = [row["scores"][key]["value"] for row in own]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            out[method][key] = {"mean": statistics.mean(values), "stderr": error}
        for key in own[0]["scores"].get("bits", {}):
            out[method][key] = own[0]["scores"]["bits"][key]["value"]
        out[method]["train_cpu_seconds"] = statistics.mean(r["train_cpu_seconds"] for r in own)
    return out


def draw(name, rows, work, pictures):
    """Write a gallery (four rows of ten for each method) and a figure: FD against CPU seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if "diverged" not in row]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, len(methods), figsize=(3 * len(methods), 1.7), squeeze=False)
    for axis, method in zip(axes[0], methods):
        seed = next(row["seed"] for row in rows if row["method"] == method)
        axis.imshow(plt.imread(work / f"{method.replace(' ', '_')}-{seed}" / "samples.png"))
        axis.set_title(method)
        axis.axis("off")
    figure.savefig(pictures / f"energies_{name}.png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    figure, axis = plt.subplots(figsize=(5, 3.5))
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        seconds = [row["train_cpu_seconds"] for row in own]
        axis.plot(seconds, [row["scores"]["fd"]["value"] for row in own], "o", label=method)
    axis.set(xlabel="CPU seconds of training", ylabel=f"FD ({FEATURES[name]})", yscale="log")
    axis.legend()
    figure.savefig(pictures / f"energies_{name}_seconds.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
