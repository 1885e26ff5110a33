"""EDM2 beside EDM on the digits at equal CPU seconds, and EDM2's averages of several widths.

    python -m benchmarks.edm2_digits [seconds=180] [seeds=0-2] [methods=EDM,EDM2]
        [widths=0.03,0.05,...] [num=720] [out=benchmarks/results] [work=runs/edm2_digits]
        [picture=docs/edm2_sigma_rel.png]
    python -m benchmarks.edm2_digits choose=NAME [seconds=90] [seeds=10] [methods=EDM2]
        [key=value of the config]

For each seed and method: the cost of a step is measured in a short training, then one of as many
steps as fit into `seconds` of CPU time (of the process, one thread); the row says what it took.
Samples, one set of seeds for all, are scored against the held-out digits in blocks of equal size.
A run that keeps averages (ema.sigma_rel) is scored at every width; its `scores` are those of the
model itself, the first width. Stopped, the command goes on where it was: finished rows and
trainings stay. Writes OUT/edm2_digits.json and the figure.

choose=NAME is how the settings of configs/edm2_digits.yaml were chosen: the same on 1257 of the
training digits, scored against the other 180, a row of that name in OUT/edm2_digits_choice.json.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

import genmodels
from benchmarks import record
from benchmarks.energies import QUIET, chosen_on, train_for
from genmodels import cli, generation
from genmodels.checkpoint.ema import averaged_models, averages_of
from genmodels.config import check
from genmodels.config.words import check_choice, check_flags, parse_seeds, parse_value, split_words
from genmodels.data import load_split
from genmodels.evaluation.scorer import Scorer
from genmodels.run import Run

METHODS = {
    "EDM": ["configs/edm_digits.yaml"],
    "EDM2": ["configs/edm2_digits.yaml"],
    # The average of before: one, exponential.
    "EDM2 half-life": [
        "configs/edm2_digits.yaml",
        "ema.sigma_rel=[]",
        "ema.half_life=20000",
    ],
}
WIDTHS = "0.03,0.05,0.075,0.1,0.15,0.2"
SCORES = ("nn1", "nn1_fake", "nn1_real", "fd")
BATCH = 360


def measure(argv):
    """Train, score and draw; see the module's docstring."""
    names, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags or names:
        print(__doc__.strip())
        return
    command = record.command_line("edm2_digits", argv, ("out", "work", "picture"))
    choose = words.pop("choose", "")
    seconds = float(words.pop("seconds", "90" if choose else "180"))
    seeds = parse_seeds(words.pop("seeds", "10" if choose else "0-2"))
    methods = words.pop("methods", "EDM2" if choose else "EDM,EDM2").split(",")
    for method in methods:
        check_choice("methods", method, METHODS)
    widths = parse_value("widths", words.pop("widths", WIDTHS), list[float])
    num = int(words.pop("num", "720"))
    stem = "edm2_digits_choice" if choose else "edm2_digits"
    path = Path(words.pop("out", "benchmarks/results")) / f"{stem}.json"
    work = Path(words.pop("work", "runs/edm2_digits"))
    picture = words.pop("picture", "docs/edm2_sigma_rel.png")
    given = [f"{key}={text}" for key, text in words.items()]
    torch.set_num_threads(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    if choose:
        given += chosen_on(work)
    for seed in seeds:
        for method in methods:
            key = {"choice": choose} if choose else {}
            key |= {"method": method, "seed": seed}
            words = [*METHODS[method], *QUIET, *given, f"seed={seed}"]
            shown = [word for word in words if not word.startswith("data.root")]
            asked = {"seconds": seconds, "num": num, "words": shown}
            done = next((row for row in rows if key.items() <= row.items()), None)
            if done:
                other = done["command"]
                check(asked.items() <= done.items(), "out", path, f"has a row of `{other}`")
                continue
            folder = work / "-".join(filter(None, (choose, method.replace(" ", "_"), str(seed))))
            row = one_row(words, seconds, widths, num, folder)
            rows.append(key | {"command": command} | asked | row)
            record.write(path, command, table=table(rows), rows=rows)
    print(json.dumps(table(rows), indent=1))
    if not choose and any(row["sweep"] for row in rows):
        draw(rows, picture)


def one_row(words, seconds, widths, num, folder):
    """Return what one training gave: its steps, seconds and scores, at each width too."""
    training = record.once(folder / "training.json", lambda: train_for(words, seconds, folder))
    run = folder / training["run"]
    model = genmodels.load(run)
    held_out, _ = load_split(model.cfg.data, "test")
    judges = [
        Scorer(metrics, features, reference=held_out, equal=True, resamples=50)
        for metrics, features in ((["nn1", "nn1_fake", "nn1_real"], "pixels"), (["fd"], "digits"))
    ]

    def scored(model):
        started = time.process_time()
        made = generation.generate_all(model, range(num), batch=BATCH)
        took = (time.process_time() - started) / num
        found = {name: score for judge in judges for name, score in judge(made).items()}
        return {name: found[name] for name in SCORES}, round(took, 5)

    scores, sampling = scored(model)
    sweep = {}
    if averages_of(Run(run)):
        own = model.cfg.ema.sigma_rel[0]
        others = [width for width in widths if width != own]
        sweep = {width: scored(each)[0] for width, each, _ in averaged_models(run, others)}
        sweep = {str(width): entry for width, entry in sorted((sweep | {own: scores}).items())}
    return {
        "settings": settings_of(model.cfg),
        "parameters": sum(p.numel() for p in model.parameters()),
        **{key: value for key, value in training.items() if key != "run"},
        "sample_cpu_seconds_per_image": sampling,
        "scores": scores,
        "sweep": sweep,
    }


def settings_of(cfg):
    """Return the settings that were tried out."""
    found = {"channels": cfg.network.channels, "batch_size": cfg.data.batch_size}
    found |= {key: getattr(cfg.method, key) for key in ("p_mean", "p_std")}
    found |= {key: getattr(cfg.optim, key) for key in ("lr", "rampup", "decay", "t_ref")}
    return found | {key: getattr(cfg.ema, key) for key in ("half_life", "sigma_rel")}


def table(rows):
    """Return {method or choice: {score: mean over seeds and its standard error}}, and the sweep."""
    found = {}
    for name in dict.fromkeys(row.get("choice", row["method"]) for row in rows):
        own = [row for row in rows if row.get("choice", row["method"]) == name]
        found[name] = {"seeds": len(own)} | means([row["scores"] for row in own])
        for key in ("steps", "train_cpu_seconds", "sample_cpu_seconds_per_image"):
            found[name][key] = round(statistics.mean(row[key] for row in own), 5)
        widths = dict.fromkeys(width for row in own for width in row["sweep"])
        sweep = {w: means([r["sweep"][w] for r in own if w in r["sweep"]]) for w in widths}
        found[name] |= {"sweep": sweep} if sweep else {}
    return found


def means(scores):
    """Return {score: mean over the trainings and its standard error}."""
    found = {}
    for key in SCORES:
        values = [score[key]["value"] for score in scores]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        found[key] = {"mean": statistics.mean(values), "stderr": error}
    return found


def draw(rows, path):
    """Write FD and nn1 over the width of the average: a line for each seed, and their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    before = [row for row in rows if row["method"] == "EDM2 half-life"]
    for axis, key, label in zip(axes, ("fd", "nn1"), ("FD (digits)", "nn1 (pixels)")):
        curves = {}
        for row in rows:
            for width, scores in row["sweep"].items():
                curves.setdefault(row["seed"], {})[float(width)] = scores[key]["value"]
        for seed, curve in curves.items():
            points = sorted(curve.items())
            axis.plot(*zip(*points), color=f"C{seed + 1}", lw=1, label=f"seed {seed}")
        common = sorted(set.intersection(*map(set, curves.values())))
        mean = [statistics.mean(curve[width] for curve in curves.values()) for width in common]
        axis.plot(common, mean, "o-", color="C0", label="mean")
        for row in before:
            value, seed = row["scores"][key]["value"], row["seed"]
            name = f"before: one exponential average, seed {seed}"
            axis.axhline(value, color=f"C{seed + 1}", ls="--", lw=1, label=name)
        axis.set(xlabel="sigma_rel", ylabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
