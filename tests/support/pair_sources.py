"""Where tests take preference pairs from: the built-in generator, and HH-RLHF on a machine that has the file.

The hub is not asked for HH-RLHF: no test reaches a network (`HF_HUB_OFFLINE`), and none may assert less without one.
"""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

from benchmarks.workload import HH, WorkloadError, hh_path
from orpo_ray.data.style_pairs import generate


def sources_of_pairs() -> dict[str, str]:
    """Name -> what `data.path` is set to; the built-in pairs are in it on every machine."""
    found = {"style-pairs": "builtin://style-pairs"}
    with contextlib.suppress(WorkloadError):
        found["hh-rlhf"] = str(hh_path())
    return found


def write_stand_in(folder: Path, num_pairs: int = 400) -> Path:
    """Write a file named like HH-RLHF's whose prompts and answers are about as long: three built-in pairs in one.

    Returns:
        What ORPO_RAY_SHARED is to be set to.
    """
    (folder / "data").mkdir(parents=True)
    built_in = iter(generate(3 * num_pairs, seed=0))
    with gzip.open(folder / "data" / HH, "wt", encoding="utf-8") as file:
        for three in zip(built_in, built_in, built_in, strict=True):
            sides = ("prompt", "chosen", "rejected")
            file.write(json.dumps({side: "\n".join(pair[side] for pair in three) for side in sides}) + "\n")
    return folder
