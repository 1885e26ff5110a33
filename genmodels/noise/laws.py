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

from genmodels.config import NoiseConfig, check

Level = float | torch.Tensor

FLOOR = 1 / 1020  # a quarter of a grey level: where the logarithm of a black pixel is taken
SPREAD = 8  # no estimate lies more than so many standard deviations of the noise above its pixel


@dataclass(frozen=True, kw_only=True)
class State:
    """A domain w of the pixels in which the noise of a law has nearly the same size everywhere."""

    forward: Callable[[torch.Tensor, Level], torch.Tensor]  # (y, level) -> w
    inverse: Callable[[torch.Tensor, Level], torch.Tensor]  # (w, level) -> y
    # (w, level) -> (dy/dw, d/dw log dy/dw)
    slopes: Callable[[torch.Tensor, Level], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Law:
    """A noise law; LAWS has them by name, and a row there is all that a new one takes.

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
        mean_log: level -> E log(y / x) of noise that multiplies; None: of other noise.
        split: (y, level, share, rng) -> (y1, its level): y1 is under more noise of the law, and
            independent, given x, of y2 = (y - (1 - share) y1) / share; numpy as for sample. None:
            no such split is known.
    """

    unit: str
    low: float
    high: float
    sample: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    formula: Callable[[torch.Tensor, torch.Tensor, Level], torch.Tensor]
    state: State
    state_std: Callable[[Level], Level]
    from_state_std: Callable[[float], float]
    second: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Level], torch.Tensor] | None = None
    positive: bool = True
    normal: bool = False
    mean_log: Callable[[float], float] | None = None
    split: (
        Callable[[np.ndarray, float, float, np.random.Generator], tuple[np.ndarray, float]] | None
    ) = None

    def check(self, level: float | str) -> float:
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

    def estimate(self, y: torch.Tensor, s: torch.Tensor, level: Level) -> torch.Tensor:
        """Return the estimate of x, unclipped, where y has the score s."""
        return self._guarded(self.formula, y, s, level)

    @property
    def corrected(self) -> Callable[..., torch.Tensor] | None:
        """(y, s, ds, level) -> x with the second-order correction, or None where none is known.

        ds = ds_i/dy_i is the diagonal of the score's Jacobian.
        """
        if self.second is None:
            return None
        return lambda y, s, ds, level: self._guarded(self.second, y, s, level, ds)

    def _guarded(
        self,
        formula: Callable[..., torch.Tensor],
        y: torch.Tensor,
        s: torch.Tensor,
        level: Level,
        *ds: torch.Tensor,
    ) -> torch.Tensor:
        """A bad score can ask for any x, even infinite: none may leave y by more than SPREAD."""
        if not self.positive:
            return formula(y, s, *ds, level)
        level = torch.as_tensor(level, dtype=y.dtype, device=y.device)
        y = y.clamp(min=0)
        most = self.from_state(self.to_state(y, level) + SPREAD * self.state_std(level), level)
        return torch.minimum(formula(y, s, *ds, level), most)

    def to_state(self, y: torch.Tensor, level: Level) -> torch.Tensor:
        """Return w of the pixels y."""
        return self.state.forward(y, level)

    def from_state(self, w: torch.Tensor, level: Level) -> torch.Tensor:
        """Return the pixels y of w."""
        return self.state.inverse(w, level)

    def score(self, w: torch.Tensor, s_w: torch.Tensor, level: Level) -> torch.Tensor:
        """Return the score of y from s_w, that of w: densities change by p_w(w) = p_y(y) dy/dw."""
        slope, change = self.state.slopes(w, level)
        return (s_w - change) / slope


def _trigamma(k: Level) -> Level:
    """Return the variance of the logarithm of a Gamma variable of shape k."""
    value = torch.polygamma(1, torch.as_tensor(k, dtype=torch.float64))
    return value.to(k.dtype) if isinstance(k, torch.Tensor) else float(value)


def _mean_log_gamma(k: float) -> float:
    """Return E log g = psi(k) - log k of a Gamma variable g of shape k and mean 1."""
    return float(torch.digamma(torch.tensor(k, dtype=torch.float64))) - math.log(k)


def inverse_trigamma(value: float) -> float:
    """Return k with trigamma(k) = value > 0, by Newton's method on 1/trigamma, nearly straight."""
    k = torch.tensor(0.5 + 1 / value, dtype=torch.float64)
    for _ in range(30):
        now = torch.polygamma(1, k)
        k = k + now * (1 - now / value) / torch.polygamma(2, k)
    return float(k)


