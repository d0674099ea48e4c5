"""Resources of the cluster now, and of the nodes that an autoscaler could add.

Waiting trials request placement groups, which makes an autoscaler add nodes. Ray does not expose the autoscaler's
limits (Ray Train's own check reads a record in the GCS that open-source clusters do not write), so they are read from
the file that `ray up` leaves on the head node; elsewhere they stay unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import ActorID, PlacementGroupID
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

from orpo_ray.config import ScalingConfig

_CLUSTER_FILE = Path("~/ray_bootstrap_config.yaml")
"""`ray up` puts the cluster's file here on the head node, and starts Ray with it
(docs.ray.io, "Launching clusters on VMs"; ray/autoscaler/_private/commands.py)."""
_NODE_GROUP = "ray.io/node-group"
"""Label with a node's type, set by `ray up` and KubeRay (docs.ray.io, "Use labels to control scheduling")."""
_UNBOUNDED = 1000
"""Number of nodes to plan with if a cluster sets no limit."""


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of one worker group. Any group of a trial's resource class can run it."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: int

    @classmethod
    def of(cls, scaling: ScalingConfig, cluster_has_gpus: bool) -> Resources:
        """Resources for a scaling config; `use_gpu: auto` uses GPUs if the cluster has any."""
        use_gpu = cluster_has_gpus if scaling.use_gpu == "auto" else scaling.use_gpu
        return cls(scaling.num_workers, scaling.cpus_per_worker, int(use_gpu))

    @property
    def resource_class(self) -> str:
        """Name of the resource class, e.g. `2x4cpu1gpu`."""
        return f"{self.num_workers}x{self.cpus_per_worker}cpu{self.gpus_per_worker}gpu"

    @property
    def per_worker(self) -> dict[str, float]:
        """Ray resources of one worker."""
        return {"CPU": float(self.cpus_per_worker), "GPU": float(self.gpus_per_worker)}

    def describe(self) -> str:
        """Text for messages, e.g. `2 × 4 CPU and 1 GPU`."""
        gpus = f" and {self.gpus_per_worker} GPU" if self.gpus_per_worker else ""
        return f"{self.num_workers} × {self.cpus_per_worker} CPU{gpus}"

    def workers_on(self, node: Mapping[str, float]) -> int:
        """Number of the group's workers that fit on a node with these free resources."""
        return int(min(node.get(kind, 0.0) // need for kind, need in self.per_worker.items() if need))


@dataclass(frozen=True, slots=True)
class Capacity:
    """The cluster at one moment."""

    nodes: dict[str, dict[str, float]]
    """Id of each live node -> its total resources, e.g. `{"CPU": 16, "GPU": 1}`."""
    growth: tuple[dict[str, float], ...] | None = ()
    """Resources of each node that an autoscaler could add; empty without an autoscaler, None if limits are unknown."""
    most_new_nodes: int = 0
    """Largest number of nodes of `growth` that it may add."""

    @property
    def has_gpus(self) -> bool | None:
        """Whether a node has a GPU, now or after growth; None if unknown."""
        if any(node.get("GPU", 0) > 0 for node in [*self.nodes.values(), *(self.growth or ())]):
            return True
        return None if self.growth is None else False

    @property
    def is_elastic(self) -> bool:
        """Whether an autoscaler may add nodes for waiting groups."""
        return self.growth is None or self.most_new_nodes > 0

    def could_hold(self, requests: Sequence[Resources]) -> bool:
        """Whether all these groups fit at once after the largest possible growth."""
        if self.growth is None or not requests:
            return True
        # Add first the nodes that hold most workers of the last request.
        wanted = requests[-1]
        added = sorted(self.growth, key=wanted.workers_on, reverse=True)[: self.most_new_nodes]
        return fits(requests, [*self.nodes.values(), *added])

    def slots(self, kinds: Sequence[Resources]) -> int:
        """Number of trials that should train or wait for nodes at once.

        Each trial costs a process on the head node, so a growing cluster is asked to at most double, by at least one
        trial, as autoscalers do by default (`upscaling_speed: 1.0`).
        """
        now = most_groups(kinds, list(self.nodes.values()))
        if self.growth is None:
            return max(1, 2 * now)
        added = sorted(self.growth, key=lambda n: sum(n.values()), reverse=True)[: self.most_new_nodes]
        return max(1, min(2 * now or 1, most_groups(kinds, [*self.nodes.values(), *added])))

    def describe(self) -> str:
        """Current and possible resources, as text for messages."""
        text = f"the cluster has {_totals(list(self.nodes.values()))} on {len(self.nodes)} nodes"
        if self.growth is None:
            return f"{text} and an autoscaler"
        if self.most_new_nodes:
            kinds = {tuple(sorted(node.items())): node for node in self.growth}.values()
            each = " or ".join(_totals([kind]) for kind in kinds)
            return f"{text}, and may add {self.most_new_nodes} nodes of {each}"
        return text


def snapshot() -> Capacity:
    """The connected cluster now. Cheap: two GCS requests and a small file."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = {node["NodeID"]: node["Resources"] for node in alive}
    types = [node["Labels"].get(_NODE_GROUP, "") for node in alive]
    head = next((t for t, n in zip(types, alive, strict=True) if "node:__internal_head__" in n["Resources"]), "")
    if (reported := _reported(types)) is not None:
        return Capacity(nodes, *reported)
    if not head:
        return Capacity(nodes)  # started by hand
    file = _CLUSTER_FILE.expanduser()
    cluster = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if cluster.get("head_node_type") == head:
        return Capacity(nodes, *_addable(cluster, types))
    return Capacity(nodes, None) if _has_autoscaler() else Capacity(nodes)


def give_back_abandoned() -> None:
    """Remove placement groups of this job whose creating actor is dead.

    A killed controller of Ray Train leaves its placement group behind. Ray Train's own cleaner asks the dashboard
    whether the controller lives; without a dashboard the group would keep its CPUs and GPUs until the job ends (ray
    2.60). The GCS knows too, but only its own records show it.
    """
    job = ray.get_runtime_context().get_job_id()
    for record in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(record)
        if group.creator_job_id.hex() != job or group.state == PlacementGroupTableData.REMOVED:
            continue
        # Placement groups made by the job's own process (Tune's) have no actor, but are marked as having a dead one.
        if group.creator_actor_dead and not ActorID(group.creator_actor_id).is_nil():
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def fits(requests: Sequence[Resources], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether the workers of all groups fit at once, placed first-fit, largest first.

    Args:
        requests: resources of each group.
        nodes: each node's total resources.
    """
    free = [dict(node) for node in nodes]
    widest_first = sorted(requests, key=lambda r: (r.gpus_per_worker, r.cpus_per_worker), reverse=True)
    return all(place(request, free) for request in widest_first)


def place(request: Resources, free: Sequence[dict[str, float]]) -> bool:
    """Deduct a group's resources from the nodes if all its workers fit; else change nothing. Returns whether they fit.

    Args:
        request: resources of the group.
        free: free resources of each node; changed in place.
    """
    room = [request.workers_on(node) for node in free]
    if sum(room) < request.num_workers:
        return False
    left = request.num_workers
    for node, most in zip(free, room, strict=True):
        here = min(left, most)
        left -= here
        for kind, need in request.per_worker.items():
            node[kind] = node.get(kind, 0.0) - here * need
    return True


def most_groups(kinds: Sequence[Resources], nodes: Sequence[Mapping[str, float]]) -> int:
    """Number of groups of the smallest kind that fit on these nodes at once."""
    smallest = min(kinds, key=lambda r: (r.gpus_per_worker * r.num_workers, r.cpus_per_worker * r.num_workers))
    return sum(smallest.workers_on(node) for node in nodes) // smallest.num_workers


class SharedFolder:
    """Checks once per node whether it sees a folder of this node."""

    def __init__(self, proof: Path) -> None:
        """Args:
        proof: a file in that folder that no other node has on its own disk.
        """
        self._proof, self._text = proof, proof.read_text(encoding="utf-8")
        self._asked: dict[str, Any] = {}
        """Node -> object reference of its pending answer."""
        self._known = {ray.get_runtime_context().get_node_id()}

    def nodes_without_access(self, capacity: Capacity, timeout_s: float = 0.0) -> list[str]:
        """Ask new nodes, waiting at most `timeout_s`. Returns the ids of nodes that do not see the folder."""
        for node in capacity.nodes.keys() - self._known:
            there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
            task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_text_of)
            self._asked[node] = task.remote(str(self._proof))
            self._known.add(node)
        if not self._asked:
            return []
        ready, _ = ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=timeout_s)
        answers = {node: self._asked.pop(node) for node in list(self._asked) if self._asked[node] in ready}
        blind = []
        for node, reference in answers.items():
            try:
                text = ray.get(reference)
            except ray.exceptions.RayError:
                self._known.discard(node)  # it is gone, or about to be; else it is asked again
                continue
            if text != self._text:
                blind.append(node)
        return sorted(blind)


