"""Error bars from random halves against textbook errors and fresh draws."""

import warnings

import numpy as np
import pytest
import torch

from genmodels.metrics.errorbars import resampled
from genmodels.metrics.frechet import Moments, frechet_distance
from genmodels.metrics.manifold import nn1


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def fd(a, b):
    return float(frechet_distance(Moments().update(a), Moments().update(b)))


def test_resampled_mean_has_the_known_error():
    x = 3 * normal(400, 1)
    result = resampled(lambda rows: rows.mean(), x, times=2000)
    assert result.value == float(x.mean())
    assert result.stderr == pytest.approx(float(x.std()) / 20, rel=0.06)
    y = normal(100, 1, seed=1)
    difference = resampled(lambda a, b: a.mean() - b.mean(), x, y, times=2000)
    truth = (float(x.var()) / 400 + float(y.var()) / 100) ** 0.5
    assert difference.stderr == pytest.approx(truth, rel=0.06)


def test_resampled_frechet_has_the_error_of_fresh_draws():
    def draw(k):
        return normal(200, 3, seed=k), 1.5 * normal(200, 3, seed=k + 1000) + 0.5

    fresh = np.std([fd(*draw(k)) for k in range(150)], ddof=1)
    errors = [resampled(fd, *draw(k), times=50).stderr for k in range(8)]
    assert np.mean(errors) == pytest.approx(fresh, rel=0.25)


def test_resampled_value_is_of_the_full_sets_and_seeded():
    a, b = normal(80, 50), normal(80, 50, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # halves have n <= D; the full sets do not
        first, again = (resampled(fd, a, b, times=5) for _ in range(2))
    assert first == again and first.value == fd(a, b)
    assert resampled(fd, a, b, times=5, seed=1).stderr != first.stderr
    seen = []
    resampled(lambda rows: seen.append(rows[:, 0].unique()) or 0, a, times=3)
    assert [len(rows) for rows in seen[1:]] == [40] * 3  # halves without a row twice


def test_resampled_refuses():
    with pytest.raises(ValueError, match="times must be >= 2, got 1"):
        resampled(nn1, normal(9, 2), normal(9, 2), times=1)
    with pytest.raises(ValueError, match=r"at least 4 rows, got \[9, 3\]"):
        resampled(nn1, normal(9, 2), normal(3, 2))
