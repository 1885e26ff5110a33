"""Replay buffer of persistent Langevin chains (Tieleman 2008; Du and Mordatch 2019).

Which entries go on at a step, and which of them start afresh, is a function of (seed, step): a
training that resumes with the buffer's state goes on exactly.

References: Tieleman, ICML 2008 (persistent contrastive divergence); Du and Mordatch, arXiv
1903.08689 (buffer with re-initialisation); Grathwohl et al., arXiv 1912.03263 (10,000 and 0.05).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from genmodels.kernels.broadcast import over_items
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
        seed: key of its randomness; with another `retry` it draws other numbers.

    Attributes:
        entries: float32 (share, C, H, W), None before fill() or load().
        visits: int64 (share,), visits since the entry last started afresh.
    """

    def __init__(self, size: int, shape: Sequence[int], reinit: float, seed: int, retry: int = 0):
        self.size = size
        self.shape = tuple(shape)
        self.reinit = reinit
        self.seed = seed
        self.retry = retry
        self.rank = 0
        self.entries: Tensor | None = None
        self.visits: Tensor | None = None

    def fill(self, rank: int = 0, world: int = 1, device: torch.device | str = "cpu") -> None:
        """Start every entry of this process afresh.

        Raises:
            ValueError: the processes cannot have equal shares.
        """
        if self.size % world:
            raise ValueError(f"method.buffer={self.size}: must be a multiple of {world} processes")
        self.rank = rank
        n = torch.arange(self.size // world, device=device)
        self.entries = self.fresh(n, self.keys(-1)[0])
        self.visits = torch.zeros(len(n), dtype=torch.int64, device=device)

    def to(self, device: torch.device | str) -> None:
        """Move the entries and their counters there."""
        self.entries = self.entries.to(device)
        self.visits = self.visits.to(device)

    def __deepcopy__(self, memo: dict) -> "Replay":
        return self

    def keys(self, step: int) -> tuple[int, int]:
        """Return two int keys of (seed, retry, process, step): of the buffer, of the chains."""
        process = self.rank + (self.retry << 20)
        step, stream = step + 1, int(Stream.SLOT)  # step -1 is the first filling
        words = philox(self.seed, process, step & 0xFFFFFFFF, step >> 32, stream)  # plain ints
        return (words[0] << 31) | (words[1] >> 1), (words[2] << 31) | (words[3] >> 1)

    def fresh(self, n: Tensor, key: int) -> Tensor:
        """Return uniform starts in [-1, 1) for the slots n, float32 (len(n), C, H, W)."""
        u = philox_uniform(self.shape, key, n, stream=int(Stream.CHAIN_START), device=n.device)
        return 2 * u - 1

    def slots(self, count: int, step: int) -> Tensor:
        """Return `count` different entries' numbers for this step, int64 (count,).

        Raises:
            ValueError: more than the buffer holds.
        """
        share = len(self.entries)
        if count > share:
            raise ValueError(
                f"method.buffer={self.size}: gives {share} entries to this process, fewer than its "
                f"batch ({count}) needs; make it larger"
            )
        n = torch.arange(-(-share // 4))
        key = torch.tensor(self.keys(step)[0])
        words = philox(key, n, 0 * n, 0 * n, 0 * n + int(Stream.SLOT))
        order = torch.argsort(torch.stack(words, dim=1).flatten()[:share], stable=True)
        return order[:count].to(self.entries.device)

    def draw(self, count: int, step: int) -> tuple[Tensor, Tensor]:
        """Return (slots, states) that go on at this step; a share of them starts afresh."""
        slots, key = self.slots(count, step), self.keys(step)[0]
        u = philox_uniform((count,), key, 0, stream=int(Stream.REINIT), device=slots.device)[0]
        new = u < self.reinit
        anew = over_items(new, self.entries)
        # Where, not an index: which and how many they are is known on the device alone.
        states = torch.where(anew, self.fresh(slots, key), self.entries[slots])
        self.visits[slots] = torch.where(new, 0, self.visits[slots]) + 1
        return slots, states

    def put(self, slots: Tensor, states: Tensor, valid: Tensor | None = None) -> None:
        """Store the states where they came from, unless `valid`, a bool on the device, is false."""
        states = states.detach().to(self.entries)
        if valid is not None:
            states = torch.where(valid, states, self.entries[slots])
        self.entries[slots] = states

    def aged(self, visits: int) -> Tensor:
        """Return the entries' numbers that have this many visits at least, int64, in order."""
        return (self.visits >= visits).nonzero()[:, 0]

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to hold; tensors on the CPU. Nothing before fill()."""
        if self.entries is None:
            return {}
        return {"entries": self.entries.cpu(), "visits": self.visits.cpu()}

    def load(
        self,
        state: dict[str, Tensor],
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Take over this process's share of the state of all processes.

        Raises:
            ValueError: it is of another size or shape.
        """
        if state["entries"].shape != (self.size, *self.shape):
            raise ValueError(
                f"method.buffer={self.size}: the checkpoint's holds {len(state['entries'])} of "
                f"shape {tuple(state['entries'].shape[1:])}, this model's are {self.shape}; go on "
                "with the same buffer"
            )
        self.rank = rank
        share = self.size // world
        part = slice(rank * share, (rank + 1) * share)
        self.entries = state["entries"][part].to(device)
        self.visits = state["visits"][part].to(device)
