"""Energy matching with one parabola a label: its loss by hand, its densities in closed form."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import genmodels
from genmodels.kernels.philox import philox_normal, philox_uniform
from genmodels.methods import energy_matching
from genmodels.sampling.composition import blend_of, parse_compose
from genmodels.seeding import Stream, keys
from tests.helpers.paths import ROOT

DIGITS = str(ROOT / "configs" / "energy_digits.yaml")
SCALE = 2.0


class Bowls(nn.Module):
    """f = -k_c |x - m_c|^2 / 2 of label c; the last k and m are without label."""

    def __init__(self, k, means, dropout=0.0):
        super().__init__()
        self.k, self.means = nn.Parameter(k), nn.Parameter(means)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, noise, labels=None, *, dtype=torch.float32):
        labels = torch.full((len(x),), -1) if labels is None else labels
        away = (self.drop(x) - self.means[labels]).flatten(1).to(dtype)
        return -0.5 * self.k[labels].to(dtype) * away.square().sum(1)


def bowls(*words, dropout=0.0, data="digits"):
    """Return a conditional model in training whose V of label c is SCALE k_c |x - m_c|^2 / 2."""
    model = genmodels.build(DIGITS, f"data.name={data}", f"method.scale={SCALE}", *words)
    generator = torch.Generator().manual_seed(3)
    k = 1.5 + 0.2 * torch.arange(model.classes + 1.0)
    means = 0.15 * torch.randn(model.classes + 1, *model.shape, generator=generator)
    model.net = Bowls(k, means, dropout)
    return model.train()


def v_of(model, x, labels):
    """Return V by hand, float64 (B,)."""
    away = (x - model.net.means.detach()[labels]).double().flatten(1)
    return SCALE * model.net.k.detach()[labels].double() * away.square().sum(1) / 2


def batch_of(model, size, classes):
    """Return images of a spread as digits have, with labels, at other places than 0, 1, ..."""
    generator = torch.Generator().manual_seed(1)
    return {
        "image": (0.5 * torch.randn(size, *model.shape, generator=generator)).clamp(-1, 1),
        "label": torch.randint(classes, (size,), generator=generator),
        "n": torch.arange(size) + 1000,
    }


def drawn(model, n, stream):
    return philox_normal(model.shape, model.cfg.seed, n, stream=int(stream))


def hidden(model, batch):
    """Return the labels as training sees them: some are -1."""
    u = philox_uniform((), model.cfg.seed, batch["n"], stream=int(Stream.LABEL_DROP))
    return torch.where(u < model.cfg.method.label_dropout, -1, batch["label"])


def at_step(model, step):
    model._trainer = SimpleNamespace(global_step=step)
    return model


# ------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("coupling", ["ot", "independent"])
def test_the_loss_of_the_flow_by_hand(coupling):
    """Noise, times, smoothing and labels from Philox, pairs from scipy class by class."""
    words = ("method.smoothing=0.3", "method.label_dropout=0.3", f"method.coupling={coupling}")
    model = bowls(*words)
    batch = batch_of(model, 16, classes=3)
    x, n, labels = batch["image"], batch["n"], hidden(model, batch)
    assert 0 < (labels == -1).sum() < 16
    noise = drawn(model, n, Stream.NOISE)
    pixels, starts = x.flatten(1).double().numpy(), noise.flatten(1).double().numpy()
    cost = ((pixels[:, None] - starts[None]) ** 2).sum(2)
    order = np.arange(16)
    if coupling == "ot":
        for c in range(3):
            rows = np.flatnonzero(batch["label"].numpy() == c)
            order[rows] = rows[linear_sum_assignment(cost[np.ix_(rows, rows)])[1]]
        assert (order != linear_sum_assignment(cost)[1]).any()  # the classes matter
        assert (order != np.arange(16)).any()
    noise = noise[order].double()
    t = philox_uniform((), model.cfg.seed, n, stream=int(Stream.SIGMA)).reshape(-1, 1, 1, 1)
    x_t = (1 - t) * noise + t * x + 0.3 * drawn(model, n, Stream.PAIR)
    k = model.net.k.detach()[labels].reshape(-1, 1, 1, 1)
    slope = SCALE * k * (x_t - model.net.means.detach()[labels])
    loss, logs = model.loss(batch)
    expected = float((slope + x - noise).square().mean())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(logs["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(logs["v_data"]) == pytest.approx(float(v_of(model, x, labels).mean()), rel=1e-5)


MAIN = (
    "method.main_start=3",
    "method.label_dropout=0.3",
    "method.chain_share=0.75",  # of 8: 6
    "method.data_share=0.35",  # of 6: 2
    "method.trim=0.35",  # of 6: 2
    "method.tau=0.5",
    "method.eps_max=0.04",
    "method.chain_steps=60",
    "method.dt=0.02",
)


def watch_chain(monkeypatch, ends):
    """Put `ends` in place of the chains' ends; return what the chains were asked to do."""
    asked = {}

    def chain(energy, start, **options):
        asked.update(options, start=start.clone(), values=energy(start).detach())
        return SimpleNamespace(y=ends(start))

    monkeypatch.setattr(energy_matching, "ula_chain", chain)
    return asked


