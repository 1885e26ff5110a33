"""The method GBM: loss, prior, likelihood, samples, restoring; its closed forms on log-normals."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import genmodels
import train
from genmodels import checkpoint, images
from genmodels.checkpoint import read_checkpoint
from genmodels.data import ImageDataModule
from genmodels.images import to_uint8
from genmodels.sampling import gbm
from tests.helpers.gbm_reference import Exact, M, V, batch, build, exact_model

SAMPLERS = ("ode", "dls", "ancestral", "ums", "paper")


@pytest.fixture
def exact():
    return exact_model()


@pytest.fixture(scope="module")
def trained():
    """A conditional model, fitted to the digits, whose last layer is not zero."""
    model = build("data.labels=true", "method.sigma_max=1.5")
    model.prepare(ImageDataModule(model.cfg.data))
    torch.manual_seed(0)
    nn.init.normal_(model.net.net.unet.conv_out.weight, std=0.05)
    nn.init.normal_(model.net.net.unet.class_embedding.weight)
    return model


def test_score_is_x_times_the_gradient_of_the_log_density(exact):
    """h of a noised log-normal against torch's LogNormal, by autograd in x."""
    x = (torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.2) * 2
    sigma = torch.tensor([0.01, 0.1, 1.0])
    positive = ((x + 1) / 2 + 1).requires_grad_()
    law = torch.distributions.LogNormal(M, (V + sigma**2).sqrt().reshape(-1, 1, 1, 1))
    (gradient,) = torch.autograd.grad(law.log_prob(positive).sum(), positive)
    h = exact.score(x, sigma)
    torch.testing.assert_close(h, (positive * gradient).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("weight", "at"),
    [("paper", lambda s: V * s / (V + s)), ("eps", lambda s: V / (V + s)), ("edm", lambda s: 1.0)],
)
def test_smallest_loss_at_one_level(weight, at):
    """min E |D - y_0|^2 = V S / (V + S): the weights multiply it."""
    for sigma in (0.02, 0.1):
        model = exact_model(
            f"method.weight={weight}",
            f"method.sigma_min={sigma * 0.9999}",
            f"method.sigma_max={sigma}",
        )
        loss, logs = model.loss(batch(2000))
        # 128,000 squares of normals: 0.4 %.
        assert float(logs["loss"]) == pytest.approx(at(sigma**2), rel=0.02)
        assert float(loss) == pytest.approx(64 * float(logs["loss"]), rel=1e-5)


def test_regression_of_h_on_log_x():
    """Slope -1 / (V + S), intercept -1 + M / (V + S): S is the noise that the loss puts on y."""
    sigma, seen = 0.1, []
    model = exact_model(f"method.sigma_min={sigma * 0.9999}", f"method.sigma_max={sigma}")
    model.net.register_forward_hook(lambda net, given, out: seen.append(given[0]))
    data = batch(2000)
    model.loss(data)
    y0, y = model.to_state(data["image"]).double().flatten(), seen[0].double().flatten()
    h = -1 - (y - y0) / sigma**2
    slope = torch.cov(torch.stack([y, h]))[0, 1] / y.var()
    # 128,000 pairs: the slope's standard error is 0.16, the intercept's 0.06.
    assert float(slope) == pytest.approx(-1 / (V + sigma**2), abs=0.6)
    assert float(h.mean() - slope * y.mean()) == pytest.approx(-1 + M / (V + sigma**2), abs=0.25)


