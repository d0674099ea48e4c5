"""What goes to a cluster and what is refused, without a cluster; a log followed through broken connections."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import orpo_ray
from orpo_ray.cluster import jobs, submit, upload
from orpo_ray.cluster.upload import EXCLUDES, SubmitError, files_to_send
from orpo_ray.config import ConfigError
from tests.support.ranks import BASE


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an experiment that could be sent; the current directory."""
    folder = tmp_path / "project"
    write(folder / "x.yaml", yaml.safe_dump(BASE | {"output_dir": "/mnt/shared/runs"}))
    monkeypatch.chdir(folder)
    return folder


def write(file: Path, text: str = "text") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def prepare(*overrides: str, file: str = "x.yaml", working_dir: str = ".", **environ: str) -> submit.Job:
    return submit.prepare(Path(file), list(overrides), Path(working_dir), environ=environ)


def test_a_job_brings_its_experiment_and_this_package(project: Path) -> None:
    job = prepare("optim.lr=1e-5", "name=λ 'x'".replace("λ 'x'", "named"), MLFLOW_TRACKING_URI="http://mlflow:5000")
    assert job.entrypoint == "python -m orpo_ray.cli train x.yaml optim.lr=1e-5 name=named"
    assert job.run == "/mnt/shared/runs/named"
    assert job.runtime_env["working_dir"] == str(project)
    assert job.runtime_env["py_modules"] == [str(Path(orpo_ray.__file__).parent)]
    assert job.runtime_env["env_vars"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert job.metadata["orpo_ray.version"]
    assert prepare("data.chat_template=a 'b' $HOME").entrypoint.endswith("""'data.chat_template=a '"'"'b'"'"' $HOME'""")
    assert " sweep x.yaml" in prepare("sweep={}").entrypoint
    assert prepare("storage=s3://bucket/orpo/").run == "s3://bucket/orpo/test"


def test_a_package_in_the_working_directory_is_the_one_that_runs(project: Path) -> None:
    write(project / "orpo_ray" / "__init__.py")
    assert "py_modules" not in prepare().runtime_env
    write(project / ".rayignore", "orpo_ray")
    assert "py_modules" in prepare().runtime_env


def test_secrets_stay_here(project: Path) -> None:
    secrets = {"HF_TOKEN": "hf_1", "AWS_SECRET_ACCESS_KEY": "aws_1", "MLFLOW_TRACKING_PASSWORD": "mlflow_1"}
    job = prepare(**secrets, PATH="/bin", AWS_ENDPOINT_URL="http://minio:9000")
    assert set(job.withheld) == set(secrets)
    assert not any(value in repr(job) for value in secrets.values())
    assert {"PATH", *secrets}.isdisjoint(job.runtime_env["env_vars"])
    assert job.runtime_env["env_vars"]["AWS_ENDPOINT_URL"] == "http://minio:9000"


@pytest.mark.parametrize(
    ("overrides", "environ", "message"),
    [
        ([], {"MLFLOW_TRACKING_URI": "postgresql://me:sesame@db/mlflow"}, "MLFLOW_TRACKING_URI holds a password"),
        ([], {"MLFLOW_TRACKING_URI": "sqlite:////home/me/mlflow.db"}, "a location on this machine"),
        ([], {"MLFLOW_TRACKING_URI": "mlruns"}, "a location on this machine"),
        ([], {"AWS_ENDPOINT_URL": "http://me:sesame@minio"}, "AWS_ENDPOINT_URL holds a password"),
        (["tracking.uri=http://me:sesame@mlflow"], {}, "tracking.uri holds a password"),
        (["output_dir=runs"], {}, r"output_dir \(runs\) is relative: .* or add storage"),
        (["output_dir=runs", "storage=s3://b"], {}, "or one on the head node, because storage is set"),
        (["data.path=../pairs.jsonl"], {}, "data.path: ../pairs.jsonl is outside the working directory"),
        (["data.path=pairs.jsonl"], {}, "data.path: pairs.jsonl does not exist in the working directory"),
        (["data.path=data/ignored.jsonl"], {}, "data.path: data/ignored.jsonl is not sent"),
        (["data.eval_path=data/ignored.jsonl"], {}, "data.eval_path: data/ignored.jsonl is not sent"),
        (["model.path=base"], {}, r"model.path: base is not sent completely \(base/model.safetensors\)"),
    ],
)
def test_what_the_cluster_would_not_find_or_all_could_read_is_refused(
    project: Path, overrides: list[str], environ: dict[str, str], message: str
) -> None:
    write(project / "data" / ".gitignore", "ignored.jsonl")
    write(project / "data" / "ignored.jsonl")
    write(project / "base" / "config.json")
    write(project / "base" / "model.safetensors")
    with pytest.raises(SubmitError, match=message) as refused:
        prepare(*overrides, **environ)
    assert "sesame" not in str(refused.value)


def test_paths_of_bundles_and_axes_are_checked(project: Path) -> None:
    write(project / "here.jsonl")
    space = {
        "size": {"type": "bundle", "values": {"s": {"model.path": "./small"}, "l": {"model.path": "hub/large"}}},
        "data.path": {
            "type": "choice",
            "values": ["here.jsonl", "away.jsonl", "builtin://style-pairs", "/mnt/x.jsonl"],
        },
    }
    tree = BASE | {"output_dir": "/mnt/shared/runs", "sweep": {"searcher": {"type": "random"}, "space": space}}
    write(project / "swept.yaml", yaml.safe_dump(tree))
    with pytest.raises(SubmitError) as refused:
        prepare(file="swept.yaml")
    first, *lines = str(refused.value).splitlines()
    assert first.endswith("(2 problem(s)):")
    assert lines[0].startswith("sweep.space.data.path.values: away.jsonl does not exist")
    assert lines[1].startswith("sweep.space.size.values.s.model.path: ./small does not exist")


def test_paths_are_those_of_the_working_directory(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project / "sub" / "pairs.jsonl")
    assert prepare("data.path=sub/pairs.jsonl").num_files == 2
    monkeypatch.chdir(project / "sub")
    job = prepare("data.path=sub/pairs.jsonl", file="../x.yaml", working_dir="..")
    assert job.entrypoint.endswith("train x.yaml data.path=sub/pairs.jsonl")
    with pytest.raises(SubmitError, match=r"exists in .*sub, but not in the working directory"):
        prepare("data.path=pairs.jsonl", file="../x.yaml", working_dir="..")
    with pytest.raises(SubmitError, match="is not in the working directory"):
        prepare(file="../x.yaml")


def test_the_experiment_itself_is_checked_first(project: Path) -> None:
    with pytest.raises(ConfigError, match="global_batch_size"):
        prepare("train.global_batch_size=0")
    write(project / ".gitignore", "*.yaml")
    with pytest.raises(SubmitError, match=r"is ignored by .gitignore or .rayignore"):
        prepare()


def test_the_list_of_files_is_what_ray_packs(project: Path, tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    for name in (
        *("a.py", "deep/er/b.txt", ".git/config", "runs/x/events.jsonl", "deep/runs/kept.txt", "w.safetensors"),
        *("deep/mlflow.db-wal", "key.pem", ".env", "é.txt", "__pycache__/a.pyc", "deep/ignored/c", "deep/not/c"),
    ):
        write(project / name)
    write(project / "deep" / ".gitignore", "ignored/\n")
    write(project / ".rayignore", "deep/not\n")
    (project / "link.txt").symlink_to(project / "a.py")
    (project / "gone.txt").symlink_to(tmp_path / "nothing")
    files = files_to_send(project)
    package = tmp_path / "package.zip"
    create_package(str(project), package, True, excludes=[*get_runtime_env_default_excludes(), *EXCLUDES])
    with zipfile.ZipFile(package) as archive:
        packed = {entry.filename: entry.file_size for entry in archive.infolist() if not entry.is_dir()}
    assert files == packed
    assert {"deep/runs/kept.txt", "link.txt", "é.txt"} <= files.keys()
    assert not any(name.startswith((".git/", "runs", "key", "w.", ".env")) or "ignored/" in name for name in files)
    size_of_empty_folders = 200
    assert abs(upload.package_bytes(files) - package.stat().st_size) < size_of_empty_folders


def test_a_package_too_large_is_refused_with_its_largest_files(project: Path) -> None:
    with write(project / "big.bin").open("wb") as file:
        file.truncate(100 * 2**20)  # takes no room on the disk
    write(project / "small.txt")
    with pytest.raises(
        SubmitError, match=r"100\.0 MiB, but Ray's job server accepts at most 100\.0 MiB; .* big.bin \(100\.0 MiB\)"
    ):
        prepare()
    write(project / ".rayignore", "*.bin")
    assert prepare().num_bytes < 2**20


def test_links_out_of_the_directory_are_not_followed(project: Path, tmp_path: Path) -> None:
    write(tmp_path / "private" / "id_rsa")
    (project / "keys").symlink_to(tmp_path / "private")
    (project / "loop").symlink_to(project)
    with pytest.raises(SubmitError) as refused:
        prepare()
    assert f"keys -> {tmp_path / 'private'}" in str(refused.value)
    assert f"loop -> {project}" in str(refused.value)
    write(project / ".rayignore", "keys\nloop\n")
    assert prepare().num_files == 2


class Cluster:
    """A job server's client, as far as it is used: jobs that are there, and jobs that come."""

    def __init__(self, *known: SimpleNamespace, taken: tuple[str, ...] = ()) -> None:
        self.known, self.taken, self.submitted = list(known), set(taken), []

    def list_jobs(self) -> list[SimpleNamespace]:
        return self.known

    def submit_job(self, submission_id: str, **job: Any) -> None:
        if submission_id in self.taken:
            self.known.append(known(submission_id, "SUCCEEDED"))
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        self.submitted.append((submission_id, job))


def known(submission_id: str | None, status: str, run: str | None = None, entrypoint: str = "x") -> SimpleNamespace:
    state = SimpleNamespace(is_terminal=lambda: status in jobs.EXIT_CODES, value=status)
    metadata = {"orpo_ray.run": run} if run else None
    return SimpleNamespace(submission_id=submission_id, status=state, metadata=metadata, entrypoint=entrypoint)


def test_a_sweep_has_one_job_at_a_time_and_ids_are_never_reused(project: Path) -> None:
    job = prepare()
    cluster = Cluster(known("test-2", "FAILED", job.run), known("test-x", "FAILED"), known(None, "RUNNING"))
    assert submit.start(cluster, job) == submit.Submission("test-3", is_new=True)
    ((_, sent),) = cluster.submitted
    assert sent["metadata"]["orpo_ray.run"] == job.run
    assert not any("entrypoint_" in name for name in sent), "the driver would leave the head node"
    for status in ("PENDING", "RUNNING"):
        cluster = Cluster(known("test-7", status, job.run, job.entrypoint))
        assert submit.start(cluster, job) == submit.Submission("test-7", is_new=False)
        assert not cluster.submitted
    with pytest.raises(SubmitError, match="with another command"):
        submit.start(Cluster(known("test-7", "RUNNING", job.run, "python -m else")), job)
    assert submit.start(Cluster(taken=("test-1",)), job).submission_id == "test-2", "somebody else was faster"
    elsewhere = known("test-7", "RUNNING", "/other/runs/test")
    assert submit.start(Cluster(elsewhere), job).submission_id == "test-8"


LOG = [f"line {number}\n" for number in range(9)]


class Broken:
    """A job whose log stream breaks, once in the middle of a line, and whose head is away for a moment."""

    def __init__(self, end: str = "SUCCEEDED", error: Exception | None = None) -> None:
        self.end, self.error, self.polls, self.streams = end, error, 0, 0

    def get_job_info(self, submission_id: str) -> SimpleNamespace:
        self.polls += 1
        if self.error is not None:
            raise self.error
        if self.polls == 2:
            raise ConnectionError("away")
        return known(submission_id, self.end if self.polls > 3 else "RUNNING")

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        self.streams += 1
        text = "".join(LOG)
        yield text[:10]
        if self.streams == 1:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        yield text[10:38]

    def get_job_logs(self, submission_id: str) -> str:
        return "".join(LOG)


def test_a_log_is_written_once_however_often_its_stream_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_POLL_S", 0.7)
    written: list[str] = []
    client = Broken("STOPPED")
    details = jobs.follow(client, "test-1", written.append)
    assert client.streams > 1
    assert "".join(written) == "".join(LOG)
    assert jobs.EXIT_CODES[details.status.value] == 3


def test_a_cluster_that_is_gone_is_not_a_success() -> None:
    with pytest.raises(jobs.LostError, match="has not answered for 0 s"):
        jobs.follow(Broken(error=ConnectionError("refused")), "test-1", print, give_up_s=0)
    gone = RuntimeError("Request failed with status code 404: Job test-1 does not exist.")
    with pytest.raises(SubmitError, match="no longer knows job test-1"):
        jobs.follow(Broken(error=gone), "test-1", print)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": "10.0.0.1:6379"})
    with pytest.raises(SubmitError, match=r"RAY_ADDRESS is 10.0.0.1:6379, .* --address http://10.0.0.1:8265"):
        jobs.connect(None)
    with pytest.raises(SubmitError, match=r"--address is auto"):
        jobs.connect("auto")
    with pytest.raises(SubmitError, match=r"no Ray job server answers at http://127.0.0.1:9 .*ssh -N -L"):
        jobs.connect("http://127.0.0.1:9")


def test_without_the_extra_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "aiohttp", None)
    with pytest.raises(SubmitError, match=r"pip install 'orpo-ray\[cluster\]'"):
        jobs.connect("http://127.0.0.1:9")


def test_versions_must_match() -> None:
    import platform

    import ray

    jobs._require_versions(ray.__version__, platform.python_version())
    with pytest.raises(SubmitError, match=r"the cluster runs Ray 2.0.0, but this machine runs 2\."):
        jobs._require_versions("2.0.0", platform.python_version())
    with pytest.raises(SubmitError, match=r"the cluster runs Python 3.9.1, but this machine runs 3\."):
        jobs._require_versions(ray.__version__, "3.9.1")


def test_ctrl_c_does_not_wait_for_a_server_that_hangs() -> None:
    """Neither for its answer, nor for a stream whose code swallows the cancellation."""
    asked, answers, swallowed = threading.Event(), threading.Event(), threading.Event()

    class Hanging:
        def get_job_info(self, _: str) -> Any:
            asked.set()
            answers.wait(60)
            raise ConnectionError("too late")

        async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed.set()
            yield "a line\n"

    def interrupt() -> None:
        assert asked.wait(30)
        time.sleep(0.3)  # the stream is open, too
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        jobs.follow(Hanging(), "test-1", [].append)
    answers.set()
    assert swallowed.is_set()
    assert time.monotonic() - began < 20
