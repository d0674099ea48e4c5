"""Pairs per second and peak memory beside TRL, Liger and LLaMA-Factory's loss, whole processes in turn.

    python -m benchmarks.throughput                      # everything; hours on a laptop
    python -m benchmarks.throughput --only hh-8-bf16     # one comparison
    python -m benchmarks.throughput --quick              # a tiny model, once: does it run?

Writes benchmarks/results/throughput-<device>.json, one section per comparison; `python -m benchmarks.report` puts it
into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.case import SIDES, Case, Device, Precision, Side
from benchmarks.rounds import (
    Limits,
    add_process_arguments,
    described,
    ratios,
    require_device,
    run_rounds,
    save,
    summarise,
)

CPU_TOKENS = 1024
"""Ours, tokens per pass on a CPU: about as fast as any more, in less memory (experiments/hh_smollm2.yaml)."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours, and the peers that do the same work."""

    name: str
    ours: Case
    peers: tuple[Case, ...]
    target_speed: float | None = None
    """Ours should train at least this many times the pairs per second of TRL's fastest form."""
    target_memory: float | None = None
    """Ours should need at most this share of that form's peak memory."""


def comparisons(device: Device, threads: int, steps: int | None) -> list[Comparison]:
    """What is compared, from the cheapest on.

    A peer takes 8 pairs per forward pass, and 4, which is what fits where responses are long or precision is fp32;
    LLaMA-Factory's loss, which makes as large logits as TRL's, only 4.
    """
    precisions: tuple[Precision, ...] = ("bf16", "fp32")
    sides: tuple[tuple[Side, tuple[bool, ...], tuple[int, ...]], ...] = (
        ("trl", (False, True), (8, 4)),
        ("liger", (False,), (8, 4)),
        ("llamafactory", (False,), (4,)),
    )
    made = []
    for data, batch, timed, speed, memory in (
        ("hh", 8, 3, 5.0, 0.25),
        ("long", 8, 2, 3.0, None),
        ("hh", 32, 2, 5.0, 0.25),
    ):
        for precision in precisions:
            base = Case(
                data=data, batch=batch, precision=precision, steps=steps or timed, threads=threads, device=device
            )
            ours = replace(base, max_tokens_per_micro_batch=CPU_TOKENS if device == "cpu" else None)
            peers = [replace(ours, checkpointing=True)] + [
                replace(base, side=side, micro_batch=cut, checkpointing=recompute)
                for side, recomputes, cuts in sides
                for recompute in recomputes
                for cut in cuts
            ]
            target_memory = memory if precision == "bf16" else None
            made.append(Comparison(f"{data}-{batch}-{precision}", ours, tuple(peers), speed, target_memory))
    return made


def quick(device: Device) -> list[Comparison]:
    """A tiny model on the built-in pairs: shows that the machinery works, measures nothing."""
    base = Case(
        model="tiny-llama-1m",
        data="builtin://style-pairs",
        precision="fp32",
        batch=4,
        steps=1,
        threads=1,
        device=device,
    )
    peers = tuple(replace(base, side=side, micro_batch=2) for side in SIDES if side != "ours")
    return [Comparison("quick", base, peers)]


