"""Inverse problems: PSNR, SSIM and seconds of the solvers, beside plain interpolation.

    python -m benchmarks.inverse digits [num=20] [samples=4] [noise=0.05] [seed=0]
        [models=pretrained/edm_digits,...] [solvers=pigdm,diffpir,dps,langevin] [steps=50,200]
        [out=benchmarks/results/inverse_digits.json] [figure=docs/inverse_digits.png] [device=cpu]
    python -m benchmarks.inverse fashion_mnist models=pretrained/edm_fashion steps=100

The first NUM held-out pictures, half hidden, enlarged (4 x 4) and blurred, noise 0.05 on [-1, 1].
Plain: nearest known pixel, bicubic interpolation, Wiener's filter of white pictures. A row for each
(operator, model, solver, steps) is written as it is done; a row that is there is not made again, so
models and solvers may be added by another call. A model that knows no picture without a class is
told the true one. OUT with .md is the table; the figure is drawn with the first model, if it is not
there. Fashion-MNIST is padded where the model is; its files are in $GENMODELS_DATA.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch.nn import functional

import genmodels
from benchmarks import record
from genmodels import cli, images
from genmodels.atomic import write_bytes
from genmodels.commands.solve import picture_scores, sheet_row
from genmodels.config import DataConfig, check
from genmodels.config.words import check_choice, check_flags, parse_value, split_words
from genmodels.data import load_split
from genmodels.sampling.operators import Mask, Resize, named_operator

OPERATORS = {
    "digits": ("inpaint", "downsample:4", "blur:1"),
    "fashion_mnist": ("inpaint", "downsample:4", "blur:2"),
}
MODELS = {
    "digits": "pretrained/edm_digits,pretrained/gbm_digits,pretrained/energy_digits",
    "fashion_mnist": "pretrained/edm_fashion",
}
KEYS = ("num", "samples", "noise", "seed", "models", "solvers", "steps", "out", "figure", "device")
COUNTS = {"pigdm": (20, 50), "diffpir": (20, 50), "dps": (100,), "langevin": (100,)}
BATCH = 64
FREE = ("models", "solvers", "steps", "figure", "out", "device")  # of rows, not of all


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else."""
    return cli.run(measure, argv)


def measure(argv):
    """Make the rows that are not there; see the module's docstring."""
    names, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags:
        print(__doc__.strip())
        return
    check(len(names) == 1, "set", " ".join(names), f"name one of {', '.join(OPERATORS)}")
    check_choice("set", names[0], OPERATORS)
    for key in words:
        check_choice("key", key, KEYS)
    name = names[0]
    num = parse_value("num", words.get("num", "20"), int)
    samples = parse_value("samples", words.get("samples", "4"), int)
    noise = parse_value("noise", words.get("noise", "0.05"), float)
    seed = parse_value("seed", words.get("seed", "0"), int)
    steps = parse_value("steps", words.get("steps", ""), list[int])
    solvers = [s for s in words.get("solvers", "").split(",") if s]
    out = Path(words.get("out", f"benchmarks/results/inverse_{name}.json"))
    figure = Path(words.get("figure", f"docs/inverse_{name}.png"))
    command = record.command_line("inverse", argv, without=FREE)
    rows = record.rows(out, command)
    done = {key_of(row) for row in rows}

    def add(row):
        rows.append(row)
        record.write(out, command, seed=seed, rows=rows)
        print(json.dumps(row), flush=True)

    for path in words.get("models", MODELS[name]).split(","):
        model = genmodels.load(path, device=words.get("device", "cpu"))
        pad = (model.shape[-1] - (8 if name == "digits" else 28)) // 2
        clean, classes = (part[:num] for part in held_out(name, pad))
        labels = None if model.unlabelled else classes
        for word in OPERATORS[name]:
            operator = named_operator(word, model.shape)
            y = measured(clean, operator, noise, seed)
            fixed = {"operator": word, "noise": noise}
            row = {**fixed, "model": "", "solver": plain_name(operator), "steps": 0}
            if key_of(row) not in done:
                started = time.perf_counter()
                x = plain(y, operator, clean.shape, noise)[:, None]
                seconds = time.perf_counter() - started
                add(row | scores(x, y, operator, clean) | {"seconds": seconds / num})
                done.add(key_of(row))
            for solver in model.SOLVERS:
                for count in steps or COUNTS[solver]:
                    row = {**fixed, "model": Path(path).name, "solver": solver, "steps": count}
                    if (solvers and solver not in solvers) or key_of(row) in done:
                        continue
                    started = time.perf_counter()
                    x = drawn(model, y, labels, operator, noise, seed, samples, solver, count)
                    seconds = time.perf_counter() - started
                    more = {"samples": samples, "nfe": model.nfe, "told": labels is not None}
                    found = scores(x, y, operator, clean)
                    add(row | more | found | {"seconds": seconds / (num * samples)})
        if not figure.exists():
            draw(figure, model, clean[:3], labels, OPERATORS[name], noise, seed)
    write_bytes(out.with_suffix(".md"), table(rows).encode())


