"""What is timed, at which sizes: each op of genmodels.kernels beside torch eager and compile."""

import copy
import math
from dataclasses import dataclass

import torch

from genmodels.kernels.gbm_step import gbm_step
from genmodels.kernels.langevin_chain import DoubleWell, langevin_chain
from genmodels.kernels.langevin_step import langevin_step
from genmodels.kernels.mala import mala_accept
from genmodels.kernels.philox import philox, philox_normal
from genmodels.sampling.langevin import GraphedChain, ula_chain

from . import eval_cases, torchebm
from .case import Case, compiled_form, error_of, state, ways

__all__ = ["SIZES", "SUITES", "cases"]

SUITES = ("kernels", "chain", "eval")


def _langevin(size, label, device, dtype, tether):
    y, grad, x = (state(size, device, dtype, seed) for seed in range(3))
    seeds = torch.arange(len(y), device=device)
    a, k = 0.01, 0.02
    s = (2 * a) ** 0.5
    extra = {"tether": x, "tether_scale": k} if tether else {}

    def eager(y, grad, x):
        new = y + a * grad + s * torch.randn_like(y)
        return (new + k * (x - y) if tether else new).clamp(-4.0, 4.0)

    def error():
        z = philox_normal(y.shape[1:], seeds, exact=False)
        got = langevin_step(y, grad, step=a, seed=seeds, clamp=(-4, 4), **extra)
        new = y.double() + a * grad.double() + s * z.double()
        new = new + k * (x.double() - y.double()) if tether else new
        return error_of(got, new.clamp(-4, 4))

    def ours(exact):
        options = {"clamp": (-4, 4), "out": out, "exact": exact, **extra}
        return langevin_step(y, grad, step=a, seed=seeds, **options)

    compiled, out = compiled_form(eager, device), torch.empty_like(y)
    variants = ways(ours, device)
    variants |= {"eager": lambda: eager(y, grad, x), "compile": lambda: compiled(y, grad, x)}
    if not tether and dtype == torch.float32:  # it has no tether, and float32 alone
        variants["torchebm"] = torchebm.step(y, grad, a, (-4.0, 4.0))
    return Case(
        "langevin_step" + (" + tether" if tether else ""),
        label,
        str(dtype).removeprefix("torch."),
        variants,
        bytes=y.numel() * y.element_size() * (4 if tether else 3),
        error=error,
        tolerance=1e-6 if dtype == torch.float32 else 0.01,
    )


def _gbm(size, label, device):
    x, h = state(size, device).exp(), state(size, device, seed=1)
    seeds, v, m = torch.arange(len(x), device=device), 0.01, 0.005

    def eager(x, h):
        return x * torch.exp(v * h - (m - 1.5 * v) + v**0.5 * torch.randn_like(x))

    def error():
        z = philox_normal(x.shape[1:], seeds, exact=False)
        got = gbm_step(x, h, variance=v, drift=m, seed=seeds)
        exponent = v * h.double() - (m - 1.5 * v) + v**0.5 * z.double()
        return error_of(got, x.double() * exponent.exp())

    compiled, out = compiled_form(eager, device), torch.empty_like(x)
    variants = ways(
        lambda exact: gbm_step(x, h, variance=v, drift=m, seed=seeds, out=out, exact=exact), device
    )
    variants |= {
        "eager": lambda: eager(x, h),
        "compile": lambda: compiled(x, h),
    }
    return Case("gbm_step", label, "float32", variants, 12 * x.numel(), 0, error, 1e-6)


def _mala(size, label, device):
    y, new = state(size, device), state(size, device, seed=1)
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
        # Of the sum that is computed, the densities left out: they are given, and in this pair of
        # states cancel all but 1 % of it, so that the ratio would show a hundredfold error.
        none = torch.zeros_like(lp)
        *_, ratio = mala_accept(y, new, g, g2, none, none, step=a, seed=seeds)
        d = [v.double().flatten(1) for v in (y, new, g, g2)]
        forward, backward = (d[1] - d[0] - a * d[2]), (d[0] - d[1] - a * d[3])
        return error_of(ratio, (forward.square().sum(1) - backward.square().sum(1)) / (4 * a))

    compiled, arguments = compiled_form(eager, device), (y, new, g, g2, lp, lp2)
    variants = {
        "ours": lambda: mala_accept(*arguments, step=a, seed=seeds),
        "eager": lambda: eager(*arguments),
        "compile": lambda: compiled(*arguments),
    }
    # Four states are read and two written; what is read again for the choice is in a cache.
    return Case("mala_accept", label, "float32", variants, 24 * y.numel(), 0, error, 1e-6)


