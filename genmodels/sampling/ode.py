"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma, with optional churn.

Reference: Karras et al. 2022, arXiv 2206.00364, equation 1 and algorithms 1 and 2.
"""

import math
from dataclasses import dataclass


@dataclass
class Churn:
    """Fresh noise before each step (algorithm 2); amount = 0 makes the sampler deterministic.

    amount: S_churn >= 0; low, high: the sigmas between which noise is added (S_min, S_max);
    noise: S_noise, the standard deviation of the new noise.
    """

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0


def sample_euler(denoise, x, sigmas, *, churn=None, randn=None, callback=None):
    """Return x at the last sigma by Euler's method: first order, one evaluation for each step.

    Args:
        denoise: D(x, sigma) -> (B, C, H, W), sigma a scalar tensor.
        x: state at sigmas[0], (B, C, H, W); its dtype is kept (float64 advised).
        sigmas: (steps + 1,) decreasing; the last may be 0.
        churn: Churn, or None for the ODE.
        randn: callable shape, dtype -> noise (B, *shape); needed with churn.
        callback: called as callback(i, x) after each step.
    """
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        x, sigma = _churned(x, sigma, len(sigmas) - 1, churn, randn)
        x = x + (following - sigma) * _slope(denoise, x, sigma)
        if callback:
            callback(i, x)
    return x


def sample_heun(denoise, x, sigmas, *, churn=None, randn=None, callback=None):
    """Return x at the last sigma by Heun's method: second order, 2 steps - 1 evaluations.

    The slope of each Euler step is averaged with the slope at its end, except in a step to 0.
    Arguments as for sample_euler.
    """
    for i, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:])):
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


SAMPLERS = {"euler": sample_euler, "heun": sample_heun}


def _slope(denoise, x, sigma):
    return (x - denoise(x, sigma).to(x.dtype)) / sigma


def _churned(x, sigma, steps, churn, randn):
    """Return (x, sigma) raised to the noise level (1 + gamma) sigma, algorithm 2 lines 4-6."""
    if churn is None or churn.amount == 0 or not churn.low <= float(sigma) <= churn.high:
        return x, sigma
    raised = sigma * (1 + min(churn.amount / steps, math.sqrt(2) - 1))
    fresh = randn(x.shape[1:], dtype=x.dtype)
    return x + (raised**2 - sigma**2).sqrt() * churn.noise * fresh, raised
