"""docs/reliability.md is what the results say, and nothing is left out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.__main__ import names
from tests.faults.page import PAGE, faults_part, soak_part, write_page

MADE = {
    "cpu": "a CPU",
    "cores": 2,
    "memory_gib": 24.0,
    "gpus": [],
    "packages": {},
    "commit": "abc",
    "date": "2026-01-01",
}
MADE |= {"uncommitted_changes": False, "command": "python -m tests.faults"}
NOTHING: dict[str, Any] = {
    "trials_lost": 0,
    "points_missing": 0,
    "points_twice": 0,
    "statuses_wrong": 0,
    "loss_difference": 0.0,
    "steps_lost": 0,
    "steps_again": 3,
    "seconds_away": 11.6,
}


def section(**changes: Any) -> dict[str, Any]:
    return {"made": MADE, "good": True, "damage": NOTHING, "commands": 1, "notes": {}} | changes


def test_the_page_is_what_the_results_say(tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    write_page(names(), copy)
    assert copy.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8"), "python -m tests.faults --page-only"


def test_losses_are_told_and_what_was_not_run_too() -> None:
    sections = {
        "good": section(commands=2),
        "bad": section(damage=NOTHING | {"trials_lost": 1, "points_twice": 2}, notes={"went on": False}),
        "refused": section(not_run="needs root") | {"damage": None},
    }
    del sections["refused"]["damage"]
    lines = faults_part(["good", "bad", "refused", "never"], sections).splitlines()
    assert lines[2] == "| good | nothing | 0, 0 | 0 | 3; command given 2 times | 12 s |"
    assert lines[3].startswith("| bad | **1 trials, not true: went on** | 0, 2 |")
    assert lines[4].startswith("| refused | **not shown**: needs root |")
    assert lines[5].startswith("| never | **not run** |")


def test_a_soak_counts_its_faults() -> None:
    result = {"made": MADE, "seconds": 600.0, "faults": {"worker killed": 7, "raylet killed": 2}, "rounds": 2}
    result |= {"trials": 4, "steps": 16, "commands": 5, "hung": 0, "damage": NOTHING, "tables_that_differ": 0}
    text = soak_part({"soak": result})
    assert text.startswith("9 faults in 10 minutes, over 2 sweeps of 4 trials")
    assert "| worker killed | 7 |" in text
    assert soak_part({}).startswith("**Not run yet.**")


def test_a_page_without_the_markers_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="has no part <!-- faults-cpu -->"):
        write_page(["a"], page)
