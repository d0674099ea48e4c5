import hashlib
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import yaml
from rich.console import Console

from orpo_ray.cli import main
from orpo_ray.config import METRIC_MODES, load, parse
from orpo_ray.reports.report import results_table, write_report
from orpo_ray.results.frames import load_runs_frame, mean_interval
from orpo_ray.results.winners import summarize_winners
from orpo_ray.storage.results import load_results, summarize
from orpo_ray.storage.run_dir import write_results
from tests.support.events import as_state
from tests.support.sweeps import pair_scores, write_pairs
from tests.support.sweeps import trial as made_trial

METRIC = "eval/preference_accuracy"
STEPS = 200


def held_out(size, lam, lr, step, noise):
    """Shapes as in the paper: with λ the rejected answers fall behind; λ = 1 drags the chosen ones down too."""
    progress = 1 - math.exp(-step * lr / 0.04)
    ability = 0.35 if size == "8m" else 0.25
    chosen = -2.6 + progress * (0.9 + ability - 0.8 * lam**2) + noise.gauss(0, 0.02)
    rejected = -2.6 + progress * (0.8 + ability - 1.6 * lam) + noise.gauss(0, 0.02)
    odds = chosen - rejected
    accuracy = 0.5 + 0.45 * math.tanh(2 * ability * odds + 0.2 * progress) + noise.gauss(0, 0.01)
    metrics = {METRIC: accuracy, "eval/nll": 2.6 - progress * (0.9 - 0.4 * lam), "eval/log_odds": odds}
    return metrics | {"eval/chosen_logp": chosen, "eval/rejected_logp": rejected}


def synthetic_sweep(trials):
    """Events of a sweep as a broker writes them, from (params, bundle, status); early stops come at step 50."""
    noise, events, clock = random.Random(0), [], 1_700_000_000_000
    for number, (params, bundle, status) in enumerate(trials):
        trial_id = f"t{number:02d}"

        def add(event, trial_id=trial_id, **details):
            nonlocal clock
            clock += 1000
            events.append({"event": event, "trial_id": trial_id, **details, "time": clock})

        add("submitted", params=params, bundle=bundle)
        add("started", attempt=0, group=f"{bundle}-0", step=0, max_steps=STEPS, facts={})
        last, metrics = {"finished": STEPS, "stopped_early": 50, "diverged": 25, "failed": 0}[status], {}
        lam, lr = params.get("loss.orpo_lambda", 0.1), params.get("optim.lr", 8e-4)
        for step in range(25, last + 1, 25):
            metrics = held_out(bundle, lam, lr, step, noise)
            add("eval", step=step, metrics=metrics, checkpoint=f"/runs/s/trials/{trial_id}/step-{step}")
        errors = {"diverged": f"log-probabilities not finite at step {last + 3} for 2 pair(s): a, b"}
        errors["failed"] = "worker group 8m-0 ended: [node 10.0.0.7] out of memory | killed"
        add(
            "finished",
            status=status,
            steps=last,
            metrics=metrics,
            checkpoint=f"/runs/s/trials/{trial_id}/step-{last}" if metrics else None,
            train_seconds=2.5 + last / 20,
            error=errors.get(status),
        )
    return events


def sixteen_trials():
    """2 bundles × 4 λ × 2 learning rates; two stopped early, one diverged, one failed."""
    fates = {(0.0, 0): "stopped_early", (1.0, 1): "diverged", (0.5, 0): "finished"}
    trials = []
    for size in ("2m", "8m"):
        for lam in (0.0, 0.1, 0.5, 1.0):
            for index, lr in enumerate((3.1e-4, 1.7e-3)):
                status = fates.get((lam, index), "finished") if size == "8m" else "finished"
                if (size, lam, index) == ("2m", 0.1, 0):
                    status = "stopped_early"
                if (size, lam, index) == ("8m", 0.5, 1):
                    status = "failed"
                params = {"size": size, "loss.orpo_lambda": lam, "optim.lr": lr * (1 + lam / 5)}
                trials.append((params, size, status))
    return trials


def run_dir_of(tmp_path, trials, metric=METRIC):
    events = synthetic_sweep(trials)
    with (tmp_path / "events.jsonl").open("w") as journal:
        journal.writelines(json.dumps(event) + "\n" for event in events)
    write_results(tmp_path / "results.json", summarize("toy", metric, "max", as_state(events)))
    return tmp_path


