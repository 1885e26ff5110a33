"""Pictures of any size, in memory or in their files, to cut many patches at once."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from genmodels.images.scale import Scale


class Pictures:
    """Pictures (C, H, W) of any H and W in one stretch of memory, to cut many patches at once.

    Attributes:
        pixels: all of them, one after the other.
        starts, heights, widths: of each, int64 on the CPU.
    """

    def __init__(self, pictures: list[torch.Tensor]) -> None:
        self.pixels = torch.cat([picture.flatten() for picture in pictures])
        sizes = torch.tensor([picture.shape for picture in pictures])
        self.channels = int(sizes[0, 0])
        self.heights, self.widths = sizes[:, 1], sizes[:, 2]
        self.starts = sizes.prod(dim=1).cumsum(0) - sizes.prod(dim=1)

    def __getitem__(self, k: int) -> torch.Tensor:
        """Return picture k."""
        shape = (self.channels, int(self.heights[k]), int(self.widths[k]))
        start = int(self.starts[k])
        return self.pixels[start : start + math.prod(shape)].view(shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.pixels.nbytes

    def to(self, device: torch.device | str) -> "Pictures":
        """Move the pixels there; return these pictures."""
        self.pixels = self.pixels.to(device)
        return self

    def cut(
        self,
        numbers: torch.Tensor,
        side: int,
        row: torch.Tensor,
        column: torch.Tensor,
        turn: torch.Tensor,
    ) -> torch.Tensor:
        """Return squares (B, C, side, side), turned and mirrored, where the pixels lie.

        Args:
            numbers: of the pictures, int64 (B,) on the CPU.
            side: of a square, in pixels.
            row, column, turn: uniforms in [0, 1), float64 (B,): where it lies, how it is turned.
        """
        heights, widths = self.heights[numbers], self.widths[numbers]
        top, left = (row * (heights - side + 1)).long(), (column * (widths - side + 1)).long()
        quarters, mirrored = (turn * 4).long(), turn * 8 % 2 >= 1
        first = self.starts[numbers] + top * widths + left
        # Of the pixel that comes to (i, j): after mirroring, then after quarter turns.
        facts = torch.stack([first, widths, heights * widths, quarters, mirrored.long()])
        first, widths, plane, quarters, mirrored = facts.to(self.pixels.device)[..., None, None]
        i, j = torch.meshgrid(*[torch.arange(side, device=first.device)] * 2, indexing="ij")
        j = torch.where(mirrored == 1, side - 1 - j, j)
        y = torch.where(quarters == 0, i, torch.where(quarters == 1, j, side - 1 - i))
        y = torch.where(quarters == 3, side - 1 - j, y)
        x = torch.where(quarters == 0, j, torch.where(quarters == 1, side - 1 - i, side - 1 - j))
        x = torch.where(quarters == 3, i, x)
        channels = torch.arange(self.channels, device=first.device).reshape(1, -1, 1, 1)
        index = (first + y * widths + x)[:, None] + channels * plane[:, None]
        return self.pixels[index]


class Stored:
    """Noisy pictures (H, W, C) as their files have them: float32 patches on the [-1, 1] scale.

    Values keep their type; arrays may lie in files (np.memmap), of which only what is cut is read.

    Args:
        values: of each picture.
        scales: what is black and white in each.
    """

    nbytes = 0  # on a GPU: there they never lie

    def __init__(self, values: Sequence[np.ndarray], scales: Sequence[Scale]) -> None:
        self.values = values
        self.scales = scales

    def __getitem__(self, k: int) -> torch.Tensor:
        """Return picture k, (C, H, W)."""
        return self.scales[k].tensor(self.values[k])

    def to(self, device: torch.device | str) -> "Stored":
        """Return these pictures, which stay where they are."""
        return self

    def cut(
        self,
        numbers: torch.Tensor,
        side: int,
        row: torch.Tensor,
        column: torch.Tensor,
        turn: torch.Tensor,
    ) -> torch.Tensor:
        """Return squares as Pictures.cut does, float32 on the CPU."""
        patches = []
        for k, at in zip(numbers.tolist(), torch.stack([row, column, turn], dim=1).tolist()):
            height, width = self.values[k].shape[:2]
            top, left = int(at[0] * (height - side + 1)), int(at[1] * (width - side + 1))
            patch = self.scales[k].tensor(self.values[k][top : top + side, left : left + side])
            patch = torch.rot90(patch, int(at[2] * 4), (1, 2))
            patches.append(patch.flip(-1) if int(at[2] * 8) % 2 else patch)
        return torch.stack(patches)
