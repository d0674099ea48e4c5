from orpo_ray.training.trial import Diverged


def test_divergence_names_the_pairs_or_their_batch() -> None:
    assert str(Diverged(3, ["f:1"], ["f:1", "f:2"])) == "log-probabilities not finite at step 3 for 1 pair(s): f:1"
    many = [f"f:{i}" for i in range(20)]
    text = str(Diverged(3, [], many))
    assert text.startswith("gradient not finite at step 3, a batch of 20 pair(s): f:0, ")
    assert text.endswith("f:7, ...")
