"""Sixteen blocks of a set of images: what error bars, extrapolation and resuming are made of.

Image i belongs to block_of(n)[i], a function of i alone. Each run of 16 images is dealt to the 16
blocks in a random order of its own: the blocks differ by at most one image, each holds its share of
every class where the images come sorted by class, and none is in step with classes that come in
turn (i mod 10), as both contiguous blocks and i mod 16 would be.
"""

import math

import torch

from genmodels.kernels.philox import philox

__all__ = ["BLOCKS", "block_of", "jackknife"]

BLOCKS = 16
_KEY = 0x626C6F636B  # of this permutation, shared with no seed of images


def block_of(count):
    """Return the block of each of `count` images, int64 (count,) in 0..15."""
    groups = -(-count // BLOCKS)
    group, lane = torch.arange(groups).reshape(-1, 1), torch.arange(BLOCKS).reshape(1, -1)
    zero = torch.zeros(groups, BLOCKS, dtype=torch.int64)
    words = philox(zero + _KEY, zero + group, zero + lane, zero, zero)
    return ((words[0] << 31) | (words[1] >> 1)).argsort(dim=1).flatten()[:count]


def jackknife(value, without, sizes):
    """Return (standard error, value freed of its bias of order 1/n) of a statistic of n images.

    With h_g = n / n_g the pseudo-values are p_g = h_g value - (h_g - 1) without_g; the second
    result is G value - sum_g (1 - 1/h_g) without_g, and the variance the mean over g of
    (p_g - that)^2 / (h_g - 1).

    Args:
        value: on all images.
        without: on all but those of block g, one number for each of G blocks.
        sizes: n_g, images in each block.

    Reference: Busing, Meijer and van der Leeden 1999, "Delete-m jackknife for unequal m",
        Statistics and Computing 9; for equal blocks Quenouille 1956.
    """
    without, sizes = (torch.as_tensor(v, dtype=torch.float64) for v in (without, sizes))
    share = sizes / sizes.sum()
    corrected = float(len(sizes) * value - ((1 - share) * without).sum())
    pseudo = value / share - (1 / share - 1) * without
    variance = ((pseudo - corrected).square() / (1 / share - 1)).mean()
    return math.sqrt(float(variance)), corrected
