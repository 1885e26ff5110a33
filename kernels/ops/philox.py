"""Counter-based random numbers: Philox4x32-10.

Formula (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
Ten rounds map a 128-bit counter (c0, c1, c2, c3) under a 64-bit key (k0, k1) to four words:

    (hi0, lo0) = 0xD2511F53 * c0        (hi1, lo1) = 0xCD9E8D57 * c2
    (c0, c1, c2, c3) <- (hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0)
    (k0, k1) <- (k0 + 0x9E3779B9, k1 + 0xBB67AE85)          all modulo 2^32

The meaning of key and counter in this package:

    key     = the seed of the chain, image or run (64 bit)
    counter = (group of four elements, step low word, step high word, stream)

so that a number depends on (seed, step, stream, element) and on nothing else: not on the batch it
was drawn in, the rank, the block size or the grid. Items never share a group; the tail is padded.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native
from .dispatch import chunks, column, on_device, tl, triton, use_triton
from .groups import interleave, key_arguments, launch_grid, locate, per_item

__all__ = [
    "by_items",
    "chain_normals",
    "chain_uniforms",
    "philox",
    "philox_normal",
    "philox_uniform",
]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_GROUPS = 1 << 15  # a CPU works on at a time: the temporaries stay in its cache


def philox(
    key: int | Tensor, c0: int | Tensor, c1: int | Tensor, c2: int | Tensor, c3: int | Tensor
) -> tuple[Any, Any, Any, Any]:
    """Return the four 32-bit words of Philox4x32-10 as int64 tensors in [0, 2^32).

    Args:
        key: int64 tensor (any shape that broadcasts) holding the 64-bit key; or, as the counter
            too, plain ints, which give plain ints.
        c0, c1, c2, c3: int64 tensors in [0, 2^32), the counter; broadcast with the key.

    Reference: Salmon et al. 2011, section 3.3 and table 2 (checked against its known answers).
    """
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        # The low 64 bits of the product are exact in wrapping int64; masks undo the sign.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _words(seed, step, stream, group):
    """Return four (B, G) tensors: the random words of groups (B or 1, G) under keys (B, 1).

    What `philox` computes, with fewer masks and in place: a low word is cut to 32 bits only where
    it becomes a factor, after two keys and a high word have been mixed in.
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0 = group.expand(len(seed), -1).clone()
    c1, c2 = (step & _MASK).expand_as(c0).clone(), ((step >> 32) & _MASK).expand_as(c0).clone()
    c3 = torch.full_like(c0, stream)
    high = torch.empty_like(c0)
    for _ in range(10):
        c0.mul_(_MULTIPLIERS[0])
        c2.mul_(_MULTIPLIERS[1])
        torch.bitwise_right_shift(c2, 32, out=high)
        c1.bitwise_xor_(high).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(c0, 32, out=high)
        c3.bitwise_xor_(high).bitwise_xor_(k1).bitwise_and_(_MASK)
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def _uniforms(words, out):
    """Write uniforms on a grid of 2^-24 into out (B, G, 4)."""
    for lane, word in enumerate(words):
        torch.mul(word.bitwise_right_shift_(8).to(torch.float32), 2**-24, out=out[..., lane])


def _normals(words, out):
    """Write normals by Box-Muller into out (B, G, 4)."""
    for lane, radius_word, angle_word in ((0, *words[:2]), (2, *words[2:])):
        radius = radius_word.to(torch.float32).add_(1).mul_(2**-32).log_().mul_(-2).sqrt_()
        angle = angle_word.to(torch.float32).mul_(2 * math.pi * 2**-32)
        torch.mul(radius, angle.cos(), out=out[..., lane])
        torch.mul(radius, angle.sin_(), out=out[..., lane + 1])


