"""The compiled C beside the reference, both in one suite: which bits agree and how far the rest.

Where no library was installed one is built here; without a compiler these tests skip.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from scipy import stats

import genmodels
from genmodels.kernels import native
from genmodels.kernels.gbm_step import FORMS, gbm_step
from genmodels.kernels.langevin_chain import DoubleWell, Gaussian, Mixture, langevin_chain
from genmodels.kernels.langevin_step import langevin_step
from genmodels.kernels.mala import mala_accept, mala_propose
from genmodels.kernels.philox import (
    chain_normals,
    chain_uniforms,
    philox_normal,
    philox_uniform,
)
from genmodels.sampling.langevin import ula_chain
from tests.helpers.paths import ROOT

SHAPES = [(), (1,), (2,), (5,), (3, 7, 11), (1, 28, 28), (3, 32, 32)]
STATES = [(4, 3, 8, 8), (5, 7), (1, 2), (300, 2), (3, 513), (2, 3, 33, 35), (6,)]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The installed library, or one built for these tests."""
    if native.library() is not None:
        return native.library()
    if os.name != "posix" or not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("no compiled library, and no C compiler to build one")
    folder = tmp_path_factory.mktemp("native")
    words = ["build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    build = [sys.executable, "setup.py", "-q", *words]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=300)
    (path,) = folder.rglob("_native*.so") or [None]
    assert path, done.stderr
    return native.opened(path)


@pytest.fixture
def both(library, monkeypatch):
    """Return a function that gives what the reference and what C makes of the same call."""
    monkeypatch.setattr(native, "library", lambda: library)

    def run(function, *args, **kwargs):
        results = []
        for mode in ("torch", "native"):
            monkeypatch.setenv("GENMODELS_KERNELS", mode)
            results.append(function(*args, **kwargs))
        return results

    return run


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def keys(items):
    """Yield (seed, counter): one for all and one for each, ints and tensors, large and negative."""
    each, steps = torch.arange(items) * 2**40 - 3, torch.arange(items) * 2**33
    yield from ((7, 2**40 + 1), (torch.tensor([-9]), torch.tensor(4)))
    yield from ((each, 3), (5, steps), (each, steps))


# ------------------------------------------------------------------------------------------------
# The same bits: words, uniforms, and normals unless a caller lets go of them


@pytest.mark.parametrize("shape", SHAPES)
def test_uniforms_and_exact_normals_have_the_references_bits(both, shape):
    for seed, step in keys(3):
        for stream in (0, 2**31, 2**32 - 1):
            for function in (philox_uniform, philox_normal):
                a, b = both(function, shape, seed, step, stream=stream)
                assert torch.equal(a, b) and a.shape == b.shape
                # Else torch's functions of them could differ in the last bit.
                assert a.stride() == b.stride()


def test_exact_normals_have_the_references_bits_over_several_chunks(both):
    assert torch.equal(*both(philox_normal, (2, 70001), 5, 8))  # 35,001 groups of one item
    assert torch.equal(*both(philox_normal, (3, 32, 32), torch.arange(100)))
    y = torch.zeros(70, 3, 25, 26)  # 34,160 groups of a chunk and more
    for seed, step in keys(70):
        assert torch.equal(*both(chain_normals, y, seed, step, first=3))
        assert torch.equal(*both(chain_uniforms, 70, seed, step))
    assert torch.equal(*both(chain_normals, torch.zeros(3, 0), 1))


@pytest.mark.parametrize("shape", STATES)
def test_exact_steps_have_the_references_bits(both, shape):
    y, grad, x = (draw(*shape, seed=i) for i in range(3))
    for seed, counter in keys(shape[0]):
        key = {"seed": seed, "counter": counter, "exact": True}
        options = {"step": 0.1, "tether": x, "tether_scale": 0.2, "clamp": (-2, 2), "grad_norm": 3}
        assert torch.equal(*both(langevin_step, y, grad, **options, **key))
        for form in FORMS:
            assert torch.equal(*both(gbm_step, y, grad, variance=0.1, form=form, **key))
        for energy in (DoubleWell(0.7, 1.2), Gaussian(0.3, 2.0)):
            arguments = {"steps": 3, "step": 0.01, **key}
            assert torch.equal(*both(langevin_chain, y, energy, **arguments))


def test_metropolis_steps_have_the_references_bits(both):
    """A decision may hang on a last bit: there exact is on unless one says otherwise."""
    y, new, g, g2 = (draw(5, 3, 8, 8, seed=i) for i in range(4))
    assert torch.equal(*both(mala_propose, y, g, step=0.1, seed=torch.arange(5)))
    log_prob = torch.zeros(5)
    arguments = (y, new, g, g2, log_prob, log_prob)
    for a, b in zip(*both(mala_accept, *arguments, step=0.1, seed=torch.arange(5))):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "config, size, words",
    [
        ("cdrl_digits", 8, ["method.steps=5"]),
        ("gedi_moons", 500, ["method.noise_scale=1", "method.clamp=false"]),
        ("gbm_digits", 8, []),
        ("edm_digits", 8, []),
    ],
)
def test_training_has_the_references_bits(both, config, size, words):
    """Loss and gradients: an exact resume must not ask which machine had a compiler."""

    def step():
        torch.manual_seed(0)
        model = genmodels.build(str(ROOT / "configs" / f"{config}.yaml"), *words)
        model.train()
        batch = {"image": draw(size, *model.shape).clamp(-1, 1), "n": torch.arange(size)}
        batch["label"] = torch.full((size,), -1)
        loss = model.loss(batch)[0]
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat([loss.detach().reshape(1), *grads])

    assert torch.equal(*both(step))


