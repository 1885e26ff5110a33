"""What neighbours share: noise of demosaiced, enlarged, blurred pictures, of rows; and texture.

A denoiser of independent noise takes shared noise for structure, and estimates of the level from
small patches find too little of it.
"""

import torch
from torch import Tensor

from genmodels.noise.levels import PATCH, NoNoise, level_and_patches, level_from_patches

WHITE = 1.3  # of correlation(): what white noise does not reach
ROWS = 2.5  # of row_noise()
# Of is_texture(), chosen on CBSD400. Texture found to be a level of 3 or more had a variance of
# 0.25 to 0.45 sigma^2 and a kurtosis of 3.2 to 5.7, but for one of 0.19 and 6.8. White noise of 3
# to 15 had a variance from 0.65, on texture from 0.43; noise in JPEG of quality 90 from 0.43, of 60
# to 80 a kurtosis from 6; noise blurred by .5 pixels 0.35 to 0.5, but a kurtosis of 2.9 to 3.15
# (3.3 on texture); noise blurred by .6, enlarged or demosaiced up to 0.25, most of it.
UNEVEN = (0.25, 0.4)
HEAVY = (3.15, 6.0)
SMALLEST = 6 * PATCH  # sides of a picture that correlation() says anything about


def correlation(w: Tensor) -> float:
    """Return q, the level of LL of the Haar transform of unit gain over the level: white noise 1.

    1 as well for pictures that are too small or show no noise.

    Args:
        w: pixels (C, H, W) whose noise is of one size, black 0 and white 1.
    """
    if min(w.shape[-2:]) < SMALLEST:
        return 1.0
    height, width = (size // 2 * 2 for size in w.shape[-2:])
    w = w[..., :height, :width].double()
    low = (w[..., ::2, ::2] + w[..., ::2, 1::2] + w[..., 1::2, ::2] + w[..., 1::2, 1::2]) / 2
    try:
        return level_from_patches(low, "gaussian") / level_from_patches(w, "gaussian")
    except NoNoise:
        return 1.0


def is_texture(w: Tensor) -> bool:
    """Return whether what level_from_patches finds of a picture is its texture, not noise.

    White noise has one variance, sigma^2, in every direction u of a patch p, and whatever filter
    it went through, u.p is Gaussian. Texture hardly reaches the direction of the finest detail,
    that of the least variance, and is strong in some places and weak in others. So it is texture if
    in that direction var(u.p) / sigma^2 is within UNEVEN and the kurtosis E(u.p)^4 / (E(u.p)^2)^2,
    3 of a Gaussian, within HEAVY. The other ends are there for noise: enlarging and demosaicing
    leave it next to nothing in that direction, and JPEG rounds most of what is there to 0, which
    makes the kurtosis larger still. False too for pictures too small or without noise.

    Args:
        w: pixels (C, H, W) whose noise would be of one size, black 0 and white 1.
    """
    if min(w.shape[-2:]) < SMALLEST:
        return False
    try:
        level, patches = level_and_patches(w, "gaussian")
    except NoNoise:
        return False
    patches = patches - patches.mean(0)
    finest = torch.linalg.eigh(patches.T @ patches)[1][:, 0]
    square = (patches @ finest).square()
    share = float(square.mean()) / (level / 255) ** 2
    kurtosis = float(square.square().mean() / square.mean().square().clamp(min=1e-300))
    return UNEVEN[0] < share < UNEVEN[1] and HEAVY[0] < kurtosis < HEAVY[1]


def row_noise(w: Tensor) -> float:
    """Return how much rows differ from the two beside them, in units of what white noise gives.

    The spread of the row medians of d = w[i] - (w[i-1] + w[i+1]) / 2 over that of the median of
    as many independent numbers like d; 0 for pictures too small or without noise.
    """
    if min(w.shape[-2:]) < SMALLEST:
        return 0.0
    w = w.double()
    d = w[..., 1:-1, :] - (w[..., :-2, :] + w[..., 2:, :]) / 2
    single = _spread(d) * 1.2533 / d.shape[-1] ** 0.5
    return float(_spread(d.median(dim=-1).values) / single) if single > 0 else 0.0


def _spread(values: Tensor) -> Tensor:
    """Return the median absolute deviation."""
    return (values - values.median()).abs().median()
