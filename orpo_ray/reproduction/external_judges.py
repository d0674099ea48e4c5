"""Sampled answers in the formats of external judges: AlpacaEval and MT-Bench (FastChat). IFEval: see `ifeval`.

Nothing here calls an API. What a judge that is itself a model (GPT-4) says of the answers, the user asks for with the
judge's own command, which the writers' docstrings and docs/judges.md name. Beside each file of answers stands a second
one, `*.settings.json`, with how the answers were sampled and the digest of the file that it belongs to.

Formats as of tatsu-lab/alpaca_eval cd543a1 (0.6.6) and lm-sys/FastChat 0e6d3e4 (0.2.36).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

import yaml

from orpo_ray import provenance
from orpo_ray.errors import UserError
from orpo_ray.files import write_atomically

Backend = Literal["transformers", "vllm"]
Dtype = Literal["float32", "bfloat16", "float16"]

ALL = "all"
"""In a settings file: of every answer in the file."""

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
"""What MT-Bench samples each category at (lm-sys/FastChat fastchat/llm_judge/common.py, `temperature_config`)."""
MT_BENCH_OTHER_TEMPERATURE = 0.7
"""And any other (fastchat/llm_judge/gen_model_answer.py)."""

_MAX_NAME_BYTES = 200
"""Of a file's 255, so that endings and the temporary name fit."""
_SHA256 = re.compile("[0-9a-f]{64}")
_PLACEHOLDER = re.compile(r"{([^ \s]+?)}")
"""What alpaca_eval fills in a prompt (tatsu-lab/alpaca_eval src/alpaca_eval/utils.py, `make_prompts`)."""


class JudgeError(UserError, RuntimeError):
    """Answers or files that a judge could not read, or would read wrongly; the message says what to do."""


# ---- how answers were sampled --------------------------------------------------------------------------------------


def template_digest(template: str) -> str:
    """SHA-256 (hexadecimal) of a chat template's text, as UTF-8."""
    return hashlib.sha256(template.encode()).hexdigest()


