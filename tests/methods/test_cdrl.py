"""The training of CDRL: gradients of the two losses, pairs, optimizers."""

import pytest
import torch
from torch import nn

import genmodels
from genmodels.methods.base import GenerativeModule
from tests.helpers.paths import ROOT

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
    together.log = lambda *args: None
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
    hidden = model.train()._labels(labels, n) == -1
    assert abs(float(hidden.double().mean()) - 0.2) < 5 * (0.2 * 0.8 / 4000) ** 0.5
    assert torch.equal(model.eval()._labels(labels, n), labels)


def test_each_step_is_followed_by_a_power_iteration(monkeypatch):
    words = ("data.name=digits", "network.channels=8", "network.multipliers=1", "network.blocks=1")
    model = genmodels.build(str(ROOT / "configs" / "drl_cifar10.yaml"), *words)
    layer = model.net.stem
    before = layer.u.clone()

    def step(self):
        layer.weight.data = torch.randn_like(layer.weight)

    monkeypatch.setattr(GenerativeModule, "optimizer_step", step)
    model.optimizer_step()
    rows = layer.weight.detach().flatten(1)
    expected = nn.functional.normalize(rows @ (rows.T @ before), dim=0)
    torch.testing.assert_close(layer.u, expected)
    assert not torch.allclose(before, expected)


def test_initializer_learns_the_chains_displacement():
    """d L_g / d g = -2 (y_K - y_0): zero where the chain does not move, whatever the noise n."""
    model = genmodels.build(DIGITS, *SMALL, "data.labels=false", "method.step_size=1e-12")
    model.net = Quadratic((1, 8, 8))
    with torch.no_grad():
        model.net.b.zero_()  # flat energy, hardly any noise: the chain stays
    batch = {"image": torch.rand(4, 1, 8, 8), "label": torch.full((4,), -1), "n": torch.arange(4)}
    _, logs = model.loss(batch)
    assert float(logs["loss_initializer"]) < 1e-6
