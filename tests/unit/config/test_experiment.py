import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from orpo_ray.config import METRIC_MODES, ConfigError, ExperimentConfig, SweepConfig, as_given, load, parse
from orpo_ray.config.space import Bundle, Grid, LogUniform


def config(*overrides: str) -> ExperimentConfig:
    """The smallest experiment, with overrides; their values are YAML, so a whole sweep is one override."""
    tree: dict[str, Any] = {
        "name": "test",
        "model": {"path": "tiny-llama-1m"},
        "data": {"path": "builtin://style-pairs"},
        "train": {"max_steps": 100},
    }
    return parse(tree, list(overrides))


BROKEN = {
    # what is typed -> words of the message
    "typo in a section": (["optm.lr=1e-5"], ["optm", "unknown key", "did you mean optim?"]),
    "typo in a key": (["optim.lrr=1e-5"], ["optim.lrr", "unknown key", "did you mean lr?"]),
    "typo in a nested key": (["model.lora={rnk: 8}"], ["model.lora.rnk", "did you mean rank?"]),
    "searcher unknown": (["sweep={searcher: {type: bohb}}"], ["sweep.searcher", "'bohb'", "'optuna', 'hyperopt'"]),
    "typo inside a union": (
        ["sweep={searcher: {type: optuna, samplr: tpe}}"],
        ["sweep.searcher", "samplr", "did you mean sampler?"],
    ),
    "a key like no other": (["optim.zzz=1"], ["optim.zzz", "known here", "beta1", "lr", "schedule"]),
    "missing section": (["model=null"], ["model", "None"]),
    "wrong type": (["train.max_steps=many"], ["train.max_steps", "integer", "'many'"]),
    "fraction of a step": (["train.max_steps=1.5"], ["train.max_steps", "integer", "1.5"]),
    "out of range": (["optim.lr=0"], ["optim.lr", "greater than 0", "(got 0)"]),
    "negative lambda": (["loss.orpo_lambda=-0.1"], ["loss.orpo_lambda", "greater than or equal to 0", "-0.1"]),
    "lambda that is no number": (["loss.orpo_lambda=.nan"], ["loss.orpo_lambda", "nan"]),
    "unknown choice": (
        ["loss.name=kto"],
        ["loss.name", "'orpo', 'sft', 'dpo', 'cpo', 'simpo', 'ipo', 'reward' or 'rloo'", "'kto'"],
    ),
    "name that is no folder": (["name=a/b"], ["name", "pattern", "'a/b'"]),
    "batch arithmetic": (
        ["train.global_batch_size=3", "scaling.num_workers=4"],
        ["global_batch_size (3)", "must be at least", "num_workers (4)", "larger batch or fewer workers"],
    ),
    "no room for an answer": (
        ["data.max_tokens=512", "data.max_prompt_tokens=512"],
        ["data", "max_prompt_tokens (512) < max_tokens (512)", "answer"],
    ),
    "sft with a lambda": (
        ["loss={name: sft, orpo_lambda: 0.5}"],
        ["loss", "sft is λ = 0", "orpo_lambda is 0.5", "drop it", "name: orpo"],
    ),
    "lambda with dpo": (
        ["loss={name: dpo, orpo_lambda: 0.5}"],
        ["loss", "dpo does not read orpo_lambda (0.5)", "only orpo, sft", "drop it", "dpo reads beta"],
    ),
    "lambda 0 with dpo": (["loss={name: dpo, orpo_lambda: 0}"], ["dpo does not read orpo_lambda (0.0)"]),
    "beta with orpo": (
        ["loss.beta=0.1"],
        ["orpo does not read beta (0.1)", "only dpo, cpo, simpo, ipo", "orpo reads orpo_lambda, ratio, temperature"],
    ),
    "temperature with sft": (
        ["loss={name: sft, temperature: 2}"],
        ["sft does not read temperature (2.0)", "only orpo"],
    ),
    "ratio with simpo": (["loss={name: simpo, ratio: odds}"], ["simpo does not read ratio (odds)"]),
    "margin with cpo": (["loss={name: cpo, simpo_gamma: 1}"], ["cpo does not read simpo_gamma (1.0)", "only simpo"]),
    "NLL weight with ipo": (["loss={name: ipo, nll_weight: 1}"], ["ipo does not read nll_weight (1.0)", "only cpo"]),
    "temperature 0": (["loss.temperature=0"], ["loss.temperature", "greater than 0", "(got 0)"]),
    "beta 0": (["loss={name: dpo, beta: 0}"], ["loss.beta", "greater than 0", "(got 0)"]),
    "unknown ratio": (["loss.ratio=log"], ["loss.ratio", "'odds' or 'probability'", "'log'"]),
    "unknown preset": (["loss.preset=axolotl"], ["loss.preset", "'trl', 'llamafactory' or 'authors'", "'axolotl'"]),
    "preset contradicted": (
        ["loss={preset: llamafactory, nll_scope: prompt_and_response}"],
        ["preset llamafactory sets nll_scope to response", "nll_scope is prompt_and_response", "drop one"],
    ),
    "preset contradicted by the default": (
        ["loss={preset: authors, nll_eos: true}"],
        ["preset authors sets nll_eos to False", "nll_eos is True"],
    ),
    "preset of another loss": (
        ["loss={name: cpo, preset: trl}"],
        ["preset trl", "ORPO code base", "loss.name is cpo", "set nll_scope, nll_reduction, nll_eos, answer_padding"],
    ),
    "both lengths": (["train.epochs=2"], ["train", "either max_steps or epochs", "max_steps=100", "epochs=2.0"]),
    "no length": (["train.max_steps=null"], ["train", "either max_steps or epochs", "max_steps=None", "epochs=None"]),
    "evaluation after the end": (["train.eval_every=101"], ["train", "eval_every (101)", "max_steps (100)"]),
    "offload_param below stage 3": (
        ["deepspeed={zero_stage: 2, offload_param: cpu}"],
        ["deepspeed", "offload_param (cpu)", "needs zero_stage 3", "zero_stage is 2"],
    ),
    "cpu offload at stage 0": (
        ["deepspeed={offload_optimizer: cpu}"],
        ["deepspeed", "offload_optimizer (cpu)", "zero_stage 1, 2 or 3", "zero_stage is 0"],
    ),
    "nvme offload below stage 3": (
        ["deepspeed={zero_stage: 2, offload_optimizer: nvme, nvme_path: /tmp}"],
        ["offload_optimizer (nvme)", "needs zero_stage 3", "zero_stage is 2"],
    ),
    "nvme without a path": (["deepspeed={zero_stage: 3, offload_param: nvme}"], ["nvme", "needs nvme_path"]),
    "zero stage 4": (["deepspeed.zero_stage=4"], ["deepspeed.zero_stage", "0, 1, 2 or 3", "(got 4)"]),
    # Sweeps.
    "unknown metric": (["sweep={metric: eval/acc}"], ["sweep.metric", "'eval/acc'", *METRIC_MODES]),
    "training metric": (["sweep={metric: train/loss}"], ["sweep.metric", "'train/loss'", "eval/preference_accuracy"]),
    "asha without evaluations": (
        ["sweep={scheduler: {type: asha, grace_steps: 10}}"],
        ["scheduler asha", "evaluations", "set train.eval_every"],
    ),
    "median without evaluations": (
        ["sweep={scheduler: {type: median, grace_steps: 10}}"],
        ["scheduler median", "set train.eval_every"],
    ),
    "grace as long as the training": (
        ["sweep={scheduler: {type: asha, grace_steps: 100}}", "train.eval_every=10"],
        ["scheduler.grace_steps (100)", "below", "train.max_steps (100)"],
    ),
    "two bundles": (
        [
            "sweep={space: {a: {type: bundle, values: {x: {optim.lr: 1}}}, "
            "b: {type: bundle, values: {y: {optim.eps: 1}}}}}"
        ],
        ["sweep", "at most one bundle", "merge"],
    ),
    "workers outside a bundle": (
        ["sweep={space: {scaling.num_workers: {type: grid, values: [1, 2]}}}"],
        ["axis scaling.num_workers", "belongs in a bundle"],
    ),
    "model outside a bundle": (
        ["sweep={space: {model.path: {type: grid, values: [tiny-llama-1m, tiny-llama-2m]}}}"],
        ["axis model.path", "belongs in a bundle"],
    ),
    "unknown axis type": (
        ["sweep={space: {optim.lr: {type: gird, values: [1]}}}"],
        ["sweep.space.optim.lr", "'gird'", "'grid', 'choice', 'uniform', 'loguniform', 'bundle'"],
    ),
    "typo in an axis": (
        ["sweep={space: {optim.lr: {type: grid, value: [1]}}}"],
        ["sweep.space.optim.lr", "did you mean values?", "Field required"],
    ),
    "unknown setting as axis": (
        ["sweep={space: {optim.lrr: {type: grid, values: [1]}}}"],
        ["sweep.space.optim.lrr", "candidate 1", "did you mean lr?"],
    ),
    "unknown setting in a bundle": (
        ["sweep={space: {size: {type: bundle, values: {small: {model.pth: x}}}}}"],
        ["sweep.space.size", "candidate 'small'", "model.pth", "did you mean path?"],
    ),
    "bad candidate": (
        ["sweep={space: {optim.lr: {type: grid, values: [1e-5, fast]}}}"],
        ["sweep.space.optim.lr", "candidate 'fast'", "optim.lr", "valid number"],
    ),
    "bad end of a range": (
        ["sweep={space: {optim.beta1: {type: uniform, low: 0.5, high: 1.0}}}"],
        ["sweep.space.optim.beta1", "candidate 1.0", "less than 1"],
    ),
    "lambda swept under sft": (
        ["loss.name=sft", "sweep={space: {loss.orpo_lambda: {type: grid, values: [0, 0.5]}}}"],
        ["sweep.space.loss.orpo_lambda", "candidate 0.5", "sft is λ = 0"],
    ),
    "lambda swept under dpo": (
        ["loss.name=dpo", "sweep={space: {loss.orpo_lambda: {type: grid, values: [0, 0.5]}}}"],
        ["sweep.space.loss.orpo_lambda", "candidate 0:", "candidate 0.5", "dpo does not read orpo_lambda (0.5)"],
    ),
    "lambda and loss swept together": (
        [
            "sweep={space: {loss.name: {type: grid, values: [orpo, dpo]}, "
            "loss.orpo_lambda: {type: grid, values: [0.1, 0.5]}}}"
        ],
        ["'loss.name': 'dpo', 'loss.orpo_lambda': 0.5", "dpo does not read orpo_lambda (0.5)"],
    ),
    "preset swept": (
        ["sweep={metric: eval/preference_accuracy, space: {loss.preset: {type: grid, values: [trl, authors]}}}"],
        [
            "eval/preference_accuracy changes its meaning with loss.preset",
            "so does every other metric",
            "vary a preset's settings one by one",
        ],
    ),
    "scope and padding swept together": (
        [
            "sweep={metric: eval/nll, space: {loss.nll_scope: {type: grid, values: [response, prompt_and_response]}, "
            "loss.answer_padding: {type: grid, values: [true, false]}}}"
        ],
        ["eval/nll changes its meaning with loss.nll_scope", "so does every other metric", "vary fewer"],
    ),
    "axis on name": (
        ["sweep={space: {name: {type: grid, values: [a, b]}}}"],
        ["sweep.space.name", "axis 'name'", "data, deepspeed, generation, loss, model, optim, scaling, train"],
    ),
    "axis on the sweep": (
        ["sweep={space: {sweep.seed: {type: grid, values: [1, 2]}}}"],
        ["sweep.space.sweep.seed", "axis 'sweep.seed'", "must be a setting in data"],
    ),
    "axis on tracking, in a bundle": (
        ["sweep={space: {where: {type: bundle, values: {a: {tracking.experiment: x}}}}}"],
        ["sweep.space.where", "axis 'tracking.experiment'", "must be a setting in data"],
    ),
    "batch arithmetic in one bundle": (
        [
            "sweep={space: {size: {type: bundle, "
            "values: {2m: {scaling.num_workers: 2}, 8m: {scaling.num_workers: 33}}}}}"
        ],
        ["sweep.space.size", "candidate '8m'", "num_workers (33)", "global_batch_size (32)"],
    ),
    # Overrides.
    "override without a value": (["optim.lr"], ["'optim.lr'", "key.path=value", "optim.lr=1e-5"]),
    "override without a key": (["=1"], ["'=1'", "key.path=value"]),
    "override of an axis": (["sweep.space.optim.lr=1"], ["sweep.space.optim.lr=1", "edit sweep.space in the file"]),
    "override into a value": (["name.first=x"], ["name.first", "name is a value ('test')", "not a section"]),
}


