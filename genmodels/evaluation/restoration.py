"""PSNR and SSIM of a model that restores clean pictures with noise added: evaluate.py denoise=.

The rule, for picture k of the folder in sorted order, x on [0, 1]:

    y = law.sample(x, level, numpy.random.default_rng([seed, k])), neither clipped nor rounded
    PSNR with peak 1 and SSIM of the estimate clipped to [0, 1], each the mean over pictures
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from genmodels import cli, restoration
from genmodels.config.words import check_choice
from genmodels.distributed import gather_to_all, rank, share
from genmodels.images import pictures
from genmodels.metrics.restoration import BM3D_LAWS, LEAST_SIDE, bm3d, load_bm3d, psnr, ssim
from genmodels.noise import LAWS

if TYPE_CHECKING:
    from genmodels.evaluation.options import RestorationOptions

LABELS = {"": "ours", "_ensemble": "ensemble", "_bm3d": "BM3D"}


def score_restoration(
    model: Any, options: "RestorationOptions", device: torch.device
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return (scores, facts, title); the table of the pictures is printed."""
    law, level = law_and_level(model, options)
    readers = pictures.find_pictures(Path(options.denoise))
    names = list(readers)[: options.num or None]
    rows = []
    for name in names:  # all of them, before the work
        x = clean_picture(name, readers[name]())
        with cli.name_in_errors(name):
            restoration.planes(model, torch.from_numpy(x).movedim(2, 0))
    if device.type == "cuda":  # the first call is slower and would count
        restore_one(model, 0, names[0], readers[names[0]](), options, law, level)
    for k in tqdm(
        share(len(names)),
        desc="restoring",
        unit="img",
        delay=0.5,
        disable=None if rank() == 0 else True,
    ):
        with cli.name_in_errors(names[k]):
            rows.append(restore_one(model, k, names[k], readers[names[k]](), options, law, level))
    rows = [row for part in gather_to_all(rows) for row in part]
    rows.sort(key=lambda row: row["index"])
    facts = {"data": options.denoise, "num": len(rows), "law": law, "level": level}
    facts["restoring"] = speeds(rows)
    scores = means(rows, level)
    if rank() == 0:
        print_rows(f"{options.denoise}: {law} {level:g}", rows, scores)
    return scores, facts | {"rows": rows}, f"on {options.denoise}: {law} noise of {level:g}"


def law_and_level(model: Any, options: "RestorationOptions") -> tuple[str, float]:
    """Return (law, true level) of the options.

    Raises:
        ValueError: a model that does not restore, or an unknown law or level, or no BM3D.
    """
    if model is None or not model.ANY_SIZE:
        raise ValueError(f"denoise={options.denoise}: needs a MODEL that restores pictures")
    law = restoration.asked_law(model, options.law)
    if law == "auto":
        raise ValueError(f"law={law}: name the law of the noise to add")
    check_choice("law", law, [known for known in model.DENOISE_LAWS if known in LAWS])
    if options.level == "auto":
        raise ValueError("level=auto: say the level of the noise to add; blind=true hides it")
    level = LAWS[law].check(options.level)
    if not options.blind:
        model.check_level(level, law)
    restoration.choose_estimator(model, options.estimator)
    if options.against:
        check_choice("against", options.against, ("bm3d",))
        load_bm3d()
        check_choice("law", law, tuple(BM3D_LAWS))
    return law, level


def clean_picture(name: str, picture: pictures.Planes) -> np.ndarray:
    """Return a Picture as float64 (H, W, C) on [0, 1].

    Raises:
        ValueError: several in one file, too small for SSIM, or beyond black or white.
    """
    with contextlib.closing(picture):
        x = picture.plane(0).astype(np.float64) / picture.white
    if len(picture) > 1:
        raise ValueError(f"denoise={name}: holds {len(picture)} pictures; make it one")
    if min(x.shape[:2]) < LEAST_SIDE:
        raise ValueError(
            f"denoise={name}: is {x.shape[0]} x {x.shape[1]}, SSIM needs sides of "
            f"{LEAST_SIDE} pixels; take it out"
        )
    if x.min() < 0 or x.max() > 1:
        raise ValueError(f"denoise={name}: has pixels beyond 0..255; clean pictures have none")
    return x


