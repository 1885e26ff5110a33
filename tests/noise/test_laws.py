"""Noise laws: estimates against quadrature, sampling, domains, guards."""

import math

import numpy as np
import pytest
import torch

from genmodels.noise import FLOOR, LAWS, SPREAD, tweedie

LEVELS = {  # a moderate and a heavy one
    "gaussian": (25.0, 80.0),
    "poisson": (0.01, 0.2),
    "gamma": (50.0, 2.0),
    "exponential": (1.0,),
    "inverse_gaussian": (40.0, 3.0),
    "rayleigh": (1.0,),
    "nakagami": (9.0, 0.7),
    "lognormal": (0.1, 0.8),
}
# Order of the posterior power mean the estimate is, 0 the geometric one.
ORDER = {
    "gaussian": 1,
    "poisson": 0,
    "gamma": -1,
    "exponential": -1,
    "inverse_gaussian": -2,
    "rayleigh": -2,
    "nakagami": -2,
    "lognormal": 0,
}
CASES = [(law, level) for law, levels in LEVELS.items() for level in levels]

# A prior of two humps on (0, 1), as weights of 4000 midpoints: the integral is this sum, exact for
# the discrete prior whatever its spacing, so the identity is tested without quadrature error.
X = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
PRIOR = 0.3 * torch.exp(-((X - 0.25) ** 2) / 0.005) + 0.7 * torch.exp(-((X - 0.7) ** 2) / 0.02)
PRIOR /= PRIOR.sum()


def log_density(law, y, x, level):
    """log p(y|x) in closed form, y (N, 1) against x (M,); Poisson's by the gamma function in y."""
    if law == "gaussian":
        return torch.distributions.Normal(x, level / 255).log_prob(y)
    if law == "poisson":
        return (y * x.log() - x) / level - y / level * math.log(level) - torch.lgamma(y / level + 1)
    if law in ("gamma", "exponential"):
        return torch.distributions.Gamma(level, level / x, validate_args=False).log_prob(y)
    if law == "inverse_gaussian":
        return 0.5 * (level / (2 * math.pi * y**3)).log() - level * (y - x) ** 2 / (2 * x**2 * y)
    if law == "rayleigh":
        return (y / x**2).log() - y**2 / (2 * x**2)
    if law == "nakagami":
        return (2 * level - 1) * y.log() - 2 * level * x.log() - level * y**2 / x**2
    return torch.distributions.LogNormal(x.log(), level, validate_args=False).log_prob(y)


def posterior(law, y, level):
    """Return (s, ds/dy, weights of X given y) by autograd of the marginal density."""
    y = y.clone().requires_grad_(True)
    joint = log_density(law, y[:, None], X, level) + PRIOR.log()
    log_p = joint.logsumexp(1)
    (s,) = torch.autograd.grad(log_p.sum(), y, create_graph=True)
    (ds,) = torch.autograd.grad(s.sum(), y)
    return s.detach(), ds, (joint - log_p[:, None]).exp().detach()


def pixels(law, level, count=40):
    """Return noisy pixels the law makes of X, kept off the rounding of a zero density."""
    rng = np.random.default_rng(0)
    clean = rng.choice(X.numpy(), count, p=PRIOR.numpy())
    return torch.from_numpy(LAWS[law].sample(clean, level, rng))


def power_mean(weights, order):
    if order == 0:
        return (weights @ X.log()).exp()
    return (weights @ X**order) ** (1 / order)


def test_every_law_has_a_density_and_an_order_here():
    assert LEVELS.keys() == ORDER.keys() == LAWS.keys()


@pytest.mark.parametrize(("law", "level"), CASES)
def test_estimate_is_the_posterior_power_mean(law, level):
    y = pixels(law, level)
    s, _, weights = posterior(law, y, level)
    found = LAWS[law].estimate(y, s, level)
    torch.testing.assert_close(found, power_mean(weights, ORDER[law]), rtol=1e-6, atol=1e-6)


def test_poisson_half_count_form():
    """The paper's (y + zeta/2) exp(zeta s) is less, by 1/(24 (n + 1/2)^2) at n counts at most."""
    y, zeta = 0.05 * torch.arange(20, dtype=torch.float64), 0.05
    s, _, _ = posterior("poisson", y, zeta)
    ratio = LAWS["poisson"].estimate(y, s, zeta) / ((y + zeta / 2) * (zeta * s).exp())
    bound = 1 / (24 * (y / zeta + 0.5) ** 2)
    assert (ratio > 1).all() and (ratio < 1 + bound).all()
    assert (ratio[2:] > 1 + 0.9 * bound[2:]).all()  # the bound is the error, nearly