# ------------------------------------------------------------------------------------------------
# Whole normals and fused steps


def test_whole_normals_are_close_whatever_the_machine(both, library):
    """Within 2e-6, with the same bits in each instruction set and with any number of threads."""
    seeds, items, threads = torch.arange(300) * 7, 300, torch.get_num_threads()
    a, b = both(philox_normal, (3, 32, 32), seeds, exact=False)
    assert 0 < (a - b).abs().max() < 2e-6
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for level in native.LEVELS[: library.genmodels_level() + 1]:
                out, owners = torch.empty_like(b), []
                key = native.key_fields(seeds, 0, 0, items, owners)
                sizes = {"items": items, "numel": 3072, "out": out}
                native.run("normals", out.numel(), level, **sizes, **key)
                assert torch.equal(out, b), (count, level)
    finally:
        torch.set_num_threads(threads)


def test_whole_normals_do_not_depend_on_the_batch_or_its_order(both):
    for shape in SHAPES:
        _, together = both(philox_normal, shape, torch.arange(9), 2**33, exact=False)
        _, backwards = both(philox_normal, shape, torch.arange(8, -1, -1), 2**33, exact=False)
        assert torch.equal(together, backwards.flip(0))
        for seed in range(9):
            _, alone = both(philox_normal, shape, seed, 2**33, exact=False)
            assert torch.equal(alone[0], together[seed])


def test_whole_normals_are_normal(both):
    _, z = both(philox_normal, (1_000_000,), 1, exact=False)
    assert stats.kstest(z[0].double().numpy(), "norm").statistic < 1.95e-3  # 1e-3 level
    assert z.isfinite().all() and z.abs().max() < 6.67


def options(shape):
    """Yield options of langevin_step, each by itself and all together."""
    x, known, each = draw(*shape, seed=3), draw(*shape, seed=4), draw(shape[0], seed=5).abs()
    mask = draw(*shape, seed=6) > 0
    yield {"step": 0.1}
    yield {"step": each + 0.01, "noise_scale": each, "clamp": (-1, 1.5)}
    yield {"step": 0.1, "tether": x, "tether_scale": 0.3, "grad_clip": 0.5}
    yield {"step": 0.1, "mask": mask}
    yield {"step": 0.1, "mask": mask, "known": known, "grad_norm": 1.0}
    yield {"step": 0.1, "tether": x, "tether_scale": each, "mask": mask[:1], "known": known,
           "grad_clip": each + 0.1, "clamp": (-1, 1)}  # fmt: skip


