"""The benchmarks measure what they say: same pairs and weights on every side, right counts, honest verdicts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import memory, more_steps, pretraining, report, rounds, scaling, throughput, workload
from benchmarks import steps as measured
from benchmarks.case import SIDES, Case
from benchmarks.flops import pair_flops, parts, predicted_tokens, seen_keys, shape_of
from benchmarks.plain_side import collate, llamafactory_loss
from orpo_ray.config import ModelConfig
from orpo_ray.models.loading import build_model, load_tokenizer
from orpo_ray.models.packing import SharedPrompt

TINY = Case(model="tiny-llama-1m", data="builtin://style-pairs", precision="fp32", batch=4, steps=1, threads=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models and pairs go nowhere else."""
    monkeypatch.setattr(workload, "CACHE", tmp_path / "cache")


def result_of(case: Case, number: int, speed: float, gib: float, loss: float = 2.0) -> dict[str, Any]:
    """What a process that went well reports, in short."""
    return {
        "label": case.label,
        "status": "ok",
        "round": number,
        "case": case.as_json(),
        "pairs_per_second": speed,
        "peak_gib": gib,
        "peak_device_gib": None,
        "losses": [loss],
        "seconds": [case.batch / speed],
    }


# ---- cases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        replace(TINY, side="trl", micro_batch=2, checkpointing=True, seed=3),
        Case(data="tokens:3:4:5", max_tokens_per_micro_batch=512, device="cuda"),
    ],
)
def test_command_line_gives_the_case_back(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Case] = []

    def run(case: Case) -> dict[str, Any]:
        seen.append(case)
        return {"case": case.as_json()}

    monkeypatch.setattr(measured, "run", run)
    measured.main([*case.arguments(), "--out", str(tmp_path / "out.json")])
    assert seen == [case]
    assert Case(**json.loads((tmp_path / "out.json").read_text())["case"]) == case


def test_defaults_need_no_arguments() -> None:
    assert Case().arguments() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": "trl", "batch": 8, "micro_batch": 3}, r"micro_batch \(3\) must divide batch \(8\)"),
        ({"micro_batch": 4}, "micro_batch is a peer's"),
        ({"side": "trl", "max_tokens_per_micro_batch": 64}, "max_tokens_per_micro_batch is ours"),
        ({"steps": 0}, r"steps \(0\)"),
    ],
)
def test_cases_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(**settings)


def test_labels_tell_the_processes_of_a_comparison_apart() -> None:
    for comparison in [*throughput.comparisons("cpu", 2, None), *throughput.quick("cpu")]:
        cases = [comparison.ours, *comparison.peers]
        assert len({case.label for case in cases}) == len(set(cases)) == len(cases)
    assert replace(TINY, side="trl", micro_batch=2, checkpointing=True).label == "trl 2×2 recompute"


def test_comparisons_do_the_same_work_on_every_side() -> None:
    for comparison in throughput.comparisons("cpu", 2, None):
        for peer in comparison.peers:
            cut = {"micro_batch": None, "max_tokens_per_micro_batch": comparison.ours.max_tokens_per_micro_batch}
            assert replace(peer, side="ours", checkpointing=False, **cut) == comparison.ours, comparison.name
        trl = [peer for peer in comparison.peers if peer.side == "trl"]
        assert {peer.checkpointing for peer in trl} == {False, True}
        assert min(peer.forward_pairs for peer in trl) < 8  # a cut that survives long responses
    names = {comparison.name: comparison for comparison in throughput.comparisons("cpu", 2, None)}
    assert (names["hh-8-bf16"].target_speed, names["hh-8-bf16"].target_memory) == (5.0, 0.25)
    assert (names["long-8-bf16"].target_speed, names["long-8-bf16"].target_memory) == (3.0, None)


# ---- pairs and weights --------------------------------------------------------------------------------------------


