"""CDRL: an energy and an initializer trained together by diffusion recovery likelihood; and DRL.

For a pair of levels (t-1, t) of genmodels/sampling/recovery.py, y_0 = g(x_t) + sqrt(v_t) n is
refined by K Langevin steps on log p(y | x_t) to y_K, and

    L_f = - E w_t [ f(y+, t-1) - f(y_K, t-1) ],  y+ = sqrt(ahat_t) x_{t-1}     (energy)
    L_g = E | y_K - y_0 |^2                                                    (initializer)

with y_K held constant in L_f and in the first term of L_g: f and g share no parameter, so the sum
of the two has the gradient of each. No second derivative is taken.

x_t and x_{t-1} share one noise e: f sees only one side of the pair, so any coupling with the right
marginals leaves the gradient unbiased, and this one makes its variance smaller
(shared_noise=false: fresh noise from x_{t-1} to x_t, as in DRL).

References: Zhu, Xie, Wu and Gao, "Learning energy-based models by cooperative diffusion recovery
likelihood", ICLR 2024, arXiv 2309.05153; Gao, Song, Poole, Wu and Kingma, "Learning energy-based
models by diffusion recovery likelihood", ICLR 2021, arXiv 2012.08125 (initializer=none).
"""

from dataclasses import dataclass

import torch

from genmodels import seeding
from genmodels.config import Section, check, setting, settings_of
from genmodels.kernels.philox import philox_normal
from genmodels.methods import cdrl_density as density
from genmodels.methods.base import GenerativeModule
from genmodels.networks import NETWORKS
from genmodels.networks.ebm import fixed_weights, power_iteration
from genmodels.networks.edm_unet import EDMUNet, EDMUNetConfig
from genmodels.networks.mlp import MLP, MLPConfig
from genmodels.sampling.composition import blend_of, parse_compose
from genmodels.sampling.recovery import (
    ANGLES,
    Level,
    LevelMeans,
    RecoverySchedule,
    denoise_tweedie,
    recovery_chain,
    sample_recovery,
)
from genmodels.seeding import Stream

# Settings that sample() and sample.py may override.
SAMPLING = ("steps", "guidance", "tweedie_scale", "noise_scale", "mala")


@dataclass
class CDRLConfig:
    """CDRL (Zhu et al. 2024, arXiv 2309.05153); initializer=none, angles=drl: DRL (2012.08125)."""

    name: str = setting("cdrl", "")
    angles: str = setting("cdrl", "noise levels: cdrl (equal angles) or drl")
    levels: int = setting(6, "pairs of noise levels, T")
    steps: int = setting(15, "Langevin steps for each pair, K")
    step_size: float = setting(4e-4, "b^2: squared noise of a step / sigma_t^2 at the first pair")
    growth: str = setting(
        "clean",
        "how b^2 grows with the level: clean (sbar_{t-1} / sbar_0) or "
        "constant (1 / sbar_0 everywhere)",
    )
    units: str = setting(
        "step",
        "f is the network's output (step) or that times s_t^2 / n_t^2, "
        "n_t the noise of the level (noise)",
    )
    units_limit: float = setting(1.0, "units=noise: that factor is at most this")
    initializer: str = setting("unet", "unet, mlp or none (chains start at x_t)")
    initializer_channels: int = setting(64, "channels of the U-Net, or hidden units")
    initializer_multipliers: list[int] = setting([1, 1, 1], "channels of each level / channels")
    initializer_blocks: int = setting(3, "residual blocks for each level")
    initializer_attention: list[int] = setting([16, 8], "heights of levels with self-attention")
    initializer_dropout: float = setting(0.1, "dropout of the U-Net")
    initializer_lr: float = setting(1e-5, "learning rate of the initializer")
    shared_noise: bool = setting(True, "one noise for both sides of a pair")
    label_dropout: float = setting(0.1, "share of labels hidden in training (for guidance)")
    divergence: float = setting(1e6, "stop when |f(data) - f(chain)| of a level exceeds this")
    guidance: float = setting(0.0, "w: sample from (1 + w) f(y, label) - w f(y, none)")
    tweedie_scale: float = setting(1.0, "last denoising step: 1 consistent, 2 as released, 0 none")
    noise_scale: float = setting(1.0, "factor on the Langevin noise in sampling")
    mala: bool = setting(False, "sampling: accept or reject each step (exact for the energy)")

    def __post_init__(self):
        for key, choices in (
            ("angles", ANGLES),
            ("growth", ("clean", "constant")),
            ("units", ("step", "noise")),
            ("initializer", ("unet", "mlp", "none")),
        ):
            check(
                getattr(self, key) in choices,
                f"method.{key}",
                getattr(self, key),
                f"choose from {', '.join(choices)}",
            )
        for key, least in (
            ("levels", 2),
            ("steps", 1),
            ("guidance", -1),
            ("tweedie_scale", 0),
            ("noise_scale", 0),
        ):
            check(
                getattr(self, key) >= least,
                f"method.{key}",
                getattr(self, key),
                f"must be >= {least}",
            )
        for key in ("step_size", "initializer_lr", "divergence", "units_limit"):
            check(getattr(self, key) > 0, f"method.{key}", getattr(self, key), "must be > 0")
        check(
            0 <= self.label_dropout <= 1,
            "method.label_dropout",
            self.label_dropout,
            "must be in [0, 1]",
        )
        check(
            self.noise_scale == 1 or not self.mala,
            "method.noise_scale",
            self.noise_scale,
            "mala=true does not take it; use noise_scale=1",
        )


