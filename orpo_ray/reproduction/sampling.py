"""Sample a finished model's answers to many prompts: batched, at a temperature, in several rounds.

Uses vLLM where it is installed and there is a GPU, else transformers. Shape suffixes: N prompts, P prompts of a batch,
R rounds.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from orpo_ray.config import DataConfig, ModelConfig
from orpo_ray.data.rows import DataError, Message
from orpo_ray.data.tokenizer import PairTokenizer
from orpo_ray.models.answers import Prompts
from orpo_ray.models.loading import build_model, load_tokenizer
from orpo_ray.models.pair_model import PairModel
from orpo_ray.models.precision import matmul_dtype
from orpo_ray.models.probe import probe_forward_mode

Backend = Literal["vllm", "transformers"]
_VLLM_PROMPTS = 512
"""Prompts per call. vLLM batches them itself; smaller calls report progress more often."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How answers are sampled: from the whole distribution, without top-k or top-p."""

    rounds: int = 3
    """Independent answers to each prompt; the paper's win rates have three."""
    temperature: float = 1.0
    """0 takes the likeliest token each time, so all rounds are the same."""
    max_new_tokens: int = 128
    """Longest answer in tokens; longer answers are cut."""
    seed: int = 0
    """Determines the samples, together with the batch index (transformers) or with round and prompt (vLLM)."""
    batch_tokens: int = 16_384
    """Most prompt and answer tokens in a batch, over all rounds, which are sampled together; memory grows with it. Only
    transformers uses it."""


@dataclass(frozen=True, slots=True)
class Answered:
    """Answers to some of the prompts, in every round."""

    indices: tuple[int, ...]
    """Indices of the P prompts."""
    answers_RP: tuple[tuple[str, ...], ...]
    """Texts without special tokens, stripped."""
    unfinished: int
    """Number of the R × P answers that were cut at `max_new_tokens`."""
    backend: Backend


@dataclass(frozen=True, slots=True)
class Sampled:
    """Answers to all prompts."""

    answers_RN: tuple[tuple[str, ...], ...]
    unfinished: int
    """Number of the R × N answers that were cut."""
    backend: Backend

    @classmethod
    def of(cls, parts: Sequence[Answered]) -> Sampled:
        """Join the parts that `answers` yields, in any order.

        Raises:
            ValueError: a prompt is missing or occurs twice, or backends differ.
        """
        rounds = range(len(parts[0].answers_RP))
        places = [(index, part, at) for part in parts for at, index in enumerate(part.indices)]
        places.sort(key=lambda place: place[0])
        backends = {part.backend for part in parts}
        if [index for index, _, _ in places] != list(range(len(places))) or len(backends) > 1:
            raise ValueError(f"{len(places)} prompts answered by {', '.join(backends)} are not one set, each once")
        answers_RN = tuple(tuple(part.answers_RP[number][at] for _, part, at in places) for number in rounds)
        return cls(answers_RN, sum(part.unfinished for part in parts), parts[0].backend)


def backend_here() -> Backend:
    """Backend that `answers` uses in this process."""
    return "vllm" if torch.cuda.is_available() and importlib.util.find_spec("vllm") else "transformers"


def answers(
    path: str,
    prompts: Sequence[list[Message]],
    settings: SamplingSettings,
    *,
    chat_template: str | None = None,
    backend: Backend | None = None,
) -> Iterator[Answered]:
    """Sample a model's answers, batch by batch.

    Args:
        path: folder or hub name of a causal language model, or a tiny preset.
        prompts: N conversations that end before the answer.
        settings: how answers are sampled.
        chat_template: Jinja; by default the tokenizer's own, which `orpo-ray export` wrote as training used it.
        backend: by default `backend_here`.

    Raises:
        ModelError: the model cannot be loaded.
        DataError: the chat template refuses a prompt, or a prompt leaves no room for an answer.
    """
    model = ModelConfig(path=path)
    # No prompt is cut here: the limits in `data` apply to training.
    roomy = DataConfig(path="unused", chat_template=chat_template, max_tokens=2**30, max_prompt_tokens=2**30 - 1)
    tokens = PairTokenizer(roomy, load_tokenizer(model))
    ids = [np.array(prompt, np.int32) for prompt in tokens.prompts(prompts)]
    chosen = backend or backend_here()

    def text(answer: list[int]) -> str:
        return str(tokens.tokenizer.decode(answer, skip_special_tokens=True)).strip()

    drawn = (
        _by_vllm(path, ids, settings, tokens) if chosen == "vllm" else _by_transformers(model, ids, settings, tokens)
    )
    for indices, found_RP, unfinished in drawn:
        answers_RP = tuple(tuple(map(text, row)) for row in found_RP)
        yield Answered(tuple(indices), answers_RP, unfinished, chosen)


