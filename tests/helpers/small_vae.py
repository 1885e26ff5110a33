"""A tiny AutoencoderKL with random weights, saved as diffusers saves them; and pictures for it."""

import torch
from PIL import Image

FACTOR = 2  # side of a picture over that of its latents


def small_vae(**settings):
    """Return an AutoencoderKL of 4 latent channels whose encoder has a real spread."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    options = {"block_out_channels": (4, 8), "latent_channels": 4, "norm_num_groups": 2}
    options |= {"down_block_types": ["DownEncoderBlock2D"] * 2}
    options |= {"up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1}
    return AutoencoderKL(**(options | settings)).eval()


def save_vae(folder, **settings):
    """Write one as a folder; return the folder."""
    small_vae(**settings).save_pretrained(folder)
    return folder


def picture_folder(folder, count=10, side=8):
    """Write colour pictures of two classes, cat and dog; return the folder."""
    generator = torch.Generator().manual_seed(0)
    for k in range(count):
        below = folder / ("cat", "dog")[k % 2]
        below.mkdir(parents=True, exist_ok=True)
        levels = torch.randint(256, (side, side, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(levels.numpy()).save(below / f"{k}.png")
    return folder
