import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo_ray.config import DataConfig, LossConfig
from orpo_ray.data.dataset import Pair, load_pairs
from orpo_ray.models.packing import LossMask, collate, micro_batches


def make_pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    return Pair("test:1", *(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)), chosen_bytes=1)


PAIRS = [make_pair([5, 6], [7, 8], [9]), make_pair([4], [3], [2, 1, 2])]


def test_a_shared_row_by_hand() -> None:
    batch = collate(PAIRS, LossMask("prompt_and_response"), share_prompt=True, pad_token_id=99, multiple_of=4)
    assert batch.input_ids_RT.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2, 1, 2, 99, 99]]
    assert batch.position_ids_RT.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2, 3, 0, 0]]
    assert batch.attention_mask_RT is None
    assert batch.layout is not None
    assert batch.layout.lengths == ((2, 2, 1), (1, 1, 3))
    assert batch.layout.pair_T.tolist() == [0] * 5 + [1] * 5 + [-1] * 2
    assert batch.layout.part_T.tolist() == [0, 0, 1, 1, 2, 0, 1, 2, 2, 2, -1, -1]
    # Both answers of a pair are predicted from the prompt's last token, first. There are 8 targets, a multiple already.
    assert batch.source_N.tolist() == [0, 1, 2, 1, 5, 5, 7, 8]
    assert batch.target_N.tolist() == [6, 7, 8, 9, 3, 2, 1, 2]
    third = 1 / 3
    expected = [
        [0, 0.5, 0.5, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, third, third, third],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
    ]
    torch.testing.assert_close(batch.weights_KN, torch.tensor(expected, dtype=torch.float32))
    assert batch.tokens_K.tolist() == [2, 1, 1, 3, 3, 1]


def test_targets_that_fill_up_count_nowhere() -> None:
    bare, filled = (
        collate(PAIRS, LossMask("prompt_and_response"), share_prompt=True, multiple_of=multiple) for multiple in (1, 5)
    )
    assert (bare.source_N.shape, filled.source_N.shape) == ((8,), (10,))
    assert filled.input_ids_RT.shape == (1, 10)
    for name in ("source_N", "target_N"):
        assert getattr(filled, name).tolist() == [*getattr(bare, name).tolist(), 0, 0]
    torch.testing.assert_close(filled.weights_KN[:, :8], bare.weights_KN)
    assert not filled.weights_KN[:, 8:].any()
    assert torch.equal(filled.tokens_K, bare.tokens_K)


def test_padded_rows_by_hand() -> None:
    batch = collate(PAIRS, LossMask("response"), share_prompt=False, pad_token_id=0)
    assert batch.input_ids_RT.tolist() == [[5, 6, 7, 8], [4, 3, 0, 0], [5, 6, 9, 0], [4, 2, 1, 2]]
    assert batch.attention_mask_RT is not None
    assert batch.attention_mask_RT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.layout is None
    assert batch.source_N.tolist() == [1, 2, 9, 4, 12, 13, 14]
    assert batch.target_N.tolist() == [7, 8, 9, 3, 2, 1, 2]
    assert batch.tokens_K.tolist() == [2, 1, 1, 3, 2, 1]


@pytest.mark.parametrize("share_prompt", [True, False])
def test_eos_and_answer_padding_by_hand(share_prompt: bool) -> None:
    counting = LossMask("prompt_and_response", nll_eos=False, answer_padding=True, eos_token_id=8)
    batch = collate(PAIRS[:1], counting, share_prompt=share_prompt)
    assert batch.target_N.tolist() == [6, 7, 8, 9, 8, 8]
    assert batch.weights_KN.bool().int().tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0]]
    flat = batch.input_ids_RT.flatten()
    assert flat[batch.source_N].tolist() == [5, 6, 7, 6, 8, 9]


