"""The schema every experiment shares: dataclasses whose fields are the keys of a config.

A method and a network own their Config beside their class. How YAML and key=value words become
these dataclasses is in genmodels.config.load.
"""

import dataclasses
import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

LARGEST_PAD = 4096  # pixels
PIXELS = ("", "0..1", "-1..1")  # black..white as VAEs are given them


@dataclass(frozen=True)
class Limits:
    """What a setting may be; of a list every item. A bound that is None does not bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[str, ...] = ()
    infinite: bool = False  # whether it may be, where no bound says that it may not

    def finite(self, value: Any) -> bool:
        """Return whether a value is no number without end, and not NaN, or may be infinite."""
        return not isinstance(value, float) or math.isfinite(value) or self.infinite

    def allow(self, value: Any) -> bool:
        """Return whether a single value lies within them; NaN lies within no bound, None in all."""
        return value is None or (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
            and (not self.choices or value in self.choices)
        )

    @property
    def remedy(self) -> str:
        """What an error tells a user who left them."""
        return f"choose from {self}" if self.choices else f"must be {self}"

    def __str__(self) -> str:
        """Return them as words: ">= 1", "in [0, 1)", "center, adm, none"; "" of no limits."""
        if self.choices:
            return ", ".join(self.choices)
        low = self.ge if self.gt is None else self.gt
        high = self.le if self.lt is None else self.lt
        if low is not None and high is not None:
            if math.isinf(high) and self.lt is not None:
                return f"{'>=' if self.gt is None else '>'} {low:g} and finite"
            opening, closing = "[" if self.gt is None else "(", "]" if self.lt is None else ")"
            return f"in {opening}{_number(low)}, {_number(high)}{closing}"
        if low is not None:
            return f"{'>=' if self.gt is None else '>'} {_number(low)}"
        if high is not None:
            return f"{'<=' if self.lt is None else '<'} {_number(high)}"
        return ""


def _number(value: float) -> str:
    """Return a bound as people write it: 2^63 for 9223372036854775808."""
    return "2^63" if value == 2**63 else f"{value:g}"


KINDS: dict[Any, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    float | None: (numbers.Real, "a number"),
}


def setting(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[str] = (),
    infinite: bool = False,
) -> Any:
    """Return a dataclass field with what --help prints and what its value may be.

    Args:
        default: its value where none is given.
        doc: what it means, without the limits, which --help adds.
        ge, gt, le, lt: bounds of a number, or of every item of a list.
        choices: what a word, or every item of a list of words, is chosen from.
        infinite: it may be infinity, as its default may.
    """
    infinite = infinite or default == math.inf
    metadata = {"doc": doc, "limits": Limits(ge, gt, le, lt, tuple(choices), infinite)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check(condition: object, key: str, value: object, remedy: str) -> None:
    """Raise `ValueError("key=value: remedy")` unless the condition holds."""
    if not condition:
        raise ValueError(f"{key}={value}: {remedy}")


@dataclass
class Section:
    """A part of a config, or the options of a command: its settings keep their limits.

    `PREFIX` stands before the names of its settings where a user writes them: "data.".
    """

    PREFIX: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            limits = item.metadata.get("limits")
            if limits is None:
                continue
            value = getattr(self, item.name)
            for part in value if isinstance(value, list) else [value]:
                if kind := KINDS.get(item.type):  # from Python, where words are not read by type
                    fits = isinstance(part, kind[0]) and not isinstance(part, bool)
                    fits |= part is None and item.type == float | None
                    self.check(fits, item.name, f"must be {kind[1]}")
                try:
                    allowed = limits.allow(part)
                except TypeError:
                    allowed = False
                self.check(allowed, item.name, limits.remedy)
                self.check(limits.finite(part), item.name, "must be finite")
                no_text = not isinstance(part, str)
                self.check(no_text or "\0" not in part, item.name, "must hold no NUL character")

    def check(self, condition: object, name: str, remedy: str) -> None:
        """Raise `ValueError("key=value: remedy")` of a setting unless the condition holds."""
        check(condition, f"{self.PREFIX}{name}", getattr(self, name), remedy)


@dataclass
class NoiseConfig(Section):
    """The noise of pictures to train a denoiser on (method noise2score)."""

    PREFIX = "data.noise."

    law: str = setting(
        "",
        "gaussian, poisson, gamma, exponential, rayleigh, nakagami, inverse_gaussian or lognormal; "
        "docs/noise2score.md explains them",
    )
    level: float = setting(
        25.0,
        "in the law's unit: gaussian sigma of 255, poisson zeta, gamma k; "
        "copies=given: 0 estimates it for each picture",
        ge=0,
    )
    level_max: float = setting(0.0, "levels are drawn evenly in log from level to here; 0: one")
    copies: str = setting(
        "fixed",
        "fixed: one noisy copy of each picture; fresh: new noise each time; given: the pictures "
        "are noisy themselves",
        choices=("fixed", "fresh", "given"),
    )
    target: str = setting(
        "none",
        "for baselines: clean, or second: another noisy copy",
        choices=("none", "clean", "second"),
    )
    scale: str = setting(
        "auto",
        "copies=given: what the network sees as black and white: quantiles .1 and 99.9 % of all "
        "pictures, or file: by their type; auto: quantiles for 16 bits and floats "
        "if level=0",
        choices=("auto", "quantiles", "file"),
    )
    black: list[float] = setting(
        [], "copies=given: told in place of scale; one, or one for each channel of a stack"
    )
    white: list[float] = setting([], "the same")

    def __post_init__(self):
        super().__post_init__()
        given = self.copies == "given"
        self.check(self.level > 0 or given, "level", "must be > 0")
        self.check(
            self.level_max == 0 or self.level_max > self.level > 0,
            "level_max",
            f"must be over data.noise.level={self.level}, or 0",
        )
        self.check(
            not given or (self.target == "none" and not self.level_max),
            "copies",
            "knows no target and no level_max",
        )
        for key in ("scale", "black", "white"):
            self.check(given or getattr(self, key) in ("auto", []), key, "needs copies=given")


@dataclass
class VAEConfig(Section):
    """What data.name=latents were encoded with; of pictures all of it is empty."""

    PREFIX = "data.vae."

    name: str = setting(
        "",
        "what decodes: a folder, or OWNER/NAME on the hub, of diffusers' AutoencoderKL; empty: "
        "what encoded",
    )
    pixels: str = setting(
        "", "black..white as the VAE was given them; filled in from the data", choices=PIXELS
    )
    mean: list[float] = setting(
        [], "of each channel of the VAE's latents z; filled in from the data"
    )
    std: list[float] = setting(
        [], "likewise; the model sees (z - mean) / (2 std); filled in from the data", gt=0
    )

    def __post_init__(self):
        super().__post_init__()
        self.check(
            len(self.std) == len(self.mean), "std", f"must be as many as data.vae.mean={self.mean}"
        )
        self.check(
            bool(self.pixels) == bool(self.mean), "pixels", "goes with data.vae.mean and std"
        )


# The latents of Stable Diffusion 1's VAEs on ImageNet, as EDM2 takes them.
EDM2_VAE = VAEConfig(
    name="stabilityai/sd-vae-ft-mse",
    pixels="0..1",
    mean=[5.81, 3.25, 0.12, -2.15],
    std=[4.17, 4.62, 3.71, 3.28],
)


@dataclass
class DataConfig(Section):
    """What the model is trained on."""

    PREFIX = "data."

    name: str = setting("digits", "data set: see python -m genmodels.data --help")
    root: str = setting("", "folder or file of the data; empty: $GENMODELS_DATA, else ./data")
    download: bool = setting(False, "fetch a missing public set (or one of hf)")
    batch_size: int = setting(256, "images per optimizer step over all devices together", ge=1)
    labels: bool = setting(False, "use the class labels: trains a class-conditional model")
    resolution: int = setting(
        0, "pictures: crop and resize to this side; 0: all have one size", ge=0
    )
    crop: str = setting(
        "center",
        "pictures: lanczos is as EDM's sets, adm as ADM's and EDM2's",
        choices=("center", "lanczos", "adm", "none"),
    )
    channels: int = setting(0, "pictures: 1 grey, 3 colour; 0 means 3")
    pad: int = setting(
        0, "background pixels added on each side (MNIST to 32x32: 2)", ge=0, le=LARGEST_PAD
    )
    flip: bool = setting(False, "mirror every second training image at random")
    balanced: bool = setting(False, "draw every class equally often")
    pairs: bool = setting(False, "keep training images 2k and 2k + 1 next to each other")
    holdout: float = setting(0.05, "own data without a test part: share held out", ge=0, lt=1)
    points: int = setting(
        10_000, "2-D toys: training points (a fifth as many are held out)", ge=1, le=10**8
    )
    source: str = setting(
        "", "interpolant: data set that its paths begin at, in place of noise (image to image)"
    )
    source_root: str = setting("", "folder or file of data.source; empty: as data.root")
    device: str = setting(
        "auto", "where the uint8 images live", choices=("auto", "cpu", "cuda", "disk")
    )
    workers: int = setting(2, "data.device=disk: processes that read ahead; 0: none", ge=0)
    patch: int = setting(0, "noise2score: side of the patches cut from pictures of any size", ge=0)
    scenes: int = setting(
        0, "noise2score: drawn pictures of smooth spots and lines beside those of the set", ge=0
    )
    axes: str = setting(
        "",
        "copies=given: what the dimensions of stacks are, TZCYX say, in place of what the files "
        "say",
    )
    leave_out: list[str] = setting(
        [], "pictures: names, without folder and ending, of those that are not read"
    )
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    shape: list[int] = setting([], "(C, H, W); filled in from the data")
    classes: int = setting(-1, "number of classes; filled in from the data")
    present: list[int] = setting(
        [], "classes that are drawn where others have no training image; filled in from the data"
    )
    fingerprint: str = setting(
        "",
        "of the training images, filled in; a resumed run refuses others unless it says "
        "data.fingerprint=new",
    )

    def __post_init__(self):
        super().__post_init__()
        self.check(self.channels in (0, 1, 3), "channels", "must be 0, 1 or 3")
        self.check(
            not (self.pairs and self.balanced), "pairs", "does not go with data.balanced=true"
        )
        self.check(self.source or not self.source_root, "source_root", "needs data.source=NAME")
        self.check(
            self.patch or not self.noise.law,
            "patch",
            f"must be > 0 with data.noise.law={self.noise.law}",
        )
        self.check(
            not self.scenes or (self.noise.law and self.noise.copies != "given"),
            "scenes",
            "needs data.noise.law= and copies=fixed or fresh",
        )
        self.check(
            not self.axes or (self.noise.law and self.noise.copies == "given"),
            "axes",
            "needs data.noise.law= and copies=given",
        )


@dataclass
class OptimConfig(Section):
    """Adam.

    rampup and decay make a factor on lr: GenerativeModule.lr_factor in genmodels/methods/base.py.
    """

    PREFIX = "optim."

    lr: float = setting(1e-3, "learning rate", gt=0, lt=math.inf)
    betas: list[float] = setting([0.9, 0.999], "Adam's two decay rates", ge=0, lt=1)
    eps: float = setting(1e-8, "Adam's epsilon", gt=0)
    weight_decay: float = setting(0.0, "decoupled weight decay (AdamW) if not 0", ge=0)
    rampup: int = setting(0, "images over which lr rises linearly from 0", ge=0)
    decay: str = setting(
        "none",
        "cosine: to 0 at trainer.max_steps; sqrt: as 1 / sqrt(step / t_ref) from step t_ref on",
        choices=("none", "cosine", "sqrt"),
    )
    t_ref: int = setting(0, "decay=sqrt: optimizer steps before lr begins to fall", ge=0)
    clip: float = setting(0.0, "largest gradient norm; 0: no clipping", ge=0)

    def __post_init__(self):
        super().__post_init__()
        self.check(len(self.betas) == 2, "betas", "must be two numbers, e.g. 0.9,0.999")
        if self.decay == "sqrt":
            self.check(self.t_ref, "t_ref", "optim.decay=sqrt needs a number of steps > 0")
        else:
            self.check(not self.t_ref, "t_ref", "goes with optim.decay=sqrt alone")


@dataclass
class EMAConfig(Section):
    """Moving average of the weights: exponential, or with sigma_rel a power function of time."""

    PREFIX = "ema."

    half_life: float = setting(500_000.0, "half-life in images; 0 keeps the raw weights", ge=0)
    rampup: float = setting(
        0.05, "half-life is at most this share of the images seen; 0: no limit", ge=0
    )
    sigma_rel: list[float] = setting(
        [],
        "in place of half_life: relative widths of EDM2's averages; the first is the model, two "
        "(0.05,0.10) give any other width afterwards",
        gt=0,
        lt=12**-0.5,
    )
    snapshot: int = setting(
        -1,
        "sigma_rel: images between the files that other widths are made of; 0: none, "
        "-1: a 64th of the training",
        ge=-1,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sigma_rel:
            self.check(
                self.half_life in (0, EMAConfig.half_life) and self.rampup in (0, EMAConfig.rampup),
                "half_life",
                "does not go with ema.sigma_rel, nor does ema.rampup; use 0 for both",
            )
            names = [f"{width:.3g}" for width in self.sigma_rel]
            self.check(
                len(set(names)) == len(names), "sigma_rel", "the widths must differ; leave one out"
            )
        else:
            self.check(self.snapshot == -1, "snapshot", "goes with ema.sigma_rel alone")


@dataclass
class TrainerConfig(Section):
    """How the training runs."""

    PREFIX = "trainer."

    max_steps: int = setting(1000, "optimizer steps", ge=1)
    max_time: str = setting("", "stop and save after this long: 90s, 30m, 8h, 2d or DD:HH:MM:SS")
    accelerator: str = setting("auto", "what computes", choices=("auto", "cpu", "cuda", "mps"))
    devices: int = setting(1, "processes per machine", ge=1)
    num_nodes: int = setting(1, "machines, each with `devices` processes (torchrun, srun)", ge=1)
    strategy: str = setting(
        "auto", "how more devices share the work", choices=("auto", "ddp", "ddp_fork", "ddp_spawn")
    )
    precision: str = setting(
        "32-true",
        "bf16-mixed needs native bf16; 16-mixed is for network.name=edm2_unet",
        choices=("32-true", "bf16-mixed", "16-mixed"),
    )
    accumulate: int = setting(1, "micro-batches per optimizer step", ge=1)
    compile: bool = setting(False, "torch.compile the network")
    channels_last: bool = setting(False, "NHWC memory format for the network")
    tf32: bool = setting(False, "allow TF32 in matrix products and convolutions")
    log_every: int = setting(50, "steps between lines of metrics.csv", ge=1)
    loggers: list[str] = setting(
        ["csv", "tensorboard"],
        "where metrics go; csv is always among them",
        choices=("csv", "tensorboard", "wandb"),
    )
    progress: bool = setting(True, "show a progress bar")
    max_nonfinite: int = setting(10, "stop after this many skipped steps in a row", ge=1)

    def __post_init__(self):
        super().__post_init__()
        seconds(self.max_time)

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self.num_nodes * self.devices


@dataclass
class CheckpointConfig(Section):
    """What is saved while training."""

    PREFIX = "checkpoint."

    every: int = setting(1000, "optimizer steps between checkpoints", ge=1)
    keep: int = setting(2, "how many step-*.ckpt stay on disk; 0 keeps all", ge=0)
    best: str = setting(
        "", "eval/fd, or another score on the way: the checkpoint with the best stays as best.ckpt"
    )


@dataclass
class SampleConfig(Section):
    """The picture grids made while training, from fixed seeds with the EMA weights."""

    PREFIX = "sample."

    every: int = setting(0, "optimizer steps between grids; 0: none", ge=0)
    num: int = setting(64, "images in a grid, seeds 0..num-1", ge=1)


@dataclass
class EvalConfig(Section):
    """What is measured while training, with the EMA weights."""

    PREFIX = "eval."

    loss_every: int = setting(
        0, "optimizer steps between losses on the held-out split; 0: none", ge=0
    )
    every: int = setting(0, "optimizer steps between metrics of generated images; 0: none", ge=0)
    num: int = setting(1000, "images generated for the metrics", ge=2)
    metrics: list[str] = setting(["fd"], "which metrics (evaluate.py --help lists them)")
    features: str = setting("pixels", "in which feature space")
    weights: str = setting(
        "", "file of weights of eval.features; download: fetch the published one"
    )
    weights_are_code: bool = setting(False, "a TorchScript file in eval.features may run")
    reference: str = setting(
        "",
        "what they are scored against in place of the training images: statistics (.npz, .pkl) or "
        "pictures, as reference= of evaluate.py",
    )

    def unused(self) -> list[str]:
        """Return the settings that are not the default but want eval.every > 0."""
        fixed = {"loss_every", "every"}
        fields = [
            f for f in dataclasses.fields(self) if "doc" in f.metadata and f.name not in fixed
        ]
        default = EvalConfig()
        changed = [f.name for f in fields if getattr(self, f.name) != getattr(default, f.name)]
        return [] if self.every else changed


@dataclass
class Config(Section):
    """One experiment."""

    name: str = setting("", "name of the run's folder; empty: the config file's name")
    seed: int = setting(0, "key of everything random in training", ge=0, lt=2**63)
    out_dir: str = setting("runs", "runs go to OUT_DIR/NAME/TIME")
    init: str = setting(
        "",
        "start from: run, .ckpt, export or one on the hub, diffusers UNet folder",
    )
    data: DataConfig = field(default_factory=DataConfig)
    network: Any = None
    method: Any = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self):
        super().__post_init__()
        self.check(
            "/" not in self.name and self.name != "..",
            "name",
            "must be one folder's name; out_dir says where",
        )
        self.check(len(self.name.encode("utf8", "replace")) <= 200, "name", "is too long")
        parts = self.trainer.processes * self.trainer.accumulate
        words = "" if self.trainer.num_nodes == 1 else "trainer.num_nodes x "
        self.data.check(
            self.data.batch_size % parts == 0,
            "batch_size",
            f"must be a multiple of {words}trainer.devices x accumulate = {parts}",
        )


def settings_of(cls: type[Section], *names: str) -> dict[str, dataclasses.Field]:
    """Return {name: field} of the settings of a section: those named, or all.

    The fields carry type, default, doc and limits, which is all that a command line needs.
    """
    known = {item.name: item for item in dataclasses.fields(cls) if "doc" in item.metadata}
    return {name: known[name] for name in names or known}


def seconds(text: str) -> float:
    """Return the seconds in "90s", "30m", "8h", "2d", "DD:HH:MM:SS" or "HH:MM:SS"; "" is inf."""
    if not text:
        return math.inf
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return float(match[1]) * units[match[2]]
    if re.fullmatch(r"(\d+:)?\d+:\d+:\d+", text):
        parts = [int(part) for part in text.split(":")][::-1]
        return float(sum(n * unit for n, unit in zip(parts, units.values())))
    raise ValueError(f"trainer.max_time={text}: write 90s, 30m, 8h, 2d or DD:HH:MM:SS")


def to_plain(config: Any) -> dict[str, Any]:
    """Return the config as nested dicts of str, int, float, bool and lists (safe to pickle)."""
    return dataclasses.asdict(config)


def to_json(config: Any) -> dict[str, Any]:
    """Return to_plain() without what JSON lacks: an infinity is "inf", which a config may hold."""
    plain: dict[str, Any] = dataclasses.asdict(config, dict_factory=_finite_items)
    return plain


def _finite_items(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: str(v) if isinstance(v, float) and math.isinf(v) else v for key, v in items}
