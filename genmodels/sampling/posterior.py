"""Samples of p(x | y), y = A x + s n, by a denoiser or by an energy.

A denoiser is D = E[w_0 | w_t], w_t = w_0 + sigma z, in the model's state w; the picture is
x = g(w). g is the identity but for GBM, whose w is log(u + offset): there the measurement sees
A g(w), and near D the straight map B = A G with the diagonal G = dg/dw at D.

    e = y - A g(D),  J = dD/dw_t,  c the spread of w_0,  r^2 = c^2 sigma^2 / (c^2 + sigma^2)
    step(D)  D + k (w - D) / sigma + d z,   d = eta sigma' sqrt(1 - sigma'^2 / sigma^2),
                                            k^2 + d^2 = sigma'^2     from sigma down to sigma'
    dps      step(D) - zeta_i (1 + sigma^2)^(1/2) (1 + sigma'^2)^(1/2) G^-2 grad |e|^2
             zeta_i = zeta' / |e|
    pigdm    step(D + sigma^2 J^T B^T (r^2 B B^T + s^2 I)^-1 e)
    diffpir  D* = argmin_w |y - A g(D) - B (w - D)|^2 + rho |w - D|^2,  rho = lam s^2 / sigma^2
             D* + sigma' (sqrt(1 - mix) (w - D*) / sigma + sqrt(mix) z)
    langevin a Metropolis-adjusted chain on E(x) + |y - A x|^2 / (2 s^2)

step is DDIM; eta = 1 is the ancestral step of DDPM. The papers' states are sqrt(abar) w with
abar = 1 / (1 + sigma^2): hence the two roots in dps. Its zeta' is for 1000 steps and 3 x 256^2
measured values; here it counts as zeta' (1000 / steps) sqrt(M / (3 256^2)), M values. G^-2 makes
the step what it is in the picture: G^-1 for the gradient there, G^-1 for the way back. r is that
of data N(m, c^2 I), for which pigdm's score is exact; lam weighs sigma^2 against it. mix is the
zeta of DiffPIR.

References: Chung et al. 2023, "Diffusion posterior sampling for general noisy inverse problems",
arXiv 2209.14687, algorithm 1; Song, Vahdat, Mardani and Kautz 2023, "Pseudoinverse-guided diffusion
models for inverse problems", ICLR (the score of N(A D, r^2 A A^T + s^2 I)); Zhu et al. 2023,
"Denoising diffusion models for plug-and-play image restoration", arXiv 2305.08995, algorithm 1;
Song, Meng and Ermon 2021, arXiv 2010.02502, equations 12 and 16 (DDIM).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genmodels.config import Section, setting
from genmodels.kernels.philox import philox_normal
from genmodels.sampling.langevin import Chain, mala_chain
from genmodels.sampling.operators import Mask, Operator, Slanted
from genmodels.seeding import Stream

__all__ = [
    "DENOISING",
    "READ_BY",
    "STEPS",
    "Denoiser",
    "Measured",
    "SolverOptions",
    "langevin",
    "sample_diffpir",
    "sample_dps",
    "sample_pigdm",
]

Randn = Callable[[], Tensor]  # standard normals like w
Callback = Callable[[int, Tensor], object] | None

DENOISING = ("pigdm", "diffpir", "dps")  # the solvers that ask for a denoiser
STEPS = {"pigdm": 100, "diffpir": 100, "dps": 250, "langevin": 100}
# Settings that not every solver reads.
READ_BY = {
    "eta": ("pigdm",),
    "lam": ("diffpir",),
    "mix": ("diffpir",),
    "zeta": ("dps",),
    "step": ("langevin",),
}


@dataclass
class SolverOptions(Section):
    """How samples of p(x | y) are drawn."""

    solver: str = setting(
        "",
        "pigdm, diffpir or dps (by a denoiser), langevin (by an energy); default the first it has",
    )
    steps: int | None = setting(
        None, "steps; default pigdm, diffpir and langevin 100, dps 250", ge=1
    )
    eta: float | None = setting(
        None, "pigdm: share of fresh noise in a step; default 1", ge=0, le=1
    )
    lam: float | None = setting(None, "diffpir: lambda, of the denoised; default 1", gt=0)
    mix: float | None = setting(
        None, "diffpir: zeta, share of fresh noise in a step; default 1", ge=0, le=1
    )
    zeta: float | None = setting(
        None, "dps: zeta', of 1000 steps and 3 x 256 x 256 values; default 1", gt=0
    )
    step: float | None = setting(
        None, "langevin: factor on the model's own step size; default 1", gt=0, lt=math.inf
    )


@dataclass(frozen=True)
class Measured:
    """What is known of the pictures.

    Attributes:
        operator: A.
        y: A x + noise, (B, ...), float32.
        noise: s >= 0, its standard deviation.
    """

    operator: Operator
    y: Tensor
    noise: float

    def energy(self, x: Tensor) -> Tensor:
        """Return |y - A x|^2 / (2 s^2), (B,), s > 0."""
        return (self.y - self.operator(x)).square().flatten(1).sum(dim=1) / (2 * self.noise**2)

    def fresh(self, keys: Tensor) -> Tensor:
        """Return y + s n, n standard normal by each item's key, int64 (B,)."""
        shape, stream = self.y.shape[1:], int(Stream.MEASURE)
        n = philox_normal(shape, keys, 0, stream=stream, device=self.y.device)
        return self.y + self.noise * n

    def pulled(self, x: Tensor, y: Tensor, spread: float = 0.5) -> Tensor:
        """Return x moved to where y would be measured of it, like x.

        If x is a draw of N(m, spread^2 I), and y has its noise once more (fresh), this is one of
        the posterior (Matheron's rule).
        """
        return x + self.operator.pull(y - self.operator(x), self.noise**2 / spread**2)

    @property
    def held(self) -> Tensor | None:
        """Which pixels are known exactly, bool like (C, H, W); None: a noise, or no mask."""
        masked = isinstance(self.operator, Mask) and not self.noise
        return self.operator.known if masked else None  # type: ignore[attr-defined]