@pytest.mark.parametrize(("overrides", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_is_refused_in_words(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, str(caught.value)


def test_several_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config("optim.lrr=1", "loss.name=kto", "train.micro_batch_size=x", "data.long_prompts=cut")
    head, *lines = str(caught.value).splitlines()
    assert head == "config: 4 problem(s)"
    assert [line.split(":")[0].strip() for line in lines] == [
        "data.long_prompts",
        "loss.name",
        "optim.lrr",
        "train.micro_batch_size",
    ]


def test_problems_of_several_axes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config("sweep={space: {optim.lr: {type: grid, values: [a, b]}, loss.nll_scope: {type: choice, values: [all]}}}")
    message = str(caught.value)
    assert "3 problem(s)" in message
    assert all(f"candidate {value!r}" in message for value in ("a", "b", "all"))


def test_what_only_a_combination_breaks_is_found_before_anything_starts() -> None:
    axes = "size: {type: bundle, values: {2m: {scaling.num_workers: 1}, 8m: {scaling.num_workers: 8}}}"
    config(f"sweep={{space: {{{axes}}}}}")
    axes += ", train.global_batch_size: {type: grid, values: [4, 8]}"  # 4 pairs are too few for 8 workers only
    with pytest.raises(ConfigError) as caught:
        config(f"sweep={{space: {{{axes}}}}}")
    message = str(caught.value)
    assert "1 problem(s)" in message
    for words in ("'size': '8m'", "'train.global_batch_size': 4", "global_batch_size (4)", "num_workers (8)"):
        assert words in message


# ---- law 4: a sweep is judged by what its axes cannot move --------------------------------------------------------

LAMBDA_AXIS = "loss.orpo_lambda: {type: grid, values: [0, 0.1]}"
SCOPE_AXIS = "loss.nll_scope: {type: grid, values: [response, prompt_and_response]}"
EOS_AXIS = "loss.nll_eos: {type: grid, values: [true, false]}"
PADDING_AXIS = "loss.answer_padding: {type: grid, values: [true, false]}"
RATIO_AXIS = "loss.ratio: {type: grid, values: [odds, probability]}"
TEMPERATURE_AXIS = "loss.temperature: {type: loguniform, low: 0.1, high: 2}"
BETA_BUNDLE = "how: {type: bundle, values: {a: {loss.name: dpo, loss.beta: 0.1}, b: {loss.name: dpo, loss.beta: 1}}}"
LAMBDA_BUNDLE = "how: {type: bundle, values: {a: {loss.orpo_lambda: 0}, b: {loss.orpo_lambda: 1}}}"


@pytest.mark.parametrize(
    ("metric", "axes", "swept", "allowed"),
    [
        ("eval/loss", LAMBDA_AXIS, "loss.orpo_lambda", set(METRIC_MODES) - {"eval/loss"}),
        ("eval/loss", LAMBDA_BUNDLE, "loss.orpo_lambda", set(METRIC_MODES) - {"eval/loss"}),
        ("eval/nll", SCOPE_AXIS, "loss.nll_scope", set(METRIC_MODES) - {"eval/loss", "eval/nll"}),
        ("eval/loss", RATIO_AXIS, "loss.ratio", set(METRIC_MODES) - {"eval/loss"}),
        ("eval/loss", TEMPERATURE_AXIS, "loss.temperature", set(METRIC_MODES) - {"eval/loss"}),
        ("eval/loss", BETA_BUNDLE, "loss.beta, loss.name", set(METRIC_MODES) - {"eval/loss"}),
        ("eval/nll", EOS_AXIS, "loss.nll_eos", set(METRIC_MODES) - {"eval/loss", "eval/nll"}),
        ("eval/log_odds", PADDING_AXIS, "loss.answer_padding", {"eval/nll"}),
        ("eval/odds_ratio_loss", PADDING_AXIS, "loss.answer_padding", {"eval/nll"}),
        ("eval/preference_accuracy", PADDING_AXIS, "loss.answer_padding", {"eval/nll"}),
        ("eval/nll_per_byte", PADDING_AXIS, "loss.answer_padding", {"eval/nll"}),
        ("eval/loss", f"{LAMBDA_AXIS}, {SCOPE_AXIS}", "loss.nll_scope", set(METRIC_MODES) - {"eval/loss", "eval/nll"}),
    ],
)
def test_metric_that_an_axis_moves_is_refused_and_the_others_are_named(
    metric: str, axes: str, swept: str, allowed: set[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(f"sweep={{metric: {metric}, space: {{{axes}}}}}")
    message = str(caught.value)
    assert f"metric {metric} changes its meaning with" in message
    assert swept in message
    assert set(message.partition("use one of ")[2].split(", ")) == allowed
    for other in allowed:
        config(f"sweep={{metric: {other}, space: {{{axes}}}}}")


def test_eval_loss_may_rank_a_sweep_that_leaves_its_meaning_alone() -> None:
    accepted = config("sweep={metric: eval/loss, space: {optim.lr: {type: grid, values: [1e-5, 1e-4]}}}")
    assert accepted.sweep is not None
    assert accepted.sweep.mode == "min"


# ---- values -------------------------------------------------------------------------------------------------------


def test_yaml_strings_become_numbers_everywhere() -> None:
    parsed = config(
        "optim.eps=1e-6",
        "sweep={num_samples: 2, space: {optim.lr: {type: grid, values: [1e-6, 1e-5]}, "
        "optim.weight_decay: {type: loguniform, low: 1e-4, high: 1e-1}, "
        "size: {type: bundle, values: {small: {optim.eps: 1e-7, train.micro_batch_size: '8'}}}}}",
    )
    assert parsed.sweep is not None
    assert parsed.optim.eps == 1e-6
    space = parsed.sweep.space
    assert isinstance(space["optim.lr"], Grid)
    assert space["optim.lr"].values == (1e-6, 1e-5)
    assert all(isinstance(value, float) for value in space["optim.lr"].values)
    assert isinstance(space["optim.weight_decay"], LogUniform)
    assert (space["optim.weight_decay"].low, space["optim.weight_decay"].high) == (1e-4, 1e-1)
    trial = parsed.trial({"size": "small", "optim.lr": 1e-6, "optim.weight_decay": 0.01})
    assert (trial.optim.eps, trial.train.micro_batch_size) == (1e-7, 8)
    assert isinstance(trial.optim.eps, float)


def test_trial_is_the_experiment_without_its_sweep_and_with_its_params() -> None:
    parsed = config(
        "optim.schedule=linear",
        "sweep={space: {loss.orpo_lambda: {type: grid, values: [0, 0.5]}, size: {type: bundle, values: {"
        "2m: {model.path: tiny-llama-2m}, "
        "8m: {model.path: tiny-llama-8m, scaling.num_workers: 2, deepspeed.zero_stage: 3}}}}}",
    )
    params = {"size": "8m", "loss.orpo_lambda": 0.5}
    trial = parsed.trial(params)
    assert trial.sweep is None
    assert trial.model.path == "tiny-llama-8m"
    assert (trial.scaling.num_workers, trial.deepspeed.zero_stage) == (2, 3)
    assert (trial.loss.orpo_lambda, trial.optim.schedule) == (0.5, "linear")
    assert trial.train.global_batch_size == parsed.train.global_batch_size
    assert parsed.settings(params) == {
        "model.path": "tiny-llama-8m",
        "scaling.num_workers": 2,
        "deepspeed.zero_stage": 3,
        "loss.orpo_lambda": 0.5,
    }
    assert parsed.model.path == "tiny-llama-1m"  # the experiment itself is untouched
    with pytest.raises(ConfigError, match=r"loss\.orpo_lambda.*greater than or equal to 0"):
        parsed.trial({"loss.orpo_lambda": -1})


def test_a_single_run_is_a_sweep_of_one_trial() -> None:
    run, sweep = config().as_sweep()
    assert run.sweep == sweep == SweepConfig()
    assert (sweep.num_trials, sweep.mode, sweep.bundle_axis) == (1, "max", None)
    assert config().trial({}) == config()


@pytest.mark.parametrize(("searcher", "trials"), [("random", 18), ("optuna", 3)])
def test_number_of_trials(searcher: str, trials: int) -> None:
    parsed = config(
        f"sweep={{num_samples: 3, searcher: {{type: {searcher}}}, space: {{"
        "loss.orpo_lambda: {type: grid, values: [0, 0.1, 1]}, optim.lr: {type: loguniform, low: 1e-6, high: 1e-4}, "
        "size: {type: bundle, values: {a: {model.path: tiny-llama-1m}, b: {model.path: tiny-llama-2m}}}}}"
    )
    assert parsed.sweep is not None
    assert parsed.sweep.num_trials == trials
    assert parsed.sweep.bundle_axis == "size"
    assert isinstance(parsed.sweep.space["size"], Bundle)


def test_sft_is_lambda_zero() -> None:
    assert config("loss.name=sft").loss.orpo_lambda == 0.0
    assert config("loss={name: sft, orpo_lambda: 0}").loss.orpo_lambda == 0.0
    assert config("loss.orpo_lambda=0.3").loss.orpo_lambda == 0.3


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        # TRL 1.16: DPOConfig.beta, CPOConfig.beta and .cpo_alpha; simpo: princeton-nlp/SimPO, γ / β = 0.25.
        ("orpo", {"orpo_lambda": 0.1, "ratio": "odds", "temperature": 1.0}),
        ("sft", {"orpo_lambda": 0.0}),
        ("dpo", {"beta": 0.1}),
        ("cpo", {"beta": 0.1, "nll_weight": 1.0}),
        ("simpo", {"beta": 2.0, "simpo_gamma": 0.5}),
        ("ipo", {"beta": 0.1}),
    ],
)
def test_defaults_of_a_loss_and_nothing_that_it_does_not_read(name: str, settings: dict[str, Any]) -> None:
    parsed = config(f"loss.name={name}")
    every = ("orpo_lambda", "ratio", "temperature", "beta", "simpo_gamma", "nll_weight")
    assert {setting: getattr(parsed.loss, setting) for setting in every} == dict.fromkeys(every) | settings
    assert parsed.loss.own_settings == settings
    assert parsed.loss.needs_reference == (name in ("dpo", "ipo"))
    given = {setting: value for setting, value in settings.items() if setting != "orpo_lambda" or name != "sft"}
    assert config(f"loss={json.dumps({'name': name} | given)}").loss == parsed.loss


COUNTS_AS = {
    "trl": ("prompt_and_response", "token", True, False),
    "llamafactory": ("response", "pair", True, False),
    "authors": ("prompt_and_response", "token", False, True),
}


@pytest.mark.parametrize(("preset", "settings"), COUNTS_AS.items())
@pytest.mark.parametrize("name", ["orpo", "sft"])
def test_presets_set_what_is_counted(name: str, preset: str, settings: tuple[Any, ...]) -> None:
    loss = config(f"loss={{name: {name}, preset: {preset}}}").loss
    assert (loss.nll_scope, loss.nll_reduction, loss.nll_eos, loss.answer_padding) == settings
    scope, reduction, eos, padding = settings
    again = {"nll_scope": scope, "nll_reduction": reduction, "nll_eos": eos, "answer_padding": padding}
    assert config(f"loss={json.dumps({'name': name, 'preset': preset} | again)}").loss == loss  # agreeing is allowed


def test_what_a_loss_implies_is_not_handed_on_to_trials() -> None:
    """Else a trial with another loss would inherit λ = 0 from sft, or be refused for a setting nobody gave."""
    parsed = config("loss.name=sft", "sweep={space: {loss.name: {type: grid, values: [sft, orpo, dpo]}}}")
    losses = {name: parsed.trial({"loss.name": name}).loss for name in ("sft", "orpo", "dpo")}
    assert {name: (loss.orpo_lambda, loss.beta) for name, loss in losses.items()} == {
        "sft": (0.0, None),
        "orpo": (0.1, None),
        "dpo": (None, 0.1),
    }


@pytest.mark.parametrize(
    "deepspeed",
    [
        "{zero_stage: 1, offload_optimizer: cpu}",
        "{zero_stage: 3, offload_optimizer: cpu, offload_param: cpu}",
        "{zero_stage: 3, offload_param: nvme, offload_optimizer: nvme, nvme_path: /tmp}",
    ],
)
def test_possible_offloads_are_accepted(deepspeed: str) -> None:
    config(f"deepspeed={deepspeed}")


def test_early_stopping_with_room_is_accepted() -> None:
    parsed = config("sweep={scheduler: {type: asha, grace_steps: 20}}", "train.eval_every=20")
    assert parsed.sweep is not None
    assert parsed.sweep.scheduler.type == "asha"


def test_settings_cannot_be_changed_after_the_checks() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config().optim, "lr", 1.0)  # noqa: B010


def test_a_config_survives_json() -> None:
    parsed = config("sweep={space: {optim.lr: {type: grid, values: [1e-6]}}}", "model.lora={target_modules: [q_proj]}")
    assert parse(json.loads(parsed.model_dump_json())) == parsed
    for loss in ("{preset: authors, temperature: 0.5}", "{name: sft, preset: trl}", "{name: dpo}", "{name: simpo}"):
        parsed = config(f"loss={loss}")
        assert parse(json.loads(parsed.model_dump_json())) == parsed
        assert parse(parsed.model_dump(mode="json", exclude_unset=True)) == parsed
        assert parsed.model_dump(exclude_unset=True)["loss"] == yaml.safe_load(loss)


def test_every_setting_is_documented() -> None:
    assert ExperimentConfig.model_fields["name"].description == (
        "Name of the run directory and of the MLflow parent run; the same name continues the same sweep."
    )
    sections = ["model", "data", "loss", "optim", "train", "deepspeed", "scaling", "tracking"]
    for section in sections:
        fields = type(getattr(config(), section)).model_fields
        assert [name for name, field in fields.items() if not field.description] == []


# ---- files --------------------------------------------------------------------------------------------------------

EXPERIMENT = """\
name: file
output_dir: out
model: {path: tiny-llama-1m}
data: {path: "builtin://style-pairs"}
train: {max_steps: 10}
"""


def test_load_reads_a_file_and_applies_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT)
    loaded = load(path, ["optim.lr=1e-5", "model.lora.rank=4", "train={epochs: 2}", "loss.name=sft"])
    assert (loaded.optim.lr, loaded.train.epochs, loaded.train.max_steps, loaded.loss.name) == (1e-5, 2.0, None, "sft")
    assert loaded.model.lora is not None
    assert loaded.model.lora.rank == 4
    assert loaded.run_dir == tmp_path / "out" / "file"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["experiment.yaml", "no such file"]),
        ("name: [", ["experiment.yaml", "not valid YAML", "line 1"]),
        ("- a\n- b", ["experiment.yaml", "mapping", "got list"]),
        ("", ["experiment.yaml", "mapping", "got NoneType"]),
        ("name: x", ["experiment.yaml", "3 problem(s)", "model: Field required", "data:", "train:"]),
    ],
)
def test_a_file_that_is_no_experiment_is_refused_by_name(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "experiment.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert [word for word in words if word not in str(caught.value)] == []


def test_parsing_needs_neither_torch_nor_ray_and_takes_under_a_second(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT + "sweep: {space: {optim.lr: {type: grid, values: [1e-6, 1e-5]}}}\n")
    script = """\
    import sys, time
    from orpo_ray.config import load
    load(sys.argv[1])
    heavy = {"torch", "ray", "deepspeed", "mlflow", "transformers", "datasets", "optuna", "numpy"} & set(sys.modules)
    # CPU seconds of this process, its start included: other load on the machine does not count.
    print(sorted(heavy), time.process_time())
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    heavy, _, seconds = run.stdout.strip().rpartition(" ")
    assert heavy == "[]"
    assert float(seconds) < 1.0


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_run_directories_that_name_the_sampling_temperature_are_read(temperature) -> None:
    dump = config().model_dump(mode="json")
    dump["loss"]["sampling_temperature"] = temperature
    assert parse(as_given(dump)) == config()
    dump["loss"]["sampling_temperature"] = 0.7
    with pytest.raises(ConfigError, match="sampling_temperature"):
        parse(as_given(dump))
