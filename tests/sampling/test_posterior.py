"""Samplers of p(x | y) on Gaussian data, whose posterior is known: what each gets wrong.

pigdm and diffpir are affine maps of their noise there: fed with one unit of noise at a time they
give their exact mean and covariance, without a Monte Carlo error. dps divides by |e| and is not.
Errors of the mean are in standard deviations of the posterior, covariances are eigenvalues of the
sampler's over the exact one.
"""

import math

import pytest
import torch

from genmodels.sampling.operators import Foreign, Mask
from genmodels.sampling.posterior import (
    Denoiser,
    Measured,
    SolverOptions,
    langevin,
    sample_diffpir,
    sample_dps,
    sample_pigdm,
)
from genmodels.sampling.schedules import karras_sigmas

SHAPE, D = (1, 2, 3), 6
LOW, HIGH = 0.002, 80.0
SAMPLERS = {"pigdm": sample_pigdm, "diffpir": sample_diffpir, "dps": sample_dps}


class Dense:
    """A matrix as an operator."""

    def __init__(self, matrix):
        self.matrix = matrix

    def __call__(self, x):
        return x.flatten(1) @ self.matrix.T.to(x)

    def adjoint(self, y):
        return (y @ self.matrix.to(y)).reshape(-1, *SHAPE)

    def pull(self, v, a):
        square = self.matrix @ self.matrix.T
        return self.adjoint(v @ torch.linalg.pinv(square + a * torch.eye(len(square))))


class Case:
    """Data N(m, C), one measurement of a draw of it, and the exact posterior."""

    def __init__(self, isotropic, masked, noise):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        turn = torch.linalg.qr(draw(D, D))[0]
        values = torch.linspace(0.1, 0.8, D).double() ** 2
        self.m = 0.3 * draw(D)
        self.c = 0.25 * torch.eye(D).double() if isotropic else turn @ torch.diag(values) @ turn.T
        self.values, self.vectors = torch.linalg.eigh(self.c)
        known = torch.tensor([True, False, False] * 2).reshape(SHAPE)
        matrix = torch.diag(known.flatten().double())
        if not masked:
            matrix = draw(3, D)
            matrix = matrix / torch.linalg.matrix_norm(matrix, 2)
        operator = Mask(known) if masked else Dense(matrix)
        x = self.m + torch.linalg.cholesky(self.c) @ draw(D)
        y = matrix @ x + noise * (matrix @ draw(D) if masked else draw(3))
        self.covariance = torch.linalg.inv(torch.linalg.inv(self.c) + matrix.T @ matrix / noise**2)
        self.mean = self.m + self.covariance @ (matrix.T @ (y - matrix @ self.m)) / noise**2
        y = y.reshape(1, *SHAPE) if masked else y[None]
        self.measured = Measured(operator, y, noise)
        self.spread = math.sqrt(float(self.c.diag().mean()))

    def denoiser(self, spread=None):
        def call(w, sigma):
            along = (w.flatten(1) - self.m) @ self.vectors
            along = along * (self.values / (self.values + sigma**2))
            return (self.m + along @ self.vectors.T).reshape(w.shape)

        begin = lambda z, sigma: sigma * z  # noqa: E731
        return Denoiser(call, LOW, HIGH, spread or self.spread, begin)

    def off(self, mean, covariance):
        """(error of the mean, least and largest eigenvalue of the covariance over it)."""
        half = torch.linalg.cholesky(torch.linalg.inv(self.covariance))
        values = torch.linalg.eigvalsh(half.T @ covariance @ half)
        error = ((mean - self.mean) @ half).norm() / math.sqrt(D)
        return float(error), float(values[0]), float(values[-1])

    def moments(self, solver, steps, spread=None, **options):
        """The sampler's exact mean and covariance, of its affine map."""
        count = (steps + 1) * D + 1
        units, calls = torch.eye(count, dtype=torch.float64), []

        def randn():
            calls.append(None)
            first = (len(calls) - 1) * D
            return units[:, first : first + D].reshape(count, *SHAPE).clone()

        w = self.run(solver, steps, count, randn, spread, **options)
        mean = w[-1]
        assert len(calls) == steps + 1
        return mean, (w[:-1] - mean).T @ (w[:-1] - mean)

    def run(self, solver, steps, count, randn, spread=None, **options):
        sigmas, denoiser = karras_sigmas(steps, LOW, HIGH).tolist(), self.denoiser(spread)
        y = self.measured.y.expand(count, *self.measured.y.shape[1:])
        measured = Measured(self.measured.operator, y, self.measured.noise)
        w = denoiser.begin(randn(), sigmas[0])
        return SAMPLERS[solver](denoiser, measured, w, sigmas, randn, **options).flatten(1)


