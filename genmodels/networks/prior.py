"""The law that sampling starts from: a Gaussian in log space with moments fitted to the data."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PRIORS", "GaussianPrior", "fit_to_images", "log_moments", "mixture_divergence"]

PRIORS = ("lognormal", "lowrank", "full")


class GaussianPrior(nn.Module):
    """N(mean, U diag(variance) U^T + rest (I - U U^T) + S I) of y = log x at noise variance S.

    `lognormal` has no U and one mean and variance for each channel: all pixels alike, as in the
    paper. `lowrank` keeps the mean image and `rank` principal components, `full` all of them.
    The moments are buffers: they are saved with the weights.

    Args:
        kind: lognormal, lowrank or full.
        shape: (C, H, W).
        rank: principal components of lowrank.
    """

    def __init__(self, kind: str, shape: Sequence[int], rank: int = 64):
        super().__init__()
        size = math.prod(shape)
        self.kind = kind
        self.shape = tuple(shape)
        self.rank = {"lognormal": 0, "lowrank": min(rank, size - 1), "full": size}[kind]
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("rest", torch.ones(shape[0], 1, 1))  # lowrank: the same in each
        self.register_buffer("basis", torch.eye(size, self.rank))
        self.register_buffer("variance", torch.ones(self.rank))

    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Take the moments of log x over the data: mean (D,), covariance (D, D), float64."""
        channels = self.shape[0]
        if self.rank == 0:
            pooled = mean.reshape(channels, -1)
            rest = (covariance.diag().reshape(channels, -1) + pooled**2).mean(1)
            mean = pooled.mean(1)
            self.mean.copy_(mean.reshape(-1, 1, 1).expand(self.shape))
            self.rest.copy_((rest - mean**2).reshape(-1, 1, 1))
            return
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp(min=0)
        kept, left = values[-self.rank :], values[: len(values) - self.rank]
        # eigh leaves signs open: fix them, so that a seed gives the same image everywhere.
        vectors = vectors[:, -self.rank :]
        largest = vectors.gather(0, vectors.abs().argmax(0)[None])
        self.mean.copy_(mean.reshape(self.shape))
        self.basis.copy_(vectors * largest.sign())
        self.variance.copy_(kept)
        self.rest.fill_(float(left.mean()) if len(left) else 0.0)

    def sample(self, z: Tensor, noise_variance: float) -> Tensor:
        """Return y, float32, for standard normals z (B, C, H, W) at this variance of the noise."""
        # Summed in double, so that what an image gets does not depend on the batch's blocking.
        kind = torch.float32 if z.device.type == "mps" else torch.float64
        z, basis = z.to(kind), self.basis.to(kind)
        across = (self.rest.to(kind) + noise_variance).sqrt()
        along = (self.variance.to(kind) + noise_variance).sqrt()
        more = (z.flatten(1) @ basis) * (along - across.flatten()[0])
        return (self.mean + across * z + (more @ basis.T).reshape(z.shape)).float()

    def log_prob(self, y: Tensor, noise_variance: float) -> Tensor:
        """Return the log density of y (B, C, H, W) at this variance S, float64 (B,)."""
        y, basis = y.double() - self.mean.double(), self.basis.double()
        across = self.rest.double() + noise_variance
        along = self.variance.double() + noise_variance
        projected = y.flatten(1) @ basis
        square = (y**2 / across).flatten(1).sum(1)
        square = square + (projected**2 * (1 / along - 1 / across.flatten()[0])).sum(1)
        logdet = across.expand(self.shape).log().sum() + (along / across.flatten()[0]).log().sum()
        return -0.5 * (square + logdet + math.prod(self.shape) * math.log(2 * math.pi))

    def divergence_of(self, y: Tensor, noise_variance: float) -> Tensor:
        """Return KL(N(y, S I) || this at S) in nats, float64 (B,), for y (B, C, H, W)."""
        size, across = math.prod(self.shape), self.rest.double() + noise_variance
        along = 1 / (self.variance.double() + noise_variance) - 1 / across.flatten()[0]
        trace = (1 / across).expand(self.shape).sum() + along.sum()
        constant = size * (1 + math.log(2 * math.pi * noise_variance))
        return 0.5 * (noise_variance * trace - constant) - self.log_prob(y, noise_variance)

    def divergence_from(self, mean: Tensor, covariance: Tensor, noise_variance: float) -> float:
        """Return KL(N(mean, covariance + S I) || this at S) in nats; float64 arguments."""
        noise = noise_variance * torch.eye(len(mean), dtype=torch.float64)
        basis = self.basis.double().cpu()
        rest = self.rest.double().cpu().expand(self.shape).flatten()
        # rest (I - U U^T) for one rest; lognormal has no U.
        along = basis @ torch.diag(self.variance.double().cpu() - rest[0]) @ basis.T
        ours = torch.distributions.MultivariateNormal(
            self.mean.double().cpu().flatten(), along + torch.diag(rest) + noise
        )
        theirs = torch.distributions.MultivariateNormal(mean, covariance + noise)
        return float(torch.distributions.kl_divergence(theirs, ours))


