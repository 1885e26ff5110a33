"""The torch references of the kernels against independent truth: numpy, scipy, Pillow, ..."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist

from genmodels.kernels.gbm_step import gbm_step
from genmodels.kernels.langevin_chain import DoubleWell, Gaussian, Mixture, langevin_chain
from genmodels.kernels.langevin_step import langevin_step
from genmodels.kernels.mala import mala_accept, mala_propose
from genmodels.kernels.mmd import mmd
from genmodels.kernels.pairwise import ball_count, knn_radius, polynomial_sums, rbf_sums
from genmodels.kernels.philox import chain_normals, philox, philox_normal, philox_uniform
from genmodels.kernels.resize_normalize import resize_normalize


def numpy_philox(key, counter):
    """Philox4x32-10 in numpy's unsigned arithmetic; key and counter: lists of words."""
    k, c = [np.uint64(w) for w in key], [np.uint64(w) for w in counter]
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(q >> shift) ^ c[1] ^ k[0], q & low, (p >> shift) ^ c[3] ^ k[1], p & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return [int(w) for w in c]


KNOWN = [  # published with the generator: key, counter, result
    ("00000000 00000000", "00000000 00000000 00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff", "ffffffff ffffffff ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize("key, counter, result", KNOWN)
def test_philox_known_answers(key, counter, result):
    k = [int(w, 16) for w in key.split()]
    c = [int(w, 16) for w in counter.split()]
    expected = [int(w, 16) for w in result.split()]
    assert numpy_philox(k, c) == expected
    value = k[0] + (k[1] << 32)
    seed = torch.tensor([value - 2**64 if value >= 2**63 else value])
    assert [int(w) for w in philox(seed, *(torch.tensor([w]) for w in c))] == expected


def test_philox_is_a_function_of_seed_step_stream_and_element():
    seeds, steps = [3, -7, 2**62 + 5], [0, 2**40 + 1, 9]
    got = philox_uniform((10,), torch.tensor(seeds), torch.tensor(steps), stream=6)
    for b in range(3):
        key = [seeds[b] & 0xFFFFFFFF, (seeds[b] >> 32) & 0xFFFFFFFF]
        step = [steps[b] & 0xFFFFFFFF, steps[b] >> 32]
        words = sum((numpy_philox(key, [g, *step, 6]) for g in range(3)), [])
        assert got[b].tolist() == [(w >> 8) / 2**24 for w in words[:10]]
    whole = philox_normal((2, 70001), 5, 8)[0]  # more than one chunk of the reference
    assert torch.equal(whole.flatten()[:20], philox_normal((20,), 5, 8)[0])
    assert whole[1, -1] == philox_normal((2 * 70001,), 5, 8)[0, -1]


def test_normals_agree_with_the_formula_in_float64():
    got = philox_normal((40,), 11, 4)[0].double()
    words = np.array(sum((numpy_philox([11, 0], [g, 4, 0, 0]) for g in range(10)), []), float)
    radius = np.sqrt(-2 * np.log((words[0::2] + 1) / 2**32))
    angle = words[1::2] / 2**32 * 2 * np.pi
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()
    assert np.abs(got.numpy() - expected).max() < 2e-6


def test_noise_is_normal_and_uncorrelated():
    n = 1_000_000
    z = philox_normal((n,), 1)[0].double()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) < 5 * (variance / n) ** 0.5
    assert stats.kstest(z.numpy(), "norm").statistic < 1.95 / n**0.5  # 1e-3 level
    u = philox_uniform((n,), 1)[0].double().numpy()
    assert stats.kstest(u, "uniform").statistic < 1.95 / n**0.5 and u.min() >= 0 and u.max() < 1
    others = {
        "next seed": philox_normal((n,), 2)[0],
        "next step": philox_normal((n,), 1, 1)[0],
        "step high word": philox_normal((n,), 1, 2**32)[0],
        "stream": philox_normal((n,), 1, stream=1)[0],
        **{f"lag {k}": z.roll(k) for k in (1, 2, 3, 4, 1024)},
    }
    for name, other in others.items():
        for a, b in ((z, other.double()), (z**2 - 1, other.double() ** 2 - 1)):
            assert abs((a * b).mean()) < 5 * (a.var() * b.var() / n) ** 0.5, name


def test_seeds_of_neighbouring_chains_never_replay():
    """seed + step as a key would give chain 1 the noise of chain 0 one step later."""
    z = philox_normal((64,), torch.arange(50).repeat_interleave(50), torch.arange(50).repeat(50))
    assert len(torch.unique(z, dim=0)) == 2500


def test_one_seed_for_all_continues_over_chains():
    y = torch.zeros(3, 2, 3)
    z = chain_normals(y, 9, 4)
    flat = philox_normal((3, 8), 9, 4)[0]  # six elements take two groups, the last padded
    assert torch.equal(z.flatten(1), flat[:, :6])
    assert torch.equal(chain_normals(y[1:], 9, 4, first=1), z[1:])
    seeds = torch.arange(3)
    assert torch.equal(chain_normals(y, seeds, 4), philox_normal((2, 3), seeds, 4))


def step_arguments(shape):
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator)

    return {
        "y": draw(*shape),
        "grad": draw(*shape),
        "step": draw(shape[0]).abs() + 0.1,
        "noise_scale": draw(shape[0]).abs(),
        "tether": draw(*shape),
        "tether_scale": draw(shape[0]).abs(),
        "mask": draw(*shape) > -0.5,
        "known": draw(*shape),
        "clamp": (-1.0, 1.2),
        "grad_clip": 1.5,
        "grad_norm": 2.0,
        "noise": draw(*shape),
    }


