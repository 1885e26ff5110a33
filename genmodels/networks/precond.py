"""Preconditioning: the denoiser D(x; sigma) around a raw network F, six ways of it.

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)

           c_skip             c_out                 c_in               c_noise
    edm    sd^2/(s^2+sd^2)    s sd/sqrt(s^2+sd^2)   1/sqrt(s^2+sd^2)   ln(s)/4
    vp     1                  -s                    1/sqrt(s^2+1)      999 t(s)
    ve     1                  s                     1                  ln(s/2)
    iddpm  1                  -s                    1/sqrt(s^2+1)      999 - j of the u_j nearest s
    flow   t                  1 - t                 t = 1/(1+s)        time_code(t)
    trig   1/(s^2+1)          2/pi s/sqrt(s^2+1)    1/sqrt(s^2+1)      time_code(t), s = cot(pi t/2)

Reference: Karras et al. 2022, "Elucidating the design space of diffusion-based generative models",
arXiv 2206.00364, table 1 and appendices B.6 (edm) and C (vp, ve, iddpm). Of flow and trig, whose F
is a velocity: genmodels/sampling/interpolant.py.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from genmodels.kernels.broadcast import over_items

__all__ = [
    "IDDPM",
    "PRECONDS",
    "VE",
    "VP",
    "Flow",
    "LogSpace",
    "Precond",
    "TrigFlow",
    "Uncertainty",
    "iddpm_levels",
    "time_code",
]

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]  # c_skip, c_out, c_in, c_noise


class Precond(nn.Module):
    """EDM's preconditioning, and what the four kinds share; all in float32 around F.

    c_in gives F an input of unit variance, c_skip and c_out a target of unit variance with the
    smallest |c_out|: the expected loss of F = 0 is 1 for each element at every sigma.

    Args:
        net: raw network, forward(x, noise, labels, augment).
        sigma_data: standard deviation of the data on the [-1, 1] scale; only edm knows it.
    """

    sigma_min, sigma_max = 0.0, math.inf  # the noise levels the network is trained for

    def __init__(self, net: nn.Module, sigma_data: float = 0.5):
        super().__init__()
        self.net = net
        self.sigma_data = sigma_data

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return (c_skip, c_out, c_in, c_noise), each of sigma's shape; sigma > 0."""
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data * variance.rsqrt()
        c_in = variance.rsqrt()
        c_noise = sigma.log() / 4
        return c_skip, c_out, c_in, c_noise

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Return 1 / c_out^2, the weight of |D - x|^2 that makes all sigma equal at first."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def training_sigma(self, z: Tensor, p_mean: float, p_std: float) -> Tensor:
        """Return the noise levels of training images, of z's shape.

        Args:
            z: standard normals; the kinds with a uniform law use their distribution function.
            p_mean, p_std: ln sigma ~ N(p_mean, p_std^2); only edm has these.
        """
        return (p_mean + p_std * z).exp()

    def known_sigma(self, sigma: Tensor) -> Tensor:
        """Return the nearest noise levels that the network knows, in sigma's dtype."""
        return sigma

    def known_sigma_on_host(self) -> Callable[[Tensor], Tensor]:
        """Return known_sigma for noise levels on the CPU, wherever the network is."""
        return self.known_sigma

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Return the denoised image, float32 (B, C, H, W).

        Args:
            x: noisy image (B, C, H, W) on the [-1, 1] scale of the clean one.
            sigma: noise level on that scale, (B,) or a scalar tensor, > 0.
            labels: int64 (B,), -1 = none; or None.
            augment: (B, 9) augmentation values for networks that take them; or None.
        """
        x, sigma = x.float(), sigma.float().expand(len(x))
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        c_skip, c_out, c_in = (over_items(c, x) for c in (c_skip, c_out, c_in))
        raw = self.net(c_in * x, c_noise, labels, augment)
        return c_skip * x + c_out * raw.float()


class VP(Precond):
    """Variance-preserving diffusion: sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1, t <= 1.

    Trained at t uniform in [1e-5, 1], with the squared error of the noise.
    """

    beta_d, beta_min, first = 19.9, 0.1, 1e-5

    def __init__(self, net: nn.Module, sigma_data: float = 0.5):
        super().__init__(net, sigma_data)
        exponents = [self.beta_d * t**2 / 2 + self.beta_min * t for t in (self.first, 1.0)]
        self.sigma_min, self.sigma_max = (math.sqrt(math.expm1(e)) for e in exponents)

    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise level at time t."""
        return (self.beta_d * t**2 / 2 + self.beta_min * t).expm1().sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        """Return the time of a noise level, the inverse of sigma()."""
        root = self.beta_min**2 + 2 * self.beta_d * (sigma**2).log1p()
        return (root.sqrt() - self.beta_min) / self.beta_d

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return (c_skip, c_out, c_in, c_noise); c_noise is on the scale of 1000 steps."""
        c_in = (sigma**2 + 1).rsqrt()
        return torch.ones_like(sigma), -sigma, c_in, 999 * self.time(sigma)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Return 1 / sigma^2: the squared error of the predicted noise."""
        return 1 / sigma**2

    def training_sigma(
        self, z: Tensor, p_mean: float | None = None, p_std: float | None = None
    ) -> Tensor:
        """Return sigma(t) for t uniform in [1e-5, 1]."""
        return self.sigma(self.first + (1 - self.first) * torch.special.ndtr(z))


