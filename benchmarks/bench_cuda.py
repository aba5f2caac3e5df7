"""The ops on every device here beside eager torch and torch.compile on the same device.

    python -m benchmarks.bench_cuda --quick                        # under 3 minutes
    python -m benchmarks.bench_cuda --save NAME --figure PATH
    python -m benchmarks.roofline NAME                             # predictions beside it

The yardstick of each case is measured with it in turns: a copy of as many bytes as the op has to
read and write, or the plain weight gradient for moments of weight gradients. Shares are of that.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import andmask_ext as am

from .common import COLOURS, RUNS, duration, keep, markdown, measure
from .cuda_cases import COMPILED, EAGER, OURS, build
from .measuring import untimed
from .peaks import copied_bytes, multiply_adds
from .roofline import Work, works

KINDS = (False, True)  # whether an op is a product of matrices
WIDEST = 2.0  # shares beyond are written into the bar
Result = dict[str, Any]
NO_CUDA = "no CUDA device was found: every row is of the CPU"


# ---- measuring ----


def case(work: Work, device: torch.device) -> list[Result]:
    """Measure one op; a contestant that cannot do it is kept with the reason."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    contestants, failed = build(work, device), {}
    for name in (OURS, EAGER, COMPILED):
        try:
            contestants.get(name, lambda: None)()
        except Exception as error:  # what a peer cannot do is a result, too
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            del contestants[name]
    yardstick = "plain" if work.product else "copy"
    # A product counts two operations for each multiply-add.
    amount = 2 * work.multiply_adds if work.product else work.total_bytes
    rows = measure(work.op, contestants, bytes_moved=amount, yardstick=yardstick, rounds=5)
    rows += [untimed(work.op, name, note=note) for name, note in failed.items()]
    return [
        {
            "device": device.type,
            "op": work.op,
            "size": work.size,
            "product": work.product,
            "contestant": row.contestant,
            "median": row.median,
            "iqr": row.iqr,
            "minimum": row.minimum,
            "giga_per_second": row.gigabytes_per_second,  # bytes, or operations of a product
            "share": 1 / row.ratio if row.ratio else 0.0,  # of the yardstick's rate
            "note": row.note,
        }
        for row in rows
    ]


def facts(device: torch.device) -> dict[str, object]:
    """Name the device and measure what it reaches at most."""
    if device.type == "cuda":
        name, size = torch.cuda.get_device_name(device), 1 << 30
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
        name, size = (names or [platform.processor()])[0], 1 << 28
    return {
        "name": name,
        "threads": torch.get_num_threads(),
        "copy": copied_bytes(device, size),
        "multiply_adds": multiply_adds(device),
    }


COLUMNS = (
    "op", "size", "device", "time", "IQR", "GB/s or GFLOP/s",
    "share of copy, or of plain product", "eager ÷", "`torch.compile` ÷",
)  # fmt: skip


def lines_of(rows: Sequence[Result]) -> list[list[str]]:
    """Return the cells of a line for each op and device."""
    lines = []
    cases = dict.fromkeys((row["device"], row["op"]) for row in rows)
    for device, op in cases:
        own = {r["contestant"]: r for r in rows if (r["device"], r["op"]) == (device, op)}
        ours = own[OURS]
        cells = [f"`{op}`", ours["size"], device]
        if ours["note"]:
            lines.append([*cells, ours["note"], *[""] * 5])
            continue
        cells += [duration(ours["median"]), f"{ours['iqr'] / ours['median']:.0%}"]
        cells += [f"{ours['giga_per_second']:.0f}", f"{ours['share']:.2f}"]
        for peer in (EAGER, COMPILED):
            if peer not in own:
                cells.append("-")
            elif own[peer]["note"]:
                cells.append(own[peer]["note"])
            else:
                cells.append(f"{own[peer]['median'] / ours['median']:.1f}")
        lines.append(cells)
    return lines


