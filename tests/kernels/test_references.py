"""Steps of chains: the torch references against the formulas in numpy, and laws in closed form."""

import numpy as np
import pytest
import torch
from scipy import stats

from genmodels.kernels.gbm_step import gbm_step
from genmodels.kernels.langevin_chain import DoubleWell, Gaussian, Mixture, langevin_chain
from genmodels.kernels.langevin_step import langevin_step
from genmodels.kernels.mala import mala_accept, mala_propose
from genmodels.kernels.philox import chain_normals, philox_normal, philox_uniform
from tests.helpers.allocations import LargestMade


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
    assert torch.equal(langevin_step(big, big, step=0.5, seed=1), chain_normals(big, 1))


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
