"""accumulate_ and resolve against the eager formulas, and against adding gradients up.

python benchmarks/bench_moments.py --quick
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import andmask_ext as am

from .common import Row, measure, parser, run

KINDS = {
    "sum": (),
    "sum, votes": ("votes",),
    "sum, votes, squares": ("votes", "squares"),
    "sum, votes, logs": ("votes", "logs"),
}
BYTES = {"sum": 8, "votes": 2, "squares": 8, "logs": 8}  # read and written for each coordinate


def accumulate(count: int, size: int, kinds: str, dtype: torch.dtype) -> list[Row]:
    torch.manual_seed(0)
    params = [torch.empty(size, dtype=dtype) for _ in range(count)]
    grads = [torch.randn(size).to(dtype) for _ in range(count)]
    moments = am.Moments(params, KINDS[kinds])
    moments.add(grads)
    sums = [torch.zeros(size) for _ in range(count)]
    squares = [torch.zeros(size) for _ in range(count)]
    logs = [torch.zeros(size) for _ in range(count)]
    votes = [torch.zeros(size, dtype=torch.int8) for _ in range(count)]

    def ours() -> None:
        moments.count = 1  # votes stay int8 however often this is called
        moments.add(grads)

    def eager() -> None:
        torch._foreach_add_(sums, grads)
        if "votes" in KINDS[kinds]:
            torch._foreach_add_(votes, [sign.to(torch.int8) for sign in torch._foreach_sign(grads)])
        if "squares" in KINDS[kinds]:
            torch._foreach_addcmul_(squares, grads, grads)
        if "logs" in KINDS[kinds]:
            size_: list[Tensor] = torch._foreach_abs(grads)
            torch._foreach_add_(size_, 1e-10)
            torch._foreach_log_(size_)
            torch._foreach_add_(logs, size_)

    return measure(
        f"accumulate {kinds}, {count} x {size} {str(dtype).removeprefix('torch.')}",
        {"andmask": ours, "eager": eager, "adding up": lambda: torch._foreach_add_(sums, grads)},
        bytes_moved=count
        * size
        * (dtype.itemsize + sum(BYTES[kind] for kind in kinds.split(", "))),
        yardstick="adding up",
    )


def resolve(count: int, size: int, rule: am.rules.Rule) -> list[Row]:
    torch.manual_seed(0)
    params = [torch.empty(size) for _ in range(count)]
    moments = am.Moments(params, rule.moments or ())
    for _ in range(4):
        moments.add([torch.randn(size) for _ in range(count)])
    sums = [total for total in moments.sum if total is not None]
    return measure(
        f"resolve {rule}, {count} x {size}",
        {
            "andmask": lambda: rule.resolve(moments),
            "copy of the sums": lambda: [s.clone() for s in sums],
        },
        bytes_moved=count * size * (8 + sum(BYTES[kind] // 2 for kind in moments.kinds)),
        yardstick="copy of the sums",
    )


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    sizes = [(5, 4_000_000), (1000, 20_000), (8, 262_144)]
    if options.quick:
        sizes = sizes[2:]
    cases: list[Callable[[], list[Row]]] = [
        lambda size=size, kinds=kinds, dtype=dtype: accumulate(*size, kinds, dtype)
        for size in sizes
        for kinds in KINDS
        for dtype in (torch.float32, torch.bfloat16)
    ]
    rules = [
        am.AndMask(0.5),
        am.AndMask(0.5, rescale=True),
        am.rules.GeometricMean(),
        am.rules.SandMask(0.5, k=1.0),
    ]
    cases += [lambda size=size, rule=rule: resolve(*size, rule) for size in sizes for rule in rules]
    run(options, cases)


if __name__ == "__main__":
    main()
