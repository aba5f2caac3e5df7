"""Moments.add and a rule on moments against the eager formulas, and against adding gradients up.

python -m benchmarks.bench_moments --quick
"""

from __future__ import annotations

from functools import partial

import torch

import andmask_ext as am

from .common import Row, measure, parser, run

KINDS: dict[str, tuple[str, ...]] = {
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
    sums = [torch.zeros(size) for _ in range(count)]
    squares = [torch.zeros(size) for _ in range(count)]
    logs = [torch.zeros(size) for _ in range(count)]
    votes = [torch.zeros(size, dtype=torch.int8) for _ in range(count)]

    def first() -> None:  # what is timed is the second environment, whose votes are int8
        moments.reset()
        moments.add(grads)

    def eager() -> None:
        torch._foreach_add_(sums, grads)
        if "votes" in KINDS[kinds]:
            torch._foreach_add_(votes, [sign.to(torch.int8) for sign in torch._foreach_sign(grads)])
        if "squares" in KINDS[kinds]:
            torch._foreach_addcmul_(squares, grads, grads)
        if "logs" in KINDS[kinds]:
            sizes = list(torch._foreach_abs(grads))
            torch._foreach_add_(sizes, 1e-10)
            torch._foreach_log_(sizes)
            torch._foreach_add_(logs, sizes)

    moved = dtype.itemsize + sum(BYTES[kind] for kind in kinds.split(", "))
    return measure(
        f"accumulate {kinds}, {count} x {size} {str(dtype).removeprefix('torch.')}",
        {
            "andmask": lambda: moments.add(grads),
            "eager": eager,
            "adding up": lambda: torch._foreach_add_(sums, grads),
        },
        prepare={"andmask": first},
        bytes_moved=count * size * moved,
        yardstick="adding up",
    )


def resolve(count: int, size: int, rule: am.rules.Rule) -> list[Row]:
    torch.manual_seed(0)
    moments = am.Moments([torch.empty(size) for _ in range(count)], rule.moments or ())
    for _ in range(4):
        moments.add([torch.randn(size) for _ in range(count)])
    sums = [total for total in moments.sum if total is not None]
    return measure(
        f"resolve {rule}, {count} x {size}",
        {
            "andmask": lambda: rule.update(moments),
            "copy of the sums": lambda: [s.clone() for s in sums],
        },
        bytes_moved=count * size * (8 + sum(BYTES[kind] // 2 for kind in moments.kinds)),
        yardstick="copy of the sums",
    )


def main() -> None:
    options = parser(__doc__).parse_args()
    sizes = [(5, 4_000_000), (1000, 20_000), (8, 262_144)]
    if options.quick:
        sizes = sizes[2:]
    dtypes = (torch.float32, torch.bfloat16)
    cases = [
        partial(accumulate, *size, kinds, dtype)
        for size in sizes
        for kinds in KINDS
        for dtype in dtypes
    ]
    rules: list[am.rules.Rule] = [
        am.AndMask(0.5),
        am.AndMask(0.5, rescale=True),
        am.rules.GeometricMean(1.0),
        am.rules.SandMask(0.5, k=1.0),
    ]
    cases += [partial(resolve, *size, rule) for size in sizes for rule in rules]
    run(options, cases)


if __name__ == "__main__":
    main()
