"""What the benchmark commands write and keep; nothing is asserted about scores."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import genmodels
from benchmarks import cdrl, crops, ddo, demo, edm2_digits, gbm, gedi, gedi_mnist, record
from benchmarks.gedi_ablation import Runs
from genmodels import cli, images
from tests.helpers.gedi_models import batch_of, build, points
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


def test_rows_of_a_race_are_kept_and_other_settings_refused(tmp_path, monkeypatch, capsys):
    """Means and standard errors over the seeds, of the sweep too; finished rows are not made."""
    made = []

    def one_row(words, *_):
        made.append(words[-1])
        value = 1.0 + len(made)
        scores = {name: {"value": value} for name in edm2_digits.SCORES}
        facts = dict.fromkeys(("steps", "train_cpu_seconds", "sample_cpu_seconds_per_image"), 4)
        return facts | {"scores": scores, "sweep": {"0.1": scores}}

    monkeypatch.setattr(edm2_digits, "one_row", one_row)
    monkeypatch.setattr(edm2_digits, "draw", lambda *_: None)
    words = ["methods=EDM2", f"out={tmp_path}", f"work={tmp_path}"]
    assert edm2_digits.main([*words, "seeds=0"]) == edm2_digits.main([*words, "seeds=0-1"]) == 0
    assert made == ["seed=0", "seed=1"]
    table = json.loads((tmp_path / "edm2_digits.json").read_text())["table"]["EDM2"]
    assert table["fd"] == table["sweep"]["0.1"]["fd"] == {"mean": 2.5, "stderr": 0.5}
    capsys.readouterr()
    for other in ("seconds=90", "optim.lr=1"):
        assert edm2_digits.main([*words, other]) == 2
        assert "has a row of `python -m benchmarks.edm2_digits" in capsys.readouterr().err


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


# ------------------------------------------------------------------------------------------------
# CDRL: the command runs on a CPU and writes what it says


SMALL = ("network.width=16", "method.steps=1", "method.initializer_channels=16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a model of two training steps was scored and drawn."""
    out = tmp_path_factory.mktemp("out")
    words = [
        "digits",
        "quick=true",
        f"out={out}",
        f"pictures={out}",
        f"out_dir={out}/runs",
        "trainer.max_steps=2",
        "trainer.progress=false",
        *SMALL,
    ]
    assert cdrl.main(words) == 0
    return out


def test_digits(folder):
    facts = json.loads((folder / "cdrl_digits.json").read_text())
    assert facts["steps"] == 2 and facts["seed"] == 0 and facts["count"] == 360
    assert facts["train_cpu_seconds"] > 0 and {"cpu", "torch", "commit"} <= set(facts["machine"])
    scores = facts["without error bars"]["CDRL (ours)"]
    assert set(scores) == {"nn1", "of fakes", "of real", "FD (digits)"}
    assert scores["FD (digits)"] > 1 and 0.5 < scores["nn1"] <= 1
    for name in ("digits", "inpaint", "compose"):
        assert (folder / f"cdrl_{name}.png").stat().st_size > 500


def test_densities(folder):
    (run,) = (folder / "runs").glob("*/*")
    words = [
        "densities",
        f"model={run}",
        f"out={folder}",
        "num=3",
        "ais_steps=3",
        "ais_chains=4",
        "ais_refine=1",
    ]
    assert cdrl.main(words) == 0
    facts = json.loads((folder / "cdrl_densities.json").read_text())
    assert set(facts["bits_per_dim"]) == {"bpd_ais_lower", "bpd_ais_upper"}
    assert 0 <= facts["ood"]["auroc_noise_f"]["value"] <= 1
    assert facts["command"].endswith(
        "densities model=RUN out=OUT num=3 ais_steps=3 ais_chains=4 ais_refine=1"
    )


def test_speed(folder):
    words = ["speed", "config=configs/cdrl_digits.yaml", "size=4", "seconds=0.2", f"out={folder}"]
    assert cdrl.main([*words, *SMALL]) == 0
    facts = json.loads((folder / "cdrl_speed.json").read_text())
    assert set(facts["fp32"]) == {
        "plain: training step",
        "plain: chain",
        "ours: training step",
        "ours: chain",
    }
    assert all(row["median"] > 0 for row in facts["fp32"].values())


def test_refuses_another_name(capsys):
    assert cdrl.main(["digit"]) == 2
    assert "benchmark=digit" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# GEDI: the stacked step of the ablation is the method's step


