"""Files laid out as CDRL's released checkpoints, made from a description of their layout.

Names and order of the tensors are those of the released classes (energy "pi", initializer "p", both
wrapped for several processes); weights are sines of their positions, so that whoever has the
classes can fill them alike. The figures of the classes themselves are in FIGURES.
"""

import math

import torch
import torch.nn.functional as F

SIZES = {"unconditional": {"classes": 0}, "conditional": {"classes": 3}}  # kind -> of content()
SNR = (2.0, -1.0)
LABELS = (0, 2)  # as theirs: 0 is "no label"


def sines(shape, k, frequency=0.7):
    """Return float64 sines of a tensor's positions, the k-th tensor's."""
    count = math.prod(shape)
    return torch.sin(frequency * torch.arange(count, dtype=torch.float64) + k).reshape(shape)


def layer(name, shape, spectral=False, bias=True):
    """Return [(name, shape)] of a convolution or linear layer, in their order."""
    if spectral:
        rest = [("weight_orig", shape), ("weight_u", shape[:1]), ("weight_v", None)]
        parts = [("bias", shape[:1]), *rest]
    else:
        parts = [("weight", shape), *([("bias", shape[:1])] if bias else [])]
    return [(f"{name}.{part}", size) for part, size in parts]


def energy(channels=8, multipliers=(1, 2), blocks=2, classes=0):
    """Return [(name, shape)] of the energy's state dict."""
    dim, rows, width = 4 * channels, [], channels
    rows += layer("temb_map1", (dim, channels), True) + layer("temb_map2", (dim, dim), True)
    rows += layer("y_map", (dim, classes + 1), True) if classes else []
    rows += layer("module_list.0", (channels, 3, 3, 3), True)
    number = 1
    for level, multiplier in enumerate(multipliers):
        for _ in range(blocks):
            name, outputs = f"module_list.{number}", channels * multiplier
            rows.append((f"{name}.g", (1, outputs, 1, 1)))
            rows += layer(f"{name}.conv1", (outputs, width, 3, 3), True)
            rows += layer(f"{name}.conv2", (outputs, outputs, 3, 3), True)
            rows += layer(f"{name}.temb_map", (outputs, dim), True)
            if width != outputs:
                rows += layer(f"{name}.short_cut", (outputs, width, 3, 3), True)
            number, width = number + 1, outputs
        number += level < len(multipliers) - 1  # a pooling
    return rows + layer("temb_final", (width, dim), bias=False)


def initializer(channels=32, levels=3, blocks=1, attention=(16, 8), classes=0, size=32):
    """Return [(name, shape)] of the initializer's state dict; all levels have the same width."""
    dim, rows = 4 * channels, []

    def block(name, inputs):
        for norm, width in (("norm1", inputs), ("norm2", channels)):
            rows.extend(layer(f"{name}.{norm}", (width,)))
        rows.extend(layer(f"{name}.conv1", (channels, inputs, 3, 3)))
        rows.extend(layer(f"{name}.conv2", (channels, channels, 3, 3)))
        rows.extend(layer(f"{name}.mlp.1", (2 * channels, dim)))
        if inputs != channels:
            rows.extend(layer(f"{name}.res_conv", (channels, inputs, 1, 1)))

    def attend(name):
        rows.extend(layer(f"{name}.norm", (channels,)))
        rows.extend(layer(f"{name}.to_qkv", (3 * channels, channels, 1, 1)))
        rows.extend(layer(f"{name}.to_out", (channels, channels, 1, 1)))

    def level(name, count, inputs, attended, resampled):
        number = 0
        for _ in range(count):
            block(f"{name}.{number}", inputs)
            number += 1
            if attended:
                attend(f"{name}.{number}")
                number += 1
        if resampled:
            block(f"{name}.{number}", channels)

    rows += layer("init_conv", (channels, 3, 3, 3))
    rows += layer("time_mlp.1", (dim, channels)) + layer("time_mlp.3", (dim, dim))
    rows += layer("y_mlp.0", (dim, classes + 1)) if classes else []
    for k in range(levels):
        level(f"downs.{k}", blocks, channels, size >> k in attention, k < levels - 1)
    for k in range(levels):
        attended = size >> (levels - 1 - k) in attention
        level(f"ups.{k}", blocks + 1, 2 * channels, attended, k < levels - 1)
    block("mid_block1", channels)
    attend("mid_attn")
    block("mid_block2", channels)
    return rows + layer("norm", (channels,)) + layer("final_conv", (3, channels, 3, 3))


