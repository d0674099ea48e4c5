"""Settings and answer files that external judges share; `alpaca_eval`, `mt_bench` and `ifeval` hold one judge each.

Nothing here calls an API. A judge that is itself a model (GPT-4) is run by the user with the judge's own command, which
the writers' docstrings and docs/judges.md name. Each file of answers comes with a second file, `*.settings.json`, which
records how the answers were sampled and the digest of the answer file.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from orpo_ray import provenance
from orpo_ray.errors import UserError
from orpo_ray.files import write_atomically

Backend = Literal["transformers", "vllm"]
Dtype = Literal["float32", "bfloat16", "float16"]

ALL = "all"
"""Key in a settings file: the settings of every answer in the file."""

_MAX_NAME_BYTES = 200
"""Longest model name. File names may have 255 bytes; the rest is for endings and the temporary name."""
_SHA256 = re.compile("[0-9a-f]{64}")


class JudgeError(UserError, RuntimeError):
    """A judge could not read the answers or files, or would misread them; the message says what to do."""


# ---- how answers were sampled --------------------------------------------------------------------------------------


def template_digest(template: str) -> str:
    """SHA-256 (hexadecimal) of a chat template's text, as UTF-8."""
    return hashlib.sha256(template.encode()).hexdigest()


def _versions() -> dict[str, str | None]:
    packages: dict[str, str | None] = dict(provenance.collect()["packages"])
    for name in ("tokenizers", "vllm"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return packages


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How answers were sampled. A change to any of these may change every answer.

    Create it in the process that samples: the package versions are read there.

    Raises:
        JudgeError: no sampler accepts a value.
    """

    model: str
    """Folder or hub name that the backend loaded."""
    backend: Backend
    dtype: Dtype
    """Type of the weights while sampling."""
    temperature: float
    """0 means greedy: the likeliest token each time."""
    top_p: float
    """In (0, 1]; 1 means that every token may be drawn."""
    max_new_tokens: int
    """Longer answers were cut at this length."""
    seed: int
    chat_template_sha256: str
    """`template_digest` of the template that rendered the prompts."""
    versions: Mapping[str, str | None] = field(default_factory=_versions)
    """Versions of the packages that sampled; None where a package was not installed."""

    def __post_init__(self) -> None:
        laws = {
            "model": (bool(self.model), "a folder or a hub name"),
            "backend": (self.backend in get_args(Backend), f"one of {', '.join(get_args(Backend))}"),
            "dtype": (self.dtype in get_args(Dtype), f"one of {', '.join(get_args(Dtype))}"),
            "temperature": (math.isfinite(self.temperature) and self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "seed": (self.seed >= 0, "0 or more"),
            "chat_template_sha256": (
                _SHA256.fullmatch(self.chat_template_sha256) is not None,
                "64 hexadecimal digits, as template_digest gives them",
            ),
            "versions": (
                self.versions.get(self.backend) is not None,
                f"the versions where the answers were sampled, including that of {self.backend}",
            ),
        }
        for name, (holds, law) in laws.items():
            if not holds:
                raise JudgeError(f"GenerationSettings.{name} must be {law}, and is {getattr(self, name)!r}")


def settings_file(answers: Path) -> Path:
    """Path of an answer file's settings: `model_outputs.json` -> `model_outputs.settings.json`."""
    return answers.with_suffix(".settings.json")


def read_settings(answers: Path) -> dict[str, GenerationSettings]:
    """How the answers in a file were sampled, keyed by MT-Bench category or by `ALL`.

    Raises:
        JudgeError: the file has no record, or the record is of other content.
    """
    record = _record(answers)
    if record is None or not answers.is_file():
        raise JudgeError(f"{settings_file(answers)} or {answers} is missing: write the answers again")
    if (digest := hashlib.sha256(answers.read_bytes()).hexdigest()) != record["sha256"]:
        raise JudgeError(
            f"{settings_file(answers)} was written for a file of SHA-256 {record['sha256']}, and {answers} has "
            f"{digest}: it was changed, or its writing was cut short. Write the answers again"
        )
    names = {each.name for each in fields(GenerationSettings)}
    if any(not isinstance(known, dict) or known.keys() != names for known in record["settings"].values()):
        raise JudgeError(f"{settings_file(answers)} does not hold exactly {', '.join(sorted(names))}: write it again")
    return {scope: GenerationSettings(**known) for scope, known in record["settings"].items()}


def _record(answers: Path) -> dict[str, Any] | None:
    """Record beside a file of answers; None if there is none that orpo_ray wrote."""
    try:
        record = json.loads(settings_file(answers).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(record, dict) and record.keys() == {"name", "answers", "sha256", "settings"}
    return record if is_ours and isinstance(record["settings"], dict) else None


# ---- files ---------------------------------------------------------------------------------------------------------


def write_answers(path: Path, text: str, name: str, answers: int, settings: Mapping[str, GenerationSettings]) -> Path:
    """Write answers and settings, each file atomically. Returns the answer file.

    Raises:
        JudgeError: `path` holds something other than answers of `name`, or cannot be written.
    """
    _require_ours(path, name)
    record = {
        "name": name,
        "answers": answers,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "settings": {scope: asdict(each) for scope, each in settings.items()},
    }
    # Settings first, so that answers never lack them; `read_settings` detects a crash in between by the digest.
    write_text(settings_file(path), json.dumps(record, indent=1) + "\n")
    return write_text(path, text)


def _require_ours(path: Path, name: str) -> None:
    if not path.exists():
        return
    there = _record(path)
    if there is None or there["name"] != name:
        whose = "a folder" if path.is_dir() else f"answers of {there['name']}" if there else "answers from elsewhere"
        raise JudgeError(f"{path} exists already ({whose}); only answers of {name} may be replaced: move it away")


def write_text(path: Path, text: str) -> Path:
    """Write a file atomically, creating its folder; JudgeError where something is in the way."""
    if path.is_dir() or (path.parent.exists() and not path.parent.is_dir()):
        raise JudgeError(f"{path} cannot be written: {path if path.is_dir() else path.parent} is in the way; move it")
    write_atomically(path, text)
    return path


def require_file_name(name: str) -> None:
    """Refuse a model name that cannot be a file name.

    FastChat opens `model_answer/<model_id>.jsonl` without escaping, so a slash would create a folder, which it does not
    search afterwards (`glob("*.jsonl")`, which skips hidden files too).

    Raises:
        JudgeError: the name is too long, blank, hidden, or has slashes or control characters.
    """
    require_unicode(name)
    is_long = len(name.encode()) > _MAX_NAME_BYTES
    if is_long or not name.strip() or name.startswith(".") or re.search(r"[/\\\x00-\x1f]", name):
        plain = re.sub(r"[/\\\x00-\x1f]+", "-", name).strip(".- ")[: _MAX_NAME_BYTES // 4]
        raise JudgeError(
            f"{name!r:.120} becomes a file name, so it must have 1 to {_MAX_NAME_BYTES} bytes, no slashes and no "
            f"leading dot, such as {plain or 'my-model'}"
        )


def require_unicode(*texts: Any) -> None:
    """Refuse values that are not text, or that UTF-8 cannot encode (JudgeError)."""
    for text in texts:
        if not isinstance(text, str):
            raise JudgeError(f"names, instructions and answers must be text; one is {text!r:.60}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise JudgeError(
                f"a text has an unpaired surrogate at character {error.start}, which UTF-8 cannot encode: "
                f"{text!r:.80}; decode the answer's tokens again"
            ) from None


def require_unique(what: str, values: Sequence[Any]) -> None:
    """Refuse repeated values; `what` names one of them (JudgeError)."""
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise JudgeError(f"each {what} must be unique; {len(twice)} occur more than once, e.g. {twice[0]!r:.80}")


def reads_as_number(text: str) -> bool:
    """Whether pandas' `read_json` would convert the text to a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
