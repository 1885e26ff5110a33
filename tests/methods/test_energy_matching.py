"""Energy matching: potentials in closed form, the contrast, both phases of a training."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import evaluate
import genmodels
import train
from genmodels.checkpoint import read_checkpoint
from genmodels.kernels.philox import philox_normal
from genmodels.methods.ddo import Discriminative, DiscriminativeConfig, Frozen
from genmodels.methods.energy_matching import contrast
from genmodels.seeding import Stream
from tests.helpers.paths import ROOT

DIGITS = str(ROOT / "configs" / "energy_digits.yaml")
PLANE = (  # 2-64-64-1, as the closed forms were first fitted
    "data.name=eight_squares",
    "data.labels=false",
    "data.batch_size=256",
    "network.width=64",
    "network.layers=1",
    "network.form=dot",
    "method.scale=1",
    "method.smoothing=0",
    "method.coupling=independent",
)


def plane(*words):
    """Return an untrained potential on the plane, and a function that makes its noise x_0."""
    torch.manual_seed(0)
    model = genmodels.build(DIGITS, *PLANE, *words)

    def noise(n):
        return philox_normal(model.shape, model.cfg.seed, n, stream=int(Stream.NOISE))

    return model, noise


def fit(model, data, steps, size=256, lr=2e-3):
    """Train on data(n) by Adam with a cosine, EMA-less."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        n = torch.arange(size) + step * size
        batch = {"image": data(n), "label": torch.full((size,), -1), "n": n}
        optimizer.zero_grad()
        model.loss(batch)[0].backward()
        optimizer.step()
        schedule.step()


def slopes(model, radii):
    """Return the mean over directions of dV/dr at each radius."""
    angles = torch.arange(64) * math.tau / 64
    ring = torch.stack([angles.cos(), angles.sin()], dim=1)
    out = []
    for r in radii:
        x = (r * ring).reshape(-1, 2, 1, 1)
        grad = model._slope(x, None).detach().reshape(-1, 2)
        out.append(float((grad * ring).sum(1).mean()))
    return out


# ------------------------------------------------------------------------------------------------
# The potential of Gaussians and of a point. -grad V is the mean of x_1 - x_0 over all pairs and
# times that pass through x; the integrals over s are done on a grid, here and not in the package.

RADII = [0.25, 0.5, 1.0, 1.5]


def mean_over(s, log_weight, value):
    """Return the mean of value(s) under the weights exp(log_weight), float64."""
    w = torch.exp(log_weight - log_weight.max())
    return float((w * value).sum() / w.sum())


def exact_map(r, a):
    """N(0, I) -> N(0, a^2 I) along x_1 = a x_0: V' = (1 - a) r E[1/s | r], s even in (a, 1)."""
    s = torch.linspace(a, 1, 100_001, dtype=torch.float64)
    return mean_over(s, -2 * s.log() - r**2 / (2 * s**2), (1 - a) * r / s)


def independent_pairs(r, a):
    """The same ends, paired at random: mean of r (1 - t - t a^2) / s^2, s^2 = (1-t)^2 + a^2 t^2."""
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    s2 = (1 - t) ** 2 + a**2 * t**2
    return mean_over(t, -s2.log() - r**2 / (2 * s2), r * (1 - t - t * a**2) / s2)


def one_point(r):
    """All noise goes to 0: V' = r E[1/s | r], density of s on (0, 1) as s^-2 exp(-r^2 / 2 s^2)."""
    s = torch.linspace(1e-5, 1, 400_001, dtype=torch.float64)
    return mean_over(s, -2 * s.log() - r**2 / (2 * s**2), r / s)


def test_the_integrals_are_those_of_the_specification():
    """Figures of two other computations (quadrature at d = 2, a = 0.5)."""
    values = [exact_map(r, 0.5) for r in RADII]
    assert values == pytest.approx([0.1865, 0.3673, 0.6916, 0.9555], abs=1e-4)
    values = [independent_pairs(r, 0.5) for r in RADII]
    assert values == pytest.approx([0.1242, 0.2781, 0.7997, 1.5757], abs=1e-4)
    assert [one_point(r) for r in (0.25, 1.0)] == pytest.approx([0.964, 1.525], abs=1e-3)


def test_a_gaussian_shrunk_along_the_exact_map():
    model, noise = plane()
    fit(model, lambda n: 0.5 * noise(n), steps=300, lr=1e-2)
    expected = [exact_map(r, 0.5) for r in RADII]
    assert slopes(model, RADII) == pytest.approx(expected, rel=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["ot", "independent"])
def test_whether_the_coupling_is_on_shows_in_the_potential(coupling):
    """Data that know nothing of the noise: batches of 256 come within 8 % of the exact map."""
    model, _ = plane(f"method.coupling={coupling}")

    def data(n):
        return 0.5 * philox_normal(model.shape, 99, n, stream=int(Stream.IMAGE))

    fit(model, data, steps=2500)
    law = exact_map if coupling == "ot" else independent_pairs
    expected = [law(r, 0.5) for r in RADII]
    assert slopes(model, RADII) == pytest.approx(expected, rel=0.08)


