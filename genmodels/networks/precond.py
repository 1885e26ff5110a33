"""Preconditioning: the denoiser D(x; sigma) around a raw network F."""

from torch import nn


class Precond(nn.Module):
    """Denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), in float32 around F.

    c_in gives F an input of unit variance, c_skip and c_out a target of unit variance with the
    smallest |c_out|: the expected loss of F = 0 is 1 for each element at every sigma.

    Args:
        net: raw network, forward(x, noise, labels, augment).
        sigma_data: standard deviation of the data on the [-1, 1] scale.

    Reference: Karras et al. 2022, "Elucidating the design space of diffusion-based generative
    models", arXiv 2206.00364, table 1 and appendix B.6.
    """

    def __init__(self, net, sigma_data):
        super().__init__()
        self.net, self.sigma_data = net, sigma_data

    def coefficients(self, sigma):
        """Return (c_skip, c_out, c_in, c_noise), each of sigma's shape; sigma > 0."""
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data * variance.rsqrt()
        c_in = variance.rsqrt()
        c_noise = sigma.log() / 4
        return c_skip, c_out, c_in, c_noise

    def loss_weight(self, sigma):
        """Return 1 / c_out^2, the weight of |D - x|^2 that makes all sigma equal at first."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def forward(self, x, sigma, labels=None, augment=None):
        """Return the denoised image, float32 (B, C, H, W).

        Args:
            x: noisy image (B, C, H, W) on the [-1, 1] scale of the clean one.
            sigma: noise level on that scale, (B,) or a scalar tensor, > 0.
            labels: int64 (B,), -1 = none; or None.
            augment: (B, 9) augmentation values for networks that take them; or None.
        """
        x, sigma = x.float(), sigma.float().expand(len(x))
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        c_skip, c_out, c_in = (c.reshape(-1, 1, 1, 1) for c in (c_skip, c_out, c_in))
        raw = self.net(c_in * x, c_noise, labels, augment)
        return c_skip * x + c_out * raw.float()
