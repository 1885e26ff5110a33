"""GEDI: clusters and an energy-based model in one backbone.

An encoder and a head give logits z(x) in R^C. With the temperature tau,

    p(y | x) = softmax(z(x) / tau)          E(x) = -f(x),  f(x) = logsumexp(z(x) / tau)
    p(x) = exp(f(x)) / Gamma                log p(x, y) = z_y(x) / tau - log Gamma

(energy=scalar gives f a head of its own). Minimised, with x' a view of x:

    w_gen (E[f(fake)] - E[f(x)])  +  w_inv CE(p(. | x'), p(. | x))  +  w_prior_mean CE(p(y), pbar)

fake is drawn from p(x) by Langevin chains that go on from a replay buffer; pbar is the mean of
p(. | x) over the batch. With w_gen = 1 the negative is a lower bound of E log p(x), whose gap at
the best is w_prior_mean log C. Variants are settings: w_gen=0 is the cluster loss alone (no-gen);
w_inv=0 w_prior_mean=0 w_label=1 is JEM; w_sum=1 learns digits from sums of pairs.

References: Sansone and Manhaeve, "Unifying self-supervised clustering and energy-based models",
TMLR 2025, arXiv 2401.00873; Grathwohl et al., "Your classifier is secretly an energy based model
and you should treat it like one", arXiv 1912.03263 (JEM); Manhaeve et al., arXiv 1805.10872 (sums).
"""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodels import config, seeding
from genmodels.config import Section, check, setting, settings_of
from genmodels.data.views import add_noise, view
from genmodels.kernels.philox import philox_uniform
from genmodels.methods import gedi_terms as terms
from genmodels.methods.base import Batch, Callback, GenerativeModule, Labels
from genmodels.networks import NETWORKS
from genmodels.sampling.langevin import acceptance_line, frozen, ula_chain
from genmodels.sampling.posterior import Measured, langevin
from genmodels.sampling.replay import Replay
from genmodels.seeding import Stream

ENERGIES = ("logits", "scalar")
SAMPLING = ("start", "min_visits", "final")  # settings that sample() and sample.py may override
STARTS = ("fresh", "buffer", "auto")
KEPT = 2000  # chains that an export holds


