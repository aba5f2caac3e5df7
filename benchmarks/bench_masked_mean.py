"""masked_mean against the eager formula, torch.compile, the authors' code, and one read pass.

    python -m benchmarks.bench_masked_mean --quick
    python -m benchmarks.bench_masked_mean --save before     # writes benchmarks/runs/before.*
    python -m benchmarks.bench_masked_mean --compare before

The yardstick (ratio 1.00) is the floor: `torch.sum` over all of the input, one read pass. What no
implementation can avoid beyond it is writing the output; `torch.sum(grads, 0)` reads and writes
the same bytes as the op and is shown beside it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import andmask_ext as am
from andmask_ext.plots.style import style
from studies.figures import save

from .common import (
    COLOURS,
    RUNS,
    Row,
    Step,
    duration,
    keep,
    markdown,
    measure,
    parser,
    peak_memory,
    run,
)
from .contest.peers import formula

TAU = 0.6
ENVIRONMENTS = [2, 4, 16, 64, 128, 512]
COLUMNS = [64, 4096, 65_536, 1 << 20, 1 << 24]
LARGEST = 1 << 30  # bytes of input; the peers need several times as much
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOOR, SUM, COMPILED, EAGER, AUTHORS = (
    "read pass: torch.sum", "torch.sum(grads, 0)", "torch.compile", "eager", "authors' code"
)  # fmt: skip


def eager(grads: Tensor, tau: float) -> Tensor:
    mask = grads.sign().sum(0).abs() >= tau * grads.shape[0]
    return mask * grads.mean(0)


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
            EAGER: lambda: eager(grads, TAU),
            COMPILED: lambda: compiled(grads, TAU),
            AUTHORS: lambda: formula(torch.stack(rows)),
            SUM: lambda: torch.sum(grads, 0),
            FLOOR: lambda: torch.sum(grads),
        },
        bytes_moved=grads.nbytes,
        yardstick=FLOOR,
    )


def memory(environments: int, columns: int) -> None:
    grads = torch.randn(environments, columns)
    rows = list(grads.unbind())
    contestants: dict[str, Step] = {
        "andmask": lambda: torch.ops.andmask.masked_mean(grads, TAU),
        "andmask, rescale": lambda: torch.ops.andmask.masked_mean(grads, TAU, True),
        EAGER: lambda: eager(grads, TAU),
        AUTHORS: lambda: formula(torch.stack(rows)),
    }
    print(f"\nextra memory at {environments} x {columns:,} float32, MiB (output included):")
    for name, function in contestants.items():
        print(f"  {name:24}{peak_memory(function) / 2**20:10.1f}")


def by_case(rows: list[Row]) -> dict[tuple[str, int], dict[str, Row]]:
    """Return the rows of each case and number of threads, by contestant."""
    cases: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.case, row.threads), {})[row.contestant] = row
    return cases


def parse(case: str) -> tuple[int, int, str]:
    environments, _, columns, dtype = case.split()
    return int(environments), int(columns.replace(",", "")), dtype


def long_table(rows: list[Row]) -> str:
    """Return a line for each case: time of the op, and its ratios to the peers."""
    columns = ["d x P", "dtype", "threads", "andmask", "IQR", "GB/s", "÷ read pass"]
    columns += ["÷ `torch.sum(grads, 0)`", "`torch.compile` ÷", "eager ÷", "authors' code ÷"]
    lines = []
    for (name, threads), row in by_case(rows).items():
        environments, size, dtype = parse(name)
        op = row["andmask"]
        line = [f"{environments} x {size:,}", dtype, threads, duration(op.median)]
        line += [f"{op.iqr / op.median:.0%}", f"{op.gigabytes_per_second:.1f}"]
        line += [f"{op.median / row[peer].median:.2f}" for peer in (FLOOR, SUM)]
        line += [f"{row[peer].median / op.median:.1f}" for peer in (COMPILED, EAGER, AUTHORS)]
        lines.append(line)
    return markdown(columns, lines)


def draw(rows: list[Row], path: Path) -> None:
    """Effective throughput against the size of the input, one panel for each d (float32)."""
    threads = rows[-1].threads
    rows = [row for row in rows if row.threads == threads and row.case.endswith("float32")]
    panels = sorted({parse(row.case)[0] for row in rows} - {8})
    looks = {FLOOR: COLOURS[5], "andmask": COLOURS[0], SUM: COLOURS[3], COMPILED: COLOURS[4]}
    with style():
        figure = Figure(figsize=(9, 5.2), layout="constrained")
        axes = figure.subplots(2, -(-len(panels) // 2), sharex=True, sharey=True, squeeze=False)
        for axis, environments in zip(axes.flat, panels, strict=False):
            for name, colour in (looks | {EAGER: COLOURS[2]}).items():
                own = [r for r in rows if r.contestant == name and parse(r.case)[0] == environments]
                axis.plot(
                    [parse(row.case)[1] * environments * 4 / 2**20 for row in own],
                    [row.gigabytes_per_second for row in own],
                    color=colour,
                    marker="o",
                    markersize=3,
                    linewidth=2.2 if name == "andmask" else 1.2,
                    linestyle="--" if name == FLOOR else "-",
                    label=name,
                )
            axis.set(xscale="log", yscale="log", title=f"{environments} environments")
            axis.grid(alpha=0.25)
        for axis in axes[-1]:
            axis.set_xlabel("input (MiB)")
        for axis in axes[:, 0]:
            axis.set_ylabel("input read (GB/s)")
        legend = axes.flat[0].get_legend_handles_labels()
        figure.legend(*legend, loc="outside lower center", ncols=5)
        figure.suptitle(f"masked_mean, float32, {threads} thread(s), {rows[0].isa}")
        save(figure, path)


def main() -> None:
    options = parser(__doc__).parse_args()
    sizes = [(8, 64)] + [
        (environments, columns)
        for environments in ENVIRONMENTS
        for columns in COLUMNS
        if environments * columns * 4 <= LARGEST
    ]
    if options.quick:
        sizes = [(8, 64), (16, 65_536), (4, 1 << 22), (64, 1 << 20), (512, 65_536)]
    dtypes = ["float32"] if options.quick else list(DTYPES)
    rows = run(options, [partial(case, *size, dtype) for dtype in dtypes for size in sizes])
    if options.save:
        print(f"table   {keep(f'{options.save}.md', long_table(rows))}")
        draw(rows, RUNS / f"{options.save}.png")
        print(f"figure  {RUNS / f'{options.save}.png'}")
    memory(64, 1 << 20)


if __name__ == "__main__":
    main()
