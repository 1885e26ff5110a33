"""Find the noise of a picture or a stack: law, level, a camera's line, what neighbours share."""

import contextlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from genmodels import cli, generation
from genmodels.config import check
from genmodels.images.scale import Scale
from genmodels.noise.correlated import ROWS, WHITE, correlation, is_texture, row_noise
from genmodels.noise.laws import LAWS
from genmodels.noise.levels import NoNoise, TooFew
from genmodels.noise.poisson_gaussian import MISFIT, SURE, Blocks, Fit, PoissonGaussian, fit_line
from genmodels.noise.stabilise import CAMERA, UNITS, stabilised
from genmodels.restoration.options import AskedNoise
from genmodels.restoration.tiling import Window, planes

LOUD = 2  # of 255: of weaker noise nothing is said, what looks like it is fine texture
TEXTURED = 12  # of 255: what is stronger is taken for noise, whatever it looks like
COLOURS = ("red", "green", "blue")
APART = 1.25  # times that one colour's gain must be another's to count as another
CAMERA_REMEDY = f"tell gain=, offset= and read= of law={CAMERA}, or law=gaussian and level="


@dataclass(frozen=True)
class Noise:
    """The noise of a picture, or of the planes of a stack.

    Attributes:
        law: its name.
        level: in the law's unit; of poisson-gaussian the noise in the file's unit. 0: none found.
        shuffled: the picture is restored as four, of every second pixel of every second row.
        share: of what the model changes that is taken.
        notes: lines to say of it: what was found and how sure it is, what is done about it.
        measured: false: the picture shows too little to say whether it has noise; level is 0.
        channels: the noise of each colour, where they differ; law and level are those of the first.
    """

    law: str
    level: float | PoissonGaussian
    shuffled: bool = False
    share: float = 1.0
    notes: tuple[str, ...] = field(default=(), compare=False)
    measured: bool = True
    channels: tuple["Noise", ...] = ()

    def __str__(self) -> str:
        """Return law and level in words."""
        if isinstance(self.level, PoissonGaussian):
            return f"law {self.law}, gain {self.level.gain:.4g}, black {self.level.black:.4g}"
        return f"law {self.law}, level {self.level:.3g}"

    def on(self, black: float, white: float) -> float | PoissonGaussian:
        """Return the level of pixels whose black is 0 and whose white is 1."""
        level = self.level
        return level.scaled(black, white) if isinstance(level, PoissonGaussian) else level


def to_image(values: np.ndarray, black: float, white: float) -> torch.Tensor:
    """Return pixels (H, W) or (H, W, C) on the [-1, 1] scale, float32 (C, H, W), not clipped."""
    return Scale(black, white).tensor(values)


def shuffled_parts(shuffled: bool) -> list[Window]:
    """Return the parts that a picture is restored in, as slices."""
    steps = [slice(k, None, 2) for k in (0, 1)] if shuffled else [slice(None)]
    return [(rows, columns) for rows in steps for columns in steps]


def find_level(model: Any, image: torch.Tensor, law: str) -> float:
    """Return the model's estimate of a picture's one noise level, in the law's unit.

    A grey model's for a colour picture is the median over its channels that have noise.

    Raises:
        NoNoise: none has.
        TooFew: none shows enough to measure its noise by.
    """
    too_large = "level=auto: the picture does not fit into memory whole; give the level"
    levels, silent = [], None
    with generation.tf32(False), cli.fits_memory(too_large):
        for part in planes(model, image):
            try:
                levels.append(model.noise_level(part, law))
            except NoNoise as error:
                silent = silent if isinstance(silent, TooFew) else error
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
            yield from (picture[part] for part in shuffled_parts(shuffled))

    def seen() -> Iterable[torch.Tensor]:
        return (to_image(part, black, white) for part in parts())

    law, notes, apart = asked.law, [], ""
    if law == "auto":
        law = auto_law(model, pictures, asked, black, white, limits=limits, step=step)
    remedy = "tell level="
    if law == CAMERA:
        remedy, apart = CAMERA_REMEDY, _gains_apart(parts, asked, limits, step)
    if apart and model.shape[0] == 1:
        one = replace(asked, law=law)
        file: dict[str, Any] = {"limits": limits, "step": step}
        colours = (_Colour(pictures, k) for k in range(len(COLOURS)))
        each = [find_noise(model, colour, one, black, white, **file) for colour in colours]
        return _of_colours(each, apart)
    level: float | PoissonGaussian = asked.level or 0.0
    found = asked.level is None
    if law == CAMERA:
        law, level, notes, found = _camera_noise(parts(), asked, black, white, limits, step)
        one_for_all = f"{apart}; one is used for all: save the colours as grey pictures"
        notes += [one_for_all] * bool(apart)
        check(
            not isinstance(level, PoissonGaussian) or level.deviation(white) > 0,
            "offset",
            asked.offset,
            "is brighter than nearly all of the picture; give that of this camera, or leave it out",
        )
    if found and not level:
        levels, unclear = _levels(model, seen(), law, remedy)
        if not levels:
            return _not_found(law, notes, remedy if unclear else "")
        level = statistics.median(levels)
    noise = Noise(law, level, shuffled)
    if found:
        looked_at = seen if asked.correlated == "raise" else tuple
        noise, more = _adjusted(model, noise, looked_at, black, white, remedy)
        notes += more
    treatment = model.treatment(noise.law, noise.on(black, white))
    if treatment and noise.share:
        notes.append(treatment)
    return replace(noise, notes=tuple(notes))


