"""CDRL on Gaussians: sampled, guided, composed and completed laws, densities, in closed form."""

import math

import pytest
import torch
from conftest import ROOT
from torch import nn

import genmodels
from genmodels.kernels.philox import philox_normal
from genmodels.seeding import Stream

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
