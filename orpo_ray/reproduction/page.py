"""The page of a reproduction: the paper's numbers beside ours, with intervals, signs, settings and cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orpo_ray.formatting import markdown_table
from orpo_ray.reproduction import published, ratio_simulation, win_rate
from orpo_ray.reproduction.flops import Accounting
from orpo_ray.reproduction.flops import table as accounting_table
from orpo_ray.reproduction.scales import JUDGE, POLICY_REWARD_MODEL

PAGE_FILE = "reproduction.md"
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
_NOT_CLAIMED = "shown, nothing claimed"
_SHOWN = {"sft": "SFT (λ = 0)", "orpo": "odds ratio, λ = 1", "probability": "probability ratio, λ = 1"}
_CANNOT = (
    "That ORPO's margin over DPO grows with model size: this scale has one size.",
    "Table 1 (AlpacaEval) and MT-Bench: their judges are behind an API. `alpaca_eval` and `mt_bench` write the files "
    "that they read.",
    "Table 6 (IFEval) and the exact numbers of Table 4: they need 7B models and Gemini-Pro's embeddings.",
)


@dataclass(frozen=True, slots=True)
class Claim:
    """One statement of the paper, and the result of this reproduction."""

    text: str
    where: str
    paper: str
    ours: str
    interval: str
    verdict: str
    """`yes`, `no`, `not decided`, or `shown, nothing claimed`."""


def write(folder: Path, result: Mapping[str, Any], command: str, others: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write the page and its figures.

    Args:
        folder: for the page and the figures.
        result: from `orpo_ray.reproduction.run.run`.
        command: command line that reproduces the page.
        others: results of the same settings with other seeds.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save(draw_curves(result["curves"], ("sft", "orpo-0.1", "orpo-0.5", "orpo")), folder / "lambda.png")
    _save(draw_curves(result["curves"], ("orpo", "probability")), folder / "ratio.png")
    unit = "reward by the judge"
    _save(
        win_rate.histogram({k.upper(): np.array(v) for k, v in result["rewards"].items()}, unit), folder / "rewards.png"
    )
    _save(ratio_simulation.draw(ratio_simulation.simulate()), folder / "figure6.png")
    page = folder / PAGE_FILE
    page.write_text(_page(result, command, others), encoding="utf-8")
    return page


def claims(result: Mapping[str, Any]) -> list[Claim]:
    """The paper's statements that this scale can test."""
    found = [_win(result, other) for other in ("sft", "rlhf", "dpo")]
    changes = result["changes"]
    for side, word in (("chosen_logp", "chosen"), ("rejected_logp", "rejected")):
        text = f"SFT alone raises the {word} log-probability"
        found.append(_moved(text, "Fig. 3", "rises", changes["sft"][side], above=True))
    text = "ORPO with λ = 1 lowers the rejected log-probability"
    found.append(_moved(text, "Figs. 7, 9", "falls", changes["orpo"]["rejected_logp"], above=False))
    text = "with λ = 1 the rejected log-probability ends lower than with SFT"
    found.append(_moved(text, "Figs. 3, 7", "lower", changes["orpo less sft"]["rejected_logp"], above=False))
    text, low = "with λ = 0.1 the rejected log-probability against SFT", changes["orpo-0.1 less sft"]["rejected_logp"]
    found.append(replace(_moved(text, "–", "–", low, above=False), verdict=_NOT_CLAIMED))
    text = "with λ = 1 the chosen log-probability falls, too"
    found.append(
        _moved(text, "Fig. 9 (Mistral; in Fig. 7 it rises)", "falls", changes["orpo"]["chosen_logp"], above=False)
    )
    text = "with λ = 0.1 the rejected log-probability does not fall"
    found.append(_moved(text, "Fig. 9", "stays", changes["orpo-0.1"]["rejected_logp"], above=True))
    text = "the margin is wider with λ = 1 than with λ = 0.1"
    found.append(_trend(text, changes))
    text = "the probability ratio lowers the rejected log-probability further than the odds ratio"
    found.append(_moved(text, "Fig. 8", "lower", changes["probability less odds"]["rejected_logp"], above=False))
    found += _diverse(result)
    return found


