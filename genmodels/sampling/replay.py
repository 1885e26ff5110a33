"""Replay buffer of persistent Langevin chains (Tieleman 2008; Du and Mordatch 2019).

Which entries go on at a step, and which of them start afresh, is a function of (seed, step): a
training that resumes with the buffer's state goes on exactly.

References: Tieleman, ICML 2008 (persistent contrastive divergence); Du and Mordatch, arXiv
1903.08689 (buffer with re-initialisation); Grathwohl et al., arXiv 1912.03263 (10,000 and 0.05).
"""

import torch

from genmodels.kernels.philox import philox, philox_uniform
from genmodels.seeding import Stream

__all__ = ["Replay"]


class Replay:
    """Chains kept between steps, on the CPU or a GPU; no module, so no average touches it.

    A copy of a model shares its buffer (see __deepcopy__).

    Args:
        size: number of entries over all processes; each owns its share.
        shape: (C, H, W) of an entry.
        reinit: probability in [0, 1] that a visited entry starts afresh, uniform in [-1, 1].
        seed: key of its randomness.

    Attributes:
        entries: float32 (own, C, H, W), None before fill() or load().
        visits: int64 (own,), visits since the entry last started afresh.
    """

    def __init__(self, size, shape, reinit, seed):
        self.size, self.shape, self.reinit, self.seed = size, tuple(shape), reinit, seed
        self.rank, self.entries, self.visits = 0, None, None

    def fill(self, rank=0, world=1, device="cpu"):
        """Start every entry of this process afresh.

        Raises:
            ValueError: the processes cannot have equal shares.
        """
        if self.size % world:
            raise ValueError(f"method.buffer={self.size}: must be a multiple of {world} processes")
        self.rank, own = rank, self.size // world
        n = torch.arange(own, device=device)
        self.entries = self.fresh(n, step=-1)
        self.visits = torch.zeros(own, dtype=torch.int64, device=device)

    def __deepcopy__(self, memo):
        return self

    def _step_key(self, step):
        """Return one int64 key for (seed, rank, step); step -1 is the first filling."""
        counters = (self.seed, self.rank, (step + 1) & 0xFFFFFFFF, (step + 1) >> 32, Stream.SLOT)
        words = philox(*(torch.tensor(int(value)) for value in counters))
        return (int(words[0]) << 31) | (int(words[1]) >> 1)

    def fresh(self, n, step):
        """Return uniform starts in [-1, 1) for the slots n, float32 (len(n), C, H, W)."""
        key = self._step_key(step)
        u = philox_uniform(self.shape, key, n, stream=int(Stream.CHAIN_START), device=n.device)
        return 2 * u - 1

    def slots(self, count, step):
        """Return `count` different entries' numbers for this step, int64 (count,).

        Raises:
            ValueError: more than the buffer holds.
        """
        own = len(self.entries)
        if count > own:
            raise ValueError(
                f"method.buffer={self.size}: gives {own} entries to this process, fewer than its "
                f"batch ({count}) needs; make it larger"
            )
        n = torch.arange(own)
        zero = torch.zeros_like(n)
        key = torch.full_like(n, self._step_key(step))
        words = philox(key, n, zero, zero, zero + int(Stream.SLOT))
        order = torch.argsort((words[0] << 31) | (words[1] >> 1), stable=True)
        return order[:count].to(self.entries.device)

    def draw(self, count, step):
        """Return (slots, states) that go on at this step; a share of them starts afresh."""
        slots = self.slots(count, step)
        u = philox_uniform((), self._step_key(step), slots, stream=int(Stream.REINIT),
                           device=slots.device)  # fmt: skip
        new = u < self.reinit
        self.visits[slots] = torch.where(new, 0, self.visits[slots]) + 1
        states = self.entries[slots]
        return slots, torch.where(new.reshape(-1, 1, 1, 1), self.fresh(slots, step), states)

    def put(self, slots, states):
        """Store the states where they came from."""
        self.entries[slots] = states.detach().to(self.entries)

    def state(self):
        """Return what a checkpoint has to hold; tensors on the CPU."""
        return {"entries": self.entries.cpu(), "visits": self.visits.cpu()}

    def load(self, state, rank=0, world=1, device="cpu"):
        """Take over this process's share of the state of all processes.

        Raises:
            ValueError: it is of another size or shape.
        """
        if state["entries"].shape != (self.size, *self.shape):
            raise ValueError(
                f"method.buffer={self.size}: the checkpoint's holds {len(state['entries'])} of "
                f"shape {tuple(state['entries'].shape[1:])}, this model's are {self.shape}; go on "
                "with the same buffer and number of processes"
            )
        self.rank, own = rank, self.size // world
        part = slice(rank * own, (rank + 1) * own)
        self.entries, self.visits = (state[k][part].to(device) for k in ("entries", "visits"))
