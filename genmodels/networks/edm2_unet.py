"""The U-Net of EDM2 (configuration G): its layers keep the magnitude of what goes through them.

N(x; d) = x / (rms of x over the dimensions d + 1e-4)

    weights   used as N(w; a row) / sqrt(its length): outputs have the variance of the inputs
    silu(x)   x sigmoid(x) / 0.596
    sum       ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)
    cat       a and b side by side, scaled so that each gives half of the energy
    Fourier   sqrt(2) cos(f c + phi)

The stored weights are forced to N(w; a row) as well, before each optimizer step and outside of
forward(): see `normalise_weights`. Without it they would grow, and the learning rate decay in a
way that nobody chose. There are no biases, no group norms and no learned scales but one number for
each block and one for the output. Tensors have the names that the released weights have.

Reference: Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models",
arXiv 2312.02696, appendix B.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodels.config import check, setting
from genmodels.networks.base import Network, NetworkConfig
from genmodels.networks.unet import pad_to_multiple

__all__ = ["EDM2UNet", "EDM2UNetConfig", "UnitUncertainty", "normalise_weights"]

EPS = 1e-4
HEAD = 64  # channels of an attention head
LARGEST = 256.0  # activations are cut off there, within float16
BALANCE = 0.3  # t of the sums in blocks: the share of the branch
LABEL_BALANCE = 0.5  # t of the sum of noise level and label


@dataclass
class EDM2UNetConfig(NetworkConfig):
    """EDM2's U-Net; the defaults are XS for images of 64x64, 124.7 M parameters."""

    name: str = setting("edm2_unet", "")
    channels: int = setting(
        128, "channels of the finest level; published: 64 128 192 256 320 384 448", ge=2
    )
    multipliers: list[int] = setting(
        [1, 2, 3, 4], "channels of each level / channels, finest first", ge=1
    )
    blocks: int = setting(
        3, "residual blocks for each encoder level; the decoder has one more", ge=1
    )
    attention: list[int] = setting([16, 8], "heights of the levels with self-attention")
    dropout: float = setting(0.0, "dropout in the residual blocks", ge=0, lt=1)

    def __post_init__(self):
        super().__post_init__()
        self.check(
            self.multipliers, "multipliers", "must be positive whole numbers, one for each level"
        )
        for width in [self.channels * multiplier for multiplier in self.multipliers]:
            self.check(
                width <= HEAD or width % HEAD == 0,
                "channels",
                f"a level gets {width} channels; more than {HEAD} must be a multiple of {HEAD}",
            )


def rms_norm(x: Tensor, dims: int | Sequence[int]) -> Tensor:
    """Return N(x; dims) in x's type; the norm is computed in float32."""
    dims = [dims] if isinstance(dims, int) else list(dims)
    count = math.prod(x.shape[dim] for dim in dims)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (norm / math.sqrt(count) + EPS).to(x.dtype)


def unit_silu(x: Tensor) -> Tensor:
    """Return x sigmoid(x) / 0.596: of a standard normal x its rms is 1."""
    return F.silu(x) / 0.596


def unit_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return the sum of a and b in shares 1 - t and t; of unit variance, if both are."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def unit_cat(a: Tensor, b: Tensor) -> Tensor:
    """Return a and b (B, *, H, W) side by side, each with half of the energy."""
    total = a.shape[1] + b.shape[1]
    parts = (x * math.sqrt(total / (2 * x.shape[1])) for x in (a, b))
    return torch.cat([*parts], dim=1)


