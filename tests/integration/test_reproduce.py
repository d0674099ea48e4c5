"""`orpo-ray reproduce paper` as a user runs it, on the smallest model: every step of it, and going on."""

from __future__ import annotations

import json
import time

import pytest

from orpo_ray.models.precision import matmul_dtype, precision_name
from tests.support.real_sweeps import Sweeps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_reproduce_ends_in_a_page_and_is_not_done_twice(sweeps: Sweeps) -> None:
    command = ("reproduce", "paper", "--model", "tiny-llama-1m", "--data", "builtin://style-pairs")
    output = sweeps.run(*command, timeout_s=800)
    folder = sweeps.folder / "runs" / "paper-tiny-tiny-llama-1m"
    result = json.loads((folder / "reproduction.json").read_text(encoding="utf-8"))
    assert set(result["win_rates"]) == {"sft", "dpo", "rlhf"}
    assert result["pairs"] == {"train": 320, "held_out": 96}
    assert result["products"] == [precision_name(matmul_dtype("auto"))]
    assert result["control"]["low"] <= 0.5 <= result["control"]["high"]
    assert [point["step"] for point in result["curves"]["sft"]] == [0, 10, 20, 30]
    starts = {points[0]["rejected_logp"] for points in result["curves"].values()}
    assert len(starts) == 1
    for name, points in result["curves"].items():
        # The change that the page claims is the curve's.
        change = result["changes"][name]["rejected_logp"]
        assert change["mean"] == pytest.approx(points[-1]["rejected_logp"] - points[0]["rejected_logp"], abs=1e-4)
        assert change["low"] < change["mean"] < change["high"]
    # From scratch the odds of all answers are so long that probability and odds are nearly one.
    assert result["changes"]["probability less odds"]["rejected_logp"]["mean"] == pytest.approx(0, abs=0.02)
    page = (folder / "page" / "reproduction.md").read_text(encoding="utf-8")
    assert "orpo-ray reproduce paper --scale tiny --model tiny-llama-1m" in page
    assert "DPO, reference in memory (as the paper counts)" in page
    assert "ORPO against SFT wins more than half" in output

    began = time.monotonic()
    sweeps.run(*command, timeout_s=400)
    again = json.loads((folder / "reproduction.json").read_text(encoding="utf-8"))
    for key in ("win_rates", "changes", "curves", "diversity", "rewards"):
        assert again[key] == result[key], key
    assert again["seconds"] == result["seconds"]
    assert min(result["seconds"].values()) > 0
    (first,), (kept, second) = result["commands"], again["commands"]
    assert second < first <= kept < first + 60
    assert time.monotonic() - began < 200
