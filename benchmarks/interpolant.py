"""Interpolants: digits beside EDM and GBM at equal CPU seconds, a picture of image to image, a toy.

    python -m benchmarks.interpolant digits [seconds=150] [seeds=0-2] [out=benchmarks/results]
        [work=runs/interpolant] [key=value of every training ...]

trains EDM, an interpolant and GBM with the same network for as many steps as fit into `seconds` of
CPU time (one thread), samples, and scores 1,440 images of each in blocks of the 360 held-out
digits; the interpolant is sampled by its ODE and by its SDE. Writes OUT/interpolant_digits.json.
Settings of the interpolant were chosen on a quarter of the training digits, left out of the
training, with other seeds; those of the other methods are their configs'.

    python -m benchmarks.interpolant transport [out=benchmarks/results] [work=runs/interpolant]
        [pictures=docs] [key=value of the training ...]

trains configs/interpolant_mnist_to_fashion.yaml and draws what held-out digits become to
PICTURES/interpolant_transport.png: by the ODE, and twice by the SDE.

    python -m benchmarks.interpolant toy [...]

does so with configs/interpolant_toy.yaml: points on the way, by the ODE and the SDE, above the
path's own, PICTURES/interpolant_toy.png; and the energy distance to the data.

Stopped, each goes on where it was: finished trainings and rows stay.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

import genmodels
from benchmarks import record
from benchmarks.cdrl_toy import energy_distance
from benchmarks.demo import BLOCK, BLOCKS, score_rows
from benchmarks.energies import QUIET, train_for
from benchmarks.record import last_words
from genmodels import cli, generation, images
from genmodels.commands.train import train
from genmodels.config import DataConfig
from genmodels.config.words import check_flags, parse_seeds, split_words
from genmodels.data import load_split
from genmodels.data.toys import toy_points
from genmodels.sampling.interpolant import time_grid

FOLDERS = ("out", "work", "pictures")  # they change no number
CONFIGS = {
    "EDM": "configs/edm_digits.yaml",
    "interpolant": "configs/interpolant_digits.yaml",
    "GBM": "configs/gbm_digits.yaml",
}
# row: (the training, options of sample())
ROWS = {
    "EDM, ODE (Heun, 35 evaluations)": ("EDM", {"sampler": "heun", "steps": 18}),
    "interpolant, ODE (Heun, 35 evaluations)": ("interpolant", {"sampler": "heun", "steps": 18}),
    "interpolant, SDE (100 evaluations)": ("interpolant", {"sampler": "sde", "steps": 100}),
    "GBM, DLS (64 evaluations)": ("GBM", {"sampler": "dls", "steps": 64}),
}


def digits(words, command):
    """Train and score every method and seed; print the table."""
    seconds, out = float(words.pop("seconds", "150")), Path(words.pop("out", "benchmarks/results"))
    seeds = parse_seeds(words.pop("seeds", "0-2"))
    work = Path(words.pop("work", "runs/interpolant")) / "digits"
    given = [f"{key}={text}" for key, text in words.items()]
    torch.set_num_threads(1)
    path = out / "interpolant_digits.json"
    rows = record.rows(path, command)
    (real, _), (test, _) = (load_split(DataConfig(name="digits"), s) for s in ("train", "test"))
    for seed in seeds:
        for method, config in CONFIGS.items():
            if any((row["training"], row["seed"]) == (method, seed) for row in rows):
                continue
            folder = work / f"{method}-{seed}"
            training = [config, *QUIET, *given, f"seed={seed}"]
            made = record.once(
                folder / "training.json",
                lambda words=training, folder=folder: train_for(words, seconds, folder),
            )
            model = genmodels.load(folder / made.pop("run"))
            for name, (trained, options) in ROWS.items():
                if trained != method:
                    continue
                generated, cost = sampled(model, options)
                facts = {"row": name, "training": method, "seed": seed, "options": options}
                facts |= made | {"sample_cpu_seconds_per_image": cost}
                rows.append(facts | {"scores": score_rows({name: generated}, real, test)[name]})
            record.write(path, command, seconds=seconds, table=table(rows), rows=rows)
    print(json.dumps(table(rows), indent=1))


def sampled(model, options):
    """Return (uint8 images of BLOCKS blocks, CPU seconds for each image)."""
    count, started = BLOCK * BLOCKS, time.process_time()
    generated = generation.generate_all(model, range(count), batch=BLOCK, progress=False, **options)
    return generated, round((time.process_time() - started) / count, 5)


def table(rows):
    """Return {row: {score: mean over seeds and its standard error}}."""
    out = {}
    for name in dict.fromkeys(row["row"] for row in rows):
        own = [row for row in rows if row["row"] == name]
        out[name] = {"seeds": len(own)}
        for key in own[0]["scores"]:
            values = [row["scores"][key]["value"] for row in own]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            out[name][key] = {"mean": round(statistics.mean(values), 4), "stderr": error}
        out[name]["train_cpu_seconds"] = statistics.mean(r["train_cpu_seconds"] for r in own)
    return out


def trained(config, words, work):
    """Return (model, {seconds, steps, words}) of a training, done once."""
    words = [config, *QUIET, *words]

    def make():
        started = time.process_time()
        run = train(last_words([*words, f"out_dir={work}"]))
        return {"run": str(run), "train_cpu_seconds": round(time.process_time() - started, 1)}

    torch.set_num_threads(1)
    made = record.once(work / "training.json", make)
    model = genmodels.load(made["run"])
    facts = {"train_cpu_seconds": made["train_cpu_seconds"], "words": words}
    return model, facts | {"steps": model.cfg.trainer.max_steps, "seed": model.cfg.seed}


def transport(words, command):
    """Train MNIST to Fashion-MNIST; draw held-out digits above what they become."""
    out, work, pictures = folders(words)
    given = [f"{key}={text}" for key, text in words.items()]
    config = "configs/interpolant_mnist_to_fashion.yaml"
    model, facts = trained(config, given, work / "transport")
    start, _ = load_split(DataConfig(name="mnist", root=model.cfg.data.root), "test")
    start = images.from_uint8(start[:16])
    rows, states = [start], []
    ode = model.transport(start, callback=lambda i, x: states.append(x))
    rows += [states[len(states) * k // 6].float() for k in range(1, 6)] + [ode]
    for number in (0, 1):
        seeds = range(100 * number, 100 * number + len(start))
        rows.append(model.transport(start, seeds=seeds, sampler="sde", steps=100, eps=0.2))
    sheet = images.grid(torch.cat([images.to_uint8(row) for row in rows]), len(start))
    images.write_png(pictures / "interpolant_transport.png", images.enlarge(sheet, 2))
    count = 500
    made = generation.generate_all(model, range(count), batch=250, progress=False)
    from genmodels.evaluation.scorer import Scorer

    (real, _), (test, _) = (load_split(model.cfg.data, split) for split in ("train", "test"))
    digits_, _ = load_split(DataConfig(name="mnist", root=model.cfg.data.root), "test")
    scorer = Scorer(["fd"], "fashion", reference=test[:count], equal=True, resamples=40)
    compared = {"carried digits": made, "training clothes": real[:count], "digits": digits_[:count]}
    scores = {name: scorer(pixels)["fd"] for name, pixels in compared.items()}
    record.write(out / "interpolant_transport.json", command, **facts, fd_fashion=scores)
    print(json.dumps(scores, indent=1))


def toy(words, command):
    """Train the toy; draw its points on the way above those of the path itself."""
    out, work, pictures = folders(words)
    given = [f"{key}={text}" for key, text in words.items()]
    model, facts = trained("configs/interpolant_toy.yaml", given, work / "toy")
    data, count = model.cfg.data, 4000
    start = toy_points(data.source, count, seed=1000)[0]
    ends = [toy_points(data.name, count, seed=1000 + k)[0].flatten(1) for k in range(8)]
    shown = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    c = [model.path.at(torch.tensor(t)).numbers() for t in shown]
    pairs = ends[0].reshape(start.shape)
    z = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    panels = {"the path": [k.alpha * start + k.beta * pairs + k.gamma * z for k in c]}
    distances = {}
    for name, options in {
        "ODE": {"sampler": "heun", "steps": 40},
        "SDE": {"sampler": "sde", "steps": 200},
    }.items():
        states = [start]
        end = model.transport(start, callback=lambda i, x, s=states: s.append(x.float()), **options)
        cfg = model.method_with(options, tuple(options))
        times = time_grid(cfg.steps, cfg.grid, cfg.t_min, cfg.t_max, model.path)
        near = [min(range(len(times)), key=lambda i, t=t: abs(times[i] - t)) for t in shown]
        panels[name] = [states[i] for i in near]
        found = torch.tensor([energy_distance(end.flatten(1), other) for other in ends])
        distances[name] = {"mean": float(found.mean()), "std_over_data_sets": float(found.std())}
    floor = torch.tensor([energy_distance(a, b) for a, b in zip(ends[::2], ends[1::2])])
    distances["two data sets"] = {"mean": float(floor.mean()), "std": float(floor.std())}
    distances["source and data"] = {"mean": energy_distance(start.flatten(1), ends[0])}
    draw_toy(pictures / "interpolant_toy.png", panels, shown)
    record.write(out / "interpolant_toy.json", command, **facts, energy_distance=distances)
    print(json.dumps(distances, indent=1))


def draw_toy(path, panels, times):
    """Draw a row of densities for each of the panels, (4000, 2, 1, 1) each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (2 * len(times), 2.1 * len(panels))
    figure, axes = pyplot.subplots(len(panels), len(times), figsize=size, squeeze=False)
    for row, (name, states) in zip(axes, panels.items()):
        for axis, state, t in zip(row, states, times):
            x, y = state.flatten(1).T.numpy()
            axis.hist2d(x, y, bins=70, range=[[-1.2, 1.2]] * 2, cmap="magma")
            axis.set(xticks=[], yticks=[], aspect="equal")
            if name == next(iter(panels)):
                axis.set_title(f"t = {t:g}", fontsize=9)
        row[0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    pyplot.close(figure)


def folders(words):
    """Take the folders out of the words; return (out, work, pictures)."""
    names = {"out": "benchmarks/results", "work": "runs/interpolant", "pictures": "docs"}
    paths = [Path(words.pop(name, default)) for name, default in names.items()]
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    return paths


COMMANDS = {"digits": digits, "transport": transport, "toy": toy}


def measure(argv):
    """Do what the first word says; see the module's docstring."""
    names, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags or len(names) != 1 or names[0] not in COMMANDS:
        print(__doc__.strip())
        return
    COMMANDS[names[0]](words, record.command_line("interpolant", argv, FOLDERS))


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
