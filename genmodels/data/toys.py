"""Points in the plane as the smallest images: float32 (N, 2, 1, 1), x in channel 0, y in channel 1.

The coordinates lie in [-1, 1], as a method sees images, and are never rounded to bytes on the way
into training. The label of a point is the part it comes from (which square, moon, circle).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

NOISE = 0.03  # standard deviation around the moons and circles, on the [-1, 1] scale


def _ring(labels: np.ndarray, parts: int) -> np.ndarray:
    """Return the points of a ring of radius 0.7 at `parts` equal angles, (N, 2)."""
    angle = 2 * np.pi * labels / parts
    return 0.7 * np.stack([np.cos(angle), np.sin(angle)], 1)


def _eight_squares(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uniform in eight squares of side 0.3, centred on a ring of radius 0.7."""
    return _ring(labels, 8) + 0.3 * (rng.random((len(labels), 2)) - 0.5)


def _eight_gaussians(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Normal with standard deviation 0.05 around eight points of a ring of radius 0.7."""
    return _ring(labels, 8) + 0.05 * rng.standard_normal((len(labels), 2))


def _checkerboard(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uniform in the eight black fields, of side 0.5, of a 4 x 4 board over [-1, 1]^2."""
    row, column = labels // 2, 2 * (labels % 2) + (labels // 2) % 2
    return 0.5 * (np.stack([column, row], 1) + rng.random((len(labels), 2))) - 1


def _moons(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two half circles of radius 5/9, the second turned and moved into the first, with noise."""
    angle = np.pi * rng.random(len(labels))
    upper = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], 1)
    points = np.where(labels[:, None] == 0, upper, -upper) / 1.8
    return points + NOISE * rng.standard_normal(points.shape)


def _circles(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two circles around the origin, of radius 0.8 and 0.4, with noise."""
    angle = 2 * np.pi * rng.random(len(labels))
    points = np.stack([np.cos(angle), np.sin(angle)], 1) * np.where(labels, 0.4, 0.8)[:, None]
    return points + NOISE * rng.standard_normal(points.shape)


class Toy(NamedTuple):
    """How a toy's points are drawn: (labels (N,), numpy Generator) -> (N, 2), and of what parts."""

    draw: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    parts: int


TOYS = {
    "moons": Toy(_moons, 2),
    "circles": Toy(_circles, 2),
    "eight_squares": Toy(_eight_squares, 8),
    "eight_gaussians": Toy(_eight_gaussians, 8),
    "checkerboard": Toy(_checkerboard, 8),
}


def toy_points(name: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (points float32 (count, 2, 1, 1) in [-1, 1], parts int64 (count,)).

    Args:
        name: out of TOYS.
        count: how many; the first ones do not depend on it.
        seed: whole number >= 0; the same seed gives the same points.
    """
    toy = TOYS[name]
    # In blocks, so that a longer set begins with the shorter one.
    blocks = []
    for block in range(-(-count // 1000)):
        rng = np.random.default_rng([seed, block])
        labels = rng.integers(toy.parts, size=1000)
        blocks.append((toy.draw(labels, rng).clip(-1, 1), labels))
    plane, labels = (np.concatenate(part)[:count] for part in zip(*blocks))
    plane = torch.from_numpy(plane.astype(np.float32))
    return plane.reshape(count, 2, 1, 1), torch.from_numpy(labels.astype(np.int64))
