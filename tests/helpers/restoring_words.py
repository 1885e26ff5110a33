"""What tests of sample.py denoise= share: the call, and pictures to call it with."""

import numpy as np

import sample
from genmodels import images
from tests.helpers.tiny import last_words

RNG = np.random.default_rng(0)


def run(source, out, *words):
    return sample.main(last_words(["model", f"denoise={source}", f"out={out}", *words]))


def random_levels(*shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def save(path, levels):
    """Write levels (H, W) or (H, W, 3) with the package's own writer, or numpy's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, levels)
    else:
        kind = "tiff" if path.suffix.startswith(".tif") else "png"
        path.write_bytes(images.picture_bytes(levels.reshape(*levels.shape[:2], -1), kind))
