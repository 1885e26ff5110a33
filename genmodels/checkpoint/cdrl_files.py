"""Convert the checkpoints released with CDRL, of CIFAR-10 and ImageNet-32, to exports.

    python -m genmodels.importers Cifar_10_best.pth.tar out=models/cdrl_cifar10 data=cifar10

A file of theirs holds the energy ("pi") and the initializer ("p"), each as raw weights and as their
moving average, with the optimizers. It is read as genmodels/foreign reads all files of torch.save.
What no tensor says is taken to be as in their code: images of 32 x 32, leaky activations, noise
levels and chains as in configs/cdrl_cifar10.yaml, and a last denoising of twice the length.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genmodels.checkpoint.exports import check_new, write_export
from genmodels.checkpoint.models import build
from genmodels.config import DataConfig, check
from genmodels.data import fill_in
from genmodels.foreign import load_torch
from genmodels.methods.cdrl import CDRLConfig, build_initializer
from genmodels.networks.ebm import EBM, EBMConfig

SIZE = 32  # height and width of the images of both released files
KEYS = ("ema", "raw")
Tensors = dict[str, Tensor]


def convert(
    path: Path | str, out: Path | str, *, data: str = "imagefolder", key: str = "ema"
) -> Path:
    """Write a released checkpoint as a folder that sample.py, evaluate.py, init= take; return it.

    Args:
        path: the .pth.tar file.
        out: folder to make; must not exist.
        data: name of the data it was trained on, where genmodels.data knows them.
        key: "ema", their moving average, or "raw".

    Raises:
        ValueError: see load_released; or `out` exists.
    """
    out = Path(out)
    check_new(out)
    model = load_released(path, data=data, key=key)
    card = f"""---
library_name: genmodels
tags: [image-generation, energy-based-model, cdrl]
---
# {out.name}

Converted from {Path(path).name} (CDRL, weights: {key}) by genmodels.importers.

- Licence of the weights: their release states none; ask its authors before passing them on.
- Reference: Zhu et al., arXiv 2309.05153.

