"""The same token ids through TRL's ORPOTrainer and through ours: the preset `trl` of law 1 is TRL's objective."""

import copy
import functools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from orpo_ray.data.dataset import Pair
from orpo_ray.models.logps import PairLogps
from orpo_ray.training.loss import BatchCounts, LossTerms, orpo

pytest.importorskip("trl", reason="needs TRL to compare with: pip install -e '.[oracle]'")
pytest.importorskip("trl.experimental.orpo", reason="this TRL has no trl.experimental.orpo: pip install -e '.[oracle]'")
from datasets import Dataset
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tests.support import forwards

LAMBDAS = [0.1, 1.0]
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def pairs(real_pairs: list[Pair]) -> list[Pair]:
    return real_pairs


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module", params=LAMBDAS)
def trainer(
    request: pytest.FixtureRequest,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> ORPOTrainer:
    """A real one, which never trains: its batch is made by hand from our token ids."""
    args = ORPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        beta=request.param,
        max_length=256,
        bf16=False,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=False,
    )
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    return ORPOTrainer(copy.deepcopy(model), args, train_dataset=rows, processing_class=tokenizer)


def trl_batch(pairs: list[Pair], pad_token_id: int) -> dict[str, torch.Tensor]:
    """What TRL's collator makes of a tokenised pair."""
    batch = {}
    for side in ("chosen", "rejected"):
        rows = [(pair.prompt_ids.tolist(), getattr(pair, f"{side}_ids").tolist()) for pair in pairs]
        for name, pad, row_of in (
            ("input_ids", pad_token_id, lambda prompt, answer: prompt + answer),
            ("attention_mask", 0, lambda prompt, answer: [1] * len(prompt + answer)),
            ("labels", -100, lambda prompt, answer: [-100] * len(prompt) + answer),
        ):
            tensors = [torch.tensor(row_of(prompt, answer)) for prompt, answer in rows]
            padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad)
            batch[f"{side}_{name}"] = padded
    return batch


def ours(model: torch.nn.Module, pairs: list[Pair], pad_token_id: int, lam: float) -> tuple[PairLogps, LossTerms]:
    logps = forwards.logps(model, pairs, form=forwards.FAST, pad_token_id=pad_token_id)
    counts = BatchCounts(len(pairs), int(logps.nll_tokens_P.sum()))
    return logps, orpo(logps, counts, orpo_lambda=lam, nll_reduction="token")


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_pairs_are_of_different_lengths(pairs: list[Pair]) -> None:
    assert len({len(pair.prompt_ids) + len(pair.chosen_ids) for pair in pairs}) > 3
    assert len({len(pair.prompt_ids) + len(pair.rejected_ids) for pair in pairs}) > 3


def test_log_probabilities_and_nll(trainer: ORPOTrainer, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> None:
    with torch.no_grad():
        chosen, rejected, _, _, nll = trainer.concatenated_forward(
            trainer.model, trl_batch(pairs, tokenizer.pad_token_id)
        )
        logps, terms = ours(trainer.model, pairs, tokenizer.pad_token_id, trainer.beta)
    assert_close(logps.chosen_logps_P, chosen)
    assert_close(logps.rejected_logps_P, rejected)
    assert_close(terms.nll, nll)


def test_odds_ratio(trainer: ORPOTrainer, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> None:
    with torch.no_grad():
        logps, terms = ours(trainer.model, pairs, tokenizer.pad_token_id, trainer.beta)
        weighted, _, _, mean_log_sigmoid, mean_log_odds = trainer.odds_ratio_loss(
            logps.chosen_logps_P, logps.rejected_logps_P
        )
    assert_close(trainer.beta * terms.odds_ratio_loss_P, -weighted)  # TRL's is the negative
    assert_close(terms.odds_ratio_loss_P.mean(), -mean_log_sigmoid)
    assert_close(terms.log_odds_P.mean(), mean_log_odds)
    assert terms.log_odds_P.abs().min() > 1e-4  # equal answers would compare nothing


def test_loss_and_gradient(trainer: ORPOTrainer, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> None:
    model = trainer.model
    model.zero_grad()
    trl_loss, metrics = trainer.get_batch_loss_metrics(model, trl_batch(pairs, tokenizer.pad_token_id))
    trl_loss.backward()
    trl_gradient = flat_gradient(model)

    model.zero_grad()
    logps, terms = ours(model, pairs, tokenizer.pad_token_id, trainer.beta)
    terms.loss.backward()
    gradient = flat_gradient(model)

    assert_close(terms.loss.detach(), trl_loss.detach())
    assert_close(gradient.norm(), trl_gradient.norm())
    assert (gradient - trl_gradient).norm() < 1e-5 * trl_gradient.norm()
    assert metrics["nll_loss"] == pytest.approx(terms.nll.item(), rel=1e-5)
    assert metrics["log_odds_chosen"] == pytest.approx(terms.log_odds_P.mean().item(), rel=1e-5, abs=1e-6)
    assert metrics["log_odds_ratio"] == pytest.approx(-terms.odds_ratio_loss_P.mean().item(), rel=1e-5)
    accuracy = (logps.chosen_logps_P > logps.rejected_logps_P).float().mean().item()
    assert metrics["rewards/accuracies"] == pytest.approx(accuracy)
    assert metrics["rewards/chosen"] == pytest.approx(trainer.beta * logps.chosen_logps_P.mean().item(), rel=1e-5)


def test_accumulation_moves_trls_gradient_and_not_ours(
    trainer: ORPOTrainer, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Law 2: TRL averages the micro-batches' token means, so its objective depends on how a batch is cut."""
    model = trainer.model
    pad, lam = tokenizer.pad_token_id, trainer.beta
    tokens = sum(len(pair.prompt_ids) - 1 + len(pair.chosen_ids) for pair in pairs)
    counts = BatchCounts(8, tokens)

    def gradients(micro_batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        pieces = [pairs[start : start + micro_batch_size] for start in range(0, 8, micro_batch_size)]
        model.zero_grad()
        for piece in pieces:
            (trainer.get_batch_loss_metrics(model, trl_batch(piece, pad))[0] / len(pieces)).backward()
        trl_gradient = flat_gradient(model).clone()
        model.zero_grad()
        for piece in pieces:
            logps = forwards.logps(model, piece, pad_token_id=pad)
            orpo(logps, counts, orpo_lambda=lam, nll_reduction="token").loss.backward()
        return trl_gradient, flat_gradient(model).clone()

    trl_whole, our_whole = gradients(8)
    trl_cut, our_cut = gradients(1)
    assert (our_cut - our_whole).norm() < 1e-5 * our_whole.norm()
    assert (trl_cut - trl_whole).norm() > 1e-2 * trl_whole.norm()
