"""Scores of each class by itself: generated images of a class against real ones of that class."""

import warnings
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import torch

from genmodels.data.source import SourceImages
from genmodels.distributed import alone
from genmodels.evaluation.passes import Scored
from genmodels.evaluation.scorer import Scorer, metrics_to_score
from genmodels.evaluation.sources import Generated, some_of

_OTHER = {"logits", "train", "held_out"}  # what a metric of one class cannot be made of


def metrics_of_classes(words: Sequence[str], equal: bool = False) -> list[str]:
    """Return the metrics that words ask for and that one class can have.

    Raises:
        ValueError: there is none.
    """
    metrics = metrics_to_score(words, equal)
    names = [n for n, m in metrics.items() if not _OTHER & set(m.needs) and not m.limit_of]
    if not names:
        raise ValueError(
            f"per_class=true: none of metrics={','.join(words)} is one of single classes; add fd "
            "or prc"
        )
    return names


def classes_of(images: SourceImages | None, key: str) -> list[str]:
    """Return the class of each image: its label in a data set, of files the folder they are in.

    Args:
        images: as they were read; None: they were not.
        key: what errors call them.

    Raises:
        ValueError: they have no classes.
    """
    if images is not None and images.labels is not None and (images.labels >= 0).all():
        return [str(label) for label in images.labels.tolist()]
    folders = [PurePath(name).parts[:-1] for name in images.files] if images else []
    if not folders or not all(folders):
        raise ValueError(
            f"per_class=true: {key} has no classes; name a data set with labels, or a folder with "
            "a folder for each class"
        )
    return ["/".join(parts) for parts in folders]


def generated_classes(generated: Generated) -> list[str]:
    """Return the class of each image of a model.

    Raises:
        ValueError: it is not known.
    """
    if generated.labels is None:
        raise ValueError(
            "per_class=true: the classes of a model's images are known with labels= only; write "
            "labels=balanced (of a conditional model)"
        )
    return [str(label) for label in generated.labels]


def chosen_classes(classes: Sequence[str], key: str, num: int, seed: int) -> list[str]:
    """Return the classes of the images that num= draws."""
    if not num:
        return list(classes)
    numbers, _ = some_of(key, torch.arange(len(classes)), [], num, seed)
    return [classes[int(number)] for number in numbers]  # type: ignore[union-attr]


def check_common(made: Sequence[str], real: Sequence[str]) -> None:
    """Raise ValueError if no class is on both sides."""
    if not set(made) & set(real):
        some = [", ".join(sorted(set(side))[:3]) for side in (made, real)]
        raise ValueError(
            f"per_class=true: no class is on both sides, the images have {some[0]}, the reference "
            f"{some[1]}; give folders or labels the same names"
        )


def score_classes(
    scorer: Scorer,
    words: Sequence[str],
    made: Sequence[str],
    real: Sequence[str],
    equal: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Return {class: {"num", "reference_num", "metrics"}}; classes of too few images are left out.

    Args:
        scorer: that has scored the images, and keeps the rows of both sides.
        words: metrics.
        made, real: the class of each image of either side.
        equal, seed: as for Scorer.
    """
    names = metrics_of_classes(words, equal)
    least = max(metric.least for metric in metrics_to_score(names, equal).values())
    rows, reference = scorer.generated_rows, scorer.rows
    if rows is None or reference is None:  # of another process
        return {}
    found: dict[str, dict[str, Any]] = {}
    few: list[str] = []
    for name in sorted(set(made) & set(real), key=lambda text: (len(text), text)):
        ours = rows[torch.tensor([each == name for each in made])]
        theirs = reference[torch.tensor([each == name for each in real])]
        if min(len(ours), len(theirs)) < least:
            few.append(name)
            continue
        with alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # n <= D is said once, below
            of_class = Scorer(
                names,
                scorer.features,
                reference=Scored.of_rows(theirs, scorer.features),
                equal=equal,
                resamples=scorer.resamples,
                num=len(ours),
            )
            scores = of_class.of_rows(ours, seed=seed)
        found[name] = {"num": len(ours), "reference_num": len(theirs), "metrics": scores}
    if few:
        warnings.warn(
            f"per_class: {len(few)} classes have fewer than {least} images on a side and are left "
            f"out ({', '.join(few[:5])})",
            stacklevel=2,
        )
    dim = rows.shape[1]
    smallest = min((min(c["num"], c["reference_num"]) for c in found.values()), default=dim + 1)
    if smallest <= dim:
        warnings.warn(
            f"per_class: classes of as few as {smallest} images in {dim} dimensions: their "
            "Frechet distances are far too large; compare them with each other only",
            stacklevel=2,
        )
    return found
