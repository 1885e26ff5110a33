"""How strong the noise of one picture is, and of which law, from the picture or from its score.

A law is one of noise.LAWS or its name; y is one picture on [0, 1], unclipped, (C, H, W) or (H, W).
level_from_patches and pick_law need nothing but the picture, and are what level=auto and law=auto
use; the others need the score of y and are for comparison, from Python.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from genmodels.noise.laws import LAWS, Law

PATCH = 5  # the side of a patch; its PATCH^2 eigenvalues are those of pure noise, but for a few
MOST_PATCHES = 60_000
SMOOTH = 0.05  # the share of the patches taken to be free of structure to begin with
GOLDEN = (5**0.5 - 1) / 2


class NoNoise(ValueError):
    """A picture shows no noise to measure."""


class TooFew(NoNoise):
    """A picture holds too little to measure its noise by, which it may have all the same."""


def _name_of(law: Law | str) -> str:
    for name, row in LAWS.items():
        if law == name or law is row:
            return name
    raise ValueError(f"law={law}: choose from {', '.join(LAWS)}")


def _clamp_level(law: Law | str, level: float) -> float:
    """Return the nearest level that the law accepts."""
    law = LAWS[_name_of(law)]
    return min(max(level, law.low), law.high)


def _formula_of(
    law: Law | str, formulas: dict[str, Callable[..., torch.Tensor]]
) -> Callable[..., torch.Tensor]:
    name = _name_of(law)
    if name not in formulas:
        raise ValueError(f"law={name}: its level is estimated for {', '.join(formulas)}")
    return formulas[name]


def _planes(y: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Return the channels of a picture as pictures of their own, float64 (C, 1, H, W)."""
    y = torch.as_tensor(y).double()
    return y.reshape(-1, 1, *y.shape[-2:])


def _check_size(planes: torch.Tensor, key: str) -> None:
    height, width = planes.shape[2:]
    if min(height, width) < 3 * PATCH:
        remedy = "give the level" if key == "level=auto" else "name the law"
        raise ValueError(
            f"{key}: needs {3 * PATCH} x {3 * PATCH} pixels, got {height} x {width}; {remedy}"
        )


def _patches(planes: torch.Tensor, side: int, stride: int) -> torch.Tensor:
    """Return the patches of pictures (C, 1, H, W), (N, side^2)."""
    return F.unfold(planes, side, stride=stride).transpose(1, 2).reshape(-1, side * side)


def _roughness(patches: torch.Tensor, side: int) -> torch.Tensor:
    """Return the sum of squared neighbour differences in each patch, (N,)."""
    p = patches.reshape(-1, side, side)
    return p.diff(dim=1).square().sum((1, 2)) + p.diff(dim=2).square().sum((1, 2))


def _noise_roughness(side: int) -> tuple[float, float]:
    """Return mean and standard deviation of the roughness of unit Gaussian noise."""
    d = torch.eye(side, dtype=torch.float64).diff(dim=0)
    eye = torch.eye(side, dtype=torch.float64)
    quadratic = torch.kron(eye, d.T @ d) + torch.kron(d.T @ d, eye)
    return quadratic.trace().item(), (2 * quadratic.square().sum()).sqrt().item()


def _patch_std(patches: torch.Tensor) -> float:
    """Return the noise's standard deviation from the eigenvalues of the patch covariance.

    Structure fills few directions, noise all of them alike: the largest eigenvalues are left out
    until mean and median of the rest agree. Reference: Chen, Zhu and Heng 2015, ICCV.
    """
    patches = patches - patches.mean(0)
    eigenvalues = torch.linalg.eigvalsh(patches.T @ patches / (len(patches) - 1)).clamp(min=0)
    for count in range(len(eigenvalues), 1, -1):
        mean = eigenvalues[:count].mean()
        if mean <= eigenvalues[:count].median():
            break
    return float(mean.sqrt())


def level_from_patches(
    y: torch.Tensor | np.ndarray, law: Law | str, smoothest: float = 2.5
) -> float:
    """Return the level of the noise in a picture, which may lie beyond what the law accepts.

    In the law's state domain the noise is of one size. Its standard deviation comes from the
    covariance of those patches that are no rougher than noise of that size: from the smoothest
    patches upwards, until the size no longer changes.

    Args:
        y: the picture; at least 64 pixels high and wide, else the level is not worth much.
        law: of LAWS, or its name.
        smoothest: a patch is kept up to so many standard deviations above noise's own roughness.

    Raises:
        NoNoise: a picture without noise (constant where it is not black).
        TooFew: one with fewer patches free of structure than it takes.
        ValueError: a picture too small.

    Reference: after Liu, Tanaka and Okutomi 2013 (weak texture), Chen, Zhu and Heng 2015.
    """
    return level_and_patches(y, law, smoothest)[0]


