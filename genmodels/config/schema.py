"""The schema every experiment shares: dataclasses whose fields are the keys of a config.

A method and a network own their Config beside their class. How YAML and key=value words become
these dataclasses is in genmodels.config.load.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any


def setting(default, doc):
    """Return a dataclass field with its documentation (what --help prints)."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


def check(condition, key, value, remedy):
    """Raise `ValueError("key=value: remedy")` unless the condition holds."""
    if not condition:
        raise ValueError(f"{key}={value}: {remedy}")


@dataclass
class NoiseConfig:
    """The noise of pictures to train a denoiser on (method noise2score)."""

    law: str = setting("", "gaussian, poisson, gamma, ...: see python sample.py --help")
    level: float = setting(
        25.0,
        "in the law's unit: gaussian sigma of 255, poisson zeta, gamma k; "
        "copies=given: 0 estimates it for each picture",
    )
    level_max: float = setting(0.0, "levels are drawn evenly in log from level to here; 0: one")
    copies: str = setting(
        "fixed",
        "fixed: one noisy copy of each picture; fresh: new noise each "
        "time; given: the pictures are noisy themselves",
    )
    target: str = setting("none", "none, or for baselines clean, or second: another noisy copy")

    def __post_init__(self):
        choices = {"copies": ("fixed", "fresh", "given"), "target": ("none", "clean", "second")}
        for key, names in choices.items():
            check(
                getattr(self, key) in names,
                f"data.noise.{key}",
                getattr(self, key),
                f"must be {', '.join(names)}",
            )
        check(
            self.level > 0 or self.copies == "given" and self.level == 0,
            "data.noise.level",
            self.level,
            "must be > 0",
        )
        check(
            self.level_max == 0 or self.level_max > self.level > 0,
            "data.noise.level_max",
            self.level_max,
            f"must be over data.noise.level={self.level}, or 0",
        )
        check(
            self.copies != "given" or (self.target == "none" and not self.level_max),
            "data.noise.copies",
            "given",
            "knows no target and no level_max",
        )


@dataclass
class DataConfig:
    """What the model is trained on."""

    name: str = setting("digits", "data set: see python -m genmodels.data --help")
    root: str = setting("", "folder or file of the data; empty: $GENMODELS_DATA, else ./data")
    download: bool = setting(False, "fetch a missing public set (or one of hf)")
    batch_size: int = setting(256, "images per optimizer step over all devices together")
    labels: bool = setting(False, "use the class labels: trains a class-conditional model")
    resolution: int = setting(0, "pictures: crop and resize to this side; 0: all have one size")
    crop: str = setting("center", "pictures: center, adm (as published sets) or none")
    channels: int = setting(0, "pictures: 1 grey, 3 colour; 0 means 3")
    pad: int = setting(0, "background pixels added on each side (MNIST to 32x32: 2)")
    flip: bool = setting(False, "mirror every second training image at random")
    balanced: bool = setting(False, "draw every class equally often")
    pairs: bool = setting(False, "keep training images 2k and 2k + 1 next to each other")
    holdout: float = setting(0.05, "own data without a test part: share held out")
    points: int = setting(10_000, "2-D toys: training points (a fifth as many are held out)")
    device: str = setting("auto", "where the uint8 images live: auto, cpu, cuda or disk")
    workers: int = setting(2, "data.device=disk: processes that read ahead; 0: none")
    patch: int = setting(0, "noise2score: side of the patches cut from pictures of any size")
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    shape: list[int] = setting([], "(C, H, W); filled in from the data")
    classes: int = setting(-1, "number of classes; filled in from the data")

    def __post_init__(self):
        check(self.batch_size >= 1, "data.batch_size", self.batch_size, "must be >= 1")
        check(self.pad >= 0, "data.pad", self.pad, "must be >= 0")
        check(0 <= self.holdout < 1, "data.holdout", self.holdout, "must be in [0, 1)")
        check(self.channels in (0, 1, 3), "data.channels", self.channels, "must be 0, 1 or 3")
        check(
            not (self.pairs and self.balanced),
            "data.pairs",
            self.pairs,
            "does not go with data.balanced=true",
        )
        check(self.points >= 1, "data.points", self.points, "must be >= 1")
        check(
            self.device in ("auto", "cpu", "cuda", "disk"),
            "data.device",
            self.device,
            "must be auto, cpu, cuda or disk",
        )
        check(self.resolution >= 0, "data.resolution", self.resolution, "must be >= 0")
        check(
            self.crop in ("center", "adm", "none"),
            "data.crop",
            self.crop,
            "must be center, adm or none",
        )
        check(self.workers >= 0, "data.workers", self.workers, "must be >= 0")
        check(
            self.patch > 0 or (self.patch == 0 and not self.noise.law),
            "data.patch",
            self.patch,
            f"must be > 0 with data.noise.law={self.noise.law}, else >= 0",
        )


