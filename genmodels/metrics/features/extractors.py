"""The feature extractors by name: load_features("inception", weights=FILE) and the like.

A score is only comparable with another one when net, weights and preprocessing agree, so the three
travel together: `Features` carries its name, the sha256 of its weights and the name of its resize.
"""

import difflib
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genmodels.metrics.features import dinov2, inception
from genmodels.metrics.features.colour_nets import DIM, SIDE, cifar_file, colour_net
from genmodels.metrics.features.grey_nets import GREY_NETS, grey_net, weights_file
from genmodels.metrics.features.rows import Features
from genmodels.metrics.features.weights import (
    check_sha256,
    download_weights,
    is_script,
    load_script,
    load_state,
    read_weights,
)

MODES = ("exact", "fast")


def _pixels(weights: Path | str | None, device: torch.device, mode: str, resize: str) -> Features:
    """Return the pixels themselves as features: values in [0,1], flattened in (C,H,W) order."""
    if weights is not None:
        raise ValueError(f"features=pixels has no weights, got weights={weights}: leave it out")

    def net(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() / 255

    return Features("pixels", None, "none", None, net, device=device)


def _grey(
    name: str, weights: Path | str | None, device: torch.device, mode: str, resize: str
) -> Features:
    """Return an in-tree net, from the shipped file or a copy of it; float32 in fast mode."""
    spec = GREY_NETS[name]
    data, _ = read_weights(weights or weights_file(name))
    net = grey_net(name, data).eval().requires_grad_(False).to(device)
    net = net.float() if mode == "fast" else net
    shapes = tuple((1, side, side) for side in sorted({spec.side, spec.side + 2 * spec.pad}))
    resize = f"crop{spec.side}" if spec.pad else "none"
    # On a CPU a small batch stays in its cache: twice the speed of 256.
    batch = 32 if device.type == "cpu" else 1024
    return Features(name, spec.sha256, resize, spec.dim, net, shapes, device, batch)


def _cifar(weights: Path | str | None, device: torch.device, mode: str, resize: str) -> Features:
    """Return the in-tree net of CIFAR-10, from the shipped file or a copy of it."""
    data, sha256 = read_weights(weights or cifar_file())
    net = colour_net(data).requires_grad_(False).to(device)
    batch = 64 if device.type == "cpu" else 1024
    return Features("cifar", sha256, "none", DIM, net, ((3, SIDE, SIDE),), device, batch)


def half_precision(device: torch.device) -> torch.dtype:
    """Return the fast dtype of a device: float16 on GPUs, bfloat16 on CPUs with matrix units."""
    if device.type != "cpu":
        return torch.float16
    # Without matrix units (AMX) bfloat16 convolutions are slower than float32 ones.
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def _inception(
    weights: Path | str | None, device: torch.device, mode: str, resize: str
) -> Features:
    """Return FID's Inception-v3 from a state dict or a TorchScript file, or from the internet."""
    if weights is None:
        raise ValueError(
            f"weights= is missing: features=inception needs a file, {inception.URL} "
            f"(sha256 {inception.SHA256[:8]}...), or weights=download to fetch it"
        )
    path: Path | str = weights
    if str(weights) == "download":
        path = download_weights(inception.URL, inception.SHA256)
    sha256 = read_weights(path)[1]
    if sha256 not in inception.PUBLISHED:
        warnings.warn(
            f"weights={weights}: sha256 {sha256[:8]}... is none of FID's published Inception "
            "networks: call the distance FD and name the hash, not FID",
            stacklevel=3,
        )
    net: Any
    if is_script(path):
        net = inception.ScriptInception(load_script(path, device), resize)
    else:
        net = inception.from_state(load_state(path), resize)
        net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        if mode == "fast":
            net.to(half_precision(device))
            if device.type == "cuda":
                net.net = torch.compile(net.net)
    standard = resize == "tf1" and sha256 in inception.PUBLISHED
    # A CPU is fastest where one layer's images fit its cache; 256 images take 4 GB.
    batch = 16 if device.type == "cpu" else 256
    outputs = ("features", "logits")
    return Features(
        "inception",
        sha256,
        resize,
        2048,
        net,
        device=device,
        batch=batch,
        outputs=outputs,
        standard=standard,
    )


def _spatial(weights: Path | str | None, device: torch.device, mode: str, resize: str) -> Features:
    """Return the spatial features of FID's Inception-v3, those of sFID; see inception.Spatial."""
    features = _inception(weights, device, mode, resize)
    if not isinstance(features.net, inception.Inception):
        raise ValueError(
            f"weights={weights}: is TorchScript, which gives no layer in between; "
            f"features=inception_spatial needs the state dict, {inception.URL}"
        )
    net, dim = inception.Spatial(features.net), inception.SPATIAL_DIM
    return replace(features, name="inception_spatial", net=net, dim=dim, outputs=("features",))


def _dinov2(weights: Path | str | None, device: torch.device, mode: str, resize: str) -> Features:
    """Return DINOv2 ViT-L/14, the features of FD-DINOv2."""
    dinov2.load_timm()
    if weights is None:
        raise ValueError(
            f"weights= is missing: features=dinov2 needs a file, {dinov2.URL}, or weights=download "
            "to fetch it"
        )
    path = download_weights(dinov2.URL, None) if str(weights) == "download" else weights
    net = dinov2.DINOv2()
    net.load(load_state(path))
    net.eval().requires_grad_(False).to(device)
    net = net.to(half_precision(device)) if mode == "fast" else net
    batch = 8 if device.type == "cpu" else 128
    sha256 = read_weights(path)[1]
    return Features("dinov2", sha256, "pil-bicubic-224", 1024, net, device=device, batch=batch)


def _file(path: Path | str, device: torch.device, mode: str) -> Features:
    """Return the TorchScript net in a file; its resize, if any, is inside the file."""
    net = load_script(path, device)
    sha256 = read_weights(path)[1]
    return Features(Path(path).stem, sha256, "in-file", None, net, device=device)


# name -> function of (weights, device, mode=, resize=) that returns the Features.
FEATURES: dict[str, Callable[..., Features]] = {name: partial(_grey, name) for name in GREY_NETS}
INCEPTIONS = ("inception", "inception_spatial")  # of one file of weights
WITH_WEIGHTS = (*INCEPTIONS, "dinov2")  # which do not ship with them
FEATURES |= {"inception": _inception, "inception_spatial": _spatial}
FEATURES |= {"cifar": _cifar, "dinov2": _dinov2, "pixels": _pixels}
# Where there is a choice; the first is the default.
RESIZES: dict[str, tuple[str, ...]] = dict.fromkeys(INCEPTIONS, ("tf1", "clean"))


def _known_resize(name: str, resize: str | None) -> str:
    """Return the resize of the net called `name`: the one asked for, its default, or ""."""
    choices = RESIZES.get(name, ())
    if resize is not None and resize not in choices:
        remedy = f"choose from {', '.join(choices)}" if choices else "there is no choice, leave out"
        raise ValueError(f"resize={resize} of features={name}: {remedy}")
    return resize or (choices or ("",))[0]


def _loader(
    name: str, weights: Path | str | None, device: torch.device, resize: str
) -> Callable[..., Features]:
    """Return load(mode=...) of the net called `name`."""
    if name in FEATURES:
        return partial(FEATURES[name], weights, device, resize=resize)
    if Path(name).is_file():
        if weights is not None:
            raise ValueError(f"features={name} holds its weights: leave out weights={weights}")
        return partial(_file, name, device)
    near = difflib.get_close_matches(name, FEATURES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"features must be one of {', '.join(FEATURES)} or an existing TorchScript file, "
        f"got {name!r}{hint}"
    )


def _check_code(name: str, weights: Path | str | None, allowed: bool) -> None:
    """Raise ValueError for a program among the weights that nobody allowed, or none to allow."""
    file = Path(weights) if weights and name in INCEPTIONS else Path(name)
    program = name not in FEATURES and file.is_file()
    if name in INCEPTIONS and file.is_file():
        program = is_script(file) and read_weights(file)[1] not in inception.PUBLISHED
    key = "weights" if name in INCEPTIONS else "features"
    if program and not allowed:
        raise ValueError(
            f"{key}={file}: a TorchScript file is a program, which may do anything that you may; "
            "if you trust it, add weights_are_code=true"
        )
    if allowed and not program:
        raise ValueError(
            f"weights_are_code=true: features={name} runs no code of a file; leave it out"
        )


def load_features(
    name: Features | Path | str,
    weights: Path | str | None = None,
    device: torch.device | str = "cpu",
    *,
    mode: str = "exact",
    resize: str | None = None,
    sha256: str | None = None,
    weights_are_code: bool = False,
) -> Features:
    """Return the feature extractor called `name`.

    Args:
        name: a key of FEATURES, or the path of a TorchScript file that maps uint8 (B,C,H,W) to
            (B,D), or a Features, which is returned as it is. "pixels" = values in [0,1], flattened;
            "digits" (8x8), "fashion" and "mnist" (28x28, or padded to 32x32 and cropped back) = the
            in-tree nets on grey images; "cifar" (32x32) = that on colour images; "inception" =
            FID's network, "inception_spatial" = its layer that sFID takes; "dinov2" = FD-DINOv2's.
        weights: the file of weights; "download" = fetch the published one (inception, dinov2). The
            in-tree nets ship with theirs; a copy must have its hash.
        device: where to compute.
        mode: "exact" = float32 without TF32 (grey in-tree nets: float64), deterministic; "fast" =
            half precision (in-tree nets: float32), TF32, compiled on a GPU. What it costs is to be
            measured with mode_difference and reported.
        resize: inception: "tf1" (FID) or "clean" (clean-fid's).
        sha256: what the hash of the weights must begin with (8 digits or more); None = any.
        weights_are_code: a TorchScript file may run. It is a program, which can read and write
            files; NVIDIA's published Inception, known by its hash, may run without this word.

    Raises:
        ValueError: unknown name, mode or resize, a missing or unfit file, another sha256, no
            connection, or a package that is not installed.
    """
    if isinstance(name, Features):
        return name
    if mode not in MODES:
        raise ValueError(f"mode={mode}: choose exact or fast")
    name = str(name)
    device = torch.device(device)
    _check_code(name, weights, weights_are_code)
    load = _loader(name, weights, device, _known_resize(name, resize))
    features = load(mode=mode)
    if features.sha256 is not None:
        check_sha256(weights or name, features.sha256, sha256)
    elif sha256 is not None:
        raise ValueError(f"sha256={sha256}: features={name} has no weights; leave it out")
    if mode == "exact":
        return features
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said already
        return replace(features, mode="fast", exact=load(mode="exact"))
