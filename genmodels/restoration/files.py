"""Restore files and arrays and write them: what sample.py denoise= and model.denoise do."""

import contextlib
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from genmodels import cli, distributed, generation, images
from genmodels.atomic import make_folder
from genmodels.config import check
from genmodels.config.words import check_choice
from genmodels.images import pictures
from genmodels.images.arrays import load_npy
from genmodels.images.ngff import is_zarr
from genmodels.images.scale import Wanted
from genmodels.noise.stabilise import CAMERA
from genmodels.restoration.jobs import Job, jobs_of, restored_planes, tiles
from genmodels.restoration.noise import Noise
from genmodels.restoration.options import DenoiseOptions, asked_noise, choose_estimator, passes
from genmodels.restoration.tiling import SETTINGS


def denoise(model: Any, options: DenoiseOptions, out: Path) -> None:
    """Restore what options.denoise names, each process its share, and write it to `out`.

    Args:
        model: a method that restores, or {channels: method} of two with ANY_SIZE: each picture gets
            the one of its channels, or else that of one channel.
        options: of the command.
        out: the folder.
    """
    models = model if isinstance(model, Mapping) else {0: model}
    model = next(iter(models.values()))
    if not model.ANY_SIZE:
        check(
            model.DENOISE_LAWS,
            "denoise",
            options.denoise,
            f"{type(model).__name__} restores no pictures; noise2score does",
        )
        check_choice("law", options.law, tuple(model.DENOISE_LAWS))
    text = options.level
    try:
        level = None if text in ("auto", "plane") else float(text)
    except ValueError:
        raise ValueError(f"level={text}: must be a number, or auto") from None
    check(model.ANY_SIZE or text != "plane", "level", text, "must be a number, or auto")
    if model.ANY_SIZE:
        denoise_pictures(models, options, level, out)
    else:
        denoise_images(model, options, level, out)


ARRAY_KEYS = (  # of DenoiseOptions, what denoise_array() takes
    *("law", "level", "gain", "offset", "read", "correlated", "scale", "black", "white"),
    *SETTINGS,
    "estimator",
)


def denoise_array(
    model: Any, picture: np.ndarray, verbose: bool = True, **options: Any
) -> np.ndarray:
    """Return the restored pixels of an array, float32 of its shape, in its own unit.

    Args:
        model: a method with ANY_SIZE, in eval mode.
        picture: (H, W), (H, W, C) or (N, H, W, C), C = 1 or 3, each of the N with noise of its
            own: uint8, uint16 or floats, not clipped.
        verbose: print what is found, and what is done about a level that the model does not know.
        options: ARRAY_KEYS of DenoiseOptions; None is their default. black and white may be one
            number.

    Raises:
        ValueError: another array, or what sample.py denoise= refuses.
    """
    for key in options:
        check_choice("option", key, ARRAY_KEYS)
    given = {key: value for key, value in options.items() if value is not None}
    given |= {key: [float(given[key])] for key in ("black", "white") if np.isscalar(given.get(key))}
    told = given.get("level", "auto")
    level = None
    if not isinstance(told, str) or told not in ("auto", "plane"):
        number = isinstance(told, numbers.Real) and not isinstance(told, bool)
        check(number, "level", repr(told), "must be a number, or auto")
        level = float(told)
    words = {key: str(given[key]).lower() for key in ("level", "ensemble") if key in given}
    asked = DenoiseOptions(**given | words)
    array = _picture_of(np.asarray(picture))
    estimator = model.cfg.method.estimator
    choose_estimator(model, asked.estimator)
    try:
        jobs = jobs_of(model, array, asked_noise(model, asked, level), asked, verbose)
        settings = {key: getattr(asked, key) for key in SETTINGS}
        restored = list(restored_planes(model, array, jobs, settings, lambda: None))
    finally:
        model.cfg.method.estimator = estimator
    return np.stack(restored).reshape(array.shape).astype(np.float32)


