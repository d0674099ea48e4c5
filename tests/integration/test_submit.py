"""Jobs on real Ray clusters with a job server, authentication on and off."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ray_clusters import RayCluster
from tests.support.real_sweeps import Sweeps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PACKAGE = Path(__file__).parents[2] / "orpo_ray"
TWO_TRIALS = {"metric": "eval/nll", "space": {"optim.lr": {"type": "grid", "values": [1.0e-3, 2.0e-3]}}}
SHORT = {"train.max_steps": 4, "train.eval_every": 2, "generation.prompts": 0}


@pytest.fixture(scope="module")
def open_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """No authentication; two nodes with one CPU each, so that a trial of two workers needs both."""
    secrets = {"HF_TOKEN": "of-the-nodes"}
    cluster = RayCluster(tmp_path_factory.mktemp("open"), auth=False, nodes=2, num_cpus=1, **secrets)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def guarded_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Asks for a token."""
    cluster = RayCluster(tmp_path_factory.mktemp("guarded"), auth=True, num_cpus=2)
    yield cluster
    cluster.close()


def start(
    *command: str, cluster: RayCluster, folder: Path, address: bool = True, **environment: str
) -> subprocess.Popen[str]:
    """A client of the cluster, in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    where = {"RAY_API_SERVER_ADDRESS": cluster.dashboard_url} if address else {}
    path = os.pathsep.join([os.path.dirname(sys.executable), inherited.get("PATH", "")])
    return subprocess.Popen(
        list(command),
        cwd=folder,
        env=inherited | {"PATH": path, "COLUMNS": "160"} | where | cluster.environment | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*command: str, code: int = 0, timeout_s: float = 200, **options: object) -> str:
    process = start(*command, **options)  # type: ignore[arg-type]
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def submit(*arguments: str, **options: object) -> str:
    return run(sys.executable, "-m", "orpo_ray.cli", "submit", *arguments, **options)  # type: ignore[arg-type]


def jobs_of(cluster: RayCluster, name: str) -> dict[str, dict]:
    """Submission id -> job, of those whose id starts with `name`."""
    headers = {"Authorization": f"Bearer {cluster.token}"} if cluster.token else {}
    import requests

    found = requests.get(f"{cluster.dashboard_url}/api/jobs/", headers=headers, timeout=30).json()
    return {job["submission_id"]: job for job in found if (job["submission_id"] or "").startswith(name)}


def test_ray_job_submit_works_as_it_stands(open_cluster: RayCluster, sweeps: Sweeps) -> None:
    file = sweeps.write("plain", TWO_TRIALS, **SHORT)
    shutil.copytree(PACKAGE, sweeps.folder / "orpo_ray", ignore=shutil.ignore_patterns("__pycache__"))
    command = ("ray", "job", "submit", "--working-dir", ".", "--", "orpo-ray", "sweep", file.name)
    printed = run(*command, cluster=open_cluster, folder=sweeps.folder)
    assert "succeeded" in printed
    assert [trial["status"] for trial in sweeps.results("plain")["trials"]] == ["finished"] * 2


@pytest.mark.core
def test_the_code_that_is_here_runs_on_every_node(open_cluster: RayCluster, sweeps: Sweeps) -> None:
    """A working directory with a package of its own: every process of the job imports that one."""
    sweeps.write("marked", TWO_TRIALS, **SHORT, **{"scaling.num_workers": 2})
    marks = sweeps.folder / "marks"
    marks.mkdir()
    copy = shutil.copytree(PACKAGE, sweeps.folder / "orpo_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for module in ("orchestration/sweep", "orchestration/driver", "orchestration/broker", "training/loop"):
        with (copy / f"{module}.py").open("a") as source:
            source.write(
                "\n\nimport os as _os, pathlib as _pathlib\n"
                f"(_pathlib.Path({str(marks)!r}) / f'{Path(module).name}-{{_os.getpid()}}').write_text(__file__)\n"
            )
    (sweeps.folder / "secret.pem").write_text("never sent")
    printed = submit("marked.yaml", cluster=open_cluster, folder=sweeps.folder, HF_TOKEN="mine", HF_HUB_OFFLINE="1")
    assert "job marked-1 SUCCEEDED" in printed
    assert "set here and not sent, as a job's environment is open: HF_TOKEN" in printed
    assert [trial["status"] for trial in sweeps.results("marked")["trials"]] == ["finished"] * 2

    files = {file.name: file.read_text() for file in marks.iterdir()}
    assert {name.partition("-")[0] for name in files} == {"sweep", "driver", "broker", "loop"}
    unpacked = {name: Path(path).relative_to(open_cluster.temp_dir).parts for name, path in files.items()}
    assert all("working_dir_files" in parts for parts in unpacked.values()), files
    # Each trial trained on both nodes, each with a copy of its own; the sweep itself ran on the head.
    assert {parts[0] for name, parts in unpacked.items() if name.startswith("loop")} == {"head", "node1"}
    assert {parts[0] for name, parts in unpacked.items() if name.startswith("sweep")} == {"head"}
    (copies,) = {
        Path(*Path(path).parts[: Path(path).parts.index("working_dir_files") + 2])
        for name, path in files.items()
        if name.startswith("sweep")
    }
    assert not (copies / "secret.pem").exists()
    assert not (copies / "runs").exists()

    (job,) = jobs_of(open_cluster, "marked").values()
    assert job["runtime_env"]["env_vars"]["HF_HUB_OFFLINE"] == "1"
    assert "mine" not in json.dumps(job)


def test_a_job_that_fails_says_so(open_cluster: RayCluster, sweeps: Sweeps) -> None:
    sweeps.write("failing", TWO_TRIALS, **SHORT, **{"scaling.num_workers": 4})
    printed = submit("failing.yaml", cluster=open_cluster, folder=sweeps.folder, code=1)
    assert printed.count("it would wait for ever") == 1, printed
    assert "job failing-1 FAILED: Job entrypoint command failed with exit code 2" in printed


@pytest.mark.alone  # a client must leave within 30 s
def test_a_stopped_sweep_continues(guarded_cluster: RayCluster, sweeps: Sweeps) -> None:
    """Followed by two, stopped in the middle, submitted again: no trial twice, and the exit codes tell the truth."""
    settings = {"train.max_steps": 150, "train.eval_every": 5, "generation.prompts": 0}
    sweeps.write("stopped", {**TWO_TRIALS, "max_concurrent": 1}, **settings)
    client = {"cluster": guarded_cluster, "folder": sweeps.folder}
    printed = submit("stopped.yaml", "--no-wait", **client)
    assert "job stopped-1 was submitted" in printed
    command = (sys.executable, "-m", "orpo_ray.cli", "submit", "stopped.yaml")
    leaving, staying = start(*command, **client), start(*command, **client)  # type: ignore[arg-type]
    try:
        sweeps.wait_for("stopped", "started")
        submit("stopped.yaml", "optim.weight_decay=0.2", code=2, **client)  # type: ignore[arg-type]
        leaving.send_signal(signal.SIGINT)
        assert leaving.wait(30) == 130
        left = leaving.communicate()[0]
        assert "stopped-1 runs this sweep already" in left
        assert "job stopped-1 goes on; the same command follows it" in left
        sweeps.wait_for("stopped", "finished")
        began = time.monotonic()
        assert "job stopped-1 was stopped" in submit("stopped.yaml", "--stop", **client)  # type: ignore[arg-type]
        assert time.monotonic() - began < 60
        followed, _ = staying.communicate(timeout=60)
    finally:
        for process in (leaving, staying):
            process.kill()
    assert staying.returncode == 3, followed
    assert "job stopped-1 STOPPED" in followed
    assert followed.count("Running entrypoint for job stopped-1") == 1
    assert "interrupted; the same command continues where this one stopped" in followed
    assert sweeps.results("stopped")["interrupted"]
    before = sweeps.events("stopped")

    printed = submit("stopped.yaml", **client)
    assert "job stopped-2 SUCCEEDED" in printed
    events = sweeps.events("stopped")
    assert events[: len(before)] == before
    assert [event["event"] for event in events].count("finished") == 2
    assert [event["event"] for event in events].count("submitted") == 2
    results = sweeps.results("stopped")
    assert [(trial["status"], trial["steps"]) for trial in results["trials"]] == [("finished", 150)] * 2
    assert "no job runs this sweep" in submit("stopped.yaml", "--stop", code=1, **client)  # type: ignore[arg-type]


def test_who_has_no_token_is_told(guarded_cluster: RayCluster, sweeps: Sweeps, tmp_path: Path) -> None:
    sweeps.write("denied", TWO_TRIALS, **SHORT)
    client = {"cluster": guarded_cluster, "folder": sweeps.folder, "code": 2}
    nobody = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN": ""}
    disabled = submit("denied.yaml", RAY_AUTH_MODE="disabled", **client)
    missing = submit("denied.yaml", **client, **nobody)
    wrong = submit("denied.yaml", RAY_AUTH_TOKEN="f" * 64, **client)
    assert "requires a token: export RAY_AUTH_MODE=token" in disabled
    assert "requires a token: export RAY_AUTH_MODE=token" in missing
    assert "refuses the token" in wrong
    for printed in (disabled, missing, wrong):
        assert "Traceback" not in printed
        assert "f" * 64 not in printed
    assert not jobs_of(guarded_cluster, "denied")
