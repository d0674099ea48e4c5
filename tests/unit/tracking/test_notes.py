import shlex

import pytest

from orpo_ray.config import parse
from orpo_ray.tracking.notes import sweep_answer, sweep_note, trial_command, trial_note
from tests.support.events import as_event

METRIC = "eval/preference_accuracy"


@pytest.fixture
def config(tmp_path):
    return parse(
        {
            "name": "toy",
            "output_dir": str(tmp_path),
            "model": {"path": "tiny-llama-1m"},
            "data": {"path": "builtin://style-pairs"},
            "train": {"max_steps": 20},
            "sweep": {
                "metric": METRIC,
                "space": {
                    "optim.lr": {"type": "grid", "values": [1.0e-3, 1.0e-6]},
                    "size": {
                        "type": "bundle",
                        "values": {
                            "1m": {"model.path": "tiny-llama-1m"},
                            "8m": {"model.path": "tiny-llama-8m", "scaling.num_workers": 2},
                        },
                    },
                },
            },
        }
    )


def trial(number, score, size="1m", status="finished"):
    return {
        "trial_id": f"{number:05d}",
        "params": {"optim.lr": 1.0e-3 * (number + 1), "size": size},
        "status": status,
        "steps": 20,
        "metrics": {} if score is None else {METRIC: score},
        "checkpoint": f"/c/{number}",
        "train_seconds": 100.0,
        "error": None,
        "reused_from": None,
    }


def results(*trials):
    best = max((t for t in trials if t["status"] == "finished"), key=lambda t: t["metrics"][METRIC], default=None)
    return {"name": "toy", "metric": METRIC, "mode": "max", "best": best, "trials": list(trials)}


def end(**details):
    known = {
        "event": "finished",
        "trial_id": "00000",
        "status": "finished",
        "steps": 20,
        "metrics": {METRIC: 0.75, "eval/nll": None},
        "checkpoint": "/c/20",
        "train_seconds": 3.5,
    }
    return as_event(known | details)


def test_a_sweep_says_what_it_is(config):
    note = sweep_note(config)
    assert "Sweep over `optim.lr`, `size`, judged by `eval/preference_accuracy` (higher is better)" in note
    assert f"`{config.run_dir}`" in note
    assert sweep_note(config.model_copy(update={"sweep": None})).startswith("One training run")


def test_the_answer_names_the_best_the_tied_ones_and_the_cost(config):
    trials = [trial(n, 0.5 + n / 100) for n in range(12)] + [trial(12, 0.99, status="stopped_early")]
    trials += [trial(13, None, size="8m", status="diverged")]
    outcome = results(*trials)
    outcome["winners"] = {
        "best": {"trial_id": "00011"},
        "settings": [
            {"name": "best one", "trial_ids": ["00011"], "mean": 0.61, "low": 0.6, "high": 0.62, "tied": True},
            {"name": "next one", "trial_ids": ["00010"], "mean": 0.60, "low": 0.59, "high": 0.61, "tied": True},
            {"name": "worse one", "trial_ids": ["00000"], "mean": 0.50, "low": 0.49, "high": 0.51, "tied": False},
        ],
    }
    note = sweep_answer(config, outcome, {"00011": "#/runs/x"}, interrupted=False)
    assert "**Best: [best one](#/runs/x)**, `eval/preference_accuracy` 0.6100 (95 %: 0.6000 to 0.6200)" in note
    assert "checkpoint `/c/11`" in note
    assert "cannot tell it from: next one." in note
    # 13 trials of one worker and one of two, 100 s each.
    assert "14 trials: 12 finished, 1 stopped early, 1 diverged. Cost: 0.42 worker-hours of training." in note
    rows = [line for line in note.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[1] for row in rows] == [f"{0.61 - n / 100:.4f}" for n in range(10)]  # finished ones first
    assert "Interrupted" not in note
    assert "**Interrupted**" in sweep_answer(config, outcome, {}, interrupted=True)


def test_an_answer_without_intervals_or_without_any_trial(config):
    assert "`eval/preference_accuracy` 0.7000, checkpoint" in sweep_answer(
        config, results(trial(0, 0.7)), {}, interrupted=False
    )
    assert "**No trial finished.**" in sweep_answer(config, results(), {}, interrupted=False)


def test_the_best_ten_where_less_is_better(config):
    outcome = results(trial(0, 0.7), trial(1, 0.2)) | {"mode": "min"}
    note = sweep_answer(config, outcome, {}, interrupted=False)
    assert note.index("| 0.2000 |") < note.index("| 0.7000 |")


def test_a_trial_tells_its_settings_and_its_end(config):
    params = {"optim.lr": 1.0e-3, "size": "8m"}
    told = {"parent": "#/runs/p", "command": "orpo-ray train x.yaml", "end": None}
    note = trial_note(config, "00002", params, **told)
    assert note.startswith("Trial of the sweep [toy](#/runs/p), `00002`: **8m lr=1.0e-03**")
    assert "Not ended yet." in note
    assert "| `scaling.num_workers` | `2` |" in note
    assert "```\norpo-ray train x.yaml\n```" in note
    note = trial_note(config, "00002", params, **told | {"end": end()})
    assert "**Finished** after 20 steps, 3.5 s." in note
    assert "Checkpoint: `/c/20`" in note
    assert "| `eval/preference_accuracy` | 0.75 |" in note
    assert "| `eval/nll` | – |" in note
    failed = end(status="failed", checkpoint=None, metrics={}, error="boom\n" * 1000)
    note = trial_note(config, "c00002", params, **told | {"end": failed, "purpose": "confirm"})
    assert note.startswith("Another seed for a finalist of")
    assert "boom" in note
    assert "Checkpoint" not in note
    assert len(note.encode()) < 8000  # MLflow's limit for tags
    assert "no single command" in trial_note(config, "00002", params, **told | {"command": None})
    assert "MLflow run `abc`" in trial_note(config, "00002", params, **told | {"end": end(reused_from="abc")})


@pytest.mark.parametrize(
    ("started_by", "file", "kept"),
    [
        ("orpo-ray sweep exp/x.yaml", "exp/x.yaml", []),
        ("orpo-ray sweep 'a b.yaml' train.max_steps=5 name=other", "a b.yaml", ["train.max_steps=5"]),
        ("orpo-ray sweep x.yaml --num-cpus 4 optim.lr=1 sweep.num_samples=3", "x.yaml", []),
        ("orpo-ray sweep --num-cpus 4 x.yaml", "x.yaml", []),
        ("pytest tests", "config.yaml", []),
    ],
)
def test_the_command_of_a_trial_keeps_what_the_sweep_was_started_with(config, started_by, file, kept):
    command = trial_command(config, "00002", {"optim.lr": 1.0e-6, "size": "8m"}, started_by)
    settings = ["optim.lr=1e-06", "model.path=tiny-llama-8m", "scaling.num_workers=2"]
    assert shlex.split(command) == ["orpo-ray", "train", file, *kept, "name=toy-00002", *settings]


def test_the_command_gives_the_trial_s_config(config):
    params = {"optim.lr": 1.0e-6, "size": "8m"}
    words = shlex.split(trial_command(config, "00002", params, "orpo-ray sweep x.yaml"))
    again = parse(config.model_dump(mode="json"), [*words[3:], "sweep=null"])
    wanted = config.trial(params).model_copy(update={"name": "toy-00002"})
    assert again.model_dump() == wanted.model_dump()
