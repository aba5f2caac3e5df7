"""The ops on every device here beside eager torch and torch.compile on the same device.

    python benchmarks/bench_cuda.py --quick                        # under 3 minutes
    python benchmarks/bench_cuda.py --save NAME --figure PATH
    python benchmarks/roofline.py NAME                             # predictions beside it

The yardstick of each case is measured with it in turns: a copy of as many bytes as the op has to
read and write, or the plain weight gradient for moments of weight gradients. Shares are of that.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RUNS, Row, measure
from peaks import copied_bytes, multiply_adds
from roofline import Work, time_text, works
from torch import Tensor

import andmask_ext as am

ops = torch.ops.andmask
TAU, COUNT = 0.6, 8
ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
KINDS = (False, True)  # whether an op is a product of matrices
NO_CUDA = "no CUDA device was found: every row is of the CPU"
Function = Callable[[], object]
OURS, EAGER, COMPILED = "andmask", "eager", "torch.compile"


# ---- the eager formulas ----


def masked_mean(grads: Tensor) -> Tensor:
    return (grads.sign().sum(0).abs() >= TAU * len(grads)) * grads.mean(0)


def masked_mean_rescaled(grads: Tensor) -> Tensor:
    mask = (grads.sign().sum(0).abs() >= TAU * len(grads)).to(grads.dtype)
    return mask * grads.mean(0) / (1e-10 + mask.mean())


def agreement_mask(grads: Tensor) -> Tensor:
    return (grads.sign().sum(0).abs() >= TAU * len(grads)).to(grads.dtype)


def median(grads: Tensor) -> Tensor:
    ranked = grads.sort(0).values
    last = len(grads) - 1
    return (ranked[last // 2] + ranked[last - last // 2]) / 2


def accumulate(sums: list[Tensor], votes: list[Tensor], grads: list[Tensor]) -> None:
    for total, vote, grad in zip(sums, votes, grads, strict=True):
        total.add_(grad)
        vote.add_(grad.sign().to(torch.int8))


def update(total: Tensor, vote: Tensor) -> Tensor:
    return (vote.abs() >= TAU * COUNT) * (total / COUNT)


def resolve(sums: list[Tensor], votes: list[Tensor]) -> list[Tensor]:
    return [update(total, vote) for total, vote in zip(sums, votes, strict=True)]


def sgd(params: list[Tensor], buffers: list[Tensor], updates: list[Tensor]) -> None:
    for param, buffer, grad in zip(params, buffers, updates, strict=True):
        buffer.mul_(0.9).add_(grad)
        param.add_(buffer, alpha=-ADAM["lr"])


def adam_step(param: Tensor, grad: Tensor, average: Tensor, square: Tensor, step: Tensor) -> Tensor:
    """Move the averages; return by how much the parameter moves."""
    step.add_(1)
    average.lerp_(grad, 1 - ADAM["beta1"])
    square.mul_(ADAM["beta2"]).addcmul_(grad, grad, value=1 - ADAM["beta2"])
    size = ADAM["lr"] / (1 - ADAM["beta1"] ** step)
    return size * average / ((square / (1 - ADAM["beta2"] ** step)).sqrt() + ADAM["eps"])


def adam(params: list[Tensor], *state: list[Tensor]) -> None:
    for param, grad, average, square, step in zip(params, *state, strict=True):
        param.sub_(adam_step(param, grad, average, square, step))


def temporal_adam(params: list[Tensor], *state: list[Tensor]) -> None:
    for param, grad, average, square, step, signs in zip(params, *state, strict=True):
        move = adam_step(param, grad, average, square, step)
        signs.lerp_(grad.sign(), 0.1)
        param.sub_(move * (signs.abs() >= TAU * (1 - 0.9**step)))


def outer(total: Tensor, votes: Tensor, a: Tensor, d: Tensor) -> None:
    """Products of some environments at a time, held; their sum and the sum of their signs."""
    pieces = max(1, (1 << 28) // (4 * total.numel()))
    for some_a, some_d in zip(a.split(pieces), d.split(pieces), strict=True):
        each = torch.bmm(some_d.transpose(1, 2), some_a)
        total.add_(each.sum(0))
        votes.add_(each.sign().sum(0).to(votes.dtype))


# ---- the cases ----


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def on_stacks(work: Work, device: torch.device) -> dict[str, Function]:
    environments, columns = (int(n.replace(",", "")) for n in work.size.split(" x "))
    dtype = torch.bfloat16 if work.op.endswith("bfloat16") else torch.float32
    grads = normal(environments, columns, device=device, dtype=dtype)
    formula, op = {
        "masked_mean": (masked_mean, lambda: ops.masked_mean(grads, TAU)),
        "masked_mean, rescale": (masked_mean_rescaled, lambda: ops.masked_mean(grads, TAU, True)),
        "agreement_mask": (agreement_mask, lambda: ops.agreement_mask(grads, TAU)),
    }.get(work.op.removesuffix(" bfloat16")) or (median, lambda: am.Median()(grads))
    compiled = torch.compile(formula, dynamic=False)
    return {OURS: op, EAGER: lambda: formula(grads), COMPILED: lambda: compiled(grads)}


def on_lists(work: Work, device: torch.device) -> dict[str, Function]:
    count, size = (int(n.replace(",", "")) for n in work.size.split(" x "))

    def lists(fill: float | None = None) -> list[Tensor]:
        one = lambda: (
            normal(size, device=device)
            if fill is None
            else torch.full((size,), fill, device=device)
        )
        return [one() for _ in range(count)]

    grads, sums, params = lists(), lists(), lists()
    votes = [torch.randint(-COUNT, COUNT + 1, (size,), device=device).to(torch.int8) for _ in grads]
    steps = [torch.zeros((), device=device) for _ in grads]
    own = (sums, votes, [], [], COUNT, "and_mask", [TAU])

    def pair(formula: Callable, *arguments: list[Tensor]) -> dict[str, Function]:
        compiled = torch.compile(formula, dynamic=False)
        return {EAGER: lambda: formula(*arguments), COMPILED: lambda: compiled(*arguments)}

    if work.op.startswith("accumulate_"):
        call = lambda: ops.accumulate_(sums, votes, [], [], grads, 1)  # noqa: E731
        return {OURS: call, **pair(accumulate, sums, votes, grads)}
    if work.op.startswith("resolve"):
        return {OURS: lambda: ops.resolve(*own), **pair(resolve, sums, votes)}
    if work.op == "sgd_step_":
        buffers = lists(0.0)
        options = {"lr": 1e-3, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0}
        flags = ("decoupled_weight_decay", "nesterov", "maximize", "first_step")
        options |= dict.fromkeys(flags, False)
        step = lambda p, b, s, v: sgd(p, b, resolve(s, v))  # noqa: E731
        return {
            OURS: lambda: ops.sgd_step_(params, buffers, *own, False, **options),
            **pair(step, params, buffers, sums, votes),
        }
    averages, squares, signs = lists(0.0), lists(0.0), lists(0.0)
    options = {**ADAM, "weight_decay": 0.0, "decoupled_weight_decay": True, "maximize": False}
    if work.op == "adam_step_":
        step = lambda p, a, q, n, s, v: adam(p, resolve(s, v), a, q, n)  # noqa: E731
        return {
            OURS: lambda: ops.adam_step_(
                params, averages, squares, [], steps, *own, False, **options
            ),
            **pair(step, params, averages, squares, steps, sums, votes),
        }
    options |= {"tau": TAU, "beta3": 0.9, "bias_correction": True}
    return {
        OURS: lambda: ops.temporal_adam_step_(
            params, averages, squares, signs, steps, grads, **options
        ),
        **pair(temporal_adam, params, grads, averages, squares, steps, signs),
    }


def on_rows(work: Work, device: torch.device) -> dict[str, Function]:
    """Moments of a linear layer's weight gradient; the yardstick is the plain gradient."""
    each = int(work.op.split()[1])
    rows, inputs, outputs = (
        int(work.size.split()[0]) * each,
        *(int(n) for n in work.size.split(", ")[1].split(" to ")),
    )
    dtype = torch.bfloat16 if work.kind == "bfloat16" else torch.float32
    a = normal(rows, inputs, device=device, dtype=dtype)
    d = normal(rows, outputs, device=device, dtype=dtype)
    a3, d3 = a.view(-1, each, inputs), d.view(-1, each, outputs)
    total = torch.zeros(outputs, inputs, device=device)
    votes = torch.zeros(outputs, inputs, dtype=torch.int16, device=device)
    compiled = torch.compile(outer, dynamic=False)
    plain = torch.empty(outputs, inputs, dtype=dtype, device=device)
    return {
        OURS: lambda: ops.accumulate_outer_(total, votes, None, None, a3, d3, None, None, 0),
        EAGER: lambda: outer(total, votes, a3, d3),
        COMPILED: lambda: compiled(total, votes, a3, d3),
        "plain": lambda: torch.mm(d.t(), a, out=plain),
    }


