"""Which process this is, of how many, what it takes, and what they hand each other.

The only place that asks. A training's processes are Lightning's: before its launcher has joined
them they know themselves by the environment. Those of sampling and evaluation alone are
accelerate's (torchrun), joined by pick_device or by the first thing that they hand each other.
"""

import atexit
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = [
    "alone",
    "barrier",
    "gather",
    "gather_rows",
    "gather_to_all",
    "is_first",
    "local_rank",
    "pick_device",
    "process_state",
    "rank",
    "share",
    "wait",
    "world",
]

_alone: ContextVar[bool] = ContextVar("alone", default=False)


def rank() -> int:
    """Return the number of this process among world() of them, 0 for the first."""
    if _alone.get():
        return 0
    if _joined():
        return dist.get_rank()
    return _rank_given() if world() > 1 else 0


def world() -> int:
    """Return how many processes work together."""
    if _alone.get():
        return 1
    if _joined():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Return whether this process of a training writes and prints, also before they are joined.

    Unlike rank() it believes a number without a count: under srun every process would otherwise
    take itself for the only one until Lightning joins them, and make a run folder of its own.
    """
    if _alone.get() or _joined():
        return rank() == 0
    return _rank_given() == 0


def local_rank() -> int:
    """Return the number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def share(count: int) -> range:
    """Return the indices, of `count` things, of those that this process takes."""
    return range(rank(), count, world())


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let this process work on its own, as one of one, while the others wait."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def gather(thing: Any) -> list[Any] | None:
    """Return the things of all processes in their order on the first, None on the others."""
    if world() == 1:
        return [thing]
    _join()
    things: list[Any] | None = [None] * world() if rank() == 0 else None
    dist.gather_object(thing, things)
    return things


def gather_to_all(thing: Any) -> list[Any]:
    """Return the things of all processes in their order, on every process."""
    if world() == 1:
        return [thing]
    _join()
    things: list[Any] = [None] * world()
    dist.all_gather_object(things, thing)
    return things


def gather_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return the rows of all processes, on every process.

    Args:
        rows: of share(count), on the CPU.
        count: how many there are together.
    """
    if world() == 1:
        return rows
    parts = gather_to_all(rows.numpy())
    together = np.empty((count, *rows.shape[1:]), parts[0].dtype)
    for number, part in enumerate(parts):
        together[number :: len(parts)] = part
    return torch.from_numpy(together)


def barrier() -> None:
    """Wait until all processes are here."""
    if world() > 1:
        _join()
        dist.barrier()


def wait(ready: Callable[[], bool]) -> None:
    """Wait for another process's part; no collective, which would time out in a long wait.

    Raises:
        RuntimeError: the process that started this one has ended.
    """
    while not ready():
        if os.getppid() == 1 and not is_first():
            raise RuntimeError("the process that started this one has ended")
        time.sleep(0.1)


def process_state() -> "PartialState":
    """Return accelerate's PartialState: one process, or the ranks of torchrun, now joined.

    Not to be asked for before Lightning's launcher has started a training's processes: it would
    join them to a group of its own.
    """
    from accelerate import PartialState

    before = _joined()
    # Without cpu= every CPU rank takes itself for the only one.
    state = PartialState(cpu=not torch.cuda.is_available())
    if _joined() and not before:
        atexit.register(_leave)
    return state


def pick_device(name: str) -> torch.device:
    """Return this process's device of that name; "auto" is a GPU if there is one."""
    device = process_state().device
    return device if name in ("auto", device.type) else torch.device(name)


def _join() -> None:
    """Join the processes of torchrun, unless Lightning or accelerate has."""
    if not _joined():
        process_state()


def _leave() -> None:
    """Leave the group: threads of it that still run when Python ends would abort the process."""
    if _joined():
        dist.destroy_process_group()


def _joined() -> bool:
    """Return whether the processes are joined, by Lightning or by accelerate."""
    return dist.is_available() and dist.is_initialized()


def _rank_given() -> int:
    """Return the number that whoever started this process gave it, else 0; as Lightning asks."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))
