import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_ray.config import LossConfig
from orpo_ray.models.logps import PairLogps, ReferenceLogps
from orpo_ray.training.loss import (
    LOGP_CEILING,
    BatchCounts,
    LossFn,
    LossTerms,
    cpo,
    dpo,
    from_config,
    ipo,
    log_odds_ratio,
    orpo,
    simpo,
)

REDUCTIONS = ["token", "pair"]
MEAN_LOGPS = st.floats(-100.0, -1e-4)
EVERY_LOSS = [
    LossConfig(orpo_lambda=0.3),
    LossConfig(orpo_lambda=0.3, ratio="probability"),
    LossConfig(orpo_lambda=0.3, temperature=0.2),
    LossConfig(name="sft"),
    LossConfig(name="dpo"),
    LossConfig(name="cpo"),
    LossConfig(name="simpo"),
    LossConfig(name="ipo"),
    LossConfig(name="reward"),
]
RLOO = LossConfig(name="rloo", reward_model="some/rm")
"""Its log-probabilities are of sampled answers, of which none is chosen."""
every_loss = pytest.mark.parametrize(
    "config", EVERY_LOSS, ids=lambda c: f"{c.name}-{'-'.join(map(str, c.own_settings.values()))}"
)


def pairs_of(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    nll_sums: torch.Tensor | None = None,
    nll_tokens: torch.Tensor | None = None,
    tokens: tuple[int, int] = (1, 1),
    reference: ReferenceLogps | None = None,
) -> PairLogps:
    """Pairs of which only what a test is about is given; `tokens`: of every chosen and every rejected answer."""
    ones = torch.ones_like(chosen, dtype=torch.long)
    return PairLogps(
        chosen_logps_P=chosen,
        rejected_logps_P=rejected,
        nll_sums_P=torch.zeros_like(chosen) if nll_sums is None else nll_sums,
        nll_tokens_P=ones if nll_tokens is None else nll_tokens,
        chosen_tokens_P=tokens[0] * ones,
        rejected_tokens_P=tokens[1] * ones,
        reference=reference,
    )


def from_parameters(w: torch.Tensor, nll_tokens: list[int]) -> PairLogps:
    """Log-probabilities that all depend on the same parameters, as a model's do; w: [P, 3]."""
    tokens_P = torch.tensor(nll_tokens)
    x = -F.softplus(w + 0.1 * w.sum())
    reference = ReferenceLogps(x[:, 0].detach() - 0.1, x[:, 1].detach() - 0.2)
    rewards_P2 = x[:, :2].detach().cos()
    return PairLogps(x[:, 0], x[:, 1], -x[:, 2] * tokens_P, tokens_P, tokens_P, tokens_P + 2, reference, rewards_P2)


def piece_of(logps: PairLogps, part: slice) -> PairLogps:
    """The pairs of one micro-batch."""
    columns = {name: getattr(logps, name)[part] for name in PairLogps.__slots__ if name != "reference"}
    assert logps.reference is not None
    reference = (logps.reference.chosen_logps_P[part], logps.reference.rejected_logps_P[part])
    return PairLogps(**columns, reference=ReferenceLogps(*reference))


def odds_ratio_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """L_OR per pair, summed over the pairs by the objective: λ = 1 without an NLL."""
    counts = BatchCounts(pairs=1, nll_tokens=1)
    return orpo(pairs_of(chosen, rejected), counts, orpo_lambda=1.0, nll_reduction="token").loss


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
    logps = pairs_of(
        torch.tensor([math.log(0.8)]), torch.tensor([math.log(0.5)]), torch.tensor([6.0]), torch.tensor([4])
    )
    terms = orpo(logps, BatchCounts(pairs=1, nll_tokens=4), orpo_lambda=0.5, nll_reduction="token")
    assert terms.log_odds_P.item() == pytest.approx(math.log(4), rel=1e-6)
    assert terms.odds_ratio_loss_P.item() == pytest.approx(math.log(1.25), rel=1e-6)
    assert terms.nll.item() == pytest.approx(1.5)
    assert terms.loss.item() == pytest.approx(1.5 + 0.5 * math.log(1.25), rel=1e-6)
    assert terms.preference_loss_P.item() == terms.odds_ratio_loss_P.item()


