"""What the cluster holds now, and what it could grow to.

Trials that wait are asked for as placement groups, which is what makes an autoscaler add nodes. How far it may go, Ray
tells nobody but the autoscaler itself (Ray Train's own check reads a record in the GCS that open-source clusters do not
write), so it is read where `ray up` left it on the head node; elsewhere it stays unknown.
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
"""Nodes that are planned with where a cluster sets no bound."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one group occupies. Trials that need the same share a resource_class: any group of it can run them."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: int

    @classmethod
    def of(cls, scaling: ScalingConfig, cluster_has_gpus: bool) -> Resources:
        """`use_gpu: auto` means: where the cluster has GPUs."""
        use_gpu = cluster_has_gpus if scaling.use_gpu == "auto" else scaling.use_gpu
        return cls(scaling.num_workers, scaling.cpus_per_worker, int(use_gpu))

    @property
    def resource_class(self) -> str:
        """Name of the resource_class."""
        return f"{self.num_workers}x{self.cpus_per_worker}cpu{self.gpus_per_worker}gpu"

    @property
    def per_worker(self) -> dict[str, float]:
        """Ray's resources of one worker."""
        return {"CPU": float(self.cpus_per_worker), "GPU": float(self.gpus_per_worker)}

    def describe(self) -> str:
        """In words."""
        gpus = f" and {self.gpus_per_worker} GPU" if self.gpus_per_worker else ""
        return f"{self.num_workers} × {self.cpus_per_worker} CPU{gpus}"

    def workers_on(self, node: Mapping[str, float]) -> int:
        """How many of the group's workers a node with these free resources holds."""
        return int(min(node.get(kind, 0.0) // need for kind, need in self.per_worker.items() if need))


@dataclass(frozen=True, slots=True)
class Capacity:
    """The cluster at one moment."""

    nodes: dict[str, dict[str, float]]
    """Id of each live node -> its total resources, e.g. `{"CPU": 16, "GPU": 1}`."""
    growth: tuple[dict[str, float], ...] | None = ()
    """Nodes that an autoscaler could add, each with its resources; empty where there is none; None where there is one
    that does not say."""
    most_new_nodes: int = 0
    """How many of `growth` it may add at once."""

    @property
    def has_gpus(self) -> bool | None:
        """Whether any node offers a GPU, now or later; None where that cannot be known."""
        if any(node.get("GPU", 0) > 0 for node in [*self.nodes.values(), *(self.growth or ())]):
            return True
        return None if self.growth is None else False

    @property
    def is_elastic(self) -> bool:
        """Whether nodes come by themselves where groups wait."""
        return self.growth is None or self.most_new_nodes > 0

    def could_hold(self, requests: Sequence[Resources]) -> bool:
        """Whether there is room for all these groups at once, after growing as far as may be."""
        if self.growth is None or not requests:
            return True
        # The nodes that hold most of what is asked for last, and largest, are added first.
        wanted = requests[-1]
        added = sorted(self.growth, key=wanted.workers_on, reverse=True)[: self.most_new_nodes]
        return fits(requests, [*self.nodes.values(), *added])

    def slots(self, kinds: Sequence[Resources]) -> int:
        """Trials that should train or wait for nodes at once.

        Each costs a process on the head node. So a cluster that grows is asked for as many again as it holds, at
        least one, as autoscalers themselves do by default (`upscaling_speed: 1.0`).
        """
        now = most_groups(kinds, list(self.nodes.values()))
        if self.growth is None:
            return max(1, 2 * now)
        added = sorted(self.growth, key=lambda n: sum(n.values()), reverse=True)[: self.most_new_nodes]
        return max(1, min(2 * now or 1, most_groups(kinds, [*self.nodes.values(), *added])))

    def describe(self) -> str:
        """What there is, and could be, in words."""
        text = f"the cluster has {_totals(list(self.nodes.values()))} on {len(self.nodes)} nodes"
        if self.growth is None:
            return f"{text} and an autoscaler"
        if self.most_new_nodes:
            kinds = {tuple(sorted(node.items())): node for node in self.growth}.values()
            each = " or ".join(_totals([kind]) for kind in kinds)
            return f"{text}, and may add {self.most_new_nodes} nodes of {each}"
        return text


def snapshot() -> Capacity:
    """The connected cluster now. Cheap: two questions to the GCS, and a small file."""
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
    """Remove what actors of this job had reserved that are no more.

    A killed controller of Ray Train leaves its placement group behind. Ray Train's own cleaner asks the dashboard
    whether the controller lives; without a dashboard the group would keep its CPUs and GPUs until the job ends (ray
    2.60). The GCS knows too, but shows it only in its own records.
    """
    job = ray.get_runtime_context().get_job_id()
    for record in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(record)
        if group.creator_job_id.hex() != job or group.state == PlacementGroupTableData.REMOVED:
            continue
        # Those that the job's own process has made, Tune's, have no actor; it too is said to be dead.
        if group.creator_actor_dead and not ActorID(group.creator_actor_id).is_nil():
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def fits(requests: Sequence[Resources], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether all workers of all groups find room at once, placed first-fit, the largest first.

    Args:
        requests: what each group occupies.
        nodes: each node's total resources.
    """
    free = [dict(node) for node in nodes]
    widest_first = sorted(requests, key=lambda r: (r.gpus_per_worker, r.cpus_per_worker), reverse=True)
    return all(place(request, free) for request in widest_first)


def place(request: Resources, free: Sequence[dict[str, float]]) -> bool:
    """Take a group's room from the nodes, if all its workers find some; else nothing is taken.

    Args:
        request: what the group occupies.
        free: what each node has left; changed in place.
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
    """How many groups these nodes hold at once, when they are of the smallest kind."""
    smallest = min(kinds, key=lambda r: (r.gpus_per_worker * r.num_workers, r.cpus_per_worker * r.num_workers))
    return sum(smallest.workers_on(node) for node in nodes) // smallest.num_workers


class SharedFolder:
    """Asks every node, once, whether it sees a folder of this one."""

    def __init__(self, proof: Path) -> None:
        """Args:
        proof: a file in that folder, which no other node has by itself.
        """
        self._proof, self._text = proof, proof.read_text(encoding="utf-8")
        self._asked: dict[str, Any] = {}
        """Node -> the reference to its answer, until that is there."""
        self._known = {ray.get_runtime_context().get_node_id()}

    def nodes_without_access(self, capacity: Capacity, timeout_s: float = 0.0) -> list[str]:
        """Ask nodes that are new, wait for answers at most so long. Returns ids of nodes that do not see the folder."""
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
    """What a managed service has told the GCS about the nodes it may add."""
    from ray._private.state import state  # no public way; Ray Train and Ray Data read it here too

    config = state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    growth: list[dict[str, float]] = []
    for group in config.node_group_configs:
        most = _UNBOUNDED if group.max_count < 0 else group.max_count
        growth += [{kind: float(n) for kind, n in group.resources.items()}] * max(0, most - types.count(group.name))
    return tuple(growth), len(growth)


def _addable(cluster: dict[str, Any], types: list[str]) -> tuple[tuple[dict[str, float], ...] | None, int]:
    """Nodes that a cluster file still lets the autoscaler add, and how many of them at once."""
    growth: list[dict[str, float]] = []
    most_workers = cluster.get("max_workers", 2)  # Ray's default
    for name, kind in cluster.get("available_node_types", {}).items():
        if name == cluster["head_node_type"]:
            continue
        resources = kind.get("resources")
        if not resources:
            return None, 0  # Ray finds them out when such a node is there
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
