"""Noisy pictures for training denoisers: patches cut at random from pictures of any size.

What the network may learn from is data.noise.copies, and is saved with the model:

    fixed   one noisy copy of each picture, made once: strict self-supervision
    fresh   new noise for every patch, from the clean picture: unlimited noisy views
    given   the pictures are noisy themselves: nothing is added
"""

import contextlib
import statistics
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from genmodels import seeding
from genmodels.config import DataConfig, check
from genmodels.data.cuts import Pictures, Stored
from genmodels.data.fingerprint import NEW, digest, note_fingerprint
from genmodels.data.module import home_of_images
from genmodels.data.own import held_out_share
from genmodels.data.scenes import draw_scene
from genmodels.data.sets import picture_tree
from genmodels.data.stream import TrainStream
from genmodels.images import Tree, from_uint8, to_uint8
from genmodels.images.pictures import Planes, check_scale, find_pictures
from genmodels.images.scale import Quantiles, Scale, Wanted, whole_range
from genmodels.noise import law_of
from genmodels.noise.levels import NoNoise, level_from_patches

# What a numpy generator of [seed, number, draw] draws. Not 0, for numpy drops zeros at the end and
# [seed, number] is the noise that evaluate.py adds to picture `number`.
FIRST, SECOND, LEVEL, FRESH = range(1, 5)
LOOKED_AT = 16  # planes of a stack whose noise is looked for


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
        if cfg.noise.copies == "given":
            pictures = _noisy_pictures(tree, cfg, channels)
        else:
            pictures = _clean_pictures(tree, channels) + [
                Source(f"scene {k}", draw_scene(k, channels), f"scene {k}", f"scene {k}")
                for k in range(cfg.scenes)
            ]
        for each in pictures:
            check(
                min(each.size) >= cfg.patch,
                "data.patch",
                cfg.patch,
                f"{each.name} is {each.size}; take smaller patches",
            )
        note_fingerprint(cfg, digest(len(pictures), lambda k: pictures[k].image.numpy().tobytes()))
        cfg.shape = [channels, cfg.patch, cfg.patch]
        cfg.classes = 0
        self.numbers = _split(pictures, cfg)
        check(
            len(self.numbers["train"]), "data.holdout", cfg.holdout, "leaves no picture to train on"
        )
        self.views, self.levels = self._views(pictures)

    def _views(self, sources: list["Source"]) -> tuple[dict[str, Pictures | Stored], list[float]]:
        """Return ({key of a batch: pictures}, their levels); of fresh noise only the clean ones."""
        noise = self.cfg.noise
        if noise.copies == "given":
            stored = Stored([s.values for s in sources], [s.scale for s in sources])
            return {"image": stored}, self._given_levels(sources)
        pictures = [source.image for source in sources]
        if noise.copies == "fresh":
            return {"target": Pictures(pictures)}, []
        levels = [self._draw_level(self._rng(k, LEVEL)) for k in range(len(pictures))]

        def copies(draw):
            return [self._noisy(p, levels[k], self._rng(k, draw)) for k, p in enumerate(pictures)]

        views = {"image": copies(FIRST)}
        if noise.target != "none":
            views["target"] = copies(SECOND) if noise.target == "second" else pictures
        return {key: Pictures(view) for key, view in views.items()}, levels

    def _given_levels(self, sources: list["Source"]) -> list[float]:
        """Return the level of each picture: told, or estimated from those that share it."""
        if told := self.cfg.noise.level:
            for source in sources:
                check(
                    told * source.factor <= self.law.high,
                    "data.noise.level",
                    told,
                    f"is {told * source.factor:.4g} on the scale of {source.name}, where it must "
                    f"be at most {self.law.high:g} ({self.law.unit})",
                )
            return [told * source.factor for source in sources]
        sharing: dict[Hashable, list[Source]] = {}
        for source in sources:
            sharing.setdefault(source.noise, []).append(source)
        levels = {}
        for name, group in sharing.items():
            count = min(len(group), LOOKED_AT)
            looked_at = [group[(2 * k + 1) * len(group) // (2 * count)] for k in range(count)]
            levels[name] = self._estimate(looked_at)
        return self._within_law(sources, [levels[source.noise] for source in sources])

    def _within_law(self, sources: list["Source"], levels: list[float]) -> list[float]:
        """Return levels that were found, each one that the law accepts.

        Raises:
            ValueError: noise stronger than the law has.
        """
        law = self.law
        bounds = f"{self.cfg.noise.law} noise has {law.low:g} to {law.high:g}"
        nearest = [min(max(level, law.low), law.high) for level in levels]
        changed = [k for k, level in enumerate(levels) if level != nearest[k]]
        if not changed:
            return levels
        strong = [k for k in changed if law.state_std(levels[k]) > law.state_std(nearest[k])]
        first = (strong or changed)[0]
        found = f"{sources[first].name}: level {levels[first]:.4g} is found, where {bounds}"
        remedy = (
            "tell data.noise.black= and white=, the range that these pictures fill, or another "
            "data.noise.law"
        )
        if strong:
            raise ValueError(f"data.noise.level=0: {found}; {remedy}")
        if len(changed) < len(levels):
            remedy = "leave them out (data.leave_out=), or tell data.noise.level"
        # No error: a run that was begun so goes on.
        warnings.warn(
            f"data.noise.level=0: {found}; {len(changed)} of {len(levels)} pictures, of weaker "
            f"noise, count as {nearest[first]:g}: {remedy}",
            stacklevel=2,
        )
        return nearest

    def _estimate(self, sources: list["Source"]) -> float:
        """Return the one level of pictures, from the pictures: the median over those with noise."""
        found, silent = [], None
        for source in sources:
            try:
                y = (source.image.double() + 1) / 2
                found.append(float(level_from_patches(y, self.law)))
            except NoNoise as error:
                silent = error
            except ValueError as error:
                raise self._unknown(source.name, error) from None
        if silent is not None and not found:
            raise self._unknown(sources[0].name, silent)
        return statistics.median(found)

    def _unknown(self, name: str, error: ValueError) -> ValueError:
        reason = str(error).removeprefix("level=auto: ").replace("the level", "data.noise.level")
        return ValueError(f"data.noise.level=0: {name}: {reason}")

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
        nbytes = sum(view.nbytes for view in self.views.values())
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


@dataclass(frozen=True)
class Source:
    """A picture to cut patches from.

    Attributes:
        name: of its file, and which plane it is of one.
        values: uint8 (C, H, W) of a clean one; of a noisy one (H, W, C) as its file has them.
        together: what is held out with it has the same.
        noise: what has noise of the same level has the same.
        factor: how many times the level of the config its own is, on its scale.
        ordered: it is of a lone stack, whose last planes are held out.
        scale: what is black and white in a noisy one.
    """

    name: str
    values: Any
    together: Hashable
    noise: Hashable
    factor: float = 1.0
    ordered: bool = False
    scale: Scale | None = None

    @property
    def image(self) -> torch.Tensor:
        """The picture, uint8 or float32 on the [-1, 1] scale, (C, H, W)."""
        return self.scale.tensor(self.values) if self.scale else self.values

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return tuple(self.values.shape[:2] if self.scale else self.values.shape[1:])


def _split(sources: list[Source], cfg: DataConfig) -> dict[str, torch.Tensor]:
    """Return which pictures are for training and which are held out, int64.

    A picture is held out with all its channels, a stack with all its planes; of a lone stack the
    last planes are.
    """
    groups = {key: k for k, key in enumerate(dict.fromkeys(each.together for each in sources))}
    group = torch.tensor([groups[each.together] for each in sources])
    if sources and sources[0].ordered:
        first = len(groups) - round(len(groups) * cfg.holdout)  # of those held out
        shares = {"train": torch.arange(first), "test": torch.arange(first, len(groups))}
    else:
        shares = {split: held_out_share(cfg, split, len(groups)) for split in ("train", "test")}
    return {split: torch.isin(group, share).nonzero().flatten() for split, share in shares.items()}


def _clean_pictures(tree: Tree, channels: int) -> list[Source]:
    """Return clean pictures, uint8."""
    check(tree.names, "data.root", tree.path, "holds no picture")
    return [Source(name, tree.read(name, channels), name, name) for name in tree.names]


def _noisy_pictures(tree: Tree, cfg: DataConfig, channels: int) -> list[Source]:
    """Return noisy pictures, planes of stacks among them, with their values as they are stored.

    For a grey model every channel of a colour picture is a picture: an average has other noise.
    Planes that lie unpacked in a file stay there.
    """
    readers = find_pictures(tree.path, "data.root", any_scale=True, axes=cfg.axes)
    readers = {name: readers[name] for name in tree.without_left_out(readers)}
    scales, factors = _common_scales(readers, cfg)
    sources = []
    for file, read in readers.items():
        with contextlib.closing(read()) as picture:
            for k in range(len(picture)):
                channel = picture.channel(k)
                scale = scales[channel] if scales else whole_range(picture.dtype)
                values = picture.mapped(k)
                values = picture.plane(k) if values is None else values
                colours = values.shape[2]
                name = f"{file}{picture.label(k)}"
                check(
                    colours == channels or channels == 1,
                    "data.channels",
                    channels,
                    f"{name} is grey; take data.channels=1",
                )
                together: Hashable = name
                noise: Hashable = name
                if picture.is_stack:
                    together = picture.position(k) if len(readers) == 1 else file
                    noise = (file, channel)
                factor = factors[channel % len(factors)]
                ordered = picture.is_stack and len(readers) == 1
                for number in range(colours // channels):
                    part = values[..., number * channels : (number + 1) * channels]
                    key = (noise, number)
                    sources.append(Source(name, part, together, key, factor, ordered, scale))
    return sources


def _common_scales(
    readers: dict[str, Callable[[], Planes]], cfg: DataConfig
) -> tuple[list[Scale], list[float]]:
    """Return the scale of each channel (none: each file by its type), and factors of the level.

    What was found is noted in the config, for a run that goes on and for restoring.

    Raises:
        ValueError: pictures of several types or numbers of channels, whose quantiles mean nothing
            together.
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
    found: dict[tuple[np.dtype, int], list[Quantiles]] = {}
    for name, read in readers.items():
        with contextlib.closing(read()) as picture:
            dtype = np.dtype(float) if picture.dtype.kind == "f" else picture.dtype
            empty = [Quantiles(dtype) for _ in range(picture.channels)]
            channels = found.setdefault((dtype, picture.channels), empty)
            for k in range(len(picture)):
                channels[picture.channel(k)].add(picture.plane(k))
        if not (gaussian and words.measured(dtype)) and not words.white:
            check_scale(dtype, max(each.most for each in channels), name, "data.root")
    several = len(found) > 1
    names = (f"{dtype.name}{f' with {n} channels' * (n > 1)}" for dtype, n in found)
    kinds = " and ".join(sorted(names))
    check(
        not several or (words.scale != "quantiles" and bool(words.black) == bool(words.white)),
        "data.root",
        cfg.root,
        f"holds pictures of {kinds}; tell data.noise.black= and white=, or scale=file",
    )
    if several and gaussian and any(words.measured(dtype) for dtype, _ in found):
        warnings.warn(
            f"data.root={cfg.root}: holds pictures of {kinds}: each is on the range of its type",
            stacklevel=2,
        )
    (dtype, count), channels = next(iter(found.items()))
    measured = gaussian and words.measured(dtype) and not several
    scales = []
    if measured:
        scales = words.scales(dtype, channels)
    elif words.black or words.white:
        scales = [words.defined(dtype, channel, count) for channel in range(count)]
        most = max(number for _, number in found)
        scales += scales[-1:] * (most - count)  # one told for all
    if noise.scale == "auto" and not older:
        noise.scale = "quantiles" if measured else "file"
    if measured:
        noise.black, noise.white = ([scale.ends[k] for scale in scales] for k in (0, 1))
    if not gaussian or not scales:
        return scales, [1.0]
    units = [words.unit(dtype, channel, len(scales)) for channel in range(len(scales))]
    return scales, [unit.over(scale) for unit, scale in zip(units, scales)]
