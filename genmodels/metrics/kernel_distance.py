"""Kernel distance: the unbiased squared MMD of two sets of features under a cubic kernel.

    k(x, y) = (x . y / D + 1)^3

Unlike a Frechet distance its estimate has no bias at any n; it can fall below zero.

Reference: Binkowski, Sutherland, Arbel and Gretton 2018, arXiv 1801.01401, section 4 (KID).
"""

import numpy as np
import torch

from genmodels.kernels.mmd import leave_one_out, mmd
from genmodels.kernels.pairwise import polynomial_sums
from genmodels.metrics.features import check_rows

__all__ = ["kernel_distance", "kernel_distance_deviations", "kernel_distance_subsets"]


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Return (distance, its standard error) over all pairs of rows; nothing is drawn at random.

    Memory grows with N, not with N^2. The error is the jackknife over single rows of both sets.

    Args:
        a: (N,D) float32 or float64 rows, N >= 3. b: (M,D) rows, M >= 3.

    Raises:
        ValueError: fewer rows, different D, values that are not finite.

    Reference: Binkowski et al. 2018, arXiv 1801.01401, equation 4; Gretton et al., JMLR 2012,
        lemma 6 (the estimator).
    """
    return kernel_distance_deviations(a, b)[:2]


def kernel_distance_deviations(
    a: torch.Tensor, b: torch.Tensor
) -> tuple[float, float, torch.Tensor]:
    """Return kernel_distance(a, b) and numbers (N + M,) whose squares add up to its variance.

    They are linear in the distance: those of two sets of paired images, against one b, differ by
    those of the difference of the distances.
    """
    a, b = _checked_pair(a, b, 3, "kid")
    between = polynomial_sums(a, b, columns=True)  # both directions from one product
    sums = (polynomial_sums(a), polynomial_sums(b), *between)
    value, stderr = mmd(*sums)
    _, parts = leave_one_out(*sums)
    scaled = [((len(p) - 1) / len(p)) ** 0.5 * (p - p.mean()) for p in parts]
    return float(value), float(stderr), torch.cat(scaled).cpu()


def kernel_distance_subsets(
    a: torch.Tensor, b: torch.Tensor, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Return (mean, standard deviation) of the distance over random subsets, the older protocol.

    Subsets are drawn as torch-fidelity 0.4 draws them (numpy's RandomState, without replacement,
    first from a, then from b), so that its figures are met on equal rows. The spread is that of one
    subset of this size, no error bar of the mean.

    Args:
        a, b: (N,D) and (M,D) rows, N and M >= size.
        subsets, size, seed: number of draws, rows in each, and their seed.

    Raises:
        ValueError: fewer rows than size, different D, values that are not finite.
    """
    a, b = _checked_pair(a, b, size, "kid_subsets")
    random = np.random.RandomState(seed)
    draws = []
    for _ in range(subsets):
        x = a[torch.from_numpy(random.choice(len(a), size, replace=False)).to(a.device)]
        y = b[torch.from_numpy(random.choice(len(b), size, replace=False)).to(b.device)]
        xy = polynomial_sums(x, y)
        draws.append(float(mmd(polynomial_sums(x), polynomial_sums(y), xy, xy)[0]))
    return float(np.mean(draws)), float(np.std(draws))


def _checked_pair(
    a: torch.Tensor, b: torch.Tensor, least: int, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both sets, checked, in the dtype they share."""
    if min(len(a), len(b)) < least:
        raise ValueError(
            f"metrics={name}: needs at least {least} images on each side, got {len(a)} and {len(b)}"
        )
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"features must have one dimension, got {a.shape[1]} and {b.shape[1]}")
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return check_rows(a).to(dtype), check_rows(b).to(dtype)
