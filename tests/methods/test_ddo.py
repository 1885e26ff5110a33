"""DDO: loss and gradient, reference and target, and DDO of other methods."""

import copy
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
from genmodels.kernels.philox import philox_normal, philox_uniform
from genmodels.methods import METHODS
from genmodels.methods.base import GenerativeModule
from genmodels.methods.ddo import (
    DDO,
    Discriminative,
    DiscriminativeConfig,
    Frozen,
    ddo_loss,
    diagnostics,
)
from genmodels.networks.precond import Precond
from genmodels.seeding import Stream
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY

DIGITS = str(ROOT / "configs" / "ddo_digits.yaml")
LABELLED = [word for word in TINY if not word.startswith("data.labels")]


def build(*words, reference=None):
    return genmodels.build(DIGITS, *LABELLED, *words, reference=reference)


def trained(*words, seed=0):
    """A model whose last layer is not zero, so that everything in it matters."""
    model = build("network.attention=[1]", *words)
    torch.manual_seed(seed)
    nn.init.normal_(model.net.net.unet.conv_out.weight, std=0.1)
    return model


def against(reference, *words):
    """Return a DDO model that starts at the reference."""
    model = build("network.attention=[1]", *words, reference=reference)
    model.load_state_dict(reference.state_dict())
    return model


def batch(count=6, seed=0, classes=10):
    random = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(count, 1, 8, 8, generator=random) * 2 - 1,
        "fake": torch.rand(count, 1, 8, 8, generator=random) * 2 - 1,
        "label": torch.randint(classes, (count,), generator=random),
        "fake_label": torch.randint(classes, (count,), generator=random),
        "n": torch.arange(count) + 1000,
    }


# ------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("alpha", [0.5, 1, 4])
@pytest.mark.parametrize("normalize", [False, True])
def test_at_the_reference_delta_is_zero_and_the_loss_is_known(alpha, normalize):
    model = against(trained(), f"method.alphas={alpha}", f"method.normalize={normalize}")
    loss, logs = model.train().loss(batch(64))
    for name in ("delta_real", "delta_fake", "delta_real_std", "delta_fake_std", "saturated"):
        assert logs[name] == 0, name
    assert logs["accuracy"] == 0.5
    expected = (1 + alpha) * math.log(2) / (max(alpha, 1) if normalize else 1)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)


