"""Turn what `orpo-ray doctor` measured into findings; every fault comes with advice. Performs no I/O on nodes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_ray.cluster.findings import Finding
from orpo_ray.formatting import GIB, gib
from orpo_ray.provenance import without_password

_MAX_SKEW_S = 1.0
_MIN_TEMP_FREE, _MIN_SHM = 5 * GIB, GIB
_MIN_FILES = 4096


@dataclass(frozen=True, slots=True)
class Node:
    """A node as Ray's head node lists it."""

    node_id: str
    address: str
    is_head: bool
    gpus: float
    """GPUs that Ray offers on the node."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request to a node that failed or timed out."""

    reason: str


@dataclass(frozen=True, slots=True)
class Answers:
    """A node's answers to the probe's requests, or why it gave none."""

    facts: dict[str, Any] | Failure
    """Result of `node_probe.measure`."""
    mlflow: str | Failure | None = None
    """Problem with MLflow; None if it works."""
    storage: str | Failure | None = None
    """Problem with the storage; None if it works or was not tested."""
    skew_s: float | Failure | None = None
    """The node's clock minus the head node's, in seconds."""
    skew_error_s: float = 0.0
    """Uncertainty of `skew_s`: half of the shortest round trip, in seconds."""


def diagnose(
    name: str,
    answers: Answers,
    client: dict[str, Any],
    tracking_uri: str,
    storage: str | None,
    node: Node | None = None,
    head: dict[str, Any] | None = None,
) -> list[Finding]:
    """Turn one node's answers into findings; a pure function.

    Args:
        name: the node's name in the findings.
        answers: the node's answers.
        client: facts of this process, for comparison.
        tracking_uri: the URI that `answers.mlflow` is about.
        storage: the storage that `answers.storage` is about.
        node: the node as Ray lists it; None for this machine, outside of a cluster.
        head: facts of the head node, if it has answered.
    """
    facts = answers.facts
    if isinstance(facts, Failure):
        return [
            Finding(
                name,
                "answers",
                "problem",
                facts.reason,
                "look at the node's raylet.out and worker logs in /tmp/ray/session_latest/logs; ray status shows "
                "whether it is alive; drain it or restart Ray on it",
            )
        ]
    found = [
        *([Finding(name, "answers", "ok", "yes")] if node else []),
        _packages(name, facts, client, head),
        *([_code(name, facts, client), _clock(name, answers)] if node else []),
        _tool(name, "C++ compiler", facts["compiler"], "DeepSpeed compiles ops at first use: install g++"),
        _tool(name, "ninja", facts["ninja"], "DeepSpeed compiles ops with ninja: pip install ninja"),
        _compiled_ops(name, facts),
        *([_gpus(name, facts, node), _auth(name, facts, head or facts, node)] if node else []),
        _at_least(
            name,
            "disk",
            facts["temp_free"],
            _MIN_TEMP_FREE,
            f"free in {facts['temp']}",
            "Ray keeps its sessions there and fails without space: free some, or start Ray with --temp-dir",
        ),
        _at_least(
            name,
            "shared memory",
            facts["shm"],
            _MIN_SHM,
            "in /dev/shm",
            "NCCL and Ray's object store need it: docker run --shm-size=8g, or a Memory emptyDir at /dev/shm in a pod",
        ),
        _files(name, facts["files"]),
        _mlflow(name, answers, tracking_uri, node),
    ]
    if storage is not None:
        found.append(_service(name, "storage", answers.storage, storage, _STORAGE_ADVICE))
    elif node is not None:
        found.append(Finding(name, "storage", "warning", "not checked", "name it with --storage URI or folder"))
    return found


_MLFLOW_ADVICE = (
    "let this machine reach the server (use an address other than localhost, and --allowed-hosts of mlflow server), "
    "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on every node if the server requires them"
)
_STORAGE_ADVICE = "every node needs the same storage: an object store, or a folder that all nodes mount at this path"