@dataclass(frozen=True)
class _Colour:
    """One colour of pictures (H, W, C), which are gone through again and never held together."""

    pictures: Iterable[np.ndarray]
    k: int

    def __iter__(self) -> Iterator[np.ndarray]:
        return (picture[..., self.k] for picture in self.pictures)


def _of_colours(each: Sequence[Noise], apart: str) -> Noise:
    """Return the noise of a picture of which each colour has its own."""
    said = [f"{name}: {note}" for name, noise in zip(COLOURS, each) for note in noise.notes]
    notes = (f"{apart}: each is restored with its own", *said)
    return replace(each[0], notes=notes, channels=tuple(each))


def _not_found(law: str, notes: Sequence[str], remedy: str) -> Noise:
    """Return no noise; with a remedy: noise that could not be measured."""
    said = "no noise is found; left as it is"
    if remedy:
        said = "too few patches without structure to measure its noise by; left as it is: " + remedy
    return Noise(law, 0.0, notes=(*notes, said), measured=not remedy)


def _adjusted(
    model: Any,
    noise: Noise,
    images: Callable[[], Iterable[torch.Tensor]],
    black: float,
    white: float,
    remedy: str,
) -> tuple[Noise, list[str]]:
    """Return (noise of a level that the model knows, and its share, notes) of what was found.

    Args:
        model: a method with ANY_SIZE.
        noise: what was found.
        images: to look for texture and for noise that neighbours share in, in the first few with
            noise.
        black, white: see find_noise.
        remedy: how the noise can be told.
    """
    notes: list[str] = []
    if _is_texture(images(), noise, black, white):
        said = f"{noise} looks like texture, not like noise: left as it is; {remedy} to have it "
        return replace(noise, share=0.0), [said + "taken away"]
    on = noise.on(black, white)
    if shared := [_shared_noise(x, noise.law, on) for x in _looked_at(images())]:
        factor, notes = sorted(shared)[len(shared) // 2]
        noise = replace(noise, level=_raised(noise.law, noise.level, factor))
    if not isinstance(noise.level, PoissonGaussian):
        nearest, row = model.nearest_level(noise.level, noise.law), LAWS[noise.law]
        if nearest != noise.level and not row.low <= noise.level <= row.high:
            notes.append(
                f"level {noise.level:.4g} found, where {noise.law} noise has {row.low:g} to "
                f"{row.high:g}; restored with {nearest:.4g}: look at law=, black= and white="
            )
        elif nearest != noise.level:
            notes.append(
                f"level {noise.level:.4g} found; restored with the nearest that the model knows, "
                f"{nearest:.4g}"
            )
        noise = replace(noise, level=nearest)
    noise = replace(noise, share=_share(noise, black, white))
    if noise.share < 1:
        notes.append(
            f"so weak a noise may as well be fine texture: {100 * noise.share:.2g} % of it is "
            f"taken away; {remedy} to have it all"
        )
    return noise, notes


def _is_texture(images: Iterable[torch.Tensor], noise: Noise, black: float, white: float) -> bool:
    """Return whether the noise that was found is texture in most of the first images with noise."""
    if noise.law not in UNITS:
        return False
    domain = stabilised(noise.law, noise.on(black, white))
    if not LOUD < domain.level < TEXTURED:
        return False
    textures = [is_texture(domain.forward((x.double() + 1) / 2)) for x in _looked_at(images)]
    return 2 * sum(textures) > len(textures)


def _looked_at(images: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Return the first few images with noise."""
    return itertools.islice((x for x in images if _has_noise(x)), 3)


def _has_noise(image: torch.Tensor) -> bool:
    """Return whether an image is no padding: hardly any of its pixels equals its neighbour."""
    return bool((image[..., 1:] != image[..., :-1]).float().mean() > 0.5)


def _share(noise: Noise, black: float, white: float) -> float:
    """Return how much is taken away of noise that was found: none at LOUD, all a quarter above.

    What is found of a picture without noise is its finest texture, up to LOUD.
    """
    if noise.law not in UNITS:
        return 1.0
    level = stabilised(noise.law, noise.on(black, white)).level
    return min(max(4 * (level / LOUD - 1), 0.0), 1.0)


def _levels(
    model: Any, seen: Iterable[torch.Tensor], law: str, remedy: str
) -> tuple[list[float], bool]:
    """Return (the level of each image that has noise, whether one shows too little to tell).

    Raises:
        ValueError: images too small; the remedy is said.
    """
    levels, unclear = [], False
    for image in seen:
        try:
            levels.append(find_level(model, image, law))
        except NoNoise as error:
            unclear = unclear or isinstance(error, TooFew)
        except ValueError as error:
            raise ValueError(str(error).replace("give the level", remedy)) from None
    return levels, unclear


def _gains_apart(
    parts: Callable[[], Iterable[np.ndarray]],
    asked: AskedNoise,
    limits: tuple[float, float] | None,
    step: float,
) -> str:
    """Return in words the gains that the colours of pictures have, "" where they share one.

    A camera has one gain, but white balance multiplies each colour by a number of its own.
    """
    first = next(iter(parts()))
    if asked.gain is not None or first.ndim != 3 or first.shape[2] != len(COLOURS):
        return ""
    found = {}
    for k, name in enumerate(COLOURS):
        blocks = Blocks.pooled(Blocks.of(part[..., k], limits) for part in parts())
        with contextlib.suppress(NoNoise):
            fit = fit_line(blocks, offset=asked.offset, read=asked.read, step=step)
            found |= {name: (fit.noise.gain, fit.gain_error)} if fit.line else {}
    if not found:
        return ""
    (low, low_error), (high, high_error) = min(found.values()), max(found.values())
    if high < APART * low or high - low < SURE * math.hypot(low_error, high_error):
        return ""
    return "the gains differ, " + ", ".join(f"{k} {gain:.3g}" for k, (gain, _) in found.items())


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
        said = [f"too little to tell a gain by: restored as gaussian{_unused(camera)}"]
        return "gaussian", 0.0, said, True
    if fit.line:
        return CAMERA, fit.noise, [_report(fit, asked, black, white, step)], True
    kind = "grows with brightness, but not as a camera's"
    kind = kind if fit.misfit > MISFIT else "is not seen to grow with brightness"
    return "gaussian", 0.0, [f"noise {kind}: restored as gaussian{_unused(camera)}"], True


def _unused(camera: dict[str, float | None]) -> str:
    """Return in words what is told of a camera and not used."""
    told = [f"{key}={value:g}" for key, value in camera.items() if value is not None]
    return f", without {', '.join(told)}" if told else ""


def _report(fit: Fit, asked: AskedNoise, black: float, white: float, step: float) -> str:
    """Return what was found and how sure it is, and what was told, in words."""
    noise = fit.noise
    gain = f"gain {noise.gain:.4g}"
    gain += f" (+- {fit.gain_error:.2g}) found" if asked.gain is None else " told"
    ends_at = f"black {noise.black:.4g}"
    ends_at += f" (+- {fit.black_error:.2g}) found" if asked.read is None else ""
    if asked.offset is None:
        read = "read noise not known without offset="
    elif asked.read is not None:
        read = f"read noise {asked.read:.4g} told"
    else:  # rounding is noise as well, but none of the camera's
        variance = noise.deviation(asked.offset) ** 2 - step**2 / 12
        unseen = variance < 1e-3 * noise.deviation(fit.mean) ** 2
        read = "read noise 0 assumed, none is seen"
        if not unseen:
            deviation = math.sqrt(variance)
            error = math.sqrt(variance + fit.dark_error) - deviation
            read = f"read noise {deviation:.3g} (+- {error:.2g}) found"
    deviations = [noise.deviation(m) for m in (black, (black + white) / 2, white)]
    at = ", ".join(f"{deviation:.3g}" for deviation in deviations)
    return (
        f"{gain}, {ends_at}, {read}; deviation {at} at {black:.5g}, "
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
    return row.from_state_std(factor * float(row.state_std(level)))
