"""Answers as external judges read them: AlpacaEval, MT-Bench, IFEval."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from orpo_ray.reproduction import external_judges
from orpo_ray.reproduction.external_judges import (
    AlpacaAnswer,
    GenerationSettings,
    JudgeError,
    MtBenchAnswer,
    MtBenchQuestion,
    mt_bench_settings,
    read_mt_bench_questions,
    read_settings,
    settings_file,
    template_digest,
    write_alpaca_config,
    write_alpaca_eval,
    write_mt_bench,
)

VERSIONS = {"transformers": "5.23.0", "torch": "2.13.0", "vllm": "0.20.0"}
SETTINGS = GenerationSettings(
    model="/models/toy",
    backend="transformers",
    dtype="bfloat16",
    temperature=0.7,
    top_p=0.9,
    max_new_tokens=512,
    seed=3,
    chat_template_sha256=template_digest("{{ messages }}"),
    versions=VERSIONS,
)
ODD = 'Ünïcödé 😀 \u2028 "quoted"\\n\nsecond line\r\n\ttab \x00'
ALPACA = [
    AlpacaAnswer("helpful_base", "Which?", "This."),
    AlpacaAnswer("koala", ODD, ODD),
    AlpacaAnswer("oasst", "Say nothing.", ""),
]
QUESTIONS = [
    MtBenchQuestion(82, "math", ("1 + 1?", "And once more?")),
    MtBenchQuestion(81, "writing", ("Write.", "Again.")),
    MtBenchQuestion(90, "stem", (ODD, "Why?")),
]
ANSWERS = [MtBenchAnswer(90, (ODD, "")), MtBenchAnswer(81, ("a", "b")), MtBenchAnswer(82, ("2", "3"))]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- settings ------------------------------------------------------------------------------------------------------


def test_settings_know_the_versions_of_this_process() -> None:
    known = asdict(SETTINGS)
    del known["versions"]
    made = GenerationSettings(**known)
    assert made.versions["transformers"] == importlib.metadata.version("transformers")
    assert made.versions["torch"] == importlib.metadata.version("torch")
    assert {"tokenizers", "vllm"} <= made.versions.keys()


def test_template_digest_is_of_its_utf_8() -> None:
    assert template_digest("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert template_digest("λ") != template_digest("l")


@pytest.mark.parametrize(
    ("change", "law"),
    [
        ({"model": ""}, "model must be a folder"),
        ({"backend": "jax"}, "backend must be one of transformers, vllm"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be more than 0"),
        ({"top_p": 1.1}, "top_p must be more than 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1"),
        ({"seed": -1}, "seed must be 0"),
        ({"chat_template_sha256": "{{ messages }}"}, "must be 64 hexadecimal digits"),
        ({"backend": "vllm", "versions": {"vllm": None}}, "that of vllm among them"),
    ],
)
def test_settings_that_no_sampler_takes_are_refused(change: dict[str, Any], law: str) -> None:
    with pytest.raises(JudgeError, match=law):
        replace(SETTINGS, **change)


# ---- AlpacaEval ----------------------------------------------------------------------------------------------------


def test_alpaca_file_is_what_was_given(tmp_path: Path) -> None:
    path = write_alpaca_eval(tmp_path / "new" / "toy", "toy", ALPACA, SETTINGS)
    assert files(path.parent) == ["model_outputs.json", "model_outputs.settings.json"]
    rows = json.loads(path.read_text(encoding="ascii"))
    assert [list(row) for row in rows] == [["dataset", "instruction", "output", "generator"]] * 3
    assert rows == [asdict(answer) | {"generator": "toy"} for answer in ALPACA]
    assert read_settings(path) == {"all": SETTINGS}


def test_pandas_reads_the_alpaca_file_as_alpaca_eval_does(tmp_path: Path) -> None:
    """`pd.read_json(path)` is how alpaca_eval loads it; single numbers among the answers stay text."""
    answers = [*ALPACA, AlpacaAnswer("vicuna", "7 * 6?", "42")]
    frame = pd.read_json(write_alpaca_eval(tmp_path, "toy-1.5b", answers, SETTINGS))
    assert frame.to_dict("records") == [asdict(answer) | {"generator": "toy-1.5b"} for answer in answers]


@pytest.mark.parametrize("name", ["007", "1e5", "nan", " 12 ", "1_000", "inf"])
def test_alpaca_generator_that_pandas_makes_a_number_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(JudgeError, match=r"generator is a number in all 3 rows.*another name"):
        write_alpaca_eval(tmp_path, name, ALPACA, SETTINGS)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"generator": name}]), encoding="utf-8")
    assert pd.read_json(rows)["generator"].tolist() != [name]
    assert files(tmp_path) == ["rows.json"]


def test_alpaca_answers_that_are_all_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="output is a number in all 2 rows"):
        write_alpaca_eval(tmp_path, "toy", [AlpacaAnswer("d", "a", "1"), AlpacaAnswer("d", "b", "2.5")], SETTINGS)


def test_alpaca_refuses_what_cannot_be_judged(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="there are no answers"):
        write_alpaca_eval(tmp_path, "toy", [], SETTINGS)
    with pytest.raises(JudgeError, match=r"each instruction may be there once; 1 are there more often, e.g. 'Which"):
        write_alpaca_eval(tmp_path, "toy", [*ALPACA, AlpacaAnswer("koala", "Which?", "That.")], SETTINGS)
    with pytest.raises(JudgeError, match="must have a name"):
        write_alpaca_eval(tmp_path, " ", ALPACA, SETTINGS)
    nothing: Any = None
    with pytest.raises(JudgeError, match="must be text, and one is None"):
        write_alpaca_eval(tmp_path, "toy", [*ALPACA, AlpacaAnswer("d", "a", nothing)], SETTINGS)
    with pytest.raises(JudgeError, match="half a surrogate pair at character 1"):
        write_alpaca_eval(tmp_path, "toy", [AlpacaAnswer("d", "a", "x\ud800")], SETTINGS)
    assert files(tmp_path) == []


def test_only_answers_of_the_same_model_are_replaced(tmp_path: Path) -> None:
    path = write_alpaca_eval(tmp_path, "toy", ALPACA, SETTINGS)
    write_alpaca_eval(tmp_path, "toy", ALPACA[:1], replace(SETTINGS, seed=4))
    assert len(json.loads(path.read_text(encoding="utf-8"))) == 1
    assert read_settings(path)["all"].seed == 4
    with pytest.raises(JudgeError, match=r"answers of toy, and only answers of other may be replaced"):
        write_alpaca_eval(tmp_path, "other", ALPACA, SETTINGS)
    settings_file(path).unlink()
    before = path.read_bytes()
    with pytest.raises(JudgeError, match="answers from elsewhere"):
        write_alpaca_eval(tmp_path, "toy", ALPACA, SETTINGS)
    assert path.read_bytes() == before


def test_folders_and_files_in_the_way_are_named(tmp_path: Path) -> None:
    (tmp_path / "a" / "model_outputs.json").mkdir(parents=True)
    with pytest.raises(JudgeError, match=r"model_outputs.json is there already, a folder"):
        write_alpaca_eval(tmp_path / "a", "toy", ALPACA, SETTINGS)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(JudgeError, match=r"file is in its place"):
        write_alpaca_eval(tmp_path / "file", "toy", ALPACA, SETTINGS)
    (tmp_path / "b" / "configs.yaml").mkdir(parents=True)
    with pytest.raises(JudgeError, match=r"configs.yaml is in its place"):
        write_alpaca_config(tmp_path / "b", "toy", "{instruction}", SETTINGS)
    (tmp_path / "c" / "toy.jsonl").mkdir(parents=True)
    with pytest.raises(JudgeError, match=r"toy.jsonl is there already, a folder"):
        write_mt_bench(tmp_path / "c", "toy", QUESTIONS, ANSWERS, mt_bench_settings(SETTINGS, QUESTIONS))
    assert files(tmp_path / "c") == ["toy.jsonl"]


def test_settings_of_other_answers_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_alpaca_eval(tmp_path, "toy", ALPACA, SETTINGS)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(JudgeError, match="was written for a file of SHA-256"):
        read_settings(path)
    write_alpaca_eval(tmp_path, "toy", ALPACA, SETTINGS)

    # Killed between the two files: the new settings stand beside the old answers.
    replaced = os.replace

    def dies(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise KeyboardInterrupt
        replaced(source, target)

    monkeypatch.setattr(os, "replace", dies)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_alpaca_eval(tmp_path, "toy", ALPACA[:2], SETTINGS)
    monkeypatch.undo()
    assert path.read_bytes() == before
    with pytest.raises(JudgeError, match=r"cut short. Write the answers again"):
        read_settings(path)
    write_alpaca_eval(tmp_path, "toy", ALPACA[:2], SETTINGS)
    assert read_settings(path) == {"all": SETTINGS}

    path.unlink()
    with pytest.raises(JudgeError, match="is missing"):
        read_settings(path)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"name": "toy"}', "\x00", '{"name":1,"answers":1,"sha256":"","settings":[]}']
)
def test_settings_file_that_is_none_of_ours(tmp_path: Path, content: str) -> None:
    path = write_alpaca_eval(tmp_path, "toy", ALPACA, SETTINGS)
    settings_file(path).write_text(content, encoding="utf-8")
    with pytest.raises(JudgeError, match="is missing: write the answers again"):
        read_settings(path)


def test_settings_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = write_alpaca_eval(tmp_path, "toy", ALPACA, SETTINGS)
    record = json.loads(settings_file(path).read_text(encoding="utf-8"))
    del record["settings"]["all"]["seed"]
    settings_file(path).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(JudgeError, match=r"does not hold exactly backend, .*, versions"):
        read_settings(path)


@pytest.mark.parametrize(
    ("settings", "function", "kwargs"),
    [
        (
            SETTINGS,
            "huggingface_local_completions",
            {
                "model_name": "/models/toy",
                "model_kwargs": {"torch_dtype": "bfloat16"},
                "max_new_tokens": 512,
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.9,
            },
        ),
        (
            replace(SETTINGS, temperature=0.0),
            "huggingface_local_completions",
            {
                "model_name": "/models/toy",
                "model_kwargs": {"torch_dtype": "bfloat16"},
                "max_new_tokens": 512,
                "do_sample": False,
            },
        ),
        (
            replace(SETTINGS, backend="vllm"),
            "vllm_local_completions",
            {
                "model_name": "/models/toy",
                "model_kwargs": {"dtype": "bfloat16"},
                "max_new_tokens": 512,
                "temperature": 0.7,
                "top_p": 0.9,
                "seed": 3,
            },
        ),
    ],
)
def test_alpaca_config(tmp_path: Path, settings: GenerationSettings, function: str, kwargs: dict[str, Any]) -> None:
    prompt = "<|user|>\n{instruction}</s>\n<|assistant|>\n"
    path = write_alpaca_config(tmp_path, "toy", prompt, settings)
    assert files(tmp_path) == ["configs.yaml", "prompt.txt"]
    assert (tmp_path / "prompt.txt").read_bytes().decode() == prompt
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == {
        "toy": {
            "prompt_template": "toy/prompt.txt",
            "fn_completions": function,
            "completions_kwargs": kwargs,
            "pretty_name": "toy",
        }
    }


def test_alpaca_config_refuses(tmp_path: Path) -> None:
    for prompt in ("no place", "{instruction} {instruction}", "{instruction} {input}"):
        with pytest.raises(JudgeError, match=r"must have {instruction} in it once"):
            write_alpaca_config(tmp_path, "toy", prompt, SETTINGS)
    with pytest.raises(JudgeError, match="such as org-toy"):
        write_alpaca_config(tmp_path, "org/toy", "{instruction}", SETTINGS)
    write_alpaca_config(tmp_path, "toy", "{instruction}", SETTINGS)
    write_alpaca_config(tmp_path, "toy", "{instruction} ", SETTINGS)
    with pytest.raises(JudgeError, match="is of another model than toy2"):
        write_alpaca_config(tmp_path, "toy2", "{instruction}", SETTINGS)
    assert (tmp_path / "prompt.txt").read_text(encoding="utf-8") == "{instruction} "


# ---- MT-Bench ------------------------------------------------------------------------------------------------------


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
        ([row(), row(82), row(81)], "each question_id may be there once; 1 are there more often, e.g. 81"),
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
    monkeypatch.setattr(external_judges.time, "time", lambda: 1700000000.5)
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
    assert (
        {replace(each, temperature=0.7) for each in settings.values() if not isinstance(each, int)} if False else True
    )
    assert all(replace(each, temperature=0.7) == SETTINGS for each in settings.values())


def test_mt_bench_wants_one_answer_to_each_question(tmp_path: Path) -> None:
    settings = mt_bench_settings(SETTINGS, QUESTIONS)
    with pytest.raises(JudgeError, match="there are no answers; MT-Bench needs one to each of 3 questions"):
        write_mt_bench(tmp_path, "toy", QUESTIONS, [], settings)
    with pytest.raises(JudgeError, match="without an answer: 82, answers without a question: none"):
        write_mt_bench(tmp_path, "toy", QUESTIONS, ANSWERS[:2], settings)
    with pytest.raises(JudgeError, match="without an answer: none, answers without a question: 5"):
        write_mt_bench(tmp_path, "toy", QUESTIONS, [*ANSWERS, MtBenchAnswer(5, ("a", "b"))], settings)
    with pytest.raises(JudgeError, match=r"question_id may be there once; 1 are there more often, e.g. 81"):
        write_mt_bench(tmp_path, "toy", QUESTIONS, [*ANSWERS, MtBenchAnswer(81, ("a", "b"))], settings)
    with pytest.raises(JudgeError, match="question_id may be there once"):
        write_mt_bench(tmp_path, "toy", [*QUESTIONS, QUESTIONS[0]], ANSWERS, settings)
    wrong = {("cooking" if name == "stem" else name): each for name, each in settings.items()}
    with pytest.raises(JudgeError, match="without settings: stem, settings without a question: cooking"):
        write_mt_bench(tmp_path, "toy", QUESTIONS, ANSWERS, wrong)
    short: Any = ("a",)
    with pytest.raises(JudgeError, match="question 90: not two texts"):
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
    with pytest.raises(JudgeError, match=f"becomes a file's name.*; such as {plain}$"):
        write_mt_bench(tmp_path, model_id, QUESTIONS, ANSWERS, mt_bench_settings(SETTINGS, QUESTIONS))
    assert files(tmp_path) == []


def test_model_id_that_is_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"makes 7 of it. Give the model another name, such as model-007"):
        write_mt_bench(tmp_path, "007", QUESTIONS, ANSWERS, mt_bench_settings(SETTINGS, QUESTIONS))


def test_answers_of_fastchat_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "gpt-4.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(JudgeError, match="answers from elsewhere"):
        write_mt_bench(tmp_path, "gpt-4", QUESTIONS, ANSWERS, mt_bench_settings(SETTINGS, QUESTIONS))
    assert files(tmp_path) == ["gpt-4.jsonl"]
