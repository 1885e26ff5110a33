"""Baselines that learn from a noisy picture alone: where pixels come from, losses in numbers."""

import math

import numpy as np
import pytest
import torch

import genmodels
from genmodels.methods.self_supervised import blind_spots, neighbours
from tests.helpers.paths import ROOT

CONFIG = str(ROOT / "configs" / "noise2score_bsd400.yaml")
TAU, SIGMA = 0.2, 25 / 255  # of clean Gaussian pixels, and of the noise


def build(objective, *more):
    small = ("data.patch=16", "network.channels=[4]", "network.blocks=[1]")
    return genmodels.build(CONFIG, *small, f"method.objective={objective}", *more)


class Linear(torch.nn.Module):
    """F with w - sigma F = 1/2 + a (w - 1/2), whatever the level."""

    def __init__(self, a):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a))

    def forward(self, z, noise):
        return (1 - self.a) * (z - 0.5) / (noise.reshape(-1, 1, 1, 1) / 10)


class Exact(torch.nn.Module):
    """F of Gaussian pixels: the posterior mean is 1/2 + TAU^2 (w - 1/2) / (TAU^2 + t).

    Attributes:
        deviation: sqrt(t), as it was said last.
    """

    def forward(self, z, noise):
        deviation = self.deviation = noise.reshape(-1, 1, 1, 1) / 10
        return deviation * (z - 0.5) / (TAU**2 + deviation**2)


def noisy_batch(clean, count=300, seed=0):
    """Return a batch of pictures (count, 1, 16, 16) with noise of 25 on clean pixels on [0, 1]."""
    rng = np.random.default_rng(seed)
    y = clean(rng, (count, 1, 16, 16)) + SIGMA * rng.standard_normal((count, 1, 16, 16))
    image = torch.from_numpy(y * 2 - 1).float()
    return {"image": image, "n": torch.arange(count), "level": torch.full((count,), 25.0)}


def flat(rng, shape):
    """Return grey pictures."""
    return np.full(shape, 0.5)


def gaussian(rng, shape):
    """Return clean pixels N(1/2, TAU^2)."""
    return 0.5 + TAU * rng.standard_normal(shape)


def test_one_pixel_of_each_cell_comes_from_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    height, width, count = 44, 50, 200  # three cells across, the last of 6 columns
    order, choice = torch.rand(2, count, height, width, generator=generator)
    places = torch.arange(height * width).float().reshape(1, 1, height, width)
    y = torch.cat([places, -places], dim=1).expand(count, 2, -1, -1)
    seen, hidden = blind_spots(y, order, choice)
    assert hidden.shape == (count, 1, height, width)
    assert torch.equal(seen[:, 1], -seen[:, 0])
    assert torch.equal(torch.where(hidden, y, seen), y) and not (seen == y)[:, :1][hidden].any()
    for rows in (slice(0, 22), slice(22, 44)):
        for columns in (slice(0, 22), slice(22, 44), slice(44, 50)):
            assert (hidden[:, 0, rows, columns].sum(dim=(1, 2)) == 1).all()
    _, _, row, column = hidden.nonzero().T
    source = seen[:, :1][hidden].long()
    down, right = source // width - row, source % width - column
    assert max(down.abs().max(), right.abs().max()) == 5
    offsets, times = torch.stack([down, right]).unique(dim=1, return_counts=True)
    assert offsets.shape[1] == 120
    # Away from the edges each of the 120 comes equally often: chi2 of 119, 6 deviations.
    inside = (row >= 5) & (row < height - 5) & (column >= 5) & (column < width - 5)
    times = torch.stack([down, right])[:, inside].unique(dim=1, return_counts=True)[1].double()
    chi2 = ((times - times.mean()) ** 2 / times.mean()).sum()
    assert abs(float(chi2) - 119) < 6 * math.sqrt(2 * 119)
    # And each place of a cell is hidden equally often.
    places = (row % 22 * 22 + column % 22)[column < 44].bincount(minlength=484).double()
    chi2 = ((places - places.mean()) ** 2 / places.mean()).sum()
    assert abs(float(chi2) - 483) < 6 * math.sqrt(2 * 483)


