"""Sweeps read from their run directories, from MLflow's database and from a real MLflow server: the same either way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from mlflow import MlflowClient
from pandas.testing import assert_frame_equal

from orpo_ray import load_runs
from orpo_ray.config import METRIC_MODES
from orpo_ray.reports.comparison import comparison_markdown
from orpo_ray.results.compare import compare_runs
from orpo_ray.results.runs import read_sweep
from orpo_ray.storage.results import summarize
from orpo_ray.tracking.sweep_tracker import SweepTracker
from orpo_ray.tracking.uri import TrackingError
from tests.support.events import as_event, as_state
from tests.support.run_dirs import BEGAN_MS, experiment, life, write_run
from tests.support.sweeps import pair_scores

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

PROVENANCE = {"command": "orpo-ray sweep x.yaml", "packages": {"orpo-ray": "0.1.0"}, "git": None}
SIZE = {
    "type": "bundle",
    "values": {
        "2m": {"model.path": "tiny-llama-2m"},
        "8m": {"model.path": "tiny-llama-8m", "deepspeed.zero_stage": 1},
    },
}
SPACE = {
    "size": SIZE,
    "optim.lr": {"type": "loguniform", "low": 1e-4, "high": 1e-2},
    "loss.orpo_lambda": {"type": "grid", "values": [0.0, 0.1]},
}


def delivered(output_dir: Path, name: str, gain: float, sweep_id: str, **settings: Any) -> None:
    """A sweep's run directory, and the same in MLflow."""
    rng = np.random.default_rng(len(name))
    config = experiment(output_dir, name, SPACE, **{"tracking.experiment": "test"} | settings)
    events, scores = [], {}
    for number, status in enumerate(("finished", "finished", "stopped_early", "diverged", "failed", "unfinished")):
        trial_id, lr = f"{number:05d}", 1e-3 * (number + 1)
        one = None if status == "failed" else pair_scores(gain + number / 10 + rng.normal(size=100))
        params = {"size": "2m" if number == 1 else "8m", "optim.lr": lr, "loss.orpo_lambda": 0.1 * (number % 2)}
        events += life(config, trial_id, params, one, status, steps=20 if status == "finished" else 10, at=number)
        scores |= {} if one is None else {trial_id: one}
    forked = {"size": "2m", "optim.lr": 0.005, "loss.orpo_lambda": 0.1}
    fork = {"event": "forked", "trial_id": "00001", "step": 10, "donor": "00000", "params": forked}
    retry = {"event": "retry", "trial_id": "00000", "attempt": 1, "failures": 1, "error": "worker died"}
    retry["time"] = BEGAN_MS + 50
    again = events[1] | {"attempt": 1, "time": BEGAN_MS + 60}
    end = next(i for i, e in enumerate(events) if e["trial_id"] == "00001" and e["event"] == "eval")
    events[end + 1 : end + 1] = [fork | {"time": BEGAN_MS + 102}]
    events[2:2] = [retry, again]
    write_run(config, events, scores, sweep_id=sweep_id, ended=False)
    tracker = SweepTracker(config, sweep_id, PROVENANCE)
    tracker.start()
    tracker.handle(map(as_event, events))
    assert tracker.flush() == 0
    write_run(config, events, scores, tracker.run_ids, sweep_id=sweep_id)
    assert tracker.close(summarize(name, config.sweep.metric, "max", as_state(events), tracker.run_ids)) == 0


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
            patch.setenv(name, "")  # so that what is set later is undone
            patch.delenv(name)
        folder = tmp_path_factory.mktemp("runs")
        delivered(folder, "wide", 0.0, "sweep-1")
        delivered(folder, "better", 1.0, "sweep-2", **{"optim.weight_decay": 0.1})
        yield folder


