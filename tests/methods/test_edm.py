import math

import pytest
import torch
from torch import nn

import genmodels
from genmodels.images import to_uint8
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
    for coarse, fine in zip(errors, errors[1:]):
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
