"""Recipes: typed sections, presets, rules across sections, TOML both ways."""

from megascratch.config.load import config_from_dict, load_config, read_recipe, resolve, to_toml
from megascratch.config.preferences import ChatConfig, DpoConfig, LoraConfig, RewardConfig
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
    "ChatConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DpoConfig",
    "EvalConfig",
    "GrpoConfig",
    "LogConfig",
    "LoraConfig",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ParamGroup",
    "PpoConfig",
    "RewardConfig",
    "RolloutConfig",
    "RopeScaling",
    "ScoreConfig",
    "TrainConfig",
    "config_from_dict",
    "load_config",
    "read_recipe",
    "resolve",
    "to_toml",
]
