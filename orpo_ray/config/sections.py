"""Sections of an experiment file, except `loss` and `sweep`: each setting, its default, its rules and its meaning."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from orpo_ray.config.section import Section, absolute_if_local
from orpo_ray.provenance import without_password


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) through peft; the base weights stay frozen."""

    rank: int = Field(16, ge=1)
    """Rank of the update matrices."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability on the adapter's input."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the modules to adapt; `all-linear` is every linear layer except the head."""


class ModelConfig(Section):
    """The causal language model to tune."""

    path: str = Field(min_length=1)
    """Hub name, folder, or a built-in preset with random weights (`tiny-llama-2m`, `tiny-llama-8m`)."""
    gguf_file: str | None = None
    """GGUF file inside `path`; transformers dequantises it into dense weights."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Keep it off unless you trust the author."""
    attention: Literal["shared_prompt", "sdpa", "eager", "flash_attention_2"] = "shared_prompt"
    """`shared_prompt` runs each prompt once for both of its answers, without padding; architectures that cannot do this
    fall back to padded rows, and the run logs why. The other values use padded rows with that attention implementation
    of transformers."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: uses less memory and takes about a third more time."""
    lora: LoraConfig | None = None
    """Train low-rank adapters; null trains all weights."""

    @field_validator("path")
    @classmethod
    def _local_path_is_absolute(cls, path: str) -> str:
        return absolute_if_local(path)


class DataConfig(Section):
    """Source of the preference pairs, and how they are tokenised."""

    path: str = Field(min_length=1)
    """Hub name, a jsonl, json, csv (each gzipped or not) or parquet file, a folder of such files, or
    `builtin://style-pairs`."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    train_split: str | None = None
    """Split to train on; by default the split named train_prefs or train, or the only split."""
    eval_split: str | None = None
    """Split to evaluate on; by default the split named test_prefs, test or validation, if there is one."""
    eval_path: str | None = None
    """Source of the held-out pairs, in the same forms as `path`; by default they come from `path`."""
    eval_pairs: int = Field(512, ge=1)
    """Maximum number of held-out pairs. If the data have no held-out split, exactly this many pairs are drawn with
    `split_seed` from the training pairs and set aside, the same ones for every trial."""
    train_pairs: int | None = Field(None, ge=1)
    """Maximum number of training pairs, taken after shuffling with `split_seed`; all by default."""
    split_seed: int = Field(0, ge=0)
    """Seed of the split and of the built-in generator. It is separate from `train.seed`, so that trials with different
    training seeds share their pairs."""
    max_tokens: int = Field(1024, ge=8)
    """Maximum length of prompt and answer together, in tokens. A longer answer is cut at its end and then has no
    EOS."""
    max_prompt_tokens: int = Field(768, ge=1)
    """Maximum length of a prompt, in tokens."""
    long_prompts: Literal["drop", "truncate"] = "drop"
    """`drop` drops pairs whose prompt exceeds `max_prompt_tokens`, as the paper does; `truncate` cuts the prompt from
    the left."""
    on_bad_rows: Literal["drop", "error"] = "drop"
    """`drop` drops and counts pairs that are malformed or have empty or identical answers; `error` stops with the file
    and row of the first one."""
    chat_template: str | None = None
    """Jinja chat template; by default the tokenizer's own, or the ORPO authors' template if the tokenizer has none."""
    cache_dir: str = "~/.cache/orpo-ray"
    """Folder for tokenised pairs and the reference models' log-probabilities of them, shared by the trials, runs and
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
                "at least one answer token must fit after the longest prompt"
            )
        return self


