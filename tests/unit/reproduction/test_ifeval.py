"""IFEval by lm-evaluation-harness's own checkers."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.reproduction.external_judges import JudgeError
from orpo_ray.reproduction.ifeval import EXTRA, IfevalScore, Share, ifeval_command, ifeval_score


def test_ifeval_command(tmp_path: Path) -> None:
    model = tmp_path / "a model"
    with pytest.raises(JudgeError, match=r"has no config.json"):
        ifeval_command(model, tmp_path, "float32")
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    assert ifeval_command(model, tmp_path / "out", "float32") == [
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
        "--tasks",
        "ifeval",
        "--apply_chat_template",
        "--batch_size",
        "1",
        "--output_path",
        str(tmp_path / "out"),
        "--log_samples",
    ]
    fast = ifeval_command(model, tmp_path / "out", "bfloat16", backend="vllm", batch_size="auto")
    assert fast[2] == "vllm"
    assert fast[fast.index("--batch_size") + 1] == "auto"
    odd = tmp_path / "a,b"
    model.rename(odd)
    with pytest.raises(JudgeError, match=r"splits --model_args at ,: rename"):
        ifeval_command(odd, tmp_path, "float32")


def test_ifeval_without_rows_or_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JudgeError, match="no rows to score"):
        ifeval_score([])
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(JudgeError, match=r"nltk is not installed: pip install 'orpo-ray\[judges\]', or 'lm-eval"):
        ifeval_score([{}])


@pytest.fixture
def punkt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NLTK's data, as if untrained: it knows no abbreviations."""
    for name in ("nltk", "langdetect", "immutabledict", "lm_eval"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs IFEval's checkers, and {name} is not installed: pip install '{EXTRA}'")
    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (folder / name).touch()
    monkeypatch.setattr(importlib.import_module("nltk").data, "path", [str(tmp_path / "nltk_data")])


def ifeval(response: str, *instructions: tuple[str, dict[str, Any]], prompt: str = "Do it.") -> dict[str, Any]:
    """As the hub's rows are: every argument there is, None where the instruction has none."""
    kwargs = [{"num_words": None, "keywords": None} | given for _, given in instructions]
    ids = [id_ for id_, _ in instructions]
    return {"key": 1, "prompt": prompt, "instruction_id_list": ids, "kwargs": kwargs, "response": response}


FIVE = [
    # Followed: both.
    ifeval(
        "There is no such mark here and these are more than ten words",
        ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 10}),
    ),
    # Followed: the first of two; a comma is there, and 3 sentences are fewer than 4.
    ifeval(
        "One, two. Three! Four?",
        ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 4}),
        ("punctuation:no_comma", {}),
    ),
    # Followed loosely: without its first line it is JSON.
    ifeval('Here it is:\n{"a": 1}', ("detectable_format:json_format", {})),
    # Not followed: the letter q is there once, wanted twice; and the phrase is not at the end.
    ifeval(
        "A quick answer. Bye now",
        ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "at least"}),
        ("startend:end_checker", {"end_phrase": "Bye."}),
    ),
    # Nothing follows nothing.
    ifeval("  \n", ("punctuation:no_comma", {})),
]


@pytest.mark.usefixtures("punkt")
def test_ifeval_scores_five_rows() -> None:
    state = random.getstate()
    score = ifeval_score(FIVE)
    assert score == IfevalScore(
        prompt_strict=Share(1, 5),
        prompt_loose=Share(2, 5),
        inst_strict=Share(3, 8),
        inst_loose=Share(4, 8),
        drawn=(),
        lm_eval=importlib.metadata.version("lm_eval"),
    )
    assert score.inst_strict.value == 0.375
    assert random.getstate() == state
    assert importlib.import_module("langdetect").DetectorFactory.seed is None


@pytest.mark.usefixtures("punkt")
def test_ifeval_score_is_that_of_lm_evals_task() -> None:
    """`process_results` and `agg_inst_level_acc` are what the task itself calls."""
    score = ifeval_score(FIVE)
    task = importlib.import_module("lm_eval.tasks.ifeval.utils")
    results = [task.process_results(row, [row["response"]]) for row in FIVE]
    assert score.prompt_strict.value == sum(result["prompt_level_strict_acc"] for result in results) / 5
    assert score.prompt_loose.value == sum(result["prompt_level_loose_acc"] for result in results) / 5
    for share, name in ((score.inst_strict, "strict"), (score.inst_loose, "loose")):
        assert share.value == task.agg_inst_level_acc([result[f"inst_level_{name}_acc"] for result in results])


