"""`orpo-ray reproduce paper`: train what the paper compares, sample, score, and put our numbers beside the published.

Every step leaves a file in the run directory, and the same command goes on behind the last one. Shape suffixes: N
prompts or pairs, R rounds, B resamples.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from orpo_ray import provenance
from orpo_ray.config import ExperimentConfig, as_given, parse
from orpo_ray.data.dataset import held_out_texts, load_pairs
from orpo_ray.data.rows import Message
from orpo_ray.errors import UserError
from orpo_ray.models.loading import load_tokenizer
from orpo_ray.models.packing import Counting
from orpo_ray.models.reward_model import RewardModel
from orpo_ray.orchestration import sweep
from orpo_ray.orchestration.tasks import Task, run_all
from orpo_ray.reports.progress import SweepProgress
from orpo_ray.reproduction import flops, sampling, win_rate
from orpo_ray.reproduction.diversity import Diversity, Embed, diversity, local_embedder
from orpo_ray.reproduction.scales import LAMBDAS, MAIN_LAMBDA, SEEDS, Scale, base_pairs
from orpo_ray.results import export, export_source
from orpo_ray.results.bootstrap import LEVEL, RESAMPLES, draws
from orpo_ray.storage.journal import read_events
from orpo_ray.storage.pair_scores import PAIRS_FILE, PairScores
from orpo_ray.storage.run_dir import EVENTS_FILE, write_results
from orpo_ray.training import reference

RESULT_FILE = "reproduction.json"
_BEGUN_FILE = "begun.json"
_CLOCK_FILE = "seconds.json"
SIDES = ("chosen_logp", "rejected_logp")
POLICIES = ("orpo", "sft", "dpo", "rlhf")
_JUDGE, _COACH = 1, 2
"""Seeds of the two reward models, from the reproduction's first."""
_ACCOUNTED = 4
"""Pairs that FLOPs are counted on, each way a step can run: real passes of the whole model, without adapters."""
_COMPARED = (
    ("probability less odds", "probability", "orpo"),
    ("orpo less sft", "orpo", "sft"),
    ("orpo-0.1 less sft", "orpo-0.1", "sft"),
)


class ReproduceError(UserError, RuntimeError):
    """The reproduction cannot go on; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Change:
    """Of a mean token log-probability from the start of training to its end, in nats, over held-out pairs."""

    mean: float
    low: float
    """95 % bootstrap interval over pairs, from here"""
    high: float
    """to here."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one reproduction keeps its things."""

    folder: Path
    scale: Scale

    def experiment(self, role: str, **settings: Any) -> ExperimentConfig:
        """The experiment of a role, e.g. `sft`; dotted settings are changed."""
        tree = self.scale.tree(role) | {"name": role, "output_dir": str(self.folder)}
        return parse(tree, [f"{path}={json.dumps(value)}" for path, value in settings.items()], source=role)

    def model(self, name: str) -> Path:
        """Where an exported model is, or will be."""
        return self.folder / "models" / name

    def results_of(self, tasks: Sequence[Task], console: Console) -> dict[str, Any]:
        """What tasks give, each with the resources of a worker that trains. Ray must be initialised."""
        return run_all(tasks, self.folder / "kept", self.experiment("lambda").scaling, console)

    def begin(self) -> dict[str, Any]:
        """Claim the folder for this scale, at the first of any number of commands.

        Returns:
            Of the first command, what `provenance.collect` tells.

        Raises:
            ReproduceError: what the folder holds was begun with other settings, or the scale's data or seed cannot be
                used.
        """
        if self.scale.seed < 0:
            raise ReproduceError(f"--seed ({self.scale.seed}) must be 0 or more")
        if self.scale.pretrain and not self.scale.data.startswith("builtin://"):
            raise ReproduceError(
                f"scale {self.scale.name} trains a model from nothing on the language of the built-in pairs, so it "
                f"cannot begin with {self.scale.data}: give a pretrained model with --model, too"
            )
        file, mine = self.folder / _BEGUN_FILE, json.loads(json.dumps(dataclasses.asdict(self.scale)))
        if file.exists():
            begun = json.loads(file.read_text(encoding="utf-8"))
            if changed := sorted(key for key in mine if mine[key] != begun["scale"].get(key)):
                known = "; ".join(f"{key} was {begun['scale'].get(key)}, is {mine[key]}" for key in changed)
                raise ReproduceError(
                    f"{self.folder} was begun with other settings ({known}): give another --output-dir, or remove it "
                    "to start over"
                )
            return dict(begun["provenance"])
        begun = {"scale": mine, "provenance": provenance.collect()}
        write_results(file, begun)
        return dict(begun["provenance"])


