"""Geometric Brownian motion against closed forms: samplers, drift errors, divergence, levels."""

import itertools
import math

import pytest
import torch
from scipy import stats

from genmodels.kernels.gbm_step import gbm_step
from genmodels.kernels.philox import philox_normal
from genmodels.sampling import divergence, gbm
from genmodels.seeding import Stream

# log X_0 ~ N(M, V), sigma = 0.8 for one unit of time; 200,000 samples: the standard error of the
# mean is 7e-4, of the variance 0.3 %, and 1 % of KS statistics exceed 3.6e-3.
M, V, S = 0.25, 0.09, 0.64
COUNT = (500, 400)


def normal(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda i, y: torch.randn(y.shape, generator=generator, dtype=y.dtype)


def start(drift=0.5, v=V, level=S, count=COUNT):
    z = torch.randn(count, generator=torch.Generator().manual_seed(1))
    return M + (drift - 0.5) * level + math.sqrt(v + level) * z


def lognormal(drift=0.5, v=V):
    return lambda y, level: -(y - M - (drift - 0.5) * level) / (v + level)


PARTS = ((0.3, 0.05, 0.1), (0.7, 0.6, 0.05))  # weight, mean, standard deviation of log x


def mixture(y, level):
    """The score of the mixture of two log-normals, in log space."""
    logs = [
        math.log(w) - (y - m) ** 2 / (2 * (s**2 + level)) - math.log(s**2 + level) / 2
        for w, m, s in PARTS
    ]
    share = torch.softmax(torch.stack(logs), dim=0)
    return sum(r * (m - y) / (s**2 + level) for r, (_, m, s) in zip(share, PARTS))


def mixture_cdf(y):
    return sum(w * stats.norm.cdf(y, m, s) for w, m, s in PARTS)


def assert_law(y, mean=3e-3, variance=1.5e-2, ks=6e-3):
    y = y.double().flatten()
    assert abs(float(y.mean()) - M) < mean
    assert abs(float(y.var()) / V - 1) < variance
    assert stats.kstest(y.numpy(), stats.norm(M, math.sqrt(V)).cdf).statistic < ks


def test_dls_recovers_a_lognormal():
    """The paper's process: sigma 0.8, 1,000 even steps."""
    levels = gbm.variance_levels(1000, S / 1000, S, "uniform")
    assert_law(gbm.sample_dls(lognormal(), start(), levels, noise=normal(2), denoise=False))


def test_ums_recovers_a_lognormal_without_a_flip():
    levels = gbm.variance_levels(1000, S / 1000, S, "uniform")
    x, flips = gbm.sample_ums(lognormal(), start(), levels, noise=normal(3), denoise=False)
    assert (x > 0).all() and not flips.any()
    assert_law(x.log())


def test_ums_counts_its_flips():
    """Few steps from a large sigma: the factor 1 + v h + ... + sqrt(v) z is often negative."""
    levels = gbm.variance_levels(20, 0.0025, 9.0)
    y = start(level=9.0, count=(50, 40))
    x, flips = gbm.sample_ums(lognormal(), y, levels, noise=normal(4))
    assert flips.dtype == torch.int32 and flips.shape == (50,)
    assert flips.sum() > 200 and (x < 0).any()
    odd = (x < 0).sum(1).to(torch.int32)
    assert ((flips - odd) % 2 == 0).all()  # an element is negative after an odd number of flips


@pytest.mark.parametrize(
    ("sampler", "steps", "options", "drift"),
    [
        ("dls", 400, {}, 0.0),
        ("ancestral", 400, {}, 0.5),
        ("ode", 40, {"solver": "heun"}, 0.0),
        ("ode", 20, {"solver": "rk4"}, 0.0),
        ("ums", 2000, {}, 0.0),
    ],
)
def test_geometric_grid_recovers_a_lognormal(sampler, steps, options, drift):
    """From sigma 3 to 0.02: a hundred data variances, out of reach of the uniform grid.

    drift = 0 is the martingale in x, whose log x drifts by -S/2; it has no part in the answer.
    """
    levels = gbm.variance_levels(steps, 4e-4, 9.0)
    if sampler != "ode":
        options = options | {"noise": normal(5)}
    call = getattr(gbm, f"sample_{sampler}")
    count = (50, 400) if sampler == "ums" else COUNT
    y = call(lognormal(drift), start(drift, level=9.0, count=count), levels, drift=drift, **options)
    if sampler == "ums":  # 20,000 samples: three times the standard error
        assert abs(float(y[0].log().mean()) - M) < 1.2e-2
        return
    assert_law(y)


# Errors of the drift in log space, c sigma^2, as they would stand in the exponent
# v h + 1.5 v - m: what h and m become.
MUTATIONS = {
    "right": (0.0, lambda h, m, v: (h, m)),
    "no divergence of g^2": (-2.0, lambda h, m, v: (h, m + 2 * v)),
    "half of it": (-1.0, lambda h, m, v: (h, m + v)),
    "no Ito correction": (0.5, lambda h, m, v: (h, m - v / 2)),
    "s in place of h": (1.0, lambda h, m, v: (h + 1, m)),
}


def test_drift_errors_shift_the_mean_by_the_law():
    """c sigma^2 too much moves the mean of log x by c V log(1 + S / V), and no variance.

    The five run side by side on the same noise through the kernel's form in x: a tolerance of 5e-3
    tells all of them apart, and the right one is right. (250 steps leave the variance 1.8 % high.)
    """
    levels, draw = gbm.variance_levels(250, S / 250, S, "uniform"), normal(6)
    x = {name: start().exp() for name in MUTATIONS}
    for level, after in itertools.pairwise(levels):
        z, v = draw(0, x["right"]), level - after
        for name, (_, mutate) in MUTATIONS.items():
            h, m = mutate(lognormal()(x[name].log(), level) - 1, 0.5 * v, v)
            gbm_step(x[name], h, variance=v, drift=m, form="dls", noise=z, out=x[name])
    for name, (c, _) in MUTATIONS.items():
        shift = float(x[name].log().double().mean()) - M
        assert abs(shift - c * V * math.log(1 + S / V)) < 5e-3, name
        assert abs(float(x[name].log().double().var()) / V - 1) < 2.5e-2, name


def test_dls_is_ve_diffusion_in_log_space_to_the_bit():
    """Euler's method on the reverse SDE of y, dy = s dS + dW, with the same noise."""
    levels, seeds = gbm.variance_levels(200, 1e-4, 4.0), torch.arange(6) + 40
    y = ve = start(level=4.0, count=(6, 7))
    for i, (level, after) in enumerate(itertools.pairwise(levels)):
        v = level - after
        z = philox_normal((7,), seeds, i, stream=int(Stream.SAMPLER), exact=False)
        ve = ve + (v * mixture(ve, level) + math.sqrt(v) * z)
    dls = gbm.sample_dls(mixture, y, levels, noise=seeds, denoise=False)
    assert torch.equal(dls, ve)


def test_dls_is_the_kernel_in_h():
    """The same walk through form="dls" on x with h = s - 1: the state is exp(y)."""
    levels = gbm.variance_levels(100, 1e-3, 1.0)
    y = start(level=1.0, count=(4, 9)).double()
    x, draw = y.exp(), normal(7)
    for i, (level, after) in enumerate(itertools.pairwise(levels)):
        h, v = mixture(x.log(), level) - 1, level - after
        x = gbm_step(x, h, variance=v, drift=0.5 * v, form="dls", noise=draw(i, x))
    y = gbm.sample_dls(mixture, y, levels, noise=normal(7), denoise=False)
    torch.testing.assert_close(x.log(), y, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("sampler", "steps", "limit"),
    [("dls", 500, 5.2e-3), ("ode", 100, 5.2e-3), ("ancestral", 500, 8e-3)],
)
def test_mixture_of_lognormals(sampler, steps, limit):
    """KS of 100,000 samples (1 % critical value 5.2e-3) and the weight of the left mode."""
    generator = torch.Generator().manual_seed(8)
    pick = torch.rand(250, 400, generator=generator) < PARTS[0][0]
    clean = torch.where(pick, PARTS[0][1], PARTS[1][1]) + torch.where(
        pick, PARTS[0][2], PARTS[1][2]
    ) * torch.randn(pick.shape, generator=generator)
    y = clean + 0.8 * torch.randn(pick.shape, generator=generator)
    levels = gbm.variance_levels(steps, 1e-5, S)
    options = {"noise": normal(9)} if sampler != "ode" else {"solver": "rk4"}
    y = getattr(gbm, f"sample_{sampler}")(mixture, y, levels, **options).flatten().double()
    assert stats.kstest(y.numpy(), mixture_cdf).statistic < limit
    assert abs(float((y < 0.35).double().mean()) - 0.3) < 6e-3


# form, step in time, inner steps, data variance, and the variance that is left (1,000 levels,
# annealing 0.995, sigma 0.8): settings published for MNIST (both forms), Fashion-MNIST and KMNIST.
PUBLISHED = [
    ("dls", 6.165e-4, 1, 0.0577, 0.0345),
    ("ums", 1.438e-4, 4, 0.0577, 0.0422),
    ("dls", 5.863e-4, 1, 0.0704, 0.0502),
    ("dls", 2.113e-4, 3, 0.0473, 0.0248),
]


@pytest.mark.parametrize(("form", "delta", "inner", "v", "left"), PUBLISHED)
def test_the_papers_sampler_loses_variance(form, delta, inner, v, left):
    """With the exact score 27 to 48 % of the variance is lost, as a linear recursion predicts."""
    levels, step = [S * (1 - k / 1000) for k in range(1000)], delta * S
    variance = v + S
    for k, level in enumerate(levels):
        for _ in range(inner):
            variance = (1 - step / (v + level)) ** 2 * variance + step * 0.995 ** (2 * k)
    y = start(v=v, count=(40, 250))
    x, flips = gbm.sample_paper(
        lognormal(v=v),
        y,
        levels,
        noise=normal(10),
        delta=delta,
        inner=inner,
        anneal=0.995,
        form=form,
        rate=S,
    )
    # 10,000 samples know a variance to 1.4 %; ums adds a bias of its own.
    assert abs(float(x.log().var()) / variance - 1) < 0.06
    assert abs(variance - left) < 0.002
    assert not flips.any() and 0.25 < 1 - left / v < 0.5
    exact = gbm.variance_levels(400, 1e-4, S)
    whole = gbm.sample_ancestral(lognormal(v=v), y, exact, noise=normal(11))
    assert abs(float(whole.var()) / v - 1) < 0.06


def test_final_steps_of_the_papers_sampler_draw_no_noise():
    levels = [S * (1 - k / 10) for k in range(10)]
    y, step = start(count=(2, 3)), 1e-3 * S
    options = {"delta": 1e-3, "rate": S, "anneal": 1.0}
    x, _ = gbm.sample_paper(lognormal(), y, levels, noise=normal(1), final=2, **options)
    expected, _ = gbm.sample_paper(lognormal(), y, levels, noise=normal(1), **options)
    expected = expected.log()
    for _ in range(2):
        expected = expected + step * lognormal()(expected, levels[-1])
    torch.testing.assert_close(x.log(), expected)


@pytest.mark.parametrize("grid", gbm.GRIDS)
def test_levels(grid):
    levels = gbm.variance_levels(5, 0.01, 1.0, grid)
    power = {"uniform": lambda s: s, "quadratic": math.sqrt, "geometric": math.log}[grid]
    even = [power(level) for level in levels[:-1]]
    assert levels[0] == pytest.approx(1.0) and levels[-2:] == [pytest.approx(0.01), 0.0]
    assert all(b - a == pytest.approx(even[1] - even[0]) for a, b in itertools.pairwise(even))
    assert gbm.variance_levels(1, 0.01, 1.0, grid) == [pytest.approx(1.0), 0.0]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [((0, 0.1, 1.0), "steps=0"), ((5, 1.0, 1.0), "low=1.0"), ((5, 0.1, 1.0, "even"), "grid=even")],
)
def test_levels_refuse(arguments, key):
    with pytest.raises(ValueError, match=key):
        gbm.variance_levels(*arguments)


