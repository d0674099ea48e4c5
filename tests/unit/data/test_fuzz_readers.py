"""Whatever stands in an experiment file or in a row, it is read or refused in the way that is documented."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from orpo_ray.config import ConfigError, DataConfig, ExperimentConfig, as_given, load, parse, strict_yaml, sweep
from orpo_ray.data import parquet_size
from orpo_ray.data.rows import PROMPT_COLUMNS, BadRow, DataError, parse_row
from orpo_ray.data.sources import choose_splits
from orpo_ray.data.tokenizer import PairTokenizer

# One folder serves all examples of a test: each of them writes its file anew.
FAST = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

BASE = {
    "name": "a",
    "model": {"path": "tiny-llama-1m"},
    "data": {"path": "builtin://style-pairs"},
    "train": {"max_steps": 5},
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
SECTIONS = ("model", "data", "loss", "optim", "train", "deepspeed", "scaling", "tracking", "sweep")
SECTION_CLASSES = dict(
    zip(
        SECTIONS,
        (*(ExperimentConfig.model_fields[name].annotation for name in SECTIONS[:-1]), sweep.SweepConfig),
        strict=True,
    )
)
SETTINGS = sorted(
    {
        *ExperimentConfig.model_fields,
        *(f"{name}.{key}" for name, cls in SECTION_CLASSES.items() for key in cls.model_fields),
    }
)


def values(keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Lists and mappings of scalars, some levels deep."""
    return st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
    )


# ---- experiment files -----------------------------------------------------------------------------------------------


def refused_or_read_again(read: Callable[[], ExperimentConfig]) -> None:
    """A ConfigError that people can read, or a config whose dump is the same config."""
    refusal, config = None, None
    try:
        config = read()
    except ConfigError as error:
        refusal = str(error)
    if config is None:
        assert refusal
        assert len(refusal) < 20_000
        return
    assert parse(as_given(config.model_dump(mode="json"))) == config


@FAST
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_config_or_a_config_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(str(file))):  # none of them names a model
        load(file)
    file.write_bytes(yaml.safe_dump(BASE).encode() + content)
    refused_or_read_again(lambda: load(file))


@FAST
@given(
    st.lists(st.tuples(st.sampled_from(SETTINGS), values(st.text(max_size=8) | st.sampled_from(SETTINGS))), max_size=3)
)
def test_any_values_of_settings_are_a_config_or_a_config_error(changes: list[tuple[str, Any]]) -> None:
    tree = json.loads(json.dumps(BASE))
    for setting, value in changes:
        *parents, leaf = setting.split(".")
        node = tree
        for parent in parents:
            node = node[parent] if isinstance(node.get(parent), dict) else node.setdefault(parent, {})
            if not isinstance(node, dict):
                return
        node[leaf] = value
    refused_or_read_again(lambda: parse(tree))


@FAST
@given(st.sampled_from(SETTINGS) | st.text(max_size=20), st.text(max_size=30))
def test_any_override_is_applied_or_refused(setting: str, text: str) -> None:
    refused_or_read_again(lambda: parse(dict(BASE), [f"{setting}={text}"]))
    assert BASE["model"] == {"path": "tiny-llama-1m"}, "what two sections may share was changed"


NUMBERS = {
    "optim.lr": st.floats(1e-9, 1.0),
    "optim.beta1": st.floats(0, 0.99),
    "loss.orpo_lambda": st.floats(0, 10),
    "train.seed": st.integers(0, 2**31),
}
AXES = st.dictionaries(
    st.sampled_from(sorted(NUMBERS)), st.sampled_from(["grid", "choice", "uniform"]), min_size=1, max_size=3
)


@FAST
@given(AXES, st.data())
def test_what_is_written_as_yaml_is_read_as_the_same(tmp_path: Path, axes: dict[str, str], data: st.DataObject) -> None:
    space: dict[str, Any] = {}
    for name, kind in axes.items():
        drawn = data.draw(st.lists(NUMBERS[name], min_size=2, max_size=4, unique=True))
        if kind == "uniform" and name != "train.seed":
            space[name] = {"type": kind, "low": min(drawn), "high": max(drawn)}
        else:
            space[name] = {"type": "grid", "values": drawn}
    settings_of_it = {"optim": {"lr": data.draw(NUMBERS["optim.lr"])}, "sweep": {"space": space}}
    config = parse(json.loads(json.dumps(BASE | settings_of_it)))
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(as_given(config.model_dump(mode="json"))), encoding="utf-8")
    assert load(file) == config


@FAST
@given(values(st.text(max_size=8)))
def test_yaml_that_is_plain_is_read_as_it_was_written(value: Any) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    with suppress(strict_yaml.NotPlain):
        strict_yaml.require_plain(value)
        assert repr(strict_yaml.read(text)) == repr(yaml.safe_load(text))


