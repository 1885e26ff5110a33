"""Noise laws: how a picture x becomes a noisy y, and how the score of y gives x back.

Scale: x and y are pictures on [0, 1], y unclipped. s = d/dy log p(y), pixel by pixel. A level is a
float, or a tensor that broadcasts against y (all but sample, check and from_state_std).

With p(y|eta) = h(y) exp(eta T(y) - A(eta)), any prior gives E[eta|y] T'(y) = s - d/dy log h(y). So
each estimate below is the posterior mean of the law's natural parameter, mapped back to x: a power
mean of x given y, the posterior mean itself for Gaussian noise only, else a little less (Jensen).

Reference: Kim and Ye 2021, Noise2Score, arXiv 2106.07009 (Gaussian, Poisson, Gamma); the others
follow from the identity above.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from genmodels.config import check

FLOOR = 1 / 1020  # a quarter of a grey level: where the logarithm of a black pixel is taken
SPREAD = 8  # no estimate lies more than so many standard deviations of the noise above its pixel


@dataclass(frozen=True)
class State:
    """A domain w of the pixels in which the noise of a law has nearly the same size everywhere."""

    forward: Callable  # (y, level) -> w
    inverse: Callable  # (w, level) -> y
    slopes: Callable  # (w, level) -> (dy/dw, d/dw log dy/dw)


@dataclass(frozen=True)
class Law:
    """A noise law; LAWS has them by name.

    Attributes:
        unit: what its level is, in one line.
        low, high: the accepted levels, inclusive.
        sample: (x, level, rng) -> y: numpy float64 in and out, rng a numpy Generator.
        formula: (y, s, level) -> x, without guards.
        state: the domain w.
        state_std: level -> standard deviation of the noise in w.
        from_state_std: its inverse, float -> float.
        second: (y, s, ds, level) -> x, nearer to the posterior mean, ds = ds_i/dy_i; or None.
        positive: whether no pixel lies below 0; one that does counts as 0.
        normal: whether the noise in w is exactly Gaussian.
    """

    unit: str
    low: float
    high: float
    sample: Callable
    formula: Callable
    state: State
    state_std: Callable
    from_state_std: Callable
    second: Callable | None = None
    positive: bool = True
    normal: bool = False

    def check(self, level):
        """Return the level as a float.

        Raises:
            ValueError: not a number within low..high.
        """
        try:
            number = float(level)
        except (TypeError, ValueError):
            number = math.nan
        if not self.low <= number <= self.high:
            raise ValueError(
                f"level={level}: must be {self.low:g} to {self.high:g} ({self.unit})"
                if self.low < self.high
                else f"level={level}: must be {self.low:g} ({self.unit})"
            )
        return number

    def estimate(self, y, s, level):
        """Return the estimate of x, unclipped, where y has the score s."""
        return self._guarded(self.formula, y, s, level)

    @property
    def corrected(self):
        """(y, s, ds, level) -> x with the second-order correction, or None where none is known.

        ds = ds_i/dy_i is the diagonal of the score's Jacobian.
        """
        if self.second is None:
            return None
        return lambda y, s, ds, level: self._guarded(self.second, y, s, level, ds)

    def _guarded(self, formula, y, s, level, *ds):
        """A bad score can ask for any x, even infinite: none may leave y by more than SPREAD."""
        if not self.positive:
            return formula(y, s, *ds, level)
        level = torch.as_tensor(level, dtype=y.dtype, device=y.device)
        y = y.clamp(min=0)
        most = self.from_state(self.to_state(y, level) + SPREAD * self.state_std(level), level)
        return torch.minimum(formula(y, s, *ds, level), most)

    def to_state(self, y, level):
        """Return w of the pixels y."""
        return self.state.forward(y, level)

    def from_state(self, w, level):
        """Return the pixels y of w."""
        return self.state.inverse(w, level)

    def score(self, w, s_w, level):
        """Return the score of y from s_w, that of w: densities change by p_w(w) = p_y(y) dy/dw."""
        slope, change = self.state.slopes(w, level)
        return (s_w - change) / slope


def _trigamma(k):
    """Return the variance of the logarithm of a Gamma variable of shape k."""
    value = torch.polygamma(1, torch.as_tensor(k, dtype=torch.float64))
    return value.to(k.dtype) if isinstance(k, torch.Tensor) else float(value)


def inverse_trigamma(value):
    """Return k with trigamma(k) = value > 0, by Newton's method on 1/trigamma, nearly straight."""
    k = torch.tensor(0.5 + 1 / value, dtype=torch.float64)
    for _ in range(30):
        now = torch.polygamma(1, k)
        k = k + now * (1 - now / value) / torch.polygamma(2, k)
    return float(k)


