"""FID's Inception-v3: the network of the 2015 TensorFlow release, batch norm folded.

It differs from the later Inception-v3 of torchvision in what counts for a score: 1008 classes,
average pools that leave the padding out of the mean, a max pool in the last block. Layers bear the
names of the published state dicts, which `fold` turns into weights of this module.

With batch norm folded a convolution is W*x + b, which commutes with an average: a 1x1 convolution
of the pooled input is the pooled 1x1 convolution, and pooling the few channels that come out is
cheaper.

Reference: Szegedy et al. 2016, arXiv 1512.00567 (network); Heusel et al. 2017, arXiv 1706.08500.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from genmodels.kernels.resize_normalize import resize_normalize

URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PUBLISHED = {
    SHA256: "state dict, torch-fidelity and pytorch-fid",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": "TorchScript, NVIDIA",
}
SIZE = 299
BN_EPS = 1e-3
# name: (channels in, channels out, kernel, stride, padding); None = 3x3 max pool of stride 2.
STEM = {
    "Conv2d_1a_3x3": (3, 32, 3, 2, 0),
    "Conv2d_2a_3x3": (32, 32, 3, 1, 0),
    "Conv2d_2b_3x3": (32, 64, 3, 1, 1),
    "MaxPool_1": None,
    "Conv2d_3b_1x1": (64, 80, 1, 1, 0),
    "Conv2d_4a_3x3": (80, 192, 3, 1, 0),
    "MaxPool_2": None,
}
# Blocks as {branch: steps}, a step being (suffix, channels out, kernel) with stride 1 and the size
# kept, (..., 2) with stride 2 and no padding, or a list of two that read the same input.
ROW, COLUMN = (1, 7), (7, 1)
ASIDE = (1, 3), (3, 1)


def _a(pool: int) -> dict[str, Any]:
    return {
        "branch1x1": [("", 64, 1)],
        "branch5x5": [("_1", 48, 1), ("_2", 64, 5)],
        "branch3x3dbl": [("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3)],
        "branch_pool": [("", pool, 1)],
    }


def _c(width: int) -> dict[str, Any]:
    return {
        "branch1x1": [("", 192, 1)],
        "branch7x7": [("_1", width, 1), ("_2", width, ROW), ("_3", 192, COLUMN)],
        "branch7x7dbl": [
            ("_1", width, 1),
            ("_2", width, COLUMN),
            ("_3", width, ROW),
            ("_4", width, COLUMN),
            ("_5", 192, ROW),
        ],
        "branch_pool": [("", 192, 1)],
    }


_B: dict[str, Any] = {
    "branch3x3": [("", 384, 3, 2)],
    "branch3x3dbl": [("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3, 2)],
}
_D: dict[str, Any] = {
    "branch3x3": [("_1", 192, 1), ("_2", 320, 3, 2)],
    "branch7x7x3": [("_1", 192, 1), ("_2", 192, ROW), ("_3", 192, COLUMN), ("_4", 192, 3, 2)],
}
_E: dict[str, Any] = {
    "branch1x1": [("", 320, 1)],
    "branch3x3": [("_1", 384, 1), [(f"_2{k}", 384, ASIDE[i]) for i, k in enumerate("ab")]],
    "branch3x3dbl": [
        ("_1", 448, 1),
        ("_2", 384, 3),
        [(f"_3{k}", 384, ASIDE[i]) for i, k in enumerate("ab")],
    ],
    "branch_pool": [("", 192, 1)],
}
# name: (channels in, branches, pool)
BLOCKS = {
    "Mixed_5b": (192, _a(32), "average"),
    "Mixed_5c": (256, _a(64), "average"),
    "Mixed_5d": (288, _a(64), "average"),
    "Mixed_6a": (288, _B, "halve"),
    "Mixed_6b": (768, _c(128), "average"),
    "Mixed_6c": (768, _c(160), "average"),
    "Mixed_6d": (768, _c(160), "average"),
    "Mixed_6e": (768, _c(192), "average"),
    "Mixed_7a": (768, _D, "halve"),
    "Mixed_7b": (1280, _E, "average"),
    "Mixed_7c": (2048, _E, "max"),
}
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS


class Conv(nn.Conv2d):
    """A convolution with bias, then ReLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return relu(conv(x))."""
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
        if plain and torch.backends.mkldnn.is_available():
            # What torch.compile would call: the ReLU within the convolution saves 5 %.
            return torch.ops.mkldnn._convolution_pointwise(
                x,
                self.weight,
                self.bias,
                self.padding,
                self.stride,
                self.dilation,
                self.groups,
                "relu",
                [],
                "",
            )
        return F.relu_(super().forward(x))

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """Return relu(conv(average of x)), the average taken last: same value, less work."""
        y = super().forward(x)
        return F.relu_(F.avg_pool2d(y, 3, stride=1, padding=1, count_include_pad=False))


class Block(nn.Module):
    """An inception block: branches side by side, their outputs concatenated."""

    def __init__(self, channels: int, branches: dict[str, Any], pool: str):
        super().__init__()
        self.pool = pool
        self.paths: list[list[list[str]]] = []
        for branch, steps in branches.items():
            width, path = channels, []
            for step in steps:
                layers = step if isinstance(step, list) else [step]
                for suffix, out, kernel, *rest in layers:
                    stride = rest[0] if rest else 1
                    height, length = kernel if isinstance(kernel, tuple) else (kernel, kernel)
                    padding = 0 if rest else (height // 2, length // 2)
                    conv = Conv(width, out, (height, length), stride, padding)
                    self.add_module(branch + suffix, conv)
                width = sum(layer[1] for layer in layers)
                path.append([branch + layer[0] for layer in layers])
            self.paths.append(path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the branches' outputs, concatenated."""
        out = []
        for path in self.paths:
            y = x
            if path == [["branch_pool"]]:
                y = self._pool_branch(x)
            else:
                for names in path:
                    parts = [self.get_submodule(name)(y) for name in names]
                    y = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            out.append(y)
        if self.pool == "halve":
            out.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(out, dim=1)

    def _pool_branch(self, x: torch.Tensor) -> torch.Tensor:
        conv: Any = self.get_submodule("branch_pool")
        if self.pool == "average":
            return conv.pooled(x)
        return conv(F.max_pool2d(x, 3, stride=1, padding=1))


