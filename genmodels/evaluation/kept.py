"""Features kept in a file on request, so that other metrics and later commands need no pass."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genmodels import atomic
from genmodels.distributed import rank
from genmodels.evaluation.passes import Scored
from genmodels.foreign import open_npz
from genmodels.metrics.features import Features
from genmodels.metrics.stats import describe

if TYPE_CHECKING:
    from genmodels.evaluation.sources import ImageSource

_TABLES = ("rows", "logits", "marks")


class KeptFeatures:
    """Features of sets of images, by what made them, in an npz.

    A set is known by its pixels (a model's by its weights, seeds and settings) and by the feature
    network. The file holds arrays MARK.rows (N, D), MARK.logits (N, C) where the network gives
    them and MARK.marks (N,), and MARK.meta, a JSON text that says of what.

    Args:
        path: the file; it need not exist.

    Raises:
        ValueError: it cannot be read.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.arrays: dict[str, Any] = {}
        self.read: list[str] = []  # marks whose features spared a pass
        self.changed = False
        if not self.path.is_file():
            return
        try:
            with open_npz(self.path) as file:
                self.arrays = file.read_unpacked()
        except Exception as error:  # numpy raises nearly anything
            raise ValueError(f"keep={path}: cannot be read ({error}); delete it") from None
        strange = [n for n in self.arrays if n.partition(".")[2] not in (*_TABLES, "meta")]
        if strange:
            raise ValueError(
                f"keep={path}: holds {strange[0]}, so it is no file of kept features; name another"
            )
        for name in self.arrays:
            mark, _, table = name.partition(".")
            if not _fits(self.arrays[name], table, self.arrays.get(f"{mark}.rows")):
                raise ValueError(f"keep={path}: {name} is no table of features; delete the file")

    def scored(
        self, source: "ImageSource", features: Features, shift: torch.Tensor | None = None
    ) -> Scored | None:
        """Return what a pass over the source would leave, or None if it is not kept.

        Args:
            source: Pictures or Generated.
            features: of the pass.
            shift: as for score_pass.
        """
        mark = _mark(source, features)
        if f"{mark}.rows" not in self.arrays:
            return None
        rows = self.arrays[f"{mark}.rows"]
        if len(rows) != len(source) or features.dim not in (None, rows.shape[1]):
            raise ValueError(
                f"keep={self.path}: {mark}.rows has shape {rows.shape} for {len(source)} images; "
                "delete the file"
            )
        self.read.append(mark)
        found = {
            name: torch.from_numpy(self.arrays[f"{mark}.{name}"])
            for name in _TABLES
            if f"{mark}.{name}" in self.arrays
        }
        scored = Scored.of_rows(found.pop("rows"), features, shift, **found)
        return scored if rank() == 0 else Scored(scored.blocks)

    def add(self, source: "ImageSource", features: Features, scored: Scored) -> None:
        """Take what a pass has left; the file is written by `write`."""
        if scored.rows is None:  # another process has them
            return
        mark = _mark(source, features)
        for name in _TABLES:
            table = getattr(scored, name)
            if table is not None:
                self.arrays[f"{mark}.{name}"] = table.cpu().numpy()
        meta: dict[str, Any] = {"num": len(scored.rows), "features": describe(features)}
        self.arrays[f"{mark}.meta"] = np.array(json.dumps(meta))
        self.changed = True

    def write(self) -> None:
        """Write the file, all or nothing, if there is anything new; on the first process."""
        if self.changed and rank() == 0:
            with atomic.whole_file(self.path) as file:
                np.savez(file, **self.arrays)


def _fits(array: np.ndarray, table: str, rows: np.ndarray | None) -> bool:
    """Return whether an array may stand in a table beside these rows."""
    if table == "meta":
        return True
    kind, axes = (np.int64, 1) if table == "marks" else (np.float32, 2)
    if array.dtype != kind or array.ndim != axes or rows is None:
        return False
    return array.shape[:1] == rows.shape[:1]


def _mark(source: Any, features: Features) -> str:
    words = [source.identity(), describe(features)]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]
