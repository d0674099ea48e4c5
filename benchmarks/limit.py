"""How near a step of ours comes to the machine's own matrix products, and where the rest of its time goes.

    python -m benchmarks.limit --precision fp32              # batch 8 of HH-RLHF
    python -m benchmarks.limit --precision bf16 --data long
    python -m benchmarks.limit --quick                       # tiny: does it run?

The limit: every product of the forward and the backward pass at the rate that the machine reaches on that very product,
measured before and after the steps. Writes benchmarks/results/limit-<device>.json; `python -m benchmarks.report` puts
it into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.case import Case
from benchmarks.rounds import RESULTS, described, require_device, save
from benchmarks.steps import prepare_process

if TYPE_CHECKING:
    import torch

    from benchmarks.flops import Shape

HEAD_ROWS = 1024
"""Rows of the head's products that are timed; more of them take memory, not speed."""
SQUARE = 2048
_SECONDS_PER_PRODUCT = 0.3
_GROUPS = {
    "matrix products": {"mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "mkldnn_linear", "matmul"},
    "softmax of the vocabulary": {"logsumexp", "amax", "exp_", "exp", "sub_", "gather", "scatter_add_", "log_softmax"},
    "copies and casts": {
        "copy_",
        "cat",
        "clone",
        "contiguous",
        "index",
        "index_select",
        "fill_",
        "zero_",
        "index_put_",
    },
    "clipping and AdamW": {"_fused_adamw_", "_foreach_norm", "linalg_vector_norm", "_foreach_mul_"},
}
"""Group -> names of operators; the attention kernels are told by their name, all else is element-wise."""


def main(words: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limit", description=__doc__.splitlines()[0])
    default = Case()
    parser.add_argument("--model", default=default.model)
    parser.add_argument("--data", default=default.data, help="as in benchmarks.steps")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=default.precision)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--max-tokens-per-micro-batch", type=int)
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--threads", type=int, default=default.threads)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default.device)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one step")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    words = sys.argv[1:] if words is None else words
    options = parser.parse_args(words)
    case = Case(**{name: value for name, value in vars(options).items() if name not in ("quick", "results")})
    if options.quick:
        case = replace(case, model="tiny-llama-1m", data="builtin://style-pairs", steps=1, threads=1)
    require_device(case.device)
    facts = described(shlex.join(["python", "-m", "benchmarks.limit", *words]))
    content = measure(case)
    name = "quick" if options.quick else f"{case.data}-{case.batch}-{case.precision}"
    save(f"limit-{case.device}", name, content | {"made": facts}, options.results)
    show(content, Console())
    return 0


def measure(case: Case) -> dict[str, Any]:
    """Products, steps, products again, and one step under the profiler; in this process."""
    prepare_process(case)
    import torch

    from benchmarks import ours_side
    from benchmarks.flops import parts, shape_of
    from benchmarks.probe import Probe
    from orpo_ray.training.metrics import PairSums

    shape, probe = shape_of(case), Probe(case.device)
    with ours_side.started(case) as trial:
        batches = list(trial.batches(1, case.steps + 2))
        passes = [each.batch.input_ids_RT.numel() for _, whole in batches for each in whole.passes]
        tokens = int(median(passes))
        before = products(shape, tokens, case)
        sums = PairSums.zeros(trial.engine.device)
        probe.start()
        for at, batch in batches[:-1]:
            trial.step(batch, 1e-6, sums, at)
            probe.step_done()
        after = products(shape, tokens, case)
        at, last = batches[-1]
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CUDA if case.device == "cuda" else activity.CPU]) as profiler:
            trial.step(last, 1e-6, sums, at)
        pairs, needed = trial.train_pairs, dict.fromkeys(("linear layers", "head", "attention"), 0.0)
        for _, batch in batches[1:-1]:
            for lengths in pairs.lengths_N3[batch.indices]:
                for part, operations in parts(shape, *map(int, lengths)).items():
                    needed[part] += operations
    seconds = sum(probe.seconds[1:])
    rates = {kind: (before[kind] + after[kind]) / 2 for kind in before}
    possible = (needed["linear layers"] + needed["head"]) / (
        needed["linear layers"] / rates["linear layers"] + needed["head"] / rates["head"]
    )
    achieved = sum(needed.values()) / seconds
    return {
        "case": case.as_json(),
        "tokens_per_pass": passes,
        "timed_at_tokens": tokens,
        "seconds": probe.seconds[1:],
        "gflop": {part: operations / 1e9 for part, operations in needed.items()},
        "products_gflops": {"before": _giga(before), "after": _giga(after)},
        "possible_gflops": possible / 1e9,
        "achieved_gflops": achieved / 1e9,
        "fraction": achieved / possible,
        "profile": profile(profiler, case.device),
    }


