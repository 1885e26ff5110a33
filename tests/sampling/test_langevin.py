"""Chains over an energy: the contract every sampler keeps, and laws known in closed form."""

import pytest
import torch

from genmodels.sampling import langevin
from genmodels.sampling.langevin import (
    Chain,
    GraphedChain,
    frozen,
    mala_chain,
    sgld_chain,
    ula_chain,
)

SAMPLERS = [ula_chain, sgld_chain, mala_chain]
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda f: f.__name__)


class Quadratic(torch.nn.Module):
    """E(y) = 1/2 sum q y^2 with a parameter, so that freezing can be seen."""

    def __init__(self, precision):
        super().__init__()
        self.precision = torch.nn.Parameter(torch.as_tensor(precision, dtype=torch.float32))
        self.seen = []

    def forward(self, y):
        self.seen.append((torch.is_grad_enabled(), self.precision.requires_grad))
        return 0.5 * (self.precision * y.flatten(1) ** 2).sum(1)


def start(chains=6, shape=(3,)):
    return torch.randn(chains, *shape, generator=torch.Generator().manual_seed(0))


@each_sampler
def test_contract(sampler):
    energy, y = Quadratic([0.5, 1.0, 2.0]), start()
    before, calls = y.clone(), []
    options = {"steps": 4, "step": 0.1, "seed": torch.arange(6)}
    with torch.no_grad():
        chain = sampler(energy, y, callback=lambda i, y: calls.append((i, y.clone())), **options)
    assert isinstance(chain, Chain) and torch.equal(y, before)
    assert chain.y.shape == y.shape and chain.y.dtype == torch.float32
    assert not chain.y.requires_grad and chain.counter == 4
    assert all(seen == (True, False) for seen in energy.seen)  # gradient of y alone
    assert energy.precision.requires_grad and energy.precision.grad is None
    assert [i for i, _ in calls] == [0, 1, 2, 3] and torch.equal(calls[-1][1], chain.y)
    assert chain.grad_norm.shape == (4, 6) and chain.displacement.shape == (6,)
    norm = (energy.precision * before).detach().norm(dim=1)
    assert torch.allclose(chain.grad_norm[0], norm)
    assert torch.allclose(chain.displacement, (chain.y - before).norm(dim=1))
    bare = sampler(energy, y, diagnostics=False, **options)
    assert bare.grad_norm is None and torch.equal(bare.y, chain.y)
    if sampler is mala_chain:
        assert chain.accepted.shape == (4, 6) and chain.acceptance.shape == (6,)
        assert torch.allclose(chain.energy, energy(chain.y).detach())


@each_sampler
def test_noise_depends_on_seed_and_step_alone(sampler):
    energy, y, seeds = Quadratic(1.0), start(shape=(2, 3)), torch.tensor([5, 2, 9, 9, 2**50, -1])
    whole = sampler(energy, y, steps=5, step=0.2, seed=seeds).y
    parts = [
        sampler(energy, y[p], steps=5, step=0.2, seed=seeds[p]).y
        for p in (slice(0, 1), slice(1, 6))
    ]
    assert torch.equal(torch.cat(parts), whole)
    first = sampler(energy, y, steps=2, step=0.2, seed=seeds)
    rest = sampler(energy, first.y, steps=3, step=0.2, seed=seeds, counter=first.counter)
    assert torch.equal(rest.y, whole)
    device = sampler(energy, y, steps=5, step=0.2, seed=seeds, counter=torch.zeros(1).long())
    assert torch.equal(device.y, whole) and int(device.counter) == 5
    other = sampler(energy, y, steps=5, step=0.2, seed=seeds, stream=7).y
    assert not torch.equal(other, whole)

    def drawn(seed):
        return sampler(energy, y, steps=2, step=0.2, seed=torch.Generator().manual_seed(seed)).y

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


