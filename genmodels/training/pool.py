"""DDO's reference and its fake images: made once, kept on disk in shards."""

import os

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only

from genmodels import checkpoint, images
from genmodels.config import check
from genmodels.images import arrays
from genmodels.training import run


def load_reference(cfg, source, device):
    """Return the model of the config with the (EMA) weights of another one, in eval mode.

    Args:
        cfg: Config.
        source: run, .ckpt, export or diffusers UNet folder.
        device: where to put it.

    Raises:
        ValueError: another network, preconditioning or sigma_data, or weights are missing.
    """
    model = checkpoint.build(cfg)
    fresh = checkpoint.init_weights(model, source)
    check(not fresh, "init", source, f"lacks {fresh[:1]}; DDO needs a model of this very config")
    theirs = None if checkpoint.is_diffusers(source) else checkpoint.load(source).cfg.method
    for key in ("precond", "sigma_data"):
        own = getattr(cfg.method, key, None)
        check(
            own == getattr(theirs, key, own),
            f"method.{key}",
            own,
            f"init={source} was trained with {getattr(theirs, key, own)}",
        )
    if cfg.trainer.channels_last:  # as the trained one: else its rounding would differ
        model.net.to(memory_format=torch.channels_last)
    if cfg.trainer.compile:
        model.net.compile()
    return model.to(device).eval()


def make_pool(folder, seeds, size, generate):
    """Return (images uint8 (N, C, H, W), labels int64 (N,), -1 = none), one for each seed.

    FOLDER/shard-00000.npz holds the first `size` of them, and so on. Each shard is made by one
    process unless it is there; then all wait for all.

    Args:
        folder: where the shards lie.
        seeds: a range.
        size: images in a shard.
        generate: maps a range of seeds to (uint8 images, labels or None).
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [seeds[start : start + size] for start in range(0, len(seeds), size)]
    paths = [folder / f"shard-{k:05d}.npz" for k in range(len(parts))]
    world = int(os.environ.get("WORLD_SIZE", 1))
    for path, own in list(zip(paths, parts))[rank_zero_only.rank % world :: world]:
        if not path.exists():
            pictures, labels = generate(own)
            labels = np.full(len(own), -1) if labels is None else np.array(labels)
            nhwc = pictures.permute(0, 2, 3, 1).numpy()
            images.write_npz(path, images=nhwc, labels=labels, seeds=np.array(own))
    run.wait(lambda: all(path.exists() for path in paths))
    pictures, labels = zip(*map(arrays.npz_images, paths))
    return torch.cat(pictures), torch.cat(labels)