@pytest.mark.parametrize(
    ("law", "level", "plain", "corrected"),
    [
        ("gamma", 100, 4.2e-3, 2.3e-5),
        ("gamma", 20, 1.3e-2, 1.7e-3),
        ("poisson", 0.01, 3.2e-3, 3.1e-5),
        ("poisson", 0.05, 1.25e-2, 1.4e-3),
    ],
)
def test_corrected_estimates_are_nearer_to_the_mean(law, level, plain, corrected):
    """Mean distance from the posterior mean, as measured at two significant digits."""
    y = pixels(law, level, 500)
    s, ds, weights = posterior(law, y, level)
    mean = weights @ X
    distance = (LAWS[law].estimate(y, s, level) - mean).abs().mean().item()
    assert distance == pytest.approx(plain, rel=0.1)
    distance = (LAWS[law].corrected(y, s, ds, level) - mean).abs().mean().item()
    assert distance == pytest.approx(corrected, rel=0.2)


def test_only_poisson_and_gamma_are_corrected():
    assert [name for name, law in LAWS.items() if law.corrected] == ["poisson", "gamma"]


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
def test_tweedie_is_the_power_mean_of_the_saddle_point_density(rho):
    """p(y|x) = y^(-rho/2) exp(-d(y, x)/(2 phi)), d the unit deviance of variance x^rho."""
    phi, c = 0.02, 1 - rho
    y = torch.linspace(0.1, 1.2, 23, dtype=torch.float64, requires_grad=True)
    v = y[:, None]
    if rho == 1:
        deviance = 2 * (v * (v / X).log() - v + X)
    elif rho == 2:
        deviance = 2 * (v / X - 1 - (v / X).log())
    else:
        deviance = 2 * (v ** (1 + c) / (c * (1 + c)) - v * X**c / c + X ** (1 + c) / (1 + c))
    joint = -rho / 2 * v.log() - deviance / (2 * phi) + PRIOR.log()
    log_p = joint.logsumexp(1)
    (s,) = torch.autograd.grad(log_p.sum(), y)
    weights = (joint - log_p[:, None]).exp().detach()
    found = tweedie(y.detach(), s, phi, rho)
    torch.testing.assert_close(found, power_mean(weights, c), rtol=1e-6, atol=1e-6)


def test_tweedie_holds_the_laws():
    y, s = torch.linspace(0.1, 1.2, 12).double(), torch.linspace(-3, 3, 12).double()
    members = {
        "gaussian": (25, (25 / 255) ** 2, 0),
        "gamma": (50, 1 / 50, 2),
        "inverse_gaussian": (40, 1 / 40, 3),
    }
    for law, (level, phi, rho) in members.items():
        torch.testing.assert_close(tweedie(y, s, phi, rho), LAWS[law].estimate(y, s, level))
        torch.testing.assert_close(  # no step where rho comes near a whole number
            tweedie(y, s, phi, rho + 1e-9), tweedie(y, s, phi, rho), rtol=1e-6, atol=1e-6
        )
    torch.testing.assert_close(tweedie(y, s, 0.01, 1 + 1.1e-6), tweedie(y, s, 0.01, 1))


MEAN_AND_VARIANCE = {  # at x = 0.5
    "gaussian": lambda v: (0.5, (v / 255) ** 2),
    "poisson": lambda v: (0.5, v * 0.5),
    "gamma": lambda v: (0.5, 0.25 / v),
    "exponential": lambda v: (0.5, 0.25),
    "inverse_gaussian": lambda v: (0.5, 0.125 / v),
    "rayleigh": lambda v: (0.5 * (math.pi / 2) ** 0.5, 0.25 * (2 - math.pi / 2)),
    "nakagami": lambda v: (
        r := 0.5 * math.exp(math.lgamma(v + 0.5) - math.lgamma(v)) / v**0.5,
        0.25 - r * r,
    ),
    "lognormal": lambda v: (0.5 * math.exp(v * v / 2), 0.25 * math.exp(v * v) * math.expm1(v * v)),
}


