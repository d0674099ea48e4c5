"""What a sweep's winners look like on its page: how sure they are, what flatters them, where the limits are."""

from __future__ import annotations

from typing import Any

import pandas as pd

from orpo_ray.formatting import markdown_table, number
from orpo_ray.results.frames import SEED, by_setting, finished_rows, mean_interval, varied_axes

_MAX_WORSE = 12
"""Rows of settings that are told from the best; all that are tied with it are shown."""


def certainty_section(results: dict[str, Any], frame: pd.DataFrame) -> str:
    """The settings that the data cannot tell from the best, and those they can.

    Args:
        results: with `winners`.
        frame: of `frames.load_runs_frame`.
    """
    winners = results["winners"]
    settings, metric = winners["settings"], results["metric"]
    if len(frame) < 2 or not settings:
        return ""
    heading = "## How sure\n\n"
    if winners["no_intervals"] is not None:
        return heading + f"No intervals: {winners['no_intervals']}.\n\n" + _seed_by_seed(results, frame)
    if len(settings) < 2:
        return heading + "Only one setting finished: there is nothing to compare it with."
    tied = [row for row in settings if row["tied"]]
    worse = [row for row in settings if not row["tied"]]
    lost = any(row["lost"] for row in settings)
    titles = ["setting", "seeds", *(["lost"] if lost else []), metric, "95 %", "to the best", "95 %", "tied"]
    rows = [_certainty_row(row, lost) for row in (*tied, *worse[:_MAX_WORSE])]
    text = (
        f"**{len(tied)} of {len(settings)} settings are tied for the best**"
        if len(tied) > 1
        else "**One clear winner**"
    )
    lines = [f"{text}: {_covered(winners)}", markdown_table(titles, rows)]
    if len(worse) > _MAX_WORSE:
        lines.append(f"And {len(worse) - _MAX_WORSE} more, all told from the best.")
    lines.append(
        "Tied: the interval of the difference to the best reaches 0. These intervals hold all at once, whichever "
        "setting the data call the best (multiple comparisons with the best, Hsu 1981, with a paired bootstrap); those "
        "of the means hold each for itself."
        + (" Lost: runs that diverged or failed, of which the mean says nothing." * lost)
    )
    return heading + "\n\n".join(lines)


def _certainty_row(row: dict[str, Any], lost: bool) -> list[str]:
    name = f"**{row['name']}**" if row["tied"] else row["name"]
    mean = [number(row["mean"]), f"{number(row['low'])} to {number(row['high'])}"]
    apart = ["–", "–"]
    if row["difference_low"] != row["difference_high"]:
        ends = [number(row[f"difference_{end}"], "+.4f") for end in ("low", "high")]
        apart = [number(row["difference"], "+.4f"), " to ".join(ends)]
    return [
        name,
        str(row["seeds"]),
        *([str(row["lost"])] if lost else []),
        *mean,
        *apart,
        "yes" if row["tied"] else "no",
    ]


def _covered(winners: dict[str, Any]) -> str:
    """What the intervals are over."""
    pairs = f"{winners['pairs']} held-out pairs"
    if winners["pairs_left_out"]:
        pairs += f" that all trials share (some have {winners['pairs_left_out']} more, not counted here)"
    if winners["covers"] == "pairs and seeds":
        return f"intervals cover the choice of the {pairs} and of the seeds."
    return (
        f"intervals cover the choice of the {pairs} only. Every setting was trained with one seed, so nobody can tell "
        f"how much of a difference is the seed's doing. Before relying on it, train the best few with more seeds, e.g. "
        f"`{SEED}: {{type: grid, values: [1, 2, 3]}}` as an axis."
    )