def _packages(name: str, facts: dict[str, Any], client: dict[str, Any], head: dict[str, Any] | None) -> Finding:
    """Compare versions. The device suffix of a build (2.9.0+cpu) must agree between nodes, not with the client."""
    mine = _versions(facts)
    missing = [package for package, version in mine.items() if version is None]
    theirs = {"this process": {p: _public(v) for p, v in _versions(client).items()}}
    if head is not None:
        theirs["the head node"] = _versions(head)
    differ = []
    for whose, versions in theirs.items():
        for package, version in mine.items():
            here = _public(version) if whose == "this process" else version
            if None not in (here, versions[package]) and here != versions[package]:
                differ.append(f"{package} {version}, where {whose} has {versions[package]}")
    if missing or differ:
        detail = "; ".join(([f"not installed: {', '.join(missing)}"] if missing else []) + differ)
        return Finding(name, "packages", "problem", detail, "run pip install -e . -c constraints.txt on every node")
    return Finding(name, "packages", "ok", ", ".join(f"{p} {v}" for p, v in mine.items()))


def _versions(facts: dict[str, Any]) -> dict[str, str | None]:
    return facts["packages"] | {"python": facts["python"]}


def _public(version: str | None) -> str | None:
    return None if version is None else version.partition("+")[0]


def _code(name: str, facts: dict[str, Any], client: dict[str, Any]) -> Finding:
    if facts["code"] is None:
        return Finding(
            name, "code", "problem", "orpo_ray cannot be imported", "install it there, or submit it with --working-dir"
        )
    if facts["code"] != client["code"]:
        return Finding(
            name,
            "code",
            "problem",
            f"its orpo_ray code (digest {facts['code']}) differs from this process's ({client['code']})",
            "install the same commit on every node, or run from a job that uploads it (--working-dir)",
        )
    return Finding(name, "code", "ok", f"digest {facts['code']}")


def _clock(name: str, answers: Answers) -> Finding:
    if answers.skew_s is None or isinstance(answers.skew_s, Failure):
        reason = answers.skew_s.reason if isinstance(answers.skew_s, Failure) else "the head node did not answer"
        return Finding(name, "clock", "problem", f"not compared: {reason}", "find out why the node hangs")
    detail = f"{1000 * answers.skew_s:+.0f} ms (± {1000 * answers.skew_error_s:.0f}) from the head node"
    if abs(answers.skew_s) - answers.skew_error_s > _MAX_SKEW_S:
        return Finding(
            name,
            "clock",
            "problem",
            detail,
            "logs of different nodes cannot be ordered; a skew of minutes makes object stores refuse requests, one of "
            "days breaks TLS: run chrony or systemd-timesyncd there",
        )
    return Finding(name, "clock", "ok", detail)


def _tool(name: str, check: str, path: str | None, advice: str) -> Finding:
    if path is None:
        return Finding(name, check, "problem", "none found", advice)
    return Finding(name, check, "ok", path)


def _compiled_ops(name: str, facts: dict[str, Any]) -> Finding:
    if locks := facts["locks"]:
        detail = f"{locks[0]} was left by a build that was killed: later builds would wait for it"
        return Finding(name, "compiled ops", "problem", detail, "remove it, unless a build is running now")
    return Finding(name, "compiled ops", "ok", facts["extensions"])


def _gpus(name: str, facts: dict[str, Any], node: Node) -> Finding:
    gpus, offered = facts["gpus"], int(node.gpus)
    seen = len(gpus["names"])
    if gpus["error"]:
        return Finding(name, "GPUs", "problem", f"torch cannot be imported: {gpus['error']}", "install torch again")
    if seen == offered:
        return Finding(name, "GPUs", "ok", f"{seen} × {gpus['names'][0]}" if seen else "none")
    detail = f"Ray offers {offered}, torch sees {seen}"
    if seen > offered:
        advice = f"start Ray there with --num-gpus={seen}; otherwise GPUs stay idle"
        return Finding(name, "GPUs", "problem", detail, advice)
    if gpus["cuda"] is None:
        return Finding(name, "GPUs", "problem", detail, "this torch is built without CUDA: install a CUDA build")
    return Finding(
        name,
        "GPUs",
        "problem",
        detail,
        f"torch is built for CUDA {gpus['cuda']}: check that nvidia-smi works there, also in the container "
        "(--gpus all), and that CUDA_VISIBLE_DEVICES hides no GPU",
    )


