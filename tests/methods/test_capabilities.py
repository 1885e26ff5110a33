"""A method does what it declares, and its settings refuse what lies outside their limits."""

import copy
import dataclasses
import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import genmodels
from genmodels import generation
from genmodels.methods import METHODS
from genmodels.methods.base import GenerativeModule
from genmodels.methods.composed import AISOptions, ComposeOptions
from genmodels.methods.ddo import DiscriminativeConfig
from genmodels.methods.edm import EDMLikelihoodOptions, GuideOptions
from genmodels.methods.gbm import GBMLikelihoodOptions
from genmodels.methods.gedi import ChainOptions
from genmodels.methods.interpolant import SourceOptions
from genmodels.methods.meco import ImportanceOptions
from genmodels.networks import NETWORKS
from genmodels.noise.poisson_gaussian import PoissonGaussian
from genmodels.sampling.likelihood import FlowOptions
from genmodels.sampling.posterior import SolverOptions
from tests.helpers.graphs import counted_graphs

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
UNET = (
    "network.channels=[16,16]",
    "network.norm_groups=8",
    "network.layers=1",
    "network.attention=[]",
    "network.head_dim=8",
    "data.labels=false",
)
# method.name -> (config, words that make it small).
TINY = {
    "edm": ("edm_digits", UNET),
    "ddo": ("ddo_digits", UNET),
    "cdrl": (
        "cdrl_digits",
        (
            "network.width=16",
            "method.steps=2",
            "method.levels=2",
            "method.initializer_channels=16",
            "data.labels=false",
        ),
    ),
    "gbm": ("gbm_digits", UNET),
    "noise2score": (
        "noise2score_bsd400",
        ("data.patch=16", "network.channels=[4]", "network.blocks=[1]"),
    ),
    "gedi": (
        "gedi_moons",
        ("network.width=16", "method.buffer=32", "method.steps=2", "data.batch_size=32"),
    ),
    "energy_matching": ("energy_digits", ("network.width=16", "data.labels=false")),
    "interpolant": ("interpolant_digits", UNET),
    "meco": (
        "meco_digits",
        ("network.width=16", "method.flow_layers=2", "method.flow_width=8"),
    ),
}
# Settings of one likelihood that takes no time.
LIKELIHOOD = {
    "ode": {"steps": 1},
    "bound": {"steps": 1},
    "ais_lower": {"ais_steps": 1, "ais_chains": 2, "ais_refine": 1},
    "ais_upper": {"ais_steps": 1, "ais_chains": 2, "ais_refine": 1},
    "importance": {"draws": 20},
}
# Declared by one attribute, done by a function of the class.
FUNCTIONS = {
    "CLUSTERS": ("cluster",),
    "OOD_SCORES": ("ood_scores",),
    "LIKELIHOODS": ("log_prob",),
    "ANY_SIZE": (
        "restore",
        "noise_level",
        "nearest_level",
        "check_level",
        "noisy_state",
        "treatment",
    ),
}
# Declared by one attribute, read from one setting of the method.
SETTINGS = {
    "LABEL_DROPOUT": "label_dropout",
    "P_STD": "p_std",
    "RETRIES": "retry",
    "ANY_SIZE": "estimator",
}
OPTIONS = (
    AISOptions,
    ChainOptions,
    ComposeOptions,
    DiscriminativeConfig,
    EDMLikelihoodOptions,
    GBMLikelihoodOptions,
    GuideOptions,
    ImportanceOptions,
    FlowOptions,
    SolverOptions,
    SourceOptions,
    *(method.Config for method in METHODS.values()),
    *(network.Config for network in NETWORKS.values()),
)


@pytest.fixture(scope="module")
def build():
    """Return a function that builds the small model of a method, once."""
    models = {}

    def one(name):
        if name not in models:
            config, words = TINY[name]
            models[name] = genmodels.build(str(CONFIGS / f"{config}.yaml"), *words).eval()
        return models[name]

    return one


