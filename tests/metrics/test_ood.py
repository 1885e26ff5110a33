"""Scores of detection against their definitions and torchmetrics; synthetic sets."""

import math

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from genmodels.metrics.ood import SYNTHETIC, ood_metrics, synthetic, typicality


def test_metrics_agree_with_torchmetrics_and_counting():
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(300, generator=generator).double() + 1
    outside = torch.randn(500, generator=generator).double()
    scores, truth = torch.cat([inside, outside]), torch.cat([torch.ones(300), torch.zeros(500)])
    found = ood_metrics(inside, outside)
    ranked = scores.argsort().argsort().double() / 1000  # torchmetrics squashes values outside 0..1
    assert found["auroc"] == pytest.approx(float(binary_auroc(ranked, truth.int())), abs=1e-6)
    precision = float(binary_average_precision(ranked, truth.int()))
    assert found["aupr"] == pytest.approx(precision, abs=1e-6)
    pairs = (inside[:, None] > outside[None]).double().mean()
    assert found["auroc"] == pytest.approx(float(pairs))
    threshold = inside.sort().values[15]  # 285 of 300 lie at or above it
    assert found["fpr95"] == pytest.approx(float((outside >= threshold).double().mean()))


def test_metrics_of_normal_scores():
    """N(d, 1) against N(0, 1): AUROC = Phi(d / sqrt 2), FPR95 = Phi(d - 1.645 ...)."""
    z = torch.special.ndtri((torch.arange(4000).double() + 0.5) / 4000)
    for d in (0.0, 1.0, 2.5):
        found = ood_metrics(z + d, z)
        assert found["auroc"] == pytest.approx(0.5 * math.erfc(-d / 2), abs=1e-3)
        quantile = float(torch.special.ndtri(torch.tensor(0.05).double())) + d
        assert found["fpr95"] == pytest.approx(0.5 * math.erfc(quantile / math.sqrt(2)), abs=2e-3)
    apart = ood_metrics(z + 20, z)
    assert apart == {"auroc": 1.0, "aupr": pytest.approx(1.0), "fpr95": 0.0}
    assert ood_metrics(z, z + 20)["auroc"] == 0.0


def test_ties_count_half():
    assert ood_metrics([1.0, 1.0], [1.0, 1.0])["auroc"] == 0.5
    assert ood_metrics([1.0, 1.0], [1.0, 1.0])["fpr95"] == 1.0


@pytest.mark.parametrize("bad", [([], [1.0]), ([1.0], []), ([math.nan], [1.0])])
def test_metrics_refuse(bad):
    with pytest.raises(ValueError, match="must be finite and at least one"):
        ood_metrics(*bad)


def test_typicality_is_highest_at_the_median():
    scores = torch.tensor([0.0, 3.0, 5.0])
    assert typicality(scores, [2.0, 3.0, 9.0]).tolist() == [-3.0, 0.0, -2.0]


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_sets(name):
    images = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    made = synthetic(name, images)
    assert made.shape == images.shape and made.dtype == torch.uint8
    assert torch.equal(made, synthetic(name, images)) and not torch.equal(made, images)
    assert not torch.equal(made, synthetic(name, images, seed=1))
    spread = made.float().flatten(2).std(dim=2)
    if name == "constant":
        assert spread.max() == 0 and len(made[:, 0, 0, 0].unique()) > 25
    if name == "noise":
        assert abs(made.float().mean() - 127.5) < 10 and spread.mean() > 50
    if name == "interpolation":
        halves = (images[:, None].float() + images[None].float()) / 2
        off = (made[:, None, None].float() - halves).abs().flatten(3).amax(3)  # (made, i, j)
        off[:, torch.arange(50), torch.arange(50)] = 99  # never an image with itself
        assert (off.flatten(1).amin(1) <= 0.5).all()


def test_synthetic_refuses():
    with pytest.raises(ValueError, match="ood=texture: choose from"):
        synthetic("texture", torch.zeros(2, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="needs at least 2 images"):
        synthetic("noise", torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
