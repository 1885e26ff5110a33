"""A network of one's own: preconditioned, trained and sampled with the parts of this package.

    python examples/own_network.py [steps]

Any module F(x, noise, labels, augment) will do; noise is one number for each image. `Precond` makes
it EDM's denoiser D(x; sigma), which every sampler takes; draws digits to own_network.png.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from genmodels.images import to_uint8, write_png
from genmodels.networks.precond import Precond
from genmodels.sampling.ode import sample_heun
from genmodels.sampling.schedules import karras_sigmas


class Net(nn.Module):
    """Fully connected layers on an 8x8 picture, its noise and its class."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.label = nn.Embedding(10, width)
        self.noise = nn.Linear(1, width)
        self.first = nn.Linear(64, width)
        self.layers = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 64)
        )

    def forward(self, x, noise, labels=None, augment=None):
        """Return F, of x's shape (B, 1, 8, 8)."""
        h = self.first(x.flatten(1)) + self.noise(noise[:, None]) + self.label(labels)
        return self.layers(h).reshape(x.shape)


def main(steps: int = 1000) -> torch.Tensor:
    """Train, draw and return ten digits, (10, 1, 8, 8) in [-1, 1]."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # 0..16 to [-1, 1]
    labels = torch.tensor(digits.target)

    denoiser = Precond(Net(), sigma_data=float(images.std()))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    for step in range(steps):
        rows = torch.randint(len(images), (128,))
        x, sigma = images[rows], (1.2 * torch.randn(128) - 1.2).exp()  # EDM's noise levels
        noisy = x + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(x)
        error = (denoiser(noisy, sigma, labels[rows]) - x).square().mean(dim=(1, 2, 3))
        loss = (denoiser.loss_weight(sigma) * error).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    classes = torch.arange(10)
    sigmas = karras_sigmas(18)
    with torch.no_grad():
        start = torch.randn(10, 1, 8, 8, dtype=torch.float64) * sigmas[0]
        drawn = sample_heun(
            lambda x, sigma: denoiser(x.float(), sigma.float().expand(10), classes), start, sigmas
        )
    write_png("own_network.png", torch.cat(list(to_uint8(drawn)), dim=-1))
    return drawn


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
