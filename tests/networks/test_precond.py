"""Preconditionings against their definitions, schedules and solvers against closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from genmodels.networks.precond import PRECONDS, Uncertainty, iddpm_levels
from genmodels.sampling.ode import SAMPLERS, Churn, sample_general
from genmodels.sampling.schedules import SIGMAS, TIME_SCHEDULES, karras_sigmas

KINDS = list(PRECONDS)


class Raw(nn.Module):
    """Answers `value` everywhere and remembers what it was given."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = value

    def forward(self, x, noise, labels=None, augment=None):
        self.x, self.noise, self.given = x, noise, (labels, augment)
        return self.value * torch.ones_like(x)


def levels(kind):
    sigma = torch.tensor([0.03, 0.2, 1.0, 5.0, 60.0])
    return PRECONDS[kind](Raw()).known_sigma(sigma)


# ------------------------------------------------------------------------------------------------
# Denoisers


def test_edm_has_unit_variances_and_the_smallest_output_factor():
    """The three demands of appendix B.6, by the moments of a Gaussian y and noise n."""
    sd, sigma = 0.7, levels("edm").double()
    c_skip, c_out, c_in, c_noise = PRECONDS["edm"](Raw(), sd).coefficients(sigma)
    torch.testing.assert_close(c_in**2 * (sd**2 + sigma**2), torch.ones_like(sigma))

    def target_variance(skip):  # of y - c_skip (y + n)
        return (1 - skip) ** 2 * sd**2 + skip**2 * sigma**2

    torch.testing.assert_close(target_variance(c_skip), c_out**2)
    for change in (-1e-3, 1e-3):
        assert (target_variance(c_skip + change) > target_variance(c_skip)).all()
    torch.testing.assert_close(c_noise, sigma.log() / 4)


@pytest.mark.parametrize("kind", ["vp", "iddpm"])
def test_a_perfect_noise_predictor_denoises(kind):
    """vp and iddpm predict the noise, c_in has unit variance for data of unit variance."""
    sigma = levels(kind)
    clean, noise = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2)
    raw = Raw()
    raw.forward = lambda x, *_: noise
    y = clean + sigma.reshape(-1, 1, 1, 1) * noise
    torch.testing.assert_close(PRECONDS[kind](raw)(y, sigma), clean, atol=1e-4, rtol=1e-4)
    c_in = PRECONDS[kind](Raw()).coefficients(sigma)[2]
    torch.testing.assert_close(c_in**2 * (sigma**2 + 1), torch.ones(5))


def test_ve_predicts_minus_the_noise_and_sees_the_raw_state():
    sigma = levels("ve")
    raw = Raw(1.0)
    x = torch.randn(5, 1, 2, 2)
    y = PRECONDS["ve"](raw)(x, sigma)
    torch.testing.assert_close(y, x + sigma.reshape(-1, 1, 1, 1))
    assert torch.equal(raw.x, x)
    torch.testing.assert_close(raw.noise, (sigma / 2).log())


def test_vp_time_is_the_inverse_of_its_diffusion():
    """t(sigma) against the integral of beta: ln(1 + sigma^2) = int_0^t (0.1 + 19.9 u) du."""
    raw = Raw()
    sigma = levels("vp")
    PRECONDS["vp"](raw)(torch.zeros(5, 1, 2, 2), sigma)
    for t, level in zip((raw.noise / 999).double(), sigma.double()):
        grid = np.linspace(0, float(t), 2001)
        integral = np.trapezoid(0.1 + 19.9 * grid, grid)
        assert math.log1p(float(level) ** 2) == pytest.approx(integral, rel=1e-4)
    net = PRECONDS["vp"](Raw())
    assert net.sigma_min == pytest.approx(math.sqrt(1e-5 * 0.1), rel=1e-3)
    assert net.sigma_max == pytest.approx(math.sqrt(math.exp(10.05) - 1), rel=1e-6)


