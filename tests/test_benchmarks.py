"""What the benchmark commands write and keep; nothing is asserted about scores."""

import json

import pytest
from conftest import ROOT

import genmodels
from benchmarks import demo
from genmodels import images


def test_a_benchmark_does_not_take_runs_of_other_settings(tmp_path):
    from benchmarks import ddo

    path = tmp_path / "work" / "digits" / "config.json"
    cfg = genmodels.build(str(ROOT / "configs" / "ddo_digits.yaml")).cfg
    ddo.keep_settings(path, cfg)
    ddo.keep_settings(path, cfg)
    cfg.method.betas = [15.0]
    with pytest.raises(ValueError, match="work=.*name another"):
        ddo.keep_settings(path, cfg)


def test_demo_writes_its_pictures_and_report(tmp_path, monkeypatch, capsys):
    """The real demo with two steps of training and fewer images."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "BLOCKS", 1)
    words = [f"out={tmp_path}", "trainer.max_steps=2", "data.batch_size=8", "method.steps=2",
             "network.channels=[16,16]", "network.norm_groups=8", "network.head_dim=8"]  # fmt: skip
    assert demo.main(words) == 0
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert set(report["rows"]) == {"EDM (ours)", "real training digits", "Gaussian of the pixels"}
    text = (tmp_path / "report.md").read_text()
    for row, row_scores in report["rows"].items():
        assert row in text and len(row_scores) == 6
    assert images.read_image(tmp_path / "samples.png").shape[-2:] == (91 * 5, 185 * 5)
    assert "EDM (ours)" in capsys.readouterr().out