@pytest.mark.slow
def test_around_one_point_the_potential_is_a_cone():
    model, _ = plane("network.form=norm")
    fit(model, lambda n: torch.zeros(len(n), *model.shape), steps=2500)
    radii = [0.25, 0.5, 1.0, 2.0]
    assert slopes(model, radii) == pytest.approx([one_point(r) for r in radii], rel=0.08)


# ------------------------------------------------------------------------------------------------
# The loss


def test_the_slope_is_the_gradient_of_one_scalar():
    """Its Jacobian is symmetric (no curl), in float64; a stopped gradient inside V would show."""
    model, _ = plane("network.form=norm")
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1, 2, 1, 1, dtype=torch.float64)

    def slope(flat):
        with torch.enable_grad():
            x = flat.reshape(1, 2, 1, 1)
            v = -model.log_scale.exp() * model.net(x, x.new_zeros(1), dtype=torch.float64)
            return torch.autograd.grad(v.sum(), x, create_graph=True)[0].flatten()

    jacobian = torch.autograd.functional.jacobian(slope, x.flatten().requires_grad_(True))
    assert jacobian.abs().max() > 1e-3
    torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-12)


def test_the_loss_of_the_flow_reaches_the_weights():
    """By finite differences of one weight: no second derivative, no gradient."""
    model, noise = plane()
    n = torch.arange(64)
    batch = {"image": 0.5 * noise(n), "label": torch.full((64,), -1), "n": n}
    model.loss(batch)[0].backward()
    weight = model.net.stem.weight
    grad, values = float(weight.grad[3, 1]), []
    for change in (1e-2, -2e-2):
        with torch.no_grad():
            weight[3, 1] += change
        values.append(float(model.loss(batch)[0].detach()))
    assert grad == pytest.approx((values[0] - values[1]) / 2e-2, rel=0.02, abs=1e-5)


def test_the_contrast_leaves_out_the_highest():
    chains = torch.arange(10.0)
    assert float(contrast(torch.tensor([2.0, 4.0]), chains, 0.1)) == 3 - 4  # without the 9
    assert float(contrast(torch.tensor([2.0, 4.0]), chains, 0.0)) == 3 - 4.5


class Parabola(nn.Module):
    """f = -k |x|^2 / 2."""

    def __init__(self, k):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(float(k)))

    def forward(self, x, noise, labels=None, *, dtype=torch.float32):
        return -0.5 * self.k.to(dtype) * x.to(dtype).square().flatten(1).sum(1)


def contrast_gradient(limit):
    """Return (what the contrast adds to dL/dk, gap) for data of variance 0.01 and narrow chains."""
    words = ("method.trim=0", "method.data_share=1", "method.chain_share=1", "method.contrast=1")
    more = ("method.main_start=1", f"method.contrast_limit={limit}", "method.chain_steps=100")
    model, _ = plane(*words, *more, "method.dt=0.05", "method.eps_max=0.004", "method.tau=0")
    model.net, n = Parabola(4.0), torch.arange(256)
    data = 0.1 * philox_normal(model.shape, 5, n, stream=int(Stream.IMAGE))
    batch = {"image": data, "label": torch.full((256,), -1), "n": n}
    model.loss(batch)[0].backward()
    flow, model.net.k.grad = model.net.k.grad.clone(), None
    type(model).main, before = property(lambda self: True), type(model).main
    try:
        loss, logs = model.loss(batch)
    finally:
        type(model).main = before
    loss.backward()
    return float(model.net.k.grad - flow), float(logs["contrast"]), data


def test_chains_that_are_too_narrow_flatten_the_potential():
    """d/dk of the contrast is (E x^2 of data - E x^2 of chains) / 2: gap / k for a parabola."""
    change, gap, data = contrast_gradient(limit=10)
    assert change == pytest.approx(gap / 4.0, rel=1e-3)
    chains = 0.004 / 4 / (1 - 4 * 0.05 / 2)  # the chains' own variance a pixel, at their end
    expected = float(data.square().flatten(1).sum(1).mean() / 2) - chains
    assert change == pytest.approx(expected, rel=0.1) and change > 0


