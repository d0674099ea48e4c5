"""Which of a trial's checkpoints stands for it, here and in an object store."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from orpo_ray.config import CheckpointConfig
from orpo_ray.storage.checkpoint_files import (
    MANIFEST,
    best_step,
    chosen,
    remove_others,
    remove_others_from_store,
    steps_to_keep,
    tidy_and_list,
)
from orpo_ray.storage.object_store import Storage

LOSSES = {4: 2.0, 8: 1.0, 12: 3.0}


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    """A trial's folder with a checkpoint of one file at each step."""
    folder = tmp_path / "store" / "trial"
    for step, loss in LOSSES.items():
        path = folder / f"step-{step:08d}"
        path.mkdir(parents=True)
        (path / "weights.pt").write_bytes(content := f"of step {step}".encode())
        facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = {"step": step, "progress": {"metrics": {"eval/nll": loss}}, "files": {"weights.pt": facts}}
        (path / MANIFEST).write_text(json.dumps(manifest))
    (folder / "step-00000016.partial").mkdir()
    (folder / "step-00000020").mkdir()  # no manifest: it never was one
    return folder


@pytest.mark.parametrize("is_remote", [False, True], ids=["folder", "object store"])
def test_the_newest_or_the_best(trial: Path, tmp_path: Path, is_remote: bool) -> None:
    here, remote = (tmp_path / "here", Storage(f"file://{trial}")) if is_remote else (trial, None)
    assert chosen(here, None, remote) == here / "step-00000012"
    assert chosen(here, "eval/nll", remote) == here / "step-00000008"
    assert (here / "step-00000008" / "weights.pt").read_bytes() == b"of step 8"
    (trial / "step-00000008" / "weights.pt").write_bytes(b"of step 9")
    (here / "step-00000008" / "weights.pt").write_bytes(b"of step 9")
    assert chosen(here, "eval/nll", remote) == here / "step-00000012", "a damaged best one is no choice"


def test_none_is_chosen_where_there_is_none(tmp_path: Path) -> None:
    assert chosen(tmp_path) is None
    assert chosen(tmp_path / "here", "eval/nll", Storage(f"file://{tmp_path}/nowhere")) is None


def test_of_equal_ones_the_newest_is_the_best() -> None:
    metrics = {4: {"eval/preference_accuracy": 0.5}, 8: {"eval/preference_accuracy": 0.5}, 12: {}}
    assert best_step(metrics, "eval/preference_accuracy") == 8
    assert best_step({4: {"eval/nll": 1.0}, 8: {"eval/nll": 2.0}}, "eval/nll") == 4
    assert best_step(metrics, None) is None


def test_unfinished_checkpoints_go_and_the_others_are_listed(trial: Path, tmp_path: Path) -> None:
    """A folder without a manifest is listed, so that its damage is reported; in a store it is an interrupted upload."""
    (trial / "step-00000020" / "weights.pt").write_bytes(b"half")
    (trial / "pairs.parquet").write_bytes(b"beside the checkpoints")
    listed = {f"step-{step:08d}": {"eval/nll": loss} for step, loss in LOSSES.items()}
    here = tmp_path / "here"
    assert tidy_and_list(trial) == listed | {"step-00000020": {}}
    assert not (trial / "step-00000016.partial").exists()
    assert tidy_and_list(here, Storage(f"file://{trial}")) == listed
    assert not (trial / "step-00000020" / "weights.pt").exists()
    assert (here / "pairs.parquet").read_bytes() == b"beside the checkpoints"


@pytest.mark.parametrize("is_remote", [False, True], ids=["folder", "object store"])
def test_the_newest_and_the_best_are_kept(trial: Path, is_remote: bool) -> None:
    metrics = {step: {"eval/nll": loss} for step, loss in LOSSES.items()}
    keep = steps_to_keep(metrics, CheckpointConfig(keep_last=1, keep_best="eval/nll"))
    assert keep == {8, 12}
    if is_remote:
        remove_others_from_store(Storage(f"file://{trial}"), keep, before=12)
    else:
        remove_others(trial, keep, before=12)
    kept = {int(path.parent.name[5:]) for path in trial.glob("step-*/weights.pt")}
    assert kept == keep
    assert (trial / "step-00000020").exists(), "newer ones are not touched"
