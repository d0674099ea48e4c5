"""Answers in AlpacaEval's format, and the configuration with which alpaca_eval samples them itself.

Formats as of tatsu-lab/alpaca_eval cd543a1 (0.6.6).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.reproduction.external_judges import (
    ALL,
    GenerationSettings,
    JudgeError,
    reads_as_number,
    require_file_name,
    require_unicode,
    require_unique,
    write_answers,
    write_text,
)

_PLACEHOLDER = re.compile(r"{([^ \s]+?)}")
"""Placeholders that alpaca_eval fills in a prompt (tatsu-lab/alpaca_eval src/alpaca_eval/utils.py, `make_prompts`)."""


@dataclass(frozen=True, slots=True)
class AlpacaAnswer:
    """One answer to an AlpacaEval instruction."""

    dataset: str
    """Source of the instruction as AlpacaEval's own rows name it: `helpful_base`, `koala`, `oasst` ..."""
    instruction: str
    """Verbatim: alpaca_eval looks up the reference answer by it."""
    output: str
    """May be empty: an empty answer counts, and loses."""


def write_alpaca_eval(
    folder: Path, generator: str, answers: Sequence[AlpacaAnswer], settings: GenerationSettings
) -> Path:
    """Write `model_outputs.json` as `alpaca_eval --model_outputs` reads it, and its settings.

    The file holds a list of `{"dataset", "instruction", "output", "generator"}`, the columns of the project's own
    results (tatsu-lab/alpaca_eval results/*/model_outputs.json). The user then runs `alpaca_eval --model_outputs
    <folder>/model_outputs.json` with an API key in OPENAI_API_KEY, which writes its annotations and leaderboard into
    the same folder. It skips a generator that its leaderboard already lists unless given
    `--is_overwrite_leaderboard True` (src/alpaca_eval/main.py, `evaluate`).

    Args:
        folder: created if missing. Answers of the same generator are replaced.
        generator: the model's name on the leaderboard.
        answers: one per instruction. alpaca_eval compares the instructions that both sides have, so leave none out.
        settings: how the answers were sampled.

    Returns:
        The file.

    Raises:
        JudgeError: no answers, two for one instruction, a column that pandas would read as numbers, or an existing
            file that orpo_ray did not write for this generator.
    """
    if not generator.strip():
        raise JudgeError(f"a generator must have a name; this one is {generator!r}")
    if not answers:
        raise JudgeError(f"{generator}: there are no answers; AlpacaEval has an instruction for each (805)")
    require_unicode(generator, *(text for answer in answers for text in asdict(answer).values()))
    # The two sides are joined on the instruction alone (annotators/pairwise_evaluator.py, `annotate_head2head`).
    require_unique("instruction", [answer.instruction for answer in answers])
    rows = [asdict(answer) | {"generator": generator} for answer in answers]
    for column in rows[0]:
        if all(reads_as_number(row[column]) for row in rows):
            raise JudgeError(
                f"{column} is a number in all {len(rows)} rows ({rows[0][column]!r:.60}); alpaca_eval reads the "
                "file with pandas, which would convert it (a name '007' becomes 7): "
                + ("give the model another name" if column == "generator" else "write the whole set of instructions")
            )
    text = json.dumps(rows, indent=2) + "\n"
    return write_answers(folder / "model_outputs.json", text, generator, len(rows), {ALL: settings})


def write_alpaca_config(folder: Path, generator: str, prompt: str, settings: GenerationSettings) -> Path:
    """Write `configs.yaml` and `prompt.txt`, from which alpaca_eval samples the answers itself.

    `alpaca_eval --model_outputs` reads neither. `alpaca_eval evaluate_from_model --model_configs NAME` reads them, and
    the leaderboard asks for them beside the outputs: copy them to `src/alpaca_eval/models_configs/NAME/`
    (tatsu-lab/alpaca_eval README.md, and e.g. models_configs/Conifer-7B-DPO). Its decoders tokenise the prompt like any
    text (src/alpaca_eval/decoders/huggingface_local.py, vllm_local.py): where both the tokenizer and the template add a
    BOS, the model sees two, which it was not trained on. The transformers decoder takes no seed either. So judge the
    outputs of `write_alpaca_eval`.

    Args:
        folder: created if missing.
        generator: name of the model and of its folder under `models_configs`.
        prompt: the chat template applied to a user message `{instruction}`, with the generation prompt.
        settings: how the answers were sampled.

    Returns:
        `configs.yaml`.

    Raises:
        JudgeError: the name cannot be a folder's, the prompt does not have `{instruction}` as its one placeholder, or
            `folder` holds another model's configuration.
    """
    require_file_name(generator)
    found = _PLACEHOLDER.findall(prompt)
    if found != ["instruction"]:
        raise JudgeError(
            "the prompt must have {instruction} in it once and nothing else in braces, because alpaca_eval would fill "
            f"it in; it has {found or 'none'}. Render the chat template with the user message '{{instruction}}'"
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
        raise JudgeError(f"{there} belongs to another model than {generator}: give another folder, or move it away")
    write_text(folder / "prompt.txt", prompt)
    return write_text(there, _dump(config))


def _dump(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
