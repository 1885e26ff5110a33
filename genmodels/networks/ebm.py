"""Energy networks f: image, noise level -> one number; f = -E, HIGHER = likelier.

    e = MLP(sinusoids of the level) + Linear(one-hot label)            (B, 4 * channels)
    h = conv(x);  per stage: residual blocks, then 2x2 mean (not after the last stage)
    block:  h + g * conv(act(conv(act(h)) + act(Linear(act(e)))))   (drl: no act(Linear))
    f = < sum over pixels of relu(h), Linear(act(e)) >

No normalisation and no attention: every weight W is divided by its largest singular value sigma
(spectral norm), but the last one. DRL's second convolutions start near 0 and are divided by
max(sigma, 1). The gradient of f in x is piecewise constant with the leaky
ReLU; SiLU (activation=silu) makes it smooth.

References: Zhu, Xie, Wu and Gao, "Learning energy-based models by cooperative diffusion recovery
likelihood", ICLR 2024, arXiv 2309.05153; Gao et al. 2021, arXiv 2012.08125 (DRL); Miyato et al.
2018, arXiv 1802.05957 (spectral norm). Both kinds as in the released codes.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodels.config import setting
from genmodels.networks.base import Network, NetworkConfig

__all__ = ["EBM", "EBMConfig", "EnergyEmbedding", "Linear", "fixed_weights", "power_iteration"]

# name -> (activation, activation of the head)
ENERGY_ACTIVATIONS = {
    "leaky": (lambda x: F.leaky_relu(x, 0.2), F.relu),
    "silu": (F.silu, F.silu),
}


@dataclass
class EBMConfig(NetworkConfig):
    """Residual energy network (Zhu et al. 2024); the defaults are CIFAR-10's, 34.8 M parameters."""

    name: str = setting("ebm", "")
    kind: str = setting(
        "cdrl",
        "cdrl, drl_released: as in the released codes; drl: what older files mean by DRL's, every "
        "weight divided by max(sigma, 1)",
        choices=("cdrl", "drl", "drl_released"),
    )
    channels: int = setting(128, "channels of the finest stage", ge=2)
    multipliers: list[int] = setting([1, 2, 2, 2], "channels of each stage / channels", ge=1)
    blocks: int = setting(8, "residual blocks for each stage", ge=1)
    activation: str = setting("leaky", "leaky as released, silu smooth", choices=ENERGY_ACTIVATIONS)
    spectral_norm: bool = setting(True, "divide weights by their largest singular value")

    def __post_init__(self):
        super().__post_init__()
        self.check(self.channels % 2 == 0, "channels", "must be even")
        self.check(
            self.multipliers, "multipliers", "must be positive whole numbers, one for each stage"
        )


