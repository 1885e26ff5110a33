"""DDO against continued likelihood training of the same under-sized EDM, and what it costs.

    python -m benchmarks.ddo digits|fashion_mnist [seeds=0-2] [out=benchmarks/results]
        [work=runs/ddo_bench] [figure=FILE.png] [guidance=1,2] [key=value ... of the DDO config]

For each seed: train the base model, then play configs/ddo_NAME.yaml, then train the base for as
many steps in the plain way, with the same lr, warm-up, batch and EMA. Every checkpoint of both is
scored with the same seeds against the training images; the final scores are on other seeds, against
the held-out images. Stopped, the command goes on where it was. Writes OUT/ddo_NAME.json.

guidance=1,2 (with method.label_dropout=0.1) trains the base too with hidden labels, and makes the
final scores with each weight of classifier-free guidance, and with them the share of images whose
nearest training image, by the features, is of the class that was asked for. Writes
OUT/ddo_NAME_guidance.json.
"""

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import genmodels
from benchmarks import record
from benchmarks.record import last_words
from genmodels import checkpoint, cli
from genmodels.commands.train import train
from genmodels.config import check, load_config, to_plain
from genmodels.config.words import parse_seeds, parse_value, split_words
from genmodels.data import ImageDataModule
from genmodels.methods import METHODS
from genmodels.methods.edm import EDM
from genmodels.metrics.features import load_features
from genmodels.networks import NETWORKS
from genmodels.run import Run
from genmodels.training.judge import Judge, final_split, make_scorer

# The base models are small on purpose: what DDO repairs is what the model cannot fit.
BASES = {
    "digits": ["configs/edm_digits.yaml", "trainer.max_steps=1200", "optim.lr=2e-3"],
    "fashion_mnist": [
        "configs/edm_fashion.yaml",
        "data.pad=0",
        "data.batch_size=64",
        "trainer.max_time=",
        "trainer.precision=32-true",
        "trainer.compile=false",
        "trainer.channels_last=false",
        "trainer.max_steps=1800",
        "optim.lr=2e-3",
        "optim.rampup=6400",
        "optim.decay=cosine",
        "checkpoint.every=300",
        "eval.loss_every=600",
    ],
}
CONFIGS = {"digits": "configs/ddo_digits.yaml", "fashion_mnist": "configs/ddo_fashion.yaml"}
COMMON = ["trainer.loggers=csv", "trainer.progress=false", "sample.every=0"]
METRICS = ["fd", "nn1", "nn1_fake", "nn1_real"]


def measure(argv):
    """Run one benchmark; see the module's docstring."""
    names, words, flags = split_words(argv)
    if flags or len(names) != 1 or names[0] not in BASES:
        print(__doc__.strip())
        return
    (name,), started = names, time.monotonic()
    out = Path(words.pop("out", "benchmarks/results"))
    work = Path(words.pop("work", "runs/ddo_bench"))
    seeds, figure = parse_seeds(words.pop("seeds", "0-2")), words.pop("figure", "")
    weights = parse_value("guidance", words.pop("guidance", "1"), list[float])
    stem = f"ddo_{name}" if weights == [1] else f"ddo_{name}_guidance"
    changed = [f"{key}={text}" for key, text in words.items()]
    cfg = load_config([CONFIGS[name]], changed, methods=METHODS, networks=NETWORKS)
    hidden = cfg.method.label_dropout > 0 and cfg.data.labels
    check(weights == [1] or hidden, "guidance", weights, "needs method.label_dropout=0.1")
    folder = work / stem.removeprefix("ddo_")
    keep_settings(folder / "config.json", cfg)
    rows = []
    for seed in seeds:
        rows.append(one_seed(name, cfg, seed, folder, changed, weights))
        out.mkdir(parents=True, exist_ok=True)
        result = record.write(
            out / f"{stem}.json",
            record.command_line("ddo", argv, ("out", "work", "figure")),
            seconds_of_this_call=round(time.monotonic() - started, 1),
            seeds=seeds[: len(rows)],
            changes=changes(rows),
            cost=cost(cfg, rows),
            runs=rows,
        )
        if figure:
            draw(name, rows, figure)
    table = [[key, *(f"{v:.3f}" for v in row.values())] for key, row in result["changes"].items()]
    asked = ["asked class"] if weights != [1] else []
    cli.print_table(
        f"{name}, seeds {seeds}: mean and sd over seeds, held-out images",
        ["model", "fd", "sd", "change", "|nn1 - 0.5|", "sd", *asked],
        table,
    )


