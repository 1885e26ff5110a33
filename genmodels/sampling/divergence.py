"""The divergence of a log-space score, and what it gives: score matching without a target, levels.

    s(y, S) = grad_y log p_S(y),  y = log x,   h = s - 1

Everything takes `score`, a callable (y (B, ...), S) -> s like y, and works on the callables
(y, S) -> (s, div s) that exact_divergence and hutchinson make of it. They carry a graph to the
parameters of `score` where gradients are enabled; attention must then run without fused kernels,
which have no second derivative.

References: Hyvarinen 2005 (score matching) and 2007 (non-negative data); Hutchinson 1990.
"""

import math

import torch

__all__ = ["exact_divergence", "hutchinson", "likeliest_level", "nonnegative_objective"]


def exact_divergence(score):
    """Return a callable (y, S) -> (s, div s (B,)): one backward pass for each element of y."""

    def call(y, level):
        flat, s, keep = _differentiable(score, y, level)
        rows = torch.eye(s.shape[1]).to(s)
        parts = [_weighted(s, e.expand_as(s), flat, keep)[:, j] for j, e in enumerate(rows)]
        return _as_state(s, y, keep), torch.stack(parts).sum(0)

    return call


def hutchinson(score, probes):
    """Return a callable (y, S) -> (s, div s estimated as the mean of e . grad(e . s)).

    Args:
        score: s(y, S).
        probes: list of tensors like y of independent signs, the same for every call.
    """

    def call(y, level):
        flat, s, keep = _differentiable(score, y, level)
        signs = [probe.reshape(len(y), -1).to(s) for probe in probes]
        parts = [(_weighted(s, e, flat, keep) * e).sum(1) for e in signs]
        return _as_state(s, y, keep), torch.stack(parts).mean(0)

    return call


def nonnegative_objective(s, div):
    """Return sum_i [2 x psi + x^2 d psi/dx + (x psi)^2 / 2] with psi = h / x, (B,).

    Its mean is E |h - h_true|^2 / 2 up to a constant. In terms of h it is h + dh/dy + h^2 / 2.

    Args:
        s, div: the log-space score (B, ...) and its divergence (B,).

    Reference: Hyvarinen 2007, "Some extensions of score matching", non-negative data.
    """
    h = s.reshape(len(s), -1) - 1
    return (h + h.square() / 2).sum(1) + div


def likeliest_level(y, levels, divergence):
    """Return the variance that makes each image likeliest, float64 (B,), argmax_S log p_S(y).

    By the heat equation d/dS log p_S(y) = (div s + |s|^2) / 2, summed by trapezoids over the
    levels; a parabola through the best level and its neighbours refines it.

    Args:
        y: log x of noisy images (drift removed), (B, ...).
        levels: increasing variances to choose from, evenly spaced in log.
        divergence: a callable (y, S) -> (s, div s), as exact_divergence returns.
    """
    slopes = []
    for level in levels:
        s, div = divergence(y, level)
        square = s.double().square().reshape(len(y), -1).sum(1)
        slopes.append((div.double() + square) * level / 2)  # d/dlog S
    slopes, step = torch.stack(slopes), math.log(levels[1] / levels[0])
    rises = (slopes[1:] + slopes[:-1]) / 2 * step
    height = torch.cat([torch.zeros_like(slopes[:1]), rises.cumsum(0)])
    best = height.argmax(0).clamp(1, len(levels) - 2)
    low, mid, high = (height.gather(0, (best + d)[None])[0] for d in (-1, 0, 1))
    bend = low - 2 * mid + high
    offset = torch.where(bend < 0, (low - high) / (2 * bend), torch.sign(high - low))
    logs = torch.tensor(levels, dtype=torch.float64, device=y.device).log()
    return (logs[best] + offset.clamp(-1, 1) * step).exp()


def _differentiable(score, y, level):
    """Return (y flattened, s (B, D) as a function of it, whether to keep the graph)."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        flat = y.detach().reshape(len(y), -1).requires_grad_()
        return flat, score(flat.reshape(y.shape), level).reshape(len(y), -1), keep


def _weighted(s, weights, at, keep):
    """Return grad_y (weights . s), (B, D)."""
    return torch.autograd.grad(s, at, weights, retain_graph=True, create_graph=keep)[0]


def _as_state(s, y, keep):
    return (s if keep else s.detach()).reshape(y.shape)
