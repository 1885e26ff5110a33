"""Linear operators A that measure pictures, y = A x + noise, with what inverts them.

    mask:FILE      A x = m x, m = 1 where a pixel is known
    inpaint:PART   the same; PART is what is hidden: right, left, top, bottom, centre, or a share of
                   pixels, drawn once
    downsample:F   the mean of F x F pixels;  bicubic:F  torch's bicubic filter with antialiasing
    blur:STD       a Gaussian of STD pixels, circular: what leaves at one edge enters at the other
    grey           0.299 R + 0.587 G + 0.114 B

An operator has `A(x)`, `adjoint(y)` = A^T y and `pull(v, a)` = A^T (A A^T + a I)^+ v. At a = 0 that
is the pseudo-inverse A^+ v; with a > 0 it is the one thing that a posterior of Gaussian noise asks
for, because for prior N(m, r^2 I) and noise of standard deviation s

    E[x | y] = m + pull(y - A m, s^2 / r^2)

All take batches (B, C, H, W) in their dtype. Anybody's object works in their place, see
as_operator. The pseudo-inverse of a blur leaves out frequencies that come through below CUTOFF of
the strongest: float32 has no digits for them.

Reference: Penrose 1955 (pseudo-inverse); Hestenes and Stiefel 1952 (conjugate gradients).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from genmodels.config import check
from genmodels.kernels.philox import philox_uniform
from genmodels.seeding import Stream

__all__ = [
    "NAMES",
    "Blur",
    "Foreign",
    "Grey",
    "Mask",
    "Operator",
    "Resize",
    "Slanted",
    "as_operator",
    "named_operator",
]

CUTOFF = 1e-3  # of singular values, over the largest
LUMA = (0.299, 0.587, 0.114)  # Rec. 601, as Pillow's
NAMES = ("inpaint", "downsample", "bicubic", "blur", "grey", "mask")
PARTS = ("right", "left", "top", "bottom", "centre")


class Operator(Protocol):
    """What the samplers ask of A; see the module."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return A x."""

    def adjoint(self, y: Tensor) -> Tensor:
        """Return A^T y."""

    def pull(self, v: Tensor, a: float) -> Tensor:
        """Return A^T (A A^T + a I)^+ v."""


class Mask:
    """Known pixels; the others are measured as 0.

    Args:
        known: bool, broadcastable to (C, H, W).

    Raises:
        ValueError: other numbers, or no known pixel.
    """

    def __init__(self, known: Tensor) -> None:
        check(known.dtype == torch.bool, "known", known.dtype, "must be bool, True = known")
        check(known.any(), "known", "none", "all pixels are hidden; leave some")
        self.known = known

    def __call__(self, x: Tensor) -> Tensor:
        """Return A x, like x."""
        return x * self.known.to(x)

    adjoint = __call__

    def pull(self, v: Tensor, a: float) -> Tensor:
        """Return A^T (A A^T + a I)^+ v, like v."""
        return self(v) / (1 + a)


