"""The loss by noise level, and the law of noise levels that it suggests, against closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy.integrate import quad

import genmodels
from genmodels.methods.by_level import LossByLevel, suggested_law
from tests.helpers.gaussian import Gaussian
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY

DIGITS = str(ROOT / "configs" / "edm_digits.yaml")


def gathered(count, c, *words, net=None):
    """Return {sigma: loss} of the exact denoiser of N(0, c^2) on `count` images of such data."""
    model = genmodels.build(DIGITS, *TINY, *words).train()
    model._trainer = SimpleNamespace(datamodule=None)  # as in a training
    model.net = net or Gaussian(c)
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * c
    batch = {"image": x, "label": torch.full((count,), -1), "n": torch.arange(count)}
    for part in range(0, count, 4000):
        model.loss({key: value[part : part + 4000] for key, value in batch.items()})
    found = {float(sigma): loss for sigma, loss in model.by_level.read().items()}
    return {sigma: loss for sigma, loss in found.items() if loss is not None}, model


def within(low, high, c, sigma_data=0.75, p_mean=-1.2, p_std=1.2):
    """E[w(s) c^2 s^2 / (c^2 + s^2)] over ln s ~ N(p_mean, p_std^2) between two of its z."""

    def loss(z):
        s = math.exp(p_mean + p_std * z)
        return (s**2 + sigma_data**2) / (s * sigma_data) ** 2 * c**2 * s**2 / (c**2 + s**2)

    def density(z):
        return math.exp(-(z**2) / 2)

    weighted = quad(lambda z: loss(z) * density(z), low, high)[0]
    return weighted / quad(density, low, high)[0]


@pytest.mark.parametrize("c", [0.3, 2.0])
def test_of_gaussian_data_it_is_the_closed_form(c):
    found, model = gathered(8000, c)
    assert list(found) == pytest.approx(
        [math.exp(-1.2 + 1.2 * z) for z in torch.arange(-2.25, 2.5, 0.5).tolist()], rel=5e-3
    )
    for k, loss in enumerate(found.values()):
        low, high = -2.5 + 0.5 * k, -2 + 0.5 * k
        low, high = (-8 if k == 0 else low), (8 if k == 9 else high)
        share = (math.erf(high / 2**0.5) - math.erf(low / 2**0.5)) / 2
        expected = within(low, high, c)
        # A mean over share x 8000 x 64 squares of normals; levels within a part spread it too.
        assert abs(loss / expected - 1) < 4 * math.sqrt(2 / (share * 8000 * 64)) + 0.01, k
    assert set(model.by_level.read().values()) == {None}  # begun anew


def test_of_data_as_wide_as_sigma_data_it_is_one_and_nothing_is_suggested():
    found, _ = gathered(4000, 0.75)
    assert list(found.values()) == pytest.approx([1.0] * 10, abs=0.08)
    assert suggested_law({sigma: 1.0 for sigma in found}) is None


def test_levels_of_other_preconditionings():
    """VE trains at ln sigma uniform in [ln 0.02, ln 100]; with p_std=0 there is one level."""
    model = genmodels.build(DIGITS, *TINY, "method.precond=ve")
    found, _ = gathered(500, 0.5, "method.precond=ve", net=model.net)
    assert len(found) == 10 and 0.02 < min(found) < 0.04 and 50 < max(found) < 100
    found, _ = gathered(100, 0.5, "method.p_std=0")
    assert len(found) == 1 and list(found) == pytest.approx([math.exp(-1.2)], rel=0.03)


def test_losses_that_are_not_finite_do_not_count():
    levels = LossByLevel()
    levels.cut(0.01, 100)
    levels.add(torch.tensor([0.01, 0.01, 100]), torch.tensor([2.0, math.nan, math.inf]))
    assert list(levels.read().values()) == [2.0, *[None] * 9]


@pytest.mark.parametrize("mean, std", [(-1.2, 1.2), (-0.4, 0.8), (0.3, 0.5)])
def test_a_bump_of_a_normal_law_suggests_that_law(mean, std):
    """Where 1 - L is a normal density times a constant, its mean and deviation are known."""
    levels = [-6 + 0.3 * k for k in range(41)]
    fallen = [0.4 * math.exp(-((x - mean) ** 2) / (2 * std**2)) for x in levels]
    profile = {math.exp(x): 1 - share for x, share in zip(levels, fallen)}
    assert suggested_law(profile) == pytest.approx((mean, std), rel=1e-3)


def test_what_rose_counts_nothing():
    profile = {0.1: 3.0, 1.0: 0.5, 10**0.5: 0.5, 10.0: 0.5, 100.0: 7.0}
    half = math.log(10) / 2
    assert suggested_law(profile) == pytest.approx((half, half * (2 / 3) ** 0.5))


def test_a_fall_at_one_level_or_two_says_nothing_of_a_law():
    assert suggested_law({0.1: 1.0, 1.0: 0.5, 10.0: 0.995, 100.0: 1.2}) is None
    assert suggested_law({0.1: 1.0, 1.0: 0.5, 10.0: 0.5, 100.0: 1.2}) is None
