"""Noise2Score on real pictures beside its baselines, the same network and steps for all.

    python -m benchmarks.noise2score grey|colour|laws|blind|frame [only=NAME;...] [seed=0]
        [work=runs/noise2score] [out=benchmarks/results] [key=value ... of the config]
    python -m benchmarks.noise2score levels|scores|speed [model=MODEL] [out=benchmarks/results]

grey: BSD68 and Set12 under Gaussian noise of 25; colour: CBSD68; laws: Set12 under Poisson and
Gamma noise; blind: one model of levels 5 to 55, told and not told the level; frame: what learns
from noisy pictures alone beside its baselines, a small network and few steps, on BSD68 at 25. Each
trains what STUDIES names (only=: names that begin so, between semicolons), evaluates it as
evaluate.py denoise= does, and writes OUT/noise2score_STUDY.json and .md, and a picture; what is
there is kept, so that a killed command goes on. levels: how well level and law are told from a
picture alone, without a model; scores: how well the level is told from the score of MODEL, of
Gaussian noise. speed: megapixels per second against BM3D, one picture in turns.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import genmodels
from benchmarks import record
from benchmarks.record import last_words
from genmodels import cli, images, restoration
from genmodels.atomic import write_bytes
from genmodels.commands import evaluate
from genmodels.commands.train import train
from genmodels.config.words import check_flags, split_words
from genmodels.data import data_root
from genmodels.images import pictures
from genmodels.metrics.restoration import bm3d, load_bm3d
from genmodels.noise import LAWS
from genmodels.noise.levels import level_bound, level_from_patches, level_jvp, level_tv, pick_law

GREY, COLOUR = "configs/noise2score_bsd400.yaml", "configs/noise2score_cbsd400.yaml"
PUBLISHED = "configs/noise2score_published.yaml"
BLIND = ("data.noise.level=5", "data.noise.level_max=55", "trainer.max_steps=10000")
NOISE2NOISE = ("method.objective=noise2noise", "data.noise.target=second")
SUPERVISED = ("method.objective=supervised", "data.noise.target=clean")
LAWS_AT = {
    "poisson 0.01": ("poisson", 0.01),
    "poisson 0.05": ("poisson", 0.05),
    "gamma 100": ("gamma", 100),
    "gamma 50": ("gamma", 50),
}
BASELINES = {
    "Noise2Score, strict": (),
    "Noise2Score, fresh noise": ("data.noise.copies=fresh",),
    "R2R, strict": ("method.objective=r2r", "method.sigma_a_max=0.5"),
    "Noise2Noise, two copies": NOISE2NOISE,
    "supervised, fresh noise": (*SUPERVISED, "data.noise.copies=fresh"),
    "AR-DAE as published": (PUBLISHED,),
}
SMALL = ("network.channels=[32,64,96]", "trainer.max_steps=1500")
FRAME = {
    "Noise2Score": (),
    "R2R": ("method.objective=r2r", "method.sigma_a_max=0.5"),
    "GR2R": ("method.objective=gr2r", "method.probes=5"),
    "SURE": ("method.objective=sure",),
    "UNSURE": ("method.objective=unsure",),
    "Noise2Void": ("method.objective=noise2void",),
    "Neighbor2Neighbor": ("method.objective=neighbor2neighbor",),
    "Noise2Noise": NOISE2NOISE,
    "supervised": SUPERVISED,
}
NOISE = "default_rng([0, index of the picture]), not clipped; estimate clipped"
# study -> (config, {name: words, or another config and words}, test sets)
STUDIES = {
    "grey": (GREY, BASELINES, ("BSD68", "Set12")),
    "colour": (COLOUR, {"Noise2Score, strict": ()}, ("CBSD68",)),
    "blind": (GREY, {"Noise2Score, strict, 5 to 55": BLIND}, ("BSD68", "Set12")),
    "frame": (GREY, {name: (*SMALL, *words) for name, words in FRAME.items()}, ("BSD68",)),
    "laws": (
        GREY,
        {
            f"{name}, strict": (f"data.noise.law={law}", f"data.noise.level={level}")
            for name, (law, level) in LAWS_AT.items()
        },
        ("Set12",),
    ),
}


def study(name, words):
    """Train and evaluate what a study names; see the module's docstring."""
    config, variants, sets = STUDIES[name]
    out, work = (
        Path(words.pop(*pair))
        for pair in (("out", "benchmarks/results"), ("work", "runs/noise2score"))
    )
    only, seed = words.pop("only", ""), words.pop("seed", "0")
    changed = [f"{key}={text}" for key, text in words.items()]
    known = [key for key in variants if not only or any(key.startswith(o) for o in only.split(";"))]
    path = out / f"noise2score_{name}.json"
    command = record.command_line("noise2score", [name, *changed])
    work.mkdir(parents=True, exist_ok=True)
    for key in known:
        done = {(row["model"], row["seed"]) for row in record.rows(path, command)}
        if (key, int(seed)) in done:
            continue
        own = [config, *variants[key]] if PUBLISHED not in variants[key] else variants[key]
        run, facts = trained([*own, *changed, f"seed={seed}"], work)
        model = genmodels.load(run)
        law = model.cfg.data.noise.law
        rows = []
        for conditions in wanted(model, law):
            for folder in sets:
                row = {"model": key, "seed": int(seed), **facts, **conditions, "set": folder}
                rows.append(row | scored(run, folder, conditions))
        if key == next(iter(variants)):
            draw(model, law, sets[0], path.with_suffix(".png"))
        # Another process may have trained another one meanwhile.
        rows = record.rows(path, command) + rows
        record.write(path, command, threads=torch.get_num_threads(), noise=NOISE, rows=rows)
        write_bytes(path.with_suffix(".md"), table(rows).encode())
    print(table(record.rows(path, command)))


