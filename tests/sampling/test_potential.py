"""The dynamics of one potential, and couplings, against closed forms."""

import math

import pytest
import torch

from genmodels.kernels.philox import philox_normal
from genmodels.sampling.coupling import couple
from genmodels.sampling.langevin import ula_chain
from genmodels.sampling.potential import sample_potential, temperature
from genmodels.seeding import Stream


def test_the_temperature_jumps_at_one_or_rises_from_tau():
    assert [temperature(t, 1.0, 0.01) for t in (0, 0.999, 1.0, 3.0)] == [0, 0, 0.01, 0.01]
    assert temperature(0.9, 0.8, 0.15) == pytest.approx(0.075)  # half-way
    assert temperature(0.79, 0.8, 0.15) == 0 and temperature(1.5, 0.8, 0.15) == 0.15


@pytest.mark.parametrize(("time", "steps"), [(1.2, 6), (1.4, 63), (2.2, 11)])
def test_noise_begins_at_tau_however_steps_are_rounded(time, steps):
    """5 steps of 0.2 make 0.9999999999999999."""

    def noise(eps):
        zero = sample_potential(
            torch.zeros_like, torch.arange(2), (1, 2, 2), time=time, steps=steps, eps_max=eps
        )
        return zero - philox_normal((1, 2, 2), torch.arange(2), stream=int(Stream.NOISE))

    late = round((time - 1) / (time / steps))
    expected = sum(
        philox_normal((1, 2, 2), torch.arange(2), steps - k, stream=int(Stream.CHAIN))
        for k in range(late)
    )
    torch.testing.assert_close(noise(2.0), (2 * 2.0 * time / steps) ** 0.5 * expected)


def test_on_a_line_the_coupling_keeps_the_order():
    """In one dimension optimal transport pairs the k-th smallest with the k-th smallest."""
    generator = torch.Generator().manual_seed(0)
    noise, data = (torch.randn(50, 1, generator=generator) for _ in range(2))
    paired = noise[couple(noise, data)]
    assert torch.equal(paired[data[:, 0].argsort(), 0], noise[:, 0].sort().values)


def test_a_coupling_is_a_permutation_within_classes_and_no_swap_makes_it_cheaper():
    generator = torch.Generator().manual_seed(1)
    noise, data = (torch.randn(24, 1, 2, 2, generator=generator) for _ in range(2))
    labels = torch.randint(3, (24,), generator=generator)
    order = couple(noise, data, labels)
    assert torch.equal(order.sort().values, torch.arange(24))
    assert torch.equal(labels[order], labels)
    cost = (data[:, None] - noise[order][None]).square().flatten(2).sum(2)
    swapped = cost + cost.T
    kept = cost.diagonal()[:, None] + cost.diagonal()[None]
    same = labels[:, None] == labels[None]
    assert (swapped[same] >= kept[same] - 1e-5).all()


@pytest.mark.parametrize("steps", [5, 60])
def test_a_chain_in_a_parabola_has_the_variance_of_the_closed_form(steps):
    """V = k x^2 / 2: a^2 q + v (1 - q), q = (1 - k dt)^(2 n), v = eps / k / (1 - k dt / 2)."""
    k, eps, dt, a = 4.0, 0.05, 0.05, 0.3
    start = a * torch.randn(40_000, 1, generator=torch.Generator().manual_seed(0))
    chain = ula_chain(
        lambda y: k / 2 * y.square().sum(1),
        start,
        steps=steps,
        step=dt,
        temperature=eps,
        seed=torch.arange(len(start)),
        diagnostics=False,
    )
    q = (1 - k * dt) ** (2 * steps)
    variance = a**2 * q + eps / k / (1 - k * dt / 2) * (1 - q)
    assert float(chain.y.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / len(start)))


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_sampling_ends_in_the_solvers_own_gaussian(solver):
    """V = k x^2 / 2 from N(0, 1): both solvers are linear, x <- r x + s c z: the law is exact."""
    k, eps, time, steps, count = 3.0, 0.04, 2.0, 40, 20_000
    dt = time / steps
    x = sample_potential(
        lambda x: k * x,
        torch.arange(count),
        (1, 1, 1),
        time=time,
        steps=steps,
        eps_max=eps,
        solver=solver,
    )
    # Heun: x - dt k (x + x') / 2 + n with x' = x - dt k x + n.
    r = 1 - k * dt + (k * dt) ** 2 / 2 if solver == "heun" else 1 - k * dt
    c = 1 - k * dt / 2 if solver == "heun" else 1.0
    variance = 1.0
    for i in range(steps):
        noise = 2 * eps * dt if i * dt >= 1 else 0.0
        variance = r**2 * variance + c**2 * noise
    assert float(x.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / count))
    assert abs(float(x.mean())) < 4 * math.sqrt(variance / count)


def test_heuns_method_is_of_second_order():
    """Without noise x(1) = exp(-k) x(0): halving the step divides the error by four."""
    seeds, k = torch.arange(4), 1.5

    def end(steps, **options):
        return sample_potential(
            lambda x: k * x, seeds, (1, 2, 2), time=0.9, steps=steps, eps_max=1e-9, **options
        )

    start = end(1, solver="euler") / (1 - 0.9 * k)
    errors = [(end(steps) - math.exp(-0.9 * k) * start).abs().max() for steps in (20, 40)]
    assert float(errors[0] / errors[1]) == pytest.approx(4, rel=0.1)


def test_an_image_depends_on_its_seed_alone_and_known_pixels_are_held():
    def slope(x):
        return x.sin()

    options = {"time": 1.3, "steps": 9, "eps_max": 0.1}
    four = sample_potential(slope, torch.arange(4), (1, 2, 2), **options)
    one = sample_potential(slope, torch.tensor([2]), (1, 2, 2), **options)
    assert torch.equal(four[2:3], one)
    known, mask = torch.full((1, 1, 2, 2), 0.25), torch.tensor([[True, False], [False, False]])
    seen = []
    held = sample_potential(
        slope,
        torch.tensor([2]),
        (1, 2, 2),
        known=known,
        mask=mask,
        callback=lambda i, x: seen.append(float(x[0, 0, 0, 0])),
        **options,
    )
    assert float(held[0, 0, 0, 0]) == 0.25
    start = float(
        sample_potential(
            torch.zeros_like, torch.tensor([2]), (1, 2, 2), time=0.5, steps=1, eps_max=1.0
        )[0, 0, 0, 0]
    )
    t = 1.3 / 9
    assert seen[0] == pytest.approx((1 - t) * start + t * 0.25, abs=1e-6)
