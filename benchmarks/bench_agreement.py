"""One batch, many environments: ``Agreement`` against a plain pass and the ways that exist.

python benchmarks/bench_agreement.py --quick
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import RUNS, Row, measure, parser, peak_memory, run, status
from models import MODELS, Batch, mlp
from peers import EXACT, GRADIENTS, OURS, PLAIN, PLAIN_STEP, STEPS, Contestant, Step
from torch import nn

import andmask_ext

CONTESTANTS = {**GRADIENTS, **STEPS}
LIBRARIES = {"Opacus": "opacus", "BackPACK": "backpack", "TorchJD": "torchjd"}
GROUPS = 8
EVERY = "every example"
SLOW, VERY_SLOW = 3.0, 30.0  # seconds: timed once, in the second call or in the first
MOST_BYTES = 10 << 30  # of a contestant that keeps the gradients of all environments


def setting(model: str, examples: int | None = None) -> tuple[nn.Module, Batch]:
    """Return a fresh model and a batch; ``MLP 512`` is the MLP of that width."""
    torch.manual_seed(0)
    if model.startswith("MLP "):
        width = int(model.split()[1])
        assert examples is not None
        return mlp(width), (torch.randn(examples, width), torch.randint(0, 10, (examples,)))
    build, batch, usual = MODELS[model]
    return build(), batch(examples or usual)


def unavailable(name: str, environments: int) -> str:
    """Return why a contestant is not even tried, or nothing."""
    if name in LIBRARIES:
        try:
            importlib.import_module(LIBRARIES[name])
        except ImportError as error:
            return "not installed" if error.name == LIBRARIES[name] else reason(error)
    if name == "DomainBed" and environments > GROUPS:
        return f"not run: {environments} passes through the graph of the whole batch"
    if name in (OURS, "Agreement + AndMaskAdamW") and not hasattr(andmask_ext, "Agreement"):
        return "andmask_ext.Agreement is not there"
    return ""


def seconds_of(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def row_of(case: str, contestant: str, seconds: float) -> Row:
    """Return the row of one timing (0: of none)."""
    isa = str(andmask_ext.build_info()["isa"])
    return Row(case, contestant, torch.get_num_threads(), isa, seconds, 0.0, seconds, 0.0, 0.0)


def reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:110]}{'...' if len(text) > 110 else ''}"


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([param.grad.flatten() for param in model.parameters()])


def case(
    model: str,
    every: bool,
    contestants: dict[str, Contestant],
    yardstick: str,
    memory: bool,
    examples: int | None = None,
) -> list[Row]:
    """Time all contestants that can do it; the others appear with their reason."""
    network, batch = setting(model, examples)
    count = len(batch[1])
    environments = count if every else GROUPS
    parameters = sum(p.numel() for p in network.parameters())
    name = (
        f"{model}, {parameters / 1e6:.2f} M, batch {count}, "
        f"{EVERY if every else f'{GROUPS} groups'}{', whole step' if yardstick != PLAIN else ''}"
    )
    print(f"\n{name}: trying", end="", flush=True)
    steps, notes, found = {}, {}, {}
    timed: dict[str, Row] = {}
    for contestant, make in contestants.items():
        print(f" {contestant} ...", end="", flush=True)
        notes[contestant] = unavailable(contestant, environments)
        if notes[contestant]:
            continue
        own = network if yardstick == PLAIN else setting(model, examples)[0]
        try:
            step = make(own, batch, environments)
            seconds = seconds_of(step)
            if SLOW <= seconds < VERY_SLOW:  # the first call warms up, and allocates
                seconds = seconds_of(step)
        except Exception as error:  # a library may raise anything
            notes[contestant] = reason(error)
            continue
        if yardstick == PLAIN and contestant != PLAIN:
            found[contestant] = gradient(network)
        if seconds < SLOW or contestant in (yardstick, OURS):
            steps[contestant] = step
        else:
            timed[contestant] = row_of(name, contestant, seconds)
            notes[contestant] = "timed once"
    for contestant, own_gradient in found.items():
        notes[contestant] = ", ".join(
            filter(None, [notes[contestant], differences(own_gradient, found.get(EXACT))])
        )
    found.clear()
    print(" timing ...", flush=True)
    for row in measure(name, steps, bytes_moved=0, yardstick=yardstick, seconds_per_round=0.1):
        timed[row.contestant] = row
    steps.clear()
    gc.collect()
    rows = [timed.get(contestant) or row_of(name, contestant, 0.0) for contestant in contestants]
    for row in rows:
        row.note = notes[row.contestant]
        row.ratio = row.median / timed[yardstick].median
    if memory:
        print("  memory, each in a process of its own ...", flush=True)
        for row in rows:
            if row.median:
                row.megabytes, row.process = memory_of(row.contestant, model, count, environments)
        base = timed[yardstick]
        for row in rows:
            if row.megabytes and row.process and base.megabytes and base.process:
                row.memory_ratio = row.megabytes / base.megabytes
                row.process_ratio = row.process / base.process
    return rows


def differences(own: torch.Tensor, exact: torch.Tensor | None) -> str:
    """Say how far a gradient is from the loop's, if more than rounding could do."""
    if exact is None:
        return "not compared"
    masked = int(((own == 0) != (exact == 0)).sum())
    both = (own != 0) & (exact != 0)
    far = float(((own - exact).abs() * both).max() / exact.abs().max())
    notes = [f"{masked} coordinates masked otherwise than in the loop"] * (masked > 0)
    notes += [f"largest difference {far:.0e}"] * (far > 1e-4)
    return ", ".join(notes)


