"""Hostile experiment files and overrides."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from orpo_ray.config import load
from tests.support.hostile.case import Case, Feed, Make

_GOOD = "name: a\nmodel: {path: tiny-llama-1m}\ndata: {path: 'builtin://style-pairs'}\ntrain: {max_steps: 5}\n"


def _experiment(more: str | bytes = "", *overrides: str, instead: bool = False) -> Make:
    """A good experiment file with something added to it, or put in its place."""

    def make(folder: Path) -> Feed:
        added = more.replace("FOLDER", str(folder)).encode() if isinstance(more, str) else more
        (folder / "x.yaml").write_bytes(added if instead else _GOOD.encode() + added)
        given = [override.replace("FOLDER", str(folder)) for override in overrides]
        return lambda: load(folder / "x.yaml", given)

    return make


def _laughs() -> str:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    return "\n".join(lines)


def _grids(axes: Iterable[str]) -> str:
    values = ", ".join(f"0.{digit}" for digit in range(1, 10))
    return "sweep:\n  space:\n" + "".join(f"    {axis}: {{type: grid, values: [{values}]}}\n" for axis in axes)


def _device_as_experiment(folder: Path) -> Feed:
    (folder / "x.yaml").symlink_to("/dev/zero")
    return lambda: load(folder / "x.yaml")


def _tracking_password(folder: Path) -> Feed:
    (folder / "x.yaml").write_text(_GOOD + "tracking: {uri: 'http://me:hunter2@mlflow:5000'}\n")

    def feed() -> str:
        config = load(folder / "x.yaml")
        assert config.tracking.uri == "http://me:hunter2@mlflow:5000"
        written = config.model_dump_json()
        assert "hunter2" not in written
        return f"used, and written down without it: {json.loads(written)['tracking']['uri']}"

    return feed


def _shared_by_alias(folder: Path) -> Feed:
    (folder / "x.yaml").write_text("name: a\nmodel: &m {path: one}\ndata: *m\ntrain: {max_steps: 5}\n")

    def feed() -> str:
        config = load(folder / "x.yaml", ["model.path=two"])
        return f"changes the one that is named: model {config.model.path}, data {config.data.path}"

    return feed


_EXPERIMENTS = [
    (
        "billion laughs: ten levels of nine aliases each",
        _experiment(_laughs()),
        "more than 50000 values, with aliases expanded",
    ),
    (
        "a long text used 300 times by alias",
        _experiment(f"x: &a {'x' * 200_000}\ny: [{', '.join(['*a'] * 300)}]\n"),
        "more than 2097152 characters, with aliases expanded",
    ),
    ("10,000 brackets within each other", _experiment("x: " + "[" * 10_000), "brackets within brackets, more than 32"),
    (
        "40 mappings within each other",
        _experiment("x:\n" + "".join("  " * n + "a:\n" for n in range(1, 41))),
        "more than 32 levels deep, on line",
    ),
    ("an alias that contains itself", _experiment("x: &a [*a]\n"), "does an alias contain itself?"),
    (
        "a list of merge keys, which grows like aliases",
        _experiment("x: &a {b: 1}\ny: {<<: [*a, *a]}\n"),
        "takes one alias here",
    ),
    (
        "`!!python/object/apply:os.system`",
        _experiment("x: !!python/object/apply:os.system ['touch FOLDER/ran']\n"),
        "tags create objects; remove it",
    ),
    ("the same key twice", _experiment("name: b\n"), "key 'name' occurs twice in one mapping, on line 5"),
    ("a NUL byte", _experiment(b"x: a\0b\n"), "not valid YAML: … special characters are not allowed"),
    (
        "a terminal's control sequence, escaped",
        _experiment('x: "\\e]0;gone\\a"\n'),
        "unprintable character U+001B",
    ),
    ("half of a surrogate pair, escaped", _experiment('x: "\\ud800"\n'), "unprintable character U+D800"),
    ("bytes that are not UTF-8", _experiment(b"x: \xff\xfe\n"), "not UTF-8 text"),
    ("2 MiB of it", _experiment("#" * (2 << 20)), "larger than 1 MiB, too large for an experiment file"),
    ("a number of 5,000 digits", _experiment("x: " + "9" * 5000 + "\n"), "a number of 5000 characters, on line 5"),
    (
        "a number of base 60 with 200,000 places",
        _experiment("x: 1" + ":1" * 200_000 + "\n"),
        "a number of 400001 characters, on line 5",
    ),
    ("an integer of 70 bits", _experiment(f"x: {2**70}\n"), "an integer needs more than 64 bits"),
    (
        "a learning rate that is not a number",
        _experiment("optim: {lr: .nan}\n"),
        "optim.lr: Input should be a finite number",
    ),
    ("an infinite learning rate", _experiment("optim: {lr: 1.0e+999}\n"), "optim.lr: Input should be a finite number"),
    (
        "`name: ../../etc`",
        _experiment(_GOOD.replace("name: a", "name: ../../etc"), instead=True),
        "name: String should match pattern",
    ),
    ("`output_dir` that is a file", _experiment("output_dir: FOLDER/x.yaml\n"), "exists but is not a directory"),
    ("a path of 100,000 characters", _experiment("", "data.path=" + "a" * 100_000), "neither a path nor a hub name"),
    (
        "20,000 unknown keys",
        _experiment("".join(f"k{n}x: 1\n" for n in range(20_000))),
        "20000 problem(s) … and 19950 more",
    ),
    (
        "a grid of 43 million cells",
        _experiment(
            _grids(f"optim.{name}" for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "warmup_ratio"))
            + _grids(["loss.orpo_lambda", "loss.temperature"]).partition("space:\n")[2]
        ),
        "43046721 trials … more than 100000",
    ),
    (
        "an override with a tag",
        _experiment("", "optim.lr=!!python/object/apply:os.system ['touch FOLDER/ran']"),
        "override … is not valid YAML: tag … tags create objects",
    ),
    ("an override of what is no setting", _experiment("", "model.__class__=x"), "model.__class__: unknown key"),
    (
        "an override below a value",
        _experiment("", "model.path.x=1"),
        "path is a value ('tiny-llama-1m'), not a section",
    ),
    ("a device in place of the file", _device_as_experiment, "x.yaml: not a file"),
    (
        "`storage` with credentials in its address",
        _experiment("storage: 's3://key:secret@bucket/orpo'\n"),
        "storage must not contain credentials",
    ),
]
_EXPERIMENTS_ACCEPTED = [
    ("`tracking.uri` with a password", _tracking_password, "used, and written down without it: http://mlflow:5000"),
    (
        "an override of a section that an alias shares",
        _shared_by_alias,
        "changes the one that is named: model two, data one",
    ),
]

CASES = [
    *(Case("Experiment file", what, make, "ConfigError", says) for what, make, says in _EXPERIMENTS),
    *(Case("Experiment file", what, make, None, says) for what, make, says in _EXPERIMENTS_ACCEPTED),
]
