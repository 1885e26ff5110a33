"""The three U-Nets of the EDM paper, DDPM++, NCSN++ and ADM; and CDRL's initializer, ADM's kin.

    embedding = f(noise level, label, augmentation)                       (B, 4 * channels)
    encoder:  3x3 conv, then per level [halve,] `blocks` residual blocks, all kept as skips
    middle:   two residual blocks, attention in the first
    decoder:  per level [double,] `blocks` + 1 residual blocks, each fed one skip
    output:   norm, SiLU, 3x3 conv

What the families do differently stands in `FAMILIES`. Released weights are mapped onto these
parameter names by genmodels/checkpoint/edm_pickles.py.

References: Song et al. 2021, arXiv 2011.13456, appendix H (DDPM++, NCSN++); Dhariwal and Nichol
2021, arXiv 2105.05233 (ADM); Karras et al. 2022, arXiv 2206.00364, appendix F.2, table 7; Zhu et
al. 2024, arXiv 2309.05153 (cdrl: as in its released code).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodels.config import check, setting
from genmodels.networks.base import Network, NetworkConfig
from genmodels.networks.unet import pad_to_multiple

__all__ = ["FAMILIES", "EDMUNet", "EDMUNetConfig"]

AUGMENT_DIM = 9  # width of the augmentation vector, see genmodels/data/augment.py


class _Family(NamedTuple):
    """What differs between the networks; every other line of this file is shared."""

    filter: tuple[int, ...]  # separable resampling kernel, not normalised
    scale: float  # factor on the sum of branch and shortcut: keeps the variance, or 1
    eps: float  # of the group norms
    least: int  # channels that a group of the norms has at least; there are 32 groups at most
    adaptive: bool  # the embedding gives scale and shift (True) or only a shift before the norm
    late: bool  # the label is added after the second linear layer of the embedding
    head: int  # channels per attention head, 0 = a single head
    decoder_attention: bool  # in every decoder block (True) or in the last of each level
    project: bool  # resampling blocks have a 1x1 conv in their shortcut
    fourier: bool  # random Fourier features of the noise level instead of sinusoidal ones
    pyramid: bool  # a second encoder path carries the downsampled image to each level


FAMILIES = {
    "ddpmpp": _Family((1, 1), 0.5**0.5, 1e-6, 4, False, False, 0, False, True, False, False),
    "ncsnpp": _Family((1, 3, 3, 1), 0.5**0.5, 1e-6, 4, False, False, 0, False, True, True, True),
    "adm": _Family((1, 1), 1.0, 1e-5, 4, True, True, 64, True, False, False, False),
    "cdrl": _Family((1, 1), 1.0, 1e-6, 1, True, True, 0, True, False, False, False),
}


@dataclass
class EDMUNetConfig(NetworkConfig):
    """DDPM++, NCSN++ or ADM; the defaults are EDM's CIFAR-10 network, 55.7 M parameters."""

    name: str = setting("edm_unet", "")
    kind: str = setting("ddpmpp", "which network; cdrl: CDRL's initializer", choices=FAMILIES)
    channels: int = setting(128, "channels of the finest level, a multiple of 32", ge=4)
    multipliers: list[int] = setting(
        [2, 2, 2], "channels of each level / channels, finest first", ge=1
    )
    blocks: int = setting(
        4, "residual blocks for each encoder level; the decoder has one more", ge=1
    )
    attention: list[int] = setting([16], "heights of the levels with self-attention")
    dropout: float = setting(0.13, "dropout in the residual blocks", ge=0, lt=1)
    augment: bool = setting(True, "take the 9 augmentation values as an input")

    def __post_init__(self):
        super().__post_init__()
        self.check(
            self.multipliers, "multipliers", "must be positive whole numbers, one for each level"
        )
        for width in [self.channels * multiplier for multiplier in self.multipliers]:
            least = FAMILIES[self.kind].least
            self.check(
                width % 4 == 0 and width % min(32, width // least) == 0,
                "channels",
                f"a level gets {width} channels, which do not divide into groups; "
                "take a multiple of 32",
            )
            self.check(
                self.kind != "adm" or width % 64 == 0,
                "channels",
                f"a level gets {width} channels; adm has heads of 64",
            )


class EDMUNet(Network):
    """Raw network F of the preconditioned denoiser, (B, C, H, W) -> (B, C, H, W).

    Any H and W: reflected at the right and bottom to the multiple that the levels need, and
    cropped.

    Args:
        cfg: EDMUNetConfig.
        shape: (C, H, W) of the images; H decides which levels get attention.
        classes: number of class labels; 0 makes the network unconditional.

    Raises:
        ValueError: a height of attention that no level has; augmentation values given to a network
            built without them.
    """

    Config = EDMUNetConfig

    def __init__(self, cfg: EDMUNetConfig, shape: Sequence[int], classes: int = 0):
        super().__init__()
        family = FAMILIES[cfg.kind]
        widths = [cfg.channels * multiplier for multiplier in cfg.multipliers]
        self.multiple = 2 ** (len(widths) - 1)
        self.scale = family.scale
        heights = [math.ceil(shape[-2] / 2**level) for level in range(len(widths))]
        check(
            set(cfg.attention) <= set(heights),
            "network.attention",
            cfg.attention,
            f"must be heights of the levels, {heights} for images {shape[-2]} high",
        )
        attended = [height in cfg.attention for height in heights]
        self.embedding = UNetEmbedding(cfg.kind, cfg.channels, classes, cfg.augment)
        dim = self.embedding.dim

        def block(
            inputs: int, outputs: int, attention: bool = False, resample: str = ""
        ) -> UNetBlock:
            return UNetBlock(inputs, outputs, dim, family, cfg.dropout, attention, resample)

        self.stem = nn.Conv2d(shape[0], cfg.channels, 3, padding=1)
        self.encoder = nn.ModuleList()
        self.pyramid = nn.ModuleList()
        self.decoder = nn.ModuleList()
        width, skips, image = cfg.channels, [cfg.channels], shape[0]
        for level, outputs in enumerate(widths):
            if level > 0:
                self.encoder.append(block(width, width, resample="down"))
                skips.append(width)
                if family.pyramid:
                    self.pyramid.append(PyramidConv(image, width, family.filter))
                    image = width
            for _ in range(cfg.blocks):
                self.encoder.append(block(width, outputs, attended[level]))
                width = outputs
                skips.append(width)

        self.middle = nn.ModuleList([block(width, width, True), block(width, width)])
        for level, outputs in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                self.decoder.append(block(width, width, resample="up"))
            for index in range(cfg.blocks + 1):
                here = attended[level] and (family.decoder_attention or index == cfg.blocks)
                self.decoder.append(block(width + skips.pop(), outputs, here))
                width = outputs

        self.norm = _group_norm(width, family)
        self.output = nn.Conv2d(width, shape[0], 3, padding=1)
        self._initialise(cfg.kind)

    @torch.no_grad()
    def _initialise(self, kind: str) -> None:
        """Set the weights as Karras et al. 2022, table 7, do; ADM, CDRL keep PyTorch's defaults."""
        plain = kind in ("adm", "cdrl")
        last = [self.output]
        for module in self.modules():
            if isinstance(module, UNetBlock):
                last += [module.conv_out, *([module.attention.proj] if module.attention else [])]
            if not plain and isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for conv in last:  # every residual branch and the output begin at (nearly) zero
            conv.weight.mul_(0.0 if plain else 1e-5)
            if kind != "cdrl":
                nn.init.zeros_(conv.bias)
        if not plain:
            for module in self.modules():
                if isinstance(module, Attention):
                    module.qkv.weight.mul_(math.sqrt(0.2))

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Return the network's output.

        Args:
            x: (B, C, H, W), scaled by c_in.
            noise: (B,), c_noise(sigma).
            labels: int64 (B,), -1 or None = no label; ignored by an unconditional network.
            augment: (B, 9) augmentation values, None = not augmented.
        """
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.multiple)
        # The embedding stays in float32 under autocast: bf16 would quantise the noise level.
        with torch.autocast(x.device.type, enabled=False):
            embedding = self.embedding(noise.float(), labels, augment)

        image, pyramid = x, iter(self.pyramid)
        x = self.stem(x)
        skips = [x]
        for block in self.encoder:
            x = block(x, embedding)
            if block.resample is not None and len(self.pyramid):
                x = image = (x + next(pyramid)(image)) * self.scale
            skips.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for block in self.decoder:
            x = block(x if block.resample else torch.cat([x, skips.pop()], dim=1), embedding)
        return self.output(F.silu(self.norm(x)))[..., :height, :width]


class UNetEmbedding(nn.Module):
    """Embedding of noise level, label and augmentation, (B, dim).

    DDPM++ and NCSN++ add the label to the noise features, scaled by sqrt(classes) so that a
    one-hot vector has unit variance; ADM and CDRL add it after the second linear layer. CDRL has a
    column for "no label", the first.
    """

    def __init__(self, kind: str, channels: int, classes: int, augment: bool):
        super().__init__()
        self.adm = kind == "adm"
        self.late = FAMILIES[kind].late
        self.unlabelled = int(kind == "cdrl")  # columns of the label layer for "no label"
        self.classes = classes
        self.dim = 4 * channels
        features = channels * (2 if FAMILIES[kind].fourier else 1)
        half = features // 2
        if FAMILIES[kind].fourier:
            frequencies = 2 * math.pi * 16 * torch.randn(half)  # random, fixed; scale 16
        else:
            # 1 ... 1e-4 with both ends; ADM stops one step before 1e-4.
            frequencies = 1e-4 ** (torch.arange(half) / (half - (not self.adm)))
        self.register_buffer("frequencies", frequencies, persistent=FAMILIES[kind].fourier)
        self.hidden = nn.Linear(features, self.dim)
        self.outer = nn.Linear(self.dim, self.dim)
        self.label = self.augment = None
        if classes:
            columns, outputs = classes + self.unlabelled, self.dim if self.late else features
            self.label = nn.Linear(columns, outputs, bias=not self.adm)
            if self.adm:
                nn.init.normal_(self.label.weight)
        if augment:
            self.augment = nn.Linear(AUGMENT_DIM, features, bias=False)
            if self.adm:
                nn.init.zeros_(self.augment.weight)

    def forward(self, noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """Return (B, dim); noise (B,), labels int64 (B,) or None, augment (B, 9) or None."""
        angles = noise[:, None] * self.frequencies
        waves = (angles.cos(), angles.sin())
        x = torch.cat(waves if self.adm else waves[::-1], dim=1)
        if augment is not None and self.augment is None:
            raise ValueError("network.augment is false: this network takes no augmentation")
        if self.augment is not None:
            # Zeros add nothing, but every parameter takes part: DDP wants a gradient of each.
            values = x.new_zeros(len(x), AUGMENT_DIM) if augment is None else augment.to(x.dtype)
            x = x + self.augment(values)
        if self.label is not None:
            label = self._one_hot(labels, x)
            if not self.late:
                x = x + self.label(label * math.sqrt(self.classes))
        x = self.outer(F.silu(self.hidden(x)))
        if self.late and self.label is not None:
            x = x + self.label(label)
        return F.silu(x)

    def _one_hot(self, labels: Tensor | None, like: Tensor) -> Tensor:
        """Return (B, columns of the label layer), zeros where no label has a column."""
        if labels is None:
            labels = torch.full((len(like),), -1, device=like.device)
        columns = torch.arange(self.classes + self.unlabelled, device=like.device)
        return (labels[:, None] + self.unlabelled == columns).to(like.dtype)


class UNetBlock(nn.Module):
    """Residual block with an optional change of resolution and optional attention at its end."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        dim: int,
        family: _Family,
        dropout: float,
        attention: bool,
        resample: str,
    ):
        super().__init__()
        self.scale = family.scale
        self.adaptive = family.adaptive
        self.dropout = dropout
        self.resample = Resample(resample, family.filter) if resample else None
        self.norm_in = _group_norm(inputs, family)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(dim, outputs * (2 if family.adaptive else 1))
        self.norm_out = _group_norm(outputs, family)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        project = inputs != outputs or (resample and family.project)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if project else nn.Identity()
        self.attention = Attention(outputs, family) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return (B, outputs, H', W') for x (B, inputs, H, W) and embedding (B, dim)."""
        y = F.silu(self.norm_in(x))
        if self.resample is not None:
            x, y = self.resample(x), self.resample(y)
        y = self.conv_in(y)
        modulation = self.modulation(embedding)[..., None, None].to(y.dtype)
        if self.adaptive:
            scale, shift = modulation.chunk(2, dim=1)
            y = shift + self.norm_out(y) * (1 + scale)
        else:
            y = self.norm_out(y + modulation)
        y = self.conv_out(F.dropout(F.silu(y), self.dropout, self.training))
        x = (y + self.shortcut(x)) * self.scale
        return x if self.attention is None else (x + self.attention(x)) * self.scale


class Attention(nn.Module):
    """Self-attention over the positions of a map, (B, C, H, W) -> (B, C, H, W), no residual.

    The channels of `qkv` are ordered (q k v, head, channel): in channels-last memory the three
    are then views, and SDPA needs no copy. Its softmax is in float32 for half-precision inputs.
    """

    def __init__(self, channels: int, family: _Family):
        super().__init__()
        self.heads = max(1, channels // family.head) if family.head else 1
        self.norm = _group_norm(channels, family)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the projected average of the values, (B, C, H, W)."""
        batch, channels, height, width = x.shape
        # Fused SDPA wants the channels last in memory; in channels-last format this is free.
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).contiguous()
        qkv = qkv.reshape(batch, height * width, 3, self.heads, channels // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(y.reshape(batch, height, width, channels).permute(0, 3, 1, 2))


class PyramidConv(nn.Module):
    """3x3 convolution and halving in one: the image path of NCSN++, (B, C, H, W) -> (B, C', ...).

    All zero padding is added before the convolution, none in between, as a single strided
    convolution with the composed kernel would do; the bias comes last.
    """

    def __init__(self, inputs: int, outputs: int, filter: tuple[int, ...]):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1 + (len(filter) - 1) // 2, bias=False)
        self.halve = Resample("down", filter, padding=0)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H/2, W/2)."""
        x = self.halve(self.conv(x))
        return x + self.bias[:, None, None].to(x.dtype)


class Resample(nn.Module):
    """Halve ("down") or double ("up") a map with a separable filter, depthwise."""

    def __init__(self, mode: str, filter: tuple[int, ...], padding: int = 1):
        super().__init__()
        self.mode = mode
        self.padding = padding
        self.box = filter == (1, 1)
        taps = torch.tensor(filter, dtype=torch.float32)
        kernel = taps[:, None] * taps / taps.sum() ** 2
        # Doubling spreads the samples over four times as many positions.
        self.register_buffer("kernel", kernel * (4 if mode == "up" else 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H/2, W/2) or (B, C, 2H, 2W)."""
        if self.box and self.mode == "down":
            return F.avg_pool2d(x, 2)
        if self.box:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        convolve = F.conv2d if self.mode == "down" else F.conv_transpose2d
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return convolve(x, kernel, stride=2, padding=self.padding, groups=x.shape[1])


def _group_norm(channels: int, family: _Family) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // family.least), channels, family.eps)
