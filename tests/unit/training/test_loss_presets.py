"""Presets and losses against other code bases on the same token ids: the installed TRL, and published definitions."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from orpo_ray.config import LossConfig
from orpo_ray.data.dataset import Pair
from orpo_ray.models.logps import PairLogps, ReferenceLogps
from orpo_ray.training.loss import BatchCounts, LossTerms, from_config

LAMBDAS = [0.1, 1.0]
IGNORED = -100


@pytest.fixture(scope="module")
def pairs(real_pairs: list[Pair]) -> list[Pair]:
    return real_pairs[:6]


def tiny_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    return tiny_model(tokenizer, seed=0)


@pytest.fixture(scope="module")
def reference_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    return tiny_model(tokenizer, seed=1)


# ---- ours: the log-probabilities spelled out, then the loss under test ----------------------------------------------


def naive_pair_logps(model: torch.nn.Module, pairs: Sequence[Pair], config: LossConfig, eos: int) -> PairLogps:
    """What `PairLogps` means, one unpadded sequence at a time, in the model's precision and with its gradient."""
    columns: dict[str, list[Any]] = {
        name: [] for name in PairLogps.__slots__ if name not in ("reference", "rewards_P2")
    }
    for pair in pairs:
        prompt = pair.prompt_ids.tolist()
        for side in ("chosen", "rejected"):
            answer = getattr(pair, f"{side}_ids").tolist()
            targets = [*answer, eos] if config.answer_padding else answer
            ids = [*prompt, *targets]
            logps_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            logps = [logps_TV[at - 1, token] for at, token in enumerate(ids) if at > 0]
            columns[f"{side}_logps_P"].append(torch.stack(logps[len(prompt) - 1 :]).mean())
            columns[f"{side}_tokens_P"].append(len(targets))
            if side == "chosen":
                start = len(prompt) if config.nll_scope == "response" else 1
                places = [at for at in range(start, len(prompt) + len(answer)) if config.nll_eos or ids[at] != eos]
                columns["nll_sums_P"].append(-torch.stack([logps[at - 1] for at in places]).sum())
                columns["nll_tokens_P"].append(len(places))
    stacked = {
        name: torch.tensor(values) if name.endswith("tokens_P") else torch.stack(values)
        for name, values in columns.items()
    }
    return PairLogps(**stacked)


def ours(
    model: torch.nn.Module,
    pairs: Sequence[Pair],
    config: LossConfig,
    eos: int,
    reference_model: torch.nn.Module | None = None,
) -> LossTerms:
    logps = naive_pair_logps(model, pairs, config, eos)
    if reference_model is not None:
        with torch.no_grad():
            theirs = naive_pair_logps(reference_model, pairs, config, eos)
        reference = ReferenceLogps(theirs.chosen_logps_P, theirs.rejected_logps_P)
        logps = replace(logps, reference=reference)
    return from_config(config)(logps, BatchCounts(len(pairs), int(logps.nll_tokens_P.sum())))


def flat_gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


# ---- the published definitions of LLaMA-Factory and the ORPO authors, over full padded logits -----------------------


def padded(rows: Sequence[Sequence[int]], filler: int, width: int | None = None) -> torch.Tensor:
    """[rows, width], filled up on the right."""
    batch = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)
    return batch if width is None else F.pad(batch, (0, width - batch.shape[1]), value=filler)


def llamafactory_loss(model: torch.nn.Module, pairs: Sequence[Pair], lam: float, pad: int) -> torch.Tensor:
    """`pref_loss: orpo`: labels on the response only, per sequence sum / length, -log P_w + β · L_OR, mean over pairs.

    Their padding is any id: it is not a label and comes last.
    """
    means = []
    for side in ("chosen", "rejected"):
        rows = [(pair.prompt_ids.tolist(), getattr(pair, f"{side}_ids").tolist()) for pair in pairs]
        ids_PT = padded([prompt + answer for prompt, answer in rows], pad)
        present_PT = padded([[1] * len(prompt + answer) for prompt, answer in rows], 0)
        labels_PT = padded([[IGNORED] * len(prompt) + answer for prompt, answer in rows], IGNORED)[:, 1:]
        logits_PTV = model(input_ids=ids_PT, attention_mask=present_PT).logits[:, :-1]
        counted_PT = labels_PT != IGNORED
        logps_PT = torch.gather(logits_PTV.log_softmax(-1), 2, (labels_PT * counted_PT)[..., None])[..., 0]
        means.append((logps_PT * counted_PT).sum(1) / counted_PT.sum(1))
    chosen_P, rejected_P = means
    log_odds_P = chosen_P - rejected_P - (torch.log1p(-chosen_P.exp()) - torch.log1p(-rejected_P.exp()))
    return (-chosen_P - lam * F.logsigmoid(log_odds_P)).mean()


