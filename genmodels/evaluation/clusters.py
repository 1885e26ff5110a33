"""What a clustering method makes of images: assignments as CSV, exemplars as a contact sheet."""

import csv
import io
from pathlib import Path

import torch

from genmodels import images
from genmodels.atomic import write_bytes
from genmodels.data import DATASETS, load_split
from genmodels.evaluation import clusters
from genmodels.evaluation.sources import check_shape, of_test, read_source, where
from genmodels.generation import tf32
from genmodels.images import Tree, read_images
from genmodels.metrics.clustering import clustering_scores


@torch.no_grad()
def assign(model, pixels, batch=64):
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


def exemplars(probabilities, count):
    """Return, for each cluster, the numbers of its most certain images (at most `count` each).

    Of equally certain ones the first come first.
    """
    certain, own = probabilities.max(dim=1)
    order = certain.argsort(descending=True, stable=True)
    return [order[own[order] == c][:count].tolist() for c in range(probabilities.shape[1])]


def read_named(source, trained_on):
    """Return (images (N, C, H, W), names) of a folder, .zip, .npz, .npy or NAME:SPLIT.

    Args:
        source: path, or a data set (its test split if none is named).
        trained_on: DataConfig of the model, which says where and how its own data are read.

    Raises:
        ValueError: no such thing, or broken.
    """
    name, _, split = source.partition(":")
    if name in DATASETS and not Path(source).exists():
        cfg = type(trained_on)(**vars(trained_on)) if name == trained_on.name else None
        pixels = load_split(cfg or type(trained_on)(name=name), split or "test")[0]
    else:
        pixels = read_images(source)
    path = Path(source)
    if path.is_dir() or path.suffix.lower() == ".zip":
        names = [n for n in Tree(path).names if Path(n).name != "grid.png"]
        return pixels, names
    return pixels, [str(i) for i in range(len(pixels))]


def write_report(out, pixels, names, probabilities, per_cluster=10):
    """Write OUT/clusters.csv (image, cluster, probability, p0 ... ) and OUT/exemplars.png.

    Row c of the sheet shows the most certain images of cluster c, padded with black.
    """
    out.mkdir(parents=True, exist_ok=True)
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
        row[: len(numbers)] = pixels[numbers]
        rows.append(row)
    sheet = images.grid(torch.cat(rows), per_cluster)
    images.write_png(out / "exemplars.png", images.enlarge(sheet, max(1, 512 // sheet.shape[-1])))


def score_clusters(model, options, metrics):
    """Return (scores, facts, title) of the model's clusters of a data set; nothing without any."""
    source = options.cluster
    if not source:
        return {}, {}, ""
    if model is None or not model.CLUSTERS:
        raise ValueError(f"cluster={source}: needs a MODEL whose method makes clusters")
    source = of_test(source)
    pixels, labels, _ = read_source(source, **where(options, model))
    check_shape(source, pixels.shape[1:], model)
    if labels is None:
        raise ValueError(f"cluster={source}: has no classes to compare with")
    found = clusters.assign(model, pixels, options.batch).argmax(dim=1)
    scores = clustering_scores(found, labels, metrics)
    facts = {"data": source, "num": len(pixels), "rows": []}
    return {k: {"value": v} for k, v in scores.items()}, facts, f"clusters of {source}"
