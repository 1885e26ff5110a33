"""Poisson-Gaussian noise: closed forms, sums over counts, and cameras whose truth is known."""

import math

import numpy as np
import pytest
import torch
from scipy.special import gammaln
from scipy.stats import norm

from genmodels.noise import LAWS
from genmodels.noise.levels import NoNoise, TooFew
from genmodels.noise.poisson_gaussian import (
    Blocks,
    PoissonGaussian,
    anscombe_inverse,
    fit_line,
    sample,
)

CAMERA = PoissonGaussian.of_camera(2, 100, 3)
RAMP = np.tile(np.linspace(0, 1, 512), (512, 1))


def of(values):
    return torch.as_tensor(values, dtype=torch.float64)


def mixture(x, gain, read):
    """Return (count, its probability) of the counts that matter for a signal x > 0."""
    n = np.arange(int(x / gain + 12 * math.sqrt(x / gain + 1) + 20))
    return n, np.exp(n * np.log(x / gain) - x / gain - gammaln(n + 1))


def test_the_line_of_a_camera():
    assert CAMERA.constant == 9 - 200 and CAMERA.black == 100 - 9 / 2
    assert CAMERA.deviation(100) == 3 and CAMERA.deviation(300) == pytest.approx(math.sqrt(409))
    assert CAMERA.deviation(20) == 0  # below black
    scaled = CAMERA.scaled(100, 500)
    assert scaled.deviation(0.5) == pytest.approx(CAMERA.deviation(300) / 400)
    assert CAMERA.times(2).deviation(300) == pytest.approx(2 * CAMERA.deviation(300))
    assert CAMERA.times(2).black == CAMERA.black


def test_state_and_way_back_of_one_pixel():
    z = CAMERA.to_state(of(200.0))
    assert float(z) == pytest.approx(14.508618, abs=1e-5)
    assert float(CAMERA.from_state(z)) == pytest.approx(200.529645, abs=1e-5)
    assert float(CAMERA.to_state(of(-50.0))) == 0
    assert float(CAMERA.from_state(of(0.0))) == CAMERA.black


@pytest.mark.parametrize(
    ("read", "x", "mean", "deviation", "error"),
    [  # in counts, by adaptive quadrature of another program
        (0, 0, 1.22474, 0, 0),
        (0, 1, 2.18691, 0.847, -0.0037),
        (0, 5, 4.52745, 1.001, 0.0082),
        (0, 30, 10.97725, 1.000, 0.0170),
        (1, 0, 2.16864, 0.976, -0.0254),
        (1, 1, 2.91169, 1.041, -0.0315),
        (1, 5, 4.94670, 1.0157, 0.0045),
        (1, 30, 11.15793, 1.0003, 0.0168),
    ],
)
def test_moments_of_the_state(read, x, mean, deviation, error):
    """A sum over counts and normal nodes here, against another integration's table."""
    n, p = mixture(x, 1, read) if x else (np.zeros(1), np.ones(1))
    nodes = np.linspace(-8, 8, 8001)
    weights = norm.pdf(nodes)
    y = of(n[:, None] + read * nodes)
    z = PoissonGaussian.of_camera(1, 0, read).to_state(y).numpy()
    share = p[:, None] * weights / weights.sum()
    found = (share * z).sum()
    assert found == pytest.approx(mean, abs=2e-5)
    assert math.sqrt((share * (z - found) ** 2).sum()) == pytest.approx(deviation, abs=6e-4)
    back = PoissonGaussian.of_camera(1, 0, read).from_state(of(found))
    assert float(back) - x == pytest.approx(error, abs=1e-4)


def test_without_offset_and_read_noise_it_is_poisson():
    y = of(np.arange(0, 40) * 0.03)
    s = of(np.linspace(-20, 20, 40))
    law, camera = LAWS["poisson"], PoissonGaussian(0.03, 0.0)
    torch.testing.assert_close(camera.to_state(y), law.to_state(y, 0.03) * 2 / 0.03**0.5)
    torch.testing.assert_close(camera.estimate(y, s), law.formula(y, s, 0.03))
    torch.testing.assert_close(camera.from_state(of([5.0])), 0.03 * anscombe_inverse(of([5.0])))


