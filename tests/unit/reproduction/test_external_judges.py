"""Settings and files of answers that external judges share."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.reproduction.alpaca_eval import write_alpaca_config, write_alpaca_eval
from orpo_ray.reproduction.external_judges import (
    GenerationSettings,
    JudgeError,
    read_settings,
    settings_file,
    template_digest,
)
from orpo_ray.reproduction.mt_bench import (
    mt_bench_settings,
    write_mt_bench,
)
from tests.support.judges import ALPACA, ANSWERS, QUESTIONS, SETTINGS, files


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
        ({"backend": "vllm", "versions": {"vllm": None}}, "including that of vllm"),
    ],
)
def test_settings_that_no_sampler_takes_are_refused(change: dict[str, Any], law: str) -> None:
    with pytest.raises(JudgeError, match=law):
        replace(SETTINGS, **change)


def test_only_answers_of_the_same_model_are_replaced(tmp_path: Path) -> None:
    path = write_alpaca_eval(tmp_path, "toy", ALPACA, SETTINGS)
    write_alpaca_eval(tmp_path, "toy", ALPACA[:1], replace(SETTINGS, seed=4))
    assert len(json.loads(path.read_text(encoding="utf-8"))) == 1
    assert read_settings(path)["all"].seed == 4
    with pytest.raises(JudgeError, match=r"\(answers of toy\); only answers of other may be replaced"):
        write_alpaca_eval(tmp_path, "other", ALPACA, SETTINGS)
    settings_file(path).unlink()
    before = path.read_bytes()
    with pytest.raises(JudgeError, match="answers from elsewhere"):
        write_alpaca_eval(tmp_path, "toy", ALPACA, SETTINGS)
    assert path.read_bytes() == before


def test_folders_and_files_in_the_way_are_named(tmp_path: Path) -> None:
    (tmp_path / "a" / "model_outputs.json").mkdir(parents=True)
    with pytest.raises(JudgeError, match=r"model_outputs.json exists already \(a folder\)"):
        write_alpaca_eval(tmp_path / "a", "toy", ALPACA, SETTINGS)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(JudgeError, match=r"file is in the way"):
        write_alpaca_eval(tmp_path / "file", "toy", ALPACA, SETTINGS)
    (tmp_path / "b" / "configs.yaml").mkdir(parents=True)
    with pytest.raises(JudgeError, match=r"configs.yaml is in the way"):
        write_alpaca_config(tmp_path / "b", "toy", "{instruction}", SETTINGS)
    (tmp_path / "c" / "toy.jsonl").mkdir(parents=True)
    with pytest.raises(JudgeError, match=r"toy.jsonl exists already \(a folder\)"):
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