# The state domains. Root: Anscombe 1948. y at or below 0 has no logarithm or inverse: it is FLOOR.
PLAIN = State(
    lambda y, level: y,
    lambda w, level: w,
    lambda w, level: (torch.ones_like(w), torch.zeros_like(w)),
)


def _root_slopes(w, zeta):
    """y = w^2 - 3 zeta / 8; below the root of a black pixel the slopes are those of black."""
    w = torch.maximum(w, torch.as_tensor(3 * zeta / 8, dtype=w.dtype, device=w.device).sqrt())
    return 2 * w, 1 / w


ROOT = State(
    lambda y, zeta: (y.clamp(min=0) + 3 * zeta / 8).sqrt(),
    lambda w, zeta: w.clamp(min=0).square() - 3 * zeta / 8,
    _root_slopes,
)
LOG = State(
    lambda y, level: y.clamp(min=FLOOR).log(),
    lambda w, level: w.exp(),
    lambda w, level: (w.exp(), torch.ones_like(w)),
)
INVERSE_ROOT = State(
    lambda y, level: -2 * y.clamp(min=FLOOR).rsqrt(),
    lambda w, level: 4 / w.clamp(max=0).square(),  # infinite at and above w = 0
    lambda w, level: (8 / w.abs() ** 3, 3 / w.abs()),
)


def _gaussian(y, s, sigma):
    """Return the posterior mean y + sigma^2 s."""
    return y + (sigma / 255) ** 2 * s


def _poisson(y, s, zeta):
    """Return the geometric posterior mean zeta exp(psi(y/zeta + 1) + zeta s).

    The paper has (y + zeta/2) exp(zeta s): exp(psi(n + 1)) is about n + 1/2 + 1/(24 (n + 1/2)).
    """
    return zeta * (torch.digamma(y / zeta + 1) + zeta * s).exp()


def _poisson_second(y, s, ds, zeta):
    """Return (y + zeta) p(y + zeta)/p(y), Robbins 1956, the exact mean, by the midpoint rule."""
    return (y + zeta) * (zeta * (s + zeta / 2 * ds)).exp()


def _gamma(y, ys, k):
    """Return the harmonic posterior mean k y / ((k - 1) - y s)."""
    return k * y / ((k - 1) - ys).clamp(min=1e-9)


def _gamma_second(y, s, ds, k):
    """Return x + Var[1/x] x^3, x the harmonic mean: E[x] to second order in 1/x.

    With h = (k - 1)/y - s, E[1/x] = h/k and Var[1/x] = -h'/k^2.
    """
    x = _gamma(y, y * s, k)
    relative = ((k - 1 + y.square() * ds) / k**2).clamp(min=0) * (x / y.clamp(min=1e-9)).square()
    return x * (1 + relative)


def _nakagami(y, s, m):
    """Return the root of Omega = 2 m y^2 / ((2m - 1) - y s): y^2 is Gamma noise of shape m."""
    return _gamma(y.square(), (y * s - 1) / 2, m).sqrt()


def _inverse_gaussian(y, s, shape):
    """Return the posterior power mean of order -2, y (1 - (3 y + 2 y^2 s)/lambda)^(-1/2)."""
    return y * (1 - (3 * y + 2 * y.square() * s) / shape).clamp(min=1e-9).rsqrt()


def _wald(x, shape, rng):
    """Return inverse Gaussian noise of mean x; black stays black."""
    return np.where(x > 0, rng.wald(np.maximum(x, 1e-9), shape), 0.0)


