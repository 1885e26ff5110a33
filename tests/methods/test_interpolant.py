"""Interpolants: losses whose minimum is known, EDM in both directions, sources, couplings, DDO."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import genmodels
import train
from genmodels import seeding
from genmodels.checkpoint import read_checkpoint
from genmodels.config import DataConfig
from genmodels.data import ImageDataModule
from genmodels.kernels.philox import philox_normal
from genmodels.methods.ddo import Discriminative, DiscriminativeConfig, Frozen
from genmodels.methods.edm import EDM
from genmodels.methods.interpolant import Interpolant
from genmodels.sampling.interpolant import Interpolation
from genmodels.sampling.likelihood import log_normal
from genmodels.seeding import Stream
from tests.helpers.paths import ROOT
from tests.helpers.runs import assert_same, rows, state

DIGITS = str(ROOT / "configs/interpolant_digits.yaml")
TOY = str(ROOT / "configs/interpolant_toy.yaml")
TINY = (
    "network.channels=[16,16]",
    "network.norm_groups=8",
    "network.layers=1",
    "network.attention=[]",
    "network.head_dim=8",
)
PLANE = ("network.width=16", "network.layers=1", "network.stem_scale=1")
ALONE = (*PLANE, "data.source=", "method.gamma_a=1")  # noise in place of the other set


def build(config, *words, random=True):
    """Return a small model in eval mode with weights that are not zero anywhere."""
    torch.manual_seed(0)
    model = genmodels.build(config, *words).eval()
    if random:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch_of(model, count, spread=0.7, seed=99, **more):
    n = torch.arange(count)
    data = spread * philox_normal(model.shape, seed, n, stream=int(Stream.IMAGE))
    labels = n % model.classes if model.classes else torch.full((count,), -1)
    return {"image": data, "label": labels, "n": n} | more


# ------------------------------------------------------------------------------------------------
# Losses. Data N(0, 0.49), source N(0, 1): the fields are linear in x, with gains written out here.


def gains(path, t, start=1.0, end=0.49):
    """Return {field: its slope in x} of centred Gaussians, float32 like t."""
    c = path.at(t.double())
    var = c.alpha**2 * start + c.beta**2 * end + c.gamma**2
    v = c.alpha * c.d_alpha * start + c.beta * c.d_beta * end
    rows = {
        "v": v / var,
        "b": (v + c.gamma_d_gamma) / var,
        "eta": c.gamma / var,
        "s": -1 / var,
        "denoiser": c.beta * end / var,
    }
    return {name: row.float() for name, row in rows.items()}


LEARNED = [
    ("one_sided_linear", "zero", "b"),
    ("one_sided_linear", "zero", "denoiser"),
    ("one_sided_trig", "zero", "eta"),
    ("linear", "zero", "b"),
    ("linear", "brownian", "b,eta"),
    ("trig", "sin2", "v,s"),
    ("encdec", "sin2", "b,eta"),
    ("mirror", "sigmoid", "s"),
]


@pytest.mark.parametrize(
    ("path", "gamma", "learns", "antithetic"),
    [
        (*case, antithetic)
        for case in LEARNED
        for antithetic in ("false", "true")
        if (*case, antithetic) != ("linear", "zero", "b", "true")  # there is no z; refused
    ],
)
def test_each_target_has_its_field_for_a_mean(path, gamma, learns, antithetic):
    """What is left of target - field is uncorrelated with every function of x_t and t."""
    words = (f"method.{k}={v}" for k, v in {"path": path, "gamma": gamma}.items())
    ends = ("method.t_min=0.02", "method.t_max=0.98")
    more = (f"method.learns=[{learns}]", f"method.antithetic={antithetic}", *ends)
    sde = ("method.sampler=sde",) if path == "mirror" else ()
    model = build(TOY, *ALONE, *words, *more, *sde)
    x_t, t, targets = model._states(batch_of(model, 8000))
    fields, count = gains(model.path, t), len(t) // 8000
    assert set(targets) == set(learns.split(","))
    for name, target in targets.items():
        rest = (target - fields[name].reshape(-1, 1, 1, 1) * x_t).flatten(1)
        for probe in (x_t.flatten(1), x_t.flatten(1) * t[:, None], x_t.flatten(1) ** 3):
            product = (rest * probe).mean(dim=1).reshape(count, -1).mean(dim=0)  # over z and -z
            assert abs(float(product.mean())) < 4.5 * float(product.std()) / len(product) ** 0.5


class Linear(nn.Module):
    """The exact fields of Gaussians in the place of the network."""

    def __init__(self, model, start=1.0, end=0.49):
        super().__init__()
        self.model, self.variances = model, (start, end)

    def forward(self, x, t, labels=None):
        slopes = gains(self.model[0].path, t, *self.variances)
        names = self.model[0].cfg.method.learns
        return torch.cat([slopes[name].reshape(-1, 1, 1, 1) * x for name in names], dim=1).float()


def test_the_smallest_loss_is_the_variance_that_is_left():
    """E |target - field|^2 = Var(target) - slope^2 Var(x_t), a mean over t; for each element."""
    model = build(TOY, *ALONE, *ONE, "method.antithetic=false")
    model.net = Linear([model])
    value = float(model.loss(batch_of(model, 50_000))[1]["loss"])
    t = torch.linspace(1e-3, 0.999, 100_001, dtype=torch.float64)
    var = 0.49 * t**2 + (1 - t) ** 2
    left = (1.49 - (0.49 * t - (1 - t)) ** 2 / var).mean()
    assert value == pytest.approx(float(left), rel=0.01)


@pytest.mark.parametrize("t", [1e-2, 1e-3, 1e-4])
def test_antithetic_takes_the_variance_away_that_gamma_brings(t):
    """Of -target . x_t, whose slope in the weight of a linear b it is; x_0 and x_1 on the line."""
    path, n = Interpolation("linear", "brownian"), 100_000
    generator = torch.Generator().manual_seed(0)
    x0, x1, z = torch.randn(3, n, dtype=torch.float64, generator=generator)
    c = path.at(torch.tensor(t, dtype=torch.float64))

    def slope(z):
        return (path.targets(c, x0, x1, z)["b"]) * (c.alpha * x0 + c.beta * x1 + c.gamma * z)

    plain, both = slope(z), (slope(z) + slope(-z)) / 2
    assert float(plain.mean()) == pytest.approx(
        float(both.mean()), abs=5 * float(plain.std()) / n**0.5
    )
    assert float(plain.var()) > 0.2 / t  # E (gamma' z x_0)^2 = 1 / 4t
    assert float(both.var()) < 6


def test_noise_and_times_are_functions_of_seed_and_n():
    model = build(TOY, *ALONE, "method.coupling=independent")
    batch = batch_of(model, 6)
    part = {key: value[2:4] for key, value in batch.items()}
    whole, some = model._states(batch), model._states(part)
    both = torch.tensor([2, 3, 8, 9])  # z and -z
    assert torch.equal(whole[0][both], some[0]) and torch.equal(whole[1][both], some[1])
    other = build(TOY, *ALONE, "seed=1")._states(batch)
    assert not torch.isclose(whole[1], other[1]).any()


def test_times_of_training():
    uniform = build(TOY, *ALONE)._times(torch.arange(20_000))
    assert float(uniform.min()) >= 1e-3 and float(uniform.max()) <= 0.999
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    words = ("method.times=logit_normal", "method.logit_mean=1.2", "method.logit_std=0.5")
    skewed = build(TOY, *ALONE, *words)._times(torch.arange(20_000))
    logits = (skewed / (1 - skewed)).log()
    assert float(logits.mean()) == pytest.approx(1.2, abs=0.02)
    assert float(logits.std()) == pytest.approx(0.5, abs=0.02)


# ------------------------------------------------------------------------------------------------
# Density and samples of known fields


def test_log_density_of_a_gaussian():
    """d log rho / dt = -div b along the flow, by a hundred steps; N(0, 0.49)."""
    words = ("method.antithetic=false", "method.t_min=0", "method.t_max=1")
    model = build(TOY, *ALONE, *ONE, *words)
    model.net = Linear([model])
    x = 0.7 * torch.randn(3, *model.shape, dtype=torch.float64)
    found = model.log_prob(x, seeds=[0, 1, 2], steps=100, trace="exact")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, log_normal(x, 0.7), rtol=0, atol=2.8e-4)
    hutchinson = model.log_prob(x, seeds=[0, 1, 2], steps=100)  # exact for a diagonal Jacobian
    torch.testing.assert_close(hutchinson, found, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("path", "gamma"), [("linear", "brownian"), ("one_sided_trig", "zero")])
@pytest.mark.parametrize("sampler", ["heun", "sde"])
def test_samples_have_the_variance_of_the_data(path, gamma, sampler):
    learns = "b" if "one_sided" in path else "b,eta"
    words = (f"method.path={path}", f"method.gamma={gamma}", f"method.learns=[{learns}]")
    plain = ("method.antithetic=false", "method.eps=0.5")
    model = build(TOY, *ALONE, *words, *plain)
    model.net = Linear([model])
    x = model.sample(range(4000), sampler=sampler, steps=60)
    # A last step to the mean leaves out what is not known of x_1, 1 % of the variance at most.
    assert float(x.var()) == pytest.approx(0.49, rel=0.05)
    assert model.nfe == (119 if sampler == "heun" else 60)


def test_an_image_depends_on_its_seed_alone():
    model = build(DIGITS, *TINY)
    for options in ({}, {"sampler": "sde"}):
        whole = model.sample([3, 4, 5], steps=2, **options)
        alone = model.sample([4], steps=2, **options)
        torch.testing.assert_close(alone, whole[1:2], rtol=0, atol=1e-5)
        assert (whole[0] - whole[1]).abs().max() > 0.1


def test_guidance_moves_away_from_the_field_without_a_label():
    model = build(DIGITS, *TINY)
    x, t, labels = torch.randn(2, *model.shape), torch.full((2,), 0.4), torch.tensor([3, 5])
    own = model.known(x, t, labels)["b"]
    none = model.known(x, t, torch.tensor([-1, -1]))["b"]
    assert (own - none).abs().max() > 1e-3
    guided = model._guided(x, 0.4, labels, 3.0)["b"]
    torch.testing.assert_close(guided, none + 3 * (own - none), rtol=1e-4, atol=1e-5)
    assert model.sample([0, 1], labels=[3, 5], steps=4, guidance=2.0).shape == x.shape
    assert model.nfe == 14  # Heun's 7, each of two


# ------------------------------------------------------------------------------------------------
# To and from EDM


EDM_WORDS = ("method.precond=edm", "method.sigma_data=0.75", "method.learns=[denoiser]")


def test_learning_the_denoiser_is_edm_itself():
    """The same weights, images, noise levels and noise: the same loss."""
    edm = build(str(ROOT / "configs/edm_digits.yaml"), *TINY)
    words = ("method.logit_mean=1.2", "method.logit_std=1.2", "method.t_max=0.9999")
    interpolant = build(DIGITS, *TINY, *EDM_WORDS, *words)
    interpolant.load_state_dict(edm.state_dict())
    batch = batch_of(edm, 64)
    with torch.no_grad():
        expected, found = edm.loss(batch)[0], interpolant.loss(batch)[0]
    assert float(expected) > 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_an_edm_samples_as_an_interpolant():
    """One step of Euler's is the same number in sigma and in t: y' - D = (y - D) sigma'/sigma."""
    edm = build(str(ROOT / "configs/edm_digits.yaml"), *TINY)
    made = Interpolant.from_edm(edm)
    expected = edm.sample([0, 1], labels=[3, 4], steps=8, sampler="euler")
    found = made.sample([0, 1], labels=[3, 4], steps=8, sampler="euler")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    for path in ("one_sided_linear", "one_sided_trig"):
        made = Interpolant.from_edm(edm, path=path)
        x, sigma = torch.randn(3, *edm.shape), torch.tensor([0.01, 0.5, 20.0])
        labels = torch.tensor([1, 2, -1])
        for call in ("denoise", "score"):
            expected = getattr(edm, call)(x, sigma, labels)
            torch.testing.assert_close(
                getattr(made, call)(x, sigma, labels), expected, rtol=1e-3, atol=1e-4
            )
    again = made.to_edm()
    assert type(again) is EDM and again.cfg.method.precond == "edm"
    torch.testing.assert_close(again.denoise(x, sigma), edm.denoise(x, sigma), rtol=0, atol=0)