class OptimConfig(Section):
    """The AdamW optimizer and its learning-rate schedule."""

    lr: float = Field(8.0e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; cosine and linear end at 0."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Fraction of the steps spent in linear warm-up; ignored if `warmup_steps` is given."""
    warmup_steps: int | None = Field(None, ge=0)
    """Length of the linear warm-up, in steps; by default `warmup_ratio` decides."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, applied to matrices but not to biases and norms."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay rate of the second moment."""
    eps: float = Field(1.0e-8, gt=0)
    """Added to the square root of the second moment, for numerical stability."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Maximum global gradient norm; larger gradients are scaled down to it. null disables clipping."""


class TrainConfig(Section):
    """The training loop: batch sizes, length, precision, and how often it evaluates, logs and saves."""

    global_batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step, over all workers. How the batch is divided into workers and micro-batches changes the
    speed, never the gradient."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Maximum pairs per forward pass and worker; by default as many as `max_tokens_per_micro_batch` holds."""
    max_tokens_per_micro_batch: int = Field(4096, ge=1)
    """Maximum tokens per forward pass and worker. A prompt counts once (in padded rows twice, and padding counts as
    well); a longer pair runs alone. Use a multiple of 128: rows are padded to a multiple of 128 on a GPU, and of 64 on
    a CPU that computes in bf16. Memory grows with this value; so does speed, up to a few thousand tokens."""
    max_steps: int | None = Field(None, ge=1)
    """Length of training in optimizer steps. Give either this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Length of training in passes over the training pairs. Give either this or `max_steps`."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations. The last step is always evaluated; by default it is the only one."""
    log_every: int = Field(10, ge=1)
    """Steps between reports of the training metrics."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; by default one is saved at each evaluation. The last step is always saved."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Number format of matrix multiplications. bf16 keeps fp32 master weights and optimizer state, and the loss is
    always computed in fp32. `auto` is bf16 if the device has units for it (GPUs, CPUs with AMX or AVX-512 BF16), else
    fp32, which is faster there; the run logs which. Name a format if the sweep may continue on other hardware."""
    seed: int = Field(42, ge=0)
    """Seed of the initial values of new weights, the order of the pairs, and dropout."""

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
    """Which of a trial's checkpoints are kept; `train.checkpoint_every` sets how often one is saved."""

    keep_last: int = Field(2, ge=1)
    """Number of newest checkpoints to keep. The default is two: if the newest is damaged, the trial continues from the
    one before it instead of starting over."""
    keep_best: str | None = None
    """Held-out metric; the checkpoint with its best value is kept as well, and `orpo-ray export` uses that one."""


class GenerationConfig(Section):
    """Sample answers to some held-out prompts, written at every evaluation for people to read."""

    prompts: int = Field(4, ge=0)
    """Number of prompts, the same ones at every evaluation; 0 disables sampling."""
    max_new_tokens: int = Field(48, ge=1)
    """Maximum length of an answer, in tokens."""


class DeepSpeedConfig(Section):
    """ZeRO: what is partitioned over the workers (Rajbhandari et al. 2020), and what is offloaded from the device."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What is partitioned. 0: nothing; 1: optimizer state; 2: also gradients; 3: also parameters."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer state is stored: on the device (`none`), in CPU memory, or on NVMe (stage 3 only)."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Where the parameters are stored between uses, with the same choices (stage 3 only)."""
    nvme_path: str | None = None
    """Folder on a fast local disk; required for offloading to `nvme`."""

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
    """Resources of one trial. `scaling: auto` is short for `{auto: true}`."""

    auto: bool = False
    """Choose workers, CPUs, ZeRO stage, offloading, tokens per pass and recomputation such that a trial fits the
    cluster's memory (`planning.fit.fit_to`). Settings given in the file are kept."""
    num_workers: int = Field(1, ge=1)
    """Number of data-parallel worker processes."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores reserved, and threads used, by each worker."""
    use_gpu: bool | Literal["auto"] = "auto"
    """Give each worker one GPU; `auto` does so if the cluster has GPUs."""

    @model_validator(mode="before")
    @classmethod
    def _word(cls, data: Any) -> Any:
        return {"auto": True} if data == "auto" else data


class TrackingConfig(Section):
    """Where MLflow runs are logged."""

    uri: str | None = None
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI, or else a SQLite file in `output_dir`. A password in the URI
    is used but not stored with the run; later commands find it in MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD."""
    experiment: str = Field("orpo-ray", min_length=1)
    """Name of the MLflow experiment."""
    system_metrics: bool = True
    """Log CPU, memory, disk, network and GPU use of every node to the sweep's run, every 10 s or at the interval in
    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL."""

    @field_serializer("uri", when_used="json")
    def _written_without_password(self, uri: str | None) -> str | None:
        has_password = uri is not None and re.search(r"://[^/@]*:[^/]*@", uri)
        return without_password(uri) if uri is not None and has_password else uri
