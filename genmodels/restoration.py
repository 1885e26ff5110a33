"""Restore noisy pictures and write them: sample.py denoise=.

A model with ANY_SIZE takes pictures of any size, grey or colour, as 8 or 16 bits or floats, and
each is written as it came; one without takes images of its own shape and writes DIR/000000.png ...

Pixels have a black and a white, 0 and 255 in files of 8 bits; what is told of a camera is in the
file's own unit, other levels on the scale from black to white. find_noise and restore_values take
arrays in that unit, restore what a model takes, on the [-1, 1] scale.

Large pictures are restored in tiles. Each tile sees `overlap` pixels around it, which are cut off
afterwards: tiled is equal to whole wherever the network looks no further than that. Its edges lie
on multiples of 32 from the corner if tile and overlap do, as in the whole picture.
"""

import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from genmodels import cli, distributed, generation, images
from genmodels.atomic import make_folder
from genmodels.config import Section, check, setting
from genmodels.config.words import DEVICES, check_choice
from genmodels.foreign import open_plain
from genmodels.images import pictures
from genmodels.images.arrays import load_npy
from genmodels.images.scale import Quantiles, Scale, Wanted, whole_range
from genmodels.images.stacks import Stack
from genmodels.noise.correlated import ROWS, WHITE, correlation, row_noise
from genmodels.noise.laws import LAWS
from genmodels.noise.levels import NoNoise
from genmodels.noise.poisson_gaussian import MISFIT, Blocks, Fit, PoissonGaussian, fit_line
from genmodels.noise.stabilise import CAMERA, UNITS, stabilised

Span = tuple[int, int]  # from a pixel to the one after the last
Window = tuple[slice, slice]  # rows, columns
SHIFTS = ((0, 0), (1, 1), (2, 3), (3, 2))  # of ensemble=4, in pixels
PASSES = {"false": 0, "no": 0, "0": 0, "true": 1, "yes": 1, "1": 1, "4": 4, "8": 8}
LOOKED_AT = 1 << 23  # pixels of the planes of a channel in which its noise is looked for
LOUD = 2  # of 255: of weaker noise nothing is said, what looks like it is fine texture


@dataclass(frozen=True)
class AskedNoise:
    """What is told of the noise of pictures.

    Attributes:
        law: one that the model knows, or auto.
        level: in the law's unit; None: to be found.
        gain, offset, read: of law=poisson-gaussian, in the file's unit; None: to be found.
        correlated: how noise that neighbours share is met: raise (the level that is found), shuffle
            or ignore; see RestoreOptions.
    """

    law: str
    level: float | None = None
    gain: float | None = None
    offset: float | None = None
    read: float | None = None
    correlated: str = "raise"


@dataclass(frozen=True)
class Noise:
    """The noise of a picture, or of the planes of a stack.

    Attributes:
        law: its name.
        level: in the law's unit; of poisson-gaussian the noise in the file's unit. 0: none found.
        shuffled: the picture is restored as four, of every second pixel of every second row.
        notes: lines to say of it: what was found and how sure it is, what is done about it.
    """

    law: str
    level: float | PoissonGaussian
    shuffled: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        """Return law and level in words."""
        if isinstance(self.level, PoissonGaussian):
            return f"law {self.law}, gain {self.level.gain:.4g}, black {self.level.black:.4g}"
        return f"law {self.law}, level {self.level:.3g}"

    def on(self, black: float, white: float) -> float | PoissonGaussian:
        """Return the level of pixels whose black is 0 and whose white is 1."""
        level = self.level
        return level.scaled(black, white) if isinstance(level, PoissonGaussian) else level