def test_loss_and_its_gradient_by_hand():
    real = torch.tensor([0.3, -2.0, 50.0], dtype=torch.float64, requires_grad=True)
    fake = torch.tensor([-0.1, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    alpha, beta = 2.5, 0.7
    sigmoid = lambda t: 1 / (1 + math.exp(-t))  # noqa: E731
    loss = ddo_loss(real, fake, alpha, beta)
    expected = -sum(math.log(sigmoid(beta * r)) for r in real.tolist()) / 3
    expected -= alpha * sum(math.log(sigmoid(-beta * r)) for r in fake.tolist()) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    by_hand = [-beta * sigmoid(-beta * r) / 3 for r in real.tolist()]
    assert real.grad.tolist() == pytest.approx(by_hand, rel=1e-12)
    by_hand = [alpha * beta * sigmoid(beta * r) / 3 for r in fake.tolist()]
    assert fake.grad.tolist() == pytest.approx(by_hand, rel=1e-12)
    assert ddo_loss(torch.tensor([-1e4]), torch.tensor([1e4]), 1.0, 1.0) == 2e4  # no overflow


def test_without_a_label_the_fake_does_not_count():
    """Rows with h = 1: the gradient of the EDM loss times beta s(-beta Delta), and ln 2 less."""
    words = ("method.label_dropout=0.4", "method.alphas=3", "method.betas=40")
    data = batch(50)
    hidden = philox_uniform((), 0, data["n"], stream=int(Stream.LABEL_DROP)) < 0.4
    assert 10 < hidden.sum() < 30
    loss, _ = against(trained(*words), *words).train().loss(data)
    expected = math.log(2) * (1 + 3 * (1 - hidden.float().mean()))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)

    # Fakes without a label alone: nothing of them is left, and of the data EDM's own gradient.
    rows = {key: value[hidden] for key, value in data.items()}
    model, edm = gaussians(0.6, 0.5, *words), gaussians(0.6, 0.5)
    model.train().loss(rows)[0].backward()
    other = gaussians(0.6, 0.5, *words)
    other.train().loss(rows | {"fake": -3 * rows["fake"]})[0].backward()
    assert torch.equal(other.net.c.grad, model.net.c.grad)
    real = {key: rows[key] for key in ("image", "label", "n")}
    delta = edm.log_ratio(real, edm.frozen.model)[0].detach()
    weights = 40 / 64 * torch.sigmoid(-40 / 64 * delta)
    noisy, sigma = edm._diffuse(real["image"], real["n"])
    denoised = edm.net(noisy, sigma)
    losses = edm.net.loss_weight(sigma) * (denoised - real["image"]).square().sum(dim=(1, 2, 3))
    (weights * losses).mean().backward()
    assert model.net.c.grad.item() == pytest.approx(edm.net.c.grad.item(), rel=1e-5)


def test_rows_without_a_label_are_so_for_both_networks_and_both_sides():
    seen = []

    class Spy(Gaussian):
        def forward(self, x, sigma, labels=None, augment=None):
            seen.append(labels)
            return super().forward(x, sigma, labels)

    model, data = gaussians(0.5, 0.5, "method.label_dropout=0.4"), batch(50)
    model.net, model.frozen.model.net = Spy(0.5), Spy(0.5)
    model.train().loss(data)
    hidden = philox_uniform((), 0, data["n"], stream=int(Stream.LABEL_DROP)) < 0.4
    for labels in seen:
        assert torch.equal(labels[:50], torch.where(hidden, -1, data["label"]))
        assert torch.equal(labels[50:], torch.where(hidden, -1, data["fake_label"]))
    assert len(seen) == 2


def test_guidance_goes_on_after_ddo():
    """What EDM's classifier-free guidance makes of the same weights; none without hidden labels."""
    model = trained("method.label_dropout=0.1")
    edm = genmodels.build(
        str(ROOT / "configs/edm_digits.yaml"),
        *LABELLED,
        "network.attention=[1]",
        "method.label_dropout=0.1",
    )
    edm.load_state_dict(model.state_dict())
    options = {"labels": [1, 2], "steps": 3, "guidance": 2.0}
    images = model.eval().sample([1, 2], **options)
    assert torch.equal(images, edm.eval().sample([1, 2], **options))
    assert not torch.equal(images, model.sample([1, 2], labels=[1, 2], steps=3))
    with pytest.raises(ValueError, match="no label was hidden in training"):
        trained().eval().sample([1, 2], **options)


def test_diagnostics_by_hand():
    real, fake = torch.tensor([1.0, -3.0, 0.0, 9.0]), torch.tensor([-1.0, 2.0, -5.0, 0.0])
    logs = diagnostics(real, fake, beta=1.0)
    assert logs["delta_real"] == 1.75 and logs["delta_fake"] == -1.0
    assert logs["accuracy"] == 5 / 8  # right: 1, 9, -1, -5; half: the two zeros
    assert logs["saturated"] == 2 / 8  # 9 and -5
    assert float(logs["delta_real_std"]) == pytest.approx(5.1235, abs=1e-4)


class Gaussian(Precond):
    """The exact denoiser of data N(0, c^2), with c to be learned."""

    def __init__(self, c):
        super().__init__(None, 0.75)
        self.c = nn.Parameter(torch.tensor(c))

    def forward(self, x, sigma, labels=None, augment=None):
        sigma = sigma.reshape(-1, 1, 1, 1)
        return self.c**2 / (self.c**2 + sigma**2) * x


def gaussians(c, c_reference, *words):
    reference = build()
    reference.net = Gaussian(c_reference)
    model = build(*words, reference=reference)
    model.net = Gaussian(c)
    return model


def exact_delta(x, n, c, c_reference, seed=0):
    """-w (|D - x|^2 - |D_ref - x|^2) in float64, as two sums of squares."""
    z = philox_normal((), seed, n, stream=int(Stream.SIGMA)).double()
    noise = philox_normal((1, 8, 8), seed, n, stream=int(Stream.NOISE)).double()
    sigma = (-1.2 + 1.2 * z).exp().reshape(-1, 1, 1, 1)
    x = x.double()
    sums = [
        ((k**2 / (k**2 + sigma**2) * (x + sigma * noise) - x) ** 2).sum(dim=(1, 2, 3))
        for k in (c, c_reference)
    ]
    weight = (sigma**2 + 0.75**2) / (sigma * 0.75) ** 2
    return -weight.flatten() * (sums[0] - sums[1])


def test_delta_against_float64():
    model, data = gaussians(0.6, 0.5), batch(50)
    delta, rows = model.log_ratio(data, model.frozen.model)
    c = model.net.c.detach().double()  # float32's 0.6
    expected = exact_delta(data["image"], data["n"], c, torch.tensor(0.5).double())
    torch.testing.assert_close(delta.double(), expected, rtol=1e-4, atol=1e-4)
    assert set(rows) == {"edm_loss"} and rows["edm_loss"].shape == (50,)


def test_the_mean_of_delta_is_no_log_ratio_in_nats():
    """Of exact Gaussians: with the weight sigma^-3 it would be the log-ratio, with EDM's it is not.

    -log p(x) = integral of sigma^-3 E|D(x + sigma eps; sigma) - x|^2 d sigma + a constant that all
    models share (Kingma et al. 2021, arXiv 2107.00630, in sigma), here by quadrature in ln sigma.
    """
    c, c_reference, x = 0.6, 0.5, torch.full((1, 8, 8), 0.7)
    square = float(x.double().square().sum())
    t = torch.linspace(-16, 16, 200_001, dtype=torch.float64)
    sigma = t.exp()

    def error(c):
        k = c**2 / (c**2 + sigma**2)
        return (1 - k) ** 2 * square + 64 * k**2 * sigma**2

    gain = error(c_reference) - error(c)
    log_ratio = 0.5 * square * (c_reference**-2 - c**-2) + 64 * math.log(c_reference / c)
    exact = torch.trapezoid(sigma**-2 * gain, t)
    assert exact.item() == pytest.approx(log_ratio, rel=1e-6)
    density = (-((t + 1.2) ** 2) / 2 / 1.2**2).exp() / (1.2 * math.sqrt(2 * math.pi))
    weight = (sigma**2 + 0.75**2) / (sigma * 0.75) ** 2
    mean = torch.trapezoid(weight * density * gain, t).item()
    assert mean < 0.6 * log_ratio

    model = gaussians(c, c_reference)
    rows = {"image": x.expand(20_000, 1, 8, 8), "n": torch.arange(20_000)}
    rows["label"] = torch.zeros(20_000).long()
    delta = model.log_ratio(rows, model.frozen.model)[0].detach().double()
    assert abs(delta.mean() - mean) < 4 * delta.std() / 20_000**0.5
    assert 10 * delta.std() / 20_000**0.5 < log_ratio - mean  # so it can tell them apart


class Fixed(Gaussian):
    """Returns what it is given, whatever comes in."""

    def forward(self, x, sigma, labels=None, augment=None):
        return self.output


def test_delta_of_nearly_equal_networks_is_no_rounding():
    """A hundred times closer to float64 than the difference of two float32 sums."""
    model, data = gaussians(0.5, 0.5), batch(50)
    model.net, model.frozen.model.net = Fixed(0.5), Fixed(0.5)
    a = data["image"] + 0.3 * torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    b = a + 1e-5 * a
    model.net.output, model.frozen.model.net.output = a, b
    delta, _ = model.log_ratio(data, model.frozen.model)
    _, sigma = model._diffuse(data["image"], data["n"])
    weight = model.net.loss_weight(sigma)

    def difference(x, a, b, weight):
        squares = [(d - x).square().sum(dim=(1, 2, 3)) for d in (a, b)]
        return -weight * (squares[0] - squares[1])

    exact = difference(*(t.double() for t in (data["image"], a, b, weight)))
    naive = difference(data["image"], a, b, weight)
    errors = [(d.double() - exact).norm() / exact.norm() for d in (delta, naive)]
    assert errors[0] < 1e-6 and errors[1] > 100 * errors[0]


def test_gradient_of_the_whole_loss_against_float64():
    model, data = gaussians(0.6, 0.5, "method.alphas=3", "method.betas=40"), batch(50)
    model.train().loss(data)[0].backward()
    c = torch.tensor(0.6).double().requires_grad_()  # float32's 0.6
    sides = [
        exact_delta(data[k], data["n"], c, torch.tensor(0.5).double()) for k in ("image", "fake")
    ]
    beta = 40 / 64
    loss = torch.nn.functional.softplus(-beta * sides[0]).mean()
    loss = loss + 3 * torch.nn.functional.softplus(beta * sides[1]).mean()
    (expected,) = torch.autograd.grad(loss, c)
    assert float(model.net.c.grad) == pytest.approx(float(expected), rel=1e-4)
    assert model.frozen.model.net.c.grad is None


def test_target_and_reference_real_and_fake_share_noise_level_and_noise():
    seen = []

    class Spy(Gaussian):
        def forward(self, x, sigma, labels=None, augment=None):
            seen.append((x, sigma, labels))
            return super().forward(x, sigma, labels)

    model, data = gaussians(0.5, 0.5), batch()
    model.net, model.frozen.model.net = Spy(0.5), Spy(0.5)
    model.train().loss(data)
    (x, sigma, labels), (other_x, other_sigma, other_labels) = seen
    assert torch.equal(x, other_x) and torch.equal(sigma, other_sigma)
    assert torch.equal(labels, torch.cat([data["label"], data["fake_label"]]))
    assert torch.equal(labels, other_labels)
    assert torch.equal(sigma[:6], sigma[6:]) and len(sigma.unique()) == 6
    noise = [x[:6] - data["image"], x[6:] - data["fake"]]
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-5)