def test_neighbours_share_a_side_and_all_eight_pairs_occur():
    y = torch.arange(2 * 7 * 9).float().reshape(1, 2, 7, 9).expand(300, -1, -1, -1)
    choice = torch.rand(300, 3, 4, generator=torch.Generator().manual_seed(0))
    first, second = (pick(y) for pick in neighbours(choice))
    assert first.shape == second.shape == (300, 2, 3, 4)
    assert torch.equal(first[:, 1] - first[:, 0], torch.full((300, 3, 4), 63.0))
    place = [part[:, 0].long() for part in (first, second)]
    rows, columns = [p // 9 for p in place], [p % 9 for p in place]
    for found, size in ((rows, (3, 1)), (columns, (1, 4))):
        cell = torch.arange(max(size)).reshape(size)
        assert all((each // 2 == cell).all() for each in found)
    apart = (rows[0] - rows[1]).abs() + (columns[0] - columns[1]).abs()
    assert (apart == 1).all()
    pairs = ((rows[0] % 2 * 2 + columns[0] % 2) * 4 + rows[1] % 2 * 2 + columns[1] % 2).flatten()
    times = pairs.unique(return_counts=True)[1].double()
    assert len(times) == 8 and float((times / times.mean() - 1).abs().max()) < 0.15


# Of flat pictures: handing a pixel on keeps the noise of two independent ones, 1/2 that of one.
@pytest.mark.parametrize(
    ("objective", "a", "floor"),
    [
        ("noise2void", 1.0, 2.0),
        ("noise2void", 0.0, 1.0),
        ("neighbor2neighbor", 1.0, 2.0),
        ("neighbor2neighbor", 0.0, 1 + 2 * 1.0),
        ("gr2r", 0.0, 1 / 0.15),
        ("gr2r", 1.0, 1 / 0.85 + 1 / 0.15),
    ],
)
def test_losses_of_flat_pictures(objective, a, floor):
    model, batch = build(objective), noisy_batch(flat)
    batch["n"] += 10**9  # the second term of neighbor2neighbor has its whole weight
    model.net = Linear(a)
    pixels = 300 if objective == "noise2void" else 300 * 64
    with torch.no_grad():
        loss = float(model.loss(batch)[0])
    assert loss == pytest.approx(floor, abs=4 * floor * math.sqrt(2 / pixels))


def test_the_second_term_of_neighbours_grows_to_its_weight():
    model, batch = build("neighbor2neighbor", "method.gamma=3"), noisy_batch(flat, 64)
    model.net = Linear(0.0)
    half = model.cfg.trainer.max_steps * model.cfg.data.batch_size // 2
    losses = [float(model.loss(batch | {"n": batch["n"] * 0 + n})[0]) for n in (0, half)]
    # The same pairs of pixels give 1 and 1 + 3/2 of one number.
    assert losses[1] > 2 and losses[0] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("a", [0.0, 0.7, 1.0])
def test_sure_of_a_line_is_its_closed_form(a):
    """(1 - a)^2 mean (w - 1/2)^2 / sigma^2 - 1 + 2 a, exact for any signs; its mean is the risk."""
    model, batch = build("sure"), noisy_batch(gaussian)
    model.net = Linear(a)
    loss = float(model.loss(batch)[0])
    w = (batch["image"].double() + 1) / 2
    exact = (1 - a) ** 2 * float((w - 0.5).square().mean()) / SIGMA**2 - 1 + 2 * a
    assert loss == pytest.approx(exact, abs=2e-4)
    risk = ((1 - a) ** 2 * TAU**2 + a**2 * SIGMA**2) / SIGMA**2
    deviation = (1 - a) ** 2 * (TAU**2 + SIGMA**2) / SIGMA**2 * math.sqrt(2 / w.numel())
    assert loss == pytest.approx(risk, abs=4 * deviation + 2e-4)


def test_the_multiplier_of_unsure_finds_its_saddle():
    """(1 - a)^2 V / sigma^2 + 2 m a, V = TAU^2 + sigma^2, is level at a = 0 and m = V / sigma^2."""
    model, batch = build("unsure", "optim.weight_decay=0"), noisy_batch(gaussian, 8)
    model.net = Linear(0.5)
    loss, _ = model.loss(batch)
    loss.backward()
    w = (batch["image"].double() + 1) / 2
    variance = float((w - 0.5).square().mean()) / SIGMA**2
    assert float(loss) == pytest.approx(0.25 * variance + 2 * 0.5, rel=1e-4)
    assert float(model.multiplier.grad) == pytest.approx(-2 * 0.5, abs=1e-3)  # up, by descent
    assert float(model.net.a.grad) == pytest.approx(-2 * 0.5 * variance + 2, rel=1e-3)
    optimizer = torch.optim.AdamW(model.parameter_groups(), betas=(0.5, 0.9))
    for step in range(200):
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 0.05 if step < 140 else 0.01
        model.loss(batch)[0].backward()
        optimizer.step()
    assert float(model.net.a) == pytest.approx(0, abs=0.02)
    assert float(model.multiplier) == pytest.approx(variance, rel=0.03)
    assert float(model.loss(batch)[1]["multiplier"]) == float(model.multiplier)


def test_gr2r_with_the_true_denoiser_stands_at_its_floor():
    """The risk at the level of y1, and the noise of the independent y2: sigma^2 / share."""
    model, batch = build("gr2r", "method.share=0.3"), noisy_batch(gaussian)
    model.net = Exact()
    more = SIGMA**2 / 0.7
    floor = (TAU**2 * more / (TAU**2 + more)) / SIGMA**2 + 1 / 0.3
    deviation = floor * math.sqrt(2 / batch["image"].numel())
    assert float(model.loss(batch)[0]) == pytest.approx(floor, abs=4 * deviation)
    assert model.net.deviation.flatten().tolist() == pytest.approx([math.sqrt(more)] * 300)


def test_gr2r_restores_by_the_mean_over_its_splits():
    """1/2 + a (y1 - 1/2): of 200 splits what is left of the added noise is a hundredth of it."""
    model, y = build("gr2r", "method.probes=200"), torch.full((2, 1, 16, 16), 0.7)
    model.net = Linear(0.5)
    with torch.no_grad():
        restored = model.estimate(y, torch.full((2,), 25.0))
    assert torch.equal(restored[0], restored[1])  # whatever lies beside it
    left = 0.5 * SIGMA * math.sqrt(0.15 / 0.85 / 200)
    assert float((restored[0] - 0.6).std()) == pytest.approx(left, rel=0.2)
    assert float(restored.mean()) == pytest.approx(0.6, abs=4 * left / 16)


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("noise2void", ["data.noise.law=poisson", "data.noise.level=0.02"]),
        ("neighbor2neighbor", []),
        ("sure", ["data.noise.law=lognormal", "data.noise.level=0.1"]),
        ("unsure", []),
        ("gr2r", ["data.noise.law=poisson", "data.noise.level=0.02"]),
        ("gr2r", ["data.noise.law=gamma", "data.noise.level=30"]),
    ],
)
def test_each_loss_is_a_function_of_n_and_teaches_all_weights(objective, more):
    model, batch = build(objective, *more), noisy_batch(gaussian, 4)
    batch["level"] = torch.full((4,), float(model.cfg.data.noise.level))
    batch["image"] = batch["image"].clamp(min=-0.9)
    torch.nn.init.normal_(model.net.exit.weight, std=0.1)
    loss = model.loss(batch)[0]
    assert torch.equal(loss, model.loss(batch)[0])
    assert not torch.equal(loss, model.loss(batch | {"n": batch["n"] + 4})[0])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.estimate((batch["image"] + 1) / 2, batch["level"]).isfinite().all()


@pytest.mark.parametrize(
    ("objective", "more", "message"),
    [
        ("score", ["method.share=0.3"], "method.share=0.3: goes with objective=gr2r only"),
        ("sure", ["method.gamma=1"], "method.gamma=1.0: goes with objective=neighbor2neighbor"),
        ("gr2r", ["method.share=1"], "method.share=1.0: must be in"),
        (
            "gr2r",
            ["data.noise.law=lognormal", "data.noise.level=0.1"],
            "method.objective=gr2r: splits noise of gaussian, poisson, gamma alone",
        ),
        (
            "sure",
            ["data.noise.law=poisson", "data.noise.level=0.1"],
            "method.objective=sure: averages w, in which the noise must be Gaussian",
        ),
        (
            "noise2void",
            ["data.patch=8"],
            "data.patch=8: must be >= 10 with method.objective=noise2",
        ),
        ("unsure", ["data.noise.target=clean"], "data.noise.target=clean: method.objective=unsure"),
    ],
)
def test_what_an_objective_does_not_take_is_refused(objective, more, message):
    with pytest.raises(ValueError, match=message):
        build(objective, *more)
