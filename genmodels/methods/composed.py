"""What energies share that are sampled of several labels at once: guidance, AND, OR, NOT."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genmodels import seeding
from genmodels.config import Section, check, setting
from genmodels.methods.base import GenerativeModule, Labels
from genmodels.sampling.composition import Blend, blend_of, parse_compose
from genmodels.seeding import Stream

__all__ = ["AISOptions", "ComposeOptions", "guided_settings", "image_blend"]


@dataclass
class ComposeOptions(Section):
    """What sample() takes beside settings of the config."""

    compose: str = setting("", 'terms "3:1.5,5|6,!7:0.5": class or classes (OR), ! NOT, :weight')


@dataclass
class AISOptions(Section):
    """What log_prob() takes."""

    ais_steps: int = setting(200, "densities between the base and the model", ge=1)
    ais_chains: int = setting(64, "chains; two at least, for their variance", ge=2)
    ais_moves: int = setting(1, "Metropolis steps at each density", ge=1)
    ais_step: float = setting(1.0, "factor on their step size", gt=0)
    ais_refine: int = setting(
        100, "Metropolis steps that refine samples before the reverse chains", ge=1
    )


def guided_settings(
    model: GenerativeModule, options: Mapping[str, Any], allowed: Sequence[str]
) -> Any:
    """Return the method's config with the given options of sample() in place of its own.

    Raises:
        ValueError: as method_with, and for guidance of a model that knows no image without label.
    """
    cfg = model.method_with(options, allowed)
    check(
        cfg.guidance == 0 or model.classes,
        "guidance",
        cfg.guidance,
        "this model is unconditional; leave it out",
    )
    check(
        cfg.guidance == 0 or model.unlabelled,
        "guidance",
        cfg.guidance,
        "no label was hidden in training (method.label_dropout); use 0",
    )
    return cfg


def image_blend(
    model: GenerativeModule,
    guidance: float,
    drawn: Tensor | None,
    labels: Labels,
    compose: str | None,
    keys: Tensor,
) -> Blend:
    """Return the Blend of the label of each image, guided, or of the composed terms.

    Args:
        model: whose images are generated.
        guidance: w of (1 + w) f(y, label) - w f(y, none).
        drawn: int64 (N,), the images' labels, or None for an unconditional model.
        labels: what the user gave.
        compose: terms of genmodels.sampling.composition in place of labels, or None.
        keys: int64 (N,), the images' seeds.
    """
    choice = seeding.uniform(keys, torch.zeros_like(keys), Stream.CHOICE)
    if not compose:
        return blend_of(float(guidance), drawn, choice)
    check(labels is None, "compose", compose, "names the classes itself; leave labels out")
    check(guidance == 0, "compose", compose, "weights take guidance's place; leave it out")
    blend = blend_of(parse_compose(compose, model.classes), drawn, choice)
    check(
        model.unlabelled or (blend.labels >= 0).all(),
        "compose",
        compose,
        "no label was hidden in training (method.label_dropout); make the weights sum to 1",
    )
    return blend
