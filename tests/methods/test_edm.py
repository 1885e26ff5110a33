"""The method EDM: loss, samples, guidance, and its options."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import genmodels
import sample
from genmodels import checkpoint, seeding
from genmodels.config import to_plain
from genmodels.images import to_uint8
from genmodels.methods.edm import SAMPLING, guided_steps
from genmodels.sampling.ode import Churn, sample_euler, sample_heun
from genmodels.sampling.schedules import karras_sigmas
from tests.helpers.gaussian import Gaussian
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY

DIGITS = str(ROOT / "configs" / "edm_digits.yaml")


@pytest.fixture
def model():
    return genmodels.build(DIGITS, *TINY).eval()


@pytest.fixture(scope="module")
def conditional():
    """A conditional model whose last layer is not zero, so that labels and noise matter."""
    model = genmodels.build(DIGITS, *TINY, "data.labels=true", "method.label_dropout=0.1").eval()
    torch.manual_seed(0)
    nn.init.normal_(model.net.net.unet.conv_out.weight, std=0.05)
    nn.init.normal_(model.net.net.unet.class_embedding.weight)
    return model


def gaussian_batch(count, c):
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * c
    return {"image": x, "label": torch.full((count,), -1), "n": torch.arange(count)}


def expected_loss(c, sigma_data=0.75, p_mean=-1.2, p_std=1.2):
    """E over ln s ~ N(p_mean, p_std^2) of w(s) c^2 s^2 / (c^2 + s^2), by quadrature."""
    z = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    s = (p_mean + p_std * z).exp()
    loss = (s**2 + sigma_data**2) / (s * sigma_data) ** 2 * c**2 * s**2 / (c**2 + s**2)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(loss * density, z))


def test_a_fresh_network_is_the_exact_denoiser_of_white_data(model):
    """F = 0 makes D = c_skip x, right for N(0, sigma_data^2); its loss is 1 for each element."""
    x = torch.randn(5, 1, 8, 8)
    sigma = torch.tensor([0.01, 0.1, 1.0, 10.0, 80.0])
    torch.testing.assert_close(model.denoise(x, sigma), Gaussian(0.75)(x, sigma))
    with torch.no_grad():
        _, logs = model.loss(gaussian_batch(4000, 0.75))
    # One element's loss has variance 2 at most: 4000 x 64 of them give a sd below 0.003.
    assert abs(float(logs["loss"]) - 1) < 0.015


@pytest.mark.parametrize("c", [0.3, 0.75, 2.0])
def test_loss_of_the_exact_denoiser_of_gaussian_data(model, c):
    model.net = Gaussian(c)
    loss, logs = model.loss(gaussian_batch(8000, c))
    expected = expected_loss(c)
    # The spread over sigma dominates: 5 sd of the mean, estimated from the same quadrature.
    assert abs(float(logs["loss"]) / expected - 1) < 0.04
    torch.testing.assert_close(float(loss), 64 * float(logs["loss"]), rtol=1e-5, atol=0)


def test_training_finds_the_exact_denoiser(model):
    """White data narrower than sigma_data: a few steps move F from 0 to the closed form."""
    c = 0.25
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(150):
        batch = gaussian_batch(64, c)
        batch["image"] = torch.randn(64, 1, 8, 8, generator=generator) * c
        batch["n"] += 64 * step
        optimizer.zero_grad()
        model.loss(batch)[0].backward()
        optimizer.step()
    x = c * torch.randn(500, 1, 8, 8, generator=generator)
    for sigma in (0.1, 0.3, 1.0):
        noisy = x + sigma * torch.randn(x.shape, generator=generator)
        exact = Gaussian(c)(noisy, torch.tensor(sigma))
        with torch.no_grad():
            error = (model.denoise(noisy, sigma) - exact).square().mean()
        untrained = (Gaussian(0.75)(noisy, torch.tensor(sigma)) - exact).square().mean()
        assert error < 0.1 * untrained, sigma


def test_score_is_the_gradient_of_the_log_density(model):
    model.net = Gaussian(0.6)
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 5.0])
    expected = -x / (0.36 + sigma.reshape(-1, 1, 1, 1) ** 2)
    torch.testing.assert_close(model.score(x, sigma), expected, rtol=1e-4, atol=1e-4)


def test_karras_sigmas():
    published = [80, 57.6, 40.8, 28.4, 19.4, 12.9, 8.40, 5.32, 3.26, 1.92, 1.09, 0.585, 0.296,
                 0.140, 0.060, 0.023, 0.0075, 0.002, 0]  # fmt: skip
    sigmas = karras_sigmas(18)
    torch.testing.assert_close(sigmas, torch.tensor(published).double(), rtol=0.02, atol=0)
    assert sigmas.dtype == torch.float64
    assert karras_sigmas(1).tolist() == [80, 0]


def test_karras_sigmas_agree_with_diffusers():
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, rho=5.0)
    scheduler.set_timesteps(11)
    ours = karras_sigmas(11, 0.01, 50.0, 5.0).float()
    torch.testing.assert_close(ours, scheduler.sigmas.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ((0,), "steps=0"),
        ((5, 1, 1), "sigma_min=1"),
        ((5, 0, 1), "sigma_min=0"),
        ((5, 0.1, 1, 0), "rho=0"),
    ],
)
def test_schedule_refuses(arguments, key):
    with pytest.raises(ValueError, match=key):
        karras_sigmas(*arguments)


@pytest.mark.parametrize(("sampler", "order"), [(sample_euler, 1), (sample_heun, 2)])
def test_order_of_convergence(sampler, order):
    """On N(0, c^2) the ODE from s0 to s1 has the solution x sqrt((c^2 + s1^2) / (c^2 + s0^2))."""
    c, high, low = 0.5, 5.0, 0.1
    exact = math.sqrt((c**2 + low**2) / (c**2 + high**2))
    errors = []
    for steps in (64, 128, 256):
        sigmas = karras_sigmas(steps + 1, low, high)[:-1]  # stop at low: the solution is smooth
        x = sampler(Gaussian(c), torch.ones(1, 1, 1, 1).double(), sigmas)
        errors.append(abs(float(x) - exact))
    for coarse, fine in itertools.pairwise(errors):
        assert abs(math.log2(coarse / fine) - order) < 0.1


@pytest.mark.parametrize(("churn", "tolerance"), [(0.0, 0.01), (20.0, 0.02)])
def test_samples_of_gaussian_data_have_its_law(model, churn, tolerance):
    model.net = Gaussian(0.4)
    x = model.sample(range(500), steps=60, churn=churn)
    # 32,000 pixels: the standard deviation is known to 0.4 %.
    assert abs(float(x.std()) / 0.4 - 1) < tolerance + 0.012
    assert abs(float(x.mean())) < 5 * 0.4 / math.sqrt(x.numel())


def test_deterministic_sample_is_the_scaled_latent(model):
    """The generators' float32 latents, scaled along the exact solution of the ODE."""
    model.net = Gaussian(0.4)
    x = model.sample([7], steps=200)
    latent = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(7)) * 80
    exact = latent * 0.4 / math.sqrt(0.16 + 80**2)
    torch.testing.assert_close(x[0], exact, rtol=0.01, atol=1e-3)


