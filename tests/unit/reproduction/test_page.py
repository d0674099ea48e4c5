"""What a reproduction says of its numbers."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from orpo_ray.reproduction import page as reproduction_page
from orpo_ray.reproduction import scales
from orpo_ray.reproduction.flops import Accounting, Row
from orpo_ray.reproduction.scales import scale
from orpo_ray.reproduction.workspace import RESULT_FILE, Workspace


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
    "judge": {scales.JUDGE: _change(0.7), scales.POLICY_REWARD_MODEL: _change(0.68)},
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
    assert found["ORPO with λ = 1 lowers the rejected log-probability"] == "yes"
    assert found["with λ = 1 the rejected log-probability ends lower than with SFT"] == "yes"
    assert found["with λ = 0.1 the rejected log-probability against SFT"] == "shown, nothing claimed"
    assert found["with λ = 1 the chosen log-probability falls, too"] == "no"
    assert found["with λ = 0.1 the rejected log-probability does not fall"] == "not decided"
    assert found["the margin is wider with λ = 1 than with λ = 0.1"] == "yes"
    assert found["the probability ratio lowers the rejected log-probability further than the odds ratio"] == "no"
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
    assert "pairs for DPO" not in text
    assert "| training SFT and ORPO | 100 |\n| total wall time | 94 |" in text
    assert "The command was run 2 times." in text
    assert "| matrix multiplications in training | bf16 |" in text
    assert "| answers are sampled with | transformers |" in text
    assert "| ORPO 25 %, SFT 25 %, DPO 25 %, RLHF 25 % |" in text
    assert "commit `0123456789`, finished with commit `fedcba9876` with changes." in text


def test_other_seeds_stand_beside_their_own_kind_only(tmp_path: Path) -> None:
    """Not those with other settings, and not those that have not ended."""
    chosen = scale("tiny")
    for name, changes in (("a", {}), ("b", {"seed": 2}), ("c", {"seed": 1}), ("d", {"seed": 3, "base": {}}), ("e", {})):
        workspace = Workspace(tmp_path / name, dataclasses.replace(chosen, **changes))
        workspace.begin()
        result = RESULT | {"about": workspace.scale.about()}
        if name != "e":
            (workspace.folder / RESULT_FILE).write_text(json.dumps(result), encoding="utf-8")
    others = Workspace(tmp_path / "a", chosen).results_of_other_seeds()
    assert [other["about"]["seed"] for other in others] == [1, 2]
    others[0]["win_rates"]["sft"] = _rate(0.3)
    page = reproduction_page.write(tmp_path, RESULT, "x", others).read_text(encoding="utf-8")
    assert "| the paper says | seed 0 | seed 1 | seed 2 |" in page
    assert "| ORPO against SFT wins more than half | 80.0 %: yes | 30.0 %: no | 80.0 %: yes |" in page
    alone = reproduction_page.write(tmp_path, RESULT, "x").read_text(encoding="utf-8")
    assert "they do not cover variation between seeds, of which there is one." in alone
    assert "other seeds" not in alone


def test_fewer_pairs_for_dpo_are_told_and_taken(tmp_path: Path) -> None:
    chosen = scale("tiny", model="some/model", data="some/pairs")
    assert [chosen.tree(role)["data"]["train_pairs"] for role in ("lambda", "dpo")] == [800, 400]
    page = reproduction_page.write(tmp_path, RESULT | {"about": chosen.about()}, "x").read_text(encoding="utf-8")
    assert "| pairs for DPO, before those with long prompts are dropped | 400 |" in page


def test_without_a_repository_there_is_no_commit_to_name(tmp_path: Path) -> None:
    nowhere = {"git": None, "packages": {"torch": "2.13.0"}}
    for began, said in ((nowhere, "\n\ntorch 2.13.0.\n"), (RESULT["provenance"], "commit `0123456789`.\n")):
        result = RESULT | {"provenance": began, "finished_with": nowhere}
        assert said in reproduction_page.write(tmp_path, result, "x").read_text(encoding="utf-8")


def test_what_a_scale_cannot_show_is_said_of_that_scale(tmp_path: Path) -> None:
    said = {}
    for name in ("tiny", "small", "full"):
        result = RESULT | {"scale": name, "about": scale(name).about()}
        page = reproduction_page.write(tmp_path, result, "x").read_text(encoding="utf-8")
        said[name] = page.rpartition("## What this scale cannot show")[2]
    assert "the model or the data differ" in said["tiny"]
    assert "the judge is weaker and training is shorter" in said["small"]
    assert "Only signs" not in said["full"]
