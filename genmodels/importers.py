"""Convert the released EDM pickles to config.json and safetensors; nothing in them is executed.

    python -m genmodels.importers edm-cifar10-32x32-cond-vp.pkl out=models/edm_cifar10

Handled: SongUNet and DhariwalUNet under EDMPrecond, VPPrecond, VEPrecond and iDDPMPrecond. The
files are read by genmodels/inert_pickle.py. The weights keep the licence they were released under
(CC BY-NC-SA 4.0, non-commercial).
"""

import math
import re

import torch

from genmodels.inert_pickle import Record, load_pickle

__all__ = ["read_released", "released_names", "state_from_released"]

PRECONDITIONINGS = {
    "EDMPrecond": "edm",
    "VPPrecond": "vp",
    "VEPrecond": "ve",
    "iDDPMPrecond": "iddpm",
}
_CONSTANTS = {  # attributes of the released preconditioners -> keys of ours
    "edm": {"sigma_data": "sigma_data"},
    "vp": {"beta_d": "beta_d", "beta_min": "beta_min"},
    "ve": {"sigma_min": "sigma_min", "sigma_max": "sigma_max"},
    "iddpm": {"C_1": "c1", "C_2": "c2"},
}


def read_released(path, key="ema"):
    """Return (spec, tensors) of a released EDM pickle.

    Args:
        path: the pickle.
        key: which of its networks.

    Returns:
        spec: {"network": fields of EDMUNetConfig, "precond": {"kind": ..., constants},
            "shape": [C, H, W], "classes": int, "outputs": channels of the raw network}.
        tensors: the raw network's tensors under their released names, float32.

    Raises:
        ValueError: see load_pickle; or a network that is not one of EDM's.
    """
    content = load_pickle(path)
    net = content.get(key) if isinstance(content, dict) else None
    if not isinstance(net, Record) or net.name not in PRECONDITIONINGS:
        found = net.name if isinstance(net, Record) else type(net).__name__
        raise ValueError(
            f"{path}: '{key}' must be one of {', '.join(PRECONDITIONINGS)}, found {found}"
        )
    try:
        return _specify(net, PRECONDITIONINGS[net.name])
    except Exception as error:  # whatever a hostile file's tensors and names may trip over
        raise ValueError(f"{path}: '{key}' is not an EDM network: {error!r}"[:300]) from error


def _specify(net, kind):
    """Return (spec, tensors) of the record of a preconditioned network."""
    model = net.state["_modules"]["model"]
    if model.name not in ("SongUNet", "DhariwalUNet"):
        raise ValueError(f"its model must be a SongUNet or DhariwalUNet, found {model.name}")
    tensors, dropout = {}, [0.0]
    _collect(model, "", tensors, dropout, set())
    spec = _architecture(model.name, tensors)
    spec["network"]["dropout"] = max(dropout)
    constants = {ours: float(net.state[name]) for name, ours in _CONSTANTS[kind].items()}
    spec["precond"] = {"kind": kind, **constants}
    return spec, tensors


def _collect(record, prefix, tensors, dropout, seen):
    """Put the tensors below a record into `tensors` under their dotted names."""
    if id(record) in seen:  # a file may nest a module in itself
        raise ValueError(f"module {prefix} occurs twice")
    seen.add(id(record))
    if isinstance(record.state.get("dropout"), (int, float)):
        dropout.append(float(record.state["dropout"]))
    for group in ("_parameters", "_buffers"):
        for name, tensor in (record.state.get(group) or {}).items():
            if isinstance(tensor, torch.Tensor) and name != "resample_filter":
                tensors[f"{prefix}{name}"] = tensor.float()
    for name, child in (record.state.get("_modules") or {}).items():
        if isinstance(child, Record):
            _collect(child, f"{prefix}{name}.", tensors, dropout, seen)


def _architecture(name, tensors):
    """Return the spec that names and shapes of the tensors tell."""
    stems = [key for key in tensors if re.fullmatch(r"enc\.\d+x\d+_conv\.weight", key)]
    size = int(re.search(r"\d+", stems[0])[0])
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
    network = {
        "name": "edm_unet",
        "kind": "adm" if adm else "ncsnpp" if pyramid else "ddpmpp",
        "channels": channels,
        "multipliers": multipliers,
        "blocks": blocks,
        "attention": attention,
        "augment": "map_augment.weight" in tensors,
    }
    output = "out_conv.weight" if adm else f"dec.{size}x{size}_aux_conv.weight"
    return {
        "network": network,
        "shape": [colours, size, size],
        "classes": 0 if label is None else label.shape[1],
        "outputs": tensors[output].shape[0],
    }


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


def released_names(net, size):
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


def state_from_released(net, tensors, size):
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
            heads = net.get_submodule(key.rsplit(".", 2)[0]).heads
            rows = tensor.reshape(heads, -1, 3, *tensor.shape[1:])
            tensor = rows.movedim(2, 0).reshape(tensor.shape)
        if key == "embedding.frequencies":
            tensor = 2 * math.pi * tensor
        state[key] = tensor.clone()
    return state
