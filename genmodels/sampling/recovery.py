"""Diffusion recovery likelihood: its noise levels, every coefficient of it, and its chains.

Noise levels 0..T, variance preserving: x_t = cos(phi_t) x_0 + sin(phi_t) e. Rung t = 1..T is the
pair of a clean side x_{t-1} and a noisy side x_t; with y = sqrt(a_t) x_{t-1},
a_t = A_t / A_{t-1}, A = cos^2 phi,

    x_t = y + sigma_t e,   sigma_t^2 = 1 - a_t
    log p(y | x_t) = f(y, t-1) / s_t^2 - r_t |x_t - y|^2 / (2 sigma_t^2) + const
    y <- y + 1/2 grad f(y, t-1) + k_t (x_t - y) + s_t z
    s_t^2 = b^2 c_t sigma_t^2,   k_t = r_t b^2 c_t / 2,   c_t = sin(phi_{t-1}) / sin(phi_0)

f is a log-density times the temperature s_t^2: the step size cancels, and a chain never divides by
s_t^2. At the top, t = T, there is no tether (r_T = 0) and y = x_{T-1}. f is the network's output F
times a gain, 1 in both papers. y carries noise of standard deviation n_t = sqrt(ahat_t)
sin(phi_{t-1}), so log p(y) need not be narrower than a parabola of curvature 1 / n_t^2. With the
gain q_t = s_t^2 / n_t^2 (units=noise) log p(y) = F / n_t^2, of one steepness at all rungs.

References: Gao, Song, Poole, Wu and Kingma 2021, arXiv 2012.08125 (recovery likelihood); Zhu, Xie,
Wu and Gao 2024, arXiv 2309.05153 (angles, initializer). Coefficients as in their released codes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genmodels.kernels.broadcast import over_items
from genmodels.kernels.philox import philox_normal
from genmodels.sampling.langevin import Chain, mala_chain, ula_chain
from genmodels.seeding import Stream

__all__ = [
    "ANGLES",
    "RecoverySchedule",
    "Rung",
    "RungMeans",
    "angles_cdrl",
    "angles_drl",
    "denoise_tweedie",
    "recovery_chain",
    "recovery_mala",
    "sample_recovery",
]

ScaledLogDensity = Callable[
    [Tensor], Tensor
]  # f(y), (B, C, H, W) -> (B,), the log-density times s_t^2
Callback = Callable[[int, Tensor], object] | None


def angles_cdrl(rungs: int, snr_max: float = 9.8, snr_min: float = -5.1) -> Tensor:
    """Return phi_0..phi_T, float64: equally spaced, log SNR -2 ln tan phi from snr_max down."""
    low, high = (math.atan(math.exp(-snr / 2)) for snr in (snr_max, snr_min))
    return torch.linspace(low, high, rungs + 1, dtype=torch.float64)


def angles_drl(rungs: int, *_: float) -> Tensor:
    """Return phi_0..phi_T, float64, of 1000 linear betas 1e-4..0.02 and a last beta of 1.

    The levels are every (500 / (T - 1))-th of the first 501 and the very last but one (T = 6: 0,
    100, ..., 500, 999).
    """
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    index = torch.linspace(0, 500, rungs, dtype=torch.float64).round().long()
    return torch.acos(kept[torch.cat([index, torch.tensor([999])])].sqrt())


ANGLES = {"cdrl": angles_cdrl, "drl": angles_drl}


class Rung(NamedTuple):
    """Coefficients of rung t, each (B,) or a number: what the formulas above call them."""

    cos: Tensor  # sqrt(A_t)
    sin: Tensor  # sbar_t
    cos_clean: Tensor  # sqrt(A_{t-1})
    sin_clean: Tensor  # sbar_{t-1}
    scale: Tensor  # sqrt(ahat_t): y = scale x_{t-1}; 1 at the top
    sigma: Tensor  # sigma_t
    c: Tensor  # c_t
    s: Tensor  # s_t
    k: Tensor  # k_t; 0 at the top
    v: Tensor  # variance of the initializer's noise
    w: Tensor  # weight of the loss in f: sigma_1 / sigma_t on the network's output
    gain: Tensor  # q_t: f / the network's output
    noise: Tensor  # encoded level of the noisy side, for the initializer
    noise_clean: Tensor  # of the clean side, for the energy

    def over(self, x: Tensor) -> "Rung":
        """Return the coefficients (B,) shaped to broadcast over images x (B, C, H, W)."""
        return Rung(*(over_items(value, x) for value in self))


class RecoverySchedule(nn.Module):
    """All coefficients, made in float64 on the host and cast once to float32 on the device.

    Args:
        angles: name in ANGLES.
        rungs: T >= 2.
        step: b^2 > 0.
        growth: c_t = sin(phi_{t-1}) / sin(phi_0) ("clean", both papers) or 1 / sin(phi_0)
            ("constant", their 2-D example).
        units: gain 1 ("step", both papers) or q_t ("noise").
        limit: the largest q_t: a step of the chain is stable on curvatures of f below 4.
        snr_max, snr_min: log SNR of the first and last level of "cdrl".
        code: how networks are given a level: 1000 (2 / pi) phi_t ("angle", CDRL) or t ("index",
            DRL).
    """

    def __init__(
        self,
        angles: str = "cdrl",
        rungs: int = 6,
        step: float = 4e-4,
        growth: str = "clean",
        units: str = "step",
        limit: float = 1.0,
        snr_max: float = 9.8,
        snr_min: float = -5.1,
        code: str = "angle",
    ):
        super().__init__()
        phi = ANGLES[angles](rungs, snr_max, snr_min)
        cos, sin, before = phi.cos(), phi.sin(), phi[:-1]
        a = torch.cat([torch.ones(1).double(), (cos[1:] / cos[:-1]) ** 2])
        top = torch.arange(rungs + 1) == rungs
        clean = {"cos_clean": before.cos(), "sin_clean": before.sin()}
        clean = {key: torch.cat([torch.ones(1).double(), value]) for key, value in clean.items()}
        sigma = (1 - a).sqrt()
        c = (clean["sin_clean"] if growth == "clean" else torch.ones_like(phi)) / sin[0]
        ahat = torch.where(top, 1.0, a)
        s = (step * c).sqrt() * sigma
        level = torch.arange(rungs + 1).double() if code == "index" else 1000 * 2 / math.pi * phi
        gain = (s / (ahat.sqrt() * clean["sin_clean"])).square().clamp(max=limit)
        gain = gain if units == "noise" else torch.ones_like(s)
        self.rungs = rungs
        self.step = step
        # Row t, 1..T; row 0 has no meaning.
        self.exact = Rung(
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
            noise=level,
            noise_clean=torch.cat([level[:1], level[:-1]]),
        )
        table = torch.stack(list(self.exact)).float()
        self.register_buffer("table", table, persistent=False)

    def at(self, t: Tensor, exact: bool = False) -> Rung:
        """Return the Rung of t, int64 (B,) in 1..T, float32 (B,) each; exact: float64."""
        table = torch.stack(list(self.exact)).to(t.device) if exact else self.table
        return Rung(*table[:, t].unbind(0))

    def pair(
        self, x: Tensor, rung: Rung, e: Tensor, fresh: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (x_t, y = sqrt(ahat_t) x_{t-1}) of clean images x, (B, C, H, W) each.

        Args:
            x: (B, C, H, W).
            rung: Rung of (B,) tensors.
            e: noise like x, of both sides: x_t is then x_{t-1} turned by phi_t - phi_{t-1}.
            fresh: noise of the step from x_{t-1} to x_t, in place of the shared one.
        """
        rung = rung.over(x)
        clean = rung.cos_clean * x + rung.sin_clean * e
        if fresh is None:
            return rung.cos * x + rung.sin * e, rung.scale * clean
        x_t = rung.cos / rung.cos_clean * clean + rung.sigma * fresh
        return x_t, rung.scale * clean


