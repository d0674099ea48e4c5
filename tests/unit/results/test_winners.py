import json

import numpy as np
import pytest
from scipy.stats import norm

from orpo_ray.results.winners import summarize_winners
from tests.support.sweeps import pair_scores, simulated, trial, write_pairs

METRIC = "eval/log_odds"


def lam(value, seed=None):
    return {"loss.orpo_lambda": value} | ({} if seed is None else {"train.seed": seed})


def summarized(tmp_path, trials, metric=METRIC, mode="max"):
    """Of (trial, scores): files are written for those that finished."""
    for one, scores in trials:
        if scores is not None:
            write_pairs(tmp_path, one["trial_id"], scores)
    results = {"name": "s", "metric": metric, "mode": mode, "best": None, "trials": [one for one, _ in trials]}
    found = summarize_winners(results, tmp_path)
    json.dumps(found, allow_nan=False)
    return found


def searched(settings):
    return [
        (trial(f"t{number}", lam(number / 10), scores), scores)
        for number, runs in enumerate(settings)
        for scores in runs[:1]
    ]


def test_a_search_with_one_seed_each(tmp_path) -> None:
    settings = simulated(np.random.default_rng(0), [0.0, 0.4, 0.4, -2.0])
    trials = searched(settings)
    trials[3:3] = [(trial("lost", lam(0.9), None, status="failed"), None)]
    found = summarized(tmp_path, trials)
    assert (found["pairs"], found["covers"], found["no_intervals"], found["pairs_left_out"]) == (200, "pairs", None, 0)
    means = [runs[0].value(METRIC) for runs in settings]
    assert [row["mean"] for row in found["settings"]] == pytest.approx(sorted(means, reverse=True), rel=1e-12)
    assert set(found["tied"]) == {"λ=0.1", "λ=0.2"}
    first, *rest = found["settings"]
    assert (first["difference"], first["difference_low"], first["difference_high"]) == (0, 0, 0)
    for row in rest:
        assert row["difference"] == pytest.approx(row["mean"] - first["mean"])
        assert row["tied"] == (row["difference_low"] <= 0 <= row["difference_high"])
        assert row["low"] < row["mean"] < row["high"]
    width = found["settings"][-1]["high"] - found["settings"][-1]["low"]
    error = settings[3][0].log_odds_N.std() / np.sqrt(200)
    assert width == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found["best"]["checkpoint"] == f"/runs/{found['best']['trial_id']}/step-1"
    bias = found["selection_bias"]
    assert (bias["candidates"], bias["by_seed"]) == (4, None)
    assert 0 < bias["by_pairs"] < 0.1
    expected = first["mean"] - bias["by_pairs"]
    assert f"flatters it on these 200 pairs by about {bias['by_pairs']:.4f}" in bias["sentence"]
    assert f"expect a `{METRIC}` of about {expected:.4f} on fresh pairs" in bias["sentence"]
    assert found["divergence"][""]["diverged"] == 0


def test_finalists_are_judged_by_their_fresh_seeds_alone(tmp_path) -> None:
    rng = np.random.default_rng(1)
    settings = simulated(rng, [0.0, 0.0, -0.5, -0.5], num_seeds=4, seed_sd=0.05)
    lucky = pair_scores(settings[1][0].log_odds_N + 1.0)  # the search's best, by its seed
    settings[1][0] = lucky
    trials = searched(settings)
    for number in (0, 1):
        for seed, scores in enumerate(settings[number][1:], start=43):
            one = trial(f"c{number}-{seed}", lam(number / 10, seed), scores, purpose="confirm")
            trials.append((one, scores))
    lost = trial("c0-46", lam(0.0, 46), None, status="diverged", purpose="confirm")
    found = summarized(tmp_path, [*trials, (lost, None)])
    rows = {row["name"]: row for row in found["settings"]}
    assert set(rows) == {"λ=0", "λ=0.1"}
    for number, row in enumerate((rows["λ=0"], rows["λ=0.1"])):
        fresh = [scores.value(METRIC) for scores in settings[number][1:]]
        assert row["mean"] == pytest.approx(np.mean(fresh), rel=1e-12)
        assert (row["seeds"], row["trial_ids"]) == (3, [f"c{number}-{s}" for s in (43, 44, 45)])
        assert row["tied"]
    assert (rows["λ=0"]["lost"], rows["λ=0.1"]["lost"]) == (1, 0)
    assert found["covers"] == "pairs and seeds"
    assert found["selection_bias"]["candidates"] == 4
    gaps = [settings[n][0].value(METRIC) - row["mean"] for n, row in enumerate((rows["λ=0"], rows["λ=0.1"]))]
    best = int(found["best"]["name"] == "λ=0.1")
    assert found["selection_bias"]["by_seed"] == pytest.approx(gaps[best])
    assert found["selection_bias"]["by_seed_finalists"] == pytest.approx(np.mean(gaps))
    assert gaps[1] > 0.9
    # The model to take away is the best run of the best setting, the search's among them.
    runs = {one["trial_id"]: one["metrics"][METRIC] for one, s in trials if s is not None}
    own = [t for t in runs if t in (f"t{best}", *rows[found["best"]["name"]]["trial_ids"])]
    assert found["best"]["trial_id"] == max(own, key=runs.__getitem__)


