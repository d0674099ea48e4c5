import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_ray.config import LossConfig
from orpo_ray.loss import LOGP_CEILING, BatchCounts, LossTerms, PairLogps, from_config, log_odds_ratio, orpo

REDUCTIONS = ["token", "pair"]
MEAN_LOGPS = st.floats(-100.0, -1e-4)


def from_parameters(w: torch.Tensor, nll_tokens: list[int]) -> PairLogps:
    """Log-probabilities that all depend on the same parameters, as a model's do; w: [P, 3]."""
    tokens_P = torch.tensor(nll_tokens)
    x = -F.softplus(w + 0.1 * w.sum())
    return PairLogps(x[:, 0], x[:, 1], -x[:, 2] * tokens_P, tokens_P)


def odds_ratio_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """L_OR per pair, summed over the pairs by the objective: λ = 1 without an NLL."""
    zeros = torch.zeros_like(chosen)
    logps = PairLogps(chosen, rejected, zeros, torch.ones_like(chosen, dtype=torch.long))
    return orpo(logps, BatchCounts(pairs=1, nll_tokens=1), orpo_lambda=1.0, nll_reduction="token").loss


def odds_ratio_gradients(chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (chosen, rejected)]
    return torch.autograd.grad(odds_ratio_loss(*leaves), leaves)


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of {0, -1e-8, -1e-7, ..., -100}, fp32."""
    x = torch.tensor([0.0, *(-(10.0**k) for k in range(-8, 3))])
    chosen, rejected = torch.meshgrid(x, x, indexing="ij")
    return chosen.flatten().clone(), rejected.flatten().clone()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("config", [{"name": "orpo", "orpo_lambda": 0.0}, {"name": "sft"}])
def test_lambda_zero_is_sft_to_the_last_bit(config: dict[str, object], reduction: str) -> None:
    w = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = [3, 11, 7, 1, 20]
    counts = BatchCounts(pairs=5, nll_tokens=sum(tokens))

    logps = from_parameters(w, tokens)
    terms = from_config(LossConfig(nll_reduction=reduction, **config))(logps, counts)
    (gradient,) = torch.autograd.grad(terms.loss, w)

    logps = from_parameters(w, tokens)
    nll = (
        logps.nll_sums_P.sum() / sum(tokens)
        if reduction == "token"
        else (logps.nll_sums_P / logps.nll_tokens_P).sum() / 5
    )
    (nll_gradient,) = torch.autograd.grad(nll, w)
    assert torch.equal(terms.loss, nll)
    assert torch.equal(terms.nll, nll)
    assert torch.equal(gradient, nll_gradient)
    assert (terms.odds_ratio_loss_P > 0).all()  # still reported: λ = 0 is the control of a sweep


def test_loss_is_nll_plus_lambda_times_odds_ratio_loss() -> None:
    # P_w = 0.8: odds 4. P_l = 0.5: odds 1. So log OR = ln 4 and L_OR = -ln σ(ln 4) = ln 1.25.
    logps = PairLogps(
        torch.tensor([math.log(0.8)]), torch.tensor([math.log(0.5)]), torch.tensor([6.0]), torch.tensor([4])
    )
    terms = orpo(logps, BatchCounts(pairs=1, nll_tokens=4), orpo_lambda=0.5, nll_reduction="token")
    assert terms.log_odds_P.item() == pytest.approx(math.log(4), rel=1e-6)
    assert terms.odds_ratio_loss_P.item() == pytest.approx(math.log(1.25), rel=1e-6)
    assert terms.nll.item() == pytest.approx(1.5)
    assert terms.loss.item() == pytest.approx(1.5 + 0.5 * math.log(1.25), rel=1e-6)


def test_reductions_weigh_long_answers_differently() -> None:
    logps = PairLogps(
        torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -2.0]), torch.tensor([1.0, 9.0]), torch.tensor([1, 3])
    )
    counts = BatchCounts(pairs=2, nll_tokens=4)
    assert orpo(logps, counts, orpo_lambda=0.0, nll_reduction="token").nll.item() == pytest.approx(10 / 4)
    assert orpo(logps, counts, orpo_lambda=0.0, nll_reduction="pair").nll.item() == pytest.approx((1 + 3) / 2)


@pytest.mark.parametrize("logp", [-1e-3, -0.1, -1.0, -30.0])
def test_equal_answers_give_ln_2_and_half_the_gradient(logp: float) -> None:
    x = torch.tensor([logp])
    assert odds_ratio_loss(x, x).item() == pytest.approx(math.log(2), rel=1e-6)
    # δ = 1/2 and 1 / (1 - P) on both sides (paper eq. 9-10).
    chosen_gradient, rejected_gradient = odds_ratio_gradients(x, x)
    assert chosen_gradient.item() == pytest.approx(-0.5 / -math.expm1(logp), rel=1e-5)
    assert rejected_gradient.item() == pytest.approx(0.5 / -math.expm1(logp), rel=1e-5)


def test_descent_raises_chosen_and_lowers_rejected() -> None:
    chosen, rejected = grid()
    inside = (chosen < LOGP_CEILING) & (rejected < LOGP_CEILING)
    # Where chosen is e^90 times likelier already, the gradient is below what fp32 can hold.
    inside &= chosen - rejected < 50
    chosen_gradient, rejected_gradient = odds_ratio_gradients(chosen[inside], rejected[inside])
    assert torch.all(chosen_gradient < 0)
    assert torch.all(rejected_gradient > 0)


def test_value_and_gradient_are_finite_for_every_log_probability() -> None:
    chosen, rejected = grid()
    assert len(chosen) == 144
    assert log_odds_ratio(chosen, rejected).isfinite().all()
    assert odds_ratio_loss(chosen, rejected).isfinite()
    for gradient in odds_ratio_gradients(chosen, rejected):
        assert gradient.isfinite().all()


def test_fp32_agrees_with_the_definition_in_fp64() -> None:
    chosen, rejected = (x.clamp(max=LOGP_CEILING) for x in grid())

    def log_odds(x: torch.Tensor) -> torch.Tensor:
        p = x.double().exp()
        return torch.log(p / (1 - p))

    reference = log_odds(chosen) - log_odds(rejected)
    terms = log_odds_ratio(chosen, rejected)
    # 1e-4 relative; absolute only where the two sides cancel.
    torch.testing.assert_close(terms.double(), reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F.softplus(-terms).double(), F.softplus(-reference), rtol=1e-4, atol=1e-38)


def test_bf16_input_is_raised_to_fp32() -> None:
    chosen, rejected = torch.tensor([-0.001], dtype=torch.bfloat16), torch.tensor([-3.0], dtype=torch.bfloat16)
    result = log_odds_ratio(chosen, rejected)
    assert result.dtype == torch.float32
    assert torch.equal(result, log_odds_ratio(chosen.float(), rejected.float()))


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (
        (-20 * torch.rand(8, dtype=torch.float64, generator=generator) - 1e-3).requires_grad_() for _ in range(2)
    )
    assert torch.autograd.gradcheck(log_odds_ratio, (chosen, rejected))


def test_gradient_is_the_papers_closed_form() -> None:
    # Paper eq. 8-10 with the sign of the loss: ∇L_OR = -δ · h, δ = [1 + odds_w / odds_l]^-1,
    # h = ∇ log P_w / (1 - P_w) - ∇ log P_l / (1 - P_l).
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = (-5 * torch.rand(50, dtype=torch.float64, generator=generator) - 1e-3 for _ in range(2))
    chosen_gradient, rejected_gradient = odds_ratio_gradients(chosen, rejected)
    p_w, p_l = chosen.exp(), rejected.exp()
    delta = 1 / (1 + (p_w / (1 - p_w)) / (p_l / (1 - p_l)))
    torch.testing.assert_close(chosen_gradient, -delta / (1 - p_w))
    torch.testing.assert_close(rejected_gradient, delta / (1 - p_l))


def test_value_is_the_closed_form_without_odds() -> None:
    # L_OR = log(P_w (1 - P_l) + P_l (1 - P_w)) - log P_w - log(1 - P_l) (Gorbatovski et al. 2025, App. D).
    generator = torch.Generator().manual_seed(2)
    chosen, rejected = (-5 * torch.rand(50, dtype=torch.float64, generator=generator) - 1e-3 for _ in range(2))
    p_w, p_l = chosen.exp(), rejected.exp()
    expected = torch.log(p_w * (1 - p_l) + p_l * (1 - p_w)) - torch.log(p_w) - torch.log(1 - p_l)
    torch.testing.assert_close(F.softplus(-log_odds_ratio(chosen, rejected)), expected)


@given(MEAN_LOGPS, MEAN_LOGPS, MEAN_LOGPS)
def test_a_likelier_chosen_answer_never_lowers_the_log_odds(a: float, b: float, rejected: float) -> None:
    low, high = sorted((a, b))
    less, more = log_odds_ratio(torch.tensor([low, high]), torch.tensor([rejected, rejected])).tolist()
    assert more >= less - 2e-5  # fp32 at 100


@given(MEAN_LOGPS, MEAN_LOGPS)
def test_log_odds_change_sign_when_the_answers_are_swapped(a: float, b: float) -> None:
    x, y = torch.tensor([a]), torch.tensor([b])
    assert torch.equal(log_odds_ratio(x, y), -log_odds_ratio(y, x))


@given(st.integers(1, 8), st.integers(1, 500), st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 1.0]))
@settings(deadline=None)
def test_token_and_pair_reduction_agree_when_all_lengths_are_equal(
    num_pairs: int, length: int, seed: int, orpo_lambda: float
) -> None:
    w = torch.randn(num_pairs, 3, generator=torch.Generator().manual_seed(seed))
    logps = from_parameters(w, [length] * num_pairs)
    counts = BatchCounts(pairs=num_pairs, nll_tokens=num_pairs * length)
    by_token, by_pair = (orpo(logps, counts, orpo_lambda=orpo_lambda, nll_reduction=r).loss for r in REDUCTIONS)
    torch.testing.assert_close(by_token, by_pair, rtol=1e-5, atol=1e-6)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=10),
    cuts=st.sets(st.integers(1, 9)),
    seed=st.integers(0, 2**32),
    reduction=st.sampled_from(REDUCTIONS),
)
@settings(deadline=None)
def test_micro_batches_add_up_to_the_whole_batch(lengths: list[int], cuts: set[int], seed: int, reduction: str) -> None:
    """Law 2: the same data gives the same loss and gradient however it is cut."""
    w = torch.randn(len(lengths), 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    logps = from_parameters(w, lengths)
    counts = BatchCounts(pairs=len(lengths), nll_tokens=sum(lengths))
    edges = [0, *sorted(cut for cut in cuts if cut < len(lengths)), len(lengths)]

    def terms(part: slice) -> LossTerms:
        piece = PairLogps(*(getattr(logps, name)[part] for name in PairLogps.__slots__))
        return orpo(piece, counts, orpo_lambda=0.3, nll_reduction=reduction)

    whole = terms(slice(None)).loss
    cut = torch.stack([terms(slice(a, b)).loss for a, b in itertools.pairwise(edges)]).sum()
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    (whole_gradient,) = torch.autograd.grad(whole, w, retain_graph=True)
    (cut_gradient,) = torch.autograd.grad(cut, w)
    torch.testing.assert_close(cut_gradient, whole_gradient, rtol=1e-4, atol=1e-6)
