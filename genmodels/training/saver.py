"""What a training keeps in its run folder as it goes: checkpoints and metrics.csv."""

import csv
import io
import signal
import time
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from genmodels import checkpoint
from genmodels.atomic import write_bytes
from genmodels.config import seconds


class Saver(Callback):
    """Saves step-XXXXXXXX.ckpt and last.ckpt, on schedule and whenever the run has to stop.

    It must stand last in the list of callbacks: the EMA has taken in the step by then, the step's
    grid and metrics are written, and at the end of the run this saves before the average is swapped
    in. Ctrl-C, SIGTERM and max_time end the run after the current optimizer step, saved; a second
    Ctrl-C does not wait. `signal` then holds the signal's number on every rank, else 0.

    Args:
        run: the run's folder.
        cfg: the whole Config.
        whole: folder of the run that this one is a part of, if it is; resume= goes on with that.
    """

    def __init__(self, run, cfg, whole=None):
        self.run, self.folder = Path(whole or run), Path(run) / "checkpoints"
        self.every, self.keep = cfg.checkpoint.every, cfg.checkpoint.keep
        self.deadline = time.monotonic() + seconds(cfg.trainer.max_time)
        self.saved_step = None
        self.signal, self.handlers = 0, {}

    def on_train_start(self, trainer, module):
        """Catch the signals that end a run (Lightning puts the old handlers back at the end)."""
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            for partial in self.folder.glob(".*.partial"):  # a kill in the middle of a save
                partial.unlink()
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.handlers[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not in the main thread: whoever runs us there handles signals
                return

    def _on_signal(self, number, frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = int(number)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        """Save if the step is due, and stop the run if it has to stop."""
        step = trainer.global_step
        if step == self.saved_step or batch_idx % trainer.accumulate_grad_batches != (
            trainer.accumulate_grad_batches - 1
        ):
            return
        # One rank alone may have caught the signal; all must leave after the same step.
        late = time.monotonic() > self.deadline
        stop = trainer.strategy.reduce_boolean_decision(bool(self.signal) or late, all=False)
        if step % self.every == 0 or step >= trainer.max_steps or stop:
            _write_line(trainer)
            self.save(trainer)
        if stop:
            number = trainer.strategy.reduce(
                torch.tensor(float(self.signal), device=module.device), reduce_op="max"
            )
            self.signal = int(number)
        if stop and step < trainer.max_steps:
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # Lightning would validate once more before it leaves
            reason = signal.Signals(self.signal).name if self.signal else "trainer.max_time"
            module.print(
                f"\nstopped by {reason} after step {step}, saved; go on with\n"
                f"  python train.py resume={self.run}"
            )

    def on_train_end(self, trainer, module):
        """Give the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def save(self, trainer):
        """Write step-XXXXXXXX.ckpt, make last.ckpt the same file, and drop the oldest."""
        self.saved_step = trainer.global_step
        path = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        if not trainer.is_global_zero:
            return
        checkpoint.link(path, self.folder / "last.ckpt")
        if self.keep:
            for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
                old.unlink()


class CSVMetrics(Logger):
    """metrics.csv: one line for each logged step, appended; a resumed run cuts it to its step.

    Args:
        path: the file.
        first_step: lines after this step are dropped (they will be made again).
    """

    def __init__(self, path, first_step=0):
        super().__init__()
        self.path, self.rows = Path(path), {}
        if self.path.exists():
            with open(self.path, newline="") as file:
                rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
            try:
                self.rows = {int(r["step"]): r for r in rows if int(r["step"]) <= first_step}
            except (KeyError, ValueError):
                raise ValueError(
                    f"metrics.csv={path}: cannot be read; delete it or mend it"
                ) from None

    name = version = None

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs):
        """Do nothing: the run folder holds config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        """Add the values to the step's line. Lightning counts steps from 0; lines from 1."""
        step += 1
        row = self.rows.setdefault(step, {"step": step})
        row |= {key: f"{float(value):.6g}" for key, value in metrics.items() if key != "epoch"}
        self.save()

    @rank_zero_only
    def save(self):
        """Write the whole file, all or nothing (a line for each log_every steps: small)."""
        columns = dict.fromkeys(key for row in self.rows.values() for key in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows[step] for step in sorted(self.rows))
        write_bytes(self.path, text.getvalue().encode())


def _write_line(trainer):
    """Write this step's line of metrics.csv, if it has one, before its checkpoint.

    Lightning writes it after the callbacks; a kill in between would lose it, for a resumed run
    begins after the step.
    """
    if trainer.global_step % trainer.log_every_n_steps == 0:
        own = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("val/")}
        for logger in trainer.loggers:
            if isinstance(logger, CSVMetrics):
                logger.log_metrics(own, trainer.global_step - 1)