# ---- memory ----


def memory_of(
    contestant: str, model: str, examples: int, environments: int
) -> tuple[float | None, float | None]:
    """Return the peak memory in MiB of two steps, over that of the process with model and batch,
    and that of the whole process.
    """
    command = [sys.executable, "-W", "ignore", __file__, "--memory-of", contestant, model,
               str(examples), str(environments)]  # fmt: skip
    # Memory goes back to the system when it is freed, so that what counts is what is in use.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"  memory of {contestant}: failed: {done.stderr.strip().splitlines()[-1:]}")
        return None, None
    over, whole = done.stdout.split()[-2:]
    return float(over), float(whole)


def print_memory(contestant: str, model: str, examples: int, environments: int) -> None:
    torch.set_num_threads(1)
    if contestant in LIBRARIES:
        importlib.import_module(LIBRARIES[contestant])
    network, batch = setting(model, examples)
    few = tuple(part[: max(1, examples // environments)] for part in batch)
    CONTESTANTS[PLAIN](network, few, 1)()  # warm up
    CONTESTANTS[contestant](*setting("MLP 16", 8), 8)()  # libraries are loaded when first used
    for param in network.parameters():
        param.grad = None
    started = False

    def first_and_second() -> None:
        nonlocal started
        if not started:  # peak_memory's own first call: nothing is kept yet
            started = True
            return
        step = CONTESTANTS[contestant](network, batch, environments)
        if seconds_of(step) < SLOW:
            step()

    over = peak_memory(first_and_second)
    print(over / 2**20, status("VmHWM") / 2**20)


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
        rows = case(f"MLP {width}", True, usable, PLAIN, memory=True, examples=batch)
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


def limit_memory() -> None:
    """Let allocations fail, not the machine, if a contestant wants more than 3/4 of its memory."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    kinds = [EVERY, f"{GROUPS} groups"]
    arguments.add_argument("--environments", nargs="+", choices=kinds, default=kinds)
    arguments.add_argument(
        "--figure", metavar="PATH", help="draw time and memory over batch, width"
    )
    arguments.add_argument(
        "--figure-only", action="store_true", help="no table; draw kept points again if there are"
    )
    arguments.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    limit_memory()
    if options.memory_of:
        contestant, model, examples, environments = options.memory_of
        print_memory(contestant, model, int(examples), int(environments))
        return
    last = options.threads[-1]
    settings: list[tuple[str, bool, int | None]] = [
        (model, kind == EVERY, None) for kind in options.environments for model in options.models
    ]
    if options.quick:
        settings, options.threads = [("MLP", True, 32), ("MLP", False, 32)], [last]
    if not options.figure_only:
        cases = []
        for model, every, examples in settings:
            for group, base in ((GRADIENTS, PLAIN), (STEPS, PLAIN_STEP)):
                cases.append(
                    lambda m=model, e=every, n=examples, g=group, b=base: case(
                        m, e, g, b, memory=torch.get_num_threads() == last, examples=n
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
    sys.path.insert(0, str(Path(__file__).parent))
    main()
