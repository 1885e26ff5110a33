"""Augmentation on the device, a function of (seed, n) for training image n.

EDM's non-leaky augmentation: the image is distorted at random and the network is told how, by nine
values that are zero for an undistorted image. Asked with zeros, it generates undistorted ones.

    transform (in this order)                                     probability   values
    mirror left-right                                             1/2           1
    mirror upside down                                            p / 2         1
    scale by 2^(0.2 a)                                            p             a
    rotate by b in [-pi, pi), counter-clockwise                   p             cos b - 1, sin b
    stretch by 2^(0.2 c) along the direction d, shrink across it  p             c cos d, c sin d
    shift by 1/8 of the image's width and height times e, f       p             e, f

with a, c, e, f standard normal, d = 0 half of the time and uniform in [-pi, pi) otherwise.

Reference: Karras et al. 2022, arXiv 2206.00364, appendix F.2; Karras et al. 2020, arXiv 2006.06676,
appendix B (resampling between two wavelet filters).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from genmodels.kernels.philox import philox_uniform
from genmodels.seeding import Stream

STEP = 0.2  # log2 of the scale and stretch at one standard deviation
SHIFT = 1 / 8  # share of the image size at one standard deviation

# Symlet with six vanishing moments (Daubechies, "Ten lectures on wavelets", 1992, section 8.1.1):
# doubling with it and halving with its mirror image is the identity, as its even shifts are
# orthonormal.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
# Its centre of mass, in samples of the doubled grid right of the middle between two taps.
_OFFSET = sum(i * tap for i, tap in enumerate(SYM6)) / sum(SYM6) - (len(SYM6) - 1) / 2
_MARGIN = len(SYM6) // 2  # pixels that the filter reaches beyond the border


class Distortion(NamedTuple):
    """What happens to each image; all float32 (B,)."""

    mirror: torch.Tensor  # left-right, 0 or 1
    flip: torch.Tensor  # upside down, 0 or 1
    scale: torch.Tensor  # a
    angle: torch.Tensor  # b
    stretch: torch.Tensor  # c
    direction: torch.Tensor  # d
    right: torch.Tensor  # e
    down: torch.Tensor  # f


def augment(
    images: torch.Tensor, probability: float, seed: int, n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (distorted images (B, C, H, W), the nine values (B, 9)).

    Args:
        images: float (B, C, H, W), any range.
        probability: p of each distortion but the mirroring, which always has 1/2.
        seed: the run's seed.
        n: int64 (B,), the images' positions in the training stream.
    """
    # Outside autocast: bfloat16 would round the positions that pixels are read at.
    with torch.autocast(images.device.type, enabled=False):
        distortion = draw_distortion(probability, seed, n)
        return distort(images.float(), distortion), distortion_values(distortion)


def draw_distortion(probability: float, seed: int, n: torch.Tensor) -> Distortion:
    """Return the Distortion of training images n (int64 (B,)) under this seed, on n's device."""
    u = philox_uniform((15,), seed, n, stream=int(Stream.AUGMENT), device=n.device)
    on = (u[:, 1:6] < probability).float()  # the mirroring in column 0 is always on
    coin = (u[:, 6:9] < 0.5).float()
    # Normals by the inverse distribution function, from the middles of the grid of uniforms.
    # The last middle, 1 - 2^-25, is no float32: it would round to 1, and its normal to infinity.
    normal = torch.special.ndtri((u + 2**-25).clamp(max=1 - 2**-24))
    angle = math.pi * (2 * u - 1)
    return Distortion(
        mirror=coin[:, 0],
        flip=on[:, 0] * coin[:, 1],
        scale=on[:, 1] * normal[:, 9],
        angle=on[:, 2] * angle[:, 10],
        stretch=on[:, 3] * normal[:, 11],
        direction=on[:, 3] * coin[:, 2] * angle[:, 12],
        right=on[:, 4] * normal[:, 13],
        down=on[:, 4] * normal[:, 14],
    )


def distortion_values(distortion: Distortion) -> torch.Tensor:
    """Return the nine values the network is given, (B, 9); all zero for an undistorted image."""
    mirror, flip, scale, angle, stretch, direction, right, down = distortion
    columns = (mirror, flip, scale, angle.cos() - 1, angle.sin())
    columns += (stretch * direction.cos(), stretch * direction.sin(), right, down)
    return torch.stack(columns, dim=1)


