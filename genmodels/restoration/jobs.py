"""What is done to each plane of a file: its scale, its noise, and the doing."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from genmodels import cli
from genmodels.config import check
from genmodels.images import pictures
from genmodels.images.scale import Quantiles, Scale, Wanted, whole_range
from genmodels.noise.poisson_gaussian import PoissonGaussian
from genmodels.noise.stabilise import CAMERA
from genmodels.restoration.noise import Noise, auto_law, find_noise, shuffled_parts, to_image
from genmodels.restoration.options import AskedNoise, DenoiseOptions
from genmodels.restoration.tiling import planes, restore, windows

LOOKED_AT = 1 << 23  # pixels of the planes of a channel in which its noise is looked for


@dataclass(frozen=True)
class Job:
    """What is done to one plane of a file.

    Attributes:
        noise: of the plane; its level counts on the scale.
        scale: what the network sees as black and white.
        clip: to black and white; else what the file's type holds is the limit.
        shown: the noise, its level as words count it.
        stretched: whether black and white are others than the type's.
    """

    noise: Noise
    scale: Scale
    clip: bool
    shown: Noise
    stretched: bool


def wanted_scale(
    model: Any, options: DenoiseOptions, counted: bool, dtype: np.dtype, channels: int
) -> Wanted:
    """Return what words say of a file's scale, or else how the model's training pictures had it.

    Args:
        model: a method with ANY_SIZE.
        options: the words.
        counted: whether a level is told that counts on 0..255: floats are on that scale then.
        dtype: of the file's values.
        channels: how many the file has.
    """
    scale = options.scale
    if counted and dtype.kind == "f" and scale == "auto":
        scale = "file"
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
    if model.cfg.data.noise.law != "gaussian" or stretched == plain:
        return plain
    check(
        stretched.white > plain.black,
        "law",
        law,
        f"its noise grows from black={plain.black:g} on, and hardly a pixel is brighter; tell "
        "black= and white=",
    )
    return Scale(plain.black, stretched.white)


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
    counted = asked.level is not None and asked.law in ("gaussian", "poisson")
    wanted = wanted_scale(model, options, counted, picture.dtype, picture.channels)
    channels = [Quantiles(picture.dtype) for _ in range(picture.channels)]
    for number in range(len(picture)):
        channels[picture.channel(number)].add(picture.plane(number))
    stretched = wanted.scales(picture.dtype, channels)
    together = picture.is_stack and options.level != "plane"
    jobs: dict[int, Job] = {}
    notes = list(picture.notes)
    for channel, scale in enumerate(stretched):
        unit = wanted.unit(picture.dtype, channel, picture.channels)
        if unit == whole_range(picture.dtype) and (scale == unit or counted):
            seen = channels[channel]
            pictures.check_scale(picture.dtype, seen.most, picture.name, least=seen.least)
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
    # The brightest pixels are white here too: a law does not depend on a file's largest number.
    ends = (plain.black, stretched.white) if stretched.white > plain.black else plain.ends
    law = auto_law(model, values, asked, *ends, **whole)
    scale = law_scale(model, law, plain, stretched)
    check(
        options.scale != "quantiles" or scale == stretched or scale != plain,
        "scale",
        "quantiles",
        f"{law} noise depends on where black is; tell black= and white=, or scale=file",
    )
    level = asked.level
    if level is not None:
        model.check_level(level, law)
        factor = level_factor(law, unit, plain, scale)
        with _said_of(level, factor, scale):
            model.check_level(level * factor, law)
        level *= factor
    noise = find_noise(model, values, replace(asked, law=law, level=level), *scale.ends, **whole)

    def as_told(noise: Noise) -> Noise:
        if isinstance(noise.level, PoissonGaussian):  # in the file's unit
            return noise
        return replace(noise, level=noise.level / level_factor(noise.law, unit, plain, scale))

    shown = replace(as_told(noise), channels=tuple(as_told(part) for part in noise.channels))
    whole_type = scale == whole_range(dtype)
    # Floats and signed numbers may lie below 0 or above what levels count on.
    return Job(noise, scale, whole_type and dtype.kind == "u", shown, not whole_type)


@contextlib.contextmanager
def _said_of(level: float, factor: float, scale: Scale) -> Iterator[None]:
    """Say of a level that is refused on the scale restored what the user has told."""
    try:
        yield
    except ValueError as error:
        if factor == 1:
            raise
        raise ValueError(
            f"level={level:g}: is {level * factor:.4g} where black is {scale.black:g} and white "
            f"{scale.white:g}, and there it {str(error).partition(': ')[2]}"
        ) from None


def level_factor(law: str, unit: Scale, plain: Scale, scale: Scale) -> float:
    """Return what a level in a user's unit is multiplied by on the scale that is restored."""
    if law not in ("gaussian", "poisson"):
        return 1.0
    return (unit if law == "gaussian" else plain).over(scale)


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
    for k, part in enumerate(noise.channels):
        result[..., k] = restore_values(
            model, values[..., k], part, black, white, clip=clip, tick=tick, **settings
        )
    if noise.channels:
        return result
    level = noise.on(black, white)
    tick = tick or (lambda: None)
    if not level or not noise.share:  # no noise, or none that is taken away
        for _ in range(tiles(values, noise, settings)):
            tick()
        return result
    for part in shuffled_parts(noise.shuffled):
        if result[part].size:
            image = to_image(result[part], black, white)
            done = restore(model, image, noise.law, level, tick=tick, clip=clip, **settings)
            pixels = Scale(black, white).from_image(done.movedim(0, 2).numpy())
            change = pixels.reshape(result[part].shape) - result[part]
            result[part] += noise.share * change
    return result


def tiles(values: np.ndarray, noise: Noise, settings: dict[str, Any]) -> int:
    """Return how many tiles restore_values() makes of pixels (H, W) or (H, W, C)."""
    if noise.channels:
        return sum(tiles(values, part, settings) for part in noise.channels)
    size = settings.get("tile", 512), settings.get("overlap", 32)
    sides = [values[part].shape[:2] for part in shuffled_parts(noise.shuffled)]
    return sum(len(windows(side, *size)) for side in sides if min(side))
