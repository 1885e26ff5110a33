"""The released EDM networks, rebuilt for the tests from their description.

`song` and `dhariwal` are functions over a table of named tensors, in the released names; calling
one with an empty `Weights` draws the tensors. Nothing here is shared with the package: resampling
is a product with explicit matrices, attention and norms are written out, in float64 if asked.
"""

import math

import torch


class Weights(dict):
    """Named tensors, drawn on first use; scale keeps activations of order one."""

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def get(self, name, *shape):
        if name not in self:
            fan = math.prod(shape[1:]) if len(shape) > 1 else 100
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            noise = torch.randn(shape, generator=self.generator) / math.sqrt(fan)
            self[name] = noise + offset
        assert self[name].shape == torch.Size(shape), name
        return self[name]


def conv(w, name, x, outputs, size, pad=None, bias=True):
    kernel = w.get(f"{name}.weight", outputs, x.shape[1], size, size)
    y = torch.conv2d(x, kernel.to(x), padding=size // 2 if pad is None else pad)
    return y + w.get(f"{name}.bias", outputs).to(x)[:, None, None] if bias else y


def linear(w, name, x, outputs, bias=True):
    y = x @ w.get(f"{name}.weight", outputs, x.shape[1]).to(x).T
    return y + w.get(f"{name}.bias", outputs).to(x) if bias else y


def norm(w, name, x, eps):
    batch, channels = x.shape[:2]
    groups = x.reshape(batch, min(32, channels // 4), -1)
    mean, var = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, unbiased=False)
    y = ((groups - mean) / (var + eps).sqrt()).reshape(x.shape)
    weight, bias = (w.get(f"{name}.{part}", channels).to(x) for part in ("weight", "bias"))
    return y * weight[:, None, None] + bias[:, None, None]


def silu(x):
    return x / (1 + (-x).exp())


def halving(size, taps, dtype, pad):
    """The matrix that pads by `pad` zeros, filters with the taps and keeps every second value."""
    taps = torch.tensor(taps, dtype=dtype) / sum(taps)
    rows = (size + 2 * pad - len(taps)) // 2 + 1
    matrix = torch.zeros(rows, size + 2 * pad, dtype=dtype)
    for row in range(rows):
        matrix[row, 2 * row : 2 * row + len(taps)] = taps
    return matrix[:, pad : pad + size]


def resampled(x, mode, taps):
    size = x.shape[-1]
    if mode == "down":
        matrix = halving(size, taps, x.dtype, (len(taps) - 1) // 2)
    else:  # doubling is the transpose of halving, times two per axis
        matrix = 2 * halving(2 * size, taps, x.dtype, (len(taps) - 1) // 2).T
    return matrix @ x @ matrix.T


def attention(w, name, x, heads, eps):
    batch, channels, height, width = x.shape
    qkv = conv(w, f"{name}.qkv", norm(w, f"{name}.norm2", x, eps), 3 * channels, 1)
    qkv = qkv.reshape(batch, heads, channels // heads, 3, height * width)
    q, k, v = qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
    logits = torch.einsum("bhcq,bhck->bhqk", q, k) / math.sqrt(channels // heads)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(x.shape)
    return conv(w, f"{name}.proj", y, channels, 1)


def block(w, name, x, emb, outputs, kind, mode="", attend=False):
    song, eps = kind != "adm", 1e-5 if kind == "adm" else 1e-6
    taps = (1, 3, 3, 1) if kind == "ncsnpp" else (1, 1)
    y = silu(norm(w, f"{name}.norm0", x, eps))
    if mode:
        x, y = resampled(x, mode, taps), resampled(y, mode, taps)
    y = conv(w, f"{name}.conv0", y, outputs, 3)
    if song:
        y = y + linear(w, f"{name}.affine", emb, outputs)[..., None, None]
        y = silu(norm(w, f"{name}.norm1", y, eps))
    else:
        both = linear(w, f"{name}.affine", emb, 2 * outputs)[..., None, None]
        y = norm(w, f"{name}.norm1", y, eps)
        y = silu(y * (both[:, :outputs] + 1) + both[:, outputs:])
    y = conv(w, f"{name}.conv1", y, outputs, 3)
    if x.shape[1] != outputs or (mode and song):
        x = conv(w, f"{name}.skip", x, outputs, 1)
    scale = math.sqrt(0.5) if song else 1.0
    x = (x + y) * scale
    if attend:
        heads = 1 if song else outputs // 64
        x = (x + attention(w, name, x, heads, eps)) * scale
    return x


def waves(noise, count, step):
    angles = noise[:, None] * torch.tensor([1e-4 ** (k / step) for k in range(count)]).to(noise)
    return angles.cos(), angles.sin()


def song(w, cfg, x, noise, labels=None, augment=None):
    """DDPM++ or NCSN++; cfg: kind, channels, multipliers, blocks, attention, classes, augment."""
    ch, fourier = cfg["channels"], cfg["kind"] == "ncsnpp"
    if fourier:
        if "map_noise.freqs" not in w:
            w["map_noise.freqs"] = 16 * torch.randn(ch, generator=w.generator)
        angles = 2 * math.pi * noise[:, None] * w["map_noise.freqs"].to(x)
        cos, sin = angles.cos(), angles.sin()
    else:
        cos, sin = waves(noise, ch // 2, ch // 2 - 1)
    emb = torch.cat([sin, cos], 1)
    width = emb.shape[1]
    if cfg["classes"]:
        one_hot = one_hots(labels, cfg["classes"], x)
        emb = emb + linear(w, "map_label", one_hot * math.sqrt(cfg["classes"]), width)
    if cfg["augment"]:
        augment = x.new_zeros(len(x), 9) if augment is None else augment.to(x)
        emb = emb + linear(w, "map_augment", augment, width, bias=False)
    emb = silu(linear(w, "map_layer0", emb, 4 * ch))
    emb = silu(linear(w, "map_layer1", emb, 4 * ch))

    def image_path(name, image, outputs):
        """3x3 conv with the padding of both kernels, the filter, every second value, the bias."""
        y = conv(w, name, image, outputs, 3, pad=2, bias=False)
        rows, columns = (halving(n, (1, 3, 3, 1), x.dtype, 0) for n in y.shape[-2:])
        y = rows @ y @ columns.T
        return y + w.get(f"{name}.bias", outputs).to(x)[:, None, None]

    x = unet(w, cfg, x, emb, False, image_path if fourier else None)
    size = cfg["size"]
    x = silu(norm(w, f"dec.{size}x{size}_aux_norm", x, 1e-6))
    return conv(w, f"dec.{size}x{size}_aux_conv", x, cfg.get("outputs", 3), 3)


def dhariwal(w, cfg, x, noise, labels=None, augment=None):
    """ADM; cfg as for song."""
    ch = cfg["channels"]
    emb = torch.cat(waves(noise, ch // 2, ch // 2), 1)
    if cfg["augment"]:
        augment = x.new_zeros(len(x), 9) if augment is None else augment.to(x)
        emb = emb + linear(w, "map_augment", augment, ch, bias=False)
    emb = linear(w, "map_layer1", silu(linear(w, "map_layer0", emb, 4 * ch)), 4 * ch)
    if cfg["classes"]:
        one_hot = one_hots(labels, cfg["classes"], x)
        emb = emb + linear(w, "map_label", one_hot, 4 * ch, bias=False)
    x = unet(w, cfg, x, silu(emb), True, None)
    return conv(w, "out_conv", silu(norm(w, "out_norm", x, 1e-5)), cfg.get("outputs", 3), 3)


def one_hots(labels, classes, x):
    rows = x.new_zeros(len(x), classes)
    for row, label in zip(rows, [-1] * len(x) if labels is None else labels.tolist()):
        if label >= 0:
            row[label] = 1
    return rows


def unet(w, cfg, x, emb, every, image_path):
    """Encoder, middle and decoder, named by resolution; every: attention in all decoder blocks."""
    kind, size, count = cfg["kind"], cfg["size"], cfg["blocks"]
    widths = [cfg["channels"] * m for m in cfg["multipliers"]]
    image, x = x, conv(w, f"enc.{size}x{size}_conv", x, cfg["channels"], 3)
    stack = [x]
    for level, width in enumerate(widths):
        res = size >> level
        if level:
            x = block(w, f"enc.{res}x{res}_down", x, emb, x.shape[1], kind, "down")
            if image_path:
                mixed = x + image_path(f"enc.{res}x{res}_aux_residual", image, x.shape[1])
                x = image = mixed * math.sqrt(0.5)
            stack.append(x)
        for i in range(count):
            attend = res in cfg["attention"]
            x = block(w, f"enc.{res}x{res}_block{i}", x, emb, width, kind, attend=attend)
            stack.append(x)
    x = block(w, f"dec.{res}x{res}_in0", x, emb, width, kind, attend=True)
    x = block(w, f"dec.{res}x{res}_in1", x, emb, width, kind)
    for level in range(len(widths) - 1, -1, -1):
        res = size >> level
        if level < len(widths) - 1:
            x = block(w, f"dec.{res}x{res}_up", x, emb, x.shape[1], kind, "up")
        for i in range(count + 1):
            attend = res in cfg["attention"] and (every or i == count)
            x = torch.cat([x, stack.pop()], 1)
            name = f"dec.{res}x{res}_block{i}"
            x = block(w, name, x, emb, widths[level], kind, attend=attend)
    assert not stack
    return x
