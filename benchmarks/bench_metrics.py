"""Metrics: histograms against a read pass, pairs against TorchJD, monitors against no monitor.

python -m benchmarks.bench_metrics --quick
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from .common import Row, Step, measure, parser, peak_memory, rows_of, run, seconds_of
from .contest.models import loss, setting


def histogram(environments: int, columns: int, dtype: torch.dtype) -> list[Row]:
    torch.manual_seed(0)
    grads = torch.randn(environments, columns).to(dtype)

    def eager() -> tuple[Tensor, Tensor]:
        votes = grads.sign().sum(0, dtype=torch.float32).abs().long()
        squares = grads.sum(0, dtype=torch.float32).double().square()
        counts = torch.bincount(votes, minlength=environments + 1)
        return counts, torch.bincount(votes, squares, minlength=environments + 1)

    return measure(
        f"vote histogram, {environments} x {columns} {str(dtype).removeprefix('torch.')}",
        {
            "andmask": lambda: am.ops.vote_histogram(grads),
            "masked_mean": lambda: am.ops.masked_mean(grads, 0.5),
            "read pass": lambda: grads.sum(),
            "eager": eager,
        },
        bytes_moved=grads.nbytes,
        yardstick="read pass",
    )


def histogram_of_moments(environments: int, columns: int) -> list[Row]:
    torch.manual_seed(0)
    moments = am.Moments([torch.empty(columns)])
    moments.add_stacked([torch.randn(environments, columns)])
    sums, votes = moments.sum[0], moments.votes[0]
    assert sums is not None
    assert votes is not None

    def eager() -> tuple[Tensor, Tensor]:
        found = votes.abs().long()
        counts = torch.bincount(found, minlength=environments + 1)
        return counts, torch.bincount(found, sums.double().square(), minlength=environments + 1)

    return measure(
        f"vote histogram of moments, {environments} x {columns}",
        {
            "andmask": lambda: torch.ops.andmask._vote_histograms([sums], [votes], environments),
            "read pass": lambda: (sums.sum(), votes.view(torch.int32).sum()),
            "eager": eager,
        },
        bytes_moved=sums.nbytes + votes.nbytes,
        yardstick="read pass",
    )


def curve(environments: int, columns: int) -> list[Row]:
    """Kept fraction and masked norm for all d + 1 thresholds."""
    torch.manual_seed(0)
    grads = torch.randn(environments, columns)

    def eager() -> list[tuple[Tensor, Tensor]]:
        votes, mean = grads.sign().sum(0).abs(), grads.mean(0)
        masks = [votes >= k for k in range(environments + 1)]
        return [(mask.float().mean(), (mask * mean).norm()) for mask in masks]

    return measure(
        f"tau curve, {environments} x {columns}",
        {
            "andmask": lambda: am.metrics.tau_curve(grads),
            "read pass": lambda: grads.sum(),
            "eager": eager,
        },
        bytes_moved=grads.nbytes,
        yardstick="read pass",
    )


def cosines(environments: int, columns: int) -> list[Row]:
    torch.manual_seed(0)
    layers = [torch.randn(environments, columns // 4) for _ in range(4)]

    def eager() -> Tensor:
        flat = F.normalize(torch.cat(layers, 1), dim=1)
        return flat @ flat.t()

    contestants: dict[str, Step] = {
        "andmask": lambda: am.metrics.gradient_cosines(layers),
        "normalize, matmul": eager,
        "read pass": lambda: [layer.sum() for layer in layers],
    }
    rows = measure(
        f"cosines, {environments} x {columns} in 4 layers",
        contestants,
        bytes_moved=sum(layer.nbytes for layer in layers),
        yardstick="read pass",
    )
    return with_memory(rows, contestants, "normalize, matmul")


def with_memory(rows: list[Row], contestants: dict[str, Step], yardstick: str) -> list[Row]:
    peaks = {name: peak_memory(step) for name, step in contestants.items()}
    for row in rows:
        row.megabytes = peaks[row.contestant] / 2**20
        row.memory_ratio = peaks[row.contestant] / max(1, peaks[yardstick])
    return rows


def pairs(model: str) -> list[Row]:
    """The Gram matrix of the gradients of all examples: one backward pass each."""
    torch.manual_seed(0)
    network, batch = setting(model)
    x, y = batch
    agreement = am.Agreement(network, am.AndMask(0.2))

    def aggregate(gram: bool) -> Step:
        def step() -> None:
            network.zero_grad()
            with agreement(gram=gram):
                loss(network, batch).backward()

        return step

    def plain() -> None:
        network.zero_grad()
        loss(network, batch).backward()

    def per_example() -> Tensor:
        params = {name: p.detach() for name, p in network.named_parameters()}

        def of_one(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            out = torch.func.functional_call(network, params, (x[None],))
            return F.cross_entropy(out, y[None])

        grads = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0))(params, x, y)
        flat = torch.cat([grad.flatten(1) for grad in grads.values()], 1)
        return flat @ flat.t()

    contestants: dict[str, Step] = {
        "Agreement, gram": aggregate(True),
        "Agreement": aggregate(False),
        "plain": plain,
        "vmap, matmul": per_example,
    }
    other = copy.deepcopy(network)  # the engine wants a backward pass for each forward pass
    engine = torchjd_engine(other)
    if engine is not None:
        contestants["TorchJD autogram"] = lambda: engine.compute_gramian(
            F.cross_entropy(other(x), y, reduction="none")
        )
    return measure(
        f"Gram matrix, {model}, {len(y)} examples", contestants, bytes_moved=0, yardstick="plain"
    )


def torchjd_engine(network: nn.Module) -> Any:
    try:
        return import_module("torchjd.autogram").Engine(network, batch_dim=0)
    except ImportError:
        return None


def monitor(model: str, every_example: bool) -> list[Row]:
    """Training steps with and without; twenty together, of which two are recorded."""
    names = {"no monitor": None, "andmask": 10, "recorded each step": 1}
    steps: dict[str, Step] = {}
    for name, every in names.items():
        network, (x, y) = setting(model)
        optimizer = am.optim.AndMaskAdamW(network.parameters(), lr=1e-4, tau=0.2)
        agreement = am.Agreement(network, optimizer)
        if every is not None:
            am.metrics.Monitor(agreement, every=every)

        steps[name] = partial(_train, network, x, y, optimizer, agreement, every_example)
    what = "every example" if every_example else "8 backward passes"
    return alternately(f"monitor, {model}, {what}", steps, yardstick="no monitor")


def _train(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    optimizer: am.optim.AndMaskAdamW,
    agreement: am.Agreement,
    every_example: bool,
) -> None:
    if every_example:
        with agreement():
            loss(network, (x, y)).backward()
    else:
        for part in zip(x.chunk(8), y.chunk(8), strict=True):
            with optimizer.environment():
                loss(network, part).backward()
    optimizer.step()
    optimizer.zero_grad()


def alternately(case: str, steps: dict[str, Step], yardstick: str) -> list[Row]:
    """Time twenty steps of each in turn, step by step: what disturbs one disturbs all."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # the first is recorded, and proves
    for _ in range(7):
        sums = dict.fromkeys(steps, 0.0)
        for _ in range(20):
            for name, step in steps.items():
                sums[name] += seconds_of(step)
        for name, total in sums.items():
            times[name].append(total / 20)
    rows = rows_of(case, times, yardstick)
    for row in rows:
        pairs = zip(times[row.contestant], times[yardstick], strict=True)
        row.ratio = statistics.median(own / base for own, base in pairs)
    return rows


