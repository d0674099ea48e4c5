"""Sweeps as a user runs them: the command line in a process of its own, with a Ray cluster of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.support.ranks import BASE


class Sweeps:
    """Runs `orpo-ray sweep` and looks at what it left. Ends every process it started, and no other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def write(self, name: str, sweep: dict[str, Any], **settings: Any) -> Path:
        """An experiment file: the base of the tests with dotted settings changed."""
        tree = json.loads(json.dumps(BASE))
        tree |= {"name": name, "output_dir": str(self.folder / "runs"), "sweep": sweep}
        tree["data"]["cache_dir"] = str(self.folder / "cache")
        for path, value in settings.items():
            section, key = path.split(".", 1)
            tree.setdefault(section, {})[key] = value
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return file

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """`orpo-ray ARGUMENTS` in a process group of its own, with further environment variables."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        environment |= env or {}
        process = subprocess.Popen(
            [sys.executable, "-m", "orpo_ray.cli", *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def run(self, *arguments: str, timeout_s: float = 300, env: dict[str, str] | None = None) -> str:
        """The same, to its end. Returns what it printed; the exit code must be 0."""
        process = self.start(*arguments, env=env)
        output, _ = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, output
        return output

    def events(self, name: str) -> list[dict[str, Any]]:
        """The journal so far."""
        file = self.folder / "runs" / name / "events.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for(self, name: str, event: str, timeout_s: float = 180, **details: Any) -> dict[str, Any]:
        """Wait for an event of the journal."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for entry in self.events(name):
                if entry["event"] == event and all(entry.get(key) == value for key, value in details.items()):
                    return entry
            time.sleep(0.1)
        raise AssertionError(f"no {event} {details} within {timeout_s} s; journal: {self.events(name)}")

    def results(self, name: str) -> dict[str, Any]:
        """results.json."""
        return dict(json.loads((self.folder / "runs" / name / "results.json").read_text(encoding="utf-8")))

    def mlflow_runs(self, name: str) -> tuple[Any, dict[str, Any]]:
        """The parent run, and trial id -> child run."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder / 'runs' / 'mlflow.db'}")
        (experiment,) = [e for e in client.search_experiments() if e.name == "orpo-ray"]
        runs = client.search_runs([experiment.experiment_id], max_results=1000)
        (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags and r.info.run_name == name]
        children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        by_trial = {r.data.tags["orpo_ray.trial_id"]: r for r in children}
        assert len(by_trial) == len(children), "a trial has two MLflow runs"
        return parent, by_trial

    def metric_steps(self, run_id: str, metric: str) -> list[int]:
        """Steps of a metric's points in MLflow, as they are kept."""
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder / 'runs' / 'mlflow.db'}")
        return [point.step for point in client.get_metric_history(run_id, metric)]

    def kill(self, process: subprocess.Popen[str]) -> None:
        """SIGKILL a sweep and every process below it, as a machine that dies does."""
        victims = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for victim in victims:
            try:
                victim.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        process.wait(30)
        psutil.wait_procs(victims, timeout=30)

    def close(self) -> None:
        """End what still runs."""
        for process in self._started:
            if process.poll() is None:
                self.kill(process)


def table_of(client: Any, run_id: str, folder: Path) -> dict[str, Any]:
    """A run's table of generations; asserts that a tag tells MLflow's user interface of it."""
    tag = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert tag == [{"path": "generations.json", "type": "table"}]
    written = client.download_artifacts(run_id, "generations.json", str(folder))
    return dict(json.loads(Path(written).read_text(encoding="utf-8")))