@pytest.mark.parametrize("drift", [0.0, 0.5, 1.0])
def test_the_drift_of_log_x_solves_fokker_planck(drift):
    """dp/dS = - d(drift x p)/dx + d^2(x^2 p)/dx^2 / 2 for the law of exp(y_0 + shift S + ...)."""
    zero = torch.zeros(1, dtype=torch.float64)
    shift = -float(gbm.sample_ode(lambda y, level: 0 * y, zero, [2.0, 1.0], drift=drift))
    x = torch.linspace(0.6, 3.0, 40, dtype=torch.float64, requires_grad=True)
    level = torch.full_like(x, 0.3).requires_grad_()
    density = torch.distributions.LogNormal(0.25 + shift * level, (0.09 + level).sqrt())
    p = density.log_prob(x).exp()

    def derivative(f, at):
        return torch.autograd.grad(f.sum(), at, create_graph=True)[0]

    rate = derivative(p, level)
    flux = -derivative(drift * x * p, x) + derivative(derivative(x**2 * p, x), x) / 2
    torch.testing.assert_close(rate, flux, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", ["geometric", "constant"])
def test_likelihood_weight_integrates_the_bound(schedule):
    """1/2 int V S / (V + S) / S^2 dS = [log(S / (V + S))] / 2, whatever the schedule."""
    ends = (0.03, 0.3)
    model = exact_model(
        "method.weight=likelihood",
        f"method.schedule={schedule}",
        f"method.sigma_min={ends[0]}",
        f"method.sigma_max={ends[1]}",
    )
    _, logs = model.loss(batch(4000))
    low, high = (math.log(s**2 / (V + s**2)) / 2 for s in ends)
    assert float(logs["loss"]) == pytest.approx(high - low, rel=0.06)


@pytest.mark.parametrize("loss", ["explicit", "hutchinson"])
def test_explicit_score_matching_is_the_denoising_loss_up_to_a_constant(loss):
    """Spoilt by `gain`, both losses rise alike, by gain^2 (V + S) / S."""
    words = ["method.weight=eps", "method.sigma_min=0.04", "method.sigma_max=0.08"]
    data, rises = batch(600), {}
    for kind in (loss, "denoising"):
        values = []
        for gain in (0.0, 0.2):
            model = exact_model(*words, f"method.loss={kind}", gain=gain)
            values.append(float(model.loss(data)[0].detach()) / 64)
        rises[kind] = values[1] - values[0]
    t = torch.linspace(0, 1, 1001).double()
    level = 0.0016 * 4**t
    expected = float((0.04 * (V + level) / level).mean())
    assert rises["denoising"] == pytest.approx(expected, rel=0.05)
    assert rises[loss] == pytest.approx(expected, rel=0.08)


def test_explicit_loss_trains_a_network_with_attention():
    """Its gradient needs second derivatives, which the fused attention does not have."""
    model = build("method.loss=hutchinson", "network.attention=[1]").train()
    nn.init.normal_(model.net.net.unet.conv_out.weight, std=0.05)
    model.loss(batch(2))[0].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="trainer.compile=true: method.loss=explicit"):
        build("method.loss=explicit", "trainer.compile=true")


def test_a_fresh_network_is_exact_on_white_data():
    """F = 0 makes D = mean + c_skip (y - mean); its weighted loss is 1 for each element."""
    model = build()
    model.net.mean.fill_(M)
    model.net.sigma_data.fill_(math.sqrt(V))
    with torch.no_grad():
        _, logs = model.loss(batch(2000))
    assert float(logs["loss"]) == pytest.approx(1, abs=0.02)
    y, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 0.1, 1.0])
    torch.testing.assert_close(model.net(y, sigma).detach(), Exact()(y, sigma))


def test_prepare_measures_the_data(trained):
    pixels = ImageDataModule(trained.cfg.data).train[0]
    y = (pixels.double() / 255 + 1).log()
    assert float(trained.net.mean) == pytest.approx(float(y.mean()), abs=1e-6)
    assert float(trained.net.sigma_data) == pytest.approx(float(y.std()), rel=1e-4)
    prior, rows = trained.prior, y.flatten(1)
    law = torch.distributions.MultivariateNormal(
        rows.mean(0), torch.from_numpy(np.cov(rows.numpy().T, bias=True)) + 0.5 * torch.eye(64)
    )
    draws = rows[:5].reshape(5, 1, 8, 8) + 0.3
    torch.testing.assert_close(
        prior.log_prob(draws, 0.5), law.log_prob(draws.flatten(1)), rtol=1e-4, atol=1e-3
    )


def test_prepare_says_the_divergence(trained):
    words = trained.prepare(ImageDataModule(trained.cfg.data))
    assert "prior full at sigma_max=1.5:\nKL(p_T || prior) = 0.00" in words


