"""GBM: multiplicative diffusion. Noise multiplies the pixels; the score is learned in log space.

    x = u + offset,  u in [0, 1] the pixel;   y = log x
    forward   y_S = y_0 + (drift - 1/2) S + sqrt(S) z           (geometric Brownian motion of x)
    learned   D(y; S) = E[y_0 | y],   s = (D - y) / S,   h = x grad_x log p = s - 1
    loss      E w(S) |D - y_0|^2 = E w(S) S^2 |h_theta(x) - h(x | x_0)|^2

The network sees y less the drift. Samplers, likelihood and the estimate of a noise level are in
genmodels/sampling/gbm.py.

References: "Dale meets Langevin: a multiplicative denoising diffusion model", arXiv 2510.02730;
Hyvarinen 2007 (explicit score matching of non-negative data); Karras et al. 2022, arXiv 2206.00364
(the preconditioning, here of log x).
"""

import contextlib
import dataclasses
import math
import warnings
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from genmodels import seeding
from genmodels.config import check, setting
from genmodels.kernels.philox import philox_normal, philox_uniform
from genmodels.methods.base import GenerativeModule
from genmodels.networks import NETWORKS
from genmodels.networks.precond import LogSpace
from genmodels.networks.prior import PRIORS, GaussianPrior, log_moments, mixture_divergence
from genmodels.sampling import gbm as walk
from genmodels.seeding import Stream

SCHEDULES = ("geometric", "constant")
LOSSES = ("denoising", "explicit", "hutchinson")
WEIGHTS = ("edm", "paper", "eps", "likelihood")
SAMPLERS = ("dls", "ums", "ancestral", "ode", "paper")
# Settings that sample() and sample.py may override.
SAMPLING = ("sigma_min", "sigma_max", "sampler", "steps", "grid", "solver", "denoise_last", "delta",
            "inner", "anneal", "form", "final")  # fmt: skip


@dataclass
class GBMConfig:
    """GBM, multiplicative diffusion ("Dale meets Langevin", arXiv 2510.02730)."""

    name: str = setting("gbm", "")
    offset: float = setting(1.0, "x = pixel in [0, 1] + offset; the paper's is 1")
    drift: float = setting(0.5, "mu / sigma^2: 0.5 (the paper's) keeps the mean of log x, 0 of x")
    schedule: str = setting("geometric", "how training draws S: even in log S, or constant: in S")
    sigma_min: float = setting(0.005, "smallest standard deviation of the noise of log x")
    sigma_max: float = setting(2.0, "largest one; the paper's is 0.8, which leaves the image there")
    prior: str = setting("full", "start of sampling, fitted to log x: lognormal (iid, the paper's), "
                         "lowrank or full Gaussian")  # fmt: skip
    rank: int = setting(64, "principal components of prior=lowrank")
    loss: str = setting("denoising", "denoising; explicit or hutchinson: Hyvarinen 2007, no target")
    weight: str = setting("edm", "edm: all levels alike at first; paper: |D - y0|^2; eps: / S; "
                          "likelihood: the variational bound")  # fmt: skip
    sampler: str = setting("ode", "ode, dls, ancestral, ums (may flip signs) or paper (annealed)")
    steps: int = setting(32, "sampling steps")
    grid: str = setting(
        "geometric", "levels visited, even in S: uniform, sqrt(S): quadratic, log S"
    )
    solver: str = setting("heun", "of sampler=ode: heun or rk4")
    denoise_last: bool = setting(True, "dls, ums: draw no noise in the last step")
    delta: float = setting(6.165e-4, "sampler=paper: step in time (1 is the whole process)")
    inner: int = setting(1, "sampler=paper: steps at each level")
    anneal: float = setting(0.995, "sampler=paper: factor on the noise from level to level")
    form: str = setting("dls", "sampler=paper: dls or ums")
    final: int = setting(0, "sampler=paper: steps without noise at the end")

    def __post_init__(self):
        choices = {"schedule": SCHEDULES, "prior": PRIORS, "loss": LOSSES, "weight": WEIGHTS,
                   "sampler": SAMPLERS, "grid": walk.GRIDS, "solver": walk.SOLVERS,
                   "form": ("dls", "ums")}  # fmt: skip
        for key, names in choices.items():
            check(getattr(self, key) in names, f"method.{key}", getattr(self, key),
                  f"choose from {', '.join(names)}")  # fmt: skip
        check(1e-3 <= self.offset <= 2, "method.offset", self.offset, "must be in [0.001, 2]")
        check(math.isfinite(self.drift), "method.drift", self.drift, "must be finite")
        check(0 < self.sigma_min < self.sigma_max, "method.sigma_min", self.sigma_min,
              f"must be in (0, sigma_max={self.sigma_max})")  # fmt: skip
        check(self.sigma_max <= 10, "method.sigma_max", self.sigma_max,
              "must be <= 10: x = exp(y) would leave float32")  # fmt: skip
        for key in ("rank", "steps", "inner"):
            check(getattr(self, key) >= 1, f"method.{key}", getattr(self, key), "must be >= 1")
        check(self.delta > 0, "method.delta", self.delta, "must be > 0")
        check(0 < self.anneal <= 1, "method.anneal", self.anneal, "must be in (0, 1]")
        check(self.final >= 0, "method.final", self.final, "must be >= 0")

    @property
    def ends(self):
        """The smallest and the largest variance of the noise of log x."""
        return self.sigma_min**2, self.sigma_max**2


