"""Real MLflow throughout: SQLite, and a server that is killed and started again."""

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, ENDPOINT_NOT_FOUND, PERMISSION_DENIED

from orpo_ray.config import load, parse
from orpo_ray.storage.events import KINDS
from orpo_ray.storage.results import summarize
from orpo_ray.tracking import delivery, run_values, sweep_tracker
from orpo_ray.tracking.delivery import is_temporary
from orpo_ray.tracking.parent_run import ParentRun
from orpo_ray.tracking.sweep_tracker import SweepTracker
from orpo_ray.tracking.uri import TrackingError, probe, resolve_uri, ui_command
from tests.support.events import as_event, as_state

METRIC = "eval/preference_accuracy"
PROVENANCE = {
    "command": "orpo-ray sweep x.yaml tracking.uri=http://me:secret@host",
    "packages": {"orpo-ray": "0.1.0"},
    "git": {"commit": "c" * 40, "dirty": True, "diff": "--- a\n+++ b\n", "untracked": []},
}


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """Its migrations take seconds: made once, copied."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def output_dir(tmp_path, empty_database, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "")  # so that what `start` sets is undone
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").write_bytes(empty_database)
    return tmp_path / "runs"


def sweep_config(output_dir, uri=None):
    return parse(
        {
            "name": "toy",
            "output_dir": str(output_dir),
            "model": {"path": "tiny-llama-2m"},
            "data": {"path": "builtin://style-pairs"},
            "train": {"max_steps": 20, "eval_every": 10},
            "tracking": {"experiment": "test", "uri": uri},
            "sweep": {
                "space": {
                    "loss.orpo_lambda": {"type": "grid", "values": [0.0, 0.1]},
                    "optim.lr": {"type": "loguniform", "low": 1e-4, "high": 1e-3},
                    "size": {
                        "type": "bundle",
                        "values": {
                            "2m": {"model.path": "tiny-llama-2m"},
                            "8m": {"model.path": "tiny-llama-8m", "deepspeed.zero_stage": 1},
                        },
                    },
                }
            },
        }
    )


def replace_client(tracker, client):
    """Put another client in the place of the one that the tracker started with."""
    tracker._parent._client = tracker._children._client = client


def typed(events):
    return [as_event(event) for event in events]


def event(kind, trial_id, at, **details):
    return {"event": kind, "trial_id": trial_id, **details, "time": 1_700_000_000_000 + at}


def life(trial_id, status="finished", error=None, lam=0.1, steps=20):
    """A trial's events: two logs and an evaluation per ten steps."""
    params = {"loss.orpo_lambda": lam, "optim.lr": 8.0e-4, "size": "8m"}
    facts = {"model/parameters": 8_000_000, "forward/rows": "padded", "forward/fallback": "it does attention itself"}
    facts |= {
        "data/train_pairs": 90,
        "data/train_digest": "a" * 64,
        "data/eval_pairs": 10,
        "data/eval_digest": "b" * 64,
    }
    events = [
        event("submitted", trial_id, 0, params=params, bundle="8m"),
        event("started", trial_id, 1, attempt=0, group="8m-0", step=0, max_steps=20, facts=facts),
    ]
    for step in range(5, steps + 1, 5):
        metrics = {"train/loss": 2.0 - step / 100, "perf/pairs_per_second": 10.0}
        events.append(event("log", trial_id, 10 * step, step=step, metrics=metrics))
        if step % 10 == 0:
            held_out = {METRIC: step / 40, "eval/nll": 2.0}
            events.append(event("eval", trial_id, 10 * step + 1, step=step, metrics=held_out, checkpoint=f"/c/{step}"))
    metrics = {METRIC: steps / 40, "eval/nll": 2.0}
    end = {"steps": steps, "metrics": metrics, "checkpoint": f"/c/{steps}", "train_seconds": 3.5, "error": error}
    return [*events, event("finished", trial_id, 1000, status=status, **end)]


