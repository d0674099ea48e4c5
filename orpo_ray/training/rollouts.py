"""Batches for RLHF: answers sampled from the model in training, with reference log-probabilities and rewards.

Shape suffixes: P pairs of a micro-batch, R = 2P sampled rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orpo_ray.config import ExperimentConfig
from orpo_ray.data.dataset import Pair
from orpo_ray.data.tokenizer import PairTokenizer
from orpo_ray.models.answers import Prompts
from orpo_ray.models.loading import ModelError, build_model, load_tokenizer
from orpo_ray.models.packing import Batch, LossMask
from orpo_ray.models.pair_model import PairModel, pair_logps
from orpo_ray.models.reward_model import RewardModel


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Samples two answers to each prompt and scores them, as input of `loss.rloo`.

    Every rank holds the whole reference model and reward model: ZeRO does not partition them.
    """

    engine: Any
    """A DeepSpeed engine around the `PairModel` in training."""
    config: ExperimentConfig
    reference: PairModel
    """The model that training started from, without adapters."""
    reward: RewardModel
    loss_mask: LossMask
    pad_token_id: int
    end_of_turn: int

    @classmethod
    def of(cls, engine: Any, config: ExperimentConfig, dtype: torch.dtype | None) -> Rollouts:
        """Load the reference model and the reward model.

        Args:
            engine: around the `PairModel` in training.
            config: the trial's.
            dtype: of the reference model's matrix products (`precision.matmul_dtype`).

        Raises:
            ModelError: `loss.reward_model` is not a reward model, or has another tokenizer than the model in training.
        """
        loss = config.loss
        assert loss.reward_model is not None
        tokenizer = load_tokenizer(config.model)
        tokens = PairTokenizer(config.data, tokenizer)
        reward = RewardModel.load(
            loss.reward_model, max_tokens=config.data.max_tokens, precision=config.train.precision
        )
        theirs = reward.tokens
        if tokens.template != theirs.template or tokenizer.get_vocab() != theirs.tokenizer.get_vocab():
            raise ModelError(
                f"loss.reward_model {loss.reward_model} has another tokenizer or chat template than model.path "
                f"{config.model.path}, but rloo passes it token ids; train the reward model from a model of the same "
                "family, with the same data.chat_template"
            )
        lm = build_model(config.model.model_copy(update={"lora": None}), config.train.seed)
        # The policy's forward mode, so that both models read the same rows.
        reference = PairModel(lm, engine.module.forward_mode, dtype).to(engine.device).frozen()
        return cls(
            engine=engine,
            config=config,
            reference=reference,
            reward=reward,
            loss_mask=LossMask("response"),
            pad_token_id=int(tokenizer.pad_token_id),
            end_of_turn=tokens.end_of_turn(),
        )

    @torch.no_grad()
    def batch(self, members: Sequence[Pair], step: int, number: int) -> Batch:
        """Sample and score one micro-batch, on the engine's device. A collective under ZeRO-3.

        The samples are a function of seed, step, pass and rank, so a resumed run draws the same ones as an
        uninterrupted run.

        Args:
            members: P pairs, of which only the prompts are used.
            step: optimizer step.
            number: number of this pass within the step.
        """
        answers = self._sample([pair.prompt_ids for pair in members], step, number)
        sampled = [
            replace(pair, chosen_ids=first, rejected_ids=second)
            for pair, first, second in zip(members, answers[::2], answers[1::2], strict=True)
        ]
        batch = self.engine.module.collate(sampled, self.loss_mask, self.pad_token_id).to(self.engine.device)
        logps = pair_logps(self.reference, batch)
        return replace(
            batch,
            reference_P2=torch.stack([logps.chosen_logps_P, logps.rejected_logps_P], dim=1),
            rewards_P2=self.reward.of_pairs(sampled).to(self.engine.device),
        )

    def _sample(self, prompts: Sequence[np.ndarray], step: int, number: int) -> list[np.ndarray]:
        loss, engine = self.config.loss, self.engine
        assert loss.max_new_tokens is not None
        longest = max(map(len, prompts))
        room = min(engine.module.max_positions, self.config.data.max_tokens) - longest
        if room < 1:
            raise ValueError(
                f"a prompt of {longest} tokens leaves no room for an answer: the model and data.max_tokens "
                f"({self.config.data.max_tokens}) allow {longest + room} tokens; lower data.max_prompt_tokens"
            )
        batch = Prompts.padded(
            prompts,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.end_of_turn,
            max_new_tokens=min(loss.max_new_tokens, room),
            in_step=dist.get_world_size() > 1 and engine.zero_optimization_stage() == 3,
            answers_each=2,
            temperature=1.0,  # at any other, samples would not follow the log-probabilities in the loss
        )
        drawn_from = [self.config.train.seed, step, number, dist.get_rank()]
        engine.eval()
        with torch.random.fork_rng():
            torch.manual_seed(int(np.random.SeedSequence(drawn_from).generate_state(1)[0]))
            answers_RT = engine(batch.to(engine.device)).cpu().numpy()
        engine.train()
        ends = engine.module.ends | {self.end_of_turn}
        return [_up_to_end(answer_T, ends) for answer_T in answers_RT]


def _up_to_end(answer_T: np.ndarray, ends: set[int]) -> np.ndarray:
    """An answer without its padding, up to and including its end-of-turn token."""
    at = np.flatnonzero(np.isin(answer_T, list(ends)))
    return answer_T[: at[0] + 1 if len(at) else None].astype(np.int32)
