"""MIND: the sliced squared 2-Wasserstein distance of features.

    MIND = 3 D mean_theta W2^2(theta . x, theta . y),  theta uniform on the unit sphere

In one dimension W2^2 is the mean square of the differences of quantiles, which are the sorted
values. The factor brings it to the size of a Frechet distance: sets apart by m give 3 |m|^2.

Reference: Berthet et al. 2026, "MIND: Monge Inception Distance", arXiv 2605.06797.
"""

from functools import lru_cache

import torch

from genmodels.metrics.features import check_rows

__all__ = ["mind", "sliced_wasserstein", "wasserstein_1d"]

PROJECTIONS = 1000
_BLOCK = 1 << 24  # projected values held at a time: 128 MB


def mind(rows: torch.Tensor, reference: torch.Tensor) -> float:
    """Return MIND of two sets of features, >= 0, from 1000 projections drawn by seed 0.

    Args:
        rows: (N,D), N >= 1.
        reference: (M,D), M >= 1. Unequal numbers are compared by their quantiles, exactly.

    Raises:
        ValueError: no rows, different D, values that are not finite.

    Reference: Berthet et al. 2026, arXiv 2605.06797.
    """
    return 3 * rows.shape[1] * sliced_wasserstein(rows, reference)


def sliced_wasserstein(
    x: torch.Tensor, y: torch.Tensor, projections: int = PROJECTIONS, seed: int = 0
) -> float:
    """Return the mean of W2^2 of the projections of x (N,D) and y (M,D).

    Args:
        x, y: rows.
        projections: directions, uniform on the unit sphere.
        seed: of the directions.

    Raises:
        ValueError: as for mind.
    """
    x, y = check_rows(x, "rows"), check_rows(y, "reference")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features must have one dimension, got {x.shape[1]} and {y.shape[1]}")
    if not min(len(x), len(y)):
        raise ValueError("metrics=mind: needs images on each side; give some")
    directions = _directions(projections, x.shape[1], seed).to(x.device)
    total = 0.0
    for part in directions.split(max(1, _BLOCK // max(len(x), len(y)))):
        total += float(wasserstein_1d(part @ x.T, part @ y.T).sum())
    return total / projections


def wasserstein_1d(x: torch.Tensor, y: torch.Tensor, power: float = 2) -> torch.Tensor:
    """Return int_0^1 |F^-1(q) - G^-1(q)|^power dq of the samples in the rows of x and y, (B,).

    Args:
        x: (B,N). y: (B,M).
        power: 2: W2^2; 1: W1.
    """
    x, y = x.sort(dim=1).values, y.sort(dim=1).values
    n, m = x.shape[1], y.shape[1]
    if n == m:
        return (x - y).abs().pow(power).mean(dim=1)
    # Both quantile functions are constant between neighbours among the i / n and the j / m;
    # counted in steps of 1 / (n m) these are whole numbers.
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    widths = ends.diff(prepend=ends.new_zeros(1)).to(x) / (n * m)
    i, j = (ends - 1) // m, (ends - 1) // n
    return (x[:, i.to(x.device)] - y[:, j.to(x.device)]).abs().pow(power) @ widths


@lru_cache(maxsize=2)
def _directions(projections: int, dim: int, seed: int) -> torch.Tensor:
    """Return (projections, dim) unit vectors in float64, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(projections, dim, generator=generator, dtype=torch.float64)
    return draws / draws.norm(dim=1, keepdim=True)
