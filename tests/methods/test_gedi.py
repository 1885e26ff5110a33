"""GEDI: the terms of the loss put together, settings, chains and samples."""

import itertools
import math

import pytest
import torch

import genmodels
from genmodels.data.views import view
from genmodels.methods.gedi import GEDI
from tests.helpers.gedi_models import POINTS, batch_of, build, points
from tests.helpers.paths import ROOT


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
    loss, _logs = model.loss(batch_of(x, label))
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


# ------------------------------------------------------------------------------------------------
# Chains


def test_chains_freeze_the_parameters_and_leave_the_graph(x, monkeypatch):
    model, seen = build(), []
    original = GEDI._energy

    def spy(self, y, labels):
        seen.append(any(p.requires_grad for p in self.parameters()))
        return original(self, y, labels)

    monkeypatch.setattr(GEDI, "_energy", spy)
    fake = model._fakes(torch.arange(32))
    assert seen == [False, False] and not fake.requires_grad
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.replay.entries[model.replay.slots(32, 0)], fake)


@pytest.mark.parametrize("step, scale, variance", [(0.02, 0.2, 1.0101), (0.05, 0.1, 0.1026)])
def test_stationary_variance(monkeypatch, step, scale, variance):
    """On a standard normal x' = (1 - a) x + s z has s^2 / (1 - (1 - a)^2); s^2 / 2a is its T."""
    monkeypatch.setattr(GEDI, "_energy", lambda self, y, labels: 0.5 * y.square().flatten(1).sum(1))
    model = build(f"method.step={step}", f"method.noise_scale={scale}")
    start = torch.zeros(4000, 2, 1, 1)
    end = model._chain(start, 150, torch.arange(4000))
    assert float(end.var()) == pytest.approx(variance, rel=5 * (2 / 8000) ** 0.5)


def test_clamp_and_grad_clip_reach_the_chains(monkeypatch):
    """A steep energy: free it leaves the box at once, clamped it stays, clipped it moves by a."""
    monkeypatch.setattr(GEDI, "_energy", lambda self, y, labels: -100 * y.flatten(1).sum(1))
    words = ("method.step=0.1", "method.noise_scale=1e-6")
    start = torch.zeros(4, 2, 1, 1)
    for options, end in (((), 10.0), (("method.clamp=true",), 1.0), (("method.grad_clip=2",), 0.2)):
        model = build(*words, *options)
        moved = model._chain(start, 1, torch.arange(4))
        torch.testing.assert_close(moved, torch.full_like(start, end), atol=1e-4, rtol=0)


def test_every_step_has_noise_of_its_own():
    """Without force, all entries visited at both steps: the two displacements do not agree."""
    model = build(
        "method.reinit=0", "method.buffer=32", "method.chain_steps=1", "method.clamp=false"
    )
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    states = []
    for batch in range(3):
        model._fakes(torch.arange(32 * batch, 32 * batch + 32))
        states.append(model.replay.entries.clone())
    moves = [(b - a).flatten(1) for a, b in itertools.pairwise(states)]
    orders = [model.replay.slots(32, batch) for batch in (1, 2)]
    first, second = (move[order].flatten() for move, order in zip(moves, orders))
    assert torch.stack([first, second]).corrcoef()[0, 1].abs() < 0.6  # 5 of 1 / sqrt(64)


def test_noise_scale_0_is_temperature_1():
    model = build("method.step=0.02", "method.noise_scale=0")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    start = torch.zeros(4000, 2, 1, 1)
    end = model._chain(start, 1, torch.arange(4000))
    assert float(end.std()) == pytest.approx(0.2, rel=0.03)


def test_another_retry_is_other_noise_and_half_the_lr(x):
    first, same, other = build(), build(), build("method.retry=1")
    fakes = [model._fakes(torch.arange(32)) for model in (first, same, other)]
    assert torch.equal(fakes[0], fakes[1]) and not torch.allclose(fakes[0], fakes[2], atol=1e-3)
    assert other.lr_factor(7) == first.lr_factor(7) / 2


def test_a_restored_buffer_follows_the_model_to_its_device():
    """Lightning reads the checkpoint before it moves the model."""
    first, model = build(), build()
    first._fakes(torch.arange(32))
    model.on_load_checkpoint({"replay": first.replay.state() | {"log_ema": None}})
    fakes = model.to("meta").eval()._fakes(torch.arange(32))
    assert fakes.device.type == model.replay.visits.device.type == "meta"


def test_samples_depend_on_their_seed_alone():
    model = build().eval()
    all_of_them = model.sample([3, 4, 2**40, 9], steps=5)
    torch.testing.assert_close(model.sample([2**40], steps=5)[0], all_of_them[2])
    assert model.nfe == 5 and model.chains == "fresh chains of 5 steps"
    assert not torch.equal(all_of_them[0], all_of_them[1])
    zero = model.sample([3], steps=0)
    assert zero.abs().max() <= 1


