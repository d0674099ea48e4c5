"""`orpo-ray transfer`: extrapolate learning rate and λ to larger models from sweeps; write page, picture and numbers.

The fits are in `orpo_ray.results.transfer`; this module selects the trials and presents the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orpo_ray.config import MEANING_MOVED_BY, METRIC_MODES
from orpo_ray.config.flatten import SPEED_ONLY, as_text
from orpo_ray.errors import UserError
from orpo_ray.formatting import better_when, markdown_table, short_count, status_text
from orpo_ray.results import transfer
from orpo_ray.results.transfer import Law, Transfer
from orpo_ray.storage.events import Status
from orpo_ray.storage.records import SweepRecord, TrialRecord
from orpo_ray.storage.run_dir import write_results

PAGE_FILE, PICTURE_FILE, NUMBERS_FILE = "transfer.md", "transfer.png", "transfer.json"
_NAMES = {"lr": "learning rate", "orpo_lambda": "λ"}
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_MARKERS = "osD^vP"
_SWEPT = frozenset({"optim.lr", "loss.orpo_lambda", "loss.name", "train.seed"})
_COUNTED = frozenset({Status.FINISHED, Status.DIVERGED})
"""A trial that ended early has its metric after fewer steps, so it does not count."""


class TransferError(UserError, ValueError):
    """The sweeps do not allow a transfer study; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The trials that are fitted, and what was left out."""

    sweeps: tuple[str, ...]
    """Names of the sweeps."""
    metric: str
    trials: pd.DataFrame
    """Columns as in `transfer.Tried`; the value is NaN where a trial diverged."""
    steps: tuple[int, ...]
    """Distinct numbers of optimizer steps of the finished trials, ascending."""
    left_out: dict[str, int]
    """Reason -> number of trials left out."""
    unlike: dict[str, tuple[str, ...]]
    """Settings other than size, learning rate, λ and seed that differ between trials -> their values."""


def gather(records: Sequence[SweepRecord], metric: str | None = None) -> Evidence:
    """Collect the trials of sweeps over model size, learning rate and λ.

    Finished trials count with their value, diverged trials as diverged. Trials that were stopped early were judged
    after fewer steps and are left out, as are trials that failed or have not ended.

    Args:
        records: the sweeps; sizes may come from different ones.
        metric: held-out metric; by default the one that all sweeps are judged by.

    Raises:
        TransferError: the metric is unknown, was not given although the sweeps are judged by different ones, or has a
            different meaning in each trial; a sweep is given twice; a single trial is given; or no trial counts.
    """
    metric = _metric(records, metric)
    _require_whole(records)
    rows, steps, left_out, counted = [], set(), Counter[str](), []
    for trial in (trial for record in records for trial in record.trials):
        reason = _why_not(trial, metric)
        if reason is not None:
            left_out[reason] += 1
            continue
        counted.append(trial)
        is_finished = trial.status == Status.FINISHED
        if is_finished:
            steps.add(trial.steps)
        rows.append(
            {
                "parameters": trial.settings["model.parameters"],
                "lr": trial.settings["optim.lr"],
                "orpo_lambda": trial.settings["loss.orpo_lambda"],
                "value": trial.metrics[metric] if is_finished else math.nan,
            }
        )
    names = tuple(record.name for record in records)
    if not rows:
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "no trials"
        raise TransferError(f"no trial of {', '.join(names)} can be fitted ({why}); let one finish first")
    unlike = _unlike(counted)
    # A preset is only a name for other settings, which are compared one by one.
    if moved := sorted((MEANING_MOVED_BY[metric] & (unlike.keys() | {"loss.orpo_lambda"})) - {"loss.preset"}):
        raise TransferError(
            f"{metric} means something else with each {' and '.join(moved)}, so it would rank the setting, not the "
            f"model; choose another with --metric: {', '.join(m for m in METRIC_MODES if m != metric)}"
        )
    frame = pd.DataFrame(rows).astype(float)
    return Evidence(names, metric, frame, tuple(sorted(steps)), dict(left_out), unlike)


def study(
    records: Sequence[SweepRecord], metric: str | None = None, targets: Sequence[float] = transfer.TARGETS
) -> tuple[Evidence, Transfer]:
    """Collect the trials of sweeps and run `transfer.study` on them.

    Raises:
        TransferError: as `gather`, or the trials are too few, or too alike, to be fitted.
    """
    evidence = gather(records, metric)
    if wrong := [target for target in targets if not 0 < target < math.inf]:
        raise TransferError(f"a size must be a number of parameters above 0, such as 7e9; {wrong[0]:g} is not")
    try:
        return evidence, transfer.study(evidence.trials, METRIC_MODES[evidence.metric], targets)
    except ValueError as error:
        raise TransferError(
            f"{', '.join(evidence.sweeps)}: {error}. Sweep model (a bundle of sizes), optim.lr and loss.orpo_lambda "
            "with scheduler fifo, so that every trial runs to its end"
        ) from error


def _require_whole(records: Sequence[SweepRecord]) -> None:
    """Require whole sweeps, each once: a trial that counts twice would make the intervals too narrow."""
    for record in records:
        if record.chosen is not None:
            raise TransferError(f"{record.name}/{record.chosen} is a single trial; give the sweep, {record.name}")
    ids = [{trial.mlflow_run_id or f"{record.name}/{trial.trial_id}" for trial in record.trials} for record in records]
    for number, record in enumerate(records):
        if any(ids[number] & ids[earlier] for earlier in range(number)):
            raise TransferError(f"the trials of {record.name} are given twice; give each sweep once")


def _unlike(trials: Sequence[TrialRecord]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted({path for trial in trials for path in trial.settings}):
        section = path.partition(".")[0]
        if section not in ("data", "loss", "optim", "train") or path in _SWEPT or path.startswith(SPEED_ONLY):
            continue
        values = sorted({as_text(trial.settings.get(path)) for trial in trials})
        if len(values) > 1:
            found[path] = tuple(values)
    return found


def _metric(records: Sequence[SweepRecord], metric: str | None) -> str:
    if metric is None:
        judged = sorted({record.metric for record in records})
        if len(judged) > 1:
            raise TransferError(f"these sweeps are judged by {' and '.join(judged)}; choose one with --metric")
        (metric,) = judged
    if metric not in METRIC_MODES:
        raise TransferError(f"metric {metric!r} is not a held-out metric; use one of {', '.join(METRIC_MODES)}")
    return metric


def _why_not(trial: TrialRecord, metric: str) -> str | None:
    if trial.status not in _COUNTED:
        return status_text(trial.status)
    if trial.reused_from is not None:
        return "taken over from another sweep"
    if trial.settings.get("model.parameters") is None:
        return "without a known size"
    if trial.settings.get("loss.name", "orpo") not in ("orpo", "sft"):
        return f"with another loss, {trial.settings['loss.name']}"
    if trial.status == Status.FINISHED and metric not in trial.metrics:
        return f"without {metric}"
    return None


# ---- presentation ---------------------------------------------------------------------------------------------------


def table(found: Transfer) -> RenderableType:
    """The result as tables for the terminal."""
    shown: list[RenderableType] = []
    for law in _laws(found):
        title = f"best {_NAMES[law.axis]} by model size"
        rows = Table(title=title, title_justify="left", box=None, pad_edge=False)
        rows.add_column("parameters")
        for title in _TITLES[1:]:
            rows.add_column(title, justify="right")
        for row in _rows(law):
            rows.add_row(*row)
        shown += [rows, Text("\n".join(_said(law)) + "\n")]
    if found.orpo_lambda is None:
        shown.append(Text(_NO_LAMBDA))
    return Group(*shown)


def write(folder: Path, evidence: Evidence, found: Transfer, command: str) -> Path:
    """Write the page, its picture and the numbers (JSON).

    Args:
        folder: where to write; created where missing.
        evidence: the trials.
        found: the study of the trials.
        command: the command that makes this page again.

    Returns:
        Path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {
        "command": command,
        "sweeps": evidence.sweeps,
        "metric": evidence.metric,
        "left_out": evidence.left_out,
        "unlike": evidence.unlike,
        "steps": evidence.steps,
        "study": dataclasses.asdict(found),
        "trials": evidence.trials.to_dict(orient="records"),
    }
    write_results(folder / NUMBERS_FILE, numbers)
    draw(evidence, found).savefig(folder / PICTURE_FILE, dpi=130, metadata={"Software": None})
    page = folder / PAGE_FILE
    page.write_text(_page(evidence, found, command), encoding="utf-8")
    return page


