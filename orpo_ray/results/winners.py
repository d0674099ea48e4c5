"""Which settings of a sweep are best, how certain that is, and how much the selection inflates the winner's score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orpo_ray.config.space import describe
from orpo_ray.results.bootstrap import (
    LEVEL,
    Mode,
    compare_with_best,
    optimism,
    pareto_front,
    resample,
    setting_replicates,
)
from orpo_ray.results.divergence import divergence_boundaries
from orpo_ray.results.frames import LAMBDA, LR, setting_key, setting_of
from orpo_ray.results.pair_files import load_pair_scores
from orpo_ray.storage.events import Status
from orpo_ray.storage.pair_scores import PairScores, on_shared_pairs

NLL, NLL_PER_BYTE, ACCURACY = "eval/nll", "eval/nll_per_byte", "eval/preference_accuracy"


def summarize_winners(results: dict[str, Any], run_dir: str | Path) -> dict[str, Any]:
    """The section `winners` of results.json. Missing data never raise; the summary says what is missing.

    Finalists are the settings that were trained again with fresh seeds (`purpose` confirm); without any, all settings
    that finished. A finalist is judged by its fresh seeds alone: its run in the search was picked for its score.

    Args:
        results: from `results.summarize`.
        run_dir: the sweep's run directory; per-pair files are in `trials/<trial id>/`.

    Returns:
        A dict with these keys:

        - `metric`, `mode`, `level`;
        - `pairs`: number of pairs that all trials share; null without intervals;
        - `pairs_left_out`: largest number of a trial's pairs that other trials lack;
        - `covers`: what the intervals cover, `pairs` or `pairs and seeds`; null without intervals;
        - `no_intervals`: why there are none; null where there are;
        - `settings`: the finalists, best first, each with `name`, `params`, `trial_ids`, `seeds`, `lost` (its runs that
          diverged or failed), `mean`, `low`, `high` (95 %), `difference` (to the best), `difference_low`,
          `difference_high` (simultaneous) and `tied`;
        - `best`: the first of these with the `trial_id` and `checkpoint` of its best run, or null;
        - `tied`: names of the tied settings;
        - `selection_bias`: `candidates`, `by_pairs`, `by_seed` (of the winner) and `by_seed_finalists` (their mean), in
          units of the metric, above 0 where the search looked too good, null where unknown; and a `sentence`;
        - `pareto`: `cost` and `gain` (metrics), and `settings` by cost, each with `name`, `params`, `trial_ids`,
          `cost`, `accuracy`, `on_front`, `frequency` (share of resamples in which it is on the front), `uncertain`;
        - `divergence`: from `divergence.divergence_boundaries`.
    """
    metric, mode = results["metric"], results["mode"]
    finished = [t for t in results["trials"] if t["status"] == Status.FINISHED and t["metrics"].get(metric) is not None]
    # A setting proposed twice with the same seed gives the same run, not a further seed.
    finished = list({repr(sorted(t["params"].items())): t for t in reversed(finished)}.values())[::-1]
    searched = [t for t in finished if not _confirms(t)]
    judged = [t for t in finished if _confirms(t)] or searched
    scores, left_out, missing = _load(finished, metric, Path(run_dir))
    summary: dict[str, Any] = {
        "metric": metric,
        "mode": mode,
        "level": LEVEL,
        "pairs": len(next(iter(scores.values())).pair_ids_N) if scores else None,
        "pairs_left_out": left_out,
        "covers": None,
        "no_intervals": missing or (None if finished else "no trial finished"),
    }
    summary["settings"] = _judge(judged, results, scores, summary)
    summary["best"] = _best(summary["settings"], finished, metric, mode)
    summary["tied"] = [row["name"] for row in summary["settings"] if row["tied"]]
    summary["selection_bias"] = _selection_bias(searched, judged, summary, scores)
    summary["pareto"] = _pareto(finished, scores)
    summary["divergence"] = divergence_boundaries(results["trials"])
    return summary


# ---- parts of the summary -----------------------------------------------------------------------------------------


def _judge(
    judged: list[dict[str, Any]], results: dict[str, Any], scores: dict[str, PairScores], summary: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of the finalists, best first."""
    metric, mode = summary["metric"], summary["mode"]
    groups = _by_setting(judged)
    lost = [
        t
        for t in results["trials"]
        if t["status"] in (Status.DIVERGED, Status.FAILED) and judged and _confirms(t) == _confirms(judged[0])
    ]
    rows = [
        {
            "name": describe(setting_of(group[0]["params"])),
            "params": setting_of(group[0]["params"]),
            "trial_ids": [t["trial_id"] for t in group],
            "seeds": len(group),
            "lost": sum(setting_key(t["params"]) == key for t in lost),
            "mean": float(np.mean([t["metrics"][metric] for t in group])),
        }
        | dict.fromkeys(("low", "high", "difference", "difference_low", "difference_high", "tied"))
        for key, group in groups.items()
    ]
    if rows and scores:
        trials = resample([scores[t["trial_id"]] for group in groups.values() for t in group], metric)
        setting_J = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()]).tolist()
        value_S, replicate_BS = setting_replicates(trials, setting_J)
        against = compare_with_best(value_S, replicate_BS, mode)
        low_S, high_S = np.quantile(replicate_BS, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        for s, row in enumerate(rows):
            difference, half = float(against.difference_S[s]), float(against.half_S[s])
            row |= {"mean": float(value_S[s]), "low": float(low_S[s]), "high": float(high_S[s])}
            row |= {"difference": difference, "tied": bool(against.tied_S[s])}
            row |= {"difference_low": difference - half, "difference_high": difference + half}
        summary["covers"] = "pairs and seeds" if len(judged) > len(groups) else "pairs"
    return sorted(rows, key=lambda row: row["mean"], reverse=mode == "max")


def _best(
    settings: list[dict[str, Any]], finished: list[dict[str, Any]], metric: str, mode: Mode
) -> dict[str, Any] | None:
    """The first setting, with the trial id and checkpoint of its best run."""
    if not settings:
        return None
    runs = [t for t in finished if setting_of(t["params"]) == settings[0]["params"]]
    run = (max if mode == "max" else min)(runs, key=lambda t: t["metrics"][metric])
    return settings[0] | {"trial_id": run["trial_id"], "checkpoint": run["checkpoint"]}


def _selection_bias(
    searched: list[dict[str, Any]],
    judged: list[dict[str, Any]],
    summary: dict[str, Any],
    scores: dict[str, PairScores],
) -> dict[str, Any]:
    """How much the selection inflates the winner's score: by its pairs (bootstrap), by its seed (fresh seeds)."""
    metric, mode, best = summary["metric"], summary["mode"], summary["best"]
    groups = _by_setting(searched)
    means = {key: float(np.mean([t["metrics"][metric] for t in group])) for key, group in groups.items()}
    bias: dict[str, Any] = {"candidates": len(groups), "by_pairs": None, "by_seed": None, "by_seed_finalists": None}
    if scores and len(groups) > 1:
        trials = resample([scores[t["trial_id"]] for group in groups.values() for t in group], metric)
        setting_J = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()]).tolist()
        bias["by_pairs"] = optimism(trials, setting_J, mode)
    if judged and _confirms(judged[0]):
        sign = 1 if mode == "max" else -1
        gaps = {
            key: sign * (means[key] - row["mean"])
            for row in summary["settings"]
            if (key := setting_key(row["params"])) in means
        }
        bias["by_seed"] = gaps.get(setting_key(best["params"]))
        bias["by_seed_finalists"] = float(np.mean(list(gaps.values()))) if gaps else None
    return bias | {"sentence": _bias_sentence(bias, summary)}