def test_seeds_as_an_axis_and_repeats_that_are_none(tmp_path) -> None:
    runs = simulated(np.random.default_rng(2), [0.0], num_seeds=3, seed_sd=0.1)[0]
    trials = [(trial(f"a{s}", lam(0.1, s), scores), scores) for s, scores in enumerate(runs)]
    found = summarized(tmp_path / "seeds", trials)
    assert (found["settings"][0]["seeds"], found["covers"]) == (3, "pairs and seeds")
    # The same setting proposed again with the same seed is the same run, not another seed.
    again = [
        (trial(f"a{n}", dict(reversed(lam(0.1, 0).items()) if n else lam(0.1, 0)), runs[0]), runs[0]) for n in (0, 1)
    ]
    found = summarized(tmp_path / "again", again)
    assert (found["settings"][0]["seeds"], found["covers"]) == (1, "pairs")
    assert found["settings"][0]["trial_ids"] == ["a0"]
    assert found["selection_bias"]["sentence"].startswith("There was no choice between settings")


def test_lower_is_better(tmp_path) -> None:
    rng = np.random.default_rng(3)
    scores = [pair_scores(np.zeros(100), nll_N=2.0 + gap + 0.1 * rng.normal(size=100)) for gap in (0.3, 0.0, 0.0)]
    found = summarized(tmp_path, searched([[s] for s in scores]), "eval/nll", "min")
    assert set(found["tied"]) == {"λ=0.1", "λ=0.2"}
    worst = found["settings"][-1]
    assert worst["name"] == "λ=0"
    assert worst["difference"] == pytest.approx(0.3, abs=0.05)
    assert worst["difference_low"] > 0
    assert found["selection_bias"]["by_pairs"] > 0


@pytest.mark.parametrize(
    "metric", ["eval/preference_accuracy", "eval/nll_per_byte", "eval/odds_ratio_loss", "eval/loss"]
)
def test_every_metric_has_intervals(tmp_path, metric) -> None:
    rng = np.random.default_rng(4)
    scores = [pair_scores(rng.normal(size=80), nll_N=rng.uniform(1, 2, 80)) for _ in range(3)]
    mode = "max" if metric == "eval/preference_accuracy" else "min"
    found = summarized(tmp_path, searched([[s] for s in scores]), metric, mode)
    for row in found["settings"]:
        number = round(row["params"]["loss.orpo_lambda"] * 10)
        assert row["mean"] == pytest.approx(scores[number].value(metric), rel=1e-12)
        assert row["low"] < row["mean"] < row["high"]


def test_without_a_file_there_are_no_intervals_but_all_else(tmp_path) -> None:
    settings = simulated(np.random.default_rng(5), [0.0, 1.0, 0.5])
    trials = searched(settings)
    found = summarized(tmp_path, [*trials[:2], (trials[2][0], None)])
    assert found["no_intervals"] == "per-pair file of trial t2 missing"
    assert [row["name"] for row in found["settings"]] == ["λ=0.1", "λ=0.2", "λ=0"]
    assert found["best"]["trial_id"] == "t1"
    assert {row["tied"] for row in found["settings"]} == {None}
    assert found["tied"] == []
    assert (found["pairs"], found["settings"][0]["low"], found["selection_bias"]["by_pairs"]) == (None, None, None)
    assert "not known: per-pair file of trial t2 missing" in found["selection_bias"]["sentence"]
    assert found["pareto"]["settings"][0]["frequency"] is None
    (tmp_path / "trials" / "t2").mkdir()
    (tmp_path / "trials" / "t2" / "pairs.npz").write_bytes(b"torn")
    found = summarized(tmp_path, [*trials[:2], (trials[2][0], None)])
    assert "trial t2 unreadable" in found["no_intervals"]
    write_pairs(tmp_path, "t2", settings[0][0])
    found = summarized(tmp_path, [*trials[:2], (trials[2][0], None)])
    assert "trial t2 is of another evaluation" in found["no_intervals"]