def recovery_chain(
    f: ScaledLogDensity,
    y: Tensor,
    x_t: Tensor,
    rung: Rung,
    *,
    steps: int,
    rate: float = 1.0,
    noise_scale: float = 1.0,
    mask: Tensor | None = None,
    **options: Any,
) -> Chain:
    """Return the Chain after `steps` Langevin steps at these rungs, from y.

    Args:
        f: callable (B, C, H, W) -> (B,), the log-density times s_t^2.
        y: start, (B, C, H, W), float32.
        x_t: noisy side, like y.
        rung: Rung of (B,) tensors, or of numbers.
        steps: how many.
        rate: K / steps where the model was trained with K steps: drift by `rate`, noise by its
            root, so that the chain's total time stays.
        noise_scale: factor on the noise.
        mask: bool like y, True where y moves.
        options: seed, counter, stream, callback, diagnostics, freeze, exact of ula_chain.
    """
    return ula_chain(
        lambda y: -f(y),
        y,
        steps=steps,
        step=0.5 * rate,
        noise_scale=rung.s * (math.sqrt(rate) * noise_scale),
        tether=x_t,
        tether_scale=rung.k * rate,
        mask=mask,
        **options,
    )


def recovery_mala(
    f: ScaledLogDensity,
    y: Tensor,
    x_t: Tensor | None,
    rung: Rung,
    *,
    steps: int,
    rate: float = 1.0,
    mask: Tensor | None = None,
    **options: Any,
) -> Chain:
    """Return the Chain after `steps` Metropolis-adjusted steps: exact for log p(y | x_t).

    The ratio is made in float64, and f should return float64: f / s_1^2 is 39,000 f. The step
    size `rate` does not change the law. Arguments as for recovery_chain; without x_t no tether.
    """
    # Target exp(f / s^2): temperature s^2, step rate / 2, so the noise is sqrt(rate) s.
    scale = None if x_t is None else rung.k.double() * rate
    return mala_chain(
        lambda y: -f(y),
        y,
        steps=steps,
        step=0.5 * rate,
        temperature=rung.s.double() ** 2,
        tether=x_t,
        tether_scale=scale,
        mask=mask,
        accumulate=torch.float64,
        **options,
    )


