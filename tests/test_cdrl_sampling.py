"""What CDRL.sample promises: seeds, known pixels, counts, options, and what it refuses."""

import copy

import pytest
import torch
from conftest import ROOT
from torch import nn

import genmodels
from genmodels import generation
from genmodels.images import from_uint8, to_uint8
from genmodels.methods import cdrl
from genmodels.sampling.composition import blend_of, parse_compose
from genmodels.sampling.recovery import Rung

DIGITS = str(ROOT / "configs" / "cdrl_digits.yaml")
SMALL = ("network.width=16", "method.steps=3", "method.initializer_channels=16")


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
