"""What tells training images from others: their number, their order and a sample of them."""

import hashlib
from collections.abc import Callable

import torch

from genmodels.config import DataConfig
from genmodels.images import OnDisk

SAMPLED = 256  # images, evenly spaced; a smaller set is read whole
NEW = "new"  # data.fingerprint=new: go on with other data


def fingerprint(pixels: torch.Tensor | OnDisk, labels: torch.Tensor) -> str:
    """Return "NUMBER-HASH" of the images of a split, in their order, with all their labels.

    Of files the bytes count, not the pixels, which another version of a decoder or another
    processor's resizing may round otherwise; points in the plane count by number and label alone.
    """

    def image_bytes(number: int) -> bytes:
        if isinstance(pixels, OnDisk) and pixels.raw is not None:
            return pixels.raw(int(pixels.numbers[number]))
        if pixels.is_floating_point():  # no latents: those are OnDisk with raw bytes
            return b""
        return pixels[number : number + 1].cpu().numpy().tobytes()

    return digest(len(labels), image_bytes, labels.cpu().numpy().tobytes())


def digest(count: int, item_bytes: Callable[[int], bytes], more: bytes = b"") -> str:
    """Return "NUMBER-HASH" of `count` items, of which up to SAMPLED are read, and of more bytes."""
    total = hashlib.sha256(more)
    for k in range(min(count, SAMPLED)):
        number = k * count // min(count, SAMPLED)
        total.update(hashlib.sha256(item_bytes(number)).digest())
    return f"{count}-{total.hexdigest()[:16]}"


def note_fingerprint(cfg: DataConfig, found: str) -> None:
    """Set cfg.fingerprint; it is there already where a run goes on.

    Raises:
        ValueError: the run was trained on other images.
    """
    if cfg.fingerprint not in ("", NEW, found):
        then, now = (text.partition("-")[0] for text in (cfg.fingerprint, found))
        change = "others, or in another order" if then == now else f"{now} images, not {then}"
        raise ValueError(
            f"data.fingerprint={cfg.fingerprint}: {cfg.name} at {cfg.root or 'its place'} holds "
            f"{change}: not what the run was trained on; put that back, or add "
            f"data.fingerprint={NEW} to go on with these"
        )
    cfg.fingerprint = found
