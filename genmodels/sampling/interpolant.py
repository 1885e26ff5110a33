"""Stochastic interpolants: the paths, the fields along them, and samplers by an ODE or an SDE.

    x_t = alpha(t) x_0 + beta(t) x_1 + gamma(t) z,   t from 0 (source) to 1 (data),  z ~ N(0, I)

    v   = E[alpha' x_0 + beta' x_1 | x_t]
    eta = E[z | x_t],        s = grad log rho_t = -eta / gamma
    b   = E[d x_t / dt | x_t] = v + gamma' eta = v - gamma gamma' s
    ODE   dX = b dt                                  carries rho_0 to rho_1
    SDE   dX = (b + eps s) dt + sqrt(2 eps) dW       so does this, for any eps(t) >= 0

                     alpha                      beta                       gamma
    linear           1 - t                      t                          of the menu
    trig             r cos(pi t / 2)            r sin(pi t / 2)            of it; r^2 = 1 - gamma^2
    encdec           cos^2(pi t), t < 1/2       cos^2(pi t), t >= 1/2      of the menu
    mirror           0                          1                          of the menu
    one_sided_linear 0                          t                          1 - t
    one_sided_trig   0                          sin(pi t / 2)              cos(pi t / 2)

    gamma / sqrt(a): zero 0, brownian sqrt(t (1 - t)), quadratic t (1 - t), sin2 sin^2(pi t),
                     sigmoid a smooth bump around 1/2

A one-sided path has its noise z for a source. One field gives all others there: with
W = beta' gamma - beta gamma' > 0,

    D = E[x_1 | x_t] = (gamma b - gamma' x) / W,     eta = (beta' x - beta b) / W

and D is the denoiser of EDM at x_t / beta with sigma = gamma / beta.

Reference: Albergo, Boffi and Vanden-Eijnden 2023, "Stochastic interpolants: a unifying framework
for flows and diffusions", arXiv 2303.08797, sections 2 (fields, SDE), 3.4 (mirror), 4 (paths) and
table 8 (gamma); the forms of eps are those of Ma et al. 2024, "SiT", arXiv 2401.08740.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genmodels.kernels.philox import philox_normal
from genmodels.sampling.schedules import karras_sigmas
from genmodels.seeding import Stream

__all__ = [
    "DIFFUSIONS",
    "GAMMAS",
    "GRIDS",
    "HEADS",
    "PATHS",
    "SAMPLERS",
    "Coefficients",
    "Interpolation",
    "sample_path",
    "time_grid",
]

Callback = Callable[[int, Tensor], object] | None
Bump = tuple[Tensor, Tensor, Tensor]  # gamma, gamma', gamma gamma'
HALF_PI = math.pi / 2


class Coefficients(NamedTuple):
    """What stands before x_0, x_1 and z at a time, with derivatives; tensors, or all floats."""

    alpha: Tensor | float
    d_alpha: Tensor | float
    beta: Tensor | float
    d_beta: Tensor | float
    gamma: Tensor | float
    d_gamma: Tensor | float
    gamma_d_gamma: Tensor | float

    def numbers(self) -> "Coefficients":
        """Return them as floats; of tensors on the host."""
        return Coefficients(*(float(value) for value in self))


# ------------------------------------------------------------------------------------------------
# gamma: the product gamma gamma' in closed form, for gamma' alone is infinite at an end


def _zero(t: Tensor) -> Bump:
    zero = torch.zeros_like(t)
    return zero, zero, zero


def _brownian(t: Tensor) -> Bump:
    gamma, product = (t * (1 - t)).clamp(min=0).sqrt(), (1 - 2 * t) / 2
    return gamma, product / gamma, product


def _quadratic(t: Tensor) -> Bump:
    gamma, slope = t * (1 - t), 1 - 2 * t
    return gamma, slope, gamma * slope


def _sin2(t: Tensor) -> Bump:
    gamma, slope = (math.pi * t).sin() ** 2, math.pi * (2 * math.pi * t).sin()
    return gamma, slope, gamma * slope


def _sigmoid(t: Tensor) -> Bump:
    rise, fall = (10 * t - 4).sigmoid(), (10 * t - 6).sigmoid()
    at_ends = 1 / (1 + math.exp(4)) - 1 / (1 + math.exp(6))
    gamma, slope = rise - fall - at_ends, 10 * (rise * (1 - rise) - fall * (1 - fall))
    return gamma, slope, gamma * slope


GAMMAS: dict[str, Callable[[Tensor], Bump]] = {
    "zero": _zero,
    "brownian": _brownian,
    "quadratic": _quadratic,
    "sin2": _sin2,
    "sigmoid": _sigmoid,
}


def _falling(t: Tensor) -> Bump:
    return 1 - t, -torch.ones_like(t), t - 1


def _cosine(t: Tensor) -> Bump:
    gamma, slope = (HALF_PI * t).cos(), -HALF_PI * (HALF_PI * t).sin()
    return gamma, slope, gamma * slope


OWN_GAMMAS = {"one_sided_linear": _falling, "one_sided_trig": _cosine}


# ------------------------------------------------------------------------------------------------
# Paths


def _linear(t: Tensor, bump: Bump) -> Coefficients:
    one = torch.ones_like(t)
    return Coefficients(1 - t, -one, t, one, *bump)


def _trig(t: Tensor, bump: Bump) -> Coefficients:
    gamma, _, product = bump
    cosine, sine = (HALF_PI * t).cos(), (HALF_PI * t).sin()
    r = (1 - gamma**2).clamp(min=1e-12).sqrt()  # 0 where gamma = 1
    d_r = -product / r
    return Coefficients(
        r * cosine,
        d_r * cosine - HALF_PI * r * sine,
        r * sine,
        d_r * sine + HALF_PI * r * cosine,
        *bump,
    )


def _encdec(t: Tensor, bump: Bump) -> Coefficients:
    value, slope = (math.pi * t).cos() ** 2, -math.pi * (2 * math.pi * t).sin()
    first = (t < 0.5).to(t.dtype)
    return Coefficients(
        first * value, first * slope, (1 - first) * value, (1 - first) * slope, *bump
    )


def _mirror(t: Tensor, bump: Bump) -> Coefficients:
    zero = torch.zeros_like(t)
    return Coefficients(zero, zero, zero + 1, zero, *bump)


def _one_sided_linear(t: Tensor, bump: Bump) -> Coefficients:
    zero = torch.zeros_like(t)
    return Coefficients(zero, zero, t, zero + 1, *bump)


def _one_sided_trig(t: Tensor, bump: Bump) -> Coefficients:
    zero = torch.zeros_like(t)
    return Coefficients(zero, zero, (HALF_PI * t).sin(), HALF_PI * (HALF_PI * t).cos(), *bump)


PATHS: dict[str, Callable[[Tensor, Bump], Coefficients]] = {
    "linear": _linear,
    "trig": _trig,
    "encdec": _encdec,
    "mirror": _mirror,
    "one_sided_linear": _one_sided_linear,
    "one_sided_trig": _one_sided_trig,
}
HEADS = ("b", "v", "eta", "s", "denoiser")  # what may be learned of a path


class Interpolation(NamedTuple):
    """A path of the module's table.

    Attributes:
        name: out of PATHS. gamma: out of GAMMAS; zero where one-sided.
        a: factor on gamma^2.
    """

    name: str = "one_sided_linear"
    gamma: str = "zero"
    a: float = 1.0

    @property
    def one_sided(self) -> bool:
        """Whether the source is the path's own noise."""
        return self.name in OWN_GAMMAS

    @property
    def noisy(self) -> bool:
        """Whether gamma is not 0, so that there is a z."""
        return self.one_sided or self.gamma != "zero"

    def at(self, t: Tensor) -> Coefficients:
        """Return the coefficients at times t, of any shape."""
        gamma, slope, product = (OWN_GAMMAS.get(self.name) or GAMMAS[self.gamma])(t)
        root = math.sqrt(self.a)
        return PATHS[self.name](t, (root * gamma, root * slope, self.a * product))

    def time_of(self, sigma: Tensor) -> Tensor:
        """Return the time at which a one-sided path has gamma / beta = sigma, like sigma."""
        return 1 / (1 + sigma) if self.name == "one_sided_linear" else (1 / sigma).atan() / HALF_PI

    def learnable(self, heads: Sequence[str]) -> bool:
        """Return whether b, at least, follows from these of HEADS."""
        if self.one_sided:
            return tuple(heads) in (("b",), ("eta",), ("s",), ("denoiser",))
        if self.name == "mirror":
            return self.noisy and tuple(heads) in (("eta",), ("s",))
        pairs = {frozenset((velocity, other)) for velocity in "bv" for other in ("eta", "s")}
        return tuple(heads) == ("b",) or (self.noisy and frozenset(heads) in pairs)

    def targets(self, c: Coefficients, x0: Tensor, x1: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Return what each of HEADS is the mean of, given x_t = alpha x0 + beta x1 + gamma z."""
        v = c.d_alpha * x0 + c.d_beta * x1
        return {
            "b": v + c.d_gamma * z if self.noisy else v,
            "v": v,
            "eta": z,
            "s": -z / c.gamma,
            "denoiser": x1,
        }

    def eta(self, c: Coefficients, x: Tensor, known: Mapping[str, Tensor]) -> Tensor | None:
        """Return E[z | x_t] from what is known of the fields, or None where that does not say."""
        if "eta" in known:
            return known["eta"]
        if "s" in known:
            return -c.gamma * known["s"]
        if not self.one_sided:
            return None
        if "denoiser" in known:
            return (x - c.beta * known["denoiser"]) / c.gamma
        return (c.d_beta * x - c.beta * known["b"]) / _wronskian(c)

    def velocity(self, c: Coefficients, x: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """Return b from what is known of the fields."""
        if "b" in known:
            return known["b"]
        if self.one_sided:
            eta = self.eta(c, x, known)
            return (c.d_beta * x - _wronskian(c) * eta) / c.beta
        v = known.get("v", 0.0)
        if "s" in known:
            return v - c.gamma_d_gamma * known["s"]
        return v + c.d_gamma * known["eta"]

    def score(self, c: Coefficients, x: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """Return s from what is known of the fields."""
        return known["s"] if "s" in known else -self.eta(c, x, known) / c.gamma

    def mean(self, c: Coefficients, x: Tensor, known: Mapping[str, Tensor]) -> Tensor | None:
        """Return E[x_1 | x_t] from what is known, after t = 1/2; None where that does not say.

        By alpha E[x_0] + beta E[x_1] = x - gamma eta and alpha' E[x_0] + beta' E[x_1] = v.
        """
        if "denoiser" in known:
            return known["denoiser"]
        if self.one_sided and "b" in known:
            return (c.gamma * known["b"] - c.d_gamma * x) / _wronskian(c)
        eta = self.eta(c, x, known) if self.noisy else 0.0
        if eta is None:
            return None
        rest = x - c.gamma * eta
        if self.one_sided or self.name in ("encdec", "mirror"):
            return rest / c.beta
        v = known["v"] if "v" in known else known["b"] - (c.d_gamma * eta if self.noisy else 0.0)
        return (c.alpha * v - c.d_alpha * rest) / (c.alpha * c.d_beta - c.d_alpha * c.beta)


def _wronskian(c: Coefficients) -> Tensor | float:
    """Return W = beta' gamma - beta gamma' of a one-sided path, > 0."""
    return c.d_beta * c.gamma - c.beta * c.d_gamma


# ------------------------------------------------------------------------------------------------
# eps(t) of the SDE, up to its factor

DIFFUSIONS: dict[str, Callable[[float, Coefficients], float]] = {
    "constant": lambda t, c: 1.0,
    "gamma": lambda t, c: float(c.gamma),
    "linear": lambda t, c: 1 - t,
    "sin2": lambda t, c: math.sin(math.pi * t) ** 2,
    "decreasing": lambda t, c: (math.cos(math.pi * t) + 1) ** 2 / 4,
    # gamma W / beta: of a one-sided path that which makes the bound on the error smallest.
    "sbdm": lambda t, c: float(c.gamma * _wronskian(c) / c.beta),
}


# ------------------------------------------------------------------------------------------------
# Samplers

GRIDS = ("uniform", "cosine", "edm")
SAMPLERS = ("euler", "heun", "midpoint", "rk4", "sde", "sde_heun")


def time_grid(
    steps: int, grid: str, low: float, high: float, path: Interpolation, last: float = 0.0
) -> list[float]:
    """Return times from low to 1, (steps + 1,); the last but one is at most `high`.

    Args:
        steps: how many, >= 1.
        grid: uniform; cosine, denser at both ends; edm: its noise levels between those of low and
            high, of a one-sided path.
        low, high: where the fields are known, 0 <= low < high <= 1.
        path: of which edm's noise levels are.
        last: length of the last step; 0: as the grid has it, or from `high` on.
    """
    if grid == "uniform" and not last:
        high = min(high, low + (1 - low) * (steps - 1) / steps)
    high = max(low, min(high, 1 - last))
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    if grid == "edm" and low < high:
        c = path.at(torch.tensor([low, high], dtype=torch.float64))
        most, least = (c.gamma / c.beta).tolist()
        return [*path.time_of(karras_sigmas(steps, least, most)[:-1]).tolist(), 1.0]
    if grid == "cosine":
        ramp = (1 - (math.pi * ramp).cos()) / 2
    return [*(low + (high - low) * ramp).tolist(), 1.0]


@torch.no_grad()
def sample_path(
    path: Interpolation,
    known: Callable[[Tensor, float], Mapping[str, Tensor]],
    x: Tensor,
    times: Sequence[float],
    *,
    sampler: str = "heun",
    eps: Callable[[float, Coefficients], float] | None = None,
    seeds: Tensor | None = None,
    callback: Callback = None,
) -> Tensor:
    """Return x at the last time; a step to t = 1 goes to the mean E[x_1 | x_t] (none: by Euler).

    Args:
        path: whose fields they are.
        known: callable (x, t) -> {name: field like x}, some of HEADS that the path can be learned
            by; sde and sde_heun need eta or s to follow from them.
        x: state at times[0], (B, C, H, W); its dtype is kept.
        times: (steps + 1,), increasing; or decreasing, of an ODE.
        sampler: an ODE's euler, heun, midpoint or rk4; sde (Euler and Maruyama), sde_heun.
        eps: callable (t, coefficients) -> eps >= 0 of the SDE.
        seeds: int64 (B,), of the SDE's noise.
        callback: called as callback(i, x) after each step.
    """
    random = sampler.startswith("sde")

    def strength(t: float) -> float:
        return eps(t, path.at(torch.tensor(t, dtype=torch.float64)).numbers())

    def slope(x: Tensor, t: float) -> Tensor:
        c, fields = path.at(torch.tensor(t, dtype=torch.float64)).numbers(), known(x, t)
        drift = path.velocity(c, x, fields)
        if random:
            drift = drift + eps(t, c) * path.score(c, x, fields)
        return drift

    to_data = times[-1] == 1
    for i, (t, end) in enumerate(itertools.pairwise(times[:-1] if to_data else times)):
        h, noise = end - t, 0.0
        if random:
            both = strength(t) if sampler == "sde" else (strength(t) + strength(end)) / 2
            noise = philox_normal(
                x.shape[1:], seeds, i, stream=int(Stream.SAMPLER), device=x.device
            ).to(x.dtype) * math.sqrt(2 * both * h)
        k = slope(x, t)
        if sampler in ("heun", "sde_heun"):
            k = (k + slope(x + h * k + noise, end)) / 2
        elif sampler == "midpoint":
            k = slope(x + h / 2 * k, t + h / 2)
        elif sampler == "rk4":
            k2 = slope(x + h / 2 * k, t + h / 2)
            k3 = slope(x + h / 2 * k2, t + h / 2)
            k = (k + 2 * k2 + 2 * k3 + slope(x + h * k3, end)) / 6
        x = x + h * k + noise
        if callback:
            callback(i, x)
    if not to_data:
        return x
    t = times[-2]
    c, fields = path.at(torch.tensor(t, dtype=torch.float64)).numbers(), known(x, t)
    mean = path.mean(c, x, fields)
    x = x + (1 - t) * path.velocity(c, x, fields) if mean is None else mean.to(x.dtype)
    if callback:
        callback(len(times) - 2, x)
    return x