def _normals(size, label, device):
    seeds = torch.arange(size[0], device=device)
    variants = ways(lambda exact: philox_normal(size[1:], seeds, exact=exact), device)
    variants["eager"] = lambda: torch.randn(size, device=device)

    def error():  # Box-Muller on the same words
        z = philox_normal(size[1:], seeds[:4], exact=False)
        group = torch.arange(z[0].numel() // 4, device=device)[None]
        zero = torch.zeros_like(group)
        words = [w.double() for w in philox(seeds[:4, None], group, zero, zero, zero)]
        exact = []
        for radius, angle in (words[:2], words[2:]):
            uniform = ((radius.float() + 1) * 2**-32).double()  # float32 by definition
            radius = (-2 * uniform.log()).sqrt()
            angle = angle * (2 * math.pi * 2**-32)
            exact += [radius * angle.cos(), radius * angle.sin()]
        return error_of(z, torch.stack(exact, -1).reshape(z.shape))

    elements = torch.Size(size).numel()
    return Case("philox_normal", label, "float32", variants, 4 * elements, 0, error, 1e-6)


def _toy_chain(chains, steps, device):
    energy, y = DoubleWell(1.0, 1.0), state((chains, 2), device)
    seeds, a = torch.arange(chains, device=device), 0.01

    def eager():
        x = y
        for _ in range(steps):
            x = x + a * energy.score(x) + (2 * a) ** 0.5 * torch.randn_like(x)
        return x

    step = compiled_form(
        lambda x: x + a * energy.score(x) + (2 * a) ** 0.5 * torch.randn_like(x), device
    )

    def compiled():
        x = y
        for _ in range(steps):
            x = step(x)
        return x

    def error():
        got = langevin_chain(y[:64], energy, steps=20, step=a, seed=seeds[:64])
        x = y[:64].double()
        for i in range(20):
            z = philox_normal((2,), seeds[:64], i, exact=False).double()
            x = x + a * energy.score(x) + (2 * a) ** 0.5 * z
        return error_of(got, x)

    variants = ways(
        lambda exact: langevin_chain(y, energy, steps=steps, step=a, seed=seeds, exact=exact),
        device,
    )
    variants |= {"eager": eager, "compile": compiled}
    variants["torchebm"] = torchebm.double_well(y, energy, steps, a)
    size = f"{chains} x 2, {steps} steps"
    # Thousands of launches make a graph of the eager loop slow to capture.
    return Case(
        "double-well chain", size, "float32", variants, 16 * chains, 0, error, 2e-5, graph=False
    )


def _network_chain(images, channels, steps, device):
    """End to end: a convolutional energy, whose gradient is most of the time."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, channels, 3, padding=1),
        torch.nn.SiLU(),
        torch.nn.Conv2d(channels, channels, 3, padding=1),
        torch.nn.SiLU(),
        torch.nn.Conv2d(channels, channels, 3, 2, padding=1),
        torch.nn.SiLU(),
    ).to(device)

    def energy(y):
        return net(y).sum((1, 2, 3))

    y, a = state((images, 3, 32, 32), device), 1e-3
    options = {"steps": steps, "step": a, "seed": torch.arange(images, device=device)}
    options |= {"freeze": (net,), "diagnostics": False}

    def eager():  # as usually written: parameters keep their gradients switched on
        x = y
        for _ in range(steps):
            x = x.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(energy(x).sum(), x)
            x = x - a * grad + (2 * a) ** 0.5 * torch.randn_like(x)
        return x

    def error():  # the first two chains in float64, with the noise that ours draws
        exact, x = copy.deepcopy(net).double(), y[:2].double()
        for i in range(steps):
            x = x.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(exact(x).sum(), x)
            z = philox_normal(y.shape[1:], options["seed"][:2], i, exact=False)
            x = x.detach() - a * grad + (2 * a) ** 0.5 * z
        part = {**options, "seed": options["seed"][:2]}
        return error_of(ula_chain(energy, y[:2], **part).y, x)

    variants = ways(lambda exact: ula_chain(energy, y, exact=exact, **options), device)
    variants["eager"] = eager
    variants["torchebm"] = torchebm.chain(energy, y, steps, a)
    if device == "cuda":
        variants["ours, one graph"] = GraphedChain(energy, y, **options)
    size = f"{images} images, {channels} channels, {steps} steps"
    return Case(
        "network chain, end to end", size, "float32", variants, 0, 0, error, 1e-2, graph=False
    )


@dataclass
class Sizes:
    """How large the cases are.

    Attributes:
        states: {label: shape} of the steps; low: whether bfloat16 states are timed too.
        toy: chains and steps; networks: (images, channels) each; steps of these.
        resize: images, source, target; features: vectors and width.
    """

    states: dict
    low: bool
    toy: tuple
    networks: tuple
    steps: int
    resize: tuple
    features: tuple


SIZES = {
    "cuda": Sizes(
        {"256 x 3 x 32^2": (256, 3, 32, 32), "64 x 3 x 512^2": (64, 3, 512, 512)}, True,
        (262_144, 1000), ((16, 32), (256, 128)), 20, (256, 32, (299, 299)), (50_000, 2048),
    ),
    "cpu": Sizes(
        {"16 x 3 x 32^2": (16, 3, 32, 32), "256 x 3 x 32^2": (256, 3, 32, 32)}, False,
        (4096, 50), ((8, 64),), 5, (4, 32, (299, 299)), (2000, 256),
    ),
    "tiny": Sizes(
        {"4 x 3 x 8^2": (4, 3, 8, 8)}, True, (32, 3), ((2, 4),), 2, (2, 8, (13, 13)), (40, 16)
    ),
}  # fmt: skip


def cases(device, suites=SUITES, sizes=None):
    """Yield functions that build the cases of these suites; sizes: of SIZES, by default device."""
    of = SIZES[sizes or device]
    if "kernels" in suites:
        for label, size in of.states.items():
            yield lambda z=size, n=label: _langevin(z, n, device, torch.float32, False)
            yield lambda z=size, n=label: _langevin(z, n, device, torch.float32, True)
            if of.low:
                yield lambda z=size, n=label: _langevin(z, n, device, torch.bfloat16, False)
            yield lambda z=size, n=label: _gbm(z, n, device)
            yield lambda z=size, n=label: _mala(z, n, device)
            yield lambda z=size, n=label: _normals(z, n, device)
    if "chain" in suites:
        yield lambda: _toy_chain(*of.toy, device)
        for images, channels in of.networks:
            yield lambda b=images, c=channels: _network_chain(b, c, of.steps, device)
    if "eval" in suites:
        yield lambda: eval_cases.resize(*of.resize, device)
        yield lambda: eval_cases.kid(*of.features, device)
        yield lambda: eval_cases.manifold(*of.features, device)