@pytest.mark.parametrize(("law", "level"), CASES)
def test_samples_have_the_mean_and_variance_of_the_law(law, level):
    mean, variance = MEAN_AND_VARIANCE[law](level)
    count = 400_000
    y = LAWS[law].sample(np.full(count, 0.5), level, np.random.default_rng(0))
    assert y.dtype == np.float64
    deviation = (y - mean) ** 2
    assert abs(y.mean() - mean) < 5 * y.std() / count**0.5
    assert abs(deviation.mean() - variance) < 5 * deviation.std() / count**0.5


def test_samples_are_those_of_the_stated_rule():
    """Bit for bit: anyone can make the same noisy pictures with numpy alone."""
    x = np.random.default_rng(1).random((2, 5, 7))

    def rng():
        return np.random.default_rng([0, 3])

    rules = {
        "gaussian": (25, x + 25 / 255 * rng().standard_normal(x.shape)),
        "poisson": (0.01, rng().poisson(x / 0.01) * 0.01),
        "gamma": (50, x * rng().gamma(50, 1 / 50, x.shape)),
        "exponential": (1, x * rng().exponential(1.0, x.shape)),
        "inverse_gaussian": (40, rng().wald(x, 40)),
        "rayleigh": (1, x * rng().rayleigh(1.0, x.shape)),
        "nakagami": (9, x * np.sqrt(rng().gamma(9, 1 / 9, x.shape))),
        "lognormal": (0.1, x * np.exp(0.1 * rng().standard_normal(x.shape))),
    }
    assert rules.keys() == LAWS.keys()
    for law, (level, y) in rules.items():
        assert np.array_equal(LAWS[law].sample(x, level, rng()), y), law


@pytest.mark.parametrize(("law", "level"), CASES)
def test_states_are_even_and_turn_back(law, level):
    entry = LAWS[law]
    y = pixels(law, level).clamp(min=FLOOR if entry.positive else -math.inf)
    w = entry.to_state(y, level)
    torch.testing.assert_close(entry.from_state(w, level), y)
    assert entry.from_state_std(entry.state_std(level)) == pytest.approx(level, rel=1e-6)
    tensor = entry.state_std(torch.tensor([level], dtype=torch.float64))  # one level an image
    assert float(tensor) == pytest.approx(entry.state_std(level), rel=1e-12)
    # Its spread is state_std at dark and bright x: of factors but for FLOOR, of others nearly.
    spread = [
        entry.to_state(
            torch.from_numpy(entry.sample(np.full(100_000, x), level, np.random.default_rng(0))),
            level,
        ).std()
        for x in (0.3, 0.9)
    ]
    exact = law not in ("poisson", "inverse_gaussian")
    if exact or level in (0.01, 40.0):
        assert spread == pytest.approx(
            [entry.state_std(level)] * 2, rel=0.02
        )  # FLOOR cuts a little


@pytest.mark.parametrize(("law", "level"), CASES)
def test_score_follows_the_change_of_variables(law, level):
    """log p(w) = log p(y(w)) + log dy/dw differentiated by autograd, from a closed-form p(y)."""
    entry, x = LAWS[law], torch.tensor([0.4], dtype=torch.float64)
    y = pixels(law, level).clamp(min=FLOOR if entry.positive else -math.inf).requires_grad_(True)
    (s,) = torch.autograd.grad(log_density(law, y[:, None], x, level).sum(), y)
    w = entry.to_state(y.detach(), level).requires_grad_(True)
    back = entry.from_state(w, level)
    (slope,) = torch.autograd.grad(back.sum(), w, create_graph=True)
    log_p = log_density(law, back[:, None], x, level)[:, 0] + slope.log()
    (s_w,) = torch.autograd.grad(log_p.sum(), w)
    torch.testing.assert_close(entry.score(w.detach(), s_w, level), s, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("law", "level"), CASES)
