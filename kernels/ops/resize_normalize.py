"""uint8 images to network input in one pass: resize, normalise, channels last.

    out(i, j, c) = ( sum_a sum_b u_a(i) v_b(j) pixel(top_i + a, left_j + b, c) - mean_c ) / std_c

with the weights u, v of a separable filter:

    tf1       source = i * in / out, two taps: TensorFlow 1's resize_bilinear without aligned
              corners, the grid that Inception features for FID were defined with
    bilinear  source = (i + 1/2) * in / out - 1/2, two taps: torch's interpolate, whose
              align_corners is False
    bicubic   Pillow's: Keys' cubic with a = -1/2 about (i + 1/2) * in / out, stretched by in / out
              when shrinking. quantize=True repeats its 8-bit arithmetic (weights of 22 bits, rows
              rounded before columns) digit for digit; else that of its "F" mode

Sources: Keys, "Cubic convolution interpolation for digital image processing", IEEE TASSP 1981;
Parmar, Zhang and Zhu, "On aliased resizing", arXiv 2104.11222, for why the grid matters.
"""

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from .dispatch import (
    FLOATS,
    INTERPRETING,
    chunks,
    launch_options,
    on_device,
    tl,
    triton,
    use_triton,
)

__all__ = ["MODES", "resize_normalize"]

MODES = ("tf1", "bilinear", "bicubic")
_BITS = 22  # of Pillow's fixed-point weights


def _cubic(x):
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def _row(i, size, scale, mode):
    """Return (first source index, weights) of target index i."""
    if mode == "bicubic":
        stretch = max(scale, 1.0)
        centre = (i + 0.5) * scale
        first = max(int(centre - 2 * stretch + 0.5), 0)
        last = min(int(centre + 2 * stretch + 0.5), size)
        weights = [_cubic((k - centre + 0.5) / stretch) for k in range(first, last)]
        total = sum(weights)
        return first, [weight / total for weight in weights]
    source = i * scale if mode == "tf1" else max((i + 0.5) * scale - 0.5, 0.0)
    first = min(int(source), size - 1)
    upper = min(source - first, 1.0) if first + 1 < size else 0.0
    return first, [1 - upper, upper] if first + 1 < size else [1.0]


@lru_cache(maxsize=64)
def _taps(size, target, mode, quantize):
    """Return (first (target,) int32, weights (target, taps) float64), on the CPU, rows padded."""
    rows = [_row(i, size, size / target, mode) for i in range(target)]
    first = torch.tensor([row[0] for row in rows], dtype=torch.int32)
    taps = max(len(row[1]) for row in rows)
    weights = torch.tensor(
        [row[1] + [0.0] * (taps - len(row[1])) for row in rows], dtype=torch.float64
    )
    if quantize:
        weights = torch.where(
            weights < 0, weights * 2**_BITS - 0.5, weights * 2**_BITS + 0.5
        ).trunc()
    return first, weights


def _matrix(size, target, mode, quantize):
    """Return the filter as a (target, size) matrix, float64."""
    first, weights = _taps(size, target, mode, quantize)
    columns = first[:, None].long() + torch.arange(weights.shape[1])
    matrix = torch.zeros(target, size + weights.shape[1], dtype=torch.float64)
    return matrix.scatter_add_(1, columns, weights)[:, :size]


def _to_bytes(pixels):
    """Return Pillow's fixed-point grey levels rounded to 8 bits."""
    return ((pixels + 2 ** (_BITS - 1)) / 2**_BITS).floor().clamp(0, 255)


def _reference(images, size, mode, quantize, mean, std, dtype):
    """The formula above as two matrix products per image, a chunk of images at a time."""
    batch, channels, height, width = images.shape
    out = torch.empty(
        batch, channels, *size, dtype=dtype, device=images.device, memory_format=torch.channels_last
    )
    work = torch.float64 if quantize else torch.float32  # the integers need more than 24 bits
    down = _matrix(height, size[0], mode, quantize).to(images.device, work)
    right = _matrix(width, size[1], mode, quantize).T.to(images.device, work)
    largest = channels * max(height * width, size[0] * size[1])
    for part in chunks(batch, largest, images.device, 1 << 20):
        pixels = images[part].to(work) @ right
        pixels = down @ (_to_bytes(pixels) if quantize else pixels)
        pixels = _to_bytes(pixels) if quantize else pixels
        out[part] = ((pixels - mean[:, None, None]) / std[:, None, None]).to(dtype)
    return out


@cache
def _device_taps(size, target, mode, quantize, device):
    """Return _taps as the kernel reads them, on a device: copied there once.

    A CUDA graph can so be captured after a first call, and goes on reading what it captured.
    """
    first, weights = _taps(size, target, mode, quantize)
    return first.to(device), weights.to(device, torch.int32 if quantize else torch.float32)


@cache
def _device_numbers(values, device):
    """Return a tuple of numbers as a float32 tensor, copied to the device once as well."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@triton.jit
def to_byte(value):
    """Pillow's fixed-point grey levels rounded to 8 bits; 2097152 is half of 2^22."""
    return tl.minimum(tl.maximum((value + 2097152) >> 22, 0), 255)


