"""CDRL through the scripts: training, resuming, diagnostics, divergence, sampling, evaluation."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import genmodels
import sample
import train
from genmodels import images
from genmodels.checkpoint import export, read_checkpoint
from genmodels.methods.cdrl import CDRL
from genmodels.sampling.langevin import Chain
from genmodels.sampling.recovery import RungMeans
from tests.helpers.paths import ROOT

WORDS = (
    "network.width=16",
    "method.steps=3",
    "method.initializer_channels=16",
    "trainer.progress=false",
    "sample.every=0",
    "data.batch_size=12",
)


def run_training(out, *words, config="cdrl_digits", overlay="debug"):
    argv = [str(ROOT / f"configs/{name}.yaml") for name in (config, overlay)]
    code = train.main([*argv, f"out_dir={out}", *WORDS, *words])
    folders = list(out.glob("*/*"))
    return code, folders[0] if folders else None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    code, folder = run_training(tmp_path_factory.mktemp("runs"), "trainer.max_steps=6")
    assert code == 0
    return folder


def test_resumed_training_is_the_same_training(run, tmp_path):
    code, folder = run_training(tmp_path, "trainer.max_steps=3", "optim.decay=none")
    assert code == 0 and train.main([f"resume={folder}", "trainer.max_steps=6"]) == 0
    code, straight = run_training(tmp_path / "b", "trainer.max_steps=6", "optim.decay=none")
    one, two = (read_checkpoint(f / "checkpoints" / "last.ckpt") for f in (folder, straight))
    assert one["global_step"] == two["global_step"] == 6
    for part in ("state_dict", "current_model_state"):
        for key, value in one[part].items():
            assert torch.equal(value, two[part][key]), key


def test_each_level_is_logged(run):
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for name in RungMeans.names:
        for t in range(1, 7):
            values = [row[f"levels/{name}_{t}"] for row in rows]
            assert any(value not in ("", "nan") for value in values)
    for row in rows:
        gaps = [float(row[f"levels/gap_{t}"]) for t in range(1, 7)]
        parts = [
            float(row[f"levels/f_data_{t}"]) - float(row[f"levels/f_chain_{t}"])
            for t in range(1, 7)
        ]
        np.testing.assert_allclose(gaps, parts, rtol=1e-4, atol=1e-5)


def test_chains_begin_after_matching(tmp_path):
    code, folder = run_training(tmp_path, "trainer.max_steps=4", "method.matching=0.5")
    assert code == 0
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["levels/gap_1"]) for row in rows] == [False, False, True, True]
    assert [float(row["train/loss"]) > 0.5 for row in rows] == [True, True, False, False]


def test_level_means_by_hand():
    chain = Chain(
        torch.tensor([[1.0], [2.0], [5.0]]),
        grad_norm=torch.tensor([[1.0, 2, 3]] * 2),
        displacement=torch.tensor([4.0, 5, 6]),
    )
    data = torch.tensor([[0.0], [0.0], [9.0]])
    f_data, f_chain = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 4.0, 3.0])
    means = RungMeans(3, torch.tensor([2, 2, 3]), f_data, f_chain, chain, data)
    assert means.present.tolist() == [False, True, True]
    assert means.values[1].tolist() == [1.5, 2.25, -0.75, 1.5, 4.5, 1.5]
    assert means.values[2].tolist() == [3, 3, 0, 3, 6, 4]
    assert means.values[0].isnan().all()
    assert means.beyond(1.0) == ([], True)
    lines, finite = means.beyond(0.5)
    assert finite and len(lines) == 1 and lines[0].startswith("level 2 of 3 (f_data 1.5, f_chain")
    means.values[2] = torch.nan
    lines, finite = means.beyond(1.0)
    assert lines[0].startswith("level 3 of 3") and not finite


def test_divergence_stops_and_names_the_level(tmp_path, monkeypatch, capsys):
    original = CDRL.loss

    def loss(self, batch):
        result = original(self, batch)
        if self.global_step == 2:
            self.rungs.values[3, 2], self.rungs.present[3] = -2e6, True
        return result

    monkeypatch.setattr(CDRL, "loss", loss)
    code, folder = run_training(tmp_path)
    error = capsys.readouterr().err
    assert code == 1 and "method.divergence=1e+06: exceeded in step 2 at level 4 of 6" in error
    assert "init=" in error and "optim.lr=" in error
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 2


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_level_that_diverges_stops_every_process(elsewhere):
    """Each tells the others whether its own levels did; one of them alone would leave them waiting.

    elsewhere: it is not this process's levels.
    """

    class Two:
        asked = []

        def reduce_boolean_decision(self, decision, all=True):
            self.asked.append(decision)
            return not all

    config = [str(ROOT / f"configs/{name}.yaml") for name in ("cdrl_digits", "debug")]
    model = genmodels.build(config, *WORDS)
    model._trainer = SimpleNamespace(strategy=Two(), global_step=7)
    values = torch.zeros(6, 6)
    values[3, 2] = 1.0 if elsewhere else -2e6
    model.rungs = RungMeans.__new__(RungMeans)
    model.rungs.values, model.rungs.present = values, torch.ones(6, dtype=torch.bool)
    name = "a level on another process" if elsewhere else "level 4 of 6"
    with pytest.raises(FloatingPointError, match=f"exceeded in step 7 at {name}"):
        model.configure_gradient_clipping(None)
    assert Two.asked == [not elsewhere]


def test_a_step_that_is_not_finite_is_skipped_and_its_level_named(tmp_path, monkeypatch, capsys):
    original = CDRL.loss

    def loss(self, batch):
        value, logs = original(self, batch)
        if self.global_step == 1 and self.nonfinite == 0:
            self.rungs.values[0], self.rungs.present[0] = torch.nan, True
            value = value * torch.nan
        return value, logs

    monkeypatch.setattr(CDRL, "loss", loss)
    code, folder = run_training(tmp_path)
    shown = capsys.readouterr().out
    assert code == 0 and "not finite in step 1 at level 1 of 6" in shown and "step skipped" in shown
    state = read_checkpoint(folder / "checkpoints" / "last.ckpt")["current_model_state"]
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize(
    "name",
    ["cdrl_cifar10", "cdrl_cifar10_large", "cdrl_fashion", "drl_cifar10", "cdrl_imagenet32"],
)
def test_image_configs_build_what_they_say(name):
    from genmodels.config import load_config
    from genmodels.methods import METHODS
    from genmodels.networks import NETWORKS

    cfg = load_config([ROOT / f"configs/{name}.yaml"], methods=METHODS, networks=NETWORKS)
    drl = name.startswith("drl")
    assert (cfg.method.steps, cfg.method.step_size) == ((30, 2e-4) if drl else (15, 4e-4))
    assert (cfg.method.initializer == "none") == drl == (cfg.method.angles == "drl")
    assert drl == (not cfg.method.shared_noise) == (cfg.network.kind == "drl_released")
    assert drl == (cfg.method.level_code == "index") == (cfg.method.tweedie_scale == 0)
    assert cfg.method.initializer_kind == ("adm" if drl else "cdrl")
    assert cfg.trainer.precision == ("bf16-mixed" if name == "cdrl_fashion" else "32-true")
    assert cfg.network.channels == {"cdrl_cifar10_large": 256, "cdrl_fashion": 64}.get(name, 128)
    assert cfg.data.labels == (name == "cdrl_imagenet32")
    assert cfg.optim.clip == (0.0 if drl else 1.0)
    # As in the papers: no setting that helps short trainings.
    method = cfg.method
    assert (method.units, method.growth) == ("step", "clean") and method.tweedie_scale == 1 - drl
    assert (method.snr_max, method.snr_min) == (9.8, -5.1)
    assert method.levels == 6 and method.noise_scale == (0.99 if drl else 1.0)
    assert cfg.network.spectral_norm and cfg.network.activation == "leaky"
    assert cfg.network.multipliers == [1, 2, 2, 2]


def test_the_parent_method_trains_and_samples(tmp_path):
    """DRL on digits: no initializer, its own levels, no denoising after the last chain."""
    argv = [str(ROOT / "configs/drl_cifar10.yaml"), str(ROOT / "configs/debug.yaml")]
    argv += [
        "data.name=digits",
        "network.channels=8",
        "network.multipliers=1,2",
        "network.blocks=1",
        "trainer.progress=false",
        "sample.every=0",
    ]
    assert train.main([*argv, f"out_dir={tmp_path}", "method.steps=3"]) == 0
    (folder,) = tmp_path.glob("*/*")
    model = genmodels.load(folder)
    assert model.initializer is None
    x = model.sample([0, 1])
    assert x.shape == (2, 1, 8, 8) and model.nfe == 6 * 3
    assert model.schedule.exact.noise_clean[1:].tolist() == [0, 1, 2, 3, 4, 5]


def test_export_makes_the_same_images(run, tmp_path):
    export(run, tmp_path / "model")
    one, two = genmodels.load(run), genmodels.load(tmp_path / "model")
    assert torch.equal(one.sample([3, 4]), two.sample([3, 4]))


# ------------------------------------------------------------------------------------------------
# Scripts


def test_sample_script_completes_and_composes(run, tmp_path, capsys):
    pixels = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, :5] = 255
    (tmp_path / "in").mkdir()
    for k in range(2):
        images.write_png(tmp_path / f"in/{k}.png", pixels[k])
    images.write_png(tmp_path / "mask.png", mask)
    words = [str(run), "num=3", f"inpaint={tmp_path}/in", f"mask={tmp_path}/mask.png"]
    # The last denoising, of hardly any training, would make all of them one grey.
    assert sample.main([*words, "tweedie_scale=0", f"out={tmp_path}/out"]) == 0
    made = torch.stack([images.read_image(tmp_path / f"out/{k:06d}.png", 1) for k in range(3)])
    assert torch.equal(made[:, :, :5], pixels[[0, 1, 0]][:, :, :5])
    assert not torch.equal(made[0], made[2])
    options = ["compose=3:1.5,5|6,!7:0.5", "steps=2", "num=1", f"out={tmp_path}/composed"]
    assert sample.main([str(run), *options]) == 0
    assert "75 network evaluations" not in capsys.readouterr().err
    wrong = {
        (f"inpaint={tmp_path}/in",): "give both",
        (f"mask={tmp_path}/mask.png",): "give both",
        (f"inpaint={tmp_path}/in", f"mask={tmp_path}/none.png"): "none.png",
        ("compose=12",): "compose=12: '12' is no term",
        ("guidance=0.7", "compose=3"): "weights take guidance's place",
        ("churn=1",): "unknown key churn=1",
    }
    for words, message in wrong.items():
        assert sample.main([str(run), "num=1", f"out={tmp_path}/x", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "x").exists()


def test_other_methods_refuse_to_complete(tiny_run, tmp_path, capsys):
    images.write_png(tmp_path / "a.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
    words = [str(tiny_run), f"inpaint={tmp_path}/a.png", f"mask={tmp_path}/a.png"]
    assert sample.main([*words, f"out={tmp_path}/x"]) == 2
    assert "EDM does not complete images" in capsys.readouterr().err


def test_a_network_of_the_wrong_kind_is_refused():
    for config, words, message in (
        ("edm_digits", ("network.name=mlp",), "method.name=edm needs a denoiser"),
        ("cdrl_digits", ("network.name=unet",), "method.name=cdrl needs an energy: ebm, mlp"),
    ):
        plain = {"data": {"name": "digits"}, "method": {"name": config.split("_")[0]}}
        with pytest.raises(ValueError, match=message):
            genmodels.build([plain], *words)


def test_evaluate_ood(run, tmp_path, capsys):
    out = tmp_path / "ood.json"
    words = ["ood=noise,constant,interpolation", "num=60", f"out={out}"]
    assert evaluate.main([str(run), *words]) == 0
    report = json.loads(out.read_text())
    metrics = report["metrics"]
    kinds = ("f", "f_levels", "grad_norm")
    names = {
        f"{metric}_{source}_{kind}{more}"
        for metric in ("auroc", "aupr", "fpr95")
        for source in ("noise", "constant", "interpolation")
        for kind in kinds
        for more in ("", "_typicality")
    }
    assert set(metrics) == names
    assert all(0 <= score["value"] <= 1 for score in metrics.values())
    assert report["num"] == {
        "inside": 60,
        "train": 1437,
        "noise": 60,
        "constant": 60,
        "interpolation": 60,
    }
    assert evaluate.main([str(run), "ood=mnist,x", f"out={out}"]) == 2
    assert evaluate.main([str(run), "ood=x"]) == 2
    capsys.readouterr()


def test_evaluate_likelihood(run, tmp_path, capsys):
    """likelihood=ais is both bounds, as true is for this method; one can be asked for alone."""
    found = {}
    words = ["num=4", "ais_steps=10", "ais_chains=4", "ais_refine=2", f"out={tmp_path}/bpd.json"]
    for asked in ("true", "ais", "ais_upper"):
        assert evaluate.main([str(run), f"likelihood={asked}", *words]) == 0
        found[asked] = json.loads((tmp_path / "bpd.json").read_text())["metrics"]
    assert set(found["ais"]) == {"bpd_ais_lower", "bpd_ais_upper"}
    assert found["ais"] == found["true"]
    assert found["ais_upper"] == {"bpd_ais_upper": found["ais"]["bpd_ais_upper"]}
    assert all(np.isfinite(score["value"]) for score in found["ais"].values())
    capsys.readouterr()
    assert evaluate.main([str(run), "likelihood=ode", *words]) == 2
    error = capsys.readouterr().err
    assert "likelihood=ode: choose from true, ais_lower, ais_upper" in error
    assert error.count("\n") == 1
