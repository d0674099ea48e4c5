"""Choose settings for `scaling: auto` from the memory of the connected cluster's nodes, once per sweep."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import ray

from orpo_ray.config import ExperimentConfig, SweepConfig
from orpo_ray.config.space import Bundle
from orpo_ray.files import read_json, write_atomically
from orpo_ray.hardware import NodeMemory, this_machine
from orpo_ray.planning.fit import fitted_settings
from orpo_ray.storage.run_dir import FITTED_FILE


def fitted(config: ExperimentConfig, sweep: SweepConfig) -> tuple[ExperimentConfig, SweepConfig]:
    """Fill in the settings that `scaling: auto` leaves open, in every bundle.

    Raises:
        ConfigError: a model fits nowhere on the cluster, or cannot be found.
    """
    axis = sweep.bundle_axis
    labels = [str(label) for label in sweep.space[axis].candidates()] if axis else [""]
    trials = {label: config.trial({axis: label} if axis else {}) for label in labels}
    if not any(trial.scaling.auto for trial in trials.values()):
        return config, sweep
    file = config.run_dir / FITTED_FILE
    if file.exists():
        chosen: dict[str, dict[str, Any]] = read_json(file)
    else:
        nodes = cluster_nodes()
        chosen = {label: fitted_settings(t, nodes) if t.scaling.auto else {} for label, t in trials.items()}
        write_atomically(file, json.dumps(chosen, indent=1))
    if axis is None:
        return config.trial(chosen[""]).model_copy(update={"sweep": sweep}), sweep
    bundle = sweep.space[axis]
    assert isinstance(bundle, Bundle)
    # A bundle's own settings were respected when the rest was chosen.
    values = {label: chosen[label] | settings for label, settings in bundle.values.items()}
    space = sweep.space | {axis: bundle.model_copy(update={"values": values})}
    sweep = sweep.model_copy(update={"space": space})
    return config.model_copy(update={"sweep": sweep}), sweep


def cluster_nodes() -> list[NodeMemory]:
    """Memory of every node of the connected cluster, measured on the node; CPUs and GPUs as Ray knows them."""
    asked = []
    for node in ray.nodes():
        if node["Alive"]:
            there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            machine = ray.remote(num_cpus=0, scheduling_strategy=there)(this_machine).remote()
            asked.append((node["Resources"], machine))
    return [
        replace(ray.get(machine), cpus=int(resources.get("CPU", 0)), gpus=int(resources.get("GPU", 0)))
        for resources, machine in asked
    ]
