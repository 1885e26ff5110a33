import numpy as np
import pytest
import torch

from genmodels import images
from genmodels.config import DataConfig
from genmodels.data import ImageDataModule, fill_in, load_split, toys
from genmodels.evaluation.scorer import Scorer
from genmodels.images import as_bytes


def part(name, number, count=40_000):
    points, labels = toys.toy_points(name, count, seed=0)
    return points.flatten(1)[labels == number].double().numpy()


@pytest.mark.parametrize("name", toys.TOYS)
def test_toys_are_fixed_points_in_the_unit_square(name):
    points, labels = toys.toy_points(name, 5000, seed=0)
    assert points.shape == (5000, 2, 1, 1) and points.dtype == torch.float32
    assert points.abs().max() <= 1 and len(labels.unique()) == toys.TOYS[name][1]
    assert torch.equal(toys.toy_points(name, 1200, seed=0)[0], points[:1200])
    assert not torch.equal(toys.toy_points(name, 5000, seed=1)[0], points)
    cfg = DataConfig(name=name, points=500)
    train, held_out = load_split(cfg, "train")[0], load_split(cfg, "test")[0]
    assert torch.equal(train, points[:500]) and len(held_out) == 100
    assert not set(train[:, 0, 0, 0].tolist()) & set(held_out[:, 0, 0, 0].tolist())
    assert fill_in(cfg).shape == [2, 1, 1] and cfg.classes == toys.TOYS[name][1]


def test_every_part_has_its_share():
    counts = torch.bincount(toys.toy_points("eight_squares", 80_000, seed=0)[1])
    assert (counts - 10_000).abs().max() < 5 * (80_000 * 7 / 64) ** 0.5


@pytest.mark.parametrize("number", [0, 3])
def test_eight_squares_and_gaussians_have_the_moments_of_their_law(number):
    centre = 0.7 * np.array([np.cos(np.pi * number / 4), np.sin(np.pi * number / 4)])
    for name, std in (("eight_squares", 0.3 / 12**0.5), ("eight_gaussians", 0.05)):
        points = part(name, number)
        error = std / len(points) ** 0.5
        assert np.abs(points.mean(0) - centre).max() < 5 * error
        assert np.abs(points.std(0) - std).max() < 5 * error
        assert abs(np.corrcoef(points.T)[0, 1]) < 5 / len(points) ** 0.5
    assert np.abs(part("eight_squares", number) - centre).max() <= 0.15


def test_checkerboard_fills_the_black_fields_and_no_other():
    points = toys.toy_points("checkerboard", 80_000, seed=0)[0].flatten(1).numpy()
    column, row = np.floor(2 * (points + 1)).clip(0, 3).astype(int).T
    counts = np.zeros((4, 4))
    np.add.at(counts, (row, column), 1)
    black = (np.arange(4)[:, None] + np.arange(4)) % 2 == 0
    assert counts[~black].sum() == 0
    assert np.abs(counts[black] - 10_000).max() < 5 * 100


def test_circles_and_moons_lie_on_their_curves():
    for number, radius in ((0, 0.8), (1, 0.4)):
        off = np.linalg.norm(part("circles", number), axis=1) - radius
        # The radius of a point with noise s in the plane is r + s^2 / 2r on average.
        assert abs(off.mean() - toys.NOISE**2 / (2 * radius)) < 5 * toys.NOISE / len(off) ** 0.5
        assert abs(off.std() - toys.NOISE) < 5 * toys.NOISE / len(off) ** 0.5
    for number, sign in ((0, 1), (1, -1)):
        points = sign * part("moons", number) + np.array([0.5, 0.25]) / 1.8
        off = np.linalg.norm(points, axis=1) - 1 / 1.8
        assert abs(off.std() - toys.NOISE) < 0.001
        assert points[:, 1].min() > -6 * toys.NOISE  # a half circle: the upper one


def test_toys_reach_a_method_unrounded():
    module = ImageDataModule(DataConfig(name="moons", points=50, batch_size=4))
    batch = {"image": module.train[0][:4], "n": torch.arange(4)}
    assert torch.equal(module.on_after_batch_transfer(batch, 0)["image"], module.train[0][:4])


def test_the_grid_of_points_is_a_map():
    corners = torch.tensor([[0, 0], [255, 0], [255, 255], [255, 255]], dtype=torch.uint8)
    sheet = images.grid(corners.reshape(4, 2, 1, 1))
    assert sheet.shape == (3, 128, 128)
    assert sheet[0, 127, 0] == 180 and sheet[0, 127, 127] == 180 and sheet[0, 0, 127] == 255
    assert sheet.count_nonzero() == 9


def test_points_are_no_png(tmp_path):
    with pytest.raises(ValueError, match="format=png: .* not 2; write format=npz"):
        images.write_png(tmp_path / "a.png", torch.zeros(2, 1, 1, dtype=torch.uint8))
    assert not list(tmp_path.iterdir())


def test_scores_take_points_as_the_bytes_a_model_makes():
    points = load_split(DataConfig(name="moons"), "train")[0][:200]
    scorer = Scorer(["fd"], "pixels", reference=points)
    assert scorer(as_bytes(points))["fd"]["value"] == pytest.approx(0, abs=1e-9)
    shifted = scorer(points + 0.1)["fd"]["value"]
    assert shifted == pytest.approx(2 * (0.1 / 2) ** 2, rel=0.05)  # features are in [0, 1]