def test_the_contrast_by_hand(monkeypatch):
    """Starts, labels and heat of the chains; V at their clipped ends; 3 / d for a weight."""
    model = at_step(bowls(*MAIN, "method.contrast_limit=100"), 3)
    batch = batch_of(model, 8, classes=10)
    x, n, labels = batch["image"], batch["n"], hidden(model, batch)
    assert 0 < (labels[:6] == -1).sum() < 6
    asked = watch_chain(monkeypatch, lambda start: 1.6 * start.flip(0))
    loss, logs = model.loss(batch)
    fresh = drawn(model, n[:6], Stream.CHAIN_START)
    start = torch.cat([x[:2], fresh[2:]])
    assert torch.equal(asked["start"], start)
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(asked["values"], v_of(model, start, labels[:6]), **close)
    assert asked["steps"] == 60 and asked["step"] == 0.02
    assert torch.equal(asked["seed"], keys(model.cfg.seed, n[:6], Stream.CHAIN))
    heat = [asked["temperature"](k) for k in (0, 24, 40, 50, 59)]
    assert heat == pytest.approx([0, 0, 0.04 * 0.3 / 0.5, 0.04, 0.04])
    raw = 1.6 * start.flip(0)
    assert (raw.abs() > 1).any(dim=3).any(dim=2).all()  # so that clipping matters everywhere
    v = v_of(model, raw.clamp(-1, 1), labels[:6])
    gap = float(v_of(model, x, labels).mean() - v.sort().values[:4].mean())
    assert gap < 0
    assert float(logs["contrast"]) == pytest.approx(gap, rel=1e-5)
    added = float((loss - logs["loss"]).detach())
    assert added == pytest.approx(3 / 64 * gap, rel=1e-4)
    assert float(logs["v_from_data"]) == pytest.approx(float(v[:2].mean()), rel=1e-5)
    assert float(logs["v_from_noise"]) == pytest.approx(float(v[2:].mean()), rel=1e-5)


@pytest.mark.parametrize(("share", "started"), [(0, 0), (1, 8)])
def test_all_chains_from_one_side(share, started, monkeypatch):
    words = (*MAIN, f"method.data_share={share}", "method.chain_share=1")
    model = at_step(bowls(*words), 3)
    batch = batch_of(model, 8, classes=10)
    asked = watch_chain(monkeypatch, lambda start: start)
    logs = model.loss(batch)[1]
    kinds = {8: batch["image"], 0: drawn(model, batch["n"], Stream.CHAIN_START)}
    assert torch.equal(asked["start"], kinds[started])
    assert ("v_from_data" in logs, "v_from_noise" in logs) == (started > 0, started < 8)


@pytest.mark.filterwarnings("ignore:n. the batch holds positions that were there before")
@pytest.mark.parametrize(
    ("limit", "weight", "held"), [(0.05, 0, True), (100, 0, False), (3, 1, True), (100, 1, False)]
)
def test_the_contrast_stops_at_its_limit(limit, weight, held, monkeypatch):
    """max(weight gap, -limit): held there, the gradient is that of the flow alone."""
    words = (f"method.contrast_limit={limit}", f"method.contrast={weight}")
    model = bowls(*MAIN, *words)
    batch = batch_of(model, 8, classes=10)
    watch_chain(monkeypatch, lambda start: 1.6 * start)
    results = {}
    for step in (2, 3):  # warm-up, main phase
        model.zero_grad()
        loss, logs = at_step(model, step).loss(batch)
        loss.backward()
        results[step] = float((loss - logs["loss"]).detach()), model.net.k.grad.clone()
    assert "contrast" in logs and results[2][0] == 0
    expected = -limit if held else (weight or 3 / 64) * float(logs["contrast"])
    assert results[3][0] == pytest.approx(expected, rel=1e-4)
    assert -limit <= expected < 0
    assert torch.equal(results[3][1], results[2][1]) == held


