"""The run of a reproduction, as far as nothing trains."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console

from orpo_ray.reproduction.run import run
from orpo_ray.reproduction.scales import scale
from orpo_ray.reproduction.workspace import ReproduceError, Workspace


def test_a_missing_extra_is_said_before_anything_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(ReproduceError, match=r"orpo-ray\[judges\]"):
        run(Workspace(tmp_path, scale("tiny")), Console())
    assert not any(tmp_path.iterdir())
