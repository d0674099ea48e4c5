"""Turn a row, in any of the accepted shapes, into the messages of a prompt and two answers."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from orpo_ray.errors import UserError

ACCEPTED_SHAPES = """\
accepted shapes of a row:
  chosen, rejected: text "\\n\\nHuman: ...\\n\\nAssistant: ..." that ends with the answer (HH-RLHF)
  chosen, rejected: lists of {role, content} that end with the answer (UltraFeedback)
  prompt, chosen, rejected: text, or lists of {role, content}
  instruction or question in place of prompt; optional input (joined to it) and system"""

PROMPT_COLUMNS = ("prompt", "instruction", "question")
COLUMNS = ("chosen", "rejected", *PROMPT_COLUMNS, "input", "system")

_CUT = reprlib.Repr()
_CUT.maxstring = _CUT.maxother = 60

Message = dict[str, str]
"""{"role": ..., "content": ...}"""


class DataError(UserError, ValueError):
    """The preference data cannot be used; the message says where and why."""


@dataclass(frozen=True, slots=True)
class TextPair:
    """A pair as text: the messages of its prompt, and its two answers."""

    prompt: list[Message]
    chosen: str
    rejected: str


class BadRow(Exception):
    """A row without a usable pair; `reason` is a key of `dataset.COUNTS` without its `dropped_`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def parse_row(row: object) -> TextPair:
    """The pair in a row, in any of `ACCEPTED_SHAPES`.

    Raises:
        BadRow: it is malformed, an answer is empty, or the answers are the same or have different prompts.
    """
    if not isinstance(row, Mapping):
        raise BadRow("malformed", f"not a mapping of columns: {_CUT.repr(row)}")
    given = _prompt_columns(row)
    chosen_prompt, chosen = _conversation(row.get("chosen"), "chosen", given)
    rejected_prompt, rejected = _conversation(row.get("rejected"), "rejected", given)
    if chosen_prompt != rejected_prompt:
        raise BadRow("prompt_mismatch", "the text before the last answer differs between chosen and rejected")
    prompt = chosen_prompt
    system = row.get("system")
    if system and prompt[0]["role"] != "system":
        if not isinstance(system, str):
            raise BadRow("malformed", f"system is not text: {_CUT.repr(system)}")
        prompt = [{"role": "system", "content": system}, *prompt]
    for text in (*(part for message in prompt for part in message.values()), chosen, rejected):
        _require_text(text)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise BadRow(f"empty_{side}", f"the {side} answer is empty")
    if chosen.strip() == rejected.strip():
        raise BadRow("identical", "chosen and rejected are the same")
    return TextPair(prompt, chosen, rejected)


def _require_text(text: str) -> None:
    """JSON strings may hold invalid text: tokenizers fail on unpaired surrogates, databases on NUL."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("malformed", f"holds half a surrogate pair, {text[error.start]!r}, at {error.start}") from None
    if "\0" in text:
        raise BadRow("malformed", f"holds a NUL character at {text.index(chr(0))}")


def drop(bad: BadRow, pair_id: str, on_bad_rows: str, counts: Counter[str]) -> None:
    """Count a row without a usable pair.

    Raises:
        DataError: `on_bad_rows` is "error".
    """
    if on_bad_rows == "error":
        raise DataError(f"{pair_id}: {bad.detail}; fix the row, or set data.on_bad_rows: drop") from None
    counts[f"dropped_{bad.reason}"] += 1


def _prompt_columns(row: Mapping[str, object]) -> list[Message] | None:
    """The prompt in the prompt columns of a row; None if they are empty."""
    column = next((name for name in PROMPT_COLUMNS if row.get(name)), None)
    if column is None:
        return None
    prompt, extra = row[column], row.get("input")
    if isinstance(prompt, list):
        return _messages(prompt, column)
    if not isinstance(prompt, str) or not (extra is None or isinstance(extra, str)):
        raise BadRow("malformed", f"{column} is neither text nor a list of messages: {_CUT.repr(prompt)}")
    if prompt.startswith("\n\nHuman:"):
        turns = _turns(prompt, column)
        return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    return [{"role": "user", "content": f"{prompt}\n{extra}" if extra else prompt}]


def _conversation(value: object, column: str, given: list[Message] | None) -> tuple[list[Message], str]:
    """Prompt and answer of one side; `given` is the prompt if the side holds only the answer."""
    if isinstance(value, str):
        if given is not None and not value.startswith("\n\nHuman:"):
            return given, value
        messages = _turns(value, column)
    elif isinstance(value, list):
        messages = _messages(value, column)
    else:
        raise BadRow("malformed", f"{column} is neither text nor a list of messages: {_CUT.repr(value)}")
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("malformed", f"{column} does not end with an assistant's answer")
    prompt = messages[:-1] or given
    if not prompt:
        raise BadRow("malformed", f"{column} holds only an answer, and the row has no prompt")
    return prompt, messages[-1]["content"]


def _turns(text: str, column: str) -> list[Message]:
    r"""HH-RLHF text `\n\nHuman: ...\n\nAssistant: ...` as messages."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not parts:
        raise BadRow(
            "malformed", rf"{column} is neither an answer to a prompt nor text of \n\nHuman: turns: {_CUT.repr(text)}"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _messages(value: list[object], column: str) -> list[Message]:
    messages = []
    for item in value:
        role, content = (item.get("role"), item.get("content")) if isinstance(item, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRow(
                "malformed", f"{column} holds a message that is not {{role: text, content: text}}: {_CUT.repr(item)}"
            )
        messages.append({"role": role, "content": content})
    return messages