class UnitConv(nn.Module):
    """Convolution with unit rows and no bias; without a kernel size a linear map of (B, inputs)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *(kernel, kernel)[: 2 * kernel]))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Return (B, outputs[, H, W]), times the gain."""
        rows = rms_norm(self.weight, range(1, self.weight.ndim))
        rows = (rows * (gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        return F.conv2d(x, rows, padding=rows.shape[-1] // 2) if rows.ndim == 4 else x @ rows.T


@torch.no_grad()
def normalise_weights(module: nn.Module) -> None:
    """Force the rows of all weights of EDM2's layers below a module to an rms of 1, in place.

    To be called once at the start of each optimizer step, whatever the micro-batches; and on a
    frozen model once, if it is compared with one in training.

    Reference: Karras et al. 2024, arXiv 2312.02696, section 2.3 ("forced weight normalization").
    """
    for layer in module.modules():
        if isinstance(layer, UnitConv):
            layer.weight.copy_(rms_norm(layer.weight, range(1, layer.weight.ndim)))


class Fourier(nn.Module):
    """sqrt(2) cos(f c + phi), (B, features): f = 2 pi N(0, 1) and phi = 2 pi U(0, 1) are fixed."""

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))

    def forward(self, c: Tensor) -> Tensor:
        """Return float32 (B, features) of c (B,)."""
        return math.sqrt(2) * (c.float()[:, None] * self.freqs + self.phases).cos()


class UnitUncertainty(nn.Module):
    """EDM2's learned log-variance u(sigma) of the loss, (B,): L = w e^-u |D - y|^2 + u.

    A unit row times 128 Fourier features of ln(sigma) / 4: |u| <= 16, random at first.

    Reference: as the module; equations 14 and 15.
    """

    def __init__(self, features: int = 128):
        super().__init__()
        self.fourier = Fourier(features)
        self.linear = UnitConv(features, 1)

    def forward(self, log_sigma: Tensor) -> Tensor:
        """Return u, float32 (B,), for log_sigma = ln(sigma) / 4, (B,)."""
        with torch.autocast(log_sigma.device.type, enabled=False):
            return self.linear(self.fourier(log_sigma))[:, 0]


class Block(nn.Module):
    """Residual block of encoder or decoder, (B, inputs, H, W) -> (B, outputs, H', W').

    Args:
        inputs, outputs: channels.
        dim: width of the embedding.
        encoder: whether it normalises its input pixel by pixel.
        attention: whether it ends in self-attention.
        resample: "down", "up" or "": halves or doubles what it gets, first of all.
        dropout: probability.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        dim: int,
        *,
        encoder: bool,
        attention: bool = False,
        resample: str = "",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.encoder = encoder
        self.resample = resample
        self.dropout = dropout
        self.heads = max(1, outputs // HEAD)
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv_res0 = UnitConv(outputs if encoder else inputs, outputs, 3)
        self.emb_linear = UnitConv(dim, outputs)
        self.conv_res1 = UnitConv(outputs, outputs, 3)
        self.conv_skip = UnitConv(inputs, outputs, 1) if inputs != outputs else None
        self.attn_qkv = UnitConv(outputs, 3 * outputs, 1) if attention else None
        self.attn_proj = UnitConv(outputs, outputs, 1) if attention else None

    def modulation(self, embedding: Tensor) -> Tensor:
        """Return the factors on the channels, (B, outputs, 1, 1); 1 at first."""
        return (1 + self.emb_linear(embedding, self.emb_gain))[..., None, None]

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Return (B, outputs, H', W'); modulation as the method of that name makes it."""
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.encoder:
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = rms_norm(x, 1)
        y = self.conv_res0(unit_silu(x))
        y = unit_silu(y * modulation.to(y.dtype))
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if not self.encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = unit_sum(x, y.to(x.dtype), BALANCE)
        if self.attn_qkv is not None:
            x = unit_sum(x, self._attend(x).to(x.dtype), BALANCE)
        return x.clamp(-LARGEST, LARGEST)

    def _attend(self, x: Tensor) -> Tensor:
        """Return the projected average of the values; rows of qkv are (head, channel, q k v)."""
        batch, channels, height, width = x.shape
        qkv = self.attn_qkv(x).reshape(batch, self.heads, channels // self.heads, 3, -1)
        q, k, v = (part.transpose(2, 3) for part in rms_norm(qkv, 2).unbind(3))
        y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return self.attn_proj(y.reshape(batch, channels, height, width))


class EDM2UNet(Network):
    """Raw network F of the preconditioned denoiser, (B, C, H, W) -> (B, C, H, W); F = 0 at first.

    Any H and W: reflected at the right and bottom to the multiple that the levels need, and
    cropped.

    Args:
        cfg: EDM2UNetConfig.
        shape: (C, H, W) of the images; H decides which levels get attention.
        classes: number of class labels; 0 makes the network unconditional.

    Raises:
        ValueError: a height of attention that no level has; augmentation values given.
    """

    Config = EDM2UNetConfig
    HALF = True
    FORCED = True
    UNCERTAINTY = UnitUncertainty

    def __init__(self, cfg: EDM2UNetConfig, shape: Sequence[int], classes: int = 0):
        super().__init__()
        widths = [cfg.channels * multiplier for multiplier in cfg.multipliers]
        self.multiple = 2 ** (len(widths) - 1)
        sizes = [[math.ceil(side / 2**level) for side in shape[1:]] for level in range(len(widths))]
        heights = [height for height, _ in sizes]
        check(
            set(cfg.attention) <= set(heights),
            "network.attention",
            cfg.attention,
            f"must be heights of the levels, {heights} for images {shape[-2]} high",
        )
        names = [f"{height}x{width}" for height, width in sizes]
        attended = [height in cfg.attention for height in heights]
        dim, self.classes = max(widths), classes
        self.emb_fourier = Fourier(cfg.channels)
        self.emb_noise = UnitConv(cfg.channels, dim)
        self.emb_label = UnitConv(classes, dim) if classes else None

        common = {"dim": dim, "dropout": cfg.dropout}
        width, skips = cfg.channels, [cfg.channels]
        # One more channel, of ones, stands for the biases that there are none of.
        self.enc = nn.ModuleDict({f"{names[0]}_conv": UnitConv(shape[0] + 1, width, 3)})
        for level, outputs in enumerate(widths):
            if level:
                block = Block(width, width, encoder=True, resample="down", **common)
                self.enc[f"{names[level]}_down"] = block
                skips.append(width)
            for index in range(cfg.blocks):
                block = Block(width, outputs, encoder=True, attention=attended[level], **common)
                self.enc[f"{names[level]}_block{index}"] = block
                width = outputs
                skips.append(width)

        self.dec = nn.ModuleDict()
        for index in range(2):
            block = Block(width, width, encoder=False, attention=index == 0, **common)
            self.dec[f"{names[-1]}_in{index}"] = block
        for level, outputs in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                block = Block(width, width, encoder=False, resample="up", **common)
                self.dec[f"{names[level]}_up"] = block
            for index in range(cfg.blocks + 1):
                inputs = width + skips.pop()
                block = Block(inputs, outputs, encoder=False, attention=attended[level], **common)
                self.dec[f"{names[level]}_block{index}"] = block
                width = outputs
        self.out_conv = UnitConv(width, shape[0], 3)
        self.out_gain = nn.Parameter(torch.zeros(()))

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
            augment: None.
        """
        if augment is not None:
            raise ValueError("network.name=edm2_unet: takes no augmentation values; use edm_unet")
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.multiple)
        stem, *encoder = self.enc.values()
        # Noise level and label stay in float32 under autocast, with the maps of the embedding.
        with torch.autocast(x.device.type, enabled=False):
            embedding = self.embedding(noise, labels)
            blocks = [*encoder, *self.dec.values()]
            modulations = [block.modulation(embedding) for block in blocks]
        x = stem(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips = [x]
        for block, modulation in zip(encoder, modulations):
            x = block(x, modulation)
            skips.append(x)
        for (name, block), modulation in zip(self.dec.items(), modulations[len(encoder) :]):
            x = unit_cat(x, skips.pop()) if "_block" in name else x
            x = block(x, modulation)
        return self.out_conv(x, self.out_gain)[..., :height, :width]

    def embedding(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Return the embedding of noise level and label, float32 (B, dim)."""
        e = self.emb_noise(self.emb_fourier(noise))
        if self.emb_label is not None:
            label = e.new_zeros(len(e), self.classes)
            if labels is not None:
                numbers = torch.arange(self.classes, device=e.device)
                label = (labels[:, None] == numbers).to(e.dtype) * math.sqrt(self.classes)
            e = unit_sum(e, self.emb_label(label), LABEL_BALANCE)
        return unit_silu(e)
