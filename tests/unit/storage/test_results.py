import json
import math
import os

import pytest

from orpo_ray.storage.journal import read_events
from orpo_ray.storage.results import current, load_results, summarize
from orpo_ray.storage.run_dir import write_results
from tests.support.events import as_event, as_state

METRIC = "eval/preference_accuracy"


def submitted(trial_id, time=1, **params):
    return {"event": "submitted", "trial_id": trial_id, "params": params, "bundle": "2m", "time": time}


def started(trial_id, attempt=0, step=0):
    return {
        "event": "started",
        "trial_id": trial_id,
        "attempt": attempt,
        "group": "2m-0",
        "step": step,
        "max_steps": 20,
        "time": 2,
    }


def evaluated(trial_id, step, value, checkpoint=None):
    metrics = {METRIC: value}
    return {
        "event": "eval",
        "trial_id": trial_id,
        "step": step,
        "metrics": metrics,
        "checkpoint": checkpoint,
        "time": 3,
    }


def finished(trial_id, status, value, steps=20, error=None):
    return {
        "event": "finished",
        "trial_id": trial_id,
        "status": status,
        "steps": steps,
        "metrics": {} if value is None else {METRIC: value},
        "checkpoint": f"/ckpt/{trial_id}",
        "train_seconds": 1.5,
        "error": error,
        "time": 4,
    }


def test_best_is_a_finished_trial_though_others_score_higher():
    events = [submitted(t) for t in ("a", "b", "c", "d")]
    events += [
        finished("d", "diverged", 0.99, error="not finite"),
        finished("c", "stopped_early", 0.95, steps=5),
        finished("b", "finished", 0.7),
        finished("a", "finished", 0.6),
    ]
    results = summarize("s", METRIC, "max", as_state(events), {"b": "run-b"})
    assert [t["trial_id"] for t in results["trials"]] == ["a", "b", "c", "d"]  # as submitted, not as ended
    assert results["best"] == {
        "trial_id": "b",
        "bundle": "2m",
        "params": {},
        "purpose": "search",  # where the journal does not say
        "status": "finished",
        "forks": [],
        "reused_from": None,
        "attempts": 0,
        "steps": 20,
        "metrics": {METRIC: 0.7},
        "checkpoint": "/ckpt/b",
        "mlflow_run_id": "run-b",
        "train_seconds": 1.5,
        "error": None,
    }
    assert summarize("s", METRIC, "min", as_state(events))["best"]["trial_id"] == "a"


def test_a_confirmation_is_marked_as_such():
    events = [submitted("a"), submitted("b") | {"purpose": "confirm"}]
    trials = summarize("s", METRIC, "max", as_state(events))["trials"]
    assert [trial["purpose"] for trial in trials] == ["search", "confirm"]


def test_best_falls_back_to_stopped_early_but_never_to_diverged_or_failed():
    events = [submitted("a"), submitted("b"), finished("a", "stopped_early", 0.5), finished("b", "failed", 0.9)]
    assert summarize("s", METRIC, "max", as_state(events))["best"]["trial_id"] == "a"
    assert summarize("s", METRIC, "max", as_state([*events[:2], finished("b", "diverged", 0.9)]))["best"] is None


def test_a_nan_metric_is_null_and_never_best():
    events = [submitted("a"), submitted("b"), finished("a", "finished", math.nan), finished("b", "finished", 0.1)]
    results = summarize("s", METRIC, "max", as_state(events))
    assert results["trials"][0]["metrics"] == {METRIC: None}
    assert results["best"]["trial_id"] == "b"


def test_a_trial_without_an_end_failed_with_what_it_had():
    events = [
        submitted("a"),
        started("a"),
        evaluated("a", 5, 0.4, "/ckpt/5"),
        evaluated("a", 10, 0.5),
        {"event": "log", "trial_id": "a", "step": 12, "metrics": {"train/loss": 1.0}, "time": 3},
        {"event": "retry", "trial_id": "a", "attempt": 1, "failures": 1, "error": "worker died", "time": 3},
        started("a", attempt=1, step=5),
    ]
    (trial,) = summarize("s", METRIC, "max", as_state(events))["trials"]
    assert (trial["status"], trial["error"]) == ("failed", "did not finish")
    assert (trial["steps"], trial["attempts"]) == (12, 2)
    assert (trial["metrics"], trial["checkpoint"]) == ({METRIC: 0.5}, "/ckpt/5")
    assert trial["train_seconds"] is None


