"""Pictures of scores."""

import io

import numpy as np

from genmodels.atomic import write_bytes
from genmodels.metrics.manifold import precision_recall


def draw(path, scorer):
    """Write a PNG of what a Scorer found in its last call: distance against 1/n, and precision
    against recall for several k where these were asked for.

    Args:
        path: the file.
        scorer: Scorer, called with curve=True.

    Raises:
        ValueError: neither a distance from enough images nor precision and recall to draw.
    """
    from matplotlib.figure import Figure

    panels = []
    if scorer.frechet is not None and len(scorer.frechet.sizes) >= 3:
        panels.append(lambda axes: _distance(axes, scorer.frechet, scorer.features.name))
    if {"precision", "recall"} & set(scorer.metrics):
        panels.append(lambda axes: _neighbours(axes, scorer.generated_rows, scorer.rows))
    if not panels:
        raise ValueError(
            f"plot={path}: nothing to draw; ask for metrics=prc, or for fd with more than twice as "
            "many images as the features have dimensions"
        )
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        panel(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_bytes(path, buffer.getvalue())


def _distance(axes, found, name):
    """Draw the mean distances, the parabola in 1/n through the first three, and its limit."""
    x, y = 1 / np.array(found.sizes), np.array(found.values)
    curve = np.polynomial.Polynomial.fit(x[:3], y[:3], 2)
    line = np.linspace(0, x.max(), 100)
    low, high = found.interval
    axes.plot(line, curve(line), color="0.6", zorder=1)
    axes.plot(x, y, "o", color="C0", label="mean over sets of n images")
    axes.errorbar(
        0,
        found.limit,
        [[found.limit - low], [high - found.limit]],
        fmt="s",
        color="C3",
        capsize=3,
        label=f"limit {found.limit:.4g}, 95 %",
    )
    axes.set(xlabel="1 / n", ylabel=f"Frechet distance ({name})")
    axes.legend(frameon=False)


def _neighbours(axes, rows, real):
    """Draw precision against recall for k = 1, 2, 3, 5, 8."""
    for k in (1, 2, 3, 5, 8):
        precision, recall = (
            float(part.double().mean()) for part in precision_recall(rows, real, k)
        )
        axes.plot(recall, precision, "o", color="C3" if k == 3 else "C0")
        axes.annotate(f"k = {k}", (recall, precision), (4, 4), textcoords="offset points")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.05), ylim=(0, 1.05))
