"""Questions and answers as FastChat reads them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.reproduction import mt_bench
from orpo_ray.reproduction.external_judges import (
    JudgeError,
    read_settings,
)
from orpo_ray.reproduction.mt_bench import (
    MtBenchAnswer,
    MtBenchQuestion,
    mt_bench_settings,
    read_mt_bench_questions,
    write_mt_bench,
)
from tests.support.judges import ANSWERS, ODD, QUESTIONS, SETTINGS, files


def questions_file(folder: Path, *rows: Any) -> Path:
    path = folder / "question.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def row(number: Any = 81, category: Any = "writing", turns: Any = ("a", "b"), **more: Any) -> dict[str, Any]:
    return {"question_id": number, "category": category, "turns": turns, **more}


def test_questions_are_read_as_they_stand(tmp_path: Path) -> None:
    path = questions_file(tmp_path, *[asdict(question) for question in QUESTIONS], row(7, reference=["x", "y"]))
    assert read_mt_bench_questions(path) == [*QUESTIONS, MtBenchQuestion(7, "writing", ("a", "b"))]


@pytest.mark.parametrize(
    ("rows", "law"),
    [
        ([], "is empty"),
        (["{"], "line 1: not JSON"),
        ([row(), ""], "line 2: not JSON"),
        ([[1]], "line 1: a question must have"),
        ([row("81")], "question_id '81'"),
        ([row(True)], "question_id True"),
        ([row(category=None)], "category None"),
        ([row(turns=["one"])], r"turns \['one'\]"),
        ([row(turns=["one", 2])], r"turns \['one', 2\]"),
        ([row(turns="ab")], "turns 'ab'"),
        ([row(), row(82), row(81)], "each question_id must be unique; 1 occur more than once, e.g. 81"),
    ],
)
def test_questions_that_fastchat_could_not_use_are_refused(tmp_path: Path, rows: list[Any], law: str) -> None:
    with pytest.raises(JudgeError, match=law):
        read_mt_bench_questions(questions_file(tmp_path, *rows))


def test_questions_are_not_invented(tmp_path: Path) -> None:
    for path in (tmp_path / "question.jsonl", tmp_path):
        with pytest.raises(JudgeError, match=r"git clone https://github.com/lm-sys/FastChat"):
            read_mt_bench_questions(path)


def test_mt_bench_file_is_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mt_bench.time, "time", lambda: 1700000000.5)
    settings = mt_bench_settings(SETTINGS, QUESTIONS)
    path = write_mt_bench(tmp_path, "toy-1.5b", QUESTIONS, ANSWERS, settings)
    assert files(tmp_path) == ["toy-1.5b.jsonl", "toy-1.5b.settings.json"]
    # As FastChat's load_model_answers reads: what ends in .jsonl, line by line, in whatever encoding.
    with path.open(encoding="ascii") as file:
        rows = [json.loads(line) for line in file]
    assert [list(row) for row in rows] == [["question_id", "answer_id", "model_id", "choices", "tstamp"]] * 3
    assert [(row["question_id"], row["choices"]) for row in rows] == [
        (81, [{"index": 0, "turns": ["a", "b"]}]),
        (82, [{"index": 0, "turns": ["2", "3"]}]),
        (90, [{"index": 0, "turns": [ODD, ""]}]),
    ]
    assert {(row["model_id"], row["tstamp"]) for row in rows} == {("toy-1.5b", 1700000000.5)}
    assert len({row["answer_id"] for row in rows}) == 3
    assert read_settings(path) == settings
    again = write_mt_bench(tmp_path / "again", "toy-1.5b", QUESTIONS, ANSWERS[::-1], settings)
    assert again.read_bytes() == path.read_bytes()


def test_categories_are_sampled_as_mt_bench_samples_them() -> None:
    questions = [*QUESTIONS, MtBenchQuestion(1, "cooking", ("a", "b"))]
    settings = mt_bench_settings(SETTINGS, questions)
    assert {category: each.temperature for category, each in settings.items()} == {
        "math": 0.0,
        "writing": 0.7,
        "stem": 0.1,
        "cooking": 0.7,
    }
    assert all(replace(each, temperature=0.7) == SETTINGS for each in settings.values())


def test_mt_bench_wants_one_answer_to_each_question(tmp_path: Path) -> None:
    settings = mt_bench_settings(SETTINGS, QUESTIONS)
    with pytest.raises(JudgeError, match="there are no answers; MT-Bench needs one to each of 3 questions"):
        write_mt_bench(tmp_path, "toy", QUESTIONS, [], settings)
    with pytest.raises(JudgeError, match="without an answer: 82, answers without a question: none"):
        write_mt_bench(tmp_path, "toy", QUESTIONS, ANSWERS[:2], settings)
    with pytest.raises(JudgeError, match="without an answer: none, answers without a question: 5"):
        write_mt_bench(tmp_path, "toy", QUESTIONS, [*ANSWERS, MtBenchAnswer(5, ("a", "b"))], settings)
    with pytest.raises(JudgeError, match=r"question_id must be unique; 1 occur more than once, e.g. 81"):
        write_mt_bench(tmp_path, "toy", QUESTIONS, [*ANSWERS, MtBenchAnswer(81, ("a", "b"))], settings)
    with pytest.raises(JudgeError, match="question_id must be unique"):
        write_mt_bench(tmp_path, "toy", [*QUESTIONS, QUESTIONS[0]], ANSWERS, settings)
    wrong = {("cooking" if name == "stem" else name): each for name, each in settings.items()}
    with pytest.raises(JudgeError, match="without settings: stem, settings without a question: cooking"):
        write_mt_bench(tmp_path, "toy", QUESTIONS, ANSWERS, wrong)
    short: Any = ("a",)
    with pytest.raises(JudgeError, match="question 90: turns are not two texts"):
        write_mt_bench(tmp_path, "toy", QUESTIONS, [MtBenchAnswer(90, short), *ANSWERS[1:]], settings)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("model_id", "plain"),
    [
        ("org/toy", "org-toy"),
        ("/models/toy/", "models-toy"),
        ("..", "my-model"),
        (".hidden", "hidden"),
        ("a\\b", "a-b"),
        ("a\nb", "a-b"),
        ("", "my-model"),
        ("  ", "my-model"),
        ("x" * 201, "x" * 50),
    ],
)
def test_model_ids_that_are_no_file_name_are_refused(tmp_path: Path, model_id: str, plain: str) -> None:
    """FastChat would write `model_answer/org/toy.jsonl`, and then look for `model_answer/*.jsonl` alone."""
    with pytest.raises(JudgeError, match=f"becomes a file name.*, such as {plain}$"):
        write_mt_bench(tmp_path, model_id, QUESTIONS, ANSWERS, mt_bench_settings(SETTINGS, QUESTIONS))
    assert files(tmp_path) == []


def test_model_id_that_is_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"converts it to 7. Give the model another name, such as model-007"):
        write_mt_bench(tmp_path, "007", QUESTIONS, ANSWERS, mt_bench_settings(SETTINGS, QUESTIONS))


def test_answers_of_fastchat_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "gpt-4.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(JudgeError, match="answers from elsewhere"):
        write_mt_bench(tmp_path, "gpt-4", QUESTIONS, ANSWERS, mt_bench_settings(SETTINGS, QUESTIONS))
    assert files(tmp_path) == ["gpt-4.jsonl"]