def authors_loss(model: torch.nn.Module, pairs: Sequence[Pair], lam: float, eos: int) -> torch.Tensor:
    """xfactlab/orpo since 3dcdd60, without its rounding to bf16: everything is padded with EOS to one width.

    NLL: cross-entropy of prompt and response, mean over the micro-batch's labels; labels that equal the padding, which
    is EOS, are ignored. Log-probabilities: targets where (answer present one place earlier) - (prompt present), which
    is every response token and the padding token behind it.
    """
    prompts = [pair.prompt_ids.tolist() for pair in pairs]
    answers = {side: [getattr(pair, f"{side}_ids").tolist() for pair in pairs] for side in ("chosen", "rejected")}
    width = 8 + max(len(p) + len(a) for side in answers.values() for p, a in zip(prompts, side, strict=True))
    in_prompt_PT = padded([[1] * len(prompt) for prompt in prompts], 0, width)
    means, nll = {}, torch.tensor(torch.nan)
    for side, texts in answers.items():
        ids_PT = padded([p + a for p, a in zip(prompts, texts, strict=True)], eos, width)
        present_PT = padded([[1] * len(p + a) for p, a in zip(prompts, texts, strict=True)], 0, width)
        logits_PTV = model(input_ids=ids_PT, attention_mask=present_PT).logits[:, :-1]
        targets_PT = ids_PT[:, 1:]
        counted_PT = present_PT[:, :-1] - in_prompt_PT[:, 1:]
        logps_PT = torch.gather(logits_PTV.log_softmax(-1), 2, targets_PT[..., None])[..., 0]
        means[side] = (logps_PT * counted_PT).sum(1) / counted_PT.sum(1)
        if side == "chosen":
            labels_PT = targets_PT.masked_fill(targets_PT == eos, IGNORED)
            nll = F.cross_entropy(logits_PTV.flatten(0, 1), labels_PT.flatten(), ignore_index=IGNORED)
    chosen_P, rejected_P = means["chosen"], means["rejected"]
    log_odds_P = chosen_P - rejected_P - (torch.log1p(-chosen_P.exp()) - torch.log1p(-rejected_P.exp()))
    return (nll - lam * torch.log(torch.sigmoid(log_odds_P))).mean()


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize(("preset", "definition"), [("llamafactory", llamafactory_loss), ("authors", authors_loss)])
def test_preset_is_the_published_definition(
    model: LlamaForCausalLM,
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    preset: str,
    definition: Any,
    lam: float,
) -> None:
    model = copy.deepcopy(model).double()
    eos = int(tokenizer.eos_token_id)
    loss = ours(model, pairs, LossConfig(preset=preset, orpo_lambda=lam), eos).loss
    expected = definition(model, pairs, lam, eos)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradient, expected_gradient = flat_gradient(model, loss), flat_gradient(model, expected)
    assert (gradient - expected_gradient).norm() < 1e-10 * expected_gradient.norm()