@dataclass
class ComposeOptions(Section):
    """What sample() takes beside settings of the config."""

    compose: str = setting("", 'terms "3:1.5,5|6,!7:0.5": class or classes (OR), ! NOT, :weight')


@dataclass
class AISOptions(Section):
    """What log_prob() takes."""

    ais_steps: int = setting(200, "densities between the base and the model", ge=1)
    ais_chains: int = setting(64, "chains; two at least, for their variance", ge=2)
    ais_moves: int = setting(1, "Metropolis steps at each density", ge=1)
    ais_step: float = setting(1.0, "factor on their step size", gt=0)
    ais_refine: int = setting(
        100, "Metropolis steps that refine samples before the reverse chains", ge=1
    )


class CDRL(GenerativeModule):
    """Cooperative diffusion recovery likelihood.

    Args:
        cfg: Config whose method is a CDRLConfig and whose network is an energy (ebm, mlp).
    """

    Config = CDRLConfig
    ENERGY = True
    INPAINTS = True
    SAMPLE_OPTIONS = settings_of(CDRLConfig, *SAMPLING) | settings_of(ComposeOptions)

    LIKELIHOODS = ("ais_lower", "ais_upper")
    LIKELIHOOD_OPTIONS = settings_of(AISOptions)

    def __init__(self, cfg):
        super().__init__(cfg)
        method = cfg.method
        guided = method.guidance == 0 or self.classes and self.unlabelled
        check(
            guided,
            "method.guidance",
            method.guidance,
            "needs a conditional model (data.labels=true, method.label_dropout=0.1)",
        )
        self.net = NETWORKS[cfg.network.name](cfg.network, self.shape, self.classes)
        self.initializer = build_initializer(method, self.shape, self.classes)
        self.schedule = RecoverySchedule(
            method.angles,
            method.levels,
            method.step_size,
            method.growth,
            method.units,
            method.units_limit,
        )
        self.log_z = {}  # bounds that log_prob() has made
        self.levels = None  # LevelMeans of the latest loss()

    # --------------------------------------------------------------------------------------------
    # Training

    def loss(self, batch):
        """Return (L_f + L_g, {"loss": L_f, "loss_initializer": L_g}); see the module."""
        x, n, seed = batch["image"], batch["n"], self.cfg.seed
        labels = self._labels(batch["label"], n)
        pair = seeding.uniform(seed, n, Stream.SIGMA) * self.cfg.method.levels
        t = 1 + pair.long().clamp(max=self.cfg.method.levels - 1)
        level = self.schedule.at(t)
        x_t, data = self.pair(x, n, level)
        noise = philox_normal(self.shape, seed, n, stream=int(Stream.INITIALIZER), device=x.device)
        start = self.initial(x_t, level, labels, noise)
        with fixed_weights(self.net):
            chain = recovery_chain(
                lambda y: self.f(y, level, labels),
                start.detach(),
                x_t,
                level,
                steps=self.cfg.method.steps,
                seed=seeding.keys(seed, n, Stream.CHAIN),
                freeze=(self.net,),
            )
        twice = Level(*(value.repeat(2) for value in level))
        f = self.f(torch.cat([data, chain.y]), twice, None if labels is None else labels.repeat(2))
        f_data, f_chain = f.chunk(2)
        loss_f = -(level.w * (f_data - f_chain)).mean()
        loss_g = (chain.y - start).square().sum(dim=(1, 2, 3)).mean()
        self.levels = LevelMeans(self.cfg.method.levels, t, f_data, f_chain, chain, data)
        logs = {"loss": loss_f.detach(), "loss_initializer": loss_g.detach()}
        return loss_f + loss_g, logs

    def f(self, y, level, labels=None, dtype=torch.float32):
        """Return f(y, t-1) = gain * network, (B,) in `dtype`: the log-density times s_t^2."""
        return level.gain.to(dtype) * self.net(y, level.noise_clean, labels, dtype=dtype)

    def pair(self, x, n, level):
        """Return (x_t, y+ = sqrt(ahat_t) x_{t-1}) of clean images x, (B, C, H, W) each."""
        draw = lambda stream: philox_normal(  # noqa: E731
            self.shape, self.cfg.seed, n, stream=int(stream), device=x.device
        )
        fresh = None if self.cfg.method.shared_noise else draw(Stream.PAIR)
        return self.schedule.pair(x, level, draw(Stream.NOISE), fresh)

    def initial(self, x_t, level, labels, noise, blend=None):
        """Return the chain's start g(x_t) + sqrt(v_t) noise, like x_t (x_t without initializer)."""
        if self.initializer is None:
            return x_t
        change = lambda x, level, labels: self.initializer(x, level.noise, labels)  # noqa: E731
        change = change(x_t, level, labels) if blend is None else blend.map(change, x_t, level)
        return x_t + change.float() + _column(level.v.sqrt()) * noise

    def _labels(self, labels, n):
        """Return the batch's labels, some hidden (-1) in training; None if unconditional."""
        if not self.classes:
            return None
        if not self.training or not self.cfg.method.label_dropout:
            return labels
        hidden = seeding.uniform(self.cfg.seed, n, Stream.LABEL_DROP)
        return torch.where(hidden < self.cfg.method.label_dropout, -1, labels)

    def training_step(self, batch, batch_idx):
        """Return the loss; log the diagnostics of each level beside it."""
        loss = super().training_step(batch, batch_idx)
        self.log_dict({f"levels/{name}": value for name, value in self.levels.logs().items()})
        return loss

    def parameter_groups(self):
        """Return two groups, energy and initializer, each with its lr; clipped separately."""
        groups = [{"params": list(self.net.parameters())}]
        if self.initializer is not None:
            lr = self.cfg.method.initializer_lr
            groups.append({"params": list(self.initializer.parameters()), "lr": lr})
        return groups

    def optimizer_step(self, *args, **kwargs):
        """Step, then one power iteration of the spectral norms for the new weights."""
        super().optimizer_step(*args, **kwargs)
        power_iteration(self.net)

    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        """Clip each group; stop where a level has diverged, and name it.

        Raises:
            FloatingPointError: method.divergence exceeded, or too many non-finite steps.
        """
        limit = self.cfg.method.divergence
        lines, finite = self.levels.beyond(limit)
        levels = "; ".join(lines) or "a level on another process"
        where = f"step {self.global_step} at {levels}"
        if self.anywhere(bool(lines) and finite):
            raise FloatingPointError(f"method.divergence={limit:g}: exceeded in {where}")
        if lines:  # the base class skips and counts such steps
            self.print(f"not finite in {where}")
        super().configure_gradient_clipping(optimizer, *args, **kwargs)

    # --------------------------------------------------------------------------------------------
    # Sampling

    @torch.no_grad()
    def sample(
        self,
        seeds,
        labels=None,
        *,
        compose=None,
        known=None,
        mask=None,
        noise="cpu",
        callback=None,
        **options,
    ):
        """Return generated images in [-1, 1] (clipped), float32 (N, C, H, W).

        Image k depends on seeds[k] alone, not on the others.

        Args:
            seeds: N whole numbers.
            labels: classes of a conditional model: None (random; none where images are completed),
                one int, or N ints; -1 = none.
            compose: terms of genmodels.sampling.composition in place of labels, or None.
            known: images (K, C, H, W) in [-1, 1] to complete; seed k gets image k modulo K.
            mask: bool, broadcastable to (K, C, H, W): True where `known` is to be kept.
            noise: device on which random labels are drawn; all else is the same everywhere.
            callback: called as callback(i, x) after each level.
            options: see SAMPLE_OPTIONS; those left at None come from the model's config. With
                fewer steps than in training, drift and noise of each grow (recovery_chain).

        Raises:
            ValueError: an option out of range, or labels the model does not have.
        """
        cfg = self._settings(options)
        keys = torch.tensor([int(seed) for seed in seeds], dtype=torch.int64, device=self.device)
        if known is not None and labels is None and self.classes and not compose:
            labels = -1  # a random class would contradict what is known
        generators = seeding.ImageGenerators(seeds, noise)
        blend = self._blend(cfg, self.image_labels(generators, labels), labels, compose, keys)
        if (known is None) != (mask is None):
            raise ValueError("inpaint=, mask=: give both")
        if known is not None:
            index = keys.remainder(len(known)).to(known.device)
            mask = mask.expand_as(known)[index].to(self.device)
            known = known[index].to(self.device)
        y, level, energy = self.draw(keys, blend, cfg, known, mask, callback)
        x = denoise_tweedie(lambda y: energy(y, level), y, level, cfg.tweedie_scale).clamp(-1, 1)
        return x if mask is None else torch.where(mask, known, x)

    def draw(self, keys, blend, cfg, known=None, mask=None, callback=None):
        """Return samples y of the first pair, their Level, and the energy; counts self.nfe."""

        def energy(y, level, dtype=torch.float32):
            self.nfe += blend.evaluations
            return blend.energy(self.f, y, level, dtype)

        def initial(x_t, level, noise):
            self.nfe += 0 if self.initializer is None else blend.evaluations
            return self.initial(x_t, level, None, noise, blend)

        self.nfe = 0
        with fixed_weights(self.net):
            y, level = sample_recovery(
                energy,
                initial,
                self.schedule,
                keys,
                self.shape,
                steps=cfg.steps,
                rate=self.cfg.method.steps / cfg.steps,
                noise_scale=cfg.noise_scale,
                mala=cfg.mala,
                known=known,
                mask=mask,
                freeze=(self.net,),
                callback=callback,
            )
        return y, level, energy

    def _settings(self, options):
        """Return the method's config with the given options in place of its own."""
        cfg = self.settings(options, SAMPLING)
        check(
            cfg.guidance == 0 or self.classes,
            "guidance",
            cfg.guidance,
            "this model is unconditional; leave it out",
        )
        check(
            cfg.guidance == 0 or self.unlabelled,
            "guidance",
            cfg.guidance,
            "no label was hidden in training (method.label_dropout); use 0",
        )
        return cfg

    def _blend(self, cfg, drawn, labels, compose, keys):
        """Return the Blend of the label of each image, guided, or of the composed terms."""
        choice = seeding.uniform(keys, torch.zeros_like(keys), Stream.CHOICE)
        if not compose:
            return blend_of(float(cfg.guidance), drawn, choice)
        check(labels is None, "compose", compose, "names the classes itself; leave labels out")
        check(cfg.guidance == 0, "compose", compose, "weights take guidance's place; leave it out")
        blend = blend_of(parse_compose(compose, self.classes), drawn, choice)
        check(
            self.unlabelled or (blend.labels >= 0).all(),
            "compose",
            compose,
            "no label was hidden in training (method.label_dropout); make the weights sum to 1",
        )
        return blend

    # --------------------------------------------------------------------------------------------
    # What the energy says of an image

    def energy(self, x, labels=None):
        """Return E = -log p + const, LOWER = likelier, float64 (B,), of images in [-1, 1].

        p is the density of the lowest noise level, 0.0075 on the scale of [-1, 1].
        """
        self.check_labels(labels)
        return density.energy(self, x, labels)

    def ood_scores(self, x, labels=None):
        """Return {name: float32 (B,)}, HIGHER = more like the training data, of images in [-1, 1].

        f: the energy's f at the lowest noise level. f_levels: its mean over all levels, with one
        noise e for all images and levels. grad_norm: minus the norm of f's gradient.
        """
        self.check_labels(labels, "give labels (ood= has none)")
        return density.ood_scores(self, x, labels)

    def log_prob(self, x, labels=None, *, kind, seeds, **options):
        """Return bounds on the log density of images in [-1, 1], in nats, float64 (B,).

        Args:
            kind: ais_lower or ais_upper, see genmodels.methods.cdrl_density.
            seeds: unused: nothing here is random for an image.
            x, labels: as in the base class. options: see LIKELIHOOD_OPTIONS.
        """
        check(kind in self.LIKELIHOODS, "kind", kind, f"choose from {', '.join(self.LIKELIHOODS)}")
        self.check_labels(labels)
        settings = AISOptions(**{k: value for k, value in options.items() if value is not None})
        return density.log_prob(self, x, labels, kind, settings)


