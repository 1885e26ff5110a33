"""Train a model from a config.

    python train.py CONFIG.yaml [MORE.yaml ...] [key=value ...]     later words win
    python train.py resume=RUN_DIR [trainer.max_steps=...]          go on where it stopped
    python train.py CONFIG.yaml --print                             show the resolved config
    python train.py --help                                          show every key

The last line printed is the run's folder: "run: runs/...". In it: config.yaml, metrics.csv,
samples/, checkpoints/. Ctrl-C saves before it stops (exit code 130).
"""

import logging
import warnings
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from genmodels import checkpoint, cli
from genmodels.config import save_config, to_plain
from genmodels.config.words import check_flags, describe, split_words
from genmodels.data import ImageDataModule
from genmodels.data.patches import NoisyDataModule
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS
from genmodels.training import run as runs
from genmodels.training import selfplay
from genmodels.training.fit import check_machine, fit, restart


def train(argv):
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
    resume = words.pop("resume", None)
    cfg = runs.resumed(Path(resume), paths, words) if resume else runs.fresh(paths, words)
    if "--print" in flags:
        print(OmegaConf.to_yaml(OmegaConf.create(to_plain(cfg))), end="")
        return None
    check_machine(cfg)
    if METHODS[cfg.method.name].NEEDS:  # DDO: rounds against a frozen reference, each of such runs
        return finish(*selfplay.run(cfg, Path(resume) if resume else None))
    data_module = NoisyDataModule if cfg.data.noise.law else ImageDataModule
    data = data_module(cfg.data, cfg.seed, cfg.trainer.accumulate)
    model = checkpoint.build(cfg)
    last = Path(resume or "") / "checkpoints" / "last.ckpt"
    last = last if resume and last.exists() else None
    step = runs.check_same(cfg, last) if last else 0
    fresh = checkpoint.init_weights(model, cfg.init) if cfg.init and not last else []
    prepared = "" if last else model.prepare(data)
    run = Path(resume) if resume else runs.make_folder(cfg)
    if rank_zero_only.rank == 0:
        save_config(cfg, run / "config.yaml")
        print(f"{cfg.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
        for key in fresh:
            print(f"init: {key} starts fresh")
        if prepared:
            print(prepared)
    try:
        trainer = fit(cfg, run, model, data, last, step)
    except FloatingPointError as error:
        raise RuntimeError(
            f"{error}; start again from the last good checkpoint: {restart(cfg, run)}"
        ) from None
    return finish(run, trainer.callbacks[-1].signal)


def finish(run, signal):
    """Print the run's folder, the last line, and return it; Stopped if a signal ended the run."""
    # The other ranks end with 0: a failing child would make the launcher kill this process.
    if rank_zero_only.rank == 0:
        print(f"run: {run}")
        if signal:
            raise cli.Stopped(signal)
    return run


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else, 128 + signal."""
    return cli.run(train, argv)
