"""What a sweep found: tables, plots and one page, from results.json and the journal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml
from rich.markup import escape
from rich.table import Table
from scipy.special import stdtrit  # type: ignore[import-untyped]

from orpo_ray.config import ExperimentConfig
from orpo_ray.results import EVENTS_FILE, load_results, read_events
from orpo_ray.space import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAMBDA, LR, SEED = "loss.orpo_lambda", "optim.lr", "train.seed"

_NO_HUE = math.nan  # one object: NaN is found in a dict by identity

_STATUS_ORDER = ("finished", "stopped_early", "diverged", "failed")
_SUMMARISED = ("eval/nll", "eval/log_odds", "eval/chosen_logp", "eval/rejected_logp")
_MAX_LEGEND = 8
_MIN_FOR_INTERVAL = 3
"""Over two values the 95 % t-interval is nine times as wide as they are apart: it says nothing and hides the rest."""
_CURVES = {
    "eval/chosen_logp": "log p(chosen)\nnats per token",
    "eval/rejected_logp": "log p(rejected)\nnats per token",
    "eval/log_odds": "log odds ratio\nchosen : rejected",
}


def load_runs_frame(results: dict[str, Any]) -> pd.DataFrame:
    """One row per trial, in the order of submission.

    Args:
        results: from `results.load_results` or `results.summarize`.

    Returns:
        Columns `trial_id`, `bundle`, `status`, `attempts`, `steps`, `train_seconds`, then the axes (`optim.lr`, ...)
        and the metrics of the last evaluation (`eval/nll`, ...); NaN where a trial has none.
    """
    fixed = ["trial_id", "bundle", "status", "attempts", "steps", "train_seconds"]
    rows = [{key: t[key] for key in fixed} | t["params"] | t["metrics"] for t in results["trials"]]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys([*fixed, *(key for row in rows for key in row)])))
    # JSON's null: a column that holds only nulls would otherwise not be numeric.
    return frame.astype({c: float for c in map(str, frame) if "/" in c or c == "train_seconds"})


def results_table(results: dict[str, Any]) -> Table:
    """The trials, best first: those that finished, then those stopped early, diverged and failed."""
    metric, best = results["metric"], results["best"]
    trials = _ranked(results)
    has_reasons = any(trial["error"] for trial in trials)
    table = Table(title=f"{results['name']}: {len(trials)} trials", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("trial", overflow="fold")
    for heading in (metric, "eval/log_odds", "steps", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("status")
    if has_reasons:
        table.add_column("why", overflow="fold")
    for trial in trials:
        is_best = best is not None and trial["trial_id"] == best["trial_id"]
        cells = [
            "★" if is_best else "",
            escape(describe(trial["params"])),
            _number(trial["metrics"].get(metric)),
            _number(trial["metrics"].get("eval/log_odds"), "+.3f"),
            str(trial["steps"]),
            _number(trial["train_seconds"], ".1f"),
            trial["status"].replace("_", " "),
        ]
        style = "bold green" if is_best else {"finished": "", "stopped_early": "dim"}.get(trial["status"], "red")
        table.add_row(*cells, *([escape(_reason(trial))] if has_reasons else []), style=style)
    return table


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95 % t-interval; the half-width is None for a single value."""
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return mean, None
    return mean, float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(n))


def write_report(run_dir: str | Path, config: ExperimentConfig | None = None) -> list[Path]:
    """Write `report.md`, its `plots/*.png` and, given the config, `best.yaml`: the best setting as a single run.

    Args:
        run_dir: holds results.json and events.jsonl.
        config: the experiment. Without it a `best.yaml` written earlier is kept and referred to.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: run_dir holds no results.
    """
    run_dir = Path(run_dir)
    results = load_results(run_dir)
    events = read_events(run_dir / EVENTS_FILE)
    frame, curves = load_runs_frame(results), _evaluations(events)
    plots = _write_plots(run_dir / "plots", results, frame, curves)
    best_file = run_dir / "best.yaml"
    files = [run_dir / "report.md", *(path for path, _ in plots)]
    if config is not None and results["best"] is not None:
        best_file.write_text(_best_yaml(config, results["best"]["params"]), encoding="utf-8")
        files.append(best_file)
    sections = [
        f"# {results['name']}",
        _best_section(results, best_file),
        _certainty_section(results, frame),
        _trials_section(results),
        _seeds_section(results, frame, curves),
        _ends_section(results),
        _plots_section(plots, run_dir),
        _cost_section(results, events, config),
    ]
    files[0].write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return files


