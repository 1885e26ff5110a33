import math

import pytest
import torch
from conftest import ROOT
from gedi_models import POINTS, batch_of, build, points

import genmodels
from genmodels.data.views import view
from genmodels.methods.gedi import GEDI


@pytest.fixture
def x():
    return points()


def plane(side=120):
    """Centres of a grid over [-1, 1]^2, (side^2, 2, 1, 1), and the area of a cell."""
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    points = torch.cartesian_prod(axis, axis)
    return points.reshape(-1, 2, 1, 1), (2 / side) ** 2


def generative(model, x):
    """The generative part of the loss alone, and the f it is made of."""
    with torch.random.fork_rng(devices=[]):
        _, logs = model.loss(batch_of(x))
    return -float(logs["gap"])


# --------------------------------------------------------------------------------------------
# Energy and density


def test_energy_joint_and_predictions_belong_together(x):
    """p(x) = sum_y p(x, y) and p(y | x) = p(x, y) / p(x), from logits computed here."""
    model = build("method.tau=0.2", "network.input_scale=1").eval()
    w, b = model.head[0].weight, model.head[0].bias
    hidden = x.flatten(1)
    for layer in model.net.layers:
        hidden = torch.relu(hidden @ layer.weight.T + layer.bias)
    z = (hidden @ w.T + b) / 0.2
    with torch.no_grad():
        joint = torch.stack([-model.energy(x, torch.full((32,), y)) for y in range(2)], 1)
        torch.testing.assert_close(joint, z)
        torch.testing.assert_close(-model.energy(x), joint.logsumexp(1))
        torch.testing.assert_close(model.cluster(x), z.softmax(1))
        torch.testing.assert_close(model.energy(x, torch.full((32,), -1)), model.energy(x))


def test_h_constant_f(x):
    """No force on the data against the chains; the density is uniform."""
    model = build()
    for layer in model.head:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert generative(model, x) == 0
    points, cell = plane()
    f = -model.energy(points).detach().double()
    log_density = f - (f.logsumexp(0) + math.log(cell))
    torch.testing.assert_close(log_density, torch.full_like(f, -math.log(4)))


def test_i_adding_a_constant_to_all_logits(x):
    model = build("method.tau=0.2").eval()
    before = model.cluster(x), model.energy(x).detach(), generative(model, x)
    with torch.no_grad():
        model.head[-1].bias += 3.0
    torch.testing.assert_close(model.cluster(x), before[0])
    torch.testing.assert_close(model.energy(x).detach(), before[1] - 3.0 / 0.2)
    assert generative(model, x) == pytest.approx(before[2], abs=1e-4)


def test_j_gradient_of_the_generative_term(x, monkeypatch):
    """-1/B at each f of the data, +1/B at each of the chains; f has no part in other terms here."""
    model, seen = build("method.w_inv=0", "method.w_prior_mean=0", "method.w_gen=3"), []
    original = GEDI.outputs

    def spy(self, y):
        z, f = original(self, y)
        if len(y) == 96:
            f.retain_grad()
            seen.append(f)
        return z, f

    monkeypatch.setattr(GEDI, "outputs", spy)
    model.loss(batch_of(x))[0].backward()
    (f,) = seen
    expected = torch.cat([torch.full((32,), -3 / 32), torch.zeros(32), torch.full((32,), 3 / 32)])
    torch.testing.assert_close(f.grad, expected)


@pytest.mark.parametrize("w_inv, w_prior", [(1.0, 1.0), (10.0, 1.0), (0.3, 4.0)])
def test_k_the_bound_holds_with_the_exact_normaliser(w_inv, w_prior):
    """w_gen=1: L_GEN + w_inv L_INV + w_prior L_PRIOR <= E log p(x) - w_prior log C <= -H - ..."""
    from genmodels.methods.gedi_terms import invariance, log_marginal, prior_cross_entropy

    points, cell = plane(60)
    rings = (points.flatten(1).norm(dim=1).double() - 0.6).abs()
    p = torch.exp(-0.5 * (rings / 0.2) ** 2)
    p = p / p.sum()
    entropy = -float((p * p.log()).sum()) + math.log(cell)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.3, 1.0, 3.0, 10.0):
        model = build("method.tau=0.5").double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(scale * noise / 4)
            view = points + 0.1 * torch.randn(points.shape, generator=generator)
            z, f = outputs64(model, points)
            log_p = f - (f.logsumexp(0) + math.log(cell))
            gen = float((p * log_p).sum())
            inv = -float((p * invariance(z, outputs64(model, view)[0])).sum())
            log_pbar = (z.log_softmax(1) + p.log()[:, None]).logsumexp(0)
            prior = -float(prior_cross_entropy(log_pbar))
        assert inv <= 0 and prior <= -math.log(2) + 1e-12
        assert -float(prior_cross_entropy(log_marginal(z))) <= -math.log(2) + 1e-12
        total = gen + w_inv * inv + w_prior * prior
        assert total <= gen - w_prior * math.log(2) + 1e-9
        assert total <= -entropy - w_prior * math.log(2) + 1e-9


