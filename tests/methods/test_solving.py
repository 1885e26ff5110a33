"""model.solve: closed forms through the models, seeds, known pixels, settings, deepinv."""

import copy
import math

import pytest
import torch

import genmodels
from genmodels.methods import METHODS
from genmodels.methods.interpolant import Interpolant
from genmodels.methods.solving import UnitDenoiser
from genmodels.networks.precond import Precond
from genmodels.sampling.operators import Blur, Mask, named_operator
from tests.helpers.gaussian import Gaussian
from tests.helpers.paths import ROOT

UNET = (
    *("network.channels=[8,8]", "network.norm_groups=4", "network.layers=1"),
    *("network.attention=[]", "network.head_dim=8", "data.labels=false"),
)
FLOW = ("method.flow_layers=6", "method.flow_width=64")  # the defaults: gaussian takes no others
SMALL = {
    "edm": ("edm_digits", UNET),
    "interpolant": ("interpolant_digits", UNET),
    "gbm": ("gbm_digits", UNET),
    "cdrl": (
        "cdrl_digits",
        *(("network.width=16", "method.steps=2", "method.levels=2", "data.labels=false"),),
    ),
    "energy_matching": (
        "energy_digits",
        ("network.width=16", "data.labels=false", "method.steps=8"),
    ),
    "gedi": ("gedi_mnist_cpu", ()),
    "meco": ("meco_digits", ("network.width=16", "method.noise=gaussian", *FLOW)),
}
HALF = named_operator("inpaint", (1, 8, 8))


@pytest.fixture(scope="module")
def build():
    models = {}

    def one(name):
        if name not in models:
            config, words = SMALL[name]
            models[name] = genmodels.build(str(ROOT / f"configs/{config}.yaml"), *words).eval()
        return models[name]

    return one


