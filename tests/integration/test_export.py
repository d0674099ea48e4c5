"""Exported models are those that were trained: plain transformers gives the run's numbers, MLflow gives the folder."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from orpo_ray import cli, provenance
from orpo_ray.config import ExperimentConfig, ModelConfig
from orpo_ray.data.dataset import load_pairs
from orpo_ray.data.style_pairs import generate
from orpo_ray.models.loading import load_tokenizer
from orpo_ray.results import export, export_source
from orpo_ray.storage.results import summarize
from orpo_ray.storage.run_dir import EVENTS_FILE, RESULTS_FILE, SWEEP_FILE, write_results
from orpo_ray.tracking.sweep_tracker import SweepTracker
from orpo_ray.training import engine_state
from tests.support.events import as_event, as_state
from tests.support.ranks import Job, Record, experiment, train_all

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # the first to train compiles DeepSpeed's ops

ZERO_3 = {"scaling.num_workers": 2, "deepspeed.zero_stage": 3}
SIZES: dict[str, dict[str, Any]] = {
    "tied": {},
    "bf16": {"train.precision": "bf16"},
    "lora": {"model.lora.rank": 4, "model.lora.alpha": 64.0},
    "tied-zero3": ZERO_3,
    "lora-zero3": {"model.lora.rank": 4, **ZERO_3},
    "untied-zero3": ZERO_3,
    "zero2": {"scaling.num_workers": 2, "deepspeed.zero_stage": 2},
}


@dataclass(frozen=True)
class Zoo:
    """A sweep over kinds of checkpoints, trained without Ray and told to MLflow as a sweep would."""

    run_dir: Path
    config: ExperimentConfig
    records: dict[str, Record]
    run_ids: dict[str, str]
    """Trial id (here the kind) -> MLflow run id."""
    parent_id: str
    uri: str

    def trial_dir(self, kind: str) -> str:
        return str(self.run_dir / "trials" / kind)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    folder = tmp_path_factory.mktemp("export")
    _write_untied(folder / "untied")
    values = {kind: {"model.path": "tiny-llama-1m", **settings} for kind, settings in SIZES.items()}
    values["untied-zero3"]["model.path"] = str(folder / "untied")
    config = experiment(
        folder / "cache",
        **{
            "name": "zoo",
            "output_dir": str(folder / "runs"),
            "train.max_steps": 2,
            "train.eval_every": 1,
            "data.train_pairs": 64,
            "data.eval_pairs": 16,
            "sweep": {"metric": "eval/nll", "space": {"model": {"type": "bundle", "values": values}}},
        },
    )
    jobs = {kind: Job(config.trial({"model": kind}), config.run_dir / "trials" / kind) for kind in SIZES}
    records: dict[str, Record] = {}
    for world in (1, 2):
        kinds = [kind for kind, job in jobs.items() if job.config.scaling.num_workers == world]
        records |= zip(kinds, train_all([jobs[kind] for kind in kinds]), strict=True)
    events = [event for kind in SIZES for event in _journal(kind, records[kind])]
    write_results(config.run_dir / SWEEP_FILE, {"sweep_id": "zoo-id", "config": config.model_dump(mode="json")})
    (config.run_dir / EVENTS_FILE).write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    tracker = SweepTracker(config, "zoo-id", provenance.collect())
    tracker.start()
    tracker.handle(map(as_event, events))
    tracker.flush()
    results = summarize("zoo", "eval/nll", "min", as_state(events), tracker.run_ids)
    write_results(config.run_dir / RESULTS_FILE, results)
    assert tracker.close(results, interrupted=False) == 0
    return Zoo(config.run_dir, config, records, dict(tracker.run_ids), tracker.parent_id, tracker.uri)


def _write_untied(folder: Path) -> None:
    """A model in a folder, whose head is not its embedding and whose generation settings are invalid."""
    torch.manual_seed(7)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, tie_word_embeddings=False, **shape, **special)).save_pretrained(
        folder
    )
    load_tokenizer(ModelConfig(path="tiny-llama-1m")).save_pretrained(folder)


def _journal(kind: str, record: Record) -> list[dict[str, Any]]:
    now, result = int(time.time() * 1000), record.result
    common = {"trial_id": kind, "time": now}
    return [
        {"event": "submitted", "params": {"model": kind}, "bundle": kind, "purpose": "search", **common},
        {"event": "started", "attempt": 1, "group": "g", "step": 0, "max_steps": 2, "facts": record.facts, **common},
        *(
            {"event": "eval", "step": step, "metrics": metrics, "checkpoint": result.checkpoint, **common}
            for step, metrics in record.evals.items()
        ),
        {
            "event": "finished",
            "status": str(result.status),
            "steps": result.steps,
            "metrics": result.metrics,
            "checkpoint": result.checkpoint,
            "train_seconds": result.train_seconds,
            "error": None,
            **common,
        },
    ]


@torch.no_grad()
def plain_metrics(folder: Path, config: ExperimentConfig) -> dict[str, float]:
    """The held-out metrics by nothing but transformers: padded rows, all logits."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.config._attn_implementation == "sdpa"
    _, pairs = load_pairs(config.data, tokenizer)
    sides: dict[str, list[float]] = {"chosen": [], "rejected": []}
    nll_sum, nll_tokens = 0.0, 0
    for side, means in sides.items():
        members = [pairs[i] for i in range(len(pairs))]
        answers = [pair.chosen_ids if side == "chosen" else pair.rejected_ids for pair in members]
        rows = [np.concatenate([pair.prompt_ids, ids]).tolist() for pair, ids in zip(members, answers, strict=True)]
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="right")
        logps_RTV = model(**batch).logits.float().log_softmax(-1)
        for row, (ids, answer) in enumerate(zip(rows, answers, strict=True)):
            logps_T = logps_RTV[row, torch.arange(len(ids) - 1), torch.tensor(ids[1:])].double()
            means.append(float(logps_T[-len(answer) :].mean()))
            if side == "chosen":
                nll_sum, nll_tokens = nll_sum - float(logps_T.sum()), nll_tokens + len(logps_T)
    chosen, rejected = np.array(sides["chosen"]), np.array(sides["rejected"])
    log_odds = (chosen - np.log(-np.expm1(chosen))) - (rejected - np.log(-np.expm1(rejected)))
    return {
        "eval/nll": nll_sum / nll_tokens,
        "eval/chosen_logp": float(chosen.mean()),
        "eval/rejected_logp": float(rejected.mean()),
        "eval/log_odds": float(log_odds.mean()),
        "eval/odds_ratio_loss": float(np.logaddexp(0, -log_odds).mean()),
        "eval/preference_accuracy": float((chosen > rejected).mean()),
    }


