"""Run folders: what lies where, and going on after a copy that lost the empty folders."""

import os
import shutil
import time

import pytest

import genmodels
import train
from genmodels.config import Config, save_config
from genmodels.run import Run
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY, last_words

WORDS = [*TINY, "trainer.loggers=csv", "trainer.accelerator=cpu"]


def config(tmp_path, name="a"):
    cfg = Config(name=name)
    cfg.out_dir = str(tmp_path)
    cfg.method, cfg.network = {}, {}
    return cfg


def test_new_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    runs = [Run.new(config(tmp_path)) for _ in range(3)]
    assert [run.folder for run in runs] == [tmp_path / "a" / n for n in ("now", "now-2", "now-3")]
    assert all(run.samples.is_dir() and run.checkpoints.is_dir() for run in runs)


def test_only_the_first_process_makes_a_folder(tmp_path, monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_PROCID", "RANK"):
        monkeypatch.setenv(name, "1")
        assert not Run.new(config(tmp_path)).folder.exists()
        monkeypatch.delenv(name)


def test_open_wants_a_run(tmp_path):
    with pytest.raises(ValueError, match=f"resume={tmp_path}: no config.yaml there"):
        Run.open(tmp_path)
    run = Run.new(config(tmp_path))
    save_config(config(tmp_path), run.config)
    assert Run.open(str(run.folder)) == run
    for step in (12, 3):
        run.checkpoint(step).touch()
    assert [path.name for path in run.steps()] == ["step-00000003.ckpt", "step-00000012.ckpt"]


def test_the_newest_unfinished_run_of_the_same_config(tmp_path):
    cfg, other = config(tmp_path), config(tmp_path)
    other.seed = 1
    for number, saved in enumerate((cfg, cfg, other)):
        run = Run(tmp_path / "a" / str(number))
        run.make_folders()
        save_config(saved, run.config)
    over = set()
    assert Run.unfinished(cfg, lambda run: run.folder.name in over).folder.name == "1"
    over.add("1")
    assert Run.unfinished(cfg, lambda run: run.folder.name in over).folder.name == "0"
    over.add("0")
    assert Run.unfinished(cfg, lambda run: run.folder.name in over) is None


@pytest.mark.skipif(os.name == "nt", reason="no flock there")
def test_a_second_command_is_locked_out(tmp_path):
    run = Run(tmp_path)
    with run.lock(), pytest.raises(ValueError, match="another process is at work there"):
        with run.lock():
            pass
    with run.lock():
        pass


def test_a_run_goes_on_without_the_folders_that_a_copy_lost(tmp_path):
    """Its grid is written where no folder was; without checkpoint and table it begins again."""
    words = [str(ROOT / "configs/edm_digits.yaml"), str(ROOT / "configs/debug.yaml"), *WORDS]
    words += ["sample.num=4", "method.steps=1", f"out_dir={tmp_path}/runs", "sample.every=0"]
    assert train.main([*words, "trainer.max_steps=2"]) == 0
    (folder,) = (tmp_path / "runs").glob("*/*")
    copy = Run(tmp_path / "copy")
    shutil.copytree(folder, copy.folder)
    copy.samples.rmdir()
    assert train.main([f"resume={copy.folder}", "trainer.max_steps=4", "sample.every=2"]) == 0
    assert [path.name for path in copy.samples.iterdir()] == ["step-00000004.png"]
    shutil.rmtree(copy.checkpoints)
    copy.metrics.unlink()
    assert train.main([f"resume={copy.folder}", "trainer.max_steps=2"]) == 0
    assert genmodels.load(copy.folder).cfg.name == "edm_digits"


def test_a_self_play_goes_on_without_its_samples(tmp_path):
    """A whole round was lost once, for the sheet at its end had no folder to go to."""
    base = [str(ROOT / "configs/edm_digits.yaml"), str(ROOT / "configs/debug.yaml"), *WORDS]
    base += ["data.labels=true", "method.label_dropout=0", "ema.half_life=0", "sample.every=0"]
    assert train.main(last_words([*base, "trainer.max_steps=2", f"out_dir={tmp_path}/base"])) == 0
    (start,) = (tmp_path / "base").glob("*/*")
    words = [word for word in WORDS if not word.startswith(("optim", "data", "network.layers"))]
    words += ["network.layers=1", "method.steps=1", "method.pool=8", "data.batch_size=8"]
    words += ["trainer.max_steps=1", "eval.num=16", "method.alphas=1", "method.rounds=1"]
    words += ["trainer.max_time=0.01s", f"init={start}", f"out_dir={tmp_path}/runs"]
    assert train.main([str(ROOT / "configs/ddo_digits.yaml"), *words]) == 0
    (folder,) = (tmp_path / "runs").glob("*/*")
    run = Run.open(folder)
    run.samples.rmdir()
    assert train.main([f"resume={folder}", "trainer.max_time="]) == 0
    assert [path.name for path in run.samples.iterdir()] == ["round-01.png"]
