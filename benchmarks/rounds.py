"""Runs cases as whole processes in turn, watches their memory, and keeps what they say with what produced it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args

import psutil

from benchmarks.case import Case, Device
from orpo_ray import provenance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "accelerate", "deepspeed", "numpy")
_WATCH_EVERY_S = 0.1
_LOG_TAIL = 1500
"""Characters of a failed process's output that are kept."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a process may use before it is ended."""

    memory_gib: float = 18.0
    """Resident memory on the CPU: a process that the kernel ends takes others with it."""
    seconds: float = 1800.0


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every script which runs cases has."""
    parser.add_argument("--device", choices=get_args(Device), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-limit-gib", type=float, default=Limits().memory_gib)
    parser.add_argument("--timeout-s", type=float, default=Limits().seconds, help="of one process")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")


def run_case(case: Case, limits: Limits) -> dict[str, Any]:
    """One process of `benchmarks.steps`.

    Returns:
        What it measured, with `label` and `status`: `ok`; `out of memory` (over the limit, or the device's allocator
        gave up); `timed out`; `failed`. The last three have `error`.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out.json", Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.steps", *case.arguments(), "--out", str(out)]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, env=_environment(case), start_new_session=True
            )
            ended = _watch(process, limits)
        text = log.read_text(encoding="utf-8", errors="replace")
        result: dict[str, Any] = {"label": case.label, "status": "ok"}
        if ended is not None:
            status, error = ended
            return result | {"case": case.as_json(), "status": status, "error": error}
        if process.returncode or not out.is_file():
            # -9: the kernel was faster than the watch.
            is_memory = "out of memory" in text.lower() or process.returncode == -9
            error = f"exit status {process.returncode}: {text[-_LOG_TAIL:].strip()}"
            status = "out of memory" if is_memory else "failed"
            return result | {"case": case.as_json(), "status": status, "error": error}
        return result | json.loads(out.read_text(encoding="utf-8"))


def run_rounds(
    cases: Sequence[Case],
    rounds: int,
    limits: Limits,
    on_result: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Every case once per round, the order reversed in every second one, so that a drift of the machine falls on all.

    Args:
        cases: whole processes.
        rounds: how often each runs; one that did not end well is not tried again.
        limits: for each process.
        on_result: called after each process with all results so far.

    Returns:
        Results in the order in which they ran, each with its `round` (from 1).
    """
    results: list[dict[str, Any]] = []
    given_up: set[Case] = set()
    for number in range(1, rounds + 1):
        for case in cases if number % 2 else cases[::-1]:
            if case in given_up:
                continue
            result = run_case(case, limits) | {"round": number}
            if result["status"] != "ok":
                given_up.add(case)
            results.append(result)
            on_result(results)
    return results


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest and how many."""
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def summarise(results: Sequence[dict[str, Any]], case: Case) -> dict[str, Any]:
    """What the processes of one case measured, over the rounds."""
    mine = [result for result in results if result["case"] == case.as_json()]
    good = [result for result in mine if result["status"] == "ok"]
    summary: dict[str, Any] = {"label": case.label, "case": case.as_json(), "status": mine[-1]["status"]}
    if good:
        summary["pairs_per_second"] = spread([result["pairs_per_second"] for result in good])
        summary["peak_gib"] = spread([_peak(result) for result in good])
    if "error" in mine[-1]:
        summary["error"] = mine[-1]["error"]
    return summary


def ratios(results: Sequence[dict[str, Any]], ours: Case, peer: Case) -> dict[str, Any] | None:
    """Ours over the peer's speed, and ours over the peer's peak memory, round by round; None where one has no round."""
    by_round: dict[int, dict[str, Any]] = {}
    for result in results:
        if result["status"] == "ok":
            for name, case in (("ours", ours), ("peer", peer)):
                if result["case"] == case.as_json():
                    by_round.setdefault(result["round"], {})[name] = result
    both = [pair for pair in by_round.values() if len(pair) == 2]
    if not both:
        return None
    return {
        "speed": spread([pair["ours"]["pairs_per_second"] / pair["peer"]["pairs_per_second"] for pair in both]),
        "memory": spread([_peak(pair["ours"]) / _peak(pair["peer"]) for pair in both]),
        "first_loss_difference": max(abs(pair["ours"]["losses"][0] / pair["peer"]["losses"][0] - 1) for pair in both),
    }


def described(command: str) -> dict[str, Any]:
    """Hardware, versions, commit and date of a measurement."""
    facts = provenance.collect()
    git = facts["git"] or {}
    return {
        "command": command,
        "date": facts["collected_at"],
        "commit": git.get("commit"),
        "uncommitted_changes": git.get("dirty"),
        "cpu": facts["cpu"],
        "cores": facts["cpu_count"],
        "memory_gib": facts["memory_gib"],
        "gpus": facts["gpus"],
        "platform": facts["platform"],
        "python": facts["python"],
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def require_device(device: Device) -> None:
    """Refuse to start where nothing could be measured.

    Raises:
        SystemExit: no such device.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch finds no CUDA device here; nothing was run")


def save(name: str, section: str, content: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Replace one section of a results file; the others stay, each with its own provenance."""
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    sections = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    sections[section] = content
    scratch = path.with_suffix(".writing")
    scratch.write_text(json.dumps(sections, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)
    return path


def _watch(process: subprocess.Popen[bytes], limits: Limits) -> tuple[str, str] | None:
    """Wait for a process; end it over a limit and say which."""
    started, watched = time.monotonic(), psutil.Process(process.pid)
    while process.poll() is None:
        try:
            resident = watched.memory_info().rss / 2**30
        except psutil.NoSuchProcess:
            break
        reason = None
        if resident > limits.memory_gib:
            reason = ("out of memory", f"ended at {resident:.1f} GiB, over the limit of {limits.memory_gib:g} GiB")
        elif time.monotonic() - started > limits.seconds:
            reason = ("timed out", f"ended after {limits.seconds:g} s")
        if reason:
            os.killpg(process.pid, signal.SIGKILL)  # with the compilers it may have started
            process.wait()
            return reason
        time.sleep(_WATCH_EVERY_S)
    process.wait()
    return None


def _environment(case: Case) -> dict[str, str]:
    return os.environ | {
        # DeepSpeed's build looks for ninja, which lies beside the interpreter.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "OMP_NUM_THREADS": str(case.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONWARNINGS": "ignore",
    }


def _peak(result: dict[str, Any]) -> float:
    """GiB on the device where there is one, else resident."""
    device = result["peak_device_gib"]
    return float(result["peak_gib"] if device is None else device)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
