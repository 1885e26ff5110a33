"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma, with optional churn.

References: Karras et al. 2022, arXiv 2206.00364, equation 1 and algorithms 1, 2 and 3; Lu et al.
2022, "DPM-Solver++", arXiv 2211.01095, algorithm 2.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from genmodels.sampling.schedules import Schedule

__all__ = [
    "SAMPLERS",
    "Churn",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_general",
    "sample_heun",
]

Denoise = Callable[[Tensor, Tensor], Tensor]  # D(x, sigma) -> like x, sigma a scalar tensor
Randn = Callable[..., Tensor] | None  # shape, dtype -> noise (B, *shape)
Callback = Callable[[int, Tensor], object] | None


def _same(sigma: Tensor) -> Tensor:
    return sigma


@dataclass
class Churn:
    """Fresh noise before each step (algorithm 2); amount = 0 makes the sampler deterministic.

    amount: S_churn >= 0; low, high: the sigmas between which noise is added (S_min, S_max);
    noise: S_noise, the standard deviation of the new noise; known: maps a raised sigma to one that
    the network knows (for networks with a table of noise levels).
    """

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0
    known: Callable[[Tensor], Tensor] = _same


def sample_euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    churn: Churn | None = None,
    randn: Randn = None,
    callback: Callback = None,
) -> Tensor:
    """Return x at the last sigma by Euler's method: first order, one evaluation for each step.

    Args:
        denoise: D(x, sigma) -> (B, C, H, W), sigma a scalar tensor.
        x: state at sigmas[0], (B, C, H, W); its dtype is kept (float64 advised).
        sigmas: (steps + 1,) decreasing; the last may be 0. On the CPU: each step asks for them, and
            one on a device would be waited for; D gets them as they come.
        churn: Churn, or None for the ODE.
        randn: callable shape, dtype -> noise (B, *shape); needed with churn.
        callback: called as callback(i, x) after each step.
    """
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        x, sigma = _churned(x, sigma, len(sigmas) - 1, churn, randn)
        x = x + (following - sigma) * _slope(denoise, x, sigma)
        if callback:
            callback(i, x)
    return x


def sample_heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    churn: Churn | None = None,
    randn: Randn = None,
    callback: Callback = None,
) -> Tensor:
    """Return x at the last sigma by Heun's method: second order, 2 steps - 1 evaluations.

    The slope of each Euler step is averaged with the slope at its end, except in a step to 0.
    Arguments as for sample_euler.
    """
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        x, sigma = _churned(x, sigma, len(sigmas) - 1, churn, randn)
        slope = _slope(denoise, x, sigma)
        ahead = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + _slope(denoise, ahead, following)) / 2
            ahead = x + (following - sigma) * slope
        x = ahead
        if callback:
            callback(i, x)
    return x


def sample_dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    churn: Churn | None = None,
    randn: Randn = None,
    callback: Callback = None,
) -> Tensor:
    """Return x at the last sigma by DPM-Solver++(2M): second order, one evaluation for each step.

    Exact in the linear part of the ODE; D is extrapolated from this step and the one before, in
    lambda = -ln sigma. The first step and a step to 0 are of first order. Arguments as for
    sample_euler; churn would break the extrapolation.

    Raises:
        ValueError: churn.
    """
    if churn is not None and churn.amount:
        raise ValueError(f"churn={churn.amount}: dpmpp_2m is deterministic; use heun or euler")
    previous = None
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        denoised = denoise(x, sigma).to(x.dtype)
        direction = denoised
        if previous is not None and following > 0:
            ratio = (sigma / following).log() / (sigmas[i - 1] / sigma).log()
            direction = denoised + ratio / 2 * (denoised - previous)
        shrink = following / sigma
        x, previous = shrink * x + (1 - shrink) * direction, denoised
        if callback:
            callback(i, x)
    return x


def sample_general(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    schedule: Schedule,
    *,
    scaled: bool = False,
    alpha: float = 1.0,
    churn: Churn | None = None,
    randn: Randn = None,
    callback: Callback = None,
) -> Tensor:
    """Return x at the last sigma by a second-order Runge-Kutta method in a schedule's time.

    dx/dt = (sigma'/sigma + s'/s) x - (sigma' s / sigma) D(x/s; sigma); each step goes alpha of
    its length along the slope, and weights the two slopes 1 - 1/(2 alpha) and 1/(2 alpha).

    Args:
        x: state at sigmas[0] (not scaled by s), and so is the result.
        sigmas: (steps + 1,) decreasing; the last may be 0.
        schedule: Schedule, how time runs along the sigmas.
        scaled: s(t) = 1 / sqrt(sigma^2 + 1), which keeps the variance; else s(t) = 1.
        alpha: 1 Heun, 2/3 Ralston, 1/2 midpoint; 0 Euler.
        denoise, churn, randn, callback: as for sample_euler; callback gets the unscaled state.
    """
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        x, sigma = _churned(x, sigma, len(sigmas) - 1, churn, randn)
        t, end = schedule.time(sigma), schedule.time(following)
        state = x * _scale(sigma, scaled)
        slope = _general_slope(denoise, state, t, schedule, scaled)
        if alpha > 0 and following > 0:
            middle = t + alpha * (end - t)
            ahead = state + alpha * (end - t) * slope
            second = _general_slope(denoise, ahead, middle, schedule, scaled)
            slope = slope + (second - slope) / (2 * alpha)
        x = (state + (end - t) * slope) / _scale(following, scaled)
        if callback:
            callback(i, x)
    return x


SAMPLERS = {"euler": sample_euler, "heun": sample_heun, "dpmpp_2m": sample_dpmpp_2m}


def _scale(sigma: Tensor, scaled: bool) -> Tensor:
    return (sigma**2 + 1).rsqrt() if scaled else sigma**0


def _general_slope(
    denoise: Denoise, state: Tensor, t: Tensor, schedule: Schedule, scaled: bool
) -> Tensor:
    sigma, slope = schedule.sigma(t), schedule.slope(t)
    scale = _scale(sigma, scaled)
    denoised = denoise(state / scale, sigma).to(state.dtype)
    # s'/s = -sigma sigma' s^2 for s = 1 / sqrt(sigma^2 + 1).
    drift = slope / sigma - (slope * sigma * scale**2 if scaled else 0)
    return drift * state - slope * scale / sigma * denoised


def _slope(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    return (x - denoise(x, sigma).to(x.dtype)) / sigma


def _churned(
    x: Tensor, sigma: Tensor, steps: int, churn: Churn | None, randn: Randn
) -> tuple[Tensor, Tensor]:
    """Return (x, sigma) raised to the noise level (1 + gamma) sigma, algorithm 2 lines 4-6."""
    if churn is None or churn.amount == 0:
        return x, sigma
    # Drawn at every step, as EDM's own generator does: its seeds then give the same images.
    fresh = randn(x.shape[1:], dtype=x.dtype)
    if not churn.low <= float(sigma) <= churn.high:
        return x, sigma
    raised = churn.known(sigma * (1 + min(churn.amount / steps, math.sqrt(2) - 1)))
    # A table of levels may have none above this one: the difference is then zero or below.
    added = (raised**2 - sigma**2).clamp(min=0).sqrt()
    return x + added * churn.noise * fresh, raised
