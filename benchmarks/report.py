"""Puts benchmarks/results/*.json into benchmarks/README.md, between its markers, and draws the figures.

    python -m benchmarks.report

What has no results is said to have none.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import memory, memory_model, more_steps, pretraining, search_quality, throughput
from benchmarks.rounds import RESULTS
from orpo_ray.reproduction import page

README = Path(__file__).resolve().parent / "README.md"
_MARKER = re.compile(r"<!-- (?P<name>[a-z-]+) -->\n.*?<!-- /(?P=name) -->", re.DOTALL)
_SIMULATED = ("search-quality",)
"""Parts that no device was measured for."""
_COLOURS = {"ours": "#1b6ca8", "trl": "#c0392b"}


def main(words: list[str] | None = None) -> int:
    """Render; fails on a marker that nothing is known about."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(words)
    text = render(options.readme.read_text(encoding="utf-8"), options.results, options.readme.parent)
    options.readme.write_text(text, encoding="utf-8")
    return 0


def render(text: str, results: Path, folder: Path) -> str:
    """The page with every marked part made anew.

    Args:
        text: Markdown with parts between `<!-- throughput-cpu -->` and `<!-- /throughput-cpu -->`, and so on.
        results: folder of the JSON files, named as the parts.
        folder: of the page; figures are drawn here.

    Raises:
        ValueError: a part of another name.
    """
    makers = {
        "throughput": throughput_part,
        "memory": memory_part,
        "memory-model": memory_model_part,
        "scaling": scaling_part,
        "limit": limit_part,
        "optimizer": optimizer_part,
        "search-quality": search_quality_part,
        "checkpoint": checkpoint_part,
        "sweep-overhead": sweep_overhead_part,
        "sweep-scale": sweep_scale_part,
        "mlflow-delivery": mlflow_delivery_part,
        "pretraining": pretraining_part,
        "more-steps": more_steps_part,
    }

    def made(match: re.Match[str]) -> str:
        name = match["name"]
        what, _, device = name.rpartition("-")
        if name in _SIMULATED:
            what, device = name, ""
        elif what not in makers or device not in ("cpu", "cuda"):
            raise ValueError(f"<!-- {name} -->: a part is one of {', '.join(makers)} with -cpu or -cuda")
        path = results / f"{name}.json"
        if path.is_file():
            body = makers[what](json.loads(path.read_text(encoding="utf-8")), folder, device)
        else:
            option = " --device cuda" if device == "cuda" else ""
            body = f"**Not run yet.** `python -m benchmarks.{what.replace('-', '_')}{option}` runs it."
        return f"<!-- {name} -->\n{body}\n<!-- /{name} -->"

    return _MARKER.sub(made, text)


def throughput_part(sections: dict[str, Any], folder: Path, device: str) -> str:
    """A table per comparison, with the verdicts on its targets."""
    parts = []
    for name, content in sections.items():
        header = ["side", "pairs/s", "peak GiB", "ours is faster by", "ours needs of its memory"]
        rows = [throughput.row(side) for side in content["sides"]]
        lines = [f"**{name}**, {about(content)}, medians of {content['rounds']} rounds (smallest to largest)"]
        lines += ["", *markdown(header, rows), ""]
        for target in content["targets"]:
            verdict = "met" if target["met"] else "missed"
            lines.append(f"Target: {target['what']}. Measured {target['measured']:.2f}: **{verdict}**.\n")
        ended = [f"{s['label']}: {s['status']} ({_first_line(s['error'])})" for s in content["sides"] if "error" in s]
        lines += [f"Did not run: {'; '.join(ended)}."] if ended else []
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts)


def memory_part(sections: dict[str, Any], folder: Path, device: str) -> str:
    """A table per group."""
    parts = []
    for name, content in sections.items():
        header = ["case", "peak GiB", "before the first step", "gradients and Adam", "the rest"]
        rows = [memory.cells(name, entry) for entry in content["rows"]]
        parts.append("\n".join([f"**{name}**, {about(content)}", "", *markdown(header, rows)]))
    return "\n\n".join(parts)


