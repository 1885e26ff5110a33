"""The log density along an ODE against closed forms and quadrature."""

import json
import math

import numpy as np
import pytest
import torch

import evaluate
import genmodels
from genmodels import checkpoint, seeding
from genmodels.evaluation import likelihood
from genmodels.sampling.likelihood import log_normal, ode_log_prob
from tests.helpers.gaussian import Gaussian
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY

LOW, HIGH = 0.002, 80.0


@pytest.fixture
def model():
    return genmodels.build(str(ROOT / "configs" / "edm_digits.yaml"), *TINY).eval()


def gaussian_flow(x, c, low=LOW, high=HIGH):
    """Return log p(x; low) of the flow of data N(0, c^2): x(high) is x in closed form."""
    grown = (c**2 + high**2) / (c**2 + low**2)
    return log_normal(x * grown**0.5, high) + x[0].numel() / 2 * math.log(grown)


@pytest.mark.parametrize("c", [0.3, 2.0])
def test_exact_trace_of_gaussian_data(model, c):
    model.net = Gaussian(c)
    x = c * torch.randn(4, 1, 8, 8, dtype=torch.float64)
    seeds = torch.arange(4)
    found = model.log_prob(x, kind="ode", seeds=seeds, steps=48, trace="exact")
    assert found.dtype == torch.float64 and found.shape == (4,)
    torch.testing.assert_close(found, gaussian_flow(x, c), rtol=0, atol=64 * 1e-4)
    # And the density of the data themselves: N(0, c^2 + low^2), up to what sigma_max leaves.
    left = 64 * c**2 / HIGH**2 + x.square().sum((1, 2, 3)) / HIGH**2
    truth = log_normal(x, math.sqrt(c**2 + LOW**2))
    assert ((found - truth).abs() < 64e-4 + left).all()


def test_hutchinson_is_exact_where_the_jacobian_is_diagonal(model):
    """e . J e = tr J for signs e and a diagonal J, whatever the signs."""
    model.net = Gaussian(0.5)
    x = torch.randn(3, 1, 8, 8)
    options = {"kind": "ode", "steps": 8}
    exact = model.log_prob(x, seeds=torch.arange(3), trace="exact", **options)
    for probes in (1, 2):
        found = model.log_prob(x, seeds=torch.arange(3), probes=probes, **options)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


