"""Metropolis-adjusted Langevin: propose with one pass over memory, accept with another.

    propose   y' = y + b(y) + s z,        b(y) = a g(y) + k (x_t - y),     z ~ N(0, I)
    accept    with probability min(1, exp(r)),
              r = log p(y') - log p(y) + log q(y | y') - log q(y' | y)

for the density p(y) exp(-(k / s^2) |x_t - y|^2) that the drift belongs to when a g = s^2/2 grad
log p (s = sqrt(2 a) at temperature one). Multiplied out, with d = y' - y and b' = b(y'),

    log q(y | y') - log q(y' | y) = -(b + b') . (2 d + b' - b) / (2 s^2)
    tether                        = (k / s^2) d . (2 x_t - y - y')

one sum over elements without the difference of two numbers of the size of the dimension.

Source: Roberts and Tweedie, Bernoulli 1996; Besag's comment in JRSS B 1994.
"""

from typing import Any

import torch
from torch import Tensor

from .broadcast import over_items
from .dispatch import (
    FLOATS,
    arrange,
    check_chain,
    check_counter,
    chunks,
    coefficient,
    column,
    launch_options,
    on_device,
    tl,
    triton,
    use_triton,
)
from .groups import key_arguments, locate_rows, per_row
from .langevin_step import langevin_step
from .philox import chain_uniforms, random_words

__all__ = ["mala_accept", "mala_propose"]

_SPAN = 1 << 14  # elements that one program adds up


def mala_propose(
    y: Tensor,
    grad: Tensor,
    *,
    step: float | Tensor,
    noise_scale: float | Tensor | None = None,
    out: Tensor | None = None,
    exact: bool = True,
    **options: Any,
) -> Tensor:
    """Return the proposal y' of every chain, y's shape (B, ...): a Langevin step without clamps.

    Args: as for langevin_step (tether, tether_scale, mask, noise, seed, counter, stream, exact; a
    decision may hang on the last bit, so exact is on here). Clamping and gradient clipping are not
    offered: the ratio in mala_accept would not know of them.

    Raises:
        ValueError: for an option that would break detailed balance.
    """
    if wrong := {"clamp", "grad_clip", "grad_norm", "known"} & set(options):
        raise ValueError(f"mala_propose: {min(wrong)} breaks detailed balance: use langevin_step")
    options |= {"noise_scale": noise_scale, "out": out, "exact": exact}
    return langevin_step(y, grad, step=step, **options)


def _terms(y, y2, g, g2, a, s, tether, k, mask, dtype):
    """Return (B,): the element sum of the log ratio, added up in dtype."""
    d, b, b2 = y2 - y, a * g, a * g2
    if tether is not None:
        b, b2 = b + k * (tether - y), b2 + k * (tether - y2)
    terms = -0.5 * (b + b2) * (2 * d + b2 - b)
    if tether is not None:
        terms = terms + k * d * (2 * tether - y - y2)
    if mask is not None:
        terms = torch.where(mask != 0, terms, 0)  # whatever stands in fixed elements
    terms = terms / (s * s)
    return terms.reshape(len(y), -1).sum(1, dtype=dtype)


@triton.jit
def element_terms(y, y2, g, g2, tether, mask, offset, inside, a, s, k):
    """The same for a tile; a, s, k broadcast against it."""
    old = tl.load(y + offset, mask=inside, other=0.0).to(tl.float32)
    new = tl.load(y2 + offset, mask=inside, other=0.0).to(tl.float32)
    b = a * tl.load(g + offset, mask=inside, other=0.0).to(tl.float32)
    b2 = a * tl.load(g2 + offset, mask=inside, other=0.0).to(tl.float32)
    d = new - old
    if tether is not None:
        x = tl.load(tether + offset, mask=inside, other=0.0).to(tl.float32)
        b += k * (x - old)
        b2 += k * (x - new)
        terms = k * d * (2.0 * x - old - new) - 0.5 * (b + b2) * (2.0 * d + b2 - b)
    else:
        terms = -0.5 * (b + b2) * (2.0 * d + b2 - b)
    free = inside
    if mask is not None:
        free = inside & (tl.load(mask + offset, mask=inside, other=0) != 0)
    return tl.where(free, terms / (s * s), 0.0)


