"""Device-hours that a search needs to find a good setting of the largest model, on simulated sweeps.

    python -m benchmarks.search_quality                              # 30 seeds, all methods and families
    python -m benchmarks.search_quality --methods ladder --seeds 8 --first-seed 0
    python -m benchmarks.search_quality --quick                      # does it run?

Response surfaces: `benchmarks.surfaces`. Searches: `benchmarks.search_methods`, on 4 simulated devices; all meet the
same surfaces and the same noise. Seeds below 1000 were used while the ladder was built, the figures come from 1000 on.
Writes benchmarks/results/search-quality.json, a section per method; `python -m benchmarks.report` draws it.

The quality of a setting is (its accuracy - that of the median random setting) / (the best there is - that median), all
of the largest size, whole trials, without noise; a sweep's is that of the finished trial with the best measured value.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import RESULTS, described, save
from benchmarks.search_methods import METHODS, Run, simulate
from benchmarks.surfaces import FAMILIES, Surface

TARGET_QUALITY = 0.95
BUDGET_HOURS = 16.0
FIRST_SEED, SEEDS = 1000, 30
CURVE_POINTS = 49
PEERS = ("asha + tpe", "asha + tpe, largest only")
"""What the target is set against: the second is told that the largest size is wanted, as the ladder is."""
TARGET_RATIO = 0.5
_RESAMPLES = 2000
_DRAWN = {
    "random": "#999999",
    "asha + tpe": "#e69f00",
    "tpe, largest only": "#56b4e9",
    "asha + tpe, largest only": "#c0392b",
    "ladder": "#1b6ca8",
}
"""Methods in the figure, and their colours."""


def main(words: list[str] | None = None) -> int:
    """Simulate and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_quality", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--budget-hours", type=float, default=BUDGET_HOURS, help="a whole large trial takes one")
    parser.add_argument("--quick", action="store_true", help="2 seeds, 3 device-hours")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    words = sys.argv[1:] if words is None else words
    options = parser.parse_args(words)
    seeds, budget = (2, 3.0) if options.quick else (options.seeds, options.budget_hours)
    facts = described(shlex.join(["python", "-m", "benchmarks.search_quality", *words]))
    facts["packages"] |= _versions("optuna", "ray", "scipy")
    console = Console()
    contents = {}
    for method in options.methods:
        started = time.monotonic()
        content = measure(method, range(options.first_seed, options.first_seed + seeds), budget)
        content["made"] = facts
        content["seconds"] = time.monotonic() - started
        save("search-quality", method, content, options.results)
        contents[method] = content
        console.print(f"{method}: {content['seconds']:.0f} s")
    console.print(table(contents))
    return 0


def measure(method: str, seeds: Sequence[int], budget_hours: float) -> dict[str, Any]:
    """Simulate a method on every family."""
    families = {}
    for family in FAMILIES:
        runs = [simulate(Surface(family, seed), METHODS[method](seed, budget_hours), budget_hours) for seed in seeds]
        families[family] = summary(runs, budget_hours)
    return {"budget_hours": budget_hours, "seeds": [seeds[0], len(seeds)], "families": families}


