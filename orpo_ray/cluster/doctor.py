"""`orpo-ray doctor`: whether everything that training needs is there, on this machine or on every node of a cluster.

Nodes are asked at the same time, each by an actor that takes no CPU (docs.ray.io, node affinity scheduling), and every
question has a deadline: a node that hangs is a finding.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections import Counter
from typing import Any

from orpo_ray.cluster import node_probe
from orpo_ray.cluster.diagnosis import Answers, Diagnosis, Failure, Node, accelerator, client_auth, is_served, judge
from orpo_ray.errors import UserError
from orpo_ray.provenance import without_password

TIMEOUT_S = 90.0
"""A node that does not answer a question for so long counts as hung."""
_CLOCK_SAMPLES, _CONNECT_S = 10, 5.0
_CLIENT = "this process"
_CLIENT_CHECKS = ("packages", "MLflow", "storage")
"""What the process of a sweep itself needs; the rest is done by workers."""


class DoctorError(UserError, RuntimeError):
    """The cluster cannot be looked at as asked for; the message says why and what to do."""


def this_machine(tracking_uri: str, storage: str | None = None) -> Diagnosis:
    """Versions, accelerator, compiler and ninja, Ray's authentication, MLflow, and the storage where one is named.

    Args:
        tracking_uri: as `mlflow_uri.resolve_uri` gives it.
        storage: URI or path.
    """
    answers = Answers(
        node_probe.measure(),
        node_probe.mlflow_problem(tracking_uri),
        _own_storage(storage),
        skew_s=None,
    )
    assert not isinstance(answers.facts, Failure)
    findings = judge("", answers, answers.facts, tracking_uri, storage)
    return Diagnosis([*findings, accelerator(answers.facts), client_auth()])


def cluster(tracking_uri: str, storage: str | None = None, timeout_s: float = TIMEOUT_S) -> Diagnosis:
    """The same on every node of the cluster that Ray is connected to, compared with each other and with this process.

    Writes small objects to the storage and deletes them; starts one actor a node, and ends it.

    Args:
        tracking_uri: as `mlflow_uri.resolve_uri` gives it.
        storage: URI, or path that all nodes are to share.
        timeout_s: for each round of questions.
    """
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(node_probe)
    try:
        nodes = _nodes()
        answers = _examine(nodes, tracking_uri, storage, timeout_s)
    finally:
        cloudpickle.unregister_pickle_by_value(node_probe)
    mine = answers.pop(_CLIENT)
    assert not isinstance(mine.facts, Failure)
    heads = [answers[node.node_id].facts for node in nodes if node.is_head]
    head = next((facts for facts in heads if not isinstance(facts, Failure)), None)
    findings = []
    on_address = Counter(node.address for node in nodes)
    for node in nodes:
        got = answers[node.node_id]
        name = node.address if isinstance(got.facts, Failure) else f"{node.address} ({got.facts['host']})"
        if on_address[node.address] > 1:
            name += f" {node.node_id[:6]}"
        findings += judge(name, got, mine.facts, tracking_uri, storage, node, head)
    own = judge(_CLIENT, mine, mine.facts, tracking_uri, storage)
    findings += [finding for finding in own if finding.check in _CLIENT_CHECKS]
    return Diagnosis(findings)


def require_reachable(address: str) -> None:
    """Look at an address before Ray does, which would try for two minutes and then end the process.

    Args:
        address: `HOST:PORT`, `ray://HOST:PORT` or what Ray itself finds out, such as `auto`.

    Raises:
        DoctorError: it takes jobs, not tasks, or nothing listens there.
    """
    if address.startswith(("http://", "https://")):
        shown = without_password(address)
        raise DoctorError(
            f"{shown} is the address of a dashboard, which takes jobs, but doctor must run on every node: give "
            f"HOST:6379, auto or ray://HOST:10001, or run it as a job: ray job submit --address {shown} -- "
            "orpo-ray doctor --address auto"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise DoctorError(
            f"nothing answers at {address} ({error}): see with ray status on the head node that the cluster runs and "
            "on which port; from outside, a firewall or a missing kubectl port-forward may be in the way"
        ) from error


def not_let_in(address: str, error: Exception) -> DoctorError:
    """What to say where something listens at an address, but no connection of Ray's comes about."""
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"))
    return DoctorError(
        f"something answers at {address}, but does not let Ray connect. RAY_AUTH_MODE is "
        f"{os.environ.get('RAY_AUTH_MODE') or 'unset'} here, and a token is {'set' if has_token else 'not set'} by "
        "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (else ~/.ray/auth_token counts): both must be as on the cluster; the "
        "port must be Ray's (6379 unless told otherwise), and the versions of Ray and Python the same. "
        f"({without_password(' '.join(str(error).split()))})"
    )


def _own_storage(storage: str | None) -> str | None:
    if storage is None:
        return None
    name = f".doctor-{uuid.uuid4().hex[:8]}"
    problem = node_probe.storage_problem(storage, write=name, read=[name])
    node_probe.clean_up(storage, name)
    return problem


