"""MECO: normalisers, shares and biases that are known; the flow; a density on the plane."""

import math

import pytest
import torch
from torch import nn

import genmodels
import train
from genmodels.kernels.philox import philox_normal
from genmodels.methods.meco import effective_share
from genmodels.networks.coupling_flow import CouplingFlow
from tests.helpers.paths import ROOT
from tests.helpers.runs import assert_same, rows, state

TOY = str(ROOT / "configs/meco_toy.yaml")
SMALL = ("network.width=16", "network.layers=1", "network.stem_scale=1")
FLOW = ("method.noise=flow", "method.flow_width=16", "method.noise_scale=1.5")


def build(*words):
    """Return a model on the plane whose weights and q are not those of the start."""
    torch.manual_seed(0)
    model = genmodels.build(TOY, *SMALL, *words).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.fit_noise(
        torch.tensor([0.1, -0.2]).double(), torch.diag(torch.tensor([0.5, 0.3])).double()
    )
    return model


class Bell(nn.Module):
    """f(x) = -|x - (theta, 0)|^2 / 2."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(float(theta)))

    def forward(self, x, noise, labels=None, *, dtype=torch.float32):
        x = x.flatten(1).to(dtype)
        return -((x[:, 0] - self.theta) ** 2 + x[:, 1] ** 2) / 2


def bell(theta, tau, *words):
    """Return the model N((theta, 0), I) with q = N(0, diag(tau^2, 1)): one line, in two pixels."""
    model = genmodels.build(TOY, *SMALL, "method.tilt=false", *words)
    model.net = Bell(theta)
    model.fit_noise(torch.zeros(2).double(), torch.diag(torch.tensor([tau**2, 1.0])).double())
    return model


# ------------------------------------------------------------------------------------------------
# Normalisers


@pytest.mark.parametrize(("theta", "tau"), [(0, 2), (2, 2), (4, 4), (4, 8)])
def test_the_weights_of_a_normal_vary_as_they_must(theta, tau):
    """Z = 2 pi; E w^2 / (E w)^2 = tau^2 / sqrt(2 tau^2 - 1) exp(theta^2 / (2 tau^2 - 1))."""
    found = bell(theta, tau).normaliser(100_000)
    expected = tau**2 / math.sqrt(2 * tau**2 - 1) * math.exp(theta**2 / (2 * tau**2 - 1))
    assert 1 / found.ess == pytest.approx(expected, rel=0.06)
    assert found.log_z == pytest.approx(math.log(2 * math.pi), abs=4 * found.stderr)
    assert found.stderr == pytest.approx(math.sqrt((expected - 1) / 100_000), rel=0.1)


class LogNormal(nn.Module):
    """f = exp(-(ln x - m)^2 / (2 v)) / x where x > 0, else 0; a normal on the other pixel."""

    def forward(self, x, noise, labels=None, *, dtype=torch.float32):
        x, y = x.flatten(1).to(dtype).unbind(1)
        log_x = x.clamp_min(1e-300).log()
        bell = -((log_x - 0.3) ** 2) / (2 * 0.25) - log_x
        return bell.where(x > 0, -math.inf) - y**2 / 2


def test_log_z_of_a_log_normal():
    """Z = sqrt(2 pi v) sqrt(2 pi), with half of the draws where f is 0."""
    model = bell(0.0, 2.0)
    model.net = LogNormal()
    found = model.normaliser(100_000)
    assert found.stderr < 0.01
    exact = math.log(2 * math.pi * 0.5)
    assert found.log_z == pytest.approx(exact, abs=4 * found.stderr)
    x = torch.tensor([[1.7, 0.2]]).reshape(1, 2, 1, 1)
    expected = torch.distributions.LogNormal(0.3, 0.5).log_prob(
        x[0, 0, 0, 0]
    ) + torch.distributions.Normal(0, 1).log_prob(x[0, 1, 0, 0])
    log_p = model.log_prob(x, seeds=[0], draws=100_000)
    assert float(log_p) == pytest.approx(float(expected), abs=4 * found.stderr)


def test_the_share_that_counts():
    assert float(effective_share(torch.zeros(7))) == pytest.approx(1)
    log_w = torch.tensor([0.0, -1e9, -1e9, -1e9])
    assert float(effective_share(log_w)) == pytest.approx(0.25)
    w = torch.tensor([1.0, 2.0, 5.0])
    assert float(effective_share(w.log() + 3)) == pytest.approx(64 / (3 * 30), rel=1e-5)


def plane(side=121, reach=4.0):
    line = torch.linspace(-reach, reach, side)
    return torch.cartesian_prod(line, line).reshape(-1, 2, 1, 1), (2 * reach / (side - 1)) ** 2


@pytest.mark.parametrize("words", [(), ("method.tilt=false",), FLOW])
def test_log_z_is_that_of_an_integral_over_the_plane(words):
    model = build(*words)
    if words and "tilt" in words[0]:
        model.net = Bell(0.5)
    x, cell = plane()
    with torch.no_grad():
        exact = float(torch.logsumexp(model.log_f(x, torch.float64), 0) + math.log(cell))
    found = model.normaliser(20_000)
    assert found.stderr < 0.05
    assert found.log_z == pytest.approx(exact, abs=4 * found.stderr + 1e-3)
    log_p = model.log_prob(x, seeds=[0])
    assert log_p.dtype == torch.float64
    assert float(log_p.exp().sum() * cell) == pytest.approx(1, abs=0.1)
    with torch.no_grad():  # other weights, another Z
        next(model.net.parameters()).add_(0.5)
    assert model.normaliser(20_000).log_z != found.log_z


# ------------------------------------------------------------------------------------------------
# The loss


def gradient(model, log_u, count=64):
    model.train()
    model.log_u.fill_(log_u)
    n = torch.arange(count)
    x = philox_normal((2, 1, 1), 5, n) + torch.tensor([4.0, 0.0]).reshape(2, 1, 1)
    batch = {"image": x, "label": torch.full((count,), -1), "n": n}
    model.zero_grad()
    loss, logs = model.loss(batch)
    loss.backward()
    return float(model.net.theta.grad), x, logs, batch


def test_gradient_and_tracked_normaliser():
    """-mean grad log f + mean grad w / u with u = 0.9 u + 0.1 mean w, by hand."""
    model = bell(3.0, 2.0, "method.draws=3")
    found, x, logs, batch = gradient(model, log_u=1.0)
    from genmodels import seeding

    draws = model.draw(seeding.keys(0, batch["n"], seeding.Stream.NOISE), 3).double().flatten(1)
    log_q = -(draws**2 / torch.tensor([4.0, 1.0])).sum(1) / 2 - math.log(2 * math.pi * 2)
    w = (-((draws[:, 0] - 3) ** 2 + draws[:, 1] ** 2) / 2 - log_q).exp()
    u = 0.9 * math.e + 0.1 * float(w.mean())
    assert float(model.log_u) == pytest.approx(math.log(u), rel=1e-6)
    expected = -float((x[:, 0] - 3).mean()) + float((w * (draws[:, 0] - 3)).mean()) / u
    assert found == pytest.approx(expected, rel=1e-4)
    assert float(logs["ess"]) == pytest.approx(float(w.mean() ** 2 / (w**2).mean()), rel=1e-4)
    before = float(model.log_u)
    model.eval().loss(batch)  # held-out images move nothing
    assert float(model.log_u) == before


def fitted(beta, steps=1200):
    """Return the mean of theta at the end of a training on N(4, 1) with q = N(0, 4)."""
    model = bell(1.0, 2.0, f"method.beta={beta}", "method.draws=1").train()
    model.log_u.fill_(math.log(2 * math.pi))
    optimizer = torch.optim.SGD(model.net.parameters(), 0.05, momentum=0.9)
    values = []
    for step in range(steps):
        n = torch.arange(64) + 64 * step
        x = philox_normal((2, 1, 1), 5, n) + torch.tensor([4.0, 0.0]).reshape(2, 1, 1)
        optimizer.zero_grad()
        model.loss({"image": x, "label": torch.full((64,), -1), "n": n})[0].backward()
        optimizer.step()
        values.append(float(model.net.theta.detach()))
    return sum(values[steps // 3 :]) / len(values[steps // 3 :])


@pytest.mark.slow
def test_tracking_takes_the_bias_of_a_batch_away():
    tracked, alone = fitted(0.1), fitted(1.0)
    assert tracked == pytest.approx(4, abs=0.06)
    assert alone > 4.15


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["gaussian", "flow"])
def test_a_density_on_the_plane(noise, tmp_path):
    """Held-out log-likelihood beyond that of q, whose log Z is near that of an integral."""
    words = [TOY, f"out_dir={tmp_path}", "trainer.max_steps=1200", "trainer.progress=false"]
    words += ["sample.every=0", "trainer.loggers=csv"]
    words += ["method.noise=flow", "method.noise_scale=1.5"] if noise == "flow" else []
    assert train.main(words) == 0
    model = genmodels.load(next(tmp_path.glob("*/*")))
    from genmodels.data.toys import toy_points

    x = toy_points("moons", 2000, seed=50)[0]
    grid, cell = plane(241, 1.6)
    with torch.no_grad():
        exact = float(torch.logsumexp(model.log_f(grid, torch.float64), 0) + math.log(cell))
        found = model.normaliser(50_000)
        assert found.log_z == pytest.approx(exact, abs=4 * found.stderr + 0.02)
        log_p = float(model.log_prob(x, seeds=[0]).mean())
        assert log_p > float(model._log_q(x).mean()) + (0.5 if noise == "gaussian" else 0.0)
        assert log_p > 0.3
    made = model.sample(range(500), steps=200)
    near = torch.cdist(made.flatten(1), x.flatten(1)).amin(dim=1)
    assert float((near < 0.1).float().mean()) > 0.8


# ------------------------------------------------------------------------------------------------
# The flow


@pytest.mark.parametrize("size", [2, 5])
def test_a_flow_draws_from_its_own_density(size):
    """log q(x) = log N(z) - log |det dx/dz|, the determinant by differentiation."""
    torch.manual_seed(0)
    flow = CouplingFlow((size, 1, 1), layers=4, width=8).double()
    flow.float()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    flow.fit(torch.randn(size), torch.rand(size) + 0.5)
    z = torch.randn(3, size, 1, 1)
    x = flow.sample(z)
    for k in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda row: flow.sample(row.reshape(1, size, 1, 1)).flatten(), z[k].flatten()
        )
        expected = -(z[k] ** 2 + math.log(2 * math.pi)).sum() / 2 - jacobian.slogdet().logabsdet
        torch.testing.assert_close(flow.log_prob(x)[k], expected, rtol=1e-4, atol=1e-4)


def test_q_learns_from_the_data_and_not_from_the_energy():
    model = build(*FLOW).train()
    n = torch.arange(32)
    x = 0.3 * philox_normal((2, 1, 1), 5, n)
    loss, logs = model.loss({"image": x, "label": torch.full((32,), -1), "n": n})
    loss.backward()
    found = [p.grad.clone() for p in model.noise.parameters()]
    model.zero_grad()
    own = -model.noise.log_prob(x).mean()
    own.backward()
    assert float(logs["loss_noise"]) == pytest.approx(float(own.detach()), rel=1e-5)
    for gradient, parameter in zip(found, model.noise.parameters()):
        torch.testing.assert_close(gradient, parameter.grad)


# ------------------------------------------------------------------------------------------------
# Through the scripts, and mistakes


def test_a_training_that_was_cut_is_the_same_training(tmp_path):
    words = [TOY, str(ROOT / "configs/debug.yaml"), *SMALL, "data.points=60", "method.steps=2"]
    words += ["trainer.progress=false", "optim.decay=none"]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert train.main([*words, f"out_dir={straight}", "trainer.max_steps=4"]) == 0
    assert train.main([*words, f"out_dir={cut}", "trainer.max_steps=2"]) == 0
    (folder,), (whole,) = cut.glob("*/*"), straight.glob("*/*")
    assert train.main([f"resume={folder}", "trainer.max_steps=4"]) == 0
    assert_same(state(folder), state(whole))
    assert rows(folder) == rows(whole)
    assert float(genmodels.load(whole).log_u) != 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("data.labels=true",), "data.labels=true: meco has one Z"),
        (("method.flow_width=8",), "method.flow_width=8: goes with method.noise=flow"),
        (("method.noise=flow",), "method.noise_scale=1.3: goes with method.noise=gaussian"),
        (("method.beta=0",), "method.beta=0.0: must be in"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(words, line):
    with pytest.raises(ValueError) as error:
        genmodels.build(TOY, *words)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_pixels_that_never_change_have_no_density(tmp_path, capsys):
    words = [str(ROOT / "configs/meco_digits.yaml"), "method.smoothing=0", f"out_dir={tmp_path}"]
    assert train.main([*words, "trainer.max_steps=1"]) == 2
    assert "some pixels never change" in capsys.readouterr().err
