"""The training stream: its order, classes in balance, images from disk as from memory."""

import pickle
from itertools import islice

import numpy as np
import pytest
import torch

from genmodels.config import DataConfig
from genmodels.data import ImageDataModule, TrainStream, load_split, own
from tests.helpers.small_sets import on_disk_cases


def stream(step=0, **options):
    pixels = torch.arange(100, dtype=torch.uint8).reshape(100, 1, 1, 1)
    arguments = {"seed": 5, "batch_size": 24, "first_step": lambda: step} | options
    return iter(TrainStream(pixels, torch.arange(100), **arguments))


def test_stream_visits_every_image_once_a_pass():
    batches = [next(iterator) for iterator in [stream()] for _ in range(25)]  # 600 = 6 passes
    numbers = torch.cat([batch["label"] for batch in batches]).reshape(6, 100)
    for row in numbers:
        assert row.sort().values.tolist() == list(range(100))
    assert not torch.equal(numbers[0], numbers[1])
    assert torch.equal(torch.cat([batch["n"] for batch in batches]), torch.arange(600))


def test_stream_is_a_function_of_n_alone():
    """Starting later, splitting over ranks and micro-batches: the same images at the same n."""
    iterator = stream()
    whole = [next(iterator) for _ in range(10)]
    later = stream(step=7)
    for expected in whole[7:]:
        batch = next(later)
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
    ranks = [stream(accumulate=3, rank=rank, world=4) for rank in range(4)]
    for expected in whole:
        parts = [next(rank) for _ in range(3) for rank in ranks]
        for key in expected:
            assert torch.equal(torch.cat([part[key] for part in parts]), expected[key])


def test_stream_refuses_an_indivisible_batch():
    with pytest.raises(ValueError, match="data.batch_size=24: .* = 5 x 2; try 30"):
        stream(accumulate=2, world=5)


def test_balanced_classes():
    """Ten images of class 0, one of class 1, five of class 2: each class has every third place."""
    labels = torch.tensor([0] * 10 + [1] + [2] * 5)
    pixels = torch.arange(16, dtype=torch.uint8).reshape(16, 1, 1, 1)

    def stream(step=0, **options):
        return iter(TrainStream(pixels, labels, 7, 12, lambda: step, balanced=True, **options))

    batches = list(islice(stream(), 30))
    drawn = torch.cat([batch["label"] for batch in batches]).reshape(-1, 3)
    assert torch.equal(drawn.sort(1).values, torch.arange(3).expand(120, 3))
    assert len({tuple(row) for row in drawn.tolist()}) == 6  # in every order
    numbers = torch.cat([batch["image"].flatten() for batch in batches])
    zeros = numbers[numbers < 10].reshape(12, 10)  # every pass over class 0 holds all of it
    assert torch.equal(zeros.sort(1).values, torch.arange(10, dtype=torch.uint8).expand(12, 10))
    assert not torch.equal(zeros[0], zeros[1])
    later = list(islice(stream(step=20), 10))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(later, batches[20:]))
    parts = list(islice(stream(rank=1, world=3), 5))
    assert all(torch.equal(a["image"], b["image"][4:8]) for a, b in zip(parts, batches))
    with pytest.raises(ValueError, match="data.balanced=true: there are images without a class"):
        TrainStream(pixels, labels - 1, 0, 4, lambda: 0, balanced=True)


def test_balanced_data_without_labels_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 2, 2, 1), np.uint8))
    cfg = DataConfig(name="npy", root=str(tmp_path / "a.npy"), balanced=True)
    with pytest.raises(ValueError, match="data.balanced=true: npy has images without a class"):
        ImageDataModule(cfg)


@pytest.mark.parametrize("name", ["npy", "zip", "imagefolder"])
def test_images_from_disk_make_the_same_batches(tmp_path, name):
    """In memory, read in place, by two workers, by two ranks, and after a resume at step 4."""
    root = str(on_disk_cases(tmp_path)[name])
    words = {"name": name, "root": root, "pad": 1, "holdout": 0.1}
    memory = load_split(DataConfig(**words), "train")
    disk = load_split(DataConfig(**words, device="disk"), "train")
    assert isinstance(disk[0], own.OnDisk) and disk[0].shape == tuple(memory[0].shape)
    assert disk[0].nbytes == memory[0].nbytes
    assert torch.equal(torch.cat(list(disk[0].split(4))), memory[0])

    def batches(pixels, labels, step=0, count=12, **options):
        arguments = {"seed": 3, "batch_size": 8, "first_step": lambda: step} | options
        return list(islice(TrainStream(pixels, labels, **arguments), count))

    def same(found, expected):
        assert len(found) == len(expected) > 0
        for a, b in zip(found, expected):
            assert all(torch.equal(a[key], b[key]) for key in ("image", "label", "n"))

    whole = batches(*memory, accumulate=2)
    same(batches(*disk, accumulate=2), whole)
    same(batches(*disk, accumulate=2, workers=2), whole)
    same(batches(*disk, accumulate=2, workers=2, step=4, count=4), whole[8:])
    ranks = [batches(*disk, accumulate=2, workers=1, rank=r, world=2) for r in range(2)]
    pairs = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(*ranks)]
    same(pairs, whole)


def test_images_on_disk_travel_to_any_worker(tmp_path):
    """Workers that do not begin as copies of the process (spawn, forkserver) get them pickled."""
    for name, root in on_disk_cases(tmp_path).items():
        pixels, _ = load_split(DataConfig(name=name, root=str(root), device="disk"), "train")
        assert torch.equal(pickle.loads(pickle.dumps(pixels))[:3], pixels[:3])


def test_a_broken_picture_in_a_worker_is_one_line(tmp_path):
    cases = on_disk_cases(tmp_path)
    broken = cases["imagefolder"] / "07.png"
    broken.write_bytes(broken.read_bytes()[:60])
    cfg = DataConfig(name="imagefolder", root=str(cases["imagefolder"]), device="disk", holdout=0.0)
    stream = TrainStream(*load_split(cfg, "train"), 0, 60, lambda: 0, workers=1)
    with pytest.raises(ValueError, match=r"^image=.*07.png: cannot be read \(.*\); remove it$"):
        next(iter(stream))


@pytest.mark.parametrize("name", ["npy", "zip"])
def test_training_from_disk_makes_the_same_weights(tmp_path, train_tiny, name):
    """Through Lightning: two workers, resumed half way, against images in memory."""
    import train
    from genmodels.checkpoint import read_checkpoint

    words = (
        f"data.name={name}",
        f"data.root={on_disk_cases(tmp_path)[name]}",
        "data.flip=true",
        "data.holdout=0.4",
        "trainer.accumulate=2",
        "eval.loss_every=3",
    )
    memory = train_tiny(*words, "trainer.max_steps=6")
    disk = train_tiny(*words, "data.device=disk", "trainer.max_steps=3")
    resumed = [f"resume={disk}", "trainer.max_steps=6", "data.workers=1"]
    assert train.main(resumed) == 0
    found, expected = (read_checkpoint(run / "checkpoints/last.ckpt") for run in (disk, memory))
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(found[key][k], v) for k, v in expected[key].items())
    rows = [
        [{k: v for k, v in row.items() if "second" not in k} for row in read_csv(run)]
        for run in (disk, memory)
    ]
    assert rows[0] == rows[1] and rows[0][-1]["val/loss"]


def read_csv(run):
    import csv

    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))
