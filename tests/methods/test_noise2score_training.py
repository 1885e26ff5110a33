"""Noise2Score trained: what is learned from, resuming, levels, the model card."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import genmodels
import sample
import train
from tests.helpers.paths import ROOT

CONFIG = str(ROOT / "configs" / "noise2score_bsd400.yaml")
PUBLISHED = str(ROOT / "configs" / "noise2score_published.yaml")


@pytest.fixture
def folder(tmp_path):
    """Twelve small pictures, smooth, grey, of two sizes."""
    rng = np.random.default_rng(0)
    for k in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6), dtype=np.uint8))
        coarse.resize((36, 24 + k % 2 * 8), Image.Resampling.BICUBIC).save(tmp_path / f"{k:02}.png")
    return tmp_path


def words(folder):
    return (
        "data.name=imagefolder",
        f"data.root={folder}",
        "data.patch=16",
        "data.holdout=0.2",
        "network.channels=[8]",
        "network.blocks=[1]",
    )


def test_every_study_of_the_benchmark_can_be_built():
    from benchmarks.noise2score import STUDIES

    for config, variants, _ in STUDIES.values():
        for words in variants.values():
            own = words if words[:1] and words[0].endswith(".yaml") else (config, *words)
            genmodels.build(str(ROOT / own[0]), *own[1:])


def test_other_methods_refuse_the_noise_of_pictures():
    with pytest.raises(ValueError, match="makes its own noise"):
        genmodels.build(
            str(ROOT / "configs/edm_digits.yaml"), "data.noise.law=gaussian", "data.patch=8"
        )


def run(folder, out, *more):
    """Train on the folder for four steps and return the run."""
    config, *more = more if PUBLISHED in more else (CONFIG, *more)
    own = words(folder)[: 4 if config == PUBLISHED else None]
    quick = (
        "trainer.max_steps=4",
        "data.batch_size=4",
        "trainer.progress=false",
        "trainer.log_every=1",
        "eval.loss_every=2",
    )
    assert train.main([config, *own, *quick, f"out_dir={out}", *more]) == 0
    return next(Path(out).glob("*/*"))


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("data.noise.copies=fresh", "data.noise.level=5", "data.noise.level_max=50"),
        ("data.noise.law=gamma", "data.noise.level=50"),
        ("method.objective=noise2noise", "data.noise.target=second"),
        (PUBLISHED,),
    ],
    ids=["strict", "fresh", "gamma", "noise2noise", "published"],
)
def test_trains_and_restores(folder, tmp_path, more):
    model = genmodels.load(run(folder, tmp_path, *more))
    law = next(iter(model.DENOISE_LAWS))
    restored, _ = model.restore(torch.rand(1, 1, 20, 30), law, float(model.levels[0]))
    assert restored.shape == (1, 1, 20, 30) and torch.isfinite(restored).all()


def test_resumed_run_is_the_run_that_never_stopped(folder, tmp_path):
    straight = run(folder, tmp_path / "a", "optim.decay=none")
    stopped = run(folder, tmp_path / "b", "optim.decay=none", "trainer.max_steps=2")
    assert train.main([f"resume={stopped}", "trainer.max_steps=4"]) == 0
    first, second = (
        genmodels.checkpoint.read_checkpoint(r / "checkpoints/last.ckpt")
        for r in (straight, stopped)
    )
    for key, value in first["current_model_state"].items():
        assert torch.equal(value, second["current_model_state"][key]), key
    assert (straight / "metrics.csv").read_text().count("val/loss") == 1


def test_the_levels_are_those_of_its_own_training(folder, tmp_path):
    """Also where it starts from a model of other noise, and whatever noise it learns from."""
    first = run(folder, tmp_path / "a")
    for copies in ("fixed", "fresh"):
        more = (f"init={first}", "data.noise.level=50", f"data.noise.copies={copies}")
        model = genmodels.load(run(folder, tmp_path / copies, *more))
        assert model.levels.tolist() == [50, 50]
        model.restore(torch.zeros(1, 1, 8, 8), "gaussian", 50)


def test_noisy_pictures_alone_are_learned_from(folder, tmp_path):
    """Of unknown noise: the levels are those found in them, and known when it restores."""
    rng, given = np.random.default_rng(1), tmp_path / "given"
    given.mkdir()
    for k, path in enumerate(sorted(folder.glob("*.png"))):
        smooth = np.asarray(Image.open(path)) * 0.4 + 76.0
        noisy = smooth + (10 + k) * rng.standard_normal(smooth.shape)
        Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8)).save(given / path.name)
    made = run(given, tmp_path / "runs", "data.noise.copies=given", "data.noise.level=0")
    model = genmodels.load(made)
    low, high = model.levels.tolist()
    assert 5 < low < 15 < high < 35
    assert "nan" not in (made / "metrics.csv").read_text()
    assert sample.main([str(made), f"denoise={given}", f"out={tmp_path}/restored"]) == 0
    assert len(list((tmp_path / "restored").glob("*.png"))) == 13


def test_unknown_noise_is_one_line(folder, tmp_path, capsys):
    words_of = {"law=salt": "data.noise.law=salt: choose from", "law=poisson": "level=25.0: must"}
    for word, message in words_of.items():
        assert (
            train.main([CONFIG, *words(folder), f"data.noise.{word}", f"out_dir={tmp_path}/r"]) == 2
        )
        assert message in capsys.readouterr().err


def test_given_pictures_too_even_to_measure_are_named(folder, tmp_path, capsys):
    Image.new("L", (20, 20), 128).save(folder / "00.png")
    given = ("data.noise.copies=given", "data.noise.level=0", f"out_dir={tmp_path}/r")
    assert train.main([CONFIG, *words(folder), *given]) == 2
    message = (
        "data.noise.level=0: 00.png: the picture has no noise to measure; give data.noise.level"
    )
    assert message in capsys.readouterr().err


def test_the_debug_overlay_shows_noisy_beside_restored_patches(folder, tmp_path):
    made = run(folder, tmp_path / "runs", str(ROOT / "configs/debug.yaml"), "sample.num=9")
    sheet = np.asarray(Image.open(made / "samples/step-00000004.png").convert("L"))
    assert sheet.shape == (5 * (3 * 17 + 1), 5 * (3 * 33 + 1))  # enlarged five times
    noisy, restored = sheet[5:85, 5:85].astype(int), sheet[5:85, 85:165]
    assert noisy.std() > 10 and 0 < abs(noisy - restored).mean() < 10


def test_the_model_card_tells_what_was_learned_from(folder, tmp_path):
    made = run(folder, tmp_path / "runs", "data.noise.copies=fresh", "data.noise.level_max=50")
    for half in (False, True):
        out = genmodels.checkpoint.export(made, tmp_path / f"model{half}", half=half)
        card = (out / "README.md").read_text()
        assert "gaussian noise of level 25 to 50; new noise on clean pictures" in card
        assert "no target; objective: score" in card and "image-generation" not in card
        assert f"python sample.py {out.name} denoise=PICTURE_OR_FOLDER law=gaussian" in card
        plain = genmodels.load(out)
        assert plain.levels.tolist() == [25, 50]


def test_it_generates_nothing(folder, tmp_path, capsys):
    made = run(folder, tmp_path / "runs")
    capsys.readouterr()
    assert sample.main([str(made), "num=1", f"out={tmp_path}/none"]) == 2
    assert "restores pictures" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
