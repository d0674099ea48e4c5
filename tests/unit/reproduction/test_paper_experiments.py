"""The paper's experiments at full scale: none is missing, every number has a source, the settings are the paper's."""

from __future__ import annotations

import math
import re
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_ray.config import ExperimentConfig, load
from orpo_ray.config.space import Grid

PAPER = Path(__file__).resolve().parents[3] / "experiments" / "paper"
FILES = {path.stem: path for path in sorted(PAPER.glob("*.yaml"))}

WANTED = {
    *map("-".join, product(["opt-125m", "opt-350m", "opt-1.3b"], ["hh", "uf"], ["sft", "dpo", "rlhf", "orpo"])),
    *map("-".join, product(["rm"], ["350m", "1.3b"], ["hh", "uf"])),
    *map("-".join, product(["phi-2", "llama-2-7b"], ["uf"], ["sft", "dpo", "orpo"])),
    *("mistral-orpo-alpha", "mistral-orpo-beta", "fig-3", "fig-7", "fig-8", "fig-9"),
}

HH = {"data.path": "Anthropic/hh-rlhf", "data.max_prompt_tokens": 1023}
UF = {"data.path": "HuggingFaceH4/ultrafeedback_binarized", "data.max_tokens": 2048}
FOUR = {"scaling.num_workers": 4}
ORPO = {"loss.name": "orpo", "loss.preset": "authors", "loss.ratio": "odds", "loss.temperature": 1.0}
ORPO_TEXT = ORPO | {"optim.lr": 8e-6, "optim.schedule": "cosine", "train.epochs": 10}
MISTRAL = {
    **ORPO,
    **FOUR,
    "model.path": "mistralai/Mistral-7B-v0.1",
    "data.max_tokens": 2048,
    "data.max_prompt_tokens": 1791,
    "optim.lr": 5e-6,
    "optim.schedule": "inverse_sqrt",
    "optim.warmup_steps": 200,
    "train.global_batch_size": 32,
    "deepspeed.zero_stage": 3,
}
SETTINGS: dict[str, dict[str, Any]] = {
    # What is trained and on what (5.1, App. C).
    "opt-*": FOUR | {"deepspeed.zero_stage": 2},
    "opt-125m-*-[so]*": {"model.path": "facebook/opt-125m"},
    "opt-350m-*-[so]*": {"model.path": "facebook/opt-350m"},
    "opt-1.3b-*-[so]*": {"model.path": "facebook/opt-1.3b"},
    "*-hh*": HH,
    "*-hh-[sdo]*": {"data.max_tokens": 1024},
    "*-uf*": UF | {"data.max_prompt_tokens": 1024},
    "phi-2-*": {"scaling.num_workers": 2, "deepspeed.zero_stage": 2},
    "phi-2-uf-[so]*": {"model.path": "microsoft/phi-2"},
    "llama-2-7b-*": FOUR | {"deepspeed.zero_stage": 3},
    "llama-2-7b-uf-[so]*": {"model.path": "meta-llama/Llama-2-7b-hf"},
    # The methods (App. C, Table 5).
    "*-sft": {"loss.name": "sft", "optim.lr": 1e-5, "train.epochs": 1},
    "*-dpo": {
        "loss.name": "dpo",
        "loss.beta": 0.1,
        "optim.lr": 5e-6,
        "train.epochs": 3,
        "checkpoint.keep_best": "eval/loss",
    },
    "*-rlhf": {"loss.name": "rloo", "loss.beta": 0.1, "optim.lr": 1e-5, "train.global_batch_size": 64},
    "*-hh-rlhf": {"loss.max_new_tokens": 256, "loss.reward_model": "exports/rm-350m-hh"},
    "*-uf-rlhf": {"loss.max_new_tokens": 512, "loss.reward_model": "exports/rm-350m-uf"},
    "*-orpo": ORPO_TEXT | {"checkpoint.keep_best": "eval/loss"},
    "rm-*": FOUR | {"loss.name": "reward", "train.epochs": 1},
    "rm-350m-*": {"model.path": "facebook/opt-350m"},
    "rm-1.3b-*": {"model.path": "facebook/opt-1.3b"},
    "rm-*-hh": {"data.max_tokens": 1024},
    # λ (6.1; for OPT the authors' default).
    "opt-*-orpo": {"loss.orpo_lambda": 1.0},
    "phi-2-uf-orpo": {"loss.orpo_lambda": 0.25},
    "llama-2-7b-uf-orpo": {"loss.orpo_lambda": 0.2},
    # Mistral, from the authors' script.
    "mistral-orpo-*": MISTRAL | {"loss.orpo_lambda": 0.1, "train.epochs": 5},
    "mistral-orpo-alpha": {"data.path": UF["data.path"], "checkpoint.keep_best": "eval/loss"},
    "mistral-orpo-beta": {
        "data.path": "argilla/ultrafeedback-binarized-preferences-cleaned",
        "checkpoint.keep_best": None,
    },
    # The curves.
    "fig-[378]": FOUR | {"model.path": "facebook/opt-350m"},
    "fig-[37]": HH | {"data.max_tokens": 1024},
    "fig-3": {"loss.name": "sft", "optim.lr": 1e-5, "train.epochs": 1},
    "fig-7": ORPO_TEXT | {"loss.orpo_lambda": 1.0},
    "fig-8": ORPO_TEXT | UF | {"data.max_prompt_tokens": 1024},
    "fig-9": MISTRAL | UF,
}
"""Files -> what paper or authors' code say of them."""

