"""Kernels of evaluation: the torch references against scikit-learn, scipy, Pillow and others."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from genmodels.kernels.mmd import mmd
from genmodels.kernels.pairwise import ball_count, knn_radius, polynomial_sums, rbf_sums
from genmodels.kernels.resize_normalize import resize_normalize
from tests.helpers.allocations import LargestMade


def features(n, m, d):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(n, d)).astype(np.float32) + 0.5
    y = (1.2 * generator.normal(size=(m, d))).astype(np.float32) + 0.6
    return x, y


def test_kernel_sums_are_those_of_the_full_matrix():
    from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel

    x, y = features(1100, 4200, 24)  # more than one tile of the reference each way
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    x, y = x.astype(float), y.astype(float)
    for got, full in (
        (polynomial_sums(tx, ty), polynomial_kernel(x, y, degree=3)),
        (polynomial_sums(tx), polynomial_kernel(x, degree=3)),
        (
            polynomial_sums(tx, ty, degree=2, gamma=0.1, coef=0),
            polynomial_kernel(x, y, degree=2, gamma=0.1, coef0=0),
        ),
        (rbf_sums(tx, ty, bandwidth=4.0), rbf_kernel(x, y, 1 / 32)),
        (rbf_sums(ty, bandwidth=4.0), rbf_kernel(y, None, 1 / 32)),
    ):
        if full.shape[0] == full.shape[1]:
            np.fill_diagonal(full, 0)
        assert got.dtype == torch.float64
        assert np.allclose(got, full.sum(1), rtol=3e-6)


def test_columns_are_the_sums_the_other_way():
    x, y = (torch.from_numpy(v) for v in features(1100, 4200, 24))
    for function, options in ((polynomial_sums, {}), (rbf_sums, {"bandwidth": 4.0})):
        rows, columns = function(x, y, columns=True, **options)
        assert torch.equal(rows, function(x, y, **options))
        assert torch.allclose(columns, function(y, x, **options), rtol=1e-6)
        with pytest.raises(ValueError, match="columns=True needs y"):
            function(x, columns=True, **options)


def test_a_set_against_itself_takes_half_the_products():
    x, y = (torch.from_numpy(v) for v in features(6000, 6000, 16))
    with LargestMade() as whole:
        polynomial_sums(x, y)
    with LargestMade() as half:
        polynomial_sums(x)
    assert whole.products == 6000**2 and half.products < 0.65 * 6000**2


@pytest.mark.parametrize("n, m", [(1, 1), (1023, 4097), (1024, 4096), (1025, 1), (3, 4095)])
def test_tiles_cut_by_every_edge(n, m):
    """Sets that end just before, at and just after the reference's tiles of 1024 x 4096."""
    x, y = (torch.from_numpy(v).double() for v in features(n, m, 5))
    full = (x @ y.T / 5 + 1) ** 3
    rows, columns = polynomial_sums(x, y, columns=True)
    assert torch.allclose(rows, full.sum(1)) and torch.allclose(columns, full.sum(0))
    own = (y @ y.T / 5 + 1) ** 3
    assert torch.allclose(polynomial_sums(y), own.fill_diagonal_(0).sum(1))
    distances = torch.cdist(x, y)
    k = min(3, m)
    assert torch.allclose(knn_radius(x, y, k=k), distances.kthvalue(k, dim=1).values)
    limit = distances.median()
    counted = ball_count(x, y, limit.expand(m) + 1e-6)
    assert torch.equal(counted, (distances <= limit + 1e-6).sum(1))


def test_pairs_are_never_held_all_at_once():
    x, y = (torch.from_numpy(v) for v in features(1500, 6000, 8))
    for function in (
        lambda: polynomial_sums(x, y, columns=True),
        lambda: rbf_sums(y, bandwidth=4.0),
        lambda: knn_radius(x, y, k=5),
        lambda: ball_count(x, y, torch.ones(6000)),
    ):
        with LargestMade() as made:
            function()
        assert made.largest <= 1024 * 4096  # one tile; there are 9 and 36 million pairs


