"""Made-up run directories as a sweep leaves them: config, journal, results and per-pair files. Nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orpo_ray.config import METRIC_MODES, ExperimentConfig, parse
from orpo_ray.results.winners import summarize_winners
from orpo_ray.storage.pair_scores import PairScores
from orpo_ray.storage.results import summarize
from orpo_ray.storage.run_dir import write_results
from tests.support.events import as_state
from tests.support.sweeps import write_pairs

BEGAN_MS = 1_700_000_000_000


def experiment(output_dir: Path, name: str, space: dict[str, Any], **settings: Any) -> ExperimentConfig:
    """A sweep over `space`; dotted settings changed, e.g. `**{"sweep.metric": "eval/nll"}`."""
    tree: dict[str, Any] = {
        "name": name,
        "output_dir": str(output_dir),
        "model": {"path": "tiny-llama-2m"},
        "data": {"path": "builtin://style-pairs"},
        "train": {"max_steps": 20, "eval_every": 10},
        "sweep": {"metric": "eval/log_odds", "space": space},
    }
    for path, value in settings.items():
        section, key = path.split(".", 1)
        tree.setdefault(section, {})[key] = value
    return parse(tree)


def life(
    config: ExperimentConfig,
    trial_id: str,
    params: dict[str, Any],
    scores: PairScores | None,
    status: str = "finished",
    purpose: str = "search",
    steps: int = 20,
    at: int = 0,
) -> list[dict[str, Any]]:
    """A trial's events, with the metrics of its pairs and an evaluation at half of its steps; `at`: ms."""
    checkpoint = str(config.run_dir / "trials" / trial_id / f"step-{steps:08d}")
    metrics = {} if scores is None else {metric: scores.value(metric) for metric in METRIC_MODES}
    metrics |= {} if scores is None else {"eval/chosen_logp": float(scores.chosen_logp_N.mean())}
    bundle = config.as_sweep()[1].bundle_of(params)
    facts = {"model/parameters": 2_000_000, "forward/rows": "shared prompt"}
    error = {"failed": "out of memory", "diverged": f"not finite at step {steps}"}.get(status)

    def event(kind: str, delay: int, **details: Any) -> dict[str, Any]:
        return {"event": kind, "trial_id": trial_id, **details, "time": BEGAN_MS + at + delay}

    events = [event("submitted", 0, params=params, bundle=bundle, purpose=purpose)]
    if status == "waiting":
        return events
    events.append(event("started", 10, attempt=0, group="g", step=0, max_steps=20, devices=1, facts=facts))
    for step in (steps // 2, steps):
        events.append(event("log", 10 * step, step=step, metrics={"train/loss": 2.0}))
        if metrics:
            held_out = metrics if step == steps else {"eval/nll": 9.0}
            events.append(event("eval", 10 * step + 1, step=step, metrics=held_out, checkpoint=checkpoint, seconds=1.0))
    if status == "unfinished":
        return events
    end = {"steps": steps, "metrics": metrics, "checkpoint": checkpoint if metrics else None, "train_seconds": 3.5}
    return [*events, event("finished", 1000, status=status, error=error, **end)]


def write_run(
    config: ExperimentConfig,
    events: list[dict[str, Any]],
    scores: dict[str, PairScores] | None = None,
    run_ids: dict[str, str] | None = None,
    *,
    sweep_id: str = "",
    ended: bool = True,
) -> Path:
    """Write them where a sweep would have; without its end there is no results.json."""
    run_dir, (config, sweep) = config.run_dir, config.as_sweep()
    write_results(
        run_dir / "sweep.json", {"sweep_id": sweep_id or config.name, "config": config.model_dump(mode="json")}
    )
    (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    for trial_id, one in (scores or {}).items():
        write_pairs(run_dir, trial_id, one)
    if ended:
        results = summarize(config.name, sweep.metric, sweep.mode, as_state(events), run_ids)
        results["winners"] = summarize_winners(results, run_dir)
        write_results(run_dir / "results.json", results)
    return run_dir
