"""Peak memory: of each side for one step, and of ours against vocabulary, batch and sequence length.

    python -m benchmarks.memory                       # both parts
    python -m benchmarks.memory --part growth         # ours alone, with random models
    python -m benchmarks.memory --quick               # tiny: does it run?

Writes benchmarks/results/memory-<device>.json; `python -m benchmarks.report` puts it into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.case import Case, Device
from benchmarks.rounds import Limits, add_process_arguments, described, require_device, run_case, save
from benchmarks.throughput import comparisons, quick

BYTES_OF_STATE = 12
"""Per parameter beside its fp32 weight: gradient and Adam's two moments, all fp32."""


def growth(device: Device, threads: int) -> dict[str, list[Case]]:
    """What grows -> cases, all of ours with models of few and narrow layers, so that what grows stands out."""
    base = Case(precision="fp32", batch=8, steps=1, threads=threads, device=device)
    # 8 pairs × (2 × 256 + 128) tokens, of which 5,112 are predicted: full logits would be 0.9, 2.5 and 5 GiB.
    vocabulary = [
        replace(base, model=f"random:{size}:256:2", data="tokens:128:256:256") for size in (49_152, 131_072, 262_144)
    ]
    batch = [replace(base, model="random:49152:256:2", data="tokens:128:256:256", batch=b) for b in (8, 16, 32, 64)]
    length = [
        replace(base, model="random:49152:256:2", data=f"tokens:{t // 2}:{t // 2}:{t // 2}", batch=2)
        for t in (1024, 2048, 4096, 8192)
    ]
    return {"vocabulary": vocabulary, "batch": batch, "sequence length": length}


def quick_growth(device: Device) -> dict[str, list[Case]]:
    """Two small vocabularies."""
    base = Case(precision="fp32", batch=2, steps=1, threads=1, device=device, data="tokens:8:16:16")
    return {"vocabulary": [replace(base, model=f"random:{size}:64:1") for size in (1_024, 4_096)]}


def main(words: list[str] | None = None) -> int:
    """Measure; 1 if a case of ours did not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("sides", "growth"), help="one part; both by default")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="comparisons by name, as in benchmarks.throughput")
    parser.add_argument("--quick", action="store_true", help="tiny models")
    add_process_arguments(parser)
    words = sys.argv[1:] if words is None else words
    options = parser.parse_args(words)
    require_device(options.device)
    limits = Limits(options.memory_limit_gib, options.timeout_s)
    facts = described(shlex.join(["python", "-m", "benchmarks.memory", *words]))
    console, all_ran = Console(), True

    groups: dict[str, list[Case]] = {}
    if options.part != "growth":
        chosen = quick(options.device) if options.quick else comparisons(options.device, options.threads, steps=1)
        unknown = set(options.only or ()) - {comparison.name for comparison in chosen}
        if unknown:
            parser.error(f"--only {', '.join(sorted(unknown))}: no such comparison")
        groups |= {c.name: [c.ours, *c.peers] for c in chosen if not options.only or c.name in options.only}
    if options.part != "sides":
        made = quick_growth(options.device) if options.quick else growth(options.device, options.threads)
        groups |= {f"growth with {name}": cases for name, cases in made.items()}
    for name, cases in groups.items():
        rows: list[dict[str, Any]] = []
        for case in cases:
            rows.append(row(case, run_case(case, limits)))
            save(f"memory-{options.device}", name, {"made": facts, "rows": rows}, options.results)
            all_ran = all_ran and (case.side != "ours" or rows[-1]["status"] == "ok")
        console.print(table(name, rows))
    return 0 if all_ran else 1


def row(case: Case, result: dict[str, Any]) -> dict[str, Any]:
    """What a process says of its memory, in GiB.

    `working_gib` is the peak less what was resident before the first step (interpreter, libraries, weights), less
    gradients and Adam's moments: what the forward and the backward pass need. On a device: less weights as well, since
    its allocator counts nothing else.
    """
    kept: dict[str, Any] = {"label": case.label, "case": case.as_json(), "status": result["status"]}
    if result["status"] != "ok":
        return kept | {"error": result["error"]}
    state = BYTES_OF_STATE * result["parameters"] / 2**30
    device = result["peak_device_gib"]
    if device is None:
        working = result["peak_gib"] - result["resident_gib"][0] - state
    else:
        working = device - state - 4 * result["parameters"] / 2**30
    return kept | {
        "peak_gib": result["peak_gib"],
        "peak_device_gib": device,
        "before_gib": result["resident_gib"][0],
        "state_gib": state,
        "working_gib": working,
        "losses": result["losses"],
    }


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    """For the terminal."""
    shown = Table(title=name, title_justify="left")
    for column in ("case", "peak GiB", "before the first step", "gradients and Adam", "the rest"):
        shown.add_column(column, justify="left" if column == "case" else "right")
    for entry in rows:
        shown.add_row(*cells(name, entry))
    return shown


def cells(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    """One row as text."""
    case = entry["case"]
    what = entry["label"]
    if name.startswith("growth"):
        vocabulary = int(case["model"].split(":")[1])
        prompt, chosen, _ = case["data"].split(":")[1:]
        what = f"vocabulary {vocabulary:,}, {case['batch']} pairs of {prompt} + 2 × {chosen} tokens"
    if entry["status"] != "ok":
        return what, entry["status"], "", "", ""
    peak = entry["peak_gib"] if entry["peak_device_gib"] is None else entry["peak_device_gib"]
    return what, *(f"{value:.2f}" for value in (peak, entry["before_gib"], entry["state_gib"], entry["working_gib"]))


if __name__ == "__main__":
    sys.exit(main())