def one_seed(name, cfg, seed, work, changed, weights):
    """Return curves and final scores of one base model, of its DDO and its continued training.

    The final scores are with each of the weights of guidance.
    """
    hidden = cfg.method.label_dropout if weights != [1] else 0
    network = [f"network.{key}={_word(value)}" for key, value in vars(cfg.network).items()]
    plain = [*BASES[name], *network, "network.dropout=0", f"method.label_dropout={hidden}", *COMMON]
    plain += [f"seed={seed}"]
    base = go_on([*plain, "ema.half_life=10000"], work / f"base-{seed}")
    ddo = go_on(
        [CONFIGS[name], *changed, *COMMON, f"init={base}", f"seed={seed}"], work / f"ddo-{seed}"
    )
    longer = [
        f"init={base}",
        f"optim.lr={cfg.optim.lr}",
        f"optim.rampup={cfg.optim.rampup}",
        "optim.decay=none",
        "ema.rampup=0",
        f"ema.half_life={cfg.ema.half_life}",
        f"trainer.max_steps={cfg.trainer.max_steps}",
        f"checkpoint.every={cfg.eval.every}",
        f"data.batch_size={cfg.data.batch_size}",
        "checkpoint.keep=0",
    ]
    mle = go_on([*plain, *longer], work / f"mle-{seed}")
    states = [json.loads(path.read_text()) for path in sorted(ddo.glob("round-*/state.json"))]
    cfg = replace(cfg, seed=seed, eval=replace(cfg.eval, metrics=METRICS))
    judge = Judge(cfg, ImageDataModule(cfg.data), "cpu")
    curve = record.once(
        work / f"mle-{seed}.json",
        lambda: [
            {"step": int(path.stem[5:])} | judge.score(genmodels.load(path))
            for path in Run(mle).steps()
        ],
    )
    best = min(curve, key=lambda entry: entry["fd"])["step"]
    models = {"base": base, "mle_best": Run(mle).checkpoint(best), "mle_last": mle}
    for state in states:
        if state["winner"]["step"]:
            models[f"ddo_{state['round']}"] = ddo / f"round-{state['round']:02d}" / "winner.ckpt"
    final = {}
    for key, path in models.items():
        kept = f"{work}/final-{seed}-{key}"
        if weights == [1]:
            final[key] = record.once(
                Path(f"{kept}.json"), lambda p=path: judge.final(genmodels.load(p))
            )
        for w in weights if weights != [1] else ():
            final[f"{key}, guidance {w:g}"] = record.once(
                Path(f"{kept}-{w:g}.json"), lambda p=path, w=w: guided_scores(judge, p, w)
            )
    for state in states:
        state["reference"].pop("model")  # a path of this machine
    parameters = sum(p.numel() for p in genmodels.load(base).parameters())
    return {
        "seed": seed,
        "parameters": parameters,
        "final": final,
        "mle_curve": curve,
        "rounds": states,
    }


def guided_scores(judge, path, weight):
    """Return the final scores of a model with this weight of guidance, 1 = none.

    Beside Judge.final's "asked_class", the share of images that are nearest to a training image of
    the class that they were made for, by the features.
    """
    model, data, cfg = genmodels.load(path), judge.data, judge.cfg.eval
    model.cfg.method.guidance = weight
    pictures, labels = judge.generate(model, range(cfg.num))
    scores = make_scorer(cfg, data, final_split(data), resamples=100)(pictures)
    features = load_features(cfg.features)
    real, known = data.train
    nearest = torch.cdist(features(pictures), features(real)).argmin(dim=1)
    right = (known[nearest] == torch.tensor(labels)).float()
    scores["asked_class"] = {
        "value": float(right.mean()),
        "stderr": float(right.std()) / len(right) ** 0.5,
    }
    return scores


def keep_settings(path, cfg):
    """Write the DDO config; ValueError if the folder's runs and scores are those of another one."""
    plain = json.loads(json.dumps(to_plain(cfg)))
    path.parent.mkdir(parents=True, exist_ok=True)
    if record.once(path, lambda: plain) != plain:
        raise ValueError(f"work={path.parent.parent}: holds runs with other settings; name another")


