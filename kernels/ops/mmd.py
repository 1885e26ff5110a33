"""Squared maximum mean discrepancy from row sums of a kernel, with its standard error.

    sum_{i != i'} k(x_i, x_i') / (n (n - 1)) + (the same in y) - 2 sum_{i, j} k(x_i, y_j) / (n m)

the unbiased estimator of Gretton et al., "A kernel two-sample test", JMLR 2012, lemma 6. Deleting a
vector changes the sums (pairwise.py) by its own row, so every leave-one-out value, and with them
the jackknife error (Efron and Stein, 1981), follows without any resampling.
"""

from torch import Tensor

__all__ = ["leave_one_out", "mmd"]


def mmd(xx: Tensor, yy: Tensor, xy: Tensor, yx: Tensor) -> tuple[Tensor, Tensor]:
    """Return (unbiased squared MMD, its jackknife standard error), two float64 scalars.

    Args:
        xx, yy: row sums of the kernel within x (N,) and within y (M,), without i = j.
        xy, yx: row sums between them: over y for each x (N,), over x for each y (M,).

    Raises:
        ValueError: with fewer than three vectors in a set.
    Reference: Gretton et al., JMLR 2012, lemma 6; Efron and Stein 1981 for the jackknife.
    """
    value, parts = leave_one_out(xx, yy, xy, yx)
    variance = sum(
        (len(part) - 1) / len(part) * (part - part.mean()).square().sum() for part in parts
    )
    return value, variance.sqrt()


def leave_one_out(
    xx: Tensor, yy: Tensor, xy: Tensor, yx: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return (unbiased squared MMD, (that without x_i, (N,), that without y_j, (M,))).

    Arguments and errors as for mmd.
    """
    n, m = len(xx), len(yy)
    if n < 3 or m < 3:
        raise ValueError(f"mmd: needs at least three vectors in each set, got {n} and {m}")
    a, b, c = xx.sum(), yy.sum(), xy.sum()
    value = a / (n * (n - 1)) + b / (m * (m - 1)) - 2 * c / (n * m)
    without_x = (
        (a - 2 * xx) / ((n - 1) * (n - 2)) + b / (m * (m - 1)) - 2 * (c - xy) / ((n - 1) * m)
    )
    without_y = (
        a / (n * (n - 1)) + (b - 2 * yy) / ((m - 1) * (m - 2)) - 2 * (c - yx) / (n * (m - 1))
    )
    return value, (without_x, without_y)
