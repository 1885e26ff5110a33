"""EDM: denoising score matching with preconditioning, sampled along the probability-flow ODE.

Reference: Karras, Aittala, Aila and Laine 2022, "Elucidating the design space of diffusion-based
generative models", arXiv 2206.00364.
"""

import math
from dataclasses import dataclass

import torch

from genmodels import seeding
from genmodels.config import check, setting
from genmodels.kernels.philox import philox_normal
from genmodels.methods.base import GenerativeModule
from genmodels.networks import NETWORKS
from genmodels.networks.precond import Precond
from genmodels.sampling.ode import SAMPLERS, Churn
from genmodels.sampling.schedules import karras_sigmas, state_dtype
from genmodels.seeding import Stream


@dataclass
class EDMConfig:
    """EDM (Karras et al. 2022, arXiv 2206.00364)."""

    name: str = setting("edm", "")
    sigma_data: float = setting(0.5, "standard deviation of the data; genmodels.data info shows it")
    p_mean: float = setting(-1.2, "mean of ln sigma in training")
    p_std: float = setting(1.2, "standard deviation of ln sigma in training")
    label_dropout: float = setting(0.0, "share of labels hidden in training (for guidance)")
    sampler: str = setting("heun", "heun or euler")
    steps: int = setting(18, "sampling steps")
    sigma_min: float = setting(0.002, "smallest sigma of the sampling grid")
    sigma_max: float = setting(80.0, "largest sigma of the sampling grid")
    rho: float = setting(7.0, "bend of the sampling grid")
    churn: float = setting(0.0, "S_churn: fresh noise while sampling, 0 = deterministic")
    churn_min: float = setting(0.0, "S_min: no churn below this sigma")
    churn_max: float = setting(math.inf, "S_max: no churn above this sigma")
    churn_noise: float = setting(1.0, "S_noise: standard deviation of the fresh noise")
    guidance: float = setting(1.0, "classifier-free guidance weight, 1 = none")

    def __post_init__(self):
        check(self.sigma_data > 0, "method.sigma_data", self.sigma_data, "must be > 0")
        check(self.p_std >= 0, "method.p_std", self.p_std, "must be >= 0")
        check(0 <= self.label_dropout <= 1, "method.label_dropout", self.label_dropout,
              "must be in [0, 1]")  # fmt: skip
        check(self.sampler in SAMPLERS, "method.sampler", self.sampler,
              f"choose from {', '.join(SAMPLERS)}")  # fmt: skip
        check(self.steps >= 1, "method.steps", self.steps, "must be >= 1")
        check(0 < self.sigma_min < self.sigma_max, "method.sigma_min", self.sigma_min,
              f"must be in (0, sigma_max={self.sigma_max})")  # fmt: skip
        check(self.churn >= 0, "method.churn", self.churn, "must be >= 0")


