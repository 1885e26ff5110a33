"""The loss by noise level in a training: its columns, a resume, the lines at the end."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

import train
from genmodels.methods.edm import EDM, EDMConfig
from genmodels.run import Run
from genmodels.training import levels, report
from tests.helpers.runs import rows

WORDS = ("trainer.max_steps=8", "trainer.log_every=4", "checkpoint.every=3", "optim.lr=3e-3")


def columns(row):
    return {k.split("/")[1]: float(v) for k, v in row.items() if k.startswith("loss_by") and v}


@pytest.fixture(scope="module")
def trained(train_tiny):
    """A run of eight steps, and (ln sigma, loss) of the images of each."""
    seen, original = [], EDM._note_levels

    def spy(self, sigma, loss):
        seen.append((sigma.log().double().numpy(), loss.detach().double().numpy()))
        original(self, sigma, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EDM, "_note_levels", spy)
        run = train_tiny(*WORDS)
    return run, seen


def test_lines_hold_the_means_since_the_line_before(trained):
    run, seen = trained
    edges = -1.2 + 1.2 * np.arange(-2.5, 2.6, 0.5)
    logged = [row for row in rows(run) if columns(row)]
    assert [row["step"] for row in logged] == ["4", "8"]
    for row, steps in zip(logged, (seen[:4], seen[4:])):
        sigma, loss = (np.concatenate(parts) for parts in zip(*steps))
        part = np.digitize(np.clip(sigma, edges[0], edges[-1] - 1e-9), edges) - 1
        expected = {
            f"{math.exp(-1.2 + 1.2 * (-2.25 + 0.5 * k)):.3g}": loss[part == k].mean()
            for k in range(10)
            if (part == k).any()
        }
        assert columns(row) == pytest.approx(expected, rel=1e-4)
        assert np.mean(loss) > 0 and len(expected) > 5


def test_resumed_between_two_lines_it_is_the_same(trained, train_tiny, tmp_path, capsys):
    run, _ = trained
    other = train_tiny(*WORDS, "trainer.max_steps=6", out=tmp_path)
    capsys.readouterr()
    assert train.main([f"resume={other}", "trainer.max_steps=8"]) == 0
    assert rows(other) == rows(run)
    said = capsys.readouterr().out.splitlines()
    profile = levels.late_profile(Run(run))  # the last line alone is in the last quarter
    assert profile == {float(k): v for k, v in columns(rows(run)[-1]).items()}
    first, value = next(iter(profile.items()))
    assert said[-2 - any("To try" in line for line in said)].startswith(
        f"loss by sigma (1 before training): {first:.2g}: {value:.3g}, "
    )
    assert said[-1] == f"run: {other}"


def test_the_end_suggests_a_law(tmp_path):
    """Means over the last quarter of the steps; of a law that has no p_mean there is no word."""
    cells = {0.1: (1, 1, 0.9), 1.0: (1, 0.4, 0.6), 10.0: (1, 0.9, 0.9)}
    lines = ["step,train/loss," + ",".join(f"loss_by_sigma/{sigma:g}" for sigma in cells)]
    for k, step in enumerate((10, 90, 100)):
        lines.append(f"{step},1," + ",".join(str(cell[k]) for cell in cells.values()))
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    cfg = SimpleNamespace(method=EDMConfig())
    variance = (0.05 + 0.1) / 0.65 - ((0.1 - 0.05) / 0.65) ** 2  # in units of ln(10)^2
    mean, std = math.log(10) * 0.05 / 0.65, math.log(10) * math.sqrt(variance)
    assert levels.lines_about(cfg, Run(tmp_path)) == [
        "loss by sigma (1 before training): 0.1: 0.95, 1: 0.5, 10: 0.9",
        f"it has fallen where ln sigma is {mean:.2g} +- {std:.2g}; trained at -1.2 +- 1.2. To try: "
        f"method.p_mean={mean:.2f} method.p_std={std:.2f}",
    ]
    cfg.method.precond = "ve"
    assert levels.lines_about(cfg, Run(tmp_path)) == []
    assert levels.lines_about(SimpleNamespace(method=EDMConfig()), Run(tmp_path / "none")) == []
    curves = report.read_curves(tmp_path / "metrics.csv")
    assert list(curves) == ["loss", "loss by sigma"]
    assert list(curves["loss by sigma"]) == ["0.1", "1", "10"]
