"""Evaluation: scores of images and of models, read from many sources, in one report."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genmodels.evaluation.objects import ImageScores
    from genmodels.evaluation.scorer import Scorer

__all__ = ["ImageScores", "Scorer"]


def __getattr__(name: str) -> Any:
    # Each when it is asked for: ImageScores loads torchmetrics, which the commands do without.
    if name == "Scorer":
        from genmodels.evaluation.scorer import Scorer

        return Scorer
    if name == "ImageScores":
        from genmodels.evaluation.objects import ImageScores

        return ImageScores
    raise AttributeError(f"module 'genmodels.evaluation' has no attribute {name!r}")
