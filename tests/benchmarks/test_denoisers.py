"""The table of denoisers: where its numbers come from, and that it goes on where it was."""

import json
import shutil

import numpy as np
import pytest

from benchmarks import denoisers
from tests.helpers.paths import ROOT

RESULTS = ROOT / "benchmarks/results"


def report(words):
    """Return what evaluate.py might say: picture k has 20 + k dB, BM3D a decibel more."""
    count = 12 if "Set12" in words[1] else 68
    rows = [
        {"image": f"{k + 1:02d}.png", "psnr": 20.0 + k, "psnr_bm3d": 21.0 + k} for k in range(count)
    ]
    names = ("psnr", "psnr_noisy", "psnr_ensemble", "ssim", "psnr_bm3d", "level_error")
    scores = {name: {"value": float(np.mean([r.get(name, 0.1) for r in rows]))} for name in names}
    return {"metrics": scores, "rows": rows, "restoring": {"megapixels_per_second": 1.0}}


def test_the_table_takes_bm3d_from_earlier_reports_and_goes_on(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(denoisers, "evaluated", lambda words: asked.append(words) or report(words))
    shutil.copy(RESULTS / "noise2score_bm3d_set12_gaussian_25.json", tmp_path)
    assert denoisers.main(["only=Set12", f"out={tmp_path}"]) == 0
    assert denoisers.main([f"out={tmp_path}"]) == 0
    assert len(asked) == 2 * len(denoisers.CONDITIONS)  # none twice
    rows = {
        (row["set"], row["law"], row["level"]): row
        for row in json.loads((tmp_path / "denoisers.json").read_text())["rows"]
    }
    assert set(rows) == set(denoisers.CONDITIONS)
    known, new = rows["Set12", "gaussian", 25], rows["Set12", "gaussian", 50]
    assert known["bm3d"] == pytest.approx(30.0036, abs=1e-3)  # docs/noise2score.md
    assert known["bm3d_from"] == "noise2score_bm3d_set12_gaussian_25.json"
    assert new["bm3d"] == pytest.approx(26.5) and new["bm3d_from"] == "this run"
    assert new["without"] == pytest.approx((12 * 25.5 - 23) / 11)
    assert asked[2][-2:] == ["--against", "bm3d"] and "blind=true" in asked[1]
    shown = capsys.readouterr().out
    assert "| Set12 | gaussian 25 |" in shown and (tmp_path / "denoisers.md").is_file()
    assert denoisers.main(["modle=x"]) == 2
