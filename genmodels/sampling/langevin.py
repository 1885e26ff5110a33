"""Langevin Markov chains over any energy: unadjusted, stochastic-gradient and Metropolis-adjusted.

The energy is a callable `energy(y) -> (B,)`, LOWER = likelier: the target is exp(-E(y) / T). The
state is float32 (float64 stays), one chain per item of y (B, ...). Noise is a function of (seed,
step, element) through genmodels.kernels, so a chain does not depend on the batch it runs in.

    chain = ula_chain(energy, y, steps=60, step=0.01, seed=torch.arange(len(y)))
    chain.y, chain.grad_norm

Schedules: `step`, `noise_scale` and `temperature` are each a number, a tensor (B,), a list of
`steps` of these, or a function of the step's index.

References: Roberts and Tweedie, Bernoulli 1996 (ULA, MALA); Welling and Teh, ICML 2011 (SGLD);
Du and Mordatch, arXiv 1903.08689 (SGLD on images, noise and step decoupled).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genmodels.kernels.langevin_step import langevin_step
from genmodels.kernels.mala import mala_accept, mala_propose

__all__ = [
    "Chain",
    "GraphedChain",
    "acceptance_line",
    "frozen",
    "mala_chain",
    "sgld_chain",
    "ula_chain",
]

Energy = Callable[[Tensor], Tensor]  # E(y), (B, ...) -> (B,), lower = likelier
Number = float | Tensor  # one for all chains, or (B,)
Schedule = Number | Sequence[Number] | Callable[[int], Number]  # for all steps, or one for each
Seed = int | Tensor | Sequence[int] | torch.Generator
Callback = Callable[[int, Tensor], object] | None


@dataclass
class Chain:
    """What a chain returns; everything stays on the state's device.

    Attributes:
        y: final state, (B, ...).
        energy: energy there, (B,); None for chains that do not compute it.
        grad_norm: L2 norm of grad log p at each step, (steps, B); None without diagnostics.
        displacement: L2 distance from the start, (B,); None without diagnostics.
        accepted: Metropolis decisions, bool (steps, B); None for chains without.
        counter: `counter` of the step after the last: continue there for fresh noise.
    """

    y: Tensor
    energy: Tensor | None = None
    grad_norm: Tensor | None = None
    displacement: Tensor | None = None
    accepted: Tensor | None = None
    counter: int | Tensor = 0

    @property
    def acceptance(self) -> Tensor | None:
        """Share of accepted proposals per chain, (B,), or None."""
        return None if self.accepted is None else self.accepted.float().mean(0)


def acceptance_line(accepted: Tensor) -> str:
    """Return words on Metropolis decisions, of any shape, for sample.py to print."""
    return f"{100 * float(accepted.float().mean()):.0f} % of proposals accepted"


@contextmanager
def frozen(*modules: Any) -> Iterator[None]:
    """Switch off requires_grad of the modules' parameters, and put it back as it was.

    A chain needs the gradient of its input alone: without this, every layer keeps its input for
    gradients that nobody reads.
    """
    owners = [getattr(module, "__self__", module) for module in modules]  # bound methods
    owners = [owner for owner in owners if isinstance(owner, torch.nn.Module)]
    before = [(p, p.requires_grad) for owner in owners for p in owner.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def _score(energy: Energy, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return (energy (B,), grad of -energy like y), both detached."""
    with torch.enable_grad():
        y = y.detach().requires_grad_(True)
        value = energy(y)
        if value.shape != y.shape[:1]:
            raise ValueError(
                f"energy must return one number per chain ({len(y)},), got {tuple(value.shape)}"
            )
        (grad,) = torch.autograd.grad(-value.sum(), y)
    return value.detach(), grad.contiguous()  # a sum's gradient comes expanded


def _at(name: str, value: Schedule | None, i: int, steps: int) -> Any:
    """Return a schedule's value at step i."""
    if isinstance(value, (list, tuple)):
        if len(value) != steps:
            raise ValueError(f"{name} must have one entry per step ({steps}), got {len(value)}")
        return value[i]
    return value(i) if callable(value) else value


def _coefficients(
    i: int, steps: int, step: Schedule, noise_scale: Schedule | None, temperature: Schedule
) -> tuple[Number, Number, Number]:
    """Return (a, s, T) at step i; s = sqrt(2 a T) where noise_scale is None."""
    a = _at("step", step, i, steps)
    t = _at("temperature", temperature, i, steps)
    s = _at("noise_scale", noise_scale, i, steps)
    return a, (2 * a * t) ** 0.5 if s is None else s, t


def _start(x: Tensor, steps: int, seed: Seed) -> tuple[Tensor, int | Tensor]:
    """Return (state, seeds): a copy of x in the chain's precision; seeds as the kernels take them.

    A torch.Generator gives one seed per chain, drawn where the generator lives.
    """
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}")
    if isinstance(seed, torch.Generator):
        seed = torch.randint(2**62, (len(x),), generator=seed, device=seed.device)
    if isinstance(seed, (list, tuple)):
        seed = torch.tensor(seed, dtype=torch.int64)
    if isinstance(seed, torch.Tensor):
        if seed.numel() not in (1, len(x)):
            raise ValueError(f"seed must be one or one per chain ({len(x)},), got {seed.numel()}")
        seed = seed.to(x.device)
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return x.detach().to(dtype, memory_format=torch.contiguous_format, copy=True), seed


