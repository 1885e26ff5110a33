"""The schema every experiment shares, and the one way from YAML and key=value words to dataclasses.

A method and a network own their Config beside their class; `load_config` is handed those classes
as two plain dicts and imports none of them. After `load_config` there are only dataclasses.
"""

import dataclasses
import difflib
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


def setting(default, doc):
    """Return a dataclass field with its documentation (what --help prints)."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


def check(condition, key, value, remedy):
    """Raise `ValueError("key is value: remedy")` unless the condition holds."""
    if not condition:
        raise ValueError(f"{key}={value}: {remedy}")


@dataclass
class NoiseConfig:
    """The noise of pictures to train a denoiser on (method noise2score)."""

    law: str = setting("", "gaussian, poisson, gamma, ...: see python sample.py --help")
    level: float = setting(25.0, "in the law's unit: gaussian sigma of 255, poisson zeta, gamma k; "
                           "copies=given: 0 estimates it for each picture")  # fmt: skip
    level_max: float = setting(0.0, "levels are drawn evenly in log from level to here; 0: one")
    copies: str = setting("fixed", "fixed: one noisy copy of each picture; fresh: new noise each "
                          "time; given: the pictures are noisy themselves")  # fmt: skip
    target: str = setting("none", "none, or for baselines clean, or second: another noisy copy")

    def __post_init__(self):
        choices = {"copies": ("fixed", "fresh", "given"), "target": ("none", "clean", "second")}
        for key, names in choices.items():
            check(getattr(self, key) in names, f"data.noise.{key}", getattr(self, key),
                  f"must be {', '.join(names)}")  # fmt: skip
        check(self.level > 0 or self.copies == "given" and self.level == 0, "data.noise.level",
              self.level, "must be > 0")  # fmt: skip
        check(self.level_max == 0 or self.level_max > self.level > 0, "data.noise.level_max",
              self.level_max, f"must be over data.noise.level={self.level}, or 0")  # fmt: skip
        check(self.copies != "given" or (self.target == "none" and not self.level_max),
              "data.noise.copies", "given", "knows no target and no level_max")  # fmt: skip


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
        check(not (self.pairs and self.balanced), "data.pairs", self.pairs,
              "does not go with data.balanced=true")  # fmt: skip
        check(self.points >= 1, "data.points", self.points, "must be >= 1")
        check(self.device in ("auto", "cpu", "cuda", "disk"), "data.device", self.device,
              "must be auto, cpu, cuda or disk")  # fmt: skip
        check(self.resolution >= 0, "data.resolution", self.resolution, "must be >= 0")
        check(self.crop in ("center", "adm", "none"), "data.crop", self.crop,
              "must be center, adm or none")  # fmt: skip
        check(self.workers >= 0, "data.workers", self.workers, "must be >= 0")
        check(self.patch > 0 or (self.patch == 0 and not self.noise.law), "data.patch", self.patch,
              f"must be > 0 with data.noise.law={self.noise.law}, else >= 0")  # fmt: skip


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
        check(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas,
              "must be in [0, 1)")  # fmt: skip
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
        check(self.precision in ("32-true", "bf16-mixed"), "trainer.precision", self.precision,
              "must be 32-true or bf16-mixed")  # fmt: skip
        check(self.accelerator in ("auto", "cpu", "cuda", "mps"), "trainer.accelerator",
              self.accelerator, "must be auto, cpu, cuda or mps")  # fmt: skip
        choices = ("auto", "ddp", "ddp_fork", "ddp_spawn")
        check(self.strategy in choices, "trainer.strategy", self.strategy,
              f"must be one of {', '.join(choices)}")  # fmt: skip
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
        check("/" not in self.name and self.name != "..", "name", self.name,
              "must be one folder's name; out_dir says where")  # fmt: skip
        parts = self.trainer.devices * self.trainer.accumulate
        check(self.data.batch_size % parts == 0, "data.batch_size", self.data.batch_size,
              f"must be a multiple of trainer.devices x accumulate = {parts}")  # fmt: skip


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


def load_config(sources, overrides=(), *, methods, networks):
    """Return the Config of the merged sources and overrides.

    Args:
        sources: YAML paths and plain dicts, merged left to right.
        overrides: "key=value" strings, applied last.
        methods, networks: name -> class with a `Config` dataclass; `method.name` and
            `network.name` choose from them.

    Raises:
        ValueError: unknown key, wrong type or value, unknown method or network, unreadable file;
            one line that names the key, the value and the remedy.
    """
    values = OmegaConf.create()
    for source in sources:
        source = source if isinstance(source, dict) else _read_yaml(source)
        values = OmegaConf.merge(values, source)
    words = dict(_split_word(word) for word in overrides)
    schema = {}
    for slot, choices in (("method", methods), ("network", networks)):
        section = OmegaConf.select(values, slot)
        check(section is None or OmegaConf.is_dict(section), slot, section,
              f"is a section; set {slot}.KEY")  # fmt: skip
        name = words.get(f"{slot}.name") or OmegaConf.select(values, f"{slot}.name")
        check(name is not None, f"{slot}.name", "", f"is missing; choose {', '.join(choices)}")
        known = isinstance(name, str) and name in choices
        check(known, f"{slot}.name", name, _nearest(str(name), choices))
        schema[slot] = choices[name].Config
    for key, text in words.items():
        OmegaConf.update(values, key, parse_value(key, text, _type_of(key, schema)))
    try:
        plain = OmegaConf.to_container(values, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    _check_types(plain, Config, schema, "")
    structured = OmegaConf.structured(Config)
    for slot in schema:
        structured[slot] = OmegaConf.structured(schema[slot])
    try:
        config = OmegaConf.to_object(OmegaConf.merge(structured, plain))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    if not config.name:
        paths = [source for source in sources if not isinstance(source, dict)]
        config.name = Path(paths[0]).stem if paths else config.method.name
    return config


def to_plain(config):
    """Return the config as nested dicts of str, int, float, bool and lists (safe to pickle)."""
    return dataclasses.asdict(config)


def save_config(config, path):
    """Write the config as YAML that load_config reads back, all or nothing."""
    partial = Path(f"{path}.partial")
    OmegaConf.save(OmegaConf.create(to_plain(config)), partial)
    os.replace(partial, path)


def parse_value(key, text, kind):
    """Return the word's text as the type the schema asks for (never by YAML's guess).

    YAML alone reads 12:30 as 750, 1e-4 as text, 3,5 as text and a bare word as null.
    """
    if kind is str or kind is Any:
        return text
    if get_origin(kind) is list:
        items = text.strip().removeprefix("[").removesuffix("]")
        parts = [item.strip() for item in items.split(",")] if items else []
        return [parse_value(key, part, get_args(kind)[0]) for part in parts]
    if kind is bool:
        choices = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        check(text.lower() in choices, key, text, "must be true or false")
        return choices[text.lower()]
    try:
        return kind(text)
    except ValueError:
        pass
    remedy = "must be a number" if kind is float else "must be a whole number"
    if kind is int and re.fullmatch(r"[\d.]+e\+?\d+", text.lower()) and float(text).is_integer():
        remedy += f"; write {int(float(text))}"
    raise ValueError(f"{key}={text}: {remedy}")


def _read_yaml(path):
    if not Path(path).is_file():
        near = difflib.get_close_matches(Path(path).stem, [p.stem for p in _configs()], 1)
        hint = f"; did you mean configs/{near[0]}.yaml?" if near else ""
        raise ValueError(f"config={path}: no such file{hint}")
    try:
        values = OmegaConf.load(path)
    except Exception as error:  # the YAML reader raises many kinds
        raise ValueError(f"config={path}: not YAML: {' '.join(str(error).split())}") from None
    check(OmegaConf.is_dict(values), "config", path, "must hold key: value pairs")
    return values


def _configs():
    return sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def _split_word(word):
    key, equals, text = word.partition("=")
    check(equals and key, "argument", word, "write key=value")
    return key, text


def _fields(cls, schema, prefix):
    """Return {key: type} of a dataclass; method and network stand for the chosen Config."""
    hints = get_type_hints(cls)
    types = {item.name: hints[item.name] for item in dataclasses.fields(cls)}
    return types | schema if not prefix else types


def _type_of(key, schema):
    cls, prefix = Config, ""
    for part in key.split("."):
        check(dataclasses.is_dataclass(cls), key, "", f"{prefix[:-1]} has no keys of its own")
        types = _fields(cls, schema, prefix)
        check(part in types, f"unknown key {prefix}{part}", "", _nearest(part, types, prefix))
        cls, prefix = types[part], f"{prefix}{part}."
    check(not dataclasses.is_dataclass(cls), key, "", f"is a section; set {key}.KEY=value")
    return cls


def _check_types(values, cls, schema, prefix):
    types = _fields(cls, schema, prefix)
    for name, value in values.items():
        key = f"{prefix}{name}"
        check(name in types, f"unknown key {key}", "", _nearest(str(name), types, prefix))
        kind = types[name]
        if dataclasses.is_dataclass(kind):
            check(isinstance(value, dict), key, value, f"is a section; set {key}.KEY")
            _check_types(value, kind, schema, f"{key}.")
        elif get_origin(kind) is list:
            inner = get_args(kind)[0]
            good = isinstance(value, list) and all(_fits(item, inner) for item in value)
            check(good, key, value, f"must be a list of {inner.__name__}")
        else:
            remedy = f"must be {kind.__name__}" + ("; quote it" if kind is str else "")
            if kind is int and isinstance(value, float) and value.is_integer():
                remedy += f"; write {int(value)}"
            check(_fits(value, kind), key, value, remedy)


def _fits(value, kind):
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _nearest(name, choices, prefix=""):
    near = difflib.get_close_matches(name, list(choices), 1)
    hint = f"did you mean {prefix}{near[0]}? " if near else ""
    return f"{hint}choose from {', '.join(choices)}"
