"""EDM: denoising score matching with preconditioning, sampled along the probability-flow ODE.

Reference: Karras, Aittala, Aila and Laine 2022, "Elucidating the design space of diffusion-based
generative models", arXiv 2206.00364.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from genmodels import config, seeding
from genmodels.config import Section, check, setting, settings_of
from genmodels.data import augment
from genmodels.kernels.broadcast import over_items
from genmodels.kernels.philox import philox_normal
from genmodels.methods.base import Batch, Callback, GenerativeModule, Labels
from genmodels.methods.by_level import REACH, LossByLevel
from genmodels.networks import NETWORKS
from genmodels.networks.precond import PRECONDS
from genmodels.sampling.langevin import acceptance_line
from genmodels.sampling.likelihood import FlowOptions, log_normal, ode_log_prob
from genmodels.sampling.metropolis import sample_mh
from genmodels.sampling.ode import SAMPLERS, Churn, sample_general
from genmodels.sampling.posterior import DENOISING, Denoiser
from genmodels.sampling.schedules import SIGMAS, TIME_SCHEDULES, state_dtype
from genmodels.seeding import Stream

# Settings that sample() and sample.py may override.
SAMPLING = (
    "sampler",
    "steps",
    "sigma_min",
    "sigma_max",
    "rho",
    "sigmas",
    "schedule",
    "scaled",
    "alpha",
    "churn",
    "churn_min",
    "churn_max",
    "churn_noise",
    "mh_step",
    "mh_nodes",
    "guidance",
    "guidance_min",
    "guidance_max",
)


@dataclass
class EDMConfig(Section):
    """EDM (Karras et al. 2022, arXiv 2206.00364)."""

    PREFIX = "method."

    name: str = setting("edm", "")
    precond: str = setting(
        "edm", "preconditioning, and noise levels in training", choices=tuple(PRECONDS)
    )
    sigma_data: float = setting(
        0.5, "standard deviation of the data; genmodels.data info shows it", gt=0
    )
    p_mean: float = setting(-1.2, "mean of ln sigma in training")
    p_std: float = setting(1.2, "standard deviation of ln sigma in training", ge=0)
    label_dropout: float = setting(
        0.0, "share of labels hidden in training (for guidance)", ge=0, le=1
    )
    augment: float = setting(
        0.0, "probability of EDM's augmentations (network.augment=true); 0: off", ge=0, le=1
    )
    uncertainty: bool = setting(False, "learn the weight of each noise level (EDM2)")
    sampler: str = setting(
        "heun",
        "how the ODE is solved; mh: Metropolis-Hastings on the density at sigma_min",
        choices=(*SAMPLERS, "mh"),
    )
    steps: int = setting(18, "sampling steps", ge=1)
    sigma_min: float = setting(0.002, "smallest sigma of the sampling grid")
    sigma_max: float = setting(80.0, "largest sigma of the sampling grid")
    rho: float = setting(7.0, "bend of the sampling grid", gt=0)
    sigmas: str = setting(
        "edm", "which noise levels are visited (edm: the grid)", choices=tuple(SIGMAS)
    )
    schedule: str = setting(
        "linear", "how time runs along them (linear: sigma = t)", choices=tuple(TIME_SCHEDULES)
    )
    scaled: bool = setting(False, "scale the state by s(t) = 1 / sqrt(sigma^2 + 1), as VP does")
    alpha: float = setting(
        1.0, "second-order step: 1 Heun, 0.5 midpoint, 0.667 Ralston", gt=0, le=1
    )
    churn: float = setting(0.0, "S_churn: fresh noise while sampling, 0 = deterministic", ge=0)
    churn_min: float = setting(0.0, "S_min: no churn below this sigma")
    churn_max: float = setting(math.inf, "S_max: no churn above this sigma")
    churn_noise: float = setting(1.0, "S_noise: standard deviation of the fresh noise")
    mh_step: float = setting(
        1.0, "sampler=mh: a proposal's standard deviation over sigma_min", gt=0, lt=math.inf
    )
    mh_nodes: int = setting(
        8, "sampler=mh: evaluations for each log ratio; 8 or more across modes", ge=1, le=64
    )
    guidance: float = setting(1.0, "weight of this model against the guide; 1 = no guide")
    guidance_min: float = setting(
        0.0, "guide only steps that begin above this sigma (nearest of the grid)", ge=0
    )
    guidance_max: float = setting(
        math.inf, "guide only steps that begin at or below this sigma (nearest of the grid)", ge=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(math.isfinite(self.p_mean), "p_mean", "must be finite")
        self.check(
            0 < self.sigma_min < self.sigma_max,
            "sigma_min",
            f"must be in (0, sigma_max={self.sigma_max})",
        )
        self.check(
            self.alpha == 1 or self.sampler != "euler",
            "alpha",
            "euler takes no second-order step; use 1",
        )
        for name, all_steps in (("guidance_min", 0), ("guidance_max", math.inf)):
            unused = self.guidance == 1 and getattr(self, name) != all_steps
            self.check(not unused, name, "nothing is guided; set guidance as well")
        if self.sampler == "mh":
            self.check(not self.churn, "churn", "sampler=mh is a chain at one noise level")
            self.check(not self.general, "sampler", "goes with schedule=linear, scaled=false")
        if self.sampler == "dpmpp_2m":
            self.check(not self.churn, "churn", "dpmpp_2m is deterministic; use heun")
            self.check(
                not self.general, "sampler", "goes with schedule=linear, scaled=false, alpha=1"
            )

    @property
    def general(self) -> bool:
        """Whether the ODE is not the plain one, dx/dsigma with Heun's weights."""
        return self.schedule != "linear" or self.scaled or self.alpha != 1


