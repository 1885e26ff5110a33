"""Latents of pictures as data: a folder that `python -m genmodels.data encode` writes.

    latents.json                    what encoded them, their shape and counts, the class names
    train-00000.npy, ...            float32 (SHARD, 2C, h, w): mean and std of each picture's z
    train_labels.npy                int64 (N,), -1 = none
    test-00000.npy, ...             likewise, where the pictures had a test part

The arrays are memory-mapped. Each time an image is met its latent is drawn anew, eps a function of
(seed, n):

    z = mean + std eps,    x = (z - data.vae.mean) / (2 data.vae.std)

The zip or folder that EDM2's own tool writes is read as well: an .npy for each picture, labels in
dataset.json.

Reference: Karras et al. 2024, arXiv 2312.02696 (EDM2), whose latents of ImageNet-512 are such.
"""

import io
import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genmodels.config import DataConfig, check
from genmodels.config.load import LATENTS
from genmodels.config.schema import EDM2_VAE, VAEConfig
from genmodels.data.own import Split, data_root, edm_labels, held_out_share
from genmodels.foreign import check_npy, read_plain
from genmodels.images import OnDisk, Tree, arrays
from genmodels.images.autoencoder import load_autoencoder, scaled_latents
from genmodels.kernels.philox import philox_normal
from genmodels.seeding import Stream

FORMAT = 1  # of a folder; a larger number is refused


@dataclass(frozen=True)
class Description:
    """What latents.json says.

    Attributes:
        vae: what encoded them.
        vae_sha256: of its weights.
        shape: (C, h, w) of a latent.
        pictures: (C, H, W) of what was encoded.
        shard: latents in a file; the last one of a split may have fewer. 0: EDM2's files.
        splits: how many are in "train" and "test".
        class_names: of the labels 0, 1, ..., as far as they are known.
        source: what was encoded, and how it was read, in words.
    """

    vae: VAEConfig
    vae_sha256: str
    shape: tuple[int, ...]
    pictures: tuple[int, ...]
    shard: int
    splits: dict[str, int]
    class_names: list[str]
    source: dict[str, Any]

    def to_bytes(self) -> bytes:
        """Return the file."""
        return json.dumps({"genmodels_latents": FORMAT} | asdict(self), indent=1).encode()


def read_description(folder: Path, name: str = LATENTS) -> Description:
    """Return what a folder's latents.json says.

    Args:
        folder: of the latents.
        name: of the file, if it is another.

    Raises:
        ValueError: there is none, or it is none of this version.
    """
    path = folder / name
    if not path.is_file():
        if folder.suffix == ".zip" or (folder / "dataset.json").is_file():
            return _describe_edm2(folder)
        raise ValueError(
            f"data.root={folder}: has no {LATENTS}; make latents of pictures with python -m "
            f"genmodels.data encode PICTURES vae=VAE out={folder}"
        )
    try:
        plain = dict(json.loads(read_plain(path)))
        newer = int(plain.pop("genmodels_latents")) > FORMAT
        found = None if newer else _described(plain)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"data.root={path}: cannot be read ({reason}); encode anew") from None
    if found is None:
        raise ValueError(f"data.root={path}: is of a newer format; upgrade genmodels")
    whole = name != LATENTS or found.vae.mean
    check(whole, "data.root", path, "does not say on what scale its latents are; encode anew")
    return found


def _described(plain: dict[str, Any]) -> Description:
    """Return the Description of what a file holds; raise nearly anything if it is none."""
    shape, pictures = (tuple(map(int, plain[key])) for key in ("shape", "pictures"))
    vae = VAEConfig(**plain["vae"])
    found = Description(**(plain | {"vae": vae, "shape": shape, "pictures": pictures}))
    counts = {"train": 0, "test": 0} | found.splits
    good = len(shape) == len(pictures) == 3 and min(*shape, *pictures, found.shard) > 0
    good = good and len(counts) == 2 and min(counts.values()) >= 0 < counts["train"]
    if not good or len(vae.mean) not in (0, shape[0]):
        raise ValueError("its numbers do not go together")
    return found


def read_latents(cfg: DataConfig, split: str) -> Split:
    """Return (mean and std, float32 (N, 2C, h, w) as OnDisk, labels) of a split."""
    folder = data_root(cfg)
    about = read_description(folder)
    part = split if about.splits.get("test") else "train"
    count = about.splits[part]
    if about.shard:
        pixels = open_latents(folder, part, about)
        array = arrays.load_npy(folder / f"{part}_labels.npy")
        labels = arrays.class_numbers(array, count, f"data.root={folder}: its labels")
    else:
        pixels, labels = _open_edm2(folder, about)
    if about.splits.get("test"):
        return pixels, labels
    numbers = held_out_share(cfg, split, count)
    return replace(pixels, numbers=numbers), labels[numbers]