@pytest.mark.parametrize(
    ("masked", "noise", "eta"), [(True, 0.1, 1.0), (True, 0.5, 0.0), (False, 0.5, 1.0)]
)
def test_pigdm_is_exact_on_isotropic_data_as_steps_grow(masked, noise, eta):
    """Its r_t is then the right one: the mean is within 1 % of a standard deviation, and what the
    covariance lacks is the steps': a quarter of it is left after four times as many."""
    case = Case(True, masked, noise)
    lack = []
    for steps in (40, 160):
        error, low, high = case.off(*case.moments("pigdm", steps, eta=eta))
        assert error < 0.01 and high < 1.001, (error, high)
        lack.append(1 - low)
    assert lack[1] < 0.1 and 0.2 < lack[1] / lack[0] < 0.3, lack


def test_pigdm_with_another_r_or_correlated_data_is_biased():
    """Of correlated data, deviations 0.1 to 0.8, no one r_t is right: the mean is off by 0.15 of a
    deviation, and a variance by a factor 1.7; less so under more noise."""
    case = Case(True, True, 0.1)
    *_, low, _ = case.off(*case.moments("pigdm", 100, spread=case.spread / 4))
    assert low < 0.6 < 0.85 < case.off(*case.moments("pigdm", 100))[1]
    less, more = (Case(False, True, noise) for noise in (0.1, 0.5))
    error, low, high = less.off(*less.moments("pigdm", 100))
    assert 0.1 < error < 0.2 and low > 0.8 and 1.5 < high < 1.8, (error, low, high)
    error, low, high = more.off(*more.moments("pigdm", 100))
    assert error < 0.06 and low > 0.8 and high < 1.01, (error, low, high)


def test_diffpir_lacks_spread_and_the_more_the_more_noise_is_fresh():
    found = {}
    for mix in (0.0, 0.3, 1.0):
        case = Case(True, True, 0.1)
        found[mix] = case.off(*case.moments("diffpir", 100, mix=mix))
        assert found[mix][0] < 0.03
    assert found[0.0][1] > 0.8 and 0.8 < found[0.3][1] < 0.85 and 0.43 < found[1.0][1] < 0.5
    assert found[1.0][2] < 0.5, found
    # Of much noise its mean is off too: the measurement is seen again at each step.
    error, *_ = Case(True, False, 0.5).off(*Case(True, False, 0.5).moments("diffpir", 100, mix=0.3))
    assert 0.15 < error < 0.3


@pytest.mark.parametrize("masked", [True, False])
def test_dps_has_no_spread_where_it_measures_and_ignores_the_noise(masked):
    case, generator = Case(True, masked, 0.5), torch.Generator().manual_seed(1)
    randn = lambda: torch.randn(3000, *SHAPE, generator=generator, dtype=torch.float64)  # noqa: E731
    w = case.run("dps", 100, 3000, randn, zeta=1.0 if masked else 5.0)
    error, low, high = case.off(w.mean(0), torch.cov(w.T))
    assert low < 0.03 and 0.8 < high < 1.1, (low, high)
    assert error > 0.2
    matrix = case.measured.operator
    left = (matrix(w.reshape(-1, *SHAPE)) - case.measured.y).flatten(1).norm(dim=1)
    assert float(left.mean()) < 0.3 * 0.5 * math.sqrt(case.measured.y.numel())  # not the noise