def inputs(model: str) -> list[Row]:
    """What environments agree on by input, and the diagnosis, against training on the batches."""
    torch.manual_seed(0)
    network, (x, y) = setting(model)
    environments = list(zip(x.chunk(4), y.chunk(4), strict=True))

    def plain() -> None:
        for batch in environments:
            network.zero_grad()
            loss(network, batch).backward()

    metrics = am.metrics
    return measure(
        f"inputs, {model}, 4 environments",
        {
            "input_agreement": lambda: metrics.input_agreement(
                network, environments, F.cross_entropy, tau=0.8
            ),
            "diagnose": lambda: metrics.diagnose(network, environments, F.cross_entropy),
            "plain": plain,
        },
        bytes_moved=0,
        yardstick="plain",
    )


def quadratics(count: int, size: int) -> list[Callable[[Any], Tensor]]:
    torch.manual_seed(0)
    roots = torch.randn(count, size, 2 * size, dtype=torch.float64)
    hessians = roots @ roots.mT / size

    def quadratic(hessian: Tensor, x: Tensor) -> Tensor:
        return x @ hessian @ x / 2

    return [partial(quadratic, hessian) for hessian in hessians]


def exact_score(size: int) -> list[Row]:
    """The score of three quadratics: Hessians and generalised eigenvalues of all pairs."""
    import scipy.linalg

    losses = quadratics(3, size)
    point = torch.zeros(size, dtype=torch.float64)

    def by_hand() -> float:
        hessians = [torch.func.hessian(loss)(point).numpy() for loss in losses]
        top = [size - 1, size - 1]
        return max(
            float(scipy.linalg.eigh(b, a, eigvals_only=True, subset_by_index=top)[0])
            for i, a in enumerate(hessians)
            for j, b in enumerate(hessians)
            if i != j
        )

    return measure(
        f"inconsistency score, 3 quadratics of {size} parameters",
        {
            "andmask": lambda: am.metrics.inconsistency_score(losses, point, 1.0, "quadratic"),
            "hessian, scipy": by_hand,
        },
        bytes_moved=0,
        yardstick="hessian, scipy",
    )