# ---- rows -----------------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=12) | st.sampled_from(
    ["\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:", "\ud83d", "\0"]
)
TURNS = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "system"]) | SCALARS, "content": TEXTS | SCALARS}
)
CELLS = TEXTS | st.lists(TURNS, max_size=3) | values(st.text(max_size=4))
ROWS = st.dictionaries(
    st.sampled_from(["chosen", "rejected", *PROMPT_COLUMNS, "input", "system", "other"]), CELLS
) | values(st.text(max_size=8))


def pair_or_bad_row(row: object) -> bool:
    """Whether the row holds a pair; then one that tokenizers take."""
    pair, reason, detail = None, "", ""
    try:
        pair = parse_row(row)
    except BadRow as bad:
        reason, detail = bad.reason, bad.detail
    if pair is None:
        assert reason in {"malformed", "prompt_mismatch", "empty_chosen", "empty_rejected", "identical"}
        assert len(detail) < 1000
        return False
    assert pair.prompt
    for text in (pair.chosen, pair.rejected, *(part for turn in pair.prompt for part in turn.values())):
        assert isinstance(text, str)
        assert "\0" not in text.encode().decode()
    assert pair.chosen.strip() != pair.rejected.strip()
    assert pair.chosen.strip()
    assert pair.rejected.strip()
    return True


@settings(FAST, max_examples=300)
@given(ROWS)
def test_any_row_is_a_pair_or_a_bad_row(row: object) -> None:
    pair_or_bad_row(row)


@FAST
@given(st.lists(ROWS, min_size=1, max_size=4))
def test_any_json_lines_are_read_row_by_row(tmp_path: Path, rows: list[object]) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    split, _ = choose_splits(DataConfig(path=str(file)))
    if isinstance(rows[0], list):  # a file that begins with a bracket is one array
        with suppress(DataError):
            list(split.read())
    else:
        found = list(split.read())
        assert [pair_id for pair_id, _ in found] == [f"x.jsonl:{n}" for n in range(1, len(rows) + 1)]
        assert [pair_or_bad_row(row) for _, row in found] == [pair_or_bad_row(row) for row in rows]


@FAST
@given(st.binary(max_size=100), st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.jsonl.gz", "x.csv.gz"]))
def test_any_bytes_are_rows_or_a_data_error(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    refusal = f"{tmp_path / name}"
    try:
        for _, row in choose_splits(DataConfig(path=str(tmp_path / name)))[0].read():
            pair_or_bad_row(row)
    except DataError as error:
        refusal = str(error)
    assert refusal.startswith(str(tmp_path / name))


@FAST
@given(
    st.lists(st.fixed_dictionaries({"chosen": st.text(max_size=200), "rejected": st.text(max_size=5)}), min_size=1),
    st.sampled_from(["none", "snappy", "zstd", "gzip"]),
    st.sampled_from(["1.0", "2.0"]),
    st.booleans(),
    st.integers(1, 20),
)
def test_parquet_is_as_large_inside_as_its_writer_says(
    tmp_path: Path, rows: list[dict[str, str]], compression: str, version: str, use_dictionary: bool, group: int
) -> None:
    file = tmp_path / "x.parquet"
    options = {"compression": compression, "data_page_version": version, "use_dictionary": use_dictionary}
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=group, data_page_size=64, **options)
    metadata = pq.ParquetFile(file).metadata
    said = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    inside = parquet_size.inflated_bytes(file)
    texts = len({row["chosen"] for row in rows}) if use_dictionary else len(rows)
    assert 4 * texts <= inside < said  # which counts the pages' headers as well
    assert [row for _, row in choose_splits(DataConfig(path=str(file)))[0].read()] == rows


def test_the_pages_of_a_file_without_compression_are_its_bytes(tmp_path: Path) -> None:
    file, buffer = tmp_path / "x.parquet", io.BytesIO()
    pq.write_table(pa.table({"chosen": ["x" * 10_000]}), buffer, compression="none", use_dictionary=False)
    file.write_bytes(buffer.getvalue())
    # A page of one value: its definition level (length, run, value) and the text behind its length.
    assert parquet_size.inflated_bytes(file) == 4 + 2 + 4 + 10_000


PIECES = st.lists(st.sampled_from(["</s>", "<s>", "<pad>", "<|user|>", " ", "\n", "x", "</s", ">"]), max_size=12)


@FAST
@given(PIECES.map("".join))
def test_the_end_of_a_turn_is_what_a_regular_expression_finds(tokenizer: PreTrainedTokenizerBase, answer: str) -> None:
    tokens = PairTokenizer(DataConfig(path="x"), tokenizer)
    ends = "|".join(map(re.escape, tokens.ends))
    found = re.search(rf"(?P<end>{ends})(?:\s*(?:{ends}))*\s*\Z", answer)
    assert tokens._turn_end(answer) == ((len(answer), None) if found is None else (found.start(), found["end"]))
