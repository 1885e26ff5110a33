"""Which scores there are, and all of them from one pass over the images."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from genmodels.distributed import rank
from genmodels.evaluation.kept import KeptFeatures
from genmodels.evaluation.passes import Scored, Store, check_memory, score_pass, sums_device
from genmodels.evaluation.sources import ImageSource, Pictures
from genmodels.images import OnDisk
from genmodels.metrics.cmmd import cmmd
from genmodels.metrics.errorbars import resampled
from genmodels.metrics.features import Features, feature_rows, load_features, mode_difference
from genmodels.metrics.frechet import (
    BlockFrechet,
    Moments,
    RootTrace,
    block_frechet,
    frechet_distance,
)
from genmodels.metrics.inception_score import inception_scores
from genmodels.metrics.kernel_distance import kernel_distance_deviations, kernel_distance_subsets
from genmodels.metrics.manifold import (
    LEAST_HELD_OUT,
    density_coverage,
    memorised,
    nn1,
    nn1_sides,
    precision_recall,
)
from genmodels.metrics.sliced import mind
from genmodels.metrics.vendi import vendi

# A score as a report holds it: {"value": v, "stderr": s, ...}. A metric may add "deviations":
# numbers whose squares add up to stderr^2, and which may be subtracted for sets of paired images.
Entry = dict[str, Any]

# What a score can be made of. All but the last two are (N, D) rows, which a pass must keep.
NEEDS = {
    "rows": "features of the images",
    "reference": "features of the reference images",
    "train": "features of the training images",
    "held_out": "features of the held-out images",
    "logits": "class scores of the images, (N, C)",
    "frechet": "BlockFrechet of the images and the reference",
}
_ROWS = {"rows", "reference", "train", "held_out"}
_LEAST = 4  # images on each side without which nothing is scored


@dataclass(frozen=True)
class Metric:
    """A row of METRICS: what a score is, what computes it, and from what.

    Args:
        doc: what it is, for --help.
        score: function of what `needs` names, in that order. It returns a number, or the entry of
            a report, {"value": v, "stderr": s, ...}, or a tuple of these.
        needs: names out of NEEDS.
        part: which one of the tuple it is.
        comes_with: words that ask for it beside its own name.
        least: images needed on each side, >= 4.
        better: "lower" or "higher", or "half" where 0.5 is best; such a metric can choose one model
            of many. "" = it cannot alone.
        halves: its error bar comes from random halves of the rows (resamples=); it is a number.
        in_blocks: it compares sets of one size, and is the mean over blocks of images as large as
            the reference; it is a number.
        equal: function of ("rows", "reference") that computes it under equal=true, then in blocks
            and with an error bar from halves; None = as ever.
        limit_of: the metric whose limit for infinitely many images it is. It needs halves of the
            images larger than the dimension of the features.
        published: it is kept for FID's published features; the metric of all others.
        published_for: the name of these features.
        drawn: plot= has a picture of it.

    Raises:
        ValueError: it needs what there is not, or another field is out of its range.
    """

    doc: str
    score: Callable[..., Any]
    needs: tuple[str, ...] = ("rows", "reference")
    part: int | None = None
    comes_with: tuple[str, ...] = ()
    least: int = _LEAST
    better: str = ""
    halves: bool = False
    in_blocks: bool = False
    equal: Callable[..., float] | None = None
    limit_of: str = ""
    published: str = ""
    published_for: str = "inception"
    drawn: bool = False

    def __post_init__(self) -> None:
        for need in self.needs:
            if need not in NEEDS:
                raise ValueError(f"a metric needs {need!r}: choose from {', '.join(NEEDS)}")
        if not self.needs:
            raise ValueError(f"a metric needs some of {', '.join(NEEDS)}")
        if self.better not in ("", "lower", "higher", "half"):
            raise ValueError(f"better={self.better!r}: choose from lower, higher, half or nothing")
        if self.least < _LEAST:
            raise ValueError(f"least={self.least}: must be >= {_LEAST}, which every score needs")
        if self.in_blocks and self.needs != ("rows", "reference"):
            raise ValueError(f"in_blocks=True: needs rows and reference, not {self.needs}")
        if self.halves and not self.keeps_rows:
            raise ValueError(f"halves=True: needs rows to draw from, not {self.needs}")

    @property
    def keeps_rows(self) -> bool:
        """Whether passes must keep the features of all images for it."""
        return bool(_ROWS & set(self.needs))

    def distance(self, value: float) -> float:
        """Return the number that is lowest for the best of several scores; see `better`."""
        if self.better == "half":
            return abs(value - 0.5)
        return -value if self.better == "higher" else value

    def under(self, equal: bool) -> "Metric":
        """Return the metric as it is computed with equal=true or false."""
        if not equal or self.equal is None:
            return self
        needs = ("rows", "reference")
        return replace(self, score=self.equal, needs=needs, halves=True, in_blocks=True)


def _distance(frechet: BlockFrechet) -> Entry:
    if not frechet.stderr:
        return {"value": frechet.value}
    deviations = torch.tensor(frechet.deviations, dtype=torch.float64)
    return {"value": frechet.value, "stderr": frechet.stderr, "deviations": deviations}


def _limit(frechet: BlockFrechet) -> Entry:
    low, high = frechet.interval
    return {"value": frechet.limit, "stderr": frechet.limit_stderr, "low": low, "high": high}


def _distance_of_rows(rows: torch.Tensor, reference: torch.Tensor) -> float:
    return float(frechet_distance(Moments().update(rows), Moments().update(reference)))


def _kid(rows: torch.Tensor, reference: torch.Tensor) -> Entry:
    value, stderr, deviations = kernel_distance_deviations(rows, reference)
    return {"value": value, "stderr": stderr, "deviations": deviations}


def _kid_subsets(rows: torch.Tensor, reference: torch.Tensor) -> Entry:
    value, spread = kernel_distance_subsets(rows, reference)
    return {"value": value, "spread": spread}


def _inception_score(logits: torch.Tensor) -> Entry:
    parts = np.array(inception_scores(logits))
    value, spread = float(np.mean(parts)), float(np.std(parts))
    deviations = torch.from_numpy(parts - value) / 90**0.5  # of the mean of 10: spread / 3
    return {"value": value, "stderr": spread / 3, "spread": spread, "deviations": deviations}


def _mean(values: torch.Tensor) -> Entry:
    """Return a mean over images with its standard error, the manifold taken as given."""
    values = values.double().cpu()
    stderr = float(values.std() / len(values) ** 0.5)
    deviations = (values - values.mean()) / (len(values) * (len(values) - 1)) ** 0.5
    return {"value": float(values.mean()), "stderr": stderr, "deviations": deviations}


def _precision_recall(rows: torch.Tensor, reference: torch.Tensor) -> tuple[Entry, Entry]:
    precise, recalled = precision_recall(rows, reference)
    return _mean(precise), _mean(recalled)


def _density_coverage(rows: torch.Tensor, reference: torch.Tensor) -> tuple[Entry, Entry]:
    density, covered = density_coverage(rows, reference)
    return _mean(density), _mean(covered)


# name -> Metric; a new score is a row here and nothing else. `better` stands where one number may
# choose a model: precision, say, is highest where one good image is made again and again.
METRICS: dict[str, Metric] = {
    "fd": Metric(
        "Frechet distance of the features",
        _distance,
        needs=("frechet",),
        better="lower",
        equal=_distance_of_rows,
        drawn=True,
    ),
    "fd_inf": Metric(
        "its limit for infinitely many images",
        _limit,
        needs=("frechet",),
        limit_of="fd",
        drawn=True,
    ),
    "fid": Metric(
        "fd of features=inception",
        _distance,
        needs=("frechet",),
        better="lower",
        published="fd",
        drawn=True,
    ),
    "fid_inf": Metric(
        "fd_inf of features=inception",
        _limit,
        needs=("frechet",),
        limit_of="fid",
        published="fd_inf",
        drawn=True,
    ),
    "sfid": Metric(
        "fd of features=inception_spatial, ADM's sFID",
        _distance,
        needs=("frechet",),
        better="lower",
        published="fd",
        published_for="inception_spatial",
        drawn=True,
    ),
    "kid": Metric("kernel distance over all pairs", _kid, better="lower"),
    "kid_subsets": Metric(
        "the same as a mean over 100 random subsets of 1000", _kid_subsets, least=1000
    ),
    "is": Metric(
        "inception score (10 parts); features with class scores only",
        _inception_score,
        needs=("logits",),
        least=10,
    ),
    "precision": Metric(
        "share of images within the real manifold (k = 3)",
        _precision_recall,
        part=0,
        comes_with=("prc",),
        drawn=True,
    ),
    "recall": Metric(
        "share of real images within the generated manifold (k = 3)",
        _precision_recall,
        part=1,
        comes_with=("prc",),
        drawn=True,
    ),
    "density": Metric(
        "real balls around a generated image, over k = 5; 1 = as real",
        _density_coverage,
        part=0,
        least=6,
    ),
    "coverage": Metric(
        "share of real images with a generated one in their ball (k = 5)",
        _density_coverage,
        part=1,
        comes_with=("density",),
        least=6,
    ),
    "nn1": Metric(
        "1-nearest-neighbour two-sample accuracy, 0.5 = indistinguishable",
        nn1,
        better="half",
        halves=True,
        in_blocks=True,
    ),
    "nn1_fake": Metric(
        "its share of generated images known as such; below 0.5: they crowd the real ones",
        nn1_sides,
        part=0,
        halves=True,
        in_blocks=True,
    ),
    "nn1_real": Metric(
        "its share of real images known as such; above 0.5: the generated lie elsewhere",
        nn1_sides,
        part=1,
        halves=True,
        in_blocks=True,
    ),
    "memorised": Metric(
        "share nearer to a training image than 95 % of held-out ones are; 0.05 = none",
        memorised,
        needs=("rows", "train", "held_out"),
        halves=True,
    ),
    "cmmd": Metric(
        "squared MMD of normalised features under a Gaussian kernel (sigma 10), times 1000",
        cmmd,
        better="lower",
    ),
    "mind": Metric(
        "sliced Wasserstein distance over 1000 directions, W2^2 times 3 D", mind, better="lower"
    ),
    "vendi": Metric(
        "how many different images the set is worth (cosine kernel); no comparison with real ones",
        vendi,
        needs=("rows",),
    ),
}


def metrics_help() -> str:
    """Return what METRICS are, and what words ask for several of them, for --help."""
    words = [
        f"{word}: {' and '.join(names)}"
        if word not in METRICS
        else f"{word} comes with {' and '.join(name for name in names if name != word)}"
        for word, names in _words().items()
    ]
    return "; ".join([*(f"{name}: {metric.doc}" for name, metric in METRICS.items()), *words])


def _words() -> dict[str, list[str]]:
    """Return {word: metrics that it asks for} of the words that ask for several."""
    words = dict.fromkeys(word for metric in METRICS.values() for word in metric.comes_with)
    return {
        word: [name for name, m in METRICS.items() if name == word or word in m.comes_with]
        for word in words
    }


def expand_metrics(words: Iterable[str]) -> list[str]:
    """Return the names of METRICS that words ask for: prc is precision and recall.

    Raises:
        ValueError: no word, or one that asks for no metric.
    """
    words, several = list(words), _words()
    choices = ", ".join(dict.fromkeys([*METRICS, *several]))
    if not words:
        raise ValueError(f"metrics=: name some of {choices}")
    names = []
    for word in words:
        if word not in METRICS and word not in several:
            raise ValueError(f"metrics={word}: choose from {choices}")
        names += several.get(word, [word])
    return list(dict.fromkeys(names))


def metrics_to_score(words: Iterable[str], equal: bool = False) -> dict[str, Metric]:
    """Return {name: Metric as it is computed} of what words ask for; equal: as for Scorer.

    Raises:
        ValueError: as expand_metrics.
    """
    return {name: METRICS[name].under(equal) for name in expand_metrics(words)}


def tables_to_keep(words: Iterable[str], equal: bool = False) -> tuple[bool, bool]:
    """Return whether a pass must keep (the features, the class scores) of all images."""
    metrics = metrics_to_score(words, equal).values()
    return any(m.keeps_rows for m in metrics), any("logits" in m.needs for m in metrics)


def need_splits(words: Iterable[str]) -> bool:
    """Return whether metrics need the training and the held-out images beside the reference."""
    metrics = metrics_to_score(words).values()
    return any({"train", "held_out"} & set(metric.needs) for metric in metrics)


def check_features(metrics: Mapping[str, Metric], features: Features) -> None:
    """Raise ValueError for a metric that these features cannot give."""
    for name, metric in metrics.items():
        standard = features.standard and features.name == metric.published_for
        if metric.published and not standard:
            raise ValueError(
                f"metrics={name}: is kept for features={metric.published_for}, resize=tf1 and "
                f"the published weights; with features={features.name}, resize {features.resize}, "
                f"these weights, write metrics={metric.published}"
            )
        if "logits" in metric.needs and "logits" not in features.outputs:
            raise ValueError(
                f"metrics={name}: features={features.name} gives no class scores; inception does"
            )


def of_features(words: Iterable[str], several: Iterable[Features]) -> list[list[str]]:
    """Return for each of several features the metrics to be had with it.

    A metric that is kept for some features takes the place of its general form there: fid that of
    fd.

    Raises:
        ValueError: a metric that none of them can give, or features for which there is none.
    """
    names, several = expand_metrics(words), list(several)
    able: dict[str, list[str]] = {features.name: [] for features in several}
    for name in names:
        refusals = []
        for features in several:
            try:
                check_features({name: METRICS[name]}, features)
                able[features.name].append(name)
            except ValueError as refusal:
                refusals.append(refusal)
        if len(refusals) == len(several):
            raise refusals[0]
    chosen = []
    for features_name, found in able.items():
        if not found:
            raise ValueError(
                f"features={features_name}: gives none of metrics={','.join(names)}; add one that "
                "it gives, or leave it out"
            )
        general = {METRICS[name].published for name in found}
        chosen.append([name for name in found if name not in general])
    return chosen


class Scorer:
    """Scores images against fixed reference images; the reference is prepared once.

    In several processes every one of them must make it and call it; the first gets the scores.

    Args:
        metrics: names of METRICS, or words that ask for several: see expand_metrics.
        features: a Features, or a name for load_features.
        reference: uint8 images (N, C, H, W), Pictures, or the Moments of a statistics file, or a
            Scored: its Moments and, for other metrics than Frechet distances, its rows.
        reference_images: images beside a Scored without rows, for metrics that need these.
        train, held_out: uint8 images, for `memorised`.
        equal: compare sets of equal size: `fd` too is the mean over blocks of generated images as
            large as the reference (nn1 always is), with an error bar from resampling.
        resamples: random halves behind the error bars of nn1, memorised and equal fd; 0 = none.
        weights, device: of the feature network, where it is given by name.
        batch: images in one call of it; None = its own.
        store: Store of the reference's pass, or None.
        progress: show bars.
        num: how many images will be scored, so that too few are refused before the work.
        keep: KeptFeatures, where rows are looked for before images are passed over, or None.
        keep_rows: keep the rows of both sides even where no metric needs them.
        work: False: check all that can be known before the work, and do none of it.

    Attributes:
        metrics: {name: Metric as it is computed}.
        moments, rows: of the reference; rows only where a metric needs them.
        frechet, generated_rows: of the latest images, None where no metric needs them.
        marks: (of the reference, of the latest images), see Scored; None where they are not known.
        deviations: {metric: of the latest images}, see Entry.
        seconds: {label: of each pass, and of the latest scores}.

    Raises:
        ValueError: an unknown metric, one that these features or this reference cannot give, too
            few images, or what the features refuse.
    """

    def __init__(
        self,
        metrics: Iterable[str],
        features: Features | str,
        *,
        reference: Any,
        reference_images: Any = None,
        train: Any = None,
        held_out: Any = None,
        equal: bool = False,
        resamples: int = 0,
        weights: str | None = None,
        weights_are_code: bool = False,
        device: torch.device | str = "cpu",
        batch: int | None = None,
        store: Store | None = None,
        progress: bool = False,
        num: int | None = None,
        keep: KeptFeatures | None = None,
        keep_rows: bool = False,
        work: bool = True,
    ):
        words = list(metrics)
        self.metrics = metrics_to_score(words, equal)
        self.keep_rows, self.keep_logits = tables_to_keep(words, equal)
        self.keep_rows |= keep_rows
        self.resamples = resamples
        self.features = load_features(features, weights, device, weights_are_code=weights_are_code)
        self.batch = batch
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.rows: torch.Tensor | None = None
        self.keep = keep
        self.root: RootTrace | None = None  # of the reference, once it is needed
        self.splits: dict[str, torch.Tensor | None] = {}  # rows of "train" and "held_out"
        self.frechet: BlockFrechet | None = None
        self.generated_rows: torch.Tensor | None = None
        self.marks: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        self.deviations: dict[str, torch.Tensor] = {}
        splits = {"train": train, "held_out": held_out}
        if isinstance(reference, Moments):
            reference = Scored([reference])
        check_features(self.metrics, self.features)
        self._check_sources(reference if reference_images is None else None, splits)
        # Moments may be of more images than there are rows beside them.
        self.reference_num = (
            reference.moments().count if isinstance(reference, Scored) else len(reference)
        )
        self.rows_num = self.reference_num
        if reference_images is not None:
            self.rows_num = len(reference_images)
        elif isinstance(reference, Scored) and reference.rows is not None:
            self.rows_num = len(reference.rows)
        num = self.reference_num if num is None else num
        if not work:
            if isinstance(reference, Scored):
                self._check_number(num, self.features.dim or 0)
            else:
                self._check_images(_pictures(reference), num)
            return
        self._check_number(num, self.features.dim or 0)
        if not isinstance(reference, Scored):
            pictures = _pictures(reference)
            scored = self._pass(pictures, "reference", rows=self.keep_rows, store=store, whole=True)
            self.moments = scored.moments()
            self.rows = scored.rows
            self.marks = (scored.marks, None)
        else:
            self.moments = reference.moments().to(sums_device(self.features))
            self.rows = reference.rows
            if reference_images is not None and self.keep_rows:
                pictures = _pictures(reference_images)
                scored = self._pass(pictures, "reference", rows=True, store=store, whole=True)
                self.rows = scored.rows
                self.marks = (scored.marks, None)
        self._check_number(num, self._dim())
        for name, pixels in splits.items():
            if any(name in metric.needs for metric in self.metrics.values()):
                again = pixels is reference  # as in training, where it is the training set
                self.splits[name] = (
                    self.rows
                    if again
                    else self._pass(_pictures(pixels), name, rows=True, whole=True).rows
                )

    def _dim(self) -> int:
        return self.features.dim or len(self.moments.mean)

    def _check_sources(self, reference: Any, splits: dict[str, Any]) -> None:
        """Raise ValueError for a metric that lacks images."""
        for name, metric in self.metrics.items():
            if any(need in splits and splits[need] is None for need in metric.needs):
                raise ValueError(
                    f"metrics={name}: needs a data set with a training and a test split"
                )
            if "held_out" in metric.needs and len(splits["held_out"]) < LEAST_HELD_OUT:
                raise ValueError(
                    f"metrics={name}: needs at least {LEAST_HELD_OUT} held-out images, got "
                    f"{len(splits['held_out'])}; hold out more, or leave it out"
                )
            bare = isinstance(reference, Scored) and reference.rows is None
            if bare and metric.keeps_rows and metric.needs != ("rows",):
                equal = "" if metric is METRICS[name] else " (equal=true)"
                raise ValueError(
                    f"metrics={name}{equal}: needs the reference's images, statistics give fd and "
                    "fd_inf only; name a folder, zip, npz or data set as the reference, or write "
                    "the statistics with rows=true"
                )

    def _check_number(self, num: int, dim: int) -> None:
        """Raise ValueError for too few images; dim is that of the features, 0 = not known yet."""
        real = self.reference_num
        if min(num, real) < _LEAST:
            raise ValueError(
                f"num={num}: scores need at least {_LEAST} images on each side ({num} images, "
                f"{real} in the reference); give more"
            )
        for name, metric in self.metrics.items():
            if metric.needs == ("logits",):
                if num < metric.least:
                    raise ValueError(
                        f"metrics={name}: needs at least {metric.least} images, got {num}; give "
                        "more"
                    )
            elif min(num, self.rows_num if metric.keeps_rows else real) < metric.least:
                there = self.rows_num if metric.keeps_rows else real
                raise ValueError(
                    f"metrics={name}: needs at least {metric.least} images on each side, got {num} "
                    f"and {there} in the reference; give more, or leave it out"
                )
            if metric.limit_of and min(num // 2 - 16, real) <= dim:
                raise ValueError(
                    f"metrics={name}: needs more than {2 * dim + 34} images for features of "
                    f"dimension {dim}, got {num} and {real} in the reference; give more, or write "
                    f"metrics={metric.limit_of}"
                )

    def _check_images(self, reference: ImageSource, num: int) -> None:
        """Raise ValueError for images that the features refuse, or too many dimensions of these."""
        first = next(iter(reference.read(torch.arange(1))))
        dim = next(feature_rows(self.features, first, batch=1)).shape[1]
        self._check_number(num, dim)
        for count in (num, len(reference)):
            check_memory(self.features, count, dim)

    def _pass(
        self, source: ImageSource, label: str, store: Store | None = None, **options: Any
    ) -> Scored:
        started = time.monotonic()
        scored = self.keep and self.keep.scored(source, self.features, options.get("shift"))
        if not scored:
            if self.keep:
                options |= {"rows": True, "logits": "logits" in self.features.outputs}
            options |= {"store": store, "batch": self.batch, "progress": self.progress}
            scored = score_pass(source, self.features, label=label, **options)
            if self.keep:
                self.keep.add(source, self.features, scored)
        self.seconds[label] = round(time.monotonic() - started, 2)
        return scored

    def __call__(
        self,
        generated: Any,
        seed: int = 0,
        *,
        store: Store | None = None,
        curve: bool = False,
        label: str = "images",
    ) -> dict[str, Entry]:
        """Return {metric: {"value": v, "stderr": s, ...}} of uint8 images or a source of them.

        Args:
            generated: uint8 (N, C, H, W), Pictures or Generated.
            seed: of the resampled error bars.
            store: Store of this pass, or None.
            curve: keep in `frechet` what a plot needs.
            label: of the bar.
        """
        source = _pictures(generated)
        self._check_number(len(source), self._dim())
        scored = self._pass(
            source,
            label,
            shift=self.moments.mean,
            rows=self.keep_rows,
            logits=self.keep_logits,
            store=store,
        )
        return self._all_of(scored, seed, curve)

    def of_rows(
        self, rows: torch.Tensor, logits: torch.Tensor | None = None, seed: int = 0
    ) -> dict[str, Entry]:
        """Return what calling it returns, of images whose features are known already.

        Args:
            rows: float32 (N,D).
            logits: (N,C), for the metrics that need them.
            seed: of the resampled error bars.

        Raises:
            ValueError: too few rows.
        """
        self._check_number(len(rows), self._dim())
        scored = Scored.of_rows(rows, self.features, self.moments.mean, logits=logits)
        return self._all_of(scored, seed)

    def _all_of(self, scored: Scored, seed: int, curve: bool = False) -> dict[str, Entry]:
        """Return the entries of all metrics on the first process, {} on the others."""
        self.frechet = None
        self.generated_rows = scored.rows
        self.marks = (self.marks[0], scored.marks)
        self.deviations = {}
        if rank() != 0:
            return {}
        started = time.monotonic()
        with self._bar(scored.blocks) as bar:
            scores = self._scores(scored, seed, curve, bar.update)
        self.seconds["scores"] = round(time.monotonic() - started, 2)
        return scores

    def _scores(
        self, scored: Scored, seed: int, curve: bool, tick: Callable[[], object]
    ) -> dict[str, Entry]:
        """Return the entries of all metrics; keep their deviations."""
        if any("frechet" in metric.needs for metric in self.metrics.values()):
            self.root = self.root or RootTrace(self.moments)
            self.frechet = block_frechet(
                scored.blocks, self.moments, curve=curve, root=self.root, tick=tick
            )
        inputs = self.splits | {
            "rows": scored.rows,
            "reference": self.rows,
            "logits": scored.logits,
            "frechet": self.frechet,
        }
        results: dict[Any, Any] = {}  # some metrics are parts of one computation
        scores = {}
        for name, metric in self.metrics.items():
            if metric.halves or metric.in_blocks:
                result = self._of_subsets(metric, inputs, seed, tick)
            else:
                computation = (metric.score, metric.needs)
                if computation not in results:
                    results[computation] = metric.score(*self._where_sums_are(metric, inputs))
                result = _part(metric, results[computation])
                tick()
            entry = dict(result) if isinstance(result, dict) else {"value": float(result)}
            if "deviations" in entry:
                self.deviations[name] = entry.pop("deviations")
            scores[name] = entry
        return scores

    def _bar(self, blocks: list[Moments]) -> tqdm:
        """Return the bar of the scores: a step for each distance, half or other computation."""
        steps = 0
        if any("frechet" in metric.needs for metric in self.metrics.values()):
            steps += 1 if len(blocks) == 1 else 1 + len(blocks)
        for metric in self.metrics.values():
            steps += 1 + self.resamples if metric.halves else 1
        return tqdm(total=steps, desc="scores", unit="step", delay=0.5, disable=not self.progress)

    def _where_sums_are(self, metric: Metric, inputs: dict[str, Any]) -> list[Any]:
        """Return what the metric needs, its rows on the device of sums."""
        device = sums_device(self.features)
        return [inputs[need].to(device) if need in _ROWS else inputs[need] for need in metric.needs]

    def _of_subsets(
        self, metric: Metric, inputs: dict[str, Any], seed: int, tick: Callable[[], object]
    ) -> Entry:
        """Return the entry of a metric of blocks or halves of the rows, on the CPU."""

        def score(rows: torch.Tensor, reference: torch.Tensor) -> float:
            sets = inputs | {"rows": rows, "reference": reference}
            return _part(metric, metric.score(*(sets[need] for need in metric.needs)))

        number = _in_blocks(score) if metric.in_blocks else score
        if not (metric.halves and self.resamples):
            tick()
            return {"value": number(inputs["rows"], inputs["reference"])}
        result = resampled(
            number,
            inputs["rows"],
            inputs["reference"],
            times=self.resamples,
            seed=seed,
            tick=tick,
        )
        draws = torch.tensor(result.draws, dtype=torch.float64)
        deviations = (draws - draws.mean()) / (len(draws) - 1) ** 0.5
        return {"value": result.value, "stderr": result.stderr, "deviations": deviations}


def _part(metric: Metric, result: Any) -> Any:
    """Return the metric's own part of what its function returns."""
    return result if metric.part is None else result[metric.part]


