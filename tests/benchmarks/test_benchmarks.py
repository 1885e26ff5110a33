"""What the benchmark commands write and keep; nothing is asserted about scores."""

import json

import pytest

import genmodels
from benchmarks import ddo, demo, gbm, gedi, gedi_mnist, record
from genmodels import images
from tests.helpers.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def test_a_record_is_read_back_by_its_own_command_alone(tmp_path):
    path = tmp_path / "a.json"
    command = record.command_line("name", ["what", "out=x", "output=2"], ["out"])
    assert command == "python -m benchmarks.name what output=2"
    assert record.rows(path, command) == []
    written = record.write(path, command, seed=3, rows=[{"value": 1.5}])
    assert written == json.loads(path.read_text())
    assert list(written) == ["command", "machine", "versions", "seed", "rows"]
    assert written["machine"] == record.machine() and "torch" in written["versions"]
    assert record.rows(path, command) == [{"value": 1.5}]
    with pytest.raises(ValueError) as error:
        record.rows(path, command + " lr=1")
    assert str(error.value) == f"out={path}: has the results of `{command}`; name another"
    assert record.write(path, command, machine="another")["machine"] == "another"


@pytest.mark.parametrize(
    "module, name, words",
    [
        (gedi, "gedi_toys", ["toys"]),
        (gedi_mnist, "gedi_mnist", ["clusters", "num=1000", "limit=1"]),
        (gedi_mnist, "gedi_addition", ["addition", "seeds=0-2"]),
    ],
)
def test_a_finished_command_changes_nothing_and_another_is_refused(
    module, name, words, tmp_path, capsys
):
    """On the committed results: of the command that made them no row is left to make."""
    path = tmp_path / f"{name}.json"
    path.write_bytes((RESULTS / path.name).read_bytes())
    assert module.main([*words, f"out={tmp_path}"]) == 0
    assert module.main([*words, f"out={tmp_path}", "optim.lr=1"]) == 2
    assert f"out={path}: has the results of `python -m" in capsys.readouterr().err
    assert path.read_bytes() == (RESULTS / path.name).read_bytes()


def test_stages_of_another_command_are_refused(tmp_path, capsys):
    (tmp_path / "digits").mkdir()
    command = record.command_line("gbm", ["digits"])
    (tmp_path / "digits" / "command.json").write_text(json.dumps(command))
    assert gbm.main(["digits", f"out={tmp_path}", f"work={tmp_path}", "optim.lr=1"]) == 2
    assert f"work={tmp_path}/digits: has the results of `{command}`" in capsys.readouterr().err


def test_a_benchmark_does_not_take_runs_of_other_settings(tmp_path):
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
    words = [
        f"out={tmp_path}",
        "trainer.max_steps=2",
        "data.batch_size=8",
        "method.steps=2",
        "network.channels=[16,16]",
        "network.norm_groups=8",
        "network.head_dim=8",
    ]
    assert demo.main(words) == 0
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert set(report["rows"]) == {"EDM (ours)", "real training digits", "Gaussian of the pixels"}
    text = (tmp_path / "report.md").read_text()
    for row, row_scores in report["rows"].items():
        assert row in text and len(row_scores) == 6
    assert images.read_image(tmp_path / "samples.png").shape[-2:] == (91 * 5, 185 * 5)
    assert "EDM (ours)" in capsys.readouterr().out
