"""Images to score: real ones, or a model's, read or made only when they are looked at."""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from genmodels import generation
from genmodels.distributed import gather
from genmodels.images import OnDisk, as_bytes, write_npz, write_png
from genmodels.images.autoencoder import decoder_of


class ImageSource(Protocol):
    """What a pass over images reads: Pictures, Generated, or anything like them."""

    shape: tuple[int, ...]  # (C, H, W)

    def __len__(self) -> int:
        """Return the number of images."""

    def read(self, index: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the images of these numbers, uint8 (B, C, H, W)."""


class Pictures:
    """Images that exist: a uint8 tensor (N, C, H, W), or OnDisk, which stands in for one.

    Points in the plane, float32 in [-1, 1], are read as bytes too, as a model's are.
    """

    def __init__(self, pixels: torch.Tensor | OnDisk):
        self.pixels = pixels
        self.shape = tuple(pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: torch.Tensor, batch: int = 64) -> Iterator[torch.Tensor]:
        """Yield the images of these numbers, uint8 (B, C, H, W)."""
        for part in index.split(batch):
            yield as_bytes(self.pixels[part])

    def identity(self) -> str:
        """Return what tells this set from another: the sha256 of its pixels."""
        return sha256_of(self.read(torch.arange(len(self))))


class Generated:
    """Images that a model makes when they are read; image k depends on seeds[k] alone.

    Args:
        model: a method in eval mode.
        seeds: one for each image.
        labels: one for each seed, or None.
        save: "" or where to keep the images: a folder for SEED.png, or an .npz that write_npz()
            writes in the end.
        again: they will be read more than once: what is made is kept, N C H W bytes in a file
            without a name, which is gone with the process.
        settings: of generation.generate.

    Raises:
        ValueError: the folder holds images of other seeds.
    """

    def __init__(
        self,
        model: Any,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        *,
        save: str = "",
        again: bool = False,
        **settings: Any,
    ):
        self.model = model
        self.seeds = list(seeds)
        self.labels = labels
        self.shape = generation.picture_shape(model)
        self.settings = settings
        self.save = save
        self.images: dict[int, np.ndarray] = {}  # by number, those to write as .npz
        self.made: np.memmap | None = None
        self.is_made = np.zeros(len(self.seeds), bool)
        if again:
            size = (len(self.seeds), *self.shape)
            self.made = np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=size)  # noqa: SIM115
        if save and not save.endswith(".npz"):
            generation.check_folder("save_images", Path(save), self.seeds)

    def __len__(self) -> int:
        return len(self.seeds)

    def read(self, index: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the images of these numbers, uint8 (B, C, H, W)."""
        for made, group in groupby(index.tolist(), lambda number: bool(self.is_made[number])):
            numbers = list(group)
            if not made:
                yield from self._make(numbers)
            elif self.made is not None:
                for start in range(0, len(numbers), 64):
                    yield torch.from_numpy(self.made[numbers[start : start + 64]])

    def _make(self, numbers: list[int]) -> Iterator[torch.Tensor]:
        """Yield the images of these numbers as the model makes them."""
        seeds = [self.seeds[number] for number in numbers]
        labels = None
        if self.labels is not None:
            labels = [self.labels[number] for number in numbers]
        settings = {"progress": False} | self.settings
        for made, _, pictures in generation.generate(self.model, seeds, labels, **settings):
            batch, numbers = numbers[: len(made)], numbers[len(made) :]
            if self.save.endswith(".npz"):
                self.images |= dict(zip(batch, pictures.numpy()))
            elif self.save:
                Path(self.save).mkdir(exist_ok=True)
                for seed, picture in zip(made, pictures):
                    write_png(Path(self.save) / f"{seed:06d}.png", picture)
            if self.made is not None:
                self.made[batch] = pictures.numpy()
                self.is_made[batch] = True
            yield pictures

    def warm_up(self) -> float:
        """Return the seconds of a first batch that is dropped: it compiles the network."""
        return generation.warm_up(self.model, self.seeds, self.labels, **self.settings)

    def forget(self) -> None:
        """Let go of the images that were kept for another pass."""
        self.made = None
        self.is_made[:] = False

    def write_npz(self) -> None:
        """Write the images of all processes in the order of the seeds, if an .npz was named."""
        if not self.save.endswith(".npz"):
            return
        shares = gather(self.images)
        if shares is not None:
            together = {number: picture for share in shares for number, picture in share.items()}
            table = np.stack([together[number] for number in range(len(self))])
            table = table.transpose(0, 2, 3, 1)
            write_npz(self.save, images=table, seeds=np.array(self.seeds))

    def identity(self) -> list[Any]:
        """Return what tells this set from another: weights, seeds, labels and settings."""
        # The batch changes no image: after a lack of memory the pass goes on with a smaller one.
        settings = {k: _as_plain(v) for k, v in self.settings.items() if k not in ("batch", "fill")}
        words = [self.seeds, self.labels, settings, *self.model.faster]
        if decoder := decoder_of(self.model.cfg.data.vae, self.model.device):
            words.append(sha256_of(decoder.autoencoder.vae.state_dict().values()))
        return [sha256_of(self.model.state_dict().values()), words]


def _as_plain(value: Any) -> Any:
    """Return a setting as plain data; a guide becomes the hash of its weights."""
    is_model = isinstance(value, torch.nn.Module)
    return sha256_of(value.state_dict().values()) if is_model else value


def sha256_of(tensors: Iterable[torch.Tensor]) -> str:
    """Return the sha256 of the tensors' bytes and shapes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        digest.update(str(tuple(array.shape[1:])).encode())
        digest.update(array.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def some_of(
    key: str, pixels: torch.Tensor | OnDisk, names: Sequence[str], num: int, seed: int
) -> tuple[torch.Tensor | OnDisk, list[str]]:
    """Return `num` of the images (N, C, H, W), drawn by the seed, in their order; and their names.

    Raises:
        ValueError: there are not so many; `key` begins the line.
    """
    if num > len(pixels):
        raise ValueError(f"num={num}: {key} holds {len(pixels)} images; give no more")
    pick = np.sort(np.random.default_rng(seed).permutation(len(pixels))[:num])
    chosen = torch.from_numpy(pick)
    some = (
        replace(pixels, numbers=pixels.numbers[chosen])
        if isinstance(pixels, OnDisk)
        else pixels[chosen]
    )
    return some, [names[k] for k in pick] if names else []


def reading_options(options: Any, model: Any = None) -> dict[str, Any]:
    """Return the keyword arguments of read_source that options and a model give.

    Args:
        options: with root and pad, and with channels, resolution and crop where files are taken.
        model: a method, or None.
    """
    reading = {"root": options.root, "pad": options.pad, "device": options.device}
    if hasattr(options, "resolution"):
        reading |= {"channels": options.channels or None, "resolution": options.resolution}
        reading |= {"crop": options.crop}
    return reading | {"trained_on": model.cfg.data if model else None}


def check_shape(
    source: str, shape: Sequence[int] | None, model: Any, key: str = "data", files: bool = False
) -> None:
    """Raise ValueError unless the model makes images of a source's shape (C, H, W), if known.

    Args:
        source: as it was named by `key`.
        shape: of its images.
        model: a method.
        key: of the command line.
        files: whether the command takes channels= and resolution= for images in files.
    """
    made = generation.picture_shape(model)
    if shape and tuple(shape) != made:
        remedy = "name a set of that shape, or pad= background around it"
        if files and shape[1:] == made[1:]:
            remedy = f"channels={made[0]} reads images in files so"
        elif files and shape[0] == made[0]:
            remedy += f", or resolution={made[-1]} for images in files"
        raise ValueError(
            f"{key}={source}: has images of shape {tuple(shape)}, the model makes {made}; {remedy}"
        )
