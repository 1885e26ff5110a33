"""Metropolis-Hastings from a score, against densities that are known."""

import math

import pytest
import torch

import genmodels
from genmodels.sampling.metropolis import log_density_difference, sample_mh
from tests.helpers.gaussian import Gaussian
from tests.helpers.paths import ROOT

MEANS, SHARES, WIDTH = (-1.0, 1.0), (0.3, 0.7), 0.4


def two_modes(x):
    """Return log p of 0.3 N(-1, 0.16) + 0.7 N(1, 0.16), one number for each x."""
    parts = [math.log(p) - (x - m) ** 2 / (2 * WIDTH**2) for p, m in zip(SHARES, MEANS)]
    return torch.logsumexp(torch.stack(parts), dim=0).flatten(1).sum(dim=1)


def score_of_two_modes(x):
    """Return d/dx of it: each mode's pull, by its share at x."""
    odds = math.log(SHARES[1] / SHARES[0]) + (MEANS[1] - MEANS[0]) * x / WIDTH**2
    right = odds.sigmoid()  # the modes lie at equal distances from 0
    return -(x - MEANS[0] - right * (MEANS[1] - MEANS[0])) / WIDTH**2


def normal(x):
    return -x


def test_the_line_integral_is_the_difference_of_log_densities():
    line = torch.linspace(-1.5, 1.5, 13, dtype=torch.float64)
    x, end = (part.reshape(-1, 1, 1, 1) for part in torch.cartesian_prod(line, line).T)
    truth = two_modes(end) - two_modes(x)
    errors = {
        k: float((log_density_difference(score_of_two_modes, x, end, k) - truth).abs().max())
        for k in (1, 2, 4, 8, 16)
    }
    assert errors[1] > errors[2] > errors[4] > 1  # in nats, over the whole valley
    assert errors[8] < 0.5 and errors[16] < 0.06
    # A linear score is exact with one node.
    found = log_density_difference(normal, x, end, 1)
    expected = ((x**2 - end**2) / 2).flatten(1).sum(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [0.5, 1.0, 2.0])
def test_acceptance_and_variance_of_a_normal(step):
    """From equilibrium (2 / pi) arctan(2 / step) of the proposals are accepted; variance 1."""
    count, steps = 4000, 40
    start = torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    x, accepted = sample_mh(normal, start, torch.arange(count), steps=steps, step=step, nodes=1)
    expected = 2 / math.pi * math.atan(2 / step)
    error = float(accepted.std()) / count**0.5
    assert float(accepted.mean()) == pytest.approx(expected, abs=4 * error)
    assert float(x.var()) == pytest.approx(1, abs=4 * (2 / count) ** 0.5)


def share_of_the_left(nodes, count=2000, steps=120):
    generator = torch.Generator().manual_seed(2)
    start = 1.5 * torch.randn(count, 1, 1, 1, generator=generator)
    options = {"steps": steps, "step": 1.2, "nodes": nodes}
    x, _ = sample_mh(score_of_two_modes, start, torch.arange(count), **options)
    return float((x < 0).float().mean())


@pytest.mark.slow
def test_eight_nodes_keep_the_masses_of_two_modes_and_one_does_not():
    exact = sum(p * (1 + math.erf(-m / WIDTH / 2**0.5)) / 2 for p, m in zip(SHARES, MEANS))
    error = 4 * (exact * (1 - exact) / 2000) ** 0.5
    assert share_of_the_left(8) == pytest.approx(exact, abs=error + 0.01)
    assert abs(share_of_the_left(1) - exact) > error + 0.01


def test_a_chain_is_a_function_of_its_seed():
    x = torch.zeros(3, 2, 1, 1)
    options = {"steps": 5, "step": 0.7, "nodes": 2}
    whole, _ = sample_mh(normal, x, torch.tensor([4, 5, 6]), **options)
    alone, _ = sample_mh(normal, x[:1], torch.tensor([5]), **options)
    assert torch.equal(alone, whole[1:2]) and len(whole.unique()) > 3


# ------------------------------------------------------------------------------------------------
# EDM at one level


def dae(*words):
    return genmodels.build(str(ROOT / "configs/dae_toy.yaml"), "network.width=16", *words).eval()


def test_it_samples_the_data_with_the_noise_in_them():
    """Data N(0, 0.25) at sigma = 0.1: a variance of 0.26, 0.0096 after one step of denoising."""
    model = dae()
    model.net = Gaussian(0.5)
    x = model.sample(range(3000), steps=30)
    assert float(x.var()) == pytest.approx(0.26, abs=4 * 0.26 * (2 / 6000) ** 0.5)
    assert model.nfe == 30 * 8 and "% of proposals accepted" in model.chains
    r = model.denoise(x, 0.1)
    slope = 0.25 / 0.26  # v / (v + sigma^2), as of the best auto-encoder
    torch.testing.assert_close(r, slope * x)
    torch.testing.assert_close(model.score(x, 0.1), -x / 0.26, rtol=1e-3, atol=1e-4)


def test_training_is_at_one_level():
    model = dae()
    x = torch.zeros(50, *model.shape)
    _, sigma = model._diffuse(x, torch.arange(50))
    torch.testing.assert_close(sigma, torch.full((50,), 0.1), rtol=1e-5, atol=0)


def test_what_a_chain_does_not_take_is_refused():
    for words, line in (
        (("method.churn=1",), "^method.churn=1.0: sampler=mh is a chain"),
        (("method.schedule=vp",), "^method.sampler=mh: goes with schedule=linear"),
    ):
        with pytest.raises(ValueError, match=line):
            dae(*words)
    with pytest.raises(ValueError, match="^mh_step=0.5: sampler=heun does not take it"):
        dae().sample([0], sampler="heun", mh_step=0.5)


@pytest.mark.slow
def test_the_best_auto_encoder_of_a_gaussian_has_the_known_slope():
    """r(x) = v / (v + sigma^2) x and an error of v sigma^2 / (v + sigma^2) a pixel."""
    torch.manual_seed(0)
    model = dae("network.width=64", "method.p_mean=-0.693147").train()  # sigma = 0.5
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for step in range(1500):
        n = torch.arange(512) + 512 * step
        x = 0.5 * torch.randn(512, *model.shape)
        optimizer.zero_grad()
        loss, _ = model.loss({"image": x, "label": torch.full((512,), -1), "n": n})
        loss.backward()
        optimizer.step()
        schedule.step()
    x = torch.linspace(-1, 1, 9).reshape(9, 1, 1, 1).expand(9, 2, 1, 1).contiguous()
    with torch.no_grad():
        r = model.eval().denoise(x, 0.5)
    torch.testing.assert_close(r, 0.5 * x, rtol=0, atol=0.05)