def level_and_patches(
    y: torch.Tensor | np.ndarray, law: Law | str, smoothest: float = 2.5
) -> tuple[float, torch.Tensor]:
    """Return (level, patches (N, PATCH^2) in the state domain), those that the level comes from.

    Arguments and errors as of level_from_patches.
    """
    law = LAWS[_name_of(law)]
    planes = _planes(y)
    count = planes.shape[0] * planes.shape[2] * planes.shape[3]
    stride = max(1, round((count / MOST_PATCHES) ** 0.5))
    _check_size(planes, "level=auto")
    mean, spread = _noise_roughness(PATCH)
    pixels = _patches(planes, PATCH, stride)
    # Black has no noise under most laws, and what was cut off at black or white has too little.
    live = (pixels.amin(1) > planes.amin()) & (pixels.amax(1) < planes.amax())
    if live.sum() < 4 * PATCH**2:  # so dark that hardly a patch is without black
        live = pixels.amin(1) < pixels.amax(1)
    pixels = pixels[live]
    level = std = 0.0
    # Of Poisson noise the plain root, whose spread at few counts errs less and upwards.
    patches = law.to_state(pixels, law.low)
    rough = _roughness(patches, PATCH)
    for _ in range(12 if len(pixels) else 0):
        std = std or float((rough.quantile(SMOOTH) / mean).sqrt())
        keep = rough < std**2 * (mean + smoothest * spread)
        if law is LAWS["poisson"] and level:  # of few counts the root is not even
            bright = keep & (pixels.mean(1) > 4 * level)
            keep = bright if bright.sum() >= 4 * PATCH**2 else keep
        if keep.sum() < 4 * PATCH**2:
            break
        last, kept = std, keep
        std = _patch_std(patches[keep])
        level = law.from_state_std(max(std, 1e-6))
        if abs(std / last - 1) < 1e-3:
            break
    if not level and len(pixels) and std > 0:
        raise TooFew(
            "level=auto: too few patches without structure to measure the noise by; give the level"
        )
    if not level:
        raise NoNoise("level=auto: the picture has no noise to measure; give the level")
    return level, patches[kept]


def _power(brightness: torch.Tensor, variance: torch.Tensor) -> float:
    """Return rho of the fit variance = phi brightness^rho, 0 where brightness hardly differs."""
    x = brightness.log()
    x = x - x.mean()
    z = variance.log()
    return float((x * z).sum() / x.square().sum()) if x.std() > 0.02 else 0.0


def _law_of_power(rho: float) -> str:
    """Return the nearest of the three, of variance sigma^2, zeta x and x^2/k."""
    return "gaussian" if rho < 0.5 else "poisson" if rho < 1.5 else "gamma"


def variance_power(y: torch.Tensor | np.ndarray) -> float:
    """Return rho, the power of the brightness that the noise's variance grows with.

    The picture less its local plane is noise, plus texture. Of blocks alike in brightness those
    with the least of it are flat: their mean square is the variance at that brightness.

    Args:
        y: the picture; at least 64 pixels high and wide, else the power is not worth much.

    Raises:
        ValueError: a picture too small.
    """
    planes = _planes(y)
    _check_size(planes, "law=auto")
    second = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    rest = F.conv2d(planes, (second[:, None] * second / 6)[None, None])  # unit gain for white noise
    brightness = F.avg_pool2d(planes[..., 1:-1, 1:-1], 8, stride=4).flatten()
    variance = F.avg_pool2d(rest.square(), 8, stride=4).flatten()
    groups = brightness.argsort().chunk(12)  # of equal size
    dark_first = torch.stack([brightness[group].mean() for group in groups])
    flat = torch.stack([variance[group].quantile(0.1) for group in groups])
    usable = (dark_first > 0.02) & (flat > 0)  # below lies black, cut off or quantised
    return _power(dark_first[usable], flat[usable]) if usable.sum() > 2 else 0.0


def pick_law(y: torch.Tensor | np.ndarray) -> str:
    """Return the name of the noise of a picture: gaussian, poisson or gamma (variance_power)."""
    return _law_of_power(variance_power(y))


