"""One scalar potential V without time: from noise to data along its slope, then around them.

    dx = -grad V(x) dt + sqrt(2 eps(t)) dW,   x(0) ~ N(0, I)
    eps(t) = 0 up to t = tau, rising in a straight line to eps_max at t = 1, eps_max after

Up to tau this is a flow along straight paths x_t = (1 - t) x_0 + t x_1; held at eps_max it has the
equilibrium exp(-V / eps_max). Noise is by Stratonovich's rule, which Heun's method follows: here,
where its strength does not depend on x, Ito's is the same.

Reference: Balcerak et al. 2025, "Energy matching: unifying flow matching and energy-based models
for generative modeling", arXiv 2504.10612, equation of the dynamics and algorithms 1 and 2.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genmodels.kernels.philox import philox_normal
from genmodels.seeding import Stream

__all__ = ["sample_potential", "temperature"]

Gradient = Callable[[Tensor], Tensor]  # grad V(x), like x
Callback = Callable[[int, Tensor], object] | None


def temperature(t: float, tau: float, eps_max: float) -> float:
    """Return eps(t); see the module. With tau = 1 it jumps at t = 1."""
    if t < tau - 1e-9:  # 5 steps of 0.2 are a little less than 1
        return 0.0
    return eps_max * min(1.0, max(0.0, t - tau) / (1 - tau)) if tau < 1 else eps_max


@torch.no_grad()
def sample_potential(
    gradient: Gradient,
    seeds: Tensor,
    shape: Sequence[int],
    *,
    time: float,
    steps: int,
    tau: float = 1.0,
    eps_max: float,
    solver: str = "heun",
    known: Tensor | None = None,
    mask: Tensor | None = None,
    pull: Callable[[Tensor, Tensor, float], Tensor] | None = None,
    callback: Callback = None,
) -> Tensor:
    """Return x(time), float32 (N, *shape), not clipped.

    Where mask is True the image is held on its own path, (1 - t) x(0) + t known, and at `known`
    from t = 1 on.

    Args:
        gradient: callable x -> grad V(x), like x; asked once (euler) or twice (heun) a step.
        seeds: int64 (N,); image k is a function of seeds[k] alone.
        shape: (C, H, W).
        time: where to stop, > 0. steps: how many, of time / steps each.
        tau, eps_max: of the temperature.
        solver: heun or euler.
        known: (N, C, H, W) in [-1, 1]. mask: bool, broadcastable to it, True = known.
        pull: (x, x(0), t) -> x as it goes on from t, after each step; t at most 1.
        callback: called as callback(i, x) after each step.
    """

    def draw(stream: Stream, counter: int = 0) -> Tensor:
        return philox_normal(shape, seeds, counter, stream=int(stream), device=seeds.device)

    start = x = draw(Stream.NOISE)
    dt = time / steps
    for i in range(steps):
        eps = temperature(i * dt, tau, eps_max)
        slope = gradient(x)
        step = (2 * eps * dt) ** 0.5 * draw(Stream.CHAIN, i + 1) if eps else 0.0
        if solver == "heun":
            slope = (slope + gradient(x - dt * slope + step)) / 2
        x = x - dt * slope + step
        if mask is not None:
            t = min(1.0, (i + 1) * dt)
            x = torch.where(mask, (1 - t) * start + t * known, x)
        if pull is not None:
            x = pull(x, start, min(1.0, (i + 1) * dt))
        if callback is not None:
            callback(i, x)
    return x
