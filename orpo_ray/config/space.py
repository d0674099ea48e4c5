"""The axes of a sweep, and the grid cells or Optuna distributions that they span."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Axis(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Grid(_Axis):
    """Every value is tried. Under a model-based searcher (e.g. Optuna) the values are categories to choose from."""

    type: Literal["grid"]
    values: tuple[Any, ...] = Field(min_length=1)
    """Candidates; each is converted by the config, so `1e-6` (a string in YAML) becomes a number."""

    @model_validator(mode="after")
    def _distinct(self) -> Grid:
        _require_distinct(self.values)
        return self

    def candidates(self) -> tuple[Any, ...]:
        """All values: each is checked against the config before anything starts."""
        return self.values


class Choice(_Axis):
    """One of the values, drawn at random for every trial."""

    type: Literal["choice"]
    values: tuple[Any, ...] = Field(min_length=1)
    """Candidates, each equally likely."""

    @model_validator(mode="after")
    def _distinct(self) -> Choice:
        _require_distinct(self.values)
        return self

    def candidates(self) -> tuple[Any, ...]:
        """All values."""
        return self.values


class Uniform(_Axis):
    """A real number drawn uniformly from [low, high]."""

    type: Literal["uniform"]
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        _require_ordered(self.low, self.high)
        return self

    def candidates(self) -> tuple[float, ...]:
        """The two ends: a config that accepts both accepts the values between them."""
        return (self.low, self.high)


class LogUniform(_Axis):
    """A positive real number whose logarithm is drawn uniformly from [log low, log high]."""

    type: Literal["loguniform"]
    low: float = Field(gt=0)
    """Lower end of the interval."""
    high: float = Field(gt=0)
    """Upper end of the interval."""

    @model_validator(mode="after")
    def _ordered(self) -> LogUniform:
        _require_ordered(self.low, self.high)
        return self

    def candidates(self) -> tuple[float, ...]:
        """The two ends."""
        return (self.low, self.high)


class Bundle(_Axis):
    """Named groups of settings that change together, e.g. a model size with its workers and its ZeRO stage.

    Every bundle is tried, as in a grid. Each has its own worker groups, as its resources differ.
    """

    type: Literal["bundle"]
    values: dict[str, dict[str, Any]] = Field(min_length=1)
    """Bundles: label -> {config path: value}."""

    @model_validator(mode="after")
    def _no_bundle_is_empty(self) -> Bundle:
        empty = [label for label, settings in self.values.items() if not settings]
        if empty:
            raise ValueError(f"bundle {empty[0]!r} sets nothing; give it at least one `config.path: value`")
        return self

    def candidates(self) -> tuple[str, ...]:
        """The labels."""
        return tuple(self.values)


Axis = Annotated[Grid | Choice | Uniform | LogUniform | Bundle, Field(discriminator="type")]


def grid_size(space: dict[str, Axis]) -> int:
    """Number of cells of the grid that the `grid` and `bundle` axes span; 1 without such axes."""
    return math.prod(len(axis.candidates()) for axis in space.values() if isinstance(axis, Grid | Bundle))


def grid_cells(space: dict[str, Axis]) -> list[dict[str, Any]]:
    """The cells of the grid, axis name -> value, with bundles varying fastest; one empty cell without such axes."""
    grids = {name: axis for name, axis in space.items() if isinstance(axis, Grid | Bundle)}
    names = sorted(grids, key=lambda name: isinstance(grids[name], Bundle))
    products = itertools.product(*(grids[name].candidates() for name in names))
    # Each cell keeps the order of the file.
    return [{name: dict(zip(names, values, strict=True))[name] for name in grids} for values in products]


def plain(params: dict[str, Any]) -> dict[str, Any]:
    """The same values, with numpy scalars as Python numbers."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in params.items()}


def to_optuna(space: dict[str, Axis]) -> dict[str, Any]:
    """The search space as Optuna distributions; grids and bundles become categories.

    Args:
        space: axis name -> axis, with values already converted by the config.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    def convert(axis: Axis) -> Any:
        match axis:
            case Grid() | Bundle() | Choice():
                return CategoricalDistribution(axis.candidates())
            case Uniform():
                return FloatDistribution(axis.low, axis.high)
            case LogUniform():
                return FloatDistribution(axis.low, axis.high, log=True)

    return {name: convert(axis) for name, axis in space.items()}


def _require_distinct(values: tuple[Any, ...]) -> None:
    repeated = [value for index, value in enumerate(values) if value in values[:index]]
    if repeated:
        raise ValueError(f"values must be distinct, but {repeated[0]!r} occurs twice")


def _require_ordered(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low < high must hold, both finite, but got low={low}, high={high}")


def describe(params: dict[str, Any]) -> str:
    """The values of one trial, short enough for a table row: `8m λ=0.1 lr=8.0e-04`."""
    parts = []
    for name, value in params.items():
        if name == "loss.orpo_lambda":
            parts.append(f"λ={value:g}")
        elif isinstance(value, float) and value != 0 and not 0.01 <= abs(value) < 1e4:
            parts.append(f"{name.rsplit('.', 1)[-1]}={value:.1e}")
        elif isinstance(value, float):
            parts.append(f"{name.rsplit('.', 1)[-1]}={value:g}")
        elif "." in name:
            parts.append(f"{name.rsplit('.', 1)[-1]}={value}")
        else:
            parts.insert(0, str(value))  # a bundle's label
    return " ".join(parts) or "single run"
