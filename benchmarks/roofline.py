"""What the ops have to move and to compute, and how long that takes at least: tables and a figure.

    python -m benchmarks.bench_cuda --save NAME
    python -m benchmarks.roofline NAME              # prints the tables of docs/cuda.md
    python -m benchmarks.roofline NAME --figure PATH

An op has to read its inputs and to write its results once, and it has instructions to issue for
each unit (a coordinate, or an element of the input). The longer of the two is the prediction.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import COLOURS, RUNS, duration, markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = Mapping[str, Any]  # what bench_cuda has kept


@dataclass(frozen=True)
class Work:
    """One op on one size. What is counted stands in docs/cuda.md."""

    op: str
    size: str
    units: int  # coordinates, or elements of the input
    bytes: float  # of a unit, read and written once
    # Of a unit: instructions at the rate of a float32 addition. A comparison, an addition of
    # integers and a conversion go at half that rate on a GPU and count 2 there, 1 on a CPU.
    gpu: float
    cpu: float
    product: bool = False  # instructions are multiply-adds of matrices
    kind: str = "float32"  # of multiply-add

    @property
    def total_bytes(self) -> float:
        return self.units * self.bytes

    @property
    def multiply_adds(self) -> float:
        return self.units * self.gpu


def stacked(op: str, size: tuple[int, int], item: int, out: int, gpu: float, cpu: float) -> Work:
    """An op on d stacked gradients: a unit is one element of them."""
    environments, columns = size
    kind = " bfloat16" if item == 2 else ""
    return Work(
        op + kind,
        f"{environments} x {columns:,}",
        environments * columns,
        item + out / environments,
        gpu,
        cpu,
    )


def works(place: str) -> dict[str, Work]:
    """Return the cases by name, in the sizes for a `cpu`, a `quick` look at one, or `cuda`."""
    million = 1 << 20
    columns, tensors, each = {
        "quick": (million, 4, million),
        "cpu": (4 * million, 5, 4 * million),
        "cuda": (16 * million, 8, 16 * million),
    }[place]
    few = (16, columns)
    medians = {
        "quick": [(32, 65_536), (128, 16_384)],
        "cpu": [(32, million), (128, million // 4)],
        "cuda": [(32, 8 * million), (128, 2 * million)],
    }[place]
    found = [
        stacked("masked_mean", few, 4, 4, 10, 5),
        stacked("masked_mean", few, 2, 2, 11, 6),
        stacked("masked_mean, rescale", few, 4, 12, 10, 5),
        stacked("agreement_mask", few, 4, 4, 10, 4),
    ]
    for size in medians:
        # The comparators of a sorting network, two instructions each; half as much again for NaN
        # and for ranks that are not there. With many environments a GPU looks for the middle bit by
        # bit instead: about 16 passes of 23, and a last one of 44.
        network = {32: 191, 128: 1471}[size[0]] * 2 / size[0]
        gpu = 48 if size[0] <= 32 else 412
        found.append(stacked(f"Median d={size[0]}", size, 4, 4, gpu, network + 2))
    lists, shape = tensors * each, f"{tensors} x {each:,}"
    found += [
        Work("accumulate_ sum, votes", shape, lists, 4 + 8 + 2, 11, 6),
        Work("resolve AndMask", shape, lists, 4 + 1 + 4, 8, 4),
        Work("sgd_step_", shape, lists, 4 + 1 + 8 + 8, 14, 10),
        Work("adam_step_", shape, lists, 4 + 1 + 8 + 8 + 8, 45, 40),
        Work("temporal_adam_step_", shape, lists, 4 + 8 + 8 + 8 + 8, 55, 48),
    ]
    rows, inputs, outputs = {
        "quick": (128, 1024, 1024),
        "cpu": (512, 1024, 1024),
        "cuda": (8192, 4096, 4096),
    }[place]
    for kind, item in (("float32", 4), ("bfloat16", 2)):
        for each_rows in (1, 16, 64):
            weights = inputs * outputs
            found.append(
                Work(
                    f"accumulate_outer_ {each_rows} row{'s' * (each_rows > 1)}"
                    + (" bfloat16" if item == 2 else ""),
                    f"{rows // each_rows} x {each_rows} rows, {inputs} to {outputs}",
                    weights,
                    10 + item * rows * (inputs + outputs) / weights,
                    rows,
                    rows,
                    product=True,
                    kind=kind,
                )
            )
    images, channels, side = {"quick": (16, 64, 16), "cpu": (80, 128, 16), "cuda": (256, 256, 28)}[
        place
    ]
    weights = channels * channels * 9
    found.append(
        Work(
            "accumulate_convolution_",
            f"{images} images {side} x {side}, 3 x 3, {channels} to {channels}",
            weights,
            10 + 4 * 2 * images * channels * side * side / weights,
            images * side * side,
            images * side * side,
            product=True,
        )
    )
    return {work.op: work for work in found}


# ---- H100 SXM, by its data sheet ----

COPY = 0.9 * 3.35e12  # bytes a second; a copy reaches about nine tenths of the memory's rate
L2 = 5.5e12
INSTRUCTIONS = 33.5e12  # a second, float32: 67 TFLOP/s
TENSOR = {"bfloat16": 989e12 / 2, "int8": 1979e12 / 2}  # multiply-adds a second
TILE = 64  # outputs and columns of a block of accumulate_outer_
# What a thread of the tile kernel issues for each product of a weight and a row. Counted in the
# machine code for sm_90: a stage of 16 rows (signs: 32) and 32 weights takes 1000 instructions
# in float32, 330 of them to fetch it, 600 (440) in 16 bits, and 1100 for signs. Convolutions read
# single elements, and check each against the border.
ISSUED = {"float32": 1000 / 512, "bfloat16": 600 / 512, "signs": 1100 / 1024, "convolution": 3.0}
VOTE = 10  # with what is added to the sum; counted likewise, those at half the rate twice


def h100(work: Work) -> tuple[float, str]:
    """Return the predicted seconds, and by what they are bound."""
    memory = work.total_bytes / COPY
    if not work.product:
        issue = work.units * work.gpu / INSTRUCTIONS
        return max((memory, "memory"), (issue, "instructions"))
    rows, item = work.gpu, 2 if work.kind == "bfloat16" else 4
    if "convolution" in work.op:
        votes, issued, passes = VOTE * float(work.size.split()[0]), ISSUED["convolution"], 1
    elif (each := int(work.op.split()[1])) > 1:
        votes, issued, passes = VOTE * rows / each, ISSUED[work.kind], 1
    else:  # one row: votes are a product of their own
        votes, issued, passes = 0, ISSUED[work.kind] + ISSUED["signs"], 2
    through_l2 = passes * rows * 2 * item / TILE / L2
    tensor = rows / TENSOR["bfloat16"] if item == 2 else 0
    return max(
        (memory, "memory"),
        (work.units * through_l2, "L2"),
        (work.units * tensor, "tensor cores"),
        (work.units * (rows * issued + votes) / INSTRUCTIONS, "instructions"),
    )


# ---- the CPU, as measured ----


def cpu(work: Work, facts: Mapping[str, float]) -> tuple[float, str]:
    """As `h100`; `facts`: measured copy (bytes/s) and multiply-adds (of float32, a second)."""
    memory = work.total_bytes / facts["copy"]
    issue = work.units * work.cpu / facts["multiply_adds"]
    return max((memory, "memory"), (issue, "instructions"))


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measured_times(run: Run) -> dict[str, float]:
    """Return the seconds that our ops took on the CPU."""
    return {
        row["op"]: row["median"]
        for row in run["rows"]
        if row["device"] == "cpu" and row["contestant"] == "andmask" and row["median"]
    }


def threads_text(facts: Mapping[str, Any]) -> str:
    return f"{facts['threads']} thread{'s' * (facts['threads'] > 1)}"


def counted(work: Work, instructions: float, seconds: float, why: str) -> list[str]:
    """Return the cells about what an op needs, and how long that takes at least."""
    cells = [f"`{work.op}`", work.size, number(work.bytes), number(instructions)]
    return [*cells, number(instructions / work.bytes), duration(seconds), why]


def tables(run: Run) -> str:
    """Return the Markdown of docs/cuda.md: counts and predictions, then the CPU's measurements."""
    columns = ["op", "size", "bytes", "instructions", "per byte", "predicted", "bound by"]
    predicted = [counted(work, work.gpu, *h100(work)) for work in works("cuda").values()]
    facts, times = run["devices"]["cpu"], measured_times(run)
    lines = []
    for work in works(run["sizes"]["cpu"]).values():
        if work.op in times:
            seconds, why = cpu(work, facts)
            took = times[work.op]
            line = counted(work, work.cpu, seconds, why)
            lines.append([*line, duration(took), f"{seconds / took:.0%}"])
    peaks = (
        f"{facts['name']}, {threads_text(facts)}: a copy moves {facts['copy'] / 1e9:.0f} "
        f"GB/s, {facts['multiply_adds'] / 1e9:.0f} G float32 multiply-adds a second."
    )
    more = [*columns, "measured", "predicted ÷ measured"]
    return "\n\n".join([markdown(columns, predicted), peaks, markdown(more, lines)])