def search(size: int) -> list[Row]:
    """All starts together, against one after the other."""
    losses = quadratics(2, size)
    point = torch.zeros(size, dtype=torch.float64)

    def score(starts: int) -> object:
        generator = torch.Generator().manual_seed(0)
        return am.metrics.inconsistency_score(
            losses, point, 1.0, "search", starts=starts, steps=50, generator=generator
        )

    return measure(
        f"search, 2 quadratics of {size} parameters, 50 steps",
        {"andmask, 8 starts": lambda: score(8), "8 times 1": lambda: [score(1) for _ in range(8)]},
        bytes_moved=0,
        yardstick="8 times 1",
    )


def main() -> None:
    options = parser(__doc__).parse_args()
    shapes = [
        (2, 1 << 24),
        (8, 1 << 22),
        (16, 1 << 22),
        (64, 1 << 20),
        (128, 1 << 20),
        (1024, 1 << 16),
    ]
    models = ["MLP", "CNN", "transformer"]
    if options.quick:
        shapes, models = shapes[1:4:2], models[:1]
    dtypes = (torch.float32, torch.bfloat16)
    cases: list[Callable[[], list[Row]]] = []
    cases += [partial(histogram, *shape, dtype) for shape in shapes for dtype in dtypes]
    cases += [partial(histogram_of_moments, *shape) for shape in shapes]
    cases += [partial(curve, *shape) for shape in shapes[:4]]
    cases += [partial(cosines, *shape) for shape in shapes[:5]]
    cases += [partial(pairs, model) for model in models]
    cases += [partial(monitor, model, every) for model in models for every in (True, False)]
    cases += [partial(inputs, model) for model in models if model != "transformer"]
    cases += [partial(exact_score, size) for size in (50, 400)]
    cases += [partial(search, size) for size in (10, 200)]
    run(options, cases)


if __name__ == "__main__":
    main()
