"""Reward models: what they read of a row, their loss, and scoring."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)

from orpo_ray.config import ConfigError, LoraConfig, LossConfig, ModelConfig, parse
from orpo_ray.data.dataset import Pair
from orpo_ray.models import precision
from orpo_ray.models.loading import ModelError, build_model, build_reward_model, load_tokenizer, with_lora
from orpo_ray.models.logps import PairLogps, ReferenceLogps
from orpo_ray.models.packing import LossMask
from orpo_ray.models.pair_model import PairModel
from orpo_ray.models.probe import probe_forward_mode
from orpo_ray.models.reward_model import RewardModel
from orpo_ray.training.loss import BatchCounts, bradley_terry, from_config, rloo
from tests.support.forwards import CHUNKED, FAST, gradient, logps
from tests.support.ranks import BASE

REWARDS = LossMask("prompt_and_response", rewards=True)
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 96, "num_labels": 1}
SMALL: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, pad_token_id=0),
    "qwen2": Qwen2Config(**SIZES, intermediate_size=64, num_key_value_heads=2, pad_token_id=0),
    "opt-350m's form": OPTConfig(
        **SIZES, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False, pad_token_id=0, dropout=0.0
    ),
    "gpt2": GPT2Config(
        n_layer=2, n_head=4, n_embd=32, vocab_size=96, num_labels=1, pad_token_id=0, attn_pdrop=0, embd_pdrop=0
    ),
}


def _pairs() -> list[Pair]:
    rng = np.random.default_rng(3)

    def ids(size: int) -> np.ndarray:
        return rng.integers(1, 96, size, dtype=np.int32)

    return [Pair(str(i), ids(p), ids(c), ids(r), 1) for i, (p, c, r) in enumerate([(7, 3, 5), (4, 6, 1), (9, 1, 4)])]


def _model(name: str) -> Any:
    torch.manual_seed(0)
    # A copy, for the attention function is a setting of the config.
    return AutoModelForSequenceClassification.from_config(copy.deepcopy(SMALL[name])).eval()


@pytest.mark.parametrize("name", SMALL)
def test_a_reward_is_what_transformers_says_of_the_whole_sequence(name: str) -> None:
    """Against one plain forward pass per sequence, without padding."""
    model, pairs = _model(name), _pairs()
    expected = [
        [
            model(torch.tensor(np.concatenate([pair.prompt_ids, answer]))[None].long()).logits[0, 0].item()
            for answer in (pair.chosen_ids, pair.rejected_ids)
        ]
        for pair in pairs
    ]
    for form in (CHUNKED, FAST):
        found = logps(model, pairs, REWARDS, form)
        assert found.chosen_logps_P.tolist() == pytest.approx([chosen for chosen, _ in expected], abs=1e-5)
        assert found.rejected_logps_P.tolist() == pytest.approx([rejected for _, rejected in expected], abs=1e-5)
        assert found.nll_tokens_P.tolist() == [0, 0, 0]
    assert probe_forward_mode(model, "shared_prompt") == FAST


@pytest.mark.parametrize("has_units", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_rewards_are_not_rounded_to_bf16(name: str, has_units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 has steps of 1/64 between 2 and 4, and answers that differ by less would be equal."""
    monkeypatch.setattr(precision, "has_bf16_units", lambda: has_units)
    for freeze, adapted in ((False, False), (True, False), (False, True)):
        lm = _model(name)
        lm = with_lora(lm, LoraConfig(rank=4), "SEQ_CLS") if adapted else lm
        model = PairModel(lm, FAST, torch.bfloat16)
        model = model.frozen() if freeze else model
        rewards = model(model.collate(_pairs(), REWARDS, 0))[:6]
        exact = PairModel(_model(name), FAST)(model.collate(_pairs(), REWARDS, 0))[:6]
        torch.testing.assert_close(rewards, exact, rtol=0.05, atol=0.005)
        assert not torch.equal(rewards, exact)
        assert not torch.equal(rewards, rewards.bfloat16().float())


def test_both_forms_have_the_same_gradient() -> None:
    gradients = []
    for form in (CHUNKED, FAST):
        model = _model("llama")
        bradley_terry(logps(model, _pairs(), REWARDS, form), BatchCounts(3, 0), nll_reduction="token").loss.backward()
        gradients.append(gradient(model))
    assert float(gradients[0].norm()) > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def _scored(chosen: list[float], rejected: list[float], **more: Any) -> PairLogps:
    ones = torch.ones(len(chosen))
    return PairLogps(torch.tensor(chosen), torch.tensor(rejected), 0 * ones, 0 * ones, ones, ones, **more)