def outputs64(model, x):
    """z / tau and f in float64; outputs() itself works in float32."""
    z = model.head(model.net(x.double())) / model.cfg.method.tau
    return z, z.logsumexp(dim=1)


def test_the_bound_is_tight_at_the_best_model():
    """p itself as the density, one-hot equal predictions, balanced: equality, by construction."""
    from genmodels.methods.gedi_terms import invariance, log_marginal, prior_cross_entropy

    points, cell = plane(40)
    side = (points[:, 0, 0, 0] > 0).long()
    p = torch.full((1600,), 1 / 1600, dtype=torch.float64)  # uniform on the box
    z = 200.0 * torch.nn.functional.one_hot(side, 2).double()
    f = z.logsumexp(1)
    gen = float((p * (f - f.logsumexp(0) - math.log(cell))).sum())
    total = gen - float(invariance(z, z).mean() + prior_cross_entropy(log_marginal(z)))
    assert total == pytest.approx(-math.log(4) - math.log(2))


def test_a_scalar_head_has_its_own_density(x):
    model = build("method.energy=scalar").eval()
    z, f = model.outputs(x)
    assert not torch.allclose(f, z.logsumexp(1))
    expected = model.net(x) @ model.scalar.weight[0] + model.scalar.bias
    torch.testing.assert_close(f, expected)
    torch.testing.assert_close(
        model.energy(x, torch.zeros(32, dtype=torch.int64)), -f - z.log_softmax(1)[:, 0]
    )


# --------------------------------------------------------------------------------------------
# The loss and its variants


def test_the_loss_is_the_sum_of_its_terms(x):
    words = ("method.w_gen=0.5", "method.w_inv=2", "method.w_prior_mean=3", "method.l2=0.1")
    model = build(*words)
    loss, logs = model.loss(batch_of(x))
    z = [model.outputs(part)[0] for part in seen_by(model, x)]
    inv = torch.nn.functional.cross_entropy(z[0], z[1].softmax(1)).detach()
    prior = -z[0].softmax(1).mean(0).log().mean().detach()
    f = z[0].logsumexp(1), z[2].logsumexp(1)
    squares = f[0].square().mean() + f[1].square().mean()
    expected = 2 * inv + 3 * prior - 0.5 * (f[0].mean() - f[1].mean()) + 0.1 * squares
    torch.testing.assert_close(loss, expected)
    assert float(logs["inv"]) == pytest.approx(float(inv) / math.log(2), abs=1e-5)
    assert float(logs["prior_gap"]) == pytest.approx(float(prior) - math.log(2), abs=1e-5)


def seen_by(model, x):
    """Data, view and chains of the latest call of loss, made again from the same keys."""
    from genmodels.data.views import add_noise, view

    cfg, n = model.cfg.method, torch.arange(len(x))
    slots = model.replay.slots(len(x), 0)
    return (
        add_noise(x, cfg.data_noise, 0, n),
        view(x, 0, n, noise=cfg.view_noise),
        model.replay.entries[slots],
    )


def test_two_views_a_prior_and_a_detached_target_reach_the_loss(x):
    """Invariance is between the two views, and so is the marginal; f stays that of the image."""
    words = (
        "method.two_views=true",
        "method.prior=0.8,0.2",
        "method.detach_target=true",
        "method.w_inv=2",
        "method.w_prior_mean=3",
        "method.view_noise=0.2",
    )
    model = build(*words)
    loss, logs = model.loss(batch_of(x))
    n = torch.arange(32)
    first, second = (view(x, 0, n, which=which, noise=0.2) for which in (1, 0))
    z, target = model.outputs(first)[0], model.outputs(second)[0].detach()
    inv = torch.nn.functional.cross_entropy(z, target.softmax(1))
    prior = -(torch.tensor([0.8, 0.2]) * z.softmax(1).mean(0).log()).sum()
    real, _, fake = seen_by(model, x)
    gap = model.energy(fake).mean() - model.energy(real).mean()
    expected = 2 * inv + 3 * prior - gap
    torch.testing.assert_close(loss, expected)
    grads = (torch.autograd.grad(total, model.head[0].weight)[0] for total in (loss, expected))
    torch.testing.assert_close(*grads)
    least = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert float(logs["prior_gap"]) == pytest.approx(float(prior.detach()) - least, abs=1e-5)


