"""Geometric Brownian motion backwards in time, in y = log x: samplers and log densities.

    forward   dX = mu X dt + sigma X dW,  mu = drift sigma^2,  clock S = int sigma^2 dt
              y = log X:  y_S = y_0 + (drift - 1/2) S + sqrt(S) z          (Ito: -sigma^2 / 2)
    score     s(y, S) = grad_y log p_S(y),   h = x grad_x log p = s - 1    (Jacobian: -1)
    reverse   dls        y <- y + v h + (3/2 - drift) v + sqrt(v) z        v = S - S'
              ums        x <- x (1 + v h + (2 - drift) v + sqrt(v) z)
              ancestral  dls with sqrt(v S'/S) z: exact if the posterior of y_0 is a point
              ode        dy/dS = drift - 1/2 - s / 2

Every function takes `score`, a callable (y (B, ...), S a number) -> s like y. S is the variance of
log x; with drift = 1/2 (the paper's) y is a driftless Brownian motion, that is variance-exploding
diffusion in log space. Steps go through kernels.gbm_step.

Reference: "Dale meets Langevin", arXiv 2510.02730 (forward process, the two updates); Anderson
1982 (reverse SDE); Song et al. 2021, arXiv 2011.13456 (probability-flow ODE).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genmodels.kernels.broadcast import over_items
from genmodels.kernels.gbm_step import gbm_step
from genmodels.kernels.philox import philox_normal, philox_uniform
from genmodels.networks.prior import GaussianPrior
from genmodels.sampling.likelihood import ode_log_prob
from genmodels.sampling.ode import sample_heun
from genmodels.sampling.schedules import state_dtype
from genmodels.seeding import Stream

__all__ = [
    "GRIDS",
    "READ_BY",
    "SAMPLERS",
    "SOLVERS",
    "flow_log_prob",
    "log_step",
    "sample",
    "sample_ancestral",
    "sample_dls",
    "sample_ode",
    "sample_paper",
    "sample_ums",
    "variance_levels",
    "variational_bound",
]

Score = Callable[[Tensor, float], Tensor]  # s(y, S) -> like y
Noise = Tensor | Callable[[int, Tensor], Tensor]  # seeds (B,); or (step, y) -> z like y
Callback = Callable[[int, Tensor], object] | None

# Settings that not every sampler reads.
READ_BY = {
    "grid": ("ode", "dls", "ancestral", "ums"),
    "solver": ("ode",),
    "denoise_last": ("dls", "ums"),
    **dict.fromkeys(("delta", "inner", "anneal", "form", "final"), ("paper",)),
}
GRIDS = ("uniform", "quadratic", "geometric")
SOLVERS = ("heun", "rk4")
SAMPLERS = ("ode", "dls", "ancestral", "ums", "paper")


def variance_levels(steps: int, low: float, high: float, grid: str = "geometric") -> list[float]:
    """Return S_0 = high > ... > S_{steps-1} = low > S_steps = 0, a list of floats.

    Args:
        steps: number of steps, >= 1 (one step goes from high straight to 0).
        low, high: variances of log x, 0 < low < high.
        grid: even in S (uniform), in sqrt(S) (quadratic) or in log S (geometric).

    Raises:
        ValueError: a value out of range.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid={grid}: choose from {', '.join(GRIDS)}")
    if steps < 1:
        raise ValueError(f"steps={steps}: must be >= 1")
    if not 0 < low < high:
        raise ValueError(f"low={low}: must be in (0, high={high})")
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    if grid == "geometric":
        variances = high * (low / high) ** ramp
    else:
        power = 1 if grid == "uniform" else 2
        ends = high ** (1 / power), low ** (1 / power)
        variances = (ends[0] + ramp * (ends[1] - ends[0])) ** power
    return [*variances.tolist(), 0.0]


