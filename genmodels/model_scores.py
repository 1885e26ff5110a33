"""What a model says of real images, for evaluate.py: likelihoods, other sets told apart, clusters.

Each function returns (scores, facts, title) and takes the options of the command line.
"""

from genmodels import clusters, likelihood
from genmodels.datasets import DATASETS
from genmodels.metrics import ood
from genmodels.metrics.clustering import clustering_scores
from genmodels.sources import check_shape, read_source, where

__all__ = ["score_clusters", "score_likelihood", "score_ood"]


def of_test(source):
    """Return a data set's name with its split, test if none is named; a path as it is."""
    return f"{source}:test" if source in DATASETS else source


def score_clusters(model, options, metrics):
    """Return (scores, facts, title) of the model's clusters of a data set; nothing without any."""
    source = options["cluster"]
    if not source:
        return {}, {}, ""
    if not hasattr(model, "cluster"):
        raise ValueError(f"cluster={source}: needs a MODEL whose method makes clusters")
    source = of_test(source)
    pixels, labels, _ = read_source(source, **where(options, model))
    check_shape(source, pixels.shape[1:], model)
    if labels is None:
        raise ValueError(f"cluster={source}: has no classes to compare with")
    found = clusters.assign(model, pixels, options["batch"]).argmax(dim=1)
    scores = clustering_scores(found, labels, metrics)
    facts = {"data": source, "num": len(pixels), "rows": []}
    return {k: {"value": v} for k, v in scores.items()}, facts, f"clusters of {source}"


def score_ood(model, options, extra, device):
    """Return (scores, facts, title): how the model's scores tell its test images from others."""
    if not hasattr(model, "ood_scores"):
        raise ValueError(
            f"ood={','.join(options['ood'])}: needs a MODEL whose method scores images"
        )
    own, num = model.cfg.data.name, options["num"]
    kept = where(options, model)
    inside = ood.first(read_source(f"{own}:test", **kept)[0], num)
    pixels = {"inside": inside, "train": ood.first(read_source(f"{own}:train", **kept)[0], 2000)}
    for source in options["ood"]:
        if source in ood.SYNTHETIC:
            pixels[source] = ood.synthetic(source, inside, options["seed"])
        else:
            other = read_source(of_test(source), **kept)[0]
            check_shape(source, other.shape[1:], model)
            pixels[source] = ood.first(other, num)
    scores = {k: ood.image_scores(model, v, options["batch"]) for k, v in pixels.items()}
    facts = {"data": own, "num": {key: len(value) for key, value in pixels.items()}, "rows": []}
    return ood.compare(scores, options["ood"]), facts, f"{len(inside)} test images of {own} inside"


def score_likelihood(model, options, extra, device):
    """Return (scores, facts, title): bits per dimension of real images under the model."""
    if model is None or not model.LIKELIHOODS:
        raise ValueError("likelihood=true: needs a MODEL whose method has a likelihood")
    source = of_test(options["data"] or model.cfg.data.name)
    pixels, labels, _ = read_source(source, **where(options, model))
    check_shape(source, pixels.shape[1:], model)
    num = min(options["num"] or len(pixels), len(pixels))
    labels = labels[:num] if model.classes and labels is not None else None
    model.check_labels(labels, f"{source} has images without; name others by data=")
    settings = {key: value for key, value in extra.items() if value is not None}
    settings |= {"seed": options["seed"], "batch": options["batch"]}
    settings |= {"word": options["likelihood"]}
    scores, rows = likelihood.score(model, pixels[:num], labels, **settings)
    return scores, {"data": source, "num": num, "rows": rows}, f"on {source}: {num} images"
