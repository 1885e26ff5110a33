"""CDRL: gradients, pairs and optimizers, samples, and laws in closed form."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule
from torch import nn

import genmodels
from genmodels import generation
from genmodels.images import from_uint8, to_uint8
from genmodels.kernels.philox import philox_normal
from genmodels.methods import cdrl
from genmodels.methods.composed import training_labels
from genmodels.networks.ebm import Spectral
from genmodels.sampling.composition import blend_of, parse_compose
from genmodels.sampling.recovery import Rung
from genmodels.seeding import Stream
from tests.helpers.paths import ROOT

# ------------------------------------------------------------------------------------------------
# The loss: gradients of the two losses, pairs, optimizers


DIGITS = str(ROOT / "configs" / "cdrl_digits.yaml")
SMALL = ("network.width=16", "method.steps=3", "method.initializer_channels=16")


class Quadratic(nn.Module):
    """f = sum_d (a_d y_d + b_d y_d^2): each pixel is a model of its own."""

    def __init__(self, shape):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.full(shape, -0.2))

    def forward(self, y, noise, labels=None, *, dtype=torch.float32):
        return (self.a * y + self.b * y**2).to(dtype).flatten(1).sum(1)


def gradients(model, shared, batches, size):
    """Return the gradients of a and b, (2, batches, pixels): each a mean over `size` images."""
    model.cfg.method.shared_noise = shared
    rows = []
    for i in range(batches):
        generator = torch.Generator().manual_seed(i)
        batch = {
            "image": 0.3 + 0.5 * torch.randn(size, 1, 8, 8, generator=generator),
            "label": torch.full((size,), -1),
            "n": torch.arange(size) + i * size,
        }
        model.zero_grad()
        model.loss(batch)[0].backward()
        rows.append(torch.stack([model.net.a.grad.flatten(), model.net.b.grad.flatten()]))
    return torch.stack(rows, dim=1).double()


def test_shared_noise_is_unbiased_and_has_the_smaller_variance():
    """2,560 gradients, each a mean over 100 images, with one noise and with two."""
    model = genmodels.build(
        DIGITS,
        *SMALL,
        "method.initializer=none",
        "data.labels=false",
        "method.step_size=2e-3",
        "method.growth=constant",
    )
    model.net = Quadratic((1, 8, 8))
    model.train()
    shared, fresh = (gradients(model, flag, 40, 100).flatten(1) for flag in (True, False))
    n = shared.shape[1]
    for one, two in zip(shared, fresh):
        error = ((one.var() + two.var()) / n).sqrt()
        assert abs(one.mean() - two.mean()) < 4 * error
        assert abs(one.mean()) > 8 * error  # there is a gradient to agree on
        # the standard error of a ratio of variances is about sqrt(4 / n) = 4 %
        assert one.var() / two.var() < 0.88


@pytest.mark.parametrize("units", ["step", "noise"])
def test_gradient_of_the_loss_by_hand(units):
    """d L_f / d a = -mean w (y+ - y_K), and no gradient flows through the chain or into g.

    a belongs to the network: its weight is sigma_1 / sigma_t whatever the units of f.
    """
    model = genmodels.build(DIGITS, *SMALL, "data.labels=false", f"method.units={units}")
    model.net = Quadratic((1, 8, 8))
    seen = {}
    original = model.net.forward

    def spy(y, noise, labels=None, **options):
        if torch.is_grad_enabled() and model.net.a.requires_grad:
            seen.setdefault("y", []).append(y.detach())
        return original(y, noise, labels, **options)

    model.net.forward = spy
    batch = {"image": torch.rand(6, 1, 8, 8), "label": torch.full((6,), -1), "n": torch.arange(6)}
    loss, logs = model.loss(batch)
    loss.backward()
    (both,) = seen["y"]  # one forward with parameter gradients, both sides at once
    data, chain = both.chunk(2)
    level = level_of(model, batch)
    weight = (model.schedule.exact.sigma[1] / level.sigma).float().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(model.net.a.grad, -(weight * (data - chain)).mean(0))
    _, expected = model.pair(batch["image"], batch["n"], level)
    assert torch.equal(data, expected)
    assert all(p.grad is not None for p in model.initializer.head.parameters())
    gap = original(data, None) - original(chain, None)
    torch.testing.assert_close(logs["loss"], -(weight.flatten() * gap).mean().detach())


def level_of(model, batch):
    from genmodels import seeding

    u = seeding.uniform(model.cfg.seed, batch["n"], seeding.Stream.SIGMA)
    return model.schedule.at(1 + (u * model.cfg.method.levels).long())


def test_pairs_have_the_right_marginals():
    """Both couplings: x_t = cos x + sin e, y+ = scale (cos' x + sin' e)."""
    model = genmodels.build(DIGITS, *SMALL)
    x, n = torch.full((400, 1, 8, 8), 0.5), torch.arange(400)
    for shared in (True, False):
        model.cfg.method.shared_noise = shared
        for t in (1, 4, 6):
            level = model.schedule.at(torch.full((400,), t))
            x_t, data = model.pair(x, n, level)
            for rows, mean, std in (
                (x_t, level.cos[0] * 0.5, level.sin[0]),
                (
                    data,
                    level.scale[0] * level.cos_clean[0] * 0.5,
                    level.scale[0] * level.sin_clean[0],
                ),
            ):
                assert abs(rows.mean() - mean) < 5 * std / 160
                assert abs(rows.std() / std - 1) < 5 / 160 / 2**0.5
        if t < 6:
            expected = level.scale * level.cos_clean
            torch.testing.assert_close(level.cos, expected)


def test_two_groups_are_two_optimizers_bit_for_bit():
    """One Adam on the sum of the losses, each group clipped by itself, is Adam for f and for g."""
    words = (
        *SMALL,
        "optim.rampup=100",
        "optim.clip=0.05",
        "data.batch_size=16",
        "optim.decay=none",
    )
    together, apart = (genmodels.build(DIGITS, *words).train() for _ in range(2))
    together.log = lambda **values: None
    (optimizer,), (schedule,) = together.configure_optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0]
    rates = (1e-3, 1e-3)
    both = [
        torch.optim.AdamW(net.parameters(), lr, weight_decay=0.0)
        for net, lr in zip((apart.net, apart.initializer), rates)
    ]
    generator, clipped = torch.Generator().manual_seed(0), 0
    for step in range(5):
        batch = {
            "image": torch.rand(16, 1, 8, 8, generator=generator) * 2 - 1,
            "label": torch.randint(0, 10, (16,), generator=generator),
            "n": torch.arange(16) + 16 * step,
        }
        optimizer.zero_grad()
        together.loss(batch)[0].backward()
        together.configure_gradient_clipping(optimizer, None, None)
        optimizer.step()
        schedule["scheduler"].step()
        for own, net, lr in zip(both, (apart.net, apart.initializer), rates):
            own.zero_grad()
            loss = apart.loss(batch)[0]  # of which net sees its own part alone
            grads = torch.autograd.grad(loss, list(net.parameters()))
            for parameter, grad in zip(net.parameters(), grads):
                parameter.grad = grad
            clipped += float(nn.utils.clip_grad_norm_(net.parameters(), 0.05)) > 0.05
            own.param_groups[0]["lr"] = lr * min(step * 16 / 100, 1)
        for own in both:
            own.step()
    assert clipped >= 8
    for (name, one), two in zip(together.named_parameters(), apart.parameters()):
        assert torch.equal(one, two), name
    assert not torch.equal(
        together.net.stem.weight, genmodels.build(DIGITS, *words).net.stem.weight
    )


def test_a_share_of_the_labels_is_hidden_in_training():
    model, n = genmodels.build(DIGITS, *SMALL, "method.label_dropout=0.2"), torch.arange(4000)
    labels = torch.full((4000,), 3)
    hidden = training_labels(model.train(), labels, n) == -1
    assert abs(float(hidden.double().mean()) - 0.2) < 5 * (0.2 * 0.8 / 4000) ** 0.5
    assert torch.equal(training_labels(model.eval(), labels, n), labels)


SMALL_CDRL = ("data.name=digits", "network.channels=8", "network.multipliers=1", "network.blocks=1")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("cdrl_cifar10", (*SMALL_CDRL, "method.initializer=none")),
        ("energy_digits", ("network.spectral_norm=true", "network.width=16")),
    ],
)
def test_each_step_is_followed_by_a_power_iteration(config, words, monkeypatch):
    """Else the bound is one of the first weights."""
    model = genmodels.build(str(ROOT / "configs" / f"{config}.yaml"), *words)
    layer = next(each for each in model.net.modules() if isinstance(each, Spectral))
    before = layer.u.clone()

    def step(self):
        layer.weight.data = torch.randn_like(layer.weight)

    monkeypatch.setattr(LightningModule, "optimizer_step", step)
    model.optimizer_step()
    rows = layer.weight.detach().flatten(1)
    expected = nn.functional.normalize(rows @ (rows.T @ before), dim=0)
    torch.testing.assert_close(layer.u, expected)
    assert not torch.allclose(before, expected)


def test_initializer_learns_from_fresh_pairs_first():
    """At first g(x) = x, so L_g = E |y - x_t|^2 = D sigma_t^2, but for the level without tether:
    there y = x_5 and x_6 = sqrt(a) y + sigma e'. The chains start as ever, and g alone learns."""
    words = ("data.labels=false", "trainer.max_steps=9")
    plain, model = (
        genmodels.build(DIGITS, *SMALL, *words, f"method.initializer_pairs={share}")
        for share in (0, 0.33)
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3000, 1, 8, 8, generator=generator)  # of variance 1, as x_t then at all t
    batch = {"image": images, "label": torch.full((3000,), -1), "n": torch.arange(3000)}
    (loss, logs), (_, usual) = model.loss(batch), plain.loss(batch)
    sigma = torch.tensor([0.25216, 0.42407, 0.55053, 0.67134, 0.80757, 0.96992]).double() ** 2
    sigma[5] = 2 - 2 * (1 - sigma[5]).sqrt()
    assert float(logs["loss_initializer"]) == pytest.approx(64 * float(sigma.mean()), rel=0.03)
    assert logs["loss"] == usual["loss"] and logs["loss_initializer"] > usual["loss_initializer"]
    loss.backward()
    assert model.initializer.head.weight.grad.abs().max() > 0
    model._trainer = SimpleNamespace(global_step=3)
    assert not model.pairing and not plain.pairing
    with pytest.raises(ValueError, match="^method.initializer_pairs=0.1: there is none to learn"):
        genmodels.build(DIGITS, "method.initializer=none", "method.initializer_pairs=0.1")