def test_a_pause_is_no_new_attempt():
    events = [submitted("a"), started("a"), started("a", step=5), finished("a", "finished", 0.5)]
    assert summarize("s", METRIC, "max", as_state(events))["trials"][0]["attempts"] == 1


def test_refuses_events_without_a_submission_and_unknown_modes():
    with pytest.raises(ValueError, match="'finished' of trial a comes before its submission"):
        summarize("s", METRIC, "max", as_state([finished("a", "finished", 0.5)]))
    with pytest.raises(ValueError, match="mode must be max or min, got 'best'"):
        summarize("s", METRIC, "best", as_state([]))


@pytest.mark.parametrize("tail", ['{"event": "log", "trial_', '{"event": "retry", "error": "λ'.encode()[:-1], "{\n"])
def test_a_torn_last_line_is_left_out(tmp_path, tail):
    path = tmp_path / "events.jsonl"
    whole = json.dumps(submitted("a")).encode() + b"\n"
    path.write_bytes(whole + (tail if isinstance(tail, bytes) else tail.encode()))
    assert read_events(path) == [as_event(submitted("a"))]


@pytest.mark.parametrize("broken", ['{"event": "log", "tr', "17", "{}"])
def test_a_broken_line_elsewhere_is_an_error_with_its_number(tmp_path, broken):
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join([json.dumps(submitted("a")), broken, json.dumps(started("a"))]))
    with pytest.raises(ValueError, match=r"events.jsonl, line 2: .*damaged"):
        read_events(path)


def test_no_journal_no_events(tmp_path):
    assert read_events(tmp_path / "events.jsonl") == []


def test_written_results_are_valid_json_and_read_back(tmp_path):
    path = tmp_path / "run" / "results.json"
    write_results(path, {"name": "λ", "trials": [{"metrics": {"x": math.inf, "y": 1.0}}]})
    write_results(path, {"name": "λ", "trials": [{"metrics": {"x": math.nan, "y": 2.0}}]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["trials"] == [{"metrics": {"x": None, "y": 2.0}}]
    assert load_results(path.parent)["name"] == "λ"
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_missing_results_say_whether_the_sweep_has_begun(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sweep has run here"):
        load_results(tmp_path)
    (tmp_path / "events.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="run the same command again"):
        load_results(tmp_path)


def begun(run_dir, events, metric="eval/nll"):
    # No ExperimentConfig: sft with another λ than 0 is refused today.
    config = {"name": "s", "loss": {"name": "sft", "orpo_lambda": 0.1}, "sweep": {"metric": metric}}
    (run_dir / "sweep.json").write_text(json.dumps({"sweep_id": "x", "config": config}))
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_current_results_of_a_sweep_under_way(tmp_path):
    events = [submitted(t) for t in ("a", "b", "c", "d")]
    events += [started("a"), finished("a", "finished", 0.7), started("b"), evaluated("b", 5, 0.9)]
    events += [finished("c", "failed", None, error="boom")]
    begun(tmp_path, events, METRIC)
    results = current(tmp_path)
    assert (results["name"], results["metric"], results["mode"]) == ("s", METRIC, "max")
    assert [(t["trial_id"], t["status"], t["error"]) for t in results["trials"]] == [
        ("a", "finished", None),
        ("b", "unfinished", None),
        ("c", "failed", "boom"),
        ("d", "unfinished", None),
    ]
    assert results["trials"][1]["metrics"] == {METRIC: 0.9}
    assert results["best"]["trial_id"] == "a"  # not b, which is ahead but has not ended
    begun(tmp_path, [])
    assert (current(tmp_path)["mode"], current(tmp_path)["trials"]) == ("min", [])


def test_current_results_of_a_sweep_that_was_interrupted_ended_and_went_on(tmp_path):
    events = [submitted("a"), submitted("b"), finished("a", "finished", 0.7)]
    begun(tmp_path, events, METRIC)
    results = tmp_path / "results.json"
    write_results(results, summarize("s", METRIC, "max", as_state(events), {"a": "run-a"}))
    assert current(tmp_path) == load_results(tmp_path)  # with its MLflow ids
    at = results.stat().st_mtime_ns
    begun(tmp_path, [*events, started("b"), finished("b", "finished", 0.8)], METRIC)
    os.utime(tmp_path / "events.jsonl", ns=(at + 1, at + 1))
    assert current(tmp_path)["best"]["trial_id"] == "b"
    os.utime(tmp_path / "events.jsonl", ns=(at, at))
    assert current(tmp_path)["best"]["trial_id"] == "a"


def test_current_results_need_a_sweep(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sweep has run here"):
        current(tmp_path)
