"""Diffusion recovery likelihood: its noise levels, every coefficient of it, and its chains.

Levels 0..T, variance preserving: x_t = cos(phi_t) x_0 + sin(phi_t) e. Pair t = 1..T is the clean
side x_{t-1} and the noisy side x_t; with y = sqrt(a_t) x_{t-1}, a_t = A_t / A_{t-1}, A = cos^2 phi,

    x_t = y + sigma_t e,   sigma_t^2 = 1 - a_t
    log p(y | x_t) = f(y, t-1) / s_t^2 - r_t |x_t - y|^2 / (2 sigma_t^2) + const
    y <- y + 1/2 grad f(y, t-1) + k_t (x_t - y) + s_t z
    s_t^2 = b^2 c_t sigma_t^2,   k_t = r_t b^2 c_t / 2,   c_t = sin(phi_{t-1}) / sin(phi_0)

f is a log-density times the temperature s_t^2: the step size cancels, and a chain never divides by
s_t^2. At the top, t = T, there is no tether (r_T = 0) and y = x_{T-1}. f is the network's output F
times a gain, 1 in both papers. y carries noise of standard deviation n_t = sqrt(ahat_t)
sin(phi_{t-1}), so log p(y) need not be narrower than a parabola of curvature 1 / n_t^2. With the
gain q_t = s_t^2 / n_t^2 (units=noise) log p(y) = F / n_t^2, of one steepness at all levels.

References: Gao, Song, Poole, Wu and Kingma 2021, arXiv 2012.08125 (recovery likelihood); Zhu, Xie,
Wu and Gao 2024, arXiv 2309.05153 (angles, initializer). Coefficients as in their released codes.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from genmodels.kernels.philox import philox_normal
from genmodels.sampling.langevin import mala_chain, ula_chain
from genmodels.seeding import Stream

__all__ = [
    "ANGLES",
    "Level",
    "RecoverySchedule",
    "angles_cdrl",
    "angles_drl",
    "recovery_chain",
    "LevelMeans",
    "recovery_mala",
    "sample_recovery",
    "denoise_tweedie",
]


def angles_cdrl(levels):
    """Return phi_0..phi_T, float64: equally spaced, log SNR -2 ln tan phi from 9.8 to -5.1."""
    low, high = (math.atan(math.exp(-snr / 2)) for snr in (9.8, -5.1))
    return torch.linspace(low, high, levels + 1, dtype=torch.float64)


def angles_drl(levels):
    """Return phi_0..phi_T, float64, of 1000 linear betas 1e-4..0.02 and a last beta of 1.

    The levels are every (500 / (T - 1))-th of the first 501 and the very last but one (T = 6: 0,
    100, ..., 500, 999).
    """
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    index = torch.linspace(0, 500, levels, dtype=torch.float64).round().long()
    return torch.acos(kept[torch.cat([index, torch.tensor([999])])].sqrt())


ANGLES = {"cdrl": angles_cdrl, "drl": angles_drl}


class Level(NamedTuple):
    """Coefficients of pair t, each (B,) or a number: what the formulas above call them."""

    cos: torch.Tensor  # sqrt(A_t)
    sin: torch.Tensor  # sbar_t
    cos_clean: torch.Tensor  # sqrt(A_{t-1})
    sin_clean: torch.Tensor  # sbar_{t-1}
    scale: torch.Tensor  # sqrt(ahat_t): y = scale x_{t-1}; 1 at the top
    sigma: torch.Tensor  # sigma_t
    c: torch.Tensor  # c_t
    s: torch.Tensor  # s_t
    k: torch.Tensor  # k_t; 0 at the top
    v: torch.Tensor  # variance of the initializer's noise
    w: torch.Tensor  # weight of the loss in f: sigma_1 / sigma_t on the network's output
    gain: torch.Tensor  # q_t: f / the network's output
    noise: torch.Tensor  # encoded level of the noisy side, 1000 (2 / pi) phi_t, for the initializer
    noise_clean: torch.Tensor  # of the clean side, for the energy


class RecoverySchedule(nn.Module):
    """All coefficients, made in float64 on the host and cast once to float32 on the device.

    Args:
        angles: name in ANGLES.
        levels: T >= 2.
        step: b^2 > 0.
        growth: c_t = sin(phi_{t-1}) / sin(phi_0) ("clean", both papers) or 1 / sin(phi_0)
            ("constant", their 2-D example).
        units: gain 1 ("step", both papers) or q_t ("noise").
        limit: the largest q_t: a step of the chain is stable on curvatures of f below 4.
    """

    def __init__(self, angles="cdrl", levels=6, step=4e-4, growth="clean", units="step", limit=1.0):
        super().__init__()
        phi = ANGLES[angles](levels)
        cos, sin, before = phi.cos(), phi.sin(), phi[:-1]
        a = torch.cat([torch.ones(1).double(), (cos[1:] / cos[:-1]) ** 2])
        top = torch.arange(levels + 1) == levels
        clean = {"cos_clean": before.cos(), "sin_clean": before.sin()}
        clean = {key: torch.cat([torch.ones(1).double(), value]) for key, value in clean.items()}
        sigma = (1 - a).sqrt()
        c = (clean["sin_clean"] if growth == "clean" else torch.ones_like(phi)) / sin[0]
        ahat = torch.where(top, 1.0, a)
        s, code = (step * c).sqrt() * sigma, 1000 * 2 / math.pi * phi
        gain = (s / (ahat.sqrt() * clean["sin_clean"])).square().clamp(max=limit)
        gain = gain if units == "noise" else torch.ones_like(s)
        self.levels, self.step = levels, step
        # Row t, 1..T; row 0 has no meaning.
        self.exact = Level(
            cos=cos,
            sin=sin,
            **clean,
            scale=ahat.sqrt(),
            sigma=sigma,
            c=c,
            s=s,
            k=torch.where(top, 0.0, step * c / 2),
            v=ahat * clean["sin_clean"] ** 2 / sin**2 * (1 - a),
            w=sigma[1] / sigma / gain,
            gain=gain,
            noise=code,
            noise_clean=torch.cat([code[:1], code[:-1]]),
        )
        table = torch.stack(list(self.exact)).float()
        self.register_buffer("table", table, persistent=False)

    def at(self, t, exact=False):
        """Return the Level of pairs t, int64 (B,) in 1..T, float32 (B,) each; exact: float64."""
        table = torch.stack(list(self.exact)).to(t.device) if exact else self.table
        return Level(*table[:, t].unbind(0))

    def pair(self, x, level, e, fresh=None):
        """Return (x_t, y = sqrt(ahat_t) x_{t-1}) of clean images x, (B, C, H, W) each.

        Args:
            x: (B, C, H, W).
            level: Level of (B,) tensors.
            e: noise like x, of both sides: x_t is then x_{t-1} turned by phi_t - phi_{t-1}.
            fresh: noise of the step from x_{t-1} to x_t, in place of the shared one.
        """
        level = Level(*(value.reshape(-1, 1, 1, 1) for value in level))
        clean = level.cos_clean * x + level.sin_clean * e
        if fresh is None:
            return level.cos * x + level.sin * e, level.scale * clean
        x_t = level.cos / level.cos_clean * clean + level.sigma * fresh
        return x_t, level.scale * clean


def recovery_chain(f, y, x_t, level, *, steps, rate=1.0, noise_scale=1.0, mask=None, **options):
    """Return the Chain after `steps` Langevin steps at these levels, from y.

    Args:
        f: callable (B, C, H, W) -> (B,), the log-density times s_t^2.
        y: start, (B, C, H, W), float32.
        x_t: noisy side, like y.
        level: Level of (B,) tensors, or of numbers.
        steps: how many.
        rate: K / steps where the model was trained with K steps: drift by `rate`, noise by its
            root, so that the chain's total time stays.
        noise_scale: factor on the noise.
        mask: bool like y, True where y moves.
        options: seed, counter, stream, callback, diagnostics, freeze of ula_chain.
    """
    return ula_chain(
        lambda y: -f(y),
        y,
        steps=steps,
        step=0.5 * rate,
        noise_scale=level.s * (math.sqrt(rate) * noise_scale),
        tether=x_t,
        tether_scale=level.k * rate,
        mask=mask,
        **options,
    )


def recovery_mala(f, y, x_t, level, *, steps, rate=1.0, mask=None, **options):
    """Return the Chain after `steps` Metropolis-adjusted steps: exact for log p(y | x_t).

    The ratio is made in float64, and f should return float64: f / s_1^2 is 39,000 f. The step
    size `rate` does not change the law. Arguments as for recovery_chain; without x_t no tether.
    """
    # Target exp(f / s^2): temperature s^2, step rate / 2, so the noise is sqrt(rate) s.
    scale = None if x_t is None else level.k.double() * rate
    return mala_chain(
        lambda y: -f(y),
        y,
        steps=steps,
        step=0.5 * rate,
        temperature=level.s.double() ** 2,
        tether=x_t,
        tether_scale=scale,
        mask=mask,
        accumulate=torch.float64,
        **options,
    )


@torch.no_grad()
def sample_recovery(
    energy,
    initial,
    schedule,
    seeds,
    shape,
    *,
    steps,
    rate=1.0,
    noise_scale=1.0,
    mala=False,
    known=None,
    mask=None,
    freeze=(),
    callback=None,
):
    """Return (y, Level) of the first pair: samples y = sqrt(a_1) x_0, (N, *shape), before Tweedie.

    Where mask is True the image is `known`: at each level y is held there at the noised known
    pixels, with the same noise e at all levels, as the pairs of training share theirs.

    Args:
        energy: callable (y, Level, dtype) -> f, (N,).
        initial: callable (x_t, Level, noise) -> the chain's start, like x_t.
        schedule: RecoverySchedule.
        seeds: int64 (N,); image k is a function of seeds[k] alone.
        shape: (C, H, W).
        steps, rate, noise_scale: as for recovery_chain.
        mala: Metropolis-adjusted steps.
        known: (N, C, H, W) in [-1, 1]. mask: bool, broadcastable to it, True = known.
        freeze: networks that need no gradient of their parameters.
        callback: called as callback(i, x_{t-1}) after level t = T - i.
    """

    def draw(stream, counter=0):
        return philox_normal(shape, seeds, counter, stream=int(stream), device=seeds.device)

    x = draw(Stream.NOISE)
    free, e = None, None
    if mask is not None:
        mask, e = mask.expand_as(x), draw(Stream.KNOWN)
        free = ~mask
    for i, t in enumerate(range(schedule.levels, 0, -1)):
        pair = torch.full_like(seeds, t)
        level = schedule.at(pair)
        cast = Level(*(value.reshape(-1, 1, 1, 1) for value in level))
        if mask is not None:
            x = torch.where(mask, cast.cos * known + cast.sin * e, x)
        y = initial(x, level, draw(Stream.INITIALIZER, t))
        if mask is not None:
            clean = cast.cos_clean * known + cast.sin_clean * e
            y = torch.where(mask, cast.scale * clean, y)
        chain, dtype = (recovery_mala, torch.float64) if mala else (recovery_chain, torch.float32)
        options = {} if mala else {"noise_scale": noise_scale}
        y = chain(
            lambda y, level=level, dtype=dtype: energy(y, level, dtype),
            y,
            x,
            level,
            steps=steps,
            rate=rate,
            mask=free,
            seed=seeds,
            counter=t << 32,
            stream=int(Stream.CHAIN),
            freeze=freeze,
            diagnostics=False,
            **options,
        ).y
        x = y / cast.scale
        if callback is not None:
            callback(i, x)
    return y, level


def denoise_tweedie(f, y, level, scale=1.0):
    """Return the expected x_0 given the noisy x_0 + sbar_0 e of the first pair, like y.

    (x + sbar_0^2 grad log p(x)) / sqrt(A_0) with x = y / sqrt(a_1) and grad_x log p = sqrt(a_1)
    grad_y f / s_1^2. `scale` multiplies the displacement: the released code's is twice this.
    """
    level = Level(*(value.reshape(-1, 1, 1, 1) for value in level))
    with torch.enable_grad():
        y = y.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(f(y).sum(), y)
    x, score = y.detach() / level.scale, level.scale * grad / level.s**2
    return (x + scale * level.sin_clean**2 * score) / level.cos_clean


class LevelMeans:
    """Means over the images of each pair of levels in a batch, on the device: who is at fault.

    Attributes:
        names: f_data and f_chain (f of both sides), their gap, grad_norm (mean over
            the chain of |grad f|), displacement |y_K - y_0|, distance |y_K - y+|.
        values: (levels, names); NaN where the batch has no such pair.
    """

    names = ("f_data", "f_chain", "gap", "grad_norm", "displacement", "distance")

    @torch.no_grad()
    def __init__(self, levels, t, f_data, f_chain, chain, data):
        distance = (chain.y - data).flatten(1).norm(dim=1)
        rows = torch.stack(
            [
                f_data,
                f_chain,
                f_data - f_chain,
                chain.grad_norm.mean(0),
                chain.displacement,
                distance,
            ],
            dim=1,
        )
        sums = rows.new_zeros(levels, rows.shape[1]).index_add_(0, t - 1, rows)
        self.present = torch.bincount(t - 1, minlength=levels) > 0
        self.values = sums / torch.bincount(t - 1, minlength=levels)[:, None]

    def logs(self):
        """Return {"name_t": value}."""
        pairs = enumerate(self.names)
        return {f"{name}_{t + 1}": row[i] for i, name in pairs for t, row in enumerate(self.values)}

    def beyond(self, limit):
        """Return a line for each pair whose |gap| exceeds the limit or is not finite, and whether
        all values there are finite."""
        wrong = self.present & ~(self.values[:, 2].abs() <= limit)
        lines = []
        for t in wrong.nonzero().flatten().tolist():
            values = zip(self.names, self.values[t].tolist())
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values)
            lines.append(f"level {t + 1} of {len(self.values)} ({shown})")
        return lines, bool(torch.isfinite(self.values[wrong]).all())
