"""The sections of an experiment file: every setting, its default, its rules and what it means."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from orpo_ray.config.section import Section, absolute_if_local
from orpo_ray.provenance import without_password


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) through peft; the base weights stay frozen."""

    rank: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Module names to adapt; `all-linear` is every linear layer but the head."""


class ModelConfig(Section):
    """Which causal language model is tuned."""

    path: str = Field(min_length=1)
    """Hub name, folder, or a built-in preset (`tiny-llama-2m`, `tiny-llama-8m`)."""
    gguf_file: str | None = None
    """A GGUF file inside `path`; transformers dequantises it into dense weights."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Off unless you trust its author."""
    attention: Literal["shared_prompt", "sdpa", "eager", "flash_attention_2"] = "shared_prompt"
    """`shared_prompt` runs each prompt once for both of its answers, without padding; architectures that cannot do so
    fall back to padded rows, and the run says why. The others pad, with that kernel of transformers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Low-rank adapters instead of full fine-tuning."""

    @field_validator("path")
    @classmethod
    def _local_path_is_absolute(cls, path: str) -> str:
        return absolute_if_local(path)


class DataConfig(Section):
    """Where the preference pairs come from and how they become tokens."""

    path: str = Field(min_length=1)
    """Hub name, a jsonl/json/parquet/csv file (gzipped or not), a folder of them, or `builtin://style-pairs`."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    train_split: str | None = None
    """Split to train on; by default the one named train_prefs or train, or the only one there is."""
    eval_split: str | None = None
    """Split to evaluate on; by default test_prefs, test or validation."""
    eval_path: str | None = None
    """File with the held-out pairs; by default they come from `path`."""
    eval_pairs: int = Field(512, ge=1)
    """Held-out pairs at most. Where the data have no split for them, this many are set aside from the training
    pairs, drawn by `split_seed`, the same for every trial."""
    train_pairs: int | None = Field(None, ge=1)
    """Training pairs at most (after shuffling by `split_seed`); all by default."""
    split_seed: int = Field(0, ge=0)
    """Seed of the split and of the built-in generator: not the training seed, so trials share their pairs."""
    max_tokens: int = Field(1024, ge=8)
    """Prompt and answer together, in tokens. A longer answer is cut at its end and then carries no EOS."""
    max_prompt_tokens: int = Field(768, ge=1)
    """Longest prompt, in tokens."""
    long_prompts: Literal["drop", "truncate"] = "drop"
    """A prompt over `max_prompt_tokens` drops its pair (as in the paper) or is cut from the left."""
    on_bad_rows: Literal["drop", "error"] = "drop"
    """Empty, identical and malformed pairs are dropped and counted, or refused with file and row."""
    chat_template: str | None = None
    """Jinja chat template; by default the tokenizer's own, or the ORPO authors' where it has none."""
    cache_dir: str = "~/.cache/orpo-ray"
    """Tokenised pairs, and reference models' log-probabilities of them, are kept here and shared by trials, runs and
    workers of one machine."""

    @field_validator("path", "eval_path")
    @classmethod
    def _local_path_is_absolute(cls, path: str | None) -> str | None:
        return path and absolute_if_local(path)

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> DataConfig:
        if self.max_prompt_tokens >= self.max_tokens:
            raise ValueError(
                f"max_prompt_tokens ({self.max_prompt_tokens}) < max_tokens ({self.max_tokens}) must hold: "
                "at least one answer token has to fit behind the longest prompt"
            )
        return self


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(8.0e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant"] = "cosine"
    """Shape after warm-up; cosine and linear end at 0."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps spent in linear warm-up, unless `warmup_steps` is given."""
    warmup_steps: int | None = Field(None, ge=0)
    """Warm-up in steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay on matrices (not on biases and norms)."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1.0e-8, gt=0)
    """Added to the root of the second moment."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the global gradient norm to this; null for no clipping."""


