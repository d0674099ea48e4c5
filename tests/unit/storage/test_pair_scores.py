import numpy as np
import pytest

from orpo_ray.config import METRIC_MODES
from orpo_ray.storage.pair_scores import PairScores, on_shared_pairs
from tests.support.sweeps import pair_scores

THREE = pair_scores(
    np.array([1.0, -2.0, 0.0]),
    chosen_logp_N=np.array([-1.0, -3.0, -2.0]),
    rejected_logp_N=np.array([-2.0, -1.0, -2.0]),
    nll_sum_N=np.array([3.0, 8.0, 1.0]),
    nll_tokens_N=np.array([3, 4, 1]),
    answer_nats_N=np.array([5.0, 1.0, 2.0]),
    answer_bytes_N=np.array([10, 2, 4]),
    preference_loss_N=np.array([0.5, 1.0, 1.5]),
)


def test_metrics_by_hand() -> None:
    values = {metric: THREE.value(metric) for metric in METRIC_MODES}
    softplus = np.log1p(np.exp([-1.0, 2.0, 0.0])).mean()
    assert values == pytest.approx(
        {
            "eval/preference_accuracy": 0.5,  # right, wrong, and a tie that counts half
            "eval/log_odds": -1 / 3,
            "eval/nll": 12 / 8,
            "eval/nll_per_byte": 8 / 16,
            "eval/odds_ratio_loss": softplus,
            "eval/loss": 12 / 8 + 0.1 * 1.0,
        },
        rel=1e-15,
    )
    by_pair = pair_scores(
        np.zeros(3), nll_sum_N=THREE.nll_sum_N, nll_tokens_N=np.array([3, 4, 0]), nll_reduction="pair"
    )
    assert by_pair.value("eval/nll") == pytest.approx((1 + 2 + 1) / 3, rel=1e-15)  # of no tokens: as in `loss`


def test_a_term_without_weight_is_no_part_of_the_loss() -> None:
    scores = pair_scores(np.ones(3), preference_loss_N=np.full(3, np.inf), loss_weights=(1.0, 0.0))
    assert scores.value("eval/loss") == scores.value("eval/nll")


def test_a_file_reads_back_and_leaves_nothing_else(tmp_path) -> None:
    path = tmp_path / "t1" / "pairs.npz"
    pair_scores(np.zeros(2)).save(path)
    THREE.save(path)
    read = PairScores.load(path)
    for name in PairScores.__dataclass_fields__:
        assert np.array_equal(getattr(read, name), getattr(THREE, name)), name
    assert isinstance(read.step, int)
    assert isinstance(read.nll_reduction, str)
    assert [p.name for p in path.parent.iterdir()] == ["pairs.npz"]


@pytest.mark.parametrize("damage", [lambda b: b[:-50], lambda b: b"", lambda b: b"{}"], ids=["torn", "empty", "other"])
def test_a_damaged_file_is_named(tmp_path, damage) -> None:
    path = tmp_path / "pairs.npz"
    THREE.save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"pairs.npz"):
        PairScores.load(path)
    with pytest.raises(FileNotFoundError):
        PairScores.load(tmp_path / "none.npz")


def test_trials_are_laid_on_the_pairs_they_share() -> None:
    ids = [np.array(names.encode().split()) for names in ("a bb c", "c d a", "a bb c d")]
    first = pair_scores(np.array([1.0, 2.0, 3.0]), pair_ids_N=ids[0])
    second = pair_scores(np.array([30.0, 40.0, 10.0]), pair_ids_N=ids[1])
    third = pair_scores(np.array([100.0, 200.0, 300.0, 400.0]), pair_ids_N=ids[2])
    shared = on_shared_pairs([first, second, third])
    assert [s.log_odds_N.tolist() for s in shared] == [[1.0, 3.0], [10.0, 30.0], [100.0, 300.0]]
    assert all(s.pair_ids_N.tolist() == [b"a", b"c"] for s in shared)
    same = on_shared_pairs([first, first])
    assert same[1] is first
