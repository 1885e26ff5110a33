"""Sets of images, a model's or those in files, scored against one reference."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch

from genmodels import generation
from genmodels.config.words import seed_list
from genmodels.data.source import SourceImages, read_source
from genmodels.distributed import rank
from genmodels.evaluation import scorer as scoring
from genmodels.evaluation.comparison import Row, differences, in_order, short_names
from genmodels.evaluation.kept import KeptFeatures
from genmodels.evaluation.notes import note_copies, note_files
from genmodels.evaluation.passes import Store
from genmodels.evaluation.per_class import (
    check_common,
    chosen_classes,
    classes_of,
    generated_classes,
    metrics_of_classes,
    score_classes,
)
from genmodels.evaluation.references import PickleReader, open_reference
from genmodels.evaluation.sources import (
    Generated,
    Pictures,
    check_shape,
    reading_options,
    some_of,
)
from genmodels.metrics.features import FEATURES, Features, load_features
from genmodels.metrics.features.extractors import INCEPTIONS, WITH_WEIGHTS
from genmodels.metrics.stats import describe

if TYPE_CHECKING:
    from genmodels.evaluation.options import FeatureOptions, ScoreOptions

Result = tuple[dict[str, Any], dict[str, Any], str]  # scores, facts for the report, title


def image_names(text: str) -> list[str]:
    """Return the sets that images= names: A, or A,B,C; what is there is one, commas or not."""
    if not text or Path(text).exists():
        return [text] if text else []
    return [name.strip() for name in text.split(",")]


@dataclass(frozen=True)
class Set:
    """A set of images to score: a model's, or those that a word names.

    Args:
        name: the MODEL, or what stands in images=.
        model: a method, or None.
        average: of a run's averages {"run", "sigma_rel", "average": a line about it}.
    """

    name: str
    model: Any = None
    average: dict[str, Any] = field(default_factory=dict)


def sets_of(options: "ScoreOptions", models: Mapping[str, Any]) -> dict[str, Set]:
    """Return {name: Set} of the images that are to be scored."""
    sets = [Set(path, model) for path, model in models.items()]
    sets = sets or [Set(name) for name in image_names(options.images)]
    return {each.name: each for each in sets}


def width_names(paths: Sequence[str], widths: Sequence[float]) -> list[str]:
    """Return what the sets of runs are called of which each width of the average is one."""
    return [f"{path}/sigma_rel={width:g}" for path in paths for width in widths] or list(paths)


class Scoring:
    """One reference, and what is scored against it.

    With several features every image is made or read for each of them; a model's are made once.

    Attributes:
        features, scorers: one of each for every features= that was named.

    Args:
        sets: of images.
        options: of the command.
        extra: options of the method, or of the methods.
        device: where to compute.
        read_pickle: reads a .pkl of arrays, see references.
    """

    def __init__(
        self,
        sets: Sequence[Set],
        options: "ScoreOptions",
        extra: dict[str, Any],
        device: Any,
        read_pickle: Any,
    ):
        self.options, self.extra = options, dict(extra)
        model = sets[0].model
        self.features = all_features(options, device)
        self.metrics = [list(options.metrics)]
        if len(self.features) > 1:
            self.metrics = scoring.of_features(options.metrics, self.features)
        self.source = options.reference or options.data or trained_on(sets)
        self.references = [
            open_reference(
                self.source,
                features,
                splits=scoring.need_splits(options.metrics),
                key="reference" if options.reference else "data",
                read_pickle=read_pickle,
                **reading_options(options, model),
            )
            for features in self.features
        ]
        self.reference = self.references[0]
        self.pictures: list[Generated | Pictures] = []
        self.pairings: list[Any] = []
        named: dict[str, SourceImages] = {}
        for each in sets:
            pictures, pairing, images = self._pictures_of(each)
            self.pictures.append(pictures)
            self.pairings.append(pairing)
            named |= {f"images={each.name}": images} if images else {}
        if self.reference.named and not model:
            named[f"reference={self.source}"] = self.reference.named
        note_files(named)
        self.classes: tuple[list[str], list[str]] | None = None  # of the images, of the reference
        if options.per_class:
            self.classes = self._classes(named)
        self.keep = KeptFeatures(options.keep) if options.keep else None
        self.kept = [list(scoring.tables_to_keep(m, options.equal)) for m in self.metrics]
        for kept in self.kept:
            kept[0] |= bool(self.classes)
        self.warm_up: dict[str, float] = {}  # seconds of the latest set's
        self.scorers = [self._scorer(k) for k in range(len(self.features))]
        self.scorer = self.scorers[0]

    def _scorer(self, k: int) -> scoring.Scorer:
        """Return what scores by the k-th features."""
        options, features, reference = self.options, self.features[k], self.references[k]
        against = reference.images or reference.source
        return scoring.Scorer(
            self.metrics[k],
            features,
            reference=reference.source,
            reference_images=reference.images,
            equal=options.equal,
            resamples=options.resamples,
            batch=options.feature_batch or None,
            progress=True,
            num=min(map(len, self.pictures)),
            store=Store.of(
                options.out, _pass_name("reference", k), against, features, self.kept[k]
            ),
            keep=self.keep,
            keep_rows=bool(self.classes),
            **reference.splits,
        )

    def _classes(self, named: Mapping[str, SourceImages]) -> tuple[list[str], list[str]]:
        """Return (class of each image of the only set, of each of the reference)."""
        options, pictures = self.options, self.pictures[0]
        metrics_of_classes(options.metrics, options.equal)
        real = classes_of(self.reference.named, f"reference={self.source}")
        if isinstance(pictures, Generated):
            made = generated_classes(pictures)
        else:
            key = f"images={options.images}"
            made = classes_of(named.get(key), key)
            made = chosen_classes(made, key, options.num, options.seed)
        check_common(made, real)
        return made, real

    def _pictures_of(self, each: Set) -> tuple[Generated | Pictures, Any, SourceImages | None]:
        """Return (images, what pairs them with another set's, their files)."""
        options, known = self.options, self.reference.known
        if each.model:
            key = "reference" if options.reference else "data"
            check_shape(self.source, known.get("shape"), each.model, key, files=True)
            again = len(self.features) > 1
            made = generated(each.model, options, self.extra, known.get("num"), again)
            return made, ("seeds", made.seeds, made.labels), None
        images = read_source(each.name, **reading_options(options))
        pixels, names = images.pixels, list(images.files)
        if options.num:
            key = f"images={each.name}"
            pixels, names = some_of(key, pixels, names, options.num, options.seed)
        pictures = Pictures(pixels)
        for features in self.features:
            check_sizes(each.name, pictures.shape, known.get("shape"), features)
        by_name = any(PurePath(name).suffix for name in names)  # those of arrays are numbers
        return pictures, ("files", tuple(names)) if by_name else None, images

    def score(self, number: int, label: str = "images") -> dict[str, Any]:
        """Return the scores of a set, by its number.

        Args:
            number: of the set.
            label: of its bar.
        """
        options, pictures = self.options, self.pictures[number]
        self.warm_up = {}
        if options.compile and isinstance(pictures, Generated):
            self.warm_up = {"warm_up": round(pictures.warm_up(), 2)}
        scores: dict[str, Any] = {}
        for k, scorer in enumerate(self.scorers):
            parts = None
            if not options.save_images.endswith(".npz"):  # whose images are held, not stored
                kept = [*self.kept[k], scorer.moments.mean.tolist(), options.save_images]
                name = _pass_name(f"images{number + 1 if number else ''}", k)
                parts = Store.of(options.out, name, pictures, self.features[k], kept)
            curve = bool(options.plot) and len(self.pictures) == 1
            found = scorer(pictures, options.seed, store=parts, curve=curve, label=label)
            scores |= self.named(found, k)
        if isinstance(pictures, Generated):
            pictures.forget()
            if options.save_images:
                pictures.write_npz()
        if self.keep:
            self.keep.write()
        return scores

    def named(self, found: Mapping[str, Any], k: int) -> dict[str, Any]:
        """Return what the k-th scorer has found; of several its features are part of each name."""
        suffix = f"@{self.features[k].name}" if len(self.features) > 1 else ""
        return {f"{name}{suffix}": value for name, value in found.items()}

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage."""
        named = [self.named(scorer.seconds, k) for k, scorer in enumerate(self.scorers)]
        return {stage: s for of_one in named for stage, s in of_one.items()} | self.warm_up

    def deviations(self) -> dict[str, torch.Tensor]:
        """Return those of the latest images, see Scorer."""
        named = [self.named(scorer.deviations, k) for k, scorer in enumerate(self.scorers)]
        return {metric: numbers for of_one in named for metric, numbers in of_one.items()}

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the reference and the features."""
        known = self.reference.known
        sources = (self.reference.source, self.reference.images, *self.pictures)
        features = [describe(f) | scoring.fast_difference(f, *sources) for f in self.features]
        facts = {"reference_num": known.get("num"), "features": features[0]}
        if len(features) > 1:
            facts["features"] = features
        if self.reference.images:
            facts["reference_images"] = len(self.reference.images)
        if "file" in known:
            facts["reference_file"] = known["file"]
        if self.options.keep and self.keep:
            facts["kept"] = {"file": self.options.keep, "reused": len(self.keep.read)}
        return facts

    def note_copies(self, name: str) -> None:
        """Warn of copies among the latest images, and of those that are in the reference."""
        reference, marks = self.scorer.marks
        if marks is not None and self.pictures[0].shape != (2, 1, 1):  # points coincide as bytes
            note_copies(name, marks, reference)


def trained_on(sets: Sequence[Set]) -> str:
    """Return the data set that all models were trained on.

    Raises:
        ValueError: there are several.
    """
    names = list(dict.fromkeys(each.model.cfg.data.name for each in sets))
    if len(names) > 1:
        raise ValueError(f"data=: the models were trained on {', '.join(names)}; name one, data=")
    return names[0]


def score_images(
    model: Any,
    options: "ScoreOptions",
    extra: dict[str, Any],
    device: torch.device,
    read_pickle: PickleReader,
) -> Result:
    """Return (scores, facts, title) of the images of a model or a folder; see Scoring."""
    only = Set("", model) if model else Set(image_names(options.images)[0])
    work = Scoring([only], options, extra, device, read_pickle)
    scores = work.score(0)
    per_class = {}
    if work.classes:
        equal = options.equal
        per_class = score_classes(work.scorer, options.metrics, *work.classes, equal, options.seed)
    work.note_copies("the model" if model else f"images={only.name}")
    pictures, more = work.pictures[0], work.facts()
    facts = {"data": work.source, "num": len(pictures)} | more
    facts |= {"stages": work.seconds(), "rows": [], "scorer": work.scorer}
    facts |= {"per_class": per_class} if work.classes else {}
    mode = "" if options.mode == "exact" else f", mode {options.mode}"
    names = " and ".join(features.name for features in work.features)
    title = f"against {work.source}: {len(pictures)} images, features {names}{mode}"
    return scores, facts, title


def compare_sets(
    sets: Mapping[str, Set],
    options: "ScoreOptions",
    extra: dict[str, Any],
    device: torch.device,
    read_pickle: PickleReader,
) -> tuple[list[Row], dict[str, Any]]:
    """Return (the rows of several sets in the order of the first metric, facts for the report)."""
    work = Scoring(list(sets.values()), options, extra, device, read_pickle)
    counts = {len(pictures) for pictures in work.pictures}
    if len(counts) > 1:
        warnings.warn(
            f"the sets have {min(counts)} to {max(counts)} images: a Frechet distance is "
            "the larger the fewer there are; compare equal numbers (num=)",
            stacklevel=1,
        )
    rows = []
    for number, name in enumerate(short_names(list(sets))):
        each = list(sets)[number]
        scores = work.score(number, name)
        work.note_copies(f"images={each}" if options.images else each)
        stages = {
            stage.replace(name, "images", 1): seconds
            for stage, seconds in work.seconds().items()
            if stage.partition("@")[0] in (name, "scores")
        }
        stages |= work.warm_up
        num, pairing = len(work.pictures[number]), work.pairings[number]
        average = sets[each].average
        rows.append(Row(each, num, scores, work.deviations(), pairing, stages, average))
    if rank() != 0:
        return [], {}
    first = next(iter(rows[0].scores))
    rows, ends = in_order(rows, first)
    facts = {"sets": [row.entry() for row in rows], "differences": differences(rows)}
    facts |= {"data": work.source, "sorted_by": first, "order": ends} | work.facts()
    reference = {k: s for k, s in work.seconds().items() if k.partition("@")[0] == "reference"}
    return rows, facts | {"stages": reference or {"reference": 0.0}}


def _pass_name(name: str, k: int) -> str:
    """Return what the parts of the pass of the k-th features are called."""
    return f"{name}.{k + 1}" if k else name


def check_sizes(
    source: str,
    shape: tuple[int, ...],
    reference_shape: Sequence[int] | None,
    features: Features,
) -> None:
    """Raise ValueError if pixels are to be compared of images of two shapes (C, H, W)."""
    alike = not reference_shape or shape == tuple(reference_shape)
    if not alike and features.dim is None and features.resize == "none":
        raise ValueError(
            f"images={source}: have shape {shape}, the reference {tuple(reference_shape or ())}: "
            f"features={features.name} needs equal ones"
        )


def generated(
    model: Any,
    options: "ScoreOptions",
    extra: dict[str, Any],
    reference_num: int | None,
    again: bool = False,
) -> Generated:
    """Return the model's images as a source that makes them when they are read."""
    if not (options.num or options.seeds or reference_num):
        raise ValueError("num=0: this reference does not say how many images it has; give num=")
    seeds = seed_list(options.num or reference_num or 1, options.seed, options.seeds)
    labels = generation.labels_for(seeds, options.labels, model.classes, model.present)
    settings = extra | {key: getattr(options, key) for key in ("batch", "precision", "noise")}
    settings |= generation.speed_up([model, extra.get("guide")], options, len(seeds))
    return Generated(model, seeds, labels, save=options.save_images, again=again, **settings)


def all_features(options: "ScoreOptions", device: torch.device) -> list[Features]:
    """Return the features that features=A,B,... names, with weights=A,B and sha256=A,B.

    One word of weights is for each network that takes a file; resize= is Inception's.

    Raises:
        ValueError: as many of one as of the other are needed, or load_features refuses one.
    """
    names = image_names(options.features)
    if len(names) < 2:
        return [named_features(options, device)]
    columns = {}
    for key, text in (("weights", options.weights), ("sha256", options.sha256)):
        words = [word.strip() for word in text.split(",")]
        if key == "weights" and len(words) == 1:
            words = [text if name in WITH_WEIGHTS else "" for name in names]
        elif not text:
            words = [""] * len(names)
        if len(words) != len(names):
            raise ValueError(
                f"{key}={text}: there are {len(names)} features; name one for each, {key}=A,B, "
                "with nothing between the commas where there is none"
            )
        columns[key] = words
    takers = {
        "weights": set(WITH_WEIGHTS),
        "resize": set(INCEPTIONS),
        "weights_are_code": set(names).difference(FEATURES),
    }
    for key, able in takers.items():
        value = getattr(options, key)
        if value and "," not in str(value) and not able & set(names):
            raise ValueError(f"{key}={value}: none of features={options.features} takes it")
    found = [
        named_features(
            replace(
                options,
                features=name,
                weights=weights,
                sha256=sha256,
                resize=options.resize if name in INCEPTIONS else "",
                weights_are_code=options.weights_are_code and name not in FEATURES,
            ),
            device,
        )
        for name, weights, sha256 in zip(names, columns["weights"], columns["sha256"])
    ]
    if len({features.name for features in found}) < len(found):
        raise ValueError(f"features={options.features}: names one twice; once each")
    return found


def named_features(options: "FeatureOptions", device: torch.device) -> Features:
    """Return the features that the options name."""
    return load_features(
        options.features,
        options.weights or None,
        device,
        mode=options.mode,
        resize=options.resize or None,
        sha256=options.sha256 or None,
        weights_are_code=options.weights_are_code,
    )