class VE(Precond):
    """Variance-exploding diffusion, trained at ln sigma uniform in [ln 0.02, ln 100]."""

    sigma_min, sigma_max = 0.02, 100.0

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return (c_skip, c_out, c_in, c_noise)."""
        one = torch.ones_like(sigma)
        return one, sigma, one, (sigma / 2).log()

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Return 1 / sigma^2: the squared error of the predicted noise."""
        return 1 / sigma**2

    def training_sigma(
        self, z: Tensor, p_mean: float | None = None, p_std: float | None = None
    ) -> Tensor:
        """Return sigma for ln sigma uniform over the range."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** torch.special.ndtr(z)


class IDDPM(Precond):
    """Improved DDPM's 1000 noise levels u_0 > ... > u_999, chosen uniformly in training.

    F predicts the noise; the variance that the original network predicts as well is left out.
    """

    def __init__(self, net: nn.Module, sigma_data: float = 0.5):
        super().__init__(net, sigma_data)
        levels = iddpm_levels()
        self.sigma_min, self.sigma_max = levels[-1], levels[0]
        # Importing released weights replaces the table by theirs, which has rounding errors.
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32))

    def index(self, sigma: Tensor) -> Tensor:
        """Return the index of the nearest level, int64 of sigma's shape."""
        return _nearest(sigma, self.levels)

    def known_sigma(self, sigma: Tensor) -> Tensor:
        """Return the nearest of the levels; 0 stays 0, the end of sampling."""
        return _snapped(sigma, self.levels)

    def known_sigma_on_host(self) -> Callable[[Tensor], Tensor]:
        """Return known_sigma for noise levels on the CPU: the table is read once."""
        levels = self.levels.cpu()
        return lambda sigma: _snapped(sigma, levels)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return (c_skip, c_out, c_in, c_noise); c_noise counts the steps of the forward chain."""
        c_in = (sigma**2 + 1).rsqrt()
        return torch.ones_like(sigma), -sigma, c_in, (999 - self.index(sigma)).to(sigma.dtype)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Return 1 / sigma^2: the squared error of the predicted noise."""
        return 1 / sigma**2

    def training_sigma(
        self, z: Tensor, p_mean: float | None = None, p_std: float | None = None
    ) -> Tensor:
        """Return one of the levels, each as likely."""
        index = (torch.special.ndtr(z) * len(self.levels)).long()
        return self.levels[index.clamp(max=len(self.levels) - 1)]


def _nearest(sigma: Tensor, levels: Tensor) -> Tensor:
    return (sigma.float()[..., None] - levels).abs().argmin(dim=-1)


def _snapped(sigma: Tensor, levels: Tensor) -> Tensor:
    return torch.where(sigma == 0, sigma, levels[_nearest(sigma, levels)].to(sigma.dtype))


def iddpm_levels(count: int = 1000, c1: float = 0.001, c2: float = 0.008) -> list[float]:
    """Return improved DDPM's noise levels u_0 > ... > u_{count - 1} > 0, a list.

    u_count = 0,  u_{j-1}^2 = (u_j^2 + 1) / max(abar(j-1) / abar(j), c1) - 1,
    abar(j) = sin^2(pi/2 j / (count (c2 + 1))); c1 keeps the last step of the chain finite.
    """
    abar = [math.sin(math.pi / 2 * j / count / (c2 + 1)) ** 2 for j in range(count + 1)]
    levels, u = [], 0.0
    for j in range(count, 0, -1):
        u = math.sqrt((u**2 + 1) / max(abar[j - 1] / abar[j], c1) - 1)
        levels.append(u)
    return levels[::-1]


