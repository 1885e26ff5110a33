"""The released EDM denoisers, generator and pickles, rebuilt for the tests from their description.

`released_pickle` packs the tensors of a network (edm_networks.py) into a file of the released
format. Nothing here is shared with the package.
"""

import math
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import torch

from tests.helpers.edm_networks import Weights, dhariwal, song


def iddpm_table():
    levels = [0.0]
    bar = [math.sin(0.5 * math.pi * j / 1000 / 1.008) ** 2 for j in range(1001)]
    for j in range(1000, 0, -1):
        levels.insert(0, math.sqrt((levels[0] ** 2 + 1) / max(bar[j - 1] / bar[j], 1e-3) - 1))
    return levels


def denoiser(w, cfg, precond, dtype=torch.float64):
    """D(x, sigma, labels, augment) of a released model; sigma is one number."""
    network = dhariwal if cfg["kind"] == "adm" else song
    table = np.array(iddpm_table())

    def denoise(x, sigma, labels=None, augment=None):
        sigma = float(sigma)
        if precond == "EDMPrecond":
            total = sigma**2 + 0.25
            skip, out, scale = 0.25 / total, sigma * 0.5 / total**0.5, total**-0.5
            noise = math.log(sigma) / 4
        elif precond == "VPPrecond":
            skip, out, scale = 1, -sigma, (sigma**2 + 1) ** -0.5
            # beta_d t^2 / 2 + beta_min t = ln(1 + sigma^2), by the other root formula
            c = math.log(1 + sigma**2)
            noise = 999 * 2 * c / (0.1 + math.sqrt(0.01 + 2 * 19.9 * c))
        elif precond == "VEPrecond":
            skip, out, scale, noise = 1, sigma, 1, math.log(sigma / 2)
        else:
            skip, out, scale = 1, -sigma, (sigma**2 + 1) ** -0.5
            noise = 999 - int(np.abs(table - sigma).argmin())
        noise = torch.full((len(x),), noise, dtype=dtype)
        raw = network(w, cfg, x.to(dtype) * scale, noise, labels, augment)
        return skip * x + out * raw[:, :3]

    return denoise


RANGES = {
    "EDMPrecond": (0, math.inf),
    "VPPrecond": (1e-3, 152.0),
    "VEPrecond": (0.02, 100),
    "iDDPMPrecond": (iddpm_table()[-2], iddpm_table()[0]),
}


def released_images(*args, **options):
    """Bytes (N, H, W, 3) and classes as the released generator makes them, image by image."""
    states, classes = released_states(*args, **options)
    pixels = (states * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy(), classes


def released_states(w, cfg, precond, seeds, steps, churn=0.0, low=0.0, high=math.inf, noise=1.0):
    """Images before they become bytes, float64 (N, 3, H, W), and classes."""
    denoise = denoiser(w, cfg, precond)
    smallest, largest = RANGES[precond]
    ends = max(0.002, smallest) ** (1 / 7), min(80, largest) ** (1 / 7)
    times = [(ends[1] + i / (steps - 1) * (ends[0] - ends[1])) ** 7 for i in range(steps)]
    known = float
    if precond == "iDDPMPrecond":
        table = np.array(iddpm_table())
        known = lambda t: float(table[np.abs(table - t).argmin()])  # noqa: E731
    times = [known(t) for t in times] + [0.0]
    images, classes = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed % 2**32)
        x = torch.randn(1, 3, cfg["size"], cfg["size"], generator=generator).double() * times[0]
        label = None
        if cfg["classes"]:
            label = torch.randint(cfg["classes"], (1,), generator=generator)
            classes.append(int(label))
        for i in range(steps):
            t, after = times[i], times[i + 1]
            fresh = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            up = t
            if churn and low <= t <= high:
                up = known(t * (1 + min(churn / steps, math.sqrt(2) - 1)))
            x = x + math.sqrt(max(up**2 - t**2, 0)) * noise * fresh
            d = (x - denoise(x, up, label)) / up
            y = x + (after - up) * d
            if after:
                y = x + (after - up) * (d + (y - denoise(y, after, label)) / after) / 2
            x = y
        images.append(x[0])
    return torch.stack(images), classes


# ------------------------------------------------------------------------------------------------
# The file format: modules pickled as a call of torch_utils.persistence, with their source text.


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the importer must never call this")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent(torch.nn.Module):
    """A module that pickles as the released ones do."""

    released_class = ""

    def __reduce__(self):
        source = "raise SystemExit('embedded source was run')"
        meta = dict(type="class", version=6, module_src=source, class_name=self.released_class)
        return _reconstruct_persistent_obj, ({**meta, "state": dict(self.__dict__)},)


def persistent(name, args=(), **attributes):
    module = type(name, (Persistent,), {"released_class": name})()
    module.__dict__.update(attributes, _init_args=args, _init_kwargs=dict(attributes))
    return module


def module_tree(name, tensors, buffers=("freqs", "resample_filter"), **attributes):
    """Nest tensors named a.b.c into Persistent modules; enc and dec become ModuleDicts."""
    root = persistent(name, **attributes)
    for path, tensor in tensors.items():
        *parents, leaf = path.split(".")
        node = root
        for parent in parents:
            children = node._modules
            if parent not in children:
                container = torch.nn.ModuleDict() if parent in ("enc", "dec") else None
                children[parent] = container if container is not None else persistent("UNetBlock")
            node = children[parent]
        if leaf in buffers:
            node.register_buffer(leaf, tensor)
        else:
            node.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
    return root