def draw(run: Result, path: Path) -> None:
    """One column of bars for each device: shares of a copy above, of the plain product below."""
    from matplotlib.figure import Figure  # a machine with a GPU may be without
    from matplotlib.patheffects import withStroke

    from studies.figures import save

    colors = {OURS: COLOURS[0], COMPILED: COLOURS[4], EAGER: COLOURS[3]}
    devices = list(run["devices"])
    count = [
        len({r["op"] for r in run["rows"] if r["product"] is product}) for product in (False, True)
    ]
    figure = Figure(figsize=(3.2 + 4.3 * len(devices), 9), layout="constrained")
    axes = figure.subplots(2, len(devices), squeeze=False, sharey="row", height_ratios=count)
    titles = ("share of the rate of copy_", "share of the rate of the plain weight gradient")
    for column, device in enumerate(devices):
        for line, product in enumerate(KINDS):
            axis = axes[line][column]
            rows = [r for r in run["rows"] if r["device"] == device and r["product"] is product]
            names = list(dict.fromkeys(row["op"] for row in rows))
            for offset, (contestant, color) in enumerate(colors.items()):
                shares = {r["op"]: r["share"] for r in rows if r["contestant"] == contestant}
                at = [place + 0.27 * (offset - 1) for place in range(len(names))]
                values = [shares.get(name, 0.0) for name in names]
                axis.barh(at, values, 0.25, color=color, label=contestant)
                for place, name, value in zip(at, names, values, strict=True):
                    text = f"{value:.2f}" if value else "" if name in shares else "-"
                    inside = value > 0.9 * WIDEST
                    axis.annotate(
                        text,
                        (min(value, WIDEST), place),
                        (-2 if inside else 2, -2.5),
                        fontsize=6.5,
                        textcoords="offset points",
                        color="white" if inside else "black",
                        ha="right" if inside else "left",
                        path_effects=[]
                        if inside
                        else [withStroke(linewidth=2, foreground="white")],
                    )
            axis.axvline(1, color="black", lw=0.8, ls="--")
            axis.set_yticks(range(len(names)), names, fontsize=8)
            axis.set_ylim(len(names) - 0.4, -0.6)
            axis.set_xlabel(titles[line], fontsize=9)
            axis.set_xlim(0, WIDEST)
        axes[0][column].set_title(f"{device}: {run['devices'][device]['name']}", fontsize=10)
    legend = axes[0][0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=3, fontsize=9)
    if "cuda" not in run["devices"]:
        figure.suptitle(NO_CUDA, fontsize=9)
    print(f"figure  {save(figure, path)}")


def main() -> None:
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--quick", action="store_true", help="small sizes on the CPU")
    options.add_argument("--save", metavar="NAME", help="keep as benchmarks/runs/NAME.json")
    options.add_argument(
        "--figure", metavar="PATH", type=Path, help="default: benchmarks/runs/NAME.png"
    )
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--only", default="", help="ops whose name contains this")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    sizes = {"cpu": "quick" if chosen.quick else "cpu"}
    if torch.cuda.is_available():
        sizes["cuda"] = "cuda"
    else:
        print(f"{NO_CUDA}.\n")
    print(f"{am.build_info()}\n")
    run: Result = {"info": am.build_info(), "sizes": sizes, "devices": {}, "rows": []}
    for name, place in sizes.items():
        device = torch.device(name)
        run["devices"][name] = facts(device)
        print(f"{name}: {run['devices'][name]}", flush=True)
        for work in works(place).values():
            if chosen.only not in work.op:
                continue
            rows = case(work, device)
            run["rows"] += rows
            print(*lines_of(rows)[0], sep=" | ", flush=True)
            if name == "cuda":
                torch.cuda.empty_cache()
        for key, value in facts(device).items():  # a busy machine may have lowered the first ones
            if isinstance(value, float):
                run["devices"][name][key] = max(run["devices"][name][key], value)
    print(f"\n{markdown(COLUMNS, lines_of(run['rows']))}")
    if chosen.save:
        print(f"\nkept as {keep(f'{chosen.save}.json', json.dumps(run, indent=1))}")
    picture = chosen.figure or (RUNS / f"{chosen.save}.png" if chosen.save else None)
    if picture:
        draw(run, picture)


if __name__ == "__main__":
    main()
