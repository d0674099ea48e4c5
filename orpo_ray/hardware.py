"""Devices, memory and CPUs of a machine that a worker runs on."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

BF16_FLAGS = ("amx_bf16", "avx512_bf16")
"""Flags of CPUs that multiply bf16 matrices faster than fp32 ones, as Linux and torch spell them: Intel's with AMX,
AMD's from Zen 4 on. (Some of Intel's have AVX-512 BF16 without AMX; no such machine was available for a test.)"""


class Device(StrEnum):
    """Device that a worker computes on."""

    CPU = "cpu"
    CPU_BF16 = "cpu with bf16 units"
    CUDA = "cuda"


def this_machine() -> NodeMemory:
    """CPUs, GPUs and memory of the machine that runs this process."""
    gpus = _gpu_memory()
    cpu_info = Path("/proc/cpuinfo")
    known = cpu_info.read_text(encoding="utf-8") if cpu_info.is_file() else ""
    return NodeMemory(
        cpus=os.cpu_count() or 1,
        gpus=len(gpus),
        memory_bytes=psutil.virtual_memory().total,
        gpu_memory_bytes=min(gpus, default=0),
        bf16_units=any(flag in known for flag in BF16_FLAGS),
    )


def _gpu_memory() -> list[int]:
    """Memory of each of this machine's GPUs, in bytes."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=10)
    return [int(line) * 2**20 for line in found.stdout.split()] if found.returncode == 0 else []


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """Resources of one node, which determine what fits."""

    cpus: int
    gpus: int
    memory_bytes: int
    gpu_memory_bytes: int = 0
    """Memory of each GPU; 0 without GPUs, or where it is not known."""
    bf16_units: bool = False
    """Its CPUs multiply bf16 matrices faster than fp32 ones (AMX or AVX-512 BF16)."""


def device_of(on_gpu: bool, nodes: list[NodeMemory]) -> Device:
    """Device that workers compute on. CPUs count as having bf16 units if those of all nodes do."""
    if on_gpu:
        return Device.CUDA
    return Device.CPU_BF16 if nodes and all(node.bf16_units for node in nodes) else Device.CPU