def test_nothing_finished(tmp_path) -> None:
    for trials in ([], [(trial("a", lam(0.1), None, status="diverged"), None)]):
        found = summarized(tmp_path, trials)
        assert (found["best"], found["settings"], found["no_intervals"]) == (None, [], "no trial finished")
        assert found["pareto"]["settings"] == []


def test_results_of_before_trials_had_a_purpose(tmp_path) -> None:
    trials = searched(simulated(np.random.default_rng(6), [0.0, 1.0]))
    for one, _ in trials:
        del one["purpose"]
    assert summarized(tmp_path, trials)["best"]["name"] == "λ=0.1"


def test_only_shared_pairs_are_compared(tmp_path) -> None:
    runs = [r[0] for r in simulated(np.random.default_rng(7), [0.0, 0.0])]
    fewer = runs[1].of(runs[1].pair_ids_N[:150])
    found = summarized(tmp_path / "a", searched([[runs[0]], [fewer]]))
    assert (found["pairs"], found["pairs_left_out"]) == (150, 50)
    means = {row["name"]: row["mean"] for row in found["settings"]}
    assert means == pytest.approx({"λ=0": runs[0].log_odds_N[:150].mean(), "λ=0.1": fewer.log_odds_N.mean()})
    other = pair_scores(runs[1].log_odds_N, pair_ids_N=np.array([b"q:%d" % i for i in range(200)]))
    found = summarized(tmp_path / "b", searched([[runs[0]], [other]]))
    assert found["no_intervals"] == "fewer than two held-out pairs are common to all finished trials"


def test_the_front_of_likelihood_against_preference(tmp_path) -> None:
    rng = np.random.default_rng(8)
    noise, nll = rng.normal(size=300), rng.uniform(1, 3, 300)

    apart = rng.normal(size=300)
    apart = (apart - apart.mean()) / apart.std()

    def setting(odds, cost):
        return [pair_scores(odds + noise, nll_N=nll + cost)]

    # λ = 0: likely, λ = 0.1: preferred, λ = 0.2: beaten by both, λ = 0.3: one standard error less likely than λ = 0.
    close_by = setting(0.0, 0.01 * (apart + 1 / np.sqrt(300)))
    found = summarized(tmp_path, searched([setting(0.0, 0.0), setting(2.0, 1.0), setting(-0.5, 2.0), close_by]))
    pareto = found["pareto"]
    assert (pareto["cost"], pareto["gain"]) == ("eval/nll", "eval/preference_accuracy")
    rows = {row["name"]: row for row in pareto["settings"]}
    assert [row["cost"] for row in pareto["settings"]] == sorted(row["cost"] for row in pareto["settings"])
    assert (rows["λ=0.1"]["on_front"], rows["λ=0.1"]["uncertain"], rows["λ=0.1"]["frequency"]) == (True, False, 1.0)
    assert (rows["λ=0.2"]["on_front"], rows["λ=0.2"]["frequency"]) == (False, 0.0)
    close = [rows["λ=0"], rows["λ=0.3"]]  # the same accuracy on every resample: the cheaper one is on the front
    assert [(row["on_front"], row["uncertain"]) for row in close] == [(True, True), (False, False)]
    assert [row["frequency"] for row in close] == pytest.approx([norm.cdf(1), norm.cdf(-1)], abs=0.03)


def test_likelihoods_of_other_tokens_are_not_compared(tmp_path) -> None:
    one = pair_scores(np.zeros(20))
    other = pair_scores(np.ones(20), nll_tokens_N=np.full(20, 3))
    pareto = summarized(tmp_path, searched([[one], [other]]))["pareto"]
    assert pareto["cost"] == "eval/nll_per_byte"
    assert {row["cost"] for row in pareto["settings"]} == {0.25}