def test_iddpm_levels_are_the_cosine_schedule():
    """Without the clamp u_j^2 = 1 / abar_j - 1 for abar normalised to 1 at the data's end."""
    u = np.array(iddpm_levels())
    assert len(u) == 1000 and (np.diff(u) < 0).all()
    j = np.arange(1000)
    bar = np.sin(np.pi / 2 * j / 1000 / 1.008) ** 2 / np.sin(np.pi / 2 / 1.008) ** 2
    np.testing.assert_allclose(u[20:], np.sqrt(1 / bar[20:] - 1), rtol=1e-6)
    # The last step of the chain is held at a ratio of 0.001.
    assert u[0] == pytest.approx(math.sqrt((u[1] ** 2 + 1) / 1e-3 - 1))
    raw = Raw()
    net = PRECONDS["iddpm"](raw)
    net(torch.zeros(3, 1, 2, 2), torch.tensor([u[0], u[500] * 1.0001, u[999]]).float())
    assert raw.noise.tolist() == [999, 499, 0]
    snapped = net.known_sigma(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert snapped.dtype == torch.float64 and snapped[1] == 0
    assert abs(snapped[0] - 1) < 2e-3 and min(abs(float(snapped[0]) - u)) < 1e-7


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("flow", "trig")])
def test_loss_of_a_zero_network_is_one_for_data_it_fits(kind):
    """w |D - y|^2 at F = 0: 1 for each element, as F's target has unit variance."""
    net = PRECONDS[kind](Raw(), 0.5)
    generator = torch.Generator().manual_seed(0)
    clean = 0.5 * torch.randn(5, 1, 100, 100, generator=generator)
    sigma = levels(kind)
    noise = torch.randn(clean.shape, generator=generator)
    error = net(clean + sigma.reshape(-1, 1, 1, 1) * noise, sigma) - clean
    loss = net.loss_weight(sigma) * error.square().mean((1, 2, 3))
    torch.testing.assert_close(loss, torch.ones(5), atol=0.06, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_passes_labels_and_augmentation_and_stays_in_float32(kind):
    raw = Raw()
    net = PRECONDS[kind](raw)
    labels, augment = torch.tensor([1, -1]), torch.randn(2, 9)
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    y = net(x, torch.tensor(1.5, dtype=torch.float64), labels, augment)
    assert y.dtype == torch.float32 and raw.x.dtype == raw.noise.dtype == torch.float32
    assert raw.given[0] is labels and raw.given[1] is augment and raw.noise.shape == (2,)


@pytest.mark.parametrize("kind", ["flow", "trig"])
def test_the_velocity_of_a_path_is_a_denoiser(kind):
    """Fed with the velocity of its own pair x, z the network's D is x; its loss is |F - b|^2."""
    t = torch.tensor([0.05, 0.3, 0.5, 0.9, 0.99], dtype=torch.float64)
    beta, gamma, d_beta, d_gamma = {
        "flow": (t, 1 - t, t**0, -(t**0)),
        "trig": (
            (math.pi / 2 * t).sin(),
            (math.pi / 2 * t).cos(),
            math.pi / 2 * (math.pi / 2 * t).cos(),
            -math.pi / 2 * (math.pi / 2 * t).sin(),
        ),
    }[kind]
    clean, noise = torch.randn(5, 1, 2, 2).double(), torch.randn(5, 1, 2, 2).double()
    sigma, raw, error = gamma / beta, Raw(), 0.1

    def over(c):
        return c.reshape(-1, 1, 1, 1)

    raw.forward = lambda x, *_: (over(d_beta) * clean + over(d_gamma) * noise + error).float()
    net = PRECONDS[kind](raw)
    torch.testing.assert_close(net.time(sigma), t)
    torch.testing.assert_close(net.sigma(t), sigma)
    denoised = net(clean + over(sigma) * noise, sigma)
    loss = net.loss_weight(sigma) * (denoised - clean).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, torch.full((5,), error**2).double(), rtol=1e-3, atol=0)
    error = 0.0
    torch.testing.assert_close(
        net(clean + over(sigma) * noise, sigma), clean.float(), atol=1e-4, rtol=1e-4
    )
    c_in = net.coefficients(sigma)[2]
    torch.testing.assert_close(c_in, beta)  # the network sees the state of the path


# ------------------------------------------------------------------------------------------------
# Noise levels of training


@pytest.mark.parametrize(
    "kind, quantile",
    [
        ("edm", lambda q: math.exp(-1.2 + 1.2 * float(torch.special.ndtri(torch.tensor(q))))),
        ("ve", lambda q: 0.02 * 5000**q),
        ("vp", lambda q: math.sqrt(math.expm1(9.95 * q**2 + 0.1 * q))),
        ("iddpm", lambda q: iddpm_levels()[int(1000 * (1 - q))]),
        ("flow", lambda q: q / (1 - q)),  # the q-th largest time is 1 - q
        ("trig", lambda q: math.tan(math.pi / 2 * q)),
    ],
)
def test_quantiles_of_the_training_levels(kind, quantile):
    z = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    net = PRECONDS[kind](Raw())
    sigma = net.training_sigma(z, -1.2, 1.2)
    for q in (0.1, 0.3, 0.5, 0.7, 0.9):  # in ln sigma, five standard errors of the share below
        share = float((sigma <= quantile(q)).float().mean())
        assert share == pytest.approx(q, abs=5 * 0.5 / math.sqrt(len(z)))
    if kind != "edm":
        assert sigma.min() >= net.sigma_min * (1 - 1e-4)
        assert sigma.max() <= net.sigma_max * (1 + 1e-4)
    assert torch.isfinite(net.training_sigma(torch.tensor([-9.0, 9.0]), -1.2, 1.2)).all()


