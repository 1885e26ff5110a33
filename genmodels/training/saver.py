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
from genmodels.evaluation.scorer import METRICS
from genmodels.foreign import read_plain
from genmodels.run import Run
from genmodels.training.judge import best_metric
from genmodels.training.report import LOSS_BY_SIGMA


class Saver(Callback):
    """Saves step-XXXXXXXX.ckpt and last.ckpt, on schedule and whenever the run has to stop.

    It must stand last in the list of callbacks: the EMA has taken in the step by then, the step's
    grid and metrics are written, and at the end of the run this saves before the average is swapped
    in. With checkpoint.best it also saves a step whose score is better than all before, and keeps
    that one as best.ckpt. Ctrl-C, SIGTERM, SIGHUP and max_time end the run after the current
    optimizer step, saved; a second Ctrl-C does not wait. `signal` then holds the signal's number on
    every rank, else 0.

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
        self.eval_every = cfg.eval.every
        self.metric = best_metric(cfg)
        self.score: float | None = None  # of this step, on the first process
        # Of the best step up to now; the value is known on the first process.
        self.best: dict[str, Any] = {"metric": self.metric, "step": 0, "value": None}
        self.signal = 0
        self.handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Catch the signals that end a run (Lightning puts the old handlers back at the end)."""
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            atomic.remove_partial(self.run.checkpoints)  # of a kill in the middle of a save
            if self.metric and self.best["step"] == trainer.global_step > 0:
                self._link_best(trainer)  # of a kill after it
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

    def state_dict(self) -> dict[str, Any]:
        """Return the best step and its score, which a resumed run goes on from."""
        return {"best": self.best} if self.metric else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them, of a run that had the same checkpoint.best."""
        best = state.get("best", {})
        if best.get("metric") == self.metric:
            self.best = dict(best)

    def take_scores(self, values: Mapping[str, float]) -> None:
        """Take the scores of this step; on the first process."""
        self.score = values.get(self.metric)

    def _is_best(self, trainer: L.Trainer) -> bool:
        """Return, on all processes, whether this step's score is better than all before."""
        step, better = trainer.global_step, False
        if not self.metric or step % self.eval_every:
            return False
        if self.score is not None and math.isfinite(self.score):
            distance, best = METRICS[self.metric].distance, self.best["value"]
            better = best is None or distance(self.score) < distance(best)
        if trainer.strategy.reduce_boolean_decision(better, all=False):
            self.best |= {"step": step, "value": self.score}
            return True
        return False

    def _link_best(self, trainer: L.Trainer) -> None:
        path = self.run.checkpoint(trainer.global_step)
        if path.is_file():
            atomic.link(path, self.run.best)

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
        best = self._is_best(trainer)
        self.score = None
        if step % self.every == 0 or step >= trainer.max_steps or stop or best:
            _write_line(trainer)
            self.save(trainer)
            if best and trainer.is_global_zero:
                self._link_best(trainer)
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
        """Give the signals back, and say which step was the best."""
        if self.best["step"] and trainer.is_global_zero:
            print(
                f"best: {self.metric} {self.best['value']:.5g} at step {self.best['step']}: "
                f"{self.run.best}"
            )
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


def _columns(path: Path) -> dict[str, None]:
    """Return the columns of a table that read_table has read, in their order."""
    header = read_plain(path).decode().partition("\n")[0] if path.exists() else ""
    return dict.fromkeys(["step", *next(csv.reader([header]), [])])


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
        self.columns = _columns(path)  # in the order of the file

    name = version = None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run folder holds the config."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add the values to the step's line. Lightning counts steps from 0; lines from 1."""
        if not is_first():
            return
        self.add(metrics, step or 0)
        self.save()

    def add(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add values to the step's line, as log_metrics does, without writing the file.

        Args:
            metrics: {column: value}; of None the cell stays empty.
            step: Lightning's.
        """
        row = self.rows.setdefault(step + 1, {"step": step + 1})
        for key, value in metrics.items():
            if key != "epoch":
                self.columns.setdefault(key)
                row |= {} if value is None else {key: f"{float(value):.6g}"}

    def save(self) -> None:
        """Write the whole file, all or nothing (a line for each log_every steps: small)."""
        if not is_first() or not self.rows:
            return
        columns = self.columns | dict.fromkeys(key for row in self.rows.values() for key in row)
        columns = dict.fromkeys(sorted(columns, key=lambda name: name.startswith(LOSS_BY_SIGMA)))
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