def test_a_chain_on_the_sum_of_energies_is_exact():
    """Metropolis-adjusted, so at any step size; within 5 standard errors of 500 chains."""
    case, generator = Case(False, False, 0.3), torch.Generator().manual_seed(2)
    precision = torch.linalg.inv(case.c)
    start = case.mean + torch.randn(500, D, generator=generator, dtype=torch.float64)
    y = case.measured.y.expand(500, -1)

    def energy(x):
        far = x.flatten(1) - case.m
        return 0.5 * (far @ precision * far).sum(dim=1)

    chain = langevin(
        energy,
        Measured(case.measured.operator, y, 0.3),
        start.reshape(-1, *SHAPE),
        steps=200,
        step=0.015,
        seed=torch.arange(500),
    )
    error, low, high = case.off(chain.y.flatten(1).mean(0), torch.cov(chain.y.flatten(1).T))
    assert error < 5 / math.sqrt(500) and low > 0.75 and high < 1.3, (error, low, high)
    assert 0.4 < float(chain.acceptance.mean()) < 0.99


@pytest.mark.parametrize("solver", SAMPLERS)
def test_without_noise_the_end_is_consistent(solver):
    case = Case(False, False, 0.3)
    exact = Measured(case.measured.operator, case.measured.y, 0.0)
    case.measured = exact
    generator = torch.Generator().manual_seed(3)
    randn = lambda: torch.randn(5, *SHAPE, generator=generator, dtype=torch.float64)  # noqa: E731
    w = case.run(solver, 100, 5, randn, **({"zeta": 5.0} if solver == "dps" else {}))
    left = exact.operator(w.reshape(-1, *SHAPE)) - exact.y
    assert torch.isfinite(w).all()
    assert float(left.abs().max()) < {"pigdm": 1e-2, "diffpir": 1e-9, "dps": 0.3}[solver], left


def test_settings_have_limits():
    with pytest.raises(ValueError, match="^mix=1.5: must be in"):
        SolverOptions(mix=1.5)
    with pytest.raises(ValueError, match="^eta=-0.1: must be in"):
        SolverOptions(eta=-0.1)


@pytest.mark.parametrize("solver", SAMPLERS)
def test_the_unit_of_the_state_changes_no_picture(solver):
    """w = x / 2 and its noise at half of it: the same draws, by A diag(dx/dw) in place of A."""
    matrix = torch.randn(3, D, generator=torch.Generator().manual_seed(5)).double()
    dense = Dense(matrix / torch.linalg.matrix_norm(matrix, 2))
    operator = Foreign(dense, dense.adjoint)
    # So little noise that dps's abar, which knows the unit of the paper's pictures, is 1.
    sigmas = torch.tensor([0.02, 0.01, 0.004, 0.0]).double()
    measured = Measured(operator, torch.full((4, 3), 0.03).double(), 0.01)
    made = []
    for unit in (1.0, 2.0):

        def call(w, sigma, c=0.02 / unit):
            return c**2 / (c**2 + sigma**2) * w

        more = {"image": lambda w: 2 * w, "slope": lambda w: torch.full_like(w, 2)}
        begin = lambda z, sigma: sigma * z  # noqa: E731
        denoiser = Denoiser(call, 0.0, 1.0, 0.02 / unit, begin, **(more if unit == 2 else {}))
        generator = torch.Generator().manual_seed(6)
        randn = lambda g=generator: torch.randn(4, *SHAPE, generator=g, dtype=torch.float64)  # noqa: E731
        levels = (sigmas / unit).tolist()
        w = begin(randn(), levels[0])
        made.append(unit * SAMPLERS[solver](denoiser, measured, w, levels, randn))
    torch.testing.assert_close(*made, atol=1e-5, rtol=1e-3)
    assert float(made[0].abs().max()) > 1e-3


