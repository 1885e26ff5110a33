"""The divergence of a map of states, and what that of a log-space score gives: objective, level.

    div f = sum_i df_i / dx_i        exact: one backward pass for each element of a state
          = E_e [ e . (df/dx)' e ]   Hutchinson: one backward pass for each probe e of random signs

The density along a flow (likelihood.py) needs it of a velocity. Geometric Brownian motion (gbm.py)
needs it of the score s(y, S) = grad_y log p_S(y), y = log x, h = s - 1: for score matching without
a target, and for the variance S of the noise in an image.

References: Hutchinson 1990; Hyvarinen 2005 (score matching) and 2007 (non-negative data).
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

__all__ = [
    "likeliest_variance",
    "nonnegative_objective",
    "score_and_divergence",
    "value_and_divergence",
]


def value_and_divergence(
    function: Callable[[Tensor], Tensor], x: Tensor, signs: Iterable[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return (f(x), div f at x (B,)) of a map f of states, each row a function of its own row.

    Both carry a graph to the parameters of f where gradients are enabled; attention must then run
    without fused kernels, which have no second derivative.

    Args:
        function: f, (B, ...) -> (B, ...), differentiable.
        x: state, (B, ...).
        signs: probes like x of independent +1 and -1, for Hutchinson's estimate; None = exact.

    Reference: Hutchinson 1990 (the estimate).
    """
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = function(x)
        flat = value.flatten(1)

        def gradient(scalar: Tensor) -> Tensor:
            options = {"retain_graph": True, "create_graph": graph}
            return torch.autograd.grad(scalar, x, **options)[0].flatten(1)

        if signs is None:
            parts = [gradient(flat[:, i].sum())[:, i] for i in range(flat.shape[1])]
            divergence = torch.stack(parts).sum(dim=0)
        else:
            probes = [probe.flatten(1).to(flat) for probe in signs]
            parts = [(gradient((flat * e).sum()) * e).sum(dim=1) for e in probes]
            divergence = torch.stack(parts).mean(dim=0)
    return value if graph else value.detach(), divergence


def score_and_divergence(
    score: Callable[[Tensor, float | Tensor], Tensor], signs: Iterable[Tensor] | None = None
) -> Callable[[Tensor, float | Tensor], tuple[Tensor, Tensor]]:
    """Return a callable (y, S) -> (s, div s (B,)) of a score s(y, S) -> like y.

    Args:
        score: s(y, S), S a number or (B,).
        signs: as for value_and_divergence, the same for every call.
    """
    signs = None if signs is None else list(signs)

    def call(y: Tensor, variance: float | Tensor) -> tuple[Tensor, Tensor]:
        return value_and_divergence(lambda y: score(y, variance), y.contiguous(), signs)

    return call


def nonnegative_objective(s: Tensor, div: Tensor) -> Tensor:
    """Return sum_i [2 x psi + x^2 d psi/dx + (x psi)^2 / 2] with psi = h / x, (B,).

    Its mean is E |h - h_true|^2 / 2 up to a constant. In terms of h it is h + dh/dy + h^2 / 2.

    Args:
        s, div: the log-space score (B, ...) and its divergence (B,).

    Reference: Hyvarinen 2007, "Some extensions of score matching", non-negative data.
    """
    h = s.reshape(len(s), -1) - 1
    return (h + h.square() / 2).sum(1) + div


def likeliest_variance(
    y: Tensor,
    variances: Sequence[float],
    divergence: Callable[[Tensor, float | Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Return the variance that makes each image likeliest, float64 (B,), argmax_S log p_S(y).

    By the heat equation d/dS log p_S(y) = (div s + |s|^2) / 2, summed by trapezoids over the
    variances; a parabola through the best one and its neighbours refines it.

    Args:
        y: log x of noisy images (drift removed), (B, ...).
        variances: increasing, to choose from, evenly spaced in log.
        divergence: a callable (y, S) -> (s, div s), as score_and_divergence returns.
    """
    slopes = []
    for variance in variances:
        s, div = divergence(y, variance)
        square = s.double().square().reshape(len(y), -1).sum(1)
        slopes.append((div.double() + square) * variance / 2)  # d/dlog S
    slopes, step = torch.stack(slopes), math.log(variances[1] / variances[0])
    rises = (slopes[1:] + slopes[:-1]) / 2 * step
    height = torch.cat([torch.zeros_like(slopes[:1]), rises.cumsum(0)])
    best = height.argmax(0).clamp(1, len(variances) - 2)
    low, mid, high = (height.gather(0, (best + d)[None])[0] for d in (-1, 0, 1))
    bend = low - 2 * mid + high
    offset = torch.where(bend < 0, (low - high) / (2 * bend), torch.sign(high - low))
    logs = torch.tensor(variances, dtype=torch.float64, device=y.device).log()
    return (logs[best] + offset.clamp(-1, 1) * step).exp()
