"""A normalising flow of small data: a density that can be both drawn from and computed exactly.

x = mean + std h,  h = z through affine couplings, each over a fixed half of a fixed shuffle:

    h_b <- h_b exp(s(h_a)) + t(h_a),    s in (-2, 2) by a tanh, (s, t) a perceptron of two layers
    log q(x) = log N(z; 0, I) - sum over couplings of sum s - sum log std

At first all s and t are 0: the flow is a Gaussian with the data's mean and variances.

Reference: Dinh, Sohl-Dickstein and Bengio 2017, "Density estimation using Real NVP", arXiv
1605.08803 (affine couplings).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["CouplingFlow"]


class CouplingFlow(nn.Module):
    """q(x) for states (B, C, H, W) of at least two elements.

    Args:
        shape: (C, H, W).
        layers: couplings.
        width: hidden units of each.
    """

    def __init__(self, shape: Sequence[int], layers: int, width: int):
        super().__init__()
        size, self.shape = math.prod(shape), tuple(shape)
        self.half = size // 2
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(size, generator=generator) for _ in range(layers)]
        if size == 2:  # a shuffle may be none: take turns
            orders = [torch.tensor([k % 2, 1 - k % 2]) for k in range(layers)]
        self.register_buffer("orders", torch.stack(orders))
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.Linear(self.half, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, 2 * (size - self.half)),
            )
            for _ in range(layers)
        )
        for net in self.nets:
            nn.init.zeros_(net[-1].weight)
            nn.init.zeros_(net[-1].bias)

    def fit(self, mean: Tensor, variance: Tensor) -> None:
        """Take the mean and the variance of each element of the data, (D,) each."""
        self.mean.copy_(mean)
        self.std.copy_(variance.sqrt())

    def _coupling(self, k: int, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (s, t, where each of the elements that they change lies) of coupling k."""
        first, second = self.orders[k].split([self.half, self.orders.shape[1] - self.half])
        s, t = self.nets[k](h[:, first]).chunk(2, dim=1)
        return 2 * (s / 2).tanh(), t, second

    def sample(self, z: Tensor) -> Tensor:
        """Return x, float32 like z, for standard normals z (B, C, H, W)."""
        h = z.flatten(1).float()
        for k in range(len(self.nets)):
            s, t, places = self._coupling(k, h)
            h = h.index_copy(1, places, h[:, places] * s.exp() + t)
        return (self.mean + self.std * h).reshape(z.shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log q(x), float32 (B,), of x (B, C, H, W)."""
        h = (x.flatten(1).float() - self.mean) / self.std
        total = -self.std.log().sum().expand(len(h))
        for k in reversed(range(len(self.nets))):
            s, t, places = self._coupling(k, h)
            h = h.index_copy(1, places, (h[:, places] - t) * (-s).exp())
            total = total - s.sum(dim=1)
        return total - (h**2 + math.log(2 * math.pi)).sum(dim=1) / 2
