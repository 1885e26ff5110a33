"""Noisy pictures for training denoisers: patches cut at random from pictures of any size.

What the network may learn from is data.noise.copies, and is saved with the model:

    fixed   one noisy copy of each picture, made once: strict self-supervision
    fresh   new noise for every patch, from the clean picture: unlimited noisy views
    given   the pictures are noisy themselves: nothing is added
"""

from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from genmodels import seeding
from genmodels.config import DataConfig, check
from genmodels.data.fingerprint import digest, note_fingerprint
from genmodels.data.own import held_out_share
from genmodels.data.sets import picture_tree
from genmodels.data.stream import TrainStream
from genmodels.images import Tree, from_uint8, to_uint8
from genmodels.images.pictures import find_pictures
from genmodels.noise import law_of
from genmodels.noise.levels import level_from_patches

# What a numpy generator of [seed, number, draw] draws. Not 0, for numpy drops zeros at the end and
# [seed, number] is the noise that evaluate.py adds to picture `number`.
FIRST, SECOND, LEVEL, FRESH = range(1, 5)


class NoisyDataModule(L.LightningDataModule):
    """Patches of noisy pictures for Lightning; image n of the stream depends on (seed, n) alone.

    A batch is a dict: `image` the noisy patches, float32 (B, C, P, P) on the [-1, 1] scale, not
    clipped; `level` float32 (B,) in the law's unit; `label` -1, `n` int64 (B,). data.noise.target
    adds `target`, the clean patches or those of a second noisy copy; without it nothing clean
    leaves this class. Patches are turned and mirrored at random.

    Args:
        cfg: a DataConfig; its shape, classes and fingerprint are filled in.
        seed: key of the noise, the order and the cuts.
        accumulate: micro-batches per optimizer step.

    Raises:
        ValueError: an unknown law or level, no pictures, one smaller than a patch, or a setting of
            other data that would be ignored.
    """

    def __init__(self, cfg: DataConfig, seed: int = 0, accumulate: int = 1):
        super().__init__()
        self.cfg = cfg
        self.seed = seed
        self.accumulate = accumulate
        self.law = law_of(cfg.noise)
        channels = cfg.channels or 3
        for key in ("resolution", "pad", "labels", "flip", "balanced", "pairs"):
            check(
                not getattr(cfg, key),
                f"data.{key}",
                getattr(cfg, key),
                "is not for patches of noisy pictures; leave it out",
            )
        read = _noisy_pictures if cfg.noise.copies == "given" else _clean_pictures
        pictures = read(picture_tree(cfg), channels)
        for name, picture in pictures:
            check(
                min(picture.shape[1:]) >= cfg.patch,
                "data.patch",
                cfg.patch,
                f"{name} is {tuple(picture.shape[1:])}; take smaller patches",
            )
        note_fingerprint(cfg, digest(len(pictures), lambda k: pictures[k][1].numpy().tobytes()))
        cfg.shape = [channels, cfg.patch, cfg.patch]
        cfg.classes = 0
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

    def _views(
        self, named: list[tuple[str, torch.Tensor]]
    ) -> tuple[dict[str, list[torch.Tensor]], list[float]]:
        """Return ({key of a batch: pictures}, their levels); of fresh noise only the clean ones."""
        noise = self.cfg.noise
        pictures = [picture for _, picture in named]
        if noise.copies == "fresh":
            return {"target": pictures}, []
        if noise.copies == "given":
            return {"image": pictures}, [noise.level or self._estimate(*item) for item in named]
        levels = [self._draw_level(self._rng(k, LEVEL)) for k in range(len(pictures))]

        def copies(draw):
            return [self._noisy(p, levels[k], self._rng(k, draw)) for k, p in enumerate(pictures)]

        views = {"image": copies(FIRST)}
        if noise.target != "none":
            views["target"] = copies(SECOND) if noise.target == "second" else pictures
        return views, levels

    def _estimate(self, name: str, picture: torch.Tensor) -> float:
        """Return the level of a picture, from the picture."""
        try:
            return float(level_from_patches((picture.double() + 1) / 2, self.law))
        except ValueError as error:
            reason = (
                str(error).removeprefix("level=auto: ").replace("the level", "data.noise.level")
            )
            raise ValueError(f"data.noise.level=0: {name}: {reason}") from None

    def _rng(self, number: int, draw: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number, draw])

    def _draw_level(self, rng: np.random.Generator) -> float:
        """Return the level of a picture or patch: the config's, or drawn evenly in log."""
        low, high = self.cfg.noise.level, self.cfg.noise.level_max
        return low * (high / low) ** rng.random() if high else low

    def _noisy(self, clean: torch.Tensor, level: float, rng: np.random.Generator) -> torch.Tensor:
        """Return a noisy copy of uint8 pixels, float32 on the [-1, 1] scale."""
        return torch.from_numpy(self.law.sample(clean.numpy() / 255, level, rng) * 2 - 1).float()

    def cut(self, n: torch.Tensor, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the batch of stream positions n from these pictures, both int64 (B,)."""
        streams = (seeding.Stream.CUT, seeding.Stream.CUT_ROW, seeding.Stream.TURN)
        uniforms = zip(*(seeding.uniform(self.seed, n, stream).tolist() for stream in streams))
        items = [self._patch(*item) for item in zip(n.tolist(), numbers.tolist(), uniforms)]
        batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
        return batch | {"label": torch.full_like(n, -1), "n": n}

    def _patch(
        self, n: int, number: int, uniforms: tuple[float, float, float]
    ) -> dict[str, torch.Tensor]:
        """Return {key: patch} of one picture and its level."""
        item = {
            key: _cut(pictures[number], self.cfg.patch, uniforms)
            for key, pictures in self.views.items()
        }
        if self.levels:
            level = self.levels[number]
        else:
            rng = self._rng(n, FRESH)
            clean = item.pop("target")
            level = self._draw_level(rng)
            item["image"] = self._noisy(clean, level, rng)
            if self.cfg.noise.target != "none":
                second = self.cfg.noise.target == "second"
                item["target"] = self._noisy(clean, level, rng) if second else clean
        item = {key: from_uint8(p) if p.dtype == torch.uint8 else p for key, p in item.items()}
        return item | {"level": torch.tensor(level, dtype=torch.float32)}

    @torch.no_grad()
    def preview(self, model: Any, num: int) -> torch.Tensor:
        """Return noisy | restored held-out patches, uint8 (num, C, P, 2 P); fixed ones.

        Where nothing is held out they are of training pictures.
        """
        n = torch.arange(num)
        numbers = self.numbers["test"] if len(self.numbers["test"]) else self.numbers["train"]
        batch = self.cut(seeding.HELD_OUT + n, numbers[n % len(numbers)])
        y = ((batch["image"] + 1) / 2).to(model.device)
        level = batch["level"].to(model.device)
        return to_uint8(torch.cat([y, model.estimate(y, level)], dim=-1).cpu() * 2 - 1)

    def train_dataloader(self) -> "Patches":
        """Return the stream, from the trainer's current step on, for this rank."""
        trainer = self.trainer
        numbers = self.numbers["train"]
        stream = TrainStream(
            torch.empty(0),
            torch.zeros(len(numbers)),
            self.seed,
            self.cfg.batch_size,
            first_step=lambda: trainer.global_step,
            accumulate=self.accumulate,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        return Patches(self, stream, numbers)

    def val_dataloader(self) -> DataLoader:
        """Return this rank's patches of held-out pictures: 16 of each, fixed."""
        world = self.trainer.world_size
        numbers = self.numbers["test"]
        batches = []
        for n in torch.arange(16 * len(numbers)).split(self.cfg.batch_size):
            if len(n) >= world:
                share = n.tensor_split(world)[self.trainer.global_rank]
                batches.append(self.cut(seeding.HELD_OUT + share, numbers[share // 16]))
        return DataLoader(batches, batch_size=None)


class Patches:
    """Endless iterable of batches of patches, from the pictures that a TrainStream names.

    Args:
        data: what cuts them.
        stream: over range(len(numbers)).
        numbers: int64, which pictures those are.
    """

    def __init__(self, data: NoisyDataModule, stream: TrainStream, numbers: torch.Tensor):
        self.data = data
        self.stream = stream
        self.numbers = numbers

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for n, index in self.stream.numbers():
            yield self.data.cut(n, self.numbers[index])


def _clean_pictures(tree: Tree, channels: int) -> list[tuple[str, torch.Tensor]]:
    """Return [(name, uint8 (C, H, W))] of clean pictures."""
    check(tree.names, "data.root", tree.path, "holds no picture")
    return [(name, tree.read(name, channels)) for name in tree.names]


def _noisy_pictures(tree: Tree, channels: int) -> list[tuple[str, torch.Tensor]]:
    """Return [(name, float32 (C, H, W) on the [-1, 1] scale)] of noisy pictures.

    For a grey model every channel of a colour picture is a picture: an average has other noise.
    """
    named = []
    for name, read in find_pictures(tree.path, "data.root").items():
        stack = read().images()
        for k, image in enumerate(stack):
            check(
                len(image) == channels or channels == 1,
                "data.channels",
                channels,
                f"{name} is grey; take data.channels=1",
            )
            parts = [image] if len(image) == channels else image.split(1)
            named += [(name if len(stack) == 1 else f"{name}[{k}]", part) for part in parts]
    return named


def _cut(picture: torch.Tensor, side: int, uniforms: tuple[float, float, float]) -> torch.Tensor:
    """Return a square of the picture (C, H, W), turned and mirrored by three uniforms."""
    row, column, turn = uniforms
    top, left = (int(u * (size - side + 1)) for u, size in zip((row, column), picture.shape[1:]))
    patch = torch.rot90(picture[:, top : top + side, left : left + side], int(turn * 4), (1, 2))
    return patch.flip(-1) if turn * 8 % 2 >= 1 else patch
