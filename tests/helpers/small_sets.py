"""Small sets of pictures as files, for the tests of own data."""

import io
import json
import zipfile

import numpy as np
import torch
from PIL import Image

from genmodels import images
from genmodels.config import DataConfig


def png(level, size=(8, 8), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, level if mode == "L" else (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def make_zip(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return DataConfig(name="zip", root=str(path), holdout=0.0)


def on_disk_cases(tmp_path):
    """The same 60 images with labels, as npy, zip and folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(60) % 3
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "a_labels.npy", labels)
    entries = {}
    for i, image in enumerate(pixels):
        entries[f"{i:02d}.png"] = images.png_bytes(torch.from_numpy(image).permute(2, 0, 1))
    pairs = [[name, int(label)] for name, label in zip(entries, labels)]
    make_zip(tmp_path / "a.zip", entries | {"dataset.json": json.dumps({"labels": pairs})})
    (tmp_path / "a").mkdir()
    for name, content in entries.items():
        (tmp_path / "a" / name).write_bytes(content)
    (tmp_path / "a" / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return {"npy": tmp_path / "a.npy", "zip": tmp_path / "a.zip", "imagefolder": tmp_path / "a"}
