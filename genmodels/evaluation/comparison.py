"""Several sets of images against one reference: their order, their differences, tables of them."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import PurePath
from typing import Any

import torch

from genmodels.evaluation.scorer import METRICS, Entry


@dataclass(frozen=True)
class Row:
    """A set of images and its scores.

    Args:
        name: as the user names it.
        num: of images.
        scores: {metric: {"value": v, "stderr": s, ...}}; METRIC@FEATURES with several features.
        deviations: {metric: numbers whose squares add up to stderr^2}, see Scorer.
        pairing: equal for sets whose images belong together, image by image: of the same seeds, or
            in files of the same names; None = with no other.
        seconds: {stage: seconds}.
        average: what average of a run's weights it is, if it is one of a chosen width; see Set.
    """

    name: str
    num: int
    scores: dict[str, Entry]
    deviations: dict[str, torch.Tensor] = field(default_factory=dict)
    pairing: Any = None
    seconds: dict[str, float] = field(default_factory=dict)
    average: dict[str, Any] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """Return it as a report holds it."""
        facts: dict[str, Any] = {"name": self.name, "metrics": self.scores, "num": self.num}
        return facts | {"stages": self.seconds} | self.average


def in_order(rows: Sequence[Row], metric: str) -> tuple[list[Row], str]:
    """Return (the rows from the best by this metric to the worst, which end is first, in words).

    Of a metric that alone says nothing of good and bad the highest is first.
    """
    row = METRICS.get(metric.partition("@")[0])
    better = row and (row.better or (METRICS[row.limit_of].better if row.limit_of else ""))
    if better == "half":
        return sorted(rows, key=lambda r: abs(r.scores[metric]["value"] - 0.5)), "nearest 0.5 first"
    lowest = better == "lower"
    ordered = sorted(rows, key=lambda r: r.scores[metric]["value"], reverse=not lowest)
    return ordered, "lowest first" if lowest else "highest first"


def differences(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, for all pairs of rows and each metric, the first less the second, with its error.

    {"first", "second", "metric", "value", "stderr", "paired"}. Of paired images the error is that
    of the difference, in which what both have in common cancels; of others the two errors are
    independent, the reference taken as given. Without "stderr" where it is not known.
    """
    found = []
    for one, other in combinations(rows, 2):
        paired = one.pairing is not None and one.pairing == other.pairing
        for metric in one.scores:
            a, b = one.scores[metric], other.scores[metric]
            entry: dict[str, Any] = {"first": one.name, "second": other.name, "metric": metric}
            entry["value"] = a["value"] - b["value"]
            stderr = _error(one, other, metric) if paired else _hypot(a, b)
            entry |= {} if stderr is None else {"stderr": stderr}
            found.append(entry | {"paired": paired})
    return found


def _error(one: Row, other: Row, metric: str) -> float | None:
    """Return the standard error of a difference of paired images."""
    a, b = one.deviations.get(metric), other.deviations.get(metric)
    if a is None or b is None or len(a) != len(b):
        return None
    return float((a - b).norm())


def _hypot(a: Entry, b: Entry) -> float | None:
    return math.hypot(a["stderr"], b["stderr"]) if "stderr" in a and "stderr" in b else None


def short_names(names: Sequence[str]) -> list[str]:
    """Return the names by as few of their last parts as tell them apart."""
    parts = [PurePath(name).parts or (name,) for name in names]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-length:]) for part in parts]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


def shown(entry: Mapping[str, Any]) -> str:
    """Return a score as text: 1.234 +- 0.056."""
    error = f" +- {entry['stderr']:.2g}" if "stderr" in entry else ""
    return f"{entry['value']:.5g}{error}"


def csv_of(rows: Sequence[Row]) -> str:
    """Return the rows as CSV: set, num, then each metric and METRIC_stderr, in all digits."""
    metrics = _metrics(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "num", *(part for m in metrics for part in (m, f"{m}_stderr"))])
    for row in rows:
        cells: list[Any] = [row.name, row.num]
        for metric in metrics:
            score = row.scores.get(metric, {})
            cells += [score.get("value", ""), score.get("stderr", "")]
        writer.writerow(cells)
    return text.getvalue()


def markdown_of(rows: Sequence[Row]) -> str:
    """Return the rows as a table in Markdown."""
    metrics = _metrics(rows)
    lines = [["set", "images", *metrics], ["---", *["---:"] * (1 + len(metrics))]]
    for row in rows:
        scores = [shown(row.scores[m]) if m in row.scores else "" for m in metrics]
        lines.append([row.name.replace("|", "\\|"), str(row.num), *scores])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _metrics(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(metric for row in rows for metric in row.scores))
