"""Sizes of a reproduction of the paper: models, data, steps, and where each setting comes from."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from orpo_ray.data import style_pairs
from orpo_ray.reproduction.sampling import SamplingSettings

ScaleName = Literal["tiny", "small", "full"]

LAMBDAS = (0.0, 0.1, 0.5, 1.0)
"""0 is SFT; the others are Figure 9's."""
MAIN_LAMBDA = 1.0
"""λ of the model called ORPO in win rates: the authors' default, and Figure 7's. Chosen before any run."""

JUDGE = "judge"
"""Name of the reward model that scores answers: its model folder and its key in the results."""
POLICY_REWARD_MODEL = "coach"
"""Name of the reward model that RLHF trains its policy with; kept, because existing folders and results have it."""
REWARD_MODEL_SEEDS = {JUDGE: 1, POLICY_REWARD_MODEL: 2}
"""Offset of each reward model's training seed from `SEED_STRIDE` × the reproduction's seed."""
SEED_STRIDE = 100
"""Distance between the training seeds of one reproduction and the next."""


@dataclass(frozen=True, slots=True)
class Scale:
    """One size of the reproduction. Fields named after a role hold its length (`train.max_steps` or `train.epochs`)."""

    name: ScaleName
    model: str
    """Folder, hub name or preset."""
    data: str
    pretrain: bool
    """Start from random weights, and first learn the language of both answers, as pretrained models have."""
    max_tokens: int
    max_prompt_tokens: int
    train_pairs: int | None
    eval_pairs: int
    prompts: int
    """Held-out prompts that are answered."""
    max_new_tokens: int
    batch: int
    policy: dict[str, Any]
    """Length of SFT and ORPO."""
    reward: dict[str, Any]
    """Length of a reward model's training."""
    dpo: dict[str, Any]
    rlhf: dict[str, Any]
    evaluations: dict[str, Any]
    """How often SFT and ORPO evaluate (`train.eval_every`)."""
    lr: dict[str, float]
    """Role -> peak learning rate."""
    base: dict[str, Any] = field(default_factory=dict)
    """Length of the pretraining."""
    lora: dict[str, Any] | None = None
    compared_with: tuple[str, str] | None = None
    """Row of `published.WIN_RATES` that this scale repeats. Without one, only signs are compared."""
    use_gpu: bool = False
    rounds: int = 3
    dpo_pairs: int | None = None
    """Fewer pairs for DPO, whose reference reads all of them before the first step. None: `train_pairs`."""
    seed: int = 0
    """Seed of training and sampling; the data are the same with every seed."""

    @property
    def sampling(self) -> SamplingSettings:
        """Sampling at temperature 1, in three rounds, as in the paper."""
        return SamplingSettings(self.rounds, temperature=1.0, max_new_tokens=self.max_new_tokens, seed=self.seed)

    def tree(self, role: str) -> dict[str, Any]:
        """Experiment of a role as a config tree, without `name` and `output_dir`."""
        losses: dict[str, dict[str, Any]] = {
            "base": {"name": "sft"},
            "reward": {"name": "reward"},
            "lambda": {"name": "orpo"},
            "ratio": {"name": "orpo", "ratio": "probability", "orpo_lambda": MAIN_LAMBDA},
            "dpo": {"name": "dpo", "beta": 0.1},
            "rlhf": {
                "name": "rloo",
                "beta": 0.1,
                "max_new_tokens": self.max_new_tokens,
                "reward_model": POLICY_REWARD_MODEL,
            },
        }
        lengths = {"base": self.base, "reward": self.reward, "dpo": self.dpo, "rlhf": self.rlhf}
        length = lengths.get(role, self.policy | self.evaluations)
        lr = self.lr["reward" if role == "reward" else role if role in self.lr else "policy"]
        data = {"path": self.data, "eval_pairs": self.eval_pairs, "max_tokens": self.max_tokens}
        if role == "rlhf":  # it samples answers: the longest prompt must leave room for a whole one
            data["max_tokens"] = max(self.max_tokens, self.max_prompt_tokens + self.max_new_tokens)
        if self.train_pairs is not None:
            data["train_pairs"] = self.dpo_pairs if role == "dpo" and self.dpo_pairs else self.train_pairs
        # Two trials on one core each took about a tenth less time than one after the other on two cores (docs/log.md,
        # 2026-11-27).
        cpus = 1 if role in ("reward", "lambda") else 2
        return {
            "model": {"path": self.model} | ({"lora": self.lora} if self.lora and role != "base" else {}),
            "data": data | {"max_prompt_tokens": self.max_prompt_tokens},
            "loss": losses[role],
            "optim": {"lr": lr, "schedule": "cosine", "warmup_ratio": 0.1},
            "train": {"global_batch_size": self.batch, "max_tokens_per_micro_batch": 2048, "log_every": 5}
            | {"seed": 42 + SEED_STRIDE * self.seed}  # the default is 42
            | length,
            "generation": {"prompts": 0},  # the finished models answer many more prompts afterwards
            "checkpoint": {"keep_last": 1},
            "deepspeed": {"zero_stage": 2},
            "scaling": {"use_gpu": True} if self.use_gpu else {"cpus_per_worker": cpus},
        }

    def about(self) -> dict[str, Any]:
        """Settings that the page shows, as JSON values."""
        return {
            "model": self.model,
            "data": self.data,
            "lambdas": list(LAMBDAS),
            "main_lambda": MAIN_LAMBDA,
            "prompts": self.prompts,
            "rounds": self.rounds,
            "max_new_tokens": self.max_new_tokens,
            "batch": self.batch,
            "lr": self.lr,
            "lengths": {"policy": self.policy, "reward": self.reward, "dpo": self.dpo, "rlhf": self.rlhf},
            "lora": self.lora,
            "compared_with": self.compared_with,
            "seed": self.seed,
            "dpo_pairs": self.dpo_pairs,
            "pretrain": self.pretrain,
        }