def test_no_score_is_too_bad(law, level, dtype):
    """Huge scores of either sign, black and negative pixels: finite, at least 0, bounded."""
    entry = LAWS[law]
    y = torch.tensor([-0.1, 0, 1e-12, 1e-3, 0.5, 3], dtype=dtype)[:, None]
    s = torch.tensor([-1e30, -1e4, -1, 0, 1, 1e4, 1e30], dtype=dtype)
    outputs = [entry.estimate(y, s, level)]
    if entry.corrected:
        outputs += [entry.corrected(y, s, ds, level) for ds in (-1e30, 0 * s, 1e30)]
    for x in outputs:
        assert x.dtype == dtype and x.shape == (6, 7)
        if entry.positive:
            assert x.isfinite().all() and (x >= 0).all()
            w = entry.to_state(y, level) + SPREAD * entry.state_std(level)
            assert (x <= entry.from_state(w, level) * (1 + 1e-5)).all()
            assert (x[0] == x[1]).all()  # below black is black
    w = entry.to_state(y, level)
    assert w.isfinite().all() and entry.score(w, s[:1] * 0, level).isfinite().all()
    wild = torch.tensor([-50.0, -1, 0, 1], dtype=dtype)
    if entry.positive:
        back = entry.from_state(wild, level)
        assert (back >= -0.375 * level).all() and torch.equal(back, back.sort().values)


def test_black_pixels():
    """Factors leave black black whatever the score; a Poisson count of 0 does not mean x = 0."""
    y, s = torch.zeros(1), torch.tensor([3.0])
    for law, levels in LEVELS.items():
        if law not in ("gaussian", "poisson"):
            assert LAWS[law].estimate(y, s, levels[0]) == 0
            rng = np.random.default_rng(0)
            assert (LAWS[law].sample(np.zeros(4), levels[0], rng) == 0).all()
    expected = 0.01 * math.exp(-0.5772156649 + 0.01 * 3)
    assert float(LAWS["poisson"].estimate(y, s, 0.01)) == pytest.approx(expected, rel=1e-6)


def test_a_level_for_each_image():
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.random((2, 1, 4, 4)))
    s = torch.from_numpy(rng.standard_normal((2, 1, 4, 4)))
    for law, (level, *_) in LEVELS.items():
        entry = LAWS[law]
        two = torch.tensor([level, 0.7 * level if len(LEVELS[law]) == 2 else level])
        each = two.double()[:, None, None, None]
        functions = [entry.estimate, entry.score, lambda y, s, v, e=entry: e.to_state(y, v)]
        if entry.corrected:
            functions.append(lambda y, s, v, e=entry: e.corrected(y, s, -s.square(), v))
        for function in functions:
            rows = [function(y[i], s[i], float(two[i])) for i in (0, 1)]
            torch.testing.assert_close(function(y, s, each), torch.stack(rows))


@pytest.mark.parametrize("level", [0, -1, 1e9, math.nan, math.inf, "much", None])
@pytest.mark.parametrize("law", LAWS)
def test_check_names_the_range(law, level):
    entry = LAWS[law]
    assert entry.check(entry.low) == entry.low and entry.check(entry.high) == entry.high
    with pytest.raises(ValueError, match=f"level={level}: must be {entry.low:g}"):
        entry.check(level)


@pytest.mark.parametrize(
    ("law", "level", "share", "variance"),
    [
        ("gaussian", 25.0, 0.15, lambda x, level: (level / 255) ** 2),
        ("poisson", 0.02, 0.15, lambda x, level: level * x),
        ("poisson", 0.3, 0.5, lambda x, level: level * x),
        ("gamma", 30.0, 0.15, lambda x, level: x**2 / level),
        ("gamma", 2.0, 0.5, lambda x, level: x**2 / level),
    ],
)
def test_a_split_is_two_independent_pictures_of_the_law(law, level, share, variance):
    """Of one x: means x, the variance that the law has at the new level, no correlation."""
    rng, x, count = np.random.default_rng(0), 0.6, 200_000
    y = LAWS[law].sample(np.full(count, x), level, rng)
    first, told = LAWS[law].split(y, level, share, rng)
    second = (y - (1 - share) * first) / share
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(count)
    for part, at in ((first, variance(x, told)), (second, variance(x, level) / share)):
        assert abs(part.mean() - x) < 4 * math.sqrt(at / count)
        fourth = np.mean((part - x) ** 4)
        assert abs(part.var() - at) < 4 * math.sqrt((fourth - at**2) / count)
    assert variance(x, told) == pytest.approx(variance(x, level) / (1 - share))


def test_only_three_laws_are_split():
    assert [name for name, law in LAWS.items() if law.split] == ["gaussian", "poisson", "gamma"]
