"""Training with d environments against the d plain backward passes it contains, and its peers.

python -m benchmarks.bench_backward --quick
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import andmask_ext as am
from andmask_ext.plots.style import style
from studies.figures import save

from .common import COLOURS, Row, Step, measure, parser, peak_memory, run
from .contest.models import MODELS, Batch, loss
from .contest.peers import apply_formula, clear

TAU = 0.6
PLAIN = "d plain backward passes"
COUNTS = (4, 16, 64, 256)


def environments(model: str, count: int) -> tuple[nn.Module, list[Batch]]:
    """Return a fresh model, and its usual batch split evenly between environments."""
    torch.manual_seed(0)
    build, draw, examples = MODELS[model]
    network = build()
    return network, [draw(max(1, examples // count)) for _ in range(count)]


def contestants(model: nn.Module, data: Sequence[Batch]) -> dict[str, Step]:
    params = list(model.parameters())
    optimizer = am.optim.AndMaskSGD(params, tau=TAU)

    def plain() -> None:
        clear(params)
        for batch in data:
            loss(model, batch).backward()

    def backward() -> None:
        clear(params)
        am.backward((loss(model, batch) for batch in data), am.AndMask(TAU), params)

    def streaming() -> None:
        optimizer.zero_grad()
        for batch in data:
            with optimizer.environment():
                loss(model, batch).backward()
        # What remains is optimizer.step(), which resolves as it goes: bench_optim.py.

    def authors() -> None:
        rows = [torch.autograd.grad(loss(model, batch), params) for batch in data]
        apply_formula(params, (torch.stack(column) for column in zip(*rows, strict=True)))

    found: dict[str, Step] = {
        "optimizer.environment": streaming,
        "am.backward": backward,
        "authors' loop": authors,
        PLAIN: plain,
    }
    try:
        autojac = import_module("torchjd.autojac")
        mean = import_module("torchjd.aggregation").Mean()
    except ImportError:
        print("  (TorchJD is not installed: `pip install torchjd` to have it measured)")
    else:

        def jacobian() -> None:  # with the cheapest of its aggregators
            clear(params)
            losses = [loss(model, batch) for batch in data]
            autojac.backward(losses, inputs=params, parallel_chunk_size=1)
            autojac.jac_to_grad(params, mean)

        found["TorchJD"] = jacobian
    return found


def case(last: int, model: str, count: int) -> list[Row]:
    network, data = environments(model, count)
    functions = contestants(network, data)
    parameters = sum(p.numel() for p in network.parameters())
    rows = measure(
        f"{model}, {parameters / 1e6:.2f} M parameters, {count} x {len(data[0][1])}",
        functions,
        bytes_moved=4 * parameters * count,
        yardstick=PLAIN,
    )
    if torch.get_num_threads() == last:
        for row in rows:
            row.megabytes = peak_memory(functions[row.contestant]) / 2**20
        base = next(row.megabytes for row in rows if row.contestant == PLAIN)
        for row in rows:
            row.memory_ratio = (row.megabytes or 0.0) / max(base or 0.0, 1e-6)
    return rows


def memory_over_environments() -> dict[str, list[float]]:
    """Peak memory in MiB over the number of environments, for each contestant."""
    counts = ", ".join(map(str, COUNTS))
    print(f"\nextra memory in MiB, MLP, 16 examples per environment, d = {counts}")
    peaks: dict[str, list[float]] = {}
    for count in COUNTS:
        network, data = environments("MLP", 8)
        repeated = [data[i % 8] for i in range(count)]
        for name, function in contestants(network, repeated).items():
            if count > 16 and name in ("authors' loop", "TorchJD"):
                continue  # gigabytes, minutes
            peaks.setdefault(name, []).append(peak_memory(function) / 2**20)
    for name, found in peaks.items():
        print(f"  {name:28}" + ", ".join(f"{peak:.0f}" for peak in found))
    return peaks


def draw(rows: Sequence[Row], peaks: dict[str, list[float]], path: Path) -> None:
    """Time for the three models with 8 environments, and memory over environments."""
    rows = [row for row in rows if ", 8 x" in row.case and row.threads == rows[-1].threads]
    models = list(dict.fromkeys(row.case for row in rows))
    with style():
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, (name, colour) in enumerate(zip(peaks, COLOURS, strict=False)):
            ratios = [
                next(r.ratio for r in rows if (r.case, r.contestant) == (model, name))
                for model in models
            ]
            shift = (number - (len(peaks) - 1) / 2) * 0.16
            places = [place + shift for place in range(len(models))]
            bars = left.bar(places, ratios, 0.15, color=colour, label=name)
            left.bar_label(bars, fmt="%.2f", fontsize=6.5, rotation=90, padding=2)
            right.plot(COUNTS[: len(peaks[name])], peaks[name], "o-", color=colour, label=name)
        left.set_xticks(range(len(models)), [model.split(",")[0] for model in models])
        left.set(yscale="log", ylim=(0.7, 20), ylabel="time / d plain backward passes")
        left.axhline(1, color="black", linewidth=0.6)
        left.set_title("8 environments")
        right.set(xscale="log", yscale="log", xlabel="environments", ylabel="extra memory (MiB)")
        right.set_xticks(COUNTS, [str(count) for count in COUNTS])
        right.minorticks_off()
        right.grid(alpha=0.25)
        right.set_title("MLP, 2.1 M parameters, 16 examples per environment")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
        print(f"figure  {save(figure, path)}")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--figure", metavar="PATH", type=Path, help="draw time and memory")
    options = arguments.parse_args()
    sizes = [("MLP", 8), ("CNN", 8), ("transformer", 8), ("MLP", 64), ("transformer", 32)]
    if options.quick:
        sizes = sizes[:3]
    rows = run(options, [partial(case, options.threads[-1], *size) for size in sizes])
    if options.figure or not options.quick:
        peaks = memory_over_environments()
        if options.figure:
            draw(rows, peaks, options.figure)


if __name__ == "__main__":
    main()