def draw(figure, model, clean, labels, operators, noise, seed):
    """Draw clean pictures, what was measured, four samples, their mean and spread."""
    shown = []
    for word in operators:
        operator = named_operator(word, model.shape)
        y = measured(clean, operator, noise, seed)
        x = drawn(model, y, labels, operator, noise, seed, 4, model.SOLVERS[0], 50)
        shown += [sheet_row(*row) for row in zip(x, y, clean)]
    cells = torch.stack([cell for row in shown for cell in row])
    images.write_png(figure, images.contact_sheet(cells, len(shown[0])))


def table(rows):
    """Return the rows as Markdown, by operator and then by the PSNR of the mean."""
    found = "ssim" in rows[0]
    heads = ["operator", "by", "steps", "PSNR of the mean", "of a sample"]
    heads += ["SSIM of the mean"] * found + ["spread", "rms of A x - y", "ms a sample"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    words = list(dict.fromkeys(row["operator"] for row in rows))
    for row in sorted(rows, key=lambda row: (words.index(row["operator"]), row["psnr"])):
        by = f"`{row['model']}`, {row['solver']}" if row["model"] else row["solver"]
        by += ", told the class" * row.get("told", False)
        cells = [f"`{row['operator']}`", by, str(row["steps"] or "")]
        cells += [f"{row['psnr']:.2f} +- {row['psnr_error']:.2f}"]
        cells += [f"{row['psnr_sample']:.2f}" if row["model"] else ""]
        cells += [f"{row['ssim']:.3f}"] if found else []
        cells += [f"{row['spread']:.3f}" if row["model"] else "", f"{row['consistency']:.3f}"]
        cells += [f"{float('%.3g' % (1000 * row['seconds'])):g}" if row["model"] else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def key_of(row):
    """Return what tells a row from the others."""
    return tuple(row[key] for key in ("operator", "model", "solver", "steps"))


def held_out(name, pad):
    """Return the held-out pictures on [-1, 1], float32 (N, C, H, W), and their classes."""
    pixels, labels = load_split(DataConfig(name=name, pad=pad), "test")
    return images.from_uint8(pixels), labels


def measured(clean, operator, noise, seed):
    """Return A x + noise n, picture k with the noise of numpy's generator of [seed, k]."""
    y = operator(clean)
    n = [np.random.default_rng([seed, k]).standard_normal(y.shape[1:]) for k in range(len(y))]
    y = (y.double() + noise * torch.from_numpy(np.stack(n))).float()
    return operator(y) if isinstance(operator, Mask) else y


def drawn(model, y, labels, operator, noise, seed, samples, solver, steps):
    """Return samples (N, samples, C, H, W); sample j of picture k by seed + j N + k."""
    number = len(y)
    pairs = [(k, seed + j * number + k) for k in range(number) for j in range(samples)]
    made = []
    for start in range(0, len(pairs), BATCH):
        some = pairs[start : start + BATCH]
        made.append(
            model.solve(
                y[[k for k, _ in some]],
                operator,
                noise=noise,
                seeds=[s for _, s in some],
                labels=None if labels is None else labels[[k for k, _ in some]],
                solver=solver,
                steps=steps,
            ).cpu()
        )
    return torch.cat(made).reshape(number, samples, *model.shape)


def plain_name(operator):
    """Return what the plain method of an operator is called."""
    return {Mask: "nearest", Resize: "bicubic"}.get(type(operator), "wiener")


def plain(y, operator, shape, noise):
    """Return what needs no model, (N, C, H, W)."""
    if isinstance(operator, Mask):
        known = operator.known.expand(shape[1:])[0].numpy()
        row, column = distance_transform_edt(~known, return_distances=False, return_indices=True)
        return y[..., row, column]
    if isinstance(operator, Resize):
        return functional.interpolate(y, shape[-2:], mode="bicubic", align_corners=False)
    return operator.pull(y, noise**2 / 0.5**2)  # for white pictures of standard deviation 0.5


def scores(x, y, operator, clean):
    """Return the means over pictures, and the standard error of the PSNR of the mean."""
    found = [picture_scores(x[k], y[k], operator, clean[k]) for k in range(len(y))]
    means = {key: float(np.mean([each[key] for each in found])) for key in found[0]}
    psnrs = np.array([each["psnr"] for each in found])
    error = float(psnrs.std(ddof=1) / math.sqrt(len(psnrs))) if len(psnrs) > 1 else 0.0
    return means | {"psnr_error": error}


if __name__ == "__main__":
    sys.exit(main())
