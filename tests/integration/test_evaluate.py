"""What the held-out pass keeps of every pair: the same on all ranks, and what the metrics are averages of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orpo_ray.config import METRIC_MODES
from orpo_ray.storage.pair_scores import PAIRS_FILE, PairScores
from tests.support.ranks import Job, Record, experiment, train_all

pytestmark = pytest.mark.slow
# Weights stay what they were, so that only the cut differs; 7 pairs, so that a rank is left without one.
STILL = {"optim.lr": 1e-20, "train.max_steps": 2, "train.eval_every": 1, "data.eval_pairs": 7}
UNEVEN = {"train.max_tokens_per_micro_batch": 300}
LOSSES: list[dict[str, Any]] = [
    {"loss.orpo_lambda": 0.5},
    {"loss.orpo_lambda": 0.5, "loss.nll_reduction": "pair", "loss.nll_scope": "response"},
    {"loss.orpo_lambda": 0.5, "loss.preset": "authors"},
    {"loss.name": "cpo", "loss.nll_weight": 0.3},
    {"loss.name": "dpo"},
    {"loss.name": "sft"},
]
COLUMNS = [name for name in PairScores.__dataclass_fields__ if name.endswith("_N")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def runs(cache: Path, folder: Path, settings: list[dict[str, Any]]) -> list[tuple[Record, PairScores]]:
    jobs = [Job(experiment(cache, **STILL, **s), folder / str(number)) for number, s in enumerate(settings)]
    records = train_all(jobs)
    return [(record, PairScores.load(job.trial_dir / PAIRS_FILE)) for record, job in zip(records, jobs, strict=True)]


@pytest.fixture(scope="module")
def one_rank(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Record, PairScores]]:
    return runs(cache, tmp_path_factory.mktemp("one"), LOSSES)


def test_metrics_are_what_the_pairs_average_to(one_rank: list[tuple[Record, PairScores]]) -> None:
    for settings, (record, scores) in zip(LOSSES, one_rank, strict=True):
        assert set(record.evals) == {1, 2}
        assert scores.step == 2  # of the latest evaluation
        assert len(scores.pair_ids_N) == 7
        for metric in METRIC_MODES:
            # The loss and its NLL are shares in fp32, the others sums in fp64.
            precision = 1e-6 if metric in ("eval/loss", "eval/nll") else 1e-12
            assert scores.value(metric) == pytest.approx(record.evals[2][metric], rel=precision), (settings, metric)
        assert record.evals[2]["eval/chosen_logp"] == pytest.approx(scores.chosen_logp_N.mean(dtype=float), rel=1e-12)
    values = [record.evals[2]["eval/nll"] for record, _ in one_rank]
    assert len({round(value, 6) for value in values[:3]}) == 3  # scope, reduction and EOS do tell


@pytest.mark.parametrize(
    "settings",
    [
        {"scaling.num_workers": 2, "deepspeed.zero_stage": 3, **UNEVEN},
        {"scaling.num_workers": 2, "deepspeed.zero_stage": 2, "model.attention": "sdpa"},
    ],
    ids=["ZeRO 3", "ZeRO 2, padded"],
)
def test_two_ranks_keep_what_one_keeps(
    settings: dict[str, Any], one_rank: list[tuple[Record, PairScores]], cache: Path, tmp_path: Path
) -> None:
    found = runs(cache, tmp_path, [LOSSES[0] | settings, LOSSES[4] | settings])
    for (record, scores), (_, alone) in zip(found, (one_rank[0], one_rank[4]), strict=True):
        assert np.array_equal(scores.pair_ids_N, alone.pair_ids_N)
        for column in COLUMNS[1:]:
            # From another cut the same to fp32's rounding; sums of log-probabilities are up to a thousand nats.
            assert np.allclose(getattr(scores, column), getattr(alone, column), rtol=1e-5, atol=1e-5), column
        for metric in METRIC_MODES:
            assert scores.value(metric) == pytest.approx(record.evals[2][metric], rel=1e-6), metric


def test_after_a_resume_the_file_is_of_the_latest_evaluation(cache: Path, tmp_path: Path) -> None:
    config = experiment(cache, **STILL | {"optim.lr": 1e-3})
    (first,) = train_all([Job(config, tmp_path, stop_at=1)])
    stopped = PairScores.load(tmp_path / PAIRS_FILE)
    (second,) = train_all([Job(config, tmp_path)])
    ended = PairScores.load(tmp_path / PAIRS_FILE)
    assert (stopped.step, ended.step, second.started_at) == (1, 2, 1)
    assert stopped.value("eval/log_odds") == pytest.approx(first.evals[1]["eval/log_odds"], rel=1e-12)
    assert ended.value("eval/log_odds") == pytest.approx(second.evals[2]["eval/log_odds"], rel=1e-12)
