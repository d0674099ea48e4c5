"""The experiment file: one pydantic tree, parsed and checked before torch or Ray is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from orpo_ray.config.loss import LossConfig
from orpo_ray.config.metrics import METRIC_MODES
from orpo_ray.config.problems import MAX_SHOWN_PROBLEMS, ConfigError, describe_error, problem_list
from orpo_ray.config.rules import require_measured, require_pair_per_worker, require_stoppable
from orpo_ray.config.section import Section
from orpo_ray.config.sections import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    GenerationConfig,
    ModelConfig,
    OptimConfig,
    ScalingConfig,
    TrackingConfig,
    TrainConfig,
)
from orpo_ray.config.space import Bundle
from orpo_ray.config.sweep import SweepConfig
from orpo_ray.provenance import without_password


class ExperimentConfig(Section):
    """One experiment: a sweep if `sweep` is given, else a single run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the run directory and of the MLflow parent run; the same name continues the same sweep."""
    output_dir: str = "runs"
    """Folder that holds the run directories. On several nodes it must be on a file system that all of them share,
    unless `storage` is set."""
    storage: str | None = None
    """Object store for the journal and the checkpoints, e.g. `s3://bucket/orpo`. Nodes then need not share a file
    system, and another head node can continue the sweep."""
    model: ModelConfig
    data: DataConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    generation: GenerationConfig = GenerationConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()
    sweep: SweepConfig | None = None

    @field_validator("storage")
    @classmethod
    def _storage_is_a_uri(cls, storage: str | None) -> str | None:
        if storage is None:
            return None
        scheme, separator, rest = storage.rstrip("/").partition("://")
        if not separator or not rest or (scheme == "file" and not rest.startswith("/")):
            raise ValueError(
                "storage must be a URI with a bucket or an absolute path, e.g. s3://bucket/prefix, gs://bucket/prefix "
                "or file:///mnt/shared; for a folder that all nodes share, output_dir alone is enough"
            )
        if "@" in rest.partition("/")[0]:
            raise ValueError(
                "storage must not contain credentials: everyone who sees the settings would see them; pass them in the "
                "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the machine's role)"
            )
        return storage.rstrip("/")

    @field_validator("output_dir")
    @classmethod
    def _can_hold_folders(cls, output_dir: str) -> str:
        try:
            place = Path(output_dir).expanduser()
            if place.exists() and not place.is_dir():
                raise ValueError(f"{output_dir} exists but is not a directory; it must hold the run directories")
        except (OSError, RuntimeError) as error:
            raise ValueError(f"not a usable path: {error!s:.200}") from None
        return output_dir

    @model_validator(mode="after")
    def _cross_section_rules(self) -> ExperimentConfig:
        require_pair_per_worker(self.train, self.scaling)
        if (best := self.checkpoint.keep_best) is not None and best not in METRIC_MODES:
            raise ValueError(
                f"checkpoint.keep_best ({best}) is not a held-out metric; use one of {', '.join(METRIC_MODES)}"
            )
        if self.sweep is not None:
            require_stoppable(self.sweep, self.train)
        require_measured(self.loss, self.sweep, self.checkpoint.keep_best)
        return self

    @property
    def run_dir(self) -> Path:
        """Absolute path of this experiment's run directory."""
        return Path(self.output_dir).expanduser().absolute() / self.name

    @property
    def writes_answers(self) -> bool:
        """Whether evaluations write sample answers; a reward model writes none."""
        return self.generation.prompts > 0 and not self.loss.is_reward

    def as_sweep(self) -> tuple[ExperimentConfig, SweepConfig]:
        """This experiment as a sweep, and its `sweep` section; a single run is a sweep of one trial (law 6)."""
        sweep = self.sweep or SweepConfig()
        return self.model_copy(update={"sweep": sweep}), sweep

    def trial(self, params: dict[str, Any]) -> ExperimentConfig:
        """The config of one trial: this config without its sweep, and with `params` applied.

        Args:
            params: axis name -> value; a bundle axis takes one of its labels.

        Raises:
            ConfigError: a value breaks a rule of the config.
        """
        tree = self.model_dump(mode="json", exclude_unset=True)
        tree.pop("sweep", None)
        for path, value in self.settings(params).items():
            set_dotted(tree, path, value)
        return validated(tree, source=f"trial {params}")

    def settings(self, params: dict[str, Any]) -> dict[str, Any]:
        """`params` as config path -> value: a bundle's label is replaced by its settings."""
        flat: dict[str, Any] = {}
        for name, value in params.items():
            axis = self.sweep.space.get(name) if self.sweep else None
            if isinstance(axis, Bundle):
                flat.update(axis.values[value])
            else:
                flat[name] = value
        return flat


def as_given(dump: dict[str, Any]) -> dict[str, Any]:
    """A full dump of a config, without the settings that its loss filled in.

    If those counted as given, an experiment that sweeps `loss.name` could not be read back.
    """
    given = dump["loss"]
    loss = LossConfig(name=given["name"], preset=given.get("preset"), reward_model=given.get("reward_model"))
    implied = loss.model_dump(mode="json", exclude={"name", "preset", "reward_model"})
    own = {key: value for key, value in given.items() if key not in implied or value != implied[key]}
    return dump | {"loss": own}


def validated(tree: dict[str, Any], source: str) -> ExperimentConfig:
    """The config that a tree of Python values describes; `source` names it in error messages.

    Raises:
        ConfigError: it breaks a rule.
    """
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        items = error.errors()
        shown = [describe_error(item, ExperimentConfig) for item in items[:MAX_SHOWN_PROBLEMS]]
        raise ConfigError(problem_list(source, len(items), shown)) from None


def set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set the value at a path such as `optim.lr`, adding sections that are missing.

    Raises:
        ConfigError: a section on the path is a value.
    """
    *parents, leaf = dotted.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is not None and not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {parent} is a value ({without_password(repr(child)):.100}), not a section")
        # A copy: an alias elsewhere in the file may be the same mapping.
        node[parent] = node = dict(child or {})
    node[leaf] = value
