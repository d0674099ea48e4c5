"""Check every candidate of every axis against the config, so that no trial fails on a proposed value."""

from __future__ import annotations

import itertools
from typing import Any

from pydantic import BaseModel, ValidationError

from orpo_ray.config.experiment import ExperimentConfig
from orpo_ray.config.problems import MAX_SHOWN_PROBLEMS, ConfigError, describe_error, models_in, problem_list
from orpo_ray.config.rules import require_stoppable
from orpo_ray.config.space import Axis, Bundle, Choice, Grid, LogUniform, Uniform
from orpo_ray.config.sweep import SweepConfig

_NO_AXES = frozenset({"checkpoint", "sweep", "tracking"})
"""Sections that do not affect a trial's result, and so cannot be axes."""


def _get(config: BaseModel, dotted: str) -> Any:
    node: Any = config
    for part in dotted.split("."):
        node = getattr(node, part)
    return node


def with_coerced_space(config: ExperimentConfig, source: str) -> ExperimentConfig:
    """The config with every candidate of every axis checked and converted to the type of its field.

    YAML reads `1e-6` as a string: typed fields convert it, but an axis is an untyped list of candidates.

    Args:
        config: an experiment with a sweep.
        source: names the experiment in error messages.

    Raises:
        ConfigError: a candidate, or a combination of candidates, breaks a rule.
    """
    sweep = config.sweep
    assert sweep is not None
    problems: list[str] = []
    coerced: dict[str, Any] = {}
    sections = {name for name, field in ExperimentConfig.model_fields.items() if any(models_in(field.annotation))}
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
                    problems += [
                        f"sweep.space.{name}: {describe_error(item, ExperimentConfig)}" for item in error.errors()
                    ]
    if not problems:
        problems += _problems_in_combinations(
            config.model_copy(update={"sweep": sweep.model_copy(update={"space": coerced})})
        )
    if problems:
        raise ConfigError(problem_list(source, len(problems), problems[:MAX_SHOWN_PROBLEMS]))
    return config.model_copy(update={"sweep": sweep.model_copy(update={"space": coerced})})


def _paths_of(name: str, axis: Axis) -> list[str]:
    return sorted({p for s in axis.values.values() for p in s}) if isinstance(axis, Bundle) else [name]


def _any_bundle(config: ExperimentConfig, axis_name: str) -> dict[str, Any]:
    """The first bundle, for axes that are valid only together with a bundle."""
    assert config.sweep is not None
    bundle = config.sweep.bundle_axis
    if bundle is None or bundle == axis_name:
        return {}
    return {bundle: config.sweep.space[bundle].candidates()[0]}


def _between(axis: Axis) -> tuple[float, ...]:
    """A value inside a continuous axis: an integer setting may accept both ends, and fail on values between them."""
    return (axis.low + (axis.high - axis.low) / 3**0.5,) if isinstance(axis, Uniform | LogUniform) else ()


def _set_twice(sweep: SweepConfig) -> str | None:
    bundled = {path for axis in sweep.space.values() if isinstance(axis, Bundle) for path in _paths_of("", axis)}
    return next((name for name in sweep.space if name in bundled), None)


def _rebuilt(axis: Axis, values: list[Any]) -> Axis:
    """The axis with converted candidates.

    Raises:
        ValidationError: two candidates were converted to the same value.
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
    """Rules that only combinations of candidates break, e.g. batch sizes set by a bundle and an axis.

    The first 10,000 combinations are checked.
    """
    assert config.sweep is not None
    problems: dict[str, None] = {}
    names = list(config.sweep.space)
    corners = itertools.product(*(axis.candidates() for axis in config.sweep.space.values()))
    for corner in itertools.islice(corners, 10_000):
        params = dict(zip(names, corner, strict=True))
        try:
            require_stoppable(config.sweep, config.trial(params).train)
        except ConfigError as error:
            for line in str(error).splitlines()[1:]:
                problems.setdefault(f"sweep.space: {params}: {line.strip()}")
        except ValueError as error:
            problems.setdefault(f"sweep.space: {params}: {error}")
    return list(problems)
