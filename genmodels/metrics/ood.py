"""Out-of-distribution detection: scores (higher = in-distribution) -> AUROC, AUPR, FPR95.

In-distribution is the positive class everywhere, so AUROC 1 = every in-distribution image scores
above every other one, 0.5 = no difference, below 0.5 = the wrong way round.

References: Hendrycks and Gimpel 2017, arXiv 1610.02136 (protocol); Du and Mordatch 2019, arXiv
1903.08689 (interpolations); Nalisnick et al. 2019, arXiv 1906.02994 (typicality).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from genmodels.images import OnDisk, from_uint8

__all__ = [
    "SYNTHETIC",
    "compare_sets",
    "first_images",
    "image_scores",
    "ood_metrics",
    "synthetic",
    "typicality",
]

SYNTHETIC = ("interpolation", "noise", "constant")


def ood_metrics(inside: ArrayLike, outside: ArrayLike) -> dict[str, float]:
    """Return {"auroc", "aupr", "fpr95"} of two sets of scores, higher = in-distribution.

    aupr is the average precision of in-distribution as the positive class (it depends on the ratio
    of the two counts); fpr95 the share of outside images accepted at the largest threshold that
    accepts at least 95 % of the inside ones.

    Args:
        inside: (N,) scores of in-distribution images.
        outside: (M,) scores of the others.

    Raises:
        ValueError: an empty set, or scores that are not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    inside, outside = (np.asarray(scores, np.float64).ravel() for scores in (inside, outside))
    for name, scores in (("inside", inside), ("outside", outside)):
        if not len(scores) or not np.isfinite(scores).all():
            raise ValueError(f"ood: the {name} scores must be finite and at least one")
    truth = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    scores = np.concatenate([inside, outside])
    accepted = int(np.ceil(0.95 * len(inside)))
    threshold = np.sort(inside)[len(inside) - accepted]
    return {
        "auroc": float(roc_auc_score(truth, scores)),
        "aupr": float(average_precision_score(truth, scores)),
        "fpr95": float((outside >= threshold).mean()),
    }


def typicality(scores: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    """Return -|score - median of the training scores|, like scores: high values can be odd too."""
    return -(scores - torch.as_tensor(train).median()).abs()


def synthetic(name: str, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return out-of-distribution images made from, or as many as, real ones, uint8 like them.

    Args:
        name: interpolation ((x_i + x_j) / 2 of two images), noise (uniform pixels) or constant (one
            random colour for each image).
        images: uint8 (N, C, H, W), N >= 2.
        seed: of the choice.

    Raises:
        ValueError: another name, or fewer than two images.
    """
    if name not in SYNTHETIC:
        raise ValueError(f"ood={name}: choose from {', '.join(SYNTHETIC)}")
    if len(images) < 2:
        raise ValueError(f"ood={name}: needs at least 2 images, got {len(images)}")
    generator = torch.Generator().manual_seed(seed)
    if name == "noise":
        return torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)
    if name == "constant":
        shape = (*images.shape[:2], 1, 1)
        colour = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return colour.expand(images.shape).contiguous()
    # A shift of a random order pairs every image with another one.
    order = torch.randperm(len(images), generator=generator)
    one, other = images[order].short(), images[order.roll(1)].short()
    return ((one + other + 1) // 2).to(torch.uint8)


def first_images(images: torch.Tensor | OnDisk, num: int) -> Any:
    """Return the first num of a tensor of images, or of OnDisk; all of them where num is 0."""
    return images[:num] if num else images


def image_scores(model: Any, images: torch.Tensor, batch: int = 64) -> dict[str, torch.Tensor]:
    """Return {name: float32 (N,)} on the CPU: model.ood_scores of uint8 images (N, C, H, W)."""
    parts = [model.ood_scores(from_uint8(part).to(model.device)) for part in images.split(batch)]
    return {name: torch.cat([part[name].detach().cpu() for part in parts]) for name in parts[0]}


def compare_sets(
    scores: dict[str, dict[str, torch.Tensor]], names: Iterable[str]
) -> dict[str, dict[str, float]]:
    """Return {"auroc_SET_SCORE": {"value": ...}, "aupr_...", "fpr95_..."} of every set and score.

    Args:
        scores: {"inside": ..., "train": ..., set: ...}, each what image_scores returns.
        names: the sets. To each score comes its typicality, SCORE_typicality.
    """
    entries = {}
    for name in names:
        for score, inside in scores["inside"].items():
            outside, train = scores[name][score], scores["train"][score]
            pairs = {
                score: (inside, outside),
                f"{score}_typicality": (typicality(inside, train), typicality(outside, train)),
            }
            for key, pair in pairs.items():
                for metric, value in ood_metrics(*pair).items():
                    entries[f"{metric}_{name}_{key}"] = {"value": value}
    return entries
