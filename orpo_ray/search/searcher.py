"""The interface of searchers, which propose a sweep's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from orpo_ray.errors import UserError
from orpo_ray.storage.sweep_state import SweepState


class Exhausted(Exception):
    """A searcher will propose nothing more; the message says why."""


class SearcherError(UserError, RuntimeError):
    """The searcher cannot propose with these settings; the message says what to set."""


class Searcher(Protocol):
    """Proposes the settings of the search's trials."""

    def propose(self, index: int, history: SweepState) -> dict[str, Any] | None:
        """Params (axis -> value) of the search's next trial; None: wait for results.

        Args:
            index: its number, from 0; `trial_id_of` converts it to the trial's id.
            history: all trials so far, including those of a warm start.

        Raises:
            Exhausted: nothing is left to propose.
        """


@dataclass(frozen=True, slots=True)
class Size:
    """Model size and worker count of a bundle, for budgets and searches over sizes."""

    parameters: int
    devices: int
    """Number of workers of a trial."""


def trial_id_of(index: int) -> str:
    """Trial id of the search's trial with this number, counted from 0."""
    return f"{index:05d}"