def _column(x):
    """Return (B,) as (B, 1, 1, 1)."""
    return x.reshape(-1, 1, 1, 1)


def build_initializer(cfg, shape, classes):
    """Return the network of g(x) - x, (B, C, H, W) -> (B, C, H, W), or None.

    The initializer g(x_t) = x_t + network(x_t, level, label) starts at g(x) = x. Its U-Net is a
    DDPM with scale and shift by the embedding, one attention head of 64 channels, all last
    convolutions at zero: 3.8 M parameters for CIFAR-10.

    Args:
        cfg: CDRLConfig, of which the initializer* keys are read.
        shape: (C, H, W) of the images.
        classes: number of class labels, 0 = unconditional.

    Reference: Zhu, Xie, Wu and Gao 2024, arXiv 2309.05153.
    """
    if cfg.initializer == "none":
        return None
    if cfg.initializer == "mlp":
        return MLP(MLPConfig(width=cfg.initializer_channels), shape, classes, energy=False)
    network = EDMUNetConfig(
        kind="adm",
        channels=cfg.initializer_channels,
        multipliers=cfg.initializer_multipliers,
        blocks=cfg.initializer_blocks,
        attention=cfg.initializer_attention,
        dropout=cfg.initializer_dropout,
        augment=False,
    )
    return EDMUNet(network, shape, classes)
