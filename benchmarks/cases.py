"""What is timed: each op of genmodels.kernels beside torch eager and torch.compile.

A case holds variants of one computation, the bytes and operations it cannot do without, and a check
of ours against float64 or against the plain formulation, made before anything is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from genmodels.kernels.gbm_step import gbm_step
from genmodels.kernels.langevin_chain import DoubleWell
from genmodels.kernels.langevin_chain import langevin_chain as whole_chain
from genmodels.kernels.langevin_step import langevin_step
from genmodels.kernels.mala import mala_accept
from genmodels.kernels.mmd import mmd
from genmodels.kernels.pairwise import ball_count, knn_radius, polynomial_sums
from genmodels.kernels.philox import philox_normal
from genmodels.kernels.resize_normalize import resize_normalize
from genmodels.sampling.langevin import GraphedChain, langevin_chain

__all__ = ["SUITES", "Case", "cases"]

SUITES = ("kernels", "chain", "eval")


@dataclass
class Case:
    """One computation and the ways to do it.

    Attributes:
        name, size, dtype: how it is called in the table.
        variants: {"ours" | "eager" | "compile" | ...: function without arguments}.
        bytes, flops: least memory traffic and arithmetic, for the share of the roofline.
        error: function that returns ours' largest error; tolerance: the largest that is accepted.
    """

    name: str
    size: str
    dtype: str
    variants: dict[str, Callable]
    bytes: float = 0.0
    flops: float = 0.0
    error: Callable = field(default=lambda: 0.0)
    tolerance: float = 0.0


def _compiled(function, device):
    """torch.compile; on a CPU with the eager generator, whose in-graph one is ten times slower."""
    if device == "cpu":
        import torch._inductor.config as config

        config.fallback_random = True
    return torch.compile(function, dynamic=False)


def _state(size, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(device, dtype)


def _worst(got, expected):
    return (got.double() - expected.double()).abs().max().item()


def _langevin(size, label, device, dtype, tether):
    y, grad, x = (_state(size, device, dtype, seed) for seed in range(3))
    seeds = torch.arange(len(y), device=device)
    a, k = 0.01, 0.02
    s = (2 * a) ** 0.5
    extra = {"tether": x, "tether_scale": k} if tether else {}

    def eager(y, grad, x):
        new = y + a * grad + s * torch.randn_like(y)
        return (new + k * (x - y) if tether else new).clamp(-4.0, 4.0)

    def error():
        z = _state(size, device, seed=3)
        got = langevin_step(y, grad, step=a, noise=z, clamp=(-4, 4), **extra)
        new = y.double() + a * grad.double() + s * z.double()
        new = new + k * (x.double() - y.double()) if tether else new
        return _worst(got, new.clamp(-4, 4))

    compiled, out = _compiled(eager, device), torch.empty_like(y)
    return Case(
        "langevin_step" + (" + tether" if tether else ""),
        label,
        str(dtype).removeprefix("torch."),
        {
            "ours": lambda: langevin_step(
                y, grad, step=a, seed=seeds, clamp=(-4, 4), out=out, **extra
            ),
            "eager": lambda: eager(y, grad, x),
            "compile": lambda: compiled(y, grad, x),
        },
        bytes=y.numel() * y.element_size() * (4 if tether else 3),
        error=error,
        tolerance=3e-6 if dtype == torch.float32 else 0.04,
    )


def _gbm(size, label, device):
    x, h = _state(size, device).exp(), _state(size, device, seed=1)
    seeds, v, m = torch.arange(len(x), device=device), 0.01, 0.005

    def eager(x, h):
        return x * torch.exp(v * h - (m - 1.5 * v) + v**0.5 * torch.randn_like(x))

    def error():
        z = _state(size, device, seed=3)
        got = gbm_step(x, h, variance=v, drift=m, noise=z)
        exponent = v * h.double() - (m - 1.5 * v) + v**0.5 * z.double()
        return _worst(got / x, exponent.exp())

    compiled, out = _compiled(eager, device), torch.empty_like(x)
    variants = {
        "ours": lambda: gbm_step(x, h, variance=v, drift=m, seed=seeds, out=out),
        "eager": lambda: eager(x, h),
        "compile": lambda: compiled(x, h),
    }
    return Case("gbm_step", label, "float32", variants, 12 * x.numel(), 0, error, 3e-6)


def _mala(size, label, device):
    y, new = _state(size, device), _state(size, device, seed=1)
    g, g2 = -y, -new
    a, seeds = 0.02, torch.arange(len(y), device=device)
    lp, lp2 = (-0.5 * v.flatten(1).square().sum(1) for v in (y, new))

    def eager(y, new, g, g2, lp, lp2):
        forward = (new - y - a * g).flatten(1).square().sum(1)
        backward = (y - new - a * g2).flatten(1).square().sum(1)
        ratio = lp2 - lp + (forward - backward) / (4 * a)
        accept = torch.rand_like(lp).log() < ratio
        take = accept.reshape(-1, *[1] * (y.dim() - 1))
        return torch.where(take, new, y), torch.where(take, g2, g), torch.where(accept, lp2, lp)

    def error():
        *_, ratio = mala_accept(y, new, g, g2, lp, lp2, step=a, seed=seeds)
        d = [v.double().flatten(1) for v in (y, new, g, g2)]
        forward, backward = (d[1] - d[0] - a * d[2]), (d[0] - d[1] - a * d[3])
        expected = lp2.double() - lp.double()
        expected += (forward.square().sum(1) - backward.square().sum(1)) / (4 * a)
        return ((ratio - expected).abs() / expected.abs().clamp(min=1)).max().item()

    compiled, arguments = _compiled(eager, device), (y, new, g, g2, lp, lp2)
    variants = {
        "ours": lambda: mala_accept(*arguments, step=a, seed=seeds),
        "eager": lambda: eager(*arguments),
        "compile": lambda: compiled(*arguments),
    }
    return Case("mala_accept", label, "float32", variants, 32 * y.numel(), 0, error, 1e-4)


def _normals(size, label, device):
    seeds = torch.arange(size[0], device=device)
    variants = {
        "ours": lambda: philox_normal(size[1:], seeds),
        "eager": lambda: torch.randn(size, device=device),
    }

    def error():  # four moments, in standard errors
        z = philox_normal(size[1:], seeds).double()
        laws = ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96))
        return max(abs((z**p).mean() - m).item() / (v / z.numel()) ** 0.5 for p, m, v in laws)

    elements = torch.Size(size).numel()
    return Case("philox_normal", label, "float32", variants, 4 * elements, 0, error, 5.0)


def _toy_chain(chains, steps, device):
    energy, y = DoubleWell(1.0, 1.0), _state((chains, 2), device)
    seeds, a = torch.arange(chains, device=device), 0.01

    def eager():
        x = y
        for _ in range(steps):
            x = x + a * energy.score(x) + (2 * a) ** 0.5 * torch.randn_like(x)
        return x

    step = _compiled(
        lambda x: x + a * energy.score(x) + (2 * a) ** 0.5 * torch.randn_like(x), device
    )

    def compiled():
        x = y
        for _ in range(steps):
            x = step(x)
        return x

    def error():
        got = whole_chain(y[:64], energy, steps=20, step=a, seed=seeds[:64])
        x = y[:64].double()
        for i in range(20):
            z = philox_normal((2,), seeds[:64], i).double()
            x = x + a * energy.score(x) + (2 * a) ** 0.5 * z
        return _worst(got, x)

    variants = {
        "ours": lambda: whole_chain(y, energy, steps=steps, step=a, seed=seeds),
        "eager": eager,
        "compile": compiled,
    }
    size = f"{chains} x 2, {steps} steps"
    return Case("double-well chain", size, "float32", variants, 16 * chains, 0, error, 5e-5)


def _network_chain(images, channels, steps, device):
    """End to end: a convolutional energy, whose gradient is most of the time."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, channels, 3, padding=1), torch.nn.SiLU(),
        torch.nn.Conv2d(channels, channels, 3, padding=1), torch.nn.SiLU(),
        torch.nn.Conv2d(channels, channels, 3, 2, padding=1), torch.nn.SiLU(),
    ).to(device)  # fmt: skip

    def energy(y):
        return net(y).sum((1, 2, 3))

    y, a = _state((images, 3, 32, 32), device), 1e-3
    options = {"steps": steps, "step": a, "seed": torch.arange(images, device=device)}
    options |= {"freeze": (net,), "diagnostics": False}

    def eager():  # as usually written: parameters keep their gradients switched on
        x = y
        for _ in range(steps):
            x = x.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(energy(x).sum(), x)
            x = x - a * grad + (2 * a) ** 0.5 * torch.randn_like(x)
        return x

    variants = {"ours": lambda: langevin_chain(energy, y, **options), "eager": eager}
    if device == "cuda":
        variants["ours, graph"] = GraphedChain(energy, y, **options)
    size = f"{images} images, {channels} channels, {steps} steps"
    return Case("network chain, end to end", size, "float32", variants)