@pytest.mark.parametrize("solver", SAMPLERS)
def test_a_step_is_that_of_the_paper(solver):
    """In the papers' state x = sqrt(abar) w, of a denoiser that is no straight line."""
    draw = torch.Generator().manual_seed(7)
    a = torch.randn(3, D, generator=draw).double()
    w, z = torch.randn(2, 2, D, generator=draw).double()
    y, s, sigma, after, share = torch.randn(2, 3, generator=draw).double(), 0.3, 1.3, 0.9, 0.4

    def call(w, sigma):
        return torch.tanh(w / (1 + sigma)).flip(-1) + 0.1 * w**2

    options = {"pigdm": {"eta": share}, "diffpir": {"lam": 2.5, "mix": share}, "dps": {"zeta": 0.7}}
    measured = Measured(Dense(a), y, s)
    denoiser = Denoiser(call, LOW, HIGH, 0.6, lambda z, sigma: sigma * z)
    start, noise = (v.reshape(2, *SHAPE) for v in (w, z))
    found = SAMPLERS[solver](
        denoiser, measured, start, [sigma, after], lambda: noise, **options[solver]
    )
    abar, before = 1 / (1 + sigma**2), 1 / (1 + after**2)
    x = (math.sqrt(abar) * w).requires_grad_(True)
    x0 = call((x / math.sqrt(abar)).reshape(2, *SHAPE), sigma).flatten(1)
    if solver == "dps":  # algorithm 1
        alpha, beta = abar / before, 1 - abar / before
        made = math.sqrt(alpha) * (1 - before) / (1 - abar) * x
        made = made + math.sqrt(before) * beta / (1 - abar) * x0
        made = made + math.sqrt(beta * (1 - before) / (1 - abar)) * z
        square = (y - x0 @ a.T).square().sum(dim=1)
        (slope,) = torch.autograd.grad(square.sum(), x)
        made = made - 0.7 * 1000 * math.sqrt(3 / (3 * 256**2)) / square.sqrt()[:, None] * slope
    elif solver == "pigdm":  # the score of N(A x0, r^2 A A^T + s^2 I), DDIM's equations 12 and 16
        r2 = 0.36 * sigma**2 / (0.36 + sigma**2)
        law = torch.distributions.MultivariateNormal(
            x0 @ a.T, r2 * a @ a.T + s**2 * torch.eye(3).double()
        )
        (slope,) = torch.autograd.grad(law.log_prob(y).sum(), x)
        x0 = x0 + (1 - abar) / math.sqrt(abar) * slope
        fresh = share * math.sqrt((1 - before) / (1 - abar) * (1 - abar / before))
        e = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        made = math.sqrt(before) * x0 + math.sqrt(1 - before - fresh**2) * e + fresh * z
    else:  # algorithm 1
        rho = 2.5 * s**2 / (sigma**2)
        x0 = torch.linalg.solve(a.T @ a + rho * torch.eye(D).double(), (y @ a + rho * x0).T).T
        e = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        made = math.sqrt(1 - share) * e + math.sqrt(share) * z
        made = math.sqrt(before) * x0 + math.sqrt(1 - before) * made
    torch.testing.assert_close(found.flatten(1), made / math.sqrt(before))


def test_a_chain_holds_what_is_known_exactly_and_draws_the_rest():
    """N(0, C) of two pixels, one known: the other is N(c y, 1 - c^2)."""
    known, c = torch.tensor([[[True, False]]]), 0.8
    precision = torch.linalg.inv(torch.tensor([[1.0, c], [c, 1.0]]))
    x = torch.full((400, 1, 1, 2), 0.7)

    def energy(x):
        return 0.5 * (x.flatten(1) @ precision * x.flatten(1)).sum(dim=1)

    measured = Measured(Mask(known), x * known, 0.0)
    made = langevin(energy, measured, x, steps=25, step=0.2, seed=torch.arange(400)).y.flatten(1)
    assert (made[:, 0] == x[0, 0, 0, 0]).all()
    assert abs(float(made[:, 1].mean()) - 0.56) < 5 * 0.6 / 20
    assert 0.8 < float(made[:, 1].std()) / 0.6 < 1.2