def _spread(mask: Tensor | None, y: Tensor) -> Tensor | None:
    """Return the mask in y's shape and memory order: once, where each step would copy it."""
    return None if mask is None else mask.expand_as(y).contiguous()


def _norm(x: Tensor) -> Tensor:
    """Return the L2 norm of each item, float32 (B,)."""
    return torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1, dtype=torch.float32)


def _diagnostics(y: Tensor, start: Tensor | None, norms: list[Tensor]) -> dict[str, Tensor]:
    """Return grad_norm and displacement for Chain; nothing where start is None."""
    if start is None:
        return {}
    empty = torch.empty(0, len(y), device=y.device)
    return {"grad_norm": torch.stack(norms) if norms else empty, "displacement": _norm(y - start)}


@torch.no_grad()
def ula_chain(
    energy: Energy,
    y: Tensor,
    *,
    steps: int,
    step: Schedule,
    noise_scale: Schedule | None = None,
    temperature: Schedule = 1.0,
    seed: Seed,
    counter: int | Tensor = 0,
    stream: int = 0,
    callback: Callback = None,
    diagnostics: bool = True,
    freeze: Sequence[torch.nn.Module] = (),
    **options: Any,
) -> Chain:
    """Return the Chain after `steps` of y <- y - a grad E(y) + s z (unadjusted Langevin).

    On a Gaussian of precision q its variance is 1 / (q (1 - a q / 2)): biased by the step size.

    Args:
        energy: callable (B, ...) -> (B,), lower = likelier.
        y: start, (B, ...), left as it is.
        steps: number of steps, >= 0.
        step: a > 0; schedule.
        noise_scale: s >= 0; schedule; default sqrt(2 a T).
        temperature: T > 0, the target is exp(-E / T); schedule, so a list anneals.
        seed: int, int64 (B,) (one per chain) or a torch.Generator.
        counter, stream: where in the seed's noise the chain starts; see Chain.counter.
        callback: called as callback(i, y) after each step; y is overwritten by the next.
        diagnostics: whether to keep grad_norm and displacement (one more pass per step).
        freeze: modules whose parameters need no gradient; an energy that is a module is included.
        options: langevin_step's own: tether, tether_scale, mask, known, clamp, grad_clip,
            grad_norm, exact.

    Raises:
        ValueError: for schedules or energies of the wrong shape, and as langevin_step does.
    Reference: Roberts and Tweedie 1996, section 1.4.1; module docstring.
    """
    y, seed = _start(y, steps, seed)
    options["mask"] = _spread(options.get("mask"), y)
    start, norms = y.clone() if diagnostics else None, []
    with frozen(energy, *freeze):
        for i in range(steps):
            a, s, _ = _coefficients(i, steps, step, noise_scale, temperature)
            _, grad = _score(energy, y)
            if diagnostics:
                norms.append(_norm(grad))
            langevin_step(
                y,
                grad,
                step=a,
                noise_scale=s,
                seed=seed,
                counter=counter + i,
                stream=stream,
                out=y,
                **options,
            )
            if callback is not None:
                callback(i, y)
    return Chain(y, counter=counter + steps, **_diagnostics(y, start, norms))


def sgld_chain(
    energy: Energy,
    y: Tensor,
    *,
    steps: int,
    step: float,
    offset: float = 1.0,
    decay: float = 0.0,
    **options: Any,
) -> Chain:
    """No method uses this: return the Chain of stochastic-gradient Langevin.

    Its step sizes are a_i = step ((offset + i) / offset)^-decay.

    The energy may be a noisy estimate (a minibatch, dropout): it is asked afresh at each step. With
    decay in (1/2, 1] the step sizes sum to infinity and their squares do not, and the noise of the
    estimate vanishes beside the injected one; with decay 0 and gradient noise of variance V the
    variance on precision q is (2 + a V) / (q (2 - a q)). For images, noise_scale is usually set by
    itself (0.005 to 0.01) and the target is then exp(-E / T) with T = noise_scale^2 / (2 a).

    Args:
        step: first step size, > 0. offset: > 0. decay: >= 0.
        energy, y, steps, options: as for ula_chain.

    Raises:
        ValueError: as ula_chain, and for offset <= 0 or decay < 0.
    Reference: Welling and Teh, ICML 2011, equations 2 and 4.
    """
    if offset <= 0 or decay < 0:
        raise ValueError(f"offset must be > 0 and decay >= 0, got {offset} and {decay}")

    def schedule(i: int) -> float:
        return step * ((offset + i) / offset) ** -decay

    return ula_chain(energy, y, steps=steps, step=schedule, **options)


