"""Noise2Score: restore noisy pictures with the score of noisy pictures alone.

    y        noisy pixels on [0, 1], not clipped; x the clean ones; s(y) = grad_y log p(y)
    w        y where its noise is nearly even: y, sqrt or log of it (noise/laws.py); deviation sigma
    z        w + sigma_a u,  u ~ N(0, I),  t = sigma^2 + sigma_a^2
    learned  AR-DAE: E |u + sigma_a s(z; t)|^2, least at the score;  s(z; t) = -F(z; t) / sqrt(t)
    restored x = the law's estimate from y and s(y), e.g. y + sigma^2 s for Gaussian noise

F is the noise in z in units of its deviation: of order one, whatever the level. Under Gaussian
noise w - sqrt(t) F is E[x | z] exactly; the network is told t, so that what perturbed pictures
teach holds for unperturbed ones, at t = sigma^2.

References: Kim and Ye 2021, arXiv 2106.07009 (Noise2Score); Lim et al. 2020, arXiv 2006.05164
(AR-DAE). Baselines: Lehtinen et al. 2018, arXiv 1803.04189 (Noise2Noise); Pang et al. 2021, arXiv
2102.02234 (Recorrupted-to-Recorrupted); the others are in self_supervised.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from genmodels import config, seeding
from genmodels.config import Section, check, setting
from genmodels.kernels.broadcast import over_items
from genmodels.kernels.philox import philox_normal, philox_uniform
from genmodels.methods.base import Batch, GenerativeModule, Labels
from genmodels.methods.self_supervised import REACH, blind_spots, divergence, neighbours
from genmodels.networks import NETWORKS
from genmodels.noise import LAWS, law_of
from genmodels.noise.levels import level_from_patches
from genmodels.noise.poisson_gaussian import Blocks, PoissonGaussian, fit_line
from genmodels.noise.stabilise import CAMERA, UNITS, contrast, stabilised

if TYPE_CHECKING:
    from genmodels.data.patches import NoisyDataModule

# What each objective learns from: data.noise.target.
TARGETS = {
    "score": "none",
    "r2r": "none",
    "noise2noise": "second",
    "supervised": "clean",
    "noise2void": "none",
    "neighbor2neighbor": "none",
    "sure": "none",
    "unsure": "none",
    "gr2r": "none",
}
AVERAGES = ("r2r", "sure", "unsure")  # they are about w, in which the noise must be Gaussian
# What numpy's generators of [seed, n, draw] draw; genmodels/data/patches.py has those before.
SPLIT, RESTORED = 5, 6
BEYOND = 0.5  # how far pixels may lie beyond black and white before they are kept from the network
VIEWS = {
    "fixed": "strict: one fixed noisy copy of each picture",
    "fresh": "new noise on clean pictures for every patch",
    "given": "the pictures' own noise",
}


def _runs(values: Sequence[Any]) -> list[tuple[Any, slice]]:
    """Return [(value, slice of its neighbours that are equal)]."""
    starts = [k for k in range(len(values)) if not k or values[k] != values[k - 1]]
    return [(values[i], slice(i, j)) for i, j in zip(starts, [*starts[1:], len(values)])]


@dataclass
class Noise2ScoreConfig(Section):
    """Noise2Score (arXiv 2106.07009) and its baselines."""

    PREFIX = "method."

    name: str = setting("noise2score", "")
    objective: str = setting(
        "score", "what is learned (all but score are baselines)", choices=tuple(TARGETS)
    )
    form: str = setting(
        "scaled",
        "scaled: sigma_a in units of the noise, F = -sqrt(t) s; "
        "published: sigma_a on [0, 1], and the network is s",
        choices=("scaled", "published"),
    )
    sigma_a_min: float = setting(0.0, "smallest perturbation; 0: 0.25, for poisson 0.6", ge=0)
    sigma_a_max: float = setting(
        1.0, "largest perturbation of the noisiest; r2r: the one it uses", gt=0
    )
    anneal: int = setting(
        0, "images over which sigma_a falls evenly; 0: drawn at random, in log", ge=0
    )
    drawn: str = setting(
        "sigma_a",
        "what is even in log then: sigma_a, or t: the noise with the perturbation",
        choices=("sigma_a", "t"),
    )
    domain: str = setting(
        "even",
        "even: w, where the noise is even; pixels: y itself (published)",
        choices=("even", "pixels"),
    )
    estimator: str = setting(
        "law",
        "law: the paper's; corrected: second order (poisson, gamma)",
        choices=("law", "corrected"),
    )
    probes: int = setting(
        8, "draws averaged: of signs for estimator=corrected, of the noise for r2r and gr2r", ge=1
    )
    share: float = setting(
        0.15, "gr2r: how much of a noisy picture the independent target takes", gt=0, lt=1
    )
    gamma: float = setting(
        2.0, "neighbor2neighbor: weight of the second term, reached evenly at max_steps", ge=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(
            self.sigma_a_min <= self.sigma_a_max,
            "sigma_a_min",
            f"must be in [0, sigma_a_max={self.sigma_a_max}]",
        )
        self.check(
            self.form == "scaled" or self.objective == "score",
            "form",
            "goes with objective=score only",
        )
        self.check(
            self.drawn == "sigma_a"
            or (self.objective == "score" and self.form == "scaled" and not self.anneal),
            "drawn",
            "goes with objective=score, form=scaled and anneal=0 only",
        )
        for key, objective, default in (
            ("share", "gr2r", 0.15),
            ("gamma", "neighbor2neighbor", 2.0),
        ):
            self.check(
                self.objective == objective or getattr(self, key) == default,
                key,
                f"goes with objective={objective} only",
            )


class Noise2Score(GenerativeModule):
    """Restores noisy pictures of any size; cfg.method is a Noise2ScoreConfig."""

    Config = Noise2ScoreConfig
    OF_WEIGHTS = ("form", "domain")
    ANY_SIZE = True  # DENOISE_LAWS and ESTIMATORS depend on the law it is trained on: __init__

    def __init__(self, cfg: config.Config) -> None:
        super().__init__(cfg)
        noise, method = cfg.data.noise, cfg.method
        self.law = law_of(noise)
        wanted = TARGETS[method.objective]
        noise.check(
            noise.target == wanted,
            "target",
            f"method.objective={method.objective} learns from {wanted}",
        )
        cfg.eval.check(
            not cfg.eval.every,
            "every",
            "scores generated images, of which it makes none; take eval.loss_every",
        )
        self.sigma_a_min = self.least_perturbation(max(self.configured_levels()))
        # Other noise is made Gaussian of one level, which a model of Gaussian noise restores.
        self.DENOISE_LAWS = UNITS if noise.law == "gaussian" else {noise.law: self.law.unit}
        self.ESTIMATORS = ("law",)
        if self.law.corrected is not None and method.objective == "score":
            self.ESTIMATORS += ("corrected",)
        method.check(
            method.estimator in self.ESTIMATORS,
            "estimator",
            "is for the score of poisson and gamma noise",
        )
        normal = self.law.normal and (method.domain == "even" or noise.law == "gaussian")
        method.check(
            method.objective not in AVERAGES or normal,
            "objective",
            "averages w, in which the noise must be Gaussian: gaussian, lognormal",
        )
        least = 2 * REACH
        cfg.data.check(
            method.objective != "noise2void" or min(self.shape[1:]) >= least,
            "patch",
            f"must be >= {least} with method.objective=noise2void",
        )
        splits = ", ".join(name for name, law in LAWS.items() if law.split)
        method.check(
            method.objective != "gr2r" or self.law.split is not None,
            "objective",
            f"splits noise of {splits} alone",
        )
        self.net = NETWORKS[cfg.network.name](cfg.network, self.shape)
        if method.objective == "unsure":  # the variance of the noise over sigma^2, not told
            self.multiplier = torch.nn.Parameter(torch.ones(()))
        # The levels it was trained on; of given pictures they are estimated, in prepare().
        self.register_buffer("levels", torch.tensor(self.configured_levels()))

    def configured_levels(self) -> list[float]:
        """Return [the lowest, the highest level] of the config."""
        noise = self.cfg.data.noise
        return [noise.level, noise.level_max or noise.level]

    def least_perturbation(self, zeta: float) -> float:
        """Return the smallest sigma_a; zeta is the highest level, 0 where it is not known yet.

        Poisson pixels are multiples of zeta; perturbed by less than half of it, they have the score
        of a comb. Of the root of a pixel, 0.55 of its noise is half a count between 0 and 1, and
        0.275 the root of zeta.

        Raises:
            ValueError: the comb would show.
        """
        method, poisson = self.cfg.method, self.cfg.data.noise.law == "poisson"
        least = method.sigma_a_min or (0.6 if poisson and method.form == "scaled" else 0.25)
        key = "min"
        if method.objective == "r2r":
            least, key = method.sigma_a_max, "max"
        if poisson and method.objective == "score":
            bound = 0.5 * zeta if method.domain == "pixels" else 0.275 * zeta**0.5
            bound = 0.55 if method.form == "scaled" else bound
            check(
                least >= bound,
                f"method.sigma_a_{key}",
                least,
                f"must be >= {bound:.3g}: counts "
                "are whole, and a smaller perturbation learns their comb",
            )
        method.check(least <= method.sigma_a_max, "sigma_a_max", f"must be >= {least}")
        return least

    def prepare(self, data: "NoisyDataModule") -> str:
        """Note the levels of the training pictures; return what is learned from, in words."""
        # init= may have brought another model's.
        levels = data.levels or self.configured_levels()
        self.levels.copy_(torch.tensor([min(levels), max(levels)]))
        self.least_perturbation(max(levels))
        return f"{len(data.numbers['train'])} pictures, {self.learned_from()}"

    def learned_from(self) -> str:
        """Return the noise it knows and what it was shown, in words; the model card says it too."""
        noise, (low, high) = self.cfg.data.noise, self.levels.tolist()
        level = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        target = {
            "none": "no target",
            "second": "target: a second noisy copy",
            "clean": "target: the clean picture",
        }[noise.target]
        objective = f"objective: {self.cfg.method.objective}"
        words = f"{noise.law} noise of level {level}; {VIEWS[noise.copies]}; {target}; {objective}"
        return words + ("; drawn scenes among the pictures" if self.cfg.data.scenes else "")

    def to_state(self, y: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return (w, sigma (B, 1, 1, 1)) of noisy pixels y; level (B, 1, 1, 1)."""
        w = self.law.to_state(y, level) if self.cfg.method.domain == "even" else y
        return w, self.noise_std(level)

    def noise_std(self, level: Tensor) -> Tensor:
        """Return sigma, that of the noise in w; of uneven noise, at mid grey."""
        sigma = torch.zeros_like(level) + self.law.state_std(level)
        if self.cfg.method.domain == "even":
            return sigma
        grey = self.law.to_state(torch.full_like(level, 0.5), level)
        return sigma * self.law.state.slopes(grey, level)[0]

    def from_state(self, w: Tensor, level: Tensor) -> Tensor:
        """Return pixels y of a state w."""
        return w if self.cfg.method.domain == "pixels" else self.law.from_state(w, level)

    def noise_in(self, z: Tensor, deviation: Tensor) -> Tensor:
        """Return F(z; t), the noise in z over its deviation sqrt(t) (B, 1, 1, 1)."""
        if self.cfg.method.form == "published":
            return -deviation * self.net(z, None)
        # 25 of 255 grey levels make about 1.
        return self.net(z, 10 * deviation.flatten())

    def sigma_a(self, n: Tensor, sigma: Tensor) -> Tensor:
        """Return the perturbation of training images n, (B, 1, 1, 1).

        Where the noise in w is Gaussian E[x | z] depends on t alone: pictures of less noise are
        perturbed up to what the noisiest reach, and tell more of the noise in z.
        """
        cfg = self.cfg.method
        if cfg.objective == "r2r":
            perturbation = torch.full_like(sigma, cfg.sigma_a_max)
        elif cfg.anneal:
            rest = over_items((1 - n.to(sigma) / cfg.anneal).clamp(0, 1), sigma)
            perturbation = self.sigma_a_min + (cfg.sigma_a_max - self.sigma_a_min) * rest
        else:
            drawn = over_items(seeding.uniform(self.cfg.seed, n, seeding.Stream.SIGMA), sigma)
            most = cfg.sigma_a_max
            if self.law.normal and cfg.domain == "even" and cfg.form == "scaled":
                noisiest = torch.maximum(self.noise_std(self.levels).max(), sigma)
                most = ((1 + most**2) * noisiest**2 - sigma**2).sqrt() / sigma
            least = self.sigma_a_min
            if cfg.drawn == "t":
                low, high = 1 + least**2, 1 + most**2
                perturbation = (low * (high / low) ** drawn - 1).sqrt()
            else:
                perturbation = least * (most / least) ** drawn
        return perturbation if cfg.form == "published" else perturbation * sigma

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (L, {"loss": L}), the mean square of what is learned, in units of the noise.

        score        u + sigma_a s(z; t)                                       (AR-DAE)
        r2r          (x(z) - (w - sigma^2 u / sigma_a)) / sigma,  sigma_a fixed
        noise2noise  (x(w) - y') / sigma,  y' another noisy copy
        supervised   (x(w) - x) / sigma
        others       see self_supervised_loss()
        """
        batch = self._with_level(self.as_batch(batch))
        objective = self.cfg.method.objective
        level = over_items(batch["level"], batch["image"])
        y = (batch["image"] + 1) / 2
        w, sigma = self.to_state(y, level)
        if objective not in ("score", "r2r", "noise2noise", "supervised"):
            loss = self.self_supervised_loss(y, level, batch["n"])
            logs = {"loss": loss.detach()}
            if objective == "unsure":
                logs["multiplier"] = self.multiplier.detach()
            return loss, logs
        if objective in ("score", "r2r"):
            a, shape = self.sigma_a(batch["n"], sigma), w.shape[1:]
            u = philox_normal(
                shape, self.cfg.seed, batch["n"], stream=int(seeding.Stream.NOISE), device=w.device
            )
            z, deviation = w + a * u, (sigma**2 + a**2).sqrt()
            noise = self.noise_in(z, deviation)
            if objective == "score":
                error = u - a * noise / deviation
            else:
                error = (z - deviation * noise - w + sigma**2 * u / a) / sigma
        else:
            error = (self.direct(y, level) - (batch["target"] + 1) / 2) / sigma
        loss = error.square().mean()
        return loss, {"loss": loss.detach()}

    def direct(self, y: Tensor, level: Tensor) -> Tensor:
        """Return the pixels of w - sigma F(w; sigma^2); level (B, 1, 1, 1)."""
        w, sigma = self.to_state(y, level)
        return self.from_state(w - sigma * self.noise_in(w, sigma), level)

    def self_supervised_loss(self, y: Tensor, level: Tensor, n: Tensor) -> Tensor:
        """Return the loss of the baselines that learn from y alone; x(y) is direct(y).

        noise2void         mean over hidden pixels of ((x(y') - y) / sigma)^2,  y' y without them
        neighbor2neighbor  mean e^2 + gamma (e - (g1 x(y) - g2 x(y)) / sigma)^2,
                           e = (x(g1 y) - g2 y) / sigma,  g1, g2 neighbours of each 2 x 2 cell
        sure               mean ((f - w) / sigma)^2 - 1 + 2 div f / N,  f = w - sigma F(w; sigma^2)
        unsure             mean ((f - w) / sigma)^2 + 2 m div f / N, least in f, largest in m
        gr2r               mean ((x(y1) - y2) / sigma)^2,  y1 and y2 independent given the clean one

        Args:
            y: noisy pixels on [0, 1].
            level: (B, 1, 1, 1).
            n: positions in the training stream, int64 (B,).
        """
        objective, (w, sigma) = self.cfg.method.objective, self.to_state(y, level)
        if objective == "noise2void":
            order, choice = self._uniforms((2, *y.shape[2:]), n, y).unbind(1)
            seen, hidden = blind_spots(y, order, choice)
            error = (self.direct(seen, level) - y) / sigma
            return (error.square() * hidden).sum() / (hidden.sum() * y.shape[1])
        if objective == "neighbor2neighbor":
            first, second = neighbours(self._uniforms([side // 2 for side in y.shape[2:]], n, y))
            with torch.no_grad():
                whole = self.direct(y, level)
            error = (self.direct(first(y), level) - second(y)) / sigma
            drift = error - (first(whole) - second(whole)) / sigma
            images = self.cfg.trainer.max_steps * self.cfg.data.batch_size
            weight = self.cfg.method.gamma * over_items((n.to(y) / images).clamp(0, 1), y)
            return (error.square() + weight * drift.square()).mean()
        if objective == "gr2r":
            x, target = self._split(y, level, n)
            return ((x - target) / sigma).square().mean()

        def f(w: Tensor) -> Tensor:
            return w - sigma * self.noise_in(w, sigma)

        restored, signs = f(w), (self._uniforms(w.shape[1:], n, y) >= 0.5).to(w) * 2 - 1
        change = ((restored - w) / sigma).square().mean()
        spread = divergence(f, w, restored, signs, 0.1 * sigma)
        if objective == "sure":
            return change - 1 + 2 * spread
        # Descending the last term, which is 0, ascends in the multiplier.
        fixed = self.multiplier.detach()
        return change + 2 * fixed * spread + 2 * (fixed - self.multiplier) * spread.detach()

    def follows_length(self) -> bool:
        """Return whether anything in training goes by trainer.max_steps."""
        return self.cfg.method.objective == "neighbor2neighbor" or super().follows_length()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the network's weights, and the multiplier of unsure, which does not decay."""
        if self.cfg.method.objective != "unsure":
            return super().parameter_groups()
        weights = [p for p in self.net.parameters() if p.requires_grad]
        return [{"params": weights}, {"params": [self.multiplier], "weight_decay": 0.0}]

    def _uniforms(self, shape: Sequence[int], n: Tensor, y: Tensor) -> Tensor:
        """Return uniforms in [0, 1), (B, *shape), of training images n, where y lies."""
        stream = int(seeding.Stream.HIDDEN)
        return philox_uniform(tuple(shape), self.cfg.seed, n, stream=stream, device=y.device)

    def _split(self, y: Tensor, level: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x(y1), y2) of pictures split with the noise of training images n."""
        rngs = [np.random.default_rng([self.cfg.seed, k, SPLIT]) for k in n.tolist()]
        first, levels = self._first_parts(y, level, rngs)
        share = self.cfg.method.share
        return self.direct(first, levels), (y - (1 - share) * first) / share

    def _first_parts(
        self, y: Tensor, level: Tensor, rngs: Sequence[np.random.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Return (y1 of each picture, their levels (B, 1, 1, 1)); see Law.split."""
        assert self.law.split is not None
        share, pixels = self.cfg.method.share, y.double().numpy(force=True)
        parts = [
            self.law.split(each, float(one), share, rng)
            for each, one, rng in zip(pixels, level.flatten(), rngs)
        ]
        first, levels = (np.stack(part) for part in zip(*parts))
        return torch.from_numpy(first).to(y), over_items(torch.from_numpy(levels).to(level), y)

    def _with_level(self, batch: Batch) -> Batch:
        """Return a batch with the noise level of each picture, the config's where it says none."""
        if "level" not in batch:
            noise = self.cfg.data.noise
            check(
                noise.level and not noise.level_max,
                "batch",
                list(batch),
                'has no "level" and the config no single one; write {"image": x, "level": level}',
            )
            batch["level"] = torch.full_like(batch["image"][:, 0, 0, 0], noise.level)
        check(
            TARGETS[self.cfg.method.objective] == "none" or "target" in batch,
            "batch",
            list(batch),
            f'has no "target", which method.objective={self.cfg.method.objective} learns from',
        )
        return batch

    def score(self, y: Tensor, level: Tensor) -> Tensor:
        """Return s(y) = grad_y log p(y) of noisy pixels y on [0, 1]; level (B,), the law's unit.

        Raises:
            ValueError: a level or pixels that are not finite.
        """
        self.check_finite(y, level, "level")
        return self._score(y, level)

    def _score(self, y: Tensor, level: Tensor) -> Tensor:
        """Return score() without a look at its arguments, for derivatives."""
        level = over_items(level, y).to(y)
        w, sigma = self.to_state(y, level)
        s = -self.noise_in(w, sigma) / sigma
        return s if self.cfg.method.domain == "pixels" else self.law.score(w, s, level)

    def estimate(self, y: Tensor, level: Tensor) -> Tensor:
        """Return the restored pixels on [0, 1], not clipped; arguments as for score()."""
        self.check_finite(y, level, "level")
        wide = over_items(level, y).to(y)
        if self.cfg.method.objective == "score":
            s = self._score(y, level)
            if self.cfg.method.estimator == "law" or self.law.corrected is None:
                return self.law.estimate(y, s, wide)
            return self.law.corrected(y, s, self.diagonal(y, level), wide)
        if self.cfg.method.objective == "r2r":
            return self.from_state(self.recorrupted(*self.to_state(y, wide)), wide)
        if self.cfg.method.objective == "gr2r":
            draws = range(self.cfg.method.probes)
            total = torch.zeros_like(y)
            for k in draws:
                rngs = [np.random.default_rng([self.cfg.seed, k, RESTORED]) for _ in y]
                total += self.direct(*self._first_parts(y, wide, rngs))
            return total / len(draws)
        return self.direct(y, wide)

    def recorrupted(self, w: Tensor, sigma: Tensor) -> Tensor:
        """Return the mean of E[x | z] over perturbed z: R2R knows no other level than that of z."""
        a = self.cfg.method.sigma_a_max * sigma
        deviation = (sigma**2 + a**2).sqrt()
        n, total = torch.zeros(len(w), dtype=torch.int64), 0
        for k in range(self.cfg.method.probes):
            u = philox_normal(
                w.shape[1:],
                self.cfg.seed,
                (n + k).to(w.device),
                stream=int(seeding.Stream.PROBE),
                device=w.device,
            )
            z = w + a * u.to(w)
            total = total + z - deviation * self.noise_in(z, deviation)
        return total / self.cfg.method.probes

    def diagonal(self, y: Tensor, level: Tensor) -> Tensor:
        """Return ds_i / dy_i, by Hutchinson's signs; see score()."""
        zeros = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        signs = seeding.signs(zeros, 0, self.cfg.method.probes, y.shape[1:])
        total = torch.zeros_like(y)
        for v in signs:
            total += v * torch.func.jvp(lambda y: self._score(y, level), (y,), (v,))[1]
        return total / len(signs)

    def noisy_state(self, images: Tensor) -> None:
        """Raise ValueError for pixels that are not finite numbers."""
        check(torch.isfinite(images).all(), "image", "nan", "its pixels must be finite numbers")

    def noise_level(self, image: Tensor, law: str) -> float | PoissonGaussian:
        """Return the level of the noise in one picture (C, H, W) on [-1, 1], in the law's unit.

        It may lie beyond what the law accepts. Of poisson-gaussian: the noise of its pixels on
        [0, 1].
        """
        self.check_law(law)
        y = (image.double() + 1) / 2
        if law not in LAWS:
            return fit_line(Blocks.of(y.movedim(0, -1).numpy(force=True))).noise
        return level_from_patches(y, law)

    def check_law(self, law: str) -> None:
        """Raise ValueError for noise that it does not restore."""
        check(law in self.DENOISE_LAWS, "law", law, f"choose from {', '.join(self.DENOISE_LAWS)}")

    def nearest_level(self, level: float, law: str = "") -> float:
        """Return the level nearest to this one of those that it knows: trained on, or 10 % off.

        A model of Gaussian noise restores every level that the law accepts: see contrast() of
        noise/stabilise.py.
        """
        if self.cfg.data.noise.law == "gaussian":
            row = LAWS[law or "gaussian"]
            # Weak noise of 16 bits is a small share of what the file could hold.
            low = 0.0 if law in ("", "gaussian", "poisson") else row.low
            return min(max(level, low), row.high)
        low, high = self.levels.tolist()
        return min(max(level, 0.9 * low), 1.1 * high)

    def check_level(self, level: float | PoissonGaussian, law: str = "") -> None:
        """Raise ValueError for a level that it does not know; law: its own one if ""."""
        if law == CAMERA:
            camera = isinstance(level, PoissonGaussian)
            check(camera, "level", level, f"law={law} takes a PoissonGaussian")
            return
        if self.cfg.data.noise.law == "gaussian":
            assert not isinstance(level, PoissonGaussian)
            row = LAWS[law or "gaussian"]
            if law not in ("", "gaussian", "poisson"):
                row.check(level)
            else:  # weak noise of 16 bits is a small share of what the file could hold
                remedy = f"must be above 0, at most {row.high:g} ({row.unit})"
                check(0 < level <= row.high, "level", f"{level:.4g}", remedy)
            return
        low, high = self.levels.tolist()
        check(
            self.nearest_level(level) == level,
            "level",
            f"{level:.4g}",
            f"this model was trained at {low:.4g} to {high:.4g}; tell one of these",
        )

    def treatment(self, law: str, level: float | PoissonGaussian) -> str:
        """Return in words how it restores noise of a level that it was not trained on, or ""."""
        if self.cfg.data.noise.law != "gaussian":
            return ""
        sigma = stabilised(law, level).level
        low, high = self.levels.tolist()
        factor, told, share = contrast(sigma, low, high)
        if 0.9 * low <= sigma <= 1.1 * high:
            return ""
        words = f"noise of {sigma:.3g} of 255 is {'above' if sigma > high else 'below'} the "
        words += f"{low:.3g} to {high:.3g} that the model knows: restored "
        words += f"with {factor:.3g} times the contrast " if factor != 1 else ""
        words += f"as {told:.3g}"
        return words + (f", {100 * share:.2g} % of the change taken" if share < 1 else "")

    @torch.no_grad()
    def restore(
        self,
        images: Tensor,
        law: str,
        level: float | PoissonGaussian | None = None,
        labels: Tensor | None = None,
        clip: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return (restored pictures in [-1, 1], float32, their levels (B,)) of noisy ones.

        The levels are in the law's unit; of poisson-gaussian sigma of 255 in its Gaussian domain.

        Args:
            images: float32 (B, C, H, W) on the [-1, 1] scale, not clipped; any H and W.
            law: a key of DENOISE_LAWS: the one it was trained on, and if that is gaussian others.
            level: in the law's unit, of poisson-gaussian the noise of pixels on [0, 1]; None:
                estimated for each picture, of another law than gaussian the nearest that it knows.
            labels: None; it knows no classes.
            clip: to black and white; false: what lies beyond is kept.

        Raises:
            ValueError: another law or number of channels, a level it cannot restore.
        """
        check(
            images.shape[1] == self.shape[0],
            "image",
            tuple(images.shape),
            f"the model knows {self.shape[0]} channels",
        )
        self.check_law(law)
        self.noisy_state(images)
        y = (images.to(self.device) + 1) / 2
        if level is None:
            found = [self.noise_level(image, law) for image in images]
            if law != CAMERA:
                found = [self.nearest_level(one, law) for one in found]
        else:
            found = [level] * len(images)
        if self.cfg.data.noise.law == "gaussian":
            x, levels = self.gaussian_restored(y, law, found)
        else:
            if level is not None:
                self.check_level(level)
            levels = torch.tensor(found, dtype=torch.float32, device=self.device)
            x = self.estimate(y, levels)
        x = x * 2 - 1
        return (x.clamp(-1, 1) if clip else x), levels

    def denoise(
        self, picture: np.ndarray, law: str = "", level: float | None = None, **options: Any
    ) -> np.ndarray:
        """Return the restored pixels of a noisy picture, float32 of its shape, in its own unit.

            model = genmodels.load("pretrained/noise2score_grey")
            clean = model.denoise(photo, level=25)                          # uint8, 0..255
            clean = model.denoise(frame, law="poisson-gaussian")            # uint16; gain found
            clean = model.denoise(frame, law="poisson-gaussian", gain=2.1, offset=100, read=1.6)
            clean = model.denoise(scan, law="auto", ensemble=4)

        What sample.py denoise= does, for arrays: tiles, black and white by quantiles for 16 bits
        and floats, every law through a model of Gaussian noise, levels beyond the trained range.

        Args:
            picture: (H, W), (H, W, C) or (N, H, W, C), C = 1 or 3: uint8, uint16, or floats on
                0..255 or of any range if the level is found; not clipped.
            law: a key of DENOISE_LAWS, or auto; "": the one it was trained on.
            level: in the law's unit, sigma of 255 for gaussian; None: found for each picture.
            options: gain, offset, read (of poisson-gaussian), black, white, scale, tile, overlap,
                ensemble, correlated, precision and estimator of `python sample.py --help`; and
                verbose=False, which keeps what is found from being printed.

        Raises:
            ValueError: what sample.py denoise= refuses.
        """
        from genmodels.restoration import denoise_array

        return denoise_array(self, picture, law=law, level=level, **options)

    def gaussian_restored(
        self, y: Tensor, law: str, levels: Sequence[float | PoissonGaussian]
    ) -> tuple[Tensor, Tensor]:
        """Return (x on [0, 1], not clipped, levels (B,)) of noise of any law made Gaussian."""
        parts, shown = [], []
        for level, rows in _runs(levels):
            self.check_level(level, law)
            domain = stabilised(law, level)
            w = domain.forward(y[rows])
            factor, told, share = contrast(domain.level, *self.levels.tolist())
            sigma = torch.full((len(w),), told, dtype=torch.float32, device=self.device)
            # What no noise takes beyond black and white, hot pixels say, the network has never
            # seen, and it would spread around them; they stay as they are.
            beyond = max(BEYOND, 4 * domain.level / 255)
            shown_w = w.clamp(-beyond, 1 + beyond)
            if factor == share == 1:
                clean = self.estimate(shown_w, sigma)
            else:
                stretched = self.estimate((shown_w - 0.5) * factor + 0.5, sigma)
                clean = shown_w + share * ((stretched - 0.5) / factor + 0.5 - shown_w)
            clean = clean + (w - shown_w)
            parts.append(domain.inverse(clean))
            shown += [domain.level if isinstance(level, PoissonGaussian) else level] * len(w)
        return torch.cat(parts), torch.tensor(shown, dtype=torch.float32, device=self.device)

    def sample(self, seeds: Sequence[int], labels: Labels = None, **options: Any) -> Tensor:
        """Raise ValueError: this method restores pictures and generates none."""
        raise ValueError("method.name=noise2score: restores pictures; write denoise=IMAGES law=")