def test_shifts_and_scales_of_the_unit_change_nothing():
    y, s = of(np.linspace(80, 700, 50)), of(np.linspace(-0.05, 0.05, 50))
    shifted, scaled = PoissonGaussian.of_camera(2, 150, 3), PoissonGaussian(6, -191 * 9)
    for at, unit, other in ((50, 1, shifted), (0, 3, scaled)):
        z = CAMERA.to_state(y)
        torch.testing.assert_close(other.to_state(unit * y + at), z, rtol=1e-13, atol=1e-12)
        back = unit * CAMERA.from_state(z) + at
        torch.testing.assert_close(other.from_state(z), back, rtol=1e-13, atol=1e-12)
        estimate = unit * CAMERA.estimate(y, s) + at
        found = other.estimate(unit * y + at, s / unit)
        torch.testing.assert_close(found, estimate, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", [1, 5, 30])
def test_the_mean_state_of_a_constant_gives_it_back(counts):
    x, n = 2.0 * counts, 200_000
    y = sample(np.full(n, x), 2, 100, 1, np.random.default_rng(counts))
    assert y.mean() == pytest.approx(x + 100, abs=5 * math.sqrt((2 * x + 1) / n))
    assert y.var() == pytest.approx(2 * x + 1, rel=0.03)
    camera = PoissonGaussian.of_camera(2, 100, 1)
    z = camera.to_state(of(y))
    error = 4 * math.sqrt(2 * x + 1) / math.sqrt(n)
    assert float(camera.from_state(z.mean())) - 100 == pytest.approx(x, abs=0.05 * 2 + error)


@pytest.mark.parametrize(("gain", "read", "most"), [(1, 1, 0.08), (2, 2, 0.12)])
def test_the_estimate_loses_little_to_the_posterior_mean(gain, read, most):
    """A prior of 30 brightnesses, its exact score, and the mean by enumeration."""
    x = np.linspace(1, 30, 30)
    prior = np.exp(-((x - 14) ** 2) / 100) / np.exp(-((x - 14) ** 2) / 100).sum()
    y = np.linspace(-10, 70, 1001)
    densities, slopes = [], []
    for value in x:
        n, p = mixture(value, gain, read)
        part = p * norm.pdf(y[:, None], gain * n, read)
        densities.append(part.sum(1))
        slopes.append((part * (gain * n - y[:, None])).sum(1) / read**2)
    joint = prior[:, None] * np.array(densities)
    total = joint.sum(0)
    best = (joint * x[:, None]).sum(0) / total
    s = (prior[:, None] * np.array(slopes)).sum(0) / total
    found = PoissonGaussian.of_camera(gain, 0, read).estimate(of(y), of(s)).numpy()

    def error(estimate):
        return (joint * (estimate - x[:, None]) ** 2).sum()

    assert 0 <= 10 * math.log10(error(found) / error(best)) < most
    assert error(found) < 0.75 * error(y)


# ---- gain and black from pictures --------------------------------------------------------------
def ramp(peak, gain, read, seed, offset=100):
    y = sample(peak * RAMP, gain, offset, read, np.random.default_rng(seed))
    return np.round(y).clip(0, 65535)


@pytest.mark.parametrize(
    ("peak", "gain_error", "black_error"), [(400, 0.08, 4.2), (4400, 0.026 * 2, 16.6)]
)
def test_the_line_of_a_ramp(peak, gain_error, black_error):
    for seed in range(3):
        fit = fit_line(Blocks.of(ramp(peak, 2, 3, seed), (0, 65535)), step=1)
        assert fit.line and fit.noise.gain == pytest.approx(2, rel=gain_error)
        assert fit.noise.black == pytest.approx(95.5, abs=black_error)
        truth = CAMERA.deviation(fit.mean)
        assert fit.noise.deviation(fit.mean) == pytest.approx(truth, rel=0.03)
        # The errors it states: of their kind, neither nothing nor everything.
        assert abs(fit.noise.gain - 2) < 5 * fit.gain_error < 1
        assert abs(fit.noise.black - 95.5) < 5 * fit.black_error < 60
        assert 1e-3 < fit.deviation_error < 0.03


def test_a_stack_tells_more_than_a_plane():
    planes = [Blocks.of(ramp(400, 2, 3, seed)) for seed in range(6)]
    pooled = fit_line(Blocks.pooled(planes), step=1)
    single = np.mean([abs(fit_line(plane, step=1).noise.gain - 2) for plane in planes])
    assert abs(pooled.noise.gain - 2) < single
    assert pooled.gain_error < fit_line(planes[0], step=1).gain_error


def test_what_is_told_of_the_camera_is_kept():
    blocks = Blocks.of(ramp(400, 2, 3, 0))
    told = fit_line(blocks, offset=100, read=3, step=1).noise
    assert told.deviation(100) ** 2 == pytest.approx(9 + 1 / 12)  # read noise and rounding
    assert told.gain == pytest.approx(2, rel=0.03)
    given = fit_line(blocks, gain=2.0, step=1).noise
    assert given.gain == 2 and given.black == pytest.approx(95.5, abs=2)
    assert fit_line(blocks, gain=2.0, offset=100, read=3).noise == CAMERA


def test_pixels_cut_off_at_the_limits_are_left_out():
    y = ramp(400, 2, 30, 0, offset=0)
    assert 0.02 < (y == 0).mean() < 0.2
    right = PoissonGaussian.of_camera(2, 0, 30)
    fit = fit_line(Blocks.of(y, (0, 65535)), step=1)
    assert fit.noise.deviation(200) == pytest.approx(right.deviation(200), rel=0.03)
    assert fit.noise.deviation(100) == pytest.approx(right.deviation(100), rel=0.06)


def test_few_bright_spots_are_enough_and_texture_is_not_noise():
    rng = np.random.default_rng(0)
    x = np.zeros((512, 512))
    rows, columns = np.mgrid[:512, :512]
    for top, left in rng.integers(20, 492, (12, 2)):
        x += 600 * np.exp(-((rows - top) ** 2 + (columns - left) ** 2) / 200)
    x[:, :200] += 100 * (np.sin(rows[:, :200] * 1.3) + 1)  # stripes
    y = np.round(sample(x, 2, 100, 3, rng))
    fit = fit_line(Blocks.of(y), step=1)
    assert fit.line and fit.noise.gain == pytest.approx(2, rel=0.15)


def test_even_brightness_shows_no_gain():
    y = 100 + 20 * np.random.default_rng(0).standard_normal((256, 256))
    fit = fit_line(Blocks.of(y))
    assert not fit.line and fit.noise.gain == 0
    assert math.sqrt(fit.noise.constant) == pytest.approx(20, rel=0.03)
    told = fit_line(Blocks.of(y), gain=2.0)
    assert told.line and told.noise.deviation(100) == pytest.approx(20, rel=0.03)


def test_variance_that_follows_no_line_is_said():
    """Noise that grows and falls again, as in pictures that a curve was put on."""
    rng = np.random.default_rng(0)
    y = 1000 * RAMP + (2 + 60 * np.sin(4 * np.pi * RAMP) ** 2) * rng.standard_normal(RAMP.shape)
    assert not fit_line(Blocks.of(y)).line


def test_pictures_without_noise():
    for y in (np.zeros((256, 256)), np.full((256, 256), 7.0), np.ones((16, 16))):
        with pytest.raises(NoNoise, match="no noise to measure; give gain, offset, read"):
            fit_line(Blocks.of(y))
    with pytest.raises(TooFew, match="4 blocks .* are too few .*, 24 are needed; give gain"):
        fit_line(Blocks.of(ramp(400, 2, 3, 0)[:16, :16]))
    padded = np.zeros((512, 512))
    padded[:, 256:] = ramp(400, 2, 3, 0)[:, 256:]  # half is the edge of a registered picture
    assert fit_line(Blocks.of(padded)).noise.gain == pytest.approx(2, rel=0.1)


def test_blocks_of_colour_are_those_of_its_channels():
    y = ramp(400, 2, 3, 0)[:64, :96]
    colour = Blocks.of(np.stack([y, y + 1, y + 2], 2))
    parts = Blocks.pooled(Blocks.of(y + k) for k in range(3))
    for name in ("mean", "noise", "rough"):
        np.testing.assert_allclose(getattr(colour, name), getattr(parts, name), atol=1e-9)
    assert len(colour.mean) == 3 * 8 * 12
    white = Blocks.of(np.random.default_rng(0).standard_normal((800, 800)))
    assert white.noise.mean() == pytest.approx(1, rel=0.02)  # of unit gain both
    assert white.rough.mean() == pytest.approx(1, rel=0.02)
    tilted = Blocks.of(np.add.outer(np.arange(64) * 3.0, np.arange(64) * 5.0))
    assert tilted.rough.max() < 1e-18  # a plane is no noise
