"""Checkpoints: written whole, loaded without running anything in them, exported, converted.

A checkpoint is Lightning's: `state_dict` is the EMA, `current_model_state` the raw weights.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genmodels.checkpoint.exports import export, write_export
    from genmodels.checkpoint.models import (
        FORMAT,
        build,
        check_size,
        init_weights,
        is_diffusers,
        load,
        load_guide,
        model_path,
        newest_checkpoint,
        newest_run,
        paths_by_channels,
        read_checkpoint,
        settings_of_model,
        weights_hash,
    )
    from genmodels.checkpoint.save import AtomicCheckpointIO

__all__ = [
    "FORMAT",
    "AtomicCheckpointIO",
    "build",
    "check_size",
    "export",
    "init_weights",
    "is_diffusers",
    "load",
    "load_guide",
    "model_path",
    "newest_checkpoint",
    "newest_run",
    "paths_by_channels",
    "read_checkpoint",
    "settings_of_model",
    "weights_hash",
    "write_export",
]

_MODULES = {"AtomicCheckpointIO": "save", "export": "exports", "write_export": "exports"}


def __getattr__(name: str) -> Any:
    # The modules pull in torch, lightning and every method; a command's --help needs none of them.
    if name in __all__:
        module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'models')}")
        return getattr(module, name)
    raise AttributeError(f"module '{__name__}' has no attribute {name!r}")