def test_no_gen_runs_no_chain(x):
    model = build("method.w_gen=0")
    loss, logs = model.loss(batch_of(x))
    loss.backward()
    assert "gap" not in logs and model.replay.entries is None


def test_jem_is_a_setting(x):
    label = torch.arange(32) % 2
    words = ("method.w_inv=0", "method.w_prior_mean=0", "method.w_label=1")
    model = build(*words)
    loss, logs = model.loss(batch_of(x, label))
    real, _, fake = seen_by(model, x)
    cross = torch.nn.functional.cross_entropy(model.outputs(real)[0], label)
    gap = model.energy(fake).mean() - model.energy(real).mean()
    torch.testing.assert_close(loss, cross - gap)


def test_sums_teach_through_pairs_of_neighbours(x):
    label = torch.arange(32) % 2
    model = build("method.w_gen=0", "method.w_inv=0", "method.w_prior_mean=0", "method.w_sum=1")
    loss, _ = model.loss(batch_of(x, label))
    p = model.outputs(seen_real(model, x))[0].softmax(1)
    a, b = p[0::2], p[1::2]
    table = torch.stack(
        [a[:, 0] * b[:, 0], a[:, 0] * b[:, 1] + a[:, 1] * b[:, 0], a[:, 1] * b[:, 1]], 1
    )
    sums = label[0::2] + label[1::2]
    torch.testing.assert_close(loss, -table.gather(1, sums[:, None]).log().mean())
    with pytest.raises(ValueError, match="data.batch_size: gives a process 31 images"):
        model.loss(batch_of(x[:31], label[:31]))


def seen_real(model, x):
    from genmodels.data.views import add_noise

    return add_noise(x, model.cfg.method.data_noise, 0, torch.arange(len(x)))


def test_weights_rise_as_told():
    model = build(
        "method.inv_start=100",
        "method.inv_ramp=50",
        "method.gen_ramp=200",
        "method.w_gen=2",
        "method.w_inv=4",
    )
    table = {0: (0.2, 0), 100: (1.1, 0), 125: (1.325, 2), 150: (1.55, 4), 200: (2, 4), 999: (2, 4)}
    for step, weights in table.items():
        assert model._weights(step) == pytest.approx(weights)
    assert build("method.inv_start=5")._weights(4)[1] == 0
    assert build("method.inv_start=5")._weights(5)[1] == 1


# --------------------------------------------------------------------------------------------
# Configs


@pytest.mark.parametrize(
    "words, message",
    [
        (("method.tau=0",), "method.tau=0.0: must be > 0"),
        (("method.prior=0.5,0.6",), "must be positive and sum to 1"),
        (("method.prior=0.5,0.3,0.2",), "must have 2 numbers"),
        (("method.energy=mlp",), "choose from logits, scalar"),
        (("method.reinit=2",), r"method.reinit=2.0: must be in \[0, 1\]"),
        (("method.marginal_ema=1",), "method.marginal_ema=1.0"),
        (("method.clusters=3", "method.w_label=1"), "needs clusters = classes"),
        (("method.clusters=-1",), "must be >= 0"),
        (("method.buffer=0",), "must be >= 1"),
    ],
)
def test_config_errors(words, message):
    with pytest.raises(ValueError, match=message):
        build(*words)


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="network.name=unet: GEDI needs an encoder"):
        genmodels.build([POINTS | {"network": {"name": "unet"}}])
    with pytest.raises(ValueError, match="network.name=perceptron: needs a network that makes"):
        genmodels.build([POINTS | {"method": {"name": "edm"}}])
    with pytest.raises(ValueError, match="network.name=resnet8: needs images of 4x4 or more"):
        genmodels.build([POINTS | {"network": {"name": "resnet8"}}])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("gedi_*.yaml")), ids=lambda p: p.stem
)
def test_configs_build(path):
    model = genmodels.build(str(path))
    cfg = model.cfg.method
    x = torch.zeros(2, *model.shape)
    assert model.eval().cluster(x).shape == (2, cfg.clusters or model.cfg.data.classes)
    if model.shape[1] > 1:
        assert cfg.view_flip is (model.cfg.data.name in ("cifar10", "cifar100"))
