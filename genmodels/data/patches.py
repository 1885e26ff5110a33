"""Noisy pictures for training denoisers: patches cut at random from pictures of any size.

What the network may learn from is data.noise.copies, and is saved with the model:

    fixed   one noisy copy of each picture, made once: strict self-supervision
    fresh   new noise for every patch, from the clean picture: unlimited noisy views
    given   the pictures are noisy themselves: nothing is added
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from genmodels import seeding
from genmodels.config import DataConfig, check
from genmodels.data.fingerprint import NEW, digest, note_fingerprint
from genmodels.data.module import home_of_images
from genmodels.data.own import held_out_share
from genmodels.data.sets import picture_tree
from genmodels.data.stream import TrainStream
from genmodels.images import Tree, from_uint8, to_uint8
from genmodels.images.pictures import Planes, check_scale, find_pictures
from genmodels.images.scale import Quantiles, Scale, Wanted, whole_range
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
        tree = picture_tree(cfg)
        self.factor = 1.0  # of the config's level, on the scale of the patches
        if cfg.noise.copies == "given":
            pictures, self.factor = _noisy_pictures(tree, cfg, channels)
        else:
            pictures = _clean_pictures(tree, channels)
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
        views, self.levels = self._views(pictures)
        self.views = {key: Pictures(view) for key, view in views.items()}

    def _views(
        self, named: list[tuple[str, torch.Tensor]]
    ) -> tuple[dict[str, list[torch.Tensor]], list[float]]:
        """Return ({key of a batch: pictures}, their levels); of fresh noise only the clean ones."""
        noise = self.cfg.noise
        pictures = [picture for _, picture in named]
        if noise.copies == "fresh":
            return {"target": pictures}, []
        if noise.copies == "given":
            level = noise.level * self.factor
            return {"image": pictures}, [level or self._estimate(*item) for item in named]
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

    def cut(
        self, n: torch.Tensor, numbers: torch.Tensor, device: torch.device | str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """Return the batch of stream positions n from these pictures, both int64 (B,) on the CPU.

        Pictures and batch lie on the device; fresh noise is made on the CPU.
        """
        streams = (seeding.Stream.CUT, seeding.Stream.CUT_ROW, seeding.Stream.TURN)
        uniforms = [seeding.uniform(self.seed, n, stream).double() for stream in streams]
        home = device if self.levels else "cpu"
        batch = {
            key: view.to(home).cut(numbers, self.cfg.patch, *uniforms)
            for key, view in self.views.items()
        }
        if self.levels:
            levels = torch.tensor(self.levels, dtype=torch.float32)[numbers]
        else:
            batch, levels = self._fresh(n.tolist(), batch["target"])
        batch = {key: from_uint8(p) if p.dtype == torch.uint8 else p for key, p in batch.items()}
        batch |= {"level": levels, "label": torch.full_like(n, -1), "n": n}
        return {key: value.to(device) for key, value in batch.items()}

    def _fresh(
        self, n: list[int], clean: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return ({key: patches}, their levels (B,)) with new noise on clean patches."""
        rngs = [self._rng(k, FRESH) for k in n]
        levels = [self._draw_level(rng) for rng in rngs]

        def noisy() -> torch.Tensor:
            return torch.stack([self._noisy(*item) for item in zip(clean, levels, rngs)])

        batch = {"image": noisy()}
        if self.cfg.noise.target != "none":
            batch["target"] = noisy() if self.cfg.noise.target == "second" else clean
        return batch, torch.tensor(levels, dtype=torch.float32)

    def _device(self) -> torch.device:
        """Return where patches are cut: where the training images live."""
        nbytes = sum(view.pixels.nbytes for view in self.views.values())
        return home_of_images(self.trainer.strategy.root_device, self.cfg.device, nbytes)

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
        device = self.data._device()
        for n, index in self.stream.numbers():
            yield self.data.cut(n, self.numbers[index], device)


def _clean_pictures(tree: Tree, channels: int) -> list[tuple[str, torch.Tensor]]:
    """Return [(name, uint8 (C, H, W))] of clean pictures."""
    check(tree.names, "data.root", tree.path, "holds no picture")
    return [(name, tree.read(name, channels)) for name in tree.names]


def _noisy_pictures(
    tree: Tree, cfg: DataConfig, channels: int
) -> tuple[list[tuple[str, torch.Tensor]], float]:
    """Return [(name, float32 (C, H, W) on the [-1, 1] scale)] of noisy pictures, and a factor.

    For a grey model every channel of a colour picture is a picture: an average has other noise.
    The factor is what the config's level is multiplied by to be one on that scale.
    """
    readers = find_pictures(tree.path, "data.root", any_scale=True)
    scale, factor = _common_scale(readers, cfg)
    named = []
    for name, read in readers.items():
        with contextlib.closing(read()) as picture:
            for k in range(len(picture)):
                image = (scale or whole_range(picture.dtype)).tensor(picture.plane(k))
                check(
                    len(image) == channels or channels == 1,
                    "data.channels",
                    channels,
                    f"{name} is grey; take data.channels=1",
                )
                parts = [image] if len(image) == channels else image.split(1)
                named += [(f"{name}{picture.label(k)}", part) for part in parts]
    return named, factor


