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

import math

import torch

from genmodels.kernels.gbm_step import gbm_step
from genmodels.kernels.philox import philox_normal, philox_uniform
from genmodels.sampling.likelihood import ode_log_prob
from genmodels.sampling.ode import sample_heun
from genmodels.sampling.schedules import state_dtype
from genmodels.seeding import Stream

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


def variance_levels(steps, low, high, grid="geometric"):
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
        levels = high * (low / high) ** ramp
    else:
        power = 1 if grid == "uniform" else 2
        ends = high ** (1 / power), low ** (1 / power)
        levels = (ends[0] + ramp * (ends[1] - ends[0])) ** power
    return [*levels.tolist(), 0.0]


def sample_dls(score, y, levels, *, noise, drift=0.5, denoise=True, callback=None):
    """Return log x at the last level: the exponential step, which keeps every sign of x.

    Args:
        score: s(y, S), see the module.
        y: log x at levels[0], (B, ...).
        levels: decreasing variances; the last may be 0.
        noise: int64 (B,), the images' seeds; or a callable i, y -> z like y.
        drift: mu / sigma^2 of the forward process.
        denoise: draw no noise in a step to 0: it then ends at the posterior mean of log x.
        callback: called as callback(i, y) after each step.
    """
    for i, (level, after) in enumerate(zip(levels, levels[1:])):
        variance = level - after
        scale = 0.0 if denoise and after == 0 else math.sqrt(variance)
        y = log_step(y, score(y, level), variance, scale, drift, **_draw(noise, i, y))
        if callback:
            callback(i, y)
    return y


def sample_ancestral(score, y, levels, *, noise, drift=0.5, callback=None):
    """Return log x at the last level, each step a draw from q(y' | y, y_0 = E[y_0 | y]).

    Arguments as for sample_dls; a step to 0 draws no noise.
    """
    for i, (level, after) in enumerate(zip(levels, levels[1:])):
        variance = level - after
        scale = math.sqrt(variance * after / level)
        y = log_step(y, score(y, level), variance, scale, drift, **_draw(noise, i, y))
        if callback:
            callback(i, y)
    return y


def sample_ums(score, y, levels, *, noise, drift=0.5, denoise=True, callback=None):
    """Return (x, flips): x itself at the last level by Euler's method, whose factors may be < 0.

    A factor <= 0 flips the sign of x, which the process never does; the score is then asked at
    log |x|. flips counts them, int32 (B,). Arguments as for sample_dls.
    """
    x, flips = y.exp(), torch.zeros(len(y), dtype=torch.int32, device=y.device)
    for i, (level, after) in enumerate(zip(levels, levels[1:])):
        variance = level - after
        scale = 0.0 if denoise and after == 0 else math.sqrt(variance)
        x = _ums_step(score, x, level, variance, scale, drift, flips, noise, i)
        if callback:
            callback(i, x.abs().log())
    return x, flips