def _precision(y: torch.Tensor, score: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return t = -ds_i/dy_i of each pixel, by one Jacobian-vector product with random signs.

    Where the estimate does not change with its pixel, t is that of the noise alone: 1/sigma^2 for
    Gaussian noise. What it does change, J, makes t smaller by the factor 1 - J.
    """
    draw = torch.Generator().manual_seed(0)
    signs = torch.randint(2, y.shape, generator=draw).to(y) * 2 - 1
    _, change = torch.func.jvp(score, (y,), (signs,))
    return -change * signs


def power_from_score(y: torch.Tensor, score: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Used by tests: return rho, as variance_power does, from the score.

    An estimate of the Tweedie family (noise.tweedie) does not change with its pixel where
    y^-rho / phi = rho/(2 y^2) + t. So the right side, in brightness, falls with the power rho.
    (The published quadratic in rho holds alpha constant there instead of the estimate.)

    Args:
        y: the picture.
        score: y -> s, of the same shape.

    Reference: the assumption is that of Kim, Kwon and Ye 2022, arXiv 2112.03696.
    """
    t, y = _precision(y, score).flatten().double(), y.flatten().double()
    groups = [group for group in y.argsort().chunk(24) if len(group) and y[group].amin() > 0.02]
    if len(groups) < 3:
        return 0.0
    brightness = torch.stack([y[group].median() for group in groups])
    t = torch.stack([t[group].median() for group in groups])
    rho = 0.0
    for _ in range(20):
        rho = -_power(brightness, (t + rho / (2 * brightness.square())).clamp(min=1e-9))
    return rho


def law_from_score(y: torch.Tensor, score: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Used by tests: return gaussian, poisson or gamma, by power_from_score."""
    return _law_of_power(power_from_score(y, score))


def level_jvp(
    y: torch.Tensor, score: Callable[[torch.Tensor], torch.Tensor], law: Law | str
) -> float:
    """Used by benchmarks and tests: return the level at which no estimate changes with its pixel.

    In the median over pixels. With t = -ds_i/dy_i: sigma^2 = 1/t, zeta = -y + (y^2 + 2/t)^(1/2),
    k = 1 + y^2 t. Too strong by what the estimates do change: sigma^2/(1 - J) for Gaussian noise.

    Args:
        y: the picture.
        score: y -> s, of the same shape; torch.func.jvp goes through it.
        law: gaussian, poisson or gamma, of LAWS or by name.

    Raises:
        ValueError: another law.

    Reference: Kim, Kwon and Ye 2022, arXiv 2112.03696, in the limit of their small step.
    """
    formulas = {
        "gaussian": lambda y, t: 255 * t**-0.5,
        "poisson": lambda y, t: -y + (y.square() + 2 / t).sqrt(),
        "gamma": lambda y, t: 1 + y.square() * t,
    }
    formula = _formula_of(law, formulas)
    t = _precision(y, score).double().clamp(min=1e-9)
    return _clamp_level(law, float(formula(y.double().clamp(min=0), t).median()))


def _total_variation(x: torch.Tensor) -> torch.Tensor:
    return x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()


def level_tv(
    y: torch.Tensor,
    s: torch.Tensor,
    law: Law | str,
    low: float | None = None,
    high: float | None = None,
) -> float:
    """Used by benchmarks and tests: return the level whose estimate has the smallest penalty.

    The penalty is the total variation, with a fit to y for Poisson and Gamma noise.

    The total variation of y + sigma^2 s is convex in sigma^2: golden section finds its minimum. The
    other penalties are not, so a grid comes before it.

    Args:
        y, s: the picture and its score.
        law: gaussian, poisson or gamma, of LAWS or by name.
        low, high: the range to look in; the paper's 5 to 55, 0.005 to 0.1 and 40 to 120 by default.

    Raises:
        ValueError: another law.

    Reference: Kim and Ye 2021, arXiv 2106.07009 (penalties as in their code).
    """

    def poisson(x):
        seen = x > 0
        return 0.1 * _total_variation(x) + (x[seen] - y[seen] * x[seen].log()).mean()

    def gamma(x):
        ratio = y[x > 0] / x[x > 0]
        return _total_variation(x) + (x[x > 0].log() + ratio + ratio.square()).mean()

    penalties = {"gaussian": _total_variation, "poisson": poisson, "gamma": gamma}
    penalty = _formula_of(law, penalties)
    name = _name_of(law)
    paper_low, paper_high = {"gaussian": (5, 55), "poisson": (0.005, 0.1), "gamma": (40, 120)}[name]
    low = _clamp_level(law, float(low or paper_low))
    high = _clamp_level(law, float(high or paper_high))

    def cost(level):
        return float(penalty(LAWS[name].estimate(y, s, level)))

    if name != "gaussian":
        grid = torch.logspace(*torch.tensor([low, high]).double().log10().tolist(), 40).tolist()
        best = min(range(len(grid)), key=lambda i: cost(grid[i]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    return _golden_section(cost, low, high)


def _golden_section(cost: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function with one valley is least, to 1e-4 of the interval."""
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = cost(left), cost(right)
    for _ in range(20):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = cost(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = cost(right)
    return (low + high) / 2


def level_bound(s: torch.Tensor) -> float:
    """Used by benchmarks and tests: return an upper bound of sigma, on 0..255, of Gaussian noise.

    It needs the score s alone: 1/mean(s^2) = sigma^2/(1 - mmse/sigma^2), mmse that of the best
    estimate. No training of the level is needed, and a score network that gives less than sigma
    here has not learnt its score.
    """
    return float(255 * s.double().square().mean() ** -0.5)
