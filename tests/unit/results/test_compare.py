import io
import json
import re

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import ttest_ind

from orpo_ray import cli
from orpo_ray.reports.comparison import comparison_markdown, comparison_view
from orpo_ray.results.compare import Comparison, compare_runs
from orpo_ray.results.frames import mean_interval
from orpo_ray.results.sides import CompareError
from orpo_ray.storage.pair_scores import PAIRS_FILE
from tests.support.run_dirs import experiment, life, write_run
from tests.support.sweeps import pair_scores

LR = {"type": "loguniform", "low": 1e-4, "high": 1e-2}
RNG = np.random.default_rng(0)
PAIRS = RNG.normal(size=200)


def scored(mean, spread=0.3, **changes):
    """Log odds around `mean`, on pairs that are as hard for everybody."""
    return pair_scores(mean + PAIRS + spread * RNG.normal(size=len(PAIRS)), **changes)


@pytest.fixture
def sweeps(tmp_path):
    """write(name, space, [(params, scores, details)]) -> run directory."""

    def write(name, space, trials, **settings):
        config = experiment(tmp_path, name, space, **settings)
        events, scores = [], {}
        for number, (params, one, details) in enumerate(trials):
            trial_id = f"{number:05d}"
            events += life(config, trial_id, params, one, at=number, **details)
            if one is not None:
                scores[trial_id] = one
        return write_run(config, events, scores)

    return write


def single(sweeps, name, scores, details=None, **settings):
    return sweeps(name, {}, [({}, scores, details or {})], **settings)


def shown(comparison: Comparison, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_view(comparison))
    return console.file.getvalue()


def test_two_runs_on_the_same_pairs(sweeps, tmp_path) -> None:
    one, other = scored(0.5), scored(0.7)
    single(sweeps, "one", one)
    single(sweeps, "other", other, **{"loss.orpo_lambda": 0.2, "train.max_steps": 40})
    found = compare_runs("one", "other", output_dir=tmp_path)
    main = found.metrics[0]
    assert (main.metric, main.mode, main.covers) == ("eval/log_odds", "max", "200 held-out pairs")
    assert (main.a, main.b) == pytest.approx((one.log_odds_N.mean(), other.log_odds_N.mean()))
    apart = other.log_odds_N - one.log_odds_N
    assert main.difference == pytest.approx(apart.mean())
    # Paired: the pairs' own difficulty, three times larger, cancels.
    assert main.high - main.difference == pytest.approx(1.96 * apart.std() / np.sqrt(200), rel=0.1)
    assert main.difference - main.low == pytest.approx(main.high - main.difference)
    assert main.better == "B"
    assert found.sentence == (
        f"B (other) is better by {main.difference:.4f} [{main.low:.4f}, {main.high:.4f}] on eval/log_odds "
        "(higher is better)."
    )
    assert [(c.path, c.a, c.b, c.swept) for c in found.settings] == [
        ("loss.orpo_lambda", "0.1", "0.2", ""),
        ("train.max_steps", "20", "40", ""),
    ]
    assert (found.search, found.matched, found.compare_page) == ((), (), None)
    loss = next(d for d in found.metrics if d.metric == "eval/loss")
    assert (loss.difference, loss.low) == (None, None)
    assert loss.no_interval == "it measures something else in each: loss.orpo_lambda is 0.1 and 0.2"
    logp = found.metrics[-1]
    assert (logp.metric, logp.better, logp.difference) == ("eval/chosen_logp", None, pytest.approx(apart.mean() / 2))
    assert [n for n in found.notes if n.startswith("One seed each")]
    # And the other way round; lower is better.
    back = compare_runs("other", "one", "eval/odds_ratio_loss", output_dir=tmp_path)
    assert (back.metrics[0].better, back.metrics[0].difference > 0) == ("A", True)
    assert re.match(
        r"A \(other\) is better by 0\.\d+ \[0\.\d+, 0\.\d+\] on eval/odds_ratio_loss \(lower", back.sentence
    )


def test_what_cannot_be_told_apart(sweeps, tmp_path) -> None:
    one = scored(0.5)
    single(sweeps, "one", one)
    single(sweeps, "other", scored(0.5))
    single(sweeps, "copy", one)
    found = compare_runs("one", "other", output_dir=tmp_path)
    assert found.sentence.startswith("A (one) and B (other) cannot be told apart on eval/log_odds: B − A is ")
    assert (found.metrics[0].better, found.metrics[0].verdict) == (None, "tied")
    assert found.metrics[0].low < 0 < found.metrics[0].high
    same = compare_runs("one", "copy", output_dir=tmp_path)
    assert same.sentence == (
        "A (one) and B (copy) are the same on eval/log_odds: the difference is 0 on every resample."
    )


