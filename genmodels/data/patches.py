"""Noisy pictures for training denoisers: patches cut at random from pictures of any size.

What the network may learn from is data.noise.copies, and is saved with the model:

    fixed   one noisy copy of each picture, made once: strict self-supervision
    fresh   new noise for every patch, from the clean picture: unlimited noisy views
    given   the pictures are noisy themselves: nothing is added
"""

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from genmodels import seeding
from genmodels.config import check
from genmodels.data.own import held_out_share
from genmodels.data.sets import picture_tree
from genmodels.data.stream import TrainStream
from genmodels.images import from_uint8, to_uint8
from genmodels.images.pictures import find
from genmodels.noise import told_law
from genmodels.noise.levels import level_from_patches

# What a numpy generator of [seed, number, which] draws. Not 0, for numpy drops zeros at the end and
# [seed, number] is the noise that evaluate.py adds to picture `number`.
FIRST, SECOND, LEVEL, FRESH = range(1, 5)


class NoisyDataModule(L.LightningDataModule):
    """Patches of noisy pictures for Lightning; image n of the stream depends on (seed, n) alone.

    A batch is a dict: `image` the noisy patches, float32 (B, C, P, P) on the [-1, 1] scale, not
    clipped; `level` float32 (B,) in the law's unit; `label` -1, `n` int64 (B,). data.noise.target
    adds `target`, the clean patches or those of a second noisy copy; without it nothing clean
    leaves this class. Patches are turned and mirrored at random.

    Args:
        cfg: a DataConfig; its shape and classes are filled in.
        seed: key of the noise, the order and the cuts.
        accumulate: micro-batches per optimizer step.

    Raises:
        ValueError: an unknown law or level, no pictures, one smaller than a patch, or a setting of
            other data that would be ignored.
    """

    def __init__(self, cfg, seed=0, accumulate=1):
        super().__init__()
        self.cfg, self.seed, self.accumulate = cfg, seed, accumulate
        self.law, channels = told_law(cfg.noise), cfg.channels or 3
        for key in ("resolution", "pad", "labels", "flip", "balanced", "pairs"):
            check(
                not getattr(cfg, key),
                f"data.{key}",
                getattr(cfg, key),
                "is not for patches of noisy pictures; leave it out",
            )
        given = cfg.noise.copies == "given"
        pictures = (_as_they_are if given else _as_bytes)(picture_tree(cfg), channels)
        for name, picture in pictures:
            check(
                min(picture.shape[1:]) >= cfg.patch,
                "data.patch",
                cfg.patch,
                f"{name} is {tuple(picture.shape[1:])}; take smaller patches",
            )
        cfg.shape, cfg.classes = [channels, cfg.patch, cfg.patch], 0
        files = {name: k for k, name in enumerate(dict.fromkeys(name for name, _ in pictures))}
        file = torch.tensor([files[name] for name, _ in pictures])
        self.numbers = {}
        for split in ("train", "test"):  # a picture is held out with all its channels
            share = held_out_share(cfg, split, len(files))
            self.numbers[split] = torch.isin(file, share).nonzero().flatten()
        check(
            len(self.numbers["train"]), "data.holdout", cfg.holdout, "leaves no picture to train on"
        )
        self.views, self.levels = self._views(pictures)

    def _views(self, named):
        """Return ({key of a batch: pictures}, their levels); of fresh noise only the clean ones."""
        noise, pictures = self.cfg.noise, [picture for _, picture in named]
        if noise.copies == "fresh":
            return {"target": pictures}, []
        if noise.copies == "given":
            return {"image": pictures}, [noise.level or self._found(*item) for item in named]
        levels = [self._level(self._rng(k, LEVEL)) for k in range(len(pictures))]

        def copies(which):
            return [self._noisy(p, levels[k], self._rng(k, which)) for k, p in enumerate(pictures)]

        views = {"image": copies(FIRST)}
        if noise.target != "none":
            views["target"] = copies(SECOND) if noise.target == "second" else pictures
        return views, levels

    def _found(self, name, picture):
        """The level of a picture, from the picture."""
        try:
            return float(level_from_patches((picture.double() + 1) / 2, self.law))
        except ValueError as error:
            reason = (
                str(error).removeprefix("level=auto: ").replace("the level", "data.noise.level")
            )
            raise ValueError(f"data.noise.level=0: {name}: {reason}") from None

    def _rng(self, number, which):
        return np.random.default_rng([self.seed, number, which])

    def _level(self, rng):
        """The level of a picture or patch: the one told, or drawn evenly in log."""
        low, high = self.cfg.noise.level, self.cfg.noise.level_max
        return low * (high / low) ** rng.random() if high else low

    def _noisy(self, clean, level, rng):
        """A noisy copy of uint8 pixels, float32 on the [-1, 1] scale."""
        return torch.from_numpy(self.law.sample(clean.numpy() / 255, level, rng) * 2 - 1).float()

    def cut(self, n, numbers):
        """Return the batch of stream positions n from these pictures, both int64 (B,)."""
        streams = (seeding.Stream.CUT, seeding.Stream.CUT_ROW, seeding.Stream.TURN)
        places = zip(*(seeding.uniform(self.seed, n, stream).tolist() for stream in streams))
        items = [self._patch(*item) for item in zip(n.tolist(), numbers.tolist(), places)]
        batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
        return batch | {"label": torch.full_like(n, -1), "n": n}

    def _patch(self, n, number, place):
        """Return {key: patch} of one picture and its level."""
        item = {
            key: _cut(pictures[number], self.cfg.patch, place)
            for key, pictures in self.views.items()
        }
        if self.levels:
            level = self.levels[number]
        else:
            rng, clean = self._rng(n, FRESH), item.pop("target")
            level = self._level(rng)
            item["image"] = self._noisy(clean, level, rng)
            if self.cfg.noise.target != "none":
                second = self.cfg.noise.target == "second"
                item["target"] = self._noisy(clean, level, rng) if second else clean
        item = {key: from_uint8(p) if p.dtype == torch.uint8 else p for key, p in item.items()}
        return item | {"level": torch.tensor(level, dtype=torch.float32)}

    @torch.no_grad()
    def preview(self, model, num):
        """Return noisy | restored held-out patches, uint8 (num, C, P, 2 P); fixed ones.

        Where nothing is held out they are of training pictures.
        """
        p, numbers = torch.arange(num), self.numbers["test"]
        numbers = numbers if len(numbers) else self.numbers["train"]
        batch = self.cut(seeding.HELD_OUT + p, numbers[p % len(numbers)])
        y, level = ((batch["image"] + 1) / 2).to(model.device), batch["level"].to(model.device)
        return to_uint8(torch.cat([y, model.estimate(y, level)], dim=-1).cpu() * 2 - 1)

    def train_dataloader(self):
        """Return the stream, from the trainer's current step on, for this rank."""
        trainer, numbers = self.trainer, self.numbers["train"]
        first_step = lambda: trainer.global_step  # noqa: E731  read when iteration starts
        stream = TrainStream(
            torch.empty(0),
            torch.zeros(len(numbers)),
            self.seed,
            self.cfg.batch_size,
            first_step,
            self.accumulate,
            trainer.global_rank,
            trainer.world_size,
        )
        return Patches(self, stream, numbers)

    def val_dataloader(self):
        """Return this rank's patches of held-out pictures: 16 of each, fixed."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        count = 16 * len(self.numbers["test"])
        parts = [
            part for part in torch.arange(count).split(self.cfg.batch_size) if len(part) >= world
        ]
        own = [part.tensor_split(world)[rank] for part in parts]
        batches = [self.cut(seeding.HELD_OUT + p, self.numbers["test"][p // 16]) for p in own]
        return DataLoader(batches, batch_size=None)


class Patches:
    """Iterable of batches over the numbers of a TrainStream."""

    def __init__(self, data, stream, numbers):
        self.data, self.stream, self.numbers = data, stream, numbers

    def __iter__(self):
        for n, places in self.stream.numbers():
            yield self.data.cut(n, self.numbers[places])


def _as_bytes(tree, channels):
    """Return [(name, uint8 (C, H, W))] of clean pictures."""
    check(tree.names, "data.root", tree.path, "holds no picture")
    return [(name, tree.read(name, channels)) for name in tree.names]


def _as_they_are(tree, channels):
    """Return [(name, float32 (C, H, W) on the [-1, 1] scale)] of noisy pictures.

    For a grey model every channel of a colour picture is a picture: an average has other noise.
    """
    found = []
    for name, read in find(tree.path, "data.root").items():
        stack = read().images()
        for k, image in enumerate(stack):
            check(
                len(image) == channels or channels == 1,
                "data.channels",
                channels,
                f"{name} is grey; take data.channels=1",
            )
            parts = [image] if len(image) == channels else image.split(1)
            found += [(name if len(stack) == 1 else f"{name}[{k}]", part) for part in parts]
    return found


def _cut(picture, side, place):
    """Return a square of the picture (C, H, W), turned and mirrored; place: three uniforms."""
    row, column, turn = place
    top, left = (int(u * (size - side + 1)) for u, size in zip((row, column), picture.shape[1:]))
    patch = torch.rot90(picture[:, top : top + side, left : left + side], int(turn * 4), (1, 2))
    return patch.flip(-1) if turn * 8 % 2 >= 1 else patch