def test_bradley_terry_is_the_papers_equation_11() -> None:
    terms = bradley_terry(_scored([2.0, -1.0], [1.0, 1.0]), BatchCounts(2, 0), nll_reduction="token")
    expected = -(np.log(1 / (1 + np.exp(-1.0))) + np.log(1 / (1 + np.exp(2.0)))) / 2
    assert float(terms.loss) == pytest.approx(expected, rel=1e-6)
    assert terms.log_odds_P.tolist() == [1.0, -2.0]
    assert float(terms.nll) == 0.0


def test_rloo_has_the_gradient_of_its_definition() -> None:
    """For k answers: mean over i of (R_i - mean of the others' R) · ∇ log p(y_i), with R less the KL penalty."""
    logps_P2 = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    tokens_P2 = torch.tensor([[4.0, 2.0], [3.0, 5.0]])
    reference_P2, rewards_P2 = torch.tensor([[-1.5, -1.0], [-0.6, -2.0]]), torch.tensor([[1.0, 0.2], [-0.3, 0.9]])
    sampled = PairLogps(
        chosen_logps_P=logps_P2[:, 0],
        rejected_logps_P=logps_P2[:, 1],
        nll_sums_P=torch.zeros(2),
        nll_tokens_P=torch.zeros(2),
        chosen_tokens_P=tokens_P2[:, 0],
        rejected_tokens_P=tokens_P2[:, 1],
        reference=ReferenceLogps(*reference_P2.unbind(1)),
        rewards_P2=rewards_P2,
    )
    config = LossConfig(name="rloo", beta=0.1, reward_model="somewhere/rm")
    from_config(config)(sampled, BatchCounts(2, 0)).loss.backward()
    returns_P2 = rewards_P2 - 0.1 * (logps_P2.detach() - reference_P2) * tokens_P2
    # d(log p of the whole answer) / d(its mean) is its number of tokens; two answers, two pairs.
    expected_P2 = -(returns_P2 - returns_P2.flip(1)) / 2 * tokens_P2 / 2
    assert logps_P2.grad is not None
    torch.testing.assert_close(logps_P2.grad, expected_P2)


def test_rloo_needs_what_it_compares_with() -> None:
    settings: dict[str, Any] = {"reward_model": "rm", "max_new_tokens": 8}
    with pytest.raises(ValueError, match="reference and the rewards"):
        rloo(_scored([-1.0], [-2.0]), BatchCounts(1, 0), beta=0.1, nll_reduction="token", **settings)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    config = ModelConfig(path="tiny-llama-1m")
    build_model(config, seed=0).save_pretrained(tmp_path)
    load_tokenizer(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM with 2 labels, but a reward model is .* with one; train"):
        RewardModel.load(str(tmp_path))
    with pytest.raises(ModelError, match="no reward model could be read"):
        RewardModel.load(str(tmp_path / "nowhere"))


def test_scores_do_not_depend_on_their_company(tmp_path: Path) -> None:
    config = ModelConfig(path="tiny-llama-1m")
    build_reward_model(config, seed=0).save_pretrained(tmp_path)
    load_tokenizer(config).save_pretrained(tmp_path)
    judge = RewardModel.load(str(tmp_path), max_tokens=64, precision="fp32")
    prompts = [[{"role": "user", "content": text}] for text in ("Which?", "Why is the sky blue today, of all days?")]
    answers = [["This.", "That one over there.", ""], ["I do not know.", "Because.", "It is not " * 60]]
    together = judge.score(prompts, answers)
    assert together.shape == (2, 3)
    assert np.isfinite(together).all()
    alone = [
        [judge.score([prompt], [[answer]])[0, 0] for answer in row]
        for prompt, row in zip(prompts, answers, strict=True)
    ]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.unique(together.round(4)).size == 6
    with pytest.raises(ValueError, match="2 prompts need as many lists of answers"):
        judge.score(prompts, [["a"], ["b", "c"]])


def test_what_a_reward_model_does_not_measure_cannot_rank_it() -> None:
    tree = json.loads(json.dumps(BASE))
    assert parse(tree | {"loss": {"name": "reward"}, "sweep": {"metric": "eval/loss"}}).loss.is_reward
    with pytest.raises(ConfigError, match=r"metric is eval/nll, which loss\.name reward does not measure; use one"):
        parse(tree | {"loss": {"name": "reward"}, "sweep": {"metric": "eval/nll"}})
    axis = {"loss.name": {"type": "grid", "values": ["sft", "reward"]}}
    with pytest.raises(ConfigError, match="give reward an experiment of its own"):
        parse(tree | {"sweep": {"space": axis}})
    with pytest.raises(ConfigError, match=r"rloo needs loss\.reward_model"):
        parse(tree | {"loss": {"name": "rloo"}})
    loss = {"name": "rloo", "reward_model": "some/rm"}
    with pytest.raises(ConfigError, match=r"keep_best is eval/loss, which loss\.name rloo does not measure"):
        parse(tree | {"loss": loss, "checkpoint": {"keep_best": "eval/loss"}})
