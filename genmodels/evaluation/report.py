"""The JSON of an evaluation."""

import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genmodels.atomic import write_bytes
from genmodels.version import __version__


def versions() -> dict[str, str]:
    """Return the versions that bear on a result; importing these packages takes seconds."""
    return {
        "genmodels": __version__,
        "torch": torch.__version__,
        "lightning": metadata.version("lightning"),
        "diffusers": metadata.version("diffusers"),
        "numpy": np.__version__,
    }


def write_report(
    path: Path | str, scores: dict[str, dict[str, Any]], started: float, **facts: Any
) -> None:
    """Write the JSON of an evaluation, all or nothing: metrics, facts, seconds, versions."""
    report = {"metrics": scores} | facts
    report |= {"seconds": round(time.monotonic() - started, 2), "versions": versions()}
    write_bytes(path, json.dumps(report, indent=1).encode())


def is_report(path: Path) -> bool:
    """Return whether a file was written by write_report."""
    try:
        with open(path, "rb") as file:
            return path.is_file() and file.read(len(_BEGIN)) == _BEGIN
    except OSError:
        return False


_BEGIN = b'{\n "metrics": '
