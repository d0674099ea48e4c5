"""Does SFT raise the rejected answers, too (ORPO paper, Fig. 3)? That depends on what the model had learned before.

    python -m benchmarks.pretraining        # a second call goes on behind the first

`orpo-ray reproduce paper --scale tiny` begins from a model that has learned the language of both answers, 240 steps of
it. Here that pretraining is cut shorter, and SFT and ORPO with λ = 1 follow as they do there. Writes
benchmarks/results/pretraining-cpu.json; `python -m benchmarks.report` puts it into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.rounds import RESULTS, described, save
from orpo_ray.orchestration import ray_session
from orpo_ray.reproduction import log_probabilities, scales, training
from orpo_ray.reproduction.workspace import Workspace

STEPS = (15, 30, 60, 120, 240)
"""Of pretraining; the last is the scale's own."""
NAME = "pretraining-cpu"
HEADER = ["pretraining", "rejected before", "chosen, SFT", "rejected, SFT", "chosen, λ = 1", "rejected, λ = 1"]
_LAMBDAS = (0.0, scales.MAIN_LAMBDA)


def main(words: list[str] | None = None) -> int:
    """Train and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretraining", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs are kept (runs)")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="of pretraining")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(words)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    console, made = Console(highlight=False), described("python -m benchmarks.pretraining")
    with ray_session.connected():
        for steps in options.steps:
            section = f"{steps} steps"
            row = changed(steps, options.runs.absolute() / f"pretraining-{steps}", console)
            if known(section, options.results) != row:  # else it was only read again, and made by an earlier commit
                save(NAME, section, {"made": made, "row": row}, options.results)
            console.print(" | ".join(shown(row)))
    return 0


def changed(steps: int, folder: Path, console: Console) -> dict[str, Any]:
    """Held-out log-probabilities before SFT and ORPO, and how far both move them. Ray must be initialised."""
    workspace = Workspace(folder, replace(scales.scale("tiny"), base={"max_steps": steps}))
    workspace.begin()
    training.train_lambdas(workspace, console, _LAMBDAS)
    start_N2 = log_probabilities.start(workspace, console)
    start = log_probabilities.curves(workspace, start_N2)["sft"][0]
    changes = log_probabilities.changes(workspace, start_N2)
    return {"steps": steps, "start": start, "changes": {name: changes[name] for name in ("sft", "orpo")}}


def known(section: str, results: Path) -> dict[str, Any] | None:
    """The row that the results have."""
    path = results / f"{NAME}.json"
    sections = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return dict(sections[section]["row"]) if section in sections else None


def shown(row: dict[str, Any]) -> tuple[str, ...]:
    """Under `HEADER`."""
    moved = [row["changes"][name][side] for name in ("sft", "orpo") for side in log_probabilities.SIDES]
    cells = [f"{m['mean']:+.3f} ({m['low']:+.3f} to {m['high']:+.3f})" for m in moved]
    return (f"{row['steps']} steps", f"{row['start']['rejected_logp']:.3f}", *cells)


if __name__ == "__main__":
    sys.exit(main())