@pytest.mark.parametrize("path", ["one_sided_linear", "one_sided_trig"])
def test_an_interpolant_samples_as_an_edm(path):
    model = build(DIGITS, *TINY, f"method.path={path}", "method.t_min=0.01")
    edm = model.to_edm()
    assert type(edm) is EDM
    x, sigma, labels = (
        torch.randn(3, *edm.shape),
        torch.tensor([0.01, 0.5, 20.0]),
        torch.tensor([1, 2, -1]),
    )
    torch.testing.assert_close(
        edm.denoise(x, sigma, labels), model.denoise(x, sigma, labels), rtol=1e-3, atol=1e-4
    )
    options = {"labels": [3, 4], "steps": 5, "sampler": "euler"}
    found = edm.sample([0, 1], **options)
    if path == "one_sided_linear":
        expected = model.sample([0, 1], grid="edm", **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["one_sided_linear", "one_sided_trig"])
def test_with_many_steps_both_end_at_the_same_images(path):
    model = build(DIGITS, *TINY, f"method.path={path}", "method.t_min=0.01")
    edm, options = model.to_edm(), {"labels": [3, 4], "sampler": "heun"}
    fine = edm.sample([0, 1], steps=50, **options)
    found = model.sample([0, 1], steps=50, grid="edm", **options)
    torch.testing.assert_close(found, fine, rtol=0, atol=0.02)
    coarse = model.sample([0, 1], steps=4, grid="edm", **options)
    assert (coarse - fine).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("path", ["one_sided_linear", "one_sided_trig"])
