"""optimizer.step(), resolving included, against the fused step of torch.optim.

python benchmarks/bench_optim.py --quick
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import andmask_ext as am

from .common import Row, measure, parser, run

ENVIRONMENTS = 8
TOTAL = 20_000_000


def parameters(count: int, dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(TOTAL // count).to(dtype)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def ready(optimizer: am.optim.AndMaskSGD) -> Callable[[], object]:
    """Return a step that finds environments each time, though only the first calls brought any."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = None
    for _ in range(ENVIRONMENTS):
        with optimizer.environment(micro_batches=None):
            for param in params:
                param.grad = torch.randn_like(param)
    (moments,) = optimizer._moments
    touched = list(moments._touched)

    def step() -> None:
        optimizer._environments = moments.count = ENVIRONMENTS
        moments._touched[:] = touched
        optimizer.step()

    return step


def case(count: int, name: str, dtype: torch.dtype = torch.float32) -> list[Row]:
    build: dict[str, tuple[Callable, Callable]] = {
        "AdamW": (
            lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
            lambda p, **o: am.optim.AndMaskAdamW(p, lr=1e-3, tau=0.6, **o),
        ),
        "Adam": (
            lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
            lambda p, **o: am.optim.AndMaskAdam(p, lr=1e-3, tau=0.6, **o),
        ),
        "SGD": (
            lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
            lambda p, **o: am.optim.AndMaskSGD(p, lr=1e-3, momentum=0.9, tau=0.6, **o),
        ),
    }
    theirs, ours = build[name]
    rows = measure(
        f"{name}, {count} x {TOTAL // count}{' bfloat16' if dtype == torch.bfloat16 else ''}",
        {
            f"torch {name}(fused)": theirs(parameters(count, dtype)).step,
            f"AndMask{name}": ready(ours(parameters(count, dtype))),
            f"AndMask{name}, rescale": ready(ours(parameters(count, dtype), rescale=True)),
        },
        bytes_moved=TOTAL * (29 if name != "SGD" else 21),
        yardstick=f"torch {name}(fused)",
    )
    return rows


def temporal(count: int) -> list[Row]:
    return measure(
        f"temporal Adam, {count} x {TOTAL // count}",
        {
            "torch Adam(fused)": torch.optim.Adam(
                parameters(count, torch.float32), fused=True
            ).step,
            "TemporalAndMaskAdam": am.optim.TemporalAndMaskAdam(
                parameters(count, torch.float32)
            ).step,
        },
        bytes_moved=TOTAL * 36,
        yardstick="torch Adam(fused)",
    )


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    cases: list[Callable[[], list[Row]]] = [
        lambda count=count: case(count, "AdamW") for count in (5, 1000)
    ]
    if not options.quick:
        cases += [
            lambda name=name, count=count: case(count, name)
            for name in ("Adam", "SGD")
            for count in (5, 1000)
        ]
        cases.append(lambda: case(5, "AdamW", torch.bfloat16))
        cases += [lambda count=count: temporal(count) for count in (5, 1000)]
    run(options, cases)


if __name__ == "__main__":
    main()
