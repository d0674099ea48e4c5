"""Cosines by hand, intervals on simulated answers, and the embedder that comes in a package."""

import logging
import socket
import sys
from itertools import combinations

import numpy as np
import pytest

from orpo_ray.reproduction.diversity import EXTRA, diversity, local_embedder

ONES = {"a": [1.0, 0.0], "b": [0.0, 2.0], "c": [3.0, 3.0], "-a": [-1.0, 0.0], "nothing": [0.0, 0.0]}


def by_table(texts):
    return np.array([ONES[text] for text in texts])


def cosine(one, other):
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


def test_means_are_over_distinct_pairs() -> None:
    found = diversity([["a", "b", "c"], ["c", "a", "a"], ["-a", "-a", "-a"]], by_table)
    half = np.sqrt(0.5)
    within = [(0 + half + half) / 3, (half + half + 1) / 3, 1.0]
    assert found.per_input.value == pytest.approx(np.mean(within), abs=1e-12)
    assert found.across_input.value == pytest.approx((half - 1 - half) / 3, abs=1e-12)  # a·c, a·-a, c·-a
    assert (found.prompts, found.answers, found.without_direction) == (3, 3, 0)


def test_sums_of_unit_vectors_are_the_loop_over_pairs() -> None:
    rng = np.random.default_rng(0)
    embedding_TD = rng.normal(size=(7 * 4, 5)) + 0.5
    found = diversity([["x"] * 4] * 7, lambda texts: embedding_TD)
    by_prompt_NKD = embedding_TD.reshape(7, 4, 5)
    within = [np.mean([cosine(*pair) for pair in combinations(of_prompt, 2)]) for of_prompt in by_prompt_NKD]
    across = np.mean([cosine(*pair) for pair in combinations(by_prompt_NKD[:, 0], 2)])
    assert found.per_input.value == pytest.approx(np.mean(within), abs=1e-12)
    assert found.across_input.value == pytest.approx(across, abs=1e-12)


def test_a_prompt_drawn_twice_is_not_compared_with_itself() -> None:
    """Answers to different prompts are all orthogonal: so they are on every resample."""
    found = diversity([["x", "x"]] * 30, lambda texts: np.repeat(np.eye(30), 2, axis=0))
    across = (found.across_input.value, found.across_input.low, found.across_input.high)
    assert across == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("text", ["c", "", " \n", "nothing"])
def test_output_that_is_always_the_same_gives_1(text: str) -> None:
    found = diversity([[text] * 5] * 40, by_table)
    for similarity in (found.per_input, found.across_input):
        values = (similarity.value, similarity.low, similarity.high)
        assert values == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)
    assert found.without_direction == (0 if text == "c" else 200)


def test_an_empty_answer_is_like_other_empty_ones_and_like_nothing_else() -> None:
    asked = []

    def embed(texts):
        asked.extend(texts)
        return by_table(texts)

    found = diversity([["a", "", "nothing"], ["a", "a", "a"], [" ", "a", "a"]], embed)
    # Within: only the two empty ones are alike; all; only the two a.
    assert found.per_input.value == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert found.across_input.value == pytest.approx(1 / 3)
    assert found.without_direction == 3
    assert "" not in asked
    assert " " not in asked


def test_only_directions_are_read_also_of_tiny_vectors() -> None:
    def scaled(texts):
        return by_table(texts) * 1e-200

    answers = [["a", "b"], ["c", "a"], ["b", "c"]]
    tiny, plain = diversity(answers, scaled), diversity(answers, by_table)
    assert tiny.without_direction == 0
    assert tiny.across_input.value == pytest.approx(plain.across_input.value, abs=1e-12)
    assert tiny.per_input.value == pytest.approx(plain.per_input.value, abs=1e-12)