class TrainConfig(Section):
    """The loop: batch arithmetic, length, precision, how often it looks up."""

    global_batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step over all workers. Changing how it is cut changes speed, never the gradient."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Pairs per forward pass per worker at most; by default as many as `max_tokens_per_micro_batch` holds."""
    max_tokens_per_micro_batch: int = Field(4096, ge=1)
    """Tokens per forward pass per worker at most, a prompt counted once (in padded rows twice, and padding too); a
    longer pair goes alone. A multiple of 128 is best: rows are filled up to one on a GPU, and to one of 64 where a CPU
    computes in bf16. Memory grows with it; speed does too, up to some thousand tokens."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps. Give this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training pairs. Give this or `max_steps`."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations; by default only after the last step, which is always evaluated."""
    log_every: int = Field(10, ge=1)
    """Steps between reports of the training metrics."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; by default at each evaluation. The last step is always saved."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of matrix products. bf16 keeps fp32 master weights and optimizer state, and the loss is computed in fp32
    either way. `auto` is bf16 where the device has units for it (GPUs, CPUs with AMX or AVX-512 BF16), else fp32, which
    is faster there; the run logs which. Name one of them where a sweep may be continued on machines of another kind."""
    seed: int = Field(42, ge=0)
    """Initialisation of new weights, order of the pairs, dropout."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                f"give either max_steps or epochs, not both or neither "
                f"(max_steps={self.max_steps}, epochs={self.epochs})"
            )
        if self.max_steps is not None and self.eval_every is not None and self.eval_every > self.max_steps:
            raise ValueError(f"eval_every ({self.eval_every}) must not exceed max_steps ({self.max_steps})")
        return self


class CheckpointConfig(Section):
    """Which of a trial's checkpoints are kept; how often one is made is `train.checkpoint_every`."""

    keep_last: int = Field(2, ge=1)
    """The newest ones. With two, a damaged one costs the steps since the one before it, not the trial."""
    keep_best: str | None = None
    """A held-out metric; the checkpoint at which it was best is kept as well, and is what `orpo-ray export` takes."""


class GenerationConfig(Section):
    """What the model answers to some held-out prompts, written down at every evaluation to be read by people."""

    prompts: int = Field(4, ge=0)
    """How many, the same each time; 0 for none."""
    max_new_tokens: int = Field(48, ge=1)
    """Longest answer, in tokens."""


class DeepSpeedConfig(Section):
    """What is partitioned over the workers (Rajbhandari et al. 2020), and what is kept off the device."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """0: nothing; 1: optimizer state; 2: and gradients; 3: and parameters."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer state lives."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Where the parameters live between uses (stage 3)."""
    nvme_path: str | None = None
    """Folder on a fast local disk, for nvme offload."""

    @model_validator(mode="after")
    def _offload_fits_stage(self) -> DeepSpeedConfig:
        stage = self.zero_stage
        if self.offload_param != "none" and stage != 3:
            raise ValueError(f"offload_param ({self.offload_param}) needs zero_stage 3, but zero_stage is {stage}")
        if self.offload_optimizer == "cpu" and stage == 0:
            raise ValueError("offload_optimizer (cpu) needs zero_stage 1, 2 or 3, but zero_stage is 0")
        if self.offload_optimizer == "nvme" and stage != 3:
            raise ValueError(f"offload_optimizer (nvme) needs zero_stage 3, but zero_stage is {stage}")
        if "nvme" in (self.offload_optimizer, self.offload_param) and self.nvme_path is None:
            raise ValueError("nvme offload needs nvme_path, a folder on a fast local disk")
        return self


class ScalingConfig(Section):
    """What one trial occupies. `scaling: auto` is short for `{auto: true}`."""

    auto: bool = False
    """Choose what the file leaves open of workers, CPUs, ZeRO stage, offload, tokens per pass and recomputation, such
    that a trial fits the cluster's memory (`fitting.fit_to`). What the file sets is kept."""
    num_workers: int = Field(1, ge=1)
    """Data-parallel worker processes."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores reserved, and threads used, per worker."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per worker; `auto` means where the cluster has GPUs."""

    @model_validator(mode="before")
    @classmethod
    def _word(cls, data: Any) -> Any:
        return {"auto": True} if data == "auto" else data


class TrackingConfig(Section):
    """Where MLflow runs go."""

    uri: str | None = None
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI, else a SQLite file in `output_dir`. A password in it is used
    and not kept with the run; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD serve later commands too."""
    experiment: str = Field("orpo-ray", min_length=1)
    """MLflow experiment name."""
    system_metrics: bool = True
    """Log CPU, memory, disk, network and GPU use of every node to the sweep's run, every 10 s, or as often as
    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says."""

    @field_serializer("uri", when_used="json")
    def _written_without_password(self, uri: str | None) -> str | None:
        has_password = uri is not None and re.search(r"://[^/@]*:[^/]*@", uri)
        return without_password(uri) if uri is not None and has_password else uri