def _bias_sentence(bias: dict[str, Any], summary: dict[str, Any]) -> str:
    metric, best, by_pairs = summary["metric"], summary["best"], bias["by_pairs"]
    if bias["candidates"] < 2 or best is None:
        return "There was no choice between settings, so selection does not inflate the score."
    if by_pairs is None:
        return (
            f"The winner was chosen from {bias['candidates']} settings by the scores reported here, which flatters it; "
            f"by how much is not known: {summary['no_intervals']}."
        )
    size = (
        f"on these {summary['pairs']} pairs by {_size(by_pairs)} (bootstrap: chosen on a resample, scored on the pairs "
        "left out)"
    )
    if bias["by_seed"] is None:
        expected = best["mean"] - (1 if summary["mode"] == "max" else -1) * max(by_pairs, 0.0)
        return (
            f"The winner was chosen from {bias['candidates']} settings by the score that it is reported with. That "
            f"flatters it {size}: expect a `{metric}` of about {expected:.4f} on fresh pairs. The luck of its "
            f"{'seed' if best['seeds'] == 1 else 'seeds'} is not included."
        )
    return (
        f"The finalists were chosen from {bias['candidates']} settings by their `{metric}` in the search. That "
        f"flatters the best of the search {size}. The luck of the seed adds to that: in the search the winner scored "
        f"{_gap(bias['by_seed'])} than with fresh seeds, the finalists {_gap(bias['by_seed_finalists'])} on average. "
        "Means and intervals are over fresh seeds only, on the same pairs."
    )


def _size(flattery: float) -> str:
    return f"about {flattery:.4f}" if flattery >= 5e-5 else "less than 0.0001"


def _gap(flattery: float) -> str:
    return f"{abs(flattery):.4f} {'better' if flattery >= 0 else 'worse'}"


