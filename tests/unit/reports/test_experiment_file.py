import json

from orpo_ray.config import load
from orpo_ray.reports.experiment_file import command_of, write_experiment
from tests.support.pages import write_sweep
from tests.support.sweeps import trial as made_trial


def test_a_forked_trial_has_no_command_and_names_need_quotes():
    trial = made_trial("t0", {"optim.lr": 1e-3, "data.path": "my pairs.jsonl"}, None)
    command = command_of(trial, "toy", "FILE", None)
    assert command == "orpo-ray train FILE name=toy-t0 optim.lr=0.001 'data.path=my pairs.jsonl'"
    assert command_of(trial | {"forks": [{"step": 5}]}, "toy", "FILE", None) is None


def test_an_experiment_that_sweeps_the_loss_can_be_run_again(tmp_path):
    write_sweep(tmp_path, 12, num_pairs=24)
    tree = json.loads((tmp_path / "sweep.json").read_text())
    del tree["config"]["sweep"]["space"]["loss.orpo_lambda"]
    tree["config"]["sweep"]["space"]["loss.name"] = {"type": "grid", "values": ["orpo", "sft"]}
    (tmp_path / "sweep.json").write_text(json.dumps(tree))
    file = write_experiment(tmp_path)
    assert load(file).sweep.space["loss.name"].candidates() == ("orpo", "sft")
    assert load(file, ["loss.name=sft", "sweep=null"]).loss.orpo_lambda == 0
