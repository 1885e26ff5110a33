"""Log density of an image under the flow dx/dt = v(x, t): the instantaneous change of variables.

    log p_0(x_0) = log p_T(x_T) + int_0^T div v(x_t, t) dt

The divergence is exact (one backward pass for each of the D elements) or Hutchinson's estimate, the
mean of e . (dv/dx) e over random signs e (one backward pass for each).

References: Chen et al. 2018, arXiv 1806.07366, theorem 1; Grathwohl et al. 2019, arXiv 1810.01367,
equation 6; Song et al. 2021, arXiv 2011.13456, section 4.3.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genmodels.config import Section, setting
from genmodels.sampling.divergence import value_and_divergence

__all__ = ["FlowOptions", "log_normal", "ode_log_prob"]

TRACES = ("hutchinson", "exact")


@dataclass
class FlowOptions(Section):
    """What a log density along an ODE takes."""

    steps: int = setting(64, "RK4 steps from data to noise, 4 evaluations each", ge=1)
    trace: str = setting("hutchinson", "divergence (exact: small images)", choices=TRACES)
    probes: int = setting(
        1, "random sign vectors in Hutchinson's estimate, fresh in each step", ge=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.probes == 1 or self.trace != "exact", "probes", "trace=exact draws none")


@torch.no_grad()
def ode_log_prob(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    times: Tensor,
    log_prior: Callable[[Tensor], Tensor],
    *,
    signs: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Return log p_0(x), float64 (B,), by RK4 along x(t) from times[0] to times[-1].

    Args:
        velocity: v(x, t) -> (B, ...), differentiable in x, each row a function of its own row; t a
            float64 scalar tensor.
        x: state at times[0], (B, ...); carried in float64 (float32 on devices without it).
        times: (steps + 1,) monotone; t runs along it, midpoints halfway.
        log_prior: x at times[-1] -> log density (B,).
        signs: callable i -> (probes, B, ...) of +1 and -1, those of step i, for Hutchinson's
            estimate; None = the exact divergence. Fresh signs in each step average out over the
            steps; within a step they stay, so that its four slopes belong to one function.

    Raises:
        RuntimeError: the flow left the finite numbers.

    Reference: as in the module's docstring.
    """

    def slope(x: Tensor, t: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        return value_and_divergence(lambda x: velocity(x, t).to(x.dtype), x, probes)

    total = torch.zeros(len(x), dtype=times.dtype, device=x.device)
    x = x.to(times.dtype)
    for i, (t, end) in enumerate(itertools.pairwise(times)):
        h = end - t
        probes = None if signs is None else signs(i)
        k1, d1 = slope(x, t, probes)
        k2, d2 = slope(x + h / 2 * k1, t + h / 2, probes)
        k3, d3 = slope(x + h / 2 * k2, t + h / 2, probes)
        k4, d4 = slope(x + h * k3, end, probes)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    if not torch.isfinite(x).all():
        bad = (~torch.isfinite(x)).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise RuntimeError(f"images {bad[:5]} of the batch: the flow left the finite numbers")
    return (log_prior(x) + total).double()


def log_normal(x: Tensor, sigma: float) -> Tensor:
    """Return the log density of N(0, sigma^2 I) at each row of x, (B,)."""
    x = x.flatten(1)
    constant = x.shape[1] * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
    return -(x / sigma).square().sum(dim=1) / 2 - constant
