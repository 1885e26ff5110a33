"""Batches of anybody's training loop, brought to the form that a method's loss works on.

The package's own data module hands over finished batches and is not looked at.
"""

import difflib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genmodels.config import check

if TYPE_CHECKING:
    from genmodels.methods.base import GenerativeModule

KEYS = ("image", "label", "n", "level", "target", "source")  # what the methods here read
FAR = 32.0  # no image on [-1, 1], no latent and no standard normal lies so far out


class OwnLoop:
    """What a model remembers of the batches of somebody's own loop.

    Attributes:
        steps: training batches up to now.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._looked = False  # at the pixels, once
        self._first: Tensor | None = None  # positions in the first training batch
        self._warned = False

    def batch(self, model: "GenerativeModule", batch: Any) -> dict[str, Tensor]:
        """Return {"image", "label", "n", ...} of a batch; see GenerativeModule.as_batch."""
        found = _named(batch)
        x = found["image"]
        _check_image(model, x)
        if not self._looked:
            self._look_at_pixels(x)
        found["label"] = _labels(model, found.get("label"), x)
        if "n" in found:
            _check_positions(found["n"], x)
            if model.training:
                self._watch(found["n"])
        else:
            # Of torch's generator, so that seed_everything, or a Trainer's step, decides.
            found["n"] = torch.randint(2**62, (len(x),), device=x.device)
        self.steps += model.training
        return found

    def _look_at_pixels(self, x: Tensor) -> None:
        """Refuse pixels on 0..255, warn of those on 0..1; it waits for the device, once."""
        self._looked = True
        low, high = (float(value) for value in x.detach().aminmax())
        check(
            max(-low, high) <= FAR or low != low,
            "image",
            f"{low:g}..{high:g}",
            "pixels are expected on [-1, 1]; scale them, of bytes x / 127.5 - 1",
        )
        if low >= 0 and 0.5 < high <= 1 and x.numel() > 100:
            warnings.warn(
                f"image={low:g}..{high:g}: pixels are expected on [-1, 1] and these lie on [0, 1]; "
                "scale them, 2 x - 1",
                stacklevel=5,
            )

    def _watch(self, n: Tensor) -> None:
        """Warn once of positions that come again: they bring the same noise with them."""
        if self._warned or n.device.type != "cpu":
            return
        if self._first is None:
            self._first = n.clone()
        elif torch.isin(self._first, n).any():
            self._warned = True
            warnings.warn(
                "n: the batch holds positions that were there before, and all that is random "
                "about an image (noise, noise level) is a function of its n: it would see the "
                "same noise every time; leave n out, or count images through all epochs",
                stacklevel=5,
            )


def _named(batch: Any) -> dict[str, Tensor]:
    """Return a batch as a dict."""
    if isinstance(batch, Mapping):
        check("image" in batch, "batch", list(batch), 'has no "image"; write {"image": x}')
        missing = [key for key in KEYS if key not in batch]
        for key in batch:  # others are for methods of somebody's own
            meant = [] if key in KEYS else difflib.get_close_matches(str(key), missing, 1)
            hint = f'has "{key}"; did you mean "{meant[0]}"?' if meant else ""
            check(not meant, "batch", list(batch), hint)
        return dict(batch)
    if isinstance(batch, Tensor):
        return {"image": batch}
    if isinstance(batch, Sequence) and 1 <= len(batch) <= 2:
        return dict(zip(("image", "label"), batch))
    raise ValueError(
        f"batch={type(batch).__name__}: write images x, (x, labels) or "
        '{"image": x, "label": labels}'
    )


def _check_image(model: "GenerativeModule", x: Any) -> None:
    """Raise ValueError for what is no float image of the model's shape."""
    check(isinstance(x, Tensor), "image", type(x).__name__, "must be a tensor, float32 (B,C,H,W)")
    check(
        x.is_floating_point(),
        "image",
        x.dtype,
        "must be float32 on [-1, 1]; of bytes x.float() / 127.5 - 1",
    )
    shape = model.shape[:1] if model.ANY_SIZE else model.shape
    fits = x.ndim == 4 and tuple(x.shape[1:])[: len(shape)] == tuple(shape)
    wanted = ",".join(map(str, model.shape))
    check(fits, "image", tuple(x.shape), f"must be (B,{wanted}), as data.shape says")


def _check_positions(n: Any, x: Tensor) -> None:
    """Raise ValueError for an "n" that is no position for each image."""
    fits = isinstance(n, Tensor) and n.dtype == torch.int64 and n.shape == x.shape[:1]
    shown = (n.dtype, tuple(n.shape)) if isinstance(n, Tensor) else type(n).__name__
    check(fits, "n", shown, f"must be a tensor, int64 ({len(x)},), a position for each image")


def _labels(model: "GenerativeModule", labels: Any, x: Tensor) -> Tensor:
    """Return labels as int64 (B,), -1 where there are none."""
    if labels is None:
        remedy = "this model learns with a class for each image; write (x, labels)"
        # A method that finds clusters reads classes for its logs alone.
        check(model.unlabelled or model.CLUSTERS, "label", None, remedy)
        return torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    fits = isinstance(labels, Tensor) and not labels.is_floating_point()
    fits = fits and labels.shape == x.shape[:1]
    shown = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
    check(fits, "label", shown, f"must be whole numbers, ({len(x)},), the class of each image")
    # To look at those of a device would wait for it at every step.
    if model.classes and not model.CLUSTERS and labels.device.type == "cpu" and len(labels):
        least, most = (int(value) for value in labels.aminmax())
        known = f"the model's classes are 0 to {model.classes - 1}; -1 is none"
        check(least >= -1 and most < model.classes, "label", f"{least}..{most}", known)
    return labels.long()
