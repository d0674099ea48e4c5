"""RLHF's batches: answers that the model in training samples itself, and what reference and reward model say of them.

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
class OnlineAnswers:
    """Two fresh answers to each prompt, as a batch that `loss.rloo` understands.

    Every rank holds both frozen models whole: they are not partitioned by ZeRO.
    """

    engine: Any
    """Around the `PairModel` in training."""
    config: ExperimentConfig
    reference: PairModel
    """What training started from, without adapters."""
    reward: RewardModel
    loss_mask: LossMask
    pad_token_id: int
    end_of_turn: int

    @classmethod
    def of(cls, engine: Any, config: ExperimentConfig, products: torch.dtype | None) -> OnlineAnswers:
        """Load the frozen models.

        Raises:
            ModelError: the reward model is none, or reads other tokens than the model writes.
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
                f"{config.model.path}, and rloo hands it token ids; train the reward model from a model of the same "
                "family, with the same data.chat_template"
            )
        lm = build_model(config.model.model_copy(update={"lora": None}), config.train.seed)
        # The form is the policy's, so that both read the same rows.
        reference = PairModel(lm, engine.module.forward_mode, products).to(engine.device).frozen()
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
        """Sample, look up, score: one micro-batch, on the engine's device. A collective under ZeRO-3.

        What is drawn is a function of seed, step, pass and rank, so that a resumed run draws what an undisturbed one
        would have.

        Args:
            members: P pairs; of them only the prompts are looked at.
            step: optimizer step.
            number: of this pass within the step.
        """
        answers = self._sample([pair.prompt_ids for pair in members], step, number)
        sampled = [
            replace(pair, chosen_ids=first, rejected_ids=second)
            for pair, first, second in zip(members, answers[::2], answers[1::2], strict=True)
        ]
        laid_out = self.engine.module.collate(sampled, self.loss_mask, self.pad_token_id).to(self.engine.device)
        known = pair_logps(self.reference, laid_out)
        return replace(
            laid_out,
            reference_P2=torch.stack([known.chosen_logps_P, known.rejected_logps_P], dim=1),
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
        asked = Prompts.padded(
            prompts,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.end_of_turn,
            max_new_tokens=min(loss.max_new_tokens, room),
            in_step=dist.get_world_size() > 1 and engine.zero_optimization_stage() == 3,
            answers_each=2,
            temperature=1.0,  # another one's answers are not the model's, whose log-probabilities the loss takes
        )
        drawn_from = [self.config.train.seed, step, number, dist.get_rank()]
        engine.eval()
        with torch.random.fork_rng():
            torch.manual_seed(int(np.random.SeedSequence(drawn_from).generate_state(1)[0]))
            answers_RT = engine(asked.to(engine.device)).cpu().numpy()
        engine.train()
        ends = engine.module.ends | {self.end_of_turn}
        return [_up_to_end(answer_T, ends) for answer_T in answers_RT]


def _up_to_end(answer_T: np.ndarray, ends: set[int]) -> np.ndarray:
    """An answer without the padding behind it; its end-of-turn token belongs to it."""
    at = np.flatnonzero(np.isin(answer_T, list(ends)))
    return answer_T[: at[0] + 1 if len(at) else None].astype(np.int32)
