"""Every launch goes through Triton's own binder with CUDA tensors that are not there.

The interpreter and the ahead-of-time tests bypass the binder, which refuses argument names of its
own and specialises integers. Here the public functions run on fake CUDA tensors (shapes, strides
and devices without data), up to the first stage of the compiler. So a launch must bind, its grid
must be legal, its tensors must lie on the current device, and nothing may look at a value: that
would wait for the device, and cannot be captured in a graph.
"""

import itertools
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import pytest

OPS = ("philox", "langevin_step", "gbm_step", "mala", "langevin_chain", "pairwise", "resize",
       "samplers", "graph", "captured")  # fmt: skip


class Device:
    """Stand-in for torch.cuda.device: remembers which device is current."""

    current = 0

    def __init__(self, device):
        self.index = device.index

    def __enter__(self):
        self.before, Device.current = Device.current, self.index

    def __exit__(self, *_):
        Device.current = self.before


def pretend(launches):
    """Stand in for the driver of an H100; launches collects (kernel, grid, tensors)."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        launcher_cls = utils = None

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return Device.current

        def get_current_stream(self, device=0):
            return 0

    class Properties:
        multi_processor_count = 132

    driver.set_active(Driver())
    run, add_stages = JITFunction.run, CUDABackend.add_stages

    def checked_run(self, *args, grid, warmup, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        assert {x.device for x in tensors} == {torch.device("cuda", Device.current)}
        assert 1 <= grid[0] < 2**31 and all(1 <= size < 2**16 for size in grid[1:]), grid
        launches.append((self.__name__, grid, tensors))
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def first_stage(self, stages, *args):
        add_stages(self, stages, *args)
        for name in list(stages)[1:]:
            del stages[name]
        made = {"name": "kernel", "shared": 0, "cluster_dims": (1, 1, 1)}
        stages["cubin"] = lambda module, metadata: metadata.update(made) or b""

    JITFunction.run, CUDABackend.add_stages = checked_run, first_stage
    torch.cuda.device = Device
    torch.autograd.grad = lambda output, y: (torch.empty_like(y),)  # its engine asks the driver
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: Properties


def draw(*size, dtype=None, device="cuda:1"):
    import torch

    return torch.randn(size, dtype=dtype or torch.float32, device=device)


def philox_cases():
    import torch

    from genmodels.kernels.philox import philox_normal, philox_uniform

    seeds = torch.arange(3, device="cuda:1")
    keys = ((seeds, 0), (seeds, seeds), (7, seeds), (seeds[:1], 2**40), (1, 1))
    for function in (philox_normal, philox_uniform):
        for shape in ((), (5,), (1,), (3, 32, 32), (1028,)):
            for seed, step in keys:
                yield partial(function, shape, seed, step, stream=3, device="cuda:1")


def step_options(shape):
    """Yield options of langevin_step: each by itself, each form of a number, and all together."""
    import torch

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
        "step": draw(b), "noise_scale": draw(b), "tether": draw(*shape), "tether_scale": draw(b),
        "mask": draw(*shape) > 0, "known": draw(*shape), "clamp": (-1, 1.5), "grad_clip": draw(b),
        "grad_norm": draw(b), "seed": torch.arange(b), "counter": torch.tensor([1]), "stream": 2,
    }  # fmt: skip


SHAPES = ((3, 5), (1,), (1, 3, 8, 8), (2, 40_000))  # flat, of scalars, rows, rows in parts


def langevin_step_cases():
    import torch

    from genmodels.kernels.langevin_step import langevin_step

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
    import torch

    from genmodels.kernels.gbm_step import gbm_step

    for shape, form in itertools.product(SHAPES, ("dls", "ums", "log")):
        b = shape[0]
        flips = torch.zeros(b, dtype=torch.int32, device="cuda:1")
        for options in (
            {"seed": 1}, {"seed": torch.arange(b), "counter": torch.arange(b)},
            {"noise_scale": 0}, {"noise": draw(*shape)}, {"seed": 1, "variance": draw(b)},
            {"seed": 1, "drift": draw(1), "noise_scale": draw(b), "flips": flips},
            {"seed": 1, "out": draw(*shape[:-1], 2 * shape[-1])[..., ::2]},
        ):  # fmt: skip
            options = {"variance": 0.1, "form": form, **options}
            yield partial(gbm_step, draw(*shape), draw(*shape).bfloat16(), **options)


def mala_cases():
    import torch

    from genmodels.kernels.mala import mala_accept, mala_propose

    for shape in SHAPES:
        b = shape[0]
        states = [draw(*shape) for _ in range(4)]
        for options in (
            {}, {"seed": torch.arange(b), "counter": torch.tensor([3])},
            {"uniform": draw(2 * b)[::2]}, {"step": draw(b), "noise_scale": draw(b)},
            {"mask": draw(shape[-1]) > 0}, {"tether": draw(*shape), "tether_scale": draw(b)},
            {"accumulate": torch.float64}, {"inplace": True},
            {"count": torch.zeros(b, dtype=torch.int32, device="cuda:1")},
        ):  # fmt: skip
            options = {"step": 0.1, "seed": 1, **options}
            yield partial(mala_accept, *states, draw(b), draw(b), **options)
        for low in (torch.float16, torch.bfloat16):
            g, p = draw(*shape, dtype=low), draw(b, dtype=torch.float64)
            yield partial(mala_accept, *states[:2], g, g, p, p, step=0.1, seed=1)
    y = draw(2, 3, 8, 8).to(memory_format=torch.channels_last)
    yield partial(mala_accept, y, y, y, y, draw(2), draw(2), step=0.1, seed=1)
    yield partial(mala_propose, y, y, step=0.1, seed=1, tether=y, tether_scale=1.0)


def langevin_chain_cases():
    import torch

    from genmodels.kernels.langevin_chain import DoubleWell, Gaussian, Mixture, langevin_chain

    cpu = {"device": "cpu"}
    for b, d in ((3, 5), (1, 1), (2, 4000)):
        for energy in (
            Gaussian(), Gaussian(draw(d, **cpu), draw(d)), Gaussian(0.0, draw(d)),
            DoubleWell(2, 1), Mixture(draw(3, d, **cpu), draw(3, **cpu), draw(3)),
            Mixture(draw(1, d), draw(1), draw(1)),
        ):  # fmt: skip
            for options in (
                {"steps": 1}, {"steps": 7, "step": draw(b), "seed": torch.arange(b), "counter": 1},
                {"steps": 0, "noise_scale": draw(1), "out": draw(b, 2 * d)[:, ::2]},
            ):  # fmt: skip
                options = {"step": 0.1, "seed": 1, **options}
                yield partial(langevin_chain, draw(b, d), energy, **options)
    y = draw(4, 2, 3, dtype=torch.bfloat16)
    yield partial(langevin_chain, y, DoubleWell(), steps=2, step=0.1, seed=1, out=y)


def pairwise_cases():
    import torch

    from genmodels.kernels.pairwise import ball_count, knn_radius, polynomial_sums, rbf_sums

    floats = (torch.float32, torch.bfloat16, torch.float16)
    for n, m, d in ((17, 20, 24), (1, 1, 1), (9000, 70_000, 2048), (20, 3, 16)):
        for dtype in floats if n == 17 else floats[:1]:
            x, y = draw(n, d, dtype=dtype), draw(m, 2 * d, dtype=dtype)[:, ::2]
            for function, options in (
                (polynomial_sums, {"degree": 1}), (polynomial_sums, {"coef": 0}),
                (rbf_sums, {"bandwidth": 10}),
            ):  # fmt: skip
                yield partial(function, x, **options)
                yield partial(function, x, y, **options)
                yield partial(function, x, y, columns=True, **options)
            for k in (1, 3, 16) if n == 9000 else (3,) if n > 1 else ():
                yield partial(knn_radius, x, k=k)
                yield partial(knn_radius, x, y, k=k)
            yield partial(ball_count, x, y, draw(m))
            yield partial(ball_count, x, y, draw(n).double(), owner="x")


def resize_cases():
    import torch

    from genmodels.kernels.resize_normalize import MODES, resize_normalize

    for b, source, size in ((1, (1, 1), 1), (3, (8, 9), (5, 4)), (2, (300, 200), 299)):
        for channels, mode in itertools.product((1, 3) if b == 3 else (3,), MODES):
            pixels = torch.zeros(b, channels, *source, dtype=torch.uint8, device="cuda:1")
            for options in (
                {}, {"quantize": mode == "bicubic"}, {"dtype": torch.float16, "mean": 0},
                {"mean": [1.0] * channels, "std": draw(channels, device="cpu")},
            ):  # fmt: skip
                yield partial(resize_normalize, pixels, size, mode=mode, **options)
                swapped = pixels.permute(0, 2, 3, 1)
                yield partial(resize_normalize, swapped, size, mode=mode, layout="nhwc", **options)


def energy(y):
    return y.reshape(len(y), -1).square().sum(1)


def samplers_cases():
    import torch

    from genmodels.sampling.langevin import langevin_chain, mala_chain, sgld_chain

    for sampler in (langevin_chain, mala_chain, sgld_chain):
        for shape in ((1, 3, 8, 8), (5,)):
            for options in (
                {"seed": 1}, {"seed": torch.arange(shape[0])}, {"seed": torch.Generator()},
                {"seed": 1, "diagnostics": False, "counter": torch.zeros(1, dtype=torch.int64)},
                {"seed": 1, "tether": draw(*shape), "tether_scale": 0.1, "temperature": 0.5},
                {"seed": 1, "mask": draw(*shape) > 0, "step": draw(shape[0])},
            ):  # fmt: skip
                yield partial(sampler, energy, draw(*shape), **{"steps": 2, "step": 0.1, **options})


def graph_cases():
    """GraphedChain: streams, capture and replay happen with the state's device current."""
    import torch

    from genmodels.sampling.langevin import GraphedChain, langevin_chain, mala_chain

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
        chain = GraphedChain(energy, draw(4, 2), steps=2, step=0.1, seed=1, chain=sampler)
        chain(draw(4, 2), seed=5, counter=7)

    for sampler in (langevin_chain, mala_chain):
        yield partial(both, sampler)


