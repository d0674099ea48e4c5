"""Other losses in a plain padded loop: Liger's chunked ORPO loss, and LLaMA-Factory's definition of ORPO.

LLaMA-Factory itself does not install beside current torch, transformers and TRL (0.9.5 pins older ones), so its side is
its published objective written out here: both answers in one padded pass, full fp32 logits, the NLL a mean over pairs
of each chosen answer's token mean. Its numbers are this loop's, not LLaMA-Factory's.

Shape suffixes: S = 2P sequences (chosen first), T tokens of the longest, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import workload
from benchmarks.case import LR, ORPO_LAMBDA, Case
from benchmarks.probe import Probe
from orpo_ray.data.dataset import Pair
from orpo_ray.models.loading import load_tokenizer

IGNORED = -100
Loss = Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]


def run(case: Case, probe: Probe) -> list[float]:
    """Train with fp32 weights, autocast for bf16, fused AdamW and clipping at 1, as ours; returns each step's loss."""
    pad_token_id = int(load_tokenizer(workload.model_config(case)).pad_token_id)
    pairs = workload.load(case)
    model: Any = workload.peer_model(case).to(case.device)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    loss_of = liger_loss() if case.side == "liger" else llamafactory_loss
    passes = case.batch // case.forward_pairs
    batches = workload.global_batches(case, pairs)

    def backward(piece: np.ndarray) -> float:
        batch = collate(workload.members(pairs, piece), pad_token_id)
        batch = {name: tensor.to(case.device) for name, tensor in batch.items()}
        with torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16"):
            loss = loss_of(model, batch) / passes
        loss.backward()
        return loss.item()

    if case.side == "liger":
        # It compiles at the first length it meets, and once more at the second: not the clock's business.
        for indices in batches[:2]:
            backward(indices[: case.forward_pairs])
        optimizer.zero_grad()
    losses = []
    probe.start()
    for indices in batches:
        total = sum(backward(piece) for piece in indices.reshape(passes, -1))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        probe.step_done()
    return losses


def collate(pairs: list[Pair], pad_token_id: int) -> dict[str, torch.Tensor]:
    """[prompt | chosen] rows, then [prompt | rejected] rows, padded on the right.

    Returns:
        input_ids_ST, attention_mask_ST, `labels_ST` with the answers' ids and `nll_labels_ST` with all real ids; both
        `IGNORED` elsewhere.
    """
    rows = [(pair.prompt_ids.tolist(), pair.chosen_ids.tolist()) for pair in pairs]
    rows += [(pair.prompt_ids.tolist(), pair.rejected_ids.tolist()) for pair in pairs]

    def padded(sequences: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(sequence) for sequence in sequences]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    return {
        "input_ids_ST": padded([prompt + answer for prompt, answer in rows], pad_token_id),
        "attention_mask_ST": padded([[1] * len(prompt + answer) for prompt, answer in rows], 0),
        "labels_ST": padded([[IGNORED] * len(prompt) + answer for prompt, answer in rows], IGNORED),
        "nll_labels_ST": padded([prompt + answer for prompt, answer in rows], IGNORED),
    }


def liger_loss() -> Loss:
    """Liger's loss as its own LigerORPOTrainer calls it, chunks of one pair and torch.compile at its defaults.

    Raises:
        ModuleNotFoundError: liger-kernel is not installed.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    fused = LigerFusedLinearORPOLoss(ignore_index=IGNORED, beta=ORPO_LAMBDA)

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden_STD = model.model(
            input_ids=batch["input_ids_ST"], attention_mask=batch["attention_mask_ST"], use_cache=False
        ).last_hidden_state
        value, _ = fused(
            model.lm_head.weight,
            hidden_STD[:, :-1],
            batch["labels_ST"][:, 1:],
            nll_target=batch["nll_labels_ST"][:, 1:],
        )
        return value

    return loss


def llamafactory_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over pairs of -log P(chosen) + λ · -log σ(log odds ratio), P the geometric mean over answer tokens."""
    logits_STV = model(
        input_ids=batch["input_ids_ST"], attention_mask=batch["attention_mask_ST"], use_cache=False
    ).logits.float()
    labels_ST = batch["labels_ST"][:, 1:]
    counted_ST = labels_ST != IGNORED
    logps_ST = logits_STV[:, :-1].log_softmax(-1).gather(2, labels_ST.clamp(min=0)[:, :, None]).squeeze(2)
    chosen_P, rejected_P = ((logps_ST * counted_ST).sum(1) / counted_ST.sum(1)).chunk(2)
    log_odds_P = (chosen_P - rejected_P) - (torch.log1p(-chosen_P.exp()) - torch.log1p(-rejected_P.exp()))
    return (-chosen_P - ORPO_LAMBDA * F.logsigmoid(log_odds_P)).mean()
