"""One pass of a feature net over a set of images: moments in 16 blocks, rows if a score needs them.

Images are read or generated as they are needed and dropped after their features are taken. Every
process works on blocks of its own; the sums of a block never depend on how many processes there
are. A finished block is a file, so that a killed pass goes on where it stopped.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from genmodels import atomic, distributed
from genmodels.metrics.errorbars import BLOCKS, block_of
from genmodels.metrics.features import Features, feature_rows
from genmodels.metrics.frechet import Moments, merged
from genmodels.metrics.stats import describe

if TYPE_CHECKING:
    from genmodels.evaluation.sources import ImageSource

_BUFFER = 4096  # rows of one product X^T X
_MEMORY = 8 << 30  # bytes that the 16 blocks may take


@dataclass
class Scored:
    """What a pass leaves: on every process the moments, on the first the rows in image order.

    blocks: 16 Moments. rows: float32 (N,D) or None. logits: float32 (N,C) or None.
    """

    blocks: list[Moments]
    rows: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def moments(self) -> Moments:
        """Return the Moments of all images."""
        return merged(self.blocks)


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

    def load(self, part: str) -> dict[str, np.ndarray] | None:
        """Return {name: array} of a finished part, or None."""
        path = self._path(part)
        return self._read(path) if path.is_file() else None

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
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in names or file.files}
        except Exception as error:  # numpy raises nearly anything
            raise ValueError(f"out: {path} cannot be read ({error}); delete it") from None

    @classmethod
    def of(
        cls, out: str, name: str, source: Any, features: Features, *words: Any
    ) -> "Store | None":
        """Return the Store in OUT.blocks of a pass over a source; None if it needs none.

        That is without an out=, and of Moments, which need no pass.

        Args:
            out: path of the result, or "".
            name: of the pass.
            source: Pictures or Generated, or the Moments of a statistics file.
            features: what the pass takes of each image.
            words: what else fixes the result, or what is kept of it.
        """
        if not out or isinstance(source, Moments):
            return None
        return cls(f"{out}.blocks", name, [source.identity(), describe(features), *words])


def score_pass(
    source: "ImageSource",
    features: Features,
    *,
    shift: torch.Tensor | None = None,
    rows: bool = False,
    logits: bool = False,
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
        batch: images in one call of the net; changes no row; None = its own.
        store: Store to go on from, or None.
        label, progress: of the bar.

    Raises:
        ValueError: what `features` refuses, features too many to hold 16 covariances of, or values
            that are not finite.
    """
    rank = distributed.rank()
    split, units = _share_of_units(len(source), rank, distributed.world())
    names = {unit: f"{unit // split:02d}.{unit % split}-of-{split}" for unit in units}
    done = {}
    for unit in units:
        part = store.load(names[unit]) if store else None
        if part is not None:
            done[unit] = part
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
    with bar:
        reader = _Reader(source, features, list(todo.values()), batch, logits, bar)
        for unit, index in todo.items():
            try:
                done[unit] = _part(reader, len(index), features, shift, rows, logits)
            except ValueError:  # the same again would only fail again
                if store:
                    store.undo()
                raise
            if store:
                store.save(names[unit], done[unit])
    return Scored(
        _gathered_blocks(done, split, shift, sums_device(features)),
        _gathered_table("rows", done, units, len(source)) if rows else None,
        _gathered_table("logits", done, units, len(source)) if logits else None,
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
        self.rest: list[torch.Tensor] = []  # of the latest batch, what is not handed out yet
        self.stream: Iterator[dict[str, torch.Tensor]] = iter(())
        if indices:
            pictures = source.read(torch.cat(indices))
            self.stream = feature_rows(features, pictures, batch, self.outputs)

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
) -> dict[str, np.ndarray]:
    """Return {name: array} of the next `count` images: count, total, outer, rows, logits."""
    moments = Moments(shift=shift)
    waiting: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []
    for rows, logits in reader.take(count):
        if 8 * BLOCKS * rows.shape[1] ** 2 > _MEMORY:
            raise ValueError(
                f"features={features.name}: 16 covariances of dimension {rows.shape[1]} do not fit "
                f"into {_MEMORY >> 30} GB; choose features of a smaller dimension"
            )
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
    part = {"count": moments.count, "total": moments.total, "outer": moments.outer}
    part |= {"rows": torch.cat(kept)} if kept else {}
    part |= {"logits": torch.cat(scores)} if scores else {}
    return {key: np.asarray(torch.as_tensor(value).cpu()) for key, value in part.items()}


def _gathered_blocks(
    done: dict[int, dict[str, np.ndarray]],
    split: int,
    shift: torch.Tensor | None,
    device: torch.device,
) -> list[Moments]:
    """Return the Moments of the 16 blocks, on every process, from the parts of all."""
    world = distributed.world()
    dim = torch.tensor(max([len(part["total"]) for part in done.values()], default=0)).to(device)
    if world > 1:
        dist.all_reduce(dim, dist.ReduceOp.MAX)
    blocks = []
    for block in range(BLOCKS):
        moments = Moments(torch.zeros(int(dim)) if shift is None else shift)
        moments.shift = moments.shift.to(device)
        number = torch.zeros((), dtype=torch.float64, device=device)
        moments.total = number.new_zeros(int(dim))
        moments.outer = number.new_zeros(int(dim), int(dim))
        for unit in range(block * split, (block + 1) * split):
            if unit in done:
                number += float(done[unit]["count"])
                moments.total += torch.from_numpy(done[unit]["total"]).to(device)
                moments.outer += torch.from_numpy(done[unit]["outer"]).to(device)
        if world > 1:  # the others add zeros: the sums are those of one process, bit for bit
            for value in (number, moments.total, moments.outer):
                dist.all_reduce(value)
        moments.count = int(number)
        blocks.append(moments)
    return blocks


def _gathered_table(
    key: str,
    done: dict[int, dict[str, np.ndarray]],
    units: dict[int, torch.Tensor],
    count: int,
) -> torch.Tensor | None:
    """Return all rows in the order of the images on the first process, None on the others."""
    shares = distributed.gather(
        [(units[unit], part[key]) for unit, part in done.items() if key in part]
    )
    if shares is None:
        return None
    pairs = [pair for share in shares for pair in share]
    table = torch.empty(count, pairs[0][1].shape[1])
    for index, values in pairs:
        table[index] = torch.from_numpy(values)
    return table


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def sums_device(features: Features) -> torch.device:
    """Return where the float64 sums are taken: on the net's device if it has float64."""
    return torch.device("cpu") if features.device.type == "mps" else features.device