def numpy_step(a):
    """langevin_step, chain by chain in float64."""
    y, g, x, z = (a[k].double().numpy() for k in ("y", "grad", "tether", "noise"))
    out = np.empty_like(y)
    for b in range(len(y)):
        drift = np.clip(g[b], -a["grad_clip"], a["grad_clip"])
        drift = drift * min(1.0, a["grad_norm"] / np.sqrt((drift**2).sum()))
        step, s, k = (float(a[n][b]) for n in ("step", "noise_scale", "tether_scale"))
        out[b] = np.clip(y[b] + step * drift + k * (x[b] - y[b]) + s * z[b], *a["clamp"])
    return np.where(a["mask"].numpy(), out, a["known"].double().numpy())


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7, 5), (6,), (4, 33)])
def test_langevin_step_is_the_formula(shape):
    a = step_arguments(shape)
    expected = torch.from_numpy(numpy_step(a))
    y = a.pop("y")
    got = langevin_step(y, **a)
    assert (got.double() - expected).abs().max() < 2e-6
    assert torch.equal(got[~a["mask"]], a["known"][~a["mask"]])  # bit for bit
    strided = y.repeat_interleave(2, dim=-1)
    strided = torch.as_strided(strided, y.shape, [2 * s for s in y.stride()])
    assert torch.equal(strided, y) and torch.equal(langevin_step(strided, **a), got)
    assert langevin_step(strided, **a, out=strided) is strided and torch.equal(strided, got)
    assert langevin_step(y.bfloat16(), **{**a, "known": None}).dtype == torch.bfloat16


def test_langevin_step_noise_belongs_to_the_chain():
    y, grad = torch.randn(5, 3, 4, 3), torch.zeros(5, 3, 4, 3)
    seeds = torch.tensor([4, 9, 2**40, -1, 7])
    options = {"step": 0.5, "counter": 3, "stream": 2}
    whole = langevin_step(y, grad, seed=seeds, **options)
    expected = y + philox_normal((3, 4, 3), seeds, 3, stream=2)  # sqrt(2 * 0.5) = 1
    assert torch.allclose(whole, expected, atol=1e-6)
    for part in (slice(0, 2), slice(2, 5)):
        some = langevin_step(y[part], grad[part], seed=seeds[part], **options)
        assert torch.equal(some, whole[part])
    big = torch.zeros(3, 200_000)  # chunked by the reference
    assert torch.equal(langevin_step(big, big, step=0.5, seed=1), chain_normals(big, 1))


