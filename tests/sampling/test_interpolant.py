"""Paths, fields and samplers of interpolants against Gaussian mixtures, whose fields are known."""

import itertools
import math

import pytest
import torch

from genmodels.sampling.interpolant import (
    DIFFUSIONS,
    GAMMAS,
    HEADS,
    PATHS,
    Interpolation,
    sample_path,
    time_grid,
)

ONE_SIDED = ("one_sided_linear", "one_sided_trig")
WAYS = [
    *(Interpolation(path) for path in ONE_SIDED),
    Interpolation("linear"),
    Interpolation("trig"),
    *(
        Interpolation(path, gamma, a)
        for path in ("linear", "trig", "encdec", "mirror")
        for gamma, a in (("brownian", 1.0), ("quadratic", 2.0), ("sin2", 0.9), ("sigmoid", 1.5))
    ),
]


def known_as(path):
    return f"{path.name}-{path.gamma}"


# ------------------------------------------------------------------------------------------------
# Two mixtures of two Gaussians on the line: (share, mean, variance) of each part

START = [(0.4, -1.0, 0.04), (0.6, 0.5, 0.09)]
END = [(0.3, -0.7, 0.01), (0.7, 0.8, 0.0225)]
NOISE = [(1.0, 0.0, 1.0)]


def start_of(path):
    return {"mirror": END}.get(path.name, NOISE if path.one_sided else START)


class Exact:
    """All fields of a path between two mixtures, written out here part by part, float64.

    With parts i and j the state is Gaussian: mean m = a mu_i + b nu_j, variance
    C = a^2 C_i + b^2 D_j + g^2; each field is a mean over the parts of a linear regression on x.
    """

    def __init__(self, path):
        self.path = path
        self.parts = [(p * q, m, n, v, w) for (p, m, v), (q, n, w) in self.pairs()]

    def pairs(self):
        if self.path.name == "mirror" or self.path.one_sided:  # x_0 has no share in it
            return [((1.0, 0.0, 0.0), end) for end in END]
        return list(itertools.product(START, END))

    def __call__(self, x, t):
        c = self.path.at(torch.as_tensor(t, dtype=torch.float64)).numbers()
        weights, values = [], {name: [] for name in HEADS}
        for share, mean0, mean1, var0, var1 in self.parts:
            mean = c.alpha * mean0 + c.beta * mean1
            var = c.alpha**2 * var0 + c.beta**2 * var1 + c.gamma**2
            gain = (x - mean) / var
            weights.append(
                math.log(share) - (x - mean) ** 2 / (2 * var) - math.log(2 * math.pi * var) / 2
            )
            path = c.d_alpha * mean0 + c.d_beta * mean1
            path = path + (c.alpha * c.d_alpha * var0 + c.beta * c.d_beta * var1) * gain
            values["v"].append(path)
            values["b"].append(path + c.gamma_d_gamma * gain)
            values["eta"].append(c.gamma * gain)
            values["s"].append(-gain)
            values["denoiser"].append(mean1 + c.beta * var1 * gain)
        logs = torch.stack(weights)
        shares = logs.softmax(dim=0)
        self.log_density = logs.logsumexp(dim=0)
        return {name: (shares * torch.stack(rows)).sum(dim=0) for name, rows in values.items()}


def draw(parts, count, seed):
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([share for share, _, _ in parts], dtype=torch.float64)
    which = torch.multinomial(shares, count, replacement=True, generator=generator)
    mean, var = (torch.tensor([p[k] for p in parts], dtype=torch.float64)[which] for k in (1, 2))
    return mean + var.sqrt() * torch.randn(count, dtype=torch.float64, generator=generator)


def kolmogorov_smirnov(x, parts):
    """Return the largest distance between the samples' distribution function and the exact one."""
    x = x.flatten().sort().values
    cdf = sum(p * torch.special.ndtr((x - m) / math.sqrt(v)) for p, m, v in parts)
    steps = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    return float(torch.maximum((cdf - steps[:-1]).abs(), (cdf - steps[1:]).abs()).max())


# ------------------------------------------------------------------------------------------------
# Paths


def test_every_path_and_every_gamma_is_tried():
    assert {path.name for path in WAYS} == set(PATHS)
    assert {path.gamma for path in WAYS} == set(GAMMAS)