_TITLES = ["parameters", "trials", "diverged", "best", "95 % interval", "tried", "at the edge"]
_NO_LAMBDA = "Nothing is said about λ: fewer than two sizes have three or more λ above 0."


def _said(law: Law) -> list[str]:
    """One sentence for each target size."""
    return [each.statement for each in law.extrapolations]


def _laws(found: Transfer) -> list[Law]:
    return [law for law in (found.lr, found.orpo_lambda) if law is not None]


def _rows(law: Law) -> list[list[str]]:
    return [
        [
            short_count(optimum.parameters),
            str(optimum.trials),
            str(optimum.diverged),
            f"{optimum.best:.2g}",
            f"{optimum.low:.2g} to {optimum.high:.2g}",
            f"{optimum.lowest_tried:.2g} to {optimum.highest_tried:.2g}",
            "yes" if optimum.at_edge else "no",
        ]
        for optimum in law.optima
    ]


def _page(evidence: Evidence, found: Transfer, command: str) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in evidence.left_out.items())
    unlike = "; ".join(f"{path}: {', '.join(values)}" for path, values in evidence.unlike.items())
    steps = " or ".join(str(number) for number in evidence.steps)
    better = better_when(METRIC_MODES[evidence.metric])
    parts = [
        "# From small models to larger ones",
        f"`{command}`",
        f"{len(evidence.trials)} trials of {', '.join(evidence.sweeps)}, trained for {steps} steps and judged by "
        f"`{evidence.metric}` ({better} is better).{f' Left out: {left_out}.' if left_out else ''}"
        f"{f' **Not equal, so their effect is attributed to size: {unlike}.**' if unlike else ''} At each size a "
        "parabola over log learning rate and one over log λ are fitted by least squares; a line over log size goes "
        f"through their optima. Intervals are from {found.resamples} bootstraps over trials. They do not cover whether "
        "the parabola is the right shape, whether the line continues, or that larger models are trained on other data "
        "for longer.",
    ]
    for law in _laws(found):
        parts += [
            f"## The best {_NAMES[law.axis]}",
            "\n".join(f"- **{sentence}**" for sentence in _said(law)),
            f"Exponent of size: {law.exponent:+.2f} ({law.exponent_low:+.2f} to {law.exponent_high:+.2f}); the sizes "
            f"are off the line by a factor of {law.farthest_off:.2f} at most.",
            markdown_table(_TITLES, _rows(law)),
        ]
    if found.orpo_lambda is None:
        parts.append(_NO_LAMBDA)
    parts.append(f"![metric by setting and size, and the best by size with its line]({PICTURE_FILE})")
    return "\n\n".join(parts) + "\n"