def test_langevin_step_keeps_nan_and_gradients():
    y, zero = torch.tensor([[float("nan"), 1.0, 5.0]]), torch.zeros(1, 3)
    out = langevin_step(y, zero, step=0.1, noise_scale=0, clamp=(-1, 1))
    assert out[0, 0].isnan() and out[0, 1:].tolist() == [1.0, 1.0]
    y = torch.ones(2, 3, requires_grad=True)
    langevin_step(y, -y, step=0.25, noise_scale=0).sum().backward()
    assert torch.equal(y.grad, torch.full((2, 3), 0.75))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step": 0.0}, "step must be > 0"),
        ({"step": float("nan")}, "step must be > 0"),
        ({"grad_norm": -1.0}, "grad_norm must be > 0"),
        ({"seed": None}, "seed must be given"),
        ({"grad": torch.zeros(2, 4)}, "grad must be like y"),
        ({"tether_scale": 1.0}, "tether needs tether_scale"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool"),
        ({"step": torch.ones(3)}, "step must be a number"),
        ({"seed": torch.ones(3)}, "seed must be a number"),
    ],
)
def test_langevin_step_explains_mistakes(change, message):
    given = {"y": torch.zeros(2, 3), "grad": torch.zeros(2, 3), "step": 0.1, "seed": 0, **change}
    with pytest.raises(ValueError, match=f"langevin_step: .*{message}"):
        langevin_step(given.pop("y"), given.pop("grad"), **given)


def test_mala_ratio_is_the_difference_of_transition_densities():
    generator = torch.Generator().manual_seed(1)
    y, x = (torch.randn(40, 3, 5, generator=generator, dtype=torch.float64) for _ in "ab")
    mask = torch.rand(40, 3, 5, generator=generator) > 0.3
    a = torch.rand(40, generator=generator, dtype=torch.float64) * 0.3 + 0.1
    s, k = (2 * a).sqrt(), a * 0.7
    options = {"step": a, "noise_scale": s, "tether": x, "tether_scale": k, "mask": mask, "seed": 3}

    def column(v):
        return v.reshape(-1, 1, 1)

    def log_p(v):
        return -0.5 * (v**2 * mask).flatten(1).sum(1)

    def log_q(to, start):
        mean = start - column(a) * start + column(k) * (x - start)
        return -(((to - mean) * mask) ** 2 / (2 * column(s) ** 2)).flatten(1).sum(1)

    def tethered(v):
        return log_p(v) - (column(k / s**2) * ((x - v) * mask) ** 2).flatten(1).sum(1)

    new = mala_propose(y, -y, **options)
    assert torch.equal(new[~mask], y[~mask])
    *_, accepted, ratio = mala_accept(
        y, new, -y, -new, log_p(y), log_p(new), **options, accumulate=torch.float64
    )
    expected = tethered(new) - tethered(y) + log_q(y, new) - log_q(new, y)
    assert (ratio - expected).abs().max() < 1e-9
    u = philox_uniform((160,), 3, stream=1)[0, ::4]  # one group per chain under one seed
    assert torch.equal(accepted, u.log() < expected) and 0 < accepted.sum() < 40
    with pytest.raises(ValueError, match="clamp breaks detailed balance"):
        mala_propose(y, -y, clamp=(-1, 1), **options)


