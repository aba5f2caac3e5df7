"""Training with d environments against the d plain backward passes it contains, and its peers.

python benchmarks/bench_backward.py --quick
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Row, measure, parser, peak_memory, run
from models import environments, loss
from torch import nn

import andmask_ext as am

TAU = 0.6
PLAIN = "d plain backward passes"


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
        optimizer.resolve()

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


def memory_over_environments() -> None:
    """Peak memory over the number of environments: a line for each contestant."""
    counts = (4, 16, 64, 256)
    print(
        "\nextra memory in MiB, MLP, 16 examples per environment, d = "
        + ", ".join(map(str, counts))
    )
    peaks: dict[str, list[str]] = {}
    for count in counts:
        network, data = environments("MLP", 8)
        repeated = [data[i % 8] for i in range(count)]
        for name, function in contestants(network, repeated).items():
            if count > 16 and name in ("authors' loop", "TorchJD"):
                continue  # gigabytes, minutes
            peaks.setdefault(name, []).append(f"{peak_memory(function) / 2**20:.0f}")
    for name, found in peaks.items():
        print(f"  {name:28}" + ", ".join(found))


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    sizes = [("MLP", 8), ("CNN", 8), ("transformer", 8), ("MLP", 64), ("transformer", 32)]
    if options.quick:
        sizes = sizes[:3]
    last = options.threads[-1]
    run(
        options,
        [lambda size=size: case(*size, memory=torch.get_num_threads() == last) for size in sizes],
    )


if __name__ == "__main__":
    main()