MEANS = torch.tensor([[-0.6, 0.1], [0.4, 0.5], [0.3, -0.7]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
WIDTHS = torch.tensor([0.1, 0.25, 0.15], dtype=torch.float64)


def mixture(x, sigma):
    """Return (log p(x; sigma), D(x; sigma)) of a mixture of three round Gaussians in 2-D."""
    variance = WIDTHS**2 + sigma**2
    distance = (x[:, None] - MEANS).square().sum(-1)
    parts = WEIGHTS.log() - (2 * math.pi * variance).log() - distance / 2 / variance
    clean = (MEANS * sigma**2 + x[:, None] * WIDTHS[:, None] ** 2) / variance[:, None]
    return parts.logsumexp(1), (parts.softmax(1)[..., None] * clean).sum(1)


def mixture_flow(x, steps=64, signs=None, prior=None, rho=7.0):
    """Return log p(x; LOW) along the mixture's flow; prior: of x at HIGH, N(0, HIGH^2) if None."""
    times = torch.linspace(LOW ** (1 / rho), HIGH ** (1 / rho), steps + 1, dtype=torch.float64)

    def velocity(x, t):
        sigma = t**rho
        return (x - mixture(x, sigma)[1]) / sigma * rho * t ** (rho - 1)

    prior = prior or (lambda x: log_normal(x, HIGH))
    return ode_log_prob(velocity, x, times, prior, signs=signs)


def test_mixture_density_and_its_integral():
    side = torch.linspace(-1.6, 1.6, 61, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    truth = mixture(points, torch.tensor(LOW))[0]
    likely = truth > -2
    exact_prior = mixture_flow(points, 128, prior=lambda x: mixture(x, torch.tensor(HIGH))[0])
    assert (exact_prior - truth)[likely].abs().max() < 1e-4
    # N(0, HIGH^2) in its place: off by m . x(HIGH) / HIGH^2 at an image, by nothing in the mass.
    flow = mixture_flow(points)
    assert (flow - truth)[likely].abs().max() < 4 * 0.8 / HIGH
    cell = (side[1] - side[0]) ** 2
    assert abs(float(flow.exp().sum() * cell) - 1) < 1e-3
    assert abs(float(truth.exp().sum() * cell) - 1) < 1e-4  # the grid itself


def test_halving_the_steps_shows_fourth_order():
    points = MEANS + 0.05
    best = mixture_flow(points, 512)
    errors = [(mixture_flow(points, steps) - best).abs().max() for steps in (64, 128)]
    assert 12 < errors[0] / errors[1] < 40 and errors[1] < 1e-6


def test_hutchinson_has_no_bias_and_probes_shrink_its_error():
    points = torch.tensor([[0.1, 0.0]], dtype=torch.float64)  # between the three: J has corners
    exact = mixture_flow(points, 16)
    count = 400
    errors = []
    for probes in (1, 4):

        def signs(i):
            return seeding.signs(torch.arange(count), i, probes, (2,))  # noqa: B023

        found = mixture_flow(points.expand(count, 2), 16, signs) - exact
        assert abs(found.mean()) < 4 * found.std() / count**0.5
        errors.append(found.std())
    assert errors[0] > 1e-3 and 1.6 < errors[0] / errors[1] < 2.5


def test_log_prob_depends_on_the_image_and_its_seed_alone(model):
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seeds = torch.tensor([7, 2**62, 0, 3])
    with torch.no_grad():
        model.net.net.unet.conv_out.weight.normal_(std=0.1)
    whole = model.log_prob(x, kind="ode", seeds=seeds, steps=2)
    order = torch.tensor([2, 0])
    part = model.log_prob(x[order], kind="ode", seeds=seeds[order], steps=2)
    torch.testing.assert_close(part, whole[order], rtol=1e-6, atol=1e-3)
    other = model.log_prob(x, kind="ode", seeds=seeds + 1, steps=2)
    assert ((other - whole).abs() > 1e-3).all()


def test_signs_are_fair_and_fresh():
    seeds = torch.arange(50)
    first, second = (seeding.signs(seeds, i, 2, (1, 8, 8)) for i in (0, 1))
    assert first.shape == (2, 50, 1, 8, 8) and set(first.unique().tolist()) == {-1.0, 1.0}
    n = first.numel()
    for product in (first, first * second, first[0] * first[1], first[:, 1:] * first[:, :-1]):
        assert abs(product.mean()) < 4 / (n / 2) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"probes": 0}, "probes=0"),
        ({"trace": "full"}, "trace=full"),
        ({"sigma_min": 90.0}, "sigma_min=90"),
        ({"kind": "ais"}, "kind=ais"),
        ({"labels": torch.zeros(1)}, "labels=given: this model is unconditional"),
        ({"trace": "exact", "probes": 2}, "probes=2: trace=exact draws none"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.log_prob(torch.zeros(1, 1, 8, 8), **({"kind": "ode", "seeds": [0]} | options))


def test_flow_into_the_infinite_is_told():
    times = torch.linspace(0, 1, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"images \[1\]"):
        ode_log_prob(
            lambda x, t: torch.where(x > 1, x * torch.inf, x),
            torch.tensor([[0.0], [2]]),
            times,
            lambda x: log_normal(x, 1.0),
        )


def test_bits_per_dim_of_gaussian_pixels(model, monkeypatch):
    """The mean over images of white noise is its entropy, if the model knows the law."""
    c = 0.4
    model.net = Gaussian(c)
    generator = torch.Generator().manual_seed(0)
    x = c * torch.randn(300, 1, 8, 8, dtype=torch.float64, generator=generator)
    pixels = ((x + 1) * 127.5).round().clip(0, 255).to(torch.uint8)
    bits = likelihood.bits_per_dim(model, pixels, kind="ode", steps=24, progress=False)
    # Image by image, from the flow in closed form.
    flow = gaussian_flow(likelihood.dequantise(pixels, 0, torch.arange(300)), c)
    expected = -flow / (64 * math.log(2)) + math.log2(127.5)
    torch.testing.assert_close(bits, expected, rtol=0, atol=1e-3)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * c**2) + math.log2(127.5)
    # A Gaussian's bits have standard deviation 1 / (sqrt(2) ln 2) for each element.
    assert abs(float(bits.mean()) - entropy) < 4 * 1.02 / (300 * 64) ** 0.5 + 0.01
    assert float(bits.std()) == pytest.approx(1.02 / 8, rel=0.15)
    parts = likelihood.bits_per_dim(model, pixels, kind="ode", steps=24, batch=7, progress=False)
    torch.testing.assert_close(parts, bits, rtol=1e-12, atol=1e-12)


def test_dequantisation_is_uniform_and_keyed_by_place():
    pixels = torch.full((500, 1, 4, 4), 77, dtype=torch.uint8)
    index = torch.arange(500)
    levels = (likelihood.dequantise(pixels, 3, index) + 1) * 127.5 - 77
    assert -0.5 <= levels.min() < -0.49 and 0.49 < levels.max() < 0.5
    assert abs(levels.mean()) < 4 * (1 / 12 / 8000) ** 0.5
    some = likelihood.dequantise(pixels[:2], 3, torch.tensor([9, 400]))
    assert torch.equal(some, likelihood.dequantise(pixels, 3, index)[[9, 400]])
    assert not torch.equal(some, likelihood.dequantise(pixels[:2], 4, torch.tensor([9, 400])))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_images_without_labels(tmp_path, capsys, dropout):
    """A model that saw every label refuses them all before the first; another one scores them."""
    words = ("data.labels=true", f"method.label_dropout={dropout}")
    model = genmodels.build(str(ROOT / "configs" / "edm_digits.yaml"), *TINY, *words)
    run = checkpoint.write_export(model.eval(), tmp_path / "model", "card")
    pixels = np.zeros((3, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "unknown.npz", images=pixels)
    np.savez(tmp_path / "others.npz", images=pixels, labels=np.array([0, 1, 12]))
    words = [str(run), "likelihood=true", "steps=1", "batch=1"]
    code = evaluate.main([*words, "data=npz:train", f"root={tmp_path}/unknown.npz"])
    assert code == (0 if dropout else 2)
    expected = "labels=: this model was trained with a class for every image and knows no image"
    assert (expected in capsys.readouterr().err) is not bool(dropout)
    assert evaluate.main([*words, "data=npz:train", f"root={tmp_path}/others.npz"]) == 2
    assert "labels=12: must be in 0..9" in capsys.readouterr().err
    assert evaluate.main([*words, f"data={tmp_path}/unknown.npz"]) == code  # a path is one too


def test_evaluate_reports_bits_per_dim(tiny_run, tmp_path, capsys):
    words = [str(tiny_run), "likelihood=true", "num=5", "steps=2", "batch=2"]
    assert evaluate.main([*words, f"out={tmp_path}/r.json"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    rows = [row["bpd"] for row in report["rows"]]
    assert report["data"] == "digits:test" and len(rows) == 5
    found = report["metrics"]["bpd"]
    assert found["value"] == pytest.approx(sum(rows) / 5)
    assert found["stderr"] == pytest.approx(torch.tensor(rows).std().item() / 5**0.5, rel=1e-4)
    assert evaluate.main([*words, "metrics=fd"]) == 2
    assert "metrics=fd: likelihood= does not take it" in capsys.readouterr().err
    assert evaluate.main([*words, "probe=2"]) == 2
    assert "unknown key probe=2: did you mean probes?" in capsys.readouterr().err
    assert evaluate.main([*words, "trace=ful"]) == 2
    assert "trace=ful: choose from hutchinson, exact" in capsys.readouterr().err
