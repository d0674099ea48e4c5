from pathlib import Path

import pytest
import yaml

from orpo_ray.config import load, parse

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


def test_the_readme_explains_the_quickstart_that_runs() -> None:
    root = Path(__file__).parents[2]
    block = (root / "README.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    shown, runs = parse(yaml.safe_load(block)), load(root / "experiments" / "quickstart.yaml")
    assert shown.sweep == runs.sweep
    assert shown.train.max_steps == runs.train.max_steps
