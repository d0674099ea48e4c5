"""Does ORPO bring rejected answers below where they began (ORPO paper, Figs. 7, 9)? In more steps than `tiny` has.

    python -m benchmarks.more_steps --model FOLDER        # a second call goes on behind the first

`orpo-ray reproduce paper --scale tiny --model FOLDER --data builtin://style-pairs` trains for 30 steps. Here SFT, ORPO
with λ = 1, and that with the probability ratio (Fig. 8) train as they do there, on one pass over more pairs of the same
generator. Writes benchmarks/results/more-steps-cpu.json; `python -m benchmarks.report` puts it into
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.rounds import RESULTS, described, save
from orpo_ray.orchestration import ray_session
from orpo_ray.reproduction import scales
from orpo_ray.reproduction.log_probabilities import SIDES, changes, curves, start
from orpo_ray.reproduction.training import train_lambdas, train_ratio
from orpo_ray.reproduction.workspace import Workspace

NAME = "more-steps-cpu"
_MODELS = {"sft": "SFT", "orpo": "λ = 1", "probability": "probability ratio"}
HEADER = ["step", *(f"{side}, {shown}" for shown in _MODELS.values() for side in ("chosen", "rejected"))]
_COMPARED = {"orpo less sft": ("less SFT's", 1), "probability less odds": ("less the odds ratio's", 2)}
"""Of `log_probabilities.changes`: what it is called here, and under which of the models it stands."""


def main(words: list[str] | None = None) -> int:
    """Train and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.more_steps", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="pretrained chat model: folder or hub name")
    parser.add_argument("--steps", type=int, default=120, help="of training, 8 pairs each (120)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs are kept (runs)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(words)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    console, name = Console(highlight=False), Path(options.model).name
    made = described(f"python -m benchmarks.more_steps --model {name} --steps {options.steps}")
    with ray_session.connected():
        folder = options.runs.absolute() / f"more-steps-{name}-{options.steps}"
        found = trained(options.model, options.steps, folder, console)
    save(NAME, name, {"made": made, "found": found}, options.results)
    for row in shown(found):
        console.print(" | ".join(row))
    return 0


def trained(model: str, steps: int, folder: Path, console: Console) -> dict[str, Any]:
    """Held-out log-probabilities over the steps, and how far they moved. Ray must be initialised."""
    scale = scales.scale("tiny", model, "builtin://style-pairs")
    longer = {"policy": {"max_steps": steps}, "train_pairs": steps * scale.batch}
    workspace = Workspace(folder, replace(scale, **longer, evaluations={"eval_every": 20}))
    workspace.begin()
    train_lambdas(workspace, console, (0.0, scales.MAIN_LAMBDA))
    train_ratio(workspace, console)
    start_N2 = start(workspace, console)
    over_steps, changed = curves(workspace, start_N2), changes(workspace, start_N2)
    return {
        "steps": steps,
        "pairs": len(start_N2),
        "curves": {name: over_steps[name] for name in _MODELS},
        "changes": {name: changed[name] for name in (*_MODELS, *_COMPARED)},
    }


def shown(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Under `HEADER`: a row for every evaluation, one for the change, and those that compare changes pair by pair."""
    both = zip(*(found["curves"][name] for name in _MODELS), strict=True)
    rows = [(f"{p[0]['step']:.0f}", *(f"{each[side]:.3f}" for each in p for side in SIDES)) for p in both]
    moved_by = found["changes"]
    moved = [_interval(moved_by[name][side]) for name in _MODELS for side in SIDES]
    rows.append(("change", *moved))
    for name, (title, at) in _COMPARED.items():
        cells = ["–"] * len(moved)
        cells[2 * at : 2 * at + 2] = (_interval(moved_by[name][side]) for side in SIDES)
        rows.append((title, *cells))
    return rows


def _interval(change: dict[str, float]) -> str:
    return f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"


if __name__ == "__main__":
    sys.exit(main())
