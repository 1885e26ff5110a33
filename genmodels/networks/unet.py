"""The default network: diffusers' UNet2DModel behind this package's contract."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genmodels.config import setting
from genmodels.networks.base import Network, NetworkConfig

__all__ = ["UNet", "UNetConfig", "pad_to_multiple"]


@dataclass
class UNetConfig(NetworkConfig):
    """diffusers UNet2DModel: residual blocks, attention, up and down by two at each level."""

    name: str = setting("unet", "")
    channels: list[int] = setting([64, 128, 128], "channels of each level, finest first", ge=1)
    layers: int = setting(2, "residual blocks for each level", ge=1)
    attention: list[int] = setting(
        [1], "levels with self-attention, 0 = finest; empty: none at all"
    )
    head_dim: int = setting(32, "channels of one attention head", ge=1)
    norm_groups: int = setting(
        32, "groups of each group norm; divides every entry of channels", ge=1
    )
    dropout: float = setting(0.0, "dropout in the residual blocks", ge=0, lt=1)

    def __post_init__(self):
        super().__post_init__()
        self.check(self.channels, "channels", "must be positive whole numbers, one for each level")
        self.check(
            all(0 <= level < len(self.channels) for level in self.attention),
            "attention",
            f"must be levels 0..{len(self.channels) - 1}",
        )
        attended = [self.channels[level] for level in self.attention] + self.channels[-1:]
        # Of fewer than four channels in a group the norm would forget most of what was added.
        groups = largest_divisor(self.channels, min(self.norm_groups, min(self.channels) // 4))
        fit = f"network.norm_groups={groups} network.head_dim="
        fit += f"{largest_divisor(attended, self.head_dim)} fit"
        self.check(
            not any(channels % self.norm_groups for channels in self.channels),
            "norm_groups",
            f"must divide network.channels={self.channels}; {fit}",
        )
        self.check(
            not any(channels % self.head_dim for channels in attended),
            "head_dim",
            f"must divide the channels with attention (and the last): {attended}; {fit}",
        )


def largest_divisor(numbers: Sequence[int], limit: int) -> int:
    """Return the largest number up to `limit` that divides all of them (1 at least)."""
    common = math.gcd(*numbers)
    return max(d for d in range(1, max(min(limit, common), 1) + 1) if common % d == 0)


class UNet(Network):
    """UNet2DModel for images of any size: reflect-padded to what its levels need, then cropped.

    Args:
        cfg: UNetConfig.
        shape: (C, H, W) of the images.
        classes: number of class labels; 0 makes the network unconditional.
    """

    Config = UNetConfig

    def __init__(self, cfg: UNetConfig, shape: Sequence[int], classes: int = 0):
        super().__init__()
        from diffusers import UNet2DModel  # takes seconds, and not every network needs it

        levels = range(len(cfg.channels))
        attention = [level in cfg.attention for level in levels]
        self.classes = classes
        if max(cfg.channels) <= cfg.norm_groups:
            warnings.warn(
                f"network.norm_groups={cfg.norm_groups}: each channel of "
                f"network.channels={cfg.channels} is normalised alone, which takes away what the "
                "network is told of noise level and class; use a quarter of the channels or fewer",
                stacklevel=2,
            )
        self.multiple = 2 ** (len(cfg.channels) - 1)
        self.unet = UNet2DModel(
            sample_size=shape[-1],
            in_channels=shape[0],
            out_channels=shape[0],
            block_out_channels=tuple(cfg.channels),
            layers_per_block=cfg.layers,
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]],
            attention_head_dim=cfg.head_dim,
            norm_num_groups=cfg.norm_groups,
            dropout=cfg.dropout,
            add_attention=bool(cfg.attention),
            num_class_embeds=classes + 1 if classes else None,  # the last one means no label
        )
        # F = 0 at first: the preconditioned loss then starts at its expectation, 1 per element.
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Return F(x; noise), (B, C, H, W); see NETWORKS for the arguments."""
        if augment is not None:
            raise ValueError("network.name=unet: takes no augmentation values; use edm_unet")
        if self.classes:
            none = torch.full((len(x),), -1, device=x.device)
            labels = none if labels is None else labels
            labels = torch.where(labels < 0, self.classes, labels)
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.multiple)
        return self.unet(x, noise, labels if self.classes else None).sample[..., :height, :width]


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Return x (B, C, H, W) reflect-padded at the right and bottom to multiples of `multiple`."""
    right, bottom = -x.shape[-1] % multiple, -x.shape[-2] % multiple
    if not right and not bottom:
        return x
    # Reflection needs fewer new pixels than old ones; tiny images repeat their border instead.
    mode = "reflect" if right < x.shape[-1] and bottom < x.shape[-2] else "replicate"
    return nn.functional.pad(x, (0, right, 0, bottom), mode=mode)