@pytest.mark.parametrize("kind", [kind for kind in SIZES if kind != "bf16"])
def test_the_folder_gives_the_numbers_of_the_run(zoo: Zoo, kind: str, tmp_path: Path) -> None:
    candidate = export_source.find(zoo.trial_dir(kind))
    exported = export.export(candidate, tmp_path / "model")
    logged = zoo.records[kind].evals[2]
    assert logged["eval/nll"] != pytest.approx(zoo.records[kind].evals[1]["eval/nll"], rel=1e-4)  # it did learn
    for metric, value in plain_metrics(exported.folder, candidate.config).items():
        assert value == pytest.approx(logged[metric], rel=1e-5, abs=1e-5), metric
    assert exported.check is not None
    assert {row.metric for row in exported.check.comparisons} == logged.keys() - {"eval/loss"}
    assert all(row.again == pytest.approx(row.logged, rel=1e-5, abs=1e-5) for row in exported.check.comparisons)
    model = AutoModelForCausalLM.from_pretrained(exported.folder)
    tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert tied == (kind != "untied-zero3")
    assert {p.name for p in tmp_path.iterdir()} == {"model"}  # nothing half-written beside it
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_weights_are_those_of_the_checkpoint_at_every_stage(zoo: Zoo) -> None:
    states = {kind: engine_state.full_state_dict(export_source.find(zoo.trial_dir(kind)).checkpoint) for kind in SIZES}
    # The same training cut differently: what differs is the order of sums.
    for kind in ("tied-zero3", "zero2"):
        assert states[kind].keys() == states["tied"].keys()
        for name, tensor in states[kind].items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, states["tied"][name], rtol=0, atol=2e-5)
    # Of the frozen base only its head is there, which is the embedding by another name.
    assert {name for name in states["lora"] if "lora_" not in name} <= {"lm.base_model.model.lm_head.weight"}


def test_text_and_end_of_turn_are_those_of_the_training(zoo: Zoo, tmp_path: Path) -> None:
    candidate = export_source.find(zoo.trial_dir("untied-zero3"))
    folder = export.export(candidate, tmp_path / "model", check=False).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, _ = load_pairs(candidate.config.data, load_tokenizer(candidate.config.model))
    rows = {row["prompt"]: row for row in generate(2000, seed=0)}
    row = next(row for row in rows.values() if f"{row['prompt']}</s>" in train.prompt_text(0))
    messages = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == train.prompt_text(0)
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == train[0].prompt_ids.tolist()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert train[0].chosen_ids[-1] in np.atleast_1d(model.generation_config.eos_token_id)


def test_bf16_is_allowed_what_rounding_explains_and_no_more(zoo: Zoo, tmp_path: Path) -> None:
    trained = export.export(export_source.find(zoo.trial_dir("bf16")), tmp_path / "trained")
    rounded = export.export(export_source.find(zoo.trial_dir("tied")), tmp_path / "rounded", dtype="bfloat16")
    for exported in (trained, rounded):
        assert exported.check is not None
        assert exported.check.passed
        assert max(abs(row.again - row.logged) for row in exported.check.comparisons) > 1e-6
    weights = AutoModelForCausalLM.from_pretrained(rounded.folder).state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    exact = export.trained_model(export_source.find(zoo.trial_dir("tied"))).state_dict()
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in weights.items())