@pytest.mark.usefixtures("punkt")
def test_ifeval_says_where_a_checker_checks_something_else() -> None:
    """Row 1122 of google/IFEval asks for `#`; lm-eval checks a random letter in its place."""
    letter = {"letter": "#", "let_frequency": 4, "let_relation": "at least"}
    rows = [FIVE[0], ifeval("#a #b #c #d", ("punctuation:no_comma", {}), ("keywords:letter_frequency", letter))]
    scores = [ifeval_score(rows) for _ in range(20)]
    assert scores[0].drawn == ((1, "keywords:letter_frequency"),)
    assert set(scores) == {scores[0]}
    zero = {"letter": "Q ", "let_frequency": 0, "let_relation": "at least"}
    assert ifeval_score([ifeval("x", ("keywords:letter_frequency", zero))]).drawn
    kept = {"keywords": ["Zebra ", "apple"]}
    assert ifeval_score([ifeval("x", ("keywords:existence", kept))]).drawn == ()


@pytest.mark.usefixtures("punkt")
@pytest.mark.parametrize(
    ("change", "law"),
    [
        ({"response": None}, "row 1: response must be text, but is None"),
        ({"prompt": 3}, "row 1: prompt must be text"),
        ({"instruction_id_list": [], "kwargs": []}, "lists of the same length, 1 or more"),
        ({"kwargs": []}, "lists of the same length"),
        ({"kwargs": "{}"}, "lists of the same length"),
        ({"kwargs": ["{}"]}, "each of kwargs must be a dict"),
        ({"instruction_id_list": ["keywords:rhyme"]}, "no checker 'keywords:rhyme'; it has change_case:"),
        ({"instruction_id_list": [["keywords:existence"]]}, r"no checker \['keywords:existence'\]"),
        ({"kwargs": [{}]}, "length_constraints:number_words needs num_words, relation"),
        ({"kwargs": [None]}, "length_constraints:number_words needs num_words, relation"),
        ({"kwargs": [{"num_words": 5, "relation": "around"}]}, "number_words refuses .*around"),
        ({"kwargs": [{"num_words": 5, "relation": "at least", "more": 1}]}, "number_words refuses .*more"),
    ],
)
def test_ifeval_refuses_rows_that_are_none(change: dict[str, Any], law: str) -> None:
    good = ifeval("x", ("length_constraints:number_words", {"relation": "at least", "num_words": 1}))
    assert ifeval_score([good, good]).prompt_strict == Share(2, 2)
    with pytest.raises(JudgeError, match=law):
        ifeval_score([good, good | change])
    with pytest.raises(JudgeError, match="row 1 has no response; its keys are key, prompt"):
        ifeval_score([good, {key: value for key, value in good.items() if key != "response"}])
    text: Any = "x"
    with pytest.raises(JudgeError, match="row 0 must be a dict"):
        ifeval_score([text])


@pytest.mark.usefixtures("punkt")
def test_ifeval_without_punkt_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("nltk").data, "path", [])
    with pytest.raises(JudgeError, match=r"python -m nltk.downloader punkt_tab"):
        ifeval_score(FIVE)


@pytest.mark.usefixtures("punkt")
def test_ifeval_command_is_one_of_lm_eval(tmp_path: Path) -> None:
    (tmp_path / "a model=1").mkdir()
    (tmp_path / "a model=1" / "config.json").write_text("{}", encoding="utf-8")
    command = ifeval_command(tmp_path / "a model=1", tmp_path / "out", "bfloat16", batch_size=8)
    parser = argparse.ArgumentParser()
    importlib.import_module("lm_eval._cli.run").Run(parser.add_subparsers())
    given = parser.parse_args(["run", *command[1:]])
    assert given.model == "hf"
    assert given.model_args == {"pretrained": str(tmp_path / "a model=1"), "dtype": "bfloat16"}
    assert given.tasks == ["ifeval"]
    assert given.apply_chat_template is True
    assert (given.batch_size, given.output_path, given.log_samples) == ("8", str(tmp_path / "out"), True)
