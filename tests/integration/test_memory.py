"""Engines come and go in a warm worker; their memory must go with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import Job, experiment, train_all

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("stage", "workers"), [(2, 2), (3, 2)])
def test_memory_is_flat_over_many_trials(stage: int, workers: int, tmp_path: Path) -> None:
    settings = {"train.max_steps": 1, "train.log_every": 1, "train.eval_every": 1, "data.eval_pairs": 2}
    config = experiment(
        tmp_path / "cache", **settings, **{"deepspeed.zero_stage": stage, "scaling.num_workers": workers}
    )
    records = train_all([Job(config, tmp_path / f"trial-{i}") for i in range(24)], fresh=True)
    gib = [record.logs[1]["perf/peak_memory_gib"] for record in records]
    # The first trials fill allocator pools and caches. One trial holds 14 MB: weights, gradients, moments in fp32.
    growth_mib = (gib[23] - gib[11]) * 1024 / 12
    assert growth_mib < 2, f"{growth_mib:.1f} MiB per trial: {[round(g, 3) for g in gib]}"
