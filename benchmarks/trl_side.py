"""TRL's ORPOTrainer on our token ids: its own trainer, collator, precision and optimizer, as a user runs it."""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from benchmarks import workload
from benchmarks.case import LR, ORPO_LAMBDA, Case
from benchmarks.probe import Probe
from orpo_ray.data.dataset import Pair
from orpo_ray.models.loading import load_tokenizer


class _Clock(TrainerCallback):
    """Tells the probe where optimizer steps end, and keeps the losses that the trainer logs."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.probe.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.probe.step_done()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def run(case: Case, probe: Probe) -> list[float]:
    """Train with ORPOTrainer; returns the loss of each step.

    Its tokenised columns are replaced by ours, and its sampler takes them in their order. Weights are fp32,
    with autocast for bf16; AdamW is its default, the fused one; it logs every step, for the losses.
    """
    tokenizer = load_tokenizer(workload.model_config(case))
    pairs = workload.load(case)
    rows = [
        trl_columns(pair) for batch in workload.global_batches(case, pairs) for pair in workload.members(pairs, batch)
    ]
    longest = max(len(row[f"{side}_input_ids"]) for row in rows for side in ("chosen", "rejected"))
    with tempfile.TemporaryDirectory() as scratch:
        args = ORPOConfig(
            output_dir=scratch,
            beta=ORPO_LAMBDA,
            max_length=longest,
            per_device_train_batch_size=case.forward_pairs,
            gradient_accumulation_steps=case.batch // case.forward_pairs,
            max_steps=case.steps + 1,
            learning_rate=LR,
            lr_scheduler_type="constant",
            bf16=case.precision == "bf16",
            gradient_checkpointing=case.checkpointing,
            train_sampling_strategy="sequential",
            use_cpu=case.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=case.seed,
        )
        clock = _Clock(probe)
        text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])  # it insists on tokenising some
        model = workload.peer_model(case)
        trainer = ORPOTrainer(model, args, train_dataset=text, processing_class=tokenizer, callbacks=[clock])
        trainer.train_dataset = Dataset.from_list(rows)
        trainer.train()
    return clock.losses


def trl_columns(pair: Pair) -> dict[str, list[int]]:
    """A pair as ORPOTrainer's own tokenisation leaves it."""
    prompt = pair.prompt_ids.tolist()
    columns = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side, answer in (("chosen", pair.chosen_ids.tolist()), ("rejected", pair.rejected_ids.tolist())):
        columns[f"{side}_input_ids"] = prompt + answer
        columns[f"{side}_attention_mask"] = [1] * len(prompt + answer)
        columns[f"{side}_labels"] = [-100] * len(prompt) + answer
    return columns
