"""Law 2: the same data gives the same gradient however it is cut. Real DeepSpeed, real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from tests.support.forwards import PLAIN, logps
from tests.support.ranks import Job, experiment, train_all

pytestmark = pytest.mark.slow
PAIRS_1, PAIRS_4 = {"train.micro_batch_size": 1}, {"train.micro_batch_size": 4}
TOKENS = {"train.max_tokens_per_micro_batch": 300}  # a few pairs: uneven micro-batches, and not one for every rank
PADDED = {"model.attention": "sdpa"} | TOKENS


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def plain_torch(cache: Path) -> list[float]:
    """20 steps of the same objective with plain torch: whole batch at once, padded, full logits, AdamW, clipping."""
    from orpo_ray.data.dataset import batch_indices
    from orpo_ray.models.loading import build_model
    from orpo_ray.training import loss, schedule, steps

    torch.set_num_threads(1)
    config = experiment(cache)
    pairs, _ = steps._pairs(config.data, config.model)
    model = build_model(config.model, config.train.seed)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=config.optim.lr
    )
    curve = []
    for step in range(1, 21):
        indices = batch_indices(step, len(pairs), config.train.global_batch_size, config.train.seed)
        members = [pairs[int(i)] for i in indices]
        counts = loss.BatchCounts(len(members), sum(len(p.prompt_ids) - 1 + len(p.chosen_ids) for p in members))
        terms = loss.from_config(config.loss)(logps(model, members, form=PLAIN), counts)
        optimizer.zero_grad()
        terms.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(config.optim, step, 20)
        optimizer.step()
        curve.append(float(terms.loss.detach()))
    return curve


@pytest.mark.core
@pytest.mark.parametrize(
    ("workers", "cuts"),
    [
        (1, [({}, 0), (PAIRS_4, 0), (PADDED, 0), (TOKENS, 0), (PAIRS_1, 1), (TOKENS, 2), (PAIRS_4, 3)]),
        (2, [({}, 0), (PAIRS_1, 1), (TOKENS, 1), (TOKENS, 2), (PADDED, 2), (PAIRS_1, 3), (TOKENS, 3)]),
    ],
    ids=["1 worker", "2 workers"],
)
def test_loss_curve_is_plain_torch_s_for_every_cut_and_stage(
    workers: int, cuts: list[tuple[dict[str, Any], int]], cache: Path, plain_torch: list[float], tmp_path: Path
) -> None:
    jobs = [
        Job(
            experiment(cache, **{"scaling.num_workers": workers, "deepspeed.zero_stage": stage}, **cut),
            tmp_path / str(number),
        )
        for number, (cut, stage) in enumerate(cuts)
    ]
    for (cut, stage), record in zip(cuts, train_all(jobs), strict=True):
        case = f"{cut}, ZeRO {stage}"
        assert record.curve("train/loss") == pytest.approx(plain_torch, rel=1e-5), case
        assert set(record.evals) == {10, 20}, case


@pytest.mark.core
@pytest.mark.parametrize("reduction", ["token", "pair"])
def test_gradients_are_equal_for_every_cut(reduction: str, cache: Path) -> None:
    """4×1, 2×2 and 1×4 in one process, to 1e-6; batches of unequal lengths, where micro-batch means would differ."""
    from orpo_ray.data.dataset import batch_indices
    from orpo_ray.models.loading import build_model
    from orpo_ray.training import loss, steps

    torch.set_num_threads(1)
    config = experiment(cache, **{"loss.nll_reduction": reduction})
    pairs, _ = steps._pairs(config.data, config.model)
    indices = batch_indices(1, len(pairs), 4, seed=7)
    tokens = [len(pairs[int(i)].prompt_ids) - 1 + len(pairs[int(i)].chosen_ids) for i in indices]
    assert len(set(tokens)) > 1
    counts = loss.BatchCounts(4, sum(tokens))

    def gradient(micro: int) -> torch.Tensor:
        model = build_model(config.model, seed=1)
        for start in range(0, 4, micro):
            members = [pairs[int(i)] for i in indices[start : start + micro]]
            loss.from_config(config.loss)(logps(model, members), counts).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(4)
    for micro in (1, 2):
        assert torch.linalg.vector_norm(gradient(micro) - whole) / torch.linalg.vector_norm(whole) < 1e-6


def test_bf16_and_offload_follow_fp32(cache: Path, tmp_path: Path) -> None:
    short = {"train.max_steps": 10} | TOKENS  # several passes per step: offload adds gradients up on the host
    stages = [{"zero_stage": stage, "offload_optimizer": "cpu"} for stage in (1, 2)]
    stages.append({"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"})
    fp32, bf16, *offloaded = train_all(
        [
            Job(experiment(cache, **short), tmp_path / "fp32"),
            Job(experiment(cache, **short, **{"train.precision": "bf16"}), tmp_path / "bf16"),
            *(
                Job(experiment(cache, **short, deepspeed=stage), tmp_path / f"off{stage['zero_stage']}")
                for stage in stages
            ),
        ]
    )
    assert bf16.curve("train/loss") == pytest.approx(fp32.curve("train/loss"), rel=5e-3)
    assert bf16.curve("train/loss") != fp32.curve("train/loss")
    for record in offloaded:
        assert record.curve("train/loss") == pytest.approx(fp32.curve("train/loss"), rel=1e-5)


def test_untied_head_and_adapters_on_it_under_every_stage(
    cache: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The head's weight is read outside its own module, where ZeRO-3 must gather it; with adapters, inside."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "untied")
    tokenizer.save_pretrained(tmp_path / "untied")
    untied = {"model.path": str(tmp_path / "untied"), "train.max_steps": 6, "train.eval_every": 6} | TOKENS
    adapted = untied | {"model.lora": {"rank": 4, "target_modules": ["q_proj", "lm_head"]}}
    recomputed = untied | {"model.gradient_checkpointing": True}
    kinds = {"full": untied, "adapters": adapted, "checkpointing": recomputed}
    cases = [(kind, stage) for kind in kinds for stage in (0, 2, 3)]
    two = {"scaling.num_workers": 2}
    records = train_all(
        [
            Job(
                experiment(cache, **kinds[kind], **two, **{"deepspeed.zero_stage": stage}), tmp_path / f"{kind}-{stage}"
            )
            for kind, stage in cases
        ]
    )
    curves = {case: record.curve("train/loss") for case, record in zip(cases, records, strict=True)}
    for (kind, stage), curve in curves.items():
        assert curve == pytest.approx(curves[kind, 0], rel=1e-5), f"{kind}, ZeRO {stage}"
        assert curve[-1] < curve[0]
    assert curves["full", 0] == pytest.approx(curves["checkpointing", 0], rel=1e-5)
    assert curves["full", 0] != curves["adapters", 0]