# The state domains. y at or below 0 has no logarithm or inverse: it is FLOOR.


def _plain_slopes(w: torch.Tensor, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
    """y = w."""
    return torch.ones_like(w), torch.zeros_like(w)


def _root(y: torch.Tensor, zeta: Level) -> torch.Tensor:
    """Return w = (y + 3 zeta / 8)^(1/2). Reference: Anscombe 1948."""
    return (y.clamp(min=0) + 3 * zeta / 8).sqrt()


def _from_root(w: torch.Tensor, zeta: Level) -> torch.Tensor:
    """Return y = w^2 - 3 zeta / 8."""
    return w.clamp(min=0).square() - 3 * zeta / 8


def _root_slopes(w: torch.Tensor, zeta: Level) -> tuple[torch.Tensor, torch.Tensor]:
    """y = w^2 - 3 zeta / 8; below the root of a black pixel the slopes are those of black."""
    w = torch.maximum(w, torch.as_tensor(3 * zeta / 8, dtype=w.dtype, device=w.device).sqrt())
    return 2 * w, 1 / w


def _log_slopes(w: torch.Tensor, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
    """y = exp(w)."""
    return w.exp(), torch.ones_like(w)


def _inverse_root(y: torch.Tensor, level: Level) -> torch.Tensor:
    """Return w = -2 y^(-1/2), which rises with y."""
    return -2 * y.clamp(min=FLOOR).rsqrt()


def _from_inverse_root(w: torch.Tensor, level: Level) -> torch.Tensor:
    """Return y = 4 / w^2, infinite at and above w = 0."""
    return 4 / w.clamp(max=0).square()


def _inverse_root_slopes(w: torch.Tensor, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
    """y = 4 / w^2 with w < 0."""
    return 8 / w.abs() ** 3, 3 / w.abs()


PLAIN = State(forward=lambda y, level: y, inverse=lambda w, level: w, slopes=_plain_slopes)
ROOT = State(forward=_root, inverse=_from_root, slopes=_root_slopes)
LOG = State(
    forward=lambda y, level: y.clamp(min=FLOOR).log(),
    inverse=lambda w, level: w.exp(),
    slopes=_log_slopes,
)
INVERSE_ROOT = State(forward=_inverse_root, inverse=_from_inverse_root, slopes=_inverse_root_slopes)


# Each law: its noise, the estimate by the identity above, and a second-order one where known.
# Reference for the estimates of the first three: Kim and Ye 2021, arXiv 2106.07009.


def _add_gaussian(x: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Return y = x + sigma/255 z, z standard normal."""
    return x + sigma / 255 * rng.standard_normal(x.shape)


def _gaussian_estimate(y: torch.Tensor, s: torch.Tensor, sigma: Level) -> torch.Tensor:
    """Return the posterior mean y + sigma^2 s."""
    return y + (sigma / 255) ** 2 * s


def _count_poisson(x: np.ndarray, zeta: float, rng: np.random.Generator) -> np.ndarray:
    """Return y = zeta n, n a Poisson count of mean x / zeta."""
    return rng.poisson(x / zeta) * zeta


def _poisson_estimate(y: torch.Tensor, s: torch.Tensor, zeta: Level) -> torch.Tensor:
    """Return the geometric posterior mean zeta exp(psi(y/zeta + 1) + zeta s).

    The paper has (y + zeta/2) exp(zeta s): exp(psi(n + 1)) is about n + 1/2 + 1/(24 (n + 1/2)).
    """
    return zeta * (torch.digamma(y / zeta + 1) + zeta * s).exp()


def _poisson_second(
    y: torch.Tensor, s: torch.Tensor, ds: torch.Tensor, zeta: Level
) -> torch.Tensor:
    """Return (y + zeta) p(y + zeta)/p(y), Robbins 1956, the exact mean, by the midpoint rule."""
    return (y + zeta) * (zeta * (s + zeta / 2 * ds)).exp()


def _times_gamma(x: np.ndarray, k: float, rng: np.random.Generator) -> np.ndarray:
    """Return y = x g, g a Gamma variable of shape k and mean 1."""
    return x * rng.gamma(k, 1 / k, x.shape)


def _harmonic_mean(y: torch.Tensor, ys: torch.Tensor, k: Level) -> torch.Tensor:
    """Return the harmonic posterior mean k y / ((k - 1) - y s) under Gamma noise; ys = y s."""
    return k * y / ((k - 1) - ys).clamp(min=1e-9)


def _gamma_estimate(y: torch.Tensor, s: torch.Tensor, k: Level) -> torch.Tensor:
    """Return the harmonic posterior mean k y / ((k - 1) - y s)."""
    return _harmonic_mean(y, y * s, k)


def _gamma_second(y: torch.Tensor, s: torch.Tensor, ds: torch.Tensor, k: Level) -> torch.Tensor:
    """Return x + Var[1/x] x^3, x the harmonic mean: E[x] to second order in 1/x.

    With h = (k - 1)/y - s, E[1/x] = h/k and Var[1/x] = -h'/k^2.
    """
    x = _gamma_estimate(y, s, k)
    relative = ((k - 1 + y.square() * ds) / k**2).clamp(min=0) * (x / y.clamp(min=1e-9)).square()
    return x * (1 + relative)


def _times_exponential(x: np.ndarray, one: float, rng: np.random.Generator) -> np.ndarray:
    """Return y = x e, e an exponential variable of mean 1: Gamma noise of shape 1."""
    return x * rng.exponential(1.0, x.shape)


def _exponential_estimate(y: torch.Tensor, s: torch.Tensor, one: Level) -> torch.Tensor:
    """Return the harmonic posterior mean -1/s, that of Gamma noise of shape 1."""
    return _gamma_estimate(y, s, 1)


def _draw_inverse_gaussian(x: np.ndarray, shape: float, rng: np.random.Generator) -> np.ndarray:
    """Return y, inverse Gaussian of mean x and this shape; black stays black."""
    return np.where(x > 0, rng.wald(np.maximum(x, 1e-9), shape), 0.0)


def _inverse_gaussian_estimate(y: torch.Tensor, s: torch.Tensor, shape: Level) -> torch.Tensor:
    """Return the posterior power mean of order -2, y (1 - (3 y + 2 y^2 s)/lambda)^(-1/2)."""
    return y * (1 - (3 * y + 2 * y.square() * s) / shape).clamp(min=1e-9).rsqrt()


def _times_rayleigh(x: np.ndarray, one: float, rng: np.random.Generator) -> np.ndarray:
    """Return y = x r, r a Rayleigh variable of scale 1: y^2/2 is exponential of mean x^2."""
    return x * rng.rayleigh(1.0, x.shape)


def _rayleigh_estimate(y: torch.Tensor, s: torch.Tensor, one: Level) -> torch.Tensor:
    """Return (y^2 / (1 - y s))^(1/2): Nakagami noise of shape 1, whose Omega is 2 x^2."""
    return _nakagami_estimate(y, s, 1) / 2**0.5


def _times_nakagami(x: np.ndarray, m: float, rng: np.random.Generator) -> np.ndarray:
    """Return y = x g^(1/2), g a Gamma variable of shape m and mean 1."""
    return x * np.sqrt(rng.gamma(m, 1 / m, x.shape))


def _nakagami_estimate(y: torch.Tensor, s: torch.Tensor, m: Level) -> torch.Tensor:
    """Return the root of Omega = 2 m y^2 / ((2m - 1) - y s): y^2 is Gamma noise of shape m."""
    return _harmonic_mean(y.square(), (y * s - 1) / 2, m).sqrt()


def _times_lognormal(x: np.ndarray, std: float, rng: np.random.Generator) -> np.ndarray:
    """Return y = x exp(std z), z standard normal."""
    return x * np.exp(std * rng.standard_normal(x.shape))


def _lognormal_estimate(y: torch.Tensor, s: torch.Tensor, std: Level) -> torch.Tensor:
    """Return the geometric posterior mean y exp(std^2 (1 + y s))."""
    return y * (std**2 * (1 + y * s)).exp()


# Splits into two noisy pictures. Reference: Monroy, Bacca and Tachella 2025, arXiv 2412.04648.


def _split_gaussian(
    y: np.ndarray, sigma: float, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Return y + sqrt(share / (1 - share)) sigma/255 z, z standard normal; see Law.split."""
    more = (share / (1 - share)) ** 0.5 * sigma / 255
    return y + more * rng.standard_normal(y.shape), sigma / (1 - share) ** 0.5


def _split_poisson(
    y: np.ndarray, zeta: float, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Return counts of which each is left out with this probability, by the share that stays."""
    counts = np.rint(y / zeta).clip(0).astype(np.int64)
    kept = counts - rng.binomial(counts, share)
    return kept * (zeta / (1 - share)), zeta / (1 - share)


def _split_gamma(
    y: np.ndarray, k: float, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Return y (1 - b) / (1 - share), b a Beta variable of shapes k share and k (1 - share)."""
    part = rng.beta(k * share, k * (1 - share), y.shape)
    return y * (1 - part) / (1 - share), k * (1 - share)


LAWS = {
    "gaussian": Law(
        unit="standard deviation sigma on 0..255",
        low=0.1,
        high=255,
        sample=_add_gaussian,
        formula=_gaussian_estimate,
        state=PLAIN,
        state_std=lambda sigma: sigma / 255,
        from_state_std=lambda std: 255 * std,
        positive=False,
        normal=True,
        split=_split_gaussian,
    ),
    "poisson": Law(
        unit="zeta, the brightness of one count on 0..1",
        low=1e-4,
        high=1,
        sample=_count_poisson,
        formula=_poisson_estimate,
        second=_poisson_second,
        state=ROOT,
        state_std=lambda zeta: zeta**0.5 / 2,
        from_state_std=lambda std: 4 * std**2,
        split=_split_poisson,
    ),
    "gamma": Law(
        unit="shape k of the factor of mean 1 and variance 1/k",
        low=1,
        high=1e4,
        sample=_times_gamma,
        formula=_gamma_estimate,
        second=_gamma_second,
        state=LOG,
        state_std=lambda k: _trigamma(k) ** 0.5,
        from_state_std=lambda std: inverse_trigamma(std**2),
        mean_log=_mean_log_gamma,
        split=_split_gamma,
    ),
    "exponential": Law(
        unit="1: the factor is exponential of mean 1",
        low=1,
        high=1,
        sample=_times_exponential,
        formula=_exponential_estimate,
        state=LOG,
        state_std=lambda one: math.pi / 6**0.5,
        from_state_std=lambda std: 1.0,
        mean_log=lambda one: _mean_log_gamma(1.0),
    ),
    "inverse_gaussian": Law(
        unit="shape lambda: mean x, variance x^3/lambda",
        low=0.1,
        high=1e4,
        sample=_draw_inverse_gaussian,
        formula=_inverse_gaussian_estimate,
        state=INVERSE_ROOT,
        state_std=lambda shape: shape**-0.5,
        from_state_std=lambda std: std**-2,
    ),
    "rayleigh": Law(
        unit="1: x is the scale parameter",
        low=1,
        high=1,
        sample=_times_rayleigh,
        formula=_rayleigh_estimate,
        state=LOG,
        state_std=lambda one: math.pi / 24**0.5,
        from_state_std=lambda std: 1.0,
        mean_log=lambda one: (math.log(2) + _mean_log_gamma(1.0)) / 2,
    ),
    "nakagami": Law(
        unit="shape m; x is the root mean square",
        low=0.5,
        high=1e4,
        sample=_times_nakagami,
        formula=_nakagami_estimate,
        state=LOG,
        state_std=lambda m: _trigamma(m) ** 0.5 / 2,
        from_state_std=lambda std: inverse_trigamma(4 * std**2),
        mean_log=lambda m: _mean_log_gamma(m) / 2,
    ),
    "lognormal": Law(
        unit="standard deviation of the logarithm of the factor",
        low=1e-3,
        high=2,
        sample=_times_lognormal,
        formula=_lognormal_estimate,
        state=LOG,
        state_std=lambda std: std,
        from_state_std=lambda std: std,
        normal=True,
        mean_log=lambda std: 0.0,
    ),
}


def law_of(noise: NoiseConfig) -> Law:
    """Return the Law that data.noise names.

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


def tweedie(y: torch.Tensor, s: torch.Tensor, phi: float, rho: float) -> torch.Tensor:
    """Used by tests: return the posterior power mean of order 1 - rho, noise of variance phi x^rho.

    One formula for the family that Gaussian, Poisson and Gamma noise belong to,
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
    c = 1 - rho
    y = y.clamp(min=1e-9)
    alpha = phi * y ** (rho - 1) * (rho / (2 * y) + s)
    if abs(c) < 1e-6:
        return y * alpha.clamp(max=SPREAD).exp()
    return y * (1 + c * alpha).clamp(min=1e-9) ** (1 / c)
