"""Poisson-Gaussian noise, that of a camera, and its gain and black from pictures alone.

    y = g n + o + r u,   n ~ Poisson(x / g),   u ~ N(0, 1)

g the gain, o the offset and r the read noise, in the file's own unit. With the mean m = x + o the
variance is v(m) = g m + c, c = r^2 - g o: a picture tells g and c only, and restoring needs no
more. Black, b = -c/g = o - r^2/g, is where the line of the variance ends.

    y + c/g    has mean x + r^2/g and g times that as variance, as Poisson noise of zeta = g
    z(y)       = 2/g sqrt(max(0, g y + 3/8 g^2 + c)), of deviation 1
    m(E z)     = g A(E z) - c/g, A the closed form of the unbiased inverse of Anscombe's transform

References: Murtagh, Starck and Bijaoui 1995 (generalised Anscombe transform); Makitalo and Foi 2011
and 2013, IEEE TIP 20 and 22 (its unbiased inverse); Foi et al. 2008, IEEE TIP 17 (fit of the line).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genmodels.noise.levels import NoNoise, TooFew

BLOCK = 8  # pixels on a side of a block: 4 x 4 cells of the Haar transform
MEDIAN = 0.9586  # the median of the mean square of a block's 16 normal numbers, chi^2_16 / 16
FLATTEST = 0.2  # the share of the blocks of a group that is taken to be free of structure
FEW = 24  # blocks that a group of equal width needs
LEAST = 64  # blocks that are enough without those that were cut off at black or white
SPAN = 1.5  # deviations of the noise that brightness must span for a line to be seen
SURE = 3  # standard errors that a gain must be worth
MISFIT = 0.3  # the median relative residual beyond which the variance follows no line


def anscombe_inverse(z: Tensor) -> Tensor:
    """Return A(z), the counts whose Anscombe transform has the mean z; 0 where dark.

    z^2/4 + sqrt(3/2)/4 z^-1 - 11/8 z^-2 + 5/8 sqrt(3/2) z^-3 - 1/8. Its z^-3 explodes below the
    transform of 0 counts, 2 sqrt(3/8), where there is no count to find.
    """
    least, root = 2 * math.sqrt(3 / 8), math.sqrt(3 / 2)
    seen = z.clamp(min=least)
    counts = seen**2 / 4 + root / 4 / seen - 11 / 8 / seen**2 + 5 / 8 * root / seen**3 - 1 / 8
    return torch.where(z > least, counts, torch.zeros_like(z))


@dataclass(frozen=True)
class PoissonGaussian:
    """Noise of variance gain m + constant around the mean m, in any one unit.

    Attributes:
        gain: g > 0, what one count is worth.
        constant: c = r^2 - g o.
    """

    gain: float
    constant: float

    @classmethod
    def of_camera(cls, gain: float, offset: float, read: float) -> "PoissonGaussian":
        """Return the noise of a camera of this gain, offset and read noise r."""
        return cls(gain, read**2 - gain * offset)

    @property
    def black(self) -> float:
        """The mean of a pixel without noise."""
        return -self.constant / self.gain

    def deviation(self, mean: float) -> float:
        """Return the standard deviation of the noise at a mean; 0 below black."""
        return math.sqrt(max(0.0, self.gain * mean + self.constant))

    def scaled(self, black: float, white: float) -> "PoissonGaussian":
        """Return it for (y - black) / (white - black)."""
        span = white - black
        return PoissonGaussian(self.gain / span, (self.gain * black + self.constant) / span**2)

    def times(self, factor: float) -> "PoissonGaussian":
        """Return noise of `factor` times this deviation, of the same black."""
        return PoissonGaussian(self.gain * factor**2, self.constant * factor**2)

    def to_state(self, y: Tensor) -> Tensor:
        """Return z of pixels y, in which the noise has the deviation 1."""
        g = self.gain
        return 2 / g * (g * y + 3 / 8 * g**2 + self.constant).clamp(min=0).sqrt()

    def from_state(self, z: Tensor) -> Tensor:
        """Return the mean m of pixels of which z is the mean of their states."""
        return self.gain * anscombe_inverse(z) - self.constant / self.gain

    def estimate(self, y: Tensor, s: Tensor) -> Tensor:
        """Return the mean m of pixels y that have the score s, d/dy log p(y).

        g exp(psi(y'/g + 1) + g s) - c/g with y' = y + c/g: the estimate of Poisson noise. The exact
        mean, (y + g + r^2 s(y+g)) p(y+g)/p(y), needs the density one count away.
        """
        g, shift = self.gain, self.constant / self.gain
        counts = ((y + shift) / g).clamp(min=0)
        return g * (torch.digamma(counts + 1) + g * s).exp() - shift


def sample(
    x: np.ndarray, gain: float, offset: float, read: float, rng: np.random.Generator
) -> np.ndarray:
    """Return y = g n + o + r u of a signal x >= 0, in the file's unit, float64 like x.

    Args:
        x: what of the picture is light, without the offset.
        gain, offset, read: of the camera, gain > 0, read >= 0.
        rng: a numpy Generator.
    """
    return gain * rng.poisson(x / gain) + offset + read * rng.standard_normal(x.shape)


@dataclass(frozen=True)
class Blocks:
    """What the fit of the line needs of blocks of 8 x 8 pixels, float64 (N,) each.

    Attributes:
        mean: the brightness.
        noise: the mean square of the diagonal details, HH of the Haar transform of unit gain.
        rough: the mean square of its LL off the block's plane. White noise has the same variance in
            LL and HH, independent: to choose flat blocks by one does not bias the other.
        cut: whether a pixel lies at a limit of the file, where noise is cut off.
    """

    mean: np.ndarray
    noise: np.ndarray
    rough: np.ndarray
    cut: np.ndarray

    @classmethod
    def of(cls, y: np.ndarray, limits: tuple[float, float] | None = None) -> "Blocks":
        """Return the blocks of a picture, (H, W) or (H, W, C), its channels one after the other.

        Args:
            y: pixels in the file's unit.
            limits: black and white of the file's numbers, where pixels are cut off.
        """
        planes = np.moveaxis(np.atleast_3d(np.asarray(y, np.float64)), 2, 0)
        height, width = (size // BLOCK * BLOCK for size in planes.shape[1:])
        planes = planes[:, :height, :width]
        a, b = planes[:, ::2, ::2], planes[:, ::2, 1::2]
        c, d = planes[:, 1::2, ::2], planes[:, 1::2, 1::2]
        low, diagonal = _cells((a + b + c + d) / 2), _cells((a - b - c + d) / 2)
        steps = np.arange(4) - 1.5
        plane = np.stack([np.full(16, 0.25), np.repeat(steps, 4), np.tile(steps, 4)])
        plane[1:] /= np.sqrt(20)
        energy = (low**2).sum(1) - ((low @ plane.T) ** 2).sum(1)
        means, live = low.mean(1) / 2, np.ptp(low, 1) + np.ptp(diagonal, 1) > 0
        cut = np.zeros(len(low), bool)
        if limits is not None:
            outside = (planes <= limits[0]) | (planes >= limits[1])
            cut = _blocks(outside, BLOCK).any(1)
        # A block of equal pixels is the edge of a registered picture, not one without noise.
        found = means, (diagonal**2).mean(1), energy.clip(0) / 13, cut
        return cls(*(part[live] for part in found))

    @classmethod
    def pooled(cls, parts: Iterable["Blocks"]) -> "Blocks":
        """Return the blocks of several pictures that share one noise, planes of a stack."""
        rows = [(part.mean, part.noise, part.rough, part.cut) for part in parts]
        return cls(*(np.concatenate(column) for column in zip(*rows)))


def _blocks(planes: np.ndarray, side: int) -> np.ndarray:
    """Return (N, side^2) of the blocks of planes (C, H, W)."""
    count, height, width = planes.shape
    parts = planes.reshape(count, height // side, side, width // side, side)
    return parts.swapaxes(2, 3).reshape(-1, side * side)


def _cells(planes: np.ndarray) -> np.ndarray:
    return _blocks(planes, BLOCK // 2)


@dataclass(frozen=True)
class Fit:
    """A line of the noise's variance, and how sure it is.

    Attributes:
        noise: the line. Where `line` is false its gain is 0, and it is the noise at `mean`.
        mean: the mean brightness of what was looked at.
        gain_error, black_error: standard errors, in the unit of the pixels.
        deviation_error: relative standard error of the deviation at `mean`.
        dark_error: standard error of the variance at the offset that is told, else at the darkest
            block.
        misfit: the median relative residual of the groups' variances.
        span: from the darkest block to the brightest.
        groups: (mean, variance) of the groups that the line goes through, (2, N).
        line: whether a gain is seen: brightness spans enough of the noise, and the line fits.
    """

    noise: PoissonGaussian
    mean: float
    gain_error: float
    black_error: float
    deviation_error: float
    dark_error: float
    misfit: float
    span: float
    groups: np.ndarray
    line: bool

    def power_misfit(self, power: float, black: float) -> float:
        """Return the misfit of a variance that grows with a power of the brightness over black."""
        m, v = self.groups
        ratio = v / np.maximum(m - black, 1e-6 * self.span) ** power
        return float(np.median(np.abs(ratio / np.median(ratio) - 1)))


def fit_line(
    blocks: Blocks,
    *,
    gain: float | None = None,
    offset: float | None = None,
    read: float | None = None,
    step: float = 0.0,
) -> Fit:
    """Return the line of the variance that blocks of pictures show.

    Blocks are grouped by brightness; of each group the flattest give one variance, and a robust
    line goes through them. What is told is not fitted.

    Args:
        blocks: of one picture, or of all planes of a stack; 64 of them, say, to be worth much.
        gain, offset, read: what is told of the camera; read counts with offset alone.
        step: of the pixels' numbers, 1 of whole ones, whose rounding is noise as well; 0: none.

    Raises:
        NoNoise: blocks without noise.
        TooFew: too few blocks.
    """
    if (kept := ~blocks.cut).sum() >= LEAST:
        blocks = Blocks(*(part[kept] for part in _columns(blocks)))
    if not (blocks.noise > 0).any():
        raise NoNoise("level=auto: the picture has no noise to measure; give gain, offset, read")
    if len(blocks.mean) < FEW:
        raise TooFew(
            f"level=auto: {len(blocks.mean)} blocks of {BLOCK} x {BLOCK} pixels that differ are "
            f"too few to measure noise by, {FEW} are needed; give gain, offset, read"
        )
    dark = float(blocks.mean.min()) if offset is None else offset
    floor = step**2 / 12
    line = _first_line(blocks, dark, floor)
    fixed = None
    if read is not None and offset is not None:  # a camera without read noise has no line at all
        fixed = max(read**2 + floor, 1e-3 * float(np.median(blocks.noise)))
    for _ in range(3):
        m, v, n = _group_variances(blocks, line, dark)
        line, weights = _robust_line(m - dark, v, n, line, floor, gain, fixed)
    slope, start = line
    residuals = np.abs(v / (slope * (m - dark) + start) - 1)
    mean = float(blocks.mean.mean())
    at = max(slope * (mean - dark) + start, 1e-300)
    errors = _errors(m - dark, v, weights, slope, start, mean - dark)
    span = float(np.ptp(blocks.mean))
    misfit = float(np.median(residuals))
    sure = gain is not None or (span >= SPAN * math.sqrt(at) and slope > SURE * errors[0])
    seen = slope > 0 and sure and misfit <= MISFIT
    noise = PoissonGaussian(slope, start - slope * dark) if seen else PoissonGaussian(0.0, at)
    return Fit(noise, mean, *errors, misfit, span, np.stack([m, v]), seen)


def _columns(blocks: Blocks) -> Sequence[np.ndarray]:
    return blocks.mean, blocks.noise, blocks.rough, blocks.cut


def _first_line(blocks: Blocks, dark: float, floor: float) -> tuple[float, float]:
    """Return (gain, variance at `dark`) through the darkest and the brightest third."""
    order = blocks.mean.argsort()
    third = max(1, len(order) // 3)
    points = []
    for part in (order[:third], order[-third:]):
        flat = part[blocks.rough[part] <= np.quantile(blocks.rough[part], FLATTEST)]
        points.append((blocks.mean[flat].mean(), np.median(blocks.noise[flat]) / MEDIAN))
    (m1, v1), (m2, v2) = points
    slope = max(0.0, (v2 - v1) / (m2 - m1)) if m2 > m1 else 0.0
    least = max(floor, 1e-3 * max(v1, v2), 1e-300)
    return float(slope), float(max(v1 - slope * (m1 - dark), least))


def _group_variances(
    blocks: Blocks, line: tuple[float, float], dark: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (mean, variance, number of blocks) of groups alike in brightness, their flat part."""
    slope, start = line
    expected = np.maximum(slope * (blocks.mean - dark) + start, 1e-3 * start)
    flatness, energy = blocks.rough / expected, blocks.noise / expected
    order = blocks.mean.argsort()
    # Where bright spots are few, groups of equal count leave them in one with what is dark.
    root = np.sqrt(blocks.mean - blocks.mean.min())
    index = np.minimum((12 * root / max(root.max(), 1e-300)).astype(int), 11)
    even = [np.flatnonzero(index == k) for k in range(12)]
    groups = [*np.array_split(order, 10), *(part for part in even if len(part) >= FEW)]
    rows = []
    for group in groups:
        flat = group[flatness[group] <= np.quantile(flatness[group], FLATTEST)]
        mean = blocks.mean[flat].mean()
        at = max(slope * (mean - dark) + start, 1e-3 * start)
        rows.append((mean, at * np.median(energy[flat]) / MEDIAN, len(flat)))
    m, v, n = (np.array(column) for column in zip(*rows))
    return m, v, n


def _robust_line(
    m: np.ndarray,
    v: np.ndarray,
    n: np.ndarray,
    line: tuple[float, float],
    floor: float,
    gain: float | None,
    start: float | None,
) -> tuple[tuple[float, float], np.ndarray]:
    """Return (gain, variance at m = 0) of v = gain m + it, by Huber's weights, and the weights."""
    weights = np.ones(len(m))
    for _ in range(20):
        fit = np.maximum(line[0] * m + line[1], 1e-3 * line[1])
        residual = v / fit - 1
        scale = max(np.median(np.abs(residual)) / 0.6745, 1e-9)
        huber = np.minimum(1, 1.345 * scale / np.maximum(np.abs(residual), 1e-300))
        weights = huber * np.sqrt(n) / fit**2
        line = _line_through(m, v, weights, floor, gain, start)
    return line, weights


def _line_through(
    m: np.ndarray,
    v: np.ndarray,
    weights: np.ndarray,
    floor: float,
    gain: float | None,
    start: float | None,
) -> tuple[float, float]:
    """Return (gain, variance at m = 0) by least squares, neither below 0 and the second `floor`."""
    tiny = max(floor, 1e-6 * float(v.max()), 1e-300)
    if gain is None and start is None:
        mean_m, mean_v = np.average(m, weights=weights), np.average(v, weights=weights)
        square = np.average((m - mean_m) ** 2, weights=weights)
        gain = float(np.average((m - mean_m) * (v - mean_v), weights=weights) / max(square, 1e-300))
        if gain < 0:
            return 0.0, max(float(mean_v), tiny)
        if (at_zero := float(mean_v - gain * mean_m)) >= tiny:
            return gain, at_zero
        return _line_through(m, v, weights, floor, None, tiny)
    if gain is None:
        product = float((weights * m * (v - start)).sum() / max((weights * m * m).sum(), 1e-300))
        return max(product, 0.0), float(start)  # type: ignore[arg-type]
    return gain, start or max(float(np.average(v - gain * m, weights=weights)), tiny)


def _errors(
    m: np.ndarray, v: np.ndarray, weights: np.ndarray, slope: float, start: float, at: float
) -> tuple[float, float, float, float]:
    """Return standard errors of gain, black, (relative) the deviation at `at`, and of `start`."""
    rows = np.stack([m, np.ones_like(m)], 1)
    normal = rows.T @ (weights[:, None] * rows)
    residual = v - rows @ np.array([slope, start])
    # Each block counts in two groups.
    variance = 2 * (weights * residual**2).sum() / max(len(m) - 2, 1)
    covariance = variance * np.linalg.pinv(normal, hermitian=True)
    black = np.array([start / slope**2, -1 / slope]) if slope > 0 else np.zeros(2)
    point = np.array([at, 1.0])
    spread = math.sqrt(max(point @ covariance @ point, 0))
    return (
        math.sqrt(max(covariance[0, 0], 0)),
        math.sqrt(max(black @ covariance @ black, 0)) if slope > 0 else math.inf,
        spread / (2 * max(float(point @ np.array([slope, start])), 1e-300)),
        math.sqrt(max(covariance[1, 1], 0)),
    )
