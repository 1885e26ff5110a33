"""What a benchmark case is.

A case holds variants of one computation, the bytes and operations it cannot do without, and a check
of ours against the formula in float64, made before anything is timed: the error is everywhere the
largest difference over the largest magnitude of the result, given the same random numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

__all__ = ["Case", "compiled_form", "error_of", "state"]


@dataclass
class Case:
    """One computation and the ways to do it.

    Attributes:
        name, size, dtype: how it is called in the table.
        variants: {"ours" | "eager" | "compile" | ...: function without arguments}.
        bytes, flops: least memory traffic and arithmetic, for the share of the roofline.
        error: function that returns ours' error, see above; tolerance: the largest accepted.
        graph: whether each variant is also timed as a CUDA graph, on a GPU.
    """

    name: str
    size: str
    dtype: str
    variants: dict[str, Callable]
    bytes: float = 0.0
    flops: float = 0.0
    error: Callable = field(default=lambda: 0.0)
    tolerance: float = 0.0
    graph: bool = True


def compiled_form(function, device):
    """torch.compile; on a CPU with the eager generator, whose in-graph one is ten times slower."""
    if device == "cpu":
        import torch._inductor.config as config

        config.fallback_random = True
    return torch.compile(function, dynamic=False)


def state(size, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(device, dtype)


def error_of(got, exact):
    return ((got.double() - exact.double()).abs().max() / exact.abs().max()).item()
