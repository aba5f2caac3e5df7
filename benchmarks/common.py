"""Options, printing, keeping and comparing: shared by all benchmarks.

What is measured, and how, stands in ``benchmarks.contest``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from .contest.measuring import Row, measure, peak_memory

__all__ = ["RUNS", "Row", "measure", "parser", "peak_memory", "run", "table"]

RUNS = Path(__file__).parent / "runs"


def parser(description: str) -> argparse.ArgumentParser:
    """Return the options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
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
                RUNS.mkdir(exist_ok=True)
                path = RUNS / f"{options.save}.json"
                path.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if options.save:
        print(f"\nkept as {path}")
    if options.compare and _slower(rows, options.compare, options.tolerance):
        raise SystemExit(1)
    return rows


def table(rows: list[Row]) -> str:
    """Return the rows of one case as aligned text."""
    memory = any(row.megabytes is not None for row in rows)
    speed = any(row.gigabytes_per_second for row in rows)
    lines = [f"  {'':26}{'median':>12}{'IQR':>10}{'min':>12}"]
    lines[0] += f"{'GB/s':>8}" * speed + f"{'ratio':>9}"
    if memory:
        lines[0] += f"{'MiB':>9}{'ratio':>9}{'process':>9}"
    for row in rows:
        line = f"  {row.contestant:26}"
        if row.median:
            line += f"{_time(row.median):>12}{_time(row.iqr):>10}{_time(row.minimum):>12}"
            line += f"{row.gigabytes_per_second:>8.1f}" * speed + f"{row.ratio:>9.2f}"
        if row.megabytes is not None and row.memory_ratio is not None:
            line += f"{row.megabytes:>9.0f}{row.memory_ratio:>9.2f}{row.process_ratio:>9.2f}"
        lines.append(f"{line}  {row.note}".rstrip())
    return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _slower(rows: list[Row], name: str, tolerance: float) -> bool:
    """Print what changed against a kept run; compares ratios to the yardstick, not times."""
    kept = [Row(**row) for row in json.loads((RUNS / f"{name}.json").read_text())]
    before = {row.key: row.ratio for row in kept}
    worse = False
    print(f"\nagainst {name} (ratio to the yardstick of the case, then and now):")
    for row in rows:
        if row.key not in before or row.ratio == 1.0:
            continue
        then, now = before[row.key], row.ratio
        flag = "slower" if now > then * tolerance else "faster" if now < then / tolerance else ""
        worse |= flag == "slower" and row.contestant in ("andmask", "Agreement")
        print(f"  {row.case:32}{row.threads:>2}  {row.contestant:24}{then:8.2f}{now:8.2f} {flag}")
    return worse
