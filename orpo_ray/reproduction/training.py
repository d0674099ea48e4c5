"""Train the models that the paper compares, one sweep for each role, and export them as folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from orpo_ray.config import as_given, parse
from orpo_ray.files import write_atomically
from orpo_ray.orchestration import sweep
from orpo_ray.reports.live_state import about_sweep
from orpo_ray.reports.progress import SweepProgress
from orpo_ray.reproduction.scales import (
    LAMBDAS,
    MAIN_LAMBDA,
    POLICY_REWARD_MODEL,
    REWARD_MODEL_SEEDS,
    SEED_STRIDE,
    base_pairs,
)
from orpo_ray.reproduction.workspace import ReproduceError, Workspace
from orpo_ray.results import export, export_source
from orpo_ray.storage.events import Status


def train_lambdas(workspace: Workspace, console: Console, lambdas: Sequence[float] = LAMBDAS) -> dict[str, float]:
    """Train SFT and ORPO from the scale's base model. Ray must be initialised.

    Returns:
        Seconds of training by role.

    Raises:
        DataError, ModelError, SweepError, ReproduceError: see `orpo_ray.reproduction.run.run`.
    """
    seconds: dict[str, float] = {}
    if workspace.scale.pretrain:
        pairs = workspace.folder / "base.jsonl"
        if not pairs.exists():
            write_atomically(pairs, base_pairs())
        seconds["base"] = _train(workspace, "base", {"base": {}}, console, **{"data.path": str(pairs)})
    objectives = {lambda_name(value): {"loss.orpo_lambda": value} for value in lambdas}
    seconds["SFT and ORPO"] = _train(workspace, "lambda", objectives, console, **workspace.from_base())
    return seconds


def train_ratio(workspace: Workspace, console: Console) -> float:
    """Train ORPO with the probability ratio from the same base; returns seconds. Otherwise like `train_lambdas`."""
    objective = {"probability": {"loss.orpo_lambda": MAIN_LAMBDA}}
    return _train(workspace, "ratio", objective, console, **workspace.from_base())


def train_all(workspace: Workspace, console: Console) -> dict[str, float]:
    """Train and export every model of the comparison; returns seconds of training by role. Like `train_lambdas`."""
    seconds, base = train_lambdas(workspace, console), workspace.from_base()
    seed = SEED_STRIDE * workspace.scale.seed
    reward_models = {name: {"train.seed": seed + offset} for name, offset in REWARD_MODEL_SEEDS.items()}
    seconds["reward models"] = _train(workspace, "reward", reward_models, console, **base)
    seconds["probability ratio"] = train_ratio(workspace, console)
    from_sft = {"model.path": str(workspace.model("sft"))}
    seconds["DPO"] = _train(workspace, "dpo", {"dpo": {}}, console, **from_sft)
    rewarded = {"loss.reward_model": str(workspace.model(POLICY_REWARD_MODEL))}
    seconds["RLHF"] = _train(workspace, "rlhf", {"rlhf": {}}, console, **from_sft, **rewarded)
    return seconds


def lambda_name(orpo_lambda: float) -> str:
    """Model name: `sft` for λ = 0, `orpo` for the λ that is compared, else `orpo-λ`."""
    if orpo_lambda == 0:
        return "sft"
    return "orpo" if orpo_lambda == MAIN_LAMBDA else f"orpo-{orpo_lambda:g}"


def _train(
    workspace: Workspace, role: str, models: Mapping[str, Mapping[str, Any]], console: Console, **settings: Any
) -> float:
    """Run one sweep and export its trials under the given names; returns seconds of training.

    Args:
        workspace: where the sweep and the models are kept.
        role: of the experiment.
        models: model name -> the trial's parameters. Several models differ in one axis.
        console: shows progress.
        **settings: override the experiment of all models.
    """
    config = workspace.experiment(role, **settings)
    if len(models) > 1:
        (axis,) = {path for params in models.values() for path in params}
        values = [params[axis] for params in models.values()]
        space = {axis: {"type": "grid", "values": values}}
        tree = config.model_dump(mode="json", exclude_unset=True)
        config = parse(as_given(tree) | {"sweep": {"space": space}}, source=role)
    elif params := next(iter(models.values())):
        config = config.trial(dict(params))
    console.print(f"{role}: {config.run_dir}", style="bold", soft_wrap=True)
    with SweepProgress(console, about_sweep(config, "", config.run_dir)) as progress:
        outcome = sweep.run(config, progress)
    if outcome.interrupted:
        raise KeyboardInterrupt
    trials = outcome.results["trials"]
    for name, params in models.items():
        found = [t for t in trials if all(t["params"].get(k, v) == v for k, v in params.items())]
        if len(found) != 1 or found[0]["status"] != Status.FINISHED:
            raise ReproduceError(
                f"{role}: training {name} did not finish ({[(t['status'], t['error']) for t in found]}); to try again, "
                f"remove {outcome.run_dir} and everything made from it"
            )
        _export(workspace.model(name), outcome.run_dir, found[0]["trial_id"], workspace.folder)
    return float(sum(trial["train_seconds"] for trial in trials))


def _export(model: Path, run_dir: Path, trial_id: str, folder: Path) -> None:
    """Export a trial's model, unless the folder has it already."""
    candidate = export_source.find(str(run_dir / "trials" / trial_id))
    try:
        export.require_own(model, candidate)
    except export_source.ExportError as error:
        raise ReproduceError(
            f"{model} comes from an earlier training than {run_dir}, and later steps were made with it: remove "
            f"{folder} to start over"
        ) from error
    if not model.exists():
        export.export(candidate, model, check=False)
