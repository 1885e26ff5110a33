"""Which implementation runs: the torch reference or the Triton kernel; and Triton where it exists.

GENMODELS_KERNELS=auto (default) takes Triton when every tensor is on a CUDA device, of a supported
dtype, and none of them needs a gradient; else the reference, in which compiled C makes the noise
of a CPU where there is such a library (native.py). torch always takes the reference alone; triton
insists on the kernel, native on the library, and says why when that cannot be.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .broadcast import over_items

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: everything imports, the references do the work.

    def _jit(function=None, **_):
        return function if function is not None else _jit

    triton = SimpleNamespace(jit=_jit)
    tl = SimpleNamespace(constexpr=lambda value=None: value)
    HAS_TRITON = False
else:
    HAS_TRITON = True

__all__ = [
    "FLOATS",
    "HAS_TRITON",
    "INTERPRETING",
    "arrange",
    "check_chain",
    "check_counter",
    "chunks",
    "coefficient",
    "column",
    "launch_options",
    "on_device",
    "tl",
    "triton",
    "use_triton",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 1 << 30  # elements of an item: kernels count them in 32 bits

# TRITON_INTERPRET=1, read when the kernels are defined, as Triton does.
INTERPRETING = HAS_TRITON and bool(triton.knobs.runtime.interpret)


# Tried in tests/kernels/test_compile.py, of which gfx1030 failed.
_AMD = ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
_NVIDIA = (7, 5)


@functools.cache
def _compiles(device: torch.device) -> bool:
    """Return whether Triton compiles the kernels for this GPU."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(_AMD)
    return torch.cuda.get_device_capability(device) >= _NVIDIA


def use_triton(
    op: str,
    *tensors: Tensor | None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    numbers: Sequence[Any] = (),
) -> bool:
    """Return whether `op` runs its Triton kernel on these tensors (None is skipped).

    Args:
        op: name of the op, for the error message.
        tensors: every tensor argument; integer, bool and float64 ones must be named in `dtypes`
            too if the kernel reads them.
        dtypes: dtypes that the kernel supports.
        numbers: arguments of any dtype and device, of which none may need a gradient.

    Raises:
        ValueError: for an unknown GENMODELS_KERNELS, or =triton where the kernel cannot run.
    """
    mode = os.environ.get("GENMODELS_KERNELS", "auto")
    if mode not in ("auto", "torch", "triton", "native"):
        raise ValueError(f"GENMODELS_KERNELS must be auto, torch, triton or native, got {mode!r}")
    if mode == "torch":
        return False
    tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
    numbers = [x for x in numbers if isinstance(x, torch.Tensor)]
    reason = None
    if not HAS_TRITON:
        reason = "triton is not installed"
    elif torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *numbers)):
        reason = "an input needs a gradient: detach it"
    elif bad := [tensor.dtype for tensor in tensors if tensor.dtype not in dtypes]:
        reason = f"the kernel does not take {bad[0]}"
    elif not INTERPRETING and not all(tensor.is_cuda for tensor in tensors):
        reason = "a tensor is not on a CUDA device (TRITON_INTERPRET=1 runs kernels on the CPU)"
    elif not INTERPRETING and not _compiles(next(x.device for x in tensors)):
        reason = "the kernels do not compile for this GPU"
    elif INTERPRETING and mode != "triton":
        return False  # the interpreter is for tests, which ask for it by name
    if mode == "triton" and reason:
        raise ValueError(f"{op}: GENMODELS_KERNELS=triton, but {reason}")
    return reason is None