@dataclass
class GEDIConfig(Section):
    """GEDI (Sansone and Manhaeve 2025, arXiv 2401.00873)."""

    PREFIX = "method."

    name: str = setting("gedi", "")
    clusters: int = setting(0, "number of clusters C; 0: as many as the data have classes", ge=0)
    tau: float = setting(0.5, "temperature of the logits", gt=0)
    head_width: int = setting(0, "hidden units between features and logits; 0: linear head", ge=0)
    energy: str = setting(
        "logits", "logits: f = logsumexp(z / tau); scalar: a head of its own", choices=ENERGIES
    )
    w_gen: float = setting(1.0, "weight of the generative term; 0: no chains are run", ge=0)
    w_inv: float = setting(10.0, "weight of the invariance term, a cross-entropy", ge=0)
    w_prior_mean: float = setting(
        10.0,
        "weight of CE(p(y), mean prediction), a mean over clusters "
        "(a sum, as others write it, is C times as much)",
        ge=0,
    )
    w_label: float = setting(0.0, "weight of the cross-entropy of the class labels (JEM)", ge=0)
    w_sum: float = setting(
        0.0, "weight of -log P(sum of the labels of two neighbours); wants data.pairs=true", ge=0
    )
    prior: list[float] = setting([], "p(y), C numbers; empty: uniform")
    detach_target: bool = setting(False, "no gradient through p(. | x') in the invariance term")
    inv_start: int = setting(0, "steps before the invariance term sets in", ge=0)
    inv_ramp: int = setting(0, "steps over which its weight then rises", ge=0)
    gen_ramp: int = setting(
        0, "steps over which the weight of the generative term rises from 0.1", ge=0
    )
    marginal_ema: float = setting(0.0, "memory of pbar over batches, for many clusters", ge=0, lt=1)
    l2: float = setting(0.0, "weight of f(x)^2 + f(fake)^2", ge=0)
    data_noise: float = setting(0.03, "standard deviation added to the data of all terms", ge=0)
    two_views: bool = setting(False, "invariance between two views; false: between image and view")
    view_noise: float = setting(0.03, "views: standard deviation of the noise", ge=0)
    view_affine: float = setting(
        0.0, "views: strength of turns, shears, scales, shifts; 1 is full", ge=0
    )
    view_crop: int = setting(0, "views: shift by up to this many pixels", ge=0)
    view_flip: bool = setting(False, "views: mirror left-right (not for digits)")
    view_jitter: float = setting(
        0.0, "views: probability of other brightness, contrast, colour", ge=0, le=1
    )
    view_grey: float = setting(0.0, "views: probability of grey", ge=0, le=1)
    chain_steps: int = setting(20, "Langevin steps of each chain in a training step", ge=1)
    step: float = setting(1.0, "step size a: x <- x + a grad f + s z", gt=0)
    noise_scale: float = setting(0.01, "noise s; 0: sqrt(2 a), the temperature 1", ge=0)
    grad_clip: float = setting(0.0, "largest magnitude of an element of grad f; 0: none", ge=0)
    clamp: bool = setting(False, "keep chains within [-1, 1]")
    buffer: int = setting(10_000, "entries of the replay buffer, over all devices", ge=1)
    reinit: float = setting(
        0.05, "probability that a chain starts afresh when it is visited", ge=0, le=1
    )
    max_gap: float = setting(
        1000.0, "stop when the mean |f(x) - f(fake)| passes this", gt=0, infinite=True
    )
    retry: int = setting(
        0, "number of restarts after a divergence: other noise, lr halved each", ge=0
    )
    start: str = setting(
        "fresh",
        "samples: fresh chains, or go on from the buffer's (auto: from the buffer's if there are)",
        choices=STARTS,
    )
    steps: int = setting(1000, "samples: Langevin steps of fresh chains", ge=0)
    min_visits: int = setting(
        0, "samples from the buffer: of chains that have gone on this often since their start", ge=0
    )
    final: int = setting(0, "samples: steps without noise at the end", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior:
            self.check(
                min(self.prior) > 0 and abs(sum(self.prior) - 1) < 1e-3,
                "prior",
                "must be positive and sum to 1",
            )


@dataclass
class ChainOptions(Section):
    """What sample() takes beside settings of the config."""

    steps: int = setting(
        0,
        "Langevin steps; default: the config's of fresh chains, 0 further ones of the buffer's",
        ge=0,
    )


class GEDI(GenerativeModule):
    """Generative and discriminative model of the same logits.

    Args:
        cfg: Config whose method is a GEDIConfig.
    """

    Config = GEDIConfig
    OF_WEIGHTS = ("clusters", "tau", "head_width", "energy")
    RETRIES = True
    BY_PROCESS = (
        "which chains of the buffer go on",
        "their noise",
        "the clusters' marginal of a micro-batch",
    )
    SAMPLE_OPTIONS = settings_of(GEDIConfig, *SAMPLING) | settings_of(ChainOptions)
    CLUSTERS = True
    OOD_SCORES = True
    SOLVERS = ("langevin",)

    def __init__(self, cfg: config.Config) -> None:
        super().__init__(cfg)
        method, network = cfg.method, NETWORKS[cfg.network.name]
        self.clusters = self.classes = method.clusters or cfg.data.classes
        self.present = []  # a cluster is there whatever the labels are
        method.check(
            self.clusters >= 1,
            "clusters",
            f"{cfg.data.name} has no classes to count; give the number of clusters",
        )
        check(
            network.ENCODER,
            "network.name",
            cfg.network.name,
            "GEDI needs an encoder: resnet8 or perceptron",
        )
        method.check(
            len(method.prior) in (0, self.clusters),
            "prior",
            f"must have {self.clusters} numbers, one for each cluster",
        )
        for name in ("w_label", "w_sum"):
            method.check(
                not getattr(method, name) or self.clusters == cfg.data.classes,
                name,
                "needs clusters = classes of the data",
            )
        processes = cfg.trainer.processes
        share = cfg.data.batch_size // (processes * cfg.trainer.accumulate)
        method.check(
            not method.w_gen or method.buffer % processes == 0,
            "buffer",
            f"cannot be dealt to trainer.devices={cfg.trainer.devices} x "
            f"trainer.num_nodes={cfg.trainer.num_nodes} processes in equal shares",
        )
        method.check(
            not method.w_gen or method.buffer // processes >= share,
            "buffer",
            f"a process has {method.buffer // processes} of its entries, fewer than the {share} "
            "images of its micro-batch; make it larger, or trainer.accumulate",
        )
        self.net = network(cfg.network, self.shape)
        sizes = [self.net.width] + [method.head_width] * bool(method.head_width) + [self.clusters]
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.head = nn.Sequential(layers[0], *(nn.Sequential(nn.SiLU(), x) for x in layers[1:]))
        self.scalar = nn.Linear(self.net.width, 1) if method.energy == "scalar" else None
        self.replay = Replay(method.buffer, self.shape, method.reinit, cfg.seed, method.retry)
        self.marginal = terms.Marginal(method.marginal_ema)
        self.mean_gap: float | Tensor = 0.0  # a tensor on a device
        self.warned = ""
        self.repeats = False  # whether sample() has said that it repeats chains

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (z / tau (B, C), f (B,)) of x (B, C, H, W), float32; f = -E, higher = likelier."""
        with torch.autocast(x.device.type, enabled=False):
            features = self.net(x.float())
            z = self.head(features) / self.cfg.method.tau
            f = z.logsumexp(dim=1) if self.scalar is None else self.scalar(features)[:, 0]
        return z, f

    def energy(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return E(x) = -f(x), (B,), LOWER = likelier; with labels -log p(x, y) - log Gamma.

        Args:
            x: (B, C, H, W) in [-1, 1].
            labels: cluster of each image, int64 (B,), -1 = none.

        Raises:
            ValueError: pixels that are not finite.
        """
        self.check_finite(x)
        return self._energy(x, labels)

    def _energy(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Return energy(); chains do not look at each state."""
        z, f = self.outputs(x)
        if labels is None:
            return -f
        chosen = z.log_softmax(dim=1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        return -f - torch.where(labels < 0, 0.0, chosen)

    @torch.no_grad()
    def cluster(self, x: Tensor) -> Tensor:
        """Return p(y | x), float32 (B, C); the largest entry is the assignment."""
        self.check_finite(x)
        return self.outputs(x)[0].softmax(dim=1)

    def ood_scores(self, x: Tensor) -> dict[str, Tensor]:
        """Return scores of how much images belong to the data, each (B,), HIGHER = more so.

        f = log p(x) + log Gamma; the largest p(y | x); -|grad f|, small where f is flat or peaks
        (Grathwohl et al. 2020, section 5.3).
        """
        self.check_finite(x)
        x = x.detach().requires_grad_(True)
        with torch.enable_grad(), frozen(self):
            z, f = self.outputs(x)
            (grad,) = torch.autograd.grad(f.sum(), x)
        sure = z.detach().softmax(dim=1).amax(dim=1)
        return {"f": f.detach(), "confidence": sure, "grad_norm": -grad.flatten(1).norm(dim=1)}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (scalar to minimise, logs); the equation stands in the module's docstring."""
        batch = self.as_batch(batch)
        cfg, x, n = self.cfg.method, batch["image"], batch["n"]
        seed = self.cfg.seed
        real = add_noise(x, cfg.data_noise, seed, n)
        strengths = {
            key: getattr(cfg, f"view_{key}")
            for key in ("noise", "affine", "crop", "flip", "jitter", "grey")
        }
        parts = [real, view(x, seed, n, **strengths)]
        if cfg.two_views:
            parts.append(view(x, seed, n, which=1, **strengths))
        fake = self._fakes(n) if cfg.w_gen else x[:0]
        z, f = self.outputs(torch.cat([*parts, fake]))
        z_real, z_view, *z_other = z.split(len(x))[: len(parts)]
        f_real, f_fake = f[: len(x)], f[len(x) * len(parts) :]
        z_first = z_other[0] if cfg.two_views else z_real
        log_pbar = self.marginal(z_first, self.training)
        w_gen, w_inv = self._weights(self.global_step)
        inv = terms.invariance(z_first, z_view, cfg.detach_target).mean()
        prior = torch.tensor(cfg.prior, device=x.device) if cfg.prior else None
        ce_prior = terms.prior_cross_entropy(log_pbar, prior)
        loss = w_inv * inv + cfg.w_prior_mean * ce_prior
        logs = {"inv": inv / math.log(max(2, self.clusters))}
        least = math.log(self.clusters) if prior is None else -(prior * prior.log()).sum()
        logs |= {
            "prior_gap": ce_prior - least,
            "largest": log_pbar.max().exp(),
            "smallest": log_pbar.min().exp(),
            "confidence": z_real.softmax(dim=1).amax(dim=1).mean(),
        }
        if cfg.w_gen:
            gap = f_real.mean() - f_fake.mean()
            loss = loss - w_gen * gap
            loss = loss + cfg.l2 * (f_real.square().mean() + f_fake.square().mean())
            logs |= {
                "gap": gap,
                "f_real": f_real.mean(),
                "f_fake": f_fake.mean(),
                "saturated": (fake.abs() >= 1).float().mean(),
            }
        if cfg.w_label:
            logs["label"] = F.cross_entropy(z_real, batch["label"])
            loss = loss + cfg.w_label * logs["label"]
        if cfg.w_sum:
            logs["sum"] = terms.sum_loss(z_real, batch["label"])
            loss = loss + cfg.w_sum * logs["sum"]
        logs = {"loss": loss.detach()} | {key: value.detach() for key, value in logs.items()}
        if self.training:
            self._watch(logs)
        return loss, logs

    def _weights(self, step: int) -> tuple[float, float]:
        """Return the weights of the generative and the invariance term at this step."""
        cfg = self.cfg.method
        gen = min(1.0, 0.1 + 0.9 * step / cfg.gen_ramp) if cfg.gen_ramp else 1.0
        inv = float(step >= cfg.inv_start)
        if cfg.inv_ramp:
            inv = min(1.0, max(0.0, (step - cfg.inv_start) / cfg.inv_ramp))
        return cfg.w_gen * gen, cfg.w_inv * inv

    # --------------------------------------------------------------------------------------------
    # Chains

    def _fakes(self, n: Tensor) -> Tensor:
        """Return samples of p(x), (B, C, H, W): chains of the buffer, moved on while training."""
        cfg = self.cfg.method
        rank, world = self._rank_and_world()
        # An export brings a part of the chains, to sample from; a training wants all.
        if self.replay.entries is None or len(self.replay.entries) != self.replay.size // world:
            self.replay.fill(rank, world, self.device)
        self.replay.to(self.device)  # a checkpoint is read before the model moves to its device
        if not self.training:
            return self.replay.entries[: len(n)]
        batch = self.micro_batch  # its number in the stream: of the step, micro-batch and rank
        if batch is None:
            batch = int(n[0]) // len(n)
        slots, x = self.replay.draw(len(n), batch)
        x = self._chain(x, cfg.chain_steps, self.replay.keys(batch)[1], exact=True)
        self.replay.put(slots, x, torch.isfinite(x).all())
        return x

    def _rank_and_world(self) -> tuple[int, int]:
        """Return (rank, number of processes)."""
        trainer = self._trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _chain(
        self,
        x: Tensor,
        steps: int,
        keys: int | Tensor,
        labels: Tensor | None = None,
        callback: Callback | None = None,
        exact: bool = False,
        noise: bool = True,
    ) -> Tensor:
        """Return the states after `steps` Langevin steps; keys, exact: see ula_chain."""
        cfg = self.cfg.method
        return ula_chain(
            lambda y: self._energy(y, labels),
            x,
            steps=steps,
            step=cfg.step,
            noise_scale=(cfg.noise_scale or None) if noise else 0.0,
            seed=keys,
            stream=int(Stream.CHAIN_NOISE),
            clamp=(-1.0, 1.0) if cfg.clamp else None,
            grad_clip=cfg.grad_clip or None,
            exact=exact,
            freeze=(self,),
            diagnostics=False,
            callback=callback,
        ).y

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        labels: Labels = None,
        *,
        start: str | None = None,
        steps: int | None = None,
        min_visits: int | None = None,
        final: int | None = None,
        noise: str = "cpu",
        callback: Callback | None = None,
    ) -> Tensor:
        """Return generated images, float32 (N, C, H, W), in [-1, 1] but for the chains' overshoot.

        Image k depends on seeds[k] alone: a chain from uniform noise, or from the training's replay
        buffer the entry number seeds[k] mod their count, of those with min_visits.

        Args:
            seeds: N whole numbers.
            labels: clusters: None (all), one int or N ints, -1 = none; chains of log p(x, y).
            start: "fresh", "buffer" or "auto": the buffer where it has such entries, no cluster
                is asked for and one process has all of it; default method.start.
            steps: Langevin steps; default method.steps, and 0 from the buffer.
            min_visits: of the buffer's chains; default method.min_visits. A chain that has just
                started is nearly noise.
            final: steps without noise at the end; default method.final.
            noise: ignored: the noise is the same on every device.
            callback: called as callback(i, x) after each step.

        Raises:
            ValueError: an option out of range, a cluster that is not there or that no step moves
                to, a model without buffer, a buffer without such chains.
        """
        given = {"start": start, "min_visits": min_visits, "final": final}
        cfg, device = self.method_with(given, SAMPLING), self.device
        start, aged = cfg.start, None
        if start != "fresh" and self.replay.entries is not None:
            aged = self.replay.aged(cfg.min_visits)
        if start == "auto":
            apart = self._rank_and_world()[1] > 1 or (labels is not None and not steps)
            start = "fresh" if apart or aged is None or not len(aged) else "buffer"
        if steps is None:
            steps = cfg.steps if start == "fresh" else 0
        ChainOptions(steps)  # refuses what is out of its limits
        keys = torch.tensor(seeding.checked_seeds(seeds), dtype=torch.int64, device=device)
        labels = None if labels is None else self.given_labels(labels, len(keys))
        if start == "buffer":
            check(
                self.replay.entries is not None,
                "start",
                start,
                "this model has no chains of a training; use start=fresh",
            )
            check(
                steps or labels is None or (labels < 0).all(),
                "steps",
                steps,
                "leaves the buffer's images in any cluster, whatever labels= says; try 100",
            )
            check(
                len(aged),
                "min_visits",
                cfg.min_visits,
                "no chain of the buffer has gone on so often; take fewer, or start=fresh",
            )
            self.replay.to(device)
            aged = aged.to(device)
            if not steps and len(keys) and int(keys.max()) >= len(aged) and not self.repeats:
                self.repeats = True
                warnings.warn(
                    f"start=buffer: has {len(aged)} chains; seeds from {len(aged)} on give the "
                    "same images again; steps=100 moves them apart",
                    stacklevel=2,
                )
            x = self.replay.entries[aged[keys % len(aged)]]
        else:
            u = philox_uniform(self.shape, keys, 0, stream=int(Stream.CHAIN_START), device=device)
            x = 2 * u - 1
        self.nfe = steps + cfg.final
        if start == "fresh":
            self.chains = f"fresh chains of {steps} steps"
        else:
            self.chains = f"the replay buffer's chains, {steps} steps on"
            if cfg.min_visits:
                self.chains += f", those with {cfg.min_visits} visits"
        if cfg.final:
            self.chains += f", and {cfg.final} without noise"
        x = self._chain(x, steps, keys, labels, callback)
        if not cfg.final:
            return x

        def later(i: int, x: Tensor) -> object:
            return callback and callback(steps + i, x)

        return self._chain(x, cfg.final, keys, labels, later, noise=False)

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

        Chains begin at uniform noise that is pulled to y, and have the step and the temperature
        noise_scale^2 / (2 step) of training's: the energy counts over that temperature, as in
        samples, the measurement does not. See GenerativeModule.posterior.
        """
        cfg = self.cfg.method
        heat = cfg.noise_scale**2 / (2 * cfg.step) if cfg.noise_scale else 1.0
        u = philox_uniform(self.shape, keys, 0, stream=int(Stream.CHAIN_START), device=keys.device)
        chain = langevin(
            lambda x: self._energy(x, labels),
            measured,
            measured.pulled(2 * u - 1, measured.fresh(keys)),
            temperature=heat,
            steps=steps,
            step=step * cfg.step,
            seed=keys,
            stream=int(Stream.CHAIN),
            freeze=(self,),
            callback=callback,
            accumulate=torch.float64,
        )
        self.nfe = steps + 1
        self.chains = acceptance_line(chain.accepted)
        return chain.y

    # --------------------------------------------------------------------------------------------
    # Watching the training, and what a checkpoint has to hold

    def _watch(self, logs: dict[str, Tensor]) -> None:
        """Stop a run whose chains have run away; every 100 steps say which collapse it sits on.

        Raises:
            FloatingPointError: the running mean of |gap| passes max_gap, or is not finite.
        """
        cfg = self.cfg.method
        if "gap" in logs:
            if logs["gap"].device.type == "cpu":
                self.mean_gap += 0.02 * (abs(float(logs["gap"])) - self.mean_gap)
                apart = self.anywhere(not self.mean_gap <= cfg.max_gap)
            else:
                mean, gap = torch.as_tensor(self.mean_gap).to(logs["gap"]), logs["gap"].abs()
                self.mean_gap = mean + 0.02 * (gap - mean)
                apart = self.stop_on_device(~(self.mean_gap <= cfg.max_gap))
            if apart:
                last = {key: round(float(value), 4) for key, value in logs.items()}
                raise FloatingPointError(
                    f"method.max_gap={cfg.max_gap:g}: energies of data and chains ran apart at "
                    f"step {self.global_step}, the last numbers are {last}"
                )
        settled = self._weights(self.global_step)[1] == cfg.w_inv
        settled = settled and (cfg.w_inv or cfg.w_prior_mean)  # without both it forms no clusters
        if self._trainer is not None and settled and self.global_step % 100 == 99:
            signs = ("inv", "prior_gap", "largest", "confidence")
            words = terms.collapse(*(float(logs[key]) for key in signs), self.clusters)
            if words and words != self.warned:
                self.print(f"step {self.global_step + 1}: {words}")
            self.warned = words

    def lr_factor(self, step: int) -> float:
        """Return the factor on lr: as for every method, halved at each retry."""
        return super().lr_factor(step) * 0.5**self.cfg.method.retry

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the buffer of all processes, the averaged marginal and the mean |gap|."""
        state = self.replay.state()
        if state and self._rank_and_world()[1] > 1:
            gathered = self.all_gather({k: v.to(self.device) for k, v in state.items()})
            state = {key: value.flatten(0, 1).cpu() for key, value in gathered.items()}
        gap = torch.as_tensor(
            self.mean_gap, dtype=torch.float64, device="cpu"
        )  # the first process's
        checkpoint["replay"] = state | {"log_ema": self.marginal.log_ema, "mean_gap": gap}

    def kept_chains(self) -> dict[str, Tensor]:
        """Return {"entries": float16, "visits": int64} of the first KEPT chains of min_visits."""
        if self.replay.entries is None or self._rank_and_world()[1] > 1:
            return {}
        aged = self.replay.aged(self.cfg.method.min_visits)[:KEPT]
        if not len(aged):
            return {}
        visits = self.replay.visits[aged].cpu()
        return {"entries": self.replay.entries[aged].half().cpu(), "visits": visits}

    def take_chains(self, state: Mapping[str, Tensor]) -> None:
        """Take over the chains of an export, to sample from; a training begins its own.

        Raises:
            ValueError: they are of other images, or no numbers.
        """
        entries, visits = state["entries"].float(), state["visits"].long()
        if entries.shape != (len(visits), *self.shape) or not entries.isfinite().all():
            raise ValueError(f"chains of {tuple(entries.shape[1:])}, or no numbers")
        self.replay.entries, self.replay.visits = entries, visits

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over this process's share of the buffer, and the averages."""
        state = checkpoint["replay"]
        if "entries" in state:
            self.replay.load(state, *self._rank_and_world(), self.device)
        self.marginal.log_ema, self.mean_gap = state["log_ema"], float(state.get("mean_gap", 0.0))