def go_on(argv, folder):
    """Run train.py in this folder, or go on with the run that is there; return the run's folder."""
    found = [path.parent for path in sorted(folder.glob("*/*/config.yaml"))]
    if found:
        return train([f"resume={found[-1]}"])
    return train(last_words([*argv, f"out_dir={folder}"]))


def changes(rows):
    """Return {model: fd and |nn1 - 0.5| over the seeds, and the change of fd from the base}."""
    table = {}
    for key in dict.fromkeys(key for row in rows for key in row["final"]):
        own = [row["final"] for row in rows if key in row["final"]]
        fd = [final[key]["fd"]["value"] for final in own]
        base = next(iter(own[0]))  # without guidance, if it is scored so
        ratio = [final[key]["fd"]["value"] / final[base]["fd"]["value"] - 1 for final in own]
        off = [abs(final[key]["nn1"]["value"] - 0.5) for final in own]
        table[key] = {
            "fd": statistics.mean(fd),
            "fd_sd": _sd(fd),
            "change": statistics.mean(ratio),
            "nn1_off": statistics.mean(off),
            "nn1_off_sd": _sd(off),
        }
        if "asked_class" in own[0][key]:
            shares = [final[key]["asked_class"]["value"] for final in own]
            table[key]["asked_class"] = statistics.mean(shares)
    return table


def cost(cfg, rows, pairs=12):
    """Return what a DDO step costs beside an EDM step of the same network and batch, and the rest.

    Steps are timed in turns and the ratio is the median over the pairs: other work on the machine
    then changes it little. `saved_bytes` is what autograd keeps for the backward pass.
    """
    model = checkpoint.build(cfg, reference=checkpoint.build(cfg)).train()
    count = cfg.data.batch_size
    data = {
        "image": torch.rand(count, *model.shape),
        "n": torch.arange(count),
        "label": torch.randint(max(model.classes, 1), (count,)),
    }
    both = data | {"fake": data["image"].flip(0), "fake_label": data["label"].flip(0)}
    losses = {"edm": lambda: EDM.loss(model, data)[0], "ddo": lambda: model.loss(both)[0]}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-9)
    seconds, saved = {key: [] for key in losses}, {}
    for _ in range(pairs):
        for key, loss in losses.items():
            started = time.perf_counter()
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[key].append(time.perf_counter() - started)
    for key, loss in losses.items():
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss()
        saved[key] = sum(kept.values())
    rounds = [state for row in rows for state in row["rounds"]]
    curves = [entry for state in rounds for c in state["candidates"] for entry in c["curve"]]
    return {
        "step_seconds": {key: statistics.median(values[2:]) for key, values in seconds.items()},
        "step_ratio": statistics.median(
            b / a for a, b in list(zip(seconds["edm"], seconds["ddo"]))[2:]
        ),
        "saved_bytes": saved,
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "pool_seconds_per_image": statistics.mean(
            state["pool_seconds"] / state["pool"]["num"] for state in rounds
        ),
        "score_seconds": statistics.mean(entry["score_seconds"] for entry in curves),
        "train_seconds_between_scores": statistics.mean(e["train_seconds"] for e in curves),
    }


def draw(name, rows, path):
    """Write the picture of the scores over the steps of every round and of the plain training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    number = max(len(row["rounds"]) for row in rows)
    figure, axes = pyplot.subplots(1, number, figsize=(4.5 * number, 3.4), sharey=True)
    for i, axis in enumerate(axes if number > 1 else [axes]):
        for row in rows:
            colour = f"C{rows.index(row)}"
            if i == 0:
                start = row["rounds"][0]["start"]["fd"]
                curve = [(0, start), *((e["step"], e["fd"]) for e in row["mle_curve"])]
                axis.plot(*zip(*curve), ":", color=colour, label=f"seed {row['seed']}, plain")
            for state in row["rounds"][i : i + 1]:
                for candidate in state["candidates"]:
                    curve = [state["start"], *candidate["curve"]]
                    best = min(curve, key=lambda entry: entry["fd"])
                    points = [(entry["step"], entry["fd"]) for entry in curve]
                    axis.plot(*zip(*points), color=colour, label=f"seed {row['seed']}, DDO")
                    axis.plot(best["step"], best["fd"], "o", color=colour)
        axis.set_title(f"{name}, round {i + 1}")
        axis.set_xlabel("steps")
    axes = axes if number > 1 else [axes]
    axes[0].set_ylabel("FD to the training images")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _sd(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _word(value):
    return ",".join(map(str, value)) if isinstance(value, list) else value


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
