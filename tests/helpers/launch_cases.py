"""Calls of every public op with every option that changes what is launched.

For kernels/test_launch.py, which runs them on fake CUDA tensors; each generator yields functions
without arguments.
"""

import itertools
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genmodels.kernels.gbm_step import gbm_step
from genmodels.kernels.langevin_chain import DoubleWell, Gaussian, Mixture, langevin_chain
from genmodels.kernels.langevin_step import langevin_step
from genmodels.kernels.mala import mala_accept, mala_propose
from genmodels.kernels.pairwise import ball_count, knn_radius, polynomial_sums, rbf_sums
from genmodels.kernels.philox import philox_normal, philox_uniform
from genmodels.kernels.resize_normalize import MODES, resize_normalize
from genmodels.sampling import langevin as chains


class Device:
    """Stand-in for torch.cuda.device: remembers which device is current."""

    current = 0

    def __init__(self, device):
        self.index = device.index

    def __enter__(self):
        self.before, Device.current = Device.current, self.index

    def __exit__(self, *_):
        Device.current = self.before


LAUNCHES = []  # (kernel, its arguments by name)


def draw(*size, dtype=None, device="cuda:1"):
    return torch.randn(size, dtype=dtype or torch.float32, device=device)


def philox_cases():
    seeds = torch.arange(3, device="cuda:1")
    keys = ((seeds, 0), (seeds, seeds), (7, seeds), (seeds[:1], 2**40), (1, 1))
    for function in (philox_normal, philox_uniform):
        for shape in ((), (5,), (3, 32, 32)):
            for seed, step in keys:
                yield partial(function, shape, seed, step, stream=3, device="cuda:1")


def step_options(shape):
    """Yield options of langevin_step: each by itself, each form of a number, and all together."""
    b = shape[0]
    numbers = (torch.tensor(0.1), draw(), draw(1), draw(b))
    yield {}
    yield {"seed": 2**40, "counter": 2**33}
    for seed in (torch.arange(b), torch.arange(b, device="cuda:1"), torch.tensor(5)):
        yield {"seed": seed, "counter": seed}
    for number in numbers:
        yield {"step": number}
        yield {"noise_scale": number, "grad_clip": number}
        yield {"grad_norm": number, "tether": draw(*shape), "tether_scale": number}
        yield {"grad_norm": number, "grad_clip": number}
    yield {"noise_scale": 0, "clamp": (-1, 1)}
    yield {"noise": draw(*shape)}
    yield {"noise_scale": 0, "grad_norm": 1.0}
    for mask in (draw(*shape) > 0, (draw(*shape) > 0).view(torch.uint8), draw(shape[-1]) > 0):
        yield {"mask": mask}
        yield {"mask": mask, "known": draw(*shape)}
    yield {"out": draw(*shape)}
    yield {"out": draw(*shape[:-1], 2 * shape[-1])[..., ::2]}
    yield {
        "step": draw(b),
        "noise_scale": draw(b),
        "tether": draw(*shape),
        "tether_scale": draw(b),
        "mask": draw(*shape) > 0,
        "known": draw(*shape),
        "clamp": (-1, 1.5),
        "grad_clip": draw(b),
        "grad_norm": draw(b),
        "seed": torch.arange(b),
        "counter": torch.tensor([1]),
        "stream": 2,
    }


SHAPES = ((3, 5), (1,), (1, 3, 8, 8), (2, 40_000))  # flat, of scalars, rows, rows in parts


def langevin_step_cases():
    for shape in SHAPES:
        for options in step_options(shape):
            options = {"step": 0.1, "seed": 1, **options}
            yield partial(langevin_step, draw(*shape), draw(*shape), **options)
    last = {"memory_format": torch.channels_last}
    floats = (torch.float32, torch.bfloat16, torch.float16)
    for state, gradient in itertools.product(floats, floats):
        y, g = draw(2, 3, 8, 8, dtype=state), draw(2, 3, 8, 8, dtype=gradient)
        for noise in ({"seed": 1}, {"noise": y.to(**last)}):
            yield partial(langevin_step, y.to(**last), g.to(**last), step=0.1, out=y, **noise)