def test_random_pairs_have_the_lengths_asked_for_and_the_same_ids_each_time() -> None:
    case = replace(TINY, data="tokens:3:5:7", steps=2)
    pairs, again = workload.load(case), workload.load(case)
    assert len(pairs) == 4 * 3
    assert {tuple(row) for row in pairs.lengths_N3.tolist()} == {(3, 5, 7)}
    assert pairs[5].chosen_ids.tolist() == again[5].chosen_ids.tolist()
    assert pairs[5].chosen_ids.tolist() != workload.load(replace(case, seed=1))[5].chosen_ids.tolist()
    assert not list((workload.CACHE / "benchmarks").iterdir())  # nothing is left behind


def test_long_is_the_issues_shape() -> None:
    assert workload.lengths(replace(TINY, data="long")) == (30, 400, 400)


@pytest.mark.parametrize("data", ["tokens:3:4", "tokens:a:b:c", "tokens:0:4:4"])
def test_malformed_lengths_are_refused(data: str) -> None:
    with pytest.raises(workload.WorkloadError, match=data):
        workload.lengths(replace(TINY, data=data))


def test_missing_data_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORPO_RAY_SHARED", str(tmp_path))
    with pytest.raises(workload.WorkloadError, match="ORPO_RAY_SHARED"):
        workload.data_config(replace(TINY, data="hh"))


def test_every_step_trains_on_other_pairs_of_one_fixed_order() -> None:
    case = replace(TINY, steps=3)
    pairs = workload.load(case)
    batches = workload.global_batches(case, pairs)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4]  # the warm-up's, and three
    assert len(set(np.concatenate(batches).tolist())) == 16
    peers = workload.global_batches(replace(case, side="trl", micro_batch=2), pairs)
    assert all((mine == theirs).all() for mine, theirs in zip(batches, peers, strict=True))


def test_random_models_have_the_vocabulary_asked_for_and_fixed_weights() -> None:
    case = replace(TINY, model="random:2048:64:1")
    path = Path(workload.model_config(case).path)
    written = (path / "model.safetensors").stat().st_mtime_ns
    weights = workload.peer_model(case).state_dict()["model.embed_tokens.weight"]
    assert weights.shape == (2048, 64)
    assert workload.model_config(case).path == str(path)
    assert (path / "model.safetensors").stat().st_mtime_ns == written  # kept, not made again
    ours = build_model(ModelConfig(path=str(path)), 0).state_dict()["model.embed_tokens.weight"]
    assert torch.equal(weights, ours)
    with pytest.raises(workload.WorkloadError, match="random:2048:65:1"):
        workload.model_config(replace(TINY, model="random:2048:65:1"))


def test_peers_start_from_our_weights() -> None:
    peer = workload.peer_model(TINY).state_dict()
    ours = build_model(ModelConfig(path=TINY.model), TINY.seed).state_dict()
    assert peer.keys() == ours.keys()
    assert all(torch.equal(peer[name], ours[name]) for name in peer)


# ---- what a step needs --------------------------------------------------------------------------------------------


def test_shape_is_the_models() -> None:
    shape = shape_of(TINY)
    model = build_model(ModelConfig(path=TINY.model), 0)
    embedding = model.get_input_embeddings().weight.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert shape.linear_parameters == matrices - embedding  # tied: the head is the embedding
    assert (shape.width, shape.vocabulary, shape.layers) == (128, 1024, 4)


def test_seen_keys_are_those_of_the_mask() -> None:
    lengths = (5, 3, 4)
    part_T = torch.tensor([0] * 5 + [1] * 3 + [2] * 4, dtype=torch.int32)
    position_T = torch.tensor([*range(8), *range(5, 9)], dtype=torch.int32)
    layout = SharedPrompt((lengths,), torch.zeros(12, dtype=torch.int32), part_T, position_T)
    assert seen_keys(*lengths) == int(layout.sees_TT().sum())
    assert predicted_tokens(*lengths) == 4 + 3 + 4