def test_intervals_hold_what_95_percent_should() -> None:
    """500 sets of 60 prompts, answers around a shared direction and one of the prompt."""
    rng = np.random.default_rng(1)
    dims = 16

    def drawn(prompts):
        shared_D = np.eye(dims)[0]
        spread_N11 = rng.uniform(0.3, 1.5, (prompts, 1, 1))  # some prompts allow more answers than others
        of_prompt_N1D = rng.normal(size=(prompts, 1, dims)) / 4
        return shared_D + of_prompt_N1D + spread_N11 * rng.normal(size=(prompts, 3, dims)) / 4

    many = diversity([["x"] * 3] * 20_000, lambda texts: drawn(20_000).reshape(-1, dims), resamples=1)
    hits = np.zeros(2)
    for number in range(500):
        embedding_TD = drawn(60).reshape(-1, dims)
        found = diversity([["x"] * 3] * 60, lambda texts, vectors=embedding_TD: vectors, resamples=400, seed=number)
        for at, (got, true) in enumerate([(found.per_input, many.per_input), (found.across_input, many.across_input)]):
            hits[at] += got.low <= true.value <= got.high
            assert got.low <= got.value <= got.high
    assert (hits / 500 >= 0.91).all()
    assert (hits / 500 <= 0.98).all()


def test_many_prompts_need_no_matrix_of_all_pairs() -> None:
    """100,000 × 100,000 cosines would be 80 GB."""
    embedding_TD = np.random.default_rng(0).normal(size=(200_000, 4)) + np.eye(4)[0]
    found = diversity([["x", "x"]] * 100_000, lambda texts: embedding_TD, resamples=20)
    assert found.across_input.high - found.across_input.low < 0.01


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([], "0 prompts with no answers"),
        ([["a", "a"]], "1 prompts with 2 answers"),
        ([["a"], ["b"]], "2 prompts with 1 answers"),
        ([["a", "b"], ["a", "b", "c"]], "2 prompts with 2, 3 answers"),
    ],
)
def test_too_few_answers_are_refused(answers, told: str) -> None:
    with pytest.raises(ValueError, match=f"at least 2 prompts .*{told}"):
        diversity(answers, by_table)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda texts: by_table(texts)[:-1], r"4 texts one finite vector each; it gave \(3, 2\)"),
        (lambda texts: by_table(texts)[:, 0], r"\(4,\)"),
        (lambda texts: by_table(texts) * np.nan, r"\(4, 2\) of values that are not finite"),
    ],
)
def test_a_wrong_embedder_is_told(wrong, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        diversity([["a", "b"], ["a", "c"]], wrong)


def test_without_the_package_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(ImportError, match=r"orpo-ray\[judges\]"):
        local_embedder()


@pytest.fixture
def no_network(monkeypatch):
    def refused(*_args, **_kwargs):
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def test_the_local_embedder_needs_no_network_and_leaves_logging_alone(no_network, monkeypatch, tmp_path) -> None:
    pytest.importorskip("wordllama")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wordllama"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("HOME", str(tmp_path))
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    monkeypatch.setattr(root, "handlers", [])
    embed = local_embedder()
    assert (root.handlers, root.level) == ([], before[1])
    assert embed(["a text", "another one"]).shape == (2, 256)
    assert not list(tmp_path.iterdir())


def test_the_local_embedder_tells_what_is_said_apart(no_network) -> None:
    pytest.importorskip("wordllama", reason=EXTRA)
    embed = local_embedder()
    same, alike, other = (
        diversity([[first, second]] * 2, embed).per_input.value
        for first, second in [
            ("The cat sat on the mat.", "The cat sat on the mat."),
            ("The cat sat on the mat.", "A cat was sitting on a rug."),
            ("The cat sat on the mat.", "Interest rates rose by half a percent."),
        ]
    )
    assert same == pytest.approx(1, abs=1e-6)
    assert (alike, other) == pytest.approx((0.622233, -0.032218), abs=1e-5)
    # Words without their order; padding to a longer text in the batch changes nothing.
    assert embed(["cat dog"])[0] == pytest.approx(embed(["dog cat", "a " * 500])[0], abs=1e-6)
