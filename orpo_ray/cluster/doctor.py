"""`orpo-ray doctor`: check what training needs, on this machine or on every node of a cluster.

All nodes are checked at the same time, each by an actor that reserves no CPU (docs.ray.io, node affinity scheduling).
Every request has a deadline: a node that hangs becomes a finding.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections import Counter
from typing import Any

from orpo_ray.cluster import node_probe
from orpo_ray.cluster.diagnosis import Answers, Failure, Node, accelerator, client_auth, diagnose, is_served
from orpo_ray.cluster.findings import Diagnosis
from orpo_ray.errors import UserError
from orpo_ray.provenance import without_password

TIMEOUT_S = 90.0
"""A node that does not answer a request for this long counts as hung."""
_CLOCK_SAMPLES, _CONNECT_S = 10, 5.0
_CLIENT = "this process"
_CLIENT_CHECKS = ("packages", "MLflow", "storage")
"""Checks that the sweep's own process must pass; the others concern workers."""


class DoctorError(UserError, RuntimeError):
    """The cluster cannot be checked as requested; the message says why and what to do."""


def this_machine(tracking_uri: str, storage: str | None = None) -> Diagnosis:
    """Check this machine: versions, accelerator, compiler and ninja, Ray's authentication, MLflow, and the storage.

    Args:
        tracking_uri: from `tracking.uri.resolve_uri`.
        storage: URI or path; None: not tested.
    """
    answers = Answers(
        node_probe.measure(),
        node_probe.mlflow_problem(tracking_uri),
        _own_storage(storage),
        skew_s=None,
    )
    assert not isinstance(answers.facts, Failure)
    findings = diagnose("", answers, answers.facts, tracking_uri, storage)
    return Diagnosis([*findings, accelerator(answers.facts), client_auth()])


def cluster(tracking_uri: str, storage: str | None = None, timeout_s: float = TIMEOUT_S) -> Diagnosis:
    """Check every node of the connected Ray cluster, and compare the nodes with each other and with this process.

    Writes small objects to the storage and deletes them; starts one actor per node, and ends it.

    Args:
        tracking_uri: from `tracking.uri.resolve_uri`.
        storage: URI, or path that all nodes are to share; None: not tested.
        timeout_s: deadline of each round of requests, in seconds.
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
        findings += diagnose(name, got, mine.facts, tracking_uri, storage, node, head)
    own = diagnose(_CLIENT, mine, mine.facts, tracking_uri, storage)
    findings += [finding for finding in own if finding.check in _CLIENT_CHECKS]
    return Diagnosis(findings)


def require_reachable(address: str) -> None:
    """Test an address before Ray does, because Ray would try for two minutes and then end the process.

    Args:
        address: `HOST:PORT`, `ray://HOST:PORT`, or a name that Ray resolves itself, such as `auto`.

    Raises:
        DoctorError: the address is a job server's, or nothing listens there.
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
            f"nothing answers at {address} ({error}): check with ray status on the head node that the cluster runs, "
            "and on which port; from outside, a firewall or a missing kubectl port-forward may be the cause"
        ) from error


def connection_error(address: str, error: Exception) -> DoctorError:
    """Error for an address at which something listens, but Ray cannot connect."""
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"))
    return DoctorError(
        f"something answers at {address}, but Ray cannot connect to it. RAY_AUTH_MODE is "
        f"{os.environ.get('RAY_AUTH_MODE') or 'unset'} here, and a token is {'set' if has_token else 'not set'} by "
        "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (otherwise ~/.ray/auth_token is used): both must match the cluster's; "
        "the port must be Ray's (6379 by default), and the versions of Ray and Python must be the same. "
        f"({without_password(' '.join(str(error).split()))})"
    )


def _own_storage(storage: str | None) -> str | None:
    if storage is None:
        return None
    name = f".doctor-{uuid.uuid4().hex[:8]}"
    problem = node_probe.storage_problem(storage, write=name, read=[name])
    node_probe.clean_up(storage, name)
    return problem


# ---- probing the nodes ----------------------------------------------------------------------------------------------


def _nodes() -> list[Node]:
    """Nodes that are alive, the head node first."""
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
    """Probe every node and this process: node id (or `this process`) -> answers."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # One thread per request, so that one that hangs does not block the others.
    actor = ray.remote(num_cpus=0, max_concurrency=4)(node_probe.NodeProbe)
    probes = {
        node.node_id: actor.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        ).remote()
        for node in nodes
    }
    folder = f".doctor-{uuid.uuid4().hex[:8]}"
    # The address is familiar to readers; the number distinguishes nodes on one machine.
    names = {node.node_id: f"{node.address}-{number}" for number, node in enumerate(nodes)} | {_CLIENT: "client"}
    try:
        deadline = time.monotonic() + timeout_s
        facts = {node: probe.facts.remote() for node, probe in probes.items()}
        # Only the sweep's own process writes to a file, wherever it runs.
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
            # Every node cleans up after itself: if storage is not shared, no other node can.
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
    """Answers by node; a Failure for each that did not arrive in time."""
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
    """(node's clock minus ours, half the round trip), in seconds, of the fastest of several exchanges, as in NTP (RFC
    5905).

    The trip is measured in monotonic time, so setting the clock meanwhile does no harm.
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
    return best or Failure("not measured")


def _relative(
    clock: tuple[float, float] | Failure | None, head: tuple[float, float] | Failure | None
) -> tuple[float | Failure | None, float]:
    """A node's clock minus the head node's, and the uncertainty, in seconds; None if the head did not answer."""
    if isinstance(clock, Failure):
        return clock, 0.0
    if clock is None or head is None or isinstance(head, Failure):
        return None, 0.0
    return clock[0] - head[0], clock[1] + head[1]
