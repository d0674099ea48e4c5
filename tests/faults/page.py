"""Puts what faults did into docs/reliability.md, between its markers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import hardware, markdown
from benchmarks.rounds import RESULTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
FAULTS, SOAK = "faults-cpu", "soak-cpu"
"""Files of results, and the page's markers."""


def write_page(names: Sequence[str], page: Path = PAGE, results: Path = RESULTS) -> None:
    """Make the marked parts anew.

    Args:
        names: of all scenarios, in the order of the table.
        page: Markdown with parts between `<!-- faults-cpu -->` and `<!-- /faults-cpu -->`, and so on.
        results: folder of the JSON files.
    """
    text = page.read_text(encoding="utf-8")
    for name, body in (
        (FAULTS, faults_part(names, _read(results / f"{FAULTS}.json"))),
        (SOAK, soak_part(_read(results / f"{SOAK}.json"))),
    ):
        part = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not part.search(text):
            raise ValueError(f"{page} has no part <!-- {name} -->")
        text = part.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
    page.write_text(text, encoding="utf-8")


def faults_part(names: Sequence[str], sections: dict[str, Any]) -> str:
    """The table of scenarios; those that were not run are said not to have been."""
    header = ["fault", "lost", "MLflow points missing, twice", "largest difference", "steps trained again", "away"]
    rows = [(name, *_row(sections.get(name))) for name in names]
    made = {hardware(section) for section in sections.values()}
    return "\n".join([*markdown(header, rows), "", *(f"Measured on {where}." for where in sorted(made))])


def _row(section: dict[str, Any] | None) -> tuple[str, ...]:
    if section is None:
        return ("**not run**", *[""] * 4)
    if "damage" not in section:
        reason = section.get("not_run") or str(section["error"]).splitlines()[0]
        return (f"**not shown**: {reason[:160]}", *[""] * 4)
    cost, notes = section["damage"], section["notes"]
    lost = [
        f"{cost[key]} {what}"
        for key, what in (
            ("trials_lost", "trials"),
            ("steps_lost", "steps' losses"),
            ("statuses_wrong", "MLflow statuses"),
        )
        if cost[key]
    ]
    lost += [f"not true: {note}" for note, value in notes.items() if value is False]
    again = "" if section["commands"] == 1 else f"; command given {section['commands']} times"
    away = cost["seconds_away"]
    return (
        f"**{', '.join(lost)}**" if lost else "nothing",
        f"{cost['points_missing']}, {cost['points_twice']}",
        f"{cost['loss_difference']:.0e}" if cost["loss_difference"] else "0",
        f"{cost['steps_again']}{again}",
        "" if away is None else f"{away:.0f} s",
    )


def soak_part(sections: dict[str, Any]) -> str:
    """What the random faults came to."""
    if not sections:
        return "**Not run yet.** `python -m tests.faults.soak` runs it."
    section = sections["soak"]
    kinds = [(kind, str(count)) for kind, count in sorted(section["faults"].items(), key=lambda item: -item[1])]
    total = sum(section["faults"].values())
    cost, plural = section["damage"], "s" if section["rounds"] != 1 else ""
    return "\n".join(
        [
            f"{total} faults in {section['seconds'] / 60:.0f} minutes, over {section['rounds']} sweep{plural} of "
            f"{section['trials']} trials of {section['steps']} steps each; the sweep's command was given "
            f"{section['commands']} times.",
            "",
            *markdown(["fault", "times"], kinds),
            "",
            *markdown(
                ["lost", "count"],
                [
                    ("trials that are not there, there twice, or ended otherwise", str(cost["trials_lost"])),
                    ("steps whose loss is nowhere", str(cost["steps_lost"])),
                    ("MLflow points missing", str(cost["points_missing"])),
                    ("MLflow points there twice", str(cost["points_twice"])),
                    ("MLflow runs with a wrong status", str(cost["statuses_wrong"])),
                    ("largest relative difference of a loss or a final metric", f"{cost['loss_difference']:.1e}"),
                    ("steps trained again (work, not loss)", str(cost["steps_again"])),
                    ("sweeps that neither went on nor ended", str(section["hung"])),
                    ("sweeps whose final table differs from the undisturbed one's", str(section["tables_that_differ"])),
                ],
            ),
            "",
            f"`{section['made']['command']}`, {hardware(section)}",
        ]
    )


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
