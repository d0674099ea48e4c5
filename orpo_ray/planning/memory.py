"""Peak memory of a training worker, computed from its config and its model's shape alone.

The terms follow from the code that allocates them; the few constants were measured, and `python -m
benchmarks.memory_model` compares predictions with real processes. Nothing here imports torch, so that a plan is quick.
ZeRO's terms follow Rajbhandari et al. 2020 (https://arxiv.org/abs/1910.02054) and DeepSpeed 0.19's implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orpo_ray.config import ExperimentConfig, LoraConfig
from orpo_ray.formatting import GIB, MIB
from orpo_ray.hardware import Device
from orpo_ray.planning.architecture import Architecture

_FP32, _BF16 = 4, 2

_CHUNK_BYTES, _KEPT_BYTES = 64 * MIB, 256 * MIB
"""Copies of `lm_head.CHUNK_BYTES` and `lm_head.KEPT_BYTES`; a test keeps them equal."""
_BUCKET = 500_000_000
"""Elements of DeepSpeed's default `reduce_bucket_size`: fully allocated on CUDA, only as far as used on a CPU."""
_MOST_GATHERED = 1_000_000_000
"""Elements of DeepSpeed's default `stage3_max_live_parameters`."""

# Measured on Linux with glibc, torch 2.13, DeepSpeed 0.19.8 and Ray 2.60. `python -m benchmarks.memory_model` reports
# the first as `idle`; the others were fitted to its cases, so these test the model's form more than the constants.
_BASE_CPU = 620 * MIB
"""An idle worker: interpreter, torch, transformers, DeepSpeed, Ray, an open process group. Without Ray's connection,
which adds some 15 MiB, 550 to 660 were measured: pages of the libraries' files count as far as the kernel maps them,
which is more where the files were written recently."""
_BASE_PER_TOKEN = 1024
"""The tokenizer, per entry of the vocabulary."""
_FIRST_STEP = 50 * MIB
"""Allocated by libraries at their first use: scratch of matrix products, pages of code, transformers' imports for
generation."""
_PARTITIONS = 70 * MIB
"""DeepSpeed's many small tensors where gradients are exchanged in partitions, and once more for ZeRO-3's weights."""
_FRAGMENTATION = 1.15
"""On a CPU, resident bytes per live byte of activations: glibc keeps freed blocks below 32 MiB."""
_FRAGMENTATION_RECOMPUTED = 1.6
"""The same with gradient checkpointing, which allocates and frees each layer's tensors twice."""
_FRAGMENTATION_LORA = 2.0
"""The same with adapters, whose many small and short-lived tensors lie between the large ones."""

# Not measured: no GPU was available.
_BASE_CUDA = 768 * MIB
"""Context, libraries and communication buffers on the device, which torch's allocator does not report."""
_BASE_CUDA_HOST = 3 * GIB
"""Host memory of a worker process with CUDA's libraries loaded."""
_FRAGMENTATION_CUDA = 1.05

_TOKENS_PER_MASK_ENTRY = 8
"""Rejected answers attend through a mask; HH-RLHF's pairs keep about one entry per token for 8 of `max_tokens`."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one worker in bytes, by part. `peak` is below the sum where parts do not exist at the same time."""

    base: int
    """Process and libraries; on CUDA the device's context."""
    kept_weights: int
    """Weights read from files and kept for the worker's next trials; on CUDA these are in `host`."""
    weights: int
    optimizer: int
    """AdamW's moments, and the flat fp32 copies of trainable weights that ZeRO 1 and 2 update."""
    gradients: int
    """Gradients held until the end of the step."""
    buckets: int
    """Buffers in which ZeRO or the all-reduce moves gradients, and their results."""
    gathered: int
    """ZeRO-3: full weights gathered for a pass."""
    bf16_weights: int
    """Copies of weights that autocast makes for a pass."""
    activations: int
    """Tensors saved in the forward pass for the backward pass, including allocator fragmentation."""
    head: int
    """Log-probabilities: kept chunks, chunks in progress, and the head's gradient before accumulation."""
    host: int
    """CUDA: host memory of the process, offloaded state included. 0 on a CPU, where `peak` covers it."""
    peak: int
    """Peak on the training device: GPU memory on CUDA, resident memory on a CPU."""


