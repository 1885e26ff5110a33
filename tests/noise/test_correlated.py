"""Noise that neighbours share is told from white noise, of rows from none, texture from all."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, zoom

from genmodels.noise.correlated import ROWS, WHITE, correlation, is_texture, row_noise
from tests.helpers.scenes import cloth, scene

X = 0.8 * scene(3, 256) + 0.1
RNG = np.random.default_rng(0)
WHITE_NOISE = RNG.standard_normal(X.shape)


def of(values):
    return torch.from_numpy(values)[None]


def blurred(pixels):
    noise = gaussian_filter(WHITE_NOISE, pixels)
    return noise / noise.std()


@pytest.mark.parametrize("sigma", [5, 25, 50])
def test_white_noise_is_white(sigma):
    y = X + sigma / 255 * WHITE_NOISE
    assert 0.9 < correlation(of(y)) < 1.1
    assert row_noise(of(y)) < ROWS and row_noise(of(y.T.copy())) < ROWS
    rounded = np.round(255 * y.clip(0, 1)) / 255
    assert correlation(of(rounded)) < WHITE


@pytest.mark.parametrize(("pixels", "least"), [(0.5, WHITE), (0.8, 3)])
def test_blurred_noise_is_not(pixels, least):
    assert correlation(of(X + 25 / 255 * blurred(pixels))) > least


def test_enlarged_noise_is_not():
    y = X + 25 / 255 * WHITE_NOISE
    assert correlation(of(zoom(y, 1.5, order=1))) > 2


def test_rows_of_less_than_half_the_noise_are_seen():
    rows = 0.4 * RNG.standard_normal((256, 1))
    y = X + 25 / 255 * (WHITE_NOISE + rows)
    assert row_noise(of(y)) > 3.5 > ROWS > row_noise(of(y.T.copy()))


def test_texture_is_not_noise():
    assert is_texture(of(cloth() / 255))


def test_noise_is_not_texture():
    """White, rounded, from interpolated rows, enlarged, blurred; on texture."""
    sigma = 5
    y = 255 * X + sigma * WHITE_NOISE
    rows = y.copy()
    rows[1:-1:2] = (y[:-2:2] + y[2::2]) / 2
    pictures = [y, np.round(y), rows, zoom(y[:160, :160], 1.5, order=1)]
    pictures += [255 * X + sigma * blurred(pixels) for pixels in (0.5, 0.8)]
    pictures += [cloth() + sigma * WHITE_NOISE[:128, :128]]
    assert [is_texture(of(p / 255)) for p in pictures] == [False] * len(pictures)


def test_small_and_empty_pictures_show_nothing():
    assert correlation(of(X[:20, :20])) == 1 and row_noise(of(X[:20, :20])) == 0
    assert correlation(of(np.full((64, 64), 0.5))) == 1
    assert row_noise(of(np.full((64, 64), 0.5))) == 0
    assert not is_texture(of(X[:20, :20])) and not is_texture(of(np.full((64, 64), 0.5)))