def summary(events, tracker):
    return summarize("toy", METRIC, "max", as_state(events), tracker.run_ids)


def points(client, run_id, key):
    return [(m.step, m.timestamp - 1_700_000_000_000, m.value) for m in client.get_metric_history(run_id, key)]


def test_a_sweep_becomes_a_parent_run_with_a_child_per_trial(output_dir):
    config = sweep_config(output_dir)
    tracker = SweepTracker(config, "sweep-1", PROVENANCE)
    assert tracker.uri == f"sqlite:///{output_dir}/mlflow.db"
    parent_id = tracker.start()
    events = [
        *life("t0"),
        *life("t1", "stopped_early", lam=0.0, steps=10),
        *life("t2", "diverged", error="not finite at step 10", steps=10),
        *life("t3", "failed", error="out of memory", steps=10),
    ]
    tracker.handle(typed(events))
    assert tracker.flush() == 0
    results = summary(events, tracker)
    plot = config.run_dir / "plots" / "a.png"
    plot.parent.mkdir(parents=True)
    plot.write_bytes(b"png")
    (config.run_dir / "results.json").write_text("{}")
    tracker.attach([config.run_dir / "results.json", plot])
    assert tracker.close(results) == 0

    client = MlflowClient(tracker.uri)
    parent = client.get_run(parent_id)
    assert (parent.info.run_name, parent.info.status) == ("toy", "FINISHED")
    assert parent.data.tags["orpo_ray.sweep_id"] == "sweep-1"
    assert parent.data.tags["mlflow.source.git.commit"] == "c" * 40
    assert parent.data.tags["mlflow.source.name"] == "orpo-ray sweep x.yaml tracking.uri=http://host"
    assert parent.data.tags["mlflow.user"]
    assert parent.data.tags["best_run_id"] == tracker.run_ids["t0"]
    assert parent.data.tags["best.optim.lr"] == "0.0008"
    assert parent.data.metrics["final/preference_accuracy"] == 0.5
    assert parent.data.params["train.max_steps"] == "20"
    swept = {"optim.lr", "loss.orpo_lambda", "model.path", "deepspeed.zero_stage"}
    assert not swept & parent.data.params.keys()
    assert parent.data.params["sweep.space.optim.lr"] == '{"type": "loguniform", "low": 0.0001, "high": 0.001}'
    artifacts = {f.path for folder in ("", "plots") for f in client.list_artifacts(parent_id, folder)}
    assert artifacts == {"config.yaml", "provenance.json", "git.diff", "results.json", "plots", "plots/a.png"}
    assert parent.info.artifact_uri.startswith(f"file://{output_dir}/mlartifacts/")
    written = client.download_artifacts(parent_id, "config.yaml", str(output_dir))
    assert load(written) == config

    run = client.get_run(tracker.run_ids["t0"])
    assert run.info.run_name == "8m λ=0.1 lr=8.0e-04"
    assert run.data.tags["mlflow.parentRunId"] == parent_id
    assert run.data.tags["orpo_ray.trial_id"] == "t0"
    assert run.data.params["forward.rows"] == "padded"
    assert run.data.tags["orpo_ray.fallback"] == "it does attention itself"
    expected = {"loss.orpo_lambda": "0.1", "optim.lr": "0.0008", "size": "8m", "model.path": "tiny-llama-8m"}
    expected |= {"deepspeed.zero_stage": "1", "model.parameters": "8000000", "train.epochs": "null"}
    expected |= {"axes.loss.orpo_lambda": "0.1", "axes.optim.lr": "0.0008", "axes.size": "8m"}
    assert expected.items() <= run.data.params.items()
    assert (run.info.start_time, run.info.end_time) == (1_700_000_000_000, 1_700_000_001_000)
    assert points(client, run.info.run_id, METRIC) == [(10, 101, 0.25), (20, 201, 0.5)]
    assert points(client, run.info.run_id, "train/loss")[0] == (5, 50, 1.95)
    final = {k: v for k, v in run.data.metrics.items() if k.startswith("final/")}
    expected_final = {"final/nll": 2.0, "final/preference_accuracy": 0.5}
    assert final == expected_final | {"final/steps": 20.0, "final/train_seconds": 3.5}

    for described in (parent, run):
        inputs = [(i.dataset, i.tags[0].key, i.tags[0].value) for i in described.inputs.dataset_inputs]
        assert [(d.name, d.digest, d.profile, *tag) for d, *tag in inputs] == [
            ("builtin://style-pairs", "a" * 32, '{"num_rows": 90}', "mlflow.data.context", "training"),
            ("builtin://style-pairs", "b" * 32, '{"num_rows": 10}', "mlflow.data.context", "evaluation"),
        ]
    assert run.data.tags["orpo_ray.checkpoint"] == "/c/20"
    (model,) = client.search_logged_models([run.info.experiment_id])  # only of the one that finished
    assert (model.source_run_id, model.name, model.status) == (run.info.run_id, "toy-t0", "READY")
    assert model.tags["orpo_ray.checkpoint"] == "/c/20"
    assert model.tags["mlflow.model.isExternal"] == "true"
    assert model.params["optim.lr"] == "0.0008"
    assert {m.key: m.value for m in model.metrics}["final/preference_accuracy"] == 0.5
    assert "**Finished** after 20 steps, 3.5 s." in run.data.tags["mlflow.note.content"]
    link = f"#/experiments/{run.info.experiment_id}/runs"
    assert f"[toy]({link}/{parent_id})" in run.data.tags["mlflow.note.content"]
    command = "orpo-ray train x.yaml tracking.uri=http://host name=toy-t0"
    assert command in run.data.tags["mlflow.note.content"]
    assert f"({link}/{run.info.run_id})" in parent.data.tags["mlflow.note.content"]
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experiment.primaryMetric.name"] == "final/preference_accuracy"
    assert experiment.tags["mlflow.experiment.primaryMetric.greaterIsBetter"] == "True"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"

    ends = {t: client.get_run(tracker.run_ids[t]) for t in ("t0", "t1", "t2", "t3")}
    assert "Not ended" not in "".join(r.data.tags["mlflow.note.content"] for r in ends.values())
    assert [r.info.status for r in ends.values()] == ["FINISHED", "KILLED", "FAILED", "FAILED"]
    assert [r.data.tags["orpo_ray.status"] for r in ends.values()] == [
        "finished",
        "stopped_early",
        "diverged",
        "failed",
    ]
    assert [r.data.tags.get("orpo_ray.diverged") for r in ends.values()] == [None, None, "true", None]
    assert ends["t3"].data.tags["orpo_ray.error"] == "out of memory"
    assert ends["t1"].data.params["loss.orpo_lambda"] == "0.0"


