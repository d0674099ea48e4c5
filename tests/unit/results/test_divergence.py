import numpy as np
import pytest

from orpo_ray.results.divergence import divergence_boundaries

LRS = [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3]


def trials(limit, lambdas=(0.0, 0.5, 1.0), lrs=LRS, bundle="2m"):
    """Diverged where lr > limit(λ); the highest that holds was stopped early."""
    return [
        {
            "bundle": bundle,
            "status": "diverged" if lr > limit(lam) else "stopped_early" if 2 * lr > limit(lam) else "finished",
            "params": {"optim.lr": lr, "loss.orpo_lambda": lam},
        }
        for lam in lambdas
        for lr in lrs
    ]


def test_a_known_boundary() -> None:
    limits = {0.0: 1e-3, 0.5: 5e-4, 1.0: 2.5e-4}
    crashed = [{"bundle": "2m", "status": "failed", "params": {"optim.lr": 1e-4, "loss.orpo_lambda": 0.0}}]
    other = trials(lambda lam: 1.0, bundle="8m")
    found = divergence_boundaries(trials(limits.__getitem__) + crashed + other)
    assert found["8m"]["diverged"] == 0
    assert "8m" in found
    assert (found["2m"]["held"], found["2m"]["diverged"]) == (9, 9)
    rows = found["2m"]["rows"]
    assert [(r["lambda_low"], r["lambda_high"]) for r in rows] == [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)]
    assert [(r["held"], r["diverged"]) for r in rows] == [(4, 2), (3, 3), (2, 4)]
    assert [r["largest_lr_held"] for r in rows] == [8e-4, 4e-4, 2e-4]
    assert [r["smallest_lr_diverged"] for r in rows] == [1.6e-3, 8e-4, 4e-4]
    for row in rows:  # separable: half-way between what held and what diverged
        middle = np.sqrt(row["largest_lr_held"] * row["smallest_lr_diverged"])
        assert row["lr_50"] == pytest.approx(middle, rel=0.05)
    assert found["2m"]["no_fit"] is None


def test_a_curve_through_overlapping_outcomes_finds_the_even_chance() -> None:
    rng = np.random.default_rng(0)
    found = []
    for lr, lam in zip(10 ** rng.uniform(-4, -2, 600), rng.uniform(0, 1, 600), strict=True):
        log_odds = 6 * (np.log10(lr) + 3 + 0.5 * lam)  # an even chance at lr = 10^(-3 - λ/2)
        status = "diverged" if rng.random() < 1 / (1 + np.exp(-log_odds)) else "finished"
        found.append({"bundle": "", "status": status, "params": {"optim.lr": lr, "loss.orpo_lambda": lam}})
    rows = divergence_boundaries(found)[""]["rows"]
    assert len(rows) == 4  # λ from a range: bins
    for row in rows:
        middle = (row["lambda_low"] + row["lambda_high"]) / 2
        assert np.log10(row["lr_50"]) == pytest.approx(-3 - middle / 2, abs=0.1)
        assert row["largest_lr_held"] > row["smallest_lr_diverged"]


@pytest.mark.parametrize(
    ("some", "reason"),
    [
        (trials(lambda lam: 2e-3, lambdas=(0.0, 1.0)), "2 diverged and 10 held"),
        (trials(lambda lam: 1.0), "0 diverged and 18 held"),
        (
            [t | {"status": {"diverged": "finished"}.get(t["status"], "diverged")} for t in trials(lambda _: 5e-4)],
            "more",
        ),
        ([t | {"params": {"loss.orpo_lambda": 0.1}} for t in trials(lambda _: 5e-4)], "optim.lr is not an axis"),
    ],
    ids=["few", "none", "reversed", "no lr"],
)
def test_where_no_curve_can_be_had_it_says_why(some, reason) -> None:
    (found,) = divergence_boundaries(some).values()
    assert reason in found["no_fit"]
    assert all(row["lr_50"] is None for row in found["rows"])


def test_one_lambda_and_curves_that_leave_what_was_tried() -> None:
    for_lr = [t | {"params": {"optim.lr": t["params"]["optim.lr"]}} for t in trials(lambda _: 5e-4, lambdas=(0.1,))]
    (row,) = divergence_boundaries(for_lr)["2m"]["rows"]
    assert (row["lambda_low"], row["largest_lr_held"], row["smallest_lr_diverged"]) == (None, 4e-4, 8e-4)
    assert row["lr_50"] == pytest.approx(np.sqrt(4e-4 * 8e-4), rel=0.05)
    rows = divergence_boundaries(trials({0.0: 5e-4, 1.0: 1e-6}.__getitem__, lambdas=(0.0, 1.0)))["2m"]["rows"]
    assert rows[0]["lr_50"] == pytest.approx(np.sqrt(4e-4 * 8e-4), rel=0.1)
    assert rows[1]["lr_50"] is None  # below the lowest learning rate
    assert rows[1]["largest_lr_held"] is None
