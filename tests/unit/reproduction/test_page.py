"""What a reproduction says of its numbers, and that every scale's experiments are valid."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_ray.data import style_pairs
from orpo_ray.reproduction import page as reproduction_page
from orpo_ray.reproduction import run as reproduce
from orpo_ray.reproduction import scales
from orpo_ray.reproduction.flops import Accounting, Row
from orpo_ray.reproduction.run import RESULT_FILE, Place, ReproduceError, of_other_seeds, run
from orpo_ray.reproduction.scales import Scale, base_pairs, scale

ROLES = ("reward", "lambda", "ratio", "dpo", "rlhf")


def _change(mean: float, half: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _rate(mean: float, half: float = 0.05) -> dict[str, Any]:
    return _change(mean, half) | {"std_over_rounds": 0.01, "per_round": [mean] * 3}


def _alike(per_input: float, across: float) -> dict[str, Any]:
    sides = {"per_input": per_input, "across_input": across}
    return {k: {"value": v, "low": v - 0.01, "high": v + 0.01} for k, v in sides.items()}


RESULT: dict[str, Any] = {
    "scale": "tiny",
    "about": scale("tiny").about(),
    "provenance": {"git": {"commit": "0123456789abcdef", "dirty": False}, "packages": {"torch": "2.13.0"}},
    "finished_with": {"git": {"commit": "fedcba9876543210", "dirty": True}, "packages": {"torch": "2.13.0"}},
    "seconds": {"SFT and ORPO": 100.0},
    "commands": [90.0, 4.0],
    "pairs": {"train": 100, "held_out": 20},
    "products": ["bf16"],
    "judge": {"judge": _change(0.7), "coach": _change(0.68)},
    "win_rates": {"sft": _rate(0.8), "dpo": _rate(0.45), "rlhf": _rate(0.52)},
    "control": _rate(0.5),
    "answers": {name: {"unfinished": 0.25, "backend": "transformers"} for name in ("orpo", "sft", "dpo", "rlhf")},
    "rewards": {name: [0.0, 1.0, 2.0] for name in ("orpo", "sft", "dpo", "rlhf")},
    "accounting": dataclasses.asdict(Accounting(4, 10, (Row("ORPO", 2, 1, 9.0, 1e9, 2e9, 8, 0, 8, 16),))),
    "curves": {
        name: [
            {"step": 0.0, "chosen_logp": -2.0, "rejected_logp": -2.0},
            {"step": 9.0, "chosen_logp": -1.0, "rejected_logp": -3.0},
        ]
        for name in ("sft", "orpo-0.1", "orpo-0.5", "orpo", "probability")
    },
    "changes": {
        "sft": {"chosen_logp": _change(0.5), "rejected_logp": _change(0.4)},
        "orpo-0.1": {"chosen_logp": _change(0.4), "rejected_logp": _change(0.05)},
        "orpo-0.5": {"chosen_logp": _change(0.3), "rejected_logp": _change(-0.2)},
        "orpo": {"chosen_logp": _change(0.2), "rejected_logp": _change(-0.6)},
        "probability less odds": {"chosen_logp": _change(0.0), "rejected_logp": _change(0.3)},
        "orpo less sft": {"chosen_logp": _change(-0.3), "rejected_logp": _change(-1.0)},
        "orpo-0.1 less sft": {"chosen_logp": _change(-0.1), "rejected_logp": _change(0.05)},
        "orpo-0.1's margin": {"margin": _change(0.3)},
        "orpo-0.5's margin": {"margin": _change(0.5)},
        "orpo's margin": {"margin": _change(0.8)},
        "orpo's margin less orpo-0.1's": {"margin": _change(0.5)},
    },
    "diversity": {name: _alike(0.6, 0.3) for name in ("orpo", "sft", "dpo", "rlhf")},
}


def _verdicts(result: dict[str, Any]) -> dict[str, str]:
    return {claim.text: claim.verdict for claim in reproduction_page.claims(result)}


def test_a_claim_is_decided_by_its_interval() -> None:
    found = _verdicts(RESULT)
    assert found["ORPO against SFT wins more than half"] == "yes"
    assert found["ORPO against RLHF (PPO in the paper, RLOO here) wins more than half"] == "not decided"
    assert found["ORPO against DPO"] == "shown, nothing claimed"
    assert found["SFT alone raises the rejected log-probability"] == "yes"
    assert found["ORPO with λ = 1 lowers the rejected one"] == "yes"
    assert found["with λ = 1 the rejected one ends lower than with SFT"] == "yes"
    assert found["with λ = 0.1 the rejected one against SFT"] == "shown, nothing claimed"
    assert found["with λ = 1 the chosen one falls, too"] == "no"
    assert found["with λ = 0.1 the rejected one does not fall"] == "not decided"
    assert found["the margin is wider with λ = 1 than λ = 0.1"] == "yes"
    assert found["the probability ratio lowers the rejected one further than the odds ratio"] == "no"
    assert found["ORPO's answers are more alike than DPO's per input (mean cosine)"] == "not decided"


def test_a_judge_no_better_than_chance_decides_nothing() -> None:
    blind = copy.deepcopy(RESULT)
    blind["judge"]["judge"] = _change(0.55, 0.06)
    found = _verdicts(blind)
    assert found["ORPO against SFT wins more than half"] == "cannot be shown: the judge is no better than chance"
    assert found["SFT alone raises the chosen log-probability"] == "yes"


def test_the_page_has_its_pictures_and_numbers(tmp_path: Path) -> None:
    page = reproduction_page.write(tmp_path, RESULT, "orpo-ray reproduce paper --scale tiny")
    text = page.read_text(encoding="utf-8")
    for name in ("lambda.png", "ratio.png", "rewards.png", "figure6.png"):
        assert f"]({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "| 80.0 % (std over rounds 1.00) | 75.0 to 85.0 % | yes |" in text
    assert "69.4 to 84.0 %" in text
    assert "DPO's pairs" not in text
    assert "| training SFT and ORPO | 100 |\n| all of it, by the clock | 94 |" in text
    assert "The command was given 2 times." in text
    assert "| matrix products of the training | bf16 |" in text
    assert "| answers are drawn with | transformers |" in text
    assert "| ORPO 25 %, SFT 25 %, DPO 25 %, RLHF 25 % |" in text
    assert "commit `0123456789`, finished with commit `fedcba9876` with changes." in text


@pytest.mark.parametrize(
    "chosen",
    [
        scale("tiny"),
        scale("tiny", model="some/model", data="some/pairs"),
        scale("tiny", model="some/model", data="builtin://style-pairs"),
        scale("small"),
        scale("full"),
    ],
    ids=lambda chosen: f"{chosen.name}-{Path(chosen.model).name}-{Path(chosen.data).name}",
)
def test_every_role_is_a_valid_experiment(chosen: Scale, tmp_path: Path) -> None:
    place = Place(tmp_path, chosen)
    for role in (*ROLES, *(["base"] if chosen.pretrain else [])):
        config = place.experiment(role)
        assert config.name == role
        assert config.run_dir == tmp_path / role
    assert place.experiment("ratio").loss.orpo_lambda == scales.MAIN_LAMBDA
    assert chosen.sampling.rounds == 3


def test_another_model_is_not_set_beside_the_papers_row() -> None:
    assert scale("small").compared_with == ("OPT-125M", "HH-RLHF")
    assert scale("small", model="facebook/opt-350m").compared_with is None


def test_base_pairs_prefer_nothing() -> None:
    rows = [json.loads(line) for line in base_pairs(400).splitlines()]
    assert len(rows) == 400
    kept = sum(
        row["chosen"] == given["chosen"] for row, given in zip(rows, style_pairs.generate(400, seed=1), strict=True)
    )
    assert 160 < kept < 240


def test_a_missing_extra_is_said_before_anything_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(ReproduceError, match=r"orpo-ray\[judges\]"):
        run(Place(tmp_path, scale("tiny")), Console())
    assert not any(tmp_path.iterdir())


def test_a_folder_is_of_one_scale(tmp_path: Path) -> None:
    begun = Place(tmp_path, scale("tiny")).begin()
    assert Place(tmp_path, scale("tiny")).begin() == begun
    with pytest.raises(ReproduceError, match=r"begun with other settings \(.*prompts was 192, is 64.*--output-dir"):
        Place(tmp_path, scale("tiny", model="some/model")).begin()


def test_other_seeds_stand_beside_their_own_kind_only(tmp_path: Path) -> None:
    """Not those with other settings, and not those that have not ended."""
    chosen = scale("tiny")
    for name, changes in (("a", {}), ("b", {"seed": 2}), ("c", {"seed": 1}), ("d", {"seed": 3, "base": {}}), ("e", {})):
        place = Place(tmp_path / name, dataclasses.replace(chosen, **changes))
        place.begin()
        result = RESULT | {"about": place.scale.about()}
        if name != "e":
            (place.folder / RESULT_FILE).write_text(json.dumps(result), encoding="utf-8")
    others = of_other_seeds(Place(tmp_path / "a", chosen))
    assert [other["about"]["seed"] for other in others] == [1, 2]
    others[0]["win_rates"]["sft"] = _rate(0.3)
    page = reproduction_page.write(tmp_path, RESULT, "x", others).read_text(encoding="utf-8")
    assert "| the paper says | seed 0 | seed 1 | seed 2 |" in page
    assert "| ORPO against SFT wins more than half | 80.0 %: yes | 30.0 %: no | 80.0 %: yes |" in page
    alone = reproduction_page.write(tmp_path, RESULT, "x").read_text(encoding="utf-8")
    assert "they do not cover the seed, of which there is one." in alone
    assert "other seeds" not in alone


def test_fewer_pairs_for_dpo_are_told_and_taken(tmp_path: Path) -> None:
    chosen = scale("tiny", model="some/model", data="some/pairs")
    assert [chosen.tree(role)["data"]["train_pairs"] for role in ("lambda", "dpo")] == [800, 400]
    page = reproduction_page.write(tmp_path, RESULT | {"about": chosen.about()}, "x").read_text(encoding="utf-8")
    assert "| DPO's pairs, before those with long prompts are dropped | 400 |" in page


def test_seeds_share_none_of_their_own() -> None:
    """Whatever two reproductions train, policies and reward models, they train with other seeds."""
    taken = [
        {scale("tiny", seed=number).tree("lambda")["train"]["seed"]}
        | {scales.SEEDS * number + offset for offset in (reproduce._JUDGE, reproduce._COACH)}
        for number in range(12)
    ]
    assert len(set.union(*taken)) == 3 * 12
    assert [scale("tiny", seed=number).sampling.seed for number in (0, 3)] == [0, 3]


def test_a_seed_below_zero_is_refused_before_anything_trains(tmp_path: Path) -> None:
    with pytest.raises(ReproduceError, match=r"--seed \(-1\) must be 0 or more"):
        Place(tmp_path, scale("tiny", seed=-1)).begin()
    assert not any(tmp_path.iterdir())


def test_without_a_repository_there_is_no_commit_to_name(tmp_path: Path) -> None:
    nowhere = {"git": None, "packages": {"torch": "2.13.0"}}
    for began, said in ((nowhere, "\n\ntorch 2.13.0.\n"), (RESULT["provenance"], "commit `0123456789`.\n")):
        result = RESULT | {"provenance": began, "finished_with": nowhere}
        assert said in reproduction_page.write(tmp_path, result, "x").read_text(encoding="utf-8")


def test_language_is_learned_from_built_in_pairs_only(tmp_path: Path) -> None:
    with pytest.raises(ReproduceError, match=r"cannot begin with mine\.jsonl: give a pretrained model with --model"):
        Place(tmp_path, scale("tiny", data="mine.jsonl")).begin()
    assert not any(tmp_path.iterdir())


def test_rlhf_has_room_for_an_answer_to_the_longest_prompt(tmp_path: Path) -> None:
    for name in ("tiny", "small", "full"):
        config = Place(tmp_path, scale(name)).experiment("rlhf")
        assert config.loss.max_new_tokens is not None
        assert config.data.max_prompt_tokens + config.loss.max_new_tokens <= config.data.max_tokens


def test_what_a_scale_cannot_show_is_said_of_that_scale(tmp_path: Path) -> None:
    said = {}
    for name in ("tiny", "small", "full"):
        result = RESULT | {"scale": name, "about": scale(name).about()}
        page = reproduction_page.write(tmp_path, result, "x").read_text(encoding="utf-8")
        said[name] = page.rpartition("## What this scale cannot show")[2]
    assert "another model or other data" in said["tiny"]
    assert "a weaker judge and less training" in said["small"]
    assert "Only signs" not in said["full"]
