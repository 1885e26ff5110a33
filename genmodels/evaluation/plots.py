"""Pictures of scores."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genmodels.atomic import write_bytes
from genmodels.metrics.frechet import BlockFrechet
from genmodels.metrics.manifold import precision_recall

if TYPE_CHECKING:
    from genmodels.evaluation.comparison import Row
    from genmodels.evaluation.scorer import Scorer


def draw_scores(path: Path | str, scorer: "Scorer") -> None:
    """Write a PNG of the latest scores of a Scorer: see scores_png.

    Args:
        path: the file.
        scorer: Scorer, called with curve=True.

    Raises:
        ValueError: neither a distance from enough images nor precision and recall to draw.
    """
    data = scores_png(scorer)
    if data is None:
        raise ValueError(
            f"plot={path}: nothing to draw; ask for metrics=prc, or for fd with more than twice as "
            "many images as the features have dimensions"
        )
    write_bytes(path, data)


def scores_png(scorer: "Scorer") -> bytes | None:
    """Return a PNG of the latest scores of a Scorer, or None if there is nothing to draw.

    It is the distance against 1/n, and precision against recall for several k where these were
    asked for.

    Args:
        scorer: Scorer, called with curve=True.
    """
    from matplotlib.figure import Figure

    panels = []
    frechet, rows, reference = scorer.frechet, scorer.generated_rows, scorer.rows
    if frechet is not None and len(frechet.sizes) >= 3:
        panels.append(lambda axes: _draw_distance(axes, frechet, scorer.features.name))
    asked = {"precision", "recall"} & set(scorer.metrics)
    if asked and rows is not None and reference is not None:
        panels.append(lambda axes: _draw_precision_recall(axes, rows, reference))
    if not panels:
        return None
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        panel(axes)
    return _png(figure)


def draw_comparison(path: Path | str, rows: "Sequence[Row]", names: Sequence[str]) -> None:
    """Write a PNG of several sets: a panel for each metric, a line for each set, with error bars.

    Args:
        path: the file.
        rows: the sets from the top down.
        names: what to call them.
    """
    from matplotlib.figure import Figure

    metrics = list(rows[0].scores)
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    height = 0.9 + 0.32 * len(rows)
    figure = Figure(figsize=(1.4 + 2.9 * columns, height * lines), layout="constrained")
    every = figure.subplots(lines, columns, squeeze=False, sharey=True)
    places = range(len(rows))
    for axes, metric in zip(every.flat, metrics):
        values = [row.scores[metric]["value"] for row in rows]
        errors = [row.scores[metric].get("stderr", 0.0) for row in rows]
        axes.errorbar(values, places, xerr=errors, fmt="o", capsize=3, color="C0")
        axes.set(title=metric, yticks=places, yticklabels=names, ylim=(len(rows) - 0.5, -0.5))
        axes.locator_params(axis="x", nbins=4)
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    for axes in every.flat[len(metrics) :]:
        axes.set_visible(False)
    write_bytes(path, _png(figure))


def draw_widths(path: Path | str, rows: "Sequence[Row]") -> None:
    """Write a PNG of averages of runs: a panel for each metric over sigma_rel, a line for each run.

    Args:
        path: the file.
        rows: the sets, each with its average.
    """
    from matplotlib.figure import Figure

    metrics = list(rows[0].scores)
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = Figure(figsize=(1.0 + 3.2 * columns, 2.8 * lines), layout="constrained")
    every = figure.subplots(lines, columns, squeeze=False)
    runs = dict.fromkeys(row.average["run"] for row in rows)
    for axes, metric in zip(every.flat, metrics):
        for run in runs:
            own = [row for row in rows if row.average["run"] == run]
            own.sort(key=lambda row: row.average["sigma_rel"])
            widths = [row.average["sigma_rel"] for row in own]
            values = [row.scores[metric]["value"] for row in own]
            errors = [row.scores[metric].get("stderr", 0.0) for row in own]
            axes.errorbar(widths, values, yerr=errors, fmt="o-", capsize=3, label=run)
        axes.set(title=metric, xlabel="sigma_rel")
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    if len(runs) > 1:
        every[0][0].legend(frameon=False, fontsize=7)
    for axes in every.flat[len(metrics) :]:
        axes.set_visible(False)
    write_bytes(path, _png(figure))


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw_distance(axes: Any, frechet: BlockFrechet, name: str) -> None:
    """Draw the mean distances, the parabola in 1/n through the first three, and its limit."""
    x, y = 1 / np.array(frechet.sizes), np.array(frechet.values)
    curve = np.polynomial.Polynomial.fit(x[:3], y[:3], 2)
    line = np.linspace(0, x.max(), 100)
    limit: Any = frechet.limit
    low, high = frechet.interval
    axes.plot(line, curve(line), color="0.6", zorder=1)
    axes.plot(x, y, "o", color="C0", label="mean over sets of n images")
    axes.errorbar(
        0,
        limit,
        [[limit - low], [high - limit]],
        fmt="s",
        color="C3",
        capsize=3,
        label=f"limit {limit:.4g}, 95 %",
    )
    axes.set(xlabel="1 / n", ylabel=f"Frechet distance ({name})")
    axes.locator_params(axis="x", nbins=4)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))  # a power of ten for all ticks
    axes.legend(frameon=False)


def _draw_precision_recall(axes: Any, rows: torch.Tensor, reference: torch.Tensor) -> None:
    """Draw precision against recall for k = 1, 2, 3, 5, 8, as far as there are more rows."""
    shown: list[tuple[float, float, list[int]]] = []  # where names stand, of one point or several
    for k in (k for k in (1, 2, 3, 5, 8) if k < min(len(rows), len(reference))):
        precision, recall = (
            float(part.double().mean()) for part in precision_recall(rows, reference, k)
        )
        axes.plot(recall, precision, "o", color="C3" if k == 3 else "C0")
        near = [s for s in shown if abs(s[0] - recall) < 0.15 and abs(s[1] - precision) < 0.07]
        if near:
            near[0][2].append(k)
        else:
            shown.append((recall, precision, [k]))
    for recall, precision, ks in shown:
        left = recall > 0.6  # else it would leave the panel
        axes.annotate(
            f"k = {', '.join(map(str, ks))}",
            (recall, precision),
            (-6 if left else 6, -12),
            textcoords="offset points",
            ha="right" if left else "left",
        )
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.05), ylim=(0, 1.05))


def is_drawn(path: Path) -> bool:
    """Return whether a file is a PNG that matplotlib has drawn."""
    try:
        with open(path, "rb") as file:
            begin = file.read(256) if path.is_file() else b""
    except OSError:
        return False
    return begin.startswith(b"\x89PNG") and b"Matplotlib" in begin
