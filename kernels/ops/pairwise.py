"""Sums, neighbours and counts over all pairs of two sets of feature vectors, tile by tile.

One loop over tiles of products x_i . y_j, four things done with a tile, and never N x N numbers:

    polynomial_sums   sum_j (gamma x_i . y_j + coef)^degree            KID: Binkowski et al.,
                                                                       arXiv 1801.01401, eq. 4
    rbf_sums          sum_j exp(-|x_i - y_j|^2 / (2 bandwidth^2))      CMMD: Jayasumana et al.,
                                                                       arXiv 2401.09603, eq. 5
    knn_radius        k-th smallest |x_i - y_j|                        precision and recall:
    ball_count        number of j with |x_i - y_j| <= radius           Kynkaanniemi et al., arXiv
                                                                       1904.06991; density and
                                                                       coverage: Naeem et al.,
                                                                       arXiv 2002.09797

Products are as accurate as float32 (three TF32 products, or IEEE), sums over rows float64; each
row is added up by one program in a fixed order, so results repeat bit for bit. Distances come from
|x|^2 + |y|^2 - 2 x . y after subtracting y's mean: small ones carry an absolute error of about
5e-4 of the vectors' distance from that mean.
"""

import torch

from .dispatch import FLOATS, INTERPRETING, launch_options, on_device, tl, triton, use_triton

__all__ = ["ball_count", "knn_radius", "polynomial_sums", "rbf_sums"]

_ROWS, _COLUMNS = 1024, 4096  # tile of the reference: 16 MB in float32


def _tiles(x, y, centre):
    """Yield (rows, columns, products) over tiles of the reference."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    for i in range(0, len(x), _ROWS):
        a = x[i : i + _ROWS].to(work) - centre
        for j in range(0, len(y), _COLUMNS):
            b = y[j : j + _COLUMNS].to(work) - centre
            yield slice(i, i + len(a)), slice(j, j + len(b)), a @ b.T


def _reference(x, y, *, kind, alone, centre, scale, bias, degree, k, x2, y2, radius, owner):
    """Return the result of a kind: row by row over tiles; alone leaves out the pairs i = j."""
    shape = (len(x), k) if kind == "nearest" else (len(x),)
    fill = {"nearest": float("inf")}.get(kind, 0)
    dtype = {"nearest": x2.dtype if x2 is not None else None, "ball": torch.int64}
    out = torch.full(shape, fill, dtype=dtype.get(kind, torch.float64), device=x.device)
    for rows, columns, tile in _tiles(x, y, centre):
        if kind == "polynomial":
            tile = (scale * tile + bias) ** degree
        else:
            tile = (x2[rows, None] + y2[None, columns] - 2 * tile).clamp(min=0)
        diagonal = torch.arange(rows.start, rows.stop, device=x.device) - columns.start
        own = (diagonal >= 0) & (diagonal < tile.shape[1]) & alone
        at = (own.nonzero()[:, 0], diagonal[own])
        if kind in ("polynomial", "rbf"):
            tile = tile if kind == "polynomial" else (-scale * tile).exp()
            tile[at] = 0
            out[rows] += tile.sum(1, dtype=torch.float64)
        elif kind == "nearest":
            tile[at] = float("inf")
            tile = tile.topk(min(k, tile.shape[1]), dim=1, largest=False).values
            both = torch.cat([out[rows], tile], dim=1)
            out[rows] = both.topk(k, dim=1, largest=False).values
        else:
            limit = radius[rows, None] if owner == "x" else radius[None, columns]
            out[rows] += (tile.sqrt() <= limit).sum(1)
    return out.amax(1).sqrt() if kind == "nearest" else out


@triton.jit
def pairwise_kernel(
    x,
    y,
    centre,
    x2,
    y2,
    radius,
    out,
    n,
    m,
    width,
    span,
    scale,
    bias,
    KIND: tl.constexpr,
    ALONE: tl.constexpr,
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
    """out (splits, n) or (splits, n, SLOTS): program (i, s) does rows tile i, columns of span s."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
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
    for start in range(first, last, COLUMNS):
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
        if ALONE:
            valid = valid & (row[:, None] != column[None, :])
        if KIND == "polynomial":
            base = tile * scale + bias
            value = base
            for _ in tl.static_range(DEGREE - 1):
                value = value * base
            total += tl.sum(tl.where(valid, value, 0.0), axis=1).to(tl.float64)
        else:
            rows2 = tl.load(x2 + row, mask=row < n, other=0.0)[:, None]
            columns2 = tl.load(y2 + column, mask=column < last, other=0.0)[None, :]
            squared = tl.maximum(rows2 + columns2 - 2.0 * tile, 0.0)
            if KIND == "rbf":
                value = tl.exp(-scale * squared)
                total += tl.sum(tl.where(valid, value, 0.0), axis=1).to(tl.float64)
            elif KIND == "ball":
                if OWNER == "x":
                    limit = tl.load(radius + row, mask=row < n, other=0.0)[:, None]
                else:
                    limit = tl.load(radius + column, mask=column < last, other=0.0)[None, :]
                hit = valid & (tl.sqrt(squared) <= limit)
                total += tl.sum(hit.to(tl.int32), axis=1).to(tl.int64)
            else:
                squared = tl.where(valid, squared, float("inf"))
                for _ in tl.static_range(K):
                    # Move the row's smallest entry into the slot of the largest kept one.
                    small, where = tl.min(squared, axis=1, return_indices=True)
                    squared = tl.where(
                        tl.arange(0, COLUMNS)[None, :] == where[:, None], float("inf"), squared
                    )
                    large, victim = tl.max(best, axis=1, return_indices=True)
                    better = (small < large)[:, None] & (slot == victim[:, None])
                    best = tl.where(better, small[:, None], best)
    place = tl.program_id(1).to(tl.int64) * n + row
    if KIND == "nearest":
        tl.store(out + place[:, None] * SLOTS + slot, best, mask=(row < n)[:, None])
    else:
        tl.store(out + place, total, mask=row < n)


