"""Processes of one training, as torchrun starts them, forked from the test: no import is repeated.

Those of several nodes are on this machine too: what tells nodes apart is their environment alone.
"""

import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn


class Ended(NamedTuple):
    """How a process ended: its exit code (-9: killed), and all that it wrote."""

    code: int
    text: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environments(devices: int, nodes: int = 1) -> list[dict[str, str]]:
    """Return what torchrun sets for each process."""
    port = free_port()
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % devices),
            "GROUP_RANK": str(rank // devices),
            "WORLD_SIZE": str(devices * nodes),
            "LOCAL_WORLD_SIZE": str(devices),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "none",
        }
        for rank in range(devices * nodes)
    ]


def together(
    argv: Sequence[str],
    folder: Path,
    *,
    devices: int = 2,
    nodes: int = 1,
    during: Callable[[list[int]], object] | None = None,
    seconds: float = 240,
    script: str = "train",
) -> list[Ended]:
    """Run `train.py ARGV` in devices x nodes processes; return how each of them ended.

    Args:
        argv: of the script.
        folder: what they write goes there.
        devices, nodes: how many processes; the config has to ask for as many.
        during: called with the processes' numbers as soon as they run.
        seconds: after these they are killed, and the test fails.
        script: train, sample or evaluate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"rank-{rank}.txt" for rank in range(devices * nodes)]
    late = time.monotonic() + seconds
    running: dict[int, int] = {}
    codes: dict[int, int] = {}
    try:
        for rank, environment in enumerate(environments(devices, nodes)):
            process = os.fork()
            if not process:
                _work(script, argv, environment, files[rank])
            running[process] = rank
        if during is not None:
            during(list(running))
        while running:
            for process in list(running):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
            assert time.monotonic() < late, "".join(file.read_text() for file in files)
            time.sleep(0.02)
    finally:
        for process in running:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return [Ended(codes[rank], file.read_text()) for rank, file in enumerate(files)]


def once(there: Callable[[], object], act: Callable[[list[int]], object]) -> Callable:
    """Return a `during` that acts on the processes as soon as something is there."""
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT  # and leave it to be waited for

    def during(processes: list[int]) -> object:
        for _ in range(12000):
            if there():
                return act(processes)
            ended = [os.waitid(os.P_PID, process, look) for process in processes]
            assert not any(ended), "a process ended too early"
            time.sleep(0.01)
        raise AssertionError("waited for two minutes")

    return during


def _work(script: str, argv: Sequence[str], environment: dict[str, str], file: Path) -> NoReturn:
    """Be one of the processes: what a test has patched holds here too."""
    code = 99
    try:
        os.environ.update(environment)
        written = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(written, 1)
        os.dup2(written, 2)
        sys.stdout, sys.stderr = (
            open(number, "w", buffering=1, closefd=False) for number in (1, 2)
        )
        if "accelerate" in sys.modules:  # the test may have taken itself for the only process
            sys.modules["accelerate"].PartialState._reset_state()
        code = importlib.import_module(script).main(list(argv))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
