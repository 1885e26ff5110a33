"""Eight squares in the plane: distance between a model's points and the data (benchmarks.cdrl)."""

import time

import torch

import genmodels
from genmodels import generation
from genmodels.data import toys

__all__ = ["toy"]


def toy(run, picture, count=4000):
    """Draw points, data and energy to a picture; return the facts.

    The energy distance is unbiased, so that of two sets of data scatters about 0: the floor is its
    standard deviation.
    """
    model = genmodels.load(run)
    name, began = model.cfg.data.name, time.monotonic()
    with generation.tf32(False):
        x = model.sample(range(count)).flatten(1)
    seconds = round(time.monotonic() - began, 1)
    data = [toys.toy_points(name, count, 1000 + k)[0].flatten(1) for k in range(16)]
    found = torch.tensor([energy_distance(x, other) for other in data])
    floor = torch.tensor([energy_distance(a, b) for a, b in zip(data[::2], data[1::2])])
    draw_toy(picture, model, x, data[0])
    return {
        "data": name,
        "count": count,
        "sample_seconds": seconds,
        "energy_distance": float(found.mean()),
        "energy_distance_std_over_data_sets": float(found.std()),
        "energy_distance_of_two_data_sets": float(floor.mean()),
        "energy_distance_of_two_data_sets_std": float(floor.std()),
        "energy_distance_of_a_gaussian": energy_distance(gaussian_like(data[0]), data[1]),
        "share_inside": inside(x),
        "share_inside_data": inside(data[0]),
        "share_of_each_square": shares(x),
    }


def energy_distance(a, b):
    """Return 2 E|a - b| - E|a - a'| - E|b - b'| (Szekely and Rizzo), unbiased in each term."""
    own = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - own[0] - own[1])


def gaussian_like(rows):
    """Return points of a Gaussian with the rows' mean and covariance."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.linalg.cholesky(rows.T.cov())
    return rows.mean(0) + torch.randn(rows.shape, generator=generator) @ factor.T


def _offsets(x):
    angle = torch.arange(8) * torch.pi / 4
    centres = 0.7 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return (x[:, None] - centres).abs().amax(2)  # of side 0.3


def inside(x):
    """Return the share of points inside one of the eight squares."""
    return float((_offsets(x).amin(1) <= 0.15).double().mean())


def shares(x):
    """Return the share of points nearest to each square."""
    return (torch.bincount(_offsets(x).argmin(1), minlength=8) / len(x)).tolist()


def draw_toy(path, model, x, data):
    """Draw samples, data, and the energy of the lowest level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    side = torch.linspace(-1.05, 1.05, 150)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        log_p = -model.energy(grid.reshape(-1, 2, 1, 1)).reshape(150, 150)
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4))
    for axis, points, title in zip(axes, (x, data), ("samples", "data")):
        axis.scatter(*points.T, s=1, linewidths=0)
        axis.set_title(title)
    shown = (log_p - log_p.max()).clamp(min=-30).T
    axes[2].imshow(shown, origin="lower", extent=(-1.05, 1.05, -1.05, 1.05))
    axes[2].set_title("log density of the lowest level, up to a constant")
    for axis in axes:
        axis.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal", xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=80)
