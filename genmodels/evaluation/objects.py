"""Scores as an object of torchmetrics, for anyone's loop: update, compute, reset."""

from collections.abc import Iterable
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from genmodels.distributed import alone
from genmodels.evaluation.passes import Scored
from genmodels.evaluation.scorer import Scorer, check_features, metrics_to_score, tables_to_keep
from genmodels.metrics.features import Features, extract, load_features


class ImageScores(Metric):
    """Scores of images that come in batches, against real ones that do so too.

    Only their features are kept, float32 (N,D), where the object is (`to(device)`); in several
    processes those of all are scored, whatever the share of each. The scores are the Scorer's.

    Args:
        metrics: names of METRICS, or words that ask for several; not those that need a data set's
            splits.
        features: a Features, or a name for load_features.
        weights, device, weights_are_code: of the feature network, where it is given by name.
        equal, resamples: as for Scorer.
        seed: of the resampled error bars.
        options: of torchmetrics.Metric.

    Raises:
        ValueError: an unknown metric, or one that these features or images alone cannot give.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    made: list[torch.Tensor]
    real: list[torch.Tensor]
    logits: list[torch.Tensor]

    def __init__(
        self,
        metrics: Iterable[str],
        features: Features | str,
        *,
        weights: str | None = None,
        weights_are_code: bool = False,
        device: torch.device | str = "cpu",
        equal: bool = False,
        resamples: int = 0,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__(**options)
        self.metrics = list(metrics)
        self.features = load_features(features, weights, device, weights_are_code=weights_are_code)
        self.equal, self.resamples, self.seed = equal, resamples, seed
        rows = metrics_to_score(self.metrics, equal)
        check_features(rows, self.features)
        for name, row in rows.items():
            if {"train", "held_out"} & set(row.needs):
                raise ValueError(
                    f"metrics={name}: needs a data set's training and held-out images; use Scorer"
                )
        self.with_logits = tables_to_keep(self.metrics, equal)[1]
        for state in ("made", "real", "logits"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, images: torch.Tensor, real: bool = False) -> None:
        """Take the features of a batch.

        Args:
            images: uint8 (B,C,H,W).
            real: they are of the reference.

        Raises:
            ValueError: what the features refuse.
        """
        first = self.features.outputs[0]
        outputs = (first, "logits") if self.with_logits and not real else (first,)
        found = extract(self.features, images, outputs=outputs)
        (self.real if real else self.made).append(found[first].to(self.device))
        if "logits" in found:
            self.logits.append(found["logits"].to(self.device))

    def compute(self) -> dict[str, torch.Tensor]:
        """Return {metric: score, metric_stderr: its standard error where there is one}, float64.

        Raises:
            ValueError: too few images on one of the sides.
        """
        for state, name in ((self.made, "images"), (self.real, "real images (real=True)")):
            if len(state) == 0:
                raise ValueError(f"there are no {name}: update with some first")
        made, real = dim_zero_cat(self.made).cpu(), dim_zero_cat(self.real).cpu()
        logits = dim_zero_cat(self.logits).cpu() if self.with_logits else None
        with alone():  # every process has all rows
            reference = Scored.of_rows(real, self.features)
            scorer = Scorer(
                self.metrics,
                self.features,
                reference=reference,
                equal=self.equal,
                resamples=self.resamples,
                num=len(made),
            )
            scores = scorer.of_rows(made, logits, self.seed)
        parts = {
            f"{name}{end}": entry[key]
            for name, entry in scores.items()
            for key, end in (("value", ""), ("stderr", "_stderr"))
            if entry.get(key) is not None
        }
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in parts.items()}
