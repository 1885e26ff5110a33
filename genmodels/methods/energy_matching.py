"""Energy matching: one scalar potential V(x), without time, that carries noise to data and stays.

    x_t = (1 - t) x_0 + t x_1 + smoothing e,   x_0 ~ N(0, I) coupled with data x_1 by optimal
                                               transport within the batch,   t even in [0, 1)
    L_flow = mean over elements of | grad V(x_t) + (x_1 - x_0) |^2                   (warm-up)
    L = L_flow + max( contrast (mean V(x_1) - mean' V(y)), -contrast_limit )         (main phase)

y are the ends of Langevin chains on exp(-V / eps(t)) (genmodels/sampling/potential.py), half of
them started at data and half at noise, constants in L; mean' leaves out the largest V, `trim` of
them. Both phases are one training: the main phase begins at step `main_start`. V is a network's -f
times e^a, a learnt; lower V = likelier, and exp(-V / eps_max) is the density that is claimed.

A flow whose velocity is -grad V and which knows no time points at the images wherever it stands.
Around a lone data point V is nearly a cone of slope sqrt(d), hence form=norm of the networks; and
its exact minimum over a finite set is a cone on every training image: watch `memorised`.

Reference: Balcerak et al. 2025, "Energy matching: unifying flow matching and energy-based models
for generative modeling", NeurIPS 2025, arXiv 2504.10612, algorithms 1 and 2.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from genmodels import config, seeding
from genmodels.config import Section, setting, settings_of
from genmodels.kernels.philox import philox_normal
from genmodels.methods.base import Batch, Callback, GenerativeModule, Labels
from genmodels.methods.composed import (
    AISOptions,
    ComposeOptions,
    check_smooth,
    given_pixels,
    guided_settings,
    image_blend,
    log_normalisers,
    training_labels,
    twice_differentiable,
)
from genmodels.networks import NETWORKS
from genmodels.networks.ebm import fixed_weights
from genmodels.sampling.ais import bound_log_z
from genmodels.sampling.composition import Blend, blend_of
from genmodels.sampling.coupling import couple
from genmodels.sampling.langevin import acceptance_line, frozen, ula_chain
from genmodels.sampling.posterior import Measured, langevin
from genmodels.sampling.potential import sample_potential, temperature
from genmodels.seeding import Stream

if TYPE_CHECKING:
    from genmodels.data import ImageDataModule

# Settings that sample() and sample.py may override.
SAMPLING = ("time", "steps", "tau", "eps_max", "solver", "guidance")


@dataclass
class EnergyMatchingConfig(Section):
    """Energy matching (Balcerak et al. 2025, arXiv 2504.10612)."""

    PREFIX = "method."

    name: str = setting("energy_matching", "")
    coupling: str = setting(
        "ot",
        "pairs of noise and data in a batch (ot: optimal transport, within classes)",
        choices=("ot", "independent"),
    )
    smoothing: float = setting(
        0.0, "standard deviation of noise on x_t; holds back memorising", ge=0
    )
    scale: float = setting(1.0, "e^a at the start: factor on the network's energy, learnt", gt=0)
    tau: float = setting(1.0, "time from which noise rises", ge=0, le=1)
    eps_max: float = setting(0.01, "temperature from t = 1 on", gt=0)
    main_start: int = setting(0, "step at which the contrast begins; 0: never", ge=0)
    main_lr: float = setting(1.0, "factor on optim.lr from there on", gt=0)
    main_ema: float = setting(
        0.0, "half-life of the weight average from there on, in images; 0: ema.half_life", ge=0
    )
    contrast: float = setting(
        0.0, "weight of the contrast; 0: 3 / number of pixel values", ge=0, lt=math.inf
    )
    contrast_limit: float = setting(0.02, "the contrast is at least minus this", gt=0)
    trim: float = setting(0.1, "share of chains, highest in V, that are left out", ge=0, lt=1)
    chain_share: float = setting(0.5, "chains for each image of a batch", gt=0, le=1)
    chain_steps: int = setting(200, "Langevin steps of a chain in training", ge=1)
    data_share: float = setting(0.5, "share of chains that start at data", ge=0, le=1)
    dt: float = setting(0.01, "time of one of their steps", gt=0, lt=1)
    label_dropout: float = setting(
        0.0, "share of labels hidden in training (for guidance)", ge=0, le=1
    )
    time: float = setting(1.0, "time at which sampling stops, T", gt=0, lt=math.inf)
    steps: int = setting(100, "sampling steps, each of T / steps", ge=1)
    solver: str = setting(
        "heun", "of sampling (heun: two gradients a step)", choices=("heun", "euler")
    )
    guidance: float = setting(0.0, "w: sample from (1 + w) V(x, label) - w V(x, none)", ge=-1)


class Heat(NamedTuple):
    """The temperature of composed energies, (N,) tensors: exp(f / s^2) is a density."""

    s: Tensor


class EnergyMatching(GenerativeModule):
    """Energy matching.

    Args:
        cfg: Config whose method is an EnergyMatchingConfig and whose network is a smooth energy
            (mlp, or ebm with activation=silu).
    """

    Config = EnergyMatchingConfig
    ENERGY = True
    MEMORISES = True  # the contrast pulls towards training images
    BY_PROCESS = ("pairs of method.coupling=ot", "which images have chains and which are trimmed")
    LABEL_DROPOUT = True
    SAMPLE_OPTIONS = settings_of(EnergyMatchingConfig, *SAMPLING) | settings_of(ComposeOptions)
    INPAINTS = True
    LIKELIHOODS = ("ais_lower", "ais_upper")
    LIKELIHOOD_OPTIONS = settings_of(AISOptions)
    OOD_SCORES = True
    SOLVERS = ("langevin",)

    def __init__(self, cfg: config.Config) -> None:
        super().__init__(cfg)
        method = cfg.method
        check_smooth(cfg, "its loss differentiates the energy twice")
        method.check(
            method.guidance == 0 or (self.classes and self.unlabelled),
            "guidance",
            "needs a conditional model (data.labels=true, method.label_dropout=0.1)",
        )
        self.net = NETWORKS[cfg.network.name](cfg.network, self.shape, self.classes)
        self.log_scale = torch.nn.Parameter(torch.tensor(math.log(method.scale)))  # a
        self.log_z: dict[tuple, float] = {}  # bounds that log_prob() has made

    # --------------------------------------------------------------------------------------------
    # Training

    def prepare(self, data: "ImageDataModule") -> str:
        """Return a word to print where this training ends before its main phase."""
        start, end = self.cfg.method.main_start, self.cfg.trainer.max_steps
        if not 0 < start >= end:
            return ""
        return f"note: method.main_start={start}: not before trainer.max_steps={end}: warm-up alone"

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (L, {"loss": L_flow, "v_data": mean V, in the main phase also the chains'})."""
        batch = self.as_batch(batch)
        x, n, seed, method = batch["image"], batch["n"], self.cfg.seed, self.cfg.method
        labels = training_labels(self, batch["label"], n)

        def draw(stream: Stream) -> Tensor:
            return philox_normal(self.shape, seed, n, stream=int(stream), device=x.device)

        noise = draw(Stream.NOISE)
        if method.coupling == "ot":
            noise = noise[couple(noise, x, batch["label"] if self.classes else None)]
        t = seeding.uniform(seed, n, Stream.SIGMA).reshape(-1, 1, 1, 1)
        x_t = (1 - t) * noise + t * x
        if method.smoothing:
            x_t = x_t + method.smoothing * draw(Stream.PAIR)
        loss = (self._slope(x_t, labels) + (x - noise)).square().mean()
        v_data = self.potential(x, labels)
        logs = {"loss": loss.detach(), "v_data": v_data.detach().mean()}
        if self.training and self.main:
            y, started = self._chains(x, noise, labels, n)
            v_chain = self.potential(y, None if labels is None else labels[: len(y)])
            gap = contrast(v_data, v_chain, method.trim)
            weight = method.contrast or 3.0 / x[0].numel()
            loss = loss + (weight * gap).clamp(min=-method.contrast_limit)
            logs["contrast"] = gap.detach()
            for name, rows in (
                ("v_from_data", v_chain[:started]),
                ("v_from_noise", v_chain[started:]),
            ):
                if len(rows):
                    logs[name] = rows.detach().mean()
        return loss, logs

    @property
    def main(self) -> bool:
        """Whether training has come to the main phase."""
        return 0 < self.cfg.method.main_start <= self.global_step

    def potential(
        self, x: Tensor, labels: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return V(x), (B,) in `dtype`, LOWER = likelier, in units of |x_1 - x_0|^2."""
        level = torch.zeros(len(x), device=x.device)
        return -self.log_scale.exp().to(dtype) * self.net(x, level, labels, dtype=dtype)

    def _slope(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Return grad V(x), like x, which can be differentiated again."""
        with torch.enable_grad(), twice_differentiable():
            x = x.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.potential(x, labels).sum(), x, create_graph=True)
        return slope

    def _chains(
        self, x: Tensor, noise: Tensor, labels: Tensor | None, n: Tensor
    ) -> tuple[Tensor, int]:
        """Return (y, rows of y that started at data): the chains of a batch, clipped at their end.

        Both kinds follow eps(t): those from data walk downhill first, and are warmed from t = tau.
        """
        method = self.cfg.method
        count = max(1, round(method.chain_share * len(x)))
        started = round(method.data_share * count)
        # Coupled noise would lead a chain to its partner among the images: take it afresh.
        fresh = philox_normal(
            self.shape, self.cfg.seed, n[:count], stream=int(Stream.CHAIN_START), device=x.device
        )
        start = torch.cat([x[:started], fresh[started:]])
        classes = None if labels is None else labels[:count]
        with evaluating(self.net), fixed_weights(self.net):
            y = ula_chain(
                lambda y: self.potential(y, classes),
                start,
                steps=method.chain_steps,
                step=method.dt,
                temperature=lambda k: temperature(k * method.dt, method.tau, method.eps_max),
                seed=seeding.keys(self.cfg.seed, n[:count], Stream.CHAIN),
                freeze=(self.net, self),
                diagnostics=False,
            ).y
        return y.clamp(-1, 1), started

    def lr_factor(self, step: int) -> float:
        """Return the factor on lr for this optimizer step; main_lr multiplies it later on."""
        start = self.cfg.method.main_start
        return super().lr_factor(step) * (self.cfg.method.main_lr if 0 < start <= step else 1.0)

    def ema_half_life(self, step: int) -> float:
        """Return the half-life of the weight average, in images; main_ema from main_start on."""
        method = self.cfg.method
        late = method.main_ema and 0 < method.main_start <= step
        return method.main_ema if late else super().ema_half_life(step)

    # --------------------------------------------------------------------------------------------
    # Sampling

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        labels: Labels = None,
        *,
        compose: str | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        noise: str = "cpu",
        callback: Callback | None = None,
        **options: Any,
    ) -> Tensor:
        """Return generated images in [-1, 1] (clipped), float32 (N, C, H, W).

        Image k depends on seeds[k] alone, not on the others.

        Args:
            seeds: N whole numbers.
            labels: classes of a conditional model: None (random; none where images are completed),
                one int, or N ints; -1 = none.
            compose: terms of genmodels.sampling.composition in place of labels, or None.
            known: images (K, C, H, W) in [-1, 1] to complete; seed k gets image k modulo K.
            mask: bool, broadcastable to (K, C, H, W): True where `known` is to be kept.
            noise: device on which random labels are drawn; all else is the same everywhere.
            callback: called as callback(i, x) after each step.
            options: see SAMPLE_OPTIONS; those left at None come from the model's config.

        Raises:
            ValueError: an option out of range, or labels the model does not have.
        """
        cfg = guided_settings(self, options, SAMPLING)
        keys = torch.tensor(seeding.checked_seeds(seeds), dtype=torch.int64, device=self.device)
        if known is not None and labels is None and self.classes and not compose:
            labels = -1 if self.unlabelled else labels  # a random class may contradict `known`
        drawn = self.image_labels(seeding.ImageGenerators(seeds, noise), labels)
        blend = image_blend(self, cfg.guidance, drawn, labels, compose, keys)
        known, mask = given_pixels(keys, known, mask)
        x = self.draw(keys, blend, cfg, known, mask, callback).clamp(-1, 1)
        return x if mask is None else torch.where(mask, known, x)

    def draw(
        self,
        keys: Tensor,
        blend: Blend,
        cfg: EnergyMatchingConfig,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        callback: Callback | None = None,
        pull: Callable[[Tensor, Tensor, float], Tensor] | None = None,
    ) -> Tensor:
        """Return x at cfg.time, not clipped, (N, C, H, W); counts self.nfe."""
        heat = self._heat(len(keys), cfg.eps_max)
        self.nfe = 0

        def gradient(x: Tensor) -> Tensor:
            self.nfe += blend.evaluations
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                (slope,) = torch.autograd.grad(-blend.energy(self._f, x, heat).sum(), x)
            return slope

        with frozen(self.net, self), evaluating(self.net), fixed_weights(self.net):
            return sample_potential(
                gradient,
                keys,
                self.shape,
                time=cfg.time,
                steps=cfg.steps,
                tau=cfg.tau,
                eps_max=cfg.eps_max,
                solver=cfg.solver,
                known=known,
                mask=mask,
                pull=pull,
                callback=callback,
            )

    @torch.no_grad()
    def posterior(
        self,
        measured: Measured,
        keys: Tensor,
        labels: Tensor | None,
        *,
        steps: int,
        step: float = 1.0,
        callback: Callback | None = None,
    ) -> Tensor:
        """Return pictures drawn from energy and measurement together, not clipped.

        The flow of sample() is pulled at each step to where its straight path would be seen,
        (1 - t) A x(0) + t y, and then a chain follows V / eps_max + |y - A x|^2 / (2 s^2), its
        noise eps_max wide: so wide is the cone around an image. See GenerativeModule.posterior.
        """
        cfg, eps, seen = self.cfg.method, self.cfg.method.eps_max, measured.fresh(keys)
        blend = blend_of(0.0, labels, torch.zeros(len(keys), device=keys.device))
        heat = self._heat(len(keys), eps)

        def pull(x: Tensor, start: Tensor, t: float) -> Tensor:
            return measured.pulled(x, (1 - t) * measured.operator(start) + t * seen)

        held: dict[str, Any] = {"pull": pull}
        if measured.held is not None:
            mask = measured.held.expand(len(keys), *self.shape).to(keys.device)
            held = {"known": measured.y, "mask": mask}
        x = self.draw(keys, blend, cfg, callback=callback, **held)

        def energy(x: Tensor) -> Tensor:
            self.nfe += blend.evaluations
            return -blend.energy(self._f, x, heat, torch.float64)

        with evaluating(self.net), fixed_weights(self.net):
            chain = langevin(
                energy,
                measured,
                x,
                temperature=eps,
                steps=steps,
                step=step * eps / 2,
                seed=keys,
                counter=1 << 32,  # behind the flow's
                stream=int(Stream.CHAIN),
                freeze=(self.net, self),
                accumulate=torch.float64,
            )
        self.chains = acceptance_line(chain.accepted)
        return chain.y

    def _f(
        self, x: Tensor, heat: Heat, labels: Tensor | None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return -V, (B,): the log-density times s^2, as composed energies are asked for."""
        return -self.potential(x, labels, dtype)

    def _heat(self, count: int, eps: float) -> Heat:
        """Return the temperature eps of `count` images."""
        return Heat(torch.full((count,), math.sqrt(eps), device=self.device))

    # --------------------------------------------------------------------------------------------
    # What the potential says of an image:  log p(x) = -V(x) / eps_max - log Z

    def energy(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return E = V / eps_max = -log p + const, LOWER = likelier, float64 (B,).

        Args:
            x: images in [-1, 1], (B, C, H, W).
            labels: int64 (B,) of a conditional model, -1 = none; or None.
        """
        self.check_labels(labels)
        self.check_finite(x)
        with torch.no_grad(), evaluating(self.net):
            return self.potential(x.float(), labels, torch.float64) / self.cfg.method.eps_max

    def log_ratio(
        self, batch: Batch, reference: GenerativeModule
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (log p(x) - log p_reference(x) up to a constant, {}): a difference of energies."""
        x, eps = batch["image"], self.cfg.method.eps_max
        labels = batch["label"] if self.classes else None
        with torch.no_grad():
            v_reference = reference.potential(x, labels)
        return (v_reference - self.potential(x, labels)) / eps, {}

    def ood_scores(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return {name: float32 (B,)}, HIGHER = more like the training data, of images in [-1, 1].

        f: -V. grad_norm: minus the norm of V's gradient.
        """
        self.check_labels(labels, "give labels (ood= has none)")
        self.check_finite(x)
        with torch.enable_grad(), frozen(self.net, self), evaluating(self.net):
            x = x.detach().float().requires_grad_(True)
            v = self.potential(x, labels, torch.float64)
            (slope,) = torch.autograd.grad(v.sum(), x)
        return {"f": -v.detach().float(), "grad_norm": -slope.flatten(1).norm(dim=1)}

    @torch.no_grad()
    def log_prob(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        kind: str,
        seeds: Tensor | Sequence[int],
        **options: Any,
    ) -> Tensor:
        """Return bounds on the log density of images in [-1, 1], in nats, float64 (B,).

        Annealed importance sampling bounds Z of exp(-V / eps_max) once for each label, from below
        (ais_upper) or from above (ais_lower: its chains start at samples refined by MALA; that
        these are exact samples is an assumption).

        Args:
            kind: ais_lower or ais_upper.
            seeds: unused: nothing here is random for an image.
            x, labels: as in the base class. options: see LIKELIHOOD_OPTIONS.

        Reference: as in genmodels/sampling/ais.py.
        """
        log_z = log_normalisers(
            self, x, labels, kind, options, lambda label, ais: self._log_z(label, kind, ais)
        )
        return -self.energy(x, labels) - log_z

    def _log_z(self, label: int, kind: str, settings: AISOptions) -> float:
        """Return the bound on log Z of a label that bounds log p from the side of `kind`."""
        words, eps = dataclasses.asdict(settings), self.cfg.method.eps_max
        keys = torch.arange(words.pop("ais_chains"), device=self.device)
        labels = torch.full_like(keys, label) if self.classes else None
        blend = blend_of(0.0, labels, torch.zeros(len(keys), device=self.device))
        y, heat = self.draw(keys, blend, self.cfg.method), self._heat(len(keys), eps)
        with evaluating(self.net), fixed_weights(self.net), frozen(self.net, self):
            # Around an image V is a cone: exp(-V / eps) is about eps wide for each pixel.
            bound = bound_log_z(
                lambda y: blend.energy(self._f, y, heat, torch.float64) / eps,
                y,
                keys,
                above=kind == "ais_lower",
                variance=eps**2,
                noise=eps**2,
                **words,
            )
        return bound.log_z


def contrast(v_data: Tensor, v_chain: Tensor, trim: float) -> Tensor:
    """Return mean V(data) - mean of V(chains) without the floor(trim B) highest of these.

    Args:
        v_data: (B,). v_chain: (B',). trim: share in [0, 1).
    """
    dropped = int(trim * len(v_chain))
    return v_data.mean() - v_chain.sort().values[: len(v_chain) - dropped].mean()


@contextmanager
def evaluating(net: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off, and attention to the kind that can be differentiated twice."""
    training = net.training
    net.eval()
    try:
        with twice_differentiable():
            yield
    finally:
        net.train(training)
