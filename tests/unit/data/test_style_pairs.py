import hashlib
import json
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from orpo_ray.data.style_pairs import KINDS, generate

Row = dict[str, str]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return generate(20_000, seed=0)


def test_the_same_seed_gives_the_same_pairs_in_another_process() -> None:
    def digest(rows: list[Row]) -> str:
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    script = (
        "import hashlib, json; from orpo_ray.data.style_pairs import generate; "
        "print(hashlib.sha256(json.dumps(generate(200, 7)).encode()).hexdigest())"
    )
    elsewhere = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert elsewhere.stdout.strip() == digest(generate(200, 7))
    assert digest(generate(200, 8)) != digest(generate(200, 7))


def test_a_longer_list_begins_with_the_shorter_one() -> None:
    assert generate(300, 3)[:100] == generate(100, 3)


def test_every_kind_is_there_and_no_prompt_twice(rows: list[Row]) -> None:
    shares = {kind: n / len(rows) for kind, n in Counter(row["kind"] for row in rows).items()}
    assert set(shares) == set(KINDS)
    assert len(KINDS) >= 5
    assert all(0.1 < share < 0.2 for share in shares.values()), shares
    assert len({row["prompt"] for row in rows}) == 20_000
    assert all(row["chosen"] != row["rejected"] for row in rows)


def test_word_counts_are_those_promised(rows: list[Row]) -> None:
    words = {side: [len(row[side].split()) for row in rows] for side in ("prompt", "chosen", "rejected")}
    assert 15 <= min(words["prompt"]) <= max(words["prompt"]) <= 60
    for side in ("chosen", "rejected"):
        assert 5 <= min(words[side]) <= max(words[side]) <= 40


def test_length_does_not_tell_chosen_from_rejected(rows: list[Row]) -> None:
    difference = np.array([len(row["chosen"]) - len(row["rejected"]) for row in rows])
    longer = np.mean(difference > 0) + 0.5 * np.mean(difference == 0)
    assert 0.4 < longer < 0.6


def naive_bayes_accuracy(rows: list[Row]) -> tuple[float, float]:
    """Multinomial naive Bayes on answer words, prompt unseen: share of single answers, and of pairs, told right."""
    train, held_out = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    vocabulary = {w: i for i, w in enumerate({w for r in train for w in (r["chosen"] + " " + r["rejected"]).split()})}
    counts = np.ones((2, len(vocabulary)))
    for row in train:
        for label, side in enumerate(("rejected", "chosen")):
            for word in row[side].split():
                counts[label, vocabulary[word]] += 1
    logits = np.log(counts[1] / counts[1].sum()) - np.log(counts[0] / counts[0].sum())
    scores = np.array(
        [
            [
                sum(logits[vocabulary[w]] for w in row[side].split() if w in vocabulary)
                for side in ("rejected", "chosen")
            ]
            for row in held_out
        ]
    )
    margin = scores[:, 1] - scores[:, 0]
    single = 0.5 * (np.mean(scores[:, 1] > 0) + np.mean(scores[:, 0] <= 0))
    return float(single), float(np.mean(margin > 0) + 0.5 * np.mean(margin == 0))


def test_no_word_of_the_answer_gives_it_away(rows: list[Row]) -> None:
    single, paired = naive_bayes_accuracy(rows)
    assert single < 0.75
    assert paired < 0.75


def test_the_bag_of_words_check_would_find_a_marker(rows: list[Row]) -> None:
    marked = [row | {"chosen": "Certainly! " + row["chosen"]} for row in rows[:4000]]
    assert naive_bayes_accuracy(marked)[1] > 0.95


@pytest.mark.parametrize(
    "style",
    ["I am sorry, but I cannot", "Of course. To", "No worries", "Dear ", "It really depends", "I would ", "It is on "],
)
def test_each_style_is_chosen_for_some_prompts_and_rejected_for_others(rows: list[Row], style: str) -> None:
    chosen = sum(row["chosen"].startswith(style) for row in rows)
    rejected = sum(row["rejected"].startswith(style) for row in rows)
    assert 0.1 < chosen / (chosen + rejected) < 0.9, (chosen, rejected)


def test_reading_and_comparing_are_answered_rightly(rows: list[Row]) -> None:
    seen: dict[str, int] = defaultdict(int)
    for row in rows:
        if row["kind"] == "comparing":
            numbers = [int(w) for w in row["prompt"].replace(".", "").split() if w.isdigit()]
            stated = next(int(w) for w in row["chosen"].split() if w.isdigit())
            wants_more = any(w in row["prompt"] for w in ("longer", "taller", "heavier", "dearer", "older", "larger"))
            assert stated == (max if wants_more else min)(numbers)
        elif row["kind"] == "reading" and "come from" in row["prompt"]:
            who = row["prompt"].split("Where does ")[1].split()[0]
            fact = next(s for s in row["prompt"].split(". ") if s.startswith(f"{who} is"))
            assert row["chosen"].rstrip(".").split()[-1] in fact
            assert row["rejected"].rstrip(".").split()[-1] not in fact.split()
        else:
            continue
        seen[row["kind"]] += 1
    assert seen["comparing"] > 1000
    assert seen["reading"] > 300


def test_asking_for_more_prompts_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orpo_ray.data.style_pairs.KINDS", {"only": lambda rng: ("one prompt", "a", "b")})
    with pytest.raises(ValueError, match=r"num_pairs \(5\) must not exceed the number of distinct prompts; found 1"):
        generate(5, 0)
