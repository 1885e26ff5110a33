"""Convert the released EDM pickles to config.json and safetensors; nothing in them is executed.

    python -m genmodels.importers edm-cifar10-32x32-cond-vp.pkl out=models/edm_cifar10 data=cifar10

Handled: SongUNet and DhariwalUNet under EDMPrecond, VPPrecond, VEPrecond and iDDPMPrecond, and
EDM2's UNet under Precond, of pixels and of latents (DDO's files have these layouts too). The files
are read by inert_pickle.py beside this one; the command is in released.py. The weights keep the
licence they were released under (CC BY-NC-SA 4.0, non-commercial).
"""

import math
import re
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from genmodels.checkpoint.exports import check_new, write_export
from genmodels.checkpoint.inert_pickle import Array, Record, load_pickle
from genmodels.checkpoint.models import build
from genmodels.config import to_plain
from genmodels.config.schema import EDM2_VAE, VAEConfig
from genmodels.networks.edm2_unet import (
    BALANCE,
    LABEL_BALANCE,
    LARGEST,
    EDM2UNet,
    EDM2UNetConfig,
    UnitUncertainty,
)
from genmodels.networks.edm_unet import FAMILIES, EDMUNet, EDMUNetConfig

PRECONDITIONINGS = {
    "EDMPrecond": "edm",
    "VPPrecond": "vp",
    "VEPrecond": "ve",
    "iDDPMPrecond": "iddpm",
}
EDM2 = "Precond"  # the class of EDM2's preconditioned network
# Attributes of the released preconditioners that ours have as constants. A file that differs was
# not made by the released code, and would be denoised wrongly.
_CONSTANTS: dict[str, dict[str, float]] = {
    "edm": {},
    "vp": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    "ve": {"sigma_min": 0.02, "sigma_max": 100},
    "iddpm": {"C_1": 0.001, "C_2": 0.008, "M": 1000},
}
# What EDM2's blocks have as attributes and ours as constants.
_EDM2_BLOCK = {
    "res_balance": BALANCE,
    "attn_balance": BALANCE,
    "clip_act": LARGEST,
    "resample_filter": [1, 1],
}
_LICENCE = (
    "CC BY-NC-SA 4.0 (NVIDIA, non-commercial) if it is one of the weights released with EDM, EDM2 "
    "or DDO"
)


def convert(
    path: Path | str, out: Path | str, *, data: str = "imagefolder", key: str = "ema"
) -> Path:
    """Write a released pickle as a folder that sample.py, evaluate.py and init= take; return it.

    Args:
        path: the pickle.
        out: folder to make; must not exist.
        data: name of the data it was trained on, where genmodels.data knows them.
        key: which network of the file.

    Raises:
        ValueError: see read_released; or `out` exists.
    """
    out = Path(out)
    check_new(out)
    model = load_released(path, data=data, key=key)
    cfg = model.cfg
    kind = cfg.network.kind if cfg.network.name == "edm_unet" else cfg.network.name
    published = "2206.00364" if cfg.network.name == "edm_unet" else "2312.02696"
    card = f"""---
library_name: genmodels
tags: [image-generation, edm]
---
# {out.name}

Converted from {Path(path).name} ({kind}, preconditioning {cfg.method.precond}) by
genmodels.importers.

- Licence of the weights: {_LICENCE}.
{_decoded_by(cfg.data.vae)}- Reference: Karras et al., arXiv {published}.

```
genmodels sample {out.name} num=64 steps={cfg.method.steps} noise=cuda out=samples
```
noise=cuda draws the images of the seeds published for GPU runs.
"""
    return write_export(model, out, card)


def _decoded_by(vae: VAEConfig) -> str:
    """Return what a card says of latents."""
    return f"- It makes latents, which the VAE {vae.name} decodes.\n" if vae.mean else ""


