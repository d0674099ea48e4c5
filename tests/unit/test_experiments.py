from pathlib import Path

import pytest

from orpo_ray.config import load

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
FILES = sorted([*EXPERIMENTS.rglob("*.yaml"), *EXPERIMENTS.rglob("*.yml")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(EXPERIMENTS).as_posix())
def test_experiment_parses(path: Path) -> None:
    load(path)


def test_experiments_have_names_of_their_own() -> None:
    """The same name continues the same sweep, so two files that share one would mix their trials."""
    names = [load(path).name for path in FILES]
    assert names
    assert len(set(names)) == len(names)