def test_operations_by_hand() -> None:
    shape = shape_of(replace(TINY, model="random:2048:64:1"))
    # Width 64: attention 4 × 64², three matrices of 64 × 128.
    assert shape.linear_parameters == 4 * 64**2 + 3 * 64 * 128
    counted = parts(shape, 5, 3, 4)
    assert counted["linear layers"] == 6 * shape.linear_parameters * 12
    assert counted["head"] == 6 * 64 * 2048 * 11
    assert counted["attention"] == 12 * 1 * 64 * seen_keys(5, 3, 4)
    assert pair_flops(shape, 5, 3, 4) == sum(counted.values())


# ---- peers --------------------------------------------------------------------------------------------------------


def test_llamafactory_objective_against_its_definition() -> None:
    pairs = workload.members(workload.load(TINY), np.arange(3))
    model = workload.peer_model(TINY).eval()
    with torch.no_grad():
        found = llamafactory_loss(model, collate(pairs, int(load_tokenizer(ModelConfig(path=TINY.model)).pad_token_id)))
        expected = 0.0
        for pair in pairs:
            odds, nll = [], []
            for answer in (pair.chosen_ids, pair.rejected_ids):
                ids = torch.from_numpy(np.concatenate([pair.prompt_ids, answer]).astype(np.int64))
                logps_TV = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
                mean = logps_TV[len(pair.prompt_ids) - 1 : -1].gather(1, ids[len(pair.prompt_ids) :, None]).mean()
                odds.append(mean - torch.log(1 - mean.exp()))
                nll.append(-mean)
            expected += float(nll[0] + 0.1 * torch.nn.functional.softplus(-(odds[0] - odds[1]))) / len(pairs)
    assert found.item() == pytest.approx(expected, rel=1e-5)


# ---- rounds -------------------------------------------------------------------------------------------------------


def test_rounds_alternate_and_give_up_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = TINY, replace(TINY, side="trl"), replace(TINY, side="liger")
    order: list[str] = []

    def run_case(case: Case, limits: rounds.Limits) -> dict[str, Any]:
        order.append(case.side)
        return {"case": case.as_json(), "status": "out of memory" if case == b else "ok"}

    monkeypatch.setattr(rounds, "run_case", run_case)
    results = rounds.run_rounds([a, b, c], 3, rounds.Limits(), lambda so_far: None)
    assert order == ["ours", "trl", "liger", "liger", "ours", "ours", "liger"]
    assert [result["round"] for result in results] == [1, 1, 1, 2, 2, 3, 3]


def test_ratios_are_taken_within_rounds() -> None:
    ours, peer = TINY, replace(TINY, side="trl")
    results = [
        result_of(ours, 1, speed=10.0, gib=2.0),
        result_of(peer, 1, speed=2.0, gib=8.0, loss=2.02),
        result_of(peer, 2, speed=1.0, gib=8.0),
        result_of(ours, 2, speed=4.0, gib=2.0),
        result_of(ours, 3, speed=99.0, gib=2.0),  # the peer has no third round
    ]
    found = rounds.ratios(results, ours, peer)
    assert found is not None
    assert found["speed"] == {"median": 4.5, "min": 4.0, "max": 5.0, "n": 2}
    assert found["memory"]["median"] == 0.25
    assert found["first_loss_difference"] == pytest.approx(0.02 / 2.02)
    assert rounds.ratios(results, ours, replace(TINY, side="liger")) is None


def test_a_section_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    rounds.save("x", "one", {"a": 1}, tmp_path)
    rounds.save("x", "two", {"a": 2}, tmp_path)
    path = rounds.save("x", "one", {"a": 3}, tmp_path)
    assert json.loads(path.read_text()) == {"one": {"a": 3}, "two": {"a": 2}}
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix] == ["x.json"]


