"""Recipes: typed sections, presets, rules across sections, TOML both ways."""

from megascratch.config.load import config_from_dict, load_config, resolve, to_toml
from megascratch.config.presets import PRESETS
from megascratch.config.rollouts import GrpoConfig, PpoConfig, RolloutConfig, ScoreConfig
from megascratch.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    ParamGroup,
    RopeScaling,
    TrainConfig,
)

__all__ = [
    "PRESETS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "GrpoConfig",
    "LogConfig",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ParamGroup",
    "PpoConfig",
    "RolloutConfig",
    "RopeScaling",
    "ScoreConfig",
    "TrainConfig",
    "config_from_dict",
    "load_config",
    "resolve",
    "to_toml",
]