def gbm_step_cases():
    for shape, form in [(shape, "ums") for shape in SHAPES] + [((3, 5), "dls"), ((3, 5), "log")]:
        b = shape[0]
        flips = torch.zeros(b, dtype=torch.int32, device="cuda:1")
        for options in (
            {"seed": 1},
            {"seed": torch.arange(b), "counter": torch.arange(b)},
            {"noise_scale": 0},
            {"noise": draw(*shape)},
            {"seed": 1, "variance": draw(b)},
            {"seed": 1, "drift": draw(1), "noise_scale": draw(b), "flips": flips},
            {"seed": 1, "out": draw(*shape[:-1], 2 * shape[-1])[..., ::2]},
        ):
            options = {"variance": 0.1, "form": form, **options}
            yield partial(gbm_step, draw(*shape), draw(*shape).bfloat16(), **options)


def mala_cases():
    for shape in SHAPES:
        b = shape[0]
        states = [draw(*shape) for _ in range(4)]
        for options in (
            {},
            {"seed": torch.arange(b), "counter": torch.tensor([3])},
            {"uniform": draw(2 * b)[::2]},
            {"step": draw(b), "noise_scale": draw(b)},
            {"mask": draw(shape[-1]) > 0},
            {"tether": draw(*shape), "tether_scale": draw(b)},
            {"accumulate": torch.float64},
            {"inplace": True},
            {"count": torch.zeros(b, dtype=torch.int32, device="cuda:1")},
        ):
            options = {"step": 0.1, "seed": 1, **options}
            yield partial(mala_accept, *states, draw(b), draw(b), **options)
        for low in (torch.float16, torch.bfloat16):
            g, p = draw(*shape, dtype=low), draw(b, dtype=torch.float64)
            yield partial(mala_accept, *states[:2], g, g, p, p, step=0.1, seed=1)
    y = draw(2, 3, 8, 8).to(memory_format=torch.channels_last)
    yield partial(mala_accept, y, y, y, y, draw(2), draw(2), step=0.1, seed=1)
    yield partial(mala_propose, y, y, step=0.1, seed=1, tether=y, tether_scale=1.0)


def langevin_chain_cases():
    cpu = {"device": "cpu"}
    for b, d in ((3, 5), (1, 1), (2, 4000)):
        for energy in (
            Gaussian(),
            Gaussian(draw(d, **cpu), draw(d)),
            Gaussian(0.0, draw(d)),
            DoubleWell(2, 1),
            Mixture(draw(3, d, **cpu), draw(3, **cpu), draw(3)),
            Mixture(draw(1, d), draw(1), draw(1)),
        ):
            for options in (
                *([{"steps": 1}] if b > 2 else []),
                {"steps": 7, "step": draw(b), "seed": torch.arange(b), "counter": 1},
                {"steps": 0, "noise_scale": draw(1), "out": draw(b, 2 * d)[:, ::2]},
            ):
                options = {"step": 0.1, "seed": 1, **options}
                yield partial(langevin_chain, draw(b, d), energy, **options)
    yield partial(langevin_chain, draw(1, 2**30), DoubleWell(), steps=2, step=0.1, seed=1)
    y = draw(4, 2, 3, dtype=torch.bfloat16)
    yield partial(langevin_chain, y, DoubleWell(), steps=2, step=0.1, seed=1, out=y)


def pairwise_cases():
    floats = (torch.float32, torch.bfloat16, torch.float16)
    for n, m, d in ((17, 20, 24), (1, 1, 1), (9000, 70_000, 2048), (20, 3, 16)):
        for dtype in floats if n == 17 else floats[:1]:
            x, y = draw(n, d, dtype=dtype), draw(m, 2 * d, dtype=dtype)[:, ::2]
            for function, options in (
                (polynomial_sums, {"degree": 1}),
                (polynomial_sums, {"coef": 0}),
                (rbf_sums, {"bandwidth": 10}),
            ):
                yield partial(function, x, **options)
                yield partial(function, x, y, **options)
                yield partial(function, x, y, columns=True, **options)
            for k in (1, 3, 16) if n == 9000 else (3,) if n > 1 else ():
                yield partial(knn_radius, x, k=k)
                yield partial(knn_radius, x, y, k=k)
            yield partial(ball_count, x, y, draw(m))
            yield partial(ball_count, x, y, draw(n).double(), owner="x")


def resize_cases():
    for b, source, size in ((1, (1, 1), 1), (3, (8, 9), (5, 4)), (2, (300, 200), 299)):
        for channels, mode in itertools.product((1, 3) if b == 3 else (3,), MODES):
            pixels = torch.zeros(b, channels, *source, dtype=torch.uint8, device="cuda:1")
            for options in (
                {},
                {"quantize": mode == "bicubic"},
                {"dtype": torch.float16, "mean": 0},
                {"mean": [1.0] * channels, "std": draw(channels, device="cpu")},
            ):
                yield partial(resize_normalize, pixels, size, mode=mode, **options)
                swapped = pixels.permute(0, 2, 3, 1)
                yield partial(resize_normalize, swapped, size, mode=mode, layout="nhwc", **options)


