"""What a rented GPU without a network shows of this project, in two commands of at most 300 s each.

    python benchmarks/gpu_offline.py pack out=BUNDLE [python=3.12]        where there is a network
    python BUNDLE/repo/benchmarks/gpu_offline.py kernels out=RESULTS      there, 300 s: the kernels
    python BUNDLE/repo/benchmarks/gpu_offline.py training out=RESULTS     there, 300 s: trainings
        bundle=BUNDLE    the folder with wheels/ and data/; by default the one the clone lies in
        seconds=300      of the whole command
        device=cuda      cpu: a rehearsal with small sizes

The bundle holds this clone as it is committed, the wheels that a machine with torch, triton and
Lightning alone lacks, and Fashion-MNIST from GENMODELS_DATA. There, wheels of what can be imported
already are left out. Each stage is a process with a time limit of its own; RESULTS/gpu_PART.json is
written anew after each of them, and one that fails or is late does not stop the next. This file
needs nothing but Python.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("diffusers", "omegaconf", "pytest")
# The machine has its own of these, or what needs them (downloads, for hf_xet) is not run there.
LEFT_OUT = ("torch", "torchvision", "triton", "numpy", "nvidia", "hf_xet")
RESERVE = 10  # seconds of a command that no stage gets: to start, unpack and write


def stages(part, out, device):
    """Return [(name, words after `python`, limit in seconds)]; the last takes what is left."""
    cuda = device == "cuda"
    speed = (
        ["steps=40", "num=500"]
        if cuda
        else ["batch=4", "steps=2", "num=4", "overlay=configs/debug.yaml"]
    )
    speed += [] if cuda else ["network.channels=32", "network.blocks=1", "trainer.compile=false"]
    budget = ["--device", device, "--budget", "180" if cuda else "10"]
    budget += [] if cuda else ["--sizes", "tiny"]
    fashion = [] if cuda else ["overlay=configs/debug.yaml", "num=8", "trainer.compile=false"]
    if part == "kernels":
        checks = ["tests/kernels/test_gpu.py", "tests/sampling/test_langevin.py", "-m", "gpu"]
        # Those of resize_normalize need torch-fidelity, which the bundle lacks.
        checks = (
            checks if cuda else ["tests/kernels/test_references.py", "-k", "not resize_matches"]
        )
        return [
            ("machine", ["-c", MACHINE], 30),
            ("checks", ["-m", "pytest", "-q", "-p", "no:cacheprovider", *checks], 75),
            ("benchmarks", ["-m", "benchmarks", *budget, "--json", f"{out}/gpu.json"], 200),
        ]
    return [
        ("machine", ["-c", MACHINE], 30),
        (
            "edm_published",
            ["-m", "benchmarks.edm_speed", f"out={out}", "how=published", *speed],
            75,
        ),
        ("edm_fast", ["-m", "benchmarks.edm_speed", f"out={out}", "how=fast", *speed], 120),
        ("edm_fashion", ["-m", "benchmarks.edm_fashion", f"out={out}", *fashion], 300),
    ]


MACHINE = """
import json, torch, triton, lightning
print(json.dumps({"torch": torch.__version__, "triton": triton.__version__,
    "lightning": lightning.__version__, "cuda": torch.version.cuda,
    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else ""}))