@pytest.mark.parametrize("name", SMALL)
def test_known_pixels_are_those_of_y_and_a_picture_depends_on_its_seed_alone(name, build):
    model = build(name)
    half = named_operator("inpaint", model.shape)
    y = torch.rand(1, *model.shape, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    assert model.SOLVERS
    for solver in model.SOLVERS:
        x = model.solve(y, half, noise=0, solver=solver, steps=2, seeds=[5, 2])
        known = half.known.expand(model.shape)
        assert x.shape == (2, *model.shape) and x.dtype == torch.float32
        assert torch.equal(x[:, known], y[:, known].expand(2, -1)) and torch.isfinite(x).all()
        assert not torch.allclose(x[0], x[1], atol=1e-3) and model.nfe >= 2
    # With noise, and another operator.
    small, options = named_operator("downsample:2", model.shape), {"noise": 0.1, "steps": 2}
    x = model.solve(small(y), small, seeds=[5, 2], **options)
    alone = model.solve(small(y), small, seeds=[2], **options)
    torch.testing.assert_close(alone[0], x[1], atol=1e-3, rtol=0)
    assert torch.isfinite(x).all() and not torch.allclose(x[0], x[1], atol=1e-3)


def test_which_methods_solve():
    solving = {name for name, method in METHODS.items() if method.SOLVERS}
    assert solving == {*SMALL, "ddo"}
    model = genmodels.build(str(ROOT / "configs/interpolant_mnist_to_fashion.yaml"))
    with pytest.raises(ValueError, match="^model=Interpolant: solves no inverse problem"):
        model.solve(torch.zeros(1, *model.shape), Mask(torch.ones(1, 1, 1) > 0), noise=0)


def test_white_data_through_edm(build):
    """Of N(0, 0.75^2) the mean is pull(y) and, where nothing is seen, the spread that of data."""
    model = copy.deepcopy(build("edm"))
    model.net = Gaussian(0.75)
    half, noise = HALF, 0.4
    y = half(torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    x = model.solve(y, half, noise=noise, steps=60, seeds=range(100)).double()
    known = half.known.expand(1, 8, 8)
    seen = 0.75 * noise / math.hypot(0.75, noise)
    mean = half.pull(y, noise**2 / 0.75**2)
    assert float((x.mean(0) - mean[0])[known].square().mean().sqrt()) < 1.5 * seen / 10
    for where, spread in ((known, seen), (~known, 0.75)):
        found = float((x - mean)[:, where].square().mean().sqrt())
        assert 0.9 < found / spread < 1.02, (found, spread)


def test_an_interpolant_with_edms_denoiser_solves_alike(build):
    model = build("edm")
    torch.manual_seed(0)
    torch.nn.init.normal_(model.net.net.unet.conv_out.weight, std=0.05)
    other = Interpolant.from_edm(model)
    y = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    blur = named_operator("blur:1", (1, 8, 8))
    a, b = (m.solve(y, blur, noise=0.1, steps=4) for m in (model, other))
    torch.testing.assert_close(a, b, atol=2e-3, rtol=0)
    assert not torch.allclose(a, model.solve(y, blur, noise=0.3, steps=4), atol=2e-3)


class LogNormal(Precond):
    """The exact denoiser of w ~ N(mean, C)."""

    def __init__(self, mean, covariance):
        super().__init__(None)
        self.mean, (self.values, self.vectors) = mean, torch.linalg.eigh(covariance)
        self.sigma_data = covariance.diag().mean().sqrt()

    def forward(self, w, sigma, labels=None):
        along = (w.double().flatten(1) - self.mean) @ self.vectors
        along = along * (self.values / (self.values + sigma.double() ** 2))
        return (self.mean + along @ self.vectors.T).reshape(w.shape).float()


def test_gbm_measures_the_picture_not_its_logarithm(build):
    """Pixels known exactly are their logarithms known: the rest is Gaussian, and its law known."""
    model = copy.deepcopy(build("gbm"))
    model.shape, d = (1, 2, 3), 6
    generator = torch.Generator().manual_seed(0)
    root = 0.12 * torch.randn(d, d, generator=generator).double()
    covariance = root @ root.T + 0.01 * torch.eye(d)
    mean = torch.full((d,), 0.4).double()
    model.net = LogNormal(mean, covariance)
    model.prior = type(model.prior)("full", model.shape)
    model.prior.fit(mean, covariance)
    w = mean + torch.linalg.cholesky(covariance) @ torch.randn(d, generator=generator).double()
    known = torch.tensor([True, True, False] * 2)
    picture = (2 * (w.exp() - model.cfg.method.offset) - 1).float().reshape(1, 1, 2, 3)
    mask = Mask(known.reshape(1, 2, 3))
    x = model.solve(picture, mask, noise=0, seeds=range(400), steps=60)
    made = ((x.double() + 1) / 2 + model.cfg.method.offset).log().flatten(1)
    a, b = covariance[~known][:, known], torch.linalg.inv(covariance[known][:, known])
    expected = mean[~known] + a @ b @ (w - mean)[known]
    left = covariance[~known][:, ~known] - a @ b @ a.T
    off = (made[:, ~known].mean(0) - expected) / left.diag().sqrt()
    ratio = made[:, ~known].var(0) / left.diag()
    torch.testing.assert_close(made[:, known], w[known].expand(400, -1), atol=1e-5, rtol=0)
    assert float(off.abs().max()) < 0.4 and 0.85 < float(ratio.min()) <= float(ratio.max()) < 1.1


def test_a_chain_of_a_gaussian_energy(build):
    """MECO whose f is its q: within 5 standard errors of the exact mean, and its spread."""
    model = copy.deepcopy(build("meco"))
    model.net = Zero()
    model.fit_noise(torch.zeros(64).double(), 0.25 * torch.eye(64).double())
    small, noise = named_operator("downsample:2", (1, 8, 8)), 0.1
    y = small(torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    x = model.solve(y, small, noise=noise, steps=100, step=2.0, seeds=range(100)).double()
    mean = small.pull(y, noise**2 / 0.25).double()
    eye = torch.eye(64).double().reshape(64, 1, 8, 8)
    left = 0.25 * (eye - small.pull(small(eye), noise**2 / 0.25)).flatten(1)
    error = (x.mean(0) - mean[0]).flatten() / left.diag().sqrt()
    ratio = float(x.var(0).sum() / left.diag().sum())
    assert float(error.square().mean()) < 3 / 100 and 0.9 < ratio < 1.1


class Zero(torch.nn.Module):
    def forward(self, x, level, labels=None, dtype=torch.float32):
        return x.flatten(1).sum(dim=1).to(dtype) * 0


def test_a_gaussian_energy_at_all_levels_through_cdrl(build):
    """f of N(0, 0.5^2) and its noise at each level: the ladder ends at the posterior, nearly."""
    model = genmodels.build(
        str(ROOT / "configs/cdrl_digits.yaml"), "network.width=8", "data.labels=false"
    ).eval()

    def variance(rung):
        return rung.scale**2 * (0.25 * rung.cos_clean**2 + rung.sin_clean**2)

    def f(y, rung, labels=None, dtype=torch.float32):
        density = -y.square().flatten(1).sum(dim=1) / (2 * variance(rung))
        return (rung.s**2 * density).to(dtype)

    def initial(x_t, rung, labels, noise, blend=None):
        """A draw of p(y | x_t)."""
        rung = rung.over(x_t)
        a, v = rung.cos / (rung.cos_clean * rung.scale), variance(rung)
        both = a**2 * v + rung.sigma**2
        return a * v / both * x_t + (v * rung.sigma**2 / both).sqrt() * noise

    model.f, model.initial = f, initial
    small, noise = named_operator("downsample:2", (1, 8, 8)), 0.2
    y = small(0.5 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    x = model.solve(y, small, noise=noise, steps=20, seeds=range(100)).double()
    mean = small.pull(y, noise**2 / 0.25).double()
    seen = small(x - mean)
    unseen = x - small.pull(small(x), 0.0)
    exact = 1 / math.sqrt(1 / noise**2 + 1 / (0.25 / 4))
    assert float(seen.mean(0).square().mean().sqrt()) < 0.2 * exact
    assert 0.9 < float(seen.std()) / exact < 1.1
    assert 0.9 < float(unseen.std()) / (0.5 * math.sqrt(48 / 64)) < 1.1


def test_energy_matching_is_pulled_to_y_and_then_exact():
    """V / eps of N(0, 0.5^2): one step lands near y, many have the posterior's mean and spread."""
    words = ["network.width=8", "data.labels=false", "method.eps_max=0.25", "method.steps=4"]
    model = genmodels.build(str(ROOT / "configs/energy_digits.yaml"), *words).eval()

    def potential(x, labels=None, dtype=torch.float32):
        return 0.25 * (x.to(dtype).square() / (2 * 0.25)).flatten(1).sum(dim=1)

    model.potential = potential
    small, noise = named_operator("downsample:2", (1, 8, 8)), 0.2
    y = small(0.4 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    first = model.solve(y, small, noise=0.02, steps=1, seeds=range(20))
    assert float((small(first) - y).square().mean().sqrt()) < 0.05
    x = model.solve(y, small, noise=noise, steps=80, step=0.5, seeds=range(100)).double()
    mean = small.pull(y, noise**2 / 0.25).double()
    exact = 1 / math.sqrt(1 / noise**2 + 4 / 0.25)
    seen = small(x - mean)
    unseen = x - small.pull(small(x), 0.0)
    assert float(seen.mean(0).square().mean().sqrt()) < 0.2 * exact
    assert 0.9 < float(seen.std()) / exact < 1.1
    assert 0.9 < float(unseen.std()) / (0.5 * math.sqrt(48 / 64)) < 1.1, unseen.std()


def test_unit_scale_is_that_of_the_pictures(build):
    model = build("edm")
    small = named_operator("downsample:2", (1, 8, 8))
    u = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    a = model.solve(small(u), small, noise=0.05, steps=4, unit=True)
    b = model.solve(small(2 * u - 1), small, noise=0.1, steps=4)
    torch.testing.assert_close(2 * a - 1, b, atol=1e-5, rtol=0)
    x = model.solve(HALF(u).requires_grad_(), HALF, noise=0, steps=2, unit=True)
    assert torch.equal(x[..., :4], u[..., :4]) and not x.requires_grad


@pytest.mark.parametrize("name", ["cdrl", "energy_matching", "gedi", "meco"])
def test_the_step_of_a_chain_is_the_factor_on_the_models(name, build):
    """So small that nothing is rejected, it wanders by the root of it."""
    model = build(name)
    small = named_operator("downsample:2", model.shape)
    y = small(torch.zeros(1, *model.shape))
    start, near, far = (
        model.solve(y, small, noise=0.5, steps=4, step=step, seeds=[1, 2])
        for step in (1e-9, 1e-4, 4e-4)
    )
    ratio = float((far - start).norm() / (near - start).norm())
    assert 1.8 < ratio < 2.3, ratio


def test_gedis_temperature_is_of_its_energy_alone(build):
    """E / T of N(0, 0.5^2), T = noise_scale^2 / (2 step): posterior's mean and spread."""
    model = copy.deepcopy(build("gedi"))
    model.shape, cfg = (1, 4, 4), model.cfg.method
    heat = cfg.noise_scale**2 / (2 * cfg.step)
    model._energy = lambda x, labels: heat * x.square().flatten(1).sum(dim=1) / (2 * 0.25)
    small, noise = named_operator("downsample:2", model.shape), 0.2
    y = small(0.5 * torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(1)))
    factor = 0.03 / (cfg.step * heat)
    x = model.solve(y, small, noise=noise, steps=60, step=factor, seeds=range(200)).double()
    seen, unseen = small(x - small.pull(y, noise**2 / 0.25)), x - small.pull(small(x), 0.0)
    exact = 1 / math.sqrt(1 / noise**2 + 4 / 0.25)
    assert float(seen.mean(0).square().mean().sqrt()) < 0.2 * exact
    assert 0.9 < float(seen.std()) / exact < 1.1
    assert 0.9 < float(unseen.std()) / (0.5 * math.sqrt(12 / 16)) < 1.1


@pytest.mark.parametrize("name", ["cdrl", "energy_matching"])
def test_labels_reach_the_energy(name):
    config, words = SMALL[name]
    words = [word for word in words if word != "data.labels=false"]
    model = genmodels.build(str(ROOT / f"configs/{config}.yaml"), *words, "data.labels=true").eval()
    torch.manual_seed(0)
    for parameter in model.net.parameters():  # some begin at zero
        torch.nn.init.normal_(parameter, std=0.05)
    y = torch.zeros(1, 1, 4, 4)
    small, options = named_operator("downsample:2", (1, 8, 8)), {"noise": 0.1, "steps": 2}
    none, minus, three = (model.solve(y, small, labels=c, **options) for c in (None, -1, 3))
    assert torch.equal(none, minus) and not torch.allclose(none, three, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"solver": "langevin"}, "solver=langevin: EDM has pigdm, diffpir, dps; choose from these"),
        ({"solver": "ddrm"}, "solver=ddrm: EDM has pigdm, diffpir, dps; choose from these"),
        ({"zeta": 1.0}, "zeta=1.0: solver=pigdm does not take it; leave it out"),
        ({"solver": "dps", "eta": 0.5}, "eta=0.5: solver=dps does not take it"),
        ({"solver": "diffpir", "step": 2.0}, "step=2.0: solver=diffpir does not take it"),
        ({"steps": 0}, "steps=0: must be >= 1"),
        ({"noise": -0.1}, "noise=-0.1: must be >= 0 and finite"),
        ({"noise": math.nan}, "noise=nan: must be >= 0 and finite"),
        ({"seeds": [1, 2, 3]}, "y=(2, 1, 8, 8): this operator measures (1 or 3, 1, 8, 8)"),
        ({"seeds": [0, -1]}, "seeds=-1: must be in [0, 2^63)"),
        ({"labels": 3}, "labels=3: this model is unconditional"),
        (
            {"y": torch.zeros(1, 1, 4, 4)},
            "y=(1, 1, 4, 4): this operator measures (1 or 1, 1, 8, 8)",
        ),
        ({"y": torch.full((1, 1, 8, 8), math.nan)}, "y=nan: its values must be finite"),
        ({"y": torch.zeros(1, 1, 8, 8).byte()}, "y=torch.uint8: must be floats, of pictures on"),
        ({"operator": abs}, "operator=builtin_function_or_method: needs __call__ and adjoint"),
    ],
)
def test_what_cannot_be_is_one_line(build, options, line):
    given = {"y": torch.zeros(2, 1, 8, 8), "operator": HALF, "noise": 0.1} | options
    with pytest.raises(ValueError) as error:
        build("edm").solve(given.pop("y"), given.pop("operator"), **given)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_an_energy_needs_noise_and_latents_are_refused(build):
    blur = named_operator("blur", (1, 8, 8))
    with pytest.raises(ValueError, match=r"^noise=0: an energy needs noise > 0, or an operator"):
        build("energy_matching").solve(torch.zeros(1, 1, 8, 8), blur, noise=0)
    model = copy.deepcopy(build("edm"))
    model.cfg.data.vae.mean = [0.0]
    with pytest.raises(ValueError, match=r"^model=EDM: makes no pictures"):
        model.solve(torch.zeros(1, 1, 8, 8), blur, noise=0.1)
    with pytest.raises(ValueError, match=r"^model=EDM: makes no pictures"):
        UnitDenoiser(model)


def test_labels_of_a_conditional_model():
    words = [*UNET[:-1], "data.labels=true"]
    model = genmodels.build(str(ROOT / "configs/edm_digits.yaml"), *words).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.net.net.unet.conv_out.weight, std=0.05)
    torch.nn.init.normal_(model.net.net.unet.class_embedding.weight)
    y = torch.zeros(1, 1, 8, 8)
    none, minus, three = (
        model.solve(y, HALF, noise=0, steps=3, labels=labels) for labels in (None, -1, 3)
    )
    assert torch.equal(none, minus) and not torch.allclose(none, three, atol=1e-4)
    with pytest.raises(ValueError, match=r"^labels=\[10\]: must be in 0..9"):
        model.solve(y, HALF, noise=0, steps=3, labels=10)
    words = [*words, "method.label_dropout=0"]
    strict = genmodels.build(str(ROOT / "configs/edm_digits.yaml"), *words).eval()
    with pytest.raises(ValueError, match="trained with a class for every image"):
        strict.solve(y, HALF, noise=0, steps=3)


