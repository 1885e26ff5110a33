"""Train a model from a config.

    python train.py CONFIG.yaml [MORE.yaml ...] [key=value ...]     later words win
    python train.py resume=RUN_DIR [trainer.max_steps=...]          go on where it stopped
    python train.py CONFIG.yaml --print                             show the resolved config
    python train.py --help                                          show every key

The last line printed is the run's folder: "run: runs/...". In it: config.yaml, metrics.csv,
samples/, checkpoints/. Ctrl-C saves before it stops (exit code 130).
"""

import logging
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from genmodels import callbacks, checkpoint, cli, runs, saving, scoring, selfplay
from genmodels.config import to_plain
from genmodels.config_io import save_config
from genmodels.data import ImageDataModule
from genmodels.methods import METHODS
from genmodels.metrics.features import load_features
from genmodels.networks import NETWORKS
from genmodels.noisy_data import NoisyDataModule


def train(argv):
    """Run one training and return the run's folder; see the module's docstring.

    Raises:
        cli.Stopped: a signal ended the run early (after saving).
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its tips and device table
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # inside Lightning
    paths, words, flags = cli.split_words(argv)
    cli.check_flags(flags, ("--help", "--print"))
    if "--help" in flags or not argv:
        print(f"{__doc__.strip()}\n{cli.describe(METHODS, NETWORKS)}")
        return None
    resume = words.pop("resume", None)
    cfg = runs.resumed(Path(resume), paths, words) if resume else runs.fresh(paths, words)
    if "--print" in flags:
        print(OmegaConf.to_yaml(OmegaConf.create(to_plain(cfg))), end="")
        return None
    check_machine(cfg)
    if METHODS[cfg.method.name].NEEDS:  # DDO: rounds against a frozen reference, each of such runs
        return finish(*selfplay.run(cfg, Path(resume) if resume else None, fit))
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


def fit(cfg, run, model, data, last, step, whole=None):
    """Train from this step on and return the Trainer.

    Args:
        cfg: Config; its trainer.max_steps is where this fit ends.
        run: folder to write to.
        model: the method, untrained if `last` is None.
        data: ImageDataModule.
        last: checkpoint to go on from, or None.
        step: its optimizer step.
        whole: folder of the run that this one is a part of, named by the resume command.

    Raises:
        FloatingPointError: too many non-finite gradients in a row.
    """
    if cfg.trainer.channels_last:
        model.net.to(memory_format=torch.channels_last)
    if cfg.trainer.compile:
        model.net.compile()
    trainer = make_trainer(cfg, run, step, whole)
    with runs.spelled_out(cfg, whole or run):
        trainer.fit(model, datamodule=data, ckpt_path=last, weights_only=True)
    return trainer


def restart(cfg, run):
    """Return the command that goes on after a divergence, with half the learning rate."""
    if hasattr(cfg.method, "retry"):  # chains: their buffer goes on too, with other noise
        return f"python train.py resume={run} method.retry={cfg.method.retry + 1}"
    lr = cfg.optim.lr / 2
    return f"python train.py {run}/config.yaml init={run}/checkpoints/last.ckpt optim.lr={lr:g}"


def check_machine(cfg):
    """Raise ValueError for what this machine lacks, before anything is written."""
    if cfg.trainer.accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=cuda: no CUDA device here; use auto or cpu")
    if cfg.trainer.accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("trainer.accelerator=mps: no MPS device here; use auto or cpu")
    if "wandb" in cfg.trainer.loggers and find_spec("wandb") is None:
        raise ValueError("trainer.loggers=wandb: not installed; pip install wandb")
    if cfg.eval.every:
        scoring.expand(cfg.eval.metrics)
        load_features(cfg.eval.features)


def make_trainer(cfg, run, step, whole=None):
    """Return the Lightning Trainer of a run that starts at this step; arguments as for fit."""
    options = cfg.trainer
    loggers = [saving.CSVMetrics(run / "metrics.csv", step)]
    if "tensorboard" in options.loggers:
        loggers.append(TensorBoardLogger(run, name="", version="", purge_step=step or None))
    if "wandb" in options.loggers:
        from lightning.pytorch.loggers import WandbLogger

        # The same id on resume goes on in the same curves.
        name = f"{cfg.name}-{run.name}"
        loggers.append(
            WandbLogger(name=name, id=name, resume="allow", project=cfg.name, save_dir=run)
        )
    extras = [callbacks.MatrixPrecision(options.tf32), callbacks.Throughput(cfg.data.batch_size)]
    if cfg.ema.half_life:
        extras.append(callbacks.EMA(cfg.ema.half_life, cfg.ema.rampup, cfg.data.batch_size))
    if cfg.sample.every:
        extras.append(callbacks.SampleGrid(run, cfg.sample))
    if cfg.eval.every:
        extras.append(callbacks.GeneratedMetrics(cfg.eval, cfg.seed))
    if options.progress:
        extras.append(callbacks.Progress())
    extras.append(saving.Saver(run, cfg, whole))  # last: see there
    return L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy="ddp" if options.strategy == "auto" and options.devices > 1 else options.strategy,
        precision=checkpoint.usable_precision(options.precision, options.accelerator),
        max_steps=options.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=options.accumulate,
        val_check_interval=max(1, cfg.eval.loss_every) * options.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if cfg.eval.loss_every else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=options.log_every,
        logger=loggers,
        callbacks=extras,
        plugins=[checkpoint.AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=options.progress,
        inference_mode=False,  # samplers differentiate
        use_distributed_sampler=False,
    )


def main(argv=None):
    """Return the exit code: 0 done, 2 the user's mistake, 1 anything else, 128 + signal."""
    return cli.run(train, argv)


if __name__ == "__main__":
    sys.exit(main())
