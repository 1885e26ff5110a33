"""Noise of any law as Gaussian noise of one level: what a model of Gaussian noise restores.

    w = (z - z0) / (z1 - z0),   z(y) of even deviation, z0 and z1 the states of black and white

        poisson             z = 2 / zeta sqrt(zeta y + 3/8 zeta^2), as poisson-gaussian with c = 0
        poisson-gaussian    z = 2 / g sqrt(max(0, g y + 3/8 g^2 + c))
        noise that multiplies       z = log y, z0 at SPAN below white

The noise in w has the level 255 deviation(z) / (z1 - z0). A denoiser gives the mean of w, and the
inverse of a mean is not the mean of the inverse: the way back is the one without bias, for noise
that multiplies x = exp(z - E log(y / x)).

References: Anscombe 1948; Makitalo and Foi 2011, IEEE TIP 20 (the unbiased way back).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genmodels.noise.laws import LAWS
from genmodels.noise.poisson_gaussian import PoissonGaussian

CAMERA = "poisson-gaussian"
# Of log y, from w = 0 to white: w = 0 is a twelfth of white. A model of the levels 5 to 54 restores
# photographs best at 2 to 3, and .3 dB worse from the darkest pixel there is, at 6.9.
SPAN = 2.5
# {law: what its level is}: what a model of Gaussian noise restores.
UNITS = {
    "gaussian": LAWS["gaussian"].unit,
    CAMERA: "gain, offset and read noise of a camera, in the file's unit",
    "poisson": LAWS["poisson"].unit,
} | {name: law.unit for name, law in LAWS.items() if law.mean_log is not None}


@dataclass(frozen=True)
class Stabilised:
    """A domain w of pixels on [0, 1] in which their noise is Gaussian, of one size.

    Attributes:
        forward: y -> w, pixel by pixel; white is 1, and black 0 where it has a state. Both may be
            left.
        inverse: the mean of w -> the clean pixel.
        level: of the noise in w, sigma of 255.
    """

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    level: float


def stabilised(law: str, level: float | PoissonGaussian) -> Stabilised:
    """Return the domain of noise of a law.

    Args:
        law: a key of UNITS.
        level: in the law's unit; of poisson-gaussian the noise of pixels whose black is 0 and whose
            white is 1 (PoissonGaussian.scaled).
    """
    if isinstance(level, PoissonGaussian):
        return _of_camera(level)
    if law == "poisson":
        return _of_camera(PoissonGaussian(level, 0.0))
    row = LAWS[law]
    if law == "gaussian":
        return Stabilised(lambda y: y, lambda w: w, level)
    assert row.mean_log is not None  # see UNITS
    bias, deviation = row.mean_log(level), float(row.state_std(level))
    return _affine(
        lambda y: row.to_state(y, level), lambda z: (z - bias).exp(), deviation, -SPAN, 0.0
    )


def _of_camera(noise: PoissonGaussian) -> Stabilised:
    at_black, at_white = noise.deviation(0), noise.deviation(1)
    if at_white <= 1.01 * at_black:  # of one size: the root would be a line of huge numbers
        sigma = 255 * (at_black + at_white) / 2
        return Stabilised(lambda y: y, lambda w: w, sigma)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return _affine(noise.to_state, noise.from_state, 1.0, *noise.to_state(ends).tolist())


def _affine(
    forward: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    deviation: float,
    zero: float,
    one: float,
) -> Stabilised:
    span = one - zero
    return Stabilised(
        lambda y: (forward(y) - zero) / span,
        lambda w: inverse(w * span + zero),
        255 * deviation / span,
    )


def contrast(level: float, low: float, high: float) -> tuple[float, float, float]:
    """Return (c, sigma, share): how a model of the levels low to high restores noise of `level`.

    It restores w' = c (w - 1/2) + 1/2, whose noise has the level c times as large, as noise of
    sigma, and `share` of what it changes is taken: w + share ((D(w') - 1/2) / c + 1/2 - w). Near
    its lowest level a model is weak, so pictures are stretched to 1.6 of it, no more than 2.5
    times; those of more noise than it knows are shrunk. What is still below the lowest has the
    share (c level / low)^2 of noise to take away. Within a tenth of what it knows: (1, level, 1).
    A model that knows levels below 2 of 255 is shown no more contrast: what is weaker there is as
    weak as the rounding and the grain of the pictures it learned from.

    Args:
        level: sigma of 255, > 0.
        low, high: the levels that the model was trained on.
    """
    least, most = (min(1.6 * low, high), 2.5) if low >= 2 else (low, 1.0)
    if 0.9 * least <= level <= 1.1 * high:
        return 1.0, level, 1.0
    factor = max(0.74 * high, low) / level if level > high else min(most, least / level)
    return factor, max(factor * level, low), min(1.0, factor * level / low) ** 2
