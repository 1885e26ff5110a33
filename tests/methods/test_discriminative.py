"""DDO of other methods: an energy of points on a line, and a network on the plane."""

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import genmodels
from genmodels.commands.train import train
from genmodels.config import setting
from genmodels.kernels.philox import philox_uniform
from genmodels.methods import METHODS
from genmodels.methods.base import GenerativeModule
from genmodels.methods.ddo import Discriminative, DiscriminativeConfig


class Table(nn.Module):
    """An energy for each of K points on a line, known up to a constant; DDO's second method."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.shape, self.device = cfg, (1,), torch.device("cpu")
        self.energy = nn.Parameter(torch.zeros(cfg.points, dtype=torch.float64))

    def log_ratio(self, batch, reference):
        return (reference.energy - self.energy)[batch["image"]], {}


class TableDDO(Discriminative, Table):
    pass


def test_the_optimum_on_a_line_of_points_is_the_one_of_the_paper():
    """p ~ p_ref^(1 - 1/beta) p_data^(1/beta), and beta r = log(p_data / p_ref) - log alpha."""
    data, fake = torch.tensor([1, 5, 2, 4, 3, 1]), torch.tensor([4, 2, 4, 1, 2, 3])  # counts
    p_data, p_reference = data.double() / 16, fake.double() / 16
    rows = {
        "image": torch.arange(6).repeat_interleave(data),
        "label": torch.zeros(16).long(),
        "fake": torch.arange(6).repeat_interleave(fake),
        "fake_label": torch.zeros(16).long(),
        "n": torch.arange(16),
    }
    trainer = SimpleNamespace(precision="32-true", tf32=False)
    for alpha, beta in itertools.product((1.0, 4.0), (0.5, 1.0, 2.0)):
        method = SimpleNamespace(alphas=[alpha], betas=[beta], beta_unit="nats", normalize=False)
        cfg = SimpleNamespace(trainer=trainer, network=None, method=method, points=6)
        reference = Table(cfg)
        reference.energy.data = -p_reference.log()
        model = TableDDO(cfg, reference)
        model.load_state_dict(reference.state_dict())
        assert model.loss(rows)[0].item() == pytest.approx((1 + alpha) * math.log(2), rel=1e-12)
        optimizer = torch.optim.LBFGS(
            model.parameters(),
            max_iter=500,
            tolerance_grad=1e-12,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model.loss(rows)[0]
            loss.backward()
            return loss

        optimizer.step(closure)
        ratio = (reference.energy - model.energy).detach()
        expected = ((p_data / p_reference).log() - math.log(alpha)) / beta
        torch.testing.assert_close(ratio, expected, rtol=0, atol=1e-6)
        p = torch.softmax(-model.energy.detach(), 0)
        optimum = p_reference ** (1 - 1 / beta) * p_data ** (1 / beta)
        torch.testing.assert_close(p, optimum / optimum.sum(), rtol=1e-6, atol=0)


LEVELS = torch.arange(0, 256, 8)  # 32 x 32 points
GRID = torch.cartesian_prod(LEVELS, LEVELS) / 127.5 - 1


class Energy(GenerativeModule):
    """p(x) ~ exp(-E(x)) on the grid, E a small network; sampled exactly."""

    @dataclass
    class Config:
        name: str = setting("energy", "")
        width: int = setting(32, "")

        def __post_init__(self):
            pass

    def __init__(self, cfg):
        super().__init__(cfg)
        width = cfg.method.width
        self.net = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, 1))

    def energy(self, x):
        return self.net(x.reshape(-1, 2))[:, 0]

    def log_p(self):
        return torch.log_softmax(-self.energy(GRID), 0)

    def loss(self, batch):
        loss = self.energy(batch["image"]).mean() + torch.logsumexp(-self.energy(GRID), 0)
        return loss, {"loss": loss.detach()}

    def log_ratio(self, batch, reference):
        with torch.no_grad():
            theirs = reference.energy(batch["image"])
        return theirs - self.energy(batch["image"]), {}

    @torch.no_grad()
    def sample(self, seeds, labels=None):
        u = philox_uniform((), 0, torch.tensor(seeds)).contiguous()
        index = torch.searchsorted(self.log_p().exp().cumsum(0), u).clamp(max=len(GRID) - 1)
        self.nfe = 1
        return GRID[index].reshape(-1, 1, 1, 2)


class EnergyDDO(Discriminative, Energy):
    @dataclass
    class Config(DiscriminativeConfig, Energy.Config):
        name: str = setting("ddo_energy", "")


def two_blobs():
    """log p_data on the grid: an uneven mixture that a short training leaves unfitted."""
    parts = []
    for weight, centre, width in ((0.3, (-0.5, -0.4), 0.15), (0.7, (0.4, 0.3), 0.25)):
        square = ((GRID - torch.tensor(centre)) / width).square().sum(dim=1)
        parts.append(math.log(weight / width**2) - square / 2)
    log_p = torch.stack(parts).logsumexp(0)
    return torch.log_softmax(log_p, 0)


def test_any_method_with_a_log_ratio_plays(tmp_path, monkeypatch):
    """An energy on the plane: two rounds bring its exact density nearer to that of the data."""
    monkeypatch.setitem(METHODS, "energy", Energy)
    monkeypatch.setitem(METHODS, "ddo_energy", EnergyDDO)
    log_data = two_blobs()
    picked = np.random.default_rng(0).choice(
        len(GRID), 4000, p=log_data.exp().double().numpy() / log_data.exp().double().numpy().sum()
    )
    points = ((GRID[picked] + 1) * 127.5).round().to(torch.uint8).reshape(-1, 1, 2, 1).numpy()
    np.savez(tmp_path / "points.npz", images=points)
    (tmp_path / "toy.yaml").write_text(
        f"""
data: {{name: npz, root: {tmp_path}/points.npz, batch_size: 500, holdout: 0.2}}
network: {{name: unet}}
trainer: {{max_steps: 60, progress: false, loggers: [csv], accelerator: cpu}}
optim: {{lr: 0.01}}
ema: {{half_life: 0}}
eval: {{num: 1000}}
"""
    )
    toy = [str(tmp_path / "toy.yaml"), f"out_dir={tmp_path}/runs"]
    base = train([*toy, "method.name=energy", "name=base"])
    run = train(
        [
            *toy,
            "method.name=ddo_energy",
            "name=ddo",
            f"init={base}",
            "method.alphas=1",
            "method.betas=1",
            "method.beta_unit=nats",
            "method.rounds=2",
            "eval.every=60",
        ]
    )
    before, after = (genmodels.load(folder).log_p().detach() for folder in (base, run))
    divergence = [float((log_data.exp() * (log_data - log_p)).sum()) for log_p in (before, after)]
    assert type(genmodels.load(run)) is EnergyDDO
    assert divergence[1] < 0.8 * divergence[0], divergence