def tuning(capability):
    """Return (rows, columns, depth, stages) of a tile that the registers hold without spills."""
    return (128, 128, 32, 3) if capability >= (9, 0) else (128, 64, 16, 4)


@on_device
def _kernel(
    x, y, *, kind, alone, centre, scale, bias, degree, k, x2, y2, radius, owner,
    precision="tf32x3", tile=None, splits=None,
):  # fmt: skip
    """Launch and join the splits; arguments as for _reference. precision, tile, splits: tuning."""
    n, m, width = len(x), len(y), x.shape[1]
    if tile is None and INTERPRETING:
        tile = (max(16, triton.next_power_of_2(n)), max(16, triton.next_power_of_2(m)), 64, 1)
    elif tile is None:
        tile = tuning(torch.cuda.get_device_capability(x.device))
    rows, columns, depth, stages = tile
    blocks = -(-n // rows)
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
        x,
        y,
        centre,
        x2,
        y2,
        radius,
        out,
        n,
        m,
        width,
        span,
        float(scale),
        float(bias),
        KIND=kind,
        ALONE=alone,
        OWNER=owner,
        DEGREE=degree,
        K=k,
        SLOTS=slots,
        PRECISION=precision,
        UPCAST=x.dtype != torch.float32 and (centre is not None or INTERPRETING),
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        **launch_options(num_warps=8, num_stages=stages),
    )
    if kind == "nearest":
        kept = out[:, :, :k].permute(1, 0, 2).reshape(n, -1)
        return kept.topk(k, dim=1, largest=False).values.amax(1).sqrt()
    return out.sum(0)


