"""The kernels on a real GPU against their references: `python -m pytest -m gpu`."""

import pytest
import torch

from genmodels.kernels.gbm_step import gbm_step
from genmodels.kernels.langevin_chain import DoubleWell, Gaussian, Mixture, langevin_chain
from genmodels.kernels.langevin_step import langevin_step
from genmodels.kernels.mala import mala_accept, mala_propose
from genmodels.kernels.pairwise import ball_count, knn_radius, polynomial_sums, rbf_sums
from genmodels.kernels.philox import philox_normal, philox_uniform
from genmodels.kernels.resize_normalize import resize_normalize

pytestmark = pytest.mark.gpu


def on(device, values):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()}


@pytest.fixture
def both(monkeypatch):
    """Run a function on the CPU (reference) and on the GPU (kernel, insisted on)."""

    def run(function, *args, **kwargs):
        monkeypatch.setenv("GENMODELS_KERNELS", "torch")
        reference = function(*args, **kwargs)
        monkeypatch.setenv("GENMODELS_KERNELS", "triton")
        moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
        result = function(*moved, **on("cuda", kwargs))
        monkeypatch.setenv("GENMODELS_KERNELS", "auto")
        return reference, result.cpu() if isinstance(result, torch.Tensor) else result

    return run


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_noise(both):
    seeds, steps = torch.arange(7) * 2**40 - 3, torch.arange(7) * 2**33
    for shape in ((3, 32, 32), (5,), (2,), (3, 7, 11)):
        cpu = philox_uniform(shape, seeds, steps, stream=2)
        gpu = philox_uniform(shape, seeds.cuda(), steps.cuda(), stream=2, device="cuda")
        assert torch.equal(cpu, gpu.cpu())
        cpu = philox_normal(shape, seeds, steps, stream=2)
        gpu = philox_normal(shape, seeds.cuda(), steps.cuda(), stream=2, device="cuda")
        assert (cpu - gpu.cpu()).abs().max() < 3e-6
    z = philox_normal((10**8,), 1, device="cuda")[0]
    n = z.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z.double() ** power).mean() - mean) < 5 * (variance / n) ** 0.5
    grid = torch.linspace(-5, 5, 201, device="cuda", dtype=torch.float64)
    share = torch.stack([(z <= x).double().mean() for x in grid])
    assert (share - torch.special.ndtr(grid)).abs().max() < 1.95 / n**0.5