def pictures(model, count=2):
    """Return `count` images of the model's shape, in [-0.9, 0.9]."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, *model.shape, generator=generator) * 1.8 - 0.9


# ------------------------------------------------------------------------------------------------
# Capabilities


def test_every_method_is_tried_here():
    assert set(TINY) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_defines_what_it_declares_and_declares_what_it_defines(name):
    method = METHODS[name]
    for attribute, functions in FUNCTIONS.items():
        declared = bool(getattr(method, attribute))
        for function in functions:
            inherited = getattr(GenerativeModule, function, None)
            defined = getattr(method, function, None) is not inherited
            if attribute != "ANY_SIZE" or declared:  # GBM restores pictures of its own size
                assert defined == declared, (attribute, function)
    settings = {field.name for field in dataclasses.fields(method.Config)}
    for attribute, setting in SETTINGS.items():
        assert bool(getattr(method, attribute)) == (setting in settings), attribute
    keywords = inspect.signature(method.sample).parameters
    assert ({"known", "mask"} <= set(keywords)) == method.INPAINTS
    assert ("reference" in method.NEEDS) == (
        "reference" in inspect.signature(method.__init__).parameters
    )
    assert bool(method.LIKELIHOOD_OPTIONS) == bool(method.LIKELIHOODS)


def test_a_method_that_declares_nothing_inherits_defaults():
    """Commands ask these of any method, also of one that a user has written."""
    defaults = {key: value for key, value in vars(GenerativeModule).items() if key.isupper()}
    assert set(FUNCTIONS) | set(SETTINGS) | {"INPAINTS", "DENOISE_LAWS", "NEEDS", "SOURCES"} < set(
        defaults
    )
    assert not any(defaults.values())


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].CLUSTERS])
def test_clusters_are_probabilities(name, build):
    p = build(name).cluster(pictures(build(name)))
    assert p.shape == (2, build(name).clusters)
    torch.testing.assert_close(p.sum(1), torch.ones(2))


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].OOD_SCORES])
def test_ood_scores_are_one_number_an_image(name, build):
    scores = build(name).ood_scores(pictures(build(name)))
    assert scores
    for values in scores.values():
        assert values.shape == (2,) and values.dtype == torch.float32
        assert torch.isfinite(values).all()


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in METHODS for kind in METHODS[name].LIKELIHOODS]
)
def test_log_densities_are_finite(name, kind, build):
    model, options = build(name), LIKELIHOOD[kind]
    assert set(options) <= set(model.LIKELIHOOD_OPTIONS)
    values = model.log_prob(pictures(model), kind=kind, seeds=torch.arange(2), **options)
    assert values.shape == (2,) and values.dtype == torch.float64 and torch.isfinite(values).all()
    with pytest.raises(ValueError, match="^kind=guess: choose from"):
        model.log_prob(pictures(model), kind="guess", seeds=torch.arange(2))


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].INPAINTS])
def test_known_pixels_are_kept(name, build):
    x, mask = pictures(build(name)), torch.zeros(1, *build(name).shape, dtype=torch.bool)
    mask[..., :4, :] = True
    completed = build(name).sample([0, 1], known=x, mask=mask)
    assert torch.equal(completed[..., :4, :], x[..., :4, :])


@pytest.mark.parametrize("name", METHODS)
def test_restoring_needs_a_law_that_is_declared(name, build):
    model = build(name)
    for law in model.DENOISE_LAWS:
        camera = PoissonGaussian.of_camera(0.02, 0.0, 0.05)
        level = {"lognormal": 0.1, "poisson-gaussian": camera}.get(law, 1.0)
        restored, levels = model.restore(pictures(model), law, level)
        assert restored.shape == (2, *model.shape)
        if level is not camera:
            assert levels.tolist() == pytest.approx([level] * 2)
        with pytest.raises(ValueError, match="^law=snow: choose from"):
            model.restore(pictures(model), "snow", level)
    assert model.DENOISE_LAWS or not model.ANY_SIZE
    assert bool(model.ESTIMATORS) == model.ANY_SIZE
    assert not model.ESTIMATORS or model.cfg.method.estimator in model.ESTIMATORS


@pytest.mark.parametrize("name", METHODS)
def test_sample_takes_the_declared_options_and_no_others(name, build):
    model = build(name)
    if model.ANY_SIZE:
        with pytest.raises(ValueError, match="restores pictures"):
            model.sample([0])
        return
    taken = {key: None for key in model.SAMPLE_OPTIONS}
    assert model.sample([3], **taken | {"steps": 2}).shape == (1, *model.shape)
    assert model.nfe > 0 and isinstance(model.chains, str)
    with pytest.raises((ValueError, TypeError)):
        model.sample([3], stepps=2)


GENERATING = {
    "edm": {"steps": 2},
    "ddo": {"steps": 2},
    "cdrl": {},
    "gbm": {"steps": 2},
    "gedi": {"steps": 2, "start": "fresh"},
    "energy_matching": {"steps": 2},
    "interpolant": {"steps": 2},
    "meco": {"steps": 2},
}


@pytest.mark.parametrize(
    "name",
    # A U-Net takes seconds to trace; tests/commands/test_sample.py does it once.
    [pytest.param(n, marks=pytest.mark.slow if TINY[n][1] == UNET else ()) for n in GENERATING],
)
def test_a_compiled_network_is_compiled_once_for_a_batch(name, build):
    """By images of other seeds too, and a batch that is not full is filled up."""
    plain = images_of(build(name), range(9), name)
    with counted_graphs() as graphs:
        model = copy.deepcopy(build(name))
        model.speed_up(compile=True)
        assert torch.equal(images_of(model, range(9), name), plain)
        assert torch.equal(images_of(model, range(3, 9), name), plain[3:9])
    assert len(graphs) == 1


def images_of(model, seeds, name):
    return generation.generate_all(model, seeds, batch=4, progress=False, **GENERATING[name])


@pytest.mark.slow
def test_guided_and_unguided_steps_are_two_graphs(build):
    """An interval of guidance doubles the batch within; labels are filled up with the seeds."""
    words = [*TINY["edm"][1], "data.labels=true", "method.label_dropout=0.1"]
    model = genmodels.build(str(CONFIGS / "edm_digits.yaml"), *words).eval()
    options = {"steps": 3, "guidance": 2.0, "guidance_max": 5.0, "sampler": "euler"}
    seeds, labels = range(7), [3, 1, 4, 1, 5, 9, 2]
    plain = generation.generate_all(model, seeds, labels, batch=7, progress=False, **options)
    with counted_graphs() as graphs:
        model.speed_up(compile=True)
        settings = options | {"batch": 4, "fill": True, "progress": False}
        made = generation.generate_all(model, seeds, labels, **settings)
        assert len(graphs) == 2
        assert torch.equal(made, plain)
        again = generation.generate_all(model, seeds[5:], labels[5:], **settings)
        assert torch.equal(again, plain[5:]) and len(graphs) == 2


def test_what_speeds_nothing_up_is_refused(build):
    options = SimpleNamespace(batch=4, compile=False, channels_last=True)
    with pytest.raises(ValueError, match=r"channels_last=true: network.name=mlp has no convol"):
        generation.speed_up([build("energy_matching")], options, 3)
    model = copy.deepcopy(build("gedi"))
    model.replay.entries, model.replay.visits = torch.zeros(32, *model.shape), torch.zeros(32)
    settings = {"batch": 3, "fill": True}
    with pytest.raises(ValueError, match="compile=true: these images come without the network"):
        generation.warm_up(model, range(3), start="buffer", **settings)

    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    model.net.compile(backend=broken)
    with pytest.raises(ValueError, match=r"cannot compile here \(.*no C\+\+ compiler\); leave it"):
        generation.warm_up(model, range(3), start="fresh", **settings)


@pytest.mark.parametrize("name", NETWORKS)
def test_methods_may_ask_these_of_every_network(name):
    network = NETWORKS[name]
    assert not (network.ENERGY and network.ENCODER)
    assert 0 <= network.Config().dropout < 1 and network.Config().augment in (False, True)


# ------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize("cls", OPTIONS)
def test_a_config_class_can_be_built_alone(cls):
    assert dataclasses.asdict(cls())


def outside(limits, kind):
    """Return values of a type just beyond these limits."""
    if limits.choices:
        return ["no such word"]
    step = 1 if kind is int else 1e-6
    values = [bound for bound in (limits.gt, limits.lt) if bound is not None]
    if limits.ge is not None:
        values.append(limits.ge - step)
    if limits.le is not None:
        values.append(limits.le + step)
    return [*values, math.nan] if values and kind is float else values


@pytest.mark.parametrize("cls", OPTIONS)
def test_every_limit_is_kept_in_one_line(cls):
    plain = cls()
    for field in dataclasses.fields(cls):
        limits = field.metadata["limits"]
        default = getattr(plain, field.name)
        listed = isinstance(default, list)
        kind = type(default[0] if listed and default else 0.0 if listed else default)
        for value in outside(limits, kind):
            value = [value] if listed else value
            with pytest.raises(ValueError) as error:
                cls(**{field.name: value})
            line = str(error.value)
            assert "\n" not in line
            assert line.startswith(f"{cls.PREFIX}{field.name}={value}: "), line
            assert line.endswith(limits.remedy), line