def _win(result: Mapping[str, Any], other: str) -> Claim:
    rate = result["win_rates"][other]
    rows = {key: row[other] for key, row in published.WIN_RATES.items()}
    named = result["about"]["compared_with"]
    if named:
        number = rows[tuple(named)]
        paper = f"{number.mean:.1f} % ({number.std:.2f}), {named[0]} on {named[1]}"
    else:
        paper = f"{min(r.mean for r in rows.values()):.1f} to {max(r.mean for r in rows.values()):.1f} %"
    name = {"sft": "SFT", "dpo": "DPO", "rlhf": "RLHF (PPO in the paper, RLOO here)"}[other]
    ours = f"{100 * rate['mean']:.1f} % (std over rounds {100 * rate['std_over_rounds']:.2f})"
    interval = f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f} %"
    verdict = _NOT_CLAIMED if other == "dpo" else _verdict(rate["low"], rate["high"], 0.5, above=True)
    if _judge_is_blind(result):
        verdict = "cannot be shown: the judge is no better than chance"
    claimed = " wins more than half" if other != "dpo" else ""
    return Claim(f"ORPO against {name}{claimed}", "Tables 2, 3", paper, ours, interval, verdict)


def _moved(text: str, where: str, paper: str, change: Mapping[str, float], *, above: bool) -> Claim:
    interval = f"{change['low']:+.3f} to {change['high']:+.3f}"
    verdict = _verdict(change["low"], change["high"], 0.0, above=above)
    return Claim(text, where, paper, f"{change['mean']:+.3f} nats per token", interval, verdict)


def _trend(text: str, changes: Mapping[str, Any]) -> Claim:
    margins = [changes[f"{name}'s margin"]["margin"]["mean"] for name in ("orpo-0.1", "orpo-0.5", "orpo")]
    wider = changes["orpo's margin less orpo-0.1's"]["margin"]
    ours = f"{', '.join(f'{mean:+.3f}' for mean in margins)} for λ = 0.1, 0.5, 1"
    interval = f"{wider['low']:+.3f} to {wider['high']:+.3f}, λ = 1 less λ = 0.1"
    return Claim(
        text, "Fig. 9", "widest with λ = 1", ours, interval, _verdict(wider["low"], wider["high"], 0.0, above=True)
    )


def _diverse(result: Mapping[str, Any]) -> list[Claim]:
    found = []
    for key, word, is_more in (("per_input", "per input", True), ("across_input", "across inputs", False)):
        orpo, dpo = (result["diversity"][name][key] for name in ("orpo", "dpo"))
        at = 0 if key == "per_input" else 1
        paper = "; ".join(
            f"{m}: {r['orpo'][at]:.3f} against {r['dpo'][at]:.3f}" for m, r in published.DIVERSITY.items()
        )
        lower, upper = (dpo, orpo) if is_more else (orpo, dpo)
        apart = upper["low"] > lower["high"], upper["high"] < lower["low"]
        verdict = "yes" if apart[0] else "no" if apart[1] else "not decided"
        more = "more" if is_more else "less"
        interval = f"{orpo['low']:.3f} to {orpo['high']:.3f}; {dpo['low']:.3f} to {dpo['high']:.3f}"
        text = f"ORPO's answers are {more} alike than DPO's {word} (mean cosine)"
        found.append(
            Claim(text, "Table 4", paper, f"{orpo['value']:.3f} against {dpo['value']:.3f}", interval, verdict)
        )
    return found


def _verdict(low: float, high: float, at: float, *, above: bool) -> str:
    if low > at:
        return "yes" if above else "no"
    if high < at:
        return "no" if above else "yes"
    return "not decided"


def _judge_is_blind(result: Mapping[str, Any]) -> bool:
    return bool(result["judge"]["judge"]["low"] <= 0.5)


# ---- text -----------------------------------------------------------------------------------------------------------


