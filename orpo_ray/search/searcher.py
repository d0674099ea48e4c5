"""What a searcher is: the source of a sweep's proposals."""

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
    """What a searcher is asked."""

    def propose(self, index: int, history: SweepState) -> dict[str, Any] | None:
        """Params of the search's next trial, or None: wait for results.

        Args:
            index: its number, from 0; `history.trial_id_of` makes its id of it.
            history: all trials so far, and those of a warm start.

        Raises:
            Exhausted: there is nothing left to propose.
        """


@dataclass(frozen=True, slots=True)
class Size:
    """A bundle, as a search over sizes needs it."""

    parameters: int
    devices: int
    """Workers of a trial."""


def trial_id_of(index: int) -> str:
    """Id of the search's trial of this number, from 0."""
    return f"{index:05d}"