def sample_dls(
    score: Score,
    y: Tensor,
    variances: Sequence[float],
    *,
    noise: Noise,
    drift: float = 0.5,
    denoise: bool = True,
    callback: Callback = None,
) -> Tensor:
    """Return log x at the last variance: the exponential step, which keeps every sign of x.

    Args:
        score: s(y, S), see the module.
        y: log x at variances[0], (B, ...).
        variances: S, decreasing; the last may be 0.
        noise: int64 (B,), the images' seeds; or a callable i, y -> z like y.
        drift: mu / sigma^2 of the forward process.
        denoise: draw no noise in a step to 0: it then ends at the posterior mean of log x.
        callback: called as callback(i, y) after each step.
    """
    for i, (variance, after) in enumerate(itertools.pairwise(variances)):
        v = variance - after
        scale = 0.0 if denoise and after == 0 else math.sqrt(v)
        y = log_step(y, score(y, variance), v, scale, drift, **_draw(noise, i, y))
        if callback:
            callback(i, y)
    return y


def sample_ancestral(
    score: Score,
    y: Tensor,
    variances: Sequence[float],
    *,
    noise: Noise,
    drift: float = 0.5,
    callback: Callback = None,
) -> Tensor:
    """Return log x at the last variance, each step a draw from q(y' | y, y_0 = E[y_0 | y]).

    Arguments as for sample_dls; a step to 0 draws no noise.
    """
    for i, (variance, after) in enumerate(itertools.pairwise(variances)):
        v = variance - after
        scale = math.sqrt(v * after / variance)
        y = log_step(y, score(y, variance), v, scale, drift, **_draw(noise, i, y))
        if callback:
            callback(i, y)
    return y


def sample_ums(
    score: Score,
    y: Tensor,
    variances: Sequence[float],
    *,
    noise: Noise,
    drift: float = 0.5,
    denoise: bool = True,
    callback: Callback = None,
) -> tuple[Tensor, Tensor]:
    """Return (x, flips): x itself at the last variance by Euler's method, whose factors may be < 0.

    A factor <= 0 flips the sign of x, which the process never does; the score is then asked at
    log |x|. flips counts them, int32 (B,). Arguments as for sample_dls.
    """
    x = y.exp()
    flips = torch.zeros(len(y), dtype=torch.int32, device=y.device)
    for i, (variance, after) in enumerate(itertools.pairwise(variances)):
        v = variance - after
        scale = 0.0 if denoise and after == 0 else math.sqrt(v)
        x = _ums_step(score, x, variance, v, scale, drift, flips, noise, i)
        if callback:
            callback(i, x.abs().log())
    return x, flips