@dataclass
class RestoreOptions(Section):
    """How noisy pictures are restored."""

    law: str = setting("", "law of the noise, one that the method knows, or auto")
    level: str = setting("auto", "its level in the law's unit, or auto")
    tile: int = setting(512, "side of the tiles of large pictures, overlap included", ge=1)
    overlap: int = setting(32, "pixels that a tile sees beyond its own, on each side", ge=0)
    ensemble: str = setting(
        "false",
        "a mean over several passes. true: the 8 turned and mirrored pictures; 4: four shifted by "
        "some pixels; 8: the eight, shifted as well",
        choices=tuple(PASSES),
    )
    estimator: str = setting("", "law, or corrected to second order; default the model's own")


@dataclass
class DenoiseOptions(RestoreOptions):
    """What sample.py denoise= takes."""

    level: str = setting(
        "auto",
        "its level in the law's unit; auto: found, one for a picture or a channel of a stack; "
        "plane: found for each plane",
    )
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
    axes: str = setting(
        "", "what the dimensions of a stack are, TZCYX say, in place of what the file says"
    )
    gain: float | None = setting(
        None, "of law=poisson-gaussian: what one count is worth in the file's unit", gt=0
    )
    offset: float | None = setting(None, "of the same: the mean of a pixel without light")
    read: float | None = setting(None, "of the same: the read noise in the file's unit", ge=0)
    correlated: str = setting(
        "raise",
        "noise that neighbours share, where level=auto finds it. raise: the level; shuffle: always "
        "restore four pictures of every second pixel; ignore: no look at it",
        choices=("raise", "shuffle", "ignore"),
    )
    labels: str = setting("", "classes of the images, as for generating")
    batch: int = setting(64, "images at a time; changes no image", ge=1)
    format: str = setting("png", "how images are written", choices=("png",))
    precision: str = setting("fp32", "fp32 is without TF32", choices=("fp32", "bf16"))
    out: str = setting("samples", "folder to write to")
    device: str = setting("auto", "what computes", choices=DEVICES)
    ema: bool = setting(True, "the averaged weights; false: the raw ones of a checkpoint")


@dataclass(frozen=True)
class Job:
    """What is done to one plane of a file.

    Attributes:
        noise: of the plane; its level counts on the scale.
        scale: what the network sees as black and white.
        clip: to black and white; else what the file's type holds is the limit.
        shown: the noise, its level as words count it.
    """

    noise: Noise
    scale: Scale
    clip: bool
    shown: Noise


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


def ensembled(
    call: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    shifts: Sequence[tuple[int, int]] = ((0, 0),),
) -> torch.Tensor:
    """Return the mean of call over the 8 turned and mirrored x, (B, C, H, W), each put back.

    Args:
        call: x -> the restored x.
        x: pictures.
        shifts: the k-th of them is moved by the k-th of these, in turn.
    """
    total = torch.zeros(())
    for k in range(8):
        mirrored = x.flip(-1) if k >= 4 else x
        turned = torch.rot90(mirrored, k, (-2, -1))
        restored = torch.rot90(_shifted(call, turned, *shifts[k % len(shifts)]), -k, (-2, -1))
        total = total + (restored.flip(-1) if k >= 4 else restored)
    return total / 8


