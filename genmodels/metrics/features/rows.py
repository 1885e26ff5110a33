"""From images to rows: uint8 (N,C,H,W) in, float32 (N,D) out, block by block, named and hashed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Features:
    """A feature extractor: calling it with uint8 (B,C,H,W) returns float32 (B,D) rows.

    Any callable will do as `net`; give it a name, and the hash of what it was made of.

    Args:
        name: what a report calls it.
        sha256: of the weights file; None where there are no weights.
        resize: name of the preprocessing; "none" = images are taken as they are.
        dim: D; None where it depends on the images.
        net: the callable behind it, uint8 (B,C,H,W) -> (B,D,...), or -> {output: (B,D,...)}.
        shapes: the (C,H,W) it takes; () = any.
        device: where it computes.
        batch: images per call unless told otherwise: what suits the net's memory and speed.
        outputs: names of what `net` returns; the first are the rows that distances are made of.
        mode: "exact" (full precision, deterministic) or "fast" (TF32 allowed, half precision where
            the loader chose it).
        exact: in fast mode, the same features in exact mode.
        standard: published weights and preprocessing, so that the Frechet distance is FID itself.
    """

    name: str
    sha256: str | None
    resize: str
    dim: int | None
    net: Callable[[torch.Tensor], Any]
    shapes: tuple[tuple[int, ...], ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch: int = 256
    outputs: tuple[str, ...] = ("features",)
    mode: str = "exact"
    exact: "Features | None" = None
    standard: bool = False

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the first output, (B,D) float32 rows on `device`; raises as `all` does."""
        return self.all(images)[self.outputs[0]]

    @torch.no_grad()
    def all(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {output: (B,D) float32 rows on `device`} of one pass.

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
        with _arithmetic(self.device, exact=self.mode == "exact"):
            outputs = self.net(images.to(self.device))
        if not isinstance(outputs, dict):
            outputs = {self.outputs[0]: outputs}
        return {name: self._as_rows(outputs.get(name), len(images)) for name in self.outputs}

    def _as_rows(self, rows: Any, count: int) -> torch.Tensor:
        """Return an output of the net as float32 (count,D); ValueError if it is no such thing."""
        if not isinstance(rows, torch.Tensor) or rows.ndim < 2 or len(rows) != count:
            got = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
            raise ValueError(
                f"features={self.name} must return one row per image, (B,D), got {got} for "
                f"{count} images: wrap the net so that it returns its features only"
            )
        return rows.flatten(1).float()


def feature_rows(
    features: Features,
    images: torch.Tensor | Iterable[torch.Tensor],
    batch: int | None = None,
    outputs: Sequence[str] | None = None,
) -> Iterator[Any]:
    """Yield (B,D) float32 rows of uint8 images, block by block in their order, on the CPU.

    Every call of the net sees exactly `batch` images, the last one padded with black ones: the
    library then picks the same algorithm throughout, and a row does not depend on what else, or how
    much else, was scored with it.

    Args:
        features: what load_features returns.
        images: uint8 (N,C,H,W), or an iterable of such blocks of any length: they are joined and
            cut anew, so that no more than one block and one batch are held at a time.
        batch: images per call; None = features.batch.
        outputs: names out of features.outputs: yields {output: rows} of one pass instead.

    Raises:
        ValueError: no images, batch < 1, images of several shapes, NaN or infinite values among the
            rows, an output the net does not have, or what `features` refuses.
    """
    batch = features.batch if batch is None else batch
    if batch < 1:
        raise ValueError(f"batch must be >= 1, got {batch}")
    for name in outputs or ():
        if name not in features.outputs:
            raise ValueError(
                f"features={features.name} has no {name}, only {', '.join(features.outputs)}"
            )
    done = 0
    blocks = [images] if isinstance(images, torch.Tensor) else images
    for part in _rebatched(blocks, batch):
        padded = F.pad(part, (0,) * (2 * part.ndim - 1) + (batch - len(part),))
        rows = {name: rows[: len(part)].cpu() for name, rows in features.all(padded).items()}
        for name in outputs or features.outputs[:1]:
            check_rows(rows[name], f"features={features.name}: {name} of images from {done} on")
        yield {name: rows[name] for name in outputs} if outputs else rows[features.outputs[0]]
        done += len(part)
    if not done:
        raise ValueError("images must hold at least one image, got 0")


def _rebatched(blocks: Iterable[torch.Tensor], batch: int) -> Iterator[torch.Tensor]:
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


def extract(
    features: Features,
    images: torch.Tensor | Iterable[torch.Tensor],
    batch: int | None = None,
    outputs: Sequence[str] | None = None,
) -> Any:
    """Return (N,D) float32 rows of uint8 images, on the CPU, or {output: rows}: feature_rows's."""
    parts = list(feature_rows(features, images, batch, outputs))
    if outputs:
        return {name: torch.cat([part[name] for part in parts]) for name in outputs}
    return torch.cat(parts)


def mode_difference(features: Features, images: torch.Tensor, num: int = 256) -> float | None:
    """Return how far fast rows are from exact ones, relative to their spread; None in exact mode.

    |fast - exact| / |exact - mean of exact|, Frobenius norms, of the first `num` images (N,C,H,W).

    Raises:
        ValueError: what feature_rows refuses.
    """
    if features.exact is None:
        return None
    fast, exact = (extract(net, images[:num]).double() for net in (features, features.exact))
    spread = (exact - exact.mean(dim=0)).norm()
    return float((fast - exact).norm() / (spread if spread > 0 else exact.norm()))


def check_rows(rows: torch.Tensor, name: str = "features") -> torch.Tensor:
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
def _arithmetic(device: torch.device, exact: bool) -> Iterator[None]:
    """Compute in the net's own precision whatever the caller has set: no autocast.

    exact: no TF32 either, and the same algorithm each time.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if exact else "high")
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(benchmark=False, deterministic=exact, allow_tf32=not exact),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