def _common_scale(
    readers: dict[str, Callable[[], Planes]], cfg: DataConfig
) -> tuple[Scale | None, float]:
    """Return the scale of all pictures (None: each by its type), and see _noisy_pictures.

    What was found is noted in the config, for a run that goes on and for restoring.

    Raises:
        ValueError: pictures of several types, whose quantiles mean nothing together.
    """
    noise = cfg.noise
    older = noise.scale == "auto" and cfg.fingerprint not in ("", NEW)
    # The run began before there was a choice; or what a told level counts on is left as it is.
    plain = older or (noise.level and noise.scale == "auto")
    words = Wanted("file" if plain else noise.scale, noise.black, noise.white, "data.noise.")
    gaussian = noise.law == "gaussian"  # only this noise stays what it is when black moves
    check(
        gaussian or words.scale != "quantiles",
        "data.noise.scale",
        "quantiles",
        f"{noise.law} noise depends on where black is; tell data.noise.black= and white=",
    )
    found: dict[np.dtype, Quantiles] = {}
    for name, read in readers.items():
        picture = read()
        dtype = np.dtype(float) if picture.dtype.kind == "f" else picture.dtype
        values = found.setdefault(dtype, Quantiles(dtype))
        for k in range(len(picture)):
            values.add(picture.plane(k))
        picture.close()
        if not (gaussian and words.measured(dtype)) and not words.white:
            check_scale(dtype, values.most, name, "data.root")
    several = len(found) > 1
    types = " and ".join(sorted(dtype.name for dtype in found))
    check(
        not several or (words.scale != "quantiles" and bool(words.black) == bool(words.white)),
        "data.root",
        cfg.root,
        f"holds pictures of {types}; tell data.noise.black= and white=, or scale=file",
    )
    dtype, values = next(iter(found.items()))
    measured = gaussian and words.measured(dtype) and not several
    if measured:
        (scale,) = words.scales(dtype, [values])
    else:
        scale = words.defined(dtype) if words.black or words.white else None
    if noise.scale == "auto" and not older:
        noise.scale = "quantiles" if measured else "file"
    if measured:
        noise.black, noise.white = [scale.black], [scale.white]
    factor = words.unit(dtype).over(scale) if scale and gaussian else 1.0
    return scale, factor


class Pictures:
    """Pictures (C, H, W) of any H and W in one stretch of memory, to cut many patches at once.

    Attributes:
        pixels: all of them, one after the other.
        starts, heights, widths: of each, int64 on the CPU.
    """

    def __init__(self, pictures: list[torch.Tensor]) -> None:
        self.pixels = torch.cat([picture.flatten() for picture in pictures])
        sizes = torch.tensor([picture.shape for picture in pictures])
        self.channels = int(sizes[0, 0])
        self.heights, self.widths = sizes[:, 1], sizes[:, 2]
        self.starts = sizes.prod(dim=1).cumsum(0) - sizes.prod(dim=1)

    def __getitem__(self, k: int) -> torch.Tensor:
        """Return picture k."""
        shape = (self.channels, int(self.heights[k]), int(self.widths[k]))
        start = int(self.starts[k])
        return self.pixels[start : start + math.prod(shape)].view(shape)

    def to(self, device: torch.device | str) -> "Pictures":
        """Move the pixels there; return these pictures."""
        self.pixels = self.pixels.to(device)
        return self

    def cut(
        self,
        numbers: torch.Tensor,
        side: int,
        row: torch.Tensor,
        column: torch.Tensor,
        turn: torch.Tensor,
    ) -> torch.Tensor:
        """Return squares (B, C, side, side), turned and mirrored, where the pixels lie.

        Args:
            numbers: of the pictures, int64 (B,) on the CPU.
            side: of a square, in pixels.
            row, column, turn: uniforms in [0, 1), float64 (B,): where it lies, how it is turned.
        """
        heights, widths = self.heights[numbers], self.widths[numbers]
        top, left = (row * (heights - side + 1)).long(), (column * (widths - side + 1)).long()
        quarters, mirrored = (turn * 4).long(), turn * 8 % 2 >= 1
        first = self.starts[numbers] + top * widths + left
        # Of the pixel that comes to (i, j): after mirroring, then after quarter turns.
        facts = torch.stack([first, widths, heights * widths, quarters, mirrored.long()])
        first, widths, plane, quarters, mirrored = facts.to(self.pixels.device)[..., None, None]
        i, j = torch.meshgrid(*[torch.arange(side, device=first.device)] * 2, indexing="ij")
        j = torch.where(mirrored == 1, side - 1 - j, j)
        y = torch.where(quarters == 0, i, torch.where(quarters == 1, j, side - 1 - i))
        y = torch.where(quarters == 3, side - 1 - j, y)
        x = torch.where(quarters == 0, j, torch.where(quarters == 1, side - 1 - i, side - 1 - j))
        x = torch.where(quarters == 3, i, x)
        channels = torch.arange(self.channels, device=first.device).reshape(1, -1, 1, 1)
        index = (first + y * widths + x)[:, None] + channels * plane[:, None]
        return self.pixels[index]