def sweep_config(space):
    tree = {
        "name": "toy",
        "output_dir": "runs",
        "model": {"path": "tiny-llama-2m"},
        "data": {"path": "builtin://style-pairs"},
        "train": {"max_steps": STEPS, "eval_every": 25, "micro_batch_size": 8},
    }
    return parse(tree | ({"sweep": {"space": space}} if space else {}))


SPACE = {
    "size": {
        "type": "bundle",
        "values": {
            "2m": {"model.path": "tiny-llama-2m"},
            "8m": {"model.path": "tiny-llama-8m", "scaling.num_workers": 2},
        },
    },
    "loss.orpo_lambda": {"type": "grid", "values": [0.0, 0.1, 0.5, 1.0]},
    "optim.lr": {"type": "loguniform", "low": 1e-4, "high": 3e-3},
}


def test_one_row_per_trial_with_axes_and_metrics_as_numbers(tmp_path):
    results = load_results(run_dir_of(tmp_path, sixteen_trials()))
    frame = load_runs_frame(results)
    assert len(frame) == 16
    assert list(frame.columns[:9]) == [
        *("trial_id", "bundle", "status", "attempts", "steps", "train_seconds"),
        *("size", "loss.orpo_lambda", "optim.lr"),
    ]
    assert str(frame.dtypes[METRIC]) == "float64"
    assert frame.set_index("trial_id").loc["t00", "optim.lr"] == 3.1e-4
    failed = frame[frame["status"] == "failed"]
    assert len(failed) == 1
    assert failed[METRIC].isna().all()


def test_the_frame_of_a_sweep_in_which_nothing_was_measured(tmp_path):
    results = load_results(run_dir_of(tmp_path, [({"optim.lr": 1e-3}, "", "failed")]))
    for trial in results["trials"]:
        trial["train_seconds"] = None
    frame = load_runs_frame(results)
    assert math.isnan(frame["train_seconds"][0])
    assert METRIC not in frame


def text_of(table):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_the_table_is_ranked_and_says_why_trials_ended(tmp_path):
    results = load_results(run_dir_of(tmp_path, sixteen_trials()))
    lines = text_of(results_table(results)).splitlines()[2:]
    assert lines[0].startswith("★  8m λ=1 lr=3.7e-04")
    assert sum("★" in line for line in lines) == 1
    statuses = [s for line in lines for s in ("finished", "stopped early", "diverged", "failed") if s in line]
    assert statuses == 12 * ["finished"] + 2 * ["stopped early"] + ["diverged", "failed"]
    values = [float(line.split("lr=")[1].split()[1]) for line in lines[:12]]
    assert values == sorted(values, reverse=True)
    assert "[node 10.0.0.7] out of memory" in lines[-1]  # brackets are not markup
    assert "not finite at step 28" in lines[-2]
    assert " 50 " in lines[12]  # stopped early: at its step


def test_where_lower_is_better_the_lowest_comes_first(tmp_path):
    events = synthetic_sweep(sixteen_trials())
    results = summarize("toy", "eval/nll", "min", as_state(events))
    lines = text_of(results_table(results)).splitlines()[2:]
    values = [float(line.split("lr=")[1].split()[1]) for line in lines[:12]]
    assert values == sorted(values)


