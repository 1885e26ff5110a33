"""Bits per dimension of 8-bit images under a method's log density.

    x = (v + u - 1/2) / 127.5 - 1,  u uniform in [0, 1)
    bits/dim = -log p(x) / (D ln 2) + log2(127.5)

v is the 8-bit level, D the number of levels in an image. Its mean over u bounds the discrete
model's bits per dimension from above (Theis et al. 2016, arXiv 1511.01844, section 3.1).
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from genmodels import seeding
from genmodels.data.source import read_source, with_split
from genmodels.distributed import gather_rows, rank, share
from genmodels.evaluation.sources import check_shape, reading_options
from genmodels.generation import tf32
from genmodels.kernels.philox import philox_uniform
from genmodels.seeding import Stream

if TYPE_CHECKING:
    from genmodels.evaluation.options import LikelihoodOptions


def kinds_of_likelihood(word: str, offered: Iterable[str]) -> list[str]:
    """Return the kinds that a word of the command line asks for.

    Args:
        word: true (all), or a kind, or what several begin with: ais for ais_lower and ais_upper.
        offered: a method's LIKELIHOODS.

    Raises:
        ValueError: a word that asks for none of them.
    """
    kinds = [k for k in offered if word == "true" or k == word or k.startswith(f"{word}_")]
    if not kinds:
        raise ValueError(f"likelihood={word}: choose from true, {', '.join(offered)}")
    return kinds


def dequantise(pixels: torch.Tensor, seed: int, index: torch.Tensor) -> torch.Tensor:
    """Return uint8 images (B, C, H, W) as continuous ones on the [-1, 1] scale, float64.

    Args:
        pixels: uint8 (B, C, H, W).
        seed: whole number.
        index: int64 (B,), the images' numbers in their set; u is a function of (seed, index).
    """
    u = philox_uniform(pixels.shape[1:], seed, index, stream=int(Stream.DEQUANTISE))
    return (pixels.double() + u.double() - 0.5) / 127.5 - 1


def likelihood_scores(
    model: Any,
    pixels: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    word: str = "true",
    seed: int = 0,
    batch: int = 64,
    **options: Any,
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Return ({metric: {"value", "stderr"}}, one dict for each image) of the kinds asked for.

    The standard error is over images. Arguments as for kinds_of_likelihood and bits_per_dim;
    "bpd" is the kind "ode", "bpd_KIND" any other.
    """
    scores = {}
    rows: list[dict[str, Any]] = [{"index": i} for i in range(len(pixels))]
    for kind in kinds_of_likelihood(word, model.LIKELIHOODS):
        bits = bits_per_dim(model, pixels, labels, kind=kind, seed=seed, batch=batch, **options)
        name = _metric_name(kind)
        scores[name] = {"value": float(bits.mean())}
        if len(bits) > 1:
            scores[name]["stderr"] = float(bits.std() / len(bits) ** 0.5)
        for row, value in zip(rows, bits.tolist()):
            row[name] = value
    return scores, rows


def _metric_name(kind: str) -> str:
    return "bpd" if kind == "ode" else f"bpd_{kind}"


def bits_per_dim(
    model: Any,
    pixels: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    kind: str,
    seed: int = 0,
    batch: int = 64,
    progress: bool = True,
    **options: Any,
) -> torch.Tensor:
    """Return the bits per dimension of each image, float64 (N,), on every process.

    Each process takes its share; the batch changes no number beyond rounding.

    Args:
        model: a method in eval mode with this kind among its LIKELIHOODS.
        pixels: uint8 (N, C, H, W) of the model's shape.
        labels: int64 (N,) for a conditional model, or None.
        kind, options: passed on to model.log_prob.
        seed: of the dequantisation and of the method's own randomness.
        batch: images at a time.
        progress: show a bar.

    Raises:
        ValueError: what log_prob refuses.
    """
    device = model.device
    dim = math.prod(pixels.shape[1:])
    indices = share(len(pixels))
    values = []
    bar = tqdm(
        total=len(indices),
        desc=_metric_name(kind),
        unit="img",
        delay=0.5,
        disable=not (progress and rank() == 0),
    )
    with bar, tf32(False):
        for start in range(0, len(indices), batch):
            index = torch.tensor(indices[start : start + batch])
            x = dequantise(pixels[index], seed, index).to(device)
            classes = None if labels is None else labels[index].to(device)
            seeds = seeding.image_seeds(seed, index).to(device)
            log_p = model.log_prob(x, classes, kind=kind, seeds=seeds, **options).detach().cpu()
            values.append(-log_p / (dim * math.log(2)) + math.log2(127.5))
            bar.update(len(index))
    bits = torch.cat(values).double() if values else torch.empty(0).double()
    return gather_rows(bits, len(pixels))


def score_likelihood(
    model: Any, options: "LikelihoodOptions", extra: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return (scores, facts, title): bits per dimension of real images under the model."""
    if model is None or not model.LIKELIHOODS:
        raise ValueError("likelihood=true: needs a MODEL whose method has a likelihood")
    if model.cfg.data.vae.mean:
        raise ValueError(
            f"likelihood={options.likelihood}: the model has densities of latents, which are no "
            "bits of pictures; leave it out"
        )
    source = with_split(options.data or model.cfg.data.name, "test")
    images = read_source(source, **reading_options(options, model))
    pixels, labels = images.pixels, images.labels
    check_shape(source, pixels.shape[1:], model)
    num = min(options.num or len(pixels), len(pixels))
    labels = labels[:num] if model.classes and labels is not None else None
    model.check_labels(labels, f"{source} has images without; name others by data=")
    settings = dict(extra)
    settings |= {"seed": options.seed, "batch": options.batch}
    settings |= {"word": options.likelihood}
    scores, rows = likelihood_scores(model, pixels[:num], labels, **settings)
    return scores, {"data": source, "num": num, "rows": rows}, f"on {source}: {num} images"