def _resize(images, source, device):
    pixels = torch.randint(0, 256, (images, source, source, 3), dtype=torch.uint8).to(device)

    def eager(pixels):
        planes = pixels.permute(0, 3, 1, 2).float()
        planes = torch.nn.functional.interpolate(planes, (299, 299), mode="bilinear")
        return (planes / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    def ours():
        return resize_normalize(pixels, 299, mode="bilinear", layout="nhwc")

    compiled = _compiled(eager, device)
    variants = {"ours": ours, "eager": lambda: eager(pixels), "compile": lambda: compiled(pixels)}
    traffic = images * (299 * 299 * 12 + source * source * 3)
    size = f"{images} x {source}^2 -> 299^2"
    return Case("resize_normalize", size, "uint8", variants, traffic, 0,
                lambda: _worst(ours(), eager(pixels)), 1e-4)  # fmt: skip


def _kid(count, width, device):
    x, y = _state((count, width), device), _state((count, width), device, seed=1) * 1.01

    def ours(x=x, y=y):
        sums = polynomial_sums
        return mmd(sums(x), sums(y), sums(x, y), sums(y, x))

    def full(x=x, y=y):
        n = len(x)
        xx, yy, xy = ((u @ v.T / width + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        off = (xx.sum() - xx.diagonal().sum() + yy.sum() - yy.diagonal().sum()) / (n * (n - 1))
        return off - 2 * xy.mean()

    def error():
        part = x[:2000].double(), y[:2000].double()
        return abs(ours(x[:2000], y[:2000])[0] - full(*part)).item()

    variants = {"ours (with error bar)": ours, "eager": full}
    return Case("KID, all pairs", f"{count} x {width}", "float32", variants, 0,
                6.0 * count**2 * width, error, 2e-6)  # fmt: skip


def _manifold(count, width, device):
    x, y = _state((count, width), device), _state((count, width), device, seed=1)

    def ours(x=x, y=y):
        radius = knn_radius(x, k=3)
        return radius, (ball_count(y, x, radius) > 0).float().mean()

    def full(x=x, y=y):
        radius = torch.cdist(x, x).kthvalue(4, dim=1).values
        return radius, (torch.cdist(y, x) <= radius).any(1).float().mean()

    def error():
        part = x[:1000], y[:1000]
        return _worst(ours(*part)[0], full(*(p.double() for p in part))[0])

    variants = {"ours": ours, "eager": full}
    return Case("precision (k = 3)", f"{count} x {width}", "float32", variants, 0,
                4.0 * count**2 * width, error, 2e-3)  # fmt: skip


def cases(device, suites=SUITES):
    """Yield functions that build the cases of these suites, at sizes for the device."""
    gpu = device == "cuda"
    sizes = {"16 x 3 x 32^2": (16, 3, 32, 32), "256 x 3 x 32^2": (256, 3, 32, 32)}
    if gpu:
        sizes = {"256 x 3 x 32^2": (256, 3, 32, 32), "64 x 3 x 512^2": (64, 3, 512, 512)}
    if "kernels" in suites:
        for label, size in sizes.items():
            yield lambda z=size, n=label: _langevin(z, n, device, torch.float32, False)
            yield lambda z=size, n=label: _langevin(z, n, device, torch.float32, True)
            if gpu:
                yield lambda z=size, n=label: _langevin(z, n, device, torch.bfloat16, False)
            yield lambda z=size, n=label: _gbm(z, n, device)
            yield lambda z=size, n=label: _mala(z, n, device)
            yield lambda z=size, n=label: _normals(z, n, device)
    if "chain" in suites:
        yield lambda: _toy_chain(262_144 if gpu else 4096, 1000 if gpu else 50, device)
        for images, channels in ((16, 32), (256, 128)) if gpu else ((8, 64),):
            yield lambda b=images, c=channels: _network_chain(b, c, 20 if gpu else 5, device)
    if "eval" in suites:
        yield lambda: _resize(256 if gpu else 4, 32, device)
        yield lambda: _kid(50_000 if gpu else 2000, 2048 if gpu else 256, device)
        yield lambda: _manifold(50_000 if gpu else 2000, 2048 if gpu else 256, device)
