"""A report's sections in Markdown: the answer, how certain it is, its cost, the trials and how they ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from orpo_ray.config import ExperimentConfig
from orpo_ray.config.space import describe
from orpo_ray.formatting import duration, markdown_table, number, status_text
from orpo_ray.reports.experiment_file import BEST_FILE
from orpo_ray.reports.report_data import ReportData, best_trial, count_statuses, ranked, reason
from orpo_ray.results.frames import SEED, by_setting, finished_rows, mean_interval, varied_axes
from orpo_ray.storage.events import Status

_SUMMARISED = ("eval/preference_accuracy", "eval/nll", "eval/log_odds", "eval/chosen_logp", "eval/rejected_logp")
_MAX_WORSE = 12
"""Settings shown of those that are distinguishable from the best; all settings tied with it are shown."""


@dataclass(frozen=True, slots=True)
class Texts:
    """The sections that the HTML and the Markdown page share, as Markdown; "" for a section that does not apply."""

    unfinished: str
    answer: str
    certainty: str
    bias: str
    expectations: str
    cost: str
    pareto: str
    divergence: str
    seeds: str

    @classmethod
    def of(cls, data: ReportData, config: ExperimentConfig | None) -> Texts:
        """Write all of them; without the config, worker time is left out."""
        results, winners = data.results, data.results["winners"]
        return cls(
            unfinished=unfinished_section(results),
            answer=best_section(results, data.run_dir / BEST_FILE),
            certainty=certainty_section(results, data.frame),
            bias=bias_section(winners),
            expectations=expectations_section(results),
            cost=cost_section(data, config),
            pareto=pareto_section(winners["pareto"]),
            divergence=divergence_section(winners["divergence"]),
            seeds=seeds_section(data),
        )


def certainty_section(results: dict[str, Any], frame: pd.DataFrame) -> str:
    """The settings that are tied with the best, and those that are worse.

    Args:
        results: with `winners`.
        frame: from `frames.load_runs_frame`.
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
        lines.append(f"And {len(worse) - _MAX_WORSE} more, all distinguishable from the best.")
    lines.append(
        "Tied: the interval of the difference to the best includes 0. These intervals hold simultaneously, whichever "
        "setting looks best (multiple comparisons with the best, Hsu 1981, with a paired bootstrap); the intervals of "
        "the means hold one at a time." + (" Lost: runs that diverged or failed; the mean leaves them out." * lost)
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
    """What the intervals cover."""
    pairs = f"{winners['pairs']} held-out pairs"
    if winners["pairs_left_out"]:
        pairs += f" that all trials share (some have {winners['pairs_left_out']} more, not counted here)"
    if winners["covers"] == "pairs and seeds":
        return f"intervals cover the choice of the {pairs} and of the seeds."
    return (
        f"intervals cover the choice of the {pairs} only. Every setting was trained with one seed, so how much of a "
        "difference is due to the seed is unknown. Before relying on it, train the best few with more seeds, e.g. with "
        f"`{SEED}: {{type: grid, values: [1, 2, 3]}}` as an axis."
    )


def _seed_by_seed(results: dict[str, Any], frame: pd.DataFrame) -> str:
    """The winner's lead over the second, compared with the variation between seeds."""
    metric = results["metric"]
    finished = finished_rows(frame, metric)
    if SEED not in varied_axes(results):
        return "Every setting was trained with one seed, so how much of a difference is due to the seed is unknown too."
    by_seed = {key: group.groupby(SEED)[metric].mean() for key, group in by_setting(results, finished)}
    names = sorted(by_seed, key=lambda key: by_seed[key].mean(), reverse=results["mode"] == "max")
    if len(names) < 2:
        return "Only one setting finished: there is nothing to compare it with."
    first, second = names[:2]
    # The same seed means the same pairs in the same order, so differences are taken seed by seed.
    differences = (by_seed[first] - by_seed[second]).dropna()
    if len(differences) < 2:
        return (
            f"{first} has the best mean, {second} the second best, but they share fewer than two finished seeds, so "
            "how much of their difference is due to the seed is unknown."
        )
    mean, half = mean_interval(differences.tolist())
    assert half is not None
    verdict = "more than the seed explains" if abs(mean) > half else "no more than the seed may explain"
    return (
        f"Best mean: **{first}**, second: {second}. Their difference in `{metric}`, seed by seed, is {mean:+.4f} ± "
        f"{half:.4f} (95 % t-interval over {len(differences)} seeds): {verdict}."
    )


def bias_section(winners: dict[str, Any]) -> str:
    """The warning that the winner was chosen by the same score that is reported."""
    bias = winners["selection_bias"]
    return "" if bias["candidates"] < 2 else f"**Selection bias.** {bias['sentence']}"


def pareto_section(pareto: dict[str, Any]) -> str:
    """The trade-off between likelihood and preference accuracy, as the settings on the Pareto front."""
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
        text += " `eval/nll` counts different tokens in some trials (tokenizer, scope), so it is not compared."
    if known:
        text += " On the front: share of the bootstrap's resamples; under 95 % is uncertain."
        if near := [row["name"] for row in pareto["settings"] if not row["on_front"] and row["frequency"] >= 0.05]:
            text += f" {len(near)} more {'is' if len(near) == 1 else 'are'} on it in 5 % of the resamples or more."
    titles = ["setting", pareto["cost"], pareto["gain"], *(["on the front"] if known else [])]
    return f"## Likelihood against preference\n\n{text}\n\n" + markdown_table(titles, rows)


def divergence_section(divergence: dict[str, Any]) -> str:
    """The learning rates up to which training held, for each bundle in which a trial diverged."""
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
        "## Where training diverges\n\nThe lr of 50 % is where a logistic curve over log lr and λ predicts divergence "
        "with a probability of 50 %; shown only within the learning rates tried.\n\n" + "\n\n".join(parts)
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
        f"Not finished: {unfinished} of {submitted} trials submitted so far have not ended. When this page was written "
        "the sweep was running or had been interrupted; the command that started it resumes it."
    )