def on_images(work: Work, device: torch.device) -> dict[str, Function]:
    count, side = int(work.size.split()[0]), int(work.size.split()[2])
    channels = int(work.size.split()[-1])
    images = normal(count, channels, side, side, device=device)
    weight = normal(channels, channels, 3, 3, device=device)
    grads = torch.randn_like(F.conv2d(images, weight, padding=1))
    total = torch.zeros_like(weight)
    votes = torch.zeros_like(weight, dtype=torch.int16)
    window = ([1, 1], [1, 1], [1, 1])

    def plain(x: Tensor, d: Tensor) -> Tensor:
        rest = (*window, False, [0, 0], 1, [False, True, False])
        return torch.ops.aten.convolution_backward(d, x, weight, None, *rest)[1]

    def eager() -> None:
        for x, d in zip(images.split(1), grads.split(1), strict=True):
            one = plain(x, d)
            total.add_(one)
            votes.add_(one.sign().to(votes.dtype))

    return {
        OURS: lambda: ops.accumulate_convolution_(
            total, votes, None, None, images, grads, None, None, 0, *window, 1
        ),
        EAGER: eager,
        "plain": lambda: plain(images, grads),
    }


def build(work: Work, device: torch.device) -> dict[str, Function]:
    if "outer" in work.op:
        return on_rows(work, device)
    if "convolution" in work.op:
        return on_images(work, device)
    contestants = (
        on_lists
        if "step" in work.op or work.op.split()[0] in ("accumulate_", "resolve")
        else on_stacks
    )(work, device)
    source = torch.zeros(int(work.total_bytes) // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return {**contestants, "copy": lambda: target.copy_(source)}


# ---- measuring ----


def case(work: Work, device: torch.device) -> list[dict]:
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
    amount = int(2 * work.multiply_adds if work.product else work.total_bytes)
    rows = measure(work.op, contestants, bytes_moved=amount, yardstick=yardstick, rounds=5)
    for name, note in failed.items():
        rows.append(Row(work.op, name, rows[0].threads, rows[0].isa, *[0.0] * 5, note=note))
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


def table(rows: list[dict]) -> str:
    lines = [
        "| op | size | device | time | IQR | GB/s or GFLOP/s | share of copy, or of plain product "
        "| eager ÷ | `torch.compile` ÷ |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    cases = dict.fromkeys((row["device"], row["op"]) for row in rows)
    for device, op in cases:
        own = {r["contestant"]: r for r in rows if (r["device"], r["op"]) == (device, op)}
        ours = own[OURS]
        cells = [f"`{op}`", ours["size"], device]
        if ours["note"]:
            lines.append("| " + " | ".join([*cells, ours["note"], *[""] * 5]) + " |")
            continue
        cells += [time_text(ours["median"]), f"{ours['iqr'] / ours['median']:.0%}"]
        cells += [f"{ours['giga_per_second']:.0f}", f"{ours['share']:.2f}"]
        for peer in (EAGER, COMPILED):
            if peer not in own:
                cells.append("-")
            elif own[peer]["note"]:
                cells.append(own[peer]["note"])
            else:
                cells.append(f"{own[peer]['median'] / ours['median']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    if "cuda" not in {row["device"] for row in rows}:
        lines.append(f"| **{NO_CUDA}** |" + " |" * 8)
    return "\n".join(lines)


def draw(run: dict, path: str) -> None:
    """One column of bars for each device: shares of a copy above, of the plain product below."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    colors = {OURS: "#0072B2", COMPILED: "#E69F00", EAGER: "#999999"}  # Okabe-Ito
    devices = list(run["devices"])
    count = [
        len({r["op"] for r in run["rows"] if r["product"] is product}) for product in (False, True)
    ]
    figure, axes = plt.subplots(
        2,
        len(devices),
        figsize=(3.2 + 4.3 * len(devices), 9),
        squeeze=False,
        sharey="row",
        height_ratios=count,
    )
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
                    axis.annotate(
                        text, (value, place), (2, -2.5), fontsize=6.5, textcoords="offset points"
                    )
            axis.axvline(1, color="black", lw=0.8, ls="--")
            axis.set_yticks(range(len(names)), names, fontsize=8)
            axis.set_ylim(len(names) - 0.4, -0.6)
            axis.set_xlabel(titles[line], fontsize=9)
            axis.margins(x=0.12)
        axes[0][column].set_title(f"{device}: {run['devices'][device]['name']}", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)
    if "cuda" not in run["devices"]:
        figure.suptitle(NO_CUDA, fontsize=9)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="small sizes on the CPU")
    options.add_argument("--save", metavar="NAME", help="keep as benchmarks/runs/NAME.json")
    options.add_argument("--figure", metavar="PATH", help="default: benchmarks/runs/NAME.png")
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
    run: dict = {"info": am.build_info(), "sizes": sizes, "devices": {}, "rows": []}
    for name, place in sizes.items():
        device = torch.device(name)
        run["devices"][name] = facts(device)
        print(f"{name}: {run['devices'][name]}", flush=True)
        for work in works(place).values():
            if chosen.only not in work.op:
                continue
            rows = case(work, device)
            run["rows"] += rows
            print(table(rows).splitlines()[2], flush=True)
            if name == "cuda":
                torch.cuda.empty_cache()
    print(f"\n{table(run['rows'])}")
    if chosen.save:
        RUNS.mkdir(exist_ok=True)
        path = RUNS / f"{chosen.save}.json"
        path.write_text(json.dumps(run, indent=1))
        print(f"\nkept as {path}")
    picture = chosen.figure or (str(RUNS / f"{chosen.save}.png") if chosen.save else None)
    if picture:
        draw(run, picture)
        print(f"figure  {picture}")


if __name__ == "__main__":
    main()