def test_uncertainty_learns_the_loss_of_each_noise_level():
    """The optimum of l e^-u + u is u = ln l; fitted to l(c) = e^(1 + sin 4c)."""
    torch.manual_seed(0)
    net = Uncertainty()
    assert torch.equal(net(torch.linspace(-1, 1, 5)), torch.zeros(5))
    with torch.no_grad():  # unit weights give a u of order one
        spread = []
        for _ in range(300):
            net.weight.normal_()
            spread.append(float(net(torch.zeros(1))))
        net.weight.zero_()
    assert np.std(spread) == pytest.approx(1, abs=0.25)
    c = torch.linspace(-1, 1, 64)
    truth = 1 + (4 * c).sin()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(400):
        u = net(c)
        loss = (truth.exp() * (-u).exp() + u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (net(c) - truth).abs().max() < 0.15  # from 1.8


# ------------------------------------------------------------------------------------------------
# Schedules and solvers


@pytest.mark.parametrize("name", SIGMAS)
def test_sigmas_run_from_the_largest_to_the_smallest_and_end_in_zero(name):
    sigmas = SIGMAS[name](12, 0.01, 70.0, 7.0)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (13,) and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    ends = (float(sigmas[0]), float(sigmas[-2]))
    assert ends == pytest.approx((70.0, 0.01), rel=0.2 if name == "iddpm" else 1e-12)
    with pytest.raises(ValueError, match="steps=0: must be >= 1"):
        SIGMAS[name](0, 0.01, 70.0, 7.0)


def test_sigmas_have_their_laws():
    i = np.arange(12) / 11
    ve = SIGMAS["ve"](12, 0.01, 70.0)[:-1].numpy()
    np.testing.assert_allclose(ve, np.sqrt(70.0**2 * (0.01 / 70.0) ** (2 * i)), rtol=1e-12)
    vp = SIGMAS["vp"](12, 0.01, 70.0)[:-1].numpy()
    t = 1 + i * (1e-3 - 1)  # ln(1 + sigma^2) is a quadratic in t without a constant
    a, b = np.linalg.lstsq(np.stack([t, t**2], 1), np.log1p(vp**2), rcond=None)[0]
    np.testing.assert_allclose(np.log1p(vp**2), a * t + b * t**2, rtol=1e-9)
    iddpm = SIGMAS["iddpm"](12, 0.01, 70.0)[:-1].numpy()
    places = [int(np.abs(np.array(iddpm_levels()) - level).argmin()) for level in iddpm]
    assert np.ptp(np.diff(places)) <= 1
    with pytest.raises(ValueError, match="steps=2000: iddpm has"):
        SIGMAS["iddpm"](2000, 0.01, 70.0)


@pytest.mark.parametrize("name", TIME_SCHEDULES)
def test_schedules_invert_and_have_their_slopes(name):
    schedule = TIME_SCHEDULES[name](0.01, 70.0)
    sigma = torch.tensor([0.01, 0.3, 2.0, 70.0], dtype=torch.float64)
    t = schedule.time(sigma)
    torch.testing.assert_close(schedule.sigma(t), sigma)
    change = (schedule.sigma(t * (1 + 1e-6)) - schedule.sigma(t * (1 - 1e-6))) / (2e-6 * t)
    torch.testing.assert_close(schedule.slope(t), change, rtol=1e-6, atol=0)
    assert schedule.time(torch.zeros(1, dtype=torch.float64)) == 0


def two_points(x, sigma):
    """The denoiser of data at +1 and -1: E[y | x] = tanh(x / sigma^2)."""
    return torch.tanh(x / sigma**2)


def exact(x, sigma, end):
    """Where the ODE of two_points carries x from sigma to end, by scipy."""
    from scipy.integrate import solve_ivp

    slope = lambda s, y: (y - np.tanh(y / s**2)) / s  # noqa: E731
    solution = solve_ivp(slope, (sigma, end), x.numpy(), rtol=1e-10, atol=1e-12, method="DOP853")
    return torch.from_numpy(solution.y[:, -1])


START = torch.tensor([-1.7, -0.3, 0.4, 2.2], dtype=torch.float64) * 3
SOLVERS = {name: (solver, 1 if name == "euler" else 2) for name, solver in SAMPLERS.items()}
for schedule in TIME_SCHEDULES:
    for scaled in (False, True):
        for alpha in (0.0, 0.5, 2 / 3, 1.0):
            SOLVERS[f"general {schedule} {scaled} {alpha:.2f}"] = (
                lambda denoise, x, sigmas, schedule=schedule, scaled=scaled, alpha=alpha, **more: (
                    sample_general(
                        denoise,
                        x,
                        sigmas,
                        TIME_SCHEDULES[schedule](0.03, 3.0),
                        scaled=scaled,
                        alpha=alpha,
                        **more,
                    )
                ),
                2 if alpha else 1,
            )


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name):
    solver, order = SOLVERS[name]
    truth = exact(START, 3.0, 0.4)
    errors = []
    for steps in (40, 80, 160):
        sigmas = karras_sigmas(steps + 1, 0.4, 3.0, 3.0)[:-1]
        errors.append(float((solver(two_points, START, sigmas) - truth).abs().max()))
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert order - 0.25 < rates[-1] < order + 0.6, (rates, errors)


