"""Trained reward models: loaded once, then used to score answers.

The training loop trains them like any other model (`loss.name: reward`, `training.loss.bradley_terry`), and `orpo-ray
export` writes them. Shape suffixes: N prompts, K answers to each, P pairs of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from transformers import AutoConfig

from orpo_ray.config import DataConfig, ModelConfig
from orpo_ray.data.dataset import Pair
from orpo_ray.data.rows import Message
from orpo_ray.data.tokenizer import PairTokenizer
from orpo_ray.models.loading import ModelError, build_reward_model, load_tokenizer
from orpo_ray.models.packing import LossMask, micro_batches
from orpo_ray.models.pair_model import PairModel, pair_logps
from orpo_ray.models.precision import matmul_dtype
from orpo_ray.models.probe import frozen_model

REWARD_MASK = LossMask("response", rewards=True)
"""A reward is read at each answer's last token."""


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A frozen reward model on this process's device."""

    path: str
    model: PairModel
    tokens: PairTokenizer
    max_tokens: int
    """Of prompt and answer together; longer answers are truncated at their end, as in training."""

    @classmethod
    def load(cls, path: str, *, max_tokens: int = 1024, precision: str = "auto") -> RewardModel:
        """Load a trained reward model.

        Args:
            path: folder or hub name.
            max_tokens: `data.max_tokens` that it was trained with.
            precision: `train.precision`.

        Raises:
            ModelError: the model was not found, or its files hold no score, so it is not a trained reward model.
        """
        settings = ModelConfig(path=path)
        _require_score(settings)
        tokenizer = load_tokenizer(settings)
        model = frozen_model(build_reward_model(settings, seed=0), settings.attention, matmul_dtype(precision))
        data = DataConfig(path="unused", max_tokens=max_tokens, max_prompt_tokens=max_tokens - 1)
        return cls(path, model, PairTokenizer(data, tokenizer), max_tokens)

    @torch.no_grad()
    def of_pairs(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Rewards of one micro-batch, fp32 [P, 2], on the model's device. The ids must come from its own tokenizer."""
        batch = self.model.collate(pairs, REWARD_MASK, int(self.tokens.tokenizer.pad_token_id))
        rewards = pair_logps(self.model, batch.to(self.model.device))
        return torch.stack([rewards.chosen_logps_P, rewards.rejected_logps_P], dim=1)

    def score(
        self, prompts: Sequence[list[Message]], answers_NK: Sequence[Sequence[str]], max_tokens_at_once: int = 4096
    ) -> np.ndarray:
        """Rewards of answers.

        Args:
            prompts: N conversations that end before the answer.
            answers_NK: K texts for each prompt, the same number for all.
            max_tokens_at_once: most tokens per forward pass.

        Returns:
            float64 [N, K]; only differences between answers to the same prompt are meaningful.

        Raises:
            ValueError: the prompts have different numbers of answers, or none.
            DataError: the chat template rejects a prompt.
        """
        counts = {len(answers) for answers in answers_NK}
        if len(prompts) != len(answers_NK) or len(counts) != 1 or 0 in counts:
            raise ValueError(
                f"{len(prompts)} prompts need as many lists of answers, all of one length, not {len(answers_NK)} "
                f"lists of {sorted(counts)} answers"
            )
        (num,) = counts
        pairs, places = [], []
        for row, (prompt, prompt_ids) in enumerate(zip(prompts, self.tokens.prompts(prompts), strict=True)):
            room = max(self.max_tokens - len(prompt_ids), 1)
            ids = [np.array(answer[:room], np.int32) for answer in self.tokens.answers(prompt, answers_NK[row])]
            # Two answers share one pass over their prompt; the last of an odd number shares it with a dummy token.
            for first in range(0, num, 2):
                other = ids[first + 1] if first + 1 < num else ids[first][:1]
                pairs.append(Pair(f"{row}:{first}", np.array(prompt_ids, np.int32), ids[first], other, 0))
                places.append((row, first))
        lengths_N3 = np.array([[len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)] for p in pairs])
        cut = micro_batches(
            lengths_N3,
            1,
            max_pairs=None,
            max_tokens=max_tokens_at_once,
            share_prompt=self.model.forward_mode.shares_prompt,
        )
        rewards_NK = np.full((len(prompts), num), np.nan)
        for (mine,) in track(cut, description="scoring", transient=True, disable=len(cut) < 8):
            rewards_P2 = self.of_pairs([pairs[int(i)] for i in mine]).double().cpu().numpy()
            for index, both in zip(mine, rewards_P2, strict=True):
                row, first = places[int(index)]
                rewards_NK[row, first : first + 2] = both[: num - first]
        return rewards_NK


def _require_score(config: ModelConfig) -> None:
    """Refuse a language model: its score layer would be initialised at random."""
    try:
        architecture = AutoConfig.from_pretrained(config.path, revision=config.revision)
    except (OSError, ValueError) as error:
        place = "in this folder" if Path(config.path).is_dir() else "on the hub or as a folder"
        raise ModelError(f"{config.path}: no reward model could be read {place}: {error!s:.300}") from error
    names = architecture.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in names) or architecture.num_labels != 1:
        raise ModelError(
            f"{config.path}: its config.json says {', '.join(names) or 'no architecture'} with "
            f"{architecture.num_labels} labels, but a reward model is a ...ForSequenceClassification with one; "
            "train one with loss.name: reward and write it with orpo-ray export"
        )
