"""Hostile working directories, object stores and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from orpo_ray.cluster.upload import files_to_send
from orpo_ray.config import CheckpointConfig
from orpo_ray.storage.object_store import Storage
from tests.support.hostile.case import Case, Feed, Make
from tests.support.hostile.pickles import RunsCode


def _link_out(folder: Path) -> Feed:
    (folder / "job").mkdir()
    (folder / "private").mkdir()
    (folder / "private" / "key").write_text("x")
    (folder / "job" / "data").symlink_to(folder / "private")
    return lambda: files_to_send(folder / "job")


def _link_round(folder: Path) -> Feed:
    (folder / "job" / "a").mkdir(parents=True)
    (folder / "job" / "a" / "b").symlink_to(folder / "job")
    return lambda: files_to_send(folder / "job")


class _Listing(Storage):
    """A store that lists what an object store may, and a folder cannot."""

    def list(self, folder: str = "") -> dict[str, int]:
        return {"../../ran": 1}


class _AbsoluteListing(Storage):
    def list(self, folder: str = "") -> dict[str, int]:
        return {"/ran": 1}


def _brought(store: type[Storage]) -> Make:
    def make(folder: Path) -> Feed:
        from orpo_ray.storage import sync

        (folder / "runs" / "a").mkdir(parents=True)
        return lambda: sync.pull(folder / "runs" / "a", store(f"file://{folder}/store", patience_s=1.0))

    return make


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A process group of one."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _checkpoint(folder: Path, contents: dict[str, object], stage: int = 0) -> Path:
    """A whole checkpoint, by its manifest."""
    import torch

    from orpo_ray.storage.checkpoint_files import MANIFEST, file_facts

    path = folder / "trial" / "step-00000002"
    (path / "engine").mkdir(parents=True)
    for name, content in contents.items():
        torch.save(content, path / name)
    files = {name: file_facts(path / name) for name in contents}
    about = {"step": 2, "num_workers": 1, "zero_stage": stage, "progress": {}, "files": files}
    (path / MANIFEST).write_text(json.dumps(about))
    return path


def _weights_of_checkpoint(stage: int, *names: str) -> Make:
    def make(folder: Path) -> Feed:
        from orpo_ray.training.engine_state import full_state_dict

        path = _checkpoint(folder, {f"engine/{name}": {"module": RunsCode(folder)} for name in names}, stage)
        return lambda: full_state_dict(path)

    return make


def _resumed(state: str) -> Make:
    """A trial that goes on from a checkpoint of which one file runs a command; of DeepSpeed, its loader."""

    def make(folder: Path) -> Feed:
        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

        from orpo_ray.training.checkpoint import Checkpoints

        names = ("engine/mp_rank_00_model_states.pt", "random-rank-0.pt")
        path = _checkpoint(folder, {name: RunsCode(folder) if name == state else {} for name in names})

        def load_checkpoint(folder: str, tag: str, **_: object) -> tuple[str, object]:
            return folder, TorchCheckpointEngine().load(f"{folder}/{tag}/mp_rank_00_model_states.pt")

        engine = SimpleNamespace(
            zero_optimization_stage=lambda: 0,
            module=SimpleNamespace(parameters=lambda: []),
            load_checkpoint=load_checkpoint,
        )

        def feed() -> object:
            with _alone(folder):
                checkpoints = Checkpoints(path.parent, CheckpointConfig())
                found = checkpoints.find()
                assert found is not None
                return checkpoints.load(engine, found)

        return feed

    return make


def _manifest_outside(folder: Path) -> Feed:
    """The manifest of a checkpoint in a store names a file above its folder, and the store has one there."""
    from orpo_ray.storage.checkpoint_files import MANIFEST
    from orpo_ray.training.checkpoint import Checkpoints

    store = Storage(f"file://{folder}/deep/store/trial", patience_s=1.0)
    (folder / "deep").mkdir()
    (folder / "deep" / "ran").write_text("x")
    manifest = {"step": 2, "num_workers": 1, "zero_stage": 0, "progress": {}}
    store.write(f"step-00000002/{MANIFEST}", json.dumps(manifest | {"files": {"../../../ran": {"size": 1}}}).encode())

    def feed() -> str:
        problems: list[str] = []
        with _alone(folder):
            there = folder / "trials" / "a"
            assert Checkpoints(there, CheckpointConfig(), remote=store, on_problem=problems.append).find() is None
        return f"passed over: {problems[0]}"

    return feed


_STORES = [
    (
        "a link out of the working directory of a job",
        _link_out,
        "SubmitError",
        "links lead out of the working directory",
    ),
    ("a link back into it", _link_round, "SubmitError", "back into themselves"),
    ("an object named `../../x` in the store", _brought(_Listing), "StorageError", "would be written outside of"),
    ("an object named `/x` in the store", _brought(_AbsoluteListing), "StorageError", "would be written outside of"),
    (
        "a checkpoint whose manifest names `../../../x`",
        _manifest_outside,
        None,
        "passed over … which is not a file inside of it",
    ),
    (
        "a checkpoint's random state that runs a command",
        _resumed("random-rank-0.pt"),
        "CheckpointError",
        "holds more than tensors and could run code; nothing of it was run",
    ),
    (
        "a checkpoint that runs a command when DeepSpeed loads it",
        _resumed("engine/mp_rank_00_model_states.pt"),
        "CheckpointError",
        "holds more than tensors and could run code; nothing of it was run",
    ),
    (
        "a checkpoint that runs a command when it is exported",
        _weights_of_checkpoint(0, "mp_rank_00_model_states.pt"),
        "CheckpointError",
        "holds more than tensors and could run code; nothing of it was run",
    ),
    (
        "one of ZeRO stage 3",
        _weights_of_checkpoint(
            3, "zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        ),
        "CheckpointError",
        "holds more than tensors and could run code; nothing of it was run",
    ),
]

CASES = [Case("Cluster, storage, checkpoints", *case) for case in _STORES]
