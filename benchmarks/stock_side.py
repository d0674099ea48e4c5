"""A sweep in the pattern of Ray's own documentation: Tuner over a driver function that fits a TorchTrainer per trial.

    python -m benchmarks.stock_side SWEEP.yaml --out OUT.json

Only the pattern is the stock one: model, data, DeepSpeed engine and training loop are orpo_ray's, so that both sides of
`benchmarks.sweep_overhead` train the same trials. See "Hyperparameter Tuning with Ray Tune" in Ray Train's user guide.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray import tune
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from orpo_ray.config import load


def train_fn(settings: dict[str, Any]) -> None:
    """On each worker of a trial."""
    import torch

    from orpo_ray.training.loop import train
    from orpo_ray.training.trial import Decision, RankContext

    torch.set_num_threads(1)
    logs: list[tuple[int, dict[str, float]]] = []

    def on_eval(step: int, metrics: dict[str, float], checkpoint: str | None, seconds: float) -> Decision:
        ray.train.report({**metrics, "step": step})
        return Decision.CONTINUE

    ctx = RankContext(Path(settings["folder"]), on_log=lambda step, m: logs.append((step, m)), on_eval=on_eval)
    result = train(settings["config"], ctx)
    record = {"logs": logs, "status": str(result.status), "metrics": result.metrics}
    (Path(settings["folder"]) / "record.json").write_text(json.dumps(record))


def main(words: list[str] | None = None) -> int:
    """Run the sweep's trials; their settings are the lr axis of the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stock_side", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(words)
    config = load(options.file)
    assert config.sweep is not None
    metric, mode = config.sweep.metric, config.sweep.mode
    folder = config.run_dir

    def driver(params: dict[str, Any]) -> None:
        trial_id = tune.get_context().get_trial_id()
        trial_folder = folder / "trials" / trial_id
        trial_folder.mkdir(parents=True)
        TorchTrainer(
            train_fn,
            train_loop_config={"config": config.trial(params), "folder": str(trial_folder)},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(
                name=f"train-{trial_id}",
                storage_path=str(folder / "train"),
                callbacks=[TuneReportCallback()],
                worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}},
            ),
        ).fit()

    # A logical CPU for each of two drivers and one for each of their workers.
    ray.init(num_cpus=4, include_dashboard=False, logging_level="WARNING", log_to_driver=False)
    axis = config.sweep.space["optim.lr"]
    begun = time.time()
    begun = time.time()
    grid = tune.Tuner(
        driver,
        param_space={"optim.lr": tune.grid_search(list(axis.candidates()))},
        tune_config=tune.TuneConfig(metric=metric, mode=mode, max_concurrent_trials=2),
        run_config=tune.RunConfig(name="stock", storage_path=str(folder), verbose=0),
    ).fit()
    wall = time.time() - begun
    records = [json.loads(path.read_text()) for path in sorted((folder / "trials").glob("*/record.json"))]
    options.out.write_text(json.dumps({"wall_seconds": wall, "trials": records, "errors": grid.num_errors}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
