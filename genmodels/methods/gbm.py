"""GBM: multiplicative diffusion. Noise multiplies the pixels; the score is learned in log space.

    x = u + offset,  u in [0, 1] the pixel;   y = log x
    forward   y_S = y_0 + (drift - 1/2) S + sqrt(S) z           (geometric Brownian motion of x)
    learned   D(y; S) = E[y_0 | y],   s = (D - y) / S,   h = x grad_x log p = s - 1
    loss      E w(S) |D - y_0|^2 = E w(S) S^2 |h_theta(x) - h(x | x_0)|^2

The network sees y less its drift. Samplers: sampling/gbm.py; their start: networks/prior.py.

References: "Dale meets Langevin", arXiv 2510.02730; Hyvarinen 2007 (explicit score matching of
non-negative data); Karras et al. 2022, arXiv 2206.00364 (the preconditioning, here of log x).
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from genmodels import config, seeding
from genmodels.config import Section, check, setting, settings_of
from genmodels.kernels.broadcast import over_items
from genmodels.kernels.philox import philox_normal, philox_uniform
from genmodels.methods.base import Batch, Callback, GenerativeModule, Labels
from genmodels.networks import NETWORKS
from genmodels.networks.precond import LogSpace
from genmodels.networks.prior import PRIORS, GaussianPrior, fit_to_images
from genmodels.sampling import divergence, gbm
from genmodels.sampling.likelihood import FlowOptions
from genmodels.sampling.posterior import DENOISING, Denoiser
from genmodels.seeding import Stream

if TYPE_CHECKING:
    from genmodels.data import ImageDataModule

SCHEDULES = ("geometric", "constant")
LOSSES = ("denoising", "explicit", "hutchinson")
WEIGHTS = ("edm", "paper", "eps", "likelihood")
PREPARED = """log x: mean {mean:.4f}, std {std:.4f}; prior {prior} at sigma_max={sigma_max}:
KL(p_T || prior) = {kl:.3g} +- {kl_stderr:.2g} nats ({kl_gaussian:.3g} with a Gaussian p_T)"""
# Settings that sample() and sample.py may override.
SAMPLING = (
    "sigma_min",
    "sigma_max",
    "sampler",
    "steps",
    "grid",
    "solver",
    "denoise_last",
    "delta",
    "inner",
    "anneal",
    "form",
    "final",
)


@dataclass
class GBMConfig(Section):
    """GBM, multiplicative diffusion ("Dale meets Langevin", arXiv 2510.02730)."""

    PREFIX = "method."

    name: str = setting("gbm", "")
    offset: float = setting(1.0, "x = pixel in [0, 1] + offset; the paper's is 1", ge=1e-3, le=2)
    drift: float = setting(0.5, "mu / sigma^2: 0.5 (the paper's) keeps the mean of log x, 0 of x")
    schedule: str = setting(
        "geometric",
        "how training draws S (geometric: even in log S, constant: in S)",
        choices=SCHEDULES,
    )
    sigma_min: float = setting(0.005, "smallest standard deviation of the noise of log x")
    sigma_max: float = setting(  # above 10, x = exp(y) would leave float32
        2.0, "largest one; the paper's 0.8 leaves the image visible", le=10
    )
    prior: str = setting(
        "full", "start of sampling, fitted to log x (lognormal: iid, the paper's)", choices=PRIORS
    )
    rank: int = setting(64, "principal components of prior=lowrank", ge=1)
    loss: str = setting(
        "denoising",
        "explicit and hutchinson are Hyvarinen's of 2007, without target",
        choices=LOSSES,
    )
    weight: str = setting(
        "edm",
        "edm: every S alike at first; paper: 1; eps: 1 / S; likelihood: the variational bound",
        choices=WEIGHTS,
    )
    sampler: str = setting("dls", "ums may flip signs, paper is annealed", choices=gbm.SAMPLERS)
    steps: int = setting(64, "sampling steps", ge=1)
    grid: str = setting(
        "geometric",
        "steps even in S (uniform), sqrt(S) (quadratic) or log S (geometric)",
        choices=gbm.GRIDS,
    )
    solver: str = setting("heun", "of sampler=ode", choices=gbm.SOLVERS)
    denoise_last: bool = setting(True, "dls, ums: draw no noise in the last step")
    delta: float = setting(6.165e-4, "sampler=paper: step in time (1 is the whole process)", gt=0)
    inner: int = setting(1, "sampler=paper: steps at each S", ge=1)
    anneal: float = setting(
        0.995, "sampler=paper: factor on the noise from one S to the next", gt=0, le=1
    )
    form: str = setting("dls", "sampler=paper: its step", choices=("dls", "ums"))
    final: int = setting(0, "sampler=paper: steps without noise at the end", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            0 < self.sigma_min < self.sigma_max,
            "sigma_min",
            f"must be in (0, sigma_max={self.sigma_max})",
        )
        self.check(
            abs(self.drift - 0.5) * self.sigma_max**2 <= 25,
            "drift",
            "|drift - 0.5| sigma_max^2 must be <= 25: x would leave float32",
        )

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest variance of the noise of log x."""
        return self.sigma_min**2, self.sigma_max**2


