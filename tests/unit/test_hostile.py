"""Every hostile input has the outcome that the table in docs/security.md says."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.support.hostile.case import Case
from tests.support.hostile.page import CASES, PAGE, page

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("case", CASES, ids=[case.what[:60] for case in CASES])
def test_hostile_input(case: Case, tmp_path: Path) -> None:
    feed = case.make(tmp_path)
    if case.error is None:
        told = str(feed())
    else:
        # Not a subclass, nor what Python raises by itself: those are not meant for users.
        with pytest.raises(Exception, check=lambda error: type(error).__name__ == case.error) as raised:
            feed()
        told = str(raised.value)
        assert type(raised.value).__module__.startswith("orpo_ray.")
    assert re.search(case.pattern, told, re.DOTALL), told[:2000]
    assert len(told) < 10_000, f"a message of {len(told)} characters"
    assert all(character.isprintable() or character == "\n" for character in told), ascii(told[:2000])
    assert not (tmp_path / "ran").exists(), "code of the input was run, or a file written outside"


def test_there_are_cases_of_every_kind() -> None:
    kinds = Counter(case.kind for case in CASES)
    assert len(CASES) >= 34
    assert len({case.what for case in CASES}) == len(CASES)
    assert min(kinds.values()) >= 5
    assert len(kinds) == 4


def test_the_page_has_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "write it anew: python -m tests.support.hostile"
