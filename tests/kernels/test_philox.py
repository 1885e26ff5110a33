"""Counter-based noise against numpy and its published answers; which implementation runs."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from genmodels.kernels import dispatch, tiles
from genmodels.kernels.philox import chain_normals, philox, philox_normal, philox_uniform


def numpy_philox(key, counter):
    """Philox4x32-10 in numpy's unsigned arithmetic; key and counter: lists of words."""
    k, c = [np.uint64(w) for w in key], [np.uint64(w) for w in counter]
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(q >> shift) ^ c[1] ^ k[0], q & low, (p >> shift) ^ c[3] ^ k[1], p & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return [int(w) for w in c]


KNOWN = [  # published with the generator: key, counter, result
    (
        "00000000 00000000",
        "00000000 00000000 00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff",
        "ffffffff ffffffff ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "a4093822 299f31d0",
        "243f6a88 85a308d3 13198a2e 03707344",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize("key, counter, result", KNOWN)
def test_philox_known_answers(key, counter, result):
    k = [int(w, 16) for w in key.split()]
    c = [int(w, 16) for w in counter.split()]
    expected = [int(w, 16) for w in result.split()]
    assert numpy_philox(k, c) == expected
    value = k[0] + (k[1] << 32)
    seed = torch.tensor([value - 2**64 if value >= 2**63 else value])
    assert [int(w) for w in philox(seed, *(torch.tensor([w]) for w in c))] == expected


def test_philox_is_a_function_of_seed_step_stream_and_element():
    seeds, steps = [3, -7, 2**62 + 5], [0, 2**40 + 1, 9]
    got = philox_uniform((10,), torch.tensor(seeds), torch.tensor(steps), stream=6)
    for b in range(3):
        key = [seeds[b] & 0xFFFFFFFF, (seeds[b] >> 32) & 0xFFFFFFFF]
        step = [steps[b] & 0xFFFFFFFF, steps[b] >> 32]
        words = sum((numpy_philox(key, [g, *step, 6]) for g in range(3)), [])
        assert got[b].tolist() == [(w >> 8) / 2**24 for w in words[:10]]
    whole = philox_normal((2, 70001), 5, 8)[0]  # more than one chunk of the reference
    assert torch.equal(whole.flatten()[:20], philox_normal((20,), 5, 8)[0])
    assert whole[1, -1] == philox_normal((2 * 70001,), 5, 8)[0, -1]


def test_normals_agree_with_the_formula_in_float64():
    got = philox_normal((40,), 11, 4)[0].double()
    words = np.array(sum((numpy_philox([11, 0], [g, 4, 0, 0]) for g in range(10)), []), float)
    radius = np.sqrt(-2 * np.log((words[0::2] + 1) / 2**32))
    angle = words[1::2] / 2**32 * 2 * np.pi
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()
    assert np.abs(got.numpy() - expected).max() < 2e-6


OLD_UNIFORMS = {  # (shape, seed, step, stream)
    ((5,), 0, 0, 0): [6694888, 14772677, 12343212, 10158299, 16311500],
    ((2, 3), -7, 1099511627777, 6): [745329, 8997811, 11691738, 4981421, 1558713, 8727722],
    ((1,), 4611686018427387909, 9, 4294967295): [1036208],
    ((9,), 11, -3, 17): [
        9959165,
        7491941,
        13448939,
        1648208,
        1872155,
        6295088,
        12768708,
        6077138,
        7627010,
    ],
}


def first_form(shape, seed, step, stream):
    """The normals as they were first written: `philox` with every mask, nothing in place."""
    groups = -(-math.prod(shape) // 4)
    step = torch.as_tensor(step).reshape(-1, 1)
    counter = (torch.arange(groups)[None], step & 0xFFFFFFFF, step >> 32 & 0xFFFFFFFF)
    words = philox(torch.as_tensor(seed).reshape(-1, 1), *counter, torch.tensor(stream))
    normals = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = ((radius_word.to(torch.float32) + 1) * 2**-32).log().mul(-2).sqrt()
        angle = angle_word.to(torch.float32) * (2 * math.pi * 2**-32)
        normals += [radius * angle.cos(), radius * angle.sin()]
    flat = torch.stack(normals, dim=-1).flatten(1)
    return flat[:, : math.prod(shape)].reshape(-1, *shape)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (5,), (3, 7, 11), (1, 28, 28), (3, 32, 32)])
def test_normals_are_those_of_the_first_form_to_the_bit(shape):
    seeds, steps = torch.tensor([3, -4, 2**55 + 1]), torch.tensor([0, 2**33 + 7, -5])
    for seed, step, stream in ((7, 2**40, 0), (seeds, 9, 2**31), (seeds, steps, 2**32 - 1)):
        got = philox_normal(shape, seed, step, stream=stream)
        assert torch.equal(got, first_form(shape, seed, step, stream))


def test_uniforms_of_an_earlier_version():
    """Seeds keep their numbers: uniforms times 2^24, drawn before the reference was rewritten."""
    for arguments, expected in OLD_UNIFORMS.items():
        shape, seed, step, stream = arguments
        got = philox_uniform(shape, seed, step, stream=stream)
        assert [int(u * 2**24) for u in got.flatten().tolist()] == expected


def test_noise_is_normal_and_uncorrelated():
    n = 1_000_000
    z = philox_normal((n,), 1)[0].double()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) < 5 * (variance / n) ** 0.5
    assert stats.kstest(z.numpy(), "norm").statistic < 1.95 / n**0.5  # 1e-3 level
    u = philox_uniform((n,), 1)[0].double().numpy()
    assert stats.kstest(u, "uniform").statistic < 1.95 / n**0.5 and u.min() >= 0 and u.max() < 1
    others = {
        "next seed": philox_normal((n,), 2)[0],
        "next step": philox_normal((n,), 1, 1)[0],
        "step high word": philox_normal((n,), 1, 2**32)[0],
        "stream": philox_normal((n,), 1, stream=1)[0],
        **{f"lag {k}": z.roll(k) for k in (1, 2, 3, 4, 1024)},
    }
    for name, other in others.items():
        for a, b in ((z, other.double()), (z**2 - 1, other.double() ** 2 - 1)):
            assert abs((a * b).mean()) < 5 * (a.var() * b.var() / n) ** 0.5, name