def test_a_report_of_a_whole_sweep(tmp_path):
    run_dir = run_dir_of(tmp_path, sixteen_trials())
    config = sweep_config(SPACE)
    files = write_report(run_dir, config)
    names = [file.relative_to(run_dir).as_posix() for file in files]
    plots = [
        f"plots/{name}.png"
        for name in ("intervals", "heat_maps", "curves", "pareto", "importance", "scaling", "divergence")
    ]
    assert names == ["report.html", "report.md", *plots, "best.yaml"]
    for plot in plots:
        assert (run_dir / plot).read_bytes().startswith(b"\x89PNG")
        assert (run_dir / plot).stat().st_size > 20_000
    page = (run_dir / "report.md").read_text()
    assert "**Best: 8m λ=1 lr=3.7e-04.** `eval/preference_accuracy` = 0.7857" in page
    assert f"orpo-ray train {run_dir}/best.yaml" in page
    assert "one seed" in page
    assert "- 8m λ=0.5 lr=1.9e-03: step 0: worker group 8m-0 ended: [node 10.0.0.7] out of memory" in page
    assert "16 trials: 12 finished, 2 stopped early, 1 diverged, 1 failed." in page
    # 12 × 12.5 + 2 × 5 + 3.75 + 2.5 seconds; those of bundle 8m on two workers each
    assert "2.8 min of training, added up (4.0 min of worker time)" in page
    assert "Early stopping saved 300 of 3200 steps." in page
    assert all(f"]({plot})" in page for plot in plots)
    tables = [part.splitlines() for part in page.split("\n\n") if part.startswith("| ")]
    assert [len(table) for table in tables] == [
        2 + 6,
        2 + 4,
        2 + 16,
    ]  # the front, λ of the bundle that diverged, trials
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def test_the_best_setting_is_a_file_that_runs(tmp_path):
    config = sweep_config(SPACE)
    run_dir = run_dir_of(tmp_path, sixteen_trials())
    write_report(run_dir, config)
    best = load(run_dir / "best.yaml")
    assert (best.name, best.sweep) == ("toy-best", None)
    assert (best.model.path, best.scaling.num_workers) == ("tiny-llama-8m", 2)
    assert (best.loss.orpo_lambda, best.optim.lr) == (1.0, 3.1e-4 * 1.2)
    before = (run_dir / "best.yaml").read_bytes()
    assert "best.yaml" in (run_dir / "report.md").read_text()
    files = write_report(run_dir)  # later, without the config: what was written then is referred to
    assert run_dir / "best.yaml" not in files
    assert f"orpo-ray train {run_dir}/best.yaml" in (run_dir / "report.md").read_text()
    assert (run_dir / "best.yaml").read_bytes() == before
    assert yaml.safe_load(before)["optim"] == {"lr": 3.1e-4 * 1.2}


def test_a_single_run_has_curves_and_no_comparison(tmp_path):
    run_dir = run_dir_of(tmp_path, [({}, "", "finished")])
    files = write_report(run_dir, sweep_config(None).as_sweep()[0])
    assert [file.name for file in files] == ["report.html", "report.md", "curves.png", "best.yaml"]
    page = (run_dir / "report.md").read_text()
    assert "**Result.** `eval/preference_accuracy` = 0.6314" in page
    assert "1 trial: 1 finished." in page
    assert "How sure" not in page


@pytest.mark.parametrize(
    ("trials", "plots"),
    [
        (
            [({"optim.lr": lr}, "", "finished") for lr in (1e-4, 1e-3)],
            ["intervals.png", "metric_by_lr.png", "curves.png", "pareto.png"],
        ),
        (
            [({"loss.orpo_lambda": x}, "", "finished") for x in (0.0, 1.0)],
            ["intervals.png", "metric_by_lambda.png", "curves.png", "pareto.png"],
        ),
        (
            [({"optim.beta2": x}, "", "finished") for x in (0.9, 0.99)],
            ["intervals.png", "curves.png", "pareto.png"],
        ),
        ([({"optim.lr": lr}, "", "diverged") for lr in (1e-2, 1e-1)], ["metric_by_lr.png", "curves.png"]),
        ([({"optim.lr": lr}, "", "failed") for lr in (1e-2, 1e-1)], []),
        ([({"loss.orpo_lambda": x / 40, "optim.lr": 1e-3}, "", "stopped_early") for x in range(1, 41)], None),
    ],
)
def test_only_plots_that_the_axes_allow(tmp_path, trials, plots):
    run_dir = run_dir_of(tmp_path, trials)
    written = [file.name for file in write_report(run_dir) if file.suffix == ".png"]
    assert written == (plots if plots is not None else ["metric_by_lambda.png", "curves.png"])
    page = (run_dir / "report.md").read_text()
    assert ("No trial has a value" in page) == all(status in ("diverged", "failed") for *_, status in trials)


def seeded(seeds=(1, 2, 3), lambdas=(0.1, 1.0)):
    return [({"loss.orpo_lambda": x, "train.seed": s}, "", "finished") for x in lambdas for s in seeds]