def memory_model_part(sections: dict[str, Any], folder: Path, device: str) -> str:
    """A table per group, with the verdict."""
    parts = []
    for name, content in sections.items():
        rows = [memory_model.cells(entry) for entry in content["rows"]]
        errors = [abs(entry["error"]) for entry in content["rows"] if entry["status"] == "ok"]
        target = content["target"]
        lines = [f"**{name}**, {about(content)}", "", *markdown(list(memory_model.HEADER), rows), ""]
        if errors:
            verdict = "met" if len(errors) == len(rows) and max(errors) <= target else "missed"
            lines.append(f"Target: off by at most {target:.0%}. The largest is {max(errors):.0%}: **{verdict}**.")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def limit_part(sections: dict[str, Any], folder: Path, device: str) -> str:
    """One table of fractions, one of where the time goes."""
    fractions, shares = [], []
    groups = list(dict.fromkeys(g for content in sections.values() for g in content["profile"]["groups"]))
    for name, content in sections.items():
        before, after = content["products_gflops"]["before"], content["products_gflops"]["after"]
        fractions.append(
            (
                name,
                f"{content['achieved_gflops']:.0f}",
                *(f"{(before[k] + after[k]) / 2:.0f}" for k in ("linear layers", "head", "square")),
                f"{content['fraction']:.0%}",
                f"`{content['made']['command']}`",
            )
        )
        shares.append((name, *(f"{content['profile']['groups'].get(group, 0.0):.0%}" for group in groups)))
    header = ["", "achieved GFLOP/s", "linear layers alone", "head alone", "2048³", "fraction", "command"]
    described = "; ".join(dict.fromkeys(hardware(content) for content in sections.values()))
    return "\n".join(
        [
            *(f"{described}.", "", *markdown(header, fractions)),
            *("", "Self time of a profiled step:", "", *markdown(["", *groups], shares)),
        ]
    )


def optimizer_part(sections: dict[str, Any], folder: Path, device: str) -> str:
    """A table of the optimizers."""
    content = sections["adamw"]
    rows = [(r["optimizer"], f"{r['median_seconds']:.3f}", f"{r['largest_difference']:.0e}") for r in content["rows"]]
    header = [f"one update of {content['parameters'] / 1e6:.0f}M parameters", "seconds, median", "largest difference"]
    return "\n".join([f"{about(content)}", "", *markdown(header, rows)])


def checkpoint_part(sections: dict[str, Any], folder: Path, device: str) -> str:
    """A table of the ways to save, for each ZeRO stage."""
    header = ["ZeRO", "way", "blocked, s", "whole cost, s", "committed after, s", "MiB"]
    rows = [
        (
            name.removeprefix("zero-"),
            way,
            *(
                f"{m[key]['median']:.2f} ({m[key]['min']:.2f} to {m[key]['max']:.2f})"
                for key in ("blocked_s", "cost_s")
            ),
            f"{m['committed_s']['median']:.1f}",
            f"{m['bytes'] / 2**20:.0f}",
        )
        for name, content in sections.items()
        for way, m in content["ways"].items()
    ]
    first = next(iter(sections.values()))
    facts = (
        f"{first['parameters'] / 1e6:.0f}M parameters, {first['workers']} ranks, a step takes {first['step_s']:.1f} s"
    )
    return "\n".join([f"{about(first)}. {facts}; medians, least and most.", "", *markdown(header, rows)])


def sweep_overhead_part(sections: dict[str, Any], folder: Path, device: str) -> str:
    """Both sides' time beyond training."""
    lines = []
    for content in sections.values():
        rows = []
        for side, name in (("ours", "warm worker groups"), ("stock", "Tuner over TorchTrainer")):
            values = {key: spread["median"] for key, spread in content["summary"][side].items()}
            once = values.get("useful_share_once_started")
            rows.append(
                (
                    name,
                    f"{values['wall_seconds']:.0f}",
                    f"{values['training_seconds']:.0f}",
                    f"{values['overhead_seconds_per_trial']:.2f}",
                    f"{values['useful_share']:.0%}" + (f"; once started {once:.0%}" if once else ""),
                )
            )
        header = ["", "wall, s", "training, s", "overhead per trial, s", "useful share of worker time"]
        lines += [f"{about(content)}", "", *markdown(header, rows), "", f"Ratio: {content['overhead_ratio']:.3f}."]
    return "\n".join(lines)


def sweep_scale_part(sections: dict[str, Any], folder: Path, device: str) -> str:
    """Tenths of a long sweep, and what a trial costs the head."""
    lines = []
    kinds = ("sweep_gib", "broker_gib", "drivers_gib", "workers_gib")
    for content in sections.values():
        rows = [
            (
                part["trials"],
                f"{part['seconds_per_trial']:.3f}",
                *("-" if part[kind] is None else f"{part[kind]:.2f}" for kind in kinds),
            )
            for part in content["parts"]
        ]
        header = ["trials", "s per trial", *(f"{kind.removesuffix('_gib')}, GiB" for kind in kinds)]
        cpu = ", ".join(f"{kind} {seconds:.3f}" for kind, seconds in content["head_cpu_seconds_per_trial"].items())
        lines += [f"{about(content)}", "", *markdown(header, rows), ""]
        lines += [f"CPU seconds per trial on the head: {cpu}. Journal: {content['journal_bytes_per_trial']:.0f} bytes."]
    return "\n".join(lines)


def mlflow_delivery_part(sections: dict[str, Any], folder: Path, device: str) -> str:
    """Points a second, by store."""
    lines = []
    for content in sections.values():
        rows = [
            (
                row["store"],
                f"{row['points']:,}",
                f"{row['found']:,}",
                f"{row['seconds']:.1f}",
                f"{row['points'] / row['seconds']:,.0f}",
            )
            for row in content["rows"]
        ]
        header = ["store", "points", "found", "seconds", "points a second"]
        lines += [about(content), "", *markdown(header, rows)]
    return "\n".join(lines)


