"""How large a reproduction of the paper is: models, data, steps, and what each setting comes from."""

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
"""Of the model called ORPO in win rates: the authors' default, and Figure 7's. Chosen before any run."""


SEEDS = 100
"""Training seeds of one reproduction and of the next are so far apart."""


@dataclass(frozen=True, slots=True)
class Scale:
    """One size."""

    name: ScaleName
    model: str
    """Folder, hub name or preset."""
    data: str
    pretrain: bool
    """The model starts from nothing, so it learns the language of both answers first, as pretrained models have."""
    max_tokens: int
    max_prompt_tokens: int
    train_pairs: int | None
    eval_pairs: int
    prompts: int
    """Held-out prompts that are answered."""
    max_new_tokens: int
    batch: int
    policy: dict[str, Any]
    """Length of SFT and ORPO (`train.max_steps` or `train.epochs`)."""
    reward: dict[str, Any]
    """Of a reward model."""
    dpo: dict[str, Any]
    rlhf: dict[str, Any]
    evaluations: dict[str, Any]
    lr: dict[str, float]
    """Role -> peak learning rate."""
    base: dict[str, Any] = field(default_factory=dict)
    """Of the pretraining."""
    lora: dict[str, Any] | None = None
    compared_with: tuple[str, str] | None = None
    """Row of `published.WIN_RATES` that this repeats; others only show signs."""
    use_gpu: bool = False
    rounds: int = 3
    dpo_pairs: int | None = None
    """Where DPO trains on fewer: before its first step the reference reads all of them."""
    seed: int = 0
    """Of the training and of what is sampled; the data are the same with every seed."""

    @property
    def sampling(self) -> SamplingSettings:
        """How answers are drawn: at temperature 1, in three rounds, as in the paper."""
        return SamplingSettings(self.rounds, temperature=1.0, max_new_tokens=self.max_new_tokens, seed=self.seed)

    def tree(self, role: str) -> dict[str, Any]:
        """The experiment of a role, but for its name and place."""
        losses: dict[str, dict[str, Any]] = {
            "base": {"name": "sft"},
            "reward": {"name": "reward"},
            "lambda": {"name": "orpo"},
            "ratio": {"name": "orpo", "ratio": "probability", "orpo_lambda": MAIN_LAMBDA},
            "dpo": {"name": "dpo", "beta": 0.1},
            "rlhf": {"name": "rloo", "beta": 0.1, "max_new_tokens": self.max_new_tokens, "reward_model": "coach"},
        }
        lengths = {"base": self.base, "reward": self.reward, "dpo": self.dpo, "rlhf": self.rlhf}
        length = lengths.get(role, self.policy | self.evaluations)
        lr = self.lr["reward" if role == "reward" else role if role in self.lr else "policy"]
        data = {"path": self.data, "eval_pairs": self.eval_pairs, "max_tokens": self.max_tokens}
        if role == "rlhf":  # its answers are not the data's: the longest prompt leaves room for a whole one
            data["max_tokens"] = max(self.max_tokens, self.max_prompt_tokens + self.max_new_tokens)
        if self.train_pairs is not None:
            data["train_pairs"] = self.dpo_pairs if role == "dpo" and self.dpo_pairs else self.train_pairs
        # Two trials on a core each took about a tenth less than one after the other on two (docs/log.md, 2026-11-27).
        cpus = 1 if role in ("reward", "lambda") else 2
        return {
            "model": {"path": self.model} | ({"lora": self.lora} if self.lora and role != "base" else {}),
            "data": data | {"max_prompt_tokens": self.max_prompt_tokens},
            "loss": losses[role],
            "optim": {"lr": lr, "schedule": "cosine", "warmup_ratio": 0.1},
            "train": {"global_batch_size": self.batch, "max_tokens_per_micro_batch": 2048, "log_every": 5}
            | {"seed": 42 + SEEDS * self.seed}  # the default is 42
            | length,
            "generation": {"prompts": 0},  # the finished models answer, to many more
            "checkpoint": {"keep_last": 1},
            "deepspeed": {"zero_stage": 2},
            "scaling": {"use_gpu": True} if self.use_gpu else {"cpus_per_worker": cpus},
        }

    def about(self) -> dict[str, Any]:
        """For the page."""
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
    train_pairs=800,  # some 3 in 5 are dropped for long prompts, of the held-out pairs too
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
    """A scale, with another model, other data, or another seed where given.

    `tiny` without a model trains a preset from nothing on the built-in pairs; with one, that with LoRA.
    """
    chosen = {"tiny": _REAL if model else _BUILTIN, "small": _OPT, "full": _FULL}[name]
    if chosen is _REAL and data is not None and data.startswith("builtin://"):
        # None of these is dropped, and what is evaluated takes longer than what is trained on.
        chosen = replace(chosen, max_prompt_tokens=128, train_pairs=320, dpo_pairs=160, eval_pairs=96, prompts=96)
    # What is no longer the paper's row is not set beside it.
    row = None if model or data else chosen.compared_with
    return replace(chosen, model=model or chosen.model, data=data or chosen.data, compared_with=row, seed=seed)


def base_pairs(number: int = 4096, seed: int = 1) -> str:
    """Built-in pairs as jsonl, every second one with its answers exchanged: language without a preference."""
    rng = random.Random(seed)
    lines = []
    for row in style_pairs.generate(number, seed=seed):
        chosen, rejected = rng.sample([row["chosen"], row["rejected"]], 2)
        lines.append(json.dumps(row | {"chosen": chosen, "rejected": rejected}, ensure_ascii=False))
    return "\n".join(lines) + "\n"
