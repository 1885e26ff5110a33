"""GEDI on points in the plane: clusters and density over seeds. And the time of a step.

    python -m benchmarks.gedi toys [seeds=0-4] [out=benchmarks/results]
    python -m benchmarks.gedi time [device=cuda] [rounds=5] [out=...]

toys: trains configs/gedi_moons.yaml and gedi_circles.yaml through train.py for every seed, and
scores clusters and density on held-out points. Writes OUT/gedi_toys.json after each run, so that an
interrupted command goes on, and draws docs/gedi_{moons,circles}.png for the first seed (figures=:
another folder). What makes it stable: benchmarks.gedi_ablation.
time: a training step with K = 20 chains against the plain eager loop, in turns. Writes
OUT/gedi_time_DEVICE.json.
"""

import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import genmodels
from benchmarks import record
from benchmarks.record import last_words
from genmodels import cli
from genmodels.commands.train import train
from genmodels.config.words import check_flags, parse_seeds, split_words
from genmodels.data import load_split
from genmodels.evaluation import clusters
from genmodels.metrics.clustering import clustering_scores

DATA = ("moons", "circles")


def toys(words):
    """Train and score; see the module's docstring."""
    out = Path(words.pop("out", "benchmarks/results")) / "gedi_toys.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    figures = Path(words.pop("figures", "docs"))
    seeds = parse_seeds(words.pop("seeds", "0-4"))
    changed = [f"{key}={text}" for key, text in words.items()]
    command = record.command_line("gedi", ["toys", *changed])
    rows = record.rows(out, command)
    known = {(row["data"], row["seed"]) for row in rows}
    for seed, data in itertools.product(seeds, DATA):
        if (data, seed) in known:
            continue
        row, model = train_one(data, [*changed, f"seed={seed}"])
        rows.append({"data": data, "seed": seed} | row)
        print(*(f"{key} {rows[-1][key]}" for key in ("data", "seed", "nmi", "cpu_seconds")))
        if seed == seeds[0]:
            draw(model, figures / f"gedi_{data}.png")
        record.write(out, command, summary=summary(rows), rows=rows)
    print_summary(rows)


def train_one(data, words):
    """Return (scores on held-out points, model) of one training of the data's config."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["trainer.progress=false", "trainer.loggers=csv", "sample.every=0"]
        started = time.process_time()  # not what other work on the machine takes
        argv = [f"configs/gedi_{data}.yaml", f"out_dir={folder}", "checkpoint.keep=1", *quiet]
        run = train(last_words([*argv, *words]))
        seconds = time.process_time() - started
        model = genmodels.load(run)
    points, labels = load_split(model.cfg.data, "test")
    probabilities = clusters.assign(model, points, 1000)
    row = clustering_scores(probabilities.argmax(dim=1), labels)
    row |= {"confidence": float(probabilities.amax(dim=1).mean())}
    log_gamma = density(model)[2]
    with torch.no_grad():
        f = -model.energy(points)
    row |= {"mean_log_density": float((f - log_gamma).mean()), "num": len(points)}
    return row | {"cpu_seconds": round(seconds, 1)}, model


def density(model, side=200):
    """Return (log p on a grid over [-1, 1]^2 (side, side), p(y = 1 | x), log Gamma).

    Rows are y, from below; Gamma is the integral of exp(f) over the box by the midpoint rule.
    """
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x, y], dim=-1).reshape(-1, 2, 1, 1)
    with torch.no_grad():
        f = -model.energy(grid)
    log_gamma = float(f.logsumexp(dim=0)) + 2 * math.log(2 / side)
    log_p = (f - log_gamma).reshape(side, side)
    return log_p, model.cluster(grid)[:, 1].reshape(side, side), log_gamma


def draw(model, path):
    """Draw density, clusters and held-out points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log_p, side_of, _ = density(model)
    points, _ = load_split(model.cfg.data, "test")
    found = clusters.assign(model, points, 1000).argmax(dim=1)
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    box = {"origin": "lower", "extent": (-1, 1, -1, 1)}
    axes[0].imshow(log_p.clamp(min=float(log_p.max()) - 20), cmap="magma", **box)
    axes[0].set_title("log density (20 nats from the top)")
    axes[1].imshow(side_of, cmap="coolwarm", alpha=0.4, vmin=0, vmax=1, **box)
    x, y = points.flatten(1).T
    axes[1].scatter(x, y, c=found, cmap="coolwarm", s=3)
    axes[1].set_title("clusters and held-out points")
    for axis in axes:
        axis.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    figure.savefig(path, dpi=80)
    plt.close(figure)


