"""Scores of a model: to choose one of many, and the final ones, on other seeds and other images."""

import time

from genmodels import generation, seeding
from genmodels.config import check
from genmodels.distributed import by_itself
from genmodels.evaluation import scorer

CHOOSING_SEEDS, SEEDS = 1 << 31, 1 << 22  # where the seeds of choices begin; for each cfg.seed
BATCH = 256  # images at a time; changes no image


class Judge:
    """Scores models by eval.metrics; the first of them, `metric`, chooses.

    Args:
        cfg: Config; its eval section says how, its seed with which seeds.
        data: ImageDataModule.
        device: where to generate and score.

    Raises:
        ValueError: a first metric that does not put models in order.
    """

    def __init__(self, cfg, data, device):
        self.cfg, self.data, self.device, self.scorers = cfg, data, device, {}
        self.metric = cfg.eval.metrics[0] if cfg.eval.metrics else ""
        choosing = [name for name, metric in scorer.METRICS.items() if metric.better]
        check(
            self.metric in choosing,
            "eval.metrics",
            self.metric,
            f"the first one chooses the winner: one of {', '.join(choosing)}",
        )
        self.plan = {
            "metric": self.metric,
            "features": cfg.eval.features,
            "num": cfg.eval.num,
            "seeds": CHOOSING_SEEDS + SEEDS * (cfg.seed % 256),
        }

    def generate(self, model, seeds, progress=False):
        """Return (uint8 images, labels or None); labels follow the law of the training set's."""
        labels = None
        if model.classes:
            known = self.data.train[1]
            order = seeding.permutation(0, 0, len(known))
            labels = [int(known[order[seed % len(known)]]) for seed in seeds]
        model.eval()  # DDO's reference is left in the mode of the last fit
        return generation.generate_all(model, list(seeds), labels, batch=BATCH, progress=progress)

    def score(self, model):
        """Return {metric: value, "score_seconds": s} against the training images, for a choice."""
        started, first = time.monotonic(), self.plan["seeds"]
        pictures, _ = self.generate(model, range(first, first + self.cfg.eval.num))
        with by_itself():
            scores = self._scorer("train", 0)(pictures)
        values = {name: score["value"] for name, score in scores.items()}
        return values | {"score_seconds": round(time.monotonic() - started, 2)}

    def final(self, model, first=0):
        """Return {metric: {value, stderr}} against held-out images (training ones if none are)."""
        pictures, _ = self.generate(model, range(first, first + self.cfg.eval.num))
        with by_itself():
            split = "held_out" if len(self.data.held_out[0]) else "train"
            return self._scorer(split, 100)(pictures)

    def distance(self, entry):
        """Return the number that is lowest for the best of several scores."""
        value, better = entry[self.metric], scorer.METRICS[self.metric].better
        if better == "half":
            return abs(value - 0.5)
        return -value if better == "higher" else value

    def _scorer(self, split, resamples):
        if split not in self.scorers:
            self.scorers[split] = scorer.Scorer(
                self.cfg.eval.metrics,
                self.cfg.eval.features,
                resamples=resamples,
                reference=getattr(self.data, split)[0],
                train=self.data.train[0],
                held_out=self.data.held_out[0],
                device=self.device,
            )
        return self.scorers[split]