def run(place: Place, console: Console) -> dict[str, Any]:
    """Train, sample, score and compare. Ray must be initialised.

    Returns:
        What reproduction.json holds: see `orpo_ray.reproduction.page`, which reads it.

    Raises:
        DataError, ModelError, SweepError: what it was given cannot be used.
        ReproduceError: embeddings are not installed, the folder holds a reproduction with other settings, a training
            did not end with a model, or models answered by unlike backends.
        TaskError: a worker that answered or scored was lost.
    """
    try:
        embed = local_embedder()
    except ImportError as error:  # said before half an hour of training, not behind it
        raise ReproduceError(str(error)) from error
    begun = place.begin()
    with _clocked(place) as spent:
        return _run(place, embed, begun, spent, console)


@contextmanager
def _clocked(place: Place) -> Iterator[Callable[[], list[float]]]:
    """Gives what tells the seconds of every command so far, this one the last; they are kept, however it ends."""
    file, began = place.folder / _CLOCK_FILE, time.monotonic()
    earlier = json.loads(file.read_text(encoding="utf-8"))["seconds"] if file.exists() else []

    def spent() -> list[float]:
        return [*earlier, time.monotonic() - began]

    try:
        yield spent
    finally:
        write_results(file, {"seconds": spent()})


def _run(
    place: Place, embed: Embed, begun: dict[str, Any], spent: Callable[[], list[float]], console: Console
) -> dict[str, Any]:
    prompts = _prompts(place)
    seconds = _train_all(place, console)
    # All at once: none waits for another.
    tasks = [*(_answering(place, name, prompts) for name in POLICIES), _starting(place), _accounting(place)]
    found = place.results_of(tasks, console)
    answered = {name: found[f"answers-{name}"] for name in POLICIES}
    if len({each["backend"] for each in answered.values()}) > 1:
        drawn = ", ".join(f"{name} by {each['backend']}" for name, each in answered.items())
        raise ReproduceError(
            f"answers that are compared must be drawn alike, and these are not: {drawn}; remove "
            f"{place.folder / 'kept'}/answers-*.json, and all are drawn again where this command runs now"
        )
    answers_RN = {name: each["answers_RN"] for name, each in answered.items()}
    found |= place.results_of([_scoring(place, name, prompts, answers_RN[name]) for name in POLICIES], console)
    rewards_RN = {name: np.array(found[f"rewards-{name}"]) for name in POLICIES}
    start_N2 = np.array(found["start"])
    result = {
        "scale": place.scale.name,
        "about": place.scale.about(),
        "provenance": begun,
        "finished_with": provenance.collect(),
        "seconds": seconds,
        **_facts(place),
        "judge": _judge(place),
        "win_rates": {other: _win_rate(rewards_RN["orpo"], rewards_RN[other]) for other in POLICIES if other != "orpo"},
        # Each round against the next one.
        "control": _win_rate(rewards_RN["sft"], np.roll(rewards_RN["sft"], -1, axis=0)),
        "rewards": {name: rewards.ravel().tolist() for name, rewards in rewards_RN.items()},
        "answers": {
            name: {
                "characters": float(np.mean([len(text) for row in rounds for text in row])),
                "examples": [row[0] for row in rounds],
                "unfinished": answered[name]["unfinished"] / (len(rounds) * len(prompts)),
                "backend": answered[name]["backend"],
            }
            for name, rounds in answers_RN.items()
        },
        "first_prompt": prompts[0],
        "curves": curves(place, start_N2),
        "changes": changes(place, start_N2),
        "diversity": {name: dataclasses.asdict(_diversity(answers_RN[name], embed)) for name in POLICIES},
        "accounting": found["accounting"],
    }
    result["commands"] = spent()
    write_results(place.folder / RESULT_FILE, result)
    return result


# ---- training -------------------------------------------------------------------------------------------------------


def train_lambdas(place: Place, console: Console, lambdas: Sequence[float] = LAMBDAS) -> dict[str, float]:
    """SFT and ORPO, from the base that the scale begins from; returns seconds of training by what was trained.

    Ray must be initialised. What it raises: see `run`.
    """
    seconds: dict[str, float] = {}
    if place.scale.pretrain:
        pairs = place.folder / "base.jsonl"
        if not pairs.exists():
            _write_text(pairs, base_pairs())
        seconds["base"] = _train(place, "base", {"base": {}}, console, **{"data.path": str(pairs)})
    objectives = {_name_of(value): {"loss.orpo_lambda": value} for value in lambdas}
    seconds["SFT and ORPO"] = _train(place, "lambda", objectives, console, **_base(place))
    return seconds