@pytest.mark.parametrize(
    ("preset", "changed"),
    [
        ("llamafactory", {"nll_scope": "prompt_and_response"}),
        ("llamafactory", {"nll_reduction": "token"}),
        ("llamafactory", {"nll_eos": False}),
        ("llamafactory", {"answer_padding": True}),
        ("authors", {"nll_scope": "response"}),
        ("authors", {"nll_reduction": "pair"}),
        ("authors", {"nll_eos": True}),
        ("authors", {"answer_padding": False}),
    ],
)
def test_every_setting_of_a_preset_is_needed(
    model: LlamaForCausalLM,
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    preset: str,
    changed: dict[str, Any],
) -> None:
    """The agreement above is not one that other settings would give as well."""
    eos = int(tokenizer.eos_token_id)
    config = LossConfig(preset=preset, orpo_lambda=1.0)
    other = LossConfig.model_validate(config.model_dump() | {"preset": None} | changed)
    with torch.no_grad():
        losses = [ours(model, pairs, c, eos).loss.item() for c in (config, other)]
    assert abs(losses[0] - losses[1]) > 1e-5 * losses[0]


# ---- TRL ------------------------------------------------------------------------------------------------------------


def trl(module: str) -> Any:
    """The module, or a skip: without TRL the published definitions are still compared with."""
    return pytest.importorskip(module, reason="needs TRL to compare with: pip install -e '.[oracle]'")


def trl_args(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_length": 512,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "gradient_checkpointing": False,
    }


def one_row() -> Any:
    """A trainer wants a data set; its batches are made by hand from our token ids."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])


def trl_batch(pairs: list[Pair], pad: int) -> dict[str, torch.Tensor]:
    """What the collators of ORPOTrainer and CPOTrainer make of tokenised pairs."""
    batch = {}
    for side in ("chosen", "rejected"):
        rows = [(pair.prompt_ids.tolist(), getattr(pair, f"{side}_ids").tolist()) for pair in pairs]
        batch[f"{side}_input_ids"] = padded([prompt + answer for prompt, answer in rows], pad)
        batch[f"{side}_attention_mask"] = padded([[1] * len(prompt + answer) for prompt, answer in rows], 0)
        batch[f"{side}_labels"] = padded([[IGNORED] * len(prompt) + answer for prompt, answer in rows], IGNORED)
    return batch


def dpo_batch(pairs: list[Pair], pad: int) -> dict[str, torch.Tensor]:
    """What DPOTrainer's collator makes of them: chosen sequences first, and which tokens are the answer's."""
    sides = [
        (pair.prompt_ids.tolist(), getattr(pair, f"{s}_ids").tolist()) for s in ("chosen", "rejected") for pair in pairs
    ]
    return {
        "input_ids": padded([prompt + answer for prompt, answer in sides], pad),
        "attention_mask": padded([[1] * len(prompt + answer) for prompt, answer in sides], 0),
        "completion_mask": padded([[0] * len(prompt) + [1] * len(answer) for prompt, answer in sides], 0),
    }


def assert_same(terms: LossTerms, expected: torch.Tensor, model: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Loss and gradient, fp32."""
    torch.testing.assert_close(terms.loss, expected, rtol=1e-5, atol=1e-6)
    gradient, expected_gradient = flat_gradient(model, terms.loss), flat_gradient(theirs, expected)
    assert (gradient - expected_gradient).norm() < 2e-5 * expected_gradient.norm()