def _seed_by_seed(results: dict[str, Any], frame: pd.DataFrame) -> str:
    """How far the winner is ahead, in units of what the seed alone does: all that averages can tell."""
    metric = results["metric"]
    finished = finished_rows(frame, metric)
    if SEED not in varied_axes(results):
        return (
            "Every setting was trained with one seed: how much of a difference is the seed's doing is not known either."
        )
    by_seed = {key: group.groupby(SEED)[metric].mean() for key, group in by_setting(results, finished)}
    ranked = sorted(by_seed, key=lambda key: by_seed[key].mean(), reverse=results["mode"] == "max")
    if len(ranked) < 2:
        return "Only one setting finished: there is nothing to compare it with."
    first, second = ranked[:2]
    # The same seed means the same pairs in the same order, so differences are taken seed by seed.
    differences = (by_seed[first] - by_seed[second]).dropna()
    if len(differences) < 2:
        return (
            f"{first} has the best mean, {second} the next, but they share fewer than two finished seeds: how much "
            "of their difference is the seed's doing is not known."
        )
    mean, half = mean_interval(differences.tolist())
    assert half is not None
    verdict = "more than the seed explains" if abs(mean) > half else "no more than the seed may explain"
    return (
        f"Best mean: **{first}**, next: {second}. Their difference in `{metric}`, seed by seed, is {mean:+.4f} ± "
        f"{half:.4f} (95 % t-interval over {len(differences)} seeds): {verdict}."
    )


def bias_section(winners: dict[str, Any]) -> str:
    """The warning that what chose the winner also scores it."""
    bias = winners["selection_bias"]
    return "" if bias["candidates"] < 2 else f"**Selection bias.** {bias['sentence']}"


def pareto_section(pareto: dict[str, Any]) -> str:
    """What likelihood costs accuracy, where more than one setting may be wanted."""
    if len(pareto["settings"]) < 2:
        return ""
    front = [row for row in pareto["settings"] if row["on_front"]]
    known = any(row["frequency"] is not None for row in front)
    rows = [
        [
            f"{place}. {row['name']}",
            number(row["cost"]),
            number(row["accuracy"]),
            *([f"{row['frequency']:.0%}" + (", uncertain" if row["uncertain"] else "")] if known else []),
        ]
        for place, row in enumerate(front, start=1)
    ]
    text = (
        f"{len(front)} of {len(pareto['settings'])} settings are not beaten in both `{pareto['cost']}` (lower is "
        f"better) and `{pareto['gain']}` (higher is better)."
    )
    if pareto["cost"] != "eval/nll":
        text += (
            " `eval/nll` counts other tokens in some trials than in others (tokenizer, scope), so it is not compared."
        )
    if known:
        text += " On the front: in how many of the bootstrap's resamples; under 95 % is uncertain."
        if near := [row["name"] for row in pareto["settings"] if not row["on_front"] and row["frequency"] >= 0.05]:
            text += f" {len(near)} more {'is' if len(near) == 1 else 'are'} on it in 5 % of the resamples or more."
    titles = ["setting", pareto["cost"], pareto["gain"], *(["on the front"] if known else [])]
    return f"## Likelihood against preference\n\n{text}\n\n" + markdown_table(titles, rows)


def divergence_section(divergence: dict[str, Any]) -> str:
    """Up to which learning rate training held, where any trial diverged."""
    parts = []
    for bundle, boundary in divergence.items():
        if not boundary["diverged"]:
            continue
        title = f"**{bundle}**: " if bundle else ""
        text = f"{title}{boundary['diverged']} diverged, {boundary['held']} held."
        if boundary["no_fit"] is not None:
            text += f" No curve: {boundary['no_fit']}."
        rows = [_boundary_row(row) for row in boundary["rows"]]
        titles = ["λ", "held", "diverged", "largest lr that held", "smallest lr that diverged", "lr of 50 %"]
        parts.append("\n\n".join([text, *([markdown_table(titles, rows)] if rows else [])]))
    if not parts:
        return ""
    return (
        "## Where training diverges\n\nThe lr of 50 % is where a logistic curve over log lr and λ gives divergence an "
        "even chance, if that lies within the learning rates tried.\n\n" + "\n\n".join(parts)
    )


def _boundary_row(row: dict[str, Any]) -> list[str]:
    low, high = row["lambda_low"], row["lambda_high"]
    lam = "–" if low is None else f"{low:g}" if low == high else f"{low:.3g} to {high:.3g}"
    lrs = [number(row[key], ".1e") for key in ("largest_lr_held", "smallest_lr_diverged", "lr_50")]
    return [lam, str(row["held"]), str(row["diverged"]), *lrs]