def test_delta_of_an_image_does_not_depend_on_its_neighbours():
    reference = trained()
    model, data = against(reference), batch(8)
    nn.init.normal_(model.net.net.unet.conv_out.weight, std=0.1)
    rows = {key: data[key] for key in ("image", "label", "n")}
    whole = model.log_ratio(rows, reference)[0]
    parts = [
        model.log_ratio({k: v[i : i + 2] for k, v in rows.items()}, reference)[0]
        for i in range(0, 8, 2)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "unit, beta, expected",
    [("dim", 32, 0.5), ("sum", 0.02, 0.02), ("nats", 0.02, 0.02), ("std", 3, 1.5)],
)
def test_units_of_beta(unit, beta, expected):
    model = build(f"method.beta_unit={unit}", f"method.betas={beta}")
    assert float(model.steepness(torch.tensor([-2.0, 2.0]) / math.sqrt(2))) == expected
    assert float(model.steepness(torch.zeros(4))) == (beta if unit == "std" else expected)


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].NEEDS == ("reference",)])
def test_every_method_that_needs_a_reference_takes_an_untrained_twin(name, tmp_path):
    """Builds, trains a step, samples, exports and loads again."""
    twin = build(f"method.name={name}")
    model = build(f"method.name={name}", reference=twin).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model.loss(batch())[0].backward()
    optimizer.step()
    kept = build(f"method.name={name}").state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in twin.state_dict().items())
    assert not all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    images = model.eval().sample([3, 4], steps=2)
    genmodels.checkpoint.write_export(model, tmp_path / "export", "card")
    again = genmodels.load(tmp_path / "export")
    assert torch.equal(again.sample([3, 4], steps=2), images)


