"""Prompt and answers -> token ids: the chat template, the end-of-turn token, the cuts to length."""

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
"""The format of the ORPO authors' code (xfactlab/orpo), for tokenizers without a chat template of their own."""

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
"""Of a tokenised pair on disk; `data.Pair` says what the columns hold."""


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
            sys.exit("reaches for what no template may have (%.200s)" % error)
        except Exception:
            continue
sys.exit("writes %d characters for short conversations" % longest if longest > 1 << 20 else 0)
"""
"""Renders a template where it can do no harm, in what transformers gives one to use; of whatever else is wrong with it
the first pair tells better."""
_TALKS = [
    [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}],
    [{"role": "system", "content": "Be kind. " * 50}]
    + [{"role": role, "content": "One, two, three. " * 50} for role in ("user", "assistant") * 4],
]
"""What the probe renders: a short conversation, and one of all roles and several turns."""


class PairTokenizer:
    """Renders and tokenises pairs by the batch, cuts them to length, and counts what it did."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes the tokenizer's padding and truncation off, if whoever used it last left any.

        Raises:
            DataError: the tokenizer is not a fast one, or has no EOS token.
        """
        if not tokenizer.is_fast or tokenizer.eos_token_id is None:
            raise DataError(f"{type(tokenizer).__name__}: a fast tokenizer with an EOS token is needed")
        self.config, self.tokenizer = config, tokenizer
        self.template = _chat_template(config, tokenizer)
        self.bos_id = _added_bos(tokenizer)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        # Longest first, or one token that ends another would hide it.
        self.ends = tuple(sorted({*special, tokenizer.eos_token} - {""}, key=lambda token: (-len(token), token)))
        self.newline_ids = self._ids(["\n"])[0]
        self.first_refusal = ""
        """What the chat template says against the first pair that it refuses."""

    def identity(self) -> dict[str, object]:
        """What of template and tokenizer decides on the ids, as JSON."""
        return {
            "template": self.template,
            "special": [self.bos_id, self.tokenizer.special_tokens_map],
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
        }

    def require_bounded_template(self) -> None:
        """Render two conversations in a process of its own, which may take 5 s and 1 GiB.

        transformers renders templates in Jinja's sandbox, which keeps them from files and code, but not from looping
        for ever or writing gigabytes; and a model from the hub brings its own.

        Raises:
            DataError: it takes longer, more memory, writes more than 1 MiB, or tries what the sandbox refuses.
        """
        problem = _unbounded(self.template, json.dumps(self.tokenizer.special_tokens_map))
        if problem:
            raise DataError(f"the chat template {problem}: mend data.chat_template, or the tokenizer's own")

    def end_of_turn(self) -> int:
        """The token that answers end with."""
        asked = [{"role": "user", "content": "Which one?"}]
        return self._answer(self._apply(asked, add_generation_prompt=True), asked, "This one.", Counter())[1]

    def prompts(self, prompts: Sequence[list[Message]]) -> list[list[int]]:
        """Ids of prompts as they stand before an answer, not cut.

        Raises:
            DataError: the chat template refuses one.
        """
        try:
            rendered = [self._apply(messages, add_generation_prompt=True) for messages in prompts]
        except TemplateError as error:
            raise DataError(f"the chat template refuses a prompt: {error!s:.300}") from error
        return [self._with_bos(ids) for ids in self._ids(rendered)]

    def answers(self, prompt: list[Message], texts: Sequence[str]) -> list[list[int]]:
        """Ids of answers to a prompt with the end of turn behind them, not cut.

        Raises:
            DataError: the chat template refuses one.
        """
        try:
            rendered = self._apply(prompt, add_generation_prompt=True)
            return self._answer_ids([self._answer(rendered, prompt, text, Counter()) for text in texts])
        except TemplateError as error:
            raise DataError(f"the chat template refuses an answer: {error!s:.300}") from error

    def batch(self, pairs: Sequence[tuple[str, TextPair]], counts: Counter[str]) -> pa.RecordBatch:
        """Tokenise pairs, and count what is dropped or cut.

        Args:
            pairs: (pair_id, texts).
            counts: goes up; keys as in `data.COUNTS`.

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
            # Of a cut answer, what the kept tokens spell; a character cut in two counts as the three bytes of U+FFFD.
            kept = text if len(cut[1]) == len(ids[1]) else self._text(cut[1])
            rows.append(dict(zip(SCHEMA.names, (pair_id, prompt, *cut, len(kept.encode())), strict=True)))
        return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)

    def _answer(self, prompt: str, messages: list[Message], content: str, counts: Counter[str]) -> tuple[str, int]:
        whole = self._apply([*messages, {"role": "assistant", "content": content}], add_generation_prompt=False)
        if not whole.startswith(prompt):
            counts["answers_without_template"] += 1
            return content, self.tokenizer.eos_token_id
        answer = whole[len(prompt) :]
        # Of what the template puts behind the answer (`<|im_end|>\n`, `</s>\n`) the first special token ends the turn:
        # it is the last one a generating model has to say.
        start, end = self._turn_end(answer)
        if end is None:
            return answer.rstrip(), self.tokenizer.eos_token_id
        return answer[:start], self.tokenizer.convert_tokens_to_ids(end)

    def _turn_end(self, answer: str) -> tuple[int, str | None]:
        """Where the special tokens begin that the answer ends with, and the first of them. In one pass from the end:
        an answer of nothing but such tokens would take a regular expression hours."""
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
        # The template writes BOS itself where the model wants one.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False) if texts else None
        return encoded["input_ids"] if encoded else []

    def _answer_ids(self, answers: Sequence[tuple[str, int]]) -> list[list[int]]:
        """An answer's ids as they follow a prompt.

        SentencePiece-like tokenizers put a space before a text that stands alone. So each answer is tokenised behind a
        newline, which is taken off again; where the two merge into one token, it is tokenised alone after all.
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
            # The first token of a sequence is never predicted, so without a prompt an answer would lose one.
            counts["dropped_empty_prompt"] += 1
            return None
        truncated = len(prompt_ids) > longest
        if truncated and self.config.long_prompts == "drop":
            counts["dropped_long_prompt"] += 1
            return None
        if truncated:
            # BOS stays: models that were trained with it are lost without.
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
    """What of its limits the template exceeds; "" if none."""
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
    """The BOS that the tokenizer puts before every text, if it does."""
    bos_id = tokenizer.bos_token_id
    return bos_id if bos_id is not None and tokenizer("x")["input_ids"][:1] == [bos_id] else None


def _chat_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja template of prompts and answers: the config's, else the tokenizer's own, else the ORPO authors'."""
    if config.chat_template is not None:
        return config.chat_template
    return str(tokenizer.get_chat_template()) if tokenizer.chat_template else ORPO_CHAT_TEMPLATE
