"""Data: sets by name and own files, the training stream, and Lightning's side of it."""

from genmodels.data.sets import DATASETS, SPLITS, TERMS, data_root, fill_in, load_split
from genmodels.data.stream import TrainStream

__all__ = [
    "DATASETS",
    "SPLITS",
    "TERMS",
    "ImageDataModule",
    "TrainStream",
    "data_root",
    "fill_in",
    "load_split",
]


def __getattr__(name):
    # Lightning is slow to import, and reading a set does not need it.
    if name == "ImageDataModule":
        from genmodels.data.module import ImageDataModule

        return ImageDataModule
    raise AttributeError(f"module 'genmodels.data' has no attribute {name!r}")
