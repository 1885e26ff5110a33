"""The benchmark command runs on a CPU and writes what it says; nothing is asserted about speed."""

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import report


def test_benchmark_smoke(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # saves the compiler
    threads = torch.get_num_threads()
    json_file, table = tmp_path / "out.json", tmp_path / "out.md"
    words = ["--device", "cpu", "--budget", "3", "--suite", "kernels"]
    try:
        assert command.main([*words, "--json", str(json_file), "--markdown", str(table)]) == 0
    finally:
        torch.set_num_threads(threads)
    record = json.loads(json_file.read_text())
    assert record["schema"] == 1 and record["roofline"]["copy_gb_s"] > 0
    assert {"torch", "cpu", "date", "commit", "triton"} <= set(record["machine"])
    assert len(record["rows"]) == 10
    for row in record["rows"]:
        assert all(len(v["samples"]) >= 3 for v in row["variants"].values()), row["name"]
        assert row["name"] in table.read_text()
    before = capsys.readouterr().out
    again = ["--read", str(json_file), "--compare", str(json_file)]
    assert command.main(again) == 0
    assert before.strip() in capsys.readouterr().out.strip()


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
        "machine": {"date": "d", "cpu": "c", "threads": 1, "torch": "t", "triton": None,
                    "python": "p", "commit": "x", "uncommitted": False},
        "roofline": {"copy_gb_s": 34.0, "matmul_tflop_s": 1.0, "matmul_dtype": "float32"},
        "rows": [row], "device": "cpu", "command": "run", "seconds": 1.0,
    }  # fmt: skip
    table = report.markdown(record)
    assert "op (1), compile: no" in table
    assert "| 2 ms +-5% | 50 % | 2.50x | - |" in table
    with pytest.raises(SystemExit):
        command.main(["--suite", "gpu"])