def products(shape: Shape, tokens: int, case: Case) -> dict[str, float]:
    """Operations per second of matrix products alone, in the case's precision.

    Args:
        shape: of the model.
        tokens: rows of the linear layers' products.
        case: precision, device.

    Returns:
        `linear layers` and `head`: all three products (forward, gradient of the input, gradient of the weight) of all
        layers together; `square`: one large product, for orientation.
    """
    linear = sum(number * _triple(tokens, fan_in, fan_out, case) for fan_in, fan_out, number in shape.linears)
    head = _triple(HEAD_ROWS, shape.width, shape.vocabulary, case)
    square = _triple(SQUARE, SQUARE, SQUARE, case)
    return {
        "linear layers": 6.0 * tokens * shape.linear_parameters / linear,
        "head": 6.0 * HEAD_ROWS * shape.width * shape.vocabulary / head,
        "square": 6.0 * SQUARE**3 / square,
    }


def _triple(rows: int, fan_in: int, fan_out: int, case: Case) -> float:
    """Seconds of x Wᵀ, dy W and dyᵀ x."""
    import torch

    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    x, weight, dy = (
        torch.randn(shape, device=case.device).to(dtype)
        for shape in ((rows, fan_in), (fan_out, fan_in), (rows, fan_out))
    )
    return sum(
        _seconds(product, case.device) for product in (lambda: x @ weight.T, lambda: dy @ weight, lambda: dy.T @ x)
    )


def _seconds(product: Callable[[], torch.Tensor], device: str) -> float:
    """Median over single calls on a CPU, over groups of ten on a device whose queue must not run dry."""
    import torch

    group = 10 if device == "cuda" else 1
    for _ in range(3):
        product()
    times: list[float] = []
    ends = time.perf_counter() + _SECONDS_PER_PRODUCT
    while len(times) < 5 or time.perf_counter() < ends:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(group):
            product()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / group)
    return median(times)


def profile(profiler: Any, device: str) -> dict[str, Any]:
    """Self time of the profiled step by group and by operator, in shares of all of it."""
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events)
    groups: dict[str, float] = {}
    for event in events:
        group = group_of(event.key)
        groups[group] = groups.get(group, 0.0) + getattr(event, name) / total
    operators = [
        {"name": e.key, "calls": e.count, "milliseconds": getattr(e, name) / 1e3, "share": getattr(e, name) / total}
        for e in events[:20]
    ]
    ordered = sorted(groups.items(), key=lambda item: -item[1])
    return {"milliseconds": total / 1e3, "groups": dict(ordered), "operators": operators}


def group_of(operator: str) -> str:
    """The group that an operator's time is counted under."""
    plain = operator.removeprefix("aten::")
    if "attention" in plain or "flash" in plain or "flex" in plain:
        return "attention"
    if "gemm" in plain.lower() or "cutlass" in plain:  # CUDA kernels go by other names
        return "matrix products"
    return next((group for group, names in _GROUPS.items() if plain in names), "element-wise and other")


def show(content: dict[str, Any], console: Console) -> None:
    """Rates, fraction and profile."""
    case = content["case"]
    console.print(
        f"{case['data']}, batch {case['batch']}, {case['precision']}: {content['achieved_gflops']:.0f} GFLOP/s of "
        f"{content['possible_gflops']:.0f} that its matrix products reach alone: {content['fraction']:.1%} "
        "(target 70 %)",
        highlight=False,
    )
    for when, rates in content["products_gflops"].items():
        console.print(f"  products {when}: " + ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in rates.items()))
    shown = Table(title="one step under the profiler", title_justify="left")
    for column in ("operator", "calls", "ms", "share"):
        shown.add_column(column, justify="left" if column == "operator" else "right")
    for group, share in content["profile"]["groups"].items():
        shown.add_row(group, "", "", f"{share:.1%}", style="bold")
    shown.add_section()
    for operator in content["profile"]["operators"]:
        shown.add_row(
            operator["name"], str(operator["calls"]), f"{operator['milliseconds']:.0f}", f"{operator['share']:.1%}"
        )
    console.print(shown)


def _giga(rates: dict[str, float]) -> dict[str, float]:
    return {kind: rate / 1e9 for kind, rate in rates.items()}


if __name__ == "__main__":
    sys.exit(main())