def test_churn_only_between_its_bounds():
    seen = []

    def denoise(x, sigma):
        seen.append(float(sigma))
        return torch.zeros_like(x)

    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0]).double()
    noise = lambda shape, dtype: torch.zeros((1, *shape), dtype=dtype)  # noqa: E731
    x = torch.ones(1, 1, 1, 1).double()
    sample_euler(denoise, x, sigmas, churn=Churn(0.4, 0.9, 2.5), randn=noise)
    assert seen == pytest.approx([4.0, 2.2, 1.1, 0.5])  # gamma = 0.4 / 4
    seen.clear()
    sample_euler(denoise, x, sigmas, churn=Churn(100.0), randn=noise)
    assert seen[0] == pytest.approx(4 * math.sqrt(2))  # gamma is at most sqrt(2) - 1


@pytest.mark.parametrize("churn", [0.0, 10.0])
def test_an_image_depends_on_its_seed_alone(conditional, churn):
    options = {"steps": 5, "churn": churn}
    together = to_uint8(conditional.sample(range(12), **options))
    assert len(together.flatten(1).unique(dim=0)) == 12
    shuffled = to_uint8(conditional.sample([11, 3, 0, 7], **options))
    assert torch.equal(shuffled, together[[11, 3, 0, 7]])
    for k in range(12):
        assert torch.equal(to_uint8(conditional.sample([k], **options))[0], together[k])