def _picture_of(array: np.ndarray) -> pictures.Picture:
    """Return an array as a Picture.

    Raises:
        ValueError: not one of numbers or shapes that denoise_array() takes.
    """
    planes_of = array[None, ..., None] if array.ndim == 2 else array
    planes_of = planes_of[None] if planes_of.ndim == 3 else planes_of
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    known = array.dtype.kind == "f" or (array.dtype.kind in "iu" and array.dtype.itemsize <= 4)
    if not known or planes_of.ndim != 4 or planes_of.shape[3] not in (1, 3) or not array.size:
        raise ValueError(
            f"picture={array.dtype} {array.shape}: must be (H, W), (H, W, 1 or 3) or "
            "(N, H, W, 1 or 3) of whole numbers of up to 32 bits or floats; of a grey stack "
            "(Z, H, W) write stack[..., None]"
        )
    check(np.isfinite(array).all(), "picture", "nan", "its pixels must be finite numbers")
    values = planes_of.astype(np.float32, copy=False) if array.dtype == np.float16 else planes_of
    return pictures.Picture("picture", values, array.shape)


def denoise_pictures(
    models: Mapping[int, Any], options: DenoiseOptions, level: float | None, out: Path
) -> None:
    """Restore pictures of any size and write each as it came, under its own name; see denoise()."""
    asked = {number: asked_noise(model, options, level) for number, model in models.items()}
    for model in models.values():
        choose_estimator(model, options.estimator)
        if options.labels:
            generation.labels_for((), options.labels, model.classes)
    Wanted(options.scale, options.black, options.white)  # which refuses white below black
    settings = {key: getattr(options, key) for key in SETTINGS}
    source = Path(options.denoise)
    readers = pictures.find_pictures(source, any_scale=True, axes=options.axes)
    names = list(readers)
    check_folder(out, source, names)
    # All are read before the first is written, so that a broken one stops the work at once.
    first = distributed.rank() == 0
    shown = {"delay": 0.5, "disable": None if first else True}  # on a terminal only
    work, counts = [], []
    for reader in tqdm(readers.values(), desc="reading", unit="img", **shown):
        with contextlib.closing(reader()) as picture, cli.name_in_errors(picture.name):
            fitting = _fitting(models, picture)
            jobs = jobs_of(models[fitting], picture, asked[fitting], options, verbose=first)
            sizes = np.empty(picture.size)
            counts.append(sum(tiles(sizes, job.noise, settings) for job in jobs))
        work.append(jobs)
    indices = distributed.share(len(names))
    total = sum(counts[k] for k in indices)
    with tqdm(total=total, desc="restoring", unit="tile", **shown) as bar:
        for k in indices:
            with contextlib.closing(readers[names[k]]()) as picture:
                model = models[_fitting(models, picture)]
                done = restored_planes(model, picture, work[k], settings, bar.update)
                picture.write(out / names[k], done)
    distributed.barrier()
    if first:
        after = [pictures.open_path(name, out / name) for name in names[:4]]
        before = [readers[name]() for name in names[:4]]
        images.write_png(out / pictures.SHEET, pictures.before_after(zip(before, after)))
        jobs = [job for part in work for job in part]
        print(f"{len(jobs)} pictures restored, {noise_summary([j.shown for j in jobs])}: {out}")
        if line := scale_summary(jobs):
            print(line)


def _fitting(models: Mapping[int, Any], picture: pictures.Planes) -> int:
    """Return the key of the model for a file: its channels, or 1; of one model that of it."""
    if len(models) == 1:
        return next(iter(models))
    channels = picture.plane(0).shape[2]
    return channels if channels in models else 1


