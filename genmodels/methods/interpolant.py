"""Stochastic interpolants: flows and diffusions between noise and data, or between two data sets.

    x_t = alpha(t) x_0 + beta(t) x_1 + gamma(t) z,   x_0 noise or an image of data.source,
                                                     x_1 data, coupled; z ~ N(0, I); t in (0, 1)
    L = sum over method.learns of E | field(x_t, t) - target |^2

    learns     b                         v                      eta    s            denoiser
    target     alpha' x_0 + beta' x_1    alpha' x_0 + beta' x_1  z      -z / gamma   x_1
               + gamma' z

Each is the mean of its target given x_t; antithetic averages the loss over z and -z, which takes
away the variance that gamma' and 1 / gamma have near the ends. The paths, what follows from which
fields, and the samplers stand in genmodels/sampling/interpolant.py. Flow matching and rectified
flow are path=one_sided_linear, learns=b; EDM in these clothes is learns=denoiser.

Reference: Albergo, Boffi and Vanden-Eijnden 2023, "Stochastic interpolants: a unifying framework
for flows and diffusions", arXiv 2303.08797; Lipman et al. 2023, arXiv 2210.02747 (flow matching).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genmodels import config, images, seeding
from genmodels.config import Section, check, setting, settings_of
from genmodels.data.sets import load_source, load_split
from genmodels.data.source import read_source
from genmodels.kernels.broadcast import over_items
from genmodels.kernels.philox import philox_normal
from genmodels.methods.base import Batch, Callback, GenerativeModule, Labels
from genmodels.methods.composed import training_labels
from genmodels.methods.edm import EDM, EDMConfig
from genmodels.networks import NETWORKS
from genmodels.networks.precond import PRECONDS, time_code
from genmodels.sampling.coupling import couple
from genmodels.sampling.interpolant import (
    DIFFUSIONS,
    GAMMAS,
    GRIDS,
    HEADS,
    PATHS,
    SAMPLERS,
    Coefficients,
    Interpolation,
    sample_path,
    time_grid,
)
from genmodels.sampling.likelihood import FlowOptions, log_normal, ode_log_prob
from genmodels.sampling.posterior import DENOISING, Denoiser
from genmodels.sampling.schedules import state_dtype
from genmodels.seeding import Stream

# Settings that sample() and sample.py may override.
SAMPLING = ("sampler", "steps", "grid", "eps", "diffusion", "last", "guidance")
# Preconditionings of EDM in which a network that learned b is a denoiser.
OF_VELOCITY = {"one_sided_linear": "flow", "one_sided_trig": "trig"}
AT_ANY_SIGMA = tuple(name for name in PRECONDS if name != "iddpm")  # which has a table of levels
# Settings that mean nothing without another: {name: (the other, its value)}.
NEEDED = {
    "logit_mean": ("times", "logit_normal"),
    "logit_std": ("times", "logit_normal"),
    "precond": ("learns", ["denoiser"]),
    "sigma_data": ("learns", ["denoiser"]),
}


@dataclass
class InterpolantConfig(Section):
    """Stochastic interpolants and flow matching (Albergo et al. 2023, arXiv 2303.08797)."""

    PREFIX = "method."

    name: str = setting("interpolant", "")
    path: str = setting(
        "one_sided_linear", "from x_0 to x_1 (one_sided: x_0 is the path's noise)", choices=PATHS
    )
    gamma: str = setting("zero", "noise on the way, of a path that has two sides", choices=GAMMAS)
    gamma_a: float = setting(
        1.0, "factor on gamma^2: a of the paper's sqrt(a t (1 - t))", gt=0, lt=math.inf
    )
    learns: list[str] = setting(
        ["b"],
        "fields: one_sided: one of b, eta, s, denoiser; mirror: eta or s; else b (an ODE), or b or "
        "v with eta or s",
        choices=HEADS,
    )
    antithetic: bool = setting(False, "average the loss over z and -z; twice the cost")
    coupling: str = setting(
        "independent",
        "pairs of x_0 and x_1 in a batch (ot: optimal transport, within classes)",
        choices=("independent", "ot"),
    )
    times: str = setting(
        "uniform",
        "t in training (logit_normal: ln(t / (1 - t)) is normal)",
        choices=("uniform", "logit_normal"),
    )
    logit_mean: float = setting(0.0, "its mean; above 0: nearer to the data")
    logit_std: float = setting(1.0, "its standard deviation", ge=0)
    t_min: float = setting(1e-3, "training and sampling begin here", ge=0, lt=0.5)
    t_max: float = setting(
        0.999, "training ends here, and sampling goes on to the mean of x_1", gt=0.5, le=1
    )
    precond: str = setting("edm", "learns=denoiser: its preconditioning", choices=AT_ANY_SIGMA)
    sigma_data: float = setting(0.5, "learns=denoiser: standard deviation of the data", gt=0)
    label_dropout: float = setting(
        0.0, "share of labels hidden in training (for guidance)", ge=0, le=1
    )
    sampler: str = setting(
        "heun", "an ODE's, or sde (Euler and Maruyama), sde_heun", choices=SAMPLERS
    )
    steps: int = setting(25, "sampling steps, the last to the mean", ge=1)
    grid: str = setting(
        "uniform", "times (cosine: denser at the ends; edm: one_sided)", choices=GRIDS
    )
    eps: float = setting(1.0, "SDE: strength of its noise", ge=0, lt=math.inf)
    diffusion: str = setting("gamma", "SDE: eps(t) over eps", choices=tuple(DIFFUSIONS))
    last: float = setting(0.0, "length of the last step; 0: as the grid has it", ge=0, lt=1)
    guidance: float = setting(1.0, "weight of the label against none; 1 = no guidance")

    def __post_init__(self) -> None:
        super().__post_init__()
        path, plain = self.interpolation, type(self).__dataclass_fields__
        self.check(
            not path.one_sided or self.gamma == "zero", "gamma", f"path={self.path} has its own"
        )
        self.check(path.name != "mirror" or path.noisy, "gamma", "path=mirror needs noise; sin2")
        scaled = path.noisy and not path.one_sided
        self.check(scaled or self.gamma_a == 1, "gamma_a", "goes with method.gamma=")
        self.check(
            path.name != "trig" or path.at(torch.tensor(0.5)).gamma <= 1,
            "gamma_a",
            "path=trig needs gamma <= 1; make it smaller",
        )
        self.check(
            path.learnable(self.learns),
            "learns",
            f"path={self.path} with gamma={self.gamma} cannot be learned by these; see --help",
        )
        for name, (other, value) in NEEDED.items():
            same = getattr(self, name) == plain[name].default or getattr(self, other) == value
            value = value[0] if isinstance(value, list) else value
            self.check(same, name, f"goes with method.{other}={value}")
        self.check(path.noisy or not self.antithetic, "antithetic", "there is no z; use false")
        self.check(
            path.name != "mirror" or self.coupling != "ot", "coupling", "path=mirror pairs nothing"
        )
        regular = self.gamma != "brownian" and self.learns == ["b"]
        self.check(regular or self.t_min > 0, "t_min", "a field is infinite at 0; must be > 0")
        self.check(regular or self.t_max < 1, "t_max", "a field is infinite at 1; must be < 1")
        self.check(
            self.grid != "edm" or (path.one_sided and self.t_min > 0 and self.t_max < 1),
            "grid",
            "needs a one_sided path, t_min > 0 and t_max < 1",
        )
        random = self.sampler.startswith("sde")
        self.check(
            not random
            or path.one_sided
            or (path.noisy and len(self.learns) > (path.name != "mirror")),
            "sampler",
            "an SDE needs the score: learn eta or s as well",
        )
        self.check(
            not random or self.t_max < 1, "t_max", "the score is infinite at 1; must be < 1 for it"
        )
        self.check(
            random or path.name != "mirror",
            "sampler",
            "the ODE of path=mirror leads back to where it began; use sde",
        )
        self.check(
            self.diffusion != "sbdm" or (path.one_sided and self.t_min > 0),
            "diffusion",
            "needs a one_sided path and t_min > 0",
        )
        self.check(
            self.diffusion != "sbdm" or self.grid != "uniform",
            "diffusion",
            "is strong at first, too strong for grid=uniform; use grid=edm or cosine as well",
        )

    @property
    def interpolation(self) -> Interpolation:
        """The path."""
        return Interpolation(self.path, self.gamma, self.gamma_a)


@dataclass
class SourceOptions(Section):
    """What sample() takes beside settings of the config."""

    source: str = setting(
        "", "images to begin at, seed k at image k: a folder, file or NAME[:SPLIT]"
    )


class Fields(nn.Module):
    """Some fields of a path in one raw network: `count` times the channels, in and out."""

    def __init__(self, net: nn.Module, count: int) -> None:
        super().__init__()
        self.net = net
        self.count = count

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the fields one after another, float32 (B, count C, H, W), at times t (B,)."""
        x = x.float()
        return self.net(torch.cat([x] * self.count, dim=1), time_code(t.float()), labels).float()


