"""Configs: the schema, and the one way from YAML and key=value words to it."""

from genmodels.config.load import check_foreign, load_config, save_config
from genmodels.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EMAConfig,
    EvalConfig,
    NoiseConfig,
    OptimConfig,
    SampleConfig,
    Section,
    TrainerConfig,
    check,
    seconds,
    setting,
    settings_of,
    to_json,
    to_plain,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EMAConfig",
    "EvalConfig",
    "NoiseConfig",
    "OptimConfig",
    "SampleConfig",
    "Section",
    "TrainerConfig",
    "check",
    "check_foreign",
    "load_config",
    "save_config",
    "seconds",
    "setting",
    "settings_of",
    "to_json",
    "to_plain",
]
