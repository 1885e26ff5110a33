"""One model out of several of the same network: averages of their weights.

    genmodels merge A B [C ...] out=DIR [weights=2,1] [fisher=digits:train]

A, B, ... are runs, checkpoints, exports or names on the hub that began with the same weights:
rounds of DDO, averages of other widths, finetunes. DIR is an export with the settings of A.

    plain     theta = sum_i w_i theta_i                          w_i: weights=, divided by their sum
    fisher=   theta = sum_i w_i F_i theta_i / sum_i w_i F_i      each number by itself

F_i is the mean over images of the squared gradient of the loss: what model i is sure of counts.
It is the diagonal of the Fisher information where the loss is -log p, and empirical: of the images'
own x, not of the model's. A number that no loss depends on is averaged plainly.

Reference: Matena and Raffel 2022, "Merging models with Fisher-weighted averaging", arXiv
2111.09832; of plain averages Wortsman et al. 2022, "Model soups", arXiv 2203.05482.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genmodels import images
from genmodels.checkpoint.cards import CardOptions, model_card
from genmodels.checkpoint.exports import check_new, note_license, write_export
from genmodels.checkpoint.models import load
from genmodels.config import Section, check, setting, settings_of, to_plain
from genmodels.config.words import check_flags, help_text, split_words, typed_words
from genmodels.data.source import read_source, with_split

__all__ = ["fisher_diagonal", "merge", "merged_state"]

State = Mapping[str, Tensor]


def merged_state(
    states: Sequence[State], weights: Sequence[float], fishers: Sequence[State] | None = None
) -> dict[str, Tensor]:
    """Return the average of the parameters of several models; see the module.

    Args:
        states: {name: tensor} of each, with the same names and shapes.
        weights: of each; their sum is not 0.
        fishers: like states, >= 0; None: a plain average.
    """
    total = sum(weights)
    out = {}
    for name, first in states[0].items():
        values = torch.stack([state[name].double() for state in states])
        shares = torch.tensor(weights, dtype=torch.float64, device=values.device) / total
        shares = shares.reshape(-1, *[1] * first.dim())
        mean = (shares * values).sum(dim=0)
        if fishers is not None:
            sure = shares * torch.stack([fisher[name].double() for fisher in fishers])
            whole = sure.sum(dim=0)
            known = whole > 0
            by_fisher = (sure * values).sum(dim=0) / torch.where(known, whole, 1.0)
            mean = torch.where(known, by_fisher, mean)
        out[name] = mean.to(first.dtype)
    return out


def fisher_diagonal(model: Any, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Return the mean over images of the squared gradient of the loss, like the parameters.

    Args:
        model: a method; it is put into eval mode. What is random about image k is drawn for n = k.
        x: images (B, C, H, W) in [-1, 1].
        labels: int64 (B,), -1 = none; or None.
    """
    model.eval()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named}
    for k in range(len(x)):
        n = torch.tensor([k], device=x.device)
        label = torch.full_like(n, -1) if labels is None else labels[k : k + 1]
        with torch.enable_grad():
            loss, _ = model.loss({"image": x[k : k + 1], "label": label, "n": n})
            found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        for (name, _), gradient in zip(named, found):
            if gradient is not None:
                sums[name] += gradient.double() ** 2
    return {name: total / len(x) for name, total in sums.items()}


@dataclass
class MergeOptions(Section):
    """What python -m genmodels.checkpoint merge takes."""

    out: str = setting("", "folder to make")
    weights: list[float] = setting([], "of each model; empty: all the same")
    fisher: str = setting(
        "", "weigh each number by the Fisher information on these images: NAME[:SPLIT] or a path"
    )
    fisher_images: int = setting(256, "how many of them", ge=1)
    ema: bool = setting(True, "the averaged weights; false: the raw ones of checkpoints")
    license: str = setting("", "as the hub writes it: apache-2.0, mit, cc-by-nc-4.0 ...")

    def __post_init__(self) -> None:
        super().__post_init__()
        CardOptions(license=self.license)


