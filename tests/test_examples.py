"""The examples run and draw."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["own_trainer", "plain_loop", "own_network"])
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    config = Path("configs/edm_digits.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/edm_digits.yaml").write_text(config.read_text())
    before = torch.get_rng_state()
    drawn = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](2)
    torch.set_rng_state(before)
    assert drawn.shape == (10, 1, 8, 8) and bool(drawn.isfinite().all())
    assert (tmp_path / f"{name}.png").stat().st_size > 0