def pretraining_part(sections: dict[str, Any], folder: Path, device: str) -> str:
    """Log-probabilities moved, by what was learned before."""
    contents = sorted(sections.values(), key=lambda content: content["row"]["steps"])
    rows = [pretraining.shown(content["row"]) for content in contents]
    return "\n".join([*sorted({about(content) for content in contents}), "", *markdown(pretraining.HEADER, rows)])


def more_steps_part(sections: dict[str, Any], folder: Path, device: str) -> str:
    """Log-probabilities over the steps, drawn and as a table."""
    lines = []
    for model, content in sections.items():
        found, figure = content["found"], f"more-steps-{model}-{device}.png"
        page.draw_curves(found["curves"], list(found["curves"])).savefig(folder / figure, dpi=130)
        shown = markdown(more_steps.HEADER, more_steps.shown(found))
        lines += [about(content), "", f"![log-probabilities over the steps]({figure})", "", *shown, ""]
    return "\n".join(lines[:-1])


def search_quality_part(sections: dict[str, Any], folder: Path, device: str) -> str:
    """The figure, device-hours to the target per method, and the target's verdicts."""
    name = "search-quality.png"
    search_quality.figure(sections).savefig(folder / name, dpi=150)
    made = list({content["made"]["command"]: about(content) for content in sections.values()}.values())
    lines = [f"![mean regret over device-hours]({name})", "", *(f"{text}." for text in made), ""]
    lines += markdown(search_quality.HEADER, search_quality.rows(sections))
    verdicts = search_quality.verdict_rows(sections)
    if verdicts:
        header = ["ladder's device-hours over those of", *search_quality.PEERS]
        lines += ["", f"Target: at most {search_quality.TARGET_RATIO:g}.", "", *markdown(header, verdicts)]
    return "\n".join(lines)


def scaling_part(sections: dict[str, Any], folder: Path, device: str) -> str:
    """The figure, and how straight its lines are."""
    name = f"scaling-{device}.png"
    figure = scaling_figure(sections)
    figure.savefig(folder / name, dpi=150)
    rows = []
    for content in sections.values():
        rates = [p["gflop"] / p["seconds"] for p in content["sides"]["ours"]]
        misfit = f"{content['line']['worst_relative_misfit']:.0%}" if content["line"] else ""
        rows.append(
            (content["name"], f"{min(rates):.0f} to {max(rates):.0f}", misfit, f"`{content['made']['command']}`")
        )
    header = ["against", "GFLOP/s, over the points", "a straight line is off by at most", "command"]
    described = "; ".join(dict.fromkeys(hardware(content) for content in sections.values()))
    return "\n".join([f"![cost of a step]({name})", "", f"{described}.", "", *markdown(header, rows)])


def scaling_figure(sections: dict[str, Any]) -> Figure:
    """A panel per sweep: seconds per step, with the straight line that fits ours best."""
    figure = Figure(figsize=(3.3 * len(sections), 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, content in zip(figure.subplots(1, len(sections), squeeze=False)[0], sections.values(), strict=True):
        for side, points in content["sides"].items():
            x, seconds = [p["x"] for p in points], [p["seconds"] for p in points]
            low = [p["seconds"] - p["min"] for p in points]
            high = [p["max"] - p["seconds"] for p in points]
            axis.errorbar(x, seconds, [low, high], fmt="o", color=_COLOURS[side], markersize=4, capsize=3, label=side)
        if content["line"]:
            ends = [min(x), max(x)]
            fixed, slope = content["line"]["fixed_seconds"], content["line"]["seconds_per_x"]
            axis.plot(ends, [fixed + slope * end for end in ends], color=_COLOURS["ours"], linewidth=1, alpha=0.6)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.set_xlabel(f"{content['name']}\n({content['unit']})", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="0.9", linewidth=0.8)
        axis.tick_params(labelsize=8)
        if len(content["sides"]) > 1:
            axis.legend(frameon=False, fontsize=9)
    figure.axes[0].set_ylabel("seconds per step", fontsize=9)
    return figure


def about(content: dict[str, Any]) -> str:
    """The command and the machine."""
    return f"`{content['made']['command']}`, {hardware(content)}"


def hardware(content: dict[str, Any]) -> str:
    """Machine, versions, commit and day."""
    made = content["made"]
    packages = made["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "trl") if name in packages)
    where = "; ".join([f"{made['cpu']}, {made['cores']} cores, {made['memory_gib']:.0f} GiB", *made["gpus"]])
    changed = " with uncommitted changes" if made["uncommitted_changes"] else ""
    return f"{where}; {versions}; commit {(made['commit'] or 'none')[:10]}{changed}, {made['date'][:10]}"


def markdown(header: list[str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A table's lines."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _first_line(error: str) -> str:
    return error.splitlines()[0][:120]


if __name__ == "__main__":
    sys.exit(main())
