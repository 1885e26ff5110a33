"""Energy of a U-Net for images: f = -E, HIGHER = likelier, with a second derivative everywhere.

    M(x): a U-Net of the EDM paper, image -> image
    form=norm      f = -sqrt(|x - M(x)|^2 + 1e-4)           a cone around what M leaves alone
    form=distance  f = -|x - M(x)|^2 / 2
    form=tokens    f = Linear(mean over tokens of Transformer(patches of M(x)))

Tokens are as published for energy matching; the other forms have the U-Net alone.

References: Balcerak et al. 2025, arXiv 2504.10612 (tokens); Salimans and Ho 2021, "Should EBMs
model the energy or the score?" (distance); Dosovitskiy et al. 2021, arXiv 2010.11929 (patches).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genmodels.config import check, setting
from genmodels.networks.base import Network
from genmodels.networks.edm_unet import EDMUNet, EDMUNetConfig
from genmodels.networks.mlp import TIP

__all__ = ["Potential", "PotentialConfig"]


@dataclass
class PotentialConfig(EDMUNetConfig):
    """U-Net and what makes one number of its image; the defaults are CIFAR-10's as published."""

    name: str = setting("potential", "")
    kind: str = setting("adm", "which U-Net", choices=("adm", "ddpmpp"))
    multipliers: list[int] = setting(
        [1, 2, 2, 2], "channels of each level / channels, finest first", ge=1
    )
    blocks: int = setting(2, "residual blocks for each encoder level", ge=1)
    dropout: float = setting(0.1, "dropout in the residual blocks; off in chains", ge=0, lt=1)
    augment: bool = setting(False, "must be false")
    form: str = setting("tokens", "the energy", choices=("norm", "distance", "tokens"))
    patch: int = setting(4, "tokens: pixels of a patch's side", ge=1)
    width: int = setting(384, "tokens: width of the transformer, a multiple of 64", ge=64)
    layers: int = setting(8, "tokens: its layers", ge=1)

    def __post_init__(self):
        super().__post_init__()
        self.check(not self.augment, "augment", "an energy takes no augmentation values; use false")
        self.check(self.width % 64 == 0, "width", "must be a multiple of 64, the width of a head")


class Potential(Network):
    """f(x), (B, C, H, W) -> (B,).

    Args:
        cfg: PotentialConfig.
        shape: (C, H, W) of the images.
        classes: number of class labels; 0 makes the network unconditional.

    Raises:
        ValueError: images whose sides are no multiple of network.patch (form=tokens).
    """

    Config = PotentialConfig
    ENERGY = True

    def __init__(self, cfg: PotentialConfig, shape: Sequence[int], classes: int = 0):
        super().__init__()
        self.form = cfg.form
        self.net = EDMUNet(cfg, shape, classes)
        if cfg.form != "tokens":
            return
        check(
            shape[-2] % cfg.patch == 0 and shape[-1] % cfg.patch == 0,
            "network.patch",
            cfg.patch,
            f"must divide the sides of the images, {shape[-2]} x {shape[-1]}",
        )
        count = (shape[-2] // cfg.patch) * (shape[-1] // cfg.patch)
        self.tokens = nn.Conv2d(shape[0], cfg.width, cfg.patch, stride=cfg.patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, count, cfg.width))
        layer = nn.TransformerEncoderLayer(
            cfg.width,
            cfg.width // 64,
            dim_feedforward=4 * cfg.width,
            dropout=cfg.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.transformer = nn.TransformerEncoder(layer, cfg.layers, enable_nested_tensor=False)
        # No bias here or in the head: a constant in f has no gradient, at which DDP stops.
        self.norm = nn.LayerNorm(cfg.width, bias=False)
        self.head = nn.Linear(cfg.width, 1, bias=False)

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return f, (B,), in `dtype`; arguments as for EBM."""
        image = self.net(x, noise, labels, augment)
        if self.form == "tokens":
            tokens = self.tokens(image).flatten(2).transpose(1, 2) + self.positions
            value = self.norm(self.transformer(tokens)).mean(dim=1)
            return self.head(value).squeeze(1).to(dtype)
        squares = (x.to(dtype) - image.to(dtype)).square().flatten(1).sum(dim=1)
        return -0.5 * squares if self.form == "distance" else -(squares + TIP).sqrt()
