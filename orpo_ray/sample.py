"""Answers of a finished model to many prompts: batched, sampled at a temperature, in several rounds.

With vLLM where that is installed and there is a GPU, else with transformers. Shape suffixes: N prompts, R rounds.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import Progress

from orpo_ray.config import DataConfig, ModelConfig
from orpo_ray.forward import PairModel, Prompts, form_of, product_type
from orpo_ray.model import build_model, load_tokenizer
from orpo_ray.rows import DataError, Message
from orpo_ray.tokens import PairTokenizer

Backend = Literal["vllm", "transformers"]


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How answers are drawn: from the whole distribution, no top-k and no top-p."""

    rounds: int = 3
    """Independent answers to each prompt; the paper's win rates have three."""
    temperature: float = 1.0
    """0 takes the likeliest token each time, so all rounds are the same."""
    max_new_tokens: int = 128
    """Longest answer; a longer one is cut."""
    seed: int = 0
    """With the round and the place of a batch it decides what is drawn."""
    batch_tokens: int = 16_384
    """Prompt and answer tokens of a batch at most; memory grows with it. Only transformers reads it."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a model answered."""

    answers_RN: tuple[tuple[str, ...], ...]
    """Texts without special tokens, stripped."""
    unfinished: int
    """Answers cut at `max_new_tokens`, of R × N."""
    backend: Backend


def backend_here() -> Backend:
    """What `sample` uses in this process."""
    return "vllm" if torch.cuda.is_available() and importlib.util.find_spec("vllm") else "transformers"


def sample(
    path: str,
    prompts: Sequence[list[Message]],
    settings: SamplingSettings,
    *,
    chat_template: str | None = None,
    backend: Backend | None = None,
) -> Sampled:
    """Let the model in a folder answer.

    Args:
        path: folder or hub name of a causal language model, or a tiny preset.
        prompts: N conversations that end before the answer.
        settings: how answers are drawn.
        chat_template: Jinja; by default the tokenizer's own, which `orpo-ray export` wrote as training used it.
        backend: by default `backend_here`.

    Raises:
        ModelError: no such model.
        DataError: the chat template refuses a prompt, or a prompt leaves no room for an answer.
    """
    model = ModelConfig(path=path)
    # Nothing is cut here: the limits of `data` are those of training.
    roomy = DataConfig(path="unused", chat_template=chat_template, max_tokens=2**30, max_prompt_tokens=2**30 - 1)
    tokens = PairTokenizer(roomy, load_tokenizer(model))
    ids = [np.array(prompt, np.int32) for prompt in tokens.prompts(prompts)]
    chosen = backend or backend_here()
    if chosen == "vllm":
        found, cut = _by_vllm(path, ids, settings, tokens)
    else:
        found, cut = _by_transformers(model, ids, settings, tokens)

    def text(answer: list[int]) -> str:
        return str(tokens.tokenizer.decode(answer, skip_special_tokens=True)).strip()

    return Sampled(tuple(tuple(map(text, row)) for row in found), cut, chosen)


def _by_transformers(
    model: ModelConfig, prompts: list[np.ndarray], settings: SamplingSettings, tokens: PairTokenizer
) -> tuple[list[list[list[int]]], int]:
    """Token ids by round and prompt, and how many answers have no end."""
    lm = build_model(model, seed=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = PairModel(lm, form_of(lm, model.attention), product_type("auto")).to(device).eval()
    longest = max(map(len, prompts))
    if longest >= pairs.max_positions:
        raise DataError(
            f"a prompt of {longest} tokens leaves no room for an answer: {model.path} has {pairs.max_positions} "
            "positions; leave long prompts out"
        )
    found: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(settings.rounds)]
    batches = _batches([len(prompt) for prompt in prompts], settings)
    ends = pairs.ends | {tokens.end_of_turn()}
    with Progress(transient=True) as progress, torch.no_grad(), torch.random.fork_rng():
        bar = progress.add_task("answering", total=settings.rounds * len(batches))
        for number in range(settings.rounds):
            for place, mine in enumerate(batches):
                room = pairs.max_positions - max(len(prompts[index]) for index in mine)
                asked = Prompts.padded(
                    [prompts[index] for index in mine],
                    pad_token_id=int(tokens.tokenizer.pad_token_id),
                    eos_token_id=tokens.end_of_turn(),
                    max_new_tokens=min(settings.max_new_tokens, room),
                    in_step=False,
                    temperature=settings.temperature,
                )
                torch.manual_seed(int(np.random.SeedSequence([settings.seed, number, place]).generate_state(1)[0]))
                for index, answer_T in zip(mine, pairs(asked.to(torch.device(device))).tolist(), strict=True):
                    found[number][index] = _up_to(answer_T, ends)
                progress.advance(bar)
    return found, sum(ends.isdisjoint(answer) for row in found for answer in row)


def _by_vllm(
    path: str, prompts: list[np.ndarray], settings: SamplingSettings, tokens: PairTokenizer
) -> tuple[list[list[list[int]]], int]:
    """As `_by_transformers`."""
    from vllm import LLM, SamplingParams

    engine: Any = LLM(model=path, seed=settings.seed)
    found, cut = [], 0
    for number in range(settings.rounds):
        # A seed of its own for each prompt: vLLM seeds each request, and one for all would draw all answers alike.
        how = [
            SamplingParams(
                temperature=settings.temperature,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=[tokens.end_of_turn()],
                seed=int(np.random.SeedSequence([settings.seed, number, index]).generate_state(1)[0]),
            )
            for index in range(len(prompts))
        ]
        outputs = engine.generate([{"prompt_token_ids": prompt.tolist()} for prompt in prompts], how)
        found.append([list(output.outputs[0].token_ids) for output in outputs])
        cut += sum(output.outputs[0].finish_reason == "length" for output in outputs)
    return found, cut


def _batches(lengths: Sequence[int], settings: SamplingSettings) -> list[list[int]]:
    """Indices, longest prompts first: neighbours by length are padded little, and too much memory is met at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    cut: list[list[int]] = []
    while order:
        size = max(1, math.floor(settings.batch_tokens / (lengths[order[0]] + settings.max_new_tokens)))
        cut.append(order[:size])
        order = order[size:]
    return cut


def _up_to(answer: list[int], ends: set[int]) -> list[int]:
    """Without the padding behind the end of turn; the end belongs to the answer."""
    at = next((place for place, token in enumerate(answer) if token in ends), None)
    return answer if at is None else answer[: at + 1]