class EBM(Network):
    """f(x, level), (B, C, H, W) -> (B,). Any H and W: the means ignore what lies outside.

    Args:
        cfg: EBMConfig.
        shape: (C, H, W) of the images.
        classes: number of class labels; 0 makes the network unconditional.
    """

    Config = EBMConfig
    ENERGY = True

    def __init__(self, cfg: EBMConfig, shape: Sequence[int], classes: int = 0):
        super().__init__()
        released = cfg.kind == "drl_released"
        options = {"norm": cfg.spectral_norm, "bounded": cfg.kind == "drl", "iterating": released}
        self.act, self.head_act = ENERGY_ACTIVATIONS[cfg.activation]
        self.embedding = EnergyEmbedding(cfg.channels, classes, self.act, **options)
        dim = self.embedding.dim
        self.stem = Conv(shape[0], cfg.channels, 3, padding=1, **options)
        self.stages, width = nn.ModuleList(), cfg.channels
        for multiplier in cfg.multipliers:
            blocks = []
            for _ in range(cfg.blocks):
                blocks.append(EnergyBlock(width, cfg.channels * multiplier, dim, cfg, options))
                width = cfg.channels * multiplier
            self.stages.append(nn.ModuleList(blocks))
        self.head = nn.Linear(dim, width, bias=released)
        if released:
            initialise_as_drl(self)

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return f, (B,), in `dtype`; the sum over pixels and channels is made in it.

        Args:
            x: (B, C, H, W).
            noise: (B,), encoded level, 0 (clean) to 1000.
            labels: int64 (B,), -1 or None = no label; ignored by an unconditional network.
            augment: not supported.
            dtype: torch.float64 for likelihood ratios: f / s^2 can be 40,000 times f.
        """
        if augment is not None:
            raise ValueError("network.name=ebm: takes no augmentation values")
        with torch.autocast(x.device.type, enabled=False):
            embedding = self.embedding(noise, labels)
        h = self.stem(x)
        for i, blocks in enumerate(self.stages):
            h = F.avg_pool2d(h, 2, ceil_mode=True) if i else h
            for block in blocks:
                h = block(h, embedding)
        # Outside autocast: in bf16 one rounding of f at level 1 is thousands of nats.
        with torch.autocast(x.device.type, enabled=False):
            pooled = self.head_act(h.to(dtype)).sum(dim=(2, 3))
            return (pooled * self.head(embedding).to(dtype)).sum(dim=1)


class EnergyEmbedding(nn.Module):
    """Activated embedding of level and label, (B,), (B,) -> (B, 4 * channels)."""

    def __init__(
        self, channels: int, classes: int, act: Callable[[Tensor], Tensor], **options: bool
    ):
        super().__init__()
        self.classes = classes
        self.act = act
        self.dim = 4 * channels
        self.memo = None  # (noise, labels, value) of the latest call inside fixed_weights()
        half = channels // 2
        self.register_buffer(
            "frequencies", 1e-4 ** (torch.arange(half) / max(1, half - 1)), persistent=False
        )
        self.hidden = Linear(2 * half, self.dim, **options)
        self.outer = Linear(self.dim, self.dim, **options)
        # The last column stands for "no label".
        self.label = Linear(classes + 1, self.dim, bias=False, **options) if classes else None

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return (B, dim); noise (B,), labels int64 (B,) with -1 = none, or None."""
        # Compiled, it costs next to nothing, and which tensors come in would be compiled in.
        if torch.compiler.is_compiling() or self.memo is None:
            return self._embed(noise, labels)
        if self.memo[0] is not noise or self.memo[1] is not labels:
            self.memo = (noise, labels, self._embed(noise, labels).detach())
        return self.memo[2]

    def _embed(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        angles = noise.float()[:, None] * self.frequencies
        x = self.outer(self.act(self.hidden(torch.cat([angles.sin(), angles.cos()], dim=1))))
        if self.label is not None:
            if labels is None:
                labels = torch.full((len(x),), -1, device=x.device)
            x = x + self.label(F.one_hot(labels % (self.classes + 1), self.classes + 1).float())
        return self.act(x)


class EnergyBlock(nn.Module):
    """Residual block; the embedding shifts the channels between the two convolutions."""

    def __init__(
        self, inputs: int, outputs: int, dim: int, cfg: EBMConfig, options: dict[str, bool]
    ):
        super().__init__()
        self.act = ENERGY_ACTIVATIONS[cfg.activation][0]
        self.shift_act = self.act if cfg.kind == "cdrl" else nn.Identity()
        self.conv_in = Conv(inputs, outputs, 3, padding=1, **options)
        self.shift = Linear(dim, outputs, **options)
        bounded = {"bounded": cfg.kind != "cdrl"}
        self.conv_out = Conv(outputs, outputs, 3, padding=1, **options | bounded)
        self.gain = nn.Parameter(torch.ones(outputs))
        self.shortcut = Conv(inputs, outputs, 3, padding=1, **options)
        if inputs == outputs:
            self.shortcut = nn.Identity()
        if cfg.kind == "drl":  # as in the files that are called so
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return (B, outputs, H, W) for x (B, inputs, H, W)."""
        h = self.conv_in(self.act(x))
        h = h + self.shift_act(self.shift(embedding))[..., None, None].to(h.dtype)
        h = self.conv_out(self.act(h)) * self.gain[:, None, None]
        return h.to(x.dtype) + self.shortcut(x)


@torch.no_grad()
def initialise_as_drl(net: EBM) -> None:
    """Set the weights as DRL's released code does: fan_avg uniform, 1e-10 of that variance last."""
    small = {block.conv_out for blocks in net.stages for block in blocks}
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight, gain=1e-5 if layer in small else 1.0)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if isinstance(layer, Spectral) and layer.norm:
            layer.iterate(15)


