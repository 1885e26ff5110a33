"""Noise of every law made Gaussian of one level, and levels that a model does not know."""

import numpy as np
import pytest
import torch

from genmodels.noise import LAWS
from genmodels.noise.laws import LOG
from genmodels.noise.poisson_gaussian import PoissonGaussian, sample
from genmodels.noise.stabilise import CAMERA, SPAN, UNITS, contrast, stabilised

LEVELS = {
    "gaussian": 25.0,
    "poisson": 0.02,
    "gamma": 20.0,
    "exponential": 1.0,
    "nakagami": 5.0,
    "rayleigh": 1.0,
    "lognormal": 0.1,
    CAMERA: PoissonGaussian.of_camera(0.02, 0.1, 0.03),
}


def noisy(law, x):
    rng = np.random.default_rng(0)
    if law == CAMERA:
        return sample(x, 0.02, 0.1, 0.03, rng)
    return LAWS[law].sample(x, LEVELS[law], rng)


def test_the_laws_that_a_gaussian_model_restores():
    assert set(UNITS) == set(LEVELS) and next(iter(UNITS)) == "gaussian"
    assert set(LAWS) - set(UNITS) == {"inverse_gaussian"}  # whose unbiased way back has no form
    assert all((row.mean_log is None) == (row.state is not LOG) for row in LAWS.values())


@pytest.mark.parametrize("law", LEVELS)
def test_noise_is_of_one_known_size_and_its_mean_leads_back(law):
    """Of constants, by a million draws: no model, no picture."""
    domain = stabilised(law, LEVELS[law])
    dark = np.exp(-SPAN) if law in LAWS and LAWS[law].state is LOG else 0.0
    ends = torch.tensor([dark, 1.0], dtype=torch.float64)
    assert domain.forward(ends).tolist() == pytest.approx([0, 1], abs=1e-6)
    for x in (0.3, 0.9):
        w = domain.forward(torch.from_numpy(noisy(law, np.full(1_000_000, x))))
        assert float(w.std()) * 255 == pytest.approx(domain.level, rel=0.02), x
        # Lognormal and Rayleigh's x is no mean of y; the way back gives x all the same.
        back = float(domain.inverse(w.mean())) - (0.1 if law == CAMERA else 0)
        assert back == pytest.approx(x, rel=5e-3), x


def test_the_plain_way_back_of_a_mean_would_be_dark():
    """What the unbiased inverse is for: at 1 count the algebraic one misses a sixth of it."""
    domain = stabilised("poisson", 0.2)
    counts = LAWS["poisson"].sample(np.full(400_000, 0.2), 0.2, np.random.default_rng(1))
    y = torch.from_numpy(counts)
    state = y.add(3 / 8 * 0.2).sqrt().mean()
    assert 0.2 - float(state**2 - 3 / 8 * 0.2) > 0.03
    assert float(domain.inverse(domain.forward(y).mean())) == pytest.approx(0.2, abs=0.004)


def test_noise_that_hardly_grows_is_gaussian():
    domain = stabilised(CAMERA, PoissonGaussian(1e-7, 1e-2))
    y = torch.linspace(-1, 2, 9)
    assert torch.equal(domain.forward(y), y) and torch.equal(domain.inverse(y), y)
    assert domain.level == pytest.approx(25.5, rel=1e-4)


# ---- levels beyond the trained range ------------------------------------------------------------
@pytest.mark.parametrize(
    ("level", "wanted"),
    [
        (25, (1, 25, 1)),
        (8, (1, 8, 1)),
        (55, (1, 55, 1)),
        (4, (2, 8, 1)),
        (5, (1.6, 8, 1)),
        (2, (2.5, 5, 1)),
        (1, (2.5, 5, 0.25)),
        (0.5, (2.5, 5, 0.0625)),
        (80, (0.5, 40, 1)),
        (160, (0.25, 40, 1)),
    ],
)
def test_the_rule(level, wanted):
    assert contrast(level, 5, 40 / 0.74) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("level", "wanted"),
    [(0.3, (1, 1, 0.09)), (0.8, (1, 1, 0.64)), (1, (1, 1, 1)), (3, (1, 3, 1)), (80, (0.5, 40, 1))],
)
def test_the_rule_of_a_model_that_knows_weak_noise(level, wanted):
    assert contrast(level, 1, 40 / 0.74) == pytest.approx(wanted)


def test_the_rule_of_a_model_of_one_level():
    assert contrast(24, 25, 25) == (1, 24, 1) and contrast(27, 25, 25) == (1, 27, 1)
    assert contrast(10, 25, 25) == pytest.approx((2.5, 25, 1))
    assert contrast(50, 25, 25) == pytest.approx((0.5, 25, 1))
    factor, told, share = contrast(2, 25, 25)
    assert (factor, told) == (2.5, 25) and share == pytest.approx(0.04)


def test_the_rule_tells_a_level_that_is_known_or_blends():
    for level in np.geomspace(0.1, 255, 200):
        factor, told, share = contrast(level, 5, 54)
        assert 0.9 * 5 <= told <= 1.1 * 54 and 0 < share <= 1 and factor <= 2.5
        assert share < 1 or told == pytest.approx(factor * level)  # what is told is what is there