# Sections of the page


def _best_section(results: dict[str, Any], best_file: Path) -> str:
    best, metric = results["best"], results["metric"]
    if best is None:
        return f"No trial has a value of `{metric}` to be judged by."
    name = f"Best: {describe(best['params'])}" if best["params"] else "Result"
    better = "higher" if results["mode"] == "max" else "lower"
    lines = [
        f"**{name}.** `{metric}` = {_number(best['metrics'][metric])} ({better} is better) after "
        f"{best['steps']} steps, trial {best['trial_id']}."
    ]
    if best["status"] != "finished":
        lines.append("It was stopped early; no trial ran to its end.")
    if best["checkpoint"]:
        lines.append(f"Checkpoint: `{best['checkpoint']}`.")
    if best_file.exists():
        lines.append(f"Train it alone:\n\n    orpo-ray train {best_file}")
    elif best["params"]:
        overrides = " ".join(f"{name}={value}" for name, value in best["params"].items() if "." in name)
        bundle = f" and the settings of bundle {best['bundle']}" if best["bundle"] else ""
        lines.append(f"Train it alone with `{overrides}`{bundle} as overrides of `orpo-ray train`.")
    return "\n\n".join(lines)


def _certainty_section(results: dict[str, Any], frame: pd.DataFrame) -> str:
    """How far the winner is ahead, in units of what the seed alone does."""
    if len(frame) < 2:
        return ""
    heading = "## How sure\n\n"
    metric = results["metric"]
    finished = frame[(frame["status"] == "finished") & frame[metric].notna()] if metric in frame else frame[:0]
    if SEED not in _varied(results):
        return heading + (
            "Every setting was trained with one seed, so nobody can tell how much of a difference is the seed's doing. "
            f"Before relying on it, train the best few settings with `{SEED}` as an axis, e.g. "
            f"`{SEED}: {{type: grid, values: [1, 2, 3]}}`."
        )
    by_seed = {key: group.groupby(SEED)[metric].mean() for key, group in _settings(results, finished)}
    ranked = sorted(by_seed, key=lambda key: by_seed[key].mean(), reverse=results["mode"] == "max")
    if len(ranked) < 2:
        return heading + "Only one setting finished: there is nothing to compare it with."
    first, second = ranked[:2]
    # The same seed means the same pairs in the same order, so differences are taken seed by seed.
    differences = (by_seed[first] - by_seed[second]).dropna()
    if len(differences) < 2:
        return heading + (
            f"{first} has the best mean, {second} the next, but they share fewer than two finished seeds: how much "
            "of their difference is the seed's doing is not known."
        )
    mean, half = mean_interval(differences.tolist())
    assert half is not None
    verdict = "more than the seed explains" if abs(mean) > half else "no more than the seed may explain"
    return heading + (
        f"Best mean: **{first}**, next: {second}. Their difference in `{metric}`, seed by seed, is {mean:+.4f} ± "
        f"{half:.4f} (95 % t-interval over {len(differences)} seeds): {verdict}. The winner was chosen by the same "
        "numbers, which flatters it."
    )


def _trials_section(results: dict[str, Any]) -> str:
    metric, best = results["metric"], results["best"]
    columns = list(dict.fromkeys([metric, *_SUMMARISED]))
    rows = []
    for trial in _ranked(results):
        name = describe(trial["params"])
        is_best = best is not None and trial["trial_id"] == best["trial_id"]
        values = [_number(trial["metrics"].get(column)) for column in columns]
        rest = [str(trial["steps"]), _number(trial["train_seconds"], ".1f"), trial["status"].replace("_", " ")]
        rows.append([f"**{name}**" if is_best else name, *values, *rest])
    return "## Trials\n\nMetrics are those of the last evaluation.\n\n" + _markdown_table(
        ["trial", *columns, "steps", "seconds", "status"], rows
    )


