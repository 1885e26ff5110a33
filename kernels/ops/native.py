"""The compiled C of native.c, where setup.py could build it: noise and steps on a CPU.

GENMODELS_KERNELS=native insists on it, torch does without it; see dispatch.py. The library lies
beside this file after `pip install`, editable or not. In a clone that was not installed, or where
there was no compiler, there is none, and the references do the work.
"""

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "LEVELS",
    "Number",
    "Task",
    "combine",
    "key_fields",
    "library",
    "opened",
    "run",
    "run_step",
    "takes",
    "use_native",
]

VERSION = 1  # of the structure below: as in native.c
LEVELS = ("plain", "avx2", "avx512")  # instruction sets; all give the same bits
OPS = (
    "normals",
    "uniforms",
    "planes",
    "langevin_step",
    "log",
    "ums",
    "dls",
    "DoubleWell",
    "Gaussian",
)
_WORK = 1 << 17  # numbers that are worth a thread of their own


class Number(ctypes.Structure):
    """One float32 for all items (stride 0) or one per item (stride 1)."""

    _fields_ = [("at", ctypes.c_void_p), ("stride", ctypes.c_int64)]


class Task(ctypes.Structure):
    """`task` of native.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("op", "threads", "items", "numel")),
        ("seed", ctypes.c_void_p),
        ("seed_stride", ctypes.c_int64),
        ("counter", ctypes.c_void_p),
        ("counter_stride", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("stream", "first", "serial")),
        *((name, ctypes.c_void_p) for name in ("out", "y", "grad", "tether", "known", "mask")),
        *((name, Number) for name in ("step", "noise", "pull", "clip")),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("flips", ctypes.c_void_p),
        ("steps", ctypes.c_int64),
        ("shape", Number),
        ("place", Number),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, or None where there is none of this version."""
    found = (opened(path) for path in sorted(Path(__file__).parent.glob("_native*.so")))
    return next((one for one in found if one is not None), None)


def opened(path: Path) -> ctypes.CDLL | None:
    """Return a compiled library, or None: built for another system, or from another version."""
    try:
        found = ctypes.CDLL(str(path))
        if found.genmodels_version() != VERSION:
            return None
    except (OSError, AttributeError):
        return None
    found.genmodels_run.argtypes = [ctypes.POINTER(Task), ctypes.c_int]
    found.genmodels_run.restype = None
    found.genmodels_combine.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    found.genmodels_combine.restype = None
    return found


def use_native(op: str, device: torch.device) -> bool:
    """Return whether native.c makes the numbers of `op` on this device.

    Raises:
        ValueError: GENMODELS_KERNELS=native where the library is missing.
    """
    mode = os.environ.get("GENMODELS_KERNELS", "auto")
    if mode == "native" and library() is None:
        raise ValueError(
            f"{op}: GENMODELS_KERNELS=native, but there is no compiled library: "
            "install a C compiler and run pip install again"
        )
    return mode in ("auto", "native") and device.type == "cpu" and library() is not None


def takes(
    op: str, tensors: Sequence[Tensor | None], numbers: Sequence[float | Tensor | None]
) -> bool:
    """Return whether native.c does a step: float32 throughout, and nothing needs a gradient.

    Args:
        op: name of the op, for the error message.
        tensors: states, of which the first tells the device; None is skipped.
        numbers: floats, or tensors of one or one per item, or None.
    """
    if not use_native(op, tensors[0].device):
        return False
    given = [x for x in (*tensors, *numbers) if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return False
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in given)


def run_step(
    op: str,
    y: Tensor,
    *,
    key: tuple[Any, Any, int],
    out: Tensor | None,
    numbers: dict[str, float | Tensor],
    steps: int = 1,
    **fields: Any,
) -> Tensor:
    """Return out after one step, or a chain of steps, of the contiguous float32 state y (B, ...).

    Args:
        op: of OPS.
        y: the state.
        key: (seed, counter, stream), as for the steps.
        out: where to write, or None for a new tensor.
        numbers: {field of Task: one number or one per item}.
        steps: of a chain, which works in place.
        fields: other fields of Task.
    """
    items, numel = len(y), y[:1].numel()
    seed, counter, stream = key
    several = any(isinstance(x, Tensor) and x.numel() > 1 for x in (seed, counter))
    groups = (numel + 3) // 4
    target = out if out is not None and out.is_contiguous() else torch.empty_like(y)
    owners: list[Any] = []
    for name, value in numbers.items():
        fields[name] = Number(*_address(value, torch.float32, items, owners))
    fields |= key_fields(seed, counter, stream, items, owners, serial=0 if several else groups)
    sizes = {"items": items, "numel": numel, "steps": steps}
    run(op, 4 * items * groups * steps, y=y, out=target, **sizes, **fields)
    return target if out is None or target is out else out.copy_(target)


def run(op: str, numbers: int, level: str | None = None, **fields: Any) -> None:
    """Do a task of native.c.

    Args:
        op: of OPS.
        numbers: how many it draws: few are not worth threads.
        level: of LEVELS, default the widest; less where the machine has less.
        fields: of Task; a tensor gives its address.
    """
    threads = max(1, min(torch.get_num_threads(), numbers // _WORK))
    fields = {n: v.data_ptr() if isinstance(v, Tensor) else v for n, v in fields.items()}
    task = Task(op=OPS.index(op), threads=threads, **fields)
    library().genmodels_run(ctypes.byref(task), LEVELS.index(level or LEVELS[-1]))


def _address(
    value: float | Tensor, dtype: torch.dtype, items: int, owners: list[Any]
) -> tuple[int, int]:
    """Return (address, stride) of a number or a tensor of one or `items`; owners keeps it alive."""
    if not isinstance(value, Tensor):
        owners.append((ctypes.c_float if dtype.is_floating_point else ctypes.c_int64)(value))
        return ctypes.addressof(owners[-1]), 0
    if value.dtype != dtype or not value.is_cpu or not value.is_contiguous():
        value = value.detach().to("cpu", dtype).contiguous()
    owners.append(value)
    return value.data_ptr(), int(value.numel() == items and items > 1)


def key_fields(
    seed: int | Tensor,
    counter: int | Tensor,
    stream: int,
    items: int,
    owners: list[Any],
    first: int = 0,
    serial: int = 0,
) -> dict[str, Any]:
    """Return a Task's fields for a key; item b's first group is first + b * serial."""
    fields = {"stream": stream, "first": first, "serial": serial}
    for name, value in (("seed", seed), ("counter", counter)):
        fields[name], fields[f"{name}_stride"] = _address(value, torch.int64, items, owners)
    return fields


def combine(planes: Tensor, out: Tensor) -> None:
    """Write normals into contiguous out, N groups of four, from planes (6, N): see native.c."""
    library().genmodels_combine(planes.data_ptr(), out.data_ptr(), planes.shape[1])