def test_chains_of_a_cluster_end_in_it():
    """f with two peaks, one for each cluster: labels choose the peak."""
    model = build("method.step=0.01").eval()

    def outputs(y):
        centres = torch.tensor([[-0.6, 0.0], [0.6, 0.0]])
        z = -8 * (y.flatten(1)[:, None] - centres).square().sum(2)
        return z, z.logsumexp(1)

    model.outputs = outputs
    for label, side in ((0, -1), (1, 1)):
        ends = model.sample(range(1000), labels=label, steps=50)[:, 0, 0, 0]
        # Normal around side * 0.6 with variance 2 a / (1 - (1 - 16 a)^2).
        assert float(ends.mean()) == pytest.approx(0.6 * side, abs=5 * 0.26 / 1000**0.5)
        assert float(ends.std()) == pytest.approx((0.02 / (1 - 0.84**2)) ** 0.5, rel=0.1)
    both = model.sample(range(1000), steps=50)[:, 0, 0, 0]
    assert 400 < (both > 0).sum() < 600


def test_a_cluster_of_buffered_images_needs_steps(x):
    """Without any they would stay in whatever cluster they are in."""
    model = build()
    model.loss(batch_of(x))
    model.eval()
    for labels in (None, -1):
        model.sample([0, 1], labels=labels, start="buffer")
    one = model.sample([0, 1], labels=1, start="buffer", steps=5)
    assert not torch.equal(one, model.sample([0, 1], labels=0, start="buffer", steps=5))
    with pytest.raises(ValueError, match="^steps=0: leaves the buffer's images in any cluster"):
        model.sample([0, 1], labels=[-1, 1], start="buffer")


@pytest.fixture
def buffered(x):
    """A model whose buffer holds the numbers of its entries, and 10 visits of every fourth."""
    model = build()
    model.loss(batch_of(x))
    count = len(model.replay.entries)
    model.replay.entries = torch.arange(count).float().reshape(-1, 1, 1, 1).expand(-1, 2, 1, 1)
    model.replay.visits = torch.where(torch.arange(count) % 4 == 0, 10, 9)
    return model.eval()


def test_young_chains_of_the_buffer_are_passed_over(buffered):
    def drawn(**options):
        return buffered.sample(range(20), start="buffer", **options)[:, 0, 0, 0].tolist()

    assert drawn() == drawn(min_visits=9) == list(range(20))
    assert drawn(min_visits=10) == [4.0 * (k % 16) for k in range(20)]
    assert buffered.chains == "the replay buffer's chains, 0 steps on, those with 10 visits"
    with pytest.raises(ValueError, match="^min_visits=11: no chain of the buffer has gone on so"):
        drawn(min_visits=11)


def test_start_auto_takes_the_buffer_where_it_can(buffered):
    def kind(model, **options):
        model.sample([0], start="auto", steps=0, **options)
        return model.chains.split()[0]

    assert kind(buffered) == kind(buffered, min_visits=10) == kind(buffered, labels=None) == "the"
    assert kind(buffered, min_visits=11) == kind(buffered, labels=1) == "fresh"
    assert kind(build().eval()) == "fresh"  # it has no buffer
    buffered._rank_and_world = lambda: (1, 2)
    assert kind(buffered) == "fresh"


def test_the_last_steps_are_without_noise():
    """f = -k |x|^2 / 2: each of them leaves x (1 - a k), and the noise of the steps before."""
    model = build("method.step=0.01", "method.noise_scale=0.5", "method.final=3").eval()
    model.outputs = lambda y: (y.flatten(1), -10 * y.square().sum((1, 2, 3)))  # k = 20
    seen = []
    ends = model.sample([3, 4], steps=2, callback=lambda i, x: seen.append((i, x.clone())))
    before = model.sample([3, 4], steps=2, final=0)
    torch.testing.assert_close(ends, before * (1 - 0.2) ** 3)
    assert model.nfe == 2 and [i for i, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[1][1], before) and torch.equal(seen[4][1], ends)
    ends = model.sample([3], steps=2)
    assert model.nfe == 5 and model.chains == "fresh chains of 2 steps, and 3 without noise"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"start": "warm"}, "start=warm: choose from fresh, buffer, auto"),
        ({"min_visits": -1}, "^min_visits=-1: must be >= 0"),
        ({"final": -1}, "^final=-1: must be >= 0"),
        ({"steps": -1}, "steps=-1"),
        ({"labels": 2}, r"labels=\[2\]: must be in 0..1"),
        ({"labels": [0, 1]}, "give 1 or 3"),
        ({"start": "buffer"}, "this model has no chains of a training"),
    ],
)
def test_sample_errors(options, words):
    with pytest.raises(ValueError, match=words):
        build().eval().sample([0, 1, 2], **options)
