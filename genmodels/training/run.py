"""A run folder OUT_DIR/NAME/TIME: made anew, or gone on with under its own config."""

import contextlib
import os
import time
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from genmodels import cli
from genmodels.checkpoint import read_checkpoint
from genmodels.config import load_config, to_plain
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS
from genmodels.training.saver import CSVMetrics

# What a resumed run may change; anything else would be ignored or would make another run of it.
CHANGEABLE = (
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.log_every",
    "trainer.loggers",
    "trainer.progress",
    "checkpoint.",
    "sample.",
    "eval.",
    "data.root",
    "data.device",
    "data.download",
    "data.workers",
    "method.rounds",
    "method.retry",
)


def fresh(paths, words):
    """Return the config of a new run."""
    if not paths:
        raise ValueError("config=: name a file, e.g. python train.py configs/edm_digits.yaml")
    overrides = [f"{key}={text}" for key, text in words.items()]
    return load_config(paths, overrides, methods=METHODS, networks=NETWORKS)


def resumed(run, paths, words):
    """Return the config of a run that goes on.

    Raises:
        ValueError: no run there, or a word that changes what the run is.
    """
    if paths:
        raise ValueError(f"config={paths[0]}: resume={run} brings its own config; leave it out")
    if not (run / "config.yaml").is_file():
        raise ValueError(f"resume={run}: no config.yaml there; give the folder of a run")
    for key, text in words.items():
        if not key.startswith(CHANGEABLE):
            raise ValueError(
                f"{key}={text}: cannot change when resuming; start a new run with init={run}"
            )
    old = load_config([run / "config.yaml"], methods=METHODS, networks=NETWORKS)
    if "trainer.max_steps" in words and old.optim.decay != "none":
        raise ValueError(
            f"trainer.max_steps={words['trainer.max_steps']}: optim.decay={old.optim.decay} was "
            f"laid out for {old.trainer.max_steps} steps; start a new run with init={run}"
        )
    overrides = [f"{key}={text}" for key, text in words.items()]
    return load_config([run / "config.yaml"], overrides, methods=METHODS, networks=NETWORKS)


def check_same(cfg, last):
    """Return the step of the checkpoint that this config goes on from.

    Raises:
        ValueError: its config differs in more than a resumed run may change.
    """
    saved = read_checkpoint(last)
    for key in ("optimizer_states", "lr_schedulers", "loops", "global_step"):
        if key not in saved:
            raise ValueError(
                f"resume={last}: holds no {key}, so training cannot go on; start a new run with "
                f"init={last}"
            )
    CSVMetrics(last.parent.parent / "metrics.csv")  # raises now rather than after a write
    old, new = (_flat(plain) for plain in (saved["hyper_parameters"]["config"], to_plain(cfg)))
    for key in new:
        # A key that the checkpoint does not know is younger than it.
        if key in old and new[key] != old[key] and not key.startswith(CHANGEABLE):
            raise ValueError(
                f"{key}={new[key]}: {last} was trained with {old.get(key)}; put that back into "
                "config.yaml, or start a new run with init="
            )
    return saved["global_step"]


def make_folder(cfg):
    """Return OUT_DIR/NAME/TIME, made on rank 0 only (no other rank writes)."""
    base = Path(cfg.out_dir) / cfg.name / time.strftime("%Y%m%d-%H%M%S")
    if rank_zero_only.rank != 0:
        return base
    run, number = base, 2
    while True:
        try:
            (run / "checkpoints").mkdir(parents=True)
            (run / "samples").mkdir()
            return run
        except FileExistsError:  # two runs in one second
            run, number = base.with_name(f"{base.name}-{number}"), number + 1


@contextlib.contextmanager
def spelled_out(cfg, run):
    """Raise ValueError with a remedy in place of a full disk's, memory's or a worker's own error.

    Args:
        cfg: Config of the run.
        run: its folder.
    """
    parts, size = cfg.trainer.accumulate, cfg.data.batch_size
    more = [n for n in range(parts + 1, size + 1) if size % (n * cfg.trainer.devices) == 0]
    accumulate = f"trainer.accumulate={more[0]} (the same batch in parts) or " if more else ""
    unit = parts * cfg.trainer.devices
    smaller = max(1, size // unit // 2) * unit  # the stream takes multiples of the unit only
    too_large = (
        f"data.batch_size={size}: does not fit into memory; try {accumulate}"
        f"data.batch_size={smaller} with python train.py {run}/config.yaml"
    )
    try:
        with cli.fits_memory(too_large):
            yield
    except OSError as error:
        if error.errno not in cli.REMEDIES:
            raise
        raise ValueError(
            f"out_dir={cfg.out_dir}: {error.strerror} ({error.filename or run}); "
            f"{cli.REMEDIES[error.errno]}, then go on with python train.py resume={run}"
        ) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ValueError(
            f"data.workers={cfg.data.workers}: a process that reads images was ended ({error}), "
            f"often for want of memory; go on with python train.py resume={run} data.workers=0"
        ) from None


def unfinished_or_new(cfg, finished):
    """Return the newest folder of an unfinished run of this very config, else a new one.

    Args:
        cfg: Config with its data.shape filled in.
        finished: whether the run in a folder is over.
    """
    while True:
        for found in sorted(Path(cfg.out_dir).glob(f"{cfg.name}/*/config.yaml"), reverse=True):
            same = OmegaConf.to_container(OmegaConf.load(found)) == to_plain(cfg)
            if same and not finished(found.parent):
                return found.parent
        if rank_zero_only.rank == 0:
            return make_folder(cfg)
        time.sleep(0.2)  # rank 0 makes it


@contextlib.contextmanager
def alone(folder):
    """Keep a second command from working in the same folder at the same time.

    Raises:
        ValueError: another process is at work there.
    """
    if rank_zero_only.rank != 0 or os.name == "nt":
        yield
        return
    import fcntl

    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, also killed
        except BlockingIOError:
            raise ValueError(
                f"resume={folder}: another process is at work there; wait for it or stop it"
            ) from None
        yield


def wait(ready):
    """Wait for another process's part; no collective, which would time out in a long wait."""
    while not ready():
        if os.getppid() == 1 and rank_zero_only.rank != 0:
            raise RuntimeError("the process that started this one has ended")
        time.sleep(0.1)


def has(value, keys):
    """Return whether value[keys[0]][keys[1]]... exists."""
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError):
            return False
    return True


def _flat(plain, prefix=""):
    """Return {"a.b": value} of nested dicts."""
    rows = {}
    for key, value in plain.items():
        nested = isinstance(value, dict)
        rows |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return rows
