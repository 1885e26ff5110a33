"""What has to hold for any scores, checked with the features in use: evaluate.py selftest."""

import math
import warnings

import torch

from genmodels.data.source import read_source
from genmodels.evaluation.scorer import Scorer
from genmodels.evaluation.sources import Pictures
from genmodels.metrics.features import Features, extract
from genmodels.metrics.frechet import Moments, frechet_distance
from genmodels.metrics.kernel_distance import kernel_distance
from genmodels.metrics.manifold import nn1, precision_recall

Row = tuple[str, str, str, str]  # what is checked, its value, the expected one, "pass" or "FAIL"


def checks(features: Features, pixels: torch.Tensor | None = None) -> list[Row]:
    """Return the rows of the self-test: (what, value, expected, "pass" or "FAIL").

    Args:
        features: what load_features returns.
        pixels: uint8 images (N, C, H, W) to take for real ones; None = the embedded digits, as
            large as the features want them.
    """
    pixels = _digits(features) if pixels is None else pixels
    rows = extract(features, pixels)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    halves = [rows[part] for part in order.chunk(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # n <= D: these hold all the same
        return [
            *_itself(rows),
            *_halves(halves),
            *_known(rows),
            *_order(features, pixels, order),
            _batches(features, pixels[:100]),
        ]


def _digits(features: Features) -> torch.Tensor:
    pixels = read_source("digits:train").pixels[:600]
    shape = features.shapes[0] if features.shapes else None
    if shape and tuple(shape) != tuple(pixels.shape[1:]):
        pixels = torch.nn.functional.interpolate(pixels.float(), shape[1:], mode="bilinear")
        pixels = pixels.round().to(torch.uint8).expand(-1, shape[0], -1, -1)
    return pixels


def _fd(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(Moments().update(a), Moments().update(b)).value


def _row(what: str, value: float, low: float, high: float | None = None) -> Row:
    """Return the row of a check that the value is low, or in low..high."""
    high = low if high is None else high
    expected = f"{low:.6g}" if low == high else f"{low:.4g} .. {high:.4g}"
    return what, f"{value:.6g}", expected, "pass" if low <= value <= high else "FAIL"


def _itself(rows: torch.Tensor) -> list[Row]:
    """A set against itself: every distance is zero, every image lies in the manifold."""
    scale = float(rows.double().var(0).sum())
    kid = kernel_distance(rows, rows)[0]
    precision, recall = precision_recall(rows, rows)
    return [
        _row("real against itself: fd / variance", _fd(rows, rows) / scale, 0, 1e-9),
        # The unbiased estimate leaves out k(x, x), which is larger than the mean of k: below zero.
        _row("kid", kid, -math.inf, 1e-9),
        _row("precision", float(precision.double().mean()), 1),
        _row("recall", float(recall.double().mean()), 1),
        _row("nn1 (copies)", nn1(rows, rows), 0, 0.02),
    ]


def _halves(halves: list[torch.Tensor]) -> list[Row]:
    """Two halves of one set: nothing tells them apart."""
    size = min(map(len, halves))
    a, b = halves[0][:size], halves[1][:size]
    kid, stderr = kernel_distance(a, b)
    margin = 4 * math.sqrt(0.5 / size)  # sd of an accuracy, with room for dependent neighbours
    return [
        _row("two halves: kid / standard error", kid / stderr, -4, 4),
        _row("nn1", nn1(a, b), 0.5 - margin, 0.5 + margin),
    ]


def _known(rows: torch.Tensor) -> list[Row]:
    """y = 2 x + 3 in each of D features: |m + 3|^2 + tr S, from the moments of x alone."""
    x = rows.double()
    truth = float((x.mean(0) + 3).square().sum() + x.T.cov().trace())
    gauss = torch.randn(20_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # N(0, I) against N(1, 4 I) in four dimensions: 4 x 1 + 4 x (2 - 1)^2.
    other = torch.randn(20_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [
        _row(
            "twice the features + 3: fd / closed form",
            _fd(x, 2 * x + 3) / truth,
            1 - 1e-9,
            1 + 1e-9,
        ),
        _row("fd of N(0, I) and N(1, 4 I) in 4-D", _fd(gauss, 2 * other + 1), 8 - 0.3, 8 + 0.3),
    ]


def _order(features: Features, pixels: torch.Tensor, order: torch.Tensor) -> list[Row]:
    """The order of the images changes no score."""
    names = ["fd", "kid", "precision"]
    half = len(pixels) // 2
    scorer = Scorer(names, features, reference=Pictures(pixels[half:]))
    first = scorer(pixels[:half])
    second = scorer(pixels[:half][order[order < half]])
    return [
        _row(
            f"images in another order: {name}, ratio",
            second[name]["value"] / first[name]["value"],
            1 - 1e-9,
            1 + 1e-9,
        )
        for name in names
        if first[name]["value"]
    ]


def _batches(features: Features, pixels: torch.Tensor) -> Row:
    """The batch of the feature net changes no row."""
    whole, parts = (extract(features, pixels, batch) for batch in (100, 7))
    error = float((whole - parts).abs().max() / whole.abs().max())
    return _row("another batch of the net: largest change of a row", error, 0, 1e-5)
