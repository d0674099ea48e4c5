"""The experiment file: one pydantic tree, parsed and checked before torch or Ray is imported."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from orpo_ray.config import strict_yaml
from orpo_ray.config.sections import (
    AshaConfig,
    BohbConfig,
    BudgetConfig,
    CheckpointConfig,
    ConfirmConfig,
    DataConfig,
    DeepSpeedConfig,
    FifoConfig,
    GenerationConfig,
    HyperBandConfig,
    HyperOptConfig,
    LadderConfig,
    LoraConfig,
    LossConfig,
    MedianConfig,
    ModelConfig,
    OptimConfig,
    OptunaConfig,
    Pb2Config,
    PbtConfig,
    RandomConfig,
    ScalingConfig,
    Section,
    TrackingConfig,
    TrainConfig,
)
from orpo_ray.config.space import Axis, Bundle, Choice, Grid, LogUniform, Uniform, grid_size
from orpo_ray.provenance import without_password

__all__ = [
    "MEANING_MOVED_BY",
    "METRIC_MODES",
    "AshaConfig",
    "BohbConfig",
    "BudgetConfig",
    "CheckpointConfig",
    "ConfigError",
    "ConfirmConfig",
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
    "TrackingConfig",
    "TrainConfig",
    "load",
    "parse",
]

METRIC_MODES: dict[str, Literal["max", "min"]] = {
    "eval/preference_accuracy": "max",
    "eval/log_odds": "max",
    "eval/nll": "min",
    "eval/nll_per_byte": "min",
    "eval/odds_ratio_loss": "min",
    "eval/loss": "min",
}
"""Held-out metrics a sweep may rank trials by, and which direction is better."""

_NOT_MEASURED: dict[str, frozenset[str]] = {
    "reward": frozenset(METRIC_MODES) - {"eval/preference_accuracy", "eval/loss"},
    "rloo": frozenset({"eval/loss"}),
}
"""Loss -> held-out metrics that its trials do not have: a reward model predicts nothing, and rloo's loss is of sampled
answers."""

_NO_AXES = frozenset({"checkpoint", "sweep", "tracking"})
"""Sections that no trial's result depends on."""
_WHAT_AN_ANSWER_IS = frozenset({"loss.answer_padding", "loss.preset"})
MEANING_MOVED_BY: dict[str, frozenset[str]] = {
    "eval/loss": frozenset(f"loss.{setting}" for setting in LossConfig.model_fields),
    "eval/nll": frozenset({"loss.nll_scope", "loss.nll_reduction", "loss.nll_eos", "loss.preset"}),
    "eval/preference_accuracy": _WHAT_AN_ANSWER_IS,
    "eval/log_odds": _WHAT_AN_ANSWER_IS,
    "eval/odds_ratio_loss": _WHAT_AN_ANSWER_IS,
    "eval/nll_per_byte": _WHAT_AN_ANSWER_IS,
}
"""Metric -> settings that change what the metric measures; sweeping one of them by that metric ranks the
setting, not the model (law 4)."""


Scheduler = FifoConfig | AshaConfig | HyperBandConfig | MedianConfig | PbtConfig | Pb2Config
Searcher = RandomConfig | OptunaConfig | HyperOptConfig | BohbConfig | LadderConfig


MAX_FILE_BYTES = 1 << 20
"""Longest experiment file."""
MAX_TRIALS = 100_000
"""Of one sweep: all cells of a grid are held in memory."""
_SHOWN_PROBLEMS = 50


class ConfigError(ValueError):
    """The experiment file, an override or a sweep axis breaks a rule; the message lists every one found."""