def train_ratio(place: Place, console: Console) -> float:
    """ORPO with the probability ratio, from the same base; returns seconds of training. As `train_lambdas`."""
    return _train(place, "ratio", {"probability": {"loss.orpo_lambda": MAIN_LAMBDA}}, console, **_base(place))


def _base(place: Place) -> dict[str, Any]:
    """What everything but RLHF and DPO begins from, as settings."""
    return {"model.path": str(place.model("base"))} if place.scale.pretrain else {}


def _train_all(place: Place, console: Console) -> dict[str, float]:
    """Every model of the comparison as a folder; returns seconds of training by role."""
    seconds, base = train_lambdas(place, console), _base(place)
    seed = SEEDS * place.scale.seed
    judges = {"judge": {"train.seed": seed + _JUDGE}, "coach": {"train.seed": seed + _COACH}}
    seconds["reward models"] = _train(place, "reward", judges, console, **base)
    seconds["probability ratio"] = train_ratio(place, console)
    from_sft = {"model.path": str(place.model("sft"))}
    seconds["DPO"] = _train(place, "dpo", {"dpo": {}}, console, **from_sft)
    coach = {"loss.reward_model": str(place.model("coach"))}
    seconds["RLHF"] = _train(place, "rlhf", {"rlhf": {}}, console, **from_sft, **coach)
    return seconds


def _name_of(orpo_lambda: float) -> str:
    """sft, orpo (the λ that is compared), or orpo-λ."""
    if orpo_lambda == 0:
        return "sft"
    return "orpo" if orpo_lambda == MAIN_LAMBDA else f"orpo-{orpo_lambda:g}"


def _train(
    place: Place, role: str, wanted: Mapping[str, Mapping[str, Any]], console: Console, **settings: Any
) -> float:
    """One sweep: its trials, by what they change, become folders of these names. Returns seconds of training."""
    config = place.experiment(role, **settings)
    if len(wanted) > 1:
        (axis,) = {path for params in wanted.values() for path in params}
        values = [params[axis] for params in wanted.values()]
        space = {axis: {"type": "grid", "values": values}}
        tree = config.model_dump(mode="json", exclude_unset=True)
        config = parse(as_given(tree) | {"sweep": {"space": space}}, source=role)
    elif params := next(iter(wanted.values())):
        config = config.trial(dict(params))
    _, axes = config.as_sweep()
    console.print(f"{role}: {config.run_dir}", style="bold", soft_wrap=True)
    with SweepProgress(console, axes.metric, axes.num_trials) as progress:
        outcome = sweep.run(config, progress)
    if outcome.interrupted:
        raise KeyboardInterrupt
    trials = outcome.results["trials"]
    for name, params in wanted.items():
        found = [t for t in trials if all(t["params"].get(k, v) == v for k, v in params.items())]
        if len(found) != 1 or found[0]["status"] != "finished":
            raise ReproduceError(
                f"{role}: training {name} did not finish ({[(t['status'], t['error']) for t in found]}); remove "
                f"{outcome.run_dir} to try it again, and what was made with it"
            )
        candidate = export_source.find(str(outcome.run_dir / "trials" / found[0]["trial_id"]))
        try:
            export.require_own(place.model(name), candidate)
        except export_source.ExportError as error:
            raise ReproduceError(
                f"{place.model(name)} is of an earlier training than {outcome.run_dir}, and what came after it was "
                f"made with that: remove {place.folder} to start over"
            ) from error
        if not place.model(name).exists():
            export.export(candidate, place.model(name), check=False)
    return float(sum(trial["train_seconds"] for trial in trials))


# ---- answers and rewards --------------------------------------------------------------------------------------------


def of_other_seeds(place: Place) -> list[dict[str, Any]]:
    """What was found in the folders beside it with the same settings but for the seed, by seed."""

    def settings(folder: Path) -> dict[str, Any]:
        return dict(json.loads((folder / _BEGUN_FILE).read_text(encoding="utf-8"))["scale"])

    mine, found = settings(place.folder), {}
    for file in sorted(place.folder.parent.glob(f"*/{RESULT_FILE}")):
        theirs = settings(file.parent)
        if theirs | {"seed": mine["seed"]} == mine and theirs != mine:
            found[theirs["seed"]] = json.loads(file.read_text(encoding="utf-8"))
    return [found[seed] for seed in sorted(found)]


