"""One batch, many environments: ``Agreement`` against a plain pass and the ways that exist.

python benchmarks/bench_agreement.py --quick
"""

from __future__ import annotations

import argparse
import json
import os

import torch

from .common import RUNS, Row, parser, run
from .contest.contest import EVERY, GROUPED, contest, usual_case
from .contest.models import MODELS
from .contest.peers import (
    GRADIENTS,
    OURS,
    PLAIN,
    PLAIN_STEP,
    STEPS,
    Contestant,
)

MOST_BYTES = 10 << 30  # of a contestant that keeps the gradients of all environments


def case(
    model: str,
    kind: str,
    contestants: dict[str, Contestant],
    yardstick: str,
    memory: bool,
    examples: int | None = None,
) -> list[Row]:
    """Time all contestants that can do it; the others appear with their reason."""
    chosen = usual_case(model, kind, examples)
    print(f"\n{model}, batch {chosen.examples}, {kind}:", end="", flush=True)
    before = ""

    def tell(stage: str, name: str) -> None:
        nonlocal before
        print(f" {name} ..." if stage == before else f"\n  {stage} {name} ...", end="", flush=True)
        before = stage

    return contest(chosen, contestants, yardstick, memory=memory, tell=tell)[0]


# ---- scaling ----

BATCHES = (8, 16, 32, 64, 128, 256, 512, 1024)
WIDTHS = (256, 512, 1024, 2048)
CURVES = {PLAIN: "#000000", OURS: "#0072B2", "vmap(grad)": "#E69F00", "Opacus": "#D55E00"}


def scaling() -> list[dict]:
    """Time and memory of the MLP with every example an environment, over batch and width."""
    chosen = {name: GRADIENTS[name] for name in CURVES}
    points = []
    sizes = [("batch", batch, 512) for batch in BATCHES]
    sizes += [("width", 128, width) for width in WIDTHS]
    for axis, batch, width in sizes:
        usable = dict(chosen)
        needed = 4 * batch * (3 * width * width)  # the gradients, and the sign of the largest
        if needed > MOST_BYTES:
            print(f"batch {batch}, width {width}: {needed >> 30} GiB, without vmap and Opacus")
            usable = {name: chosen[name] for name in (PLAIN, OURS)}
        rows = case(f"MLP {width}", EVERY, usable, PLAIN, memory=True, examples=batch)
        for row in rows:
            print(f"  {row.contestant:12}{row.median * 1e3:10.2f} ms{row.megabytes or 0:9.1f} MiB")
            points.append({"axis": axis, "batch": batch, "width": width, "name": row.contestant,
                           "seconds": row.median, "megabytes": row.megabytes})  # fmt: skip
    return points


def draw(points: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), sharex="col", sharey="row")
    for column, (axis, title) in enumerate(
        [("batch", "MLP, width 512: .53 M parameters"), ("width", "MLP, batch 128")]
    ):
        for name, color in CURVES.items():
            own = [p for p in points if (p["axis"], p["name"]) == (axis, name) and p["seconds"]]
            for line, (kind, factor) in enumerate([("seconds", 1e3), ("megabytes", 1)]):
                known = [p for p in own if p[kind]]
                axes[line][column].plot(
                    [p[axis] for p in known],
                    [p[kind] * factor for p in known],
                    color=color,
                    marker={PLAIN: "s", OURS: "o"}.get(name, "^"),
                    markersize=4,
                    linestyle="--" if name == PLAIN else "-",
                    linewidth=2.4 if name == OURS else 1.4,
                    label="plain forward + backward" if name == PLAIN else name,
                )
        ticks = BATCHES if axis == "batch" else WIDTHS
        for line in (0, 1):
            axes[line][column].set(xscale="log", yscale="log")
            axes[line][column].set_xticks(ticks, [str(tick) for tick in ticks])
            axes[line][column].minorticks_off()
            axes[line][column].grid(alpha=0.25)
        axes[0][column].set_title(title, fontsize=11)
        axes[1][column].set_xlabel(f"{axis} (every example an environment)" if axis == "batch"
                                   else axis)  # fmt: skip
    axes[0][0].set_ylabel("time of the gradient (ms)")
    axes[1][0].set_ylabel("peak memory (MiB)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    print(f"figure  {path}")


def make_figure(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads[-1])
    path = RUNS / f"{options.save or 'agreement'}-scaling.json"
    if not (options.figure_only and path.exists()):
        RUNS.mkdir(exist_ok=True)
        path.write_text(json.dumps(scaling(), indent=1))
        print(f"kept as {path}")
    draw(json.loads(path.read_text()), options.figure)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    kinds = [EVERY, GROUPED]
    arguments.add_argument("--environments", nargs="+", choices=kinds, default=kinds)
    arguments.add_argument(
        "--figure", metavar="PATH", help="draw time and memory over batch, width"
    )
    arguments.add_argument(
        "--figure-only", action="store_true", help="no table; draw kept points again if there are"
    )
    options = arguments.parse_args()
    last = options.threads[-1]
    settings: list[tuple[str, str, int | None]] = [
        (model, kind, None) for kind in options.environments for model in options.models
    ]
    if options.quick:
        settings, options.threads = [("MLP", EVERY, 32), ("MLP", GROUPED, 32)], [last]
    if not options.figure_only:
        cases = []
        for model, kind, examples in settings:
            for group, base in ((GRADIENTS, PLAIN), (STEPS, PLAIN_STEP)):
                cases.append(
                    lambda m=model, k=kind, n=examples, g=group, b=base: case(
                        m, k, g, b, memory=torch.get_num_threads() == last, examples=n
                    )
                )
        run(options, cases)
        load = os.getloadavg()[1]
        print(
            f"\nload of the machine in the last 5 minutes: {load:.1f}, {os.cpu_count()} processors"
        )
    if options.figure:
        make_figure(options)


if __name__ == "__main__":
    main()