def released_pickle(weights, cfg, precond="EDMPrecond", dropout=0.13, taps=None, **attributes):
    """Return the bytes of a released-format pickle around the named tensors."""
    tensors = OrderedDict(weights)
    taps = torch.tensor(taps or ([1, 3, 3, 1] if cfg["kind"] == "ncsnpp" else [1, 1])).float()
    for name in list(tensors):
        if name.endswith(("_down.conv0.weight", "_up.conv0.weight")):
            stem = name.removesuffix(".weight")
            kernel = taps[:, None] * taps / taps.sum() ** 2
            tensors[f"{stem}.resample_filter"] = kernel[None, None]
    inner = "DhariwalUNet" if cfg["kind"] == "adm" else "SongUNet"
    model = module_tree(inner, tensors, label_dropout=0.2, img_resolution=cfg["size"])
    for module in model.modules():
        if "conv0" in module._modules:
            module.__dict__.update(dropout=dropout, skip_scale=np.sqrt(0.5))
    net = persistent(
        precond,
        img_resolution=cfg["size"],
        img_channels=3,
        label_dim=cfg["classes"],
        use_fp16=True,
        **{"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5, **attributes},
    )
    buffers = {name: net.__dict__.pop(name) for name in ("u",) if name in net.__dict__}
    for name, tensor in buffers.items():
        net._init_kwargs.pop(name)
        net.register_buffer(name, tensor)
    net._modules["model"] = model
    content = dict(ema=net, loss_fn=persistent("EDMLoss", P_mean=-1.2), augment_pipe=None)
    content["dataset_kwargs"] = dict(class_name="training.dataset.ImageFolderDataset", path="x.zip")
    return dumps(content)


def dumps(content):
    """Pickle with the released loader's module importable for as long as it takes."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules.update({"torch_utils": package, "torch_utils.persistence": module})
    try:
        return pickle.dumps(content)
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]


def released(kind, precond="EDMPrecond", **more):
    """(cfg, weights, bytes of the pickle) of a small released network with random weights."""
    cfg = dict(kind=kind, size=16, channels=64 if kind == "adm" else 16, multipliers=[1, 2])
    cfg.update(blocks=2, attention=[8], classes=4, augment=kind != "adm")
    cfg["outputs"] = 6 if precond == "iDDPMPrecond" else 3  # the noise and a variance
    weights = Weights()
    forward = dhariwal if kind == "adm" else song
    with torch.no_grad():
        forward(weights, cfg, torch.zeros(1, 3, 16, 16), torch.zeros(1))
    constants = {
        "VPPrecond": dict(beta_d=19.9, beta_min=0.1, M=1000, epsilon_t=1e-5),
        "VEPrecond": dict(sigma_min=0.02, sigma_max=100),
        "iDDPMPrecond": dict(C_1=0.001, C_2=0.008, M=1000, u=torch.tensor(iddpm_table())),
    }
    attributes = {**constants.get(precond, {}), **more}
    return cfg, weights, released_pickle(weights, cfg, precond, **attributes)


def released_edm2(tensors, size=16, channels=3, classes=4, vae=False, unet=(), **block):
    """Return the bytes of an EDM2 pickle around tensors named unet.* and logvar_*, as float16.

    Args:
        tensors: {released name: tensor}.
        size, channels, classes: of the images or latents.
        vae: whether the encoder is of latents, with its numbers in numpy arrays; a dict: with
            these attributes; None: there is no encoder.
        unet: pairs of attributes of the U-Net that differ from the released ones.
        block: attributes of its blocks that do.
    """
    halves = OrderedDict((name, tensor.half()) for name, tensor in tensors.items())
    attributes = dict(img_resolution=size, img_channels=channels, label_dim=classes)
    attributes |= dict(use_fp16=True, sigma_data=0.5)
    net = module_tree("Precond", halves, buffers=("freqs", "phases"), **attributes)
    for name, module in net.named_modules():
        if name == "unet":
            module.__dict__.update(dict(label_balance=0.5, concat_balance=0.5) | dict(unet))
        if "conv_res0" in module._modules:
            heads = 0
            for part in ("attn_qkv", "attn_proj", "conv_skip"):
                if part not in module._modules:
                    module.__dict__[part] = None
                elif part == "attn_proj":
                    heads = max(1, len(module._modules[part].weight) // 64)
            values = dict(res_balance=0.3, attn_balance=0.3, clip_act=256, dropout=0.1)
            module.__dict__.update(values | dict(resample_filter=[1, 1], num_heads=heads) | block)
    encoder = persistent("StandardRGBEncoder")
    if vae:
        scale = np.float32(0.5) / np.array([4.17, 4.62, 3.71, 3.28], np.float32)
        bias = -np.array([5.81, 3.25, 0.12, -2.15], np.float32) * scale
        numbers = dict(scale=scale, bias=bias) | ({} if vae is True else vae)
        name = numbers.pop("class_name", "StabilityVAEEncoder")
        words = dict(vae_name="stabilityai/sd-vae-ft-mse", batch_size=8, _vae=None)
        encoder = persistent(name, **(words | numbers))
    if vae is None:
        encoder = None
    content = dict(ema=net, encoder=encoder, dataset_kwargs=dict(path="x.zip"))
    return dumps(content | {"loss_fn": persistent("EDM2Loss", P_mean=-0.8)})


def write(tmp_path, data):
    path = tmp_path / "network.pkl"
    path.write_bytes(data)
    return path
