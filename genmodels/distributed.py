"""Which process this is, of how many, and what they hand each other."""

import contextlib

import torch
import torch.distributed as dist
from accelerate import PartialState


def process_state():
    """Return accelerate's PartialState: one process, or the ranks of torchrun."""
    # Without cpu= every CPU rank takes itself for the only one.
    return PartialState(cpu=not torch.cuda.is_available())


def pick_device(name):
    """Return this process's device of that name; "auto" is a GPU if there is one."""
    own = process_state().device
    return own if name in ("auto", own.type) else torch.device(name)


def gather(thing):
    """Return the things of all processes in their order on the first, None on the others."""
    rank, world = ranks()
    if world == 1:
        return [thing]
    things = [None] * world if rank == 0 else None
    dist.gather_object(thing, things)
    return things


_by_itself = False


@contextlib.contextmanager
def by_itself():
    """Let this process score alone, as one of one, while the others wait."""
    global _by_itself
    before, _by_itself = _by_itself, True
    try:
        yield
    finally:
        _by_itself = before


def ranks():
    """Return (rank, number of processes)."""
    if not _by_itself and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