def wanted(model, law):
    """Return the levels to evaluate a model at, told or not."""
    low, high = model.levels.tolist()
    levels = [low] if low == high else [15.0, 25.0, 50.0]
    blinds = (False,) if low == high else (False, True)
    return [
        {"law": law, "level": level, "blind": blind, "estimator": estimator}
        for level in levels
        for blind in blinds
        for estimator in model.ESTIMATORS
    ]


def trained(words, work):
    """Return (run folder, facts about the training)."""
    started, cpu = time.monotonic(), time.process_time()
    quiet = ("trainer.progress=false", "trainer.loggers=csv", "checkpoint.keep=1")
    run = train(last_words([*words, f"out_dir={work}", *quiet]))
    model = genmodels.load(run)
    parameters = sum(p.numel() for p in model.parameters())
    return run, {
        "steps": model.cfg.trainer.max_steps,
        "parameters": parameters,
        "train_seconds": round(time.monotonic() - started),
        "train_cpu_seconds": round(time.process_time() - cpu),
    }


def scored(run, folder, conditions):
    """Return the scores of evaluate.py denoise=."""
    report = run / "denoise.json"
    words = [f"{key}={str(value).lower()}" for key, value in conditions.items()]
    if folder == "Set12" and conditions["estimator"] == "law":
        words.append("ensemble=true")  # eight times the work
    code = evaluate.main(
        last_words([str(run), f"denoise={pictures_in(folder)}", *words, f"out={report}"])
    )
    if code:
        raise RuntimeError(f"evaluate.py failed with {code}")
    found = json.loads(report.read_text())
    scores = {key: round(score["value"], 4) for key, score in found["metrics"].items()}
    if "level" in scores:
        scores["level_found"] = scores.pop("level")
    return scores | {"megapixels_per_second": found["restoring"]["megapixels_per_second"]}


def pictures_in(folder):
    """Return the folder of a test set."""

    class Root:
        root = ""

    return data_root(Root) / "denoise" / folder


def table(rows):
    """Return the results as Markdown."""
    lines = []
    for row in rows:
        blind = " (estimated)" if row["blind"] else ""
        blind += " corrected" if row.get("estimator") == "corrected" else ""
        ensemble = f"{row['psnr_ensemble']:.2f}" if "psnr_ensemble" in row else ""
        lines.append(
            (
                row["model"],
                row["set"],
                f"{row['law']} {row['level']:g}{blind}",
                f"{row['psnr_noisy']:.2f}",
                f"{row['psnr']:.2f}",
                f"{row['ssim']:.4f}",
                ensemble,
                f"{row['seed']}",
                f"{row['steps']}",
                f"{row['train_cpu_seconds']}",
            )
        )
    head = (
        "model",
        "set",
        "noise",
        "noisy",
        "PSNR",
        "SSIM",
        "with self-ensemble",
        "seed",
        "steps",
        "training, CPU s",
    )
    lines = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(model, law, folder, path):
    """Write noisy, restored and clean crops of three pictures."""
    level = float(model.levels.max()) if model.levels[0] == model.levels[1] else 25.0
    rows = []
    readers = list(pictures.find_pictures(pictures_in(folder)).values())
    for index in (1, 4, 7):
        x = readers[index]().values[0] / 255
        y = LAWS[law].sample(x, level, np.random.default_rng([0, index]))
        noisy = torch.from_numpy(y * 2 - 1).movedim(2, 0).float()
        clean = torch.from_numpy(x * 2 - 1).movedim(2, 0).float()
        shown = [noisy, restoration.restore(model, noisy, law, level), clean]
        rows += [images.to_uint8(picture[:, 64:224, 64:224]) for picture in shown]
    images.write_png(path, images.grid(torch.stack(rows), columns=3))