def test_feeding_the_journal_again_after_a_restart_writes_nothing_twice(output_dir):
    config = sweep_config(output_dir)
    events = [*life("t0"), *life("t1")]
    cut = len(events) - 3  # t1 is interrupted before its last log, evaluation and end
    first = SweepTracker(config, "sweep-1", PROVENANCE)
    parent_id = first.start()
    first.handle(typed(events[:cut]))
    first.handle(typed(events[:cut]))
    assert first.close(summary(events[:cut], first), interrupted=True) == 0
    client = MlflowClient(first.uri)
    assert [client.get_run(r).info.status for r in (parent_id, *first.run_ids.values())] == [
        "KILLED",
        "FINISHED",
        "KILLED",
    ]

    second = SweepTracker(config, "sweep-1", PROVENANCE)
    assert second.start() == parent_id
    retry = event("retry", "t1", 500, attempt=1, failures=1, error="worker died")
    checkpoint = {"step": 15, "checkpoint": "c"}
    again = [
        *events[:cut],
        retry,
        event("preempted", "t1", 501, attempt=2, **checkpoint),
        event("paused", "t1", 502, held=False, **checkpoint),
        event("warning", "t1", 503, message="no checkpoint of step 15"),
        *events[cut:],
    ]
    second.handle(typed(again))
    assert second.flush() == 0
    assert second.run_ids == first.run_ids
    assert second.close(summary(again, second)) == 0
    third = SweepTracker(config, "sweep-1", PROVENANCE)  # the same command, once more, with nothing left to do
    third.start()
    third.handle(typed(again))
    assert third.close(summary(again, third)) == 0
    assert [client.get_run(r).info.status for r in (parent_id, *first.run_ids.values())] == 3 * ["FINISHED"]
    assert client.get_run(second.run_ids["t1"]).data.tags["orpo_ray.last_retry"] == "worker died"
    for run_id in second.run_ids.values():
        assert points(client, run_id, METRIC) == [(10, 101, 0.25), (20, 201, 0.5)]
        assert [step for step, _, _ in points(client, run_id, "train/loss")] == [5, 10, 15, 20]
        assert len(points(client, run_id, "final/steps")) == 1
    assert len(points(client, parent_id, "final/steps")) == 1
    experiment = client.get_experiment_by_name("test").experiment_id
    assert len(client.search_runs([experiment])) == 3
    assert [f.path for f in client.list_artifacts(parent_id) if f.is_dir] == ["resumed"]


