"""MECO: maximum likelihood of an energy whose normaliser is an expectation, tracked on the way.

    log p(x) = log f(x) - log Z,    Z = E_q[ w ],  w = f(x~) / q(x~),  x~ from a noise density q
    L = -E_data[ log f ] + log Z    a composition: the log of a mean
    u <- (1 - beta) u + beta mean(w over the batch)                         the tracked Z
    gradient  -mean grad log f + mean grad w / u

A batch alone, beta = 1, has a biased log of its mean (Jensen): where w varies much, so is the
gradient. log f is a network's f, or with tilt=true log q + f: then q is what f bends, and w = e^f.
q is a Gaussian fitted to the data or a flow that learns beside it; it must reach wherever f does:
`ess`, the share (mean w)^2 / mean w^2 of the draws that count, says how far it does. At images of
some size no q does, and log Z is then a lower bound in all but name.

Reference: Jiang, Qin, Wu, Chen, Yang and Zhang 2023, "Learning unnormalized statistical models via
compositional optimization", ICML, arXiv 2306.07485.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from genmodels import config, images, seeding
from genmodels.config import Section, check, setting, settings_of
from genmodels.kernels.philox import philox_normal
from genmodels.methods.base import Batch, Callback, GenerativeModule, Labels
from genmodels.networks import NETWORKS
from genmodels.networks.coupling_flow import CouplingFlow
from genmodels.networks.prior import GaussianPrior
from genmodels.sampling.langevin import acceptance_line, mala_chain
from genmodels.sampling.posterior import Measured, langevin
from genmodels.seeding import Stream

if TYPE_CHECKING:
    from genmodels.data import ImageDataModule

SAMPLING = ("steps", "step")
FIRST = 4096  # draws that the tracked Z begins with


@dataclass
class MECOConfig(Section):
    """MECO, compositional maximum likelihood of an energy (Jiang et al. 2023, arXiv 2306.07485)."""

    PREFIX = "method."

    name: str = setting("meco", "")
    noise: str = setting(
        "gaussian",
        "density q that Z is a mean over: fitted to the data, or learning with it",
        choices=("gaussian", "flow"),
    )
    noise_scale: float = setting(
        1.5, "noise=gaussian: its standard deviations over those of the data", gt=0, lt=math.inf
    )
    flow_layers: int = setting(6, "noise=flow: its couplings", ge=1)
    flow_width: int = setting(64, "noise=flow: their hidden units", ge=1)
    smoothing: float = setting(
        0.0, "standard deviation of noise on the data, which gives flat ones a density", ge=0
    )
    tilt: bool = setting(True, "log f is log q + the network, and not the network alone")
    draws: int = setting(4, "draws of q for each image of a batch", ge=1)
    beta: float = setting(
        0.1, "share of the newest batch in the tracked Z; 1: no other", gt=0, le=1
    )
    steps: int = setting(200, "sampling: steps of a chain from q", ge=1)
    step: float = setting(0.01, "sampling: their size, of noise sqrt(2 step)", gt=0, lt=math.inf)


@dataclass
class ImportanceOptions(Section):
    """What log_prob() takes."""

    draws: int = setting(20_000, "draws of q that Z is the mean over", ge=2)


class Normaliser(NamedTuple):
    """log Z as the mean of `draws` weights; its standard error in nats; the share that counts."""

    log_z: float
    stderr: float
    ess: float
    draws: int


class MECO(GenerativeModule):
    """Compositional maximum likelihood of an energy; cfg.method is a MECOConfig."""

    Config = MECOConfig
    ENERGY = True
    BY_PROCESS = ("the tracked normaliser",)
    SAMPLE_OPTIONS = settings_of(MECOConfig, *SAMPLING)
    LIKELIHOODS = ("importance",)
    LIKELIHOOD_OPTIONS = settings_of(ImportanceOptions)
    OOD_SCORES = True
    SOLVERS = ("langevin",)

    def __init__(self, cfg: config.Config) -> None:
        super().__init__(cfg)
        method = cfg.method
        check(
            not cfg.data.labels, "data.labels", "true", "meco has one Z for all images; use false"
        )
        of_noise = {"noise_scale": "gaussian", "flow_layers": "flow", "flow_width": "flow"}
        for name, noise in of_noise.items():
            same = getattr(method, name) == MECOConfig.__dataclass_fields__[name].default
            method.check(same or method.noise == noise, name, f"goes with method.noise={noise}")
        self.net = NETWORKS[cfg.network.name](cfg.network, self.shape, 0)
        if method.noise == "flow":
            self.noise = CouplingFlow(self.shape, method.flow_layers, method.flow_width)
        else:
            self.noise = GaussianPrior("full", self.shape)
        self.register_buffer("log_u", torch.zeros((), dtype=torch.float64))  # the tracked log Z
        self.log_z: dict[tuple, Normaliser] = {}  # that normaliser() has made

    # --------------------------------------------------------------------------------------------
    # Training

    def prepare(self, data: "ImageDataModule") -> str:
        """Fit q to the training images and begin u with many draws; return words about it."""
        pixels = data.train[0]
        if not isinstance(pixels, Tensor):
            pixels = pixels[:: -(-len(pixels) // 20_000)]
        x = pixels if pixels.is_floating_point() else images.from_uint8(pixels)
        x = x.flatten(1).double().cpu()
        mean, covariance = x.mean(dim=0), x.T.cov()
        variance = self.cfg.method.smoothing**2
        covariance = covariance + variance * torch.eye(len(mean), dtype=torch.float64)
        self.cfg.data.check(
            float(torch.linalg.eigvalsh(covariance)[0]) > 1e-8,
            "name",
            "some pixels never change, or as others do, so that there is no density; give "
            "method.smoothing=0.1",
        )
        scale = 1.0 if self.cfg.method.noise == "flow" else self.cfg.method.noise_scale
        self.fit_noise(mean, scale**2 * covariance)
        with torch.no_grad():
            keys = seeding.keys(self.cfg.seed, torch.arange(FIRST), Stream.SOURCE)
            log_w = self._log_weights(keys)
            self.log_u.copy_(torch.logsumexp(log_w, 0) - math.log(len(log_w)))
        return f"noise density {self.cfg.method.noise}: log Z {float(self.log_u):.3f} at first"

    def fit_noise(self, mean: Tensor, covariance: Tensor) -> None:
        """Give q these moments, float64 (D,) and (D, D); a flow begins at their diagonal."""
        if self.cfg.method.noise == "flow":
            self.noise.fit(mean, covariance.diag())
        else:
            self.noise.fit(mean, covariance)
            # What lies beside a whole basis has no weight; 0 would be divided by.
            self.noise.rest.fill_(float(covariance.diag().mean()))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (surrogate whose gradient is MECO's, {"loss": -mean log f + log u in nats, ...}).

        Logged are also log u and the share of the draws that count. With noise=flow the negative
        log-likelihood of q itself is added, in which the energy has no part.
        """
        batch = self.as_batch(batch)
        x, n, method = batch["image"], batch["n"], self.cfg.method
        if method.smoothing:
            noise = philox_normal(
                self.shape, self.cfg.seed, n, stream=int(Stream.PAIR), device=x.device
            )
            x = x + method.smoothing * noise
        keys = seeding.keys(self.cfg.seed, n, Stream.NOISE)
        log_w = self._log_weights(keys, method.draws)
        newest = (torch.logsumexp(log_w, 0) - math.log(len(log_w))).detach()
        if self.training:
            new = newest
            if method.beta < 1:
                old = math.log1p(-method.beta) + self.log_u
                new = torch.logaddexp(old, math.log(method.beta) + newest)
            self.log_u.copy_(new)
        log_f = self.log_f(x)
        loss = -log_f.mean() + (log_w - self.log_u).exp().mean()
        logs = {
            "loss": (self.log_u - log_f.double().mean()).detach().float(),
            "log_z": self.log_u.detach().float(),
            "ess": effective_share(log_w.detach()).float(),
        }
        if method.noise == "flow":
            own = -self.noise.log_prob(x).mean()
            loss, logs["loss_noise"] = loss + own, own.detach()
        return loss.float(), logs

    def log_f(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return log f(x), (B,) in `dtype`, HIGHER = likelier; q has no gradient."""
        level = torch.zeros(len(x), device=x.device)
        value = self.net(x.float(), level, None, dtype=dtype)
        return value + self._log_q(x).to(dtype) if self.cfg.method.tilt else value

    def _log_q(self, x: Tensor) -> Tensor:
        """Return log q(x), (B,), without a gradient to q's own parameters."""
        if self.cfg.method.noise == "gaussian":
            return self.noise.log_prob(x, 0.0)
        parameters = {name: p.detach() for name, p in self.noise.named_parameters()}
        call = torch.func.functional_call
        return call(_Density(self.noise), {f"flow.{k}": v for k, v in parameters.items()}, (x,))

    @torch.no_grad()
    def draw(self, keys: Tensor, count: int = 1) -> Tensor:
        """Return `count` draws of q for each key, float32 (count B, C, H, W)."""
        stream, device = int(Stream.CHAIN_START), keys.device
        rows = [
            philox_normal(self.shape, keys, k, stream=stream, device=device) for k in range(count)
        ]
        z = torch.cat(rows)
        flow = self.cfg.method.noise == "flow"
        return self.noise.sample(z) if flow else self.noise.sample(z, 0.0)

    def _log_weights(self, keys: Tensor, count: int = 1) -> Tensor:
        """Return log f - log q of draws of q, float64 (count B,), with a gradient to f."""
        x = self.draw(keys.to(self.device), count)
        level = torch.zeros(len(x), device=x.device)
        log_w = self.net(x, level, None, dtype=torch.float64)
        if not self.cfg.method.tilt:
            log_w = log_w - self._log_q(x).double()
        return log_w

    # --------------------------------------------------------------------------------------------
    # What is known of the density

    @torch.no_grad()
    def normaliser(self, draws: int = 20_000) -> Normaliser:
        """Return log Z of the weights as they are, from this many draws of q."""
        key = (draws, *(p._version for p in self.parameters()))
        if key not in self.log_z:
            parts = [self._log_weights(part) for part in torch.arange(draws).split(2048)]
            log_w = torch.cat(parts)
            share = float(effective_share(log_w))
            log_z = float(torch.logsumexp(log_w, 0)) - math.log(draws)
            error = math.sqrt(max(1 / share - 1, 0.0) / draws)  # of log Z, by the delta method
            self.log_z = {key: Normaliser(log_z, error, share, draws)}
        return self.log_z[key]

    @torch.no_grad()
    def log_prob(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        kind: str = "importance",
        seeds: Tensor | Sequence[int],
        **options: Any,
    ) -> Tensor:
        """Return log f(x) - log Z in nats, float64 (B,); Z is a mean over draws of q.

        log Z so found is too small on average, and the more so the fewer draws count (`ess` of
        normaliser()): log p is then too large. Arguments as for base.log_prob.

        Raises:
            ValueError: another kind, labels.
        """
        check(kind in self.LIKELIHOODS, "kind", kind, f"choose from {', '.join(self.LIKELIHOODS)}")
        self.check_labels(labels)
        given = {k: v for k, v in options.items() if v is not None}
        draws = ImportanceOptions(**given).draws
        return self.log_f(x, torch.float64) - self.normaliser(draws).log_z

    @torch.no_grad()
    def energy(self, x: Tensor) -> Tensor:
        """Return E = -log f, LOWER = likelier, float64 (B,), of images in [-1, 1]."""
        self.check_finite(x)
        return -self.log_f(x, torch.float64)

    @torch.no_grad()
    def ood_scores(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return {name: float32 (B,)}, HIGHER = more like the training data: log f, and log q."""
        self.check_labels(labels)
        self.check_finite(x)
        return {"f": self.log_f(x, torch.float64).float(), "noise": self._log_q(x).float()}

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
        """Return generated images in [-1, 1] (not clipped), float32 (N, C, H, W).

        Each is the end of a Metropolis-adjusted Langevin chain on f that begins at a draw of q;
        image k depends on seeds[k] alone.

        Args:
            seeds: N whole numbers.
            labels: None; the model is unconditional.
            noise: unused: chains draw the same everywhere.
            callback: called as callback(i, x) after each step.
            options: see SAMPLE_OPTIONS; those left at None come from the model's config.

        Raises:
            ValueError: an option out of range, labels.
        """
        cfg = self.method_with(options, SAMPLING)
        self.image_labels(seeding.ImageGenerators(seeds, noise), labels)
        keys = torch.tensor(seeding.checked_seeds(seeds), dtype=torch.int64, device=self.device)
        chain = mala_chain(
            lambda y: -self.log_f(y),
            self.draw(keys),
            steps=cfg.steps,
            step=cfg.step,
            seed=keys,
            stream=int(Stream.CHAIN),
            freeze=(self.net, self.noise),
            callback=callback,
            diagnostics=False,
        )
        self.nfe = cfg.steps + 1
        self.chains = acceptance_line(chain.accepted)
        return chain.y

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

        Chains as in sample(), from draws of q that are pulled to y; their step is method.step, of
        which a small noise of y wants a part. See GenerativeModule.posterior.
        """
        start = measured.pulled(self.draw(keys), measured.fresh(keys))
        chain = langevin(
            lambda x: -self.log_f(x, torch.float64),
            measured,
            start,
            steps=steps,
            step=step * self.cfg.method.step,
            seed=keys,
            stream=int(Stream.CHAIN),
            freeze=(self.net, self.noise),
            callback=callback,
            accumulate=torch.float64,
        )
        self.nfe = steps + 1
        self.chains = acceptance_line(chain.accepted)
        return chain.y


class _Density(torch.nn.Module):
    """log q of a flow as a module's forward, to be called with other parameters."""

    def __init__(self, flow: CouplingFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        """Return log q(x), (B,)."""
        return self.flow.log_prob(x)


def effective_share(log_w: Tensor) -> Tensor:
    """Return (mean w)^2 / mean w^2 of weights (N,), in (0, 1]: the share of draws that count."""
    total = torch.logsumexp(log_w, 0)
    return (2 * total - torch.logsumexp(2 * log_w, 0)).exp() / len(log_w)