@pytest.mark.parametrize("lam", LAMBDAS)
def test_preset_trl(
    model: LlamaForCausalLM, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, lam: float
) -> None:
    orpo = trl("trl.experimental.orpo")
    args = orpo.ORPOConfig(beta=lam, **trl_args(tmp_path))
    trainer = orpo.ORPOTrainer(copy.deepcopy(model), args, train_dataset=one_row(), processing_class=tokenizer)
    expected, metrics = trainer.get_batch_loss_metrics(trainer.model, trl_batch(pairs, tokenizer.pad_token_id))
    terms = ours(model, pairs, LossConfig(preset="trl", orpo_lambda=lam), tokenizer.eos_token_id)
    assert_same(terms, expected, model, trainer.model)
    assert metrics["nll_loss"] == pytest.approx(terms.nll.item(), rel=1e-5)
    assert metrics["log_odds_ratio"] == pytest.approx(-terms.odds_ratio_loss_P.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (LossConfig(name="cpo", nll_scope="response"), {}),  # both at their defaults, but for TRL's scope
        (LossConfig(name="cpo", nll_scope="response", beta=0.02, nll_weight=0.3), {"beta": 0.02, "cpo_alpha": 0.3}),
        (LossConfig(name="simpo"), {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}),
        (
            LossConfig(name="simpo", beta=1.5, simpo_gamma=1.2),
            {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 1.5, "simpo_gamma": 1.2},
        ),
    ],
    ids=["cpo-defaults", "cpo", "simpo-defaults", "simpo"],
)
def test_cpo_and_simpo_are_trls(
    model: LlamaForCausalLM,
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    config: LossConfig,
    arguments: dict[str, Any],
) -> None:
    cpo = trl("trl.experimental.cpo")
    args = cpo.CPOConfig(**trl_args(tmp_path), **arguments)
    trainer = cpo.CPOTrainer(copy.deepcopy(model), args, train_dataset=one_row(), processing_class=tokenizer)
    expected, _ = trainer.get_batch_loss_metrics(trainer.model, trl_batch(pairs, tokenizer.pad_token_id))
    assert_same(ours(model, pairs, config, tokenizer.eos_token_id), expected, model, trainer.model)


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (LossConfig(name="dpo"), {}),
        (LossConfig(name="dpo", beta=0.02), {"beta": 0.02}),
        (LossConfig(name="ipo"), {"loss_type": "ipo"}),
        (LossConfig(name="ipo", beta=0.7), {"loss_type": "ipo", "beta": 0.7}),
    ],
    ids=["dpo-defaults", "dpo", "ipo-defaults", "ipo"],
)
def test_dpo_and_ipo_are_trls(
    model: LlamaForCausalLM,
    reference_model: LlamaForCausalLM,
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    config: LossConfig,
    arguments: dict[str, Any],
) -> None:
    dpo = trl("trl")
    args = dpo.DPOConfig(**trl_args(tmp_path), **arguments)
    trainer = dpo.DPOTrainer(
        copy.deepcopy(model),
        ref_model=copy.deepcopy(reference_model),
        args=args,
        train_dataset=one_row(),
        processing_class=tokenizer,
    )
    expected = trainer.compute_loss(trainer.model, dpo_batch(pairs, tokenizer.pad_token_id))
    terms = ours(model, pairs, config, tokenizer.eos_token_id, reference_model)
    assert_same(terms, expected, model, trainer.model)


@pytest.mark.parametrize("answer_tokens", [1, 200])
def test_the_same_log_probabilities_through_trls_own_functions(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, answer_tokens: int
) -> None:
    """Far from where a fresh model's log-probabilities lie."""
    generator = torch.Generator().manual_seed(0)
    chosen_P, rejected_P = (-8 * torch.rand(200, generator=generator) - 1e-3 for _ in range(2))
    tokens_P = torch.full((200,), answer_tokens)
    logps = PairLogps(chosen_P, rejected_P, torch.zeros(200), torch.ones(200), tokens_P, tokens_P)

    def preference(config: LossConfig) -> torch.Tensor:
        return from_config(config)(logps, BatchCounts(200, 200)).preference_loss_P

    def trainer(module: Any, name: str, **arguments: Any) -> Any:
        args = getattr(module, f"{name}Config")(**trl_args(tmp_path), **arguments)
        cls = getattr(module, f"{name}Trainer")
        return cls(copy.deepcopy(model), args, train_dataset=one_row(), processing_class=tokenizer)

    def assert_equal(config: LossConfig, expected_P: torch.Tensor) -> None:
        torch.testing.assert_close(preference(config), expected_P, rtol=1e-6, atol=1e-6)

    weighted_P, *_ = trainer(trl("trl.experimental.orpo"), "ORPO", beta=1.0).odds_ratio_loss(chosen_P, rejected_P)
    assert_equal(LossConfig(), -weighted_P)
    simpo = trainer(trl("trl.experimental.cpo"), "CPO", loss_type="simpo", beta=2.0, simpo_gamma=0.5)
    assert_equal(LossConfig(name="simpo"), simpo.cpo_loss(chosen_P, rejected_P)[0])
    cpo = trainer(trl("trl.experimental.cpo"), "CPO")
    assert_equal(LossConfig(name="cpo"), cpo.cpo_loss(chosen_P * answer_tokens, rejected_P * answer_tokens)[0])