def test_given_labels_leave_the_noise_alone(conditional):
    """The random class is drawn even if labels are given: churn noise after it stays the same."""
    generator = torch.Generator().manual_seed(5)
    torch.randn((1, 8, 8), generator=generator)
    label = int(torch.randint(10, (), generator=generator))
    random = conditional.sample([5], steps=4, churn=10.0)
    given = conditional.sample([5], label, steps=4, churn=10.0)
    assert torch.equal(random, given)
    assert not torch.equal(given, conditional.sample([5], (label + 1) % 10, steps=4, churn=10.0))


def test_evaluations_are_counted_and_steps_reported(conditional):
    steps = []
    conditional.sample([0], steps=18, callback=lambda i, x: steps.append((i, x.dtype)))
    assert conditional.nfe == 35
    assert steps == [(i, torch.float64) for i in range(18)]
    conditional.sample([0], steps=18, sampler="euler")
    assert conditional.nfe == 18
    conditional.sample([0], 3, steps=18, guidance=2.0)
    assert conditional.nfe == 70


def test_guidance(conditional):
    """w = 0 is the model without labels; each step is linear in w for one Euler step."""
    none = conditional.sample([1, 2], -1, steps=1)
    given = conditional.sample([1, 2], 3, steps=1)
    at = lambda w: conditional.sample([1, 2], 3, steps=1, guidance=w)  # noqa: E731
    torch.testing.assert_close(at(0.0), none, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(at(3.0), none + 3 * (given - none), rtol=1e-4, atol=1e-5)


def test_label_dropout_hides_the_stated_share(conditional):
    seen = []
    original = conditional.net.forward

    def spy(x, sigma, labels=None, augment=None):
        seen.append(labels)
        return original(x, sigma, labels)

    conditional.net.forward = spy
    batch = gaussian_batch(3000, 0.7) | {"label": torch.arange(3000) % 10}
    try:
        with torch.no_grad():
            conditional.train().loss(batch)
            conditional.eval().loss(batch)
    finally:
        conditional.net.forward = original
    hidden = seen[0] == -1
    assert 220 < hidden.sum() < 380  # 300 expected, sd 16
    assert torch.equal(seen[0][~hidden], batch["label"][~hidden])
    assert torch.equal(seen[1], batch["label"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.sample([0], 10), r"labels=\[10\]: must be in 0..9"),
        (lambda m: m.sample([0], [1, 2]), r"labels=\[1, 2\]: give 1 or 1"),
        (lambda m: m.sample([0], sampler="dpm"), "sampler=dpm: choose from"),
        (lambda m: m.sample([0], steps=0), "steps=0: must be >= 1"),
        (lambda m: m.sample([0], churn=-1.0), "churn=-1.0: must be >= 0"),
    ],
)
def test_sample_refuses(conditional, call, message):
    with pytest.raises(ValueError, match=message):
        call(conditional)


def test_unconditional_model_refuses_labels_and_guidance(model):
    with pytest.raises(ValueError, match="labels=3: this model is unconditional"):
        model.sample([0], 3)
    with pytest.raises(ValueError, match="guidance=2.0: this model is unconditional"):
        model.sample([0], guidance=2.0)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1), (3, 16)])
def test_unet_takes_any_size(size):
    from genmodels.networks.unet import UNet, UNetConfig

    cfg = UNetConfig(channels=[8, 8, 8], layers=1, attention=[1], head_dim=8, norm_groups=4)
    net = UNet(cfg, (3, *size), classes=4)
    out = net(torch.randn(2, 3, *size), torch.zeros(2), torch.tensor([-1, 3]))
    assert out.shape == (2, 3, *size)
    with pytest.raises(ValueError, match="use edm_unet"):
        net(torch.randn(2, 3, *size), torch.zeros(2), None, torch.zeros(2, 9))


def test_two_ranks_gradients_average_to_one_ranks(model):
    """The stream's slices give each rank its part of the same batch, noise included."""
    batch = gaussian_batch(16, 0.7)
    model.loss(batch)[0].backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for part in (slice(0, 8), slice(8, 16)):
        (model.loss({key: value[part] for key, value in batch.items()})[0] / 2).backward()
    largest = max(grad.abs().max() for grad in whole.values())
    for name, parameter in model.named_parameters():
        if name in whole:
            assert (parameter.grad - whole[name]).abs().max() < 1e-5 * largest, name


