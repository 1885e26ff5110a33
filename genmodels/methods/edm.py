"""EDM: denoising score matching with preconditioning, sampled along the probability-flow ODE.

Reference: Karras, Aittala, Aila and Laine 2022, "Elucidating the design space of diffusion-based
generative models", arXiv 2206.00364.
"""

import math
from dataclasses import dataclass

import torch

from genmodels import seeding
from genmodels.config import Section, check, setting, settings_of
from genmodels.data import augment
from genmodels.kernels.philox import philox_normal
from genmodels.methods.base import GenerativeModule
from genmodels.networks import NETWORKS
from genmodels.networks.precond import PRECONDS, Uncertainty
from genmodels.sampling.likelihood import TRACES, log_normal, ode_log_prob
from genmodels.sampling.ode import SAMPLERS, Churn, sample_general
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
    "guidance",
)


@dataclass
class EDMConfig:
    """EDM (Karras et al. 2022, arXiv 2206.00364)."""

    name: str = setting("edm", "")
    precond: str = setting(
        "edm", "preconditioning and noise levels in training: edm, vp, ve, iddpm"
    )
    sigma_data: float = setting(0.5, "standard deviation of the data; genmodels.data info shows it")
    p_mean: float = setting(-1.2, "mean of ln sigma in training")
    p_std: float = setting(1.2, "standard deviation of ln sigma in training")
    label_dropout: float = setting(0.0, "share of labels hidden in training (for guidance)")
    augment: float = setting(
        0.0, "probability of EDM's augmentations (network.augment=true); 0: off"
    )
    uncertainty: bool = setting(False, "learn the weight of each noise level (EDM2)")
    sampler: str = setting("heun", "heun, euler or dpmpp_2m")
    steps: int = setting(18, "sampling steps")
    sigma_min: float = setting(0.002, "smallest sigma of the sampling grid")
    sigma_max: float = setting(80.0, "largest sigma of the sampling grid")
    rho: float = setting(7.0, "bend of the sampling grid")
    sigmas: str = setting("edm", "which noise levels are visited: edm (the grid), vp, ve, iddpm")
    schedule: str = setting("linear", "how time runs along them: linear (sigma = t), vp, ve")
    scaled: bool = setting(False, "scale the state by s(t) = 1 / sqrt(sigma^2 + 1), as VP does")
    alpha: float = setting(1.0, "second-order step: 1 Heun, 0.5 midpoint, 0.667 Ralston")
    churn: float = setting(0.0, "S_churn: fresh noise while sampling, 0 = deterministic")
    churn_min: float = setting(0.0, "S_min: no churn below this sigma")
    churn_max: float = setting(math.inf, "S_max: no churn above this sigma")
    churn_noise: float = setting(1.0, "S_noise: standard deviation of the fresh noise")
    guidance: float = setting(1.0, "weight of this model against the guide; 1 = no guide")

    def __post_init__(self):
        check(self.sigma_data > 0, "method.sigma_data", self.sigma_data, "must be > 0")
        check(math.isfinite(self.p_mean), "method.p_mean", self.p_mean, "must be finite")
        check(self.p_std >= 0, "method.p_std", self.p_std, "must be >= 0")
        check(self.rho > 0, "method.rho", self.rho, "must be > 0")
        check(
            0 <= self.label_dropout <= 1,
            "method.label_dropout",
            self.label_dropout,
            "must be in [0, 1]",
        )
        check(0 <= self.augment <= 1, "method.augment", self.augment, "must be in [0, 1]")
        choices = {"precond": PRECONDS, "sigmas": SIGMAS, "schedule": TIME_SCHEDULES}
        for key, names in choices.items():
            check(
                getattr(self, key) in names,
                f"method.{key}",
                getattr(self, key),
                f"choose from {', '.join(names)}",
            )
        check(
            self.sampler in SAMPLERS,
            "method.sampler",
            self.sampler,
            f"choose from {', '.join(SAMPLERS)}",
        )
        check(self.steps >= 1, "method.steps", self.steps, "must be >= 1")
        check(
            0 < self.sigma_min < self.sigma_max,
            "method.sigma_min",
            self.sigma_min,
            f"must be in (0, sigma_max={self.sigma_max})",
        )
        check(self.churn >= 0, "method.churn", self.churn, "must be >= 0")
        check(0 < self.alpha <= 1, "method.alpha", self.alpha, "must be in (0, 1]")
        check(
            self.alpha == 1 or self.sampler != "euler",
            "method.alpha",
            self.alpha,
            "euler takes no second-order step; use 1",
        )
        if self.sampler == "dpmpp_2m":
            check(not self.churn, "method.churn", self.churn, "dpmpp_2m is deterministic; use heun")
            check(
                not self.general,
                "method.sampler",
                self.sampler,
                "goes with schedule=linear, scaled=false, alpha=1",
            )

    @property
    def general(self):
        """Whether the ODE is not the plain one, dx/dsigma with Heun's weights."""
        return self.schedule != "linear" or self.scaled or self.alpha != 1


