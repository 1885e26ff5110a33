"""One multiplicative step: reverse time of a geometric Brownian motion.

With h = x grad log p(x), the multiplicative score, v = d sigma^2 the variance of the step and
m = d mu its drift, the reverse SDE dX = X (2 sigma^2 - mu + sigma^2 h) dtau + sigma X dW gives

    dls   x' = x exp( v h - m + 1.5 v + s z )          exact for constant h; keeps every sign
    ums   x' = x ( 1 + v h - m + 2 v + s z )           Euler in x; a factor <= 0 flips the sign

with s = sqrt(v) and z ~ N(0, I) from Philox. In log space (state log x) dls is an addition.

Source: Anderson, "Reverse-time diffusion equation models", 1982, for g = sigma x (the divergence
of g^2 = sigma^2 x^2 is 2 sigma^2 x); Ito's correction -sigma^2 / 2 turns 2 into 1.5 in log space.
"""

import torch

from .dispatch import (
    check_chain,
    chunks,
    coefficient,
    column,
    launch_options,
    on_device,
    tl,
    triton,
    use_triton,
)
from .groups import locate, per_element, plan, spread
from .philox import chain_normals, tile_normals

__all__ = ["gbm_step"]

FORMS = ("dls", "ums", "log")


def _reference(x, score, noise, variance, drift, noise_scale, form):
    """Return (x', flips per item); the coefficients broadcast against x, noise is z or None."""
    state = x if x.dtype == torch.float64 else x.float()
    ito = 2.0 if form == "ums" else 1.5
    exponent = variance * score.to(state.dtype) + (ito * variance - drift)
    if noise is not None:
        exponent = exponent + noise_scale * noise
    if form == "ums":
        factor = 1 + exponent
        return (state * factor).to(x.dtype), (factor <= 0).reshape(len(x), -1).sum(1)
    new = state + exponent if form == "log" else state * exponent.exp()
    return new.to(x.dtype), 0


