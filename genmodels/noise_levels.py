"""How strong the noise of one picture is, and of which law, from the picture or from its score.

A law is one of noise.LAWS or its name; y is one picture on [0, 1], unclipped, (C, H, W) or (H, W).
level_from_patches and pick_law need nothing but the picture; the others need the score of y.
"""

import torch
from torch.nn import functional as F

from genmodels.noise import LAWS

PATCH = 5  # the side of a patch; its PATCH^2 eigenvalues are those of pure noise, but for a few
MOST_PATCHES = 60_000
GOLDEN = (5**0.5 - 1) / 2


def _name(law):
    return next(name for name, entry in LAWS.items() if law == name or law is entry)


def _planes(y):
    """Return the channels of a picture as pictures of their own, float64 (C, 1, H, W)."""
    y = torch.as_tensor(y).double()
    return y.reshape(-1, 1, *y.shape[-2:])


def _patches(planes, side, stride):
    """Return (N, side^2)."""
    return F.unfold(planes, side, stride=stride).transpose(1, 2).reshape(-1, side * side)


def _roughness(patches, side):
    """Return the sum of squared neighbour differences in each patch, (N,)."""
    p = patches.reshape(-1, side, side)
    return p.diff(dim=1).square().sum((1, 2)) + p.diff(dim=2).square().sum((1, 2))


def _noise_roughness(side):
    """Return mean and standard deviation of the roughness of unit Gaussian noise."""
    d = torch.eye(side, dtype=torch.float64).diff(dim=0)
    eye = torch.eye(side, dtype=torch.float64)
    quadratic = torch.kron(eye, d.T @ d) + torch.kron(d.T @ d, eye)
    return quadratic.trace().item(), (2 * quadratic.square().sum()).sqrt().item()


def _patch_std(patches):
    """Return the noise's standard deviation from the eigenvalues of the patch covariance.

    Structure fills few directions, noise all of them alike: the largest eigenvalues are left out
    until mean and median of the rest agree. Reference: Chen, Zhu and Heng 2015, ICCV.
    """
    patches = patches - patches.mean(0)
    values = torch.linalg.eigvalsh(patches.T @ patches / (len(patches) - 1)).clamp(min=0)
    for count in range(len(values), 1, -1):
        mean, median = values[:count].mean(), values[:count].median()
        if mean <= median:
            break
    return float(mean.sqrt())


def level_from_patches(y, law, smoothest=2.5):
    """Return the level of the noise in a picture, within what the law accepts.

    In the law's state domain the noise is of one size. Its standard deviation comes from the patch
    covariance, of all patches first, then of those that are no rougher than noise of that size.

    Args:
        y: the picture; at least 32 pixels high and wide, else the level is not worth much.
        law: of LAWS, or its name.
        smoothest: a patch is kept up to so many standard deviations above noise's own roughness.

    Raises:
        ValueError: a picture too small, or without noise (constant where it is not black).

    Reference: after Liu, Tanaka and Okutomi 2013 (weak texture), Chen, Zhu and Heng 2015.
    """
    law = LAWS[_name(law)]
    planes = _planes(y)
    count = planes.shape[0] * planes.shape[2] * planes.shape[3]
    stride = max(1, round((count / MOST_PATCHES) ** 0.5))
    if min(planes.shape[2:]) < 2 * PATCH:
        raise ValueError(f"level=auto: a picture of {tuple(planes.shape[2:])} pixels is too small")
    rough, spread = _noise_roughness(PATCH)
    pixels = _patches(planes, PATCH, stride)
    level, std = law.low if law is LAWS["poisson"] else (law.low * law.high) ** 0.5, None
    for _ in range(8):
        patches = law.to_state(pixels, level)
        if std is None:  # black has no noise, nor has a part cut off at white
            live = _roughness(patches, PATCH) > 0
            if law.positive:
                live &= pixels.amin(1) > 0
        keep = live
        if std is not None:
            keep = live & (_roughness(patches, PATCH) < std**2 * (rough + smoothest * spread))
        if law is LAWS["poisson"]:  # below some counts the root evens out no more
            bright = keep & (pixels.mean(1) > 4 * level)
            keep = bright if bright.sum() >= 4 * PATCH**2 else keep
        if keep.sum() < 4 * PATCH**2:
            break
        last, std = std, _patch_std(patches[keep])
        level = law.from_state_std(max(std, 1e-6))
        level = min(max(level, law.low), law.high)
        if last and abs(std / last - 1) < 1e-3:
            break
    if not std:
        raise ValueError("level=auto: the picture has no noise to measure; give the level")
    return level