def open_latents(folder: Path, split: str, about: Description) -> OnDisk:
    """Return mean and std of all latents of a split, float32 (N, 2C, h, w), by memory maps."""
    channels, height, width = about.shape
    shape = (2 * channels, height, width)
    read = partial(_read_rows, folder, split, about.shard, shape)
    raw = partial(_row_bytes, read)
    return OnDisk(read, shape, torch.arange(about.splits[split]), raw=raw, dtype=torch.float32)


@lru_cache(maxsize=2)
def _edm2_tree(path: Path) -> tuple[Tree, list[str]]:
    """Return (the zip or folder, the names of the latents in it, in order)."""
    tree = Tree(path, "data.root")
    names = sorted(name for name in tree.entries if name.endswith(".npy"))
    if not names:
        raise ValueError(f"data.root={path}: holds no latents, neither ours nor EDM2's .npy files")
    return tree, names


def _describe_edm2(path: Path) -> Description:
    """Return what a zip or folder of EDM2's tool holds: an array (8, h, w) for each picture."""
    tree, names = _edm2_tree(path)
    channels, *sides = _read_edm2(tree, names[:1], None, [0]).shape[1:]
    vae, scale = replace(EDM2_VAE), len(EDM2_VAE.mean)
    check(
        channels == 2 * scale and len(sides) == 2,
        "data.root",
        path,
        f"{names[0]} is of {channels} channels, not of {scale} means and {scale} stds as EDM2's",
    )
    pictures = (3, *(8 * side for side in sides))
    splits = {"train": len(names)}
    return Description(vae, "", (scale, *sides), pictures, 0, splits, [], {"name": "EDM2's tool"})


def _open_edm2(path: Path, about: Description) -> Split:
    """Return (mean and std as OnDisk, labels) of all latents in a zip or folder of EDM2's tool."""
    tree, names = _edm2_tree(path)
    channels, height, width = about.shape
    shape = (2 * channels, height, width)
    read = partial(_read_edm2, tree, names, shape)
    raw = partial(_row_bytes, read)
    pixels = OnDisk(read, shape, torch.arange(len(names)), raw=raw, dtype=torch.float32)
    return pixels, edm_labels(tree, names, "")


def _read_edm2(
    tree: Tree, names: list[str], shape: tuple[int, ...] | None, numbers: list[int]
) -> torch.Tensor:
    """Return rows, float32 (B, 2C, h, w); shape None takes any."""
    rows = []
    for number in numbers:
        what = f"data.root={tree.path}: {names[number]}"
        data = tree.read_bytes(names[number])
        try:
            check_npy(io.BytesIO(data), len(data))
            row = np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32)
        except Exception as error:  # numpy raises nearly anything
            raise ValueError(f"{what} cannot be read ({error}); make it again") from None
        if shape is not None and row.shape != shape:
            raise ValueError(f"{what} has shape {row.shape}, not {shape} as the first")
        rows.append(torch.from_numpy(row))
    return torch.stack(rows)


def shard_path(folder: Path, split: str, shard: int) -> Path:
    """Return where a file of a split's latents lies."""
    return folder / f"{split}-{shard:05d}.npy"


