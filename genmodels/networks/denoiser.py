"""Networks of Noise2Score: a small U-Net that knows the noise level, and the paper's own."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from genmodels.config import setting
from genmodels.kernels.broadcast import over_items
from genmodels.networks.base import Network, NetworkConfig
from genmodels.networks.unet import pad_to_multiple

__all__ = ["Denoiser", "DenoiserConfig", "N2SUNet", "N2SUNetConfig"]


@dataclass
class DenoiserConfig(NetworkConfig):
    """A U-Net of residual blocks without normalisation, from half the resolution down."""

    name: str = setting("denoiser", "")
    channels: list[int] = setting(
        [64, 96, 128], "channels at 1/2, 1/4, 1/8 ... of the resolution", ge=1
    )
    blocks: list[int] = setting([1, 1, 2], "residual blocks on each side of each scale", ge=1)
    weight_norm: bool = setting(
        False, "filters learn direction and size apart (weight normalisation)"
    )

    def __post_init__(self):
        super().__post_init__()
        self.check(self.channels, "channels", "must be positive whole numbers, one for each scale")
        self.check(
            len(self.blocks) == len(self.channels),
            "blocks",
            f"must be {len(self.channels)} positive whole numbers",
        )


class Residual(nn.Module):
    """x + conv(relu(conv(x))), 3x3; the second convolution starts small."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        with torch.no_grad():
            self.second.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Return features like x."""
        return x + self.second(functional.relu(self.first(x)))


class Denoiser(Network):
    """F(x; noise) of pictures of any size, noise being one more input channel.

    Two by two pixels become channels first: at a quarter of the places a convolution costs a
    quarter, and sees twice as far (as in FFDNet). No normalisation: a picture's contrast is signal.

    Args:
        cfg: DenoiserConfig.
        shape: (C, H, W) of the training patches; only C matters.
        classes: 0; labels are not used.

    What is learned here is mostly noise, and Adam moves the filters of the deep scales at random, a
    step's size each time. With weight_norm they turn and do not grow, as long as they like; without
    it they do, and a wide network breaks (see docs/noise2score.md).

    References: Zhang, Zuo and Zhang 2018, arXiv 1710.04026 (level map, unshuffled pixels);
    Salimans and Kingma 2016, arXiv 1602.07868 (weight normalisation).
    """

    Config = DenoiserConfig

    def __init__(self, cfg: DenoiserConfig, shape: Sequence[int], classes: int = 0):
        super().__init__()
        channels, pairs = cfg.channels, list(zip(cfg.channels, cfg.channels[1:]))
        self.multiple = 2 ** len(channels)
        self.entry = nn.Conv2d(4 * shape[0] + 1, channels[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairs)
        self.before = nn.ModuleList(_blocks(c, n) for c, n in zip(channels, cfg.blocks))
        self.after = nn.ModuleList(_blocks(c, n) for c, n in zip(channels[:-1], cfg.blocks))
        self.exit = nn.Conv2d(channels[0], 4 * shape[0], 3, padding=1)
        nn.init.zeros_(self.exit.weight)  # F = 0 at first: the estimate is the noisy picture
        nn.init.zeros_(self.exit.bias)
        if cfg.weight_norm:
            for part in (self.entry, self.down, self.up, self.before, self.after):
                for layer in part.modules():
                    if isinstance(layer, nn.Conv2d):
                        weight_norm(layer)
                    elif isinstance(layer, nn.ConvTranspose2d):
                        weight_norm(layer, dim=1)  # where its outputs are

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Return F, (B, C, H, W); noise (B,) of order one."""
        height, width = x.shape[-2:]
        h = functional.pixel_unshuffle(pad_to_multiple(x, self.multiple), 2)
        noise_map = over_items(noise, h).expand(-1, 1, *h.shape[-2:])
        # Both ends stay in float32 under autocast: in bf16 a pixel is only known to 1 of 255.
        with torch.autocast(x.device.type, enabled=False):
            h = self.entry(torch.cat([h, noise_map.to(h)], dim=1))
        kept = []
        for block, down in zip(self.before, self.down):
            kept.append(block(h))
            h = down(kept[-1])
        h = self.before[-1](h)
        for block, up in zip(reversed(self.after), reversed(self.up)):
            h = block(up(h) + kept.pop())
        with torch.autocast(x.device.type, enabled=False):
            h = self.exit(h.to(x))
        return functional.pixel_shuffle(h, 2)[..., :height, :width]


def _blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(Residual(channels) for _ in range(count)))


@dataclass
class N2SUNetConfig(NetworkConfig):
    """The U-Net of Noise2Score's authors: blocks shared across scales, blind to the level."""

    name: str = setting("n2s_unet", "")


class N2SUNet(Network):
    """The paper's network, 0.70 M parameters: five poolings, blocks of one width used again.

    Leaky ReLU 0.1; normal initialisation with deviation 0.02 (as its released training does).

    Args:
        cfg: N2SUNetConfig.
        shape: (C, H, W); only C matters.
        classes: 0; labels are not used.

    References: Kim and Ye 2021, arXiv 2106.07009; Lehtinen et al. 2018, arXiv 1803.04189.
    """

    Config = N2SUNetConfig
    multiple = 32

    def __init__(self, cfg: N2SUNetConfig, shape: Sequence[int], classes: int = 0):
        super().__init__()
        channels, up = shape[0], {"stride": 2, "padding": 1, "output_padding": 1}
        self.first = _convs(channels, 48, 48)
        self.encode = _convs(48, 48)  # used at four scales
        self.bottom = nn.Sequential(*_convs(48, 48), nn.ConvTranspose2d(48, 48, 3, **up))
        self.lowest = nn.Sequential(*_convs(96, 96, 96), nn.ConvTranspose2d(96, 96, 3, **up))
        self.decode = nn.Sequential(  # used at three scales
            *_convs(144, 96, 96), nn.ConvTranspose2d(96, 96, 3, **up)
        )
        self.last = nn.Sequential(
            *_convs(96 + channels, 64, 32), nn.Conv2d(32, channels, 3, padding=1)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        noise: Tensor | None = None,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Return R, (B, C, H, W), of pictures of any size; the level is not used."""
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.multiple)
        kept = [functional.max_pool2d(self.first(x), 2)]
        for _ in range(4):
            kept.append(functional.max_pool2d(self.encode(kept[-1]), 2))
        h = self.bottom(kept.pop())
        for block in (self.lowest, self.decode, self.decode, self.decode):
            h = block(torch.cat([h, kept.pop()], dim=1))
        return self.last(torch.cat([h, x], dim=1))[..., :height, :width]


def _convs(*channels: int) -> nn.Sequential:
    layers = []
    for a, b in itertools.pairwise(channels):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)
