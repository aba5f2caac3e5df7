"""A threshold that sets itself against the same step with tau.

python -m benchmarks.bench_thresholds --quick

Whole training steps of the benchmark networks, and optimizer steps alone on few large and on many
small tensors. The votes are those of the networks; alone they are noise with some signals, and a
few rounds of the search for the threshold pass over them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import andmask_ext as am

from .common import Row, Step, measure, parser, run
from .contest.models import loss, setting

TAU = "tau"
TESTS: dict[str, dict[str, Any]] = {
    TAU: {"tau": 0.6},
    "fdr": {"fdr": 0.005},
    "significance": {"significance": 0.01},
    "fdr, zeros abstain": {"fdr": 0.005, "zeros": "abstain"},
}
# The same for the op alone: level, criterion, whether zeros abstain.
ARGUMENTS = {
    TAU: ([0.6], False),
    "fdr": ([0.005, 2.0, 0.0], False),
    "significance": ([0.01, 1.0, 0.0], False),
    "fdr, zeros abstain": ([0.005, 2.0, 1.0], True),
}
ENVIRONMENTS = 32
ops = torch.ops.andmask


def clock() -> Callable[[], float]:
    """Return the clock of the thread where there is only one: it leaves out other programs."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def alone(count: int, size: int, rescale: bool) -> list[Row]:
    """Measure the fused step of AdamW on moments that stay as they are."""
    generator = torch.Generator().manual_seed(0)
    sums = [torch.randn(size, generator=generator) for _ in range(count)]
    # Of 32 fair signs, with a few zeros and a few coordinates on which nearly all agree.
    voters = [torch.full((size,), ENVIRONMENTS, dtype=torch.int8) for _ in range(count)]
    votes = [(s * ENVIRONMENTS**0.5 / 2).round().clamp(-16, 16).mul(2).to(torch.int8) for s in sums]
    for some in votes:
        some[torch.rand(size, generator=generator) < 0.05] = 30
    steps: dict[str, Step] = {}
    for name, (arguments, abstain) in ARGUMENTS.items():
        state = [[torch.zeros(size) for _ in range(count)] for _ in range(3)]
        counts = [torch.zeros(()) for _ in range(count)]
        moments: tuple[Any, ...] = (sums, votes, [], [], voters if abstain else [], ENVIRONMENTS)
        steps[name] = partial(
            ops._adam_step_, *state, [], counts, *moments, "and_mask", arguments, rescale,
            lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2,
            decoupled_weight_decay=True, maximize=False,
        )  # fmt: skip
    return measure(
        f"AdamW alone, {count} x {size}{', rescale' if rescale else ''}",
        steps,
        bytes_moved=count * size * 29,
        yardstick=TAU,
        clock=clock(),
    )


def training(model: str, environments: int | None) -> list[Row]:
    """Measure forward, backward and step; each example an environment, or equal groups."""
    steps: dict[str, Step] = {}
    size = 0
    for name, test in TESTS.items():
        network, batch = setting(model)
        size = sum(param.numel() for param in network.parameters())
        optimizer = am.optim.AndMaskAdamW(network.parameters(), lr=1e-4, **test)
        agreement = am.Agreement(network, optimizer)

        def step(
            network: Any = network, batch: Any = batch, agreement: Any = agreement,
            optimizer: Any = optimizer,
        ) -> None:  # fmt: skip
            with agreement(environments):
                loss(network, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[name] = step
    kind = "each example" if environments is None else f"{environments} groups"
    return measure(f"{model}, {kind}", steps, bytes_moved=29 * size, yardstick=TAU, clock=clock())


def main() -> None:
    options = parser(__doc__).parse_args()
    cases: list[Callable[[], list[Row]]] = [
        partial(alone, count, size, rescale)
        for count, size in ((1000, 256), (1000, 20_000), (5, 4_000_000))
        for rescale in (False, True)
        if not (options.quick and (rescale or size > 100_000))
    ]
    models = ("MLP",) if options.quick else ("MLP", "CNN", "transformer", "ResNet-9")
    cases += [partial(training, model, d) for model in models for d in (None, 16)]
    run(options, cases)


if __name__ == "__main__":
    main()
