import csv
import functools
import gzip
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from orpo_ray.config import DataConfig
from orpo_ray.data.dataset import PairDataset, batch_indices, load_pairs
from orpo_ray.data.rows import DataError
from orpo_ray.data.sources import _hub_splits
from orpo_ray.data.style_pairs import generate
from orpo_ray.data.tokenizer import ORPO_CHAT_TEMPLATE

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = [row[side] for row in generate(300, 1) for side in ("prompt", "chosen", "rejected")]


def byte_level_bpe(texts: list[str] = TEXTS) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def wrapped(tokenizer: Tokenizer, **more: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **more
    )


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    """No chat template, no BOS of its own."""
    return wrapped(byte_level_bpe())


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    """A template with a default system prompt and a newline behind the end-of-turn token, which is not EOS."""
    return wrapped(byte_level_bpe(), chat_template=CHATML)


@pytest.fixture(scope="module")
def adds_bos() -> PreTrainedTokenizerFast:
    tokenizer = byte_level_bpe()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(tokenizer)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DataConfig]:
    def make(path: Path | str, **more: object) -> DataConfig:
        fields = {"path": str(path), "cache_dir": str(tmp_path / "cache"), "eval_pairs": 1, **more}
        return DataConfig.model_validate(fields)

    return make


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def numbered(count: int, first: int = 0) -> list[dict[str, str]]:
    return [
        {"prompt": f"Question {i}?", "chosen": f"Good answer {i}.", "rejected": f"Bad answer {i}."}
        for i in range(first, first + count)
    ]


def ids_of(pairs: PairDataset) -> list[tuple[str, list[int], list[int], list[int], int]]:
    return [
        (
            p.pair_id.rsplit(":")[-1],
            p.prompt_ids.tolist(),
            p.chosen_ids.tolist(),
            p.rejected_ids.tolist(),
            p.chosen_bytes,
        )
        for p in (pairs[i] for i in range(len(pairs)))
    ]


def prompts_of(pairs: PairDataset) -> set[str]:
    return {pairs.prompt_text(i) for i in range(len(pairs))}


def assert_every_row_is_accounted_for(pairs: PairDataset) -> None:
    counts = pairs.counts
    dropped = sum(count for name, count in counts.items() if name.startswith("dropped_"))
    assert counts["rows"] == counts["pairs"] + dropped + counts["held_out"] + counts["left_out"]
    assert counts["pairs"] == len(pairs)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# ---- shapes -------------------------------------------------------------------------------------------------------

TALK = [turn("user", "Hi there"), turn("assistant", "Hello."), turn("user", "Where is Kiel?")]
HH = "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: Where is Kiel?\n\nAssistant: "
MULTI_TURN = {
    "HH-RLHF text": {"chosen": HH + "In the north.", "rejected": HH + "No idea."},
    "conversations": {
        "prompt": "Hi there",  # UltraFeedback repeats the first turn in a column
        "chosen": [*TALK, turn("assistant", "In the north.")],
        "rejected": [*TALK, turn("assistant", "No idea.")],
    },
    "prompt messages, answer messages": {
        "prompt": TALK,
        "chosen": [turn("assistant", "In the north.")],
        "rejected": [turn("assistant", "No idea.")],
    },
    "prompt messages, answer text": {"prompt": TALK, "chosen": "In the north.", "rejected": "No idea."},
    "HH-RLHF prompt, answer text": {"prompt": HH.rstrip(), "chosen": "In the north.", "rejected": "No idea."},
}


@pytest.mark.parametrize("shape", MULTI_TURN)
def test_multi_turn_shapes_become_the_same_tokens(
    shape: str, tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [MULTI_TURN[shape]])
    evaluation = write_jsonl(tmp_path / "eval.jsonl", numbered(1))
    train, _ = load_pairs(config(path, eval_path=str(evaluation)), plain)
    assert train.prompt_text(0) == (
        "<|user|>\nHi there</s>\n<|assistant|>\nHello.</s>\n<|user|>\nWhere is Kiel?</s>\n<|assistant|>\n"
    )
    assert plain.decode(train[0].prompt_ids) == train.prompt_text(0)
    assert plain.decode(train[0].chosen_ids) == "In the north.</s>"
    assert plain.decode(train[0].rejected_ids) == "No idea.</s>"
    assert train[0].chosen_bytes == len("In the north.")
    assert train[0].pair_id == "pairs.jsonl:1"