def _in_blocks(
    score: Callable[[torch.Tensor, torch.Tensor], float],
) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Return the score as a mean over blocks of generated rows as large as the reference.

    Rows are shuffled first (torch.randperm, seed 0): files come sorted by class.
    """

    def mean(generated: torch.Tensor, reference: torch.Tensor) -> float:
        generator = torch.Generator().manual_seed(0)
        generated, reference = (
            rows[torch.randperm(len(rows), generator=generator)] for rows in (generated, reference)
        )
        size = min(len(generated), len(reference))
        blocks = generated.split(size)
        scores = [score(block, reference[:size]) for block in blocks if len(block) == size]
        return sum(scores) / len(scores)

    return mean


def fast_difference(features: Features, *sources: Any) -> dict[str, float]:
    """Return {"difference": of fast rows to exact ones} on 64 images of the first source that has
    images, which is warned of too; nothing in exact mode."""
    if features.mode == "exact":
        return {}
    source = next(source for source in sources if hasattr(source, "read"))
    first = next(iter(source.read(torch.arange(min(64, len(source))))))
    difference = mode_difference(features, first) or 0.0
    warnings.warn(
        f"mode=fast: rows differ from exact ones by {difference:.2g} of their spread", stacklevel=2
    )
    return {"difference": difference}


def _pictures(source: Any) -> ImageSource:
    """Return images as a source; a source as it is."""
    return Pictures(source) if isinstance(source, (torch.Tensor, OnDisk)) else source
