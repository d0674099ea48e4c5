"""Sampling settings, answers and questions that the tests of external judges share."""

from __future__ import annotations

from pathlib import Path

from orpo_ray.reproduction.alpaca_eval import AlpacaAnswer
from orpo_ray.reproduction.external_judges import GenerationSettings, template_digest
from orpo_ray.reproduction.mt_bench import MtBenchAnswer, MtBenchQuestion

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