class GBM(GenerativeModule):
    """Multiplicative diffusion in log space.

    Args:
        cfg: Config whose method is a GBMConfig.
    """

    Config = GBMConfig
    SAMPLE_OPTIONS = {
        name: (type(item.default), None, item.metadata["doc"])
        for name, item in GBMConfig.__dataclass_fields__.items()
        if name in SAMPLING
    }
    DENOISE_LAWS = {"lognormal": "standard deviation of the noise of log(pixel + offset)"}
    LIKELIHOODS = ("ode", "bound")
    LIKELIHOOD_OPTIONS = {
        "likelihood_steps": (int, 64, "levels of the ODE, or of the bound's average over S"),
        "probes": (int, 1, "Hutchinson probes of the ODE's divergence; 0: exact"),
    }

    def __init__(self, cfg):
        super().__init__(cfg)
        method = cfg.method
        check(method.loss == "denoising" or not cfg.trainer.compile, "trainer.compile", "true",
              f"method.loss={method.loss} differentiates twice; use compile=false")  # fmt: skip
        raw = NETWORKS[cfg.network.name](cfg.network, self.shape, self.classes)
        self.net = LogSpace(raw)
        self.prior = GaussianPrior(method.prior, self.shape, method.rank)
        self.shift = method.drift - 0.5  # of y, for each unit of S

    def prepare(self, data):
        """Fit preconditioning and prior to log x of the training images; return words about it."""
        pixels, (low, high) = data.train[0], self.cfg.method.ends
        if self.cfg.data.flip:
            pixels = torch.cat([pixels, pixels.flip(-1)])
        table = (torch.arange(256, dtype=torch.float64) / 255 + self.cfg.method.offset).log()
        mean, covariance = log_moments(pixels, table)
        center = mean.mean()
        self.net.mean.fill_(float(center))
        spread = float((covariance.diag() + (mean - center) ** 2).mean().sqrt())
        check(spread > 0, "data.name", self.cfg.data.name, "every pixel is the same; nothing to do")
        self.net.sigma_data.fill_(spread)
        self.prior.fit(mean, covariance)
        gaussian = self.prior.divergence_from(mean, covariance, high)
        sampled, stderr = mixture_divergence(self.prior, pixels, table, high)
        return (
            f"log x: mean {float(center):.4f}, std {spread:.4f}; prior {self.prior.kind} at "
            f"sigma_max={math.sqrt(high):g}: KL(p_T || prior) = {gaussian:.3g} nats with p_T taken "
            f"as Gaussian, {sampled:.3g} +- {stderr:.2g} with the noised training images"
        )

    def to_state(self, x, slack=0.0):
        """Return y = log(u + offset) for images x in [-1, 1], u = (x + 1) / 2.

        Raises:
            ValueError: a pixel outside [0, 1] by more than `slack`.
        """
        u = (x + 1) / 2
        low, high = (float(value) for value in torch.aminmax(u.detach()))
        # `not` catches NaN too.
        if not (low >= -slack - 1e-6 and high <= 1 + slack + 1e-6):
            raise ValueError(
                f"image={low:.4g}..{high:.4g}: pixels must be in [0, 1] before the offset, for "
                "log(pixel + offset) models non-negative data; rescale or clip them"
            )
        return (u + self.cfg.method.offset).log()

    def from_state(self, y):
        """Return images in [-1, 1], float32: u = exp(y) - offset clipped to [0, 1]."""
        return ((y.exp() - self.cfg.method.offset).clamp(0, 1) * 2 - 1).float()

    def loss(self, batch):
        """Return (L, {"loss": L per element}), L summed over pixels and averaged over the batch.

        L = w(S) |D - y_0|^2; explicit and hutchinson: the same up to a constant, from
        2 w(S) S^2 times Hyvarinen's objective, without y_0. Weights: see weight().
        """
        y0, n = self.to_state(batch["image"]), batch["n"]
        seed, device = self.cfg.seed, y0.device
        uniform = philox_uniform((), seed, n, stream=int(Stream.SIGMA), device=device)
        level, rate = self.training_level(uniform)
        noise = philox_normal(self.shape, seed, n, stream=int(Stream.NOISE), device=device)
        y = y0 + _column(level.sqrt()) * noise
        labels = batch["label"] if self.classes else None
        weight = self.weight(level, rate)
        if self.cfg.method.loss == "denoising":
            error = self.net(y, level.sqrt(), labels) - y0
            loss = weight * error.square().sum(dim=(1, 2, 3))
        else:
            loss = weight * 2 * level**2 * self._explicit(y, level, labels, n)
        return loss.mean(), {"loss": loss.detach().mean() / math.prod(self.shape)}

    def training_level(self, uniform):
        """Return (S, dS/dt) at t = uniform in [0, 1)."""
        low, high = self.cfg.method.ends
        if self.cfg.method.schedule == "constant":
            return low + (high - low) * uniform, torch.full_like(uniform, high - low)
        level = low * (high / low) ** uniform
        return level, level * math.log(high / low)

    def weight(self, level, rate):
        """Return w(S) on |D - y_0|^2, (B,).

        edm: 1 / c_out^2;  paper: 1;  eps: 1 / S;  likelihood: dS/dt / (2 S^2), which makes the
        loss the integral of the variational bound (nats).
        """
        kind = self.cfg.method.weight
        if kind == "edm":
            return self.net.loss_weight(level.sqrt())
        return {"paper": 1 + 0 * level, "eps": 1 / level, "likelihood": rate / (2 * level**2)}[kind]

    def _explicit(self, y, level, labels, n):
        """Return Hyvarinen's objective at each image, (B,)."""
        score = self._scorer(labels)
        if self.cfg.method.loss == "explicit":
            divergence = walk.exact_divergence(score)
        else:
            signs = self._signs(self.cfg.seed, n, 0)
            divergence = walk.hutchinson(score, [signs])
        with _twice_differentiable():
            return walk.nonnegative_objective(*divergence(y, level))

    def _signs(self, seed, step, number):
        """Return +-1 with equal odds (B, C, H, W); seed or step is int64 (B,)."""
        step = step + (number << 32)
        options = {"stream": int(Stream.PROBE), "device": self.device}
        return (philox_uniform(self.shape, seed, step, **options) < 0.5).float() * 2 - 1

    def _scorer(self, labels=None):
        """Return s(y, S) for y without drift; it counts self.nfe."""

        def score(y, level):
            self.nfe += 1
            level = torch.as_tensor(level, dtype=torch.float32, device=y.device)
            denoised = self.net(y, level.sqrt(), labels)
            return (denoised - y) / (_column(level) if level.dim() else level)

        return score

    def denoise(self, x, sigma, labels=None):
        """Return exp E[log x_0 | x], the clean image in the geometric mean, float32 in [-1, 1].

        Args:
            x: images under multiplicative noise, 2 (u + offset) exp(sigma z) - 2 offset - 1 of
                clean u, not clipped, (B, C, H, W).
            sigma: standard deviation of that noise, a scalar or (B,).
            labels: int64 (B,), -1 = none.
        """
        y = self._noisy_state(x)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        return self.from_state(self.net(y, sigma, labels))

    def score(self, x, sigma, labels=None):
        """Return h = x grad_x log p(x), the multiplicative score; arguments as for denoise."""
        level = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x)) ** 2
        return self._scorer(labels)(self._noisy_state(x), level) - 1

    def _noisy_state(self, x):
        """Return log(u + offset) of noisy images, whose u may leave [0, 1] but not reach -offset.

        Stored as 8 bits such an image was clipped: u = 0 then stands for all that lay below.
        """
        u = (x + 1) / 2 + self.cfg.method.offset
        if not bool((u > 0).all()):
            raise ValueError(
                f"image={float(u.min()) - self.cfg.method.offset:.4g}: multiplicative noise keeps "
                f"pixel + offset positive; clip it above {-self.cfg.method.offset}"
            )
        return u.log()

    @torch.no_grad()
    def restore(self, images, law, level=None, labels=None):
        """Return (restored images in [-1, 1], their levels (B,)) of noisy ones; see denoise().

        Args:
            images: float32 (B, C, H, W) on the [-1, 1] scale, not clipped.
            law: a key of DENOISE_LAWS.
            level: in the law's unit; None: the likeliest level for each image.
            labels: int64 (B,), or None.

        Raises:
            ValueError: an unknown law, a level that the model does not know.
        """
        cfg = self.cfg.method
        check(law in self.DENOISE_LAWS, "law", law, f"choose from {', '.join(self.DENOISE_LAWS)}")
        images = images.to(self.device)
        if level is None:
            levels = [cfg.sigma_min**2 * (cfg.sigma_max / cfg.sigma_min) ** (k / 24)
                      for k in range(49)]  # fmt: skip
            seeds = torch.zeros(len(images), dtype=torch.int64, device=self.device)
            probes = [self._signs(seeds, 0, number) for number in range(4)]
            divergence = walk.hutchinson(self._scorer(labels), probes)
            with _twice_differentiable():
                level = walk.likeliest_level(self._noisy_state(images), levels, divergence).sqrt()
        else:
            check(cfg.sigma_min <= level <= cfg.sigma_max, "level", level,
                  f"this model knows {cfg.sigma_min} to {cfg.sigma_max}")  # fmt: skip
            level = torch.full((len(images),), float(level))
        return self.denoise(images, level.to(images), labels), level

    @torch.no_grad()
    def sample(self, seeds, labels=None, *, noise="cpu", callback=None, **options):
        """Return generated images in [-1, 1], float32 (N, C, H, W).

        Image k depends on seeds[k] alone: its latents and class come from its own torch generator,
        the sampler's noise from Philox keyed by its seed.

        Args:
            seeds: N whole numbers.
            labels: classes of a conditional model: None (random), one int, or N ints.
            noise: device of the generators of the latents.
            callback: called as callback(i, images) after each step.
            options: see SAMPLE_OPTIONS; those left at None come from the model's config.

        Raises:
            ValueError: an option out of range, or labels the model does not have.
        """
        seeds, cfg = list(seeds), self._settings(options)
        generators = seeding.ImageGenerators(seeds, noise)
        latents = generators.randn(self.shape, device=self.device)
        score = self._scorer(self.image_labels(generators, labels))
        levels = walk.variance_levels(cfg.steps, *cfg.ends, cfg.grid)
        y = self.prior.sample(latents, levels[0]) + self.shift * levels[0]
        keys = torch.tensor([int(seed) % 2**63 for seed in seeds], device=self.device)
        self.nfe, flips = 0, torch.zeros(1)

        def shifted(y, level):
            return score(y - self.shift * level, level)

        report = callback and (lambda i, y: callback(i, self.from_state(y)))
        common = {"drift": cfg.drift, "callback": report}
        if cfg.sampler == "ode":
            y = walk.sample_ode(shifted, y, levels, solver=cfg.solver, **common)
        elif cfg.sampler == "ancestral":
            y = walk.sample_ancestral(shifted, y, levels, noise=keys, **common)
        elif cfg.sampler == "dls":
            last = cfg.denoise_last
            y = walk.sample_dls(shifted, y, levels, noise=keys, denoise=last, **common)
        else:
            if cfg.sampler == "ums":
                last = cfg.denoise_last
                x, flips = walk.sample_ums(shifted, y, levels, noise=keys, denoise=last, **common)
            else:
                x, flips = walk.sample_paper(
                    shifted, y, levels, noise=keys, delta=cfg.delta, inner=cfg.inner,
                    anneal=cfg.anneal, form=cfg.form, rate=levels[0], final=cfg.final, **common,
                )  # fmt: skip
            self._warn(flips, latents[0].numel())
            y = x.clamp(min=0).log()  # a flipped pixel is below any the data have
        return self.from_state(y)

    def _warn(self, flips, size):
        """Warn where signs were flipped."""
        if flips.any():
            share = float(flips.sum()) / (len(flips) * size)
            warnings.warn(
                f"ums flipped {int(flips.sum())} signs ({share:.2g} for each pixel), which the "
                "process never does: use sampler=dls, or more steps", stacklevel=3,
            )  # fmt: skip

    def _settings(self, options):
        """Return the method's config with the given options in place of its own."""
        for key in options:
            check(key in SAMPLING, key, options[key], f"choose from {', '.join(SAMPLING)}")
        given = {key: value for key, value in options.items() if value is not None}
        try:
            return dataclasses.replace(self.cfg.method, **given)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("method.")) from None

    @torch.no_grad()
    def log_prob(self, x, labels=None, *, kind, seeds, likelihood_steps=64, probes=1):
        """Return log p(x) on the [-1, 1] scale in nats, float64 (B,).

        log p(x) = log p_Y(y) - sum log(u + offset) - D log 2. `ode`: by the probability-flow ODE
        from sigma_min to the prior; `bound`: a lower bound, unbiased in its expectation,

            log p_Y(y) >= - KL(q(y_T|y) || prior) - 1/2 int |D - y|^2 / S^2 dS + E log N(y; D_min,
            S_min),  D_min = D(y_min).

        Args:
            x: images (B, C, H, W) in [-1, 1], or half a grey level beyond (dequantised ones).
            labels: int64 (B,), or None.
            kind: "ode" or "bound".
            seeds: one for each image: its probes, or its noise, come from it alone.
            likelihood_steps, probes: see LIKELIHOOD_OPTIONS.
        """
        check(kind in self.LIKELIHOODS, "kind", kind, f"choose from {', '.join(self.LIKELIHOODS)}")
        check(likelihood_steps >= 2, "likelihood_steps", likelihood_steps, "must be >= 2")
        check(self.cfg.method.offset > 1 / 510, "method.offset", self.cfg.method.offset,
              "dequantised black pixels reach -1/510; a density needs a larger offset")  # fmt: skip
        y = self.to_state(x.double(), slack=1 / 510)
        jacobian = -(y.flatten(1).sum(1) + math.prod(self.shape) * math.log(2))
        keys = torch.tensor([int(seed) % 2**63 for seed in seeds], device=self.device)
        estimate = self._by_ode if kind == "ode" else self._by_bound
        return estimate(y, labels, keys, likelihood_steps, probes) + jacobian

    def _by_ode(self, y, labels, keys, steps, probes):
        """Return log p_Y(y), float64 (B,)."""
        low, high = self.cfg.method.ends
        levels = walk.variance_levels(steps + 1, low, high)[-2::-1]
        score, divergence = self._scorer(labels), None
        if probes:
            signs = [self._signs(keys, 0, number) for number in range(probes)]
            divergence = walk.hutchinson(score, signs)
        else:
            divergence = walk.exact_divergence(score)
        with _twice_differentiable():
            return walk.log_density(score, y, levels, lambda y: self.prior.log_prob(y, high),
                                    divergence)  # fmt: skip

    def _by_bound(self, y, labels, keys, steps, probes):
        """Return a lower bound of log p_Y(y) in expectation, float64 (B,)."""
        low, high = self.cfg.method.ends
        size = math.prod(self.shape)

        def residual(level, step):
            z = philox_normal(self.shape, keys, step, stream=int(Stream.LEVEL), device=y.device)
            noisy = y.float() + _column(level.sqrt()) * z
            error = self.net(noisy, level.sqrt(), labels).double() - y
            return error.square().flatten(1).sum(1), noisy

        # One S in each of `steps` equal parts of log S, its place in them from the image's seed.
        place = philox_uniform((), keys, 0, stream=int(Stream.LEVEL), device=y.device).double()
        total = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        for k in range(steps):
            level = low * (high / low) ** ((k + place) / steps)
            total += residual(level.float(), k + 1)[0] / (2 * level)
        integral = total * math.log(high / low) / steps
        square, _ = residual(torch.full_like(place, low).float(), steps + 1)
        reconstruction = -square / (2 * low) - size / 2 * math.log(2 * math.pi * low)
        return reconstruction - integral - self.prior.divergence_of(y, high)


def _column(values):
    return values.reshape(-1, 1, 1, 1)


@contextlib.contextmanager
def _twice_differentiable():
    """Attention in plain matrix products: the fused kernels have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
