"""The JSON of an evaluation, or its table."""

import json
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genmodels.atomic import write_bytes, write_json
from genmodels.evaluation.comparison import Row, csv_of, markdown_of
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


def machine() -> str:
    """Return what computes, in words: the GPU, or the processor and its threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [li for li in cpuinfo.read_text().splitlines() if li.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {torch.get_num_threads()} threads"


def write_report(
    path: Path | str, scores: dict[str, dict[str, Any]], started: float, **facts: Any
) -> None:
    """Write the JSON of an evaluation, all or nothing: metrics, facts, seconds, versions.

    Of several sets, scores are {} and the facts have them as a list, `sets`. An infinite score, the
    PSNR of a perfect picture, is null there.
    """
    report = {"metrics": scores} | facts if scores else facts
    report |= {"seconds": round(time.monotonic() - started, 2), "versions": versions()}
    write_json(path, report)


def write_table(path: Path | str, rows: Sequence[Row]) -> None:
    """Write the rows as Markdown (.md) or CSV (any other name), all or nothing."""
    text = markdown_of(rows) if str(path).lower().endswith(".md") else csv_of(rows)
    write_bytes(path, text.encode())


def is_report(path: Path) -> bool:
    """Return whether a file was written by write_report or write_table."""
    try:
        text = path.read_bytes()[:_LARGEST].decode() if path.is_file() else ""
        if path.suffix.lower() in (".md", ".csv"):
            return text.startswith(("| set |", "set,"))
        return "genmodels" in json.loads(text)["versions"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


_LARGEST = 64 << 20  # bytes of a report, with a row for each image