def _versions() -> dict[str, str | None]:
    packages: dict[str, str | None] = dict(provenance.collect()["packages"])
    for name in ("tokenizers", "vllm"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return packages


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How answers were sampled: what changes one of these may change every answer.

    Make it in the process that samples, or the versions are another's.

    Raises:
        JudgeError: a value that no sampler takes.
    """

    model: str
    """Folder or hub name that the backend loaded."""
    backend: Backend
    dtype: Dtype
    """Of the weights while sampling."""
    temperature: float
    """0: greedy, the likeliest token each time."""
    top_p: float
    """In (0, 1]; 1: every token may be drawn."""
    max_new_tokens: int
    """An answer that is longer was cut there."""
    seed: int
    chat_template_sha256: str
    """`template_digest` of the template that prompts were written with."""
    versions: Mapping[str, str | None] = field(default_factory=_versions)
    """Of the packages that sampled; None: not installed there."""

    def __post_init__(self) -> None:
        laws = {
            "model": (bool(self.model), "a folder or a hub name"),
            "backend": (self.backend in get_args(Backend), f"one of {', '.join(get_args(Backend))}"),
            "dtype": (self.dtype in get_args(Dtype), f"one of {', '.join(get_args(Dtype))}"),
            "temperature": (math.isfinite(self.temperature) and self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "seed": (self.seed >= 0, "0 or more"),
            "chat_template_sha256": (
                _SHA256.fullmatch(self.chat_template_sha256) is not None,
                "64 hexadecimal digits, as template_digest gives them",
            ),
            "versions": (
                self.versions.get(self.backend) is not None,
                f"the versions where the answers were sampled, that of {self.backend} among them",
            ),
        }
        for name, (holds, law) in laws.items():
            if not holds:
                raise JudgeError(f"GenerationSettings.{name} must be {law}, and is {getattr(self, name)!r}")


def settings_file(answers: Path) -> Path:
    """Where the settings stand of a file of answers: `model_outputs.json` -> `model_outputs.settings.json`."""
    return answers.with_suffix(".settings.json")


def read_settings(answers: Path) -> dict[str, GenerationSettings]:
    """How the answers in a file were sampled: by MT-Bench category, or under `ALL`.

    Raises:
        JudgeError: nothing is recorded of this file, or of another content than it has.
    """
    record = _record(answers)
    if record is None or not answers.is_file():
        raise JudgeError(f"{settings_file(answers)} or {answers} is missing: write the answers again")
    if (digest := hashlib.sha256(answers.read_bytes()).hexdigest()) != record["sha256"]:
        raise JudgeError(
            f"{settings_file(answers)} was written for a file of SHA-256 {record['sha256']}, and {answers} has "
            f"{digest}: it was changed, or its writing was cut short. Write the answers again"
        )
    names = {each.name for each in fields(GenerationSettings)}
    if any(not isinstance(known, dict) or known.keys() != names for known in record["settings"].values()):
        raise JudgeError(f"{settings_file(answers)} does not hold exactly {', '.join(sorted(names))}: write it again")
    return {scope: GenerationSettings(**known) for scope, known in record["settings"].items()}


def _record(answers: Path) -> dict[str, Any] | None:
    """What stands beside a file of answers; None if nothing of ours."""
    try:
        record = json.loads(settings_file(answers).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(record, dict) and record.keys() == {"name", "answers", "sha256", "settings"}
    return record if is_ours and isinstance(record["settings"], dict) else None


# ---- AlpacaEval ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AlpacaAnswer:
    """One answer to an AlpacaEval instruction."""

    dataset: str
    """Where the instruction comes from, as AlpacaEval's own rows say: `helpful_base`, `koala`, `oasst` ..."""
    instruction: str
    """Word for word: alpaca_eval finds the reference answer by it."""
    output: str
    """May be empty: that is an answer too, and loses."""


def write_alpaca_eval(
    folder: Path, generator: str, answers: Sequence[AlpacaAnswer], settings: GenerationSettings
) -> Path:
    """Write `model_outputs.json` as `alpaca_eval --model_outputs` reads it, and its settings.

    A list of `{"dataset", "instruction", "output", "generator"}`, the columns of the project's own results
    (tatsu-lab/alpaca_eval results/*/model_outputs.json). Then the user runs, with an API key in OPENAI_API_KEY,
    `alpaca_eval --model_outputs <folder>/model_outputs.json`, which writes its annotations and leaderboard into the
    same folder. It skips a generator that its leaderboard knows already unless told `--is_overwrite_leaderboard True`
    (src/alpaca_eval/main.py, `evaluate`).

    Args:
        folder: made if missing. Answers of the same generator are replaced.
        generator: the model's name on the leaderboard.
        answers: one per instruction. alpaca_eval compares what both sides have, so leave none out.
        settings: how they were sampled.

    Returns:
        The file.

    Raises:
        JudgeError: no answers, two for one instruction, a column that pandas would read as numbers, or a file there
            that is not ours to replace.
    """
    if not generator.strip():
        raise JudgeError(f"a generator must have a name, and this one is {generator!r}")
    if not answers:
        raise JudgeError(f"{generator}: there are no answers; AlpacaEval has an instruction for each (805)")
    _require_unicode(generator, *(text for answer in answers for text in asdict(answer).values()))
    # The two sides are joined on the instruction alone (annotators/pairwise_evaluator.py, `annotate_head2head`).
    _require_unique("instruction", [answer.instruction for answer in answers])
    rows = [asdict(answer) | {"generator": generator} for answer in answers]
    for column in rows[0]:
        if all(_reads_as_number(row[column]) for row in rows):
            raise JudgeError(
                f"{column} is a number in all {len(rows)} rows ({rows[0][column]!r:.60}), and alpaca_eval reads the "
                "file with pandas, which then makes numbers of them (a name '007' becomes 7): "
                + ("give the model another name" if column == "generator" else "write the whole set of instructions")
            )
    text = json.dumps(rows, indent=2) + "\n"
    return _write_answers(folder / "model_outputs.json", text, generator, len(rows), {ALL: settings})


def write_alpaca_config(folder: Path, generator: str, prompt: str, settings: GenerationSettings) -> Path:
    """Write `configs.yaml` and `prompt.txt`, with which alpaca_eval samples the answers itself.

    `alpaca_eval --model_outputs` reads neither. They are what `alpaca_eval evaluate_from_model --model_configs NAME`
    reads, and what its leaderboard asks for beside the outputs: copy them to `src/alpaca_eval/models_configs/NAME/`
    (tatsu-lab/alpaca_eval README.md, and e.g. models_configs/Conifer-7B-DPO). Its decoders tokenise the prompt as any
    text (src/alpaca_eval/decoders/huggingface_local.py, vllm_local.py): where the tokenizer puts a BOS before every
    text and the template writes one too, the model sees two, which it was not trained on. And transformers' decoder
    takes no seed. So the outputs of `write_alpaca_eval` are the ones to judge.

    Args:
        folder: made if missing.
        generator: the model's name, and that of the folder under `models_configs`.
        prompt: what the chat template writes for a user message `{instruction}`, with the generation prompt.
        settings: how the answers were sampled.

    Returns:
        `configs.yaml`.

    Raises:
        JudgeError: a name that is no folder's, or a prompt with other placeholders than one `{instruction}`.
    """
    _require_file_name(generator)
    found = _PLACEHOLDER.findall(prompt)
    if found != ["instruction"]:
        raise JudgeError(
            "the prompt must have {instruction} in it once, and nothing else in braces, which alpaca_eval would fill "
            f"in; it has {found or 'none'}. Render the chat template with the user message '{{instruction}}'"
        )
    sampling: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens}
    if settings.backend == "vllm":
        function, dtype = "vllm_local_completions", "dtype"
        sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed}
    else:
        function, dtype = "huggingface_local_completions", "torch_dtype"
        sampling["do_sample"] = settings.temperature > 0
        if settings.temperature > 0:
            sampling |= {"temperature": settings.temperature, "top_p": settings.top_p}
    config = {
        generator: {
            "prompt_template": f"{generator}/prompt.txt",
            "fn_completions": function,
            "completions_kwargs": {"model_name": settings.model, "model_kwargs": {dtype: settings.dtype}} | sampling,
            "pretty_name": generator,
        }
    }
    there = folder / "configs.yaml"
    if there.is_file() and not there.read_bytes().startswith(_dump(config).partition("\n")[0].encode()):
        raise JudgeError(f"{there} is of another model than {generator}: give another folder, or move it away")
    _write(folder / "prompt.txt", prompt)
    return _write(there, _dump(config))