class Grey:
    """One channel of three."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return A x, (B, 1, H, W)."""
        return (x * self._weights(x)).sum(dim=1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        """Return A^T y, (B, 3, H, W)."""
        return y * self._weights(y)

    def pull(self, v: Tensor, a: float) -> Tensor:
        """Return A^T (A A^T + a I)^+ v, (B, 3, H, W)."""
        return self.adjoint(v) / (sum(w * w for w in LUMA) + a)

    def _weights(self, like: Tensor) -> Tensor:
        return like.new_tensor(LUMA).reshape(3, 1, 1)


class Resize:
    """A x = R x C^T: one matrix along the rows of pixels and one along the columns.

    Args:
        height, width: sides of x.
        factor: whole number that both are divided by.
        bicubic: a bicubic filter in place of the mean.

    Raises:
        ValueError: a factor that does not divide the sides.
    """

    def __init__(self, height: int, width: int, factor: int, bicubic: bool = False) -> None:
        name = "bicubic" if bicubic else "downsample"
        check(
            factor >= 1 and height % factor == width % factor == 0,
            "operator",
            f"{name}:{factor}",
            f"{factor} must divide the sides {height} x {width}",
        )
        self.rows, self.columns = (_shrink(n, factor, bicubic) for n in (height, width))
        self.row_parts, self.column_parts = (
            torch.linalg.svd(m, full_matrices=False) for m in (self.rows, self.columns)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return A x, (B, C, H / factor, W / factor)."""
        return self.rows.to(x) @ x @ self.columns.to(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        """Return A^T y, (B, C, H, W)."""
        return self.rows.to(y).T @ y @ self.columns.to(y)

    def pull(self, v: Tensor, a: float) -> Tensor:
        """Return A^T (A A^T + a I)^+ v, (B, C, H, W), by the singular values of R and C."""
        (u_r, s_r, vt_r), (u_c, s_c, vt_c) = (
            tuple(part.to(v) for part in parts) for parts in (self.row_parts, self.column_parts)
        )
        gain = _filter(s_r[:, None] * s_c, a)
        return vt_r.T @ (gain * (u_r.T @ v @ u_c)) @ vt_c


class Blur:
    """Circular convolution with one kernel for all channels.

    Args:
        kernel: (k, l), odd sides; its middle is where a pixel stays. What is larger than the
            picture goes round it.
        height, width: sides of x.

    Raises:
        ValueError: a kernel of even sides.
    """

    def __init__(self, kernel: Tensor, height: int, width: int) -> None:
        k, m = kernel.shape
        check(k % 2 == m % 2 == 1, "kernel", f"{k} x {m}", "must have odd sides")
        rows = (torch.arange(k) - k // 2).remainder(height)[:, None]
        columns = (torch.arange(m) - m // 2).remainder(width)
        wide = torch.zeros(height, width, dtype=torch.float64)
        wide.index_put_((rows, columns), kernel.double(), accumulate=True)
        self.size = height, width
        self.response = torch.fft.rfft2(wide)

    @classmethod
    def gaussian(cls, std: float, height: int, width: int) -> "Blur":
        """Return the blur of a Gaussian of this standard deviation in pixels, cut off at 4 std."""
        radius = math.ceil(4 * std)
        t = torch.arange(-radius, radius + 1, dtype=torch.float64)
        line = (-(t**2) / (2 * std**2)).exp()
        kernel = line[:, None] * line
        return cls(kernel / kernel.sum(), height, width)

    def __call__(self, x: Tensor) -> Tensor:
        """Return A x, like x."""
        return self._through(x, self._response(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """Return A^T y, like y."""
        return self._through(y, self._response(y).conj())

    def pull(self, v: Tensor, a: float) -> Tensor:
        """Return A^T (A A^T + a I)^+ v, like v."""
        h = self._response(v)
        size = h.abs()
        # _filter is s / (s^2 + a); the phase of h goes with it.
        phase = h.conj() / size.clamp(min=torch.finfo(size.dtype).tiny)
        return self._through(v, phase * _filter(size, a))

    def _response(self, like: Tensor) -> Tensor:
        kind = torch.complex128 if like.dtype == torch.float64 else torch.complex64
        return self.response.to(like.device, kind)

    def _through(self, x: Tensor, response: Tensor) -> Tensor:
        return torch.fft.irfft2(response * torch.fft.rfft2(x), s=self.size)


class Foreign:
    """Somebody's A and A^T; the rest is done by conjugate gradients.

    Args:
        forward, transposed: functions of float32 batches.
        dagger: function y -> A^+ y where there is one.
        steps: of conjugate gradients, at most.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        transposed: Callable[[Tensor], Tensor],
        dagger: Callable[[Tensor], Tensor] | None = None,
        steps: int = 100,
    ) -> None:
        self.forward, self.transposed, self.dagger, self.steps = forward, transposed, dagger, steps

    def __call__(self, x: Tensor) -> Tensor:
        """Return A x."""
        return self.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Return A^T y."""
        return self.transposed(y)

    def pull(self, v: Tensor, a: float) -> Tensor:
        """Return A^T (A A^T + a I)^+ v."""
        if not a and self.dagger is not None:
            return self.dagger(v)
        return self.adjoint(solved(lambda u: self(self.adjoint(u)) + a * u, v, self.steps))


class Slanted(Foreign):
    """B = A G with G a diagonal, as a nonlinear map before A is near one point.

    Args:
        operator: A.
        slope: the diagonal, like x.
    """

    def __init__(self, operator: Operator, slope: Tensor) -> None:
        super().__init__(lambda x: operator(slope * x), lambda y: slope * operator.adjoint(y))


def solved(matrix: Callable[[Tensor], Tensor], v: Tensor, steps: int) -> Tensor:
    """Return M^+ v by conjugate gradients, each item of the batch by itself.

    Args:
        matrix: u -> M u, symmetric, no negative eigenvalue; v must lie in its range.
        v: (B, ...).
        steps: at most; it ends where all residuals are below 1e-6 of v (float64: 1e-12).
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(dim=1).reshape(-1, *[1] * (v.dim() - 1))

    u, r = torch.zeros_like(v), v
    p, square = r, dot(r, r)
    small = square * (1e-24 if v.dtype == torch.float64 else 1e-12)
    for _ in range(steps):
        if (square <= small).all():
            break
        image = matrix(p)
        curve = dot(p, image)
        moving = (square > small) & (curve > 0)
        length = torch.where(moving, square / torch.where(moving, curve, 1), 0)
        u, r = u + length * p, r - length * image
        after = dot(r, r)
        p = r + torch.where(moving, after / torch.where(moving, square, 1), 0) * p
        square = torch.where(moving, after, 0 * square)
    return u


def as_operator(
    operator: Any, shape: Sequence[int], device: torch.device | str = "cpu"
) -> Operator:
    """Return anybody's operator as one of these, looked at on a random picture.

    Args:
        operator: one of the classes here; or an object with `__call__` and `adjoint`; or deepinv's
            linear physics, with `A`, `A_adjoint` and `A_dagger`, whose own noise is left out.
        shape: (C, H, W) of the pictures.
        device: where they are.

    Raises:
        ValueError: neither, or A 0 is not 0, or <A x, y> is not <x, A^T y>.
    """
    if callable(getattr(operator, "A", None)) and callable(getattr(operator, "A_adjoint", None)):
        dagger = getattr(operator, "A_dagger", None)
        found: Operator = Foreign(operator.A, operator.A_adjoint, dagger)
    elif callable(getattr(operator, "pull", None)):
        found = operator
    else:
        has = callable(operator) and callable(getattr(operator, "adjoint", None))
        check(
            has,
            "operator",
            type(operator).__name__,
            "needs __call__ and adjoint, or A and A_adjoint as deepinv's linear physics",
        )
        found = Foreign(operator, operator.adjoint)
    keys = torch.zeros(1, dtype=torch.int64, device=device)
    x = philox_uniform(tuple(shape), keys, 0, stream=int(Stream.MEASURE), device=keys.device)
    name = type(operator).__name__
    with torch.no_grad():
        try:
            y = found(x)
            zero = found(torch.zeros_like(x))
            back = found.adjoint(y)
        except RuntimeError as error:  # of another size, mostly
            why = str(error).splitlines()[0]
            raise ValueError(
                f"operator={name}: does not measure pictures {tuple(shape)} ({why})"
            ) from None
        check(not zero.any(), "operator", name, "is not linear: A 0 must be 0")
    sizes = f"its adjoint makes {tuple(back.shape[1:])} of {tuple(shape)}"
    check(tuple(back.shape) == tuple(x.shape), "operator", name, sizes)
    ends = float((y.double() ** 2).sum()), float((x.double() * back.double()).sum())
    close = math.isclose(*ends, rel_tol=1e-3, abs_tol=1e-6)
    check(
        close,
        "operator",
        name,
        f"its adjoint is none: <A x, A x> = {ends[0]:.6g} and <x, A^T A x> = {ends[1]:.6g}",
    )
    return found


def named_operator(text: str, shape: Sequence[int], known: Tensor | None = None) -> Operator:
    """Return the operator of a word: NAME or NAME:VALUE, see the module.

    Args:
        text: the word.
        shape: (C, H, W) of the pictures.
        known: of mask:FILE, what the file says: bool (C, H, W).

    Raises:
        ValueError: another word, or one that does not go with the shape.
    """
    name, colon, value = text.partition(":")
    check(name in NAMES, "operator", text, f"choose from {', '.join(NAMES)}")
    channels, height, width = shape
    if name == "mask":
        check(known is not None, "operator", text, "name the file: mask:FILE")
    if name == "inpaint":
        known = _known_part(value if colon else "right", text, height, width)
    if known is not None:
        check(known.any(), "operator", text, "hides all pixels; leave some")
        return Mask(known)
    if name == "grey":
        check(not colon, "operator", text, "takes no value; write grey")
        check(channels == 3, "operator", text, f"is for colour; the model has {channels} channels")
        return Grey()
    if name == "blur":
        std = _number(value if colon else "2", text)
        check(0 < std <= max(height, width), "operator", text, "blur in pixels, > 0; blur:2")
        return Blur.gaussian(std, height, width)
    factor = _number(value if colon else "4", text)
    check(factor == int(factor), "operator", text, f"must be a whole number; {name}:4")
    return Resize(height, width, int(factor), bicubic=name == "bicubic")


def _number(value: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    check(math.isfinite(number), "operator", text, f"{value!r} is no number")
    return number


def _known_part(part: str, text: str, height: int, width: int) -> Tensor:
    """Return which pixels are known where this part is hidden, bool (1, H, W)."""
    known = torch.ones(1, height, width, dtype=torch.bool)
    if part not in PARTS:
        try:
            share = float(part)
        except ValueError:
            share = math.nan
        check(
            0 < share < 1,
            "operator",
            text,
            f"hides one of {', '.join(PARTS)}, or a share of pixels in (0, 1)",
        )
        key = torch.zeros(1, dtype=torch.int64)
        u = philox_uniform((1, height, width), key, 1, stream=int(Stream.MEASURE), device="cpu")
        return u[0] >= share
    hidden = {
        "right": (slice(None), slice(width // 2, None)),
        "left": (slice(None), slice(None, width // 2)),
        "top": (slice(None, height // 2), slice(None)),
        "bottom": (slice(height // 2, None), slice(None)),
        "centre": (
            slice(height // 4, height - height // 4),
            slice(width // 4, width - width // 4),
        ),
    }[part]
    known[0][hidden] = False
    return known


def _shrink(size: int, factor: int, bicubic: bool) -> Tensor:
    """Return the matrix (size / factor, size) that shrinks one axis, float64."""
    if not bicubic:
        return torch.eye(size // factor, dtype=torch.float64).repeat_interleave(factor, 1) / factor
    # Of the unit matrix as a picture, shrunk along one side alone.
    unit = torch.eye(size, dtype=torch.float64)[None, None]
    small = functional.interpolate(unit, (size // factor, size), mode="bicubic", antialias=True)
    return small[0, 0]


def _filter(s: Tensor, a: float) -> Tensor:
    """Return s / (s^2 + a) of singular values s >= 0; at a = 0 nothing of those below CUTOFF."""
    if a:
        return s / (s**2 + a)
    kept = s > CUTOFF * s.max()
    return torch.where(kept, 1 / torch.where(kept, s, 1), 0)
