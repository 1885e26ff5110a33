"""The law that sampling starts from: a Gaussian in log space with moments fitted to the data."""

import math

import torch
from torch import nn

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

    def __init__(self, kind, shape, rank=64):
        super().__init__()
        size = math.prod(shape)
        self.kind, self.shape = kind, tuple(shape)
        self.rank = {"lognormal": 0, "lowrank": min(rank, size - 1), "full": size}[kind]
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("rest", torch.ones(shape[0], 1, 1))  # lowrank: the same in each
        self.register_buffer("basis", torch.eye(size, self.rank))
        self.register_buffer("variance", torch.ones(self.rank))

    def fit(self, mean, covariance):
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

    def sample(self, z, level):
        """Return y, float32, for standard normals z (B, C, H, W) at noise variance `level`."""
        # Summed in double, so that what an image gets does not depend on the batch's blocking.
        kind = torch.float32 if z.device.type == "mps" else torch.float64
        z, basis = z.to(kind), self.basis.to(kind)
        wide, own = (self.rest.to(kind) + level).sqrt(), (self.variance.to(kind) + level).sqrt()
        along = (z.flatten(1) @ basis) * (own - wide.flatten()[0])
        return (self.mean + wide * z + (along @ basis.T).reshape(z.shape)).float()

    def log_prob(self, y, level):
        """Return the log density of y (B, C, H, W) at noise variance `level`, float64 (B,)."""
        y, basis = y.double() - self.mean.double(), self.basis.double()
        wide, own = self.rest.double() + level, self.variance.double() + level
        along = y.flatten(1) @ basis
        square = (y**2 / wide).flatten(1).sum(1)
        square = square + (along**2 * (1 / own - 1 / wide.flatten()[0])).sum(1)
        logdet = wide.expand(self.shape).log().sum() + (own / wide.flatten()[0]).log().sum()
        return -0.5 * (square + logdet + math.prod(self.shape) * math.log(2 * math.pi))

    def divergence_of(self, y, level):
        """Return KL(N(y, S I) || this) in nats, float64 (B,), for y (B, C, H, W); S = level."""
        size, wide = math.prod(self.shape), self.rest.double() + level
        own = 1 / (self.variance.double() + level) - 1 / wide.flatten()[0]
        trace = (1 / wide).expand(self.shape).sum() + own.sum()
        constant = size * (1 + math.log(2 * math.pi * level))
        return 0.5 * (level * trace - constant) - self.log_prob(y, level)

    def divergence_from(self, mean, covariance, level):
        """Return KL(N(mean, covariance + S I) || this) in nats, a float; S = level, float64."""
        noise = level * torch.eye(len(mean), dtype=torch.float64)
        basis = self.basis.double().cpu()
        rest = self.rest.double().cpu().expand(self.shape).flatten()
        # rest (I - U U^T) for one rest; lognormal has no U.
        own = basis @ torch.diag(self.variance.double().cpu() - rest[0]) @ basis.T
        ours = torch.distributions.MultivariateNormal(
            self.mean.double().cpu().flatten(), own + torch.diag(rest) + noise
        )
        theirs = torch.distributions.MultivariateNormal(mean, covariance + noise)
        return float(torch.distributions.kl_divergence(theirs, ours))


def log_moments(pixels, table):
    """Return (mean (D,), covariance (D, D)) of log x over uint8 images (N, C, H, W), float64.

    Args:
        pixels: the training images.
        table: float64 (256,), log x of each level.
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


def mixture_divergence(prior, pixels, table, level, num=256):
    """Return (KL(p_T || prior) in nats, its standard error); p_T: the noised training images.

    Monte Carlo over `num` draws of p_T = mean over the images of N(log x, S I), S = level.
    """
    generator = torch.Generator().manual_seed(0)
    pick = torch.randperm(len(pixels), generator=generator)[:num]
    clean = table[pixels[pick].cpu().long()]
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    y = clean + math.sqrt(level) * noise
    rows, parts = y.flatten(1), []
    for part in pixels.cpu().flatten(1).split(4096):
        distance = torch.cdist(rows, table[part.long()]).square()
        parts.append(torch.logsumexp(-distance / (2 * level), dim=1))
    own = torch.logsumexp(torch.stack(parts), dim=0) - math.log(len(pixels))
    own -= rows.shape[1] / 2 * math.log(2 * math.pi * level)
    gain = own - prior.log_prob(y, level).cpu()
    return float(gain.mean()), float(gain.std() / len(gain) ** 0.5)


def fit_to_images(prior, pixels, offset, level, flip=False):
    """Fit a prior to log(pixel / 255 + offset) of uint8 images (N, C, H, W), and mirrored ones.

    Of images that stay on disk some 20,000 are read, evenly spaced.

    Returns a dict: mean and std of log x over all pixels; kl_gaussian, KL(p_T || prior) in nats at
    noise variance `level` with p_T taken as Gaussian; kl and kl_stderr, the same with p_T = the
    noised images, by Monte Carlo.

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
    gaussian = prior.divergence_from(mean, covariance, level)
    sampled, stderr = mixture_divergence(prior, pixels, table, level)
    return {
        "mean": center,
        "std": spread,
        "kl_gaussian": gaussian,
        "kl": sampled,
        "kl_stderr": stderr,
    }
