"""A denoiser that is known exactly."""

from genmodels.networks.precond import Precond


class Gaussian(Precond):
    """The exact denoiser of data N(0, c^2): D(x; s) = c^2 / (c^2 + s^2) x."""

    def __init__(self, c, sigma_data=0.75):
        super().__init__(None, sigma_data)
        self.c = c

    def forward(self, x, sigma, labels=None, augment=None):
        sigma = sigma.expand(len(x)).reshape(-1, 1, 1, 1)
        return self.c**2 / (self.c**2 + sigma**2) * x