def levels(words):
    """Measure the estimates of level and law from single pictures; see the module's docstring."""
    out, rows = Path(words.pop("out", "benchmarks/results")), []
    conditions = [("gaussian", 15), ("gaussian", 25), ("gaussian", 50), *LAWS_AT.values()]
    for folder in ("Set12", "BSD68"):
        readers = pictures.find_pictures(pictures_in(folder)).values()
        clean = [read().values[0] / 255 for read in readers]
        for law, level in conditions:
            started, errors, right = time.process_time(), [], 0
            for index, x in enumerate(clean):
                y = LAWS[law].sample(x, level, np.random.default_rng([0, index]))
                y = torch.from_numpy(y).movedim(2, 0)
                errors.append(abs(level_from_patches(y, law) / level - 1))
                right += pick_law(y) == law
            seconds = (time.process_time() - started) / len(clean)
            row = {"set": folder, "law": law, "level": level, "mean_error": float(np.mean(errors))}
            row |= {"worst_error": max(errors), "law_right": right / len(clean)}
            rows.append(row | {"cpu_seconds_per_picture": seconds})
            print(rows[-1])
    path = out / "noise2score_levels.json"
    record.write(path, record.command_line("noise2score", ["levels"]), rows=rows)


@torch.no_grad()
def scores(words):
    """Measure the estimates of the level of Set12 from a learned score; see the module's docstring.

    The score of a model of a range of levels depends on the level it is told: it is told the middle
    first, and its estimate then, four times.
    """
    out = Path(words.pop("out", "benchmarks/results"))
    name = words.pop("model", "pretrained/noise2score_grey")
    model = genmodels.load(name)
    low, high = model.levels.tolist()
    estimates = {
        "patches": lambda y, score: level_from_patches(y, "gaussian"),
        "total variation": lambda y, score: level_tv(y, score(y), "gaussian"),
        "Jacobian": lambda y, score: level_jvp(y, score, "gaussian"),
        "bound": lambda y, score: level_bound(score(y)),
    }
    readers = pictures.find_pictures(pictures_in("Set12")).values()
    clean, rows = [read().values[0] / 255 for read in readers], []
    for level in [low] if low == high else [15, 25, 50]:
        row = {"level": level}
        for key, estimate in estimates.items():
            levels = []
            for index, x in enumerate(clean):
                y = LAWS["gaussian"].sample(x, level, np.random.default_rng([0, index]))
                y, told = torch.from_numpy(y).movedim(2, 0).float(), (low * high) ** 0.5
                for _ in range(1 if low == high or key == "patches" else 4):
                    told = torch.tensor([model.nearest_level(told)])
                    told = estimate(y, lambda y, told=told: model.score(y[None], told)[0])
                levels.append(told / level)
            row[key] = {
                "mean_ratio": float(np.mean(levels)),
                "mean_error": float(np.mean(np.abs(np.array(levels) - 1))),
            }
        rows.append(row)
        print(row)
    command = record.command_line("noise2score", ["scores", f"model={name}"])
    record.write(out / "noise2score_scores.json", command, rows=rows)


def speed(words):
    """Measure restoring against BM3D on one picture, in turns; see the module's docstring."""
    out, rounds = Path(words.pop("out", "benchmarks/results")), int(words.pop("rounds", 3))
    model = genmodels.load(words.pop("model", "pretrained/noise2score_grey"))
    x = next(iter(pictures.find_pictures(pictures_in("BSD68")).values()))().values[0] / 255
    y = LAWS["gaussian"].sample(x, 25, np.random.default_rng([0, 0]))
    noisy = torch.from_numpy(y * 2 - 1).movedim(2, 0).float()
    load_bm3d()
    sides = {
        "ours": lambda: restoration.restore(model, noisy, "gaussian", 25.0),
        "bm3d": lambda: bm3d(y, "gaussian", 25),
    }
    seconds = {key: [] for key in sides}
    sides["ours"]()
    for _ in range(rounds):
        for key, side in sides.items():
            started = time.perf_counter()
            side()
            seconds[key].append(time.perf_counter() - started)
    size = x.shape[0] * x.shape[1] / 1e6
    median = {key: float(np.median(values)) for key, values in seconds.items()}
    command = record.command_line("noise2score", ["speed", f"rounds={rounds}"])
    result = record.write(
        out / f"noise2score_speed_{model.device.type}.json",
        command,
        threads=torch.get_num_threads(),
        megapixels_per_second={key: size / value for key, value in median.items()},
        ratio_bm3d_to_ours=median["bm3d"] / median["ours"],
    )
    print(json.dumps(result, indent=1))


def run(argv):
    """Run one of the studies; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    others = {"levels": levels, "scores": scores, "speed": speed}
    if flags or len(positionals) != 1 or positionals[0] not in (*STUDIES, *others):
        print(__doc__.strip())
        return
    if positionals[0] in others:
        others[positionals[0]](words)
    else:
        study(positionals[0], words)


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