def test_seeds_are_summarised_per_setting(tmp_path):
    run_dir = run_dir_of(tmp_path, [*seeded(), ({"loss.orpo_lambda": 0.1, "train.seed": 4}, "", "failed")])
    write_report(run_dir)
    page = (run_dir / "report.md").read_text()
    section = page.split("## Over seeds")[1].split("##")[0]
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in section.splitlines() if "λ" in line}
    assert [*rows] == ["λ=1", "λ=0.1"]  # best first; the seed is not part of a setting
    frame = load_runs_frame(load_results(run_dir))
    mine = frame[(frame["loss.orpo_lambda"] == 0.1) & (frame["status"] == "finished")]
    mean, half = mean_interval(mine[METRIC].tolist())
    assert rows["λ=0.1"][0].strip() == "3"
    assert rows["λ=0.1"][1].strip() == f"{mean:.4f} ± {half:.4f}"
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    changes = []
    for trial_id in mine["trial_id"]:
        values = [
            e["metrics"]["eval/rejected_logp"] for e in events if e["event"] == "eval" and e["trial_id"] == trial_id
        ]
        changes.append(values[-1] - values[0])
    mean, half = mean_interval(changes)
    assert rows["λ=0.1"][-1].strip() == f"{mean:+.4f} ± {half:.4f}"
    assert "over the seeds that finished" in page.split("metric_by_lambda.png)")[1]


def test_a_reward_model_has_no_columns_of_log_probabilities(tmp_path):
    run_dir = run_dir_of(tmp_path, seeded())
    text = (run_dir / "events.jsonl").read_text()
    events = [json.loads(line) for line in text.splitlines()]
    for event in events:
        if "metrics" in event:
            event["metrics"] = {METRIC: event["metrics"][METRIC]}
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    write_results(run_dir / "results.json", summarize("toy", METRIC, "max", as_state(events)))
    write_report(run_dir, formats=("md",))
    page = (run_dir / "report.md").read_text()
    assert section(page, "Trials").splitlines()[4] == f"| trial | {METRIC} | steps | seconds | status |"
    assert f"| setting | seeds | {METRIC} |" in section(page, "Over seeds").splitlines()


def test_the_winner_is_compared_with_the_next_seed_by_seed(tmp_path):
    run_dir = run_dir_of(tmp_path, seeded())
    write_report(run_dir)
    frame = load_runs_frame(load_results(run_dir)).set_index("train.seed")
    one, tenth = (frame[frame["loss.orpo_lambda"] == x][METRIC] for x in (1.0, 0.1))
    mean, half = mean_interval((one - tenth).tolist())
    page = (run_dir / "report.md").read_text()
    assert f"{mean:+.4f} ± {half:.4f} (95 % t-interval over 3 seeds): more than the seed explains" in page
    write_report(run_dir_of(tmp_path, seeded(seeds=(1, 2), lambdas=(0.1, 0.1001))))
    assert "no more than the seed may explain" in (run_dir / "report.md").read_text()


def confirmed_sweep(run_dir, metric="eval/nll", confirm=True):
    """λ × lr with per-pair files; high learning rates diverge, the two best settings are trained with fresh seeds."""
    rng = np.random.default_rng(0)
    pair_N, trials = rng.normal(size=300), []

    def add(params, purpose="search"):
        lam, lr = params["loss.orpo_lambda"], params["optim.lr"]
        trial_id = f"t{len(trials):02d}"
        if lr > 3e-3 / (1 + lam):
            trials.append(made_trial(trial_id, params, None, "diverged", purpose))
            return
        goodness = 1 - abs(math.log10(lr / 1e-3))
        odds = 0.8 * lam * goodness + pair_N + 0.3 * rng.normal(size=300)
        nll = 2.5 - goodness + 0.4 * lam**2 + 0.1 * pair_N + 0.02 * rng.normal() + 0.1 * rng.normal(size=300)
        scores = pair_scores(odds, nll)
        write_pairs(run_dir, trial_id, scores)
        trials.append(made_trial(trial_id, params, scores, purpose=purpose))

    for lam in (0.0, 0.1, 0.5, 1.0):
        for lr in (3e-4, 5e-4, 1e-3, 2e-3, 4e-3):
            add({"loss.orpo_lambda": lam, "optim.lr": lr})
    if confirm:
        for lam in (0.0, 0.1):
            for seed in (43, 44, 45):
                add({"loss.orpo_lambda": lam, "optim.lr": 1e-3, "train.seed": seed}, "confirm")
    results = {"name": "toy", "metric": metric, "mode": METRIC_MODES[metric], "best": trials[2], "trials": trials}
    write_results(run_dir / "results.json", results | {"winners": summarize_winners(results, run_dir)})
    return load_results(run_dir)


