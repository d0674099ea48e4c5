"""MT-Bench's questions, and answers to them in FastChat's format.

Formats as of lm-sys/FastChat 0e6d3e4 (0.2.36).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from orpo_ray.reproduction.external_judges import (
    GenerationSettings,
    JudgeError,
    reads_as_number,
    require_file_name,
    require_unicode,
    require_unique,
    write_answers,
)

MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
"""Temperature of each category in MT-Bench (lm-sys/FastChat fastchat/llm_judge/common.py, `temperature_config`)."""
MT_BENCH_OTHER_TEMPERATURE = 0.7
"""Temperature of any other category (fastchat/llm_judge/gen_model_answer.py)."""


@dataclass(frozen=True, slots=True)
class MtBenchQuestion:
    """A line of FastChat's question.jsonl."""

    question_id: int
    category: str
    """`writing`, `math` ...: determines the temperature, and whether the judge gets a reference answer."""
    turns: tuple[str, str]
    """The user's first message, and the one after the model's first answer."""


@dataclass(frozen=True, slots=True)
class MtBenchAnswer:
    """A model's answers to both turns of a question."""

    question_id: int
    turns: tuple[str, str]


def read_mt_bench_questions(path: Path) -> list[MtBenchQuestion]:
    """Read FastChat's `fastchat/llm_judge/data/mt_bench/question.jsonl` (80 questions), which orpo_ray does not ship.

    Rows are `{"question_id": int, "category", "turns": [first, second]}`. Some have a `reference` for human readers;
    the judge reads its own file of reference answers (lm-sys/FastChat fastchat/llm_judge/gen_judgment.py).

    Raises:
        JudgeError: the file is missing or empty, a line is not such a row, or a question occurs twice.
    """
    if not path.is_file():
        raise JudgeError(
            f"{path} is not a file. The questions are in FastChat's repository: git clone "
            "https://github.com/lm-sys/FastChat, then give fastchat/llm_judge/data/mt_bench/question.jsonl"
        )
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:  # blank lines too: FastChat cannot read them either
            raise JudgeError(f"{path}, line {number}: not JSON: {line[:60]!r}") from None
        row = row if isinstance(row, dict) else {}
        id_, category, turns = (row.get(key) for key in ("question_id", "category", "turns"))
        # Not `isinstance`: a bool is an int, but not a question id.
        if type(id_) is not int or not isinstance(category, str) or not _is_two_turns(turns):
            raise JudgeError(
                f"{path}, line {number}: a question must have a whole number question_id, a text category and two "
                f"texts in turns; it has question_id {id_!r:.40}, category {category!r:.40}, turns {turns!r:.80}"
            )
        questions.append(MtBenchQuestion(id_, category, (turns[0], turns[1])))
    if not questions:
        raise JudgeError(f"{path} is empty: take question.jsonl from FastChat's repository again")
    require_unique("question_id", [question.question_id for question in questions])
    return questions


def mt_bench_settings(
    settings: GenerationSettings, questions: Sequence[MtBenchQuestion]
) -> dict[str, GenerationSettings]:
    """The settings by category, each with MT-Bench's temperature for it (`MT_BENCH_TEMPERATURES`)."""
    return {
        category: replace(settings, temperature=MT_BENCH_TEMPERATURES.get(category, MT_BENCH_OTHER_TEMPERATURE))
        for category in dict.fromkeys(question.category for question in questions)
    }


def write_mt_bench(
    folder: Path,
    model_id: str,
    questions: Sequence[MtBenchQuestion],
    answers: Sequence[MtBenchAnswer],
    settings: Mapping[str, GenerationSettings],
) -> Path:
    """Write `<model_id>.jsonl` as FastChat's `gen_judgment.py` reads it, and its settings.

    Rows are `{"question_id", "answer_id", "model_id", "choices": [{"index", "turns"}], "tstamp"}`, sorted by question
    id, as lm-sys/FastChat fastchat/llm_judge/gen_model_answer.py writes them. Each has one choice: the judge reads no
    other (common.py, `run_judge_single`). `answer_id` is a digest of the answer, `tstamp` the time of writing in
    seconds since 1970. The user then runs, in `fastchat/llm_judge` and with an API key in OPENAI_API_KEY,
    `python gen_judgment.py --model-list <model_id>` and `python show_result.py --model-list <model_id>`.

    Args:
        folder: FastChat's `data/mt_bench/model_answer`. Answers of the same model are replaced.
        model_id: becomes the file name, from which FastChat reads it back (common.py, `load_model_answers`).
        questions: all of them, from `read_mt_bench_questions`.
        answers: one per question; FastChat refuses a model with a missing answer (common.py, `check_data`).
        settings: by category, e.g. from `mt_bench_settings`.

    Returns:
        The file.

    Raises:
        JudgeError: the model id cannot be a file name, a question does not have exactly one answer, a category has no
            settings, or an existing file was not written by orpo_ray for this model.
    """
    require_file_name(model_id)
    if reads_as_number(model_id):
        raise JudgeError(
            f"the model id {model_id!r} is a number: FastChat's show_result.py reads it with pandas, which converts it "
            f"to {float(model_id):g}. Give the model another name, such as model-{model_id}"
        )
    if not answers:
        raise JudgeError(f"{model_id}: there are no answers; MT-Bench needs one to each of {len(questions)} questions")
    known = {question.question_id: question for question in questions}
    require_unique("question_id", [question.question_id for question in questions])
    require_unique("question_id", [answer.question_id for answer in answers])
    given = {answer.question_id for answer in answers}
    if given != known.keys():
        raise JudgeError(
            f"{model_id}: FastChat needs one answer to every question; questions without an answer: "
            f"{_some(known.keys() - given)}, answers without a question: {_some(given - known.keys())}"
        )
    categories = {question.category for question in questions}
    if settings.keys() != categories:
        raise JudgeError(
            f"{model_id}: each category of the questions must have settings; categories without settings: "
            f"{_some(categories - settings.keys())}, settings without a question: "
            f"{_some(settings.keys() - categories)}"
        )
    rows = []
    for answer in sorted(answers, key=lambda answer: answer.question_id):
        if not _is_two_turns(answer.turns):
            raise JudgeError(
                f"{model_id}, question {answer.question_id}: turns are not two texts: {answer.turns!r:.80}"
            )
        require_unicode(*answer.turns)
        content = json.dumps([model_id, answer.question_id, *answer.turns])
        row = {
            "question_id": answer.question_id,
            "answer_id": hashlib.sha256(content.encode()).hexdigest()[:22],  # as long as FastChat's
            "model_id": model_id,
            "choices": [{"index": 0, "turns": list(answer.turns)}],
            "tstamp": time.time(),
        }
        rows.append(json.dumps(row) + "\n")  # ASCII, because FastChat opens files in the locale's encoding
    return write_answers(folder / f"{model_id}.jsonl", "".join(rows), model_id, len(rows), settings)


def _is_two_turns(turns: Any) -> TypeGuard[Sequence[str]]:
    return isinstance(turns, list | tuple) and len(turns) == 2 and all(isinstance(turn, str) for turn in turns)


def _some(values: Any) -> str:
    listed = sorted(values)
    return ", ".join(map(str, listed[:5])) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "") or "none"
