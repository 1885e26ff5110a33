"""One Langevin step of a batch of chains, in one pass over memory.

    y' = clamp( y + a clip(g) + k (x_t - y) + s z ),      z ~ N(0, I) from Philox

where g = grad log p (so a > 0 climbs), a = `step`, s = `noise_scale`, and k (x_t - y) is the
tether of a recovery likelihood, the exact gradient of -|x_t - y|^2 / (2 sigma^2) scaled as the
drift is. s = sqrt(2 a) is the unadjusted Langevin algorithm. Where `mask` is False the element
keeps its `known` value bit for bit.

Sources: Welling and Teh, ICML 2011, equation 4 (with a = eps/2); Gao, Song, Poole, Wu and Kingma,
"Learning energy-based models by diffusion recovery likelihood", arXiv 2012.08125, algorithm 2.
"""

import math

import torch
from torch import Tensor

from . import native
from .broadcast import over_items
from .dispatch import (
    INTERPRETING,
    arrange,
    check_chain,
    coefficient,
    launch_options,
    on_device,
    tl,
    triton,
    use_triton,
)
from .groups import (
    key_arguments,
    launch_grid,
    locate,
    locate_rows,
    per_element,
    per_item,
    per_row,
)
from .philox import by_items, tile_normals

__all__ = ["langevin_step"]

_SPAN = 1 << 14  # elements whose squares one program adds up
# Numbers of a step, each one for all or one per item, and the kernel's flag for which.
_FLAGS = {
    "step": "A",
    "noise_scale": "S",
    "tether_scale": "K",
    "grad_clip": "C",
    "grad_norm": "N",
}


def _reference(
    y,
    grad,
    *,
    step,
    noise_scale,
    noise,
    tether,
    tether_scale,
    mask,
    known,
    clamp,
    grad_clip,
    grad_norm,
):
    """The formula above; numbers broadcast against y, noise is z or None."""
    state = y if y.dtype == torch.float64 else y.float()
    drift = grad.to(state.dtype)
    if grad_clip is not None:
        drift = drift.clamp(-grad_clip, grad_clip)
    if grad_norm is not None:
        norm = over_items(drift.reshape(len(y), -1).norm(dim=1), y)
        drift = drift * (grad_norm / norm).clamp(max=1)
    new = state + step * drift
    if tether is not None:
        new = new + tether_scale * (tether.to(state.dtype) - state)
    if noise is not None:
        new = new + noise_scale * noise
    if clamp is not None:
        new = new.clamp(*clamp)
    new = new.to(y.dtype)
    if mask is None:
        return new
    return torch.where(mask.bool(), new, y if known is None else known.to(y.dtype))