class SweepConfig(Section):
    """Which settings are explored, how, and how trials are judged."""

    metric: str = "eval/preference_accuracy"
    """Held-out metric that ranks trials and drives early stopping."""
    num_samples: int = Field(1, ge=1)
    """random: repeats of the whole grid, with fresh draws; optuna, hyperopt, bohb: trials in all; ladder: at most."""
    seed: int = Field(0, ge=0)
    """Seed of the searcher's draws."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials running at once; by default as many as the cluster holds. Where a sweep is continued on a larger cluster,
    Tune still proposes no more trials ahead than its first run did."""
    max_failures: int = Field(2, ge=0)
    """How often a trial whose worker process died is started again from its last checkpoint."""
    max_group_trials: int = Field(200, ge=1)
    """Trials that one worker group runs before its processes are replaced, against slow leaks in what it runs."""
    scheduler: Annotated[Scheduler, Field(discriminator="type")] = FifoConfig(type="fifo")
    """Early stopping, or populations."""
    searcher: Annotated[Searcher, Field(discriminator="type")] = RandomConfig(type="random")
    """Where proposals come from."""
    budget: BudgetConfig | None = None
    """What the sweep may cost; confirmation is part of it."""
    warm_start: str | None = None
    """An MLflow experiment whose finished trials are taken into account: one that differs in nothing but the axes
    informs the searcher, and the same setting is not trained again."""
    confirm: ConfirmConfig | None = None
    """Train the best settings with further seeds before a winner is named."""
    space: dict[str, Axis] = Field(default_factory=dict)
    """config path -> axis; a bundle's key is a name of your choice. Empty: one trial."""

    @property
    def mode(self) -> Literal["max", "min"]:
        """Which direction of the metric is better."""
        return METRIC_MODES[self.metric]

    @property
    def is_model_based(self) -> bool:
        """Whether proposals depend on results."""
        return not isinstance(self.searcher, RandomConfig)

    @property
    def num_trials(self) -> int:
        """How many trials the search proposes, at most where there is a budget; confirmation not counted."""
        return self.num_samples * (1 if self.is_model_based else grid_size(self.space))

    @property
    def num_confirmations(self) -> int:
        """How many trials confirmation adds, at most."""
        return 0 if self.confirm is None else self.confirm.top * (self.confirm.seeds - 1)

    @property
    def bundle_axis(self) -> str | None:
        """Name of the bundle axis, if there is one."""
        return next((name for name, axis in self.space.items() if isinstance(axis, Bundle)), None)

    def bundle_of(self, params: dict[str, Any]) -> str:
        """The bundle that a trial belongs to; "" where there is no bundle axis."""
        return str(params[self.bundle_axis]) if self.bundle_axis else ""

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, metric: str) -> str:
        if metric not in METRIC_MODES:
            raise ValueError(f"metric {metric!r} is not a held-out metric; use one of {', '.join(METRIC_MODES)}")
        return metric

    @model_validator(mode="after")
    def _judged_by_what_the_axes_cannot_move(self) -> SweepConfig:
        swept = set(self.space)
        for axis in self.space.values():
            if isinstance(axis, Bundle):
                swept.update(path for settings in axis.values.values() for path in settings)
        moved = sorted(swept & MEANING_MOVED_BY[self.metric])
        if moved:
            allowed = [m for m in METRIC_MODES if not swept & MEANING_MOVED_BY[m]]
            advice = f"use one of {', '.join(allowed)}"
            if not allowed:
                of = "a preset's settings one by one" if "loss.preset" in moved else "fewer of these settings"
                advice = f"and so does every other metric; vary {of}, or run one experiment per value"
            raise ValueError(
                f"metric {self.metric} changes its meaning with {', '.join(moved)}, which this sweep varies: "
                f"it would rank the setting, not the model; {advice}"
            )
        lone = [path for path, axis in self.space.items() if not isinstance(axis, Bundle) and _needs_bundle(path)]
        if lone:
            raise ValueError(
                f"axis {lone[0]} changes the model or what a trial occupies, so it belongs in a bundle: early stopping "
                "compares trials of one bundle only, and each bundle has worker groups of its own"
            )
        if sum(isinstance(axis, Bundle) for axis in self.space.values()) > 1:
            raise ValueError("a sweep has at most one bundle axis; merge them into one, with a label per combination")
        return self

    @model_validator(mode="after")
    def _can_be_listed(self) -> SweepConfig:
        if self.num_trials > MAX_TRIALS:
            cells = "" if self.is_model_based else f" (num_samples {self.num_samples} × {grid_size(self.space)} cells)"
            raise ValueError(
                f"the sweep would have {self.num_trials} trials{cells}, more than {MAX_TRIALS}; "
                "draw some axes at random (choice, uniform, loguniform), or give fewer values"
            )
        return self

    @model_validator(mode="after")
    def _no_trial_twice(self) -> SweepConfig:
        grids = all(isinstance(axis, Grid | Bundle) for axis in self.space.values())
        if self.space and grids and not self.is_model_based and self.num_samples > 1:
            raise ValueError(
                f"num_samples ({self.num_samples}) would run each of the grid's {grid_size(self.space)} cells that "
                "often with the same seed; drop it, or add an axis train.seed: {type: grid, values: [1, 2, 3]}"
            )
        return self

    @model_validator(mode="after")
    def _scheduler_and_searcher_go_together(self) -> SweepConfig:
        scheduler, searcher = self.scheduler, self.searcher
        plain = {name: axis for name, axis in self.space.items() if not isinstance(axis, Bundle)}
        if isinstance(scheduler, PbtConfig | Pb2Config):
            if self.is_model_based:
                raise ValueError(
                    f"scheduler {scheduler.type} changes settings while trials train, and searcher {searcher.type} "
                    "proposes from settings that do not change: use searcher random"
                )
            if not any(isinstance(axis, Uniform | LogUniform | Choice) for axis in plain.values()):
                raise ValueError(f"scheduler {scheduler.type} needs an axis to move: uniform, loguniform or choice")
            if self.confirm is not None:
                raise ValueError(
                    f"confirm trains a setting anew with other seeds, but under scheduler {scheduler.type} a trial's "
                    "settings changed on its way; confirm the best in a sweep of its own"
                )
        if isinstance(scheduler, Pb2Config):
            other = [name for name, axis in plain.items() if not isinstance(axis, Uniform | LogUniform)]
            if other:
                raise ValueError(f"scheduler pb2 models continuous axes only, but {other[0]} is {plain[other[0]].type}")
        if isinstance(searcher, BohbConfig) != isinstance(scheduler, HyperBandConfig) and isinstance(
            searcher, BohbConfig
        ):
            raise ValueError(f"searcher bohb models by rung: it needs scheduler hyperband, not {scheduler.type}")
        if isinstance(searcher, OptunaConfig) and searcher.objectives:
            unknown = [metric for metric in searcher.objectives if metric not in METRIC_MODES]
            if unknown or self.metric not in searcher.objectives or len(set(searcher.objectives)) < 2:
                raise ValueError(
                    f"searcher.objectives {list(searcher.objectives)} must be two or more of "
                    f"{', '.join(METRIC_MODES)}, with sweep.metric ({self.metric}) among them"
                )
            if searcher.sampler in ("gp", "cmaes"):
                raise ValueError(f"sampler {searcher.sampler} takes one objective; use tpe, nsga2 or random")
            if not isinstance(scheduler, FifoConfig):
                raise ValueError(f"scheduler {scheduler.type} ends trials by one metric; several objectives need fifo")
        if isinstance(searcher, LadderConfig):
            if self.budget is None or self.bundle_axis is None:
                raise ValueError(
                    "searcher ladder climbs model sizes within a budget: give sweep.budget: {device_hours: ...} and a "
                    "bundle axis whose labels are the sizes"
                )
            if not isinstance(scheduler, FifoConfig | AshaConfig):
                raise ValueError(f"searcher ladder goes with scheduler asha or fifo, not {scheduler.type}")
            grids = [name for name, axis in plain.items() if not isinstance(axis, Uniform | LogUniform)]
            if grids or not plain:
                raise ValueError(
                    "searcher ladder models continuous axes (uniform, loguniform)"
                    + (f", but {grids[0]} is {plain[grids[0]].type}" if grids else ", and there is none")
                )
        if self.confirm is not None and any(
            path == "train.seed" or (isinstance(axis, Bundle) and any("train.seed" in s for s in axis.values.values()))
            for path, axis in self.space.items()
        ):
            raise ValueError("confirm adds seeds itself: drop the axis train.seed, or confirm")
        return self


