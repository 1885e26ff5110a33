"""kill -9 at random moments: what goes on afterwards ends as if nothing had happened.

The moments are drawn anew each time; GENMODELS_KILL_SEED=N repeats those of a failure, and
GENMODELS_KILLS=5 makes it quicker.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sample
import train
from genmodels import cli
from genmodels.checkpoint import read_checkpoint
from genmodels.data import commands
from tests.helpers.paths import ROOT
from tests.helpers.runs import assert_same, rows
from tests.helpers.small_vae import save_vae
from tests.helpers.tiny import TINY

KILLS = int(os.environ.get("GENMODELS_KILLS") or 20)
SEED = int(os.environ.get("GENMODELS_KILL_SEED") or random.SystemRandom().randrange(10**6))

TRAIN400 = Path(os.environ.get("GENMODELS_DATA", "none")) / "denoise/Train400"

pytestmark = pytest.mark.slow


def start(*argv):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_after(process, works, delay):
    """Kill -9 this long after works() first holds, without a word to its worker processes."""
    for _ in range(60_000):
        if works():
            break
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    else:
        raise AssertionError("nothing came of it in ten minutes")
    time.sleep(delay)
    assert process.poll() is None, f"it ended by itself: {process.stderr.read()}"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def files(folder):
    """Return {relative path: bytes} of all files, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_training_killed_twenty_times(tmp_path):
    """Images from a zip by a worker, dropout, EMA, grids, held-out loss, a checkpoint every step.

    A checkpoint is written at about every second moment, so that many kills fall into a write.
    """
    chance = random.Random(SEED)
    print(f"GENMODELS_KILL_SEED={SEED}")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    np.save(tmp_path / "in.npy", pixels)
    assert cli.run(commands.main, ["convert", f"{tmp_path}/in.npy", f"out={tmp_path}/in.zip"]) == 0
    words = [
        ROOT / "configs/edm_digits.yaml",
        ROOT / "configs/debug.yaml",
        *TINY,
        "data.name=zip",
        f"data.root={tmp_path}/in.zip",
        "data.channels=1",
        "data.device=disk",
        "data.workers=1",
        "network.dropout=0.1",
        "trainer.accumulate=2",
        "checkpoint.every=1",
        "sample.every=7",
        "sample.num=4",
        "method.steps=2",
        "eval.loss_every=5",
    ]
    process = start("train.py", *words, f"out_dir={tmp_path}/killed", "trainer.max_steps=100000")
    steps = []
    for number in range(KILLS):
        before = steps[-1] if steps else 0
        last = max(before, 0)

        def moved(last=last):
            found = [*(tmp_path / "killed").glob("*/*/checkpoints/step-*.ckpt")]
            return any(int(path.stem[5:]) > last for path in found)

        kill_after(process, moved, chance.uniform(0, 0.5))
        (run,) = (tmp_path / "killed").glob("*/*")
        steps.append(read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"])
        more = f"trainer.max_steps={steps[-1] + 3 if number == KILLS - 1 else 100000}"
        process = start("train.py", f"resume={run}", more)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert steps == sorted(steps)
    target = steps[-1] + 3
    straight = [*map(str, words), f"out_dir={tmp_path}/straight", f"trainer.max_steps={target}"]
    assert train.main(straight) == 0
    (whole,) = (tmp_path / "straight").glob("*/*")
    found, expected = (read_checkpoint(r / "checkpoints" / "last.ckpt") for r in (run, whole))
    assert found["global_step"] == expected["global_step"] == target
    for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers"):
        assert_same(found[key], expected[key], key)
    assert rows(run) == rows(whole)
    assert files(run / "samples") == files(whole / "samples")
    assert files(run).keys() == files(whole).keys()  # nothing left over, nothing missing
    print(f"killed at steps {steps}")


def test_sampling_killed_twenty_times(tmp_path, tiny_run):
    """The same command again each time; the folder ends with the same files, byte for byte."""
    chance = random.Random(SEED + 1)
    print(f"GENMODELS_KILL_SEED={SEED}")
    words = [tiny_run, "num=150", "steps=1", "batch=4", "seed=5"]
    out, made = tmp_path / "killed", []
    for _ in range(KILLS):
        stamp, enough = time.time_ns(), chance.randint(1, 140)
        process = start("sample.py", *words, f"out={out}")

        def written(stamp=stamp):
            found = out.glob("[0-9]*.png") if out.is_dir() else ()
            return sum(path.stat().st_mtime_ns > stamp for path in found)

        kill_after(process, lambda: written() >= enough, chance.uniform(0, 0.02))  # noqa: B023
        made.append(written())
    process = start("sample.py", *words, f"out={out}")
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert sample.main([*map(str, words), f"out={tmp_path}/whole"]) == 0
    assert files(out) == files(tmp_path / "whole")
    print(f"pictures written before each kill: {made}")


def test_encoding_is_killed(tmp_path):
    """Latents of files of 256: the same command again each time, the same folder in the end."""
    chance = random.Random(SEED + 2)
    print(f"GENMODELS_KILL_SEED={SEED}")
    vae = save_vae(tmp_path / "vae")
    words = ["encode", "digits", f"vae={vae}", "statistics=measured", "batch=1"]
    out = tmp_path / "killed"
    for number in range(min(KILLS, 6)):

        def written(number=number):
            return len([*out.glob("*.npy")]) > number

        process = start("-m", "genmodels.data", *words, f"out={out}")
        kill_after(process, written, chance.uniform(0, 0.2))
        assert not (out / "latents.json").exists()
    process = start("-m", "genmodels.data", *words, f"out={out}")
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    whole = tmp_path / "whole"
    assert cli.run(commands.main, [*words, f"out={whole}"]) == 0
    assert files(out) == files(whole) and len(files(out)) == 11


UNET = ("network.channels=[16,16]", "network.norm_groups=8", "network.layers=1")
UNET += ("network.attention=[]", "network.head_dim=8", "data.labels=false", "optim.decay=none")
METHODS = {
    "edm_digits": UNET,
    "gbm_digits": UNET,
    "cdrl_digits": (
        "network.width=16",
        "method.steps=2",
        "method.levels=2",
        "method.initializer_channels=16",
        "data.labels=false",
        "optim.decay=none",
    ),
    "gedi_moons": ("network.width=16", "method.buffer=8", "method.steps=2", "optim.decay=none"),
    "energy_digits": (  # killed in the warm-up and, mostly, in the main phase
        "network.width=16",
        "method.main_start=3",
        "method.chain_steps=3",
        "data.labels=false",
        "optim.decay=none",
    ),
    "noise2score_bsd400": (
        "data.patch=16",
        "network.channels=[4]",
        "network.blocks=[1]",
        "optim.decay=none",
    ),
}


@pytest.mark.parametrize("config", METHODS)
def test_a_training_of_each_method_is_killed(tmp_path, config):
    """Weights, average, optimizer, what the method keeps, and the table, as without a kill."""
    if config == "noise2score_bsd400" and not TRAIN400.is_dir():
        pytest.skip("needs GENMODELS_DATA with denoise/Train400, the pictures of BSD400")
    chance = random.Random(f"{SEED} {config}")
    print(f"GENMODELS_KILL_SEED={SEED}")
    words = [f"configs/{config}.yaml", "configs/debug.yaml", *METHODS[config]]
    words += ["trainer.progress=false", "checkpoint.every=1", "eval.loss_every=2", "sample.every=0"]
    process = start("train.py", *words, f"out_dir={tmp_path}/killed", "trainer.max_steps=100000")
    step = 0
    for last in (False, True):

        def moved(step=step):
            found = (tmp_path / "killed").glob("*/*/checkpoints/step-*.ckpt")
            return any(int(path.stem[5:]) > step for path in found)

        kill_after(process, moved, chance.uniform(0, 0.5))
        (run,) = (tmp_path / "killed").glob("*/*")
        step = read_checkpoint(run)["global_step"]
        more = step + 3 if last else 100000
        process = start("train.py", f"resume={run}", f"trainer.max_steps={more}")
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    straight = [*words, f"out_dir={tmp_path}/straight", f"trainer.max_steps={step + 3}"]
    assert train.main([str(ROOT / w) if w.startswith("configs") else w for w in straight]) == 0
    (whole,) = (tmp_path / "straight").glob("*/*")
    found, expected = read_checkpoint(run), read_checkpoint(whole)
    assert found.keys() == expected.keys()
    for key in found.keys() - {"loops", "callbacks", "hyper_parameters"}:
        assert_same(found[key], expected[key], key)
    assert rows(run) == rows(whole)