@triton.jit
def clip(x, low, high):
    """Clamp that keeps NaN: a diverged chain must be seen."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def squares_kernel(
    grad,
    out,
    items,
    numel,
    parts,
    limit,
    CLIP: tl.constexpr,
    LIMIT: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out (items, parts): sums of squares over spans of each item; no atomics, one fixed order."""
    row, safe, part = locate_rows(items, parts, ROWS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    base = row.to(tl.int64)[:, None] * numel
    largest = per_row(limit, safe[:, None], LIMIT, tl.float32)
    for start in range(0, SPAN, COLUMNS):
        element = part * SPAN + start + tl.arange(0, COLUMNS)
        inside = (row < items)[:, None] & (element < numel)[None, :]
        g = tl.load(grad + base + element[None, :], mask=inside, other=0.0).to(tl.float32)
        if CLIP:
            g = clip(g, -largest, largest)
        total += g * g
    tl.store(out + row.to(tl.int64) * parts + part, tl.sum(total, axis=1), mask=row < items)


@triton.jit(do_not_specialize=["seed", "counter", "lane", "items"])
def langevin_kernel(
    out,
    y,
    grad,
    tether,
    mask,
    known,
    noise,
    norms,
    step,
    noise_scale,
    tether_scale,
    low,
    high,
    grad_clip,
    grad_norm,
    seed,
    counter,
    lane,
    parts,
    items,
    numel,
    groups,
    tiles,
    A: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    NOISE: tl.constexpr,
    CLAMP: tl.constexpr,
    CLIP: tl.constexpr,
    NORM: tl.constexpr,
    PARTS: tl.constexpr,
    SEED: tl.constexpr,
    COUNTER: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    item, group, _element, offset, inside = locate(
        items, numel, groups, tiles, GROUPS, ROW, PACKED, WIDE
    )
    old = tl.load(y + offset, mask=inside, other=0.0)
    state = old.to(tl.float32)
    drift = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
    if CLIP:
        limit = per_element(grad_clip, item, C, GROUPS, ROW)
        drift = clip(drift, -limit, limit)
    if NORM == 1:  # the whole item is in this program
        limit = per_item(grad_norm, item, N)
        drift *= clip(limit / tl.sqrt(tl.sum(drift * drift)), 0.0, 1.0)
    if NORM == 2:
        if ROW:
            part = tl.arange(0, PARTS)
            total = tl.sum(tl.load(norms + item * parts + part, mask=part < parts, other=0.0))
        else:
            total = per_element(norms, item, 1, GROUPS, ROW)
        limit = per_element(grad_norm, item, N, GROUPS, ROW)
        drift *= clip(limit / tl.sqrt(total), 0.0, 1.0)
    new = state + per_element(step, item, A, GROUPS, ROW) * drift
    if tether is not None:
        target = tl.load(tether + offset, mask=inside, other=0.0).to(tl.float32)
        new += per_element(tether_scale, item, K, GROUPS, ROW) * (target - state)
    if NOISE == 1:
        z = tl.load(noise + offset, mask=inside, other=0.0).to(tl.float32)
        new += per_element(noise_scale, item, S, GROUPS, ROW) * z
    if NOISE == 2:
        z = tile_normals(seed, counter, lane, item, group, groups, SEED, COUNTER, GROUPS)
        new += per_element(noise_scale, item, S, GROUPS, ROW) * z
    if CLAMP:
        new = clip(new, low, high)
    new = new.to(out.dtype.element_ty)
    if mask is not None:
        free = tl.load(mask + offset, mask=inside, other=0)
        if known is not None:
            old = tl.load(known + offset, mask=inside, other=0.0)
        new = tl.where(free != 0, new, old.to(out.dtype.element_ty))
    tl.store(out + offset, new, mask=inside)


def _squares(grad, items, numel, limit, stride):
    """Return (items, parts) sums of squares of the gradient; limit, stride: its clip or None."""
    columns = min(triton.next_power_of_2(numel), 4096)
    rows = max(1, 4096 // columns)  # not by items: the order of a sum hangs on it
    span = columns if numel <= columns else _SPAN
    parts = -(-numel // span)
    out = torch.empty(items, parts, dtype=torch.float32, device=grad.device)
    squares_kernel[(-(-items // rows) * parts,)](
        grad,
        out,
        items,
        numel,
        parts,
        0.0 if limit is None else limit,
        CLIP=limit is not None,
        LIMIT=stride,
        SPAN=span,
        ROWS=rows,
        COLUMNS=columns,
        **launch_options(num_warps=8),
    )
    return out


@on_device
def _kernel(y, *, key, out, clamp, block=None, **arguments):
    """Launch; arguments as for _reference, key = (seed, counter, stream) or None.

    block: groups per program, for tests.
    """
    device, items, numel = y.device, len(y), y[:1].numel()
    clips = {name: arguments[name] is not None for name in ("grad_clip", "grad_norm")}
    names = ("grad", "tether", "mask", "known", "noise")
    y, *states = arrange(y, *(arguments[n] for n in names), ordered=key is not None)
    arguments |= dict(zip(names, states))
    for name, flag in _FLAGS.items():
        value = 0.0 if arguments[name] is None else arguments[name]
        arguments[name], arguments[flag] = coefficient(value, items, device)
    grid, layout = launch_grid(items, numel, block)
    norms, norm = None, 0
    if clips["grad_norm"]:
        whole = triton.next_power_of_2(layout["groups"])
        if 256 <= whole <= 1024 and 4 * layout["groups"] >= 3 * whole and not INTERPRETING:
            grid, layout = launch_grid(items, numel, whole)
        norm = 1 if layout["ROW"] and layout["tiles"] == 1 else 2
        limit = arguments["grad_clip"] if clips["grad_clip"] else None
        if norm == 2:
            norms = _squares(arguments["grad"], items, numel, limit, arguments["C"])
            if norms.shape[1] > 1 and not layout["ROW"]:  # the interpreter's large blocks
                norms = norms.sum(1, keepdim=True)
    target = out if out is not None and out.stride() == y.stride() else torch.empty_like(y)
    low, high = (0.0, 0.0) if clamp is None else clamp
    langevin_kernel[grid](
        out=target,
        y=y,
        norms=norms,
        low=float(low),
        high=float(high),
        parts=1 if norms is None else norms.shape[1],
        **arguments,
        **key_arguments(key, items, device),
        **layout,
        NOISE=1 if arguments["noise"] is not None else 2 if key is not None else 0,
        CLAMP=clamp is not None,
        CLIP=clips["grad_clip"],
        NORM=norm,
        PARTS=1 if norms is None else triton.next_power_of_2(norms.shape[1]),
    )
    return target if out is None or target is out else out.copy_(target)


def _native(y, *, key, out, clamp, **arguments):
    """Do the step in native.c, noise included: arguments as for _kernel, without a grad_norm."""
    names = ("grad", "tether", "mask", "known")
    y, *states = arrange(y, *(arguments[name] for name in names), ordered=True)
    fields = {name: x for name, x in zip(names, states) if x is not None}
    fields.setdefault("known", y)
    clip, pull = arguments["grad_clip"], arguments["tether_scale"]
    numbers = {
        "step": arguments["step"],
        "noise": arguments["noise_scale"],
        "pull": 0.0 if pull is None else pull,
        "clip": math.inf if clip is None else clip,
    }
    low, high = (-math.inf, math.inf) if clamp is None else clamp
    limits = {"low": float(low), "high": float(high)}
    return native.run_step(
        "langevin_step", y, key=key, out=out, numbers=numbers, **limits, **fields
    )


def langevin_step(
    y: Tensor,
    grad: Tensor,
    *,
    step: float | Tensor,
    noise_scale: float | Tensor | None = None,
    tether: Tensor | None = None,
    tether_scale: float | Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    grad_clip: float | Tensor | None = None,
    grad_norm: float | Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    counter: int | Tensor = 0,
    stream: int = 0,
    out: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """Return the state after one Langevin step, of y's shape (B, ...) and dtype.

    Computed in float32 (float64 for a float64 state, reference only). Chains, one per item, draw
    noise that depends on (seed, counter, stream, element) alone.

    Args:
        y: state, (B, ...). grad: gradient of log p, same shape, any floating dtype.
        step: a > 0, a number or (B,).
        noise_scale: s >= 0, a number or (B,); default sqrt(2 step); 0 draws nothing.
        tether, tether_scale: x_t like y, and k, a number or (B,).
        mask: bool or uint8, broadcastable to y: True where the element moves.
        known: values where it does not, like y; default y itself.
        clamp: (low, high) for the result; NaN stays NaN.
        grad_clip: largest magnitude of an element of the gradient, a number or (B,).
        grad_norm: largest L2 norm of an item's gradient (after grad_clip), a number or (B,).
        noise: z like y, in place of drawing it.
        seed: key of the noise: an int, or int64 (B,), one per chain. One int for all: chains take
            consecutive parts of one stream, so their noise then depends on their place in y.
        counter: number of this step in the stream: an int, or int64 of one number or (B,).
        stream: which stream under the key, an int.
        out: where to write, y itself for in place; default a new tensor.
        exact: as for philox_normal: training asks for it.

    Raises:
        ValueError: for shapes that differ, a step that is not positive, a noise without a seed,
            an out= beside an input that needs a gradient.
    Reference: module docstring; Parisi 1981; Roberts and Tweedie 1996 for the default scale.
    """
    op = "langevin_step"
    like = {"grad": grad, "tether": tether, "known": known, "noise": noise, "out": out}
    positive = {"step": step, "grad_clip": grad_clip, "grad_norm": grad_norm}
    more = {"noise_scale": noise_scale, "tether_scale": tether_scale}
    check_chain(op, y, like, positive, mask, **more, seed=seed, counter=counter)
    if noise_scale is None:
        noise_scale = (2 * step) ** 0.5
    if (tether is None) != (tether_scale is None) or (known is not None and mask is None):
        raise ValueError(f"{op}: tether needs tether_scale (and it tether), known needs mask")
    quiet = not isinstance(noise_scale, torch.Tensor) and noise_scale == 0
    if not quiet and noise is None and seed is None:
        raise ValueError(f"{op}: seed must be given where noise_scale > 0: an int or one per chain")
    arguments = {
        "grad": grad,
        "step": step,
        "noise_scale": noise_scale,
        "noise": None if quiet else noise,
        "tether": tether,
        "tether_scale": tether_scale,
        "mask": None if mask is None else mask.view(torch.uint8).expand_as(y),
        "known": known,
        "clamp": clamp,
        "grad_clip": grad_clip,
        "grad_norm": grad_norm,
        "key": None if quiet or noise is not None else (seed, counter, stream),
        "out": out,
    }
    numbers = [arguments[name] for name in _FLAGS]
    kernel = use_triton(op, y, grad, tether, known, noise, out, numbers=numbers) and y.numel() > 0
    if kernel:
        return _kernel(y, **arguments)
    states = (y, grad, tether, known, out)
    if exact or not arguments["key"] or grad_norm is not None:
        compiled = False
    else:
        compiled = native.takes(op, states, numbers) and y.numel() > 0
    if compiled:
        del arguments["grad_norm"], arguments["noise"]
        return _native(y, **arguments)
    return by_items(_reference, y, exact=exact, **arguments)
