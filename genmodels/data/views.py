"""Views: weak distortions of training images that leave the cluster alone, a function of (seed, n).

In this order, each with its own strength (0: off), all drawn independently:

    affine  turn by up to 20, shear by up to 10 degrees, scale by up to 15 %, shift by up to 10 %,
            times the strength
    crop    shift by up to `crop` pixels each way, background 'reflected'
    flip    mirror left-right, probability 1/2
    jitter  with this probability: brightness +-0.2, contrast x [0.8, 1.2], saturation x [0.8, 1.2]
    grey    with this probability: the mean over colours in every channel
    noise   add a normal of this standard deviation, on the [-1, 1] scale

All but the noise keep images within [-1, 1]. They are weaker than those of contrastive learning:
the density is fit to the (noisy) image itself, and no view should leave it.
"""

import math

import torch
import torch.nn.functional as F

from genmodels.kernels.philox import philox_normal, philox_uniform
from genmodels.seeding import Stream

TURN, SHEAR, SCALE, SHIFT = math.radians(20), math.radians(10), 0.15, 0.1
LIGHT = 0.2  # of brightness, contrast and saturation


def add_noise(
    x: torch.Tensor, std: float, seed: int, n: torch.Tensor, stream: int = Stream.NOISE
) -> torch.Tensor:
    """Return x + std z with z normal; x is (B, C, H, W), n int64 (B,)."""
    if not std:
        return x
    noise = philox_normal(x.shape[1:], seed, n, stream=int(stream), device=x.device)
    return x + std * noise


def view(
    x: torch.Tensor,
    seed: int,
    n: torch.Tensor,
    *,
    which: int = 0,
    affine: float = 0.0,
    crop: int = 0,
    flip: bool = False,
    jitter: float = 0.0,
    grey: float = 0.0,
    noise: float = 0.0,
) -> torch.Tensor:
    """Return one random view of each image, (B, C, H, W); strengths as in the module's docstring.

    Args:
        x: images (B, C, H, W) in [-1, 1].
        seed: of the run.
        n: int64 (B,), positions in the training stream.
        which: number of the view; two numbers give independent views.
    """
    stream = int(Stream.VIEW) + 100 * which
    if affine or crop or flip or jitter or grey:
        u = philox_uniform((16,), seed, n, stream=stream, device=x.device)
    if affine:
        x = _warp(x, affine * (2 * u[:, :5] - 1))
    if crop:
        x = _shift(x, crop, (u[:, 5:7] * (2 * crop + 1)).long())
    if flip:
        x = torch.where(_per_image(u[:, 7] < 0.5), x.flip(-1), x)
    if jitter:
        x = torch.where(_per_image(u[:, 8] < jitter), _relight(x, LIGHT * (2 * u[:, 9:12] - 1)), x)
    if grey:
        x = torch.where(_per_image(u[:, 12] < grey), x.mean(dim=1, keepdim=True).expand_as(x), x)
    return add_noise(x, noise, seed, n, int(Stream.VIEW_NOISE) + 100 * which)


def _per_image(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, 1, 1, 1)


def _warp(x: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """Return x turned, sheared, scaled and shifted; amounts in [-1, 1], (B, 5)."""
    angle, shear, scale, right, down = amounts.unbind(1)
    angle, shear, scale = TURN * angle, (SHEAR * shear).tan(), 1 + SCALE * scale
    cos, sin = angle.cos() / scale, angle.sin() / scale
    aspect = x.shape[-2] / x.shape[-1]  # the grid's units are half sides
    rows = [
        cos,
        (shear * cos - sin) * aspect,
        2 * SHIFT * right,
        sin / aspect,
        shear * sin + cos,
        2 * SHIFT * down,
    ]
    grid = F.affine_grid(torch.stack(rows, 1).reshape(-1, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, grid, "bilinear", padding_mode="border", align_corners=False)


def _shift(x: torch.Tensor, most: int, corners: torch.Tensor) -> torch.Tensor:
    """Return crops of the reflected image, whose corners (B, 2) lie in [0, 2 most]."""
    height, width = x.shape[-2:]
    mode = "reflect" if most < min(height, width) else "replicate"
    x = F.pad(x, [most] * 4, mode=mode)
    rows = corners[:, :1] + torch.arange(height, device=x.device)
    columns = corners[:, 1:] + torch.arange(width, device=x.device)
    item = torch.arange(len(x), device=x.device).reshape(-1, 1, 1)
    return x.permute(0, 2, 3, 1)[item, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def _relight(x: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """Return x with other brightness, contrast and saturation, amounts (B, 3), within [-1, 1]."""
    brightness, contrast, saturation = (_per_image(part) for part in amounts.unbind(1))
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (1 + saturation) * (x - grey)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (mean + (1 + contrast) * (x - mean) + brightness).clamp(-1, 1)
