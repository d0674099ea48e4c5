"""Write tests/golden/orpo_tiny_cpu.txt: step and losses of a tiny seeded run. Look at the diff before committing it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("orpo_tiny_cpu.txt")
METRICS = ("train/loss", "train/nll", "train/log_odds", "train/chosen_logp", "train/rejected_logp")
CONFIG: dict[str, Any] = {"loss.orpo_lambda": 0.5, "train.micro_batch_size": 2}


def read() -> dict[int, dict[str, float]]:
    """step -> metric -> value."""
    lines = [line.split() for line in FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {int(step): dict(zip(METRICS, map(float, values), strict=True)) for step, *values in lines}


def main() -> None:
    from tests.support.ranks import experiment, train

    with tempfile.TemporaryDirectory() as folder:
        record = train(experiment(Path(folder) / "cache", **CONFIG), Path(folder) / "trial")
    rows = [" ".join([str(step), *(f"{metrics[m]:.9g}" for m in METRICS)]) for step, metrics in record.logs.items()]
    FILE.write_text("\n".join([f"# step {' '.join(METRICS)}; made by: make golden", *rows]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