def _squares(x, centre):
    """Return the squared norms of x - centre, summed in float64."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = [(part.double() - centre.double()).square().sum(1) for part in x.split(_ROWS)]
    return torch.cat(rows).to(work)


@torch.no_grad()
def _pairwise(op, x, y, *, kind, scale=1.0, bias=0.0, degree=1, k=1, radius=None, owner="y"):
    """Check, prepare and dispatch; y None means the pairs within x without i = j."""
    alone, y = y is None, x if y is None else y
    for name, value in (("x", x), ("y", y)):
        if value.dim() != 2 or not value.is_floating_point() or not len(value):
            raise ValueError(f"{op}: {name} must be floating (N, D), got {tuple(value.shape)}")
    if x.shape[1] != y.shape[1] or x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"{op}: x and y must agree in width, dtype and device, got "
            f"{x.shape[1]} {x.dtype} {x.device} and {y.shape[1]} {y.dtype} {y.device}"
        )
    x, y = x.contiguous(), y.contiguous()
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    centre, x2, y2 = None, None, None
    if kind != "polynomial":
        centre = y.mean(0, dtype=torch.float64).to(work)
        y2 = _squares(y, centre)
        x2 = y2 if x is y else _squares(x, centre)
    kernel = use_triton(op, x, y, radius, dtypes=FLOATS)
    if radius is not None:
        radius = radius.to(work).contiguous()
    if not kernel and centre is None:
        centre = torch.zeros((), dtype=work, device=x.device)
    return (_kernel if kernel else _reference)(
        x, y, kind=kind, alone=alone, centre=centre, scale=scale, bias=bias, degree=degree, k=k,
        x2=x2, y2=y2, radius=radius, owner=owner,
    )  # fmt: skip


def polynomial_sums(x, y=None, *, degree=3, gamma=None, coef=1.0):
    """Return sum_j (gamma x_i . y_j + coef)^degree for each row of x, float64 (N,).

    Args:
        x: features, (N, D), float32, bfloat16 or float16 (float64: reference only).
        y: features, (M, D); None for the pairs within x, without i = j.
        degree: 1, 2, 3... gamma: default 1 / D. coef: number. (KID's kernel is the default.)

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    Reference: Binkowski, Sutherland, Arbel and Gretton, arXiv 1801.01401, equation 4.
    """
    if degree < 1:
        raise ValueError(f"polynomial_sums: degree must be >= 1, got {degree}")
    gamma = 1 / x.shape[-1] if gamma is None else gamma
    return _pairwise(
        "polynomial_sums", x, y, kind="polynomial", scale=gamma, bias=coef, degree=degree
    )


def rbf_sums(x, y=None, *, bandwidth):
    """Return sum_j exp(-|x_i - y_j|^2 / (2 bandwidth^2)) for each row of x, float64 (N,).

    Args:
        bandwidth: > 0, in the features' unit (CMMD takes 10 on unit-norm CLIP features).
        x, y: as for polynomial_sums.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or bandwidth <= 0.
    Reference: Jayasumana et al., arXiv 2401.09603, equation 5.
    """
    if not bandwidth > 0:
        raise ValueError(f"rbf_sums: bandwidth must be > 0, got {bandwidth}")
    return _pairwise("rbf_sums", x, y, kind="rbf", scale=0.5 / bandwidth**2)


def knn_radius(x, y=None, *, k):
    """Return the distance from each row of x to its k-th nearest row of y, float32 (N,).

    Args:
        k: 1 <= k <= 16, and <= the number of neighbours there are.
        x, y: as for polynomial_sums; with y None a vector is not its own neighbour.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or such a k.
    Reference: Kynkaanniemi et al., arXiv 1904.06991, equation 1.
    """
    available = len(x) - 1 if y is None else len(y)
    if not 1 <= k <= min(16, available):
        raise ValueError(f"knn_radius: k must be in 1..{min(16, available)}, got {k}")
    return _pairwise("knn_radius", x, y, kind="nearest", k=k)


def ball_count(x, y, radius, *, owner="y"):
    """Return, for each row of x, the number of rows of y within `radius`, int64 (N,).

    Args:
        radius: (M,) of the balls around y's rows (owner="y"), or (N,) around x's (owner="x").
        x, y: as for polynomial_sums.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    Reference: Kynkaanniemi et al., arXiv 1904.06991, equation 2; Naeem et al., arXiv 2002.09797,
        equations 3 (owner="y") and 4 (owner="x").
    """
    expected = {"x": len(x), "y": len(y)}.get(owner)
    if radius.shape != (expected,):
        raise ValueError(
            f"ball_count: radius must be ({expected},) for owner={owner!r} (x or y), "
            f"got {tuple(radius.shape)}"
        )
    return _pairwise("ball_count", x, y, kind="ball", radius=radius, owner=owner)