def test_mala_accept_selects_counts_and_rejects_nan():
    y, new = torch.zeros(4, 2), torch.ones(4, 2)
    after = torch.tensor([9.0, -9.0, float("nan"), float("-inf")])
    count = torch.ones(4, dtype=torch.int32)
    half = torch.full((4,), 0.5)
    *_, accepted, ratio = mala_accept(
        y, new, y, 2 * new, torch.zeros(4), after, step=10.0, uniform=half
    )
    # b = 0, b' = 20, d = 1: each of two elements adds -(0 + 20)(2 + 20 - 0) / (2 * 20) = -11
    assert accepted.tolist() == [False] * 4 and ratio[:2].tolist() == [9 - 22, -9 - 22]
    state, _, log_prob, accepted, _ = mala_accept(
        y, new, y.clone(), y.clone(), torch.zeros(4), after, step=10.0, uniform=half, count=count,
        inplace=True,
    )  # fmt: skip
    assert accepted.tolist() == [True, False, False, False] and count.tolist() == [2, 1, 1, 1]
    assert state is y and y.tolist() == [[1.0, 1.0]] + [[0.0, 0.0]] * 3
    assert log_prob.tolist() == [9.0, 0.0, 0.0, 0.0]


def gbm_law(form, steps, n):
    """Run the reverse process from its exact start: (log x, data's moments, recursion's, flips)."""
    mean0, var0, mu, sigma = 0.25, 0.09, 0.32, 0.8
    drift, d = mu - 0.5 * sigma**2, 1 / steps  # of log x, forwards
    mean, var = mean0 + drift, var0 + sigma**2
    x = (philox_normal((n,), 5).double() * var**0.5 + mean).exp()
    flips = torch.zeros(1, dtype=torch.int32)
    for i in range(steps):
        t = 1 - i * d
        v = var0 + sigma**2 * t
        h = -1 - (x.log() - mean0 - drift * t) / v
        x = gbm_step(
            x, h, variance=d * sigma**2, drift=d * mu, form=form, seed=5, counter=i + 1, flips=flips
        )
        # The exponential step is linear in log x, so its law follows a recursion of its own,
        # written here with the score of log x, h + 1, and the drift mu - sigma^2 / 2.
        shrink = 1 - d * sigma**2 / v
        mean = shrink * mean + (1 - shrink) * (mean0 + drift * t) - d * drift
        var = shrink**2 * var + d * sigma**2
    return x.log()[0], (mean0, var0), (mean, var), int(flips)


@pytest.mark.parametrize("form", ["dls", "ums"])
def test_gbm_reverses_to_the_law_of_the_data(form):
    n = 100_000
    y, (mean0, var0), (mean, var), flips = gbm_law(form, 300, n)
    assert abs(mean - mean0) < 1e-3 and abs(var / var0 - 1) < 0.015  # error of 300 steps
    euler = 0 if form == "dls" else 2e-3  # Euler in x adds O(d)
    assert abs(y.mean() - mean) < 5 * (var / n) ** 0.5 + euler
    assert abs(y.var() / var - 1) < 5 * (2 / n) ** 0.5 + 5 * euler
    assert flips == 0


def test_gbm_forms_and_flips():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 5, generator=generator) + 0.5
    h, noise = (3 * torch.randn(3, 5, generator=generator) for _ in "ab")
    v, m = torch.tensor([0.1, 0.5, 2.0]), torch.tensor([0.0, 0.1, -0.2])
    vc, mc = v[:, None].double(), m[:, None].double()
    exponent = vc * h.double() - (mc - 1.5 * vc) + vc.sqrt() * noise.double()
    dls = gbm_step(x, h, variance=v, drift=m, noise=noise)
    assert torch.allclose(dls.double(), x.double() * exponent.exp(), rtol=1e-5)
    log = gbm_step(x.log(), h, variance=v, drift=m, noise=noise, form="log")
    assert torch.allclose(log.exp(), dls, rtol=1e-5)
    flips = torch.zeros(3, dtype=torch.int32)
    ums = gbm_step(x, h, variance=v, drift=m, noise=noise, form="ums", flips=flips)
    factor = 1 + 2 * vc - mc + vc * h.double() + vc.sqrt() * noise.double()
    assert torch.allclose(ums.double(), x.double() * factor, rtol=1e-4, atol=1e-6)
    assert flips.tolist() == (factor <= 0).sum(1).tolist() and flips.sum() > 0
    with pytest.raises(ValueError, match="form must be one of"):
        gbm_step(x, h, variance=0.1, form="euler", seed=0)


