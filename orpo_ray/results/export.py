"""Export a trial's model as a folder that plain transformers loads, check it against the run, register it in MLflow."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import PreTrainedModel

from orpo_ray import provenance
from orpo_ray.config.space import describe
from orpo_ray.data.tokenizer import PairTokenizer
from orpo_ray.models.loading import build_model, build_reward_model, count_parameters, load_tokenizer
from orpo_ray.results import verify
from orpo_ray.results.export_source import Candidate, ExportError
from orpo_ray.results.model_card import CardFacts, model_card
from orpo_ray.tracking import registry
from orpo_ray.tracking.uri import TrackingError, resolve_uri
from orpo_ray.training import engine_state

Dtype = Literal["float32", "bfloat16"]

ALIAS = "champion"
"""Alias of the registered version that was exported last."""

MARKER_FILE = "orpo_ray.json"
_EXPERIMENT = "experiment.yaml"
_MODEL_PREFIX = "lm."  # of `forward.PairModel`


@dataclass(frozen=True, slots=True)
class Exported:
    """A folder with an exported model."""

    folder: Path
    digest: str
    """SHA-256 of weights, configuration and tokenizer, without the model card."""
    check: verify.Check | None
    """None where no check was requested."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A version in MLflow's model registry."""

    name: str
    version: str
    is_new: bool
    """False where the same files of the same run were registered before, so that only the alias was set."""
    uri: str
    """`models:/NAME@champion`."""


# ---- the folder ----------------------------------------------------------------------------------------------------