def _page(result: Mapping[str, Any], command: str, others: Sequence[Mapping[str, Any]]) -> str:
    about, judge, control = result["about"], result["judge"], result["control"]
    rows = [[c.text, c.where, c.paper, c.ours, c.interval, c.verdict] for c in claims(result)]
    titles = ["the paper says", "where", "its number", "ours", "95 % interval", "same sign"]
    began = (
        " First, the model learned the language of both answers from other pairs of the same generator; some held-out "
        "answers occur among them verbatim, under other prompts."
        if about["pretrain"]
        else ""
    )
    parts = [
        f"# The ORPO paper, reproduced at scale `{result['scale']}`",
        f"`{command}`\n\n{_machine(result)}",
        f"{Path(about['model']).name} on {Path(about['data']).name}, {result['pairs']['train']} training pairs and "
        f"{result['pairs']['held_out']} held-out ones.{began} ORPO has λ = {about['main_lambda']:g} unless stated "
        "otherwise; this was fixed before any run. Intervals are bootstraps over prompts or pairs; they do not cover "
        f"variation between seeds, {'which is shown below' if others else 'of which there is one'}.",
        "## Results",
        markdown_table(titles, rows),
        _judge_text(judge, control),
        *_by_seed([result, *others]),
        "## Log-probabilities of held-out answers",
        "Figures 3, 7 and 9: SFT (λ = 0) and ORPO. Step 0 is the model before training.\n\n"
        "![mean token log-probability of chosen and rejected answers over steps, by λ](lambda.png)",
        f"Figure 8: probability ratio against odds ratio, both with λ = {about['main_lambda']:g}. "
        f"{_how_likely(result)}\n\n"
        "![the same for the probability ratio and the odds ratio](ratio.png)",
        "## Rewards",
        "Figure 5: the judge's rewards for each model's answers.\n\n![reward distributions](rewards.png)",
        "## The two ratios of random probabilities",
        "Figure 6: 50,000 pairs of probabilities, each drawn uniformly from 0 to 1. " + _figure6(),
        "![distributions of both log ratios](figure6.png)",
        "## Compute",
        _compute(result["accounting"]),
        "## Cost",
        _cost(result),
        "## Settings",
        _settings(result),
        "## What this scale cannot show",
        "\n".join(f"- {line}" for line in _cannot(result)),
    ]
    return "\n\n".join(parts) + "\n"