def test_both_have_the_same_density(path):
    """On the plane: along sigma, and along t."""
    model = build(TOY, *ALONE, *ONE, "method.antithetic=false", f"method.path={path}")
    edm = model.to_edm()
    x, options = torch.randn(4, *model.shape), {"seeds": range(4), "trace": "exact"}
    expected = model.log_prob(x, steps=40, **options)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(edm.log_prob(x, steps=60, **options), expected, rtol=0, atol=0.02)


def test_an_exported_conversion_is_read_again(tmp_path):
    edm = build(str(ROOT / "configs/edm_digits.yaml"), *TINY)
    Interpolant.from_edm(edm).save_pretrained(tmp_path / "model")
    model = genmodels.load(tmp_path / "model")
    assert isinstance(model, Interpolant)
    expected = edm.sample([5], labels=[2], steps=4, sampler="euler")
    torch.testing.assert_close(
        model.sample([5], labels=[2], steps=4, sampler="euler"), expected, rtol=0, atol=1e-4
    )


def test_what_is_no_edm_is_refused():
    model = build(TOY, *PLANE)
    with pytest.raises(ValueError, match=r"^method.learns=\['b', 'eta'\]: is no EDM"):
        model.to_edm()
    with pytest.raises(ValueError, match="^method.path=linear: denoises nothing"):
        model.denoise(torch.zeros(1, *model.shape), 0.5)