def test_every_kind_of_event_is_delivered(output_dir, caplog):
    """One that is refused would take along what is delivered together with it."""
    fields = {"metrics": {}, "params": {"optim.lr": 1e-4}, "donor": "t1", "error": "e", "attempt": 1, "step": 20}
    fields |= {"group": "g", "max_steps": 20, "checkpoint": None, "message": "m", "failures": 1}
    tracker = SweepTracker(sweep_config(output_dir), "sweep-1", PROVENANCE)
    tracker.start()
    begun = life("t0")[:-1]
    others = [kind for name, kind in KINDS.items() if name not in ("submitted", "finished")]
    every = [
        kind(trial_id="t0", **{f.name: fields[f.name] for f in dataclasses.fields(kind) if f.name in fields})
        for kind in others
    ]
    assert len(every) == 8
    tracker.handle([*typed(begun), *every])
    assert tracker.flush() == 0, caplog.text
    tracker.close(summary(begun, tracker), interrupted=True)


def test_after_a_restart_only_what_is_new_is_sent(output_dir):
    """The watermark: points below a run's last step stay home, so a long journal is soon caught up with."""
    config = sweep_config(output_dir)
    events = life("t0")[:-1]
    first = SweepTracker(config, "sweep-1", PROVENANCE)
    first.start()
    first.handle(typed(events))
    first.close(summary(events, first), interrupted=True)
    moved = [e | {"time": e["time"] + 7} if e["event"] == "log" and e["step"] < 20 else e for e in events]
    second = SweepTracker(config, "sweep-1", PROVENANCE)
    second.start()
    second.handle(typed(moved))
    second.close(summary(moved, second), interrupted=True)
    found = points(MlflowClient(second.uri), second.run_ids["t0"], "train/loss")
    assert [at for _, at, _ in found] == [50, 100, 150, 200]


def generated(config, trial_id):
    """The file in which the trial's worker keeps what its model answered."""
    rows = [{"step": step, "pair_id": "p:1", "prompt": "Hi?", "generated": f"é{step}"} for step in (10, 20)]
    folder = config.run_dir / "trials" / trial_id
    folder.mkdir(parents=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "generations.jsonl").write_text("".join(lines), encoding="utf-8")
    return {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}