def shifted_mean(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return the mean of call over x moved by SHIFTS, each put back: half the cost of 8 turns.

    A network that works on cells of pixels sees other cells each time.
    """
    return torch.stack([_shifted(call, x, *shift) for shift in SHIFTS]).mean(0)


def _shifted(
    call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, down: int, right: int
) -> torch.Tensor:
    """Return call of x moved down and right, put back; what is moved in is mirrored."""
    if not down and not right:
        return call(x)
    mode = "reflect" if x.shape[-2] > down and x.shape[-1] > right else "replicate"
    return call(functional.pad(x, (right, 0, down, 0), mode=mode))[..., down:, right:]


@torch.no_grad()
def restore(
    model: Any,
    image: torch.Tensor,
    law: str,
    level: float | PoissonGaussian,
    *,
    tile: int = 512,
    overlap: int = 32,
    ensemble: bool | int | str = False,
    precision: str = "fp32",
    tick: Callable[[], object] | None = None,
    clip: bool = True,
) -> torch.Tensor:
    """Return the restored image in [-1, 1], float32 (C, H, W) on the CPU.

    Args:
        model: a method with ANY_SIZE, in eval mode.
        image: float32 (C, H, W) on the [-1, 1] scale, not clipped.
        law: a key of model.DENOISE_LAWS.
        level: in the law's unit; of poisson-gaussian the noise of pixels on [0, 1].
        tile, overlap, ensemble: see RestoreOptions.
        precision: "fp32" (without TF32) or "bf16" (autocast).
        tick: called after each tile.
        clip: to black and white; false: what lies beyond is kept.

    Raises:
        ValueError: what model.restore refuses, or too large a tile for the memory.
    """
    noisy = planes(model, image)
    restored = torch.empty(noisy.shape)
    kind = passes(ensemble)
    beyond = {} if clip else {"clip": False}

    def call(x):
        return model.restore(x, law, level, **beyond)[0].float()

    def several(x):
        if kind == 4:
            return shifted_mean(call, x)
        return ensembled(call, x, SHIFTS) if kind == 8 else ensembled(call, x)

    too_large = (
        f"tile={tile}: does not fit into memory; try tile={max(2 * overlap + 32, tile // 2)}"
    )
    for seen, kept in windows(noisy.shape, tile, overlap):
        part = noisy[(..., *seen)].to(model.device)
        reduced = generation.autocast(model.device, precision)
        with reduced, generation.tf32(False), cli.fits_memory(too_large):
            done = (several(part) if kind else call(part)).cpu()
        inner = [slice(k.start - s.start, k.stop - s.start) for s, k in zip(seen, kept)]
        restored[(..., *kept)] = done[(..., *inner)]
        if tick:
            tick()
    if not torch.isfinite(restored).all():
        raise generation.NonFinite(f"law={law}, level={level}: the model made non-finite pixels")
    return restored.reshape(image.shape)


def passes(ensemble: bool | int | str) -> int:
    """Return what RestoreOptions.ensemble asks for: 0 none, 1 true, 4 or 8.

    Raises:
        ValueError: another word.
    """
    word = str(ensemble).lower()
    check_choice("ensemble", word, tuple(PASSES))
    return PASSES[word]


def to_image(values: np.ndarray, black: float, white: float) -> torch.Tensor:
    """Return pixels (H, W) or (H, W, C) on the [-1, 1] scale, float32 (C, H, W), not clipped."""
    return Scale(black, white).tensor(values)


def restore_values(
    model: Any,
    values: np.ndarray,
    noise: Noise,
    black: float = 0.0,
    white: float = 255.0,
    *,
    clip: bool = True,
    tick: Callable[[], object] | None = None,
    **settings: Any,
) -> np.ndarray:
    """Return the restored pixels of one picture or plane, float64 of its shape, in its unit.

    Args:
        model: a method with ANY_SIZE, in eval mode.
        values: (H, W) or (H, W, C), not clipped.
        noise: of find_noise.
        black, white: the pixels that the model sees as 0 and 1.
        clip: to black and white; false: what lies beyond is kept.
        tick: called after each of the tiles that tiles() counts.
        settings: tile, overlap, ensemble and precision of restore().
    """
    result = np.array(values, np.float64)
    level = noise.on(black, white)
    tick = tick or (lambda: None)
    if not level:  # no noise
        for _ in range(tiles(values, noise, settings)):
            tick()
        return result.clip(black, white) if clip else result
    for part in _parts(noise.shuffled):
        if result[part].size:
            image = to_image(result[part], black, white)
            done = restore(model, image, noise.law, level, tick=tick, clip=clip, **settings)
            pixels = Scale(black, white).from_image(done.movedim(0, 2).numpy())
            result[part] = pixels.reshape(result[part].shape)
    return result


def _parts(shuffled: bool) -> list[Window]:
    """Return the parts that a picture is restored in, as slices."""
    steps = [slice(k, None, 2) for k in (0, 1)] if shuffled else [slice(None)]
    return [(rows, columns) for rows in steps for columns in steps]


def tiles(values: np.ndarray, noise: Noise, settings: dict[str, Any]) -> int:
    """Return how many tiles restore_values() makes of pixels (H, W) or (H, W, C)."""
    size = settings.get("tile", 512), settings.get("overlap", 32)
    sides = [values[part].shape[:2] for part in _parts(noise.shuffled)]
    return sum(len(windows(side, *size)) for side in sides if min(side))


def find_level(model: Any, image: torch.Tensor, law: str) -> float:
    """Return the model's estimate of a picture's one noise level, in the law's unit.

    A grey model's for a colour picture is the median over its channels that have noise.

    Raises:
        NoNoise: none has.
    """
    too_large = "level=auto: the picture does not fit into memory whole; give the level"
    levels, silent = [], None
    with generation.tf32(False), cli.fits_memory(too_large):
        for part in planes(model, image):
            try:
                levels.append(model.noise_level(part, law))
            except NoNoise as error:
                silent = error
    if not levels and silent:
        raise silent
    return statistics.median(levels)


def find_law(model: Any, image: torch.Tensor, law: str) -> str:
    """Return the law, picked for this image where law is auto.

    Raises:
        ValueError: too small a picture, or the model does not know the one that was picked.
    """
    if law != "auto":
        return law
    if min(image.shape[1:]) < 32:
        raise ValueError("law=auto: needs a picture of 32 x 32 pixels at least; name the law")
    from genmodels.noise.levels import pick_law

    picked = pick_law((image.double() + 1) / 2)
    if picked not in model.DENOISE_LAWS:
        known = ", ".join(model.DENOISE_LAWS)
        raise ValueError(f"law=auto: finds {picked} noise, this model knows {known}; name one")
    return picked


def find_noise(
    model: Any,
    pictures: Iterable[np.ndarray],
    asked: AskedNoise,
    black: float = 0.0,
    white: float = 255.0,
    *,
    limits: tuple[float, float] | None = None,
    step: float = 0.0,
) -> Noise:
    """Return the noise of a picture, or the one noise of the planes of a stack.

    What is not told is found: gain and black from the blocks of all planes together, a level as the
    median over the planes.

    Args:
        model: a method with ANY_SIZE.
        pictures: (H, W) or (H, W, C) each, in the file's unit; gone through once for each thing
            that is looked for, so no iterator that ends.
        asked: of asked_noise().
        black, white: the pixels that the model sees as 0 and 1.
        limits: the ends of the file's numbers, where pixels are cut off; None: there are none.
        step: of the pixels' numbers, 1 of whole ones; 0 of floats.

    Raises:
        ValueError: a law that the model does not know, pictures too small to measure.
    """
    shuffled = asked.correlated == "shuffle"

    def parts() -> Iterable[np.ndarray]:
        for picture in pictures:
            yield from (picture[part] for part in _parts(shuffled))

    def seen() -> Iterable[torch.Tensor]:
        return (to_image(part, black, white) for part in parts())

    law, notes = asked.law, []
    if law == "auto":
        law = auto_law(model, pictures, asked, black, white, limits=limits, step=step)
    level: float | PoissonGaussian = asked.level or 0.0
    found = asked.level is None
    if law == CAMERA:
        law, level, notes, found = _camera_noise(parts(), asked, black, white, limits, step)
    if found and not level:
        if not (levels := list(_levels(model, seen(), law))):
            return Noise(law, 0.0, notes=(*notes, "no noise is found; left as it is"))
        level = statistics.median(levels)
    noise = Noise(law, level, shuffled)
    if found:
        look = asked.correlated == "raise"
        noise, more = _adjusted(model, noise, next(iter(seen())) if look else None, black, white)
        notes += more
    if treatment := model.treatment(noise.law, noise.on(black, white)):
        notes.append(treatment)
    return replace(noise, notes=tuple(notes))


def _adjusted(
    model: Any, noise: Noise, image: torch.Tensor | None, black: float, white: float
) -> tuple[Noise, list[str]]:
    """Return (noise of a level that the model knows, notes) of what was found.

    Args:
        model: a method with ANY_SIZE.
        noise: what was found.
        image: one to look for noise that neighbours share in, or None.
        black, white: see find_noise.
    """
    notes: list[str] = []
    if image is not None:
        factor, notes = _shared_noise(image, noise.law, noise.on(black, white))
        noise = replace(noise, level=_raised(noise.law, noise.level, factor))
    if not isinstance(noise.level, PoissonGaussian):
        nearest = model.nearest_level(noise.level, noise.law)
        if nearest != noise.level:
            notes.append(
                f"level {noise.level:.4g} found; restored with the nearest that the model knows, "
                f"{nearest:.4g}"
            )
        noise = replace(noise, level=nearest)
    return noise, notes


def _levels(model: Any, seen: Iterable[torch.Tensor], law: str) -> Iterator[float]:
    """Yield the level of each image that has noise."""
    for image in seen:
        with contextlib.suppress(NoNoise):
            yield find_level(model, image, law)


def auto_law(
    model: Any,
    pictures: Iterable[np.ndarray],
    asked: AskedNoise,
    black: float = 0.0,
    white: float = 255.0,
    *,
    limits: tuple[float, float] | None = None,
    step: float = 0.0,
) -> str:
    """Return the law asked for, or that of a picture, or of planes, where it is auto.

    A camera's noise is one whose line of variance does not end at black, or is counted from a black
    that is no zero, or fits better than what multiplies. Arguments as for find_noise.

    Raises:
        ValueError: too small a picture, or the model does not know the one that was picked.
    """
    if asked.law != "auto":
        return asked.law
    picked = statistics.mode(find_law(model, to_image(y, black, white), "auto") for y in pictures)
    if CAMERA in model.DENOISE_LAWS:
        with contextlib.suppress(NoNoise):
            fit = fit_line(Blocks.pooled(Blocks.of(y, limits) for y in pictures), step=step)
            shift = abs(fit.noise.black - black) if fit.line else 0.0
            camera = {
                "gaussian": True,
                "poisson": shift > max(3 * fit.black_error, 0.03 * fit.span),
                "gamma": fit.misfit < 0.7 * fit.power_misfit(2, black),
            }
            return CAMERA if fit.line and (black != 0 or camera[picked]) else picked
    return picked


def _camera_noise(
    parts: Iterable[np.ndarray],
    asked: AskedNoise,
    black: float,
    white: float,
    limits: tuple[float, float] | None,
    step: float,
) -> tuple[str, float | PoissonGaussian, list[str], bool]:
    """Return (law, level, notes, whether it is found) of poisson-gaussian noise.

    The law is gaussian where no gain can be seen, and the level 0 where it is to be found anew.
    """
    camera = {"gain": asked.gain, "offset": asked.offset, "read": asked.read}
    if None not in camera.values():
        return CAMERA, PoissonGaussian.of_camera(**camera), [], False  # type: ignore[arg-type]
    try:
        blocks = Blocks.pooled(Blocks.of(part, limits) for part in parts)
        fit = fit_line(blocks, **camera, step=step)
    except NoNoise:
        return "gaussian", 0.0, ["too little to tell a gain by: restored as gaussian"], True
    if fit.line:
        return CAMERA, fit.noise, [_report(fit, black, white)], True
    kind = "grows, but not as a camera's" if fit.misfit > MISFIT else "is not seen to grow"
    return "gaussian", 0.0, [f"noise {kind} with brightness: restored as gaussian"], True


def _report(fit: Fit, black: float, white: float) -> str:
    """Return what was found and how sure it is, in words."""
    noise = fit.noise
    deviations = [noise.deviation(m) for m in (black, (black + white) / 2, white)]
    at = ", ".join(f"{deviation:.3g}" for deviation in deviations)
    return (
        f"gain {noise.gain:.4g} (+- {fit.gain_error:.2g}), black {noise.black:.4g} "
        f"(+- {fit.black_error:.2g}) found; deviation {at} at {black:.5g}, "
        f"{(black + white) / 2:.5g}, {white:.5g} (+- {100 * fit.deviation_error:.2g} %)"
    )


def _shared_noise(
    image: torch.Tensor, law: str, level: float | PoissonGaussian
) -> tuple[float, list[str]]:
    """Return (q, by which the level is to be raised, notes) of noise that neighbours share."""
    if law not in UNITS:
        return 1.0, []
    domain = stabilised(law, level)
    if domain.level < LOUD:
        return 1.0, []
    w, notes = domain.forward((image.double() + 1) / 2), []
    if (q := correlation(w)) > WHITE:
        notes.append(
            f"the noise of neighbours is correlated: the level that is found, {domain.level:.3g} "
            f"of 255, is taken {q:.2f} times; correlated=shuffle may do better"
        )
    for kind, picture in (("rows", w), ("columns", w.mT)):
        if row_noise(picture) > ROWS:
            notes.append(f"{kind} have noise of their own, which is left in the picture")
    return q if q > WHITE else 1.0, notes


def _raised(law: str, level: float | PoissonGaussian, factor: float) -> float | PoissonGaussian:
    """Return the level of noise of `factor` times the deviation, in the law's unit."""
    if factor == 1:
        return level
    if isinstance(level, PoissonGaussian):
        return level.times(factor)
    row = LAWS[law]
    raised = row.from_state_std(factor * float(row.state_std(level)))
    return min(max(raised, row.low), row.high)


def denoise(model: Any, options: DenoiseOptions, out: Path) -> None:
    """Restore what options.denoise names, each process its share, and write it to `out`."""
    if not model.ANY_SIZE:
        check_choice("law", options.law, tuple(model.DENOISE_LAWS) or ("no law: no denoiser",))
    text = options.level
    try:
        level = None if text in ("auto", "plane") else float(text)
    except ValueError:
        raise ValueError(f"level={text}: must be a number, or auto") from None
    check(model.ANY_SIZE or text != "plane", "level", text, "must be a number, or auto")
    (denoise_pictures if model.ANY_SIZE else denoise_images)(model, options, level, out)


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
    level = float(given["level"]) if given.get("level", "auto") not in ("auto", "plane") else None
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
    known = array.dtype.kind == "f" or array.dtype in (np.uint8, np.uint16)
    if not known or planes_of.ndim != 4 or planes_of.shape[3] not in (1, 3) or not array.size:
        raise ValueError(
            f"picture={array.dtype} {array.shape}: must be (H, W), (H, W, 1 or 3) or "
            "(N, H, W, 1 or 3) of uint8, uint16 or floats"
        )
    check(np.isfinite(array).all(), "picture", "nan", "its pixels must be finite numbers")
    values = planes_of.astype(np.float32, copy=False) if array.dtype == np.float16 else planes_of
    return pictures.Picture("picture", values, array.shape)


def denoise_pictures(model: Any, options: DenoiseOptions, level: float | None, out: Path) -> None:
    """Restore pictures of any size and write each as it came, under its own name."""
    asked = asked_noise(model, options, level)
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
            jobs = jobs_of(model, picture, asked, options, verbose=first)
            sizes = np.empty(picture.size)
            counts.append(sum(tiles(sizes, job.noise, settings) for job in jobs))
        work.append(jobs)
    indices = distributed.share(len(names))
    total = sum(counts[k] for k in indices)
    with tqdm(total=total, desc="restoring", unit="tile", **shown) as bar:
        for k in indices:
            with contextlib.closing(readers[names[k]]()) as picture:
                done = restored_planes(model, picture, work[k], settings, bar.update)
                picture.write(out / names[k], done)
    distributed.barrier()
    if first:
        made = [partial(open_plain, out / name) for name in names[:4]]
        after = [pictures.open_picture(*each, any_scale=True) for each in zip(names, made)]
        before = [readers[name]() for name in names[:4]]
        images.write_png(out / pictures.SHEET, pictures.before_after(zip(before, after)))
        jobs = [job for part in work for job in part]
        print(f"{len(jobs)} pictures restored, {noise_summary([j.shown for j in jobs])}: {out}")
        if line := scale_summary(jobs):
            print(line)


def restored_planes(
    model: Any,
    picture: pictures.Planes,
    jobs: Sequence[Job],
    settings: dict[str, Any],
    tick: Callable[[], object],
) -> Iterator[np.ndarray]:
    """Yield the restored values of each plane of a file, float64 (H, W, C), in its units."""
    for number, job in enumerate(jobs):
        values, ends = picture.plane(number), job.scale.ends
        with cli.name_in_errors(f"{picture.name}{picture.label(number)}"):
            yield restore_values(
                model, values, job.noise, *ends, clip=job.clip, tick=tick, **settings
            )


def asked_law(model: Any, law: str, level: float | None = None) -> str:
    """Return the law asked for: the one the model is trained on, or its only one, if none is.

    Raises:
        ValueError: an unknown law, or a level whose unit is not known yet.
    """
    laws = tuple(model.DENOISE_LAWS)
    law = law or model.cfg.data.noise.law or (laws[0] if len(laws) == 1 else "")
    check_choice("law", law, (*laws, "auto"))
    if law == "auto" and level is not None:
        raise ValueError(f"level={level:g}: law=auto does not know its unit; name the law")
    return law


def asked_noise(model: Any, options: DenoiseOptions, level: float | None) -> AskedNoise:
    """Return what the options tell of the noise.

    Raises:
        ValueError: a law that the model does not know, or what the law does not take.
    """
    law = asked_law(model, options.law, level)
    camera = {key: getattr(options, key) for key in ("gain", "offset", "read")}
    given = [key for key, value in camera.items() if value is not None]
    if law == CAMERA:
        if level is not None:
            raise ValueError(f"level={level:g}: law={law} takes gain=, offset= and read= instead")
        if given == ["read"] or given == ["gain", "read"]:
            raise ValueError(
                f"read={options.read:g}: needs offset= too; pictures show gain and black alone"
            )
    elif given:
        key = given[0]
        raise ValueError(f"{key}={camera[key]:g}: is of law={CAMERA}; name it, or leave {key} out")
    return AskedNoise(law, level, **camera, correlated=options.correlated)


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


def law_scale(model: Any, law: str, plain: Scale, stretched: Scale) -> Scale:
    """Return the scale on which noise of a law is restored.

    That of a camera and Gaussian noise stay what they are when black moves. Other noise grows from
    black on: white alone may move, for a model that makes it Gaussian; one that was trained on the
    law knows it on its own scale.

    Args:
        model: a method with ANY_SIZE.
        law: of the noise.
        plain: as told, else by the type.
        stretched: by quantiles, if they are asked for.
    """
    if law in ("gaussian", CAMERA):
        return stretched
    gaussian = model.cfg.data.noise.law == "gaussian"
    return Scale(plain.black, stretched.white) if gaussian and stretched != plain else plain


def jobs_of(
    model: Any,
    picture: pictures.Planes,
    asked: AskedNoise,
    options: DenoiseOptions,
    verbose: bool = True,
) -> list[Job]:
    """Return what is done to each plane of a file.

    The planes of a channel have one scale. Those of a stack have one noise as well, unless
    level=plane; those of an .npy are pictures of their own.

    Raises:
        ValueError: pixels, channels or a law that the model does not know.
    """
    told = asked.level is not None
    wanted = wanted_scale(model, options, told, picture.dtype, picture.channels)
    channels = [Quantiles(picture.dtype) for _ in range(picture.channels)]
    for number in range(len(picture)):
        channels[picture.channel(number)].add(picture.plane(number))
    stretched = wanted.scales(picture.dtype, channels)
    together = isinstance(picture, Stack) and options.level != "plane"
    jobs: dict[int, Job] = {}
    notes = list(picture.notes)
    for channel, scale in enumerate(stretched):
        unit = wanted.unit(picture.dtype, channel, picture.channels)
        if unit == whole_range(picture.dtype) and (scale == unit or told):
            pictures.check_scale(picture.dtype, channels[channel].most, picture.name)
        plain = wanted.defined(picture.dtype, channel, picture.channels)
        numbers = [k for k in range(len(picture)) if picture.channel(k) == channel]
        for group in [numbers] if together else [[number] for number in numbers]:
            job = job_of(model, picture, group, asked, plain, scale, unit, options)
            jobs |= dict.fromkeys(group, job)
            label = f"channel {channel}: " if together and picture.channels > 1 else ""
            label = label if together else picture.label(group[0])
            notes += [f"{label}{note}" for note in job.noise.notes]
    for note in notes if verbose else ():
        print(f"{cli.escaped(picture.name)}: {note}", file=sys.stderr)
    return [jobs[number] for number in range(len(picture))]


def job_of(
    model: Any,
    picture: pictures.Planes,
    numbers: Sequence[int],
    asked: AskedNoise,
    plain: Scale,
    stretched: Scale,
    unit: Scale,
    options: DenoiseOptions,
) -> Job:
    """Return what is done to planes of a file that share scale and noise.

    Args:
        model: a method with ANY_SIZE.
        picture: the file.
        numbers: of the planes; of many some are looked at, evenly spaced.
        asked: what is told of the noise.
        plain, stretched, unit: scales: without quantiles, with them, what levels count on.
        options: of the command.
    """
    dtype = picture.dtype
    count = min(len(numbers), max(1, LOOKED_AT // math.prod(picture.size)))
    values = [
        picture.plane(numbers[(2 * k + 1) * len(numbers) // (2 * count)]) for k in range(count)
    ]
    seen = [plain.tensor(plane) for plane in values]
    for image in seen:
        model.noisy_state(planes(model, image))
    whole: dict[str, Any] = {}
    if dtype.kind in "iu":
        whole = {"limits": (np.iinfo(dtype).min, np.iinfo(dtype).max), "step": 1}
    law = auto_law(model, values, asked, *plain.ends, **whole)
    scale = law_scale(model, law, plain, stretched)
    check(
        options.scale != "quantiles" or scale == stretched or scale != plain,
        "scale",
        "quantiles",
        f"{law} noise depends on where black is; tell black= and white=, or scale=file",
    )
    factor = 1.0
    if law in ("gaussian", "poisson"):
        factor = (unit if law == "gaussian" else plain).over(scale)
    level = None if asked.level is None else asked.level * factor
    if level is not None:
        model.check_level(level, law)
    noise = find_noise(model, values, replace(asked, law=law, level=level), *scale.ends, **whole)
    shown = noise
    if not isinstance(noise.level, PoissonGaussian):
        shown = replace(noise, level=noise.level / factor)
    return Job(noise, scale, scale == whole_range(dtype), shown)


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
    """Return a line about the laws and levels of the noise of pictures."""
    lines = []
    for law in sorted({noise.law for noise in noises}):
        levels = [noise.level for noise in noises if noise.law == law]
        if law == CAMERA:
            spans = {
                "gain": _span([level.gain for level in levels]),
                "black": _span([level.black for level in levels]),
            }
        else:
            spans = {"level": _span(levels)}
        lines.append(", ".join([f"law {law}", *(f"{key} {text}" for key, text in spans.items())]))
    return "; ".join(lines)


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def scale_summary(jobs: Sequence[Job]) -> str:
    """Return a line about black and white, "" where they are what the types of the files say."""
    scales = {job.scale.ends for job in jobs if not job.clip}
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
