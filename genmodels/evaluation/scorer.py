"""Which scores there are, and all of them from one pass over the images."""

import time
import warnings

import torch

from genmodels.distributed import rank
from genmodels.evaluation.passes import score_pass, sums_device
from genmodels.evaluation.sources import Pictures, read_source
from genmodels.metrics.errorbars import resampled
from genmodels.metrics.features import Features, load_features, mode_difference
from genmodels.metrics.frechet import Moments, block_frechet, frechet_distance
from genmodels.metrics.inception_score import inception_score
from genmodels.metrics.kernel_distance import kernel_distance, kernel_distance_subsets
from genmodels.metrics.manifold import (
    density_coverage,
    memorised,
    nn1,
    nn1_sides,
    precision_recall,
)
from genmodels.metrics.stats import is_stats, load_stats

# name -> what it is, for --help; Scorer computes them.
METRICS = {
    "fd": "Frechet distance of the features",
    "fd_inf": "its limit for infinitely many images",
    "fid": "fd of features=inception",
    "fid_inf": "fd_inf of features=inception",
    "kid": "kernel distance over all pairs",
    "kid_subsets": "the same as a mean over 100 random subsets of 1000",
    "is": "inception score (10 parts); features with class scores only",
    "precision": "share of images within the real manifold (k = 3)",
    "recall": "share of real images within the generated manifold (k = 3)",
    "density": "real balls around a generated image, over k = 5; 1 = as real",
    "coverage": "share of real images with a generated one in their ball (k = 5)",
    "nn1": "1-nearest-neighbour two-sample accuracy, 0.5 = indistinguishable",
    "nn1_fake": "its share of generated images known as such; below 0.5: they crowd the real ones",
    "nn1_real": "its share of real images known as such; above 0.5: the generated lie elsewhere",
    "memorised": "share nearer to a training image than 95 % of held-out ones are; 0.05 = none",
}

GROUPS = {"prc": ("precision", "recall"), "density": ("density", "coverage")}
_FRECHET = ("fd", "fd_inf", "fid", "fid_inf")
_LEAST = {"kid_subsets": 1000, "density": 6, "coverage": 6}  # images on each side; else 4
_RESAMPLED = ("nn1", "nn1_fake", "nn1_real", "memorised")


def expand(metrics):
    """Return the metrics with groups spelled out: prc is precision and recall.

    Raises:
        ValueError: no name, or one that is no metric.
    """
    if not metrics:
        raise ValueError(f"metrics=: name some of {', '.join([*METRICS, 'prc'])}")
    names = []
    for name in metrics:
        if name not in METRICS and name not in GROUPS:
            raise ValueError(f"metrics={name}: choose from {', '.join([*METRICS, 'prc'])}")
        names += GROUPS.get(name, (name,))
    return list(dict.fromkeys(names))


def tables(metrics, equal=False):
    """Return whether a pass must keep (the rows, the class scores) for these metrics."""
    names = expand(metrics)
    pairs = [name for name in names if name not in (*_FRECHET, "is")]
    return bool(pairs) or (equal and "fd" in names), "is" in names


