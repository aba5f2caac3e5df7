"""masked_mean against the eager formula, torch.compile, the authors' code, and one read pass.

    python benchmarks/bench_masked_mean.py --quick
    python benchmarks/bench_masked_mean.py --save before     # then change something
    python benchmarks/bench_masked_mean.py --compare before

The yardstick (ratio 1.00) is the floor: `torch.sum` over all of the input, one read pass. What no
implementation can avoid beyond it is writing the output; `torch.sum(grads, 0)` reads and writes
the same bytes as the op and is shown beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

import andmask_ext as am

from .common import Row, measure, parser, peak_memory, run

TAU = 0.6
ENVIRONMENTS = [2, 4, 16, 64, 128, 512]
COLUMNS = [64, 4096, 65_536, 1 << 20, 1 << 24]
LARGEST = 1 << 30  # bytes of input; the peers need several times as much
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def eager(grads: Tensor, tau: float) -> Tensor:
    mask = grads.sign().sum(0).abs() >= tau * grads.shape[0]
    return mask * grads.mean(0)


def authors(grads: list[Tensor], tau: float) -> Tensor:
    """Stack, sign, mean, compare, multiply: the released code's steps, on a list of gradients."""
    stacked = torch.stack(grads)
    mask = stacked.sign().mean(0).abs() >= tau
    return mask.to(stacked.dtype) * stacked.mean(0)


def case(environments: int, columns: int, dtype: str) -> list[Row]:
    torch.manual_seed(0)
    grads = torch.randn(environments, columns).to(DTYPES[dtype])
    rows = list(grads.unbind())
    torch._dynamo.reset()
    compiled = torch.compile(eager, dynamic=False)
    op = torch.ops.andmask.masked_mean
    return measure(
        f"{environments} x {columns:,} {dtype}",
        {
            "andmask": lambda: op(grads, TAU),
            "andmask, rescale": lambda: op(grads, TAU, True),
            "andmask_ext.ops": lambda: am.ops.masked_mean(grads, TAU),
            "eager": lambda: eager(grads, TAU),
            "torch.compile": lambda: compiled(grads, TAU),
            "authors' code": lambda: authors(rows, TAU),
            "torch.sum(grads, 0)": lambda: torch.sum(grads, 0),
            "read pass: torch.sum": lambda: torch.sum(grads),
        },
        bytes_moved=grads.numel() * grads.element_size(),
        yardstick="read pass: torch.sum",
    )


def memory(environments: int, columns: int) -> None:
    grads = torch.randn(environments, columns)
    rows = list(grads.unbind())
    print(f"\nextra memory at {environments} x {columns:,} float32, MiB (output included):")
    for name, function in {
        "andmask": lambda: torch.ops.andmask.masked_mean(grads, TAU),
        "andmask, rescale": lambda: torch.ops.andmask.masked_mean(grads, TAU, True),
        "eager": lambda: eager(grads, TAU),
        "authors' code": lambda: authors(rows, TAU),
    }.items():
        print(f"  {name:24}{peak_memory(function) / 2**20:10.1f}")


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    sizes = [(8, 64)] + [
        (environments, columns)
        for environments in ENVIRONMENTS
        for columns in COLUMNS
        if environments * columns * 4 <= LARGEST
    ]
    if options.quick:
        sizes = [(8, 64), (16, 65_536), (4, 1 << 22), (64, 1 << 20), (512, 65_536)]
    dtypes = ["float32"] if options.quick else list(DTYPES)
    cases = [
        lambda environments=environments, columns=columns, dtype=dtype: case(
            environments, columns, dtype
        )
        for dtype in dtypes
        for environments, columns in sizes
    ]
    run(options, cases)
    memory(64, 1 << 20)


if __name__ == "__main__":
    main()
