"""Error bars of scores, from blocks and from random halves, against known laws."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genmodels.metrics import frechet
from genmodels.metrics.errorbars import BLOCKS, block_of, jackknife, resampled
from genmodels.metrics.frechet import Moments, block_frechet, frechet_distance
from genmodels.metrics.manifold import nn1

# ------------------------------------------------------------------------------------------------
# Sixteen blocks: error bars and limits of Frechet distances


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_blocks_share_out_any_order_of_classes():
    n = 5003
    blocks = block_of(n)
    assert torch.equal(block_of(77), blocks[:77])  # a function of the image's place alone
    assert set(blocks[:16].tolist()) == set(range(BLOCKS))
    sizes = torch.bincount(blocks, minlength=BLOCKS)
    assert sizes.max() - sizes.min() <= 1
    index = torch.arange(n)
    # Sorted by class, dealt in turn, and dealt in turn over two, four, ... sixteen classes.
    for labels in (index // 501, index % 10, *(index % 2**k for k in range(1, 5))):
        counts = torch.bincount(blocks * 16 + labels, minlength=256).reshape(BLOCKS, 16).double()
        share = counts[:, : int(labels.max()) + 1] / sizes[:, None]
        expected = torch.bincount(labels) / n
        assert ((share - expected).abs() < 5 * (expected / sizes.min()) ** 0.5).all()


def test_jackknife_of_a_mean_and_of_a_variance():
    """The mean: its textbook error. The variance with denominator n: freed of its bias exactly."""
    x = normal(320) ** 2
    parts = x.reshape(16, 20)
    rest = [torch.cat([parts[:g].flatten(), parts[g + 1 :].flatten()]) for g in range(16)]
    stderr, corrected = jackknife(float(x.mean()), [float(r.mean()) for r in rest], [20] * 16)
    assert corrected == pytest.approx(float(x.mean()))
    assert stderr == pytest.approx(float(parts.mean(1).std()) / 4)
    values = float(x.var(correction=0)), [float(r.var(correction=0)) for r in rest]
    # Exact where a block is one image; over blocks of 20 the bias left is of order 1/n^2.
    assert jackknife(*values, [20] * 16)[1] == pytest.approx(float(x.var()), rel=3e-3)
    single = [float(torch.cat([x[:i], x[i + 1 :]]).var(correction=0)) for i in range(320)]
    assert jackknife(values[0], single, [1] * 320)[1] == pytest.approx(float(x.var()), rel=1e-12)


def test_jackknife_of_unequal_blocks():
    """A mean again: nothing to correct, and the error of blocks that count by their size."""
    x, sizes = normal(48, seed=3), [4] * 8 + [2] * 8
    parts = x.split(sizes)
    total = float(x.sum())
    rest = [(total - float(p.sum())) / (48 - len(p)) for p in parts]
    stderr, corrected = jackknife(total / 48, rest, sizes)
    assert corrected == pytest.approx(total / 48)
    pseudo = torch.stack([p.mean() for p in parts]) - total / 48
    weight = torch.tensor(sizes).double() / 48
    assert stderr**2 == pytest.approx(float((pseudo**2 * weight / (1 - weight)).mean()))


def blocks_of_rows(x):
    blocks = block_of(len(x))
    return [Moments().update(x[blocks == b]) for b in range(BLOCKS)]


def reference_of(mean, scale):
    return Moments.from_stats(mean, torch.diag(scale**2), 10**9)


@pytest.mark.parametrize(("dim", "n", "law"), [(4, 150, "apart"), (16, 160, "equal")])
def test_interval_of_the_limit_covers_it(dim, n, law):
    """Known moments, 100 draws: 95 % intervals miss the limit ten times at most."""
    scale = torch.ones(dim) if law == "equal" else torch.linspace(0.4, 1.2, dim)
    scale, mean = scale.double(), torch.zeros(dim).double()
    mean[0] = 0.0 if law == "equal" else 0.5
    truth = float(mean.square().sum() + (scale - 1).square().sum())
    reference = reference_of(torch.zeros(dim), torch.ones(dim))
    found = []
    for k in range(100):
        x = torch.randn(n, dim, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        found.append(block_frechet(blocks_of_rows(x * scale + mean), reference))
    hits = sum(low <= truth <= high for low, high in (f.interval for f in found))
    assert hits >= 90
    limits, values = (torch.tensor([getattr(f, k) for f in found]) for k in ("limit", "value"))
    errors = torch.tensor([f.limit_stderr for f in found])
    assert abs(limits.mean() - truth) < 4 * limits.std() / 10
    assert values.mean() - truth > 10 * abs(limits.mean() - truth)  # what the limit corrects
    assert 0.7 < float(errors.mean() / limits.std()) < 2  # cautious where the laws are equal
    assert float(limits.std() / values.std()) < 1.3  # the extrapolation costs little


def test_the_limit_is_exact_for_a_law_of_second_order(monkeypatch):
    """E FD(n) = 3 + 5/n + 70/n^2, put in the place of the distance: the limit is 3."""
    law = lambda first, *_, **__: SimpleNamespace(value=3 + 5 / first.count + 70 / first.count**2)  # noqa: E731
    monkeypatch.setattr(frechet, "frechet_distance", law)
    found = block_frechet(blocks_of_rows(normal(320, 2)), reference_of(*torch.eye(2).double()))
    assert found.limit == pytest.approx(3, abs=1e-12)
    assert found.value == pytest.approx(3 + 5 / 320 + 70 / 320**2)
    assert found.limit_stderr == pytest.approx(found.stderr, abs=1e-12) and found.stderr < 1e-12


def test_stderr_is_the_spread_of_fresh_draws():
    scale = torch.linspace(0.4, 1.2, 6).double()
    reference = reference_of(torch.zeros(6), torch.ones(6))
    draws = [
        torch.randn(400, 6, generator=torch.Generator().manual_seed(k)) * scale + 0.2
        for k in range(60)
    ]
    found = [block_frechet(blocks_of_rows(x), reference) for x in draws]
    spread = torch.tensor([f.value for f in found]).std()
    assert float(torch.tensor([f.stderr for f in found]).mean() / spread) == pytest.approx(
        1, abs=0.2
    )
    # The same images sorted along a feature: blocks are not in step with any order.
    order = draws[0][:, 0].argsort()
    ratio = block_frechet(blocks_of_rows(draws[0][order]), reference).stderr / float(spread)
    assert 0.5 < ratio < 1.6


def test_block_frechet_of_few_images_says_what_it_can():
    reference = reference_of(torch.zeros(20), torch.ones(20))

    def found(n, **options):
        return block_frechet(blocks_of_rows(normal(n, 20)), reference, **options)

    with pytest.warns(UserWarning, match="19 images in 20 dimensions"):
        assert found(19).stderr is None and found(19).limit is None
    assert found(21).stderr is None  # without a block n <= D
    assert found(38).stderr > 0 and found(38).limit is None  # halves have n <= D
    full = found(400, curve=True)
    assert full.sizes == (400, 375, 200, 100, 50, 25) and len(full.values) == 6
    assert sorted(full.values) == list(full.values)  # the bias grows as n falls
    assert full.value == pytest.approx(fd_to(reference, normal(400, 20)), rel=1e-10)
    assert found(400).limit == full.limit


def fd_to(reference, x):
    return frechet_distance(Moments().update(x), reference).value


# ------------------------------------------------------------------------------------------------
# Random halves, against textbook errors and fresh draws


def fd(a, b):
    return float(frechet_distance(Moments().update(a), Moments().update(b)))


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


def test_blocks_of_few_rows_give_the_jackknife_of_their_sums(monkeypatch):
    """Blocks smaller than the dimension keep rows: what is left out is then subtracted."""
    monkeypatch.setattr(frechet, "_SMALL", 0)
    x, one = normal(400, 30), torch.ones(30).double()
    reference = reference_of(0.2 * one, 1.1 * one)
    blocks = blocks_of_rows(x)
    assert all(block.keeps_rows for block in blocks)
    found = block_frechet(blocks, reference, curve=True)
    for block in blocks:
        block._sum_up()
    summed = block_frechet(blocks, reference, curve=True)
    assert found.stderr == pytest.approx(summed.stderr, rel=1e-9)
    assert found.limit == pytest.approx(summed.limit, rel=1e-9)
    assert sum(d * d for d in found.deviations) == pytest.approx(found.stderr**2, rel=1e-12)
