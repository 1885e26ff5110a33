"""Metropolis-Hastings with a score in place of a density: what it lacks is a line integral.

    x* = x + step z,   accepted with probability min(1, p(x*) / p(x)),
    log p(x*) - log p(x) = int_0^1 s(x + u d) . d du,   d = x* - x,   s = grad log p
                        ~= sum_k w_k s(x + u_k d) . d       Gauss-Legendre on (0, 1), K nodes

The first order of it, s(x) . d, is not reversible, and its chain has another density. K nodes are
exact for a polynomial s of degree 2 K - 1; across the valley between two modes that takes 8 or
more. Where s is no gradient, as a network's free r(x) - x, the integral depends on the way, and the
chain on more than a density.

With the score of a denoising auto-encoder, s = (r(x) - x) / sigma^2, the density is that of the
data with its noise, p_sigma = p * N(0, sigma^2), exactly and at any sigma: its variance is that of
the data plus sigma^2.

Reference: Alain and Bengio 2014, "What regularized auto-encoders learn from the data-generating
distribution", JMLR 15, arXiv 1211.4246, section 5 (the chain); Vincent 2011 (p_sigma).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from genmodels.kernels.philox import philox_normal
from genmodels.seeding import Stream, uniform

__all__ = ["log_density_difference", "sample_mh"]


def log_density_difference(
    score: Callable[[Tensor], Tensor], x: Tensor, end: Tensor, nodes: int
) -> Tensor:
    """Return log p(end) - log p(x) along the straight line between them, (B,) like x.

    Args:
        score: s(x) = grad log p(x), like x.
        x, end: states, (B, ...).
        nodes: K, of the Gauss-Legendre rule; score is asked K times.
    """
    places, weights = np.polynomial.legendre.leggauss(nodes)
    d = end - x
    total = x.new_zeros(len(x))
    for u, w in zip((places + 1) / 2, weights / 2):
        total = total + float(w) * (score(x + float(u) * d).to(x.dtype) * d).flatten(1).sum(dim=1)
    return total


@torch.no_grad()
def sample_mh(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    seeds: Tensor,
    *,
    steps: int,
    step: float,
    nodes: int = 8,
    callback: Callable[[int, Tensor], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (x after the last step, share of accepted steps (B,) float32).

    Args:
        score: s(x), like x, asked `nodes` times a step.
        x: where the chains begin, (B, ...).
        seeds: int64 (B,); chain k is a function of seeds[k] and of its own x alone.
        steps: how many.
        step: standard deviation of a proposal.
        nodes: of the line integral; 8 or more across modes.
        callback: called as callback(i, x) after each step.
    """
    accepted = torch.zeros(len(x), device=x.device)
    for i in range(steps):
        z = philox_normal(x.shape[1:], seeds, i, stream=int(Stream.CHAIN), device=x.device)
        proposal = x + step * z.to(x.dtype)
        gain = log_density_difference(score, x, proposal, nodes)
        u = uniform(seeds, torch.full_like(seeds, i), Stream.METROPOLIS)
        taken = u.log() < gain
        x = torch.where(taken.reshape(-1, *[1] * (x.dim() - 1)), proposal, x)
        accepted += taken
        if callback:
            callback(i, x)
    return x, accepted / steps