@triton.jit(do_not_specialize=["batch"])
def resize_kernel(
    out,
    images,
    top,
    left,
    down,
    right,
    mean,
    std,
    batch,
    height,
    width,
    tiles,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    CHANNELS: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = (tl.program_id(0) // tiles).to(tl.int64)
    element = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = element < OUT_HEIGHT * OUT_WIDTH * CHANNELS
    channel = element % CHANNELS
    column = (element // CHANNELS) % OUT_WIDTH
    row = element // (CHANNELS * OUT_WIDTH)
    y = tl.load(top + row, mask=inside, other=0)
    x = tl.load(left + column, mask=inside, other=0)
    base = images + image * image_stride + channel.to(tl.int64) * channel_stride
    kind: tl.constexpr = tl.int32 if QUANTIZE else tl.float32
    value = tl.zeros((BLOCK,), dtype=kind)
    for a in range(0, DOWN):
        line = base + (y + a).to(tl.int64) * row_stride
        has_row = inside & (y + a < height)
        part = tl.zeros((BLOCK,), dtype=kind)
        for b in range(0, RIGHT):
            weight = tl.load(right + column * RIGHT + b, mask=inside, other=0)
            has = has_row & (x + b < width)
            pixel = tl.load(line + (x + b).to(tl.int64) * column_stride, mask=has, other=0)
            part += weight * pixel.to(kind)
        if QUANTIZE:
            part = to_byte(part)
        value += tl.load(down + row * DOWN + a, mask=inside, other=0) * part
    if QUANTIZE:
        value = to_byte(value)
    centre = tl.load(mean + channel)
    result = (value.to(tl.float32) - centre) / tl.load(std + channel)
    offset = image * (OUT_HEIGHT * OUT_WIDTH * CHANNELS) + element
    tl.store(out + offset, result.to(out.dtype.element_ty), mask=inside)


@on_device
def _kernel(images, size, mode, quantize, mean, std, dtype, block=None):
    """Launch; images (B, C, H, W) with any strides."""
    batch, channels, height, width = images.shape
    out = torch.empty(
        batch, channels, *size, dtype=dtype, device=images.device, memory_format=torch.channels_last
    )
    (top, down), (left, right) = (
        _device_taps(source, target, mode, quantize, images.device)
        for source, target in zip((height, width), size)
    )
    elements = channels * size[0] * size[1]
    if block is None:
        block = triton.next_power_of_2(elements) if INTERPRETING else 512
    tiles = -(-elements // block)
    resize_kernel[(batch * tiles,)](
        out,
        images,
        top,
        left,
        down,
        right,
        mean,
        std,
        batch,
        height,
        width,
        tiles,
        *images.stride(),
        CHANNELS=channels,
        OUT_HEIGHT=size[0],
        OUT_WIDTH=size[1],
        DOWN=down.shape[1],
        RIGHT=right.shape[1],
        QUANTIZE=quantize,
        BLOCK=block,
        **launch_options(num_warps=4),
    )
    return out


def _per_channel(op, name, value, images):
    """Return mean or std as float32 (C,) on the images' device."""
    channels = images.shape[1]
    if isinstance(value, torch.Tensor):
        value = value.to(images.device, torch.float32).reshape(-1)
    else:
        numbers = (value,) if isinstance(value, (int, float)) else tuple(value)
        value = _device_numbers(tuple(map(float, numbers)), images.device)
    if len(value) not in (1, channels):
        raise ValueError(
            f"{op}: {name} must be a number or one per channel ({channels}), got {len(value)}"
        )
    return value.expand(channels).contiguous()


@torch.no_grad()
def resize_normalize(
    images: Tensor,
    size: int | Sequence[int],
    *,
    mode: str = "tf1",
    mean: float | Sequence[float] | Tensor = 127.5,
    std: float | Sequence[float] | Tensor = 127.5,
    quantize: bool = False,
    layout: str = "nchw",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return resized, normalised images, (B, C, *size) in channels-last memory.

    Args:
        images: uint8 (B, C, H, W), or (B, H, W, C) with layout="nhwc"; any strides.
        size: (height, width) of the result, or one int for both.
        mode: "tf1", "bilinear" or "bicubic" (module docstring).
        mean, std: in grey levels 0..255, a number or one per channel; the defaults give [-1, 1],
            128 and 128 the input of the TensorFlow Inception, 0 and 1 grey levels.
        quantize: bicubic only: round to 8 bits after rows and after columns, as Pillow does.
        layout: "nchw" or "nhwc", of the input.
        dtype: torch.float32, float16 or bfloat16.

    Raises:
        ValueError: for another dtype, mode, layout, number of means or a size that is not positive.
    Reference: module docstring.
    """
    op = "resize_normalize"
    size = (size, size) if isinstance(size, int) else tuple(size)
    if images.dtype != torch.uint8 or images.dim() != 4 or not images.shape.numel():
        raise ValueError(
            f"{op}: images must be uint8 with four axes, got {images.dtype} {tuple(images.shape)}"
        )
    if mode not in MODES or layout not in ("nchw", "nhwc") or dtype not in FLOATS:
        raise ValueError(
            f"{op}: mode must be one of {', '.join(MODES)}, layout nchw or nhwc, dtype a 32- or "
            f"16-bit float, got {mode!r}, {layout!r}, {dtype}"
        )
    if quantize and mode != "bicubic":
        raise ValueError(f"{op}: quantize=True belongs to mode='bicubic', got {mode!r}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{op}: size must be two positive integers, got {size}")
    images = images.permute(0, 3, 1, 2) if layout == "nhwc" else images
    mean, std = (
        _per_channel(op, name, value, images) for name, value in (("mean", mean), ("std", std))
    )
    kernel = use_triton(op, images, dtypes=(torch.uint8,))
    return (_kernel if kernel else _reference)(images, size, mode, quantize, mean, std, dtype)
