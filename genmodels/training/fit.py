"""One training: what the machine lacks, the Trainer, the fit, the command that goes on."""

from importlib.util import find_spec

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from genmodels import checkpoint
from genmodels.evaluation.scorer import expand
from genmodels.methods import METHODS
from genmodels.metrics.features import load_features
from genmodels.training import callbacks, saver
from genmodels.training.run import spelled_out


def usable_precision(precision, accelerator):
    """Return the precision, or 32-true with a word about it where bf16 is only emulated."""
    if precision == "bf16-mixed":
        cuda = torch.cuda.is_available() and accelerator in ("auto", "cuda")
        on_cpu = torch.cpu._is_avx512_bf16_supported()
        native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else on_cpu
        if not native:
            print("trainer.precision=bf16-mixed: no native bf16 here, training in 32-true")
            return "32-true"
    return precision


def check_machine(cfg):
    """Raise ValueError for what this machine lacks, before anything is written."""
    if cfg.trainer.accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=cuda: no CUDA device here; use auto or cpu")
    if cfg.trainer.accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("trainer.accelerator=mps: no MPS device here; use auto or cpu")
    if "wandb" in cfg.trainer.loggers and find_spec("wandb") is None:
        raise ValueError("trainer.loggers=wandb: not installed; pip install wandb")
    if cfg.eval.every:
        expand(cfg.eval.metrics)
        load_features(cfg.eval.features)


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
    with spelled_out(cfg, whole or run):
        trainer.fit(model, datamodule=data, ckpt_path=last, weights_only=True)
    return trainer


def make_trainer(cfg, run, step, whole=None):
    """Return the Lightning Trainer of a run that starts at this step; arguments as for fit."""
    options = cfg.trainer
    loggers = [saver.CSVMetrics(run / "metrics.csv", step)]
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
    extras.append(saver.Saver(run, cfg, whole))  # last: see there
    return L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy="ddp" if options.strategy == "auto" and options.devices > 1 else options.strategy,
        precision=usable_precision(options.precision, options.accelerator),
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


def restart(cfg, run):
    """Return the command that goes on after a divergence, with half the learning rate."""
    if METHODS[cfg.method.name].RETRIES:  # chains: their buffer goes on too, with other noise
        return f"python train.py resume={run} method.retry={cfg.method.retry + 1}"
    lr = cfg.optim.lr / 2
    return f"python train.py {run}/config.yaml init={run}/checkpoints/last.ckpt optim.lr={lr:g}"
