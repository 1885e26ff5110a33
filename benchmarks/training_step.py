"""What a training step costs beyond its arithmetic: ours and a bare loop, step by step by turns.

python -m benchmarks.training_step out=OUT.json [pairs=300] [config=configs/edm_digits.yaml]
                                   [logged=200] [peer=FILE.py] [KEY=VALUE of the config ...]

Three loops train the same network on the same stream with the same loss, clipping, Adam, learning
rate and weight average: train.py's; a bare loop of torch; and a loop with accelerate and the weight
average of diffusers, where they are installed. They take turns, a step each, so that what else the
machine does falls on all of them alike; a step is from one batch to the next, in CPU seconds of the
one thread. Batches of 8 beside the config's own show what a step costs whatever it computes. peer=
is a Python file outside of the project with a function loop(cfg), a generator that takes a training
step at each next(): another program's loop in the same race. Ratios of means come with a 95 %
interval (bootstrap over pairs). `logged` steps of three configs give the share of a step that
logging takes, Lightning's part included. About 15 minutes of one core; finished parts are kept.
"""

import contextlib
import io
import json
import runpy
import sys
import tempfile
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
SHARES = ("cdrl_digits", "gedi_moons", "gedi_mnist_cpu")  # points in the plane: a step of 6 ms
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
    "trainer.max_time=",
    "checkpoint.every=1000000",
)


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


def bare(cfg: Any) -> Iterator[None]:
    """Train as few lines of torch do, a step at each next()."""
    from genmodels.training.callbacks import EMA

    model, average, batches = parts(cfg)
    optimizer, schedule = optimizer_of(model)
    weights, averages = list(model.parameters()), list(average.parameters())
    decay = EMA(cfg.ema.half_life, cfg.ema.rampup, cfg.data.batch_size).decay
    for step, batch in enumerate(batches):
        loss, _ = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, cfg.optim.clip or float("inf"))
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay(step))
        yield


def accelerated(cfg: Any) -> Iterator[None]:
    """Train as the examples of diffusers do: accelerate and EMAModel."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    model, _, batches = parts(cfg)
    optimizer, schedule = optimizer_of(model)
    accelerator = Accelerator(cpu=True)
    net, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
    for batch in batches:
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
        yield


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


def train(config: str, words: list[str]) -> None:
    """Train a config with train.py's function, quietly and in a folder that is removed."""
    from genmodels.commands.train import train

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train([config, *QUIET, *words, f"out_dir={folder}"])


class Race:
    """Loops that take a step each; notes the CPU seconds of every step.

    One thread runs them all: a loop in a thread of its own would get memory from another arena, and
    pay for its pages again at every step.

    Attributes:
        seconds: loop -> CPU seconds of its steps; "ours" is the loop that calls step().
    """

    def __init__(self, others: dict[str, Iterator[None]]) -> None:
        self.others, self.started = others, 0.0
        self.seconds: dict[str, list[float]] = {name: [] for name in ("ours", *others)}

    def step(self) -> None:
        """End a step of ours, let the others take one each, begin the next of ours."""
        if self.started:
            self.seconds["ours"].append(time.thread_time() - self.started)
        for name, loop in self.others.items():
            started = time.thread_time()
            next(loop)
            self.seconds[name].append(time.thread_time() - started)
        self.started = time.thread_time()


def peer_loop(path: str) -> Callable[[Any], Iterator[None]]:
    """Return the function loop(cfg) of a Python file."""
    return runpy.run_path(path)["loop"]


def compare(config: str, pairs: int, own: list[str], peer: str) -> dict[str, Any]:
    """Return the seconds of each loop's steps, and the ratios of ours to the others."""
    from genmodels.config import load_config
    from genmodels.methods import METHODS
    from genmodels.networks import NETWORKS

    loops: dict[str, Any] = {"bare": bare}
    if find_spec("accelerate") and find_spec("diffusers"):
        loops["accelerate"] = accelerated
    if peer:
        loops["peer"] = peer_loop(peer)
    steps = WARM + pairs
    words = [f"trainer.max_steps={steps + 1}", *own]
    cfg = load_config([config], [*QUIET, *words], methods=METHODS, networks=NETWORKS)
    race = Race({name: loop(cfg) for name, loop in loops.items()})
    with watched(race.step):
        train(config, words)
    seconds = {
        name: torch.tensor(found[WARM:steps], dtype=torch.float64)
        for name, found in race.seconds.items()
    }
    facts: dict[str, Any] = {"batch_size": cfg.data.batch_size, "seed": cfg.seed}
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
        train(config, [f"trainer.max_steps={WARM + steps + 1}"])
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
    peer = words.pop("peer", "")
    own = [f"{key}={value}" for key, value in words.items()]
    torch.set_num_threads(1)
    command = record.command_line("training_step", argv, ["out", "peer"])
    rows, shares = record.rows(out, command), {}
    if rows:  # of a command that was stopped
        shares = json.loads(out.read_text())["logging_share"]

    def keep() -> None:
        facts: dict[str, Any] = {"config": config, "pairs": pairs}
        facts |= {"log_every": BETWEEN} | ({"peer": Path(peer).name} if peer else {})
        record.write(out, command, **facts, logging_share=shares, rows=rows)

    for extra in ([], ["data.batch_size=8"])[len(rows) :]:
        rows.append(compare(config, pairs, [*own, *extra], peer))
        keep()
    for name in SHARES:
        if name not in shares:
            shares[name] = logging_share(f"configs/{name}.yaml", logged)
            keep()
    for row in rows:
        medians = {name: round(ms, 3) for name, ms in row["median_ms"].items()}
        print(f"batches of {row['batch_size']}, ms of a step: {medians}")
        for name, found in row["ratio"].items():
            print(f"ours / {name}: {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")
    print("share of logging:", {name: f"{100 * share:.2f} %" for name, share in shares.items()})


if __name__ == "__main__":
    main(sys.argv[1:])