def test_what_models_answered_is_a_table_once(output_dir):
    config = sweep_config(output_dir)
    table = generated(config, "t0")
    uploads = []

    class Counts(MlflowClient):
        def log_text(self, run_id, text, artifact_file):
            uploads.append(artifact_file)
            super().log_text(run_id, text, artifact_file)

    for _ in range(2):
        tracker = SweepTracker(config, "sweep-1", PROVENANCE)
        tracker.start()
        replace_client(tracker, Counts(tracker.uri))
        tracker.handle(typed([*life("t0"), *life("t1")]))  # t1 left no such file
        assert tracker.flush() == 0
        tracker.close(summary([*life("t0"), *life("t1")], tracker))
    assert uploads == ["generations.json"]
    client = MlflowClient(tracker.uri)
    written = client.download_artifacts(tracker.run_ids["t0"], "generations.json", str(output_dir))
    assert json.loads(Path(written).read_text(encoding="utf-8")) == table
    tags = [client.get_run(tracker.run_ids[t]).data.tags for t in ("t0", "t1")]
    assert json.loads(tags[0]["mlflow.loggedArtifacts"]) == [{"path": "generations.json", "type": "table"}]
    assert "mlflow.loggedArtifacts" not in tags[1]
    assert len(client.search_logged_models([client.get_run(tracker.parent_id).info.experiment_id])) == 2


def test_a_store_of_artifacts_that_fails_leaves_the_run_complete_and_is_tried_again(output_dir):
    config = sweep_config(output_dir)
    generated(config, "t0")

    class NoArtifacts(MlflowClient):
        def log_text(self, *args):
            raise ValueError("no credentials")

    tracker = SweepTracker(config, "sweep-1", PROVENANCE)
    tracker.start()
    replace_client(tracker, NoArtifacts(tracker.uri))
    tracker.handle(typed(life("t0")))
    assert tracker.flush() > 0
    client = MlflowClient(tracker.uri)
    assert client.get_run(tracker.run_ids["t0"]).info.status == "FINISHED"
    assert points(client, tracker.run_ids["t0"], METRIC) == [(10, 101, 0.25), (20, 201, 0.5)]
    tracker.close(summary(life("t0"), tracker))
    again = SweepTracker(config, "sweep-1", PROVENANCE)
    again.start()
    again.handle(typed(life("t0")))
    assert again.close(summary(life("t0"), again)) == 0
    assert [f.path for f in client.list_artifacts(again.run_ids["t0"])] == ["generations.json"]


def test_a_model_is_made_once_though_its_answer_is_lost(output_dir, monkeypatch):
    monkeypatch.setattr(delivery, "FIRST_BACKOFF_S", 0.1)

    class LosesAnswer(MlflowClient):
        lost = False

        def finalize_logged_model(self, *args):
            super().finalize_logged_model(*args)
            if not self.lost:
                self.lost = True
                raise MlflowException("connection reset by peer")

    tracker = SweepTracker(sweep_config(output_dir), "sweep-1", PROVENANCE)
    tracker.start()
    replace_client(tracker, LosesAnswer(tracker.uri))
    tracker.handle(typed(life("t0")))
    assert tracker.close(summary(life("t0"), tracker)) == 0
    client = MlflowClient(tracker.uri)
    (model,) = client.search_logged_models([client.get_run(tracker.parent_id).info.experiment_id])
    assert {m.key: m.value for m in model.metrics}["final/nll"] == 2.0


def test_a_server_that_knows_no_models_keeps_the_numbers(output_dir, caplog):
    """Servers before MLflow 3 refuse logged models; two sweeps at once may both create a data set."""

    class Refuses(MlflowClient):
        def create_logged_model(self, *args, **kwargs):
            raise MlflowException("no such endpoint", error_code=ENDPOINT_NOT_FOUND)

        def log_inputs(self, *args, **kwargs):
            raise MlflowException("UNIQUE constraint failed", error_code=BAD_REQUEST)

    tracker = SweepTracker(sweep_config(output_dir), "sweep-1", PROVENANCE)
    tracker.start()
    replace_client(tracker, Refuses(tracker.uri))
    tracker.handle(typed(life("t0")))
    assert tracker.close(summary(life("t0"), tracker)) == 0
    run = MlflowClient(tracker.uri).get_run(tracker.run_ids["t0"])
    assert (run.info.status, run.data.tags["orpo_ray.status"]) == ("FINISHED", "finished")
    assert run.data.metrics["final/nll"] == 2.0
    assert run.data.params["optim.lr"] == "0.0008"
    assert "MLflow refused the model of trial t0" in caplog.text
    assert "MLflow refused the data sets of a trial" in caplog.text


