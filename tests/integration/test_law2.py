"""Law 2: the same data gives the same gradient however it is cut. Real DeepSpeed, real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import Job, experiment, train_all

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def plain_torch(cache: Path) -> list[float]:
    """20 steps of the same objective written out with plain torch: whole batch at once, AdamW, clipping."""
    from orpo_ray import loop, loss
    from orpo_ray.data import batch_indices
    from orpo_ray.forward import collate, nll_tokens, pair_logps
    from orpo_ray.model import build_model, load_tokenizer

    torch.set_num_threads(1)
    config = experiment(cache)
    pairs, _ = loop._pairs(config.data, config.model)
    model = build_model(config.model, config.train.seed)
    pad = int(load_tokenizer(config.model).pad_token_id)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=config.optim.lr
    )
    curve = []
    for step in range(1, 21):
        indices = batch_indices(step, len(pairs), config.train.global_batch_size, config.train.seed)
        members = [pairs[int(i)] for i in indices]
        tokens = nll_tokens(pairs.prompt_lengths_N[indices], pairs.chosen_lengths_N[indices], "prompt_and_response")
        counts = loss.BatchCounts(len(members), int(tokens.sum()))
        terms = loss.from_config(config.loss)(pair_logps(model, collate(members, pad, "prompt_and_response")), counts)
        optimizer.zero_grad()
        terms.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(config.optim, step, 20)
        optimizer.step()
        curve.append(float(terms.loss.detach()))
    return curve


@pytest.mark.parametrize(
    ("workers", "cuts"),
    [(1, [(8, 0), (4, 0), (1, 0), (4, 1), (4, 2), (4, 3)]), (2, [(4, 0), (1, 1), (2, 2), (4, 3)])],
    ids=["1 worker", "2 workers"],
)
def test_loss_curve_is_plain_torch_s_for_every_cut_and_stage(
    workers: int, cuts: list[tuple[int, int]], cache: Path, plain_torch: list[float], tmp_path: Path
) -> None:
    jobs = [
        Job(
            experiment(
                cache,
                **{"scaling.num_workers": workers, "train.micro_batch_size": micro, "deepspeed.zero_stage": stage},
            ),
            tmp_path / f"{micro}-{stage}",
        )
        for micro, stage in cuts
    ]
    for (micro, stage), record in zip(cuts, train_all(jobs), strict=True):
        case = f"micro-batch {micro}, ZeRO {stage}"
        assert record.curve("train/loss") == pytest.approx(plain_torch, rel=1e-5), case
        assert set(record.evals) == {10, 20}, case


@pytest.mark.parametrize("reduction", ["token", "pair"])
def test_gradients_are_equal_for_every_cut(reduction: str, cache: Path) -> None:
    """4×1, 2×2 and 1×4 in one process, to 1e-6; batches of unequal lengths, where micro-batch means would differ."""
    from orpo_ray import loop, loss
    from orpo_ray.data import batch_indices
    from orpo_ray.forward import collate, nll_tokens, pair_logps
    from orpo_ray.model import build_model, load_tokenizer

    torch.set_num_threads(1)
    config = experiment(cache, **{"loss.nll_reduction": reduction})
    pairs, _ = loop._pairs(config.data, config.model)
    pad = int(load_tokenizer(config.model).pad_token_id)
    indices = batch_indices(1, len(pairs), 4, seed=7)
    tokens_N = nll_tokens(pairs.prompt_lengths_N[indices], pairs.chosen_lengths_N[indices], "prompt_and_response")
    assert len(set(tokens_N.tolist())) > 1
    counts = loss.BatchCounts(4, int(tokens_N.sum()))

    def gradient(micro: int) -> torch.Tensor:
        model = build_model(config.model, seed=1)
        for start in range(0, 4, micro):
            batch = collate([pairs[int(i)] for i in indices[start : start + micro]], pad, "prompt_and_response")
            loss.from_config(config.loss)(pair_logps(model, batch), counts).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(4)
    for micro in (1, 2):
        assert torch.linalg.vector_norm(gradient(micro) - whole) / torch.linalg.vector_norm(whole) < 1e-6


def test_bf16_and_offload_follow_fp32(cache: Path, tmp_path: Path) -> None:
    short = {"train.max_steps": 10}
    offload = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}
    fp32, bf16, offloaded = train_all(
        [
            Job(experiment(cache, **short), tmp_path / "fp32"),
            Job(experiment(cache, **short, **{"train.precision": "bf16"}), tmp_path / "bf16"),
            Job(experiment(cache, **short, deepspeed=offload), tmp_path / "offloaded"),
        ]
    )
    assert bf16.curve("train/loss") == pytest.approx(fp32.curve("train/loss"), rel=5e-3)
    assert bf16.curve("train/loss") != fp32.curve("train/loss")
    assert offloaded.curve("train/loss") == pytest.approx(fp32.curve("train/loss"), rel=1e-5)
