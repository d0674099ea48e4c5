"""Folders and experiments of a reproduction, and that every scale's experiments are valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_ray.reproduction import scales
from orpo_ray.reproduction.scales import Scale, scale
from orpo_ray.reproduction.workspace import ReproduceError, Workspace

ROLES = ("reward", "lambda", "ratio", "dpo", "rlhf")


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
    workspace = Workspace(tmp_path, chosen)
    for role in (*ROLES, *(["base"] if chosen.pretrain else [])):
        config = workspace.experiment(role)
        assert config.name == role
        assert config.run_dir == tmp_path / role
    assert workspace.experiment("ratio").loss.orpo_lambda == scales.MAIN_LAMBDA
    assert chosen.sampling.rounds == 3


def test_a_folder_is_of_one_scale(tmp_path: Path) -> None:
    begun = Workspace(tmp_path, scale("tiny")).begin()
    assert Workspace(tmp_path, scale("tiny")).begin() == begun
    with pytest.raises(ReproduceError, match=r"begun with other settings \(.*prompts was 192, is 64.*--output-dir"):
        Workspace(tmp_path, scale("tiny", model="some/model")).begin()


def test_a_seed_below_zero_is_refused_before_anything_trains(tmp_path: Path) -> None:
    with pytest.raises(ReproduceError, match=r"--seed \(-1\) must be 0 or more"):
        Workspace(tmp_path, scale("tiny", seed=-1)).begin()
    assert not any(tmp_path.iterdir())


def test_language_is_learned_from_built_in_pairs_only(tmp_path: Path) -> None:
    with pytest.raises(ReproduceError, match=r"cannot start from mine\.jsonl: give a pretrained model with --model"):
        Workspace(tmp_path, scale("tiny", data="mine.jsonl")).begin()
    assert not any(tmp_path.iterdir())


def test_rlhf_has_room_for_an_answer_to_the_longest_prompt(tmp_path: Path) -> None:
    for name in ("tiny", "small", "full"):
        config = Workspace(tmp_path, scale(name)).experiment("rlhf")
        assert config.loss.max_new_tokens is not None
        assert config.data.max_prompt_tokens + config.loss.max_new_tokens <= config.data.max_tokens
