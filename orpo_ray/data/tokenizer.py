"""Turn prompts and answers into token ids: chat template, end-of-turn token, cuts to length."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
from jinja2.exceptions import TemplateError

from orpo_ray.config import DataConfig
from orpo_ray.data.rows import BadRow, DataError, Message, TextPair, drop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ORPO_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""The format of the ORPO authors' code (xfactlab/orpo), for tokenizers without a chat template."""

SCHEMA = pa.schema(
    {
        "pair_id": pa.string(),
        "prompt_text": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "chosen_ids": pa.list_(pa.int32()),
        "rejected_ids": pa.list_(pa.int32()),
        "chosen_bytes": pa.int32(),
    }
)
"""Columns of a tokenised pair on disk; `dataset.Pair` describes them."""


_PROBE_S = 5
_PROBE = f"""
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, ({_PROBE_S}, {_PROBE_S}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from datetime import datetime
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Generation(Extension):
    tags = {{"generation"}}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)
    def _as_it_is(self, caller):
        return caller()

def raise_exception(message):
    raise TemplateError(message)

template, talks, given = json.load(sys.stdin)
extensions = [Generation, "jinja2.ext.loopcontrols"]
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{{"ensure_ascii": False}} | how)
environment.globals |= dict(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
longest = 0
for messages in talks:
    for add in (True, False):
        try:
            written = environment.from_string(template).generate(given, messages=messages, add_generation_prompt=add)
            longest = max(longest, sum(map(len, written)))
        except MemoryError:
            sys.exit("takes more than 1 GiB")
        except SecurityError as error:
            sys.exit("uses what the sandbox forbids (%.200s)" % error)
        except Exception:
            continue
sys.exit("writes %d characters for short conversations" % longest if longest > 1 << 20 else 0)
"""
"""Renders a template under limits, with the filters and globals that transformers provides. It ignores other errors of
the template: the first pair reports them better."""
_TALKS = [
    [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}],
    [{"role": "system", "content": "Be kind. " * 50}]
    + [{"role": role, "content": "One, two, three. " * 50} for role in ("user", "assistant") * 4],
]
"""Conversations that the probe renders: a short one, and one with all roles and several turns."""


