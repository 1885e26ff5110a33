"""Restore a picture in tiles, as one pass or the mean of several.

Each tile sees `overlap` pixels around it, which are cut off afterwards: tiled is equal to whole
wherever the network looks no further than that. Its edges lie on multiples of 32 from the corner if
tile and overlap do, as in the whole picture.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from genmodels import cli, generation
from genmodels.noise.poisson_gaussian import PoissonGaussian
from genmodels.restoration.options import passes

Span = tuple[int, int]  # from a pixel to the one after the last
Window = tuple[slice, slice]  # rows, columns
SHIFTS = ((0, 0), (1, 1), (2, 3), (3, 2))  # of ensemble=4, in pixels
SETTINGS = ("tile", "overlap", "ensemble", "precision")  # of restore(), from the command line


def planes(model: Any, image: torch.Tensor) -> torch.Tensor:
    """Return an image (C, H, W) as what the model takes, (B, model's C, H, W).

    A grey model takes the channels of a colour picture one by one.

    Raises:
        ValueError: a grey picture for a model of colour.
    """
    channels = model.shape[0]
    if len(image) != channels and channels != 1:
        raise ValueError(
            f"image={tuple(image.shape)}: is grey, this model restores {channels} "
            "channels; take a model of grey pictures"
        )
    return image[None] if len(image) == channels else image[:, None]


def cuts(size: int, tile: int, overlap: int) -> list[tuple[Span, Span]]:
    """Return (start, stop) of what each tile sees of `size` pixels, and of what it restores.

    Raises:
        ValueError: nothing is left of a tile without its overlap.
    """
    if overlap < 0:
        raise ValueError(f"overlap={overlap}: must be >= 0")
    if tile <= 2 * overlap:
        raise ValueError(f"tile={tile}: must be larger than twice the overlap, {2 * overlap}")
    spans: list[tuple[Span, Span]] = []
    first, step = 0, tile - 2 * overlap
    while True:
        start, stop = max(0, first - overlap), first + step + overlap
        if stop >= size or (not first and size <= tile):
            return [*spans, ((start, size), (first, size))]
        spans.append(((start, stop), (first, first + step)))
        first += step


def windows(shape: Sequence[int], tile: int, overlap: int) -> list[tuple[Window, Window]]:
    """Return [(seen, restored)] of the tiles of a picture (..., H, W), each a pair of slices."""
    rows, columns = (cuts(size, tile, overlap) for size in shape[-2:])
    return [
        ((slice(*r[0]), slice(*c[0])), (slice(*r[1]), slice(*c[1]))) for r in rows for c in columns
    ]


def ensembled(
    call: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    shifts: Sequence[tuple[int, int]] = ((0, 0),),
) -> torch.Tensor:
    """Return the mean of call over the 8 turned and mirrored x, (B, C, H, W), each put back.

    Args:
        call: x -> the restored x.
        x: pictures.
        shifts: the k-th of them is moved by the k-th of these, in turn.
    """
    total = torch.zeros(())
    for k in range(8):
        mirrored = x.flip(-1) if k >= 4 else x
        turned = torch.rot90(mirrored, k, (-2, -1))
        restored = torch.rot90(_shifted(call, turned, *shifts[k % len(shifts)]), -k, (-2, -1))
        total = total + (restored.flip(-1) if k >= 4 else restored)
    return total / 8


def shifted_mean(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return the mean of call over x moved by SHIFTS, each put back: half the cost of 8 turns.

    A network that works on cells of pixels sees other cells each time.
    """
    return torch.stack([_shifted(call, x, *shift) for shift in SHIFTS]).mean(0)


def _shifted(
    call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, down: int, right: int
) -> torch.Tensor:
    """Return call of x moved down and right, put back; what is moved in is mirrored."""
    if not down and not right:
        return call(x)
    mode = "reflect" if x.shape[-2] > down and x.shape[-1] > right else "replicate"
    return call(functional.pad(x, (right, 0, down, 0), mode=mode))[..., down:, right:]


@torch.no_grad()
def restore(
    model: Any,
    image: torch.Tensor,
    law: str,
    level: float | PoissonGaussian,
    *,
    tile: int = 512,
    overlap: int = 32,
    ensemble: bool | int | str = False,
    precision: str = "fp32",
    tick: Callable[[], object] | None = None,
    clip: bool = True,
) -> torch.Tensor:
    """Return the restored image in [-1, 1], float32 (C, H, W) on the CPU.

    Args:
        model: a method with ANY_SIZE, in eval mode.
        image: float32 (C, H, W) on the [-1, 1] scale, not clipped.
        law: a key of model.DENOISE_LAWS.
        level: in the law's unit; of poisson-gaussian the noise of pixels on [0, 1].
        tile, overlap, ensemble: see RestoreOptions.
        precision: "fp32" (without TF32) or "bf16" (autocast).
        tick: called after each tile.
        clip: to black and white; false: what lies beyond is kept.

    Raises:
        ValueError: what model.restore refuses, or too large a tile for the memory.
    """
    noisy = planes(model, image)
    restored = torch.empty(noisy.shape)
    kind = passes(ensemble)
    beyond = {} if clip else {"clip": False}

    def call(x):
        return model.restore(x, law, level, **beyond)[0].float()

    def several(x):
        if kind == 4:
            return shifted_mean(call, x)
        return ensembled(call, x, SHIFTS) if kind == 8 else ensembled(call, x)

    too_large = (
        f"tile={tile}: does not fit into memory; try tile={max(2 * overlap + 32, tile // 2)}"
    )
    for seen, kept in windows(noisy.shape, tile, overlap):
        part = noisy[(..., *seen)].to(model.device)
        reduced = generation.autocast(model.device, precision)
        with reduced, generation.tf32(False), cli.fits_memory(too_large):
            done = (several(part) if kind else call(part)).cpu()
        inner = [slice(k.start - s.start, k.stop - s.start) for s, k in zip(seen, kept)]
        restored[(..., *kept)] = done[(..., *inner)]
        if tick:
            tick()
    if not torch.isfinite(restored).all():
        raise generation.NonFinite(f"law={law}, level={level}: the model made non-finite pixels")
    return restored.reshape(image.shape)
