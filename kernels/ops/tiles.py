"""The tile loop of pairwise.py in Triton: products x_i . y_j and what is done with a tile."""

import torch
from torch import Tensor

from .dispatch import INTERPRETING, launch_options, tl, triton

__all__ = ["launch", "pairwise_kernel", "square_limit", "tile_shape", "tuning"]


@triton.jit
def pairwise_kernel(
    x,
    y,
    centre,
    x2,
    y2,
    radius2,
    out,
    by_column,
    start_row,
    n,
    m,
    width,
    span,
    scale,
    bias,
    KIND: tl.constexpr,
    WITHIN: tl.constexpr,
    OWNER: tl.constexpr,
    DEGREE: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out (splits, n) or (splits, n, SLOTS): program (i, s) does rows tile i, columns of span s.

    by_column (row tiles, m): sums of each tile's columns. Sums WITHIN a set are of pairs i < j.
    """
    row = start_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, m)
    row_pointer = x + row.to(tl.int64)[:, None] * width
    depth = tl.arange(0, DEPTH)
    slot = tl.arange(0, SLOTS)[None, :]
    if KIND == "nearest":
        # Unused slots hold -inf, so that the largest of a row is the K-th smallest distance.
        best = tl.zeros((ROWS, SLOTS), dtype=tl.float32)
        best = tl.where(slot < K, best + float("inf"), best - float("inf"))
    elif KIND == "ball":
        total = tl.zeros((ROWS,), dtype=tl.int64)
    else:
        total = tl.zeros((ROWS,), dtype=tl.float64)
    begin = first
    if WITHIN and (KIND == "polynomial" or KIND == "rbf"):  # from the tile on the diagonal
        diagonal = (start_row + tl.program_id(0) * ROWS) // COLUMNS * COLUMNS
        begin = tl.maximum(first, diagonal)
    for start in range(begin, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_pointer = y + column.to(tl.int64)[:, None] * width
        tile = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in range(0, width, DEPTH):
            inside = (k + depth)[None, :] < width
            a = tl.load(
                row_pointer + (k + depth)[None, :], mask=(row < n)[:, None] & inside, other=0
            )
            b = tl.load(
                column_pointer + (k + depth)[None, :],
                mask=(column < last)[:, None] & inside,
                other=0,
            )
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            if centre is not None:
                middle = tl.load(centre + k + depth, mask=k + depth < width, other=0.0)[None, :]
                a, b = a - middle, b - middle
            tile = tl.dot(a, tl.trans(b), tile, input_precision=PRECISION)
        valid = (row < n)[:, None] & (column < last)[None, :]
        if KIND == "polynomial":
            value = tile * scale + bias
            base = value
            for _ in tl.static_range(DEGREE - 1):
                value = value * base
        else:
            rows2 = tl.load(x2 + row, mask=row < n, other=0.0)[:, None]
            columns2 = tl.load(y2 + column, mask=column < last, other=0.0)[None, :]
            squared = rows2 + columns2 - 2.0 * tile  # NaN stays: zero would be a neighbour
            squared = tl.maximum(squared, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if KIND == "rbf":
                value = tl.exp(-scale * squared)
            elif KIND == "ball":
                if OWNER == "x":
                    limit = tl.load(radius2 + row, mask=row < n, other=0.0)[:, None]
                else:
                    limit = tl.load(radius2 + column, mask=column < last, other=0.0)[None, :]
                hit = valid & (squared <= limit)
                total += tl.sum(hit.to(tl.int32), axis=1).to(tl.int64)
            else:
                if WITHIN:
                    valid = valid & (row[:, None] != column[None, :])
                valid = valid & (squared == squared)  # a NaN would take a round of its own
                squared = tl.where(valid, squared, float("inf"))
                for _ in tl.static_range(K):
                    # Move the row's smallest entry into the slot of the largest kept one.
                    small, nearest = tl.min(squared, axis=1, return_indices=True)
                    squared = tl.where(
                        tl.arange(0, COLUMNS)[None, :] == nearest[:, None], float("inf"), squared
                    )
                    large, victim = tl.max(best, axis=1, return_indices=True)
                    better = (small < large)[:, None] & (slot == victim[:, None])
                    best = tl.where(better, small[:, None], best)
        if KIND == "polynomial" or KIND == "rbf":
            if WITHIN:
                valid = valid & (row[:, None] < column[None, :])
            value = tl.where(valid, value, 0.0)
            total += tl.sum(value, axis=1).to(tl.float64)
            if by_column is not None:
                at = by_column + tl.program_id(0).to(tl.int64) * m + column
                tl.store(at, tl.sum(value, axis=0), mask=column < last)
    entry = tl.program_id(1).to(tl.int64) * n + row
    if KIND == "nearest":
        tl.store(out + entry[:, None] * SLOTS + slot, best, mask=(row < n)[:, None])
    else:
        tl.store(out + entry, total, mask=row < n)


def tuning(capability: tuple[int, int] | None) -> tuple[tuple[int, int, int, int], str]:
    """Return ((rows, columns, depth, stages), precision) for a GPU; None: one of AMD's.

    The registers hold the tile without spills. Products are as accurate as float32 either way:
    three TF32 products, which AMD does not have, or its matrix cores' own float32.
    """
    if capability is None:
        return (128, 64, 16, 2), "ieee"
    return (128, 128, 32, 3) if capability >= (9, 0) else (128, 64, 16, 4), "tf32x3"


def square_limit(radius: Tensor) -> Tensor:
    """Return the largest float32 whose rounded square root is at most the radius, like it.

    So that squares can be compared, with the answers of distances: radii are distances of the same
    pairs, equality is usual, and a kernel's square root is an approximation.
    """
    above = torch.nextafter(radius, torch.full_like(radius, float("inf")))
    middle = ((radius.double() + above.double()) / 2).square()  # exact; roots below round down
    square = middle.float()
    lower = torch.nextafter(square, torch.full_like(square, -float("inf")))
    square = torch.where(square.double() > middle, lower, square)
    return torch.where(radius < 0, -1.0, square)


def launch(
    x: Tensor,
    y: Tensor,
    *,
    kind: str,
    within: bool,
    by_column: Tensor | None = None,
    start_row: int = 0,
    rows_here: int | None = None,
    centre: Tensor | None = None,
    scale: float = 1.0,
    bias: float = 0.0,
    degree: int = 1,
    k: int = 1,
    x2: Tensor | None = None,
    y2: Tensor | None = None,
    radius: Tensor | None = None,
    owner: str = "y",
    precision: str | None = None,
    tile: tuple[int, int, int, int] | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return (splits, n) or (splits, n, slots) after rows start_row to start_row + rows_here.

    by_column: what is written into, see the kernel. precision, tile, splits: tuning.
    """
    n, m, width = len(x), len(y), x.shape[1]
    rows, columns, depth, stages = tile or tile_shape(x, y)
    blocks = -(-(n if rows_here is None else rows_here) // rows)
    if splits is None:  # a few programs for each multiprocessor, however few rows there are
        cores = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        splits = max(1, min(-(-8 * cores // blocks), -(-m // (4 * columns))))
    per_split = -(-m // splits)
    span = -(-per_split // columns) * columns  # whole tiles
    splits = -(-m // span)
    slots = max(2, triton.next_power_of_2(k)) if kind == "nearest" else 2
    shape = (splits, n, slots) if kind == "nearest" else (splits, n)
    dtypes = {"nearest": torch.float32, "ball": torch.int64}
    out = torch.empty(shape, dtype=dtypes.get(kind, torch.float64), device=x.device)
    pairwise_kernel[(blocks, splits)](
        x=x,
        y=y,
        centre=centre,
        x2=x2,
        y2=y2,
        radius2=None if radius is None else square_limit(radius),
        out=out,
        by_column=by_column,
        start_row=start_row,
        n=n,
        m=m,
        width=width,
        span=span,
        scale=float(scale),
        bias=float(bias),
        KIND=kind,
        WITHIN=within,
        OWNER=owner,
        DEGREE=degree,
        K=k,
        SLOTS=slots,
        PRECISION=precision or _tuning(x)[1],
        UPCAST=x.dtype != torch.float32 and (centre is not None or INTERPRETING),
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        **launch_options(num_warps=8, num_stages=stages),
    )
    return out


def _tuning(x: Tensor) -> tuple[tuple[int, int, int, int], str]:
    """Return tuning's result for the tensor's GPU."""
    if not x.is_cuda:  # the interpreter
        return tuning((9, 0))
    return tuning(None if torch.version.hip else torch.cuda.get_device_capability(x.device))


def tile_shape(x: Tensor, y: Tensor) -> tuple[int, int, int, int]:
    """Return (rows, columns, depth, stages); the interpreter pays per program and gets one."""
    if INTERPRETING:
        rows, columns = (max(16, triton.next_power_of_2(len(z))) for z in (x, y))
        return rows, columns, 64, 1
    return _tuning(x)[0]