def _text_of(path: str) -> str | None:
    file = Path(path)
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _reported(types: list[str]) -> tuple[tuple[dict[str, float], ...], int] | None:
    """Node limits that a managed service has reported to the GCS."""
    from ray._private.state import state  # there is no public API; Ray Train and Ray Data read it here too

    config = state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    growth: list[dict[str, float]] = []
    for group in config.node_group_configs:
        most = _UNBOUNDED if group.max_count < 0 else group.max_count
        growth += [{kind: float(n) for kind, n in group.resources.items()}] * max(0, most - types.count(group.name))
    return tuple(growth), len(growth)


def _addable(cluster: dict[str, Any], types: list[str]) -> tuple[tuple[dict[str, float], ...] | None, int]:
    """Nodes that the autoscaler may still add by a cluster file, and how many of them at once."""
    growth: list[dict[str, float]] = []
    most_workers = cluster.get("max_workers", 2)  # Ray's default
    for name, kind in cluster.get("available_node_types", {}).items():
        if name == cluster["head_node_type"]:
            continue
        resources = kind.get("resources")
        if not resources:
            return None, 0  # Ray detects them once such a node runs
        most = min(kind.get("max_workers", most_workers), most_workers)
        growth += [{key: float(n) for key, n in resources.items()}] * max(0, most - types.count(name))
    workers = len(types) - types.count(cluster["head_node_type"])
    return tuple(growth), min(len(growth), max(0, most_workers - workers))


def _has_autoscaler() -> bool:
    """Whether one reports to the GCS: KubeRay's does. (It is the second version's; the first one reports nothing.)"""
    from ray._private.worker import global_worker
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    reply.ParseFromString(global_worker.gcs_client.get_cluster_status(timeout_s=10))
    return bool(reply.autoscaling_state.autoscaler_state_version)


def _totals(nodes: list[dict[str, float]]) -> str:
    cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    return f"{cpus} CPU and {gpus} GPU"
