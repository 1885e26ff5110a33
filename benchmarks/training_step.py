"""What a training step costs beyond its arithmetic: ours and a bare loop, step by step by turns.

python -m benchmarks.training_step out=OUT.json [pairs=300] [config=configs/edm_digits.yaml]
                                   [logged=200]

Three loops train the same network on the same stream with the same loss, clipping, Adam, learning
rate and weight average: train.py's; a bare loop of torch; and a loop with accelerate and the weight
average of diffusers, where they are installed. They take turns, a step each, so that what else the
machine does falls on all of them alike; a step is from one batch to the next, in CPU seconds of its
thread. Ratios of means come with a 95 % interval (bootstrap over pairs). `logged` steps of
configs/cdrl_digits.yaml and configs/gedi_moons.yaml give the share of a step that logging takes.
"""

import contextlib
import io
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import record
from genmodels.config.words import check_flags, split_words

WARM = 20  # steps before the first pair
BETWEEN = 50  # log_every of the configs
QUIET = (
    "sample.every=0",
    "eval.loss_every=0",
    "eval.every=0",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.compile=false",
    "trainer.channels_last=false",
    "trainer.loggers=[csv]",
    "trainer.progress=false",
    "checkpoint.every=1000000",
)


class Turns:
    """A baton that goes round among loops; each notes how long it had it.

    Attributes:
        seconds: of each loop, CPU seconds of its steps.
    """

    def __init__(self, count: int) -> None:
        self.count, self.turn = count, 0
        self.changed = threading.Condition()
        self.seconds: list[list[float]] = [[] for _ in range(count)]
        self.starts: list[float | None] = [None] * count
        self.ended = False

    def step(self, k: int) -> None:
        """End a step of loop k, let the others take theirs, and begin the next."""
        if self.starts[k] is not None:
            self.seconds[k].append(time.thread_time() - self.starts[k])
            self._pass_on(k)
        with self.changed:
            self.changed.wait_for(lambda: self.ended or self.turn == k)
        self.starts[k] = time.thread_time()

    def _pass_on(self, k: int) -> None:
        with self.changed:
            self.turn = (k + 1) % self.count
            self.changed.notify_all()

    def end(self) -> None:
        """Let every loop go."""
        with self.changed:
            self.ended = True
            self.changed.notify_all()


def parts(cfg: Any) -> tuple[Any, Any, Iterator[dict[str, torch.Tensor]]]:
    """Return (model, its average, batches) of a config, as a loop without Lightning needs them."""
    import copy
    from types import SimpleNamespace

    from genmodels import checkpoint
    from genmodels.data import ImageDataModule

    data = ImageDataModule(cfg.data, cfg.seed)
    model = checkpoint.build(cfg).train()
    model.prepare(data)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(
        global_step=0, global_rank=0, world_size=1, training=True, strategy=strategy
    )
    batches = (data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader())
    return model, copy.deepcopy(model).requires_grad_(False), batches


def optimizer_of(model: Any) -> tuple[Any, Any]:
    """Return the optimizer and the schedule that train.py makes."""
    optimizers, schedules = model.configure_optimizers()
    return optimizers[0], schedules[0]["scheduler"]


def bare(cfg: Any, turns: Turns, k: int) -> None:
    """Train as few lines of torch do."""
    from genmodels.training.callbacks import EMA

    model, average, batches = parts(cfg)
    optimizer, schedule = optimizer_of(model)
    weights, averages = list(model.parameters()), list(average.parameters())
    decay = EMA(cfg.ema.half_life, cfg.ema.rampup, cfg.data.batch_size).decay
    step = 0
    while not turns.ended:
        turns.step(k)
        loss, _ = model.loss(next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, cfg.optim.clip or float("inf"))
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay(step))
        step += 1


def accelerated(cfg: Any, turns: Turns, k: int) -> None:
    """Train as the examples of diffusers do: accelerate and EMAModel."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    model, _, batches = parts(cfg)
    optimizer, schedule = optimizer_of(model)
    accelerator = Accelerator(cpu=True)
    net, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
    while not turns.ended:
        turns.step(k)
        batch = next(batches)
        with accelerator.accumulate(net):
            loss, _ = net.loss(batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), cfg.optim.clip or float("inf"))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            average.step(net.parameters())


@contextlib.contextmanager
def watched(on_step: Callable[[], None]) -> Iterator[None]:
    """Call `on_step` at each batch of trainings inside."""
    import lightning as L

    class Watching(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            on_step()

    real = L.Trainer

    def trainer(**options: Any) -> Any:
        return real(**options | {"callbacks": [Watching(), *options["callbacks"]]})

    with mock.patch.object(L, "Trainer", trainer):
        yield


def train(config: str, steps: int) -> None:
    """Train a config for some steps with train.py's function."""
    from genmodels.commands.train import train

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train([config, *QUIET, f"trainer.max_steps={steps}", f"out_dir={folder}"])