def time_code(t: Tensor) -> Tensor:
    """Return what a network is told of the time t of a flow, of t's shape; finite at both ends.

    ln((1 - t) / t) / 4, which is c_noise of edm for t = 1 / (1 + sigma), bent at t = 0 and 1.
    """
    return ((1 - t + 1e-3) / (t + 1e-3)).log() / 4


class Flow(Precond):
    """F is the velocity E[x_1 - z | x_t] of x_t = t x_1 + (1 - t) z, seen at sigma = (1 - t) / t.

    Trained at t uniform in [0.001, 0.999], with the squared error of the velocity.
    """

    ends = 1e-3
    sigma_min, sigma_max = ends / (1 - ends), (1 - ends) / ends

    def time(self, sigma: Tensor) -> Tensor:
        """Return the time of a noise level."""
        return 1 / (1 + sigma)

    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise level at time t, the inverse of time()."""
        return (1 - t) / t

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return (c_skip, c_out, c_in, c_noise)."""
        t = self.time(sigma)
        return t, sigma * t, t, time_code(t)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Return 1 / c_out^2: the squared error of F."""
        return 1 / self.coefficients(sigma)[1] ** 2

    def training_sigma(
        self, z: Tensor, p_mean: float | None = None, p_std: float | None = None
    ) -> Tensor:
        """Return sigma at t uniform between the ends."""
        return self.sigma(self.ends + (1 - 2 * self.ends) * torch.special.ndtr(z))


class TrigFlow(Flow):
    """The same of x_t = sin(pi t / 2) x_1 + cos(pi t / 2) z, seen at sigma = cot(pi t / 2)."""

    sigma_min, sigma_max = (math.tan(math.pi / 2 * t) for t in (Flow.ends, 1 - Flow.ends))

    def time(self, sigma: Tensor) -> Tensor:
        """Return the time of a noise level."""
        return (1 / sigma).atan() * 2 / math.pi

    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise level at time t."""
        return 1 / (math.pi / 2 * t).tan()

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return (c_skip, c_out, c_in, c_noise)."""
        c_in = (sigma**2 + 1).rsqrt()
        return c_in**2, 2 / math.pi * sigma * c_in, c_in, time_code(self.time(sigma))


class LogSpace(Precond):
    """EDM's preconditioning for y = log x, with its mean taken off first.

    D(y; sigma) = mean + c_skip (y - mean) + c_out F(c_in (y - mean); c_noise): what F sees and what
    it has to give have unit variance. `mean` and `sigma_data` are buffers, fitted to log x of the
    training data, so that they travel with the weights.
    """

    def __init__(self, net: nn.Module):
        nn.Module.__init__(self)
        self.net = net
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("sigma_data", torch.ones(()))

    def forward(self, y: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return E[log x_0 | y], float32 (B, C, H, W); arguments as for Precond.forward."""
        return self.mean + super().forward(y.float() - self.mean, sigma, labels)


class Uncertainty(nn.Module):
    """Learned log-variance u(sigma) of the loss, (B,): L = w e^-u |D - y|^2 + u for each element.

    At its optimum e^u is the expected loss at this sigma, so that every noise level ends up with
    the same weight. A linear map of 128 random Fourier features of ln(sigma) / 4; u = 0 at first.

    Reference: Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion
    models", arXiv 2312.02696, equations 14 and 15 (Kendall et al. 2018).
    """

    def __init__(self, features: int = 128):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features))
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, log_sigma: Tensor) -> Tensor:
        """Return u, float32 (B,), for log_sigma = ln(sigma) / 4, (B,)."""
        waves = (log_sigma[:, None].float() * self.frequencies + self.phases).cos()
        return math.sqrt(2 / len(self.weight)) * (waves * self.weight).sum(dim=1)


PRECONDS = {
    "edm": Precond,
    "vp": VP,
    "ve": VE,
    "iddpm": IDDPM,
    "flow": Flow,
    "trig": TrigFlow,
}
