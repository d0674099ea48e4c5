"""What `orpo-ray doctor` concludes from what nodes say; asking real nodes is in tests/integration/test_doctor.py."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_ray.cluster import node_probe
from orpo_ray.cluster.diagnosis import Answers, Failure, Node, diagnose
from orpo_ray.cluster.doctor import DoctorError, require_reachable
from orpo_ray.cluster.findings import Diagnosis, Finding

SERVER = "http://user:secret@mlflow:5000"
FACTS: dict[str, Any] = {
    "host": "a",
    "python": "3.11.7",
    "packages": {"ray": "2.60.0", "torch": "2.9.0+cu126", "mlflow": "3.17.2"},
    "code": "abc",
    "auth": "token",
    "compiler": "/usr/bin/c++",
    "ninja": "/usr/bin/ninja",
    "extensions": "/home/me/.cache/torch_extensions",
    "locks": [],
    "gpus": {"names": ["H200", "H200"], "cuda": "12.6", "error": None},
    "cpus": 16,
    "temp": "/tmp",
    "temp_free": 50 * 2**30,
    "shm": 8 * 2**30,
    "files": 65536,
}
NODE = Node("n" * 8, "10.0.0.2", is_head=False, gpus=2.0)
CLIENT = FACTS | {"packages": FACTS["packages"] | {"torch": "2.9.0+cpu"}}


def findings(
    node: Node = NODE,
    mlflow: str | Failure | None = None,
    storage: str | Failure | None = None,
    skew: tuple[float, float] = (0.01, 0.002),
    **facts: Any,
) -> dict[str, Finding]:
    answers = Answers(FACTS | facts, mlflow, storage, *skew)
    found = diagnose("node a", answers, CLIENT, SERVER, "s3://bucket/x", node, FACTS)
    assert len({finding.check for finding in found}) == len(found)
    return {finding.check: finding for finding in found}


def test_a_sound_node_has_no_problem_though_the_client_has_no_gpu_build_of_torch() -> None:
    found = findings()
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found["GPUs"].detail == "2 × H200"
    assert found["clock"].detail == "+10 ms (± 2) from the head node"
    assert found["MLflow"].detail == "http://mlflow:5000"


@pytest.mark.parametrize(
    ("check", "facts", "detail", "advice"),
    [
        ("packages", {"packages": {"ray": "2.59.0", "torch": "2.9.0+cu126", "mlflow": None}}, "ray 2.59.0", "pip"),
        ("packages", {"packages": {"ray": "2.60.0", "torch": None, "mlflow": None}}, "installed: torch, mlflow", "pip"),
        (
            "packages",
            {"packages": FACTS["packages"] | {"torch": "2.9.0+cpu"}},
            "torch 2.9.0+cpu, where the head node has 2.9.0+cu126",
            "pip",
        ),
        ("packages", {"python": "3.12.1"}, "python 3.12.1, where this process has 3.11.7", "pip"),
        ("code", {"code": None}, "cannot be imported", "--working-dir"),
        ("code", {"code": "xyz"}, "code (digest xyz) differs", "same commit"),
        ("C++ compiler", {"compiler": None}, "none found", "install g++"),
        ("ninja", {"ninja": None}, "none found", "pip install ninja"),
        ("compiled ops", {"locks": ["/x/lock"]}, "/x/lock was left", "remove it"),
        ("GPUs", {"gpus": {"names": [], "cuda": None, "error": None}}, "Ray offers 2, torch sees 0", "without CUDA"),
        ("GPUs", {"gpus": {"names": ["H200"], "cuda": "12.6", "error": None}}, "torch sees 1", "nvidia-smi"),
        ("GPUs", {"gpus": {"names": ["H200"] * 8, "cuda": "12.6", "error": None}}, "torch sees 8", "--num-gpus=8"),
        ("GPUs", {"gpus": {"names": [], "cuda": None, "error": "OSError: libcu"}}, "OSError: libcu", "again"),
        ("auth", {"auth": ""}, "RAY_AUTH_MODE is unset here, token on the head", "same value on every node"),
        ("disk", {"temp_free": 2**30}, "1.0 GiB free in /tmp, 5 GiB are needed", "--temp-dir"),
        ("shared memory", {"shm": 64 * 2**20}, "0.1 GiB in /dev/shm", "--shm-size"),
        ("open files", {"files": 1024}, "may open 1024, 4096 are needed", "ulimit -n"),
        ("clock", {"skew": (-1.5, 0.01)}, "-1500 ms", "chrony"),
        ("clock", {"skew": (Failure("no answer within 9 s"), 0.0)}, "no answer within 9 s", "hangs"),
        ("MLflow", {"mlflow": "401 at http://user:secret@mlflow"}, "401 at http://mlflow", "MLFLOW_TRACKING_PASSWORD"),
        ("MLflow", {"mlflow": Failure("no answer within 9 s")}, "no answer within 9 s", "reach"),
        ("storage", {"storage": "what client wrote into it is not seen"}, "what client wrote", "mount"),
    ],
)
def test_every_fault_is_a_problem_of_its_check_alone_and_comes_with_what_to_do(
    check: str, facts: dict[str, Any], detail: str, advice: str
) -> None:
    found = findings(**facts)
    problems = [finding for finding in found.values() if finding.status != "ok"]
    assert [problem.check for problem in problems] == [check]
    assert problems[0].status == "problem"
    assert detail in problems[0].detail
    assert advice in problems[0].advice
    assert "secret" not in str(problems[0])


def test_a_skew_within_what_cannot_be_measured_better_is_no_problem() -> None:
    assert findings(skew=(1.2, 0.5))["clock"].status == "ok"
    assert findings(skew=(1.2, 0.1))["clock"].status == "problem"


def test_a_cluster_without_authentication_is_warned_of_unless_it_is_on_loopback() -> None:
    facts = FACTS | {"auth": ""}
    open_to_all = diagnose("a", Answers(facts, skew_s=0.0), CLIENT, SERVER, "/x", NODE, facts)
    (warning,) = [finding for finding in open_to_all if finding.status != "ok"]
    assert (warning.check, warning.status) == ("auth", "warning")
    assert Diagnosis(open_to_all).ok
    inside = Node("n", "127.0.0.1", is_head=True, gpus=2.0)
    alone = diagnose("a", Answers(facts, skew_s=0.0), CLIENT, SERVER, "/x", inside, facts)
    assert {finding.status for finding in alone} == {"ok"}


def test_a_file_of_mlflow_is_asked_for_where_the_sweep_writes_it_only() -> None:
    found = diagnose("a", Answers(FACTS, skew_s=0.0), CLIENT, "sqlite:////x/mlflow.db", None, NODE, FACTS)
    by_check = {finding.check: finding for finding in found}
    assert by_check["MLflow"].detail.startswith("not tested")
    assert (by_check["storage"].status, by_check["storage"].detail) == ("warning", "not checked")


def test_a_node_that_says_nothing_is_one_problem() -> None:
    (finding,) = diagnose("a", Answers(Failure("no answer within 9 s")), CLIENT, SERVER, None, NODE)
    assert (finding.check, finding.status, finding.detail) == ("answers", "problem", "no answer within 9 s")


def test_the_same_problem_of_many_nodes_is_told_once() -> None:
    same = [Finding(f"node-{i}", "ninja", "problem", "none found", "pip install ninja") for i in range(3)]
    diagnosis = Diagnosis([*same, Finding("node-3", "ninja", "ok", "/usr/bin/ninja")])
    assert not diagnosis.ok
    text = io.StringIO()
    Console(file=text, width=120).print(diagnosis)
    assert text.getvalue().count("pip install ninja") == 1
    assert "problem ninja on node-0, node-1, node-2: none found; pip install ninja" in text.getvalue()
    told = json.loads(diagnosis.to_json())
    assert told["ok"] is False
    assert [finding["status"] for finding in told["findings"]] == ["problem"] * 3 + ["ok"]


def test_addresses_that_cannot_work_are_refused_at_once() -> None:
    with pytest.raises(DoctorError, match=r"ray job submit --address http://head:8265 -- orpo-ray doctor"):
        require_reachable("http://user:secret@head:8265")
    with pytest.raises(DoctorError, match=r"nothing answers at ray://127.0.0.1:9 .*refused"):
        require_reachable("ray://127.0.0.1:9")
    require_reachable("auto")


def test_a_storage_that_does_not_hold_what_others_wrote_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_probe, "_PATIENCE_S", 0.1)
    here = str(tmp_path)
    assert node_probe.storage_problem(here, write="x/node-0") is None
    assert node_probe.storage_problem(here, read=["x/node-0"]) is None
    assert (
        node_probe.storage_problem(here, read=["x/node-0", "x/node-1"]) == "objects written by node-1 are not visible"
    )
    (tmp_path / "file").touch()
    assert "cannot write" in str(node_probe.storage_problem(f"{here}/file", write="x/node-0"))
