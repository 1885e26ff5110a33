"""Level and law of the noise of one picture: closed-form fields, real pictures."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from genmodels.noise import LAWS
from genmodels.noise.levels import (
    TooFew,
    _precision,
    law_from_score,
    level_bound,
    level_from_patches,
    level_jvp,
    level_tv,
    pick_law,
    power_from_score,
    variance_power,
)

SET12 = Path(os.environ.get("GENMODELS_DATA", "nowhere")) / "denoise/Set12"
real = pytest.mark.skipif(not SET12.exists(), reason="no $GENMODELS_DATA/denoise/Set12 here")


def noisy(x, law, level, index=0):
    """The stated rule: numpy's default_rng([seed, index])."""
    return torch.from_numpy(LAWS[law].sample(x, level, np.random.default_rng([0, index])))


def photographs(names, folder=SET12):
    for index, path in enumerate(sorted(folder.glob("*.png"))):
        if not names or path.stem in names:
            yield index, np.asarray(Image.open(path), float) / 255


class Blocks:
    """Clean blocks of equal pixels, each 0.5 + tau n, in noise of sigma: a Gaussian y.

    The posterior variance of a pixel is tau^2 sigma^2/(sigma^2 + side^2 tau^2).
    """

    def __init__(self, side, tau=0.15, sigma=25 / 255):
        self.side, self.tau2, self.sigma2 = side, tau**2, sigma**2
        rng = np.random.default_rng(0)
        x = 0.5 + tau * rng.standard_normal((1, 256 // side, 256 // side))
        x = x.repeat(side, 1).repeat(side, 2)
        self.y = torch.from_numpy(x + sigma * rng.standard_normal(x.shape))
        self.mmse = self.tau2 * self.sigma2 / (self.sigma2 + side**2 * self.tau2)
        self.bound = 255 * (self.sigma2 / (1 - self.mmse / self.sigma2)) ** 0.5

    def score(self, y):
        """-(sigma^2 I + tau^2 1 1^T)^-1 (y - 0.5), a block at a time."""
        n = self.side**2
        mean = F.avg_pool2d(y - 0.5, self.side).repeat_interleave(self.side, -1)
        mean = mean.repeat_interleave(self.side, -2)
        return -(y - 0.5 - n * self.tau2 / (self.sigma2 + n * self.tau2) * mean) / self.sigma2


@pytest.mark.parametrize("side", [1, 2, 8])
def test_bound_and_jvp_are_what_theory_says(side):
    """sigma^2/(1 - mmse/sigma^2) both, as J_ii = mmse/sigma^2 of a Gaussian y."""
    field = Blocks(side)
    assert field.bound > 25
    assert level_bound(field.score(field.y)) == pytest.approx(field.bound, rel=0.01)
    found = level_jvp(field.y, field.score, "gaussian")
    assert 24.999 < found < 1.01 * field.bound
    if side != 2:  # the median over the pixels of a small block is that of few random signs
        assert found == pytest.approx(field.bound, rel=0.01)
    t = _precision(field.y, field.score).mean()
    assert 255 * float(t) ** -0.5 == pytest.approx(field.bound, rel=0.01)


def test_a_wrong_score_shows_in_the_bound():
    """Scores too large ask for less noise than there is; that is what the bound can tell."""
    field = Blocks(8)
    assert level_bound(1.2 * field.score(field.y)) < 25 < level_bound(field.score(field.y))


def test_total_variation_finds_sigma():
    """At sigma the inside of a block is smooth; with no structure (side 1) all is taken away."""
    field = Blocks(8)
    assert level_tv(field.y, field.score(field.y), "gaussian") == pytest.approx(25, rel=2e-3)
    field = Blocks(1)
    total = 255 * (field.tau2 + field.sigma2) ** 0.5
    s = field.score(field.y)
    assert level_tv(field.y, s, "gaussian", 5, 80) == pytest.approx(total, rel=2e-3)
    assert level_tv(field.y, s, "gaussian", 5, 40) == pytest.approx(40, rel=2e-3)  # the end


RAMP = 0.2 + 0.7 * (torch.arange(256, dtype=torch.float64).expand(1, 256, 256) / 255)
FLAT = torch.full((1, 256, 256), 0.5, dtype=torch.float64)
KNOWN = {  # the score of noise around a known x, y -> d/dy log p(y|x), and its level
    "gaussian": (20, lambda y, x: -(y - x) / (20 / 255) ** 2),
    "poisson": (0.01, lambda y, x: ((x / 0.01).log() - torch.digamma(y / 0.01 + 1)) / 0.01),
    "gamma": (50, lambda y, x: 49 / y - 50 / x),
}


@pytest.mark.parametrize("law", KNOWN)
@pytest.mark.parametrize("x", [FLAT, RAMP], ids=["flat", "ramp"])
def test_law_and_level_around_a_known_picture(law, x):
    """Where x does not change with y, the assumption of the closed forms holds."""
    level, known = KNOWN[law]
    y = noisy(x.numpy(), law, level)

    def score(y):
        return known(y, x)

    assert level_jvp(y, score, law) == pytest.approx(level, rel=1e-3)
    assert level_jvp(y, score, LAWS[law]) == level_jvp(y, score, law)
    rho = {"gaussian": 0, "poisson": 1, "gamma": 2}[law]
    assert power_from_score(y, score) == pytest.approx(rho, abs=0.03)
    assert law_from_score(y, score) == law
    torch.testing.assert_close(LAWS[law].estimate(y, score(y), level), x, rtol=1e-6, atol=1e-6)


def test_power_of_few_counts():
    """4 to 18 counts a pixel, where rho/(2 y^2) is a twentieth of t."""

    def score(y):
        return ((RAMP / 0.05).log() - torch.digamma(y / 0.05 + 1)) / 0.05

    y = noisy(RAMP.numpy(), "poisson", 0.05)
    assert power_from_score(y, score) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("law", KNOWN)
def test_penalties_find_the_level_of_flat_pictures(law):
    level, known = KNOWN[law]
    y = noisy(FLAT.numpy(), law, level)
    assert level_tv(y, known(y, FLAT), law) == pytest.approx(level, rel=0.02)


@pytest.mark.parametrize("law", ["rayleigh", "lognormal"])
def test_laws_without_an_estimator_are_named(law):
    y = FLAT[:, :16, :16]
    with pytest.raises(ValueError, match=f"law={law}: its level is estimated for gaussian, poiss"):
        level_jvp(y, lambda y: -y, law)
    with pytest.raises(ValueError, match=f"law={law}: its level is estimated for gaussian, poiss"):
        level_tv(y, -y, law)
    with pytest.raises(ValueError, match="law=speckle: choose from gaussian, poisson, gamma, exp"):
        level_from_patches(y, "speckle")


@pytest.mark.parametrize(
    ("law", "level"),
    [
        ("gaussian", 25),
        ("poisson", 0.01),
        ("gamma", 50),
        ("inverse_gaussian", 40),
        ("nakagami", 9),
        ("lognormal", 0.1),
    ],
)
def test_patches_of_a_smooth_picture(law, level):
    """Colour as well, and black parts, which have no noise under most laws, do not mislead."""
    x = RAMP.repeat(3, 1, 1).numpy().copy()
    found = level_from_patches(noisy(x, law, level), law)
    assert found == pytest.approx(level, rel=0.06)
    x[:, :100] = 0
    found = level_from_patches(noisy(x, law, level), LAWS[law])
    assert found == pytest.approx(level, rel=0.06)


def test_patches_of_few_counts():
    """1 to 5 counts a pixel; then hardly a patch without black: at least a level."""
    assert level_from_patches(noisy(0.3 * RAMP.numpy(), "poisson", 0.05), "poisson") == (
        pytest.approx(0.05, rel=0.03)
    )
    assert 0.025 < level_from_patches(noisy(0.1 * RAMP.numpy(), "poisson", 0.05), "poisson") < 0.1


def test_noise_that_cannot_be_measured_is_not_taken_for_none():
    y = noisy(FLAT[:, :16, :16].numpy(), "gaussian", 25)
    with pytest.raises(TooFew, match="too few patches without structure .*; give the level"):
        level_from_patches(y, "gaussian")


def test_a_level_beyond_the_law_is_found_as_it_is():
    y = noisy(RAMP.numpy(), "gaussian", 0.02)
    assert level_from_patches(y, "gaussian") == pytest.approx(0.02, rel=0.1)


def test_pictures_with_nothing_to_measure():
    for y, message in [
        (torch.zeros(1, 64, 64), "no noise to measure"),
        (FLAT, "no noise to measure"),
        (FLAT[:, :8], "needs 15 x 15 pixels, got 8 x 256; give the level"),
    ]:
        with pytest.raises(ValueError, match=f"level=auto: .*{message}"):
            level_from_patches(y, "gaussian")
    with pytest.raises(
        ValueError, match="law=auto: needs 15 x 15 pixels, got 8 x 256; name the law"
    ):
        pick_law(FLAT[:, :8])
    assert variance_power(torch.zeros(1, 64, 64)) == 0 and pick_law(FLAT) == "gaussian"


@real
@pytest.mark.parametrize(
    ("law", "level", "mean"),
    [
        ("gaussian", 15, 0.03),
        ("gaussian", 25, 0.03),
        ("gaussian", 50, 0.03),
        ("poisson", 0.01, 0.05),
        ("poisson", 0.05, 0.05),
        ("gamma", 100, 0.05),
        ("gamma", 50, 0.05),
    ],
)
def test_patches_and_law_of_photographs(law, level, mean):
    """The error of the level on average; the law of each."""
    errors, laws = [], []
    for index, x in photographs({"01", "03", "05", "07"}):
        y = noisy(x, law, level, index)
        errors.append(abs(level_from_patches(y, law) / level - 1))
        laws.append(pick_law(y))
    assert np.mean(errors) < mean and laws == [law] * 4


@real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "level", "set12", "bsd68", "right"),
    [
        ("gaussian", 15, 0.05, 0.05, 1),
        ("gaussian", 25, 0.05, 0.05, 1),
        ("gaussian", 50, 0.05, 0.05, 1),
        ("poisson", 0.01, 0.05, 0.07, 0.95),
        ("poisson", 0.05, 0.05, 0.05, 0.95),
        ("gamma", 100, 0.05, 0.08, 0.95),
        ("gamma", 50, 0.05, 0.08, 0.95),
    ],
)
def test_all_photographs(law, level, set12, bsd68, right):
    """Mean error of the level on Set12 and BSD68, share of laws that are right; -s prints them.

    The aim is 5 %. BSD68 misses it with Poisson 0.01 (6.9 % measured) and Gamma (6 to 7.4 %): of
    a few pictures no part is smoother than their noise.
    """
    for folder, most in (("Set12", set12), ("BSD68", bsd68)):
        noise = [noisy(x, law, level, i) for i, x in photographs((), SET12.parent / folder)]
        found = np.array([level_from_patches(y, law) / level for y in noise])
        picked = np.mean([pick_law(y) == law for y in noise])
        error = abs(found - 1)
        print(
            f"\n{folder} {law} {level}: {len(noise)} pictures, mean error {error.mean():.1%}, "
            f"bias {found.mean() - 1:+.1%}, worst {error.max():.1%}, law right {picked:.1%}"
        )
        assert error.mean() < most and picked >= right


@real
@pytest.mark.parametrize("sigma", [15, 25])
def test_photographs_cut_off_at_black_and_white(sigma):
    """8-bit files: the noise that was cut off is left out, else it would pull the level down."""
    for index, x in photographs({"03", "05", "07"}):
        y = (noisy(x, "gaussian", sigma, index).clamp(0, 1) * 255).round() / 255
        assert level_from_patches(y, "gaussian") == pytest.approx(sigma, rel=0.05)
        assert pick_law(y) == "gaussian"
