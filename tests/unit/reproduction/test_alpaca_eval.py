"""Answers as alpaca_eval reads them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from orpo_ray.reproduction.alpaca_eval import AlpacaAnswer, write_alpaca_config, write_alpaca_eval
from orpo_ray.reproduction.external_judges import (
    GenerationSettings,
    JudgeError,
    read_settings,
)
from tests.support.judges import ALPACA, SETTINGS, files


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
    with pytest.raises(JudgeError, match=r"each instruction must be unique; 1 occur more than once, e.g. 'Which"):
        write_alpaca_eval(tmp_path, "toy", [*ALPACA, AlpacaAnswer("koala", "Which?", "That.")], SETTINGS)
    with pytest.raises(JudgeError, match="must have a name"):
        write_alpaca_eval(tmp_path, " ", ALPACA, SETTINGS)
    nothing: Any = None
    with pytest.raises(JudgeError, match="must be text; one is None"):
        write_alpaca_eval(tmp_path, "toy", [*ALPACA, AlpacaAnswer("d", "a", nothing)], SETTINGS)
    with pytest.raises(JudgeError, match="unpaired surrogate at character 1"):
        write_alpaca_eval(tmp_path, "toy", [AlpacaAnswer("d", "a", "x\ud800")], SETTINGS)
    assert files(tmp_path) == []


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
    with pytest.raises(JudgeError, match="belongs to another model than toy2"):
        write_alpaca_config(tmp_path, "toy2", "{instruction}", SETTINGS)
    assert (tmp_path / "prompt.txt").read_text(encoding="utf-8") == "{instruction} "
