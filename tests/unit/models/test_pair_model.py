"""The forward modes against each other and against the definition, for every kind of architecture."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from orpo_ray.data.dataset import Pair
from orpo_ray.models import precision
from orpo_ray.models.answers import Prompts
from orpo_ray.models.packing import LossMask, NllScope, collate
from orpo_ray.models.pair_model import ForwardMode, PairModel, pair_logps
from orpo_ray.models.probe import probe_forward_mode
from orpo_ray.training.loss import BatchCounts, orpo
from orpo_ray.training.metrics import PairSums
from tests.support.architectures import (
    GATED,
    LENGTHS,
    PADDING,
    SHARING,
    VOCABULARY,
    build,
    objective,
)
from tests.support.forwards import ALL, CHUNKED, FAST, FORMS, PLAIN, gradient, logps

SCOPES: list[NllScope] = ["prompt_and_response", "response"]


@pytest.mark.parametrize("architecture", SHARING)
def test_shared_prompt_equals_two_forwards(architecture: str, pairs: list[Pair]) -> None:
    """Loss and gradients of the fast form against the padded form with full logits and transformers' own masks."""
    model = build(SHARING[architecture])
    assert probe_forward_mode(model, "shared_prompt") == FAST
    loss = objective(model, pairs, FAST)
    found = gradient(model)
    model.set_attn_implementation("eager")  # the reference: its masks are spelled out, for windows too
    expected_loss = objective(model, pairs, PLAIN)
    expected = gradient(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_one_diverged_pair_does_not_blame_the_others(llama: LlamaForCausalLM, pairs: list[Pair]) -> None:
    model = copy.deepcopy(llama)
    only_here = VOCABULARY - 1
    parts = [[np.minimum(ids, only_here - 1) for ids in (p.prompt_ids, p.chosen_ids, p.rejected_ids)] for p in pairs]
    parts[0][1][0] = only_here
    with torch.no_grad():
        model.model.embed_tokens.weight[only_here] = torch.inf
    found = logps(model, [Pair("t:1", *ids, chosen_bytes=1) for ids in parts])
    assert not found.chosen_logps_P[0].isfinite()
    for means_P in (found.chosen_logps_P, found.rejected_logps_P, found.nll_sums_P):
        assert means_P[1:].isfinite().all()


def pretend(monkeypatch: pytest.MonkeyPatch, has_units: bool) -> None:
    """Make this CPU one with bf16 units, or without: either's kernels run on any."""
    monkeypatch.setattr(precision, "has_bf16_units", lambda: has_units)


@pytest.mark.parametrize("has_units", [False, True])
def test_bf16_is_within_its_rounding(has_units: bool, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Either form in bf16 is about as far from fp32 as the other."""
    pretend(monkeypatch, has_units)
    model = build(LlamaConfig(**{**GATED, "initializer_range": 0.1}))
    exact = objective(model, pairs, PLAIN)
    exact_gradient = gradient(model)
    errors = {}
    for name, form in FORMS.items():
        loss = objective(model, pairs, form, autocast=torch.bfloat16)
        found = gradient(model)
        errors[name] = (found - exact_gradient).norm() / exact_gradient.norm()
        torch.testing.assert_close(loss, exact, rtol=5e-3, atol=0)
    assert 0 < errors["shared"] < 2 * errors["plain"] < 0.1


@pytest.mark.parametrize("has_units", [False, True])
@pytest.mark.parametrize("architecture", [*SHARING, *PADDING])
def test_a_frozen_model_gives_the_same_bits(
    architecture: str, has_units: bool, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, has_units)
    model = build((SHARING | {name: config for name, (config, _) in PADDING.items()})[architecture])
    form = probe_forward_mode(model, "shared_prompt")
    frozen = PairModel(copy.deepcopy(model), form, torch.bfloat16).frozen()
    model = PairModel(model, form, torch.bfloat16).eval()
    prompts = Prompts.padded(
        [pair.prompt_ids for pair in pairs],
        pad_token_id=0,
        eos_token_id=2,
        max_new_tokens=8,
        in_step=False,
        temperature=1.0,
    )

    def read(mine: PairModel) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            return mine(mine.collate(pairs, ALL, 0)), mine(prompts)

    for found, expected in zip(read(frozen), read(model), strict=True):
        assert torch.equal(found, expected)
    # fp32 kernels take fp32 weights.
    expected_dtype = torch.bfloat16 if has_units else torch.float32
    assert frozen.lm.get_output_embeddings().weight.dtype is expected_dtype
    assert {m.weight.dtype for m in frozen.modules() if type(m) is torch.nn.Linear} == {expected_dtype}
    assert frozen.lm.get_input_embeddings().weight.dtype is torch.float32
    assert not any(p.requires_grad for p in frozen.parameters())


def test_rows_for_bf16_units_are_filled_up_and_nothing_else(
    llama: LlamaForCausalLM, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, has_units=False)
    assert PairModel(copy.deepcopy(llama), FAST, torch.bfloat16).collate(pairs, ALL, 0).input_ids_RT.shape[1] == 93
    pretend(monkeypatch, has_units=True)
    filled = PairModel(copy.deepcopy(llama), FAST, torch.bfloat16).collate(pairs, ALL, 0)
    exact = PairModel(copy.deepcopy(llama), FAST)
    bare = exact.collate(pairs, ALL, 0)
    assert bare.input_ids_RT.shape[1] == sum(map(sum, LENGTHS)) == 93
    assert filled.input_ids_RT.shape[1] == filled.source_N.shape[0] == 128
    # In fp32, for which rounding is small, and with all gradients.
    sums, gradients = [], []
    for batch in (bare, filled):
        sums.append(exact(batch))
        sums[-1].sum().backward()
        gradients.append(gradient(exact))
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5 * gradients[0].abs().max().item())


def test_passes_of_many_lengths_need_few_bf16_kernels(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is compiled for each shape, which takes time and memory (`precision.BLOCK`)."""
    pretend(monkeypatch, has_units=True)
    model, shapes = PairModel(copy.deepcopy(llama), FAST, torch.bfloat16), set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tensors = [a for a in args if isinstance(a, torch.Tensor) and a.dtype is torch.bfloat16]
            assert "attention" not in str(func) or not tensors, "each pair of lengths would need a kernel"
            if len(tensors) >= 2 and "mm" in str(func):
                shapes.add((str(func), *(tuple(t.shape) for t in tensors)))
            return func(*args, **(kwargs or {}))

    rng = np.random.default_rng(0)
    found = []
    for lengths in ((20, 10, 12), (19, 9, 3), (5, 30, 22), (7, 2, 28)):  # up to 64 tokens, up to 64 targets
        pair = Pair("p", *(rng.integers(1, VOCABULARY, n).astype(np.int32) for n in lengths), chosen_bytes=1)
        with Products():
            model(model.collate([pair], ALL, 0)).sum().backward()
        found.append(len(shapes))
    assert found == [found[0]] * 4
    assert found[0] > 10  # they were seen at all


def test_a_diverged_first_pair_is_the_only_one_where_rows_are_filled_up(
    llama: LlamaForCausalLM, pairs: list[Pair]
) -> None:
    """Targets that fill up read the first pair's first token."""
    model, only_here = copy.deepcopy(llama), VOCABULARY - 1
    parts = [[np.minimum(ids, only_here - 1) for ids in (p.prompt_ids, p.chosen_ids, p.rejected_ids)] for p in pairs]
    parts[0][0][0] = only_here
    with torch.no_grad():
        model.model.embed_tokens.weight[only_here] = torch.inf
    batch = collate([Pair("t", *ids, chosen_bytes=1) for ids in parts], ALL, share_prompt=True, multiple_of=64)
    finite_KP = PairModel(model, FAST)(batch).isfinite().reshape(3, len(pairs))
    assert not finite_KP[:, 0].any()
    assert finite_KP[:, 1:].all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", SCOPES)
def test_equals_the_definition_sequence_by_sequence(
    llama: LlamaForCausalLM,
    pairs: list[Pair],
    naive_logps: Callable[..., dict[str, torch.Tensor]],
    scope: NllScope,
    form: str,
) -> None:
    found = logps(llama, pairs, LossMask(scope), FORMS[form])
    expected = naive_logps(llama, pairs, scope)
    for name, result in (
        ("chosen", found.chosen_logps_P),
        ("rejected", found.rejected_logps_P),
        ("nll_sums", found.nll_sums_P),
        ("nll_tokens", found.nll_tokens_P),
    ):
        torch.testing.assert_close(result.double(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_company_does_not_move_a_pair(llama: LlamaForCausalLM, pairs: list[Pair], form: str) -> None:
    together = logps(llama, pairs, form=FORMS[form], pad_token_id=VOCABULARY - 1)
    backwards = logps(llama, pairs[::-1], form=FORMS[form])
    for index, pair in enumerate(pairs):
        alone = logps(llama, [pair], form=FORMS[form])
        for name in ("chosen_logps_P", "rejected_logps_P", "nll_sums_P", "nll_tokens_P"):
            expected = getattr(alone, name)[0]
            torch.testing.assert_close(getattr(together, name)[index], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(getattr(backwards, name)[-1 - index], expected, rtol=1e-5, atol=1e-5)


def test_chosen_and_rejected_do_not_see_each_other(llama: LlamaForCausalLM, pairs: list[Pair]) -> None:
    pair = pairs[0]
    other = copy.copy(pair.chosen_ids)[::-1].copy()
    changed = Pair("test:1", pair.prompt_ids, other, pair.rejected_ids, chosen_bytes=1)
    before, after = (logps(llama, [p, pairs[1]]) for p in (pair, changed))
    assert before.chosen_logps_P[0] != after.chosen_logps_P[0]
    assert torch.equal(before.rejected_logps_P, after.rejected_logps_P)
    assert torch.equal(before.chosen_logps_P[1], after.chosen_logps_P[1])


@pytest.mark.parametrize("reduction", ["token", "pair"])
def test_gradient_does_not_depend_on_how_the_batch_is_cut(
    llama: LlamaForCausalLM, pairs: list[Pair], reduction: str
) -> None:
    """Law 2, on a model: also uneven cuts of pairs of very different length."""
    counts = BatchCounts(len(pairs), sum(prompt - 1 + chosen for prompt, chosen, _ in LENGTHS))

    def cut(*sizes: int) -> torch.Tensor:
        rest = iter(pairs)
        for size in sizes:
            found = logps(llama, [next(rest) for _ in range(size)])
            orpo(found, counts, orpo_lambda=0.5, nll_reduction=reduction).loss.backward()
        return gradient(llama)

    whole = cut(6)
    for sizes in [(1, 1, 1, 1, 1, 1), (2, 2, 2), (1, 5), (4, 2)]:
        torch.testing.assert_close(cut(*sizes), whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


def test_log_probabilities_are_fp32_whatever_the_model(llama: LlamaForCausalLM, pairs: list[Pair]) -> None:
    for form in FORMS.values():
        found = logps(copy.deepcopy(llama).bfloat16(), pairs, form=form)
        assert {found.chosen_logps_P.dtype, found.rejected_logps_P.dtype, found.nll_sums_P.dtype} == {torch.float32}


@pytest.mark.parametrize("form", [FAST, CHUNKED, PLAIN])
def test_gradient_checkpointing_runs_the_same_attention_again(pairs: list[Pair], form: ForwardMode) -> None:
    model = build(SHARING["llama"]).train()
    objective(model, pairs, form)
    expected = gradient(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective(model, pairs, form)
    torch.testing.assert_close(gradient(model), expected)


def test_a_model_that_drops_the_layout_is_refused(llama: LlamaForCausalLM, pairs: list[Pair]) -> None:
    model = copy.deepcopy(llama)
    PairModel(model, FAST)
    with pytest.raises(ValueError, match="LlamaAttention does not pass keyword arguments on"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_answer_padding_and_eos(llama: LlamaForCausalLM, pairs: list[Pair]) -> None:
    """The authors' counting, from token log-probabilities written out."""
    eos = int(pairs[4].chosen_ids[3])
    counting = LossMask("prompt_and_response", nll_eos=False, answer_padding=True, eos_token_id=eos)
    for form in FORMS.values():
        found = logps(llama, pairs, counting, form)
        for index, pair in enumerate(pairs):
            for answer, mean in (
                (pair.chosen_ids, found.chosen_logps_P[index]),
                (pair.rejected_ids, found.rejected_logps_P[index]),
            ):
                ids = torch.tensor([*pair.prompt_ids, *answer, eos])
                logp_T = llama(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
                torch.testing.assert_close(mean, logp_T[len(pair.prompt_ids) - 1 :].mean(), rtol=1e-5, atol=1e-5)
                if answer is pair.chosen_ids:
                    counted = ids[1:-1] != eos
                    torch.testing.assert_close(
                        found.nll_sums_P[index], -logp_T[:-1][counted].sum(), rtol=1e-5, atol=1e-5
                    )
                    assert int(found.nll_tokens_P[index]) == int(counted.sum())
    assert found.nll_tokens_P.sum() < logps(llama, pairs, ALL).nll_tokens_P.sum()


class _NoReading(TorchDispatchMode):
    """Fails where the host would have to wait for the device: a value read, or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **kwargs or {})


def test_nothing_in_a_pass_waits_for_the_device(llama: LlamaForCausalLM, pairs: list[Pair]) -> None:
    model = PairModel(copy.deepcopy(llama), FAST)
    batch = model.collate(pairs, ALL, pad_token_id=0)
    counts = BatchCounts(len(pairs), int(batch.tokens_K[-len(pairs) :].sum()))
    sums = PairSums.zeros(torch.device("cpu"))
    with _NoReading():
        found = pair_logps(model, batch)
        terms = orpo(found, counts, orpo_lambda=0.5, nll_reduction="token")
        terms.loss.backward()
        sums.add(found, terms)
    with pytest.raises(AssertionError), _NoReading():
        float(terms.loss)