def test_dropout_is_off_in_chains_alone(monkeypatch):
    model = at_step(bowls(*MAIN, dropout=0.5), 3)
    modes, original = [], model.net.forward

    def forward(*args, **options):
        modes.append(model.net.training)
        return original(*args, **options)

    model.net.forward = forward
    batch = batch_of(model, 8, classes=10)
    asked = watch_chain(monkeypatch, lambda start: start)
    model.loss(batch)
    labels = hidden(model, batch)[:6]
    expected = v_of(model, asked["start"], labels).float()
    torch.testing.assert_close(asked["values"], expected, rtol=1e-5, atol=1e-5)
    assert modes == [True, True, False, True] and model.net.training


def test_the_rates_of_the_main_phase():
    """From the very step that has the contrast on; without them, and without it, as before."""
    words = ("method.main_start=100", "method.main_lr=0.3", "method.main_ema=500")
    more = ("optim.decay=cosine", "ema.half_life=7000", "trainer.max_steps=400")
    model = bowls(*words, *more)
    cosine = [0.5 * (1 + math.cos(math.pi * step / 400)) for step in (99, 100)]
    assert [model.lr_factor(99), model.lr_factor(100)] == pytest.approx(
        [cosine[0], 0.3 * cosine[1]], rel=1e-9
    )
    assert [model.ema_half_life(99), model.ema_half_life(100)] == [7000, 500]
    assert [at_step(model, step).main for step in (99, 100)] == [False, True]
    model = bowls(words[0], *more)
    assert model.lr_factor(100) == pytest.approx(cosine[1]) and model.ema_half_life(100) == 7000
    model = bowls("method.main_start=0", *words[1:], *more)
    assert model.lr_factor(100) == pytest.approx(cosine[1]) and model.ema_half_life(100) == 7000
    assert not at_step(model, 100).main


# ------------------------------------------------------------------------------------------------
# Densities and samples: exp(-V / eps) of label c is normal, mean m_c, variance eps / (SCALE k_c)

EPS = 0.05


def exact_log_prob(model, x, labels):
    """Return the log density by hand, float64 (B,)."""
    variance = EPS / (SCALE * model.net.k.detach()[labels].double())
    size = math.prod(model.shape)
    return -v_of(model, x, labels) / EPS - size / 2 * (2 * math.pi * variance).log()


def test_energy_and_scores():
    model = bowls(f"method.eps_max={EPS}", dropout=0.5)  # off here, though the model trains
    batch = batch_of(model, 8, classes=10)
    x, labels = batch["image"], batch["label"]
    v = v_of(model, x, labels)
    torch.testing.assert_close(model.energy(x, labels), v / EPS, rtol=1e-6, atol=1e-6)
    scores = model.ood_scores(x, labels)
    torch.testing.assert_close(scores["f"], -v.float(), rtol=1e-6, atol=1e-6)
    norm = (x - model.net.means.detach()[labels]).flatten(1).norm(dim=1)
    slope = SCALE * model.net.k.detach()[labels] * norm
    torch.testing.assert_close(scores["grad_norm"], -slope, rtol=1e-5, atol=1e-5)
    own = model.ood_scores(model.net.means.detach()[labels], labels)
    assert (own["f"] > scores["f"]).all() and (own["grad_norm"] > scores["grad_norm"]).all()


def bounds(model, x, labels, **options):
    """Return (lower, upper) of log p."""
    found = (
        model.log_prob(x, labels, kind=kind, seeds=range(len(x)), **options)
        for kind in ("ais_lower", "ais_upper")
    )
    return tuple(found)


QUICK = (f"method.eps_max={EPS}", "method.time=1.5", "method.steps=12")  # samples close enough


def test_bounds_on_the_density_lie_on_it():
    """Within 0.02 nats of two pixels; each label has a normaliser of its own."""
    model = bowls(*QUICK, data="eight_squares").eval()
    x, labels = batch_of(model, 4, classes=8)["image"], torch.tensor([0, -1, -1, 0])
    exact = exact_log_prob(model, x, labels)
    for found in bounds(model, x, labels, ais_steps=10, ais_refine=5, ais_chains=200):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, exact, rtol=0, atol=0.02)


def test_each_bound_is_on_its_own_side():
    """With few densities and chains they lie nats apart: none can be the other."""
    model = bowls(*QUICK).eval()
    x, labels = batch_of(model, 1, classes=10)["image"], torch.tensor([4])
    low, high = bounds(model, x, labels, ais_steps=3, ais_chains=4, ais_refine=40)
    exact = exact_log_prob(model, x, labels)
    assert low < exact - 2 and high > exact + 2, (low - exact, high - exact)