# ------------------------------------------------------------------------------------------------
# Options: preconditionings, augmentation, uncertainty, guides, sampler settings


NETWORK = {
    "name": "edm_unet",
    "channels": 16,
    "multipliers": [1],
    "blocks": 1,
    "attention": [],
    "dropout": 0.0,
}


def make(*, labels=False, network=None, **method):
    plain = {
        "data": {"name": "digits", "labels": labels},
        "network": {**NETWORK, **(network or {})},
    }
    return genmodels.build({**plain, "method": {"name": "edm", **method}})


def filled(seed=0, **settings):
    """A model whose network answers something at random."""
    model = make(**settings).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(count=6, first=0):
    image = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    n = torch.arange(first, first + count)
    return {"image": image, "label": n % 10, "n": n}


@pytest.mark.parametrize("precond", ["edm", "vp", "ve", "iddpm"])
def test_every_preconditioning_trains_and_samples(precond):
    model = make(precond=precond, sigma_data=0.75).train()
    loss, logs = model.loss(batch(512))
    loss.backward()
    assert model.net.net.output.weight.grad.abs().max() > 0
    # F = 0: one per element; the images' variance is not sigma_data^2, hence the room.
    assert 0.5 < logs["loss"] < 1.6
    x = model.eval().sample([0, 1], steps=3)
    assert x.shape == (2, 1, 8, 8) and torch.isfinite(x).all()


def test_sampling_range_is_cut_to_what_the_network_knows():
    seen = []
    model = make(precond="ve")
    model.net.net.forward = lambda x, noise, *_: seen.append(float(noise[0])) or 0 * x
    model.sample([0], steps=4)
    assert math.exp(max(seen)) * 2 == pytest.approx(80, rel=1e-5)
    assert math.exp(min(seen)) * 2 == pytest.approx(0.02, rel=1e-5)  # not 0.002
    model = make(precond="iddpm")
    seen.clear()
    model.net.forward = lambda x, sigma, labels: seen.append(sigma) or 0 * x
    model.sample([0], steps=4, churn=3.0)
    levels = set(model.net.levels.double().tolist())
    assert len(seen) == 7 and all(float(sigma) in levels for sigma in seen)


# ------------------------------------------------------------------------------------------------
# Guidance


def test_autoguidance_extrapolates_from_the_guide():
    """At each evaluation D = G + w (D - G); checked with denoisers that are known."""
    model, guide = make(), make()
    model.net.forward = lambda x, sigma, labels: torch.full_like(x, 0.5)
    guide.net.forward = lambda x, sigma, labels: torch.full_like(x, 0.3)
    x = model.sample([0, 1], steps=6, guide=guide, guidance=2.5)
    torch.testing.assert_close(x, torch.full_like(x, 0.3 + 2.5 * 0.2))
    assert model.nfe == 2 * 11
    x = model.sample([0, 1], steps=6)
    torch.testing.assert_close(x, torch.full_like(x, 0.5))
    assert model.nfe == 11


def test_guided_by_itself_nothing_changes():
    model = filled()
    plain, guided = (
        model.sample([3], steps=3),
        model.sample([3], steps=3, guide=model, guidance=3.0),
    )
    torch.testing.assert_close(guided, plain, atol=1e-4, rtol=1e-4)


def test_an_unconditional_guide_of_a_conditional_model_gets_no_labels():
    model, guide = filled(labels=True), make()
    seen = []
    guide.net.forward = lambda x, sigma, labels: seen.append(labels) or x
    model.sample([0], 3, steps=2, guide=guide, guidance=1.5)
    assert seen == [None] * 3


def test_classifier_free_guidance_is_the_model_without_label():
    model, guide = (filled(labels=True, label_dropout=0.1) for _ in range(2))
    original = guide.net.forward
    guide.net.forward = lambda x, sigma, labels: original(x, sigma, torch.full_like(labels, -1))
    one = model.sample([0, 5], 3, steps=3, guidance=2.0)
    other = model.sample([0, 5], 3, steps=3, guidance=2.0, guide=guide)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "low, high, steps",
    [(0.28, 2.90, range(15, 22)), (0.19, 1.61, range(17, 23)), (0.60, 5.00, range(13, 20))],
)
def test_published_intervals_of_guidance(low, high, steps):
    """Of EDM2-S and XXL by FID: rounded levels of the grid of 32 steps; and by FD in DINOv2."""
    sigmas = karras_sigmas(32, 0.002, 80.0, 7.0, torch.device("cpu"))[:-1]
    found = [i for i, step in enumerate(guided_steps(sigmas, low, high)) if step]
    assert found == list(steps)
    ends = float(sigmas[found[0]]), float(sigmas[found[-1] + 1])
    assert ends == pytest.approx((high, low), abs=0.0051)  # as printed