def sample_ode(score, y, levels, *, solver="heun", drift=0.5, callback=None):
    """Return log x at the last level along the probability-flow ODE.

    In z = y - (drift - 1/2) S it is EDM's, dz/dsigma = (z - D) / sigma with sigma = sqrt(S) and
    D = z + S s; rk4 steps in log sigma. A step to 0 goes to D. Arguments as for sample_dls.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver}: choose from {', '.join(SOLVERS)}")
    shift = drift - 0.5

    def denoised(z, sigma):
        level = float(sigma) ** 2
        return z + level * score(z + shift * level, level)

    def report(i, z):
        callback(i, z + shift * levels[i + 1])

    report = report if callback else None
    z = y - shift * levels[0]
    if solver == "heun":
        sigmas = torch.tensor(levels, dtype=torch.float64).sqrt()
        z = sample_heun(denoised, z, sigmas.to(z), callback=report)
        return z + shift * levels[-1]
    for i, (level, after) in enumerate(zip(levels, levels[1:])):
        if after == 0:
            z = denoised(z, math.sqrt(level))
        else:
            z = _rk4(lambda z, u: z - denoised(z, math.exp(u)), z, level, after)
        if report:
            report(i, z)
    return z + shift * levels[-1]


def sample_paper(
    score,
    y,
    levels,
    *,
    noise,
    delta,
    inner=1,
    anneal=0.995,
    form="dls",
    rate=1.0,
    final=0,
    drift=0.5,
    callback=None,
):
    """Return (x, flips) by the published annealed sampler, which is no reversal of time.

    At level k, `inner` steps of variance v = delta rate, their noise times anneal^k: the times do
    not add up to that of the forward process and the noise dies out, so that variance is lost.

    Args:
        delta: step in time; rate = sigma^2 makes it the variance of a step.
        inner: steps at each level.
        anneal: factor on the noise from one level to the next.
        form: "dls" or "ums".
        final: steps without noise at the last level above 0.
        score, y, levels, noise, drift, callback: as for sample_dls; a last level of 0 is left out.
    """
    if form not in ("dls", "ums"):
        raise ValueError(f"form={form}: choose from dls, ums")
    levels = levels[:-1] if levels[-1] == 0 else levels
    variance, x = delta * rate, y.exp()
    flips = torch.zeros(len(y), dtype=torch.int32, device=y.device)
    plan = [(k, math.sqrt(variance) * anneal**k) for k in range(len(levels)) for _ in range(inner)]
    plan += [(len(levels) - 1, 0.0)] * final
    for i, (k, scale) in enumerate(plan):
        if form == "ums":
            x = _ums_step(score, x, levels[k], variance, scale, drift, flips, noise, i)
            y = x.abs().log()
        else:
            y = log_step(y, score(y, levels[k]), variance, scale, drift, **_draw(noise, i, y))
        if callback and (i + 1) % inner == 0:
            callback(k, y)
    return (x if form == "ums" else y.exp()), flips


def sample(cfg, score, y, levels, *, noise, callback=None):
    """Return (log x, flips or None) by cfg.sampler; a flipped x has log x = -inf.

    sampler=paper has levels of its own, S (1 - k / steps).

    Args:
        cfg: a GBMConfig (methods/gbm.py).
        score, y, levels, noise, callback: as for sample_dls.
    """
    common = {"drift": cfg.drift, "callback": callback}
    if cfg.sampler == "ode":
        return sample_ode(score, y, levels, solver=cfg.solver, **common), None
    common["noise"] = noise
    if cfg.sampler == "dls":
        return sample_dls(score, y, levels, denoise=cfg.denoise_last, **common), None
    if cfg.sampler == "ancestral":
        return sample_ancestral(score, y, levels, **common), None
    if cfg.sampler == "ums":
        x, flips = sample_ums(score, y, levels, denoise=cfg.denoise_last, **common)
    else:
        own = {key: getattr(cfg, key) for key in ("delta", "inner", "anneal", "form", "final")}
        # Its steps do not shrink with the levels: below S / steps they would overshoot.
        even = [levels[0] * (1 - k / cfg.steps) for k in range(cfg.steps)]
        x, flips = sample_paper(score, y, even, rate=levels[0], **own, **common)
    return x.clamp(min=0).log(), flips


def flow_log_prob(denoised, y, low, high, prior, signs, steps):
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


def variational_bound(denoised, y, low, high, prior, seeds, steps):
    """Return a lower bound, in expectation, of the log density of y = log x, float64 (B,):

        log p(y) >= E log N(y; D(y_low), low I) - KL(q(y_high | y) || prior)
                    - 1/2 int_low^high E |D(y_S; S) - y|^2 / S^2 dS,     y_S = y + sqrt(S) z

    The integral is averaged over one S in each of `steps` equal parts of log S; the place in them
    and the noise come from each image's seed.

    Args:
        denoised: D(y, sigma) -> like y, sigma float32 (B,).
        y: log x of clean images (B, ...).
        low, high: the smallest and the largest S.
        prior: GaussianPrior.
        seeds: int64 (B,).

    Reference: Kingma et al. 2021, "Variational diffusion models", arXiv 2107.00630, equation 17.
    """
    shape, stream = y.shape[1:], {"stream": int(Stream.LEVEL), "device": y.device}

    def square(level, step):
        z = philox_normal(shape, seeds, step, **stream)
        sigma = level.sqrt().float()
        noisy = y.float() + sigma.reshape(-1, *[1] * len(shape)) * z
        return (denoised(noisy, sigma).double() - y).square().flatten(1).sum(1)

    place = philox_uniform((), seeds, 0, **stream).double()
    integral = torch.zeros_like(place)
    for k in range(steps):
        level = low * (high / low) ** ((k + place) / steps)
        integral += square(level, k + 1) / (2 * level) * math.log(high / low) / steps
    last = square(torch.full_like(place, low), steps + 1) / (2 * low)
    last += math.prod(shape) / 2 * math.log(2 * math.pi * low)
    return -(last + integral + prior.divergence_of(y, high))


def log_step(y, score, variance, scale, drift, **draw):
    """Return y + v h + (3/2 - drift) v + scale z through the kernel.

    With m = drift v the kernel's exponent v h + 1.5 v - m is v s + 1.5 v - (m + v): given s in
    place of h nothing cancels, and for drift = 1/2 the step is that of VE diffusion to the bit.
    """
    drift = drift * variance + variance
    return gbm_step(y, score, variance=variance, drift=drift, noise_scale=scale, form="log", **draw)


def _rk4(slope, state, level, after):
    """Return the state after one Runge-Kutta step in u = log(S) / 2 = log sigma."""
    start, end = math.log(level) / 2, math.log(after) / 2
    step, middle = end - start, (start + end) / 2
    k1 = slope(state, start)
    k2 = slope(state + (step / 2) * k1, middle)
    k3 = slope(state + (step / 2) * k2, middle)
    k4 = slope(state + step * k3, end)
    return state + (step / 6) * (k1 + 2.0 * k2 + 2.0 * k3 + k4)


def _ums_step(score, x, level, variance, scale, drift, flips, noise, i):
    h = score(x.abs().log(), level) - 1
    return gbm_step(
        x,
        h,
        variance=variance,
        drift=drift * variance,
        noise_scale=scale,
        form="ums",
        flips=flips,
        **_draw(noise, i, x),
    )


def _draw(noise, i, y):
    """Return gbm_step's arguments for the noise of step i."""
    if callable(noise):
        return {"noise": noise(i, y)}
    return {"seed": noise, "counter": i, "stream": int(Stream.SAMPLER)}