def log_moments(pixels: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean (D,), covariance (D, D)) of log x over uint8 images (N, C, H, W), float64.

    Args:
        pixels: the training images.
        table: float64 (256,), log x of each grey level.
    """
    size = pixels[0].numel()
    total = torch.zeros(size, dtype=torch.float64)
    square = torch.zeros(size, size, dtype=torch.float64)
    center = table.mean()  # keeps the squares small
    for part in pixels.cpu().flatten(1).split(4096):
        y = table[part.long()] - center
        total += y.sum(0)
        square += y.T @ y
    mean = total / len(pixels)
    return mean + center, square / len(pixels) - torch.outer(mean, mean)


def mixture_divergence(
    prior: GaussianPrior, pixels: Tensor, table: Tensor, noise_variance: float, num: int = 256
) -> tuple[float, float]:
    """Return (KL(p_T || prior) in nats, its standard error); p_T: the noised training images.

    Monte Carlo over `num` draws of p_T = mean over the images of N(log x, S I), S the
    variance of the noise.
    """
    generator = torch.Generator().manual_seed(0)
    pick = torch.randperm(len(pixels), generator=generator)[:num]
    clean = table[pixels[pick].cpu().long()]
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    y = clean + math.sqrt(noise_variance) * noise
    rows, parts = y.flatten(1), []
    for part in pixels.cpu().flatten(1).split(4096):
        distance = torch.cdist(rows, table[part.long()]).square()
        parts.append(torch.logsumexp(-distance / (2 * noise_variance), dim=1))
    log_p = torch.logsumexp(torch.stack(parts), dim=0) - math.log(len(pixels))
    log_p -= rows.shape[1] / 2 * math.log(2 * math.pi * noise_variance)
    gain = log_p - prior.log_prob(y, noise_variance).cpu()
    return float(gain.mean()), float(gain.std() / len(gain) ** 0.5)


def fit_to_images(
    prior: GaussianPrior, pixels: Any, offset: float, noise_variance: float, flip: bool = False
) -> dict[str, float]:
    """Return {mean, std, kl_gaussian, kl, kl_stderr} of a prior after fitting it to images.

    mean and std are of log x = log(pixel / 255 + offset) over all pixels; kl_gaussian is
    KL(p_T || prior) in nats at `noise_variance` with p_T taken as Gaussian; kl and kl_stderr the
    same with p_T = the noised images, by Monte Carlo.

    Args:
        prior: fitted in place.
        pixels: uint8 images (N, C, H, W); of those that stay on disk some 20,000 are read, evenly
            spaced.
        offset: added to the pixels in [0, 1].
        noise_variance: S, at which the two are compared.
        flip: whether mirrored images count as well.

    Raises:
        ValueError: pixels that are not uint8.
    """
    if pixels.dtype != torch.uint8:
        raise ValueError("method.name=gbm: models images of 8 bits; train another method on points")
    if not isinstance(pixels, torch.Tensor):
        pixels = pixels[:: -(-len(pixels) // 20_000)]
    pixels = torch.cat([pixels, pixels.flip(-1)]) if flip else pixels
    table = (torch.arange(256, dtype=torch.float64) / 255 + offset).log()
    mean, covariance = log_moments(pixels, table)
    prior.fit(mean, covariance)
    center = float(mean.mean())
    spread = float((covariance.diag() + (mean - center) ** 2).mean().sqrt())
    gaussian = prior.divergence_from(mean, covariance, noise_variance)
    sampled, stderr = mixture_divergence(prior, pixels, table, noise_variance)
    return {
        "mean": center,
        "std": spread,
        "kl_gaussian": gaussian,
        "kl": sampled,
        "kl_stderr": stderr,
    }
