"""No method uses this: a whole Langevin chain on an energy in closed form, for tests and toys.

    y <- y + a grad log p(y) + s z,      repeated `steps` times,

for three targets with known answers, elementwise or of few dimensions:

    Gaussian     log p = -1/2 sum_d q_d (y_d - m_d)^2
    Mixture      log p = log sum_k w_k N(y; m_k, v_k I)
    DoubleWell   log p = -h sum_d (y_d^2 - c^2)^2

The state stays in registers and the noise is drawn in the kernel: memory is touched twice per chain
instead of three times per step. The state is float32 over the
whole chain (float64 stays, reference only) and rounded once, to y's dtype, at the end. Step i draws
the noise of langevin_step with counter + i, so the two agree but for rounding.

Source: Parisi, "Correlation functions and computer simulations", 1981; module langevin_step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native
from .dispatch import (
    INTERPRETING,
    check_chain,
    coefficient,
    launch_options,
    on_device,
    tl,
    triton,
    use_triton,
)
from .groups import key_arguments, locate_rows, per_row
from .langevin_step import langevin_step
from .philox import group_normals

__all__ = ["DoubleWell", "Gaussian", "Mixture", "langevin_chain"]


@dataclass
class Gaussian:
    """Independent normals: E(y) = 1/2 sum q (y - m)^2, (B, ...) -> (B,).

    Args:
        mean, precision: numbers, or tensors of an item's shape; precision > 0.
    """

    mean: float | Tensor = 0.0
    precision: float | Tensor = 1.0

    def __call__(self, y: Tensor) -> Tensor:
        """Return the energy, (B,)."""
        return (0.5 * self.precision * (y - self.mean) ** 2).reshape(len(y), -1).sum(1)

    def score(self, y: Tensor) -> Tensor:
        """Return grad log p = q (m - y), like y."""
        return self.precision * (self.mean - y)


@dataclass
class Mixture:
    """Isotropic normals: E(y) = -log sum_k w_k N(y; m_k, v_k I), (B, D) -> (B,).

    Args:
        means: (K, D). variances, weights: (K,), > 0; weights need not sum to one.
    """

    means: Tensor
    variances: Tensor
    weights: Tensor

    def _logits(self, y: Tensor) -> Tensor:
        squares = (y.flatten(1)[:, None] - self.means).square().sum(-1)
        scale = self.means.shape[1] * torch.log(2 * math.pi * self.variances)
        return self.weights.log() - 0.5 * (scale + squares / self.variances)

    def __call__(self, y: Tensor) -> Tensor:
        """Return the energy, (B,)."""
        return -self._logits(y).logsumexp(1)

    def score(self, y: Tensor) -> Tensor:
        """Return grad log p, the responsibilities' mean of (m_k - y) / v_k, like y."""
        share = self._logits(y).softmax(1) / self.variances
        flat = share @ self.means - share.sum(1, keepdim=True) * y.flatten(1)
        return flat.reshape(y.shape)


@dataclass
class DoubleWell:
    """E(y) = h sum (y^2 - c^2)^2: two wells per element at -c and c, barrier h c^4."""

    height: float = 1.0
    centre: float = 1.0

    def __call__(self, y: Tensor) -> Tensor:
        """Return the energy, (B,)."""
        return (self.height * (y**2 - self.centre**2) ** 2).reshape(len(y), -1).sum(1)

    def score(self, y: Tensor) -> Tensor:
        """Return grad log p = -4 h y (y^2 - c^2), like y."""
        return -4 * self.height * y * (y**2 - self.centre**2)


def _reference(y, energy, *, steps, a, s, seed, counter, stream, exact=False):
    """The formula above, as `steps` calls of langevin_step in place on the state y."""
    for i in range(steps):
        score = energy.score(y)
        key = {"seed": seed, "counter": counter + i, "stream": stream, "exact": exact}
        langevin_step(y, score, step=a, noise_scale=s, out=y, **key)
    return y