@pytest.mark.parametrize(
    ("settings", "preference_loss"),
    [
        # P_w = 0.8, P_l = 0.5. Probability ratio: 1.6, so -ln σ(ln 1.6) = ln(1 + 1 / 1.6).
        ({"ratio": "probability"}, math.log(1 + 1 / 1.6)),
        # Odds ratio 4, log OR multiplied by b: -ln σ(b ln 4) = ln(1 + 4^-b).
        ({"temperature": 2.0}, math.log(1 + 1 / 16)),
        ({"temperature": 0.5}, math.log(1 + 1 / 2)),
        ({"ratio": "probability", "temperature": 2.0}, math.log(1 + 1 / 2.56)),
    ],
)
def test_ratio_and_temperature_change_the_objective_and_not_what_is_reported(
    settings: dict[str, object], preference_loss: float
) -> None:
    logps = pairs_of(torch.tensor([math.log(0.8)]), torch.tensor([math.log(0.5)]))
    terms = from_config(LossConfig(orpo_lambda=0.5, **settings))(logps, BatchCounts(pairs=1, nll_tokens=1))
    assert terms.preference_loss_P.item() == pytest.approx(preference_loss, rel=1e-6)
    assert terms.loss.item() == pytest.approx(0.5 * preference_loss, rel=1e-6)
    assert terms.log_odds_P.item() == pytest.approx(math.log(4), rel=1e-6)
    assert terms.odds_ratio_loss_P.item() == pytest.approx(math.log(1.25), rel=1e-6)


# Chosen: 3 tokens of mean -1 (reference -1.5), rejected: 2 of mean -2 (reference -1.75); NLL 6 over 4 tokens.
# Sums -3 and -4, log-ratios to the reference 3 · 0.5 = 1.5 and 2 · -0.25 = -0.5.
BY_HAND = {
    "dpo": (lambda *args: dpo(*args, beta=0.1, nll_reduction="token"), math.log1p(math.exp(-0.1 * 2.0)), 0.0),
    "ipo": (lambda *args: ipo(*args, beta=0.1, nll_reduction="token"), (0.5 + 0.25 - 5.0) ** 2, 0.0),
    "simpo": (
        lambda *args: simpo(*args, beta=2.0, simpo_gamma=0.5, nll_reduction="token"),
        math.log1p(math.exp(-(2.0 * 1.0 - 0.5))),
        0.0,
    ),
    "cpo": (
        lambda *args: cpo(*args, beta=0.1, nll_weight=0.25, nll_reduction="token"),
        math.log1p(math.exp(-0.1 * 1.0)),
        0.25 * 1.5,
    ),
}


@pytest.mark.parametrize(("loss_fn", "preference_loss", "nll_part"), BY_HAND.values(), ids=BY_HAND.keys())
def test_other_losses_by_hand(loss_fn: LossFn, preference_loss: float, nll_part: float) -> None:
    reference = ReferenceLogps(torch.tensor([-1.5]), torch.tensor([-1.75]))
    columns = (torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([6.0]), torch.tensor([4]))
    # Half of a global batch of 2 pairs and 4 + 0 counted tokens.
    terms = loss_fn(pairs_of(*columns, (3, 2), reference), BatchCounts(pairs=2, nll_tokens=4))
    assert terms.preference_loss_P.item() == pytest.approx(preference_loss, rel=1e-6)
    assert terms.loss.item() == pytest.approx(preference_loss / 2 + nll_part, rel=1e-6)
    assert terms.nll.item() == pytest.approx(1.5)  # a metric for all of them
    assert terms.log_odds_P.item() == log_odds_ratio(*columns[:2]).item()


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_a_missing_reference_is_refused(name: str) -> None:
    config = LossConfig(name=name)
    assert config.needs_reference
    with pytest.raises(ValueError, match=f"loss.name {name} compares with a reference model.*training.reference"):
        from_config(config)(pairs_of(torch.tensor([-1.0]), torch.tensor([-2.0])), BatchCounts(1, 1))
    assert [c.name for c in EVERY_LOSS if c.needs_reference] == ["dpo", "ipo"]


