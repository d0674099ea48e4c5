"""README.md of an exported model: what it is, its metrics, how it was chosen and trained, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from orpo_ray.config import ExperimentConfig
from orpo_ray.config.space import describe
from orpo_ray.formatting import markdown_table, number, status_text
from orpo_ray.models.presets import PRESETS
from orpo_ray.storage.events import Status

_PAPER = "[ORPO](https://arxiv.org/abs/2403.07691)"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Number and digest of a set of preference pairs, as in `data.dataset.PairDataset`."""

    number: int
    digest: str
    """SHA-256 of ids and tokens of all pairs in order."""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """Everything that the card says; the card reads nothing else."""

    config: ExperimentConfig
    """The trial's config."""
    trial: Mapping[str, Any]
    """The trial's entry in results.json."""
    results: Mapping[str, Any]
    """results.json of its sweep."""
    step: int
    """Optimizer steps done."""
    metrics: Mapping[str, float | None]
    """Metrics that the run logged at that step; may be empty."""
    num_workers: int
    zero_stage: int
    products: str
    """Precision of the training's matrix products: `fp32` or `bf16`."""
    dtype: str
    """dtype of the weights in the folder."""
    parameters: int
    pairs: tuple[Pairs, Pairs] | None
    """Training and held-out pairs; None where the export was not checked."""
    was_checked: bool
    """Whether the metrics were computed again from the folder and agree within rounding."""
    provenance: Mapping[str, Any]
    """Provenance of the export (`provenance.collect`)."""
    experiment_file: str
    """Name of the file in the same folder that trains this model again."""


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with the Hugging Face Hub's front matter.

    The front matter names base model and data set only where these are names on the Hub.
    """
    model, data = facts.config.model, facts.config.data
    loss = facts.config.loss.name
    front = ModelCardData(
        base_model=None if model.path in PRESETS or Path(model.path).is_absolute() else model.path,
        datasets=None if "://" in data.path or Path(data.path).is_absolute() else [data.path],
        library_name="transformers",
        pipeline_tag="text-classification" if facts.config.loss.is_reward else "text-generation",
        tags=list(dict.fromkeys([loss, "orpo", "preference-tuning", "orpo-ray"])),
    )
    sections = [
        f"---\n{front.to_yaml()}\n---",
        f"# {facts.results['name']}: {describe(dict(facts.trial['params']))}",
        _what(facts),
        _use(facts),
        _evaluation(facts),
        _choice(facts),
        _training(facts),
        _versions(facts),
        _limits(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _what(facts: CardFacts) -> str:
    loss, model = facts.config.loss, facts.config.model
    match loss.name:
        case "orpo":
            objective = f"{_PAPER}, L = NLL + λ · L_OR with λ = {loss.orpo_lambda:g}"
        case "sft":
            objective = f"supervised fine-tuning alone: λ = 0 of {_PAPER}, the control of a sweep over λ"
        case "reward":
            objective = "the Bradley-Terry loss, -log σ(r(chosen) - r(rejected))"
        case other:
            objective = f"the `{other}` loss"
    base = f"`{_shown(model.path)}`" + (", begun from random weights" if model.path in PRESETS else "")
    adapted = f"; LoRA adapters of rank {model.lora.rank} are merged into its weights" if model.lora else ""
    kind = "reward model" if loss.is_reward else "causal language model"
    return (
        f"A {kind} of {facts.parameters:,} parameters: {base}, tuned on preference pairs of "
        f"`{_shown(facts.config.data.path)}` with {objective}{adapted}. Weights are stored in {facts.dtype}."
    )


def _use(facts: CardFacts) -> str:
    if facts.config.loss.is_reward:
        return """## Use

```python
from orpo_ray.models.reward_model import RewardModel

judge = RewardModel.load(".")  # this folder
prompt = [{"role": "user", "content": "Hello"}]
print(judge.score([prompt], [["Hello! How can I help?", "Go away."]]))  # one row of two rewards
```

The files are a transformers sequence-classification model with one label; the reward is read at an answer's last token,
its end of turn. Only differences between answers to the same prompt are meaningful."""
    trust = ", trust_remote_code=True" if facts.config.model.trust_remote_code else ""
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
messages = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

The chat template is the one used in training."""


def _evaluation(facts: CardFacts) -> str:
    if not facts.metrics:
        return f"## Evaluation\n\nThe run logged no evaluation at step {facts.step}, the step of these weights."
    row = _winners_row(facts)
    interval = {}
    if row is not None and row["low"] is not None:
        seeds = f" (mean of {row['seeds']} seeds: {row['mean']:.4f})" if row["seeds"] > 1 else ""
        interval[facts.results["metric"]] = f"{row['low']:.4f} to {row['high']:.4f}{seeds}"
    table = markdown_table(
        ["held-out metric", "value", "95 % interval of the setting"],
        [[f"`{name}`", number(value), interval.get(name, "–")] for name, value in facts.metrics.items()],
    )
    over = f"{facts.pairs[1].number} held-out pairs" if facts.pairs else "the held-out pairs"
    units = "" if facts.config.loss.is_reward else "Log-probabilities are in nats, means over an answer's tokens. "
    checked = (
        "They were computed again from this folder with plain transformers on padded rows, and agree within rounding."
        if facts.was_checked
        else "They were not computed again from this folder."
    )
    return f"## Evaluation\n\nAfter step {facts.step}, over {over}. {units}{checked}\n\n{table}"