class Scorer:
    """Scores images against fixed reference images; the reference is prepared once.

    In several processes every one of them must make it and call it; the first gets the scores.

    Args:
        metrics: names out of METRICS or GROUPS.
        features: a Features, or a name for load_features.
        reference: uint8 images (N, C, H, W), Pictures, or the Moments of a statistics file.
        train, held_out: uint8 images, for `memorised`.
        equal: compare sets of equal size: `fd` too is the mean over blocks of generated images as
            large as the reference (nn1 always is), with an error bar from resampling.
        resamples: random halves behind the error bars of nn1, memorised and equal fd; 0 = none.
        weights, device: of the feature network, where it is given by name.
        batch: images in one call of it; None = its own.
        store: Store of the reference's pass, or None.
        progress: show bars.
        num: how many images will be scored, so that too few are refused before the work.

    Raises:
        ValueError: an unknown metric, one that these features or this reference cannot give, too
            few images, or what the features refuse.
    """

    def __init__(
        self,
        metrics,
        features,
        *,
        reference,
        train=None,
        held_out=None,
        equal=False,
        resamples=0,
        weights=None,
        device="cpu",
        batch=None,
        store=None,
        progress=False,
        num=None,
    ):
        self.metrics, self.equal, self.resamples = expand(metrics), equal, resamples
        if not isinstance(features, Features):
            features = load_features(features, weights, device)
        self.features, self.batch, self.progress, self.seconds = features, batch, progress, {}
        pairs = [m for m in self.metrics if m not in (*_FRECHET, "is")]
        self.keep_rows, self.keep_logits = tables(metrics, equal)
        self.rows, self.moments, self.others = None, None, {}
        self._check(reference, pairs, train, held_out, num)
        if isinstance(reference, Moments):
            self.moments = reference.to(sums_device(self.features))
            self.reference_num = reference.count
        else:
            self._prepare(_pictures(reference), store)
        self._check_number(self.reference_num if num is None else num, self.reference_num)
        if "memorised" in self.metrics:
            for name, pixels in (("train", train), ("held_out", held_out)):
                again = pixels is reference  # as in training, where it is the training set
                self.others[name] = (
                    self.rows if again else self._pass(_pictures(pixels), name, rows=True).rows
                )

    def _check(self, reference, pairs, train, held_out, num):
        """Raise ValueError for metrics that cannot be had, before any work."""
        features = self.features
        for name in ("fid", "fid_inf"):
            if name in self.metrics and not features.standard:
                raise ValueError(
                    f"metrics={name}: is kept for features=inception, resize=tf1 and the published "
                    f"weights; with features={features.name}, resize {features.resize}, these "
                    f"weights, write metrics={name.replace('fid', 'fd')}"
                )
        if "is" in self.metrics and "logits" not in features.outputs:
            raise ValueError(
                f"metrics=is: features={features.name} gives no class scores; inception does"
            )
        if "memorised" in self.metrics and (train is None or held_out is None):
            raise ValueError("metrics=memorised: needs a data set with a training and a test split")
        if isinstance(reference, Moments):
            needy = [*pairs, *(["fd (equal=true)"] if self.equal and self.keep_rows else [])]
            if needy:
                raise ValueError(
                    f"metrics={needy[0]}: needs the reference's images, statistics give fd and "
                    "fd_inf only; name a folder, zip, npz or data set as the reference"
                )
        number = reference.count if isinstance(reference, Moments) else len(reference)
        self._check_number(number if num is None else num, number)

    def _check_number(self, num, reference_num):
        """Raise ValueError for too few images."""
        if min(num, reference_num) < 4:
            raise ValueError(
                f"num={num}: scores need at least 4 images on each side ({num} images, "
                f"{reference_num} in the reference); give more"
            )
        for name in self.metrics:
            if min(num, reference_num) < _LEAST.get(name, 4):
                raise ValueError(
                    f"metrics={name}: needs at least {_LEAST[name]} images on each side, got {num} "
                    f"and {reference_num} in the reference; give more, or leave it out"
                )
        if "is" in self.metrics and num < 10:
            raise ValueError(f"metrics=is: needs at least 10 images, got {num}; give more")
        dim = self.features.dim or (0 if self.moments is None else len(self.moments.mean))
        for name in ("fd_inf", "fid_inf"):
            if name in self.metrics and min(num // 2 - 16, reference_num) <= dim:
                raise ValueError(
                    f"metrics={name}: needs more than {2 * dim + 34} images for features of "
                    f"dimension {dim}, got {num} and {reference_num} in the reference; give more, "
                    f"or write metrics={name.removesuffix('_inf')}"
                )

    def _prepare(self, reference, store):
        found = self._pass(reference, "reference", rows=self.keep_rows, store=store)
        self.moments, self.rows, self.reference_num = found.moments(), found.rows, len(reference)

    def _pass(self, source, label, **options):
        started = time.monotonic()
        found = score_pass(
            source, self.features, batch=self.batch, label=label, progress=self.progress, **options
        )
        self.seconds[label] = round(time.monotonic() - started, 2)
        return found

    def __call__(self, generated, seed=0, *, store=None, curve=False):
        """Return {metric: {"value": v, "stderr": s, ...}} of uint8 images or a source of them.

        Args:
            generated: uint8 (N, C, H, W), Pictures or Generated.
            seed: of the resampled error bars.
            store: Store of this pass, or None.
            curve: keep what a plot needs in `self.frechet` and `self.generated_rows`.
        """
        source = _pictures(generated)
        self._check_number(len(source), self.reference_num)
        found = self._pass(
            source,
            "images",
            shift=self.moments.mean,
            rows=self.keep_rows,
            logits=self.keep_logits,
            store=store,
        )
        self.frechet, self.generated_rows = None, found.rows
        if rank() != 0:
            return {}
        started = time.monotonic()
        if set(self.metrics) & set(_FRECHET[self.equal :]):
            self.frechet = block_frechet(found.blocks, self.moments, curve=curve)
        scores = {}
        for name in self.metrics:
            if name not in scores:
                scores |= self._scores(name, found, seed)
        self.seconds["scores"] = round(time.monotonic() - started, 2)
        return {name: scores[name] for name in self.metrics}

    def _scores(self, name, found, seed):
        """Return {metric: {"value": v, ...}} of a metric and of those that come with it."""
        if name == "fd" and self.equal:
            return {name: self._resampled(_in_blocks(_fd), found.rows, seed)}
        if name in _FRECHET:
            return {name: _of_frechet(self.frechet, name)}
        if name in _RESAMPLED:
            return {name: self._resampled(self._function(name), found.rows, seed)}
        if name == "is":
            value, spread = inception_score(found.logits)
            return {name: {"value": value, "stderr": spread / 3, "spread": spread}}
        device = sums_device(self.features)
        rows, real = found.rows.to(device), self.rows.to(device)
        if name == "kid":
            value, stderr = kernel_distance(rows, real)
            return {name: {"value": value, "stderr": stderr}}
        if name == "kid_subsets":
            value, spread = kernel_distance_subsets(rows, real)
            return {name: {"value": value, "spread": spread}}
        both = GROUPS["prc"] if name in GROUPS["prc"] else GROUPS["density"]
        parts = (precision_recall if name in GROUPS["prc"] else density_coverage)(rows, real)
        return {key: _mean(part.double()) for key, part in zip(both, parts)}

    def _function(self, name):
        """Return a score as a function of (generated rows, reference rows)."""
        if name == "memorised":
            train, held_out = self.others["train"], self.others["held_out"]
            return lambda rows, _: memorised(rows, train, held_out)
        sides = {"nn1": nn1, "nn1_fake": _fake_side, "nn1_real": _real_side}
        return _in_blocks(sides[name])

    def _resampled(self, function, rows, seed):
        if not self.resamples:
            return {"value": function(rows, self.rows)}
        found = resampled(function, rows, self.rows, times=self.resamples, seed=seed)
        return {"value": found.value, "stderr": found.stderr}


def read_reference(source, features, memorised=False, **where):
    """Return (Pictures or Moments, what is known of it, images that `memorised` needs).

    Args:
        source: as for read_source, or the npz of statistics.
        features: that the statistics must agree with.
        memorised: also read both splits of the data set.
        where: of read_source.

    Raises:
        ValueError: what read_source or load_stats refuses.
    """
    if is_stats(source):
        moments, meta = load_stats(source, features)
        return moments, meta, {}
    pixels, _, splits = read_source(source, **where)
    known = {"num": len(pixels), "shape": tuple(pixels.shape[1:])}
    return Pictures(pixels), known, splits() if memorised else {}


def fast_difference(features, *sources):
    """Return {"difference": of fast rows to exact ones} on 64 images of the first source that has
    images, told as a note; nothing in exact mode."""
    if features.mode == "exact":
        return {}
    source = next(s for s in sources if hasattr(s, "read"))
    some = next(source.read(torch.arange(min(64, len(source)))))
    difference = mode_difference(features, some)
    warnings.warn(
        f"mode=fast: rows differ from exact ones by {difference:.2g} of their spread", stacklevel=2
    )
    return {"difference": difference}


def _pictures(source):
    return Pictures(source) if hasattr(source, "dtype") else source


def _of_frechet(found, name):
    """Return the distance or its limit as a report holds it."""
    if not name.endswith("_inf"):
        return {"value": found.value} | ({"stderr": found.stderr} if found.stderr else {})
    if found.limit is None:
        raise ValueError(
            f"metrics={name}: needs more than twice as many images as the features have "
            f"dimensions; give a larger num, or write metrics={name.removesuffix('_inf')}"
        )
    low, high = found.interval
    return {"value": found.limit, "stderr": found.limit_stderr, "low": low, "high": high}


def _mean(values):
    """Return a mean over images with its standard error, the manifold taken as given."""
    return {"value": float(values.mean()), "stderr": float(values.std() / len(values) ** 0.5)}


def _fd(generated, reference):
    first, second = Moments(), Moments()
    return float(frechet_distance(first.update(generated), second.update(reference)))


def _fake_side(generated, reference):
    return nn1_sides(generated, reference)[0]


def _real_side(generated, reference):
    return nn1_sides(generated, reference)[1]


def _in_blocks(metric):
    """Return the metric as a mean over blocks of generated rows as large as the reference.

    Rows are shuffled first (torch.randperm, seed 0): files come sorted by class.
    """

    def mean(generated, reference):
        generator = torch.Generator().manual_seed(0)
        generated, reference = (
            rows[torch.randperm(len(rows), generator=generator)] for rows in (generated, reference)
        )
        size = min(len(generated), len(reference))
        blocks = generated.split(size)
        scores = [metric(block, reference[:size]) for block in blocks if len(block) == size]
        return sum(scores) / len(scores)

    return mean
