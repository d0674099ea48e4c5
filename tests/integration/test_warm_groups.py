"""Worker groups over many trials: of several sizes, replaced in time, and never growing."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import pytest

from tests.support.real_sweeps import Sweeps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TINY = {
    "train.max_steps": 2,
    "train.eval_every": 2,
    "train.log_every": 1,
    "train.global_batch_size": 2,
    "data.eval_pairs": 2,
    "train.checkpoint_every": 2,
}
RATES = [1e-4, 2e-4, 3e-4, 4e-4, 5e-4]


def test_fifty_trials_on_one_group_leave_nothing_behind(sweeps: Sweeps) -> None:
    """Two sizes and adapters in turn, in one process: its memory and its open files stay what they were."""
    space = {
        "optim.lr": {"type": "grid", "values": [1e-4 * 1.1**i for i in range(17)]},
        "model": {
            "type": "bundle",
            "values": {
                "1m": {"model.path": "tiny-llama-1m"},
                "2m": {"model.path": "tiny-llama-2m"},
                "1m-lora": {"model.path": "tiny-llama-1m", "model.lora": {"rank": 4}},
            },
        },
    }
    file = sweeps.write("fifty", {"metric": "eval/nll", "max_concurrent": 1, "space": space}, **TINY)
    process = sweeps.start("sweep", str(file))
    pid = int(sweeps.wait_for("fifty", "started")["processes"][0].rsplit(":", 1)[1])
    worker = psutil.Process(pid)
    mib: dict[int, float] = {}
    files: dict[int, int] = {}
    while process.poll() is None:
        ended = sum(e["event"] == "finished" for e in sweeps.events("fifty"))
        try:
            mib[ended], files[ended] = worker.memory_info().rss / 2**20, worker.num_fds()
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert [t["status"] for t in sweeps.results("fifty")["trials"]] == ["finished"] * 51
    groups = {e["group"] for e in sweeps.events("fifty") if e["event"] == "started"}
    assert len(groups) == 1
    # By then allocator pools and caches are filled. A trial of the larger model holds 35 MB of state.
    middle, last = (max(v for k, v in mib.items() if a <= k < b) for a, b in ((20, 26), (45, 51)))
    assert last - middle < 25, f"{last - middle:.0f} MiB over 25 trials: {mib}"
    early, late = (max(v for k, v in files.items() if a <= k < b) for a, b in ((5, 10), (45, 51)))
    assert late <= early + 2, f"open files: {files}"


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweeps]:
    """A finished sweep of that name, whose groups may have two trials each."""
    sweeps = Sweeps(tmp_path_factory.mktemp("replaced"))
    sweep = {
        "metric": "eval/nll",
        "max_concurrent": 1,
        "max_group_trials": 2,
        "space": {"optim.lr": {"type": "grid", "values": RATES}},
    }
    sweeps.run("sweep", str(sweeps.write("replaced", sweep, **TINY)))
    yield sweeps
    sweeps.close()


def test_groups_are_replaced_after_so_many_trials(replaced: Sweeps) -> None:
    started = [e["group"] for e in replaced.events("replaced") if e["event"] == "started"]
    assert [t["status"] for t in replaced.results("replaced")["trials"]] == ["finished"] * 5
    assert started == sorted(started), "a replaced group took another trial"
    assert 2 <= len(set(started)) <= 3
    assert all(started.count(group) <= 4 for group in started)


def test_an_earlier_sweep_in_mlflow_informs_the_next(replaced: Sweeps) -> None:
    known = {t["params"]["optim.lr"]: t for t in replaced.results("replaced")["trials"]}
    new = 1.0e-3
    space = {"optim.lr": {"type": "grid", "values": [*RATES, new]}}
    second = {"metric": "eval/nll", "space": space, "warm_start": "orpo-ray"}
    # Speed is another matter: the number of workers does not make it another trial.
    file = replaced.write("second", second, **TINY, **{"scaling.num_workers": 2})
    output = replaced.run("sweep", str(file))
    assert "warm start: 5 of 5 finished trials of orpo-ray differ only in the axes" in output
    events, trials = replaced.events("second"), replaced.results("second")["trials"]
    assert sorted(t["params"]["optim.lr"] for t in trials) == [*RATES, new]
    for trial in trials:
        lr = trial["params"]["optim.lr"]
        started = any(e["event"] == "started" and e["trial_id"] == trial["trial_id"] for e in events)
        assert trial["status"] == "finished"
        assert started == (lr == new)
        if lr in known:
            assert trial["reused_from"] == known[lr]["mlflow_run_id"]
            assert trial["metrics"]["eval/nll"] == pytest.approx(known[lr]["metrics"]["eval/nll"])
    around = {"optim.lr": {"type": "loguniform", "low": RATES[0], "high": new}}
    third = {"metric": "eval/nll", "num_samples": 1, "space": around, "warm_start": "orpo-ray"}
    other = replaced.write("other", third, **TINY, **{"loss.nll_scope": "response"})
    output = replaced.run("sweep", str(other))
    assert "warm start: 0 of" in output
    assert "most differ in loss.nll_scope" in output
