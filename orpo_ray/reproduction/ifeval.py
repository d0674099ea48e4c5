"""IFEval (Zhou et al. 2023): lm-evaluation-harness's command, and its checkers applied to existing answers.

As of lm_eval 0.4.13. No package ships the prompts (google/IFEval on the hub) or NLTK's `punkt_tab`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orpo_ray.reproduction.external_judges import Backend, Dtype, JudgeError

EXTRA = "lm-eval[ifeval]==0.4.13"
"""Requirement of `ifeval_score`."""


@dataclass(frozen=True, slots=True)
class Share:
    """A count out of a total."""

    followed: int
    of: int

    @property
    def value(self) -> float:
        """In [0, 1]."""
        return self.followed / self.of


@dataclass(frozen=True, slots=True)
class IfevalScore:
    """IFEval's four numbers. Strict: the answer verbatim. Loose: also without its first or last line, or asterisks."""

    prompt_strict: Share
    """Prompts whose every instruction was followed."""
    prompt_loose: Share
    inst_strict: Share
    """Instructions followed, over all prompts."""
    inst_loose: Share
    drawn: tuple[tuple[int, str], ...]
    """(row, instruction id) where lm-eval's checker ignores the row's argument and checks one that it draws at random:
    where a letter is not a to z, or a number is 0. google/IFEval has two, keys 1122 (#) and 1129 (!)."""
    lm_eval: str
    """Version of the lm_eval package that checked."""


def ifeval_command(
    model: Path, output: Path, dtype: Dtype, backend: Backend = "transformers", batch_size: int | Literal["auto"] = 1
) -> list[str]:
    """Command by which lm-evaluation-harness samples and scores IFEval, as a list for `subprocess` or `shlex.join`.

    Sampling is greedy with at most 1280 tokens, as the task defines it (EleutherAI/lm-evaluation-harness
    lm_eval/tasks/ifeval/ifeval.yaml). The prompts, google/IFEval, come from the Hugging Face hub. lm-eval writes
    results, its own settings and, with `--log_samples`, every answer into `output`.

    Args:
        model: a folder that `orpo-ray export` wrote, which includes the chat template.
        output: folder for the results.
        dtype: type in which the weights are loaded.
        backend: `vllm` needs a GPU, and must be installed.
        batch_size: prompts at a time; `auto` takes as many as fit.

    Raises:
        JudgeError: the folder holds no model, or lm-eval would split its path.
    """
    model, output = model.expanduser().absolute(), output.expanduser().absolute()
    if not (model / "config.json").is_file():
        raise JudgeError(f"{model} has no config.json, so it is not a model: give a folder that orpo-ray export wrote")
    # lm_eval/_cli/utils.py splits --model_args at commas outside of quotes and brackets.
    if taken := sorted(set(str(model)) & set(",\"'[](){}")):
        raise JudgeError(f"lm-eval splits --model_args at {' '.join(taken)}: rename {model}, or link to it")
    return [
        "lm_eval",
        "--model",
        {"transformers": "hf", "vllm": "vllm"}[backend],
        "--model_args",
        f"pretrained={model},dtype={dtype}",
        "--tasks",
        "ifeval",
        "--apply_chat_template",
        "--batch_size",
        str(batch_size),
        "--output_path",
        str(output),
        "--log_samples",
    ]


def ifeval_score(rows: Sequence[Mapping[str, Any]]) -> IfevalScore:
    """Score answers with the checkers that lm-evaluation-harness ships; needs no network.

    lm_eval's package has the checkers (EleutherAI/lm-evaluation-harness lm_eval/tasks/ifeval/) but not the prompts,
    which are google/IFEval on the hub (`datasets.load_dataset("google/IFEval", split="train")`: 541 rows with `prompt`,
    `instruction_id_list` and `kwargs`; add `response`). NLTK splits sentences and words with its `punkt_tab` data,
    which no package ships.

    lm-eval detects a text's language with unseeded random numbers (langdetect), so its own score can vary a little
    from run to run. This function seeds them for the call: the same rows give the same score.

    Args:
        rows: `{"prompt": str, "instruction_id_list": [str], "kwargs": [{...}], "response": str}`; other keys are
            ignored. `kwargs` has one dict per instruction; a value of None counts as absent.

    Returns:
        The score. `drawn` lists the checkers that did not check what their row asks for.

    Raises:
        JudgeError: lm-eval or punkt_tab is missing, there are no rows, or a row does not have IFEval's format.
    """
    if not rows:
        raise JudgeError("there are no rows to score; IFEval has 541")
    checkers = _ifeval_modules()
    known = checkers.instructions_registry.INSTRUCTION_DICT
    strict: list[list[bool]] = []
    loose: list[list[bool]] = []
    drawn: list[tuple[int, str]] = []
    with _seeded():
        for index, row in enumerate(rows):
            _require_ifeval_row(index, row, known)
            ids, kwargs = row["instruction_id_list"], [given or {} for given in row["kwargs"]]
            drawn += [
                (index, id_) for id_, of in zip(ids, kwargs, strict=True) if _is_drawn(index, known[id_](id_), of)
            ]
            example = checkers.InputExample(index, ids, row["prompt"], kwargs)
            # Seeded before each check, so that strict and loose draw the same, independent of the row's position.
            random.seed(0)
            strict.append(checkers.test_instruction_following_strict(example, row["response"]).follow_instruction_list)
            random.seed(0)
            loose.append(checkers.test_instruction_following_loose(example, row["response"]).follow_instruction_list)

    def prompts(followed: list[list[bool]]) -> Share:
        return Share(sum(map(all, followed)), len(followed))

    def instructions(followed: list[list[bool]]) -> Share:
        return Share(sum(map(sum, followed)), sum(map(len, followed)))

    return IfevalScore(
        prompt_strict=prompts(strict),
        prompt_loose=prompts(loose),
        inst_strict=instructions(strict),
        inst_loose=instructions(loose),
        drawn=tuple(drawn),
        lm_eval=importlib.metadata.version("lm_eval"),
    )