def test_all_of_the_interval_is_plain_guidance_and_nothing_of_it_is_none():
    model, guide = filled(labels=True, label_dropout=0.1), filled(1, labels=True)
    for options in ({}, {"guide": guide}, {"churn": 5.0}, {"sampler": "dpmpp_2m"}):
        at = lambda o=options, **more: model.sample([0, 5], 3, steps=4, **o, **more)  # noqa: E731
        guided = at(guidance=2.0)
        assert torch.equal(at(guidance=2.0, guidance_min=0.0, guidance_max=math.inf), guided)
        none = at(guidance=2.0, guidance_min=1.0, guidance_max=1.0)
        plain = model.sample(
            [0, 5], 3, steps=4, **{k: v for k, v in options.items() if k != "guide"}
        )
        assert torch.equal(none, plain)
        assert not torch.equal(at(guidance=2.0, guidance_max=2.0), guided)
        assert not torch.equal(at(guidance=2.0, guidance_max=2.0), plain)


def test_a_step_is_guided_as_a_whole():
    """Of four steps the second, corrector included: 7 evaluations and 2 of the guide."""
    model, seen = filled(), []
    guide = make()
    guide.net.forward = lambda x, sigma, labels: seen.append(float(sigma)) or x
    sigmas = karras_sigmas(4, 0.002, 80.0, 7.0, torch.device("cpu")).tolist()
    options = {"guide": guide, "guidance": 2.0}
    model.sample([0], steps=4, guidance_min=sigmas[2], guidance_max=sigmas[1], **options)
    assert seen == pytest.approx(sigmas[1:3]) and model.nfe == 9
    seen.clear()
    near = {"guidance_min": 1.1 * sigmas[2], "guidance_max": 0.95 * sigmas[1]}
    model.sample([0], steps=4, **near, **options)
    assert seen == pytest.approx(sigmas[1:3])


def test_an_interval_without_guidance_is_refused():
    with pytest.raises(ValueError, match="^guidance_max=2.0: nothing is guided"):
        filled(labels=True, label_dropout=0.1).sample([0], 3, steps=1, guidance_max=2.0)


def test_a_model_that_saw_every_label_is_no_guide_of_itself():
    """Nor does it take an image without a label; one that some were hidden from does."""
    model, x = make(labels=True), torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="^guidance=2.0: no label was hidden in training"):
        model.sample([0], 3, steps=1, guidance=2.0)
    with pytest.raises(ValueError, match="^method.guidance=2.0: needs a conditional model"):
        make(labels=True, guidance=2.0)  # before a picture of the training needs it
    without = "^labels=: this model was trained with a class for every image"
    for call in (
        lambda m: m.sample([0, 1], [3, -1], steps=1),
        lambda m: m.denoise(x, 1.0),
        lambda m: m.score(x, 1.0, torch.tensor([3, -1])),
        lambda m: m.log_prob(x, seeds=[0, 1], steps=1),
    ):
        with pytest.raises(ValueError, match=without):
            call(model)
        call(make(labels=True, label_dropout=0.1))
    with pytest.raises(ValueError, match=r"^labels=10: must be in 0\.\.9"):
        model.log_prob(x, torch.tensor([0, 10]), seeds=[0, 1], steps=1)