def best_section(results: dict[str, Any], best_file: Path) -> str:
    best, setting, metric = best_trial(results), results["winners"]["best"], results["metric"]
    if best is None:
        return f"No trial has a value of `{metric}`, so none can be judged."
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
    if best["status"] != Status.FINISHED:
        lines.append("It was stopped early; no trial ran to its end.")
    if best["checkpoint"]:
        which = " of its best run" if setting is not None and setting["seeds"] > 1 else ""
        lines.append(f"Checkpoint{which}: `{best['checkpoint']}`.")
    if best_file.exists():
        lines.append(f"Train it alone:\n\n    orpo-ray train {best_file}")
    elif best["params"]:
        overrides = " ".join(f"{name}={value}" for name, value in best["params"].items() if "." in name)
        bundle = f" and the settings of bundle {best['bundle']}" if best["bundle"] else ""
        lines.append(f"Train it alone: give `orpo-ray train` the overrides `{overrides}`{bundle}.")
    return "\n\n".join(lines)


def expectations_section(results: dict[str, Any]) -> str:
    """What the `ladder` searcher expects of each model size, in its own words."""
    said = [f"- {expected['says']}" for expected in results.get("expectations", [])]
    return "## What to expect of each size\n\n" + "\n".join(said) if said else ""


def trials_section(results: dict[str, Any]) -> str:
    best, columns = best_trial(results), _summarised(results)
    rows = []
    for trial in ranked(results):
        name = describe(trial["params"])
        is_best = best is not None and trial["trial_id"] == best["trial_id"]
        values = [number(trial["metrics"].get(column)) for column in columns]
        rest = [str(trial["steps"]), number(trial["train_seconds"], ".1f"), status_text(trial["status"])]
        rows.append([f"**{name}**" if is_best else name, *values, *rest])
    return "## Trials\n\nMetrics are from the last evaluation.\n\n" + markdown_table(
        ["trial", *columns, "steps", "seconds", "status"], rows
    )


def _summarised(results: dict[str, Any]) -> list[str]:
    """The sweep's metric, then the usual ones that its trials have; a reward model has no log-probabilities."""
    usual = [name for name in _SUMMARISED if any(t["metrics"].get(name) is not None for t in results["trials"])]
    return list(dict.fromkeys([results["metric"], *usual]))


def seeds_section(data: ReportData) -> str:
    """Mean ± half-width over seeds, per setting."""
    results = data.results
    finished = finished_rows(data.frame, results["metric"])
    if SEED not in varied_axes(results) or finished.empty:
        return ""
    evaluations = data.evaluations.sort_values("step").groupby("trial_id")
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
    parts = []
    for status in (Status.STOPPED_EARLY, Status.DIVERGED, Status.FAILED):
        trials = [trial for trial in ranked(results) if trial["status"] == status]
        if trials:
            lines = [f"- {describe(t['params'])}: step {t['steps']}{_colon(reason(t))}" for t in trials]
            parts.append(f"**{status_text(status).capitalize()}** ({len(trials)})\n\n" + "\n".join(lines))
    return "## Trials that did not run to their end\n\n" + "\n\n".join(parts) if parts else ""


def cost_section(data: ReportData, config: ExperimentConfig | None) -> str:
    trials, state = data.results["trials"], data.state
    seconds = {t["trial_id"]: t["train_seconds"] for t in trials if t["train_seconds"] is not None}
    of_workers = ""
    if config is not None:
        workers = {t["trial_id"]: config.trial(t["params"]).scaling.num_workers for t in trials}
        of_workers = f" ({duration(sum(s * workers[t] for t, s in seconds.items()))} of worker time)"
    lines = [
        f"- {len(trials)} {'trial' if len(trials) == 1 else 'trials'}{_colon(count_statuses(trials))}.",
        f"- {duration(sum(seconds.values()))} of training, added up{of_workers}.",
    ]
    if state.began_ms is not None:
        lines.append(f"- {duration((state.last_ms - state.began_ms) / 1000)} from the first event to the last.")
    planned = {t.trial_id: t.max_steps for t in state.trials.values() if t.max_steps is not None}
    saved = sum(
        planned.get(t["trial_id"], t["steps"]) - t["steps"] for t in trials if t["status"] == Status.STOPPED_EARLY
    )
    if saved:
        lines.append(f"- Early stopping saved {saved} of {sum(planned.values())} steps.")
    return "## Cost\n\n" + "\n".join(lines)


def _num_unfinished(results: dict[str, Any]) -> int:
    return sum(trial["status"] == Status.UNFINISHED for trial in results["trials"])


def _mean_cell(values: pd.Series, sign: str = "") -> str:
    known = values.dropna().tolist()
    if not known:
        return "–"
    mean, half = mean_interval(known)
    return f"{mean:{sign}.4f}" + (f" ± {half:.4f}" if half is not None else "")


def _colon(text: str) -> str:
    return f": {text}" if text else ""