def test_at_the_reference_dpo_is_ln_2_whatever_the_lengths() -> None:
    logps = torch.tensor([-1.3]), torch.tensor([-0.7])
    terms = dpo(
        pairs_of(*logps, tokens=(900, 4), reference=ReferenceLogps(*logps)),
        BatchCounts(1, 1),
        beta=0.1,
        nll_reduction="token",
    )
    assert terms.loss.item() == pytest.approx(math.log(2), rel=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_pair_of_which_no_token_counts_adds_nothing_to_the_nll(reduction: str) -> None:
    """With `nll_eos` off, an answer that is all EOS leaves the NLL no token."""
    logps = pairs_of(
        torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -2.0]), torch.tensor([0.0, 6.0]), torch.tensor([0, 3])
    )
    nll = orpo(logps, BatchCounts(2, 3), orpo_lambda=0.0, nll_reduction=reduction).nll.item()
    assert nll == pytest.approx({"token": 6 / 3, "pair": (0 + 2) / 2}[reduction])


def test_reductions_weigh_long_answers_differently() -> None:
    logps = pairs_of(
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


@every_loss
@pytest.mark.parametrize("answer_tokens", [1, 1024])
def test_every_loss_is_finite_for_every_log_probability(config: LossConfig, answer_tokens: int) -> None:
    """Law 3, with the reference at both ends of the range."""
    for reference in (0.0, -100.0):
        chosen, rejected = (x.requires_grad_() for x in grid())
        nll_sums = (-chosen * answer_tokens).detach().requires_grad_()
        logps = pairs_of(
            chosen,
            rejected,
            nll_sums,
            torch.full((144,), answer_tokens),
            (answer_tokens, answer_tokens),
            ReferenceLogps(torch.full((144,), reference), torch.full((144,), -100.0 - reference)),
        )
        terms = from_config(config)(logps, BatchCounts(pairs=144, nll_tokens=144 * answer_tokens))
        gradients = torch.autograd.grad(terms.loss, (chosen, rejected, nll_sums), allow_unused=True)
        for values in (terms.loss, terms.nll, *(getattr(terms, n) for n in LossTerms.__slots__ if n.endswith("_P"))):
            assert values.isfinite().all()
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("config", [c for c in EVERY_LOSS if c.name != "sft"], ids=lambda c: c.name)
def test_descent_prefers_the_chosen_answer(config: LossConfig) -> None:
    chosen, rejected = torch.tensor([-1.5], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    reference = ReferenceLogps(torch.tensor([-1.2]), torch.tensor([-1.1]))
    terms = from_config(config)(pairs_of(chosen, rejected, tokens=(7, 5), reference=reference), BatchCounts(1, 1))
    chosen_gradient, rejected_gradient = torch.autograd.grad(terms.loss, (chosen, rejected))
    assert chosen_gradient.item() < 0 < rejected_gradient.item()


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
    config=st.sampled_from(
        [config.model_copy(update={"nll_reduction": r}) for config in (*EVERY_LOSS, RLOO) for r in REDUCTIONS]
    ),
)
@settings(deadline=None)
def test_micro_batches_add_up_to_the_whole_batch(
    lengths: list[int], cuts: set[int], seed: int, config: LossConfig
) -> None:
    """Law 2: the same data gives the same loss and gradient however it is cut."""
    w = torch.randn(len(lengths), 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    logps = from_parameters(w, lengths)
    counts = BatchCounts(pairs=len(lengths), nll_tokens=sum(lengths))
    edges = [0, *sorted(cut for cut in cuts if cut < len(lengths)), len(lengths)]

    def loss_of(part: slice) -> torch.Tensor:
        return from_config(config)(piece_of(logps, part), counts).loss

    whole = loss_of(slice(None))
    cut = torch.stack([loss_of(slice(a, b)) for a, b in itertools.pairwise(edges)]).sum()
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    (whole_gradient,) = torch.autograd.grad(whole, w, retain_graph=True)
    (cut_gradient,) = torch.autograd.grad(cut, w)
    torch.testing.assert_close(cut_gradient, whole_gradient, rtol=1e-4, atol=1e-6)