class Inception(nn.Module):
    """FID's Inception-v3; calling it returns {"features": (B,2048), "logits": (B,1008)}, float32.

    The logits leave out the bias of the last layer, as the Inception Score's reference code does.
    `fold` makes its weights out of a published state dict.

    Args:
        resize: "tf1" or "clean"; see `prepare`.
    """

    def __init__(self, resize: str = "tf1"):
        super().__init__()
        self.resize = resize
        for name, layer in STEM.items():
            self.add_module(name, Conv(*layer) if layer else nn.MaxPool2d(3, stride=2))
        for name, block in BLOCKS.items():
            self.add_module(name, Block(*block))
        self.fc = nn.Linear(2048, 1008, bias=False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return features and logits of uint8 images (B,1 or 3,H,W)."""
        return self.net(prepare(images, self.resize, self.fc.weight.dtype))

    def net(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return features and logits of network input (B,3,299,299)."""
        for name in (*STEM, *BLOCKS):
            x = self.get_submodule(name)(x)
        features = x.float().mean(dim=(2, 3))
        return {"features": features, "logits": F.linear(features, self.fc.weight.float())}


class Spatial(nn.Module):
    """The features of sFID: a 17x17 map of 7 channels, flattened as TensorFlow keeps it.

    These are the first channels of the 1x1 branch after its ReLU, `mixed_6/conv` in TensorFlow's
    graph and Mixed_6d.branch1x1 here, in the order (height, width, channel): 2023 numbers. What
    comes after is not computed.

    Args:
        inception: the network.

    Reference: Nash et al. 2021, "Generating images with sparse representations", arXiv 2103.03841
        (sFID); Dhariwal and Nichol 2021, arXiv 2105.05233 (its use; the layer is that of their
        evaluation program).
    """

    def __init__(self, inception: Inception):
        super().__init__()
        self.inception = inception

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (B,2023) float32 of uint8 images (B,1 or 3,H,W)."""
        net = self.inception
        x = prepare(images, net.resize, net.fc.weight.dtype)
        for name in STEM | dict.fromkeys(list(BLOCKS)[: list(BLOCKS).index(SPATIAL_BLOCK)]):
            x = net.get_submodule(name)(x)
        y = net.get_submodule(f"{SPATIAL_BLOCK}.branch1x1")(x)
        return y[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).float().flatten(1)


class ScriptInception(nn.Module):
    """The TorchScript form of the network (NVIDIA's file, which clean-fid loads), called as it is.

    With "tf1" the script resizes; with "clean" its `layers` get the images `prepare` made.
    """

    def __init__(self, script: Any, resize: str = "tf1"):
        super().__init__()
        self.script = script
        self.resize = resize

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return features and logits of uint8 images (B,1 or 3,H,W)."""
        if self.resize == "tf1":
            features = self.script(rgb(images), return_features=True)
        else:
            features = self.script.layers(prepare(images, self.resize, torch.float32)).flatten(1)
        return {"features": features, "logits": F.linear(features, self.script.output.weight)}


def rgb(images: torch.Tensor) -> torch.Tensor:
    """Return images (B,3,H,W): grey ones are repeated.

    Raises:
        ValueError: neither one channel nor three.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must be grey or RGB for this network, got {images.shape[1]} channels: "
            "leave out alpha"
        )
    return images.expand(-1, 3, -1, -1)


def prepare(images: torch.Tensor, resize: str, dtype: torch.dtype) -> torch.Tensor:
    """Return network input (B,3,299,299) of uint8 images (B,1 or 3,H,W): (x - 128) / 128.

    Args:
        resize: "tf1" = bilinear on TensorFlow 1's grid, as FID was defined; "clean" = Pillow's
            bicubic with antialiasing in float, cut to 0..255 (Parmar et al. 2022, arXiv
            2104.11222).
    """
    if resize == "tf1":
        x = resize_normalize(images, SIZE, mode="tf1", mean=128, std=128, dtype=dtype)
    else:
        x = resize_normalize(images, SIZE, mode="bicubic", mean=128, std=128, dtype=dtype)
        x = x.clamp_(-1, 127 / 128)
    return rgb(x).contiguous(memory_format=torch.channels_last)


def _empty(resize: str = "tf1") -> Inception:
    """Return the network without memory for its weights: their names and shapes."""
    with torch.device("meta"):
        return Inception(resize)


def from_state(state: dict[str, torch.Tensor], resize: str = "tf1") -> Inception:
    """Return `Inception` with the weights of a published state dict; see `fold`."""
    net = _empty(resize)
    net.load_state_dict(fold(state), assign=True)
    return net


def fold(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of `Inception` made from a published state dict.

    Batch norm of a convolution without bias, y = (W*x - m) g / sqrt(v + eps) + c, is a convolution
    with weights W g / sqrt(v + eps) and bias c - m g / sqrt(v + eps), computed in float64.

    Args:
        state: of pytorch-fid or torch-fidelity: NAME.conv.weight, NAME.bn.{weight, bias,
            running_mean, running_var}, fc.weight; a prefix before all names is taken off.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    first = "Conv2d_1a_3x3.conv.weight"
    prefix = next((key.removesuffix(first) for key in state if key.endswith(first)), "")
    folded = {}
    wanted = _empty().state_dict()
    for key in (key.removesuffix(".weight") for key in wanted if key.endswith(".weight")):
        if key == "fc":
            folded["fc.weight"] = _tensor(state, f"{prefix}fc.weight", (1008, 2048))
            continue
        shape = tuple(wanted[f"{key}.weight"].shape)
        weight = _tensor(state, f"{prefix}{key}.conv.weight", shape).double()
        gain, centre, mean, var = (
            _tensor(state, f"{prefix}{key}.bn.{part}", shape[:1]).double()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / (var + BN_EPS).sqrt()
        folded[f"{key}.weight"] = (weight * scale[:, None, None, None]).float()
        folded[f"{key}.bias"] = (centre - mean * scale).float()
    return folded


def _tensor(state: dict[str, torch.Tensor], key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor of a state dict; ValueError if it is missing or has another shape."""
    if key not in state:
        raise ValueError(f"weights=: not an Inception of FID, {key} is missing")
    if tuple(state[key].shape) != tuple(shape):
        raise ValueError(
            f"weights=: not the Inception of FID, {key} has shape {tuple(state[key].shape)} and "
            f"not {tuple(shape)}"
        )
    return state[key]


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a state dict of the published form with seeded random weights that keep signals alive.

    For tests and timings without the published weights; scores made with it mean nothing.
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=random)

    state: dict[str, torch.Tensor] = {}
    for key, value in _empty().state_dict().items():
        name, _, kind = key.rpartition(".")
        if kind == "bias":
            continue
        fan_in, out = value[0].numel(), len(value)
        weight = torch.randn(value.shape, generator=random) * (2 / fan_in) ** 0.5
        if name == "fc":
            state |= {"fc.weight": weight, "fc.bias": uniform(-0.5, 0.5, out)}
            continue
        state[f"{name}.conv.weight"] = weight
        state[f"{name}.bn.weight"] = uniform(0.8, 1.2, out)
        state[f"{name}.bn.bias"] = uniform(-0.1, 0.1, out)
        state[f"{name}.bn.running_mean"] = uniform(-0.1, 0.1, out)
        state[f"{name}.bn.running_var"] = uniform(0.8, 1.2, out)
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    return state
