"""Adding a data set is one row: every command knows it then. And a light import."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train
from genmodels import cli
from genmodels.checkpoint import export
from genmodels.config import DataConfig
from genmodels.data import DATASETS, DataSet, commands, load_split

ROOT = Path(train.__file__).parent


def read_stripes(cfg, split):
    """Images of one grey a class, 40 to train on and 20 held out."""
    count = 40 if split == "train" else 20
    labels = torch.arange(count) % 4
    return (60 * labels.to(torch.uint8)).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8), labels


@pytest.fixture
def stripes(monkeypatch):
    row = DataSet(
        read=read_stripes,
        shape=(1, 8, 8),
        classes=4,
        terms="Stripes, made up for a test.",
        url="https://example.org/stripes",
        folder="Stripes",
        files="nothing",
    )
    monkeypatch.setitem(DATASETS, "stripes", row)


def test_one_row_adds_a_data_set(stripes, tmp_path, capsys):
    run = lambda *words: cli.run(commands.main, [str(word) for word in words])  # noqa: E731
    assert run("info", "stripes") == 0
    shown = capsys.readouterr().out
    assert "stripes" in shown and "10..10" in shown and "40" in shown
    assert run("--help") == 0
    assert "stripes" in capsys.readouterr().out
    assert run("convert", "stripes", f"out={tmp_path}/a.npy", "split=train") == 0
    assert np.load(tmp_path / "a.npy").shape == (40, 8, 8, 1)
    capsys.readouterr()
    assert run("get") == 0
    shown = capsys.readouterr().out
    assert "https://example.org/stripes" in shown and "Stripes, made up" in shown
    assert run("get", "stripes", f"root={tmp_path}") == 0
    assert "test: 20 images (1, 8, 8)" in capsys.readouterr().out
    assert run("info", "strips") == 2
    assert "did you mean stripes?" in capsys.readouterr().err
    with pytest.raises(ValueError, match="data.name=strip: choose from .*stripes"):
        load_split(DataConfig(name="strip"), "train")


def test_a_row_is_trained_on_scored_and_named_in_the_model_card(stripes, tmp_path):
    words = [
        "data.name=stripes",
        "data.batch_size=8",
        "network.channels=[16,16]",
        "network.norm_groups=8",
        "network.layers=1",
        "network.attention=[]",
        "network.head_dim=8",
        "optim.decay=none",
        "data.labels=false",
        "trainer.progress=false",
        "trainer.max_steps=1",
        "sample.every=0",
        "eval.every=0",
        f"out_dir={tmp_path}",
    ]
    configs = [str(ROOT / f"configs/{name}.yaml") for name in ("edm_digits", "debug")]
    assert train.main([*configs, *words]) == 0
    (run,) = tmp_path.glob("*/*")
    card = (export(run, tmp_path / "exported") / "README.md").read_text()
    assert "Data: stripes, 1 x 8 x 8. Stripes, made up for a test." in card
    out = tmp_path / "scores.json"
    model = [str(run), "data=stripes:test", "num=20", "steps=2"]
    for source in (["images=stripes:train"], model):
        words = ["metrics=nn1", "features=pixels", "resamples=0", f"out={out}"]
        words += [] if source is model else ["reference=stripes:test"]
        assert evaluate.main([*source, *words]) == 0
        report = json.loads(out.read_text())
        assert report["reference_num"] == 20 and report["num"] == (20 if source is model else 40)
        out.unlink()


def test_own_data_have_terms_to_fill_in():
    assert DATASETS["imagefolder"].terms == "your own data: say here where they come from"


def test_sha256_and_folder_are_checked(tmp_path, capsys, monkeypatch):
    row = DataSet(
        read=read_stripes,
        shape=(1, 8, 8),
        classes=4,
        url="https://example.org/stripes",
        folder="Stripes",
        sha256={"a.bin": "0" * 64},
    )
    monkeypatch.setitem(DATASETS, "stripes", row)
    (tmp_path / "Stripes").mkdir()
    (tmp_path / "Stripes" / "a.bin").write_bytes(b"other")
    assert cli.run(commands.main, ["get", "stripes", f"root={tmp_path}"]) == 2
    assert "a.bin has another sha256; fetch it again" in capsys.readouterr().err


def test_data_noise_and_images_are_light_to_import():
    code = (
        "import sys, genmodels.data, genmodels.images, genmodels.noise\n"
        "heavy = 'lightning torchvision sklearn scipy accelerate diffusers torchmetrics rich'\n"
        "print([name for name in heavy.split() if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"
