"""Golden losses, and a resumed trial that reproduces the tail of the undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_ray.config import ExperimentConfig
from tests.golden.make_golden import CONFIG, METRICS, read
from tests.support.ranks import Job, Record, experiment, train, train_all

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.core
def test_golden_losses(cache: Path, tmp_path: Path) -> None:
    record = train(experiment(cache, **CONFIG), tmp_path)
    golden = read()
    assert sorted(golden) == sorted(record.logs)
    for metric in METRICS:
        assert record.curve(metric) == pytest.approx([golden[s][metric] for s in sorted(golden)], rel=1e-5, abs=1e-6)


@pytest.mark.core
@pytest.mark.parametrize(("workers", "stages"), [(1, [0, 3]), (2, [1, 2, 3])], ids=["1 worker", "2 workers"])
def test_resume_reproduces_the_tail(workers: int, stages: list[int], cache: Path, tmp_path: Path) -> None:
    # LoRA's dropout makes the random state part of what must be resumed.
    lora = {"model.lora": {"rank": 4, "dropout": 0.1}}
    jobs = []
    for stage in stages:
        settings = {"scaling.num_workers": workers, "deepspeed.zero_stage": stage}
        # Few tokens: several passes per step, of uneven size.
        config = experiment(cache, **settings, **lora, **{"train.max_tokens_per_micro_batch": 300})
        whole, cut = tmp_path / f"whole-{stage}", tmp_path / f"cut-{stage}"
        jobs += [Job(config, whole), Job(config, cut, stop_at=10), Job(config, cut)]
    records = train_all(jobs)
    for whole, first, second in zip(records[::3], records[1::3], records[2::3], strict=True):
        assert (first.result.status, first.result.steps) == ("stopped_early", 10)
        assert second.started_at == 10
        assert sorted(second.logs) == list(range(11, 21))
        _same(second, whole, range(11, 21))
        assert second.result.metrics == pytest.approx(whole.result.metrics, rel=1e-5, abs=1e-6)


def test_full_fine_tuning_resumes_exactly_in_another_process(cache: Path, tmp_path: Path) -> None:
    whole = train(experiment(cache), tmp_path / "whole")
    train(experiment(cache), tmp_path / "cut", stop_at=10)
    second = train(experiment(cache), tmp_path / "cut", fresh=True)
    _same(second, whole, range(11, 21), rel=0)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(cache: Path, tmp_path: Path) -> None:
    config = experiment(cache, **{"train.max_steps": 8, "train.eval_every": 2})
    damages = ("truncated", "bit flipped", "missing")
    cut = [Job(config, tmp_path / damage, stop_at=6) for damage in damages]
    whole, *_ = train_all([Job(config, tmp_path / "whole"), *cut])
    for damage in damages:
        assert sorted(p.name for p in (tmp_path / damage).glob("step-*")) == ["step-00000004", "step-00000006"]
        victim = tmp_path / damage / "step-00000006" / "engine" / "mp_rank_00_model_states.pt"
        content = bytearray(victim.read_bytes())
        if damage == "missing":
            victim.unlink()
        elif damage == "truncated":
            victim.write_bytes(content[:-7])
        else:
            content[len(content) // 2] ^= 1
            victim.write_bytes(content)
    for record in train_all([Job(config, tmp_path / damage) for damage in damages]):
        assert record.started_at == 4
        assert "step-00000006: mp_rank_00_model_states.pt" in record.problems[0]
        assert "going on from step 4" in record.problems[0]
        _same(record, whole, range(5, 9), rel=0)
        assert record.result.metrics == whole.result.metrics


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)], ids=["2 to 1 workers", "1 to 2 workers"])
def test_another_number_of_workers_goes_on(before: int, after: int, cache: Path, tmp_path: Path) -> None:
    def config(stage: int, workers: int) -> ExperimentConfig:
        settings = {"deepspeed.zero_stage": stage, "scaling.num_workers": workers}
        return experiment(cache, **settings, **{"train.max_steps": 6, "train.eval_every": 3})

    stages = range(4)
    train_all([Job(config(stage, before), tmp_path / f"cut-{stage}", stop_at=3) for stage in stages])
    jobs = [
        (Job(config(s, after), tmp_path / f"whole-{s}"), Job(config(s, after), tmp_path / f"cut-{s}")) for s in stages
    ]
    records = train_all([job for pair in jobs for job in pair])
    for whole, record in zip(records[::2], records[1::2], strict=True):
        assert record.started_at == 3
        _same(record, whole, range(4, 7), rel=1e-4)
        assert record.result.metrics == pytest.approx(whole.result.metrics, rel=1e-4)


def test_another_zero_stage_is_refused(cache: Path, tmp_path: Path) -> None:
    settings = {"train.max_steps": 4, "train.eval_every": 2}
    train(experiment(cache, **settings), tmp_path, stop_at=2)
    with pytest.raises(AssertionError, match=r"CheckpointError.*zero_stage 0, this run has 1"):
        train(experiment(cache, **settings, **{"deepspeed.zero_stage": 1}), tmp_path)


def test_preemption_between_two_reports_loses_nothing(cache: Path, tmp_path: Path) -> None:
    config = experiment(
        cache, **{"train.max_steps": 12, "train.eval_every": 6, "train.log_every": 4, "scaling.num_workers": 2}
    )
    whole = train(config, tmp_path / "whole")
    jobs = [Job(config, tmp_path / "cut", preempted_at=7), Job(config, tmp_path / "cut")]
    first, second = train_all(jobs)
    assert (first.result.status, first.result.steps) == ("preempted", 7)
    assert second.started_at == 7
    assert sorted(second.logs) == [8, 12]
    _same(second, whole, range(8, 13, 4))


def test_divergence_ends_the_trial_with_step_and_pairs(cache: Path, tmp_path: Path) -> None:
    record = train(experiment(cache, **{"optim.lr": 1e30, "optim.warmup_ratio": 0.0}), tmp_path)
    assert record.result.status == "diverged"
    assert record.result.steps == 2
    assert "step 2, a batch of 8 pair(s): style-pairs:" in record.result.error
    assert record.result.metrics == {}


def _same(resumed: Record, whole: Record, steps: range, rel: float = 1e-5) -> None:
    for metric in ("train/loss", "train/log_odds", "train/grad_norm", "train/lr"):
        expected = [whole.logs[step][metric] for step in steps]
        assert [resumed.logs[step][metric] for step in steps] == pytest.approx(expected, rel=rel, abs=0)