@each_sampler
def test_schedules_and_mistakes(sampler):
    y, energy = start(), Quadratic(1.0)
    options = {"steps": 3, "seed": 1}
    if sampler is not sgld_chain:
        listed = sampler(energy, y, step=[0.3, 0.2, 0.1], temperature=[4.0, 2.0, 1.0], **options)
        called = sampler(
            energy, y, step=lambda i: 0.3 - 0.1 * i, temperature=lambda i: 4.0 / 2**i, **options
        )
        assert torch.allclose(listed.y, called.y, atol=1e-6)
        with pytest.raises(ValueError, match=r"step must have one entry per step \(3\), got 2"):
            sampler(energy, y, step=[0.1, 0.1], **options)
    per_chain = sampler(energy, y, step=torch.full((6,), 0.2), **options)
    assert torch.allclose(per_chain.y, sampler(energy, y, step=0.2, **options).y, atol=1e-6)
    with pytest.raises(ValueError, match=r"one number per chain \(6,\), got \(\)"):
        sampler(lambda y: y.sum(), y, step=0.1, **options)
    with pytest.raises(ValueError, match="step must be > 0"):
        sampler(energy, y, step=0.0, **options)
    assert torch.equal(sampler(energy, y, step=0.1, steps=0, seed=1).y, y)
    assert sampler(lambda y: -y.sum(1), y, step=0.1, **options).y.shape == y.shape  # expanded grad


@each_sampler
def test_known_elements_and_tether(sampler):
    y, mask = start(), torch.tensor([True, False, True])
    tether = torch.full_like(y, 3.0)
    options = {"steps": 20, "step": 0.1, "seed": 1, "tether": tether, "tether_scale": 0.9}
    chain = sampler(Quadratic(1.0), y, mask=mask, **options)
    assert torch.equal(chain.y[:, 1], y[:, 1]) and (chain.y[:, 0] != y[:, 0]).all()
    assert (chain.y[:, [0, 2]] > 1).float().mean() > 0.9


def test_frozen_restores_each_parameter():
    net = torch.nn.Linear(2, 1)
    net.bias.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(net.forward):  # a bound method's owner
        assert not net.weight.requires_grad
        raise RuntimeError
    assert net.weight.requires_grad and not net.bias.requires_grad


# Laws. n chains, each error bound five standard errors of the estimate: sd(var) = sqrt(2 / n) var.
N = 40_000
PRECISIONS = torch.tensor([0.5, 1.0, 2.0, 4.0])


def gaussian(y):
    return 0.5 * (PRECISIONS * y * y).sum(1)


def check_law(y, mean, variance):
    n = len(y)
    assert ((y.mean(0) - mean).abs() < 5 * (variance / n) ** 0.5).all()
    assert ((y.var(0) / variance - 1).abs() < 5 * (2 / n) ** 0.5).all()


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_unadjusted_chain_has_its_biased_variance(temperature):
    a = 0.25  # h = 2 a: variance 1 / (q (1 - h q / 4))
    variance = temperature / (PRECISIONS * (1 - a * PRECISIONS / 2))
    y = variance**0.5 * torch.randn(N, 4, generator=torch.Generator().manual_seed(1))
    chain = ula_chain(gaussian, y, steps=25, step=a, temperature=temperature, seed=torch.arange(N))
    check_law(chain.y, 0, variance)