@triton.jit(do_not_specialize=["seed", "counter", "lane", "items"])
def accept_kernel(
    out_y,
    out_g,
    out_log_prob,
    ratio,
    accepted,
    count,
    sums,
    y,
    y2,
    g,
    g2,
    log_prob,
    log_prob2,
    tether,
    mask,
    uniform,
    step,
    noise_scale,
    tether_scale,
    seed,
    counter,
    lane,
    items,
    numel,
    parts,
    A: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    SEED: tl.constexpr,
    COUNTER: tl.constexpr,
    ACC: tl.constexpr,
    STAGE: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """STAGE 0: everything, items fit a program. 1: sums (items, PARTS). 2: decide and select."""
    row, safe, part = locate_rows(items, parts, ROWS)
    valid = row < items
    base = safe.to(tl.int64)[:, None] * numel
    if STAGE < 2:
        a = per_row(step, safe, A, tl.float32)
        s = per_row(noise_scale, safe, S, tl.float32)
        k = per_row(tether_scale, safe, K, tl.float32)
        total = tl.zeros((ROWS, COLUMNS), dtype=ACC)
        for start in range(0, SPAN, COLUMNS):
            element = part * SPAN + start + tl.arange(0, COLUMNS)
            inside = valid[:, None] & (element < numel)[None, :]
            total += element_terms(
                y,
                y2,
                g,
                g2,
                tether,
                mask,
                base + element[None, :],
                inside,
                a[:, None],
                s[:, None],
                k[:, None],
            ).to(ACC)
        sum_of_terms = tl.sum(total, axis=1).to(tl.float64)
    if STAGE == 1:
        tl.store(sums + row.to(tl.int64) * PARTS + part, sum_of_terms, mask=valid)
    else:
        if STAGE == 2:
            piece = tl.arange(0, PARTS)[None, :]
            pieces = tl.load(sums + safe.to(tl.int64)[:, None] * PARTS + piece)
            sum_of_terms = tl.sum(pieces, axis=1)
        before = tl.load(log_prob + safe)
        after = tl.load(log_prob2 + safe)
        r = after.to(tl.float64) - before.to(tl.float64) + sum_of_terms
        if uniform is not None:
            u = tl.load(uniform + safe)
        else:
            group = safe
            if SEED > 0 or COUNTER > 0:
                group = safe * 0
            key = per_row(seed, safe, SEED, tl.int64)
            position = per_row(counter, safe, COUNTER, tl.int64)
            word, _1, _2, _3 = random_words(key, position, lane, group)
            u = (word >> 8).to(tl.float32) * 5.9604644775390625e-08
        accept = tl.log(u) < r.to(tl.float32)  # a NaN ratio rejects
        for start in range(0, SPAN, COLUMNS):
            element = part * SPAN + start + tl.arange(0, COLUMNS)
            inside = valid[:, None] & (element < numel)[None, :]
            offset = base + element[None, :]
            take = accept[:, None]
            old = tl.load(y + offset, mask=inside & ~take, other=0.0)
            new = tl.load(y2 + offset, mask=inside & take, other=0.0).to(old.dtype)
            tl.store(out_y + offset, tl.where(take, new, old), mask=inside)
            old = tl.load(g + offset, mask=inside & ~take, other=0.0)
            new = tl.load(g2 + offset, mask=inside & take, other=0.0).to(old.dtype)
            tl.store(out_g + offset, tl.where(take, new, old), mask=inside)
        once = row < tl.where(part == 0, items, 0)
        tl.store(out_log_prob + row, tl.where(accept, after, before), mask=once)
        tl.store(ratio + row, r, mask=once)
        tl.store(accepted + row, accept.to(tl.uint8), mask=once)
        if count is not None:
            seen = tl.load(count + row, mask=once, other=0)
            tl.store(count + row, seen + accept.to(tl.int32), mask=once)


@on_device
def _kernel(y, y2, g, g2, lp, lp2, *, coefficients, tether, mask, uniform, key, count, acc, outs):
    """Launch; outs = (y, g) to write into; return (y, g, log_prob, accepted, ratio)."""
    device, items, numel = y.device, len(y), y[:1].numel()
    y, y2, g, g2, tether, mask = arrange(y, y2, g, g2, tether, mask, ordered=False)
    targets = [
        out if out.stride() == x.stride() else torch.empty_like(x) for out, x in zip(outs, (y, g))
    ]
    (a, A), (s, S), (k, K) = (coefficient(value, items, device) for value in coefficients)
    columns = min(triton.next_power_of_2(numel), 4096)
    whole = numel <= columns
    columns = columns if whole else 1024  # keeps the sums of six arrays in registers
    rows = max(1, 2048 // columns) if whole else 1  # not by items: the order of a sum hangs on it
    span = columns if whole else _SPAN
    parts = -(-numel // span)
    padded = triton.next_power_of_2(parts)
    sums = None if whole else torch.zeros(items, padded, dtype=torch.float64, device=device)
    out_lp = torch.empty_like(lp)
    ratio = torch.empty(items, dtype=torch.float64, device=device)
    accepted = torch.empty(items, dtype=torch.uint8, device=device)
    for stage in (0,) if whole else (1, 2):
        accept_kernel[(-(-items // rows) * parts,)](
            out_y=targets[0],
            out_g=targets[1],
            out_log_prob=out_lp,
            ratio=ratio,
            accepted=accepted,
            count=count,
            sums=sums,
            y=y,
            y2=y2,
            g=g,
            g2=g2,
            log_prob=lp,
            log_prob2=lp2,
            tether=tether,
            mask=mask,
            uniform=uniform,
            step=a,
            noise_scale=s,
            tether_scale=k,
            items=items,
            numel=numel,
            parts=parts,
            A=A,
            S=S,
            K=K,
            **key_arguments(key, items, device),
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            STAGE=stage,
            PARTS=padded,
            SPAN=span,
            ROWS=rows,
            COLUMNS=columns,
            **launch_options(num_warps=8),
        )
    final = [out if out is made else out.copy_(made) for out, made in zip(outs, targets)]
    return (*final, out_lp, accepted.view(torch.bool), ratio)


def _in_chunks(
    y, y2, g, g2, lp, lp2, *, coefficients, tether, mask, uniform, key, count, acc, outs
):
    """Return what _kernel returns, by _terms over some items at a time."""
    work = torch.float64 if torch.float64 in (y.dtype, acc) else torch.float32
    sums = torch.empty(len(y), dtype=torch.float64, device=y.device)
    for part in chunks(len(y), y[:1].numel(), y.device):
        a, s, k = (column(value, part, y) for value in coefficients)
        pieces = [None if x is None else x[part].to(work) for x in (y, y2, g, g2, tether, mask)]
        sums[part] = _terms(*pieces[:4], a, s, pieces[4], k, pieces[5], acc).double()
    ratio = lp2.double() - lp.double() + sums
    if uniform is None:
        uniform = chain_uniforms(len(y), *key, device=y.device)
    accept = uniform.log() < ratio.to(uniform.dtype)
    for out, new, old in ((outs[0], y2, y), (outs[1], g2, g)):
        torch.where(over_items(accept, y), new.to(out.dtype), old.to(out.dtype), out=out)
    if count is not None:
        count += accept
    return (*outs, torch.where(accept, lp2, lp), accept, ratio)


@torch.no_grad()
def mala_accept(
    y: Tensor,
    proposal: Tensor,
    grad: Tensor,
    proposal_grad: Tensor,
    log_prob: Tensor,
    proposal_log_prob: Tensor,
    *,
    step: float | Tensor,
    noise_scale: float | Tensor | None = None,
    tether: Tensor | None = None,
    tether_scale: float | Tensor | None = None,
    mask: Tensor | None = None,
    uniform: Tensor | None = None,
    seed: int | Tensor | None = None,
    counter: int | Tensor = 0,
    stream: int = 1,
    count: Tensor | None = None,
    accumulate: torch.dtype = torch.float32,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (y, grad, log_prob, accepted, log_ratio) after the Metropolis decision of each chain.

    accepted is bool (B,), log_ratio float64 (B,); nothing waits for the device. A ratio that is
    NaN rejects, so a proposal with a non-finite energy or gradient is not taken.

    Args:
        y, proposal: states (B, ...). grad, proposal_grad: gradients of log p there.
        log_prob, proposal_log_prob: log p there, (B,), WITHOUT the tether's term.
        step, noise_scale, tether, tether_scale, mask: as given to mala_propose.
        uniform: float32 (B,) in [0, 1), in place of drawing it.
        seed, counter, stream: as for langevin_step; the stream must not be the proposal's.
        count: contiguous int32 (B,); acceptances are added to it.
        accumulate: torch.float32, or torch.float64 for sums whose error must stay below 1e-3
            (more than about 1e7 elements, or step sizes at which the ratio is far from zero).
        inplace: write the state and the gradient into y and grad.

    Raises:
        ValueError: for shapes that differ, or neither uniform nor seed.
    Reference: module docstring.
    """
    op = "mala_accept"
    like = {"proposal": proposal, "grad": grad, "proposal_grad": proposal_grad, "tether": tether}
    more = {"tether_scale": tether_scale, "seed": seed, "counter": counter}
    check_chain(op, y, like, {"step": step, "noise_scale": noise_scale}, mask, **more)
    check_counter(op, "count", count, len(y), y.device)
    per_item = {"log_prob": log_prob, "proposal_log_prob": proposal_log_prob, "uniform": uniform}
    for name, value in per_item.items():
        if value is not None and (value.shape != y.shape[:1] or value.device != y.device):
            raise ValueError(
                f"{op}: {name} must be ({len(y)},) on {y.device}, "
                f"got {tuple(value.shape)} on {value.device}"
            )
    if (tether is None) != (tether_scale is None) or (uniform is None and seed is None):
        raise ValueError(f"{op}: tether needs tether_scale, and the decision a seed or uniform")
    noise_scale = (2 * step) ** 0.5 if noise_scale is None else noise_scale
    states = (y, proposal, grad, proposal_grad)
    kernel = use_triton(op, *states, tether, uniform) and y.numel() > 0
    kernel = kernel and use_triton(
        op, log_prob, count, dtypes=(*FLOATS, torch.float64, torch.int32)
    )
    outs = (y, grad) if inplace else (torch.empty_like(y), torch.empty_like(grad))
    return (_kernel if kernel else _in_chunks)(
        *states,
        log_prob.contiguous(),
        proposal_log_prob.contiguous(),
        coefficients=(step, noise_scale, 0.0 if tether_scale is None else tether_scale),
        tether=tether,
        mask=None if mask is None else mask.view(torch.uint8).expand_as(y),
        uniform=None if uniform is None else uniform.contiguous(),
        key=(0 if seed is None else seed, counter, stream),
        count=count,
        acc=accumulate,
        outs=outs,
    )