@pytest.fixture
def client(output_dir: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{output_dir}/mlflow.db")


def test_a_table_is_the_same_from_both(output_dir: Path, client: MlflowClient) -> None:
    uri = f"sqlite:///{output_dir}/mlflow.db"
    for name in ("wide", "better"):
        here = load_runs(name, output_dir=output_dir)
        there = load_runs(name, tracking_uri=uri, output_dir=output_dir / "elsewhere")
        assert len(here) == 6
        # Of a trial without an end MLflow holds no checkpoint: it is logged at its end.
        assert here["checkpoint"].isna().tolist() == [False, False, False, False, True, False]
        here.loc[here["status"] == "unfinished", "checkpoint"] = None
        assert_frame_equal(here, there)
    assert here["attempts"].tolist() == [2, 1, 1, 1, 1, 1]
    assert here["optim.lr"][1] == 0.005  # after its fork
    experiment_id = client.get_experiment_by_name("test").experiment_id
    runs = {r.info.run_id: r for r in client.search_runs([experiment_id])}
    assert set(here["mlflow_run_id"]) < runs.keys()
    assert_frame_equal(load_runs("wide", experiment="test", output_dir=output_dir), load_runs("wide", tracking_uri=uri))
    one, other = (read_sweep("wide", tracking_uri=u, output_dir=output_dir) for u in (None, uri))
    assert (one.settings, one.search, one.axes, one.mode) == (other.settings, other.search, other.axes, other.mode)
    assert [t.settings for t in one.trials] == [t.settings for t in other.trials]
    assert one.run_dir == other.run_dir == output_dir / "wide"


def test_runs_by_their_mlflow_ids(output_dir: Path) -> None:
    whole = load_runs("wide", output_dir=output_dir)
    uri, elsewhere = f"sqlite:///{output_dir}/mlflow.db", output_dir / "elsewhere"
    child = whole["mlflow_run_id"][1]
    for name in (child, "wide/00001"):
        found = load_runs(name, tracking_uri=uri, output_dir=elsewhere)
        assert_frame_equal(found, whole[1:2].reset_index(drop=True))
    parent = MlflowClient(uri).get_run(child).data.tags["mlflow.parentRunId"]
    assert load_runs(parent, output_dir=output_dir)["trial_id"].tolist() == whole["trial_id"].tolist()
    with pytest.raises(
        FileNotFoundError, match=r"nor a name or a run id in MLflow at .* \(the nearest names there: wide"
    ):
        load_runs("wid", tracking_uri=uri, output_dir=elsewhere)
    with pytest.raises(FileNotFoundError, match="no sweep, trial or run 'ffff"):
        load_runs(32 * "f", tracking_uri=uri, output_dir=elsewhere)
    with pytest.raises(TrackingError, match="no experiment 'tset'; it has Default, test"):
        load_runs("wide", tracking_uri=uri, experiment="tset")


def test_of_several_sweeps_of_a_name_the_newest_is_taken(
    tmp_path: Path, output_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlflow.db").write_bytes((output_dir / "mlflow.db").read_bytes())
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment_id,) = [e.experiment_id for e in client.search_experiments() if e.name == "test"]
    tags = {"orpo_ray.sweep_id": "of today"}
    newer = client.create_run(experiment_id, start_time=int(time.time() * 1000) + 10_000, tags=tags, run_name="wide")
    client.log_param(newer.info.run_id, "sweep.metric", "eval/nll")
    assert load_runs("wide", output_dir=tmp_path).empty
    assert f"2 sweeps in MLflow are named wide: taking the newest, run {newer.info.run_id}" in caplog.text


def test_a_comparison_shows_what_mlflow_compares(output_dir: Path, client: MlflowClient) -> None:
    found = compare_runs("wide", "better", output_dir=output_dir)
    runs = [client.get_run(side.mlflow_run_id) for side in (found.a, found.b)]
    a, b = (r.data.params for r in runs)
    differ = {path: (a.get(path), b.get(path)) for path in a.keys() | b.keys() if a.get(path) != b.get(path)}
    assert differ == {"optim.weight_decay": ("0.0", "0.1")}
    assert {c.path: (c.a, c.b) for c in found.settings} == differ
    final = {f"final/{d.metric.removeprefix('eval/')}": d for d in found.metrics}
    assert METRIC_MODES.keys() <= {d.metric for d in found.metrics}
    for key, difference in final.items():
        assert (difference.a, difference.b) == pytest.approx([run.data.metrics[key] for run in runs], rel=1e-12)
    assert found.metrics[0].better == "B"
    assert found.metrics[0].covers == "100 held-out pairs"
    # Two trials of one sweep, which differ in a bundle too.
    pair = compare_runs("wide/00000", "wide/00003", output_dir=output_dir)
    a, b = (client.get_run(side.mlflow_run_id).data.params for side in (pair.a, pair.b))
    paths = {path for path in a.keys() | b.keys() if not path.startswith("axes.") and "." in path}  # others are labels
    assert {c.path: (c.a, c.b) for c in pair.settings} == {p: (a[p], b[p]) for p in paths if a[p] != b[p]}
    # From MLflow the same, and with intervals where the run directories are at hand.
    uri = f"sqlite:///{output_dir}/mlflow.db"
    assert compare_runs("wide", "better", tracking_uri=uri, output_dir=output_dir) == found
    by_id = compare_runs(found.a.mlflow_run_id, found.b.mlflow_run_id, output_dir=output_dir)
    assert (by_id.metrics, by_id.a.name, by_id.a.is_sweep) == (found.metrics, f"wide/{found.a.trial_ids[0]}", False)
    for name in ("wide", "better"):
        (output_dir / name).rename(output_dir / f"{name}-away")
    try:
        away = compare_runs("wide", "better", output_dir=output_dir)
    finally:
        for name in ("wide", "better"):
            (output_dir / f"{name}-away").rename(output_dir / name)
    assert "per-pair file of trial 00001 of wide missing, and not both have several seeds" in away.sentence
    assert [(d.a, d.b) for d in away.metrics] == [(d.a, d.b) for d in found.metrics]
    assert away.settings == found.settings


def test_a_server_gives_the_address_of_its_compare_page(output_dir: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{output_dir}/mlflow.db"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (output_dir / "server.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        give_up = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (output_dir / "server.log").read_text()
                assert time.monotonic() < give_up, "the server did not come up in 60 s"
                time.sleep(0.1)
        found = compare_runs("wide", "better", tracking_uri=uri, output_dir=output_dir)
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its own session: no one else's process
        server.wait()
    (experiment_id,) = {
        e.experiment_id
        for e in MlflowClient(f"sqlite:///{output_dir}/mlflow.db").search_experiments()
        if e.name == "test"
    }
    assert found.compare_page is not None
    page, _, query = unquote(found.compare_page).partition("?runs=")
    runs, _, experiments = query.partition("&experiments=")
    assert page == f"{uri}/#/compare-runs"
    assert json.loads(runs) == [found.a.mlflow_run_id, found.b.mlflow_run_id]
    assert json.loads(experiments) == [experiment_id]
    assert found.metrics[0].better == "B"
    assert f"In MLflow: <{found.compare_page}>" in comparison_markdown(found)
