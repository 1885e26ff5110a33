"""The loss of training images by their noise level, and a law of noise levels that suits it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PARTS = 10  # of the range of ln sigma that is trained
REACH = 2.5  # standard deviations of the training law to each side; tails are in the end parts
NARROWEST = 0.5  # range of ln sigma: names of three digits tell the parts apart


class LossByLevel:
    """Sums of the loss over images of like noise level, on their device; nothing waits for it.

    The range of ln sigma is cut into PARTS equal ones. Losses that are not finite do not count.

    Attributes:
        sums: float32 (2, PARTS) since the last read(): losses, images; None before the first.
        first, width: ln sigma where the parts begin, and how wide each is.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.first = self.width = 0.0

    def cut(self, one: float, other: float) -> None:
        """Cut the range between two sigmas, REACH standard deviations of the training law apart."""
        low, high = sorted((math.log(one), math.log(other)))
        reach = max(high - low, NARROWEST) / 2
        self.first, self.width = (low + high) / 2 - reach, 2 * reach / PARTS

    def add(self, sigma: Tensor, loss: Tensor) -> None:
        """Add the losses of images (B,) at their noise levels (B,); after cut()."""
        if self.sums is None:
            self.sums = torch.zeros(2, PARTS, device=loss.device)
        self.sums = self.sums.to(loss.device)
        part = ((sigma.detach().log() - self.first) / self.width).long().clamp(0, PARTS - 1)
        loss = loss.detach().float()[:, None]
        counts = (part[:, None] == torch.arange(PARTS, device=part.device)) & loss.isfinite()
        losses = torch.where(counts, loss, 0.0)
        self.sums += torch.stack([losses.sum(0), counts.sum(0)])

    def read(self) -> dict[str, float | None]:
        """Return {sigma in the middle of a part: mean loss} since the last call; waits for it.

        None where there was no image.
        """
        if self.sums is None:
            return {}
        losses, counts = self.sums.tolist()
        self.clear()
        middles = (math.exp(self.first + (k + 0.5) * self.width) for k in range(PARTS))
        rows = zip(middles, losses, counts)
        return {f"{sigma:.3g}": loss / count if count else None for sigma, loss, count in rows}

    def clear(self) -> None:
        """Begin anew."""
        if self.sums is not None:
            self.sums = torch.zeros_like(self.sums)

    def state(self) -> dict[str, Any]:
        """Return the sums as plain numbers."""
        return {} if self.sums is None else {"sums": self.sums.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what state() returned."""
        self.sums = torch.tensor(state["sums"]) if "sums" in state else None


def suggested_law(profile: Mapping[float, float]) -> tuple[float, float] | None:
    """Return (p_mean, p_std) of a law of noise levels that goes where training helps; or None.

    The mean and standard deviation of ln sigma under a density as high as the loss has fallen,

        p(ln sigma) ~ max(1 - L(sigma), 0).

    EDM's loss per element is 1 at every level before training. At low noise it stays there, for
    what is left to see of the noise is too little; at high noise too, for only the mean image can
    be told. EDM's own law was chosen for that shape by eye (figure 5a of the paper); this rule is
    ours. None: it falls by a hundredth at less than three levels.

    Args:
        profile: {sigma: loss per element}, sigma in equal steps of its logarithm.

    Reference: Karras et al. 2022, arXiv 2206.00364, section 5.
    """
    fallen = {math.log(sigma): max(1 - loss, 0.0) for sigma, loss in profile.items()}
    total = sum(fallen.values())
    if len(fallen) < 3 or sum(value >= 0.01 for value in fallen.values()) < 3:
        return None
    mean = sum(x * share for x, share in fallen.items()) / total
    variance = sum((x - mean) ** 2 * share for x, share in fallen.items()) / total
    return mean, math.sqrt(variance)
