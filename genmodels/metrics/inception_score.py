"""Inception score: how sure a classifier is of each image, and how varied its answers are.

    IS = exp E_x KL(p(y|x) || p(y)),  p(y) = E_x p(y|x)

It never looks at real images: a report should not rest on it.

Reference: Salimans et al. 2016, arXiv 1606.03498, section 4.
"""

import numpy as np
import torch

from genmodels.metrics.features import check_rows

__all__ = ["inception_score", "inception_scores"]


def inception_score(
    logits: torch.Tensor, splits: int = 10, seed: int = 2020
) -> tuple[float, float]:
    """Return (mean, standard deviation) of inception_scores, of which it has the arguments."""
    scores = inception_scores(logits, splits, seed)
    return float(np.mean(scores)), float(np.std(scores))


def inception_scores(logits: torch.Tensor, splits: int = 10, seed: int = 2020) -> list[float]:
    """Return the score of each of equal parts of the images.

    The images are shuffled first, as torch-fidelity 0.4 does it (numpy's RandomState): files come
    sorted by class. With few images in a part the score is too low; published figures have 5,000.

    Args:
        logits: (N,C) class scores before the softmax.
        splits: number of parts, <= N.
        seed: of the shuffle.

    Raises:
        ValueError: fewer images than parts, values that are not finite.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"metrics=is: needs at least {splits} images, got {len(logits)}")
    logits = check_rows(logits, "logits")
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    log_p = logits[order.to(logits.device)].log_softmax(dim=1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        marginal = part.exp().mean(dim=0).log()
        scores.append(float((part.exp() * (part - marginal)).sum(dim=1).mean().exp()))
    return scores
