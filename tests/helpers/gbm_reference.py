"""GBM with the exact denoiser of log-normal data, for tests against closed forms."""

import math

import torch

import genmodels
from genmodels.networks.precond import LogSpace
from genmodels.networks.prior import GaussianPrior
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY

M, V = 0.35, 0.0025  # log(u + 1) of the images below: all of them in [0, log 2]


def build(*words):
    return genmodels.build(str(ROOT / "configs/gbm_digits.yaml"), *TINY, *words).eval()


class Exact(LogSpace):
    """The exact denoiser of log x ~ N(M, v) in every pixel; `gain` spoils it."""

    def __init__(self, v=V, gain=0.0):
        super().__init__(None)
        self.v, self.gain = v, gain
        self.mean.fill_(M)
        self.sigma_data.fill_(math.sqrt(v))

    def forward(self, y, sigma, labels=None):
        level = torch.as_tensor(sigma).to(y) ** 2
        level = level.expand(len(y)).reshape(-1, 1, 1, 1)
        return M + (self.v / (self.v + level) + self.gain) * (y - M)


def exact_model(*words, v=V, gain=0.0):
    model = build(*words)
    model.net = Exact(v, gain)
    model.prior = GaussianPrior("lognormal", model.shape)
    model.prior.fit(torch.full((64,), M).double(), v * torch.eye(64).double())
    return model


def batch(count, v=V):
    y = M + math.sqrt(v) * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = (y.exp() - 1) * 2 - 1
    return {"image": x, "label": torch.full((count,), -1), "n": torch.arange(count)}