def test_a_model_as_deepinvs_denoiser_is_its_own_on_another_scale(build):
    model = build("edm")
    denoiser = UnitDenoiser(model)
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = (model.denoise(2 * x - 1, torch.tensor([0.1, 0.4])) + 1) / 2
    torch.testing.assert_close(denoiser(x, torch.tensor([0.05, 0.2]).reshape(2, 1, 1, 1)), expected)
    torch.testing.assert_close(denoiser(x, 0.05)[0], expected[0])
    grey = genmodels.load(ROOT / "pretrained/noise2score_grey")  # of any size
    x = torch.rand(2, 1, 20, 30, generator=torch.Generator().manual_seed(0))
    restored = grey.restore(2 * x - 1, "gaussian", 25.5, clip=False)[0]
    torch.testing.assert_close(UnitDenoiser(grey)(x, 0.1), (restored + 1) / 2)
    with pytest.raises(ValueError, match="^model=CDRL: is no denoiser of Gaussian noise"):
        UnitDenoiser(build("cdrl"))
    with pytest.raises(ValueError, match="^model=GBM: is no denoiser of Gaussian noise"):
        UnitDenoiser(build("gbm"))


@pytest.fixture(scope="module")
def deepinv():
    return pytest.importorskip("deepinv", reason="pip install deepinv, in an environment apart")