def batch_cases():
    """A chain does not depend on its batch: nor does the tile of a sum, which sets its order."""
    tile = ("ROWS", "COLUMNS", "SPAN", "GROUPS", "num_warps")

    def same(function):
        seen = []
        for b in (1, 3, 1000):
            start = len(LAUNCHES)
            function(b)
            seen.append(
                [(n, {k: v for k, v in a.items() if k in tile}) for n, a in LAUNCHES[start:]]
            )
        assert seen[0] == seen[1] == seen[2], seen

    def step(b, d):
        langevin_step(draw(b, d), draw(b, d), step=0.1, seed=1, grad_norm=1.0)

    def accept(b, d):
        mala_accept(*(draw(b, d) for _ in range(4)), draw(b), draw(b), step=0.1, seed=1)

    def mixture(b, d):
        langevin_chain(draw(b, d), Mixture(draw(3, d), draw(3), draw(3)), steps=2, step=0.1, seed=1)

    for function, d in itertools.product((step, accept, mixture), (5, 64, 1000, 4096)):
        yield partial(same, partial(function, d=d))


def energy(y):
    return y.reshape(len(y), -1).square().sum(1)


def samplers_cases():

    for sampler in (chains.ula_chain, chains.mala_chain, chains.sgld_chain):
        for shape in ((1, 3, 8, 8), (5,)):
            for options in (
                {"seed": 1},
                {"seed": torch.arange(shape[0])},
                {"seed": torch.Generator()},
                {"seed": 1, "diagnostics": False, "counter": torch.zeros(1, dtype=torch.int64)},
                {"seed": 1, "tether": draw(*shape), "tether_scale": 0.1, "temperature": 0.5},
                {"seed": 1, "mask": draw(*shape) > 0, "step": draw(shape[0])},
            ):
                yield partial(sampler, energy, draw(*shape), **{"steps": 2, "step": 0.1, **options})


def graph_cases():
    """GraphedChain: streams, capture and replay happen with the state's device current."""

    def at_device(*_, **__):
        assert Device.current == 1, "another device is current"

    class Stream:
        __init__ = wait_stream = replay = at_device

    @contextmanager
    def inside(*_):
        at_device()
        yield

    torch.cuda.Stream = torch.cuda.CUDAGraph = Stream
    torch.cuda.current_stream = Stream
    torch.cuda.stream = torch.cuda.graph = inside

    def both(sampler):
        chain = chains.GraphedChain(energy, draw(4, 2), steps=2, step=0.1, seed=1, chain=sampler)
        chain(draw(4, 2), seed=5, counter=7)

    for sampler in (chains.ula_chain, chains.mala_chain):
        yield partial(both, sampler)


def captured_cases():
    """What a graph captures: after a first call nothing comes from the host any more."""

    class NoTransfers(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            given = [x.device.type for x in args if isinstance(x, torch.Tensor) and x.dim()]
            made = result.device.type if isinstance(result, torch.Tensor) else "cuda"
            assert not (made == "cuda" and "cpu" in given), f"{function}: host memory is read"
            return result

    y, seeds = draw(4, 3, 8, 8), torch.arange(4, device="cuda:1")
    x, pixels = draw(300, 64), torch.zeros(2, 3, 9, 9, dtype=torch.uint8, device="cuda:1")

    def twice(function, *args, **kwargs):
        function(*args, **kwargs)
        with NoTransfers():
            function(*args, **kwargs)

    key = {"seed": seeds, "counter": seeds[:1].clone(), "step": 0.1}
    yield partial(twice, philox_normal, (5,), seeds, seeds[:1].clone())
    yield partial(twice, langevin_step, y, y, out=y, **key)
    yield partial(twice, langevin_chain, y, DoubleWell(), steps=3, **key)
    yield partial(twice, chains.mala_chain, energy, y, steps=2, mask=y > 0, **key)
    yield partial(twice, polynomial_sums, x)
    yield partial(twice, knn_radius, x, k=3)
    yield partial(twice, resize_normalize, pixels, 5, mode="bicubic", quantize=True)
    yield partial(twice, resize_normalize, pixels, 7, mean=[1, 2, 3], std=[4, 5, 6])