def section(page, title):
    return page.split(f"## {title}")[1].split("\n## ")[0]


def rows_of(text):
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    return {name: values for name, *values in cells[2:]}


def test_the_answer_comes_first_with_its_interval_and_the_tied(tmp_path):
    results = confirmed_sweep(tmp_path)
    config = sweep_config(
        SPACE | {"optim.lr": {"type": "grid", "values": [1e-3]}, "train.seed": {"type": "grid", "values": [43, 44, 45]}}
    )
    files = {file.name for file in write_report(tmp_path, config)}
    assert {"pareto.png", "divergence.png"} < files
    page = (tmp_path / "report.md").read_text()
    best, second = results["winners"]["settings"]
    assert page.startswith(
        f"# toy\n\n**Best: {best['name']}.** `eval/nll` = {best['mean']:.4f} [{best['low']:.4f}, {best['high']:.4f}] "
        "(lower is better) after 1 steps, mean of 3 seeds."
    )
    assert f"Checkpoint of its best run: `{results['winners']['best']['checkpoint']}`" in page
    sure = section(page, "How sure")
    assert "cover the choice of the 300 held-out pairs and of the seeds." in sure
    rows = rows_of(sure)
    assert [*rows] == [f"**{best['name']}**" if best["tied"] else best["name"], *[*rows][1:]]
    assert rows[f"**{best['name']}**"] == [
        "3",
        f"{best['mean']:.4f}",
        f"{best['low']:.4f} to {best['high']:.4f}",
        "–",
        "–",
        "yes",
    ]
    mine = rows[f"**{second['name']}**" if second["tied"] else second["name"]]
    assert mine[3:] == [
        f"{second['difference']:+.4f}",
        f"{second['difference_low']:+.4f} to {second['difference_high']:+.4f}",
        "yes" if second["tied"] else "no",
    ]
    assert f"**Selection bias.** {results['winners']['selection_bias']['sentence']}" in sure
    order = [
        page.index(f"## {title}") for title in ("How sure", "Cost", "Likelihood", "Where training", "Trials", "Over")
    ]
    assert order == sorted(order)
    # The best run of the best setting, not the trial with the best score of all.
    star = [line for line in text_of(results_table(results)).splitlines() if "★" in line]
    assert len(star) == 1
    assert best["name"] in star[0]
    assert load(tmp_path / "best.yaml").loss.orpo_lambda == best["params"]["loss.orpo_lambda"]


def test_one_seed_each_says_what_the_intervals_leave_out(tmp_path):
    results = confirmed_sweep(tmp_path, confirm=False)
    write_report(tmp_path)
    sure = section((tmp_path / "report.md").read_text(), "How sure")
    assert "cover the choice of the 300 held-out pairs only. Every setting was trained with one seed" in sure
    tied = results["winners"]["tied"]
    assert [name.strip("*") for name in rows_of(sure) if name.startswith("**")] == tied
    assert len(rows_of(sure)) == len(tied) + min(12, len(results["winners"]["settings"]) - len(tied))
    if len(tied) == 1:
        assert "**One clear winner**" in sure
    else:
        assert f"**{len(tied)} of {len(results['winners']['settings'])} settings are tied for the best**" in sure


def test_the_front_and_the_divergence_boundary_are_tables(tmp_path):
    results = confirmed_sweep(tmp_path)
    write_report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    front = [row for row in results["winners"]["pareto"]["settings"] if row["on_front"]]
    rows = rows_of(section(page, "Likelihood against preference"))
    assert [*rows] == [f"{place}. {row['name']}" for place, row in enumerate(front, start=1)]
    for row, cells in zip(front, rows.values(), strict=True):
        often = f"{row['frequency']:.0%}" + (", uncertain" if row["uncertain"] else "")
        assert cells == [f"{row['cost']:.4f}", f"{row['accuracy']:.4f}", often]
    rows = rows_of(section(page, "Where training diverges"))
    # lr 4e-3 diverges at every λ, 2e-3 where 3e-3 / (1 + λ) is below it.
    assert {lam: cells[:4] for lam, cells in rows.items()} == {
        "0": ["7", "1", "2.0e-03", "4.0e-03"],
        "0.1": ["7", "1", "2.0e-03", "4.0e-03"],
        "0.5": ["4", "1", "2.0e-03", "4.0e-03"],
        "1": ["3", "2", "1.0e-03", "2.0e-03"],
    }
    limits = [float(cells[4]) for cells in rows.values()]
    assert limits == sorted(limits, reverse=True)
    assert "## Where training diverges" not in page.split("## Trials")[1]