def fake_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    """Let `run_case` start a program of ours instead of `benchmarks.steps`; `out` is where the JSON goes."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "steps.py").write_text(f"import sys, time\nout = sys.argv[-1]\n{body}\n")
    monkeypatch.setattr(rounds, "ROOT", tmp_path)


@pytest.mark.parametrize(
    ("body", "limits", "status", "error"),
    [
        ("x = bytearray(300 * 2**20); time.sleep(60)", rounds.Limits(memory_gib=0.2), "out of memory", "limit of 0.2"),
        ("time.sleep(60)", rounds.Limits(seconds=0.5), "timed out", "after 0.5 s"),
        ("sys.exit('no such model')", rounds.Limits(), "failed", "no such model"),
        ("sys.exit('CUDA out of memory.')", rounds.Limits(), "out of memory", "CUDA out of memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", rounds.Limits(), "out of memory", "status -9"),
    ],
)
def test_a_process_that_does_not_end_well_is_reported(
    body: str, limits: rounds.Limits, status: str, error: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_steps(monkeypatch, tmp_path, body)
    result = rounds.run_case(TINY, limits)
    assert result["status"] == status
    assert error in result["error"]
    assert result["case"] == TINY.as_json()


def test_provenance_is_complete() -> None:
    made = rounds.described("python -m benchmarks.throughput")
    assert made["command"] == "python -m benchmarks.throughput"
    assert {"date", "commit", "uncommitted_changes", "cpu", "cores", "memory_gib", "gpus"} <= made.keys()
    assert made["packages"]["torch"] == torch.__version__


# ---- what is said of the results ----------------------------------------------------------------------------------


def comparison_with_results(speeds: dict[str, float]) -> tuple[throughput.Comparison, list[dict[str, Any]]]:
    """Ours at 10 pairs/s and 1 GiB, TRL as 2×2 and 4×1 at the given speeds and 5 GiB."""
    peers = tuple(replace(TINY, side="trl", micro_batch=cut) for cut in (2, 1))
    comparison = throughput.Comparison("x", TINY, peers, target_speed=5.0, target_memory=0.25)
    results = [result_of(TINY, 1, speed=10.0, gib=1.0)]
    results += [result_of(peer, 1, speed=speeds[peer.label], gib=5.0) for peer in peers]
    return comparison, results


def test_targets_are_held_against_trls_fastest_form() -> None:
    comparison, results = comparison_with_results({"trl 2×2": 1.0, "trl 4×1": 2.5})
    speed, share = throughput.summary(comparison, results)["targets"]
    assert (speed["measured"], speed["met"]) == (4.0, False)
    assert "trl 4×1" in speed["what"]
    assert (share["measured"], share["met"]) == (0.2, True)


def test_a_peer_without_results_gets_no_verdict() -> None:
    comparison, results = comparison_with_results({"trl 2×2": 1.0, "trl 4×1": 1.0})
    dead = [
        {"label": r["label"], "case": r["case"], "status": "out of memory", "error": "ended", "round": 1}
        for r in results[1:]
    ]
    content = throughput.summary(comparison, [results[0], *dead])
    assert content["targets"] == []
    assert throughput.row(content["sides"][1]) == ("trl 2×2", "out of memory", "", "", "")


def test_unknown_comparisons_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        throughput.main(["--only", "hh-9"])
    assert "hh-8-bf16" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        scaling.main(["--quick", "--device", "cuda"])


def test_working_memory_leaves_the_state_out() -> None:
    result = result_of(TINY, 1, speed=1.0, gib=3.0) | {"resident_gib": [1.0, 2.0], "parameters": 2**26}
    entry = memory.row(TINY, result)
    assert entry["state_gib"] == pytest.approx(0.75)  # 12 bytes × 2²⁶
    assert entry["working_gib"] == pytest.approx(1.25)
    on_device = memory.row(TINY, result | {"peak_device_gib": 2.0})
    assert on_device["working_gib"] == pytest.approx(1.0)  # the allocator holds the weights too


def test_a_straight_line_fits_and_a_curve_does_not() -> None:
    straight = scaling.line([{"x": x, "seconds": 1 + 0.5 * x} for x in (2, 4, 8, 16)])
    assert straight["fixed_seconds"] == pytest.approx(1)
    assert straight["seconds_per_x"] == pytest.approx(0.5)
    assert straight["worst_relative_misfit"] == pytest.approx(0, abs=1e-9)
    assert scaling.line([{"x": x, "seconds": x**2} for x in (2, 4, 8, 16)])["worst_relative_misfit"] > 0.1


def test_sweeps_vary_one_quantity() -> None:
    by_name = {sweep.name: sweep for sweep in scaling.sweeps("cpu", 2, "fp32")}
    assert set(by_name) == {"prompt share", "batch", "vocabulary", "sequence length"}
    assert [case.batch for _, case in by_name["batch"].points] == [x for x, _ in by_name["batch"].points]
    for share, case in by_name["prompt share"].points:
        prompt, chosen, rejected = workload.lengths(case) or (0, 0, 0)
        assert prompt + chosen == prompt + rejected == 512
        assert prompt / 512 == share
    assert [x for x, _ in by_name["sequence length"].points][-1] == 8192
    assert {49_152, 131_072, 262_144} <= {x for x, _ in by_name["vocabulary"].points}


# ---- the page -----------------------------------------------------------------------------------------------------


def test_the_page_says_what_has_not_been_run(tmp_path: Path) -> None:
    page = "a\n<!-- limit-cuda -->\nold\n<!-- /limit-cuda -->\nb\n"
    text = report.render(page, tmp_path, tmp_path)
    assert "**Not run yet.** `python -m benchmarks.limit --device cuda` runs it." in text
    assert "old" not in text
    assert text.startswith("a\n")
    assert text.endswith("\nb\n")
    assert report.render(text, tmp_path, tmp_path) == text


def test_the_page_shows_numbers_with_their_command_and_misses_too(tmp_path: Path) -> None:
    comparison, results = comparison_with_results({"trl 2×2": 1.0, "trl 4×1": 2.5})
    made = rounds.described("python -m benchmarks.throughput --only x")
    content = throughput.summary(comparison, results) | {"made": made, "rounds": 1}
    rounds.save("throughput-cpu", "x", content, tmp_path)
    text = report.render("<!-- throughput-cpu -->\n<!-- /throughput-cpu -->", tmp_path, tmp_path)
    assert "`python -m benchmarks.throughput --only x`" in text
    assert "| trl 4×1 | 2.500 | 5.00 | 4.00 | 0.20 |" in text
    assert "Measured 4.00: **missed**." in text
    assert "Measured 0.20: **met**." in text


def test_an_unknown_part_of_the_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speed-cpu"):
        report.render("<!-- speed-cpu -->\n<!-- /speed-cpu -->", tmp_path, tmp_path)


def test_the_committed_page_has_every_part() -> None:
    page = report.README.read_text(encoding="utf-8")
    for what in ("throughput", "memory", "scaling", "limit"):
        for device in ("cpu", "cuda"):
            assert f"<!-- {what}-{device} -->" in page


# ---- for real -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_side_trains_and_their_losses_agree() -> None:
    """Whole processes on a tiny model: TRL's and Liger's losses are ours, step after step."""
    wanted = ["ours", "llamafactory"]
    pytest.importorskip("trl.experimental.orpo", reason="needs TRL to compare with: pip install -e '.[oracle]'")
    wanted.append("trl")
    try:
        import liger_kernel  # noqa: F401
    except ModuleNotFoundError:
        print("liger-kernel is not installed: its side is left out")
    else:
        wanted.append("liger")
    found = {}
    for side in [side for side in SIDES if side in wanted]:
        result = rounds.run_case(replace(TINY, side=side, steps=2), rounds.Limits(seconds=240))
        assert result["status"] == "ok", result.get("error")
        assert len(result["seconds"]) == 2
        assert len(result["resident_gib"]) == 4
        assert result["pairs_per_second"] == pytest.approx(8 / sum(result["seconds"]))
        assert 0.1 < result["peak_gib"] < 4
        found[side] = result["losses"]
    for side in set(found) & {"trl", "liger"}:
        assert found[side] == pytest.approx(found["ours"], rel=1e-5)
    assert found["llamafactory"] != pytest.approx(found["ours"], rel=1e-4)  # another objective


# ---- pretraining --------------------------------------------------------------------------------------------------


def test_what_sft_and_orpo_moved_is_a_row_by_pretraining(tmp_path: Path) -> None:
    def moved(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}

    sides = (
        {"chosen_logp": moved(0.5), "rejected_logp": moved(0.25)},
        {"chosen_logp": moved(0), "rejected_logp": moved(-1)},
    )
    row = {"start": {"step": 0.0, "chosen_logp": -2.0, "rejected_logp": -2.5}}
    for steps in (240, 15):
        whole = row | {"steps": steps, "changes": dict(zip(("sft", "orpo"), sides, strict=True))}
        content = {"made": rounds.described("python -m benchmarks.pretraining"), "row": whole}
        rounds.save(pretraining.NAME, f"{steps} steps", content, tmp_path)
    lines = report.render("<!-- pretraining-cpu -->\n<!-- /pretraining-cpu -->", tmp_path, tmp_path).splitlines()
    assert lines[1].startswith("`python -m benchmarks.pretraining`, ")
    assert [line.split(" |")[0] for line in lines[5:7]] == ["| 15 steps", "| 240 steps"]
    assert lines[5].split(" | ")[1:4] == ["-2.500", "+0.500 (+0.400 to +0.600)", "+0.250 (+0.150 to +0.350)"]


def test_log_probabilities_over_the_steps_are_a_table(tmp_path: Path) -> None:
    def moved(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}

    def curve(*rejected: float) -> list[dict[str, float]]:
        return [{"step": 20.0 * at, "chosen_logp": -1.0, "rejected_logp": value} for at, value in enumerate(rejected)]

    moves = {"sft": 0.6, "orpo": -0.5, "probability": -0.7, "orpo less sft": -1.1, "probability less odds": -0.2}
    found = {
        "curves": {"orpo": curve(-2, -1.9, -2.5), "sft": curve(-2, -1.5, -1.4), "probability": curve(-2, -2.5, -2.7)},
        "changes": {name: {"chosen_logp": moved(0), "rejected_logp": moved(mean)} for name, mean in moves.items()},
    }
    rounds.save(more_steps.NAME, "a", {"made": rounds.described("python -m x"), "found": found}, tmp_path)
    lines = report.render("<!-- more-steps-cpu -->\n<!-- /more-steps-cpu -->", tmp_path, tmp_path).splitlines()
    assert lines[3] == "![log-probabilities over the steps](more-steps-a-cpu.png)"
    assert (tmp_path / "more-steps-a-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert lines[7:10] == [
        "| 0 | -1.000 | -2.000 | -1.000 | -2.000 | -1.000 | -2.000 |",
        "| 20 | -1.000 | -1.500 | -1.000 | -1.900 | -1.000 | -2.500 |",
        "| 40 | -1.000 | -1.400 | -1.000 | -2.500 | -1.000 | -2.700 |",
    ]
    assert lines[10].split(" | ")[4] == "-0.500 (-0.600 to -0.400)"
    assert lines[11].startswith(
        "| less SFT's | – | – | +0.000 (-0.100 to +0.100) | -1.100 (-1.200 to -1.000) | – | – |"
    )
    assert lines[12].endswith(" | – | +0.000 (-0.100 to +0.100) | -0.200 (-0.300 to -0.100) |")
