"""One hostile input: what it is, how to feed it to the code that reads such a thing, and the outcome."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
"""The repository."""

Feed = Callable[[], object]
Make = Callable[[Path], Feed]


@dataclass(frozen=True)
class Case:
    """One hostile input."""

    kind: str
    what: str
    """As it stands in the table."""
    make: Make
    """Puts the input into an empty folder; what it returns feeds it to the reader."""
    error: str | None
    """Name of the exception; None where the input is accepted, and what is done with it is returned as text."""
    says: str
    """What the message, or that text, must contain; ` … ` stands for anything."""

    @property
    def pattern(self) -> str:
        """`says` as a regular expression."""
        return ".*".join(re.escape(part) for part in self.says.split(" … "))