def test_who_sees_whom() -> None:
    layout = collate(PAIRS, LossMask("response"), share_prompt=True, multiple_of=11).layout
    assert layout is not None
    sees = layout.sees_TT()
    rows = ["".join("x" if seen else "." for seen in row) for row in sees.tolist()]
    assert rows == [
        "x..........",  # prompt
        "xx.........",
        "xxx........",  # chosen
        "xxxx.......",
        "xx..x......",  # rejected: no chosen
        ".....x.....",  # the next pair
        ".....xx....",
        ".....x.x...",
        ".....x.xx..",
        ".....x.xxx.",
        "..........x",  # filling
    ]
    windowed = layout.sees_TT(window=2)
    assert windowed[4].tolist() == [False, True, False, False, True] + [False] * 6  # position 2 sees 1 and itself
    assert torch.equal(layout.sees_TT(window=100), sees)


def test_batch_moves_as_a_whole() -> None:
    moved = collate(PAIRS, LossMask("response"), share_prompt=True).to(torch.device("meta"))
    assert moved.layout is not None
    tensors = [moved.input_ids_RT, moved.source_N, moved.weights_KN, moved.tokens_K, moved.layout.pair_T]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("preset", ["trl", "llamafactory", "authors"])
def test_counts_of_the_global_batch_are_those_of_its_micro_batches(
    preset: str, tokenizer: object, tmp_path: object
) -> None:
    data = DataConfig(path="builtin://style-pairs", train_pairs=32, eval_pairs=8, cache_dir=str(tmp_path))
    pairs, _ = load_pairs(data, tokenizer)
    counting = LossMask.of(LossConfig(preset=preset), tokenizer.eos_token_id)
    indices = np.arange(3, 17)
    batch = collate([pairs[int(i)] for i in indices], counting, share_prompt=True)
    assert counting.nll_tokens(pairs, indices) == int(batch.tokens_K[-len(indices) :].sum())


# ---- cutting a global batch ---------------------------------------------------------------------------------------

LENGTHS = st.lists(st.tuples(*(st.integers(1, 60),) * 3), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 5), st.none() | st.integers(1, 6), st.integers(20, 400), st.booleans())
def test_every_pair_goes_once_and_nothing_is_over_the_limits(
    lengths: list[tuple[int, int, int]], world: int, max_pairs: int | None, max_tokens: int, share_prompt: bool
) -> None:
    sizes = np.array(lengths)
    passes = micro_batches(sizes, world, max_pairs=max_pairs, max_tokens=max_tokens, share_prompt=share_prompt)
    assert all(len(ranks) == world for ranks in passes)
    everything = np.concatenate([pairs for ranks in passes for pairs in ranks])
    assert sorted(everything.tolist()) == list(range(len(lengths)))
    for pairs in itertools.chain(*passes):
        if len(pairs) > 1:
            prompt, chosen, rejected = sizes[pairs].T
            width = prompt + np.maximum(chosen, rejected)
            tokens = (prompt + chosen + rejected).sum() if share_prompt else 2 * len(pairs) * width.max()
            assert tokens <= max_tokens
            assert max_pairs is None or len(pairs) <= max_pairs
    # A rank idles only where there are fewer pairs than ranks in a round.
    assert sum(len(pairs) == 0 for pairs in itertools.chain(*passes)) < world


def test_ranks_do_equal_work_at_the_same_time() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, (64, 3))
    passes = micro_batches(lengths, 4, max_pairs=None, max_tokens=2048, share_prompt=True)
    loads = np.array([[lengths[pairs].sum() for pairs in ranks] for ranks in passes])
    assert len(passes) == 5  # 31,402 tokens: 4 × 4 × 2,048 would hold them only if pairs could be cut
    assert (loads.max(1) / loads.min(1)).max() < 1.06
    assert loads.max() / loads.min() < 1.15


def test_padded_micro_batches_are_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, (64, 3))
    passes = micro_batches(lengths, 2, max_pairs=None, max_tokens=4096, share_prompt=False)
    widths = [(lengths[p, 0] + lengths[p, 1:].max(1)) for p in itertools.chain(*passes)]
    assert sum(2 * len(w) * w.max() for w in widths) < 1.15 * sum(2 * w.sum() for w in widths)
    assert max(widths[0]) == max(w.max() for w in widths)  # what does not fit the memory fails in the first pass
