import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from orpo_ray.cli import main
from orpo_ray.reports import transfer_page
from orpo_ray.reports.transfer_page import TransferError
from orpo_ray.results.runs import read_sweep
from tests.support.run_dirs import experiment, life, write_run
from tests.support.sweeps import pair_scores

SIZES = {"1m": 1_000_000, "2m": 2_000_000, "4m": 4_000_000, "8m": 8_000_000}
LRS = tuple(1e-3 * 2.0**k for k in range(-3, 4))
LAMBDAS = (0.1, 0.3, 1.0)
SPACE = {
    "model": {"type": "bundle", "values": {size: {"model.path": f"tiny-llama-{size}"} for size in SIZES}},
    "optim.lr": {"type": "grid", "values": list(LRS)},
    "loss.orpo_lambda": {"type": "grid", "values": list(LAMBDAS)},
}


def best_lr(size: str) -> float:
    return 1.5e-3 * (SIZES[size] / 1e6) ** -0.5


def swept(output_dir: Path, name: str = "sizes", sizes=tuple(SIZES), statuses=None, **settings) -> Path:
    """A sweep whose log odds are a parabola over log lr and one over log λ; a number's status may be another."""
    config = experiment(output_dir, name, SPACE, **settings)
    events, number = [], 0
    for size in sizes:
        for lr in LRS:
            for lam in LAMBDAS:
                worth = 9.0 - math.log(lr / best_lr(size)) ** 2 - math.log(lam / 0.3) ** 2
                status = (statuses or {}).get(number, "finished")
                params = {"model": size, "optim.lr": lr, "loss.orpo_lambda": lam}
                one = life(config, f"{number:05d}", params, pair_scores(np.full(4, worth)), status)
                for event in one:
                    if "facts" in event:
                        event["facts"] = event["facts"] | {"model/parameters": SIZES[size]}
                events += one
                number += 1
    return write_run(config, events)


def test_the_law_that_made_a_sweep_is_read_off_its_run_directory(tmp_path) -> None:
    record = read_sweep(swept(tmp_path))
    evidence, found = transfer_page.study([record], targets=(64e6,))
    assert len(evidence.trials) == 4 * 7 * 3
    assert (evidence.metric, evidence.steps, evidence.left_out) == ("eval/log_odds", (20,), {})
    assert found.lr.exponent == pytest.approx(-0.5, abs=1e-6)
    assert [o.best for o in found.lr.optima] == pytest.approx([best_lr(size) for size in SIZES])
    (asked,) = found.lr.extrapolations
    assert asked.says_nothing == ()
    assert asked.best == pytest.approx(1.5e-3 / 8)
    assert found.orpo_lambda is not None
    assert [o.best for o in found.orpo_lambda.optima] == pytest.approx([0.3] * 4)


def test_sizes_may_come_from_several_sweeps(tmp_path) -> None:
    two = [swept(tmp_path, "small", ("1m", "2m")), swept(tmp_path, "large", ("4m", "8m"))]
    _, found = transfer_page.study([read_sweep(run_dir) for run_dir in two])
    _, whole = transfer_page.study([read_sweep(swept(tmp_path, "all"))])
    assert found.lr.exponent == pytest.approx(whole.lr.exponent, abs=1e-9)


def test_what_did_not_run_to_its_end_is_left_out_and_told(tmp_path) -> None:
    statuses = {0: "stopped_early", 1: "diverged", 2: "failed", 3: "stopped_early", 4: "waiting"}
    evidence = transfer_page.gather([read_sweep(swept(tmp_path, statuses=statuses))])
    assert evidence.left_out == {"stopped early": 2, "failed": 1, "unfinished": 1}
    assert len(evidence.trials) == 4 * 7 * 3 - 4
    assert evidence.trials["value"].isna().sum() == 1
    _, found = transfer_page.study([read_sweep(tmp_path / "sizes")])
    assert [optimum.diverged for optimum in found.lr.optima] == [1, 0, 0, 0]


