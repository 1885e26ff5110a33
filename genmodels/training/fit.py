"""One training: what the machine lacks, the Trainer, the fit, the command that goes on."""

import contextlib
import math
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision

from genmodels import checkpoint, cli
from genmodels.config import Config
from genmodels.distributed import check_launch, is_first
from genmodels.evaluation.scorer import expand_metrics
from genmodels.methods import METHODS
from genmodels.run import Run
from genmodels.training import callbacks, levels, report
from genmodels.training.judge import eval_features, said_of_eval
from genmodels.training.power_ema import PowerEMA
from genmodels.training.saver import CSVMetrics, Saver


class Half(MixedPrecision):
    """Autocast to float16 without scaling the loss, as EDM2 is trained.

    The loss is a sum over pixels and the layers keep magnitudes, so that gradients stay within
    float16's range as they are. A step whose gradients are not finite is skipped as any other is:
    GenerativeModule.configure_gradient_clipping.
    """

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)  # which has no scaler
        self.precision = "16-mixed"  # what the autocast is to


def usable_precision(precision: str, accelerator: str) -> str:
    """Return the precision, or 32-true with a word about it where it would only be emulated."""
    if precision == "16-mixed" and half_device(accelerator) == "cpu":
        print("trainer.precision=16-mixed: a CPU has no fast fp16, training in 32-true")
        return "32-true"
    if precision == "bf16-mixed":
        cuda = torch.cuda.is_available() and accelerator in ("auto", "cuda")
        on_cpu = torch.cpu._is_avx512_bf16_supported()
        native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else on_cpu
        if not native:
            print("trainer.precision=bf16-mixed: no native bf16 here, training in 32-true")
            return "32-true"
    return precision


def half_device(accelerator: str) -> str:
    """Return the kind of device that an accelerator means here, as autocast calls it."""
    for kind in ("cuda", "mps"):
        if accelerator in ("auto", kind) and getattr(torch, kind).is_available():
            return kind
    return "cpu"


def check_machine(cfg: Config) -> None:
    """Raise ValueError for what this machine lacks, before anything is written."""
    check_launch(cfg.trainer.num_nodes, cfg.trainer.devices)
    if cfg.trainer.accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=cuda: no CUDA device here; use auto or cpu")
    if cfg.trainer.accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("trainer.accelerator=mps: no MPS device here; use auto or cpu")
    if "wandb" in cfg.trainer.loggers and find_spec("wandb") is None:
        raise ValueError("trainer.loggers=wandb: not installed; pip install wandb")
    if cfg.eval.every:
        with said_of_eval():
            expand_metrics(cfg.eval.metrics)
        eval_features(cfg.eval)


class Ended(NamedTuple):
    """Where a fit ended: the optimizer step, and the signal that ended it early or 0."""

    step: int
    signal: int


def fit(
    cfg: Config,
    run: Run,
    model: Any,
    data: L.LightningDataModule,
    step: int = 0,
    whole: Run | None = None,
    start: Path | None = None,
) -> Ended:
    """Train to trainer.max_steps, unless it has to stop before; return where it ended.

    Args:
        cfg: Config of this fit.
        run: where it writes.
        model: the method, untrained if `step` is 0.
        data: ImageDataModule.
        step: that of the checkpoint to go on from; 0: from the beginning.
        whole: the run that this one is a part of, named by the resume command.
        start: that checkpoint, where it is not the run's last.

    Raises:
        FloatingPointError: too many non-finite gradients in a row.
    """
    model.speed_up(compile=cfg.trainer.compile, channels_last=cfg.trainer.channels_last)
    saver = Saver(run, cfg, whole)
    trainer = make_trainer(cfg, run, step, saver)
    last = (start or run.last) if step else None
    with remedies(cfg, whole or run):
        if is_first():
            run.make_folders()
        started = time.monotonic()
        trainer.fit(model, datamodule=data, ckpt_path=last, weights_only=True)
    ended = Ended(trainer.global_step, saver.signal)
    if whole is None and is_first():
        report.update(run, time.monotonic() - started, cfg.trainer.processes)
        for line in levels.lines_about(cfg, run) if ended.step == cfg.trainer.max_steps else ():
            print(line)
    return ended


