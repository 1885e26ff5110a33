"""What a clustering method makes of images: assignments as CSV, exemplars as a contact sheet."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from genmodels import images
from genmodels.atomic import make_folder, write_bytes
from genmodels.data.source import read_source, with_split
from genmodels.evaluation.sources import check_shape, reading_options
from genmodels.generation import tf32
from genmodels.metrics.clustering import clustering_scores

if TYPE_CHECKING:
    from genmodels.evaluation.options import ClusterOptions


@torch.no_grad()
def assign(model: Any, pixels: torch.Tensor | images.OnDisk, batch: int = 64) -> torch.Tensor:
    """Return p(y | x) of images, float32 (N, C) on the CPU; the batch changes nothing but rounding.

    Args:
        model: a method with cluster(), in eval mode.
        pixels: uint8 (N, C, H, W), or float points in [-1, 1].
        batch: images at a time.
    """
    parts = []
    with tf32(False):
        for part in pixels.split(batch):
            x = part if part.is_floating_point() else images.from_uint8(part)
            parts.append(model.cluster(x.to(model.device)).cpu())
    return torch.cat(parts)


def exemplars(probabilities: torch.Tensor, count: int) -> list[list[int]]:
    """Return, for each cluster, the numbers of its most certain images (at most `count` each).

    Of equally certain ones the first come first.
    """
    certain, cluster = probabilities.max(dim=1)
    order = certain.argsort(descending=True, stable=True)
    return [order[cluster[order] == c][:count].tolist() for c in range(probabilities.shape[1])]


def write_clusters(
    out: Path,
    pixels: torch.Tensor | images.OnDisk,
    names: Sequence[str],
    probabilities: torch.Tensor,
    per_cluster: int = 10,
) -> None:
    """Write OUT/clusters.csv (image, cluster, probability, p0 ... ) and OUT/exemplars.png.

    Row c of the sheet shows the most certain images of cluster c, padded with black.
    """
    make_folder(out, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"p{c}" for c in range(probabilities.shape[1])]
    writer.writerow(["image", "cluster", "probability", *columns])
    for name, row in zip(names, probabilities.tolist()):
        top = max(range(len(row)), key=row.__getitem__)
        writer.writerow([name, top, f"{row[top]:.6f}", *(f"{p:.6f}" for p in row)])
    write_bytes(out / "clusters.csv", text.getvalue().encode())
    if pixels.shape[1:] == (2, 1, 1):
        return  # points in the plane make no pictures
    rows = []
    for numbers in exemplars(probabilities, per_cluster):
        row = torch.zeros(per_cluster, *pixels.shape[1:], dtype=torch.uint8)
        row[: len(numbers)] = pixels[torch.tensor(numbers, dtype=torch.int64)]
        rows.append(row)
    images.write_png(out / "exemplars.png", images.contact_sheet(torch.cat(rows), per_cluster))


def score_clusters(
    model: Any, options: "ClusterOptions", metrics: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return (scores, facts, title) of the model's clusters of a data set; nothing without any."""
    source = options.cluster
    if not source:
        return {}, {}, ""
    if model is None or not model.CLUSTERS:
        raise ValueError(f"cluster={source}: needs a MODEL whose method makes clusters")
    source = with_split(source, "test")
    named = read_source(source, **reading_options(options, model))
    pixels, labels = named.pixels, named.labels
    check_shape(source, pixels.shape[1:], model)
    if labels is None:
        raise ValueError(f"cluster={source}: has no classes to compare with")
    assigned = assign(model, pixels, options.batch).argmax(dim=1)
    scores = clustering_scores(assigned, labels, metrics)
    facts = {"data": source, "num": len(pixels), "rows": []}
    return {k: {"value": v} for k, v in scores.items()}, facts, f"clusters of {source}"
