"""One pass of a feature net over a set of images: moments in 16 blocks, rows if a score needs them.

Blocks hold rows or covariances, whichever are smaller (see Moments); what they would take beyond
8 GB is summed over all blocks instead, without an error bar.

Images are read or generated as they are needed and dropped after their features are taken. Every
process works on blocks of its own; the sums of a block never depend on how many processes there
are. A finished block is a file, so that a killed pass goes on where it stopped.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from genmodels import atomic, distributed
from genmodels.foreign import open_npz
from genmodels.metrics.errorbars import BLOCKS, block_of
from genmodels.metrics.features import Features, feature_rows
from genmodels.metrics.frechet import Moments, merged
from genmodels.metrics.stats import describe

if TYPE_CHECKING:
    from genmodels.evaluation.sources import ImageSource

_BUFFER = 4096  # rows of one product X^T X
_MEMORY = 8 << 30  # bytes that the moments of a pass may take


@dataclass
class Scored:
    """What a pass leaves: on every process the moments, on the first the rows in image order.

    Args:
        blocks: 16 Moments, or one of all images.
        rows: float32 (N,D) or None.
        logits: float32 (N,C) or None.
        marks: int64 (N,), alike where two images are byte for byte, or None.
    """

    blocks: list[Moments]
    rows: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    marks: torch.Tensor | None = None

    @classmethod
    def of_rows(
        cls, rows: torch.Tensor, features: Features, shift: torch.Tensor | None = None, **more: Any
    ) -> "Scored":
        """Return what a pass over images with these rows leaves.

        Args:
            rows: float32 (N,D) in the order of the images.
            features: that made them.
            shift: as for score_pass.
            more: logits and marks.
        """
        blocks, number = [], block_of(len(rows))
        for block in range(BLOCKS):
            moments = Moments(shift)
            for part in rows[number == block].split(_BUFFER):
                moments.update(part.to(sums_device(features)))
            blocks.append(moments)
        return cls(blocks, rows, **more)

    def moments(self) -> Moments:
        """Return the Moments of all images."""
        return self.blocks[0] if len(self.blocks) == 1 else merged(self.blocks)


class Store:
    """Finished parts of a pass as files FOLDER/NAME-PART.npz.

    Args:
        folder: made when the first part is written.
        name: of the pass.
        identity: anything JSON can hold that fixes the pass's result.

    Raises:
        ValueError: the folder holds parts of another pass of this name.
    """

    def __init__(self, folder: Path | str, name: str, identity: Any):
        self.folder = Path(folder)
        self.name = name
        self.written: list[Path] = []
        self.mark = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        for path in self.files():
            if self._read(path, "mark")["mark"] != self.mark:
                raise ValueError(
                    f"out={str(folder).removesuffix('.blocks')}: {path} was left by another "
                    f"evaluation; delete {folder} or choose another out="
                )

    def files(self) -> list[Path]:
        """Return the files of finished parts."""
        return sorted(self.folder.glob(f"{self.name}-*.npz"))

    def has(self, part: str) -> bool:
        """Return whether a part is finished."""
        return self._path(part).is_file()

    def load(self, part: str) -> dict[str, np.ndarray]:
        """Return {name: array} of a finished part."""
        return self._read(self._path(part))

    def save(self, part: str, arrays: dict[str, Any]) -> None:
        """Write a finished part, all or nothing."""
        self.folder.mkdir(exist_ok=True)
        # Not flushed: a killed process leaves old or new, and _read names what a crash spoils.
        with atomic.whole_file(self._path(part), flush=False) as file:
            np.savez(file, mark=np.array(self.mark), **arrays)
        self.written.append(self._path(part))

    def undo(self) -> None:
        """Delete what this object has written."""
        for path in self.written:
            path.unlink(missing_ok=True)
        _remove_empty(self.folder)

    @staticmethod
    def clear(out: Path | str) -> None:
        """Delete the parts of all passes in OUT.blocks, and the folder if nothing else is in it."""
        folder = Path(f"{out}.blocks")
        for path in folder.glob("*-*-of-*.npz"):
            path.unlink()
        atomic.remove_partial(folder)
        _remove_empty(folder)

    def _path(self, part: str) -> Path:
        return self.folder / f"{self.name}-{part}.npz"

    def _read(self, path: Path, *names: str) -> dict[str, np.ndarray]:
        """Return the arrays of a part, all of them if none is named."""
        try:
            with open_npz(path) as file:
                return file.read_unpacked(*names)
        except Exception as error:  # numpy raises nearly anything
            raise ValueError(f"out: {path} cannot be read ({error}); delete it") from None

    @classmethod
    def of(
        cls, out: str, name: str, source: Any, features: Features, *words: Any
    ) -> "Store | None":
        """Return the Store in OUT.blocks of a pass over a source; None if it needs none.

        That is without an out=, and of Moments and Scored, which need no pass.

        Args:
            out: path of the result, or "".
            name: of the pass.
            source: Pictures or Generated, or the Moments of a statistics file.
            features: what the pass takes of each image.
            words: what else fixes the result, or what is kept of it.
        """
        if not out or isinstance(source, (Moments, Scored)):
            return None
        return cls(f"{out}.blocks", name, [source.identity(), describe(features), *words])


def score_pass(
    source: "ImageSource",
    features: Features,
    *,
    shift: torch.Tensor | None = None,
    rows: bool = False,
    logits: bool = False,
    whole: bool = False,
    batch: int | None = None,
    store: Store | None = None,
    label: str = "features",
    progress: bool = True,
) -> Scored:
    """Return the `Scored` of a set of images. Every process must call it, with the same arguments.

    Args:
        source: Pictures or Generated.
        features: what load_features returns.
        shift: (D,) subtracted before the sums, the reference's mean; None for zero.
        rows, logits: keep the features, the class scores.
        whole: one Moments of all images will do.
        batch: images in one call of the net; changes no row; None = its own.
        store: Store to go on from, or None.
        label, progress: of the bar.

    Raises:
        ValueError: what `features` refuses, features too many to hold a covariance of, or values
            that are not finite.
    """
    rank, count = distributed.rank(), len(source)
    split, units = _share_of_units(count, rank, distributed.world())
    names = {unit: f"{unit // split:02d}.{unit % split}-of-{split}" for unit in units}
    done = {unit for unit in units if store and store.has(names[unit])}
    todo = {unit: index for unit, index in units.items() if unit not in done and len(index)}
    bar = tqdm(
        total=sum(map(len, units.values())),
        desc=label,
        unit="img",
        delay=0.5,
        disable=not progress or rank > 0,
        initial=sum(len(units[unit]) for unit in done),
    )
    if done and rank == 0:
        bar.write(f"{label}: {len(done)} of {len(units)} blocks of this process are done already")
    sums = _Sums(count, split, shift, sums_device(features), whole)
    wanted = {"rows": rows, "logits": logits, "marks": True}
    tables: dict[str, list[Any]] = {name: [] for name, kept in wanted.items() if kept}
    with bar, distributed.together():
        reader = _Reader(source, features, list(todo.values()), batch, logits, bar)
        for unit, index in units.items():
            if unit in todo:
                try:
                    part = _part(reader, len(index), features, shift, rows, logits, count)
                except ValueError:  # the same again would only fail again
                    if store:
                        store.undo()
                    raise
                if store:
                    store.save(names[unit], part)
            elif unit in done and store:
                part = store.load(names[unit])
            else:
                continue
            sums.add(unit, part)
            for name, table in tables.items():
                table.append((index, part.get(name)))
    found = {name: _gathered_table(table, count) for name, table in tables.items()}
    return Scored(sums.gathered(), **found)


def check_memory(features: Features, count: int, dim: int) -> None:
    """Raise ValueError if the moments of so many images in these dimensions are too large."""
    if 8 * min(count, dim) * dim > _MEMORY:
        raise ValueError(
            f"features={features.name}: the moments of {count} images in {dim} dimensions do not "
            f"fit into {_MEMORY >> 30} GB; choose features of a smaller dimension"
        )


def _share_of_units(count: int, rank: int, world: int) -> tuple[int, dict[int, torch.Tensor]]:
    """Return (parts of a block, {unit: numbers of its images}) of one process.

    A unit is a block; with more than 16 processes, which would have none, a part of a block.
    """
    split = math.ceil(world / BLOCKS)
    blocks = block_of(count)
    return split, {
        unit: (blocks == unit // split).nonzero().flatten()[unit % split :: split]
        for unit in range(rank, BLOCKS * split, world)
    }


class _Reader:
    """Rows and class scores of the images of several lists, handed out as many as are asked for.

    Batches of the net run across the lists, so that short lists fill them too.
    """

    def __init__(
        self,
        source: "ImageSource",
        features: Features,
        indices: list[torch.Tensor],
        batch: int | None,
        logits: bool,
        bar: tqdm,
    ):
        self.outputs = (features.outputs[0], "logits") if logits else features.outputs[:1]
        self.bar = bar
        self.marks: list[int] = []  # of images read whose part is not done
        self.rest: list[torch.Tensor] = []  # of the latest batch, what is not handed out yet
        self.stream: Iterator[dict[str, torch.Tensor]] = iter(())
        if indices:
            pictures = self._marked(source.read(torch.cat(indices)))
            self.stream = feature_rows(features, pictures, batch, self.outputs)

    def _marked(self, pictures: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the images and note what tells one from another."""
        for part in pictures:
            for picture in part.cpu().contiguous().numpy():
                mark = hashlib.blake2b(picture.data, digest_size=8).digest()
                self.marks.append(int.from_bytes(mark, "big", signed=True))
            yield part

    def take_marks(self, count: int) -> np.ndarray:
        """Return the marks of the next `count` images, whose rows have been taken, int64."""
        marks, self.marks = self.marks[:count], self.marks[count:]
        return np.array(marks, np.int64)

    def take(self, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield (rows, class scores or None) of the next `count` images."""
        while count:
            if not self.rest:
                outputs = next(self.stream)
                self.rest = [outputs[name] for name in self.outputs]
            parts = [part[:count] for part in self.rest]
            left = len(self.rest[0]) > count
            self.rest = [part[count:] for part in self.rest] if left else []
            yield parts[0], parts[1] if len(parts) > 1 else None
            self.bar.update(len(parts[0]))
            count -= len(parts[0])


def _part(
    reader: _Reader,
    count: int,
    features: Features,
    shift: torch.Tensor | None,
    keep_rows: bool,
    keep_logits: bool,
    total: int,
) -> dict[str, np.ndarray]:
    """Return {name: array} of the next `count` of `total` images: Moments.arrays, rows, logits."""
    moments = Moments(shift=shift)
    waiting: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []
    for rows, logits in reader.take(count):
        check_memory(features, total, rows.shape[1])
        waiting.append(rows.to(sums_device(features)))
        if sum(map(len, waiting)) >= _BUFFER:
            moments.update(torch.cat(waiting))
            waiting = []
        if keep_rows:
            kept.append(rows.cpu())
        if keep_logits and logits is not None:
            scores.append(logits.cpu())
    if waiting:
        moments.update(torch.cat(waiting))
    part = moments.arrays()
    part |= {"rows": torch.cat(kept)} if kept else {}
    part |= {"logits": torch.cat(scores)} if scores else {}
    part["marks"] = reader.take_marks(count)
    return {key: np.asarray(torch.as_tensor(value).cpu()) for key, value in part.items()}


class _Sums:
    """The moments of the parts that this process has done, and in the end those of all processes.

    Args:
        count: images of the pass.
        split: parts of a block.
        shift: of the rows; None = zero.
        device: of the sums.
        whole: one Moments of all images is asked for. Else there are 16 of blocks, unless they
            would not fit.
    """

    def __init__(
        self,
        count: int,
        split: int,
        shift: torch.Tensor | None,
        device: torch.device,
        whole: bool,
    ):
        self.count, self.split, self.device = count, split, device
        self.shift, self.whole = shift, whole
        self.parts: dict[int, Moments] = {}

    def add(self, unit: int, part: dict[str, np.ndarray]) -> None:
        """Take a part; parts come in the order of their numbers."""
        dim = part["kept" if "kept" in part else "total"].shape[-1]
        if self.shift is None:
            self.shift = torch.zeros(dim)
        moments = Moments.from_arrays(part, self.shift.to(self.device))
        if distributed.world() == 1 and self._as_one(dim):
            self.parts[0] = self.parts.get(0, Moments(moments.shift)).merge(moments)
        else:
            self.parts[unit] = moments

    def _as_one(self, dim: int) -> bool:
        return self.whole or 8 * min(self.count, BLOCKS * dim) * dim > _MEMORY

    def gathered(self) -> list[Moments]:
        """Return the Moments of the blocks, or of all images, on every process."""
        if distributed.world() == 1:
            dims = [len(part.shift) for part in self.parts.values()]  # few images miss some blocks
            whole = [self.parts[0]] if dims and self._as_one(dims[0]) else []
            return self._told(whole) or [self.parts.get(b, self._empty()) for b in range(BLOCKS)]
        # Sums are added where they lie; the others add zeros: the sums are those of one process,
        # bit for bit. Rows, which are smaller, are handed around.
        shapes = {unit: (m.keeps_rows, len(m.shift)) for unit, m in self.parts.items()}
        every = {k: v for shapes in distributed.gather_to_all(shapes) for k, v in shapes.items()}
        dim = max(dim for _, dim in every.values())
        if self.shift is None:
            self.shift = torch.zeros(dim)
        blocks: list[Moments] = []
        for block in range(BLOCKS):
            moments = self._empty()
            for unit in range(block * self.split, (block + 1) * self.split):
                if unit in every:
                    moments.merge(self._everywhere(unit, every[unit][0]))
            if blocks and self._as_one(dim):
                blocks[0].merge(moments)
            else:
                blocks.append(moments)
        return self._told(blocks)

    def _empty(self) -> Moments:
        return Moments(None if self.shift is None else self.shift.to(self.device))

    def _everywhere(self, unit: int, keeps_rows: bool) -> Moments:
        """Return a part of any process on every process."""
        part = self.parts.pop(unit, None)
        if keeps_rows:
            arrays = part and {"count": part.count, "kept": part.arrays()["kept"].cpu().numpy()}
            arrays = next(arrays for arrays in distributed.gather_to_all(arrays) if arrays)
            return Moments.from_arrays(arrays, self._empty().shift)
        shift = self._empty().shift
        number = torch.zeros((), dtype=torch.float64, device=self.device)
        total, outer = torch.zeros_like(shift), shift.new_zeros(len(shift), len(shift))
        if part is not None:
            number += part.count
            total, outer = part.total, part.outer
        for value in (number, total, outer):
            dist.all_reduce(value)
        arrays = {"count": int(number), "total": total, "outer": outer}
        return Moments.from_arrays(arrays, shift)

    def _told(self, blocks: list[Moments]) -> list[Moments]:
        if len(blocks) == 1 and not self.whole:
            dim = len(blocks[0].mean)
            warnings.warn(
                f"16 blocks of {self.count} images in {dim} dimensions would not fit into "
                f"{_MEMORY >> 30} GB: the Frechet distance has no error bar",
                stacklevel=3,
            )
        return blocks


def _gathered_table(table: list[tuple[torch.Tensor, Any]], count: int) -> torch.Tensor | None:
    """Return all rows in the order of the images on the first process, None on the others.

    None also where parts of an older version lack them.
    """
    shares = distributed.gather(table)
    if shares is None:
        return None
    pairs = [pair for share in shares for pair in share]
    if any(values is None for _, values in pairs):
        return None
    first = torch.from_numpy(pairs[0][1])
    together = first.new_empty(count, *first.shape[1:])
    for index, values in pairs:
        together[index] = torch.from_numpy(values)
    return together


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def sums_device(features: Features) -> torch.device:
    """Return where the float64 sums are taken: on the net's device if it has float64."""
    return torch.device("cpu") if features.device.type == "mps" else features.device
