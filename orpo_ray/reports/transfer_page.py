"""`orpo-ray transfer`: what sweeps over model sizes say of the learning rate and λ of larger models, page and picture.

The fits are those of `orpo_ray.results.transfer`; here are the sweeps they are fed from, and what a person looks at.
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
from orpo_ray.formatting import markdown_table
from orpo_ray.results import transfer
from orpo_ray.results.transfer import Law, Transfer, short_size
from orpo_ray.storage.records import SweepRecord, TrialRecord
from orpo_ray.storage.run_dir import write_results

PAGE_FILE, PICTURE_FILE, NUMBERS_FILE = "transfer.md", "transfer.png", "transfer.json"
_NAMES = {"lr": "learning rate", "orpo_lambda": "λ"}
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_MARKERS = "osD^vP"
_SWEPT = frozenset({"optim.lr", "loss.orpo_lambda", "loss.name", "train.seed"})
_COUNTED = frozenset({"finished", "diverged"})
"""Of what ended early the metric is that of another number of steps."""


class TransferError(UserError, ValueError):
    """The sweeps carry no transfer study; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The trials that are fitted, and those that are not."""

    sweeps: tuple[str, ...]
    """By name."""
    metric: str
    trials: pd.DataFrame
    """Columns as of `transfer.Tried`; NaN where a trial diverged."""
    steps: tuple[int, ...]
    """Optimizer steps that finished trials were trained for, ascending; one number where all are alike."""
    left_out: dict[str, int]
    """Why -> trials."""
    unlike: dict[str, tuple[str, ...]]
    """Settings other than size, learning rate, λ and seed that not all trials share -> their values."""


def gather(records: Sequence[SweepRecord], metric: str | None = None) -> Evidence:
    """The trials of sweeps over model size, learning rate and λ.

    Counted is what finished, and what diverged as such. What was stopped early was judged after fewer steps, and is
    left out, as are trials that failed or are not done.

    Args:
        records: of the sweeps; sizes may come from different ones.
        metric: held-out metric; by default the one that all of them are judged by.

    Raises:
        TransferError: no such metric, none was asked for and the sweeps are judged by different ones, or the metric
            means something else in each trial; a sweep is given twice, or a single trial; no trial counts.
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
        is_finished = trial.status == "finished"
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
    # A preset is but a name for other settings, which are compared by themselves.
    if moved := sorted((MEANING_MOVED_BY[metric] & (unlike.keys() | {"loss.orpo_lambda"})) - {"loss.preset"}):
        raise TransferError(
            f"{metric} means something else with each {' and '.join(moved)}, so it would rank the setting, not the "
            f"model; judge by another with --metric: {', '.join(m for m in METRIC_MODES if m != metric)}"
        )
    frame = pd.DataFrame(rows).astype(float)
    return Evidence(names, metric, frame, tuple(sorted(steps)), dict(left_out), unlike)


def study(
    records: Sequence[SweepRecord], metric: str | None = None, targets: Sequence[float] = transfer.TARGETS
) -> tuple[Evidence, Transfer]:
    """`transfer.study` of sweeps.

    Raises:
        TransferError: as of `gather`, or the trials are too few, or too alike, to be fitted.
    """
    evidence = gather(records, metric)
    if wrong := [target for target in targets if not 0 < target < math.inf]:
        raise TransferError(f"a size is a number of parameters above 0, such as 7e9; {wrong[0]:g} is none")
    try:
        return evidence, transfer.study(evidence.trials, METRIC_MODES[evidence.metric], targets)
    except ValueError as error:
        raise TransferError(
            f"{', '.join(evidence.sweeps)}: {error}. Sweep model (a bundle of sizes), optim.lr and loss.orpo_lambda "
            "with scheduler fifo, so that every trial runs to its end"
        ) from error


def _require_whole(records: Sequence[SweepRecord]) -> None:
    """Whole sweeps, each once: a trial that counts twice makes intervals narrower than they are."""
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
            raise TransferError(f"these sweeps are judged by {' and '.join(judged)}; say which with --metric")
        (metric,) = judged
    if metric not in METRIC_MODES:
        raise TransferError(f"no held-out metric {metric!r}; there are {', '.join(METRIC_MODES)}")
    return metric


