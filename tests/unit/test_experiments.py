from pathlib import Path

import pytest

from orpo_ray.config import load

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
FILES = sorted([*EXPERIMENTS.rglob("*.yaml"), *EXPERIMENTS.rglob("*.yml")])


def test_there_are_experiments() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(EXPERIMENTS).as_posix())
def test_experiment_parses(path: Path) -> None:
    config = load(path)
    # The run directory is found again by the file's name.
    assert config.name == path.stem
