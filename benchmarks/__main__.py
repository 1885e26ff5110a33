"""Time the kernels against torch eager and torch.compile, and write the table.

python -m benchmarks [--device auto|cpu|cuda] [--suite kernels,chain,eval] [--budget SECONDS]
                     [--sizes cuda|cpu|tiny] [--json OUT.json] [--markdown OUT.md]
                     [--compare OLD.json]
python -m benchmarks --markdown OUT.md --read RESULT.json        the table of an earlier run
"""

import argparse
import gc
import json
import shlex
import sys
import time
from pathlib import Path

import torch

from . import report, timing
from .cases import SIZES, SUITES, cases


def run(device, suites, budget, command, sizes=None, path=None):
    """Return the record of one run: machine, roofline and a row per case; write each at once."""
    start = time.perf_counter()
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    record = {
        "schema": report.SCHEMA,
        "command": command,
        "seed": 0,
        "device": device,
        "budget": budget,
        "machine": timing.machine(device),
        "roofline": timing.roofline(device),
        "rows": [],
    }
    builders = list(cases(device, suites, sizes))
    for i, build in enumerate(builders):
        left = budget - (time.perf_counter() - start)
        case = build()
        error = case.error()
        if not error <= case.tolerance:
            raise SystemExit(f"{case.name} {case.size}: error {error:.3g} > {case.tolerance:.3g}")
        # Compiling counts against the budget: what it took is missing for the cases that follow.
        share = max(0.2, 0.6 * left / (len(builders) - i))
        variants = timing.measure(case.variants, device, share, case.graph)
        row = {
            "name": case.name,
            "size": case.size,
            "dtype": case.dtype,
            "bytes": case.bytes,
            "flops": case.flops,
            "error": error,
            "variants": variants,
        }
        record["rows"].append(row)
        write(record, path)
        times = {n: v.get("median", v.get("error")) for n, v in variants.items()}
        print(f"{case.name} {case.size} {case.dtype}: {times}", file=sys.stderr, flush=True)
        del case
        gc.collect()
        torch._dynamo.reset()
    record["seconds"] = time.perf_counter() - start
    write(record, path)
    return record


def write(record, path):
    """Write a record with one line per case, if there is a path."""
    if path:
        rows = ",\n".join(json.dumps(row) for row in record["rows"])
        head = json.dumps({**record, "rows": []}, indent=1)
        path.write_text(head.replace('"rows": []', f'"rows": [\n{rows}\n]') + "\n")


def main(argv=None):
    """Run or read, write what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--suite", default=",".join(SUITES))
    parser.add_argument("--sizes", choices=SIZES, help="default: those of the device")
    parser.add_argument("--budget", type=float, default=420, help="seconds in all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--read", type=Path)
    arguments = parser.parse_args(argv)
    suites = arguments.suite.split(",")
    if unknown := set(suites) - set(SUITES):
        parser.error(f"--suite must be of {', '.join(SUITES)}, got {', '.join(sorted(unknown))}")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.read:
        record = json.loads(arguments.read.read_text())
    else:
        command = shlex.join(
            ["python", "-m", "benchmarks", *(sys.argv[1:] if argv is None else argv)]
        )
        record = run(device, suites, arguments.budget, command, arguments.sizes, arguments.json)
    table = report.markdown(record)
    if arguments.json and arguments.read:
        write(record, arguments.json)
    if arguments.markdown:
        arguments.markdown.write_text(table)
    print(table)
    if arguments.compare:
        print(report.compare(record, json.loads(arguments.compare.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
