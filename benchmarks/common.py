"""Options, printing, keeping and comparing of rows: shared by all ``bench_*.py``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .measuring import Row, Step, measure, peak_memory, rows_of, seconds_of

__all__ = ["RUNS", "Row", "Step", "measure", "peak_memory", "rows_of", "seconds_of"]

RUNS = Path(__file__).parent / "runs"
OURS = ("andmask", "AndMask", "Agreement")  # how contestants begin that must not become slower
# Okabe and Ito's colours, the same contestant in the same one wherever it is drawn.
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#999999", "#E69F00", "#000000")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options that all benchmarks have; the description is a module's docstring."""
    options = argparse.ArgumentParser(description=str(description).splitlines()[0])
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options.add_argument("--quick", action="store_true", help="a few cases, about a minute")
    options.add_argument(
        "--save", metavar="NAME", help="keep the rows as benchmarks/runs/NAME.json"
    )
    options.add_argument(
        "--compare", metavar="NAME", help="compare with a kept run; exit 1 if anything got slower"
    )
    options.add_argument(
        "--tolerance", type=float, default=1.25, help="slower by more than this factor counts"
    )
    return options


def run(options: argparse.Namespace, cases: Iterable[Callable[[], list[Row]]]) -> list[Row]:
    """Run the cases for every thread count, printing as they end; keep or compare if asked."""
    rows: list[Row] = []
    start = time.perf_counter()
    cases = list(cases)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for number, case in enumerate(cases, 1):
            new = case()
            rows += new
            done = time.perf_counter() - start
            print(f"\n{new[0].case}, {threads} thread(s)   [{number}/{len(cases)}, {done:.0f} s]")
            print(table(new), flush=True)
            if options.save:  # after each case: a long run may be cut short
                path = keep(f"{options.save}.json", json.dumps([asdict(r) for r in rows], indent=1))
    if options.save:
        print(f"\nkept as {path}")
    if options.compare and _slower(rows, kept(options.compare), options.tolerance):
        raise SystemExit(1)
    return rows


def keep(name: str, text: str) -> Path:
    """Write a file into benchmarks/runs."""
    RUNS.mkdir(exist_ok=True)
    path = RUNS / name
    path.write_text(text)
    return path


def kept(name: str) -> list[Row]:
    """Read the rows of a run that was kept."""
    return [Row(**row) for row in json.loads((RUNS / f"{name}.json").read_text())]


def table(rows: Sequence[Row]) -> str:
    """Return the rows of one case as aligned text."""
    memory = any(row.megabytes is not None for row in rows)
    process = any(row.process_ratio is not None for row in rows)
    speed = any(row.gigabytes_per_second for row in rows)
    lines = [f"  {'':26}{'median':>12}{'IQR':>10}{'min':>12}"]
    lines[0] += f"{'GB/s':>8}" * speed + f"{'ratio':>9}"
    if memory:
        lines[0] += f"{'MiB':>9}{'ratio':>9}" + f"{'process':>9}" * process
    for row in rows:
        line = f"  {row.contestant:26}"
        if row.median:
            line += "".join(
                f"{duration(seconds):>{width}}"
                for seconds, width in ((row.median, 12), (row.iqr, 10), (row.minimum, 12))
            )
            line += f"{row.gigabytes_per_second:>8.1f}" * speed + f"{row.ratio:>9.2f}"
        if row.megabytes is not None and row.memory_ratio is not None:
            line += f"{row.megabytes:>9.0f}{row.memory_ratio:>9.2f}"
            line += f"{row.process_ratio:>9.2f}" if row.process_ratio is not None else ""
        lines.append(f"{line}  {row.note}".rstrip())
    return "\n".join(lines)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def duration(seconds: float) -> str:
    """Write a time for people."""
    if seconds >= 10:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _slower(rows: Iterable[Row], before: Iterable[Row], tolerance: float) -> bool:
    """Print what changed against a kept run; compares ratios to the yardstick, not times."""
    ratios = {row.key: row.ratio for row in before}
    worse = False
    print("\nratio to the yardstick of the case, in the kept run and now:")
    for row in rows:
        if row.key not in ratios or row.ratio == 1.0:
            continue
        then, now = ratios[row.key], row.ratio
        flag = "slower" if now > then * tolerance else "faster" if now < then / tolerance else ""
        worse |= flag == "slower" and row.contestant.startswith(OURS)
        print(f"  {row.case:32}{row.threads:>2}  {row.contestant:24}{then:8.2f}{now:8.2f} {flag}")
    return worse