def _read_rows(
    folder: Path, split: str, size: int, shape: tuple[int, int, int], numbers: list[int]
) -> torch.Tensor:
    """Return rows of a split, float32 (B, 2C, h, w); each file is opened once."""
    rows = torch.empty(len(numbers), *shape)
    by_shard: dict[int, list[int]] = {}
    for index, number in enumerate(numbers):
        by_shard.setdefault(number // size, []).append(index)
    for shard, indices in by_shard.items():
        path = shard_path(folder, split, shard)
        array = arrays.load_npy(path, "r")
        within = [numbers[index] % size for index in indices]
        if array.dtype != "float32" or array.shape[1:] != shape or len(array) <= max(within):
            raise ValueError(
                f"npy={path}: holds {array.dtype} {array.shape}, not float32 ({size}, "
                f"{', '.join(map(str, shape))}); delete it and encode again"
            )
        rows[indices] = torch.from_numpy(array[within])
    return rows


def _row_bytes(read: Any, number: int) -> bytes:
    return read([number]).numpy().tobytes()


def fill_in_vae(cfg: DataConfig) -> None:
    """Set cfg.vae from the folder of the latents; data.vae.name may be another than theirs.

    Raises:
        ValueError: the model was trained on latents of another scale.
    """
    found = read_description(data_root(cfg)).vae
    for key in ("pixels", "mean", "std"):
        ours, theirs = getattr(cfg.vae, key), getattr(found, key)
        check(
            ours in (theirs, getattr(VAEConfig(), key)),
            f"data.vae.{key}",
            ours,
            f"the latents at data.root={data_root(cfg)} have {theirs}; leave it out, or put the "
            "old ones back",
        )
    cfg.vae = replace(found, name=cfg.vae.name or found.name)


def draw(moments: torch.Tensor, settings: VAEConfig, seed: int, n: torch.Tensor) -> torch.Tensor:
    """Return a latent of each image as a model has them, float32 (B, C, h, w).

    Args:
        moments: mean and std, float32 (B, 2C, h, w).
        settings: of the data.
        seed: of the run.
        n: int64 (B,), positions in the training stream.
    """
    mean, std = moments.chunk(2, dim=1)
    shape = tuple(mean.shape[1:])
    eps = philox_normal(shape, seed, n, stream=int(Stream.LATENT), device=mean.device)
    return scaled_latents(mean + std * eps, settings)


def decoded(
    moments: torch.Tensor | OnDisk, settings: VAEConfig, device: torch.device | str
) -> OnDisk:
    """Return the pictures of latents, uint8 (N, 3, H, W), decoded from their means when read.

    Args:
        moments: mean and std, float32 (N, 2C, h, w).
        settings: of the data.
        device: where to decode.

    Raises:
        ValueError: the VAE cannot be loaded.
    """
    autoencoder = load_autoencoder(settings.name, device)
    channels = shape_of(moments)[0]
    shape = autoencoder.picture_shape(shape_of(moments))

    def read(numbers: list[int]) -> torch.Tensor:
        means = moments[torch.tensor(numbers)][:, :channels]
        return autoencoder.pictures(means, settings.pixels)

    return OnDisk(read, shape, torch.arange(len(moments)))


def shape_of(moments: torch.Tensor | OnDisk) -> tuple[int, ...]:
    """Return (C, h, w) of the latents with these means and stds, (N, 2C, h, w)."""
    return moments.shape[1] // 2, *moments.shape[2:]


def in_words(cfg: DataConfig) -> str:
    """Return what a folder of latents holds, in lines; cfg.vae is filled in."""
    fill_in_vae(cfg)
    about = read_description(data_root(cfg))
    vae = cfg.vae
    lines = [
        f"latents of pictures {about.pictures}, encoded by {about.vae.name} (pixels {vae.pixels}), "
        f"trained on as (z - mean) / (2 std), mean {_shown(vae.mean)}, std {_shown(vae.std)}"
    ]
    if about.class_names:
        shown = [f"{k} {name}" for k, name in enumerate(about.class_names[:10])]
        lines.append(f"classes: {', '.join(shown)}{', ...' * (len(about.class_names) > 10)}")
    return "\n".join(lines)


def _shown(values: list[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def mean_and_std(
    moments: torch.Tensor | OnDisk, settings: VAEConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of latents as a model has them, over all channels."""
    mean, std = scaled_moments(moments, settings)
    return mean.mean(), (std.square().mean() + mean.var(correction=0)).sqrt()


def scaled_moments(
    moments: torch.Tensor | OnDisk, settings: VAEConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and std of each channel of latents as a model has them, float64 (C,)."""
    mean, variance = channel_moments(moments)
    shift, std = (torch.tensor(v, dtype=torch.float64) for v in (settings.mean, settings.std))
    return (mean - shift) / (2 * std), variance.sqrt() / (2 * std)


def channel_moments(moments: torch.Tensor | OnDisk) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance of each channel of z, drawn of all pictures, float64 (C,)."""
    total = squares = torch.zeros((), dtype=torch.float64)
    for part in moments.split(256):
        mean, std = part.double().chunk(2, dim=1)
        total = total + mean.sum(dim=(0, 2, 3))
        squares = squares + (mean**2 + std**2).sum(dim=(0, 2, 3))
    count = len(moments) * moments.shape[2] * moments.shape[3]
    mean = total / count
    return mean, squares / count - mean**2