def _prompts(place: Place) -> list[list[Message]]:
    """Conversations of the held-out pairs, as many as the scale samples."""
    config = place.experiment("lambda")
    texts = held_out_texts(config.data, load_tokenizer(config.model))
    if len(texts) < 2:
        raise ReproduceError(
            f"{config.data.path} has {len(texts)} held-out pairs with prompts of at most "
            f"{config.data.max_prompt_tokens} tokens, and a win rate needs 2 or more: give more pairs with --data"
        )
    return [pair.prompt for _, pair in texts[: place.scale.prompts]]


def _digest(place: Place, name: str) -> str:
    """Of a model's weights."""
    marker = json.loads((place.model(name) / export.MARKER_FILE).read_text(encoding="utf-8"))
    return str(marker["digest"])


def _answering(place: Place, name: str, prompts: list[list[Message]]) -> Task:
    """Gives `answers_RN`, how many of them are `unfinished`, and the `backend`."""
    settings = place.scale.sampling
    return Task(
        f"answers-{name}",
        f"{name} answers",
        {"settings": dataclasses.asdict(settings), "prompts": prompts, "model": _digest(place, name)},
        _answer,
        (str(place.model(name)), prompts, settings),
        len(prompts),
        lambda parts: dataclasses.asdict(sampling.Sampled.of(parts)),
    )


def _answer(
    path: str, prompts: list[list[Message]], settings: sampling.SamplingSettings
) -> Iterator[tuple[int, sampling.Answered]]:
    for part in sampling.answers(path, prompts, settings):
        yield len(part.indices), part


def _scoring(place: Place, name: str, prompts: list[list[Message]], answers_RN: list[list[str]]) -> Task:
    """Gives what the judge gives a model's answers, [R, N]."""
    longest = place.scale.max_tokens + place.scale.max_new_tokens
    return Task(
        f"rewards-{name}",
        f"the judge scores {name}",
        {"answers": answers_RN, "judge": _digest(place, "judge")},
        _score,
        (str(place.model("judge")), longest, prompts, answers_RN),
        1,
        _only,
    )


def _score(
    path: str, max_tokens: int, prompts: list[list[Message]], answers_RN: list[list[str]]
) -> Iterator[tuple[int, list[list[float]]]]:
    rewards_NR = RewardModel.load(path, max_tokens=max_tokens).score(prompts, list(zip(*answers_RN, strict=True)))
    yield 1, rewards_NR.T.tolist()


def _only(parts: list[Any]) -> Any:
    (part,) = parts
    return part


def _win_rate(ours_RN: np.ndarray, theirs_RN: np.ndarray) -> dict[str, Any]:
    found = win_rate.win_rate(ours_RN, theirs_RN)
    numbers = {"mean": found.mean, "low": found.low, "high": found.high, "per_round": found.per_round_R.tolist()}
    return numbers | {"std_over_rounds": None if np.isnan(found.std_over_rounds) else found.std_over_rounds}


def _diversity(answers_RN: list[list[str]], embed: Embed) -> Diversity:
    return diversity([list(row) for row in zip(*answers_RN, strict=True)], embed)


# ---- log-probabilities ----------------------------------------------------------------------------------------------


def _trials(place: Place) -> dict[str, tuple[Path, str]]:
    """Name -> (run directory, trial id) of what the curves are drawn of."""
    found = {}
    for role in ("lambda", "ratio"):
        run_dir = place.folder / role
        if not run_dir.exists():
            continue
        results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
        for trial in results["trials"]:
            name = "probability" if role == "ratio" else _name_of(trial["params"]["loss.orpo_lambda"])
            found[name] = (run_dir, trial["trial_id"])
    return found


def start(place: Place, console: Console) -> np.ndarray:
    """Mean token log-probabilities of the held-out pairs before training, float64 [N, 2]. Ray must be initialised."""
    return np.array(place.results_of([_starting(place)], console)["start"])


def _starting(place: Place) -> Task:
    asked = _digest(place, "base") if place.scale.pretrain else place.scale.model
    title = "log-probabilities before training"
    return Task("start", title, asked, _logps_before, (place.experiment("lambda", **_base(place)),), 1, _only)


def _logps_before(config: ExperimentConfig) -> Iterator[tuple[int, list[list[float]]]]:
    tokenizer = load_tokenizer(config.model)
    _, held_out = load_pairs(config.data, tokenizer)
    counting = Counting.of(config.loss, int(tokenizer.eos_token_id))
    yield 1, reference.logps_of(config, held_out, counting, int(tokenizer.pad_token_id)).tolist()


