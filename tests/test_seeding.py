import pytest
import torch
from scipy import stats

from genmodels import seeding
from genmodels.kernels.philox import philox, philox_normal, philox_uniform


def words(key, *counter):
    return [int(w) for w in philox(*(torch.tensor(value) for value in (key, *counter)))]


def test_philox_meets_the_published_known_answers():
    """The kat_vectors of Random123 for philox4x32-10."""
    ones = 0xFFFFFFFF
    assert words(0, 0, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(-1, ones, ones, ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    key = 0xA4093822 | 0x299F31D0 << 32
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(key, *counter) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_draws_do_not_depend_on_the_batch():
    n = torch.tensor([5, 2**40, seeding.HELD_OUT + 1])
    together = philox_normal((3, 5, 7), 11, n, stream=3)
    assert together.shape == (3, 3, 5, 7)
    for i in range(3):
        assert torch.equal(philox_normal((3, 5, 7), 11, n[i : i + 1], stream=3)[0], together[i])
    keyed = philox_normal((4,), torch.tensor([7, 8]), 5)
    assert torch.equal(keyed[1], philox_normal((4,), 8, 5)[0])


def test_every_part_of_the_counter_matters():
    base = philox_normal((1000,), 1, 2, stream=3)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1 + 2**32, 2, 3), (1, 2 + 2**32, 3)):
        draw = philox_normal((1000,), other[0], other[1], stream=other[2])
        assert abs(torch.corrcoef(torch.stack([base[0], draw[0]]))[0, 1]) < 0.15  # 4.7 sigma


def test_laws():
    """Kolmogorov-Smirnov on 200,000 draws: a p-value below 1e-4 is not chance."""
    normal = philox_normal((200_000,), 1)[0].double().numpy()
    assert stats.kstest(normal, "norm").pvalue > 1e-4
    uniform = philox_uniform((200_000,), 1, stream=1)[0].double().numpy()
    assert stats.kstest(uniform, "uniform").pvalue > 1e-4
    assert uniform.min() >= 0 and uniform.max() < 1


def test_permutation():
    first = seeding.permutation(3, 0, 1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert torch.equal(first, seeding.permutation(3, 0, 1000))
    assert (first == seeding.permutation(3, 1, 1000)).sum() < 10  # 1 expected, law Poisson
    assert (first == seeding.permutation(4, 0, 1000)).sum() < 10
    assert abs(stats.spearmanr(first, torch.arange(1000)).statistic) < 0.15


def test_image_generators_follow_the_published_draw_order():
    """Per image: latents, class, sampler's noise, from one torch generator of that seed."""
    seeds = [3, 2**32 + 5]
    generators = seeding.ImageGenerators(seeds)
    latents, labels = generators.randn((1, 4, 4)), generators.randint(10)
    churn = generators.randn((1, 4, 4), torch.float64)
    for k, seed in enumerate((3, 5)):
        own = torch.Generator().manual_seed(seed)
        assert torch.equal(torch.randn((1, 4, 4), generator=own), latents[k])
        assert torch.randint(10, (), generator=own) == labels[k]
        assert torch.equal(torch.randn((1, 4, 4), generator=own, dtype=torch.float64), churn[k])


def test_dropout_seeds_differ_by_step_and_rank():
    seeds = {seeding.torch_seed(1, step, rank) for step in range(50) for rank in range(4)}
    assert len(seeds) == 200 and all(0 <= seed < 2**63 for seed in seeds)


def test_no_seed_is_refused():
    with pytest.raises(ValueError, match=r"seeds=\[\]: give at least one whole number"):
        seeding.ImageGenerators([])
