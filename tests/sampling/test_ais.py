"""Bounds on the normaliser where it is known: a Gaussian, a mixture."""

import math

import pytest
import torch

from genmodels.sampling.ais import Base, ais_forward, ais_reverse, bound_log_z, sigmoid_path

N, SHAPE = 400, (1, 2, 2)
BASE = Base(torch.full(SHAPE, 0.2), torch.full(SHAPE, 1.5))
OPTIONS = {"betas": sigmoid_path(30), "step": 0.15, "moves": 2}
LOG_C = 3.7  # the densities below are unnormalised by this much


def gaussian(y):
    """C N(y; -0.5, 0.3): log Z = log C."""
    rows = y.double().flatten(1)
    return LOG_C - ((rows + 0.5) ** 2 / 0.6 + 0.5 * math.log(2 * math.pi * 0.3)).sum(1)


def gaussian_samples(n):
    return -0.5 + 0.3**0.5 * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1))


MODES = torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, 1.0, 1.0]]).double()
SHARES = torch.tensor([0.3, 0.7]).double()


def mixture(y):
    """C sum_i p_i N(y; m_i, 0.2)."""
    rows = y.double().flatten(1)[:, None]
    parts = -((rows - MODES) ** 2).sum(2) / 0.4 - 2 * math.log(2 * math.pi * 0.2)
    return LOG_C + torch.logsumexp(parts + SHARES.log(), dim=1)


def mixture_samples(n):
    generator = torch.Generator().manual_seed(2)
    which = (torch.rand(n, generator=generator) > 0.3).long()
    noise = torch.randn(n, 4, generator=generator)
    return (MODES[which] + 0.2**0.5 * noise).float().reshape(n, *SHAPE)


@pytest.mark.parametrize(
    ("density", "samples"), [(gaussian, gaussian_samples), (mixture, mixture_samples)]
)
def test_the_two_bounds_bracket_the_true_normaliser(density, samples):
    below = ais_forward(density, BASE, torch.arange(N), **OPTIONS)
    above = ais_reverse(density, BASE, samples(N), torch.arange(N), **OPTIONS)
    (low, low_error), (high, high_error) = below.mean, above.mean
    # The gaps are the chains' imperfection: seen, and small.
    assert low + 2 * low_error < LOG_C < high - 2 * high_error
    assert high - low < 1.5
    assert low < below.log_z and above.log_z < high
    # Forwards E[w] = Z exactly, in reverse E[1 / w] = 1 / Z.
    ratio = (below.log_w - LOG_C).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / N**0.5
    inverse = (LOG_C - above.log_w).exp()
    assert abs(float(inverse.mean()) - 1) < 4 * float(inverse.std()) / N**0.5
    assert 0.3 < below.acceptance < 1 and 0.3 < above.acceptance < 1


def test_more_steps_close_the_gap():
    gaps = []
    for steps in (4, 60):
        options = OPTIONS | {"betas": sigmoid_path(steps)}
        below = ais_forward(mixture, BASE, torch.arange(N), **options)
        above = ais_reverse(mixture, BASE, mixture_samples(N), torch.arange(N), **options)
        gaps.append(above.mean[0] - below.mean[0])
    assert gaps[1] < 0.4 * gaps[0]


def test_one_step_is_importance_sampling():
    """Without moves log w = g(y) - log q(y) at exact samples of the base."""
    bound = ais_forward(gaussian, BASE, torch.arange(5), betas=[0, 1], step=0.1)
    y = BASE.sample(torch.arange(5))
    normal = torch.distributions.Normal(0.2, 1.5**0.5)
    expected = gaussian(y) - normal.log_prob(y.double()).flatten(1).sum(1)
    torch.testing.assert_close(bound.log_w, expected, rtol=1e-6, atol=1e-5)
    assert math.isnan(bound.acceptance) and torch.equal(bound.y, y)


def test_a_chain_depends_on_its_seed_alone():
    together = ais_forward(gaussian, BASE, torch.tensor([3, 8, 1]), **OPTIONS)
    alone = ais_forward(gaussian, BASE, torch.tensor([8]), **OPTIONS)
    assert torch.equal(together.y[1:2], alone.y)
    torch.testing.assert_close(together.log_w[1:2], alone.log_w)


def test_the_path_rises_from_0_to_1():
    path = sigmoid_path(10)
    assert path[0] == 0 and path[-1] == 1 and (path.diff() > 0).all()
    torch.testing.assert_close(path + path.flip(0), torch.ones(11).double())
    for betas in ([0, 0.5], [0.1, 1], [0, 0.7, 0.3, 1], [1]):
        with pytest.raises(ValueError, match="betas must rise from 0 to 1"):
            ais_forward(gaussian, BASE, torch.arange(2), betas=betas, step=0.1)


def test_reverse_chains_start_at_the_refined_samples():
    """One density: the bound is E_p [g - log q], q of the samples given, which lie 1.2 too high.

    Where they start unrefined it is E [g - log q] at those, nats below log Z: no bound.
    """
    y = gaussian_samples(N) + 1.2
    options = {"variance": 0.3, "noise": 0.3, "ais_steps": 1, "ais_moves": 1, "ais_step": 1.0}
    mean, variance = y.mean(0).double(), y.var(0).double() + 0.3
    ratio = 0.5 * (variance / 0.3).log() - 0.5 + 0.5 * (0.3 + (mean + 0.5) ** 2) / variance
    high, error = bound_log_z(
        gaussian, y, torch.arange(N), above=True, ais_refine=50, **options
    ).mean
    assert abs(high - LOG_C - float(ratio.sum())) < 4 * error < 1
    raw = gaussian(y) + 0.5 * ((y - mean) ** 2 / variance + (2 * math.pi * variance).log()).sum(
        (1, 2, 3)
    )
    assert float(raw.mean()) < LOG_C - 5 < high - 5