def restore_one(
    model: Any,
    index: int,
    name: str,
    picture: pictures.Planes,
    options: "RestorationOptions",
    law: str,
    level: float,
) -> dict[str, Any]:
    """Return the row of one clean picture: its scores, and how long each restoring took."""
    x = clean_picture(name, picture)
    y = LAWS[law].sample(x, level, np.random.default_rng([options.seed, index]))
    noisy = torch.from_numpy(y * 2 - 1).movedim(2, 0).float()
    row: dict[str, Any] = {
        "index": index,
        "image": name,
        "megapixels": x.shape[0] * x.shape[1] / 1e6,
    }
    row["psnr_noisy"] = psnr(y, x)
    settings = {key: getattr(options, key) for key in restoration.SETTINGS if key != "ensemble"}
    assumed = level
    if options.blind:
        row["level"] = restoration.find_level(model, noisy, law)
        assumed = model.nearest_level(row["level"], law)

    def restored(ensemble: str) -> np.ndarray:
        image = restoration.restore(model, noisy, law, assumed, ensemble=ensemble, **settings)
        return (image.movedim(0, 2).double().numpy() + 1) / 2

    calls = {"": lambda: restored("false")}
    if restoration.passes(options.ensemble):
        calls["_ensemble"] = lambda: restored(options.ensemble)
    if options.against:
        calls["_bm3d"] = lambda: bm3d(y, law, level)
    for kind, call in calls.items():
        started = time.perf_counter()
        estimate = call()
        row[f"seconds{kind}"] = time.perf_counter() - started
        estimate = estimate.clip(0, 1)
        row[f"psnr{kind}"] = psnr(estimate, x)
        row[f"ssim{kind}"] = ssim(estimate, x)
    return row


def means(rows: Sequence[dict[str, Any]], level: float) -> dict[str, dict[str, float]]:
    """Return {metric: {"value": mean over pictures}}; level_error is relative."""
    keys = [key for key in rows[0] if key.startswith(("psnr", "ssim"))]
    scores = {key: {"value": float(np.mean([row[key] for row in rows]))} for key in keys}
    if "level" in rows[0]:
        levels = np.array([row["level"] for row in rows])
        scores["level"] = {"value": float(levels.mean())}
        scores["level_error"] = {"value": float(np.abs(levels / level - 1).mean())}
    return scores


def speeds(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return seconds and megapixels per second of the restoring alone, of one process."""
    pixels = sum(row["megapixels"] for row in rows)
    totals = {"megapixels": pixels}
    for kind in LABELS:
        if f"seconds{kind}" in rows[0]:
            seconds = sum(row[f"seconds{kind}"] for row in rows)
            totals[f"seconds{kind}"] = seconds
            totals[f"megapixels_per_second{kind}"] = pixels / seconds
    return totals


def print_rows(
    title: str, rows: Sequence[dict[str, Any]], scores: dict[str, dict[str, float]]
) -> None:
    """Print the table of the pictures and their means."""
    kinds = [kind for kind in LABELS if f"psnr{kind}" in rows[0]]
    columns = ["picture", "noisy", *(LABELS[kind] for kind in kinds), "gain"]
    columns += [f"SSIM {LABELS[kind]}" for kind in kinds] + ["level"] * ("level" in rows[0])
    mean = {key: score["value"] for key, score in scores.items()} | {"image": "mean"}

    def line(row: dict[str, Any]) -> list[str]:
        cells = [row["image"], f"{row['psnr_noisy']:.2f}"]
        cells += [f"{row[f'psnr{kind}']:.2f}" for kind in kinds]
        cells += [f"{row['psnr'] - row['psnr_noisy']:.2f}"]
        cells += [f"{row[f'ssim{kind}']:.4f}" for kind in kinds]
        return cells + ([f"{row['level']:.4g}"] if "level" in row else [])

    cli.print_table(title, columns, [line(row) for row in (*rows, mean)])
