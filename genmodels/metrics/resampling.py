"""Error bars for any score, from random halves of the sets it was computed from."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Resampled", "resampled"]


@dataclass(frozen=True)
class Resampled:
    """A score on the full sets and the standard error of it."""

    value: float
    stderr: float


def resampled(metric, *sets, times=100, seed=0):
    """Return the `Resampled` value and standard error of metric(*sets).

    The value comes from the full sets. The standard error is the standard deviation of the metric
    over `times` draws of a random half of each set, without replacement. A mean over m of n rows
    has the conditional variance s^2 (1/m - 1/n), which at m = n/2 is s^2/n, the variance of the
    full mean: no factor is needed. (A bootstrap would put duplicates into nearest-neighbour
    scores.) Only the spread of the halves is used, never their level: a Frechet distance from half
    the rows is biased more. The error is cautious where a score is far from linear in its rows: for
    equal laws (360 rows, 10 dimensions) it came out 1.3 times the spread of fresh draws for nn1
    and 1.7 times for a Frechet distance; for laws clearly apart, 1.0 to 1.15 times.

    Args:
        metric: callable taking as many (N,D) tensors as there are sets, giving a number. Keep what
            must not be resampled (the training set of `memorised`) in a closure.
        sets: (N,D) tensors, N >= 4; each is halved on its own.
        times: number of draws, >= 2; the error of the error is about 1 / sqrt(2 * times).
        seed: of the draws.

    Raises:
        ValueError: times < 2, a set with fewer than four rows, or what the metric raises.

    Reference: Shao and Wu 1989, "A general theory for jackknife variance estimation" (delete-d).
    """
    if times < 2:
        raise ValueError(f"times must be >= 2, got {times}")
    if not sets or min(len(rows) for rows in sets) < 4:
        raise ValueError(
            f"resampled needs sets of at least 4 rows, got {[len(rows) for rows in sets]}"
        )
    value = float(metric(*sets))
    random = np.random.default_rng(seed)
    draws = []
    with warnings.catch_warnings():
        # What there is to say about small n was said about the full sets, or is about halves only.
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(times):
            picks = [random.permutation(len(rows))[: len(rows) // 2] for rows in sets]
            halves = [rows[torch.from_numpy(pick)] for rows, pick in zip(sets, picks)]
            draws.append(float(metric(*halves)))
    return Resampled(value, float(np.std(draws, ddof=1)))
