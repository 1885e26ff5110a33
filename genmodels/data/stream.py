"""Batches for training: an endless stream in which image n is fixed by n."""

import signal
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader

from genmodels import seeding
from genmodels.images import OnDisk


class Batches:
    """Batches by (positions in the stream n, image numbers): what workers of a DataLoader read.

    A ValueError is returned, not raised: from a worker it would come as a page of traceback.
    """

    def __init__(self, pixels: torch.Tensor | OnDisk, labels: torch.Tensor):
        self.pixels = pixels
        self.labels = labels

    def __getitem__(
        self, item: tuple[torch.Tensor, torch.Tensor]
    ) -> dict[str, torch.Tensor] | ValueError:
        """Return the batch as a dict, or the ValueError of a broken file."""
        n, index = item
        try:
            return {"image": self.pixels[index], "label": self.labels[index], "n": n}
        except ValueError as error:
            return error


def _ignore_signals(worker: int) -> None:  # noqa: ARG001
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

    def __init__(
        self,
        pixels: torch.Tensor | OnDisk,
        labels: torch.Tensor,
        seed: int,
        batch_size: int,
        first_step: Callable[[], int],
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        order: seeding.Stream = seeding.Stream.ORDER,
        balanced: bool = False,
        workers: int = 0,
        pairs: bool = False,
    ):
        if batch_size % (accumulate * world):
            nearest = -(-batch_size // (accumulate * world)) * accumulate * world
            raise ValueError(
                f"data.batch_size={batch_size}: must be a multiple of processes x accumulate = "
                f"{world} x {accumulate}; try {nearest}"
            )
        if balanced and labels.min() < 0:
            raise ValueError("data.balanced=true: there are images without a class; leave it out")
        self.pixels = pixels
        self.labels = labels
        self.seed = seed
        self.batch_size = batch_size
        self.first_step = first_step
        self.accumulate = accumulate
        self.rank = rank
        self.world = world
        self.order = order
        self.workers = workers
        self.pairs = pairs
        # The images by class, or all together.
        self.members = [torch.arange(len(labels) // 2 * 2 if pairs else len(labels))]
        if balanced:
            self.members = [(labels.cpu() == c).nonzero()[:, 0] for c in labels.unique().cpu()]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batches = Batches(self.pixels, self.labels)
        if isinstance(self.pixels, OnDisk):
            # The numbers are drawn here and read there: workers change no batch and no order.
            batches = DataLoader(
                batches,
                batch_size=None,
                sampler=self.numbers(),
                num_workers=self.workers,
                generator=torch.Generator(),
                worker_init_fn=_ignore_signals,
                pin_memory=torch.cuda.is_available(),
            )
        else:
            batches = map(batches.__getitem__, self.numbers())
        for batch in batches:
            if isinstance(batch, ValueError):
                raise ValueError(str(batch))
            yield batch

    def numbers(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (n, image numbers), int64 (B,) each, for this rank's micro-batches in order."""
        micro = self.batch_size // self.accumulate
        share = micro // self.world
        start = self.first_step() * self.batch_size + self.rank * share
        orders = {}
        device = self.pixels.device
        while True:
            n = start + torch.arange(share)
            yield n.to(device), self._image_numbers(n, orders).to(device)
            start += micro

    def _image_numbers(
        self, n: torch.Tensor, orders: dict[int, tuple[int, torch.Tensor]]
    ) -> torch.Tensor:
        """Image n is the next one, in its class's order, of the class whose turn it is."""
        count = len(self.members)
        turns = n // count
        classes = torch.zeros_like(n)
        if count > 1:
            rounds = torch.arange(int(turns[0]), int(turns[-1]) + 1)
            rows = seeding.permutation(self.seed, rounds, count, self.order)
            classes = rows[turns - turns[0], n % count]
        numbers = torch.empty_like(n)
        for label in classes.unique().tolist():
            of_class = (classes == label).nonzero()[:, 0]
            passes = turns[of_class] // len(self.members[label])
            positions = turns[of_class] % len(self.members[label])
            for number_of_pass in passes.unique().tolist():  # in order: the store holds one
                now = passes == number_of_pass
                order = self._order(orders, label, number_of_pass)
                numbers[of_class[now]] = order[positions[now]]
        return numbers

    def _order(
        self, orders: dict[int, tuple[int, torch.Tensor]], label: int, number_of_pass: int
    ) -> torch.Tensor:
        """Return the images of a class in the order of this pass, from the store or anew."""
        if orders.get(label, (None,))[0] != number_of_pass:
            members = self.members[label]
            group = label + 1 if len(self.members) > 1 else 0  # group 0 orders the classes then
            size = len(members) // (1 + self.pairs)
            row = seeding.permutation(self.seed, number_of_pass, size, self.order, group)
            if self.pairs:
                row = torch.stack([2 * row, 2 * row + 1], dim=1).flatten()
            orders[label] = number_of_pass, members[row]
        return orders[label][1]
