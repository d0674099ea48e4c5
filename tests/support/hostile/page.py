"""The cases as the table of docs/security.md."""

from __future__ import annotations

import re

from tests.support.hostile import data, experiments, models, stores
from tests.support.hostile.case import ROOT

PAGE = ROOT / "docs" / "security.md"
CASES = [*experiments.CASES, *data.CASES, *models.CASES, *stores.CASES]
"""All of them, in the order of the table."""


def table() -> str:
    """The cases as Markdown, a table for each kind."""
    lines: list[str] = []
    for kind in dict.fromkeys(case.kind for case in CASES):
        lines += ["", f"**{kind}**", "", "| input | outcome |", "|---|---|"]
        for case in (case for case in CASES if case.kind == kind):
            outcome = f"`{case.error}`: {case.says}" if case.error else case.says
            lines.append(f"| {case.what} | {outcome} |".replace("`*", "`\\*"))
    return "\n".join(lines[1:])


def page(text: str) -> str:
    """The page with the table in its place."""
    part = re.compile(r"(<!-- hostile -->\n).*?(<!-- /hostile -->)", re.DOTALL)
    if not part.search(text):
        raise ValueError("the page has no part <!-- hostile -->")
    return part.sub(lambda found: f"{found[1]}{table()}\n{found[2]}", text)