class Interpolant(GenerativeModule):
    """Stochastic interpolants; cfg.method is an InterpolantConfig."""

    Config = InterpolantConfig
    OF_WEIGHTS = ("path", "gamma", "gamma_a", "learns", "precond", "sigma_data")
    LABEL_DROPOUT = True
    SOURCES = True
    LATENTS = True
    BY_PROCESS = ("pairs of method.coupling=ot",)
    SAMPLE_OPTIONS = settings_of(InterpolantConfig, *SAMPLING) | settings_of(SourceOptions)
    LIKELIHOODS = ("ode",)
    LIKELIHOOD_OPTIONS = settings_of(FlowOptions)
    SOLVERS = DENOISING

    def __init__(self, cfg: config.Config) -> None:
        super().__init__(cfg)
        method = cfg.method
        method.check(
            method.guidance == 1 or (self.classes and self.unlabelled),
            "guidance",
            "needs a conditional model (data.labels=true, method.label_dropout=0.1)",
        )
        check(
            not NETWORKS[cfg.network.name].ENCODER,
            "network.name",
            cfg.network.name,
            "needs a network that makes images: unet, edm_unet, mlp_map",
        )
        self.path = method.interpolation
        alone = self.path.one_sided or self.path.name == "mirror"
        cfg.data.check(
            not (cfg.data.source and alone),
            "source",
            f"method.path={method.path} begins elsewhere; use linear, trig or encdec",
        )
        cfg.data.check(
            not (cfg.data.vae.mean and (cfg.data.source or self.path.name == "mirror")),
            "name",
            "latents begin at noise; use a one_sided path, or pictures",
        )
        self.images = bool(cfg.data.source) or self.path.name == "mirror"  # where sampling begins
        if self.images:
            self.LIKELIHOODS = ()  # of an instance: the density of the source is not known
        if not self.path.one_sided:
            self.SOLVERS = ()  # it denoises nothing
        count = len(method.learns)
        shape = (count * self.shape[0], *self.shape[1:])
        raw = NETWORKS[cfg.network.name](cfg.network, shape, self.classes)
        if method.learns == ["denoiser"]:
            self.net = PRECONDS[method.precond](raw, method.sigma_data)
        else:
            self.net = Fields(raw, count)
        self.beginnings: dict[str, Tensor] = {}  # images of a source that sample() has read

    # --------------------------------------------------------------------------------------------
    # Training

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (L, {"loss": L per element, of several fields also each one's}).

        L is summed over pixels and averaged over the batch. The denoiser's squared error has the
        weight of its preconditioning.
        """
        batch = self.as_batch(batch)
        labels = training_labels(self, batch["label"], batch["n"])
        x_t, t, targets = self._states(batch)
        parts = [
            error.mean()
            for error in self._errors(self.known(x_t, t, self._twice(labels)), t, targets)
        ]
        loss, size = sum(parts[1:], parts[0]), math.prod(self.shape)
        logs = {"loss": loss.detach() / size}
        if len(parts) > 1:
            names = (f"loss_{name}" for name in self.cfg.method.learns)
            logs |= dict(zip(names, (part.detach() / size for part in parts)))
        return loss, logs

    def _twice(self, values: Tensor | None) -> Tensor | None:
        """Return values of a batch as often as its images are in it."""
        both = self.cfg.method.antithetic and values is not None
        return torch.cat([values, values]) if both else values

    def _states(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (x_t, t, targets) of training images n, each with z and -z if antithetic."""
        x, n, path, seed = batch["image"], batch["n"], self.path, self.cfg.seed
        cfg = self.cfg.method

        def draw(stream: Stream) -> Tensor:
            return philox_normal(self.shape, seed, n, stream=int(stream), device=x.device)

        t = self._times(n)
        x0, z = x, x  # with factors of 0, unless:
        if path.one_sided:
            z = draw(Stream.NOISE)
        else:
            if path.noisy:
                z = draw(Stream.PAIR)
            if self.cfg.data.source:
                check(
                    "source" in batch, "batch", sorted(batch), 'needs "source", images like image'
                )
                x0 = batch["source"]
            elif path.name != "mirror":
                x0 = draw(Stream.NOISE)
        if cfg.coupling == "ot":
            order = couple(z if path.one_sided else x0, x, batch["label"] if self.classes else None)
            x0, z = (x0, z[order]) if path.one_sided else (x0[order], z)
        c = path.at(over_items(t, x))
        states, targets = [], []
        for noise in (z, -z) if cfg.antithetic else (z,):
            states.append(c.alpha * x0 + c.beta * x + c.gamma * noise)
            targets.append(path.targets(c, x0, x, noise))
        joined = {name: torch.cat([part[name] for part in targets]) for name in cfg.learns}
        return torch.cat(states), torch.cat([t] * len(states)), joined

    def _times(self, n: Tensor) -> Tensor:
        """Return t of training images n, float32 (B,)."""
        cfg, seed, stream = self.cfg.method, self.cfg.seed, Stream.SIGMA
        if cfg.times == "uniform":
            return cfg.t_min + (cfg.t_max - cfg.t_min) * seeding.uniform(seed, n, stream)
        z = philox_normal((), seed, n, stream=int(stream), device=n.device)
        return (cfg.logit_mean - cfg.logit_std * z).sigmoid().clamp(cfg.t_min, cfg.t_max)

    def _errors(
        self, known: Mapping[str, Tensor], t: Tensor, targets: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Return the squared error of each field that is learned, (B,), summed over pixels."""
        errors = [
            (known[name] - targets[name]).square().sum(dim=(1, 2, 3))
            for name in self.cfg.method.learns
        ]
        if "denoiser" in known:
            errors = [self.net.loss_weight(self._sigma(t)) * errors[0]]
        return errors

    def _sigma(self, t: Tensor) -> Tensor:
        """Return EDM's noise level gamma / beta at time t of a one-sided path."""
        c = self.path.at(t)
        return c.gamma / c.beta

    def known(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return {name: field} of what the network learned, float32 like x, at times t (B,)."""
        labels = labels if self.classes else None
        if self.cfg.method.learns == ["denoiser"]:
            beta = over_items(self.path.at(t).beta, x)
            return {"denoiser": self.net(x / beta, self._sigma(t), labels)}
        fields = self.net(x, t, labels).split(self.shape[0], dim=1)
        return dict(zip(self.cfg.method.learns, fields))

    def log_ratio(
        self, batch: Batch, reference: GenerativeModule
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (Delta, {"flow_loss": L per element}), float32 (B,) each; see GenerativeModule.

        Of a one-sided path. Delta = -(L(x) - L_ref(x)) for one draw of t and z: a difference of
        evidence bounds but for the weight of t, as with EDM. (The bound has beta / (gamma W) times
        the squared error of b.) With fields a and a_ref of target y it is summed as
        (a - a_ref)(a + a_ref - 2 y), pixel by pixel.

        Raises:
            ValueError: a path with two sides, whose loss bounds no density.
        """
        path = self.cfg.method.path
        check(self.path.one_sided, "method.path", path, "has no log-ratio; use a one_sided path")
        x_t, t, targets = self._states(batch)
        labels = self._twice(batch["label"])
        (name,) = self.cfg.method.learns
        a = self.known(x_t, t, labels)[name]
        with torch.no_grad():
            b = reference.known(x_t, t, labels)[name]
        delta = -((a - b) * (a + b - 2 * targets[name])).sum(dim=(1, 2, 3))
        if name == "denoiser":
            delta = self.net.loss_weight(self._sigma(t)) * delta
        (error,) = self._errors({name: a.detach()}, t, targets)
        count = len(batch["n"])  # z and -z of an image stand this far apart
        delta, error = (row.reshape(-1, count).mean(dim=0) for row in (delta, error))
        return delta, {"flow_loss": error / math.prod(self.shape)}

    # --------------------------------------------------------------------------------------------
    # Fields

    def velocity(self, x: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Return b(x, t), float32 (B, C, H, W), of states at times t in [t_min, t_max].

        Args:
            x: states, (B, C, H, W). t: a scalar or (B,). labels: int64 (B,), -1 = none.

        Raises:
            ValueError: labels the model does not have, a time outside.
        """
        t, c, known = self._asked(x, t, labels)
        return self.path.velocity(c, x, known)

    def path_score(self, x: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Return s(x, t) = grad log rho_t(x), like x; arguments as for velocity.

        Raises:
            ValueError: as velocity; a model that learned b alone of a path with two sides.
        """
        learns = self.cfg.method.learns
        known = self.path.one_sided or {"eta", "s"} & set(learns)
        check(known, "method.learns", learns, "does not give the score; learn eta or s as well")
        t, c, fields = self._asked(x, t, labels)
        return self.path.score(c, x, fields)

    def _asked(
        self, x: Tensor, t: Tensor | float, labels: Tensor | None
    ) -> tuple[Tensor, Coefficients, dict[str, Tensor]]:
        """Return (t (B,), coefficients, fields) of what a user asks for."""
        self.check_labels(labels)
        self.check_finite(x)
        cfg = self.cfg.method
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        inside = ((t >= cfg.t_min - 1e-6) & (t <= cfg.t_max + 1e-6)).all()
        check(inside, "t", "", f"must be in [{cfg.t_min:g}, {cfg.t_max:g}], t_min to t_max")
        labels = None if labels is None else labels.to(x.device)
        return t, self.path.at(over_items(t, x)), self.known(x, t, labels)

    def denoise(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Return EDM's D(x; sigma), the expected clean image, float32 (B, C, H, W).

        Of a one-sided path: D is E[x_1 | x_t = beta x] at the time when gamma / beta is sigma.
        Arguments as for EDM.denoise.

        Raises:
            ValueError: labels the model does not have, a sigma or pixels that are not finite, a
                path with two sides.
        """
        path = self.cfg.method.path
        check(self.path.one_sided, "method.path", path, "denoises nothing; use a one_sided path")
        self.check_labels(labels)
        self.check_finite(x, sigma)
        labels = None if labels is None else labels.to(x.device)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        return self._denoised(x, sigma, labels)

    def _denoised(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return denoise() of noise levels (B,); samplers do not look at each state."""
        t = self.path.time_of(sigma)
        c = self.path.at(over_items(t, x))
        x = c.beta * x
        return self.path.mean(c, x, self.known(x, t, labels))

    def denoiser(self, labels: Tensor | None = None) -> Denoiser:
        """Return EDM's D(x; sigma) as solve() takes it; see GenerativeModule.denoiser."""
        cfg = self.cfg.method
        ends = torch.tensor([cfg.t_max, max(cfg.t_min, 1e-3)], dtype=torch.float64)
        low, high = self._sigma(ends.clamp(max=0.999)).tolist()

        def call(x: Tensor, sigma: float) -> Tensor:
            self.nfe += 1
            level = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
            return self._denoised(x, level, labels)

        return Denoiser(
            call,
            low,
            min(high, EDMConfig.sigma_max),  # where EDM begins, nothing of the data is left
            cfg.sigma_data,
            begin=lambda z, sigma: sigma * z,
        )

    def score(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """Return EDM's score of the noisy density, (D(x; sigma) - x) / sigma^2."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        return (self.denoise(x, sigma, labels) - x) / over_items(sigma, x) ** 2

    # --------------------------------------------------------------------------------------------
    # To and from EDM: the same weights, nothing is trained

    @classmethod
    def from_edm(cls, model: EDM, **settings: Any) -> "Interpolant":
        """Return an EDM (or DDO) as an interpolant that learned its denoiser; not precond=iddpm.

        Sampling by sampler=euler grid=edm on one_sided_linear is that of EDM's sampler=euler.

        Args:
            model: stays as it is; its weights are copied.
            settings: of InterpolantConfig, path= (a one-sided one), sampler= and so on. t_min and
                t_max are where sigma is the model's sigma_max and sigma_min.
        """
        edm, cfg = model.cfg.method, copy.deepcopy(model.cfg)
        low = max(edm.sigma_min, model.net.sigma_min)
        high = min(edm.sigma_max, model.net.sigma_max)
        path = settings.get("path", InterpolantConfig.path)
        ends = Interpolation(path).time_of(torch.tensor([high, low], dtype=torch.float64))
        t_min, t_max = ends.tolist()
        kept = {name: getattr(edm, name) for name in ("precond", "sigma_data", "label_dropout")}
        cfg.method = InterpolantConfig(
            **{"learns": ["denoiser"], "grid": "edm", "t_min": t_min, "t_max": t_max}
            | {"steps": edm.steps}
            | kept
            | settings
        )
        return _with_weights(cls(cfg), model)

    def to_edm(self, **settings: Any) -> EDM:
        """Return the model as an EDM: its denoiser, of a one-sided path that learned b or it.

        Args:
            settings: of EDMConfig, sampler= and so on. sigma_min and sigma_max are gamma / beta
                at t_max and t_min.

        Raises:
            ValueError: another path, other fields.
        """
        cfg, method = copy.deepcopy(self.cfg), self.cfg.method
        fits = self.path.one_sided and method.learns in (["b"], ["denoiser"])
        check(fits, "method.learns", method.learns, "is no EDM; b or denoiser of a one_sided path")
        ends = torch.tensor([method.t_max, max(method.t_min, 1e-3)], dtype=torch.float64)
        low, high = self._sigma(ends.clamp(max=0.999)).tolist()
        velocity = method.learns == ["b"]
        precond = OF_VELOCITY[method.path] if velocity else method.precond
        cfg.method = EDMConfig(
            **{"precond": precond, "sigma_data": method.sigma_data, "steps": method.steps}
            | {"sigma_min": low, "sigma_max": high, "label_dropout": method.label_dropout}
            | settings
        )
        return _with_weights(EDM(cfg), self)

    # --------------------------------------------------------------------------------------------
    # Sampling and density

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        labels: Labels = None,
        *,
        source: Tensor | str | None = None,
        noise: str = "cpu",
        callback: Callback | None = None,
        **options: Any,
    ) -> Tensor:
        """Return generated images in [-1, 1] (not clipped), float32 (N, C, H, W).

        Image k depends on seeds[k] alone: noise to begin at and class come from its own torch
        generator, an SDE's noise from Philox.

        Args:
            seeds: N whole numbers.
            labels: classes of a conditional model: None (random), one int, or N ints.
            source: images (K, C, H, W) in [-1, 1] that a model with data.source (or path=mirror)
                begins at, or their path; seed k gets image k modulo K. None: the held-out ones of
                its own source.
            noise: device of the generators; "cpu" is the same on every machine.
            callback: called as callback(i, x) after each step.
            options: see SAMPLE_OPTIONS; those left at None come from the model's config.

        Raises:
            ValueError: an option out of range, labels the model does not have, a source that it
                does not begin at.
        """
        cfg = self._sampling_config(options)
        keys = torch.tensor(seeding.checked_seeds(seeds), dtype=torch.int64, device=self.device)
        generators = seeding.ImageGenerators(seeds, noise)
        start = generators.randn(self.shape, device=self.device)
        labels = self.image_labels(generators, labels)
        begin = self._beginning(source)
        if begin is not None:
            start = begin[keys.remainder(len(begin)).to(begin.device)].to(self.device)
        return self._run(start, labels, keys, cfg, callback)

    @torch.no_grad()
    def transport(
        self,
        x: Tensor,
        labels: Labels = None,
        *,
        seeds: Sequence[int] | None = None,
        reverse: bool = False,
        callback: Callback | None = None,
        **options: Any,
    ) -> Tensor:
        """Return where states are carried to, float32 like x: x_0 to x_1, or back by the ODE.

        Args:
            x: (N, C, H, W): images of the source, or its noise; images of the data if reverse.
            labels: classes of a conditional model: one int, or N ints, -1 = none.
            seeds: of an SDE's noise, N whole numbers; None: 0, 1, ...
            reverse: from data to the source.
            callback, options: as for sample.

        Raises:
            ValueError: as sample; an SDE that is to be run backwards.
        """
        cfg = self._sampling_config(options)
        check(not (reverse and cfg.sampler.startswith("sde")), "sampler", cfg.sampler, "an ODE's")
        self.check_finite(x)
        if labels is not None:
            labels = self.given_labels(labels, len(x))
        self.check_labels(labels)
        seeds = seeding.checked_seeds(range(len(x)) if seeds is None else seeds)
        check(len(seeds) == len(x), "seeds", len(seeds), f"give {len(x)}, one for each image")
        keys = torch.tensor(seeds, dtype=torch.int64, device=self.device)
        return self._run(x.to(self.device), labels, keys, cfg, callback, reverse)

    def _run(
        self,
        x: Tensor,
        labels: Tensor | None,
        keys: Tensor,
        cfg: InterpolantConfig,
        callback: Callback | None,
        reverse: bool = False,
    ) -> Tensor:
        """Return the states at the other end; counts self.nfe."""
        times = time_grid(cfg.steps, cfg.grid, cfg.t_min, cfg.t_max, self.path, cfg.last)
        early = self.path.name == "encdec" and times[-2] < 0.75
        check(not early, "steps", cfg.steps, "path=encdec has x_1 after t = 1/2 only; more steps")
        x = x.to(state_dtype(self.device))
        if reverse:
            times = [*times[:-1], cfg.t_max][::-1]
        elif self.path.one_sided:  # its noise, as strong as it is at t_min
            x = x * self._gamma(cfg.t_min)
        self.nfe = 0

        def known(x: Tensor, t: float) -> dict[str, Tensor]:
            return self._guided(x, t, labels, cfg.guidance)

        form = DIFFUSIONS[cfg.diffusion]
        x = sample_path(
            self.path,
            known,
            x,
            times,
            sampler=cfg.sampler,
            eps=lambda t, c: cfg.eps * form(t, c),
            seeds=keys,
            callback=callback,
        )
        if reverse and self.path.one_sided:
            x = x / self._gamma(cfg.t_min)
        return x.float()

    def _gamma(self, t: float) -> float:
        """Return gamma(t)."""
        return float(self.path.at(torch.tensor(t, dtype=torch.float64)).gamma)

    def _guided(
        self, x: Tensor, t: float, labels: Tensor | None, weight: float
    ) -> dict[str, Tensor]:
        """Return the fields at a time, guided with this weight (1 = none); counts self.nfe."""
        self.nfe += 1 if weight == 1 else 2
        x = x.float()
        # A number of the host is filled in on the device, not copied there.
        times = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        if weight == 1:
            return self.known(x, times, labels)
        both = torch.cat([labels, torch.full_like(labels, -1)])
        fields = self.known(torch.cat([x, x]), torch.cat([times, times]), both)
        halves = {name: field.chunk(2) for name, field in fields.items()}
        return {name: none + weight * (own - none) for name, (own, none) in halves.items()}

    def _sampling_config(self, options: dict[str, Any]) -> InterpolantConfig:
        """Return the method's config with the given options in place of its own."""
        cfg = self.method_with(options, SAMPLING)
        for key in ("eps", "diffusion"):
            check(
                options.get(key) is None or cfg.sampler.startswith("sde"),
                key,
                options.get(key),
                f"sampler={cfg.sampler} draws no noise; use sde or sde_heun, or leave it out",
            )
        check(
            cfg.guidance == 1 or self.classes,
            "guidance",
            cfg.guidance,
            "this model is unconditional; leave it out",
        )
        check(
            cfg.guidance == 1 or self.unlabelled,
            "guidance",
            cfg.guidance,
            "no label was hidden in training (method.label_dropout); use 1",
        )
        return cfg

    def _beginning(self, source: Tensor | str | None) -> Tensor | None:
        """Return the images (K, C, H, W) in [-1, 1] that seeds begin at; None: at noise.

        Raises:
            ValueError: a source for a model that begins at noise, or of another shape.
        """
        if not self.images:
            check(not source, "source", source, "this model begins at noise; leave it out")
            return None
        if isinstance(source, Tensor):
            pixels, name = source, tuple(source.shape)
        else:
            name = source or self.cfg.data.source or self.cfg.data.name
            if name not in self.beginnings:
                self.beginnings = {name: self._read(source)}
            pixels = self.beginnings[name]
        fits = pixels.ndim == 4 and tuple(pixels.shape[1:]) == self.shape and len(pixels)
        check(fits, "source", name, f"must be images of shape {self.shape}")
        return pixels if pixels.is_floating_point() else images.from_uint8(pixels)

    def _read(self, source: str | None) -> Tensor:
        """Return the images of a path, or the held-out ones of the model's own source."""
        data = self.cfg.data
        if source:
            found = read_source(source, pad=data.pad, channels=self.shape[0], key="source").pixels
            return found if isinstance(found, Tensor) else found.load()
        if data.source:
            return load_source(data, "test", self.shape)
        pixels, _ = load_split(data, "test")
        return pixels if isinstance(pixels, Tensor) else pixels.load()

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
        """Return log p(x), float64 (B,), along the ODE from t_max down to t_min.

            log rho_1(x) = log rho_0(X_0) - int_0^1 div b(X_t, t) dt

        in RK4 steps that are denser at both ends. See base.log_prob for the arguments and
        LIKELIHOOD_OPTIONS for the others. x is put on the flow at t_max, so the density is that of
        data with the noise of that time; at t_min it meets N(0, alpha^2 + gamma^2).

        Raises:
            ValueError: an option out of range, labels the model does not have, a model whose
                source is a data set.

        Reference: Albergo et al. 2023, arXiv 2303.08797, section 2.5.
        """
        check(
            self.LIKELIHOODS, "data.source", self.cfg.data.source, "its density is not known; none"
        )
        check(kind in self.LIKELIHOODS, "kind", kind, f"choose from {', '.join(self.LIKELIHOODS)}")
        cfg, flow = self.cfg.method, FlowOptions(**options)
        self.check_labels(labels)
        seeds = torch.as_tensor(seeds, device=self.device)
        dtype = state_dtype(self.device)
        ramp = torch.linspace(0, math.pi, flow.steps + 1, dtype=dtype, device=self.device)
        times = cfg.t_min + (cfg.t_max - cfg.t_min) * (1 + ramp.cos()) / 2
        end = self.path.at(torch.tensor(cfg.t_min, dtype=torch.float64)).numbers()

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            fields = self.known(x.float(), t.float().expand(len(x)), labels)
            return self.path.velocity(self.path.at(t), x, fields)

        def signs(i: int) -> Tensor:
            return seeding.signs(seeds, i, flow.probes, self.shape)

        return ode_log_prob(
            velocity,
            x,
            times,
            lambda x: log_normal(x, math.hypot(end.alpha, end.gamma)),
            signs=None if flow.trace == "exact" else signs,
        )


def _with_weights(made: Any, model: GenerativeModule) -> Any:
    """Return a method with the network of another one, on its device, in eval mode."""
    state = {k: v for k, v in model.state_dict().items() if k.startswith("net.")}
    made.load_state_dict(state, strict=True)
    return made.to(model.device).eval()
