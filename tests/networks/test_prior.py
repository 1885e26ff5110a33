"""The Gaussian prior in log space against torch.distributions and figures known beforehand."""

import numpy as np
import pytest
import torch

from genmodels.config import DataConfig
from genmodels.data import load_split
from genmodels.networks.prior import GaussianPrior, log_moments, mixture_divergence


@pytest.mark.parametrize(("kind", "rank"), [("lognormal", 0), ("lowrank", 3), ("full", 8)])
def test_prior_samples_have_its_density(kind, rank):
    """Moments of samples against a Gaussian of the stated covariance, and its KL to itself."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(8, 8, generator=generator).double() / 3
    covariance, mean = factor @ factor.T, torch.linspace(-1, 1, 8).double()
    prior = GaussianPrior(kind, (2, 2, 2), rank=3)
    prior.fit(mean, covariance)
    assert prior.basis.shape == (8, rank)
    z = torch.randn(200_000, 2, 2, 2, generator=generator)
    rows = prior.sample(z, 0.2).flatten(1).double()
    law = torch.distributions.MultivariateNormal(rows.mean(0), torch.from_numpy(np.cov(rows.T)))
    torch.testing.assert_close(
        prior.log_prob(rows[:50].reshape(50, 2, 2, 2), 0.2),
        law.log_prob(rows[:50]),
        rtol=0,
        atol=0.05,
    )
    if kind == "full":
        torch.testing.assert_close(
            law.covariance_matrix, covariance + 0.2 * torch.eye(8), rtol=0.02, atol=0.02
        )
    y = mean.reshape(1, 2, 2, 2) + 0.3
    point = torch.distributions.MultivariateNormal(y.flatten(), 0.2 * torch.eye(8).double())
    expected = torch.distributions.kl_divergence(point, law)
    torch.testing.assert_close(prior.divergence_of(y, 0.2)[0], expected, rtol=0.02, atol=0.02)
    apart = prior.divergence_from(mean, covariance, 0.2)
    assert apart == pytest.approx(0, abs=1e-9) if kind == "full" else apart > 0.01


def test_divergence_of_the_digits_from_the_iid_prior():
    """The figures of p_T taken as Gaussian, at the paper's sigma 0.8 and others."""
    pixels = load_split(DataConfig(name="digits"), "train")[0]
    prior = GaussianPrior("lognormal", (1, 8, 8))
    table = (torch.arange(256).double() / 255 + 1).log()
    mean, covariance = log_moments(pixels, table)
    prior.fit(mean, covariance)
    for sigma, nats in ((0.4, 6.81), (0.8, 1.82), (2.0, 0.29), (5.0, 0.046)):
        assert prior.divergence_from(mean, covariance, sigma**2) == pytest.approx(nats, rel=0.02)
    # Sampled, with the images themselves as p_T: beyond 2 the two agree within 3 standard errors.
    value, stderr = mixture_divergence(prior, pixels, table, 4.0)
    assert abs(value - 0.29) < 3 * stderr and stderr < 0.06