def summary(runs: Sequence[Run], budget_hours: float) -> dict[str, Any]:
    """Of one method on one family: when each run reached the target (null: it did not), and the mean regret curve."""
    hours = np.linspace(0.0, budget_hours, CURVE_POINTS)
    regret_SP = 1.0 - np.array([[run.quality_at(h) for h in hours] for run in runs])  # S runs, P points
    rng = np.random.default_rng(0)
    means = regret_SP[rng.integers(len(runs), size=(_RESAMPLES, len(runs)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    reached = [run.reaches(TARGET_QUALITY) for run in runs]
    clock = [next((c for h, c, q in run.incumbents if q >= TARGET_QUALITY), math.inf) for run in runs]
    return {
        "reached_hours": [h if math.isfinite(h) else None for h in reached],
        "reached_clock_hours": [c if math.isfinite(c) else None for c in clock],
        "trials": float(np.mean([run.trials for run in runs])),
        "hours": [round(float(h), 4) for h in hours],
        "regret": {
            name: [round(float(v), 4) for v in values]
            for name, values in (("mean", regret_SP.mean(0)), ("low", low), ("high", high))
        },
    }


def reached(content: dict[str, Any], family: str | None, what: str = "reached_hours") -> np.ndarray:
    """Device-hours of every run until it reached the target, infinite where it did not; all families for None."""
    families = content["families"]
    chosen = families.values() if family is None else [families[family]]
    return np.array([math.inf if h is None else h for entry in chosen for h in entry[what]])


def median_interval(hours: np.ndarray) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval; infinite where more than half of the runs did not get there."""
    rng = np.random.default_rng(0)
    medians = _medians(hours[rng.integers(len(hours), size=(_RESAMPLES, len(hours)))])
    low, high = np.quantile(medians, (0.025, 0.975), method="inverted_cdf")
    return float(_medians(hours[None])[0]), float(low), float(high)


def ratio_interval(ours: np.ndarray, peer: np.ndarray, budget_hours: float) -> tuple[float, float, float]:
    """Median of ours over the peer's, and its 95 % interval, by resampling surfaces (run i of both is the same one).

    A run that did not get there counts as the budget: where that is so of the peer's median the ratio is an upper
    bound. Where ours does not get there it is infinite.
    """
    rng = np.random.default_rng(0)
    index = rng.integers(len(ours), size=(_RESAMPLES, len(ours)))
    ratios = _medians(ours[index]) / np.minimum(_medians(peer[index]), budget_hours)
    low, high = np.quantile(ratios, (0.025, 0.975), method="inverted_cdf")
    return float(_medians(ours[None])[0] / min(_medians(peer[None])[0], budget_hours)), float(low), float(high)


def _medians(hours_RS: np.ndarray) -> np.ndarray:
    """Of each row; the upper of the two middle ones, so that infinities need no mean."""
    ordered = np.sort(hours_RS, axis=1)
    return ordered[:, hours_RS.shape[1] // 2]


def rows(contents: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row per method: median device-hours to the target [interval] and share of the runs that got there."""
    made = []
    for method, content in contents.items():
        cells = [method]
        for family in (*FAMILIES, None):
            hours = reached(content, family)
            middle, low, high = (_hours(h, content["budget_hours"]) for h in median_interval(hours))
            cells.append(f"{middle} [{low}, {high}] {np.isfinite(hours).mean():.0%}")
        clock = median_interval(reached(content, None, "reached_clock_hours"))[0]
        made.append((*cells, "-" if math.isinf(clock) else f"{clock:.1f}"))
    return made


HEADER = ["method", *FAMILIES, "all", "hours on the clock, all"]


def verdicts(contents: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the target, for the ladder against each peer that has run on the same surfaces, on each family and on all."""
    found = []
    ours = contents.get("ladder")
    for peer in PEERS if ours else ():
        theirs = contents.get(peer)
        if theirs is None or any(theirs[key] != ours[key] for key in ("seeds", "budget_hours")):
            continue
        for family in (*FAMILIES, None):
            ratio = ratio_interval(reached(ours, family), reached(theirs, family), ours["budget_hours"])
            bound = math.isinf(median_interval(reached(theirs, family))[0])
            met = ratio[0] <= TARGET_RATIO
            found.append({"peer": peer, "family": family or "all", "ratio": ratio, "is_bound": bound, "met": met})
    return found


def verdict_rows(contents: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row per family, a column per peer."""
    by_family: dict[str, list[str]] = {}
    for verdict in verdicts(contents):
        middle, low, high = (f"{value:.2f}" if math.isfinite(value) else "-" for value in verdict["ratio"])
        text = f"{'≤ ' if verdict['is_bound'] else ''}{middle} [{low}, {high}] {'met' if verdict['met'] else 'missed'}"
        by_family.setdefault(verdict["family"], []).append(text)
    return [(family, *cells) for family, cells in by_family.items()]


def table(contents: dict[str, dict[str, Any]]) -> Table:
    """For the terminal."""
    shown = Table(title=f"device-hours to {TARGET_QUALITY:.0%} quality", title_justify="left")
    for column in HEADER:
        shown.add_column(column)
    for row in rows(contents):
        shown.add_row(*row)
    return shown


def figure(contents: dict[str, dict[str, Any]]) -> Figure:
    """Mean regret over device-hours, a panel per family, with 95 % intervals of the mean."""
    drawn = Figure(figsize=(11, 6.2), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(2, 3, sharex=True, sharey=True).flat
    for axis, family in zip(axes, FAMILIES, strict=True):
        for method, colour in _DRAWN.items():
            if method in contents:
                entry = contents[method]["families"][family]
                regret = entry["regret"]
                axis.plot(entry["hours"], regret["mean"], color=colour, linewidth=1.6, label=method)
                axis.fill_between(entry["hours"], regret["low"], regret["high"], color=colour, alpha=0.15, linewidth=0)
        axis.axhline(1 - TARGET_QUALITY, color="0.4", linewidth=0.8, linestyle=":")
        axis.set_title(family, fontsize=9, loc="left")
        axis.set_ylim(0.02, 1.3)
        axis.set_yscale("log")
        axis.set_yticks([0.05, 0.1, 0.2, 0.5, 1.0], ["0.05", "0.1", "0.2", "0.5", "1"])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="0.9", linewidth=0.8)
        axis.tick_params(labelsize=8)
    for axis in drawn.axes[3:]:
        axis.set_xlabel("device-hours", fontsize=9)
    for axis in (drawn.axes[0], drawn.axes[3]):
        axis.set_ylabel("mean regret, 1 - quality", fontsize=9)
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return drawn


def _hours(hours: float, budget_hours: float) -> str:
    return f"{hours:.1f}" if math.isfinite(hours) else f"> {budget_hours:g}"


def _versions(*names: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
