"""Batches for training: an endless stream in which image n is fixed by n, and held-out batches.

python -m genmodels.data info digits                          shape, counts, mean and std of a set
python -m genmodels.data info SRC [resolution=64]             of a folder, .zip, .npz or .npy
python -m genmodels.data convert SRC out=X.zip resolution=64 crop=adm     or out=X.npy
python -m genmodels.data get [NAME root=DIR]                  public sets: what they are, fetch one
"""

import signal
import sys

import lightning as L
import torch
from torch.utils.data import DataLoader

from genmodels import cli, images, prepare, seeding
from genmodels.datasets import DATASETS, SPLITS, TERMS, data_root, fill_in, load_split
from genmodels.own_data import OnDisk

__all__ = ["DATASETS", "SPLITS", "TERMS", "ImageDataModule", "TrainStream", "data_root"]
__all__ += ["fill_in", "load_split"]


class Batches:
    """Batches by (positions in the stream n, image numbers): what workers of a DataLoader read.

    A ValueError is returned, not raised: from a worker it would come as a page of traceback.
    """

    def __init__(self, pixels, labels):
        self.pixels, self.labels = pixels, labels

    def __getitem__(self, item):
        """Return the batch as a dict, or the ValueError of a broken file."""
        n, index = item
        try:
            return {"image": self.pixels[index], "label": self.labels[index], "n": n}
        except ValueError as error:
            return error