@dataclass
class GuideOptions(Section):
    """What sample() takes beside settings of the config."""

    guide: str = setting("", "guide by this model (autoguidance) in place of the missing label")


@dataclass
class EDMLikelihoodOptions(Section):
    """What log_prob() takes."""

    steps: int = setting(64, "RK4 steps from sigma_min to sigma_max, 4 evaluations each")
    trace: str = setting("hutchinson", "divergence: hutchinson, or exact (small images)")
    probes: int = setting(1, "random sign vectors in Hutchinson's estimate, fresh in each step")
    sigma_min: float | None = setting(
        None, "where the image is put on the flow; default: the model's"
    )
    sigma_max: float | None = setting(
        None, "where the flow meets N(0, sigma_max^2); default: the model's"
    )


class EDM(GenerativeModule):
    """Elucidated diffusion model.

    Args:
        cfg: Config whose method is an EDMConfig.
    """

    Config = EDMConfig
    SAMPLE_OPTIONS = settings_of(EDMConfig, *SAMPLING) | settings_of(GuideOptions)

    LIKELIHOODS = ("ode",)
    LIKELIHOOD_OPTIONS = settings_of(EDMLikelihoodOptions)

    def __init__(self, cfg):
        super().__init__(cfg)
        check(
            not cfg.method.augment or getattr(cfg.network, "augment", False),
            "method.augment",
            cfg.method.augment,
            "needs network.name=edm_unet, network.augment=true",
        )
        guided = cfg.method.guidance == 1 or self.classes and self.unlabelled
        check(
            guided,
            "method.guidance",
            cfg.method.guidance,
            "needs a conditional model (data.labels=true, method.label_dropout=0.1)",
        )
        check(
            not getattr(NETWORKS[cfg.network.name], "ENCODER", False),
            "network.name",
            cfg.network.name,
            "needs a network that makes images: unet, edm_unet",
        )
        raw = NETWORKS[cfg.network.name](cfg.network, self.shape, self.classes)
        self.net = PRECONDS[cfg.method.precond](raw, cfg.method.sigma_data)
        self.uncertainty = Uncertainty() if cfg.method.uncertainty else None

    def loss(self, batch):
        """Return (L, {"loss": L per element}) with

        L = E_sigma,n [ w(sigma) |D(y + n; sigma) - y|^2 ],  ln sigma ~ N(p_mean, p_std^2),

        summed over pixels, averaged over the batch (equation 2 with the weight of table 1). The
        logged loss is without the learned weights of method.uncertainty.
        """
        cfg, x, n = self.cfg.method, batch["image"], batch["n"]
        seed, told = self.cfg.seed, None
        if cfg.augment and self.training:
            x, told = augment.augment(x, cfg.augment, seed, n)
        noisy, sigma = self._diffuse(x, n)
        labels = batch["label"] if self.classes else None
        if labels is not None and cfg.label_dropout and self.training:
            hidden = seeding.uniform(seed, n, Stream.LABEL_DROP) < cfg.label_dropout
            labels = torch.where(hidden, -1, labels)
        denoised = self.net(noisy, sigma, labels, told)
        loss = self.net.loss_weight(sigma) * (denoised - x).square().sum(dim=(1, 2, 3))
        logs = {"loss": loss.detach().mean() / math.prod(self.shape)}
        if self.uncertainty is not None:
            u = self.uncertainty(sigma.log() / 4)
            loss = loss * (-u).exp() + math.prod(self.shape) * u
        return loss.mean(), logs

    def _diffuse(self, x, n):
        """Return (x + sigma eps, sigma): the noise level and the noise of training images n."""
        cfg, key, where = self.cfg.method, (self.cfg.seed, n), {"device": x.device}
        z = philox_normal((), *key, stream=int(Stream.SIGMA), **where)
        sigma = self.net.training_sigma(z, cfg.p_mean, cfg.p_std)
        noise = philox_normal(self.shape, *key, stream=int(Stream.NOISE), **where)
        return x + sigma.reshape(-1, 1, 1, 1) * noise, sigma

    def log_ratio(self, batch, reference):
        """Return (Delta, {"edm_loss": L per element}), float32 (B,) each; see GenerativeModule.

        Delta = -w(sigma) (|D(x + n; sigma) - x|^2 - |D_ref(x + n; sigma) - x|^2), summed over
        pixels: one draw of sigma and n for a difference of evidence bounds with EDM's own weight.
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

    def denoise(self, x, sigma, labels=None):
        """Return D(x; sigma), the expected clean image, float32 (B, C, H, W).

        Args:
            x: noisy images on the [-1, 1] scale (B, C, H, W).
            sigma: noise level on that scale, a scalar or (B,) tensor.
            labels: int64 (B,), -1 = none.

        Raises:
            ValueError: labels the model does not have.
        """
        self.check_labels(labels)
        return self.net(x, torch.as_tensor(sigma, device=x.device), labels)

    def score(self, x, sigma, labels=None):
        """Return the score of the noisy density, (D(x; sigma) - x) / sigma^2 (equation 3)."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        return (self.denoise(x, sigma, labels) - x) / sigma.reshape(-1, 1, 1, 1) ** 2

    def log_prob(
        self,
        x,
        labels=None,
        *,
        kind="ode",
        seeds,
        steps=64,
        trace="hutchinson",
        probes=1,
        sigma_min=None,
        sigma_max=None,
    ):
        """Return log p(x; sigma_min), float64 (B,), along the probability-flow ODE.

            dx/dsigma = (x - D(x; sigma)) / sigma,    x(sigma_max) ~ N(0, sigma_max^2)

        in RK4 steps that are even in sigma^(1/rho). See base.log_prob for the arguments and
        LIKELIHOOD_OPTIONS for the others. p(.; sigma_min) is the model's density of the data with
        noise sigma_min added; keep that below the width of a pixel's level, 1/127.5. Hutchinson's
        estimate of log p has no bias.

        Raises:
            ValueError: an option out of range, labels the model does not have.

        Reference: Song et al. 2021, arXiv 2011.13456, section 4.3; Karras et al. 2022, eq. 1.
        """
        cfg = self.cfg.method
        low = max(cfg.sigma_min if sigma_min is None else sigma_min, self.net.sigma_min)
        high = min(cfg.sigma_max if sigma_max is None else sigma_max, self.net.sigma_max)
        check(kind in self.LIKELIHOODS, "kind", kind, f"choose from {', '.join(self.LIKELIHOODS)}")
        check(steps >= 1, "steps", steps, "must be >= 1")
        check(trace in TRACES, "trace", trace, f"choose from {', '.join(TRACES)}")
        check(probes >= 1, "probes", probes, "must be >= 1")
        check(probes == 1 or trace != "exact", "probes", probes, "trace=exact draws none")
        check(0 < low < high, "sigma_min", low, f"must be in (0, sigma_max={high})")
        self.check_labels(labels)
        seeds = torch.as_tensor(seeds, device=self.device)
        times = torch.linspace(
            low ** (1 / cfg.rho),
            high ** (1 / cfg.rho),
            steps + 1,
            dtype=state_dtype(self.device),
            device=self.device,
        )

        def velocity(x, t):
            sigma = t**cfg.rho
            slope = (x - self.net(x, sigma, labels).to(x.dtype)) / sigma
            return slope * cfg.rho * t ** (cfg.rho - 1)

        def signs(i):
            return seeding.signs(seeds, i, probes, self.shape)

        return ode_log_prob(
            velocity,
            x,
            times,
            lambda x: log_normal(x, high),
            signs=None if trace == "exact" else signs,
        )

    @torch.no_grad()
    def sample(self, seeds, labels=None, *, guide=None, noise="cpu", callback=None, **options):
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
        cfg = self._settings(options, guide)
        generators = seeding.ImageGenerators(seeds, noise)
        latents = generators.randn(self.shape, device=self.device)
        denoise = self._denoiser(self.image_labels(generators, labels), cfg.guidance, guide)
        # Snapped and cut to what the network was trained for, as EDM's own generator does.
        low = max(cfg.sigma_min, self.net.sigma_min)
        high = min(cfg.sigma_max, self.net.sigma_max)
        sigmas = SIGMAS[cfg.sigmas](cfg.steps, low, high, cfg.rho, self.device)
        sigmas = self.net.known_sigma(sigmas)
        if cfg.sampler == "dpmpp_2m":
            sigmas = torch.unique_consecutive(sigmas)  # its step ratio needs distinct levels

        def randn(shape, dtype):
            return generators.randn(shape, dtype=dtype, device=self.device)

        limits = (cfg.churn, cfg.churn_min, cfg.churn_max, cfg.churn_noise)
        common = {"churn": Churn(*limits, self.net.known_sigma), "randn": randn}
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
                callback=callback,
                **common,
            )
        else:
            x = SAMPLERS[cfg.sampler](denoise, x, sigmas, callback=callback, **common)
        return x.float()

    def _settings(self, options, guide):
        """Return the method's config with the given options in place of its own."""
        cfg = self.settings(options, SAMPLING)
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
        return cfg

    def _denoiser(self, labels, weight, guide):
        """Return D(x, sigma) with labels and guidance built in; it counts self.nfe."""

        def denoise(x, sigma):
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

        return denoise
