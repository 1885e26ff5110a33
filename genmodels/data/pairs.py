"""Real images, each beside a fake one: what DDO trains on."""

from collections.abc import Iterator

import torch

from genmodels import images, seeding
from genmodels.config import DataConfig, check
from genmodels.data.module import ImageDataModule
from genmodels.data.stream import TrainStream


class PairedData(ImageDataModule):
    """Real images, each beside a fake one: batches also hold `fake` and `fake_label`.

    `pool` is (images uint8 (N, C, H, W), labels int64 (N,)), set before training; of latents its
    images are float32, as the reference makes them. Which fake is
    number n depends on (seed, n) alone, as with real images.
    """

    pool: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, cfg: DataConfig, seed: int = 0, accumulate: int = 1):
        super().__init__(cfg, seed, accumulate)
        floats = self.train[0].is_floating_point() and not cfg.vae.mean
        check(
            not floats,
            "data.name",
            cfg.name,
            "fakes are kept as bytes, so rounding alone would tell them from these points; write "
            "them to an .npz as uint8",
        )

    def train_dataloader(self) -> "Pairs":
        """Return the stream of pairs, from the trainer's current step on, for this rank."""
        real = super().train_dataloader()
        pixels, labels = (tensor.to(real.pixels.device) for tensor in self.pool)
        fake = TrainStream(
            pixels,
            labels,
            self.seed,
            real.batch_size,
            first_step=real.first_step,
            accumulate=real.accumulate,
            rank=real.rank,
            world=real.world,
            order=seeding.Stream.FAKE_ORDER,
        )
        return Pairs(real, fake)

    def on_after_batch_transfer(
        self, batch: dict[str, torch.Tensor], dataloader_idx: int
    ) -> dict[str, torch.Tensor]:
        """Return the batch with float32 images in [-1, 1]; only real ones are flipped or drawn."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if "fake" not in batch:  # held-out images stand alone
            return batch
        fake = batch["fake"]
        return batch | {"fake": fake if fake.is_floating_point() else images.from_uint8(fake)}


class Pairs:
    """Endless iterable: the batches of one TrainStream with those of another beside them."""

    def __init__(self, real: TrainStream, fake: TrainStream):
        self.real = real
        self.fake = fake

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for real, fake in zip(self.real, self.fake):
            yield real | {"fake": fake["image"], "fake_label": fake["label"]}
