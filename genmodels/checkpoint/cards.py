"""The model card of an export: README.md with a header that the Hugging Face hub reads."""

import csv
import json
import math
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from genmodels import data, generation
from genmodels.checkpoint.hub import repository
from genmodels.config import Section, check, setting
from genmodels.images import contact_sheet, png_bytes
from genmodels.run import Run

GRID = "samples.png"  # beside the card
NO_LICENSE = "none is stated; ask whoever made this model before you use it"
_COUNT, _SECONDS = 16, 60  # images of a grid, and how long they may take
# What public data sets are called on the hub.
_ON_HUB = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}


@dataclass
class CardOptions(Section):
    """What a card says beyond the model."""

    license: str = setting("", "as the hub writes it: apache-2.0, mit, cc-by-nc-4.0 ...")
    scores: str = setting("", "JSON of evaluate.py; empty: those made in the run's training")
    samples: int = setting(
        -1, "images of its grid; 0: none; -1: 16 if they take less than a minute", ge=-1, le=256
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            re.fullmatch(r"([a-z0-9][a-z0-9.-]*)?", self.license),
            "license",
            "is written in small letters without blanks, as apache-2.0; for one of your own write "
            "other, and the terms into the card",
        )


class Score(NamedTuple):
    """A value of a metric.

    Attributes:
        metric: its name, "fd(digits)" or "fd".
        value: what was measured.
        data: what the images were scored against.
        num: of the images; 0: unknown.
        stderr: standard error, if it is known.
        note: when it was measured, in words.
    """

    metric: str
    value: float
    data: str
    num: int
    stderr: float | None = None
    note: str = ""


def scores_of_report(path: Path | str) -> list[Score]:
    """Return the scores in the JSON of an evaluation of one model.

    Raises:
        ValueError: it is none, or one of several sets.
    """
    from genmodels.metrics.clustering import CLUSTERING  # imports SciPy

    try:
        report = json.loads(Path(path).read_bytes())
        # A path of one's own machine says nothing to others.
        source = re.split(r"[/\\]", str(report.get("data", "")))[-1]
        num = report.get("num")
        num = num if isinstance(num, int) else 0
        several = "sets" in report
        # Beside scores of images those of clusters have other data, whose number is not there.
        clustered = re.split(r"[/\\]", str(report.get("options", {}).get("cluster", "")))[-1]
        clustered = clustered if "reference_num" in report else ""
        features = str((report.get("features") or {}).get("name", ""))
        found = [
            Score(str(name), float(of["value"]), clustered, 0, of.get("stderr"))
            if clustered and name in CLUSTERING
            else Score(
                in_features(str(name), features), float(of["value"]), source, num, of.get("stderr")
            )
            for name, of in ({} if several else report["metrics"]).items()
            if of["value"] is not None and math.isfinite(of["value"])
        ]
    except OSError as error:
        raise ValueError(f"scores={path}: cannot be read ({error.strerror})") from None
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        raise ValueError(f"scores={path}: is no JSON that evaluate.py wrote with out=") from None
    check(not several, "scores", path, "is of several sets; name one of one model")
    return found


def in_features(metric: str, features: str) -> str:
    """Return a metric's name with its features, fd(digits), unless it has none or says it."""
    from genmodels.metrics.clustering import CLUSTERING

    plain = not features or "(" in metric or metric in CLUSTERING
    return metric if plain else f"{metric}({features})"


def scores_of_run(path: Path, step: int, name: str, features: str = "") -> list[Score]:
    """Return the latest scores that a training made of itself up to a step; [] of an export.

    Args:
        path: run folder or its .ckpt.
        step: of the model.
        name: of the data set.
        features: in which they were made, "" if unknown.
    """
    table = Run(path if path.is_dir() else path.resolve().parents[1]).metrics
    if not table.is_file():
        return []
    found: list[Score] = []
    with open(table, newline="") as file:
        for row in csv.DictReader(file):
            then = int(row["step"]) if (row.get("step") or "").isdecimal() else step + 1
            keys = [k for k in row if k and k.startswith("eval/") and row[k]]
            if not keys or then > step:
                continue
            found = []
            for key in keys:
                metric, _, num = key.removeprefix("eval/").rpartition("_")
                if math.isfinite(value := float(row[key])):
                    note = f"in training, after step {then}"
                    metric = in_features(metric, features)
                    found.append(Score(metric, value, f"{name}:train", int(num), note=note))
    return found


def sample_grid(model: Any, count: int = -1) -> bytes | None:
    """Return a grid of images of the seeds 0, 1, ..., as PNG, or None.

    Args:
        model: a method; one that restores pictures, or makes points, has no grid, nor has one (a
            warning says so) whose images are not numbers.
        count: of the images; 0: none; -1: 16, unless they would take longer than a minute.
    """
    of_latents = bool(model.cfg.data.vae.mean)
    if not count or model.ANY_SIZE or not (of_latents or model.shape[0] in (1, 3)):
        return None
    try:
        generation.picture_shape(model)
    except ValueError as error:
        warnings.warn(f"samples={count}: the card has no grid: {error}", stacklevel=2)
        return None
    was = model.training
    model.eval()
    try:
        if count < 0:
            count, begun = _COUNT, time.monotonic()
            _images(model, 1)
            if (one := time.monotonic() - begun) * count > _SECONDS:
                warnings.warn(
                    f"samples=-1: one image takes {one:.0f} s here, so the card has no grid of "
                    f"{count}; samples={count} makes it all the same",
                    stacklevel=2,
                )
                return None
        return png_bytes(_images(model, count))
    except generation.NonFinite as error:
        warnings.warn(f"samples={count}: the card has no grid: {error}", stacklevel=2)
        return None
    finally:
        model.train(was)


