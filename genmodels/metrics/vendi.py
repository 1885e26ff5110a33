"""Vendi score: how many different images a set is worth, no reference needed.

    VS = exp(-sum_i l_i log l_i),  l_i the eigenvalues of K / n,  K_ij = x_i . x_j, |x_i| = 1

From 1, all alike, to n, all orthogonal (and at most D). It says nothing of how real images are.

Reference: Friedman and Dieng 2023, "The Vendi score", arXiv 2210.02410, definition 3.1; the cosine
kernel of features is that of its section 5.
"""

import torch

from genmodels.metrics.features import check_rows

__all__ = ["vendi"]


def vendi(rows: torch.Tensor) -> float:
    """Return the Vendi score of features under the cosine kernel, in 1..min(N, D).

    The D x D matrix X^T X / n has the same eigenvalues as K / n beside zeros; the smaller of the
    two is taken.

    Args:
        rows: (N,D), N >= 1.

    Raises:
        ValueError: no rows, values that are not finite, a row of zeros, which has no direction.
    """
    rows = check_rows(rows)
    norms = rows.norm(dim=1, keepdim=True)
    if len(rows) == 0 or not (norms > 0).all():
        raise ValueError(
            "metrics=vendi: needs some rows none of which is zero; zero features have no "
            "direction, choose another metric or other features"
        )
    x = rows / norms
    n, dim = x.shape
    matrix = (x.T @ x if n > dim else x @ x.T) / n
    return float(torch.special.entr(torch.linalg.eigvalsh(matrix).clamp(min=0)).sum().exp())