def _native(y, energy, *, steps, a, s, seed, counter, stream):
    """Do the whole chain in native.c, in place on the contiguous float32 state y."""
    if isinstance(energy, Gaussian):
        parameters = {"shape": energy.precision, "place": energy.mean}
    else:
        parameters = {"shape": -4 * energy.height, "place": energy.centre**2}
    each = {}
    for name, value in parameters.items():  # one for all, or one per element of an item
        value = torch.as_tensor(value, dtype=torch.float32)
        value = value.expand(y.shape[1:]) if value.dim() else value
        parameters[name] = value = value.contiguous()
        each[name] = native.Number(value.data_ptr(), int(value.dim() > 0))
    key, numbers = (seed, counter, stream), {"step": a, "noise": s}
    kind = type(energy).__name__
    return native.run_step(kind, y, key=key, out=y, numbers=numbers, steps=steps, **each)


@triton.jit
def parameter(value, element, inside, TENSOR: tl.constexpr):
    """A parameter of each element, or the one for all."""
    if TENSOR:
        result = tl.load(value + element, mask=inside, other=0.0)
    else:
        result = tl.zeros(element.shape, dtype=tl.float32) + value
    return result


@triton.jit
def well(y, height, centre):
    return -4.0 * height * y * (y * y - centre * centre)


@triton.jit
def mixture_scores(
    y0, y1, y2, y3, means, variances, logs, group, numel, components, ROWS: tl.constexpr
):
    """grad log p of the four lanes, by one pass over the components with a running maximum."""
    top = tl.zeros((ROWS,), dtype=tl.float32) - float("inf")
    total = tl.zeros((ROWS,), dtype=tl.float32)
    s0, s1, s2, s3 = y0 * 0.0, y1 * 0.0, y2 * 0.0, y3 * 0.0
    for k in range(0, components):
        inverse = 1.0 / tl.load(variances + k)
        at = means + k * numel + 4 * group
        d0 = tl.load(at, mask=4 * group < numel, other=0.0) - y0
        d1 = tl.load(at + 1, mask=4 * group + 1 < numel, other=0.0) - y1
        d2 = tl.load(at + 2, mask=4 * group + 2 < numel, other=0.0) - y2
        d3 = tl.load(at + 3, mask=4 * group + 3 < numel, other=0.0) - y3
        logit = tl.load(logs + k) - 0.5 * inverse * tl.sum(
            d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3, axis=1
        )
        higher = tl.maximum(top, logit)
        keep, new = tl.exp(top - higher), tl.exp(logit - higher)
        total = total * keep + new
        keep, new = keep[:, None], (new * inverse)[:, None]
        s0, s1 = s0 * keep + new * d0, s1 * keep + new * d1
        s2, s3 = s2 * keep + new * d2, s3 * keep + new * d3
        top = higher
    scale = (1.0 / total)[:, None]
    return s0 * scale, s1 * scale, s2 * scale, s3 * scale


