"""CDRL: an energy and an initializer trained together by diffusion recovery likelihood; and DRL.

For a pair of levels (t-1, t) of genmodels/sampling/recovery.py, y_0 = g(x_t) + sqrt(v_t) n is
refined by K Langevin steps on log p(y | x_t) to y_K, and

    L_f = - E w_t [ f(y+, t-1) - f(y_K, t-1) ],  y+ = sqrt(ahat_t) x_{t-1}     (energy)
    L_g = E | y_K - y_0 |^2                                                    (initializer)

with y_K held constant in L_f and in the first term of L_g: f and g share no parameter, so the sum
of the two has the gradient of each. No second derivative is taken.

x_t and x_{t-1} share one noise e: f sees only one side of the pair, so any coupling with the right
marginals leaves the gradient unbiased, and this one makes its variance smaller
(shared_noise=false: fresh noise from x_{t-1} to x_t, as in DRL).

With initializer_pairs > 0 the initializer first learns E[y | x_t] from pairs with fresh noise,

    L_g = E | y+ - g(x_t) |^2,   x_t = y+ + sigma_t e'                         (not in the papers)

where the shared noise would give away x_{t-1}; then it follows the chains.

With matching > 0 there are no chains for a first share of the training: the initializer learns from
pairs, and the energy the score of each level's marginal, by denoising score matching,

    L_f = E | n_t grad log p(y+) + e |^2 / D,   y+ = n_t e + what is left of the image

whose second derivatives cost a few steps of a chain (not in the papers).

References: Zhu, Xie, Wu and Gao, "Learning energy-based models by cooperative diffusion recovery
likelihood", ICLR 2024, arXiv 2309.05153; Gao, Song, Poole, Wu and Kingma, "Learning energy-based
models by diffusion recovery likelihood", ICLR 2021, arXiv 2012.08125 (initializer=none); Vincent,
"A connection between score matching and denoising autoencoders", Neural Computation 2011.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genmodels import config, seeding
from genmodels.config import Section, setting, settings_of
from genmodels.kernels.broadcast import over_items
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
from genmodels.networks.edm_unet import EDMUNet, EDMUNetConfig
from genmodels.networks.mlp import MLP, MLPConfig
from genmodels.sampling.ais import bound_log_z
from genmodels.sampling.composition import Blend, blend_of
from genmodels.sampling.langevin import acceptance_line, frozen
from genmodels.sampling.posterior import Measured, langevin
from genmodels.sampling.recovery import (
    ANGLES,
    RecoverySchedule,
    Rung,
    RungMeans,
    denoise_tweedie,
    recovery_chain,
    sample_recovery,
)
from genmodels.seeding import Stream

# Settings that sample() and sample.py may override.
SAMPLING = ("steps", "guidance", "tweedie_scale", "noise_scale", "mala")


@dataclass
class CDRLConfig(Section):
    """CDRL (Zhu et al. 2024, arXiv 2309.05153); initializer=none, angles=drl: DRL (2012.08125)."""

    PREFIX = "method."

    name: str = setting("cdrl", "")
    angles: str = setting("cdrl", "noise levels (cdrl: equal angles)", choices=tuple(ANGLES))
    snr_max: float = setting(9.8, "angles=cdrl: log SNR of the lowest noise level, cleaner", le=30)
    snr_min: float = setting(-5.1, "angles=cdrl: log SNR of the highest noise level", ge=-30)
    level_code: str = setting(
        "angle",
        "how networks are told a level (angle: CDRL's 1000 (2 / pi) phi; index: DRL's 0, 1, ...)",
        choices=("angle", "index"),
    )
    levels: int = setting(6, "pairs of noise levels, T", ge=2)
    steps: int = setting(15, "Langevin steps for each pair, K", ge=1)
    step_size: float = setting(
        4e-4, "b^2: squared noise of a step / sigma_t^2 at the first pair", gt=0
    )
    growth: str = setting(
        "clean",
        "how b^2 grows with the level (clean: sbar_{t-1} / sbar_0; "
        "constant: 1 / sbar_0 everywhere)",
        choices=("clean", "constant"),
    )
    units: str = setting(
        "step",
        "f is the network's output (step) or that times s_t^2 / n_t^2, "
        "n_t the noise of the level (noise)",
        choices=("step", "noise"),
    )
    units_limit: float = setting(
        1.0, "units=noise: that factor is at most this", gt=0, infinite=True
    )
    initializer: str = setting(
        "unet", "network of the starts (none: chains start at x_t)", choices=("unet", "mlp", "none")
    )
    initializer_kind: str = setting(
        "adm", "which U-Net (cdrl: as released; adm: of older files)", choices=("adm", "cdrl")
    )
    initializer_channels: int = setting(64, "channels of the U-Net, or hidden units")
    initializer_multipliers: list[int] = setting([1, 1, 1], "channels of each level / channels")
    initializer_blocks: int = setting(3, "residual blocks for each level")
    initializer_attention: list[int] = setting([16, 8], "heights of levels with self-attention")
    initializer_dropout: float = setting(0.1, "dropout of the U-Net")
    initializer_lr: float = setting(1e-5, "learning rate of the initializer", gt=0)
    initializer_pairs: float = setting(
        0.0,
        "share of the training in which the initializer learns from pairs, not from chains",
        ge=0,
        le=1,
    )
    matching: float = setting(
        0.0,
        "share of the training, its first, in which the energy learns the score, without chains",
        ge=0,
        lt=1,
    )
    shared_noise: bool = setting(True, "one noise for both sides of a pair")
    label_dropout: float = setting(
        0.1, "share of labels hidden in training (for guidance)", ge=0, le=1
    )
    divergence: float = setting(1e6, "stop when |f(data) - f(chain)| of a level exceeds this", gt=0)
    guidance: float = setting(0.0, "w: sample from (1 + w) f(y, label) - w f(y, none)", ge=-1)
    tweedie_scale: float = setting(
        1.0, "last denoising step: 1 consistent, 2 as released, 0 none", ge=0
    )
    noise_scale: float = setting(1.0, "factor on the Langevin noise in sampling", ge=0)
    mala: bool = setting(False, "sampling: accept or reject each step (exact for the energy)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            self.noise_scale == 1 or not self.mala,
            "noise_scale",
            "mala=true does not take it; use noise_scale=1",
        )
        self.check(
            self.initializer != "none" or not self.initializer_pairs,
            "initializer_pairs",
            "there is none to learn; use 0",
        )
        self.check(self.snr_min < self.snr_max, "snr_min", f"must be < snr_max={self.snr_max}")
        given = self.snr_max, self.snr_min
        self.check(
            self.angles == "cdrl" or given == (CDRLConfig.snr_max, CDRLConfig.snr_min),
            "snr_max" if given[0] != CDRLConfig.snr_max else "snr_min",
            "is not for angles=drl, whose levels are given; leave it out",
        )


class CDRL(GenerativeModule):
    """Cooperative diffusion recovery likelihood.

    Args:
        cfg: Config whose method is a CDRLConfig and whose network is an energy (ebm, mlp).
    """

    Config = CDRLConfig
    OF_WEIGHTS = (
        *("angles", "snr_max", "snr_min", "level_code", "levels", "units", "units_limit"),
        *("initializer", "initializer_kind", "initializer_channels"),
        *("initializer_multipliers", "initializer_blocks", "initializer_attention"),
    )
    ENERGY = True
    LABEL_DROPOUT = True
    SAMPLE_OPTIONS = settings_of(CDRLConfig, *SAMPLING) | settings_of(ComposeOptions)
    INPAINTS = True
    LIKELIHOODS = ("ais_lower", "ais_upper")
    LIKELIHOOD_OPTIONS = settings_of(AISOptions)
    OOD_SCORES = True
    SOLVERS = ("langevin",)

    def __init__(self, cfg: config.Config) -> None:
        super().__init__(cfg)
        method = cfg.method
        guided = self.classes and self.unlabelled
        method.check(
            method.guidance == 0 or guided,
            "guidance",
            "needs a conditional model (data.labels=true, method.label_dropout=0.1)",
        )
        if method.matching:
            check_smooth(cfg, "method.matching > 0 differentiates the energy twice")
        self.net = NETWORKS[cfg.network.name](cfg.network, self.shape, self.classes)
        self.initializer = build_initializer(method, self.shape, self.classes)
        self.schedule = RecoverySchedule(
            method.angles,
            method.levels,
            method.step_size,
            method.growth,
            method.units,
            method.units_limit,
            method.snr_max,
            method.snr_min,
            method.level_code,
        )
        self.log_z: dict[tuple, float] = {}  # bounds that log_prob() has made
        self.rungs: RungMeans | None = None  # of the latest loss(), unless it was one of matching
        self.fault: RungMeans | None = (
            None  # on a device: of the loss() that diverged, or the latest
        )

    # --------------------------------------------------------------------------------------------
    # Training

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (L_f + L_g, {"loss": L_f, "loss_initializer": L_g}); see the module."""
        batch = self.as_batch(batch)
        x, n, seed = batch["image"], batch["n"], self.cfg.seed
        labels = training_labels(self, batch["label"], n)
        pair = seeding.uniform(seed, n, Stream.SIGMA) * self.cfg.method.levels
        t = 1 + pair.long().clamp(max=self.cfg.method.levels - 1)
        rung = self.schedule.at(t)
        if self.matching:
            return self.match(x, n, rung, labels)
        x_t, data = self.pair(x, n, rung)
        noise = philox_normal(self.shape, seed, n, stream=int(Stream.INITIALIZER), device=x.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.pairing):
            start = self.initial(x_t, rung, labels, noise)
        with fixed_weights(self.net):
            chain = recovery_chain(
                lambda y: self.f(y, rung, labels),
                start.detach(),
                x_t,
                rung,
                steps=self.cfg.method.steps,
                seed=seeding.keys(seed, n, Stream.CHAIN),
                freeze=(self.net,),
                exact=True,
            )
        twice = Rung(*(value.repeat(2) for value in rung))
        f = self.f(torch.cat([data, chain.y]), twice, None if labels is None else labels.repeat(2))
        f_data, f_chain = f.chunk(2)
        loss_f = -(rung.w * (f_data - f_chain)).mean()
        if self.pairing:
            loss_g = self.pair_loss(x, n, rung, labels)
        else:
            loss_g = (chain.y - start).square().sum(dim=(1, 2, 3)).mean()
        self.rungs = RungMeans(self.cfg.method.levels, t, f_data, f_chain, chain, data)
        logs = {"loss": loss_f.detach(), "loss_initializer": loss_g.detach()}
        return loss_f + loss_g, logs

    def match(
        self, x: Tensor, n: Tensor, rung: Rung, labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss()'s result for a step of matching; see the module."""
        y, over = self.pair(x, n, rung)[1], rung.over(x)
        spread = over.scale * over.sin_clean  # n_t
        e = (y - over.scale * over.cos_clean * x) / spread
        with torch.enable_grad(), twice_differentiable():
            y.requires_grad_(True)
            f = self.f(y, rung, labels)
            (slope,) = torch.autograd.grad(f.sum(), y, create_graph=True)
        loss_f = (spread / over.s**2 * slope + e).square().mean()
        logs = {"loss": loss_f.detach()}
        self.rungs = None
        if self.initializer is None:
            return loss_f, logs
        loss_g = self.pair_loss(x, n, rung, labels)
        return loss_f + loss_g, logs | {"loss_initializer": loss_g.detach()}

    def pair_loss(self, x: Tensor, n: Tensor, rung: Rung, labels: Tensor | None) -> Tensor:
        """Return L_g of pairs with fresh noise, a number."""
        seen, aim = self.pair(x, n, rung, shared=False)
        guess = self.initial(seen, rung, labels, torch.zeros_like(x))
        return (aim - guess).square().sum(dim=(1, 2, 3)).mean()

    @property
    def pairing(self) -> bool:
        """Whether the initializer learns from pairs at this step."""
        return self.global_step < self.cfg.method.initializer_pairs * self.cfg.trainer.max_steps

    @property
    def matching(self) -> bool:
        """Whether the energy learns by score matching at this step."""
        return self.global_step < self.cfg.method.matching * self.cfg.trainer.max_steps

    def follows_length(self) -> bool:
        """Return whether anything in training goes by trainer.max_steps."""
        shares = self.cfg.method.initializer_pairs or self.cfg.method.matching
        return bool(shares) or super().follows_length()

    def f(
        self,
        y: Tensor,
        rung: Rung,
        labels: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return f(y, t-1) = gain * network, (B,) in `dtype`: the log-density times s_t^2."""
        return rung.gain.to(dtype) * self.net(y, rung.noise_clean, labels, dtype=dtype)

    def pair(
        self, x: Tensor, n: Tensor, rung: Rung, shared: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (x_t, y+ = sqrt(ahat_t) x_{t-1}) of clean images x, (B, C, H, W) each.

        With one noise for both if `shared`; None: method.shared_noise.
        """

        def draw(stream: Stream) -> Tensor:
            return philox_normal(self.shape, self.cfg.seed, n, stream=int(stream), device=x.device)

        shared = self.cfg.method.shared_noise if shared is None else shared
        fresh = None if shared else draw(Stream.PAIR)
        return self.schedule.pair(x, rung, draw(Stream.NOISE), fresh)

    def initial(
        self,
        x_t: Tensor,
        rung: Rung,
        labels: Tensor | None,
        noise: Tensor,
        blend: Blend | None = None,
    ) -> Tensor:
        """Return the chain's start g(x_t) + sqrt(v_t) noise, like x_t (x_t without initializer)."""
        if self.initializer is None:
            return x_t

        def network(x: Tensor, rung: Rung, labels: Tensor | None) -> Tensor:
            return self.initializer(x, rung.noise, labels)

        change = network(x_t, rung, labels) if blend is None else blend.map(network, x_t, rung)
        return x_t + change.float() + over_items(rung.v.sqrt(), noise) * noise

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss; log the diagnostics of each level beside it."""
        loss = super().training_step(batch, batch_idx)
        if self.due and self.rungs is not None:
            self.log_due("levels/", self.rungs.logs())
        return loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return two groups, energy and initializer, each with its lr; clipped separately."""
        groups = [{"params": list(self.net.parameters())}]
        if self.initializer is not None:
            lr = self.cfg.method.initializer_lr
            groups.append({"params": list(self.initializer.parameters()), "lr": lr})
        return groups

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any
    ) -> None:
        """Clip each group; stop where a level has diverged, and name it.

        Raises:
            FloatingPointError: method.divergence exceeded, or too many non-finite steps.
        """
        limit = self.cfg.method.divergence
        if self.rungs is None:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            return
        if self.device.type != "cpu":
            self.fault = self.rungs.unless(self.stopped, self.fault)
            if self.stop_on_device(self.rungs.diverged(limit)):
                lines = self.fault.beyond(limit)[0] or ["a level on another process"]
                raise FloatingPointError(
                    f"method.divergence={limit:g}: exceeded in or before step {self.global_step} "
                    f"at {'; '.join(lines)}"
                )
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            return
        lines, finite = self.rungs.beyond(limit)
        rungs = "; ".join(lines) or "a level on another process"
        event = f"step {self.global_step} at {rungs}"
        if self.anywhere(bool(lines) and finite):
            raise FloatingPointError(f"method.divergence={limit:g}: exceeded in {event}")
        if lines:  # the base class skips and counts such steps
            self.print(f"not finite in {event}")
        super().configure_gradient_clipping(optimizer, *args, **kwargs)

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
            callback: called as callback(i, x) after each level.
            options: see SAMPLE_OPTIONS; those left at None come from the model's config. With
                fewer steps than in training, drift and noise of each grow (recovery_chain).

        Raises:
            ValueError: an option out of range, or labels the model does not have.
        """
        cfg = guided_settings(self, options, SAMPLING)
        keys = torch.tensor(seeding.checked_seeds(seeds), dtype=torch.int64, device=self.device)
        if known is not None and labels is None and self.classes and not compose:
            labels = -1  # a random class would contradict what is known
        generators = seeding.ImageGenerators(seeds, noise)
        drawn = self.image_labels(generators, labels)
        blend = image_blend(self, cfg.guidance, drawn, labels, compose, keys)
        known, mask = given_pixels(keys, known, mask)
        y, rung, f = self.draw(keys, blend, cfg, known, mask, callback)
        with fixed_weights(self.net), frozen(self.net):
            x = denoise_tweedie(lambda y: f(y, rung), y, rung, cfg.tweedie_scale).clamp(-1, 1)
        return x if mask is None else torch.where(mask, known, x)

    def draw(
        self,
        keys: Tensor,
        blend: Blend,
        cfg: CDRLConfig,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        callback: Callback | None = None,
    ) -> tuple[Tensor, Rung, Callable[..., Tensor]]:
        """Return samples y of the first pair, its Rung, and the blended f; counts self.nfe."""

        def f(y: Tensor, rung: Rung, dtype: torch.dtype = torch.float32) -> Tensor:
            self.nfe += blend.evaluations
            return blend.energy(self.f, y, rung, dtype)

        def initial(x_t: Tensor, rung: Rung, noise: Tensor) -> Tensor:
            self.nfe += 0 if self.initializer is None else blend.evaluations
            return self.initial(x_t, rung, None, noise, blend)

        self.nfe = 0
        with fixed_weights(self.net):
            y, rung = sample_recovery(
                f,
                initial,
                self.schedule,
                keys,
                self.shape,
                steps=cfg.steps,
                rate=self.cfg.method.steps / cfg.steps,
                noise_scale=cfg.noise_scale,
                mala=cfg.mala,
                known=known,
                mask=mask,
                freeze=(self.net,),
                callback=callback,
            )
        return y, rung, f

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

        The chains come down the noise levels as in sample(), and at each of them

            |y - A x_hat|^2 / (2 (s^2 + tan^2 phi_{t-1})),   x_hat = x_{t-1} / cos phi_{t-1}

        is added to the energy, the noise of the level to that of y; what the initializer starts at
        is first pulled to y as it would be seen there. In the end the sum is exact, at the lowest
        level. Where pixels are known exactly that is inpainting. See GenerativeModule.posterior.
        """
        cfg, seen = self.cfg.method, measured.fresh(keys)
        blend = blend_of(0.0, labels, torch.zeros(len(keys), device=keys.device))
        e = philox_normal(self.shape, keys, stream=int(Stream.KNOWN), device=keys.device)

        def f(y: Tensor, rung: Rung, dtype: torch.dtype = torch.float32) -> Tensor:
            self.nfe += blend.evaluations
            return blend.energy(self.f, y, rung, dtype)

        def with_data(y: Tensor, rung: Rung, dtype: torch.dtype = torch.float32) -> Tensor:
            cast = rung.over(y)
            tangent = rung.sin_clean / rung.cos_clean
            share = measured.noise**2 / (measured.noise**2 + tangent**2)
            data = share * measured.energy(y / (cast.scale * cast.cos_clean))
            return f(y, rung, dtype) - (rung.s**2 * data).to(dtype)

        def pulled(x_t: Tensor, rung: Rung, noise: Tensor) -> Tensor:
            self.nfe += 0 if self.initializer is None else blend.evaluations
            cast = rung.over(x_t)
            scale, tangent = cast.scale * cast.cos_clean, cast.sin_clean / cast.cos_clean
            x = self.initial(x_t, rung, None, noise, blend) / scale
            level, c = float(rung.sin[0] / rung.cos[0]), 0.5  # of x_t; of pictures
            spread = c * level / math.hypot(c, level)  # of pictures about x
            return scale * measured.pulled(x, seen + measured.operator(tangent * e), spread)

        if measured.held is not None:
            known = {"known": measured.y, "mask": measured.held.expand_as(e).to(e.device)}
            y, rung, f = self.draw(keys, blend, cfg, callback=callback, **known)
        else:
            with fixed_weights(self.net):
                y, rung = sample_recovery(
                    with_data,
                    pulled,
                    self.schedule,
                    keys,
                    self.shape,
                    steps=cfg.steps,
                    freeze=(self.net,),
                    callback=callback,
                )
        scale = rung.over(y).scale * rung.over(y).cos_clean
        with fixed_weights(self.net):
            chain = langevin(
                lambda y: -f(y, rung, torch.float64),
                measured,
                y,
                temperature=rung.s.double() ** 2,
                to_image=lambda y: y / scale,
                steps=steps,
                step=0.5 * step,
                seed=keys,
                stream=int(Stream.CHAIN),
                freeze=(self.net,),
                accumulate=torch.float64,
            )
        self.chains = acceptance_line(chain.accepted)
        return chain.y / scale

    # --------------------------------------------------------------------------------------------
    # What the energy says of an image:
    #
    #     log p(x) = f(y, 0) / s_1^2 - log Z + D log sqrt(a_1),   y = sqrt(a_1) x
    #
    # is the density of the lowest noise level, sin(phi_0) = 0.0075 on the scale of [-1, 1].
    # Training asks for the conditionals p(y | x_1) only, not for this marginal.

    def energy(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return E = -log p + const, LOWER = likelier, float64 (B,), of images in [-1, 1].

        p is the density of the lowest noise level, 0.0075 on the scale of [-1, 1].
        """
        self.check_labels(labels)
        self.check_finite(x)
        y, rung = self._lowest(x)
        return -self.f(y, rung, labels, torch.float64) / rung.s.double() ** 2

    def ood_scores(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return {name: float32 (B,)}, HIGHER = more like the training data, of images in [-1, 1].

        f: the energy's f at the lowest noise level. f_levels: its mean over all levels, with one
        noise e for all images and levels. grad_norm: minus the norm of f's gradient.
        """
        self.check_labels(labels, "give labels (ood= has none)")
        self.check_finite(x)
        y, rung = self._lowest(x)
        with torch.enable_grad(), frozen(self.net):
            y.requires_grad_(True)
            f = self.f(y, rung, labels, torch.float64)
            (grad,) = torch.autograd.grad(f.sum(), y)
        total, zero = 0.0, torch.zeros(len(x), dtype=torch.int64, device=x.device)
        with torch.no_grad():
            for t in range(1, self.schedule.rungs + 1):
                rung = self.schedule.at(zero + t)
                _, y = self.pair(x.float(), zero, rung)
                total = total + self.f(y, rung, labels, torch.float64)
        scores = {
            "f": f.detach(),
            "f_levels": total / self.schedule.rungs,
            "grad_norm": -grad.flatten(1).norm(dim=1),
        }
        return {name: value.float() for name, value in scores.items()}

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

        Annealed importance sampling bounds Z once for each label, from below (ais_upper) or from
        above (ais_lower: its chains start at samples refined by MALA; that these are exact samples
        is an assumption).

        Args:
            kind: ais_lower or ais_upper.
            seeds: unused: nothing here is random for an image.
            x, labels: as in the base class. options: see LIKELIHOOD_OPTIONS.

        Reference: as in genmodels/sampling/ais.py.
        """
        log_z = log_normalisers(
            self, x, labels, kind, options, lambda label, ais: self._log_z(label, kind, ais)
        )
        scale = float(self.schedule.exact.scale[1])
        return -self.energy(x, labels) - log_z + math.prod(self.shape) * math.log(scale)

    def _lowest(self, x: Tensor) -> tuple[Tensor, Rung]:
        """Return (y, Rung 1) of images x in [-1, 1]; no gradient attached."""
        rung = self.schedule.at(torch.ones(len(x), dtype=torch.int64, device=x.device))
        return (over_items(rung.scale, x) * x.detach()).float(), rung

    def _log_z(self, label: int, kind: str, settings: AISOptions) -> float:
        """Return the bound on log Z of a label that bounds log p from the side of `kind`."""
        words = dataclasses.asdict(settings)
        keys = torch.arange(words.pop("ais_chains"), device=self.device)
        labels = torch.full_like(keys, label) if self.classes else None
        blend = blend_of(0.0, labels, torch.zeros(len(keys), device=self.device))
        y, rung, f = self.draw(keys, blend, self.cfg.method)
        s2, noise = rung.s.double() ** 2, float(rung.scale[0] * rung.sin_clean[0]) ** 2
        with fixed_weights(self.net), frozen(self.net):
            bound = bound_log_z(
                lambda y: f(y, rung, torch.float64) / s2,
                y,
                keys,
                above=kind == "ais_lower",
                variance=float(s2[0]),
                noise=noise,
                **words,
            )
        return bound.log_z


def build_initializer(
    cfg: CDRLConfig, shape: tuple[int, ...], classes: int
) -> torch.nn.Module | None:
    """Return the network of g(x) - x, (B, C, H, W) -> (B, C, H, W), or None.

    The initializer g(x_t) = x_t + network(x_t, level, label) starts at g(x) = x (kind=cdrl: but for
    the last bias). Its U-Net is a DDPM with scale and shift by the embedding, one attention head of
    64 channels, all last convolutions at zero: 3.8 M parameters for CIFAR-10.

    Args:
        cfg: CDRLConfig, of which the initializer* keys are read.
        shape: (C, H, W) of the images.
        classes: number of class labels, 0 = unconditional.

    Reference: Zhu, Xie, Wu and Gao 2024, arXiv 2309.05153.
    """
    if cfg.initializer == "none":
        return None
    if cfg.initializer == "mlp":
        return MLP(MLPConfig(width=cfg.initializer_channels), shape, classes, energy=False)
    network = EDMUNetConfig(
        kind=cfg.initializer_kind,
        channels=cfg.initializer_channels,
        multipliers=cfg.initializer_multipliers,
        blocks=cfg.initializer_blocks,
        attention=cfg.initializer_attention,
        dropout=cfg.initializer_dropout,
        augment=False,
    )
    return EDMUNet(network, shape, classes)