_BUILTIN = Scale(
    name="tiny",
    model="tiny-llama-2m",
    data="builtin://style-pairs",
    pretrain=True,
    max_tokens=256,
    max_prompt_tokens=160,
    train_pairs=3000,
    eval_pairs=256,
    prompts=192,
    max_new_tokens=48,
    batch=32,
    policy={"max_steps": 60},
    reward={"max_steps": 120},
    dpo={"max_steps": 60},
    rlhf={"max_steps": 40},
    evaluations={"eval_every": 10},
    lr={"policy": 5.0e-4, "reward": 1.0e-3, "dpo": 2.0e-4, "rlhf": 1.0e-4, "base": 3.0e-3},
    base={"max_steps": 240},
)
_REAL = Scale(
    name="tiny",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    data="Anthropic/hh-rlhf",
    pretrain=False,
    max_tokens=160,
    max_prompt_tokens=96,
    train_pairs=800,  # about 3 in 5 pairs, held-out ones too, are dropped for long prompts
    dpo_pairs=400,
    eval_pairs=192,
    prompts=64,
    max_new_tokens=40,
    batch=8,
    policy={"max_steps": 30},
    reward={"max_steps": 30},
    dpo={"max_steps": 16},
    rlhf={"max_steps": 8},
    evaluations={"eval_every": 10},
    lr={"policy": 5.0e-4, "reward": 5.0e-4, "dpo": 1.0e-4, "rlhf": 1.0e-4},
    lora={"rank": 16, "alpha": 32.0},
)
_OPT = Scale(
    name="small",
    model="facebook/opt-125m",
    data="Anthropic/hh-rlhf",
    pretrain=False,
    max_tokens=1024,
    max_prompt_tokens=768,
    train_pairs=20_000,
    eval_pairs=2000,
    prompts=1000,
    max_new_tokens=256,
    batch=32,
    policy={"epochs": 3},
    reward={"epochs": 1},
    dpo={"epochs": 1},
    rlhf={"max_steps": 300},
    evaluations={"eval_every": 150},
    lr={"policy": 8.0e-6, "reward": 1.0e-5, "dpo": 5.0e-6, "rlhf": 1.0e-5},
    compared_with=("OPT-125M", "HH-RLHF"),
    use_gpu=True,
)
_FULL = replace(
    _OPT,
    name="full",
    model="facebook/opt-1.3b",
    max_prompt_tokens=1023,
    train_pairs=None,
    eval_pairs=8552,
    prompts=8552,
    policy={"epochs": 10},
    dpo={"epochs": 3},
    rlhf={"epochs": 1},
    evaluations={"eval_every": 5000},
    compared_with=("OPT-1.3B", "HH-RLHF"),
)


def scale(name: ScaleName, model: str | None = None, data: str | None = None, seed: int = 0) -> Scale:
    """A scale, with the model, data and seed replaced where given.

    `tiny` without a model trains a preset from random weights on the built-in pairs; with a model, it trains that model
    with LoRA.
    """
    chosen = {"tiny": _REAL if model else _BUILTIN, "small": _OPT, "full": _FULL}[name]
    if chosen is _REAL and data is not None and data.startswith("builtin://"):
        # None of these pairs is dropped, and evaluation takes longer than training.
        chosen = replace(chosen, max_prompt_tokens=128, train_pairs=320, dpo_pairs=160, eval_pairs=96, prompts=96)
    # With another model or other data, the scale no longer repeats the paper's row.
    row = None if model or data else chosen.compared_with
    return replace(chosen, model=model or chosen.model, data=data or chosen.data, compared_with=row, seed=seed)


def base_pairs(number: int = 4096, seed: int = 1) -> str:
    """Built-in pairs as JSON lines, with chosen and rejected in random order: language without a preference."""
    rng = random.Random(seed)
    lines = []
    for row in style_pairs.generate(number, seed=seed):
        chosen, rejected = rng.sample([row["chosen"], row["rejected"]], 2)
        lines.append(json.dumps(row | {"chosen": chosen, "rejected": rejected}, ensure_ascii=False))
    return "\n".join(lines) + "\n"
