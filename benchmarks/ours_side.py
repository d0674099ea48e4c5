"""orpo_ray's own loop on one rank: the object that `loop.train` drives, step by step, with the same data pipeline."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from benchmarks import workload
from benchmarks.case import LR, ORPO_LAMBDA, Case
from benchmarks.probe import Probe
from orpo_ray.config import experiment as configs
from orpo_ray.config import parse
from orpo_ray.training.engine import destroy, init_process_group
from orpo_ray.training.metrics import PairSums
from orpo_ray.training.steps import TrialRun


def run(case: Case, probe: Probe) -> list[float]:
    """Train; returns the loss of each step."""
    with started(case) as trial:
        probe.start()
        return list(train(trial, case.steps + 1, probe))


def train(trial: TrialRun, steps: int, probe: Probe) -> Iterator[float]:
    """Optimizer steps 1..`steps`, each one's loss read as TRL reads it when it logs every step."""
    sums = PairSums.zeros(trial.engine.device)
    for at, batch in trial.batches(1, steps):
        trial.step(batch, LR, sums, at)
        loss = sums.averages("train")["train/loss"]
        probe.step_done()
        yield loss


@contextmanager
def started(case: Case) -> Iterator[TrialRun]:
    """A process group of one, and a trial in it."""
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    init_process_group()
    trial = TrialRun.build(experiment(case))
    if workload.lengths(case) is not None:
        trial = replace(trial, train_pairs=workload.load(case))
    try:
        yield trial
    finally:
        destroy(trial.engine)
        dist.destroy_process_group()


def experiment(case: Case) -> configs.ExperimentConfig:
    """The case as an experiment of orpo_ray; whatever the case does not say is orpo_ray's default."""
    train: dict[str, Any] = {
        "global_batch_size": case.batch,
        "max_steps": case.steps + 1,
        "precision": case.precision,
        "seed": case.seed,
    }
    if case.max_tokens_per_micro_batch is not None:
        train["max_tokens_per_micro_batch"] = case.max_tokens_per_micro_batch
    return parse(
        {
            "name": "benchmark",
            "model": workload.model_config(case).model_dump(exclude_unset=True),
            "data": workload.data_config(case).model_dump(exclude_unset=True),
            "loss": {"orpo_lambda": ORPO_LAMBDA},
            "optim": {"lr": LR},
            "train": train,
            "scaling": {"cpus_per_worker": case.threads},
        }
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