def load_released(path: Path | str, *, data: str = "imagefolder", key: str = "ema") -> Any:
    """Return the EDM method with the weights of a released pickle; arguments as for convert."""
    spec, tensors = read_released(path, key)
    vae = spec.get("vae")
    if vae is not None:
        if data not in ("imagefolder", "latents"):
            raise ValueError(f"data={data}: '{key}' was trained on latents; leave it out")
        data = "latents"
    size, classes = spec["shape"][1], spec["classes"]
    edm2 = spec["network"]["name"] == "edm2_unet"
    steps = 32 if edm2 else 18 if size < 64 else 40
    plain: dict[str, Any] = {
        "name": Path(path).stem,
        "data": {"name": data, "labels": classes > 0},
        "network": spec["network"],
        "method": {
            "name": "edm",
            "steps": steps,
            **spec["method"],
        },
    }
    if data == "imagefolder":
        plain["data"] |= {"resolution": size, "shape": spec["shape"], "classes": classes}
    if vae is not None:
        plain["data"] |= {"vae": vae, "shape": spec["shape"], "classes": classes}
    model = build([plain])
    if edm2:
        for part, prefix in ((model.net.net, "unet."), (model.uncertainty, "logvar_")):
            part.load_state_dict(_below(tensors, prefix))
        return model.eval()
    model.net.net.load_state_dict(state_from_released(model.net.net, tensors, size))
    if "levels" in spec:
        model.net.levels.copy_(spec["levels"])
    return model.eval()