@triton.jit(do_not_specialize=["seed", "counter", "lane", "items"])
def gbm_kernel(
    out,
    x,
    score,
    noise,
    flips,
    variance,
    drift,
    noise_scale,
    seed,
    counter,
    lane,
    items,
    numel,
    groups,
    tiles,
    V: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    FORM: tl.constexpr,
    NOISE: tl.constexpr,
    SEED: tl.constexpr,
    COUNTER: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    item, group, element, offset, inside = locate(
        items, numel, groups, tiles, GROUPS, ROW, PACKED, WIDE
    )
    state = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(score + offset, mask=inside, other=0.0).to(tl.float32)
    v = per_element(variance, item, V, GROUPS, ROW)
    m = per_element(drift, item, M, GROUPS, ROW)
    ito: tl.constexpr = 2.0 if FORM == "ums" else 1.5
    exponent = v * h + (ito * v - m)
    if NOISE == 1:
        z = tl.load(noise + offset, mask=inside, other=0.0).to(tl.float32)
        exponent += per_element(noise_scale, item, S, GROUPS, ROW) * z
    if NOISE == 2:
        z = tile_normals(seed, counter, lane, item, group, groups, SEED, COUNTER, GROUPS)
        exponent += per_element(noise_scale, item, S, GROUPS, ROW) * z
    if FORM == "log":
        new = state + exponent
    elif FORM == "dls":
        new = state * tl.exp(exponent)
    else:
        factor = 1.0 + exponent
        new = state * factor
        if flips is not None:
            flipped = inside & (factor <= 0.0)
            if ROW:
                count = tl.sum(flipped.to(tl.int32))
                tl.atomic_add(flips + item, count, mask=count > 0)
            else:
                one = flipped.to(tl.int32)
                tl.atomic_add(flips + spread(item, GROUPS), one, mask=flipped)
    tl.store(out + offset, new.to(out.dtype.element_ty), mask=inside)


@on_device
def _kernel(x, score, *, noise, coefficients, form, key, flips, out, block=None):
    """Launch; coefficients = (variance, drift, noise_scale), key = (seed, counter, stream)."""
    device, items = x.device, len(x)
    x, score = x.contiguous(), score.contiguous()
    noise = None if noise is None else noise.contiguous()
    (v, V), (m, M), (s, S) = (coefficient(value, items, device) for value in coefficients)
    seed, counter, stream = key or (0, 0, 0)
    seed, seed_stride = coefficient(seed, items, device, torch.int64)
    counter, counter_stride = coefficient(counter, items, device, torch.int64)
    grid, layout = plan(items, x[:1].numel(), block)
    out = torch.empty_like(x) if out is None else out
    target = out if out.is_contiguous() else torch.empty_like(x)
    gbm_kernel[grid](
        target,
        x,
        score,
        noise,
        flips,
        v,
        m,
        s,
        seed,
        counter,
        stream,
        **layout,
        V=V,
        M=M,
        S=S,
        FORM=form,
        NOISE=1 if noise is not None else 2 if key is not None else 0,
        SEED=seed_stride,
        COUNTER=counter_stride,
        **launch_options(num_warps=max(1, min(16, layout["GROUPS"] // 64))),
    )
    return target if target is out else out.copy_(target)


def _in_chunks(x, score, *, noise, coefficients, form, key, flips, out):
    """Return _reference over the whole state, some items at a time, drawing the noise."""
    whole = torch.is_grad_enabled() and (x.requires_grad or score.requires_grad)
    out = torch.empty_like(x) if out is None else out
    for part in [slice(0, len(x))] if whole else chunks(len(x), x[:1].numel()):
        z = None if noise is None else noise[part]
        if key is not None:
            keys = [k[part] if isinstance(k, torch.Tensor) and k.numel() > 1 else k for k in key]
            z = chain_normals(x[part], *keys, first=part.start)
        values = [column(value, part, x) for value in coefficients]
        new, flipped = _reference(x[part], score[part], z, *values, form)
        if flips is not None:
            flips[part] += flipped
        if whole:
            return new
        out[part] = new
    return out


def gbm_step(
    x,
    score,
    *,
    variance,
    drift=0.0,
    noise_scale=None,
    form="dls",
    noise=None,
    seed=None,
    counter=0,
    stream=0,
    flips=None,
    out=None,
):
    """Return the state after one multiplicative step, of x's shape (B, ...) and dtype.

    Args:
        x: state, (B, ...); positive, or log x for form="log".
        score: h = x grad log p, same shape, any floating dtype.
        variance: v = d sigma^2 > 0 (or Sigma_k - Sigma_{k+1}), a number or (B,).
        drift: m = d mu of the forward process, a number or (B,).
        noise_scale: s >= 0, a number or (B,); default sqrt(variance); 0 draws nothing.
        form: "dls", "ums", or "log" (dls with log x as the state).
        noise: z like x, in place of drawing it.
        seed, counter, stream: as for langevin_step.
        flips: int32 (B,); the elements whose ums factor was <= 0 are added to it, per item.
        out: where to write, x itself for in place; default a new tensor.

    Raises:
        ValueError: for shapes that differ, an unknown form, a noise without a seed.
    Reference: module docstring; docs/kernels.md.
    """
    op = "gbm_step"
    if form not in FORMS:
        raise ValueError(f"{op}: form must be one of {', '.join(FORMS)}, got {form!r}")
    if flips is not None and (flips.dtype != torch.int32 or flips.shape != x.shape[:1]):
        raise ValueError(f"{op}: flips must be int32 ({len(x)},), got {flips.dtype} {flips.shape}")
    like, more = {"score": score, "noise": noise, "out": out}, {"seed": seed, "counter": counter}
    check_chain(op, x, like, {"variance": variance}, drift=drift, noise_scale=noise_scale, **more)
    noise_scale = variance**0.5 if noise_scale is None else noise_scale
    quiet = not isinstance(noise_scale, torch.Tensor) and noise_scale == 0
    if not quiet and noise is None and seed is None:
        raise ValueError(f"{op}: seed must be given where noise_scale > 0: an int or one per item")
    kernel = use_triton(op, x, score, noise, out) and x.numel() > 0
    return (_kernel if kernel else _in_chunks)(
        x,
        score,
        noise=None if quiet else noise,
        coefficients=(variance, drift, noise_scale),
        form=form,
        key=None if quiet or noise is not None else (seed, counter, stream),
        flips=flips,
        out=out,
    )