class PairTokenizer:
    """Renders and tokenises pairs in batches, cuts them to length, and counts drops and cuts."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Resets any padding and truncation that the tokenizer was used with before.

        Raises:
            DataError: the tokenizer is not a fast tokenizer, or has no EOS token.
        """
        if not tokenizer.is_fast or tokenizer.eos_token_id is None:
            raise DataError(f"{type(tokenizer).__name__}: a fast tokenizer with an EOS token is needed")
        self.config, self.tokenizer = config, tokenizer
        self.template = _chat_template(config, tokenizer)
        self.bos_id = _added_bos(tokenizer)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        # Longest first: a token that is the end of another must not match first.
        self.ends = tuple(sorted({*special, tokenizer.eos_token} - {""}, key=lambda token: (-len(token), token)))
        self.newline_ids = self._ids(["\n"])[0]
        self.first_refusal = ""
        """The chat template's error for the first pair that it refuses."""

    def identity(self) -> dict[str, object]:
        """Everything in template and tokenizer that decides the ids, as JSON values."""
        return {
            "template": self.template,
            "special": [self.bos_id, self.tokenizer.special_tokens_map],
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
        }

    def require_bounded_template(self) -> None:
        """Render two conversations in a separate process, limited to 5 s and 1 GiB.

        transformers renders templates in Jinja's sandbox, which blocks access to files and code, but not endless loops
        or gigabytes of output; and models from the hub bring their own templates.

        Raises:
            DataError: it exceeds these limits, writes more than 1 MiB, or tries something that the sandbox refuses.
        """
        problem = _unbounded(self.template, json.dumps(self.tokenizer.special_tokens_map))
        if problem:
            raise DataError(f"the chat template {problem}: fix data.chat_template, or the template of the tokenizer")

    def end_of_turn(self) -> int:
        """Id of the token that answers end with."""
        asked = [{"role": "user", "content": "Which one?"}]
        return self._answer(self._apply(asked, add_generation_prompt=True), asked, "This one.", Counter())[1]

    def prompts(self, prompts: Sequence[list[Message]]) -> list[list[int]]:
        """Ids of prompts, rendered as before an answer and not cut.

        Raises:
            DataError: the chat template refuses one.
        """
        try:
            rendered = [self._apply(messages, add_generation_prompt=True) for messages in prompts]
        except TemplateError as error:
            raise DataError(f"the chat template refuses a prompt: {error!s:.300}") from error
        return [self._with_bos(ids) for ids in self._ids(rendered)]

    def answers(self, prompt: list[Message], texts: Sequence[str]) -> list[list[int]]:
        """Ids of answers to a prompt, followed by the end-of-turn token and not cut.

        Raises:
            DataError: the chat template refuses one.
        """
        try:
            rendered = self._apply(prompt, add_generation_prompt=True)
            return self._answer_ids([self._answer(rendered, prompt, text, Counter()) for text in texts])
        except TemplateError as error:
            raise DataError(f"the chat template refuses an answer: {error!s:.300}") from error

    def batch(self, pairs: Sequence[tuple[str, TextPair]], counts: Counter[str]) -> pa.RecordBatch:
        """Tokenise pairs, and count those that are dropped or cut.

        Args:
            pairs: (pair_id, texts).
            counts: incremented; keys as in `dataset.COUNTS`.

        Returns:
            Arrow rows (`SCHEMA`) of the pairs that remain, in order.

        Raises:
            DataError: the chat template refuses a pair, and `on_bad_rows` is "error".
        """
        rendered: list[tuple[str, str]] = []
        chosen: list[tuple[str, int]] = []
        rejected: list[tuple[str, int]] = []
        for pair_id, texts in pairs:
            try:
                prompt = self._apply(texts.prompt, add_generation_prompt=True)
                answers = [self._answer(prompt, texts.prompt, side, counts) for side in (texts.chosen, texts.rejected)]
            except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
                bad = BadRow("template_error", f"the chat template refuses it: {error!s:.300}")
                self.first_refusal = self.first_refusal or f"{pair_id}: {bad.detail}"
                drop(bad, pair_id, self.config.on_bad_rows, counts)
                continue
            rendered.append((pair_id, prompt))
            chosen.append(answers[0])
            rejected.append(answers[1])
        ids_of = zip(
            self._ids([prompt for _, prompt in rendered]),
            self._answer_ids(chosen),
            self._answer_ids(rejected),
            strict=True,
        )
        rows = []
        for (pair_id, prompt), (text, _), ids in zip(rendered, chosen, ids_of, strict=True):
            cut = self._cut(*ids, counts)
            if cut is None:
                continue
            # For a cut answer, the text of the kept tokens; a character cut in two counts as the three bytes of U+FFFD.
            kept = text if len(cut[1]) == len(ids[1]) else self._text(cut[1])
            rows.append(dict(zip(SCHEMA.names, (pair_id, prompt, *cut, len(kept.encode())), strict=True)))
        return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)

    def _answer(self, prompt: str, messages: list[Message], content: str, counts: Counter[str]) -> tuple[str, int]:
        whole = self._apply([*messages, {"role": "assistant", "content": content}], add_generation_prompt=False)
        if not whole.startswith(prompt):
            counts["answers_without_template"] += 1
            return content, self.tokenizer.eos_token_id
        answer = whole[len(prompt) :]
        # The first special token that the template puts after the answer (`<|im_end|>\n`, `</s>\n`) ends the turn:
        # it is the last token that a model has to generate.
        start, end = self._turn_end(answer)
        if end is None:
            return answer.rstrip(), self.tokenizer.eos_token_id
        return answer[:start], self.tokenizer.convert_tokens_to_ids(end)

    def _turn_end(self, answer: str) -> tuple[int, str | None]:
        """Start of the special tokens at the end of the answer, and the first of them (None without any).

        One pass from the end: on an answer of special tokens alone a regular expression would take hours.
        """
        start, end, at = len(answer), None, len(answer)
        while True:
            while at and answer[at - 1].isspace():
                at -= 1
            if not answer.endswith(self.ends, 0, at):
                return start, end
            end = next(token for token in self.ends if answer.endswith(token, 0, at))
            start = at = at - len(end)

    def _apply(self, messages: list[Message], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # If the model expects a BOS, the template or `_with_bos` adds it.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False) if texts else None
        return encoded["input_ids"] if encoded else []

    def _answer_ids(self, answers: Sequence[tuple[str, int]]) -> list[list[int]]:
        """Ids of answers as they would follow a prompt.

        SentencePiece-like tokenizers put a space before a text on its own. Each answer is therefore tokenised after a
        newline, whose ids are removed; if newline and answer merge into one token, the answer is tokenised alone.
        """
        size = len(self.newline_ids)
        behind = self._ids(["\n" + text for text, _ in answers])
        merged = [index for index, ids in enumerate(behind) if ids[:size] != self.newline_ids]
        ids_of = dict(zip(merged, self._ids([answers[index][0] for index in merged]), strict=True))
        return [[*ids_of.get(index, behind[index][size:]), end] for index, (_, end) in enumerate(answers)]

    def _cut(
        self, prompt_ids: list[int], chosen_ids: list[int], rejected_ids: list[int], counts: Counter[str]
    ) -> tuple[list[int], list[int], list[int]] | None:
        longest = self.config.max_prompt_tokens
        prompt_ids = self._with_bos(prompt_ids)
        if not prompt_ids:
            # The first token of a sequence is never predicted: without a prompt the answer would lose one.
            counts["dropped_empty_prompt"] += 1
            return None
        truncated = len(prompt_ids) > longest
        if truncated and self.config.long_prompts == "drop":
            counts["dropped_long_prompt"] += 1
            return None
        if truncated:
            # Keep BOS: models trained with it fail without it.
            first = prompt_ids[:1] if self.bos_id is not None else []
            prompt_ids = [*first, *prompt_ids[len(prompt_ids) - longest + len(first) :]]
        room = self.config.max_tokens - len(prompt_ids)
        if chosen_ids[:room] == rejected_ids[:room]:
            counts["dropped_identical_after_cut"] += 1
            return None
        counts["prompts_truncated"] += truncated
        counts["chosen_truncated"] += len(chosen_ids) > room
        counts["rejected_truncated"] += len(rejected_ids) > room
        return prompt_ids, chosen_ids[:room], rejected_ids[:room]

    def _with_bos(self, prompt_ids: list[int]) -> list[int]:
        if self.bos_id is not None and prompt_ids[:1] != [self.bos_id]:
            return [self.bos_id, *prompt_ids]
        return prompt_ids

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


@functools.lru_cache(maxsize=4)
def _unbounded(template: str, special_tokens: str) -> str:
    """The limit that the template exceeds, in words; "" if none."""
    given = {"tools": None, "documents": None} | json.loads(special_tokens)
    command = [sys.executable, "-I", "-c", _PROBE]
    probed = json.dumps([template, _TALKS, given])
    try:
        ran = subprocess.run(command, input=probed, capture_output=True, text=True, timeout=6 * _PROBE_S)
    except subprocess.TimeoutExpired:
        return f"takes more than {6 * _PROBE_S} s for two conversations"
    if ran.returncode < 0:
        return f"takes more than {_PROBE_S} s for two conversations"
    return ran.stderr.strip() if ran.returncode == 1 else ""


def _added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the BOS that the tokenizer adds to every text; None if it adds none."""
    bos_id = tokenizer.bos_token_id
    return bos_id if bos_id is not None and tokenizer("x")["input_ids"][:1] == [bos_id] else None


def _chat_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja template of prompts and answers: the config's, else the tokenizer's own, else the ORPO authors'."""
    if config.chat_template is not None:
        return config.chat_template
    return str(tokenizer.get_chat_template()) if tokenizer.chat_template else ORPO_CHAT_TEMPLATE