def read_released(
    path: Path | str, key: str = "ema"
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return (spec, tensors) of a released EDM pickle.

    Args:
        path: the pickle.
        key: which of its networks.

    Returns:
        spec: {"network": fields of EDMUNetConfig, "method": {"precond", "sigma_data",
            "label_dropout"}, "shape": [C, H, W], "classes": int} and, for iddpm, "levels". Of
            EDM2 those of EDM2UNetConfig, and "uncertainty" in place of "label_dropout"; of latents
            "vae", the fields of VAEConfig.
        tensors: the raw network's tensors under their released names, float32; of EDM2 those of
            the preconditioned network, whose u is logvar_*.

    Raises:
        ValueError: see load_pickle; or a network that is not one of EDM's.
    """
    content = load_pickle(path)
    net = dict.get(content, key) if isinstance(content, dict) else None
    known = (*PRECONDITIONINGS, EDM2)
    if not isinstance(net, Record) or net.name not in known:
        kind = ascii(net.name)[:100] if isinstance(net, Record) else type(net).__name__
        raise ValueError(f"{path}: '{key}' must be one of {', '.join(known)}, found {kind}")
    try:
        if net.name == EDM2:
            spec, tensors = _specify_edm2(net)
            if vae := _specify_vae(content.get("encoder"), spec["shape"]):
                spec["vae"] = vae
            return spec, tensors
        return _specify(net, PRECONDITIONINGS[net.name])
    except Exception as error:  # whatever a hostile file's tensors and names may trip over
        raise ValueError(f"{path}: '{key}' is not an EDM network: {ascii(error)[:200]}") from error


def _specify(net: Record, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return (spec, tensors) of the record of a preconditioned network."""
    model = net.state["_modules"]["model"]
    if model.name not in ("SongUNet", "DhariwalUNet"):
        raise ValueError(f"its model must be a SongUNet or DhariwalUNet, found {model.name}")
    tensors: dict[str, torch.Tensor] = {}
    dropout = [0.0]
    _collect(model, "", tensors, dropout, set())
    filters = {key: tensors.pop(key) for key in [*tensors] if key.endswith("resample_filter")}
    spec = _architecture(model.name, tensors)
    _check_filters(filters, spec["network"]["kind"])
    spec["network"]["dropout"] = max(dropout)
    for name, value in _CONSTANTS[kind].items():
        if net.state[name] != value:
            raise ValueError(f"{name} must be {value}, found {reprlib.repr(net.state[name])}")
    with torch.device("meta"):  # tensors of the wrong shapes are found before anything is allocated
        net_on_meta = EDMUNet(EDMUNetConfig(**spec["network"]), spec["shape"], spec["classes"])
    state_from_released(net_on_meta, tensors, spec["shape"][1])
    spec["method"] = {"precond": kind, "sigma_data": float(net.state.get("sigma_data", 0.5))}
    spec["method"]["label_dropout"] = float(model.state.get("label_dropout", 0))
    if kind == "iddpm":
        spec["levels"] = net.state["_buffers"]["u"].value[:-1]  # the last one is 0
    return spec, tensors


def _specify_edm2(net: Record) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return (spec, tensors) of the record of EDM2's preconditioned network."""
    tensors: dict[str, torch.Tensor] = {}
    dropout = [0.0]
    _collect(net, "", tensors, dropout, set())
    inner = _below(tensors, "unet.")
    (stem,) = [key for key in inner if re.fullmatch(r"enc\.\d+x\d+_conv\.weight", key)]
    size = int(stem.removeprefix("enc.").partition("x")[0])
    channels, colours = inner[stem].shape[0], inner[stem].shape[1] - 1  # and one channel of ones
    multipliers, attention, res = [], [], size
    while res and (key := f"enc.{res}x{res}_block0.conv_res0.weight") in inner:
        multipliers.append(inner[key].shape[0] // channels)
        if f"enc.{res}x{res}_block0.attn_qkv.weight" in inner:
            attention.append(res)
        res //= 2
    network: dict[str, Any] = {
        "name": "edm2_unet",
        "channels": channels,
        "multipliers": multipliers,
        "blocks": sum(f"enc.{size}x{size}_block{i}.conv_res0.weight" in inner for i in range(100)),
        "attention": attention,
        "dropout": max(dropout),
    }
    shape = [colours, size, size]
    classes = inner["emb_label.weight"].shape[1] if "emb_label.weight" in inner else 0
    with torch.device("meta"):
        ours = EDM2UNet(EDM2UNetConfig(**network), shape, classes)
        uncertainty = UnitUncertainty()
    expected = {f"unet.{key}": value for key, value in ours.state_dict().items()}
    expected |= {f"logvar_{key}": value for key, value in uncertainty.state_dict().items()}
    _check_shapes(expected, tensors)
    unet = net.state["_modules"]["unet"].state
    _check_values("unet", unet, {"label_balance": LABEL_BALANCE, "concat_balance": 0.5})
    for part in ("enc", "dec"):
        for name, block in unet["_modules"][part].state["_modules"].items():
            if name.endswith("_conv"):
                continue
            module = getattr(ours, part)[name]
            heads = module.heads if module.attn_qkv is not None else 0
            _check_values(f"{part}.{name}", block.state, _EDM2_BLOCK | {"num_heads": heads})
    method = {"precond": "edm", "sigma_data": float(net.state["sigma_data"]), "uncertainty": True}
    return {"network": network, "method": method, "shape": shape, "classes": classes}, tensors


def _specify_vae(encoder: Any, shape: Sequence[int]) -> dict[str, Any]:
    """Return the fields of VAEConfig that an encoder's record tells, {} of one of pictures.

    The encoder gives the network z * scale + bias of the VAE's latents z.
    """
    if encoder is None:
        if shape[0] in (1, 3):
            return {}
        warnings.warn(
            f"the file has latents of {shape[0]} channels and says of no encoder: "
            f"{EDM2_VAE.name} with EDM2's statistics is taken",
            stacklevel=4,
        )
        found = EDM2_VAE
    elif encoder.name == "StandardRGBEncoder":
        return {}
    elif encoder.name == "StabilityVAEEncoder":
        scale, bias = (encoder.state[name].value.astype(float) for name in ("scale", "bias"))
        name = encoder.state["vae_name"]
        if not isinstance(name, str) or len(name) > 200:
            raise ValueError("vae_name of the encoder is no name")
        # Rounding of float32 is taken off again: 5.81 is the same scale as 5.8099999.
        mean, std = ([float(f"{v:.7g}") for v in row] for row in (-bias / scale, 0.5 / scale))
        found = VAEConfig(name=name, pixels="0..1", mean=mean, std=std)
    else:
        raise ValueError(f"its encoder must be of pixels or of the Stability VAE: {encoder.name}")
    if len(found.mean) != shape[0]:
        raise ValueError(f"its encoder is of {len(found.mean)} channels, the network {shape[0]}")
    return to_plain(found)


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def _check_shapes(
    expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Raise ValueError unless the tensors have the names and shapes expected."""
    if set(expected) != set(tensors):
        missing, extra = (
            sorted(a.keys() - b.keys())[:3] for a, b in ((expected, tensors), (tensors, expected))
        )
        raise ValueError(f"the network's tensors do not fit: missing {missing}, unknown {extra}")
    for key, like in expected.items():
        shape = tuple(tensors[key].shape)
        if shape != tuple(like.shape):
            raise ValueError(f"{key} must be {tuple(like.shape)}, got {shape}")


def _check_values(name: str, state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ValueError unless a module's attributes have the values that ours has as constants."""
    for key, value in expected.items():
        found = state[key]
        if (list(found) if isinstance(value, list) else found) != value:
            raise ValueError(f"{name}.{key} must be {value}, found {reprlib.repr(found)}")


def _collect(
    record: Record,
    prefix: str,
    tensors: dict[str, torch.Tensor],
    dropout: list[float],
    seen: set[int],
) -> None:
    """Put the tensors below a record into `tensors` under their dotted names."""
    if id(record) in seen:  # a file may nest a module in itself
        raise ValueError(f"module {prefix} occurs twice")
    seen.add(id(record))
    if isinstance(record.state.get("dropout"), (int, float)):
        dropout.append(float(record.state["dropout"]))
    for group in ("_parameters", "_buffers"):
        for name, tensor in (record.state.get(group) or {}).items():
            if isinstance(tensor, Array):
                tensors[f"{prefix}{name}"] = tensor.value.float()
    for name, child in (record.state.get("_modules") or {}).items():
        if isinstance(child, Record):
            _collect(child, f"{prefix}{name}.", tensors, dropout, seen)


def _check_filters(filters: Mapping[str, torch.Tensor], kind: str) -> None:
    """Raise ValueError unless every resampling filter is the one that this kind is built with."""
    taps = torch.tensor(FAMILIES[kind].filter, dtype=torch.float32)
    expected = torch.outer(taps, taps) / taps.sum() ** 2
    for key, weight in filters.items():
        if weight.shape[-2:] != expected.shape or not torch.allclose(weight, expected, atol=1e-6):
            raise ValueError(f"{key} must be the filter {taps.int().tolist()} of {kind}")


def _architecture(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the spec that names and shapes of the tensors tell."""
    stems = [key for key in tensors if re.fullmatch(r"enc\.\d+x\d+_conv\.weight", key)]
    size = int(stems[0].removeprefix("enc.").partition("x")[0])
    channels, colours = tensors[stems[0]].shape[:2]
    multipliers, attention, res, blocks = [], [], size, 0
    while res and f"enc.{res}x{res}_block0.conv0.weight" in tensors:
        multipliers.append(tensors[f"enc.{res}x{res}_block0.conv0.weight"].shape[0] // channels)
        blocks = sum(f"enc.{res}x{res}_block{i}.conv0.weight" in tensors for i in range(100))
        if f"enc.{res}x{res}_block0.qkv.weight" in tensors:
            attention.append(res)
        res = res // 2
    adm, label = name == "DhariwalUNet", tensors.get("map_label.weight")
    pyramid = any("aux_residual" in key for key in tensors)
    network: dict[str, Any] = {
        "name": "edm_unet",
        "kind": "adm" if adm else "ncsnpp" if pyramid else "ddpmpp",
        "channels": channels,
        "multipliers": multipliers,
        "blocks": blocks,
        "attention": attention,
        "augment": "map_augment.weight" in tensors,
    }
    # The second half of an iDDPM network's outputs is a variance that no sampler here uses.
    output = "out_conv" if adm else f"dec.{size}x{size}_aux_conv"
    for leaf in ("weight", "bias"):
        tensors[f"{output}.{leaf}"] = tensors[f"{output}.{leaf}"][:colours]
    classes = 0 if label is None else label.shape[1]
    return {"network": network, "shape": [colours, size, size], "classes": classes}


_BLOCK = {
    "norm_in": "norm0",
    "conv_in": "conv0",
    "modulation": "affine",
    "norm_out": "norm1",
    "conv_out": "conv1",
    "shortcut": "skip",
    "attention.norm": "norm2",
    "attention.qkv": "qkv",
    "attention.proj": "proj",
}
_EMBEDDING = {
    "hidden": "map_layer0",
    "outer": "map_layer1",
    "label": "map_label",
    "augment": "map_augment",
}


def released_names(net: EDMUNet, size: int) -> dict[str, str]:
    """Return {our parameter name: released name} for an EDMUNet.

    Args:
        net: the EDMUNet.
        size: the image height it was built for; the released names count resolutions from it.
    """
    adm = net.embedding.adm
    modules = {"stem": f"enc.{size}x{size}_conv"}
    modules["norm"] = "out_norm" if adm else f"dec.{size}x{size}_aux_norm"
    modules["output"] = "out_conv" if adm else f"dec.{size}x{size}_aux_conv"
    modules.update({f"embedding.{ours}": name for ours, name in _EMBEDDING.items()})
    res = size
    blocks = {}
    for part, prefix in (
        (net.encoder, "encoder"),
        (net.middle, "middle"),
        (net.decoder, "decoder"),
    ):
        count = 0
        for index, block in enumerate(part):
            if block.resample is not None:
                down = prefix == "encoder"
                res, count = (res // 2, 0) if down else (res * 2, 0)
                name = f"{res}x{res}_{'down' if down else 'up'}"
            else:
                name, count = (
                    f"{res}x{res}_{'in' if prefix == 'middle' else 'block'}{count}",
                    count + 1,
                )
            blocks[f"{prefix}.{index}"] = f"{'enc' if prefix == 'encoder' else 'dec'}.{name}"
    for ours, released in blocks.items():
        modules.update({f"{ours}.{part}": f"{released}.{name}" for part, name in _BLOCK.items()})
    names = {}
    for key in net.state_dict():
        module, leaf = key.rsplit(".", 1)
        if module.startswith("pyramid"):
            res = size >> (int(module.split(".")[1]) + 1)
            names[key] = f"enc.{res}x{res}_aux_residual.{leaf}"
        elif key == "embedding.frequencies":
            names[key] = "map_noise.freqs"
        else:
            names[key] = f"{modules[module]}.{leaf}"
    return names


def state_from_released(
    net: EDMUNet, tensors: Mapping[str, torch.Tensor], size: int
) -> dict[str, torch.Tensor]:
    """Return the state dict of an EDMUNet from tensors under their released names.

    Args:
        net: the EDMUNet, on any device (meta will do).
        tensors: {released name: tensor}.
        size: the image height the network was built for.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    names = released_names(net, size)
    if set(names.values()) != set(tensors):
        missing = sorted(set(names.values()) - set(tensors))[:3]
        extra = sorted(set(tensors) - set(names.values()))[:3]
        raise ValueError(f"the network's tensors do not fit: missing {missing}, unknown {extra}")
    state = {}
    for key, like in net.state_dict().items():
        tensor = tensors[names[key]]
        if tensor.shape != like.shape:
            raise ValueError(f"{names[key]} must be {tuple(like.shape)}, got {tuple(tensor.shape)}")
        if ".attention.qkv." in key:  # released rows are (head, channel, q k v), see Attention
            attention: Any = net.get_submodule(key.rsplit(".", 2)[0])
            rows = tensor.reshape(attention.heads, -1, 3, *tensor.shape[1:])
            tensor = rows.movedim(2, 0).reshape(tensor.shape)
        if key == "embedding.frequencies":
            tensor = 2 * math.pi * tensor
        state[key] = tensor.clone()
    return state