def test_sgld_adds_the_variance_of_its_gradient():
    a, noise = 0.1, 3.0
    generator = torch.Generator().manual_seed(3)

    def minibatch(y):
        return gaussian(y) + noise * (y * torch.randn(y.shape, generator=generator)).sum(1)

    variance = (2 + a * noise**2) / (PRECISIONS * (2 - a * PRECISIONS))
    y = variance**0.5 * torch.randn(N, 4, generator=generator)
    check_law(sgld_chain(minibatch, y, steps=20, step=a, seed=1).y, 0, variance)
    steps = []
    sgld_chain(
        gaussian,
        y[:2],
        steps=3,
        step=0.1,
        offset=2.0,
        decay=0.55,
        noise_scale=0.0,
        seed=0,
        callback=lambda i, y: steps.append(y.clone()),
    )
    shrink = [1 - 0.1 * ((2 + i) / 2) ** -0.55 for i in range(3)]
    assert torch.allclose(steps[2][:, 1], y[:2, 1] * shrink[0] * shrink[1] * shrink[2], atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_mala_has_no_bias(temperature):
    variance = temperature / PRECISIONS
    y = variance**0.5 * torch.randn(N, 4, generator=torch.Generator().manual_seed(2))
    chain = mala_chain(
        gaussian, y, steps=30, step=0.35, temperature=temperature, seed=torch.arange(N)
    )
    assert 0.3 < chain.acceptance.mean() < 0.8  # an unadjusted chain's variance were 3.3 / q
    check_law(chain.y, 0, variance)


def test_mala_is_exact_on_a_double_well():
    """Mean square under exp(-2 (y^2 - 1)^2), by quadrature; starts in one well."""
    y = torch.ones(N, 1)

    def well(y):
        return 2 * (y**2 - 1).square().sum(1)

    chain = mala_chain(well, y, steps=300, step=0.2, seed=torch.arange(N), diagnostics=False)
    grid = torch.linspace(-4, 4, 20001, dtype=torch.float64)
    p = (-2 * (grid**2 - 1) ** 2).exp()
    p /= p.sum()
    for power in (2, 4):
        mean, second = (p * grid**power).sum(), (p * grid ** (2 * power)).sum()
        error = 5 * ((second - mean**2) / N) ** 0.5
        assert abs((chain.y.double() ** power).mean() - mean) < error
    assert abs((chain.y > 0).float().mean() - 0.5) < 5 * 0.5 / N**0.5  # both wells


@pytest.mark.parametrize("sampler", [ula_chain, mala_chain])
def test_recovery_posterior(sampler):
    """exp(-q y^2 / 2) tied to x_t = y + sigma e: normal, precision q + 1 / sigma^2."""
    sigma, x, a = 0.8, 1.5, 0.1
    precision = PRECISIONS + 1 / sigma**2
    mean, variance = x / sigma**2 / precision, 1 / precision
    if sampler is ula_chain:
        variance = 1 / (precision * (1 - a * precision / 2))
    y = mean + variance**0.5 * torch.randn(N, 4, generator=torch.Generator().manual_seed(4))
    chain = sampler(
        gaussian,
        y,
        steps=20,
        step=a,
        seed=torch.arange(N),
        tether=torch.full_like(y, x),
        tether_scale=a / sigma**2,
    )
    check_law(chain.y, mean, variance)


def test_graphed_chain_wants_a_gpu():
    with pytest.raises(ValueError, match="GraphedChain needs a CUDA state"):
        GraphedChain(gaussian, start(shape=(4,)), steps=2, step=0.1, seed=1)


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", [ula_chain, mala_chain])
def test_graph_replays_draw_fresh_noise(sampler):
    y, seeds = start(64, (4,)).cuda(), torch.arange(64).cuda()
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 32), torch.nn.SiLU(), torch.nn.Linear(32, 1)
    ).cuda()

    def energy(y):
        return net(y)[:, 0] + 0.5 * (y * y).sum(1)

    options = {"steps": 5, "step": 0.05, "seed": seeds, "freeze": (net,)}
    graph = GraphedChain(energy, y, chain=sampler, **options)
    first, second = graph(y).y.clone(), graph(y).y.clone()
    assert not torch.equal(first, second)
    for got, counter in ((first, 0), (second, 5)):
        eager = sampler(energy, y, counter=counter, **options).y
        assert torch.allclose(got, eager, atol=1e-5)
    assert torch.allclose(graph(y, counter=0).y, first, atol=1e-6)


def test_a_broadcast_mask_is_spread_once_for_all_steps(monkeypatch):
    """A step that got it broadcast would copy it to the state's size, each time."""
    seen = []

    def step(y, grad, *, mask, **options):
        seen.append(mask)
        return original(y, grad, mask=mask, **options)

    original = langevin.langevin_step
    monkeypatch.setattr(langevin, "langevin_step", step)
    mask = torch.rand(4, 4) > 0.5
    options = {"steps": 3, "step": 0.1, "seed": 1, "mask": mask}
    y = torch.zeros(5, 2, 4, 4)
    got = langevin.ula_chain(lambda y: y.flatten(1).square().sum(1), y, **options).y
    assert len({x.data_ptr() for x in seen}) == 1
    assert all(x.shape == y.shape and x.is_contiguous() for x in seen)
    assert torch.equal(got != 0, mask.expand_as(y))