def make_trainer(cfg: Config, run: Run, step: int, saver: Saver) -> L.Trainer:
    """Return the Lightning Trainer of a run that starts at this step."""
    options = cfg.trainer
    extras: list[Callback] = [
        callbacks.MatrixPrecision(options.tf32),
        callbacks.MissedLoss(cfg.eval.loss_every),
        callbacks.Throughput(cfg.data.batch_size),
        callbacks.LevelLosses(),
    ]
    if cfg.ema.sigma_rel:
        images = cfg.ema.snapshot
        share = max(1, options.max_steps // 64) if images < 0 else 0
        steps = share or math.ceil(images / cfg.data.batch_size)
        extras.append(PowerEMA(cfg.ema.sigma_rel, run, steps))
    elif cfg.ema.half_life:
        extras.append(callbacks.EMA(cfg.ema.half_life, cfg.ema.rampup, cfg.data.batch_size))
    if cfg.sample.every:
        extras.append(callbacks.SampleGrid(run, cfg.sample))
    if cfg.eval.every:
        extras.append(callbacks.GeneratedMetrics(cfg.eval, cfg.seed, saver.take_scores))
        extras.append(callbacks.Report(run, cfg.eval.every))
    if options.progress:
        extras.append(callbacks.Progress())
    extras.append(saver)  # last: see there
    precision: Any = usable_precision(options.precision, options.accelerator)
    plugins: list[Any] = [checkpoint.AtomicCheckpointIO()]
    if precision == "16-mixed":
        plugins.append(Half(half_device(options.accelerator)))
        precision = None  # the plugin says it
    several = options.processes > 1
    return L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy="ddp" if options.strategy == "auto" and several else options.strategy,
        precision=precision,
        max_steps=options.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=options.accumulate,
        val_check_interval=max(1, cfg.eval.loss_every) * options.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if cfg.eval.loss_every else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=options.log_every,
        logger=make_loggers(cfg, run, step),
        callbacks=extras,
        plugins=plugins,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=options.progress,
        inference_mode=False,  # samplers differentiate
        use_distributed_sampler=False,
    )


def make_loggers(cfg: Config, run: Run, step: int) -> list[Logger]:
    """Return the loggers of a run that starts at this step; each goes on where it was."""
    loggers: list[Logger] = [CSVMetrics(run.metrics, step)]
    if "tensorboard" in cfg.trainer.loggers:
        loggers.append(
            TensorBoardLogger(
                run.folder,
                name="",
                version="",
                default_hp_metric=False,  # a curve of -1
                purge_step=step or None,
            )
        )
    if "wandb" in cfg.trainer.loggers:
        from lightning.pytorch.loggers import WandbLogger

        # The same id on resume goes on in the same curves.
        name = f"{cfg.name}-{run.folder.name}"
        loggers.append(
            WandbLogger(name=name, id=name, resume="allow", project=cfg.name, save_dir=run.folder)
        )
    return loggers


# How gloo and NCCL say that a process at the other end is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process")


@contextlib.contextmanager
def remedies(cfg: Config, run: Run) -> Iterator[None]:
    """Raise ValueError with a remedy in place of a full disk's, memory's or a worker's own error.

    Args:
        cfg: Config of the run.
        run: what the remedy goes on with.
    """
    parts, size = cfg.trainer.accumulate, cfg.data.batch_size
    more = [n for n in range(parts + 1, size + 1) if size % (n * cfg.trainer.processes) == 0]
    in_parts = (
        f"go on with python train.py resume={run.folder} trainer.accumulate={more[0]} (the same "
        "batch in parts), or try "
        if more
        else "try "
    )
    unit = parts * cfg.trainer.processes
    smaller = max(1, size // unit // 2) * unit  # the stream takes multiples of the unit only
    too_large = (
        f"data.batch_size={size}: does not fit into memory; {in_parts}"
        f"data.batch_size={smaller} with python train.py {run.config}"
    )
    try:
        with cli.fits_memory(too_large):
            yield
    except OSError as error:
        if error.errno not in cli.REMEDIES:
            raise
        raise ValueError(
            f"out_dir={cfg.out_dir}: {error.strerror} ({error.filename or run.folder}); "
            f"{cli.REMEDIES[error.errno]}, then go on with python train.py resume={run.folder}"
        ) from None
    except RuntimeError as error:
        if cfg.trainer.processes > 1 and any(words in str(error) for words in LOST):
            reason = str(error).splitlines()[0][:160]
            folder = run.folder if run.config.is_file() else "its folder, named by the first one"
            raise RuntimeError(
                f"another process of this training has ended ({reason}); see what it wrote, then "
                f"go on with python train.py resume={folder}"
            ) from None
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ValueError(
            f"data.workers={cfg.data.workers}: a process that reads images was ended ({error}), "
            "often for want of memory; go on with python train.py "
            f"resume={run.folder} data.workers=0"
        ) from None


def restart(cfg: Config, run: Run) -> str:
    """Return the command that goes on after a divergence, with half the learning rate."""
    if METHODS[cfg.method.name].RETRIES:  # chains: their buffer goes on too, with other noise
        return f"python train.py resume={run.folder} method.retry={cfg.method.retry + 1}"
    lr = cfg.optim.lr / 2
    return f"python train.py {run.config} init={run.last} optim.lr={lr:g}"
