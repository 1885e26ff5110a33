import os
from pathlib import Path

import pytest
import torch

from tests.helpers.paths import ROOT
from tests.helpers.tiny import TINY, last_words

# Small tensors run faster, and sums come out alike everywhere, on one thread: of the commands that
# tests start too, and of the fixtures that are made before any test's.
os.environ["OMP_NUM_THREADS"] = "1"
# A name that is no path here may be one of the hub, which no test is to ask but by its stand-in.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread():
    """Undo what the last test may have set."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def train_tiny(tmp_path_factory):
    """Return a function that trains a tiny EDM on the digits and returns its run folder."""
    import train

    def run(*words, config="configs/edm_digits.yaml", out=None):
        out = out or tmp_path_factory.mktemp("runs")
        argv = [
            str(ROOT / config),
            str(ROOT / "configs/debug.yaml"),
            f"out_dir={out}",
            "sample.every=0",
            *TINY,
            *words,
        ]
        assert train.main(last_words(argv)) == 0
        (folder,) = Path(out).glob("*/*")
        return folder

    return run


@pytest.fixture(scope="session")
def tiny_run(train_tiny):
    """A finished run of four steps."""
    return train_tiny()


@pytest.fixture(scope="session")
def digits():
    """The training and the held-out pictures of the digits, uint8."""
    from genmodels.config import DataConfig
    from genmodels.data import load_split

    return tuple(load_split(DataConfig(), split)[0] for split in ("train", "test"))


@pytest.fixture
def box(monkeypatch):
    """Return a function that makes the scripts load a Box of these settings as their model."""
    from genmodels import checkpoint
    from tests.helpers.boxes import Box

    def load(*args, **settings):
        model = Box(*args, **settings)
        monkeypatch.setattr(checkpoint, "load", lambda *_, **__: model)
        return model

    return load
