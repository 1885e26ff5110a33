"""Noise that neighbours share: of demosaiced, enlarged, registered or blurred pictures, of rows.

A denoiser of independent noise takes shared noise for structure, and estimates of the level from
small patches find too little of it.
"""

from torch import Tensor

from genmodels.noise.levels import PATCH, NoNoise, level_from_patches

WHITE = 1.3  # of correlation(): what white noise does not reach
ROWS = 2.5  # of row_noise()
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
