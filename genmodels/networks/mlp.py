"""Fully connected networks for small data: an energy (f = -E, higher = likelier) and a plain map.

h = Linear(x);  per layer: h + Linear(act(Linear(act(h)) + Linear(act(e)))),  e the level and label
map M:   Linear(act(h)), like x
energy:  < act(h), Linear(act(e)) > (form=dot), -|x - M(x)|^2 / 2 (form=distance) or
         -sqrt(|x - M(x)|^2 + 1e-4) (form=norm), (B,)

The distance has a curvature of its own, so a narrow well needs no steep weights, and it is at most
0. Its gradient is M(x) - x, as a denoiser's, but for the Jacobian of M. The norm is a cone, whose
slope is the same all the way to its tip: the shape of a potential that carries noise to data in
one unit of time (genmodels/methods/energy_matching.py).

Reference: Salimans and Ho 2021, "Should EBMs model the energy or the score?" (form=distance).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genmodels.config import setting
from genmodels.networks.base import Network, NetworkConfig
from genmodels.networks.ebm import ENERGY_ACTIVATIONS, EnergyEmbedding, Linear

__all__ = ["MLP", "MLPConfig", "MLPMap", "MLPMapConfig"]

TIP = 1e-4  # form=norm: rounds the tip of the cone off, so that it has a gradient there


@dataclass
class MLPConfig(NetworkConfig):
    """Residual multilayer perceptron over the flattened image."""

    name: str = setting("mlp", "")
    width: int = setting(128, "hidden units", ge=2)
    layers: int = setting(2, "residual layers", ge=1)
    activation: str = setting("silu", "of the hidden units", choices=ENERGY_ACTIVATIONS)
    form: str = setting(
        "dot",
        "the energy: dot linear in the last layer, distance squared, norm a cone",
        choices=("dot", "distance", "norm"),
    )
    stem_scale: float = setting(
        1.0,
        "factor on the first layer's weights at the start: above 1, finer structure (without "
        "spectral norm)",
        gt=0,
    )
    spectral_norm: bool = setting(False, "divide weights by their largest singular value")

    def __post_init__(self):
        super().__post_init__()
        self.check(self.width % 2 == 0, "width", "must be even")


class MLP(Network):
    """f(x, level), (B, C, H, W) -> (B,); with energy=False the map M (B, C, H, W), at first zero.

    Args:
        cfg: MLPConfig.
        shape: (C, H, W) of the images.
        classes: number of class labels; 0 makes the network unconditional.
        energy: whether the output is one number.
    """

    Config = MLPConfig
    ENERGY = True

    def __init__(self, cfg: MLPConfig, shape: Sequence[int], classes: int = 0, energy: bool = True):
        super().__init__()
        options = {"norm": cfg.spectral_norm}
        self.act = ENERGY_ACTIVATIONS[cfg.activation][0]
        self.form = cfg.form if energy else "map"
        self.embedding = EnergyEmbedding(max(2, cfg.width // 8 * 2), classes, self.act, **options)
        dim, size = self.embedding.dim, math.prod(shape)
        self.stem = Linear(size, cfg.width, **options)
        with torch.no_grad():
            self.stem.weight.mul_(cfg.stem_scale)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Linear(cfg.width, cfg.width, **options),
                    Linear(dim, cfg.width, **options),
                    Linear(cfg.width, cfg.width, **options),
                ]
            )
            for _ in range(cfg.layers)
        )
        dot = self.form == "dot"
        self.head = nn.Linear(dim if dot else cfg.width, cfg.width if dot else size)
        if not dot:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return f (B,) in `dtype`, or the map's value like x; arguments as for EBM."""
        if augment is not None:
            raise ValueError("network.name=mlp: takes no augmentation values")
        with torch.autocast(x.device.type, enabled=False):
            embedding = self.embedding(noise, labels)
            h = self.stem(x.flatten(1))
            for first, shift, second in self.layers:
                h = h + second(self.act(first(self.act(h)) + shift(embedding)))
            h = self.act(h)
            if self.form == "dot":
                return (h.to(dtype) * self.head(embedding).to(dtype)).sum(dim=1)
            value = self.head(h).reshape(x.shape)
            if self.form == "map":
                return value
            squares = (x.to(dtype) - value.to(dtype)).square().flatten(1).sum(dim=1)
            return -0.5 * squares if self.form == "distance" else -(squares + TIP).sqrt()


@dataclass
class MLPMapConfig(NetworkConfig):
    """Residual multilayer perceptron over the flattened image, a map of it: no energy."""

    name: str = setting("mlp_map", "")
    width: int = setting(128, "hidden units", ge=2)
    layers: int = setting(2, "residual layers", ge=1)
    stem_scale: float = setting(
        1.0, "factor on the first layer's weights at the start: above 1, finer structure", gt=0
    )

    def __post_init__(self):
        super().__post_init__()
        self.check(self.width % 2 == 0, "width", "must be even")


class MLPMap(MLP):
    """The map M(x, level) alone, (B, C, H, W) -> (B, C, H, W), at first zero; arguments as MLP."""

    Config = MLPMapConfig
    ENERGY = False

    def __init__(self, cfg: MLPMapConfig, shape: Sequence[int], classes: int = 0):
        plain = MLPConfig(width=cfg.width, layers=cfg.layers, stem_scale=cfg.stem_scale)
        super().__init__(plain, shape, classes, energy=False)