@dataclass
class GBMLikelihoodOptions(FlowOptions):
    """What log_prob() takes."""

    steps: int = setting(64, "ode: RK4 steps, 4 evaluations each; bound: S averaged over", ge=1)


class GBM(GenerativeModule):
    """Multiplicative diffusion in log space; cfg.method is a GBMConfig."""

    Config = GBMConfig
    OF_WEIGHTS = ("offset",)
    SAMPLE_OPTIONS = settings_of(GBMConfig, *SAMPLING)
    LIKELIHOODS = ("ode", "bound")
    LIKELIHOOD_OPTIONS = settings_of(GBMLikelihoodOptions)
    DENOISE_LAWS = {"lognormal": "standard deviation of the noise of log(pixel + offset)"}
    SOLVERS = DENOISING

    def __init__(self, cfg: config.Config) -> None:
        super().__init__(cfg)
        check(
            cfg.method.loss == "denoising" or not cfg.trainer.compile,
            "trainer.compile",
            "true",
            f"method.loss={cfg.method.loss} differentiates twice; use compile=false",
        )
        self.net = LogSpace(NETWORKS[cfg.network.name](cfg.network, self.shape, self.classes))
        self.prior = GaussianPrior(cfg.method.prior, self.shape, cfg.method.rank)
        self.in_range = False  # whether to_state() has looked at images

    def prepare(self, data: "ImageDataModule") -> str:
        """Fit preconditioning and prior to log x of the training images; return words about it."""
        cfg, flip = self.cfg.method, self.cfg.data.flip
        fit = fit_to_images(self.prior, data.train[0], cfg.offset, cfg.sigma_max**2, flip)
        self.cfg.data.check(fit["std"] > 0, "name", "all its pixels are the same")
        self.net.mean.fill_(fit["mean"])
        self.net.sigma_data.fill_(fit["std"])
        return PREPARED.format(prior=cfg.prior, sigma_max=cfg.sigma_max, **fit)

    def to_state(self, x: Tensor, slack: float = 0.0) -> Tensor:
        """Return y = log(u + offset) for images x in [-1, 1], u = (x + 1) / 2.

        On a device the pixels of the first training batch stand for all: to look at each would
        make the host wait for it.

        Raises:
            ValueError: a pixel u outside [0, 1] by more than `slack`.
        """
        u = (x + 1) / 2
        if x.device.type == "cpu" or not (self.training and self.in_range):
            low, high = torch.stack(torch.aminmax(u.detach())).tolist()
            check(
                low >= -slack - 1e-6 and high <= 1 + slack + 1e-6,
                "image",
                f"{low:.4g}..{high:.4g}",
                "its pixels must be in [0, 1], for the model is of log(pixel + offset); rescale "
                "or clip them",
            )  # NaN fails too
            self.in_range = True
        return (u + self.cfg.method.offset).log()

    def from_state(self, y: Tensor) -> Tensor:
        """Return images in [-1, 1], float32: u = exp(y) - offset, clipped to [0, 1]."""
        return ((y.exp() - self.cfg.method.offset).clamp(0, 1) * 2 - 1).float()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (L, {"loss": L per element}), L summed over pixels and averaged over the batch.

        L = w(S) |D - y_0|^2, or for loss=explicit and hutchinson the same up to a constant, from
        Hyvarinen's objective: 2 w(S) S^2 sum_i [h_i + dh_i/dy_i + h_i^2 / 2], without y_0.
        """
        batch = self.as_batch(batch)
        y0, n = self.to_state(batch["image"]), batch["n"]
        seed, device = self.cfg.seed, y0.device
        t = philox_uniform((), seed, n, stream=int(Stream.SIGMA), device=device)
        variance, rate = self.training_variance(t)
        noise = philox_normal(self.shape, seed, n, stream=int(Stream.NOISE), device=device)
        y = y0 + over_items(variance.sqrt(), noise) * noise
        labels = batch["label"] if self.classes else None
        weight = self.weight(variance, rate)
        if self.cfg.method.loss == "denoising":
            error = self.net(y, variance.sqrt(), labels) - y0
            loss = weight * error.square().sum(dim=(1, 2, 3))
        else:
            signs = seeding.signs(torch.full_like(n, seed), n, 1, self.shape)
            trace = "exact" if self.cfg.method.loss == "explicit" else "hutchinson"
            terms = self._divergence(labels, trace, signs)(y, variance)
            loss = weight * 2 * variance**2 * divergence.nonnegative_objective(*terms)
        return loss.mean(), {"loss": loss.detach().mean() / math.prod(self.shape)}

    def training_variance(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (S, dS/dt) at t in [0, 1), uniform in training."""
        low, high = self.cfg.method.ends
        if self.cfg.method.schedule == "constant":
            return low + (high - low) * t, torch.full_like(t, high - low)
        variance = low * (high / low) ** t
        return variance, variance * math.log(high / low)

    def weight(self, variance: Tensor, rate: Tensor) -> Tensor:
        """Return w(S), (B,): see GBMConfig; likelihood is dS/dt / (2 S^2)."""
        if self.cfg.method.weight == "edm":
            return self.net.loss_weight(variance.sqrt())
        kinds = {
            "paper": 1 + 0 * variance,
            "eps": 1 / variance,
            "likelihood": rate / (2 * variance**2),
        }
        return kinds[self.cfg.method.weight]

    def _scorer(self, labels: Tensor | None = None) -> Callable[[Tensor, float | Tensor], Tensor]:
        """Return s(y, S) for y less its drift, S a number or (B,); it counts self.nfe."""

        def score(y: Tensor, variance: float | Tensor) -> Tensor:
            self.nfe += 1
            if isinstance(variance, float):  # filled in on the device, not copied there
                variance = torch.full((), variance, dtype=torch.float32, device=y.device)
            variance = torch.as_tensor(variance, dtype=torch.float32, device=y.device)
            denoised = self.net(y, variance.sqrt(), labels)
            return (denoised - y) / (over_items(variance, y) if variance.dim() else variance)

        return score

    def _divergence(
        self, labels: Tensor | None, trace: str, signs: Tensor
    ) -> Callable[[Tensor, float | Tensor], tuple[Tensor, Tensor]]:
        """Return a callable (y, S) -> (s, div s)."""
        signs = None if trace == "exact" else signs
        call = divergence.score_and_divergence(self._scorer(labels), signs)

        def plain(y: Tensor, variance: float | Tensor) -> tuple[Tensor, Tensor]:
            # The fused kernels have no second derivative, and bf16 no digits for one.
            with sdpa_kernel(SDPBackend.MATH), torch.autocast(y.device.type, enabled=False):
                return call(y, variance)

        return plain

    def denoise(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Return exp E[log x_0 | x] as images in [-1, 1], float32: the geometric mean.

        Args:
            x: images under multiplicative noise, pixels (u + offset) exp(sigma z) - offset of
                clean u, on the [-1, 1] scale but not clipped, (B, C, H, W).
            sigma: standard deviation of that noise, a scalar or (B,).
            labels: int64 (B,), -1 = none.

        Raises:
            ValueError: a pixel at or below -offset, labels the model does not have.
        """
        self.check_labels(labels)
        labels = None if labels is None else labels.to(x.device)
        self.check_finite(x, sigma)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        return self.from_state(self.net(self.noisy_state(x), sigma, labels))

    def denoiser(self, labels: Tensor | None = None) -> Denoiser:
        """Return E[w_0 | w_0 + sqrt(S) z], w = log(u + offset), as solve() takes it.

        y less its drift is such a state, so multiplicative noise is Gaussian there; a measurement
        of the picture 2 (exp(w) - offset) - 1 is not linear in it.
        """
        cfg = self.cfg.method

        def call(w: Tensor, sigma: float) -> Tensor:
            self.nfe += 1
            level = torch.full((), sigma, dtype=torch.float32, device=w.device)
            return self.net(w, level, labels)

        return Denoiser(
            call,
            cfg.sigma_min,
            cfg.sigma_max,
            float(self.net.sigma_data),
            begin=lambda z, sigma: self.prior.sample(z, sigma**2),
            image=lambda w: 2 * (w.exp() - cfg.offset) - 1,
            slope=lambda w: 2 * w.exp(),
        )

    def score(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Return h = x grad_x log p(x), the multiplicative score; arguments as for denoise."""
        self.check_labels(labels)
        labels = None if labels is None else labels.to(x.device)
        self.check_finite(x, sigma)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        return self._scorer(labels)(self.noisy_state(x), sigma**2) - 1

    def noisy_state(self, x: Tensor) -> Tensor:
        """Return log(u + offset) of noisy images x; ValueError for a pixel that has none."""
        u, offset = (x + 1) / 2, self.cfg.method.offset
        check(
            -offset < u.min() <= u.max() < math.inf,
            "image",
            f"{u.min():.4g}..{u.max():.4g}",
            f"multiplicative noise keeps pixels finite, above -offset = {-offset}",
        )
        return (u + offset).log()

    @torch.no_grad()
    def restore(
        self,
        images: Tensor,
        law: str,
        level: float | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (restored images in [-1, 1], their levels (B,)) of noisy ones; see denoise().

        Args:
            images: float32 (B, C, H, W) on the [-1, 1] scale, not clipped.
            law: a key of DENOISE_LAWS.
            level: in the law's unit; None: the likeliest one for each image.
            labels: int64 (B,), or None.

        Raises:
            ValueError: another size, or a law, a level or labels that the model does not know.
        """
        self.check_labels(labels)
        check(
            tuple(images.shape[1:]) == self.shape,
            "image",
            tuple(images.shape),
            f"must be of shape (N, {', '.join(map(str, self.shape))})",
        )
        cfg, images = self.cfg.method, images.to(self.device)
        check(law in self.DENOISE_LAWS, "law", law, f"choose from {', '.join(self.DENOISE_LAWS)}")
        if level is not None:
            check(
                cfg.sigma_min <= level <= cfg.sigma_max,
                "level",
                level,
                f"this model knows {cfg.sigma_min} to {cfg.sigma_max}",
            )
            sigma = torch.full((len(images),), level)
        else:
            variances = gbm.variance_levels(49, *cfg.ends)[-2::-1]
            zeros = torch.zeros(len(images), dtype=torch.int64, device=self.device)
            call = self._divergence(labels, "hutchinson", seeding.signs(zeros, 0, 4, self.shape))
            sigma = divergence.likeliest_variance(self.noisy_state(images), variances, call).sqrt()
        return self.denoise(images, sigma.to(images), labels), sigma

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        labels: Labels = None,
        *,
        noise: str = "cpu",
        callback: Callback | None = None,
        **options: Any,
    ) -> Tensor:
        """Return generated images in [-1, 1], float32 (N, C, H, W).

        Image k depends on seeds[k] alone: latents and class come from its own torch generator, the
        sampler's noise from Philox.

        Args:
            seeds: N whole numbers.
            labels: classes of a conditional model: None (random), one int, or N ints.
            noise: device of the latents' generators.
            callback: called as callback(i, images) after each step.
            options: see SAMPLE_OPTIONS; None: the model's config.

        Raises:
            ValueError: an option out of range, or labels the model does not have.
        """
        seeds, cfg = list(seeds), self._sampling_config(options)
        generators = seeding.ImageGenerators(seeds, noise)
        latents = generators.randn(self.shape, device=self.device)
        score, shift = self._scorer(self.image_labels(generators, labels)), cfg.drift - 0.5
        variances = gbm.variance_levels(cfg.steps, *cfg.ends, cfg.grid)
        y = self.prior.sample(latents, variances[0]) + shift * variances[0]
        keys = torch.tensor(seeding.checked_seeds(seeds), dtype=torch.int64, device=self.device)
        self.nfe = 0
        report = callback and (lambda i, y: callback(i, self.from_state(y)))
        y, flips = gbm.sample(
            cfg,
            lambda y, variance: score(y - shift * variance, variance),
            y,
            variances,
            noise=keys,
            callback=report,
        )
        if flips is not None and flips.any():
            share = int(flips.sum()) / latents.numel()
            warnings.warn(
                f"sampler=ums flipped {int(flips.sum())} signs ({share:.2g} for each pixel), which "
                "the process never does; use sampler=dls, or more steps",
                stacklevel=2,
            )
        return self.from_state(y)

    def _sampling_config(self, options: dict[str, Any]) -> GBMConfig:
        """Return the method's config with the given options in place of its own."""
        cfg = self.method_with(options, SAMPLING)
        (low, high), (first, last) = self.cfg.method.ends, cfg.ends
        check(
            low <= first and last <= high,
            "sigma_max",
            cfg.sigma_max,
            f"and sigma_min={cfg.sigma_min} must lie within what it was trained on",
        )
        for key, samplers in gbm.READ_BY.items():
            check(
                options.get(key) is None or cfg.sampler in samplers,
                key,
                options.get(key),
                f"sampler={cfg.sampler} does not take it; leave it out",
            )
        return cfg

    @torch.no_grad()
    def log_prob(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        kind: str = "ode",
        seeds: Tensor | Sequence[int],
        **options: Any,
    ) -> Tensor:
        """Return log p(x) on the [-1, 1] scale in nats, float64 (B,).

        log p(x) = log p_Y(y) - sum log(u + offset) - D log 2 with log p_Y by flow_log_prob (ode)
        or variational_bound (bound) of sampling/gbm.py. Arguments as for base.log_prob and
        LIKELIHOOD_OPTIONS; x may lie half a grey level outside [-1, 1], as dequantised images do.

        Raises:
            ValueError: an option out of range; too small an offset; labels it does not have.
        """
        check(kind in self.LIKELIHOODS, "kind", kind, f"choose from {', '.join(self.LIKELIHOODS)}")
        flow = GBMLikelihoodOptions(**options)
        self.cfg.method.check(
            self.cfg.method.offset > 1 / 510,
            "offset",
            "dequantised black reaches -1/510; a density needs a larger offset",
        )
        self.check_labels(labels)
        seeds = torch.as_tensor(seeds, dtype=torch.int64, device=self.device)
        y = self.to_state(x.double(), slack=1 / 510)
        jacobian = y.flatten(1).sum(1) + math.prod(self.shape) * math.log(2)

        def denoised(y: Tensor, sigma: Tensor) -> Tensor:
            return self.net(y, sigma, labels)

        def signs(i: int) -> Tensor:
            return seeding.signs(seeds, i, flow.probes, self.shape)

        common = (denoised, y, *self.cfg.method.ends, self.prior)
        if kind == "bound":
            return gbm.variational_bound(*common, seeds, flow.steps) - jacobian
        estimate = None if flow.trace == "exact" else signs
        with sdpa_kernel(SDPBackend.MATH):
            return gbm.flow_log_prob(*common, estimate, flow.steps) - jacobian
