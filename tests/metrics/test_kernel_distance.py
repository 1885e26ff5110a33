"""Kernel distance and inception score against torch-fidelity, torchmetrics and the definition."""

import numpy as np
import pytest
import torch

from genmodels.metrics.inception_score import inception_score
from genmodels.metrics.kernel_distance import kernel_distance, kernel_distance_subsets


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def test_kernel_distance_is_its_definition():
    a, b = normal(40, 7), 1.2 * normal(30, 7, seed=1) + 0.1
    xx, yy, xy = kernel(a, a), kernel(b, b), kernel(a, b)
    truth = (xx.sum() - xx.trace()) / (40 * 39) + (yy.sum() - yy.trace()) / (30 * 29)
    value, stderr = kernel_distance(a, b)
    assert value == pytest.approx(float(truth - 2 * xy.mean()), rel=1e-12)
    # Leaving out single rows, one set after the other, by hand.
    one = torch.tensor([kernel_distance(torch.cat([a[:i], a[i + 1 :]]), b)[0] for i in range(40)])
    two = torch.tensor([kernel_distance(a, torch.cat([b[:i], b[i + 1 :]]))[0] for i in range(30)])
    variance = sum((len(v) - 1) * v.var(correction=0) for v in (one.double(), two.double()))
    assert stderr == pytest.approx(float(variance) ** 0.5, rel=1e-6)


def test_kernel_distance_of_known_laws():
    """x ~ N(0, 1), y ~ N(m, 1): the expectation of the kernel from their moments."""
    shift = 0.7
    found = [
        kernel_distance(normal(400, 1, seed=k), normal(400, 1, seed=k + 999) + shift)
        for k in range(40)
    ]
    m2, m3 = 1 + shift**2, shift**3 + 3 * shift  # E y^2, E y^3
    # E (uv + 1)^3 = E u^3 E v^3 + 3 E u^2 E v^2 + 3 E u E v + 1.
    truth = (3 + 1) + (m3**2 + 3 * m2**2 + 3 * shift**2 + 1) - 2 * (3 * m2 + 1)
    values = torch.tensor([value for value, _ in found])
    assert abs(values.mean() - truth) < 4 * values.std() / 40**0.5
    assert np.mean([stderr for _, stderr in found]) == pytest.approx(float(values.std()), rel=0.35)


def test_float32_rows_lose_little():
    a, b = (normal(500, 300, seed=k).relu() for k in (0, 1))
    exact = kernel_distance(a, b)[0]
    assert kernel_distance(a.float(), b.float())[0] == pytest.approx(exact, abs=2e-7)


def test_kid_subsets_against_torch_fidelity():
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = normal(300, 40).relu().float(), normal(400, 40, seed=1).relu().float() * 1.1
    options = {"kid_subsets": 20, "kid_subset_size": 100, "verbose": False}
    referee = kid_features_to_metric(a, b, **options)
    mean, spread = kernel_distance_subsets(a, b, subsets=20, size=100)
    assert mean == pytest.approx(referee["kernel_inception_distance_mean"], abs=1e-6)
    assert spread == pytest.approx(referee["kernel_inception_distance_std"], abs=1e-6)
    assert abs(mean) > 1e-3 and spread > 1e-4
    # All pairs say the same with a smaller error.
    value, stderr = kernel_distance(a, b)
    assert abs(value - mean) < 4 * spread / 20**0.5 + 2 * stderr and stderr < spread


def test_kernel_distance_refuses():
    with pytest.raises(ValueError, match="metrics=kid: needs at least 3 images on each side"):
        kernel_distance(normal(2, 3), normal(9, 3))
    with pytest.raises(ValueError, match="metrics=kid_subsets: needs at least 1000 images"):
        kernel_distance_subsets(normal(999, 3), normal(2000, 3))
    with pytest.raises(ValueError, match="one dimension, got 3 and 4"):
        kernel_distance(normal(9, 3), normal(9, 4))
    with pytest.raises(ValueError, match="finite"):
        kernel_distance(normal(9, 3) / 0, normal(9, 3))


@pytest.mark.parametrize(("n", "splits"), [(1003, 10), (50, 1)])
def test_inception_score_against_torch_fidelity(n, splits):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * normal(n, 12).float()
    referee = isc_features_to_metric(logits, splits)
    mean, spread = inception_score(logits, splits)
    assert mean == pytest.approx(referee["inception_score_mean"], rel=1e-10)
    assert spread == pytest.approx(referee["inception_score_std"], abs=1e-10)


def test_inception_score_against_torchmetrics():
    """One part, so that its unseeded shuffle does not matter."""
    from torchmetrics.image.inception import InceptionScore

    logits = 2 * normal(200, 5).float()
    referee = InceptionScore(feature=torch.nn.Identity(), splits=1)
    referee.update(logits)
    assert inception_score(logits, 1)[0] == pytest.approx(float(referee.compute()[0]), rel=1e-5)


def test_inception_score_of_known_answers():
    sure = 200 * torch.eye(10).repeat(30, 1)
    assert inception_score(sure, 1)[0] == pytest.approx(10)
    assert inception_score(torch.zeros(300, 10))[0] == pytest.approx(1)
    # Sorted by class: without the shuffle each part would hold one class and score 1.
    assert inception_score(sure[sure.argmax(1).argsort()])[0] > 8
    with pytest.raises(ValueError, match="metrics=is: needs at least 10 images, got 9"):
        inception_score(normal(9, 4))
    with pytest.raises(ValueError, match="logits must be finite"):
        inception_score(normal(20, 4) / 0)
