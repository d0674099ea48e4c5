"""Greedy answers of the model in training to a few held-out prompts, the same prompts at every evaluation."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from orpo_ray.config import GenerationConfig
from orpo_ray.data.dataset import PairDataset
from orpo_ray.models.answers import Prompts
from orpo_ray.training.collectives import gather


@torch.no_grad()
def generate(
    engine: Any, pairs: PairDataset, config: GenerationConfig, tokenizer: Any, step: int, group: Any = None
) -> list[dict[str, Any]]:
    """Answer the first `config.prompts` held-out prompts. A collective; every rank gets the same list.

    Args:
        engine: around a `PairModel`.
        pairs: the held-out pairs.
        config: number of prompts and longest answer.
        tokenizer: the model's; its EOS ends an answer.
        step: optimizer steps done.
        group: process group for small host-side messages; the default group if None.

    Returns:
        Rows `step`, `pair_id`, `prompt` (as the chat template writes it), `chosen`, `rejected` (as trained on, with the
        config's truncation) and `generated`, without special tokens. No rows if the longest prompt leaves no room for
        an answer.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    wanted = range(min(config.prompts, len(pairs)))
    # After a long prompt, the model may have few positions left, or none.
    room = engine.module.max_positions - max((len(pairs[index].prompt_ids) for index in wanted), default=0)
    if min(room, len(wanted)) <= 0:
        return []
    # ZeRO-3 gathers parameters in every pass, so a rank without a prompt answers one too, and drops the answer.
    mine = list(wanted[rank::world])
    members = [pairs[index] for index in mine or [0]]
    prompts = Prompts.padded(
        [pair.prompt_ids for pair in members],
        pad_token_id=int(tokenizer.pad_token_id),
        eos_token_id=int(tokenizer.eos_token_id),
        max_new_tokens=min(config.max_new_tokens, room),
        in_step=world > 1 and engine.zero_optimization_stage() == 3,
    )
    engine.eval()
    answers_RT = engine(prompts.to(engine.device)).cpu()
    engine.train()

    def text(ids: Any) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    rows = [
        {
            "step": step,
            "pair_id": pair.pair_id,
            "prompt": pairs.prompt_text(index),
            "chosen": text(pair.chosen_ids),
            "rejected": text(pair.rejected_ids),
            "generated": text(answer_T),
        }
        for index, pair, answer_T in zip(mine, members, answers_RT, strict=False)
    ]
    rows_by_rank = gather(rows, group)
    return [rows_by_rank[index % world][index // world] for index in wanted]
