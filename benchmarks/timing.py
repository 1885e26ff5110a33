"""How things are timed: variants in turn, medians with quartiles, and the machine they ran on."""

import os
import platform
import statistics
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from genmodels.kernels import native

from .torchebm import version as torchebm_version

__all__ = ["machine", "measure", "roofline"]


class _CudaTimer:
    """Milliseconds of one call by events, with the L2 cache overwritten before it."""

    def __init__(self):
        self.junk = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, function):
        self.junk.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def _cpu_timer(function):
    """Milliseconds of CPU time of one call: other work on the machine enters wall time."""
    start = time.process_time()
    function()
    return 1e3 * (time.process_time() - start)


def _first_calls(function, device):
    """Call twice (the first compiles); return MB taken beyond what was held, None on a CPU."""
    function()
    if device != "cuda":
        function()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - held) / 1e6, 1)


def _graphed(function):
    """Return the replay of a CUDA graph of one call: the call without its launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def measure(variants, device, seconds, graph=False):
    """Return {name: {"median", "low", "high", "samples", "extra_mb"}}, or {name: {"error": why}}.

    Times are in milliseconds. The variants take turns, so that clocks and neighbours touch all
    alike; stops when the quartiles of each lie within 2 % of its median, after 300 rounds, or after
    `seconds`. The first call compiles and is not counted. low and high are the quartiles, extra_mb
    the memory of a call with its result, on a GPU.

    Args:
        variants: {name: function without arguments}.
        device: "cuda" or "cpu".
        seconds: time for all variants together, first calls not counted.
        graph: whether to time each variant once more as a CUDA graph, as "NAME (graph)".
    """
    timer = _CudaTimer() if device == "cuda" else _cpu_timer
    results, samples, calls = {}, {}, {}

    def begin(name, make):
        try:
            calls[name], extra = make()
            samples[name], results[name] = [], {"extra_mb": extra}
        except Exception as error:  # a variant that cannot run is reported, not dropped
            results[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}

    for name, function in variants.items():
        begin(name, lambda f=function: (f, _first_calls(f, device)))
        if graph and device == "cuda" and name in calls:
            begin(f"{name} (graph)", lambda f=function: (_graphed(f), None))
    end = time.perf_counter() + seconds
    while samples:
        for name, values in samples.items():
            values.append(round(timer(calls[name]), 6))
        rounds = min(map(len, samples.values()))
        if time.perf_counter() > end and rounds >= 3:
            break
        if rounds >= 300:
            break
        if rounds >= 20 and all(_spread(values) < 0.02 for values in samples.values()):
            break
    for name, values in samples.items():
        low, median, high = _quartiles(values)
        results[name] |= {"median": median, "low": low, "high": high, "samples": values}
    return results


def _quartiles(values):
    return statistics.quantiles(values, n=4, method="inclusive")


def _spread(values):
    low, median, high = _quartiles(values)
    return (high - low) / max(median, 1e-9)


def roofline(device):
    """Return {"copy_gb_s", "matmul_tflop_s", "matmul_dtype"} as measured now.

    copy: reading and writing float32 (512 MB on a GPU, 64 MB on a CPU) counts twice; matmul: square
    bfloat16 products of 8192 on a GPU, float32 of 1024 on a CPU.
    """
    gpu = device == "cuda"
    source = torch.rand((1 << 27) if gpu else (1 << 24), device=device)
    target = torch.empty_like(source)
    dtype, n = (torch.bfloat16, 8192) if gpu else (torch.float32, 1024)
    a = torch.randn(n, n, device=device, dtype=dtype)
    times = measure(
        {"copy": lambda: target.copy_(source), "matmul": lambda: a @ a}, device, 3 if gpu else 1
    )
    return {
        "copy_gb_s": 8e-6 * source.numel() / times["copy"]["median"],
        "matmul_tflop_s": 2e-9 * n**3 / times["matmul"]["median"],
        "matmul_dtype": str(dtype).removeprefix("torch."),
    }


def _cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*words):
    root = Path(__file__).resolve().parent
    done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=root)
    return done.stdout.strip() if done.returncode == 0 else None


def machine(device):
    """Return what a reader needs to judge the numbers; no names of hosts or paths."""
    import numpy

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    info = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--untracked-files=no", "kernels")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "numpy": numpy.__version__,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "GENMODELS_KERNELS": os.environ.get("GENMODELS_KERNELS", "auto"),
        "torchebm": torchebm_version(),
    }
    if device == "cpu":
        library = native.library()
        info["native"] = None if library is None else native.LEVELS[library.genmodels_level()]
        info["load"] = round(os.getloadavg()[0], 1)  # ours is in it: 1.0 is a quiet machine
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return info