def test_sweeps_that_carry_no_study_are_refused(tmp_path) -> None:
    one = read_sweep(swept(tmp_path, "one"))
    other = read_sweep(swept(tmp_path, "other", **{"sweep.metric": "eval/nll"}))
    with pytest.raises(TransferError, match="judged by eval/log_odds and eval/nll; choose one with --metric"):
        transfer_page.gather([one, other])
    assert transfer_page.gather([one, other], "eval/nll").metric == "eval/nll"
    with pytest.raises(TransferError, match="'nll' is not a held-out metric; use one of eval/preference"):
        transfer_page.gather([one], "nll")
    with pytest.raises(TransferError, match=r"no trial of gone can be fitted \(84 failed\)"):
        transfer_page.gather([read_sweep(swept(tmp_path, "gone", statuses=dict.fromkeys(range(84), "failed")))])
    single = read_sweep(swept(tmp_path, "single", ("2m",)))
    with pytest.raises(TransferError, match="a size must be a number of parameters above 0, such as 7e9; 0 is not"):
        transfer_page.study([one], targets=(0.0,))
    with pytest.raises(TransferError, match=r"at least 2 model sizes, and has 1\. Sweep model"):
        transfer_page.study([single])


def test_a_trial_counts_once(tmp_path) -> None:
    record = read_sweep(swept(tmp_path))
    with pytest.raises(TransferError, match="the trials of sizes are given twice"):
        transfer_page.gather([record, record])
    with pytest.raises(TransferError, match="sizes/00003 is a single trial; give the sweep, sizes"):
        transfer_page.gather([read_sweep(tmp_path / "sizes" / "trials" / "00003")])


def test_a_metric_that_lambda_scales_is_refused(tmp_path) -> None:
    record = read_sweep(swept(tmp_path))
    with pytest.raises(TransferError, match=r"eval/loss means something else with each loss\.orpo_lambda, so it would"):
        transfer_page.gather([record], "eval/loss")


def test_sweeps_that_differ_in_more_than_size_are_told_apart(tmp_path) -> None:
    small = read_sweep(swept(tmp_path, "small", ("1m", "2m")))
    large = read_sweep(swept(tmp_path, "large", ("4m", "8m"), **{"train.global_batch_size": 16}))
    evidence, found = transfer_page.study([small, large])
    assert evidence.unlike == {"train.global_batch_size": ("16", "32")}
    page = transfer_page.write(tmp_path / "page", evidence, found, "x").read_text(encoding="utf-8")
    assert "**Not equal, so their effect is attributed to size: train.global_batch_size: 16, 32.**" in page


def test_the_command_writes_page_picture_and_numbers(tmp_path, capsys) -> None:
    run_dir = swept(tmp_path, statuses={1: "diverged"})
    assert main(["transfer", "sizes", "--output-dir", str(tmp_path), "--parameters", "6.4e7"]) == 0
    assert "At 64M parameters the best lr is" in " ".join(capsys.readouterr().out.split())
    page = (run_dir / "transfer" / "transfer.md").read_text(encoding="utf-8")
    assert "`orpo-ray transfer sizes --parameters 6.4e+07`" in page
    assert "84 trials of sizes, trained for 20 steps and judged by `eval/log_odds` (higher is better)." in page
    assert "- **At 64M parameters the best lr is 0.00019" in page
    assert (run_dir / "transfer" / "transfer.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((run_dir / "transfer" / "transfer.json").read_text(encoding="utf-8"))
    assert numbers["trials"][1]["value"] is None
    assert numbers["study"]["lr"]["exponent"] == pytest.approx(-0.5, abs=1e-6)
    assert str(tmp_path) not in page + json.dumps(numbers)


def test_the_command_refuses_with_a_sentence(tmp_path, capsys) -> None:
    swept(tmp_path, sizes=("1m",))
    assert main(["transfer", "sizes", "--output-dir", str(tmp_path)]) == 2
    assert "needs at least 2 model sizes" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "sizes" / "transfer").exists()


def test_what_is_said_of_nothing_is_shown_as_that(tmp_path) -> None:
    evidence, found = transfer_page.study([read_sweep(swept(tmp_path, sizes=("1m", "8m")))])
    console = Console(width=120, record=True, file=None)
    with console.capture() as shown:
        console.print(transfer_page.table(found))
    assert "About lr at 1.3B parameters this says nothing: there are 2 sizes" in " ".join(shown.get().split())
    axes = transfer_page.draw(evidence, found).axes
    assert [axis.get_title(loc="left") for axis in axes[2:]] == ["says nothing about 1.3B, 7B"] * 2