def _auth(name: str, facts: dict[str, Any], head: dict[str, Any], node: Node) -> Finding:
    mode, expected = facts["auth"] or "unset", head["auth"] or "unset"
    if mode != expected:
        return Finding(
            name,
            "auth",
            "problem",
            f"RAY_AUTH_MODE is {mode} here, {expected} on the head node",
            "set it to the same value on every node before ray start",
        )
    if mode != "token" and not node.address.startswith("127."):
        return Finding(
            name,
            "auth",
            "warning",
            f"RAY_AUTH_MODE is {mode}: anyone who can reach the cluster's ports can run code on it",
            "restrict access to the ports, or set RAY_AUTH_MODE=token and a token on every node",
        )
    return Finding(name, "auth", "ok", f"RAY_AUTH_MODE={mode}")


def _at_least(name: str, check: str, found: int, needed: int, what: str, advice: str) -> Finding:
    detail = f"{gib(found)} {what}"
    if found < needed:
        return Finding(name, check, "problem", f"{detail}, {needed / GIB:.0f} GiB are needed", advice)
    return Finding(name, check, "ok", detail)


def _files(name: str, limit: int) -> Finding:
    if 0 <= limit < _MIN_FILES:
        return Finding(
            name,
            "open files",
            "problem",
            f"a process may open {limit}, {_MIN_FILES} are needed",
            "run ulimit -n 65536 before ray start (docker run --ulimit nofile=65536:65536)",
        )
    return Finding(name, "open files", "ok", "no limit" if limit < 0 else f"{limit} per process")


def _mlflow(name: str, answers: Answers, uri: str, node: Node | None) -> Finding:
    if node is not None and not is_served(uri):
        return Finding(name, "MLflow", "ok", "not tested: only the sweep's own process writes to a file")
    return _service(name, "MLflow", answers.mlflow, uri, _MLFLOW_ADVICE)


def is_served(uri: str) -> bool:
    """Whether a tracking URI names a server, which other machines can reach."""
    return uri.startswith(("http://", "https://"))


def _service(name: str, check: str, problem: str | Failure | None, uri: str, advice: str) -> Finding:
    uri = without_password(uri)
    if isinstance(problem, Failure):
        return Finding(name, check, "problem", f"{uri}: {problem.reason}", advice)
    if problem is not None:
        return Finding(name, check, "problem", f"{uri}: {without_password(problem)}", advice)
    return Finding(name, check, "ok", uri)


def accelerator(facts: dict[str, Any]) -> Finding:
    """Finding about this machine's GPUs, from `node_probe.measure`."""
    gpus = facts["gpus"]
    if gpus["error"]:
        return Finding(
            "", "accelerator", "problem", f"torch cannot be imported: {gpus['error']}", "install torch again"
        )
    if gpus["names"]:
        return Finding("", "accelerator", "ok", f"{len(gpus['names'])} × {', '.join(sorted(set(gpus['names'])))}")
    return Finding(
        "", "accelerator", "ok", f"none; CPU with {facts['cpus']} cores, DS_ACCELERATOR=cpu is set for workers"
    )


def client_auth() -> Finding:
    """Finding about this process's address and token for Ray."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    address = os.environ.get("RAY_ADDRESS", "")
    detail = f"RAY_AUTH_MODE={mode or '(unset)'}, RAY_ADDRESS={address or '(unset: a local cluster is started)'}"
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    default_token = Path("~/.ray/auth_token").expanduser()
    if mode == "token" and address and not token and not default_token.exists():
        return Finding(
            "",
            "Ray authentication",
            "problem",
            f"{detail}, but no token is set",
            f"set RAY_AUTH_TOKEN or write {default_token}",
        )
    return Finding("", "Ray authentication", "ok", detail)
