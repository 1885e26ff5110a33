"""Feature extractors: uint8 images (N,C,H,W) in, rows (N,D) out, named and hashed.

A score is only comparable with another one when net, weights and preprocessing agree, so the three
travel together: `Features` carries its name, the sha256 of its weights and the name of its resize.
"""

import difflib
import hashlib
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from genmodels.metrics.grey_nets import DIGITS_SHA256, GREY_NETS, grey_net, weights_file

__all__ = ["DIGITS_SHA256", "FEATURES", "Features", "check_rows", "extract", "feature_rows"]
__all__ += ["load_features"]


@dataclass(frozen=True)
class Features:
    """A feature extractor: calling it with uint8 (B,C,H,W) returns float32 (B,D) rows.

    Args:
        name: what a report calls it.
        sha256: of the weights file; None where there are no weights.
        resize: name of the preprocessing; "none" = images are taken as they are.
        dim: D; None where it depends on the images.
        net: the callable behind it, uint8 (B,C,H,W) -> (B,D,...).
        shapes: the (C,H,W) it takes; () = any.
        device: where it computes.
        batch: images per call unless told otherwise: what suits the net's memory and speed.
    """

    name: str
    sha256: str | None
    resize: str
    dim: int | None
    net: Callable
    shapes: tuple = ()
    device: torch.device = torch.device("cpu")
    batch: int = 256

    @torch.no_grad()
    def __call__(self, images):
        """Return (B,D) float32 rows on `device`.

        Raises:
            ValueError: images that are not uint8 (B,C,H,W) or not of the size the net was made for;
                a net that does not give one row per image.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images must be uint8 of shape (B,C,H,W), got {images.dtype} of shape "
                f"{tuple(images.shape)}: convert to 0..255 first"
            )
        if self.shapes and tuple(images.shape[1:]) not in self.shapes:
            raise ValueError(
                f"features={self.name} takes images of shape (C,H,W) = "
                f"{' or '.join(map(str, self.shapes))}, got "
                f"{tuple(images.shape[1:])}: choose other features, for example features=pixels"
            )
        with _exact(self.device):
            rows = self.net(images.to(self.device))
        if not isinstance(rows, torch.Tensor) or rows.ndim < 2 or len(rows) != len(images):
            got = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
            raise ValueError(
                f"features={self.name} must return one row per image, (B,D), got {got} for "
                f"{len(images)} images: wrap the net so that it returns its features only"
            )
        return rows.flatten(1).float()


def _pixels(weights, device):
    """Return the pixels themselves as features: values in [0,1], flattened in (C,H,W) order."""
    if weights is not None:
        raise ValueError(f"features=pixels has no weights, got weights={weights}: leave it out")
    return Features("pixels", None, "none", None, lambda x: x.flatten(1).float() / 255, (), device)


def _grey(name, weights, device):
    """Return an in-tree net, from the shipped file or a copy of it."""
    spec = GREY_NETS[name]
    net = grey_net(name, _read(weights or weights_file(name)))
    shapes = tuple((1, side, side) for side in sorted({spec.side, spec.side + 2 * spec.pad}))
    resize = f"crop{spec.side}" if spec.pad else "none"
    net = net.eval().requires_grad_(False).to(device)
    # On a CPU a small batch stays in its cache: twice the speed of 256.
    batch = 32 if device.type == "cpu" else 1024
    return Features(name, spec.sha256, resize, spec.dim, net, shapes, device, batch)


def _file(path, device):
    """Return the TorchScript net in a file; its resize, if any, is inside the file."""
    sha256 = hashlib.sha256(_read(path)).hexdigest()
    try:
        with warnings.catch_warnings():
            # Deprecated in torch in favour of torch.export, but what published nets come as.
            warnings.simplefilter("ignore", FutureWarning)
            net = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"features={path} is not a TorchScript file: save the net with torch.jit.save "
            f"({str(error).splitlines()[0][:100]})"
        ) from None
    return Features(Path(path).stem, sha256, "in-file", None, net, (), device)


FEATURES = {name: partial(_grey, name) for name in GREY_NETS} | {"pixels": _pixels}


def load_features(name, weights=None, device="cpu"):
    """Return the feature extractor called `name`.

    Args:
        name: a key of FEATURES, or the path of a TorchScript file that maps uint8 (B,C,H,W) to
            (B,D). "pixels" = values in [0,1], flattened; "digits" (8x8), "fashion" and "mnist"
            (28x28, or padded to 32x32 and cropped back) = the in-tree nets on grey images.
        weights: a file to read the weights from in place of the shipped one; its hash must agree.
        device: where to compute.

    Raises:
        ValueError: unknown name, a missing file, not TorchScript, or weights with another sha256.
    """
    device = torch.device(device)
    if str(name) in FEATURES:
        return FEATURES[str(name)](weights, device)
    if Path(name).is_file():
        if weights is not None:
            raise ValueError(f"features={name} holds its weights: leave out weights={weights}")
        return _file(name, device)
    near = difflib.get_close_matches(str(name), FEATURES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"features must be one of {', '.join(FEATURES)} or an existing TorchScript file, "
        f"got {str(name)!r}{hint}"
    )


def feature_rows(features, images, batch=None):
    """Yield (B,D) float32 rows of uint8 images, block by block in their order, on the CPU.

    Every call of the net sees exactly `batch` images, the last one padded with black ones: the
    library then picks the same algorithm throughout, and a row does not depend on what else, or how
    much else, was scored with it.

    Args:
        features: what load_features returns.
        images: uint8 (N,C,H,W), or an iterable of such blocks of any length: they are joined and
            cut anew, so that no more than one block and one batch are held at a time.
        batch: images per call; None = features.batch.

    Raises:
        ValueError: no images, batch < 1, or what `features` refuses.
    """
    batch = features.batch if batch is None else batch
    if batch < 1:
        raise ValueError(f"batch must be >= 1, got {batch}")
    empty = True
    for part in _batches([images] if isinstance(images, torch.Tensor) else images, batch):
        padded = F.pad(part, (0,) * (2 * part.ndim - 1) + (batch - len(part),))
        yield features(padded)[: len(part)].cpu()
        empty = False
    if empty:
        raise ValueError("images must hold at least one image, got 0")


def _batches(blocks, batch):
    """Yield the images of the blocks, `batch` at a time; the last time what is left."""
    rest = None
    for block in blocks:
        if rest is not None and rest.shape[1:] != block.shape[1:]:
            raise ValueError(
                f"images must all have one shape, got {tuple(rest.shape[1:])} and "
                f"{tuple(block.shape[1:])}: resize or crop them first"
            )
        rest = block if rest is None or not len(rest) else torch.cat([rest, block])
        whole = len(rest) - len(rest) % batch
        yield from rest[:whole].split(batch) if whole else ()
        rest = rest[whole:]
    if rest is not None and len(rest):
        yield rest


def extract(features, images, batch=None):
    """Return (N,D) float32 rows of uint8 images (N,C,H,W), on the CPU; see feature_rows."""
    return torch.cat(list(feature_rows(features, images, batch)))


def check_rows(rows, name="features"):
    """Return rows as a float64 (N,D) tensor.

    Raises:
        ValueError: not two-dimensional, no column, or a NaN or infinite value among them.
    """
    rows = torch.as_tensor(rows).detach()
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name} must have shape (N,D) with D >= 1, got {tuple(rows.shape)}")
    rows = rows.double()
    bad = int((~rows.isfinite()).any(dim=1).sum())
    if bad:
        raise ValueError(
            f"{name} must be finite, got NaN or infinite values in {bad} of {len(rows)} rows: "
            "look at the images (or the feature net) that gave them"
        )
    return rows


@contextmanager
def _exact(device):
    """Compute in the net's own precision whatever the caller has set: no autocast, no TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _read(path):
    """Return the bytes of a file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"weights={path} cannot be read: {error.strerror}") from None