def _pareto(finished: list[dict[str, Any]], scores: dict[str, PairScores]) -> dict[str, Any]:
    """All settings by NLL and accuracy, each as the mean of its runs, and whether they are on the Pareto front."""
    both = [t for t in finished if all(t["metrics"].get(m) is not None for m in (NLL, ACCURACY))]
    cost = NLL
    if scores and both and not _count_alike([scores[t["trial_id"]] for t in both]):
        cost = NLL_PER_BYTE
    groups = _by_setting(both)
    rows = [
        {
            "name": describe(setting_of(group[0]["params"])),
            "params": setting_of(group[0]["params"]),
            "trial_ids": [t["trial_id"] for t in group],
            "cost": float(np.mean([t["metrics"][cost] for t in group])),
            "accuracy": float(np.mean([t["metrics"][ACCURACY] for t in group])),
            "frequency": None,
        }
        for group in groups.values()
    ]
    front_S = pareto_front(np.array([r["cost"] for r in rows]), np.array([r["accuracy"] for r in rows]))
    often_S: list[float | None] = [None] * len(rows)
    if scores and rows:
        of_trials = [scores[t["trial_id"]] for group in groups.values() for t in group]
        setting_J = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()]).tolist()
        replicates = [setting_replicates(resample(of_trials, m), setting_J)[1] for m in (cost, ACCURACY)]
        often_S = pareto_front(*replicates).mean(0).tolist()
    for row, is_on, often in zip(rows, front_S.tolist(), often_S, strict=True):
        row |= {"on_front": is_on, "frequency": often, "uncertain": None if often is None else is_on and often < LEVEL}
    return {"cost": cost, "gain": ACCURACY, "settings": sorted(rows, key=lambda row: row["cost"])}


def _count_alike(everyone: list[PairScores]) -> bool:
    """Whether `eval/nll` counts the same tokens in all trials; tokenizers and scopes may differ."""
    first = everyone[0]
    return all(
        s.nll_reduction == first.nll_reduction and np.array_equal(s.nll_tokens_N, first.nll_tokens_N) for s in everyone
    )


# ---- pieces -------------------------------------------------------------------------------------------------------


def _load(
    trials: Iterable[dict[str, Any]], metric: str, run_dir: Path
) -> tuple[dict[str, PairScores], int, str | None]:
    """Per-pair scores of all trials on the pairs they share, and the most pairs of a trial that others lack.

    If one trial lacks its file there are no scores, and the third value says why: means over different trials are not
    comparable.
    """
    found: dict[str, PairScores] = {}
    for trial in trials:
        trial_id, logged = trial["trial_id"], {metric: trial["metrics"][metric]}
        folder, is_reused = run_dir / "trials" / trial_id, bool(trial.get("reused_from"))
        scores = load_pair_scores(folder, f"trial {trial_id}", logged, is_reused)
        if isinstance(scores, str):
            return {}, 0, scores
        found[trial_id] = scores
    if not found:
        return {}, 0, None
    shared = dict(zip(found, on_shared_pairs(list(found.values())), strict=True))
    num = len(next(iter(shared.values())).pair_ids_N)
    if num < 2:
        return {}, 0, "fewer than two held-out pairs are common to all finished trials"
    return shared, max(len(scores.pair_ids_N) for scores in found.values()) - num, None


def _by_setting(trials: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        groups.setdefault(setting_key(trial["params"]), []).append(trial)
    return groups


def _confirms(trial: dict[str, Any]) -> bool:
    """Whether it is a finalist with a fresh seed; older results lack `purpose`."""
    return bool(trial.get("purpose") == "confirm")


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best setting of a model size, and the range of the settings tied with it."""

    bundle: str
    parameters: int | None
    name: str
    mean: float
    at: dict[str, float]
    """λ and lr of the best setting, where they are axes."""
    tied: dict[str, tuple[float, float]] | None
    """Lowest and highest value among the tied settings; None where ties are not known."""


def optima(results: dict[str, Any], run_dir: str | Path, parameters: Mapping[str, int]) -> list[Optimum]:
    """The optimum of each model size, judged by its own trials, small to large.

    Args:
        results: from `results.summarize`.
        run_dir: the sweep's run directory.
        parameters: bundle -> number of the model's parameters, as far as known.
    """
    found = []
    for bundle in dict.fromkeys(trial["bundle"] for trial in results["trials"]):
        own = [trial for trial in results["trials"] if trial["bundle"] == bundle]
        winners = summarize_winners(results | {"trials": own}, run_dir)
        if (best := winners["best"]) is None:
            continue
        names = [n for n in (LAMBDA, LR) if n in best["params"]]
        ranges = None
        if winners["no_intervals"] is None:
            values = {n: [float(r["params"][n]) for r in winners["settings"] if r["tied"]] for n in names}
            ranges = {n: (min(v), max(v)) for n, v in values.items()}
        at = {n: float(best["params"][n]) for n in names}
        found.append(Optimum(bundle, parameters.get(bundle), best["name"], best["mean"], at, ranges))
    return sorted(found, key=lambda optimum: optimum.parameters or 0)
