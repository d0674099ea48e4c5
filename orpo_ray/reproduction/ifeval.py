"""IFEval (Zhou et al. 2023): lm-evaluation-harness's command, and its checkers over answers that are there already.

As of lm_eval 0.4.13. Neither the prompts (google/IFEval on the hub) nor NLTK's `punkt_tab` come with a package.
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
"""What `ifeval_score` needs."""


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many."""

    followed: int
    of: int

    @property
    def value(self) -> float:
        """In [0, 1]."""
        return self.followed / self.of


@dataclass(frozen=True, slots=True)
class IfevalScore:
    """IFEval's four numbers. Strict: the answer as it is. Loose: also without its first or last line, or asterisks."""

    prompt_strict: Share
    """Of the prompts, those whose every instruction was followed."""
    prompt_loose: Share
    inst_strict: Share
    """Of all prompts' instructions."""
    inst_loose: Share
    drawn: tuple[tuple[int, str], ...]
    """(row, instruction id) where lm-eval's checker does not check what the row asks for, but something that it draws
    at random: where a letter is none of a to z, or a number 0. google/IFEval has two, keys 1122 (#) and 1129 (!)."""
    lm_eval: str
    """Version of the package whose checkers these are."""


def ifeval_command(
    model: Path, output: Path, dtype: Dtype, backend: Backend = "transformers", batch_size: int | Literal["auto"] = 1
) -> list[str]:
    """The command that lets lm-evaluation-harness sample and score IFEval, as a list for `subprocess` or `shlex.join`.

    Greedy and at most 1280 tokens, as the task itself says (EleutherAI/lm-evaluation-harness
    lm_eval/tasks/ifeval/ifeval.yaml). The prompts, google/IFEval, come from the Hugging Face hub. lm-eval writes
    results, its own settings and, with `--log_samples`, every answer into `output`.

    Args:
        model: a folder that `orpo-ray export` wrote; the chat template is in it.
        output: folder for the results.
        dtype: to load the weights in.
        backend: `vllm` wants a GPU, and to be installed.
        batch_size: prompts at a time, or as many as fit.

    Raises:
        JudgeError: no such folder, or a path that lm-eval would take apart.
    """
    model, output = model.expanduser().absolute(), output.expanduser().absolute()
    if not (model / "config.json").is_file():
        raise JudgeError(f"{model} holds no config.json, so it is no model: give a folder that orpo-ray export wrote")
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
    """Score answers with the checkers that lm-evaluation-harness ships, without network.

    lm_eval's package has the checkers (EleutherAI/lm-evaluation-harness lm_eval/tasks/ifeval/) but not the prompts,
    which are google/IFEval on the hub (`datasets.load_dataset("google/IFEval", split="train")`: 541 rows with `prompt`,
    `instruction_id_list` and `kwargs`; add `response`). And sentences and words are cut by NLTK with the data
    `punkt_tab`, which no package ships.

    lm-eval guesses a text's language with random numbers that nothing seeds (langdetect), so its own score can move a
    little from run to run. Here they are seeded, for this call: the same rows give the same score.

    Args:
        rows: `{"prompt": str, "instruction_id_list": [str], "kwargs": [{...}], "response": str}`; other keys are not
            read. `kwargs` are one dict per instruction, None as good as absent.

    Returns:
        The score. Checkers that checked something else than the row asks for are in `drawn`.

    Raises:
        JudgeError: lm-eval or punkt_tab is missing, there are no rows, or a row is not one of IFEval's.
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
            # Before each, so that what a checker draws is the same for strict and loose, wherever the row stands.
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
    """lm_eval/tasks/ifeval/utils.py."""
    try:
        nltk = importlib.import_module("nltk")
        # Looked for before lm_eval is imported, whose checkers else download it as they are imported.
        is_cut = _has_punkt(nltk)
        checkers = importlib.import_module("lm_eval.tasks.ifeval.utils") if is_cut else None
    except ImportError as error:
        raise JudgeError(
            f"IFEval's checkers are lm-eval's, and {error.name or error} is not installed: pip install "
            f"'orpo-ray[judges]', or '{EXTRA}'"
        ) from error
    if checkers is None:
        raise JudgeError(
            "IFEval's checkers cut texts with NLTK's data punkt_tab, which comes with no package and is not here: with "
            "network, python -m nltk.downloader punkt_tab; without, copy nltk_data/tokenizers/punkt_tab from a machine "
            "that has it and name the nltk_data folder in NLTK_DATA"
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
    """What checkers draw from, from the same seeds each time; as it was, afterwards."""
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
        raise JudgeError(f"row {index} must be a dict, and is {row!r:.60}")
    if absent := [key for key in ("prompt", "instruction_id_list", "kwargs", "response") if key not in row]:
        raise JudgeError(f"row {index} has no {', '.join(absent)}; its keys are {', '.join(map(str, row))}")
    for key in ("prompt", "response"):
        if not isinstance(row[key], str):
            raise JudgeError(f"row {index}: {key} must be text, and is {row[key]!r:.60}")
    ids, kwargs = row["instruction_id_list"], row["kwargs"]
    if not isinstance(ids, list) or not isinstance(kwargs, list) or not ids or len(ids) != len(kwargs):
        # A prompt without instructions would count as one whose every instruction was followed.
        raise JudgeError(
            f"row {index}: instruction_id_list and kwargs must be lists of the same length, 1 or more; they are "
            f"{ids!r:.80} and {kwargs!r:.80}"
        )
    if unknown := [id_ for id_ in ids if not isinstance(id_, str) or id_ not in known]:
        raise JudgeError(f"row {index}: lm-eval has no checker {unknown[0]!r}; it has {', '.join(sorted(known))}")
    if wrong := [given for given in kwargs if given is not None and not isinstance(given, Mapping)]:
        raise JudgeError(f"row {index}: each of kwargs must be a dict, and one is {wrong[0]!r:.60}")


def _is_drawn(index: int, checker: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the checker of an instruction checks something else than its kwargs say."""
    wanted = {key: value for key, value in kwargs.items() if value is not None}
    absent = [key for key in checker.get_instruction_args_keys() if key not in wanted]
    if absent:  # drawn at random, where an answer can be neither right nor wrong
        raise JudgeError(f"row {index}: {checker.id} needs {', '.join(absent)}; its kwargs are {dict(kwargs)!r:.120}")
    try:
        # As lm-eval gives them: without those that are 0 or empty.
        checker.build_description(**{key: value for key, value in kwargs.items() if value})
    except Exception as error:
        raise JudgeError(f"row {index}: {checker.id} refuses {dict(kwargs)!r:.120}: {error}") from error
    checked = checker.get_instruction_args() or {}
    return any(_plain(checked[key]) != _plain(value) for key, value in wanted.items() if key in checked)


def _plain(value: Any) -> Any:
    """Of an argument, what counts: checkers strip and sort theirs, and write them small."""
    if isinstance(value, str):
        return value.strip().lower()
    return sorted({_plain(each) for each in value}) if isinstance(value, list | tuple) else value
