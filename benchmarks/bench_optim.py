"""optimizer.step(), resolving included, against the fused step of torch.optim.

python -m benchmarks.bench_optim --quick
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import andmask_ext as am

from .common import Row, Step, measure, parser, peak_memory, run

ENVIRONMENTS = 8
TOTAL = 20_000_000
Params = list[nn.Parameter]
# The fused optimizer, ours, and the bytes of a parameter that ours moves.
PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "AdamW": (torch.optim.AdamW, am.optim.AndMaskAdamW, 29),
    "Adam": (torch.optim.Adam, am.optim.AndMaskAdam, 29),
    "SGD": (
        partial(torch.optim.SGD, momentum=0.9),
        partial(am.optim.AndMaskSGD, momentum=0.9),
        21,
    ),
}


def parameters(count: int, dtype: torch.dtype) -> Params:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(TOTAL // count).to(dtype)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def environments(optimizer: Any, params: Params) -> Step:
    """Return what brings the environments of a step; it is not timed."""
    grads = [[torch.randn_like(param) for param in params] for _ in range(2)]

    def bring() -> None:
        for number in range(ENVIRONMENTS):
            with optimizer.environment(micro_batches=None):
                for param, grad in zip(params, grads[number % 2], strict=True):
                    param.grad = grad

    return bring


def case(count: int, name: str, dtype: torch.dtype = torch.float32) -> list[Row]:
    theirs, ours, moved = PAIRS[name]
    yardstick = f"torch {name}(fused)"
    steps: dict[str, Step] = {yardstick: theirs(parameters(count, dtype), lr=1e-3, fused=True).step}
    prepare: dict[str, Step] = {}
    for suffix, rescale in (("", False), (", rescale", True)):
        params = parameters(count, dtype)
        optimizer = ours(params, lr=1e-3, tau=0.6, rescale=rescale)
        for param in params:
            param.grad = None
        steps[f"AndMask{name}{suffix}"] = optimizer.step
        prepare[f"AndMask{name}{suffix}"] = environments(optimizer, params)
    return measure(
        f"{name}, {count} x {TOTAL // count}{' bfloat16' if dtype == torch.bfloat16 else ''}",
        steps,
        prepare=prepare,
        bytes_moved=TOTAL * moved,
        yardstick=yardstick,
    )


def temporal(count: int) -> list[Row]:
    ours = am.optim.TemporalAndMaskAdam(parameters(count, torch.float32), tau=0.5)
    return measure(
        f"temporal Adam, {count} x {TOTAL // count}",
        {
            "torch Adam(fused)": torch.optim.Adam(
                parameters(count, torch.float32), fused=True
            ).step,
            "TemporalAndMaskAdam": ours.step,
        },
        bytes_moved=TOTAL * 36,
        yardstick="torch Adam(fused)",
    )


def clipping(count: int) -> list[Row]:
    """Clipping by the total norm: in the step, or of gradients that are written for it."""
    params = parameters(count, torch.float32)
    torch_step = torch.optim.AdamW(params, lr=1e-3, fused=True).step
    yardstick = "torch clip, AdamW(fused)"

    def clip_and_step(params: Params, write: Step, step: Step) -> Step:
        def run() -> None:
            write()
            nn.utils.clip_grad_norm_(params, 1.0)
            step()

        return run

    steps: dict[str, Step] = {yardstick: clip_and_step(params, lambda: None, torch_step)}
    prepare: dict[str, Step] = {}
    for name, max_norm in (
        ("AndMaskAdamW, no clipping", None),
        ("AndMaskAdamW, max_norm", 1.0),
        ("AndMaskAdamW, by hand", None),
    ):
        params = parameters(count, torch.float32)
        optimizer = am.optim.AndMaskAdamW(params, lr=1e-3, tau=0.6, max_norm=max_norm)
        for param in params:
            param.grad = None
        prepare[name] = environments(optimizer, params)
        steps[name] = optimizer.step
        if name.endswith("by hand"):
            steps[name] = clip_and_step(params, optimizer.write_grads, optimizer.step)
    rows = measure(
        f"AdamW with clipping, {count} x {TOTAL // count}",
        steps,
        prepare=prepare,
        bytes_moved=TOTAL * (29 + 5),
        yardstick=yardstick,
        clock=time.thread_time if torch.get_num_threads() == 1 else time.perf_counter,
    )
    for row in rows:  # what a step takes on top of parameters, state, and gradients or moments
        before = prepare.get(row.contestant, lambda: None)
        peak = peak_memory(steps[row.contestant], before)
        row.megabytes, row.memory_ratio = peak / 2**20, peak / (4 * TOTAL)  # one gradient: 1
    return rows


def main() -> None:
    options = parser(__doc__).parse_args()
    counts = (5, 1000)
    cases: list[Callable[[], list[Row]]] = [partial(case, count, "AdamW") for count in counts]
    cases += [partial(clipping, count) for count in counts]
    if not options.quick:
        cases += [partial(case, count, name) for name in ("Adam", "SGD") for count in counts]
        cases.append(partial(case, 5, "AdamW", torch.bfloat16))
        cases += [partial(temporal, count) for count in counts]
    run(options, cases)


if __name__ == "__main__":
    main()