def test_a_model_that_gives_other_numbers_is_not_exported(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = export.trained_model

    def worse(candidate: export_source.Candidate) -> Any:
        model = good(candidate)
        model.get_input_embeddings().weight.data *= 1.01
        return model

    monkeypatch.setattr(export, "trained_model", worse)
    before = _versions(zoo)
    assert cli.main(["export", zoo.trial_dir("tied"), "--to", str(tmp_path / "model")]) == 1
    assert not (tmp_path / "model").exists()
    assert "the exported model does not give the numbers" in " ".join(capsys.readouterr().out.split())
    assert _versions(zoo) == before


def _versions(zoo: Zoo, name: str = "zoo") -> list[str]:
    found = MlflowClient(zoo.uri).search_model_versions(f"name = '{name}'")
    return sorted(str(version.version) for version in found)


def test_registered_once_and_downloaded_from_the_registry(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", zoo.uri)
    client = MlflowClient(zoo.uri)
    best = min(SIZES, key=lambda kind: zoo.records[kind].evals[2]["eval/nll"])
    assert cli.main(["export", str(zoo.run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "eval/preference_accuracy" in shown
    assert "models:/zoo@champion, version 1" in shown
    first = client.get_model_version_by_alias("zoo", "champion")
    assert (first.run_id, first.tags["orpo_ray.trial_id"]) == (zoo.run_ids[best], best)

    downloaded = Path(download_artifacts("models:/zoo@champion", dst_path=str(tmp_path)))
    kept = zoo.run_dir / "export" / best
    assert {p.name for p in kept.iterdir()} <= {p.name for p in downloaded.iterdir()}
    config = zoo.config.trial({"model": best})
    assert plain_metrics(downloaded, config)["eval/nll"] == pytest.approx(
        zoo.records[best].evals[2]["eval/nll"], rel=1e-5
    )

    # Another trial takes the alias, by its MLflow run; the best one gets it back without a further version.
    other = "lora" if best != "lora" else "tied"
    assert cli.main(["export", zoo.run_ids[other]]) == 0
    assert client.get_model_version_by_alias("zoo", "champion").run_id == zoo.run_ids[other]
    assert cli.main(["export", zoo.parent_id]) == 0
    assert "(registered before)" in capsys.readouterr().out
    again = client.get_model_version_by_alias("zoo", "champion")
    assert (again.version, again.run_id) == (first.version, first.run_id)
    assert _versions(zoo) == ["1", "2"]


def test_card_tells_what_the_run_was(zoo: Zoo, tmp_path: Path) -> None:
    candidate = export_source.find(zoo.trial_dir("lora"))
    folder = export.export(candidate, tmp_path / "model").folder
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{zoo.records['lora'].evals[2]['eval/nll']:.4f}" in card
    assert "LoRA adapters of rank 4 are merged" in card
    assert "64 training pairs" in card
    assert zoo.run_ids["lora"] in card
    assert "orpo-ray train experiment.yaml" in card
    from orpo_ray.config import load

    again = load(folder / "experiment.yaml")
    same = {"name": True, "output_dir": True, "tracking": True, "data": {"cache_dir"}}
    assert again.model_dump(exclude=same) == candidate.config.model_dump(exclude=same)


def test_refusals(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "model"
    export.export(export_source.find(zoo.trial_dir("tied")), target, check=False)
    with pytest.raises(export_source.ExportError, match="holds trial tied"):
        export.export(export_source.find(zoo.trial_dir("lora")), target, check=False)
    export.export(export_source.find(zoo.trial_dir("tied")), target, check=False)  # the same one again
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(export_source.ExportError, match="not an orpo-ray export"):
        export.export(export_source.find(zoo.trial_dir("tied")), tmp_path / "mine", check=False)
    assert (tmp_path / "mine" / "thesis.txt").is_file()
    with pytest.raises(export_source.ExportError, match="no evaluation at step 2"):
        export.export(replace(export_source.find(zoo.trial_dir("tied")), logged={}), tmp_path / "unlogged")

    copy = tmp_path / "runs" / "zoo"
    shutil.copytree(zoo.run_dir, copy)
    for kept in (copy / "trials" / "tied").glob("step-*"):
        shutil.rmtree(kept)
    assert cli.main(["export", str(copy / "trials" / "tied"), "--no-register"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "has no complete checkpoint" in message
    assert "train.checkpoint_every" in message
    (copy / "trials" / "nobody").mkdir()
    with pytest.raises(export_source.ExportError, match="has no trial 'nobody'"):
        export_source.find(str(copy / "trials" / "nobody"))
    with pytest.raises(export_source.ExportError, match="--tracking-uri"):
        export_source.find("0" * 32, zoo.uri)