def test_guide_on_the_command_line(tmp_path, capsys):
    for name, seed in (("big", 0), ("small", 1)):
        checkpoint.write_export(filled(seed), tmp_path / name, "card")
    model, guide = (checkpoint.load(tmp_path / name) for name in ("big", "small"))
    words = ["num=3", "steps=3", "format=npz", "device=cpu", f"out={tmp_path / 'out'}"]
    guided = [f"guide={tmp_path / 'small'}", "guidance=2"]
    assert sample.main([str(tmp_path / "big"), *words, *guided]) == 0
    images = np.load(tmp_path / "out" / "images.npz")["images"]
    expected = to_uint8(model.sample([0, 1, 2], steps=3, guide=guide, guidance=2.0))
    assert (images == expected.permute(0, 2, 3, 1).numpy()).all()
    assert sample.main([str(tmp_path / "big"), *words, *guided[:1]]) == 2
    assert "guidance=1.0: leaves the guide unused" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(sampler="rk4"), "^sampler=rk4: choose from euler, heun, dpmpp_2m"),
        (dict(steps=0), "^steps=0: must be >= 1"),
        (dict(sampler="euler", alpha=0.5), "^alpha=0.5: euler takes no second-order step"),
        (dict(alpha=0.0), r"^alpha=0.0: must be in \(0, 1\]"),
        (dict(sigmas="karras"), "^sigmas=karras: choose from edm, vp, ve, iddpm"),
        (dict(sampler="dpmpp_2m", churn=1.0), "^churn=1.0: dpmpp_2m is deterministic"),
        (dict(sampler="dpmpp_2m", schedule="vp"), "^sampler=dpmpp_2m: goes with schedule=linear"),
        (dict(sigma_min=90.0), r"^sigma_min=90.0: must be in \(0, sigma_max=80.0\)"),
        (dict(guidance=2.0), "^guidance=2.0: this model is unconditional; give it a guide"),
        (dict(stepps=4), "^stepps=4: choose from sampler, steps"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        make().sample([0], **options)


def test_a_guide_of_another_shape_is_refused():
    other = genmodels.build(
        {"data": {"name": "digits", "pad": 4}, "network": NETWORK, "method": {"name": "edm"}}
    )
    with pytest.raises(ValueError, match="guide=a model of .*16, 16.* must be of .*8, 8"):
        make().sample([0], guide=other, guidance=2.0)


def test_options_and_config_mean_the_same_and_leave_the_config_alone():
    settings = dict(sampler="euler", steps=3, sigmas="vp", schedule="vp", scaled=True, churn=2.0)
    by_config, by_option = filled(**settings), filled()
    before = to_plain(by_option.cfg)
    torch.testing.assert_close(by_option.sample([4], **settings), by_config.sample([4]))
    assert to_plain(by_option.cfg) == before
    assert set(SAMPLING) < set(by_option.SAMPLE_OPTIONS)


# ------------------------------------------------------------------------------------------------
# Loss


def test_uncertainty_reweights_the_loss_and_logs_the_plain_one():
    model, plain = make(uncertainty=True), make()
    data = batch()
    torch.testing.assert_close(model.loss(data)[0], plain.loss(data)[0])  # u = 0
    with torch.no_grad():
        model.uncertainty.phases.zero_()
        model.uncertainty.frequencies.zero_()
        model.uncertainty.weight.fill_(0.1)  # a constant u
        u = float(model.uncertainty(torch.zeros(1)))
    loss, logs = model.loss(data)
    assert float(loss) == pytest.approx(
        float(plain.loss(data)[0]) * math.exp(-u) + 64 * u, rel=1e-5
    )
    assert logs["loss"] == plain.loss(data)[1]["loss"]
    loss.backward()
    assert model.uncertainty.weight.grad.abs().max() > 0


def test_augmentation_needs_a_network_that_is_told():
    with pytest.raises(ValueError, match="method.augment=0.1: needs network.name=edm_unet"):
        make(augment=0.1, network={"augment": False})


def test_the_loss_of_an_image_depends_on_its_place_in_the_stream_alone():
    """Augmentation, noise and level of image n are the same in any batch."""
    model, data = filled(augment=0.5).train(), batch(4, first=100)
    whole = model.loss(data)[0]
    parts = [
        model.loss({key: value[k : k + 1] for key, value in data.items()})[0] for k in range(4)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-4, atol=0)


def test_validation_is_not_augmented():
    model, plain = filled(augment=1.0), filled()
    assert model.loss(batch())[0] == plain.loss(batch())[0]
    assert model.train().loss(batch())[0] != plain.loss(batch())[0]


@pytest.mark.slow
def test_augmentation_does_not_leak_into_samples():
    """Trained on one lopsided picture, half of the time mirrored and often distorted: asked with
    zeros the model draws the picture itself; asked for a mirrored one, its mirror image."""
    torch.manual_seed(0)
    model = make(augment=0.3, p_mean=0.0, sigma_data=0.7, network={"channels": 32}).train()
    picture = torch.full((1, 1, 8, 8), -1.0)
    picture[..., 1:4, 1:3] = 1.0
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(210):
        n = torch.arange(step * 16, (step + 1) * 16)
        loss, _ = model.loss({"image": picture.expand(16, -1, -1, -1), "label": n, "n": n})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert_shows(picture, model.sample(range(16), steps=8))
    inner, mirrored = model.net.forward, torch.zeros(16, 9)
    mirrored[:, 0] = 1
    model.net.forward = lambda x, sigma, labels: inner(x, sigma, labels, mirrored)
    assert_shows(picture.flip(-1), model.sample(range(16), steps=8))


def assert_shows(picture, samples):
    """Every sample is the picture rather than its mirror image, and most are close to it."""
    distance = (samples - picture).square().mean((1, 2, 3))
    away = (samples - picture.flip(-1)).square().mean((1, 2, 3))
    assert (distance < away).all() and distance.median() < 0.2 < 0.5 < away.median()


# ------------------------------------------------------------------------------------------------
# From the command line and the options down to where they act


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["png", "npz"])
def test_precision_on_the_command_line_reaches_the_network(tmp_path, monkeypatch, precision, form):
    seen = []
    model = filled()
    checkpoint.write_export(model, tmp_path / "model", "card")
    original = type(model.net.net).forward

    def spy(self, *args):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return original(self, *args)

    monkeypatch.setattr(type(model.net.net), "forward", spy)
    words = ["num=2", "steps=2", "device=cpu", f"format={form}", f"out={tmp_path / 'out'}"]
    assert sample.main([str(tmp_path / "model"), *words, f"precision={precision}"]) == 0
    assert len(seen) == 3
    if precision == "bf16":
        assert set(seen) == {(True, torch.bfloat16)}
    assert all(enabled == (precision == "bf16") for enabled, _ in seen)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("form", ["png", "npz"])
