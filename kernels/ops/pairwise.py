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

Sums are symmetric in x and y, so one tile serves its rows and its columns: within a set only the
pairs i < j are computed, and between two sets columns=True gives both directions for one product.

Products are as accurate as float32 (three TF32 products, or IEEE), sums across tiles float64. Each
row is added up by one program in a fixed order, columns by way of one number per tile: there are no
atomics and results repeat bit for bit. Distances come from |x|^2 + |y|^2 - 2 x . y after
subtracting y's mean: small ones carry an absolute error of about 5e-4 of the vectors' distance
from that mean.
"""

import torch
from torch import Tensor

from .dispatch import on_device, use_triton
from .tiles import launch, tile_shape

__all__ = ["ball_count", "knn_radius", "polynomial_sums", "rbf_sums"]

_ROWS, _COLUMNS = 1024, 4096  # tile of the reference: 16 MB in float32


def _tiles(x, y, centre, upper=False):
    """Yield (rows, columns, products) over tiles; upper leaves out those without any i < j."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    for i in range(0, len(x), _ROWS):
        a = x[i : i + _ROWS].to(work) - centre
        for j in range(i if upper else 0, len(y), _COLUMNS):
            b = y[j : j + _COLUMNS].to(work) - centre
            yield slice(i, i + len(a)), slice(j, j + len(b)), a @ b.T


def _reference_sums(x, y, *, kind, within, columns, centre, scale, bias, degree, x2, y2):
    """Return (sums of the rows, of the columns), float64; within: x is y, without i = j."""
    by_row, by_column = (torch.zeros(len(v), dtype=torch.float64, device=x.device) for v in (x, y))
    for at, to, tile in _tiles(x, y, centre, upper=within):
        if kind == "polynomial":
            tile.mul_(scale).add_(bias).pow_(degree)
        else:
            tile.mul_(-2).add_(x2[at, None]).add_(y2[None, to]).clamp_(min=0).mul_(-scale).exp_()
        if within and to.start < at.stop:
            tile.triu_(at.start - to.start + 1)  # i < j
        tile = tile.double()
        by_row[at] += tile.sum(1)
        if within or columns:
            by_column[to] += tile.sum(0)
    return by_row, by_column


def _reference(x, y, *, kind, within, centre, k, x2, y2, radius, owner):
    """Return radii or counts, row by row over tiles; within: x is y, without i = j."""
    nearest = kind == "nearest"
    out = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    if nearest:
        out = torch.full((len(x), k), float("inf"), dtype=x2.dtype, device=x.device)
    for rows, columns, tile in _tiles(x, y, centre):
        tile = (x2[rows, None] + y2[None, columns] - 2 * tile).clamp(min=0)
        if nearest:
            if within:
                diagonal = torch.arange(rows.start, rows.stop, device=x.device) - columns.start
                here = (diagonal >= 0) & (diagonal < tile.shape[1])
                tile[here.nonzero()[:, 0], diagonal[here]] = float("inf")
            tile = tile.topk(min(k, tile.shape[1]), dim=1, largest=False).values
            both = torch.cat([out[rows], tile], dim=1)
            out[rows] = both.topk(k, dim=1, largest=False).values
        else:
            limit = radius[rows, None] if owner == "x" else radius[None, columns]
            out[rows] += (tile.sqrt() <= limit).sum(1)
    return out.amax(1).sqrt() if nearest else out


