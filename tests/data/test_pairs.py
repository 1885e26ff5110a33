"""Pools of fake images, and training images paired with them."""

from types import SimpleNamespace

import pytest
import torch

from genmodels.config import DataConfig
from genmodels.data import pairs
from genmodels.generation import NonFinite
from genmodels.training import pool


def test_real_images_that_are_no_bytes_are_refused():
    data = DataConfig(name="moons")
    with pytest.raises(ValueError, match="data.name=moons: fakes are kept as bytes"):
        pairs.PairedData(data)


def test_a_pool_is_made_by_shards_and_only_what_is_missing(tmp_path):
    asked = []

    def generate(seeds):
        asked.append(list(seeds))
        if seeds[0] in nonfinite:
            raise NonFinite(f"seeds from {seeds[0]}")
        pictures = torch.tensor([[[[seed % 256, 0], [1, 2]]] for seed in seeds], dtype=torch.uint8)
        return pictures, [seed % 10 for seed in seeds]

    def made():
        return pool.load_shards(pool.make_shards(tmp_path, range(100, 110), 4, generate))

    nonfinite = []
    pictures, labels = made()
    assert asked == [[100, 101, 102, 103], [104, 105, 106, 107], [108, 109]]
    assert pictures.shape == (10, 1, 2, 2) and pictures[:, 0, 0, 0].tolist() == [*range(100, 110)]
    assert labels.tolist() == [seed % 10 for seed in range(100, 110)]
    (tmp_path / "shard-00001.npz").unlink()
    assert torch.equal(made()[0], pictures) and asked[3:] == [[104, 105, 106, 107]]
    # What is not finite is told to whoever waits, and the rest is not made in vain.
    for path in tmp_path.iterdir():
        path.unlink()
    nonfinite.append(104)
    for _ in range(2):  # the second time it is known
        with pytest.raises(NonFinite, match="seeds from 104"):
            made()
        assert [seeds[0] for seeds in asked[4:]] == [100, 104]


def test_pairs_are_a_function_of_the_position():
    data = pairs.PairedData(DataConfig(labels=True), seed=5)
    size = len(data.train[0])
    data.pool = (
        torch.arange(size * 64, dtype=torch.int64).reshape(size, 1, 8, 8),
        torch.arange(size),
    )

    def first(step, count, batch):
        data.cfg.batch_size = batch
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(
            global_step=step, global_rank=0, world_size=1, strategy=strategy, training=True
        )
        return [pair for pair, _ in zip(data.train_dataloader(), range(count))]

    whole = first(0, 8, 16)
    fake, real = (torch.cat([pair[key] for pair in whole]) for key in ("fake_label", "n"))
    assert torch.equal(real, torch.arange(128)) and len(fake.unique()) == 128
    resumed = first(5, 3, 16)
    assert torch.equal(resumed[0]["fake"], whole[5]["fake"])
    small = torch.cat([pair["fake_label"] for pair in first(0, 16, 8)])
    assert torch.equal(small, fake)
    images = torch.cat([pair["image"] for pair in whole])
    numbers = [(data.train[0] == image).flatten(1).all(1).nonzero()[0].item() for image in images]
    assert sum(int(a) == b for a, b in zip(fake, numbers)) < 10  # another order than the real ones
    assert torch.equal(whole[0]["fake"][:, 0, 0, 0], whole[0]["fake_label"] * 64)  # with its label