def test_the_density_follows_the_weights():
    """After an optimizer's step the old normaliser would be off by nats."""
    model = bowls(*QUICK).eval()
    x, labels = batch_of(model, 2, classes=10)["image"], torch.tensor([4, 4])
    options = {"kind": "ais_upper", "seeds": [0, 1], "ais_steps": 10}

    def log_z():
        return exact_log_prob(model, x, labels) + v_of(model, x, labels) / EPS

    optimizer, before = torch.optim.SGD([model.net.k], lr=1.0), log_z()
    for _ in range(2):
        found = model.log_prob(x, labels, **options)
        torch.testing.assert_close(found, exact_log_prob(model, x, labels), rtol=0, atol=1)
        model.net.k.grad = torch.full_like(model.net.k, -0.5)
        optimizer.step()
    assert (log_z() - before).min() > 4


N = 2000


def end_of_heun(k, mean, time, steps):
    """Return mean and variance at the end of sampling in a parabola of curvature k: linear."""
    dt = time / steps
    r, c = 1 - k * dt + (k * dt) ** 2 / 2, 1 - k * dt / 2
    centre, variance = torch.zeros_like(mean), 1.0
    for i in range(steps):
        noise = 2 * EPS * dt if i * dt >= 1 else 0.0
        centre = mean + r * (centre - mean)
        variance = r**2 * variance + c**2 * noise
    return centre, variance


@pytest.mark.parametrize(
    ("call", "terms"),
    [
        ({"labels": 0}, {0: 1.0}),
        ({"labels": 0, "guidance": 0.8}, {0: 1.8}),
        ({"compose": "0:1.2,1:0.7,!2:0.3"}, {0: 1.2, 1: 0.7, 2: -0.3}),
    ],
)
def test_guided_and_composed_samples(call, terms):
    """Curvature K + sum w (K_c - K), its product with the mean alike; 4 standard errors."""
    words = ("method.tau=1", f"method.eps_max={EPS}", "method.time=2", "method.steps=30")
    model = bowls(*words, data="eight_squares").eval()
    with torch.no_grad():
        model.net.k[:3] = torch.tensor([3.0, 4.0, 1.5])
        model.net.k[-1] = 1.0
        model.net.means[:3] = torch.tensor([[0.2, 0.0], [-0.1, 0.25], [-0.1, -0.2]])[
            ..., None, None
        ]
        model.net.means[-1] = 0.05
    curve, means = SCALE * model.net.k.detach().double(), model.net.means.detach().double()
    k = curve[-1] + sum(w * (curve[c] - curve[-1]) for c, w in terms.items())
    pulled = curve[-1] * means[-1]
    pulled = pulled + sum(
        w * (curve[c] * means[c] - curve[-1] * means[-1]) for c, w in terms.items()
    )
    mean, variance = end_of_heun(float(k), pulled / k, 2.0, 30)
    x = model.sample(range(N), **call).double()
    error = math.sqrt(variance / N)
    assert ((x.mean(0) - mean).abs() < 4 * error).all()
    assert ((x.var(0) / variance - 1).abs() < 4 * math.sqrt(2 / N)).all()


def test_an_or_is_a_mixture_at_the_temperature_of_the_density():
    """-eps log sum exp(-V_c / eps), and one Euler step along its slope."""
    eps, dt = 0.6, 0.1
    words = (f"method.eps_max={eps}", "method.solver=euler", "method.steps=1", f"method.time={dt}")
    model = bowls(*words, data="eight_squares").eval()
    with torch.no_grad():
        model.net.means[:2] = torch.tensor([[0.4, 0.0], [-0.3, 0.2]])[..., None, None]
    seeds = torch.arange(32)
    x = philox_normal(model.shape, seeds, 0, stream=int(Stream.NOISE))
    v = torch.stack([v_of(model, x, torch.full((32,), c)) for c in (0, 1)])
    share = (-v / eps).softmax(0)
    assert ((share > 0.1) & (share < 0.9)).all(0).sum() > 8  # neither takes all
    blend = blend_of(parse_compose("0|1", 8), torch.zeros(32).long(), torch.zeros(32))
    found = blend.energy(model._f, x, model._heat(32, eps), torch.float64).detach()
    torch.testing.assert_close(found, eps * (-v / eps).logsumexp(0), rtol=1e-5, atol=1e-5)
    slopes = torch.stack(
        [SCALE * float(model.net.k.detach()[c]) * (x - model.net.means.detach()[c]) for c in (0, 1)]
    )
    slope = (share[..., None, None, None] * slopes).sum(0)
    seen = []
    model.sample(seeds, compose="0|1", callback=lambda i, x: seen.append(x.clone()))
    torch.testing.assert_close(seen[0].double(), x - dt * slope, rtol=1e-5, atol=1e-5)