def test_a_setting_that_went_wrong_does_not_squeeze_the_others(tmp_path):
    nlls = [2.0 + i / 10 for i in range(8)] + [30.0]
    trials = [
        made_trial(f"t{i}", {"optim.beta2": i / 10}, pair_scores(np.full(4, nll if nll < 30 else -1.0), nll))
        for i, nll in enumerate(nlls)
    ]
    results = {"name": "toy", "metric": "eval/nll", "mode": "min", "best": trials[0], "trials": trials}
    write_results(tmp_path / "results.json", results)
    write_report(tmp_path)
    caption = (tmp_path / "report.md").read_text().split("plots/pareto.png)")[1]
    assert "1 far worse setting is outside the picture" in caption


def test_without_per_pair_files_the_page_says_so(tmp_path):
    write_report(run_dir_of(tmp_path, seeded()))
    sure = section((tmp_path / "report.md").read_text(), "How sure")
    assert sure.strip().startswith("No intervals: per-pair file of trial t00 missing.")
    assert "by how much is not known" in sure


def test_accuracy_is_summed_up_whatever_ranks(tmp_path):
    run_dir = run_dir_of(tmp_path, seeded(), metric="eval/log_odds")
    write_report(run_dir)
    page = (run_dir / "report.md").read_text()
    titles = next(line for line in section(page, "Over seeds").splitlines() if line.startswith("| setting"))
    column = [title.strip() for title in titles.strip("|").split("|")].index(METRIC) - 1
    frame = load_runs_frame(load_results(run_dir))
    mean, half = mean_interval(frame[frame["loss.orpo_lambda"] == 0.1][METRIC].tolist())
    assert rows_of(section(page, "Over seeds"))["λ=0.1"][column] == f"{mean:.4f} ± {half:.4f}"


def test_intervals_are_student_t():
    assert mean_interval([2.0]) == (2.0, None)
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t(0.975, 2) from tables


def test_a_report_needs_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sweep has run here"):
        write_report(tmp_path)


def under_way(tmp_path, events):
    config = sweep_config(SPACE).as_sweep()[0].model_dump(mode="json")
    (tmp_path / "sweep.json").write_text(json.dumps({"sweep_id": "x", "config": config}))
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_a_report_of_a_sweep_under_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ended = ("t00", "t01", "t02")
    events = [e for e in synthetic_sweep(sixteen_trials()) if e["event"] != "finished" or e["trial_id"] in ended]
    under_way(tmp_path, [e for e in events if e["trial_id"] < "t08"])
    assert main(["report", str(tmp_path)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines() if "lr=" in line]
    assert [words[-1] for words in table] == 2 * ["finished"] + 5 * ["unfinished"] + ["early"]
    page = (tmp_path / "report.md").read_text()
    assert "5 of 8 trials submitted so far have not ended" in page
    assert "**Best so far: 2m λ=0 lr=1.7e-03.**" in page
    assert "8 trials: 2 finished, 5 unfinished, 1 stopped early." in page
    assert "**Failed**" not in page
    assert all((tmp_path / "plots" / f"{name}.png").exists() for name in ("intervals", "heat_maps", "curves"))


def test_a_report_of_a_sweep_that_has_only_begun(tmp_path):
    under_way(tmp_path, [])
    assert [file.name for file in write_report(tmp_path)] == ["report.html", "report.md", "experiment.yaml"]
    page = (tmp_path / "report.md").read_text()
    assert "0 of 0 trials submitted so far have not ended" in page
    assert "- 0 trials.\n" in page


def test_plots_leave_pyplot_and_its_settings_alone(tmp_path):
    run_dir_of(tmp_path, sixteen_trials())
    script = f"""
import sys
from orpo_ray.reports.report import write_report
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()
write_report({str(tmp_path)!r})
assert matplotlib.rcParams.copy() == before
print(sorted({{"matplotlib.pyplot", "mlflow", "ray", "torch"}} & {{*sys.modules}}))
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_the_same_sweep_gives_the_same_page_and_plots(tmp_path):
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files = write_report(run_dir_of(tmp_path / name, sixteen_trials()))
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]