def _why_not(trial: TrialRecord, metric: str) -> str | None:
    if trial.status not in _COUNTED:
        return trial.status.replace("_", " ")
    if trial.reused_from is not None:
        return "taken over from another sweep"
    if trial.settings.get("model.parameters") is None:
        return "without a known size"
    if trial.settings.get("loss.name", "orpo") not in ("orpo", "sft"):
        return f"of another loss, {trial.settings['loss.name']}"
    if trial.status == "finished" and metric not in trial.metrics:
        return f"without {metric}"
    return None


# ---- shown ----------------------------------------------------------------------------------------------------------


def table(found: Transfer) -> RenderableType:
    """For the terminal."""
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
    """The page, its picture and the numbers (JSON) into a folder, which is made.

    Args:
        folder: where to.
        evidence: the trials.
        found: the study of them.
        command: that makes it again.
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
_NO_LAMBDA = "Nothing is said of λ: fewer than two sizes have three or more λ above 0."


def _said(law: Law) -> list[str]:
    """One sentence for each size asked about."""
    return [each.statement for each in law.extrapolations]


def _laws(found: Transfer) -> list[Law]:
    return [law for law in (found.lr, found.orpo_lambda) if law is not None]


def _rows(law: Law) -> list[list[str]]:
    return [
        [
            short_size(optimum.parameters),
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
    better = "higher" if METRIC_MODES[evidence.metric] == "max" else "lower"
    parts = [
        "# From small models to larger ones",
        f"`{command}`",
        f"{len(evidence.trials)} trials of {', '.join(evidence.sweeps)}, trained for {steps} steps and judged by "
        f"`{evidence.metric}` ({better} is better).{f' Left out: {left_out}.' if left_out else ''}"
        f"{f' **Not alike, and taken for the size: {unlike}.**' if unlike else ''} At each size a "
        "parabola over log learning rate and one over log λ are fitted by least squares; their best is laid on a line "
        f"over log size. Intervals are of {found.resamples} bootstraps over trials; they do not cover whether the "
        "parabola is the right shape, whether the line goes on, or that larger models are trained on other data for "
        "longer.",
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
    """Above, the metric over the setting, by size, with the fit's best as a line down; below, that best over size."""
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
        # Over the other axis too: what is left of the scatter is that axis's doing, and noise.
        mean = of_size.groupby(law.axis)["value"].mean()
        axis.plot(of_size[law.axis], of_size["value"], marker, color=colour, ms=3, alpha=0.35)
        axis.plot(mean.index, mean, marker + "-", color=colour, ms=5, lw=1.4, label=short_size(optimum.parameters))
        axis.axvline(optimum.best, color=colour, lw=1.2, ls=":")
    axis.set_xscale("log")
    _number(axis.xaxis)
    axis.set_xlabel(_NAMES[law.axis])
    axis.set_ylabel(evidence.metric)
    axis.set_title("small: trials, large: their mean, dotted: the fit's best", loc="left", fontsize=9)


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
    # The range tried, not the intervals, sets the scale: what fills it is not known.
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
    _number(axis.xaxis, short_size)
    axis.set_yscale("log")
    _number(axis.yaxis)
    axis.set_xlabel("parameters")
    axis.set_ylabel(f"best {_NAMES[law.axis]}, 95 % interval")
    silent = [short_size(each.parameters) for each in law.extrapolations if each.says_nothing]
    if silent:
        axis.set_title(f"says nothing of {', '.join(silent)}", loc="left", fontsize=9)
    axis.legend(frameon=False)


def _number(axis: Axis, name: Callable[[float], str] = "{:g}".format) -> None:
    """A logarithmic axis with numbers at 1, 2 and 5 of each decade: a range of less than one decade has some, too."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: name(value)))
    axis.set_minor_formatter(NullFormatter())