def merge(paths: Sequence[Path | str], out: Path | str, **options: Any) -> Path:
    """Write the average of several models as a new export and return its folder.

    Args:
        paths: two models or more: runs, .ckpt, exports or names on the hub.
        out: folder to make; must not exist.
        options: of MergeOptions.

    Raises:
        ValueError: one model, models of two networks, weights that do not fit, a folder that is
            there, images that do not fit.
    """
    settings = MergeOptions(out=str(out), **options)
    check(len(paths) >= 2, "models", len(paths), "name two or more to merge")
    weights = settings.weights or [1.0] * len(paths)
    settings.check(len(weights) == len(paths), "weights", f"give {len(paths)}, one for each model")
    settings.check(abs(sum(weights)) > 1e-6, "weights", "their sum must not be 0")
    settings.check(not settings.fisher or min(weights) >= 0, "weights", "must be >= 0 with fisher=")
    check_new(Path(out))
    models = [load(path, ema=settings.ema) for path in paths]
    for path, other in zip(paths[1:], models[1:]):
        check_alike(models[0], other, path)
    fishers = None
    if settings.fisher:
        x, labels = _images(models[0], settings)
        fishers = [fisher_diagonal(model, x, labels) for model in models]
    states = [
        {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        for model in models
    ]
    models[0].load_state_dict(merged_state(states, weights, fishers), strict=False)
    shares = ", ".join(
        f"{Path(path).name} {weight / sum(weights):.3g}" for path, weight in zip(paths, weights)
    )
    by = f", by their Fisher information on {settings.fisher}" if settings.fisher else ""
    line = f"The average of the weights of {shares}{by}"
    card = model_card(models[0], Path(out).name, None, line, license=settings.license)
    return write_export(models[0], Path(out), card, chains=False)


def check_alike(first: Any, other: Any, path: Path | str) -> None:
    """Raise ValueError unless the weights of two models mean the same.

    Args:
        first, other: methods. path: of the other, for the error.
    """
    own, its = (to_plain(model.cfg) for model in (first, other))
    for key in own["network"].keys() | its["network"].keys():
        same = own["network"].get(key) == its["network"].get(key) or key == "dropout"
        check(same, "model", path, f"network.{key} differs from the first model's")
    for key in first.OF_WEIGHTS:
        same = own["method"].get(key) == its["method"].get(key)
        check(same, "model", path, f"method.{key} differs from the first model's")
    for key in ("pixels", "mean", "std"):
        same = own["data"]["vae"][key] == its["data"]["vae"][key]
        check(same, "model", path, f"data.vae.{key}, of latents, differs from the first model's")
    ours, theirs = (
        {name: tuple(p.shape) for name, p in model.named_parameters()} for model in (first, other)
    )
    check(ours == theirs, "model", path, "has other weights than the first model")
    buffers = dict(other.named_buffers())
    for name, value in first.named_buffers():
        same = name in buffers and torch.equal(value, buffers[name])
        check(same, "model", path, f"{name}, which is not learned, differs from the first model's")


def _images(model: Any, settings: MergeOptions) -> tuple[Tensor, Tensor | None]:
    """Return (images in [-1, 1], labels or None) that fisher= names, evenly spaced."""
    of_latents = model.cfg.data.vae.mean
    settings.check(not of_latents, "fisher", "is of pictures, the models are of latents; leave out")
    name = with_split(settings.fisher, "train")
    source = read_source(name, trained_on=model.cfg.data, channels=model.shape[0], key="fisher")
    count = len(source.pixels)
    index = torch.arange(min(count, settings.fisher_images)) * count
    index = index // min(count, settings.fisher_images)
    x = source.pixels[index]
    shape = tuple(x.shape[1:])
    settings.check(
        shape == model.shape, "fisher", f"holds images {shape}, the model knows {model.shape}"
    )
    x = x if x.is_floating_point() else images.from_uint8(x)
    labels = None if source.labels is None else source.labels[index]
    settings.check(
        labels is not None or model.unlabelled, "fisher", "has no labels, which the model needs"
    )
    return x, labels


def write_merged(positionals: Sequence[str], words: dict[str, str]) -> None:
    """Merge models as a command; see the module."""
    options = MergeOptions(**typed_words(words, settings_of(MergeOptions)))
    usage = "usage: genmodels merge A B [C ...] out=DIR [weights=2,1] [fisher=DATA]"
    if len(positionals) < 2:
        raise ValueError(usage)
    options.check(options.out, "out", "say which folder to make")
    given = {key: getattr(options, key) for key in settings_of(MergeOptions) if key != "out"}
    made = merge(positionals, options.out, **given)
    note_license(options.license)
    print(f"merged: {made}")


def main(argv: Sequence[str]) -> None:
    """Merge models, or explain it."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if "--help" in flags or not argv:
        print(f"{__doc__.strip()}\n\n{help_text(MergeOptions)}")
        return
    write_merged(positionals, words)
