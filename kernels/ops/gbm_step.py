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
from torch import Tensor

from . import native
from .dispatch import (
    arrange,
    check_chain,
    check_counter,
    coefficient,
    on_device,
    tl,
    triton,
    use_triton,
)
from .groups import key_arguments, launch_grid, locate, per_element, spread
from .philox import by_items, tile_normals

__all__ = ["gbm_step"]

FORMS = ("dls", "ums", "log")


def _reference(x, *, score, noise, variance, drift, noise_scale, form, flips):
    """The formula above; numbers broadcast against x, noise is z or None; adds to flips."""
    state = x if x.dtype == torch.float64 else x.float()
    ito = 2.0 if form == "ums" else 1.5
    exponent = variance * score.to(state.dtype) + (ito * variance - drift)
    if noise is not None:
        exponent = exponent + noise_scale * noise
    if form == "ums":
        factor = 1 + exponent
        if flips is not None:
            flips += (factor <= 0).reshape(len(x), -1).sum(1).reshape(flips.shape)
        return (state * factor).to(x.dtype)
    new = state + exponent if form == "log" else state * exponent.exp()
    return new.to(x.dtype)


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
    item, group, _element, offset, inside = locate(
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
def _kernel(x, *, key, out, form, block=None, **arguments):
    """Launch; arguments as for _reference, key = (seed, counter, stream) or None."""
    device, items = x.device, len(x)
    x, score, noise = arrange(x, arguments["score"], arguments["noise"], ordered=key is not None)
    arguments |= {"score": score, "noise": noise}
    for name, flag in (("variance", "V"), ("drift", "M"), ("noise_scale", "S")):
        arguments[name], arguments[flag] = coefficient(arguments[name], items, device)
    grid, layout = launch_grid(items, x[:1].numel(), block)
    target = out if out is not None and out.stride() == x.stride() else torch.empty_like(x)
    gbm_kernel[grid](
        out=target,
        x=x,
        **arguments,
        **key_arguments(key, items, device),
        **layout,
        FORM=form,
        NOISE=1 if noise is not None else 2 if key is not None else 0,
    )
    return target if out is None or target is out else out.copy_(target)


def _native(x, *, key, out, form, score, variance, drift, noise_scale, flips):
    """Do the step in native.c, noise included: arguments as for _kernel."""
    x, score = arrange(x, score, ordered=True)
    ito = 2.0 if form == "ums" else 1.5
    numbers = {"step": variance, "noise": noise_scale, "pull": ito * variance - drift}
    fields = {"grad": score} if flips is None else {"grad": score, "flips": flips}
    return native.run_step(form, x, key=key, out=out, numbers=numbers, **fields)


def gbm_step(
    x: Tensor,
    score: Tensor,
    *,
    variance: float | Tensor,
    drift: float | Tensor = 0.0,
    noise_scale: float | Tensor | None = None,
    form: str = "dls",
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    counter: int | Tensor = 0,
    stream: int = 0,
    flips: Tensor | None = None,
    out: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
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
        flips: contiguous int32 (B,); counts the elements of each item whose ums factor was <= 0.
        out: where to write, x itself for in place; default a new tensor.
        exact: as for philox_normal.

    Raises:
        ValueError: for shapes that differ, an unknown form, a noise without a seed, an out= beside
            an input that needs a gradient.
    Reference: module docstring; docs/kernels.md.
    """
    op = "gbm_step"
    if form not in FORMS:
        raise ValueError(f"{op}: form must be one of {', '.join(FORMS)}, got {form!r}")
    like, more = {"score": score, "noise": noise, "out": out}, {"seed": seed, "counter": counter}
    check_chain(op, x, like, {"variance": variance}, drift=drift, noise_scale=noise_scale, **more)
    check_counter(op, "flips", flips, len(x), x.device)
    noise_scale = variance**0.5 if noise_scale is None else noise_scale
    quiet = not isinstance(noise_scale, torch.Tensor) and noise_scale == 0
    if not quiet and noise is None and seed is None:
        raise ValueError(f"{op}: seed must be given where noise_scale > 0: an int or one per item")
    numbers = (variance, drift, noise_scale)
    kernel = use_triton(op, x, score, noise, out, numbers=numbers) and x.numel() > 0
    arguments = {
        "score": score,
        "noise": None if quiet else noise,
        "variance": variance,
        "drift": drift,
        "noise_scale": noise_scale,
        "form": form,
        "flips": flips,
        "key": None if quiet or noise is not None else (seed, counter, stream),
        "out": out,
    }
    if kernel:
        return _kernel(x, **arguments)
    compiled = not exact and arguments["key"] is not None and x.numel() > 0
    if compiled and native.takes(op, (x, score, out), numbers):
        del arguments["noise"]
        return _native(x, **arguments)
    return by_items(_reference, x, exact=exact, **arguments)
