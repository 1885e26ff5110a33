"""Checks of the noise and of the steps of chains under Triton's interpreter, for
kernels/test_interpreter.py. The interpreter pays per program: blocks as large as the data."""

import os

import torch

from genmodels.kernels import gbm_step as gbm
from genmodels.kernels import langevin_chain as chain
from genmodels.kernels import langevin_step as langevin
from genmodels.kernels import mala, philox
from genmodels.kernels.dispatch import tl, triton

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)


def draw(*size, dtype=torch.float32):
    return torch.randn(size, generator=GENERATOR).to(dtype)


def both(function, *args, **kwargs):
    """Return what the reference and the kernel make of the same arguments."""
    results = []
    for mode in ("torch", "triton"):
        os.environ["GENMODELS_KERNELS"] = mode
        results.append(function(*args, **kwargs))
    return results


def close(a, b, atol=3e-6, rtol=0.0):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = a.double(), b.double()
    assert torch.equal(a.isnan(), b.isnan())
    worst = ((a - b).abs() - rtol * a.abs()).nan_to_num().max()
    assert worst <= atol, f"differs by {worst:.3g}"


@triton.jit
def words_kernel(out, seed, counter, stream, N: tl.constexpr):
    group = tl.arange(0, N)
    a, b, c, d = philox.random_words(tl.load(seed), tl.load(counter), stream, group)
    tl.store(out + group, a.to(tl.int64))
    tl.store(out + N + group, b.to(tl.int64))
    tl.store(out + 2 * N + group, c.to(tl.int64))
    tl.store(out + 3 * N + group, d.to(tl.int64))


def check_philox_words():
    for seed, counter, stream in ((0, 0, 0), (-5, 2**40 + 3, 9), (2**62 + 1, 2**32 - 1, 2**31)):
        out = torch.empty(4, 64, dtype=torch.int64)
        words_kernel[(1,)](out, torch.tensor([seed]), torch.tensor([counter]), stream, N=64)
        low, high = counter & 0xFFFFFFFF, counter >> 32
        c = [torch.tensor([w]) for w in (low, high, stream)]
        expected = philox.philox(torch.tensor([seed]), torch.arange(64), *c)
        assert torch.equal(out, torch.stack(expected).reshape(4, 64))


def check_philox_numbers():
    seeds, steps = torch.tensor([3, -4, 2**55]), torch.tensor([0, 2**33, 7])
    for shape in ((1,), (5,), (3, 7, 5), (64,)):
        for seed, step in ((seeds, steps), (7, steps), (seeds, 2**33 + 1), (1, 1)):
            a, b = both(philox.philox_uniform, shape, seed, step, stream=3)
            assert torch.equal(a, b)
            a, b = both(philox.philox_normal, shape, seed, step, stream=3)
            close(a, b, atol=2e-6)
    a, b = both(philox.philox_normal, (50_000,), 5)
    close(a, b, atol=2e-6)


def check_philox_block_size():
    seeds = torch.arange(3)
    whole = philox._kernel(False, (518,), seeds, 9, 2, CPU)
    for block in (32, 128, 512):  # rows, packed and not
        assert torch.equal(philox._kernel(False, (518,), seeds, 9, 2, CPU, block=block), whole)
        part = philox._kernel(False, (516,), seeds, 9, 2, CPU, block=block)
        assert torch.equal(part, whole[:, :516])


SHAPES = ((3, 5), (2, 3, 7, 5), (6,), (4, 2), (1, 1024), (2, 4500))


def langevin_cases(shape, dtype):
    b = shape[0]
    scale = {name: draw(b).abs() for name in ("noise_scale", "tether_scale")}
    yield {"step": 0.1, "seed": 3}
    yield {"step": 0.5, "noise_scale": 0, "clamp": (-1, 1)}
    yield {"step": 0.1, "noise": draw(*shape), "grad_norm": 2.0}
    yield {
        "step": draw(b).abs() + 0.1,
        **scale,
        "seed": torch.arange(b) * 2**40,
        "counter": torch.tensor([2**35]),
        "stream": 2,
        "tether": draw(*shape, dtype=dtype),
        "mask": draw(*shape) > -0.5,
        "known": draw(*shape, dtype=dtype),
        "clamp": (-1.0, 1.5),
        "grad_clip": 1.0,
        "grad_norm": 0.5,
    }


def check_langevin_step():
    for shape in SHAPES:
        y, grad = draw(*shape), draw(*shape)
        for options in langevin_cases(shape, torch.float32):
            close(*both(langevin.langevin_step, y, grad, **options))


