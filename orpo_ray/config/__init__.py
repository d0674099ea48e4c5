"""The experiment file: its sections, its search space, and the rules that hold between them."""

from orpo_ray.config.experiment import ExperimentConfig, as_given
from orpo_ray.config.loader import load, parse
from orpo_ray.config.loss import LossConfig
from orpo_ray.config.methods import (
    AshaConfig,
    FifoConfig,
    HyperBandConfig,
    HyperOptConfig,
    LadderConfig,
    MedianConfig,
    OptunaConfig,
    Pb2Config,
    PbtConfig,
    RandomConfig,
)
from orpo_ray.config.metrics import MEANING_MOVED_BY, METRIC_MODES
from orpo_ray.config.problems import ConfigError
from orpo_ray.config.sections import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ScalingConfig,
)
from orpo_ray.config.sweep import SweepConfig

__all__ = [
    "MEANING_MOVED_BY",
    "METRIC_MODES",
    "AshaConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DeepSpeedConfig",
    "ExperimentConfig",
    "FifoConfig",
    "GenerationConfig",
    "HyperBandConfig",
    "HyperOptConfig",
    "LadderConfig",
    "LoraConfig",
    "LossConfig",
    "MedianConfig",
    "ModelConfig",
    "OptimConfig",
    "OptunaConfig",
    "Pb2Config",
    "PbtConfig",
    "RandomConfig",
    "ScalingConfig",
    "SweepConfig",
    "as_given",
    "load",
    "parse",
]
