"""How elementwise kernels walk over a state: in groups of four elements that share a Philox draw.

Items (chains, images) of `numel` elements have ceil(numel / 4) groups each, the last one padded;
a program works on GROUPS of them. What a kernel computes does not depend on that number.
"""

from typing import Any

import torch

from .dispatch import INTERPRETING, coefficient, launch_options, tl, triton

__all__ = [
    "interleave",
    "key_arguments",
    "launch_grid",
    "locate",
    "locate_rows",
    "per_element",
    "per_item",
    "per_row",
    "spread",
]


@triton.jit
def interleave(a, b, c, d, LENGTH: tl.constexpr):
    """Blocks of LENGTH/4 groups -> one block of LENGTH elements a0 b0 c0 d0 a1 ..."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (LENGTH,))


@triton.jit
def spread(x, GROUPS: tl.constexpr):
    """One value per group -> one per element."""
    return tl.reshape(tl.broadcast_to(x[:, None], (GROUPS, 4)), (4 * GROUPS,))


@triton.jit
def locate(
    items,
    numel,
    groups,
    tiles,
    GROUPS: tl.constexpr,
    ROW: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return (item, group, element, offset, mask) of this program's block of groups.

    ROW: a program works within one item, so that item is a scalar and coefficients are loaded
    once; otherwise groups of all items are numbered through and item is one per group. PACKED:
    numel is a multiple of four, so elements follow one another across items (128-bit loads).
    items must not be specialised on (a size of one would arrive as a constant).
    Offsets are 64-bit; WIDE makes the counting 64-bit too.
    """
    lane = tl.arange(0, 4 * GROUPS)
    if ROW:
        item = tl.program_id(0) // tiles
        first = (tl.program_id(0) - item * tiles) * GROUPS
        if WIDE:
            first = first.to(tl.int64)
        group = first + tl.arange(0, GROUPS)
        element = first * 4 + lane
        mask = element < (tl.multiple_of(numel, 4) if PACKED else numel)
        base = item.to(tl.int64) * numel
        if PACKED:
            base = tl.multiple_of(base, 4)
        offset = base + element
    else:
        flat = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        if not WIDE:
            flat = flat.to(tl.int32)
        item = flat // groups
        group = flat - item * groups
        element = spread(group * 4, GROUPS) + (lane & 3)
        if PACKED:
            offset = tl.program_id(0).to(tl.int64) * (4 * GROUPS) + lane
            mask = offset < tl.multiple_of(items.to(tl.int64) * numel, 4)
        else:
            offset = spread(item, GROUPS).to(tl.int64) * numel + element
            mask = (element < numel) & (spread(item, GROUPS) < items)
        item = tl.minimum(item, items - 1)  # groups past the end read some coefficient
    return item, group, element, offset, mask


@triton.jit
def per_item(value, item, STRIDE: tl.constexpr):
    """A coefficient as dispatch.coefficient prepared it, for a scalar or a block of items."""
    if STRIDE < 0:
        result = value
    elif STRIDE == 0:  # a scalar: item may be a block
        result = tl.load(value)
    else:
        result = tl.load(value + item * STRIDE)
    return result


@triton.jit
def per_element(value, item, STRIDE: tl.constexpr, GROUPS: tl.constexpr, ROW: tl.constexpr):
    """per_item, spread over the elements of the groups where it varies within the block."""
    result = per_item(value, item, STRIDE)
    if STRIDE > 0 and not ROW:
        result = spread(result, GROUPS)
    return result


@triton.jit
def locate_rows(items, parts, ROWS: tl.constexpr):
    """Return (row, safe row, part): this program works on one part of each of ROWS items.

    Rows past the last item are real blocks of lanes: the safe row is what they may read.
    """
    row = tl.program_id(0) // parts * ROWS + tl.arange(0, ROWS)
    return row, tl.minimum(row, items - 1), tl.program_id(0) % parts


@triton.jit
def per_row(value, row, STRIDE: tl.constexpr, KIND: tl.constexpr):
    """per_item as a block shaped like `row`, one number for all as well; KIND is its dtype."""
    return tl.zeros(row.shape, dtype=KIND) + per_item(value, row, STRIDE)


def launch_grid(
    items: int, numel: int, block: int | None = None
) -> tuple[tuple[int], dict[str, Any]]:
    """Return (grid, arguments and options) of a launch over `items` items of `numel` elements.

    Args:
        items, numel: the size of the state.
        block: groups per program, a power of two; results do not depend on it.
    """
    groups = (numel + 3) // 4
    if block is None:
        # 1024 elements for 128 threads; the interpreter pays per program, so it gets few.
        block = min(triton.next_power_of_2(items * groups), 1 << 15) if INTERPRETING else 256
    tiles = -(-groups // block)
    row = 4 * groups >= 3 * tiles * block  # at most a quarter of the lanes idle
    programs = items * tiles if row else -(-items * groups // block)
    arguments = {
        "items": items,
        "numel": numel,
        "groups": groups,
        "tiles": tiles,
        "GROUPS": block,
        "ROW": row,
        "PACKED": numel % 4 == 0,
        "WIDE": 4 * items * groups >= 2**31,
        **launch_options(num_warps=max(1, min(16, block // 64))),
    }
    return (programs,), arguments


def key_arguments(
    key: tuple[Any, Any, int] | None, items: int, device: torch.device
) -> dict[str, Any]:
    """Return a kernel's arguments for the noise of key = (seed, counter, stream) or None.

    `lane` is the stream: Triton keeps that name for itself.
    """
    seed, counter, lane = key or (0, 0, 0)
    seed, seed_stride = coefficient(seed, items, device, torch.int64)
    counter, counter_stride = coefficient(counter, items, device, torch.int64)
    return {
        "seed": seed,
        "counter": counter,
        "lane": lane,
        "SEED": seed_stride,
        "COUNTER": counter_stride,
    }