def test_log_prob_depends_on_an_images_own_seed(trained):
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.tensor([1, 2, 3, 4])
    for kind in trained.LIKELIHOODS:
        together = trained.log_prob(x, labels, kind=kind, seeds=[5, 6, 7, 8], steps=4)
        alone = trained.log_prob(x[2:3], labels[2:3], kind=kind, seeds=[7], steps=4)
        torch.testing.assert_close(together[2:3], alone, rtol=1e-5, atol=1e-3)
        other = trained.log_prob(x[2:3], labels[2:3], kind=kind, seeds=[9], steps=4)
        assert abs(float(other - alone)) > 1e-2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_of_a_lognormal_have_its_law(sampler):
    """Through seeds, prior, kernel and clipping; the paper's sampler keeps less variance."""
    model = exact_model("method.sigma_max=0.8")
    options = {
        "ums": {"steps": 400},
        "ancestral": {"steps": 250},  # its variance is low by O(1 / steps)
        "paper": {"steps": 400, "anneal": 0.99, "delta": 1.5e-3},
    }.get(sampler, {"steps": 60})
    x = model.sample(range(200), sampler=sampler, **options)
    y = ((x.double() + 1) / 2 + 1).log()
    assert abs(float(y.mean()) - M) < 2e-3
    if sampler == "paper":
        assert float(y.var()) < 0.8 * V
    else:
        assert float(y.var()) == pytest.approx(V, rel=0.08)


@pytest.mark.filterwarnings("ignore:sampler=ums flipped")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_depends_on_its_seed_alone(trained, sampler):
    options = {"sampler": sampler, "steps": 5}
    together = to_uint8(trained.sample(range(12), **options))
    assert len(together.flatten(1).unique(dim=0)) == 12
    shuffled = to_uint8(trained.sample([11, 3, 0, 7], **options))
    assert torch.equal(shuffled, together[[11, 3, 0, 7]])
    for k in range(12):
        assert torch.equal(to_uint8(trained.sample([k], **options))[0], together[k])


def test_ums_warns_of_flips(trained):
    with pytest.warns(UserWarning, match="sampler=ums flipped .* signs .* use sampler=dls"):
        trained.sample(range(4), sampler="ums", steps=3)


def test_steps_are_counted_and_reported(trained):
    seen = []
    trained.sample(
        [0],
        sampler="ode",
        steps=6,
        callback=lambda i, x: seen.append((i, float(x.abs().max()) <= 1)),
    )
    assert trained.nfe == 11 and seen == [(i, True) for i in range(6)]
    trained.sample([0], steps=6, sampler="dls")
    assert trained.nfe == 6
    trained.sample([0], steps=6, sampler="paper", inner=2, final=3)
    assert trained.nfe == 15


def test_levels_of_the_papers_sampler():
    """S (1 - k / steps), never below S / steps: its steps are all of one length."""
    model, seen = exact_model("method.sigma_max=2"), []
    forward = model.net.forward
    model.net.forward = lambda y, sigma, labels: seen.append(float(sigma)) or forward(y, sigma)
    model.sample([0], sampler="paper", steps=4, sigma_max=0.8)
    assert seen == pytest.approx([math.sqrt(0.64 * (1 - k / 4)) for k in range(4)])


@pytest.mark.parametrize("offset", [1e-3, 0.1, 2.0])
@pytest.mark.filterwarnings("ignore:sampler=ums flipped")
def test_any_offset_stays_finite_in_float32(offset):
    """Exact zeros in the data, the smallest and the largest offset: loss, prior, every sampler."""
    model = build(f"method.offset={offset}", "method.sigma_max=5")
    data = ImageDataModule(model.cfg.data)
    assert (data.train[0] == 0).any() and "nan" not in model.prepare(data)
    rows = {"image": images.from_uint8(data.train[0][:64]), "label": None, "n": torch.arange(64)}
    loss, _ = model.loss(rows)
    assert torch.isfinite(loss)
    y = model.to_state(rows["image"])
    torch.testing.assert_close(model.from_state(y), rows["image"], rtol=0, atol=2e-6 * (1 + offset))
    for sampler in SAMPLERS:
        assert torch.isfinite(model.sample(range(3), sampler=sampler, steps=8)).all(), sampler
    state = {k: v.dtype for k, v in model.state_dict().items() if v.is_floating_point()}
    assert set(state.values()) == {torch.float32}


@pytest.mark.parametrize("value", [-1.02, 1.02, math.nan])
def test_pixels_out_of_range_are_refused(exact, value):
    rows = batch(2)
    rows["image"][1, 0, 3, 3] = value
    with pytest.raises(ValueError, match=r"its pixels must be in \[0, 1\]"):
        exact.loss(rows)
    with pytest.raises(ValueError, match=r"its pixels must be in \[0, 1\]"):
        exact.log_prob(rows["image"], kind="bound", seeds=[0, 1])