def test_mmd_and_its_error():
    x, y = features(60, 80, 6)
    tx, ty = torch.from_numpy(x).double(), torch.from_numpy(y).double()

    def direct(a, b):
        def within(k):
            return (k.sum() - k.diag().sum()) / (len(k) * (len(k) - 1))

        aa, bb, ab = ((u @ v.T / 6 + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        return within(aa) + within(bb) - 2 * ab.mean()

    between = polynomial_sums(tx, ty, columns=True)
    value, error = mmd(polynomial_sums(tx), polynomial_sums(ty), *between)
    assert torch.allclose(value, direct(tx, ty))
    leave_x = torch.stack([direct(torch.cat([tx[:i], tx[i + 1 :]]), ty) for i in range(60)])
    leave_y = torch.stack([direct(tx, torch.cat([ty[:i], ty[i + 1 :]])) for i in range(80)])
    variance = sum((len(v) - 1) * v.var(correction=0) for v in (leave_x, leave_y))
    assert torch.allclose(error, variance.sqrt())


def test_neighbours_and_balls():
    from sklearn.neighbors import NearestNeighbors

    x, y = features(1100, 4200, 8)
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    own = NearestNeighbors(n_neighbors=4).fit(x).kneighbors(x)[0][:, 3]  # self comes first
    assert np.allclose(knn_radius(tx, k=3), own, rtol=1e-4)
    other = NearestNeighbors(n_neighbors=5).fit(y).kneighbors(x)[0][:, 4]
    radius = knn_radius(tx, ty, k=5)
    assert np.allclose(radius, other, rtol=1e-4)
    distance = cdist(x.astype(float), y.astype(float))
    around_y = knn_radius(ty, k=3)
    for count, limit in (
        (ball_count(tx, ty, around_y), around_y.numpy()[None]),
        (ball_count(tx, ty, radius * 1.01, owner="x"), radius.numpy()[:, None] * 1.01),
    ):
        sure = (distance <= limit * (1 - 1e-4)).sum(1), (distance <= limit * (1 + 1e-4)).sum(1)
        assert ((count.numpy() >= sure[0]) & (count.numpy() <= sure[1])).all()
        assert (sure[0] != sure[1]).mean() < 0.02  # few pairs lie on a boundary
    assert (ball_count(tx, tx, knn_radius(tx, k=1)) >= 1).all()  # each lies in its own ball
    assert torch.equal(ball_count(tx, ty, around_y.double()), ball_count(tx, ty, around_y))
    with pytest.raises(ValueError, match="k must be in 1..16"):
        knn_radius(tx, k=17)


SIZES = [((32, 32), (299, 299)), ((65, 97), (29, 31)), ((28, 28), (28, 40)), ((3, 1), (5, 4))]


def resized(images, target, mode):
    """Return what the library that `mode` names makes of uint8 images, float32 grey levels."""
    from PIL import Image
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    if mode == "tf1":
        return interpolate_bilinear_2d_like_tensorflow1x(
            images.float(), size=target, align_corners=False
        )
    if mode == "bilinear":
        return torch.nn.functional.interpolate(images.float(), size=target, mode="bilinear")
    planes = images.flatten(0, 1).numpy().astype(np.uint8 if mode == "pillow" else np.float32)
    planes = [np.asarray(Image.fromarray(p).resize(target[::-1], Image.BICUBIC)) for p in planes]
    return torch.from_numpy(np.stack(planes)).reshape(*images.shape[:2], *target).float()


@pytest.mark.parametrize("source, target", SIZES)
@pytest.mark.parametrize("mode", ["tf1", "bilinear", "bicubic", "pillow"])
def test_resize_matches_its_reference(source, target, mode):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, *source), generator=generator, dtype=torch.uint8)
    options = {"mode": "bicubic", "quantize": True} if mode == "pillow" else {"mode": mode}
    got = resize_normalize(images, target, mean=0, std=1, **options)
    error = (got - resized(images, target, mode)).abs().max()
    assert error == 0 if mode == "pillow" else error < 0.01
    assert got.is_contiguous(memory_format=torch.channels_last)
    nhwc = images.permute(0, 2, 3, 1).contiguous()
    mean, std = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    normal = resize_normalize(nhwc, target, layout="nhwc", mean=mean, std=std, **options)
    scaled = (got - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)
    assert torch.allclose(normal, scaled, atol=1e-5)
    with pytest.raises(ValueError, match=r"mean must be a number or one per channel \(3\), got 2"):
        resize_normalize(images, target, mean=[1.0, 2.0])