def check_langevin_step_dtypes():
    ulp = {torch.float16: 2**-9, torch.bfloat16: 2**-6}  # two units at magnitude 2 to 4
    for state, gradient in (
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ):
        y, grad = draw(3, 33, dtype=state), draw(3, 33, dtype=gradient)
        for options in langevin_cases((3, 33), state):
            close(*both(langevin.langevin_step, y, grad, **options), atol=ulp.get(state, 3e-6) * 2)


def check_langevin_step_memory():
    """Strides, in place, masked elements bit for bit, NaN through the clamp."""
    y = draw(6, 4, 5).permute(2, 0, 1)
    grad, mask = draw(5, 4, 6).transpose(1, 2), draw(5, 6, 4) > 0
    options = {"step": 0.1, "seed": torch.arange(5), "mask": mask, "clamp": (-0.5, 0.5)}
    a, b = both(langevin.langevin_step, y, grad, **options)
    close(a, b)
    assert torch.equal(b[~mask], y[~mask])
    again = y.clone(memory_format=torch.preserve_format)
    assert langevin.langevin_step(again, grad, **options, out=again) is again
    assert torch.equal(again, b)
    bad = torch.tensor([[float("nan"), float("inf"), 3.0, -float("inf")]])
    a, b = both(
        langevin.langevin_step, bad, torch.zeros(1, 4), step=1.0, noise_scale=0, clamp=(-1, 1)
    )
    assert b[0, 0].isnan() and b[0, 1:].tolist() == [1, 1, -1]
    a, b = both(
        langevin.langevin_step, torch.zeros(1, 4), bad, step=1.0, noise_scale=0, grad_clip=1.0
    )
    assert b[0, 0].isnan() and b[0, 1:].tolist() == [1, 1, -1]


def check_langevin_step_block_size():
    """Also the 64-bit counting, which small states never ask for."""
    arguments = dict.fromkeys(
        ("tether", "tether_scale", "mask", "known", "noise", "clamp", "grad_clip", "grad_norm")
    ) | {"step": 0.1, "noise_scale": 0.2**0.5}
    grid = langevin.launch_grid
    for shape in ((3, 510), (5, 512), (7, 3)):
        y, grad = draw(*shape), draw(*shape)
        seeds = torch.arange(shape[0])
        for seed in (seeds, 4):
            whole = langevin.langevin_step(y, grad, step=0.1, seed=seed)
            for block in (4, 16) if shape[1] < 9 else (32, 128):
                for wide in (False, True):
                    langevin.launch_grid = lambda *a, w=wide: (
                        grid(*a)[0],
                        grid(*a)[1] | {"WIDE": w},
                    )
                    out = torch.empty_like(y)
                    langevin._kernel(
                        y, grad=grad, key=(seed, 0, 0), out=out, block=block, **arguments
                    )
                    assert torch.equal(out, whole), (shape, block, wide)
    langevin.launch_grid = grid
    y, grad = draw(2, 5000), draw(2, 5000)
    whole = langevin.langevin_step(y, grad, step=0.1, noise_scale=0, grad_norm=1.0)
    arguments |= {"grad_norm": 1.0, "noise_scale": 0.0}
    for block in (256, 2048):  # the norm from partial sums, and within one program
        out = torch.empty_like(y)
        langevin._kernel(y, grad=grad, key=None, out=out, block=block, **arguments)
        close(out, whole, atol=1e-6)


def check_gbm_step():
    for shape in SHAPES[:5]:
        x, h, b = draw(*shape).exp(), draw(*shape), shape[0]
        for form in gbm.FORMS:
            for options in (
                {"variance": 0.1, "seed": 4},
                {
                    "variance": draw(b).abs() + 0.1,
                    "drift": draw(b),
                    "seed": torch.arange(b),
                    "counter": torch.arange(b),
                },
                {"variance": 0.3, "noise": draw(*shape)},
                {"variance": 0.3, "noise_scale": 0},
            ):
                counts = []

                def run(x, h, counts=counts, form=form, options=options):
                    counts.append(torch.zeros(len(x), dtype=torch.int32))
                    return gbm.gbm_step(x, h, form=form, flips=counts[-1], **options)

                close(*both(run, x, h), rtol=3e-6)
                assert torch.equal(*counts)


def check_mala():
    for shape in ((3, 5), (9, 3, 7, 5), (64, 2), (6,), (2, 4096), (2, 20_000)):
        b, y, x = shape[0], draw(*shape), draw(*shape)
        size = y[0].numel() ** -0.5
        for options in (
            {"step": 0.3 * size, "seed": 1},
            {
                "step": (draw(b).abs() + 0.1) * size,
                "tether": x,
                "tether_scale": draw(b).abs() * size,
                "noise_scale": draw(b).abs() + 0.1,
                "mask": draw(*shape) > 0,
                "seed": torch.arange(b),
                "counter": torch.arange(b),
            },
        ):
            new = mala.mala_propose(y, -y, **options)
            before, after = (-0.5 * v.reshape(b, -1).square().sum(1) for v in (y, new))
            for extra in ({}, {"accumulate": torch.float64}, {"uniform": torch.full((b,), 0.7)}):
                counts = []

                def run(counts, new, *values, **options):
                    counts.append(torch.zeros(len(new), dtype=torch.int32))
                    return mala.mala_accept(
                        values[0], new, *values[1:], count=counts[-1], **options
                    )

                one, two = both(run, counts, new, y, -y, -new, before, after, **options, **extra)
                for i in range(4):
                    assert torch.equal(one[i], two[i]), i
                close(one[4], two[4], atol=1e-5, rtol=1e-5)
                assert torch.equal(*counts)


