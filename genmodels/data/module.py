"""The images of a DataConfig for Lightning: training stream and held-out batches."""

from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from genmodels import images, seeding
from genmodels.config import DataConfig
from genmodels.data import latents
from genmodels.data.fingerprint import fingerprint, note_fingerprint
from genmodels.data.sets import (
    data_root,
    fill_in,
    in_memory,
    load_source,
    load_split,
    open_split,
)
from genmodels.data.stream import Batches, TrainStream
from genmodels.images import OnDisk


class ImageDataModule(L.LightningDataModule):
    """The images of a DataConfig for Lightning: training stream and held-out batches.

    Args:
        cfg: a DataConfig; its shape, classes, present and fingerprint are filled in.
        seed: key of the order of images.
        accumulate: micro-batches per optimizer step.

    Raises:
        ValueError: what cannot be read, no image to train on, training and held-out images of two
            shapes, labels that are asked for and not there, or other images than the run's.
    """

    def __init__(self, cfg: DataConfig, seed: int = 0, accumulate: int = 1):
        super().__init__()
        self.cfg = cfg
        self.seed = seed
        self.accumulate = accumulate
        pixels, labels = open_split(cfg, "train")
        if not len(pixels):
            raise ValueError(f"data.holdout={cfg.holdout}: leaves no image to train on")
        found = fingerprint(pixels, labels)
        self.sources: dict[str, torch.Tensor] = {}  # images of data.source by split
        if cfg.source:
            shape = pixels.shape[1:]
            self.sources = {split: load_source(cfg, split, shape) for split in ("train", "test")}
            train = self.sources["train"]
            found += f"+{fingerprint(train, torch.zeros(len(train), dtype=torch.int64))}"
        note_fingerprint(cfg, found)
        self.train = pixels if cfg.device == "disk" else in_memory(pixels), labels
        self.held_out = load_split(cfg, "test")
        fill_in(cfg, *self.train)
        shapes = [tuple(part[0].shape[1:]) for part in (self.train, self.held_out)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"data.root={data_root(cfg)}: training images are {shapes[0]}, held-out ones "
                f"{shapes[1]}; make them alike, or crop pictures with data.resolution=SIDE"
            )
        if cfg.balanced and self.train[1].min() < 0:
            raise ValueError(f"data.balanced=true: {cfg.name} has images without a class label")
        top = max(self.held_out[1].tolist(), default=-1)
        if cfg.labels and top >= cfg.classes:
            raise ValueError(
                f"data.holdout={cfg.holdout}: class {top} is among the held-out images only; "
                "hold out fewer, or put some of it into training"
            )

    def train_dataloader(self) -> TrainStream:
        """Return the stream, from the trainer's current step on, for this rank."""
        trainer = self.trainer
        pixels, labels = self.train
        if not isinstance(pixels, OnDisk):
            pixels, labels = pixels.to(self._device()), labels.to(self._device())
        return TrainStream(
            pixels,
            labels,
            self.seed,
            self.cfg.batch_size,
            first_step=lambda: trainer.global_step,
            accumulate=self.accumulate,
            rank=trainer.global_rank,
            world=trainer.world_size,
            balanced=self.cfg.balanced,
            workers=self.cfg.workers,
            pairs=self.cfg.pairs,
        )

    def val_dataloader(self) -> DataLoader:
        """Return this rank's held-out batches; every rank has the same number of them."""
        pixels, labels = self.held_out
        world = self.trainer.world_size
        shares = []
        for numbers in torch.arange(len(pixels)).split(self.cfg.batch_size):
            if len(numbers) >= world:
                share = numbers.tensor_split(world)[self.trainer.global_rank]
                shares.append((seeding.HELD_OUT + share, share))
        return DataLoader(Batches(pixels, labels), batch_size=None, sampler=shares)

    def pictures(self, split: str, device: torch.device | str = "cpu") -> torch.Tensor | OnDisk:
        """Return the images of "train" or "held_out" as a metric sees them, uint8 (N, C, H, W).

        Args:
            split: which.
            device: where latents are decoded.

        Raises:
            ValueError: latents whose VAE cannot be loaded.
        """
        pixels = getattr(self, split)[0]
        return latents.decoded(pixels, self.cfg.vae, device) if self.cfg.vae.mean else pixels

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch; raise the ValueError that stands for one with a broken file."""
        if isinstance(batch, ValueError):
            raise ValueError(str(batch))
        return batch

    def on_after_batch_transfer(
        self, batch: dict[str, torch.Tensor], dataloader_idx: int
    ) -> dict[str, torch.Tensor]:
        """Return the batch with its images as float32 in [-1, 1], training images flipped.

        Of latents it is a draw of each, on the scale of the model.
        """
        pixels = batch["image"]
        if self.cfg.vae.mean:
            pixels = latents.draw(pixels, self.cfg.vae, self.seed, batch["n"])
        pixels = pixels if pixels.is_floating_point() else images.from_uint8(pixels)  # toys: floats
        if self.cfg.flip and self.trainer.training:
            mirrored = seeding.uniform(self.seed, batch["n"], seeding.Stream.FLIP) < 0.5
            pixels = torch.where(mirrored.reshape(-1, 1, 1, 1), pixels.flip(-1), pixels)
        batch = batch | {"image": pixels}
        return batch | {"source": self._source(batch["n"])} if self.sources else batch

    def _source(self, n: torch.Tensor) -> torch.Tensor:
        """Return where the paths of images n begin, drawn by (seed, n) from the split of these."""
        split = "train" if self.trainer.training else "test"
        pixels = self.sources[split] = self.sources[split].to(n.device)
        u = seeding.uniform(self.seed, n, seeding.Stream.SOURCE)
        pixels = pixels[(u.double() * len(pixels)).long()]
        return pixels if pixels.is_floating_point() else images.from_uint8(pixels)

    def _device(self) -> torch.device:
        """Return where the training images live: on the GPU if they take under half its memory."""
        root = self.trainer.strategy.root_device
        return home_of_images(root, self.cfg.device, self.train[0].nbytes)


def home_of_images(device: torch.device, setting: str, nbytes: int) -> torch.device:
    """Return where training images live: on the GPU if they take under half its memory.

    Args:
        device: what trains.
        setting: data.device.
        nbytes: of all images.
    """
    if device.type != "cuda" or setting == "cpu":
        return torch.device("cpu")
    room = torch.cuda.get_device_properties(device).total_memory / 2
    return device if setting == "cuda" or nbytes < room else torch.device("cpu")
