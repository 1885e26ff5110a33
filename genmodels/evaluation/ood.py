"""How a model's scores tell its own test images from others."""

from genmodels.data.source import read_source, with_split
from genmodels.evaluation.sources import check_shape, reading_options
from genmodels.metrics import ood


def score_ood(model, options, extra, device):
    """Return (scores, facts, title): how the model's scores tell its test images from others."""
    if not hasattr(model, "ood_scores"):
        raise ValueError(
            f"ood={','.join(options['ood'])}: needs a MODEL whose method scores images"
        )
    own, num = model.cfg.data.name, options["num"]
    reading = reading_options(options, model)
    inside = ood.first_images(read_source(f"{own}:test", **reading).pixels, num)
    train = ood.first_images(read_source(f"{own}:train", **reading).pixels, 2000)
    pixels = {"inside": inside, "train": train}
    for source in options["ood"]:
        if source in ood.SYNTHETIC:
            pixels[source] = ood.synthetic(source, inside, options["seed"])
        else:
            other = read_source(with_split(source, "test"), **reading).pixels
            check_shape(source, other.shape[1:], model)
            pixels[source] = ood.first_images(other, num)
    scores = {k: ood.image_scores(model, v, options["batch"]) for k, v in pixels.items()}
    facts = {"data": own, "num": {key: len(value) for key, value in pixels.items()}, "rows": []}
    return (
        ood.compare_sets(scores, options["ood"]),
        facts,
        f"{len(inside)} test images of {own} inside",
    )