@pytest.mark.parametrize("units", ["step", "noise"])
def test_the_energy_learns_the_score_first(units):
    """E (n_t (A + 2 B y) + e)^2 of pixels N(0.3, 0.5^2), A and B the slopes of log p = f / s_t^2;
    d/da by hand."""
    words = ("data.labels=false", "trainer.max_steps=9", "method.matching=0.3")
    model = genmodels.build(DIGITS, *SMALL, *words, f"method.units={units}")
    model.net = Quadratic((1, 8, 8))
    with torch.no_grad():
        model.net.a.fill_(0.01)
        model.net.b.fill_(-0.002)
    images = 0.3 + 0.5 * torch.randn(8000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = {"image": images, "label": torch.full((8000,), -1), "n": torch.arange(8000)}
    value, logs = model.loss(batch)
    value.backward()
    rungs = Rung(*(row[1:] for row in model.schedule.exact))
    n = rungs.scale * rungs.sin_clean
    mean = 0.3 * rungs.scale * rungs.cos_clean
    variance = (0.5 * rungs.scale * rungs.cos_clean) ** 2 + n**2
    a, b = (value * rungs.gain / rungs.s**2 for value in (0.01, -0.002))
    slope = a + 2 * b * mean
    of_rungs = n**2 * (slope**2 + 4 * b**2 * variance) + 1 + 4 * n**2 * b
    assert float(logs["loss"]) == pytest.approx(float(of_rungs.mean()), rel=0.05)
    by_hand = (2 * n**2 * slope * rungs.gain / rungs.s**2).mean()
    assert float(model.net.a.grad.sum()) == pytest.approx(float(by_hand), rel=0.05)
    assert model.initializer.head.weight.grad.abs().max() > 0
    assert logs["loss_initializer"] > 1 and model.rungs is None
    model._trainer = SimpleNamespace(global_step=3)
    model.loss({key: value[:4] for key, value in batch.items()})
    assert model.rungs is not None
    with pytest.raises(ValueError, match="^network.activation=leaky: method.matching > 0 differ"):
        genmodels.build(DIGITS, "method.matching=0.3", "network.activation=leaky")


def test_initializer_learns_the_chains_displacement():
    """d L_g / d g = -2 (y_K - y_0): zero where the chain does not move, whatever the noise n."""
    model = genmodels.build(DIGITS, *SMALL, "data.labels=false", "method.step_size=1e-12")
    model.net = Quadratic((1, 8, 8))
    with torch.no_grad():
        model.net.b.zero_()  # flat energy, hardly any noise: the chain stays
    batch = {"image": torch.rand(4, 1, 8, 8), "label": torch.full((4,), -1), "n": torch.arange(4)}
    _, logs = model.loss(batch)
    assert float(logs["loss_initializer"]) < 1e-6


# ------------------------------------------------------------------------------------------------
# CDRL.sample: seeds, known pixels, counts, options, and what it refuses


@pytest.fixture(scope="module")
def digits():
    """An untrained model whose maps, of the initializer and in the energy, are not zero."""
    model = genmodels.build(DIGITS, *SMALL).eval()
    torch.manual_seed(0)
    nn.init.normal_(model.initializer.head.weight, std=0.05)
    nn.init.normal_(model.net.head.weight, std=0.2)
    return model


@pytest.mark.parametrize(
    "options", [{}, {"guidance": 0.5}, {"mala": True}, {"compose": "3:1.5,5|6,!7:0.5"}]
)
def test_an_image_depends_on_its_seed_alone(digits, options):
    together = to_uint8(digits.sample(range(6), **options))
    assert len(together.flatten(1).unique(dim=0)) == 6
    assert torch.equal(to_uint8(digits.sample([5, 2, 0], **options)), together[[5, 2, 0]])
    assert torch.equal(to_uint8(digits.sample([4], **options))[0], together[4])


def test_evaluations_are_counted(digits):
    """6 levels of 1 map and K gradients, and the last denoising; each term of a blend counts."""
    digits.sample([0], 3)
    assert digits.nfe == 6 * (1 + 3) + 1
    digits.sample([0], 3, steps=1)
    assert digits.nfe == 6 * (1 + 1) + 1
    digits.sample([0], 3, guidance=0.7)
    assert digits.nfe == 2 * 25
    digits.sample([0], compose="3:1.5,5|6,!7:0.5")  # 3, 5, 6, 7 and none
    assert digits.nfe == 5 * 25
    levels = []
    digits.sample([0], 3, callback=lambda i, x: levels.append((i, tuple(x.shape))))
    assert levels == [(i, (1, 1, 8, 8)) for i in range(6)]


@pytest.mark.parametrize("options", [{}, {"guidance": 1.0}, {"compose": "3,5|6"}])
def test_level_and_label_are_embedded_once_for_a_chain(digits, options, monkeypatch):
    """6 chains, and the last denoising."""
    calls, original = [], type(digits.net.embedding)._embed
    monkeypatch.setattr(
        type(digits.net.embedding),
        "_embed",
        lambda self, *args: calls.append(self) or original(self, *args),
    )
    digits.sample([0, 1], **options)
    assert sum(owner is digits.net.embedding for owner in calls) == 7


def test_fewer_steps_have_the_time_of_all(digits, monkeypatch):
    rates, original = [], cdrl.sample_recovery
    monkeypatch.setattr(
        cdrl,
        "sample_recovery",
        lambda *args, **options: rates.append(options["rate"]) or original(*args, **options),
    )
    for steps in (None, 2, 6):
        digits.sample([0], 3, steps=steps)
    assert rates == [1.0, 1.5, 0.5]


def test_chains_start_at_the_initializer(digits):
    """x_t + network(x_t, level of the noisy side) + sqrt(v_t) n; the roots from the table."""
    generator = torch.Generator().manual_seed(0)
    x, n = torch.randn(2, 6, 1, 8, 8, generator=generator)
    t, labels = torch.arange(1, 7), torch.arange(6)
    root = torch.tensor([0.00720, 0.20113, 0.32473, 0.40371, 0.42237, 0.92179])
    code = 2000 / torch.pi * (0.00745 + 0.24757 * t)
    expected = x + digits.initializer(x, code, labels) + root.reshape(-1, 1, 1, 1) * n
    found = digits.initial(x, digits.schedule.at(t), labels, n)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_guided_and_composed_chains_start_at_the_blend_of_the_maps(digits):
    """x + (1 + w) g(c) - w g(none); x + g(none) + sum w_i (g_i - g(none)), g_i one class of an OR.

    u = 0.6 is in the second half of [0, 1): of 5|6 it takes the 6.
    """
    generator = torch.Generator().manual_seed(0)
    x, n = torch.randn(2, 6, 1, 8, 8, generator=generator)
    labels, u = torch.arange(6), torch.tensor([0.6, 0.6, 0.6, 0.1, 0.1, 0.1])
    rung = digits.schedule.at(torch.arange(1, 7))
    noise = rung.v.sqrt().reshape(-1, 1, 1, 1) * n

    def g(label):
        label = torch.full((6,), label) if isinstance(label, int) else label
        return digits.initializer(x, rung.noise, label)

    own, none = g(labels), g(-1)
    assert (own - none)[1:].abs().amax((1, 2, 3)).min() > 1e-3
    found = digits.initial(x, rung, None, noise=n, blend=blend_of(0.7, labels, u))
    expected = x + 1.7 * own - 0.7 * none + noise
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    blend = blend_of(parse_compose("3:1.5,5|6,!7:0.5", 10), labels, u)
    found = digits.initial(x, rung, None, noise=n, blend=blend)
    either = torch.where(u.reshape(-1, 1, 1, 1) < 0.5, g(5), g(6))
    terms = 1.5 * (g(3) - none) + (either - none) - 0.5 * (g(7) - none)
    torch.testing.assert_close(found, x + none + terms + noise, rtol=1e-5, atol=1e-5)


def test_options_do_what_they_say(digits):
    plain = digits.sample([0, 1], 3)
    for options in (
        {"steps": 2},
        {"guidance": 1.0},
        {"noise_scale": 0.5},
        {"tweedie_scale": 0.0},
        {"mala": True},
    ):
        assert not torch.equal(digits.sample([0, 1], 3, **options), plain), options
    assert torch.equal(digits.sample([0, 1], compose="3"), plain)
    same = digits.sample([0, 1], compose="3:1.7")
    torch.testing.assert_close(same, digits.sample([0, 1], 3, guidance=0.7), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sample([0], 10), r"labels=\[10\]: must be in 0..9"),
        (lambda m: m.sample([0], steps=0), "steps=0: must be >= 1"),
        (lambda m: m.sample([0], guidance=-2.0), "guidance=-2.0: must be >= -1"),
        (lambda m: m.sample([0], churn=1.0), "churn=1.0: choose from steps"),
        (lambda m: m.sample([0], mala=True, noise_scale=0.9), "^noise_scale=0.9: mala=true does"),
        (lambda m: m.sample([0], compose="\u00b2"), "is no term"),
        (lambda m: m.sample([0], 3, compose="3"), "compose=3: names the classes itself"),
        (lambda m: m.sample([0], compose="3", guidance=1.0), "compose=3: weights take guidance's"),
        (lambda m: m.sample([0], compose="12"), "compose=12: '12' is no term"),
        (lambda m: m.sample([0], compose="3:x"), "compose=3:x: weights must be > 0"),
        (lambda m: m.sample([0], compose="!3:2"), "the weight of a NOT must be <= 1"),
    ],
)
def test_sample_refuses(digits, call, message):
    with pytest.raises(ValueError, match=message):
        call(digits)