# ------------------------------------------------------------------------------------------------
# Fields as a user asks for them


def test_velocity_and_score_of_a_known_path():
    model = build(TOY, *ALONE)
    model.net = Linear([model])
    x, t = torch.randn(4, *model.shape), torch.tensor([0.1, 0.4, 0.5, 0.9])
    slopes = gains(model.path, t)
    for call, name in ((model.velocity, "b"), (model.path_score, "s")):
        torch.testing.assert_close(call(x, t), slopes[name].reshape(-1, 1, 1, 1) * x)
    for bad in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="^t=: must be in"):
            model.velocity(x, bad)
    velocity_alone = build(TOY, *ALONE, "method.learns=[b]")
    with pytest.raises(ValueError, match="does not give the score"):
        velocity_alone.path_score(x, t)


def test_there_and_back():
    model = build(TOY, *PLANE)
    x = torch.rand(5, *model.shape) - 0.5
    options = {"steps": 60, "sampler": "rk4", "grid": "uniform"}
    there = model.transport(x, **options)
    back = model.transport(there, reverse=True, **options)
    assert (there - x).abs().max() > 0.05
    torch.testing.assert_close(back, x, rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="^sampler=sde: "):
        model.transport(x, reverse=True, sampler="sde")


# ------------------------------------------------------------------------------------------------
# Sources and couplings


