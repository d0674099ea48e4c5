"""Pairs and a small Llama for the tests of models."""

import numpy as np
import pytest
from transformers import (
    LlamaForCausalLM,
)

from orpo_ray.data.dataset import Pair
from tests.support.architectures import LENGTHS, SHARING, VOCABULARY, build


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    # Padding (0) is among the real tokens: only the layout may tell them from padding.
    ids = [[rng.integers(0, VOCABULARY, n).astype(np.int32) for n in lengths] for lengths in LENGTHS]
    return [Pair(f"test:{i}", *parts, chosen_bytes=1) for i, parts in enumerate(ids)]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return build(SHARING["llama"])