def captured_cases():
    """What a graph captures: after a first call nothing comes from the host any more."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from genmodels.kernels.langevin_chain import DoubleWell, langevin_chain
    from genmodels.kernels.langevin_step import langevin_step
    from genmodels.kernels.pairwise import knn_radius, polynomial_sums
    from genmodels.kernels.philox import philox_normal
    from genmodels.kernels.resize_normalize import resize_normalize
    from genmodels.sampling.langevin import mala_chain

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
    yield partial(twice, mala_chain, energy, y, steps=2, mask=y > 0, **key)
    yield partial(twice, polynomial_sums, x)
    yield partial(twice, knn_radius, x, k=3)
    yield partial(twice, resize_normalize, pixels, 5, mode="bicubic", quantize=True)
    yield partial(twice, resize_normalize, pixels, 7, mean=[1, 2, 3], std=[4, 5, 6])


def describe(case):
    """Return the call of a case, tensors by shape and dtype."""
    words = [*case.args, *case.keywords.items()]
    return f"{case.func.__name__}" + "".join(
        f" {tuple(w.shape)} {w.dtype}" if hasattr(w, "shape") else f" {w}" for w in words
    )


def launch():
    """Print a line for each op: "fine: NUMBER of launches", or the first case that fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    launches = []
    pretend(launches)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for op in OPS:
            verdict, before = "", len(launches)
            for case in globals()[f"{op}_cases"]():
                count = len(launches)
                try:
                    case()
                    assert len(launches) > count, "nothing was launched"
                except Exception as error:
                    verdict = f"{describe(case)}: {type(error).__name__} {str(error)[-600:]!r}"
                    break
            print(f"{op}: {verdict or f'fine: {len(launches) - before} launches'}")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    pytest.importorskip("triton", reason="triton is not installed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    for name in ("TRITON_INTERPRET", "GENMODELS_KERNELS"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("op", OPS)
def test_launch(lines, op):
    assert lines[op].startswith("fine"), lines[op]


if __name__ == "__main__":
    launch()
