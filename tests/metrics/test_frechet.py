"""Moments and Frechet distances against closed forms, scipy, torchmetrics and torch-fidelity."""

import pickle
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from genmodels.config import DataConfig
from genmodels.data import load_split
from genmodels.metrics.features import extract, load_features
from genmodels.metrics.frechet import Moments, RootTrace, frechet_distance


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def random_cov(dim, seed, rank=None):
    factor = normal(dim, rank or 2 * dim, seed=seed)
    return factor @ factor.T / dim


def fd(a, b):
    return float(frechet_distance(Moments().update(a), Moments().update(b)))


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


def test_frechet_against_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pixels(torch.nn.Module):
        num_features = 16

        def forward(self, images):
            return images.double().flatten(1)[:, 24:40] / 255

    train, held = (load_split(DataConfig(), split)[0] for split in ("train", "test"))
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


@pytest.mark.parametrize(("n", "m"), [(40, 30), (40, 300), (300, 40), (64, 64)])
def test_few_rows_give_the_distance_of_their_covariances(n, m, monkeypatch):
    """Kept rows against the covariances themselves, whose root is scipy's."""
    x, y = normal(n, 64) * torch.linspace(0.2, 1, 64), normal(m, 64, seed=1) + 0.1
    few = [Moments().update(x), Moments().update(y)]
    assert [moments.keeps_rows for moments in few] == [n <= 64, m <= 64]
    covs = [np.cov(rows.numpy().T) for rows in (x, y)]
    product = scipy.linalg.sqrtm(covs[0]) @ covs[1] @ scipy.linalg.sqrtm(covs[0])
    trace = np.sqrt(np.linalg.eigvalsh((product + product.T).real / 2).clip(0)).sum()
    truth = (x.mean(0) - y.mean(0)).square().sum() + sum(np.trace(c) for c in covs) - 2 * trace
    with pytest.warns(UserWarning):
        found = frechet_distance(*few)
    # scipy's root of a singular matrix is what is off: its roots of rounding size are 1e-8.
    assert found.singular and found.value == pytest.approx(float(truth), abs=1e-6)
    sums = [Moments.from_stats(k.mean, torch.from_numpy(c), k.count) for k, c in zip(few, covs)]
    with pytest.warns(UserWarning):
        assert found.value == pytest.approx(frechet_distance(*sums).value, rel=1e-12)


def test_rows_become_sums_beyond_the_dimension():
    """Whatever the way: batches, merges with and without another shift, and back from arrays."""
    x = normal(60, 20)
    direct = Moments().update(x[:50])
    assert not direct.keeps_rows
    for split in (5, 20, 45):
        shift = torch.full((20,), 0.3)
        parts = [Moments(shift).update(x[:split]), Moments().update(x[split:50])]
        joined = parts[0].merge(parts[1])
        torch.testing.assert_close(joined.mean, direct.mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(joined.cov, direct.cov, rtol=1e-11, atol=1e-13)
    few = Moments(torch.full((20,), 0.3)).update(x[:6]).merge(Moments().update(x[6:15]))
    assert few.keeps_rows and few.count == 15
    np.testing.assert_allclose(few.cov, np.cov(x[:15].numpy().T), atol=1e-13)
    np.testing.assert_allclose(few.factor.T @ few.factor, np.cov(x[:15].numpy().T), atol=1e-13)
    for moments in (few, direct):
        again = Moments.from_arrays(moments.arrays(), moments.shift)
        torch.testing.assert_close(again.cov, moments.cov, rtol=1e-12, atol=1e-15)
        assert again.keeps_rows == moments.keeps_rows
    assert torch.equal(few.to("cpu").cov, few.cov)
    left = direct.without(Moments(direct.shift).update(x[:10]))
    np.testing.assert_allclose(left.cov, np.cov(x[10:50].numpy().T), atol=1e-12)


# --- torch-fidelity ------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "dim"), [(400, 700, 64), (2000, 1000, 32), (50, 60, 100)])
def test_frechet_against_torch_fidelity(n, m, dim):
    """On the same float32 rows; with n < D the referee's own root is off, by 2e-5 of the traces."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    mix = normal(dim, dim, seed=9) / dim**0.5
    a, b = ((normal(k, dim, seed=k) @ mix + 0.3).relu().float() for k in (n, m))
    b = 1.1 * b + 0.02
    stats = [fid_features_to_statistics(rows) for rows in (a, b)]
    referee = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours = fd(a, b)
    traces = sum(np.trace(stat["sigma"]) for stat in stats)
    assert abs(ours - referee) <= (1e-6 if n > dim else 4e-5) * traces
    assert ours > 100 * 1e-6 * traces  # so that the comparison says something


def test_a_shared_root_changes_nothing():
    sets = [Moments().update(normal(80, 5, seed=k) * (1 + k)) for k in range(3)]
    root = RootTrace(sets[0])
    for other in sets[1:]:
        assert frechet_distance(other, sets[0], root=root) == frechet_distance(other, sets[0])