# ---- the figure ----

BLUE, ORANGE = COLOURS[0], COLOURS[4]


def draw(run: Run, path: Path) -> None:
    """Instructions a second against instructions per byte: roofs, predictions, measurements."""
    from matplotlib.figure import Figure

    from studies.figures import save

    facts = run["devices"]["cpu"]
    figure = Figure(figsize=(11, 5.8))
    left, right = figure.subplots(1, 2)
    roof(left, COPY / 1e12, TENSOR["bfloat16"] / 1e12, "--", "bfloat16 tensor cores: {:.1f} T/s")
    roof(left, COPY / 1e12, INSTRUCTIONS / 1e12, "-", "float32: {:.1f} T/s")
    roof_label(left, COPY / 1e12, INSTRUCTIONS / 1e12, "memory: 3.0 TB/s")
    points(left, works("cuda"), lambda work: (work.gpu, h100(work)[0]), 1e12, ORANGE, "predicted")
    left.set_title("H100 SXM, by its data sheet: predicted, never run", fontsize=10)
    left.set_ylabel("T instructions or multiply-adds a second")

    rates = facts["copy"] / 1e9, facts["multiply_adds"] / 1e9
    roof(right, *rates, "-", "float32: {:.0f} G/s")
    roof_label(right, *rates, f"copy: {rates[0]:.0f} GB/s")
    measured = measured_times(run)
    local = {name: work for name, work in works(run["sizes"]["cpu"]).items() if name in measured}
    points(right, local, lambda work: (work.cpu, measured[work.op]), 1e9, BLUE, "measured")
    right.set_title(f"{facts['name']}, {threads_text(facts)}: measured", fontsize=10)
    right.set_ylabel("G instructions or multiply-adds a second")
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlim=(0.2, 1500))
        axis.set_xlabel("instructions per byte of memory traffic")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.25, which="major")
        axis.legend(loc="lower right", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    names = [f"{number}  {name}" for number, name in enumerate(works("cuda"), 1)]
    per_column = -(-len(names) // 4)
    for column in range(4):
        some = names[column * per_column : (column + 1) * per_column]
        figure.text(0.06 + 0.24 * column, 0.155, "\n".join(some), fontsize=8, va="top")
    print(f"\nfigure  {save(figure, path)}")


def roof(axis: Axes, copy: float, peak: float, style: str, text: str) -> None:
    ridge = peak / copy
    axis.plot([0.2, ridge, 1500], [0.2 * copy, peak, peak], style, color="black", lw=1.2)
    right = style == "--"
    axis.annotate(
        text.format(peak),
        (1400 if right else ridge, peak),
        (0 if right else 8, 4),
        textcoords="offset points",
        fontsize=8,
        ha="right" if right else "left",
    )


def roof_label(axis: Axes, copy: float, peak: float, text: str) -> None:
    at = (0.4 * peak / copy, 0.4 * peak)
    axis.annotate(text, at, (-6, 0), textcoords="offset points", fontsize=8, ha="right")


def points(
    axis: Axes,
    cases: Mapping[str, Work],
    of: Callable[[Work], tuple[float, float]],
    scale: float,
    color: str,
    label: str,
) -> None:
    """Draw the cases as numbered points; numbers are those of the list below the figure."""
    numbers = {name: number for number, name in enumerate(works("cuda"), 1)}
    groups: list[tuple[float, float, list[int]]] = []  # cases at nearly the same place
    for name, work in cases.items():
        instructions, seconds = of(work)
        x, y = instructions / work.bytes, work.units * instructions / seconds / scale
        axis.plot(x, y, "o", color=color, ms=5, alpha=0.8, label=label if not groups else None)
        for a, b, some in groups:
            if abs(math.log(x / a)) < 0.2 and abs(math.log(y / b)) < 0.2:
                some.append(numbers[name])
                break
        else:
            groups.append((x, y, [numbers[name]]))
    for x, y, some in groups:
        axis.annotate(
            ", ".join(map(str, some)), (x, y), (6, -9), textcoords="offset points", fontsize=8
        )


def main() -> None:
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("name", help="what bench_cuda.py --save was given")
    options.add_argument("--figure", type=Path, help="default: benchmarks/runs/NAME-roofline.png")
    chosen = options.parse_args()
    run = json.loads((RUNS / f"{chosen.name}.json").read_text())
    print(tables(run))
    draw(run, chosen.figure or RUNS / f"{chosen.name}-roofline.png")


if __name__ == "__main__":
    main()
