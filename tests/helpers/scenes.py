"""Clean pictures without any grain: blobs and lines, as a microscope would see them; cloth."""

import numpy as np
from scipy.ndimage import gaussian_filter


def scene(seed=0, side=128):
    """Return blobs and lines, float64 (side, side) on [0, 1], the brightest pixel 1."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    x = np.full((side, side), 0.05)
    for _ in range(side // 8):
        (top, left), width = rng.uniform(0, side, 2), rng.uniform(2, side / 14)
        bump = np.exp(-((rows - top) ** 2 + (columns - left) ** 2) / (2 * width**2))
        x += rng.uniform(0.2, 0.8) * bump
    for _ in range(4):
        angle, (top, left) = rng.uniform(0, np.pi), rng.uniform(0, side, 2)
        across = np.cos(angle) * (rows - top) + np.sin(angle) * (columns - left)
        x += 0.4 * np.exp(-(across**2) / (2 * 1.5**2))
    return x / x.max()


def cloth():
    """Return squares of fine and of soft texture in turns, whole numbers (128, 128) around 128.

    It repeats itself every 64 pixels.
    """
    threads = np.random.default_rng(0).standard_normal((64, 64))
    fine, soft = (gaussian_filter(threads, width, mode="wrap") for width in (0.5, 0.65))
    square = np.arange(64) // 16
    weave = np.where(
        (square[:, None] + square) % 2 == 0, 0.8 * fine / fine.std(), soft / soft.std()
    )
    return np.round(128 + 8 * np.tile(weave, (2, 2)))


def psnr(estimate, clean, peak=1.0):
    """Return the peak signal-to-noise ratio in dB; 200 for equal pictures."""
    return float(-10 * np.log10(np.mean((estimate - clean) ** 2) / peak**2 + 1e-20))