def check_folder(out: Path, source: Path, names: Sequence[str]) -> None:
    """Raise ValueError if these names written to `out` would mix with other pictures or the source.

    A single picture may join others.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out}: is a file; name a folder")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out={out}: lies in the folder of the noisy pictures; name one outside")
    if is_zarr(out) or (out.suffix.lower() == ".zarr" and not out.exists()):
        raise ValueError(
            f"out={out}: names a Zarr folder; name the folder around it, in which what is restored "
            "keeps its own name"
        )
    for name in names:
        target = out / name
        if target.is_dir() and not (name.endswith(".zarr") and is_zarr(target)):
            raise ValueError(f"out={out}: holds a folder {name}, which is no picture; move it away")
        if target.is_file() and name.endswith(".zarr"):
            raise ValueError(f"out={out}: holds a file {name}, not a Zarr folder; move it away")
    one = source.is_file() or is_zarr(source)
    if one and out.resolve() == source.resolve().parent:
        raise ValueError(f"out={out}: is the folder of the noisy picture; name another")
    if pictures.SHEET in names:
        raise ValueError(f"denoise={source}: {pictures.SHEET} will be the sheet; rename it")
    if not one or source.suffix.lower() == ".zip":
        kept = [path for path in out.rglob("*") if path.suffix.lower() in pictures.KEPT]
        there = {str(path.relative_to(out)) for path in kept if path.name != pictures.SHEET}
        strange = sorted(there - set(names))
        if strange:
            raise ValueError(
                f"out={out}: holds {len(strange)} other pictures ({strange[0]}, ...); "
                "name an empty folder or delete them"
            )


def noise_summary(noises: Sequence[Noise]) -> str:
    """Return a line about the laws and levels of the noise of pictures."""
    lines = []
    noises = [each for noise in noises for each in noise.channels or (noise,)]
    measured = [noise for noise in noises if noise.measured]
    for law in sorted({noise.law for noise in measured}):
        levels = [noise.level for noise in measured if noise.law == law]
        if law == CAMERA:
            spans = {
                "gain": _span([level.gain for level in levels]),
                "black": _span([level.black for level in levels]),
            }
        else:
            spans = {"level": _span(levels)}
        lines.append(", ".join([f"law {law}", *(f"{key} {text}" for key, text in spans.items())]))
    if unclear := len(noises) - len(measured):
        lines.append(f"noise of {unclear} not measured")
    return "; ".join(lines)


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def scale_summary(jobs: Sequence[Job]) -> str:
    """Return a line about black and white, "" where they are what the types of the files say."""
    scales = {job.scale.ends for job in jobs if job.stretched}
    if not scales:
        return ""
    ends = []
    for name, values in zip(("black", "white"), zip(*scales)):
        low, high = f"{min(values):.5g}", f"{max(values):.5g}"
        ends.append(f"{name} {low if low == high else f'{low} to {high}'}")
    return f"scale: {', '.join(ends)}, put back on writing"


def denoise_images(model: Any, options: DenoiseOptions, level: float | None, out: Path) -> None:
    """Restore images of the model's own shape and write them as PNGs with numbers."""
    refused = {
        key: getattr(options, key) for key in ("estimator", "gain", "offset", "read", "axes")
    }
    refused["ensemble"] = options.ensemble if passes(options.ensemble) else None
    refused["scale"] = options.scale if options.scale != "auto" else None
    for key in ("black", "white"):
        refused[key] = ",".join(f"{value:g}" for value in getattr(options, key))
    refused["correlated"] = options.correlated if options.correlated != "raise" else None
    for key, word in refused.items():
        if word not in ("", None):
            raise ValueError(f"{key}={word}: {type(model).__name__} does not take it; leave it out")
    noisy = read_noisy(Path(options.denoise), model)
    generation.check_folder("out", out, range(len(noisy)))
    given = generation.labels_for(range(len(noisy)), options.labels, model.classes, model.present)
    labels = None if given is None else torch.tensor(given, device=model.device)
    model.check_labels(labels, "give labels=3, or labels=3,5 (image k gets entry k mod 2)")
    indices = torch.tensor(distributed.share(len(noisy)), dtype=torch.int64)
    levels = []
    for part in indices.split(options.batch):
        part_labels = None if labels is None else labels[part]
        restored, used = model.restore(noisy[part], options.law, level, part_labels)
        make_folder(out, exist_ok=True)
        for index, picture in zip(part.tolist(), images.to_uint8(restored)):
            images.write_png(out / f"{index:06d}.png", picture)
        levels += used.tolist()
    distributed.barrier()
    if distributed.rank() == 0:
        shown = f"{min(levels):.3g}" if level else f"{min(levels):.3g} to {max(levels):.3g} (found)"
        print(f"{len(noisy)} images restored, level {shown}: {out}")


def read_noisy(path: Path, model: Any) -> torch.Tensor:
    """Return noisy images as float32 (N, C, H, W) on the [-1, 1] scale, not clipped."""
    channels = model.shape[0]
    if path.suffix.lower() == ".npy" and path.is_file():
        array = load_npy(path)
        if array.ndim != 4 or array.dtype.kind != "f":
            raise ValueError(f"denoise={path}: {array.dtype} {array.shape}; must be (N, H, W, C)")
        pictures.check_scale(array.dtype, array.max(initial=0), path)
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        noisy = torch.from_numpy(native).permute(0, 3, 1, 2).float() / 127.5 - 1
    else:
        noisy = images.from_uint8(images.read_images(path, channels))
    if noisy.shape[1:] != model.shape or not len(noisy):
        raise ValueError(
            f"denoise={path}: {len(noisy)} images of shape {tuple(noisy.shape[1:])}, "
            f"must be one or more of {model.shape}"
        )
    model.noisy_state(noisy)  # all of them, before the first is written
    return noisy
