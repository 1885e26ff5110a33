"""A run folder OUT_DIR/NAME/TIME: what lies where in it, and who may work there.

config.yaml                         the whole config
metrics.csv                         a line for each logged step
samples/                            pictures on the way
ema/step-XXXXXXXX-0.050.safetensors averages of the weights of that relative width
checkpoints/step-XXXXXXXX.ckpt      the latest few
checkpoints/last.ckpt               the latest, which is the run's model
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genmodels.config import Config, to_plain
from genmodels.config.load import read_yaml
from genmodels.distributed import is_first

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """A run folder, there or not; Run.new makes one, Run.open finds one."""

    folder: Path

    @classmethod
    def new(cls, cfg: Config) -> "Run":
        """Return a new run OUT_DIR/NAME/TIME; its folders are made on the first process only."""
        base = Path(cfg.out_dir).expanduser() / cfg.name / time.strftime("%Y%m%d-%H%M%S")
        run, number = cls(base), 2
        while is_first():  # no other process writes
            try:
                run.checkpoints.mkdir(parents=True)
                run.samples.mkdir()
                break
            except FileExistsError:  # two runs in one second
                run, number = cls(base.with_name(f"{base.name}-{number}")), number + 1
        return run

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """Return the run in a folder.

        Raises:
            ValueError: no run lies there.
        """
        run = cls(Path(path).expanduser())
        if not run.config.is_file():
            raise ValueError(f"resume={run.folder}: no config.yaml there; give the folder of a run")
        return run

    @classmethod
    def unfinished(cls, cfg: Config, finished: Callable[["Run"], bool]) -> "Run | None":
        """Return the newest unfinished run of this very config, or None.

        Args:
            cfg: Config with its data.shape filled in.
            finished: whether a run is over.
        """
        base = Path(cfg.out_dir).expanduser()
        runs = [cls(path.parent) for path in base.glob(f"{cfg.name}/*/config.yaml")]
        for run in sorted(runs, key=lambda run: run.folder, reverse=True):
            old: Any = read_yaml(run.config)
            if _agree(old, to_plain(cfg)) and not finished(run):
                return run
        return None

    @property
    def config(self) -> Path:
        """The run's config, all keys of it."""
        return self.folder / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The table of the logged steps."""
        return self.folder / "metrics.csv"

    @property
    def samples(self) -> Path:
        """The folder of the pictures."""
        return self.folder / "samples"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def averages(self) -> Path:
        """The folder of the averages that post-hoc EMA is made of."""
        return self.folder / "ema"

    @property
    def last(self) -> Path:
        """The latest checkpoint."""
        return self.checkpoints / "last.ckpt"

    def checkpoint(self, step: int) -> Path:
        """Return the checkpoint of an optimizer step."""
        return self.checkpoints / f"step-{step:08d}.ckpt"

    def steps(self) -> list[Path]:
        """Return the checkpoints of steps that are there, in the order of their steps."""
        return sorted(self.checkpoints.glob("step-*.ckpt"))

    def make_folders(self) -> None:
        """Make what is missing of the run's folders; copying may have lost the empty ones."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.samples.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second command from working in the same folder at the same time.

        Raises:
            ValueError: another process is at work there.
        """
        if not is_first() or os.name == "nt":
            yield
            return
        import fcntl

        with open(self.folder / ".lock", "w") as file:
            try:  # gone with the process, also a killed one's
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"resume={self.folder}: another process is at work there; wait for it or "
                    "stop it"
                ) from None
            yield


def _agree(old: Any, new: Any) -> bool:
    """Return whether all keys of an older config have their values today; newer keys do not count.

    A value that an older config could not have is one that is filled in.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return all(key in new and _agree(value, new[key]) for key, value in old.items())
    return old == new