class ExperimentConfig(Section):
    """One experiment: a single run, or a sweep where `sweep` is given."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the run directory and of the MLflow parent run; the same name continues the same sweep."""
    output_dir: str = "runs"
    """Run directories are made here. On several nodes: a file system that all of them share, unless there is a
    `storage`."""
    storage: str | None = None
    """Object store that keeps the journal and the checkpoints, e.g. `s3://bucket/orpo`: nodes then need not share a
    file system, and the sweep can be continued from another head node."""
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
                "or file:///mnt/shared; for a folder that all nodes share, output_dir alone will do"
            )
        if "@" in rest.partition("/")[0]:
            raise ValueError(
                "storage must not hold credentials: everybody who sees the settings would see them; leave them to the "
                "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the machine's role)"
            )
        return storage.rstrip("/")

    @field_validator("output_dir")
    @classmethod
    def _can_hold_folders(cls, output_dir: str) -> str:
        try:
            place = Path(output_dir).expanduser()
            if place.exists() and not place.is_dir():
                raise ValueError(f"{output_dir} is there and is no folder; run directories are made in it")
        except (OSError, RuntimeError) as error:
            raise ValueError(f"no path here: {error!s:.200}") from None
        return output_dir

    @model_validator(mode="after")
    def _cross_section_rules(self) -> ExperimentConfig:
        _require_pair_per_worker(self.train, self.scaling)
        if (best := self.checkpoint.keep_best) is not None and best not in METRIC_MODES:
            raise ValueError(
                f"checkpoint.keep_best ({best}) is not a held-out metric; use one of {', '.join(METRIC_MODES)}"
            )
        if self.sweep is not None:
            _require_stoppable(self.sweep, self.train)
        _require_measured(self.loss, self.sweep, self.checkpoint.keep_best)
        return self

    @property
    def run_dir(self) -> Path:
        """Absolute directory of this experiment's results."""
        return Path(self.output_dir).expanduser().absolute() / self.name

    @property
    def writes_answers(self) -> bool:
        """Whether evaluations write down answers to some prompts; a reward model gives none."""
        return self.generation.prompts > 0 and not self.loss.is_reward

    def as_sweep(self) -> tuple[ExperimentConfig, SweepConfig]:
        """This experiment as a sweep; a single run is a sweep of one trial (law 6)."""
        sweep = self.sweep or SweepConfig()
        return self.model_copy(update={"sweep": sweep}), sweep

    def trial(self, params: dict[str, Any]) -> ExperimentConfig:
        """The config of one trial: this one without its sweep, with `params` applied.

        Args:
            params: axis name -> value; a bundle axis takes one of its labels.

        Raises:
            ConfigError: a value breaks a rule of the config.
        """
        tree = self.model_dump(mode="json", exclude_unset=True)
        tree.pop("sweep", None)
        for path, value in self.settings(params).items():
            _set(tree, path, value)
        return _validated(tree, source=f"trial {params}")

    def settings(self, params: dict[str, Any]) -> dict[str, Any]:
        """`params` with the bundle's label replaced by the settings it stands for (config path -> value)."""
        flat: dict[str, Any] = {}
        for name, value in params.items():
            axis = self.sweep.space.get(name) if self.sweep else None
            if isinstance(axis, Bundle):
                flat.update(axis.values[value])
            else:
                flat[name] = value
        return flat