def test_order_of_rk4():
    """On a log-normal the ODE has the solution (y - M) sqrt((V + S1) / (V + S0))."""
    errors = []
    for steps in (8, 16, 32):
        levels = gbm.variance_levels(steps, 1e-3, 1.0)[:-1]
        y = gbm.sample_ode(lognormal(), torch.full((1, 1), M + 1.0).double(), levels, solver="rk4")
        errors.append(abs(float(y) - M - math.sqrt((V + 1e-3) / (V + 1))))
    # steps + 1 levels: the step ratios are 15/7 and 31/15.
    assert math.log(errors[0] / errors[1]) / math.log(15 / 7) == pytest.approx(4, abs=0.4)
    assert math.log(errors[1] / errors[2]) / math.log(31 / 15) == pytest.approx(4, abs=0.2)


def coupled(y, level):
    """A score whose Jacobian is not symmetric; its divergence is -sum_i 3 y_i^2 - D level."""
    return -(y**3) - level * y + y.roll(1, dims=1).sin()


def test_divergence_exact_and_estimated():
    y = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
    expected = -(3 * y**2).sum(1) - 8 * 0.3
    s, exact = divergence.score_and_divergence(coupled)(y, 0.3)
    torch.testing.assert_close(s, coupled(y, 0.3))
    torch.testing.assert_close(exact, expected)
    generator = torch.Generator().manual_seed(1)
    signs = [torch.randint(0, 2, y.shape, generator=generator) * 2.0 - 1 for _ in range(4000)]
    _, estimate = divergence.score_and_divergence(coupled, signs)(y, 0.3)
    # The off-diagonal terms have variance below 8: 4,000 probes know the trace to 0.05.
    torch.testing.assert_close(estimate, expected, rtol=0, atol=0.2)


