"""Error messages for experiment files: the path of each broken rule, the rule, and the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from orpo_ray.errors import UserError
from orpo_ray.provenance import without_password

MAX_SHOWN_PROBLEMS = 50
"""Problems listed in one message."""


class ConfigError(UserError, ValueError):
    """The experiment file, an override or a sweep axis breaks rules; the message lists all that were found."""


def problem_list(source: str, count: int, shown: list[str]) -> str:
    """The message about `count` problems of a file, of which `shown` are listed."""
    more = [f"  and {count - len(shown)} more"] if count > len(shown) else []
    return "\n".join([f"{source}: {count} problem(s)", *(f"  {line}" for line in shown), *more])


def describe_error(item: Any, root: type[BaseModel]) -> str:
    """One of pydantic's errors as a line of text; `root` is the model that was validated."""
    # Union tags ("asha", "loguniform") appear in pydantic's location but not in the file.
    location = [str(part) for part in item["loc"]]
    where = ".".join(f"{part:.100}" for part in location)
    if item["type"] == "extra_forbidden":
        known = _fields_at(location[:-1], root)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}" if known else ""
        return f"{where}: unknown key; {hint}".rstrip("; ")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] in ("missing", "value_error"):
        return f"{where}: {message}" if where else message
    given = without_password(repr(item["input"]))
    return f"{where}: {message} (got {given:.200})"


def _fields_at(location: list[str], root: type[BaseModel]) -> list[str]:
    """Names of the fields at a place in the tree."""
    candidates = [root]
    for part in location:
        fields = [section.model_fields[part] for section in candidates if part in section.model_fields]
        tagged = [section for section in candidates if part in _tags(section)]
        if tagged:
            candidates = tagged
        elif fields:
            candidates = list(models_in(fields[0].annotation)) or candidates
    return list(candidates[0].model_fields)


def _tags(section: type[BaseModel]) -> tuple[str, ...]:
    """The values of `type` that name this variant of a union."""
    return get_args(section.model_fields["type"].annotation) if "type" in section.model_fields else ()


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that occur in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from models_in(argument)
