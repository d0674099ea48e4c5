"""Does the faults to sweeps, and writes down what was lost: `python -m tests.faults`, into docs/reliability.md.

Results are kept by scenario in benchmarks/results/faults-cpu.json, so that some can be repeated alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.rounds import described, save
from tests.faults.cluster_scenarios import CLUSTER_SCENARIOS
from tests.faults.page import FAULTS, write_page
from tests.faults.scenarios import SCENARIOS, Bench, Outcome


def names() -> list[str]:
    """Of all scenarios, in the order of the table."""
    return [name for name, _ in (*SCENARIOS, *CLUSTER_SCENARIOS)]


def main() -> int:
    """Run what is asked for; returns 1 if something was lost or could not be tried."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", default=[], help="scenarios with one of these in their name"
    )
    parser.add_argument("--outage", type=float, default=60.0, help="seconds that a server is away (60)")
    parser.add_argument("--folder", type=Path, help="keep everything here (default: a temporary folder)")
    parser.add_argument("--page-only", action="store_true", help="only make the page anew from earlier results")
    arguments = parser.parse_args()
    console = Console()
    scenarios = (*SCENARIOS, *CLUSTER_SCENARIOS)
    good = True
    if not arguments.page_only:
        chosen = [s for s in scenarios if not arguments.only or any(word in s[0] for word in arguments.only)]
        made = {"made": described("python -m tests.faults")}
        with tempfile.TemporaryDirectory(prefix="orpo-faults-", ignore_cleanup_errors=True) as temporary:
            bench = Bench(arguments.folder or Path(temporary), arguments.outage)
            for name, run in track(chosen, "faults", console=console):
                result = _try(run, bench)
                good = good and result["good"]
                console.print(f"{name}: {_in_a_word(result)}", markup=False, highlight=False)
                save(FAULTS, name, result | made)
    write_page(names())
    return 0 if good else 1


def _try(run: Callable[[Bench], Outcome], bench: Bench) -> dict[str, Any]:
    began = time.monotonic()
    try:
        outcome = run(bench)
    except PermissionError as error:
        return {"good": False, "not_run": str(error)}
    except AssertionError as error:
        return {"good": False, "error": str(error)[-1500:], "seconds": round(time.monotonic() - began, 1)}
    return {
        "good": outcome.is_good,
        "damage": outcome.damage.as_json(),
        "commands": outcome.commands,
        "notes": outcome.notes,
        "seconds": round(time.monotonic() - began, 1),
    }


def _in_a_word(result: dict[str, Any]) -> str:
    if "damage" not in result:
        return str(result.get("not_run") or result["error"])
    if not result["good"]:
        return f"NOT AS IT SHOULD BE: {result['damage']} {result['notes']}"
    damage = result["damage"]
    again, difference = damage["steps_again"], damage["loss_difference"]
    return f"nothing lost; largest difference {difference:g}, {again} steps trained again"


if __name__ == "__main__":
    raise SystemExit(main())
