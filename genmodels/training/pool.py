"""DDO's reference, and images made by all processes: once, kept on disk in shards."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genmodels import checkpoint, distributed, images
from genmodels.atomic import write_bytes
from genmodels.config import Config, check
from genmodels.foreign import open_npz
from genmodels.generation import NonFinite
from genmodels.images import arrays
from genmodels.images.arrays import memory_size
from genmodels.networks import NETWORKS
from genmodels.networks.edm2_unet import normalise_weights


def load_reference(cfg: Config, source: str, device: torch.device) -> Any:
    """Return the model of the config with the (EMA) weights of another one, in eval mode.

    Args:
        cfg: of the model to train.
        source: run, .ckpt, export or diffusers UNet folder.
        device: where to put it.

    Raises:
        ValueError: another network, preconditioning or sigma_data, or weights are missing.
    """
    checkpoint.check_size(cfg)
    model = checkpoint.build(cfg)  # without EDM2's loss weights u, which DDO has no use for
    fresh = checkpoint.init_weights(model, source)
    if fresh:
        theirs, why = checkpoint.settings_of_model(source)["data"].get("labels"), ""
        if theirs is not None and theirs != cfg.data.labels:
            why = f": it was trained with data.labels={str(theirs).lower()}"
        check(False, "init", source, f"lacks {fresh[0]}; DDO needs a model of this config{why}")
    theirs = None if checkpoint.is_diffusers(source) else checkpoint.load(source).cfg.method
    for key in ("precond", "sigma_data"):
        ours = getattr(cfg.method, key, None)
        check(
            ours == getattr(theirs, key, ours),
            f"method.{key}",
            ours,
            f"init={source} was trained with {getattr(theirs, key, ours)}",
        )
    dropout = getattr(cfg.method, "label_dropout", 0)
    check(
        not (dropout and cfg.data.labels) or getattr(theirs, "label_dropout", dropout),
        "method.label_dropout",
        dropout,
        f"init={source} was trained with a label for every image; use 0",
    )
    if NETWORKS[cfg.network.name].FORCED:  # as the trained one: its hash and its fakes are of these
        normalise_weights(model)
    # As the trained one: else its rounding would differ.
    model.speed_up(compile=cfg.trainer.compile, channels_last=cfg.trainer.channels_last)
    return model.to(device).eval()


Generate = Callable[[range], tuple[torch.Tensor, list[int] | None]]


def make_shards(folder: Path, seeds: range, size: int, generate: Generate) -> list[Path]:
    """Make this process's share of the images of all seeds; return the files of all shards.

    FOLDER/shard-00000.npz holds the first `size` of them, and so on. Each shard is made by one
    process unless it is there. A file beside it, its name ending in .nonfinite, says in its place
    that the model made images that are not numbers.

    Args:
        folder: where the shards lie.
        seeds: of all images.
        size: images in a shard.
        generate: maps a range of seeds to (uint8 images or float32 latents, labels or None).
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [seeds[start : start + size] for start in range(0, len(seeds), size)]
    paths = [folder / f"shard-{k:05d}.npz" for k in range(len(parts))]
    fault = ""
    for k in distributed.share(len(parts)):
        if _is_made(paths[k]):
            continue
        try:
            made = None if fault else generate(parts[k])
        except NonFinite as error:
            made, fault = None, str(error)
        if made is None:  # the others need not be made: who waits for this process gives up
            write_bytes(_fault(paths[k]), fault.encode())
            continue
        pictures, labels = made
        numbers = np.full(len(parts[k]), -1) if labels is None else np.array(labels)
        if pictures.is_floating_point():
            arrays_of = {"latents": pictures.numpy()}
        else:
            arrays_of = {"images": pictures.permute(0, 2, 3, 1).numpy()}
        images.write_npz(paths[k], **arrays_of, labels=numbers, seeds=np.array(parts[k]))
    return paths


def load_shards(paths: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (images, labels int64 (N,), -1 = none) once all shards are made.

    The images are uint8 (N, C, H, W), of latents float32.

    Raises:
        NonFinite: images of one of them are not numbers.
    """
    distributed.wait(lambda: all(map(_is_made, paths)))
    for path in paths:
        if not path.exists():
            raise NonFinite(_fault(path).read_text())
    shards: list[Any] = [_latents(path) or arrays.npz_images(path) for path in paths]
    return torch.cat([pictures for pictures, _ in shards]), torch.cat([part for _, part in shards])


def _latents(path: Path) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (latents, labels) of a shard, None if it holds pictures."""
    with open_npz(path) as file:
        if "latents" not in file.files:
            return None
        latents, labels = (file.read(name, memory_size()) for name in ("latents", "labels"))
    return torch.from_numpy(latents), torch.from_numpy(labels)


def _is_made(path: Path) -> bool:
    return path.exists() or _fault(path).exists()


def _fault(path: Path) -> Path:
    return path.with_suffix(".nonfinite")
