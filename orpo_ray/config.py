"""The experiment file: one pydantic tree, parsed and checked before torch or Ray is imported."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from orpo_ray.space import Axis, Bundle, Choice, Grid, LogUniform, Uniform, grid_size

METRIC_MODES: dict[str, Literal["max", "min"]] = {
    "eval/preference_accuracy": "max",
    "eval/log_odds": "max",
    "eval/nll": "min",
    "eval/nll_per_byte": "min",
    "eval/odds_ratio_loss": "min",
    "eval/loss": "min",
}
"""Held-out metrics a sweep may rank trials by, and which direction is better."""

_MEANING_MOVED_BY: dict[str, frozenset[str]] = {
    "eval/loss": frozenset({"loss.orpo_lambda", "loss.name", "loss.nll_scope", "loss.nll_reduction"}),
    "eval/nll": frozenset({"loss.nll_scope", "loss.nll_reduction"}),
}
"""Metric -> settings that change what the metric measures; sweeping one of them by that metric ranks the
setting, not the model (law 4)."""


class ConfigError(ValueError):
    """The experiment file, an override or a sweep axis breaks a rule; the message lists every one found."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LoraConfig(_Section):
    """Low-rank adapters (Hu et al. 2021) through peft; the base weights stay frozen."""

    rank: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Module names to adapt; `all-linear` is every linear layer but the head."""


class ModelConfig(_Section):
    """Which causal language model is tuned."""

    path: str = Field(min_length=1)
    """Hub name, folder, or a built-in preset (`tiny-llama-2m`, `tiny-llama-8m`)."""
    gguf_file: str | None = None
    """A GGUF file inside `path`; transformers dequantises it into dense weights."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Off unless you trust its author."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel, in transformers' names."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Low-rank adapters instead of full fine-tuning."""

    @field_validator("path")
    @classmethod
    def _local_path_is_absolute(cls, path: str) -> str:
        return _absolute_if_local(path)