def test_nonnegative_objective_has_the_closed_forms():
    """J = -(1 + 1/V)/2 at the truth, e^2/(2 V^2) more for a mean off by e, (1/V - 1/v)^2 V/2 for v.

    J is written in psi = grad_x log p as well, as Hyvarinen 2007 does, by autograd in x.
    """
    y = M + math.sqrt(V) * torch.randn(1_000_000, 1, generator=torch.Generator().manual_seed(0))
    y = y.double()

    @torch.no_grad()
    def objective(mean, variance):
        s, div = divergence.score_and_divergence(lambda y, level: -(y - mean) / variance)(y, 0.0)
        return divergence.nonnegative_objective(s, div)

    truth = objective(M, V)
    assert abs(float(truth.mean()) / (-(1 + 1 / V) / 2) - 1) < 4e-3
    assert float((objective(M + 0.1, V) - truth).mean()) == pytest.approx(
        0.01 / (2 * V**2), rel=0.02
    )
    gain = (1 / V - 1 / 0.12) ** 2 * V / 2
    assert float((objective(M, 0.12) - truth).mean()) == pytest.approx(gain, rel=0.02)
    x = y[:100].exp().requires_grad_()
    psi = (-1 - (x.log() - M) / V) / x
    (slope,) = torch.autograd.grad(psi.sum(), x)
    written = (2 * x * psi + x**2 * slope + (x * psi) ** 2 / 2).sum(1)
    torch.testing.assert_close(truth[:100], written.detach())


def test_likeliest_variance_finds_the_noise():
    """Noisy log-normal images of 64 pixels: the maximum likelihood of S is mean (y-M)^2 - V."""
    generator = torch.Generator().manual_seed(0)
    levels = gbm.variance_levels(49, 1e-4, 4.0)[-2::-1]
    for level in (0.02, 0.3):
        y = M + math.sqrt(V + level) * torch.randn(200, 256, generator=generator)
        signs = [torch.ones_like(y)]
        found = divergence.likeliest_variance(
            y, levels, divergence.score_and_divergence(lognormal(), signs)
        )
        exact = (y - M).square().mean(1).double() - V
        good = exact > 0.01
        assert good.float().mean() > 0.7
        torch.testing.assert_close(found[good], exact[good], rtol=0.06, atol=1e-3)
    assert float(found.detach().mean()) == pytest.approx(0.3, rel=0.03)
