"""Which values of a file are black and white, and the straight line between them.

A camera's 12 bits in a file of 16 reach a sixteenth of its range; a network that knows pictures
from black to white wants them stretched. What is stretched is put back on writing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

LOW, HIGH = 0.001, 0.999  # the quantiles that become black and white
SAMPLED = 1 << 22  # values of a file that has more kinds of them than can be counted


@dataclass(frozen=True)
class Scale:
    """The line that takes black to -1 and white to 1, and back; values may lie beyond."""

    black: float
    white: float

    def to_image(self, values: np.ndarray) -> np.ndarray:
        """Return values of the file on the [-1, 1] scale, float64."""
        return (values.astype(np.float64) - self.black) / ((self.white - self.black) / 2) - 1

    def from_image(self, image: np.ndarray) -> np.ndarray:
        """Return the values of the file of an image on the [-1, 1] scale, float64."""
        return (image.astype(np.float64) + 1) * ((self.white - self.black) / 2) + self.black

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        """Return pixels (H, W) or (H, W, C) on the [-1, 1] scale, float32 (C, H, W)."""
        return torch.from_numpy(self.to_image(np.atleast_3d(values))).movedim(2, 0).float()

    @property
    def ends(self) -> tuple[float, float]:
        """(black, white)."""
        return self.black, self.white

    def over(self, other: "Scale") -> float:
        """Return how many times as wide as another it is."""
        return (self.white - self.black) / (other.white - other.black)


def whole_range(dtype: np.dtype) -> Scale:
    """Return black and white of a file by its type: 0 and 255, for whole numbers the largest."""
    return Scale(0, np.iinfo(dtype).max if dtype.kind in "iu" else 255)


def as_type(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return floats as values of a type; whole numbers rounded and clipped to what it holds."""
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        values = np.floor(values + 0.5).clip(info.min, info.max)
    return values.astype(dtype)


class Quantiles:
    """Quantiles of the values of many arrays, that are shown once, one by one.

    Whole numbers of up to 16 bits are counted; of others evenly spaced ones are kept, SAMPLED at
    most.

    Args:
        dtype: of the arrays.
    """

    def __init__(self, dtype: np.dtype) -> None:
        info = np.iinfo(dtype) if dtype.kind in "iu" and dtype.itemsize <= 2 else None
        self.first = int(info.min) if info else 0
        self.counts = np.zeros(info.max - info.min + 1 if info else 0, np.int64)
        self.kept = np.zeros(0)
        self.step = 1
        self.seen = 0
        self.least, self.most = np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        """Take the values of one more array into account."""
        flat = values.ravel()
        self.least = min(self.least, float(flat.min()))
        self.most = max(self.most, float(flat.max()))
        if len(self.counts):
            shifted = flat.astype(np.int64) - self.first
            self.counts += np.bincount(shifted, minlength=len(self.counts))
        else:
            more = flat[-self.seen % self.step :: self.step].astype(np.float64)
            self.kept = np.concatenate([self.kept, more])
            while len(self.kept) > SAMPLED:
                self.kept = self.kept[::2].copy()
                self.step *= 2
        self.seen += flat.size

    def between(self, low: float = LOW, high: float = HIGH) -> tuple[float, float]:
        """Return two quantiles: the least values that so large a share does not exceed.

        Where they are equal, as of few bright spots on black, the least and the largest value.
        """
        if len(self.counts):
            ranks = [max(1, np.ceil(q * self.seen)) for q in (low, high)]
            ends = np.searchsorted(np.cumsum(self.counts), ranks)
            found = [float(end + self.first) for end in ends]
        else:
            found = np.quantile(self.kept, [low, high], method="inverted_cdf").tolist()
        return (found[0], found[1]) if found[0] < found[1] else (self.least, self.most)


@dataclass(frozen=True)
class Wanted:
    """What scale=, black= and white= say of files.

    Args:
        scale: "quantiles", "file" (by the type of the values), or "auto": quantiles for more than 8
            bits and for floats.
        black, white: told in their place; empty, one, or one for each channel.
        prefix: stands before the keys where a user writes them.

    Raises:
        ValueError: white is not above black.
    """

    scale: str = "auto"
    black: Sequence[float] = ()
    white: Sequence[float] = ()
    prefix: str = ""

    def __post_init__(self) -> None:
        if not self.black or not self.white:
            return
        count = max(len(self.black), len(self.white))
        for channel in range(count):
            black, white = self.told(channel, count)
            if white <= black:
                raise ValueError(
                    f"{self.prefix}white={white:g}: must be above {self.prefix}black={black:g}"
                )

    def told(self, channel: int, count: int) -> tuple[Any, Any]:
        """Return (black, white) of a channel, None where they are not told.

        Raises:
            ValueError: another number of them than of channels.
        """
        found = []
        for key in ("black", "white"):
            values = getattr(self, key)
            if len(values) not in (0, 1, count):
                raise ValueError(
                    f"{self.prefix}{key}={','.join(f'{value:g}' for value in values)}: the file "
                    f"has {count} channel{'s' * (count > 1)}; give one number, or one for each"
                )
            found.append(values[channel if len(values) > 1 else 0] if values else None)
        return found[0], found[1]

    def measured(self, dtype: np.dtype) -> bool:
        """Return whether quantiles of values of this type are used."""
        if self.black and self.white:
            return False
        return self.scale == "quantiles" or (self.scale == "auto" and dtype != np.uint8)

    def defined(self, dtype: np.dtype, channel: int = 0, count: int = 1) -> Scale:
        """Return the scale without quantiles: as told, else by the type.

        Raises:
            ValueError: black told is above white.
        """
        black, white = self.told(channel, count)
        whole = whole_range(dtype)
        black = whole.black if black is None else black
        white = whole.white if white is None else white
        if white <= black:
            raise ValueError(
                f"{self.prefix}black={black:g}, {self.prefix}white={white:g}: white must be above "
                "black; tell both"
            )
        return Scale(black, white)

    def unit(self, dtype: np.dtype, channel: int = 0, count: int = 1) -> Scale:
        """Return the scale that levels count on: as told, if both ends are, else by the type.

        Quantiles change what a network sees, not what a level means.
        """
        both = self.black and self.white and self.scale != "quantiles"
        return self.defined(dtype, channel, count) if both else whole_range(dtype)

    def scales(self, dtype: np.dtype, channels: Sequence[Quantiles]) -> list[Scale]:
        """Return the scale of each channel of a file.

        Args:
            dtype: of its values.
            channels: the quantiles of each channel.

        Raises:
            ValueError: black or white told for another number of channels, or so that the picture
                holds hardly anything between them.
        """
        count = len(channels)
        found = []
        for channel, quantiles in enumerate(channels):
            if not self.measured(dtype):
                found.append(self.defined(dtype, channel, count))
                continue
            black, white = self.told(channel, count)
            low, high = quantiles.between()
            if low == high and black is None and white is None:  # no contrast
                low, high = (low, low + 1) if dtype.kind == "f" else whole_range(dtype).ends
            low, high = (low if black is None else black), (high if white is None else white)
            if high <= low:
                key = f"white={white:g}" if black is None else f"black={black:g}"
                side = "darker" if black is None else "brighter"
                raise ValueError(
                    f"{self.prefix}{key}: hardly a pixel is {side}; tell black and white both"
                )
            found.append(Scale(low, high))
        return found