def test_noise_on_the_command_line_is_where_the_generators_draw(
    tmp_path, monkeypatch, device, form
):
    made = []

    class Generators(seeding.ImageGenerators):
        def __init__(self, seeds, device="cpu"):
            made.append(str(device))
            super().__init__(seeds, "cpu")  # there may be no other here

    checkpoint.write_export(filled(), tmp_path / "model", "card")
    monkeypatch.setattr(seeding, "ImageGenerators", Generators)
    monkeypatch.setattr(
        "genmodels.commands.sample.check_device", lambda *args: None
    )  # nor is one needed
    words = ["num=2", "steps=1", "device=cpu", f"format={form}", f"out={tmp_path / 'out'}"]
    assert sample.main([str(tmp_path / "model"), *words, f"noise={device}"]) == 0
    assert made == [device]


@pytest.mark.parametrize("way", [{}, {"sampler": "euler"}, {"alpha": 0.5}])
@pytest.mark.parametrize(
    "limits, factor",
    [
        ({}, 1.0),
        ({"churn_noise": 3.0}, 3.0),
        ({"churn_noise": 0.0}, 0.0),
        ({"churn_max": 79.0}, None),
        ({"churn_min": 81.0}, None),
    ],
)
def test_churn_adds_its_noise_within_its_limits(way, limits, factor):
    """Algorithm 2 by hand for D = 0, whose solution is straight: x / sigma stays."""
    model = make()
    model.net.forward = lambda x, sigma, labels: torch.zeros_like(x)
    states = []
    model.sample(
        [5],
        steps=2,
        sigma_min=8.0,
        churn=0.5,
        **limits,
        **way,
        callback=lambda i, x: states.append(x),
    )
    generator = torch.Generator().manual_seed(5)
    latent = torch.randn((1, 8, 8), generator=generator).double()
    fresh = torch.randn((1, 8, 8), generator=generator, dtype=torch.float64)
    x, sigma = 80 * latent, 80.0
    if factor is not None:
        sigma = 80 * 1.25  # gamma = S_churn / steps
        x = x + math.sqrt(100**2 - 80**2) * factor * fresh
    torch.testing.assert_close(states[0][0], x * 8 / sigma)


def test_dpmpp_survives_a_table_of_levels_finer_than_it_has():
    """At 64 steps several grid points snap to one level of iddpm's table."""
    model = make(precond="iddpm")
    x = model.sample([0], steps=64, sampler="dpmpp_2m")
    assert x.isfinite().all()
