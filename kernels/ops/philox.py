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

import torch

__all__ = ["philox", "philox_normal", "philox_uniform"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(key, c0, c1, c2, c3):
    """Return the four 32-bit words of Philox4x32-10 as int64 tensors in [0, 2^32).

    Args:
        key: int64 tensor (any shape that broadcasts) holding the 64-bit key.
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


def _words(shape, seed, step, stream, device):
    """Return (words, numel): four (B, groups) tensors of random words for B items of `shape`."""
    numel = math.prod(shape)
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(-1, 1)
    step = torch.as_tensor(step, dtype=torch.int64, device=device).reshape(-1, 1)
    group = torch.arange((numel + 3) // 4, dtype=torch.int64, device=device)
    stream = torch.full_like(group, stream)
    return philox(seed, group, step & _MASK, (step >> 32) & _MASK, stream), numel


def philox_uniform(shape, seed, step=0, *, stream=0, device=None):
    """Return uniforms in [0, 1) on a grid of 2^-24, float32 (B, *shape).

    Args:
        shape: shape of one item.
        seed: key of each item: an int, or int64 (B,).
        step: position of each item in its stream: an int, or int64 (B,); B = 1 if both are ints.
        stream: which of the independent streams under this key, 0 <= stream < 2^32.
        device: where to compute; the integers are the same everywhere.
    """
    words, numel = _words(shape, seed, step, stream, device)
    flat = torch.stack([(word >> 8).to(torch.float32) * 2**-24 for word in words], dim=-1)
    return flat.flatten(1)[:, :numel].reshape(-1, *shape)


def philox_normal(shape, seed, step=0, *, stream=0, device=None):
    """Return standard normals, float32 (B, *shape), by Box-Muller on pairs of words.

    u = (word + 1) 2^-32 in (0, 1] gives the radius sqrt(-2 ln u) <= 6.66, the next word the angle.
    Arguments as for philox_uniform.
    """
    (w0, w1, w2, w3), numel = _words(shape, seed, step, stream, device)
    normals = []
    for radius_word, angle_word in ((w0, w1), (w2, w3)):
        radius = ((radius_word.to(torch.float32) + 1) * 2**-32).log().mul(-2).sqrt()
        angle = angle_word.to(torch.float32) * (2 * math.pi * 2**-32)
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normals, dim=-1).flatten(1)[:, :numel].reshape(-1, *shape)
