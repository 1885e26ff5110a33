"""Scores from nearest neighbours against scikit-learn, torch-fidelity and closed forms."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from genmodels.metrics import manifold
from genmodels.metrics.manifold import density_coverage, memorised, nn1, precision_recall


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("block", [2**24, 100])
@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (0.8, 0.1), (1.0, 1e4)])
def test_nn1_against_sklearn(monkeypatch, block, scale, offset):
    monkeypatch.setattr(manifold, "_BLOCK", block)
    a, b = normal(150, 6) + offset, scale * normal(150, 6, seed=1) + offset
    pool = torch.cat([a, b]).numpy()
    label = np.repeat([0, 1], 150)
    nearest = NearestNeighbors(n_neighbors=1).fit(pool).kneighbors(return_distance=False)[:, 0]
    assert nn1(a, b) == pytest.approx((label == label[nearest]).mean(), abs=1e-12)
    assert nn1(b, a) == pytest.approx(nn1(a, b), abs=1e-12)


def test_nn1_of_equal_and_of_disjoint_laws():
    values = [nn1(normal(200, 4, seed=2 * k), normal(200, 4, seed=2 * k + 1)) for k in range(20)]
    assert np.mean(values) == pytest.approx(199 / 399, abs=0.02)
    assert nn1(normal(50, 3), normal(50, 3, seed=1) + 100) == 1.0


def test_nn1_with_duplicates():
    a = normal(60, 5).float()
    assert nn1(a, a.clone()) == 0.0  # every row's nearest is its copy in the other set
    assert nn1(a, a[:1].expand(60, 5)) > 0.5  # collapsed to one image
    # All rows twice in each set: three equally near others, one of the own set.
    assert nn1(a.repeat(2, 1), a.repeat(2, 1)) == pytest.approx(1 / 3)
    # Points at equal distances on a line, two of a, two of b, ...: rounding must not break ties.
    line = 0.1 * torch.arange(200.0).double().reshape(-1, 2, 2, 1)
    a, b = line[:, 0].reshape(-1, 1), line[:, 1].reshape(-1, 1)
    assert nn1(a, b) == pytest.approx((2 * 1 + 198 * 0.5) / 200)
    # All rows equal: N - 1 of 2N - 1 others belong to the own set.
    assert nn1(torch.ones(10, 3), torch.ones(10, 3)) == pytest.approx(9 / 19)
    # Ties between different rows: the corners of a square, its two own-set sides equally near.
    a, b = torch.tensor([[0.0, 0], [1, 0]]), torch.tensor([[0.0, 1], [1, 1]])
    assert nn1(a, b) == pytest.approx(0.5)


def test_nn1_refuses():
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(6, 3\)"):
        nn1(normal(5, 3), normal(6, 3))
    with pytest.raises(ValueError, match="num must be >= 2 for nn1, got 1"):
        nn1(normal(1, 3), normal(1, 3))
    with pytest.raises(ValueError, match="1 of 4 rows"):
        nn1(normal(4, 1), torch.tensor([[1.0], [2], [3], [torch.nan]]))


@pytest.mark.parametrize("block", [2**24, 999])
def test_memorised_against_sklearn(monkeypatch, block):
    monkeypatch.setattr(manifold, "_BLOCK", block)
    samples, train, held = normal(80, 3), normal(300, 3, seed=1), normal(100, 3, seed=2)
    samples = train[:80] + torch.linspace(0, 1, 80)[:, None] * samples
    train = train.repeat(3, 1)
    tree = NearestNeighbors(n_neighbors=1).fit(train.numpy())
    threshold = np.sort(tree.kneighbors(held.numpy())[0][:, 0])[4]
    truth = (tree.kneighbors(samples.numpy())[0][:, 0] <= threshold).mean()
    assert 0 < truth < 1
    assert memorised(samples, train, held) == pytest.approx(truth, abs=1e-12)


def test_memorised_of_copies_of_a_perfect_generator_and_of_the_held_out_set():
    train, held = normal(400, 5), normal(200, 5, seed=1)
    assert memorised(train[:50], train, held) == 1.0
    assert memorised(held, train, held) == pytest.approx(0.05)
    assert memorised(held + 100, train, held) == 0.0
    values = [
        memorised(normal(200, 5, seed=k), train, normal(200, 5, seed=k + 99)) for k in range(2, 42)
    ]
    assert np.mean(values) == pytest.approx(10 / 201, abs=0.012)
    # Held-out images that are themselves copies put the threshold at zero; copies still count.
    held[:20] = train[:20]
    assert memorised(train.float(), train.float(), held.float()) == 1.0


def test_memorised_refuses():
    with pytest.raises(ValueError, match="at least 20 held-out rows, got 5, 5 and 19"):
        memorised(normal(5, 2), normal(5, 2), normal(19, 2))
    with pytest.raises(ValueError, match="got 2, 3 and 2"):
        memorised(normal(5, 2), normal(5, 3), normal(30, 2))
    with pytest.raises(ValueError, match="train must be finite"):
        memorised(normal(5, 2), normal(5, 2) / 0, normal(30, 2))


@pytest.mark.parametrize(("n", "m", "k"), [(300, 500, 3), (120, 80, 5)])
def test_precision_and_recall_count_as_torch_fidelity(n, m, k):
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = 0.8 * normal(n, 8).float(), normal(m, 8, seed=1).float()
    referee = prc_features_to_metric(a, b, prc_neighborhood=k, verbose=False)
    precise, recalled = precision_recall(a, b, k)
    assert precise.dtype == torch.bool and precise.shape == (n,) and recalled.shape == (m,)
    assert int(precise.sum()) == round(referee["precision"] * n)
    assert int(recalled.sum()) == round(referee["recall"] * m)
    assert 0.2 < referee["recall"] < 0.95 and referee["precision"] > 0.5


def test_density_and_coverage_against_sklearn():
    a, b, k = 0.9 * normal(150, 6) + 0.1, normal(200, 6, seed=1), 5
    tree = NearestNeighbors().fit(b.numpy())
    radius = tree.kneighbors(n_neighbors=k)[0][:, -1]
    inside = np.linalg.norm(a.numpy()[:, None] - b.numpy()[None], axis=-1) <= radius
    density, coverage = density_coverage(a, b, k)
    np.testing.assert_allclose(density, inside.sum(1) / k)
    assert torch.equal(coverage, torch.from_numpy(inside.any(0)))
    assert 0.3 < coverage.double().mean() < 1


def test_manifold_scores_of_equal_laws_and_of_failures():
    real = normal(600, 4)
    density, coverage = density_coverage(normal(600, 4, seed=1), real)
    assert density.mean() == pytest.approx(1, abs=0.1)
    # A real row is missed if its k nearest of both sets are all real ones: (1/2)^k.
    assert coverage.double().mean() == pytest.approx(1 - 2**-5, abs=0.03)
    one = real[:1] + 1e-3 * normal(600, 4, seed=2)  # collapsed onto one image
    precise, recalled = precision_recall(one, real)
    assert precise.double().mean() > 0.99 and recalled.double().mean() < 0.01
    far = real + 100
    assert not any(part.any() for part in precision_recall(far, real))
    assert all(part.all() for part in precision_recall(real, real))


def test_manifold_scores_refuse():
    with pytest.raises(ValueError, match="metrics=prc: needs more than 3 images on each side"):
        precision_recall(normal(3, 2), normal(9, 2))
    with pytest.raises(ValueError, match="metrics=density: needs more than 5 images"):
        density_coverage(normal(9, 2), normal(5, 2))
    with pytest.raises(ValueError, match="one dimension, got 2 and 3"):
        precision_recall(normal(9, 2), normal(9, 3))
    with pytest.raises(ValueError, match="samples must be finite"):
        precision_recall(normal(9, 2) / 0, normal(9, 2))
