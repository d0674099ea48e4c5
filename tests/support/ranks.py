"""Run `loop.train` in one process per rank, as a worker group does but without Ray."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_ray.config import ExperimentConfig, parse

BASE: dict[str, Any] = {
    "name": "test",
    "model": {"path": "tiny-llama-1m"},
    "data": {
        "path": "builtin://style-pairs",
        "train_pairs": 256,
        "eval_pairs": 24,
        "max_tokens": 256,
        "max_prompt_tokens": 160,
    },
    "optim": {"lr": 1.0e-3, "weight_decay": 0.1},
    "train": {
        "global_batch_size": 8,
        "max_steps": 20,
        "log_every": 1,
        "eval_every": 10,
        "precision": "fp32",
    },
}


def experiment(cache_dir: Path, **settings: Any) -> ExperimentConfig:
    """The base experiment with dotted settings changed, e.g. `**{"train.max_steps": 5}`."""
    tree = json.loads(json.dumps(BASE))
    tree["data"]["cache_dir"] = str(cache_dir)
    return parse(tree, [f"{path}={json.dumps(value)}" for path, value in settings.items()])


@dataclass
class Record:
    """What rank 0 saw."""

    logs: dict[int, dict[str, float]] = field(default_factory=dict)
    evals: dict[int, dict[str, float]] = field(default_factory=dict)
    result: Any = None
    started_at: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def curve(self, metric: str) -> list[float]:
        """A training metric, step by step."""
        return [metrics[metric] for _, metrics in sorted(self.logs.items())]


@dataclass(frozen=True)
class Job:
    """One trial."""

    config: ExperimentConfig
    trial_dir: Path
    stop_at: int | None = None
    """The owner says stop at the evaluation of this step."""
    preempted_at: int | None = None
    """The last rank is told after this step that its machine goes away."""


def train(config: ExperimentConfig, trial_dir: Path, stop_at: int | None = None, *, fresh: bool = False) -> Record:
    """Train with as many processes as the config has workers."""
    return train_all([Job(config, trial_dir, stop_at)], fresh=fresh)[0]


def train_all(jobs: list[Job], *, fresh: bool = False) -> list[Record]:
    """Train one trial after another in the same processes, as a warm group does; all need as many workers.

    The processes are kept for later calls: starting them takes longer than most trials here.

    Args:
        jobs: the trials.
        fresh: whether the processes are new ones, which end with this call.
    """
    (world,) = {job.config.scaling.num_workers for job in jobs}
    group = _Group(world) if fresh or world not in _groups else _groups.pop(world)
    try:
        records = group.train(jobs)
    except BaseException:
        group.close()
        raise
    if fresh:
        group.close()
    else:
        _groups[world] = group
    return records


class _Group:
    """One process per rank, between two lists of jobs waiting for the next."""

    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self._processes, self._connections = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            # Daemons: they end with this process. Where it is killed, the closed pipe ends them.
            process = context.Process(target=_rank, args=(rank, world, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def train(self, jobs: list[Job]) -> list[Record]:
        """Raises AssertionError with the error of the first rank that has one."""
        for connection in self._connections:
            connection.send(jobs)
        waiting = list(self._connections)
        while waiting:
            answered = multiprocessing.connection.wait(waiting, timeout=500)
            assert answered, "no rank has answered for 500 s"
            for connection in answered:
                assert isinstance(connection, multiprocessing.connection.Connection)
                error = connection.recv()
                assert error is None, error
                waiting.remove(connection)
        return list(self._connections[0].recv())

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join(30)
        for connection in self._connections:
            connection.close()


_groups: dict[int, _Group] = {}
"""Number of ranks -> the processes that are kept."""


def _rank(rank: int, world: int, port: int, connection: multiprocessing.connection.Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    import torch

    torch.set_num_threads(1)
    from orpo_ray.training.engine import init_process_group

    init_process_group()
    while True:
        try:
            jobs = connection.recv()
        except EOFError:
            return
        try:
            records = [_train(job) for job in jobs]
        except BaseException as error:
            connection.send(f"{type(error).__name__}: {error}")
            raise
        connection.send(None)
        if rank == 0:
            connection.send(records)


def _train(job: Job) -> Record:
    import torch

    from orpo_ray.training import loop, trial

    record = Record()

    def on_eval(step: int, metrics: dict[str, float], checkpoint: str | None, seconds: float) -> trial.Decision:
        record.evals[step] = metrics
        return trial.Decision.STOP if step == job.stop_at else trial.Decision.CONTINUE

    def on_start(step: int, max_steps: int, facts: dict[str, Any]) -> None:
        record.started_at, record.facts = step, facts

    steps = iter(range(10**6))

    def is_preempted() -> bool:
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        return last and next(steps) + 1 == job.preempted_at

    ctx = trial.RankContext(
        job.trial_dir,
        on_start=on_start,
        on_log=record.logs.__setitem__,
        on_eval=on_eval,
        on_problem=record.problems.append,
        is_preempted=is_preempted,
    )
    record.result = loop.train(job.config, ctx)
    return record


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