@dataclass
class OptimConfig:
    """Adam."""

    lr: float = setting(1e-3, "learning rate")
    betas: list[float] = setting([0.9, 0.999], "Adam's two decay rates")
    eps: float = setting(1e-8, "Adam's epsilon")
    weight_decay: float = setting(0.0, "decoupled weight decay (AdamW) if not 0")
    rampup: int = setting(0, "images over which lr rises linearly from 0")
    decay: str = setting("none", "none, or cosine: to 0 at trainer.max_steps")
    clip: float = setting(0.0, "largest gradient norm; 0: no clipping")

    def __post_init__(self):
        check(0 < self.lr < math.inf, "optim.lr", self.lr, "must be > 0 and finite")
        check(
            len(self.betas) == 2, "optim.betas", self.betas, "must be two numbers, e.g. 0.9,0.999"
        )
        check(
            all(0 <= beta < 1 for beta in self.betas),
            "optim.betas",
            self.betas,
            "must be in [0, 1)",
        )
        check(self.eps > 0, "optim.eps", self.eps, "must be > 0")
        check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "must be >= 0")
        check(self.rampup >= 0, "optim.rampup", self.rampup, "must be >= 0 images")
        check(self.clip >= 0, "optim.clip", self.clip, "must be >= 0 (0: off)")
        check(self.decay in ("none", "cosine"), "optim.decay", self.decay, "must be none or cosine")


@dataclass
class EMAConfig:
    """Exponential moving average of the weights."""

    half_life: float = setting(500_000.0, "half-life in images; 0 keeps the raw weights")
    rampup: float = setting(0.05, "half-life is at most this share of the images seen; 0: no limit")

    def __post_init__(self):
        check(self.half_life >= 0, "ema.half_life", self.half_life, "must be >= 0 images")
        check(self.rampup >= 0, "ema.rampup", self.rampup, "must be >= 0")


