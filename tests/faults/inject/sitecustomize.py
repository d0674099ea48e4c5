"""Does what `plan.json` asks for inside the processes that have this folder on PYTHONPATH.

Python imports a module of this name at the start of every interpreter, so the product needs no hook of its own. Each
fault happens in one rank of one worker group, at one optimizer step of one trial, so many times over all processes.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(os.environ["ORPO_RAY_TEST_FAULTS"])
PLAN: list[dict[str, Any]] = json.loads((FOLDER / "plan.json").read_text(encoding="utf-8"))
CLOCK = os.environ.get("ORPO_RAY_TEST_CLOCK")
_now_training = ""  # id of the trial


def _patch_clock(file: Path) -> None:
    """Let Python's clock be wrong by the seconds that stand in the file; steady clocks and those of C++ stay right."""
    right, right_ns, steady = time.time, time.time_ns, time.monotonic
    read_at, wrong_by = float("-inf"), 0

    def seconds() -> int:
        nonlocal read_at, wrong_by
        if steady() - read_at > 0.2:
            read_at, wrong_by = steady(), int(file.read_text(encoding="utf-8"))
        return wrong_by

    time.time = lambda: right() + seconds()
    time.time_ns = lambda: right_ns() + seconds() * 10**9


def _is_due(point: str, step: int) -> list[dict[str, Any]]:
    import torch.distributed as dist

    if not dist.is_initialized():
        return []
    here = {"point": point, "step": step, "rank": dist.get_rank(), "trial": _now_training}
    return [f for f in PLAN if all(f[key] == value for key, value in here.items()) and _may_fire(f)]


def _may_fire(fault: dict[str, Any]) -> bool:
    """Leave a mark, which also says when; no more marks than times."""
    for number in range(fault["times"]):
        try:
            descriptor = os.open(FOLDER / f"{fault['name']}.{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            continue
        os.write(descriptor, str(time.time()).encode())
        os.close(descriptor)
        return True
    return False


def _act(fault: dict[str, Any]) -> None:
    match fault["action"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        case "wait":
            time.sleep(1.0)
        case "allocate":  # more than the process may have
            import resource

            import torch

            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, resource.RLIM_INFINITY))
            try:
                torch.zeros(2**30)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        case "swell":  # more than the control group may have: the kernel ends this process
            (Path(fault["group"]) / "cgroup.procs").write_text(str(os.getpid()))
            hoard = [bytearray(b"x" * 2**24) for _ in range(256)]
            raise AssertionError(f"nobody ended a process that took {len(hoard) * 16} MiB more than it may")


def _patch_forward(module: ModuleType) -> None:
    import torch

    original = module.pair_logps

    def pair_logps(engine: Any, *arguments: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            for fault in _is_due("forward", engine.global_steps + 1):
                _act(fault)
        return original(engine, *arguments, **named)

    module.pair_logps = pair_logps


def _patch_loop(module: ModuleType) -> None:
    original = module.train

    def train(config: Any, ctx: Any) -> Any:
        global _now_training
        _now_training = ctx.trial_dir.name
        return original(config, ctx)

    module.train = train


def _patch_backward(module: ModuleType) -> None:
    original = module.DeepSpeedEngine.backward

    def backward(self: Any, *arguments: Any, **named: Any) -> Any:
        for fault in _is_due("backward", self.global_steps + 1):
            trained = [p for p in self.module.parameters() if p.requires_grad]
            # Half of the gradients are there, and half of the reductions under way.
            trained[len(trained) // 2].register_hook(lambda _, fault=fault: _act(fault))
        return original(self, *arguments, **named)

    module.DeepSpeedEngine.backward = backward


def _patch_save(module: ModuleType) -> None:
    import io

    import torch

    original = torch.save

    def save(thing: Any, file: Any, *arguments: Any, **named: Any) -> Any:
        path = str(file)
        step = next((int(part[5:13]) for part in path.split(os.sep) if part.startswith("step-")), 0)
        for fault in _is_due("save", step):
            whole = io.BytesIO()
            original(thing, whole, *arguments, **named)
            with open(path, "wb") as half:
                half.write(whole.getvalue()[: whole.tell() // 2])
                half.flush()
                os.fsync(half.fileno())
                _act(fault)
        return original(thing, file, *arguments, **named)

    torch.save = save


_PATCHES = {
    "orpo_ray.models.pair_model": _patch_forward,
    "orpo_ray.training.loop": _patch_loop,
    "deepspeed.runtime.engine": _patch_backward,
    "orpo_ray.training.checkpoint": _patch_save,
}


class _Loader(importlib.abc.Loader):
    """The module's own loader, and then its patch."""

    def __init__(self, inner: Any, patch: Any) -> None:
        self._inner, self._patch = inner, patch

    def create_module(self, spec: Any) -> Any:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules to be patched by the finders behind it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in _PATCHES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None:
            spec.loader = _Loader(spec.loader, _PATCHES[name])
        return spec


if CLOCK:
    _patch_clock(Path(CLOCK))
if PLAN:
    sys.meta_path.insert(0, _Finder())