def test_below_its_limit_the_contrast_has_no_gradient():
    model, _ = plane("method.main_start=1", "method.contrast_limit=0.001")
    v = torch.tensor([0.0], requires_grad=True)
    loss = (contrast(v, torch.tensor([1.0]), 0.0)).clamp(min=-model.cfg.method.contrast_limit)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-0.001) and float(v.grad) == 0


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("network.activation=leaky",), "network.activation=leaky"),
        (("network.name=ebm", "network.activation=leaky"), "network.activation=leaky"),
        (("trainer.compile=true",), "trainer.compile=true"),
        (("trainer.precision=bf16-mixed",), "trainer.precision=bf16-mixed"),
        (("method.guidance=1", "method.label_dropout=0"), "method.guidance=1"),
    ],
)
def test_what_has_no_second_derivative_or_no_meaning_is_refused(words, key):
    other = {"data": {"name": "digits"}, "network": {"name": "ebm"}}
    config = other | {"method": {"name": "energy_matching"}} if "ebm" in words[0] else DIGITS
    with pytest.raises(ValueError, match=f"^{key}"):
        genmodels.build(config, *words)


# ------------------------------------------------------------------------------------------------
# DDO on top: the log-ratio is exact up to a constant


def test_ddo_of_a_potential_starts_at_its_known_value_and_lowers_v_at_data():
    model, noise = plane()
    reference, _ = plane()

    class Sharpened(Discriminative, type(model)):
        pass

    model.__class__ = Sharpened
    model.frozen = Frozen(reference)
    settings = {
        "alphas": [2.0],
        "betas": [0.01],
        "beta_unit": "nats",
        "normalize": False,
    }
    for name, value in settings.items():
        assert name in DiscriminativeConfig.__dataclass_fields__
        setattr(model.cfg.method, name, value)
    n = torch.arange(64)
    batch = {
        "image": 0.1 * noise(n),
        "label": torch.full((64,), -1),
        "n": n,
        "fake": 0.1 * noise(n) + 1.0,
        "fake_label": torch.full((64,), -1),
    }
    loss, _ = model.loss(batch)
    assert float(loss.detach()) == pytest.approx((1 + 2.0) * math.log(2), rel=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = [float(model.potential(batch[k]).mean().detach()) for k in ("image", "fake")]
    loss.backward()
    optimizer.step()
    after = [float(model.potential(batch[k]).mean().detach()) for k in ("image", "fake")]
    assert after[0] - after[1] < before[0] - before[1]


# ------------------------------------------------------------------------------------------------
# Through the scripts


def test_a_training_cut_in_either_phase_is_the_same_training(tmp_path, capsys):
    words = (
        f"{ROOT}/configs/energy_digits.yaml",
        f"{ROOT}/configs/debug.yaml",
        "network.width=16",
        "data.batch_size=12",
        "method.main_start=4",
        "method.main_lr=0.5",
        "method.main_ema=24",
        "method.chain_steps=3",
        "trainer.progress=false",
        "sample.every=0",
        "optim.decay=none",
    )
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert train.main([*words, f"out_dir={straight}", "trainer.max_steps=7"]) == 0
    assert train.main([*words, f"out_dir={cut}", "trainer.max_steps=2"]) == 0
    assert "warm-up alone" in capsys.readouterr().out
    (folder,) = cut.glob("*/*")
    for steps in (5, 7):  # cut in the warm-up, and in the main phase
        assert train.main([f"resume={folder}", f"trainer.max_steps={steps}"]) == 0
    one, two = (
        read_checkpoint(f / "checkpoints" / "last.ckpt") for f in (*straight.glob("*/*"), folder)
    )
    for part in ("state_dict", "current_model_state"):
        for key, value in one[part].items():
            assert torch.equal(value, two[part][key]), key
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["train/contrast"]) for row in rows] == [False] * 4 + [True] * 3
    assert all(row["train/v_data"] for row in rows)


@pytest.mark.parametrize("time", [0.8, 1.1])
def test_known_pixels_come_back_as_they_are(time):
    """Before t = 1 they are on their way still, as the others are."""
    model = genmodels.build("energy_digits", "network.width=8").eval()
    known, mask = torch.full((1, 1, 8, 8), 0.25), torch.zeros(8, 8, dtype=torch.bool)
    mask[:4] = True
    x = model.sample([0, 1], known=known, mask=mask, time=time, steps=5)
    assert (x[..., :4, :] == 0.25).all() and (x[..., 4:, :] != 0.25).any()


def test_what_it_has_memorised_is_told_unasked(tmp_path, monkeypatch):
    """The contrast pulls towards training images; other methods are asked."""
    monkeypatch.chdir(tmp_path)
    for name, told in (("energy_digits", {"fd", "memorised"}), ("gbm_digits", {"fd"})):
        words = ["num=20", "steps=3", "data=digits:test", "device=cpu", "features=digits"]
        assert evaluate.main([name, *words, f"out={name}.json"]) == 0
        assert set(json.loads(Path(f"{name}.json").read_text())["metrics"]) == told
    words = ["num=20", "steps=3", "metrics=nn1", "device=cpu", "features=digits"]
    assert evaluate.main(["energy_digits", *words, "out=asked.json"]) == 0
    assert set(json.loads(Path("asked.json").read_text())["metrics"]) == {"nn1"}
