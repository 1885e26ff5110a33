"""Randomness: training image n as a function of (seed, n), generated image k of its seed alone."""

import operator
from collections.abc import Iterable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from genmodels.kernels.philox import philox, philox_uniform

# Held-out images are numbered from here, so that their noise never meets that of training.
HELD_OUT = 1 << 62


class Stream(IntEnum):
    """Who draws what; two draws with different streams never share a number."""

    ORDER = 0
    FLIP = 1
    SIGMA = 2
    NOISE = 3
    LABEL_DROP = 4
    AUGMENT = 5
    TORCH = 6
    PROBE = 7
    DEQUANTISE = 8
    IMAGE = 9
    SAMPLER = 10
    LEVEL = 11
    FAKE_ORDER = 12
    LATENT = 13
    CHAIN = 16  # Langevin noise; 17: its Metropolis decisions
    INITIALIZER = 18
    PAIR = 19  # and the smoothing noise of energy matching
    KNOWN = 20
    CHOICE = 21
    VIEW = 30
    VIEW_NOISE = 31
    SLOT = 32
    REINIT = 33
    CHAIN_START = 34
    CHAIN_NOISE = 35
    CUT = 36
    CUT_ROW = 37
    TURN = 38
    HIDDEN = 39
    AIS_BASE = 40
    AIS_CHAIN = 41  # 42: its Metropolis decisions
    AIS_REFINE = 43  # 44: likewise
    SOURCE = 45
    METROPOLIS = 46
    MEASURE = 47


def permutation(
    seed: int, index: int | Tensor, size: int, stream: Stream = Stream.ORDER, group: int = 0
) -> Tensor:
    """Return the index-th random order of range(size) under this seed, int64 (size,).

    Args:
        seed: whole number.
        index: whole number, or int64 (P,) for P orders at once, int64 (P, size).
        size: how many things are put in order.
        stream, group: which of the independent families of orders.
    """
    index = torch.as_tensor(index).unsqueeze(-1)
    words = philox(
        torch.tensor(seed),
        torch.arange(size),
        index,
        torch.tensor(group),
        torch.tensor(int(stream)),
    )
    return torch.argsort((words[0] << 31) | (words[1] >> 1), stable=True)


def uniform(seed: int | Tensor, n: Tensor, stream: Stream) -> Tensor:
    """Return one uniform in [0, 1) for each image index, float32 (B,); n is int64 (B,)."""
    return philox_uniform((), seed, n, stream=int(stream), device=n.device)


def signs(seed: Tensor, n: int | Tensor, count: int, shape: Sequence[int]) -> Tensor:
    """Return random signs, float32 (count, B, *shape), of images with seeds (B,) at index n."""
    u = philox_uniform((count, *shape), seed, n, stream=int(Stream.PROBE), device=seed.device)
    return (u >= 0.5).float().mul(2).sub(1).transpose(0, 1)


def image_seeds(seed: int, n: Tensor) -> Tensor:
    """Return one seed below 2^63 for each image index n, int64 (B,), a function of (seed, n)."""
    return keys(seed, n, Stream.IMAGE)


def torch_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of torch's own generator (dropout) for one micro-step on one rank."""
    words = philox(seed, rank, step & 0xFFFFFFFF, step >> 32, int(Stream.TORCH))  # plain ints
    return (words[0] << 31) | (words[1] >> 1)


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's own generators of the CPU and of this device.

    torch.manual_seed asks every kind of device, used or not, which takes a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def keys(seed: int, n: Tensor, stream: Stream) -> Tensor:
    """Return a key of its own for each image index, int64 (B,), to draw a whole chain with."""
    zero = torch.zeros_like(n)
    words = philox(zero + seed, n & 0xFFFFFFFF, n >> 32, zero, zero + int(stream))
    return (words[0] << 31) | (words[1] >> 1)


def checked_seeds(seeds: Iterable[int]) -> list[int]:
    """Return the seeds of images as a list.

    Raises:
        ValueError: one outside [0, 2^63), or no whole number.
    """
    try:
        seeds = [operator.index(seed) for seed in seeds]
    except TypeError:
        number = isinstance(seeds, int) and not isinstance(seeds, bool)
        remedy = f"one for each image; write range({seeds})" if number else "must be whole numbers"
        raise ValueError(f"seeds={seeds}: {remedy}") from None
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seeds={seed}: must be in [0, 2^63)")
    return seeds


class ImageGenerators:
    """One torch generator for each generated image: its noise does not depend on its neighbours.

    Args:
        seeds: one seed for each image; taken modulo 2^32, as EDM does.
        device: where the generators draw. "cpu" gives the same numbers on every machine; a GPU
            device reproduces seeds published for GPU runs.

    Raises:
        ValueError: no seed, or one outside [0, 2^63).
    """

    def __init__(self, seeds: Iterable[int], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.generators = [
            torch.Generator(self.device).manual_seed(seed % 2**32) for seed in checked_seeds(seeds)
        ]
        if not self.generators:
            raise ValueError("seeds=[]: give at least one whole number, one for each image")

    def randn(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return standard normals (N, *shape); generator k makes row k."""
        options = {"dtype": dtype, "device": self.device}
        rows = [torch.randn(shape, generator=g, **options) for g in self.generators]
        return torch.stack(rows).to(device or self.device)

    def randint(self, high: int, device: torch.device | str | None = None) -> Tensor:
        """Return integers in [0, high), int64 (N,)."""
        options = {"device": self.device}
        rows = [torch.randint(high, (), generator=g, **options) for g in self.generators]
        return torch.stack(rows).to(device or self.device)