@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (2, 3, 129, 129), (1000, 2), (3, 7, 5), (9,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_langevin_step(both, shape, dtype):
    y, grad, x = (draw(*shape, seed=i).to(dtype) for i in range(3))
    b = shape[0]
    for options in (
        {"step": 0.1, "seed": 3},
        {
            "step": draw(b).abs() + 0.1,
            "noise_scale": draw(b, seed=1).abs(),
            "tether": x,
            "tether_scale": draw(b, seed=2).abs(),
            "mask": draw(*shape, seed=4) > 0,
            "known": x,
            "clamp": (-1.0, 1.5),
            "grad_clip": 1.0,
            "grad_norm": 2.0,
            "seed": torch.arange(b),
            "counter": torch.tensor([2**35]),
        },
    ):
        cpu, gpu = both(langevin_step, y, grad, **options)
        tolerance = {torch.float32: 5e-6, torch.bfloat16: 0.04, torch.float16: 0.005}[dtype]
        assert (cpu.float() - gpu.float()).abs().max() < tolerance
        if "mask" in options:
            assert torch.equal(gpu[~options["mask"]], x[~options["mask"]])


def test_nan_survives_the_clamp(both):
    y = torch.tensor([[float("nan"), float("inf"), 3.0, 0.5]])
    _, gpu = both(langevin_step, y, 0 * draw(1, 4), step=1.0, noise_scale=0, clamp=(-1, 1))
    assert gpu[0, 0].isnan() and gpu[0, 1:].tolist() == [1.0, 1.0, 0.5]


def test_gbm_step(both):
    x, h = draw(8, 3, 33, 33).exp(), draw(8, 3, 33, 33, seed=1)
    for form in ("dls", "ums", "log"):
        cpu, gpu = both(gbm_step, x, h, variance=0.5, drift=0.1, form=form, seed=torch.arange(8))
        assert torch.allclose(cpu, gpu, rtol=1e-5, atol=1e-5)
    flips = [torch.zeros(8, dtype=torch.int32, device=d) for d in ("cpu", "cuda")]
    for count in flips:
        a, b = x.to(count.device), h.to(count.device)
        gbm_step(a, b, variance=0.5, form="ums", seed=5, flips=count)
    assert torch.equal(flips[0], flips[1].cpu()) and flips[0].sum() > 0


@pytest.mark.parametrize("shape", [(500, 2), (16, 3, 32, 32), (3, 3, 128, 128)])
def test_mala(both, shape):
    y, b = draw(*shape), shape[0]
    options = {"step": 0.1 * y[0].numel() ** -0.5, "seed": torch.arange(b)}
    new = mala_propose(y, -y, **options)
    before, after = (-0.5 * v.flatten(1).square().sum(1) for v in (y, new))
    for accumulate in (torch.float32, torch.float64):
        call = (y, new, -y, -new, before, after)
        cpu, gpu = both(mala_accept, *call, accumulate=accumulate, **options)
        ratio = gpu[4].cpu()
        assert torch.allclose(cpu[4], ratio, rtol=1e-4, atol=1e-4)
        assert (cpu[3] == gpu[3].cpu()).float().mean() > 0.99
        same = cpu[3] == gpu[3].cpu()
        assert torch.equal(cpu[0][same], gpu[0].cpu()[same])


def test_langevin_chain(both):
    y = draw(1000, 2)
    mixture = Mixture(draw(5, 2), draw(5, seed=1).abs() + 0.3, draw(5, seed=2).abs())
    for energy in (Gaussian(0.5, 2.0), DoubleWell(), mixture):
        cpu, gpu = both(langevin_chain, y, energy, steps=20, step=0.01, seed=torch.arange(1000))
        assert (cpu - gpu).abs().max() < 1e-4
    n = 1_000_000  # the stationary law of ULA on precision 2
    start = torch.zeros(n, 2, device="cuda")
    seeds = torch.arange(n, device="cuda")
    z = langevin_chain(start, Gaussian(0.0, 2.0), steps=200, step=0.1, seed=seeds)
    variance = 1 / (2 * (1 - 0.1))
    assert ((z.double().var(0) / variance - 1).abs() < 5 * (2 / n) ** 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairwise(both, dtype):
    x, y = (draw(700, 300).to(dtype) + 1), (draw(900, 300, seed=1).to(dtype) + 1)
    for function, args, options in (
        (polynomial_sums, (x, y), {}),
        (polynomial_sums, (x,), {}),
        (rbf_sums, (x, y), {"bandwidth": 17.0}),
        (knn_radius, (x, y), {"k": 5}),
        (knn_radius, (x,), {"k": 3}),
    ):
        cpu, gpu = both(function, *args, **options)
        assert torch.allclose(cpu, gpu, rtol=2e-6 if function is not knn_radius else 1e-4)
        again = function(*(a.cuda() for a in args), **options)
        assert torch.equal(gpu, again.cpu())  # bit for bit
    for function, options in ((polynomial_sums, {}), (rbf_sums, {"bandwidth": 17.0})):
        for a, b in zip(
            function(x, y, columns=True, **options),
            function(x.cuda(), y.cuda(), columns=True, **options),
        ):
            assert torch.allclose(a, b.cpu(), rtol=2e-6)
    cpu, gpu = both(ball_count, x, y, torch.full((900,), 24.5))
    assert (cpu - gpu).abs().max() <= 1


@pytest.mark.parametrize(
    "mode, quantize", [("tf1", 0), ("bilinear", 0), ("bicubic", 0), ("bicubic", 1)]
)
def test_resize_normalize(both, mode, quantize):
    pixels = torch.randint(0, 256, (5, 3, 65, 97), dtype=torch.uint8)
    for size in ((299, 299), (29, 31)):
        cpu, gpu = both(
            resize_normalize, pixels, size, mode=mode, quantize=bool(quantize), mean=0, std=1
        )
        assert (cpu - gpu).abs().max() <= (0 if quantize else 0.002)


def test_nothing_waits_for_the_device():
    y, lp, seeds = draw(64, 3, 8, 8).cuda(), draw(64).cuda(), torch.arange(64).cuda()
    pixels = torch.zeros(2, 3, 9, 9, dtype=torch.uint8, device="cuda")
    for _ in range(2):  # compiled, and tables copied, in the first round
        langevin_step(y, y, step=0.1, seed=seeds, grad_norm=1.0, out=y.clone())
        gbm_step(y.exp(), y, variance=0.1, seed=seeds)
        mala_accept(y, y, y, y, lp, lp, step=0.1, seed=seeds)
        langevin_chain(y, DoubleWell(), steps=3, step=0.1, seed=seeds)
        polynomial_sums(y.flatten(1))
        knn_radius(y.flatten(1), k=3)
        resize_normalize(pixels, 5)
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_channels_last_is_not_copied():
    """Beside the result nothing of the state's size is allocated."""
    y, g = (
        draw(64, 3, 128, 128, seed=i).cuda().to(memory_format=torch.channels_last) for i in range(2)
    )
    out, size = torch.empty_like(y), y.numel() * 4
    langevin_step(y, g, step=0.1, noise=g, out=out)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    langevin_step(y, g, step=0.1, noise=g, out=out)
    assert torch.cuda.max_memory_allocated() - before < size / 4
    assert torch.allclose(out, y + 0.1 * g + 0.2**0.5 * g, atol=1e-5)


@pytest.mark.parametrize("function", [resize_normalize, polynomial_sums])
def test_captured_in_a_graph(function):
    x, args = draw(300, 64).cuda(), ()
    if function is resize_normalize:
        x = torch.randint(0, 256, (2, 3, 17, 17), dtype=torch.uint8, device="cuda")
        args = (11,)
    expected = function(x, *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(x, *args)
    graph.replay()
    assert torch.equal(torch.as_tensor(result), expected)


def test_more_than_two_to_the_31_elements():
    items, numel = 40, 3 * 4352**2  # 2.27e9 elements of float16, three such tensors
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of free memory on the device")
    y = torch.zeros(items, numel, dtype=torch.float16, device="cuda")
    seeds = torch.arange(items, device="cuda")
    langevin_step(y, y, step=0.5, seed=seeds, out=y)  # y is now its noise
    for item in (0, 37, 38, 39):
        expected = philox_normal((numel,), seeds[item : item + 1])[0].half()
        assert (y[item] - expected).abs().max() < 0.005
    y.zero_()
    langevin_step(y, y, step=0.5, seed=7, out=y)  # one stream for all
    last = philox_normal((4,), 7, device="cuda")
    assert (y[0, :4] - last[0]).abs().max() < 0.005
    assert 0.99 < y[-1, -(10**6) :].float().std() < 1.01


def test_kid_takes_little_memory():
    x, y = (torch.randn(20_000, 256, device="cuda") for _ in "ab")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    polynomial_sums(x), polynomial_sums(x, y, columns=True)
    assert torch.cuda.max_memory_allocated() - before < 1e8