BAD = {
    "method.offset=0": "method.offset=0.0: must be in [0.001, 2]",
    "method.sigma_min=3": "method.sigma_min=3.0: must be in (0, sigma_max=2.0)",
    "method.drift=20": "method.drift=20.0: |drift - 0.5| sigma_max^2 must be <= 25",
    "method.drift=nan": "method.drift=nan: must be finite",
    "method.sigma_max=11": "method.sigma_max=11.0: must be <= 10",
    "method.prior=flat": "method.prior=flat: choose from lognormal, lowrank, full",
    "method.anneal=1.5": "method.anneal=1.5: must be in (0, 1]",
    "method.sampler=euler": "method.sampler=euler: choose from ode, dls, ancestral, ums, paper",
}


@pytest.mark.parametrize("word", BAD)
def test_config_refuses(word):
    with pytest.raises(ValueError) as error:
        build(word)
    assert BAD[word] in str(error.value)


def test_log_prob_and_sample_refuse(exact):
    x = batch(1)["image"]
    for options, message in (
        ({"kind": "elbo"}, "kind=elbo: choose from ode, bound"),
        ({"kind": "ode", "trace": "svd"}, "trace=svd: choose from"),
        ({"kind": "ode", "trace": "exact", "probes": 2}, "probes=2: trace=exact draws none"),
    ):
        with pytest.raises(ValueError, match=message):
            exact.log_prob(x, seeds=[0], **options)
    with pytest.raises(ValueError, match="method.offset=0.001: dequantised black"):
        exact_model("method.offset=0.001").log_prob(x, kind="ode", seeds=[0])
    with pytest.raises(ValueError, match="^steps=0: must be >= 1"):
        exact.sample([0], steps=0)
    for options in (
        {"solver": "rk4"},
        {"sampler": "ode", "denoise_last": False},
        {"delta": 1e-4},
        {"sampler": "paper", "grid": "uniform"},
        {"sampler": "ums", "form": "ums"},
    ):
        key, value = list(options.items())[-1]
        with pytest.raises(ValueError, match=f"^{key}={value}: sampler=.* does not take it"):
            exact.sample([0], **options)
    with pytest.raises(ValueError, match="^guidance=2: choose from"):
        exact.sample([0], guidance=2)


@pytest.mark.parametrize("labels", [None, torch.tensor([3, -1])])
def test_a_model_with_classes_asks_for_them(trained, labels):
    """Without one it would be given the embedding of no class, which no training has touched."""
    x = batch(2)["image"]
    kinds = {kind: {"kind": kind, "seeds": [0, 1], "steps": 1} for kind in trained.LIKELIHOODS}
    for call in (
        lambda told: trained.denoise(x, 0.1, told),
        lambda told: trained.score(x, 1, told),
        lambda told: trained.restore(x, "lognormal", 0.1, told),
        lambda told: trained.restore(x, "lognormal", None, told),
        *(lambda told, o=o: trained.log_prob(x, told, **o) for o in kinds.values()),
    ):
        with pytest.raises(ValueError, match="^labels=: this model was trained with a class for"):
            call(labels)
        call(torch.tensor([3, 0]))


def test_restore_is_the_posterior_mean_of_the_log(exact):
    """And the level is found without being told: 64 pixels know a variance to 18 %."""
    clean = batch(300)["image"]
    z = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    sigma = 0.2
    noisy = 2 * (((clean + 1) / 2 + 1) * (sigma * z).exp() - 1) - 1
    restored, _level = exact.restore(noisy, "lognormal", sigma)
    y = ((noisy + 1) / 2 + 1).log()
    expected = exact.from_state(M + V / (V + sigma**2) * (y - M))
    torch.testing.assert_close(restored, expected, rtol=0, atol=1e-5)
    assert (restored - clean).square().mean() < 0.1 * (noisy - clean).square().mean()
    again, found = exact.restore(noisy, "lognormal")
    assert float(found.mean()) == pytest.approx(sigma, rel=0.05)
    assert float(found.std()) < 0.15 * sigma
    assert (again - clean).square().mean() < 1.2 * (restored - clean).square().mean()


