"""Restore noisy pictures and write them: sample.py denoise=.

A model with ANY_SIZE takes pictures of any size, grey or colour, as 8 or 16 bits or floats, and
each is written as it came; one without takes images of its own shape and writes DIR/000000.png ...

Large pictures are restored in tiles. Each tile sees `overlap` pixels around it, which are cut off
afterwards: tiled is equal to whole wherever the network looks no further than that. Its edges lie
on multiples of 32 from the corner if tile and overlap do, as in the whole picture.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from genmodels import cli, distributed, generation, images
from genmodels.atomic import make_folder
from genmodels.config import Section, check, setting
from genmodels.config.words import DEVICES, check_choice
from genmodels.images import pictures
from genmodels.images.arrays import load_npy
from genmodels.images.scale import Quantiles, Scale, Wanted, whole_range

Span = tuple[int, int]  # from a pixel to the one after the last
Window = tuple[slice, slice]  # rows, columns
Noise = tuple[str, float]  # law, level on the scale of black=, white=, or of the file's type


@dataclass
class RestoreOptions(Section):
    """How noisy pictures are restored."""

    law: str = setting("", "law of the noise, one that the method knows, or auto")
    level: str = setting("auto", "its level in the law's unit, or auto")
    tile: int = setting(512, "side of the tiles of large pictures, overlap included", ge=1)
    overlap: int = setting(32, "pixels that a tile sees beyond its own, on each side", ge=0)
    ensemble: bool = setting(False, "mean over the 8 turned and mirrored pictures")
    estimator: str = setting("", "law, or corrected to second order; default the model's own")


@dataclass
class DenoiseOptions(RestoreOptions):
    """What sample.py denoise= takes."""

    denoise: str = setting("", "noisy images to restore, in place of generating")
    scale: str = setting(
        "auto",
        "what the network sees as black and white: quantiles .1 and 99.9 % of a file, or file: "
        "what is by its type; auto: quantiles for 16 bits and floats whose level is found, or as "
        "the model was trained",
        choices=("auto", "quantiles", "file"),
    )
    black: list[float] = setting(
        [], "black in the file's units, in place of scale=; one, or one for each channel of a stack"
    )
    white: list[float] = setting([], "white, the same")
    labels: str = setting("", "classes of the images, as for generating")
    batch: int = setting(64, "images at a time; changes no image", ge=1)
    format: str = setting("png", "how images are written", choices=("png",))
    precision: str = setting("fp32", "fp32 is without TF32", choices=("fp32", "bf16"))
    out: str = setting("samples", "folder to write to")
    device: str = setting("auto", "what computes", choices=DEVICES)
    ema: bool = setting(True, "the averaged weights; false: the raw ones of a checkpoint")


@dataclass(frozen=True)
class Job:
    """What is done to one image of a file.

    Attributes:
        law: of its noise.
        level: in the law's unit, on the scale.
        scale: what is black and white.
        clip: to black and white; else what the file's type holds is the limit.
        noise: the law, and the level on the scale that words count on.
    """

    law: str
    level: float
    scale: Scale
    clip: bool
    noise: Noise


SETTINGS = ("tile", "overlap", "ensemble", "precision")  # of restore(), from the command line


def planes(model: Any, image: torch.Tensor) -> torch.Tensor:
    """Return an image (C, H, W) as what the model takes, (B, model's C, H, W).

    A grey model takes the channels of a colour picture one by one.

    Raises:
        ValueError: a grey picture for a model of colour.
    """
    channels = model.shape[0]
    if len(image) != channels and channels != 1:
        raise ValueError(
            f"image={tuple(image.shape)}: is grey, this model restores {channels} "
            "channels; take a model of grey pictures"
        )
    return image[None] if len(image) == channels else image[:, None]


def cuts(size: int, tile: int, overlap: int) -> list[tuple[Span, Span]]:
    """Return (start, stop) of what each tile sees of `size` pixels, and of what it restores.

    Raises:
        ValueError: nothing is left of a tile without its overlap.
    """
    if overlap < 0:
        raise ValueError(f"overlap={overlap}: must be >= 0")
    if tile <= 2 * overlap:
        raise ValueError(f"tile={tile}: must be larger than twice the overlap, {2 * overlap}")
    spans: list[tuple[Span, Span]] = []
    first, step = 0, tile - 2 * overlap
    while True:
        start, stop = max(0, first - overlap), first + step + overlap
        if stop >= size or (not first and size <= tile):
            return [*spans, ((start, size), (first, size))]
        spans.append(((start, stop), (first, first + step)))
        first += step


def windows(shape: Sequence[int], tile: int, overlap: int) -> list[tuple[Window, Window]]:
    """Return [(seen, restored)] of the tiles of a picture (..., H, W), each a pair of slices."""
    rows, columns = (cuts(size, tile, overlap) for size in shape[-2:])
    return [
        ((slice(*r[0]), slice(*c[0])), (slice(*r[1]), slice(*c[1]))) for r in rows for c in columns
    ]


def ensembled(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return the mean of call over the 8 turned and mirrored x, (B, C, H, W), each put back."""
    total = torch.zeros(())
    for k in range(8):
        mirrored = x.flip(-1) if k >= 4 else x
        restored = torch.rot90(call(torch.rot90(mirrored, k, (-2, -1))), -k, (-2, -1))
        total = total + (restored.flip(-1) if k >= 4 else restored)
    return total / 8


@torch.no_grad()
def restore(
    model: Any,
    image: torch.Tensor,
    law: str,
    level: float,
    *,
    tile: int = 512,
    overlap: int = 32,
    ensemble: bool = False,
    precision: str = "fp32",
    clip: bool = True,
    tick: Callable[[], object] | None = None,
) -> torch.Tensor:
    """Return the restored image in [-1, 1], float32 (C, H, W) on the CPU.

    Args:
        model: a method with ANY_SIZE, in eval mode.
        image: float32 (C, H, W) on the [-1, 1] scale, not clipped.
        law: a key of model.DENOISE_LAWS.
        level: in the law's unit.
        tile, overlap, ensemble: see RestoreOptions.
        precision: "fp32" (without TF32) or "bf16" (autocast).
        clip: to [-1, 1]; false: the image may leave it.
        tick: called after each tile.

    Raises:
        ValueError: what model.restore refuses, or too large a tile for the memory.
    """
    noisy = planes(model, image)
    restored = torch.empty(noisy.shape)

    free = {} if clip else {"clip": False}

    def call(x):
        return model.restore(x, law, level, **free)[0].float()

    too_large = (
        f"tile={tile}: does not fit into memory; try tile={max(2 * overlap + 32, tile // 2)}"
    )
    for seen, kept in windows(noisy.shape, tile, overlap):
        part = noisy[(..., *seen)].to(model.device)
        reduced = generation.autocast(model.device, precision)
        with reduced, generation.tf32(False), cli.fits_memory(too_large):
            done = (ensembled(call, part) if ensemble else call(part)).cpu()
        inner = [slice(k.start - s.start, k.stop - s.start) for s, k in zip(seen, kept)]
        restored[(..., *kept)] = done[(..., *inner)]
        if tick:
            tick()
    if not torch.isfinite(restored).all():
        raise generation.NonFinite(f"law={law}, level={level}: the model made non-finite pixels")
    return restored.reshape(image.shape)


def find_level(model: Any, images: Sequence[torch.Tensor], law: str) -> float:
    """Return the model's estimate of the one noise level of images, in the law's unit.

    A grey model's for colour pictures is the median over the channels.
    """
    too_large = "level=auto: the picture does not fit into memory whole; give the level"
    with generation.tf32(False), cli.fits_memory(too_large):
        parts = zip(*(planes(model, image) for image in images))
        return statistics.median(model.noise_level(torch.cat(part), law) for part in parts)


def find_law(model: Any, images: Sequence[torch.Tensor], law: str) -> str:
    """Return the law, picked for these images where law is auto.

    Raises:
        ValueError: too small a picture, or the model does not know the one that was picked.
    """
    if law != "auto":
        return law
    if min(images[0].shape[1:]) < 32:
        raise ValueError("law=auto: needs a picture of 32 x 32 pixels at least; name the law")
    from genmodels.noise.levels import pick_law

    picked = pick_law((torch.cat(list(images)).double() + 1) / 2)
    if picked not in model.DENOISE_LAWS:
        known = ", ".join(model.DENOISE_LAWS)
        raise ValueError(f"law=auto: finds {picked} noise, this model knows {known}; name one")
    return picked


def denoise(model: Any, options: DenoiseOptions, out: Path) -> None:
    """Restore what options.denoise names, each process its share, and write it to `out`."""
    if not model.ANY_SIZE:
        check_choice("law", options.law, tuple(model.DENOISE_LAWS) or ("no law: no denoiser",))
    text = options.level
    try:
        level = None if text == "auto" else float(text)
    except ValueError:
        raise ValueError(f"level={text}: must be a number, or auto") from None
    (denoise_pictures if model.ANY_SIZE else denoise_images)(model, options, level, out)


def denoise_pictures(model: Any, options: DenoiseOptions, level: float | None, out: Path) -> None:
    """Restore pictures of any size and write each as it came, under its own name."""
    law = asked_law(model, options.law, level)
    choose_estimator(model, options.estimator)
    Wanted(options.scale, options.black, options.white)  # which refuses white below black
    if options.labels:
        generation.labels_for((), options.labels, model.classes)
    settings = {key: getattr(options, key) for key in SETTINGS}
    readers = pictures.find_pictures(Path(options.denoise), any_scale=True)
    names = list(readers)
    check_folder(out, Path(options.denoise), names)
    # All are read before the first is written, so that a broken one stops the work at once.
    first = distributed.rank() == 0
    shown = {"delay": 0.5, "disable": None if first else True}  # on a terminal only
    work, tiles = [], []
    for reader in tqdm(readers.values(), desc="reading", unit="img", **shown):
        picture = reader()
        with cli.name_in_errors(picture.name):
            work.append(jobs_of(model, picture, law, level, options, verbose=first))
            windows_of = windows(picture.size, options.tile, options.overlap)
        tiles.append(len(picture) * len(windows_of))
    indices = distributed.share(len(names))
    with tqdm(total=sum(tiles[k] for k in indices), desc="restoring", unit="tile", **shown) as bar:
        for k in indices:
            picture = readers[names[k]]()
            planes_done = restored_planes(model, picture, work[k], settings, bar.update)
            picture.write(out / names[k], planes_done)
    distributed.barrier()
    if first:
        after = [
            pictures.read_picture(name, (out / name).read_bytes, any_scale=True)
            for name in names[:4]
        ]
        before = [readers[name]() for name in names[:4]]
        images.write_png(out / pictures.SHEET, pictures.before_after(zip(before, after)))
        jobs = [job for part in work for job in part]
        noises = [job.noise for job in jobs]
        print(f"{len(jobs)} pictures restored, {noise_summary(noises)}: {out}")
        if line := scale_summary(jobs):
            print(line)


def restored_planes(
    model: Any,
    picture: pictures.Picture,
    jobs: Sequence[Job],
    settings: dict[str, Any],
    tick: Callable[[], object],
) -> Iterator[np.ndarray]:
    """Yield the restored values of each plane of a Picture, float64 (H, W, C), in its units."""
    for number, job in enumerate(jobs):
        image = picture.image(number, job.scale)
        with cli.name_in_errors(picture.name):
            restored = restore(
                model, image, job.law, job.level, **settings, clip=job.clip, tick=tick
            )
        yield job.scale.from_image(restored.permute(1, 2, 0).numpy())


def asked_law(model: Any, law: str, level: float | None = None) -> str:
    """Return the law asked for: the model's only one if none is.

    Raises:
        ValueError: an unknown law, or a level whose unit is not known yet.
    """
    laws = tuple(model.DENOISE_LAWS)
    law = law or (laws[0] if len(laws) == 1 else "")
    check_choice("law", law, (*laws, "auto"))
    if law == "auto" and level is not None:
        raise ValueError(f"level={level:g}: law=auto does not know its unit; name the law")
    return law


def choose_estimator(model: Any, name: str) -> None:
    """Have the model restore by this estimator, its own if "".

    Raises:
        ValueError: one that it does not have.
    """
    if name:
        check_choice("estimator", name, model.ESTIMATORS)
        model.cfg.method.estimator = name


def wanted_scale(
    model: Any, options: DenoiseOptions, told: bool, dtype: np.dtype, channels: int
) -> Wanted:
    """Return what words say of a file's scale, or else how the model's training pictures had it.

    Args:
        model: a method with ANY_SIZE.
        options: the words.
        told: whether the level is; then what it counts on is left as it is, unless words say else.
        dtype: of the file's values.
        channels: how many the file has.
    """
    scale = "file" if told and options.scale == "auto" else options.scale
    words = Wanted(scale, options.black, options.white)
    noise = model.cfg.data.noise
    said = options.scale != "auto" or options.black or options.white
    if said or noise.copies != "given":
        return words
    if noise.scale == "auto":  # trained before there was a choice
        return Wanted("file")
    # Bytes are on another scale than what was measured of 16 bits; channels have each their own.
    fits = noise.scale == "file" or dtype != np.uint8
    if not fits or {len(noise.black), len(noise.white)} - {0, 1, channels}:
        return words
    return Wanted(noise.scale, noise.black, noise.white)


def jobs_of(
    model: Any,
    picture: pictures.Picture,
    law: str,
    level: float | None,
    options: DenoiseOptions,
    verbose: bool = True,
) -> list[Job]:
    """Return what is done to each plane of a Picture.

    Raises:
        ValueError: pixels, channels or a law that the model does not know, no noise to measure.
    """
    dtype = picture.dtype
    wanted = wanted_scale(model, options, level is not None, dtype, 1)
    quantiles = Quantiles(dtype)
    quantiles.add(picture.values)
    (scale,), plain = wanted.scales(dtype, [quantiles]), wanted.defined(dtype)
    unit = wanted.unit(dtype)
    if unit == whole_range(dtype) and (scale == unit or level is not None):
        pictures.check_scale(dtype, quantiles.most, picture.name)
    jobs = []
    for number in range(len(picture)):
        image = picture.image(number, plain)
        model.noisy_state(planes(model, image))
        known_law = find_law(model, [image], law)
        factor, used = 1.0, plain
        if known_law == "gaussian":  # the only noise that stays what it is when black moves
            factor, used = unit.over(scale), scale
        check(
            used is scale or options.scale != "quantiles",
            "scale",
            "quantiles",
            f"{known_law} noise depends on where black is; tell black= and white=, or scale=file",
        )
        if level is None:
            measured = find_level(model, [picture.image(number, used)], known_law)
        else:
            measured = level * factor
            model.check_level(measured)
        nearest = model.nearest_level(measured)
        clip = used == whole_range(dtype)
        jobs.append(Job(known_law, nearest, used, clip, (known_law, nearest / factor)))
        if verbose and nearest != measured:
            print(
                f"{cli.escaped(picture.name)}: level {measured / factor:.4g} found; restored with "
                f"the nearest that the model knows, {nearest / factor:.4g}",
                file=sys.stderr,
            )
    return jobs


def check_folder(out: Path, source: Path, names: Sequence[str]) -> None:
    """Raise ValueError if these names written to `out` would mix with other pictures or the source.

    A single picture may join others.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out}: is a file; name a folder")
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out={out}: lies in the folder of the noisy pictures; name one outside")
    if source.is_file() and out.resolve() == source.resolve().parent:
        raise ValueError(f"out={out}: is the folder of the noisy picture; name another")
    if pictures.SHEET in names:
        raise ValueError(f"denoise={source}: {pictures.SHEET} will be the sheet; rename it")
    if source.is_dir() or source.suffix.lower() == ".zip":
        kept = [path for path in out.rglob("*") if path.suffix.lower() in pictures.KEPT]
        there = {str(path.relative_to(out)) for path in kept if path.name != pictures.SHEET}
        strange = sorted(there - set(names))
        if strange:
            raise ValueError(
                f"out={out}: holds {len(strange)} other pictures ({strange[0]}, ...); "
                "name an empty folder or delete them"
            )


def noise_summary(noises: Sequence[Noise]) -> str:
    """Return a line about the laws and levels of [(law, level)]."""
    lines = []
    for law in sorted({law for law, _ in noises}):
        levels = [level for name, level in noises if name == law]
        low, high = f"{min(levels):.3g}", f"{max(levels):.3g}"
        lines.append(f"law {law}, level {low if low == high else f'{low} to {high}'}")
    return "; ".join(lines)


def scale_summary(jobs: Sequence[Job]) -> str:
    """Return a line about black and white, "" where they are what the types of the files say."""
    scales = {(job.scale.black, job.scale.white) for job in jobs if not job.clip}
    if not scales:
        return ""
    ends = []
    for name, values in zip(("black", "white"), zip(*scales)):
        low, high = f"{min(values):.5g}", f"{max(values):.5g}"
        ends.append(f"{name} {low if low == high else f'{low} to {high}'}")
    return f"scale: {', '.join(ends)}, put back on writing"


def denoise_images(model: Any, options: DenoiseOptions, level: float | None, out: Path) -> None:
    """Restore images of the model's own shape and write them as PNGs with numbers."""
    words = {"ensemble": "true", "estimator": options.estimator, "scale": options.scale}
    words |= {key: ",".join(f"{v:g}" for v in getattr(options, key)) for key in ("black", "white")}
    for key, word in words.items():
        if getattr(options, key) not in (False, "", "auto", []):
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
