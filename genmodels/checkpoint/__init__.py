"""Checkpoints: written whole, loaded without running anything in them, exported, converted.

A checkpoint is Lightning's: `state_dict` is the EMA, `current_model_state` the raw weights.
"""

from genmodels.checkpoint.export import export, write_export
from genmodels.checkpoint.models import (
    FORMAT,
    build,
    init_weights,
    is_diffusers,
    load,
    load_guide,
    read_checkpoint,
    weights_hash,
)
from genmodels.checkpoint.save import AtomicCheckpointIO, link

__all__ = [
    "FORMAT",
    "AtomicCheckpointIO",
    "build",
    "export",
    "init_weights",
    "is_diffusers",
    "link",
    "load",
    "load_guide",
    "read_checkpoint",
    "weights_hash",
    "write_export",
]
