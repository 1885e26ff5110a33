"""Frechet distance between the Gaussians fitted to two sets of features.

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2

Features stream through `Moments` (float64 sums, mergeable); the root term needs no matrix root: its
trace is the sum of the singular values of A1^T A2 for any factors S = A A^T.

Reference: Dowson and Landau 1982 (the formula); Heusel et al. 2017, arXiv 1706.08500, eq. 6 (FID).
"""

import warnings
from dataclasses import dataclass

import torch

from genmodels.metrics.features import check_rows

__all__ = ["Frechet", "Moments", "frechet_distance"]


class Moments:
    """Count, mean and covariance of rows that arrive in batches.

    Three float64 sums (`count`, `total`, `outer`), so the result does not depend on how the rows
    were split over batches or processes beyond rounding (about 1e-12 relative). Sums are taken of
    x - shift: pass a rough mean (of the reference, say) as `shift` where the mean is large against
    the spread, else the subtraction in `cov` cancels digits.

    Args:
        shift: (D,) or None for zero. Any value gives the same moments up to rounding.
    """

    def __init__(self, shift=None):
        self.shift = None if shift is None else torch.as_tensor(shift).double()
        self.count = 0
        self.total = None
        self.outer = None

    @classmethod
    def from_stats(cls, mean, cov, count):
        """Return moments with the given mean (D,), covariance (D,D; n - 1) and count n."""
        mean, cov = check_rows(torch.as_tensor(mean)[None], "mean")[0], check_rows(cov, "cov")
        if cov.shape != (len(mean), len(mean)):
            raise ValueError(f"cov must be {len(mean)} x {len(mean)} as mean, got {cov.shape}")
        moments = cls(shift=mean)
        moments.count = int(count)
        moments.total, moments.outer = torch.zeros_like(mean), cov * (moments.count - 1)
        return moments

    def update(self, features):
        """Add rows (N,D), in place; return self.

        Raises:
            ValueError: not (N,D), another D than before, or a value that is not finite; nothing is
                added then.
        """
        rows = check_rows(features)
        dim = rows.shape[1]
        if self.shift is None:
            self.shift = rows.new_zeros(dim)
        if len(self.shift) != dim:
            raise ValueError(
                f"features must have dimension {len(self.shift)} as before, got {dim}: "
                "one Moments holds the features of one net"
            )
        if self.total is None:
            self.shift = self.shift.to(rows.device)
            self.total, self.outer = rows.new_zeros(dim), rows.new_zeros(dim, dim)
        rows = rows - self.shift
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        self.outer.addmm_(rows.T, rows)
        return self

    def merge(self, other):
        """Add the rows another Moments has seen, in place; return self. Shifts may differ.

        Raises:
            ValueError: the other one holds features of another dimension.
        """
        if other.count == 0:
            return self
        if self.shift is None:
            self.shift = other.shift
        if len(self.shift) != len(other.shift):
            raise ValueError(
                f"features must have dimension {len(self.shift)} to be merged, "
                f"got {len(other.shift)}: one Moments holds the features of one net"
            )
        if self.total is None:
            self.total, self.outer = torch.zeros_like(other.total), torch.zeros_like(other.outer)
        # With y = x - other.shift and d = other.shift - self.shift, x - self.shift = y + d.
        move = other.shift - self.shift
        cross = torch.outer(other.total, move)
        self.outer += other.outer + cross + cross.T + other.count * torch.outer(move, move)
        self.total += other.total + other.count * move
        self.count += other.count
        return self

    @property
    def mean(self):
        """The mean, (D,) float64."""
        self._needs(1)
        return self.shift + self.total / self.count

    @property
    def cov(self):
        """The covariance with denominator n - 1, (D,D) float64."""
        self._needs(2)
        cov = (self.outer - torch.outer(self.total, self.total) / self.count) / (self.count - 1)
        return (cov + cov.T) / 2

    def _needs(self, count):
        if self.count < count:
            raise ValueError(f"num must be >= {count}, got {self.count}: score more images")


@dataclass(frozen=True)
class Frechet:
    """A Frechet distance and its parts; float(...) gives the value.

    Args:
        value: the squared distance, >= 0 (rounding below zero is cut off).
        mean_term: |m1 - m2|^2.
        cov_term: tr S1 + tr S2 - 2 tr (S1 S2)^1/2.
        singular: a covariance has no full rank (n <= D, or features that do not vary), so the root
            was taken on its range only.
    """

    value: float
    mean_term: float
    cov_term: float
    singular: bool

    def __float__(self):
        return self.value


def frechet_distance(first, second):
    """Return the `Frechet` distance between two `Moments`.

    The estimate from n rows is biased upwards by a term of order 1/n: compare equal n only. With
    n <= D the covariance has rank n - 1; a UserWarning says so and the result is flagged.

    Raises:
        ValueError: fewer than two rows, or features of different dimension.

    Reference: Heusel et al. 2017, arXiv 1706.08500, eq. 6; bias: Chong and Forsyth 2020,
        arXiv 1911.07023.
    """
    mean1, mean2, cov1, cov2 = first.mean, second.mean, first.cov, second.cov
    if mean1.shape != mean2.shape:
        raise ValueError(
            f"features must have one dimension on both sides, got {len(mean1)} and {len(mean2)}: "
            "statistics of another net?"
        )
    num, dim = min(first.count, second.count), len(mean1)
    if num <= dim:
        warnings.warn(
            f"a Frechet distance from {num} images in {dim} dimensions: with n <= D a covariance "
            "is singular and the distance far too large; use more images or smaller features",
            stacklevel=2,
        )
    root, singular = _root_trace(cov1, cov2, singular=num <= dim)
    mean_term = float((mean1 - mean2).square().sum())
    cov_term = float(cov1.trace() + cov2.trace() - 2 * root)
    return Frechet(max(0.0, mean_term + cov_term), mean_term, cov_term, singular)


def _root_trace(cov1, cov2, singular=False):
    """Return tr (cov1^1/2 cov2 cov1^1/2)^1/2 and whether a covariance was singular."""
    lower1, lower2 = _cholesky(cov1), _cholesky(cov2)
    if not singular and lower1 is not None and lower2 is not None:
        # Similar to cov1 cov2, symmetric: real eigenvalues, in a fifth of the time of an SVD.
        product = lower1.T @ cov2 @ lower1
        return torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum(), False
    # The root of an eigenvalue of rounding size would be 1e-8: singular values have no such loss.
    return torch.linalg.svdvals(_factor(cov1).T @ _factor(cov2)).sum(), True


def _cholesky(cov):
    """Return L with L L^T = cov, or None where cov is singular within rounding."""
    lower, failed = torch.linalg.cholesky_ex(cov)
    pivots = lower.diagonal().square()
    floor = len(cov) * torch.finfo(cov.dtype).eps * cov.diagonal().max()
    return None if failed or pivots.min() <= floor else lower


def _factor(cov):
    """Return A (D,r) with A A^T = cov, r its rank; eigenvalues of rounding size are cut to zero."""
    values, vectors = torch.linalg.eigh(cov)
    keep = values > len(cov) * torch.finfo(cov.dtype).eps * values[-1].clamp(min=0)
    return vectors[:, keep] * values[keep].sqrt()
