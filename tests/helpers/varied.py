"""Images of many kinds, for tests of features."""

import torch
from torch.nn import functional as F


def varied(count, size=32, channels=3):
    """Return images (N,C,H,W) of many kinds: flat to contrasty, smooth to noisy."""
    random, images = torch.Generator().manual_seed(0), []
    for k in range(count):
        side = min(size, (2, 4, 8, 16, 32)[k % 5])
        z = torch.randn(1, channels, side, side, generator=random)
        z = F.interpolate(z, size, mode="bicubic")[0]
        tint = torch.randn(channels, 1, 1, generator=random)
        contrast = 1.5 * torch.rand((), generator=random)
        images.append((128 + 50 * (tint + contrast * z)).clamp(0, 255).to(torch.uint8))
    return torch.stack(images)
