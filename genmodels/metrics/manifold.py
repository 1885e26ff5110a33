"""Scores from nearest neighbours: two-sample accuracy, precision and recall, memorisation.

Distances are Euclidean, in blocks of rows: memory grows with N, not with N^2. Two-sample accuracy
and memorisation compute them in float64; precision, recall, density and coverage in the rows' own
precision, as the published code does.
"""

from collections.abc import Iterator

import torch

from genmodels.kernels.pairwise import ball_count, knn_radius
from genmodels.metrics.features import check_rows

__all__ = [
    "LEAST_HELD_OUT",
    "density_coverage",
    "memorised",
    "nn1",
    "nn1_sides",
    "precision_recall",
]

_BLOCK = 2**24  # distances held at a time: 128 MB
_QUANTILE = 0.05
LEAST_HELD_OUT = 20  # rows, for `memorised`: 1 / _QUANTILE


def nn1(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the leave-one-out accuracy of a 1-nearest-neighbour classifier that tells a from b.

    Every row of the pooled 2N rows is classified by its nearest other row. 0.5 = the sets cannot be
    told apart (exactly (N - 1) / (2N - 1) on average for equal laws); 1 = apart, or one of them
    has collapsed; towards 0 = the rows of one set are copies of the other's. Where several rows are
    equally near (duplicates), a row counts by the share of its own set among them.

    Two failures can cancel in it: rows of a that crowd around those of b (known as a: few) while b
    is known as b (all). Look at `nn1_sides` before calling 0.5 good.

    Args:
        a: (N,D) rows, N >= 2.
        b: (N,D) rows, as many: the accuracy of unequal sets would depend on their ratio.

    Raises:
        ValueError: different N or D, N < 2, values that are not finite.

    Reference: Lopez-Paz and Oquab 2017, arXiv 1610.06545, section 3; Xu et al. 2018,
        arXiv 1806.07755, section 2.
    """
    return sum(nn1_sides(a, b)) / 2


def nn1_sides(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Return the shares of a's rows and of b's rows that `nn1` classifies rightly; nn1 is the mean.

    Arguments and errors as for nn1. Reference: Xu et al. 2018, arXiv 1806.07755, section 2, where
    the two say what went wrong: both high = apart, a low and b high = a crowds around part of b.
    """
    a, b = check_rows(a), check_rows(b)
    if a.shape != b.shape:
        raise ValueError(
            f"nn1 needs two sets of one size and dimension, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}: set num to the size of the reference"
        )
    if len(a) < 2:
        raise ValueError(f"num must be >= 2 for nn1, got {len(a)}: score more images")
    pool = torch.cat([a, b])
    pool = pool - pool.mean(dim=0)
    parts = []
    for start, distances in _distance_blocks(pool, pool):
        row = torch.arange(len(distances), device=pool.device)
        distances[row, start + row] = torch.inf
        nearest = distances <= distances.amin(dim=1, keepdim=True) + _tolerance(pool)
        of_a = nearest[:, : len(a)].sum(dim=1) / nearest.sum(dim=1)
        parts.append(torch.where(start + row < len(a), of_a, 1 - of_a))
    rightly = torch.cat(parts).double()
    return float(rightly[: len(a)].mean()), float(rightly[len(a) :].mean())


def memorised(samples: torch.Tensor, train: torch.Tensor, heldout: torch.Tensor) -> float:
    """Return the share of samples nearer to a training row than 95 % of held-out rows are.

    The threshold is the k-th smallest distance from a held-out row to its nearest training row,
    k = floor(0.05 * held-out rows); a sample at the threshold counts as near. A perfect generator
    gives about 0.05, copies of training rows give 1, samples far from all data give 0: a small
    value alone is no praise.

    Args:
        samples: (N,D) rows.
        train: (M,D) rows the generator was fitted to, all of them.
        heldout: (K,D) rows of the same law it has not seen, K >= 20.

    Raises:
        ValueError: different D, an empty set, K < 20, values that are not finite.

    Reference: the threshold form of the data-copying test of Meehan et al. 2020, arXiv 2004.05675.
    """
    samples, train = check_rows(samples, "samples"), check_rows(train, "train")
    heldout = check_rows(heldout, "heldout")
    if not samples.shape[1] == train.shape[1] == heldout.shape[1]:
        raise ValueError(
            "samples, train and heldout must have one dimension, got "
            f"{samples.shape[1]}, {train.shape[1]} and {heldout.shape[1]}"
        )
    if len(samples) == 0 or len(train) == 0 or len(heldout) < LEAST_HELD_OUT:
        raise ValueError(
            "memorised needs samples, training rows and at least "
            f"{LEAST_HELD_OUT} held-out rows, got {len(samples)}, {len(train)} and {len(heldout)}"
        )
    centre = train.mean(dim=0)
    samples, train, heldout = samples - centre, train - centre, heldout - centre
    rank = int(_QUANTILE * len(heldout) + 1e-9)
    threshold = _nearest(heldout, train).kthvalue(rank).values
    near = _nearest(samples, train) <= threshold + _tolerance(train)
    return float(near.double().mean())


def precision_recall(
    samples: torch.Tensor, real: torch.Tensor, k: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (precision, recall), each as a bool per row: (N,) of samples, (M,) of real rows.

    A sample is precise if it lies within the distance of some real row to its k-th nearest other
    real row; a real row is recalled if it lies so near to some sample. The means are the scores.

    Args:
        samples: (N,D) rows, N > k. real: (M,D) rows, M > k.
        k: 3 in the published protocols, 1..16.

    Raises:
        ValueError: too few rows, different D, values that are not finite.

    Reference: Kynkaanniemi et al. 2019, arXiv 1904.06991, equations 1 and 2.
    """
    _check_sets(samples, real, k, "prc")
    precise = ball_count(samples, real, knn_radius(real, k=k)) > 0
    recalled = ball_count(real, samples, knn_radius(samples, k=k)) > 0
    return precise, recalled


def density_coverage(
    samples: torch.Tensor, real: torch.Tensor, k: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (density, coverage), each per row: float64 (N,) of samples, bool (M,) of real rows.

    Density counts the real balls a sample lies in, over k (1 on average for equal laws); a real row
    is covered if a sample lies in its ball. Both are steadier against single outliers than
    precision and recall.

    Args:
        samples, real: as for precision_recall.
        k: 5 in the published protocol.

    Reference: Naeem et al. 2020, arXiv 2002.09797, equations 3 and 4.
    """
    _check_sets(samples, real, k, "density")
    radius = knn_radius(real, k=k)
    inside = ball_count(samples, real, radius)
    covered = ball_count(real, samples, radius, owner="x") > 0
    return inside.double() / k, covered


def _check_sets(samples: torch.Tensor, real: torch.Tensor, k: int, name: str) -> None:
    if min(len(samples), len(real)) <= k:
        raise ValueError(
            f"metrics={name}: needs more than {k} images on each side, got {len(samples)} and "
            f"{len(real)}"
        )
    if samples.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"features must have one dimension, got {samples.shape[1]} and {real.shape[1]}"
        )
    check_rows(samples, "samples")
    check_rows(real, "real")


def _nearest(queries: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Return (Q,) squared distances from each query to its nearest row of base."""
    return torch.cat([distances.amin(dim=1) for _, distances in _distance_blocks(queries, base)])


def _distance_blocks(
    queries: torch.Tensor, base: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first row, (rows,B) squared distances) over the queries, block by block."""
    rows = max(1, _BLOCK // len(base))
    norms = base.square().sum(dim=1)
    for start in range(0, len(queries), rows):
        part = queries[start : start + rows]
        distances = torch.addmm(norms, part, base.T, alpha=-2)
        yield start, distances.add_(part.square().sum(dim=1, keepdim=True)).clamp_(min=0)


def _tolerance(rows: torch.Tensor) -> torch.Tensor:
    """Return the squared distance below which two distances of centred rows count as equal.

    |x|^2 + |y|^2 - 2 xy rounds at about D * 1e-16 of the norms; float32 features do not resolve it.
    """
    return 1e-11 * rows.square().sum(dim=1).max()