# ------------------------------------------------------------------------------------------------
# The reference, and what is refused


def test_the_reference_is_no_part_of_the_model():
    reference = trained()
    model = against(reference)
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert (
        model.state_dict().keys()
        == genmodels.build(
            str(ROOT / "configs" / "edm_digits.yaml"), *LABELLED, "network.attention=[1]"
        )
        .state_dict()
        .keys()
    )
    assert len(list(model.parameters())) == len(list(reference.parameters()))
    double = copy.deepcopy(model)  # how the weight average is made
    assert double.frozen is model.frozen and double.net is not model.net
    assert not any(p.requires_grad for p in model.frozen.model.parameters())
    assert isinstance(model.frozen, Frozen) and not isinstance(model.frozen, nn.Module)


def test_held_out_images_get_the_plain_loss():
    reference = trained()
    model, data = against(reference).eval(), batch()
    rows = {key: data[key] for key in ("image", "label", "n")}
    _loss, logs = model.loss(rows)
    assert set(logs) == {"loss"}
    _, told = model.log_ratio(rows, reference)
    torch.testing.assert_close(logs["loss"], told["edm_loss"].mean())
    with pytest.raises(ValueError, match="reference=none"):
        model.train().loss(rows)


def test_training_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="init=MODEL"):
        build().train().loss(batch())


@pytest.mark.parametrize(
    "word, message",
    [
        ("trainer.precision=bf16-mixed", "trainer.precision=bf16-mixed: .*use 32-true"),
        ("trainer.tf32=true", "trainer.tf32=true: .*use false"),
        ("network.dropout=0.1", "network.dropout=0.1: .*use 0"),
        ("method.uncertainty=true", "method.uncertainty=True: .*use false"),
        ("method.guidance=2", "method.guidance=2.0: .*use 1"),
        ("method.betas=", "method.betas=.*at least one"),
        ("method.betas=1,-1", "method.betas=.*> 0"),
        ("method.alphas=0", "method.alphas=.*> 0"),
        ("method.beta_unit=pixels", "method.beta_unit=pixels: choose from dim, sum, nats, std"),
        ("method.rounds=0", "method.rounds=0: must be in"),
    ],
)
def test_refused(word, message):
    with pytest.raises(ValueError, match=message):
        build(word)


def test_ddo_is_an_edm_otherwise():
    assert issubclass(DDO, METHODS["edm"]) and DDO.SAMPLE_OPTIONS == METHODS["edm"].SAMPLE_OPTIONS
    reference = trained()
    edm = genmodels.build(str(ROOT / "configs/edm_digits.yaml"), *LABELLED, "network.attention=[1]")
    edm.load_state_dict(reference.state_dict())
    assert torch.equal(edm.eval().sample([1], steps=3), reference.eval().sample([1], steps=3))


# ------------------------------------------------------------------------------------------------
# Other methods: an energy of points on a line, and a network on the plane


class Table(nn.Module):
    """An energy for each of K points on a line, known up to a constant; DDO's second method."""

    LABEL_DROPOUT = False

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
        cfg = SimpleNamespace(
            trainer=trainer, network=SimpleNamespace(dropout=0), method=method, points=6
        )
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
