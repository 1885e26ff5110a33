"""A run folder OUT_DIR/NAME/TIME: what lies where in it, and who may work there.

config.yaml                         the whole config
metrics.csv                         a line for each logged step
samples/                            pictures on the way
ema/step-XXXXXXXX-0.050.safetensors averages of the weights of that relative width
checkpoints/step-XXXXXXXX.ckpt      the latest few
checkpoints/last.ckpt               the latest, which is the run's model
checkpoints/best.ckpt               that of the best score on the way, with checkpoint.best
report.html                         all of it to look at
training.json                       what computed, and for how long
"""

import contextlib
import errno
import os
import re
import shutil
import stat
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genmodels.atomic import make_folder
from genmodels.config import Config, to_plain
from genmodels.config.load import read_yaml
from genmodels.distributed import is_first
from genmodels.foreign import open_plain

__all__ = ["Run", "check_output", "holds_arrays"]

_TIME = re.compile(r"\d{8}-\d{6}(-\d+)?")  # see Run.new


@dataclass(frozen=True)
class Run:
    """A run folder, there or not; Run.new makes one, Run.open finds one.

    Args:
        folder: of the run.
        made_in: of a new run, the folder that was there before it; see discard().
    """

    folder: Path
    made_in: Path | None = field(default=None, compare=False)

    @classmethod
    def new(cls, cfg: Config) -> "Run":
        """Return a new run OUT_DIR/NAME/TIME; its folders are made on the first process only."""
        base = Path(cfg.out_dir).expanduser() / cfg.name / time.strftime("%Y%m%d-%H%M%S")
        made_in = next(folder for folder in base.parents if os.path.lexists(folder))
        run, number = cls(base, made_in), 2
        while is_first():  # no other process writes
            try:
                make_folder(run.checkpoints)
                run.samples.mkdir()
                break
            except FileExistsError:  # two runs in one second
                run = cls(base.with_name(f"{base.name}-{number}"), made_in)
                number += 1
        return run

    def discard(self) -> None:
        """Delete a new run that has nothing to show, and the folders that were made for it."""
        begun = self.metrics.exists() or any(self.samples.glob("*")) or any(self.steps())
        if self.made_in is None or begun or not is_first():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in self.folder.parents:
            if folder == self.made_in:
                break
            with contextlib.suppress(OSError):  # another run may be in it by now
                folder.rmdir()

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """Return the run in a folder.

        Raises:
            ValueError: no run lies there.
        """
        run = cls(Path(path).expanduser())
        if not run.config.is_file():
            newest = cls.newest(run.folder)
            hint = f"; its newest is {newest.folder}" if newest else ""
            raise ValueError(
                f"resume={run.folder}: no config.yaml there; give the folder of a run{hint}"
            )
        return run

    @classmethod
    def newest(cls, folder: Path | str) -> "Run | None":
        """Return the newest of the runs NAME/TIME in a folder NAME that has saved something."""
        runs = [cls(path.parent) for path in Path(folder).glob("*/config.yaml")]
        runs = [run for run in runs if _TIME.fullmatch(run.folder.name)]
        runs = [run for run in runs if run.last.exists() or run.steps()]
        return max(runs, key=lambda run: run.folder.name, default=None)

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
    def report(self) -> Path:
        """The page that shows the run."""
        return self.folder / "report.html"

    @property
    def training(self) -> Path:
        """What computed the run, and for how long."""
        return self.folder / "training.json"

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

    @property
    def best(self) -> Path:
        """The checkpoint of the best score on the way."""
        return self.checkpoints / "best.ckpt"

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

        with open(self.folder / ".lock", "a+", opener=_open_lock) as file:
            try:  # gone with the process, also a killed one's
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                number = file.read(20).strip()
                raise ValueError(
                    f"resume={self.folder}: another process is at work there"
                    f"{f' ({number})' if number.isdecimal() else ''}; wait for it or stop it"
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            _locks.add(file.fileno())
            try:
                yield
            finally:
                _locks.discard(file.fileno())


def _open_lock(path: str, flags: int) -> int:
    """Return the lock opened; a link in a run from elsewhere would empty what it leads to."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no plain file; delete it", path)
    return descriptor


# A process that reads images would hold the lock on after its killed parent.
_locks: set[int] = set()


def _release() -> None:
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release)


def check_output(
    key: str,
    out: Path | str,
    inputs: Iterable[Path | str] = (),
    *,
    folder: bool = False,
    earlier: Callable[[Path], bool] = lambda path: False,
) -> None:
    """Raise ValueError if a command would write over what it reads, a run's own files or another's.

    Args:
        key: what errors call the output.
        out: a file or folder to write; it need not exist.
        inputs: what the command reads: paths, lists of them, or words that are none.
        folder: `out` is a folder, to which .png, .npz and .csv files go.
        earlier: whether a file that is there is an earlier output of the same command.
    """
    target = _resolved(out)
    if target is None:
        raise ValueError(f"{key}={str(out)!r}: is no path")
    for text in inputs:
        for source in map(_resolved, {str(text), *str(text).split(",")} - {""}):
            if source is None:
                continue
            if target == source or _same_file(target, source):
                raise ValueError(f"{key}={out}: is what the command reads; name another")
            if folder and source.parent == target and source.suffix in _IN_FOLDERS:
                raise ValueError(f"{key}={out}: holds {source.name}, which is read; name another")
    for above in (target, *target.parents):
        first = target.relative_to(above).parts[:1]
        # Some systems do not tell capitals from small letters.
        own = not first or first[0].lower() in _OWN or first[0].lower().startswith("round-")
        if own and Run(above).config.is_file() and Run(above).checkpoints.is_dir():
            raise ValueError(
                f"{key}={out}: lies among the own files of the run {above}; name another place"
            )
    if not folder and os.path.lexists(target) and not earlier(target):
        raise ValueError(
            f"{key}={out}: exists, and is no earlier output of this command; delete it or choose "
            "another name"
        )


_IN_FOLDERS = (".png", ".npz", ".csv")
_OWN = (
    "config.yaml",
    "metrics.csv",
    "report.html",
    "training.json",
    "samples",
    "checkpoints",
    "ema",
    ".lock",
)


def _resolved(text: Path | str) -> Path | None:
    """Return where a path leads, None of a text that can be none."""
    try:
        return Path(text).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # no such user, a circle of links, a NUL
        return None


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def holds_arrays(path: Path, names: Iterable[str]) -> bool:
    """Return whether a file is an .npz with arrays of these names."""
    try:
        with open_plain(path) as file, zipfile.ZipFile(file) as archive:
            return {f"{name}.npy" for name in names} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _agree(old: Any, new: Any) -> bool:
    """Return whether all keys of an older config have their values today; newer keys do not count.

    A value that an older config could not have is one that is filled in.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return all(key in new and _agree(value, new[key]) for key, value in old.items())
    return old == new
