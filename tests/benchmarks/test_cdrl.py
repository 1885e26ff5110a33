"""The benchmark command runs on a CPU and writes what it says; nothing is asserted about scores."""

import json

import pytest

from benchmarks import cdrl

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