@pytest.mark.parametrize("name", SOLVERS)
def test_all_end_at_the_data(name):
    solver, _order = SOLVERS[name]
    seen = []
    x = solver(
        two_points, START, karras_sigmas(40, 0.01, 3.0), callback=lambda i, x: seen.append(i)
    )
    # In the time of ve and vp the last Euler step, to 0, covers half of the distance only.
    bent = "general ve" in name or "general vp" in name
    torch.testing.assert_close(x, START.sign(), atol=0.02 if bent else 1e-3, rtol=0)
    assert seen == list(range(40))


def test_general_is_heun_in_the_plain_case():
    sigmas = karras_sigmas(9, 0.05, 3.0)
    general = sample_general(two_points, START, sigmas, TIME_SCHEDULES["linear"]())
    torch.testing.assert_close(general, SAMPLERS["heun"](two_points, START, sigmas))
    euler = sample_general(two_points, START, sigmas, TIME_SCHEDULES["linear"](), alpha=0.0)
    torch.testing.assert_close(euler, SAMPLERS["euler"](two_points, START, sigmas))


def test_vp_time_with_scaling_is_ddim():
    """Euler in VP's time, finely stepped, and DDIM solve the same ODE: same end, closed form."""
    sd = 0.5  # Gaussian data: x(sigma) = x(start) sqrt((sd^2 + sigma^2) / (sd^2 + start^2))
    denoise = lambda x, sigma: x * sd**2 / (sd**2 + sigma**2)  # noqa: E731
    sigmas = SIGMAS["vp"](400, 0.01, 50.0)
    x = sample_general(denoise, 50 * START, sigmas, TIME_SCHEDULES["vp"](0.01, 50.0), scaled=True)
    expected = 50 * START * math.sqrt(sd**2 / (sd**2 + 50.0**2))
    torch.testing.assert_close(x, expected, rtol=2e-3, atol=1e-6)


def test_dpmpp_2m_is_exact_for_a_constant_denoiser_and_costs_one_evaluation():
    calls = []

    def denoise(x, sigma):
        calls.append(float(sigma))
        return torch.full_like(x, 0.25)

    sigmas = karras_sigmas(6, 0.1, 3.0)
    states = []
    SAMPLERS["dpmpp_2m"](denoise, START, sigmas, callback=lambda i, x: states.append(x))
    assert calls == sigmas[:-1].tolist()
    for sigma, state in zip(sigmas[1:], states):
        torch.testing.assert_close(state, 0.25 + (START - 0.25) * sigma / 3.0)
    with pytest.raises(ValueError, match="churn=1.0: dpmpp_2m is deterministic"):
        SAMPLERS["dpmpp_2m"](denoise, START, sigmas, churn=Churn(1.0))


@pytest.mark.parametrize("general", [False, True])
def test_churn_keeps_the_law(general):
    """Gaussian data: with fresh noise at each step the samples still have variance sd^2."""
    sd, count = 0.5, 40_000
    denoise = lambda x, sigma: x * sd**2 / (sd**2 + sigma**2)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    x = 20 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    sigmas = karras_sigmas(60, 0.01, 20.0)
    drawn = []

    def randn(shape, dtype):
        drawn.append(shape)
        return torch.randn(count, *shape, generator=generator, dtype=dtype)

    more = {"churn": Churn(30.0, low=0.05, high=10.0), "randn": randn}
    if general:
        y = sample_general(
            denoise, x, sigmas, TIME_SCHEDULES["vp"](0.01, 20.0), scaled=True, **more
        )
    else:
        y = SAMPLERS["heun"](denoise, x, sigmas, **more)
    assert float(y.var()) == pytest.approx(sd**2, rel=5 * math.sqrt(2 / count) + 0.01)
    assert abs(np.corrcoef(x[:, 0], y[:, 0])[0, 1]) < 0.2  # the noise has replaced most of x
    assert len(drawn) == 60  # also outside [low, high]: EDM's seeds count on it