def test_unconditional_model_refuses_labels_guidance_and_terms():
    model = genmodels.build(DIGITS, *SMALL, "data.labels=false")
    for options in ({"labels": 3}, {"guidance": 1.0}, {"compose": "3"}):
        with pytest.raises(ValueError, match="unconditional"):
            model.sample([0], **options)


def test_metropolis_steps_refuse_the_config_s_noise_scale():
    words = ("method.mala=true", "method.noise_scale=0.99")
    with pytest.raises(ValueError, match="^method.noise_scale=0.99: mala=true does not take it"):
        genmodels.build(DIGITS, *SMALL, *words)
    model = genmodels.build(DIGITS, *SMALL, words[1]).eval()
    with pytest.raises(ValueError, match="^noise_scale=0.99: mala=true does not take it"):
        model.sample([0], mala=True)
    model.sample([0], mala=True, noise_scale=1.0, steps=1)


def test_a_model_that_saw_every_label_knows_nothing_without():
    model, x = (
        genmodels.build(DIGITS, *SMALL, "method.label_dropout=0").eval(),
        torch.zeros(1, 1, 8, 8),
    )
    for call, message in (
        (lambda m: m.sample([0], 3, steps=1, guidance=1.0), "^guidance=1.0: no label was hidden"),
        (lambda m: m.sample([0], compose="3:1.5", steps=1), "^compose=3:1.5: no label was hidden"),
        (lambda m: m.sample([0], known=x, mask=x == 0, steps=1), "^labels=: this model was"),
        (lambda m: m.energy(x), "^labels=: this model was trained with a class"),
        (lambda m: m.ood_scores(x), "^labels=: this model was trained with a class"),
        (
            lambda m: m.log_prob(x, kind="ais_upper", seeds=[0], ais_steps=2, ais_chains=2),
            "^labels=: this model was trained with a class",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call(model)
    model.sample([0], compose="3:1.5,4:0.5,!5:1", steps=1)
    model.energy(x, torch.tensor([3]))
    with pytest.raises(ValueError, match="^method.guidance=1.0: needs a conditional model"):
        genmodels.build(DIGITS, *SMALL, "method.label_dropout=0", "method.guidance=1")


def test_blend_of_or_is_a_mixture():
    """F = s^2 log(e^{f_1 / s^2} + e^{f_2 / s^2}); its gradient is the mixture's score times s^2."""
    f = lambda y, level, labels, dtype: -((y.flatten(1)[:, 0] - labels) ** 2)  # noqa: E731
    blend = blend_of(parse_compose("1|4", 5), torch.zeros(3, dtype=torch.int64), torch.rand(3))
    y = torch.tensor([0.5, 2.5, 4.2]).reshape(3, 1, 1, 1).double().requires_grad_(True)
    level = Rung(*torch.full((len(Rung._fields), 3), 7.0).double())
    level = level._replace(s=torch.full((3,), 0.3**0.5).double())
    value = blend.energy(f, y, level, torch.float64)
    (grad,) = torch.autograd.grad(value.sum(), y)
    parts = torch.stack([-((y.flatten() - c) ** 2) / 0.3 for c in (1, 4)])
    torch.testing.assert_close(value, 0.3 * parts.exp().sum(0).log())
    share = parts.softmax(0)
    expected = -2 * (share[0] * (y.flatten() - 1) + share[1] * (y.flatten() - 4))
    torch.testing.assert_close(grad.flatten(), expected)
    assert blend.evaluations == 2 and blend.weights == (1.0,)


def test_known_pixels_come_back_bit_for_bit():
    model = genmodels.build(DIGITS, *SMALL).eval()
    levels = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    mask = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    known = from_uint8(levels)
    x = model.sample(range(7), 3, known=known, mask=mask)
    expected = known[torch.arange(7) % 3]
    whole = mask.expand(7, 1, 8, 8)
    assert torch.equal(x[whole], expected[whole])
    assert torch.equal(to_uint8(x)[whole], levels[torch.arange(7) % 3][whole])
    free = torch.isclose(x[~whole], expected[~whole])
    assert free.double().mean() < 0.05  # clipping can meet a known -1 or 1
    alone = model.sample([5], 3, known=known, mask=mask)
    torch.testing.assert_close(alone[0], x[5])
    other = model.sample(range(7), 3, known=known + (~mask) * 0.5, mask=mask)
    assert torch.equal(other, x)  # what is not known is not looked at
    unlabelled = model.sample(range(7), known=known, mask=mask)
    assert torch.equal(unlabelled, model.sample(range(7), -1, known=known, mask=mask))
    with pytest.raises(ValueError, match="inpaint=, mask=: give both"):
        model.sample([0], 3, known=known)


@pytest.mark.gpu
def test_a_gpu_makes_the_same_images(digits):
    cpu = to_uint8(digits.sample(range(8), 3)).int()
    with generation.tf32(False):
        gpu = to_uint8(copy.deepcopy(digits).cuda().sample(range(8), 3)).cpu().int()
    assert (cpu - gpu).abs().max() <= 1


# ------------------------------------------------------------------------------------------------
# Gaussians: sampled, guided, composed and completed laws, densities, in closed form


TOY = str(ROOT / "configs" / "cdrl_toy.yaml")
# Chains that mix; gains of the energy that are not 1 and differ between the levels.
MIXES = (
    "method.levels=6",
    "method.growth=constant",
    "method.step_size=2e-3",
    "method.units=noise",
    "method.units_limit=0.5",
)


def toy(*words):
    return genmodels.build(
        TOY, "network.width=16", "method.initializer=none", *MIXES, *words
    ).eval()


class Gaussians(nn.Module):
    """gain f(y, level, label) = s^2 log p: data N(m_c, S_c), the last one without label.

    y = scale x_{t-1}, x_{t-1} = cos x_0 + sin e: its mean is scale cos m, its covariance
    scale^2 (cos^2 S + sin^2 I). The level is recognised by its code.
    """

    def __init__(self, schedule, means, covariances):
        super().__init__()
        self.level = schedule.exact
        self.means, self.covariances, self.known = means.double(), covariances.double(), {}

    def moments(self, t, label=-1):
        """Return mean (D,) and covariance (D, D) of y."""
        level = self.level
        scale, cos, sin = (float(v[t]) for v in (level.scale, level.cos_clean, level.sin_clean))
        own = self.covariances[label]
        return scale * cos * self.means[label], scale**2 * (
            cos**2 * own + sin**2 * torch.eye(len(own))
        )

    def log_prob(self, y, t, label):
        if (t, label) not in self.known:
            mean, covariance = self.moments(t, label)
            constant = -0.5 * torch.logdet(2 * math.pi * covariance)
            self.known[t, label] = mean, torch.linalg.inv(covariance), constant
        mean, precision, constant = self.known[t, label]
        d = y.flatten(1).double() - mean
        return constant - 0.5 * ((d @ precision) * d).sum(1)

    def forward(self, y, noise, labels=None, *, dtype=torch.float32):
        t = 1 + int((self.level.noise_clean[1:] - noise[0].double()).abs().argmin())
        labels = torch.full((len(y),), -1) if labels is None else labels
        f = torch.zeros(len(y), dtype=torch.float64)
        for label in labels.unique():
            own = labels == label
            f[own] = self.log_prob(y[own], t, int(label))
        return (f * float(self.level.s[t] ** 2 / self.level.gain[t])).to(dtype)


N = 2000


def check_law(rows, mean, covariance):
    """Mean and covariance within five standard errors."""
    rows, n = rows.double(), len(rows)
    spread = covariance.diagonal()
    assert ((rows.mean(0) - mean).abs() < 5 * (spread / n).sqrt()).all()
    error = ((spread[:, None] * spread + covariance**2) / n).sqrt()
    assert ((rows.T.cov() - covariance).abs() < 5 * error).all()


def propagate(model, precisions):
    """Return mean and covariance of y at the first pair after the exact sampler.

    precisions: t -> (P, P m) of the log density at that level, so that p(y | x_t) has precision
    P + r / sigma^2 and the mean is linear in x_t.
    """
    level, size = model.schedule.exact, math.prod(model.shape)
    mean, covariance = torch.zeros(size).double(), torch.eye(size).double()
    for t in range(model.schedule.rungs, 0, -1):
        r = 0.0 if t == model.schedule.rungs else 1.0
        pull = r / float(level.sigma[t]) ** 2
        precision, shift = precisions(t)
        inverse = torch.linalg.inv(precision + pull * torch.eye(size))
        mean = inverse @ (shift + pull * mean)
        covariance = inverse + pull**2 * inverse @ covariance @ inverse.T
        if t > 1:
            scale = float(level.scale[t])
            mean, covariance = mean / scale, covariance / scale**2
    return mean, covariance


def natural(net, t, label):
    mean, covariance = net.moments(t, label)
    precision = torch.linalg.inv(covariance)
    return precision, precision @ mean


@pytest.fixture(scope="module")
def gaussian():
    """Two-pixel images, correlated; classes 0..7 of which three have laws of their own."""
    model = toy("data.labels=true", "method.steps=32", "method.mala=true", "method.tweedie_scale=0")
    means = torch.zeros(9, 2)
    means[0], means[1], means[2] = (torch.tensor(m) for m in ((0.3, 0.0), (-0.2, 0.2), (0, 0.1)))
    covariances = 0.06 * torch.eye(2).repeat(9, 1, 1)
    covariances[0] = torch.tensor([[0.03, 0.01], [0.01, 0.02]])
    covariances[1] = torch.tensor([[0.02, -0.01], [-0.01, 0.05]])
    covariances[-1] = torch.tensor([[0.08, 0.03], [0.03, 0.06]])
    model.net = Gaussians(model.schedule, means, covariances)
    assert (model.schedule.exact.gain[1:] <= 0.5).all()  # so that a gain forgotten is seen
    return model


def sample_rows(model, **options):
    """Return samples of y, (N, 2): before the last denoising and clipping."""
    found = []
    original = model.draw

    def spy(*args, **kwargs):
        found.append(original(*args, **kwargs))
        return found[-1]

    model.draw = spy
    try:
        model.sample(range(N), **options)
    finally:
        del model.draw
    return found[0][0].flatten(1)


def test_samples_have_the_datas_law(gaussian):
    """With chains that reach their law the sampler is exact: p(x_{T-1}), then every posterior."""
    rows = sample_rows(gaussian, labels=-1)
    mean, covariance = propagate(gaussian, lambda t: natural(gaussian.net, t, -1))
    torch.testing.assert_close((mean, covariance), gaussian.net.moments(1, -1), atol=5e-3, rtol=0)
    check_law(rows, mean, covariance)


def test_guided_samples(gaussian):
    """Precision (1 + w) P_c - w P at each level, and linear terms alike."""
    w = 0.6

    def precisions(t):
        own, none = natural(gaussian.net, t, 0), natural(gaussian.net, t, -1)
        return tuple((1 + w) * a - w * b for a, b in zip(own, none))

    rows = sample_rows(gaussian, labels=0, guidance=w)
    mean, covariance = propagate(gaussian, precisions)
    check_law(rows, mean, covariance)
    plain = gaussian.net.moments(1, 0)
    assert covariance[0, 0] < 0.8 * plain[1][0, 0]  # narrower than the class


def test_composed_samples(gaussian):
    """0 AND 1 and NOT 2: P + 1.2 (P_0 - P) + 0.7 (P_1 - P) - 0.3 (P_2 - P)."""
    terms = {0: 1.2, 1: 0.7, 2: -0.3}

    def precisions(t):
        none = natural(gaussian.net, t, -1)
        parts = [natural(gaussian.net, t, c) for c in terms]
        return tuple(
            b + sum(w * (part[i] - b) for w, part in zip(terms.values(), parts))
            for i, b in enumerate(none)
        )

    rows = sample_rows(gaussian, compose="0:1.2,1:0.7,!2:0.3")
    check_law(rows, *propagate(gaussian, precisions))


def test_completed_samples(gaussian):
    """Pixel 1 known: at each level y_0 given y_1 (noised by one e) and x_t is normal.

    The law of (x_t of pixel 0, e) is carried from level to level.
    """
    level, value = gaussian.schedule.exact, 0.45
    known = torch.tensor([0.0, value]).reshape(1, 2, 1, 1)
    mask = torch.tensor([False, True]).reshape(1, 2, 1, 1)
    rows = sample_rows(gaussian, labels=0, known=known, mask=mask)
    mean, covariance = torch.zeros(2).double(), torch.eye(2).double()  # of (x_0, e)
    for t in range(6, 0, -1):
        precision, shift = natural(gaussian.net, t, 0)
        pull = 0.0 if t == 6 else 1 / float(level.sigma[t]) ** 2
        q = float(precision[0, 0]) + pull
        scale, cos, sin = (float(v[t]) for v in (level.scale, level.cos_clean, level.sin_clean))
        # mean of y_0 = (shift_0 - P_01 scale (cos k + sin e) + pull x_0) / q
        constant = (float(shift[0]) - float(precision[0, 1]) * scale * cos * value) / q
        matrix = torch.tensor([[pull / q, -float(precision[0, 1]) * scale * sin / q], [0, 1]])
        mean = matrix.double() @ mean + torch.tensor([constant, 0.0]).double()
        covariance = matrix.double() @ covariance @ matrix.double().T
        covariance[0, 0] += 1 / q
        if t > 1:
            divide = torch.tensor([1 / scale, 1.0]).double()
            mean, covariance = mean * divide, covariance * divide[:, None] * divide
    check_law(rows[:, :1], mean[:1], covariance[:1, :1])
    # Holding noised pixels is not exact conditioning: with six levels the mean stops short of the
    # true one given the pixel, but covers more than half of the way from the mean without it.
    data, spread = gaussian.net.means[0], gaussian.net.covariances[0]
    true = data[0] + spread[0, 1] / spread[1, 1] * (value - data[1])
    found = float(rows[:, 0].mean()) / float(level.scale[1])
    assert float(data[0]) + 0.5 * float(true - data[0]) < found < float(true)


def test_energy_and_likelihood_of_a_gaussian(gaussian):
    """log p(x) of the lowest level is known; the two bounds lie on its two sides, close."""
    x = torch.tensor([[0.3, 0.0], [0.1, 0.2], [0.9, -0.6]]).reshape(3, 2, 1, 1).double()
    y, close = float(gaussian.schedule.exact.scale[1]) * x, {"rtol": 1e-5, "atol": 1e-5}
    for label in (0, -1):
        labels = torch.full((3,), label)
        exact = gaussian.net.log_prob(y.float(), 1, label)
        exact = exact + 2 * math.log(float(gaussian.schedule.exact.scale[1]))
        torch.testing.assert_close(-gaussian.energy(x, labels).diff(), exact.diff(), **close)
        found = {
            kind: gaussian.log_prob(
                x,
                labels,
                kind=kind,
                seeds=torch.arange(3),
                ais_steps=30,
                ais_refine=5,
                ais_chains=200,
            )
            for kind in gaussian.LIKELIHOODS
        }
        low, high = found["ais_lower"], found["ais_upper"]
        assert low.dtype == torch.float64
        assert (low < exact + 0.05).all() and (high > exact - 0.05).all()
        assert (high - low).abs().max() < 0.3
        for kind, values in found.items():  # beside log Z, which is 0, nothing is left out
            (log_z,) = (z for key, z in gaussian.log_z.items() if key[:2] == (label, kind))
            torch.testing.assert_close(values, exact - log_z, rtol=1e-5, atol=1e-3)
    with pytest.raises(ValueError, match="kind=ode: choose from ais_lower, ais_upper"):
        gaussian.log_prob(x, kind="ode", seeds=torch.arange(3))
    for options, message in (
        ({"ais_steps": 0}, "ais_steps=0: must be >= 1"),
        ({"ais_chains": 1}, "ais_chains=1: must be >= 2"),
    ):
        with pytest.raises(ValueError, match=message):
            gaussian.log_prob(x, kind="ais_lower", seeds=torch.arange(3), **options)


class Raised(nn.Module):
    """f of a network plus a number, which is learnt: the density stays as it is."""

    def __init__(self, net):
        super().__init__()
        self.net, self.number = net, nn.Parameter(torch.zeros(()))

    def forward(self, y, noise, labels=None, *, dtype=torch.float32):
        return self.net(y, noise, labels, dtype=dtype) + self.number.to(dtype)


def test_the_density_follows_the_weights(gaussian):
    """A constant in f leaves log p alone if log Z is made anew after the step."""
    model = toy("data.labels=true", "method.steps=2")
    model.net = Raised(gaussian.net)
    x, labels = torch.tensor([0.3, 0.0]).reshape(1, 2, 1, 1), torch.tensor([0])
    options = {"kind": "ais_upper", "seeds": [0], "ais_steps": 3, "ais_chains": 16}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before, energy = model.log_prob(x, labels, **options), model.energy(x, labels)
    model.net.number.grad = -torch.ones(())
    optimizer.step()
    assert float((energy - model.energy(x, labels)).detach()) > 4  # nats
    torch.testing.assert_close(model.log_prob(x, labels, **options), before, rtol=0, atol=1e-2)


def test_ood_scores_of_a_gaussian(gaussian):
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]]).reshape(3, 2, 1, 1)
    scores = gaussian.ood_scores(x)
    s2 = float(gaussian.schedule.exact.s[1]) ** 2
    y = float(gaussian.schedule.exact.scale[1]) * x
    exact = s2 * gaussian.net.log_prob(y, 1, -1)
    torch.testing.assert_close(scores["f"], exact.float())
    precision, shift = natural(gaussian.net, 1, -1)
    grad = s2 * (shift - y.flatten(1).double() @ precision)
    torch.testing.assert_close(scores["grad_norm"], -grad.norm(dim=1).float())
    e, total = philox_normal((2, 1, 1), 0, torch.zeros(3).long(), stream=int(Stream.NOISE)), 0.0
    for t in range(1, 7):
        at = {k: float(v[t]) for k, v in gaussian.schedule.exact._asdict().items()}
        y = at["scale"] * (at["cos_clean"] * x + at["sin_clean"] * e)
        total = total + at["s"] ** 2 * gaussian.net.log_prob(y, t, -1) / 6
    torch.testing.assert_close(scores["f_levels"], total.float())
    for name in ("f", "f_levels", "grad_norm"):
        assert scores[name].dtype == torch.float32 and scores[name][0] > scores[name][1:].max()
    for name, values in gaussian.ood_scores(x[1:]).items():  # not a matter of the batch
        torch.testing.assert_close(values, scores[name][1:])
