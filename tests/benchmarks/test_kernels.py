"""The benchmark command runs on a CPU and writes what it says; nothing is asserted about speed."""

import contextlib
import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cases, report, timing

WORDS = ["--budget", "1", "--sizes", "tiny"]


def check(record, table, rows):
    assert record["schema"] == report.SCHEMA and record["roofline"]["copy_gb_s"] > 0
    assert {"torch", "cpu", "date", "commit", "triton"} <= set(record["machine"])
    assert len(record["rows"]) == rows
    for row in record["rows"]:
        ran = {name: v for name, v in row["variants"].items() if name != "torchebm"}
        assert all(len(v["samples"]) >= 3 for v in ran.values()), row["name"]
        assert row["name"] in table and 0 < row["error"] < 1e-2
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


@pytest.fixture
def quick(monkeypatch):
    """No compiler, and the threads as they were."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_benchmark_smoke(tmp_path, quick, capsys):
    json_file, table = tmp_path / "out.json", tmp_path / "out.md"
    words = [*WORDS, "--device", "cpu"]
    assert command.main([*words, "--json", str(json_file), "--markdown", str(table)]) == 0
    check(json.loads(json_file.read_text()), table.read_text(), 11)
    before = capsys.readouterr().out
    again = ["--read", str(json_file), "--compare", str(json_file)]
    assert command.main(again) == 0
    assert before.strip() in capsys.readouterr().out.strip()


@pytest.mark.slow
def test_what_only_a_gpu_does(tmp_path, quick, monkeypatch):
    """Graphs, memory and their columns, with stand-ins for CUDA and the tensors on the CPU."""

    class Graph:
        def replay(self):
            pass

    class Properties:
        name, multi_processor_count, total_memory = "a GPU", 1, 10**9

    held = iter(range(0, 10**9, 10**6))
    for name, stand_in in {
        "CUDAGraph": Graph,
        "graph": contextlib.nullcontext,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: next(held),
        "max_memory_allocated": lambda: next(held),
        "get_device_properties": lambda device: Properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(timing, "_CudaTimer", lambda: timing._cpu_timer)
    roofline = {"copy_gb_s": 1.0, "matmul_tflop_s": 1.0, "matmul_dtype": "bfloat16"}
    monkeypatch.setattr(timing, "roofline", lambda device: roofline)
    on_cpu = cases.cases
    monkeypatch.setattr(command, "cases", lambda device, *rest: on_cpu("cpu", *rest))
    json_file, table = tmp_path / "out.json", tmp_path / "out.md"
    words = [*WORDS, "--device", "cuda", "--json", str(json_file), "--markdown", str(table)]
    assert command.main(words) == 0
    record = json.loads(json_file.read_text())
    check(record, table.read_text(), 11)
    step = record["rows"][0]["variants"]
    assert set(step) >= {f"{n}{g}" for n in ("ours", "eager", "compile") for g in ("", " (graph)")}
    assert step["ours"]["extra_mb"] == 1.0
    assert "compile / ours, graphs | extra MB, ours / eager | error" in table.read_text()


def test_failed_variants_stay_in_the_table():
    good = {"median": 2.0, "low": 1.9, "high": 2.1, "samples": [2.0]}
    row = {
        "name": "op",
        "size": "1",
        "dtype": "float32",
        "bytes": 3.4e7,
        "flops": 0,
        "error": 0.0,
        "variants": {"ours": good, "eager": {**good, "median": 5.0}, "compile": {"error": "no"}},
    }
    record = {
        "machine": {
            "date": "d",
            "cpu": "c",
            "threads": 1,
            "torch": "t",
            "triton": None,
            "python": "p",
            "commit": "x",
            "uncommitted": False,
        },
        "roofline": {"copy_gb_s": 34.0, "matmul_tflop_s": 1.0, "matmul_dtype": "float32"},
        "rows": [row],
        "device": "cpu",
        "command": "run",
        "seconds": 1.0,
    }
    table = report.markdown(record)
    assert "op (1), compile: no" in table
    assert "| 2 ms +-5% | 50 % | 2.50x | - |" in table
    with pytest.raises(SystemExit):
        command.main(["--suite", "gpu"])