# ---- asking the nodes -----------------------------------------------------------------------------------------------


def _nodes() -> list[Node]:
    import ray

    alive = [
        Node(
            info["NodeID"],
            info["NodeManagerAddress"],
            "node:__internal_head__" in info["Resources"],
            info["Resources"].get("GPU", 0.0),
        )
        for info in ray.nodes()
        if info["Alive"]
    ]
    return sorted(alive, key=lambda node: (not node.is_head, node.address, node.node_id))


def _examine(nodes: list[Node], tracking_uri: str, storage: str | None, timeout_s: float) -> dict[str, Answers]:
    """Ask every node, and this process: node id (or `this process`) -> answers."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # A thread for each question, so that one that hangs leaves the others to be answered.
    actor = ray.remote(num_cpus=0, max_concurrency=4)(node_probe.NodeProbe)
    probes = {
        node.node_id: actor.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        ).remote()
        for node in nodes
    }
    folder = f".doctor-{uuid.uuid4().hex[:8]}"
    # With the address, which people know; the number tells nodes of one machine apart.
    names = {node.node_id: f"{node.address}-{number}" for number, node in enumerate(nodes)} | {_CLIENT: "client"}
    try:
        deadline = time.monotonic() + timeout_s
        facts = {node: probe.facts.remote() for node, probe in probes.items()}
        # A file is written by the sweep's own process only, wherever that runs.
        mlflow = {n: p.mlflow.remote(tracking_uri) for n, p in probes.items()} if is_served(tracking_uri) else {}
        written = {n: p.write.remote(storage, f"{folder}/{names[n]}") for n, p in probes.items()} if storage else {}
        mine = node_probe.measure(with_gpus=False)
        my_mlflow = node_probe.mlflow_problem(tracking_uri)
        my_storage = node_probe.storage_problem(storage, write=f"{folder}/client") if storage else None
        got_facts, got_mlflow, got_storage = (_gather(asked, deadline, timeout_s) for asked in (facts, mlflow, written))
        answering = {n: p for n, p in probes.items() if not isinstance(got_facts[n], Failure)}
        if storage:
            wrote = [n for n in probes if got_storage[n] is None] + ([_CLIENT] if my_storage is None else [])
            there = [f"{folder}/{names[n]}" for n in wrote]
            asked = {n: probes[n].read.remote(storage, there) for n in wrote if n != _CLIENT}
            got_storage |= _gather(asked, time.monotonic() + timeout_s, timeout_s)
            my_storage = my_storage or node_probe.storage_problem(storage, read=there)
        clocks = {n: _offset(probe, timeout_s) for n, probe in answering.items()}
        if storage:
            # Each for itself: where there is not one storage for all, nobody else can.
            swept = {n: probes[n].clean_up.remote(storage, folder) for n in wrote if n != _CLIENT}
            _gather(swept, time.monotonic() + timeout_s, timeout_s)
            node_probe.clean_up(storage, folder)
    finally:
        for probe in probes.values():
            ray.kill(probe)
    head = next((clocks[n.node_id] for n in nodes if n.is_head and n.node_id in clocks), None)
    result = {_CLIENT: Answers(mine, my_mlflow, my_storage)}
    for n in probes:
        skew, error = _relative(clocks.get(n), head)
        result[n] = Answers(got_facts[n], got_mlflow.get(n), got_storage.get(n), skew, error)
    return result


def _gather(asked: dict[str, Any], deadline: float, timeout_s: float) -> dict[str, Any]:
    """Answers, or Failures of those that are not there in time."""
    import ray
    from ray.exceptions import RayError

    answers: dict[str, Any] = {}
    for node, reference in asked.items():
        try:
            answers[node] = ray.get(reference, timeout=max(0.05, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            answers[node] = Failure(f"no answer within {timeout_s:.0f} s")
        except RayError as error:
            answers[node] = Failure(f"{type(error).__name__}: {_last_line(str(error))}")
    return answers


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _offset(probe: Any, timeout_s: float) -> tuple[float, float] | Failure:
    """(the node's clock minus ours, half the round trip) of the quickest of some exchanges, as NTP takes it (RFC 5905).

    Monotonic time measures the trip, so that a clock that is set meanwhile spoils nothing.
    """
    best: tuple[float, float] | None = None
    for _ in range(_CLOCK_SAMPLES):
        began, wall = time.monotonic(), time.time()
        answer = _gather({"": probe.now.remote()}, began + timeout_s, timeout_s)[""]
        if isinstance(answer, Failure):
            return answer
        half = (time.monotonic() - began) / 2
        if best is None or half < best[1]:
            best = answer - (wall + half), half
    return best or Failure("not asked")


def _relative(
    clock: tuple[float, float] | Failure | None, head: tuple[float, float] | Failure | None
) -> tuple[float | Failure | None, float]:
    if isinstance(clock, Failure):
        return clock, 0.0
    if clock is None or head is None or isinstance(head, Failure):
        return None, 0.0
    return clock[0] - head[0], clock[1] + head[1]
