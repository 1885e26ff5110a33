"""Around training: EMA, picture grids, metrics, speed, the progress bar."""

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar, WeightAveraging
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from genmodels import distributed, generation, images
from genmodels.config import EvalConfig, SampleConfig
from genmodels.evaluation.plots import scores_png
from genmodels.evaluation.scorer import Scorer
from genmodels.evaluation.sources import Generated
from genmodels.methods.base import GenerativeModule
from genmodels.methods.by_level import LossByLevel
from genmodels.run import Run
from genmodels.training import report
from genmodels.training.judge import eval_features, make_scorer
from genmodels.training.saver import CSVMetrics


class EMA(WeightAveraging):
    """Exponential moving average of the weights, its half-life given in images.

    After an optimizer step of B images, ema <- beta ema + (1 - beta) weights with
    beta = 0.5^(B / min(half_life, rampup * images seen before the step)).

    Args:
        half_life: in images; the method trained may have another at some steps (ema_half_life).
        rampup: the half-life is at most this share of the images seen; 0: no limit.
        batch_size: images in an optimizer step.

    Reference: Karras et al. 2022, arXiv 2206.00364, section 5 and appendix F.2.
    """

    def __init__(self, half_life: float, rampup: float, batch_size: int) -> None:
        super().__init__(use_buffers=False)
        self.half_life = half_life
        self.method: GenerativeModule | None = None
        self.rampup = rampup
        self.batch_size = batch_size
        self.pairs: list[tuple[list[Any], list[Any]]] = []  # (average, model): weights, buffers

    def decay(self, step: int) -> float:
        """Return beta for the step after `step` optimizer steps."""
        half_life = self.half_life if self.method is None else self.method.ema_half_life(step)
        if self.rampup:
            half_life = min(half_life, self.rampup * step * self.batch_size)
        return 0.5 ** (self.batch_size / half_life) if half_life else 0.0

    def on_train_batch_end(
        self,
        trainer: Any,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Average after an optimizer step.

        What WeightAveraging does, but for its questions: how often it did so lies on the device,
        and which tensors to average does not change from step to step.
        """
        if trainer.global_step > self._latest_update_step:
            self.update(module)
            self._latest_update_step = trainer.global_step

    @torch.no_grad()
    def update(self, module: L.LightningModule) -> None:
        """Average the weights once; buffers are copied."""
        average: Any = self._average_model
        if not self.pairs:
            pairs = [(m.parameters(), m.buffers()) for m in (average.module, module)]
            self.pairs = [(list(own), list(its)) for own, its in zip(*pairs)]
        (averages, weights), (buffers, newest) = self.pairs
        if average.n_averaged == 0:
            torch._foreach_copy_(averages, weights)
        else:
            # The stock average lets frozen weights drift by rounding; lerp leaves equal values
            # alone.
            torch._foreach_lerp_(averages, weights, 1 - self.decay(self._latest_update_step))
        if buffers:
            torch._foreach_copy_(buffers, newest)
        average.n_averaged += 1

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Move the average to the model's device (setup made it before the model moved)."""
        # The LightningModule's own .to(), for it alone keeps .device right.
        self.module.to(module.device)
        average: Any = self._average_model
        average.n_averaged = average.n_averaged.cpu()  # asked for at every step
        self.pairs = []
        if isinstance(module, GenerativeModule):
            self.method = module

    @property
    def module(self) -> Any:
        """The averaged copy of the LightningModule, in eval mode."""
        average: Any = self._average_model
        return average.module.eval()


class MatrixPrecision(Callback):
    """Allows or forbids TF32 in matrix products and convolutions while training.

    A callback, so that spawned processes follow it too.
    """

    def __init__(self, tf32: bool) -> None:
        self.tf32 = tf32
        self.before = contextlib.ExitStack()  # puts back what was there before

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Set it."""
        self.before.enter_context(generation.tf32(self.tf32))

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Put back what was there before."""
        self.before.close()

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        """Put it back too: a fit that fails is not torn down, and the next one sets its own."""
        self.before.close()


class Trouble:
    """What a look at the model may run into without ending the training.

    Args:
        key: the setting behind the look, for the warning.
        every: its value.
    """

    def __init__(self, key: str, every: int) -> None:
        self.key = key
        self.every = every
        self.kinds: set[type] = set()  # of errors warned of

    @contextlib.contextmanager
    def survived(self, what: str, trainer: L.Trainer) -> Iterator[None]:
        """Warn of an error in the block, once of each kind, and go on; it is tried again next time.

        Whatever fails on one process must fail on all of them: see distributed.together.
        """
        failed = False
        try:
            yield
        except Exception as error:
            failed = True
            reason = " ".join(str(error).partition(";")[0].split()) or type(error).__name__
            if type(error) not in self.kinds and trainer.is_global_zero:
                warnings.warn(
                    f"{self.key}={self.every}: no {what} of step {trainer.global_step} ({reason}); "
                    "the training goes on, and tries again when the next is due",
                    stacklevel=1,
                )
            self.kinds.add(type(error))
        if failed and torch.cuda.is_available():
            torch.cuda.empty_cache()  # after a lack of memory the next step needs what it held


EARLY = 100  # the step of the first grid, where those after it are further apart


class SampleGrid(Callback):
    """Writes step-XXXXXXXX.png among the run's samples, from fixed seeds with the EMA weights.

    Every rank generates its share of the seeds; rank 0 writes, and hands the grid to TensorBoard
    and W&B. With classes each has a column of its own. Of a model that restores it is noisy beside
    restored patches.

    Args:
        run: where to write.
        cfg: how often and how many.
    """

    def __init__(self, run: Run, cfg: SampleConfig) -> None:
        self.run = run
        self.every = cfg.every
        self.num = cfg.num
        self.trouble = Trouble("sample.every", cfg.every)

    def on_train_batch_end(
        self,
        trainer: Any,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Make a grid if one is due."""
        early = self.every > EARLY and _due(trainer, batch_idx, EARLY)
        first = early and trainer.global_step == EARLY
        if not first and not _due(trainer, batch_idx, self.every):
            return
        with self.trouble.survived("grid", trainer), _evaluated(trainer, module) as model:
            labels, columns = generation.class_grid(model, self.num)
            if model.ANY_SIZE:
                with distributed.together():
                    pictures = trainer.datamodule.preview(model, self.num)
            else:
                seeds = range(self.num if labels is None else len(labels))
                pictures = generation.generate_everywhere(
                    model, seeds, labels, batch=small_batch(model.shape), progress=False
                )
            if trainer.is_global_zero:
                sheet = images.contact_sheet(pictures, columns)
                images.write_png(self.run.samples / f"step-{trainer.global_step:08d}.png", sheet)
                log_picture(trainer, "samples", sheet)


def small_batch(shape: Sequence[int]) -> int:
    """Return how many images (C, H, W) to make at a time: many of points, 64 of photographs.

    It changes no image; small ones would wait for Python between the steps.
    """
    return max(64, 65536 // math.prod(shape))


def viewers(trainer: L.Trainer) -> list[Any]:
    """Return the loggers that show pictures."""
    return [log for log in trainer.loggers if isinstance(log, TensorBoardLogger | WandbLogger)]


def log_picture(trainer: L.Trainer, name: str, picture: torch.Tensor) -> None:
    """Hand a picture, uint8 (3, H, W), to the loggers that show pictures."""
    for logger in viewers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, trainer.global_step - 1)
        else:
            array = picture.permute(1, 2, 0).cpu().numpy()
            logger.log_image(name, [array], trainer.global_step - 1)


class GeneratedMetrics(Callback):
    """Logs eval/<metric>_<num> of freshly generated images against the training set (EMA weights).

    One pass gives all metrics; every rank generates and scores its share. The number of images is
    small and stands in the name: never set these beside a published number.

    Args:
        cfg: which metrics, how often and of how many.
        seed: of the resampled error bars.
        tell: called on the first process with {metric: value}.
    """

    def __init__(
        self,
        cfg: EvalConfig,
        seed: int,
        tell: Callable[[Mapping[str, float]], object] = lambda values: None,
    ) -> None:
        self.cfg = cfg
        self.seed = seed
        self.tell = tell
        self.scorer: Scorer | None = None
        self.trouble = Trouble("eval.every", cfg.every)

    def on_train_batch_end(
        self,
        trainer: Any,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Generate, score and log if it is due."""
        if not _due(trainer, batch_idx, self.cfg.every):
            return
        scores: dict[str, Any] = {}
        with self.trouble.survived("scores", trainer):
            if self.scorer is None:
                with distributed.together():
                    features = eval_features(self.cfg, module.device)
                data = trainer.datamodule
                self.scorer = make_scorer(self.cfg, data, features=features, device=module.device)
            with _evaluated(trainer, module) as model:
                source = Generated(model, range(self.cfg.num))
                scores = self.scorer(source, seed=self.seed)
        if scores:
            self.tell({name: score["value"] for name, score in scores.items()})
            logs = {f"eval/{k}_{self.cfg.num}": score["value"] for k, score in scores.items()}
            for logger in trainer.loggers:
                logger.log_metrics(logs, trainer.global_step - 1)
            if viewers(trainer):
                with self.trouble.survived("plot", trainer):
                    self.draw(trainer)

    def draw(self, trainer: L.Trainer) -> None:
        """Hand the loggers a plot of the latest scores, if there is anything to draw."""
        plot = None if self.scorer is None else scores_png(self.scorer)
        if plot is not None:
            values = torch.from_numpy(images.read_values(plot, "scores.png"))
            log_picture(trainer, "scores", values.permute(2, 0, 1))


class Report(Callback):
    """Writes the run's report.html anew after each evaluation; it must stand behind that.

    Args:
        run: where to write.
        every: optimizer steps between evaluations.
    """

    def __init__(self, run: Run, every: int) -> None:
        self.run = run
        self.every = every

    def on_train_batch_end(
        self,
        trainer: Any,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write it if it is due."""
        if trainer.is_global_zero and _due(trainer, batch_idx, self.every):
            report.update(self.run)


class MissedLoss(Callback):
    """Measures the held-out loss of the step that a run goes on from, where that was missed.

    It comes after the step's checkpoint: a kill in between, or a signal that does not wait for it,
    leaves its place in metrics.csv empty.

    Args:
        every: optimizer steps between held-out losses, 0: none.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_start(self, trainer: Any, module: L.LightningModule) -> None:
        """Measure and log it."""
        step = trainer.global_step
        if not step or not self.every or step % self.every:
            return
        rows = next(log.rows for log in trainer.loggers if isinstance(log, CSVMetrics))
        missed = not any(key.startswith("val/") for key in rows.get(step, {}))
        if not trainer.strategy.reduce_boolean_decision(missed, all=False):
            return
        loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
        before = connector._first_loop_iter
        loop.val_loop.restarting = False  # it would go on after the batches of its last time
        trainer.validating = True  # as Lightning's own loop calls it
        loop.val_loop.run()
        trainer.training = True
        connector._first_loop_iter = before


class LevelLosses(Callback):
    """Logs loss_by_sigma/SIGMA, the mean loss per element over the steps since the last line.

    Of methods that draw a noise level for each training image (`by_level`), and of the images of
    this process. What is gathered between lines lies in the checkpoint, so that a resume is exact.
    """

    def __init__(self) -> None:
        self.by_level: LossByLevel | None = None
        self.begun: Mapping[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what was gathered since the last line."""
        return self.by_level.state() if self.by_level else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep it for the start."""
        self.begun = state

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Go on gathering."""
        self.by_level = getattr(module, "by_level", None)
        if self.by_level:
            self.by_level.load_state(self.begun)

    def on_train_batch_end(
        self,
        trainer: Any,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log where Lightning writes a line."""
        if self.by_level is None or not _due(trainer, batch_idx, trainer.log_every_n_steps):
            return
        if not trainer.is_global_zero:
            self.by_level.clear()
        elif losses := self.by_level.read():
            named = {f"{report.LOSS_BY_SIGMA}/{sigma}": loss for sigma, loss in losses.items()}
            known = {name: loss for name, loss in named.items() if loss is not None}
            for logger in trainer.loggers:
                if isinstance(logger, CSVMetrics):
                    # Written with Lightning's own values of this step, right after.
                    logger.add(named, trainer.global_step - 1)
                else:
                    logger.log_metrics(known, trainer.global_step - 1)


class Throughput(Callback):
    """Logs train/images_per_second over the steps since the last line of metrics.csv."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.time = 0.0
        self.step = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self.time = time.monotonic()
        self.step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Any,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the rate where Lightning writes a line."""
        step = trainer.global_step
        if step > self.step and step % trainer.log_every_n_steps == 0:
            now = time.monotonic()
            rate = (step - self.step) * self.batch_size / (now - self.time)
            # A tensor of the host: the bar reads it at every step.
            module.log("train/images_per_second", torch.tensor(rate), prog_bar=True)
            self.time = now
            self.step = step


class Progress(TQDMProgressBar):
    """One bar over the whole run, in micro-batches; there are no epochs.

    Where nobody watches (a log file, a pipe) it is a line every EVERY seconds.
    """

    EVERY = 10.0

    def __init__(self) -> None:
        super().__init__()
        self.watched = sys.stdout.isatty() or "ipykernel" in sys.modules
        self.written, self.step = -math.inf, -1  # the latest line

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Move the bar, or write a line if one is due."""
        if self.watched:
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        elif not self.is_disabled and time.monotonic() >= self.written + self.EVERY:
            self.write_line(trainer, module)

    def write_line(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Print the step and the numbers that stand beside a bar."""
        self.written, self.step = time.monotonic(), trainer.global_step
        numbers = self.get_metrics(trainer, module)
        values = (
            f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, float)
        )
        print(", ".join([f"step {trainer.global_step}/{trainer.max_steps}", *values]), flush=True)

    def init_train_tqdm(self) -> Tqdm:
        """Return the bar, which shows nothing where nobody watches."""
        return super().init_train_tqdm() if self.watched else Tqdm(disable=True)

    @property
    def total_train_batches(self) -> int:
        """Micro-batches from the first to the last optimizer step."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Call the bar what it is."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("training")

    def init_validation_tqdm(self) -> Tqdm:
        """Return no bar: the held-out loss is quick, and a second bar tears the first."""
        return Tqdm(disable=True)

    def on_train_end(self, *args: Any) -> None:
        """Leave the bar at its end (the last steps may fall between two refreshes)."""
        if not self.watched:
            if not self.is_disabled and self.trainer.global_step != self.step:
                self.write_line(self.trainer, self.trainer.lightning_module)
            super().on_train_end(*args)
            return
        bar = self.train_progress_bar
        bar.n = min(bar.total or 0, self.trainer.global_step * self.trainer.accumulate_grad_batches)
        bar.refresh()
        super().on_train_end(*args)

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """Return the values beside the bar, without Lightning's version number."""
        shown = super().get_metrics(trainer, module)
        shown.pop("v_num", None)
        return {name.removeprefix("train/"): value for name, value in shown.items()}


def _due(trainer: L.Trainer, batch_idx: int, every: int) -> bool:
    """Return whether an optimizer step has just ended and is a multiple of `every`."""
    stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return bool(every) and stepped and trainer.global_step % every == 0


@contextlib.contextmanager
def _evaluated(trainer: Any, module: L.LightningModule) -> Iterator[Any]:
    """Give the EMA copy of the model, or the model where there is none, in eval mode."""
    ema = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)
    model = ema.module if ema else module
    training = model.training
    try:
        yield model.eval()
    finally:
        model.train(training)
