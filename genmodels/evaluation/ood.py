"""How a model's scores tell its own test images from others."""

from typing import TYPE_CHECKING, Any

from genmodels.data.source import read_source, with_split
from genmodels.evaluation.sources import check_shape, reading_options
from genmodels.metrics import ood

if TYPE_CHECKING:
    from genmodels.evaluation.options import OodOptions


def score_ood(model: Any, options: "OodOptions") -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return (scores, facts, title): how the model's scores tell its test images from others."""
    if model is None or not model.OOD_SCORES:
        raise ValueError(f"ood={','.join(options.ood)}: needs a MODEL whose method scores images")
    name, num = model.cfg.data.name, options.num
    reading = reading_options(options, model)
    inside = ood.first_images(read_source(f"{name}:test", **reading).pixels, num)
    train = ood.first_images(read_source(f"{name}:train", **reading).pixels, 2000)
    pixels = {"inside": inside, "train": train}
    for source in options.ood:
        if source in ood.SYNTHETIC:
            pixels[source] = ood.synthetic(source, inside, options.seed)
        else:
            other = read_source(with_split(source, "test"), **reading).pixels
            check_shape(source, other.shape[1:], model)
            pixels[source] = ood.first_images(other, num)
    scores = {k: ood.image_scores(model, v, options.batch) for k, v in pixels.items()}
    facts = {"data": name, "num": {key: len(value) for key, value in pixels.items()}, "rows": []}
    title = f"{len(inside)} test images of {name} inside"
    return ood.compare_sets(scores, options.ood), facts, title
