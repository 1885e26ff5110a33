"""Which process this is, of how many, what it takes, and what they hand each other.

The only place that asks. A training's processes are Lightning's: before its launcher has joined
them they know themselves by the environment. Those of sampling and evaluation alone are
accelerate's (torchrun), joined by pick_device or by the first thing that they hand each other.
"""

import atexit
import contextlib
import os
import time
import traceback
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
    "check_launch",
    "gather",
    "gather_rows",
    "gather_to_all",
    "is_first",
    "joined",
    "local_rank",
    "pick_device",
    "process_state",
    "rank",
    "share",
    "together",
    "wait",
    "world",
]

_alone: ContextVar[bool] = ContextVar("alone", default=False)


def rank() -> int:
    """Return the number of this process among world() of them, 0 for the first."""
    if _alone.get():
        return 0
    if joined():
        return dist.get_rank()
    return _rank_given() if world() > 1 else 0


def world() -> int:
    """Return how many processes work together."""
    if _alone.get():
        return 1
    if joined():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Return whether this process of a training writes and prints, also before they are joined.

    Unlike rank() it believes a number without a count: under srun every process would otherwise
    take itself for the only one until Lightning joins them, and make a run folder of its own.
    """
    if _alone.get() or joined():
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


def check_launch(nodes: int, devices: int) -> None:
    """Raise ValueError unless as many processes of a training were started as its config counts.

    Started too many, each would train alone; too few, they would wait for those that never come.
    None started is well on one machine: Lightning starts the rest.

    Args:
        nodes: trainer.num_nodes.
        devices: trainer.devices, processes on each of them.
    """
    wanted, given = nodes * devices, os.environ
    torchrun = f"torchrun --nproc_per_node {devices} train.py ..."
    if nodes > 1:
        torchrun = (
            f"torchrun --nnodes {nodes} --nproc_per_node {devices} --rdzv_backend c10d "
            "--rdzv_endpoint HOST:29500 train.py ... on each machine"
        )
    counts = f"trainer.num_nodes={nodes} x trainer.devices={devices} = {wanted}"
    if "WORLD_SIZE" in given:
        started = int(given["WORLD_SIZE"])
        each = int(given.get("LOCAL_WORLD_SIZE", started))
        if started != wanted:
            raise ValueError(
                f"WORLD_SIZE={started}: that many processes were started, but {counts}; write "
                f"trainer.num_nodes={started // each} trainer.devices={each}, or start {torchrun}"
            )
        if given.get("LOCAL_WORLD_SIZE", str(devices)) != str(devices):
            raise ValueError(
                f"LOCAL_WORLD_SIZE={each}: processes on this machine, but {counts}; write "
                f"trainer.num_nodes={started // each} trainer.devices={each}, or start {torchrun}"
            )
        lacking = [name for name in ("RANK", "LOCAL_RANK") if name not in given]
        if wanted > 1 and lacking == ["RANK", "LOCAL_RANK"]:
            raise ValueError(
                f"WORLD_SIZE={started}: is set without RANK and LOCAL_RANK, so the processes do "
                f"not know themselves; unset it, or start {torchrun}"
            )
        return
    # An interactive shell of SLURM is a plain machine; Lightning takes it so too.
    if "SLURM_NTASKS" in given and given.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        started = int(given["SLURM_NTASKS"])
        srun = f"srun --nodes {nodes} --ntasks-per-node {devices} python train.py ..."
        by_srun = "SLURM_STEP_ID" in given or "SLURM_STEPID" in given
        if not by_srun and max(started, wanted) > 1:
            raise ValueError(
                f"SLURM_NTASKS={started}: python was started without srun, as one process of "
                f"{started}, and would wait for the others; start {srun}"
            )
        if started != wanted or (wanted > 1 and "SLURM_NTASKS_PER_NODE" not in given):
            raise ValueError(
                f"SLURM_NTASKS={started}: that many processes were asked for, but {counts}, with "
                f"--ntasks-per-node; start {srun}"
            )
        return
    for name in ("RANK", "LOCAL_RANK"):
        if name in given:
            raise ValueError(
                f"{name}={given[name]}: is set without WORLD_SIZE, so nobody knows how many "
                f"processes there are; unset it, or start {torchrun}"
            )
    if nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={nodes}: the processes of several machines have to be started on "
            f"each; start {torchrun}"
        )


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


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raise on every process what the block raises on any; all of them have to enter it.

    One that failed alone would leave the others waiting in the next thing that they hand each
    other. The block itself must hand nothing around.

    Raises:
        ValueError: of another process, its text; the process's own error is raised as it is.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if world() == 1:
            raise
        error = caught
        traceback.clear_frames(error.__traceback__)  # what they hold, large tensors maybe
    lines = gather_to_all(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for number, line in enumerate(lines):
        if line is not None:
            raise ValueError(f"process {number}: {line}")


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

    before = joined()
    # Without cpu= every CPU rank takes itself for the only one.
    state = PartialState(cpu=not torch.cuda.is_available())
    if joined() and not before:
        atexit.register(_leave)
    return state


def pick_device(name: str) -> torch.device:
    """Return this process's device of that name; "auto" is a GPU if there is one."""
    device = process_state().device
    return device if name in ("auto", device.type) else torch.device(name)


def _join() -> None:
    """Join the processes of torchrun, unless Lightning or accelerate has."""
    if not joined():
        process_state()


def _leave() -> None:
    """Leave the group: threads of it that still run when Python ends would abort the process."""
    if joined():
        dist.destroy_process_group()


def joined() -> bool:
    """Return whether the processes are joined, by Lightning or by accelerate."""
    return dist.is_available() and dist.is_initialized()


def _rank_given() -> int:
    """Return the number that whoever started this process gave it, else 0; as Lightning asks."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))
