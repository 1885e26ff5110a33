"""Machines that fail: a full disk, a folder that cannot be written, too little memory."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import sample
import train
from genmodels import cli, images
from genmodels.atomic import write_bytes
from genmodels.checkpoint import read_checkpoint
from genmodels.config import Config
from genmodels.data import commands
from genmodels.methods.edm import EDM
from genmodels.run import Run
from genmodels.training.fit import remedies
from genmodels.training.saver import Saver
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY, last_words

DEBUG = [
    str(ROOT / "configs/edm_digits.yaml"),
    str(ROOT / "configs/debug.yaml"),
    *TINY,
    "sample.every=0",
]


def one_line(capsys, *parts):
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    for part in parts:
        assert part in errors, errors


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; size(n) makes it n kilobytes large."""
    folder = tmp_path / "small"
    folder.mkdir()

    def size(kilobytes):
        options = f"{'remount,' if folder.is_mount() else ''}size={kilobytes}k"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip("this user may not mount a tmpfs: no full disk here")
        return folder

    yield size
    subprocess.run(["umount", folder], capture_output=True)


@pytest.mark.parametrize("loggers", ["[csv]", "[csv,tensorboard]"])
def test_a_full_disk_while_training(small_disk, train_tiny, capsys, loggers):
    """The second checkpoint does not fit: one line; with room again the run goes on."""
    out = small_disk(1500)
    words = [
        f"out_dir={out}",
        "trainer.max_steps=6",
        "checkpoint.keep=0",
        f"trainer.loggers={loggers}",
    ]
    assert train.main([*DEBUG, *words]) == 2
    (run,) = out.glob("*/*")
    one_line(
        capsys,
        f"out_dir={out}: No space left on device (",
        "free some space there",
        f"go on with python train.py resume={run}",
    )
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step-00000002.ckpt"]  # nothing half-written
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 2
    small_disk(50_000)
    assert train.main([f"resume={run}"]) == 0
    whole = read_checkpoint(train_tiny("trainer.max_steps=6") / "checkpoints" / "last.ckpt")
    resumed = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert all(torch.equal(resumed["state_dict"][k], v) for k, v in whole["state_dict"].items())


def test_a_full_disk_while_sampling_and_converting(small_disk, tiny_run, capsys, tmp_path):
    out = small_disk(16)
    assert sample.main([str(tiny_run), "num=64", "steps=1", f"out={out}/a"]) == 2
    one_line(capsys, f"{out}/a/", "No space left on device; free some space there")
    assert not list(out.rglob("*.partial")) and not list(out.rglob(".*"))
    for path in (out / "a").iterdir():
        images.read_image(path)  # what is there is whole
        path.unlink()
    np.save(
        tmp_path / "in.npy",
        np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3), dtype=np.uint8),
    )
    for name in ("b.zip", "b.npy"):
        assert cli.run(commands.main, ["convert", f"{tmp_path}/in.npy", f"out={out}/{name}"]) == 2
        one_line(capsys, f"{out}/{name}: No space left on device; free some space there")
        assert [path.name for path in out.iterdir()] == ["a"]


def test_a_full_disk_by_stand_in(tmp_path, monkeypatch):
    """Where no file system can be made: the write itself says that the disk is full."""

    class Full(io.BytesIO):
        def write(self, blob):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr("builtins.open", lambda *a, **k: Full())
    with pytest.raises(OSError, match="No space left") as caught:
        write_bytes(tmp_path / "a", b"new")
    monkeypatch.undo()
    assert caught.value.filename == str(tmp_path / "a") and caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_output_that_cannot_be_written(tiny_run, capsys, tmp_path):
    """A file stands where a folder should be; root may write to folders that are read-only."""
    (tmp_path / "file").write_text("")
    assert train.main([*DEBUG, f"out_dir={tmp_path}/file/runs"]) == 2
    one_line(capsys, f"{tmp_path}/file", "Not a directory")
    assert sample.main([str(tiny_run), "num=1", "steps=1", f"out={tmp_path}/file/a"]) == 2
    one_line(capsys, f"{tmp_path}/file", "Not a directory")


def test_read_only_output(small_disk, tiny_run, capsys):
    out = small_disk(1000)
    subprocess.run(["mount", "-o", "remount,ro", out], check=True, capture_output=True)
    assert train.main([*DEBUG, f"out_dir={out}"]) == 2
    one_line(capsys, f"{out}/edm_digits: Read-only file system; write to another folder")
    assert sample.main([str(tiny_run), "num=1", "steps=1", f"out={out}/a"]) == 2
    one_line(capsys, f"{out}/a: Read-only file system; write to another folder")
    assert cli.run(commands.main, ["convert", "digits", f"out={out}/a.zip"]) == 2
    one_line(capsys, f"{out}/", "Read-only file system; write to another folder")


def folder_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(40):
        pixels = torch.from_numpy(rng.integers(0, 256, (1, 8, 8), dtype=np.uint8))
        images.write_png(tmp_path / "in" / f"{i:02d}.png", pixels)
    return [
        "data.name=imagefolder",
        f"data.root={tmp_path}/in",
        "data.channels=1",
        "data.device=disk",
        f"out_dir={tmp_path}/runs",
    ]


def test_a_picture_that_breaks_while_training(tmp_path, capsys):
    """Found by a worker: one line; what was saved before goes on when it is mended."""
    words = folder_of_pictures(tmp_path)
    (tmp_path / "in" / "20.png").write_bytes(b"\x89PNG")
    assert train.main([*DEBUG, *words, "trainer.max_steps=20", "checkpoint.every=1"]) == 2
    one_line(capsys, f"image={tmp_path}/in/20.png: cannot be read (", "remove it")