def test_two_sweeps_best_against_best_and_setting_by_setting(sweeps, tmp_path) -> None:
    lams = {"type": "grid", "values": [0.0, 0.1, 0.5]}
    narrow = [({"loss.orpo_lambda": lam}, scored(q), {}) for lam, q in ((0.0, 0.0), (0.1, 0.3), (0.5, 0.1))]
    sweeps("narrow", {"loss.orpo_lambda": lams}, narrow, **{"optim.lr": 1e-3})
    wide = [
        ({"loss.orpo_lambda": 0.1, "optim.lr": 1e-3}, scored(0.3), {}),
        ({"loss.orpo_lambda": 0.5, "optim.lr": 1e-3}, scored(0.9), {}),
        ({"loss.orpo_lambda": 0.5, "optim.lr": 2e-3}, scored(1.5), {}),
        ({"loss.orpo_lambda": 0.0, "optim.lr": 1e-3}, scored(0.0), {"status": "diverged"}),
        ({"loss.orpo_lambda": 0.0, "optim.lr": 5e-3}, None, {"status": "failed"}),
    ]
    sweeps("wide", {"optim.lr": LR, "loss.orpo_lambda": lams}, wide, **{"sweep.num_samples": 2})
    found = compare_runs("narrow", "wide", output_dir=tmp_path)
    assert (found.a.trial_ids, found.b.trial_ids) == (("00001",), ("00002",))
    assert (found.a.candidates, found.b.candidates) == (3, 3)
    assert (found.b.trials, found.b.statuses) == (5, {"finished": 3, "diverged": 1, "failed": 1})
    assert found.a.device_hours == pytest.approx(3 * 3.5 / 3600)
    assert found.a.wall_hours == pytest.approx(1.002 / 3600)  # 2 ms between the first submission and the last
    assert found.metrics[0].better == "B"
    # λ = 0.1 and 0.5 at lr 1e-3: in one sweep the lr is an axis, in the other it is not. λ = 0 diverged in one.
    assert [(m.setting, m.a_trial_ids, m.b_trial_ids) for m in found.matched] == [
        ("λ=0.5 lr=1.0e-03", ("00002",), ("00001",)),
        ("λ=0.1 lr=1.0e-03", ("00001",), ("00000",)),
    ]
    assert [m.difference.better for m in found.matched] == ["B", None]
    assert found.matched[0].difference.difference == pytest.approx(0.8, abs=0.1)
    assert [(c.path, c.a, c.b, c.swept) for c in found.settings] == [
        ("loss.orpo_lambda", "0.1", "0.5", "both"),
        ("optim.lr", "0.001", "0.002", "B"),
    ]
    assert [c.path for c in found.search] == ["sweep.num_samples", "sweep.space.optim.lr"]
    assert (found.search[0].a, found.search[0].b) == ("1", "2")
    assert any("A's from 3 settings and B's from 3 settings" in note for note in found.notes)
    # One of its trials instead: no choice, no matching.
    found = compare_runs("narrow/00002", "wide/00001", output_dir=tmp_path)
    assert (found.a.name, found.a.candidates, found.matched) == ("narrow/00002", 1, ())
    assert [c.path for c in found.settings] == []


def test_a_bundle_is_matched_by_what_it_sets_but_for_speed(sweeps, tmp_path) -> None:
    size = {"type": "bundle", "values": {"big": {"model.path": "tiny-llama-8m", "scaling.num_workers": 2}}}
    label = {"type": "bundle", "values": {"8m": {"model.path": "tiny-llama-8m"}, "2m": {"model.path": "tiny-llama-2m"}}}
    sweeps(
        "one", {"size": size, "optim.lr": LR}, [({"size": "big", "optim.lr": x}, scored(0), {}) for x in (1e-3, 2e-3)]
    )
    trials = [({"model": s, "optim.lr": 1e-3}, scored(0), {}) for s in ("8m", "2m")]
    sweeps("two", {"model": label, "optim.lr": LR}, trials)
    (match,) = compare_runs("one", "two", output_dir=tmp_path).matched
    assert (match.setting, match.a_trial_ids, match.b_trial_ids) == (
        "path=tiny-llama-8m lr=1.0e-03",
        ("00000",),
        ("00000",),
    )