AXES = {"fig-8": {"loss.ratio": {"probability", "odds"}}, "fig-9": {"loss.orpo_lambda": {0.1, 0.5, 1.0}}}

ROWS = {
    "Anthropic/hh-rlhf": 160_800,
    "HuggingFaceH4/ultrafeedback_binarized": 61_135,
    "argilla/ultrafeedback-binarized-preferences-cleaned": 60_917,
}
"""Of the training split, by the dataset cards."""

SOURCE = re.compile(
    r"(paper, (App\. [A-F]|Table \d|Fig\. \d|\d\.\d)"
    r"|authors' (args|main|test_orpo_trainer_demo)\.py"
    r"|authors' (run_orpo|run_mistral_orpo_beta)\.sh"
    r"|dataset card: \w"
    r"|our choice(, \w+|: \w+))"
)


def unsourced_numbers(text: str) -> list[str]:
    """The lines of a YAML file on which a number stands that no comment behind it gives a source for."""
    lines = text.splitlines()
    missing = {}
    nodes = [yaml.compose(text)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif _is_number(node):
            line = node.start_mark.line
            if not SOURCE.match(lines[line].partition(" # ")[2]):
                missing[line] = lines[line]
    return [missing[line] for line in sorted(missing)]


def _is_number(node: yaml.ScalarNode) -> bool:
    if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
        return True
    try:
        float(node.value)  # what YAML reads as text and the config as a number, such as 1e-5
    except ValueError:
        return False
    return True


def setting(config: ExperimentConfig, path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = getattr(node, part)
    return node


def test_no_experiment_of_the_paper_is_missing() -> None:
    assert set(FILES) == WANTED


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("train: {epochs: 3}  # paper, App. C", []),
        ("values: [0.1, 1.0]  # our choice: a guess", []),
        ("path: facebook/opt-125m\nuse_gpu: true", []),
        ("lr: 1e-5", ["lr: 1e-5"]),
        ("# paper, App. C\nlr: 1.0e-5", ["lr: 1.0e-5"]),
        ("epochs: 3  # three", ["epochs: 3  # three"]),
        ("epochs: 3  # our choice", ["epochs: 3  # our choice"]),
        ("beta: 0.1  # paper", ["beta: 0.1  # paper"]),
        ("a: [1,\n  2]  # paper, Table 5", ["a: [1,"]),
    ],
)
def test_a_number_without_a_source_is_found(text: str, missing: list[str]) -> None:
    assert unsourced_numbers(text) == missing


@pytest.mark.parametrize("stem", FILES)
def test_every_number_has_a_source(stem: str) -> None:
    text = FILES[stem].read_text(encoding="utf-8")
    assert unsourced_numbers(text) == []
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("stem", FILES)
def test_settings_are_the_papers(stem: str) -> None:
    config = load(FILES[stem])
    wanted = {path: value for files, told in SETTINGS.items() if fnmatch(stem, files) for path, value in told.items()}
    assert {"loss.name", "data.path", "data.max_prompt_tokens", "scaling.num_workers"} <= set(wanted)
    assert {path: setting(config, path) for path in wanted} == wanted
    assert config.name == f"paper-{stem}"
    axes = config.sweep.space if config.sweep else {}
    assert {name: set(axis.values) for name, axis in axes.items() if isinstance(axis, Grid)} == AXES.get(stem, {})


@pytest.mark.parametrize("stem", [stem for stem in FILES if load(FILES[stem]).checkpoint.keep_best])
def test_the_best_is_sought_once_an_epoch(stem: str) -> None:
    config = load(FILES[stem])
    assert config.train.eval_every == math.ceil(ROWS[config.data.path] / config.train.global_batch_size)


@pytest.mark.parametrize("stem", FILES)
def test_a_file_says_how_it_is_run_and_what_must_be_run_before(stem: str) -> None:
    text = FILES[stem].read_text(encoding="utf-8")
    config = load(FILES[stem])
    assert re.search(rf"^# Run: +orpo-ray {'sweep' if config.sweep else 'train'} \S+/{stem}\.yaml$", text, re.MULTILINE)
    models = [path for path in (config.model.path, config.loss.reward_model) if path]
    for first in (Path(path).name for path in models if Path(path).parent.name == "exports"):
        assert first in FILES
        assert f"orpo-ray train experiments/paper/{first}.yaml\n" in text
        assert f"orpo-ray export {load(FILES[first]).name} --to exports/{first}\n" in text


def test_the_readme_lists_every_file() -> None:
    text = (PAPER / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\S+)\]\((\S+)\) \|.*\| (\S[^|]*) \| ([^|]+) \|$", text, re.MULTILINE)
    assert {name: target for name, target, _, _ in listed} == {stem: f"{stem}.yaml" for stem in FILES}
    for name, _, gpus, first in listed:
        config = load(FILES[name])
        assert f"{config.scaling.num_workers} A" in gpus
        models = [Path(path) for path in (config.model.path, config.loss.reward_model) if path]
        assert first == (", ".join(path.name for path in models if path.parent.name == "exports") or "–")
    too_long = [line for line in text.splitlines() if len(line) > 140 and not line.startswith("|")]
    assert too_long == []