def _seeds_section(results: dict[str, Any], frame: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Mean ± half-width over seeds, per setting."""
    metric = results["metric"]
    finished = frame[(frame["status"] == "finished") & frame[metric].notna()] if metric in frame else frame[:0]
    if SEED not in _varied(results) or finished.empty:
        return ""
    evaluations = curves.sort_values("step").groupby("trial_id")
    change = evaluations.last() - evaluations.first()
    columns = list(dict.fromkeys([metric, *_SUMMARISED]))
    rows = []
    for key, group in _settings(results, finished):
        cells = [_mean_cell(group[c]) if c in group else "–" for c in columns]
        for column in ("eval/chosen_logp", "eval/rejected_logp"):
            changes = change[column].reindex(group["trial_id"]) if column in change else pd.Series(dtype=float)
            cells.append(_mean_cell(changes, sign="+"))
        rows.append([key, str(len(group)), *cells])
    titles = ["setting", "seeds", *columns, "change of chosen_logp", "change of rejected_logp"]
    return (
        "## Over seeds\n\nMean ± half-width of the 95 % t-interval over the seeds that finished; changes are from the "
        "first evaluation to the last.\n\n" + _markdown_table(titles, rows)
    )


def _ends_section(results: dict[str, Any]) -> str:
    titles = {"stopped_early": "Stopped early", "diverged": "Diverged", "failed": "Failed"}
    parts = []
    for status, title in titles.items():
        trials = [trial for trial in _ranked(results) if trial["status"] == status]
        if trials:
            lines = [f"- {describe(t['params'])}: step {t['steps']}{_colon(_reason(t))}" for t in trials]
            parts.append(f"**{title}** ({len(trials)})\n\n" + "\n".join(lines))
    return "## Trials that did not run to their end\n\n" + "\n\n".join(parts) if parts else ""


def _plots_section(plots: list[tuple[Path, str]], run_dir: Path) -> str:
    pictures = [f"![{path.stem}]({path.relative_to(run_dir).as_posix()})\n\n{text}" for path, text in plots]
    return "## Pictures\n\n" + "\n\n".join(pictures) if pictures else ""


def _cost_section(results: dict[str, Any], events: list[dict[str, Any]], config: ExperimentConfig | None) -> str:
    trials = results["trials"]
    counts = Counter(trial["status"] for trial in trials)
    ended = ", ".join(f"{counts[status]} {status.replace('_', ' ')}" for status in _STATUS_ORDER if counts[status])
    seconds = {t["trial_id"]: t["train_seconds"] for t in trials if t["train_seconds"] is not None}
    lines = [
        f"- {len(trials)} {'trial' if len(trials) == 1 else 'trials'}: {ended}.",
        f"- {_duration(sum(seconds.values()))} of training, added up.",
    ]
    if config is not None:
        workers = {t["trial_id"]: config.trial(t["params"]).scaling.num_workers for t in trials}
        lines[1] = lines[1][:-1] + f" ({_duration(sum(s * workers[t] for t, s in seconds.items()))} of worker time)."
    if events:
        lines.append(
            f"- {_duration((events[-1]['time'] - events[0]['time']) / 1000)} from the first event to the last."
        )
    planned = {e["trial_id"]: e["max_steps"] for e in events if e["event"] == "started"}
    saved = sum(planned.get(t["trial_id"], t["steps"]) - t["steps"] for t in trials if t["status"] == "stopped_early")
    if saved:
        lines.append(f"- Early stopping saved {saved} of {sum(planned.values())} steps.")
    return "## Cost\n\n" + "\n".join(lines)


def _best_yaml(config: ExperimentConfig, params: dict[str, Any]) -> str:
    tree = config.trial(params).model_dump(mode="json", exclude_unset=True)
    tree["name"] = f"{config.name[:95]}-best"
    command = f"# The best trial of {config.name}: {describe(params)}. Run it with: orpo-ray train <this file>\n"
    return command + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


# Pieces


def _ranked(results: dict[str, Any]) -> list[dict[str, Any]]:
    sign = -1.0 if results["mode"] == "max" else 1.0

    def key(trial: dict[str, Any]) -> tuple[int, float]:
        value = trial["metrics"].get(results["metric"])
        return _STATUS_ORDER.index(trial["status"]), math.inf if value is None else sign * value

    return sorted(results["trials"], key=key)


def _varied(results: dict[str, Any]) -> list[str]:
    """Axes with more than one value among the trials, without the bundle's."""
    trials = results["trials"]
    names = dict.fromkeys(name for trial in trials for name in trial["params"])
    values = {name: [trial["params"].get(name) for trial in trials] for name in names}
    bundles = [trial["bundle"] for trial in trials]
    return [name for name in names if values[name] != bundles and len({repr(v) for v in values[name]}) > 1]


def _settings(results: dict[str, Any], frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Rows that differ in nothing but the seed, best mean first, under the setting's short name."""
    params = {t["trial_id"]: {k: v for k, v in t["params"].items() if k != SEED} for t in results["trials"]}
    # By value, not by name: names are rounded.
    groups = [g for _, g in frame.groupby(frame["trial_id"].map(lambda t: repr(params[t])), sort=False)]
    named = [(describe(params[group["trial_id"].iloc[0]]), group) for group in groups]
    return sorted(named, key=lambda item: item[1][results["metric"]].mean(), reverse=results["mode"] == "max")


def _evaluations(events: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per evaluation: `trial_id`, `step` and the held-out metrics; a repeated step counts once."""
    rows = [{"trial_id": e["trial_id"], "step": e["step"]} | e["metrics"] for e in events if e["event"] == "eval"]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys(["trial_id", "step", *(key for row in rows for key in row)])))
    frame = frame.astype({column: float for column in map(str, frame) if "/" in column})
    return frame.drop_duplicates(["trial_id", "step"], keep="last")


def _mean_cell(values: pd.Series, sign: str = "") -> str:
    known = values.dropna().tolist()
    if not known:
        return "–"
    mean, half = mean_interval(known)
    return f"{mean:{sign}.4f}" + (f" ± {half:.4f}" if half is not None else "")


def _markdown_table(titles: list[str], rows: list[list[str]]) -> str:
    body = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body)


def _number(value: float | None, spec: str = ".4f") -> str:
    return "–" if value is None or math.isnan(value) else f"{value:{spec}}"


def _reason(trial: dict[str, Any]) -> str:
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


# Plots: Agg canvases, no pyplot, so nothing of the caller's matplotlib state is touched


def _write_plots(
    folder: Path, results: dict[str, Any], frame: pd.DataFrame, curves: pd.DataFrame
) -> list[tuple[Path, str]]:
    """PNG files with their captions; only those for which the sweep has axes."""
    varied, metric = _varied(results), results["metric"]
    has_metric = metric in frame and bool(frame[metric].notna().any())
    drawn: list[tuple[str, Figure, str]] = []
    if LR in varied and has_metric:
        drawn.append(("metric_by_lr.png", *_metric_by_lr(frame, metric, varied)))
    if LAMBDA in varied and has_metric:
        drawn.append(("metric_by_lambda.png", *_metric_by_lambda(frame, metric, varied)))
    if any(column in curves for column in _CURVES):
        drawn.append(("curves.png", *_curves_figure(frame, curves, varied)))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure, caption in drawn:
        figure.savefig(folder / name, dpi=150)
        paths.append((folder / name, caption))
    return paths


def _panels(rows: int, frame: pd.DataFrame, height: float) -> tuple[Figure, np.ndarray, list[str]]:
    """An empty figure with a column of panels per bundle: (figure, axes [rows, bundles], bundles)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bundles = list(dict.fromkeys(frame["bundle"]))
    figure = Figure(figsize=(2.0 + 3.4 * len(bundles), 0.6 + height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(bundles), sharex=True, sharey="row", squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    for axis, bundle in zip(axes[0], bundles, strict=True):
        axis.set_title(bundle, fontsize=10)
    return figure, axes, bundles


def _colours(frame: pd.DataFrame, hue: str | None) -> dict[float, Any]:
    """Value of the axis `hue` -> colour, from dark to light; NaN -> one colour where there is no such axis.

    Viridis: the colour-blind and black-and-white printers keep its order.
    """
    from matplotlib import colormaps

    values = [value for value, _ in _by_hue(frame, hue)]
    return dict(zip(values, colormaps["viridis"](np.linspace(0.0, 0.88, len(values))), strict=True))


def _by_hue(frame: pd.DataFrame, hue: str | None) -> list[tuple[float, pd.DataFrame]]:
    if hue is None:
        return [(_NO_HUE, frame)]
    return [(float(str(value)), group) for value, group in frame.groupby(hue)]


def _metric_by_lr(frame: pd.DataFrame, metric: str, varied: list[str]) -> tuple[Figure, str]:
    figure, axes, bundles = _panels(1, frame, height=3.2)
    hue = LAMBDA if LAMBDA in varied else None
    colours = _colours(frame, hue)
    for axis, bundle in zip(axes[0], bundles, strict=True):
        for lam, group in _by_hue(frame[frame["bundle"] == bundle], hue):
            finished = group[group["status"] == "finished"].groupby(LR)[metric].mean()
            axis.plot(finished.index, finished, color=colours[lam], linewidth=1.2, alpha=0.7)
            _scatter(axis, group, LR, metric, colours[lam])
        _log_ticks(axis, frame[LR], ".0e")
        axis.set_xlabel("learning rate")
    axes[0, 0].set_ylabel(metric)
    _legend(figure, colours, "λ", frame)
    return figure, f"{metric} against learning rate{_over_seeds(varied)}. Crosses at the foot have no value."


def _metric_by_lambda(frame: pd.DataFrame, metric: str, varied: list[str]) -> tuple[Figure, str]:
    figure, axes, bundles = _panels(1, frame, height=3.2)
    colours = _colours(frame, LAMBDA)
    lambdas, shown = sorted(colours), frame[metric].tolist()
    for axis, bundle in zip(axes[0], bundles, strict=True):
        of_bundle = frame[frame["bundle"] == bundle]
        for lam, group in _by_hue(of_bundle, LAMBDA):
            _scatter(axis, group, LAMBDA, metric, colours[lam])
        finished = of_bundle[(of_bundle["status"] == "finished") & of_bundle[metric].notna()]
        means = [(lam, *mean_interval(g[metric].tolist())) for lam, g in _by_hue(finished, LAMBDA)]
        if len(lambdas) <= _MAX_LEGEND:  # drawn from a range, each is tried once: nothing to average
            at, middle = [lam for lam, _, _ in means], [mean for _, mean, _ in means]
            axis.plot(at, middle, color="0.25", linewidth=1.2, zorder=1.5)
        for (lam, mean, half), (_, group) in zip(means, _by_hue(finished, LAMBDA), strict=True):
            if half is not None and len(group) >= _MIN_FOR_INTERVAL:
                axis.errorbar([lam], [mean], [half], color="0.25", linewidth=1.2, capsize=4, zorder=1.5)
                shown += [mean - half, mean + half]
        if lambdas[0] > 0 and lambdas[-1] / lambdas[0] >= 30:
            _log_ticks(axis, frame[LAMBDA], "g")
        axis.set_xlabel("λ (loss.orpo_lambda)")
    axes[0, 0].set_ylabel(metric)
    _limits_by_points(axes[0, 0], pd.Series(shown))
    _legend(figure, colours, "λ", frame)
    match [name for name in varied if name != LAMBDA]:
        case []:
            return figure, f"{metric} against λ; one trial at each λ."
        case [name] if name == SEED:
            over = "the seeds that finished"
        case others:
            over = f"the trials that finished, which differ in {', '.join(others)}"
    return figure, (
        f"{metric} against λ. Line and bars: mean and 95 % t-interval over {over}; no bar for fewer than "
        f"{_MIN_FOR_INTERVAL}, over two it would be wider than the plot."
    )


def _curves_figure(frame: pd.DataFrame, curves: pd.DataFrame, varied: list[str]) -> tuple[Figure, str]:
    shown = [column for column in _CURVES if column in curves]
    figure, axes, bundles = _panels(len(shown), frame, height=2.2)
    hue = LAMBDA if LAMBDA in varied else LR if LR in varied else None
    colours = _colours(frame, hue)
    drawn: dict[str, list[float]] = {column: [] for column in shown}
    for row, column in zip(axes, shown, strict=True):
        for axis, bundle in zip(row, bundles, strict=True):
            for value, group in _by_hue(frame[frame["bundle"] == bundle], hue):
                finished = group[group["status"] == "finished"]
                trials = finished if len(finished) else group[group["status"] == "stopped_early"]
                of_trials = curves[curves["trial_id"].isin(trials["trial_id"])]
                # Up to the step that all of them reached: a mean whose trials change is no curve.
                by_step = of_trials.pivot(index="step", columns="trial_id", values=column).dropna()
                if by_step.empty:
                    continue
                drawn[column] += _draw_mean(axis, by_step, colours[value], "-" if len(finished) else "--")
        row[0].set_ylabel(_CURVES[column])
    logps = [logp for column in shown if column.endswith("_logp") for logp in drawn[column]]
    for row, column in zip(axes, shown, strict=True):
        # One scale for chosen and rejected, so that the eye can compare them.
        _limits_by_points(row[0], pd.Series(logps if column.endswith("_logp") else drawn[column], dtype=float))
    for axis in axes[-1]:
        axis.set_xlabel("step")
    _legend(figure, colours, "λ" if hue == LAMBDA else "lr", frame[:0])
    caption = "Held-out log-probabilities and log odds over training (compare the paper's figures 3, 7 and 9)"
    if len(frame) == 1:
        return figure, f"{caption}."
    over = "seeds" if SEED in varied and set(varied) <= {hue, SEED} else "trials that finished"
    return figure, (
        f"{caption}: mean over the {over}, with its 95 % t-interval from {_MIN_FOR_INTERVAL} on and each one where "
        "there are two; dashed where none finished."
    )


def _draw_mean(axis: Axes, by_step: pd.DataFrame, colour: Any, style: str) -> list[float]:
    """The mean over trials (columns) by step (rows), and how far they spread; returns the values drawn as lines."""
    mean = by_step.mean(axis=1)
    axis.plot(mean.index, mean, style, marker="o", markersize=2.5, color=colour, linewidth=1.5)
    if by_step.shape[1] >= _MIN_FOR_INTERVAL:
        half = np.array([mean_interval(values)[1] for values in by_step.to_numpy().tolist()], dtype=float)
        axis.fill_between(mean.index, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        return mean.tolist()
    if by_step.shape[1] == 2:
        axis.plot(by_step.index, by_step, style, color=colour, linewidth=0.6, alpha=0.6)
    return by_step.to_numpy().ravel().tolist()


def _scatter(axis: Axes, group: pd.DataFrame, x: str, metric: str, colour: Any) -> None:
    for status, (marker, is_filled) in _MARKERS.items():
        some = group[group["status"] == status]
        face = colour if is_filled else "none"
        valued, bare = some[some[metric].notna()], some[some[metric].isna()]
        axis.plot(valued[x], valued[metric], marker, color=colour, markerfacecolor=face, markersize=6)
        if len(bare):  # at the foot of the panel: x in data, y in panel heights
            foot = [0.03] * len(bare)
            axis.plot(bare[x], foot, marker, color=colour, markersize=6, transform=axis.get_xaxis_transform())


_MARKERS: dict[str, tuple[str, bool]] = {
    "finished": ("o", True),
    "stopped_early": ("v", False),
    "diverged": ("x", True),
    "failed": ("+", True),
}


def _log_ticks(axis: Axes, values: pd.Series, spec: str) -> None:
    """A log axis with a readable number of labels, however narrow the range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(values.max() / values.min())
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if decades < 1 else (1, 3) if decades < 2.5 else (1,)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{spec}}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _limits_by_points(axis: Axes, values: pd.Series) -> None:
    """Bands over few trials can be wider than all the data: they may leave the panel."""
    if values.dropna().empty:
        return
    low, high = float(values.min()), float(values.max())
    margin = 0.12 * (high - low) or 0.05 * abs(high) or 0.05
    axis.set_ylim(low - margin, high + margin)


def _legend(figure: Figure, colours: dict[float, Any], symbol: str, frame: pd.DataFrame) -> None:
    """Colours and, for the trials in `frame`, markers, beside the panels."""
    from matplotlib.lines import Line2D

    values = [value for value in colours if not math.isnan(value)]
    shown = [values[round(i)] for i in np.linspace(0, len(values) - 1, min(_MAX_LEGEND, len(values)))]
    handles = [Line2D([], [], color=colours[v], linewidth=2.5, label=f"{symbol} = {v:.3g}") for v in shown]
    for status, (marker, is_filled) in _MARKERS.items():
        if (frame["status"] == status).any():
            face = "0.35" if is_filled else "none"
            label = status.replace("_", " ")
            handles.append(Line2D([], [], color="0.35", marker=marker, markerfacecolor=face, linestyle="", label=label))
    if handles:
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)


def _over_seeds(varied: list[str]) -> str:
    return "; lines join the means over seeds" if SEED in varied else ""