def check_mala_in_place():
    for shape in ((5, 7), (3, 20_000)):
        y, new = draw(*shape), draw(*shape)
        zero = torch.zeros(shape[0])
        options = {"step": 1.0, "seed": 1}
        after = torch.tensor([1e6, -1e6, float("nan"), 1e6, -1e6])[: shape[0]]
        state, grad = y.clone(), torch.zeros_like(y)
        out = mala.mala_accept(state, new, grad, grad.clone(), zero, after, inplace=True, **options)
        taken = torch.tensor([True, False, False, True, False])[: shape[0]]
        assert out[0] is state and torch.equal(out[3], taken)
        assert torch.equal(state, torch.where(taken[:, None], new, y))


def check_mala_mixed_dtypes():
    """A rejected state and gradient stay bit for bit beside a proposal of lower precision."""
    y, g, zero = draw(4, 5), draw(4, 5), torch.zeros(4)
    low = [draw(4, 5, dtype=torch.float16) for _ in "ab"]
    for after in (-1e9, 1e9):
        arguments = (y, low[0], g, low[1], zero, torch.full((4,), after))
        one, two = both(mala.mala_accept, *arguments, step=0.1, seed=1)
        kept = (y, g) if after < 0 else [v.float() for v in low]
        for got in (one, two):
            assert torch.equal(got[0], kept[0]) and torch.equal(got[1], kept[1])


def check_langevin_chain():
    for b, d in ((7, 2), (5, 9), (33, 4), (2, 64)):
        mixture = chain.Mixture(draw(3, d), draw(3).abs() + 0.2, draw(3).abs())
        for energy in (
            chain.Gaussian(),
            chain.Gaussian(draw(d), draw(d).abs()),
            chain.DoubleWell(0.5, 1.1),
            mixture,
        ):
            for options in (
                {"step": 0.02, "seed": 5},
                {
                    "step": draw(b).abs() * 0.02 + 0.001,
                    "noise_scale": draw(b).abs(),
                    "seed": torch.arange(b),
                    "counter": 2**33,
                    "stream": 3,
                },
            ):
                y = draw(b, d)
                # Normals agree within 2e-6; three steps add that up, times the noise scale.
                scale = float(torch.as_tensor(options.get("noise_scale", 1.0)).max())
                atol = 1e-5 + 3 * 2e-6 * scale
                close(*both(chain.langevin_chain, y, energy, steps=3, **options), atol=atol)
    y, seeds = draw(8, 20), torch.arange(8)
    options = {"steps": 3, "a": 0.1, "s": 0.3, "seed": seeds, "counter": 0, "stream": 0}
    whole = chain._kernel(y.clone(), chain.DoubleWell(), **options)
    tiled = chain._kernel(y.clone(), chain.DoubleWell(), tile=(2, 2), **options)
    assert torch.equal(whole, tiled)


def check_langevin_chain_rounds_once():
    for dtype in (torch.bfloat16, torch.float16):
        y, options = draw(40, 4, dtype=dtype), {"steps": 6, "step": 0.02, "seed": 5}
        for energy in (chain.DoubleWell(0.5, 1.1), chain.Gaussian()):
            whole = chain.langevin_chain(y.float(), energy, **options)
            for got in both(chain.langevin_chain, y, energy, **options):
                assert got.dtype == dtype
                # equal but where float32 rounding meets a boundary of the coarse grid
                same = got == whole.to(dtype)
                assert same.float().mean() > 0.98
                close(got, whole.to(dtype), atol=2**-7 if dtype == torch.bfloat16 else 2**-10)


def check_limits_per_item():
    """grad_clip and grad_norm as tensors, one number or one per item."""
    for shape in ((3, 5), (2, 4500), (6,), (2, 20_000)):
        y, grad = draw(*shape), draw(*shape)
        for size in ((), (1,), (shape[0],)):
            limits = {"grad_clip": draw(*size).abs() + 0.3, "grad_norm": draw(*size).abs() + 0.1}
            close(*both(langevin.langevin_step, y, grad, step=0.5, noise_scale=0, **limits))