# ------------------------------------------------------------------------------------------------
# Spectral norm


class Spectral:
    """A layer whose forward uses W / sigma, sigma = u . W v, u and v from the power iteration.

    sigma is differentiated through, u and v are not. Only power_iteration() moves u: a chain and
    the two halves of a loss see the same function. Of u and v only u is stored: v = W'u / |W'u|.

    Args:
        norm: False leaves the weight as it is.
        bounded: divide by max(sigma, 1): weights may shrink.
        iterating: in training each call does a power iteration of its own, those of a chain too.
    """

    def _prepare(self, norm: bool, bounded: bool, iterating: bool) -> None:
        self.norm = norm
        self.bounded = bounded
        self.iterating = iterating
        self.used = None
        if norm:
            self.register_buffer("u", F.normalize(torch.randn(self.weight.shape[0]), dim=0))
            self.iterate(15)

    @torch.no_grad()
    def iterate(self, times: int = 1) -> None:
        """Do power iterations on W W'."""
        for _ in range(0 if self.weight.is_meta else times):  # a shape alone has no direction
            self._iterate(self.weight.flatten(1))

    def _iterate(self, rows: Tensor) -> Tensor:
        """Do one, in place, and return the v on its way."""
        with torch.no_grad():
            v = F.normalize(rows.T @ self.u, dim=0)
            u = F.normalize(rows @ v, dim=0)
            # Weights of 0 (kind=drl, until the learning rate has left 0) say nothing: keep u, for
            # from u = 0 no iteration would ever come back.
            self.u.copy_(torch.where(u.norm() > 0.5, u, self.u))
            return v

    @property
    def moving(self) -> bool:
        """Whether each call moves u."""
        return self.norm and self.iterating and self.training

    def effective_weight(self) -> Tensor:
        """Return W / sigma, or the weight that fixed_weights() has laid ready."""
        if self.used is not None or not self.norm:
            return self.weight if self.used is None else self.used
        with torch.autocast(self.weight.device.type, enabled=False):
            rows = self.weight.flatten(1)
            with torch.no_grad():
                v = self._iterate(rows) if self.moving else F.normalize(rows.T @ self.u, dim=0)
                u = self.u.clone() if self.moving else self.u  # the next call writes into it
            sigma = torch.dot(u, torch.mv(rows, v))
            return self.weight / (sigma.clamp(min=1) if self.bounded else sigma)


class Conv(Spectral, nn.Conv2d):
    """nn.Conv2d with the weight of Spectral."""

    def __init__(
        self,
        *args: Any,
        norm: bool = True,
        bounded: bool = False,
        iterating: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._prepare(norm, bounded, iterating)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution."""
        return self._conv_forward(x, self.effective_weight(), self.bias)


class Linear(Spectral, nn.Linear):
    """nn.Linear with the weight of Spectral."""

    def __init__(
        self,
        *args: Any,
        norm: bool = True,
        bounded: bool = False,
        iterating: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._prepare(norm, bounded, iterating)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        return F.linear(x, self.effective_weight(), self.bias)


def power_iteration(net: nn.Module) -> None:
    """Do one power iteration in every layer with a spectral norm; once per optimizer step.

    Not in those that do them by themselves.
    """
    for layer in net.modules():
        if isinstance(layer, Spectral) and layer.norm and not layer.moving:
            layer.iterate()


@contextlib.contextmanager
def fixed_weights(net: nn.Module) -> Iterator[None]:
    """Compute every W / sigma once, without gradient, for all calls inside: for chains.

    The embedding too is computed once for a chain, as long as the very same tensors come in.
    Neither is where each call moves u.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, Spectral) and layer.norm]
    if any(layer.moving for layer in layers):
        yield
        return
    embeddings = [layer for layer in net.modules() if isinstance(layer, EnergyEmbedding)]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.used = layer.effective_weight()
        for layer in embeddings:
            layer.memo = (None, None, None)
        yield
    finally:
        for layer in layers:
            layer.used = None
        for layer in embeddings:
            layer.memo = None