"""


def main(argv):
    """Return the exit code: 0, 1 if a stage failed, 2 a wrong word."""
    part, words = (argv or ["--help"])[0], dict(word.partition("=")[::2] for word in argv[1:])
    known = {"pack": {"out", "python"}, "kernels": set(), "training": set()}
    if part not in known:
        print(__doc__.strip())
        return 0 if part == "--help" else 2
    known = known[part] or {"out", "bundle", "seconds", "device"}
    if unknown := set(words) - known:
        print(f"error: {unknown.pop()}=: not known; one of {', '.join(sorted(known))}=")
        return 2
    if not words.get("out"):
        print("error: out=: name a folder")
        return 2
    out = Path(words["out"]).resolve()
    if part == "pack":
        return pack(out, words.get("python", "3.12"))
    bundle = Path(words.get("bundle", ROOT.parent)).resolve()
    if not (bundle / "wheels").is_dir():
        print(f"error: bundle={bundle}: holds no wheels/; make one with `pack out=BUNDLE`")
        return 2
    return run(part, out, bundle, float(words.get("seconds", 300)), words.get("device", "cuda"))


def pack(out, python):
    """Make a bundle in a new folder."""
    if out.exists() and any(out.iterdir()):
        print(f"error: out={out}: is not empty")
        return 2
    for name in ("repo", "wheels", "data"):
        (out / name).mkdir(parents=True)
    archive = subprocess.run(
        ["git", "-C", ROOT, "archive", "HEAD"], check=True, capture_output=True
    )
    subprocess.run(["tar", "-x", "-C", out / "repo"], input=archive.stdout, check=True)
    platforms = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
    command = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "-d", str(out / "wheels")]
    command += [f"--platform={name}" for name in platforms]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), *PACKAGES], check=True)
    for wheel in (out / "wheels").glob("*.whl"):
        if wheel.name.split("-")[0].lower().startswith(LEFT_OUT):
            wheel.unlink()
    source = Path(os.environ.get("GENMODELS_DATA") or ROOT / "data") / "FashionMNIST/raw"
    copied = out / "data/FashionMNIST/raw"
    copied.mkdir(parents=True)
    for file in sorted(source.glob("*ubyte*")):
        (copied / file.name).write_bytes(file.read_bytes())
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 2**20:.0f} MiB")
    return 0


def unpack(wheels, site):
    """Unpack the wheels of what cannot be imported here; return their names."""
    unpacked = []
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            tops = {name.split("/")[0] for name in archive.namelist()}
            modules = {
                top.removesuffix(".py") for top in tops if "." not in top.removesuffix(".py")
            }
            if all(importlib.util.find_spec(name) for name in modules):
                continue
            archive.extractall(site)
        unpacked.append(wheel.name)
    return unpacked


def run(part, out, bundle, seconds, device):
    """Run the stages of a part, write RESULTS/gpu_PART.json after each; return the exit code."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    record = {"command": " ".join(["python", *sys.argv]), "seconds": seconds, "stages": []}
    with tempfile.TemporaryDirectory() as site:
        record["unpacked"] = unpack(bundle / "wheels", site)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), site]),
            "PYTHONUNBUFFERED": "1",
            "GENMODELS_DATA": str(bundle / "data"),
            "GENMODELS_OFFLINE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # the machine's may need another pytest
        }
        for name, words, limit in stages(part, out, device):
            left = seconds - RESERVE - (time.monotonic() - began)
            limit = min(limit, left)
            if name == "edm_fashion" and device == "cuda":  # the scores and the export follow
                words = [*words, "num=2000", f"trainer.max_time={max(10, limit - 60):.0f}s"]
            record["stages"].append(stage(name, words, limit, environment, out))
            text = json.dumps(record, indent=1) + "\n"
            partial = out / f".gpu_{part}.json"
            partial.write_text(text)
            partial.replace(out / f"gpu_{part}.json")
    return int(any(stage["code"] for stage in record["stages"]))


def stage(name, words, limit, environment, out):
    """Run one stage; return {name, code, seconds, limit, tail}, code "late" if it was cut off."""
    if limit <= 0:
        print(f"{name}: no time left", flush=True)
        return {"name": name, "code": "no time left", "seconds": 0, "limit": 0, "tail": []}
    began, log = time.monotonic(), out / f"{name}.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "late"
    seconds = round(time.monotonic() - began, 1)
    tail = log.read_text(errors="replace").splitlines()[-20:]
    print(f"{name}: {code}, {seconds} s of {limit:.0f}", flush=True)
    return {"name": name, "code": code, "seconds": seconds, "limit": limit, "tail": tail}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