def toy_data(**settings):
    cfg = DataConfig(name="moons", source="eight_gaussians", points=300, batch_size=8, **settings)
    return ImageDataModule(cfg, seed=3)


class Stage:
    training = True


def test_images_of_the_source_come_by_seed_and_n():
    data = toy_data()
    data.trainer = Stage()
    n = torch.arange(2000)
    batch = data.on_after_batch_transfer({"image": torch.zeros(2000, 2, 1, 1), "n": n}, 0)
    source = batch["source"]
    part = data.on_after_batch_transfer({"image": torch.zeros(3, 2, 1, 1), "n": n[40:43]}, 0)
    assert torch.equal(part["source"], source[40:43])
    rows_of = {tuple(row) for row in data.sources["train"].flatten(1).tolist()}
    seen = {tuple(row) for row in source.flatten(1).tolist()}
    assert seen <= rows_of and len(seen) > 0.99 * len(rows_of)  # 1 - e^(-2000/300)
    Stage.training = False
    held_out = data.on_after_batch_transfer({"image": torch.zeros(9, 2, 1, 1), "n": n[:9]}, 0)
    Stage.training = True
    test_rows = {tuple(row) for row in data.sources["test"].flatten(1).tolist()}
    assert {tuple(row) for row in held_out["source"].flatten(1).tolist()} <= test_rows
    assert "+" in data.cfg.fingerprint
    with pytest.raises(ValueError, match="^data.fingerprint=.*put that back"):
        toy_data(fingerprint=data.cfg.fingerprint.replace("+300", "+299"))


def test_what_is_no_source_is_refused():
    for settings, line in (
        ({"source": "digits"}, r"^data.source=digits: holds images \(1, 8, 8\)"),
        ({"source": "tree"}, "^data.source=tree: choose from"),
        ({"source": "circles", "source_root": "x"}, "^data.source_root=x: circles does not"),
        ({"source_root": "x"}, "^data.source_root=x: needs data.source"),
    ):
        with pytest.raises(ValueError, match=line):
            ImageDataModule(DataConfig(name="moons", points=20, **settings))
    with pytest.raises(ValueError, match=r"^data.source=moons: method.name=edm starts from noise"):
        genmodels.build(str(ROOT / "configs/edm_digits.yaml"), "data.source=moons")


def test_sampling_begins_at_the_images_of_the_source():
    model = build(TOY, *PLANE)
    images = torch.rand(3, *model.shape)
    first = []
    model.net = Still()
    moved = model.sample([0, 1, 2, 3], source=images, sampler="euler", steps=2)
    assert torch.equal(moved, images[[0, 1, 2, 0]])
    held_out = toy_data().sources["test"]
    model.cfg.data.points = 300
    assert torch.equal(model.sample([4], sampler="euler", steps=2), held_out[4:5])
    named = model.sample([1], source="circles:train", sampler="euler", steps=2)
    assert float(named.flatten(1).norm()) == pytest.approx(0.6, abs=0.35) and not first
    with pytest.raises(ValueError, match="^source=.*must be images of shape"):
        model.sample([0], source=torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="^source=moons: this model begins at noise"):
        build(DIGITS, *TINY).sample([0], source="moons")
    with pytest.raises(ValueError, match="its density is not known"):
        model.log_prob(images, seeds=[0, 1, 2])


