"""Fixtures of the tests that run whole programs: sweeps, clusters, servers, a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.real_sweeps import Sweeps


@pytest.fixture
def sweeps(tmp_path: Path) -> Iterator[Sweeps]:
    runner = Sweeps(tmp_path)
    yield runner
    runner.close()
