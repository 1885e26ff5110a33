"""The metrics against closed forms, scipy, scikit-learn and torchmetrics."""

import pickle
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from genmodels.metrics import (
    Moments,
    extract,
    frechet_distance,
    load_features,
    manifold,
    memorised,
    nn1,
    resampled,
)


@pytest.fixture(scope="module")
def digits():
    """Training and held-out images with labels."""
    data = load_digits()
    images = torch.from_numpy(np.round(data.images * 255 / 16).astype(np.uint8))[:, None]
    order = np.random.default_rng(0).permutation(1797)
    train, held = order[:1437], order[1437:]
    labels = torch.from_numpy(data.target)
    return images[train], labels[train], images[held], labels[held]


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def random_cov(dim, seed, rank=None):
    factor = normal(dim, rank or 2 * dim, seed=seed)
    return factor @ factor.T / dim


def fd(a, b):
    return float(frechet_distance(Moments().update(a), Moments().update(b)))


# --- moments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [None, "mean"])
def test_moments_equal_numpy(shift):
    x = normal(500, 12) * torch.arange(1.0, 13) + 3
    moments = Moments(shift=x.mean(0) if shift else None).update(x)
    assert moments.count == 500
    np.testing.assert_allclose(moments.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.cov, np.cov(x.numpy().T), rtol=1e-11, atol=1e-11)


