"""In-tree feature nets for grey images: small classifiers whose weights ship with the package.

They give everyone the same meaningful number offline, reported as FD(name), never as FID:
digits (scikit-learn's, 8x8), fashion (Fashion-MNIST, 28x28), mnist (28x28). The header of each
weights file says from what and how it was made: `python -m benchmarks.feature_nets NAME`.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Spec:
    """What the package knows about one net.

    Args:
        sha256: of the weights file; a new file makes all older FD(name) figures void.
        side: height and width of the images it was trained on.
        layers: (channels, stride) of each 3x3 convolution.
        dim: number of features.
        pad: images with that much background on each side are taken too, and cropped.
    """

    sha256: str
    side: int
    layers: tuple[tuple[int, int], ...]
    dim: int
    pad: int = 0


DIGITS_SHA256 = "39f3321754d1fdbef4e0fb33edb84bb57a26261639d994c82790004268d3f9db"
FASHION_SHA256 = "218e9be58f7c200a0cbef6cbd55c3a15101d557f14734e952f3e5bfe965d443d"
MNIST_SHA256 = "8cd6269e0b09447f7d142cbb72c70f9bcf828bccc486410c9ed9c6f39c65d4d2"
_LAYERS_28 = ((32, 2), (64, 1), (48, 2))
GREY_NETS = {
    "digits": Spec(DIGITS_SHA256, 8, ((32, 1), (32, 2)), 32),
    "fashion": Spec(FASHION_SHA256, 28, _LAYERS_28, 64, pad=2),
    "mnist": Spec(MNIST_SHA256, 28, _LAYERS_28, 64, pad=2),
}


def weights_file(name: str) -> Path:
    """Return the path of the shipped weights of a net."""
    return Path(__file__).parent / f"{name}_net.safetensors"


class GreyNet(nn.Module):
    """A classifier of grey images into ten classes; calling it returns the values before the head.

    `scale` makes the average variance of a feature over the training images one, so that distances
    have a unit. Computes in float64 (the loader sees to it): the float32 rows it yields then agree
    between machines, thread counts and batch sizes up to the last bit.
    """

    scale: torch.Tensor

    def __init__(self, side: int, layers: tuple[tuple[int, int], ...], dim: int):
        super().__init__()
        self.side = side
        body: list[nn.Module] = []
        channels = 1
        for width, stride in layers:
            body += [nn.Conv2d(channels, width, 3, padding=1, stride=stride), nn.SiLU()]
            channels = width
            side = -(-side // stride)
        self.body = nn.Sequential(*body, nn.Flatten(), nn.Linear(channels * side**2, dim))
        self.head = nn.Linear(dim, 10)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (B,dim) features of uint8 images (B,1,side,side), or larger ones cropped to it."""
        border = (images.shape[-1] - self.side) // 2
        if border:
            images = images[..., border:-border, border:-border]
        x = images.to(self.scale.dtype) / 127.5 - 1
        return self.body(x) / self.scale

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return (B,10) class scores of features (B,dim)."""
        return self.head(F.silu(features * self.scale))


def grey_net(name: str, data: bytes) -> GreyNet:
    """Return the net called `name` with the weights in `data`, the bytes of its file; float64.

    Raises:
        ValueError: bytes with another sha256.
    """
    spec = GREY_NETS[name]
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != spec.sha256:
        raise ValueError(
            f"weights=: sha256 is {sha256}, features={name} needs {spec.sha256}: restore "
            f"{weights_file(name).name} from the release, other weights give other scores"
        )
    net = GreyNet(spec.side, spec.layers, spec.dim)
    net.load_state_dict(load(data))
    return net.double()
