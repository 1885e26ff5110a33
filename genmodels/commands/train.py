"""Train a model from a config.

    python train.py CONFIG.yaml [MORE.yaml ...] [key=value ...]     later files win, then words
    python train.py resume=RUN_DIR [trainer.max_steps=...]          go on where it stopped
    python train.py CONFIG.yaml --print                             show the resolved config
    python train.py --help                                          show every key

CONFIG.yaml is a file or the name of a config that comes along: edm_digits.
The last line printed is the run's folder: "run: runs/...". In it: config.yaml, metrics.csv,
samples/, checkpoints/. Ctrl-C saves before it stops (exit code 130); so do SIGTERM and SIGHUP.
"""

import contextlib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from genmodels import checkpoint, cli
from genmodels.config import Config, save_config, to_plain
from genmodels.config.words import check_flags, describe, split_words
from genmodels.data import ImageDataModule
from genmodels.data.patches import NoisyDataModule
from genmodels.distributed import is_first
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS
from genmodels.run import Run
from genmodels.training import selfplay
from genmodels.training.fit import check_machine, fit, restart
from genmodels.training.judge import check_best, check_scores
from genmodels.training.resume import check_same, new_config, resumed_config


def train(argv: Sequence[str]) -> Path | None:
    """Run one training and return the run's folder; see the module's docstring.

    Raises:
        cli.Stopped: a signal ended the run early (after saving).
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its tips and device table
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # inside Lightning
    paths, words, flags = split_words(argv)
    check_flags(flags, ("--help", "--print"))
    if "--help" in flags or not argv:
        print(f"{__doc__.strip()}\n{describe(METHODS, NETWORKS)}")
        return None

    resume = words.pop("resume", "")
    if resume and paths:
        raise ValueError(f"config={paths[0]}: resume={resume} brings its own config; leave it out")
    run = Run.open(resume) if resume else None
    with cli.warnings_as_notes(late=True):
        cfg = resumed_config(run, words) if run else new_config(paths, words)
    if "--print" in flags:
        print(OmegaConf.to_yaml(OmegaConf.create(to_plain(cfg))), end="")
        return None
    check_machine(cfg)
    if METHODS[cfg.method.name].NEEDS:  # DDO: rounds against a frozen reference, each of such runs
        return finish(*selfplay.play(cfg, run))

    with contextlib.ExitStack() as stack:
        if run:
            stack.enter_context(run.lock())
        return train_one(cfg, run, stack)


def train_one(cfg: Config, run: Run | None, stack: contextlib.ExitStack) -> Path:
    """Train, from the beginning or from a run's last checkpoint, and return the run's folder.

    Args:
        cfg: the whole Config.
        run: to go on with, locked; None: a new one.
        stack: holds the lock of a new one until the end.
    """
    data_module = NoisyDataModule if cfg.data.noise.law else ImageDataModule
    with cli.warnings_as_notes(late=True):
        data = data_module(cfg.data, cfg.seed, cfg.trainer.accumulate)
    checkpoint.check_size(cfg)
    model = checkpoint.build(cfg)
    plan_scores(cfg, model, data)
    with cli.warnings_as_notes(late=True):
        step, start = check_same(cfg, run) if run else (0, None)
    fresh = checkpoint.init_weights(model, cfg.init) if cfg.init and not step else []
    prepared = "" if step else model.prepare(data)
    if run is None:
        run = Run.new(cfg)
        if is_first():
            stack.enter_context(run.lock())
    try:
        if is_first():
            save_config(cfg, run.config)
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            print(f"{cfg.name}: {millions:.2f} M parameters")
            for key in fresh:
                print(f"init: {key} starts fresh")
            if prepared:
                print(prepared)
            if step == cfg.trainer.max_steps:
                print(f"all {step} steps are done; trainer.max_steps= asks for more")
        ended = fit(cfg, run, model, data, step, start=start)
    except FloatingPointError as error:
        raise RuntimeError(
            f"{error}; start again from the last good checkpoint: {restart(cfg, run)}"
        ) from None
    except BaseException as error:
        if str(run.folder) not in str(error):  # a remedy would start from it
            run.discard()
        raise
    return finish(run, ended.signal)


def plan_scores(cfg: Config, model: Any, data: ImageDataModule) -> None:
    """Check the scores that are to be made on the way, and add what tells a copier.

    Raises:
        ValueError: scores that cannot be had, or that checkpoint.best cannot choose by.
    """
    check_best(cfg)
    if not cfg.eval.every:
        if (unused := cfg.eval.unused()) and is_first():
            print(f"note: eval.{unused[0]}= is not used: eval.every=0 scores nothing on the way")
        return
    if model.MEMORISES and "memorised" not in cfg.eval.metrics:
        cfg.eval.metrics = [*cfg.eval.metrics, "memorised"]
    check_scores(cfg.eval, data, "train")


def finish(run: Run, signal: int) -> Path:
    """Print the run's folder, the last line, and return it; Stopped if a signal ended the run."""
    # The other ranks end with 0: a failing child would make the launcher kill this process.
    if is_first():
        print(f"run: {run.folder}")
        if signal:
            raise cli.Stopped(signal)
    return run.folder


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else, 128 + signal."""
    return cli.run(train, argv)
