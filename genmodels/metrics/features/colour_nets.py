"""The in-tree feature net for colour images of 32x32: a small classifier of CIFAR-10.

It gives everyone the same number offline, reported as FD(cifar), never as FID. The header of the
weights file says from what and how it was made: `python -m benchmarks.cifar_net`.

    conv(3, 32)
    conv(32, 64, stride 2)    block(64)
    conv(64, 128, stride 2)   block(128)  block(128)    mean over the pixels: 128 features
    conv: 3x3, bias, SiLU;  block(x) = x + conv(conv(x))

Trained with batch norms, which are folded into the convolutions of the file.

References: He et al. 2016, arXiv 1512.03385 (residual blocks); Krizhevsky 2009 (CIFAR-10).
"""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR_SHA256 = "1a5ae296c31c62a2b7b51b0aa3522af902c4fbf5a11a7c6fccbe2483efc6873a"
SIDE, DIM = 32, 128
_LAYERS = ((3, 32, 1), (32, 64, 2), (64, 64, 0), (64, 128, 2), (128, 128, 0), (128, 128, 0))


def cifar_file() -> Path:
    """Return the path of the shipped weights."""
    return Path(__file__).parent / "cifar_net.safetensors"


class ColourNet(nn.Module):
    """Classifier of uint8 images (B, 3, 32, 32); calling it returns the values before the head.

    `scale` makes the average variance of a feature over the training images one, so that distances
    have a unit.
    """

    scale: Tensor

    def __init__(self, norms: bool = False) -> None:
        """Make it with batch norms, for training, or without."""
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=not norms)
            return nn.Sequential(layer, nn.BatchNorm2d(outputs) if norms else nn.Identity())

        self.body = nn.ModuleList(
            nn.ModuleList(
                [conv(inputs, outputs, stride)]
                if stride
                else [conv(inputs, inputs), conv(inputs, inputs)]
            )
            for inputs, outputs, stride in _LAYERS
        )
        self.head = nn.Linear(DIM, 10)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, 128) features of uint8 images (B, 3, 32, 32)."""
        return self.features(images.to(self.scale.dtype) / 127.5 - 1) / self.scale

    def features(self, x: Tensor) -> Tensor:
        """Return (B, 128) of images x in [-1, 1], not scaled."""
        for layers in self.body:
            y = x
            for layer in layers:
                y = F.silu(layer(y))
            x = y if len(layers) == 1 else x + y
        return x.mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """Return (B, 10) class scores of scaled features (B, 128)."""
        return self.head(features * self.scale)


def folded(net: ColourNet) -> ColourNet:
    """Return the net without batch norms that computes what this one does in eval mode."""
    plain = ColourNet()
    with torch.no_grad():
        for target, source in zip(plain.body, net.body):
            for (conv, _), (trained, norm) in zip(target, source):
                gain = norm.weight / (norm.running_var + norm.eps).sqrt()
                conv.weight.copy_(trained.weight * gain[:, None, None, None])
                conv.bias.copy_(norm.bias - norm.running_mean * gain)
        plain.head.load_state_dict(net.head.state_dict())
        plain.scale.copy_(net.scale)
    return plain.eval()


def colour_net(data: bytes) -> ColourNet:
    """Return the net with the weights in `data`, the bytes of its file; float32.

    Raises:
        ValueError: bytes with another sha256.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != CIFAR_SHA256:
        raise ValueError(
            f"weights=: sha256 is {sha256}, features=cifar needs {CIFAR_SHA256}: restore "
            f"{cifar_file().name} from the release, other weights give other scores"
        )
    net = ColourNet()
    net.load_state_dict({name: value.float() for name, value in load(data).items()})
    return net.eval()
