"""The one config tree: typed, validated before anything starts, stored with every run."""

from cola_megatron.config.autoregressive import AutoregressiveConfig, AutoregressiveModelConfig
from cola_megatron.config.base import Section
from cola_megatron.config.cola import ColaConfig, ColaTrainingConfig, VAEUpdateConfig
from cola_megatron.config.cola_model import ColaModelConfig, DiTConfig, VAEConfig
from cola_megatron.config.cola_objective import ColaObjectiveConfig, FlowConfig, TimeConfig, VAEObjectiveConfig
from cola_megatron.config.errors import ConfigError
from cola_megatron.config.families import require_family
from cola_megatron.config.load import load_config, load_tree, preset_names
from cola_megatron.config.model import ModelConfig
from cola_megatron.config.resolve import resolve_config, resolve_tree
from cola_megatron.config.run import DataConfig, ParallelConfig, RunConfig
from cola_megatron.config.stored import dump_config, stored_config, stored_tree, upgraded_tree
from cola_megatron.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    LogConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from cola_megatron.config.transformer import TransformerConfig

__all__ = [
    "AutoregressiveConfig",
    "AutoregressiveModelConfig",
    "CheckpointConfig",
    "ColaConfig",
    "ColaModelConfig",
    "ColaObjectiveConfig",
    "ColaTrainingConfig",
    "ConfigError",
    "DataConfig",
    "DiTConfig",
    "EvaluationConfig",
    "FlowConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "TimeConfig",
    "TrainingConfig",
    "TransformerConfig",
    "VAEConfig",
    "VAEObjectiveConfig",
    "VAEUpdateConfig",
    "dump_config",
    "load_config",
    "load_tree",
    "preset_names",
    "require_family",
    "resolve_config",
    "resolve_tree",
    "stored_config",
    "stored_tree",
    "upgraded_tree",
]
