"""Where the planes of a stack lie: axes around them, slowest first, and how many along each."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grid:
    """The planes of a stack, numbered along their axes: T time, Z depth, C channels, I or Q others.

    Attributes:
        axes: a capital letter each, slowest first; "" of a single plane.
        counts: how many planes along each.
    """

    axes: str
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return math.prod(self.counts)

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return dict(zip(self.axes, self.counts)).get("C", 1)

    def index(self, number: int) -> tuple[int, ...]:
        """Return the position of a plane along all axes."""
        if not self.counts:
            return ()
        return tuple(int(k) for k in np.unravel_index(number, self.counts))

    def channel(self, number: int) -> int:
        """Return which channel a plane is of."""
        return dict(zip(self.axes, self.index(number))).get("C", 0)

    def position(self, number: int) -> tuple[int, ...]:
        """Return where a plane lies along the axes but that of the channels."""
        return tuple(k for axis, k in zip(self.axes, self.index(number)) if axis != "C")

    def label(self, number: int) -> str:
        """Return what tells a plane from the others: "[t0,z3,c1]", "[3]", or "" of a single one."""
        index = self.index(number)
        if set(self.axes) <= {"I"} or set(self.axes) <= {"Q"}:
            return "".join(f"[{k}]" for k in index)
        return f"[{','.join(f'{axis.lower()}{k}' for axis, k in zip(self.axes, index))}]"