def _images(model: Any, count: int) -> Any:
    """Return the sheet of that many images, or of so many that each class has as many."""
    import torch

    labels, columns = generation.class_grid(model, count)
    seeds = range(len(labels) if labels else count)
    made = generation.generate(model, seeds, labels, batch=_COUNT, progress=len(seeds) > 1)
    return contact_sheet(torch.cat([pictures for _, _, pictures in made]), columns)


def model_card(
    model: Any,
    name: str,
    steps: int | None,
    weights: str = "",
    *,
    license: str = "",
    scores: Sequence[Score] = (),
    grid: bool = False,
) -> str:
    """Return the README.md of an export.

    Args:
        model: a method.
        name: of the folder, or OWNER/NAME on the hub.
        steps: optimizer steps it was trained for; None: not known.
        weights: what the weights are, if not what the config says.
        license: of the model, an identifier of the hub; "": the card says that there is none.
        scores: to be told of.
        grid: whether GRID lies beside it.
    """
    cfg, learned = model.cfg, model.learned_from()
    terms = data.data_set(cfg.data.name).terms
    averaged = cfg.ema.sigma_rel or cfg.ema.half_life
    weights = weights or ("EMA weights" if averaged else "Raw weights")
    size = cfg.data.batch_size
    trained = f"an unknown number of steps of {size} images"
    if steps is not None:
        trained = f"{steps} steps of {size} images\n  ({steps * size:,} in all)"
    labels = "class-conditional" if cfg.data.labels else "unconditional"
    words, call = "num=64 out=samples", "images = model.sample(range(16))  # in [-1, 1]"
    if model.ANY_SIZE:
        law = next(iter(model.DENOISE_LAWS))
        words = f"denoise=PICTURE_OR_FOLDER law={law} out=restored"
        call = f'restored, levels = model.restore(noisy, "{law}")  # (B, C, H, W) in [-1, 1]'
    return f"""---
{_header(model, name, license, scores)}
---
# {name}

{type(cfg.method).__doc__} Network: {cfg.network.name}. {weights}.

- Data: {cfg.data.name}, {" x ".join(map(str, cfg.data.shape))}. {terms}
- Training: `{cfg.name}`, {trained}, seed {cfg.seed}; every setting is in config.json.
{_vae(cfg.data.vae)}- {f"Learned from: {learned}" if learned else f"Labels: {labels}"}.
- Licence of the model: {license or NO_LICENSE}.
{_picture(grid)}{_table(scores)}
```
genmodels sample {name} {words}
```

```python
import genmodels

model = genmodels.load("{name}")
{call}
```
"""


def _header(model: Any, name: str, license: str, scores: Sequence[Score]) -> str:
    """Return the YAML that the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    cfg = model.cfg
    task = "image-to-image" if model.ANY_SIZE else "unconditional-image-generation"
    words = "image-restoration" if model.ANY_SIZE else "image-generation"
    of_data = _data_on_hub(cfg.data)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=_type_of(score.data, of_data, cfg.data.name),
            dataset_name=score.data or cfg.data.name,
            dataset_split=score.data.partition(":")[2] or None,
            metric_type=score.metric.partition("(")[0],
            metric_name=_metric(score),
            metric_value=score.value,
        )
        for score in scores
    ]
    header = ModelCardData(
        license=license or None,
        library_name="genmodels",
        # Of points in the plane there are no images to make.
        pipeline_tag=task if model.ANY_SIZE or model.shape[0] != 2 else None,
        tags=[words, cfg.method.name],
        datasets=[of_data] if of_data else None,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return header.to_yaml()


def _type_of(scored: str, of_data: str, trained: str) -> str:
    """Return what the hub calls the set of a score, which need not be what the model learned."""
    name = scored.partition(":")[0] or trained
    if name == trained:
        return of_data or trained
    return _ON_HUB.get(name) or re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or trained


def _data_on_hub(settings: Any) -> str:
    """Return what the hub calls a data set, or ""."""
    if settings.name == "hf" and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", settings.root):
        return "" if Path(settings.root).exists() else settings.root
    return _ON_HUB.get(settings.name, "")


def _metric(score: Score) -> str:
    return f"{score.metric} of {score.num} images" if score.num else score.metric


def _vae(settings: Any) -> str:
    """Return what decodes latents, nothing of pictures."""
    if not settings.mean:
        return ""
    name = vae_to_share(settings.name)
    return f"- It makes latents, decoded by the VAE {name or 'that encoded them: vae=FOLDER'}.\n"


def vae_to_share(name: str) -> str:
    """Return the name of a VAE on the hub, nothing of one in a folder of this machine."""
    return name if repository(name) else ""


def _picture(grid: bool) -> str:
    return f"\n![images of the seeds 0, 1, ...]({GRID})\n" if grid else ""


def _table(scores: Sequence[Score]) -> str:
    """Return the scores as a table."""
    if not scores:
        return ""
    lines = ["\n| metric | value | against |", "|---|---|---|"]
    for score in scores:
        error = f" +- {score.stderr:.2g}" if score.stderr else ""
        note = f" ({score.note})" if score.note else ""
        lines.append(f"| {_metric(score)} | {score.value:.5g}{error} | {score.data}{note} |")
    return "\n".join(lines) + "\n"
