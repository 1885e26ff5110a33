"""Scores of a model in training: on the way, to choose one of many, and the final ones."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from genmodels import distributed, generation, seeding
from genmodels.checkpoint.inert_pickle import load_arrays
from genmodels.config import Config, EvalConfig, check
from genmodels.data import ImageDataModule
from genmodels.evaluation import scorer
from genmodels.evaluation.references import open_reference
from genmodels.metrics.features import Features, load_features
from genmodels.training.pool import load_shards, make_shards

CHOOSING_SEEDS, SEEDS = 1 << 31, 1 << 22  # where the seeds of choices begin; for each cfg.seed
# Keys in the words of the evaluation that are settings of eval here.
OURS = re.compile(r"(?<![\w.])(?=(features|weights|weights_are_code|metrics|num)(=| must))")
BATCH = 256  # images at a time, and in a file that one process makes; changes no image


def eval_features(cfg: EvalConfig, device: torch.device | str = "cpu") -> Features:
    """Return the features of eval.features; see load_features.

    Raises:
        ValueError: what load_features raises, its keys with eval. before them.
    """
    with said_of_eval():
        return load_features(
            cfg.features, cfg.weights or None, device, weights_are_code=cfg.weights_are_code
        )


@contextmanager
def said_of_eval() -> Iterator[None]:
    """Put eval. before the keys of the errors within."""
    try:
        yield
    except ValueError as error:
        raise ValueError(OURS.sub("eval.", str(error))) from None


def make_scorer(
    cfg: EvalConfig, data: ImageDataModule, split: str = "train", **options: Any
) -> scorer.Scorer:
    """Return the Scorer of eval.* against the images of a split of the run's data.

    Args:
        cfg: which metrics and features.
        data: the training and the held-out images.
        split: "train" or "held_out"; eval.reference takes their place.
        options: of Scorer; `features` in place of loading eval.features.

    Raises:
        ValueError: what Scorer raises, its keys with eval. before them.
    """
    device = options.get("device", "cpu")
    features = options.pop("features", None) or eval_features(cfg, device)
    against: dict[str, Any] = {}
    if cfg.reference:
        known = open_reference(
            cfg.reference, features, key="eval.reference", read_pickle=load_arrays
        )
        against = {"reference": known.source, "reference_images": known.images}
    else:
        against = {"reference": data.pictures(split, device)}
    with said_of_eval():
        return scorer.Scorer(
            cfg.metrics,
            features,
            **against,
            train=data.pictures("train", device),
            held_out=data.pictures("held_out", device),
            **options,
        )


def check_scores(cfg: EvalConfig, data: ImageDataModule, *splits: str) -> None:
    """Raise ValueError for scores that cannot be had of these images; nothing is scored.

    Args:
        cfg: which metrics, in which features and of how many images.
        data: the training and the held-out images.
        splits: what is scored against: "train", "held_out".
    """
    for split in splits:
        make_scorer(cfg, data, split, num=cfg.num, work=False)


def check_best(cfg: Config) -> None:
    """Raise ValueError for a checkpoint.best that no score of this training can choose."""
    best, metric = cfg.checkpoint.best, best_metric(cfg)
    if not best:
        return
    line = "checkpoint.best"
    choosing = [name for name, one in scorer.METRICS.items() if one.better]
    check(metric in choosing, line, best, f"choose from {', '.join(f'eval/{n}' for n in choosing)}")
    check(cfg.eval.every, line, best, "needs scores on the way: eval.every=STEPS")
    measured = scorer.expand_metrics(cfg.eval.metrics)
    check(metric in measured, line, best, f"is not measured; add {metric} to eval.metrics")


def best_metric(cfg: Config) -> str:
    """Return the metric that checkpoint.best names: fd of eval/fd; or nothing."""
    return cfg.checkpoint.best.removeprefix("eval/")


def final_split(data: ImageDataModule) -> str:
    """Return what final scores are against: held-out images, or training ones if none are."""
    return "held_out" if len(data.held_out[0]) else "train"


class Judge:
    """Scores models by eval.metrics; the first of them, `metric`, chooses.

    Args:
        cfg: its eval section says how, its seed with which seeds.
        data: the training and the held-out images.
        device: where to generate and score.

    Raises:
        ValueError: a first metric that does not put models in order.
    """

    def __init__(self, cfg: Config, data: ImageDataModule, device: torch.device) -> None:
        self.cfg = cfg
        self.data = data
        self.device = device
        self.scorers: dict[str, scorer.Scorer] = {}
        self.metric = cfg.eval.metrics[0] if cfg.eval.metrics else ""
        choosing = [name for name, metric in scorer.METRICS.items() if metric.better]
        check(
            self.metric in choosing,
            "eval.metrics",
            self.metric,
            f"the first one chooses the winner: one of {', '.join(choosing)}",
        )
        self.choice: dict[str, Any] = {
            "metric": self.metric,
            "features": cfg.eval.features,
            "num": cfg.eval.num,
            "seeds": CHOOSING_SEEDS + SEEDS * (cfg.seed % 256),
        }

    def generate(
        self,
        model: Any,
        seeds: Sequence[int],
        progress: bool = False,
        labels: list[int] | None = None,
        decode: bool = True,
    ) -> tuple[torch.Tensor, list[int] | None]:
        """Return (uint8 images, or with decode=False latents if the model makes such; labels).

        Labels that are not given follow the law of the training set's.
        """
        if model.classes and labels is None:
            known = self.data.train[1]
            order = seeding.permutation(0, 0, len(known))
            labels = [int(known[order[seed % len(known)]]) for seed in seeds]
        model.eval()  # DDO's reference is left in the mode of the last fit
        seeds = list(seeds)
        decode = decode or not model.cfg.data.vae.mean
        options = {"batch": BATCH, "progress": progress, "decode": decode}
        pictures = generation.generate_all(model, seeds, labels, **options)
        return pictures, labels

    def score(self, model: Any, folder: Path | None = None) -> dict[str, float]:
        """Return {metric: value, "score_seconds": s} against the training images, for a choice.

        Args:
            model: a method.
            folder: all processes make the images, there, and the others return {}. None: this
                process makes them.

        Raises:
            NonFinite: the model made images that are not numbers.
        """
        started = time.monotonic()
        pictures = self._pictures(model, self.choice["seeds"], folder)
        if pictures is None:
            return {}
        with distributed.alone():
            scores = self._scorer("train", 0)(pictures)
        values = {name: score["value"] for name, score in scores.items()}
        return values | {"score_seconds": round(time.monotonic() - started, 2)}

    def final(
        self, model: Any, first: int = 0, folder: Path | None = None
    ) -> dict[str, dict[str, float]]:
        """Return {metric: {value, stderr}} against held-out images (training ones if none are).

        Args:
            model: a method.
            first: of the eval.num seeds.
            folder: as for score.
        """
        pictures = self._pictures(model, first, folder)
        if pictures is None:
            return {}
        with distributed.alone():
            return self._scorer(final_split(self.data), 100)(pictures)

    def distance(self, entry: Mapping[str, Any]) -> float:
        """Return the number that is lowest for the best of several scores."""
        return scorer.METRICS[self.metric].distance(entry[self.metric])

    def _pictures(self, model: Any, first: int, folder: Path | None) -> torch.Tensor | None:
        """Return the uint8 images of a score, made as score says; None on the other processes."""
        seeds = range(first, first + self.cfg.eval.num)
        if folder is None:
            return self.generate(model, seeds)[0]
        paths = make_shards(folder, seeds, BATCH, lambda some: self.generate(model, some))
        return load_shards(paths)[0] if distributed.is_first() else None

    def _scorer(self, split: str, resamples: int) -> scorer.Scorer:
        if split not in self.scorers:
            self.scorers[split] = make_scorer(
                self.cfg.eval, self.data, split, resamples=resamples, device=self.device
            )
        return self.scorers[split]