```
genmodels sample {out.name} num=64 out=samples
```
"""
    return write_export(model, out, card)


def load_released(path: Path | str, *, data: str = "imagefolder", key: str = "ema") -> Any:
    """Return the CDRL method with the weights of a released checkpoint; arguments as for convert.

    Raises:
        ValueError: the file is broken, or not one of CDRL's, or of other data; nothing in it has
            been executed.
    """
    if key not in KEYS:
        raise ValueError(f"key={key}: choose from {', '.join(KEYS)}")
    try:
        content = load_torch(path)
        energy, initializer = (_weights(content, name, key) for name in ("pi", "p"))
        network, shape, classes = _energy_network(energy)
        method = _initializer_settings(initializer)
        with torch.device("meta"):  # wrong shapes are found before anything is allocated
            ours = EBM(EBMConfig(**network), shape, classes)
            settings = {name: value for name, value in method.items() if name != "name"}
            theirs: Any = build_initializer(CDRLConfig(**settings), tuple(shape), classes)
        states = [
            _fitting(like.state_dict(), state)
            for like, state in (
                (ours, _energy_state(ours, energy, classes)),
                (theirs, _initializer_state(initializer)),
            )
        ]
    except OSError:
        raise
    except Exception as error:  # a hostile file may raise anything; all of it means the same
        reason = ascii(" ".join(f"{error}".split()))[1:200] or type(error).__name__
        raise ValueError(
            f"{path} is not a checkpoint released with CDRL; found: {reason}"
        ) from error
    plain: dict[str, Any] = {
        "name": Path(path).name.partition(".")[0],
        "data": {"name": data, "labels": classes > 0, "flip": True},
        "network": {"name": "ebm", **network},
        "method": method,
    }
    if data == "imagefolder":
        plain["data"] |= {"resolution": SIZE, "shape": shape, "classes": classes}
    else:
        filled = DataConfig(name=data)
        fill_in(filled)
        check(
            tuple(filled.shape) == tuple(shape) and (not classes or filled.classes == classes),
            "data",
            data,
            f"has images {tuple(filled.shape)} of {filled.classes} classes, the file's are "
            f"{tuple(shape)} of {classes or 'no'}",
        )
    model = build([plain])
    for part, state in zip((model.net, model.initializer), states):
        part.load_state_dict(state)
    return model.eval()


def _weights(content: Any, name: str, key: str) -> Tensors:
    """Return the tensors of "pi" or "p" under the names of their module, float32."""
    raw = content[f"{name}_state_dict"]
    found = {str(k).removeprefix("module."): value.float() for k, value in raw.items()}
    if key == "raw":
        return found
    # The average is a list in the order of the parameters; the spectral norm's u, v are buffers.
    names = [k for k in found if not k.endswith(("weight_u", "weight_v"))]
    average = content[f"{name}_ema_state_dict"]["shadow_params"]
    if len(average) != len(names):
        raise ValueError(f"{name}: an average of {len(average)} tensors, of {len(names)} weights")
    return _fitting(found, found | {k: value.float() for k, value in zip(names, average)})


def _fitting(expected: Mapping[str, Tensor], state: Tensors) -> Tensors:
    """Return the state, whose names and shapes must be those expected, and its values finite."""
    if odd := sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"the tensors do not fit: {odd[0]} (and {len(odd) - 1} more)")
    for name, like in expected.items():
        if state[name].shape != like.shape:
            raise ValueError(f"{name} is {tuple(state[name].shape)}, not {tuple(like.shape)}")
        if not bool(state[name].isfinite().all()):
            raise ValueError(f"{name} holds values that are not finite")
    return state


def _number(names: Mapping[str, Tensor], pattern: str) -> list[int]:
    """Return the numbers that stand in names where the pattern has a group, in order."""
    return sorted({int(m[1]) for name in names if (m := re.match(pattern, name))})


# ------------------------------------------------------------------------------------------------
# The energy


def _energy_network(tensors: Tensors) -> tuple[dict[str, Any], list[int], int]:
    """Return (fields of EBMConfig, shape, classes) that names and shapes tell."""
    spectral = "module_list.0.weight_orig" in tensors
    weight = "weight_orig" if spectral else "weight"
    channels, colours = tensors[f"module_list.0.{weight}"].shape[:2]
    widths = [[tensors[f"module_list.{k}.g"].shape[1] for k in run] for run in _stages(tensors)]
    if len({len(run) for run in widths}) != 1:
        raise ValueError("stages of different numbers of blocks")
    network = {
        "channels": channels,
        "multipliers": [run[0] // channels for run in widths],
        "blocks": len(widths[0]),
        "spectral_norm": spectral,
    }
    label = tensors.get(f"y_map.{weight}")
    return network, [colours, SIZE, SIZE], 0 if label is None else label.shape[1] - 1


def _stages(tensors: Tensors) -> list[list[int]]:
    """Return their numbers of the blocks of each stage: a pooling takes a number in between."""
    stages: list[list[int]] = []
    for k in _number(tensors, r"module_list\.(\d+)\.g$"):
        if not stages or stages[-1][-1] != k - 1:
            stages.append([])
        stages[-1].append(k)
    return stages


_BLOCK = {
    "conv_in": "conv1",
    "conv_out": "conv2",
    "shift": "temb_map",
    "shortcut": "short_cut",
}


_LEAVES = {"weight_orig": "weight", "weight": "weight", "bias": "bias"}
_LEAVES |= {"weight_u": "u", "weight_v": "v"}


def _energy_state(net: EBM, tensors: Tensors, classes: int) -> Tensors:
    """Return the state dict of our network."""
    modules = {"embedding.hidden": "temb_map1", "embedding.outer": "temb_map2"}
    modules |= {"stem": "module_list.0", "head": "temb_final"}
    if classes:
        modules["embedding.label"] = "y_map"
    gains = {}
    for i, run in enumerate(_stages(tensors)):
        for j, k in enumerate(run):
            block = f"stages.{i}.{j}"
            gains[f"{block}.gain"] = tensors[f"module_list.{k}.g"].flatten()
            for own, its in _BLOCK.items():
                if f"module_list.{k}.{its}.bias" in tensors:
                    modules[f"{block}.{own}"] = f"module_list.{k}.{its}"
    state: Tensors = dict(gains)
    used = {f"module_list.{k}.g" for run in _stages(tensors) for k in run}
    for own, its in modules.items():
        for theirs, ours in _LEAVES.items():
            if (name := f"{its}.{theirs}") in tensors:
                state[f"{own}.{ours}"] = tensors[name]
                used.add(name)
    if odd := sorted(tensors.keys() - used):
        raise ValueError(f"unknown {odd[0]} (and {len(odd) - 1} more)")
    vectors = {own: state.pop(f"{own}.v") for own in modules if f"{own}.v" in state}
    biases = {"embedding.label.bias"} & state.keys()
    _fitting(net.state_dict(), {name: state[name] for name in state.keys() - biases})
    for own, v in vectors.items():
        state[f"{own}.u"] = left_vector(state[f"{own}.weight"], state[f"{own}.u"], v)
    if classes:
        # Theirs has "no label" first, ours last; of two biases that are added one is enough.
        state["embedding.label.weight"] = state["embedding.label.weight"].roll(-1, dims=1)
        state["embedding.outer.bias"] = state["embedding.outer.bias"] + state.pop(
            "embedding.label.bias"
        )
    return state


def left_vector(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return the unit vector u' with |W' u'| = u . W v: ours keep u alone, theirs both.

    Theirs come from one power iteration a step, and v is half an iteration older than u; of an
    average W neither belongs to it. Between the largest and the smallest singular value such a
    vector always is: u turned towards the direction that W shrinks most.

    Args:
        weight: of a layer, (outputs, ...). u: (outputs,). v: (inputs,).

    Raises:
        ValueError: u . W v is not between them.
    """
    rows = weight.detach().double().flatten(1)
    u = torch.nn.functional.normalize(u.double(), dim=0)
    sigma = float(u @ rows @ v.double())
    square = rows @ rows.T
    least, basis = torch.linalg.eigh(square)
    if not sigma > 0 or sigma**2 < float(least[0]) * (1 - 1e-6):
        raise ValueError("a spectral norm below the smallest singular value")
    if float(u @ square @ u) < sigma**2:  # of an average: begin at the largest
        u = basis[:, -1]
    away = basis[:, 0] - (basis[:, 0] @ u) * u
    if float(away.norm()) < 1e-9:
        return u.float()
    away = away / away.norm()
    most, mixed, low = (
        float(a @ square @ b) - sigma**2 * float(a @ b)
        for a, b in ((u, u), (u, away), (away, away))
    )
    # most + 2 mixed t + low t^2 = 0 with t the tangent of the angle.
    if most <= 0 or low >= 0:
        return (u if most <= -low else away).float()
    t = (-mixed - (mixed**2 - most * low) ** 0.5) / low
    return torch.nn.functional.normalize(u + t * away, dim=0).float()


