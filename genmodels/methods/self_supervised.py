"""What denoisers learn from a noisy picture alone: the baselines beside Noise2Score.

Each function is one paper's; the network and how it is told the noise are Noise2Score's.

References: Krull, Buchholz and Jug 2019, arXiv 1811.10980 (Noise2Void); Huang et al. 2021, arXiv
2101.02824 (Neighbor2Neighbor); Ramani, Blu and Unser 2008 (Monte-Carlo SURE); Tachella, Davies and
Jacques 2025, arXiv 2409.01985 (UNSURE); Monroy, Bacca and Tachella 2025, arXiv 2412.04648 (GR2R).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

CELL = 22  # Noise2Void hides one pixel of each square of so many: .2 %
REACH = 5  # and puts a pixel there that lies no further than so many rows and columns away
# Neighbor2Neighbor: the eight ordered pairs of pixels of a 2 x 2 cell that share a side.
FIRST, SECOND = (0, 0, 1, 1, 2, 2, 3, 3), (1, 2, 0, 3, 0, 3, 1, 2)


def blind_spots(y: Tensor, order: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
    """Return (y with one pixel of each cell replaced by a neighbour, which ones: (B, 1, H, W)).

    All channels of a pixel come from the same neighbour, which is never the pixel itself.

    Args:
        y: (B, C, H, W); sides of 10 pixels and more.
        order: (B, H, W), any distinct numbers at random: the largest of a cell is replaced.
        choice: (B, H, W), uniform in [0, 1): which of the 120 neighbours comes there.
    """
    height, width = y.shape[-2:]
    padded = functional.pad(order, (0, -width % CELL, 0, -height % CELL), value=-torch.inf)
    most = functional.max_pool2d(padded[:, None], CELL)
    most = most.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)[..., :height, :width]
    hidden = order[:, None] == most

    side = 2 * REACH + 1
    number = (choice * (side**2 - 1)).long()
    number += number >= side**2 // 2  # the middle is the pixel itself
    down, right = number // side - REACH, number % side - REACH
    rows = torch.arange(height, device=y.device)[:, None].expand_as(down)
    columns = torch.arange(width, device=y.device).expand_as(right)
    # Beyond an edge it is the one on the other side of the pixel.
    down = torch.where((rows + down < 0) | (rows + down >= height), -down, down)
    right = torch.where((columns + right < 0) | (columns + right >= width), -right, right)
    index = ((rows + down) * width + columns + right).flatten(1)[:, None]
    others = y.flatten(2).gather(2, index.expand(-1, y.shape[1], -1)).view_as(y)
    return torch.where(hidden, others, y), hidden


def neighbours(choice: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return two functions of pictures (B, C, H, W): each takes one pixel of every 2 x 2 cell.

    What they take shares a side. An odd last row or column is left out.

    Args:
        choice: (B, H // 2, W // 2), uniform in [0, 1): which of the eight pairs.
    """
    pair = (choice * len(FIRST)).long()

    def picker(table: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        position = torch.tensor(table, device=choice.device)[pair][:, None, None]

        def pick(x: Tensor) -> Tensor:
            height, width = (side // 2 * 2 for side in x.shape[-2:])
            cells = functional.pixel_unshuffle(x[..., :height, :width], 2).unflatten(1, (-1, 4))
            return cells.gather(2, position.expand(-1, x.shape[1], -1, -1, -1))[:, :, 0]

        return pick

    return picker(FIRST), picker(SECOND)


def divergence(
    f: Callable[[Tensor], Tensor], w: Tensor, restored: Tensor, signs: Tensor, step: Tensor
) -> Tensor:
    """Return the mean of df_i / dw_i over the pixels of all pictures, by one random difference.

    Args:
        f: w -> restored.
        w: where, (B, C, H, W).
        restored: f(w).
        signs: of w's shape, +1 or -1 at random.
        step: how far, (B, 1, 1, 1).
    """
    return (signs * (f(w + step * signs) - restored) / step).mean()