def test_seeds_of_neighbouring_chains_never_replay():
    """seed + step as a key would give chain 1 the noise of chain 0 one step later."""
    z = philox_normal((64,), torch.arange(50).repeat_interleave(50), torch.arange(50).repeat(50))
    assert len(torch.unique(z, dim=0)) == 2500


def test_one_seed_for_all_continues_over_chains():
    y = torch.zeros(3, 2, 3)
    z = chain_normals(y, 9, 4)
    flat = philox_normal((3, 8), 9, 4)[0]  # six elements take two groups, the last padded
    assert torch.equal(z.flatten(1), flat[:, :6])
    assert torch.equal(chain_normals(y[1:], 9, 4, first=1), z[1:])
    seeds = torch.arange(3)
    assert torch.equal(chain_normals(y, seeds, 4), philox_normal((2, 3), seeds, 4))


WITHOUT_TRITON = """
import os, sys
sys.modules["triton"] = None
import torch
from genmodels.kernels import dispatch, gbm_step, langevin_chain, langevin_step, mala, pairwise
from genmodels.kernels import philox, resize_normalize
from genmodels.sampling import langevin
assert not dispatch.HAS_TRITON
y = torch.zeros(2, 3)
out = langevin_step.langevin_step(y, y, step=0.5, seed=torch.tensor([1, 2]), exact=True)
assert torch.equal(out, philox.philox_normal((3,), torch.tensor([1, 2])))
os.environ["GENMODELS_KERNELS"] = "triton"
try:
    philox.philox_normal((3,), 1)
except ValueError as error:
    print(error)
"""


def test_everything_imports_and_runs_without_triton():
    env = {k: v for k, v in os.environ.items() if k != "GENMODELS_KERNELS"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout


@pytest.mark.parametrize(
    "arch, capability, fine",
    [
        (None, (9, 0), True),
        (None, (7, 5), True),
        (None, (7, 0), False),
        ("gfx942:sramecc+", (9, 4), True),
        ("gfx1030", (10, 3), False),
    ],
)
def test_auto_picks_no_kernel_that_does_not_compile(monkeypatch, arch, capability, fine):
    gpu = SimpleNamespace(gcnArchName=arch)
    monkeypatch.setattr(torch.version, "hip", arch and "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dispatch._compiles.cache_clear()
    try:
        assert dispatch._compiles(torch.device("cuda", 0)) is fine
    finally:
        dispatch._compiles.cache_clear()


def test_products_are_as_accurate_as_float32_on_each_backend(monkeypatch):
    """tf32x3 is refused for AMD's GPUs."""
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    for hip, precision in ((None, "tf32x3"), ("6.4", "ieee")):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert tiles._tuning(x)[1] == precision


def test_dispatch_says_why(monkeypatch):
    monkeypatch.setenv("GENMODELS_KERNELS", "cuda")
    with pytest.raises(ValueError, match="GENMODELS_KERNELS must be auto, torch, triton or native"):
        philox_normal((3,), 1)
    monkeypatch.setenv("GENMODELS_KERNELS", "triton")
    with pytest.raises(ValueError, match="GENMODELS_KERNELS=triton, but"):
        philox_normal((3,), 1)
