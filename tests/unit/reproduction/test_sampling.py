"""Sampling from a finished model."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ray.config import ModelConfig
from orpo_ray.data.rows import DataError
from orpo_ray.data.tokenizer import ORPO_CHAT_TEMPLATE
from orpo_ray.models.loading import build_model, load_tokenizer
from orpo_ray.reproduction.sampling import Answered, Sampled, SamplingSettings, answers

PROMPTS = [[{"role": "user", "content": text}] for text in ("Which?", "Why is the sky blue today, of all days?", "Hm.")]


def sample(*arguments: Any, **options: Any) -> Sampled:
    return Sampled.of(list(answers(*arguments, **options)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with a strong opinion on a few tokens, so that likely and sampled answers differ."""
    where = tmp_path_factory.mktemp("model")
    config = ModelConfig(path="tiny-llama-1m")
    model = build_model(config, seed=0)
    with torch.no_grad():
        model.model.norm.weight.mul_(8.0)
    model.save_pretrained(where)
    tokenizer = load_tokenizer(config)
    tokenizer.chat_template = ORPO_CHAT_TEMPLATE
    tokenizer.save_pretrained(where)
    return str(where)


def _ids(tokenizer: Any, prompt: list[dict[str, str]]) -> torch.Tensor:
    """int64 [1, T], as transformers alone would make them."""
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return inputs["input_ids"]


def test_the_likeliest_answer_is_transformers_own(folder: str) -> None:
    """Left padding and batches change nothing."""
    found = sample(folder, PROMPTS, SamplingSettings(rounds=1, temperature=0.0, max_new_tokens=10))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    for prompt, answer in zip(PROMPTS, found.answers_RN[0], strict=True):
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = model.generate(input_ids=inputs["input_ids"], do_sample=False, max_new_tokens=10)
        text = tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == text.strip()
    assert found.backend == "transformers"


def test_rounds_differ_and_the_same_seed_draws_the_same(folder: str) -> None:
    settings = SamplingSettings(rounds=3, max_new_tokens=12, batch_tokens=64)
    torch.manual_seed(5)
    first, before = sample(folder, PROMPTS, settings), torch.get_rng_state()
    second = sample(folder, PROMPTS, settings)
    assert first == second
    assert torch.equal(before, torch.get_rng_state())  # the caller's random state is left alone
    assert len(set(first.answers_RN)) == 3
    assert [len(row) for row in first.answers_RN] == [3, 3, 3]
    other = sample(folder, PROMPTS, SamplingSettings(rounds=3, max_new_tokens=12, batch_tokens=64, seed=1))
    assert other.answers_RN != first.answers_RN


def test_answers_are_drawn_at_the_temperature(folder: str) -> None:
    """The first token's frequencies against the model's own distribution."""
    temperature = 0.7
    settings = SamplingSettings(rounds=1, temperature=temperature, max_new_tokens=1)
    many = [PROMPTS[0]] * 4000
    answers = sample(folder, many, settings).answers_RN[0]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(PROMPTS[0], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        probabilities_V = (model(ids["input_ids"]).logits[0, -1] / temperature).softmax(-1)
    top = int(probabilities_V.argmax())
    expected = float(probabilities_V[top])
    text = tokenizer.decode([top], skip_special_tokens=True).strip()
    same_text = [
        v for v in range(len(probabilities_V)) if tokenizer.decode([v], skip_special_tokens=True).strip() == text
    ]
    expected = float(probabilities_V[same_text].sum())
    assert 0.02 < expected < 0.98
    error = 4 * np.sqrt(expected * (1 - expected) / len(many))
    assert answers.count(text) / len(many) == pytest.approx(expected, abs=error)


def test_unfinished_answers_are_counted(folder: str) -> None:
    found = sample(folder, PROMPTS, SamplingSettings(rounds=2, max_new_tokens=1))
    assert found.unfinished <= 6
    assert found.unfinished >= 4  # the end of turn is one token of 1,024


def test_a_prompt_that_fills_all_positions_is_refused(folder: str) -> None:
    with pytest.raises(DataError, match=r"a prompt of \d+ tokens leaves no room for an answer"):
        sample(folder, [[{"role": "user", "content": "word " * 4000}]], SamplingSettings(rounds=1))


def test_a_long_prompt_shortens_its_own_answer_only(folder: str) -> None:
    """Room is that of a batch; an answer that its room cut is counted as one without an end."""
    positions = ModelConfig(path="tiny-llama-1m")
    limit = build_model(positions, seed=0).config.max_position_embeddings
    tokenizer = load_tokenizer(positions)
    long = "word " * limit
    ids = tokenizer(long)["input_ids"][: limit - 30]
    prompts = [[{"role": "user", "content": tokenizer.decode(ids)}], PROMPTS[0]]
    found = sample(folder, prompts, SamplingSettings(rounds=1, max_new_tokens=150, batch_tokens=64))
    cut, whole = (len(tokenizer(answer)["input_ids"]) for answer in found.answers_RN[0])
    assert 2 * cut < whole
    assert found.unfinished == 2


def test_each_prompt_has_noise_of_its_own_in_vllm(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM is asked for; it is not installed here."""
    asked: list[Any] = []

    class Engine:
        def __init__(self, **_: Any) -> None: ...

        def generate(self, prompts: list[Any], how: list[Any]) -> list[Any]:
            asked.extend(how)
            ended = [("stop", [5, 6]), ("length", [7] * 9)] * len(PROMPTS)  # to each prompt, in two rounds
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=t, finish_reason=r)]) for r, t in ended]

    stub = SimpleNamespace(LLM=Engine, SamplingParams=lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setitem(sys.modules, "vllm", stub)
    found = sample(folder, PROMPTS, SamplingSettings(rounds=2, max_new_tokens=9), backend="vllm")
    assert len({each.seed for each in asked}) == 6
    assert found.unfinished == 3
    assert [len(row) for row in found.answers_RN] == [3, 3]
    assert [len(set(row)) for row in found.answers_RN] == [1, 1]
    assert found.answers_RN[0] != found.answers_RN[1]


def test_parts_of_answers_are_put_together_whole_only() -> None:
    first = Answered((2, 0), (("c", "a"), ("C", "A")), 1, "transformers")
    second = Answered((1,), (("b",), ("B",)), 2, "transformers")
    assert Sampled.of([first, second]) == Sampled((("a", "b", "c"), ("A", "B", "C")), 3, "transformers")
    for parts in ([first], [first, second, second], [first, replace(second, backend="vllm")]):
        with pytest.raises(ValueError, match="are not one set, each once"):
            Sampled.of(parts)