class DataConfig(_Section):
    """Where the preference pairs come from and how they become tokens."""

    path: str = Field(min_length=1)
    """Hub name, a jsonl/json/parquet/csv file (gzipped or not), a folder of them, or `builtin://style-pairs`."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    train_split: str | None = None
    """Split to train on; by default the one named train_prefs or train, or the only one there is."""
    eval_split: str | None = None
    """Split to evaluate on; by default test_prefs, test or validation."""
    eval_path: str | None = None
    """File with the held-out pairs; by default they come from `path`."""
    eval_pairs: int = Field(512, ge=1)
    """Held-out pairs at most. Where the data have no split for them, this many are set aside from the training
    pairs, drawn by `split_seed`, the same for every trial."""
    train_pairs: int | None = Field(None, ge=1)
    """Training pairs at most (after shuffling by `split_seed`); all by default."""
    split_seed: int = Field(0, ge=0)
    """Seed of the split and of the built-in generator: not the training seed, so trials share their pairs."""
    max_tokens: int = Field(1024, ge=8)
    """Prompt and answer together, in tokens. A longer answer is cut at its end and then carries no EOS."""
    max_prompt_tokens: int = Field(768, ge=1)
    """Longest prompt, in tokens."""
    long_prompts: Literal["drop", "truncate"] = "drop"
    """A prompt over `max_prompt_tokens` drops its pair (as in the paper) or is cut from the left."""
    on_bad_rows: Literal["drop", "error"] = "drop"
    """Empty, identical and malformed pairs are dropped and counted, or refused with file and row."""
    chat_template: str | None = None
    """Jinja chat template; by default the tokenizer's own, or the ORPO authors' where it has none."""
    cache_dir: str = "~/.cache/orpo-ray"
    """Tokenised pairs are kept here and shared by trials, runs and workers of one machine."""

    @field_validator("path", "eval_path")
    @classmethod
    def _local_path_is_absolute(cls, path: str | None) -> str | None:
        return path and _absolute_if_local(path)

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> DataConfig:
        if self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(
                f"max_prompt_tokens ({self.max_prompt_tokens}) < max_tokens ({self.max_tokens}) must hold: "
                "at least one answer token has to fit behind the longest prompt"
            )
        return self


class LossConfig(_Section):
    """L = NLL + orpo_lambda * L_OR (paper eq. 6), with everything that gives λ its meaning said out loud."""

    name: Literal["orpo", "sft"] = "orpo"
    """`sft` is the NLL alone: λ = 0 exactly."""
    orpo_lambda: float = Field(0.1, ge=0)
    """The paper's λ (TRL: `beta`; the authors' code: `alpha`)."""
    nll_scope: Literal["prompt_and_response", "response"] = "prompt_and_response"
    """Tokens of [prompt | chosen] that the NLL counts."""
    nll_reduction: Literal["token", "pair"] = "token"
    """Mean over all counted tokens of the global batch, or over pairs of each pair's token mean."""

    @model_validator(mode="before")
    @classmethod
    def _sft_sets_lambda(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("name") == "sft":
            return {"orpo_lambda": 0.0} | tree
        return tree

    @model_validator(mode="after")
    def _sft_has_no_lambda(self) -> LossConfig:
        if self.name == "sft" and self.orpo_lambda != 0:
            raise ValueError(
                f"loss.name sft is λ = 0, but orpo_lambda is {self.orpo_lambda}: drop it, or use name: orpo"
            )
        return self


class OptimConfig(_Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(8.0e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant"] = "cosine"
    """Shape after warm-up; cosine and linear end at 0."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps spent in linear warm-up, unless `warmup_steps` is given."""
    warmup_steps: int | None = Field(None, ge=0)
    """Warm-up in steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay on matrices (not on biases and norms)."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1.0e-8, gt=0)
    """Added to the root of the second moment."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the global gradient norm to this; null for no clipping."""


class TrainConfig(_Section):
    """The loop: batch arithmetic, length, precision, how often it looks up."""

    global_batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step over all workers. Changing how it is cut changes speed, never the gradient."""
    micro_batch_size: int = Field(4, ge=1)
    """Pairs per forward pass per worker; accumulation steps follow from it."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps. Give this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training pairs. Give this or `max_steps`."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations; by default only after the last step, which is always evaluated."""
    log_every: int = Field(10, ge=1)
    """Steps between reports of the training metrics."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; by default at each evaluation. The last step is always saved."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 keeps fp32 master weights and optimizer state; the loss is computed in fp32 either way."""
    seed: int = Field(42, ge=0)
    """Initialisation of new weights, order of the pairs, dropout."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                f"give either max_steps or epochs, not both or neither "
                f"(max_steps={self.max_steps}, epochs={self.epochs})"
            )
        if self.max_steps is not None and self.eval_every is not None and self.eval_every > self.max_steps:
            raise ValueError(f"eval_every ({self.eval_every}) must not exceed max_steps ({self.max_steps})")
        return self


class DeepSpeedConfig(_Section):
    """What is partitioned over the workers (Rajbhandari et al. 2020), and what is kept off the device."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """0: nothing; 1: optimizer state; 2: and gradients; 3: and parameters."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer state lives."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Where the parameters live between uses (stage 3)."""
    nvme_path: str | None = None
    """Folder on a fast local disk, for nvme offload."""

    @model_validator(mode="after")
    def _offload_fits_stage(self) -> DeepSpeedConfig:
        stage = self.zero_stage
        if self.offload_param != "none" and stage != 3:
            raise ValueError(f"offload_param ({self.offload_param}) needs zero_stage 3, but zero_stage is {stage}")
        if self.offload_optimizer == "cpu" and stage == 0:
            raise ValueError("offload_optimizer (cpu) needs zero_stage 1, 2 or 3, but zero_stage is 0")
        if self.offload_optimizer == "nvme" and stage != 3:
            raise ValueError(f"offload_optimizer (nvme) needs zero_stage 3, but zero_stage is {stage}")
        if "nvme" in (self.offload_optimizer, self.offload_param) and self.nvme_path is None:
            raise ValueError("nvme offload needs nvme_path, a folder on a fast local disk")
        return self


class ScalingConfig(_Section):
    """What one trial occupies."""

    num_workers: int = Field(1, ge=1)
    """Data-parallel worker processes."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores reserved, and threads used, per worker."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per worker; `auto` means where the cluster has GPUs."""


class TrackingConfig(_Section):
    """Where MLflow runs go."""

    uri: str | None = None
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI, else a SQLite file in `output_dir`."""
    experiment: str = Field("orpo-ray", min_length=1)
    """MLflow experiment name."""


class FifoConfig(_Section):
    """Every trial runs to its end."""

    type: Literal["fifo"]


class AshaConfig(_Section):
    """Asynchronous successive halving (Li et al. 2018), separately within each bundle."""

    type: Literal["asha"]
    grace_steps: int = Field(ge=1)
    """No trial is stopped before this step; the first rung."""
    reduction_factor: float = Field(3.0, gt=1)
    """At each rung about one trial in this many goes on; rungs are grace_steps × reduction_factor^k."""


class MedianConfig(_Section):
    """Stop a trial whose running mean is worse than the median of the others in its bundle (Golovin et al. 2017)."""

    type: Literal["median"]
    grace_steps: int = Field(ge=1)
    """No trial is stopped before this step."""
    min_trials: int = Field(3, ge=1)
    """Trials that must have reported before any is stopped."""


class RandomConfig(_Section):
    """Grid and bundle axes are spanned, the others sampled at random."""

    type: Literal["random"]


class OptunaConfig(_Section):
    """Optuna proposes; grid and bundle axes become categories."""

    type: Literal["optuna"]
    sampler: Literal["tpe", "random"] = "tpe"
    """Tree-structured Parzen estimator, or independent random draws."""
    startup_trials: int = Field(10, ge=1)
    """Random trials before TPE begins to model."""


class SweepConfig(_Section):
    """Which settings are explored, how, and how trials are judged."""

    metric: str = "eval/preference_accuracy"
    """Held-out metric that ranks trials and drives early stopping."""
    num_samples: int = Field(1, ge=1)
    """random: repeats of the whole grid, with fresh draws; optuna: trials in all."""
    seed: int = Field(0, ge=0)
    """Seed of the searcher's draws."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials running at once; by default as many as the cluster holds."""
    max_failures: int = Field(2, ge=0)
    """How often a trial whose worker process died is started again from its last checkpoint."""
    scheduler: Annotated[FifoConfig | AshaConfig | MedianConfig, Field(discriminator="type")] = FifoConfig(type="fifo")
    """Early stopping."""
    searcher: Annotated[RandomConfig | OptunaConfig, Field(discriminator="type")] = RandomConfig(type="random")
    """Where proposals come from."""
    space: dict[str, Axis] = Field(default_factory=dict)
    """config path -> axis; a bundle's key is a name of your choice. Empty: one trial."""

    @property
    def mode(self) -> Literal["max", "min"]:
        """Which direction of the metric is better."""
        return METRIC_MODES[self.metric]

    @property
    def num_trials(self) -> int:
        """How many trials the sweep proposes."""
        return self.num_samples * (1 if isinstance(self.searcher, OptunaConfig) else grid_size(self.space))

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
        moved = sorted(swept & _MEANING_MOVED_BY.get(self.metric, frozenset()))
        if moved:
            allowed = [m for m in METRIC_MODES if not swept & _MEANING_MOVED_BY.get(m, frozenset())]
            raise ValueError(
                f"metric {self.metric} changes its meaning with {', '.join(moved)}, which this sweep varies: "
                f"it would rank the setting, not the model; use one of {', '.join(allowed)}"
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


class ExperimentConfig(_Section):
    """One experiment: a single run, or a sweep where `sweep` is given."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the run directory and of the MLflow parent run; the same name continues the same sweep."""
    output_dir: str = "runs"
    """Run directories are made here. On several nodes: a file system that all of them share."""
    model: ModelConfig
    data: DataConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()
    sweep: SweepConfig | None = None

    @model_validator(mode="after")
    def _cross_section_rules(self) -> ExperimentConfig:
        _require_batch_arithmetic(self.train, self.scaling)
        if self.sweep is not None and isinstance(self.sweep.scheduler, AshaConfig | MedianConfig):
            if self.train.eval_every is None:
                raise ValueError(f"scheduler {self.sweep.scheduler.type} decides at evaluations: set train.eval_every")
            if self.train.max_steps is not None and self.sweep.scheduler.grace_steps >= self.train.max_steps:
                raise ValueError(
                    f"scheduler.grace_steps ({self.sweep.scheduler.grace_steps}) must be below "
                    f"train.max_steps ({self.train.max_steps}), or nothing is ever stopped early"
                )
        return self

    @property
    def accumulation_steps(self) -> int:
        """Forward passes per worker and optimizer step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.scaling.num_workers)

    @property
    def run_dir(self) -> Path:
        """Absolute directory of this experiment's results."""
        return Path(self.output_dir).expanduser().absolute() / self.name

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
        raise ConfigError(f"{path}: no such file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: an experiment file is a mapping (name, model, data, ...), got {type(tree).__name__}"
        )
    return parse(tree, overrides, source=str(path))


def parse(tree: dict[str, Any], overrides: list[str] | None = None, source: str = "config") -> ExperimentConfig:
    """Like `load`, from a tree already read.

    Raises:
        ConfigError: with every broken rule, its path and value.
    """
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r}: write key.path=value, e.g. optim.lr=1e-5")
        if key.startswith("sweep.space."):
            raise ConfigError(f"override {override!r}: an axis name holds dots itself; edit sweep.space in the file")
        _set(tree, key, yaml.safe_load(text))
    config = _validated(tree, source)
    return config if config.sweep is None else _with_coerced_space(config, source)


def _validated(tree: dict[str, Any], source: str) -> ExperimentConfig:
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {_describe(item)}" for item in error.errors()]
        raise ConfigError("\n".join([f"{source}: {len(lines)} problem(s)", *lines])) from None


def _describe(item: Any) -> str:
    # Union tags ("asha", "loguniform") appear in pydantic's location but not in the file.
    location = [str(part) for part in item["loc"]]
    where = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}" if known else ""
        return f"{where}: unknown key; {hint}".rstrip("; ")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] in ("missing", "value_error"):
        return f"{where}: {message}" if where else message
    return f"{where}: {message} (got {item['input']!r})"