def test_finalists_are_judged_by_their_fresh_seeds(sweeps, tmp_path) -> None:
    def finalists(quality):
        searched = [({"optim.lr": lr}, scored(q), {}) for lr, q in ((1e-3, 9.0), (2e-3, quality))]
        fresh = [
            ({"optim.lr": lr, "train.seed": seed}, scored(q), {"purpose": "confirm"})
            for lr, q in ((1e-3, 0.0), (2e-3, quality))
            for seed in (43, 44, 45)
        ]
        return [*searched, *fresh]

    confirm = {"sweep.confirm": {"top": 2, "seeds": 4}}
    sweeps("one", {"optim.lr": LR}, finalists(0.5), **confirm)
    sweeps("two", {"optim.lr": LR}, finalists(1.0), **confirm)
    found = compare_runs("one", "two", output_dir=tmp_path)
    assert sorted(found.a.trial_ids) == sorted(found.b.trial_ids) == ["00005", "00006", "00007"]
    assert found.metrics[0].covers == "200 held-out pairs and over seeds"
    assert found.metrics[0].difference == pytest.approx(0.5, abs=0.1)
    assert (found.a.candidates, found.notes, found.settings) == (1, (), ())
    assert [m.a_trial_ids for m in found.matched] == [("00005", "00006", "00007"), ("00002", "00003", "00004")]


@pytest.mark.parametrize("common", [True, False])
def test_without_pair_files_seeds_decide(sweeps, tmp_path, common) -> None:
    seeds = {"one": (1, 2, 3), "two": (1, 2, 3) if common else (4, 5, 6)}
    values = {}
    for name, gain in (("one", 0.0), ("two", 0.4)):
        runs = [scored(gain + 0.5 * RNG.normal() + seed) for seed in range(3)]
        values[name] = [r.value("eval/log_odds") for r in runs]
        space = {"train.seed": {"type": "grid", "values": list(seeds[name])}}
        run_dir = sweeps(name, space, [({"train.seed": s}, r, {}) for s, r in zip(seeds[name], runs, strict=True)])
        for file in run_dir.rglob(PAIRS_FILE):
            file.unlink()
    found = compare_runs("one", "two", output_dir=tmp_path)
    main, nll = found.metrics[0], next(d for d in found.metrics if d.metric == "eval/nll")
    assert (nll.low, nll.high) == (0, 0)  # made up: no seed moves it
    if common:
        mean, half = mean_interval((np.array(values["two"]) - values["one"]).tolist())
        assert (main.low, main.high) == pytest.approx((mean - half, mean + half))
        assert main.covers == "3 seeds in common (paired t-interval)"
    else:
        expected = ttest_ind(values["two"], values["one"], equal_var=False).confidence_interval(0.95)
        assert (main.low, main.high) == pytest.approx(tuple(expected))
        assert main.covers == "3 and 3 seeds (Welch)"


def test_no_interval_is_said_with_its_reason(sweeps, tmp_path) -> None:
    single(sweeps, "one", scored(0.0))
    run_dir = single(sweeps, "two", scored(0.4))
    file = run_dir / "trials" / "00000" / PAIRS_FILE
    scored(9.0).save(file)
    other = compare_runs("one", "two", output_dir=tmp_path)
    assert "per-pair file of trial 00000 of two is of another evaluation" in other.sentence
    file.unlink()
    found = compare_runs("one", "two", output_dir=tmp_path)
    assert re.fullmatch(
        r"B \(two\) is ahead by 0\.\d{4} on eval/log_odds \(higher is better\), but how certain that is is unknown: "
        r"per-pair file of trial 00000 of two missing, and not both have several seeds\.",
        found.sentence,
    )
    assert (found.metrics[0].better, found.metrics[0].low) == (None, None)


