"""Training with d environments against the d plain backward passes it contains, and its peers.

python benchmarks/bench_backward.py --quick
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import andmask_ext as am

from .common import Row, measure, parser, peak_memory, run
from .contest.models import MODELS, Batch, loss

TAU = 0.6
PLAIN = "d plain backward passes"


def environments(model: str, count: int) -> tuple[nn.Module, list[Batch]]:
    """Return a fresh model, and its usual batch split evenly between environments."""
    torch.manual_seed(0)
    build, draw, examples = MODELS[model]
    network = build()
    return network, [draw(max(1, examples // count)) for _ in range(count)]


def contestants(model: nn.Module, data: list) -> dict[str, Callable[[], object]]:
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = am.optim.AndMaskSGD(params, tau=TAU)

    def plain() -> None:
        for param in params:
            param.grad = None
        for batch in data:
            loss(model, batch).backward()

    def backward() -> None:
        for param in params:
            param.grad = None
        am.backward((loss(model, batch) for batch in data), am.AndMask(TAU), params)

    def streaming() -> None:
        optimizer.zero_grad()
        for batch in data:
            with optimizer.environment():
                loss(model, batch).backward()
        # What remains is optimizer.step(), which resolves as it goes: bench_optim.py.

    def authors() -> None:
        columns = [torch.autograd.grad(loss(model, batch), params) for batch in data]
        for param, grads in zip(params, zip(*columns, strict=True), strict=True):
            stacked = torch.stack(grads)
            mask = (stacked.sign().mean(0).abs() >= TAU).to(stacked.dtype)
            param.grad = mask * stacked.mean(0)

    found: dict[str, Callable[[], object]] = {
        "optimizer.environment": streaming,
        "am.backward": backward,
        "authors' loop": authors,
        PLAIN: plain,
    }
    try:
        import torchjd
    except ImportError:
        print("  (TorchJD is not installed: `pip install torchjd` to have it measured)")
    else:
        from torchjd.aggregation import Mean

        def jacobian() -> None:  # with the cheapest of its aggregators
            for param in params:
                param.grad = None
            torchjd.autojac.backward(
                [loss(model, batch) for batch in data], inputs=params, parallel_chunk_size=1
            )
            torchjd.autojac.jac_to_grad(params, Mean())

        found["TorchJD"] = jacobian
    return found


def case(model: str, count: int, memory: bool) -> list[Row]:
    network, data = environments(model, count)
    functions = contestants(network, data)
    parameters = sum(p.numel() for p in network.parameters())
    examples = len(data[0][1])
    rows = measure(
        f"{model}, {parameters / 1e6:.2f} M parameters, {count} x {examples}",
        functions,
        bytes_moved=4 * parameters * count,
        yardstick=PLAIN,
    )
    if memory:
        for name, function in functions.items():
            peak = peak_memory(function)
            print(
                f"  extra memory, {name}: {peak / 2**20:.1f} MiB, {peak / parameters:.1f} bytes a "
                "parameter"
            )
    return rows


COUNTS = (4, 16, 64, 256)


def memory_over_environments() -> dict[str, list[float]]:
    """Peak memory in MiB over the number of environments, for each contestant."""
    print(
        "\nextra memory in MiB, MLP, 16 examples per environment, d = "
        + ", ".join(map(str, COUNTS))
    )
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


COLORS = ["#0072B2", "#56B4E9", "#D55E00", "#999999", "#E69F00"]  # Okabe-Ito


def draw(rows: list[Row], peaks: dict[str, list[float]], path: str) -> None:
    """Time for the three models with 8 environments, and memory over environments."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if ", 8 x" in row.case and row.threads == rows[-1].threads]
    names = list(peaks)
    models = list(dict.fromkeys(row.case for row in rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for number, (name, color) in enumerate(zip(names, COLORS, strict=False)):
        ratios = [
            next(r.ratio for r in rows if (r.case, r.contestant) == (model, name))
            for model in models
        ]
        places = [i + (number - (len(names) - 1) / 2) * 0.16 for i in range(len(models))]
        bars = left.bar(places, ratios, 0.15, color=color, label=name)
        left.bar_label(bars, fmt="%.2f", fontsize=6.5, rotation=90, padding=2)
        right.plot(COUNTS[: len(peaks[name])], peaks[name], "o-", color=color, label=name)
    left.set_xticks(range(len(models)), [model.split(",")[0] for model in models])
    left.set(yscale="log", ylim=(0.7, 20), ylabel="time / d plain backward passes")
    left.axhline(1, color="black", linewidth=0.6)
    left.set_title("8 environments", fontsize=10)
    right.set(xscale="log", yscale="log", xlabel="environments", ylabel="extra memory (MiB)")
    right.set_xticks(COUNTS, [str(count) for count in COUNTS])
    right.minorticks_off()
    right.grid(alpha=0.25)
    right.set_title("MLP, 2.1 M parameters, 16 examples per environment", fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--figure", metavar="PATH", help="draw time and memory")
    options = arguments.parse_args()
    sizes = [("MLP", 8), ("CNN", 8), ("transformer", 8), ("MLP", 64), ("transformer", 32)]
    if options.quick:
        sizes = sizes[:3]
    last = options.threads[-1]
    rows = run(
        options,
        [lambda size=size: case(*size, memory=torch.get_num_threads() == last) for size in sizes],
    )
    if options.figure or not options.quick:
        peaks = memory_over_environments()
        if options.figure:
            draw(rows, peaks, options.figure)
            print(f"figure  {options.figure}")


if __name__ == "__main__":
    main()
