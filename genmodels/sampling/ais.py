"""Annealed importance sampling: the normaliser of an unnormalised density, from both sides.

Between a base density q, normalised and easy to draw from, and exp(g), Z = integral of exp(g),

    log p_b(y) = (1 - b) log q(y) + b g(y),   0 = b_0 < b_1 < ... < b_n = 1
    forward:   y_0 ~ q;             y_k by a chain that leaves p_{b_k} invariant
               log w = sum_k (b_{k+1} - b_k) (g - log q)(y_k),           E[w] = Z
    reverse:   y_n ~ exp(g) / Z;    the same chains in the opposite order
               log w = sum_k (b_{k+1} - b_k) (g - log q)(y_k),           E[1 / w] = 1 / Z

so E[log w] is below log Z forwards and above it in reverse, whatever the chains do; they decide how
far. The reverse bound holds only if the starts are exact samples of exp(g) / Z.

References: Neal 2001, "Annealed importance sampling"; Grosse, Ghahramani and Adams 2015,
arXiv 1511.02543 (both directions); Burda, Grosse and Salakhutdinov 2015, arXiv 1412.8566.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genmodels.kernels.philox import philox_normal
from genmodels.sampling.langevin import mala_chain
from genmodels.seeding import Stream

__all__ = [
    "Base",
    "Bound",
    "ais_forward",
    "ais_reverse",
    "bound_log_z",
    "sigmoid_path",
    "step_sizes",
]

LogDensity = Callable[[Tensor], Tensor]  # g(y), (B, C, H, W) -> (B,)


class Base(NamedTuple):
    """Normal with independent elements, mean and variance (C, H, W): the path's easy end."""

    mean: Tensor
    variance: Tensor

    def log_prob(self, y: Tensor) -> Tensor:
        """Return the log-density, float64 (B,)."""
        z2 = (y.double() - self.mean.double()) ** 2 / self.variance.double()
        constant = (2 * math.pi * self.variance.double()).log().sum()
        return -0.5 * (z2.flatten(1).sum(1) + constant)

    def sample(self, seeds: Tensor, stream: Stream = Stream.AIS_BASE) -> Tensor:
        """Return one sample for each seed, float32 (B, C, H, W)."""
        z = philox_normal(tuple(self.mean.shape), seeds, stream=int(stream), device=seeds.device)
        return (self.mean + self.variance.sqrt() * z).float()


class Bound(NamedTuple):
    """What one direction gives.

    Attributes:
        log_w: float64 (B,), one for each chain.
        y: the chains' last states.
        acceptance: share of accepted proposals over the whole path.
        above: whether it bounds log Z from above (reverse) or from below.
    """

    log_w: Tensor
    y: Tensor
    acceptance: float
    above: bool

    @property
    def mean(self) -> tuple[float, float]:
        """Mean of log w: a bound on log Z, and its standard error."""
        spread = float(self.log_w.std()) / math.sqrt(len(self.log_w))
        return float(self.log_w.mean()), spread

    @property
    def log_z(self) -> float:
        """Log of the mean of w (reverse: -log of the mean of 1 / w): the nearer bound.

        By Jensen's inequality its expectation too lies below (above) log Z.
        """
        sign = -1.0 if self.above else 1.0
        total = torch.logsumexp(sign * self.log_w, dim=0) - math.log(len(self.log_w))
        return sign * float(total)


def sigmoid_path(steps: int, sharpness: float = 4.0) -> Tensor:
    """Return b_0..b_steps from 0 to 1, float64, dense at both ends, where the densities are narrow.

    Reference: Grosse et al. 2015, section 6.
    """
    u = torch.linspace(-1, 1, steps + 1, dtype=torch.float64) * sharpness
    s = u.sigmoid()
    return (s - s[0]) / (s[-1] - s[0])


def step_sizes(
    betas: Sequence[float] | Tensor, base: Base, variance: float, factor: float = 1.0
) -> list[float]:
    """Return a Langevin step a for each b: the best one of the base, passing into variance / 2.

    1.36 v D^(-1/3) is the best a of a D-dimensional normal of variance v (acceptance 0.574).
    """
    wide = 1.36 * float(base.variance.mean()) * base.mean.numel() ** (-1 / 3)
    return [factor / ((1 - float(b)) / wide + 2 * float(b) / variance) for b in betas]