def test_deepinvs_physics_measure_as_ours(build, deepinv):
    """Its inpainting, blur and downsampling: the operator that ours is, or that it is itself."""
    model, shape = build("edm"), (1, 8, 8)
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    known = HALF.known.float()
    inpainting = deepinv.physics.Inpainting(shape, mask=known)
    ours, theirs = (
        model.solve(inpainting.A(x), a, noise=0.05, steps=4, unit=True, seeds=[3])
        for a in (HALF, inpainting)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    kernel = torch.tensor([[0.0, 0.1, 0.0], [0.1, 0.6, 0.1], [0.0, 0.1, 0.0]])
    blur = deepinv.physics.BlurFFT(shape, filter=kernel[None, None])
    ours, theirs = (
        model.solve(blur.A(x), a, noise=0.05, steps=4, unit=True, seeds=[3])
        for a in (Blur(kernel, 8, 8), blur)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # Its noise is no part of A, and A_dagger is asked where there is no noise.
    noisy = deepinv.physics.Downsampling(
        shape, factor=2, filter="bicubic", noise_model=deepinv.physics.GaussianNoise(0.1)
    )
    y = noisy.A(x)
    made = model.solve(y, noisy, noise=0, steps=30, unit=True, seeds=[3], solver="diffpir")
    torch.testing.assert_close(noisy.A(made), y, atol=2e-3, rtol=0)


def test_a_model_is_a_denoiser_in_deepinvs_algorithms(build, deepinv):
    """Plug-and-play on white data, whose denoiser is a factor: the fixed point is known."""
    model = copy.deepcopy(build("edm"))
    model.net = Gaussian(0.75)
    physics = deepinv.physics.Denoising(deepinv.physics.GaussianNoise(0.1))
    y = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    algorithm = deepinv.optim.optim_builder(
        iteration="PGD",
        prior=deepinv.optim.PnP(denoiser=UnitDenoiser(model)),
        data_fidelity=deepinv.optim.L2(),
        max_iter=200,
        params_algo={"stepsize": 0.5, "g_param": 0.2},
    )
    found = algorithm(y, physics)
    shrink = 0.75**2 / (0.75**2 + 0.4**2)  # sigma 0.2 on [0, 1]
    # u <- shrink (u + (y - u) / 2) on the scale about grey
    expected = shrink / 2 * (2 * y - 1) / (1 - shrink / 2)
    torch.testing.assert_close(2 * found - 1, expected, atol=1e-3, rtol=0)