def _same(w: Tensor) -> Tensor:
    return w


@dataclass(frozen=True)
class Denoiser:
    """A model as a denoiser in its own state w; see the module.

    Attributes:
        call: (w, sigma) -> E[w_0 | w_t = w], like w; sigma is a number.
        low, high: the noise levels that it was trained for.
        spread: c, the standard deviation of w_0's elements.
        begin: (standard normals, sigma) -> w_t at the highest noise level.
        image: g, w -> picture on [-1, 1].
        slope: w -> the diagonal G there; None: g is the identity.
        known: noise levels (N,) -> the nearest that the network knows.
    """

    call: Callable[[Tensor, float], Tensor]
    low: float
    high: float
    spread: float
    begin: Callable[[Tensor, float], Tensor]
    image: Callable[[Tensor], Tensor] = _same
    slope: Callable[[Tensor], Tensor] | None = None
    known: Callable[[Tensor], Tensor] = _same

    def near(self, operator: Operator, w: Tensor) -> Operator:
        """Return B = A G at w."""
        return operator if self.slope is None else Slanted(operator, self.slope(w))


def _step(
    w: Tensor, denoised: Tensor, sigma: float, after: float, z: Tensor, eta: float = 1.0
) -> Tensor:
    """Return step(D) of the module, from sigma to `after`."""
    d = eta * after * math.sqrt(max(0.0, 1 - (after / sigma) ** 2))
    k = math.sqrt(max(0.0, after**2 - d**2))
    return denoised + k / sigma * (w - denoised) + d * z


