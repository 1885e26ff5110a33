"""Images by NAME[:SPLIT] of a data set or from a path: the one reader of what a command names.

What a path holds is read by images.open_images.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from genmodels.config import DataConfig
from genmodels.data import latents
from genmodels.data.own import Split
from genmodels.data.sets import DATASETS, data_set, load_split, open_split
from genmodels.distributed import pick_device
from genmodels.images import OnDisk, open_images

_HELD = 4 << 30  # bytes of pictures held; more are read as they are needed


@dataclass(frozen=True)
class SourceImages:
    """The images of a source, with what else is known of them.

    Args:
        pixels: uint8 (N, C, H, W), or OnDisk what would fill the memory; float32 points in the
            plane of the 2-D toys.
        labels: int64 (N,) of a data set, -1 = none; None of files.
        files: a name for each of images in files; none of a data set.
        cfg: DataConfig that a data set was read with; None of files.
        device: where latents are decoded.
    """

    pixels: torch.Tensor | OnDisk
    labels: torch.Tensor | None = None
    files: tuple[str, ...] = ()
    cfg: DataConfig | None = None
    device: str = "auto"

    @property
    def names(self) -> list[str]:
        """What tells each image from the others: its file, else its number."""
        return list(self.files) or [str(number) for number in range(len(self.pixels))]

    def splits(self) -> dict[str, torch.Tensor | OnDisk]:
        """Return the images of both splits, {"train": ..., "held_out": ...}; of files nothing."""
        if self.cfg is None:
            return {}
        train, test = (_pictures(self.cfg, split, self.device)[0] for split in ("train", "test"))
        return {"train": train, "held_out": test}


def with_split(source: str, split: str) -> str:
    """Return a data set's name with this split, if it names none; any other source as it is."""
    return f"{source}:{split}" if source in DATASETS else source


def read_source(
    source: str,
    *,
    root: str = "",
    pad: int = -1,
    trained_on: DataConfig | None = None,
    channels: int | None = None,
    resolution: int = 0,
    crop: str = "center",
    key: str = "images",
    device: str = "auto",
) -> SourceImages:
    """Return the images of a data set, or of files; latents decoded from their means.

    A name of DATASETS is the data set even where a folder of that name lies beside: write ./NAME
    for the folder.

    Args:
        source: NAME or NAME:SPLIT of a data set (train if no split is named), or the path of a
            picture, folder, .zip, .npz or .npy.
        root: where the data set lies; "" = as in training, else $GENMODELS_DATA, else ./data.
        pad: background pixels on each side of its images; -1 = as in training, else 0.
        trained_on: DataConfig of a model, used for its own data set.
        channels: images in files become grey (1) or RGB (3); None leaves them as they are, but for
            grey pictures among colour ones.
        resolution, crop: images in files are cropped and resized, see images.fit; 0: not.
        key: what errors call the source.
        device: where latents are decoded.

    Raises:
        ValueError: no such data set, split or path; broken or mixed images.
    """
    name, _, split = source.partition(":")
    if trained_on is not None and name == trained_on.name:
        cfg = replace(trained_on)
    elif name in DATASETS:
        cfg = DataConfig(name=name)
    else:
        pixels, names = open_images(Path(source), channels, side=resolution, crop=crop, key=key)
        if isinstance(pixels, OnDisk) and pixels.nbytes <= _HELD:
            pixels = pixels.load()
        return SourceImages(pixels, files=tuple(names))
    cfg.root = root or cfg.root
    cfg.pad = cfg.pad if pad < 0 else pad
    pixels, labels = _pictures(cfg, split or "train", device)
    return SourceImages(pixels, labels, cfg=cfg, device=device)


def _pictures(cfg: DataConfig, split: str, device: str) -> Split:
    """Return (pictures, labels) of a split of a data set."""
    if not data_set(cfg.name).latents:
        return load_split(cfg, split)
    pixels, labels = open_split(cfg, split)
    latents.fill_in_vae(cfg)
    return latents.decoded(pixels, cfg.vae, pick_device(device)), labels
