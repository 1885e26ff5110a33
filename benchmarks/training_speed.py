"""Seconds of whole trainings before and after a change, by turns.

python -m benchmarks.training_speed out=OUT.json [before=REVISION] [rounds=3] [demo=STEPS]
                                    [cdrl=STEPS]

Each round trains configs/edm_digits.yaml (the demo's) and configs/cdrl_digits.yaml for some steps,
in a process of its own on one thread: with the code of `before` (by default the last before noise
was made in C), with the code of today without its compiled library (GENMODELS_KERNELS=torch), and
with it. Times are CPU and wall seconds of the training call, imports left out.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import record
from genmodels.config.words import check_flags, split_words
from genmodels.kernels import native

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "27368fe"

TRAIN = """
import json, sys, time, torch
torch.set_num_threads(1)
from genmodels.commands.train import train
wall, cpu = time.perf_counter(), time.process_time()
train(sys.argv[1:])
print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}))
"""


def train_once(clone, mode, config, steps):
    """Return {"cpu", "wall"}: seconds of one training in a clone."""
    environment = os.environ | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    environment["GENMODELS_KERNELS"] = mode
    with tempfile.TemporaryDirectory() as folder:
        words = [f"configs/{config}.yaml", f"out_dir={folder}", f"trainer.max_steps={steps}"]
        words += ["sample.every=0", "trainer.progress=false", "trainer.accelerator=cpu"]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", TRAIN, *words],
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"{config} in {clone.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def clone_of(revision, folder):
    """Put the tree of a revision into the folder and return its path."""
    path = folder / revision
    path.mkdir()
    archive = subprocess.run(
        ["git", "archive", revision], cwd=ROOT, capture_output=True, check=True
    )
    subprocess.run(["tar", "-x"], cwd=path, input=archive.stdout, check=True)
    return path


def main(argv):
    """Run it; see the module's docstring."""
    positionals, words, flags = split_words(argv)
    check_flags(flags, ("--help",))
    if flags or positionals or "out" not in words:
        print(__doc__.strip())
        return
    out, before = Path(words.pop("out")), words.pop("before", BEFORE)
    rounds = int(words.pop("rounds", 3))
    steps = {"edm_digits": int(words.pop("demo", 300)), "cdrl_digits": int(words.pop("cdrl", 60))}
    if words:
        raise ValueError(f"{min(words)}: no such key; see --help")
    if native.library() is None:
        raise ValueError("there is no compiled library: python setup.py build_ext --inplace")
    samples = {}
    with tempfile.TemporaryDirectory() as folder:
        clone = clone_of(before, Path(folder))
        ways = {"before": (clone, "auto"), "reference": (ROOT, "torch"), "native": (ROOT, "native")}
        for _ in range(rounds):
            for config, count in steps.items():
                for name, (path, mode) in ways.items():
                    result = train_once(path, mode, config, count)
                    samples.setdefault(config, {}).setdefault(name, []).append(result)
                    print(config, name, result, flush=True)
    rows = {
        config: {
            name: {
                "cpu_seconds": statistics.median(r["cpu"] for r in results),
                "wall_seconds": statistics.median(r["wall"] for r in results),
                "samples": results,
            }
            for name, results in by_way.items()
        }
        for config, by_way in samples.items()
    }
    command = record.command_line("training_speed", argv)
    load = round(os.getloadavg()[0], 1)
    record.write(out, command, before=before, rounds=rounds, steps=steps, load=load, rows=rows)
    for config, by_way in rows.items():
        seconds = {name: round(row["cpu_seconds"], 2) for name, row in by_way.items()}
        print(config, f"{steps[config]} steps, CPU seconds:", seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
