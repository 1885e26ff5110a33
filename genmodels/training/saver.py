"""What a training keeps in its run folder as it goes: checkpoints and metrics.csv."""

import csv
import io
import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger

from genmodels import atomic
from genmodels.config import Config, seconds
from genmodels.distributed import is_first
from genmodels.foreign import read_plain
from genmodels.run import Run


class Saver(Callback):
    """Saves step-XXXXXXXX.ckpt and last.ckpt, on schedule and whenever the run has to stop.

    It must stand last in the list of callbacks: the EMA has taken in the step by then, the step's
    grid and metrics are written, and at the end of the run this saves before the average is swapped
    in. Ctrl-C, SIGTERM, SIGHUP and max_time end the run after the current optimizer step, saved; a
    second Ctrl-C does not wait. `signal` then holds the signal's number on every rank, else 0.

    Args:
        run: where to save.
        cfg: the whole Config.
        whole: the run that this one is a part of, if it is; resume= goes on with that.
    """

    def __init__(self, run: Run, cfg: Config, whole: Run | None = None) -> None:
        self.run = run
        self.whole = whole or run
        self.every = cfg.checkpoint.every
        self.keep = cfg.checkpoint.keep
        self.deadline = time.monotonic() + seconds(cfg.trainer.max_time)
        self.saved_step = -1
        self.signal = 0
        self.handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Catch the signals that end a run (Lightning puts the old handlers back at the end)."""
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            atomic.remove_partial(self.run.checkpoints)  # of a kill in the middle of a save
        numbers = [signal.SIGINT, signal.SIGTERM]
        # A terminal that closes, unless nohup has it ignored.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            try:
                self.handlers[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not in the main thread: whoever runs us there handles signals
                return

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, saved: dict[str, Any]
    ) -> None:
        """Count the batches so far in today's parts: Lightning steps at multiples of accumulate.

        A run that goes on with another trainer.accumulate would else begin inside a step.
        """
        batches = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        begun = saved["global_step"] * trainer.accumulate_grad_batches
        further = begun - batches["current"]["ready"]
        for counts in (batches["total"], batches["current"]):
            for key in ("ready", "started", "processed", "completed"):
                counts[key] += further

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = int(number)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
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
                f"  python train.py resume={self.whole.folder}"
            )

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Give the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def save(self, trainer: L.Trainer) -> None:
        """Write the step's checkpoint, make the last one the same file, and drop the oldest.

        Steps after this one, left by a run that went on from an earlier checkpoint, do not count:
        they are written anew.
        """
        self.saved_step = trainer.global_step
        path = self.run.checkpoint(trainer.global_step)
        trainer.save_checkpoint(path)
        if not trainer.is_global_zero:
            return
        atomic.link(path, self.run.last)
        if self.keep:
            until_now = [old for old in self.run.steps() if old.name <= path.name]
            for old in until_now[: -self.keep]:
                old.unlink()


def read_table(path: Path, until: int | float = math.inf) -> dict[int, dict[str, Any]]:
    """Return {step: {column: text}} of a metrics.csv up to a step, {} if it is not there.

    Every line ends in a newline: a last one without it was cut, and is left out.

    Args:
        path: the file.
        until: the last step that counts; lines after it may hold anything.

    Raises:
        ValueError: it is no table of steps, or lines of it are spoilt.
    """

    def check(right: bool, what: str) -> None:
        if not right:
            remedy = "mend it, or delete it to go on without the lines so far"
            raise ValueError(f"metrics.csv={path}: {what}; {remedy}")

    if not path.exists():
        return {}
    try:
        text = read_plain(path).decode()
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1]), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"metrics.csv={path}: cannot be read ({error}); delete it or mend it"
        ) from None
    if text == "\n":  # as older versions wrote it before the first line
        return {}
    check(bool(text), "is empty")
    columns = lines[0] if lines else []
    check(columns[:1] == ["step"] and len({*columns, ""}) == len(columns) + 1, "has no header")
    rows: dict[int, dict[str, Any]] = {}
    for number, cells in enumerate(lines[1:], start=2):
        try:
            step, *_ = [int(cells[0]), *(float(cell) for cell in cells[1:] if cell)]
        except (IndexError, ValueError):
            step = -1
        if step > until:
            continue
        check(step > max(rows, default=0), f"line {number} is not that of a later step, in numbers")
        check(len(cells) == len(columns), f"line {number} has {len(cells)} of {len(columns)} cells")
        rows[step] = {key: cell for key, cell in zip(columns, cells) if cell}
    return rows


class CSVMetrics(Logger):
    """A table of one line for each logged step; a resumed run cuts it to its step.

    Args:
        path: the file.
        first_step: lines after this step are dropped (they will be made again).

    Raises:
        ValueError: the file is no such table.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.rows = read_table(path, first_step)

    name = version = None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run folder holds the config."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add the values to the step's line. Lightning counts steps from 0; lines from 1."""
        if not is_first():
            return
        number = (step or 0) + 1
        row = self.rows.setdefault(number, {"step": number})
        row |= {key: f"{float(value):.6g}" for key, value in metrics.items() if key != "epoch"}
        self.save()

    def save(self) -> None:
        """Write the whole file, all or nothing (a line for each log_every steps: small)."""
        if not is_first() or not self.rows:
            return
        columns = dict.fromkeys(key for row in self.rows.values() for key in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows[step] for step in sorted(self.rows))
        atomic.write_bytes(self.path, text.getvalue().encode())


def _write_line(trainer: Any) -> None:
    """Write this step's line of the metrics, if it has one, before its checkpoint.

    Lightning writes it after the callbacks; a kill in between would lose it, for a resumed run
    begins after the step.
    """
    if trainer.global_step % trainer.log_every_n_steps == 0:
        metrics = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("val/")}
        for logger in trainer.loggers:
            if isinstance(logger, CSVMetrics):
                logger.log_metrics(metrics, trainer.global_step - 1)
