"""Torch references: steps of chains against numpy and closed forms, scores against libraries."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist

from genmodels.kernels.dispatch import chunks
from genmodels.kernels.gbm_step import gbm_step
from genmodels.kernels.langevin_chain import DoubleWell, Gaussian, Mixture, langevin_chain
from genmodels.kernels.langevin_step import langevin_step
from genmodels.kernels.mala import mala_accept, mala_propose
from genmodels.kernels.mmd import mmd
from genmodels.kernels.pairwise import ball_count, knn_radius, polynomial_sums, rbf_sums
from genmodels.kernels.philox import chain_normals, philox_normal, philox_uniform
from genmodels.kernels.resize_normalize import resize_normalize
from genmodels.kernels.tiles import square_limit
from tests.helpers.allocations import LargestMade

# ------------------------------------------------------------------------------------------------
# Steps of chains, against the formulas in numpy and laws in closed form


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
        "grad_clip": draw(shape[0]).abs() + 0.5,
        "grad_norm": draw(shape[0]).abs() + 0.5,
        "noise": draw(*shape),
    }


def numpy_step(a):
    """langevin_step, chain by chain in float64."""
    y, g, x, z = (a[k].double().numpy() for k in ("y", "grad", "tether", "noise"))
    out = np.empty_like(y)
    for b in range(len(y)):
        step, s, k, clip, norm = (
            float(a[n][b])
            for n in ("step", "noise_scale", "tether_scale", "grad_clip", "grad_norm")
        )
        drift = np.clip(g[b], -clip, clip)
        drift = drift * min(1.0, norm / np.sqrt((drift**2).sum()))
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
    for exact in (True, False):
        got = langevin_step(big, big, step=0.5, seed=1, exact=exact)
        assert torch.equal(got, chain_normals(big, 1, exact=exact))


def test_langevin_step_keeps_nan_and_gradients():
    y, zero = torch.tensor([[float("nan"), 1.0, 5.0]]), torch.zeros(1, 3)
    out = langevin_step(y, zero, step=0.1, noise_scale=0, clamp=(-1, 1))
    assert out[0, 0].isnan() and out[0, 1:].tolist() == [1.0, 1.0]
    y = torch.ones(2, 3, requires_grad=True)
    langevin_step(y, -y, step=0.25, noise_scale=0).sum().backward()
    assert torch.equal(y.grad, torch.full((2, 3), 0.75))


@pytest.mark.parametrize("name", ["step", "noise_scale", "tether_scale", "grad_clip", "grad_norm"])
def test_a_number_that_needs_a_gradient_keeps_the_kernel_away(name, monkeypatch):
    """A kernel would detach it without a word."""
    y, number = torch.ones(2, 3), torch.ones(2, requires_grad=True)
    options = {"step": 0.1, "seed": 1, "tether": y, "tether_scale": 0.1, name: number}
    (gradient,) = torch.autograd.grad(langevin_step(y, 2 * y, **options).sum(), number)
    assert gradient.isfinite().all()
    monkeypatch.setenv("GENMODELS_KERNELS", "triton")
    with pytest.raises(ValueError, match="needs a gradient|triton is not installed"):
        langevin_step(y, y, **options)
    if name in ("step", "noise_scale"):
        options = {"variance" if name == "step" else name: number}
        with pytest.raises(ValueError, match="needs a gradient|triton is not installed"):
            gbm_step(y, y, seed=1, **{"variance": 0.1, **options})


def test_limits_of_the_gradient_are_numbers_or_one_per_item():
    y, grad = torch.zeros(3, 2), torch.tensor([[3.0, 4.0], [0.3, 0.4], [-6.0, 8.0]])
    options = {"step": 1.0, "noise_scale": 0}
    norms = langevin_step(y, grad, grad_norm=torch.tensor([1.0, 1.0, 5.0]), **options)
    assert torch.allclose(norms, torch.tensor([[0.6, 0.8], [0.3, 0.4], [-3.0, 4.0]]))
    clips = langevin_step(y, grad, grad_clip=torch.tensor([1.0, 0.35, 7.0]), **options)
    assert torch.allclose(clips, torch.tensor([[1.0, 1.0], [0.3, 0.35], [-6.0, 7.0]]))
    for one in (2.0, torch.tensor(2.0), torch.tensor([2.0])):
        assert torch.equal(langevin_step(y, grad, grad_clip=one, **options), grad.clamp(-2, 2))


@pytest.mark.parametrize("needing", ["y", "grad", "step"])
def test_out_beside_a_gradient_is_refused(needing):
    given = {"y": torch.ones(2, 3), "grad": torch.ones(2, 3), "step": torch.ones(2)}
    given[needing].requires_grad_()
    y, grad, step = given.values()
    out = torch.empty(2, 3)
    with pytest.raises(
        ValueError, match="langevin_step: out= cannot be given where an input needs"
    ):
        langevin_step(y, grad, step=step, noise_scale=0, out=out)
    with pytest.raises(ValueError, match="gbm_step: out= cannot be given where an input needs"):
        gbm_step(y, grad, variance=step, noise_scale=0, out=out)
    with torch.no_grad():
        assert langevin_step(y, grad, step=step, noise_scale=0, out=out) is out


def test_counters_and_places_to_write_must_fit():
    y, lp = torch.ones(4, 2), torch.zeros(4)
    strided = torch.zeros(8, dtype=torch.int32)[::2]
    for wrong in (strided, strided.long(), strided[:3].contiguous()):
        with pytest.raises(ValueError, match=r"flips must be contiguous int32 \(4,\) on cpu"):
            gbm_step(y, y, variance=0.1, seed=1, form="ums", flips=wrong)
        with pytest.raises(ValueError, match=r"count must be contiguous int32 \(4,\) on cpu"):
            mala_accept(y, y, y, y, lp, lp, step=0.1, seed=1, count=wrong)
    with pytest.raises(ValueError, match=r"uniform must be \(4,\) on cpu"):
        mala_accept(y, y, y, y, lp, lp, step=0.1, uniform=torch.rand(3))
    with pytest.raises(ValueError, match="out must be like y, torch.float32"):
        langevin_step(y, y, step=0.1, seed=1, out=y.half())
    with pytest.raises(ValueError, match="mask must be on cpu"):
        langevin_step(y, y, step=0.1, seed=1, mask=torch.ones(4, 2, device="meta").bool())
    big = torch.empty(1, 2**30 + 1, device="meta")
    with pytest.raises(ValueError, match=r"an item of y may have 2\^30 elements"):
        langevin_step(big, big, step=0.1, seed=1)


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
    low = [v.float() for v in (y, new)]  # float32 states, the sum and its terms in float64
    *_, double = mala_accept(
        *low,
        *(-v for v in low),
        log_p(low[0]),
        log_p(low[1]),
        step=0.2,
        seed=3,
        accumulate=torch.float64,
    )
    start, to = (v.double() for v in low)
    exact = ((to - 0.8 * start) ** 2 - (start - 0.8 * to) ** 2).flatten(1).sum(1) / 0.8
    exact += log_p(low[1]).double() - log_p(low[0]).double()
    assert (double - exact).abs().max() < 1e-5  # of the densities, given in float32
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
        y,
        new,
        y.clone(),
        y.clone(),
        torch.zeros(4),
        after,
        step=10.0,
        uniform=half,
        count=count,
        inplace=True,
    )
    assert accepted.tolist() == [True, False, False, False] and count.tolist() == [2, 1, 1, 1]
    assert state is y and y.tolist() == [[1.0, 1.0]] + [[0.0, 0.0]] * 3
    assert log_prob.tolist() == [9.0, 0.0, 0.0, 0.0]


def test_references_work_on_some_items_at_a_time():
    """No temporary is as large as the state (1024 x 1024): the cache holds them."""
    y, grad = torch.zeros(1024, 1024), torch.zeros(1024, 1024)
    out, seeds, lp = torch.empty_like(y), torch.arange(1024), torch.zeros(1024)
    for function in (
        lambda: langevin_step(y, grad, step=0.1, seed=seeds, out=out, grad_norm=1.0, clamp=(-1, 1)),
        lambda: gbm_step(y, grad, variance=0.1, seed=1, out=out, form="ums"),
    ):
        with LargestMade() as made:
            function()
        assert made.largest <= 2**18
    with LargestMade() as made:
        mala_accept(y, grad, grad, grad, lp, lp, step=0.1, seed=1, inplace=True)
    assert made.largest <= y.numel()  # the selection itself, written in place


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


def test_analytic_chain_is_rounded_once():
    y = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    for energy in analytic_energies()[:2]:
        options = {"steps": 50, "step": 0.01, "seed": torch.arange(200)}
        for dtype in (torch.bfloat16, torch.float16):
            low = y.to(dtype)
            exact = langevin_chain(low.float(), energy, **options)
            got = langevin_chain(low, energy, **options)
            assert got.dtype == dtype and torch.equal(got, exact.to(dtype))
            assert langevin_chain(low, energy, out=low, **options) is low and torch.equal(low, got)


# ------------------------------------------------------------------------------------------------
# Kernels of evaluation, against scikit-learn, scipy, Pillow and others


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


def test_references_are_cut_for_the_cache_of_a_cpu_and_not_on_another_device():
    size = (64, 3 * 512 * 512)
    assert len(list(chunks(*size, torch.device("cuda")))) == 1
    parts = list(chunks(*size, torch.device("cpu")))
    assert len(parts) == 64 and parts[-1] == slice(63, 64)


def test_squares_compare_as_their_roots_do():
    generator = torch.Generator().manual_seed(0)
    squares = torch.rand(20_000, generator=generator) * 10 ** (torch.arange(20_000) % 60 - 30.0)
    nearest = np.sqrt(squares.double().numpy()).astype(np.float32)  # rounded once
    radius = torch.from_numpy(nearest)
    for shift in (-float("inf"), float("inf")):
        for _ in range(3):
            limit = square_limit(radius)
            inside = np.sqrt(squares.double().numpy()).astype(np.float32) <= radius.numpy()
            assert torch.equal(squares <= limit, torch.from_numpy(inside))
            radius = torch.nextafter(radius, torch.full_like(radius, shift))
        radius = torch.from_numpy(nearest)
    ends = square_limit(torch.tensor([0.0, -1.0, float("inf"), float("nan"), 3e38]))
    assert ends[:3].tolist() == [0.0, -1.0, float("inf")] and ends[3].isnan()
    assert ends[4] == torch.finfo(torch.float32).max


def test_a_row_of_nan_costs_no_other_row_its_neighbours():
    x, y = torch.randn(20, 8), torch.randn(30, 8)
    y[3, 2] = float("nan")
    expected = torch.cdist(x.double(), y[torch.arange(30) != 3].double())
    got = knn_radius(x, y, k=3).double()
    assert torch.allclose(got, expected.topk(3, largest=False).values[:, 2], atol=1e-4)
    assert ball_count(x, y, torch.full((30,), 100.0)).tolist() == [29] * 20