WORDS = (
    "method.data_noise=0",
    "method.view_noise=0",
    "method.l2=0.03",
    "method.tau=0.3",
    "method.inv_start=2",
    "method.inv_ramp=4",
    "network.input_scale=4",
    "method.w_inv=3",
)
VARIANTS = ((), ("method.w_gen=0",), ("method.detach_target=true", "method.w_prior_mean=7"))


def test_runs_trained_at_once_are_those_trained_alone(monkeypatch):
    """Without noise, on given chains: the same parameters after some steps of Adam."""
    x, fake = points(), points().flip(0) * 0.9
    models = [build(*WORDS, *words, f"seed={i}") for i, words in enumerate(VARIANTS)]
    runs = Runs(models, 0)
    monkeypatch.setattr(Runs, "chains", lambda self, count: fake.flatten(1).expand(3, -1, -1))
    for number in range(8):
        runs.step(x.flatten(1).expand(3, -1, -1), number)
    for i, model in enumerate(models):
        optimizer = torch.optim.Adam(model.parameters(), model.cfg.optim.lr)
        model._fakes = lambda n: fake
        for number in range(8):
            monkeypatch.setattr(type(model), "global_step", number)
            optimizer.zero_grad()
            model.loss(batch_of(x))[0].backward()
            optimizer.step()
        for own, stacked in zip(model.parameters(), runs.parameters):
            torch.testing.assert_close(own, stacked[i], atol=2e-5, rtol=1e-3)


def test_crops_are_measured_and_drawn(tmp_path, monkeypatch, capsys):
    """On pictures whose power is known: stripes of one pixel, which no crop to half keeps."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    sample = tmp_path / "imagenet_sample"
    (sample / "jpeg").mkdir(parents=True)
    images.write_png(sample / "jpeg" / "a.png", torch.from_numpy(stripes).permute(2, 0, 1))
    np.savez(sample / "imagenet_sample_64.npz", images=np.full((3, 64, 64, 3), 100, np.uint8))
    assert cli.run(crops.main, [f"root={tmp_path}", f"out={tmp_path}/a.json"]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["crop"] for row in rows] == ["center", "adm", "lanczos"] * 2
    for row in rows[:3]:
        assert row["mean"] == round(100 / 127.5 - 1, 4) and row["gradient_power"] == 0 == row["std"]
    for row in rows[3:]:  # as it is: each neighbour is 255 away, and all power at frequency 32
        assert row["gradient_power"] == 255**2 and row["off_lanczos"] == 0
        assert row["spectrum"].index(max(row["spectrum"])) == 31
    words = [f"read={RESULTS}/crops.json", f"plot={tmp_path}/a.png"]
    assert cli.run(crops.main, words) == 0 and images.read_image(tmp_path / "a.png").shape[-1] > 800
    committed = json.loads((RESULTS / "crops.json").read_text())["rows"]
    assert [row["count"] for row in committed] == [1000] * 3 + [41] * 3
    page = (ROOT / "docs" / "data.md").read_text()
    for row in committed:
        cells = (f"`{row['crop']}`", f"{row['mean']:.4f}", f"{row['std']:.4f}")
        assert " | ".join((*cells, f"{row['gradient_power']:.1f}")) in page


def test_names_of_energies_can_stand_in_a_list():
    """methods=A,B has commas between the names, and the default is such a list."""
    from benchmarks.energies import METHODS

    assert not [name for methods in METHODS.values() for name in methods if "," in name]


def test_an_energy_that_diverges_is_a_row_without_scores(monkeypatch, tmp_path):
    from benchmarks import energies

    def train(words):
        if f"out_dir={tmp_path}" in words:  # the third; two short ones have shown what a step costs
            raise RuntimeError("method.divergence=1e+06: exceeded in step 5; start again: FOLDER")

    seconds = itertools.accumulate([0, 1, 1, 3, 3])
    monkeypatch.setattr(energies, "train", train)
    monkeypatch.setattr(energies, "time", SimpleNamespace(process_time=lambda: next(seconds)))
    row = energies.one_row("cdrl", "5 steps", 10, 30.0, tmp_path, ["data.root=FOLDER"])
    assert row["steps"] == 900  # 30 s at 2 s for 60 steps
    assert row["diverged"] == "method.divergence=1e+06: exceeded in step 5"
    assert "FOLDER" not in str(row)
    assert energies.table([row]) == {"5 steps": {"seeds": 0, "diverged": 1}}