def _dump(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _reads_as_number(text: str) -> bool:
    """Whether pandas' `read_json` would make a number of it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---- MT-Bench ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MtBenchQuestion:
    """A line of FastChat's question.jsonl."""

    question_id: int
    category: str
    """`writing`, `math` ...: decides on the temperature, and on whether the judge gets a reference answer."""
    turns: tuple[str, str]
    """What the user says first, and after the model's first answer."""


@dataclass(frozen=True, slots=True)
class MtBenchAnswer:
    """What a model said to both turns of a question."""

    question_id: int
    turns: tuple[str, str]


def read_mt_bench_questions(path: Path) -> list[MtBenchQuestion]:
    """The questions in FastChat's `fastchat/llm_judge/data/mt_bench/question.jsonl` (80), which is not in this project.

    Rows are `{"question_id": int, "category", "turns": [first, second]}`; some have a `reference`, which is for people:
    the judge reads its own file of reference answers (lm-sys/FastChat fastchat/llm_judge/gen_judgment.py).

    Raises:
        JudgeError: there is no such file, or a line that is not such a row, or a question twice.
    """
    if not path.is_file():
        raise JudgeError(
            f"{path} is no file. The questions are in FastChat's repository: git clone "
            "https://github.com/lm-sys/FastChat, then give fastchat/llm_judge/data/mt_bench/question.jsonl"
        )
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:  # of blank ones too, which FastChat cannot read either
            raise JudgeError(f"{path}, line {number}: not JSON: {line[:60]!r}") from None
        row = row if isinstance(row, dict) else {}
        id_, category, turns = (row.get(key) for key in ("question_id", "category", "turns"))
        # Not `isinstance`: true is no number of a question.
        if type(id_) is not int or not isinstance(category, str) or not _is_two_turns(turns):
            raise JudgeError(
                f"{path}, line {number}: a question must have a whole number question_id, a text category and two "
                f"texts in turns; it has question_id {id_!r:.40}, category {category!r:.40}, turns {turns!r:.80}"
            )
        questions.append(MtBenchQuestion(id_, category, (turns[0], turns[1])))
    if not questions:
        raise JudgeError(f"{path} is empty: take question.jsonl from FastChat's repository again")
    _require_unique("question_id", [question.question_id for question in questions])
    return questions


def mt_bench_settings(
    settings: GenerationSettings, questions: Sequence[MtBenchQuestion]
) -> dict[str, GenerationSettings]:
    """The same settings by category, each at the temperature that MT-Bench samples it at (`MT_BENCH_TEMPERATURES`)."""
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

    Rows `{"question_id", "answer_id", "model_id", "choices": [{"index", "turns"}], "tstamp"}` in the order of their
    question ids, as lm-sys/FastChat fastchat/llm_judge/gen_model_answer.py writes them. One choice each: the judge
    reads no other (common.py, `run_judge_single`). `answer_id` is a digest of the answer, `tstamp` the time of writing
    in seconds since 1970. Then the user runs, in `fastchat/llm_judge` and with an API key in OPENAI_API_KEY,
    `python gen_judgment.py --model-list <model_id>` and `python show_result.py --model-list <model_id>`.

    Args:
        folder: FastChat's `data/mt_bench/model_answer`. Answers of the same model are replaced.
        model_id: becomes the file's name, from which FastChat takes it again (common.py, `load_model_answers`).
        questions: all of them, from `read_mt_bench_questions`.
        answers: one per question; FastChat refuses a model that left one out (common.py, `check_data`).
        settings: by category, e.g. from `mt_bench_settings`.

    Returns:
        The file.

    Raises:
        JudgeError: a model id that is no file's name, answers that are not one to each question, a category without
            settings, or a file there that is not ours to replace.
    """
    _require_file_name(model_id)
    if _reads_as_number(model_id):
        raise JudgeError(
            f"the model id {model_id!r} is a number: FastChat's show_result.py reads it with pandas, which makes "
            f"{float(model_id):g} of it. Give the model another name, such as model-{model_id}"
        )
    if not answers:
        raise JudgeError(f"{model_id}: there are no answers; MT-Bench needs one to each of {len(questions)} questions")
    known = {question.question_id: question for question in questions}
    _require_unique("question_id", [question.question_id for question in questions])
    _require_unique("question_id", [answer.question_id for answer in answers])
    given = {answer.question_id for answer in answers}
    if given != known.keys():
        raise JudgeError(
            f"{model_id}: FastChat wants an answer to every question and to no other; without an answer: "
            f"{_some(known.keys() - given)}, answers without a question: {_some(given - known.keys())}"
        )
    categories = {question.category for question in questions}
    if settings.keys() != categories:
        raise JudgeError(
            f"{model_id}: there must be settings for each category of the questions and for no other; without "
            f"settings: {_some(categories - settings.keys())}, settings without a question: "
            f"{_some(settings.keys() - categories)}"
        )
    rows = []
    for answer in sorted(answers, key=lambda answer: answer.question_id):
        if not _is_two_turns(answer.turns):
            raise JudgeError(f"{model_id}, question {answer.question_id}: not two texts: {answer.turns!r:.80}")
        _require_unicode(*answer.turns)
        content = json.dumps([model_id, answer.question_id, *answer.turns])
        row = {
            "question_id": answer.question_id,
            "answer_id": hashlib.sha256(content.encode()).hexdigest()[:22],  # as long as FastChat's
            "model_id": model_id,
            "choices": [{"index": 0, "turns": list(answer.turns)}],
            "tstamp": time.time(),
        }
        rows.append(json.dumps(row) + "\n")  # in ASCII: FastChat opens files in the locale's encoding
    return _write_answers(folder / f"{model_id}.jsonl", "".join(rows), model_id, len(rows), settings)


def _is_two_turns(turns: Any) -> TypeGuard[Sequence[str]]:
    return isinstance(turns, list | tuple) and len(turns) == 2 and all(isinstance(turn, str) for turn in turns)


# ---- files ---------------------------------------------------------------------------------------------------------


def _write_answers(path: Path, text: str, name: str, answers: int, settings: Mapping[str, GenerationSettings]) -> Path:
    """Both files, each whole or not at all."""
    _require_ours(path, name)
    record = {
        "name": name,
        "answers": answers,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "settings": {scope: asdict(each) for scope, each in settings.items()},
    }
    # First, so that no answers ever stand without; cut short in between, `read_settings` sees that they do not match.
    _write(settings_file(path), json.dumps(record, indent=1) + "\n")
    return _write(path, text)


def _require_ours(path: Path, name: str) -> None:
    if not path.exists():
        return
    there = _record(path)
    if there is None or there["name"] != name:
        whose = "a folder" if path.is_dir() else f"answers of {there['name']}" if there else "answers from elsewhere"
        raise JudgeError(f"{path} is there already, {whose}, and only answers of {name} may be replaced: move it away")


def _write(path: Path, text: str) -> Path:
    if path.is_dir() or (path.parent.exists() and not path.parent.is_dir()):
        raise JudgeError(f"{path} cannot be written: {path if path.is_dir() else path.parent} is in its place; move it")
    write_atomically(path, text)
    return path


def _require_file_name(name: str) -> None:
    """FastChat opens `model_answer/<model_id>.jsonl` as it stands, so a slash would make a folder, in which it does not
    look again (`glob("*.jsonl")`, which passes over hidden files too)."""
    _require_unicode(name)
    is_long = len(name.encode()) > _MAX_NAME_BYTES
    if is_long or not name.strip() or name.startswith(".") or re.search(r"[/\\\x00-\x1f]", name):
        plain = re.sub(r"[/\\\x00-\x1f]+", "-", name).strip(".- ")[: _MAX_NAME_BYTES // 4]
        raise JudgeError(
            f"{name!r:.120} becomes a file's name, and so must be 1 to {_MAX_NAME_BYTES} bytes without slashes and "
            f"without a dot in front; such as {plain or 'my-model'}"
        )


def _require_unicode(*texts: Any) -> None:
    for text in texts:
        if not isinstance(text, str):
            raise JudgeError(f"names, instructions and answers must be text, and one is {text!r:.60}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise JudgeError(
                f"a text has half a surrogate pair at character {error.start}, which no UTF-8 file can hold: "
                f"{text!r:.80}; decode the answer's tokens again"
            ) from None


def _require_unique(what: str, values: Sequence[Any]) -> None:
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise JudgeError(f"each {what} may be there once; {len(twice)} are there more often, e.g. {twice[0]!r:.80}")


def _some(values: Any) -> str:
    listed = sorted(values)
    return ", ".join(map(str, listed[:5])) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "") or "none"
