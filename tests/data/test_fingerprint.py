"""The fingerprint of the training images: what it tells apart, and a resume on other data."""

import numpy as np
import pytest
import torch

import train
from genmodels.checkpoint import read_checkpoint
from genmodels.config import DataConfig, load_config, save_config
from genmodels.data import ImageDataModule, open_split
from genmodels.data.fingerprint import SAMPLED, digest, fingerprint
from genmodels.methods import METHODS
from genmodels.networks import NETWORKS
from tests.helpers.paths import ROOT
from tests.helpers.small_sets import on_disk_cases, png
from tests.helpers.tiny import TINY, last_words


def folder(path, count=12):
    for i in range(count):
        below = path / "ab"[i % 2]
        below.mkdir(parents=True, exist_ok=True)
        (below / f"{i:02d}.png").write_bytes(png(20 * i))
    return path


def found(path, **words):
    cfg = DataConfig(name="imagefolder", root=str(path), holdout=0.0, **words)
    return fingerprint(*open_split(cfg, "train"))


def test_what_it_tells_apart(tmp_path):
    path = folder(tmp_path / "set")
    first = found(path)
    assert first.startswith("12-") and found(path) == first
    assert first == found(folder(tmp_path / "elsewhere")), "a moved folder is the same data"
    one, two = path / "a" / "00.png", path / "a" / "02.png"
    parts = one.read_bytes(), two.read_bytes()
    one.write_bytes(parts[1])
    two.write_bytes(parts[0])
    swapped = found(path)
    one.write_bytes(parts[0])
    two.write_bytes(parts[1])
    assert found(path) == first
    two.write_bytes(png(77))
    replaced = found(path)
    two.write_bytes(parts[1])
    two.rename(path / "b" / "02.png")  # another class
    moved = found(path)
    (path / "b" / "02.png").rename(two)
    two.unlink()
    assert len({first, swapped, replaced, moved, found(path)}) == 5


@pytest.mark.parametrize("name", ["npy", "zip", "imagefolder"])
def test_the_same_in_memory_and_from_disk(tmp_path, name):
    root = str(on_disk_cases(tmp_path)[name])
    prints = set()
    for device in ("auto", "disk"):
        cfg = DataConfig(name=name, root=root, device=device)
        ImageDataModule(cfg)
        prints.add(cfg.fingerprint)
    assert len(prints) == 1 and prints.pop().startswith("57-")


def test_large_sets_are_sampled():
    asked = []
    digest(100_000, lambda number: asked.append(number) or b"")
    assert len(asked) == len(set(asked)) == SAMPLED and max(asked) < 100_000
    assert np.ptp(np.diff(asked)) <= 1
    assert digest(2, lambda n: b"ab"[n : n + 1]) != digest(2, lambda n: b"ba"[n : n + 1])


def test_points_do_not_hang_on_rounding():
    points, labels = torch.rand(10, 2, 1, 1), torch.arange(10)
    assert fingerprint(points, labels) == fingerprint(points + 1e-7, labels)
    assert fingerprint(points[:9], labels[:9]) != fingerprint(points, labels)


def train_on(path, out):
    argv = [
        str(ROOT / "configs/edm_digits.yaml"),
        str(ROOT / "configs/debug.yaml"),
        *TINY,
        "data.name=imagefolder",
        f"data.root={path}",
        f"out_dir={out}",
        "sample.every=0",
    ]
    assert train.main(last_words(argv)) == 0
    (run,) = out.glob("*/*")
    return run


def test_a_resume_on_other_data_is_refused(tmp_path, capsys):
    path = folder(tmp_path / "set")
    run = train_on(path, tmp_path / "runs")
    config = (run / "config.yaml").read_text()
    saved = read_checkpoint(run)["hyper_parameters"]["config"]["data"]["fingerprint"]
    assert saved.startswith("11-") and f"fingerprint: {saved}" in config
    assert train.main([f"resume={run}", "trainer.max_steps=5"]) == 0
    (path / "a" / "04.png").write_bytes(png(77))
    capsys.readouterr()
    assert train.main([f"resume={run}", "trainer.max_steps=6"]) == 2
    error = capsys.readouterr().err
    assert f"data.fingerprint={saved}: " in error and "others, or in another order" in error
    assert "add data.fingerprint=new to go on" in error and error.count("\n") == 1
    (path / "c").mkdir()
    (path / "c" / "new.png").write_bytes(png(7))
    (path / "c" / "newer.png").write_bytes(png(8))
    assert train.main([f"resume={run}", "trainer.max_steps=6"]) == 2
    assert "holds 13 images, not 11" in capsys.readouterr().err
    (path / "c" / "new.png").rename(path / "a" / "new.png")
    (path / "c" / "newer.png").rename(path / "b" / "newer.png")
    (path / "c").rmdir()
    allowed = [f"resume={run}", "trainer.max_steps=6", "data.fingerprint=new"]
    assert train.main(allowed) == 0
    now = read_checkpoint(run)["hyper_parameters"]["config"]["data"]["fingerprint"]
    assert now != saved and now.startswith("13-") and now in (run / "config.yaml").read_text()
    assert train.main([f"resume={run}", "trainer.max_steps=7"]) == 0  # it is known from now on


def test_old_runs_without_one_go_on(tmp_path):
    run = train_on(folder(tmp_path / "set"), tmp_path / "runs")
    for name in ("last", "step-00000004"):
        path = run / f"checkpoints/{name}.ckpt"
        saved = torch.load(path, weights_only=True)
        for key in ("fingerprint", "present"):
            del saved["hyper_parameters"]["config"]["data"][key]
        path.unlink()
        torch.save(saved, path)
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "fingerprint:" not in line and "present:" not in line]
    (run / "config.yaml").write_text("".join(kept))
    assert train.main([f"resume={run}", "trainer.max_steps=6"]) == 0
    assert "fingerprint: 11-" in (run / "config.yaml").read_text()


def test_the_config_of_a_run_starts_another_on_other_data(tmp_path):
    run = train_on(folder(tmp_path / "set"), tmp_path / "runs")
    other = folder(tmp_path / "other", 14)
    words = [str(run / "config.yaml"), f"data.root={other}", f"out_dir={tmp_path}/more"]
    assert train.main(words) == 0


def test_of_noisy_pictures(tmp_path):
    from genmodels.config import NoiseConfig
    from genmodels.data.patches import NoisyDataModule

    prints = []
    for number in (1, 1, 2):
        (tmp_path / "a.png").write_bytes(png(number, (16, 16)))
        (tmp_path / "b.png").write_bytes(png(9, (16, 16)))
        cfg = DataConfig(
            name="imagefolder", root=str(tmp_path), patch=8, noise=NoiseConfig(law="gaussian")
        )
        NoisyDataModule(cfg)
        prints.append(cfg.fingerprint)
    assert prints[0] == prints[1] != prints[2] and prints[0].startswith("2-")


def test_it_is_a_key_of_the_schema(tmp_path):
    cfg = load_config([{"method": {"name": "edm"}, "network": {"name": "unet"}}],
                      methods=METHODS, networks=NETWORKS)  # fmt: skip
    cfg.data.fingerprint, cfg.data.present = "3-abc", [0, 2]
    save_config(cfg, tmp_path / "a.yaml")
    again = load_config([tmp_path / "a.yaml"], methods=METHODS, networks=NETWORKS)
    assert (again.data.fingerprint, again.data.present) == ("3-abc", [0, 2])