def load(path: str | Path, overrides: list[str] | None = None) -> ExperimentConfig:
    """Read an experiment file, apply `key.path=value` overrides, and check everything, each sweep candidate included.

    Args:
        path: YAML file.
        overrides: e.g. `["optim.lr=1e-5", "train.max_steps=100"]`; values are read as YAML.

    Raises:
        ConfigError: with every broken rule, its path and value.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{path}: longer than {MAX_FILE_BYTES >> 20} MiB, which no experiment file is; is it the data? Give that "
            "as data.path"
        )
    try:
        tree = strict_yaml.read(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text in UTF-8: {error}; save it as UTF-8") from None
    except strict_yaml.NotPlain as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: an experiment file is a mapping (name, model, data, ...), got {type(tree).__name__}"
        )
    return parse(tree, overrides, source=str(path))


def parse(tree: dict[str, Any], overrides: list[str] | None = None, source: str = "config") -> ExperimentConfig:
    """Like `load`, from a tree already read.

    Args:
        tree: overrides are set in it; mappings within it are copied first, for an alias may have made two of them one.

    Raises:
        ConfigError: with every broken rule, its path and value.
    """
    try:
        strict_yaml.require_plain(tree)
    except strict_yaml.NotPlain as error:
        raise ConfigError(f"{source}: {error}") from None
    if tree.get("scaling") == "auto":
        tree["scaling"] = {"auto": True}  # so that an override can set one of its keys
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r}: write key.path=value, e.g. optim.lr=1e-5")
        if key.startswith("sweep.space."):
            raise ConfigError(f"override {override!r}: an axis name holds dots itself; edit sweep.space in the file")
        try:
            strict_yaml.require_plain(key)
            _set(tree, key, strict_yaml.read(text))
        except strict_yaml.NotPlain as error:
            raise ConfigError(f"override {override!r:.200}: {text!r:.200} is not valid YAML: {error}") from None
    config = _validated(tree, source)
    return config if config.sweep is None else _with_coerced_space(config, source)


def as_given(dump: dict[str, Any]) -> dict[str, Any]:
    """A config's full dump without what its loss filled in by itself.

    That does not count as given, or an experiment that sweeps `loss.name` could not be read back.
    """
    given = dump["loss"]
    loss = LossConfig(name=given["name"], preset=given.get("preset"), reward_model=given.get("reward_model"))
    implied = loss.model_dump(mode="json", exclude={"name", "preset", "reward_model"})
    own = {key: value for key, value in given.items() if key not in implied or value != implied[key]}
    return dump | {"loss": own}


def _validated(tree: dict[str, Any], source: str) -> ExperimentConfig:
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        items = error.errors()
        shown = [_describe(item) for item in items[:_SHOWN_PROBLEMS]]
        raise ConfigError(_problems(source, len(items), shown)) from None


def _problems(source: str, count: int, shown: list[str]) -> str:
    more = [f"  and {count - len(shown)} more"] if count > len(shown) else []
    return "\n".join([f"{source}: {count} problem(s)", *(f"  {line}" for line in shown), *more])


def _describe(item: Any) -> str:
    # Union tags ("asha", "loguniform") appear in pydantic's location but not in the file.
    location = [str(part) for part in item["loc"]]
    where = ".".join(f"{part:.100}" for part in location)
    if item["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}" if known else ""
        return f"{where}: unknown key; {hint}".rstrip("; ")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] in ("missing", "value_error"):
        return f"{where}: {message}" if where else message
    given = without_password(repr(item["input"]))
    return f"{where}: {message} (got {given:.200})"


def _fields_at(location: list[str]) -> list[str]:
    section: type[BaseModel] = ExperimentConfig
    variants = {
        cls.model_fields["type"].annotation.__args__[0]: cls
        for cls in (
            *(Grid, Choice, Uniform, LogUniform, Bundle),
            *get_args(Scheduler),
            *get_args(Searcher),
        )
    }
    for part in location:
        if part in variants:
            section = variants[part]
        elif part in section.model_fields:
            nested = next((m for m in _models_in(section.model_fields[part].annotation)), None)
            section = nested or section
    return list(section.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is not None and not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {parent} is a value ({without_password(repr(child)):.100}), not a section")
        # A copy: an alias elsewhere in the file may be the same mapping.
        node[parent] = node = dict(child or {})
    node[leaf] = value


def _get(config: BaseModel, dotted: str) -> Any:
    node: Any = config
    for part in dotted.split("."):
        node = getattr(node, part)
    return node


def _with_coerced_space(config: ExperimentConfig, source: str) -> ExperimentConfig:
    """Pass every candidate of every axis through the config, and keep the value the config made of it.

    YAML reads `1e-6` as a string; typed fields coerce it, an untyped list of candidates does not.
    """
    sweep = config.sweep
    assert sweep is not None
    problems: list[str] = []
    coerced: dict[str, Any] = {}
    sections = {name for name, field in ExperimentConfig.model_fields.items() if any(_models_in(field.annotation))}
    twice = _set_twice(sweep)
    if twice:
        problems.append(f"sweep.space: {twice} is set by a bundle and is an axis of its own; keep one of the two")
    for name, axis in sweep.space.items():
        reserved = [p for p in _paths_of(name, axis) if p.split(".")[0] not in sections - _NO_AXES]
        if reserved:
            problems.append(
                f"sweep.space.{name}: axis {reserved[0]!r} must be a setting in "
                f"{', '.join(sorted(sections - _NO_AXES))}, e.g. optim.lr"
            )
            continue
        values: list[Any] = []
        for candidate in (*axis.candidates(), *_between(axis)):
            try:
                trial = config.trial({**_any_bundle(config, name), name: candidate})
            except ConfigError as error:
                lines = str(error).splitlines()[1:] or [str(error)]
                problems.extend(f"sweep.space.{name}: candidate {candidate!r}: {line.strip()}" for line in lines)
                continue
            found = {path: _get(trial, path) for path in axis.values[candidate]} if isinstance(axis, Bundle) else {}
            value = found if isinstance(axis, Bundle) else _get(trial, name)
            if isinstance(value, BaseModel):
                problems.append(f"sweep.space.{name}: {name} is a section, not a setting; vary sections in a bundle")
                break
            values.append(value)
        else:
            if len(values) == len(axis.candidates()) + len(_between(axis)):
                try:
                    coerced[name] = _rebuilt(axis, values)
                except ValidationError as error:
                    problems += [f"sweep.space.{name}: {_describe(item)}" for item in error.errors()]
    if not problems:
        problems += _problems_in_combinations(
            config.model_copy(update={"sweep": sweep.model_copy(update={"space": coerced})})
        )
    if problems:
        raise ConfigError(_problems(source, len(problems), problems[:_SHOWN_PROBLEMS]))
    return config.model_copy(update={"sweep": sweep.model_copy(update={"space": coerced})})


def _paths_of(name: str, axis: Axis) -> list[str]:
    return sorted({p for s in axis.values.values() for p in s}) if isinstance(axis, Bundle) else [name]


def _any_bundle(config: ExperimentConfig, axis_name: str) -> dict[str, Any]:
    """The first bundle, for an axis that makes sense only together with one."""
    assert config.sweep is not None
    bundle = config.sweep.bundle_axis
    if bundle is None or bundle == axis_name:
        return {}
    return {bundle: config.sweep.space[bundle].candidates()[0]}


def _between(axis: Axis) -> tuple[float, ...]:
    """A value inside a continuous axis: an integer setting accepts its two ends, and would fail in mid-sweep."""
    return (axis.low + (axis.high - axis.low) / 3**0.5,) if isinstance(axis, Uniform | LogUniform) else ()


def _set_twice(sweep: SweepConfig) -> str | None:
    bundled = {path for axis in sweep.space.values() if isinstance(axis, Bundle) for path in _paths_of("", axis)}
    return next((name for name in sweep.space if name in bundled), None)


def _rebuilt(axis: Axis, values: list[Any]) -> Axis:
    """The axis with the values that the config made of its candidates.

    Raises:
        ValidationError: two candidates have become the same value.
    """
    match axis:
        case Grid() | Choice():
            return type(axis)(type=axis.type, values=tuple(values))
        case Uniform() | LogUniform():
            return axis.model_copy(update={"low": values[0], "high": values[1]})
        case Bundle():
            settings = [{path: _plain(value) for path, value in found.items()} for found in values]
            return axis.model_copy(update={"values": dict(zip(axis.values, settings, strict=True))})


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _problems_in_combinations(config: ExperimentConfig) -> list[str]:
    """Rules that only a combination breaks, e.g. batch arithmetic between a bundle and an axis (10,000 at most)."""
    assert config.sweep is not None
    problems: dict[str, None] = {}
    names = list(config.sweep.space)
    corners = itertools.product(*(axis.candidates() for axis in config.sweep.space.values()))
    for corner in itertools.islice(corners, 10_000):
        params = dict(zip(names, corner, strict=True))
        try:
            _require_stoppable(config.sweep, config.trial(params).train)
        except ConfigError as error:
            for line in str(error).splitlines()[1:]:
                problems.setdefault(f"sweep.space: {params}: {line.strip()}")
        except ValueError as error:
            problems.setdefault(f"sweep.space: {params}: {error}")
    return list(problems)


def _needs_bundle(path: str) -> bool:
    return path in {"model.path", "model.gguf_file", "model.revision"} or path.startswith("scaling.")


def _require_stoppable(sweep: SweepConfig, train: TrainConfig) -> None:
    scheduler = sweep.scheduler
    if isinstance(scheduler, FifoConfig):
        return
    if train.eval_every is None:
        raise ValueError(f"scheduler {scheduler.type} decides at evaluations: set train.eval_every")
    if isinstance(scheduler, PbtConfig | Pb2Config):
        if scheduler.interval_steps % train.eval_every:
            raise ValueError(
                f"scheduler.interval_steps ({scheduler.interval_steps}) must be a multiple of train.eval_every "
                f"({train.eval_every}): the population is compared at evaluations"
            )
        return
    if isinstance(scheduler, HyperBandConfig):
        if train.max_steps is None:
            raise ValueError("scheduler hyperband plans its brackets by the trials' length: give train.max_steps")
        return
    if train.max_steps is not None and scheduler.grace_steps >= train.max_steps:
        raise ValueError(
            f"scheduler.grace_steps ({scheduler.grace_steps}) must be below train.max_steps ({train.max_steps}), "
            "or nothing is ever stopped early"
        )


def _require_measured(loss: LossConfig, sweep: SweepConfig | None, keep_best: str | None) -> None:
    axis = None if sweep is None else sweep.space.get("loss.name")
    names = {loss.name} if axis is None else {str(name) for name in axis.candidates()}
    if "reward" in names and len(names) > 1:
        raise ValueError(
            f"loss.name varies over {', '.join(sorted(names))}, but a reward model and a language model are judged by "
            "different things: give reward an experiment of its own"
        )
    for name in sorted(names & _NOT_MEASURED.keys()):
        asked = {"sweep.metric": sweep.metric if sweep else None, "checkpoint.keep_best": keep_best}
        for setting, metric in asked.items():
            if metric in _NOT_MEASURED[name]:
                measured = [known for known in METRIC_MODES if known not in _NOT_MEASURED[name]]
                raise ValueError(
                    f"{setting} is {metric}, which loss.name {name} does not measure; use one of {', '.join(measured)}"
                )


def _require_pair_per_worker(train: TrainConfig, scaling: ScalingConfig) -> None:
    if train.global_batch_size < scaling.num_workers:
        raise ValueError(
            f"global_batch_size ({train.global_batch_size}) must be at least num_workers ({scaling.num_workers}): "
            "every worker needs a pair in each step; use a larger batch or fewer workers"
        )
