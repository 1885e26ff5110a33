"""What words say of restoring: options, what is asked of the noise, the estimator."""

from dataclasses import dataclass
from typing import Any

from genmodels.config import Section, setting
from genmodels.config.words import DEVICES, check_choice
from genmodels.noise.stabilise import CAMERA

PASSES = {"false": 0, "no": 0, "0": 0, "true": 1, "yes": 1, "1": 1, "4": 4, "8": 8}


def passes(ensemble: bool | int | str) -> int:
    """Return what RestoreOptions.ensemble asks for: 0 none, 1 true, 4 or 8.

    Raises:
        ValueError: another word.
    """
    word = str(ensemble).lower()
    check_choice("ensemble", word, tuple(PASSES))
    return PASSES[word]


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
        "what is by its type; auto: quantiles for more than 8 bits, and for floats whose level is "
        "found, or as the model was trained",
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
