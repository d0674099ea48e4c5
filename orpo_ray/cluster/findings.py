"""Findings of `orpo-ray doctor`, and their table for the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check on one node."""

    node: str
    """Address and host name; empty for this machine."""
    check: str
    status: Status
    detail: str
    """Observation."""
    advice: str = ""
    """Remedy, for problems and warnings."""

    def __str__(self) -> str:
        return f"{self.detail}; {self.advice}" if self.advice else self.detail


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings; rich prints them as a table of nodes × checks, followed by problems and advice."""

    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether no finding is a problem; warnings are allowed."""
        return all(finding.status != "problem" for finding in self.findings)

    def to_json(self) -> str:
        """`{"ok": bool, "findings": [{"node", "check", "status", "detail", "advice"}]}`."""
        return json.dumps({"ok": self.ok, "findings": [asdict(f) for f in self.findings]}, indent=2)

    def __rich__(self) -> RenderableType:
        nodes = list(dict.fromkeys(f.node for f in self.findings))
        if nodes == [""]:
            return Group(*(_line(f.status, f"{f.check}: {f}") for f in self.findings))
        checks = list(dict.fromkeys(f.check for f in self.findings))
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for title in ("node", *checks):
            table.add_column(title, overflow="fold")
        status = {(f.node, f.check): f.status for f in self.findings}
        for node in nodes:
            table.add_row(Text(node), *(_MARKS.get(status.get((node, check), ""), "") for check in checks))
        alike: dict[tuple[Status, str, str], list[str]] = {}
        for finding in self.findings:
            if finding.status != "ok":
                alike.setdefault((finding.status, finding.check, str(finding)), []).append(finding.node)
        lines = [_line(how, f"{check} on {', '.join(where)}: {text}") for (how, check, text), where in alike.items()]
        return Group(table, *lines)


_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]![/]", "problem": "[red]problem[/]"}
_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def _line(status: Status, text: str) -> Text:
    return Text.assemble((f"{status:<7} ", _COLOURS[status]), text)
