"""Rules that span several sections of an experiment file."""

from __future__ import annotations

from orpo_ray.config.loss import LossConfig
from orpo_ray.config.methods import FifoConfig, HyperBandConfig, Pb2Config, PbtConfig
from orpo_ray.config.metrics import METRIC_MODES, NOT_MEASURED
from orpo_ray.config.sections import ScalingConfig, TrainConfig
from orpo_ray.config.sweep import SweepConfig


def require_pair_per_worker(train: TrainConfig, scaling: ScalingConfig) -> None:
    """Raise ValueError if a worker would have no pair in a step."""
    if train.global_batch_size < scaling.num_workers:
        raise ValueError(
            f"global_batch_size ({train.global_batch_size}) must be at least num_workers ({scaling.num_workers}): "
            "every worker needs a pair in each step; use a larger batch or fewer workers"
        )


def require_stoppable(sweep: SweepConfig, train: TrainConfig) -> None:
    """Raise ValueError if the scheduler could never act on trials of this length and evaluation interval."""
    scheduler = sweep.scheduler
    if isinstance(scheduler, FifoConfig):
        return
    if train.eval_every is None:
        raise ValueError(f"scheduler {scheduler.type} decides at evaluations: set train.eval_every")
    if isinstance(scheduler, PbtConfig | Pb2Config):
        if scheduler.interval_steps % train.eval_every:
            raise ValueError(
                f"scheduler.interval_steps ({scheduler.interval_steps}) must be a multiple of train.eval_every "
                f"({train.eval_every}): the population is compared at evaluations"
            )
        return
    if isinstance(scheduler, HyperBandConfig):
        if train.max_steps is None:
            raise ValueError("scheduler hyperband plans its brackets by the length of trials: give train.max_steps")
        return
    if train.max_steps is not None and scheduler.grace_steps >= train.max_steps:
        raise ValueError(
            f"scheduler.grace_steps ({scheduler.grace_steps}) must be below train.max_steps ({train.max_steps}), "
            "or no trial is ever stopped early"
        )


def require_measured(loss: LossConfig, sweep: SweepConfig | None, keep_best: str | None) -> None:
    """Raise ValueError if trials are ranked, or checkpoints kept, by a metric that their loss does not report."""
    axis = None if sweep is None else sweep.space.get("loss.name")
    names = {loss.name} if axis is None else {str(name) for name in axis.candidates()}
    if "reward" in names and len(names) > 1:
        raise ValueError(
            f"loss.name varies over {', '.join(sorted(names))}, but reward models and language models are judged by "
            "different metrics: give reward an experiment of its own"
        )
    for name in sorted(names & NOT_MEASURED.keys()):
        asked = {"sweep.metric": sweep.metric if sweep else None, "checkpoint.keep_best": keep_best}
        for setting, metric in asked.items():
            if metric in NOT_MEASURED[name]:
                measured = [known for known in METRIC_MODES if known not in NOT_MEASURED[name]]
                raise ValueError(
                    f"{setting} is {metric}, which loss.name {name} does not measure; use one of {', '.join(measured)}"
                )