def test_moments_do_not_depend_on_batches_or_processes():
    x = normal(1000, 8) + 5
    whole = Moments().update(x)
    batches = Moments()
    for part in x.split(7):
        batches.update(part)
    # Three processes with shifts of their own, one of them without work, sent through a pipe.
    ranks = [Moments(), Moments(shift=x[0]), Moments(shift=normal(8, seed=3)), Moments()]
    for rank, part in zip(ranks, (x[:100], x[100:101], x[101:])):
        rank.update(part)
    merged = Moments()
    for rank in ranks:
        merged.merge(pickle.loads(pickle.dumps(rank)))
    for other in (batches, merged, Moments().merge(whole)):
        assert other.count == 1000
        np.testing.assert_allclose(other.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(other.cov, whole.cov, rtol=1e-11, atol=1e-12)


def test_merge_leaves_the_other_alone():
    first, second = Moments().update(normal(10, 3)), Moments().update(normal(10, 3, seed=1))
    before = second.mean.clone(), second.cov.clone()
    Moments().merge(second).update(normal(5, 3))
    first.merge(second)
    assert torch.equal(second.mean, before[0]) and torch.equal(second.cov, before[1])


def test_shift_saves_the_digits_of_a_large_mean():
    spread = normal(400, 3)
    x = spread + 1e8
    truth = np.cov((x - 1e8).numpy().T)
    assert np.abs(Moments().update(x).cov.numpy() / truth - 1).max() > 1e-3
    np.testing.assert_allclose(Moments(shift=x[0]).update(x).cov, truth, rtol=1e-9)


def test_float32_rows_are_summed_in_float64():
    x = (normal(20_000, 2) + 100).float()
    moments = Moments()
    for part in x.split(64):
        moments.update(part)
    np.testing.assert_allclose(moments.cov, np.cov(x.double().numpy().T), rtol=1e-8, atol=1e-9)


def test_from_stats_continues_a_count():
    x = normal(60, 4) + 2
    stats = Moments.from_stats(x[:40].mean(0), x[:40].T.cov(), 40)
    np.testing.assert_allclose(stats.cov, x[:40].T.cov(), rtol=1e-12)
    np.testing.assert_allclose(stats.update(x[40:]).cov, np.cov(x.numpy().T), rtol=1e-11)


# --- Frechet distance ----------------------------------------------------------------------------


def test_frechet_of_commuting_gaussians():
    # sum (m1 - m2)^2 + sum (s1 - s2)^2 in a common, rotated basis.
    basis = torch.linalg.qr(normal(5, 5)).Q
    s1, s2 = torch.tensor([1.0, 2, 3, 0.5, 4]).double(), torch.tensor([2.0, 2, 1, 0.1, 5]).double()
    m1, m2 = normal(5, seed=1), normal(5, seed=2)
    first = Moments.from_stats(m1, basis * s1.square() @ basis.T, 100)
    second = Moments.from_stats(m2, basis * s2.square() @ basis.T, 100)
    result = frechet_distance(first, second)
    assert result.value == pytest.approx(float(((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()))
    assert result.mean_term == pytest.approx(float(((m1 - m2) ** 2).sum()))
    assert float(result) == result.value and not result.singular


@pytest.mark.parametrize("dim, rank", [(1, None), (16, None), (48, None), (16, 5)])
def test_frechet_against_scipy(dim, rank):
    cov1, cov2 = random_cov(dim, 1), random_cov(dim, 2, rank)
    mean1, mean2 = normal(dim, seed=3), normal(dim, seed=4)
    root = scipy.linalg.sqrtm((cov1 @ cov2).numpy()).real
    truth = float(((mean1 - mean2) ** 2).sum() + (cov1 + cov2).trace()) - 2 * np.trace(root)
    first, second = (
        Moments.from_stats(mean1, cov1, 999),
        Moments.from_stats(mean2, cov2, 999),
    )
    for result in (frechet_distance(first, second), frechet_distance(second, first)):
        assert result.value == pytest.approx(truth, rel=1e-9 if rank is None else 1e-6)
        assert result.singular == (rank is not None)


def test_frechet_of_a_pure_shift_is_its_square():
    x = normal(300, 6)
    assert fd(x, x + torch.tensor([3.0, 0, 0, 0, 4, 0])) == pytest.approx(25, rel=1e-10)
    assert fd(x, 3 * x) == pytest.approx(
        4 * float(x.T.cov().trace()) + 4 * float(x.mean(0).square().sum()), rel=1e-9
    )
    for k in range(20):  # equal up to rounding, never below zero
        x = normal(50, 6, seed=k)
        assert 0 <= fd(x, x.flip(0)) < 1e-10


def test_frechet_with_few_rows_is_exact_flagged_and_warned():
    # Rank-deficient: y = x + shift has the same covariance, so only the shift remains, to rounding.
    x = normal(20, 64)
    with pytest.warns(UserWarning, match="20 images in 64 dimensions") as caught:
        result = frechet_distance(Moments().update(x), Moments().update(x + 0.5))
    assert len(caught) == 1
    assert result.singular
    assert result.value == pytest.approx(64 * 0.25, abs=1e-10)
    # Disjoint ranges: the cross term vanishes and the traces add up.
    left, right = torch.zeros(20, 64).double(), torch.zeros(20, 64).double()
    left[:, :30], right[:, 30:] = x[:, :30], x[:, 30:]
    with pytest.warns(UserWarning):
        result = frechet_distance(Moments().update(left), Moments().update(right))
    truth = (
        left.T.cov().trace() + right.T.cov().trace() + (left.mean(0) - right.mean(0)).pow(2).sum()
    )
    assert result.value == pytest.approx(float(truth), rel=1e-10)


def test_the_smaller_set_decides_about_the_warning():
    small, large = Moments().update(normal(20, 30)), Moments().update(normal(90, 30, seed=1))
    for pair in ((small, large), (large, small)):
        with pytest.warns(UserWarning, match="20 images in 30 dimensions"):
            assert frechet_distance(*pair).singular
    # Few rows are flagged even if their covariance, read from a file, looks regular.
    cov1, cov2 = torch.eye(3).double(), torch.diag(torch.tensor([4.0, 9, 1])).double()
    with pytest.warns(UserWarning):
        result = frechet_distance(
            Moments.from_stats(torch.zeros(3), cov1, 3), Moments.from_stats(torch.zeros(3), cov2, 9)
        )
    assert result.singular and result.value == pytest.approx(1 + 4)


def test_a_direction_of_rounding_size_counts_as_singular():
    thin = torch.diag(torch.tensor([1.0, 1e-17])).double()
    moments = Moments.from_stats(torch.zeros(2), thin, 100)
    result = frechet_distance(moments, moments)
    assert result.singular and result.value == pytest.approx(0, abs=1e-15)


def test_constant_features_are_singular_without_a_warning():
    x = normal(100, 4)
    x[:, 2] = 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = frechet_distance(Moments().update(x), Moments().update(2 * x))
        nothing = frechet_distance(Moments().update(0 * x), Moments().update(0 * x + 1))
    truth = x.T.cov().trace() + x.mean(0).square().sum()
    assert result.singular and result.value == pytest.approx(float(truth), rel=1e-9)
    assert nothing.value == pytest.approx(4)


def test_frechet_against_torchmetrics(digits):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pixels(torch.nn.Module):
        num_features = 16

        def forward(self, images):
            return images.double().flatten(1)[:, 24:40] / 255

    train, _, held, _ = digits
    referee = FrechetInceptionDistance(feature=Pixels(), normalize=False).set_dtype(torch.float64)
    referee.update(train, real=True)
    referee.update(held, real=False)
    rows = [extract(load_features("pixels"), x)[:, 24:40] for x in (train, held)]
    assert fd(*rows) == pytest.approx(float(referee.compute()), rel=1e-5)


def test_moments_refuse_what_would_spoil_them():
    moments = Moments().update(normal(5, 3))
    spoiled = normal(4, 3)
    spoiled[1, 2] = torch.nan
    spoiled[3, 0] = torch.inf
    with pytest.raises(ValueError, match="finite, got NaN or infinite values in 2 of 4 rows"):
        moments.update(spoiled)
    with pytest.raises(ValueError, match="dimension 3 as before, got 4"):
        moments.update(normal(5, 4))
    with pytest.raises(ValueError, match=r"shape \(N,D\)"):
        moments.update(normal(5))
    with pytest.raises(ValueError, match="dimension 3 to be merged, got 4"):
        moments.merge(Moments().update(normal(5, 4)))
    assert moments.count == 5 and torch.isfinite(moments.cov).all()
    with pytest.raises(ValueError, match="num must be >= 2, got 1"):
        frechet_distance(moments, Moments().update(normal(1, 3)))
    with pytest.raises(ValueError, match="num must be >= 1, got 0"):
        frechet_distance(moments, Moments())
    with pytest.raises(ValueError, match="got 3 and 4"):
        frechet_distance(moments, Moments().update(normal(9, 4)))


# --- nearest neighbours --------------------------------------------------------------------------


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


# --- error bars ----------------------------------------------------------------------------------


def test_resampled_mean_has_the_known_error():
    x = 3 * normal(400, 1)
    result = resampled(lambda rows: rows.mean(), x, times=2000)
    assert result.value == float(x.mean())
    assert result.stderr == pytest.approx(float(x.std()) / 20, rel=0.06)
    y = normal(100, 1, seed=1)
    difference = resampled(lambda a, b: a.mean() - b.mean(), x, y, times=2000)
    truth = (float(x.var()) / 400 + float(y.var()) / 100) ** 0.5
    assert difference.stderr == pytest.approx(truth, rel=0.06)


def test_resampled_frechet_has_the_error_of_fresh_draws():
    def draw(k):
        return normal(200, 3, seed=k), 1.5 * normal(200, 3, seed=k + 1000) + 0.5

    fresh = np.std([fd(*draw(k)) for k in range(150)], ddof=1)
    errors = [resampled(fd, *draw(k), times=50).stderr for k in range(8)]
    assert np.mean(errors) == pytest.approx(fresh, rel=0.25)


def test_resampled_value_is_of_the_full_sets_and_seeded():
    a, b = normal(80, 50), normal(80, 50, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # halves have n <= D; the full sets do not
        first, again = (resampled(fd, a, b, times=5) for _ in range(2))
    assert first == again and first.value == fd(a, b)
    assert resampled(fd, a, b, times=5, seed=1).stderr != first.stderr
    seen = []
    resampled(lambda rows: seen.append(rows[:, 0].unique()) or 0, a, times=3)
    assert [len(rows) for rows in seen[1:]] == [40] * 3  # halves without a row twice


def test_resampled_refuses():
    with pytest.raises(ValueError, match="times must be >= 2, got 1"):
        resampled(nn1, normal(9, 2), normal(9, 2), times=1)
    with pytest.raises(ValueError, match=r"at least 4 rows, got \[9, 3\]"):
        resampled(nn1, normal(9, 2), normal(3, 2))
