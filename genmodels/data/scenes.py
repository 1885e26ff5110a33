"""Drawn pictures without grain or texture, which photographs have: spots, patches, fine lines."""

import numpy as np
import torch

SIDE = 256
KEY = 11  # scene k is drawn by a numpy generator of [KEY, k]


def draw_scene(number: int, channels: int = 1, side: int = SIDE) -> torch.Tensor:
    """Return scene `number`, uint8 (channels, side, side), black ground to a brightest white.

    Each layer comes from a random field of some smoothness: its peaks (spots), where it is high
    (patches with soft edges), or where it is zero (lines). In colour each layer has its own.
    """
    rng = np.random.default_rng([KEY, number])
    x = np.full((channels, side, side), rng.uniform(0, 0.1))
    for _ in range(rng.integers(2, 5)):
        field = _smooth_field(rng, side, side * 2 ** rng.uniform(-6.5, -3))
        kind = rng.integers(3)
        if kind == 0:
            layer = (field - field.min()) / np.ptp(field)
            layer **= rng.uniform(1, 6)
        elif kind == 1:
            layer = 1 / (1 + np.exp((rng.uniform(0, 1.5) - field) / 2 ** rng.uniform(-4, 0)))
        else:
            layer = np.exp(-((field / 2 ** rng.uniform(-4, -1.5)) ** 2))
        colour = rng.uniform(0.2, 1, channels) if channels > 1 else np.ones(1)
        x += rng.uniform(0.2, 1) * colour[:, None, None] * layer
    x *= rng.uniform(0.6, 1) / x.max()
    return torch.from_numpy(np.rint(255 * x).astype(np.uint8))


def _smooth_field(rng: np.random.Generator, side: int, width: float) -> np.ndarray:
    """Return white noise behind a Gaussian filter of this width in pixels, of deviation 1.

    (side, side); it goes on at the opposite edges.
    """
    rows, columns = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)
    gain = np.exp(-2 * (np.pi * width) ** 2 * (rows**2 + columns**2))
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) * gain, (side, side))
    return (field - field.mean()) / field.std()