def test_a_worker_that_is_ended(tmp_path, capsys, monkeypatch):
    """As the kernel does where memory runs out; what was saved goes on without workers."""
    whole, main = images.read_image, os.getpid()

    def read(*args, **kwargs):
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)

    monkeypatch.setattr("genmodels.images.read.read_image", read)
    words = folder_of_pictures(tmp_path)
    assert train.main([*DEBUG, *words, "trainer.max_steps=1"]) == 2
    (run,) = tmp_path.glob("runs/*/*")
    one_line(
        capsys,
        "data.workers=2: a process that reads images was ended (DataLoader worker",
        f"go on with python train.py resume={run} data.workers=0",
    )
    assert train.main([f"resume={run}", "data.workers=0"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_workers_too(tmp_path, number):
    """A terminal's Ctrl-C and many clusters signal every process: the run still saves."""
    words = [*folder_of_pictures(tmp_path), "trainer.max_steps=100000", "checkpoint.every=1"]
    process = subprocess.Popen(
        [sys.executable, "train.py", *DEBUG, *words],
        cwd=ROOT,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for _ in range(1200):
        if list(tmp_path.glob("runs/*/*/checkpoints/step-00000003.ckpt")):
            break
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert f"stopped by {number.name} after step" in output and "Traceback" not in errors
    (run,) = tmp_path.glob("runs/*/*")
    assert f"step {read_checkpoint(run / 'checkpoints/last.ckpt')['global_step']}, saved" in output


def too_much(self, *args, **kwargs):
    return torch.empty(1 << 50)  # torch's own allocator says no


def no_memory_on_gpu(self, *args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("failure", [too_much, no_memory_on_gpu])
def test_a_batch_too_large_for_memory(failure, tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(EDM, "loss", failure)
    assert (
        train.main([*DEBUG, f"out_dir={tmp_path}", "data.batch_size=12", "trainer.accumulate=2"])
        == 2
    )
    (run,) = tmp_path.glob("*/*")
    one_line(
        capsys,
        "data.batch_size=12: does not fit into memory; "
        f"go on with python train.py resume={run} trainer.accumulate=3 (the same batch in parts), "
        f"or try data.batch_size=6 with python train.py {run}/config.yaml",
    )
    monkeypatch.setattr(EDM, "sample", failure)
    assert sample.main([str(tiny_run), "num=9", "batch=8", f"out={tmp_path}/a"]) == 2
    one_line(capsys, "batch=8: does not fit into memory; try batch=2")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("size", "parts", "line"),
    [
        (12, 4, "trainer.accumulate=6 (the same batch in parts), or try data.batch_size=4 "),
        (48, 3, "trainer.accumulate=4 (the same batch in parts), or try data.batch_size=24 "),
    ],
)
def test_what_to_try_is_a_batch_that_can_be_shared_out(tmp_path, size, parts, line):
    """A batch is a multiple of the micro-batches, also the smaller one that is suggested."""
    cfg = Config()
    cfg.data.batch_size, cfg.trainer.accumulate = size, parts
    with pytest.raises(ValueError, match=re.escape(f"resume={tmp_path} {line}")):
        with remedies(cfg, Run(tmp_path)):
            raise MemoryError


def test_other_errors_keep_their_traceback(tmp_path, capsys, monkeypatch):
    def broken(self, batch):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(EDM, "loss", broken)
    assert train.main([*DEBUG, f"out_dir={tmp_path}"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda file: os.truncate(file, 600), "cannot be read (it has 472 bytes where its header"),
        (lambda file: np.save(file, np.zeros((1, 8, 8, 1), np.uint8)), "holds 1 images now, fewer"),
    ],
    ids=["cut", "fewer"],
)
def test_an_array_that_becomes_shorter_while_training(tmp_path, monkeypatch, capsys, spoil, line):
    """One line; what was saved before goes on when the array is put back."""
    file, whole = tmp_path / "a.npy", np.zeros((40, 8, 8, 1), np.uint8)
    np.save(file, whole)
    words = ["data.name=npy", f"data.root={file}", "data.device=disk", "data.workers=0"]
    words += [f"out_dir={tmp_path}/runs", "checkpoint.every=1"]
    save = Saver.save

    def save_and_spoil(saver, trainer):
        save(saver, trainer)
        if trainer.global_step == 2:
            spoil(file)

    monkeypatch.setattr(Saver, "save", save_and_spoil)
    assert train.main([*DEBUG, *words, "trainer.max_steps=20"]) == 2
    one_line(capsys, f"npy={file}: {line}")
    np.save(file, whole)
    (run,) = tmp_path.glob("runs/*/*")
    assert train.main([f"resume={run}", "trainer.max_steps=4"]) == 0


def test_a_network_larger_than_the_machine(tmp_path, capsys):
    """One line and no folder, before memory is taken for it."""
    for words, line in (
        (["network.channels=[1000000,1000000]"], "its weights take"),
        (["network.channels=[4611686018427387904]"], "no network is so large"),
        (["network.layers=1000000"], "it asks for more than 20000 tensors"),
    ):
        started = time.monotonic()
        assert train.main(last_words([*DEBUG, *words, f"out_dir={tmp_path}/runs"])) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("error: network.") and line in errors, errors
        assert errors.count("\n") == 1 and time.monotonic() - started < 30
    assert list(tmp_path.iterdir()) == []
