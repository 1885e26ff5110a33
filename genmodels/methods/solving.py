"""Inverse problems with a trained model: what solve() of a method does, and deepinv's interface.

A method says by SOLVERS which samplers of genmodels/sampling/posterior.py it has, and gives them

    denoiser(labels)                          E[w_0 | w_t] in its state, for dps, pigdm and diffpir
    posterior(measured, keys, labels, ...)    samples by its energy, for langevin
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from genmodels import seeding
from genmodels.config import check
from genmodels.sampling.langevin import frozen
from genmodels.sampling.operators import Mask, as_operator
from genmodels.sampling.posterior import (
    READ_BY,
    STEPS,
    Denoiser,
    Measured,
    SolverOptions,
    sample_diffpir,
    sample_dps,
    sample_pigdm,
)
from genmodels.sampling.schedules import karras_sigmas

if TYPE_CHECKING:
    from genmodels.methods.base import GenerativeModule

__all__ = ["UnitDenoiser", "check_solver", "solve"]

SAMPLERS = {"dps": sample_dps, "pigdm": sample_pigdm, "diffpir": sample_diffpir}


def check_solver(model: "GenerativeModule", settings: SolverOptions, noise: float) -> str:
    """Return the solver that is meant.

    Raises:
        ValueError: one that the model does not have, a setting that it does not read, a noise that
            is none.
    """
    name = type(model).__name__
    check(model.SOLVERS, "model", name, "solves no inverse problem; edm, gbm, cdrl and others do")
    _check_pictures(model)
    solver = settings.solver or model.SOLVERS[0]
    check(
        solver in model.SOLVERS,
        "solver",
        solver,
        f"{name} has {', '.join(model.SOLVERS)}; choose from these",
    )
    for key, solvers in READ_BY.items():
        value = getattr(settings, key)
        check(
            value is None or solver in solvers,
            key,
            value,
            f"solver={solver} does not take it; leave it out",
        )
    check(0 <= noise < math.inf, "noise", noise, "must be >= 0 and finite")
    return solver


def _check_pictures(model: "GenerativeModule") -> None:
    """Raise ValueError if the model makes points or latents."""
    pictures = len(model.shape) == 3 and min(model.shape[1:]) > 1 and not model.cfg.data.vae.mean
    shape = tuple(model.shape)
    check(
        pictures,
        "model",
        type(model).__name__,
        f"makes no pictures but {shape}; train one of them",
    )


def solve(
    model: "GenerativeModule",
    y: Tensor,
    operator: Any,
    *,
    noise: float,
    seeds: Sequence[int] | None = None,
    labels: Any = None,
    unit: bool = False,
    callback: Callable[[int, Tensor], object] | None = None,
    **options: Any,
) -> Tensor:
    """Return samples of p(x | y); see GenerativeModule.solve."""
    settings = SolverOptions(**{key: v for key, v in options.items() if v is not None})
    solver = check_solver(model, settings, noise)
    model.check_weights()
    device = model.device
    operator = as_operator(operator, model.shape, device)
    y = torch.as_tensor(y, device=device).detach()
    check(y.is_floating_point(), "y", y.dtype, "must be floats, of pictures on [-1, 1]")
    y = y.float()
    seeds = seeding.checked_seeds(range(len(y)) if seeds is None else seeds)
    measured, given = _measured(model, y, operator, noise, len(seeds), unit)
    check(
        solver != "langevin" or noise > 0 or measured.held is not None,
        "noise",
        noise,
        "an energy needs noise > 0, or an operator that hides pixels and keeps the others",
    )
    steps = settings.steps or STEPS[solver]
    labels = _labels(model, labels, len(seeds))
    model.nfe, model.chains = 0, ""
    with torch.no_grad(), frozen(model):
        if solver == "langevin":
            keys = torch.tensor(seeds, dtype=torch.int64, device=device)
            x = model.posterior(
                measured, keys, labels, steps=steps, step=settings.step or 1.0, callback=callback
            )
        else:
            x = _denoised(
                model.denoiser(labels), measured, seeds, solver, steps, settings, callback
            )
    x = ((x + 1) / 2 if unit else x).float()
    return x if measured.held is None else torch.where(measured.held.to(device), given, x)


def _measured(
    model: "GenerativeModule", y: Tensor, operator: Any, noise: float, count: int, unit: bool
) -> tuple[Measured, Tensor]:
    """Return (what is known of each of `count` pictures on [-1, 1], y as it was given)."""
    zero = torch.zeros(1, *model.shape, device=y.device)
    shape = tuple(operator(zero).shape[1:])
    good = tuple(y.shape[1:]) == shape and len(y) in (1, count)
    several = f"(1 or {count}, {', '.join(map(str, shape))})"
    check(good, "y", tuple(y.shape), f"this operator measures {several}, one for each seed")
    y = y.expand(count, *shape)
    if isinstance(operator, Mask):  # whatever stands in hidden pixels
        y = torch.where(operator.known.to(y.device), y, 0)
    check(torch.isfinite(y).all(), "y", "nan", "its values must be finite")
    if not unit:
        return Measured(operator, y, noise), y
    return Measured(operator, 2 * y - operator(zero + 1), 2 * noise), y


def _labels(model: "GenerativeModule", labels: Any, count: int) -> Tensor | None:
    """Return the labels of the pictures; none where none are given: a random one contradicts y."""
    if not model.classes:
        check(labels is None, "labels", labels, "this model is unconditional; leave labels out")
        return None
    if labels is None and model.CLUSTERS:
        return None
    found = model.given_labels(-1 if labels is None else labels, count)
    model.check_labels(found)
    return found


def _denoised(
    denoiser: Denoiser,
    measured: Measured,
    seeds: Sequence[int],
    solver: str,
    steps: int,
    settings: SolverOptions,
    callback: Callable[[int, Tensor], object] | None,
) -> Tensor:
    """Return pictures by a denoiser, each with the noise of its seed."""
    grid = karras_sigmas(steps, denoiser.low, denoiser.high)
    sigmas = torch.unique_consecutive(denoiser.known(grid)).tolist()
    generators = seeding.ImageGenerators(seeds)
    device, shape = measured.y.device, measured.operator.adjoint(measured.y[:1]).shape[1:]

    def randn() -> Tensor:
        return generators.randn(shape, device=device)

    given = {key: getattr(settings, key) for key in READ_BY if solver in READ_BY[key]}
    given = {key: value for key, value in given.items() if value is not None}
    report = callback and (lambda i, w: callback(i, denoiser.image(w)))
    w = denoiser.begin(randn(), sigmas[0])
    w = SAMPLERS[solver](denoiser, measured, w, sigmas, randn, callback=report, **given)
    return denoiser.image(w)


class UnitDenoiser(nn.Module):
    """A model as deepinv's denoisers: forward(x, sigma), both on the scale [0, 1].

        prior = deepinv.optim.PnP(UnitDenoiser(genmodels.load("edm_digits")))

    Args:
        model: with denoise(x, sigma) of additive noise (EDM, interpolants), or one that restores
            pictures of Gaussian noise (Noise2Score), of any size and without a gradient.
        labels: of a conditional model, as of solve(); None: none.

    Raises:
        ValueError: another model.
    """

    def __init__(self, model: "GenerativeModule", labels: Any = None) -> None:
        super().__init__()
        self.model, self.labels = model, labels
        self.restores = "gaussian" in model.DENOISE_LAWS
        additive = "dps" in model.SOLVERS and not model.DENOISE_LAWS
        name = type(model).__name__
        check(additive or self.restores, "model", name, "is no denoiser of Gaussian noise; edm is")
        check(labels is None or additive, "labels", labels, f"{name} takes none; leave them out")
        if additive:
            _check_pictures(model)

    def forward(self, x: Tensor, sigma: Tensor | float, **options: Any) -> Tensor:
        """Return the denoised x, like x.

        Args:
            x: (B, C, H, W) on [0, 1], not clipped.
            sigma: of its noise on that scale, a number, (B,) or (B, 1, 1, 1); of a model that
                restores, the nearest level that it knows.
            options: what deepinv hands to every denoiser; unused.
        """
        level = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1)
        level = level.expand(len(x))
        if not self.restores:
            labels = _labels(self.model, self.labels, len(x))
            return (self.model.denoise(2 * x - 1, 2 * level, labels) + 1) / 2
        rows = []
        for row, s in zip(x, level.tolist()):
            known = self.model.nearest_level(255 * s, "gaussian")
            rows.append(self.model.restore(2 * row[None] - 1, "gaussian", known, clip=False)[0])
        return (torch.cat(rows) + 1) / 2