class Still(nn.Module):
    """No velocity and no noise."""

    def forward(self, x, t, labels=None):
        return torch.zeros(len(x), 2 * x.shape[1], 1, 1)


def test_transport_within_the_batch_pairs_the_nearest():
    """Sorted noise goes to sorted data on the line, and the noise itself stays what it is."""
    words = ("method.learns=[b]", "method.gamma=zero", "method.antithetic=false")
    model = build(TOY, *PLANE, "data.source=", "method.gamma_a=1", *words, "method.coupling=ot")
    batch = batch_of(model, 32)
    batch["image"][:, 1] = 0
    x_t, t, targets = model._states(batch)
    noise = (x_t - t.reshape(-1, 1, 1, 1) * targets["b"]).flatten(1)  # x_0 = x_t - t (x_1 - x_0)
    plain = philox_normal(model.shape, 0, batch["n"], stream=int(Stream.NOISE)).flatten(1)
    assert torch.allclose(noise.sort(dim=0).values, plain.sort(dim=0).values, atol=1e-5)
    order = batch["image"][:, 0, 0, 0].argsort()
    # On a line optimal pairs are monotone; the second coordinate of the data is 0 for all.
    assert (noise[order, 0].diff() > -1e-5).all()
    assert not (plain[order, 0].diff() > 0).all()


# ------------------------------------------------------------------------------------------------
# What makes no sense

FLOW = ("path=one_sided_linear", "gamma=zero", "gamma_a=1", "learns=[b]")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("path=one_sided_linear", "learns=[b]"),
            "method.gamma=brownian: path=one_sided_linear has",
        ),
        (("gamma=zero", "gamma_a=1"), "method.learns="),
        (("learns=[v]",), "method.learns="),
        (("gamma=zero",), "method.gamma_a=0.25: goes with"),
        (
            ("path=trig", "gamma=sin2", "gamma_a=2"),
            "method.gamma_a=2.0: path=trig needs gamma <= 1",
        ),
        (("path=mirror", "learns=[eta]", "coupling=ot", "sampler=sde"), "method.coupling=ot"),
        (("path=mirror", "learns=[eta]"), "method.sampler=heun: the ODE of path=mirror"),
        (
            ("path=mirror", "learns=[eta]", "sampler=sde"),
            "data.source=eight_gaussians: method.path",
        ),
        (("t_min=0",), "method.t_min=0.0: a field is infinite"),
        (("t_max=1",), "method.t_max=1.0: a field is infinite"),
        (("grid=edm",), "method.grid=edm: needs a one_sided path"),
        (("learns=[b]", "sampler=sde"), "method.sampler=sde: an SDE needs the score"),
        (("diffusion=sbdm",), "method.diffusion=sbdm: needs a one_sided path"),
        ((*FLOW, "diffusion=sbdm", "grid=uniform"), "method.diffusion=sbdm: is strong at first"),
        ((*FLOW, "t_max=1", "sampler=sde", "antithetic=false"), "method.t_max=1.0: the score is"),
        (("logit_std=2",), "method.logit_std=2.0: goes with method.times=logit_normal"),
        (("sigma_data=0.6",), "method.sigma_data=0.6: goes with method.learns=denoiser"),
        (("guidance=2",), "method.guidance=2.0: needs a conditional model"),
        (("gamma=zero", "gamma_a=1", "learns=[b]"), "method.antithetic=True: there is no z"),
    ],
)
def test_settings_that_contradict_each_other_are_one_line(words, line):
    with pytest.raises(ValueError) as error:
        genmodels.build(TOY, *(f"method.{word}" for word in words))
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_options_of_an_sde_are_not_ignored():
    model = build(DIGITS, *TINY)
    with pytest.raises(ValueError, match="^eps=0.5: sampler=heun draws no noise"):
        model.sample([0], eps=0.5)
    assert model.sample([0], eps=0.5, sampler="sde", steps=2).shape == (1, *model.shape)