@torch.no_grad()
def mala_chain(
    energy: Energy,
    y: Tensor,
    *,
    steps: int,
    step: Schedule,
    temperature: Schedule = 1.0,
    seed: Seed,
    counter: int | Tensor = 0,
    stream: int = 0,
    callback: Callback = None,
    diagnostics: bool = True,
    freeze: Sequence[torch.nn.Module] = (),
    tether: Tensor | None = None,
    tether_scale: Number | None = None,
    mask: Tensor | None = None,
    accumulate: torch.dtype = torch.float32,
) -> Chain:
    """Return the Chain after `steps` of Metropolis-adjusted Langevin: exact for any step size.

    The target is exp(-E / T), times exp(-(k / s^2) |x_t - y|^2) with a tether, s^2 = 2 a T. Each
    step asks for one energy and gradient; decisions stay on the device.

    Args:
        step: a > 0; schedule. About 0.57 of the proposals are accepted at the best step size.
        tether, tether_scale, mask: as for langevin_step.
        accumulate: dtype of the ratio's sum, see mala_accept.
        stream: proposals draw from it, decisions from stream + 1.
        energy, y, steps, temperature, seed, counter, callback, diagnostics, freeze: as for
            ula_chain.

    Raises:
        ValueError: as ula_chain.
    Reference: Roberts and Tweedie 1996; Roberts and Rosenthal, JRSS B 1998 (acceptance 0.574).
    """
    y, seed = _start(y, steps, seed)
    start, norms = y.clone() if diagnostics else None, []
    decisions = []
    extra = {"tether": tether, "tether_scale": tether_scale, "seed": seed}
    extra["mask"] = _spread(mask, y)
    with frozen(energy, *freeze):
        value, grad = _score(energy, y)
        for i in range(steps):
            a, s, t = _coefficients(i, steps, step, None, temperature)
            if diagnostics:
                norms.append(_norm(grad))
            at = {**extra, "step": a, "noise_scale": s, "counter": counter + i}
            proposal = mala_propose(y, grad, stream=stream, **at)
            new_value, new_grad = _score(energy, proposal)
            y, grad, _log_prob, accepted, _ = mala_accept(
                y,
                proposal,
                grad,
                new_grad,
                -value / t,
                -new_value / t,
                stream=stream + 1,
                accumulate=accumulate,
                inplace=True,
                **at,
            )
            value = torch.where(accepted, new_value, value)
            decisions.append(accepted)
            if callback is not None:
                callback(i, y)
    empty = torch.empty(0, len(y), dtype=torch.bool, device=y.device)
    return Chain(
        y,
        energy=value,
        accepted=torch.stack(decisions) if decisions else empty,
        counter=counter + steps,
        **_diagnostics(y, start, norms),
    )


class GraphedChain:
    """No method uses this: a chain captured once as a CUDA graph and replayed with fresh noise.

    A replay costs no launches. The seeds and the counter live in device memory and the graph moves
    the counter on by `steps`, so replay n equals the n-th of consecutive eager calls. Worth it
    where the network is small; for large ones the launches hide behind the arithmetic. What the
    energy reads (its parameters) is read at replay, schedules are fixed at capture.

    Args:
        energy, y, steps, options: as for `chain`; y gives shape and device, options no callback.
        chain: ula_chain, sgld_chain or mala_chain.
        seed, counter: as for ula_chain; both can be changed in a call.

    Raises:
        ValueError: if y is not on a CUDA device, or a callback is given.
    """

    def __init__(
        self,
        energy: Energy,
        y: Tensor,
        *,
        steps: int,
        seed: Seed,
        counter: int | Tensor = 0,
        chain: Callable[..., Chain] = ula_chain,
        **options: Any,
    ):
        if not y.is_cuda or options.get("callback") is not None:
            raise ValueError(
                "GraphedChain needs a CUDA state and no callback: use the chain itself"
            )
        self._y, seed = _start(y, steps, seed)
        self._seed = torch.as_tensor(seed, dtype=torch.int64, device=y.device).clone()
        counter = torch.as_tensor(counter, dtype=torch.int64, device=y.device)
        self._counter = counter.reshape(-1).clone()
        options.update(seed=self._seed, counter=self._counter, steps=steps)
        with torch.cuda.device(y.device):  # streams and graphs belong to the current device
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compile kernels and settle cuDNN outside the capture
                for _ in range(3):
                    chain(energy, self._y, **options)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = chain(energy, self._y, **options)
                self._counter += steps

    def __call__(
        self,
        y: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
        counter: int | Tensor | None = None,
    ) -> Chain:
        """Return the Chain from start y; its tensors are overwritten by the next call.

        Args:
            y: start; default where the last call started.
            seed, counter: new values; default the same seeds, and the noise that follows.
        """
        if y is not None:
            self._y.copy_(y)
        if seed is not None:
            seed = torch.as_tensor(seed)
            if seed.numel() != self._seed.numel():
                raise ValueError(
                    f"seed has {seed.numel()} values: the graph was captured with "
                    f"{self._seed.numel()}; one int would give all chains the same noise"
                )
            self._seed.copy_(seed.reshape(self._seed.shape))
        if counter is not None:
            self._counter.copy_(torch.as_tensor(counter).reshape(-1))
        with torch.cuda.device(self._y.device):
            self._graph.replay()
        return self._result