def test_trains_resumes_and_exports(train_tiny, tmp_path):
    """Resuming is exact, fitted moments included; an export holds them and needs no data."""
    words = ("checkpoint.every=2", "data.labels=true")
    straight = train_tiny(*words, "trainer.max_steps=6", config="configs/gbm_digits.yaml")
    run = train_tiny(*words, "trainer.max_steps=3", config="configs/gbm_digits.yaml")
    assert train.main([f"resume={run}", "trainer.max_steps=6"]) == 0
    ours, theirs = (read_checkpoint(r / "checkpoints/last.ckpt") for r in (run, straight))
    for part in ("state_dict", "current_model_state"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][k], theirs[part][k]) for k in ours[part]), part
    assert float(ours["state_dict"]["net.mean"]) == pytest.approx(0.2286, abs=1e-3)
    out = checkpoint.export(run, tmp_path / "model")
    assert torch.equal(genmodels.load(out).sample([3]), genmodels.load(run).sample([3]))
    assert "prior.basis" in genmodels.load(out).state_dict()
    assert json.loads((out / "config.json").read_text())["config"]["method"]["name"] == "gbm"


# ------------------------------------------------------------------------------------------------
# Log densities, against log-normals and a mixture of them


def density(x, v, offset=1.0):
    """log p of images whose log(u + offset) is N(M, v), on the [-1, 1] scale, (B,)."""
    positive = (x.double() + 1) / 2 + offset
    law = torch.distributions.LogNormal(M, math.sqrt(v))
    return law.log_prob(positive).flatten(1).sum(1) - 64 * math.log(2)


def test_log_prob_of_a_lognormal():
    """The density that the flow reaches at sigma_min; the divergence is diagonal, so exact."""
    x, seeds = batch(4)["image"], range(4)
    low = exact_model().cfg.method.sigma_min ** 2
    expected = density(x, V + low)
    torch.testing.assert_close(
        exact_model().log_prob(x, kind="ode", seeds=seeds, steps=100), expected, rtol=0, atol=5e-3
    )


def test_log_prob_of_a_mixture():
    """Two log-normals in each pixel; the Gaussian prior fits well enough at sigma_max = 10."""
    model = exact_model("method.sigma_max=10")
    parts = ((0.3, 0.15, 0.05), (0.7, 0.5, 0.025))

    class Mixture(Exact):
        def forward(self, y, sigma, labels=None):
            level = torch.as_tensor(sigma, dtype=torch.float64) ** 2
            y = y.double()
            logs = [
                math.log(w) - (y - m) ** 2 / (2 * (s**2 + level)) - (s**2 + level).log() / 2
                for w, m, s in parts
            ]
            share = torch.softmax(torch.stack(logs), dim=0)
            return y + level * sum(
                r * (m - y) / (s**2 + level) for r, (_, m, s) in zip(share, parts)
            )

    model.net = Mixture()
    mean = sum(w * m for w, m, _ in parts)
    variance = sum(w * (s**2 + (m - mean) ** 2) for w, m, s in parts)
    model.prior.fit(torch.full((64,), mean).double(), variance * torch.eye(64).double())
    u = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    y, low = (u + 1).log(), model.cfg.method.sigma_min**2
    logs = [
        math.log(w) + torch.distributions.Normal(m, math.sqrt(s**2 + low)).log_prob(y)
        for w, m, s in parts
    ]
    expected = (torch.logsumexp(torch.stack(logs), 0) - y).flatten(1).sum(1) - 64 * math.log(2)
    found = model.log_prob(2 * u - 1, kind="ode", seeds=range(3), steps=200)
    # 64 pixels of about 4e-4 nats each, and the prior's misfit.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_bound_is_tight_for_the_exact_model():
    """Its mean over images is that of log p, less the little the last step loses."""
    x = batch(600)["image"]
    bound = exact_model().log_prob(x, kind="bound", seeds=range(600), steps=64)
    gap = density(x, V) - bound
    error = float(gap.std() / 600**0.5)
    assert abs(float(gap.mean())) < 4 * error + 0.02 and error < 0.5
    spoilt = exact_model(gain=0.2)
    assert (spoilt.log_prob(x, kind="bound", seeds=range(600)) - bound).mean() < -10
