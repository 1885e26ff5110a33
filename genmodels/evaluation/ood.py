"""How a model's scores tell its own test images from others."""

from genmodels.evaluation.sources import check_shape, of_test, read_source, where
from genmodels.metrics import ood


def score_ood(model, options):
    """Return (scores, facts, title): how the model's scores tell its test images from others."""
    if model is None or not model.OOD_SCORES:
        raise ValueError(f"ood={','.join(options.ood)}: needs a MODEL whose method scores images")
    own, num = model.cfg.data.name, options.num
    kept = where(options, model)
    inside = ood.first(read_source(f"{own}:test", **kept)[0], num)
    pixels = {"inside": inside, "train": ood.first(read_source(f"{own}:train", **kept)[0], 2000)}
    for source in options.ood:
        if source in ood.SYNTHETIC:
            pixels[source] = ood.synthetic(source, inside, options.seed)
        else:
            other = read_source(of_test(source), **kept)[0]
            check_shape(source, other.shape[1:], model)
            pixels[source] = ood.first(other, num)
    scores = {k: ood.image_scores(model, v, options.batch) for k, v in pixels.items()}
    facts = {"data": own, "num": {key: len(value) for key, value in pixels.items()}, "rows": []}
    return ood.compare(scores, options.ood), facts, f"{len(inside)} test images of {own} inside"
