"""The examples run, and what they draw is what they promise."""

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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_trainer", "plain_loop", "own_network"])
def test_what_an_example_draws_is_nearer_to_digits_than_noise(name, tmp_path, monkeypatch, digits):
    (tmp_path / "configs").symlink_to(Path("configs").absolute())
    monkeypatch.chdir(tmp_path)
    drawn = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
    real = digits[0].float().flatten(1) / 127.5 - 1
    means = torch.stack([real[digits[1] == k].mean(dim=0) for k in range(10)])
    nearest = torch.cdist(drawn.float().flatten(1), means).argmin(dim=1)
    assert (nearest == torch.arange(10)).sum() >= 7  # digit k is drawn as class k
