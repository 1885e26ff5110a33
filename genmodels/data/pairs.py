"""Real images, each beside a fake one: what DDO trains on."""

import torch

from genmodels import images, seeding
from genmodels.config import check
from genmodels.data.module import ImageDataModule
from genmodels.data.own import OnDisk
from genmodels.data.stream import TrainStream


class PairedData(ImageDataModule):
    """Real images, each beside a fake one: batches also hold `fake` and `fake_label`.

    `pool` is (images uint8 (N, C, H, W), labels int64 (N,)), set before training. Which fake is
    number n depends on (seed, n) alone, as with real images.
    """

    pool: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, cfg, seed=0, accumulate=1):
        super().__init__(cfg, seed, accumulate)
        floats = not isinstance(self.train[0], OnDisk) and self.train[0].is_floating_point()
        check(
            not floats,
            "data.name",
            cfg.name,
            "fakes are kept as bytes, so rounding alone would "
            "tell them from these points; write them to an .npz as uint8",
        )

    def train_dataloader(self):
        """Return the stream of pairs, from the trainer's current step on, for this rank."""
        real = super().train_dataloader()
        pixels, labels = (tensor.to(real.pixels.device) for tensor in self.pool)
        fake = TrainStream(
            pixels,
            labels,
            self.seed,
            real.batch_size,
            real.first_step,
            real.accumulate,
            real.rank,
            real.world,
            seeding.Stream.FAKE_ORDER,
        )
        return Pairs(real, fake)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        """Return the batch with float32 images in [-1, 1]; only real ones are flipped."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return batch | ({"fake": images.from_uint8(batch["fake"])} if "fake" in batch else {})


class Pairs:
    """Endless iterable: the batches of one TrainStream with those of another beside them."""

    def __init__(self, real, fake):
        self.real, self.fake = real, fake

    def __iter__(self):
        for real, fake in zip(self.real, self.fake):
            yield real | {"fake": fake["image"], "fake_label": fake["label"]}
