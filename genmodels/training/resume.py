"""The config of a run: a new one's, or that of one which goes on, and what it may change."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genmodels.checkpoint import newest_checkpoint, newest_run
from genmodels.checkpoint.hub import fetch
from genmodels.config import Config, check_foreign, load_config, to_plain
from genmodels.config.load import read_yaml
from genmodels.data import check_settings
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS
from genmodels.run import Run
from genmodels.training.saver import read_table
from genmodels.training.start import bring, flat

# What deals a batch out: the run stays what it is, but for what dealt_anew names.
DEVICES = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accelerator",
    "trainer.accumulate",
)
# What a resumed run may change; anything else would be ignored or would make another run of it.
CHANGEABLE = (
    *DEVICES,
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.log_every",
    "trainer.loggers",
    "trainer.progress",
    "checkpoint.",
    "sample.",
    "eval.",
    "ema.snapshot",
    "data.root",
    "data.source_root",
    "data.fingerprint",
    "data.device",
    "data.download",
    "data.workers",
    "data.vae.name",
    "method.rounds",
    "method.retry",
)


def new_config(paths: Sequence[Path | str], words: Mapping[str, str]) -> Config:
    """Return the config of a new run from files, the model of init= and key=value words."""
    if not paths:
        raise ValueError("config=: name a file, e.g. python train.py configs/edm_digits.yaml")
    cfg = _read_config(paths, words, bring)
    check_settings(cfg.data)
    if cfg.init:  # the run that it is today
        cfg.init = str(fetch(cfg.init) or newest_run(cfg.init))
    cfg.data.fingerprint = ""  # of the run whose config this was
    return cfg


def resumed_config(run: Run, words: Mapping[str, str]) -> Config:
    """Return the config of a run that goes on with these key=value words.

    Raises:
        ValueError: a word that changes what the run is.
    """
    for key, text in words.items():
        if not key.startswith(CHANGEABLE):
            raise ValueError(
                f"{key}={text}: cannot change when resuming; start a new run with init={run.folder}"
            )
    check_foreign(read_yaml(run.config))
    old = _read_config([run.config], {})
    cfg = _read_config([run.config], words)
    if cfg.optim.decay == "cosine" and cfg.trainer.max_steps > old.trainer.max_steps:
        raise ValueError(
            f"trainer.max_steps={cfg.trainer.max_steps}: optim.decay=cosine was laid out for "
            f"{old.trainer.max_steps} steps, and lr would rise again; start a new run with "
            f"init={run.folder}"
        )
    if METHODS[cfg.method.name].NEEDS:  # its rounds have no check_same: they are runs of their own
        warn_of_dealing(flat(to_plain(old)), cfg)
    return cfg


def check_same(cfg: Config, run: Run) -> tuple[int, Path | None]:
    """Return (step, file) of the checkpoint that this config goes on from; (0, None) of none yet.

    Raises:
        ValueError: its config differs in more than a resumed run may change, or the checkpoints are
            lost or damaged.
    """
    if not run.last.exists() and not run.steps():
        check_unsaved(cfg, run)
        return 0, None
    path, saved = newest_checkpoint(run.folder)
    for key in ("optimizer_states", "lr_schedulers", "loops", "global_step"):
        if key not in saved:
            raise ValueError(
                f"resume={path}: holds no {key}, so training cannot go on; start a new run "
                f"with init={path}"
            )
    step = saved["global_step"]
    if cfg.trainer.max_steps < step:
        raise ValueError(
            f"trainer.max_steps={cfg.trainer.max_steps}: {run.folder} has made {step} steps "
            "already; give as many or more"
        )
    rows = read_table(run.metrics, step)  # raises now rather than after a write
    old, new = flat(saved["hyper_parameters"]["config"]), flat(to_plain(cfg))
    for key in new:
        # A key that the checkpoint does not know is younger than it.
        if key in old and new[key] != old[key] and not key.startswith(CHANGEABLE):
            raise ValueError(
                f"{key}={new[key]}: {path} was trained with {old.get(key)}; put that back "
                "into config.yaml, or start a new run with init="
            )
    warn_of_dealing(old, cfg)
    ends = cfg.trainer.max_steps
    if cfg.optim.decay == "cosine" and ends < old["trainer.max_steps"]:
        warnings.warn(
            f"trainer.max_steps={ends}: optim.decay=cosine was laid out for "
            f"{old['trainer.max_steps']} steps; lr drops at step {step} to end sooner",
            stacklevel=2,
        )
    last, every = max(rows, default=0), old["trainer.log_every"]
    if last < step - step % every:
        warnings.warn(
            f"{run.metrics}: the lines after step {last} are missing or cut; it goes on after step "
            f"{step}",
            stacklevel=2,
        )
    return step, path


def check_unsaved(cfg: Config, run: Run) -> None:
    """Raise ValueError if a run without a checkpoint was to have one; else say that it begins anew.

    A line of metrics.csv is written before the checkpoint of its step.
    """
    first = min(cfg.checkpoint.every, cfg.trainer.max_steps)
    step = max(read_table(run.metrics), default=0)
    if step > first:
        raise ValueError(
            f"resume={run.folder}: metrics.csv reaches step {step}, but no checkpoint is there; "
            f"put it back, or start a new run with python train.py {run.config}"
        )
    warnings.warn(f"{run.folder}: no checkpoint yet, training begins anew", stacklevel=2)


def warn_of_dealing(old: Mapping[str, Any], cfg: Config) -> None:
    """Warn of what differs from a run that was not resumed, if its batches are dealt out anew.

    Images, their noise and the order are functions of (seed, n) and stay; sums of gradients are
    rounded otherwise in any case.

    Args:
        old: {"a.b": value} of the config so far.
        cfg: Config that goes on.
    """
    keys = ("trainer.devices", "trainer.num_nodes", "trainer.accumulate", "trainer.accelerator")
    new, old = flat(to_plain(cfg)), {"trainer.num_nodes": 1} | dict(old)
    changed = [key for key in keys if old[key] != new[key]]
    if not changed:
        return
    network = [key for key, value in new.items() if key.endswith("dropout") and value]
    differs = [key for key in network if "label_dropout" not in key]
    if changed != ["trainer.accelerator"]:  # those are keyed by the process and the micro-batch
        differs += METHODS[cfg.method.name].BY_PROCESS
    words = ", ".join(f"{key}={new[key]} (was {old[key]})" for key in changed)
    warnings.warn(
        f"{words}: goes on with the same images and noise; "
        f"{', '.join([*differs, 'rounding'])} will differ from a run that never stopped",
        stacklevel=2,
    )


def _read_config(
    paths: Sequence[Path | str], words: Mapping[str, str], start: Any = None
) -> Config:
    overrides = [f"{key}={text}" for key, text in words.items()]
    return load_config(paths, overrides, methods=METHODS, networks=NETWORKS, bring=start)