def _fields_at(location: list[str]) -> list[str]:
    section: type[BaseModel] = ExperimentConfig
    variants = {
        cls.model_fields["type"].annotation.__args__[0]: cls  # type: ignore[union-attr]
        for cls in (
            *(Grid, Choice, Uniform, LogUniform, Bundle),
            *(FifoConfig, AshaConfig, MedianConfig, RandomConfig, OptunaConfig),
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
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {parent} is a value ({child!r}), not a section")
        node = child
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
    for name, axis in sweep.space.items():
        reserved = [p for p in _paths_of(name, axis) if p.split(".")[0] not in sections - {"sweep", "tracking"}]
        if reserved:
            problems.append(
                f"sweep.space.{name}: axis {reserved[0]!r} must be a setting in "
                f"{', '.join(sorted(sections - {'sweep', 'tracking'}))}, e.g. optim.lr"
            )
            continue
        values: list[Any] = []
        for candidate in axis.candidates():
            try:
                trial = config.trial({**_any_bundle(config, name), name: candidate})
            except ConfigError as error:
                lines = str(error).splitlines()[1:] or [str(error)]
                problems.extend(f"sweep.space.{name}: candidate {candidate!r}: {line.strip()}" for line in lines)
                continue
            values.append(candidate if isinstance(axis, Bundle) else _get(trial, name))
        coerced[name] = _rebuilt(axis, values) if len(values) == len(axis.candidates()) else axis
    if not problems:
        problems += _problems_in_combinations(
            config.model_copy(update={"sweep": sweep.model_copy(update={"space": coerced})})
        )
    if problems:
        raise ConfigError("\n".join([f"{source}: {len(problems)} problem(s)", *(f"  {p}" for p in problems)]))
    return config.model_copy(update={"sweep": sweep.model_copy(update={"space": coerced})})


def _paths_of(name: str, axis: Axis) -> list[str]:
    return sorted({p for s in axis.values.values() for p in s}) if isinstance(axis, Bundle) else [name]


def _any_bundle(config: ExperimentConfig, axis_name: str) -> dict[str, Any]:
    """The first bundle, where the base file alone need not be a possible trial."""
    assert config.sweep is not None
    bundle = config.sweep.bundle_axis
    if bundle is None or bundle == axis_name:
        return {}
    return {bundle: config.sweep.space[bundle].candidates()[0]}


def _rebuilt(axis: Axis, values: list[Any]) -> Axis:
    match axis:
        case Grid() | Choice():
            return axis.model_copy(update={"values": tuple(values)})
        case Uniform() | LogUniform():
            return axis.model_copy(update={"low": values[0], "high": values[1]})
        case Bundle():
            return axis


def _problems_in_combinations(config: ExperimentConfig) -> list[str]:
    """Rules that only a combination breaks, e.g. batch arithmetic between a bundle and an axis."""
    assert config.sweep is not None
    problems: dict[str, None] = {}
    names = list(config.sweep.space)
    corners = itertools.product(*(axis.candidates() for axis in config.sweep.space.values()))
    for corner in itertools.islice(corners, 10_000):
        params = dict(zip(names, corner, strict=True))
        try:
            config.trial(params)
        except ConfigError as error:
            for line in str(error).splitlines()[1:]:
                problems.setdefault(f"sweep.space: {params}: {line.strip()}")
    return list(problems)


def _absolute_if_local(path: str) -> str:
    """Ray starts its processes in other directories, where a relative path names something else."""
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path


def _needs_bundle(path: str) -> bool:
    return path in {"model.path", "model.gguf_file", "model.revision"} or path.startswith("scaling.")


def _require_batch_arithmetic(train: TrainConfig, scaling: ScalingConfig) -> None:
    per_pass = train.micro_batch_size * scaling.num_workers
    if train.global_batch_size % per_pass:
        raise ValueError(
            f"micro_batch_size ({train.micro_batch_size}) × num_workers ({scaling.num_workers}) must divide "
            f"global_batch_size ({train.global_batch_size})"
        )
