"""Pictures to latents: `python -m genmodels.data encode`.

Each file of latents appears whole, and is made by one process; what is there already is not made
again, so that the same command goes on where it was killed.
"""

import hashlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from genmodels.atomic import make_folder, remove_partial, whole_file, write_bytes
from genmodels.config.load import LATENTS
from genmodels.config.schema import EDM2_VAE, VAEConfig
from genmodels.data.fingerprint import fingerprint
from genmodels.data.latents import (
    Description,
    channel_moments,
    open_latents,
    read_description,
    scaled_moments,
    shard_path,
)
from genmodels.data.own import Split
from genmodels.distributed import is_first, share, together
from genmodels.images.autoencoder import Autoencoder

STATISTICS = ("auto", "edm2", "measured")
SHARD = 256  # latents in a file: what a kill can cost each process
_BEGUN = "encoding.json"  # stands for latents.json until all files are there
# Of each channel on the model's scale, where EDM2's statistics fit: 0 and 0.5 on ImageNet.
_FARTHEST, _USUAL = 0.5, (0.25, 1.0)


def encode_pictures(
    parts: dict[str, Split],
    out: Path,
    autoencoder: Autoencoder,
    *,
    statistics: str = "auto",
    batch: int = 16,
    workers: int = 2,
    source: dict[str, Any] | None = None,
    class_names: list[str] | None = None,
) -> Description:
    """Write the latents of pictures as the folder `out`, or what is left of it; return what it is.

    Args:
        parts: {"train": (uint8 (N, C, H, W), labels int64 (N,)), "test": ...}.
        out: folder to make, or one that this very encoding has begun.
        autoencoder: what encodes.
        statistics: "edm2": EDM2's mean and std of each channel, and pixels on [0, 1]; "measured":
            those of the training pictures' latents, and pixels on [-1, 1]; "auto": edm2 for a VAE
            with the latent space of Stable Diffusion 1.
        batch: pictures read at a time.
        workers: threads that read them ahead.
        source: what they are, in words.
        class_names: of the labels 0, 1, ...

    Raises:
        ValueError: pictures that the VAE does not take; `out` is something else, or finished.
    """
    shape = next(iter(parts.values()))[0].shape[1:]
    latent = autoencoder.latent_shape(tuple(shape))
    as_edm2 = statistics == "edm2" or (statistics == "auto" and autoencoder.is_first_sd)
    if as_edm2 and autoencoder.latent_channels != len(EDM2_VAE.mean):
        raise ValueError(
            f"statistics=edm2: are of 4 channels, the VAE has {autoencoder.latent_channels}; use "
            "measured"
        )
    folder = Path(autoencoder.name).expanduser()
    name = str(folder.resolve()) if folder.is_dir() else autoencoder.name
    marks = {split: fingerprint(*part) for split, part in parts.items()}
    about = Description(
        vae=replace(EDM2_VAE, name=name) if as_edm2 else VAEConfig(name=name),
        vae_sha256=_sha256(autoencoder),
        shape=latent,
        pictures=tuple(shape),
        shard=SHARD,
        splits={split: len(labels) for split, (_, labels) in parts.items()},
        class_names=class_names or [],
        source=(source or {}) | {"fingerprint": marks},
    )
    with together():  # what one process cannot do ends all of them
        if is_first():
            _begin(out, about)
        missing = _missing(parts, out)  # before any process writes: all of them see the same
    with together():
        mine = [missing[k] for k in share(len(missing))]
        pixels = "0..1" if as_edm2 else "-1..1"
        _encode(mine, parts, out, autoencoder, pixels, batch, workers)
    with together():
        return _finish(parts, out, about) if is_first() else about


def _begin(out: Path, about: Description) -> None:
    """Make the folder, or see that this very encoding has begun it."""
    if (out / LATENTS).exists():
        raise ValueError(f"out={out}: holds finished latents; delete it or choose another name")
    if (out / _BEGUN).exists():
        begun = read_description(out, _BEGUN)
        if begun.to_bytes() != about.to_bytes():
            raise ValueError(
                f"out={out}: was begun with other pictures, another VAE or other statistics; "
                "delete it or choose another name"
            )
        remove_partial(out)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out}: exists and is no encoding; choose another name")
    make_folder(out, exist_ok=True)
    write_bytes(out / _BEGUN, about.to_bytes())


def _missing(parts: dict[str, Split], out: Path) -> list[tuple[str, int, int]]:
    """Return (split, number, how many latents) of the files that are not there yet."""
    files = [
        (split, shard, min(SHARD, len(labels) - SHARD * shard))
        for split, (_, labels) in parts.items()
        for shard in range(-(-len(labels) // SHARD))
    ]
    return [file for file in files if not shard_path(out, *file[:2]).exists()]


def _encode(
    files: list[tuple[str, int, int]],
    parts: dict[str, Split],
    out: Path,
    autoencoder: Autoencoder,
    pixels: str,
    batch: int,
    workers: int,
) -> None:
    """Write these files of latents; see _missing."""
    total = sum(count for _, _, count in files)
    bar = tqdm(total=total, desc="encoding", unit="img", delay=0.5, disable=not is_first())
    with bar, ThreadPoolExecutor(workers) as readers:  # pictures decode while the VAE computes
        for split, shard, count in files:
            numbers = torch.arange(SHARD * shard, SHARD * shard + count).split(batch)
            rows = []
            for some, pictures in zip(numbers, readers.map(parts[split][0].__getitem__, numbers)):
                moments = autoencoder.moments(pictures, pixels)
                if not moments.isfinite().all():
                    raise ValueError(
                        f"vae={autoencoder.name}: makes latents that are not numbers of pictures "
                        f"{int(some[0])}..{int(some[-1])} of {split}; use another VAE"
                    )
                rows.append(moments)
                bar.update(len(some))
            with whole_file(shard_path(out, split, shard)) as file:
                np.save(file, torch.cat(rows).numpy())


def _finish(parts: dict[str, Split], out: Path, about: Description) -> Description:
    """Write labels and latents.json, with measured statistics where they were asked for."""
    for split, (_, labels) in parts.items():
        with whole_file(out / f"{split}_labels.npy") as file:
            np.save(file, labels.numpy())
    moments = open_latents(out, "train", about)
    if not about.vae.mean:
        mean, variance = channel_moments(moments)
        values = {"mean": mean.tolist(), "std": variance.sqrt().tolist(), "pixels": "-1..1"}
        about = replace(about, vae=replace(about.vae, **values))
    else:
        step = max(1, len(moments) // 4096)
        some = replace(moments, numbers=moments.numbers[::step])
        mean, std = scaled_moments(some, about.vae)
        if mean.abs().max() > _FARTHEST or std.min() < _USUAL[0] or std.max() > _USUAL[1]:
            shown = [", ".join(f"{v:.2g}" for v in values.tolist()) for values in (mean, std)]
            warnings.warn(
                f"statistics=edm2: on the model's scale these latents have mean {shown[0]} and "
                f"standard deviation {shown[1]} in their channels, far from 0 and 0.5; "
                "statistics=measured fits them",
                stacklevel=2,
            )
    write_bytes(out / LATENTS, about.to_bytes())
    (out / _BEGUN).unlink()
    return about


def _sha256(autoencoder: Autoencoder) -> str:
    """Return the sha256 of the VAE's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(autoencoder.vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