def _ignore_signals(worker):
    # Ctrl-C and a cluster's SIGTERM go to every process; the trainer's alone saves and ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class TrainStream:
    """Endless iterable of training batches; which image is number n depends on (seed, n) alone.

    Every pass over the data is a fresh permutation. A batch is a dict: `image` uint8 (B, C, H, W),
    `label` int64 (B,), `n` int64 (B,) the position in the stream. Step s takes the numbers
    [s G, (s+1) G); its micro-batches and ranks take their slices.

    Args:
        pixels: uint8 (N, C, H, W), or OnDisk.
        labels: int64 (N,).
        seed: key of the order.
        batch_size: G, over all processes and micro-batches.
        first_step: called when iteration starts.
        accumulate, rank, world: micro-batches per step, this process and how many there are.
        order: which of the random streams draws the order.
        balanced: every run of K images, K the number of classes, holds each class once.
        workers: processes that read OnDisk images ahead of time.
        pairs: images 2k and 2k + 1 stay next to each other, at an even n; an odd last one is left.

    Raises:
        ValueError: a batch that cannot be shared out, or balanced without labels; a broken file.
    """

    def __init__(self, pixels, labels, seed, batch_size, first_step, accumulate=1, rank=0, world=1,
                 order=seeding.Stream.ORDER, balanced=False, workers=0, pairs=False):  # fmt: skip
        if batch_size % (accumulate * world):
            nearest = -(-batch_size // (accumulate * world)) * accumulate * world
            raise ValueError(
                f"data.batch_size={batch_size}: must be a multiple of processes x accumulate = "
                f"{world} x {accumulate}; try {nearest}"
            )
        if balanced and labels.min() < 0:
            raise ValueError("data.balanced=true: there are images without a class; leave it out")
        self.pixels, self.labels, self.seed = pixels, labels, seed
        self.batch_size, self.first_step = batch_size, first_step
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.order, self.workers = order, workers
        self.pairs = pairs
        # The images by class, or all together.
        self.members = [torch.arange(len(labels) // 2 * 2 if pairs else len(labels))]
        if balanced:
            self.members = [(labels.cpu() == c).nonzero()[:, 0] for c in labels.unique().cpu()]

    def __iter__(self):
        batches = Batches(self.pixels, self.labels)
        if isinstance(self.pixels, OnDisk):
            # The numbers are drawn here and read there: workers change no batch and no order.
            batches = DataLoader(
                batches, batch_size=None, sampler=self.numbers(), num_workers=self.workers,
                generator=torch.Generator(), worker_init_fn=_ignore_signals,
                pin_memory=torch.cuda.is_available(),
            )  # fmt: skip
        else:
            batches = map(batches.__getitem__, self.numbers())
        for batch in batches:
            if isinstance(batch, ValueError):
                raise ValueError(str(batch))
            yield batch

    def numbers(self):
        """Yield (n, image numbers), int64 (B,) each, for this rank's micro-batches in order."""
        micro = self.batch_size // self.accumulate
        own = micro // self.world
        start = self.first_step() * self.batch_size + self.rank * own
        orders = {}
        device = self.pixels.device
        while True:
            n = start + torch.arange(own)
            yield n.to(device), self._image_numbers(n, orders).to(device)
            start += micro

    def _image_numbers(self, n, orders):
        """Image n is the next one, in its class's order, of the class whose turn it is."""
        classes, turns = len(self.members), n // len(self.members)
        which = torch.zeros_like(n)
        if classes > 1:
            rounds = torch.arange(int(turns[0]), int(turns[-1]) + 1)
            rows = seeding.permutation(self.seed, rounds, classes, self.order)
            which = rows[turns - turns[0], n % classes]
        index = []
        for number, turn in zip(which.tolist(), turns.tolist()):
            number_of_pass, place = divmod(turn, len(self.members[number]))
            index.append(self._order(orders, number, number_of_pass)[place])
        return torch.tensor(index)

    def _order(self, orders, number, number_of_pass):
        """Return the images of a class in the order of this pass, from the store or anew."""
        if orders.get(number, (None,))[0] != number_of_pass:
            members = self.members[number]
            group = number + 1 if len(self.members) > 1 else 0  # group 0 orders the classes then
            size = len(members) // (1 + self.pairs)
            row = seeding.permutation(self.seed, number_of_pass, size, self.order, group)
            if self.pairs:
                row = torch.stack([2 * row, 2 * row + 1], dim=1).flatten()
            orders[number] = number_of_pass, members[row].numpy()
        return orders[number][1]


class ImageDataModule(L.LightningDataModule):
    """The images of a DataConfig for Lightning: training stream and held-out batches.

    Args:
        cfg: a DataConfig; its shape and classes are filled in.
        seed: key of the order of images.
        accumulate: micro-batches per optimizer step.
    """

    def __init__(self, cfg, seed=0, accumulate=1):
        super().__init__()
        self.cfg, self.seed, self.accumulate = cfg, seed, accumulate
        self.train = load_split(cfg, "train")
        self.held_out = load_split(cfg, "test")
        if not len(self.train[0]):
            raise ValueError(f"data.holdout={cfg.holdout}: leaves no image to train on")
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

    def train_dataloader(self):
        """Return the stream, from the trainer's current step on, for this rank."""
        trainer = self.trainer
        pixels, labels = self.train
        if not isinstance(pixels, OnDisk):
            pixels, labels = pixels.to(self._device()), labels.to(self._device())
        rank, world = trainer.global_rank, trainer.world_size
        first_step = lambda: trainer.global_step  # noqa: E731  read when iteration starts
        return TrainStream(
            pixels, labels, self.seed, self.cfg.batch_size, first_step, self.accumulate, rank,
            world, balanced=self.cfg.balanced, workers=self.cfg.workers,
            pairs=self.cfg.pairs,
        )  # fmt: skip

    def val_dataloader(self):
        """Return this rank's held-out batches; every rank has the same number of them."""
        pixels, labels = self.held_out
        rank, world = self.trainer.global_rank, self.trainer.world_size
        shares = []
        for numbers in torch.arange(len(pixels)).split(self.cfg.batch_size):
            if len(numbers) >= world:
                own = numbers.tensor_split(world)[rank]
                shares.append((seeding.HELD_OUT + own, own))
        return DataLoader(Batches(pixels, labels), batch_size=None, sampler=shares)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        """Return the batch; raise the ValueError that stands for one with a broken file."""
        if isinstance(batch, ValueError):
            raise ValueError(str(batch))
        return batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        """Return the batch with its images as float32 in [-1, 1], training images flipped."""
        pixels = batch["image"]
        pixels = pixels if pixels.is_floating_point() else images.from_uint8(pixels)  # toys: floats
        if self.cfg.flip and self.trainer.training:
            mirrored = seeding.uniform(self.seed, batch["n"], seeding.Stream.FLIP) < 0.5
            pixels = torch.where(mirrored.reshape(-1, 1, 1, 1), pixels.flip(-1), pixels)
        return batch | {"image": pixels}

    def _device(self):
        """Return where the training images live: on the GPU if they take under half its memory."""
        device = self.trainer.strategy.root_device
        if device.type != "cuda" or self.cfg.device == "cpu":
            return torch.device("cpu")
        room = torch.cuda.get_device_properties(device).total_memory / 2
        return device if self.cfg.device == "cuda" or self.train[0].nbytes < room else "cpu"


def main(argv):
    """Describe, convert or fetch a data set; see the module's docstring."""
    positionals, words, flags = cli.split_words(argv)
    cli.check_flags(flags, ("--help",))
    if "--help" in flags or not argv:
        print(prepare.help_text(__doc__))
        return
    command, *sources = positionals or [""]
    cli.check_choice("command", command, tuple(prepare.COMMANDS))
    prepare.COMMANDS[command](sources, words)


if __name__ == "__main__":
    sys.exit(cli.run(main))
