"""Which trial an export means, and what it reads of the run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from orpo_ray.config import parse
from orpo_ray.results import export, export_source
from orpo_ray.storage.results import summarize
from orpo_ray.storage.run_dir import EVENTS_FILE, RESULTS_FILE, SWEEP_FILE, write_results
from tests.support.events import as_state
from tests.support.ranks import BASE


def event(kind: str, trial_id: str, **details: Any) -> dict[str, Any]:
    return {"event": kind, "trial_id": trial_id, "time": 0, **details}


def ended(trial_id: str, params: dict[str, Any], nll: float, status: str = "finished", **more: Any) -> list[Any]:
    metrics = {"eval/nll": nll}
    return [
        event("submitted", trial_id, params=params, bundle=""),
        event("started", trial_id, attempt=1, group="g", step=0, max_steps=20, facts={"forward/products": "bf16"}),
        event("eval", trial_id, step=10, metrics={"eval/nll": 9.0}, checkpoint=None),
        event("eval", trial_id, step=20, metrics=metrics, checkpoint="gone/step-00000020"),
        event(
            "finished",
            trial_id,
            status=status,
            steps=20,
            metrics=metrics,
            checkpoint=None,
            train_seconds=1.0,
            error=None,
            **more,
        ),
    ]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A sweep over losses: `a` is the best, `c` was taken over, `d` has only a torn checkpoint."""
    space = {"loss.name": {"type": "grid", "values": ["orpo", "dpo"]}}
    tree = json.loads(json.dumps(BASE)) | {"name": "losses", "output_dir": str(tmp_path)}
    tree["sweep"] = {"metric": "eval/nll", "space": space}
    config = parse(tree)
    folder = tmp_path / "losses"
    events = [
        *ended("a", {"loss.name": "dpo"}, 1.0),
        *ended("b", {"loss.name": "orpo"}, 2.0),
        *ended("c", {"loss.name": "orpo"}, 3.0, reused_from="f" * 32),
        *ended("d", {"loss.name": "orpo"}, 0.5, status="diverged"),
    ]
    write_results(folder / SWEEP_FILE, {"sweep_id": "id", "config": config.model_dump(mode="json")})
    (folder / EVENTS_FILE).write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    write_results(folder / RESULTS_FILE, summarize("losses", "eval/nll", "min", as_state(events), {"a": "e" * 32}))
    for trial_id, step, files in (("a", 20, {}), ("b", 10, {}), ("c", 20, {}), ("d", 10, {"lost.pt": 3})):
        path = folder / "trials" / trial_id / f"step-{step:08d}"
        path.mkdir(parents=True)
        manifest = {"step": step, "num_workers": 1, "zero_stage": 0, "progress": {}, "files": files}
        (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_a_run_directory_means_its_best_trial(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = export_source.find(str(run_dir))
    assert (found.trial["trial_id"], found.step, found.logged) == ("a", 20, {"eval/nll": 1.0})
    # The trial's own loss, read back from a dump that holds what orpo had filled in.
    assert (found.config.loss.name, found.config.loss.beta, found.config.loss.orpo_lambda) == ("dpo", 0.1, None)
    assert found.products == "bf16"
    assert found.checkpoint == run_dir / "trials" / "a" / "step-00000020"
    (run_dir.parent / "runs").symlink_to(run_dir.parent)
    monkeypatch.chdir(run_dir.parent)
    assert export_source.find("losses").trial["trial_id"] == "a"


def test_a_trials_directory_means_that_trial(run_dir: Path) -> None:
    found = export_source.find(f"{run_dir}/trials/b/")
    assert (found.trial["trial_id"], found.step) == ("b", 10)
    assert found.logged == {"eval/nll": 9.0}  # of the checkpoint's step, not the last


def test_what_cannot_be_exported_says_what_to_do(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(export_source.ExportError, match=f"orpo-ray export {'f' * 32}"):
        export_source.find(str(run_dir / "trials" / "c"))
    with pytest.raises(export_source.ExportError, match=r"no complete checkpoint.*train\.checkpoint_every"):
        export_source.find(str(run_dir / "trials" / "d"))
    with pytest.raises(FileNotFoundError):
        export_source.find(str(tmp_path / "losse"))
    nobody = summarize("losses", "eval/nll", "min", as_state([]))
    write_results(run_dir / RESULTS_FILE, nobody)
    with pytest.raises(export_source.ExportError, match="none is the best"):
        export_source.find(str(run_dir))


def test_unregistered_where_the_check_failed_or_mlflow_knows_no_run(run_dir: Path) -> None:
    candidate = export_source.find(str(run_dir / "trials" / "b"))
    with pytest.raises(export_source.ExportError, match="names no MLflow run of trial b"):
        export.register(candidate, export.Exported(run_dir, "digest", None))
    failed = export.verify.Check((export.verify.Comparison("eval/nll", 1.0, 2.0, 0.1),))
    with pytest.raises(export_source.ExportError, match="did not pass its check"):
        export.register(candidate, export.Exported(run_dir, "digest", failed))


def test_generation_ends_at_the_end_of_a_turn_too(tmp_path: Path) -> None:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **shape))
    # As published ones are: not valid once changed, for they name a temperature and no sampling.
    model.generation_config = GenerationConfig(eos_token_id=2, temperature=0.7, do_sample=False)
    export.stop_at(model, 2)
    assert (model.generation_config.eos_token_id, model.generation_config.do_sample) == (2, False)
    export.stop_at(model, 5)
    model.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.eos_token_id, saved.temperature, saved.do_sample) == ([2, 5], 0.7, True)
