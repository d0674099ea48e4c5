"""The base class of an experiment file's sections, and how sections store local paths."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the experiment file: unknown keys, infinities and NaN are refused; values cannot be changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def absolute_if_local(path: str) -> str:
    """The absolute path where one exists, else the text as it is (a hub name or a URI).

    Ray starts its processes in other directories, where a relative path would name something else.

    Raises:
        ValueError: it is too long to be a path, may not be read, or names the home of an unknown user.
    """
    try:
        local = Path(path).expanduser()
        return str(local.absolute()) if local.exists() else path
    except (OSError, RuntimeError) as error:
        raise ValueError(f"neither a path nor a hub name: {error!s:.200}") from None
