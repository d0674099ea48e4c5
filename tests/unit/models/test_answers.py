"""Generated answers: several to one prompt."""

import copy
import dataclasses

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
)

from orpo_ray.data.dataset import Pair
from orpo_ray.models.answers import Prompts
from orpo_ray.models.pair_model import PairModel
from orpo_ray.models.probe import probe_forward_mode
from tests.support.architectures import (
    LENGTHS,
    PADDING,
    SHARING,
    build,
)
from tests.support.forwards import FAST


@pytest.mark.parametrize("architecture", [*SHARING, *PADDING])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_several_answers_are_those_of_rows_on_their_own(
    architecture: str, temperature: float, pairs: list[Pair]
) -> None:
    """The same tokens, likeliest or drawn, as when each prompt is read once for each of its answers."""
    model = build(SHARING[architecture] if architecture in SHARING else PADDING[architecture][0])
    pair_model = PairModel(model, probe_forward_mode(model, "shared_prompt"))
    ids = [pair.prompt_ids for pair in pairs]
    ask = {"pad_token_id": 0, "eos_token_id": 2, "max_new_tokens": 8, "in_step": False, "temperature": temperature}

    def answers(prompts: Prompts) -> torch.Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return pair_model(prompts)

    for some in (ids, ids[1:2]):  # the second: one prompt of one token
        expected = answers(Prompts.padded([each for each in some for _ in range(3)], **ask))
        assert torch.equal(answers(Prompts.padded(some, **ask, answers_each=3)), expected)


def test_a_prompt_is_read_once_for_all_of_its_answers(llama: LlamaForCausalLM, pairs: list[Pair]) -> None:
    model, seen = copy.deepcopy(llama), []
    model.model.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["input_ids"].shape), with_kwargs=True)
    prompts = Prompts.padded([pair.prompt_ids for pair in pairs], 0, eos_token_id=2, max_new_tokens=3, in_step=False)
    with torch.no_grad():
        PairModel(model, FAST)(dataclasses.replace(prompts, answers_each=4))
    longest = max(prompt for prompt, _, _ in LENGTHS)
    assert seen == [(6, longest - 1), (24, 1), (24, 1), (24, 1)]
