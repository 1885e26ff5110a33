"""One pass of a feature net over a set of images: moments in 16 blocks, rows if a score needs them.

Images are read or generated as they are needed and dropped after their features are taken. Every
process works on blocks of its own; the sums of a block never depend on how many processes there
are. A finished block is a file, so that a killed pass goes on where it stopped.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from genmodels import atomic, distributed
from genmodels.metrics.errorbars import BLOCKS, block_of
from genmodels.metrics.features import feature_rows
from genmodels.metrics.frechet import Moments
from genmodels.metrics.stats import describe

_BUFFER = 4096  # rows of one product X^T X
_MEMORY = 8 << 30  # bytes that the 16 blocks may take


@dataclass
class Scored:
    """What a pass leaves: on every process the moments, on the first the rows in image order.

    blocks: 16 Moments. rows: float32 (N,D) or None. logits: float32 (N,C) or None.
    """

    blocks: list
    rows: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def moments(self):
        """Return the Moments of all images."""
        whole = Moments()
        for block in self.blocks:
            whole.merge(block)
        return whole


class Store:
    """Finished parts of a pass as files FOLDER/NAME-PART.npz.

    Args:
        folder: made when the first part is written.
        name: of the pass.
        identity: anything JSON can hold that fixes the pass's result.

    Raises:
        ValueError: the folder holds parts of another pass of this name.
    """

    def __init__(self, folder, name, identity):
        self.folder, self.name, self.written = Path(folder), name, []
        self.mark = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        for path in self.files():
            if self._read(path, only="mark")["mark"] != self.mark:
                raise ValueError(
                    f"out={str(folder).removesuffix('.blocks')}: {path} was left by another "
                    f"evaluation; delete {folder} or choose another out="
                )

    def files(self):
        """Return the files of finished parts."""
        return sorted(self.folder.glob(f"{self.name}-*.npz"))

    def load(self, part):
        """Return {name: array} of a finished part, or None."""
        path = self._path(part)
        return self._read(path) if path.is_file() else None

    def save(self, part, **arrays):
        """Write a finished part, all or nothing."""
        self.folder.mkdir(exist_ok=True)
        # Not flushed: a killed process leaves old or new, and what a crash spoils is told below.
        with atomic.whole_file(self._path(part), flush=False) as file:
            np.savez(file, mark=np.array(self.mark), **arrays)
        self.written.append(self._path(part))

    def undo(self):
        """Delete what this object has written."""
        for path in self.written:
            path.unlink(missing_ok=True)
        _remove_empty(self.folder)

    @staticmethod
    def clear(out):
        """Delete the parts of all passes in OUT.blocks, and the folder if nothing else is in it."""
        folder = Path(f"{out}.blocks")
        for path in folder.glob("*-*-of-*.npz"):
            path.unlink()
        atomic.remove_partial(folder)
        _remove_empty(folder)

    def _path(self, part):
        return self.folder / f"{self.name}-{part}.npz"

    def _read(self, path, only=None):
        try:
            with np.load(path, allow_pickle=False) as file:
                return {only: file[only]} if only else dict(file)
        except Exception as error:  # numpy raises nearly anything
            raise ValueError(f"out: {path} cannot be read ({error}); delete it") from None

    @classmethod
    def of(cls, out, name, source, features, *words):
        """Return the Store in OUT.blocks of a pass over a source, or None where there is no out=.

        words: what else fixes the result, or what is kept of it.
        """
        if not out or not hasattr(source, "identity"):
            return None
        return cls(f"{out}.blocks", name, [source.identity(), describe(features), *words])


def score_pass(
    source,
    features,
    *,
    shift=None,
    rows=False,
    logits=False,
    batch=None,
    store=None,
    label="features",
    progress=True,
):
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
    split, own = _own_units(len(source), rank, distributed.world())
    names = {unit: f"{unit // split:02d}.{unit % split}-of-{split}" for unit in own}
    done = {unit: store.load(names[unit]) if store else None for unit in own}
    done = {unit: part for unit, part in done.items() if part is not None}
    todo = {unit: index for unit, index in own.items() if unit not in done and len(index)}
    bar = tqdm(
        total=sum(map(len, own.values())),
        desc=label,
        unit="img",
        delay=0.5,
        disable=not progress or rank > 0,
        initial=sum(len(own[unit]) for unit in done),
    )
    if done and rank == 0:
        bar.write(f"{label}: {len(done)} of {len(own)} blocks of this process are done already")
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
                store.save(names[unit], **done[unit])
    return Scored(*_gathered(done, own, len(source), split, shift, features, rows, logits))


def _own_units(count, rank, world):
    """Return (parts of a block, {unit: places of its images}) of one process.

    A unit is a block; with more than 16 processes, which would have none, a part of a block.
    """
    split, numbers = math.ceil(world / BLOCKS), block_of(count)
    return split, {
        unit: (numbers == unit // split).nonzero().flatten()[unit % split :: split]
        for unit in range(rank, BLOCKS * split, world)
    }


class _Reader:
    """Rows and class scores of the images of several lists of places, handed out by number.

    Batches of the net run across the lists, so that short lists fill them too.
    """

    def __init__(self, source, features, indices, batch, logits, bar):
        self.outputs = (features.outputs[0], "logits") if logits else features.outputs[:1]
        self.bar, self.rest, self.stream = bar, None, iter(())
        if indices:
            pictures = source.read(torch.cat(indices))
            self.stream = feature_rows(features, pictures, batch, self.outputs)

    def take(self, count):
        """Yield (rows, class scores or None) of the next `count` images."""
        while count:
            if self.rest is None:
                found = next(self.stream)
                self.rest = [found[name] for name in self.outputs]
            parts, left = self.rest, len(self.rest[0]) - count
            self.rest = [part[count:] for part in parts] if left > 0 else None
            parts = [part[:count] for part in parts]
            yield parts[0], parts[1] if len(parts) > 1 else None
            self.bar.update(len(parts[0]))
            count -= len(parts[0])


def _part(reader, count, features, shift, keep_rows, keep_logits):
    """Return {name: array} of the next `count` images: count, total, outer, rows, logits."""
    moments, waiting, kept, scores = Moments(shift=shift), [], [], []
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
        if keep_logits:
            scores.append(logits.cpu())
    if waiting:
        moments.update(torch.cat(waiting))
    part = {"count": moments.count, "total": moments.total, "outer": moments.outer}
    part |= {"rows": torch.cat(kept)} if kept else {}
    part |= {"logits": torch.cat(scores)} if scores else {}
    return {key: np.asarray(torch.as_tensor(value).cpu()) for key, value in part.items()}


def _gathered(done, own, count, split, shift, features, keep_rows, keep_logits):
    """Return (blocks on every process, rows and class scores on the first) from all parts."""
    world = distributed.world()
    device = sums_device(features)
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
    tables = [
        _table(key, done, own, count) if keep else None
        for key, keep in (("rows", keep_rows), ("logits", keep_logits))
    ]
    return blocks, *tables


def _table(key, done, own, count):
    """Return all rows in the order of the images on the first process, None on the others."""
    shares = distributed.gather(
        [(own[unit], part[key]) for unit, part in done.items() if key in part]
    )
    if shares is None:
        return None
    pairs = [pair for share in shares for pair in share]
    table = torch.empty(count, pairs[0][1].shape[1])
    for index, values in pairs:
        table[index] = torch.from_numpy(values)
    return table


def _remove_empty(folder):
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def sums_device(features):
    """Return where the float64 sums are taken: on the net's device if it has float64."""
    return torch.device("cpu") if features.device.type == "mps" else features.device
