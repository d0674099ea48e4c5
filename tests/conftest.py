"""Fixtures shared by all tests. Nothing here or in a test reaches a network."""

import copy
import os
import signal
import sys
from collections.abc import Callable, Sequence

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
# As workers do: to another ninja their compiled ops would be out of date, and ours to theirs; a minute each.
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")

import pytest
import scipy.linalg  # noqa: F401 (it brings a BLAS beside numpy's)
import torch
from threadpoolctl import threadpool_limits
from transformers import PreTrainedTokenizerBase

from orpo_ray.config import DataConfig, ModelConfig
from orpo_ray.data.dataset import Pair, load_pairs
from orpo_ray.models.loading import load_tokenizer
from orpo_ray.models.packing import NllScope
from tests.support.pair_sources import sources_of_pairs

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell script starts its background jobs so, and they hand it on: Ctrl-C would not reach processes under test.
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Threads of BLAS that wait for a busy core spin: with two tests at a time, seconds of work would take minutes.
threadpool_limits(limits=1)

NaiveLogps = Callable[[torch.nn.Module, Sequence[Pair], NllScope], dict[str, torch.Tensor]]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The presets' tokenizer: byte-level, 1,024 tokens, BOS, EOS and padding."""
    return load_tokenizer(ModelConfig(path="tiny-llama-1m"))


@pytest.fixture(scope="module", params=sources_of_pairs().items(), ids=lambda source: source[0])
def real_pairs(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> list[Pair]:
    """Eight pairs of unlike lengths, of each source that is at hand; a test's id names the source."""
    _, path = request.param
    cache = str(tmp_path_factory.mktemp("pairs"))
    # More than are taken: pairs with long prompts are dropped.
    lengths = {"max_tokens": 256, "max_prompt_tokens": 192}
    train, _ = load_pairs(DataConfig(path=path, train_pairs=64, eval_pairs=8, cache_dir=cache, **lengths), tokenizer)
    return [train[index] for index in range(8)]


@pytest.fixture(scope="session")
def naive_logps() -> NaiveLogps:
    """The definition of `PairLogps`, spelled out: fp64, one sequence at a time, no padding, no mask."""

    def token_logps(model: torch.nn.Module, ids: list[int]) -> list[float]:
        """log p of every token but the first."""
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0].double()
        logps_TV = logits_TV.log_softmax(-1)
        return [logps_TV[t, token].item() for t, token in enumerate(ids[1:])]

    @torch.no_grad()
    def compute(model: torch.nn.Module, pairs: Sequence[Pair], scope: NllScope) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(model).double().eval()
        columns: dict[str, list[float]] = {"chosen": [], "rejected": [], "nll_sums": [], "nll_tokens": []}
        for pair in pairs:
            for side, answer in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
                logps = token_logps(model, [*pair.prompt_ids.tolist(), *answer.tolist()])
                answer_logps = logps[-len(answer) :]
                columns[side].append(sum(answer_logps) / len(answer))
                if side == "chosen":
                    counted = logps if scope == "prompt_and_response" else answer_logps
                    columns["nll_sums"].append(-sum(counted))
                    columns["nll_tokens"].append(len(counted))
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}

    return compute