def main(words: list[str] | None = None) -> int:
    """Run the comparisons; 1 if ours did not run in one of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="comparisons by name; --list shows them")
    parser.add_argument("--list", action="store_true", help="print the comparisons and their processes, run nothing")
    parser.add_argument("--sides", nargs="+", choices=[s for s in SIDES if s != "ours"], help="peers; all by default")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="peers as --list shows them, e.g. 'trl 2×4'")
    parser.add_argument("--suffix", help="behind the comparison's name: keeps the result beside an earlier one")
    parser.add_argument("--rounds", type=int, help="how often each process runs; 5 by default")
    parser.add_argument("--steps", type=int, help="timed optimizer steps per process; 2 or 3 by default")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    add_process_arguments(parser)
    words = sys.argv[1:] if words is None else words
    options = parser.parse_args(words)
    chosen = quick(options.device) if options.quick else comparisons(options.device, options.threads, options.steps)
    if options.only:
        unknown = set(options.only) - {comparison.name for comparison in chosen}
        if unknown:
            names = ", ".join(comparison.name for comparison in chosen)
            parser.error(f"--only {', '.join(sorted(unknown))}: no such comparison; there are {names}")
        chosen = [comparison for comparison in chosen if comparison.name in options.only]
    if options.sides:
        chosen = [replace(c, peers=tuple(p for p in c.peers if p.side in ("ours", *options.sides))) for c in chosen]
    if options.labels:
        chosen = [replace(c, peers=tuple(p for p in c.peers if p.label in options.labels)) for c in chosen]
    if options.suffix:
        chosen = [replace(c, name=f"{c.name} {options.suffix}") for c in chosen]
    if options.list:
        for comparison in chosen:
            print(comparison.name, "|", ", ".join(case.label for case in (comparison.ours, *comparison.peers)))
        return 0
    require_device(options.device)
    limits = Limits(options.memory_limit_gib, options.timeout_s)
    rounds = options.rounds or (1 if options.quick else 5)
    command = shlex.join(["python", "-m", "benchmarks.throughput", *words])
    console, all_ran = Console(), True
    for comparison in chosen:
        content = measure(comparison, rounds, limits, command, options.results, console)
        console.print(table(comparison.name, content))
        ran = content["sides"][0]["status"] == "ok"
        if not ran:
            console.print(f"ours: {content['sides'][0]['status']}: {content['sides'][0]['error']}", markup=False)
        all_ran = all_ran and ran
    return 0 if all_ran else 1


def measure(
    comparison: Comparison, rounds: int, limits: Limits, command: str, folder: Path, console: Console
) -> dict[str, Any]:
    """Run one comparison; its results so far are in the JSON file after every process."""
    cases = (comparison.ours, *comparison.peers)
    facts = described(command)
    content: dict[str, Any] = {}

    def keep(results: list[dict[str, Any]]) -> None:
        nonlocal content
        newest = results[-1]
        speed = f"{newest['pairs_per_second']:.3f} pairs/s" if newest["status"] == "ok" else newest["status"]
        console.print(f"{comparison.name} round {newest['round']}/{rounds} {newest['label']}: {speed}", highlight=False)
        content = summary(comparison, results) | {
            "made": facts,
            "rounds": rounds,
            "memory_limit_gib": limits.memory_gib,
        }
        save(f"throughput-{comparison.ours.device}", comparison.name, content | {"runs": results}, folder)

    run_rounds(cases, rounds, limits, keep)
    return content


def summary(comparison: Comparison, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Each side over the rounds, ours first; each peer with the ratios; and the verdicts on the targets."""
    seen = [result["case"] for result in results]
    sides = [summarise(results, case) for case in (comparison.ours, *comparison.peers) if case.as_json() in seen]
    for side in sides:
        if side["case"] != comparison.ours.as_json():
            side["ours_over_it"] = ratios(results, comparison.ours, Case(**side["case"]))
    return {"sides": sides, "targets": verdicts(comparison, sides)}


def verdicts(comparison: Comparison, sides: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target against TRL's fastest form that ran: the one its users would choose."""
    trl = [side for side in sides if side["case"]["side"] == "trl" and side.get("ours_over_it")]
    if not trl:
        return []
    fastest = max(trl, key=lambda side: side["pairs_per_second"]["median"])
    speed, memory = (fastest["ours_over_it"][name]["median"] for name in ("speed", "memory"))
    made: list[dict[str, Any]] = []
    if comparison.target_speed is not None:
        made.append(
            {
                "what": f"at least {comparison.target_speed:g} times the pairs per second of {fastest['label']}",
                "measured": speed,
                "met": speed >= comparison.target_speed,
            }
        )
    if comparison.target_memory is not None:
        made.append(
            {
                "what": f"at most {comparison.target_memory:g} of the peak memory of {fastest['label']}",
                "measured": memory,
                "met": memory <= comparison.target_memory,
            }
        )
    return made


def table(name: str, content: dict[str, Any]) -> Table:
    """A comparison for the terminal."""
    shown = Table(title=f"{name}: medians of {content['rounds']} rounds (smallest to largest)", title_justify="left")
    for column in ("side", "pairs/s", "peak GiB", "ours is faster by", "ours needs of its memory"):
        shown.add_column(column, justify="left" if column == "side" else "right")
    for side in content["sides"]:
        shown.add_row(*row(side))
    shown.caption = "\n".join(
        f"{target['what']}: {target['measured']:.2f}, {'met' if target['met'] else 'MISSED'}"
        for target in content["targets"]
    )
    return shown


def row(side: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """One side as text."""
    if "pairs_per_second" not in side:
        return side["label"], side["status"], "", "", ""
    over = side.get("ours_over_it")
    return (
        side["label"] + ("" if side["status"] == "ok" else f" ({side['status']} in a later round)"),
        ranged(side["pairs_per_second"], ".3f"),
        f"{side['peak_gib']['median']:.2f}",
        ranged(over["speed"], ".2f") if over else "",
        f"{over['memory']['median']:.2f}" if over else "",
    )


def ranged(spread: dict[str, float], form: str) -> str:
    """median (min to max)."""
    if spread["n"] == 1:
        return f"{spread['median']:{form}}"
    return f"{spread['median']:{form}} ({spread['min']:{form}} to {spread['max']:{form}})"


if __name__ == "__main__":
    sys.exit(main())