@triton.jit(do_not_specialize=["seed", "counter", "lane", "items", "steps"])
def chain_kernel(
    out,
    y,
    first,
    second,
    third,
    step,
    noise_scale,
    seed,
    counter,
    lane,
    items,
    numel,
    groups,
    tiles,
    steps,
    components,
    KIND: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    A: tl.constexpr,
    S: tl.constexpr,
    SEED: tl.constexpr,
    COUNTER: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Tile of ROWS chains x GROUPS groups; the four elements of a group are four blocks."""
    row, safe, tile = locate_rows(items, tiles, ROWS)
    group = (tile * GROUPS + tl.arange(0, GROUPS))[None, :]
    element = 4 * group + tl.zeros((ROWS, GROUPS), dtype=tl.int32)
    offset = safe.to(tl.int64)[:, None] * numel + element
    i0, i1, i2, i3 = element < numel, element + 1 < numel, element + 2 < numel, element + 3 < numel
    y0 = tl.load(y + offset, mask=i0, other=0.0).to(tl.float32)
    y1 = tl.load(y + offset + 1, mask=i1, other=0.0).to(tl.float32)
    y2 = tl.load(y + offset + 2, mask=i2, other=0.0).to(tl.float32)
    y3 = tl.load(y + offset + 3, mask=i3, other=0.0).to(tl.float32)
    a = per_row(step, safe[:, None], A, tl.float32)
    s = per_row(noise_scale, safe[:, None], S, tl.float32)
    key = per_row(seed, safe[:, None], SEED, tl.int64)
    position = per_row(counter, safe[:, None], COUNTER, tl.int64)
    noise_group = group + safe[:, None] * 0
    if SEED <= 0 and COUNTER <= 0:
        noise_group = group + safe[:, None] * groups
    if KIND == "gaussian":
        m0, m1 = parameter(first, element, i0, FIRST), parameter(first, element + 1, i1, FIRST)
        m2, m3 = parameter(first, element + 2, i2, FIRST), parameter(first, element + 3, i3, FIRST)
        q0, q1 = parameter(second, element, i0, SECOND), parameter(second, element + 1, i1, SECOND)
        q2 = parameter(second, element + 2, i2, SECOND)
        q3 = parameter(second, element + 3, i3, SECOND)
    for i in range(0, steps):
        z0, z1, z2, z3 = group_normals(key, position + i, lane, noise_group)
        if KIND == "gaussian":
            g0, g1, g2, g3 = q0 * (m0 - y0), q1 * (m1 - y1), q2 * (m2 - y2), q3 * (m3 - y3)
        elif KIND == "doublewell":
            g0, g1 = well(y0, first, second), well(y1, first, second)
            g2, g3 = well(y2, first, second), well(y3, first, second)
        else:
            g0, g1, g2, g3 = mixture_scores(
                y0, y1, y2, y3, first, second, third, group, numel, components, ROWS
            )
            # Lanes past the end stay at zero: they would enter the distances.
            z1, z2, z3 = tl.where(i1, z1, 0.0), tl.where(i2, z2, 0.0), tl.where(i3, z3, 0.0)
            z0 = tl.where(i0, z0, 0.0)
        y0, y1 = y0 + (a * g0 + s * z0), y1 + (a * g1 + s * z1)
        y2, y3 = y2 + (a * g2 + s * z2), y3 + (a * g3 + s * z3)
    valid = (row < items)[:, None]
    tl.store(out + offset, y0.to(out.dtype.element_ty), mask=valid & i0)
    tl.store(out + offset + 1, y1.to(out.dtype.element_ty), mask=valid & i1)
    tl.store(out + offset + 2, y2.to(out.dtype.element_ty), mask=valid & i2)
    tl.store(out + offset + 3, y3.to(out.dtype.element_ty), mask=valid & i3)


def _parameters(energy, y):
    """Return (kind, first, second, third, components) for the kernel."""

    def ready(value):
        if isinstance(value, torch.Tensor):
            return value.to(y.device, torch.float32).expand(y.shape[1:]).contiguous()
        return float(value)

    if isinstance(energy, Gaussian):
        return "gaussian", ready(energy.mean), ready(energy.precision), 0.0, 1
    if isinstance(energy, DoubleWell):
        return "doublewell", float(energy.height), float(energy.centre), 0.0, 1
    means = energy.means.to(y.device, torch.float32).contiguous()
    variances = energy.variances.to(y.device, torch.float32).contiguous()
    logs = (
        energy.weights.to(y.device).double().log() - 0.5 * means.shape[1] * variances.double().log()
    )
    return "mixture", means, variances, logs.float().contiguous(), len(means)


@on_device
def _kernel(y, energy, *, steps, a, s, seed, counter, stream, tile=None):
    """Launch, in place on the contiguous state y; tile = (rows, groups) for tests."""
    items, numel = len(y), y[:1].numel()
    kind, first, second, third, components = _parameters(energy, y)
    (a, A), (s, S) = (coefficient(value, items, y.device) for value in (a, s))
    groups = (numel + 3) // 4
    if tile is None:
        wide = triton.next_power_of_2(groups)
        wide = wide if kind == "mixture" else min(wide, 128)
        # Not by items: the order of a mixture's sums hangs on it. The interpreter has one order.
        rows = triton.next_power_of_2(items) if INTERPRETING else max(1, 128 // wide)
        tile = (rows, wide)
    tiles = -(-groups // tile[1])
    chain_kernel[(-(-items // tile[0]) * tiles,)](
        out=y,
        y=y,
        first=first,
        second=second,
        third=third,
        step=a,
        noise_scale=s,
        **key_arguments((seed, counter, stream), items, y.device),
        items=items,
        numel=numel,
        groups=groups,
        tiles=tiles,
        steps=steps,
        components=components,
        KIND=kind,
        FIRST=isinstance(first, torch.Tensor),
        SECOND=isinstance(second, torch.Tensor),
        A=A,
        S=S,
        ROWS=tile[0],
        GROUPS=tile[1],
        **launch_options(num_warps=max(1, min(8, tile[0] * tile[1] // 32))),
    )
    return y


@torch.no_grad()
def langevin_chain(
    y: Tensor,
    energy: Gaussian | Mixture | DoubleWell,
    *,
    steps: int,
    step: float | Tensor,
    noise_scale: float | Tensor | None = None,
    seed: int | Tensor,
    counter: int | Tensor = 0,
    stream: int = 0,
    out: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """Return the state after `steps` Langevin steps on a closed-form energy, like y (B, ...).

    No method uses this: tests and benchmarks do.

    Args:
        y: start, (B, ...); for a Mixture (B, D) with D <= 4096.
        energy: Gaussian, Mixture or DoubleWell.
        steps: number of steps, >= 0.
        step: a > 0, a number or (B,).
        noise_scale: s, a number or (B,); default sqrt(2 step).
        seed, counter, stream: as for langevin_step; step i draws at counter + i.
        out: where to write, y itself for in place; default a new tensor.
        exact: as for philox_normal.

    Raises:
        ValueError: for another energy, a negative number of steps, a mixture of another dimension.
    Reference: module docstring.
    """
    op = "langevin_chain"
    more = {"noise_scale": noise_scale, "seed": seed, "counter": counter}
    check_chain(op, y, {"out": out}, {"step": step}, **more)
    if not isinstance(energy, (Gaussian, Mixture, DoubleWell)):
        raise ValueError(
            f"{op}: energy must be Gaussian, Mixture or DoubleWell, got {energy!r}: "
            "genmodels.sampling.langevin takes any callable"
        )
    if steps < 0:
        raise ValueError(f"{op}: steps must be >= 0, got {steps}")
    numel = y[:1].numel()
    if isinstance(energy, Mixture) and (energy.means.shape[1] != numel or numel > 4096):
        raise ValueError(f"{op}: means must be (K, {numel}), got {tuple(energy.means.shape)}")
    kernel = use_triton(op, y, out) and y.numel() > 0
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    state = y.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)
    arguments = {
        "steps": steps,
        "a": step,
        "s": (2 * step) ** 0.5 if noise_scale is None else noise_scale,
        "seed": seed,
        "counter": counter,
        "stream": stream,
    }
    closed = () if isinstance(energy, Mixture) else tuple(vars(energy).values())
    if kernel:
        _kernel(state, energy, **arguments)
    elif (
        closed
        and not exact
        and y.numel() > 0
        and native.takes(op, (state,), (arguments["a"], arguments["s"], *closed))
    ):
        _native(state, energy, **arguments)
    else:
        _reference(state, energy, exact=exact, **arguments)
    return state.to(y.dtype) if out is None else out.copy_(state)
