"""What makes GEDI stable on the toys: one setting changed at a time, all runs trained at once.

    python -m benchmarks.gedi_ablation [seeds=10-12] [variants=gedi,no-gen] [name=gedi_ablation]
        [key=value ...]

The networks of all runs of a data set are stacked and trained by batched products, ten times
quicker than one after the other. So this is a second implementation of the same step: settings,
initial weights and data are those of configs/gedi_{moons,circles}.yaml, the noise is torch's own.
Writes OUT/NAME.json, after each data set.
"""

import math
import statistics
import sys
import time
from pathlib import Path

import torch

import genmodels
from benchmarks import record
from benchmarks.gedi import DATA
from genmodels import cli
from genmodels.config.words import check_flags, parse_seeds, parse_value, split_words
from genmodels.data import load_split
from genmodels.metrics.clustering import clustering_scores

# name -> what differs from the config
VARIANTS = {
    "gedi": (),
    "no-gen": ("method.w_gen=0",),
    "energy alone": ("method.w_inv=0", "method.w_prior_mean=0"),
    "no invariance": ("method.w_inv=0",),
    "invariance from the start": ("method.inv_start=0", "method.inv_ramp=0"),
    "w_inv = w_prior = 1": ("method.w_inv=1", "method.w_prior_mean=1"),
    "w_inv = w_prior = 10": ("method.w_inv=10", "method.w_prior_mean=10"),
    "w_inv = 50, w_prior = 10": ("method.w_inv=50", "method.w_prior_mean=10"),
    "tau = 0.1": ("method.tau=0.1",),
    "tau = 1": ("method.tau=1",),
    "lr = 1e-3": ("optim.lr=1e-3",),
    "batches of 128": ("data.batch_size=128",),
    "no L2 on f": ("method.l2=0",),
    "input scale 1": ("network.input_scale=1",),
    "buffer of 10,000": ("method.buffer=10000",),
    "chains 25 times slower": ("method.step=5e-5",),
    "noise of views 0.15": ("method.view_noise=0.15",),
    "detached target": ("method.detach_target=true",),
    "w_gen = 0.3": ("method.w_gen=0.3",),
    "w_gen = 3": ("method.w_gen=3",),
    "5 chain steps": ("method.chain_steps=5",),
    "width 25": ("network.width=25",),
    "width 300": ("network.width=300",),
}


class Runs:
    """R trainings at once: parameters, settings and chains have a first dimension R."""

    def __init__(self, models, seed):
        self.models, self.settings = models, [model.cfg.method for model in models]
        states = [list(model.parameters()) for model in models]
        self.parameters = [torch.stack([p.detach() for p in group]) for group in zip(*states)]
        self.scale = self.column([model.cfg.network.input_scale for model in models])
        self.random = torch.Generator().manual_seed(seed)
        shape = (len(models), self.settings[0].buffer, 2)
        self.buffer = 2 * torch.rand(shape, generator=self.random) - 1
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.parameters, models[0].cfg.optim.lr)

    def column(self, values):
        """Return one number for each run, (R, 1, 1)."""
        return torch.tensor([float(v) for v in values]).reshape(-1, 1, 1)

    def of(self, key):
        """Return a setting of all runs, (R, 1, 1)."""
        return self.column([getattr(setting, key) for setting in self.settings])

    def logits(self, x):
        """Return z / tau, (R, B, C), of points (R, B, 2)."""
        h = self.scale * x
        layers = list(zip(self.parameters[0::2], self.parameters[1::2]))
        for weight, bias in layers[:-1]:
            h = torch.relu(torch.baddbmm(bias[:, None], h, weight.mT))
        weight, bias = layers[-1]
        return torch.baddbmm(bias[:, None], h, weight.mT) / self.of("tau")

    def normal(self, like):
        """Return standard normals."""
        return torch.randn(like.shape, generator=self.random)

    def chains(self, count):
        """Return `count` chains of each run after chain_steps Langevin steps at temperature 1."""
        slots = torch.randperm(self.buffer.shape[1], generator=self.random)[:count]
        x = self.buffer[:, slots]
        new = torch.rand(*x.shape[:2], 1, generator=self.random) < self.of("reinit")
        x = torch.where(new, 2 * torch.rand(x.shape, generator=self.random) - 1, x)
        step = self.of("step")
        for _ in range(self.settings[0].chain_steps):
            x.requires_grad_(True)
            (grad,) = torch.autograd.grad(self.logits(x).logsumexp(2).sum(), x)
            x = (x.detach() + step * grad + (2 * step).sqrt() * self.normal(x)).clamp(-1, 1)
        self.buffer[:, slots] = x
        return x

    def step(self, x, number):
        """Do one training step of every run on points (R, B, 2)."""
        real = x + self.of("data_noise") * self.normal(x)
        view = x + self.of("view_noise") * self.normal(x)
        z = self.logits(torch.cat([real, view, self.chains(x.shape[1])], dim=1))
        z_real, z_view, z_fake = z.split(x.shape[1], dim=1)
        f_real, f_fake = z_real.logsumexp(2), z_fake.logsumexp(2)
        target = z_view.softmax(2)
        target = torch.where(self.of("detach_target") > 0, target.detach(), target)
        inv = (z_real.logsumexp(2) - (target * z_real).sum(2)).mean(1)
        log_pbar = z_real.log_softmax(2).logsumexp(1) - math.log(x.shape[1])
        w_gen, w_inv = torch.tensor([model._weights(number) for model in self.models]).T
        loss = (
            w_gen * (f_fake.mean(1) - f_real.mean(1))
            + w_inv * inv
            - self.of("w_prior_mean").flatten() * log_pbar.mean(1)
            + self.of("l2").flatten()
            * (f_real.square().mean(1) + f_fake.square().mean(1))
            * (w_gen > 0)
        )
        self.optimizer.zero_grad()
        loss.sum().backward()  # the runs share nothing
        self.optimizer.step()