def _reference(convert, shape, seed, step, stream, device, chains=None):
    """Return float32 (B, *shape): words turned into numbers by `convert`, a chunk at a time.

    chains: (first, B) where item b continues, as number first + b, the groups of its forerunners;
        None where each item begins with group zero.
    """
    numel = math.prod(shape)
    groups = (numel + 3) // 4
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(-1, 1)
    step = torch.as_tensor(step, dtype=torch.int64, device=device).reshape(-1, 1)
    base = torch.zeros_like(seed)
    if chains is not None:
        base = torch.arange(chains[0], sum(chains), device=seed.device).reshape(-1, 1) * groups
    items = max(len(seed), len(step), len(base))
    seed, step, base = (x.expand(items, 1) for x in (seed, step, base))
    out = torch.empty(items, groups, 4, dtype=torch.float32, device=device)
    for rows, columns in _parts(items, groups, out.device):
        group = base[rows] + torch.arange(columns.start, columns.stop, device=seed.device)
        words = _words(seed[rows], step[rows], stream, group)
        convert(words, out[rows, columns])
    # Contiguous, as the library's: what torch makes of a strided view may differ in the last bit.
    return out.reshape(items, 4 * groups)[:, :numel].reshape(items, *shape).contiguous()


def _parts(items, groups, device):
    """Yield (items, groups), slices of the chunks that are worked on together."""
    limit = _GROUPS if device.type == "cpu" else _GROUPS << 9
    rows, columns = max(1, limit // max(groups, 1)), max(1, min(groups, limit))
    for row in range(0, items, rows):
        for first in range(0, groups, columns):
            last = min(first + columns, groups)
            yield slice(row, min(row + rows, items)), slice(first, last)


def _native(convert, shape, seed, step, stream, chains, exact):
    """Return _reference's result, made by native.c: normals to the bit with `exact`, else to 2e-6.

    Whole numbers, their scaling and products have one answer, and C makes them; logarithms, roots
    (torch's are not always the nearest float), cosines and sines are torch's own with `exact`,
    over the same chunks.
    """
    numel = math.prod(shape)
    groups = (numel + 3) // 4
    seed, step = (
        torch.as_tensor(x, dtype=torch.int64, device="cpu").reshape(-1) for x in (seed, step)
    )
    items = max(len(seed), len(step)) if chains is None else chains[1]
    seed.expand(items), step.expand(items)  # raise as the reference does
    first, serial = (0, 0) if chains is None else (chains[0] * groups, groups)
    if convert is _uniforms or not exact:
        owners, out = [], torch.empty(items, *shape)
        key = native.key_fields(seed, step, stream, items, owners, first, serial)
        op = "uniforms" if convert is _uniforms else "normals"
        native.run(op, 4 * items * groups, items=items, numel=numel, out=out, **key)
        return out
    out = torch.empty(items, groups, 4)
    for rows, columns in _parts(items, groups, out.device):
        part, owners = out[rows, columns], []
        here, width = part.shape[:2]
        room = torch.empty(6, here * width)
        keys = (x[rows] if len(x) > 1 else x for x in (seed, step))
        start = first + rows.start * serial + columns.start
        key = native.key_fields(*keys, stream, here, owners, start, serial)
        native.run("planes", 4 * here * width, items=here, numel=4 * width, out=room, **key)
        for radius, angle, cosine in ((0, 1, 4), (2, 3, 5)):
            room[radius].log_().mul_(-2).sqrt_()
            torch.cos(room[angle], out=room[cosine])
            room[angle].sin_()
        native.combine(room, part)
    # Contiguous, as the library's: what torch makes of a strided view may differ in the last bit.
    return out.reshape(items, 4 * groups)[:, :numel].reshape(items, *shape).contiguous()


def _numbers(convert, shape, seed, step, stream, device, *, exact=True, chains=None):
    """Return _reference's result by what there is for this device, kernels aside."""
    device = torch.empty(0, device=device).device
    if native.use_native("philox", device):
        return _native(convert, shape, seed, step, stream, chains, exact)
    return _reference(convert, shape, seed, step, stream, device, chains)


def _serial(chains, seed, counter, first):
    """Return `chains` for _reference: not None where one seed and one counter serve them all."""
    if any(isinstance(x, torch.Tensor) and x.numel() > 1 for x in (seed, counter)):
        return None
    return first, chains


def chain_normals(
    like: Tensor,
    seed: int | Tensor,
    counter: int | Tensor = 0,
    stream: int = 0,
    first: int = 0,
    exact: bool = True,
) -> Tensor:
    """Return the float32 normals that the step kernels draw for a state, of its shape (B, ...).

    With one seed per chain these are philox_normal(shape, seed, counter). With one seed AND one
    counter for all, chain b continues the groups of chain b - 1 (each padded to four).

    Args:
        like: the state, (B, ...).
        seed, counter: an int, or int64 of one number or (B,).
        stream: which stream under the key.
        first: number of the first chain of this part of the state.
        exact: as for philox_normal.
    """
    chains = _serial(len(like), seed, counter, first)
    arguments = (like.shape[1:], seed, counter, stream, like.device)
    return _numbers(_normals, *arguments, exact=exact, chains=chains)


def chain_uniforms(
    chains: int,
    seed: int | Tensor,
    counter: int | Tensor = 0,
    stream: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Return one uniform per chain, float32 (chains,); arguments as for chain_normals."""
    serial = _serial(chains, seed, counter, 0)
    return _numbers(_uniforms, (), seed, counter, stream, device, chains=serial).expand(chains)


def by_items(
    reference: Callable[..., Tensor],
    y: Tensor,
    *,
    key: tuple[Any, Any, int] | None,
    out: Tensor | None,
    exact: bool = True,
    **arguments: Any,
) -> Tensor:
    """Return reference(y, noise=z, **arguments) of a whole state, a few items at a time.

    A CPU's cache then holds the temporaries, noise included. With a gradient to compute it is one
    call. Tensors like y are cut by items; all others are numbers, or one number per item.

    Args:
        reference: function of the state, elementwise over items.
        y: the state, (B, ...).
        key: (seed, counter, stream) of the noise, or None to leave arguments["noise"] as it is.
        out: where to write, or None for a new tensor.
        exact: as for philox_normal.
    """
    tensors = [x for x in (y, *arguments.values()) if isinstance(x, torch.Tensor)]
    whole = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    out = torch.empty_like(y) if out is None else out
    parts = chunks(len(y), y[:1].numel(), y.device)
    for part in [slice(0, len(y))] if whole else parts:
        some = {
            name: x[part]
            if isinstance(x, torch.Tensor) and x.shape == y.shape
            else column(x, part, y)
            for name, x in arguments.items()
        }
        if key is not None:
            keys = [x[part] if isinstance(x, torch.Tensor) and x.numel() > 1 else x for x in key]
            some["noise"] = chain_normals(y[part], *keys, first=part.start, exact=exact)
        new = reference(y[part], **some)
        if whole:
            return new
        out[part] = new
    return out


@triton.jit
def unit_normals(word0, word1):
    """Two standard normals from two words, by the formula of philox_normal.

    The angle is reduced to an eighth of a turn in integers; sine and cosine are then least-maximum
    polynomials in its square (errors 1e-8 and 1e-9): exact to rounding, no table, no slow path.
    """
    uniform = (word0.to(tl.float32) + 1.0) * 2.3283064365386963e-10
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    quadrant = (word1 + 0x20000000) >> 30
    rest = (word1 - (quadrant << 30)).to(tl.int32, bitcast=True)
    angle = rest.to(tl.float32) * 1.4629180792671596e-09
    z = angle * angle
    sine = angle + angle * z * (-0.1666666467 + z * (0.008332748635 - z * 0.0001958794987))
    cosine = 1.0 + z * (-0.5 + z * (0.04166666466 + z * (-0.001388830334 + z * 2.454799131e-05)))
    odd = (quadrant & 1) != 0
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    first = tl.where(((quadrant + 1) & 2) != 0, -first, first)
    second = tl.where((quadrant & 2) != 0, -second, second)
    return radius * first, radius * second


@triton.jit
def random_words(seed, counter, stream, group):
    """Four words for each group; all arguments integer scalars or blocks that broadcast."""
    counter = counter.to(tl.int64)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    # The zero only broadcasts: tl.philox wants all four words in one shape.
    zero = (group.to(tl.uint32) + low) * 0
    c0 = group.to(tl.uint32) + zero
    return tl.philox(seed.to(tl.int64), c0, low + zero, high + zero, stream.to(tl.uint32) + zero)


@triton.jit
def group_normals(seed, counter, stream, group):
    """Four standard normals for each group."""
    word0, word1, word2, word3 = random_words(seed, counter, stream, group)
    normal0, normal1 = unit_normals(word0, word1)
    normal2, normal3 = unit_normals(word2, word3)
    return normal0, normal1, normal2, normal3


@triton.jit
def tile_normals(
    seed,
    counter,
    stream,
    item,
    group,
    groups,
    SEED: tl.constexpr,
    COUNTER: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The normals of a block that `locate` found; SEED and COUNTER are strides of per_item."""
    if SEED <= 0 and COUNTER <= 0:  # one stream for all: items follow one another in it
        group = group + item * groups
    key = per_item(seed, item, SEED)
    position = per_item(counter, item, COUNTER)
    a, b, c, d = group_normals(key, position, stream, group)
    return interleave(a, b, c, d, 4 * GROUPS)


@triton.jit(do_not_specialize=["seed", "counter", "lane", "items"])
def fill_kernel(
    out,
    seed,
    counter,
    lane,
    items,
    numel,
    groups,
    tiles,
    SEED: tl.constexpr,
    COUNTER: tl.constexpr,
    UNIFORM: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    item, group, _element, offset, mask = locate(
        items, numel, groups, tiles, GROUPS, ROW, PACKED, WIDE
    )
    if UNIFORM:
        w0, w1, w2, w3 = random_words(
            per_item(seed, item, SEED), per_item(counter, item, COUNTER), lane, group
        )
        words = interleave(w0, w1, w2, w3, 4 * GROUPS)
        values = (words >> 8).to(tl.float32) * 5.9604644775390625e-08
    else:
        values = tile_normals(seed, counter, lane, item, group, groups, SEED, COUNTER, GROUPS)
    tl.store(out + offset, values, mask=mask)


@on_device
def _kernel(uniform, shape, seed, step, stream, device, block=None):
    """Launch fill_kernel; arguments as for philox_normal."""
    sizes = [len(x.reshape(-1)) for x in (seed, step) if isinstance(x, torch.Tensor)]
    items, numel = max(sizes, default=1), math.prod(shape)
    out = torch.empty(items, *shape, dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out
    grid, arguments = launch_grid(items, numel, block)
    arguments |= key_arguments((seed, step, stream), items, device)
    fill_kernel[grid](out=out, UNIFORM=uniform, **arguments)
    return out


def _draw(uniform, shape, seed, step, stream, device, exact=True):
    if device is None:
        device = next((x.device for x in (seed, step) if isinstance(x, torch.Tensor)), None)
    probe = torch.empty(0, device=device)
    if use_triton("philox", probe):
        return _kernel(uniform, shape, seed, step, stream, probe.device)
    convert = _uniforms if uniform else _normals
    return _numbers(convert, shape, seed, step, stream, probe.device, exact=exact)


def philox_uniform(
    shape: Sequence[int],
    seed: int | Tensor,
    step: int | Tensor = 0,
    *,
    stream: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return uniforms in [0, 1) on a grid of 2^-24, float32 (B, *shape).

    Args:
        shape: shape of one item.
        seed: key of each item: an int, or int64 (B,).
        step: position of each item in its stream: an int, or int64 (B,); B = 1 if both are ints.
        stream: which of the independent streams under this key, 0 <= stream < 2^32.
        device: where to compute, default that of seed or step (the first that is a tensor);
            the integers are the same everywhere.
    """
    return _draw(True, tuple(shape), seed, step, stream, device)


def philox_normal(
    shape: Sequence[int],
    seed: int | Tensor,
    step: int | Tensor = 0,
    *,
    stream: int = 0,
    device: torch.device | str | None = None,
    exact: bool = True,
) -> Tensor:
    """Return standard normals, float32 (B, *shape), by Box-Muller on pairs of words.

    u = (word + 1) 2^-32 in (0, 1] gives the radius sqrt(-2 ln u) <= 6.66, the next word the angle.

    Args:
        shape, seed, step, stream, device: as for philox_uniform.
        exact: whether a CPU's bits must not depend on the compiled library being there; without,
            and with it, logarithms and cosines are the library's too: three to seven times as
            fast, within 2e-6.
    """
    return _draw(False, tuple(shape), seed, step, stream, device, exact)