def export(candidate: Candidate, folder: Path | None = None, dtype: Dtype = "float32", check: bool = True) -> Exported:
    """Write the trial's model: weights (safetensors), configuration, tokenizer with the training's chat template, card.

    The folder appears complete or not at all: it is written under a temporary name, checked, and renamed.

    Args:
        candidate: from `export_source.find`.
        folder: by default `<run_dir>/export/<trial_id>`. An earlier export of the same trial is replaced.
        dtype: dtype of the weights. The default keeps the training's precision: at ORPO's learning rates many steps are
            smaller than the spacing of bf16 numbers. To halve the size, round once, here or with
            `from_pretrained(..., dtype=...)`.
        check: load the folder with plain transformers and compute the run's held-out metrics again.

    Returns:
        The export. If the check failed, `folder` is the temporary one, kept for inspection.

    Raises:
        ExportError: the folder holds something else, the checkpoint does not fit the model, or the run logged nothing
            to check against.
        CheckpointError, ModelError, DataError: the trial's checkpoint, base model or data can no longer be read.
    """
    folder = (folder or candidate.run_dir / "export" / candidate.trial["trial_id"]).expanduser().absolute()
    require_own(folder, candidate)
    if check and not candidate.logged:
        raise ExportError(
            f"{candidate.checkpoint}: the run logged no evaluation at step {candidate.step}, so there is nothing to "
            "check the export against; set train.checkpoint_every to a multiple of train.eval_every next time, or "
            "export with --no-check"
        )
    partial = folder.with_name(f".{folder.name}.orpo-ray-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parameters = _write_model(candidate, partial, dtype)
    digest = _digest(partial)
    found, pairs = None, None
    if check:
        gc.collect()  # free the trained model: memory may not hold two
        rounded = dtype != "float32" or candidate.products != "fp32"
        found, pairs = verify.check(partial, candidate.config, candidate.logged, candidate.step, rounded)
    facts = CardFacts(
        config=candidate.config,
        trial=candidate.trial,
        results=candidate.results,
        step=candidate.step,
        metrics=candidate.logged,
        num_workers=candidate.manifest["num_workers"],
        zero_stage=candidate.manifest["zero_stage"],
        products=candidate.products,
        dtype=dtype,
        parameters=parameters,
        pairs=pairs,
        was_checked=found is not None,
        provenance=provenance.collect(),
        experiment_file=_EXPERIMENT,
    )
    (partial / "README.md").write_text(model_card(facts), encoding="utf-8")
    (partial / _EXPERIMENT).write_text(_experiment(candidate), encoding="utf-8")
    marker = _identity(candidate) | {"step": candidate.step, "dtype": dtype, "digest": digest}
    (partial / MARKER_FILE).write_text(json.dumps(marker, indent=1), encoding="utf-8")
    if found is not None and not found.passed:
        return Exported(partial, digest, found)
    _replace(folder, partial)
    return Exported(folder, digest, found)


def _identity(candidate: Candidate) -> dict[str, str]:
    return {"sweep_id": candidate.sweep_id, "trial_id": candidate.trial["trial_id"]}


def require_own(folder: Path, candidate: Candidate) -> None:
    """Check that the folder is empty, missing, or an earlier export of the same trial.

    Raises:
        ExportError: the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        there = json.loads((folder / MARKER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ExportError(f"{folder} exists but is not an orpo-ray export; choose another folder with --to") from None
    mine = _identity(candidate)
    if {key: there.get(key) for key in mine} != mine:
        raise ExportError(
            f"{folder} holds trial {there.get('trial_id')} of sweep {there.get('sweep_id')}, but this is trial "
            f"{mine['trial_id']} of {mine['sweep_id']}; choose another folder with --to, or remove that one"
        )


def _replace(folder: Path, by: Path) -> None:
    """Replace a folder with two renames, so that no reader finds it half written."""
    old = folder.with_name(f".{folder.name}.orpo-ray-old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(by, folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_model(candidate: Candidate, folder: Path, dtype: Dtype) -> int:
    """Write weights, configuration and tokenizer; returns the number of parameters."""
    config = candidate.config
    tokenizer = copy.deepcopy(load_tokenizer(config.model))
    tokens = PairTokenizer(config.data, tokenizer)
    tokenizer.chat_template = tokens.template
    model = trained_model(candidate)
    if config.loss.is_reward:
        model.config.pad_token_id = tokenizer.pad_token_id  # transformers finds an answer's end with it
    else:
        stop_at(model, tokens.end_of_turn())
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="5GB")
    for weights in folder.glob("*.safetensors"):  # transformers makes them readable for their owner alone
        weights.chmod((folder / "config.json").stat().st_mode)
    tokenizer.save_pretrained(folder)
    return count_parameters(model)[0]


def trained_model(candidate: Candidate) -> PreTrainedModel:
    """The model with the checkpoint's weights, in fp32, adapters merged.

    A LoRA checkpoint holds only the adapters; the base model is loaded again, or built again from the trial's seed.

    Raises:
        ExportError: the checkpoint's weight names do not match the model's.
    """
    config = candidate.config
    # transformers may choose an attention kernel other than the training's; the choice is not saved.
    plain = config.model.model_copy(update={"gradient_checkpointing": False, "attention": "shared_prompt"})
    build = build_reward_model if config.loss.is_reward else build_model
    model = build(plain, config.train.seed)
    state = {
        name.removeprefix(_MODEL_PREFIX): tensor
        for name, tensor in engine_state.full_state_dict(candidate.checkpoint).items()
    }
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unknown = model.load_state_dict(state, strict=False).unexpected_keys
    if lost := sorted(trainable - state.keys()) + unknown:
        raise ExportError(
            f"{candidate.checkpoint} does not fit model {config.model.path}: {len(lost)} weights are in only one of "
            f"them, e.g. {lost[0]}; was the model at that path changed since?"
        )
    return model if config.model.lora is None else model.merge_and_unload()


def stop_at(model: PreTrainedModel, end_id: int) -> None:
    """Let `generate` stop at the end of an answer too; base models often define only the end of a document."""
    generation = model.generation_config
    known = generation.eos_token_id
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if end_id in ends:
        return
    generation.eos_token_id = [*ends, end_id]
    try:
        generation.validate(strict=True)
    except ValueError:
        # Published configs may set a temperature without do_sample; transformers rejects that once a config is changed.
        generation.do_sample = True


def _experiment(candidate: Candidate) -> str:
    """The experiment that trains this model again, as YAML, without paths of the machine that trained it."""
    local: dict[str, Any] = {"output_dir": True, "tracking": True, "data": {"cache_dir"}}
    tree = candidate.config.model_dump(mode="json", exclude_defaults=True, exclude=local)
    tree["name"] = f"{candidate.config.name[:60]}-{candidate.trial['trial_id'][:38]}"
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _digest(folder: Path) -> str:
    """SHA-256 over names and contents of all files."""
    digest = hashlib.sha256()
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


# ---- the registry --------------------------------------------------------------------------------------------------


def register(candidate: Candidate, exported: Exported, name: str | None = None, uri: str | None = None) -> Registered:
    """Upload the folder to the trial's MLflow run, make it a version of a registered model, and set the alias to it.

    The same files of the same run are never registered twice.

    Args:
        candidate: the exported trial.
        exported: the exported folder.
        name: name of the registered model; by default the sweep's name.
        uri: tracking URI; by default the sweep's own `tracking.uri`, MLFLOW_TRACKING_URI, or the SQLite file beside the
            run directory.

    Raises:
        ExportError: the check did not pass, the trial has no MLflow run yet, or MLflow refuses or does not answer.
        TrackingError: the tracking URI is a relative path.
    """
    if exported.check is not None and not exported.check.passed:
        raise ExportError(f"{exported.folder} did not pass its check and is not registered")
    run_id = candidate.trial["mlflow_run_id"]
    if run_id is None:
        raise ExportError(
            f"results.json names no MLflow run of trial {candidate.trial['trial_id']}: run the sweep's command again "
            "until it ends, which sends MLflow everything it lacks, or export with --no-register"
        )
    name = name or candidate.results["name"]
    uri = resolve_uri(uri or candidate.config.tracking.uri, candidate.run_dir.parent)
    tags = _identity(candidate) | {"step": str(candidate.step), "digest": exported.digest}
    try:
        version, is_new = registry.publish(
            uri, name, run_id, exported.folder, exported.digest, tags, _description(candidate), ALIAS
        )
    except TrackingError as error:
        raise ExportError(f"{error}, correct --name, or export with --no-register") from error
    return Registered(name, version, is_new, f"models:/{name}@{ALIAS}")


def _description(candidate: Candidate) -> str:
    metric = candidate.results["metric"]
    value = candidate.logged.get(metric)
    judged = "" if value is None else f", {metric} {value:.4f}"
    return f"{candidate.results['name']}: {describe(candidate.trial['params'])}, step {candidate.step}{judged}"