def test_what_cannot_be_compared_is_refused(sweeps, tmp_path) -> None:
    single(sweeps, "one", scored(0.0))
    for name, changes in (
        ("elsewhere", {"pair_ids_N": np.array([f"q:{i}".encode() for i in range(200)])}),
        ("renamed", {"answer_bytes_N": np.full(200, 9)}),
    ):
        single(sweeps, name, scored(0.0, **changes), **{"data.eval_pairs": 30})
        with pytest.raises(CompareError, match=r"different held-out pairs: .*data.eval_pairs is \S+ and 30"):
            compare_runs("one", name, output_dir=tmp_path)
    single(sweeps, "by_nll", scored(0.0), **{"sweep.metric": "eval/nll", "loss.nll_scope": "response"})
    with pytest.raises(CompareError, match=r"one is judged by eval/log_odds \(higher is better\), by_nll .*--metric"):
        compare_runs("one", "by_nll", output_dir=tmp_path)
    with pytest.raises(
        CompareError, match=r"eval/nll is no common measure .*nll_scope is prompt_and_response and resp"
    ):
        compare_runs("one", "by_nll", "eval/nll", output_dir=tmp_path)
    assert compare_runs("one", "by_nll", "eval/nll_per_byte", output_dir=tmp_path).metric == "eval/nll_per_byte"
    single(sweeps, "tokens", scored(0.0, nll_tokens_N=np.full(200, 3)))
    with pytest.raises(CompareError, match=r"it counts other tokens .*use --metric eval/preference_accuracy or"):
        compare_runs("one", "tokens", "eval/nll", output_dir=tmp_path)
    single(sweeps, "lost", None, {"status": "failed"})
    with pytest.raises(CompareError, match=r"B \(lost\) has no value of eval/log_odds: 1 failed; it has no evaluation"):
        compare_runs("one", "lost", output_dir=tmp_path)
    with pytest.raises(CompareError, match="A and B are the same: one"):
        compare_runs("one", tmp_path / "one", output_dir=tmp_path)
    with pytest.raises(CompareError, match="'nll' is not a held-out metric; use one of eval/pref"):
        compare_runs("one", "by_nll", "nll", output_dir=tmp_path)


def test_pairs_that_only_one_evaluated_are_left_out(sweeps, tmp_path) -> None:
    one = scored(0.0)
    single(sweeps, "one", one)
    few = one.of(one.pair_ids_N[:150])
    single(sweeps, "few", few)
    main = compare_runs("one", "few", output_dir=tmp_path).metrics[0]
    assert main.covers == "150 held-out pairs that both evaluated (50 more of one are not counted)"
    assert main.difference == 0
    assert main.a == one.value("eval/log_odds") != main.b


def test_json_markdown_and_narrow_terminals(sweeps, tmp_path) -> None:
    for name, gain in (("quickstart", 0.0), ("wider", 0.4)):
        trials = [({"optim.lr": lr}, scored(gain + 300 * lr), {}) for lr in (1e-3, 2e-3)]
        sweeps(name, {"optim.lr": LR}, trials, **{"optim.weight_decay": gain})
    found = compare_runs("quickstart", "wider", output_dir=tmp_path)
    tree = json.loads(found.to_json())
    assert tree["metrics"][0]["difference"] == found.metrics[0].difference
    assert tree["metrics"][0]["better"] == tree["matched"][0]["difference"]["better"] == "B"
    assert tree["a"]["setting"] == "lr=2.0e-03"
    assert {c["path"]: (c["a"], c["b"]) for c in tree["settings"]} == {"optim.weight_decay": ("0.0", "0.4")}
    page = comparison_markdown(found)
    assert page.splitlines()[2] == f"**{found.sentence}**"
    assert "| optim.weight_decay | 0.0 | 0.4 |" in page
    narrow = shown(found, 80)
    assert max(map(len, narrow.splitlines())) <= 80
    main = found.metrics[0]
    assert re.search(rf"\neval/log_odds↑ +{main.a:.4f} +{main.b:.4f} +\+{main.difference:.4f} ", narrow)
    assert re.search(r"\neval/preference_accuracy↑ ", narrow)  # not broken over two lines


def test_the_command_line(sweeps, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    single(sweeps, "one", scored(0.0))
    single(sweeps, "two", scored(0.5))
    where = ["--output-dir", str(tmp_path)]
    expected = compare_runs("one", "two", output_dir=tmp_path)
    assert cli.main(["compare", "one", "two", *where]) == 0
    assert " ".join(capsys.readouterr().out.split()).startswith(expected.sentence)
    assert cli.main(["compare", "one", "two", "--json", "--metric", "eval/odds_ratio_loss", *where]) == 0
    assert json.loads(capsys.readouterr().out)["metric"] == "eval/odds_ratio_loss"
    assert cli.main(["compare", "one", "two", "--format", "md", *where]) == 0
    assert capsys.readouterr().out == comparison_markdown(expected)
    for names, reason in ((("one", "one"), "are the same"), (("one", "tow"), "nearest names there: two")):
        assert cli.main(["compare", *names, *where]) == 2
        assert reason in capsys.readouterr().err