# ------------------------------------------------------------------------------------------------
# The initializer


def _initializer_settings(tensors: Tensors) -> dict[str, Any]:
    """Return the settings of the method that names and shapes of the initializer tell."""
    channels = tensors["init_conv.weight"].shape[0]
    levels = _number(tensors, r"downs\.(\d+)\.")
    first = r"downs\.0\.(\d+)\.conv1\.weight"
    attention = [SIZE >> k for k in levels if f"downs.{k}.1.to_qkv.weight" in tensors]
    # The last residual block of every level but the smallest halves the image.
    blocks = len(_number(tensors, first)) - (len(levels) > 1)
    widths = [tensors[f"downs.{k}.0.conv1.weight"].shape[0] for k in levels]
    return {
        "name": "cdrl",
        "initializer": "unet",
        "initializer_kind": "cdrl",
        "initializer_channels": channels,
        "initializer_multipliers": [width // channels for width in widths],
        "initializer_blocks": blocks,
        "initializer_attention": attention,
        "initializer_dropout": 0.1,
        "tweedie_scale": 2.0,
    }


_UNET_BLOCK = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "modulation": "mlp.1",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "shortcut": "res_conv",
}
_ATTENTION = {"norm": "norm", "qkv": "to_qkv", "proj": "to_out"}
_OUTSIDE = {
    "stem": "init_conv",
    "embedding.hidden": "time_mlp.1",
    "embedding.outer": "time_mlp.3",
    "embedding.label": "y_mlp.0",
    "norm": "norm",
    "output": "final_conv",
    "middle.0": "mid_block1",
    "middle.0.attention": "mid_attn",
    "middle.1": "mid_block2",
}


def _initializer_state(tensors: Tensors) -> Tensors:
    """Return the state dict of our initializer: another name for each of their tensors."""
    modules = dict(_OUTSIDE)
    for own, its in (("encoder", "downs"), ("decoder", "ups")):
        count = -1  # of our blocks, which hold their attention
        for level in _number(tensors, rf"{its}\.(\d+)\."):
            for k in _number(tensors, rf"{its}\.{level}\.(\d+)\."):
                if f"{its}.{level}.{k}.to_qkv.weight" in tensors:
                    modules[f"{own}.{count}.attention"] = f"{its}.{level}.{k}"
                    continue
                count += 1
                modules[f"{own}.{count}"] = f"{its}.{level}.{k}"
    names = {}
    for module, its in modules.items():
        inner = _ATTENTION if module.endswith("attention") else _UNET_BLOCK
        inner = inner if module.partition(".")[0] in ("encoder", "decoder", "middle") else {"": ""}
        for own, part in inner.items():
            for leaf in ("weight", "bias"):
                key = ".".join(filter(None, (its, part, leaf)))
                if key in tensors:
                    names[".".join(filter(None, (module, own, leaf)))] = key
    if odd := sorted(tensors.keys() - set(names.values())):
        raise ValueError(f"unknown {odd[0]} (and {len(odd) - 1} more)")
    return {own: tensors[its].clone() for own, its in names.items()}