def _by_seed(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Section with each claim's number by seed; empty for a single result."""
    if len(results) < 2:
        return []
    results = sorted(results, key=lambda result: result["about"]["seed"])
    rows = zip(*(claims(result) for result in results), strict=True)
    return [
        "## With other seeds",
        "All steps repeated with the same pairs; the seed changes their order, the new weights, the reward models and "
        "the sampled answers.",
        markdown_table(
            ["the paper says", *(f"seed {result['about']['seed']}" for result in results)],
            [[row[0].text, *(f"{claim.ours.partition(' (')[0]}: {claim.verdict}" for claim in row)] for row in rows],
        ),
    ]


def _cannot(result: Mapping[str, Any]) -> list[str]:
    if result["scale"] == "full":
        return list(_CANNOT)
    about = result["about"]
    differs = (
        "the judge is weaker and training is shorter" if about["compared_with"] else "the model or the data differ"
    )
    return [f"The exact numbers of Tables 2 and 3: {differs}. Only signs are compared.", *_CANNOT]


def _machine(result: Mapping[str, Any]) -> str:
    known = result["provenance"]
    began, finished = _commit(known), _commit(result["finished_with"])
    parts = [f"{name} {version}" for name, version in known["packages"].items() if version]
    parts += [began] if began else []
    parts += [f"finished with {finished}"] if finished and finished != began else []
    return ", ".join(parts) + "."


def _commit(known: Mapping[str, Any]) -> str:
    git = known["git"] or {}
    return f"commit `{git['commit'][:10]}`{' with changes' if git['dirty'] else ''}" if git.get("commit") else ""


def _how_likely(result: Mapping[str, Any]) -> str:
    likely = math.exp(result["curves"]["orpo"][-1]["chosen_logp"])
    return (
        f"Odds are P / (1 - P), so the two ratios differ only where P is not small; here chosen answers end at P = "
        f"{likely:.2f}, odds of {likely / (1 - likely):.2f}."
    )


def _judge_text(judge: Mapping[str, Any], control: Mapping[str, Any]) -> str:
    one, two = judge[JUDGE], judge[POLICY_REWARD_MODEL]
    blind = " **The judge may be no better than chance, so the win rates show nothing.**" if one["low"] <= 0.5 else ""
    return (
        f"The judge, a reward model, prefers the chosen answer in {100 * one['mean']:.1f} % of held-out pairs "
        f"({100 * one['low']:.1f} to {100 * one['high']:.1f}). RLHF used another reward model, trained with another "
        f"seed: {100 * two['mean']:.1f} % ({100 * two['low']:.1f} to {100 * two['high']:.1f}).{blind} As a control, "
        f"SFT against itself, each round against the next, wins {100 * control['mean']:.1f} % "
        f"({100 * control['low']:.1f} to {100 * control['high']:.1f})."
    )


def _figure6() -> str:
    curves = ratio_simulation.summary(ratio_simulation.simulate())
    spread = "; ".join(f"{c.name}: {c.sample.std:.3f} (exact {c.exact.std:.3f})" for c in curves)
    return f"Standard deviations: {spread}. The odds ratio spreads widest, as in the paper."


def _compute(found: Mapping[str, Any]) -> str:
    passes, measured = published.FORWARD_PASSES, Accounting.of(found)
    return (
        f"The paper (section 7.3): {passes['orpo']} forward passes per pair for ORPO, {passes['dpo']} for DPO. "
        f"Measured on a micro-batch of {measured.pairs} pairs, with the whole model and no adapters:\n\n"
        f"{markdown_table(*accounting_table(measured))}"
    )


def _cost(result: Mapping[str, Any]) -> str:
    commands = result["commands"]
    rows = [[f"training {role}", f"{seconds:.0f}"] for role, seconds in result["seconds"].items()]
    rows.append(["total wall time", f"{sum(commands):.0f}"])
    again = f" The command was run {len(commands)} times." if len(commands) > 1 else ""
    about = f"Training seconds are summed over models, which train in parallel where there is room.{again}"
    return f"{about}\n\n{markdown_table(['step', 'seconds'], rows)}"


def _settings(result: Mapping[str, Any]) -> str:
    about, lengths = result["about"], result["about"]["lengths"]
    cut = ", ".join(f"{name.upper()} {100 * known['unfinished']:.0f} %" for name, known in result["answers"].items())
    drawn = ", ".join(sorted({known["backend"] for known in result["answers"].values()}))
    rows = [
        ["λ", ", ".join(f"{value:g}" for value in about["lambdas"])],
        ["pairs per step", str(about["batch"])],
        *(
            [["pairs for DPO, before those with long prompts are dropped", str(about["dpo_pairs"])]]
            if about["dpo_pairs"]
            else []
        ),
        *([f"length of {role}", ", ".join(f"{k} {v}" for k, v in length.items())] for role, length in lengths.items()),
        ["peak learning rate", ", ".join(f"{role} {lr:g}" for role, lr in about["lr"].items())],
        ["LoRA", json.dumps(about["lora"]) if about["lora"] else "none: all weights are trained"],
        ["matrix multiplications in training", ", ".join(result["products"])],
        ["answers", f"{about['prompts']} prompts, {about['rounds']} rounds, {about['max_new_tokens']} tokens at most"],
        ["answers are sampled with", drawn],
        ["answers cut at that length", cut],
    ]
    return markdown_table(["setting", "value"], rows)


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw_curves(curves: Mapping[str, Any], names: Sequence[str]) -> Figure:
    """Plot held-out log-probabilities of chosen and rejected answers over steps.

    Args:
        curves: from `log_probabilities.curves`.
        names: the models to plot.
    """
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, side, title in zip(axes, ("chosen_logp", "rejected_logp"), ("chosen", "rejected"), strict=True):
        for name, colour in zip(names, _COLOURS, strict=False):
            points = curves[name]
            shown = _SHOWN.get(name, f"λ = {name.removeprefix('orpo-')}")
            axis.plot([p["step"] for p in points], [p[side] for p in points], "o-", color=colour, label=shown, ms=3.5)
        axis.set_title(title, loc="left")
        axis.set_xlabel("optimizer step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="0.9", linewidth=0.8)
    axes[0].set_ylabel("log p, nats per token")
    axes[0].legend(frameon=False)
    return figure


def _save(figure: Figure, path: Path) -> None:
    # Without a date in the metadata, the same numbers give the same file.
    figure.savefig(path, dpi=130, metadata={"Software": None})