@dataclass
class GuideOptions(Section):
    """What sample() takes beside settings of the config."""

    guide: str = setting("", "guide by this model (autoguidance) in place of the missing label")


@dataclass
class EDMLikelihoodOptions(FlowOptions):
    """What log_prob() takes."""

    steps: int = setting(64, "RK4 steps from sigma_min to sigma_max, 4 evaluations each", ge=1)
    sigma_min: float | None = setting(
        None, "where the image is put on the flow; default: the model's"
    )
    sigma_max: float | None = setting(
        None, "where the flow meets N(0, sigma_max^2); default: the model's"
    )


class EDM(GenerativeModule):
    """Elucidated diffusion model.

    The law of the noise in training, ln sigma ~ N(p_mean, p_std^2), is training_sigma() of the
    preconditioning, genmodels/networks/precond.py: vp, ve and iddpm have laws of their own.

    Args:
        cfg: Config whose method is an EDMConfig.
    """

    Config = EDMConfig
    OF_WEIGHTS = ("precond", "sigma_data")
    LABEL_DROPOUT = True
    LATENTS = True
    P_STD = True
    SAMPLE_OPTIONS = settings_of(EDMConfig, *SAMPLING) | settings_of(GuideOptions)
    LIKELIHOODS = ("ode",)
    LIKELIHOOD_OPTIONS = settings_of(EDMLikelihoodOptions)
    SOLVERS = DENOISING

    def __init__(self, cfg: config.Config) -> None:
        super().__init__(cfg)
        cfg.method.check(
            not cfg.method.augment or cfg.network.augment,
            "augment",
            "needs network.name=edm_unet, network.augment=true",
        )
        guided = self.classes and self.unlabelled
        cfg.method.check(
            cfg.method.guidance == 1 or guided,
            "guidance",
            "needs a conditional model (data.labels=true, method.label_dropout=0.1)",
        )
        check(
            not NETWORKS[cfg.network.name].ENCODER,
            "network.name",
            cfg.network.name,
            "needs a network that makes images: unet, edm_unet",
        )
        raw = NETWORKS[cfg.network.name](cfg.network, self.shape, self.classes)
        self.net = PRECONDS[cfg.method.precond](raw, cfg.method.sigma_data)
        self.uncertainty = raw.UNCERTAINTY() if cfg.method.uncertainty else None
        self.by_level = LossByLevel()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (L, {"loss": L per element}) with

        L = E_sigma,n [ w(sigma) |D(y + n; sigma) - y|^2 ],  ln sigma ~ N(p_mean, p_std^2),

        summed over pixels, averaged over the batch (equation 2 with the weight of table 1). The
        logged loss is without the learned weights of method.uncertainty.
        """
        cfg, seed = self.cfg.method, self.cfg.seed
        batch = self.as_batch(batch)
        x, n = batch["image"], batch["n"]
        augmentation = None
        if cfg.augment and self.training:
            x, augmentation = augment.augment(x, cfg.augment, seed, n)
        noisy, sigma = self._diffuse(x, n)
        labels = batch["label"] if self.classes else None
        if labels is not None and cfg.label_dropout and self.training:
            hidden = seeding.uniform(seed, n, Stream.LABEL_DROP) < cfg.label_dropout
            labels = torch.where(hidden, -1, labels)
        denoised = self.net(noisy, sigma, labels, augmentation)
        loss = self.net.loss_weight(sigma) * (denoised - x).square().sum(dim=(1, 2, 3))
        logs = {"loss": loss.detach().mean() / math.prod(self.shape)}
        if self.training and self._trainer is not None:
            self._note_levels(sigma, loss / math.prod(self.shape))
        if self.uncertainty is not None:
            u = self.uncertainty(sigma.log() / 4)
            loss = loss * (-u).exp() + math.prod(self.shape) * u
        return loss.mean(), logs

    def _diffuse(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x + sigma eps, sigma): the noise level and the noise of training images n."""
        cfg, seed = self.cfg.method, self.cfg.seed
        z = philox_normal((), seed, n, stream=int(Stream.SIGMA), device=x.device)
        sigma = self.net.training_sigma(z, cfg.p_mean, cfg.p_std)
        noise = philox_normal(self.shape, seed, n, stream=int(Stream.NOISE), device=x.device)
        return x + over_items(sigma, x) * noise, sigma

    def _note_levels(self, sigma: Tensor, loss: Tensor) -> None:
        """Add the losses per element (B,) of a batch to those of their noise levels."""
        if not self.by_level.width:  # the first time: the host waits for the two numbers
            z = torch.tensor([-REACH, REACH], device=sigma.device)
            ends = self.net.training_sigma(z, self.cfg.method.p_mean, self.cfg.method.p_std)
            self.by_level.cut(*ends.tolist())
        self.by_level.add(sigma, loss)

    def log_ratio(self, batch: Batch, reference: "EDM") -> tuple[Tensor, dict[str, Tensor]]:
        """Return (Delta, {"edm_loss": L per element}), float32 (B,) each; see GenerativeModule.

        Delta = -w(sigma) (|D(x + n; sigma) - x|^2 - |D_ref(x + n; sigma) - x|^2), summed over
        pixels: one draw of sigma and n of a difference of evidence bounds, but with EDM's weight in
        place of the bound's, sigma^-3 over the density of sigma. So its mean is no log-ratio in
        nats: low noise counts less, as in EDM's training (and in the paper).
        With a = D and b = D_ref it is summed as (a - b)(a + b - 2x), pixel by pixel: the two
        squares are large and nearly equal, their difference would be rounding.
        """
        x, labels = batch["image"], batch["label"] if self.classes else None
        noisy, sigma = self._diffuse(x, batch["n"])
        a = self.net(noisy, sigma, labels)
        with torch.no_grad():
            b = reference.net(noisy, sigma, labels)
        weight = self.net.loss_weight(sigma)
        delta = -weight * ((a - b) * (a + b - 2 * x)).sum(dim=(1, 2, 3))
        loss = weight * (a.detach() - x).square().sum(dim=(1, 2, 3)) / math.prod(self.shape)
        return delta, {"edm_loss": loss}

    def denoise(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Return D(x; sigma), the expected clean image, float32 (B, C, H, W).

        Args:
            x: noisy images on the [-1, 1] scale (B, C, H, W).
            sigma: noise level on that scale, a scalar or (B,) tensor.
            labels: int64 (B,), -1 = none.

        Raises:
            ValueError: labels the model does not have, a sigma or pixels that are not finite.
        """
        self.check_labels(labels)
        labels = None if labels is None else labels.to(x.device)
        self.check_finite(x, sigma)
        return self.net(x, torch.as_tensor(sigma, device=x.device), labels)

    def denoiser(self, labels: Tensor | None = None) -> Denoiser:
        """Return D(x; sigma) as solve() takes it; see GenerativeModule.denoiser."""
        cfg = self.cfg.method

        def call(x: Tensor, sigma: float) -> Tensor:
            level = torch.full((), sigma, dtype=torch.float32, device=x.device)
            return self._denoised(x, level, labels, 1.0, None)

        return Denoiser(
            call,
            max(cfg.sigma_min, self.net.sigma_min),
            min(cfg.sigma_max, self.net.sigma_max),
            cfg.sigma_data,
            begin=lambda z, sigma: sigma * z,
            known=self.net.known_sigma_on_host(),
        )

    def score(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Return the score of the noisy density, (D(x; sigma) - x) / sigma^2 (equation 3)."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        return (self.denoise(x, sigma, labels) - x) / over_items(sigma, x) ** 2

    def log_prob(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        kind: str = "ode",
        seeds: Tensor | Sequence[int],
        **options: Any,
    ) -> Tensor:
        """Return log p(x; sigma_min), float64 (B,), along the probability-flow ODE.

            dx/dsigma = (x - D(x; sigma)) / sigma,    x(sigma_max) ~ N(0, sigma_max^2)

        in RK4 steps that are even in sigma^(1/rho). See base.log_prob for the arguments and
        LIKELIHOOD_OPTIONS for the others. p(.; sigma_min) is the model's density of the data with
        noise sigma_min added; keep that below the width of a grey value, 1/127.5. Hutchinson's
        estimate of log p has no bias.

        Raises:
            ValueError: an option out of range, labels the model does not have.

        Reference: Song et al. 2021, arXiv 2011.13456, section 4.3; Karras et al. 2022, eq. 1.
        """
        cfg, flow = self.cfg.method, EDMLikelihoodOptions(**options)
        low = cfg.sigma_min if flow.sigma_min is None else flow.sigma_min
        high = cfg.sigma_max if flow.sigma_max is None else flow.sigma_max
        low, high = max(low, self.net.sigma_min), min(high, self.net.sigma_max)
        check(kind in self.LIKELIHOODS, "kind", kind, f"choose from {', '.join(self.LIKELIHOODS)}")
        check(0 < low < high, "sigma_min", low, f"must be in (0, sigma_max={high})")
        self.check_labels(labels)
        seeds = torch.as_tensor(seeds, device=self.device)
        times = torch.linspace(
            low ** (1 / cfg.rho),
            high ** (1 / cfg.rho),
            flow.steps + 1,
            dtype=state_dtype(self.device),
            device=self.device,
        )

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            sigma = t**cfg.rho
            slope = (x - self.net(x, sigma, labels).to(x.dtype)) / sigma
            return slope * cfg.rho * t ** (cfg.rho - 1)

        def signs(i: int) -> Tensor:
            return seeding.signs(seeds, i, flow.probes, self.shape)

        return ode_log_prob(
            velocity,
            x,
            times,
            lambda x: log_normal(x, high),
            signs=None if flow.trace == "exact" else signs,
        )

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        labels: Labels = None,
        *,
        guide: "EDM | None" = None,
        noise: str = "cpu",
        callback: Callback | None = None,
        **options: Any,
    ) -> Tensor:
        """Return generated images in [-1, 1] (not clipped), float32 (N, C, H, W).

        Image k depends on seeds[k] alone, not on the others.

        Args:
            seeds: N whole numbers.
            labels: classes of a conditional model: None (random), one int, or N ints.
            guide: an EDM, usually smaller or less trained, for D = D_guide + w (D - D_guide) with
                w = guidance (autoguidance, Karras et al. 2024, arXiv 2406.02507); without one the
                guide is this model without the label (classifier-free guidance).
            noise: device of the generators; "cpu" is the same on every machine.
            callback: called as callback(i, x) after each step.
            options: see SAMPLE_OPTIONS; those left at None come from the model's config.

        Raises:
            ValueError: an option out of range, or labels the model does not have.
        """
        cfg = self._sampling_config(options, guide)
        generators = seeding.ImageGenerators(seeds, noise)
        latents = generators.randn(self.shape, device=self.device)
        labels = self.image_labels(generators, labels)
        # Snapped and cut to what the network was trained for, as EDM's own generator does.
        low = max(cfg.sigma_min, self.net.sigma_min)
        high = min(cfg.sigma_max, self.net.sigma_max)
        # On the host, where each step asks for its own; in the precision of the device's state.
        known = self.net.known_sigma_on_host()
        if cfg.sampler == "mh":
            return self._chain(cfg, latents, labels, seeds, low, guide, callback)
        sigmas = SIGMAS[cfg.sigmas](cfg.steps, low, high, cfg.rho)
        sigmas = known(sigmas.to(state_dtype(self.device)))
        if cfg.sampler == "dpmpp_2m":
            sigmas = torch.unique_consecutive(sigmas)  # its step ratio needs distinct levels

        def randn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return generators.randn(shape, dtype=dtype, device=self.device)

        guided = guided_steps(sigmas[:-1], cfg.guidance_min, cfg.guidance_max)
        weights = [cfg.guidance if step else 1.0 for step in guided]
        step = 0

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            # A number of the host is filled in on the device, not copied there.
            sigma = torch.full((), float(sigma), dtype=torch.float32, device=x.device)
            return self._denoised(x, sigma, labels, weights[step], guide)

        def after_step(i: int, x: Tensor) -> None:
            nonlocal step
            step = i + 1
            if callback:
                callback(i, x)

        limits = (cfg.churn, cfg.churn_min, cfg.churn_max, cfg.churn_noise)
        common = {"churn": Churn(*limits, known), "randn": randn}
        self.nfe = 0
        x = latents.to(state_dtype(self.device)) * sigmas[0]
        if cfg.general:
            alpha = 0.0 if cfg.sampler == "euler" else cfg.alpha
            schedule = TIME_SCHEDULES[cfg.schedule](low, high)
            x = sample_general(
                denoise,
                x,
                sigmas,
                schedule,
                scaled=cfg.scaled,
                alpha=alpha,
                callback=after_step,
                **common,
            )
        else:
            x = SAMPLERS[cfg.sampler](denoise, x, sigmas, callback=after_step, **common)
        return x.float()

    def _chain(
        self,
        cfg: EDMConfig,
        latents: Tensor,
        labels: Tensor | None,
        seeds: Sequence[int],
        low: float,
        guide: "EDM | None",
        callback: Callback | None,
    ) -> Tensor:
        """Return the ends of Metropolis-Hastings chains on p(x; low), float32.

        They begin at N(0, sigma_data^2 + low^2), step mh_step low at a time, and sample the data
        with noise of `low` in it: that noise is not taken off. See sampling/metropolis.py.
        """
        keys = torch.tensor(seeding.checked_seeds(seeds), dtype=torch.int64, device=self.device)
        sigma = torch.full((), low, dtype=torch.float32, device=self.device)
        self.nfe = 0

        def score(x: Tensor) -> Tensor:
            return (self._denoised(x, sigma, labels, cfg.guidance, guide) - x) / low**2

        x, accepted = sample_mh(
            score,
            latents * math.hypot(cfg.sigma_data, low),
            keys,
            steps=cfg.steps,
            step=cfg.mh_step * low,
            nodes=cfg.mh_nodes,
            callback=callback,
        )
        self.chains = acceptance_line(accepted)
        return x

    def _sampling_config(self, options: dict[str, Any], guide: "EDM | None") -> EDMConfig:
        """Return the method's config with the given options in place of its own."""
        cfg = self.method_with(options, SAMPLING)
        for key in ("mh_step", "mh_nodes"):
            check(
                options.get(key) is None or cfg.sampler == "mh",
                key,
                options.get(key),
                f"sampler={cfg.sampler} does not take it; use sampler=mh, or leave it out",
            )
        if guide is None:
            check(
                cfg.guidance == 1 or self.classes,
                "guidance",
                cfg.guidance,
                "this model is unconditional; give it a guide",
            )
            check(
                cfg.guidance == 1 or self.unlabelled,
                "guidance",
                cfg.guidance,
                "no label was hidden in training (method.label_dropout); give it a guide",
            )
        else:
            check(cfg.guidance != 1, "guidance", cfg.guidance, "leaves the guide unused; try 2")
            check(
                guide.shape == self.shape and guide.classes in (0, self.classes),
                "guide",
                f"a model of {guide.shape} and {guide.classes} classes",
                f"must be of {self.shape} and 0 or {self.classes} classes",
            )
            scales = [replace(model.cfg.data.vae, name="") for model in (self, guide)]
            check(
                scales[0] == scales[1],
                "guide",
                "a model of latents on another scale",
                f"must have data.vae.mean={scales[0].mean}, std={scales[0].std}",
            )
        return cfg

    def _denoised(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None,
        weight: float,
        guide: "EDM | None",
    ) -> Tensor:
        """Return D(x, sigma) with guidance of this weight, 1 = none; it counts self.nfe."""
        self.nfe += 1 if weight == 1 else 2
        if weight == 1:
            return self.net(x, sigma, labels)
        if guide is not None:
            guiding = guide.net(x, sigma, labels if guide.classes else None)
            denoised = self.net(x, sigma, labels)
        else:
            both = torch.cat([labels, torch.full_like(labels, -1)])
            denoised, guiding = self.net(torch.cat([x, x]), sigma, both).chunk(2)
        return guiding + weight * (denoised - guiding)


def guided_steps(sigmas: Tensor, low: float, high: float) -> list[bool]:
    """Return which sampling steps are guided: those whose first sigma lies in (low, high].

    Published ends are rounded noise levels, so an end within the grid means its nearest level.

    Args:
        sigmas: first noise level of each step, decreasing, > 0.
        low, high: ends of the interval.

    Reference: Kynkaanniemi et al. 2024, arXiv 2404.07724.
    """

    def snapped(end: float) -> float:
        within = sigmas.min() <= end <= sigmas.max()
        return float(sigmas[(sigmas - end).abs().argmin()]) if within else end

    low, high = snapped(low), snapped(high)
    return [low < sigma <= high for sigma in sigmas.tolist()]