def _choice(facts: CardFacts) -> str:
    results, trial = facts.results, facts.trial
    winners = results.get("winners") or {}
    num, better = len(results["trials"]), "highest" if results["mode"] == "max" else "lowest"
    if num == 1:
        return ""
    if results["best"] is not None and results["best"]["trial_id"] == trial["trial_id"]:
        text = f"The best of {num} trials of the sweep `{results['name']}`: {better} `{results['metric']}`."
        others = [name for name in winners.get("tied", []) if name != winners["settings"][0]["name"]]
        if others:
            text += f" These settings are tied with it: {', '.join(others)}."
        sentence = (winners.get("selection_bias") or {}).get("sentence")
        text += f" {sentence}" if sentence else ""
    else:
        text = f"Chosen by hand: trial `{trial['trial_id']}`, one of {num} of the sweep `{results['name']}`."
    if trial["status"] != Status.FINISHED:
        text += f" The trial did not finish: {status_text(trial['status'])} after {trial['steps']} steps."
    return f"## How it was chosen\n\n{text}"


def _training(facts: CardFacts) -> str:
    config = facts.config
    lines = [f"- Peak learning rate {config.optim.lr:g}, {config.optim.schedule} schedule, seed {config.train.seed}."]
    if facts.pairs:
        train, held_out = facts.pairs
        lines += [
            f"- {train.number} training pairs (SHA-256 of their tokens `{train.digest}`), {held_out.number} held-out "
            f"ones (`{held_out.digest}`)."
        ]
    lines += [
        f"- {facts.step} steps of {config.train.global_batch_size} pairs on {facts.num_workers} workers with DeepSpeed "
        f"ZeRO stage {facts.zero_stage}; matrix products in {facts.products}, master weights in fp32."
    ]
    elsewhere: dict[str, Any] = {"name": True, "output_dir": True, "tracking": True, "data": {"cache_dir"}}
    given = config.model_dump(mode="json", exclude_defaults=True, exclude=elsewhere)
    settings = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    return (
        "## Training\n\n" + "\n".join(lines) + "\n\nAll settings that differ from the defaults:\n\n"
        f"```yaml\n{settings}```\n\nTrain it again:\n\n```\norpo-ray train {facts.experiment_file}\n```"
    )


def _versions(facts: CardFacts) -> str:
    packages = facts.provenance["packages"]
    known = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    git = facts.provenance["git"] or {}
    commit = f" Commit `{git['commit']}`{' with changes' if git['dirty'] else ''}." if git.get("commit") else ""
    run = facts.trial["mlflow_run_id"]
    trained = f" The versions used in training are in its MLflow run `{run}`." if run else ""
    return f"## Versions\n\nExported with Python {facts.provenance['python']}, {known}.{commit}{trained}"


def _limits(facts: CardFacts) -> str:
    measured = (
        "- The metrics are rewards of held-out answers from the source of the training pairs; it may judge answers of "
        "another kind, such as a tuned model's, less well."
        if facts.config.loss.is_reward
        else "- The metrics are log-probabilities of held-out answers from the source of the training pairs. Human "
        "preference for its answers, its knowledge and its safety were not measured."
    )
    lines = [
        measured,
        "- The licences of the base model and of the data apply.",
    ]
    if facts.dtype != "float32":
        lines.append(
            f"- Training kept its weights in fp32; here they are rounded to {facts.dtype}, which can lose part of the "
            "changes that a small learning rate made."
        )
    if facts.trial.get("forks"):
        steps = ", ".join(str(fork["step"]) for fork in facts.trial["forks"])
        lines.append(
            f"- Population-based training: the trial took over another trial's weights at step {steps} and changed "
            f"settings there, so {facts.experiment_file} alone does not reproduce these weights."
        )
    return "## Limits\n\n" + "\n".join(lines)


def _shown(path: str) -> str:
    """A name on the Hub unchanged; for a local path, its last part."""
    return Path(path).name if Path(path).is_absolute() else path


def _winners_row(facts: CardFacts) -> Mapping[str, Any] | None:
    """The row of the trial's setting in `winners`, with its interval; None where it is not among the finalists."""
    rows = (facts.results.get("winners") or {}).get("settings", [])
    return next((row for row in rows if facts.trial["trial_id"] in row["trial_ids"]), None)