@torch.no_grad()
def sample_dps(
    denoiser: Denoiser,
    measured: Measured,
    w: Tensor,
    sigmas: Sequence[float],
    randn: Randn,
    *,
    zeta: float = 1.0,
    callback: Callback = None,
) -> Tensor:
    """Return w at the last sigma by diffusion posterior sampling; s has no part in it.

    Args:
        denoiser: of the model.
        measured: of each item of w.
        w: at sigmas[0], (B, C, H, W).
        sigmas: decreasing; the last may be 0.
        randn: the noise of each step.
        zeta: zeta', see the module.
        callback: called as callback(i, w) after each step.
    """
    values = measured.y[0].numel()
    zeta = zeta * (1000 / (len(sigmas) - 1)) * math.sqrt(values / (3 * 256**2))
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        with torch.enable_grad():
            w = w.detach().requires_grad_(True)
            denoised = denoiser.call(w, sigma)
            e = measured.y - measured.operator(denoiser.image(denoised))
            square = e.square().flatten(1).sum(dim=1)
            (slope,) = torch.autograd.grad(square.sum(), w)
        w, denoised = w.detach(), denoised.detach()
        slope = slope if denoiser.slope is None else slope / denoiser.slope(denoised) ** 2
        size = square.detach().sqrt().clamp(min=1e-12).reshape(-1, *[1] * (w.dim() - 1))
        scale = zeta * math.sqrt((1 + sigma**2) * (1 + after**2))
        w = _step(w, denoised, sigma, after, randn()) - scale / size * slope
        if callback:
            callback(i, w)
    return w


@torch.no_grad()
def sample_pigdm(
    denoiser: Denoiser,
    measured: Measured,
    w: Tensor,
    sigmas: Sequence[float],
    randn: Randn,
    *,
    eta: float = 1.0,
    callback: Callback = None,
) -> Tensor:
    """Return w at the last sigma by pseudo-inverse guidance; arguments as for sample_dps.

    Args:
        eta: share of fresh noise in a step; 0: none, an ODE by Euler's method.
    """
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        r2 = denoiser.spread**2 * sigma**2 / (denoiser.spread**2 + sigma**2)
        with torch.enable_grad():
            w = w.detach().requires_grad_(True)
            denoised = denoiser.call(w, sigma)
            d = denoised.detach()
            e = measured.y - measured.operator(denoiser.image(d))
            near = denoiser.near(measured.operator, d)
            # B^T (r^2 B B^T + s^2)^-1 = B^T (B B^T + s^2 / r^2)^-1 / r^2
            u = near.pull(e, measured.noise**2 / r2) / r2
            (guide,) = torch.autograd.grad((denoised * u).sum(), w)
        w = _step(w.detach(), d + sigma**2 * guide, sigma, after, randn(), eta)
        if callback:
            callback(i, w)
    return w


@torch.no_grad()
def sample_diffpir(
    denoiser: Denoiser,
    measured: Measured,
    w: Tensor,
    sigmas: Sequence[float],
    randn: Randn,
    *,
    lam: float = 1.0,
    mix: float = 1.0,
    callback: Callback = None,
) -> Tensor:
    """Return w at the last sigma by DiffPIR, without a gradient; arguments as for sample_dps.

    Args:
        lam: lambda, weight of the denoised picture.
        mix: the paper's zeta, the share of fresh noise in a step.
    """
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        denoised = denoiser.call(w, sigma)
        e = measured.y - measured.operator(denoiser.image(denoised))
        near = denoiser.near(measured.operator, denoised)
        denoised = denoised + near.pull(e, lam * measured.noise**2 / sigma**2)
        noise = math.sqrt(1 - mix) * (w - denoised) / sigma + math.sqrt(mix) * randn()
        w = denoised + after * noise
        if callback:
            callback(i, w)
    return w


def langevin(
    energy: Callable[[Tensor], Tensor],
    measured: Measured,
    x: Tensor,
    *,
    temperature: Any = 1.0,
    to_image: Callable[[Tensor], Tensor] = _same,
    **options: Any,
) -> Chain:
    """Return the Chain on exp(-E(x) / T - |y - A x|^2 / (2 s^2)); exact for any step size.

    Pixels that are known exactly are held as they are in x.

    Args:
        energy: E, x -> (B,), LOWER = likelier.
        measured: s > 0, or held pixels.
        x: start, in the state of the energy.
        temperature: T, a number or (B,).
        to_image: state of the energy -> picture on [-1, 1].
        options: steps, step, seed, counter, stream, callback, freeze and accumulate of mala_chain.
    """
    held = measured.held

    def total(x: Tensor) -> Tensor:
        if held is not None:
            return energy(x)
        return energy(x) + temperature * measured.energy(to_image(x))

    return mala_chain(
        total,
        x,
        temperature=temperature,
        mask=None if held is None else ~held.to(x.device),
        diagnostics=False,
        **options,
    )