def test_metrics_of_the_nodes_go_on_where_they_ended(output_dir):
    for _ in range(2):
        tracker = SweepTracker(sweep_config(output_dir), "sweep-1", PROVENANCE)
        parent_id = tracker.start()
        for cpu in (10.0, 20.0):
            tracker.handle_system({"system/node_0/cpu_utilization_percentage": cpu})
        assert tracker.close(summary([], tracker)) == 0
    found = MlflowClient(tracker.uri).get_metric_history(parent_id, "system/node_0/cpu_utilization_percentage")
    assert [(m.step, m.value) for m in found] == [(1, 10.0), (2, 20.0), (3, 10.0), (4, 20.0)]


def test_sources_of_data_are_of_the_kinds_that_mlflow_reads(output_dir):
    import mlflow.data

    facts = life("t0")[1]["facts"]
    for path, kind in (
        ("builtin://style-pairs", "code"),
        ("/data/pairs.jsonl.gz", "local"),
        ("trl-lib/ultrafeedback", "hugging_face"),
    ):
        data = sweep_config(output_dir).data.model_copy(update={"path": path})
        training, evaluation = (i.dataset for i in run_values.dataset_inputs(data, facts))
        assert mlflow.data.get_source(training)._get_source_type() == kind
        assert training.name == ("pairs.jsonl.gz" if kind == "local" else path)
        assert (training.digest, evaluation.digest) == ("a" * 32, "b" * 32)


def test_who_may_not_write_is_told_at_once(output_dir, monkeypatch):
    class Refuses(MlflowClient):
        def get_experiment_by_name(self, name):
            raise MlflowException("no", error_code=PERMISSION_DENIED)

    monkeypatch.setattr(sweep_tracker, "MlflowClient", Refuses)
    began = time.monotonic()
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_PASSWORD"):
        SweepTracker(sweep_config(output_dir), "s", PROVENANCE).start()
    assert time.monotonic() - began < 3


def test_nan_is_logged_and_null_is_nan(output_dir):
    tracker = SweepTracker(sweep_config(output_dir), "sweep-1", PROVENANCE)
    tracker.start()
    submitted = life("t0")[0]
    log = event(
        "log", "t0", 5, step=1, metrics={"train/loss": math.nan, "train/nll": None, "train/grad_norm": math.inf}
    )
    tracker.handle(typed([submitted, log]))
    tracker.close(summary([submitted], tracker))
    metrics = MlflowClient(tracker.uri).get_run(tracker.run_ids["t0"]).data.metrics
    assert math.isnan(metrics["train/loss"])
    assert math.isnan(metrics["train/nll"])
    assert metrics["train/grad_norm"] > 1e300


def test_what_mlflow_refuses_is_counted_and_holds_up_nothing_else(output_dir, caplog):
    tracker = SweepTracker(sweep_config(output_dir), "sweep-1", PROVENANCE)
    tracker.start()
    good, stray = life("t0"), event("log", "never-submitted", 5, step=1, metrics={})
    tracker.handle(typed([stray, *good]))
    tracker.attach([output_dir / "no-such-file"])
    assert tracker.close(summary(good, tracker)) >= 2
    assert "comes before its submission" in caplog.text
    run = MlflowClient(tracker.uri).get_run(tracker.run_ids["t0"])
    assert run.info.status == "FINISHED"


