"""Cost of an optimizer step of ours against prompt share, batch, vocabulary and sequence length.

    python -m benchmarks.scaling                       # all four, about half an hour on 2 cores
    python -m benchmarks.scaling --only batch
    python -m benchmarks.scaling --quick               # tiny: does it run?

Random models of SmolLM2-135M's width with 6 layers, random ids. Writes benchmarks/results/scaling-<device>.json;
`python -m benchmarks.report` draws it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.case import Case, Device, Precision, Side
from benchmarks.flops import pair_flops, shape_of
from benchmarks.rounds import Limits, add_process_arguments, described, require_device, run_rounds, save

BODY = "576:6"
"""Width and layers of the random models."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Cases that differ in one quantity x."""

    name: str
    unit: str
    points: tuple[tuple[float, Case], ...]
    """(x, ours); where peers are measured, they follow from it."""
    peer: Side | None = None
    """A side that is measured at the same points."""


def sweeps(device: Device, threads: int, precision: Precision) -> list[Sweep]:
    """The four of them."""
    base = Case(model=f"random:49152:{BODY}", precision=precision, batch=4, steps=2, threads=threads, device=device)
    length, shares = 512, (0.125, 0.25, 0.5, 0.75, 0.875)

    def of_share(share: float) -> Case:
        prompt = round(share * length)
        return replace(base, data=f"tokens:{prompt}:{length - prompt}:{length - prompt}")

    return [
        Sweep("prompt share", f"of {length} tokens", tuple((s, of_share(s)) for s in shares), peer="trl"),
        Sweep(
            "batch",
            "pairs of 128 + 2 × 64 tokens",
            tuple((b, replace(base, data="tokens:128:64:64", batch=b)) for b in (2, 4, 8, 16, 32, 64)),
        ),
        Sweep(
            "vocabulary",
            "tokens; 4 pairs of 128 + 2 × 64",
            tuple(
                (v, replace(base, model=f"random:{v}:{BODY}", data="tokens:128:64:64"))
                for v in (49_152, 98_304, 131_072, 196_608, 262_144)
            ),
        ),
        Sweep(
            "sequence length",
            "tokens, half of them prompt; 1 pair",
            tuple(
                (t, replace(base, data=f"tokens:{t // 2}:{t // 2}:{t // 2}", batch=1))
                for t in (512, 1024, 2048, 4096, 8192)
            ),
        ),
    ]


def quick(device: Device) -> list[Sweep]:
    """Two points with a tiny model."""
    base = Case(model="random:1024:64:1", precision="fp32", data="tokens:8:8:8", steps=1, threads=1, device=device)
    return [Sweep("batch", "pairs of 8 + 2 × 8 tokens", tuple((b, replace(base, batch=b)) for b in (2, 4)))]


def main(words: list[str] | None = None) -> int:
    """Measure; 1 if a point of ours did not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="sweeps by name, such as 'sequence length'")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="by default fp32 on CPU, bf16 on CUDA")
    parser.add_argument("--rounds", type=int, help="how often each point runs; 3 by default")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    add_process_arguments(parser)
    words = sys.argv[1:] if words is None else words
    options = parser.parse_args(words)
    precision: Precision = options.precision or ("fp32" if options.device == "cpu" else "bf16")
    chosen = quick(options.device) if options.quick else sweeps(options.device, options.threads, precision)
    unknown = set(options.only or ()) - {sweep.name for sweep in chosen}
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: the sweeps are {', '.join(s.name for s in chosen)}")
    require_device(options.device)
    limits = Limits(options.memory_limit_gib, options.timeout_s)
    rounds = options.rounds or (1 if options.quick else 3)
    facts = described(shlex.join(["python", "-m", "benchmarks.scaling", *words]))
    console, all_ran = Console(), True
    for sweep in chosen:
        if options.only and sweep.name not in options.only:
            continue
        content: dict[str, Any] = {}

        def keep(results: list[dict[str, Any]], sweep: Sweep = sweep) -> None:
            nonlocal content
            content = summary(sweep, results) | {"made": facts, "rounds": rounds, "runs": results}
            save(f"scaling-{options.device}", sweep.name, content, options.results)

        run_rounds(processes(sweep), rounds, limits, keep)
        console.print(table(content))
        all_ran = all_ran and len(content["sides"]["ours"]) == len(sweep.points)
    return 0 if all_ran else 1


def processes(sweep: Sweep) -> list[Case]:
    """All cases of a sweep."""
    cases = [case for _, case in sweep.points]
    return cases + [replace(case, side=sweep.peer) for case in cases if sweep.peer]


def summary(sweep: Sweep, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds at each point that ran, and how straight ours is.

    The time of a step is put beside its floating-point operations (`benchmarks.flops`): constant operations per second
    mean that the time is as linear (or, for attention, quadratic) as the work itself.
    """
    sides: dict[str, list[dict[str, Any]]] = {}
    for x, ours in sweep.points:
        for case in (ours, *([replace(ours, side=sweep.peer)] if sweep.peer else [])):
            good = [r for r in results if r["case"] == case.as_json() and r["status"] == "ok"]
            if good:
                seconds = [median(r["seconds"]) for r in good]
                sides.setdefault(case.side, []).append(
                    {
                        "x": x,
                        "seconds": median(seconds),
                        "min": min(seconds),
                        "max": max(seconds),
                        "gib": median(
                            r["peak_gib"] if r["peak_device_gib"] is None else r["peak_device_gib"] for r in good
                        ),
                        "gflop": step_flops(case) / 1e9,
                    }
                )
    points = sides.get("ours", [])
    return {"name": sweep.name, "unit": sweep.unit, "sides": sides, "line": line(points) if len(points) > 2 else None}


def step_flops(case: Case) -> float:
    """Operations that a step of this many equal pairs needs, however a side does them (see `benchmarks.flops`)."""
    lengths = tuple(int(part) for part in case.data.split(":")[1:])
    return case.batch * pair_flops(shape_of(case), *lengths)


def line(points: list[dict[str, Any]]) -> dict[str, float]:
    """Least squares of seconds = fixed + slope · x, each point weighing by its relative error; and the worst misfit."""
    x, seconds = (np.array([point[name] for point in points]) for name in ("x", "seconds"))
    slope, fixed = np.polyfit(x, seconds, 1, w=1 / seconds)
    misfit = np.abs((fixed + slope * x) / seconds - 1).max()
    return {"fixed_seconds": float(fixed), "seconds_per_x": float(slope), "worst_relative_misfit": float(misfit)}


def table(content: dict[str, Any]) -> Table:
    """For the terminal."""
    shown = Table(title=f"{content['name']} ({content['unit']})", title_justify="left")
    for column in ("side", content["name"], "seconds per step", "GFLOP/s", "peak GiB"):
        shown.add_column(column, justify="left" if column == "side" else "right")
    for side, points in content["sides"].items():
        for point in points:
            rate = point["gflop"] / point["seconds"]
            shown.add_row(side, f"{point['x']:g}", f"{point['seconds']:.3f}", f"{rate:.0f}", f"{point['gib']:.2f}")
    if content["line"]:
        shown.caption = "a straight line is off by at most {worst_relative_misfit:.1%}".format(**content["line"])
    return shown


if __name__ == "__main__":
    sys.exit(main())