@pytest.mark.parametrize("path", WAYS, ids=known_as)
def test_derivatives_and_ends(path):
    t = torch.tensor([0.02, 0.2, 0.49, 0.51, 0.77, 0.98], dtype=torch.float64, requires_grad=True)
    c = path.at(t)
    for name in ("alpha", "beta", "gamma"):
        value, slope = getattr(c, name), getattr(c, f"d_{name}")
        (expected,) = (
            torch.autograd.grad(value.sum(), t, retain_graph=True)
            if value.requires_grad
            else (torch.zeros_like(t),)
        )
        torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(c.gamma_d_gamma, c.gamma * c.d_gamma)
    ends = path.at(torch.tensor([0.0, 1.0], dtype=torch.float64))
    first, last = ([float(getattr(ends, k)[i]) for k in ("alpha", "beta", "gamma")] for i in (0, 1))
    start = [0, 1, 0] if path.name == "mirror" else [0, 0, 1] if path.one_sided else [1, 0, 0]
    assert first == pytest.approx(start, abs=1e-12)
    assert last == pytest.approx([0, 1, 0], abs=1e-12)
    assert torch.isfinite(ends.gamma_d_gamma).all()  # where gamma' may be infinite
    if path.name == "trig":
        torch.testing.assert_close(c.alpha**2 + c.beta**2 + c.gamma**2, torch.ones_like(t))


def learned(path):
    """Return every choice of fields that a path can be learned by."""
    choices = [heads for k in (1, 2) for heads in itertools.permutations(HEADS, k)]
    return [heads for heads in choices if path.learnable(heads)]


@pytest.mark.parametrize("path", WAYS, ids=known_as)
def test_all_fields_follow_from_those_that_are_learned(path):
    x, exact, t = torch.linspace(-1.5, 1.5, 41, dtype=torch.float64), Exact(path), 0.8
    fields = exact(x, t)
    c = path.at(torch.tensor(t, dtype=torch.float64)).numbers()
    x.requires_grad_(True)
    exact(x, t)
    (score,) = torch.autograd.grad(exact.log_density.sum(), x)
    torch.testing.assert_close(fields["s"], score, rtol=1e-9, atol=1e-9)
    assert learned(path)
    for heads in learned(path):
        some = {name: fields[name] for name in heads}
        torch.testing.assert_close(path.velocity(c, x.detach(), some), fields["b"])
        mean = path.mean(c, x.detach(), some)
        if heads == ("b",) and path.noisy and not path.one_sided:
            assert mean is None  # b alone does not say it
            continue
        torch.testing.assert_close(mean, fields["denoiser"], rtol=1e-9, atol=1e-9)
        if path.noisy:
            torch.testing.assert_close(path.score(c, x.detach(), some), fields["s"])


def test_what_does_not_give_the_velocity_is_not_learnable():
    assert learned(Interpolation("linear")) == [("b",)]
    for heads in (("v",), ("eta",), ("s",), ("eta", "s"), ("b", "v"), ("denoiser",), ()):
        assert not Interpolation("linear", "sin2").learnable(heads)
    assert not Interpolation("mirror").learnable(("eta",))
    assert not Interpolation("one_sided_trig").learnable(("b", "eta"))


# ------------------------------------------------------------------------------------------------
# Samplers: from exact fields to the exact mixture. Kolmogorov's 1 % level is 1.63 / sqrt(n).


def carried(path, heads, count, steps, sampler, eps=0.0, diffusion="constant", cut=1e-3):
    exact = Exact(path)
    x = draw(start_of(path), count, 1).reshape(-1, 1, 1, 1)
    times = time_grid(steps, "cosine", cut, 1 - cut, path)
    form = DIFFUSIONS[diffusion]

    def known(x, t):
        fields = exact(x, t)
        return {name: fields[name] for name in heads}

    seeds = torch.arange(count)
    x = sample_path(
        path, known, x, times, sampler=sampler, seeds=seeds, eps=lambda t, c: eps * form(t, c)
    )
    return kolmogorov_smirnov(x, END)


ODES = [
    (Interpolation("one_sided_linear"), ("b",)),
    (Interpolation("one_sided_trig"), ("eta",)),
    (Interpolation("linear"), ("b",)),
    (Interpolation("linear", "brownian"), ("b", "eta")),
    (Interpolation("trig", "sin2"), ("b", "s")),
    (Interpolation("encdec", "sin2"), ("v", "eta")),
]


@pytest.mark.parametrize(
    ("path", "heads"), ODES, ids=lambda x: known_as(x) if x[0] in PATHS else ""
)
def test_the_ode_ends_at_the_data(path, heads):
    assert carried(path, heads, 4000, 40, "rk4") < 1.63 / 4000**0.5


SDES = [
    (Interpolation("linear", "brownian"), ("b", "eta"), 0.1, "constant"),
    (Interpolation("linear", "brownian"), ("v", "s"), 1.0, "gamma"),
    (Interpolation("one_sided_linear"), ("b",), 1.0, "sbdm"),
    (Interpolation("mirror", "sin2"), ("eta",), 0.5, "sin2"),
]