@pytest.mark.parametrize("column", ["prompt", "instruction", "question"])
def test_prompt_columns_input_and_system(
    column: str, tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    row = {column: "Add.", "input": "2 3", "system": "Be brief.", "chosen": "5", "rejected": "6"}
    path = write_jsonl(
        tmp_path / "pairs.jsonl", [row, {column: "Why?", "input": "", "chosen": "So.", "rejected": "No."}]
    )
    evaluation = write_jsonl(tmp_path / "eval.jsonl", numbered(1))
    train, _ = load_pairs(config(path, eval_path=str(evaluation)), plain)
    assert train.prompt_text(0) == "<|system|>\nBe brief.</s>\n<|user|>\nAdd.\n2 3</s>\n<|assistant|>\n"
    assert train.prompt_text(1) == "<|user|>\nWhy?</s>\n<|assistant|>\n"


def test_unknown_columns_are_named_with_the_accepted_shapes(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(
        DataError, match=r"pairs.jsonl:1: columns prompt, completion, label hold no pair\naccepted shapes"
    ):
        load_pairs(config(path), plain)
    path = write_jsonl(tmp_path / "bare.jsonl", [{"chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match=r"(?s)dropped_malformed 1\); the first, bare.jsonl:1: .*accepted shapes"):
        load_pairs(config(path), plain)


# ---- files and splits ---------------------------------------------------------------------------------------------


def write_as(suffix: str, path: Path, rows: list[dict[str, str]]) -> Path:
    path = path.with_name(path.name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix.startswith(".jsonl"):
        return write_jsonl(path, rows)
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".json.gz":
        path.write_bytes(gzip.compress(json.dumps(rows, indent=1).encode()))
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv"])
def test_every_format_gives_the_same_pairs(
    suffix: str, tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    rows = numbered(5)
    rows[0]["chosen"] = "Two\nlines, “quoted”."
    path = write_as(suffix, tmp_path / "pairs", rows)
    train, evaluation = load_pairs(config(path, eval_pairs=2), plain)
    both = sorted(ids_of(train) + ids_of(evaluation), key=lambda pair: int(pair[0]))
    assert len(train) == 3
    assert [size for *_, size in both] == [len(row["chosen"].encode()) for row in rows]
    assert [plain.decode(chosen) for _, _, chosen, _, _ in both] == [f"{row['chosen']}</s>" for row in rows]
    # A CSV's rows are counted by the line they begin on: the header is line 1, the first row takes two.
    assert [int(number) for number, *_ in both] == ([2, 4, 5, 6, 7] if suffix == ".csv" else [1, 2, 3, 4, 5])


def test_a_folder_with_named_splits(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "data"
    write_jsonl(folder / "train-00000-of-00002.jsonl", numbered(3))
    write_jsonl(folder / "train-00001-of-00002.jsonl.gz", numbered(2, first=3))
    write_as(".parquet", folder / "sub" / "test", numbered(4, first=10))
    train, evaluation = load_pairs(config(folder, eval_pairs=100), plain)
    assert [train[i].pair_id for i in (0, 4)] == ["train-00000-of-00002.jsonl:1", "train-00001-of-00002.jsonl.gz:2"]
    assert [evaluation[i].pair_id for i in range(4)] == [f"sub/test.parquet:{n}" for n in (1, 2, 3, 4)]
    swapped, _ = load_pairs(config(folder, train_split="test"), plain)
    assert swapped.counts["held_out"] == 1
    with pytest.raises(DataError, match=r"data.eval_split is 'dev', but the splits are test, train"):
        load_pairs(config(folder, eval_split="dev"), plain)
    with pytest.raises(DataError, match="both 'train'"):
        load_pairs(config(folder, eval_split="train"), plain)


def test_a_folder_without_named_splits_is_one(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "data"
    write_jsonl(folder / "monday.jsonl", numbered(3))
    write_jsonl(folder / "tuesday.jsonl", numbered(3, first=3))
    train, evaluation = load_pairs(config(folder, eval_pairs=2), plain)
    assert (len(train), len(evaluation)) == (4, 2)
    write_jsonl(tmp_path / "other" / "may.jsonl", numbered(3, first=10))
    write_jsonl(tmp_path / "other" / "june.jsonl", numbered(3, first=13))
    more = {"train_split": "monday", "eval_path": str(tmp_path / "other"), "eval_pairs": 9}
    _, elsewhere = load_pairs(config(folder, **more), plain)
    assert len(elsewhere) == 6
    only_monday, _ = load_pairs(config(folder, train_split="monday"), plain)
    assert {only_monday[i].pair_id.split(":")[0] for i in range(len(only_monday))} == {"monday.jsonl"}
    with pytest.raises(
        DataError, match=r"no split is named train_prefs or train; set data\.train_split to one of monday"
    ):
        load_pairs(config(folder, eval_split="tuesday"), plain)


def test_a_lone_test_file_is_trained_on_and_split(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    write_jsonl(tmp_path / "data" / "test.jsonl", numbered(6))
    train, evaluation = load_pairs(config(tmp_path / "data", eval_pairs=2), plain)
    assert (len(train), len(evaluation)) == (4, 2)


def test_sources_that_are_not_there(
    tmp_path: Path,
    config: Callable[..., DataConfig],
    plain: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"notes.txt: unknown format; use one of .jsonl"):
        load_pairs(config(tmp_path / "notes.txt"), plain)
    with pytest.raises(DataError, match=r"empty: no .jsonl, .* file in this folder"):
        load_pairs(config(tmp_path / "empty"), plain)
    with pytest.raises(
        DataError, match=r"no/such-pairs: no such file or folder here, and it cannot be loaded as a hub dataset"
    ):
        load_pairs(config("no/such-pairs"), plain)
    with pytest.raises(DataError, match=r"data.subset \('x'\) names a configuration of a hub dataset"):
        load_pairs(config(tmp_path / "empty", subset="x"), plain)


def test_hub_datasets_are_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub-cache")
    write_jsonl(tmp_path / "hub" / "train.jsonl", numbered(3))
    write_jsonl(tmp_path / "hub" / "test.jsonl", numbered(2, first=3))
    splits = _hub_splits(str(tmp_path / "hub"), None)  # datasets treats a folder as it does a hub repository
    assert set(splits) == {"train", "test"}
    assert [(pair_id.rsplit("/")[-1], row) for pair_id, row in splits["test"].read()] == [
        ("test:1", numbered(5)[3]),
        ("test:2", numbered(5)[4]),
    ]
    assert splits["train"].fingerprint() == _hub_splits(str(tmp_path / "hub"), None)["train"].fingerprint()
    assert splits["train"].fingerprint() != splits["test"].fingerprint()


def test_set_aside_pairs_follow_the_split_seed_alone(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", numbered(60))
    train, evaluation = load_pairs(config(path, eval_pairs=10), plain)
    fewer, same_evaluation = load_pairs(config(path, eval_pairs=10, train_pairs=20), plain)
    fewest, _ = load_pairs(config(path, eval_pairs=10, train_pairs=5), plain)
    _, other_evaluation = load_pairs(config(path, eval_pairs=10, split_seed=1), plain)
    assert (len(train), len(fewer), len(fewest), len(evaluation)) == (50, 20, 5, 10)
    assert ids_of(evaluation) == ids_of(same_evaluation)
    assert ids_of(evaluation) != ids_of(other_evaluation)
    assert prompts_of(fewest) < prompts_of(fewer) < prompts_of(train)
    assert not prompts_of(train) & prompts_of(evaluation)
    assert (fewer.counts["held_out"], fewer.counts["left_out"]) == (10, 30)
    for pairs in (train, fewer, fewest, evaluation):
        assert_every_row_is_accounted_for(pairs)
    with pytest.raises(DataError, match=r"data.eval_pairs \(60\) must be below the number of pairs \(60\)"):
        load_pairs(config(path, eval_pairs=60), plain)


def test_no_prompt_stands_in_both_sets(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    again = [row | {"rejected": "Worse."} for row in numbered(20)]
    path = write_jsonl(tmp_path / "pairs.jsonl", [*numbered(20), *again])
    train, evaluation = load_pairs(config(path, eval_pairs=6), plain)
    assert len(evaluation) == 6
    assert not prompts_of(train) & prompts_of(evaluation)
    assert train.counts["dropped_prompt_in_eval"] == 2 * len(prompts_of(evaluation)) - 6 > 0
    assert_every_row_is_accounted_for(train)

    held_out = write_jsonl(tmp_path / "held-out.jsonl", numbered(3))
    train, evaluation = load_pairs(config(path, eval_pairs=100, eval_path=str(held_out)), plain)
    assert (len(train), len(evaluation), train.counts["dropped_prompt_in_eval"]) == (34, 3, 6)
    assert_every_row_is_accounted_for(train)


def test_builtin_pairs(config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast) -> None:
    train, evaluation = load_pairs(config("builtin://style-pairs", eval_pairs=50, train_pairs=1200), plain)
    more, same = load_pairs(config("builtin://style-pairs", eval_pairs=50), plain)
    assert (len(train), len(evaluation), len(more)) == (1200, 50, 4096)
    assert prompts_of(same) == prompts_of(evaluation)
    assert not prompts_of(more) & prompts_of(evaluation)
    assert evaluation[0].pair_id == "style-pairs:1"
    assert train[0].pair_id == "style-pairs:51"


# ---- template and tokens ------------------------------------------------------------------------------------------


def load_one(
    rows: list[object],
    tmp_path: Path,
    config: Callable[..., DataConfig],
    tokenizer: PreTrainedTokenizerFast,
    **more: object,
) -> PairDataset:
    """The rows as training pairs, with some other pairs held out."""
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    evaluation = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "?", "chosen": "a", "rejected": "b"}])
    return load_pairs(config(path, eval_path=str(evaluation), **more), tokenizer)[0]


PAIR = {"prompt": "Hi", "chosen": "Yo you", "rejected": "No"}


def test_the_authors_template_is_the_default(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    train = load_one([PAIR], tmp_path, config, plain)
    assert train.prompt_text(0) == "<|user|>\nHi</s>\n<|assistant|>\n"
    whole = plain.apply_chat_template(
        [turn("user", "Hi"), turn("assistant", "Yo you")], chat_template=ORPO_CHAT_TEMPLATE, tokenize=False
    )
    assert whole == "<|user|>\nHi</s>\n<|assistant|>\nYo you</s>\n"
    answer = plain("Yo you</s>", add_special_tokens=False)["input_ids"]
    assert train[0].chosen_ids.tolist() == answer
    assert train[0].chosen_ids.dtype == np.int32
    assert [*train[0].prompt_ids, *train[0].chosen_ids] == plain(whole.rstrip("\n"), add_special_tokens=False)[
        "input_ids"
    ]


def test_a_template_with_a_default_system_prompt_and_a_newline_after_the_end(
    tmp_path: Path, config: Callable[..., DataConfig], chatml: PreTrainedTokenizerFast
) -> None:
    train = load_one([PAIR, PAIR | {"system": "Be rude."}], tmp_path, config, chatml)
    header = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert [train.prompt_text(i) for i in (0, 1)] == [header.format("Be kind."), header.format("Be rude.")]
    for side in (train[0].chosen_ids, train[0].rejected_ids):
        end = chatml.convert_tokens_to_ids("<|im_end|>")
        assert side[-1] == end
        assert (side == end).sum() == 1
    assert chatml.decode(train[0].chosen_ids) == "Yo you<|im_end|>"
    assert train[0].chosen_bytes == len("Yo you")


@pytest.mark.parametrize(
    ("behind_the_answer", "answer"),
    [
        ("</s>", "Yo you</s>"),
        ("<|im_end|>\n</s>\n", "Yo you<|im_end|>"),
        ("\n", "Yo you</s>"),
        (" </s></s>", "Yo you </s>"),
    ],
)
def test_an_answer_ends_in_exactly_one_end_token(
    behind_the_answer: str,
    answer: str,
    tmp_path: Path,
    config: Callable[..., DataConfig],
    plain: PreTrainedTokenizerFast,
) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        f"{{% if m['role'] == 'assistant' %}}{{{{ {behind_the_answer!r} }}}}{{% else %}}{{{{ '\\n' }}}}{{% endif %}}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    train = load_one([PAIR], tmp_path, config, plain, chat_template=template)
    assert train.prompt_text(0) == "user: Hi\nassistant: "
    assert plain.decode(train[0].chosen_ids) == answer
    assert train.counts["answers_without_template"] == 0


def test_a_template_that_changes_what_stands_before_the_answer(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    template = ORPO_CHAT_TEMPLATE.replace("<|assistant|>\n' }}{% endif", "<|assistant|>\n<think>\n' }}{% endif")
    assert template != ORPO_CHAT_TEMPLATE
    train = load_one([PAIR], tmp_path, config, plain, chat_template=template)
    assert train.prompt_text(0).endswith("<|assistant|>\n<think>\n")
    assert plain.decode(train[0].chosen_ids) == "Yo you</s>"
    assert train.counts["answers_without_template"] == 2


def test_rows_that_the_template_refuses(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + ORPO_CHAT_TEMPLATE
    )
    rows: list[object] = [PAIR | {"system": "Be brief."}, PAIR]
    train = load_one(rows, tmp_path, config, plain, chat_template=template)
    assert (len(train), train.counts["dropped_template_error"]) == (1, 1)
    assert_every_row_is_accounted_for(train)
    with pytest.raises(DataError, match=r"pairs.jsonl:1: the chat template refuses it: no system"):
        load_one(rows, tmp_path, config, plain, chat_template=template, on_bad_rows="error")


def test_bos_stands_there_once(
    tmp_path: Path,
    config: Callable[..., DataConfig],
    plain: PreTrainedTokenizerFast,
    adds_bos: PreTrainedTokenizerFast,
) -> None:
    def count(tokenizer: PreTrainedTokenizerFast, **more: object) -> int:
        pair = load_one([PAIR], tmp_path, config, tokenizer, **more)[0]
        assert 1 not in pair.chosen_ids
        return int((pair.prompt_ids == 1).sum())

    assert count(plain) == 0
    assert count(adds_bos) == 1
    assert count(adds_bos, chat_template="{{ bos_token }}" + ORPO_CHAT_TEMPLATE) == 1


def test_answers_are_tokenised_as_they_follow_the_prompt(tmp_path: Path, config: Callable[..., DataConfig]) -> None:
    """A SentencePiece-like tokenizer puts a space before text that stands alone, not inside a conversation."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    model.decoder = decoders.Metaspace()
    model.train_from_iterator(
        [*TEXTS, "<|user|>\n"], trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer = wrapped(model)
    train = load_one([PAIR], tmp_path, config, tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(train[0].chosen_ids)
    assert "".join(pieces) == "Yo▁you</s>"


def test_an_answer_that_begins_with_a_newline_keeps_the_prompt_apart(
    tmp_path: Path, config: Callable[..., DataConfig]
) -> None:
    tokenizer = wrapped(byte_level_bpe([*TEXTS, *["a\n\n"] * 50]))
    assert len(tokenizer("\n\n", add_special_tokens=False)["input_ids"]) == 1
    train = load_one([PAIR | {"chosen": "\n\nYou"}], tmp_path, config, tokenizer)
    assert tokenizer.decode(train[0].chosen_ids) == "\n\nYou</s>"
    assert tokenizer.decode(train[0].prompt_ids).endswith("<|assistant|>\n")


# ---- cuts ---------------------------------------------------------------------------------------------------------


def test_long_prompts_are_dropped_or_cut_from_the_left(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast, adds_bos: PreTrainedTokenizerFast
) -> None:
    rows: list[object] = [PAIR, PAIR | {"prompt": "one two three " * 30}]
    dropped = load_one(rows, tmp_path, config, plain, max_prompt_tokens=40, max_tokens=60)
    assert (len(dropped), dropped.counts["dropped_long_prompt"]) == (1, 1)
    assert_every_row_is_accounted_for(dropped)
    more = {"max_prompt_tokens": 40, "max_tokens": 60, "long_prompts": "truncate"}
    cut = load_one(rows, tmp_path, config, plain, **more)
    whole = plain(cut.prompt_text(1), add_special_tokens=False)["input_ids"]
    assert cut.prompt_lengths_N.tolist() == [len(dropped[0].prompt_ids), 40]
    assert cut[1].prompt_ids.tolist() == whole[-40:]
    assert cut.counts["prompts_truncated"] == 1
    with_bos = load_one(rows, tmp_path, config, adds_bos, **more)
    assert with_bos[1].prompt_ids.tolist() == [1, *whole[-39:]]


def test_long_answers_are_cut_at_the_end_and_carry_no_eos(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    base = load_one([PAIR], tmp_path, config, plain)[0]
    prompt, chosen = len(base.prompt_ids), len(base.chosen_ids)

    exact = load_one([PAIR], tmp_path, config, plain, max_prompt_tokens=prompt, max_tokens=prompt + chosen)
    assert exact[0].chosen_ids.tolist() == base.chosen_ids.tolist()
    assert exact.counts["chosen_truncated"] == 0

    rows: list[object] = [PAIR | {"rejected": "Nothing " * 20}]
    cut = load_one(rows, tmp_path, config, plain, max_prompt_tokens=prompt, max_tokens=prompt + 2)
    assert cut[0].chosen_ids.tolist() == base.chosen_ids[:2].tolist()
    assert 2 not in cut[0].chosen_ids
    assert (cut.counts["chosen_truncated"], cut.counts["rejected_truncated"]) == (1, 1)
    assert cut[0].chosen_bytes == len(plain.decode(base.chosen_ids[:2])) < len("Yo you")

    least = load_one(rows, tmp_path, config, plain, max_prompt_tokens=prompt, max_tokens=prompt + 1)
    assert (least.chosen_lengths_N.tolist(), least.rejected_lengths_N.tolist()) == ([1], [1])


def test_pairs_that_a_cut_made_identical_are_dropped(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    prompt = len(load_one([PAIR], tmp_path, config, plain)[0].prompt_ids)
    rows: list[object] = [PAIR, PAIR | {"chosen": "same " * 30 + "a", "rejected": "same " * 30 + "b"}]
    train = load_one(rows, tmp_path, config, plain, max_prompt_tokens=prompt, max_tokens=prompt + 12)
    assert (len(train), train.counts["dropped_identical_after_cut"]) == (1, 1)
    assert_every_row_is_accounted_for(train)


def test_nothing_left_is_an_error(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=r"no pair is left for train \(rows 1, dropped_long_prompt 1\)"):
        load_one([PAIR], tmp_path, config, plain, max_prompt_tokens=5, max_tokens=60)
    assert not list((tmp_path / "cache" / "pairs").glob(".writing-*"))


# ---- bad rows -----------------------------------------------------------------------------------------------------

BAD_ROWS: dict[str, object] = {
    "dropped_empty_chosen": PAIR | {"chosen": " \n"},
    "dropped_empty_rejected": PAIR | {"rejected": ""},
    "dropped_identical": PAIR | {"rejected": "Yo you "},
    "dropped_prompt_mismatch": {
        "chosen": "\n\nHuman: a\n\nAssistant: b",
        "rejected": "\n\nHuman: other\n\nAssistant: c",
    },
    "dropped_malformed": "not json\n",
}
MALFORMED: list[object] = [
    "[1, 2]\n",
    "\n{\n",
    {"prompt": "Hi", "chosen": None, "rejected": "No"},
    {"prompt": "Hi", "chosen": "Yo"},
    {"chosen": "Yo", "rejected": "No"},
    {"prompt": "Hi", "chosen": [{"role": "assistant"}], "rejected": "No"},
    {"prompt": "Hi", "chosen": [turn("user", "Yo")], "rejected": "No"},
    {"chosen": [turn("assistant", "Yo")], "rejected": [turn("assistant", "No")]},
    {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a\n\nAssistant: b"},
    {"chosen": [], "rejected": []},
    {"prompt": 3, "chosen": "Yo", "rejected": "No"},
]


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_rows_are_counted_or_refused_with_their_line(
    reason: str, tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    rows = [PAIR, "\n", BAD_ROWS[reason], PAIR | {"prompt": "Ho"}]
    train = load_one(rows, tmp_path, config, plain)
    assert [train[i].pair_id for i in range(len(train))] == ["pairs.jsonl:1", "pairs.jsonl:4"]
    assert {name: count for name, count in train.counts.items() if count} == {"rows": 3, "pairs": 2, reason: 1}
    with pytest.raises(DataError, match=r"^pairs.jsonl:3: .*fix the row, or set data.on_bad_rows: drop$"):
        load_one(rows, tmp_path, config, plain, on_bad_rows="error")


@pytest.mark.parametrize("row", MALFORMED, ids=str)
def test_malformed_rows(
    row: object, tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    train = load_one([PAIR, row], tmp_path, config, plain)
    assert (len(train), train.counts["dropped_malformed"]) == (1, 1)


# ---- cache --------------------------------------------------------------------------------------------------------


def cached(tmp_path: Path) -> dict[str, int]:
    folder = tmp_path / "cache" / "pairs"
    return {path.name: (path / "train.arrow").stat().st_mtime_ns for path in folder.iterdir() if path.is_dir()}


def test_the_second_load_reads_what_the_first_wrote(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", numbered(2500))
    first, _ = load_pairs(config(path), plain)
    before = cached(tmp_path)
    plain(["a", "bb"], padding=True, truncation=True, max_length=7)  # leaves its mark in the backend
    (tmp_path / "moved").mkdir()
    again, _ = load_pairs(config(path.rename(tmp_path / "moved" / "pairs.jsonl")), plain)
    assert len(before) == 1
    assert cached(tmp_path) == before
    assert (again.digest, again.counts, ids_of(again)) == (first.digest, first.counts, ids_of(first))
    assert len(again) == 2499


def test_whatever_changes_the_tokens_changes_the_cache(
    tmp_path: Path,
    config: Callable[..., DataConfig],
    plain: PreTrainedTokenizerFast,
    chatml: PreTrainedTokenizerFast,
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", numbered(5))
    digests = [load_pairs(config(path), plain)[0].digest]
    for tokenizer, more in ((plain, {"split_seed": 3}), (chatml, {}), (plain, {"chat_template": CHATML})):
        digests.append(load_pairs(config(path, **more), tokenizer)[0].digest)
    path.write_text(path.read_text().replace("Good", "Fine"))
    digests.append(load_pairs(config(path), plain)[0].digest)
    shorter = load_pairs(config(path, max_tokens=512, max_prompt_tokens=100), plain)[0]
    assert len(cached(tmp_path)) == 5  # chatml is plain with a template: the third and the fourth share an entry
    assert shorter.digest == digests[-1]  # other limits, but nothing was cut: the same content
    # The same pairs under the same template are the same content, whichever way the template came.
    assert digests[2] == digests[3]
    assert len(set(digests)) == 4


def digest_of(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> str:
    return load_pairs(config, tokenizer)[0].digest


def test_processes_that_load_at_once_write_once(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", numbered(3000))
    load = functools.partial(digest_of, config(path))
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as processes:
        digests = set(processes.map(load, [plain] * 4))
    assert digests == {load_pairs(config(path), plain)[0].digest}
    assert len(cached(tmp_path)) == 1
    assert not list((tmp_path / "cache" / "pairs").glob(".writing-*"))


def test_the_cache_can_be_deleted(
    tmp_path: Path, config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", numbered(5))
    first, _ = load_pairs(config(path), plain)
    shutil.rmtree(tmp_path / "cache")
    assert load_pairs(config(path), plain)[0].digest == first.digest


# ---- batches ------------------------------------------------------------------------------------------------------


@given(num_pairs=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_every_epoch_holds_every_pair_once(num_pairs: int, batch_size: int, seed: int) -> None:
    steps = -(-3 * num_pairs // batch_size)
    stream = np.concatenate([batch_indices(step, num_pairs, batch_size, seed) for step in range(1, steps + 1)])
    assert len(stream) == steps * batch_size
    for epoch in range(3):
        assert sorted(stream[epoch * num_pairs : (epoch + 1) * num_pairs]) == list(range(num_pairs))


def test_batches_do_not_depend_on_how_they_are_cut_or_when_they_are_asked_for() -> None:
    whole = batch_indices(1, 100, 60, seed=5)
    assert whole.shape == (60,)
    assert np.concatenate([batch_indices(step, 100, 20, seed=5) for step in (1, 2, 3)]).tolist() == whole.tolist()
    late = batch_indices(1000, 100, 60, seed=5)
    batch_indices(3, 100, 60, seed=5)
    assert batch_indices(1000, 100, 60, seed=5).tolist() == late.tolist()
    assert batch_indices(1, 100, 60, seed=6).tolist() != whole.tolist()
    epochs = batch_indices(1, 50, 100, seed=0)
    assert epochs[:50].tolist() != epochs[50:].tolist()
    with pytest.raises(ValueError, match=r"step \(0\)"):
        batch_indices(0, 100, 60, seed=5)


# ---- real data ----------------------------------------------------------------------------------------------------


def test_hh_rlhf_as_published(config: Callable[..., DataConfig], plain: PreTrainedTokenizerFast) -> None:
    shared = Path(os.environ.get("ORPO_RAY_SHARED", Path(__file__).parents[4] / "shared"))
    path = shared / "data" / "hh-rlhf-harmless-base-test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set ORPO_RAY_SHARED to the folder that holds data/{path.name}")
    limits = {"max_tokens": 8192, "max_prompt_tokens": 8000}
    train, evaluation = load_pairs(config(path, eval_pairs=200, **limits), plain)
    assert train.counts["rows"] == 2312
    dropped = {name: count for name, count in train.counts.items() if name.startswith("dropped_") and count}
    twins = dropped.pop("dropped_prompt_in_eval", 0)
    assert dropped == {"dropped_empty_chosen": 4, "dropped_prompt_mismatch": 5}
    assert len(train) + len(evaluation) + twins == 2303
    assert not prompts_of(train) & prompts_of(evaluation)
    assert_every_row_is_accounted_for(train)
    assert all(pair.chosen_ids[-1] == plain.eos_token_id for pair in (train[i] for i in range(len(train))))


def test_pairs_without_a_prompt_are_dropped(
    config: Callable[..., DataConfig], tmp_path: Path, plain: PreTrainedTokenizerFast
) -> None:
    answers_only = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    data = config(str(write_jsonl(tmp_path / "rows.jsonl", numbered(4))), chat_template=answers_only)
    with pytest.raises(DataError, match="dropped_empty_prompt"):
        load_pairs(data, plain)