# ------------------------------------------------------------------------------------------------
# DDO on top


def test_a_model_against_itself_has_a_log_ratio_of_exactly_zero():
    for words in (EDM_WORDS, ("method.antithetic=true",)):
        model, batch = build(DIGITS, *TINY, *words), None
        batch = batch_of(model, 6)
        delta, logs = model.log_ratio(batch, model)
        assert delta.shape == (6,) and not delta.any()
        assert set(logs) == {"flow_loss"} and logs["flow_loss"].shape == (6,)
        other = build(DIGITS, *TINY, *words, random=False)
        delta, _ = model.log_ratio(batch, other)
        with torch.no_grad():  # the difference of the two losses, summed over the batch
            own, its = (float(m.loss(batch)[0]) for m in (model, other))
        assert float(delta.mean().detach()) == pytest.approx(its - own, rel=1e-3)
    with pytest.raises(ValueError, match="has no log-ratio"):
        build(TOY, *PLANE).log_ratio(batch, model)


def test_ddo_of_a_flow_starts_at_its_known_value_and_tells_data_from_fakes():
    model, reference = (build(TOY, *ALONE, *ONE) for _ in range(2))

    class Sharpened(Discriminative, Interpolant):
        pass

    model.__class__, model.frozen = Sharpened, Frozen(reference)
    settings = {"alphas": [2.0], "betas": [1.0], "beta_unit": "sum", "normalize": False}
    for name, value in settings.items():
        assert name in {field.name for field in dataclasses.fields(DiscriminativeConfig)}
        setattr(model.cfg.method, name, value)
    batch = batch_of(model, 64, 0.1)
    batch |= {"fake": batch["image"] + 1, "fake_label": batch["label"]}
    model.train()
    loss, logs = model.loss(batch)
    assert float(loss.detach()) == pytest.approx(3 * math.log(2), rel=1e-6)
    assert float(logs["accuracy"]) == 0.5
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss, logs = model.loss(batch)
        loss.backward()
        optimizer.step()
    assert float(logs["delta_real"]) > float(logs["delta_fake"]) + 0.05
    assert float(logs["accuracy"]) > 0.6


ONE = ("method.path=one_sided_linear", "method.gamma=zero", "method.learns=[b]")


# ------------------------------------------------------------------------------------------------
# Through the scripts


def test_a_training_that_was_cut_is_the_same_training(tmp_path):
    """From one set of points to another, pairs by optimal transport, held-out losses on the way."""
    words = [
        TOY,
        str(ROOT / "configs/debug.yaml"),
        *PLANE,
        "data.points=60",
        "data.batch_size=8",
        "method.coupling=ot",
        "method.steps=2",
        "trainer.progress=false",
        "trainer.loggers=csv",
        "trainer.log_every=1",
        "sample.every=3",
        "sample.num=4",
        "eval.loss_every=3",
        "optim.decay=none",
    ]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert train.main([*words, f"out_dir={straight}", "trainer.max_steps=6"]) == 0
    assert train.main([*words, f"out_dir={cut}", "trainer.max_steps=2"]) == 0
    (folder,) = cut.glob("*/*")
    assert train.main([f"resume={folder}", "trainer.max_steps=6"]) == 0
    (whole,) = straight.glob("*/*")
    assert_same(state(folder), state(whole))
    assert rows(folder) == rows(whole)
    assert any(row.get("val/loss") for row in rows(whole))
    assert any(row.get("train/loss_eta") for row in rows(whole))
    pictures = [sorted(p.read_bytes() for p in f.glob("samples/*")) for f in (folder, whole)]
    assert pictures[0] == pictures[1] and pictures[0]
    plain = read_checkpoint(whole)["hyper_parameters"]["config"]
    assert plain["data"]["source"] == "eight_gaussians"
    assert seeding.Stream.SOURCE == 45  # a promise: runs are resumed by it
