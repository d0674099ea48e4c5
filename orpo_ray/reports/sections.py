"""What a sweep's winners look like on its page: how sure they are, what flatters them, where the limits are."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from orpo_ray.config import ExperimentConfig
from orpo_ray.config.space import describe
from orpo_ray.formatting import markdown_table, number
from orpo_ray.results.frames import SEED, by_setting, finished_rows, mean_interval, varied_axes
from orpo_ray.storage.sweep_state import SweepState

_STATUS_ORDER = ("finished", "unfinished", "stopped_early", "diverged", "failed")
_SUMMARISED = ("eval/preference_accuracy", "eval/nll", "eval/log_odds", "eval/chosen_logp", "eval/rejected_logp")


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


def unfinished_section(results: dict[str, Any]) -> str:
    submitted, unfinished = len(results["trials"]), _num_unfinished(results)
    if submitted and not unfinished:
        return ""
    return (
        f"Not the end: {unfinished} of {submitted} trials submitted so far have not ended. When this page was written "
        "the sweep was under way, or interrupted; the command that started it continues it."
    )


def best_section(results: dict[str, Any], best_file: Path) -> str:
    best, setting, metric = best_trial(results), results["winners"]["best"], results["metric"]
    if best is None:
        return f"No trial has a value of `{metric}` to be judged by."
    best_of = "Best so far" if _num_unfinished(results) else "Best"
    better = "higher" if results["mode"] == "max" else "lower"
    if setting is None:
        name, value, of = describe(best["params"]), number(best["metrics"][metric]), f"trial {best['trial_id']}"
    else:
        name, value = setting["name"], number(setting["mean"])
        if setting["low"] is not None:
            value += f" [{number(setting['low'])}, {number(setting['high'])}]"
        of = f"mean of {setting['seeds']} seeds" if setting["seeds"] > 1 else f"trial {setting['trial_ids'][0]}"
    name = f"{best_of}: {name}" if best["params"] else "Result"
    lines = [f"**{name}.** `{metric}` = {value} ({better} is better) after {best['steps']} steps, {of}."]
    if best["status"] != "finished":
        lines.append("It was stopped early; no trial ran to its end.")
    if best["checkpoint"]:
        which = " of its best run" if setting is not None and setting["seeds"] > 1 else ""
        lines.append(f"Checkpoint{which}: `{best['checkpoint']}`.")
    if best_file.exists():
        lines.append(f"Train it alone:\n\n    orpo-ray train {best_file}")
    elif best["params"]:
        overrides = " ".join(f"{name}={value}" for name, value in best["params"].items() if "." in name)
        bundle = f" and the settings of bundle {best['bundle']}" if best["bundle"] else ""
        lines.append(f"Train it alone with `{overrides}`{bundle} as overrides of `orpo-ray train`.")
    return "\n\n".join(lines)


def expectations_section(results: dict[str, Any]) -> str:
    """What searcher ladder says of each size, in its own words."""
    said = [f"- {expected['says']}" for expected in results.get("expectations", [])]
    return "## What to expect of each size\n\n" + "\n".join(said) if said else ""


def trials_section(results: dict[str, Any]) -> str:
    best, columns = best_trial(results), _summarised(results)
    rows = []
    for trial in ranked(results):
        name = describe(trial["params"])
        is_best = best is not None and trial["trial_id"] == best["trial_id"]
        values = [number(trial["metrics"].get(column)) for column in columns]
        rest = [str(trial["steps"]), number(trial["train_seconds"], ".1f"), trial["status"].replace("_", " ")]
        rows.append([f"**{name}**" if is_best else name, *values, *rest])
    return "## Trials\n\nMetrics are those of the last evaluation.\n\n" + markdown_table(
        ["trial", *columns, "steps", "seconds", "status"], rows
    )


def _summarised(results: dict[str, Any]) -> list[str]:
    """The sweep's metric, and of the usual ones those that its trials have: a reward model predicts no token."""
    usual = [name for name in _SUMMARISED if any(t["metrics"].get(name) is not None for t in results["trials"])]
    return list(dict.fromkeys([results["metric"], *usual]))


