"""Turn a kept run of bench_masked_mean.py into a table and a figure.

python benchmarks/bench_masked_mean.py --save NAME
python benchmarks/report.py NAME            # prints Markdown, writes runs/NAME.png
"""

from __future__ import annotations

import argparse
import json

from .common import RUNS, Row

COLUMNS = ["read pass: torch.sum", "andmask", "torch.sum(grads, 0)", "torch.compile", "eager"]
COLORS = ["#000000", "#0072B2", "#999999", "#E69F00", "#D55E00"]  # Okabe-Ito


def parse(case: str) -> tuple[int, int, str]:
    environments, _, columns, dtype = case.split()
    return int(environments), int(columns.replace(",", "")), dtype


def markdown(rows: list[Row]) -> str:
    """One line a case: microseconds of the op, and its ratios to the peers."""
    lines = [
        "| d x P | dtype | threads | andmask | IQR | GB/s | ÷ read pass | ÷ `torch.sum(grads, 0)` "
        "| `torch.compile` ÷ | eager ÷ | authors' code ÷ |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, threads in dict.fromkeys((row.case, row.threads) for row in rows):
        own = {r.contestant: r for r in rows if (r.case, r.threads) == (case, threads)}
        environments, columns, dtype = parse(case)
        op = own["andmask"]
        time = f"{op.median * 1e6:.1f} µs" if op.median < 1e-3 else f"{op.median * 1e3:.2f} ms"
        ratios = [op.median / own[name].median for name in (COLUMNS[0], COLUMNS[2])]
        gains = [own[name].median / op.median for name in ("torch.compile", "eager")]
        gains.append(own["authors' code"].median / op.median)
        lines.append(
            f"| {environments} x {columns:,} | {dtype} | {threads} | {time} "
            f"| {op.iqr / op.median:.0%} | {op.gigabytes_per_second:.1f} | "
            + " | ".join(f"{ratio:.2f}" for ratio in ratios)
            + " | "
            + " | ".join(f"{gain:.1f}" for gain in gains)
            + " |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], threads: int, path: str) -> None:
    """Effective throughput against the size of the input, one panel for each d (float32)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.threads == threads and row.case.endswith("float32")]
    panels = sorted({parse(row.case)[0] for row in rows} - {8})
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.2), sharex=True, sharey=True)
    for axis, environments in zip(axes.flat, panels, strict=False):
        for name, color in zip(COLUMNS, COLORS, strict=True):
            own = [r for r in rows if r.contestant == name and parse(r.case)[0] == environments]
            sizes = [parse(row.case)[1] * environments * 4 / 2**20 for row in own]
            axis.plot(
                sizes,
                [row.gigabytes_per_second for row in own],
                color=color,
                marker="o",
                markersize=3,
                linewidth=2.2 if name == "andmask" else 1.2,
                linestyle="--" if name == COLUMNS[0] else "-",
                label=name,
            )
        axis.set(xscale="log", yscale="log", title=f"{environments} environments")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
    for axis in axes[-1]:
        axis.set_xlabel("input (MiB)")
    for axis in axes[:, 0]:
        axis.set_ylabel("input read (GB/s)")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(f"masked_mean, float32, {threads} thread(s), {rows[0].isa}", fontsize=11)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("name", help="what bench_masked_mean.py --save was given")
    options.add_argument("--threads", type=int, default=2, help="of the figure (default: 2)")
    options.add_argument("--figure", help="default: benchmarks/runs/NAME.png")
    chosen = options.parse_args()
    rows = [Row(**row) for row in json.loads((RUNS / f"{chosen.name}.json").read_text())]
    print(markdown(rows))
    path = chosen.figure or str(RUNS / f"{chosen.name}.png")
    draw(rows, chosen.threads, path)
    print(f"\nfigure  {path}")


if __name__ == "__main__":
    main()
