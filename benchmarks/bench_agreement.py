"""One batch, many environments: ``Agreement`` against a plain pass and the ways that exist.

python -m benchmarks.bench_agreement --quick

The contestants are those of ``python -m benchmarks.contest``, which also compares gradients and
writes a summary; here rows are kept and compared, and --figure draws time and memory over sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from andmask_ext.plots.style import style
from studies.figures import save

from .common import COLOURS, Row, parser, run
from .contest.contest import EVERY, GROUPED, Case, contest
from .contest.models import MODELS, workload
from .contest.peers import GRADIENTS, OURS, PLAIN, PLAIN_STEP, STEPS, Contestant

MOST_BYTES = 10 << 30  # of a contestant that keeps the gradients of all environments
BATCHES = (8, 16, 32, 64, 128, 256, 512, 1024)
WIDTHS = (256, 512, 1024, 2048)
CURVES = {PLAIN: COLOURS[5], OURS: COLOURS[0], "vmap(grad)": COLOURS[4], "Opacus": COLOURS[2]}


def case(
    model: str,
    kind: str,
    contestants: Mapping[str, Contestant],
    yardstick: str,
    last: int,
    examples: int | None = None,
) -> list[Row]:
    """Time all contestants; memory, with the last number of threads only, as it has one itself."""
    chosen = Case(model, kind, examples or workload(model).examples)
    print(f"\n{model}, batch {chosen.examples}, {kind}:", end="", flush=True)

    def tell(stage: str, name: str) -> None:
        print(f" {stage} {name} ...", end="", flush=True)

    memory = torch.get_num_threads() == last
    return contest(chosen, contestants, yardstick, memory=memory, tell=tell)[0]


def draw(threads: int, path: Path) -> None:
    """Draw time and memory of the MLP, every example an environment, over batch and width."""
    torch.set_num_threads(threads)
    sizes = {"batch": [(n, 512) for n in BATCHES], "width": [(128, n) for n in WIDTHS]}
    titles = {"batch": "MLP, width 512: 0.53 M parameters", "width": "MLP, batch 128"}
    with style():
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        panels = figure.subplots(2, 2, sharex="col", sharey="row")
        for column, (axis, points) in enumerate(sizes.items()):
            rows: dict[str, dict[int, Row]] = {name: {} for name in CURVES}
            for place, (batch, width) in enumerate(points):
                # The gradients of all environments, and the sign of the largest.
                stacked = 4 * batch * 3 * width * width <= MOST_BYTES
                names = CURVES if stacked else (PLAIN, OURS)
                ways = {name: GRADIENTS[name] for name in names}
                for row in case(f"MLP {width}", EVERY, ways, PLAIN, threads, batch):
                    rows[row.contestant][points[place][column]] = row
            for name, colour in CURVES.items():
                for line, (field, factor) in enumerate((("median", 1e3), ("megabytes", 1))):
                    values = {n: getattr(row, field) for n, row in rows[name].items()}
                    known = {n: factor * value for n, value in values.items() if value}
                    panels[line][column].plot(
                        list(known),
                        list(known.values()),
                        color=colour,
                        marker={PLAIN: "s", OURS: "o"}.get(name, "^"),
                        markersize=4,
                        linestyle="--" if name == PLAIN else "-",
                        linewidth=2.4 if name == OURS else 1.4,
                        label="plain forward + backward" if name == PLAIN else name,
                    )
            ticks = [size[column] for size in points]
            for panel in panels[:, column]:
                panel.set(xscale="log", yscale="log")
                panel.set_xticks(ticks, [str(tick) for tick in ticks])
                panel.minorticks_off()
                panel.grid(alpha=0.25)
            panels[0][column].set_title(titles[axis])
            panels[1][column].set_xlabel(axis)
        panels[0][0].set_ylabel("time of the gradient (ms)")
        panels[1][0].set_ylabel("peak memory (MiB)")
        legend = panels[0][0].get_legend_handles_labels()
        figure.legend(*legend, loc="outside lower center", ncols=len(CURVES))
        print(f"\nfigure  {save(figure, path)}")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    kinds = [EVERY, GROUPED]
    arguments.add_argument("--environments", nargs="+", choices=kinds, default=kinds)
    arguments.add_argument(
        "--figure", metavar="PATH", type=Path, help="draw time and memory over batch, width"
    )
    options = arguments.parse_args()
    models, examples, last = options.models, None, options.threads[-1]
    if options.quick:
        models, examples, options.threads = ["MLP"], 32, [last]
    run(
        options,
        [
            partial(case, model, kind, ways, yardstick, last, examples)
            for kind in options.environments
            for model in models
            for ways, yardstick in ((GRADIENTS, PLAIN), (STEPS, PLAIN_STEP))
        ],
    )
    if options.figure:
        draw(last, options.figure)


if __name__ == "__main__":
    main()
