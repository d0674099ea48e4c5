"""What a model in training answers to a few held-out prompts: greedily, and to the same prompts at every evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orpo_ray.config.experiment import GenerationConfig
from orpo_ray.data.dataset import PairDataset
from orpo_ray.models.pair_model import Prompts

GENERATIONS_FILE = "generations.jsonl"
"""In a trial's directory: one row per evaluation and prompt, see `generate`."""


@torch.no_grad()
def generate(
    engine: Any, pairs: PairDataset, config: GenerationConfig, tokenizer: Any, step: int, group: Any = None
) -> list[dict[str, Any]]:
    """Answers to the first `config.prompts` held-out prompts, the same list on every rank. A collective.

    Args:
        engine: around a `PairModel`.
        pairs: the held-out pairs.
        config: how many prompts, how long an answer.
        tokenizer: of the model; its EOS ends an answer.
        step: optimizer steps done.
        group: process group for small host-side messages; the default group if None.

    Returns:
        Rows `step`, `pair_id`, `prompt` (as the chat template writes it), `chosen`, `rejected` (as trained on: cut
        where the config cuts them) and `generated`, without special tokens; none where the longest of the prompts
        leaves no room for an answer.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    wanted = range(min(config.prompts, len(pairs)))
    # Behind a long prompt a model may have few positions left, or none.
    room = engine.module.max_positions - max((len(pairs[index].prompt_ids) for index in wanted), default=0)
    if min(room, len(wanted)) <= 0:
        return []
    # ZeRO-3 gathers parameters in every pass, so a rank without a prompt answers one too, for nobody.
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
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, rows, group=group)
    return [everyone[index % world][index // world] for index in wanted]


def keep(folder: Path, rows: list[dict[str, Any]], step: int) -> None:
    """Put an evaluation's rows behind the earlier ones; those of this step or later, from before a restart, go."""
    path = folder / GENERATIONS_FILE
    earlier = [row for row in read(folder) if row["step"] < step]
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in earlier + rows]
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows kept in a trial's directory, in order; none if there is no file."""
    path = folder / GENERATIONS_FILE
    if not path.is_file():
        return []
    # Of bytes: a text's lines would also end at U+2028 and its like, which JSON leaves as they are.
    return [json.loads(line) for line in path.read_bytes().splitlines()]