def analytic_energies():
    generator = torch.Generator().manual_seed(2)
    means = torch.randn(4, 3, generator=generator)
    return [
        Gaussian(torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 4.0, 0.3])),
        DoubleWell(0.7, 1.3),
        Mixture(means, torch.tensor([0.1, 0.5, 1.0, 2.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])),
    ]


@pytest.mark.parametrize("energy", analytic_energies(), ids=lambda e: type(e).__name__)
def test_analytic_energies(energy):
    y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    if isinstance(energy, Mixture):
        density = sum(
            float(w) * stats.multivariate_normal(m, float(v) * np.eye(3)).pdf(y.detach().numpy())
            for m, v, w in zip(energy.means.numpy(), energy.variances, energy.weights)
        )
        assert np.allclose(energy(y).detach(), -np.log(density), atol=1e-5)
    (grad,) = torch.autograd.grad(-energy(y).sum(), y)
    assert torch.allclose(energy.score(y), grad, atol=1e-5)
    y, options = y.detach(), {"step": 0.01, "seed": torch.arange(6)}
    one = langevin_chain(y, energy, steps=5, counter=4, **options)
    two = langevin_chain(y, energy, steps=2, counter=4, **options)
    two = langevin_chain(two, energy, steps=3, counter=6, **options)
    assert torch.equal(one, two) and not torch.equal(one, y)


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
        (polynomial_sums(tx, ty, degree=2, gamma=0.1, coef=0),
         polynomial_kernel(x, y, degree=2, gamma=0.1, coef0=0)),
        (rbf_sums(tx, ty, bandwidth=4.0), rbf_kernel(x, y, 1 / 32)),
        (rbf_sums(ty, bandwidth=4.0), rbf_kernel(y, None, 1 / 32)),
    ):  # fmt: skip
        if full.shape[0] == full.shape[1]:
            np.fill_diagonal(full, 0)
        assert got.dtype == torch.float64
        assert np.allclose(got, full.sum(1), rtol=3e-6)


def test_mmd_and_its_error():
    x, y = features(60, 80, 6)
    tx, ty = torch.from_numpy(x).double(), torch.from_numpy(y).double()

    def direct(a, b):
        def within(k):
            return (k.sum() - k.diag().sum()) / (len(k) * (len(k) - 1))

        aa, bb, ab = ((u @ v.T / 6 + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        return within(aa) + within(bb) - 2 * ab.mean()

    value, error = mmd(
        polynomial_sums(tx), polynomial_sums(ty), polynomial_sums(tx, ty), polynomial_sums(ty, tx)
    )
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


WITHOUT_TRITON = """
import os, sys
sys.modules["triton"] = None
import torch
from genmodels.kernels import dispatch, gbm_step, langevin_chain, langevin_step, mala, pairwise
from genmodels.kernels import philox, resize_normalize
from genmodels.sampling import langevin
assert not dispatch.HAS_TRITON
y = torch.zeros(2, 3)
out = langevin_step.langevin_step(y, y, step=0.5, seed=torch.tensor([1, 2]))
assert torch.equal(out, philox.philox_normal((3,), torch.tensor([1, 2])))
os.environ["GENMODELS_KERNELS"] = "triton"
try:
    philox.philox_normal((3,), 1)
except ValueError as error:
    print(error)
"""


def test_everything_imports_and_runs_without_triton():
    env = {k: v for k, v in os.environ.items() if k != "GENMODELS_KERNELS"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout


def test_dispatch_says_why(monkeypatch):
    monkeypatch.setenv("GENMODELS_KERNELS", "cuda")
    with pytest.raises(ValueError, match="GENMODELS_KERNELS must be auto, torch or triton"):
        philox_normal((3,), 1)
    monkeypatch.setenv("GENMODELS_KERNELS", "triton")
    with pytest.raises(ValueError, match="GENMODELS_KERNELS=triton, but"):
        philox_normal((3,), 1)