def draw(evidence: Evidence, found: Transfer) -> Figure:
    """Top: the metric over each axis, by size, with the fitted best as a vertical line. Bottom: that best over size."""
    laws = _laws(found)
    figure = Figure(figsize=(5.4 * len(laws), 8.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(laws), squeeze=False)
    for column, law in enumerate(laws):
        _draw_metric(axes[0, column], evidence, law)
        _draw_line(axes[1, column], law)
    axes[0, 0].legend(frameon=False, title="parameters")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure


def _draw_metric(axis: Axes, evidence: Evidence, law: Law) -> None:
    trials = evidence.trials[np.isfinite(evidence.trials["value"])]
    for optimum, colour, marker in zip(law.optima, cycle(_COLOURS), cycle(_MARKERS), strict=False):
        of_size = trials[(trials["parameters"] == optimum.parameters) & (trials[law.axis] > 0)]
        # The mean is over the other axis too: the remaining scatter is that axis and noise.
        mean = of_size.groupby(law.axis)["value"].mean()
        axis.plot(of_size[law.axis], of_size["value"], marker, color=colour, ms=3, alpha=0.35)
        axis.plot(mean.index, mean, marker + "-", color=colour, ms=5, lw=1.4, label=short_count(optimum.parameters))
        axis.axvline(optimum.best, color=colour, lw=1.2, ls=":")
    axis.set_xscale("log")
    _number(axis.xaxis)
    axis.set_xlabel(_NAMES[law.axis])
    axis.set_ylabel(evidence.metric)
    axis.set_title("small: trials, large: their mean, dotted: best by the fit", loc="left", fontsize=9)


def _draw_line(axis: Axes, law: Law) -> None:
    for optimum, colour, marker in zip(law.optima, cycle(_COLOURS), cycle(_MARKERS), strict=False):
        axis.plot([optimum.parameters] * 2, [optimum.low, optimum.high], color=colour, lw=2)
        axis.plot(optimum.parameters, optimum.best, marker, color=colour, ms=7)
    for each in law.extrapolations:
        if not each.says_nothing:
            axis.plot([each.parameters] * 2, [each.low, each.high], color="0.3", lw=2)
            axis.plot(each.parameters, each.best, "x", color="0.3", ms=8)
    told = [each.parameters for each in law.extrapolations if not each.says_nothing]
    sizes_G = np.geomspace(law.optima[0].parameters, max([law.optima[-1].parameters, *told]), 50)
    axis.plot(sizes_G, np.exp(law.intercept) * sizes_G**law.exponent, color="0.3", lw=1, ls="--")
    # The range tried sets the scale, not the intervals: an interval that fills it says nothing.
    axis.fill_between(
        [optimum.parameters for optimum in law.optima],
        [optimum.lowest_tried for optimum in law.optima],
        [optimum.highest_tried for optimum in law.optima],
        color="0.5",
        alpha=0.12,
        lw=0,
        label="range tried",
    )
    axis.set_xscale("log")
    _number(axis.xaxis, short_count)
    axis.set_yscale("log")
    _number(axis.yaxis)
    axis.set_xlabel("parameters")
    axis.set_ylabel(f"best {_NAMES[law.axis]}, 95 % interval")
    silent = [short_count(each.parameters) for each in law.extrapolations if each.says_nothing]
    if silent:
        axis.set_title(f"says nothing about {', '.join(silent)}", loc="left", fontsize=9)
    axis.legend(frameon=False)


def _number(axis: Axis, name: Callable[[float], str] = "{:g}".format) -> None:
    """Number a logarithmic axis at 1, 2 and 5 of each decade, so that less than one decade has numbers too."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: name(value)))
    axis.set_minor_formatter(NullFormatter())