@pytest.mark.parametrize("shape", STATES)
def test_a_fused_step_is_the_reference_on_the_same_noise(both, shape):
    y, grad = draw(*shape), draw(*shape, seed=1)
    y.view(-1)[0] = float("nan")  # stays, as does what a mask holds
    for seed, counter in keys(shape[0]):
        key = {"seed": seed, "counter": counter, "stream": 5}
        _, z = both(chain_normals, y, **key, exact=False)
        for option in options(shape):
            _, got = both(langevin_step, y, grad, **option, **key)
            expected = langevin_step(y, grad, **option, noise=z)
            assert torch.equal(got.nan_to_num(9.0), expected.nan_to_num(9.0)), option.keys()
            again = y.clone()
            assert langevin_step(again, grad, **option, **key, out=again) is again
            assert torch.equal(again.nan_to_num(9.0), got.nan_to_num(9.0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", STATES)
def test_a_fused_gbm_step_is_the_reference_on_the_same_noise(both, shape, form):
    x, h = draw(*shape), draw(*shape, seed=1) * 10
    for seed, counter in keys(shape[0]):
        key = {"seed": seed, "counter": counter}
        _, z = both(chain_normals, x, **key, exact=False)
        for v in (0.1, draw(shape[0], seed=2).abs() + 0.1):
            flips = torch.zeros(2, shape[0], dtype=torch.int32)
            numbers = {"variance": v, "drift": 0.02, "form": form}
            _, got = both(gbm_step, x, h, **numbers, **key)
            gbm_step(x, h, **numbers, **key, flips=flips[0])
            expected = gbm_step(x, h, **numbers, noise=z, flips=flips[1])
            assert torch.equal(*flips)
            tolerance = 3e-7 if form == "dls" else 0  # the exponential is C's own
            assert torch.allclose(got, expected, rtol=tolerance, atol=0)


def test_the_exponential_at_its_ends(both):
    inf = float("inf")
    ends = [float("nan"), inf, -inf, 0.0, -200.0, 200.0, 88.72, 88.8, -87.5, -103.0]
    h = torch.cat([torch.tensor(ends), torch.linspace(-87, 88, 5000)])[None]
    arguments = {"variance": 1.0, "drift": 1.5, "noise_scale": 1e-30, "seed": 1}
    got = both(gbm_step, torch.ones_like(h), h, **arguments)[1]
    assert torch.allclose(got, h.exp(), rtol=3e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", STATES)
def test_a_fused_chain_is_as_many_fused_steps(both, shape):
    y, item = draw(*shape), shape[1:]
    energies = [DoubleWell(0.7, 1.2), Gaussian(0.3, 2.0), Gaussian(draw(*item), draw(*item).abs())]
    for energy in energies:
        for seed, counter in keys(shape[0]):
            for step in (0.01, torch.full(shape[:1], 0.02)):
                key = {"step": step, "seed": seed}
                _, got = both(langevin_chain, y, energy, steps=4, counter=counter, **key)
                x = y.clone()
                for i in range(4):
                    langevin_step(x, energy.score(x), counter=counter + i, out=x, **key)
                assert torch.equal(got, x)


def test_what_c_does_not_take_is_the_references(both):
    """Other dtypes, gradients, layouts and mixtures: the same numbers, from one path or another."""
    y = draw(4, 3, 8, 8)
    for state in (y.double(), y.bfloat16(), y.to(memory_format=torch.channels_last)):
        key = {"step": 0.1, "seed": torch.arange(4)}
        a, b = both(langevin_step, state, state, **key)
        assert a.dtype == b.dtype and (a - b).abs().max() <= (
            0.02 if a.element_size() == 2 else 2e-6
        )
    wide = torch.zeros(4, 3, 8, 16)[..., ::2]
    both(langevin_step, y, y, **key, out=wide)
    assert torch.equal(wide, langevin_step(y, y, **key))
    y.requires_grad_(True)
    langevin_step(y, y.detach(), **key).sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))
    mixture = Mixture(draw(3, 2), torch.ones(3), torch.ones(3))
    a, b = both(langevin_chain, draw(5, 2), mixture, steps=3, step=0.01, seed=1)
    assert (a - b).abs().max() < 1e-5


def test_a_sampled_chain_is_close_and_an_exact_one_the_same(both):
    def chain(exact):
        return ula_chain(
            lambda y: y.flatten(1).square().sum(1),
            draw(6, 1, 8, 8),
            steps=20,
            step=0.01,
            seed=torch.arange(6),
            exact=exact,
        ).y

    assert torch.equal(*both(chain, True))
    a, b = both(chain, False)
    assert 0 < (a - b).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------
# Whether there is a library


def test_without_a_library_the_reference_works_and_native_says_so(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setenv("GENMODELS_KERNELS", "auto")
    a = philox_normal((5,), 1)
    monkeypatch.setenv("GENMODELS_KERNELS", "native")
    with pytest.raises(ValueError, match="there is no compiled library"):
        philox_normal((5,), 1)
    monkeypatch.setenv("GENMODELS_KERNELS", "torch")
    assert torch.equal(philox_normal((5,), 1), a)


def test_a_library_of_another_version_is_not_taken(library, monkeypatch, tmp_path):
    path = library._name
    assert native.opened(path) is not None
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    assert native.opened(path) is None
    (tmp_path / "_native.so").write_bytes(b"not a library")
    assert native.opened(tmp_path / "_native.so") is None


def test_the_versions_agree():
    source = (ROOT / "kernels/ops/native.c").read_text()
    assert int(re.search(r"#define VERSION (\d+)", source)[1]) == native.VERSION
