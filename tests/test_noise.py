"""Noise laws: estimates against quadrature, sampling, domains, guards."""

import math

import numpy as np
import pytest
import torch

from genmodels.noise import FLOOR, LAWS, inverse_trigamma, tweedie

LEVELS = {  # a moderate and a heavy one
    "gaussian": (25.0, 80.0),
    "poisson": (0.01, 0.2),
    "gamma": (50.0, 2.0),
    "exponential": (1.0,),
    "inverse_gaussian": (40.0, 3.0),
    "rayleigh": (1.0,),
    "nakagami": (9.0, 0.7),
    "lognormal": (0.1, 0.8),
}
# Order of the posterior power mean the estimate is, 0 the geometric one.
ORDER = {"gaussian": 1, "poisson": 0, "gamma": -1, "exponential": -1, "inverse_gaussian": -2,
         "rayleigh": -2, "nakagami": -2, "lognormal": 0}  # fmt: skip
CASES = [(law, level) for law, levels in LEVELS.items() for level in levels]

# A prior of two humps on (0, 1), as weights of 20 000 midpoints: the "integral" is this sum, exact
# for the discrete prior whatever its spacing, so the identity is tested without quadrature error.
X = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
PRIOR = 0.3 * torch.exp(-((X - 0.25) ** 2) / 0.005) + 0.7 * torch.exp(-((X - 0.7) ** 2) / 0.02)
PRIOR /= PRIOR.sum()


def log_density(law, y, x, level):
    """log p(y|x) in closed form, y (N, 1) against x (M,); Poisson's by the gamma function in y."""
    if law == "gaussian":
        return torch.distributions.Normal(x, level / 255).log_prob(y)
    if law == "poisson":
        return (y * x.log() - x) / level - y / level * math.log(level) - torch.lgamma(y / level + 1)
    if law in ("gamma", "exponential"):
        return torch.distributions.Gamma(level, level / x, validate_args=False).log_prob(y)
    if law == "inverse_gaussian":
        return 0.5 * (level / (2 * math.pi * y**3)).log() - level * (y - x) ** 2 / (2 * x**2 * y)
    if law == "rayleigh":
        return (y / x**2).log() - y**2 / (2 * x**2)
    if law == "nakagami":
        return (2 * level - 1) * y.log() - 2 * level * x.log() - level * y**2 / x**2
    return torch.distributions.LogNormal(x.log(), level, validate_args=False).log_prob(y)


def posterior(law, y, level):
    """Return (s, ds/dy, weights of X given y) by autograd of the marginal density."""
    y = y.clone().requires_grad_(True)
    joint = log_density(law, y[:, None], X, level) + PRIOR.log()
    log_p = joint.logsumexp(1)
    (s,) = torch.autograd.grad(log_p.sum(), y, create_graph=True)
    (ds,) = torch.autograd.grad(s.sum(), y)
    return s.detach(), ds, (joint - log_p[:, None]).exp().detach()


def pixels(law, level, count=40):
    """Return noisy pixels the law makes of X, kept off the rounding of a zero density."""
    rng = np.random.default_rng(0)
    clean = rng.choice(X.numpy(), count, p=PRIOR.numpy())
    return torch.from_numpy(LAWS[law].sample(clean, level, rng))


def power_mean(weights, order):
    if order == 0:
        return (weights @ X.log()).exp()
    return (weights @ X**order) ** (1 / order)


@pytest.mark.parametrize(("law", "level"), CASES)
def test_estimate_is_the_posterior_power_mean(law, level):
    y = pixels(law, level)
    s, _, weights = posterior(law, y, level)
    found = LAWS[law].estimate(y, s, level)
    torch.testing.assert_close(found, power_mean(weights, ORDER[law]), rtol=1e-6, atol=1e-6)
