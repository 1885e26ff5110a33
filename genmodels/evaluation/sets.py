"""Sets of images, a model's or those in files, scored against one reference."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from genmodels.metrics.features import Features, load_features
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
    """

    name: str
    model: Any = None


def sets_of(options: "ScoreOptions", models: Mapping[str, Any]) -> dict[str, Set]:
    """Return {name: Set} of the images that are to be scored."""
    sets = [Set(path, model) for path, model in models.items()]
    sets = sets or [Set(name) for name in image_names(options.images)]
    return {each.name: each for each in sets}


class Scoring:
    """One reference, and what is scored against it, each in one pass.

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
        self.features = named_features(options, device)
        self.source = options.reference or options.data or trained_on(sets)
        self.reference = open_reference(
            self.source,
            self.features,
            splits=scoring.need_splits(options.metrics),
            key="reference" if options.reference else "data",
            read_pickle=read_pickle,
            **reading_options(options, model),
        )
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
        self.kept: list[Any] = list(scoring.tables_to_keep(options.metrics, options.equal))
        self.classes: tuple[list[str], list[str]] | None = None  # of the images, of the reference
        if options.per_class:
            self.classes = self._classes(named)
            self.kept[0] = True
        against = self.reference.images or self.reference.source
        self.keep = KeptFeatures(options.keep) if options.keep else None
        self.scorer = scoring.Scorer(
            options.metrics,
            self.features,
            reference=self.reference.source,
            reference_images=self.reference.images,
            equal=options.equal,
            resamples=options.resamples,
            batch=options.feature_batch or None,
            progress=True,
            num=min(map(len, self.pictures)),
            store=Store.of(options.out, "reference", against, self.features, self.kept),
            keep=self.keep,
            keep_rows=bool(self.classes),
            **self.reference.splits,
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
            check_shape(self.source, known.get("shape"), each.model)
            made = generated(each.model, options, self.extra, known.get("num"))
            return made, ("seeds", made.seeds, made.labels), None
        images = read_source(each.name, **reading_options(options))
        pixels, names = images.pixels, list(images.files)
        if options.num:
            key = f"images={each.name}"
            pixels, names = some_of(key, pixels, names, options.num, options.seed)
        pictures = Pictures(pixels)
        check_sizes(each.name, pictures.shape, known.get("shape"), self.features)
        by_name = any(PurePath(name).suffix for name in names)  # those of arrays are numbers
        return pictures, ("files", tuple(names)) if by_name else None, images

    def score(self, number: int, label: str = "images") -> dict[str, Any]:
        """Return the scores of a set, by its number.

        Args:
            number: of the set.
            label: of its bar.
        """
        options, pictures = self.options, self.pictures[number]
        parts = None
        if not options.save_images.endswith(".npz"):  # whose images are held, not stored
            kept = [*self.kept, self.scorer.moments.mean.tolist(), options.save_images]
            name = f"images{number + 1 if number else ''}"
            parts = Store.of(options.out, name, pictures, self.features, kept)
        curve = bool(options.plot) and len(self.pictures) == 1
        if options.compile and isinstance(pictures, Generated):
            self.scorer.seconds["warm_up"] = round(pictures.warm_up(), 2)
        scores = self.scorer(pictures, options.seed, store=parts, curve=curve, label=label)
        if isinstance(pictures, Generated) and options.save_images:
            pictures.write_npz()
        if self.keep:
            self.keep.write()
        return scores

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the reference and the features."""
        known = self.reference.known
        sources = (self.reference.source, self.reference.images, *self.pictures)
        fast = scoring.fast_difference(self.features, *sources)
        facts = {"reference_num": known.get("num"), "features": describe(self.features) | fast}
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
    pictures, features, more = work.pictures[0], work.features, work.facts()
    facts = {"data": work.source, "num": len(pictures)} | more
    facts |= {"stages": work.scorer.seconds, "rows": [], "scorer": work.scorer}
    facts |= {"per_class": per_class} if work.classes else {}
    mode = "" if features.mode == "exact" else f", mode {features.mode}"
    title = f"against {work.source}: {len(pictures)} images, features {features.name}{mode}"
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
            "images": work.scorer.seconds[name],
            "scores": work.scorer.seconds.get("scores", 0),
        }
        if options.compile:
            stages["warm_up"] = work.scorer.seconds["warm_up"]
        num = len(work.pictures[number])
        deviations = dict(work.scorer.deviations)
        rows.append(Row(each, num, scores, deviations, work.pairings[number], stages))
    if rank() != 0:
        return [], {}
    first = next(iter(work.scorer.metrics))
    rows, ends = in_order(rows, first)
    facts = {"sets": [row.entry() for row in rows], "differences": differences(rows)}
    facts |= {"data": work.source, "sorted_by": first, "order": ends} | work.facts()
    return rows, facts | {"stages": {"reference": work.scorer.seconds.get("reference", 0.0)}}


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
    model: Any, options: "ScoreOptions", extra: dict[str, Any], reference_num: int | None
) -> Generated:
    """Return the model's images as a source that makes them when they are read."""
    if not (options.num or options.seeds or reference_num):
        raise ValueError("num=0: this reference does not say how many images it has; give num=")
    seeds = seed_list(options.num or reference_num or 1, options.seed, options.seeds)
    labels = generation.labels_for(seeds, options.labels, model.classes, model.present)
    settings = extra | {key: getattr(options, key) for key in ("batch", "precision", "noise")}
    settings |= generation.speed_up([model, extra.get("guide")], options, len(seeds))
    return Generated(model, seeds, labels, save=options.save_images, **settings)


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
