import pytest
import torch

from genmodels.methods.gedi import GEDI
from tests.helpers.gedi_models import batch_of, build, points


@pytest.fixture
def x():
    return points()


def test_chains_freeze_the_parameters_and_leave_the_graph(x, monkeypatch):
    model, seen = build(), []
    original = GEDI.energy

    def spy(self, y, labels=None):
        seen.append(any(p.requires_grad for p in self.parameters()))
        return original(self, y, labels)

    monkeypatch.setattr(GEDI, "energy", spy)
    fake = model._fakes(torch.arange(32))
    assert seen == [False, False] and not fake.requires_grad
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.replay.entries[model.replay.slots(32, 0)], fake)


@pytest.mark.parametrize("step, scale, variance", [(0.02, 0.2, 1.0101), (0.05, 0.1, 0.1026)])
def test_stationary_variance(monkeypatch, step, scale, variance):
    """On a standard normal x' = (1 - a) x + s z has s^2 / (1 - (1 - a)^2); s^2 / 2a is its T."""
    monkeypatch.setattr(GEDI, "energy", lambda self, y, labels: 0.5 * y.square().flatten(1).sum(1))
    model = build(f"method.step={step}", f"method.noise_scale={scale}")
    start = torch.zeros(4000, 2, 1, 1)
    end = model._chain(start, 150, torch.arange(4000))
    assert float(end.var()) == pytest.approx(variance, rel=5 * (2 / 8000) ** 0.5)


def test_clamp_and_grad_clip_reach_the_chains(monkeypatch):
    """A steep energy: free it leaves the box at once, clamped it stays, clipped it moves by a."""
    monkeypatch.setattr(GEDI, "energy", lambda self, y, labels: -100 * y.flatten(1).sum(1))
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
    moves = [(b - a).flatten(1) for a, b in zip(states, states[1:])]
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


@pytest.mark.parametrize(
    "options, words",
    [
        ({"start": "warm"}, "start=warm: choose from fresh, buffer"),
        ({"steps": -1}, "steps=-1"),
        ({"labels": 2}, r"labels=\[2\]: must be in 0..1"),
        ({"labels": [0, 1]}, "give 1 or 3"),
        ({"start": "buffer"}, "only a run or its .ckpt holds a buffer"),
    ],
)
def test_sample_errors(options, words):
    with pytest.raises(ValueError, match=words):
        build().eval().sample([0, 1, 2], **options)