def train_all(data, variants, seeds, words):
    """Return rows of scores on held-out points for every variant and seed.

    Runs of the same learning rate, batch, buffer, chain length and width are trained together.
    """
    groups = {}
    for variant in variants:
        for seed in seeds:
            model = genmodels.build(
                f"configs/gedi_{data}.yaml", f"seed={seed}", *VARIANTS[variant], *words
            )
            cfg = model.cfg
            key = (cfg.optim.lr, cfg.data.batch_size, cfg.trainer.max_steps, cfg.method.buffer)
            key += (cfg.method.chain_steps, cfg.network.width)
            groups.setdefault(key, []).append((variant, seed, model))
    return [row for group in groups.values() for row in train_group(data, group)]


def train_group(data, group):
    """Return the rows of [(variant, seed, model)], trained at once."""
    models = [model for _, _, model in group]
    cfg = models[0].cfg
    points = load_split(cfg.data, "train")[0].flatten(1)
    held_out, labels = load_split(cfg.data, "test")
    runs, started = Runs(models, group[0][1]), time.process_time()
    for number in range(cfg.trainer.max_steps):
        pick = torch.randint(len(points), (len(group), cfg.data.batch_size), generator=runs.random)
        runs.optimizer.param_groups[0]["lr"] = cfg.optim.lr * models[0].lr_factor(number)
        runs.step(points[pick], number)
    axis = (torch.arange(200) + 0.5) / 100 - 1
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        z = runs.logits(held_out.flatten(1).expand(len(group), -1, -1))
        f = torch.stack(
            [
                runs.logits(part.expand(len(group), -1, -1)).logsumexp(2)
                for part in grid.split(2000)
            ],
            1,
        ).flatten(1)
    log_gamma = f.logsumexp(1) + 2 * math.log(0.01)
    log_density = z.logsumexp(2).mean(1) - log_gamma
    seconds = (time.process_time() - started) / len(group)
    return [
        {"data": data, "variant": variant, "seed": seed, "cpu_seconds": round(seconds, 1)}
        | clustering_scores(own.argmax(1), labels)
        | {"confidence": float(own.softmax(1).amax(1).mean()), "mean_log_density": float(log_p)}
        for (variant, seed, _), own, log_p in zip(group, z, log_density)
    ]


def ablation(argv):
    """Train, score and write; see the module's docstring."""
    _, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags:
        print(__doc__.strip())
        return
    out = Path(words.pop("out", "benchmarks/results"))
    out = out / f"{words.pop('name', 'gedi_ablation')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    seeds = parse_seeds(words.pop("seeds", "10-12"))
    variants = parse_value("variants", words.pop("variants", ""), list[str]) or list(VARIANTS)
    chosen = parse_value("data", words.pop("data", ",".join(DATA)), list[str])
    changed, rows = [f"{key}={text}" for key, text in words.items()], []
    for data in chosen:
        rows += train_all(data, variants, seeds, changed)
        print_table(rows)
        command = record.command_line("gedi_ablation", argv)
        record.write(out, command, seeds=seeds, rows=rows)


def print_table(rows):
    """Print means over the seeds, and the least NMI."""
    groups, table = {}, []
    for row in rows:
        groups.setdefault((row["data"], row["variant"]), []).append(row)
    for key, own in groups.items():
        nmi = [row["nmi"] for row in own]
        log_p = statistics.mean(row["mean_log_density"] for row in own)
        table.append((*key, f"{statistics.mean(nmi):.3f}", f"{min(nmi):.3f}", f"{log_p:.2f}"))
    names = ("data", "variant", "NMI", "least", "log density")
    cli.print_table("held-out points", names, table)


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(ablation, argv)


if __name__ == "__main__":
    sys.exit(main())
