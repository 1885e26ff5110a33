"""Encoders: image -> features (B, width). No normalisation: no item sees the others of its batch.

    resnet8     h = conv(x); four residual blocks of constant width, the first two halve the image;
                mean over pixels of LeakyReLU(h)
    perceptron  h = act(Linear(h)) per layer, over the flattened image

Reference: Sansone and Manhaeve, "Unifying self-supervised clustering and energy-based models",
TMLR 2025, arXiv 2401.00873 (the backbones of its toy and image experiments).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from genmodels.config import check, setting
from genmodels.networks.base import Network, NetworkConfig

__all__ = ["Perceptron", "PerceptronConfig", "ResNet8", "ResNet8Config"]

# name -> function; the gradient of f in x is piecewise constant with the first two.
ENCODER_ACTIVATIONS = {
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass
class ResNet8Config(NetworkConfig):
    """Residual encoder of GEDI's image experiments (Sansone and Manhaeve 2025)."""

    name: str = setting("resnet8", "")
    width: int = setting(128, "channels of every block, and number of features", ge=1)
    activation: str = setting("leaky", "silu is smooth", choices=ENCODER_ACTIVATIONS)
    input_stride: int = setting(1, "stride of the first convolution; 2 is four times cheaper")

    def __post_init__(self):
        super().__post_init__()
        self.check(self.input_stride in (1, 2), "input_stride", "must be 1 or 2")


class ResNet8(Network):
    """Features (B, width) of images (B, C, H, W), any H and W >= 4.

    Args:
        cfg: ResNet8Config.
        shape: (C, H, W) of the images.
        classes: ignored; encoders see no labels.
    """

    Config = ResNet8Config
    ENCODER = True

    def __init__(self, cfg: ResNet8Config, shape: Sequence[int], classes: int = 0):
        super().__init__()
        check(
            min(shape[1:]) >= 4,
            "network.name",
            "resnet8",
            "needs images of 4x4 or more; network.name=perceptron takes points",
        )
        self.act = ENCODER_ACTIVATIONS[cfg.activation]
        self.width = cfg.width
        first = EncoderBlock(
            shape[0], cfg.width, self.act, halve=True, first=True, stride=cfg.input_stride
        )
        others = [EncoderBlock(cfg.width, cfg.width, self.act, halve=i == 0) for i in range(3)]
        self.blocks = nn.ModuleList([first, *others])

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, (B, width)."""
        for block in self.blocks:
            x = block(x)
        return self.act(x).mean(dim=(2, 3))


class EncoderBlock(nn.Module):
    """Residual block: conv, act, conv, with an act before unless it is the first; mean pooling."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        act: Callable[[Tensor], Tensor],
        *,
        halve: bool,
        first: bool = False,
        stride: int = 1,
    ):
        super().__init__()
        self.act = act
        self.halve = halve
        self.first = first
        self.stride = stride
        self.conv_in = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H', W'), halved if so built."""
        h = self.conv_in(x if self.first else self.act(x))
        h = self.conv_out(self.act(h))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        h = h + self.shortcut(x)
        return F.avg_pool2d(h, 2, ceil_mode=True) if self.halve else h


@dataclass
class PerceptronConfig(NetworkConfig):
    """Multilayer perceptron over the flattened image, for points in the plane and small images."""

    name: str = setting("perceptron", "")
    width: int = setting(100, "hidden units, and number of features", ge=1)
    layers: int = setting(2, "hidden layers", ge=1)
    activation: str = setting("relu", "silu is smooth", choices=ENCODER_ACTIVATIONS)
    input_scale: float = setting(
        1.0, "factor on the input; larger lets the first steps bend more", gt=0
    )


class Perceptron(Network):
    """Features (B, width) of images of any shape.

    Args:
        cfg: PerceptronConfig.
        shape: (C, H, W) of the images.
        classes: ignored; encoders see no labels.
    """

    Config = PerceptronConfig
    ENCODER = True

    def __init__(self, cfg: PerceptronConfig, shape: Sequence[int], classes: int = 0):
        super().__init__()
        self.act = ENCODER_ACTIVATIONS[cfg.activation]
        self.width = cfg.width
        self.scale = cfg.input_scale
        sizes = [math.prod(shape)] + [cfg.width] * cfg.layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, (B, width)."""
        x = self.scale * x.flatten(1)
        for layer in self.layers:
            x = self.act(layer(x))
        return x