def _ifeval_modules() -> Any:
    """The module lm_eval/tasks/ifeval/utils.py."""
    try:
        nltk = importlib.import_module("nltk")
        # Checked before importing lm_eval, whose checkers would download the data at import.
        is_cut = _has_punkt(nltk)
        checkers = importlib.import_module("lm_eval.tasks.ifeval.utils") if is_cut else None
    except ImportError as error:
        raise JudgeError(
            f"IFEval's checkers come with lm-eval, and {error.name or error} is not installed: pip install "
            f"'orpo-ray[judges]', or '{EXTRA}'"
        ) from error
    if checkers is None:
        raise JudgeError(
            "IFEval's checkers split texts with NLTK's data punkt_tab, which no package ships and which was not found: "
            "run python -m nltk.downloader punkt_tab; without network, copy nltk_data/tokenizers/punkt_tab from a "
            "machine that has it and set NLTK_DATA to the nltk_data folder"
        )
    return checkers


def _has_punkt(nltk: Any) -> bool:
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Seed the random numbers that checkers use; restore their state afterwards."""
    factory = importlib.import_module("langdetect").DetectorFactory
    before, state = factory.seed, random.getstate()
    factory.seed = 0
    random.seed(0)
    try:
        yield
    finally:
        factory.seed = before
        random.setstate(state)


def _require_ifeval_row(index: int, row: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    if not isinstance(row, Mapping):
        raise JudgeError(f"row {index} must be a dict, but is {row!r:.60}")
    if absent := [key for key in ("prompt", "instruction_id_list", "kwargs", "response") if key not in row]:
        raise JudgeError(f"row {index} has no {', '.join(absent)}; its keys are {', '.join(map(str, row))}")
    for key in ("prompt", "response"):
        if not isinstance(row[key], str):
            raise JudgeError(f"row {index}: {key} must be text, but is {row[key]!r:.60}")
    ids, kwargs = row["instruction_id_list"], row["kwargs"]
    if not isinstance(ids, list) or not isinstance(kwargs, list) or not ids or len(ids) != len(kwargs):
        # Without instructions, a prompt would count as fully followed.
        raise JudgeError(
            f"row {index}: instruction_id_list and kwargs must be lists of the same length, 1 or more; they are "
            f"{ids!r:.80} and {kwargs!r:.80}"
        )
    if unknown := [id_ for id_ in ids if not isinstance(id_, str) or id_ not in known]:
        raise JudgeError(f"row {index}: lm-eval has no checker {unknown[0]!r}; it has {', '.join(sorted(known))}")
    if wrong := [given for given in kwargs if given is not None and not isinstance(given, Mapping)]:
        raise JudgeError(f"row {index}: each of kwargs must be a dict, but one is {wrong[0]!r:.60}")


def _is_drawn(index: int, checker: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an instruction's checker drew an argument instead of using its kwargs."""
    wanted = {key: value for key, value in kwargs.items() if value is not None}
    absent = [key for key in checker.get_instruction_args_keys() if key not in wanted]
    if absent:  # the checker would draw them at random, and no answer could be right or wrong
        raise JudgeError(f"row {index}: {checker.id} needs {', '.join(absent)}; its kwargs are {dict(kwargs)!r:.120}")
    try:
        # As lm-eval passes them: without zeros and empty values.
        checker.build_description(**{key: value for key, value in kwargs.items() if value})
    except Exception as error:
        raise JudgeError(f"row {index}: {checker.id} refuses {dict(kwargs)!r:.120}: {error}") from error
    checked = checker.get_instruction_args() or {}
    return any(_plain(checked[key]) != _plain(value) for key, value in wanted.items() if key in checked)


def _plain(value: Any) -> Any:
    """An argument in normal form: checkers strip, sort and lowercase theirs."""
    if isinstance(value, str):
        return value.strip().lower()
    return sorted({_plain(each) for each in value}) if isinstance(value, list | tuple) else value
