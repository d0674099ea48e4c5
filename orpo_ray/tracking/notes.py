"""Notes that MLflow shows above a run: short Markdown descriptions of a sweep and its trials. Pure functions."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

from orpo_ray.config import METRIC_MODES, ExperimentConfig
from orpo_ray.config.flatten import override_text, train_command
from orpo_ray.config.space import describe
from orpo_ray.formatting import markdown_table, number
from orpo_ray.storage.events import Finished, Status

_BEST_ROWS = 10
_MAX_ROWS = 40
"""Largest number of settings shown for a trial; a bundle may hold any number."""

_MAX_TEXT = 1500
"""Largest number of characters of an error or a command: a note may have 8000 bytes (MLflow refuses longer tags)."""

_STATUS = {
    Status.FINISHED: "finished",
    Status.STOPPED_EARLY: "stopped early",
    Status.DIVERGED: "diverged",
    Status.FAILED: "failed",
    Status.UNFINISHED: "did not finish",
}


def sweep_note(config: ExperimentConfig) -> str:
    """Note of a sweep without results."""
    if config.sweep is None or not config.sweep.space:
        return f"One training run, by orpo-ray.\n\nResults: `{config.run_dir}`"
    axes = ", ".join(f"`{name}`" for name in config.sweep.space)
    metric = config.sweep.metric
    better = "higher" if METRIC_MODES[metric] == "max" else "lower"
    return f"Sweep over {axes}, judged by `{metric}` ({better} is better), by orpo-ray.\n\nResults: `{config.run_dir}`"


def sweep_answer(
    config: ExperimentConfig, results: Mapping[str, Any], links: Mapping[str, str], *, interrupted: bool
) -> str:
    """`sweep_note` with results: the best setting, those tied with it, the cost, and the best ten trials.

    Args:
        config: the experiment.
        results: from `results.summarize`, with `winners` if they are known.
        links: trial id -> address of its run in MLflow.
        interrupted: the sweep was stopped from outside before its end.
    """
    parts: list[str] = []
    metric, best = results["metric"], results["best"]
    if interrupted:
        parts.append("**Interrupted**: the same command continues it.")
    if best is None:
        parts.append("**No trial finished.**")
    else:
        parts.append(_best_sentence(best, results, links))
    counts = Counter(trial["status"] for trial in results["trials"])
    ends = ", ".join(f"{counts[status]} {words}" for status, words in _STATUS.items() if counts[status])
    parts.append(f"{len(results['trials'])} trials: {ends}. Cost: {_cost(config, results)} of training.")
    ranked = sorted(
        (t for t in results["trials"] if Status(t["status"]).ended_well and _has(t, metric)),
        key=lambda t: (t["status"] != Status.FINISHED, t["metrics"][metric] * (-1 if results["mode"] == "max" else 1)),
    )
    if len(ranked) > 1:
        rows = [
            [
                _linked(describe(t["params"]), links.get(t["trial_id"])),
                number(t["metrics"][metric]),
                str(t["steps"]),
                _STATUS[t["status"]],
            ]
            for t in ranked[:_BEST_ROWS]
        ]
        parts.append(markdown_table(["setting", metric, "steps", "status"], rows))
    parts.append(sweep_note(config))  # last: MLflow collapses all but the first lines
    return "\n\n".join(parts)


def trial_note(
    config: ExperimentConfig,
    trial_id: str,
    params: Mapping[str, Any],
    *,
    parent: str,
    command: str | None,
    purpose: str = "search",
    end: Finished | None = None,
) -> str:
    """Note of a trial: its settings, how it ended, where its checkpoint is, how to train it again.

    Args:
        config: the experiment, with its sweep.
        trial_id: of the trial.
        params: axis name -> value.
        parent: address of the sweep's run in MLflow.
        command: from `trial_command`; None if no single command trains the trial again.
        purpose: `search` or `confirm`.
        end: its last event; None while it has not ended.
    """
    kind = "Another seed for a finalist" if purpose == "confirm" else "Trial"
    parts = [f"{kind} of the sweep {_linked(config.name, parent)}, `{trial_id}`: **{describe(dict(params))}**"]
    if end is None:
        parts.append("Not ended yet.")
    else:
        parts += _end(end)
    settings = config.settings(dict(params))
    if settings:
        rows = [[f"`{path}`", f"`{override_text(value)}`"] for path, value in list(settings.items())[:_MAX_ROWS]]
        parts.append(markdown_table(["setting", "value"], rows))
    if command is None:
        parts.append("Its settings changed while it trained (`axes/*`), so no single command trains it again.")
    else:
        parts.append(f"To train it again:\n\n```\n{command[:_MAX_TEXT]}\n```")
    return "\n\n".join(parts)


def trial_command(config: ExperimentConfig, trial_id: str, params: Mapping[str, Any], started_by: str) -> str:
    """The command that trains one trial of a sweep on its own, under a name of its own.

    Args:
        config: the experiment, with its sweep.
        trial_id: of the trial.
        params: axis name -> value.
        started_by: command line of the sweep. If it is neither `orpo-ray sweep` nor `train`, the file is
            `config.yaml`, which is an artifact of the sweep's MLflow run.
    """
    words = shlex.split(started_by)
    file, given = "config.yaml", []
    if len(words) >= 3 and words[1] in ("sweep", "train"):
        arguments = [word for word in words[2:] if not word.startswith("-")]
        files = [word for word in arguments if "=" not in word and not word.isdecimal()]
        if files:
            file, given = files[0], [word for word in arguments if "=" in word]
    settings = config.settings(dict(params))
    kept = [word for word in given if word.partition("=")[0] not in {"name", *settings} and word[:5] != "sweep"]
    return train_command(file, config.name, trial_id, settings, kept)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _best_sentence(best: Mapping[str, Any], results: Mapping[str, Any], links: Mapping[str, str]) -> str:
    metric = results["metric"]
    winners = results.get("winners") or {"settings": [], "best": None}
    row = next((row for row in winners["settings"] if best["trial_id"] in row["trial_ids"]), None)
    name = describe(best["params"]) if row is None else row["name"]
    text = f"**Best: {_linked(name, links.get(best['trial_id']))}**, `{metric}` "
    if row is not None and row["low"] is not None:
        text += f"{number(row['mean'])} (95 %: {number(row['low'])} to {number(row['high'])})"
    else:
        text += number(best["metrics"][metric])
    if best["checkpoint"]:
        text += f", checkpoint `{best['checkpoint']}`"
    tied = [row["name"] for row in winners["settings"] if row["tied"] and best["trial_id"] not in row["trial_ids"]]
    if tied:
        more = f" and {len(tied) - _BEST_ROWS} more" if len(tied) > _BEST_ROWS else ""
        text += f".\n\nThe data cannot tell it from: {'; '.join(tied[:_BEST_ROWS])}{more}"
    return text + "."


def _end(end: Finished) -> list[str]:
    parts = [f"**{_STATUS[end.status].capitalize()}** after {end.steps} steps, {end.train_seconds:.1f} s."]
    if end.reused_from:
        parts = [f"**Not trained**: the result is that of MLflow run `{end.reused_from}`, an earlier sweep's."]
    if end.error:
        parts.append(f"```\n{end.error[:_MAX_TEXT]}\n```")
    if end.metrics:
        rows = [[f"`{name}`", number(value, ".6g")] for name, value in sorted(end.metrics.items())]
        parts.append(markdown_table(["last evaluation", ""], rows[:_MAX_ROWS]))
    if end.checkpoint:
        parts.append(f"Checkpoint: `{end.checkpoint}`")
    return parts


def _cost(config: ExperimentConfig, results: Mapping[str, Any]) -> str:
    """Training time × workers."""
    seconds = sum(
        (trial["train_seconds"] or 0.0) * config.trial(trial["params"]).scaling.num_workers
        for trial in results["trials"]
        if not trial["reused_from"]
    )
    return f"{seconds / 3600:.2f} worker-hours" if seconds >= 360 else f"{seconds:.1f} worker-seconds"


def _has(trial: Mapping[str, Any], metric: str) -> bool:
    return trial["metrics"].get(metric) is not None


def _linked(text: str, address: str | None) -> str:
    return text if address is None else f"[{text}]({address})"
