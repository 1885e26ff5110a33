"""What a benchmark case is.

A case holds variants of one computation, the bytes and operations it cannot do without, and a check
of ours against the formula in float64, made before anything is timed: the error is everywhere the
largest difference over the largest magnitude of the result, given the same random numbers.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from genmodels.kernels import native

__all__ = ["Case", "compiled_form", "error_of", "state", "ways"]


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


def ways(call, device):
    """Return {"ours": ...} and, on a CPU with the compiled library, the other ways of ours.

    Args:
        call: function of `exact`, the ops' keyword.
        device: "cuda" or "cpu".
    """
    variants = {"ours": lambda: call(exact=False)}
    if device == "cpu" and native.library() is not None:
        variants["ours, exact bits"] = lambda: call(exact=True)
        variants["ours, reference"] = lambda: _reference(call)
    return variants


def _reference(call):
    """Call without the compiled library."""
    mode = os.environ.get("GENMODELS_KERNELS")
    os.environ["GENMODELS_KERNELS"] = "torch"
    try:
        return call(exact=True)
    finally:
        if mode is None:
            del os.environ["GENMODELS_KERNELS"]
        else:
            os.environ["GENMODELS_KERNELS"] = mode


def state(size, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(device, dtype)


def error_of(got, exact):
    return ((got.double() - exact.double()).abs().max() / exact.abs().max()).item()