@on_device
def _kernel_sums(x, y, *, columns, within, tile=None, chunk=64, **arguments):
    """Launch for _reference_sums' result: in chunks of row tiles, to bound what the columns take.

    chunk: row tiles per launch; by_column then holds chunk x len(y) numbers.
    """
    tile = tile or tile_shape(x, y)
    both = columns or within
    step = chunk * tile[0] if both else len(x)
    sums, total, by_column = [], torch.zeros(len(y), dtype=torch.float64, device=x.device), None
    for start in range(0, len(x), step):
        here = min(step, len(x) - start)
        if both:
            by_column = torch.zeros(-(-here // tile[0]), len(y), device=x.device)
        out = launch(
            x,
            y,
            within=within,
            tile=tile,
            by_column=by_column,
            start_row=start,
            rows_here=here,
            **arguments,
        )
        sums.append(out[:, start : start + here].sum(0))
        if both:
            total += by_column.sum(0, dtype=torch.float64)
    return torch.cat(sums), total


@on_device
def _kernel(x, y, *, kind, k, **arguments):
    """Launch and join the splits; arguments as for _reference and launch."""
    out = launch(x, y, kind=kind, k=k, **arguments)
    if kind == "ball":
        return out.sum(0)
    kept = out[:, :, :k].permute(1, 0, 2).reshape(len(x), -1)
    squares = kept.topk(k, dim=1, largest=False).values.amax(1)
    return squares.double().sqrt().float()  # rounded once, as square_limit takes it to be


def _squares(x, centre):
    """Return the squared norms of x - centre, summed in float64."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = [(part.double() - centre.double()).square().sum(1) for part in x.split(_ROWS)]
    return torch.cat(rows).to(work)


def _prepare(op, x, y, centred):
    """Check; return (x, y, within, kernel?, {centre, x2, y2}); y None: pairs within x."""
    within, y = y is None, x if y is None else y
    for name, value in (("x", x), ("y", y)):
        if value.dim() != 2 or not value.is_floating_point() or not len(value):
            raise ValueError(f"{op}: {name} must be floating (N, D), got {tuple(value.shape)}")
    if x.shape[1] != y.shape[1] or x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"{op}: x and y must agree in width, dtype and device, got "
            f"{x.shape[1]} {x.dtype} {x.device} and {y.shape[1]} {y.dtype} {y.device}"
        )
    x, y = x.detach().contiguous(), y.detach().contiguous()
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    kernel = use_triton(op, x, y)
    centre, x2, y2 = None if kernel else torch.zeros((), dtype=work, device=x.device), None, None
    if centred:
        centre = y.mean(0, dtype=torch.float64).to(work)
        centre = torch.where(centre.isfinite(), centre, 0)  # any shift: a NaN row is no other's
        y2 = _squares(y, centre)
        x2 = y2 if within else _squares(x, centre)
    return x, y, within, kernel, {"centre": centre, "x2": x2, "y2": y2}


def _sums(op, x, y, columns, **arguments):
    """Return the row sums, or with columns=True (row sums, column sums); within x both in one."""
    if y is None and columns:
        raise ValueError(f"{op}: columns=True needs y: within x they are the row sums")
    x, y, within, kernel, centred = _prepare(op, x, y, arguments["kind"] == "rbf")
    arguments |= {"within": within, "columns": columns, **centred}
    by_row, by_column = (_kernel_sums if kernel else _reference_sums)(x, y, **arguments)
    if within:
        return by_row + by_column
    return (by_row, by_column) if columns else by_row


@torch.no_grad()
def polynomial_sums(
    x: Tensor,
    y: Tensor | None = None,
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    columns: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return sum_j (gamma x_i . y_j + coef)^degree for each row of x, float64 (N,).

    Args:
        x: features, (N, D), float32, bfloat16 or float16 (float64: reference only).
        y: features, (M, D); None for the pairs within x, without i = j.
        degree: 1, 2, 3... gamma: default 1 / D. coef: number. (KID's kernel is the default.)
        columns: whether to return (these, the sums over i for each row of y, (M,)), for the price
            of one.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    Reference: Binkowski, Sutherland, Arbel and Gretton, arXiv 1801.01401, equation 4.
    """
    if degree < 1:
        raise ValueError(f"polynomial_sums: degree must be >= 1, got {degree}")
    gamma = 1 / x.shape[-1] if gamma is None else gamma
    numbers = {"scale": gamma, "bias": coef, "degree": degree}
    return _sums("polynomial_sums", x, y, columns, kind="polynomial", **numbers)


@torch.no_grad()
def rbf_sums(
    x: Tensor, y: Tensor | None = None, *, bandwidth: float, columns: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Return sum_j exp(-|x_i - y_j|^2 / (2 bandwidth^2)) for each row of x, float64 (N,).

    Args:
        bandwidth: > 0, in the features' unit (CMMD takes 10 on unit-norm CLIP features).
        x, y, columns: as for polynomial_sums.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or bandwidth <= 0.
    Reference: Jayasumana et al., arXiv 2401.09603, equation 5.
    """
    if not bandwidth > 0:
        raise ValueError(f"rbf_sums: bandwidth must be > 0, got {bandwidth}")
    numbers = {"scale": 0.5 / bandwidth**2, "bias": 0.0, "degree": 1}
    return _sums("rbf_sums", x, y, columns, kind="rbf", **numbers)


@torch.no_grad()
def knn_radius(x: Tensor, y: Tensor | None = None, *, k: int) -> Tensor:
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
    x, y, within, kernel, centred = _prepare("knn_radius", x, y, True)
    return (_kernel if kernel else _reference)(
        x, y, kind="nearest", within=within, k=k, radius=None, owner="y", **centred
    )


@torch.no_grad()
def ball_count(x: Tensor, y: Tensor, radius: Tensor, *, owner: str = "y") -> Tensor:
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
    if radius.shape != (expected,) or radius.device != x.device:
        raise ValueError(
            f"ball_count: radius must be ({expected},) for owner={owner!r} (x or y) on {x.device}, "
            f"got {tuple(radius.shape)} on {radius.device}"
        )
    radius = radius.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
    x, y, _, kernel, centred = _prepare("ball_count", x, y, True)
    return (_kernel if kernel else _reference)(
        x, y, kind="ball", within=False, k=1, radius=radius, owner=owner, **centred
    )
