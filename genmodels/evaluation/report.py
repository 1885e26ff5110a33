"""The JSON of an evaluation."""

import json
import time

import numpy as np
import torch

import genmodels
from genmodels.atomic import write_bytes


def versions():
    """Return the versions that bear on a result."""
    import diffusers
    import lightning

    packages = (genmodels, torch, lightning, diffusers, np)
    return {package.__name__: package.__version__ for package in packages}


def write_report(path, scores, started, **facts):
    """Write the JSON of an evaluation, all or nothing: metrics, facts, seconds, versions."""
    report = {"metrics": scores} | facts
    report |= {"seconds": round(time.monotonic() - started, 2), "versions": versions()}
    write_bytes(path, json.dumps(report, indent=1).encode())