def compare(config: str, pairs: int) -> dict[str, Any]:
    """Return the seconds of each loop's steps, and the ratios of ours to the others."""
    from genmodels import checkpoint
    from genmodels.config import load_config
    from genmodels.methods import METHODS
    from genmodels.networks import NETWORKS

    loops: dict[str, Any] = {"bare": bare}
    if find_spec("accelerate") and find_spec("diffusers"):
        loops["accelerate"] = accelerated
    steps = WARM + pairs
    words = [*QUIET, f"trainer.max_steps={steps + 1}"]
    turns = Turns(1 + len(loops))
    failed: list[BaseException] = []

    def run(loop: Any, k: int) -> None:
        try:
            loop(load_config([config], words, methods=METHODS, networks=NETWORKS), turns, k)
        except BaseException as error:
            failed.append(error)
            turns.end()

    checkpoint.build(config)  # imports
    threads = [threading.Thread(target=run, args=(f, k)) for k, f in enumerate(loops.values(), 1)]
    for thread in threads:
        thread.start()
    with watched(lambda: turns.step(0)):
        try:
            train(config, steps + 1)
        finally:
            turns.end()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    seconds = {
        name: torch.tensor(turns.seconds[k][WARM:steps], dtype=torch.float64)
        for k, name in enumerate(["ours", *loops])
    }
    facts: dict[str, Any] = {"pairs": pairs}
    facts["median_ms"] = {name: 1000 * float(s.median()) for name, s in seconds.items()}
    facts["ratio"] = {name: ratio(seconds["ours"], seconds[name]) for name in loops}
    facts["seconds"] = {name: s.tolist() for name, s in seconds.items()}
    return facts


def ratio(ours: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Return the ratio of mean seconds, and its 95 % interval by resampling the pairs.

    Means, not medians, and of all steps: what happens every 50 of them, a logged line, counts.
    """
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(ours), (2000, len(ours)), generator=generator)
    draws = (ours[index].mean(dim=1) / other[index].mean(dim=1)).sort().values
    return {
        "value": float(ours.mean() / other.mean()),
        "low": float(draws[50]),
        "high": float(draws[1949]),
    }


def logging_share(config: str, steps: int) -> float:
    """Return the share of a training's CPU seconds that go into logging, from step to step."""
    from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector

    from genmodels.methods.base import GenerativeModule
    from genmodels.sampling.recovery import RungMeans

    spent = {"seconds": 0.0, "depth": 0}
    marks: list[tuple[float, float]] = []

    def timed(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            spent["depth"] += 1
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent["depth"] -= 1
                if not spent["depth"]:
                    spent["seconds"] += time.thread_time() - started

        return run

    timed_ones = [
        (GenerativeModule, "log_due"),
        (RungMeans, "logs"),
        (_LoggerConnector, "on_batch_end"),
        (_LoggerConnector, "update_train_step_metrics"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name in timed_ones:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        stack.enter_context(watched(lambda: marks.append((time.thread_time(), spent["seconds"]))))
        train(config, WARM + steps + 1)
    (start, before), (end, after) = marks[WARM], marks[WARM + steps]
    return (after - before) / (end - start)


def main(argv: list[str]) -> None:
    """Run it; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags or positionals or "out" not in words:
        print(__doc__.strip())
        return
    out, config = Path(words.pop("out")), words.pop("config", "configs/edm_digits.yaml")
    pairs, logged = int(words.pop("pairs", 300)), int(words.pop("logged", 200))
    if words:
        raise ValueError(f"{min(words)}: no such key; see --help")
    torch.set_num_threads(1)
    facts = compare(config, pairs)
    shares = {
        name: logging_share(f"configs/{name}.yaml", logged)
        for name in ("cdrl_digits", "gedi_moons")
    }
    command = record.command_line("training_step", argv)
    record.write(out, command, config=config, logging_share=shares, log_every=BETWEEN, **facts)
    print("ms of a step:", {name: round(ms, 3) for name, ms in facts["median_ms"].items()})
    for name, found in facts["ratio"].items():
        print(f"ours / {name}: {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")
    print("share of logging:", {name: f"{100 * share:.2f} %" for name, share in shares.items()})


if __name__ == "__main__":
    main(sys.argv[1:])