@pytest.mark.parametrize(
    ("path", "heads", "eps", "diffusion"),
    [SDES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in SDES[1:])],
)
def test_the_sde_ends_there_for_any_eps(path, heads, eps, diffusion):
    assert carried(path, heads, 10_000, 150, "sde", eps, diffusion) < 1.63 / 100


@pytest.mark.slow
@pytest.mark.parametrize(("path", "heads"), ODES)
@pytest.mark.parametrize("sampler", ["heun", "midpoint", "rk4"])
def test_the_ode_with_many_samples(path, heads, sampler):
    # Of Brownian paths a cut of 1e-3 leaves a deviation of 0.03 out at both ends: so many see it.
    assert carried(path, heads, 50_000, 200, sampler, cut=1e-4) < 0.0073


@pytest.mark.slow
@pytest.mark.parametrize(("eps", "diffusion", "steps"), [(0.1, "constant", 200), (1, "gamma", 400)])
@pytest.mark.parametrize("sampler", ["sde", "sde_heun"])
def test_the_sde_with_many_samples(eps, diffusion, steps, sampler):
    path = Interpolation("linear", "brownian")
    assert carried(path, ("b", "eta"), 50_000, steps, sampler, eps, diffusion) < 0.0073


def test_the_order_of_each_solver():
    """Error of one state on a smooth flow, at twice the steps: 2, 4, 4 and 16 times smaller."""
    path, exact = Interpolation("linear", "quadratic"), Exact(Interpolation("linear", "quadratic"))
    x = torch.linspace(-1.2, 1.2, 7, dtype=torch.float64).reshape(-1, 1, 1, 1)

    def end(sampler, steps):
        times = [0.1 + 0.6 * k / steps for k in range(steps + 1)]
        return sample_path(path, lambda x, t: {"b": exact(x, t)["b"]}, x, times, sampler=sampler)

    best = end("rk4", 200)
    for sampler, factor in (("euler", 2), ("heun", 4), ("midpoint", 4), ("rk4", 16)):
        coarse, fine = (float((end(sampler, n) - best).abs().max()) for n in (20, 40))
        assert math.log2(coarse / fine) == pytest.approx(math.log2(factor), abs=0.35), sampler


def test_back_along_the_ode():
    path, exact = Interpolation("linear", "sin2"), Exact(Interpolation("linear", "sin2"))
    x = torch.linspace(-1.2, 1.2, 7, dtype=torch.float64).reshape(-1, 1, 1, 1)
    times = [0.05 + 0.9 * k / 100 for k in range(101)]

    def known(x, t):
        return {"b": exact(x, t)["b"]}

    there = sample_path(path, known, x, times, sampler="rk4")
    back = sample_path(path, known, there, times[::-1], sampler="rk4")
    assert (there - x).abs().max() > 0.1
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)


def test_grids():
    path = Interpolation("one_sided_linear")
    assert time_grid(4, "uniform", 0, 1, path) == [0, 0.25, 0.5, 0.75, 1]
    assert time_grid(1, "uniform", 0.1, 0.9, path) == [0.1, 1]
    times = time_grid(5, "uniform", 0.0, 0.999, path, last=0.04)
    assert times == pytest.approx([0, 0.32 * 0.75, 0.48, 0.72, 0.96, 1])
    assert time_grid(2000, "uniform", 0, 0.999, path)[-2] == 0.999
    cosine = time_grid(4, "cosine", 0.001, 0.999, path)
    assert cosine == pytest.approx([0.001, 0.001 + 0.998 / 4, 0.001 + 0.998 * 0.75, 0.999, 1])
    for name in ONE_SIDED:  # Karras et al., equation 5, at t = 1 / (1 + sigma) and its like
        path = Interpolation(name)
        low, high = path.time_of(torch.tensor([80.0, 0.002], dtype=torch.float64)).tolist()
        times = torch.tensor(time_grid(18, "edm", low, high, path), dtype=torch.float64)
        c = path.at(times[:-1])
        i = torch.arange(18, dtype=torch.float64) / 17
        expected = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        torch.testing.assert_close(c.gamma / c.beta, expected, rtol=1e-9, atol=0)
        assert times[-1] == 1


def test_the_noise_of_an_sde_is_the_seeds_alone():
    path = Interpolation("linear", "brownian")
    exact = Exact(path)
    x = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    options = {"sampler": "sde", "eps": lambda t, c: 0.5}
    times = time_grid(6, "uniform", 1e-3, 0.999, path)

    def run(x, seeds):
        return sample_path(path, exact, x, times, seeds=torch.tensor(seeds), **options)

    all_of_them = run(x, [5, 6, 7])
    assert len(all_of_them.unique()) == 3
    torch.testing.assert_close(run(x[:1], [6]), all_of_them[1:2], rtol=0, atol=0)
