"""Power-function averages and those made of them afterwards, against closed forms and integrals."""

import math

import numpy as np
import pytest

from genmodels.checkpoint import ema

# Measured with the program of the paper's authors.
EXPONENTS = {
    0.015: 63.658934,
    0.05: 16.972199,
    0.075: 10.289116,
    0.10: 6.937204,
    0.15: 3.557869,
    0.20: 1.826214,
    0.25: 0.719824,
}
TARGETS = (0.015, 0.025, 0.075, 0.15, 0.20, 0.25)
ERRORS = {  # of profiles made of N evenly spaced averages of the widths 0.05 and 0.10
    8: (0.37, 0.16, 0.013, 0.033, 0.078, 0.18),
    16: (0.21, 0.068, 3.5e-3, 9.0e-3, 0.023, 0.079),
    32: (0.080, 0.021, 9.0e-4, 2.3e-3, 6.5e-3, 0.034),
    64: (0.023, 5.5e-3, 2.3e-4, 5.8e-4, 1.7e-3, 0.015),
    256: (1.5e-3, 3.5e-4, 1.4e-5, 3.6e-5, 1.1e-4, 2.7e-3),
}
ALONE = (0.20, 0.09, 0.03, 0.07, 0.09, 0.14)  # of 64 of the width 0.05


def kept(count, widths=(0.05, 0.10), steps=2048):
    """(step, sigma_rel) of the averages of a training."""
    return [(steps // count * (i + 1), width) for i in range(count) for width in widths]


NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)


def average(theta, sigma_rel, end):
    """The average of a function of time at an end, by Gauss-Legendre quadrature."""
    u, g = (NODES + 1) / 2, ema.exponent(sigma_rel)  # u = (t / end)^(g + 1)
    return (WEIGHTS / 2 * theta(end * u ** (1 / (g + 1)))).sum()


@pytest.mark.parametrize("sigma_rel", EXPONENTS)
def test_exponents(sigma_rel):
    g = ema.exponent(sigma_rel)
    assert g == pytest.approx(EXPONENTS[sigma_rel], abs=1e-6)
    assert math.sqrt((g + 1) / (g + 3)) / (g + 2) == pytest.approx(sigma_rel, rel=1e-12)
    mean = average(lambda t: t, sigma_rel, 1.0)
    deviation = math.sqrt(average(lambda t: t**2, sigma_rel, 1.0) - mean**2)
    assert 1 - mean == pytest.approx(1 / (g + 2), rel=1e-5)  # the mean age
    assert deviation == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize(
    "n, results", [(10, (0.9829586952, 0.9315390399)), (100, (0.9521415953, 0.8930420428))]
)
def test_steps_of_the_average(n, results):
    """Step i of n counts (i / n)^(g + 1) - ((i - 1) / n)^(g + 1)."""
    for sigma_rel, result in zip((0.05, 0.10), results):
        g, value = ema.exponent(sigma_rel), 123.0
        for i in range(1, n + 1):
            value += ema.share_of_step(i, g) * (i / n - value)
        i = np.arange(1, n + 1)
        exact = (((i / n) ** (g + 1) - ((i - 1) / n) ** (g + 1)) * i / n).sum()
        assert value == pytest.approx(exact, rel=1e-14) == pytest.approx(result, abs=1e-10)


def test_float32_holds_over_many_steps():
    n, g = 100_000, ema.exponent(0.10)
    shares = np.array([ema.share_of_step(i, g) for i in range(1, n + 1)])
    assert shares[0] == 1
    single, exact = np.float32(0), 0.0
    for i, share in enumerate(shares.tolist(), 1):
        single += np.float32(share) * (np.float32(i / n) - single)
        exact += share * (i / n - exact)
    assert single == pytest.approx(exact, rel=3e-6)


def test_products_of_profiles_are_integrals():
    first, second = [(7.0, 3.0), (5.0, 17.0)], [(5.0, 1.5), (7.0, 4.0), (9.0, 0.7)]
    t = (np.arange(2_000_000) + 0.5) * 1e-5 / 2
    found = ema.profile_products(first, second)

    def profile(end, g):
        return np.where(t < end, (g + 1) * t**g / end ** (g + 1), 0)

    for i, a in enumerate(first):
        for j, b in enumerate(second):
            exact = (profile(*a) * profile(*b)).sum() * 1e-5 / 2
            assert found[i, j] == pytest.approx(exact, rel=1e-4)


def test_an_average_that_was_kept_is_found_again():
    times = kept(16)
    for k in (0, 9, 31):
        up_to = [average for average in times if average[0] <= times[k][0]]
        weights, error = ema.weights_of(up_to, *times[k])
        assert abs(weights - np.eye(len(up_to))[k]).max() < 4e-14 and error < 1e-6
    weights, _ = ema.weights_of(times, 2048, 0.2)
    assert weights.sum() == pytest.approx(1, abs=1e-14)  # so weights that stay are met


@pytest.mark.parametrize("count", ERRORS)
def test_errors_of_profiles(count):
    for sigma_rel, expected in zip(TARGETS, ERRORS[count]):
        _, error = ema.weights_of(kept(count), 2048, sigma_rel)
        assert error == pytest.approx(expected, rel=0.06), sigma_rel


def test_one_width_alone_is_worth_little():
    for sigma_rel, expected in zip(TARGETS, ALONE):
        _, error = ema.weights_of(kept(64, (0.05,)), 2048, sigma_rel)
        assert error == pytest.approx(expected, rel=0.15), sigma_rel


@pytest.mark.parametrize("sigma_rel, bound", [(0.075, 1.6e-5), (0.20, 1.7e-4)])
def test_weights_that_swing(sigma_rel, bound):
    """Those of sin(12 pi t / T) from 32 times: far nearer than the profile's error says."""
    end, times = 2048, kept(32)

    def theta(t):
        return np.sin(12 * math.pi * t / end)

    weights, _ = ema.weights_of(times, end, sigma_rel)
    values = np.array([average(theta, width, step) for step, width in times])
    error = abs(weights @ values - average(theta, sigma_rel, end)) / 0.5**0.5
    assert error < 1.2 * bound