def tweedie(y, s, phi, rho):
    """Return the posterior power mean of order 1 - rho under noise of variance phi x^rho.

    alpha = phi y^(rho-1) (rho/(2y) + s) and x = y (1 + (1-rho) alpha)^(1/(1-rho)); y exp(alpha) at
    rho = 1. By the saddle-point density: exact for Gaussian (rho 0, phi sigma^2), Gamma (2, 1/k)
    and inverse Gaussian (3, 1/lambda), near Poisson (1, zeta) and compound Poisson (1 to 2).

    Args:
        y, s: pixels and their score; y > 0 unless rho is 0.
        phi: dispersion > 0, on the scale of y (not of 0..255).
        rho: power >= 0.

    Reference: Kim, Kwon and Ye 2022, arXiv 2112.03696.
    """
    if rho == 0:
        return y + phi * s
    y, c = y.clamp(min=1e-9), 1 - rho
    alpha = phi * y ** (rho - 1) * (rho / (2 * y) + s)
    if abs(c) < 1e-6:
        return y * alpha.clamp(max=SPREAD).exp()
    return y * (1 + c * alpha).clamp(min=1e-9) ** (1 / c)


LAWS = {
    "gaussian": Law(
        "standard deviation sigma on 0..255",
        0.1,
        255,
        lambda x, sigma, rng: x + sigma / 255 * rng.standard_normal(x.shape),
        _gaussian,
        PLAIN,
        lambda sigma: sigma / 255,
        lambda std: 255 * std,
        positive=False,
        normal=True,
    ),
    "poisson": Law(
        "zeta, the brightness of one count on 0..1",
        1e-4,
        1,
        lambda x, zeta, rng: rng.poisson(x / zeta) * zeta,
        _poisson,
        ROOT,
        lambda zeta: zeta**0.5 / 2,
        lambda std: 4 * std**2,
        _poisson_second,
    ),
    "gamma": Law(
        "shape k of the factor of mean 1 and variance 1/k",
        1,
        1e4,
        lambda x, k, rng: x * rng.gamma(k, 1 / k, x.shape),
        lambda y, s, k: _gamma(y, y * s, k),
        LOG,
        lambda k: _trigamma(k) ** 0.5,
        lambda std: inverse_trigamma(std**2),
        _gamma_second,
    ),
    "exponential": Law(
        "1: the factor is exponential of mean 1",
        1,
        1,
        lambda x, one, rng: x * rng.exponential(1.0, x.shape),
        lambda y, s, one: _gamma(y, y * s, 1),  # = -1/s
        LOG,
        lambda one: math.pi / 6**0.5,
        lambda std: 1.0,
    ),
    "inverse_gaussian": Law(
        "shape lambda: mean x, variance x^3/lambda",
        0.1,
        1e4,
        _wald,
        _inverse_gaussian,
        INVERSE_ROOT,
        lambda shape: shape**-0.5,
        lambda std: std**-2,
    ),
    "rayleigh": Law(
        "1: x is the scale parameter",
        1,
        1,
        lambda x, one, rng: x * rng.rayleigh(1.0, x.shape),
        lambda y, s, one: _nakagami(y, s, 1) / 2**0.5,  # = (y^2 / (1 - y s))^(1/2)
        LOG,
        lambda one: math.pi / 24**0.5,
        lambda std: 1.0,
    ),
    "nakagami": Law(
        "shape m; x is the root mean square",
        0.5,
        1e4,
        lambda x, m, rng: x * np.sqrt(rng.gamma(m, 1 / m, x.shape)),
        _nakagami,
        LOG,
        lambda m: _trigamma(m) ** 0.5 / 2,
        lambda std: inverse_trigamma(4 * std**2),
    ),
    "lognormal": Law(
        "standard deviation of the logarithm of the factor",
        1e-3,
        2,
        lambda x, std, rng: x * np.exp(std * rng.standard_normal(x.shape)),
        lambda y, s, std: y * (std**2 * (1 + y * s)).exp(),  # geometric posterior mean
        LOG,
        lambda std: std,
        lambda std: std,
        normal=True,
    ),
}


def told_law(noise):
    """Return the Law of a NoiseConfig.

    Raises:
        ValueError: an unknown law, or levels that it does not accept.
    """
    check(noise.law in LAWS, "data.noise.law", noise.law, f"choose from {', '.join(LAWS)}")
    law = LAWS[noise.law]
    for key in ("level", "level_max"):
        try:
            law.check(getattr(noise, key) or law.low)  # 0: estimated, or none
        except ValueError as error:
            raise ValueError(f"data.noise.{error}".replace(".level", f".{key}", 1)) from None
    return law
