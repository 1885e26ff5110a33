"""CMMD: the squared MMD of normalised features under a Gaussian kernel.

    CMMD = 1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),
    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma = 10, |x| = |y| = 1

The means run over all pairs, a row with itself among them (a V-statistic): never below zero, and
too large by about 10 / n. Published figures are of CLIP's ViT-L/14 at 336 pixels.

Reference: Jayasumana et al. 2024, "Rethinking FID", arXiv 2401.09603, section 4.
"""

import torch

from genmodels.kernels.pairwise import rbf_sums
from genmodels.metrics.features import check_rows

__all__ = ["cmmd"]

SIGMA = 10.0
SCALE = 1000.0


def cmmd(rows: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the CMMD of two sets of features, >= 0; at most 1000 (2 - 2 exp(-1 / 50)) = 39.6.

    Args:
        rows: (N,D), N >= 1.
        reference: (M,D), M >= 1.

    Raises:
        ValueError: no rows, different D, values that are not finite, a row of zeros, which has no
            direction.

    Reference: Jayasumana et al. 2024, arXiv 2401.09603, equation 5.
    """
    x, y = _directions(rows, "rows"), _directions(reference, "reference")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features must have one dimension, got {x.shape[1]} and {y.shape[1]}")
    # rbf_sums leaves the pair of a row with itself out; its kernel is 1.
    within = [
        float((rbf_sums(z, bandwidth=SIGMA).double().sum() + len(z)) / len(z) ** 2) for z in (x, y)
    ]
    between = float(rbf_sums(x, y, bandwidth=SIGMA).double().sum()) / (len(x) * len(y))
    return max(0.0, SCALE * (sum(within) - 2 * between))


def _directions(rows: torch.Tensor, name: str) -> torch.Tensor:
    """Return the rows at length 1, float64."""
    rows = check_rows(rows, name)
    norms = rows.norm(dim=1, keepdim=True)
    if len(rows) == 0 or not (norms > 0).all():
        raise ValueError(
            f"metrics=cmmd: {name} must be some rows none of which is zero; zero features have no "
            "direction, choose another metric or other features"
        )
    return rows / norms