def coefficient(
    value: float | Tensor, items: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[float | Tensor, int]:
    """Return (value or tensor, stride) of a per-item argument, ready for a kernel.

    stride -1: a plain number; 0: one number in device memory; 1: one per item.
    """
    if not isinstance(value, torch.Tensor):
        return float(value) if dtype.is_floating_point else value, -1
    value = value.detach().to(device=device, dtype=dtype).reshape(-1).contiguous()
    return value, int(value.numel() == items and items > 1)


def column(value: Any, part: slice, state: Tensor) -> Any:
    """Return a coefficient for the items `part` of a state, shaped to broadcast over them."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(device=state.device).reshape(-1)
    value = value[part] if value.numel() > 1 else value
    return over_items(value, state)


def _dense(x: Tensor) -> bool:
    """Return whether items follow one another in memory, each filling its part in some order."""
    expected = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:])):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return len(x) <= 1 or x.stride(0) == expected


def arrange(y: Tensor, *others: Tensor | None, ordered: bool) -> list[Tensor | None]:
    """Return y and others (None stays) in one memory layout, copying only what has another one.

    A kernel walks over memory, so the layout is free, channels last for one, as long as all
    tensors share it. Noise drawn in the kernel belongs to elements in logical order and asks for
    `ordered`: contiguous tensors.
    """
    if ordered or y.is_contiguous() or not _dense(y):
        return [x if x is None else x.contiguous() for x in (y, *others)]

    def same(x: Tensor | None) -> bool:
        return x is None or x.stride() == y.stride()

    return [x if same(x) else torch.empty_like(y, dtype=x.dtype).copy_(x) for x in (y, *others)]


def check_counter(
    op: str, name: str, counter: Tensor | None, items: int, device: torch.device
) -> None:
    """Raise ValueError unless `counter` is None or contiguous int32 (items,) on the device."""
    if counter is not None and (
        counter.dtype != torch.int32
        or counter.shape != (items,)
        or counter.device != device
        or not counter.is_contiguous()
    ):
        raise ValueError(
            f"{op}: {name} must be contiguous int32 ({items},) on {device}, got {counter.dtype} "
            f"{tuple(counter.shape)}, strides {counter.stride()}, on {counter.device}"
        )


def check_chain(
    op: str,
    y: Tensor,
    others: dict[str, Tensor | None],
    numbers: dict[str, Any],
    mask: Tensor | None = None,
    **per_item: Any,
) -> None:
    """Raise ValueError unless `others` look like y and `numbers` are positive and finite.

    Args:
        op: name of the op.
        y: the state (B, ...), a floating dtype, at most 2^30 elements per item.
        others: {name: tensor or None} that must have y's shape and device; "out" also y's dtype,
            and no input that needs a gradient beside it.
        numbers: {name: value or None}; tensors are not looked into (that would wait for a device).
        mask: bool or uint8, broadcastable to y, or None.
        per_item: further arguments that are one number or one per item of y.
    """
    if y.dim() == 0 or not y.is_floating_point():
        raise ValueError(f"{op}: y must be floating, (B, ...), got {y.dtype} {tuple(y.shape)}")
    if y[:1].numel() > _LARGEST:
        raise ValueError(f"{op}: an item of y may have 2^30 elements, got {y[:1].numel()}")
    for name, tensor in others.items():
        if tensor is not None and (tensor.shape != y.shape or tensor.device != y.device):
            raise ValueError(
                f"{op}: {name} must be like y, {tuple(y.shape)} on {y.device}, "
                f"got {tuple(tensor.shape)} on {tensor.device}"
            )
    out = others.get("out")
    if out is not None and out.dtype != y.dtype:
        raise ValueError(f"{op}: out must be like y, {y.dtype}, got {out.dtype}")
    given = [
        x
        for x in (y, *others.values(), *numbers.values(), *per_item.values())
        if isinstance(x, torch.Tensor)
    ]
    if out is not None and torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise ValueError(
            f"{op}: out= cannot be given where an input needs a gradient: "
            "drop out=, or detach the inputs"
        )
    for name, value in numbers.items():
        if isinstance(value, (int, float)) and not (0 < value < math.inf):
            raise ValueError(f"{op}: {name} must be > 0 and finite, got {value}")
    for name, value in {**numbers, **per_item}.items():
        if isinstance(value, torch.Tensor) and (
            value.dim() > 1 or value.numel() not in (1, len(y))
        ):
            raise ValueError(
                f"{op}: {name} must be a number or a tensor of one per item ({len(y)},), "
                f"got shape {tuple(value.shape)}"
            )
    if mask is not None and mask.dtype not in (torch.bool, torch.uint8):
        raise ValueError(f"{op}: mask must be bool or uint8, got {mask.dtype}: use mask > 0.5")
    if mask is not None and mask.device != y.device:
        raise ValueError(f"{op}: mask must be on {y.device}, got {mask.device}")


def chunks(items: int, numel: int, device: torch.device, limit: int = 1 << 18) -> Iterator[slice]:
    """Yield slices of items of about `limit` elements together: what a CPU's cache holds.

    On another device each slice costs some eighty launches: there only its memory is a bound.
    """
    rows = max(1, (limit if device.type == "cpu" else 1 << 26) // max(numel, 1))
    for first in range(0, items, rows):
        yield slice(first, min(first + rows, items))


def on_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Make a launcher run on its output's device: Triton launches on the current one.

    That is an argument that is a torch.device, else the device of the first tensor, the state.
    """

    @functools.wraps(launcher)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next((x for x in args if isinstance(x, torch.device)), None)
        if device is None:
            device = next(x.device for x in args if isinstance(x, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return launcher(*args, **kwargs)

    return run


def launch_options(**options: Any) -> dict[str, Any]:
    """Return compile options for a launch; contraction is fixed, so results do not move with it."""
    return {"enable_fp_fusion": True, **options}