def tokens_per_pass(config: ExperimentConfig, longest_pair: int | None = None) -> int:
    """Most tokens in one forward pass of a worker.

    Args:
        config: one trial's config.
        longest_pair: tokens of the longest pair of the data, its prompt counted once (twice where the model needs
            padded rows); by default the most that `data.max_tokens` admits.
    """
    shares = config.model.attention == "shared_prompt"
    longest = longest_pair or (2 * config.data.max_tokens - shares)  # a prompt of one token
    pairs = -(-config.train.global_batch_size // config.scaling.num_workers)
    pairs = min(pairs, config.train.micro_batch_size or pairs)
    return max(min(config.train.max_tokens_per_micro_batch, pairs * longest), longest)


def peak_memory(
    config: ExperimentConfig,
    architecture: Architecture,
    device: Device,
    *,
    longest_pair: int | None = None,
    is_first_trial: bool = False,
) -> Memory:
    """Peak memory of each worker of a trial; a pure function.

    At the end of a forward pass, memory holds weights, optimizer state, gradients of earlier passes, all activations
    and the head's chunks; at the end of the last backward pass, it holds the buckets instead of activations. A GPU
    reuses freed memory, so the larger of the two counts; a CPU's allocator returns little, so both count.

    The reference model of dpo and ipo runs without gradients before the trained model exists, so it never determines
    the peak, but its weights are kept. Evaluation and checkpoints stay below training. With `nvme` offload, DeepSpeed's
    own swap buffers are not counted.

    Args:
        config: one trial's config.
        architecture: its model's shape.
        device: device that the worker computes on.
        longest_pair: see `tokens_per_pass`.
        is_first_trial: whether the worker process runs no earlier trial, whose weights it would have kept.
    """
    a, zero, lora = architecture, config.deepspeed, config.model.lora
    stage, workers, cuda = zero.zero_stage, config.scaling.num_workers, device is Device.CUDA
    tokens = tokens_per_pass(config, longest_pair)
    all_weights, trainable = _FP32 * a.parameters, _FP32 * a.trainable(lora)
    part = -(-trainable // workers)  # each worker's share of partitioned state
    bucket = min(trainable, _FP32 * _BUCKET)
    buffer = _FP32 * _BUCKET if cuda else bucket

    weights = -(-all_weights // workers) if stage == 3 else all_weights
    moments = 2 * (part if stage else trainable)
    masters = part if stage in (1, 2) else 0
    gradients = trainable if stage < 2 else part
    gathered = min(all_weights, _FP32 * _MOST_GATHERED) if stage == 3 else 0
    match stage:
        case 0:
            standing, passing = 0, bucket if workers > 1 else 0
        case 1:
            standing, passing = buffer, part
        case 2:
            standing, passing = buffer * (2 if cuda else 1), part  # two where communication overlaps
        case _:
            # Partitioned, reduced, and on gloo copied once more.
            standing, passing = buffer, bucket + part + (bucket if workers > 1 and not cuda else 0)

    bf16 = _computes_bf16(config.train.precision, device)
    casts = 0 if not bf16 or device is Device.CPU else _BF16 * (a.linear_parameters + a.hidden * a.vocabulary)
    per_layer = activation_bytes_per_token(a, lora, device, bf16, config.data.max_tokens)
    fixed = _FP32 * tokens * (2 if lora else 3) * a.hidden
    if config.model.gradient_checkpointing:
        kept = tokens * _FP32 * a.hidden * a.layers
        working = tokens * _FP32 * (3 * a.intermediate + 2 * a.hidden)
        live = fixed + kept + tokens * per_layer + working
    else:
        live = fixed + tokens * per_layer * a.layers
    logits = _FP32 * tokens * a.vocabulary
    chunks = min(logits, _KEPT_BYTES) + 2 * min(logits, _CHUNK_BYTES)
    # Full gradients of head and embedding before they are summed.
    head_gradients = 0 if lora else 2 * _FP32 * a.vocabulary * a.hidden
    waste = _FRAGMENTATION_CUDA if cuda else _FRAGMENTATION_LORA if lora else _FRAGMENTATION
    head = int(waste * chunks) + head_gradients
    if config.model.gradient_checkpointing and not cuda:
        waste = max(waste, _FRAGMENTATION_RECOMPUTED)
    activations = int(waste * live)
    is_kept = a.read_from_files and (config.loss.needs_reference or not is_first_trial)
    kept_weights = all_weights if is_kept else 0

    host = on_host = 0
    if cuda:
        base = _BASE_CUDA
        host = _BASE_CUDA_HOST + _BASE_PER_TOKEN * a.vocabulary + kept_weights
        kept_weights = 0
    else:
        partitions = (stage == 3) + (stage >= 2 and workers > 1)
        base = _BASE_CPU + _BASE_PER_TOKEN * a.vocabulary + _FIRST_STEP + partitions * _PARTITIONS
    if zero.offload_optimizer != "none":
        # DeepSpeed updates on the CPU: masters, moments and gradients, and a copy in the weights' type.
        copies = part * (1 if stage == 3 else 2) + part
        offloaded = copies + (moments if zero.offload_optimizer == "cpu" else 0)
        if cuda:
            moments, masters, gradients, on_host = 0, 0, 0, offloaded
        else:
            moments, masters, gradients = offloaded, 0, 0
    if cuda:
        if zero.offload_param != "none":
            on_host, weights = on_host + (weights if zero.offload_param == "cpu" else 0), 0
        host += max(all_weights, on_host)  # every worker builds the whole model on the host before moving it

    states = base + kept_weights + weights + moments + masters + gradients + gathered
    forward, backward = casts + activations + head, passing + (head_gradients if stage == 0 else 0)
    peak = states + standing + (max(forward, backward) if cuda else forward + passing)
    return Memory(
        base=base,
        kept_weights=kept_weights,
        weights=weights,
        optimizer=moments + masters,
        gradients=gradients,
        buckets=standing + passing,
        gathered=gathered,
        bf16_weights=casts,
        activations=activations,
        head=head,
        host=host,
        peak=peak,
    )


def checkpoint_bytes(config: ExperimentConfig, architecture: Architecture) -> int:
    """Bytes of a trial's checkpoint, over all workers.

    Checkpoints omit frozen weights, so LoRA saves only adapters, and a head that shares the embedding's weights, which
    DeepSpeed does not omit under its second name.
    """
    lora, stage = config.model.lora, config.deepspeed.zero_stage
    trainable = _FP32 * architecture.trainable(lora)
    shared_head = _FP32 * architecture.vocabulary * architecture.hidden if lora and architecture.tied else 0
    # ZeRO 1 and 2 write the weights twice: the model's, and the flat copies that the optimizer updates.
    return trainable * (4 if stage in (1, 2) else 3) + (shared_head if stage < 3 else 0)


def precision_on(precision: str, device: Device) -> Literal["bf16", "fp32"]:
    """Type of matrix products with a `train.precision` on a device; every GPU is assumed to support bf16."""
    return "bf16" if _computes_bf16(precision, device) else "fp32"


def _computes_bf16(precision: str, device: Device) -> bool:
    return precision == "bf16" or (precision == "auto" and device is not Device.CPU)


def activation_bytes_per_token(
    a: Architecture, lora: LoraConfig | None, device: Device, bf16: bool, max_tokens: int
) -> int:
    """Bytes that one layer saves per token for the backward pass; a test compares with autograd's saved tensors.

    A norm saves its input, the normalised input and, as the input of the next layers, its output; attention saves
    queries, keys, values and output; a gated MLP saves four tensors of its inner width. On a CPU the keys and values of
    the prompt are saved twice (see `models.attention`).
    """
    mlp = (4 if a.gated else 2) * a.intermediate
    key_values = 2 * a.key_value * (1 if device is Device.CUDA else 2)
    mask = 0 if device is Device.CUDA else max_tokens // _TOKENS_PER_MASK_ENTRY
    norms = 4 if lora is None else 2  # frozen norms do not need the normalised input
    if not bf16:
        size = _FP32 * ((norms + 2) * a.hidden + 3 * a.attention + key_values + mlp + mask)
    elif device is Device.CPU:
        # fp32 norms and attention; the linear layers save their inputs in the type they arrive in, and return bf16.
        size = _FP32 * ((norms + 2) * a.hidden + 2 * a.attention + key_values + mask) + _BF16 * (a.attention + mlp)
        size += _FP32 * (a.attention + a.intermediate) if lora else 0  # peft casts an adapter's input to fp32
    else:
        # Autocast makes a bf16 copy of the norm's output for each linear layer that follows.
        copies = 3 + (2 if a.gated else 1)
        size = _FP32 * norms * a.hidden + _BF16 * (copies * a.hidden + mlp)
        if device is Device.CUDA:
            size += _BF16 * (3 * a.attention + key_values)
        else:  # fp32 attention, whose output continues in bf16
            size += _FP32 * (2 * a.attention + key_values + mask) + _BF16 * a.attention
    if lora is not None:
        adapters = 7 if a.gated else 6
        size += adapters * lora.rank * (_BF16 if bf16 else _FP32)
        if lora.dropout:  # a copy of each adapted input after dropout, and the dropout mask
            inputs = 3 * a.hidden + a.attention + (2 if a.gated else 1) * a.hidden + a.intermediate
            size += inputs * (_FP32 + 1)
    return size
