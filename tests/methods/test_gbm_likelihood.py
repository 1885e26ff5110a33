"""Log densities of GBM against log-normals and a mixture of them."""

import math

import torch

from tests.helpers.gbm_reference import Exact, M, V, batch, exact_model


def density(x, v, offset=1.0):
    """log p of images whose log(u + offset) is N(M, v), on the [-1, 1] scale, (B,)."""
    positive = (x.double() + 1) / 2 + offset
    law = torch.distributions.LogNormal(M, math.sqrt(v))
    return law.log_prob(positive).flatten(1).sum(1) - 64 * math.log(2)


def test_log_prob_of_a_lognormal():
    """The density that the flow reaches at sigma_min; the divergence is diagonal, so exact."""
    x, seeds = batch(4)["image"], range(4)
    low = exact_model().cfg.method.sigma_min ** 2
    expected = density(x, V + low)
    torch.testing.assert_close(
        exact_model().log_prob(x, kind="ode", seeds=seeds, steps=100), expected, rtol=0, atol=5e-3
    )


def test_log_prob_of_a_mixture():
    """Two log-normals in each pixel; the Gaussian prior fits well enough at sigma_max = 10."""
    model = exact_model("method.sigma_max=10")
    parts = ((0.3, 0.15, 0.05), (0.7, 0.5, 0.025))

    class Mixture(Exact):
        def forward(self, y, sigma, labels=None):
            level = torch.as_tensor(sigma, dtype=torch.float64) ** 2
            y = y.double()
            logs = [
                math.log(w) - (y - m) ** 2 / (2 * (s**2 + level)) - (s**2 + level).log() / 2
                for w, m, s in parts
            ]
            share = torch.softmax(torch.stack(logs), dim=0)
            return y + level * sum(
                r * (m - y) / (s**2 + level) for r, (_, m, s) in zip(share, parts)
            )

    model.net = Mixture()
    mean = sum(w * m for w, m, _ in parts)
    variance = sum(w * (s**2 + (m - mean) ** 2) for w, m, s in parts)
    model.prior.fit(torch.full((64,), mean).double(), variance * torch.eye(64).double())
    u = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    y, low = (u + 1).log(), model.cfg.method.sigma_min**2
    logs = [
        math.log(w) + torch.distributions.Normal(m, math.sqrt(s**2 + low)).log_prob(y)
        for w, m, s in parts
    ]
    expected = (torch.logsumexp(torch.stack(logs), 0) - y).flatten(1).sum(1) - 64 * math.log(2)
    found = model.log_prob(2 * u - 1, kind="ode", seeds=range(3), steps=200)
    # 64 pixels of about 4e-4 nats each, and the prior's misfit.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_bound_is_tight_for_the_exact_model():
    """Its mean over images is that of log p, less the little the last step loses."""
    x = batch(600)["image"]
    bound = exact_model().log_prob(x, kind="bound", seeds=range(600), steps=64)
    gap = density(x, V) - bound
    error = float(gap.std() / 600**0.5)
    assert abs(float(gap.mean())) < 4 * error + 0.02 and error < 0.5
    spoilt = exact_model(gain=0.2)
    assert (spoilt.log_prob(x, kind="bound", seeds=range(600)) - bound).mean() < -10