def curves(place: Place, start_N2: np.ndarray) -> dict[str, list[dict[str, float]]]:
    """Name -> held-out log-probabilities at every evaluation, the start included as step 0."""
    start = dict(zip(SIDES, start_N2.mean(0).tolist(), strict=True))
    found = {}
    for name, (run_dir, trial_id) in _trials(place).items():
        points = [{"step": 0.0, **start}]
        for event in read_events(run_dir / EVENTS_FILE):
            if event["event"] == "eval" and event["trial_id"] == trial_id:
                sides = {side: event["metrics"][f"eval/{side}"] for side in SIDES}
                points.append({"step": float(event["step"]), **sides, "log_odds": event["metrics"]["eval/log_odds"]})
        found[name] = points
    return found


def changes(place: Place, start_N2: np.ndarray) -> dict[str, dict[str, Any]]:
    """Name -> side -> `Change` from start to end; and of one model's end against another's (`_COMPARED`)."""
    end = {name: PairScores.load(d / "trials" / t / PAIRS_FILE) for name, (d, t) in _trials(place).items()}
    moved = {
        name: {
            "chosen_logp": scores.chosen_logp_N - start_N2[:, 0],
            "rejected_logp": scores.rejected_logp_N - start_N2[:, 1],
        }
        for name, scores in end.items()
    }
    found = {name: {side: _interval(of_N) for side, of_N in sides.items()} for name, sides in moved.items()}
    # Pair by pair, so that what the pairs differ in drops out.
    apart = {
        shown: {side: _interval(moved[one][side] - moved[other][side]) for side in SIDES}
        for shown, one, other in _COMPARED
        if one in moved and other in moved
    }
    margins_N = {name: sides["chosen_logp"] - sides["rejected_logp"] for name, sides in moved.items()}
    margins = {f"{name}'s margin": {"margin": _interval(of_N)} for name, of_N in margins_N.items()}
    if {"orpo", "orpo-0.1"} <= margins_N.keys():
        margins["orpo's margin less orpo-0.1's"] = {"margin": _interval(margins_N["orpo"] - margins_N["orpo-0.1"])}
    return found | apart | margins


def _interval(values_N: np.ndarray) -> dict[str, float]:
    values_N = np.asarray(values_N, dtype=np.float64)
    drawn = [block_BN @ values_N / len(values_N) for block_BN in draws(len(values_N), RESAMPLES, 0)]
    low, high = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return dataclasses.asdict(Change(float(values_N.mean()), low, high))


# ---- about ----------------------------------------------------------------------------------------------------------


def _judge(place: Place) -> dict[str, Any]:
    """Held-out accuracy of the judge and of RLHF's reward model, with intervals over pairs."""
    run_dir = place.folder / "reward"
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    found = {}
    for trial in results["trials"]:
        scores = PairScores.load(run_dir / "trials" / trial["trial_id"] / PAIRS_FILE)
        (_, right_N, _), *_ = scores.ratios("eval/preference_accuracy")
        found["judge" if trial["params"]["train.seed"] % SEEDS == _JUDGE else "coach"] = _interval(right_N)
    return found


def _accounting(place: Place) -> Task:
    """Gives `accounting.Accounting` of ORPO and DPO on some training pairs, with the scale's model."""
    asked = {"model": place.scale.model, "pairs": _ACCOUNTED}
    arguments = (place.experiment("lambda"),)
    return Task("accounting", "counting FLOPs", asked, _account, arguments, 1, _only, uses_gpu=False)


def _account(config: ExperimentConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    train, _ = load_pairs(config.data, load_tokenizer(config.model))
    found = flops.measure(config.model, [train[index] for index in range(min(_ACCOUNTED, len(train)))])
    yield 1, dataclasses.asdict(found)


def _facts(place: Place) -> dict[str, Any]:
    """What trials told when they began: SFT and ORPO of their data, all of what `train.precision: auto` was there."""
    told = {
        file.parent.name: [event["facts"] for event in read_events(file) if event["event"] == "started"]
        for file in place.folder.glob(f"*/{EVENTS_FILE}")
    }
    return {
        "pairs": {"train": told["lambda"][0]["data/train_pairs"], "held_out": told["lambda"][0]["data/eval_pairs"]},
        "products": sorted({facts["forward/products"] for each in told.values() for facts in each}),
    }


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