class EDM(GenerativeModule):
    """Elucidated diffusion model.

    Args:
        cfg: Config whose method is an EDMConfig.
    """

    Config = EDMConfig
    SAMPLE_OPTIONS = {
        "steps": (int, None, "sampling steps"),
        "sampler": (str, None, "heun or euler"),
        "guidance": (float, None, "classifier-free guidance weight, 1 = none"),
        "churn": (float, None, "S_churn, 0 = deterministic"),
    }

    def __init__(self, cfg):
        super().__init__(cfg)
        raw = NETWORKS[cfg.network.name](cfg.network, self.shape, self.classes)
        self.net = Precond(raw, cfg.method.sigma_data)

    def loss(self, batch):
        """Return (L, {"loss": L per element}) with

        L = E_sigma,n [ w(sigma) |D(y + n; sigma) - y|^2 ],  ln sigma ~ N(p_mean, p_std^2),

        summed over pixels, averaged over the batch (equation 2 with the weight of table 1).
        """
        cfg, x, n = self.cfg.method, batch["image"], batch["n"]
        seed, device = self.cfg.seed, x.device
        z = philox_normal((), seed, n, stream=Stream.SIGMA, device=device)
        sigma = (cfg.p_mean + cfg.p_std * z).exp()
        noise = philox_normal(self.shape, seed, n, stream=Stream.NOISE, device=device)
        labels = batch["label"] if self.classes else None
        if labels is not None and cfg.label_dropout and self.training:
            hidden = seeding.uniform(seed, n, Stream.LABEL_DROP) < cfg.label_dropout
            labels = torch.where(hidden, -1, labels)
        denoised = self.net(x + sigma.reshape(-1, 1, 1, 1) * noise, sigma, labels)
        squared = (denoised - x).square().sum(dim=(1, 2, 3))
        loss = (self.net.loss_weight(sigma) * squared).mean()
        return loss, {"loss": loss.detach() / math.prod(self.shape)}

    def denoise(self, x, sigma, labels=None):
        """Return D(x; sigma), the expected clean image, float32 (B, C, H, W).

        Args:
            x: noisy images on the [-1, 1] scale (B, C, H, W).
            sigma: noise level on that scale, a scalar or (B,) tensor.
            labels: int64 (B,), -1 = none.
        """
        return self.net(x, torch.as_tensor(sigma, device=x.device), labels)

    def score(self, x, sigma, labels=None):
        """Return the score of the noisy density, (D(x; sigma) - x) / sigma^2 (equation 3)."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        return (self.denoise(x, sigma, labels) - x) / sigma.reshape(-1, 1, 1, 1) ** 2

    @torch.no_grad()
    def sample(self, seeds, labels=None, *, steps=None, sampler=None, guidance=None, churn=None,
               noise="cpu", callback=None):  # fmt: skip
        """Return generated images in [-1, 1] (not clipped), float32 (N, C, H, W).

        Image k depends on seeds[k] alone, not on the others. Arguments left at None come from the
        model's config.

        Args:
            seeds: N whole numbers.
            labels: classes of a conditional model: None (random), one int, or N ints.
            steps: sampling steps; Heun makes 2 steps - 1 network evaluations.
            sampler: "heun" or "euler".
            guidance: w in D = D_none + w (D_label - D_none); 1 = none.
            churn: S_churn of algorithm 2.
            noise: device of the generators; "cpu" is the same on every machine.
            callback: called as callback(i, x) after each step.

        Raises:
            ValueError: an option out of range, or labels the model does not have.
        """
        cfg = self.cfg.method
        sampler, guidance = sampler or cfg.sampler, cfg.guidance if guidance is None else guidance
        check(sampler in SAMPLERS, "sampler", sampler, f"choose from {', '.join(SAMPLERS)}")
        check(guidance == 1 or self.classes, "guidance", guidance, "this model is unconditional")
        churn = Churn(cfg.churn if churn is None else churn,
                      cfg.churn_min, cfg.churn_max, cfg.churn_noise)  # fmt: skip
        check(churn.amount >= 0, "churn", churn.amount, "must be >= 0")
        generators = seeding.ImageGenerators(seeds, noise)
        latents = generators.randn(self.shape, device=self.device)
        labels = self.image_labels(generators, labels)
        steps = cfg.steps if steps is None else steps
        sigmas = karras_sigmas(steps, cfg.sigma_min, cfg.sigma_max, cfg.rho, self.device)
        self.nfe = 0

        def denoise(x, sigma):
            if guidance == 1:
                self.nfe += 1
                return self.net(x, sigma, labels)
            self.nfe += 2
            both = torch.cat([labels, torch.full_like(labels, -1)])
            with_label, without = self.net(torch.cat([x, x]), sigma, both).chunk(2)
            return without + guidance * (with_label - without)

        def randn(shape, dtype):
            return generators.randn(shape, dtype=dtype, device=self.device)

        x = latents.to(state_dtype(self.device)) * sigmas[0]
        x = SAMPLERS[sampler](denoise, x, sigmas, churn=churn, randn=randn, callback=callback)
        return x.float()
