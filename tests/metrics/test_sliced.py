"""MIND against closed forms; one dimension against scipy and brute force."""

import numpy as np
import pytest
import torch

from genmodels.metrics.sliced import mind, sliced_wasserstein, wasserstein_1d


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_sets_apart_by_a_translation():
    """W2^2 is (theta . m)^2 in every direction, whose mean is |m|^2 / D."""
    x, m = normal(40, 6), torch.linspace(-1, 2, 6, dtype=torch.float64)
    truth = float(m.square().sum())
    # The relative deviation of (theta . m)^2 is below 2^0.5: of the mean of 1000, below 0.045.
    assert mind(x + m, x) == pytest.approx(3 * truth, rel=0.18)
    assert sliced_wasserstein(x + m, x, 50_000) == pytest.approx(truth / 6, rel=0.026)
    assert mind(x, x[torch.randperm(40)]) == pytest.approx(0, abs=1e-20)


def test_one_dimension_has_one_direction():
    x, y = normal(50, 1), 2 * normal(50, 1, seed=1) + 1
    truth = np.mean((np.sort(x[:, 0]) - np.sort(y[:, 0])) ** 2)
    assert mind(x, y) == pytest.approx(3 * truth, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(30, 30), (30, 45), (7, 64), (1, 5)])
def test_unequal_numbers_against_scipy_and_copies(n, m):
    from scipy.stats import wasserstein_distance

    x, y = normal(3, n), 1.5 * normal(3, m, seed=1) + 0.3
    first = wasserstein_1d(x, y, power=1)
    truth = [wasserstein_distance(a, b) for a, b in zip(x.numpy(), y.numpy())]
    np.testing.assert_allclose(first, truth, rtol=1e-12)
    # As many copies of each as make the numbers equal are the same two laws.
    copied = wasserstein_1d(x.repeat(1, m), y.repeat(1, n))
    torch.testing.assert_close(wasserstein_1d(x, y), copied, rtol=1e-12, atol=0)


def test_directions_are_uniform_and_seeded():
    """Scaled sets N(0, s^2) differ alike along every axis: only uniform directions see so."""
    x = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    turned, _ = torch.linalg.qr(normal(3, 3, seed=5))
    values = [sliced_wasserstein(x @ r, 2 * x @ r, 20_000) for r in (torch.eye(3).double(), turned)]
    assert values[0] == pytest.approx(values[1], rel=0.01)
    assert values[0] == pytest.approx(1 / 3, rel=0.01)  # mean of |theta_k|^2 over the axes
    a, b = normal(30, 4), normal(20, 4, seed=1)
    assert mind(a, b) == mind(a, b)
    assert sliced_wasserstein(a, b, seed=1) != sliced_wasserstein(a, b)


def test_refusals():
    with pytest.raises(ValueError, match="one dimension, got 3 and 2"):
        mind(normal(4, 3), normal(4, 2))
    with pytest.raises(ValueError, match="finite"):
        mind(normal(4, 3) / 0, normal(4, 3))