_Drawn = tuple[list[int], list[list[list[int]]], int]
"""Prompt indices, token ids by round and prompt, and the number of unfinished answers."""


def _by_transformers(
    model: ModelConfig, prompts: list[np.ndarray], settings: SamplingSettings, tokens: PairTokenizer
) -> Iterator[_Drawn]:
    lm = build_model(model, seed=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = PairModel(lm, probe_forward_mode(lm, model.attention), matmul_dtype("auto")).to(device).frozen()
    longest = max(map(len, prompts))
    if longest >= pairs.max_positions:
        raise DataError(
            f"a prompt of {longest} tokens leaves no room for an answer: {model.path} has {pairs.max_positions} "
            "positions; leave long prompts out"
        )
    ends = pairs.ends | {tokens.end_of_turn()}
    for place, mine in enumerate(_batches([len(prompt) for prompt in prompts], settings)):
        room = pairs.max_positions - max(len(prompts[index]) for index in mine)
        asked = Prompts.padded(
            [prompts[index] for index in mine],
            pad_token_id=int(tokens.tokenizer.pad_token_id),
            eos_token_id=tokens.end_of_turn(),
            max_new_tokens=min(settings.max_new_tokens, room),
            in_step=False,
            temperature=settings.temperature,
            answers_each=settings.rounds,
        )
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(int(np.random.SeedSequence([settings.seed, place]).generate_state(1)[0]))
            rows = [_up_to(answer_T, ends) for answer_T in pairs(asked.to(torch.device(device))).tolist()]
        found = [rows[number :: settings.rounds] for number in range(settings.rounds)]
        yield mine, found, sum(ends.isdisjoint(answer) for answer in rows)


def _by_vllm(
    path: str, prompts: list[np.ndarray], settings: SamplingSettings, tokens: PairTokenizer
) -> Iterator[_Drawn]:
    from vllm import LLM, SamplingParams

    # Every round repeats the prompt, which prefix caching reads once.
    engine: Any = LLM(model=path, seed=settings.seed, enable_prefix_caching=True)
    for first in range(0, len(prompts), _VLLM_PROMPTS):
        mine = list(range(first, min(first + _VLLM_PROMPTS, len(prompts))))
        asked = [(number, index) for index in mine for number in range(settings.rounds)]
        # Each answer gets its own seed: vLLM seeds every request, and a common seed would sample equal answers.
        how = [
            SamplingParams(
                temperature=settings.temperature,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=[tokens.end_of_turn()],
                seed=int(np.random.SeedSequence([settings.seed, number, index]).generate_state(1)[0]),
            )
            for number, index in asked
        ]
        outputs = [
            o.outputs[0] for o in engine.generate([{"prompt_token_ids": prompts[i].tolist()} for _, i in asked], how)
        ]
        rows = [list(output.token_ids) for output in outputs]
        found = [rows[number :: settings.rounds] for number in range(settings.rounds)]
        yield mine, found, sum(output.finish_reason == "length" for output in outputs)


def _batches(lengths: Sequence[int], settings: SamplingSettings) -> list[list[int]]:
    """Batches of indices, longest prompts first: similar lengths pad little, and memory runs out early or never."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    cut: list[list[int]] = []
    while order:
        each = settings.rounds * (lengths[order[0]] + settings.max_new_tokens)
        size = max(1, math.floor(settings.batch_tokens / each))
        cut.append(order[:size])
        order = order[size:]
    return cut


def _up_to(answer: list[int], ends: set[int]) -> list[int]:
    """Cut the padding after the end-of-turn token, which belongs to the answer."""
    at = next((place for place, token in enumerate(answer) if token in ends), None)
    return answer if at is None else answer[: at + 1]