def sample_ode(
    score: Score,
    y: Tensor,
    variances: Sequence[float],
    *,
    solver: str = "heun",
    drift: float = 0.5,
    callback: Callback = None,
) -> Tensor:
    """Return log x at the last variance along the probability-flow ODE.

    In z = y - (drift - 1/2) S it is EDM's, dz/dsigma = (z - D) / sigma with sigma = sqrt(S) and
    D = z + S s; rk4 steps in log sigma. A step to 0 goes to D. Arguments as for sample_dls.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver}: choose from {', '.join(SOLVERS)}")
    shift = drift - 0.5

    def denoised(z: Tensor, sigma: float | Tensor) -> Tensor:
        variance = float(sigma) ** 2
        return z + variance * score(z + shift * variance, variance)

    def report(i: int, z: Tensor) -> None:
        callback(i, z + shift * variances[i + 1])

    report = report if callback else None
    z = y - shift * variances[0]
    if solver == "heun":
        sigmas = torch.tensor(variances, dtype=torch.float64).sqrt().to(z.dtype)
        z = sample_heun(denoised, z, sigmas, callback=report)
        return z + shift * variances[-1]
    for i, (variance, after) in enumerate(itertools.pairwise(variances)):
        if after == 0:
            z = denoised(z, math.sqrt(variance))
        else:
            z = _rk4(lambda z, u: z - denoised(z, math.exp(u)), z, variance, after)
        if report:
            report(i, z)
    return z + shift * variances[-1]


def sample_paper(
    score: Score,
    y: Tensor,
    variances: Sequence[float],
    *,
    noise: Noise,
    delta: float,
    inner: int = 1,
    anneal: float = 0.995,
    form: str = "dls",
    rate: float = 1.0,
    final: int = 0,
    drift: float = 0.5,
    callback: Callback = None,
) -> tuple[Tensor, Tensor]:
    """Return (x, flips) by the published annealed sampler, which is no reversal of time.

    At S_k, `inner` steps of variance v = delta rate, their noise times anneal^k: the times do not
    add up to that of the forward process and the noise dies out, so that variance is lost.

    Args:
        delta: step in time; rate = sigma^2 makes it the variance of a step.
        inner: steps at each of the variances.
        anneal: factor on the noise from one of them to the next.
        form: "dls" or "ums".
        final: steps without noise at the last one above 0.
        score, y, variances, noise, drift, callback: as for sample_dls; a last variance of 0 is
            left out.
    """
    if form not in ("dls", "ums"):
        raise ValueError(f"form={form}: choose from dls, ums")
    variances = variances[:-1] if variances[-1] == 0 else variances
    v, x = delta * rate, y.exp()
    flips = torch.zeros(len(y), dtype=torch.int32, device=y.device)
    steps = [(k, math.sqrt(v) * anneal**k) for k in range(len(variances)) for _ in range(inner)]
    steps += [(len(variances) - 1, 0.0)] * final
    for i, (k, scale) in enumerate(steps):
        if form == "ums":
            x = _ums_step(score, x, variances[k], v, scale, drift, flips, noise, i)
            y = x.abs().log()
        else:
            y = log_step(y, score(y, variances[k]), v, scale, drift, **_draw(noise, i, y))
        if callback and (i + 1) % inner == 0:
            callback(k, y)
    return (x if form == "ums" else y.exp()), flips


def sample(
    cfg: Any,
    score: Score,
    y: Tensor,
    variances: Sequence[float],
    *,
    noise: Noise,
    callback: Callback = None,
) -> tuple[Tensor, Tensor | None]:
    """Return (log x, flips or None) by cfg.sampler; a flipped x has log x = -inf.

    sampler=paper has variances of its own, S (1 - k / steps).

    Args:
        cfg: a GBMConfig (methods/gbm.py).
        score, y, variances, noise, callback: as for sample_dls.
    """
    common = {"drift": cfg.drift, "callback": callback}
    if cfg.sampler == "ode":
        return sample_ode(score, y, variances, solver=cfg.solver, **common), None
    common["noise"] = noise
    if cfg.sampler == "dls":
        return sample_dls(score, y, variances, denoise=cfg.denoise_last, **common), None
    if cfg.sampler == "ancestral":
        return sample_ancestral(score, y, variances, **common), None
    if cfg.sampler == "ums":
        x, flips = sample_ums(score, y, variances, denoise=cfg.denoise_last, **common)
    else:
        keys = ("delta", "inner", "anneal", "form", "final")
        # Its steps do not shrink with the variances: below S / steps they would overshoot.
        even = [variances[0] * (1 - k / cfg.steps) for k in range(cfg.steps)]
        options = {key: getattr(cfg, key) for key in keys} | common
        x, flips = sample_paper(score, y, even, rate=variances[0], **options)
    return x.clamp(min=0).log(), flips


def flow_log_prob(
    denoised: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    low: float,
    high: float,
    prior: GaussianPrior,
    signs: Callable[[int], Tensor] | None,
    steps: int,
) -> Tensor:
    """Return log p(y) of y = log x at S = low, float64 (B,), by dy/dlog(sigma) = y - D(y; sigma).

    Args:
        denoised: D(y, sigma) -> like y, sigma a scalar tensor.
        y: log x (B, ...), float64.
        low, high: the smallest and the largest S, where y ~ prior.
        prior: GaussianPrior.
        signs: as for ode_log_prob, None = the exact divergence.
        steps: RK4 steps.

    Reference: Song et al. 2021, arXiv 2011.13456, section 4.3.
    """
    ends = math.log(low) / 2, math.log(high) / 2
    options = {"dtype": state_dtype(y.device), "device": y.device}
    times = torch.linspace(*ends, steps + 1, **options)
    return ode_log_prob(
        lambda y, t: y - denoised(y, t.exp()).to(y.dtype),
        y,
        times,
        lambda y: prior.log_prob(y, high),
        signs=signs,
    )


def variational_bound(
    denoised: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    low: float,
    high: float,
    prior: GaussianPrior,
    seeds: Tensor,
    steps: int,
) -> Tensor:
    """Return a bound on the log density of y = log x, float64 (B,): below it in expectation.

        log p(y) >= E log N(y; D(y_low), low I) - KL(q(y_high | y) || prior)
                    - 1/2 int_low^high E |D(y_S; S) - y|^2 / S^2 dS,     y_S = y + sqrt(S) z

    The integral is averaged over one S in each of `steps` equal parts of log S; how far into its
    part S lies, and the noise, come from each image's seed.

    Args:
        denoised: D(y, sigma) -> like y, sigma float32 (B,).
        y: log x of clean images (B, ...).
        low, high: the smallest and the largest S.
        prior: GaussianPrior.
        seeds: int64 (B,).
        steps: parts of the integral.

    Reference: Kingma et al. 2021, "Variational diffusion models", arXiv 2107.00630, equation 17.
    """
    shape, stream = y.shape[1:], {"stream": int(Stream.LEVEL), "device": y.device}

    def square(variance: Tensor, step: int) -> Tensor:
        z = philox_normal(shape, seeds, step, **stream)
        sigma = variance.sqrt().float()
        noisy = y.float() + over_items(sigma, y) * z
        return (denoised(noisy, sigma).double() - y).square().flatten(1).sum(1)

    offset = philox_uniform((), seeds, 0, **stream).double()
    integral = torch.zeros_like(offset)
    for k in range(steps):
        variance = low * (high / low) ** ((k + offset) / steps)
        integral += square(variance, k + 1) / (2 * variance) * math.log(high / low) / steps
    last = square(torch.full_like(offset, low), steps + 1) / (2 * low)
    last += math.prod(shape) / 2 * math.log(2 * math.pi * low)
    return -(last + integral + prior.divergence_of(y, high))


def log_step(y: Tensor, score: Tensor, v: float, scale: float, drift: float, **draw: Any) -> Tensor:
    """Return y + v h + (3/2 - drift) v + scale z through the kernel.

    With m = drift v the kernel's exponent v h + 1.5 v - m is v s + 1.5 v - (m + v): given s in
    place of h nothing cancels, and for drift = 1/2 the step is that of VE diffusion to the bit.

    Args:
        y: log x, (B, ...).
        score: s there, like y.
        v: variance of the step.
        scale: of the noise.
        drift: mu / sigma^2.
        draw: gbm_step's noise, or its seed, counter and stream.
    """
    drift = drift * v + v
    return gbm_step(y, score, variance=v, drift=drift, noise_scale=scale, form="log", **draw)


def _rk4(
    slope: Callable[[Tensor, float], Tensor], state: Tensor, variance: float, after: float
) -> Tensor:
    """Return the state after one Runge-Kutta step in u = log(S) / 2 = log sigma."""
    start, end = math.log(variance) / 2, math.log(after) / 2
    step, middle = end - start, (start + end) / 2
    k1 = slope(state, start)
    k2 = slope(state + (step / 2) * k1, middle)
    k3 = slope(state + (step / 2) * k2, middle)
    k4 = slope(state + step * k3, end)
    return state + (step / 6) * (k1 + 2.0 * k2 + 2.0 * k3 + k4)


def _ums_step(
    score: Score,
    x: Tensor,
    variance: float,
    v: float,
    scale: float,
    drift: float,
    flips: Tensor,
    noise: Noise,
    i: int,
) -> Tensor:
    """Return x after step i of variance v from the noise variance `variance`; adds to flips."""
    h = score(x.abs().log(), variance) - 1
    return gbm_step(
        x,
        h,
        variance=v,
        drift=drift * v,
        noise_scale=scale,
        form="ums",
        flips=flips,
        **_draw(noise, i, x),
    )


def _draw(noise: Noise, i: int, y: Tensor) -> dict[str, Any]:
    """Return gbm_step's arguments for the noise of step i."""
    if callable(noise):
        return {"noise": noise(i, y)}
    return {"seed": noise, "counter": i, "stream": int(Stream.SAMPLER)}