def ais_forward(
    log_density: LogDensity,
    base: Base,
    seeds: Tensor,
    *,
    betas: Sequence[float] | Tensor,
    step: float | Sequence[float],
    moves: int = 1,
) -> Bound:
    """Return the Bound from below on log Z: chains from the base to the density.

    Args:
        log_density: callable y -> g(y), (B,), float64 where its values are large.
        base: Base.
        seeds: int64 (B,), one for each chain.
        betas: b_0 = 0 .. b_n = 1, increasing.
        step: Metropolis-adjusted Langevin step a (noise sqrt(2 a)): a number, or one for each beta.
        moves: steps of the chain at each intermediate density.

    Raises:
        ValueError: betas that do not rise from 0 to 1.
    """
    return _anneal(log_density, base, base.sample(seeds), seeds, betas, step, moves, False)


def ais_reverse(
    log_density: LogDensity,
    base: Base,
    y: Tensor,
    seeds: Tensor,
    *,
    betas: Sequence[float] | Tensor,
    step: float | Sequence[float],
    moves: int = 1,
) -> Bound:
    """Return the Bound from above on log Z: chains from samples y of the density to the base.

    Args: as for ais_forward; y (B, C, H, W), exact samples of exp(g) / Z.
    """
    return _anneal(log_density, base, y.float(), seeds, betas, step, moves, True)


def bound_log_z(
    log_density: LogDensity,
    y: Tensor,
    seeds: Tensor,
    *,
    above: bool,
    variance: float,
    noise: float,
    ais_steps: int,
    ais_moves: int,
    ais_step: float,
    ais_refine: int,
) -> Bound:
    """Return the Bound on log Z of exp(log_density), from above or from below.

    Args:
        log_density: as for ais_forward.
        y: samples of it, (B, C, H, W): their moments make the base, and they start the reverse
            chains after `ais_refine` Metropolis-adjusted steps at the density itself.
        seeds: int64 (B,).
        above: which bound.
        variance: temperature of the density, about its variance where it is narrowest.
        noise: added to the variance of y for the base.
        ais_steps: number of densities. ais_moves: steps at each. ais_step: factor on their size.
    """
    base = Base(y.mean(0), y.var(0) + noise)
    betas = sigmoid_path(ais_steps)
    steps = step_sizes(betas, base, variance, ais_step)
    if not above:
        return ais_forward(log_density, base, seeds, betas=betas, step=steps, moves=ais_moves)
    start = mala_chain(
        lambda y: -log_density(y),
        y,
        steps=ais_refine,
        step=steps[-1],
        seed=seeds,
        stream=int(Stream.AIS_REFINE),
        accumulate=torch.float64,
        diagnostics=False,
    ).y
    return ais_reverse(log_density, base, start, seeds, betas=betas, step=steps, moves=ais_moves)


@torch.no_grad()
def _anneal(
    log_density: LogDensity,
    base: Base,
    y: Tensor,
    seeds: Tensor,
    betas: Sequence[float] | Tensor,
    step: float | Sequence[float],
    moves: int,
    reverse: bool,
) -> Bound:
    """Return the Bound of one direction: forwards from y ~ q, in reverse from y ~ exp(g) / Z."""
    betas = [float(b) for b in betas]
    rising = all(a < b for a, b in itertools.pairwise(betas))
    if len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or not rising:
        raise ValueError(f"betas must rise from 0 to 1, got {betas[0]} .. {betas[-1]}")
    steps = [float(step)] * len(betas) if isinstance(step, (int, float)) else list(step)
    log_w, accepted = torch.zeros(len(y), dtype=torch.float64, device=y.device), []
    order = range(len(betas) - 1)
    for i, k in enumerate(reversed(order) if reverse else order):
        # Forwards y_k, drawn at b_k, is weighted and then moved at b_{k+1}; in reverse y_{k+1} is
        # moved at b_{k+1} (which leaves it a sample of it) only after its predecessor's weight.
        if i > 0:
            b = betas[k + 1] if reverse else betas[k]
            chain = mala_chain(
                lambda y, b=b: -((1 - b) * base.log_prob(y) + b * log_density(y).double()),
                y,
                steps=moves,
                step=steps[k + 1] if reverse else steps[k],
                seed=seeds,
                counter=i * moves,
                stream=int(Stream.AIS_CHAIN),
                accumulate=torch.float64,
                diagnostics=False,
            )
            y = chain.y
            accepted.append(chain.accepted.double().mean())
        log_w += (betas[k + 1] - betas[k]) * (log_density(y).double() - base.log_prob(y))
    acceptance = float(torch.stack(accepted).mean()) if accepted else float("nan")
    return Bound(log_w, y, acceptance, reverse)
