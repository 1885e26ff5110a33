"""Frechet distance between the Gaussians fitted to two sets of features.

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2

Features stream through `Moments` (float64 sums, mergeable); the root term needs no matrix root: its
trace is the sum of the singular values of A1^T A2 for any factors S = A A^T. With n <= D rows the
rows are such a factor, X^T / sqrt(n - 1), and no covariance is built. Moments of 16 blocks of the
images give the distance its error bar and its limit for infinitely many images.

Reference: Dowson and Landau 1982 (the formula); Heusel et al. 2017, arXiv 1706.08500, eq. 6 (FID).
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from genmodels.metrics.errorbars import jackknife, jackknife_deviations
from genmodels.metrics.features import check_rows

__all__ = ["BlockFrechet", "Frechet", "Moments", "RootTrace", "block_frechet", "frechet_distance"]


class Moments:
    """Count, mean and covariance of rows that arrive in batches.

    Float64 sums (`count`, `total`, `outer`), so the result does not depend on how the rows were
    split over batches or processes beyond rounding (about 1e-12 relative). Sums are taken of
    x - shift: pass a rough mean (of the reference, say) as `shift` where the mean is large against
    the spread, else the subtraction in `cov` cancels digits.

    While there are no more than D of them the rows themselves are kept: they are smaller than
    their covariance, which is singular then and is never built.

    Args:
        shift: (D,) or None for zero. Any value gives the same moments up to rounding.
    """

    def __init__(self, shift: torch.Tensor | None = None):
        self.count = 0
        # Tensors from the first rows on, when their dimension is known.
        self.shift: Any = None if shift is None else torch.as_tensor(shift).double()
        self._kept: list[torch.Tensor] = []  # rows less shift, in the batches they came in
        self._total: Any = None  # sums, once there are more rows than dimensions
        self._outer: Any = None

    @classmethod
    def from_stats(cls, mean: torch.Tensor, cov: torch.Tensor, count: int) -> "Moments":
        """Return moments with the given mean (D,), covariance (D,D; n - 1) and count n."""
        mean, cov = check_rows(torch.as_tensor(mean)[None], "mean")[0], check_rows(cov, "cov")
        if cov.shape != (len(mean), len(mean)):
            raise ValueError(f"cov must be {len(mean)} x {len(mean)} as mean, got {cov.shape}")
        moments = cls(shift=mean)
        moments.count = int(count)
        moments._total, moments._outer = torch.zeros_like(mean), cov * (moments.count - 1)
        return moments

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], shift: torch.Tensor) -> "Moments":
        """Return the moments that `arrays` describes, of rows less this shift, on its device."""
        moments = cls(shift)
        moments.count = int(arrays["count"])
        device = moments.shift.device
        if "kept" in arrays:
            moments._kept = [torch.as_tensor(arrays["kept"], device=device)]
        else:
            moments._total = torch.as_tensor(arrays["total"], device=device)
            moments._outer = torch.as_tensor(arrays["outer"], device=device)
        return moments

    def arrays(self) -> dict[str, Any]:
        """Return what there is beside the shift: count, and the kept rows or total and outer."""
        if self.keeps_rows:
            return {"count": self.count, "kept": torch.cat(self._kept)}
        return {"count": self.count, "total": self.total, "outer": self.outer}

    def to(self, device: torch.device | str) -> "Moments":
        """Return the same moments on another device."""
        moved = Moments(None if self.shift is None else self.shift.to(device))
        moved.count = self.count
        moved._kept = [rows.to(device) for rows in self._kept]
        if self._outer is not None:
            moved._total, moved._outer = self._total.to(device), self._outer.to(device)
        return moved

    def update(self, features: torch.Tensor) -> Self:
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
        if not self.count:
            self.shift = self.shift.to(rows.device)
        self._add(rows - self.shift)
        return self

    def _add(self, rows: torch.Tensor) -> None:
        """Add rows less shift."""
        if self._outer is None and self.count + len(rows) <= rows.shape[1]:
            self._kept.append(rows)
        else:
            self._sum_up()
            self._total += rows.sum(dim=0)
            self._outer.addmm_(rows.T, rows)
        self.count += len(rows)

    def _sum_up(self) -> None:
        """Go over from kept rows to sums."""
        if self._outer is None:
            self._total, self._outer = self.total, self.outer
            self._kept = []

    @property
    def total(self) -> Any:
        """The sum of the rows less shift, (D,) float64."""
        if self._total is not None or self.shift is None:
            return self._total
        total = torch.zeros_like(self.shift)
        for rows in self._kept:
            total += rows.sum(dim=0)
        return total

    @property
    def outer(self) -> Any:
        """The sum of the outer products of the rows less shift, (D,D) float64."""
        if self._outer is not None or self.shift is None:
            return self._outer
        outer = self.shift.new_zeros(len(self.shift), len(self.shift))
        for rows in self._kept:
            outer.addmm_(rows.T, rows)
        return outer

    def merge(self, other: "Moments") -> Self:
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
        # With y = x - other.shift and d = other.shift - self.shift, x - self.shift = y + d.
        move = other.shift - self.shift
        few = self._outer is None and other._outer is None
        if few and self.count + other.count <= len(self.shift):
            self._kept += [rows + move for rows in other._kept] if move.any() else other._kept
            self.count += other.count
            return self
        self._sum_up()
        total = other.total
        self._outer += other.outer
        self._total += total
        if move.any():
            cross = torch.outer(total, move)
            self._outer += cross + cross.T + other.count * torch.outer(move, move)
            self._total += other.count * move
        self.count += other.count
        return self

    def without(self, part: "Moments") -> "Moments":
        """Return the moments of the rows that are not in `part`, all of which these have seen.

        Args:
            part: with the same shift.
        """
        left = Moments(self.shift)
        left.count = self.count - part.count
        left._total, left._outer = self.total - part.total, self.outer - part.outer
        return left

    @property
    def mean(self) -> torch.Tensor:
        """The mean, (D,) float64."""
        self._check_count(1)
        return self.shift + self.total / self.count

    @property
    def cov(self) -> torch.Tensor:
        """The covariance with denominator n - 1, (D,D) float64."""
        self._check_count(2)
        total = self.total
        cov = (self.outer - torch.outer(total, total) / self.count) / (self.count - 1)
        return (cov + cov.T) / 2

    @property
    def keeps_rows(self) -> bool:
        """Whether there are rows and all of them are kept."""
        return self._outer is None and self.count > 0

    @property
    def factor(self) -> torch.Tensor | None:
        """A (n,D) with A^T A = cov, as long as the rows are kept; None afterwards."""
        self._check_count(2)
        if not self.keeps_rows:
            return None
        rows = torch.cat(self._kept)
        return (rows - rows.mean(dim=0)) / math.sqrt(self.count - 1)

    def _check_count(self, count: int) -> None:
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

    def __float__(self) -> float:
        return self.value


def frechet_distance(
    first: Moments, second: Moments, *, root: "RootTrace | None" = None
) -> Frechet:
    """Return the `Frechet` distance between two `Moments`.

    The estimate from n rows is biased upwards by a term of order 1/n: compare equal n only. With
    n <= D the covariance has rank n - 1; a UserWarning says so and the result is flagged.

    Args:
        first, second: Moments.
        root: RootTrace(second.cov), where several sets are compared with one.

    Raises:
        ValueError: fewer than two rows, or features of different dimension.

    Reference: Heusel et al. 2017, arXiv 1706.08500, eq. 6; bias: Chong and Forsyth 2020,
        arXiv 1911.07023.
    """
    mean1, mean2 = first.mean, second.mean
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
    root = root or RootTrace(second)
    trace, own, singular = root(first, singular=num <= dim)
    mean_term = float((mean1 - mean2).square().sum())
    cov_term = float(own + root.trace - 2 * trace)
    return Frechet(max(0.0, mean_term + cov_term), mean_term, cov_term, singular)


class RootTrace:
    """tr (S1^1/2 S2 S1^1/2)^1/2 for a fixed S2, whose factor is computed once.

    Args:
        second: Moments with the covariance S2.
    """

    def __init__(self, second: Moments):
        self.few = second.factor  # (n,D) of n <= D rows
        self.cov = second.cov if self.few is None else None
        self.lower = None if self.cov is None else _cholesky(self.cov)
        self.trace = _trace(self.few, self.cov)

    def __call__(
        self, first: Moments, singular: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Return the trace of the root, tr S1, and whether S1 or S2 was singular.

        Args:
            first: Moments with the covariance S1.
            singular: known to be so.
        """
        few = first.factor
        cov = first.cov if few is None else None
        own = _trace(few, cov)
        regular = not singular and cov is not None and self.lower is not None
        if regular and _cholesky(cov) is not None:
            # Similar to S1 S2, symmetric: real eigenvalues, in a fifth of the time of an SVD.
            product = self.lower.T @ cov @ self.lower
            return torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum(), own, False
        # The root of an eigenvalue of rounding size would be 1e-8: singular values lose no digits.
        one = few if cov is None else _factor(cov).T
        return torch.linalg.svdvals(one @ self._factor()).sum(), own, True

    def _factor(self) -> torch.Tensor:
        """Return A (D,r) with A A^T = S2."""
        if self.few is not None:
            return self.few.T
        return _factor(self.cov) if self.lower is None else self.lower