@torch.no_grad()
def sample_recovery(
    energy: Callable[[Tensor, Rung, torch.dtype], Tensor],
    initial: Callable[[Tensor, Rung, Tensor], Tensor],
    schedule: RecoverySchedule,
    seeds: Tensor,
    shape: Sequence[int],
    *,
    steps: int,
    rate: float = 1.0,
    noise_scale: float = 1.0,
    mala: bool = False,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    freeze: Sequence[nn.Module] = (),
    callback: Callback = None,
) -> tuple[Tensor, Rung]:
    """Return (y, Rung) of rung 1: samples y = sqrt(a_1) x_0, (N, *shape), before Tweedie.

    Where mask is True the image is `known`: at each rung y is held there at the noised known
    pixels, with the same noise e at all rungs, as the pairs of training share theirs.

    Args:
        energy: callable (y, Rung, dtype) -> f, (N,).
        initial: callable (x_t, Rung, noise) -> the chain's start, like x_t.
        schedule: RecoverySchedule.
        seeds: int64 (N,); image k is a function of seeds[k] alone.
        shape: (C, H, W).
        steps, rate, noise_scale: as for recovery_chain.
        mala: Metropolis-adjusted steps.
        known: (N, C, H, W) in [-1, 1]. mask: bool, broadcastable to it, True = known.
        freeze: networks that need no gradient of their parameters.
        callback: called as callback(i, x_{t-1}) after rung t = T - i.
    """

    def draw(stream: Stream, counter: int = 0) -> Tensor:
        return philox_normal(shape, seeds, counter, stream=int(stream), device=seeds.device)

    x = draw(Stream.NOISE)
    free, e = None, None
    if mask is not None:
        mask, e = mask.expand_as(x), draw(Stream.KNOWN)
        free = ~mask
    for i, t in enumerate(range(schedule.rungs, 0, -1)):
        rung = schedule.at(torch.full_like(seeds, t))
        cast = rung.over(x)
        if mask is not None:
            x = torch.where(mask, cast.cos * known + cast.sin * e, x)
        y = initial(x, rung, draw(Stream.INITIALIZER, t))
        if mask is not None:
            clean = cast.cos_clean * known + cast.sin_clean * e
            y = torch.where(mask, cast.scale * clean, y)
        chain, dtype = (recovery_mala, torch.float64) if mala else (recovery_chain, torch.float32)
        options = {} if mala else {"noise_scale": noise_scale}
        y = chain(
            lambda y, rung=rung, dtype=dtype: energy(y, rung, dtype),
            y,
            x,
            rung,
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
    return y, rung


def denoise_tweedie(f: ScaledLogDensity, y: Tensor, rung: Rung, scale: float = 1.0) -> Tensor:
    """Return the expected x_0 given the noisy x_0 + sbar_0 e of rung 1, like y.

    (x + sbar_0^2 grad log p(x)) / sqrt(A_0) with x = y / sqrt(a_1) and grad_x log p = sqrt(a_1)
    grad_y f / s_1^2. `scale` multiplies the displacement: the released code's is twice this; with 0
    f is not asked.
    """
    rung = rung.over(y)
    if scale == 0:
        return y.detach() / rung.scale / rung.cos_clean
    with torch.enable_grad():
        y = y.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(f(y).sum(), y)
    x, score = y.detach() / rung.scale, rung.scale * grad / rung.s**2
    return (x + scale * rung.sin_clean**2 * score) / rung.cos_clean


class RungMeans:
    """Means over the images of each rung in a batch, on the device: which one is at fault.

    Attributes:
        names: f_data and f_chain (f of both sides), their gap, grad_norm (mean over
            the chain of |grad f|), displacement |y_K - y_0|, distance |y_K - y+|.
        values: (rungs, names); NaN where the batch has no such rung.
    """

    names = ("f_data", "f_chain", "gap", "grad_norm", "displacement", "distance")

    @torch.no_grad()
    def __init__(
        self,
        rungs: int,
        t: Tensor,
        f_data: Tensor,
        f_chain: Tensor,
        chain: Chain,
        data: Tensor,
    ):
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
        sums = rows.new_zeros(rungs, rows.shape[1]).index_add_(0, t - 1, rows)
        ones = torch.ones_like(t)
        counts = ones.new_zeros(rungs).index_add_(0, t - 1, ones)  # a bincount waits for the device
        self.present = counts > 0
        self.values = sums / counts[:, None]

    def logs(self) -> dict[str, Tensor]:
        """Return {"name_t": value}, on the host."""
        columns = zip(self.names, self.values.cpu().T)
        return {f"{name}_{t}": v for name, column in columns for t, v in enumerate(column, 1)}

    def unless(self, stopped: Tensor | None, before: "RungMeans | None") -> "RungMeans":
        """Return these means, or those before them where `stopped` holds; decided on the device."""
        if stopped is None or before is None:
            return self
        chosen = RungMeans.__new__(RungMeans)
        chosen.values = torch.where(stopped, before.values, self.values)
        chosen.present = torch.where(stopped, before.present, self.present)
        return chosen

    def diverged(self, limit: float) -> Tensor:
        """Return, on the device, whether a |gap| is beyond the limit and all such rungs finite."""
        wrong = self.present & ~(self.values[:, 2].abs() <= limit)
        return wrong.any() & (self.values.isfinite().all(dim=1) | ~wrong).all()

    def beyond(self, limit: float) -> tuple[list[str], bool]:
        """Return a line for each rung whose |gap| is beyond the limit, and whether all are finite.

        A gap that is not finite is beyond any limit.
        """
        wrong = self.present & ~(self.values[:, 2].abs() <= limit)
        lines = []
        for t in wrong.nonzero().flatten().tolist():
            values = zip(self.names, self.values[t].tolist())
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values)
            lines.append(f"level {t + 1} of {len(self.values)} ({shown})")
        return lines, bool(torch.isfinite(self.values[wrong]).all())