def distort(images: torch.Tensor, distortion: Distortion) -> torch.Tensor:
    """Return the distorted images (B, C, H, W); what lies beyond the border is a reflection.

    Mirrored images are exact copies, and undistorted ones are the input itself.
    """
    mirror, flip = ((part > 0).reshape(-1, 1, 1, 1) for part in distortion[:2])
    images = torch.where(mirror, images.flip(-1), images)
    images = torch.where(flip, images.flip(-2), images)
    warped = warp(images, inverse_matrix(distortion, *images.shape[-2:]))
    moved = torch.stack(distortion[2:]).abs().amax(dim=0) > 0
    return torch.where(moved.reshape(-1, 1, 1, 1), warped, images)


def inverse_matrix(distortion: Distortion, height: int, width: int) -> torch.Tensor:
    """Return (B, 2, 3) matrices from a position in the distorted image to one in the original.

    Positions are pixels from the centre, x to the right, y down; the inverses of scale, rotation,
    stretch and shift are applied in the opposite order.
    """
    _, _, scale, angle, stretch, direction, right, down = distortion
    turn = _rotation(direction)
    factors = torch.stack([(-STEP * stretch).exp2(), (STEP * stretch).exp2()], dim=1)
    unstretch = turn @ (factors[:, :, None] * turn.mT)
    linear = (-STEP * scale).exp2().reshape(-1, 1, 1) * (_rotation(-angle) @ unstretch)
    shift = SHIFT * torch.stack([right * width, down * height], dim=1)
    return torch.cat([linear, -linear @ shift[:, :, None]], dim=2)


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    """Return (B, 2, 2) rotations, counter-clockwise as seen (the y axis points down)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, sin, -sin, cos], dim=1).reshape(-1, 2, 2)


def warp(images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return images (B, C, H, W) read at the positions that (B, 2, 3) inverse matrices point to.

    The image is doubled with the wavelet filter, read bilinearly on a doubled grid, and halved:
    bilinear interpolation alone would blur, and the network could tell a distorted image by that.
    """
    height, width = images.shape[-2:]
    doubled = _resample(_extend(images, _MARGIN), up=True)
    trim = (doubled.shape[-1] - 2 * width) // 2
    doubled = doubled[..., trim : trim + 2 * height, trim : trim + 2 * width]
    like = {"device": images.device, "dtype": torch.float32}
    # The doubled grid of the result, in pixels from the centre, with a margin for the filter. The
    # filter's centre lies off the middle of its taps: _OFFSET, in samples of the doubled grid.
    reach = 2 * _MARGIN - 1
    x, y = (
        (torch.arange(-reach, 2 * n + reach, **like) + 0.5 - _OFFSET) / 2 - n / 2
        for n in (width, height)
    )
    m = matrix[:, :, :, None, None]  # element by element: TF32 would round the positions
    positions = torch.stack(
        [m[:, i, 0] * x + m[:, i, 1] * y[:, None] + m[:, i, 2] for i in (0, 1)], dim=-1
    )
    size = torch.tensor([width, height], **like)
    grid = (positions + _OFFSET / 2) * 2 / size
    read = F.grid_sample(
        doubled, grid.to(doubled.dtype), "bilinear", padding_mode="reflection", align_corners=False
    )
    halved = _resample(read, up=False)
    trim = (halved.shape[-1] - width) // 2
    return halved[..., trim : trim + height, trim : trim + width]


def _extend(images: torch.Tensor, margin: int) -> torch.Tensor:
    """Return images with `margin` more pixels on each side, reflected at the border's edge."""
    for dim in (-2, -1):
        n = images.shape[dim]
        index = torch.arange(-margin, n + margin, device=images.device) % (2 * n)
        images = images.index_select(dim, torch.minimum(index, 2 * n - 1 - index))
    return images


def _resample(images: torch.Tensor, up: bool) -> torch.Tensor:
    """Return images doubled or halved along both axes by the wavelet filter."""
    channels = images.shape[1]
    taps = torch.tensor(SYM6, device=images.device, dtype=images.dtype)
    # Doubling inserts zeros, so its filter has to sum to 2; halving takes an average, 1.
    taps = taps * (math.sqrt(2) if up else math.sqrt(0.5))
    convolve = F.conv_transpose2d if up else F.conv2d
    for shape, stride in (((1, 1, -1, 1), (2, 1)), ((1, 1, 1, -1), (1, 2))):
        kernel = taps.reshape(shape).expand(channels, 1, -1, -1)
        images = convolve(images, kernel, stride=stride, groups=channels)
    return images