def seeds_section(results: dict[str, Any], frame: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Mean ± half-width over seeds, per setting."""
    metric = results["metric"]
    finished = finished_rows(frame, metric)
    if SEED not in varied_axes(results) or finished.empty:
        return ""
    evaluations = curves.sort_values("step").groupby("trial_id")
    change = evaluations.last() - evaluations.first()
    columns = _summarised(results)
    sides = [side for side in ("eval/chosen_logp", "eval/rejected_logp") if side in change]
    rows = []
    for key, group in by_setting(results, finished):
        cells = [_mean_cell(group[c]) if c in group else "–" for c in columns]
        cells += [_mean_cell(change[side].reindex(group["trial_id"]), sign="+") for side in sides]
        rows.append([key, str(len(group)), *cells])
    titles = ["setting", "seeds", *columns, *(f"change of {side.removeprefix('eval/')}" for side in sides)]
    return (
        "## Over seeds\n\nMean ± half-width of the 95 % t-interval over the seeds that finished; changes are from the "
        "first evaluation to the last.\n\n" + markdown_table(titles, rows)
    )


def ends_section(results: dict[str, Any]) -> str:
    titles = {"stopped_early": "Stopped early", "diverged": "Diverged", "failed": "Failed"}
    parts = []
    for status, title in titles.items():
        trials = [trial for trial in ranked(results) if trial["status"] == status]
        if trials:
            lines = [f"- {describe(t['params'])}: step {t['steps']}{_colon(reason(t))}" for t in trials]
            parts.append(f"**{title}** ({len(trials)})\n\n" + "\n".join(lines))
    return "## Trials that did not run to their end\n\n" + "\n\n".join(parts) if parts else ""


def cost_section(results: dict[str, Any], state: SweepState, config: ExperimentConfig | None) -> str:
    trials = results["trials"]
    counts = Counter(trial["status"] for trial in trials)
    ended = ", ".join(f"{counts[status]} {status.replace('_', ' ')}" for status in _STATUS_ORDER if counts[status])
    seconds = {t["trial_id"]: t["train_seconds"] for t in trials if t["train_seconds"] is not None}
    lines = [
        f"- {len(trials)} {'trial' if len(trials) == 1 else 'trials'}{_colon(ended)}.",
        f"- {_duration(sum(seconds.values()))} of training, added up.",
    ]
    if config is not None:
        workers = {t["trial_id"]: config.trial(t["params"]).scaling.num_workers for t in trials}
        lines[1] = lines[1][:-1] + f" ({_duration(sum(s * workers[t] for t, s in seconds.items()))} of worker time)."
    if state.began_ms is not None:
        lines.append(f"- {_duration((state.last_ms - state.began_ms) / 1000)} from the first event to the last.")
    planned = {t.trial_id: t.max_steps for t in state.trials.values() if t.max_steps is not None}
    saved = sum(planned.get(t["trial_id"], t["steps"]) - t["steps"] for t in trials if t["status"] == "stopped_early")
    if saved:
        lines.append(f"- Early stopping saved {saved} of {sum(planned.values())} steps.")
    return "## Cost\n\n" + "\n".join(lines)


def best_trial(results: dict[str, Any]) -> dict[str, Any] | None:
    """The best setting's best run; where no setting is judged, the best trial there is."""
    if (setting := results.get("winners", {}).get("best")) is None:
        return results["best"]
    best: dict[str, Any] = next(t for t in results["trials"] if t["trial_id"] == setting["trial_id"])
    return best


def ranked(results: dict[str, Any]) -> list[dict[str, Any]]:
    sign = -1.0 if results["mode"] == "max" else 1.0

    def key(trial: dict[str, Any]) -> tuple[int, float]:
        value = trial["metrics"].get(results["metric"])
        return _STATUS_ORDER.index(trial["status"]), math.inf if value is None else sign * value

    return sorted(results["trials"], key=key)


def _num_unfinished(results: dict[str, Any]) -> int:
    return sum(trial["status"] == "unfinished" for trial in results["trials"])


def _mean_cell(values: pd.Series, sign: str = "") -> str:
    known = values.dropna().tolist()
    if not known:
        return "–"
    mean, half = mean_interval(known)
    return f"{mean:{sign}.4f}" + (f" ± {half:.4f}" if half is not None else "")


def reason(trial: dict[str, Any]) -> str:
    """The error in a line: the last of a traceback says most."""
    lines = (trial["error"] or "").strip().splitlines()
    text = lines[-1] if lines and lines[0].startswith("Traceback") else lines[0] if lines else ""
    return text if len(text) <= 160 else text[:157] + "..."


def _colon(text: str) -> str:
    return f": {text}" if text else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