def filled(rows):
    """Return {name: tensor} of the rows: weights, and u and v of one power iteration of them."""
    state, k = {}, 0
    for name, shape in rows:
        part = name.rpartition(".")[2]
        if part in ("weight_u", "weight_v"):
            weight = state[name.replace(part, "weight_orig")].double().flatten(1)
            v = F.normalize(weight.T @ sines(weight.shape[:1], k, 1.1), dim=0)
            u = F.normalize(weight @ v, dim=0)
            state[name] = (u if part == "weight_u" else v).float()
            continue
        if len(shape) > 1:
            value = 0.3 * sines(shape, k) / math.sqrt(math.prod(shape[1:]))
        else:
            value = 0.1 * sines(shape, k) + ("norm" in name and part == "weight")
        state[name], k = value.float(), k + 1
    return state


def content(classes=0):
    """Return what a file of theirs holds; its averages differ a little from the weights."""
    found = {}
    for name, rows in (("pi", energy(classes=classes)), ("p", initializer(classes=classes))):
        state = filled(rows)
        weights = {k: v for k, v in state.items() if not k.endswith(("weight_u", "weight_v"))}
        average = [v * (1 + 0.02 * sines(v.shape, k, 0.3)) for k, v in enumerate(weights.values())]
        found[f"{name}_state_dict"] = {f"module.{k}": v for k, v in state.items()}
        found[f"{name}_ema_state_dict"] = {
            "decay": 0.9999,
            "num_updates": 400000,
            "shadow_params": [value.float() for value in average],
            "collected_params": None,
        }
        found[f"{name}_optimizer"] = {
            "state": {0: {"step": torch.tensor(400000.0), "exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0, 1]}],
        }
        found[f"{name}_lr_scheduler"] = {"base_lrs": [1e-4], "last_epoch": 9, "lr_lambdas": [None]}
    return found


def inputs():
    """Return x (2, 3, 32, 32)."""
    return sines((2, 3, 32, 32), 0, 1.3).float()


def numbers(text):
    """Return the numbers of a text."""
    return [float(word) for word in text.split()]


# What the released classes (commit d09d55a, torch 2.15.0) gave for content() and inputs(): f of the
# two images at the two SNR, then with these exchanged; every 617th number of g(x) - x.
FIGURES = {
    ("unconditional", "raw"): (
        [-0.50731426, -0.37859833, -0.37546527, -0.51126969],
        numbers(
            "0.0843689 -0.0587128 0.0725436 0.0386653 0.0692014 0.481391 -0.0614028 "
            "-0.0243632 0.0146278 0.0709442"
        ),
    ),
    ("unconditional", "ema"): (
        [-0.51145327, -0.37795454, -0.37493911, -0.5151999],
        numbers(
            "0.0806669 -0.0605676 0.33297 0.0231328 0.0691028 0.63211 -0.0603148 "
            "0.0328732 0.0181878 0.0736315"
        ),
    ),
    ("conditional", "raw"): (
        [0.18489909, 0.18564403, 0.22162402, 0.25942433],
        numbers(
            "-0.248761 0.0975747 0.0542982 -0.076717 0.0359305 -1.9064 0.0972224 "
            "0.11052 0.115291 0.0257406"
        ),
    ),
    ("conditional", "ema"): (
        [0.18983018, 0.19627964, 0.22850895, 0.2700195],
        numbers(
            "-0.245372 0.0996016 0.0690823 -0.0857919 0.0365658 -1.91442 0.0992834 "
            "0.112718 0.121377 0.0262013"
        ),
    ),
}