def test_a_sweep_in_which_nothing_finished_failed(output_dir):
    tracker = SweepTracker(sweep_config(output_dir), "sweep-1", PROVENANCE)
    parent_id = tracker.start()
    events = [*life("t0", "failed", "boom"), life("t1")[0]]
    tracker.handle(typed(events))
    assert tracker.close(summary(events, tracker)) == 0
    client = MlflowClient(tracker.uri)
    assert client.get_run(parent_id).info.status == "FAILED"
    assert client.get_run(tracker.run_ids["t1"]).info.status == "FAILED"  # never RUNNING for ever


def test_a_single_run_is_a_sweep_of_one(output_dir):
    config, _ = sweep_config(output_dir).model_copy(update={"sweep": None}).as_sweep()
    tracker = SweepTracker(config, "sweep-1", PROVENANCE)
    parent_id = tracker.start()
    events = life("t0")
    events[0]["params"] = {}
    tracker.handle(typed(events))
    assert tracker.close(summary(events, tracker)) == 0
    client = MlflowClient(tracker.uri)
    assert client.get_run(tracker.run_ids["t0"]).info.run_name == "toy"
    assert client.get_run(parent_id).data.params["optim.lr"] == "8e-06"


def test_uris(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert resolve_uri(None, tmp_path) == "http://host:5000"
    assert resolve_uri("postgresql://u@h/db", tmp_path) == "postgresql://u@h/db"
    for relative in ("sqlite:///mlflow.db", "sqlite://", "mlruns", "./mlruns", "file:mlruns"):
        with pytest.raises(TrackingError, match="must be absolute"):
            resolve_uri(relative, tmp_path)
    assert ui_command("http://host:5000") == "http://host:5000"
    assert ui_command("sqlite:////a b/mlflow.db") == "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'"


def test_a_probe_says_what_is_wrong_and_creates_nothing(output_dir, tmp_path):
    assert probe(f"sqlite:///{output_dir}/mlflow.db") is None
    assert probe(f"sqlite:///{tmp_path}/not/there/mlflow.db") is None
    assert not (tmp_path / "not").exists()
    problem = probe(f"http://me:secret@127.0.0.1:{free_port()}")
    assert "127.0.0.1" in problem
    assert "secret" not in problem


def test_a_server_that_never_answers_stops_the_sweep_at_its_start(output_dir):
    tracker = SweepTracker(sweep_config(output_dir, f"http://me:secret@127.0.0.1:{free_port()}"), "s", PROVENANCE)
    with pytest.raises(TrackingError, match="cannot be used") as caught:
        tracker.start(timeout_s=0.5)
    assert "secret" not in str(caught.value)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextmanager
def mlflow_server(port, output_dir):
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{output_dir}/mlflow.db"]
    command += ["--artifacts-destination", str(output_dir / "artifacts")]
    with (output_dir / "server.log").open("ab") as output:
        # Its job runner is not needed, and takes most of the start.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        give_up = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (output_dir / "server.log").read_text()
                assert time.monotonic() < give_up, "the server did not come up in 60 s"
                time.sleep(0.1)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its own session: no one else's process
        server.wait()


def test_a_server_that_goes_away_and_comes_back_loses_and_doubles_nothing(output_dir, caplog, monkeypatch):
    monkeypatch.setattr(delivery, "LONGEST_BACKOFF_S", 1.0)
    port = free_port()
    config = sweep_config(output_dir, f"http://127.0.0.1:{port}")
    events = [*life("t0"), *life("t1")]
    tracker = SweepTracker(config, "sweep-1", PROVENANCE)
    with mlflow_server(port, output_dir):
        parent_id = tracker.start()
        tracker.handle(typed(events[:5]))
        assert tracker.flush(30) == 0
    began = time.monotonic()
    for one in events[5:]:
        tracker.handle(typed([one]))
    assert time.monotonic() - began < 0.1  # nobody waits for a server that is away
    assert tracker.flush(2.5) == len(events) - 5
    assert caplog.text.count("MLflow cannot be reached") == 1
    with mlflow_server(port, output_dir):
        (output_dir / "results.json").write_text("{}")
        tracker.attach([output_dir / "results.json"])
        assert tracker.flush(40) == 0
        assert tracker.close(summary(events, tracker)) == 0
        client = MlflowClient(config.tracking.uri)
        for run_id in tracker.run_ids.values():
            assert points(client, run_id, METRIC) == [(10, 101, 0.25), (20, 201, 0.5)]
            assert [step for step, _, _ in points(client, run_id, "train/loss")] == [5, 10, 15, 20]
        runs = client.search_runs([client.get_run(parent_id).info.experiment_id])
        assert sorted(run.info.status for run in runs) == 3 * ["FINISHED"]
        assert "results.json" in [f.path for f in client.list_artifacts(parent_id)]


def test_what_a_broken_connection_leaves_half_done_is_completed_once(output_dir, monkeypatch):
    monkeypatch.setattr(delivery, "FIRST_BACKOFF_S", 0.1)

    class LosesAnswers(MlflowClient):
        """The first run is created but its answer is lost; the first end does not arrive at all."""

        lost = 0

        def create_run(self, *args, **kwargs):
            run = super().create_run(*args, **kwargs)
            self.lose(at=0)
            return run

        def set_terminated(self, *args, **kwargs):
            self.lose(at=1)
            super().set_terminated(*args, **kwargs)

        def lose(self, at):
            if self.lost == at:
                self.lost += 1
                raise MlflowException("connection reset by peer")

    tracker = SweepTracker(sweep_config(output_dir), "sweep-1", PROVENANCE)
    parent_id = tracker.start()
    replace_client(tracker, LosesAnswers(tracker.uri))
    events = life("t0")
    tracker.handle(typed(events))
    assert tracker.close(summary(events, tracker)) == 0
    assert tracker._parent._client.lost == 2
    client = MlflowClient(tracker.uri)
    runs = client.search_runs([client.get_run(parent_id).info.experiment_id])
    assert {run.info.run_id for run in runs} == {parent_id, tracker.run_ids["t0"]}
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert points(client, tracker.run_ids["t0"], METRIC) == [(10, 101, 0.25), (20, 201, 0.5)]


def test_closing_while_the_server_is_away_is_bounded_and_counts(output_dir):
    """Against a socket that accepts and never answers, the worst a server can do."""
    tracker = SweepTracker(sweep_config(output_dir), "sweep-1", PROVENANCE)
    tracker.start()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        replace_client(tracker, MlflowClient(f"http://127.0.0.1:{silent.getsockname()[1]}"))
        events = life("t0")
        tracker.handle(typed(events))
        began = time.monotonic()
        assert tracker.close(summary(events, tracker), timeout_s=1.0) == len(events) + 1
        assert time.monotonic() - began < 4


def test_a_deleted_experiment_is_refused_with_the_remedy(output_dir):
    config = sweep_config(output_dir)
    client = MlflowClient(resolve_uri(None, output_dir))
    client.delete_experiment(client.create_experiment("test"))
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        SweepTracker(config, "sweep-1", PROVENANCE).start()


def test_two_processes_may_create_the_experiment_at_once(output_dir):
    config = sweep_config(output_dir)
    tracker = SweepTracker(config, "sweep-1", PROVENANCE)

    class SlowEyes(MlflowClient):
        """Looks before the other process creates, creates after it."""

        looks = 0

        def get_experiment_by_name(self, name):
            self.looks += 1
            return None if self.looks == 1 else super().get_experiment_by_name(name)

    other = MlflowClient(tracker.uri).create_experiment("test")
    parent = ParentRun(SlowEyes(tracker.uri), tracker.uri, config, "sweep-1", PROVENANCE)
    assert parent.experiment_id == other


def test_temporary_and_final_refusals_are_told_apart():
    assert is_temporary(MlflowException("no connection"))
    assert is_temporary(ConnectionResetError())
    assert not is_temporary(MlflowException.invalid_parameter_value("bad key"))
    assert not is_temporary(FileNotFoundError())
    assert not is_temporary(KeyError("x"))
