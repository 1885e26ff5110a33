"""What energies share: guidance, AND, OR, NOT of labels, completion of images, bounds on log Z.

And what asks for a second derivative of them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from genmodels import seeding
from genmodels.config import Config, Section, check, setting
from genmodels.methods.base import GenerativeModule, Labels
from genmodels.sampling.composition import Blend, blend_of, parse_compose
from genmodels.seeding import Stream

__all__ = [
    "AISOptions",
    "ComposeOptions",
    "check_smooth",
    "given_pixels",
    "guided_settings",
    "image_blend",
    "log_normalisers",
    "training_labels",
    "twice_differentiable",
]


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


def training_labels(model: GenerativeModule, labels: Tensor, n: Tensor) -> Tensor | None:
    """Return a batch's labels, some hidden (-1) in training; None for an unconditional model.

    Args:
        labels: int64 (B,). n: int64 (B,), positions in the training stream.
    """
    if not model.classes:
        return None
    if not model.training or not model.cfg.method.label_dropout:
        return labels
    hidden = seeding.uniform(model.cfg.seed, n, Stream.LABEL_DROP)
    return torch.where(hidden < model.cfg.method.label_dropout, -1, labels)


def given_pixels(
    keys: Tensor, known: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return (known, mask) of each image on the device of the keys; (None, None) without.

    Args:
        keys: int64 (N,), the images' seeds: seed k gets image k modulo K.
        known: images (K, C, H, W) in [-1, 1], or None.
        mask: bool, broadcastable to them: True where they are kept; or None.

    Raises:
        ValueError: one without the other.
    """
    if (known is None) != (mask is None):
        raise ValueError("inpaint=, mask=: give both")
    if known is None:
        return None, None
    index = keys.remainder(len(known)).to(known.device)
    mask = mask.expand_as(known)[index].to(keys.device)
    return known[index].to(keys.device), mask


def log_normalisers(
    model: GenerativeModule,
    x: Tensor,
    labels: Tensor | None,
    kind: str,
    options: Mapping[str, Any],
    bound: Callable[[int, AISOptions], float],
) -> Tensor:
    """Return bounds on log Z of the label of each image, float64 (B,), made once for each label.

    Args:
        model: which keeps them in its log_z until a weight changes.
        x: images, (B, C, H, W). labels: int64 (B,), -1 = none; or None.
        kind: ais_lower or ais_upper: the side from which log p is bounded.
        options: of AISOptions; None leaves the default.
        bound: function of a label (-1 = none) and AISOptions that returns the bound.

    Raises:
        ValueError: another kind, an option out of range, labels the model does not have.
    """
    kinds = model.LIKELIHOODS
    check(kind in kinds, "kind", kind, f"choose from {', '.join(kinds)}")
    model.check_labels(labels)
    settings = AISOptions(**{k: value for k, value in options.items() if value is not None})
    versions = tuple(p._version for p in model.parameters())
    classes = torch.full((len(x),), -1, device=x.device) if labels is None else labels
    bounds = {}
    for label in map(int, classes.unique()):
        key = (label, kind, *dataclasses.astuple(settings), versions)
        if key not in model.log_z:
            model.log_z[key] = bound(label, settings)
        bounds[label] = model.log_z[key]
    return torch.tensor([bounds[int(c)] for c in classes], dtype=torch.float64, device=x.device)


def check_smooth(cfg: Config, why: str) -> None:
    """Raise ValueError if settings leave the energy without a second derivative, and say `why`."""
    check(not cfg.trainer.compile, "trainer.compile", "true", f"{why}; use false")
    precision = cfg.trainer.precision
    check(precision == "32-true", "trainer.precision", precision, f"{why}; use 32-true")
    activation = getattr(cfg.network, "activation", "silu")
    check(activation == "silu", "network.activation", activation, f"{why}; use silu")


def twice_differentiable() -> Any:
    """Return a context in which attention has a second derivative: fused kernels have none."""
    return sdpa_kernel(SDPBackend.MATH)