def summary(rows):
    """Return {data: mean, least and standard deviation of NMI, mean log density, seeds}."""
    found = {}
    for data in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == data]
        nmi = [row["nmi"] for row in own]
        found[data] = {
            "nmi": statistics.mean(nmi),
            "least": min(nmi),
            "std": statistics.stdev(nmi) if len(nmi) > 1 else 0.0,
            "mean_log_density": statistics.mean(row["mean_log_density"] for row in own),
            "seeds": len(own),
        }
    return found


def print_summary(rows):
    """Print a table of both data sets."""
    table = [
        (
            data,
            *(f"{s[key]:.3f}" for key in ("nmi", "std", "least", "mean_log_density")),
            s["seeds"],
        )
        for data, s in summary(rows).items()
    ]
    names = ("data", "NMI", "std", "least", "log density", "seeds")
    cli.print_table("held-out points", names, table)


# ------------------------------------------------------------------------------------------------
# Time per step


def plain_step(model, optimizer, buffer, x, steps):
    """Do a training step as commonly written.

    The whole graph is kept in each chain step, indices are drawn with replacement, one
    pass of the network for each kind of image.
    """
    cfg = model.cfg.method
    index = torch.randint(len(buffer), (len(x),), device=x.device)
    fresh = 2 * torch.rand_like(x) - 1
    keep = (torch.rand(len(x), 1, 1, 1, device=x.device) > cfg.reinit).float()
    fake = (keep * buffer[index] + (1 - keep) * fresh).requires_grad_(True)
    for _ in range(steps):
        f = -model.energy(fake).sum()
        (grad,) = torch.autograd.grad(f, fake, retain_graph=True)
        fake.data += cfg.step * grad + cfg.noise_scale * torch.randn_like(fake)
    fake = fake.detach()
    buffer[index] = fake
    real = x + cfg.data_noise * torch.randn_like(x)
    z = model.outputs(real)[0]
    z_view = model.outputs(x + cfg.view_noise * torch.randn_like(x))[0]
    inv = -(z_view.softmax(1) * z.log_softmax(1)).sum(1).mean()
    prior = -z.softmax(1).mean(0).log().mean()
    gap = model.energy(fake).mean() - model.energy(real).mean()
    loss = -cfg.w_gen * gap + cfg.w_inv * inv + cfg.w_prior_mean * prior
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def step_times(words):
    """Measure both steps in turns and write the ratio; see the module's docstring."""
    device = words.pop("device", "cuda" if torch.cuda.is_available() else "cpu")
    out, rounds = Path(words.pop("out", "benchmarks/results")), int(words.pop("rounds", 5))
    config = words.pop("config", "configs/gedi_mnist.yaml")
    changed = [f"{key}={text}" for key, text in words.items()]
    # Without view distortions and with chains of 20 steps, which both sides then share.
    same = (
        "method.chain_steps=20",
        "method.view_affine=0",
        "method.view_crop=0",
        "method.view_flip=false",
        "method.view_jitter=0",
        "method.view_grey=0",
        "method.two_views=false",
        "method.l2=0",
        "method.clamp=false",
        "method.grad_clip=0",
    )
    model = genmodels.build(config, *same, *changed).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    count, state = model.cfg.data.batch_size, {"n": 0}
    x = 2 * torch.rand(count, *model.shape, device=device) - 1
    buffer = 2 * torch.rand(model.cfg.method.buffer, *model.shape, device=device) - 1

    def ours():
        n = state["n"] + torch.arange(count, device=device)
        state["n"] += count
        loss, _ = model.loss({"image": x, "label": torch.zeros_like(n), "n": n})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    sides = {"ours": ours, "plain": lambda: plain_step(model, optimizer, buffer, x, 20)}
    times = {name: [] for name in sides}
    # CPU time on the CPU: what other work on the machine takes is not counted.
    clock = time.perf_counter if device == "cuda" else time.process_time
    for i in range(rounds + 1):
        for name, side in sides.items():
            started = clock()
            side()
            if device == "cuda":
                torch.cuda.synchronize()
            if i:  # the first is a warm-up
                times[name].append(clock() - started)
    result = record.write(
        out / f"gedi_time_{device}.json",
        record.command_line("gedi", ["time", f"rounds={rounds}", *changed]),
        config=config,
        batch=count,
        clock=clock.__name__,
        chain_steps=20,
        milliseconds={name: 1e3 * statistics.median(values) for name, values in times.items()},
        ratio_plain_to_ours=statistics.median(p / o for p, o in zip(times["plain"], times["ours"])),
    )
    print(json.dumps(result, indent=1))


def run(argv):
    """Run one of the two; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    commands = {"toys": toys, "time": step_times}
    if flags or len(positionals) != 1 or positionals[0] not in commands:
        print(__doc__.strip())
        return
    commands[positionals[0]](words)


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