@dataclass(frozen=True)
class BlockFrechet:
    """A Frechet distance with what the blocks of its first set say about it.

    Args:
        value: the distance from all n images.
        stderr: its jackknife standard error, the second set taken as given; None if 15/16 n <= D.
        limit: the distance for infinitely many images, "FID-infinity"; None if n/2 <= D.
        limit_stderr: its standard error.
        sizes, values: number of images and mean distance, for n and smaller unions of blocks.
        deviations: 16 numbers whose squares add up to stderr^2; those of two sets of paired images
            may be subtracted.
    """

    value: float
    stderr: float | None = None
    limit: float | None = None
    limit_stderr: float | None = None
    sizes: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    deviations: tuple[float, ...] = ()

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the limit, (low, high); ValueError where there is no limit."""
        if self.limit is None or self.limit_stderr is None:
            raise ValueError(
                "the limit of a Frechet distance needs more than twice as many images as the "
                "features have dimensions; give a larger num"
            )
        margin = _T * self.limit_stderr
        return self.limit - margin, self.limit + margin


_SMALL = 256  # dimensions whose covariances cost nothing
_T = 2.131450  # 97.5 % point of Student's t with 15 degrees of freedom: 16 blocks


def block_frechet(
    blocks: Sequence[Moments],
    reference: Moments,
    *,
    curve: bool = False,
    root: RootTrace | None = None,
    tick: Callable[[], object] | None = None,
) -> BlockFrechet:
    """Return the `BlockFrechet` of 16 `Moments`, one for each block of images, and a reference.

    Of one `Moments` alone it is the value without an error bar.

    The limit is where E FD(n) = a + b/n + c/n^2 through three means meets 1/n = 0: all n images,
    those that leave out one block (16 distances), and halves (8 distances: four ways of splitting
    the blocks in two). What the blocks' own chance does to the distance in first order cancels in
    each mean, so the extrapolation costs hardly any variance; a line through nested sets of n/2 and
    n images has twice the variance, and a line alone a bias of order 1/n^2 that shows where n is
    not many times D. With J the jackknife's correction of order 1/n and H = 2 FD(n) - mean FD(n/2),
    a = J + 8/7 (J - H).

    Args:
        blocks: 16 Moments with one shift (or none).
        reference: Moments taken as given, as in the published protocols.
        curve: also compute the mean distances from n/4, n/8 and n/16 images, for a plot.
        root: RootTrace(reference), where several sets are compared with it.
        tick: called after each of up to 25 distances (and those of the curve).

    Reference: Chong and Forsyth 2020, arXiv 1911.07023 (extrapolation in 1/n); Quenouille 1956,
        Biometrika 43, and Schucany, Gray and Owen 1971, JASA 66 (jackknife of two orders).
    """
    whole = merged(blocks)
    root = root or RootTrace(reference)

    def distance(part: Moments) -> float:
        found = frechet_distance(part, reference, root=root).value
        if tick:
            tick()
        return found

    value = distance(whole)
    counts = [block.count for block in blocks]
    n, dim = whole.count, len(whole.mean)
    few = reference.count <= dim or min(counts) == 0 or n - max(counts) <= dim
    if few or len(blocks) == 1:
        return BlockFrechet(value)
    without = [distance(_without(blocks, out, whole)) for out in blocks]
    stderr, once = jackknife(value, without, counts)
    deviations = tuple(jackknife_deviations(value, without, counts).tolist())
    sizes, values = [n, n * 15 / 16], [value, sum(without) / 16]
    splits = [
        [[b for i, b in enumerate(blocks) if (i >> bit) % 2 == side] for side in (0, 1)]
        for bit in range(4)
    ]
    if min(sum(b.count for b in half) for split in splits for half in split) <= dim:
        return BlockFrechet(
            value, stderr, sizes=tuple(sizes), values=tuple(values), deviations=deviations
        )
    halves = [(distance(merged(one)) + distance(merged(other))) / 2 for one, other in splits]
    sizes, values = [*sizes, n / 2], [*values, sum(halves) / 4]
    limit = once + 8 / 7 * (once - (2 * value - values[-1]))
    spread = 8 / 7 * float(torch.tensor(halves).double().std()) / 2
    for number in (4, 2, 1) if curve else ():
        parts = [blocks[i : i + number] for i in range(0, 16, number)]
        if min(sum(b.count for b in part) for part in parts) > dim:
            sizes.append(n * number / 16)
            values.append(sum(distance(merged(part)) for part in parts) / len(parts))
    error = math.hypot(stderr, spread)
    return BlockFrechet(value, stderr, limit, error, tuple(sizes), tuple(values), deviations)


def merged(blocks: Sequence[Moments]) -> Moments:
    """Return the Moments of all the blocks, summed in their order."""
    whole = Moments()
    for block in blocks:
        whole.merge(block)
    return whole


def _without(blocks: Sequence[Moments], out: Moments, whole: Moments) -> Moments:
    """Return the Moments of all blocks but one."""
    if not out.keeps_rows or len(whole.mean) <= _SMALL:
        return merged([block for block in blocks if block is not out])
    # Blocks that keep their rows would be multiplied out anew for each of the 16.
    return whole.without(out)


def _trace(factor: torch.Tensor | None, cov: torch.Tensor | None) -> torch.Tensor:
    """Return the trace of a covariance, given itself or A (n,D) with A^T A = cov."""
    if factor is not None:
        return factor.square().sum()
    assert cov is not None
    return cov.trace()


def _cholesky(cov: torch.Tensor) -> torch.Tensor | None:
    """Return L with L L^T = cov, or None where cov is singular within rounding."""
    lower, failed = torch.linalg.cholesky_ex(cov)
    pivots = lower.diagonal().square()
    floor = len(cov) * torch.finfo(cov.dtype).eps * cov.diagonal().max()
    return None if failed or pivots.min() <= floor else lower


def _factor(cov: torch.Tensor) -> torch.Tensor:
    """Return A (D,r) with A A^T = cov, r its rank; eigenvalues of rounding size are cut to zero."""
    values, vectors = torch.linalg.eigh(cov)
    keep = values > len(cov) * torch.finfo(cov.dtype).eps * values[-1].clamp(min=0)
    return vectors[:, keep] * values[keep].sqrt()
