"""Data: sets by name and own files, the training stream, and Lightning's side of it."""

from typing import Any

from genmodels.data.sets import (
    DATASETS,
    SPLITS,
    DataSet,
    check_settings,
    data_root,
    data_set,
    fill_in,
    load_split,
    open_split,
)
from genmodels.data.stream import TrainStream

__all__ = [
    "DATASETS",
    "SPLITS",
    "DataSet",
    "ImageDataModule",
    "TrainStream",
    "check_settings",
    "data_root",
    "data_set",
    "fill_in",
    "load_split",
    "open_split",
]


def __getattr__(name: str) -> Any:
    # Lightning is slow to import, and reading a set does not need it.
    if name == "ImageDataModule":
        from genmodels.data.module import ImageDataModule

        return ImageDataModule
    raise AttributeError(f"module 'genmodels.data' has no attribute {name!r}")