@dataclass
class TrainerConfig:
    """How the training runs."""

    max_steps: int = setting(1000, "optimizer steps")
    max_time: str = setting("", "stop and save after this long: 90s, 30m, 8h, 2d or DD:HH:MM:SS")
    accelerator: str = setting("auto", "auto, cpu, cuda or mps")
    devices: int = setting(1, "processes per machine")
    strategy: str = setting("auto", "auto, ddp, ddp_fork or ddp_spawn (with more devices)")
    precision: str = setting("32-true", "32-true, or bf16-mixed (needs native bf16)")
    accumulate: int = setting(1, "micro-batches per optimizer step")
    compile: bool = setting(False, "torch.compile the network")
    channels_last: bool = setting(False, "NHWC memory format for the network")
    tf32: bool = setting(False, "allow TF32 in matrix products and convolutions")
    log_every: int = setting(50, "steps between lines of metrics.csv")
    loggers: list[str] = setting(["csv", "tensorboard"], "csv (always), tensorboard, wandb")
    progress: bool = setting(True, "show a progress bar")
    max_nonfinite: int = setting(10, "stop after this many skipped steps in a row")

    def __post_init__(self):
        for key in ("max_steps", "devices", "accumulate", "log_every", "max_nonfinite"):
            check(getattr(self, key) >= 1, f"trainer.{key}", getattr(self, key), "must be >= 1")
        check(
            self.precision in ("32-true", "bf16-mixed"),
            "trainer.precision",
            self.precision,
            "must be 32-true or bf16-mixed",
        )
        check(
            self.accelerator in ("auto", "cpu", "cuda", "mps"),
            "trainer.accelerator",
            self.accelerator,
            "must be auto, cpu, cuda or mps",
        )
        choices = ("auto", "ddp", "ddp_fork", "ddp_spawn")
        check(
            self.strategy in choices,
            "trainer.strategy",
            self.strategy,
            f"must be one of {', '.join(choices)}",
        )
        unknown = set(self.loggers) - {"csv", "tensorboard", "wandb"}
        check(not unknown, "trainer.loggers", self.loggers, "may hold csv, tensorboard, wandb")
        seconds(self.max_time)


@dataclass
class CheckpointConfig:
    """What is saved while training."""

    every: int = setting(1000, "optimizer steps between checkpoints")
    keep: int = setting(2, "how many step-*.ckpt stay on disk; 0 keeps all")

    def __post_init__(self):
        check(self.every >= 1, "checkpoint.every", self.every, "must be >= 1")
        check(self.keep >= 0, "checkpoint.keep", self.keep, "must be >= 0 (0 keeps all)")


@dataclass
class SampleConfig:
    """The picture grids made while training, from fixed seeds with the EMA weights."""

    every: int = setting(0, "optimizer steps between grids; 0: none")
    num: int = setting(64, "images in a grid, seeds 0..num-1")

    def __post_init__(self):
        check(self.every >= 0, "sample.every", self.every, "must be >= 0 (0: none)")
        check(self.num >= 1, "sample.num", self.num, "must be >= 1")


@dataclass
class EvalConfig:
    """What is measured while training, with the EMA weights."""

    loss_every: int = setting(0, "optimizer steps between losses on the held-out split; 0: none")
    every: int = setting(0, "optimizer steps between metrics of generated images; 0: none")
    num: int = setting(1000, "images generated for the metrics")
    metrics: list[str] = setting(["fd"], "which metrics (evaluate.py --help lists them)")
    features: str = setting("pixels", "in which feature space")

    def __post_init__(self):
        check(self.every >= 0, "eval.every", self.every, "must be >= 0 (0: none)")
        check(self.loss_every >= 0, "eval.loss_every", self.loss_every, "must be >= 0 (0: none)")
        check(self.num >= 2, "eval.num", self.num, "must be >= 2")


@dataclass
class Config:
    """One experiment."""

    name: str = setting("", "name of the run's folder; empty: the config file's name")
    seed: int = setting(0, "key of everything random in training")
    out_dir: str = setting("runs", "runs go to OUT_DIR/NAME/TIME")
    init: str = setting("", "start from these weights: run, .ckpt, export or diffusers UNet folder")
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
        check(0 <= self.seed < 2**63, "seed", self.seed, "must be in [0, 2^63)")
        check(
            "/" not in self.name and self.name != "..",
            "name",
            self.name,
            "must be one folder's name; out_dir says where",
        )
        parts = self.trainer.devices * self.trainer.accumulate
        check(
            self.data.batch_size % parts == 0,
            "data.batch_size",
            self.data.batch_size,
            f"must be a multiple of trainer.devices x accumulate = {parts}",
        )


def seconds(text):
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


def to_plain(config):
    """Return the config as nested dicts of str, int, float, bool and lists (safe to pickle)."""
    return dataclasses.asdict(config)
